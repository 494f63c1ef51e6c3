"""Finished runs side by side: a table, learning curves, and accuracy against size.

    python eval.py compare 'runs/*' [--output figures/mine] [--band interval]

The table has a column for each setting that differs between the runs. Runs that differ in their
seed only are drawn as one line, their mean, with a band: from lowest to highest, or the 95%
interval of the mean.
"""

import glob
import hashlib
import json
import math
import os
import sys

import numpy as np

from analysis.compare_figure import plot_compare
from analysis.edited_run import recorded_edits
from analysis.trained_run import write_parquet
from nanorecall.build import inference_state_bytes
from nanorecall.metrics import print_table, slice_metrics
from nanorecall.records import check_kinds, read_log, read_record
from nanorecall.saved_run import load_settings, saved_model_config
from nanorecall.settings import ConfigError, printable, require, say
from nanorecall.stats import format_ci
from nanorecall.status import SLICE_COUNTS
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
    folder = os.path.dirname(config.output) or "."
    message = f"output={config.output}: there is no directory {folder}; make it, or name another"
    require(os.path.isdir(folder), message, "output")
    folders = set()
    for pattern in args:
        found = list(filter(os.path.isdir, glob.glob(pattern)))
        if not found:
            say(f"note: no directory matches {pattern}", file=sys.stderr)
        # A run may be named with a slash at its end, too.
        folders.update(map(os.path.normpath, found))
    folders = sorted(folders)
    runs = read_results(folders)
    require(runs, f"no run with a test result matches {' '.join(args)}", None)

    different = [name for name in different_settings(runs) if name not in COLUMNS]
    groups = group_seeds(runs)
    say(describe_extremes(groups))
    print_runs(runs, different)
    columns = {}
    for name in ("series", *COLUMNS):
        columns[name] = [run[name] for run in runs]
    for name in different:
        columns[name] = [setting_text(run, name) for run in runs]
    columns["accuracy"] = [run["all"]["value"] for run in runs]
    parent = os.path.dirname(os.path.normpath(folders[0])) or "."
    path = config.output or os.path.join(parent, name_of(folders))
    write_parquet(path + ".parquet", columns)
    plot_compare(path + ".png", groups, config.band)
    say(f"wrote {path}.parquet, {path}.png")


def print_runs(runs, different):
    """A table with a row for each run. different: names of the settings that differ."""
    shown = different[:MAX_SHOWN]
    lines = []
    for run in runs:
        _, accuracy, interval = format_ci(run["all"])
        values = ["unknown" if run[name] is None else run[name] for name in COLUMNS]
        values += [setting_text(run, name) for name in shown]
        lines.append((*values, accuracy, interval))
    print_table((*COLUMNS.values(), *shown, "accuracy", "95% interval"), lines)
    if len(different) > len(shown):
        say(f"{len(different)} settings differ; the table has {MAX_SHOWN} of them, .parquet all")


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


MAX_SHOWN = 8  # settings in the printed table
# Settings that may differ between runs of one line in the figure.
NOT_COMPARED = ("seed", "run_name", "log_dir", "exp_group", "device", "num_threads", "track")


