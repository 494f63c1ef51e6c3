"""Compare ways to change the facts that a model knows (editors.py).

    python eval.py edit runs/RUN                       # rewrite 1 to 100 facts
    python eval.py edit runs/RUN --n_edits "[1,300]"
    python eval.py edit runs/RUN --new_facts 1         # add facts with new keys instead
    python eval.py edit runs/RUN --n_edits "[100]" --portions 10         # ten facts after ten
    python eval.py edit runs/RUN --editors "closed form; sparse tf-idf"  # or all

Efficacy: edited facts get their new answer. Specificity: other facts keep theirs. Facts with two
wordings and two-hop questions are also asked in ways that were not edited (edit_reach.py).
"""

import functools
import math
from collections import namedtuple

import numpy as np
import torch

from analysis.edit_reach import REACH, describe_reach, editable_facts, require_editable_facts
from analysis.editing import check_editable
from analysis.editors import (
    answer_probabilities,
    answered,
    applicable_editors,
    choose_editors,
    n_correct,
    say_margin,
    why_not,
)
from analysis.mlp_editing import check_mlp_editable
from analysis.peak_memory import peak_memory_of
from analysis.stored_facts import stored_bits
from analysis.trained_run import (
    correct_examples,
    in_float32,
    predictions,
    require_facts,
    require_single_process,
    save_result,
)
from nanorecall.metrics import print_table
from nanorecall.plots import errorbars, figure, finish_figure
from nanorecall.settings import require, say
from nanorecall.stats import format_ci, proportion
from nanorecall.twohop import read_two_hop

METRICS = {
    "efficacy": "edited facts, new answer",
    "specificity": "facts that the editor was not shown, old answer",
    "specificity, shown": "facts that the editor was shown, old answer",
    "retained": "all facts that the model knew and that are not edited, old answer",
}
LAST_PORTION = {"last_portion": "facts of the last portion, new answer"}
NUMBERS = {  # without an interval
    "probability": "of the new answers, all tokens of each: mean over the edited facts",
    "seconds": "time of the portion",
    "peak_memory": "bytes by which memory in use rose meanwhile",
    "slots": "slots of which a value has changed",
    "bytes": "bytes of weights that have changed",
    "growth": "norm of these weights over their norm before",
}

# Facts that are edited and measured together, as (tokens, targets) each:
#   edited   with their new answers
#   kept     that an editor may use
#   unseen   that it may not use
#   old      all that are not edited; groups (facts,): the group of each
#   beyond   {metric of REACH: facts}
Cell = namedtuple("Cell", "edited kept unseen old groups beyond")


# A fact that is right in bfloat16 alone would count as lost by the first edit.
@in_float32
def compare_editors(run):
    """Edit n facts, for each n of n_edits, with every editor, and measure METRICS and NUMBERS.

    Of up to 1000 other facts that the model knows, editors may use one half, and not the other.
    """
    require_editable(run)
    data, model, config = run.data, run.model, run.config
    chosen = choose_editors(config.editors, config.top_slots, config.margin)
    editors, left_out = applicable_editors(model, chosen)
    for reason, names in left_out.items():
        say(f"left out: {'; '.join(names)} ({reason})")
    require(editors, "none of the editors fits this model", "editors")
    say_margin(editors, config.margin)
    known, asked_beyond, before = editable_facts(run, correct_examples(run))
    for what, share in before.items():
        run.finding(f"before editing, {what}: {share['value']:.0%} of {share['n']} answered")
    n_needed = 10 + (0 if config.new_facts else max(config.n_edits))
    message = f"the model answers {len(known)} facts correctly; n_edits={config.n_edits} needs"
    require(len(known) >= n_needed, f"{message} {n_needed}", "n_edits")
    stored = stored_bits(predictions(run), data, model)
    rng = np.random.default_rng(run.settings.train.seed)
    facts, slices = data.source.read(config.split, rng.permutation(known))
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    results = []
    for n in config.n_edits:
        cell = make_cell(run, n, facts, slices, asked_beyond, rng)
        for name, editor in editors.items():
            try:
                for row in edit_in_portions(model, editor, cell, config.portions):
                    results.append({"method": name, "edits": n, **row})
            finally:
                model.load_state_dict(weights)
    save_comparison(run, results, {"stored": stored, **before})


def save_comparison(run, results, measured_before):
    """Print, write and draw results, a dict for each portion of each editor and number of edits."""
    n_edits, portions = run.config.n_edits, run.config.portions
    last = [r for r in results if r["portion"] == portions]
    for sentence in [*describe_editors(last), *describe_reach(last)]:
        run.finding(sentence)
    metrics = metrics_of(results)
    print_results(results, metrics)
    columns = {}
    for name in ("method", "edits", "portion", *metrics, *NUMBERS):
        values = [r[name] for r in results]
        columns[name] = [v["value"] for v in values] if name in metrics else values
    by_slice = {"method, edits": {f"{r['method']}, {r['edits']}": r for r in last}}
    drawn = last
    if portions > 1:
        keys = [f"{r['method']}, {r['edits']}, {r['portion']}" for r in results]
        by_slice["method, edits, portion"] = dict(zip(keys, results))
        drawn = [r for r in results if r["edits"] == max(n_edits)]
    plot = functools.partial(plot_edits, drawn, metrics, run.name)
    measured = {"edits": list(n_edits), **measured_before}
    save_result(run, "edit", measured, by_slice, (), columns, plot)


