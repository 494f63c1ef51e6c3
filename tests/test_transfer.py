"""pretrained.py: what patterns match, what is frozen, what is loaded from where."""

import json
import os
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp

import memory as Mem
import train
from nanorecall import checkpoint, pretrained
from nanorecall.build import build_model, build_model_config, load_and_freeze
from nanorecall.settings import ConfigError
from toys import MEMORY_TOY as MEMORY
from toys import flags, run
from toys import memory_model as model

NAMES = [
    name
    for name, _ in model(Mem.MemoryRouterGPT, memory_layers=(0, 1)).named_parameters(
        remove_duplicate=False
    )
]


def named(model):
    return dict(model.named_parameters(remove_duplicate=False))


# ---- patterns ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern, expected",
    [  # the first seven are those of LLMonade's experiments and pipeline
        ("model.layers.0.attn", "layers.0.att."),
        ("*.memory.keys", "memory.keys"),
        ("model.layers.0.", "layers.0."),
        ("model.layers.0.memory.*", "layers.0.memory."),
        ("*.attn.k_proj", "att.proj_k."),
        ("model.layers.1", "layers.1."),
        ("model.layers.0.memory.values", "layers.0.memory.values"),
        ("layers.0.att.proj_k.weight", "layers.0.att.proj_k.weight"),
        ("embed", "embed."),
        ("*", ""),
    ],
)
def test_what_a_pattern_means(pattern, expected):
    found = pretrained.matching(pattern, NAMES) or pretrained.matching(
        pretrained.our_name(pattern), NAMES
    )
    assert found == [n for n in NAMES if expected in n] and found


def test_a_prefix_ends_at_a_dot():
    assert pretrained.matching("layers.1", ["layers.1.a", "layers.10.a"]) == ["layers.1.a"]


# ---- freezing ------------------------------------------------------------------------------------


def test_freezing_reports_what_is_frozen():
    m = model(memory_layers=(0, 1))
    line = pretrained.freeze(m, {"model.layers.0.memory.*": "freeze", "*.attn.k_proj": "freeze"})
    still = {n for n, q in named(m).items() if not q.requires_grad}
    # the table is shared, so it is held by the name it has in the other block, too
    others = {"layers.1.memory.values", *(f"layers.{i}.att.proj_k.weight" for i in (0, 1))}
    assert still == {n for n in named(m) if n.startswith("layers.0.memory.")} | others
    size = sum(q.numel() for q in m.parameters() if not q.requires_grad)
    whole = sum(q.numel() for q in m.parameters())
    assert (
        line
        == f"frozen: 6 of {len(list(m.parameters()))} tensors, {size} of {whole} parameters ({size / whole:.1%})"
    )


@pytest.mark.parametrize(
    "what, message",
    [
        ("layers.0.memori", "'layers.0.memori' matches no parameter; near it: layers.0"),
        ({"embed": "free"}, 'takes {pattern: "freeze"}'),
        ("*", "leaves nothing to train"),
        (["embed", 3], "needs names or patterns, not 3"),
        ("embed,,", "needs names or patterns, not ''"),
    ],
)
def test_mistakes_in_freezing(what, message):
    with pytest.raises(ConfigError, match=message):
        pretrained.freeze(model(memory_layers=(0, 1)), what)


def test_frozen_weights_are_bit_equal_after_decay_and_resume(tmp_path):
    options = dict(
        MEMORY,
        model="memory",
        weight_decay=0.1,
        freeze='["embed", "*.memory.values"]',
        eval_interval=3,
    )
    begun = train.parse(flags(tmp_path, "x", **options))
    first = named(build_model(begun, build_model_config(begun, begun.data_module.Data(begun.data))))
    run(tmp_path, "a", max_steps=3, **options)
    run(tmp_path, "a", resume=True, max_steps=6)
    last = checkpoint.select_prefix(
        checkpoint.load_checkpoint(str(tmp_path / "a"), "ckpt")["tensors"], "model"
    )
    for name, q in first.items():
        assert torch.equal(q, last[name]) == (
            name == "embed.weight" or name.endswith("memory.values")
        ), name


