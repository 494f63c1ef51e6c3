"""The figure of eval.py compare: curves, accuracy by slice and by size, of groups of runs.

A group is {label: runs that differ in their seed only}; a run is what compare.read_result returns.

Letters: n runs, P points.
"""

import itertools

import numpy as np

from nanorecall.plots import errorbars, figure, finish_figure
from nanorecall.stats import mean_interval

# ---- bands ---------------------------------------------------------------------------------------


def lowest_to_highest(values):
    """(n, P) -> (P,), (P,)"""
    return values.min(0), values.max(0)


BANDS = {  # values (n, P) of n seeds -> lower and upper end (P,)
    "range": lowest_to_highest,
    "interval": mean_interval,
}
BAND_NAMES = {"range": "lowest to highest", "interval": "95% interval of the mean (t)"}


def mean_and_range(axis, x, values, color=None, label=None, band="range", **style):
    """Draw the mean of values (n, P), with a band -> its colour."""
    style = {"marker": "o", "ms": 3, "lw": 1, **style}
    (line,) = axis.plot(x, values.mean(0), color=color, label=label, **style)
    low, high = BANDS[band](values)
    axis.fill_between(x, low, high, alpha=0.2, color=line.get_color(), lw=0)
    return line.get_color()


def mean_and_bar(axis, x, values, color, band):
    """Draw the mean accuracy (n, P) of P categories as points, with a bar for the band."""
    mean, (low, high) = values.mean(0), np.clip(BANDS[band](values), 0, 1)
    errors = [mean - low, high - mean]
    axis.errorbar(x, mean, yerr=errors, color=color, marker="o", ms=4, capsize=3, ls="none")


# ---- panels --------------------------------------------------------------------------------------


def plot_compare(path, groups, band="range"):
    """Loss and accuracy against steps; accuracy by slice and by size, if the runs have several."""
    runs = list(itertools.chain.from_iterable(groups.values()))
    slice_name, values = shared_slice(runs)
    states = {run["state"] for run in runs}
    size = "state" if len(states) > 1 and None not in states else "params"
    has_sizes = len({run[size] for run in runs}) > 1
    n_panels = 2 + bool(slice_name) + has_sizes
    n_columns = 2 if n_panels % 2 == 0 else 3
    plt, fig, (losses, accuracies, *others) = figure(n_panels // n_columns, n_columns)
    colors = {}
    for label, seeds in groups.items():
        colors[label] = plot_curves(losses, accuracies, label, seeds, band)
    if slice_name:
        plot_slice(others.pop(0), groups, colors, slice_name, values, band)
    if has_sizes:
        plot_sizes(others.pop(0), groups, colors, size)
    handles, labels = accuracies.get_legend_handles_labels()
    n_columns = 2 if len(groups) > 4 else 1
    fig.legend(handles, labels, loc="outside upper center", ncols=n_columns)
    note = f"mean over seeds; bands: {BAND_NAMES[band]}"
    fig.supxlabel(f"loss: train as a line, val as points; {note}")
    finish_figure(fig, plt, path, "")


def plot_curves(losses, accuracies, label, seeds, band):
    """Training loss as a line, loss and accuracy on the val split as points -> the colour."""
    steps, loss, accuracy = shared_curve(seeds, "curve")
    label = f"{label} (runs: {len(seeds)})"
    color = mean_and_range(accuracies, steps, accuracy, label=label, band=band)
    train_steps, train_loss = shared_curve(seeds, "train_curve")
    mean_and_range(losses, train_steps, train_loss, color, band=band, marker="")
    losses.plot(steps, loss.mean(0), "o", ms=4, color=color, mec="black", mew=0.5)
    for axis in (losses, accuracies):
        axis.set_xlabel("step")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
    losses.set(ylabel="loss (nats per label)", yscale="log")
    accuracies.set(ylabel="val token accuracy", ylim=(-0.02, 1.02))
    return color


def plot_slice(axis, groups, colors, slice_name, values, band):
    """Test accuracy by slice: a line over numbers, points over categories."""
    is_numeric = all(value.isdigit() for value in values)
    for number, (label, seeds) in enumerate(groups.items()):
        x, heights = shared_values(seeds, slice_name, values)
        if is_numeric:
            mean_and_range(axis, x, heights, colors[label], band=band)
        else:
            # Side by side, so that no group covers another.
            shift = 0.6 * ((number + 0.5) / len(groups) - 0.5)
            mean_and_bar(axis, np.array(x) + shift, heights, colors[label], band)
    axis.set(xlabel=slice_name, ylabel="test token accuracy", ylim=(-0.02, 1.02))
    slanted = dict(rotation=20, ha="right") if max(map(len, values)) > 6 else {}
    axis.set_xticks(range(len(values)), values, **slanted)


def plot_sizes(axis, groups, colors, size):
    """Test accuracy of each run against its state or its number of parameters."""
    sizes = set()
    for label, seeds in groups.items():
        x = [run[size] for run in seeds]
        errorbars(axis, x, [run["all"] for run in seeds], ls="none", color=colors[label])
        sizes.update(x)
    xlabel = "parameters without embedding and head"
    if size == "state":
        xlabel = "state at the longest test sequence (bytes, float32)"
    axis.set(xlabel=xlabel, ylabel="test token accuracy, 95% interval", ylim=(-0.02, 1.02))
    set_size_ticks(axis, sorted(sizes))


def shared_slice(runs):
    """The first slice that all runs have, or "", and its values in any of them, in order.

    Runs of different tasks share no slices.
    """
    for name in runs[0]["by_slice"]:
        if all(name in run["by_slice"] for run in runs):
            break
    else:
        return "", []
    values = {}
    for run in runs:
        values |= run["by_slice"][name]
    if all(value.isdigit() for value in values):
        return name, sorted(values, key=int)
    return name, list(values)


def shared_values(runs, slice_name, values):
    """Indices of the values that all runs have, and the accuracies (n, indices) there."""
    tables = [run["by_slice"].get(slice_name, {}) for run in runs]
    indices, heights = [], []
    for index, value in enumerate(values):
        if all(value in table for table in tables):
            indices.append(index)
            heights.append([table[value] for table in tables])
    return indices, np.array(heights).reshape(len(indices), len(runs)).T


def shared_curve(runs, name):
    """Steps at which all runs were measured, and each number of the curve (n, P) there.

    Some runs may have stopped early; a mean over the others alone would jump.
    """
    curves = []
    for run in runs:
        curves.append({step: numbers for step, *numbers in run[name]})
    in_all = set(curves[0]).intersection(*curves)
    steps = [step for step in curves[0] if step in in_all]
    n_numbers = 2 if name == "curve" else 1  # loss and accuracy, or the loss alone
    measured = np.zeros((n_numbers, len(runs), len(steps)))
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
