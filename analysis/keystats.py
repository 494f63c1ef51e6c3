"""How are slots read, how do their effects vary, and do keys and values form clusters?

    python ablate.py keystats runs/RUN       # after keys
    python ablate.py occurrences runs/RUN    # of all sequences of the split

Letters: S slots, H heads, Q width of a query.
"""

from functools import partial

import numpy as np
import torch

from analysis.clustering import chance_silhouette, project, spherical_k_means
from analysis.memory_usage import require_slots, slot_reads
from analysis.slot_results import DROP, first_ablation, load_table, slot_table
from analysis.trained_run import map_batches, save_result, select
from memory import slot_usage
from nanorecall.metrics import eval_batches, print_table
from nanorecall.plots import figure, finish_figure
from nanorecall.stats import correlation, format_ci, mean_ci, proportion

# ---- keystats ------------------------------------------------------------------------------------


def keystats(run, n_clusters=8):
    """How many examples read a slot, how do its weight and effect vary, are there clusters?"""
    require_slots(run)
    columns, ablation = first_ablation(load_table(run, "keys"))
    table = slot_table(columns)
    n_slots = len(table["slot"])
    table["key_cluster"] = np.zeros(n_slots, int)
    table["value_cluster"] = np.zeros(n_slots, int)
    by_layer, vectors_of = {}, {}
    for layer in np.unique(table["layer"]):
        in_layer = table["layer"] == layer
        slots = select(table, in_layer)
        vectors = slot_vectors(run.model.memory_layers()[int(layer)], slots["slot"])
        cells = slot_statistics(slots, run.config.seed)
        for kind, x in vectors.items():
            clusters, cells[f"clusters of {kind}s"] = find_clusters(x, n_clusters, run.config.seed)
            table[f"{kind}_cluster"][in_layer] = clusters
        by_layer[str(layer)], vectors_of[layer] = cells, vectors
    print_keystats(run, by_layer)
    plot = partial(plot_keystats, table, vectors_of, run.name)
    save_result(run, "keystats", {"ablation": ablation}, {"layer": by_layer}, (), table, plot)


