"""Which slots are interchangeable? How often an answer survives when another slot is read instead.

    python ablate.py corr runs/RUN    # after keys

A case is a label and a slot a whose ablation flips the answer there: the model needs the slot. Slot
b is then read in place of a, under a's weight. If the answer survives, b can stand in for a. The
matrix of substitution holds the fraction of answers that survive, slot by slot. Clusters of slots
that stand in for each other are interchangeable.

Letters: S slots of a layer, C cases, N measurements, M copies of examples, n labels of an example.
"""

import math
from functools import partial

import numpy as np
import torch

from analysis.ablation import SlotAblation, memory_inputs, random_ablation
from analysis.clustering import normalize
from analysis.hooks import forward_from, index_reads, load_examples, logit_diff, run_with_cache
from analysis.keystats import slot_vectors
from analysis.memory_usage import require_slots
from analysis.slot_results import first_ablation, load_table
from analysis.trained_run import concat, save_result, select, settings_suffix
from nanorecall.metrics import print_table
from nanorecall.plots import figure, finish_figure
from nanorecall.settings import require, say
from nanorecall.stats import (
    cluster_means,
    clustered_mean_proportion,
    correlation,
    correlation_lines,
    format_ci,
    pearson,
    rankdata,
)

SAME = 0.5  # slots of a cluster stand in for each other in at least this fraction of cases


def substitution(run):
    """Which slots can stand in for which? Does that follow their keys, values or effects?"""
    require_slots(run)
    columns, ablation = first_ablation(load_table(run, "keys"))
    examples, _ = load_examples(run, np.unique(columns["example"]))
    by_slice = {"layer": {}, "layer, slot, read instead": {}}
    tables, panels = [], []
    for layer in np.unique(columns["layer"]).tolist():
        of_layer = select(columns, columns["layer"] == layer)
        slots, cases = draw_cases(of_layer, run.config)
        if len(slots) < 3:
            continue
        table = measure_substitution(run, layer, examples, slots, cases)
        matrix, cells = substitution_matrix(table, slots)
        for (slot, other), cell in cells.items():
            by_slice["layer, slot, read instead"][f"{layer}, {slot}, {other}"] = cell
        alike = likeness(run.model.memory_layers()[layer], of_layer, slots)
        by_slice["layer"][str(layer)] = layer_statistics(
            table, matrix, slots, alike, run.config.seed
        )
        tables.append(table)
        order = np.argsort(interchangeable(matrix), kind="stable")
        panels.append((layer, slots, matrix, order, alike[0]))
    metrics = {"ablation": ablation, "n_examples": len(examples)}
    run.suffixes_read.append(settings_suffix(run, ("n_corr_slots", "n_cases")))
    if not tables:
        say("no layer has 3 slots that at least 2 examples need: one slot less flips no answer,")
        say("or too few. More examples show more: --n_examples, also of keys.")
        save_result(run, "corr", metrics)
        return
    print_substitution(run, by_slice["layer"])
    plot = partial(plot_substitution, panels, run.name)
    save_result(run, "corr", metrics, by_slice, (), concat(tables), plot)


# ---- measurement ---------------------------------------------------------------------------------


def draw_cases(columns, config):
    """The slots that most examples need, and cases of each.

    columns: measurements of one layer, {column: (N,)}. -> slots (S,), ascending, and {"example",
    "slot", "answer_pos"}: (C,) of at most config.n_cases examples a slot. Slots that fewer than 2
    examples need are left out: a single one says nothing about how often.
    """
    needed = select(columns, columns["flip"])
    examples_of = {}
    for slot in np.unique(needed["slot"]).tolist():
        examples = np.unique(needed["example"][needed["slot"] == slot])
        if len(examples) >= 2:
            examples_of[slot] = examples
    # A stable sort: of slots that equally many examples need, those with the smallest numbers.
    slots = sorted(examples_of, key=lambda slot: -len(examples_of[slot]))[: config.n_corr_slots]
    rng = np.random.default_rng(config.seed)
    is_drawn = np.zeros(len(needed["slot"]), bool)
    for slot in slots:
        drawn = rng.permutation(examples_of[slot])[: config.n_cases]
        is_drawn |= (needed["slot"] == slot) & np.isin(needed["example"], drawn)
    cases = {name: needed[name][is_drawn] for name in ("example", "slot", "answer_pos")}
    return np.sort(np.array(slots, int)), cases


