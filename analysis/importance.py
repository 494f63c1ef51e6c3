"""Read what `ablate.py keys` measured: which slots matter, where, for which rows. Nothing here runs the model on text.

    python ablate.py keys runs/RUN
    python ablate.py impact | keystats | occurrences | position | repeats | corr | swap-pred runs/RUN

Letters: N measurements, S slots, C clusters, V width of a value.
"""

import math
import os

import numpy as np
import torch

from analysis.patching import DECODING
from analysis.trained_run import BOOLEAN, DECIDE, NUMBER, TEXT, WHOLE, ending, read_parquet, results, save_result
from memory import slot_usage
from nanorecall.checkpoint import read_record
from nanorecall.metrics import print_table
from nanorecall.plots import errorbars, figure, finish_figure
from nanorecall.settings import ConfigError, require, say
from nanorecall.stats import add_holm, clustered_proportion, correlation, format_ci, mean_ci, proportion

COLUMNS = {  # what is read here of each measurement
    "keys": {
        **dict.fromkeys(("row", "layer", "slot", "place", "answer", "reads"), WHOLE),
        **dict.fromkeys(("weight", "fall", "p", "p_clean"), NUMBER),
        **{"mode": TEXT, "control": BOOLEAN, "flip": BOOLEAN},
    },
    "swap": {**dict.fromkeys(("row", "layer", "place"), WHOLE), "fall": NUMBER, "other's": BOOLEAN},
    "swap_matrix": dict.fromkeys(("row", "place", "answer", "other answer", *DECODING), WHOLE),
}


def load_table(run, what):
    """The parquet file that `ablate.py <what>` wrote into the run -> {column: (N,)}

    It is the one of the same settings; if none are given, the only one there is.
    """
    advice = f"python ablate.py {what.replace('_', '-')} {run.folder} writes it"
    end, there = ending(run, what), results(run, what)
    if end not in there and not any(f"_{name}-" in end for name in DECIDE) and there:
        names = ", ".join(f"ablate_{what}{e}" for e in there)
        message = f"{run.folder} has {names}; say with the same settings which is meant"
        require(len(there) == 1, message, None)
        (end,) = there
        run.world.print0(f"reading ablate_{what}{end}")
    run.read.append(end)
    path = os.path.join(run.folder, f"ablate_{what}{end}.parquet")
    columns = read_parquet(path, COLUMNS[what], advice)
    try:
        step = read_record(path[: -len("parquet")] + "json", {"config": {"step": "count"}})[
            "config"
        ]["step"]
    except ConfigError as e:
        raise ConfigError(f"{e}; measure again") from None
    message = f"{path} is of step {step}, the checkpoint of step {run.step}; measure again"
    require(step == run.step, message, "checkpoint")
    memories = run.model.memory_layers()
    if "layer" in columns:
        there = np.isin(columns["layer"], list(memories)).all()
        require(there, f"{path} names layers without a memory; measure again", None)
    if "slot" in columns:
        size = min(len(memory.values) for memory in memories.values())
        there = (columns["slot"] >= 0).all() and (columns["slot"] < size).all()
        require(there, f"{path} names slots that are not there; measure again", None)
    return columns


def first_ablation(columns):
    """Measurements of read slots in the first mode measured (zero, unless --modes says otherwise), and its name."""
    mode = str(columns["mode"][0])
    mine = (columns["mode"] == mode) & ~columns["control"]
    require(mine.any(), "no slot that a row reads was measured; measure keys again", None)
    return {name: v[mine] for name, v in columns.items()}, mode


