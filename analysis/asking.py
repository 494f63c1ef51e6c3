"""What a model answers to a question, and how probable that answer is.

    python eval.py runs/RUN --ask "34512:"
    python eval.py runs/RUN --ask '["Who wrote Rido?", "Who wrote Lude?"]'

A fact is a document with one question and its answer: of the tasks qa and digits, or a document of
your own.

Letters: n facts, T tokens of a question, A tokens of an answer.
"""

from dataclasses import dataclass

import numpy as np
import torch

from analysis.edited_run import recorded_edits
from analysis.editors import answered
from analysis.trained_run import require_decoding
from nanorecall.documents import normalize
from nanorecall.fact_files import FactDataset
from nanorecall.metrics import autocast, in_eval_mode
from nanorecall.rng import IGNORE_INDEX
from nanorecall.settings import require, say

TASKS = ("qa", "digits", "text")  # whose documents may be facts

# ---- facts ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fact:
    question: str  # in one Unicode form, with single blanks: to look it up
    document: object  # as the data has it: a text, or (question, answer)
    prompt: np.ndarray  # (T,) tokens up to the answer, BOS first
    answer: np.ndarray  # (A,) its tokens; the last is EOS where the data trains on an end


def known_facts(run):
    """The facts of the run's data. Those that were edited have their new answers.

    ConfigError if there are none.
    """
    task = getattr(run.settings.data, "task", run.settings.train.data)
    source = getattr(run.data, "source", None)
    message = f"it needs facts, task=qa, digits or text, not {task}"
    require(task in TASKS and isinstance(source, FactDataset), message, None)
    texts = source.texts
    if task == "qa":  # without the documents of context_docs, whose answers are in the context
        texts = [text for text in texts if isinstance(text, str)]
    facts = find_facts(run.data, texts)
    message = "its documents hold no facts; facts have a question and an answer"
    require(facts, message, None)
    edited = {}
    for edit in recorded_edits(run.folder):
        for row in edit["facts"]:
            edited[row["question"]] = row["answer"]
    current = [fact for fact in facts if fact.question not in edited]
    for question, answer in edited.items():
        current.append(make_fact(run.data, facts, question, answer))
    return current


def find_facts(data, documents):
    """[Fact] of documents. Those without a question, or with several answers, are left out."""
    facts = []
    for first in range(0, len(documents), 1000):
        part = documents[first : first + 1000]
        tokens, labels, cu_seqlens = data.encoder.encode_and_label(part)
        for document, start, end in zip(part, cu_seqlens[:-1], cu_seqlens[1:]):
            labelled = np.flatnonzero(labels[start:end] != IGNORE_INDEX)
            # Before the first label of a text that is all answer there is BOS alone.
            if len(labelled) == 0 or labelled[0] == 1:
                continue
            if labelled[-1] - labelled[0] >= len(labelled):
                continue
            prompt = tokens[start : start + labelled[0]]
            answer = tokens[start + labelled[0] : start + labelled[-1] + 1]
            is_pair = isinstance(document, tuple)
            question = document[0] if is_pair else data.tokenizer.decode(prompt)
            facts.append(Fact(normalize(question), document, prompt, answer))
    return facts


def find_fact(facts, question):
    """The Fact with this question (normalized), or None."""
    return next((fact for fact in facts if fact.question == question), None)


def complete_question(data, question):
    """A question as Fact.question has it. In qa and digits, the user may leave out the colon."""
    question = normalize(question)
    is_number = data.config.task in ("qa", "digits") and question[-1:].isdigit()
    return question + ":" if is_number else question


def other_wording(data, question):
    """A question (completed) in the other wording that qa has with forms=2; None without one."""
    if "form" not in data.source.slices:
        return None
    # As data_synth.second_form writes it.
    key = question.removeprefix("q ")[:-1]
    return f"q {key}?" if question.endswith(":") else f"{key}:"


