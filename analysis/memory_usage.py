"""Which slots of its memory layers a model reads, how long their values are, and for which tokens.

    python eval.py activations runs/RUN    # slots and weights by example, layer, position and head
    python eval.py norms runs/RUN          # norms of values and of memory outputs
    python eval.py track runs/RUN          # tokens at which each slot is read; usage in training

A table of reads has one entry for each example, layer, position, head and slot.
Letters: B examples, T tokens, H heads, k slots that a head reads, S slots.
"""

import math
from functools import partial

import numpy as np
import torch

from analysis.trained_run import map_batches, sample_batches, save_result, select
from memory import slot_usage
from nanorecall.metrics import print_table
from nanorecall.plots import errorbars, figure, finish_figure
from nanorecall.records import read_log
from nanorecall.rng import IGNORE_INDEX
from nanorecall.settings import require
from nanorecall.stats import format_ci, label_mean_proportion, mean_ci


def require_slots(run):
    """ConfigError unless the model has memory layers."""
    message = f"{run.settings.train.model} has no memory layers"
    require(hasattr(run.model, "memory_layers"), message, None)


def slot_reads(run, batch):
    """The table of reads of one batch, without padding: {column: (reads,)}."""
    *_, trace = run.model(batch.tokens, trace=True)
    tokens = batch.tokens.cpu()
    b, t = (tokens != run.pad).nonzero(as_tuple=True)  # of each token that is no padding
    # Half the memory of long; no table has 2**31 slots.
    of_token = {
        "example": torch.from_numpy(batch.indices)[b].int(),
        "position": t.int(),
        "token": tokens[b, t].int(),
        "labelled": (batch.targets != IGNORE_INDEX).cpu()[b, t],
    }
    tables = []
    for layer, reads in zip(run.model.memory_layers(), trace):
        slots = reads["slots"].cpu()[b, t]  # (tokens, H, k)
        weights = reads["weights"].cpu()[b, t]
        H, k = slots.shape[1:]
        table = {name: x.repeat_interleave(H * k) for name, x in of_token.items()}
        table["head"] = torch.arange(H).int().repeat_interleave(k).repeat(len(slots))
        table["layer"] = torch.full_like(table["head"], layer)
        table["slot"] = slots.flatten().int()
        table["weight"] = weights.float().flatten()
        tables.append(table)
    columns = {}
    for name in (*of_token, "layer", "head", "slot", "weight"):
        columns[name] = torch.cat([table[name] for table in tables]).numpy()
    return columns


def usage_stats(slots, size):
    """How evenly reads (n,) use a table of `size` slots -> {"used", "fraction", "effective", "kl"}.

    used: number of slots read; fraction: of slots read; effective: exp of the entropy, the number
    of equally used slots with this uncertainty; kl: divergence from even use, in nats.
    """
    usage = slot_usage(torch.from_numpy(np.bincount(slots, minlength=size)))
    kl = usage["kl"]
    effective = size / math.exp(kl)
    used = size - usage["dead"]
    return {"used": used, "fraction": usage["fraction"], "effective": effective, "kl": kl}


# ---- activations ---------------------------------------------------------------------------------

MAX_READS = 50_000_000  # rows of a table of reads: 1.3 GB, and the same again while it is made


