"""Finished runs side by side: one table, and how each learned, with the mean and range of runs that differ in their seed only.

python eval.py compare 'runs/*' [--out figures/mine]
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
from nanorecall.metrics import errorbars, figure, finish_figure, format_ci, print_table, slice_metrics
from nanorecall.run import load_settings, saved_model_config
from nanorecall.settings import ConfigError, printable, require, say
from train import TrainConfig


def compare(words, config):
    """Finished runs side by side."""
    require(words, "name the runs to compare: python eval.py compare 'runs/*'", None)
    folders = sorted({f for word in words for f in glob.glob(word) if os.path.isdir(f)})
    runs, left_out = [], []
    for folder in folders:
        if os.path.exists(os.path.join(folder, "config.json")):
            try:
                runs.append(read_result(folder))
            except ConfigError as e:
                left_out.append(f"{folder} ({e})")
    if left_out:
        say("left out, for want of a test result:", *left_out, sep="\n  ", file=sys.stderr)
    require(runs, f"no run with a test result matches {' '.join(words)}", None)
    head = ("run", "model", "layer params", "state bytes", "seed", "steps", "seconds", "accuracy", "95% interval")
    names = ("run", "model", "params", "state", "seed", "steps", "seconds")
    print_table(head, [(*(r[k] for k in names), *format_ci(r["all"])[1:]) for r in runs])
    out = config.out or os.path.join(os.path.dirname(os.path.normpath(folders[0])) or ".", name_of(folders))
    flat = [
        {k: v for k, v in r.items() if k not in ("all", "by_slice", "curve", "settings")} | {"accuracy": r["all"]["value"]}
        for r in runs
    ]
    write_parquet(out + ".parquet", {k: [r[k] for r in flat] for k in flat[0]})
    plot_compare(out + ".png", runs)
    say(f"wrote {out}.parquet, {out}.png")


def name_of(folders):
    """compare, if these are all the runs in their directory; else with a name for these, so that a
    table of some does not take the place of another's."""
    beside = os.path.join(
        glob.escape(os.path.dirname(os.path.normpath(folders[0]))), "*", "config.json"
    )
    every = {os.path.realpath(os.path.dirname(path)) for path in glob.glob(beside)}
    mine = {os.path.realpath(f) for f in folders if os.path.exists(os.path.join(f, "config.json"))}
    if mine == every:
        return "compare"
    return f"compare_{len(mine)}_runs-{hashlib.sha256(json.dumps(sorted(mine)).encode()).hexdigest()[:8]}"


SUMS = "right row_right rows right_right right_labels labels_labels".split()
COUNTS = {
    **dict.fromkeys(SUMS, "count"),
    "labels": "size",
    "rows": "size",
    "loss": "number or null",
}  # measure.count's
TEST = {"all": COUNTS, "by_slice": {"*": {"*": COUNTS}}}


def read_test(folder):
    """(status.json of a finished run, its test result); ConfigError if it has none, or none that
    can be."""
    path = os.path.join(folder, "status.json")
    require(os.path.exists(path), "it has not finished", None)
    status = read_record(path, "dict")
    require("test" in status, "it has not finished", None)
    check_kinds(status, {"step": "count", "seconds": "number", "test": TEST}, path)
    test = status["test"]
    for cell in [
        test["all"],
        *(cell for cells in test["by_slice"].values() for cell in cells.values()),
    ]:
        possible = cell["right"] <= cell["labels"] and cell["row_right"] <= cell["rows"]
        require(possible, f"{path} is damaged: more is right than there is", None)
        if cell["loss"] is None:  # JSON has no nan
            cell["loss"] = math.nan
    return status, test


def read_result(folder):
    """What compare shows of one finished run; ConfigError if it has no test result, or is
    damaged."""
    path = os.path.join(folder, "config.json")
    saved = read_record(
        path, {"parameters": {"layers": "count"}, "train": "dict", "model": "dict", "data": "dict"}
    )
    status, test = read_test(folder)
    own = ("seed", "run_name", "log_dir", "exp_group", "device", "threads")  # what may differ between runs of one line
    p = load_settings(folder, TrainConfig)
    sizes = saved_model_config(folder, p)
    # A model file may leave inference_state_bytes out, or have no n_layers: compare takes forks, too.
    state = (p.model_class.inference_state_bytes(sizes) if hasattr(p.model_class, "inference_state_bytes") else 0) or 0
    known = hasattr(sizes, "dim") and hasattr(sizes, "n_layers")
    shape = f"D{sizes.dim} L{sizes.n_layers}" if known else ""
    return {
        "run": printable(os.path.basename(os.path.normpath(folder))),
        "model": p.train.model,
        "line": f"{p.train.model} {shape}, {saved['parameters']['layers']} params",
        "settings": json.dumps([{k: v for k, v in saved[part].items() if k not in own} for part in ("train", "model", "data")]),
        "params": saved["parameters"]["layers"],
        "state": state,
        "seed": p.train.seed,
        "steps": status["step"],
        "seconds": round(status["seconds"], 1),
        "all": slice_metrics(test["all"]),
        "curve": [(r["step"], or_nan(r["loss"]), r["accuracy"]) for r in read_log(folder) if r["kind"] == "eval"],
        "by_slice": {tag: {v: slice_metrics(c)["value"] for v, c in cells.items()} for tag, cells in test["by_slice"].items()},
    }


