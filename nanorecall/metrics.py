"""Accuracy and loss of a model over a split, and the curves of a run, for train.py to watch itself and for eval.py."""

import contextlib
import functools
import math
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from nanorecall.checkpoint import atomic_write, read_log
from nanorecall.distributed import SINGLE_PROCESS
from nanorecall.rng import IGNORE_INDEX
from nanorecall.settings import printable, require, say


def autocast(device, dtype):
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()


@torch.no_grad()
def iter_predictions(model, data, split, batch_size, device, dtype=torch.float32, bar=False, stop=(), world=SINGLE_PROCESS):
    """Yield, batch by batch over a whole split, a dict of

    hit (N,) bool, loss (N,) nats, tags {name: (N,)}, row (N,) the row of each label, and
    row_hit (R,) bool of the rows that have labels; where nothing is asked, all models are right.

    Ranks take turns: each yields its own batches, None where there is none left for it, and ends early, together with
    the others, once `stop` (a list that a signal fills) of any is not empty.
    """
    correct = getattr(model, "correct_predictions", correct_predictions)
    batches = [s[i : i + batch_size] for s in data.eval_groups(split) for i in range(0, len(s), batch_size)]
    hidden = not (bar and world.is_main and sys.stderr.isatty())
    for turn in tqdm(range(0, len(batches), world.size), desc=split, disable=hidden, leave=False):
        if world.all_gather(len(stop)).any():
            return
        # FSDP gathers weights in every forward pass, so a rank without a batch runs one along
        rows = batches[min(turn + world.rank, len(batches) - 1)]
        tokens, targets, tags, *more = data.batch(split, 0, rows)
        with autocast(device, dtype):
            logits, _ = model(tokens.to(device), targets.to(device), *(x.to(device) for x in more))
        if turn + world.rank >= len(batches):
            yield None
            continue
        mask = targets != IGNORE_INDEX
        hit, row_hit = correct(logits.cpu(), targets)
        loss = F.cross_entropy(logits.float().cpu(), targets[mask], reduction="none")
        row = np.repeat(np.asarray(rows), mask.sum(1).numpy())
        asked = row_hit[mask.any(1)].numpy()
        yield {"hit": hit.numpy(), "loss": loss.numpy(), "tags": tags, "row": row, "row_hit": asked}


def correct_predictions(logits, targets):
    """Which predictions at labels are correct: logits (N, vocabulary), targets (B, T) -> (N,), (B,) bool.

    The second is exact match: are all labels of a sequence correct? True for one without labels. A
    model with another rule has a method of this name.
    """
    is_label = targets != IGNORE_INDEX
    correct = torch.ones_like(is_label)
    correct[is_label] = logits.argmax(-1) == targets[is_label]
    return correct[is_label], correct.all(1)


