"""JSON that this project writes and reads back: config.json, status.json, log.jsonl, results.

    write_json(path, value)
    value = read_record(path, {"step": "count", "files": {"*": "hash"}})  # kinds: see KINDS
    rows = read_log("runs/RUN")

A record may be damaged, or from a stranger. Its values are therefore checked by kind before they
are used, and each problem is one ConfigError that names the file.
"""

import json
import math
import os
import re
import reprlib
import sys

from nanorecall.files import atomic_write, is_inside, size_of_file
from nanorecall.settings import ConfigError, RunError, say

# ---- writing -------------------------------------------------------------------------------------


def nan_to_null(value):
    """The same with None for NaN and infinity, which JSON lacks (the loss of a failed run)."""
    if isinstance(value, dict):
        return {str(k): nan_to_null(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [nan_to_null(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path, value, indent=1):
    """Write a value as JSON, whole or not at all. indent=None: in one line, for many numbers."""
    text = json.dumps(nan_to_null(value), indent=indent)
    atomic_write(path, lambda f: f.write(text.encode() + b"\n"))


# ---- reading -------------------------------------------------------------------------------------

DEEPEST = 40  # lists and dicts inside each other; our own files have 6

# Kinds of values in JSON: how a sentence names them, and whether a value is one.
KINDS = {
    "count": ("a whole number of at least 0", lambda v: type(v) is int and 0 <= v < 2**63),
    "size": ("a whole number of at least 1", lambda v: type(v) is int and 1 <= v < 2**63),
    "number": ("a number", lambda v: type(v) in (int, float) and abs(v) < 1e300),
    "number or null": (
        "a number or null",
        lambda v: v is None or type(v) in (int, float) and abs(v) < 1e300,
    ),
    "share": ("a number from 0 to 1", lambda v: type(v) in (int, float) and 0 <= v <= 1),
    "text": ("text", lambda v: isinstance(v, str)),
    "dict": ("an object", lambda v: isinstance(v, dict)),
    "list": ("a list", lambda v: isinstance(v, list)),
    "path inside": ("a path inside its folder", is_inside),
    "hash": ("a SHA-256", lambda v: isinstance(v, str) and re.fullmatch("[0-9a-f]{64}", v)),
}


def parse_json(text):
    """JSON as `write_json` and `JsonlLog` write it -> value; ValueError says what else it is.

    text: str or bytes. Refused beside what is no JSON: NaN, infinity (also as 1e999), deep nesting.
    """

    def refuse(word):
        raise ValueError(f"{word} is no number of JSON")

    def finite(word):
        number = float(word)
        if not math.isfinite(number):
            refuse(word)
        return number

    try:
        if isinstance(text, bytes):
            text = text.decode()
        value = json.loads(text, parse_float=finite, parse_constant=refuse)
        deep = is_deep(value)
    except UnicodeDecodeError as e:
        raise ValueError(f"byte {e.start + 1} is no UTF-8") from None
    except RecursionError:
        deep = True
    if deep:
        raise ValueError("nested too deeply")
    return value


def is_deep(value, left=DEEPEST):
    """Are there `left` lists and dicts inside each other?"""
    if left == 0:
        return True
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, list) and any(is_deep(v, left - 1) for v in value)


def check_kinds(value, kinds, where):
    """ConfigError unless value is of its kind: a key of KINDS, or {key: kind} for a dict that has
    these keys and maybe more.

    The key "*" stands for every key; [kind] is a list of such values. where: the file, for the
    sentence.
    """
    if isinstance(kinds, str):
        name, fits = KINDS[kinds]
        if not fits(value):
            raise ConfigError(f"{where} is {bounded(value)}, not {name}")
        return
    check_kinds(value, "list" if isinstance(kinds, list) else "dict", where)
    if isinstance(kinds, list):
        for i, item in enumerate(value):
            check_kinds(item, kinds[0], f"{where}[{i}]")
        return
    for key, kind in kinds.items():
        if key != "*" and key not in value:
            raise ConfigError(f"{where} has no {key!r}")
        keys = value if key == "*" else (key,)
        for k in keys:
            check_kinds(value[k], kind, f"{where}: {k!r}")


def bounded(value):
    """repr(value) of at most 40 characters. A list may hold itself, many times over."""
    if isinstance(value, (list, tuple, dict, set)):
        shown = reprlib.repr(value)
    else:
        shown = repr(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."


def read_json(path):
    """A JSON file of this project -> value; ConfigError if it is missing, unreadable or damaged."""
    try:
        size_of_file(path)
        with open(path, "rb") as f:
            return parse_json(f.read())
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}") from None
    except ValueError as e:
        raise ConfigError(f"{path} is damaged, or not of this project ({e})") from None


def read_record(path, kinds):
    """read_json of a file that must have `kinds` (see check_kinds)."""
    value = read_json(path)
    check_kinds(value, kinds, path)
    return value


def read_lines(path, kinds):
    """Rows of a .jsonl file that have `kinds` -> (rows, number of other lines). A line that a kill
    cut off is one of these."""
    rows, others = [], 0
    try:
        size_of_file(path)
        with open(path, "rb") as f:
            for line in f:
                if not line.strip():
                    continue
                try:
                    row = parse_json(line)
                    check_kinds(row, kinds, path)
                    rows.append(row)
                except (ValueError, ConfigError):
                    others += 1
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}") from None
    except ValueError as e:
        raise ConfigError(f"{path} cannot be read: {e}") from None
    return rows, others


# ---- log.jsonl -----------------------------------------------------------------------------------


class JsonlLog:
    """log.jsonl: a JSON object per line, {"kind": "train", "eval" or "memory", "step", ...}."""

    def __init__(self, folder, step, evaluates=True):
        """Open for appending. Rows after `step` (of the checkpoint) go: they will be made again.

        evaluates: whether the run begins with an evaluation of this step. Then its row goes, too.
        """
        self.path = os.path.join(folder, "log.jsonl")
        rows = read_log(folder) if os.path.exists(self.path) else []
        lines = []
        for row in rows:
            is_remade = evaluates and row["kind"] == "eval"
            if row["step"] < step or (row["step"] == step and not is_remade):
                lines.append(json.dumps(row).encode() + b"\n")
        atomic_write(self.path, lambda f: f.writelines(lines))
        self.file = open(self.path, "a", encoding="utf-8")

    def write(self, **row):
        try:
            self.file.write(json.dumps(nan_to_null(row)) + "\n")
            self.file.flush()
        except OSError as e:
            message = f"cannot write {self.path}: {e.strerror}; the checkpoints are whole"
            raise RunError(message) from None


MEASURED = {
    "loss": "number or null",
    "accuracy": "share",
    "exact_match": "share",
    "labels": "count",
    "n_examples": "count",
}

ROWS = {  # kind of a row of log.jsonl: what its readers need
    "train": {"loss": "number or null"},
    "eval": {**MEASURED, "seconds": "number"},
    "memory": {"layers": {"*": "dict"}},
}


def read_log(folder):
    """Rows of log.jsonl; a line that a kill cut off, or that is no row, is left out, and a note
    says so if there are more."""
    path = os.path.join(folder, "log.jsonl")
    found, lost = read_lines(path, {"kind": "text", "step": "count"})
    rows = []
    for row in found:
        try:
            check_kinds(row, ROWS.get(row["kind"], {}), path)
            rows.append(row)
        except ConfigError:
            lost += 1
    if lost > 1:
        say(f"note: {lost} lines of {path} are damaged and left out", file=sys.stderr)
    return rows
