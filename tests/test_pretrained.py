"""pretrained.py: what patterns match, what is frozen, what is loaded from where."""

import copy
import json
import os

import pytest
import torch
import torch.distributed.checkpoint as dcp

import memory
import train
from nanorecall import checkpoint, pretrained
from nanorecall.build import build_model, build_model_config, load_and_freeze
from nanorecall.settings import ConfigError
from nanorecall.tensors import select_prefix
from toys import MEMORY_TOY, assert_same, flags, memory_model, run

# That a run draws its curves is tested in test_progress.py.
pytestmark = pytest.mark.usefixtures("undrawn")


def named(model):
    """{name: parameter}; a shared parameter has several names."""
    return dict(model.named_parameters(remove_duplicate=False))


NAMES = list(named(memory_model(memory.MemoryRouterGPT, memory_layers=(0, 1))))


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
    ours = pretrained.our_name(pattern)
    found = pretrained.matching(pattern, NAMES) or pretrained.matching(ours, NAMES)
    assert found and found == [name for name in NAMES if expected in name]


def test_a_prefix_ends_at_a_dot():
    assert pretrained.matching("layers.1", ["layers.1.a", "layers.10.a"]) == ["layers.1.a"]


# ---- freezing ------------------------------------------------------------------------------------


def test_freezing_reports_what_is_frozen():
    model = memory_model(memory_layers=(0, 1))
    patterns = {"model.layers.0.memory.*": "freeze", "*.attn.k_proj": "freeze"}
    line = pretrained.freeze(model, patterns)
    frozen = {name for name, parameter in named(model).items() if not parameter.requires_grad}
    expected = {name for name in named(model) if name.startswith("layers.0.memory.")}
    expected |= {"layers.0.att.proj_k.weight", "layers.1.att.proj_k.weight"}
    expected.add("layers.1.memory.values")  # the table is shared
    assert frozen == expected
    size, total, n_tensors = 0, 0, 0
    for parameter in model.parameters():
        total += parameter.numel()
        n_tensors += 1
        if not parameter.requires_grad:
            size += parameter.numel()
    numbers = f"{size} of {total} parameters ({size / total:.1%})"
    assert line == f"frozen: 6 of {n_tensors} tensors, {numbers}"


@pytest.mark.parametrize(
    "patterns, message",
    [
        ("layers.0.memori", "'layers.0.memori' matches no parameter; near it: layers.0"),
        ({"embed": "free"}, 'takes {pattern: "freeze"}'),
        ("*", "leaves nothing to train"),
        (["embed", 3], "needs names or patterns, not 3"),
        ("embed,,", "needs names or patterns, not ''"),
    ],
)
def test_mistakes_in_freezing(patterns, message):
    with pytest.raises(ConfigError, match=message):
        pretrained.freeze(memory_model(memory_layers=(0, 1)), patterns)


def test_frozen_weights_are_bit_equal_after_decay_and_resume(tmp_path):
    frozen = ["embed", "*.memory.values"]
    options = dict(MEMORY_TOY, weight_decay=0.1, freeze=json.dumps(frozen))
    first, _ = before_first_step(tmp_path, "x", **options)
    run(tmp_path, "a", model="memory", max_steps=3, eval_interval=3, **options)
    run(tmp_path, "a", resume=True, max_steps=6)
    state = checkpoint.load_checkpoint(str(tmp_path / "a"), "ckpt")
    last = select_prefix(state["tensors"], "model")
    for name, parameter in named(first).items():
        is_frozen = name == "embed.weight" or name.endswith("memory.values")
        assert torch.equal(parameter, last[name]) == is_frozen, name


def before_first_step(folder, name, **options):
    """The model of a run before its first step, and what loading and freezing report."""
    settings = train.parse(flags(folder, name, model="memory", **{**MEMORY_TOY, **options}))
    data = settings.data_module.Data(settings.data)
    model = build_model(settings, build_model_config(settings, data))
    return model, load_and_freeze(model, settings.train, has_checkpoint=False)


# ---- loading -------------------------------------------------------------------------------------

SOURCE_NAMES = ["embed", "layers.0.a.w", "layers.0.b", "layers.1.a.w"]


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
        ({}, {name: name for name in SOURCE_NAMES}),
    ],
    ids=str,
)
def test_what_a_map_means(mapping, expected):
    assert pretrained.resolve_map(mapping, SOURCE_NAMES) == (expected, "")


