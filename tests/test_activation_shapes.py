"""activation_shapes.py: every module with its shapes, and the place where two models part."""

import copy

import torch

import memory
from analysis.activation_shapes import describe_parting, describe_trace, trace_activations
from toys import MEMORY_TOY, memory_model, random_tokens, run

TOKENS = random_tokens(3, 12)


def trace_of(model, tokens=TOKENS):
    activations, error = trace_activations(model, tokens)
    return {a.name: a for a in activations}, error


def test_shapes_follow_from_the_settings():
    """3 sequences of 12 tokens, width 16; 2 heads read 3 slots each; a query has 6 numbers."""
    model = memory_model()
    trace, error = trace_of(model)
    assert error is None
    expected = {
        "embed": ("(3, 12)", "(3, 12, 16)", "float32"),
        "layers.0.ffn.up": ("(3, 12, 16)", "(3, 12, 64)", "float32"),
        "layers.1.memory.query": ("(36, 16)", "(36, 12)", "float32"),
        "layers.1.memory slots": ("(3, 12, 16)", "(3, 12, 2, 3)", "int64"),
        "layers.1.memory weights": ("(3, 12, 16)", "(3, 12, 2, 3)", "float32"),
        "lm_head": ("(3, 12, 16)", "(3, 12, 11)", "float32"),
    }
    for name, shapes in expected.items():
        assert (trace[name].inputs, trace[name].shape, trace[name].dtype) == shapes
    assert list(trace)[0] == "embed" and list(trace)[-1] == "logits"
    assert torch.equal(trace["logits"].tensor, model(TOKENS)[0])
    assert "proj_q, proj_k, proj_v are not called" in describe_trace(model, trace, None)


def test_two_models_part_where_a_weight_was_changed():
    model = memory_model()
    other = copy.deepcopy(model)
    a, _ = trace_of(model)
    assert describe_parting(a, trace_of(other)[0], True) == "no shapes differ\nno values differ"
    with torch.no_grad():
        other.layers[1].att.out_proj.weight[3, 0] += 1
    sentences = describe_parting(a, trace_of(other)[0], True)
    assert sentences.startswith("no shapes differ\nvalues part at layers.1.att.out_proj: at most")
    with torch.no_grad():
        other.layers[0].ffn.down.weight[0, 0] = torch.nan
    sentences = describe_parting(a, trace_of(other)[0], True)
    assert "values part at layers.0.ffn.down: at most nan" in sentences
    wide = memory_model(mem_k_dim=8)
    sentences = describe_parting(a, trace_of(wide)[0], False)
    place = "layers.1.memory.query: (36, 12) in A, (36, 16) in B"
    assert sentences.startswith(f"shapes part at {place}\nvalues are not compared")


def test_a_module_that_fails_is_named_with_its_input():
    model = memory_model()
    model.layers[1].memory.query = torch.nn.Linear(17, 12)
    trace, error = trace_of(model)
    sentence = describe_trace(model, trace, error)
    assert sentence.startswith("layers.1.memory.query (Linear) failed on input (36, 16): mat1 and")
    assert trace["layers.1.ffn_norm"].shape == "(3, 12, 16)"
    assert trace["layers.1.memory"].shape == "failed" and "lm_head" not in trace
    # No hook is left behind.
    assert not any(module._forward_hooks for module in model.modules())


def test_command(tmp_path, capsys):
    for seed in (0, 1):
        run(tmp_path, f"r{seed}", model="memory", **MEMORY_TOY, seed=seed, max_steps=1)
    capsys.readouterr()
    assert memory.main(["inspect", "--trace", str(tmp_path / "r0")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{tmp_path}/r0: ")
    assert lines[2].split() == ["embed", "Embedding", "(4,", "16)", "(4,", "16,", "32)", "float32"]
    memory.main(["inspect", str(tmp_path / "r0"), "--trace", str(tmp_path / "r1")])
    out = capsys.readouterr().out
    assert "no shapes differ\nvalues part at embed: at most" in out
