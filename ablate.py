"""Ablate parts of a trained model, or exchange them between examples: which answers change?

    python ablate.py all runs/RUN            # all that fits the run, and ablate_report.md
    python ablate.py keys runs/RUN           # each slot that an example reads; --ablations zero
    python ablate.py layer runs/RUN          # parts of blocks: memory, its values, MLP, attention
    python ablate.py heads runs/RUN          # each head, before the output projection
    python ablate.py force runs/RUN          # and inject, replace, swap: another example's slots
    python ablate.py force runs/RUN --slot 7                    # all examples read slot 7
    python ablate.py replace runs/RUN --slot 7 --pattern mean   # its value becomes the mean
    python ablate.py swap-matrix runs/RUN    # and swap-pred: which digits can stand in for which
    python ablate.py interchanges runs/RUN   # all of these in one figure; reads their results
    python ablate.py swap-positions runs/RUN # reads of one position put at another
    python ablate.py patch runs/RUN          # activation patching, layer by position
    python ablate.py impact runs/RUN         # which slots matter? Reads the result of keys, as do
                                             # keystats, position, repeats and corr
    python ablate.py corr runs/RUN           # which slots can stand in for which?

Each writes ablate_<what>.json, .parquet and .png into the run; position, repeats and corr draw a
figure only if they find an effect. Settings that decide what is measured are part of the name if
they are not the defaults: ablate_swap_exposure_pairs-less_more.json. A command that reads the
result of another takes the one with the same settings, or the only one.

Examples are those that the model answers correctly, balanced over exposures. Effects are measured
as accuracy and as the drop in the logit difference of the answer.

Letters: N measurements, one for each ablation, example and label.
"""

import sys
from dataclasses import dataclass
from functools import partial

import numpy as np

from analysis import (
    importance,
    interchange,
    keystats,
    patching,
    positions,
    substitution,
    swap_matrix,
    swap_positions,
    swap_results,
)
from analysis.ablation import ABLATIONS, SELECTING_ABLATIONS, measure, measure_slots, part_ablations
from analysis.hooks import (
    ablate_head,
    hook_points,
    logit_diff,
    require_blocks,
    require_heads,
    run_with_cache,
    run_with_hooks,
    sample_correct_examples,
)
from analysis.memory_usage import require_slots
from analysis.named_slots import PATTERNS, change_slot
from analysis.trained_run import (
    AnalysisConfig,
    Command,
    combine_columns,
    concat,
    parse_command,
    report,
    run_command,
    save_result,
)
from nanorecall.metrics import print_table
from nanorecall.plots import errorbars, figure, finish_figure
from nanorecall.settings import at_least, one_of, require, run_cli, within
from nanorecall.stats import (
    clustered_mean_ci,
    clustered_mean_proportion,
    clustered_proportion,
    format_ci,
)


@dataclass
class AblateConfig(AnalysisConfig):
    n_examples: int = 100  # examples to measure, of those answered correctly; 0: all of them
    ablations: str = " ".join(ABLATIONS)  # keys: what happens to a slot's weight, value or key
    n_corr_slots: int = 24  # corr: slots of a layer, those that most examples need
    n_cases: int = 10  # corr: examples for each of these slots
    n_pairs: int = 400  # force, inject, replace, swap, swap-matrix: pairs of examples; 0: all
    exposure_pairs: str = "any"  # any, or less_less, more_more, less_more, more_less (base, source)
    exchange: str = "output"  # swap-positions: output (slots and weights), or slots alone
    ablate_batch_size: int = 512  # ablated copies of examples in a forward pass
    slot: int = -1  # force, replace: this slot of the table in every example; -1: pairs of examples
    pattern: str = ""  # with --slot, what its value becomes: zero, random, mean, slot, vector
    value: str = ""  # pattern=slot: a slot's number; vector: numbers "0.5 -1 ...", or a .npy file
    seed: int = 0  # of the examples, pairs and random slots

    def check(self):
        at_least(self, 0, "n_examples", "n_pairs")
        within(self, 0, 2**62, "seed")
        super().check()
        at_least(self, 1, "ablate_batch_size", "n_cases")
        at_least(self, 3, "n_corr_slots")
        names = self.ablations.split()
        known = ", ".join(ABLATIONS)
        for name in names:
            message = (
                f"ablations={self.ablations!r} must be some of these, "
                f"with spaces between them: {known}"
            )
            require(name in ABLATIONS, message, "ablations")
        require(names, f"ablations is empty; choose some of {known}", "ablations")
        one_of(self, interchange.EXPOSURE_PAIRS, "exposure_pairs")
        one_of(self, swap_positions.EXCHANGES, "exchange")
        at_least(self, -1, "slot")
        one_of(self, ("", *PATTERNS), "pattern")
        message = "pattern changes the value of one slot: name it with --slot"
        require(self.slot >= 0 or not self.pattern, message, "pattern")
        message = f"value={self.value!r} needs pattern=slot or pattern=vector"
        require(not self.value or self.pattern in ("slot", "vector"), message, "value")