# The configuration example of LLMonade's experiments and pipeline.
LLMONADE_MAP = {
    "layer_mappings": {"0-5": "0-5"},
    "component_mappings": {
        "model.layers.0.memory.*": "model.layers.0.memory.*",
        "model.layers.0.mlp.*": "model.layers.1.mlp.*",
    },
}


@pytest.mark.parametrize("order", [1, -1])
def test_components_override_layer_ranges(tmp_path, order):
    options = dict(cls=memory.MemoryRouterGPT, n_layers=6, memory_layers=(0,))
    source = memory_model(**options).state_dict()
    torch.save(source, tmp_path / "x.pt")
    target = memory_model(**options, seed=1)
    mapping = dict(list(LLMONADE_MAP.items())[::order])
    line = pretrained.load_parts(target, str(tmp_path / "x.pt"), mapping=mapping)
    for name, tensor in target.layers.state_dict().items():
        origin = "layers." + name.replace("1.ffn.", "0.ffn.")
        assert torch.equal(tensor, source[origin]), name
    overridden = []
    for name in ("up.weight", "down.weight"):
        overridden.append(
            f"layers.1.ffn.{name} comes from layers.0.ffn.{name}, not layers.1.ffn.{name}"
        )
    assert line.endswith("; names override blocks: " + "; ".join(overridden))


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
        ({"0": "1", "1": "1"}, "gives layers.1.* two sources"),
        ({"layers.0.ffn": "layers.1.ffn", "*.0.ffn": "*.1.ffn"}, "gives layers.1.* two sources"),
        (
            {"layer_mappings": {"0": "0"}, "component_mappings": {"0": "1"}},
            "0 stands in both layer_mappings and component_mappings",
        ),
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
    torch.save(memory_model().state_dict(), tmp_path / "x.pt")
    target = memory_model(seed=1)
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(ConfigError, match=message):
        pretrained.load_parts(target, str(tmp_path / "x.pt"), mapping=mapping)
    assert_same(before, target.state_dict())


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run with checkpoints of steps 4 and 8; its last weights as one file and as DCP shards.

    The shards exp/checkpoint/step-2 are the same weights plus 1.
    """
    folder = tmp_path_factory.mktemp("source")
    _, out = run(folder, "run", model="memory", **MEMORY_TOY, max_steps=8, eval_interval=4)
    state = checkpoint.load_checkpoint(out, "ckpt")
    weights = select_prefix(state["tensors"], "model")
    torch.save({"state_dict": weights}, folder / "file.pt")
    for step, added in ((2, 1), (10, 0)):
        tensors = {f"model.{name}": tensor + added for name, tensor in weights.items()}
        dcp.save(tensors, checkpoint_id=str(folder / "exp" / "checkpoint" / f"step-{step}"))
    return folder, weights


def test_a_run_killed_before_its_first_checkpoint_begins_with_the_same_weights(tmp_path, source):
    folder, weights = source
    torch.save(weights, tmp_path / "w.pt")
    settings = dict(model="memory", **MEMORY_TOY, max_steps=4, init_from=tmp_path / "w.pt")
    _, out = run(tmp_path, "a", **settings)
    for name in ("ckpt.pt", "best.pt", "status.json"):
        os.remove(os.path.join(out, name))
    assert train.main([f"--resume={out}"]) == 0
    for name in ("ckpt.pt", "best.pt", "status.json"):
        os.remove(os.path.join(out, name))
    torch.save({name: tensor + 1 for name, tensor in weights.items()}, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match="holds other weights than when .* began"):
        train.main([f"--resume={out}"])


@pytest.mark.parametrize("kind", ["run", "file.pt", "exp"])
def test_a_source_may_be_a_run_a_file_or_a_folder_of_shards(tmp_path, source, kind):
    folder, weights = source
    model, (line,) = before_first_step(tmp_path, "x", init_from=folder / kind, seed=5)
    assert_same(dict(model.state_dict()), {name: weights[name] for name in model.state_dict()})
    assert line.startswith(f"loaded: {len(weights)} tensors, ") and str(folder / kind) in line


def test_one_block_can_be_loaded_into_another(tmp_path, source):
    folder, weights = source
    options = dict(init_from=folder / "file.pt", init_map=json.dumps({"0": "1"}))
    model, _ = before_first_step(tmp_path, "x", seed=5, **options)
    fresh, _ = before_first_step(tmp_path, "x", seed=5)
    for name, tensor in model.state_dict().items():
        expected = fresh.state_dict()[name]
        # The values of the two blocks are one table.
        if name.startswith("layers.1.") or name == "layers.0.memory.values":
            expected = weights[name.replace("layers.1.", "layers.0.")]
        assert torch.equal(tensor, expected), name


def test_a_step_can_be_chosen(tmp_path, source):
    folder, weights = source
    model, _ = before_first_step(tmp_path, "x", init_from=folder / "exp", init_step=2)
    assert torch.equal(model.embed.weight, weights["embed.weight"] + 1)
    model, (line,) = before_first_step(tmp_path, "x", init_from=folder / "run", init_step=4)
    assert "step 4" in line and not torch.equal(model.embed.weight, weights["embed.weight"])


@pytest.mark.parametrize(
    "kind, message",
    [("exp", "there is 2, 10"), ("run", "init_step=3 is not in"), ("file.pt", "is one file")],
)
def test_a_step_that_does_not_exist(tmp_path, source, kind, message):
    folder, _ = source
    with pytest.raises(ConfigError, match=message):
        before_first_step(tmp_path, "x", init_from=folder / kind, init_step=3)


def test_a_resumed_run_does_not_load_its_initial_weights_again(tmp_path, source):
    folder, weights = source
    path = tmp_path / "initial.pt"
    torch.save(weights, path)
    options = dict(model="memory", **MEMORY_TOY, init_from=path, freeze="embed", max_steps=2)
    assert run(tmp_path, "a", **options)[0] == 0
    path.unlink()
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
        run(tmp_path, "a", model="memory", **MEMORY_TOY, **options)
    assert not (tmp_path / "a").exists()


def test_entries_of_shards_that_are_no_tensors_are_skipped(tmp_path, source):
    _, weights = source
    dcp.save({**weights, "train_state": {"step": 3}}, checkpoint_id=str(tmp_path / "step-1"))
    found, _ = pretrained.read_weights(str(tmp_path))
    assert_same(found, {name: weights[name] for name in found})
    assert found.keys() == weights.keys()


def test_two_tables_do_not_fit_in_a_shared_one(tmp_path):
    source = memory_model(memory_layers=(0, 1), mem_share_values=False).state_dict()
    torch.save(source, tmp_path / "x.pt")
    target = memory_model(memory_layers=(0, 1), seed=1)
    message = "layers.0.memory.values and layers.1.memory.values would both go to"
    with pytest.raises(ConfigError, match=message):
        pretrained.load_parts(target, str(tmp_path / "x.pt"))
    source["layers.1.memory.values"] = source["layers.0.memory.values"].clone()
    torch.save(source, tmp_path / "x.pt")
    pretrained.load_parts(target, str(tmp_path / "x.pt"))
    assert_same(dict(target.state_dict()), dict(source))


def test_two_names_for_one_tensor_are_refused(tmp_path):
    keys = {"memory.keys": torch.zeros(2), "memory_retrieval.keys": torch.ones(2)}
    tensors = {f"layers.0.{name}": tensor for name, tensor in keys.items()}
    torch.save(tensors, tmp_path / "x.pt")
    with pytest.raises(ConfigError, match="has two tensors for layers.0.memory.keys"):
        pretrained.load_parts(memory_model(), str(tmp_path / "x.pt"))


def test_weights_of_another_shape_need_a_map(tmp_path):
    other = memory_model(n_layers=1, memory_layers=(0,)).state_dict()
    incomplete = memory_model().state_dict()
    del incomplete["embed.weight"]
    cases = [(other, "the model has no layers.0.memory.keys"), (incomplete, "x.pt has no embed")]
    for weights, message in cases:
        torch.save(weights, tmp_path / "x.pt")
        with pytest.raises(ConfigError, match=message + ".*; name the parts to take with init_map"):
            pretrained.load_parts(memory_model(), str(tmp_path / "x.pt"))
