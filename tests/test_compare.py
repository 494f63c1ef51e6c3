"""compare.py: finished runs side by side, those that differ in their seed as one line."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

import eval as eval_script
import train
from analysis import compare, compare_figure
from nanorecall.settings import ConfigError
from toys import run as train_toy


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two finished runs with test sequences of up to 32 tokens, and one that never finished."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (1, 2):
        train_toy(folder, f"r{seed}", seed=seed, max_steps=4, test_sizes="[(16,4),(32,8)]")
    (folder / "unfinished").mkdir()
    shutil.copy(folder / "r1" / "config.json", folder / "unfinished")
    return folder


def test_compare_puts_runs_side_by_side(runs, capsys):
    eval_script.main(["compare", str(runs / "*")])
    text = capsys.readouterr()
    assert "r1" in text.out and "r2" in text.out
    assert "left out" in text.err and "unfinished" in text.err
    table = pq.read_table(runs / "compare.parquet").to_pydict()
    assert table["run"] == ["r1", "r2"] and table["seed"] == [1, 2]
    # float32 of 2 layers: a KV cache of 32 tokens, and the last 2 inputs of the convolutions.
    assert table["state"] == [4 * 2 * (2 * (16 + 16) * 32 + 2 * 3 * 16)] * 2
    assert (runs / "compare.png").stat().st_size > 5000


def test_a_run_named_twice_counts_once_and_a_name_without_a_run_is_told(runs, tmp_path, capsys):
    names = [str(runs / "r1"), str(runs / "r1") + "/", str(runs / "r9*")]
    eval_script.main(["compare", *names, "--output", str(tmp_path / "one")])
    assert f"no directory matches {names[2]}" in capsys.readouterr().err
    assert pq.read_table(tmp_path / "one.parquet").to_pydict()["run"] == ["r1"]


def test_a_missing_directory_of_the_output_is_told_before_anything_else(runs, tmp_path, capsys):
    path = str(tmp_path / "none" / "x")
    with pytest.raises(ConfigError, match=f"output={path}: there is no directory {tmp_path}/none"):
        eval_script.main(["compare", str(runs / "*"), "--output", path])
    assert capsys.readouterr().out == ""


def test_runs_that_differ_in_their_seed_are_one_line(runs):
    results = [compare.read_result(str(runs / name)) for name in ("r1", "r2")]
    groups = compare.group_seeds(results)
    assert [len(seeds) for seeds in groups.values()] == [2]


def test_an_edited_run_and_one_of_other_data_are_no_seeds(runs, tmp_path):
    for name in ("r1", "edited", "other"):
        shutil.copytree(runs / "r1", tmp_path / name)
    edit = {"run": "r1", "checkpoint": "best", "step": 4, "editor": "x", "facts": []}
    for name, key, value in (
        ("edited", "edits", [edit]),
        ("other", "data_sha256", {"path": 64 * "a"}),
    ):
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    results = [compare.read_result(str(tmp_path / name)) for name in ("r1", "edited", "other")]
    groups = compare.group_seeds(results).values()
    assert [[run["run"] for run in seeds] for seeds in groups] == [["r1"], ["edited"], ["other"]]


def test_groups_of_one_name_are_all_shown():
    """Runs of several folders, with more settings that differ than a label holds."""
    runs = []
    for i, value in enumerate((0.5, 0.99, 0.7)):
        settings = {f"a_setting_with_a_long_name_{n}": i for n in range(9)}
        run = result_of("gpt", 0.1, []) | {"settings": settings}
        runs.append(run | {"all": {"value": value}})
    groups = compare.group_seeds(runs)
    assert list(groups) == ["gpt, gpt", "gpt, gpt (2)", "gpt, gpt (3)"]
    text = compare.describe_extremes(groups)
    assert text.startswith("Highest test accuracy: 0.9900") and "lowest: 0.5000" in text


def test_compare_counts_the_parameters_of_the_layers(runs):
    layers = train.load_run(str(runs / "r1"))[2].layers
    n_params = sum(p.numel() for p in layers.parameters())
    assert compare.read_result(str(runs / "r1"))["params"] == n_params


def test_compare_shows_the_steps_done_not_max_steps(runs, tmp_path):
    shutil.copytree(runs / "r1", tmp_path / "early")
    path = tmp_path / "early" / "status.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"step": 17}))
    assert compare.read_result(str(tmp_path / "early"))["steps"] == 17


def test_each_setting_that_differs_is_a_column(runs, tmp_path, capsys):
    """One run with another learning rate, and a model file that lacks the setting conv_size."""
    shutil.copytree(runs / "r1", tmp_path / "r1")
    shutil.copytree(runs / "r2", tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    config = json.loads(path.read_text())
    config["train"]["lr"] = 0.5
    del config["model"]["conv_size"]
    path.write_text(json.dumps(config))
    eval_script.main(["compare", str(tmp_path / "*")])
    printed = capsys.readouterr().out
    table = pq.read_table(tmp_path / "compare.parquet").to_pydict()
    assert table["lr"][0] == "0.5" and table["conv_size"][0] == "" != table["conv_size"][1]
    assert "n_layers" not in table and "dim" not in table
    (head,) = [line for line in printed.splitlines() if "layer params" in line]
    assert "lr" in head.split() and "conv_size" in head.split()
    assert printed.splitlines()[0].startswith("Highest test accuracy: ")
    assert "lr=0.5, conv_size=" in printed


def result_of(name, lr, curve):
    """What read_result returns."""
    return {
        "run": name,
        "series": "gpt",
        "settings": {"lr": lr},
        "train_curve": [(step, 10 * loss) for step, loss, _ in curve],
        "curve": curve,
        "by_slice": {"kind": {"1": 0.5, "2": 0.25}},
        "state": 0,
        "params": 5,
        "all": {"value": 0.5, "ci95": [0.4, 0.6], "n": 9},
    }


def test_seeds_are_drawn_as_mean_and_range(monkeypatch, tmp_path):
    """Two seeds at steps 1 and 2, one of which went on to 3, beside a run with other settings.

    The training loss is a line, that of the val split are points.
    """
    runs = [
        result_of("a", 0.1, [(1, 2.0, 0.1), (2, 1.0, 0.3), (3, 0.5, 0.5)]),
        result_of("b", 0.1, [(1, 4.0, 0.2), (2, 3.0, 0.7)]),
        result_of("c", 0.2, [(1, 9.0, 0.0)]),
    ]
    axes = []
    monkeypatch.setattr(compare_figure, "finish_figure", lambda fig, *_: axes.extend(fig.axes))
    groups = compare.group_seeds(runs)
    assert list(groups) == ["gpt, lr=0.1", "gpt, lr=0.2"]
    compare_figure.plot_compare(str(tmp_path / "x.png"), groups)
    losses, accuracies, slices = axes  # all runs have one size, so there is no panel of sizes
    assert losses.lines[0].get_xydata().tolist() == [[1, 30], [2, 20]]
    assert losses.lines[0].get_marker() == "" and losses.lines[1].get_linestyle() == "None"
    assert losses.lines[1].get_xydata().tolist() == [[1, 3], [2, 2]]
    np.testing.assert_allclose(accuracies.lines[0].get_xydata(), [[1, 0.15], [2, 0.5]])
    band = losses.collections[0].get_paths()[0].vertices.tolist()
    assert {(1.0, 20.0), (1.0, 40.0), (2.0, 10.0), (2.0, 30.0)} <= {tuple(p) for p in band}
    assert slices.lines[0].get_xydata().tolist() == [[0, 0.5], [1, 0.25]]


def test_bands_of_intervals_are_those_of_scipy():
    from scipy import stats

    values = np.random.default_rng(0).normal(size=(40, 2))
    for n, tolerance in ((2, 1e-3), (3, 1e-3), (14, 1e-3), (15, 1e-2), (40, 1e-2)):
        few = values[:n]
        low, high = compare_figure.BANDS["interval"](few)
        expected = stats.t.interval(0.95, n - 1, few.mean(0), stats.sem(few))
        width = expected[1] - expected[0]
        np.testing.assert_allclose(high - low, width, rtol=tolerance)
        np.testing.assert_allclose((high + low) / 2, few.mean(0))


def test_runs_of_different_tasks_have_no_panel_of_slices(monkeypatch, tmp_path):
    runs = [result_of("a", 0.1, [(1, 2.0, 0.1)]), result_of("b", 0.2, [(1, 2.0, 0.1)])]
    runs[1] |= {"by_slice": {"exposures": {"1": 0.5}}, "params": 9}
    axes = []
    monkeypatch.setattr(compare_figure, "finish_figure", lambda fig, *_: axes.extend(fig.axes))
    compare_figure.plot_compare(str(tmp_path / "x.png"), compare.group_seeds(runs))
    assert len(axes) == 3 and axes[2].get_xlabel().startswith("parameters")
