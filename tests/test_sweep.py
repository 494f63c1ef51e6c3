"""sweep.py: commands are valid, finished runs stay, stopped ones resume, figures are true."""

import json
import shlex
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
from analysis.sweep_runs import Point, by_series, shown_results, training_command
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

    def run_point(point, seed, folder, config):
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


def test_a_figure_that_does_not_exist():
    with pytest.raises(ConfigError, match="there is no figure lrs; choose from lr, pairs"):
        sweep.main(["lrs"])


# ---- figures -------------------------------------------------------------------------------------


def made_up_result(value, state=100):
    """The result of one run, with everything that some figure shows equal to value."""
    number = {"value": value}
    by_slice = {}
    slices = {"exposures": "01", "query": "ab", "hops": "12", "updated": "01"}
    for name, values in {**slices, "input_seq_len": ("64", "256")}.items():
        by_slice[name] = dict.fromkeys(values, {"value": value, "exact": number})
    edits = {}
    for method in ("a", *sorted(set(CLOSED_FORMS.values()))):
        metrics = ("efficacy", "specificity", "specificity, shown", "retained")
        edit = {"method": method, **dict.fromkeys(metrics, number)}
        edits |= {f"{method}, 1": edit, f"{method}, 10": edit}
    bits = ("bits stored", "bits stored per parameter", "bits stored per memory value")
    metrics = {
        "majority": {"value": 0},
        "flex": {"accuracy": number},
        "stored": dict.fromkeys(bits, number),
        "edits": [1, 10],
        "accuracy": number,
    }
    return {
        "all": number,
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


@pytest.mark.parametrize("name", ["lr", "pairs", "width", "table", "templates"])
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
    message = f"figure {name}: .* lack what it shows .*; run them again"
    with pytest.raises(ConfigError, match=message):
        sweep.save_figure(name, results, config)


def test_seconds_to_99_are_those_of_the_first_evaluation_there():
    assert seconds_to_99(made_up_result(1)) == 2.0
    assert seconds_to_99({"evals": [{"seconds": 1.0, "accuracy": 0.98}]}) == float("inf")
