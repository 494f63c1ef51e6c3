"""Finished runs side by side: a table, learning curves, and accuracy against size.

    python eval.py compare 'runs/*' [--output figures/mine]

Runs that differ in their seed only are drawn as one line: their mean, with a band from minimum to
maximum.
"""

import glob
import hashlib
import json
import math
import os
import sys

import numpy as np

from analysis.trained_run import write_parquet
from nanorecall.build import inference_state_bytes
from nanorecall.checkpoint import check_kinds, read_log, read_record
from nanorecall.metrics import print_table, slice_metrics
from nanorecall.plots import errorbars, figure, finish_figure
from nanorecall.run import SLICE_COUNTS, load_settings, saved_model_config
from nanorecall.settings import ConfigError, printable, require, say
from nanorecall.stats import format_ci
from train import TrainConfig

COLUMNS = {  # of the table, and their headings
    "run": "run",
    "model": "model",
    "params": "layer params",
    "state": "state bytes",
    "seed": "seed",
    "steps": "steps",
    "seconds": "seconds",
}


def compare(args, config):
    """Print, write and draw all finished runs that match the patterns in args."""
    require(args, "name the runs to compare: python eval.py compare 'runs/*'", None)
    folders = set()
    for pattern in args:
        folders.update(filter(os.path.isdir, glob.glob(pattern)))
    folders = sorted(folders)
    runs = read_results(folders)
    require(runs, f"no run with a test result matches {' '.join(args)}", None)

    lines = []
    for run in runs:
        _, accuracy, interval = format_ci(run["all"])
        lines.append((*(run[name] for name in COLUMNS), accuracy, interval))
    print_table((*COLUMNS.values(), "accuracy", "95% interval"), lines)

    columns = {}
    for name in ("series", *COLUMNS):
        columns[name] = [run[name] for run in runs]
    columns["accuracy"] = [run["all"]["value"] for run in runs]
    parent = os.path.dirname(os.path.normpath(folders[0])) or "."
    path = config.output or os.path.join(parent, name_of(folders))
    write_parquet(path + ".parquet", columns)
    plot_compare(path + ".png", runs)
    say(f"wrote {path}.parquet, {path}.png")


def read_results(folders):
    """`read_result` of every finished run among these folders; notes the others on the screen."""
    runs, left_out = [], []
    for folder in folders:
        if not os.path.exists(os.path.join(folder, "config.json")):
            continue
        try:
            runs.append(read_result(folder))
        except ConfigError as e:
            left_out.append(f"{folder} ({e})")
    if left_out:
        say("left out, without a test result:", *left_out, sep="\n  ", file=sys.stderr)
    return runs


def name_of(folders):
    """compare, if these are all runs of their directory, else a name that depends on the choice.

    The table of some runs must not replace that of others.
    """
    parent = glob.escape(os.path.dirname(os.path.normpath(folders[0])))
    all_runs = set()
    for path in glob.glob(os.path.join(parent, "*", "config.json")):
        all_runs.add(os.path.realpath(os.path.dirname(path)))
    chosen = set()
    for folder in folders:
        if os.path.exists(os.path.join(folder, "config.json")):
            chosen.add(os.path.realpath(folder))
    if chosen == all_runs:
        return "compare"
    digest = hashlib.sha256(json.dumps(sorted(chosen)).encode()).hexdigest()
    return f"compare_{len(chosen)}_runs-{digest[:8]}"


# ---- results of a run ----------------------------------------------------------------------------


COUNTS = {**SLICE_COUNTS, "loss": "number or null"}
TEST = {"all": COUNTS, "by_slice": {"*": {"*": COUNTS}}}


def read_test(folder):
    """status.json of a finished run, and its test result; ConfigError if that is missing or bad."""
    path = os.path.join(folder, "status.json")
    require(os.path.exists(path), "it has not finished", None)
    status = read_record(path, "dict")
    require("test" in status, "it has not finished", None)
    check_kinds(status, {"step": "count", "seconds": "number", "test": TEST}, path)
    test = status["test"]
    all_counts = [test["all"]]
    for slices in test["by_slice"].values():
        all_counts += slices.values()
    for counts in all_counts:
        possible = counts["correct"] <= counts["labels"]
        possible = possible and counts["exact_matches"] <= counts["n_examples"]
        require(possible, f"{path} is damaged: more is correct than there is", None)
        counts["loss"] = or_nan(counts["loss"])
    return status, test


def or_nan(x):
    """JSON has no nan; it was written as null."""
    return math.nan if x is None else x


# Settings that may differ between runs of one line in the figure.
NOT_COMPARED = ("seed", "run_name", "log_dir", "exp_group", "device", "num_threads")


def read_result(folder):
    """What compare shows of a finished run; ConfigError if it has no test result or is damaged."""
    path = os.path.join(folder, "config.json")
    kinds = {"parameters": {"layers": "count"}, "train": "dict", "model": "dict", "data": "dict"}
    saved = read_record(path, kinds)
    status, test = read_test(folder)
    settings = load_settings(folder, TrainConfig)
    n_params = saved["parameters"]["layers"]
    compared = []
    for part in ("train", "model", "data"):
        values = dict(saved[part])
        for name in NOT_COMPARED:
            values.pop(name, None)
        compared.append(values)
    curve = []
    for record in read_log(folder):
        if record["kind"] == "eval":
            curve.append((record["step"], or_nan(record["loss"]), record["accuracy"]))
    by_slice = {}
    for name, slices in test["by_slice"].items():
        by_slice[name] = {value: slice_metrics(c)["value"] for value, c in slices.items()}

    config = saved_model_config(folder, settings)
    state_bytes, shape = 0, ""
    # A forked model file may lack seq_len, dim or n_layers.
    if hasattr(config, "seq_len"):
        model = settings.model_class(config)
        state_bytes = inference_state_bytes(model, config.seq_len) or 0
    if hasattr(config, "dim") and hasattr(config, "n_layers"):
        shape = f"D{config.dim} L{config.n_layers}"
    return {
        "run": printable(os.path.basename(os.path.normpath(folder))),
        "model": settings.train.model,
        "series": f"{settings.train.model} {shape}, {n_params} params",
        "settings": json.dumps(compared),
        "params": n_params,
        "state": state_bytes,
        "seed": settings.train.seed,
        "steps": status["step"],
        "seconds": round(status["seconds"], 1),
        "all": slice_metrics(test["all"]),
        "curve": curve,
        "by_slice": by_slice,
    }


