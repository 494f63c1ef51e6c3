"""Which slots matter, where, for which examples? Reads what `ablate.py keys` and `swap` measured.

    python ablate.py keys runs/RUN
    python ablate.py impact | keystats | occurrences | position | repeats | corr runs/RUN
    python ablate.py swap-pred runs/RUN    # after swap-matrix

Nothing here runs the model. A drop is always that in the logit difference of the answer.

Letters: N measurements, E examples, S slots.
"""

import math
import os
from functools import partial

import numpy as np
import torch

from analysis.clustering import chance_silhouette, spherical_k_means
from analysis.editing import require_facts
from analysis.memory_usage import require_slots
from analysis.swap_matrix import DECODING
from analysis.trained_run import (
    BOOLEAN,
    DECISIVE,
    NUMBER,
    TEXT,
    WHOLE,
    concat,
    list_results,
    read_parquet,
    result_suffix,
    save_result,
    select,
)
from memory import slot_usage
from nanorecall.checkpoint import read_record
from nanorecall.metrics import print_table
from nanorecall.plots import errorbars, figure, finish_figure
from nanorecall.settings import ConfigError, require, say
from nanorecall.stats import (
    add_holm,
    clustered_proportion,
    correlation,
    format_ci,
    mean_ci,
    proportion,
)

DROP = "drop in logit difference"  # in figures

# The columns that are read here of each table, and their kinds.
INTERCHANGE = {
    **dict.fromkeys(("example", "layer", "answer_pos"), WHOLE),
    "drop": NUMBER,
    **dict.fromkeys(("source_answer", "control_answer", "base_lost"), BOOLEAN),
}
COLUMNS = {
    "keys": {
        **dict.fromkeys(("example", "layer", "slot", "answer_pos", "answer", "reads"), WHOLE),
        **dict.fromkeys(("weight", "drop", "p", "p_clean"), NUMBER),
        **{"ablation": TEXT, "control": BOOLEAN, "flip": BOOLEAN},
    },
    **dict.fromkeys(("force", "inject", "replace", "swap"), INTERCHANGE),
    "swap_matrix": {
        **dict.fromkeys(("example", "answer_pos", "answer"), WHOLE),
        **dict.fromkeys(("source_answer_token", "control_answer_token", *DECODING), WHOLE),
    },
}


# ---- tables --------------------------------------------------------------------------------------


def load_table(run, what):
    """The parquet file that `ablate.py <what>` wrote into the run -> {column: (N,)}

    It is the one with the same settings. If the command line names none, it is the only one there.
    ConfigError if there is none, if there are several, or if it does not fit the checkpoint.
    """
    command = what.replace("_", "-")
    suffix, present = result_suffix(run, what), list_results(run, what)
    is_chosen = any(f"_{name}-" in suffix for name in DECISIVE)
    if suffix not in present and present and not is_chosen:
        names = ", ".join(f"ablate_{what}{s}" for s in present)
        message = f"{run.folder} has {names}; name one by giving its settings"
        require(len(present) == 1, message, None)
        suffix = present[0]
        run.world.print0(f"reading ablate_{what}{suffix}")
    run.suffixes_read.append(suffix)
    path = os.path.join(run.folder, f"ablate_{what}{suffix}")
    again = f"run it again: python ablate.py {command} {run.folder}"
    advice = f"python ablate.py {command} {run.folder} writes it"
    columns = read_parquet(path + ".parquet", COLUMNS[what], advice)
    check_table(run, path, columns, again)
    return columns


def check_table(run, path, columns, advice):
    """ConfigError unless the table (path without extension) is of this checkpoint and its slots."""
    try:
        record = read_record(path + ".json", {"config": {"step": "count"}})
    except ConfigError as e:
        raise ConfigError(f"{e}; {advice}") from None
    path += ".parquet"
    step = record["config"]["step"]
    message = f"{path} is of step {step}, and the checkpoint of step {run.step}; {advice}"
    require(step == run.step, message, "checkpoint")
    memory_layers = run.model.memory_layers()
    if "layer" in columns:
        known = np.isin(columns["layer"], list(memory_layers)).all()
        require(known, f"{path} names layers without a memory; {advice}", None)
    if "slot" in columns:
        size = min(len(memory.values) for memory in memory_layers.values())
        known = (columns["slot"] >= 0).all() and (columns["slot"] < size).all()
        require(known, f"{path} names slots that do not exist; {advice}", None)