# ---- slots ---------------------------------------------------------------------------------------


def ablate_slots(run):
    """Ablate each slot that an example reads, in several ways: which slots matter, how much?

    Zero ablation is off-distribution, because the layer was never trained with less weight. The
    other ways replace the slot by the next best one, its value by a mean or another one, or its key
    by zeros or noise, so that the layer may choose other slots.
    """
    require_slots(run)
    c = run.config
    ablations = c.ablations.split()
    k, n_keys = run.model.config.mem_knn, run.model.config.mem_n_keys
    for name in SELECTING_ABLATIONS:
        message = f"ablation {name} needs mem_knn={k} below mem_n_keys={n_keys}; leave it out"
        require(name not in ablations or k < n_keys, message, "ablations")
    examples = sample_correct_examples(run)
    columns = measure_slots(run.model, examples, ablations, c.ablate_batch_size, c.seed, run.world)
    effects = summarize_slots(columns)
    run.finding(describe_ablations(effects))
    print_slot_effects(effects)
    if "zero" in ablations:
        print("zero is off-distribution: no example was trained with less weight.")
    by_slice = {"ablation, layer": {", ".join(key): effect for key, effect in effects.items()}}
    metrics = {"n_examples": len(examples), "ablations": ablations}
    plot = partial(importance.plot_keys, columns, run.name)
    save_result(run, "keys", metrics, by_slice, (), columns, plot)


def print_slot_effects(effects):
    """Print what `summarize_slots` returned."""
    lines = []
    for (ablation, layer), effect in effects.items():
        drop, flip = format_ci(effect["drop"])[1:], format_ci(effect["flip"])[1:]
        lines.append((ablation, layer, effect["n"], *drop, f"{effect['strongest']:.3f}", *flip))
    head = ("ablation", "layer", "slot, label", "mean drop in logit diff", "95% interval", "top 1%")
    print_table((*head, "answers lost", "95% interval"), lines)
    print("Only labels that a read of the slot can reach; control: a slot that is not read.")


def describe_ablations(effects):
    """One sentence on the result of `summarize_slots`: the least and the most harmful ablation."""
    lost = {}
    for (ablation, layer), effect in effects.items():
        if layer != "control":
            lost[f"{ablation}, layer {layer}"] = effect["flip"]["value"]
    most, least = max(lost, key=lost.get), min(lost, key=lost.get)
    text = f"where an example reads a slot, its ablation loses {lost[most]:.2%} of the answers"
    text += f" ({most})"
    if least != most:
        text += f" to {lost[least]:.2%} ({least})"
    return text