def measure_substitution(run, layer, examples, slots, cases, n_random=8):
    """Read each of slots (S,), and as a control random slots, in place of the slot of each case.

    -> {column: (N,)}: those of the cases, layer, read_instead, is_random, survives.
    """
    model, batch_size = run.model, run.config.ablate_batch_size
    message = "the result of keys names labels that its examples have not; run keys again"
    positions = cases["answer_pos"]
    require(0 <= positions.min() <= positions.max() < examples.label_pos.shape[1], message, None)
    clean = run_with_cache(model, examples)
    inputs = memory_inputs(model, layer, clean, examples.label_pos)
    n_slots = len(model.memory_layers()[layer].values)
    n_cases = len(cases["slot"])
    rng = np.random.default_rng(run.config.seed)
    others = np.tile(slots, (n_cases, 1))
    others = np.append(others, rng.integers(n_slots, size=(n_cases, n_random)), axis=1)
    case, column = np.indices(others.shape).reshape(2, -1)
    table = {name: values[case] for name, values in cases.items()}
    table["layer"] = np.full(len(case), layer)
    table["read_instead"] = others.ravel()
    table["is_random"] = column >= len(slots)
    # In its own place, a slot changes nothing.
    table = select(table, table["slot"] != table["read_instead"])
    survives = []
    for first in range(0, len(table["slot"]), batch_size):
        batch = select(table, slice(first, first + batch_size))
        survives.append(read_instead(model, layer, examples, inputs, batch))
    table["survives"] = np.concatenate(survives)
    return table


@torch.no_grad()
def read_instead(model, layer, examples, inputs, batch):
    """Put one slot in the place of another in each of M copies: is the answer still right? (M,)

    inputs: those of `memory_inputs`; batch: {"example", "slot", "read_instead", "answer_pos"}.
    """
    resid, reads, label_pos = inputs
    device = resid.device
    order = np.argsort(examples.indices)
    row = order[np.searchsorted(examples.indices, batch["example"], sorter=order)]
    i = torch.as_tensor(row, device=device)
    slot = torch.as_tensor(batch["slot"], device=device)
    other = torch.as_tensor(batch["read_instead"], device=device)
    memory = model.memory_layers()[layer]
    change = SlotAblation(memory, index_reads(reads, i), slot, (), other, other)
    logits = forward_from(model, layer, resid[i], random_ablation(change), label_pos[i])
    _, _, correct = logit_diff(logits, examples.answers[i])  # (M, n)
    return correct.cpu().numpy()[np.arange(len(row)), batch["answer_pos"]]


# ---- the matrix ----------------------------------------------------------------------------------


def substitution_matrix(table, slots):
    """Fractions of answers that survive -> (S, S), and {(slot, read instead): proportion}.

    Row: the slot that is needed; column: the slot that is read instead. The diagonal is 1.
    """
    table = select(table, ~table["is_random"])
    matrix, cells = np.eye(len(slots)), {}
    for i, slot in enumerate(slots.tolist()):
        of_slot = select(table, table["slot"] == slot)
        for j, other in enumerate(slots.tolist()):
            if i != j:
                inside = of_slot["read_instead"] == other
                survives = of_slot["survives"][inside]
                cell = clustered_mean_proportion(survives, of_slot["example"][inside])
                cells[slot, other] = cell
                matrix[i, j] = cell["value"]
    return matrix, cells