# ---- figure --------------------------------------------------------------------------------------


def plot_compare(path, runs):
    """Loss and accuracy against steps, accuracy by slice, and accuracy against state or size."""
    slice_name, values = shared_slice(runs)
    has_states = len({run["state"] for run in runs}) > 1
    size = "state" if has_states else "params"
    all_sizes = set()
    groups = group_seeds(runs)

    plt, fig, (losses, accuracies, slices, sizes) = figure(2, 2)
    for label, seeds in groups.items():
        steps, loss, accuracy = shared_curve(seeds)
        color = mean_and_range(losses, steps, loss)
        mean_and_range(accuracies, steps, accuracy, color)
        x, heights = shared_values(seeds, slice_name, values)
        mean_and_range(slices, x, heights, color, f"{label} (runs: {len(seeds)})")
        x = [run[size] for run in seeds]
        errorbars(sizes, x, [run["all"] for run in seeds], ls="none", color=color)
        all_sizes.update(x)

    for axis in (losses, accuracies):
        axis.set_xlabel("step")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
    losses.set(ylabel="val loss (nats per label)", yscale="log")
    accuracies.set_ylabel("val token accuracy")
    slices.set(xlabel=slice_name or "(no slices that all runs have)", ylabel="test token accuracy")
    slices.set_xticks(range(len(values)), values)
    xlabel = "parameters without embedding and head"
    if has_states:
        xlabel = "state at the longest test sequence (bytes, float32)"
    sizes.set(xlabel=xlabel, ylabel="test token accuracy, 95% interval")
    set_size_ticks(sizes, sorted(all_sizes))
    for axis in (accuracies, slices, sizes):
        axis.set_ylim(-0.02, 1.02)
    handles, labels = slices.get_legend_handles_labels()
    n_columns = 2 if len(groups) > 4 else 1
    fig.legend(handles, labels, loc="outside upper center", ncols=n_columns)
    fig.supxlabel("lines: mean over seeds; bands: minimum to maximum")
    finish_figure(fig, plt, path, "")


def shared_slice(runs):
    """The first slice that all runs have, or None, and its values in any of them, in order.

    Runs of different tasks share no slices. Then the panel stays empty.
    """
    for name in runs[0]["by_slice"]:
        if all(name in run["by_slice"] for run in runs):
            break
    else:
        return None, []
    values = {}
    for run in runs:
        values |= run["by_slice"][name]
    if all(value.isdigit() for value in values):
        return name, sorted(values, key=int)
    return name, list(values)


def shared_values(runs, slice_name, values):
    """Indices of the values that all runs have, and the accuracies (runs, indices) there."""
    tables = [run["by_slice"].get(slice_name, {}) for run in runs]
    indices, heights = [], []
    for index, value in enumerate(values):
        if all(value in table for table in tables):
            indices.append(index)
            heights.append([table[value] for table in tables])
    return indices, np.array(heights).reshape(len(indices), len(runs)).T


def shared_curve(runs):
    """Steps at which all runs were evaluated, and loss and accuracy (runs, steps) there.

    Some runs may have stopped early; a mean over the others alone would jump.
    """
    curves = []
    for run in runs:
        curves.append({step: (loss, accuracy) for step, loss, accuracy in run["curve"]})
    in_all = set(curves[0]).intersection(*curves)
    steps = [step for step in curves[0] if step in in_all]
    measured = np.zeros((2, len(runs), len(steps)))
    for number, curve in enumerate(curves):
        for i, step in enumerate(steps):
            measured[:, number, i] = curve[step]
    return steps, *measured


def set_size_ticks(axis, sizes):
    """A logarithmic x axis whose ticks are these sizes, smallest first."""
    if sizes[0] > 0:
        axis.set_xscale("log")
    elif sizes[-1] > 0:
        # A logarithmic axis cannot show 0, a model without state.
        axis.set_xscale("symlog", linthresh=sizes[1])
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=20, ha="right")
    axis.minorticks_off()


def group_seeds(runs):
    """{label: runs that differ in their seed only}"""
    by_settings = {}
    for run in runs:
        by_settings.setdefault(run["settings"], []).append(run)
    names = [seeds[0]["series"] for seeds in by_settings.values()]
    groups = {}
    for name, seeds in zip(names, by_settings.values()):
        if names.count(name) > 1:
            name += f", {seeds[0]['run'][-40:]}"
        groups[name] = seeds
    return groups


def mean_and_range(axis, x, values, color=None, label=None):
    """Draw the mean of values (runs, points), with a band over their range -> its colour."""
    (line,) = axis.plot(x, values.mean(0), "o-", ms=3, lw=1, color=color, label=label)
    axis.fill_between(x, values.min(0), values.max(0), alpha=0.2, color=line.get_color())
    return line.get_color()
