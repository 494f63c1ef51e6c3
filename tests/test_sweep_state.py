"""sweep.py state: equal parameters, equal states, the second phase; figures kept as numbers."""

import json
import os
import shlex
import shutil

import pytest

import sweep
import train
from analysis import figure_of_zoology as zoology
from analysis import figures_of_mixers as state
from analysis.sweep_runs import Point, pick_parts
from nanorecall.build import (
    build_model,
    build_model_config,
    count_parameters,
    inference_state_bytes,
)
from nanorecall.plots import figure
from nanorecall.settings import ConfigError

RECALL_POINTS = {}
for _cell in state.recall_cells():
    _point = state.point_of(_cell, 0.01)
    RECALL_POINTS[_point.name] = _point


def build(point):
    settings = train.parse(shlex.split(point.train_args))
    return build_model(
        settings, build_model_config(settings, settings.data_module.Data(settings.data))
    )


@pytest.mark.parametrize("point", RECALL_POINTS.values(), ids=RECALL_POINTS)
def test_all_have_as_many_layer_parameters(point):
    """If this fails for a new mixer, change its width in MEMORIES."""
    n = count_parameters(build(point))["layers"]
    assert abs(n / 51600 - 1) < 0.01, n


def test_memories_with_as_many_heads_have_the_same_state():
    sizes = {}
    for point in RECALL_POINTS.values():
        name = point.series.partition(": ")[2]
        mixer = state.MEMORIES.get(name)
        if mixer and mixer.product == 96 and name != "mesa":  # whose state is twice as large
            sizes.setdefault(point.x, set()).add(inference_state_bytes(build(point), 256))
    assert all(len(of_heads) == 1 for of_heads in sizes.values())
    matrices = [2 * 4 * 96 * 96 // heads for heads in state.HEADS]
    convolutions = 2 * 4 * 3 * 3 * 96
    assert [sizes[heads] for heads in state.HEADS] == [{n + convolutions} for n in matrices]


def evals(*accuracies, loss=1.0):
    return [{"evals": [{"accuracy": accuracy, "loss": loss} for accuracy in accuracies]}]


def test_the_second_phase_has_the_best_learning_rate_of_each_cell():
    results = {point: evals(0.5, 0.6) for point in state.state_points()}
    cells = {(cell.name, cell.x): cell for cell in state.recall_cells()}
    low, middle, high = state.RATES
    first = cells["kda", 2]
    results[state.point_of(first, middle, seeds=1)] = evals(0.9, 0.2)
    results[state.point_of(first, high, seeds=1)] = evals(0.8, 0.8)
    second = cells["kda", 4]
    for lr, loss in ((low, 0.4), (middle, 0.5), (high, 0.3)):
        results[state.point_of(second, lr, seeds=1)] = evals(0.7, loss=loss)

    points = state.best_rates(results)
    assert all(point.seeds == 0 for point in points)
    found = {}
    runs = {}
    for point in points:
        found[point.series, point.x] = float(point.train_args.split()[-1])
        runs[point.series, point.x] = point.name
    assert len(found) == len(points)
    assert found["64 pairs: kda", 2] == middle
    assert found["64 pairs: kda", 4] == high
    assert found["64 pairs: kda", 8] == low
    assert found["S3: kda", 0] == state.TRACKING_RATES[0]
    # With fewer pairs, the same runs are tested.
    assert runs["32 pairs: kda", 4] == runs["64 pairs: kda", 4]


def test_a_best_rate_at_the_edge_is_compared_with_the_next():
    results = {point: evals(0.5) for point in state.state_points()}
    assert not state.next_rates(results)  # the rate decides nothing
    cells = {(cell.name, cell.x): cell for cell in state.recall_cells()}
    low, middle, high = state.RATES
    for cell, lr, accuracy in (
        (cells["kda", 1], middle, 0.9),
        (cells["kda", 2], high, 0.9),
        (cells["kda", 4], low, 0.9),
        (cells["kda", 8], low, 1.0),  # solved
    ):
        results[state.point_of(cell, lr, seeds=1)] = evals(accuracy)
    higher = state.point_of(cells["kda", 2], 0.1, seeds=1)
    lower = state.point_of(cells["kda", 4], 0.003, seeds=1)
    assert state.next_rates(results) == [higher, lower]

    # The lower one is better, and the next is still to be tried.
    results[higher], results[lower] = evals(0.8), evals(0.95)
    assert state.next_rates(results) == [state.point_of(cells["kda", 4], 0.001, seeds=1)]
    results[state.point_of(cells["kda", 4], 0.001, seeds=1)] = evals(0.99)
    assert not state.next_rates(results)  # GRID has no lower one
    best = {(point.series, point.x): point for point in state.best_rates(results)}
    assert best["64 pairs: kda", 4].train_args.endswith("--lr 0.001")


def test_all_widths_get_the_rate_that_is_best_at_one():
    results = {point: evals(0.5) for point in zoology.zoology_points()}
    results[zoology.zoology_point("kda", 64, 0.03)] = evals(0.4, 0.6)
    results[zoology.zoology_point("linear", 64, 0.01)] = evals(0.7)
    points = {}
    for point in zoology.all_widths(results):
        points.setdefault(point.series, []).append(point)
    assert points.keys() == set(zoology.MIXERS)
    assert points["kda"] == [zoology.zoology_point("kda", D, 0.03) for D in (32, 64, 128)]
    assert points["linear"] == [zoology.zoology_point("linear", D, 0.01) for D in (32, 64, 128)]


def test_the_sizes_of_zoology_are_those_of_its_config():
    settings = train.parse(["configs/mqar_zoology.py"])
    assert settings.data.train_sizes == zoology.SIZES
    assert settings.data.vocab_size == 8192


@pytest.mark.parametrize("name", zoology.MIXERS)
def test_a_mixer_of_zoology_has_one_head_of_the_width_of_the_model(name):
    for width in zoology.WIDTHS:
        config = build(zoology.zoology_point(name, width, 0.01)).config
        assert config.dim == width
        if name == "Based":
            assert all(" n_heads=1 " in b and f" dv={width} " in b for b in config.blocks)
        else:
            assert config.n_heads == 1


def test_steps_until_an_accuracy():
    result = {"evals": []}
    for step, accuracy in ((20, 0.1), (40, 0.6), (60, 0.97), (80, 0.4)):
        result["evals"].append({"step": step, "accuracy": accuracy})
    assert [state.steps_until(result, level) for level in (0.5, 0.95, 0.99)] == [40, 60, None]


# ---- two phases, and figures kept as numbers -----------------------------------------------------


TOY = (
    "--vocab_size 32 --input_seq_len 16 --num_kv_pairs 2 --n_layers 1 --dim 16 --dk 8 --dv 8 "
    "--conv_size 2 --n_val_examples 10 --n_test_examples 20 --n_train_examples 100 --max_steps"
)


def draw_toy(results):
    plt, fig, (axis,) = figure(1, 1)
    axis.plot([result["steps"] for result in results["gpt"][0]])
    return plt, fig, "steps"


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A figure of points with 1 to 4 steps, one after another; the last gets all seeds.

    -> arguments of the sweep
    """

    def points():
        return [Point("gpt", 0, f"toy{n}", f"{TOY} {n}", seeds=1) for n in (1, 2)]

    def choose(results):
        return [Point("gpt", 0, p.name, p.train_args) for p in results if p.name == "toy4"]

    def tune(results):
        steps = len(results) + 1
        return [Point("gpt", 0, f"toy{steps}", f"{TOY} {steps}", seeds=1)] if steps < 5 else []

    toy_figure = sweep.Figure(points, draw_toy, ["steps"], "steps", tune, choose)
    monkeypatch.setattr(sweep, "FIGURES", {"toy": toy_figure})
    return ["toy", f"--log_dir={tmp_path}/runs", f"--output={tmp_path}/figures", "--seeds=2"]


@pytest.mark.slow
def test_points_chosen_by_results_are_trained_after_them(toy, tmp_path, capsys):
    with pytest.raises(ConfigError, match="2 runs are missing"):
        sweep.main([*toy, "--draw_only=1"])
    sweep.main(toy)
    assert sorted(os.listdir(tmp_path / "runs")) == [
        *("toy1_seed0", "toy2_seed0", "toy3_seed0"),
        *("toy4_seed0", "toy4_seed1"),
    ]
    shown = json.loads((tmp_path / "figures" / "toy.json").read_text())
    assert shown["points"] == [{"series": "gpt", "x": 0, "results": [{"steps": 4}] * 2}]
    capsys.readouterr()
    sweep.main(toy[1:])
    assert capsys.readouterr().out.splitlines()[-1].split()[:3] == ["toy", "5", "0"]

    # Without the runs, the numbers beside the figure give the same figure.
    drawn = tmp_path / "figures" / "toy.png"
    from_runs = drawn.read_bytes()
    drawn.unlink()
    shutil.rmtree(tmp_path / "runs")
    sweep.main([*toy, "--draw_only=1", "--seeds=1"])
    assert drawn.read_bytes() == from_runs
    (tmp_path / "figures" / "toy.json").write_text('{"seeds": 2, "points": [{"x": 1}]}')
    with pytest.raises(ConfigError, match="toy.json: 'points'.* has no 'series'"):
        sweep.main([*toy, "--draw_only=1"])


def test_parts_of_a_result():
    result = {"all": {"value": 1}, "slices": {"a": {"b": 2}, "c": 3}, "evals": [4]}
    assert pick_parts(result, ["all", "slices.a"]) == {
        "all": {"value": 1},
        "slices": {"a": {"b": 2}},
    }
    assert pick_parts(result, ["result.metrics", "evals"]) == {"evals": [4]}
    cells = {"x": {"value": 1, "n": 2}, "y": {"value": 3, "n": 4}, "z": {}}
    shown = {"x": {"value": 1}, "y": {"value": 3}, "z": {}}
    assert pick_parts({"cells": cells}, ["cells.*.value"]) == {"cells": shown}
