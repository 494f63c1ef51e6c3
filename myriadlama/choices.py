"""Does it help to choose the method for each relation? From finished results, without a model.

    python eval.py choices runs/myriadlama/smollm2_135m_it
    python eval.py choices runs/myriadlama/MODEL runs/bias0/MODEL --methods "flex;flex_full"

What answers a fact is chosen among candidates (candidates.py) on other facts only (leave-one-out),
by one of three rules:

- global: the candidate that is best in all relations
- relation: the one that is best in the fact's relation; of equals, the one that is best in all
- nested: in between; how much other relations count is chosen, too, on the other facts

hindsight is the best candidate of each relation, chosen on the facts that it answers. oracle is any
correct candidate. No rule can promise these two.

Letters: C candidates, N facts.
"""

import math
import os
from collections import Counter

import numpy as np

from myriadlama.candidates import open_results
from nanorecall.files import only_writer
from nanorecall.metrics import print_table
from nanorecall.progress import progress
from nanorecall.records import write_json
from nanorecall.settings import require, say
from nanorecall.stats import add_holm, clustered_proportion, format_ci, mcnemar


def choices(args, config):
    """Print and write what choices among the results in the folders `args` reach."""
    require(args, "name folders of results: python eval.py choices runs/myriadlama/MODEL", None)
    path = (config.output or os.path.join(args[0], "choices")) + ".json"
    folder = os.path.dirname(path) or "."
    message = f"there is no directory {folder}; make it, or name another"
    require(os.path.isdir(folder), message, "output")
    candidates = open_results(args, config)
    picked = choose_all(candidates)
    answered = answers_of(candidates, picked)
    metrics = accuracies(candidates, picked, answered, range(len(candidates.uuids)))
    add_tests(metrics, answered)
    by_relation = {}
    for number, relation in enumerate(candidates.relations):
        same = np.flatnonzero(candidates.relation == number)
        by_relation[relation] = accuracies(candidates, picked, answered, same)
    say(findings(metrics))
    if len(candidates.relations) == 1:
        say("note: all facts are of one relation, so global, relation and nested choose alike")
    print_rules(metrics)
    print_relations(by_relation, next(iter(candidates.families)))
    of_candidates = {}
    for label, correct in zip(candidates.labels, candidates.correct):
        of_candidates[label] = clustered_proportion(correct, candidates.uuids)
    settings = {"folders": args, "path": config.path, "methods": config.methods}
    result = {
        "config": settings,
        "metrics": {**metrics, "candidates": of_candidates},
        "by_slice": {"relation": by_relation},
        "examples": [],
    }
    with only_writer(folder, "results there"):
        write_json(path, result)
    say(f"wrote {path}")


# ---- choosing ------------------------------------------------------------------------------------

# A candidate's score is its number of correct answers in the relation, plus its accuracy in all
# relations times this number of facts. Below 1, other relations decide nothing but ties.
TIES, GLOBAL = 0.5, math.inf
RULES = {"global": (GLOBAL,), "relation": (TIES,), "nested": (GLOBAL, 32, 8, 2, TIES)}


def leave_one_out(correct, relation, prior_facts):
    """The candidate of each fact (N,), chosen on the other facts.

    correct (C, N): 0 or 1. relation (N,): numbers. prior_facts: how many facts of the relation the
    accuracy in all relations counts for. Of equals, the first candidate is taken.
    """
    N = len(relation)
    is_of_relation = relation[:, None] == np.arange(relation.max() + 1)  # (N, relations)
    in_relation = (correct @ is_of_relation)[:, relation] - correct  # (C, N)
    accuracy = (correct.sum(1, keepdims=True) - correct) / max(1, N - 1)  # (C, N)
    score = accuracy
    if prior_facts < GLOBAL:
        score = in_relation + prior_facts * accuracy
    return score.argmax(0)


def choose(correct, relation, i, strengths):
    """The candidate for fact i. It does not depend on correct[:, i].

    strengths: values of prior_facts. The one whose choices answer the most other facts is taken; of
    equals, the first.
    """
    if len(strengths) == 1:
        return leave_one_out(correct, relation, strengths[0])[i]
    others = np.arange(len(relation)) != i
    n_correct = []
    for prior_facts in strengths:
        picked = leave_one_out(correct[:, others], relation[others], prior_facts)
        n_correct.append(correct[:, others][picked, np.arange(len(picked))].sum())
    best = strengths[np.argmax(n_correct)]
    return leave_one_out(correct, relation, best)[i]


def hindsight(correct, relation):
    """Is each fact answered by the best candidate of its relation? (N,)

    That candidate is chosen on the same facts.
    """
    answered = np.zeros(len(relation), bool)
    for number in np.unique(relation):
        same = relation == number
        best = correct[:, same].sum(1).argmax()
        answered[same] = correct[best, same]
    return answered


