"""Facts with many templates, prompts made of them, and when an answer counts as right.

A fact is {"uuid", "relation", "subject", "answers" (any counts, the first is the main one), "manual", "auto"}: two lists of
templates with [X] for the subject and [Y] for the answer. Files (.jsonl, .parquet, .csv) may hold MyriadLAMA's own rows, one
for each template (uuid, rel_uri, sub_ent, obj_aliases, template, is_manual); one row for each fact (relation, subject, answers,
manual_templates, auto_templates); or questions (question, paraphrases, answers).

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
import json
import os
import re
from collections import Counter

import numpy as np

from configs import ConfigError, require
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
        with open(path, encoding="utf-8", newline="") as f:
            for number, row in enumerate(csv.DictReader(f), 2):
                yield row, f"{path}:{number}"
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise ConfigError(f"{path} cannot be read as csv ({e})", "path") from None


def from_facts(rows):
    return [from_fact(row, where) for row, where in rows]


def from_fact(row, where):
    """One row for a fact."""
    get = lambda *names: next((row[n] for n in names if row.get(n) not in (None, "")), None)
    for name in ("subject", "answers"):
        require(get(name), f'{where}: "{name}" is missing or empty', "path")
    fact = {
        "uuid": str(row.get("uuid") or where),
        "relation": str(get("relation", "rel_uri") or ""),
        "subject": str(row["subject"]),
        "answers": texts(row["answers"], where, "answers"),
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
        known = {"uuid": str(row["uuid"]), "relation": str(row.get("rel_uri") or ""), "subject": str(row["sub_ent"])}
        fact = facts.setdefault(
            known["uuid"], {**known, "answers": texts(row["obj_aliases"], where, "obj_aliases"), "manual": [], "auto": []}
        )
        fact["manual" if str(row["is_manual"]).lower() in ("true", "1", "1.0") else "auto"].append(str(row["template"]))
        fact["where"] = where
    return [checked(fact, fact.pop("where")) for fact in facts.values()]


def from_questions(rows):
    """Questions with paraphrases: whole sentences, no slots."""
    facts = []
    for number, (row, where) in enumerate(rows):
        for name in ("question", "answers"):
            require(row.get(name), f'{where}: "{name}" is missing or empty', "path")
        templates = [str(row["question"]), *texts(row.get("paraphrases") or [], where, "paraphrases", may_be_empty=True)]
        answers = texts(row["answers"], where, "answers")
        facts.append(
            {
                "uuid": str(row.get("uuid", number)),
                "relation": "",
                "subject": "",
                "answers": answers,
                "manual": templates,
                "auto": [],
            }
        )
    return facts


def texts(value, where, name, may_be_empty=False):
    """A list of strings, also as JSON or Python would print it (csv has no lists); a bare text, 1945 too, is a list of one."""
    if isinstance(value, str):
        found = None
        for read in (json.loads, ast.literal_eval):
            with contextlib.suppress(ValueError, SyntaxError):
                found = found or read(value)
        value = found if isinstance(found, (list, tuple)) else [found if isinstance(found, str) else value]
    good = isinstance(value, (list, tuple, np.ndarray)) and all(isinstance(v, str) and v.strip() for v in value)
    require(good and (len(value) or may_be_empty), f'{where}: "{name}" must be a list of texts, none of them empty', "path")
    return list(value)


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
    name = lambda f: (f["relation"], f["subject"], f["manual"][:1] or f["auto"][:1])
    asked = {str(name(f)) for f in facts}
    return [f for f in pool if str(name(f)) not in asked]


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


def words(text):
    """Lower-case words and marks, lemmas if simplemma is installed."""
    return [lemma(w) for w in re.findall(r"\w+|[^\w\s]", text)]


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


def right(prediction, answers):
    """Are the words of any answer in the prediction, in order and together? (As MyriadLAMA counts.)"""
    said = words(prediction)
    for answer in map(words, answers):
        n = len(answer)
        if n and any(said[i : i + n] == answer for i in range(len(said) - n + 1)):
            return True
    return False


def majority(shots, facts):
    """For each fact: is the most frequent main answer of the other facts of its relation right? No model at all."""
    counts, hits = {}, []
    for fact in {f["uuid"]: f for f in [*facts, *(f for mine in shots.values() for f in mine)]}.values():
        counts.setdefault(fact["relation"], Counter())[fact["answers"][0]] += 1
    for fact in facts:
        others = counts[fact["relation"]] - Counter([fact["answers"][0]])
        guess = others.most_common(1)[0][0] if others else ""
        hits.append(right(first_word(guess), fact["answers"]))
    return hits