def summarize_slots(columns):
    """{(ablation, layer or "control"): {"drop", "flip", "strongest", "n"}}, of labels that count.

    A label counts if the slot is read where the label can depend on it (analysis/slot_results.py).
    Intervals are over examples; strongest is the mean drop of the strongest 1%.
    """
    layer = np.where(columns["control"], "control", columns["layer"].astype(str))
    counts = columns["control"] | (columns["reads_in_reach"] > 0)
    names = [*np.unique(columns["layer"]).astype(str).tolist(), "control"]
    effects = {}
    for ablation in dict.fromkeys(columns["ablation"].tolist()):
        for name in names:
            mask = (columns["ablation"] == ablation) & (layer == name) & counts
            if not mask.any():
                continue
            drop, example = columns["drop"][mask], columns["example"][mask]
            strongest = np.sort(drop)[-max(1, mask.sum() // 100) :].mean()
            effects[ablation, name] = {
                "drop": clustered_mean_ci(drop.astype(float), example),
                "flip": clustered_mean_proportion(columns["flip"][mask], example),
                "strongest": float(strongest),
                "n": int(mask.sum()),
            }
    return effects


# ---- parts of blocks and heads -------------------------------------------------------------------


def ablate_layers(run):
    """Ablate what each block adds: attention or another mixer, MLP, memory; its values or keys."""
    require_blocks(run)
    ablations = part_ablations(run.model, run.config.seed)
    require(ablations, "its blocks have no att, ffn or memory, which could be ablated", None)
    examples = sample_correct_examples(run)
    clean = logit_diff(run_with_cache(run.model, examples).logits, examples.answers)
    tables = []
    for (layer, what), (hooks, intervene) in ablations.items():
        logits = run_with_hooks(run.model, examples, hooks, intervene)
        tables.append(measure(examples, clean, logits, {"layer": layer, "what": what}))
    columns = concat(tables)
    parts = summarize_by(columns, "layer", "what")
    run.finding(describe_effects(parts))
    by_position = summarize_by(columns, "layer", "what", "answer_pos")
    print_effects("layer, ablated", parts)
    by_slice = {"layer, what": parts, "layer, what, answer_pos": by_position}
    plot = partial(plot_effects, "layer, ablated", parts, by_position, run.name)
    save_result(run, "layer", {"n_examples": len(examples)}, by_slice, (), columns, plot)


def ablate_heads(run):
    """Ablate each head: which are needed, at which answer position, for which answer?"""
    require_heads(run)
    examples = sample_correct_examples(run)
    clean = logit_diff(run_with_cache(run.model, examples).logits, examples.answers)
    all_heads = []
    for layer, mixer in hook_points(run.model)["mixer"].items():
        for head in range(mixer.n_heads):
            all_heads.append((layer, mixer, head))

    def measure_head(item):
        layer, mixer, head = item
        hook = ablate_head(mixer.out_proj, mixer.n_heads, head)
        logits = run_with_hooks(run.model, examples, [hook])
        about = {"layer": layer, "head": head, "name": f"L{layer}H{head}"}
        return measure(examples, clean, logits, about)

    columns = concat(run.world.shared_map(measure_head, all_heads))
    heads = summarize_by(columns, "name")
    run.finding(describe_effects(heads))
    by_position = summarize_by(columns, "name", "answer_pos")
    by_answer, most_needed = summarize_by_answer(columns, run.token)
    print_effects("ablated head", heads)
    if most_needed:
        pairs = [f"{token!r}: {name}" for token, name in most_needed.items()]
        run.finding(f"the head that each answer needs most: {', '.join(pairs)}")
    by_slice = {"head": heads, "head, answer_pos": by_position, "answer, head": by_answer}
    metrics = {"n_examples": len(examples), "head of each answer": most_needed}
    plot = partial(plot_effects, "ablated head", heads, by_position, run.name)
    save_result(run, "heads", metrics, by_slice, (), columns, plot)


def summarize(columns, mask):
    """Accuracy that is left and mean drop, of measurements mask (N,); intervals over examples."""
    example = columns["example"][mask]
    return {
        "accuracy": clustered_proportion(columns["correct"][mask], example),
        "drop": clustered_mean_ci(columns["drop"][mask], example),
    }


def summarize_by(columns, *names):
    """{"value, value": `summarize`} for each combination of values of these columns."""
    keys = combine_columns(columns, *names)
    return {key: summarize(columns, keys == key) for key in dict.fromkeys(keys.tolist())}


def summarize_by_answer(columns, token, most=24):
    """{"answer, head": `summarize`} and {answer: the head with the largest drop}.

    Both are empty if there are more than `most` answers. token: function from an id to text.
    """
    answers = np.unique(columns["answer"])
    by_answer, most_needed = {}, {}
    if len(answers) > most:
        return by_answer, most_needed
    for answer in answers:
        drops = {}
        for name in dict.fromkeys(columns["name"].tolist()):
            mask = (columns["name"] == name) & (columns["answer"] == answer)
            effect = summarize(columns, mask)
            by_answer[f"{token(answer)!r}, {name}"] = effect
            drops[name] = effect["drop"]["value"]
        most_needed[token(answer)] = max(drops, key=drops.get)
    return by_answer, most_needed


def describe_effects(effects, spared=0.95):
    """What is needed most, and how many can be spared, as a sentence.

    effects: what `summarize_by` returned, of layers or heads. spared: the accuracy without it.
    """

    def accuracy(name):
        return effects[name]["accuracy"]["value"]

    worst = min(effects, key=accuracy)
    # Heads are named "L1H2", and parts of a block "layer, part".
    layer, _, part = worst.partition(", ")
    needed = f"the {part} of layer {layer}" if part else f"head {worst}"
    _, value, interval = format_ci(effects[worst]["accuracy"])
    n_spared = sum(accuracy(name) >= spared for name in effects)
    return (
        f"{needed} is needed most: without it {value} ({interval}) of the answers are correct; "
        f"{n_spared} of {len(effects)} can be spared one at a time, with {spared:.0%} still correct"
    )


def print_effects(head, effects):
    lines = []
    for name, effect in effects.items():
        lines.append((name, *format_ci(effect["accuracy"]), *format_ci(effect["drop"])[1:]))
    columns = ("labels", "accuracy left", "95% interval", "mean drop in logit diff", "95% interval")
    print_table((head, *columns), lines)


def plot_effects(name, effects, by_position, title, path):
    """Accuracy that is left after each ablation, and the drop by answer position."""
    plt, fig, (left, right) = figure(1, 2, width=5.5, grid=False)
    fig.set_size_inches(11, max(3.2, 0.6 + 0.24 * len(effects)))
    height = np.arange(len(effects))[::-1]
    accuracies = [effect["accuracy"] for effect in effects.values()]
    errorbars(left, height, accuracies, horizontal=True, ls="none")
    left.set_yticks(height, list(effects))
    n = accuracies[0]["n"]
    left.set(xlabel=f"accuracy left (95%, n = {n} labels)", xlim=(-0.02, 1.02), ylabel=name)
    drops = np.array([effect["drop"]["value"] for effect in by_position.values()])
    drops = drops.reshape(len(effects), -1)
    image = right.imshow(drops, aspect="auto", cmap="magma_r", vmin=0)
    right.set_xticks(range(drops.shape[1]))
    right.set_yticks(range(len(effects)), list(effects))
    right.set_xlabel("answer position")
    fig.colorbar(image, ax=right, label="mean drop in logit difference")
    finish_figure(fig, plt, path, title)


# ---- commands ------------------------------------------------------------------------------------


def run_all(run):
    """Every command that fits, and ablate_report.md."""
    names = [name for name in COMMANDS if name != "all"]
    report(run, "ablate.py", COMMANDS, names, "ablate_report.md")


# Settings of the commands. KEYS and PAIRS also choose the result of `keys` or `swap` to read.
KEYS = ("n_examples", "seed", "ablations")
PAIRS = ("n_examples", "seed", "n_pairs", "exposure_pairs")
SLOT = ("slot", "pattern", "value")
CORR = ("n_corr_slots", "n_cases")
EXAMPLES = ("n_examples", "seed")
BATCH = ("ablate_batch_size",)


def force_or_replace(run, name):
    """With --slot, change it in every example; without, the strongest slots of pairs."""
    change = change_slot if run.config.slot >= 0 else interchange.interchange
    change(run, name)


force = partial(force_or_replace, name="force")
replace = partial(force_or_replace, name="replace")
inject = partial(interchange.interchange, name="inject")
swap = partial(interchange.interchange, name="swap")

COMMANDS = {
    "keys": Command(ablate_slots, KEYS + BATCH, "Each slot that an example reads, ablated."),
    "impact": Command(importance.impact, KEYS, "Which slots matter, how much, for which facts?"),
    "keystats": Command(keystats.keystats, KEYS, "How slots are read, how their effects vary."),
    "occurrences": Command(keystats.occurrences, (), "How evenly the slots are read."),
    "position": Command(positions.position, KEYS, "At which answer position do slots matter?"),
    "repeats": Command(positions.repeated_digits, KEYS, "Do repeated digits of a key matter?"),
    "layer": Command(ablate_layers, EXAMPLES, "Parts of blocks, ablated: which are needed?"),
    "heads": Command(ablate_heads, EXAMPLES, "Which heads are needed, where, for which digit?"),
    "force": Command(
        force, PAIRS + SLOT + BATCH, "One head reads only the source's strongest slot."
    ),
    "inject": Command(inject, PAIRS + BATCH, "All reads of the source at one label of a layer."),
    "replace": Command(
        replace, PAIRS + SLOT + BATCH, "The strongest slot gets the source's value."
    ),
    "swap": Command(swap, PAIRS + BATCH, "The source's slots with the base's own weights."),
    "swap-matrix": Command(
        swap_matrix.swap_matrix, PAIRS + BATCH, "Which digits stand in for which?"
    ),
    "swap-positions": Command(
        swap_positions.swap_positions,
        PAIRS + BATCH + ("exchange",),
        "Does what memory holds depend on the position?",
    ),
    "interchanges": Command(
        swap_results.interchanges, PAIRS, "All interchanges in one figure, with controls."
    ),
    "swap-pred": Command(swap_results.swap_predictions, PAIRS, "What does each digit turn into?"),
    "corr": Command(
        substitution.substitution, KEYS + CORR + BATCH, "Which slots can stand in for which?"
    ),
    "patch": Command(patching.patch, EXAMPLES, "Activation patching: where is the answer decided?"),
    "all": Command(
        run_all, KEYS + CORR + PAIRS + BATCH + ("exchange",), "Everything that fits the run."
    ),
}


def parse(argv):
    """Command line -> name of the command, its paths, AblateConfig."""
    return parse_command(argv, __doc__, COMMANDS, AblateConfig)


def main(argv=None):
    name, paths, config = parse(sys.argv[1:] if argv is None else argv)
    run_command(name, paths, config, COMMANDS, prefix="ablate")


if __name__ == "__main__":
    run_cli(main)