def require_few_reads(run):
    """ConfigError if the table of reads would not fit into memory."""
    c = run.model.config
    each = run.data.seq_len * c.mem_heads * c.mem_knn * len(run.model.memory_layers())
    n_examples = sum(map(len, sample_batches(run)))
    most = max(1, MAX_READS // each)
    message = f"{n_examples} examples read up to {n_examples * each:,} slots, which are too many"
    require(n_examples <= most, f"{message}; give --n_examples {most}", "n_examples")


def activations(run):
    """Which slots are read, by example, layer, position and head."""
    require_slots(run)
    require_few_reads(run)
    reads = map_batches(run, lambda batch: slot_reads(run, batch))
    size = run.model.config.mem_n_keys**2
    by_layer, by_position = {}, {}
    lines = []
    for layer in np.unique(reads["layer"]):
        in_layer = reads["layer"] == layer
        slots = reads["slot"][in_layer]
        usage = usage_stats(slots, size)
        by_layer[str(layer)] = usage
        for t in np.unique(reads["position"][in_layer]):
            here = in_layer & (reads["position"] == t)
            by_position[f"{layer}, {t}"] = usage_stats(reads["slot"][here], size)
        run.finding(describe_usage(layer, usage, size, slots))
        numbers = (usage["used"], f"{usage['fraction']:.1%}", f"{usage['effective']:.0f}")
        lines.append((str(layer), *numbers, f"{usage['kl']:.2f}", most_read(slots)))
    if run.world.is_main:
        head = ("layer", "slots used", f"of {size}", "effective", "KL from even", "most read")
        print_table(head, lines)
    n_examples = len(np.unique(reads["example"]))
    metrics = {"slots": size, "n_examples": n_examples, "reads": len(reads["slot"])}
    by_slice = {"layer": by_layer, "layer, position": by_position}
    plot = partial(plot_activations, reads, by_slice, size, run.name)
    save_result(run, "activations", metrics, by_slice, read_examples(run, reads), reads, plot)


def describe_usage(layer, usage, size, slots):
    """How many slots are read, and how evenly, as a sentence."""
    counts = np.sort(np.bincount(slots))[::-1]
    top = counts[:10].sum() / counts.sum()
    even = f"as evenly as {usage['effective']:.0f} equally used ones"
    top_text = f"the ten most read get {top:.0%} of the reads"
    return f"layer {layer} reads {usage['used']} of {size} slots, {even}; {top_text}"


def most_read(slots):
    """The five most frequent of slots (n,), with their fraction of the reads, as text."""
    values, counts = np.unique(slots, return_counts=True)
    best = np.argsort(counts)[::-1][:5]
    return " ".join(f"{values[i]}:{counts[i] / counts.sum():.1%}" for i in best)


def read_examples(run, reads, n_examples=4, n_slots=5):
    """Yield a few examples with the slots of largest weight by layer and label.

    Each slot is (first sub-key, second sub-key, weight).
    """
    n = run.model.config.mem_n_keys
    indices = np.unique(reads["example"])
    chosen = np.linspace(0, len(indices) - 1, min(n_examples, len(indices))).astype(int)
    for index in indices[chosen]:
        tokens, *_ = run.data.batch(run.config.split, 0, [index])
        labelled = (reads["example"] == index) & reads["labelled"]
        layers, positions = reads["layer"][labelled], reads["position"][labelled]
        top_slots = {}
        for layer, t in sorted(set(zip(layers.tolist(), positions.tolist()))):
            here = labelled & (reads["layer"] == layer) & (reads["position"] == t)
            here = np.flatnonzero(here)
            slots = []
            for i in here[np.argsort(-reads["weight"][here])][:n_slots]:
                slot = int(reads["slot"][i])
                weight = round(float(reads["weight"][i]), 4)
                slots.append((slot // n, slot % n, weight))
            top_slots.setdefault(f"layer {layer}", {})[f"position {t}"] = slots
        text = run.text(tokens[0].numpy())[-200:]
        yield {"example": int(index), "text": text, "top_slots": top_slots}


def positions_of(cells, layer):
    """{"layer, position": cell} of all layers -> {position: cell} of one."""
    split = {tuple(map(int, key.split(", "))): cell for key, cell in cells.items()}
    return {t: cell for (of_layer, t), cell in split.items() if of_layer == int(layer)}


def plot_activations(reads, by_slice, size, title, path):
    """Reads per slot in falling order, and the effective number of slots by position."""
    plt, fig, (left, right) = figure(1, 2)
    for layer in by_slice["layer"]:
        slots = reads["slot"][reads["layer"] == int(layer)]
        counts = np.sort(np.bincount(slots, minlength=size))[::-1]
        left.plot(np.arange(1, size + 1), counts / counts.sum(), label=f"layer {layer}")
        cells = positions_of(by_slice["layer, position"], layer)
        effective = [usage["effective"] for usage in cells.values()]
        right.plot(list(cells), effective, "o-", ms=3, label=f"layer {layer}")
    left.axhline(1 / size, ls="--", color="gray", lw=1, label="even use")
    left.set(xscale="log", yscale="log")
    left.set(xlabel="slots, most read first", ylabel="fraction of reads")
    right.set(xlabel="position", ylabel=f"effective number of slots (of {size})")
    right.set_ylim(0, 1.1 * right.get_ylim()[1])
    left.legend()
    right.legend()
    n_examples = len(np.unique(reads["example"]))
    finish_figure(fig, plt, path, f"{title}, {n_examples} examples")


# ---- norms ---------------------------------------------------------------------------------------


def norms(run):
    """Norms of the values, of slots read and never read, and of the memory output by position."""
    require_slots(run)
    outputs = map_batches(run, lambda batch: output_norms(run, batch))
    tables = value_norms(run.model, map_batches(run, lambda batch: slots_in_use(run, batch)))
    metrics, lines = {}, []
    for name, (lengths, used) in tables.items():
        metrics[name] = {}
        for kind, x in (("read", lengths[used]), ("never read", lengths[~used])):
            if len(x):
                metrics[name][kind] = mean_ci(x)
                lines.append((f"values, {name}, {kind}", *format_ci(metrics[name][kind])))
    by_position, position_lines = {}, []
    for layer in np.unique(outputs["layer"]):
        for t in np.unique(outputs["position"]):
            x = outputs["norm"][(outputs["layer"] == layer) & (outputs["position"] == t)]
            if len(x):
                cell = {**mean_ci(x), "std": float(x.std())}
                by_position[f"{layer}, {t}"] = cell
                name = f"output of layer {layer}, position {t}"
                position_lines.append((name, *format_ci(cell)))
    if run.world.is_main:
        for sentence in describe_norms(metrics, by_position):
            run.finding(sentence)
        # The figure shows many positions better.
        if len(position_lines) <= 60:
            lines += position_lines
        print_table(("norm of", "n", "mean", "95% interval"), lines)
    plot = partial(plot_norms, tables, by_position, run.name)
    save_result(run, "norms", metrics, {"layer, position": by_position}, (), outputs, plot)


def describe_norms(metrics, by_position):
    """Yield sentences: norms of values that are read and not read, positions of longest outputs."""
    for name, cells in metrics.items():
        if len(cells) == 2:
            read, other = cells["read"]["value"], cells["never read"]["value"]
            lengths = f"{read:.2f} against {other:.2f}"
            change = f"{abs(read / other - 1):.0%} {'longer' if read > other else 'shorter'}"
            yield f"values of {name} that are read are {change} than those never read ({lengths})"
    for layer in dict.fromkeys(key.split(", ")[0] for key in by_position):
        cells = positions_of(by_position, layer)
        longest = max(cells, key=lambda t: cells[t]["value"])
        shortest = min(cells, key=lambda t: cells[t]["value"])
        ends = f"{cells[longest]['value']:.2f} at position {longest}"
        ends += f" to {cells[shortest]['value']:.2f} at position {shortest}"
        yield f"the memory output of layer {layer} has norms from {ends}"


def output_norms(run, batch):
    """{"layer", "position", "norm"} of the memory output at each token that is no padding."""
    *_, trace = run.model(batch.tokens, trace=True)
    b, t = (batch.tokens != run.pad).nonzero(as_tuple=True)
    layers = list(run.model.memory_layers())
    lengths = [reads["output"][b, t].float().norm(dim=-1).cpu().numpy() for reads in trace]
    return {
        "layer": np.repeat(layers, len(b)),
        "position": np.tile(t.cpu().numpy(), len(layers)),
        "norm": np.concatenate(lengths),
    }


def slots_in_use(run, batch):
    """{"layer", "slot"}: each slot that the batch reads, once."""
    reads = slot_reads(run, batch)
    size = run.model.config.mem_n_keys**2
    layer, slot = np.divmod(np.unique(reads["layer"].astype(np.int64) * size + reads["slot"]), size)
    return {"layer": layer, "slot": slot}


def value_norms(model, reads):
    """{"layers 0 1": (norms of the values (slots,), which are read (slots,) bool)}, by table.

    reads {"layer": (n,), "slot": (n,)}: slots that are read, once or more often.
    """
    layers_of = {}
    for layer, memory in model.memory_layers().items():
        layers_of.setdefault(memory.values, []).append(layer)
    tables = {}
    for values, layers in layers_of.items():
        used = np.zeros(len(values), bool)
        # A slot of a shared table is in use if any layer reads it.
        used[reads["slot"][np.isin(reads["layer"], layers)]] = True
        lengths = values.detach().float().norm(dim=1).cpu().numpy()
        tables["layers " + " ".join(map(str, layers))] = (lengths, used)
    return tables


def plot_norms(tables, by_position, title, path):
    """Histograms of the norms of values, and the mean norm of the output by position."""
    plt, fig, (left, right) = figure(1, 2)
    for name, (lengths, used) in tables.items():
        edges = np.linspace(0, lengths.max() * 1.05, 40)
        for kind, x in (("read", lengths[used]), ("never read", lengths[~used])):
            if len(x):
                left.hist(x, edges, alpha=0.5, label=f"{name}, {kind}: n = {len(x)}")
    left.set(xlabel="norm of a value", ylabel="slots")
    for layer in dict.fromkeys(key.split(", ")[0] for key in by_position):
        cells = positions_of(by_position, layer)
        n = max(cell["n"] for cell in cells.values())
        errorbars(right, list(cells), list(cells.values()), label=f"layer {layer}, n = {n}")
    right.set(xlabel="position", ylabel="mean norm of the memory output (95%)")
    right.set_ylim(0, 1.1 * right.get_ylim()[1])
    left.legend()
    right.legend()
    finish_figure(fig, plt, path, title)


# ---- tokens of a slot ----------------------------------------------------------------------------


def track(run):
    """The tokens at which each slot is read, and the usage of slots in training (log.jsonl)."""
    require_slots(run)
    columns = sum_by_token(run, map_batches(run, lambda batch: reads_by_token(run, batch)))
    columns["text"] = [run.token(token) for token in columns["token"]]
    # Purity: is a slot read at one token, or at many?
    slots = slots_of_reads(columns)
    purity = slots["largest"] / slots["total"]
    by_layer = {}
    for layer in np.unique(slots["layer"]):
        of_layer = select(slots, slots["layer"] == layer)
        # Over reads: a slot that is read once is read at one token.
        cell = label_mean_proportion(of_layer["largest"], of_layer["total"])
        is_layer = columns["layer"] == layer
        reads = {name: columns[name][is_layer] for name in ("token", "times")}
        by_layer[str(layer)] = {**cell, "by chance": purity_by_chance(reads, of_layer["total"])}
    log = [record for record in read_log(run.folder) if record["kind"] == "memory"]
    if run.world.is_main:
        for layer, cell in by_layer.items():
            text = f"layer {layer}: {cell['value']:.1%} of the reads are at their slot's most"
            run.finding(f"{text} frequent token; by chance {cell['by chance']:.1%}")
        print_busiest_slots(columns, slots)
        if not log:
            print("no usage of slots in log.jsonl: train with --mem_log_interval 100")
    metrics = {"fraction of reads at a slot's most frequent token": by_layer}
    metrics["while training"] = log[-1]["layers"] if log else {}
    plot = partial(plot_track, log, purity, slots["layer"], run.name)
    save_result(run, "track", metrics, {}, (), columns, plot)


def slots_of_reads(columns):
    """Reads by token -> {"layer", "slot", "total", "largest"} (S,), an entry for each slot read.

    columns: what `sum_by_token` returned. total: reads of the slot; largest: at a single token.
    """
    n_slots = columns["slot"].max() + 1
    # One number for each (layer, slot), because np.unique is slow on pairs.
    key = columns["layer"] * n_slots + columns["slot"]
    key, of_slot = np.unique(key, return_inverse=True)
    layer, slot = np.divmod(key, n_slots)
    largest = np.zeros(len(slot))
    np.maximum.at(largest, of_slot, columns["times"])
    total = np.bincount(of_slot, columns["times"])
    return {"layer": layer, "slot": slot, "total": total, "largest": largest}


def purity_by_chance(reads, totals, seed=0):
    """The fraction of reads at their slot's most frequent token if slots were drawn at random.

    reads: the columns of one layer. totals (S,): the number of reads of each slot.
    """
    _, token = np.unique(reads["token"], return_inverse=True)
    share = np.bincount(token, reads["times"]) / reads["times"].sum()
    rng = np.random.default_rng(seed)
    return float(sum(rng.multinomial(n, share).max() for n in totals) / totals.sum())


def print_busiest_slots(columns, slots, n_slots=5, n_tokens=4):
    """Print the slots of each layer that are read most, and the tokens at which they are."""
    lines = []
    for layer in np.unique(slots["layer"]):
        of_layer = np.flatnonzero(slots["layer"] == layer)
        for s in of_layer[np.argsort(-slots["total"][of_layer])][:n_slots]:
            slot, total = slots["slot"][s], slots["total"][s]
            here = np.flatnonzero((columns["layer"] == layer) & (columns["slot"] == slot))
            tokens = []
            for i in here[np.argsort(-columns["times"][here])][:n_tokens]:
                tokens.append(f"{columns['text'][i]!r}:{columns['times'][i] / total:.0%}")
            lines.append((int(layer), int(slot), int(total), " ".join(tokens)))
    print_table(("layer", "slot", "reads", "at these tokens"), lines)


def reads_by_token(run, batch):
    """`sum_by_token` of the reads of one batch: so few are held at a time."""
    reads = slot_reads(run, batch)
    return sum_by_token(run, {**reads, "times": np.ones(len(reads["slot"]), int)})


def sum_by_token(run, reads):
    """Sums of "times" and "weight" of reads {column: (reads,)} that are of one slot and token.

    -> {"layer", "slot", "token", "times", "weight"}
    """
    size = run.model.config.mem_n_keys**2
    shape = (int(reads["layer"].max()) + 1, size, run.data.vocab_size)
    # One number for each (layer, slot, token), because np.unique is slow on triples.
    key = np.ravel_multi_index((reads["layer"], reads["slot"], reads["token"]), shape)
    key, index = np.unique(key, return_inverse=True)
    columns = dict(zip(("layer", "slot", "token"), np.unravel_index(key, shape)))
    columns["times"] = np.bincount(index, reads["times"]).astype(int)
    columns["weight"] = np.bincount(index, reads["weight"])
    return columns


def plot_track(log, purity, layers, title, path):
    """A histogram of purity; with several rows of the log, usage of slots against steps, too."""
    has_history = len(log) > 1
    plt, fig, (purities, *usage) = figure(1, 3 if has_history else 1)
    if has_history:
        plot_usage(*usage, log)
    for n in np.unique(layers):
        x = purity[layers == n]
        edges = np.linspace(0, 1, 21)
        purities.hist(x, edges, alpha=0.5, label=f"layer {n}: {len(x)} slots read")
    purities.legend()
    purities.set(xlabel="fraction of reads at its most frequent token", ylabel="slots")
    finish_figure(fig, plt, path, title)


def plot_usage(fractions, divergences, log):
    """The fraction of slots that a step reads, and how unevenly, on one axis each."""
    steps = [record["step"] for record in log]
    for axis, name in ((fractions, "fraction"), (divergences, "kl")):
        for n in log[0]["layers"]:
            values = [record["layers"][n][name] for record in log]
            axis.plot(steps, values, "o-", ms=3, label=f"layer {n}")
        axis.legend()
    fractions.set(xlabel="step", ylabel="fraction of slots read in a step", ylim=(0, 1.02))
    divergences.set(xlabel="step", ylabel="KL divergence from even use (nats)", ylim=(0, None))
