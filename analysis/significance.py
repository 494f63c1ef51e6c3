"""Intervals of one run's results, and significance tests between two runs on the same examples.

    python eval.py stats runs/A            # intervals by slice; correlations with the loss
    python eval.py stats runs/A runs/B     # McNemar's test and paired bootstrap by slice

Letters: N labels, R examples.
"""

import hashlib
import os

import numpy as np

from analysis.trained_run import BOOLEAN, NUMBER, WHOLE, read_parquet
from nanorecall.checkpoint import read_checkpoint
from nanorecall.metrics import print_table
from nanorecall.plots import errorbars, figure, finish_figure
from nanorecall.records import read_record, write_json
from nanorecall.settings import require, say
from nanorecall.stats import (
    add_holm,
    cluster_sums,
    correlation,
    correlation_lines,
    format_ci,
    label_accuracy,
    label_mean_ci,
    mcnemar,
    paired_bootstrap,
    proportion,
)


def stats(args, config):
    """Analyse the results of one run, or compare two -> the path of the figure, None without."""
    require(len(args) in (1, 2), "name one or two runs: python eval.py stats runs/A [runs/B]", None)
    labels = [read_labels(arg, config.split) for arg in args]
    examples = [per_example(columns) for columns in labels]
    slices = [name for name in examples[0] if name not in MEASURED]
    if len(args) == 1:
        result = one_run(examples[0], slices)
    else:
        message = f"{args[0]} and {args[1]} were not measured on the same examples"
        advice = "give both the same data, seed and split"
        require(same_examples(args, labels), f"{message}; {advice}", None)
        result = two_runs(*examples, slices)
    path = result_path(args, config.split)
    provenance = {"runs": args, "split": config.split}
    write_json(path + ".json", {"config": provenance, **result, "examples": []})
    if not result["by_slice"]:  # one number needs no figure
        say(f"wrote {path}.json")
        return None
    plot_stats(path + ".png", result, args)
    say(f"wrote {path}.json, .png")
    return path + ".png"


# ---- results of a run ----------------------------------------------------------------------------


LABELS = {"example": WHOLE, "correct": BOOLEAN, "loss": NUMBER}
# Columns of per_example. All others are slices.
MEASURED = ("example", "exact_match", "labels", "correct", "loss")


def read_labels(path, split):
    """A run, or its eval_<split>.json or .parquet -> {column: (N,)}, sorted by example."""
    if os.path.isdir(path):
        file = os.path.join(path, f"eval_{split}.parquet")
    else:
        file = os.path.splitext(path)[0] + ".parquet"
    columns = read_parquet(file, LABELS, f"python eval.py {path} --split {split} writes it")
    require_current(file)
    order = np.argsort(columns["example"], kind="stable")
    return {name: values[order] for name, values in columns.items()}


def require_current(file):
    """ConfigError if a result is of another step than the checkpoint of its run is now."""
    path = os.path.splitext(file)[0] + ".json"
    folder = os.path.dirname(file)
    if not os.path.exists(path):
        return
    config = read_record(path, {"config": {"step": "count", "checkpoint": "text"}})["config"]
    name = config["checkpoint"]
    if name not in ("best", "ckpt") or not os.path.exists(os.path.join(folder, name + ".pt")):
        return
    step = read_checkpoint(folder, name)["step"]
    message = f"{file} is of step {config['step']}, and {name}.pt of step {step}"
    require(config["step"] == step, f"{message}; run python eval.py {folder} again", None)


def per_example(labels):
    """{column: (N,)} -> {column: (R,)}: MEASURED and slices.

    "labels" and "correct" are numbers of labels, and the loss is summed. Slices are kept if all
    labels of an example have the same value.
    """
    example, first, index = np.unique(labels["example"], return_index=True, return_inverse=True)
    n_labels, n_correct = np.bincount(index), np.bincount(index, labels["correct"])
    examples = {
        "example": example,
        "exact_match": n_correct == n_labels,
        "labels": n_labels,
        "correct": n_correct,
        "loss": np.bincount(index, labels["loss"]),
    }
    for name, values in labels.items():
        if name not in LABELS and (values == values[first][index]).all():
            examples[name] = values[first]
    return examples


