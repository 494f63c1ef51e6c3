"""Compare ways to edit facts that a model knows (editors.py), one batch of facts at a time.

    python eval.py edit runs/RUN                       # 1 to 100 facts
    python eval.py edit runs/RUN --n_edits "[1,300]"

Efficacy: edited facts get their new answer. Specificity: other facts keep theirs. Facts with two
wordings and two-hop questions are asked beyond what was edited (edit_reach.py).
"""

import time

import numpy as np

from analysis.edit_reach import REACH, describe_reach, editable_facts, require_editable_facts
from analysis.editing import check_editable
from analysis.editors import EDITORS, applicable_editors, n_correct, why_not
from analysis.mlp_editing import check_mlp_editable
from analysis.trained_run import correct_examples, save_result
from data_synth import read_two_hop
from nanorecall.metrics import print_table
from nanorecall.plots import errorbars, figure, finish_figure
from nanorecall.settings import require, say
from nanorecall.stats import format_ci, proportion

METRICS = {
    "efficacy": "edited facts, new answer",
    "specificity": "other facts, old answer",
    "retention": "facts that an editor may use, old answer",
}


def compare_editors(run):
    """Edit n facts at a time, for each n of n_edits, with every editor, and measure METRICS.

    Of up to 1000 other facts that the model knows, editors may use one half, and not the other.
    """
    require_editable(run)
    editors, left_out = applicable_editors(run.model, EDITORS)
    for reason, names in left_out.items():
        say(f"left out: {'; '.join(names)} ({reason})")
    data, model, config = run.data, run.model, run.config
    known, asked_beyond, before = editable_facts(run, correct_examples(run))
    for what, share in before.items():
        run.finding(f"before editing, {what}: {share['value']:.0%} of {share['n']} answered")
    n_needed = max(config.n_edits) + 10
    message = f"the model answers {len(known)} facts correctly; n_edits={config.n_edits} needs"
    require(len(known) >= n_needed, f"{message} {n_needed}", "n_edits")
    rng = np.random.default_rng(run.settings.train.seed)
    facts = []
    for index in rng.permutation(known):
        texts, _ = data.source.read(config.split, [index])
        facts.append(texts[0])
    alphabet = answer_alphabet(facts)
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    results = []
    for n in config.n_edits:
        others = facts[n : n + 1000]
        new_facts = [counterfactual(fact, alphabet, rng) for fact in facts[:n]]
        edited = encode(run, new_facts)
        kept, unseen = encode(run, others[::2]), encode(run, others[1::2])
        beyond = {}
        for metric, texts in asked_beyond(facts[:n], new_facts, others[1::2]).items():
            beyond[metric] = encode(run, texts)
        for name, editor in editors.items():
            try:
                measured = measure_editor(model, editor, edited, kept, unseen, beyond)
            finally:
                model.load_state_dict(weights)
            results.append({"method": name, "edits": n, **measured})
    for sentence in [*describe_editors(results), *describe_reach(results)]:
        run.finding(sentence)
    print_results(results)
    columns = {}
    metrics = metrics_of(results)
    for name in ("method", "edits", *metrics, "seconds"):
        values = [r[name] for r in results]
        columns[name] = [v["value"] for v in values] if name in metrics else values

    def plot(path):
        plot_edits(path, results, run.name)

    metrics = {"edits": list(config.n_edits), **before}
    by_slice = {"method, edits": {f"{r['method']}, {r['edits']}": r for r in results}}
    save_result(run, "edit", metrics, by_slice, (), columns, plot)


def metrics_of(results):
    """{metric: meaning} of those that were measured."""
    known = METRICS | REACH
    return {metric: known[metric] for metric in results[0] if metric in known}


def measure_editor(model, editor, edited, kept, unseen, beyond):
    """Edit the model -> METRICS and the seconds that it took. Facts: (tokens, targets).

    beyond: {metric of REACH: facts}
    """
    start = time.perf_counter()
    editor(model, *edited, *kept)
    seconds = time.perf_counter() - start
    measured = {}
    asked = dict(zip(METRICS, (edited, unseen, kept))) | beyond
    for metric, (tokens, targets) in asked.items():
        measured[metric] = proportion(n_correct(model, tokens, targets), len(tokens))
    return {**measured, "seconds": seconds}


def describe_editors(results):
    """Yield sentences on the first editor and the best of the others, with the most edits."""
    n = max(r["edits"] for r in results)
    of_most = [r for r in results if r["edits"] == n]
    for r in of_most[:1] + sorted(of_most[1:], key=overall)[-1:]:
        efficacy, specificity = r["efficacy"]["value"], r["specificity"]["value"]
        method = r["method"] if r is of_most[0] else f"best of the other editors, {r['method']}"
        what = f"{efficacy:.0%} of them get the new answer, {specificity:.0%} of others keep theirs"
        yield f"{n} facts edited together, {method}: {what} ({r['seconds']:.2f} s)"


def overall(result):
    """Mean of efficacy and specificity."""
    return result["efficacy"]["value"] + result["specificity"]["value"]


def print_results(results):
    metrics = metrics_of(results)
    head = ["method", "edits"]
    for metric in metrics:
        head += [metric, "95% interval"]
    lines = []
    for r in results:
        line = [r["method"], r["edits"]]
        for metric in metrics:
            line += format_ci(r[metric])[1:]
        lines.append([*line, f"{r['seconds']:.2f}"])
    print_table([*head, "seconds"], lines)
    print("; ".join(f"{metric}: {meaning}" for metric, meaning in metrics.items()))


def require_editable(run):
    """ConfigError unless the facts of this run can be edited."""
    require_editable_facts(run)
    no_table, no_mlp = why_not(check_editable, run.model), why_not(check_mlp_editable, run.model)
    require(not no_table or not no_mlp, f"{no_table}; {no_mlp}", None)
    require(run.world.size == 1, "editing needs a single process; run it without torchrun", None)


def answer_alphabet(facts):
    """What answers are made of: characters, or for two-hop data entities."""
    if ">" in facts[0]:
        return sorted({read_two_hop(fact)[2] for fact in facts})
    return sorted(set("".join(fact.strip().split(":")[1] for fact in facts)))


def counterfactual(fact, alphabet, rng):
    """The fact "key:value " with another value: each character becomes another one of alphabet.
    Of a fact "a>b ", the entity b does."""
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


def encode(run, facts):
    """Facts of one length -> tokens and targets (B, T)."""
    tokens, targets, *_ = run.data.encoder.batch(facts, packed=False)
    return run.tensor(tokens), run.tensor(targets)


def plot_edits(path, results, title):
    """Metrics of each editor against the number of edited facts."""
    metrics = metrics_of(results)
    plt, fig, axes = figure(1, len(metrics), width=3.8)
    for axis, metric in zip(axes, metrics):
        for name in dict.fromkeys(r["method"] for r in results):
            of_editor = [r for r in results if r["method"] == name]
            measured = [r[metric] for r in of_editor]
            errorbars(axis, [r["edits"] for r in of_editor], measured, label=name)
        # How many are asked depends on the edits, but for those METRICS that ask other facts.
        asks_others = metric in METRICS and metric != "efficacy"
        n = f" (n = {measured[-1]['n']})" if asks_others else ""
        ylabel = f"{metric}{n}\nexact match, 95% interval"
        axis.set(xscale="log", xlabel="facts edited together", ylabel=ylabel, ylim=(-0.02, 1.02))
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    fig.supxlabel(title)
    finish_figure(fig, plt, path, "")
