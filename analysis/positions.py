"""At which positions, and for which keys, does memory matter?

    python ablate.py position | repeats runs/RUN    # after keys

A drop is always that in the logit difference of the answer.

Letters: N measurements, E examples, B examples, T tokens, n labels of an example.
"""

import math
from functools import partial

import numpy as np
import torch

from analysis.ablation import measure, memory_inputs
from analysis.hooks import forward_from, load_examples, logit_diff, run_with_cache
from analysis.memory_usage import require_slots
from analysis.slot_results import DROP, first_ablation, load_table, mean_drops
from analysis.trained_run import concat, require_facts, save_result, select
from nanorecall.metrics import print_table
from nanorecall.plots import errorbars, figure, finish_figure
from nanorecall.stats import (
    add_holm,
    cluster_means,
    clustered_mean_ci,
    clustered_proportion,
    correlation,
    correlation_lines,
    format_ci,
    mean_ci,
)

# ---- position ------------------------------------------------------------------------------------


def position(run):
    """The drop by answer position, and by the position of the token at which memory is read.

    By answer position: one slot is ablated, as in the result of keys. By token position: the layer
    reads nothing at one token. p: does a position differ from the others?
    """
    require_slots(run)
    columns, ablation = first_ablation(load_table(run, "keys"))
    examples, _ = load_examples(run, np.unique(columns["example"]))
    at_tokens = measure_tokens(run.model, examples)
    by_answer = cells_by(columns, "answer_pos")
    by_token = cells_by(at_tokens, "token_pos")
    # Text of the same form has the same tokens at a position, up to digits.
    tokens = [run.token(token) for token in examples.tokens[0]]
    for layer in by_answer:
        run.finding(describe_positions(layer, "answer position", by_answer[layer]))
        run.finding(describe_positions(layer, "token position", by_token[layer], tokens))
    print_positions(by_answer, f"answer position, one slot ablated ({ablation})")
    print_positions(by_token, "token position, nothing read there", tokens)
    differ = any_differs(by_answer) or any_differs(by_token)
    plot = partial(plot_position, by_answer, by_token, tokens, run.name) if differ else None
    by_slice = {"layer, answer_pos": flatten(by_answer), "layer, token_pos": flatten(by_token)}
    metrics = {"ablation": ablation, "n_examples": len(examples)}
    save_result(run, "position", metrics, by_slice, (), at_tokens, plot)


@torch.no_grad()
def measure_tokens(model, examples):
    """Let each memory layer read nothing at one token -> columns of `measure`, layer, token_pos.

    Only labels that can depend on the token: in the last block the label's own, below it also later
    ones.
    """
    clean = run_with_cache(model, examples)
    before = logit_diff(clean.logits, examples.answers)
    positions = examples.label_pos.cpu().numpy()  # (B, n)
    tables = []
    for layer in model.memory_layers():
        resid, reads, label_pos = memory_inputs(model, layer, clean, examples.label_pos)
        is_last = layer == len(model.layers) - 1
        for t in range(reads["slots"].shape[1]):
            weights = reads["weights"].clone()
            weights[:, t] = 0
            without = {"slots": reads["slots"], "weights": weights}
            logits = forward_from(model, layer, resid, without, label_pos)
            # The last block has only the tokens of labels.
            token_pos = positions[:, t] if is_last else np.full(len(examples), t)
            table = measure(examples, before, logits, {"layer": layer, "token_pos": token_pos})
            of_label = positions.flatten()
            in_reach = of_label == table["token_pos"] if is_last else of_label >= t
            tables.append(select(table, in_reach))
    columns = concat(tables)
    columns["flip"] = ~columns["correct"]
    return columns