def or_nan(x):
    return math.nan if x is None else x


def plot_compare(path, runs):
    """Loss and accuracy against steps, the first slices that all runs have, and accuracy against what differs: state, or size.

    Runs that differ in their seed only are one colour, with mean and range.
    """
    # Runs of different tasks share no slices; the panel then stays empty rather than mixing them.
    common = [tag for tag in runs[0]["by_slice"] if all(tag in r["by_slice"] for r in runs)]
    tag = common[0] if common else None
    names = list(dict.fromkeys(v for r in runs for v in r["by_slice"].get(tag, {})))
    names = sorted(names, key=int) if all(v.isdigit() for v in names) else names
    by_state = len({r["state"] for r in runs}) > 1
    plt, fig, (losses, accuracies, slices, sizes) = figure(2, 2)
    for label, same in group_seeds(runs).items():
        # A mean over seeds only where all of them were evaluated: some may have stopped earlier.
        steps = [s for s in (r[0] for r in same[0]["curve"]) if all(s in {x[0] for x in r["curve"]} for r in same)]
        color = None
        for axis, at in ((losses, 1), (accuracies, 2)):
            curves = np.array([[x[at] for x in r["curve"] if x[0] in steps] for r in same])
            color = mean_and_range(axis, steps, curves, color)
        at = [i for i, v in enumerate(names) if all(v in r["by_slice"].get(tag, {}) for r in same)]
        values = np.array([[r["by_slice"][tag][names[i]] for i in at] for r in same])
        mean_and_range(slices, at, values, color, f"{label} (runs: {len(same)})")
        errorbars(sizes, [r["state" if by_state else "params"] for r in same], [r["all"] for r in same], ls="none", color=color)
    losses.set(xlabel="step", ylabel="val loss (nats per label)", yscale="log")
    accuracies.set(xlabel="step", ylabel="val token accuracy")
    slices.set(xlabel=tag or "(no slices that all runs have)", ylabel="test token accuracy")
    slices.set_xticks(range(len(names)), names, fontsize=7)
    size = "state at the longest test row (bytes, float32)" if by_state else "parameters without embedding and head"
    sizes.set(xlabel=size, ylabel="test token accuracy, 95% interval")
    fig.legend(*slices.get_legend_handles_labels(), fontsize=7, loc="outside upper center", ncols=1 + (len(group_seeds(runs)) > 4))
    fig.supxlabel("lines: mean over seeds; bands: lowest to highest", fontsize=7)
    for axis in (losses, accuracies):
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
    there = sorted({r["state" if by_state else "params"] for r in runs})
    if there[0] > 0:
        sizes.set_xscale("log")
    elif there[-1] > 0:  # a logarithm has no place for 0
        sizes.set_xscale("symlog", linthresh=min(n for n in there if n > 0))
    sizes.set_xticks(there, [f"{n:,}" for n in there], rotation=20, ha="right", fontsize=7)
    sizes.minorticks_off()
    for axis in (losses, accuracies, slices, sizes):
        axis.grid(alpha=0.3)
        axis.yaxis.label.set_fontsize(8)
    for axis in (accuracies, slices, sizes):
        axis.set_ylim(-0.02, 1.02)
    finish_figure(fig, plt, path, "")


def group_seeds(runs):
    """{label: runs that differ in their seed only}"""
    by_settings = {}
    for r in runs:
        by_settings.setdefault(r["settings"], []).append(r)
    named = [same[0]["line"] for same in by_settings.values()]
    label = lambda r: r["line"] if named.count(r["line"]) == 1 else f"{r['line']}, {r['run'][-40:]}"
    return {label(same[0]): same for same in by_settings.values()}


def mean_and_range(axis, x, values, color=None, label=None):
    """Mean of values (runs, points) with a band from lowest to highest -> its colour."""
    (drawn,) = axis.plot(x, values.mean(0), "o-", ms=3, lw=1, color=color, label=label)
    axis.fill_between(x, values.min(0), values.max(0), alpha=0.2, color=drawn.get_color())
    return drawn.get_color()
