"""Which path tokens take: MLP or memory, or which slots, by kind of token, position and layer.

In HashHop the kind of a hash is its role: key, value, asked hash, hash in between, answer.

    python eval.py routing runs/RUN                        # on the run's own examples
    python eval.py routing runs/RUN --data gsm8k.jsonl     # or on texts: "text", or "question"
                                                           # and "answer"

A table of routes has one entry for each token and memory layer.
Letters: R entries of the table, T tokens, H heads, k slots that a head reads.
"""

import itertools
import math
from functools import partial

import numpy as np
import torch

from analysis.memory_usage import most_read, require_slots, usage_stats
from analysis.token_kinds import token_types
from analysis.trained_run import concat, map_batches, save_result
from nanorecall.documents import documents_in
from nanorecall.metrics import print_table
from nanorecall.plots import errorbars, figure, finish_figure
from nanorecall.rng import IGNORE_INDEX
from nanorecall.settings import require
from nanorecall.stats import clustered_mean_proportion, format_ci

# ---- the table of routes -------------------------------------------------------------------------


def routing_table(run, batch):
    """The table of routes of one batch, without padding: {column: (R,)}, "slots" (R, H * k).

    kind: of the token; decile: tenth of the example, 0 to 9; memory: the router's weight of the
    memory, nan without a router; slots: those that the token reads.
    """
    *_, trace = run.model(batch.tokens, trace=True)
    ids = batch.tokens.cpu().numpy()
    tables = []
    for b, index in enumerate(batch.indices):
        real = ids[b] != run.pad
        token = ids[b][real]
        n = len(token)
        for layer, reads in zip(run.model.memory_layers(), trace):
            memory = np.full(n, np.nan, np.float32)
            if "route" in reads:
                memory = reads["route"][b, :, 1].float().cpu().numpy()[real]
            table = {
                "example": np.full(n, index),
                "layer": np.full(n, layer),
                "position": np.arange(n),
                "token": token,
                "kind": np.array(token_types(run, token)).astype("U16"),
                "decile": 10 * np.arange(n) // n,
                "memory": memory,
                "slots": reads["slots"][b].flatten(1).cpu().numpy()[real],
            }
            tables.append(table)
    return concat(tables)


def route_texts(run, path):
    """The table of routes of a file of documents, each cut to the model's length."""
    config, seq_len = run.config, run.data.seq_len
    message = f"data={path} is text, and {run.settings.train.data} has numbers"
    require(hasattr(run.data, "tokenizer"), message, "data")
    tokenizer = run.data.tokenizer
    documents, n_tokens, n_read = [], 0, 0
    for text, _ in documents_in(path, 10**9):
        text = text if isinstance(text, str) else "".join(text)
        ids = np.concatenate([[tokenizer.bos], tokenizer.encode(text)]).astype(np.int64)
        documents.append(ids[:seq_len])
        n_tokens += len(ids)
        n_read += len(documents[-1])
        if len(documents) == config.n_examples:  # 0: all
            break
    require(documents, f"{path} holds no documents", "data")
    if n_read < n_tokens:
        cut = f"the first {seq_len} of each text (seq_len)"
        run.world.print0(f"{path}: {n_read} of {n_tokens} tokens are read, {cut}")

    def read(indices):
        longest = max(len(documents[i]) for i in indices)
        tokens = torch.full((len(indices), longest), run.pad)
        for b, i in enumerate(indices):
            tokens[b, : len(documents[i])] = torch.from_numpy(documents[i])
        return tokens, torch.full_like(tokens, IGNORE_INDEX), {}

    n_batches = math.ceil(len(documents) / config.eval_batch_size)
    batches = np.array_split(np.arange(len(documents)), n_batches)
    return map_batches(run, lambda batch: routing_table(run, batch), batches, read)


# ---- the analysis --------------------------------------------------------------------------------


