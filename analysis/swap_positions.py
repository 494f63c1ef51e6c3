"""Does what a memory layer reads depend on the position? Move reads from one position to another.

    python ablate.py swap-positions runs/RUN                    # the whole output of the layer
    python ablate.py swap-positions runs/RUN --exchange slots   # slots, with the base's own weights

In one layer, the base reads at position j what the source reads at position i. The source is
another example, or the base itself. If content does not depend on the position, the answer of the
source's position i comes at j as often for i != j as for i = j.

Letters: B examples, P pairs of examples, n labels of an example. A position counts tokens from 0.
"""

from functools import partial

import numpy as np
import torch

from analysis.hooks import (
    forward_from,
    index_reads,
    logit_diff,
    put_reads,
    run_with_cache,
    same_form,
    sample_correct_examples,
)
from analysis.interchange import control_answers, draw_pairs, inject, swap
from analysis.memory_usage import require_slots
from analysis.trained_run import combine_columns, concat, save_result, select
from nanorecall.distributed import SINGLE_PROCESS
from nanorecall.metrics import in_eval_mode, print_table
from nanorecall.plots import figure, finish_figure
from nanorecall.settings import require, say
from nanorecall.stats import cluster_means, clustered_mean_ci, crossed_proportion, format_ci

EXCHANGES = {  # what is moved: function of the reads of base and source at one position
    "output": inject,  # slots and weights; a gated layer applies the base's gate
    "slots": swap,
}
RELATIONS = ("another example", "the same example")
MOST_POSITIONS = 24


# ---- measure -------------------------------------------------------------------------------------


def swap_positions(run):
    """Move reads between all positions, and compare the own position with others."""
    require_slots(run)
    c = run.config
    examples = same_form(sample_correct_examples(run))
    message = "it needs answers of two tokens or more, to move reads from one to another"
    require(examples.label_pos.shape[1] > 1, message, None)
    base, source = draw_pairs(examples, c.n_pairs, c.exposure_pairs, c.seed)
    columns = position_effects(
        run.model, examples, base, source, c.exchange, c.ablate_batch_size, c.seed, run.world
    )
    summary = summarize_positions(columns)
    for layer, cells in summary.items():
        run.finding(describe(layer, cells, c.exchange))
    print_summary(summary)
    say("control answer: a token that neither example has there, as the source's answer by chance.")
    by_slice = {"layer": summary, "layer, source, i, j": matrix_cells(columns)}
    metrics = {"n_examples": len(examples), "n_pairs": len(base), "exchange": c.exchange}
    plot = partial(plot_positions, run, examples, columns, c.exchange)
    save_result(run, "swap_positions", metrics, by_slice, (), columns, plot)


@in_eval_mode
def position_effects(
    model, examples, base, source, exchange, batch_size=512, seed=0, world=SINGLE_PROCESS
):
    """Move reads from every position i to every position j -> {column: (N,)}.

    examples must have their labels at the same positions. base, source (P,). exchange: a name of
    EXCHANGES. Columns: layer, relation (of RELATIONS), example (the base), source_example, i, j;
    drop, that in logit difference, summed over the base's answers from j on; lost, how many of
    these are lost; and for labels i, j with different answers, is_pair, source_answer and
    control_answer: is the prediction at j the source's answer at i, or a third one?
    """
    answers = examples.answers.cpu().numpy()
    # Otherwise no move to the same position could be seen, with which the others are compared.
    differ = (answers[base] != answers[source]).any()
    require(differ, "all pairs of examples have the same answers; raise n_examples", None)
    clean = run_with_cache(model, examples)
    labels = examples.label_pos[0].tolist()
    last = labels[-1]
    positions = range(max(0, last + 1 - MOST_POSITIONS), last + 1)
    items = []
    for layer in model.memory_layers():
        # In the last block, no answer depends on other positions than its own.
        targets = labels if layer == len(model.layers) - 1 else positions
        for relation in RELATIONS:
            for i in positions:
                for j in targets:
                    # From an example to itself, a move to the same position changes nothing.
                    if relation == RELATIONS[0] or i != j:
                        items.append((layer, relation, i, j))
    measure = partial(
        measure_move, model, examples, clean, base, source, EXCHANGES[exchange], batch_size, seed
    )
    return concat(world.shared_map(measure, items))


def measure_move(model, examples, clean, base, source, exchange, batch_size, seed, item):
    """One cell (layer, relation, i, j) of the matrix, for all pairs -> columns (P,)."""
    layer, relation, i, j = item
    if relation == RELATIONS[1]:
        base = np.unique(base)
        source = base
    parts = []
    for start in range(0, len(base), batch_size):
        batch = slice(start, start + batch_size)
        pair = torch.as_tensor(np.stack([base[batch], source[batch]]), device=clean.logits.device)
        logits = forward_with_move(model, examples, clean, layer, exchange, *pair, i, j)
        parts.append(compare_move(examples, clean, logits, *pair, i, j, seed))
    columns = concat(parts)
    columns["example"] = examples.indices[base]
    columns["source_example"] = examples.indices[source]
    for name, value in (("layer", layer), ("relation", relation), ("i", i), ("j", j)):
        columns[name] = np.full(len(base), value)
    return columns