@contextlib.contextmanager
def evaluating(model):
    """Eval mode for a while. Then every module has its own mode again, also after an error."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def in_eval_mode(work):
    """A decorator for work(model, ...): it runs in `evaluating`, without gradients."""

    @functools.wraps(work)
    def quiet(model, *args, **kwargs):
        with evaluating(model), torch.no_grad():
            return work(model, *args, **kwargs)

    return quiet


@in_eval_mode
def evaluate(model, data, split, batch_size, device, dtype=torch.float32, stop=(), world=SINGLE_PROCESS):
    """Token accuracy, row accuracy (exact match), mean loss, and by_slice {tag: {value: counts}} over all labels.

    Shared out over the ranks, and the same on each. None if `stop` cut it short.
    """
    mine = [b and count_batch(b) for b in iter_predictions(model, data, split, batch_size, device, dtype, True, stop, world)]
    if world.all_gather(len(stop)).any():
        return None
    turns = zip(*world.all_gather_object(mine))
    return merge_counts([counts for turn in turns for counts in turn if counts])  # in the order that one process would take


def merge_batches(batches):
    """What predict yielded -> accuracies, mean loss, their counts, and by_slice {tag: {value: counts}}."""
    return merge_counts([count_batch(b) for b in batches])


def count_batch(batch):
    """What predict yielded for one batch, in numbers that add up: of all labels, and by slice."""
    hit, loss, row = batch["hit"], batch["loss"], batch["row"]

    def counts(mine):
        return {**row_counts(hit[mine], row[mine]), "loss": float(loss[mine].sum(dtype=np.float64))}

    by_slice = {tag: {v.item(): counts(values == v) for v in np.unique(values)} for tag, values in batch["tags"].items()}
    whole = {"row_right": int(batch["row_hit"].sum()), "rows": len(batch["row_hit"])}
    return {**counts(np.ones(len(hit), bool)), **whole, "by_slice": by_slice}


def row_counts(hit, row):
    """sums_of_rows of hits (N,) bool in rows (N,)."""
    _, which = np.unique(row, return_inverse=True)
    return cluster_sums(np.bincount(which), np.bincount(which, hit).astype(int))


def cluster_sums(n, right):
    """Labels and right labels of each row (R,) -> what adds up over rows: labels, right ones, rows, right ones (all of whose
    labels are), and the sums of squares by which `effective` sees how alike the labels of a row are."""
    sums = {"right": right, "labels": n, "row_right": right == n, "rows": np.ones_like(n)}
    squares = {"right_right": right * right, "right_labels": right * n, "labels_labels": n * n}
    return {name: int(x.sum()) for name, x in {**sums, **squares}.items()}


def merge_counts(counts):
    """The counts of all batches -> what `evaluate` returns. A row is right in a slice if its labels there are."""
    names = [name for name in counts[0] if name != "by_slice"]  # in order: a set has another one in every process
    sums = {k: sum(c[k] for c in counts) for k in names}
    by_slice = {}
    for c in counts:
        for tag, cells in c["by_slice"].items():
            for value, cell in cells.items():
                before = by_slice.setdefault(tag, {}).get(value, dict.fromkeys(names, 0))
                by_slice[tag][value] = {k: before[k] + cell[k] for k in names}
    return {
        "accuracy": sums["right"] / sums["labels"],
        "row_accuracy": sums["row_right"] / sums["rows"],
        "loss": sums["loss"] / sums["labels"],
        "labels": sums["labels"],
        "rows": sums["rows"],
        "all": sums,
        "by_slice": {tag: dict(sorted(cells.items())) for tag, cells in by_slice.items()},
    }


# ---- shares and tables -------------------------------------------------------------------------------------------------


def wilson_interval(right, n, z=1.959964):
    """95% interval of a share right / n of independent measurements (Wilson 1927); it stays in [0, 1], works at 0 and n."""
    if n == 0:
        return 0.0, 1.0
    p, q = right / n, z * z / n
    middle, half = (p + q / 2) / (1 + q), z * math.sqrt(p * (1 - p) / n + q / (4 * n)) / (1 + q)
    return max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half))  # rounding may leave p out


def proportion(right, n):
    """{"value", "ci95", "n"} of a share."""
    return {"value": right / n, "ci95": wilson_interval(right, n), "n": n}


def effective_sample_size(cell):
    """How many independent measurements would vary as the rows of a cell (see sums_of_rows) do: labels over the design effect,
    which is at least 1 (Kish 1965), but no more than `most_effective`; where all labels are right
    or wrong, the number of rows."""
    n, G, p = cell["labels"], cell["rows"], cell["right"] / cell["labels"]
    if not 0 < p < 1 or G < 2:
        return G
    spread = cell["right_right"] - 2 * p * cell["right_labels"] + p * p * cell["labels_labels"]  # sum of (right - p n)^2
    return min(n / max(1.0, spread * G / (G - 1) / (n * p * (1 - p))), most_effective(p, G))


def most_effective(p, n, z=1.959964):
    """The number of measurements with which Wilson's interval of a share p is as long as that of n
    out of n.

    A few errors say little about how alike the measurements of a row are; without this bound, one
    single error would make the interval many times shorter than none does. Lengths: 2 z sqrt(p (1 -
    p) / N + z^2 / 4 N^2) / (1
    + z^2 / N) and z^2 / (n + z^2).

    >>> round(most_effective(1.0, 100), 6), round(most_effective(0.999, 100), 1)
    (100.0, 105.5)
    """
    zz, whole = z * z, (n + z * z) ** 2
    b = zz - 2 * p * (1 - p) * whole / zz
    return math.sqrt(b * b + whole - zz * zz) - b


def label_share(cell):
    """A share of labels that come in rows, several of each (sums_of_rows): Wilson's interval for `effective` labels."""
    p, n = cell["right"] / cell["labels"], effective_sample_size(cell)
    return {"value": p, "ci95": wilson_interval(p * n, n), "n": cell["labels"]}