def cells_by(columns, name):
    """{layer: {position: {"drop", "flips", "p", "p_holm"}}} by values of the column `name`."""
    by_layer = {}
    for layer in np.unique(columns["layer"]):
        of_layer = select(columns, columns["layer"] == layer)
        examples = np.unique(of_layer["example"])
        positions = np.unique(of_layer[name])
        # One mean for each example and position: examples were sampled, so they are the unit of
        # intervals and tests.
        drops = mean_drops(of_layer, examples, name, positions)
        complete = drops[~np.isnan(drops).any(1)]
        # Where no example has a drop at every position, positions cannot be exchanged.
        p = np.full(len(positions), np.nan)
        if len(complete):
            p = position_permutation_test(complete)
        by_layer[str(layer)] = {}
        for i, value in enumerate(positions.tolist()):
            here = select(of_layer, of_layer[name] == value)
            by_layer[str(layer)][value] = {
                "drop": clustered_mean_ci(here["drop"], here["example"]),
                "flips": clustered_proportion(here["flip"], here["example"]),
                "p": float(p[i]),
            }
    cells = list(flatten(by_layer).values())
    for cell in cells:
        cell["p_holm"] = math.nan
    add_holm([cell for cell in cells if not math.isnan(cell["p"])])
    return by_layer


def flatten(by_layer):
    """{layer: {position: cell}} -> {"layer, position": cell}"""
    cells = {}
    for layer, of_layer in by_layer.items():
        for value, cell in of_layer.items():
            cells[f"{layer}, {value}"] = cell
    return cells


def any_differs(by_layer):
    return any(cell["p_holm"] < 0.05 for cell in flatten(by_layer).values())


def describe_positions(layer, name, cells, tokens=None):
    """One sentence on the positions of a layer."""
    if all(math.isnan(cell["p"]) for cell in cells.values()):
        return f"layer {layer}: no example has a drop at every {name}, so there is no test"
    if not any_differs({layer: cells}):
        return f"layer {layer}: no {name} is seen to matter more or less than the others"
    ends = []
    for choose in (max, min):
        value = choose(cells, key=lambda value: cells[value]["drop"]["value"])
        text = f"{value} ({tokens[value]!r})" if tokens else str(value)
        cell = cells[value]
        ends.append(
            f"{text}: {cell['drop']['value']:.3f} logits, {cell['flips']['value']:.1%} lost"
        )
    return f"layer {layer}: the {name} that matters most is {ends[0]}; least is {ends[1]}"


def print_positions(by_layer, name, tokens=None):
    lines = []
    for layer, cells in by_layer.items():
        for value, cell in cells.items():
            line = [layer, f"{value} {tokens[value]!r}" if tokens else value]
            line += [*format_ci(cell["drop"]), f"{cell['flips']['value']:.3%}"]
            lines.append((*line, f"{cell['p_holm']:.4f}"))
    head = ("layer", name, "examples", "mean drop", "95% interval", "flips", "p (Holm)")
    print_table(head, lines)


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


def plot_position(by_answer, by_token, tokens, title, path):
    """Bars of the drop, for each layer by answer position and by token position."""
    plt, fig, axes = figure(len(by_answer), 2, width=5)
    for row, layer in enumerate(by_answer):
        left, right = axes[2 * row : 2 * row + 2]
        n_examples = max(cell["drop"]["n"] for cell in by_answer[layer].values())
        plot_bars(left, by_answer[layer], [str(value) for value in by_answer[layer]])
        left.set(xlabel="answer position", ylabel=f"mean {DROP} (95%)")
        left.set_title(f"layer {layer}: one slot ablated, n = {n_examples} examples")
        names = [f"{tokens[value]}\n{value}" for value in by_token[layer]]
        plot_bars(right, by_token[layer], names)
        right.set(xlabel="token (of one example) and its position", ylabel=f"mean {DROP} (95%)")
        right.set_title(f"layer {layer}: nothing read at one token")
    finish_figure(fig, plt, path, title)