def forward_with_move(model, examples, clean, layer, exchange, base, source, i, j):
    """Run bases (M,) with reads of sources at i put at j -> logits (M, n, vocabulary)."""
    m = torch.arange(len(base), device=base.device)
    at_j = torch.full_like(base, j)
    base_reads = index_reads(clean.reads[layer], (base, at_j))
    source_reads = index_reads(clean.reads[layer], (source, torch.full_like(source, i)))
    new_reads = exchange(base_reads, source_reads, None)
    reads = put_reads((m, at_j), new_reads, index_reads(clean.reads[layer], base))
    resid_mid = clean.resid_mid[layer][base]
    return forward_from(model, layer, resid_mid, reads, examples.label_pos[base])


def compare_move(examples, clean, logits, base, source, i, j, seed):
    """Logits (M, n, vocabulary) after a move, beside the clean ones -> {column: (M,)}"""
    answers = examples.answers
    labels = examples.label_pos[0].tolist()
    clean_diff, _, _ = logit_diff(clean.logits[base], answers[base])
    diff, _, correct = logit_diff(logits, answers[base])  # (M, n)
    from_j = examples.label_pos[0] >= j
    columns = {
        "drop": (clean_diff - diff)[:, from_j].sum(1).cpu().numpy(),
        "lost": (~correct[:, from_j]).sum(1).cpu().numpy(),
    }
    none = np.zeros(len(base), bool)
    columns |= {"is_pair": none, "source_answer": none, "control_answer": none}
    if i in labels and j in labels:
        at_i, at_j = labels.index(i), labels.index(j)
        base_answer = answers[base, at_j].cpu().numpy()
        source_answer = answers[source, at_i].cpu().numpy()
        prediction = logits[:, at_j].argmax(-1).cpu().numpy()
        alphabet = np.unique(answers.cpu().numpy())
        control = control_answers(base_answer, source_answer, alphabet, seed)
        # Where both have the same answer, a move that works cannot be seen.
        columns["is_pair"] = base_answer != source_answer
        columns["source_answer"] = prediction == source_answer
        columns["control_answer"] = prediction == control
    return columns


# ---- does content depend on the position? --------------------------------------------------------


def summarize_positions(columns):
    """{layer: {"own position", "other position", "same example": outcomes, "own - other": means}}

    own position: of another example, i = j; other position: i != j; same example: i != j. own -
    other: the difference of the first two in source's answers and in drop, for each base.
    """
    summary = {}
    is_own = columns["i"] == columns["j"]
    is_other_example = columns["relation"] == RELATIONS[0]
    for layer in np.unique(columns["layer"]):
        mask = columns["is_pair"] & (columns["layer"] == layer)
        places = {
            "own position": mask & is_other_example & is_own,
            "other position": mask & is_other_example & ~is_own,
            "same example": mask & ~is_other_example,
        }
        cells = {}
        for name, place in places.items():
            if place.any():
                cells[name] = outcomes(select(columns, place))
        own = select(columns, places["own position"])
        other = select(columns, places["other position"])
        cells["own - other"] = {
            "source_answer": paired_difference(own, other, "source_answer"),
            "drop": paired_difference(own, other, "drop"),
        }
        summary[str(layer)] = cells
    return summary


def outcomes(columns):
    """{"source_answer", "control_answer": proportion, "drop": mean over bases}"""
    example = columns["example"]
    cells = {"drop": clustered_mean_ci(columns["drop"], example)}
    for name in ("source_answer", "control_answer"):
        cells[name] = crossed_proportion(columns[name], example, columns["source_example"])
    return cells


def paired_difference(own, other, name):
    """How much more a column is at the own position: mean over bases that have both.

    Each base and position j is compared with itself, because the positions differ in difficulty.
    """
    keys = [combine_columns(columns, "example", "j") for columns in (own, other)]
    common = np.intersect1d(*keys)
    means = []
    for columns, key in zip((own, other), keys):
        mask = np.isin(key, common)
        means.append(cluster_means(columns[name][mask], key[mask]))
    example = [key.split(", ")[0] for key in common]
    return clustered_mean_ci(means[0] - means[1], example)