def clustered_proportion(hit, row):
    """label_share of hits (N,) bool in rows (N,)."""
    return label_share(row_counts(np.asarray(hit, bool), row))


def mean_ci(x):
    """{"value", "ci95", "n"} of a mean of measurements (n,): 1.96 standard errors either way, which count as independent."""
    x = np.asarray(x, float)
    half = 1.959964 * x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.inf
    return {"value": float(x.mean()), "ci95": [float(x.mean() - half), float(x.mean() + half)], "n": len(x)}


def mean_share(x):
    """{"value", "ci95", "n"} of a mean of independent measurements (n,) that lie between 0 and 1:
    Wilson's interval, which stays there, too, for as many shares of 0 or 1 as would vary like
    these."""
    x = np.clip(np.asarray(x, float), 0, 1)  # rounding may leave it
    p, n, variance = x.mean(), len(x), x.var(ddof=1) if len(x) > 1 else 0.0
    n_like = n * p * (1 - p) / variance if variance > 0 else math.inf
    n_like = min(n_like, most_effective(p, n))
    return {"value": float(p), "ci95": list(wilson_interval(p * n_like, n_like)), "n": n}


def mean_share_over_rows(x, row):
    """`mean_share` over rows: measurements (N,) of rows (N,), several of each, are averaged within
    each row first."""
    return mean_share(row_means(x, row))


def row_means(x, row):
    """Means (R,) of the measurements (N,) of each row."""
    _, which = np.unique(row, return_inverse=True)
    return np.bincount(which, x) / np.bincount(which)


def clustered_mean_ci(x, row):
    """`mean` over rows: measurements (N,) of rows (N,), several of each, are averaged within each row first."""
    return mean_ci(row_means(x, row))


def slice_metrics(cell):
    """Counts of labels -> share of right labels, and under "exact" that of right rows; "nll" in nats per label."""
    exact, nll = proportion(cell["row_right"], cell["rows"]), cell["loss"] / cell["labels"]
    return {**label_share(cell), "exact": exact, "nll": nll}


