"""Does an edit reach beyond the text that was edited: to another wording, to a second hop?

Generalisation: an edited fact gets its new answer in its other wording, too (qa with forms=2).
Portability: a two-hop question gets the answer that follows from an edited fact (twohop). Both
terms are those of Yao et al. 2023, arXiv 2305.13172.

A question is asked after an edit only if the model answered it before. So a lost answer is due to
the edit. Only with another first hop may the cause be older: the question then goes on from the new
entity, and the model need not have composed that fact before.
"""

from functools import partial

import numpy as np

from analysis.trained_run import require_facts
from data_synth import second_form
from nanorecall.settings import require
from nanorecall.stats import proportion
from nanorecall.twohop import read_two_hop

# A run has the metrics of its task.
REACH = {
    "generalisation": "edited facts in their other wording, new answer",
    "specificity, other wording": "other facts in their other wording, old answer",
    "portability, first hop": "two-hop questions whose first fact is edited, answer that follows",
    "portability, second hop": "two-hop questions whose second fact is edited, answer that follows",
    "specificity, two hops": "two-hop questions on other facts, old answer",
}
MOST_OTHERS = 500  # two-hop questions on other facts that are asked


def require_editable_facts(run):
    """ConfigError unless the data has facts for which edit_comparison can make other answers."""
    if getattr(run.settings.data, "task", "") == "twohop":
        message = "editing needs questions with one answer: train with markers=1"
        require(run.data.kind == "twohop", message, None)
    else:
        require_facts(run, all_forms=True)


def editable_facts(run, known):
    """Which of the examples `known` (E,), all that the model answers, are facts to edit?

    -> their indices; asked_beyond(facts, edited, others) -> {metric of REACH: texts}, for lists of
    texts: facts that are edited, the same edited, facts that are not; and {what is answered before
    the edit: proportion}.
    """
    texts, slices = run.data.source.read(run.config.split, known)
    if "form" in slices:
        return facts_of_two_forms(known, texts)
    if "query" in slices:
        return facts_of_two_hops(run, known, texts, slices["query"])
    return known, nothing_beyond, {}


def nothing_beyond(facts, edited, others):
    return {}


def describe_reach(results):
    """Yield a sentence for each measured kind of generalisation and portability, with the most
    edits."""
    n = max(r["edits"] for r in results)
    for metric in REACH:
        if metric in results[0] and not metric.startswith("specificity"):
            shares = [f"{r['method']} {r[metric]['value']:.0%}" for r in results if r["edits"] == n]
            yield f"{metric}, {n} facts edited together: {', '.join(shares)}"


# ---- two wordings --------------------------------------------------------------------------------


def facts_of_two_forms(known, texts):
    """Facts are edited in their first wording. The model must answer both."""
    answered = set(texts)
    in_first, in_both = [], []
    for index, text in zip(known, texts):
        if ":" in text:
            in_first.append(index)
            if second_form(text) in answered:
                in_both.append(index)
    require(in_first, "the model answers no fact in its first wording; train it longer", None)
    before = {"known facts, in their other wording": proportion(len(in_both), len(in_first))}
    return np.array(in_both, int), ask_in_second_form, before


def ask_in_second_form(facts, edited, others):
    return {
        "generalisation": [second_form(fact) for fact in edited],
        "specificity, other wording": [second_form(fact) for fact in others],
    }


# ---- two hops ------------------------------------------------------------------------------------


def facts_of_two_hops(run, known, texts, kinds):
    """Facts are edited that are the first hop of a question that the model answers, and the second
    hop of another one."""
    source = run.data.source
    answers = {}  # of single facts: {(entity, relation): entity}
    for text, kind in zip(source.texts, source.slices["query"]):
        if kind == "single fact":
            entity, relations, answer = read_two_hop(text)
            answers[entity, *relations] = answer
    questions = [text for text, kind in zip(texts, kinds) if kind != "single fact"]
    firsts, seconds = set(), set()
    for question in questions:
        first, second, _ = follow(answers, question)
        firsts.add(first)
        seconds.add(second)
    editable = []
    for index, text, kind in zip(known, texts, kinds):
        if kind == "single fact" and fact_key(text) in firsts & seconds:
            editable.append(index)
    of_split = source.slices["query"][source.splits[run.config.split]]
    before = {}
    for kind in np.unique(of_split):
        n_answered, n = (kinds == kind).sum().item(), (of_split == kind).sum().item()
        before[f"two-hop data, {kind}"] = proportion(n_answered, n)
    return np.array(editable, int), partial(ask_two_hops, answers, questions), before


def ask_two_hops(answers, questions, facts, edited, others):
    """answers: {(entity, relation): entity} before the edit. questions: two-hop, answered then."""
    new_answers = answers | {fact_key(fact): read_two_hop(fact)[2] for fact in edited}
    changed = {fact_key(fact) for fact in edited}
    asked = {"portability, first hop": [], "portability, second hop": []}
    unchanged = []
    for question in questions:
        first, second, _ = follow(answers, question)
        _, _, new_question = follow(new_answers, question)
        if first in changed:
            asked["portability, first hop"].append(new_question)
        elif second in changed:
            asked["portability, second hop"].append(new_question)
        else:
            unchanged.append(question)
    # The questions stand sorted by kind, so take some of all.
    step = -(-len(unchanged) // MOST_OTHERS)
    return {**asked, "specificity, two hops": unchanged[:: max(1, step)]}


def fact_key(fact):
    """A single fact -> (entity, relation)."""
    entity, relations, _ = read_two_hop(fact)
    return entity, *relations


def follow(answers, question):
    """A two-hop question -> keys of both of its facts, and the question with the answer that
    follows from these answers."""
    entity, (relation, next_relation), old_answer = read_two_hop(question)
    between = answers[entity, relation]
    end = answers[between, next_relation]
    # With chain of thought, the answer names the entity in between.
    answer = f"{between}>{end}" if ">" in old_answer else end
    asked = question.removesuffix(f"{old_answer} ")
    return (entity, relation), (between, next_relation), f"{asked}{answer} "
