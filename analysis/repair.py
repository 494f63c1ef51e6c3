"""Keep every whole record of a damaged result file, and say where others were lost.

    python eval.py repair results.jsonl    # writes results.repaired.jsonl

The file may be cut off, torn in the middle, or joined from several. Line breaks inside of strings
and a byte order mark do no harm. A record is a line of .jsonl; of .json, an element of a list, or
one of several objects. Nothing is guessed: a record is kept as it was, or lost.
"""

import json
import os
import re

from nanorecall.files import atomic_write
from nanorecall.settings import ConfigError, require, say


def repair(args, config):
    """Write the whole records of a damaged .json or .jsonl file to a new file beside it."""
    require(len(args) == 1, "name one file: python eval.py repair results.jsonl", None)
    (path,) = args
    base, extension = os.path.splitext(path)
    require(extension in (".json", ".jsonl"), f"{path} is neither .json nor .jsonl", None)
    out = f"{base}.repaired{extension}"
    require(not os.path.exists(out), f"{out} exists already; move it away first", None)
    text = read_text(path)
    if extension == ".jsonl":
        lost = []
        kept = whole_records(text, lost)
        body = "".join(json.dumps(record) + "\n" for record in kept)
    else:
        try:
            kept, lost = whole_json(text)
        except RecursionError:
            raise ConfigError(f"{path} is nested too deeply") from None
        require(kept is not None, f"{path} holds no whole record", None)
        body = json.dumps(kept, indent=1) + "\n"
    atomic_write(out, lambda f: f.write(body.encode()))
    say(f"{out}: {describe_kept(kept)}, {describe_lost(text, lost)}")


MAX_SHOWN = 20  # places


def read_text(path):
    # Reading a device might never end.
    require(os.path.isfile(path) or not os.path.exists(path), f"{path} is no file", None)
    try:
        with open(path, "rb") as f:
            # Bytes that are no text become surrogates, which mark a record as damaged.
            return f.read().decode(errors="surrogateescape")
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}") from None


def describe_kept(kept):
    """How many records a repaired value has: of a dict, in each of its lists."""
    if isinstance(kept, list):
        return f"{len(kept)} records kept"
    parts = []
    for name, value in kept.items():
        parts.append(f"{name} ({len(value)} records)" if isinstance(value, list) else name)
    return f"kept {', '.join(parts)}"


def describe_lost(text, lost):
    """How many records were lost, and the line and column of each, counted from 1."""
    if not lost:
        return "nothing lost"
    # The last entry may be about the end of the file, with which any number may be lost.
    n_lost = sum(at < len(text) for at, _, _ in lost)
    lines = [f"{n_lost} lost"]
    for at, _, why in lost[:MAX_SHOWN]:
        line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
        lines.append(f"  line {line}, column {column}: {why}")
    if len(lost) > MAX_SHOWN:
        lines.append(f"  and {len(lost) - MAX_SHOWN} more")
    return "\n".join(lines)


# ---- from record to record -----------------------------------------------------------------------
# `lost` is a list of (start, end, reason), to which these functions append.


def whole_json(text):
    """Text of a .json file -> its whole part (None: nothing), and what is lost.

    A list keeps its whole elements. An object keeps its whole members, and the whole parts of
    members that are lists or objects. Of several values in a row, the whole ones become a list.

    >>> whole_json('[{"a": 1}, {"a": 2,, "b": 3}, {"a": 4}]')[0]
    [{'a': 1}, {'a': 4}]
    """
    at = skip(text, 0)
    kept, end, why = read_value(text, at)
    if not why and isinstance(kept, (dict, list)) and skip(text, end) == len(text):
        return kept, []
    kept, lost = [], []
    opening = text[at : at + 1]
    if opening == "{" and skip(text, next_record(text, at)) == len(text):
        kept, _ = whole_members(text, at, lost)
    else:
        if opening == "[":
            kept, at = whole_elements(text, at, lost)
        for record in whole_records(text, lost, at):
            # Lists one after another are joined.
            kept += record if isinstance(record, list) else [record]
    return kept or None, lost


def whole_records(text, lost, at=0):
    """Those objects and lists one after another from text[at:] on that are whole.

    >>> whole_records('{"a": 1}{"a": 2}, {"a": 3', [])
    [{'a': 1}, {'a': 2}]
    """
    records, first_name = [], ""
    at = skip(text, at, SPACE + ",")
    while at < len(text):
        first_name = first_name_of(text, at) or first_name
        record, end, why = read_value(text, at)
        if not why and not isinstance(record, (dict, list)):
            why = "no object or list"
        if why:
            end = next_record(text, at, first_name)
            lost.append((at, end, why))
        else:
            records.append(record)
        at = skip(text, end, SPACE + ",")
    return records


def whole_elements(text, at, lost):
    """The damaged list at text[at:] -> its whole elements, and its end."""
    elements, first_name = [], ""
    at = next_item(text, at + 1, lost)
    while at < len(text) and text[at] != "]":
        first_name = first_name_of(text, at) or first_name
        element, end, why = read_value(text, at)
        if first_name and not why and not isinstance(element, dict):
            why = "perhaps a piece of a record"
        if why:
            is_record = first_name or text[at] in "{["
            end = next_record(text, at, first_name) if is_record else end_of_scalar(text, at)
            lost.append((at, end, why))
        else:
            elements.append(element)
        at = next_item(text, end, lost)
    return elements, after_bracket(text, at, lost)