def slot_table(columns):
    """One row for each block and slot: rows that read it, times, mean, median, largest and spread of the fall, flips."""
    # Sorted by (layer, slot) once and cut, instead of a mask for each of thousands of slots.
    key = columns["layer"].astype(np.int64) * 10**9 + columns["slot"]
    slots, which = np.unique(key, return_inverse=True)
    order = np.argsort(which, kind="stable")
    parts = np.split(order, np.cumsum(np.bincount(which))[:-1])
    fall = [columns["fall"][p] for p in parts]
    return {
        "layer": slots // 10**9,
        "slot": slots % 10**9,
        "rows": np.array([len(np.unique(columns["row"][p])) for p in parts]),
        "mean": np.array([f.mean() for f in fall]),
        "median": np.array([np.median(f) for f in fall]),
        "max": np.array([f.max() for f in fall]),
        "std": np.array([f.std() for f in fall]),
        "flips": np.array([columns["flip"][p].mean() for p in parts]),
    }


def mean_drops(columns, rows, name, values):
    """Mean fall of the lead by row and by value of the column `name` -> (rows, values), nan where nothing was measured.

    >>> measured = {"row": np.array([4, 4, 7]), "slot": np.array([9, 9, 2]), "fall": np.array([1.0, 3.0, 5.0])}
    >>> mean_drops(measured, np.array([4, 7]), "slot", np.array([9, 2])).tolist()
    [[2.0, nan], [nan, 5.0]]
    """
    mine = np.isin(columns["row"], rows) & np.isin(columns[name], values)
    order = np.argsort(values)  # searchsorted wants them ascending
    at = np.searchsorted(rows, columns["row"][mine]), order[np.searchsorted(values, columns[name][mine], sorter=order)]
    sums, counts = np.zeros((2, len(rows), len(values)))
    np.add.at(sums, at, columns["fall"][mine])
    np.add.at(counts, at, 1)
    return np.where(counts > 0, sums / np.maximum(1, counts), np.nan)


# ---- impact ------------------------------------------------------------------------------------------------------------


NEGLIGIBLE = 0.01  # logits


