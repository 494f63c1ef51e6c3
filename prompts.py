"""Facts with many templates, prompts made of them, and when an answer counts as right.

A fact is {"uuid", "relation", "subject", "answers" (any counts, the first is the main one), "manual", "auto"}: two lists of
templates with [X] for the subject and [Y] for the answer. Files (.jsonl, .parquet, .csv) may hold MyriadLAMA's own rows, one
for each template (uuid, rel_uri, sub_ent, obj_aliases, template, is_manual); one row for each fact (relation, subject, answers,
manual_templates, auto_templates); or questions (question, paraphrases, answers). Every fact has a
uuid of its own: rows without one are numbered.

>>> fill("[X] plays the [Y].", "Marty Ehrlich")
'Marty Ehrlich plays the [MASK].'
>>> right("Saxophone,", ["saxophone", "sax"]), right("", ["saxophone"]), right("Saxophone player", ["sax"])
(True, False, False)
"""

import ast
import contextlib
import csv
import functools
import importlib.util
import io
import json
import os
import re
import tokenize
import unicodedata
from collections import Counter

import numpy as np

from configs import ConfigError, convert, require
from synth_files import read_rows

INSTRUCTION = "Predict the [MASK] in the sentence in one word."
ASK = "Answer the question in a few words."  # where templates are whole questions

# ---- facts -------------------------------------------------------------------------------------------------------------


def read_facts(path, key="path"):
    """A file of facts, or "" for those of world_facts.py -> list of facts. ConfigError says which row is at fault; key: the
    setting that names the file."""
    if not path:
        import world_facts

        return [from_fact(row, "world_facts.py") for row in world_facts.facts()]
    ending = os.path.splitext(path)[1]
    require(os.path.exists(path), f"{key}={path} does not exist", key)
    require(os.path.isfile(path), f"{key}={path} is no file", key)  # a device may have no end
    require(ending in (".jsonl", ".parquet", ".csv"), f"{path} is neither .jsonl, .parquet nor .csv", "path")
    rows = list(read_csv(path) if ending == ".csv" else read_rows(path))
    require(rows, f"{path} holds no rows", "path")
    first = rows[0][0]
    for name, read in (("template", from_templates), ("manual_templates", from_facts), ("question", from_questions)):
        if name in first:
            return read(rows)
    names = ", ".join(map(str, first))[:200]
    raise ConfigError(f'{path} needs "template", "manual_templates" or "question" in its rows; it has {names}', "path")


def read_csv(path):
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            rows = csv.DictReader(f)
            names = rows.fieldnames or []
            twice = f"{path}: two columns have the same name; rename one"
            require(len(set(names)) == len(names), twice, "path")
            for row in rows:
                where = f"{path}:{rows.line_num}"
                # a comma in a cell without quotes would cut an answer in two
                long = f"{where}: more cells than the first line has names"
                require(None not in row, f"{long}; put quotes around commas", "path")
                yield row, where
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise ConfigError(f"{path} cannot be read as csv ({e})", "path") from None


def from_facts(rows):
    return distinct((from_fact(row, where), where) for row, where in rows)


def from_fact(row, where):
    """One row for a fact."""
    get = lambda *names: next((row[n] for n in names if row.get(n) not in (None, "")), None)
    for name in ("subject", "answers"):
        require(get(name), f'{where}: "{name}" is missing or empty', "path")
    fact = {
        "uuid": identity(row, where) or where,
        "relation": text_of(get("relation", "rel_uri") or "", where, "relation"),
        "subject": text_of(row["subject"], where, "subject"),
        "answers": answers_of(row["answers"], where, "answers"),
        "manual": texts(get("manual_templates") or [], where, "manual_templates", may_be_empty=True),
        "auto": texts(get("auto_templates") or [], where, "auto_templates", may_be_empty=True),
    }
    return checked(fact, where)


