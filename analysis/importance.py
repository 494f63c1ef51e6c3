"""Which slots matter, and for which examples? Reads what `ablate.py keys` measured.

    python ablate.py keys runs/RUN
    python ablate.py impact runs/RUN

Nothing here runs the model. A drop is always that in the logit difference of the answer.

Letters: N measurements, E examples, S slots.
"""

import math
from functools import partial

import numpy as np

from analysis.ablation import KEY_ABLATIONS
from analysis.memory_usage import require_slots
from analysis.slot_results import DROP, first_ablation, load_table, mean_drops, slot_table
from analysis.trained_run import save_result, select
from nanorecall.metrics import print_table
from nanorecall.plots import errorbars, figure, finish_figure
from nanorecall.settings import say
from nanorecall.stats import clustered_mean_ci, clustered_proportion, format_ci, mean_ci

# ---- impact --------------------------------------------------------------------------------------

NEGLIGIBLE = 0.01  # logits


def impact(run):
    """How much does the ablation of a slot cost, and how much more that of the best slots?"""
    require_slots(run)
    table = load_table(run, "keys")
    columns, ablation = first_ablation(table)
    slots = slot_table(columns)
    by_layer, by_read = {}, {}
    for layer in np.unique(slots["layer"]):
        of_layer = select(columns, columns["layer"] == layer)
        by_layer[str(layer)] = layer_impact(of_layer)
        is_here = of_layer["reads_at_label"] > 0
        if is_here.any() and not is_here.all():
            by_read[f"{layer}, at the label"] = layer_impact(select(of_layer, is_here))
            by_read[f"{layer}, earlier only"] = layer_impact(select(of_layer, ~is_here))
    for layer, cell in by_layer.items():
        run.finding(describe_impact(layer, cell, ablation))
    print_impact(by_layer | by_read)
    is_of_ablation = table["ablation"] == ablation
    is_counted = is_of_ablation & (table["reads_in_reach"] > 0)
    left_out = 1 - is_counted.sum() / (is_of_ablation & ~table["control"]).sum()
    say(f"left out: labels that a read of the slot cannot reach, {left_out:.1%} of all measured")
    # A check of the method: the ablation of a slot that is not read must change nothing. Ablations
    # of its key are no check, because with another score the slot may be read.
    control = np.abs(table["drop"][is_of_ablation & table["control"]])
    largest = float(control.max()) if len(control) else None
    if largest is not None and ablation not in KEY_ABLATIONS:
        say(f"largest change by a slot that is not read: {largest:.1e} logits")
    by_slice = {"layer": by_layer, "layer, where it is read": by_read}
    by_frequency = rare_and_frequent(columns)
    if by_frequency:
        print_frequency(by_frequency)
        by_slice["rare, frequent"] = by_frequency
    metrics = {
        "ablation": ablation,
        "left out": float(left_out),
        "largest change by an unread slot": largest,
    }
    plot = partial(plot_impact, columns, slots, run.name, ablation)
    save_result(run, "impact", metrics, by_slice, (), slots, plot)


def layer_impact(columns):
    """Drops in one layer: measurements {column: (N,)} that count."""
    drop, example = columns["drop"], columns["example"]
    mean_of_slot = slot_table(columns)["mean"]
    top, every = top_and_all(columns)
    ratio = float(top.mean() / max(1e-9, every.mean())) if len(top) else math.nan
    return {
        "labels": len(drop),
        "drop": mean_ci(mean_of_slot),
        "drop where it is read": clustered_mean_ci(drop, example),
        "median": float(np.median(drop)),
        "largest": float(drop.max()),
        "std": float(drop.std()),
        "negligible": clustered_proportion(np.abs(drop) < NEGLIGIBLE, example),
        "flips": clustered_proportion(columns["flip"], example),
        # None if no slot of the best 5% is read in both halves of the examples.
        "best 5% of slots": mean_ci(top) if len(top) else None,
        "ratio to a random slot": ratio,
    }