def slot_vectors(memory, slots):
    """Keys (S, H * Q) and values (S, V) of slots (S,) as arrays. A key is that of all heads."""
    n = memory.config.mem_n_keys
    first = memory.keys[:, 0, slots // n]  # (H, S, Q/2)
    second = memory.keys[:, 1, slots % n]
    keys = torch.cat([first, second], dim=-1).transpose(0, 1).flatten(1)
    vectors = {"key": keys, "value": memory.values[slots]}
    return {name: x.detach().float().cpu().numpy() for name, x in vectors.items()}


def slot_statistics(slots, seed):
    """Statistics of one layer's slots, {column: (S,)} of `slot_table` -> {name: measured number}.

    A variance is a mean over slots with more than one measurement.
    """
    cells = {"examples that read a slot": mean_ci(slots["n_examples"])}
    variances = {"weight": slots["weight_var"], "effect": slots["std"] ** 2}
    for name, x in variances.items():
        x = x[~np.isnan(x)]
        if len(x):
            cells[f"variance of {name}"] = mean_ci(x)
    cells["reads against effect (Spearman)"] = correlation(
        slots["n_examples"], slots["mean"], seed=seed
    )
    return cells


def find_clusters(vectors, n_clusters, seed):
    """Clusters of vectors (S, V) -> cluster of each (S,), {"sizes", "silhouette", "by chance"}."""
    n = min(n_clusters, max(1, len(vectors) // 2))
    cluster, silhouette = spherical_k_means(vectors, n, seed)
    sizes = np.sort(np.bincount(cluster, minlength=n))[::-1].tolist()
    by_chance = chance_silhouette(vectors, n)
    return cluster, {"sizes": sizes, "silhouette": silhouette, "by chance": by_chance}


def print_keystats(run, by_layer):
    lines, cluster_lines = [], []
    for layer, cells in by_layer.items():
        run.finding(describe_keystats(layer, cells))
        readers = cells["examples that read a slot"]
        against = cells["reads against effect (Spearman)"]
        line = [layer, readers["n"], f"{readers['value']:.1f}"]
        for name in ("weight", "effect"):
            variance = cells.get(f"variance of {name}")
            text = f"{variance['value']:.4g} (n = {variance['n']})" if variance else "none"
            line.append(text)
        lines.append((*line, *format_ci(against)[1:], f"{against['p']:.4f}"))
        for kind in ("keys", "values"):
            clusters = cells[f"clusters of {kind}"]
            numbers = (f"{clusters['silhouette']:.3f}", f"{clusters['by chance']:.3f}")
            cluster_lines.append((layer, kind, *numbers, " ".join(map(str, clusters["sizes"]))))
    head = ("layer", "slots", "examples a slot", "variance of weight", "variance of effect")
    print_table((*head, "reads ~ effect", "95% interval", "p"), lines)
    print("Variances are means over the n slots with several measurements.")
    print_table(("layer", "of", "silhouette", "by chance", "slots in each cluster"), cluster_lines)


def describe_keystats(layer, cells):
    """One sentence on a layer."""
    readers = cells["examples that read a slot"]
    against = cells["reads against effect (Spearman)"]
    text = f"layer {layer}: {readers['n']} slots are read where an answer depends on them, each by"
    text += f" {readers['value']:.1f} examples"
    if against["p"] < 0.05:
        more = "more" if against["value"] > 0 else "less"
        text += f"; slots that more examples read matter {more} (rho {against['value']:.2f})"
    else:
        text += "; no relation of the number of examples that read a slot to its effect is seen"
    for kind in ("keys", "values"):
        clusters = cells[f"clusters of {kind}"]
        has_clusters = clusters["silhouette"] > max(0.25, clusters["by chance"])
        text += f"; {kind} form {'' if has_clusters else 'no '}clusters"
        text += f" (silhouette {clusters['silhouette']:.2f})"
    return text


def plot_keystats(table, vectors_of, title, path):
    """For each layer: examples against effect, the two variances, and the clusters in a plane."""
    plt, fig, axes = figure(len(vectors_of), 4, width=3.6)
    for row, (layer, vectors) in enumerate(vectors_of.items()):
        reads, spread, *planes = axes[4 * row : 4 * row + 4]
        slots = select(table, table["layer"] == layer)
        reads.plot(slots["n_examples"], slots["mean"], ".", ms=3, alpha=0.6)
        reads.set(xlabel="examples that read the slot", ylabel=f"mean {DROP}", xscale="log")
        reads.set_title(f"layer {layer}: {len(slots['slot'])} slots")
        spread.plot(slots["weight_var"], slots["std"] ** 2, ".", ms=3, alpha=0.6)
        spread.set(xlabel="variance of its weight", ylabel=f"variance of its {DROP}")
        spread.set(xscale="log", yscale="log")
        for axis, (kind, x) in zip(planes, vectors.items()):
            points = project(x)
            color = slots[f"{kind}_cluster"]
            axis.scatter(*points.T, c=color, cmap="tab10", vmin=0, vmax=9, s=6)
            axis.set(xlabel="first principal component", ylabel="second")
            axis.set_title(f"layer {layer}: directions of {kind}s, coloured by cluster")
    finish_figure(fig, plt, path, title)


# ---- occurrences ---------------------------------------------------------------------------------


def occurrences(run):
    """How evenly do all sequences of the split read the table: unused slots, Gini, KL."""
    require_slots(run)
    times, n_sequences = count_slot_reads(run)
    by_layer, lines = {}, []
    for layer, reads in times.items():
        n_slots, n_reads = len(reads), int(reads.sum())
        unused = proportion(int((reads == 0).sum()), n_slots)
        coefficient, kl = gini(reads), slot_usage(torch.from_numpy(reads))["kl"]
        by_layer[str(layer)] = {"unused": unused, "gini": coefficient, "kl": kl, "reads": n_reads}
        lines.append((layer, *format_ci(unused), f"{coefficient:.3f}", f"{kl:.3f}", n_reads))
        busiest = np.sort(reads)[::-1][: max(1, n_slots // 10)].sum() / n_reads
        text = f"layer {layer}: {unused['value']:.1%} of {n_slots} slots are never read in"
        text += f" {n_sequences} sequences; the busiest tenth has {busiest:.0%} of the reads"
        run.finding(text)
    head = ("layer", "slots", "unused", "95% interval", "Gini", "KL from even (nats)", "reads")
    print_table(head, lines)
    sizes = [len(reads) for reads in times.values()]
    table = {
        "layer": np.repeat(list(times), sizes),
        "slot": np.concatenate([np.arange(size) for size in sizes]),
        "times": np.concatenate(list(times.values())),
    }
    plot = partial(plot_occurrences, times, n_sequences, run.name)
    metrics = {"n_sequences": n_sequences}
    save_result(run, "occurrences", metrics, {"layer": by_layer}, (), table, plot)


def count_slot_reads(run):
    """Reads of each slot at all tokens of the split -> {layer: (slots,)}, number of sequences."""
    layers = run.model.memory_layers()
    size = run.model.config.mem_n_keys**2
    times = {layer: np.zeros(size, np.int64) for layer in layers}

    def count(batch):
        reads = slot_reads(run, batch)
        for layer in layers:
            of_layer = reads["slot"][reads["layer"] == layer]
            times[layer] += np.bincount(of_layer, minlength=size)
        return {"example": batch.indices}

    of_split = eval_batches(run.data, run.config.split, run.config.eval_batch_size)
    batches = [np.asarray(indices) for indices in of_split]
    sequences = map_batches(run, count, batches)["example"]
    for layer in layers:
        counts = run.world.all_gather_object(times[layer])
        times[layer] = np.sum(counts, axis=0)
    return times, len(sequences)


def gini(times):
    """Gini coefficient of reads (S,). 0: all slots are read equally often; near 1: one has all.

    >>> gini(np.array([1.0, 1.0])), gini(np.array([0.0, 0.0, 0.0, 4.0]))
    (0.0, 0.75)
    """
    times = np.sort(times)
    n = len(times)
    return float((2 * np.arange(1, n + 1) - n - 1) @ times / (n * times.sum()))


def plot_occurrences(times, n_sequences, title, path):
    plt, fig, (axis,) = figure(1, 1, width=5)
    most = max(reads.max() for reads in times.values())
    edges = np.concatenate([[0, 1], np.unique(np.geomspace(1, most + 1, 24).round())[1:]])
    for layer, reads in times.items():
        label = f"layer {layer}: {(reads == 0).sum()} of {len(reads)} slots never read"
        axis.hist(reads, edges, alpha=0.5, label=label)
    axis.set(xlabel=f"times read in {n_sequences} sequences", ylabel="slots", xscale="symlog")
    axis.legend()
    finish_figure(fig, plt, path, title)
