"""Files that a stranger made: every reader of weights refuses them, and runs nothing in them."""

import os
import pickle
import shutil
import zipfile

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorProperties

import ablate
import eval as evaluate
import memory
import train
from nanorecall import checkpoint, pretrained
from nanorecall.files import inside, sha256_file
from nanorecall.settings import ConfigError, RunError
from nanorecall.sharded_checkpoint import shard_dir
from nanorecall.tensors import DTYPES
from toys import Bomb, flags, run

NAME = "model.embed.weight"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run whose checkpoints are in shards."""
    folder = tmp_path_factory.mktemp("trained")
    _, out = run(folder, max_steps=4, eval_interval=2)
    assert train.main([f"--resume={out}", "--export_checkpoint=shards"]) == 0
    return folder / "run"


def contents(folder):
    """{path: bytes} of a run but its JSON files, in which --resume notes that it tried."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix not in (".json", ".jsonl"):
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


# ---- the index of shards, with something else in it ----------------------------------------------

# A way to spoil shards takes their directory and the path of a fuse: the file that a bomb creates
# when it goes off.


def read_index(shards):
    return pickle.loads((shards / ".metadata").read_bytes())


def write_index(shards, index):
    (shards / ".metadata").write_bytes(pickle.dumps(index))


def spoil_index(change):
    """A way to spoil shards by change(index, shards, fuse)."""

    def spoil(shards, fuse):
        index = read_index(shards)
        change(index, shards, fuse)
        write_index(shards, index)

    return spoil


def entry(index, name=NAME):
    return next(info for key, info in index.storage_data.items() if key.fqn == name)


def bytes_like_a_tensor(index, shards, fuse):
    """What torch's own planner would give to torch.load(weights_only=False)."""
    about = BytesStorageMetadata()
    about.size = index.state_dict_metadata[NAME].size
    about.properties = TensorProperties(torch.float32)
    index.state_dict_metadata[NAME] = about
    with open(shards / "bomb", "wb") as f:
        torch.save(Bomb(fuse), f)
    key = next(key for key in index.storage_data if key.fqn == NAME)
    del index.storage_data[key]
    info = entry(index, "model.final_norm.weight")
    bare = type(key)(NAME)
    index.storage_data[bare] = type(info)("bomb", 0, os.path.getsize(shards / "bomb"))


def bomb_instead_of_a_tensor(index, shards, fuse):
    with open(shards / "bomb", "wb") as f:
        torch.save(Bomb(fuse), f)
    info = entry(index)
    info.relative_path, info.offset, info.length = "bomb", 0, os.path.getsize(shards / "bomb")


def elsewhere(name):
    def change(index, shards, fuse):
        shutil.copy(shards / "__0_0.distcp", shards.parent.parent / "outside")
        entry(index).relative_path = name.replace("HERE", str(shards.parent.parent))

    return change


def set_field(path, value):
    """index.<path> = value, with FUSE for a bomb."""

    def change(index, shards, fuse):
        *parents, last = path.split(".")
        for name in parents:
            index = entry(index) if name == "entry" else getattr(index, name)
        setattr(index, last, Bomb(fuse) if value == "FUSE" else value)

    return change


def set_tensor(field, value):
    def change(index, shards, fuse):
        setattr(index.state_dict_metadata[NAME], field, Bomb(fuse) if value == "FUSE" else value)

    return change


def a_pipe(index, shards, fuse):
    os.mkfifo(shards / "pipe")
    entry(index).relative_path = "pipe"


def raw(data):
    def spoil(shards, fuse):
        (shards / ".metadata").write_bytes(data)

    return spoil


def bomb_index(shards, fuse):
    (shards / ".metadata").write_bytes(pickle.dumps(Bomb(fuse)))


HUGE = torch.Size([10**6, 10**6])

