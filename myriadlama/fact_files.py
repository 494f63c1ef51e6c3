"""Read facts (see prompts.py) from .jsonl, .parquet or .csv files.

The rows of a file are of one of three formats:

- fact: subject, answers, manual_templates, auto_templates, relation
- MyriadLAMA, a row for each template: uuid, rel_uri, sub_ent, obj_aliases, template, is_manual
- question: question, answers, paraphrases

Every fact has a uuid of its own; rows without one are numbered. A row that cannot be read is a
ConfigError with one sentence that says which row and why.
"""

import ast
import contextlib
import io
import json
import os
import re
import tokenize
from collections import Counter

import numpy as np

from myriadlama import facts as builtin
from myriadlama.prompts import casefolded, fill, normalise, split_words
from nanorecall.dataset_files import read_rows, require_data_suffix
from nanorecall.settings import ConfigError, convert, require


def read_facts(path, key="path"):
    """A file of facts, or "" for the built-in ones -> list of facts.

    key: the setting that names the file.
    """
    if not path:
        return [parse_fact(row, "myriadlama/facts.py") for row in builtin.facts()]
    require(os.path.exists(path), f"{key}={path} does not exist", key)
    require(os.path.isfile(path), f"{key}={path} is no file", key)  # a device may have no end
    require_data_suffix(path, "path")
    rows = list(read_rows(path))
    require(rows, f"{path} holds no rows", "path")
    first_row = rows[0][0]
    for column, parse_rows in FORMATS.items():
        if column in first_row:
            return parse_rows(rows)
    columns = ", ".join(map(str, first_row))[:200]
    needed = f'{path} needs "template", "manual_templates" or "question" in its rows'
    raise ConfigError(f"{needed}; it has {columns}", "path")


# ---- the three formats ---------------------------------------------------------------------------


def parse_fact_rows(rows):
    facts = []
    for number, (row, where) in enumerate(rows):
        fact = parse_fact(row, where)
        fact["uuid"] = fact["uuid"] or str(number)
        facts.append((fact, where))
    return reject_repeats(facts)


def parse_fact(row, where):
    """A row of the format "fact" -> fact, whose uuid may be empty."""

    def first_given(*columns):
        for column in columns:
            if row.get(column) not in (None, ""):
                return row[column]
        return None

    for column in ("subject", "answers"):
        require(first_given(column), f'{where}: "{column}" is missing or empty', "path")
    fact = {
        "uuid": parse_uuid(row, where),
        "relation": parse_text(first_given("relation", "rel_uri") or "", where, "relation"),
        "subject": parse_subject(row["subject"], where, "subject"),
        "answers": parse_answers(row["answers"], where, "answers"),
    }
    for kind in ("manual", "auto"):
        column = f"{kind}_templates"
        templates = first_given(column) or []
        fact[kind] = parse_list(templates, where, column, may_be_empty=True)
    return validate_fact(fact, where)


def parse_myriadlama_rows(rows):
    """MyriadLAMA's own rows, one for each template of a fact -> facts."""
    found = {}  # uuid -> fact, where its first row is
    for row, where in rows:
        for column in ("uuid", "sub_ent", "obj_aliases", "template", "is_manual"):
            given = row.get(column) not in (None, "")
            require(given, f'{where}: "{column}" is missing or empty', "path")
        relation = parse_text(row.get("rel_uri") or "", where, "rel_uri")
        subject = parse_subject(row["sub_ent"], where, "sub_ent")
        uuid = parse_uuid(row, where)
        require(uuid, f'{where}: "uuid" is missing or empty', "path")
        answers = parse_list(row["obj_aliases"], where, "obj_aliases")
        if uuid not in found:
            fact = {"uuid": uuid, "relation": relation, "subject": subject}
            fact["answers"] = parse_answers(answers, where, "obj_aliases")
            found[uuid] = {**fact, "manual": [], "auto": []}, where
        fact, first_row = found[uuid]
        same = (fact["relation"], fact["subject"]) == (relation, subject)
        same = same and not set(fact["answers"]).isdisjoint(answers)
        require(same, f"{where}: uuid {uuid!r} is that of another fact, at {first_row}", "path")
        template = parse_text(row["template"], where, "template")
        is_new = template not in fact["manual"] + fact["auto"]
        message = f"{where}: the fact of {first_row} has this template already"
        require(is_new, message, "path")
        kind = "manual" if parse_bool(row["is_manual"], where) else "auto"
        fact[kind].append(template)
    return reject_repeats((validate_fact(fact, where), where) for fact, where in found.values())


def parse_question_rows(rows):
    """Questions with paraphrases -> facts whose templates are whole questions, without [X]."""
    facts = []
    for number, (row, where) in enumerate(rows):
        for column in ("question", "answers"):
            require(row.get(column), f'{where}: "{column}" is missing or empty', "path")
        paraphrases = row.get("paraphrases") or []
        paraphrases = parse_list(paraphrases, where, "paraphrases", may_be_empty=True)
        fact = {
            "uuid": parse_uuid(row, where) or str(number),
            "relation": "",
            "subject": "",
            "answers": parse_answers(row["answers"], where, "answers"),
            "manual": [parse_text(row["question"], where, "question"), *paraphrases],
            "auto": [],
        }
        facts.append((fact, where))
    return reject_repeats(facts)


FORMATS = {  # column that only this format has -> its reader
    "template": parse_myriadlama_rows,
    "manual_templates": parse_fact_rows,
    "question": parse_question_rows,
}