def choose_all(candidates):
    """-> {family: {rule: N rows of candidates.correct}}, what answers each fact.

    The family "origin" is the first template alone, where it was asked. Of several, the first.
    """
    families, picked = candidates.families, {}
    origins = [row for row, label in enumerate(candidates.labels) if label.startswith("origin")]
    if origins:
        picked["origin"] = {"no choice": origins[:1] * len(candidates.uuids)}
    for family in families:
        picked[family] = {rule: [] for rule in RULES}
    for i in progress(range(len(candidates.uuids)), "facts"):
        correct = candidates.without(i)
        for family, rows in families.items():
            for rule, strengths in RULES.items():
                row = choose(correct[rows], candidates.relation, i, strengths)
                picked[family][rule].append(rows[row])
    return picked


# ---- what the choices reach ----------------------------------------------------------------------


def answers_of(candidates, picked):
    """-> {family: {rule, hindsight or oracle: is each fact answered correctly? (N,)}}"""
    correct, found = candidates.correct == 1, {}
    for family, of_rules in picked.items():
        found[family] = {}
        for rule, chosen in of_rules.items():
            found[family][rule] = correct[chosen, np.arange(len(chosen))]
    for family, rows in candidates.families.items():
        found[family]["hindsight"] = hindsight(correct[rows], candidates.relation)
        found[family]["oracle"] = correct[rows].any(0)
    return found


def accuracies(candidates, picked, answered, facts):
    """-> {family: {rule: cell}} of some facts, by number.

    The cell of a rule, and of origin, has "chosen": {label: number of facts that it answers}.
    """
    found, uuids = {}, [candidates.uuids[j] for j in facts]
    for family, of_rules in answered.items():
        found[family] = {}
        for rule, is_correct in of_rules.items():
            cell = found[family][rule] = clustered_proportion(is_correct[facts], uuids)
            if rule in picked[family]:
                chosen = Counter(candidates.labels[picked[family][rule][j]] for j in facts)
                cell["chosen"] = dict(chosen.most_common())
    return found


def add_tests(metrics, answered):
    """Add McNemar's tests of each rule "against origin" and "against global" of its family.

    Each of the two kinds gets Holm's correction for all of its tests.
    """
    against_origin, against_global = [], []
    for family, of_rules in answered.items():
        for rule in RULES:
            if rule not in of_rules:
                continue
            cell, is_correct = metrics[family][rule], of_rules[rule]
            if "origin" in answered:
                cell["against origin"] = mcnemar(is_correct, answered["origin"]["no choice"])
                against_origin.append(cell["against origin"])
            if rule != "global":
                cell["against global"] = mcnemar(is_correct, of_rules["global"])
                against_global.append(cell["against global"])
    add_holm(against_origin)
    add_holm(against_global)


def findings(metrics):
    """What the choices reach, in sentences."""
    text, different = "", []
    for family, cells in metrics.items():
        if family == "origin":
            continue
        values = {rule: f"{cell['value']:.4f}" for rule, cell in cells.items()}
        text += f"Of {family}, one choice for all relations (global) reaches {values['global']}, "
        text += f"one for each {values['relation']}, in between (nested) {values['nested']}.\n"
        for rule, cell in cells.items():
            if cell.get("against global", {}).get("p_holm", 1) < 0.05:
                different.append(f"{rule} of {family}")
    test = "Different from global (McNemar, Holm's correction, p < 0.05)"
    return f"{text}{test}: {', '.join(different) or 'none'}."


def print_rules(metrics):
    rows = []
    for family, cells in metrics.items():
        for rule, cell in cells.items():
            row = [family, rule, *format_ci(cell)]
            for test in ("against origin", "against global"):
                row.append(f"{cell[test]['p_holm']:.2g}" if test in cell else "")
            rows.append([*row, mostly_chosen(cell)])
    head = ("candidates", "chosen by", "facts", "accuracy", "95% interval")
    tests = ("p against origin (Holm)", "p against global (Holm)")
    print_table((*head, *tests, "mostly"), rows)


def print_relations(by_relation, family):
    """A line for each relation, with the choices among one family."""
    rows = []
    for relation, of_families in by_relation.items():
        cells = of_families[family]
        values = [f"{cell['value']:.2f}" for cell in cells.values()]
        rows.append((relation, cells["global"]["n"], *values, mostly_chosen(cells["relation"])))
    print_table(("relation", "facts", *cells, f"of {family}, relation mostly chose"), rows)


def mostly_chosen(cell):
    """The candidate that a rule chose for most facts, as text; "" where none was chosen."""
    if "chosen" not in cell:
        return ""
    label, n = next(iter(cell["chosen"].items()))
    return f"{label} ({n} of {cell['n']})"