SPOILED = {
    "bytes like a tensor": spoil_index(bytes_like_a_tensor),
    "a bomb instead of a tensor": spoil_index(bomb_instead_of_a_tensor),
    "a bomb instead of the index": bomb_index,
    "a bomb in the planner's data": spoil_index(set_field("planner_data", "FUSE")),
    "a bomb in the storage's data": spoil_index(set_field("storage_meta", "FUSE")),
    "a bomb as all data": spoil_index(set_field("storage_data", "FUSE")),
    "a bomb as all tensors": spoil_index(set_field("state_dict_metadata", "FUSE")),
    "a bomb as a shape": spoil_index(set_tensor("size", "FUSE")),
    "a bomb as parts": spoil_index(set_tensor("chunks", "FUSE")),
    "a bomb as properties": spoil_index(set_tensor("properties", "FUSE")),
    "a bomb as a path": spoil_index(set_field("entry.relative_path", "FUSE")),
    "a path up": spoil_index(elsewhere("../../outside")),
    "a path up and down": spoil_index(elsewhere("x/../../../outside")),
    "an absolute path": spoil_index(elsewhere("HERE/outside")),
    "the password file": spoil_index(elsewhere("/etc/passwd")),
    "a path that is a number": spoil_index(set_field("entry.relative_path", 3)),
    "a path with a null": spoil_index(set_field("entry.relative_path", "a\0b")),
    "the folder itself": spoil_index(set_field("entry.relative_path", ".")),
    "a pipe": spoil_index(a_pipe),
    "no such file": spoil_index(set_field("entry.relative_path", "nothing")),
    "a negative offset": spoil_index(set_field("entry.offset", -1)),
    "an offset far out": spoil_index(set_field("entry.offset", 10**18)),
    "a length of text": spoil_index(set_field("entry.length", "long")),
    "a huge tensor": spoil_index(set_tensor("size", HUGE)),
    "no parts": spoil_index(set_tensor("chunks", [])),
    "parts that are none": spoil_index(set_tensor("chunks", [1, None])),
    "no storage": spoil_index(set_field("storage_data", None)),
    "compressed": spoil_index(set_field("entry.transform_descriptors", ("zstd",))),
    "nothing": raw(b""),
    "text": raw(b"index"),
    "a number": raw(pickle.dumps(3)),
    "evaluation": raw(b'cbuiltins\neval\n(S\'__import__("os").mkdir("fuse")\'\ntR.'),
    "an attribute of a class": raw(
        b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata.__init__\n."
    ),
    # LONG_BINPUT with the largest number: the unpickler in C would fill memory up to it.
    "a memo without end": raw(b"\x80\x02Nr\xff\xff\xff\xff."),
    "a class changed": raw(
        b"\x80\x02ctorch.distributed.checkpoint.metadata\nTensorProperties\n"
        b"N}X\x05\x00\x00\x00dtypeK\x01s\x86b."
    ),
}


def reseal(folder, name):
    """Give the checkpoint the checksums of its shards as they are now, as a stranger could."""
    state = checkpoint.read_checkpoint(folder, name)
    shards = shard_dir(folder, state)
    files = [f for f in os.listdir(shards) if os.path.isfile(os.path.join(shards, f))]
    state["shards"]["files"] = {f: sha256_file(os.path.join(shards, f)) for f in files}
    checkpoint.save_checkpoint(folder, name, state, keep_old=False)


def readers_of_runs(folder, tmp_path):
    start = flags(tmp_path, "new", init_from=folder)
    return {
        "eval": lambda: evaluate.main([str(folder), "--device=cpu"]),
        "ablate": lambda: ablate.main(["layer", str(folder), "--device=cpu"]),
        "resume": lambda: train.main([f"--resume={folder}", "--max_steps=5"]),
        "init_from": lambda: train.main(start),
        "inspect": lambda: memory.main(["inspect", str(folder)]),
    }


def assert_refused(read):
    """-> the sentence."""
    with pytest.raises((ConfigError, RunError)) as caught:
        read()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500
    return text


@pytest.mark.parametrize("how", SPOILED)
def test_a_run_with_a_strangers_shards(tmp_path, monkeypatch, capsys, trained, how):
    fuse = tmp_path / "fuse"
    folder = shutil.copytree(trained, tmp_path / "copy")
    for label in os.listdir(folder / "shards"):
        SPOILED[how](folder / "shards" / label, fuse)
    for name in ("ckpt", "ckpt_prev", "best"):
        reseal(folder, name)
    monkeypatch.chdir(tmp_path)
    readers = readers_of_runs(folder, tmp_path)
    if how == "bytes like a tensor":  # what is no tensor is left out, and the others are shown
        readers.pop("inspect")()
        assert NAME not in capsys.readouterr().out
    before = contents(folder)
    for read in readers.values():
        assert_refused(read)
        assert contents(folder) == before
    assert not fuse.exists() and not (tmp_path / "new").exists()


@pytest.mark.parametrize("how", SPOILED)
def test_a_folder_of_a_strangers_shards(tmp_path, monkeypatch, trained, how):
    fuse = tmp_path / "fuse"
    shards = tmp_path / "a" / "b" / "step-3"
    shutil.copytree(next((trained / "shards").glob("ckpt-*")), shards)
    SPOILED[how](shards, fuse)
    monkeypatch.chdir(tmp_path)
    try:
        found = pretrained.read_weights(str(tmp_path / "a"))[0]
    except (ConfigError, RunError) as e:
        assert "\n" not in str(e) and "traceback" not in str(e).lower()
    else:  # what is no tensor was left out
        assert how == "bytes like a tensor"
        assert "embed.weight" not in found and "final_norm.weight" in found
    assert not fuse.exists()