def top_and_all(columns):
    """What the best 5% of slots cost, and what any slot does: falls of the lead by slot, two arrays. The best are chosen on one
    half of the rows and measured on the other, both ways: where they were chosen, they are the best by luck, too."""
    rows, best, every = np.unique(columns["row"]), [], []
    half = np.isin(columns["row"], rows[::2])
    for mine in (half, ~half):
        chosen_on, measured_on = (slot_table({name: v[m] for name, v in columns.items()}) for m in (mine, ~mine))
        order = np.argsort(-chosen_on["mean"])[: max(1, len(chosen_on["mean"]) // 20)]
        best.append(measured_on["mean"][np.isin(measured_on["slot"], chosen_on["slot"][order])])
        every.append(measured_on["mean"])
    return np.concatenate(best), np.concatenate(every)


def impact(run):
    """Per block: mean, median, largest and spread of the fall of the lead, how much more the best slots cost than a random one,
    and how many cost next to nothing."""
    everything = load_table(run, "keys")
    columns, mode = first_ablation(everything)
    slots, by_slice = slot_table(columns), {"layer": {}}
    for block in np.unique(slots["layer"]):
        mine = columns["layer"] == block
        pairs = np.abs(columns["fall"][mine])
        per_slot = slots["mean"][slots["layer"] == block]
        best, every = top_and_all({name: v[mine] for name, v in columns.items()})
        by_slice["layer"][str(block)] = {
            "fall": mean_ci(per_slot),
            "median": float(np.median(columns["fall"][mine])),
            "largest": float(columns["fall"][mine].max()),
            "std": float(columns["fall"][mine].std()),
            "next to nothing": clustered_proportion(pairs < NEGLIGIBLE, columns["row"][mine]),
            "flips": clustered_proportion(columns["flip"][mine], columns["row"][mine]),
            "best 5% of slots": mean_ci(best) if len(best) else None,  # none of them is read in both halves
            "ratio to a random slot": float(best.mean() / max(1e-9, every.mean())) if len(best) else math.nan,
        }
    # Removing a slot that nobody reads must change nothing: a check of the method, printed with its result.
    control = everything["fall"][everything["control"]]
    cells = by_slice["layer"]
    head = ("layer", "slots", "mean fall", "95% interval", "median", "largest", "next to nothing", "best 5% / mean", "flips")
    lines = [
        (
            b,
            *format_ci(c["fall"]),
            f"{c['median']:.4f}",
            f"{c['largest']:.2f}",
            f"{c['next to nothing']['value']:.1%}",
            f"{c['ratio to a random slot']:.1f}",
            f"{c['flips']['value']:.3%}",
        )
        for b, c in cells.items()
    ]
    print_table(head, lines)
    say(
        f"mode {mode}; slots that a row does not read: largest change {np.abs(control).max() if len(control) else 0:.1e} logits"
    )
    rare = frequent_or_rare(columns)
    if rare:
        print("rare facts (fewer exposures than the median) against frequent ones:")
        print_table(
            ("measure", "rare", "95% interval", "frequent", "95% interval"),
            [(k, *format_ci(a)[1:], *format_ci(b)[1:]) for k, (a, b) in rare.items()],
        )
        by_slice["rare, frequent"] = {k: {"rare": a, "frequent": b} for k, (a, b) in rare.items()}
    metrics = {"mode": mode, "largest change by an unread slot": float(np.abs(control).max()) if len(control) else None}
    save_result(run, "impact", metrics, by_slice, (), slots, lambda path: plot_impact(path, columns, slots, run, mode))


def frequent_or_rare(columns):
    """How rows of rare and of frequent facts depend on slots: {measure: (rare, frequent)}, means over rows."""
    if "exposures" not in columns or len(np.unique(columns["exposures"])) < 2:
        return {}
    rows, first, which = np.unique(columns["row"], return_index=True, return_inverse=True)
    exposures, out = columns["exposures"][first], {}
    high = exposures > np.median(exposures)  # frequent: shown more often than half of the rows
    if high.all() or not high.any():
        return {}
    # Effective number: (sum of x)^2 / sum of x^2, n if n slots share the fall evenly, 1 if one has it all.
    total = np.bincount(which, np.maximum(0, columns["fall"]))
    squares = np.bincount(which, np.maximum(0, columns["fall"]) ** 2)
    measures = {
        "mean fall of the lead": np.bincount(which, columns["fall"]) / np.bincount(which),
        "largest fall": np.array([columns["fall"][which == i].max() for i in range(len(rows))]),
        "slots that carry the fall (effective number)": total**2 / np.maximum(1e-12, squares),
        "share of removals that flip an answer": np.bincount(which, columns["flip"]) / np.bincount(which),
    }
    for name, x in measures.items():
        out[name] = (mean_ci(x[~high]), mean_ci(x[high]))
    return out


def plot_keys(path, columns, title):
    """Every mode: how the fall is spread over (row, slot) pairs, by block, and control."""
    modes, blocks = dict.fromkeys(columns["mode"].tolist()), np.unique(columns["layer"])
    plt, fig, axes = figure(1, len(blocks) + 1)
    for axis, block in zip(axes, blocks):
        for mode in modes:
            mine = (columns["mode"] == mode) & (columns["layer"] == block) & ~columns["control"]
            fall = np.sort(columns["fall"][mine])[::-1]
            axis.plot(np.linspace(0, 1, len(fall)), fall, lw=1, label=f"{mode}, n = {len(fall)}")
        axis.set(
            xlabel="(row, slot, label), largest first",
            ylabel="fall of the right answer's lead (logits)",
            title=f"layer {block}",
        )
        axis.set_xscale("symlog", linthresh=1e-3)
        axis.set_xlim(0, 1)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    flips = [
        clustered_proportion(columns["flip"][m], columns["row"][m])
        for m in ((columns["mode"] == mode) & ~columns["control"] for mode in modes)
    ]
    errorbars(axes[-1], range(len(modes)), flips, ls="none")
    axes[-1].set_xticks(range(len(modes)), [f"{m}\nn={c['n']}" for m, c in zip(modes, flips)], fontsize=7)
    axes[-1].set(ylabel="share of removals that flip an answer (95%)", ylim=(0, None))
    finish_figure(fig, plt, path, title)


def plot_impact(path, columns, slots, run, mode, most=60):
    """The importance matrix: rows (examples) by the slots that matter most; and every slot's mean fall, sorted."""
    blocks = np.unique(slots["layer"])
    plt, fig, axes = figure(1, 1 + len(blocks), width=5.2, grid=False)
    for block in blocks:
        mine = slots["layer"] == block
        axes[0].plot(np.sort(slots["mean"][mine])[::-1], lw=1, label=f"layer {block}: {mine.sum()} slots")
        axes[0].axhline(slots["mean"][mine].mean(), ls="--", lw=1, color="gray")
    axes[0].set(xlabel="slots, most important first", ylabel=f"fall of the lead (logits), {mode}")
    axes[0].legend(fontsize=7, title="dashed: a random slot of a layer", title_fontsize=7)
    axes[0].grid(alpha=0.3)
    rows = np.unique(columns["row"])[:most]
    for axis, block in zip(axes[1:], blocks):
        mine = slots["layer"] == block
        total = slots["mean"][mine] * slots["rows"][mine]  # of all rows: a slot of one row would be a column with one dot
        best = slots["slot"][mine][np.argsort(-total)][:most]
        grid = mean_drops({k: v[columns["layer"] == block] for k, v in columns.items()}, rows, "slot", best)
        drawn = axis.imshow(grid, aspect="auto", cmap="magma_r", vmin=0, vmax=np.nanquantile(grid, 0.99))
        axis.set(xlabel=f"the {len(best)} slots with the largest effect", ylabel="row", title=f"layer {block}; white: not read")
        axis.title.set_fontsize(8)
        fig.colorbar(drawn, ax=axis, label="mean fall of the lead (logits)")
    finish_figure(fig, plt, path, f"{run.name}: {len(np.unique(columns['row']))} rows")


# ---- slots -------------------------------------------------------------------------------------------------------------


def keystats(run, clusters=8):
    """Of each slot: how many rows read it, how its effect varies; and groups of slots with alike values (k-means on the
    directions of the value rows), with the silhouette that says whether there are groups at all."""
    columns, mode = first_ablation(load_table(run, "keys"))
    slots = slot_table(columns)
    found, by_slice = {**slots, "cluster": np.zeros(len(slots["slot"]), int)}, {"layer": {}}
    for block in np.unique(slots["layer"]):
        mine = np.flatnonzero(slots["layer"] == block)
        values = run.model.memory_layers()[int(block)].values.detach().float().cpu().numpy()[slots["slot"][mine]]
        group, quality = spherical_k_means(values, min(clusters, len(values) // 2 or 1), run.config.seed)
        by_chance = np.mean(
            [spherical_k_means(permute_columns(values, s), min(clusters, len(values) // 2 or 1), s)[1] for s in range(5)]
        )
        found["cluster"][mine] = group
        often = correlation(slots["rows"][mine], slots["mean"][mine], seed=run.config.seed)
        by_slice["layer"][str(block)] = {
            "rows that read a slot": mean_ci(slots["rows"][mine]),
            "variance of effect": mean_ci(slots["std"][mine] ** 2),
            "silhouette": quality,
            "silhouette of shuffled values": float(by_chance),
            "reads against effect (Spearman)": often,
        }
    head = (
        "layer",
        "slots",
        "rows a slot",
        "variance of effect",
        "silhouette",
        "of shuffled values",
        "reads ~ effect",
        "95% interval",
        "p",
    )
    lines = []
    for b, c in by_slice["layer"].items():
        r, often = c["rows that read a slot"], c["reads against effect (Spearman)"]
        numbers = (f"{r['value']:.1f}", f"{c['variance of effect']['value']:.4f}", f"{c['silhouette']:.3f}")
        lines.append((b, r["n"], *numbers, f"{c['silhouette of shuffled values']:.3f}", *format_ci(often)[1:], f"{often['p']:.4f}"))
    print_table(head, lines)
    save_result(run, "keystats", {"mode": mode}, by_slice, (), found, lambda path: plot_keystats(path, slots, run.name))


def permute_columns(values, seed):
    """Each column in another order: what is left is chance."""
    random = np.random.default_rng(seed)  # each column keeps its values, so their spread is the same
    return np.stack([random.permutation(column) for column in values.T], axis=1)


def spherical_k_means(values, clusters, seed=0, rounds=50):
    """Rows (S, V) by direction into groups -> group (S,), mean silhouette in cosine distance (1: far apart, 0: no groups)."""
    x = values / np.maximum(1e-12, np.linalg.norm(values, axis=1, keepdims=True))
    random = np.random.default_rng(seed)
    centres = x[random.choice(len(x), clusters, replace=False)]
    for _ in range(rounds):
        group = (x @ centres.T).argmax(1)
        sums = np.stack([x[group == c].sum(0) if (group == c).any() else centres[c] for c in range(clusters)])
        centres = sums / np.maximum(1e-12, np.linalg.norm(sums, axis=1, keepdims=True))
    group = (x @ centres.T).argmax(1)
    if len(np.unique(group)) < 2:
        return group, 0.0
    # Silhouette (Rousseeuw 1987): mean distance to its own group, itself left out, against that to the nearest other group.
    distance, sizes = 1 - x @ x.T, np.bincount(group, minlength=clusters)
    sums = np.stack([distance[:, group == c].sum(1) for c in range(clusters)], 1)  # (S, C)
    own = sums[np.arange(len(x)), group] / np.maximum(1, sizes[group] - 1)
    others = np.where(sizes > 0, sums / np.maximum(1, sizes), np.inf)
    others[np.arange(len(x)), group] = np.inf
    nearest = others.min(1)
    quality = np.where(sizes[group] > 1, (nearest - own) / np.maximum(1e-12, np.maximum(nearest, own)), 0)
    return group, float(quality.mean())


def plot_keystats(path, slots, title):
    plt, fig, axes = figure(1, 2)
    for block in np.unique(slots["layer"]):
        mine = slots["layer"] == block
        axes[0].plot(slots["rows"][mine], slots["mean"][mine], ".", ms=3, alpha=0.6, label=f"layer {block}: {mine.sum()} slots")
        axes[1].plot(slots["mean"][mine], slots["std"][mine], ".", ms=3, alpha=0.6, label=f"layer {block}")
    axes[0].set(xlabel="rows that read the slot", ylabel="mean fall of the lead (logits)", xscale="log")
    axes[1].set(xlabel="mean fall of the lead (logits)", ylabel="standard deviation over rows and labels")
    for axis in axes:
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    finish_figure(fig, plt, path, title)


def occurrences(run):
    """How the reads of the rows taken apart spread over the table: slots by times read, unused ones, Gini's coefficient, KL."""
    columns, _ = first_ablation(load_table(run, "keys"))
    first = columns["place"] == 0  # `reads` is of the row and stands at each of its labels: count it once
    by_slice, counts = {"layer": {}}, {}
    for block, memory in run.model.memory_layers().items():
        mine = first & (columns["layer"] == block)
        times = np.bincount(columns["slot"][mine], columns["reads"][mine], minlength=len(memory.values))
        counts[block] = times
        by_slice["layer"][str(block)] = {
            "unused": proportion(int((times == 0).sum()), len(times)),
            "gini": gini(times),
            "kl": slot_usage(torch.from_numpy(times))["kl"],
            "reads": int(times.sum()),
        }
    head = ("layer", "slots", "unused", "95% interval", "Gini", "KL from even (nats)", "reads")
    print_table(
        head, [(b, *format_ci(c["unused"]), f"{c['gini']:.3f}", f"{c['kl']:.3f}", c["reads"]) for b, c in by_slice["layer"].items()]
    )
    flat = {
        "layer": np.repeat(list(counts), [len(t) for t in counts.values()]),
        "slot": np.concatenate([np.arange(len(t)) for t in counts.values()]),
    }
    save_result(
        run,
        "occurrences",
        {},
        by_slice,
        (),
        flat | {"times": np.concatenate(list(counts.values()))},
        lambda path: plot_occurrences(path, counts, run.name),
    )


def gini(times):
    """0: all slots are read alike; near 1: one has all reads.

    >>> gini(np.array([1.0, 1.0])), gini(np.array([0.0, 0.0, 0.0, 4.0]))
    (0.0, 0.75)
    """
    times = np.sort(times)
    n = len(times)
    return float((2 * np.arange(1, n + 1) - n - 1) @ times / (n * times.sum()))


def plot_occurrences(path, counts, title):
    plt, fig, (axis,) = figure(1, 1, width=5)
    top = max(t.max() for t in counts.values())
    edges = np.concatenate([[0, 1], np.unique(np.geomspace(1, top + 1, 24).round())[1:]])
    for block, times in counts.items():
        axis.hist(times, edges, alpha=0.5, label=f"layer {block}: {(times == 0).sum()} of {len(times)} slots never read")
    axis.set(xlabel="times read by the rows taken apart", ylabel="slots", xscale="symlog")
    axis.legend(fontsize=7)
    finish_figure(fig, plt, path, title)


# ---- rows --------------------------------------------------------------------------------------------------------------


def position(run):
    """The fall of the lead by place in the answer and block. p: is a place unlike the others of its block (permutations of the
    places within rows, Holm over all)?"""
    columns, mode = first_ablation(load_table(run, "keys"))
    by_slice = {"layer, place": {}}
    for block in np.unique(columns["layer"]):
        mine = columns["layer"] == block
        rows, places = (np.unique(columns[name][mine]) for name in ("row", "place"))
        by_row = np.nan_to_num(mean_drops({k: v[mine] for k, v in columns.items()}, rows, "place", places))
        # Rows are what was drawn at random, so they are the unit of intervals and tests: one mean for each row and place.
        for i, (place, p) in enumerate(zip(places, position_permutation_test(by_row))):
            here = mine & (columns["place"] == place)
            by_slice["layer, place"][f"{block}, {place}"] = {
                "fall": mean_ci(by_row[:, i]),
                "p": float(p),
                "flips": clustered_proportion(columns["flip"][here], columns["row"][here]),
            }
    add_holm(by_slice["layer, place"].values())
    lines = [
        (k, *format_ci(c["fall"]), f"{c['flips']['value']:.3%}", f"{c['p_holm']:.4f}") for k, c in by_slice["layer, place"].items()
    ]
    print_table(("layer, place in the answer", "rows", "mean fall", "95% interval", "flips", "p (Holm)"), lines)
    save_result(
        run,
        "position",
        {"mode": mode},
        by_slice,
        (),
        None,
        lambda path: plot_position(path, by_slice["layer, place"], run.name, mode),
    )


def position_permutation_test(by_row, draws=2000, seed=0):
    """p for each column of (rows, places): is its mean as far from the rest when places change at random within rows?"""
    random = np.random.default_rng(seed)
    away = lambda x: np.abs(x.mean(0) - x.mean())
    # The identity is one of the permutations, so counts begin at one and no p is 0.
    real, extreme = away(by_row), np.ones(by_row.shape[1])
    for _ in range(draws):
        extreme += away(random.permuted(by_row, axis=1)) >= real - 1e-12
    return extreme / (draws + 1)


def plot_position(path, cells, title, mode):
    plt, fig, (axis,) = figure(1, 1, width=5)
    for block in dict.fromkeys(k.split(", ")[0] for k in cells):
        mine = {int(k.split(", ")[1]): c["fall"] for k, c in cells.items() if k.split(", ")[0] == block}
        errorbars(axis, list(mine), list(mine.values()), label=f"layer {block}, n = {next(iter(mine.values()))['n']} rows")
    axis.set(xlabel="place in the answer", ylabel=f"fall of the lead, {mode} (95%)", ylim=(0, None))
    axis.legend(fontsize=7)
    finish_figure(fig, plt, path, title)


def per_example_mean(columns, rows):
    """Mean fall of the lead of each row: (rows,)"""
    at, which = np.unique(columns["row"], return_inverse=True)
    means = dict(zip(at.tolist(), (np.bincount(which, columns["fall"]) / np.bincount(which)).tolist()))
    return np.array([means[r] for r in rows.tolist()])


def repeated_digits(run):
    """Does it matter whether a key has repeated digits (111111 has five)? Spearman's correlation with the fall of the lead."""
    columns, mode = first_ablation(load_table(run, "keys"))
    rows = np.unique(columns["row"])
    texts = run.data.source.read(run.config.split, rows)[0]
    count = lambda word: len(word) - len(set(word))
    fall, found = per_example_mean(columns, rows), {}
    measures = {
        "repeated digits of the key": [count(t.split(":")[0]) for t in texts],
        "repeated digits of the value": [count(t.strip().split(":")[1]) for t in texts],
        "digits that key and value share": [len(set(t.split(":")[0]) & set(t.strip().split(":")[1])) for t in texts],
    }
    for name, x in measures.items():
        found[name] = correlation(x, fall, seed=run.config.seed)
    add_holm(found.values())
    lines = [(k, *format_ci(c), f"{c['p']:.4f}", f"{c['p_holm']:.4f}") for k, c in found.items()]
    print_table(("Spearman's correlation with the fall", "rows", "value", "95% interval", "p (permutations)", "Holm"), lines)
    columns = {"row": rows, "fall": fall, **{k: np.array(v) for k, v in measures.items()}}
    save_result(
        run,
        "repeats",
        {"mode": mode, "correlation": found},
        {},
        (),
        columns,
        lambda path: plot_repeats(path, measures, fall, found, run.name),
    )


def plot_repeats(path, measures, fall, found, title):
    plt, fig, axes = figure(1, len(measures))
    for axis, (name, x) in zip(axes, measures.items()):
        x = np.array(x)
        errorbars(
            axis,
            np.unique(x),
            [
                mean_ci(fall[x == v]) if (x == v).sum() > 1 else {"value": fall[x == v][0], "ci95": [fall[x == v][0]] * 2}
                for v in np.unique(x)
            ],
        )
        axis.plot(x + np.random.default_rng(0).uniform(-0.15, 0.15, len(x)), fall, ".", ms=2, alpha=0.5, color="gray")
        axis.set(xlabel=name, ylabel="mean fall of the lead (95%)")
        axis.set_title(f"rho = {found[name]['value']:.2f}, p = {found[name]['p']:.3f}, n = {len(x)}", fontsize=8)
    finish_figure(fig, plt, path, title)


def ablation_vs_swap(run):
    """Row by row: does removal of slots cost more where another row's slots (swap) bring the other's answer?"""
    removed, mode = first_ablation(load_table(run, "keys"))
    swapped = load_table(run, "swap")
    by_slice, kept = {"layer, measure": {}}, []
    for block in np.unique(removed["layer"]):
        a, b = ({k: v[c["layer"] == block] for k, v in c.items()} for c in (removed, swapped))
        rows = np.intersect1d(a["row"], b["row"])
        require(
            len(rows) >= 5, "fewer than 5 rows are in both files; measure keys and swap with the same --rows and --seed", None
        )
        x, y = (per_example_mean(c, rows) for c in (a, b))
        # per_example_mean averages whatever stands in "fall": here, whether the answer became the other row's.
        taken = per_example_mean({"row": b["row"], "fall": b["other's"].astype(float)}, rows)
        for name, other in (("fall by swap", y), ("other's answer by swap", taken)):
            for kind in ("pearson", "spearman"):
                by_slice["layer, measure"][f"{block}, {name}, {kind}"] = correlation(x, other, kind, seed=run.config.seed)
        kept.append({"layer": np.full(len(rows), block), "row": rows, "removal": x, "swap": y, "other's": taken})
    cells = by_slice["layer, measure"]
    add_holm(cells.values())
    lines = [(k, *format_ci(c), f"{c['p']:.4f}", f"{c['p_holm']:.4f}") for k, c in cells.items()]
    print_table((f"fall by removal ({mode}) against", "rows", "correlation", "95% interval", "p (permutations)", "Holm"), lines)
    columns = {k: np.concatenate([part[k] for part in kept]) for k in kept[0]}
    save_result(run, "corr", {"mode": mode}, by_slice, (), columns, lambda path: plot_corr(path, columns, run.name))


def plot_corr(path, columns, title):
    plt, fig, axes = figure(1, 2)
    for block in np.unique(columns["layer"]):
        mine = columns["layer"] == block
        for axis, name in zip(axes, ("swap", "other's")):
            axis.plot(
                columns["removal"][mine],
                columns[name][mine],
                ".",
                ms=4,
                alpha=0.7,
                label=f"layer {block}, n = {mine.sum()} rows",
            )
    axes[0].set(xlabel="mean fall of the lead by removal", ylabel="mean fall of the lead by swap")
    axes[1].set(xlabel="mean fall of the lead by removal", ylabel="share of the other's answers by swap")
    for axis in axes:
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    finish_figure(fig, plt, path, title)


def swap_predictions(run):
    """What each digit turns into when two rows exchange all they read, from the file of swap-matrix."""
    columns = load_table(run, "swap_matrix")
    digits, by_slice = np.unique(columns["answer"]), {}
    # Where both rows have the same digit, an exchange cannot be told from none.
    differ = columns["answer"] != columns["other answer"]
    for how in DECODING:
        now = columns[how]
        outcomes = {
            "its own digit": now == columns["answer"],
            "the other row's digit": now == columns["other answer"],
            "a third digit": (now != columns["answer"]) & (now != columns["other answer"]),
        }
        by_slice[how] = {name: clustered_proportion(hit[differ], columns["row"][differ]) for name, hit in outcomes.items()}
        turned = by_slice[f"{how}, digit"] = {}
        for x in digits:
            mine = differ & (columns["answer"] == x)
            for y in np.unique(now[mine]):
                cell = clustered_proportion(now[mine] == y, columns["row"][mine])
                turned[f"{run.token(x)} to {run.token(y)}"] = cell
    print_table(
        ("a digit turns into", "how", "digits", "share", "95% interval"),
        [(k, how, *format_ci(c)) for how in DECODING for k, c in by_slice[how].items()],
    )
    save_result(run, "swap_pred", {}, by_slice, (), None, lambda path: plot_swap_predictions(path, columns, digits, run))


def plot_swap_predictions(path, columns, digits, run):
    plt, fig, axes = figure(1, 2, width=4.8, grid=False)
    differ = columns["answer"] != columns["other answer"]
    for axis, how in zip(axes, DECODING):
        now = np.unique(columns[how])
        counts = np.array([[(differ & (columns["answer"] == x) & (columns[how] == y)).sum() for y in now] for x in digits])
        drawn = axis.imshow(counts / np.maximum(1, counts.sum(1, keepdims=True)), cmap="viridis", vmin=0)
        axis.set_xticks(range(len(now)), [run.token(y) for y in now], fontsize=7)
        axis.set_yticks(range(len(digits)), [run.token(x) for x in digits], fontsize=7)
        axis.set(xlabel="answer after the exchange", ylabel="answer before", title=f"{how}, n = {differ.sum()}")
        axis.title.set_fontsize(8)
        fig.colorbar(drawn, ax=axis, label="share", shrink=0.8)
    finish_figure(fig, plt, path, run.name)