def interchangeable(matrix, least=SAME):
    """Clusters of slots that stand in for each other: matrix (S, S) -> cluster of each (S,).

    Average linkage: the two clusters with the highest mean of mutual survival become one, as long
    as that is at least `least`. Mutual: the smaller one of both directions.
    """
    mutual = np.minimum(matrix, matrix.T)
    members = [[i] for i in range(len(matrix))]
    while len(members) > 1:
        best, pair = -1.0, None
        for a in range(len(members)):
            for b in range(a):
                mean = mutual[np.ix_(members[a], members[b])].mean()
                if mean > best:
                    best, pair = mean, (a, b)
        if best < least:
            break
        a, b = pair
        members[b] += members.pop(a)
    members.sort(key=len, reverse=True)
    cluster = np.zeros(len(matrix), int)
    for number, of_cluster in enumerate(members):
        cluster[of_cluster] = number
    return cluster


def chance_in_clusters(matrix, seed, draws=20):
    """Mean number of slots in clusters of two or more, if entries off the diagonal are permuted.

    With few cases of each slot, some pairs stand in for each other by chance.
    """
    rng = np.random.default_rng(seed)
    off = ~np.eye(len(matrix), dtype=bool)
    n_in_clusters = []
    for _ in range(draws):
        permuted = np.eye(len(matrix))
        permuted[off] = rng.permutation(matrix[off])
        sizes = np.bincount(interchangeable(permuted))
        n_in_clusters.append(sizes[sizes > 1].sum())
    return float(np.mean(n_in_clusters))


def likeness(memory, columns, slots):
    """How alike are slots (S,)? -> {"keys", "values", "effects"}: (S, S) each, mean drops (S,).

    Keys and values: their cosine. Effects: minus the distance of their mean drops.
    """
    vectors = slot_vectors(memory, slots)
    keys, values = normalize(vectors["key"]), normalize(vectors["value"])
    of_slots = select(columns, np.isin(columns["slot"], slots))
    effect = cluster_means(of_slots["drop"], of_slots["slot"])
    distance = np.abs(effect[:, None] - effect[None, :])
    return {"keys": keys @ keys.T, "values": values @ values.T, "effects": -distance}, effect


def matrix_correlation(x, y, draws=2000, seed=0):
    """{"value", "ci95", "n", "p"} of Spearman's correlation of the entries off the diagonal.

    x, y (S, S). Entries of one slot are not independent: p is that of Mantel's test (1967), which
    permutes slots, and the interval resamples slots.
    """
    S = len(x)
    rng = np.random.default_rng(seed)
    off = ~np.eye(S, dtype=bool)

    def entries(matrix, order):
        distinct = order[:, None] != order[None, :]
        return matrix[np.ix_(order, order)][distinct]

    x_ranks, y_ranks = np.zeros((S, S)), np.zeros((S, S))
    x_ranks[off], y_ranks[off] = rankdata(x[off]), rankdata(y[off])
    value = pearson(x_ranks[off], y_ranks[off])
    if math.isnan(value):
        return {"value": value, "ci95": [value, value], "n": S, "p": value}
    permuted, resampled = [], []
    for _ in range(draws):
        permuted.append(pearson(x_ranks[off], entries(y_ranks, rng.permutation(S))))
        drawn = rng.integers(S, size=S)
        if len(np.unique(drawn)) > 1:
            resampled.append(pearson(entries(x_ranks, drawn), entries(y_ranks, drawn)))
    n_extreme = (np.abs(permuted) >= abs(value) - 1e-12).sum()
    ci95 = np.nanquantile(resampled, [0.025, 0.975]).tolist()
    return {"value": value, "ci95": ci95, "n": S, "p": float((1 + n_extreme) / (1 + draws))}


