"""Figures without a window: axes, points with intervals, titles, and the curves of a run."""

import os

import numpy as np

from nanorecall.files import atomic_write
from nanorecall.metrics import slice_accuracy
from nanorecall.records import read_log
from nanorecall.settings import printable

STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "figure.titlesize": 8,
    "figure.labelsize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "grid.alpha": 0.3,
}


def figure(n_rows, n_columns, width=4.2, grid=True):
    """A figure of n_rows x n_columns panels, each `width` inches wide -> (pyplot, figure, axes).

    grid: draw grid lines; False for heat maps, which they would cover.
    """
    # Importing matplotlib takes as long as importing torch, and few commands draw.
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({**STYLE, "axes.grid": grid})
    size = (width * n_columns, 3.2 * n_rows)
    fig, axes = plt.subplots(
        n_rows, n_columns, figsize=size, squeeze=False, constrained_layout=True
    )
    return plt, fig, list(axes.flat)


def errorbars(axis, x, cells, horizontal=False, **kwargs):
    """Points with intervals. cells: [{"value", "ci95"}] or []; horizontal: x is the height."""
    if not len(cells):
        return
    y = np.array([cell["value"] for cell in cells])
    low, high = np.array([cell["ci95"] for cell in cells]).T
    # Rounding may put the value just outside its interval.
    lengths = np.maximum(0, [y - low, high - y])
    kwargs = {"marker": "o", "ms": 4, "capsize": 3, **kwargs}
    if horizontal:
        axis.errorbar(y, x, xerr=lengths, **kwargs)
    else:
        axis.errorbar(x, y, yerr=lengths, **kwargs)
    axis.grid(True)


# A value with fewer of the measurements does not decide how far an axis reaches.
SMALL_SHARE = 0.01
MAX_VALUES = 24  # a slice with more values is not drawn


def drawn_slices(by_slice):
    """{slice: {value: cell}} -> those that have something to compare, and room for it."""
    return {name: cells for name, cells in by_slice.items() if 1 < len(cells) <= MAX_VALUES}


def large_cells(cells):
    """[{"n"}] -> those with at least SMALL_SHARE of all measurements."""
    n_all = sum(cell["n"] for cell in cells)
    return [cell for cell in cells if cell["n"] >= SMALL_SHARE * n_all]


def draw_slice(axis, name, cells):
    """One point with its interval for each value of a slice: cells {value: {"value", "ci95", "n"}}.

    Values are categories, so no line joins them. Those of less than SMALL_SHARE are gray.
    """
    large = large_cells(cells.values())
    for x, cell in enumerate(cells.values()):
        color = "C0" if cell in large else "darkgray"
        errorbars(axis, [x], [cell], ls="none", color=color)
    counts = sorted({cell["n"] for cell in cells.values()})
    if len(counts) == 1:
        labels, name = list(cells), f"{name} (n = {counts[0]} each)"
    else:
        labels = [f"{value}\nn={cell['n']}" for value, cell in cells.items()]
    longest = max(map(len, "\n".join(labels).split("\n")))
    is_crowded = longest * len(labels) > 50  # letters that fit into a panel
    if is_crowded:
        labels = [label.replace("\n", ", ") for label in labels]
    axis.set_xticks(range(len(labels)), labels, rotation=90 if is_crowded else 0)
    axis.set_xlim(-0.5, len(labels) - 0.5)
    axis.set_xlabel(name if len(large) == len(cells) else f"{name}; gray: n < 1%")


def finish_figure(fig, plt, path, title):
    """Add the title, write the figure to path and close it."""
    # A $ would begin a formula.
    fig.suptitle(printable(title, keep="\n").replace("$", r"\$"))
    write_figure(fig, plt, path)


def write_figure(fig, plt, path):
    """Write path, a .png, and close the figure. If that fails, an older file stays as it was."""
    try:
        atomic_write(path, lambda f: fig.savefig(f, format="png", dpi=120))
    finally:
        plt.close(fig)


def plot_curves(folder, title, target_slice="", stage_ends=()):
    """Write curves.png: loss and validation accuracy against steps, from the run's log.jsonl.

    target_slice: "slice=value" to draw, too. stage_ends: steps at which curriculum stages ended.
    """
    train, val = [], []
    for record in read_log(folder):
        if record["kind"] == "train" and record["loss"] is not None:
            train.append(record)
        elif record["kind"] == "eval":
            val.append(record)
    plt, fig, (losses, accuracies) = figure(1, 2, width=4.5)
    plot_records(losses, train, "loss", lw=1, label="train batch")
    plot_records(losses, val, "loss", marker="o", ms=3, label="val")
    plot_records(accuracies, val, "accuracy", marker="o", ms=3, label="labels (token accuracy)")
    plot_records(accuracies, val, "exact_match", marker="o", ms=3, label="examples (exact match)")
    if target_slice:
        for record in val:
            record["target"] = slice_accuracy(record, target_slice)
        plot_records(accuracies, val, "target", marker="s", ms=3, label=f"labels of {target_slice}")
    for axis in (losses, accuracies):
        for number, step in enumerate(stage_ends):
            label = "end of a curriculum stage" if number == 0 else None
            axis.axvline(step, color="gray", ls="--", lw=1, label=label)
        axis.legend()
    losses.set(xlabel="step", ylabel="loss (nats per label)", yscale="log")
    accuracies.set(xlabel="step", ylabel="val accuracy", ylim=(-0.02, 1.02))
    accuracies.set_xlim(losses.get_xlim())
    # A log that lost its evaluations still has a training loss to draw.
    n = "0"
    if val:
        n = f"{val[-1]['labels']} labels in {val[-1]['n_examples']} examples"
    accuracies.set_title(f"val: {n}")
    finish_figure(fig, plt, os.path.join(folder, "curves.png"), title)


def plot_records(axis, records, key, **style):
    """Draw one number of some rows of log.jsonl against the step."""
    steps = [record["step"] for record in records]
    axis.plot(steps, [record[key] for record in records], **style)
