"""The benchmarks: every mixer makes a step, the exponent is right, tokens are compared.

Figures are drawn again from their numbers.
"""

import json
import sys

import pytest
import torch

import bench
import hybrid
from myriadlama import llama
from nanorecall.settings import ConfigError


@pytest.mark.parametrize("kind", hybrid.KINDS)
def test_a_step_of_every_mixer_changes_its_weights(kind, monkeypatch):
    models = []

    def keep_model(model, loss_of):
        models.append(model)
        return make_step(model, loss_of)

    make_step = bench.make_step
    monkeypatch.setattr(bench, "make_step", keep_model)
    step = bench.mixer_step(kind, T=32, n_tokens=64)
    before = [p.detach().clone() for p in models[0].layers[0].att.parameters()]
    step()
    for old, new in zip(before, models[0].layers[0].att.parameters()):
        assert (old != new).any()


def test_the_exponent_is_1_if_steps_take_as_long_and_2_if_they_grow_with_length(capsys):
    results = []
    for T in (128, 512, 2048):
        gpt = [1e-3 * T]
        results.append(bench.Result("linear", [0.5, 0.2, 0.1], "gpt", gpt, size=T))
    bench.print_lengths(results)
    title, head, *rows = capsys.readouterr().out.splitlines()
    assert "2,048 tokens" in title and head.split() == ["mixer", "128", "512", "2,048", "exponent"]
    assert rows[0].split() == ["gpt", "128.0", "512.0", "2048.0", "2.00"]
    assert rows[1].split() == ["linear", "200.0", "200.0", "200.0", "1.00"]


def run_bench(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["bench.py", *argv])
    bench.main()


def test_a_figure_is_drawn_again_from_its_numbers(tmp_path, monkeypatch):
    def made_up(rounds):
        for size in (128, 512):
            yield bench.Result("linear", [3e-3, 9e-3, 1e-3], "gpt", [1e-5 * size], size=size)
        yield bench.Result("without a size", [1.0], "gpt", [1.0])

    monkeypatch.setitem(bench.BENCHES, "lengths", lambda rounds: list(made_up(rounds))[:2])
    monkeypatch.setitem(bench.BENCHES, "slots", made_up)
    path = tmp_path / "speed.png"
    measure = ["lengths", "slots", "--threads=1", "--rounds=3", f"--figure={path}"]
    run_bench(monkeypatch, *measure)
    shown = json.loads((tmp_path / "speed.json").read_text())
    assert (shown["threads"], shown["rounds"]) == (1, 3)
    assert shown["curves"]["lengths"] == {
        "linear": [{"size": 128, "ms": 3.0}, {"size": 512, "ms": 3.0}],
        "gpt": [{"size": 128, "ms": pytest.approx(1.28)}, {"size": 512, "ms": pytest.approx(5.12)}],
    }
    # In this benchmark one line is ours, whatever was measured.
    assert set(shown["curves"]["slots"]) == {"sparse gradients", "gpt"}
    measured = path.read_bytes()
    path.unlink()
    monkeypatch.setattr(bench, "BENCHES", {})
    run_bench(monkeypatch, f"--figure={path}", "--draw_only")
    assert path.read_bytes() == measured

    (tmp_path / "speed.json").write_text('{"threads": 1, "rounds": 3, "curves": {"a": {}}}')
    with pytest.raises(ConfigError, match="speed.json: no benchmark with a figure is a"):
        run_bench(monkeypatch, f"--figure={path}", "--draw_only")
    with pytest.raises(SystemExit):
        run_bench(monkeypatch, "--draw_only")


def test_fused_prompts_are_compared_with_transformers_token_by_token():
    transformers = pytest.importorskip("transformers")
    config = llama.Config(**bench.SMOLLM2, n_layers=1, intermediate_size=64)
    model = llama.Llama(config).eval().requires_grad_(False)
    theirs = bench.transformers_llama(transformers, model)
    prefix, questions = [20, 30, 40], bench.animal_questions(2)
    tokens = bench.make_fusion(model, prefix, questions)()
    assert tokens.shape == (2, 4) and len(tokens.unique()) > 2
    bench.check_tokens(model, theirs, prefix, questions)
    torch.nn.init.normal_(model.layers[0].mlp.down_proj.weight)
    with pytest.raises(SystemExit, match="ours decodes .*, transformers "):
        bench.check_tokens(model, theirs, prefix, questions)