# ---- loading -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mapping, expected",
    [
        (
            {"0-1": "1-2"},
            {
                "layers.1.a.w": "layers.0.a.w",
                "layers.1.b": "layers.0.b",
                "layers.2.a.w": "layers.1.a.w",
            },
        ),
        ({"1": "0"}, {"layers.0.a.w": "layers.1.a.w"}),
        ({"layers.0.a": "layers.1.a"}, {"layers.1.a.w": "layers.0.a.w"}),
        ({"model.layers.0.a.*": "model.layers.1.a.*"}, {"layers.1.a.w": "layers.0.a.w"}),
        ({"*.a.w": "*.a.w"}, {"layers.0.a.w": "layers.0.a.w", "layers.1.a.w": "layers.1.a.w"}),
        (
            {"layers.*.a.*": "layers.*.c.*"},
            {"layers.0.c.w": "layers.0.a.w", "layers.1.c.w": "layers.1.a.w"},
        ),
        (
            {"layer_mappings": {"1": "1"}, "component_mappings": {"layers.0.b": "layers.0.b"}},
            {"layers.1.a.w": "layers.1.a.w", "layers.0.b": "layers.0.b"},
        ),
        ({}, {n: n for n in ("embed", "layers.0.a.w", "layers.0.b", "layers.1.a.w")}),
    ],
    ids=str,
)
def test_what_a_map_means(mapping, expected):
    assert (
        pretrained.resolve_map(mapping, ["embed", "layers.0.a.w", "layers.0.b", "layers.1.a.w"])
        == expected
    )


