"""Finished runs side by side: a table, learning curves, and accuracy against size.

    python eval.py compare 'runs/*' [--output figures/mine]

Runs that differ in their seed only are drawn as one line: their mean, with a band from lowest to
highest.
"""

import glob
import hashlib
import json
import math
import os
import sys

import numpy as np

from analysis.trained_run import write_parquet
from nanorecall.checkpoint import check_kinds, read_log, read_record
from nanorecall.metrics import print_table, slice_metrics
from nanorecall.plots import errorbars, figure, finish_figure
from nanorecall.run import load_settings, saved_model_config
from nanorecall.settings import ConfigError, printable, require, say
from nanorecall.stats import format_ci
from train import TrainConfig

COLUMNS = ("run", "model", "params", "state", "seed", "steps", "seconds")


def compare(args, config):
    """Print, write and draw all finished runs that match the patterns in args."""
    require(args, "name the runs to compare: python eval.py compare 'runs/*'", None)
    folders = sorted({f for arg in args for f in glob.glob(arg) if os.path.isdir(f)})
    runs, left_out = [], []
    for folder in folders:
        if not os.path.exists(os.path.join(folder, "config.json")):
            continue
        try:
            runs.append(read_result(folder))
        except ConfigError as e:
            left_out.append(f"{folder} ({e})")
    if left_out:
        say("left out, for want of a test result:", *left_out, sep="\n  ", file=sys.stderr)
    require(runs, f"no run with a test result matches {' '.join(args)}", None)
    lines = []
    head = ("run", "model", "layer params", "state bytes", "seed", "steps", "seconds")
    for run in runs:
        lines.append((*(run[name] for name in COLUMNS), *format_ci(run["all"])[1:]))
    print_table((*head, "accuracy", "95% interval"), lines)
    parent = os.path.dirname(os.path.normpath(folders[0])) or "."
    out = config.output or os.path.join(parent, name_of(folders))
    names = [name for name in runs[0] if name not in ("all", "by_slice", "curve", "settings")]
    columns = {name: [run[name] for run in runs] for name in names}
    columns["accuracy"] = [run["all"]["value"] for run in runs]
    write_parquet(out + ".parquet", columns)
    plot_compare(out + ".png", runs)
    say(f"wrote {out}.parquet, {out}.png")


def name_of(folders):
    """compare, if these are all runs of their directory, else a name that depends on the choice.

    The table of some runs must not replace that of others.
    """
    parent = glob.escape(os.path.dirname(os.path.normpath(folders[0])))
    paths = glob.glob(os.path.join(parent, "*", "config.json"))
    all_runs = {os.path.realpath(os.path.dirname(path)) for path in paths}
    chosen = set()
    for folder in folders:
        if os.path.exists(os.path.join(folder, "config.json")):
            chosen.add(os.path.realpath(folder))
    if chosen == all_runs:
        return "compare"
    digest = hashlib.sha256(json.dumps(sorted(chosen)).encode()).hexdigest()
    return f"compare_{len(chosen)}_runs-{digest[:8]}"


# ---- results of a run ----------------------------------------------------------------------------


COUNTS = {  # of nanorecall.metrics.merge_counts
    **dict.fromkeys(("right", "row_right"), "count"),
    **dict.fromkeys(("right_right", "right_labels", "labels_labels"), "count"),
    "labels": "size",
    "rows": "size",
    "loss": "number or null",
}
TEST = {"all": COUNTS, "by_slice": {"*": {"*": COUNTS}}}


def read_test(folder):
    """status.json of a finished run, and its test result; ConfigError if that is missing or bad."""
    path = os.path.join(folder, "status.json")
    require(os.path.exists(path), "it has not finished", None)
    status = read_record(path, "dict")
    require("test" in status, "it has not finished", None)
    check_kinds(status, {"step": "count", "seconds": "number", "test": TEST}, path)
    test = status["test"]
    cells = [test["all"]]
    for of_values in test["by_slice"].values():
        cells += of_values.values()
    for cell in cells:
        possible = cell["right"] <= cell["labels"] and cell["row_right"] <= cell["rows"]
        require(possible, f"{path} is damaged: more is right than there is", None)
        cell["loss"] = or_nan(cell["loss"])
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
    p = load_settings(folder, TrainConfig)
    config = saved_model_config(folder, p)
    n_params = saved["parameters"]["layers"]
    # A forked model file may lack inference_state_bytes, dim or n_layers.
    state_bytes = getattr(p.model_class, "inference_state_bytes", lambda config: 0)(config) or 0
    shape = ""
    if hasattr(config, "dim") and hasattr(config, "n_layers"):
        shape = f"D{config.dim} L{config.n_layers}"
    settings = []
    for part in ("train", "model", "data"):
        settings.append({k: v for k, v in saved[part].items() if k not in NOT_COMPARED})
    curve = []
    for record in read_log(folder):
        if record["kind"] == "eval":
            curve.append((record["step"], or_nan(record["loss"]), record["accuracy"]))
    by_slice = {}
    for tag, cells in test["by_slice"].items():
        by_slice[tag] = {value: slice_metrics(c)["value"] for value, c in cells.items()}
    return {
        "run": printable(os.path.basename(os.path.normpath(folder))),
        "model": p.train.model,
        "line": f"{p.train.model} {shape}, {n_params} params",
        "settings": json.dumps(settings),
        "params": n_params,
        "state": state_bytes,
        "seed": p.train.seed,
        "steps": status["step"],
        "seconds": round(status["seconds"], 1),
        "all": slice_metrics(test["all"]),
        "curve": curve,
        "by_slice": by_slice,
    }