def first_ablation(columns):
    """Measurements of slots that were read, with the first ablation in the table, and its name.

    That is zero, unless --ablations names others.
    """
    ablation = str(columns["ablation"][0])
    mask = (columns["ablation"] == ablation) & ~columns["control"]
    message = "the result of keys holds no slot that an example reads; run keys again"
    require(mask.any(), message, None)
    return select(columns, mask), ablation


def slot_table(columns):
    """One entry for each layer and slot -> {column: (S,)}

    n_examples that read it; mean, median, max and std of the drop; flips, the fraction that flip.
    """
    key = columns["layer"].astype(np.int64) * 10**9 + columns["slot"]
    keys, which = np.unique(key, return_inverse=True)
    # Sort by slot once, and cut: a mask for each of thousands of slots would be slow.
    order = np.argsort(which, kind="stable")
    statistics = []
    for part in np.split(order, np.cumsum(np.bincount(which))[:-1]):
        drop = columns["drop"][part]
        n_examples = len(np.unique(columns["example"][part]))
        spread = (np.median(drop), drop.max(), drop.std())
        statistics.append((n_examples, drop.mean(), *spread, columns["flip"][part].mean()))
    table = {"layer": keys // 10**9, "slot": keys % 10**9}
    names = ("n_examples", "mean", "median", "max", "std", "flips")
    for name, values in zip(names, zip(*statistics)):
        table[name] = np.array(values)
    return table


def mean_drops(columns, examples, name, values):
    """Mean drop by example and by value of the column `name` -> (examples, values)

    nan where nothing was measured. examples must ascend.

    >>> columns = {"example": np.array([4, 4, 7]), "slot": np.array([9, 9, 2])}
    >>> columns["drop"] = np.array([1.0, 3.0, 5.0])
    >>> mean_drops(columns, np.array([4, 7]), "slot", np.array([9, 2])).tolist()
    [[2.0, nan], [nan, 5.0]]
    """
    mask = np.isin(columns["example"], examples) & np.isin(columns[name], values)
    row = np.searchsorted(examples, columns["example"][mask])
    order = np.argsort(values)  # searchsorted needs ascending values
    column = order[np.searchsorted(values, columns[name][mask], sorter=order)]
    sums = np.zeros((len(examples), len(values)))
    counts = np.zeros_like(sums)
    np.add.at(sums, (row, column), columns["drop"][mask])
    np.add.at(counts, (row, column), 1)
    return np.where(counts > 0, sums / np.maximum(1, counts), np.nan)


def per_example_mean(example, values):
    """Means of values (N,) by example (N,) -> examples (E,), ascending, and their means (E,)."""
    examples, which = np.unique(example, return_inverse=True)
    return examples, np.bincount(which, values) / np.bincount(which)


def correlation_lines(cells):
    """Lines of a table of results of `correlation`, with p adjusted by Holm's method."""
    add_holm(cells.values())
    lines = []
    for name, cell in cells.items():
        lines.append((name, *format_ci(cell), f"{cell['p']:.4f}", f"{cell['p_holm']:.4f}"))
    return lines


# ---- impact --------------------------------------------------------------------------------------

NEGLIGIBLE = 0.01  # logits


def impact(run):
    """How much does the ablation of a slot cost, and how much more that of the best slots?"""
    require_slots(run)
    table = load_table(run, "keys")
    columns, ablation = first_ablation(table)
    slots = slot_table(columns)
    by_layer = {}
    for layer in np.unique(slots["layer"]):
        of_layer = select(columns, columns["layer"] == layer)
        by_layer[str(layer)] = layer_impact(of_layer, slots["mean"][slots["layer"] == layer])
    print_impact(by_layer)
    # The ablation of a slot that is not read must change nothing: a check of the method.
    control = np.abs(table["drop"][table["control"]])
    largest = float(control.max()) if len(control) else None
    change = f"{largest or 0:.1e} logits"
    say(f"ablation {ablation}; largest change by a slot that is not read: {change}")
    by_slice = {"layer": by_layer}
    by_frequency = rare_and_frequent(columns)
    if by_frequency:
        print("rare facts (at most the median of exposures) against frequent ones:")
        lines = []
        for name, cell in by_frequency.items():
            lines.append((name, *format_ci(cell["rare"])[1:], *format_ci(cell["frequent"])[1:]))
        head = ("measure", "rare", "95% interval", "frequent", "95% interval")
        print_table(head, lines)
        by_slice["rare, frequent"] = by_frequency
    metrics = {"ablation": ablation, "largest change by an unread slot": largest}
    plot = partial(plot_impact, columns, slots, run.name, ablation)
    save_result(run, "impact", metrics, by_slice, (), slots, plot)


def layer_impact(columns, mean_of_slot):
    """Drops in one layer: measurements {column: (N,)} and the mean drop of each slot (S,)."""
    drop, example = columns["drop"], columns["example"]
    top, every = top_and_all(columns)
    ratio = float(top.mean() / max(1e-9, every.mean())) if len(top) else math.nan
    return {
        "drop": mean_ci(mean_of_slot),
        "median": float(np.median(drop)),
        "largest": float(drop.max()),
        "std": float(drop.std()),
        "negligible": clustered_proportion(np.abs(drop) < NEGLIGIBLE, example),
        "flips": clustered_proportion(columns["flip"], example),
        # None if none of them is read in both halves of the examples.
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


def print_impact(by_layer):
    lines = []
    for layer, cell in by_layer.items():
        line = [layer, *format_ci(cell["drop"])]
        line += [f"{cell['median']:.4f}", f"{cell['largest']:.2f}"]
        line += [f"{cell['negligible']['value']:.1%}", f"{cell['ratio to a random slot']:.1f}"]
        lines.append((*line, f"{cell['flips']['value']:.3%}"))
    head = ("layer", "slots", "mean drop", "95% interval", "median", "largest")
    print_table((*head, f"below {NEGLIGIBLE}", "best 5% / mean", "flips"), lines)


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


def plot_keys(columns, title, path):
    """Drops of all measurements in falling order, by layer and ablation; and the flips."""
    ablations, layers = dict.fromkeys(columns["ablation"].tolist()), np.unique(columns["layer"])
    plt, fig, axes = figure(1, len(layers) + 1)
    flips = []
    for ablation in ablations:
        is_read = (columns["ablation"] == ablation) & ~columns["control"]
        flips.append(clustered_proportion(columns["flip"][is_read], columns["example"][is_read]))
        for axis, layer in zip(axes, layers):
            drop = np.sort(columns["drop"][is_read & (columns["layer"] == layer)])[::-1]
            label = f"{ablation}, n = {len(drop)}"
            axis.plot(np.linspace(0, 1, len(drop)), drop, lw=1, label=label)
    for axis, layer in zip(axes, layers):
        axis.set(xlabel="(example, slot, label), largest first", title=f"layer {layer}")
        axis.set_ylabel(DROP)
        axis.set_xscale("symlog", linthresh=1e-3)
        axis.set_xlim(0, 1)
        axis.legend()
    errorbars(axes[-1], range(len(flips)), flips, ls="none")
    ticks = [f"{name}\nn={cell['n']}" for name, cell in zip(ablations, flips)]
    axes[-1].set_xticks(range(len(flips)), ticks)
    axes[-1].set(ylabel="fraction of ablations that flip an answer (95%)", ylim=(0, None))
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
        axis.set_title(f"layer {layer}; white: not read")
        fig.colorbar(image, ax=axis, label=f"mean {DROP}")
    sorted_axis.set(xlabel="slots, most important first", ylabel=f"mean {DROP}, {ablation}")
    sorted_axis.legend(title="dashed: a random slot of a layer", title_fontsize=7)
    sorted_axis.grid(True)
    finish_figure(fig, plt, path, f"{title}: {len(examples)} examples")


def scatter_by_layer(axis, table, x, y, unit, **style):
    """Points of two columns, one colour for each layer."""
    for layer in np.unique(table["layer"]):
        mask = table["layer"] == layer
        label = f"layer {layer}: {mask.sum()} {unit}"
        axis.plot(table[x][mask], table[y][mask], ".", label=label, **style)
    axis.legend()


# ---- slots ---------------------------------------------------------------------------------------


def keystats(run, n_clusters=8):
    """How many examples read a slot, how does its effect vary, and do the values form clusters?"""
    require_slots(run)
    columns, ablation = first_ablation(load_table(run, "keys"))
    table = slot_table(columns)
    table["cluster"] = np.zeros(len(table["slot"]), int)
    seed = run.config.seed
    memory_layers = run.model.memory_layers()
    by_layer, lines = {}, []
    for layer in np.unique(table["layer"]):
        in_layer = table["layer"] == layer
        slots = select(table, in_layer)
        values = memory_layers[int(layer)].values.detach().float().cpu().numpy()[slots["slot"]]
        n = min(n_clusters, max(1, len(values) // 2))
        table["cluster"][in_layer], silhouette = spherical_k_means(values, n, seed)
        by_chance = chance_silhouette(values, n)
        readers, variance = mean_ci(slots["n_examples"]), mean_ci(slots["std"] ** 2)
        reads_effect = correlation(slots["n_examples"], slots["mean"], seed=seed)
        by_layer[str(layer)] = {
            "examples that read a slot": readers,
            "variance of effect": variance,
            "silhouette": silhouette,
            "silhouette of permuted values": by_chance,
            "reads against effect (Spearman)": reads_effect,
        }
        line = [layer, readers["n"], f"{readers['value']:.1f}", f"{variance['value']:.4f}"]
        line += [f"{silhouette:.3f}", f"{by_chance:.3f}", *format_ci(reads_effect)[1:]]
        lines.append((*line, f"{reads_effect['p']:.4f}"))
    head = ("layer", "slots", "examples a slot", "variance of effect", "silhouette")
    head += ("of permuted values", "reads ~ effect", "95% interval", "p")
    print_table(head, lines)
    plot = partial(plot_keystats, table, run.name)
    save_result(run, "keystats", {"ablation": ablation}, {"layer": by_layer}, (), table, plot)


def plot_keystats(table, title, path):
    plt, fig, (left, right) = figure(1, 2)
    scatter_by_layer(left, table, "n_examples", "mean", "slots", ms=3, alpha=0.6)
    scatter_by_layer(right, table, "mean", "std", "slots", ms=3, alpha=0.6)
    left.set(xlabel="examples that read the slot", ylabel=f"mean {DROP}", xscale="log")
    right.set_xlabel(f"mean {DROP}")
    right.set_ylabel("standard deviation over examples and labels")
    finish_figure(fig, plt, path, title)


def occurrences(run):
    """How evenly do the examples read the table: unused slots, Gini coefficient, KL divergence."""
    require_slots(run)
    columns, _ = first_ablation(load_table(run, "keys"))
    # `reads` is of an example and stands at each of its labels: count it once.
    columns = select(columns, columns["answer_pos"] == 0)
    by_layer, times, lines = {}, {}, []
    for layer, memory in run.model.memory_layers().items():
        of_layer = select(columns, columns["layer"] == layer)
        n_slots = len(memory.values)
        reads = np.bincount(of_layer["slot"], of_layer["reads"], minlength=n_slots)
        unused = proportion(int((reads == 0).sum()), n_slots)
        coefficient, kl = gini(reads), slot_usage(torch.from_numpy(reads))["kl"]
        n_reads = int(reads.sum())
        by_layer[str(layer)] = {"unused": unused, "gini": coefficient, "kl": kl, "reads": n_reads}
        lines.append((layer, *format_ci(unused), f"{coefficient:.3f}", f"{kl:.3f}", n_reads))
        times[layer] = reads
    head = ("layer", "slots", "unused", "95% interval", "Gini", "KL from even (nats)", "reads")
    print_table(head, lines)
    sizes = [len(reads) for reads in times.values()]
    table = {
        "layer": np.repeat(list(times), sizes),
        "slot": np.concatenate([np.arange(size) for size in sizes]),
        "times": np.concatenate(list(times.values())),
    }
    plot = partial(plot_occurrences, times, run.name)
    save_result(run, "occurrences", {}, {"layer": by_layer}, (), table, plot)


def gini(times):
    """Gini coefficient of reads (S,). 0: all slots are read equally often; near 1: one has all.

    >>> gini(np.array([1.0, 1.0])), gini(np.array([0.0, 0.0, 0.0, 4.0]))
    (0.0, 0.75)
    """
    times = np.sort(times)
    n = len(times)
    return float((2 * np.arange(1, n + 1) - n - 1) @ times / (n * times.sum()))


def plot_occurrences(times, title, path):
    plt, fig, (axis,) = figure(1, 1, width=5)
    most = max(reads.max() for reads in times.values())
    edges = np.concatenate([[0, 1], np.unique(np.geomspace(1, most + 1, 24).round())[1:]])
    for layer, reads in times.items():
        label = f"layer {layer}: {(reads == 0).sum()} of {len(reads)} slots never read"
        axis.hist(reads, edges, alpha=0.5, label=label)
    axis.set(xlabel="times read by these examples", ylabel="slots", xscale="symlog")
    axis.legend()
    finish_figure(fig, plt, path, title)


# ---- examples ------------------------------------------------------------------------------------


def position(run):
    """The drop by answer position and layer. p: does a position differ from the others?"""
    require_slots(run)
    columns, ablation = first_ablation(load_table(run, "keys"))
    cells = {}
    for layer in np.unique(columns["layer"]):
        of_layer = select(columns, columns["layer"] == layer)
        examples, positions = np.unique(of_layer["example"]), np.unique(of_layer["answer_pos"])
        # One mean for each example and position: examples were sampled, so they are the unit of
        # intervals and tests.
        drops = np.nan_to_num(mean_drops(of_layer, examples, "answer_pos", positions))
        p = position_permutation_test(drops)
        for i, answer_pos in enumerate(positions):
            here = select(of_layer, of_layer["answer_pos"] == answer_pos)
            flips = clustered_proportion(here["flip"], here["example"])
            cell = {"drop": mean_ci(drops[:, i]), "p": float(p[i]), "flips": flips}
            cells[f"{layer}, {answer_pos}"] = cell
    add_holm(cells.values())
    lines = []
    for name, cell in cells.items():
        numbers = (f"{cell['flips']['value']:.3%}", f"{cell['p_holm']:.4f}")
        lines.append((name, *format_ci(cell["drop"]), *numbers))
    head = ("layer, answer position", "examples", "mean drop", "95% interval", "flips", "p (Holm)")
    print_table(head, lines)
    plot = partial(plot_position, cells, run.name, ablation)
    by_slice = {"layer, answer_pos": cells}
    save_result(run, "position", {"ablation": ablation}, by_slice, (), None, plot)


def position_permutation_test(drops, draws=2000, seed=0):
    """p (positions,): does a column of drops (examples, positions) differ from the others?

    Under the null hypothesis the positions of an example are exchangeable.
    """
    rng = np.random.default_rng(seed)

    def distance(x):
        return np.abs(x.mean(0) - x.mean())

    observed = distance(drops)
    # The given order is one of the permutations, so counts begin at 1 and no p is 0.
    n_extreme = np.ones(drops.shape[1])
    for _ in range(draws):
        # Equal distances may differ by rounding.
        n_extreme += distance(rng.permuted(drops, axis=1)) >= observed - 1e-12
    return n_extreme / (draws + 1)


def plot_position(cells, title, ablation, path):
    plt, fig, (axis,) = figure(1, 1, width=5)
    by_layer = {}
    for name, cell in cells.items():
        layer, answer_pos = name.split(", ")
        by_layer.setdefault(layer, {})[int(answer_pos)] = cell["drop"]
    for layer, drops in by_layer.items():
        points = list(drops.values())
        label = f"layer {layer}, n = {points[0]['n']} examples"
        errorbars(axis, list(drops), points, label=label)
    axis.set(xlabel="answer position", ylabel=f"mean {DROP}, {ablation} (95%)", ylim=(0, None))
    axis.legend()
    finish_figure(fig, plt, path, title)


def repeated_digits(run):
    """Does the drop depend on repeated digits of the key (111111 has five), or of the value?"""
    require_slots(run)
    require_facts(run)
    columns, ablation = first_ablation(load_table(run, "keys"))
    examples, drop = per_example_mean(columns["example"], columns["drop"])
    texts, _ = run.data.source.read(run.config.split, examples)
    of_key, of_value, shared = [], [], []
    for text in texts:
        key, value = text.strip().split(":")[:2]
        of_key.append(len(key) - len(set(key)))
        of_value.append(len(value) - len(set(value)))
        shared.append(len(set(key) & set(value)))
    measures = {
        "repeated digits of the key": np.array(of_key),
        "repeated digits of the value": np.array(of_value),
        "digits that key and value share": np.array(shared),
    }
    cells = {}
    for name, x in measures.items():
        cells[name] = correlation(x, drop, seed=run.config.seed)
    head = ("Spearman's correlation with the drop", "examples", "value", "95% interval")
    print_table((*head, "p (permutations)", "Holm"), correlation_lines(cells))
    metrics = {"ablation": ablation, "correlation": cells}
    columns = {"example": examples, "drop": drop, **measures}
    plot = partial(plot_repeats, measures, drop, cells, run.name)
    save_result(run, "repeats", metrics, {}, (), columns, plot)


def plot_repeats(measures, drop, correlations, title, path):
    plt, fig, axes = figure(1, len(measures))
    for axis, (name, x) in zip(axes, measures.items()):
        means = []
        for value in np.unique(x):
            mean = mean_ci(drop[x == value])
            if mean["n"] == 1:  # no interval
                mean["ci95"] = [mean["value"]] * 2
            means.append(mean)
        errorbars(axis, np.unique(x), means)
        jitter = np.random.default_rng(0).uniform(-0.15, 0.15, len(x))
        axis.plot(x + jitter, drop, ".", ms=2, alpha=0.5, color="gray")
        axis.set(xlabel=name, ylabel=f"mean {DROP} (95%)")
        cell = correlations[name]
        axis.set_title(f"rho = {cell['value']:.2f}, p = {cell['p']:.3f}, n = {len(x)}")
    finish_figure(fig, plt, path, title)


def ablation_vs_swap(run):
    """Do examples whose slots matter most also change most, when they get a source's slots?"""
    require_slots(run)
    require_facts(run)
    ablated, ablation = first_ablation(load_table(run, "keys"))
    swapped = load_table(run, "swap")
    cells, tables = {}, []
    for layer in np.unique(ablated["layer"]):
        table = join_by_example(ablated, swapped, layer)
        tables.append(table)
        x = table["drop_by_ablation"]
        for name in ("drop_by_swap", "source_answer_by_swap"):
            for kind in ("pearson", "spearman"):
                cell = correlation(x, table[name], kind, seed=run.config.seed)
                cells[f"{layer}, {name}, {kind}"] = cell
    head = (f"drop by ablation ({ablation}) against", "examples", "correlation", "95% interval")
    print_table((*head, "p (permutations)", "Holm"), correlation_lines(cells))
    columns = concat(tables)
    plot = partial(plot_corr, columns, run.name)
    by_slice = {"layer, measure": cells}
    save_result(run, "corr", {"ablation": ablation}, by_slice, (), columns, plot)


def join_by_example(ablated, swapped, layer):
    """Means by example in one layer, for examples that are in both tables -> {column: (E,)}"""
    ablated = select(ablated, ablated["layer"] == layer)
    swapped = select(swapped, swapped["layer"] == layer)
    examples = np.intersect1d(ablated["example"], swapped["example"])
    message = "fewer than 5 examples are in the results of both keys and swap; run both again with"
    require(len(examples) >= 5, f"{message} the same --n_examples and --seed", None)
    ablated = select(ablated, np.isin(ablated["example"], examples))
    swapped = select(swapped, np.isin(swapped["example"], examples))
    _, drop_by_ablation = per_example_mean(ablated["example"], ablated["drop"])
    _, drop_by_swap = per_example_mean(swapped["example"], swapped["drop"])
    _, source_answer = per_example_mean(swapped["example"], swapped["source_answer"])
    return {
        "layer": np.full(len(examples), layer),
        "example": examples,
        "drop_by_ablation": drop_by_ablation,
        "drop_by_swap": drop_by_swap,
        "source_answer_by_swap": source_answer,
    }


def plot_corr(columns, title, path):
    plt, fig, axes = figure(1, 2)
    labels = (f"mean {DROP} by swap", "fraction of source answers by swap")
    for axis, name, label in zip(axes, ("drop_by_swap", "source_answer_by_swap"), labels):
        scatter_by_layer(axis, columns, "drop_by_ablation", name, "examples", ms=4, alpha=0.7)
        axis.set(xlabel=f"mean {DROP} by ablation", ylabel=label)
    finish_figure(fig, plt, path, title)
