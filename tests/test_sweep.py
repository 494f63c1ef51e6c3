"""sweep.py: commands are valid, finished runs stay, stopped ones resume, figures are true."""

import contextlib
import functools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

import eval as evaluate
import flex_generate
import sweep
import train
from analysis import sweep_runs
from analysis.figure_lines import draw_series
from analysis.figures_in_context import seconds_to_99
from analysis.figures_in_weights import CLOSED_FORMS
from analysis.sweep_runs import (
    Point,
    by_series,
    shown_results,
    split_command,
    training_command,
)
from analysis.trained_run import result_suffix
from nanorecall.plots import figure
from nanorecall.settings import ConfigError, RunError

TOY = (
    "--vocab_size 32 --input_seq_len 16 --num_kv_pairs 2 --n_layers 1 --dim 16 --dk 8 --dv 8 "
    "--conv_size 2 --n_val_examples 10 --n_test_examples 20 --n_train_examples 100 "
    "--eval_interval 2 --max_steps"
)


def toy_points():
    return [Point("gpt", 2, "toy2", f"{TOY} 2"), Point("gpt", 4, "toy4", f"{TOY} 4")]


def draw_toy(results):
    plt, fig, (axis,) = figure(1, 1)
    draw_series(axis, results, lambda result: result["steps"])
    return plt, fig, "steps"


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A sweep of one figure, of two points in one series -> the arguments that every call gets."""
    toy_figure = sweep.Figure(toy_points, draw_toy, ["steps"], "steps")
    monkeypatch.setattr(sweep, "FIGURES", {"toy": toy_figure})
    return ["toy", f"--log_dir={tmp_path}/runs", f"--output={tmp_path}/figures", "--seeds=1"]


def read_status(tmp_path, name):
    return json.loads((tmp_path / "runs" / f"{name}_seed0" / "status.json").read_text())


ALL_POINTS = [point for figure in sweep.FIGURES.values() for point in figure.points()]
POINTS = {point.name: point for point in ALL_POINTS}
# Figures may measure the same run differently.
MEASURED = {f"{point.name}, {point.result}": point for point in ALL_POINTS}


PARSERS = {"eval.py": evaluate.parse, "flex_generate.py": flex_generate.parse}


def test_configs_are_those_of_this_folder_wherever_a_sweep_is_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    point = next(point for point in ALL_POINTS if "configs/" in point.train_args)
    command = training_command(point, 0, "r/run", sweep.Config())
    assert "--dtype float32 " in command  # on a GPU, too
    assert train.parse(split_command(command)[1:]).train.run_name == "run"


@pytest.mark.parametrize("point", MEASURED.values(), ids=MEASURED)
def test_every_command_is_understood(point):
    if point.train_args:
        settings = train.parse(shlex.split(point.train_args))
        assert not settings.train.resume and settings.train.target_accuracy == 0
    if point.eval_args:
        script, *argv = shlex.split(point.eval_args.format(run="runs/RUN", seed=0))
        PARSERS[script](argv)


EDITS = {name: point for name, point in MEASURED.items() if "edit" in point.result}


@pytest.mark.parametrize("point", EDITS.values(), ids=EDITS)
def test_the_result_of_an_edit_is_where_eval_writes_it(point):
    _, *argv = shlex.split(point.eval_args.format(run="runs/RUN"))
    command, _, config = evaluate.parse(argv)
    options = {command: evaluate.COMMANDS[command].all_options()}
    run = SimpleNamespace(config=config, options=options)
    assert point.result == f"eval_{command}{result_suffix(run, command)}.json"


def test_figures_share_runs_of_the_same_arguments_only():
    for point in ALL_POINTS:
        assert point.train_args == POINTS[point.name].train_args
    assert len(POINTS) < len(ALL_POINTS)


def test_a_run_is_measured_for_every_figure(monkeypatch, tmp_path):
    measured = []

    def run_point(point, seed, folder, config, children):
        measured.append((point.eval_args, seed))
        return ""

    monkeypatch.setattr(sweep_runs, "run_point", run_point)
    options = [("eval.py {run}", "a.json"), ("eval.py edit {run}", "b.json")]
    points = []
    for series, (eval_args, result) in enumerate([*options, options[0]]):
        points.append(Point(str(series), 0, "toy", TOY, eval_args, result))
    config = SimpleNamespace(seeds=2, jobs=1, log_dir=str(tmp_path))
    sweep_runs.run_missing(points, config)
    once = [eval_args for eval_args, _ in options]
    assert measured == [(eval_args, seed) for seed in (0, 1) for eval_args in once]


@pytest.mark.slow
def test_what_is_missing_is_trained(toy, tmp_path):
    with pytest.raises(ConfigError, match="2 runs are missing, such as .*toy2_seed0"):
        sweep.main([*toy, "--draw_only=1"])
    sweep.main([*toy, "--jobs=2"])
    assert read_status(tmp_path, "toy2")["step"] == 2
    assert read_status(tmp_path, "toy4")["step"] == 4
    assert (tmp_path / "figures" / "toy.png").stat().st_size > 5000
    sweep.main([*toy, "--draw_only=1"])


def train_point(toy, point):
    """Train a point as sweep.py would, in this process."""
    _, config = sweep.parse(toy)
    folder = f"{config.log_dir}/{point.name}_seed0"
    _, *argv = shlex.split(training_command(point, 0, folder, config))
    assert train.main(argv) == 0


@pytest.mark.slow
def test_a_stopped_run_is_resumed_and_a_finished_one_is_kept(toy, tmp_path, capsys):
    toy2, toy4 = toy_points()
    train_point(toy, toy4)
    sweep.main(toy[1:])
    name, n_runs, n_missing, *_ = capsys.readouterr().out.splitlines()[-1].split()
    assert (name, n_runs, n_missing) == ("toy", "2", "1")

    train_point(toy, toy2)
    first = read_status(tmp_path, "toy4")
    status = tmp_path / "runs" / "toy4_seed0" / "status.json"
    status.write_text(json.dumps({"status": "preempted", "step": 4}))
    sweep.main(toy)
    assert read_status(tmp_path, "toy4")["test"] == first["test"]

    written = status.stat().st_mtime_ns
    sweep.main(toy)
    assert status.stat().st_mtime_ns == written


@pytest.mark.slow
def test_a_run_with_other_settings_is_refused(toy, tmp_path):
    """As after a change of the config file that it was trained with."""
    for point in toy_points():
        train_point(toy, point)
    path = tmp_path / "runs" / "toy4_seed0" / "config.json"
    config = json.loads(path.read_text())
    config["model"]["conv_size"] = config["train"]["lr"] = 3
    del config["model"]["tie_weights"]  # as in a run that is older than this setting
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="toy4_seed0 was trained with another lr, conv_size; del"):
        sweep.main(toy)


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_the_others_are_kept(toy, tmp_path, monkeypatch):
    def points():
        return [Point("gpt", 0, "bad", "--dimm 7"), toy_points()[0]]

    monkeypatch.setattr(sweep, "FIGURES", {"toy": sweep.Figure(points, draw_toy, ["steps"], "")})
    with pytest.raises(RunError, match=r"1 runs failed(.|\n)*did you mean dim\?"):
        sweep.main(toy)
    assert read_status(tmp_path, "toy2")["status"] == "finished"


def test_a_figure_whose_runs_cannot_be_used_does_not_hide_the_others(toy, monkeypatch, capsys):
    """A second phase depends on the results of the first, which may be of other settings."""

    def choose(results):
        raise ConfigError("runs/a_seed0 was trained with another lr; delete it")

    broken = sweep.Figure(lambda: [], draw_toy, ["steps"], "steps", choose, choose)
    monkeypatch.setattr(sweep, "FIGURES", {"broken": broken, **sweep.FIGURES})
    sweep.main(toy[1:])
    *_, first, second = capsys.readouterr().out.splitlines()
    assert first.split()[:3] == ["broken", "-", "-"] and "trained with another lr" in first
    assert second.split()[:3] == ["toy", "2", "2"]


def test_figures_that_cannot_be_drawn_are_named_and_the_others_drawn(tmp_path, capsys):
    for name in ("lr", "hops"):
        sweep.write_json(tmp_path / f"{name}.json", made_up_results(name))
    argv = ["all", "--draw_only=1", f"--log_dir={tmp_path}/runs", f"--output={tmp_path}"]
    with pytest.raises(ConfigError) as error:
        sweep.main(argv)
    named = [line.partition(": ")[0] for line in str(error.value).splitlines()]
    assert named == [name for name in sweep.FIGURES if name not in ("lr", "hops")]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["hops.png", "lr.png"]


SHOWN = [name for name in sweep.FIGURES if os.path.exists(f"{sweep_runs.ROOT}/figures/{name}.json")]


@pytest.mark.parametrize("name", SHOWN)
def test_the_stored_figures_are_drawn_without_runs(name, tmp_path):
    shutil.copy(f"{sweep_runs.ROOT}/figures/{name}.json", tmp_path)
    sweep.main([name, "--draw_only=1", f"--log_dir={tmp_path}/runs", f"--output={tmp_path}"])
    assert (tmp_path / f"{name}.png").stat().st_size > 5000


INTERRUPTED = """
import sys
import sweep
from analysis.sweep_runs import Point
from nanorecall.settings import run_cli

