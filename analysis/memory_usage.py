"""Which slots of its memory layers a model reads, how long their values are, and at which tokens they are read.

    python eval.py activations runs/RUN    # slots and weights by row, layer, position and head
    python eval.py norms runs/RUN          # lengths of the value rows, and of what is read from them
    python eval.py track runs/RUN          # the tokens at which each slot is read; use of the slots while training

Letters: B rows, T tokens in a row, H heads, k slots that a head reads.
"""

import math

import numpy as np
import torch

from analysis.trained_run import map_batches, save_result
from memory import slot_usage
from nanorecall.checkpoint import read_log
from nanorecall.metrics import errorbars, figure, finish_figure, format_ci, mean_ci, mean_share, print_table
from nanorecall.rng import IGNORE_INDEX


def why_not_slots(look):
    """Why there are no slots to look at, or ""."""
    return "" if hasattr(look.model, "memories") else f"{look.plan.train.model} has no memory layers"


def reads(look, batch):
    """Everything that memory layers read: one element for each row, layer, position, head and slot, padding left out."""
    *_, found = look.model(batch.tokens, trace=True)
    real = (batch.tokens != look.pad).cpu()  # (B, T)
    b, t = real.nonzero(as_tuple=True)
    asked = (batch.targets != IGNORE_INDEX).cpu()[b, t]
    parts = []
    for layer, f in zip(look.model.memories(), found):
        slots, weights = (f[name].cpu()[b, t] for name in ("slots", "weights"))  # (tokens, H, k)
        H, k = slots.shape[1:]
        each = {"row": torch.from_numpy(batch.rows)[b], "position": t, "token": batch.tokens.cpu()[b, t], "labelled": asked}
        flat = {name: x.repeat_interleave(H * k) for name, x in each.items()}
        head = torch.arange(H).repeat_interleave(k).repeat(len(slots))
        read = {
            "layer": torch.full_like(head, layer),
            "head": head,
            "slot": slots.flatten(),
            "weight": weights.float().flatten(),
        }
        parts.append(flat | read)
    return {name: torch.cat([p[name] for p in parts]).numpy() for name in parts[0]}


def usage_stats(slots, size):
    """How reads (n,) spread over a table: slots used, their share, the number of equally used ones that would be as uncertain
    (exp of the entropy), and the KL divergence from even use in nats."""
    u = slot_usage(torch.from_numpy(np.bincount(slots, minlength=size)))
    return {"used": size - u["dead"], "share": u["share"], "effective": size / math.exp(u["kl"]), "kl": u["kl"]}


def activations(look):
    """Which slots each row reads, by layer, position and head."""
    found = map_batches(look, lambda batch: reads(look, batch))
    size = look.model.config.mem_n_keys**2
    layers = np.unique(found["layer"])
    by_slice = {"layer": {}, "layer and position": {}}
    for layer in layers:
        mine = found["layer"] == layer
        by_slice["layer"][str(layer)] = usage_stats(found["slot"][mine], size)
        for t in np.unique(found["position"][mine]):
            here = mine & (found["position"] == t)
            by_slice["layer and position"][f"{layer}, {t}"] = usage_stats(found["slot"][here], size)
    if look.world.is_main:
        rows = []
        for layer, u in by_slice["layer"].items():
            slots, times = np.unique(found["slot"][found["layer"] == int(layer)], return_counts=True)
            best = np.argsort(times)[::-1][:5]
            often = " ".join(f"{slots[i]}:{times[i] / times.sum():.1%}" for i in best)
            rows.append((layer, u["used"], f"{u['share']:.1%}", f"{u['effective']:.0f}", f"{u['kl']:.2f}", often))
        print_table(("layer", "slots used", f"of {size}", "effective", "KL from even", "most read"), rows)
    metrics = {"slots": size, "rows": len(np.unique(found["row"])), "reads": len(found["slot"])}
    plot = lambda path: plot_activations(path, found, by_slice, size, look.name)
    save_result(look, "activations", metrics, by_slice, read_examples(look, found), found, plot)