def plot_bars(axis, cells, names, most=32):
    """Bars of drops with intervals. names: of the bars; at most `most` of them are written."""
    x = np.arange(len(cells))
    drops = [cell["drop"] for cell in cells.values()]
    axis.bar(x, [drop["value"] for drop in drops], color="C0", alpha=0.6)
    errorbars(axis, x, drops, ls="none", marker="", color="black", capsize=2)
    ticks = x[:: max(1, -(-len(x) // most))]
    axis.set_xticks(ticks, [names[i] for i in ticks])


# ---- repeated digits -----------------------------------------------------------------------------


def repeated_digits(run):
    """Do effect and usage depend on repeated digits of the key (111111 has five), or of the value?

    Effect: the mean drop. Usage: how many slots an example reads where an answer depends on them.
    """
    require_slots(run)
    require_facts(run)
    columns, ablation = first_ablation(load_table(run, "keys"))
    examples = np.unique(columns["example"])
    drop = cluster_means(columns["drop"], columns["example"])
    pairs = np.unique(np.stack([columns["example"], columns["layer"], columns["slot"]]), axis=1)
    _, n_slots = np.unique(pairs[0], return_counts=True)
    outcomes = {"effect": drop, "slots read": n_slots}
    measures = digit_measures(run, examples)
    cells = {}
    for outcome, y in outcomes.items():
        for name, x in measures.items():
            cells[f"{outcome}, {name}"] = correlation(x, y, seed=run.config.seed)
    lines = correlation_lines(cells)
    run.finding(describe_repeats(cells))
    head = ("Spearman's correlation", "examples", "value", "95% interval")
    print_table((*head, "p (permutations)", "Holm"), lines)
    related = [name for name, cell in cells.items() if cell["p_holm"] < 0.05]
    columns = {"example": examples, **outcomes, **measures}
    metrics = {"ablation": ablation, "correlation": cells}
    plot = partial(plot_repeats, columns, related, cells, run.name) if related else None
    save_result(run, "repeats", metrics, {}, (), columns, plot)


def digit_measures(run, examples):
    """{what is counted: (E,)} in the texts "key:value " of the examples (E,)."""
    texts, _ = run.data.source.read(run.config.split, examples)
    of_key, of_value, shared = [], [], []
    for text in texts:
        key, value = text.strip().split(":")[:2]
        of_key.append(len(key) - len(set(key)))
        of_value.append(len(value) - len(set(value)))
        shared.append(len(set(key) & set(value)))
    return {
        "repeated digits of the key": np.array(of_key),
        "repeated digits of the value": np.array(of_value),
        "digits that key and value share": np.array(shared),
    }


def describe_repeats(cells):
    """One sentence on the correlations, {"outcome, measure": cell}."""
    related = []
    for name, cell in cells.items():
        if cell["p_holm"] < 0.05:
            outcome, measure = name.split(", ")
            verb = "rises" if cell["value"] > 0 else "falls"
            related.append(f"{outcome} {verb} with {measure} (rho {cell['value']:.2f})")
    if related:
        return "; ".join(related)
    smallest = min(cell["p_holm"] for cell in cells.values())
    return (
        "no dependence of the effect of slots, or of their number, on repeated digits is seen"
        f" (smallest p {smallest:.2f}, Holm)"
    )


def plot_repeats(columns, related, cells, title, path):
    """The correlations that are there: the mean of the outcome at each number of digits."""
    plt, fig, axes = figure(1, len(related))
    for axis, related_pair in zip(axes, related):
        outcome, name = related_pair.split(", ")
        x, y = columns[name], columns[outcome]
        means = []
        for value in np.unique(x):
            mean = mean_ci(y[x == value])
            if mean["n"] == 1:  # no interval
                mean["ci95"] = [mean["value"]] * 2
            means.append(mean)
        errorbars(axis, np.unique(x), means, ls="none")
        jitter = np.random.default_rng(0).uniform(-0.15, 0.15, len(x))
        axis.plot(x + jitter, y, ".", ms=2, alpha=0.5, color="gray")
        axis.set(xlabel=name, ylabel=f"{outcome} (mean, 95%)")
        cell = cells[related_pair]
        axis.set_title(f"rho = {cell['value']:.2f}, p = {cell['p_holm']:.3f}, n = {len(x)}")
    finish_figure(fig, plt, path, title)