def same_examples(paths, labels):
    """Whether two results have the same examples, slices and data."""
    a, b = labels
    if a.keys() != b.keys():
        return False
    for name in a:
        if name not in ("correct", "loss") and not np.array_equal(a[name], b[name]):
            return False
    return data_of(paths[0]) == data_of(paths[1])


def data_of(path):
    """The settings and checksums that decide which examples a run has; None without config.json."""
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    path = os.path.join(folder, "config.json")
    if not os.path.exists(path):
        return None
    saved = read_record(path, {"data": "dict", "data_sha256": "dict"})
    data = dict(saved["data"])
    for name in ("curriculum", "train_sizes", "infinite_data", "n_train_examples"):
        data.pop(name, None)  # decides the training examples only
    return data, saved["data_sha256"]


def result_path(args, split):
    """Where the result is written, without extension: beside the last run's results."""
    last = args[-1]
    name = f"eval_stats{suffix_of_file(last, split)}"
    if len(args) == 2:
        other = os.path.basename(os.path.splitext(os.path.normpath(args[0]))[0])
        name += f"_against_{other}"
        folders = [os.path.dirname(os.path.realpath(arg)) for arg in args]
        # Another directory may have a run of the same name.
        if folders[0] != folders[1]:
            name += f"-{hashlib.sha256(folders[0].encode()).hexdigest()[:8]}"
    folder = last if os.path.isdir(last) else os.path.dirname(last)
    return os.path.join(folder, name)


def suffix_of_file(path, split):
    """What the result read from path adds to the name of its statistics.

    eval_test.json -> "", eval_test_n_examples-10.json -> "_n_examples-10", eval_val.json -> "_val"
    """
    if os.path.isdir(path):
        stem = f"eval_{split}"
    else:
        stem = os.path.basename(os.path.splitext(path)[0])
    stem = stem.removeprefix("eval_")
    if stem == "test":
        return ""
    if stem.startswith("test_"):
        return stem.removeprefix("test")
    return f"_{stem}"


# ---- tables --------------------------------------------------------------------------------------


def slices_of(examples, slices):
    """Yield ("all", mask), then ("slice=value", mask (R,) bool) for slices with 2 to 24 values."""
    yield "all", np.ones(len(examples["example"]), bool)
    for name in slices:
        values = np.unique(examples[name])
        if 1 < len(values) <= 24:
            for value in values:
                yield f"{name}={value}", examples[name] == value


def exact_match(examples, mask):
    return proportion(int(examples["exact_match"][mask].sum()), int(mask.sum()))


def one_run(examples, slices):
    """Intervals of every slice, and Spearman's correlation of numeric slices with the loss."""
    by_slice, lines = {}, []
    for name, mask in slices_of(examples, slices):
        n_labels, loss = examples["labels"][mask], examples["loss"][mask]
        accuracy = label_accuracy(cluster_sums(n_labels, examples["correct"][mask]))
        exact = exact_match(examples, mask)
        nll = label_mean_ci(loss, n_labels)
        by_slice[name] = {**accuracy, "exact": exact, "nll": nll}
        lines.append((name, *format_ci(accuracy), *format_ci(exact), *format_ci(nll)[1:]))
    correlations = {}
    for name in slices:
        values = examples[name]
        if np.issubdtype(values.dtype, np.number) and len(np.unique(values)) > 1:
            correlations[name] = correlation(values, examples["loss"] / examples["labels"])
    correlation_rows = correlation_lines(correlations)
    if correlations:
        say(describe_correlations(correlations))
    head = ("slice", "labels", "accuracy", "95% interval", "examples", "exact", "95% interval")
    print_table((*head, "nats per label", "95% interval"), lines)
    if correlations:
        head = ("Spearman's correlation with the loss", "examples", "value", "95% interval")
        print_table((*head, "p (permutations)", "Holm"), correlation_rows)
    metrics = {"all": by_slice.pop("all"), "correlation with loss": correlations}
    return {"metrics": metrics, "by_slice": by_slice}