def from_templates(rows):
    """MyriadLAMA's own rows: one for each template of a fact."""
    facts = {}
    for row, where in rows:
        for name in ("uuid", "sub_ent", "obj_aliases", "template", "is_manual"):
            require(row.get(name) not in (None, ""), f'{where}: "{name}" is missing or empty', "path")
        relation = text_of(row.get("rel_uri") or "", where, "rel_uri")
        subject = text_of(row["sub_ent"], where, "sub_ent")
        uuid = identity(row, where)
        require(uuid, f'{where}: "uuid" is missing or empty', "path")
        answers = texts(row["obj_aliases"], where, "obj_aliases")
        if uuid not in facts:
            new = {"uuid": uuid, "relation": relation, "subject": subject}
            new["answers"] = answers_of(answers, where, "obj_aliases")
            facts[uuid] = {**new, "manual": [], "auto": []}, where
        fact, first = facts[uuid]
        same = (fact["relation"], fact["subject"]) == (relation, subject)
        same = same and set(fact["answers"]) & set(answers)
        require(same, f"{where}: uuid {uuid!r} is that of another fact, at {first}", "path")
        template = text_of(row["template"], where, "template")
        there = template in fact["manual"] + fact["auto"]
        require(not there, f"{where}: the fact of {first} has this template already", "path")
        fact["manual" if yes_or_no(row["is_manual"], where) else "auto"].append(template)
    return distinct((checked(fact, where), where) for fact, where in facts.values())


def from_questions(rows):
    """Questions with paraphrases: whole sentences, no slots."""
    facts = []
    for number, (row, where) in enumerate(rows):
        for name in ("question", "answers"):
            require(row.get(name), f'{where}: "{name}" is missing or empty', "path")
        more = texts(row.get("paraphrases") or [], where, "paraphrases", may_be_empty=True)
        fact = {
            "uuid": identity(row, where) or str(number),
            "relation": "",
            "subject": "",
            "answers": answers_of(row["answers"], where, "answers"),
            "manual": [text_of(row["question"], where, "question"), *more],
            "auto": [],
        }
        facts.append((fact, where))
    return distinct(facts)


def distinct(pairs):
    """(fact, where) pairs -> facts; ConfigError if two have one uuid, or are one fact twice: one of
    them might be the example that gives the other's answer away."""
    facts, places = [], {}
    for fact, where in pairs:
        what = tuple(squeezed(t) for t in (fact["relation"], fact["subject"], *fact["manual"]))
        for key, message in (
            (fact["uuid"], f"{where}: uuid {fact['uuid']!r} is that of the fact at {{}}, too"),
            ((what, tuple(fact["auto"])), f"{where}: the same fact as at {{}}; delete one of them"),
        ):
            first = places.setdefault(key, where)
            require(first is where, message.replace("{}", first), "path")
        facts.append(fact)
    return facts


def squeezed(text):
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def identity(row, where):
    """The uuid of a row as text, "" if it has none: whole numbers and texts count alike."""
    value = row.get("uuid")
    if isinstance(value, float) and value.is_integer():  # how tables with gaps hold whole numbers
        value = int(value)
    if value is None or value != value:  # also NaN, how tables hold nothing
        return ""
    kind = f'{where}: "uuid" must be text or a whole number, not {str(value)[:40]!r}'
    require(isinstance(value, (str, int)) and not isinstance(value, bool), kind, "path")
    return text_of(value, where, "uuid").strip()


def yes_or_no(value, where):
    try:
        word = value.strip() if isinstance(value, str) else value
        return convert(int(word) if word in (0.0, 1.0) else str(word).removesuffix(".0"), bool)
    except ValueError:
        message = f'{where}: "is_manual" must be true or false, not {str(value)[:40]!r}'
        raise ConfigError(message, "path") from None


def text_of(value, where, name):
    """A text, or a number as text; ConfigError for lists and the like, and for half characters."""
    plain = isinstance(value, (str, int, float)) and not isinstance(value, bool)
    plain = plain and value == value  # no NaN, how tables hold nothing
    require(plain, f'{where}: "{name}" must be text, not {str(value)[:40]!r}', "path")
    value = str(value)
    half = any("\ud800" <= letter <= "\udfff" for letter in value)
    require(not half, f'{where}: "{name}" holds half a character (a lone surrogate)', "path")
    return value