POINTS = [Point("gpt", n, f"toy{{n}}", {args!r}) for n in (2, 4, 8)]
sweep.FIGURES = {{"toy": sweep.Figure(lambda: POINTS, None, [], "")}}
run_cli(lambda: sweep.main(sys.argv[1:]))
"""


def kill_group(process):
    """Leave no training behind if the test fails."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_sweep_that_is_stopped_saves_the_runs_in_flight(toy, tmp_path, request, number):
    """Ctrl-C goes to all processes of a terminal, `kill` to this one."""
    code = INTERRUPTED.format(args=f"{TOY} 1000000 --eval_interval 1000000 --log_interval 5")
    process = subprocess.Popen(
        [sys.executable, "-c", code, *toy, "--jobs=2"],
        cwd=sweep_runs.ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # Tests that run in the background of a shell ignore it, and children inherit that.
        preexec_fn=functools.partial(signal.signal, number, signal.SIG_DFL),
    )
    request.addfinalizer(functools.partial(kill_group, process))
    logs = [tmp_path / "runs" / f"toy{n}_seed0" / "log.jsonl" for n in (2, 4)]
    deadline = time.monotonic() + 240
    while not all(log.exists() and log.stat().st_size for log in logs):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    send = os.killpg if number == signal.SIGINT else os.kill
    send(process.pid, number)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 128 + number and "the same command goes on with them" in out
    assert ("interrupted" in err) == (number == signal.SIGINT) and "Traceback" not in err
    for name in ("toy2", "toy4"):
        assert read_status(tmp_path, name)["status"] == "preempted"
        assert (tmp_path / "runs" / f"{name}_seed0" / "ckpt.pt").exists()
    assert not (tmp_path / "runs" / "toy8_seed0").exists()