def whole_members(text, at, lost):
    """The damaged object at text[at:] -> its whole members, and its end."""
    members = {}
    at = next_item(text, at + 1, lost)
    while at < len(text) and text[at] != "}":
        match = NAME.match(text, at)
        if match:
            n_lost = len(lost)
            value, end = read_member(text, match.end(), lost)
            # A damaged list or object may have a whole part.
            if len(lost) == n_lost or value:
                members[json.loads(match[1], strict=False)] = value
        else:
            end = end_of_scalar(text, at)
            lost.append((at, end, "no name of a member"))
        at = next_item(text, end, lost)
    return members, after_bracket(text, at, lost)


def read_member(text, at, lost):
    """The value at text[at:] -> its whole part, and its end."""
    value, end, why = read_value(text, at)
    # If another quote was missing, the string has gone on until the next one.
    if not why and not MEMBER_END.match(text, end):
        why = "what follows is no member"
    opening = text[at : at + 1]
    if why and opening == "{":
        return whole_members(text, at, lost)
    if why and opening == "[":
        return whole_elements(text, at, lost)
    if why:
        value, end = None, end_of_scalar(text, at)
        lost.append((at, end, why))
    return value, end


DECODER = json.JSONDecoder(strict=False)  # which allows line breaks in strings


def read_value(text, at):
    """The value at text[at:] -> value, its end, and why it is not whole, as text or ""."""
    try:
        value, end = DECODER.raw_decode(text, at)
    except json.JSONDecodeError as e:
        return None, None, e.msg
    except (ValueError, RecursionError):  # ValueError: thousands of digits
        return None, None, "no record nests so deeply, and no number is so long"
    is_number = not isinstance(value, (str, bool, list, dict)) and value is not None
    if is_number and end == len(text):
        return None, None, "the number may have had more digits"
    if NO_TEXT.search(text, at, end):
        return None, None, "bytes that are no text"
    return value, end, ""


# ---- where to go on after damage -----------------------------------------------------------------

SPACE = " \t\r\n\ufeff"  # and the byte order mark, which files that were joined have inside
STRING = r'"[^"\\]*(?:\\.[^"\\]*)*"'
NAME = re.compile(rf"({STRING})\s*:\s*", re.DOTALL)
MEMBER_END = re.compile(rf"\s*([,}}]|\Z|{STRING}\s*:)", re.DOTALL)
FIRST_NAME = re.compile(rf"\{{\s*{STRING}\s*:", re.DOTALL)
TOKEN = re.compile(rf'{STRING}|["{{}}\[\]]', re.DOTALL)
NO_TEXT = re.compile("[\ud800-\udfff]")
GARBAGE = re.compile(r'[^"{\[:\n]+(?=[{\[])')  # such as zeros, which a crash may leave
SCALAR_END = re.compile(r"[,}\]\n]")


def next_record(text, at, first_name=""):
    """Where the next record may begin, after a damaged one at text[at:].

    That is behind its closing bracket. If brackets or quotes are damaged, it is the next place that
    begins as these records do, or a bracket after garbage, or the next line with the same indent.
    """
    line = text[text.rfind("\n", 0, at) + 1 : at + 1]
    indent = line[: skip(line, 0)]
    next_line = re.compile(rf"\n{indent}(?=[{{\[])").search(text, at)
    limit = next_line.end() if next_line else len(text)
    end = closing_bracket(text, at, limit)
    if end is not None:
        # With a quote too many, brackets in strings count, and records behind seem to be inside.
        sibling = re.compile(rf"\}}\s*,\s*(?={re.escape(first_name)})").search(text, at, end)
        return sibling.end() if first_name and sibling else end
    alike = text.find(first_name, at + 1, limit) if first_name else -1
    if alike >= 0:
        return alike
    garbage = GARBAGE.match(text, at, limit)
    return garbage.end() if garbage else limit


def first_name_of(text, at):
    """How the object at text[at:] begins, such as '{"name":'; "" if it is none."""
    match = FIRST_NAME.match(text, at)
    return match[0] if match else ""


def closing_bracket(text, at, limit):
    """The end of the object or list at text[at:limit]; None if its brackets do not match."""
    if text[at] not in "{[":
        return None
    opened = ""
    for match in TOKEN.finditer(text, at, limit):
        token = match[0]
        if token in "{[":
            opened += token
        elif token in "}]":
            if opened[-1] + token not in ("{}", "[]"):
                return None
            opened = opened[:-1]
            if not opened:
                return match.end()
        elif token == '"':
            return None
    return None


def end_of_scalar(text, at):
    """Where a damaged number, word, string or name ends: at a comma, closing bracket or line."""
    match = SCALAR_END.search(text, at + 1)
    return match.start() if match else len(text)


def skip(text, at, characters=SPACE):
    """The first index from `at` on that is none of these characters."""
    while at < len(text) and text[at] in characters:
        at += 1
    return at


def next_item(text, at, lost):
    """From text[at:] on, the start of the next item of a list or object, or its closing bracket."""
    at = skip(text, at)
    n_commas = 0
    while text[at : at + 1] == ",":
        n_commas += 1
        if n_commas > 1:
            lost.append((at, at + 1, "nothing between two commas"))
        at = skip(text, at + 1)
    return at


def after_bracket(text, at, lost):
    """The index after a closing bracket, which may be missing at the end of the file."""
    reaches_end = lost and lost[-1][1] == len(text)
    if at == len(text) and not reaches_end:
        lost.append((at, at, "the end is missing"))
    return at + 1
