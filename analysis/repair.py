"""Keep every complete record of a result file that was cut off, as by a full disk.

    python eval.py repair results.jsonl    # writes results.repaired.jsonl
"""

import json
import os

from nanorecall.checkpoint import atomic_write
from nanorecall.settings import ConfigError, require, say


def repair(args, config):
    """Write the complete records of a cut .json or .jsonl file to a new file beside it."""
    require(len(args) == 1, "name one file: python eval.py repair results.jsonl", None)
    (path,) = args
    base, extension = os.path.splitext(path)
    require(extension in (".json", ".jsonl"), f"{path} is neither .json nor .jsonl", None)
    out = f"{base}.repaired{extension}"
    require(not os.path.exists(out), f"{out} exists already; move it away first", None)
    text = read_text(path)
    if extension == ".jsonl":
        records, n_lost = complete_lines(text)
        body = "".join(json.dumps(record) + "\n" for record in records)
        summary = f"{len(records)} records kept, {n_lost} lines lost"
    else:
        try:
            value, is_whole = complete_json(text)
        except RecursionError:
            raise ConfigError(f"{path} is nested too deeply") from None
        require(isinstance(value, (dict, list)), f"{path} holds no complete record", None)
        body = json.dumps(value, indent=1) + "\n"
        summary = "it was whole" if is_whole else f"{len(value)} records kept"
    atomic_write(out, lambda f: f.write(body.encode()))
    say(f"{out}: {summary}")


def read_text(path):
    # Reading a device might never end.
    require(os.path.isfile(path) or not os.path.exists(path), f"{path} is no file", None)
    try:
        with open(path, "rb") as f:
            # The cut may lie inside a character of several bytes.
            return f.read().decode(errors="ignore")
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}") from None


def complete_lines(text):
    """JSON lines -> records of the complete lines, number of other lines.

    The last line may lack its newline if it is an object or list. (A 12 may be cut from 123.)
    """
    records, n_lost = [], 0
    for line in text.split("\n"):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, (dict, list)):
            records.append(record)
        else:
            n_lost += 1
    return records, n_lost


def complete_json(text):
    """The longest complete prefix of cut JSON -> value or None, and whether the text was complete.

    Kept are all complete members of objects and elements of lists. If the cut lies in a member that
    is a list or object, its complete part is kept. If it lies in an element of a list, that element
    is dropped, because it is a record.

    >>> complete_json('{"a": [1, 2, {"b": 3')
    ({'a': [1, 2]}, False)
    """
    try:
        return json.loads(text), True
    except (ValueError, RecursionError):
        pass
    try:
        value, _ = parse_prefix(text, skip_whitespace(text, 0))
    except RecursionError:
        # No record of ours nests so deeply.
        value = None
    return value, False


# What parse_prefix returns, where "|" is `start`:
#   |12, ...       (12, 2)            complete
#   |12            (None, None)       cut: the number may have had more digits
#   |"ab           (None, None)       cut, and nothing of it is complete
#   |[1, 2, 3      ([1, 2], None)     cut; its complete part
#   |[1, 2]        ([1, 2], 6)        complete
#   |null, ...     (None, 4)          complete: the end tells null from nothing


def parse_prefix(text, start):
    """The JSON value at text[start:] -> its complete part, and its end in text (None if cut)."""
    if text[start : start + 1] not in ("[", "{"):
        return parse_scalar(text, start)
    closing, value = ("]", []) if text[start] == "[" else ("}", {})
    at = skip_whitespace(text, start + 1)
    while text[at : at + 1] != closing:
        name = None
        if isinstance(value, dict):
            name, end = parse_prefix(text, at)
            if end is None or not isinstance(name, str):
                return value, None
            at = skip_whitespace(text, end)
            if text[at : at + 1] != ":":
                return value, None
            at = skip_whitespace(text, at + 1)
        item, end = parse_prefix(text, at)
        if name is None and end is not None:
            value.append(item)
        if name is not None and (end is not None or isinstance(item, (list, dict)) and item):
            value[name] = item
        if end is None:
            return value, None
        at = skip_whitespace(text, end)
        if text[at : at + 1] == ",":
            at = skip_whitespace(text, at + 1)
        elif text[at : at + 1] != closing:
            return value, None
    return value, at + 1


def parse_scalar(text, start):
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except ValueError:
        return None, None
    is_number = not isinstance(value, (str, bool)) and value is not None
    if is_number and end == len(text):
        return None, None
    return value, end


def skip_whitespace(text, at):
    """The first index from `at` on that is no JSON whitespace."""
    while text[at : at + 1] in (" ", "\n", "\t", "\r"):
        at += 1
    return at