# ---- figure --------------------------------------------------------------------------------------


def plot_compare(path, runs):
    """Loss and accuracy against steps, accuracy by slice, and accuracy against state or size."""
    # Runs of different tasks share no slices. Then the panel stays empty.
    common = [tag for tag in runs[0]["by_slice"] if all(tag in run["by_slice"] for run in runs)]
    tag = common[0] if common else None
    values = list(dict.fromkeys(v for run in runs for v in run["by_slice"].get(tag, {})))
    if all(value.isdigit() for value in values):
        values = sorted(values, key=int)
    by_state = len({run["state"] for run in runs}) > 1
    size = "state" if by_state else "params"
    groups = group_seeds(runs)

    plt, fig, (losses, accuracies, slices, sizes) = figure(2, 2)
    for label, seeds in groups.items():
        steps, loss, accuracy = shared_curve(seeds)
        color = mean_and_range(losses, steps, loss)
        mean_and_range(accuracies, steps, accuracy, color)
        tables = [run["by_slice"].get(tag, {}) for run in seeds]
        shared = [i for i, v in enumerate(values) if all(v in table for table in tables)]
        heights = np.array([[table[values[i]] for i in shared] for table in tables])
        mean_and_range(slices, shared, heights, color, f"{label} (runs: {len(seeds)})")
        x, cells = [run[size] for run in seeds], [run["all"] for run in seeds]
        errorbars(sizes, x, cells, ls="none", color=color)

    losses.set(xlabel="step", ylabel="val loss (nats per label)", yscale="log")
    accuracies.set(xlabel="step", ylabel="val token accuracy")
    slices.set(xlabel=tag or "(no slices that all runs have)", ylabel="test token accuracy")
    slices.set_xticks(range(len(values)), values)
    xlabel = "parameters without embedding and head"
    if by_state:
        xlabel = "state at the longest test sequence (bytes, float32)"
    sizes.set(xlabel=xlabel, ylabel="test token accuracy, 95% interval")
    n_columns = 2 if len(groups) > 4 else 1
    handles, labels = slices.get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper center", ncols=n_columns)
    fig.supxlabel("lines: mean over seeds; bands: lowest to highest")
    for axis in (losses, accuracies):
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
    ticks = sorted({run[size] for run in runs})
    if ticks[0] > 0:
        sizes.set_xscale("log")
    elif ticks[-1] > 0:
        # A logarithmic axis cannot show 0, a model without state.
        sizes.set_xscale("symlog", linthresh=min(n for n in ticks if n > 0))
    sizes.set_xticks(ticks, [f"{n:,}" for n in ticks], rotation=20, ha="right")
    sizes.minorticks_off()
    for axis in (accuracies, slices, sizes):
        axis.set_ylim(-0.02, 1.02)
    finish_figure(fig, plt, path, "")


def shared_curve(runs):
    """Steps at which all runs were evaluated, and loss and accuracy (runs, steps) there.

    Some runs may have stopped early; a mean over the others alone would jump.
    """
    curves = [{step: (loss, accuracy) for step, loss, accuracy in run["curve"]} for run in runs]
    steps = [step for step in curves[0] if all(step in curve for curve in curves)]
    measured = np.array([[curve[step] for step in steps] for curve in curves])
    measured = measured.reshape(len(runs), len(steps), 2)
    return steps, measured[..., 0], measured[..., 1]


def group_seeds(runs):
    """{label: runs that differ in their seed only}"""
    by_settings = {}
    for run in runs:
        by_settings.setdefault(run["settings"], []).append(run)
    lines = [seeds[0]["line"] for seeds in by_settings.values()]
    groups = {}
    for seeds in by_settings.values():
        label = seeds[0]["line"]
        if lines.count(label) > 1:
            label += f", {seeds[0]['run'][-40:]}"
        groups[label] = seeds
    return groups


def mean_and_range(axis, x, values, color=None, label=None):
    """Draw the mean of values (runs, points), with a band from lowest to highest -> its colour."""
    (line,) = axis.plot(x, values.mean(0), "o-", ms=3, lw=1, color=color, label=label)
    axis.fill_between(x, values.min(0), values.max(0), alpha=0.2, color=line.get_color())
    return line.get_color()