def describe_correlations(correlations):
    """The slice that the loss depends on most, as a sentence."""
    name = max(correlations, key=lambda name: abs(correlations[name]["value"]))
    cell = correlations[name]
    how = "falls" if cell["value"] < 0 else "rises"
    test = f"Spearman's correlation {cell['value']:.2f}, p {cell['p_holm']:.2g}"
    if cell["p_holm"] >= 0.05:
        return f"no dependence of the loss on a slice is seen; the strongest is {name} ({test})"
    return f"the loss {how} with {name} more than with any other slice ({test})"


def two_runs(a, b, slices):
    """For every slice McNemar's test of exact match, and bootstrapped differences B - A."""
    by_slice = {}
    for name, mask in slices_of(a, slices):
        n_labels = a["labels"][mask]
        accuracy_change = (b["correct"][mask] - a["correct"][mask]) / n_labels
        nll_change = (b["loss"][mask] - a["loss"][mask]) / n_labels
        by_slice[name] = {
            "exact": [exact_match(a, mask), exact_match(b, mask)],
            "mcnemar": mcnemar(a["exact_match"][mask], b["exact_match"][mask]),
            "accuracy difference": paired_bootstrap(accuracy_change, n_labels),
            "nll difference": paired_bootstrap(nll_change, n_labels),
        }
    # The test over all examples is not one of several.
    add_holm([cell["mcnemar"] for name, cell in by_slice.items() if name != "all"])
    say(describe_difference(by_slice["all"]))

    lines = []
    for name, cell in by_slice.items():
        exact_a, exact_b = cell["exact"]
        test, change = cell["mcnemar"], cell["accuracy difference"]
        low, high = change["ci95"]
        line = [name, change["n"], f"{exact_a['value']:.4f}", f"{exact_b['value']:.4f}"]
        line += [test["only_a"], test["only_b"], f"{test['p']:.4g}"]
        line += [f"{test['p_holm']:.4g}" if "p_holm" in test else ""]
        line += [f"{change['value']:+.4f}", f"{low:+.4f} - {high:+.4f}"]
        lines.append(line)
    head = ("slice", "examples", "exact A", "exact B", "only A", "only B", "McNemar p", "Holm")
    print_table((*head, "labels B - A", "95% interval"), lines)
    return {"metrics": {"all": by_slice.pop("all")}, "by_slice": by_slice}


def describe_difference(cell):
    """Which of two runs is correct more often on all examples, as a sentence."""
    test, (a, b) = cell["mcnemar"], cell["exact"]
    values = f"exact match {a['value']:.4f} and {b['value']:.4f}, McNemar p {test['p']:.2g}"
    if test["p"] >= 0.05:
        change = cell["accuracy difference"]
        text = f"no difference in exact match is seen ({values}); accuracy of B less that of A: "
        return f"{text}{change['value']:.4f} ({change['ci95'][0]:.4f} - {change['ci95'][1]:.4f})"
    better = "A" if a["value"] > b["value"] else "B"
    return f"{better} is correct more often ({values})"


def plot_stats(path, result, runs):
    """Accuracy of every slice with its interval; of two runs, the difference."""
    labels, cells = [], []
    for name, cell in {"all": result["metrics"]["all"], **result["by_slice"]}.items():
        cell = cell.get("accuracy difference", cell)
        labels.append(f"{name}, n = {cell['n']}")
        cells.append(cell)
    plt, fig, (axis,) = figure(1, 1, width=6)
    fig.set_size_inches(6, 1.2 + 0.22 * len(cells))
    heights = np.arange(len(cells))[::-1]
    errorbars(axis, heights, cells, horizontal=True, ls="none")
    axis.set_yticks(heights, labels)
    names = [os.path.basename(os.path.normpath(run)) for run in runs]
    xlabel = "accuracy of labels"
    if len(runs) == 2:
        xlabel += f", {names[1]} less {names[0]}"
        axis.axvline(0, color="gray", lw=1)
    axis.set_xlabel(f"{xlabel} (95% interval)")
    finish_figure(fig, plt, path, " against ".join(names))