def top_and_all(columns):
    """Mean drops of the best 5% of slots, and of all slots: two arrays.

    The best are chosen on one half of the examples and measured on the other, and vice versa. On
    the same examples, the best would be too good: some are the best by chance.
    """
    examples = np.unique(columns["example"])
    if len(examples) < 2:
        return np.empty(0), np.empty(0)
    in_half = np.isin(columns["example"], examples[::2])
    top, every = [], []
    for mask in (in_half, ~in_half):
        chosen_on = slot_table(select(columns, mask))
        measured_on = slot_table(select(columns, ~mask))
        n_best = max(1, len(chosen_on["mean"]) // 20)
        best = chosen_on["slot"][np.argsort(-chosen_on["mean"])[:n_best]]
        top.append(measured_on["mean"][np.isin(measured_on["slot"], best)])
        every.append(measured_on["mean"])
    return np.concatenate(top), np.concatenate(every)


def describe_impact(layer, cell, ablation):
    """One sentence on the result of `layer_impact`."""
    text = f"layer {layer}: without a slot ({ablation}), a label that its reads can reach loses"
    text += f" {cell['drop where it is read']['value']:.3f} logits on average;"
    text += f" {cell['flips']['value']:.2%} of these answers are lost"
    if not math.isnan(cell["ratio to a random slot"]):
        text += f"; the best 5% of slots cost {cell['ratio to a random slot']:.1f} times"
        text += " as much as a random one"
    return text


def print_impact(cells):
    lines = []
    for name, cell in cells.items():
        line = [name, cell["labels"], *format_ci(cell["drop where it is read"])[1:]]
        line += [f"{cell['median']:.4f}", f"{cell['largest']:.2f}"]
        line += [f"{cell['negligible']['value']:.1%}", f"{cell['flips']['value']:.3%}"]
        line += format_ci(cell["drop"])[:2]
        lines.append((*line, f"{cell['ratio to a random slot']:.1f}"))
    head = ("layer", "slot and label", "mean drop", "95% interval", "median", "largest")
    head += (f"below {NEGLIGIBLE}", "flips", "slots", "mean over slots")
    print_table((*head, "best 5% / mean"), lines)


def rare_and_frequent(columns):
    """How facts with few and with many exposures depend on slots, as means over examples.

    -> {measure: {"rare", "frequent"}}; {} where exposures do not differ.
    """
    if "exposures" not in columns:
        return {}
    examples, first, which = np.unique(columns["example"], return_index=True, return_inverse=True)
    exposures = columns["exposures"][first]
    is_frequent = exposures > np.median(exposures)
    if is_frequent.all() or not is_frequent.any():
        return {}
    drop, counts = columns["drop"], np.bincount(which)
    largest = np.full(len(examples), -np.inf)
    np.maximum.at(largest, which, drop)
    # Effective number: (sum of x)^2 / sum of x^2. It is n if n slots share the drop evenly.
    positive = np.maximum(0, drop)
    squares = np.bincount(which, positive**2)
    effective = np.bincount(which, positive) ** 2 / np.maximum(1e-12, squares)
    measures = {
        "mean drop": np.bincount(which, drop) / counts,
        "largest drop": largest,
        "slots that carry the drop (effective number)": effective,
        "fraction of ablations that flip an answer": np.bincount(which, columns["flip"]) / counts,
    }
    by_frequency = {}
    for name, x in measures.items():
        by_frequency[name] = {"rare": mean_ci(x[~is_frequent]), "frequent": mean_ci(x[is_frequent])}
    return by_frequency


def print_frequency(by_frequency):
    """Print what `rare_and_frequent` returned."""
    print("rare facts (at most the median of exposures) against frequent ones:")
    lines = []
    for name, cell in by_frequency.items():
        lines.append((name, *format_ci(cell["rare"])[1:], *format_ci(cell["frequent"])[1:]))
    print_table(("measure", "rare", "95% interval", "frequent", "95% interval"), lines)


def plot_keys(columns, title, path):
    """Drops of all measurements in falling order, by layer and ablation; and the flips."""
    ablations = dict.fromkeys(columns["ablation"].tolist())
    layers = np.unique(columns["layer"])
    plt, fig, axes = figure(1, len(layers) + 1)
    flips = []
    for ablation in ablations:
        is_read = (columns["ablation"] == ablation) & (columns["reads_in_reach"] > 0)
        flips.append(clustered_proportion(columns["flip"][is_read], columns["example"][is_read]))
        for axis, layer in zip(axes, layers):
            drop = np.sort(columns["drop"][is_read & (columns["layer"] == layer)])[::-1]
            axis.plot(np.arange(1, len(drop) + 1) / len(drop), drop, lw=1, label=ablation)
            axis.set_title(f"layer {layer}, n = {len(drop)} for each ablation")
    for axis in axes[:-1]:
        axis.set_xlabel("fraction of (example, slot, label), largest drop first")
        axis.set_ylabel(DROP)
        axis.set_xscale("log")
        axis.set_xlim(None, 1)
        axis.legend()
    height = range(len(flips))[::-1]
    errorbars(axes[-1], height, flips, horizontal=True, ls="none")
    axes[-1].set_yticks(height, list(ablations))
    axes[-1].set(xlabel="fraction of answers lost where the slot is read (95%)", xlim=(0, None))
    finish_figure(fig, plt, path, title)


def plot_impact(columns, slots, title, ablation, path, most=60):
    """Mean drops of all slots, sorted; and a matrix of examples by the slots that matter most."""
    layers = np.unique(slots["layer"])
    plt, fig, axes = figure(1, 1 + len(layers), width=5.2, grid=False)
    sorted_axis = axes[0]
    examples = np.unique(columns["example"])
    for axis, layer in zip(axes[1:], layers):
        of_layer = select(slots, slots["layer"] == layer)
        mean = of_layer["mean"]
        sorted_axis.plot(np.sort(mean)[::-1], lw=1, label=f"layer {layer}: {len(mean)} slots")
        sorted_axis.axhline(mean.mean(), ls="--", lw=1, color="gray")
        # The sum over examples, because a slot of a single example would be a column with one dot.
        total = mean * of_layer["n_examples"]
        best = of_layer["slot"][np.argsort(-total)][:most]
        measured = select(columns, columns["layer"] == layer)
        grid = mean_drops(measured, examples[:most], "slot", best)
        highest = np.nanquantile(grid, 0.99)
        image = axis.imshow(grid, aspect="auto", cmap="magma_r", vmin=0, vmax=highest)
        axis.set(xlabel=f"the {len(best)} slots with the largest effect", ylabel="example")
        axis.set_title(f"layer {layer}; white: not read where it counts")
        fig.colorbar(image, ax=axis, label=f"mean {DROP}")
    sorted_axis.set(xlabel="slots, most important first", ylabel=f"mean {DROP}, {ablation}")
    sorted_axis.legend(title="dashed: a random slot of a layer", title_fontsize=7)
    sorted_axis.grid(True)
    finish_figure(fig, plt, path, f"{title}: {len(examples)} examples")