def texts(value, where, name, may_be_empty=False):
    """A list of strings, also as JSON, Python or numpy would print it (csv has no lists); a bare
    text, 1945 too, is a list of one."""
    if isinstance(value, str):
        value = printed_list(value, where, name)
    good = isinstance(value, (list, tuple, np.ndarray)) and all(isinstance(v, str) and v.strip() for v in value)
    require(good and (len(value) or may_be_empty), f'{where}: "{name}" must be a list of texts, none of them empty', "path")
    return [text_of(v, where, name) for v in value]


def printed_list(text, where, name):
    """The list that a text shows, or [text]; ConfigError for a text that shows half a list."""
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(text)
        if isinstance(found, list):
            return found
        if isinstance(found, str):
            return [found]
    found = python_strings(text)
    if found is not None:
        return found
    # a template may begin with a slot
    shows = re.match(r"\s*(array\(|\{|\[(?!X\]|Y\]|MASK\]))", text)
    require(not shows, f'{where}: "{name}" is no list that can be read: {text[:40]!r}', "path")
    return [text]


def python_strings(text):
    """The strings in a list, tuple or single string as Python or numpy print it; else None.

    numpy puts no commas between them; Python would glue such strings together.
    """
    found, depth = [], 0
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(text.strip()).readline))
        for token in tokens:
            if token.type == tokenize.STRING:
                found.append(ast.literal_eval(token.string))
            elif token.type == tokenize.OP and token.string in ("[", "]", "(", ")", ","):
                depth += token.string in ("[", "(")
            elif token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER):
                return None
    except (tokenize.TokenError, SyntaxError, ValueError):
        return None
    if depth > 1 or (depth == 0 and len(found) != 1):
        return None
    return found


def answers_of(value, where, name):
    """`texts`, each of which some generated text could match."""
    found = texts(value, where, name)
    for answer in found:
        blank = f'{where}: "{name}" holds {answer[:40]!r}, in which there is nothing to read'
        require(words(answer), blank, "path")
    return found


def checked(fact, where):
    require(fact["manual"] or fact["auto"], f"{where}: the fact has no template", "path")
    for template in fact["manual"] + fact["auto"]:
        fine = "[X]" in template and ("[Y]" in template or "[MASK]" in template)
        require(fine, f"{where}: the template {template[:80]!r} needs [X] and [Y] (or [MASK])", "path")
    return fact


def fill(template, subject):
    return template.replace("[X]", subject).replace("[Y]", "[MASK]")


# ---- prompts -----------------------------------------------------------------------------------------------------------


def choose(fact, manual, auto, random):
    """The first `manual` manual templates of a fact (all if -1), and `auto` automatic ones at random (all if -1).

    -> texts (n), is it manual (n,). What is left of one kind never fills up the other.
    """
    first = fact["manual"][: len(fact["manual"]) if manual < 0 else manual]
    some = fact["auto"] if auto < 0 else [fact["auto"][i] for i in random.permutation(len(fact["auto"]))[:auto]]
    return [fill(t, fact["subject"]) for t in [*first, *some]], np.arange(len(first) + len(some)) < len(first)


def without(pool, facts):
    """The facts of a pool that are not among `facts`: an example must not give an answer away."""
    # A subject in other templates is the same fact; a question has no subject.
    name = lambda f: (squeezed(f["relation"]), squeezed(f["subject"] or f["manual"][0]))
    asked = set(map(name, facts))
    return [f for f in pool if name(f) not in asked]


def split_shots(facts, shots, random):
    """Facts -> {relation: `shots` facts to show}, the others. Of each relation its first ones in random order."""
    by_relation, shown, rest = {}, {}, []
    for i in random.permutation(len(facts)):
        by_relation.setdefault(facts[i]["relation"], []).append(facts[i])
    for relation, mine in by_relation.items():
        few = f"relation {relation!r} has {len(mine)} facts, too few for {shots} shots and a question; lower shots"
        require(len(mine) > shots, few, "shots")
        shown[relation], more = mine[:shots], mine[shots:]
        rest += more
    order = {f["uuid"]: i for i, f in enumerate(facts)}
    return shown, sorted(rest, key=lambda f: order[f["uuid"]])


