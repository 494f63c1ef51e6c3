"""At which positions, and for which keys, do slots matter? Reads what `ablate.py keys` measured.

    python ablate.py position | repeats runs/RUN    # after keys

A drop is always that in the logit difference of the answer.

Letters: N measurements, E examples.
"""

from functools import partial

import numpy as np

from analysis.editing import require_facts
from analysis.memory_usage import require_slots
from analysis.slot_results import (
    DROP,
    correlation_lines,
    first_ablation,
    load_table,
    mean_drops,
    per_value_mean,
)
from analysis.trained_run import save_result, select
from nanorecall.metrics import print_table
from nanorecall.plots import errorbars, figure, finish_figure
from nanorecall.stats import add_holm, clustered_proportion, correlation, format_ci, mean_ci

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
    examples, drop = per_value_mean(columns["example"], columns["drop"])
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