@pytest.mark.parametrize(
    "mapping, message",
    [
        ({"0-1": "2"}, "'0-1' is 2 blocks, '2' is 1"),
        ({"7": "0"}, "has no block 7"),
        (
            {"layers.0.nn": "layers.1.nn"},
            "'layers.0.nn' matches nothing in the source; near it: layers.0.ffn",
        ),
        ({"*.att": "layers.0.att"}, "has 1 stars and"),
        ({"0": "1", "layers.0.ffn": "layers.1.ffn"}, "two sources"),
        ({"0": 1}, "must both be text"),
        ({"layer_mappings": {"0": "0"}, "layers": {}}, "layers beside layer_mappings"),
        ({"layer_mappings": "0-1"}, "layer_mappings must hold a dict"),
        ({"0" * 5000: "0"}, "matches nothing"),
        (
            {"layers.0.ffn": "layers.0.fnn"},
            "the model has no layers.0.fnn.up.weight; near it: layers.0.ffn.up.weight",
        ),
        (
            {"embed": "lm_head", "layers.0.ffn.up.weight": "layers.0.ffn.down.weight"},
            r"is \(64, 16\) in the source, .* is \(16, 64\)",
        ),
    ],
    ids=str,
)
def test_mistakes_in_maps(tmp_path, mapping, message):
    torch.save(model().state_dict(), tmp_path / "x.pt")
    target = model(seed=1)
    before = {n: t.clone() for n, t in target.state_dict().items()}
    with pytest.raises(ConfigError, match=message):
        pretrained.load_parts(target, str(tmp_path / "x.pt"), mapping=mapping)
    assert all(torch.equal(before[n], t) for n, t in target.state_dict().items())


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run with checkpoints of steps 4 and 8; its last weights as one file and as DCP shards."""
    folder = tmp_path_factory.mktemp("source")
    _, out = run(
        folder,
        "run",
        model="memory",
        **{**MEMORY, "mem_log_interval": 0},
        max_steps=8,
        eval_interval=4,
    )
    weights = checkpoint.select_prefix(checkpoint.load_checkpoint(out, "ckpt")["tensors"], "model")
    torch.save({"state_dict": weights}, folder / "file.pt")
    for step in (2, 10):
        shifted = {"model." + n: t + (step == 2) for n, t in weights.items()}
        dcp.save(shifted, checkpoint_id=str(folder / "exp" / "checkpoint" / f"step-{step}"))
    return folder, weights


def trained_from(folder, name, **options):
    """The weights of a run before its first step."""
    p = train.parse(
        flags(folder, name, model="memory", **{**MEMORY, "mem_log_interval": 0, **options})
    )
    m = build_model(p, build_model_config(p, p.data_module.Data(p.data)))
    return m, load_and_freeze(m, p.train, has_checkpoint=False)


@pytest.mark.parametrize("kind", ["run", "file.pt", "exp"])
def test_a_source_may_be_a_run_a_file_or_a_folder_of_shards(tmp_path, source, kind):
    folder, weights = source
    m, (line,) = trained_from(tmp_path, "x", init_from=folder / kind, seed=5)
    assert all(torch.equal(t, weights[n]) for n, t in m.state_dict().items())
    assert line.startswith(f"loaded: {len(weights)} tensors, ") and str(folder / kind) in line
    m, _ = trained_from(
        tmp_path, "x", init_from=folder / kind, init_map=json.dumps({"0": "1"}), seed=5
    )
    fresh, _ = trained_from(tmp_path, "x", seed=5)
    for name, t in m.state_dict().items():
        inside = (
            name.startswith("layers.1.") or name == "layers.0.memory.values"
        )  # shared with layers.1's
        expected = (
            weights[name.replace("layers.1.", "layers.0.")] if inside else fresh.state_dict()[name]
        )
        assert torch.equal(t, expected), name


def test_a_step_can_be_chosen(tmp_path, source):
    folder, weights = source
    m, _ = trained_from(tmp_path, "x", init_from=folder / "exp", init_step=2)
    assert torch.equal(m.embed.weight, weights["embed.weight"] + 1)
    m, (line,) = trained_from(tmp_path, "x", init_from=folder / "run", init_step=4)
    assert "step 4" in line and not torch.equal(m.embed.weight, weights["embed.weight"])
    mistakes = [
        ("exp", 3, "there is 2, 10"),
        ("run", 3, "init_step=3 is not in"),
        ("file.pt", 3, "is one file"),
    ]
    for kind, step, message in mistakes:
        with pytest.raises(ConfigError, match=message):
            trained_from(tmp_path, "x", init_from=folder / kind, init_step=step)


def test_a_run_begins_with_them_and_a_resume_does_not_ask_again(tmp_path, source):
    folder, _ = source
    os.rename(folder / "file.pt", folder / "moved.pt")
    options = dict(
        model="memory", **MEMORY, init_from=folder / "moved.pt", freeze="embed", max_steps=2
    )
    assert run(tmp_path, "a", **options)[0] == 0
    os.rename(folder / "moved.pt", folder / "file.pt")
    assert run(tmp_path, "a", resume=True, max_steps=4)[0] == 0


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(init_from="nowhere"), "nowhere does not exist"),
        (
            dict(init_from=os.path.dirname(__file__)),
            "is no run directory, checkpoint file or folder",
        ),
        (dict(init_from=__file__), "cannot be read as weights"),
        (dict(init_map='{"0": "0"}'), "has no effect: there is no init_from"),
        (dict(init_map="[1]", init_from=__file__), "is no JSON dict"),
        (dict(init_map="{0", init_from=__file__), "is no JSON"),
        (dict(freeze="nothing"), "matches no parameter"),
    ],
    ids=str,
)
def test_mistakes_leave_no_run_behind(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, "a", model="memory", **MEMORY, **options)
    assert not (tmp_path / "a").exists()


class Bomb:
    def __init__(self, fuse):
        self.fuse = str(fuse)

    def __reduce__(self):
        return os.mkdir, (self.fuse,)


def test_a_strangers_shards_are_read_without_running_anything(tmp_path, source):
    """The index of DCP is a pickle. Entries that are no tensors are skipped."""
    folder, weights = source
    dcp.save({**weights, "train_state": {"step": 3}}, checkpoint_id=str(tmp_path / "step-1"))
    found, _ = pretrained.read_weights(str(tmp_path))
    assert found.keys() == weights.keys() and all(
        torch.equal(t, weights[n]) for n, t in found.items()
    )
    (tmp_path / "step-1" / ".metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "gone off")))
    with pytest.raises(
        ConfigError, match="step-1 cannot be read as weights .*has no place in the index"
    ):
        pretrained.read_weights(str(tmp_path))
    assert not (tmp_path / "gone off").exists()


def test_two_names_for_one_tensor_are_refused(tmp_path):
    torch.save(
        {"layers.0.memory.keys": torch.zeros(2), "layers.0.memory_retrieval.keys": torch.ones(2)},
        tmp_path / "x.pt",
    )
    with pytest.raises(ConfigError, match="has two tensors for layers.0.memory.keys"):
        pretrained.load_parts(model(), str(tmp_path / "x.pt"))


def test_another_models_weights_need_a_map(tmp_path):
    for other, message in (
        (model(n_layers=1, memory_layers=(0,)), "has no layers.0.memory.keys"),
        (None, "x.pt has no embed"),
    ):
        weights = (other or model()).state_dict()
        torch.save(
            {n: t for n, t in weights.items() if other or n != "embed.weight"}, tmp_path / "x.pt"
        )
        with pytest.raises(ConfigError, match=message + ".*; name the parts to take with init_map"):
            pretrained.load_parts(model(), str(tmp_path / "x.pt"))