def read_examples(look, found, count=4, top=5):
    """A few rows: at each label, the slots read with the largest weights in each layer, as (first sub-key, second, weight)."""
    n = look.model.config.mem_n_keys
    rows = np.unique(found["row"])
    for row in rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]:
        tokens, _, *_ = look.data.batch(look.config.split, 0, [row])
        mine = (found["row"] == row) & found["labelled"]
        top_slots = {}
        for layer, t in sorted({*zip(found["layer"][mine].tolist(), found["position"][mine].tolist())}):
            here = np.flatnonzero(mine & (found["layer"] == layer) & (found["position"] == t))
            best = here[np.argsort(-found["weight"][here])][:top]
            slots = [(int(found["slot"][i]) // n, int(found["slot"][i]) % n, round(float(found["weight"][i]), 4)) for i in best]
            top_slots.setdefault(f"layer {layer}", {})[f"position {t}"] = slots
        yield {"row": int(row), "text": look.text(tokens[0].numpy())[-200:], "top_slots": top_slots}


def plot_activations(path, found, by_slice, size, title):
    """How unevenly slots are read; how many at each position."""
    plt, fig, (left, right) = figure(1, 2)
    for layer in by_slice["layer"]:
        times = np.sort(np.bincount(found["slot"][found["layer"] == int(layer)], minlength=size))[::-1]
        left.plot(np.arange(1, size + 1), times / times.sum(), label=f"layer {layer}")
        at = {
            int(k.split(", ")[1]): u["effective"]
            for k, u in by_slice["layer and position"].items()
            if k.split(", ")[0] == layer
        }
        right.plot(list(at), list(at.values()), "o-", ms=3, label=f"layer {layer}")
    left.axhline(1 / size, ls="--", color="gray", lw=1, label="even use")
    left.set(xscale="log", yscale="log", xlabel="slots, most read first", ylabel="share of reads")
    right.set(xlabel="position in the row", ylabel=f"effective number of slots (of {size})")
    right.set_ylim(0, 1.1 * right.get_ylim()[1])
    for axis in (left, right):
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    finish_figure(fig, plt, path, f"{title}, {len(np.unique(found['row']))} rows")


# ---- norms -------------------------------------------------------------------------------------------------------------


def norms(look):
    """Lengths of the value rows, of slots read and never read, and of what is read at each position."""

    def work(batch):
        *_, found = look.model(batch.tokens, trace=True)
        b, t = (batch.tokens != look.pad).nonzero(as_tuple=True)
        parts = [(layer, f["read"][b, t].float().norm(dim=-1).cpu().numpy()) for layer, f in zip(look.model.memories(), found)]
        return {
            "layer": np.repeat([layer for layer, _ in parts], len(b)),
            "position": np.tile(t.cpu().numpy(), len(parts)),
            "norm": np.concatenate([x for _, x in parts]),
        }

    found = map_batches(look, work)
    read = map_batches(look, lambda batch: {k: v for k, v in reads(look, batch).items() if k in ("layer", "slot")})
    tables, by_slice = value_norms(look.model, read), {"layer and position": {}}
    for layer in np.unique(found["layer"]):
        for t in np.unique(found["position"]):
            here = found["norm"][(found["layer"] == layer) & (found["position"] == t)]
            if len(here):
                by_slice["layer and position"][f"{layer}, {t}"] = {**mean_ci(here), "std": float(here.std())}
    metrics = {}
    for name, (lengths, used) in tables.items():
        metrics[name] = {kind: mean_ci(x) for kind, x in (("read", lengths[used]), ("never read", lengths[~used])) if len(x)}
    if look.world.is_main:
        cells = [(f"value rows, {name}, {kind}", c) for name, m in metrics.items() for kind, c in m.items()]
        places = [(f"read in layer {k.replace(', ', ', position ')}", c) for k, c in by_slice["layer and position"].items()]
        cells += places if len(places) <= 60 else []  # the figure shows them better
        print_table(("length of", "n", "mean", "95% interval"), [(name, *format_ci(c)) for name, c in cells])
    save_result(look, "norms", metrics, by_slice, (), found, lambda path: plot_norms(path, tables, by_slice, look.name))


def value_norms(model, read):
    """{"layers 0 1": (lengths of the rows (slots,), which were read (slots,) bool)}, a shared table once."""
    tables = {}
    for layer, memory in model.memories().items():
        tables.setdefault(id(memory.values), (memory.values, []))[1].append(layer)
    out = {}
    for values, layers in tables.values():  # a slot of a shared table is in use if any layer reads it
        used = np.zeros(len(values), bool)
        used[read["slot"][np.isin(read["layer"], layers)]] = True
        out["layers " + " ".join(map(str, layers))] = (values.detach().float().norm(dim=1).cpu().numpy(), used)
    return out


def plot_norms(path, tables, by_slice, title):
    plt, fig, (left, right) = figure(1, 2)
    for name, (lengths, used) in tables.items():
        edges = np.linspace(0, lengths.max() * 1.05, 40)
        for kind, x in (("read", lengths[used]), ("never read", lengths[~used])):
            if len(x):
                left.hist(x, edges, alpha=0.5, label=f"{name}, {kind}: n = {len(x)}")
    left.set(xlabel="length of a value row", ylabel="slots")
    for layer in dict.fromkeys(k.split(", ")[0] for k in by_slice["layer and position"]):
        cells = {int(k.split(", ")[1]): c for k, c in by_slice["layer and position"].items() if k.split(", ")[0] == layer}
        errorbars(right, list(cells), list(cells.values()), label=f"layer {layer}, n = {max(c['n'] for c in cells.values())}")
    right.set(xlabel="position in the row", ylabel="mean length of what is read (95%)", ylim=(0, None))
    for axis in (left, right):
        axis.legend(fontsize=7)
    finish_figure(fig, plt, path, title)


# ---- tokens of a slot --------------------------------------------------------------------------------------------------


def track(look):
    """The tokens at which each slot is read, and how the use of slots grew in training (log.jsonl, mem_stats_every)."""
    found = map_batches(
        look, lambda batch: {k: v for k, v in reads(look, batch).items() if k in ("layer", "slot", "token", "weight")}
    )
    size, vocabulary = look.model.config.mem_n_keys**2, look.data.vocab_size
    # One number for each (layer, slot, token), to count them in one pass; taken apart again below.
    place = (found["layer"].astype(np.int64) * size + found["slot"]) * vocabulary + found["token"]
    key, which, times = np.unique(place, return_inverse=True, return_counts=True)
    token, slot, layer = key % vocabulary, key // vocabulary % size, key // vocabulary // size
    cells = {"layer": layer, "slot": slot, "token": token, "times": times, "weight": np.bincount(which, found["weight"])}
    cells["text"] = [look.token(t) for t in token]
    group, which = np.unique(layer * size + slot, return_inverse=True)
    # Purity: does a slot stand for one token, or is it read all over the text?
    sums, most = np.bincount(which, times), np.zeros(len(group))
    np.maximum.at(most, which, times)
    purity = {str(n): mean_share((most / sums)[group // size == n]) for n in np.unique(layer)}
    log = [r for r in read_log(look.folder) if r["kind"] == "memory"]
    if look.world.is_main:
        lines = []
        for n in np.unique(layer):
            mine = np.flatnonzero(group // size == n)
            for g in mine[np.argsort(-sums[mine])][:5]:
                at = np.flatnonzero(which == g)
                best = at[np.argsort(-times[at])][:4]
                often = " ".join(f"{cells['text'][i]!r}:{times[i] / sums[g]:.0%}" for i in best)
                lines.append((int(n), int(group[g] % size), int(sums[g]), often))
        print_table(("layer", "slot", "reads", "at these tokens"), lines)
        for n, c in purity.items():
            print(f"layer {n}: a slot's most frequent token has {c['value']:.1%} of its reads on average (n = {c['n']} slots)")
        if not log:
            print("no use of slots in log.jsonl: train with --mem_stats_every 100")
    metrics = {"share of a slot's most frequent token": purity, "while training": log[-1]["layers"] if log else {}}
    save_result(look, "track", metrics, {}, (), cells, lambda path: plot_track(path, log, most / sums, group // size, look.name))


def plot_track(path, log, purity, layer, title):
    plt, fig, (left, middle, right) = figure(1, 3)
    for n in np.unique(layer):
        right.hist(purity[layer == n], np.linspace(0, 1, 21), alpha=0.5, label=f"layer {n}: {(layer == n).sum()} slots read")
    right.set(xlabel="share of its most frequent token", ylabel="slots")
    for n in log[0]["layers"] if log else ():
        for axis, name in ((left, "share"), (middle, "kl")):
            axis.plot([r["step"] for r in log], [r["layers"][n][name] for r in log], "o-", ms=3, label=f"layer {n}")
    left.set(xlabel="step", ylabel="share of slots read in a step", ylim=(0, 1.02))
    middle.set(xlabel="step", ylabel="KL divergence from even use (nats)", ylim=(0, None))
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    finish_figure(fig, plt, path, title)