def layer_statistics(table, matrix, slots, alike, seed):
    """Survival, clusters, and what survival depends on, in one layer -> {name: ...}

    table: what `measure_substitution` returned; matrix (S, S) of `substitution_matrix`; alike: what
    `likeness` returned.
    """
    by_pair, effect = alike
    is_random = table["is_random"]
    survival = {}
    for name, mask in (("another of them", ~is_random), ("a random slot", is_random)):
        survival[name] = clustered_mean_proportion(table["survives"][mask], table["example"][mask])
    cluster = interchangeable(matrix)
    by_chance = chance_in_clusters(matrix, seed)
    members = {}
    for number in range(cluster.max() + 1):
        of_cluster = slots[cluster == number].tolist()
        if len(of_cluster) > 1:
            members[str(number)] = of_cluster
    off = matrix - np.eye(len(matrix))
    others = len(matrix) - 1
    against = {}
    for kind, similarity in by_pair.items():
        against[f"similarity of {kind}"] = matrix_correlation(matrix, similarity, seed=seed)
    for name, mean in (("replaced", off.sum(1) / others), ("read instead", off.sum(0) / others)):
        against[f"effect of the slot {name}"] = correlation(mean, effect, seed=seed)
    return {
        "slots": len(slots),
        "survival": survival,
        "clusters": members,
        "slots in clusters by chance": by_chance,
        "against": against,
    }


# ---- output --------------------------------------------------------------------------------------


def describe_substitution(layer, statistics):
    """Sentences on one layer."""
    survival = statistics["survival"]
    text = f"layer {layer}: of the answers that need one of {statistics['slots']} slots,"
    text += f" {survival['another of them']['value']:.1%} survive if another of these slots is read"
    text += f" instead, {survival['a random slot']['value']:.1%} if a random one is; "
    sizes = [len(of_cluster) for of_cluster in statistics["clusters"].values()]
    if sizes:
        text += f"{sum(sizes)} slots are in clusters of interchangeable ones"
        text += f" (by chance {statistics['slots in clusters by chance']:.1f})"
    else:
        text += f"no two stand in for each other in {SAME:.0%} of the cases"
    related = []
    for name, cell in statistics["against"].items():
        if cell["p_holm"] < 0.05:
            related.append(f"the {name} (rho {cell['value']:.2f})")
    return f"{text}; survival goes with {' and '.join(related) or 'nothing that was compared'}"


def print_substitution(run, by_layer):
    against = {}
    for layer, statistics in by_layer.items():
        for name, cell in statistics["against"].items():
            against[f"{layer}, {name}"] = cell
    correlations = correlation_lines(against)
    for layer, statistics in by_layer.items():
        run.finding(describe_substitution(layer, statistics))
        for name, of_cluster in statistics["clusters"].items():
            say(f"layer {layer}, cluster {name}: slots {' '.join(map(str, of_cluster))}")
    head = ("layer, survival against", "slots", "Spearman", "95% interval", "p (permutations)")
    print_table((*head, "Holm"), correlations)
    lines = []
    for layer, statistics in by_layer.items():
        for name, cell in statistics["survival"].items():
            lines.append((f"{layer}, {name}", *format_ci(cell)))
    print_table(("layer, read instead", "examples", "answers that survive", "95% interval"), lines)


def plot_substitution(panels, title, path):
    """For each layer: the matrix, clusters side by side; and survival against likeness of keys."""
    plt, fig, axes = figure(len(panels), 2, width=6, grid=False)
    fig.set_size_inches(12, 5 * len(panels))
    for row, (layer, slots, matrix, order, by_pair) in enumerate(panels):
        left, right = axes[2 * row : 2 * row + 2]
        image = left.imshow(matrix[np.ix_(order, order)], vmin=0, vmax=1, cmap="viridis")
        ticks = range(len(slots))
        left.set_xticks(ticks, slots[order], rotation=90)
        left.set_yticks(ticks, slots[order])
        left.set(xlabel="slot that is read instead", ylabel="slot that the answer needs")
        left.set_title(f"layer {layer}: fraction of answers that survive")
        fig.colorbar(image, ax=left, shrink=0.8)
        off = ~np.eye(len(slots), dtype=bool)
        for kind in ("keys", "values"):
            right.plot(by_pair[kind][off], matrix[off], ".", ms=4, alpha=0.6, label=kind)
        right.set(xlabel="cosine of the two slots", ylabel="fraction of answers that survive")
        right.set_title(f"layer {layer}: {off.sum()} pairs of slots")
        right.legend()
        right.grid(True)
    finish_figure(fig, plt, path, title)