def metrics_of(results):
    """{metric: meaning} of those that were measured."""
    known = METRICS | LAST_PORTION | REACH
    return {metric: known[metric] for metric in results[0] if metric in known}


def make_cell(run, n, facts, slices, asked_beyond, rng):
    """Choose n facts to edit, and other facts to ask -> Cell.

    facts: all that the model knows. slices: {name: (facts,)}; the first, if any, has their groups.
    asked_beyond: see edit_reach.editable_facts.
    """
    if run.config.new_facts:
        n_edited = 0
        changed = unknown_facts(n, facts, run.data.source.texts, rng)
    else:
        n_edited = n
        alphabet = answer_alphabet(facts)
        changed = [counterfactual(fact, alphabet, rng) for fact in facts[:n]]
    old = facts[n_edited:]
    groups = ["all"] * len(old)
    if slices:
        name, values = next(iter(slices.items()))  # exposures in synthetic QA
        groups = [f"{name}={value}" for value in values[n_edited:]]
    parts = (changed, old[:1000:2], old[1:1000:2], old)
    beyond = {}
    # What follows from all edits does not follow from a portion of them.
    if n_edited and run.config.portions == 1:
        for metric, texts in asked_beyond(facts[:n], changed, old[1:1000:2]).items():
            beyond[metric] = encode(run, texts)
    return Cell(*(encode(run, part) for part in parts), np.array(groups), beyond)


def edit_in_portions(model, editor, cell, portions):
    """Edit the facts in portions, each from the model edited so far -> a dict after each portion.

    An editor may use earlier portions as facts to keep. METRICS and probability are of all facts
    edited so far. slots, bytes and growth are of all changes since the first portion.
    """
    original = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows, so_far = [], 0
    for portion in torch.arange(len(cell.edited[0])).tensor_split(portions):
        tokens, targets = (x[portion] for x in cell.edited)
        # Earlier portions first: an editor that takes some of these facts takes the first ones.
        kept = [torch.cat([y[:so_far], x]) for x, y in zip(cell.kept, cell.edited)]
        so_far += len(portion)
        row = {"portion": len(rows) + 1, "so_far": so_far}
        edit = functools.partial(editor, model, tokens, targets, *kept)
        row["peak_memory"], row["seconds"] = peak_memory_of(edit, tokens.device)
        row |= measure(model, [x[:so_far] for x in cell.edited], cell)
        if portions > 1:
            row["last_portion"] = proportion(n_correct(model, tokens, targets), len(tokens))
        rows.append(row | changes(model, original))
    return rows


def measure(model, edited, cell):
    """-> METRICS, those of REACH, "retained_by" {group: retained}, and probability.

    edited: (tokens, targets) of the facts edited so far.
    """
    measured = {}
    asked = {"efficacy": edited, "specificity": cell.unseen, "specificity, shown": cell.kept}
    for metric, (tokens, targets) in (asked | cell.beyond).items():
        measured[metric] = proportion(n_correct(model, tokens, targets), len(tokens))
    measured["probability"] = answer_probabilities(model, *edited).mean().item()
    is_correct = answered(model, *cell.old).cpu().numpy()
    measured["retained"] = proportion(int(is_correct.sum()), len(is_correct))
    measured["retained_by"] = {}
    for group in dict.fromkeys(cell.groups.tolist()):
        of_group = is_correct[cell.groups == group]
        measured["retained_by"][group] = proportion(int(of_group.sum()), len(of_group))
    return measured


def changes(model, original):
    """How the parameters differ from the original ones {name: tensor} -> slots, bytes, growth."""
    slots = n_bytes = 0
    before = after = 0.0  # sums of squares
    for name, parameter in model.named_parameters():
        old, new = original[name], parameter.detach()
        changed = old != new
        n_bytes += int(changed.sum()) * new.element_size()
        if name.endswith("memory.values"):
            slots += int(changed.any(1).sum())
        before += float(old[changed].double().square().sum())
        after += float(new[changed].double().square().sum())
    growth = (after / before) ** 0.5 if before else 1.0
    return {"slots": slots, "bytes": n_bytes, "growth": growth}


def describe_editors(results):
    """Yield sentences on the first editor and the best of the others, with the most edits."""
    n = max(r["edits"] for r in results)
    of_most = [r for r in results if r["edits"] == n]
    for r in of_most[:1] + sorted(of_most[1:], key=overall)[-1:]:
        efficacy, specificity = r["efficacy"]["value"], r["specificity"]["value"]
        method = r["method"] if r is of_most[0] else f"best of the other editors, {r['method']}"
        new = f"{efficacy:.0%} of them get the new answer (mean probability {r['probability']:.2g})"
        what = f"{new}, {specificity:.0%} of others keep theirs"
        yield f"{n} facts edited together, {method}: {what} ({r['seconds']:.2f} s)"