def test_a_figure_that_does_not_exist():
    for argv, message in (
        (["lrs"], "figure='lrs' is unknown; did you mean lr?"),
        (["xyz"], "figure='xyz' is unknown; choose from lr, time"),
        (["lr", "all"], "all stands alone"),
        # The name is wrong, not the setting that only a card has.
        (["crad", "--model", "mine"], "figure='crad' is unknown; did you mean card?"),
        (["--jobs=2", "card"], "card stands alone, before its settings: python sweep.py card"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            sweep.main(argv)


# ---- figures -------------------------------------------------------------------------------------


# What a made-up result of the value 1 has in each slice: a number that no other slice has.
SLICES = {
    "exposures": {"0": 0.11, "1": 0.12},
    "query": {"a": 0.13, "b": 0.14},
    "hops": {"1": 0.15, "2": 0.16},
    "updated": {"0": 0.17, "1": 0.18},
    "input_seq_len": {"64": 0.19, "256": 0.2},
    "size": {"64x4": 0.31, "128x8": 0.32, "256x16": 0.33, "512x64": 0.34},
}
STORED = {
    "bits stored": 0.21,
    "bits stored per parameter": 0.22,
    "bits stored per memory value": 0.23,
}
EDIT_METRICS = {
    "efficacy": 0.31,
    "specificity": 0.41,
    "specificity, shown": 0.51,
    "retained": 0.61,
}
METHODS = ("a", *sorted(set(CLOSED_FORMS.values())))


def edited(method, n, metric):
    return EDIT_METRICS[metric] * (1 - 0.1 * METHODS.index(method)) * (0.5 if n == 10 else 1)


def made_up_result(value, state=100):
    """The result of one run, with everything that some figure shows."""
    by_slice = {}
    for name, shares in SLICES.items():
        by_slice[name] = {}
        for x, share in shares.items():
            metrics = {"value": value * share, "exact": {"value": value * share / 2}}
            by_slice[name][x] = metrics
    edits = {}
    for method in METHODS:
        for n in (1, 10):
            edit = {"method": method}
            for metric in EDIT_METRICS:
                edit[metric] = {"value": value * edited(method, n, metric)}
            edits[f"{method}, {n}"] = edit
    metrics = {
        "majority": {"value": 0},
        "flex": {"accuracy": {"value": value}},
        "stored": {name: {"value": value * share} for name, share in STORED.items()},
        "edits": [1, 10],
        "accuracy": {"value": value},
    }
    return {
        "all": {"value": value},
        "state": state,
        "evals": [
            {"step": 20, "seconds": 1.0, "accuracy": 0.5, "loss": 1.0},
            {"step": 40, "seconds": 2.0, "accuracy": 0.99, "loss": 1.0},
            {"step": 60, "seconds": 3.0, "accuracy": 1.0, "loss": 1.0},
        ],
        "slices": by_slice,
        "result": {"metrics": metrics, "by_slice": {"method, edits": edits}},
    }


def made_up_results(name):
    """Three seeds with the values 0.2, 0.4 and 0.9 for every point of a figure."""
    figure = sweep.FIGURES[name]
    points = figure.points()
    if figure.choose:
        points = figure.choose({point: [made_up_result(0.5)] for point in points})
    results = {}
    for number, point in enumerate(points):
        results[point] = [made_up_result(value, state=100 + number) for value in (0.2, 0.4, 0.9)]
    return shown_results(results, figure.parts, seeds=3)


@pytest.mark.parametrize("name", ["lr", "templates"])
def test_a_line_is_the_mean_over_seeds_in_a_band_of_their_range(name):
    results = made_up_results(name)
    plt, fig, _ = sweep.FIGURES[name].draw(by_series(results))
    lines = [line for axis in fig.axes for line in axis.lines]
    bands = [band for axis in fig.axes for band in axis.collections]
    assert len(lines) == len(bands) >= len(by_series(results))
    for line, band in zip(lines, bands):
        np.testing.assert_allclose(line.get_ydata(), 0.5)
        heights = band.get_paths()[0].vertices[:, 1]
        assert (heights.min(), heights.max()) == (0.2, 0.9)
    plt.close(fig)


def draw(name):
    plt, fig, _ = sweep.FIGURES[name].draw(by_series(made_up_results(name)))
    plt.close(fig)
    return fig.axes


def test_a_line_goes_through_the_slices_in_their_order():
    for axis in draw("exposures"):
        assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "1"]
        assert len(axis.lines) >= 3
        for line in axis.lines:
            np.testing.assert_allclose(line.get_ydata(), [0.5 * 0.11 / 2, 0.5 * 0.12 / 2])


def test_bits_stored_are_drawn_under_their_names():
    total, relative = draw("table")
    shown = {line.get_label(): line.get_ydata() for line in (*total.lines, *relative.lines)}
    expected = {"memory": 0.21, "of all": 0.22, "of the table": 0.23}
    assert shown.keys() == expected.keys()
    for name, share in expected.items():
        np.testing.assert_allclose(shown[name], 0.5 * share)


def bars_of(axis):
    """{label: heights}"""
    bars = {}
    for container in axis.containers:
        bars[container.get_label()] = [bar.get_height() for bar in container]
    return bars


def test_bars_stand_over_their_slice():
    for axis, ticks, shares in zip(draw("hops"), ("ab", "12"), ((0.13, 0.14), (0.15, 0.16))):
        assert [label.get_text() for label in axis.get_xticklabels()] == list(ticks)
        bars = bars_of(axis)
        assert len(bars) in (2, 4)
        for heights in bars.values():
            np.testing.assert_allclose(heights, [0.5 * share / 2 for share in shares])


def test_updates_and_lengths_are_drawn_under_their_names():
    *_, updates, tracking = draw("state")
    found = bars_of(updates)
    assert found.keys() == {"stored once", "stored again"}
    np.testing.assert_allclose(found["stored once"], 0.5 * 0.17)
    np.testing.assert_allclose(found["stored again"], 0.5 * 0.18)
    found = bars_of(tracking)
    assert len(found) == 6  # two lengths of three tasks
    for label, heights in found.items():
        share = 0.19 if label.endswith(" 64 tokens") else 0.2
        np.testing.assert_allclose(heights, 0.5 * share)


def test_a_panel_has_the_accuracy_at_its_size():
    for axis, share in zip(draw("zoology"), (0.31, 0.32, 0.33, 0.34), strict=True):
        assert len(axis.lines) == 12
        for line in axis.lines:
            assert list(line.get_xdata()) == [32, 64, 128]
            np.testing.assert_allclose(line.get_ydata(), 0.5 * share)


def test_edits_are_drawn_by_method_and_metric():
    axes = draw("edits")
    for axis, metric in zip(axes, ("efficacy", "specificity", "specificity, shown"), strict=True):
        assert [line.get_label() for line in axis.lines] == list(METHODS)
        for line in axis.lines:
            values = [0.5 * edited(line.get_label(), n, metric) for n in (1, 10)]
            np.testing.assert_allclose(line.get_ydata(), values)
    for axis, metric in zip(draw("memories"), ("efficacy", "specificity"), strict=True):
        assert [line.get_label() for line in axis.lines] == list(CLOSED_FORMS)
        for line in axis.lines:
            method = CLOSED_FORMS[line.get_label()]
            values = [0.5 * edited(method, n, metric) for n in (1, 10)]
            np.testing.assert_allclose(line.get_ydata(), values)


def test_forgetting_is_drawn_for_the_fewest_and_the_most_facts():
    for axis, n in zip(draw("forgetting"), (1, 10), strict=True):
        means = [line for line in axis.lines if line.get_label() in METHODS]
        assert [line.get_label() for line in means] == list(METHODS)
        for line in means:
            np.testing.assert_allclose(line.get_xdata(), 0.5 * 0.23)
            retained = edited(line.get_label(), n, "retained")
            np.testing.assert_allclose(line.get_ydata(), 0.5 * retained)


@pytest.mark.parametrize("name", sweep.FIGURES)
def test_every_figure_can_be_drawn(name, tmp_path):
    _, config = sweep.parse([f"--output={tmp_path}"])
    sweep.save_figure(name, made_up_results(name), config)
    assert (tmp_path / f"{name}.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "name, series, edit", [("edits", "memory", "a, 10"), ("memories", "mqar_gpt", "overwrite, 10")]
)
def test_results_that_lack_what_a_figure_shows(tmp_path, name, series, edit):
    _, config = sweep.parse([f"--output={tmp_path}"])
    results = made_up_results(name)
    of_point = next(point for point in results["points"] if point["series"] == series)
    del of_point["results"][0]["result"]["by_slice"]["method, edits"][edit]
    message = "the results of its runs lack what it shows .*; run them again"
    with pytest.raises(ConfigError, match=message):
        sweep.save_figure(name, results, config)


def test_seconds_to_99_are_those_of_the_first_evaluation_there():
    assert seconds_to_99(made_up_result(1)) == 2.0
    assert seconds_to_99({"evals": [{"seconds": 1.0, "accuracy": 0.98}]}) == float("inf")