def routing(run):
    """MLP or memory by kind of token, position and layer; without a router, slots read by these."""
    require_slots(run)
    if run.config.data:
        table = route_texts(run, run.config.data)
    else:
        table = map_batches(run, lambda batch: routing_table(run, batch))
    has_router = not np.isnan(table["memory"]).all()
    size = run.model.config.mem_n_keys**2
    by_slice = {}
    for column in ("kind", "decile"):
        by_slice[f"layer, {column}"] = cells_of(table, column, size)
    similarities = {}
    for layer in np.unique(table["layer"]):
        similarities[str(layer)] = similarity_of_kinds(table, layer, size)
    consistencies = consistency(table)
    if run.world.is_main:
        for layer, similarity in similarities.items():
            of_layer = by_slice["layer, kind"], similarity, consistencies[layer]
            run.finding(describe_layer(layer, *of_layer))
        print_routing(by_slice, consistencies, has_router, size)
    metrics = {
        "what": "weight of memory" if has_router else "slots",
        "data": run.config.data or run.config.split,
        "consistency": consistencies,
    }
    columns = {**table, "slots": list(table["slots"])}
    n_tokens = len(table["kind"]) // len(similarities)
    n_examples = len(np.unique(table["example"]))
    title = f"{run.name}, {n_tokens} tokens of {n_examples} examples"
    plot = partial(plot_routing, by_slice, similarities, consistencies, has_router, title)
    save_result(run, "routing", metrics, by_slice, (), columns, plot)


def cells_of(table, column, size):
    """{"layer, value of the column": weight of memory; without a router, use of the slots}

    Tokens of one sequence are alike, so the interval is of means of sequences.
    """
    has_router = not np.isnan(table["memory"]).all()
    cells = {}
    for layer in np.unique(table["layer"]):
        for value in np.unique(table[column]):
            mask = (table["layer"] == layer) & (table[column] == value)
            if not mask.any():
                continue
            slots = table["slots"][mask].ravel()
            if has_router:
                cell = clustered_mean_proportion(table["memory"][mask], table["example"][mask])
            else:
                cell = {**usage_stats(slots, size), "n": len(np.unique(table["example"][mask]))}
            cell |= {"tokens": int(mask.sum()), "most_read": most_read(slots)}
            cells[f"{layer}, {value}"] = cell
    return cells


def describe_layer(layer, cells, similarity, pairs):
    """The extremes of one layer, as a sentence.

    cells: `cells_of` kinds; similarity: `similarity_of_kinds`; pairs: `consistency` of the layer.
    """
    weights = {}
    for key, cell in cells.items():
        if key.startswith(f"{layer}, ") and "value" in cell:
            weights[key.split(", ", 1)[1]] = cell["value"]
    parts = []
    if weights:
        most, least = max(weights, key=weights.get), min(weights, key=weights.get)
        text = f"memory has most weight at {most} ({weights[most]:.2f})"
        parts.append(f"{text} and least at {least} ({weights[least]:.2f})")
    kinds, cosine = similarity
    kind_pairs = list(itertools.combinations(range(len(kinds)), 2))
    if kind_pairs:
        i, j = max(kind_pairs, key=lambda pair: cosine[pair])
        text = f"{kinds[i]} and {kinds[j]} read the most similar slots (cosine {cosine[i, j]:.2f})"
        i, j = min(kind_pairs, key=lambda pair: cosine[pair])
        parts.append(f"{text}, {kinds[i]} and {kinds[j]} the least ({cosine[i, j]:.2f})")
    shared = []
    for name, measures in pairs.items():
        shared.append(f"{name} {measures['slots in common']['value']:.2f}")
    if shared:
        parts.append(f"slots that two tokens of two examples have in common: {', '.join(shared)}")
    return f"layer {layer}: {'; '.join(parts) or 'too few tokens to compare kinds'}"


def similarity_of_kinds(table, layer, size):
    """Kinds of token, and the cosine similarity (kinds, kinds) of the slots that they read."""
    in_layer = table["layer"] == layer
    kinds, counts = [], []
    for kind in np.unique(table["kind"]):
        mask = in_layer & (table["kind"] == kind)
        if mask.sum() >= 5:
            kinds.append(kind)
            counts.append(np.bincount(table["slots"][mask].ravel(), minlength=size))
    counts = np.array(counts, float).reshape(len(kinds), size)
    # To length 1, because kinds of many tokens read more.
    counts /= np.linalg.norm(counts, axis=1, keepdims=True)
    return kinds, counts @ counts.T