def validate_fact(fact, where):
    """The fact itself, if every template has its slots."""
    require(fact["manual"] or fact["auto"], f"{where}: the fact has no template", "path")
    for template in fact["manual"] + fact["auto"]:
        complete = "[X]" in template and ("[Y]" in template or "[MASK]" in template)
        message = f"{where}: the template {template[:80]!r} needs [X] and [Y] (or [MASK])"
        require(complete, message, "path")
    return fact


def reject_repeats(facts_with_places):
    """(fact, where) pairs -> facts. Two facts with one uuid are a ConfigError, and so is a fact
    that is there twice: it could become the example that gives its own answer away. A template that
    is there twice would have two votes."""
    facts, place_of_uuid, place_of_content = [], {}, {}
    for fact, where in facts_with_places:
        texts = Counter(fill(text, fact["subject"]) for text in fact["manual"] + fact["auto"])
        text, n_times = texts.most_common(1)[0]
        message = f"{where}: the template {text[:80]!r} is there {n_times} times; delete the others"
        require(n_times == 1, message, "path")
        uuid = fact["uuid"]
        first = place_of_uuid.setdefault(uuid, where)
        message = f"{where}: uuid {uuid!r} is that of the fact at {first}, too"
        require(first is where, message, "path")
        texts = (fact["relation"], fact["subject"], *fact["manual"])
        content = tuple(map(casefolded, texts)), tuple(fact["auto"])
        first = place_of_content.setdefault(content, where)
        message = f"{where}: the same fact as at {first}; delete one of them"
        require(first is where, message, "path")
        facts.append(fact)
    return facts


# ---- values of cells -----------------------------------------------------------------------------


def parse_uuid(row, where):
    """The uuid of a row as text, or "". The number 7 and the text "7" are the same uuid."""
    value = row.get("uuid")
    # Tables with gaps hold whole numbers as floats, and NaN where there is nothing.
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or value != value:
        return ""
    valid = isinstance(value, (str, int)) and not isinstance(value, bool)
    message = f'{where}: "uuid" must be text or a whole number, not {str(value)[:40]!r}'
    require(valid, message, "path")
    return parse_text(value, where, "uuid").strip()


def parse_bool(value, where):
    """The value of is_manual: a bool, or 0, 1, yes, no, true, false as text or number."""
    try:
        value_or_word = value.strip() if isinstance(value, str) else value
        if value_or_word in (0.0, 1.0):
            return convert(int(value_or_word), bool)
        return convert(str(value_or_word).removesuffix(".0"), bool)
    except ValueError:
        message = f'{where}: "is_manual" must be true or false, not {str(value)[:40]!r}'
        raise ConfigError(message, "path") from None


def parse_text(value, where, column):
    """A text, or a number as text."""
    valid = isinstance(value, (str, int, float)) and not isinstance(value, bool)
    valid = valid and value == value  # NaN is how tables hold nothing
    require(valid, f'{where}: "{column}" must be text, not {str(value)[:40]!r}', "path")
    text = str(value)
    has_surrogate = any("\ud800" <= letter <= "\udfff" for letter in text)
    message = f'{where}: "{column}" holds half a character (a lone surrogate)'
    require(not has_surrogate, message, "path")
    return text


def parse_subject(value, where, column):
    text = parse_text(value, where, column)
    require(split_words(text), f'{where}: "{column}" holds nothing that can be read', "path")
    return text


def parse_answers(value, where, column):
    """A list of answers. An answer without words or marks could never be matched."""
    answers = parse_list(value, where, column)
    for answer in answers:
        message = f'{where}: "{column}" holds {answer[:40]!r}, in which there is nothing to read'
        require(normalise(answer), message, "path")
    return answers


def parse_list(value, where, column, may_be_empty=False):
    """A list of texts, or such a list printed as text by JSON, Python or numpy (csv has no lists).

    Any other text, also 1945, is a list of one text.
    """
    if isinstance(value, str):
        value = parse_printed_list(value, where, column)
    valid = isinstance(value, (list, tuple, np.ndarray))
    valid = valid and all(isinstance(text, str) and text.strip() for text in value)
    valid = valid and (len(value) or may_be_empty)
    message = f'{where}: "{column}" must be a list of texts, none of them empty'
    require(valid, message, "path")
    return [parse_text(text, where, column) for text in value]


def parse_printed_list(text, where, column):
    """The list that a text shows, or [text]. ConfigError if it looks like a list but is none."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text)
        if isinstance(value, list):
            return value
        if isinstance(value, str):
            return [value]
    strings = parse_python_strings(text)
    if strings is not None:
        return strings
    # A bracket begins a list, but [X], [Y] and [MASK] begin a template.
    looks_like_list = re.match(r"\s*(array\(|\{|\[(?!X\]|Y\]|MASK\]))", text)
    message = f'{where}: "{column}" is no list that can be read: {text[:40]!r}'
    require(not looks_like_list, message, "path")
    return [text]


def parse_python_strings(text):
    """The strings in a list, tuple or single string as Python or numpy prints it, else None.

    We read token by token because numpy prints no commas, and Python's parser would join such
    strings into one.
    """
    strings, n_brackets = [], 0
    try:
        for token in tokenize.generate_tokens(io.StringIO(text.strip()).readline):
            if token.type == tokenize.STRING:
                strings.append(ast.literal_eval(token.string))
            elif token.type == tokenize.OP and token.string in ("[", "("):
                n_brackets += 1
            elif token.type == tokenize.OP and token.string in ("]", ")", ","):
                pass
            elif token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER):
                return None
    except (tokenize.TokenError, SyntaxError, ValueError):
        return None
    if n_brackets > 1 or (n_brackets == 0 and len(strings) != 1):
        return None
    return strings