def shots_from(pool, relations, shots, random):
    """{relation: `shots` facts of a pool}; of a relation that the pool lacks, of any."""
    require(len(pool) >= shots, f"the pool has {len(pool)} facts that are not asked, too few for {shots} shots", "shots_path")
    by_relation = {}
    for i in random.permutation(len(pool)):
        by_relation.setdefault(pool[i]["relation"], []).append(pool[i])
    every = [f for mine in by_relation.values() for f in mine]
    return {r: (by_relation.get(r) or every)[:shots] for r in relations}


def prefix_text(shots, questions):
    """Instruction and examples: what all templates of a question share."""
    asked = lambda f: fill((f["manual"] or f["auto"])[0], f["subject"])
    lines = [f"Q: {asked(f)}\nA: {f['answers'][0]}\n\n" for f in shots]
    return f"{ASK if questions else INSTRUCTION}\n\n" + "".join(lines)


# ---- right or wrong ----------------------------------------------------------------------------------------------------


# One spelling for what keyboards and typesetters write differently.
SPELLING = {
    **dict.fromkeys(map(ord, "\u2018\u2019\u02bc\u2032"), "'"),
    **dict.fromkeys(map(ord, "\u201c\u201d"), '"'),
    **dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013"), "-"),
}


def pieces(text):
    """Words and marks of a text, composed (NFC), in one spelling, without invisible characters."""
    text = unicodedata.normalize("NFC", text).translate(SPELLING)
    text = "".join(letter for letter in text if unicodedata.category(letter) != "Cf")
    return re.findall(r"\w+|[^\w\s]", text)


def words(text):
    """Lower-case words and marks, lemmas if simplemma is installed."""
    return [lemma(w) for w in pieces(text)]


def has_lemmas():
    return importlib.util.find_spec("simplemma") is not None


@functools.cache
def lemma(word):
    if not has_lemmas():
        return word.lower()
    import simplemma

    return simplemma.lemmatize(word, lang="en").lower()


def first_word(text):
    """The first word of a generated text; "" if there is none."""
    return (text.split() or [""])[0]


def prediction(fact, text):
    """What of a generated text counts: all of it where the prompt asks for a few words (ASK); its
    first word where it asks for one, or as many as the shortest answer has."""
    if fact.get("subject") == "":
        return " ".join(text.split())
    return " ".join(text.split()[: min(len(a.split()) for a in fact["answers"])])


def right(prediction, answers):
    """Are the words of any answer in the prediction, in order and together? (As MyriadLAMA counts.)
    Marks around an answer do not count, nor does the case of a word."""
    said = spellings(pieces(prediction))
    for answer in answers:
        wanted = spellings(without_marks(pieces(answer)))
        n = len(wanted)
        starts = range(len(said) - n + 1) if n else ()
        if any(all(map(same_word, said[i : i + n], wanted)) for i in starts):
            return True
    return False


def spellings(found):
    """Words -> (in lower case, as lemma) of each."""
    return [(w.casefold(), lemma(w)) for w in found]


def same_word(a, b):
    return a[0] == b[0] or a[1] == b[1]


def without_marks(found):
    """Words and marks without the sentence's marks around them; all, if there are only marks."""
    inner = [i for i, w in enumerate(found) if w not in ".,;:!?'\"()[]"]
    return found[inner[0] : inner[-1] + 1] if inner else found


def majority(shots, facts):
    """For each fact: is the most frequent main answer of the other facts of its relation right? No model at all."""
    counts, hits = {}, []
    shown = [f for mine in shots.values() for f in mine]
    # An example is one object, however many relations show it; two files may number rows alike.
    for fact in {id(f): f for f in [*facts, *shown]}.values():
        counts.setdefault(fact["relation"], Counter())[fact["answers"][0]] += 1
    for fact in facts:
        others = counts[fact["relation"]] - Counter([fact["answers"][0]])
        guess = others.most_common(1)[0][0] if others else ""
        hits.append(right(prediction(fact, guess), fact["answers"]))
    return hits