def overall(result):
    """Mean of efficacy and specificity."""
    return result["efficacy"]["value"] + result["specificity"]["value"]


def print_results(results, metrics):
    names = ["method", "edits"]
    if results[0]["so_far"] != results[0]["edits"]:
        names.append("so_far")
    head = list(names)
    for metric in metrics:
        head += [metric, "95% interval"]
    lines, numbers = [], []
    for r in results:
        which = [r[name] for name in names]
        line = list(which)
        for metric in metrics:
            line += format_ci(r[metric])[1:]
        lines.append(line)
        memory = "-" if r["peak_memory"] is None else f"{r['peak_memory']:,}"
        line = [*which, f"{r['probability']:.2g}", f"{r['seconds']:.2f}", memory]
        numbers.append([*line, f"{r['slots']:,}", f"{r['bytes']:,}", f"{r['growth']:.2f}"])
    print_table(head, lines)
    print("; ".join(f"{metric}: {meaning}" for metric, meaning in metrics.items()))
    print_table([*names, *NUMBERS], numbers)
    print("; ".join(f"{name}: {meaning}" for name, meaning in NUMBERS.items()))


def require_editable(run):
    """ConfigError unless the facts of this run can be edited."""
    require_editable_facts(run)
    if run.config.new_facts:  # which are of one wording
        require_facts(run)
    no_table = why_not(check_editable, run.model)
    no_mlp = why_not(check_mlp_editable, run.model)
    require(not no_table or not no_mlp, f"{no_table}; {no_mlp}", None)
    require_single_process(run)


def answer_alphabet(facts):
    """What answers are made of: characters, or for two-hop data entities."""
    if ">" in facts[0]:
        return sorted({read_two_hop(fact)[2] for fact in facts})
    return characters_of(value_of(fact) for fact in facts)


def counterfactual(fact, alphabet, rng):
    """The fact "key:value " with another value: each character becomes another one of alphabet.

    In a two-hop fact "a>b ", the entity b becomes another one.
    """
    if ">" in fact:
        _, _, entity = read_two_hop(fact)
        others = [x for x in alphabet if x != entity]
        return f"{fact.removesuffix(entity + ' ')}{rng.choice(others)} "
    key, value = fact.strip().split(":")
    new_value = ""
    for character in value:
        others = [x for x in alphabet if x != character]
        new_value += rng.choice(others)
    return f"{key}:{new_value} "


def unknown_facts(n, facts, texts, rng):
    """n facts that look like `facts`, with keys that no fact of the data set has."""
    key, value = facts[0].strip().split(":")
    key_alphabet = characters_of(fact.split(":")[0] for fact in facts)
    alphabet = characters_of(value_of(fact) for fact in facts)
    # Documents of another form are (question, answer): qa with context_docs.
    taken = {text.split(":")[0] for text in texts if isinstance(text, str)}
    n_free = len(key_alphabet) ** len(key) - len(taken)
    message = f"n_edits={n} new facts need keys that the data lacks; there are {n_free}"
    require(n <= n_free, message, "n_edits")
    made = []
    while len(made) < n:
        key = "".join(rng.choice(key_alphabet, len(key)))
        if key not in taken:
            taken.add(key)
            made.append(f"{key}:{''.join(rng.choice(alphabet, len(value)))} ")
    return made


def value_of(fact):
    return fact.strip().split(":")[1]


def characters_of(words):
    return sorted(set("".join(words)))


def encode(run, facts):
    """Facts of one length -> tokens and targets (B, T)."""
    tokens, targets, *_ = run.data.encoder.batch(facts, packed=False)
    return run.tensor(tokens), run.tensor(targets)


def plot_edits(results, metrics, title, path):
    """Metrics of each editor against the number of edited facts."""
    n_columns = min(3, len(metrics))
    plt, fig, axes = figure(math.ceil(len(metrics) / n_columns), n_columns, width=3.8)
    for axis in axes[len(metrics) :]:
        axis.remove()
    counts = sorted({r["so_far"] for r in results})
    # Portions are equally large, numbers of edits grow by factors.
    in_portions = max(r["portion"] for r in results) > 1
    for axis, metric in zip(axes, metrics):
        for name in dict.fromkeys(r["method"] for r in results):
            of_editor = [r for r in results if r["method"] == name]
            measured = [r[metric] for r in of_editor]
            errorbars(axis, [r["so_far"] for r in of_editor], measured, label=name)
        n_all = {cell["n"] for cell in measured}
        n = f" (n = {n_all.pop()})" if len(n_all) == 1 else ""
        ylabel = f"{metric}{n}\nexact match, 95% interval"
        axis.set(xscale="linear" if in_portions else "log", xlabel="facts edited")
        axis.set_xticks(counts, [f"{count:,}" for count in counts])
        axis.minorticks_off()
        axis.set(ylabel=ylabel, ylim=(-0.02, 1.02))
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    fig.supxlabel(title)
    finish_figure(fig, plt, path, "")
