"""Prompts made of facts with many templates, and when a generated answer is correct.

A fact is a dict: "uuid", "relation", "subject", "answers" (each of them is correct, the first is
the one that examples show), and "manual" and "auto", two lists of templates. A template has [X] for
the subject and [Y] for the answer. The subject of a whole question is "". fact_files.py reads
facts.

>>> fill("[X] plays the [Y].", "Marty Ehrlich")
'Marty Ehrlich plays the [MASK].'
>>> is_correct("Saxophone,", ["saxophone", "sax"]), is_correct("", ["saxophone"])
(True, False)
>>> is_correct("Saxophone player", ["sax"])
False
"""

import functools
import importlib.util
import re
import unicodedata
from collections import Counter

import numpy as np

from nanorecall.settings import require, say
from nanorecall.source_files import is_main_rank

INSTRUCTION = "Predict the [MASK] in the sentence in one word."
QUESTION_INSTRUCTION = "Answer the question in a few words."  # for templates that are questions


# ---- templates and examples ----------------------------------------------------------------------


def fill(template, subject):
    # The subject last: it may hold a slot itself.
    return template.replace("[Y]", "[MASK]").replace("[X]", subject)


def select_templates(fact, n_manual, n_auto, rng):
    """The first n_manual manual templates and n_auto random automatic ones; -1 means all.

    -> templates (n), is_manual (n,). If a fact has too few templates of one kind, they are not
    replaced by templates of the other kind.
    """
    manual, auto = fact["manual"], fact["auto"]
    if n_manual >= 0:
        manual = manual[:n_manual]
    if n_auto >= 0:
        auto = [auto[i] for i in rng.permutation(len(auto))[:n_auto]]
    templates = manual + auto
    return templates, np.arange(len(templates)) < len(manual)


def without_subject(fact, template):
    """The template filled with nothing, for the prior of its answer. Nothing of a whole question.

    >>> without_subject({"subject": "Iowa"}, "In which country is [X]? [Y]")
    'In which country is ? [MASK]'
    """
    if fact["subject"] == "":
        return ""
    return " ".join(fill(template, "").split())


def exclude(pool, facts):
    """The facts of a pool that are not among `facts`. An example must not give an answer away.

    Two files may name a relation otherwise, so a subject with one of its answers is enough.
    """
    asked, answered = set(), set()
    for fact in facts:
        asked |= identities(fact)
        answered |= answers_of(fact)
    left = []
    for fact in pool:
        if asked.isdisjoint(identities(fact)) and answered.isdisjoint(answers_of(fact)):
            left.append(fact)
    return left


def answers_of(fact):
    """{(subject or question, answer)}, of any relation."""
    answers = list(map(casefolded, fact["answers"]))
    return {(text, answer) for _, text in identities(fact) for answer in answers}


def identities(fact):
    """{(relation, text)}: a fact with any of these is the same one, in other templates or words."""
    # A question has no subject.
    texts = [fact["subject"]] if fact["subject"] else fact["manual"]
    return {(casefolded(fact["relation"]), casefolded(text)) for text in texts}


def answered_identities(fact):
    """identities, those of a subject with each answer.

    A file may leave out the relation. Japan's capital and currency then differ in the answer alone.
    """
    answers = set(map(casefolded, fact["answers"])) if fact["subject"] else {""}
    return {(*identity, answer) for identity in identities(fact) for answer in answers}