def describe(layer, cells, exchange):
    """The finding of one layer in a sentence."""
    own = cells["own position"]["source_answer"]
    other = cells["other position"]["source_answer"]
    control = cells["other position"]["control_answer"]
    low, high = cells["own - other"]["source_answer"]["ci95"]
    if own["ci95"][0] <= cells["own position"]["control_answer"]["value"]:
        # The source's answer does not come, so compare how much the base's answers suffer.
        drop = cells["own - other"]["drop"]
        _, value, interval = format_ci(drop)
        verdict = f"no answer goes along, and the drop differs by {value} logits ({interval})"
    elif low > 0:
        verdict = "content depends on the position"
    elif high < 0:
        verdict = "content depends on the position, and other positions take it better"
    else:
        verdict = "no dependence on the position is seen"
    verb = "bring their" if exchange == "slots" else "brings its"
    return (
        f"layer {layer}: the {exchange} of another example {verb} answer along in "
        f"{own['value']:.0%} at the same position, in {other['value']:.0%} at other positions "
        f"(a control answer in {control['value']:.0%}): {verdict}"
    )


def print_summary(summary):
    lines = []
    for layer, cells in summary.items():
        for name, cell in cells.items():
            control = ""
            if "control_answer" in cell:
                control = f"{cell['control_answer']['value']:.3f}"
            line = [f"{layer}, {name}", *format_ci(cell["source_answer"]), control]
            lines.append(line + list(format_ci(cell["drop"])[1:]))
    head = ("layer, moved to", "moves", "source answer", "95% interval", "control answer")
    print_table((*head, "drop in logit diff", "95% interval"), lines)


def matrix_cells(columns):
    """{"layer, relation, i, j": outcomes; without answers where one is no label}"""
    keys = combine_columns(columns, "layer", "relation", "i", "j")
    cells = {}
    # Measurements of a cell follow each other.
    starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
    for part in np.split(np.arange(len(keys)), starts[1:]):
        of_cell = select(columns, part)
        cell = {"drop": clustered_mean_ci(of_cell["drop"], of_cell["example"])}
        if of_cell["is_pair"].any():
            cell |= outcomes(select(of_cell, of_cell["is_pair"])) | cell
        cells[keys[part[0]]] = cell
    return cells


# ---- figure --------------------------------------------------------------------------------------


def plot_positions(run, examples, columns, exchange, path):
    """For each layer: drop and source answer, position by position, from both kinds of source."""
    layers = np.unique(columns["layer"])
    labels = examples.label_pos[0].tolist()
    positions = np.unique(columns["i"])
    plt, fig, axes = figure(len(layers), 4, width=4, grid=False)
    for row, layer in enumerate(layers):
        of_layer = select(columns, columns["layer"] == layer)
        highest = None
        for column, relation in enumerate(RELATIONS):
            part = select(of_layer, of_layer["relation"] == relation)
            drop, taken = axes[4 * row + column], axes[4 * row + 2 + column]
            targets = np.unique(part["j"])
            grid = mean_grid(part, "drop", positions, targets)
            if highest is None:
                highest = np.nanmax(grid)
            title = f"layer {layer}, from {relation}"
            show_grid(fig, drop, grid, positions, targets, labels, title)
            drop.images[0].set_clim(0, highest)
            part = select(part, part["is_pair"])
            grid = mean_grid(part, "source_answer", labels, labels)
            show_grid(fig, taken, grid, labels, labels, labels, title)
            write_values(taken, grid)
            taken.images[0].set_clim(0, 1)
            drop.images[0].colorbar.set_label("drop in logit diff, summed over answers")
            taken.images[0].colorbar.set_label("fraction with the source's answer")
    title = f"{run.name}: {exchange} of one position put at another. a1 predicts the first answer."
    finish_figure(fig, plt, path, f"{title} White: not moved.")


def mean_grid(columns, name, rows, across):
    """Means of a column, source position i down, base position j across; nan: none."""
    grid = np.full((len(rows), len(across)), np.nan)
    for a, i in enumerate(rows):
        for b, j in enumerate(across):
            mask = (columns["i"] == i) & (columns["j"] == j)
            if mask.any():
                grid[a, b] = columns[name][mask].mean()
    return grid


def show_grid(fig, axis, grid, rows, across, labels, title):
    # Not square: a few answers among many positions would make a panel narrower than its labels.
    image = axis.imshow(grid, cmap="viridis", aspect="auto")
    axis.set_xticks(range(len(across)), position_names(across, labels))
    axis.set_yticks(range(len(rows)), position_names(rows, labels))
    axis.set(xlabel="put at position j", ylabel="read at position i", title=title)
    fig.colorbar(image, ax=axis, shrink=0.8)


def position_names(positions, labels):
    """a1 for the position that predicts the first answer; others by number."""
    names = []
    for position in positions:
        if position in labels:
            names.append(f"a{labels.index(position) + 1}")
        else:
            names.append(str(position))
    return names


def write_values(axis, grid, most=8):
    """Write the numbers into a grid of few cells: colours do not tell small numbers apart."""
    if len(grid) > most:
        return
    for (row, column), value in np.ndenumerate(grid):
        if not np.isnan(value):
            color = "black" if value > 0.6 else "white"
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", color=color)
