"""compare.py: finished runs side by side, those that differ in their seed as one line."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

import eval as eval_script
import train
from analysis import compare
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


def test_runs_that_differ_in_their_seed_are_one_line(runs):
    results = [compare.read_result(str(runs / name)) for name in ("r1", "r2")]
    groups = compare.group_seeds(results)
    assert [len(seeds) for seeds in groups.values()] == [2]


def test_compare_counts_the_parameters_of_the_layers(runs):
    layers = train.load_run(str(runs / "r1"))[2].layers
    n_params = sum(p.numel() for p in layers.parameters())
    assert compare.read_result(str(runs / "r1"))["params"] == n_params


def test_compare_shows_the_steps_done_not_max_steps(runs, tmp_path):
    shutil.copytree(runs / "r1", tmp_path / "early")
    path = tmp_path / "early" / "status.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"step": 17}))
    assert compare.read_result(str(tmp_path / "early"))["steps"] == 17


def result_of(name, settings, curve):
    """What read_result returns."""
    return {
        "run": name,
        "series": "gpt",
        "settings": settings,
        "curve": curve,
        "by_slice": {"kind": {"1": 0.5, "2": 0.25}},
        "state": 0,
        "params": 5,
        "all": {"value": 0.5, "ci95": [0.4, 0.6], "n": 9},
    }


def test_seeds_are_drawn_as_mean_and_range(monkeypatch, tmp_path):
    """Two seeds at steps 1 and 2, one of which went on to 3, beside a run with other settings."""
    runs = [
        result_of("a", "x", [(1, 2.0, 0.1), (2, 1.0, 0.3), (3, 0.5, 0.5)]),
        result_of("b", "x", [(1, 4.0, 0.2), (2, 3.0, 0.7)]),
        result_of("c", "y", [(1, 9.0, 0.0)]),
    ]
    axes = []
    monkeypatch.setattr(compare, "finish_figure", lambda fig, *_: axes.extend(fig.axes))
    compare.plot_compare(str(tmp_path / "x.png"), runs)
    losses, accuracies, slices, _ = axes
    assert losses.lines[0].get_xydata().tolist() == [[1, 3], [2, 2]]
    np.testing.assert_allclose(accuracies.lines[0].get_xydata(), [[1, 0.15], [2, 0.5]])
    band = losses.collections[0].get_paths()[0].vertices.tolist()
    assert {(1.0, 2.0), (1.0, 4.0), (2.0, 1.0), (2.0, 3.0)} <= {tuple(point) for point in band}
    assert slices.lines[0].get_xydata().tolist() == [[0, 0.5], [1, 0.25]]
