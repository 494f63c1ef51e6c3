"""What several test files share: toy runs, small random models, and results compared to the bit."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import memory
import model
import train
from analysis.hooks import Examples
from nanorecall import checkpoint
from nanorecall.records import read_json, read_log
from nanorecall.rng import IGNORE_INDEX

# ---- a run of seconds ----------------------------------------------------------------------------

TOY = dict(
    n_layers=2,
    dim=32,
    dk=16,
    dv=16,
    conv_size=2,
    init_std=1,
    input_seq_len=16,
    num_kv_pairs=4,
    vocab_size=32,
    infinite_data=1,
    lr=1e-2,
    lr_schedule="cosine",
    max_steps=60,
    eval_interval=20,
    n_val_examples=50,
    n_test_examples=50,
    log_interval=5,
    num_threads=1,
)
# The settings of small memory layers, for a toy run of a memory model.
MEMORY_TOY = dict(
    mem_n_keys=4,
    mem_heads=2,
    mem_knn=2,
    mem_k_dim=8,
    memory_layers="[0,1]",
    mem_log_interval=5,
)


def as_flags(settings):
    """{name: value} -> command line; what is None is left out."""
    return [f"--{name}={value}" for name, value in settings.items() if value is not None]


def flags(folder, name, **changes):
    """The command line of the toy run; a change to None leaves a setting out."""
    return as_flags({**TOY, "log_dir": folder, "run_name": name, **changes})


def run(folder, name="run", resume=False, **changes):
    """Train the toy run, or resume it, in this process -> exit status, run directory."""
    out = os.path.join(folder, name)
    if resume:
        args = [f"--resume={out}", *as_flags(changes)]
    else:
        args = flags(folder, name, **changes)
    return train.main(args), out


def torchrun(size, *args, **options):
    """Start train.py under torchrun -> the process, which runs on."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={size}"]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    command += [train.__file__, *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def last_logged_step(out):
    """The last step in the log of a run, or 0 without a log.

    Only the end of the file is read, since tests ask a hundred times a second.
    """
    path = os.path.join(out, "log.jsonl")
    if not os.path.exists(path):
        return 0
    with open(path, "rb") as f:
        f.seek(max(0, os.path.getsize(path) - 10_000))
        lines = f.read().splitlines()
    for line in reversed(lines):
        try:
            return json.loads(line)["step"]
        except ValueError:  # half of a line
            continue
    return 0


def wait_for_step(out, step, process):
    """Wait until a run has logged a step, or its process has ended."""
    while process.poll() is None and last_logged_step(out) < step:
        time.sleep(0.01)


# ---- results compared ----------------------------------------------------------------------------


def status_of(out):
    return read_json(os.path.join(out, "status.json"))


def contents(out):
    """What must not depend on interruptions -> checkpoint and log, both without their times."""
    state = checkpoint.load_checkpoint(out, "ckpt")
    del state["seconds"]
    log = read_log(out)
    for row in log:
        row.pop("seconds", None)
    return state, log


def assert_same(a, b):
    """Equal to the last bit, tensors in nested dicts and lists included."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert a == b


def spread_labels_unevenly(monkeypatch, data_class):
    """Of the 32 sequences of a training step, each has a label more than the fourth before it.

    data_class: the InMemoryMQAR that train.py loads, which is not the one of `import data_mqar`.
    """
    batch = data_class.batch

    def uneven(self, split, step, rows):
        tokens, targets, slices = batch(self, split, step, rows)
        if split == "train":
            labels = torch.as_tensor(np.asarray(rows) % 32 // 4)
            keep = torch.arange(targets.shape[1]) >= 16 - labels[:, None]
            targets = torch.where(keep, targets, IGNORE_INDEX)
        return tokens, targets, slices

    monkeypatch.setattr(data_class, "batch", uneven)


def counts(result):
    """by_slice without the losses, whose last bits depend on how they were summed."""
    found = []
    for name, groups in result["by_slice"].items():
        for value, numbers in groups.items():
            found.append((name, value, {k: n for k, n in numbers.items() if k != "loss"}))
    return found


def latest(folder, what, end=".json"):
    """The newest result of an analysis, whatever settings are in its name; without its end."""
    settings = ("_n_examples-", "_n_edits-", "_example-", "_data-", "_ablations-")
    found = []
    for path in folder.glob(what + "*" + end):
        if path.stem == what or path.stem.removeprefix(what).startswith(settings):
            found.append(path)
    return max(found, key=lambda path: path.stat().st_mtime_ns).stem


def load_result(folder, what):
    """What a command wrote -> its .json, and the columns {name: (N,)} of its .parquet, if any."""
    what = os.path.join(folder, latest(folder, what))
    with open(what + ".json") as f:
        result = json.load(f)
    assert set(result) == {"config", "metrics", "by_slice", "examples"}
    assert os.path.getsize(what + ".png") > 5000
    columns = {}
    if os.path.exists(what + ".parquet"):
        for name, values in pq.read_table(what + ".parquet").to_pydict().items():
            columns[name] = np.array(values)
    return result, columns


# ---- small random models -------------------------------------------------------------------------

T, V = 12, 19  # tokens of a sequence and of the vocabulary in build_gpt


def gpt_config(**changes):
    sizes = dict(dim=8, n_layers=2, n_heads=2, dk=6, dv=4, du=6)
    return model.Config(**{**sizes, "vocab_size": V, "seq_len": T, "init_std": 0.3, **changes})


def build_gpt(cls=model.GPT, dtype=torch.float64, **changes):
    torch.manual_seed(0)
    return cls(gpt_config(**changes)).to(dtype)


def memory_model(cls=memory.MemoryGPT, seed=0, **changes):
    """Two blocks; the second has a memory of 25 slots, read 2 x 3 at a time."""
    sizes = dict(dim=16, n_layers=2, n_heads=2, dk=8, dv=8, vocab_size=11, seq_len=12)
    table = dict(mem_n_keys=5, mem_heads=2, mem_knn=3, mem_k_dim=6)
    torch.manual_seed(seed)
    return cls(memory.Config(**{**sizes, **table, **changes}))


def outcome(model, *inputs):
    """[logits, loss, gradients]"""
    logits, loss = model(*inputs)
    return [logits, loss, *torch.autograd.grad(loss, list(model.parameters()))]


def random_tokens(*shape, seed=0):
    """Token ids for memory_model."""
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(seed))


ABLATION_SIZES = dict(
    dim=16, n_layers=3, n_heads=2, dk=8, dv=8, conv_size=2, vocab_size=11, seq_len=9
)


def ablation_model(cls=memory.MemoryGPT, seed=0, **changes):
    """Three blocks; the first and the last have a memory, whose selection bias is not 0."""
    table = dict(memory_layers=(0, 2), mem_n_keys=5, mem_heads=2, mem_knn=3, mem_k_dim=6)
    torch.manual_seed(seed)
    made = cls(memory.Config(**{**ABLATION_SIZES, **table, **changes})).eval()
    for layer in made.memory_layers().values():
        if layer.bias is not None:
            torch.nn.init.normal_(layer.bias, std=0.5)
    return made


def some_examples(B=6, T=9, n=3, seed=1):
    """Random sequences for ablation_model, with n labels at random positions in each."""
    g = torch.Generator().manual_seed(seed)
    positions = [torch.randperm(T, generator=g)[:n].sort().values for _ in range(B)]
    tokens = torch.randint(11, (B, T), generator=g)
    answers = torch.randint(11, (B, n), generator=g)
    slices = {"exposures": np.arange(B)}
    return Examples(np.arange(B), tokens, torch.stack(positions), answers, slices)


# ---- files ---------------------------------------------------------------------------------------


class Bomb:
    """A pickle that runs a command when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def tokenizer_json(folder, merges):
    """Save a small byte-level BPE with these merges, such as ["1 2"] -> path."""
    tokenizers = pytest.importorskip("tokenizers", reason="the tokenizers extra is not installed")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pairs = [tuple(m.split()) for m in merges]
    pieces = letters + ["".join(pair) for pair in pairs]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, pairs))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")