def read_result(folder):
    """The results of a finished run, as compare shows them -> dict.

    ConfigError if it has no test result or is damaged.
    """
    path = os.path.join(folder, "config.json")
    kinds = {"parameters": {"layers": "count"}, "train": "dict", "model": "dict", "data": "dict"}
    saved = read_record(path, kinds)
    status, test = read_test(folder)
    settings = load_settings(folder, TrainConfig)
    n_params = saved["parameters"]["layers"]
    compared = {**saved["train"], **saved["model"], **saved["data"]}
    for name in NOT_COMPARED:
        compared.pop(name, None)
    edits = recorded_edits(folder)
    if edits:  # else an edited run would be another seed of its original
        compared["edits"] = str(len(edits))
    digests = saved.get("data_sha256", {})
    check_kinds(digests, {"*": "hash"}, f"{path}: 'data_sha256'")
    for key, digest in digests.items():
        compared[f"{key}_sha256"] = digest[:8]
    train_curve, curve = read_curves(folder)
    by_slice = {}
    for name, slices in test["by_slice"].items():
        by_slice[name] = {value: slice_metrics(c)["value"] for value, c in slices.items()}

    config = saved_model_config(folder, settings)
    state_bytes, shape = None, ""
    # A forked model file may lack seq_len, dim or n_layers.
    if hasattr(config, "seq_len"):
        model = settings.model_class(config)
        state_bytes = inference_state_bytes(model, config.seq_len)  # None: it cannot decode
    if hasattr(config, "dim") and hasattr(config, "n_layers"):
        shape = f"D{config.dim} L{config.n_layers}"
    return {
        "run": printable(os.path.basename(os.path.normpath(folder))),
        "model": settings.train.model,
        "series": f"{settings.train.model} {shape}, {n_params} params",
        "settings": compared,
        "params": n_params,
        "state": state_bytes,
        "seed": settings.train.seed,
        "steps": status["step"],
        "seconds": round(status["seconds"], 1),
        "all": slice_metrics(test["all"]),
        "train_curve": train_curve,
        "curve": curve,
        "by_slice": by_slice,
    }


def read_curves(folder):
    """log.jsonl -> [(step, loss)] of training, [(step, loss, accuracy)] of validation."""
    train_curve, curve = [], []
    for record in read_log(folder):
        if record["kind"] == "train":
            train_curve.append((record["step"], or_nan(record["loss"])))
        elif record["kind"] == "eval":
            curve.append((record["step"], or_nan(record["loss"]), record["accuracy"]))
    return train_curve, curve


# ---- settings that differ ------------------------------------------------------------------------


def different_settings(runs):
    """Names of the settings that are not the same in all runs, in the order of config.json."""
    names = {}
    for run in runs:
        names |= dict.fromkeys(run["settings"])
    different = []
    for name in names:
        if len({setting_text(run, name) for run in runs}) > 1:
            different.append(name)
    return different


def setting_text(run, name):
    """A setting of a run; empty if its model or data file has no such setting."""
    value = run["settings"].get(name, "")
    return printable(value if isinstance(value, str) else json.dumps(value))


def group_seeds(runs):
    """{label: runs that differ in their seed only}"""
    by_settings, by_name = {}, {}
    for run in runs:
        by_settings.setdefault(json.dumps(run["settings"], sort_keys=True), []).append(run)
    for seeds in by_settings.values():
        by_name.setdefault(seeds[0]["series"], []).append(seeds[0])
    groups = {}
    for seeds in by_settings.values():
        name = seeds[0]["series"]
        different = different_settings(by_name[name])
        values = ", ".join(f"{key}={setting_text(seeds[0], key)}" for key in different)
        if len(values) > 60:
            values = seeds[0]["run"][-40:]
        label = base = f"{name}, {values}" if values else name
        n = 1
        while label in groups:  # runs of one name in several folders
            n += 1
            label = f"{base} ({n})"
        groups[label] = seeds
    return groups


def describe_extremes(groups):
    """Which settings are best and worst, as a sentence."""
    means = {}
    for label, seeds in groups.items():
        means[label] = np.mean([run["all"]["value"] for run in seeds])
    best, worst = max(means, key=means.get), min(means, key=means.get)
    if len(groups) == 1:
        return f"Test accuracy: {describe_group(best, groups[best])}."
    text = f"Highest test accuracy: {describe_group(best, groups[best])}"
    return f"{text}; lowest: {describe_group(worst, groups[worst])}."


def describe_group(label, seeds):
    values = [run["all"]["value"] for run in seeds]
    if len(seeds) == 1:
        return f"{values[0]:.4f} ({label})"
    spread = f"{min(values):.4f} to {max(values):.4f}"
    return f"{np.mean(values):.4f} ({label}; mean of {len(seeds)} runs, {spread})"