def consistency(table, n_pairs=2000):
    """Do similar tokens take the same path?

    -> {layer: {pair: {"slots in common", "difference of weights"}}}. A pair is two tokens of two
    examples: the same token, two of one kind, or two of different kinds. The slots in common are
    Jaccard's index; the weights are those that a router gives to memory. Each example has one
    partner, so that pairs of examples are independent; intervals are of their means.
    """
    rng = np.random.default_rng(0)
    example, has_router = table["example"], not np.isnan(table["memory"]).all()
    by_layer = {}
    for layer in np.unique(table["layer"]):
        in_layer = np.flatnonzero(table["layer"] == layer)
        # Two random tokens are rarely the same, so many more are drawn than are used.
        a, b, partners = draw_pairs(rng, in_layer, example[in_layer], 60 * n_pairs)
        same_token = table["token"][a] == table["token"][b]
        same_kind = table["kind"][a] == table["kind"][b]
        pairs = {
            "same token": same_token,
            "same kind": same_kind & ~same_token,
            "other kind": ~same_kind,
        }
        cells = {}
        for name, mask in pairs.items():
            i, j, cluster = a[mask][:n_pairs], b[mask][:n_pairs], partners[mask][:n_pairs]
            if len(i) < 20:  # too few for an interval
                continue
            common = [jaccard(x, y) for x, y in zip(table["slots"][i], table["slots"][j])]
            cells[name] = {"slots in common": clustered_mean_proportion(common, cluster)}
            if has_router:
                difference = np.abs(table["memory"][i] - table["memory"][j])
                mean = clustered_mean_proportion(difference, cluster)
                cells[name]["difference of weights"] = mean
        by_layer[str(layer)] = cells
    return by_layer


def draw_pairs(rng, tokens, example, n):
    """n random pairs of two examples that are partners -> tokens (n,), tokens (n,), partners (n,).

    Tokens of one example attend to the same tokens, which would make them similar. tokens (T,),
    example (T,): the example of each.
    """
    order = np.argsort(example, kind="stable")
    _, first, count = np.unique(example[order], return_index=True, return_counts=True)
    half = len(first) // 2
    if half == 0:  # a single example
        return (np.zeros(0, int),) * 3
    shuffled = rng.permutation(len(first))
    partners = rng.integers(half, size=n)

    def draw(chosen):
        return tokens[order[first[chosen] + (rng.random(n) * count[chosen]).astype(int)]]

    return draw(shuffled[partners]), draw(shuffled[half + partners]), partners


def jaccard(x, y):
    """Size of the intersection of two sets, divided by that of their union."""
    return len(np.intersect1d(x, y)) / len(np.union1d(x, y))


def print_routing(by_slice, consistencies, has_router, size):
    for name, cells in by_slice.items():
        lines = []
        for value, cell in cells.items():
            if has_router:
                measured = format_ci(cell)[1:]
            else:
                measured = cell["used"], f"{cell['fraction']:.1%}", f"{cell['effective']:.0f}"
            lines.append((value, cell["tokens"], cell["n"], *measured, cell["most_read"]))
        usage = ("slots used", f"of {size}", "effective")
        head = ("weight of memory", "95% interval") if has_router else usage
        print_table((name, "tokens", "sequences", *head, "most read slots"), lines)
        print()
    lines = []
    for layer, pairs in consistencies.items():
        for pair, measures in pairs.items():
            for measure, cell in measures.items():
                lines.append((layer, pair, measure, *format_ci(cell)))
    head = ("layer", "two tokens", "measure", "pairs of sequences", "mean", "95% interval")
    print_table(head, lines)


# ---- figure --------------------------------------------------------------------------------------


