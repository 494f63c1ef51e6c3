"""Consolidation: move facts from the context into the memory table, in closed form.

    python eval.py consolidate runs/RUN                     # of configs/qa_in_context_memory.py
    python eval.py consolidate runs/RUN --n_edits "[8,32]"  # 8 facts, then 32

The model reads new facts in its context, a few at a time, and is asked each of them there. Its
answers, right or wrong, are written into the table (editing.py), without a gradient. Then it is
asked without the context. True answers are used to measure, never to write.
"""

import time

import numpy as np

from analysis.asking import ask, find_facts
from analysis.edit_comparison import encode, unknown_facts
from analysis.editing import check_editable, edit_facts
from analysis.editors import n_correct, why_not
from analysis.trained_run import (
    correct_examples,
    in_float32,
    require_decoding,
    require_facts,
    require_single_process,
    save_result,
)
from data_synth import split_fact
from nanorecall.metrics import print_table
from nanorecall.settings import require
from nanorecall.stats import format_ci, proportion

METRICS = {
    "in context": "new facts, asked after their context",
    "alone, before": "new facts, asked without the context, before they are written",
    "alone": "new facts, asked without the context, after they are written",
    "in context, after": "new facts, asked after their context, after they are written",
    "specificity": "known facts that were not protected, old answer",
    "specificity, shown": "known facts that were protected, old answer",
}


@in_float32
def consolidate(run):
    """Write n facts read in the context, for each n of n_edits, and measure METRICS.

    Half of up to 1000 other facts that the model knows are protected.
    """
    require_consolidation(run)
    source, model, config = run.data.source, run.model, run.config
    rng = np.random.default_rng(run.settings.train.seed)
    known = rng.permutation(correct_examples(run))
    message = f"the model answers {len(known)} facts correctly; this needs 10"
    require(len(known) >= 10, f"{message}: train it longer", None)
    facts, _ = source.read(config.split, known)
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    rows, examples = [], []
    for n in config.n_edits:
        new = unknown_facts(n, facts, source.texts, rng)
        try:
            row, examples = consolidate_facts(run, new, facts[:1000:2], facts[1:1000:2])
        finally:
            model.load_state_dict(weights)
        rows.append({"facts": n, **row})
    for row in rows:
        run.finding(describe(row))
    head = ["facts", *METRICS, "seconds"]
    lines = []
    for row in rows:
        shares = [format_ci(row[metric])[1] for metric in METRICS]
        lines.append([row["facts"], *shares, f"{row['seconds']:.2f}"])
    print_table(head, lines)
    print("; ".join(f"{metric}: {meaning}" for metric, meaning in METRICS.items()))
    print("seconds: to read all contexts and to write the table once")
    by_slice = {"facts": {str(row["facts"]): row for row in rows}}
    save_result(run, "consolidate", {"facts": list(config.n_edits)}, by_slice, examples)


def consolidate_facts(run, new, protected, others):
    """Write the new facts into the table -> METRICS and seconds, [{"fact", "read", "alone"}].

    new, protected, others: lists of facts "key:value ". "read" is the model's answer in the
    context, before; "alone" its answer without the context, after.
    """
    contexts = in_context(new, run.data.config.context_pairs)
    alone = [split_fact(fact) for fact in new]
    row = {
        "in context": share_answered(run, contexts),
        "alone, before": share_answered(run, alone),
    }
    start = time.perf_counter()
    read = answers(run, contexts)
    written = [(question, answer) for (question, _), answer in zip(alone, read)]
    keep = [encode(run, protected)]
    edit_facts(run.model, *encode(run, written), keep, run.config.margin)
    row["seconds"] = time.perf_counter() - start
    row["alone"] = share_answered(run, alone)
    row["in context, after"] = share_answered(run, contexts)
    row["specificity"] = share_answered(run, others)
    row["specificity, shown"] = share_answered(run, protected)
    examples = []
    for fact, answer, now in zip(new, read, answers(run, alone)):
        examples.append({"fact": fact.strip(), "read": answer, "alone": now})
    return row, examples


def in_context(facts, size):
    """[(question, answer)] of facts, `size` of them in a context; each is asked after all of it."""
    documents = []
    for first in range(0, len(facts), size):
        context = facts[first : first + size]
        for fact in context:
            question, answer = split_fact(fact)
            documents.append(("".join(context) + question, answer))
    return documents


def answers(run, documents):
    """The model's answer to each document's question, decoded greedily: texts."""
    return [ask(run.model, run, fact).text for fact in find_facts(run.data, documents)]


def share_answered(run, documents):
    """The proportion of documents of which the model answers every digit."""
    return proportion(n_correct(run.model, *encode(run, documents)), len(documents))


def describe(row):
    shares = {metric: f"{row[metric]['value']:.0%}" for metric in METRICS}
    return (
        f"{row['facts']} facts read in the context: {shares['in context']} answered there, "
        f"{shares['alone']} without it after they were written "
        f"({shares['alone, before']} before); {shares['specificity']} of other facts keep theirs"
    )


def require_consolidation(run):
    """ConfigError unless the run reads facts in its context and has a table to write them into."""
    message = "consolidation needs a run that was trained with context_docs"
    is_trained = getattr(run.settings.data, "context_docs", 0) > 0
    require(is_trained, f"{message}, as configs/qa_in_context_memory.py", None)
    message = f"dtype={run.config.dtype} has no effect: facts are written in float32; leave it out"
    require(run.config.dtype in ("auto", "float32"), message, "dtype")
    require_facts(run)
    require_decoding(run, "answering")
    no_table = why_not(check_editable, run.model)
    require(not no_table, no_table, None)
    require_single_process(run)