def make_fact(data, facts, question, answer):
    """The Fact with this question (completed) and answer, written as the run's documents are.

    The form is that of the fact with this question, or of the first of facts. ConfigError if the
    tokenizer or the label mask would read another question or answer.
    """
    known = find_fact(facts, question)
    form = known or facts[0]
    if isinstance(form.document, tuple):
        document = (known.document[0] if known else question + " ", answer)
    else:
        before, old_answer = map(data.tokenizer.decode, (form.prompt, form.answer))
        after = form.document[len(before + old_answer) :]
        blank = old_answer[: len(old_answer) - len(old_answer.lstrip())]
        document = (before if known else question) + blank + answer + after
    found = find_facts(data, [document])
    message = f"the run's data cannot encode {question!r} with the answer {answer!r}"
    require(found and found[0].question == question, message, None)
    fact = found[0]
    unknown = data.tokenizer.unknown
    new_tokens = fact.answer if known else np.concatenate([fact.prompt, fact.answer])
    require(unknown < 0 or unknown not in new_tokens, message, None)
    # A mask may find another part of the text than the one that was put there.
    is_whole = data.tokenizer.decode(fact.answer).strip() == answer.strip()
    require(isinstance(document, tuple) or is_whole, message, None)
    if not has_end(data, fact):
        # The model has not learned where an answer ends, so it could write no other length.
        message = f"the answer {answer!r} has {len(fact.answer)} tokens; those of this run have"
        require(len(fact.answer) == len(form.answer), f"{message} {len(form.answer)}", None)
    return fact


def answer_text(data, fact):
    """The answer of a Fact as text."""
    if isinstance(fact.document, tuple):
        return fact.document[1]
    return data.tokenizer.decode(fact.answer).strip()


def has_end(data, fact):
    """Is the model trained to end its answer by EOS?"""
    return fact.answer[-1] == data.tokenizer.eos


def are_answered(model, run, facts):
    """Which facts the model answers to the last token: (n,) bool."""
    parts = [np.empty(0, bool)]
    size = run.config.eval_batch_size
    for first in range(0, len(facts), size):
        tokens, targets = encode_facts(run, facts[first : first + size])
        parts.append(answered(model, tokens, targets).cpu().numpy())
    return np.concatenate(parts)


def encode_facts(run, facts):
    """n facts -> tokens and targets (n, T + A), padded at their ends."""
    documents = [fact.document for fact in facts]
    tokens, targets, *_ = run.data.encoder.batch(documents, packed=False)
    return run.tensor(tokens), run.tensor(targets)


# ---- answers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    tokens: np.ndarray  # (A,) decoded greedily
    text: str
    probability: float  # of all its tokens, EOS included


@in_eval_mode
def ask(model, run, fact):
    """What the model answers to the question of a Fact -> Answer. fact.answer is not shown to it.

    ConfigError if the question has more tokens than the model has positions for.
    """
    data = run.data
    limit = data.config.max_bytes if has_end(data, fact) else len(fact.answer)
    n, most = len(fact.prompt), max_tokens(model)
    message = f"{fact.question!r} has {n} tokens; the model has positions for {most}"
    require(n <= most, message, None)
    # The last token of an answer is not read.
    limit = min(limit, most - n + 1)
    logits, cache = model.forward_cached(run.tensor(fact.prompt[None]))
    decoded, probability = [], 1.0
    while True:
        best = logits[:, -1].float().softmax(-1).max(-1)
        probability *= best.values.item()
        decoded.append(best.indices.item())
        if decoded[-1] == data.tokenizer.eos or len(decoded) == limit:
            break
        logits, cache = model.forward_cached(best.indices[:, None], cache)
    return Answer(np.array(decoded), data.tokenizer.decode(decoded).strip(), probability)


def max_tokens(model):
    """The most tokens that the model can read: those for which it has positions."""
    if getattr(getattr(model, "config", None), "pos_emb", "none") == "none":
        return torch.iinfo(torch.int64).max
    return model.config.seq_len


def answer_questions(run):
    """Print the model's answer to each question of --ask, and its probability. Writes nothing."""
    require_decoding(run, "answering")
    facts = known_facts(run)
    asked = run.config.ask
    for question in [asked] if isinstance(asked, str) else asked:
        question = complete_question(run.data, question)
        fact = find_fact(facts, question)
        note = "" if fact else "; no fact of the run asks this"
        if fact is None:
            # With any answer of the right length: the model does not see it.
            any_answer = answer_text(run.data, facts[0])
            fact = make_fact(run.data, facts, question, any_answer)
        with autocast(run.device, run.dtype):
            answer = ask(run.model, run, fact)
        if run.world.is_main:
            say(f"{question} {answer.text}  (probability {answer.probability:.3g}{note})")