def print_table(head, rows):
    """Columns under each other: first one left, others right."""
    cells = [[printable(x) for x in row] for row in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        print("  ".join(x.ljust(w) if i == 0 else x.rjust(w) for i, (x, w) in enumerate(zip(row, widths))))


def format_ci(cell):
    """A share -> its n, value and interval as text."""
    low, high = cell["ci95"]
    return cell["n"], f"{cell['value']:.4f}", f"{low:.4f} - {high:.4f}"


def print_slices(result, most=24):
    """Print what `evaluate` returned: accuracy of labels and of whole rows with intervals, and loss, in all and by slice. A tag
    with more than `most` values is left to eval.py's files."""
    rows = [("all", "", result["all"])]
    for tag, cells in result["by_slice"].items():
        rows += [(tag, value, cell) for value, cell in cells.items()] if len(cells) <= most else []
    head = ("slice", "value", "labels", "accuracy", "95% interval", "rows", "exact", "95% interval", "nats per label")
    cells = [(tag, value, slice_metrics(cell)) for tag, value, cell in rows]
    print_table(head, [(tag, value, *format_ci(s), *format_ci(s["exact"]), f"{s['nll']:.4f}") for tag, value, s in cells])


def print_baselines(chance):
    """The accuracy of guesses without knowledge: {name: value}"""
    for name, value in chance.items():
        say(f"without knowledge: {name}: {value:.4f}")


def slice_accuracy(result, name):
    """Token accuracy of all of what `evaluate` returned, or of the slice "tag=value"."""
    if not name:
        return result["accuracy"]
    tag, _, value = name.partition("=")
    cell = next(cell for v, cell in result["by_slice"][tag].items() if str(v) == value)
    return cell["right"] / cell["labels"]


def check_slice(data, name, batch_size):
    """ConfigError unless the slice "tag=value" is among those of validation and of test."""
    for split in ("val", "test"):
        there = {}
        for segment in data.eval_groups(split):
            for first in range(0, len(segment), batch_size):
                for tag, values in data.batch(split, 0, segment[first : first + batch_size])[2].items():
                    there.setdefault(tag, set()).update(map(str, np.unique(values)))
        tag, _, value = name.partition("=")
        slices = " ".join(f"{t}={v}" for t, values in there.items() for v in sorted(values)[:12])
        require(
            value in there.get(tag, ()), f"target_slice={name} is not among the slices of {split}: {slices}", "target_slice"
        )


# ---- figures -----------------------------------------------------------------------------------------------------------


def figure(*shape, width=4.2):
    """A figure without a window -> (pyplot, figure, list of axes)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(*shape, figsize=(width * shape[1], 3.2 * shape[0]), squeeze=False, constrained_layout=True)
    return plt, fig, list(axes.flat)


def plot_curves(folder, title):
    """curves.png: loss and validation accuracy against steps, from log.jsonl."""
    rows = read_log(folder)
    measured = [r for r in rows if r["kind"] == "eval"]
    trained = [r for r in rows if r["kind"] == "train" and r["loss"] is not None]
    plt, fig, (left, right) = figure(1, 2, width=4.5)
    left.plot([r["step"] for r in trained], [r["loss"] for r in trained], lw=1, label="train batch")
    for axis, key, label in (
        (left, "loss", "val"),
        (right, "accuracy", "labels (token accuracy)"),
        (right, "row_accuracy", "whole rows (exact match)"),
    ):
        axis.plot([r["step"] for r in measured], [r[key] for r in measured], "o-", ms=3, label=label)
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    # A log that lost its evaluations still has a loss to draw.
    size = "{labels} labels in {rows} rows".format(**measured[-1]) if measured else "0"
    left.set(xlabel="step", ylabel="loss (nats per label)", yscale="log")
    right.set(
        xlabel="step",
        ylabel="val accuracy",
        ylim=(-0.02, 1.02),
        xlim=left.get_xlim(),
        title=f"n = {size}",
    )
    right.title.set_fontsize(8)
    finish_figure(fig, plt, os.path.join(folder, "curves.png"), title)


def errorbars(axis, x, cells, **kwargs):
    """Points with intervals: cells of {"value", "ci95"}; nothing, if there are none."""
    if not len(cells):
        return
    y, (low, high) = np.array([c["value"] for c in cells]), np.array([c["ci95"] for c in cells]).T
    axis.errorbar(x, y, yerr=np.maximum(0, [y - low, high - y]), marker="o", ms=4, capsize=3, **kwargs)
    axis.grid(alpha=0.3)


def finish_figure(fig, plt, path, title):
    """Write a figure with its title and forget it."""
    fig.suptitle(printable(title, keep="\n").replace("$", r"\$"), fontsize=8)  # $ begins a formula
    write_figure(fig, plt, path)


def write_figure(fig, plt, path):
    """A figure as path, a .png: complete or, if that fails, as it was before."""
    try:
        atomic_write(path, lambda f: fig.savefig(f, format="png", dpi=120))
    finally:
        plt.close(fig)
