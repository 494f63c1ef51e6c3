"""Rewrite chosen facts in a trained run, save the edited run, take an edit back.

    python eval.py edit runs/RUN --facts edits.jsonl                  # what would happen
    python eval.py edit runs/RUN --facts edits.jsonl --save_as NAME   # and write runs/NAME
    python eval.py edit runs/NAME --undo 1                            # the latest edit of runs/NAME

edits.jsonl has a line {"question": ..., "answer": ...} for each fact, with its new answer.
"""

import difflib
import math
import os

import numpy as np

from analysis.asking import (
    answer_text,
    are_answered,
    ask,
    complete_question,
    encode_facts,
    known_facts,
    make_fact,
    max_tokens,
    other_wording,
)
from analysis.edited_run import new_folder, save_edited_run, undo_latest_edit
from analysis.editors import answer_probabilities, applicable_editors, choose_editors, say_margin
from analysis.trained_run import require_decoding, require_single_process, save_result
from nanorecall.dataset_files import read_rows, require_data_suffix
from nanorecall.documents import validate_text
from nanorecall.metrics import print_table
from nanorecall.settings import ConfigError, require, say
from nanorecall.stats import proportion

DEFAULT = "closed form, protecting others; closed form in the MLP, protecting others"  # what fits
KEPT_TOKENS = 2**16  # of the other facts that an editor may use: they are read in one batch
NEAR = 0.9  # similarity of two questions (difflib's ratio) that may differ by a typo alone
N_SHOWN = 5  # other facts that changed, on the screen


def edit_named_facts(run):
    """Rewrite the facts of --facts with one editor, and measure what became of them and of others.

    The run itself stays as it is; --save_as writes the edited one beside it.
    """
    config, model = run.config, run.model
    facts = known_facts(run)
    name, editor = choose_editor(run)
    folder = new_folder(run, config.save_as) if config.save_as else ""
    known = facts_where(facts, are_answered(model, run, facts))
    new_facts = read_new_facts(run, facts, {fact.question for fact in known})
    reworded = in_other_wording(run, facts, new_facts)
    edited = {fact.question for fact in new_facts + reworded}
    # The other wording of an edited fact is not protected: its old answer is wrong now.
    others = [fact for fact in known if fact.question not in edited]
    before = [ask(model, run, fact) for fact in new_facts]
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    try:
        apply_editor(run, editor, new_facts, others)
        after = [ask(model, run, fact) for fact in new_facts]
        probability = answer_probabilities(model, *encode_facts(run, new_facts)).mean().item()
        are_reached = are_answered(model, run, reworded)
        are_kept = are_answered(model, run, others)
        changed = facts_where(others, ~are_kept)
        changed_answers = [ask(model, run, fact) for fact in changed[:N_SHOWN]]
        if folder:
            save_edited_run(run, folder, weights, describe_edit(run, name, new_facts))
    finally:
        model.load_state_dict(weights)
    edits = describe_answers(run, new_facts, before, after)
    efficacy = proportion(sum(edit["exact"] for edit in edits), len(edits))
    specificity = proportion(int(are_kept.sum()), len(others)) if others else None
    say_margin({name: editor}, config.margin)
    report_edits(run, edits, efficacy, specificity, probability)
    report_changed(run, changed, changed_answers)
    metrics = {"efficacy": efficacy, "probability": probability}
    if reworded:
        n_reached = int(are_reached.sum())
        metrics["generalisation"] = proportion(n_reached, len(reworded))
        say(f"in their other wording, {n_reached} of {len(reworded)} have the new answer")
    columns = None
    if others:
        metrics["specificity"] = specificity
        columns = {"question": [fact.question for fact in others], "kept": are_kept}
    save_result(run, "edit", metrics, examples=edits, columns=columns)
    if folder:
        say(f"wrote {folder}; to take the edit back: python eval.py edit {folder} --undo 1")


def in_other_wording(run, facts, new_facts):
    """The new facts in their other wording, where that is not edited itself -> [Fact]."""
    edited = {fact.question for fact in new_facts}
    reworded = []
    for fact in new_facts:
        question = other_wording(run.data, fact.question)
        if question and question not in edited:
            reworded.append(make_fact(run.data, facts, question, answer_text(run.data, fact)))
    return reworded


def facts_where(facts, mask):
    """Some of n facts: mask (n,) bool."""
    return [fact for fact, is_chosen in zip(facts, mask) if is_chosen]


def choose_editor(run):
    """-> the name of the editor that --facts uses, and the editor.

    ConfigError if it cannot change this model, or if the answers of the model cannot be decoded.
    """
    config = run.config
    require_single_process(run)
    require_decoding(run, "answering")
    chosen = choose_editors(config.editors or DEFAULT, config.top_slots, config.margin)
    message = f"editors={config.editors!r} are {len(chosen)} methods; --facts uses one"
    require(not config.editors or len(chosen) == 1, message, "editors")
    editors, left_out = applicable_editors(run.model, chosen)
    require(editors, "; ".join(left_out), None)
    return next(iter(editors.items()))


