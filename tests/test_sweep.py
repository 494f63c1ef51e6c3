"""sweep.py: its commands are understood, finished runs are kept, stopped ones go on, and what it draws is what was measured."""

import json
import os
import shlex

import numpy as np
import pytest

import eval as ev
import flex_generate
import sweep
import train
from nanorecall.settings import ConfigError, RunError, build_config, split_argv

TOY = (
    "--vocab_size 32 --input_seq_len 16 --num_kv_pairs 2 --n_layers 1 --dim 16 --dk 8 --dv 8 --conv_size 2 --n_val_examples 10 "
    "--n_test_examples 20 --n_train_examples 100 --max_steps {steps} --eval_interval 2"
)


def points():
    return [sweep.Point("gpt", steps, f"toy{steps}", TOY.format(steps=steps)) for steps in (2, 4)]


def draw(found):
    plt, fig, (axis,) = sweep.figure(1, 1)
    sweep.lines(axis, found, lambda r: r["steps"])
    return plt, fig, "steps"


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Two points of one line, as the only figure; -> the words that every call gets."""
    monkeypatch.setattr(sweep, "FIGURES", {"toy": (points, draw, "steps")})
    return [f"--log_dir={tmp_path}/runs", f"--out={tmp_path}/figures", "--seeds=1"]


def test_every_command_is_understood():
    for points, _, _ in sweep.FIGURES.values():
        for point in points():
            if point.train:
                p = train.parse(shlex.split(point.train))
                assert not p.resume and p.train.target_accuracy == 0
            script, *words = shlex.split(point.then.format(run="runs/RUN", seed=0)) or [""]
            settings = split_argv(words)[1]
            if script == "eval.py":
                assert build_config(ev.EvalConfig, settings)
            elif script:
                assert script == "flex_generate.py" and build_config(flex_generate.Config, settings).out_dir == "runs/RUN"


def test_names_are_of_one_training_each():
    """Figures share runs, and only runs of the same words."""
    words = {}
    for points, _, _ in sweep.FIGURES.values():
        for point in points():
            assert words.setdefault(point.name, (point.train, point.then)) == (point.train, point.then)
    assert len(words) < sum(len(points()) for points, _, _ in sweep.FIGURES.values())


def test_runs_are_kept_and_taken_up_again(toy, tmp_path, capsys):
    with pytest.raises(ConfigError, match="2 runs are missing"):
        sweep.main(["toy", *toy, "--draw=1"])
    # one run is there, stopped after its first step
    train.main(shlex.split(sweep.training(points()[1], 0, build_config(sweep.Config, split_argv(toy)[1])))[1:])
    status = tmp_path / "runs" / "toy4_seed0" / "status.json"
    first = status.read_text()
    sweep.main([*toy])
    assert capsys.readouterr().out.splitlines()[-1].split()[:3] == ["toy", "2", "1"]
    status.write_text(json.dumps({"status": "preempted", "step": 4}))
    sweep.main(["toy", *toy, "--jobs=2"])
    done = {name: json.loads((tmp_path / "runs" / name / "status.json").read_text()) for name in ("toy2_seed0", "toy4_seed0")}
    assert done["toy2_seed0"]["step"] == 2 and done["toy4_seed0"]["test"] == json.loads(first)["test"]
    before = os.stat(status).st_mtime_ns
    sweep.main(["toy", *toy])
    assert os.stat(status).st_mtime_ns == before and (tmp_path / "figures" / "toy.png").stat().st_size > 5000
    path = tmp_path / "runs" / "toy4_seed0" / "config.json"
    config = json.loads(path.read_text())
    config["model"]["conv_size"] = config["train"]["lr"] = 3  # as of a config file that has changed since
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="toy4_seed0 was trained with another lr, conv_size; delete it"):
        sweep.main(["toy", *toy])


def test_a_run_that_fails_is_named_and_the_others_are_kept(toy, tmp_path, monkeypatch):
    bad = lambda: [sweep.Point("gpt", 0, "bad", "--dimm 7"), points()[0]]
    monkeypatch.setattr(sweep, "FIGURES", {"toy": (bad, draw, "")})
    with pytest.raises(RunError, match=r"1 runs failed(.|\n)*did you mean dim\?"):
        sweep.main(["toy", *toy])
    assert json.loads((tmp_path / "runs" / "toy2_seed0" / "status.json").read_text())["status"] == "finished"


def test_a_figure_that_is_not_there():
    with pytest.raises(ConfigError, match="there is no figure lrs; choose from lr, pairs"):
        sweep.main(["lrs"])


# ---- pictures ----------------------------------------------------------------------------------------------------------


def made_up(value, state=100):
    """One run's result with every part that some figure shows."""
    cell = {"value": value, "exact": {"value": value / 2}}
    edits = {
        f"{m}, {n}": {"method": m, "efficacy": {"value": value}, "specificity": {"value": value}, "kept": {"value": value}}
        for m in "ab"
        for n in (1, 10)
    }
    stored = {name: {"value": value} for name in ("bits stored", "bits stored per parameter", "bits stored per memory value")}
    return {
        "all": {"value": value},
        "state": state,
        "evals": [{"seconds": s, "accuracy": a} for s, a in ((1.0, 0.5), (2.0, 0.99), (3.0, 1.0))],
        "cells": {tag: dict.fromkeys(values, cell) for tag, values in (("exposures", "01"), ("query", "ab"), ("hops", "12"))},
        "made": {
            "metrics": {"majority": {"value": 0}, "flex": {"accuracy": {"value": value}}, "stored": stored, "edits": [1, 10]},
            "by_slice": {"method and edits": edits},
        },
    }


@pytest.mark.parametrize("name", sweep.FIGURES)
def test_pictures_show_mean_and_range(name, tmp_path):
    points, drawn, _ = sweep.FIGURES[name]
    found = {}
    for i, p in enumerate(points()):
        found.setdefault(p.line, {})[p.x] = [made_up(v, state=100 + i) for v in (0.2, 0.4, 0.9)]
    c = build_config(sweep.Config, split_argv([f"--out={tmp_path}"])[1])
    plt, fig, title = drawn(found)
    shown = [line.get_ydata() for axis in fig.axes for line in axis.lines if len(line.get_ydata())]
    if name in ("lr", "pairs", "width", "table", "templates"):
        assert len(shown) >= len(found) and all(np.allclose(y, 0.5) for y in shown)  # the mean of the three
    plt.close(fig)
    sweep.save_figure(name, found, drawn, c)
    assert (tmp_path / f"{name}.png").stat().st_size > 5000


def test_time_to_99_is_the_first_evaluation_there():
    assert sweep.seconds_to_99(made_up(1)) == 2.0
    assert sweep.seconds_to_99({"evals": [{"seconds": 1.0, "accuracy": 0.98}]}) == float("inf")