LABELS = ["../../other", "/tmp", "..", ".", "", 3, None, "a\0b", "x" * 5000, ["ckpt-4"]]


@pytest.mark.parametrize("label", LABELS)
def test_a_checkpoint_whose_shards_are_elsewhere(tmp_path, trained, label):
    folder = shutil.copytree(trained, tmp_path / "copy")
    shutil.copytree(folder / "shards" / "ckpt-4", tmp_path / "other")
    for name in ("ckpt", "ckpt_prev", "best"):
        state = checkpoint.read_checkpoint(folder, name)
        state["shards"] = {"folder": label, "files": {}}
        checkpoint.save_checkpoint(folder, name, state, keep_old=False)
    for read in readers_of_runs(folder, tmp_path).values():
        assert_refused(read)
    for file in ("../../../outside", "/etc/passwd", 3, "."):
        state["shards"] = {"folder": "ckpt-4", "files": {file: "0" * 64}}
        for name in ("ckpt", "ckpt_prev", "best"):
            checkpoint.save_checkpoint(folder, name, state, keep_old=False)
        read = readers_of_runs(folder, tmp_path)["eval"]
        assert "names files outside of its run" in assert_refused(read)


@pytest.mark.parametrize("name", ["a.bin", "sub/a.bin", "a..b"])
def test_names_inside_a_folder(name):
    assert inside("/data", name) == "/data/" + name


# ---- checkpoints and weights in one file ---------------------------------------------------------


def nested():
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


def quantized():
    return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


def odd_attribute():
    t = torch.ones(2)
    t.double = "no method"
    return torch.nn.Parameter(t)


ODD = {
    "10^12 numbers": lambda: {"a": torch.zeros(1).expand(10**12)},
    "10^12 numbers of 10^6 by 10^6": lambda: {"a": torch.zeros(1, 1).expand(10**6, 10**6)},
    "sparse": lambda: {"a": torch.eye(3).to_sparse()},
    "sparse and huge": lambda: {"a": torch.sparse_coo_tensor([[0], [0]], [1.0], (10**9, 10**9))},
    "sparse rows": lambda: {"a": torch.eye(3).to_sparse_csr()},
    "nested": lambda: {"a": nested()},
    "quantized": lambda: {"a": quantized()},
    "complex": lambda: {"a": torch.zeros(2, dtype=torch.complex64)},
    "on no device": lambda: {"a": torch.zeros(2, device="meta")},
    "a number as a name": lambda: {3: torch.zeros(2)},
    "nothing as a name": lambda: {None: torch.zeros(2)},
    "a pair as a name": lambda: {("a", "b"): torch.zeros(2)},
    "an escape sequence as a name": lambda: {"\x1b[2J": torch.zeros(2)},
    "a list": lambda: [torch.zeros(2)],
    "a tensor": lambda: torch.zeros(2),
    "text": lambda: "weights",
    "nothing": lambda: None,
    "no tensors": lambda: {"a": 1, "b": "x"},
}
AMONG_TENSORS = {
    "a number": lambda: {"model.a": 1},
    "a list": lambda: {"model.a": [torch.zeros(2)]},
    "a dict": lambda: {"model.a": {"b": torch.zeros(2)}},
    "none": lambda: {"model.a": None},
}


@pytest.mark.parametrize("how", [*ODD, *(f"among tensors: {n}" for n in AMONG_TENSORS)])
@pytest.mark.parametrize("key", [None, "tensors", "model", "state_dict"])
def test_odd_weights_are_refused_in_a_sentence(tmp_path, how, key):
    make = ODD.get(how) or AMONG_TENSORS[how.removeprefix("among tensors: ")]
    value = make()
    if how not in ODD and key != "tensors":
        value = {"x": value}  # a trainer's own numbers are passed over, but nothing is left then
    if how == "a tensor" and key in ("model", "state_dict"):
        value = [value]  # else it is weights: one tensor of that name
    path = tmp_path / "x.pt"
    torch.save(value if key is None else {"step": 1, key: value}, path)
    assert os.path.getsize(path) < 5000
    assert "x.pt" in assert_refused(lambda: memory.main(["inspect", str(path)]))
    assert_refused(lambda: train.main(flags(tmp_path, "new", init_from=path)))
    assert not (tmp_path / "new").exists()


def test_odd_tensors_that_are_weights_are_read(tmp_path, capsys):
    """Attributes are not; views, empty tensors and all kinds of real numbers are."""
    kinds = sorted(DTYPES, key=str)
    weights = {str(kind): torch.ones(3).to(kind) for kind in kinds}
    weights |= {
        "empty": torch.zeros(0, 4),
        "one": torch.tensor(2.0),
        "view": torch.ones(4, 4)[:, 1],
        "odd": odd_attribute(),
    }
    weights |= {"repeated": torch.ones(1).expand(64)}
    torch.save(weights, tmp_path / "x.pt")
    found, _ = pretrained.read_weights(str(tmp_path / "x.pt"))
    assert found.keys() == weights.keys() and not vars(found["odd"])
    for files in (["x.pt"], ["x.pt", "x.pt"]):
        assert memory.main(["inspect", *(str(tmp_path / f) for f in files)]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("empty") for line in rows) == 2