def plot_routing(by_slice, similarities, consistencies, has_router, title, path):
    """Routes by kind and layer, and by tenth; consistency; the similarity of kinds by layer."""
    layers = list(similarities)
    n_panels = 3 + len(layers)
    plt, fig, axes = figure(2, math.ceil(n_panels / 2), width=4.8, grid=False)
    kinds_axis, deciles_axis, pairs_axis, *heat_maps = axes
    plot_kinds(fig, kinds_axis, by_slice["layer, kind"], layers, has_router)
    plot_deciles(deciles_axis, by_slice["layer, decile"], layers, has_router)
    plot_consistency(pairs_axis, consistencies)
    for axis, layer in zip(heat_maps, layers):
        kinds, cosine = similarities[layer]
        image = axis.imshow(cosine, vmin=0, vmax=1, cmap="viridis")
        axis.set_xticks(range(len(kinds)), kinds, rotation=45, ha="right")
        axis.set_yticks(range(len(kinds)), kinds)
        axis.set_title(f"layer {layer}: cosine of the slots that two kinds read")
        fig.colorbar(image, ax=axis, shrink=0.8)
    for axis in heat_maps[len(layers) :]:
        axis.axis("off")
    finish_figure(fig, plt, path, title)


def plot_kinds(fig, axis, cells, layers, has_router):
    """A heat map, kinds x layers: weight of memory, or effective number of slots."""
    measure = "value" if has_router else "effective"
    kinds = list(dict.fromkeys(key.split(", ", 1)[1] for key in cells))
    values = np.full((len(kinds), len(layers)), np.nan)
    for i, kind in enumerate(kinds):
        for j, layer in enumerate(layers):
            if f"{layer}, {kind}" in cells:
                values[i, j] = cells[f"{layer}, {kind}"][measure]
    limits = dict(vmin=0, vmax=1) if has_router else dict(vmin=0)
    image = axis.imshow(values, cmap="viridis", aspect="auto", **limits)
    middle = image.norm.vmax / 2
    for (i, j), value in np.ndenumerate(values):
        text = f"{value:.2f}" if has_router else f"{value:.0f}"
        color = "black" if value > middle else "white"
        axis.text(j, i, text, ha="center", va="center", fontsize=7, color=color)
    axis.set_xticks(range(len(layers)), layers)
    axis.set_yticks(range(len(kinds)), kinds)
    axis.set(xlabel="layer", title="weight of memory" if has_router else "effective slots")
    fig.colorbar(image, ax=axis, shrink=0.8)


def plot_deciles(axis, cells, layers, has_router):
    """Weight of memory, or effective number of slots, along the example."""
    for layer in layers:
        x, of_layer = [], []
        for decile in range(10):
            if f"{layer}, {decile}" in cells:
                x.append(decile)
                of_layer.append(cells[f"{layer}, {decile}"])
        if has_router:
            errorbars(axis, x, of_layer, label=f"layer {layer}")
        else:
            effective = [cell["effective"] for cell in of_layer]
            axis.plot(x, effective, "o-", ms=4, label=f"layer {layer}")
    axis.set_xlabel("tenth of the example")
    axis.set_xticks(range(10))
    if has_router:
        axis.set(ylabel="weight of memory (95%)", ylim=(-0.02, 1.02))
    else:
        axis.set(ylabel="effective number of slots", ylim=(0, 1.1 * axis.get_ylim()[1]))
    axis.grid(True)
    axis.legend()


def plot_consistency(axis, consistencies):
    """Slots in common of pairs of tokens, as bars."""
    width = 0.8 / len(consistencies)
    names = []
    for pairs in consistencies.values():
        names += [name for name in pairs if name not in names]
    for number, (layer, pairs) in enumerate(consistencies.items()):
        x = [names.index(name) + (number + 0.5) * width - 0.4 for name in pairs]
        cells = [measures["slots in common"] for measures in pairs.values()]
        heights = [cell["value"] for cell in cells]
        axis.bar(x, heights, 0.9 * width, alpha=0.5, label=f"layer {layer}")
        errorbars(axis, x, cells, ls="none", marker="", color="black")
    axis.set_xticks(range(len(names)), names)
    axis.set(xlabel="two tokens of two examples", ylabel="slots in common (Jaccard, 95%)")
    axis.set_ylim(0, 1.02)
    if names:
        axis.legend()