def read_new_facts(run, facts, known):
    """The file of --facts -> [Fact] with the new answers, checked.

    facts: of the run. known: the questions that the model answers correctly.
    """
    path = run.config.facts
    require_data_suffix(path, "facts")
    first_line = {}  # of each question
    new_facts = []
    for row, where in read_rows(path, ("question", "answer")):
        for name in ("question", "answer"):
            require(name in row, f'{where}: needs "question" and "answer"', "facts")
            validate_text(row[name], f'{where}: "{name}"')
        question = complete_question(run.data, row["question"])
        message = f"{where}: asks the same as {first_line.get(question)}; leave one out"
        require(question not in first_line, message, "facts")
        first_line[question] = where
        try:
            fact = make_fact(run.data, facts, question, row["answer"])
        except ConfigError as e:
            raise ConfigError(f"{where}: {e}", "facts") from None
        if question not in known:
            check_unknown(run, facts, question, where)
        length, most = len(fact.prompt) + len(fact.answer), max_tokens(run.model)
        message = f"{where}: {length} tokens with the answer; the model has positions for {most}"
        require(length <= most, message, "facts")
        new_facts.append(fact)
    require(new_facts, f"{path} is empty; it needs a line for each fact to edit", "facts")
    return new_facts


def check_unknown(run, facts, question, where):
    """ConfigError for a question that the model answers wrongly, unless --add 1 is given."""
    if run.config.add:
        return
    asked = [fact.question for fact in facts]
    if question in asked:
        wrong = f"{where}: the run has the fact {question!r}, but the model answers it wrongly"
        what = "train it longer (unless it was held out), or write the new answer with --add 1"
        raise ConfigError(f"{wrong}; {what}", "facts")
    problem = f"{where}: no fact of the run asks {question!r}"
    near = difflib.get_close_matches(question, asked, n=1, cutoff=NEAR)
    if near:
        problem += f"; close to it is {near[0]!r}"
    raise ConfigError(f"{problem}; --add 1 adds it as a new fact", "facts")


def apply_editor(run, editor, new_facts, others):
    """Change the run's model so that it answers the new facts; others are to keep their answers."""
    # An editor takes some facts to keep. Without others, these are the new ones.
    kept = others or new_facts
    longest = max(len(fact.prompt) + len(fact.answer) for fact in kept)
    kept = kept[:: math.ceil(len(kept) * longest / KEPT_TOKENS)]
    try:
        editor(run.model, *encode_facts(run, new_facts), *encode_facts(run, kept))
    except ValueError as e:
        raise ConfigError(str(e)) from None


def describe_edit(run, editor, new_facts):
    """What config.json of the edited run says about the edit: see edited_run.EDIT."""
    rows = []
    for fact in new_facts:
        rows.append({"question": fact.question, "answer": answer_text(run.data, fact)})
    config = run.config
    about = {"run": run.folder, "checkpoint": config.checkpoint, "step": run.step}
    return about | {"editor": editor, "facts": rows}


def describe_answers(run, new_facts, before, after):
    """The model's answers before and after, a dict for each of the new facts."""
    edits = []
    for fact, old, new in zip(new_facts, before, after):
        edits.append(
            {
                "question": fact.question,
                "before": old.text,
                "asked for": answer_text(run.data, fact),
                "after": new.text,
                "exact": np.array_equal(new.tokens, fact.answer),
                "probability": new.probability,
            }
        )
    return edits


def report_edits(run, edits, efficacy, specificity, probability):
    """Print what became of the edited facts and, specificity, of the others."""
    n = len(edits)
    text = f"{efficacy['value'] * n:.0f} of {n} facts have the new answer"
    text += f" (mean probability {probability:.2g})"
    n_before = sum(edit["before"] == edit["asked for"] for edit in edits)
    if n_before:
        text += f"; {n_before} of these had it before the edit"
    if specificity:
        share, n = specificity["value"], specificity["n"]
        text += f"; {share * n:.0f} of {n} other known facts ({share:.1%}) keep theirs"
    run.finding(text)
    head = ("question", "before", "asked for", "after")
    rows = []
    for edit in edits:
        rows.append([edit[name] for name in head])
    print_table(head, rows)


def report_changed(run, changed, answers):
    """Print the first of the other facts that changed. answers: what the model says to these."""
    if not changed:
        return
    say(f"other facts that changed, the first {len(answers)} of {len(changed)}:")
    rows = []
    for fact, answer in zip(changed, answers):
        rows.append((fact.question, answer_text(run.data, fact), answer.text))
    print_table(("question", "before", "after"), rows)


def undo(run):
    """Take the latest edit of the run back, and print what it answers now."""
    require_single_process(run)
    edit = undo_latest_edit(run)
    n = len(edit["facts"])
    say(f"{run.folder}: took back the latest edit, of {n} facts by {edit['editor']!r}")
    stale = [file for file in os.listdir(run.folder) if file.startswith(("eval_", "ablate_"))]
    if stale:
        say("note: eval_* and ablate_* in it were measured before; run those commands again")