def test_a_compressed_file_is_refused(tmp_path):
    """torch.load would expand it: 40 MB of zeros are 40 kB."""
    torch.save({"a": torch.zeros(10**7)}, tmp_path / "x.pt")
    small = zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "x.pt") as z, small:
        for name in z.namelist():
            small.writestr(name, z.read(name))
    assert os.path.getsize(tmp_path / "small.pt") < 10**6
    args = ["inspect", str(tmp_path / "small.pt")]
    assert "expands to" in assert_refused(lambda: memory.main(args))


def test_a_compressed_checkpoint_of_a_run_is_refused(tmp_path):
    _, out = run(tmp_path)
    path = os.path.join(out, "best.pt")
    state = checkpoint.read_checkpoint(out, "best")
    torch.save({**state, "note": "a" * 10**7}, path)
    with zipfile.ZipFile(path) as z:
        files = {name: z.read(name) for name in z.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as small:
        for name, content in files.items():
            small.writestr(name, content)
    with open(path, "r+b") as f:
        checkpoint.append_sha256(f)
    assert "expands to" in assert_refused(lambda: evaluate.main([out]))


def test_weights_without_their_optimizer_are_not_trained_on(tmp_path):
    """AdamW would begin again in the middle of a run."""
    _, out = run(tmp_path)
    shutil.copy(os.path.join(out, "best.pt"), os.path.join(out, "ckpt.pt"))
    text = assert_refused(lambda: train.main([f"--resume={out}", "--max_steps=99"]))
    assert f"has no state of the optimizer, as best.pt has none; start a new run with {out}" in (
        text.replace("--init_from ", "")
    )


@pytest.mark.parametrize("name", ["config.json", "log.jsonl"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path, name):
    _, out = run(tmp_path)
    os.remove(os.path.join(out, name))
    os.mkfifo(os.path.join(out, name))
    readers = {"resume": lambda: train.main([f"--resume={out}", "--max_steps=99"])}
    if name == "config.json":
        readers["eval"] = lambda: evaluate.main([out])
    for read in readers.values():
        assert "is no file" in assert_refused(read)


def lists_of_themselves(n=40):
    value = []
    for _ in range(n):
        value = [value, value]
    return value


STATES = {
    "a list": lambda s: [s],
    "text": lambda s: "checkpoint",
    "no step": lambda s: {k: v for k, v in s.items() if k != "step"},
    "a step of text": lambda s: {**s, "step": "4"},
    "a step below 0": lambda s: {**s, "step": -1},
    "a step that is a tensor": lambda s: {**s, "step": torch.ones(2)},
    "a step of 2^40 lists": lambda s: {**s, "step": lists_of_themselves()},
    "a best of text": lambda s: {**s, "best": "x"},
    "tensors in a list": lambda s: {**s, "tensors": list(s["tensors"].values())},
    "no tensors": lambda s: {**s, "tensors": {}},
    "tensors of another kind": lambda s: {**s, "tensors": ODD["sparse"]()},
    "tensors without end": lambda s: {
        **s,
        "tensors": {n: torch.zeros(1).expand(10**12) for n in s["tensors"]},
    },
    "other shapes": lambda s: {**s, "tensors": {n: torch.zeros(3) for n in s["tensors"]}},
    "shards of text": lambda s: {**s, "shards": "ckpt-4"},
    "shards without files": lambda s: {**s, "shards": {"folder": "ckpt-4"}},
}


# What is wrong with these is said in other words.
SAID_OTHERWISE = ("no tensors", "tensors of another kind", "tensors without end", "other shapes")


@pytest.mark.parametrize("how", STATES)
def test_a_sealed_checkpoint_of_another_tool(tmp_path, trained, how):
    folder = shutil.copytree(trained, tmp_path / "copy")
    for name in ("ckpt", "ckpt_prev", "best"):
        state = checkpoint.load_checkpoint(str(folder), name)
        state.pop("shards")
        checkpoint.save_checkpoint(folder, name, STATES[how](state), keep_old=False)
    before = contents(folder)
    readers = readers_of_runs(folder, tmp_path)
    # These are not what the run's model needs, but they can be shown.
    if how in ("no tensors", "other shapes"):
        readers.pop("inspect")()
    for read in readers.values():
        assert_refused(read)
    if how not in SAID_OTHERWISE:
        assert "it is no checkpoint of train.py" in assert_refused(readers["eval"])
    assert contents(folder) == before