def casefolded(text):
    """Text for comparisons, without case and repeated spaces."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def by_relation(facts, rng):
    """{relation: its facts in random order}"""
    groups = {}
    for i in rng.permutation(len(facts)):
        groups.setdefault(facts[i]["relation"], []).append(facts[i])
    return groups


def split_few_shot(facts, shots, rng):
    """Take `shots` random facts of each relation as examples -> {relation: examples}, other facts.

    The other facts keep their order. A fact may have several rows, in other templates: none of them
    is among the others if one is an example.
    """
    examples, shown = {}, set()
    for relation, group in by_relation(facts, rng).items():
        chosen = []
        for fact in group:
            if len(chosen) < shots and shown.isdisjoint(answered_identities(fact)):
                chosen.append(fact)
                shown |= answered_identities(fact)
        n_different = sum(shown.isdisjoint(answered_identities(fact)) for fact in group)
        problem = f"relation {relation!r} has {len(chosen) + n_different} different facts, too few"
        advice = "lower num_shots, or give examples from another file with --shots_path"
        message = f"{problem} for {shots} shots and a question; {advice}"
        require(len(chosen) == shots and n_different > 0, message, "num_shots")
        examples[relation] = chosen
    return examples, [fact for fact in facts if shown.isdisjoint(answered_identities(fact))]


def sample_few_shot(pool, relations, shots, rng):
    """{relation: `shots` facts of a pool}. Where it has too few of one, others fill up."""
    problem = f"the pool has {len(pool)} facts that are not asked, too few for {shots} shots"
    require(len(pool) >= shots, problem, "shots_path")
    groups = by_relation(pool, rng)
    shuffled = []
    for group in groups.values():
        shuffled += group
    examples, filled = {}, []
    for relation in relations:
        own = groups.get(relation, [])
        others = [fact for fact in shuffled if fact["relation"] != relation]
        examples[relation] = [*own, *others][:shots]
        if len(own) < shots:
            filled.append(repr(relation))
    if filled and is_main_rank():
        names = ", ".join(filled[:5]) + (" ..." if len(filled) > 5 else "")
        say(f"note: the pool has fewer than {shots} facts of {names}; others fill up")
    return examples


def instruction(is_question):
    return QUESTION_INSTRUCTION if is_question else INSTRUCTION


def first_template(fact):
    """The template in which an example is shown."""
    return (fact["manual"] or fact["auto"])[0]


def few_shot_prefix(examples, is_question):
    """The text before every template of a question: instruction and examples."""
    text = f"{instruction(is_question)}\n\n"
    for fact in examples:
        shown = fill(first_template(fact), fact["subject"])
        text += f"Q: {shown}\nA: {fact['answers'][0]}\n\n"
    return text


# ---- scoring -------------------------------------------------------------------------------------

SPELLING = {  # one character for variants that keyboards and typesetters use
    **dict.fromkeys(map(ord, "\u2018\u2019\u02bc\u2032"), "'"),
    **dict.fromkeys(map(ord, "\u201c\u201d"), '"'),
    **dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013"), "-"),
}


def split_words(text):
    """Words and punctuation marks of a text, in NFC and one spelling."""
    text = unicodedata.normalize("NFC", text).translate(SPELLING)
    # Cf: invisible characters, such as soft hyphens
    text = "".join(letter for letter in text if unicodedata.category(letter) != "Cf")
    return re.findall(r"\w+|[^\w\s]", text)


def normalise(text):
    """Lower-case words and marks of a text; lemmas if simplemma is installed."""
    return list(map(lemma, split_words(text)))


def has_lemmas():
    return importlib.util.find_spec("simplemma") is not None


@functools.cache
def lemma(word):
    if not has_lemmas():
        return word.lower()
    import simplemma

    return simplemma.lemmatize(word, lang="en").lower()


def prediction(fact, text):
    """The part of a generated text that is scored.

    It is the first word, or as many words as the shortest answer has. Of a whole question, whose
    prompt asks for a few words, it is the whole text.
    """
    words = text.split()
    if fact.get("subject") != "":
        shortest = min(len(answer.split()) for answer in fact["answers"])
        words = words[:shortest]
    return " ".join(words)


def scored_words(fact, text):
    """What is scored of a generated text, as words that are equal if two answers are, (words).

    Case and punctuation are ignored. Lemmas are not used, so that a vote is the same everywhere.
    """
    words = strip_punctuation(split_words(prediction(fact, text)))
    return tuple(word.casefold() for word in words)


def is_correct(text, answers):
    """Does a text contain an answer, as consecutive words? MyriadLAMA counts this way.

    Words are equal if they or their lemmas are, regardless of case. Punctuation around an answer is
    ignored.
    """
    said = split_words(text)
    for answer in answers:
        wanted = strip_punctuation(split_words(answer))
        if not wanted:
            continue
        for start in range(len(said) - len(wanted) + 1):
            if all(map(same_word, said[start : start + len(wanted)], wanted)):
                return True
    return False


def same_word(a, b):
    return a.casefold() == b.casefold() or lemma(a) == lemma(b)


def strip_punctuation(words):
    """Words and marks without the punctuation around them. A text of only punctuation is kept."""
    inner = [i for i, word in enumerate(words) if word not in ".,;:!?'\"()[]"]
    return words[inner[0] : inner[-1] + 1] if inner else words


def majority_baseline(pool, facts):
    """For each fact: is the most frequent answer of the other facts of its relation correct?

    This needs no model. pool: the facts that examples are taken from; none of them is in `facts`.
    """
    counts = {}
    for fact in [*pool, *facts]:
        counts.setdefault(fact["relation"], Counter())[fact["answers"][0]] += 1
    correct = []
    for fact in facts:
        others = counts[fact["relation"]] - Counter([fact["answers"][0]])
        guess = others.most_common(1)[0][0] if others else ""
        correct.append(is_correct(prediction(fact, guess), fact["answers"]))
    return correct
