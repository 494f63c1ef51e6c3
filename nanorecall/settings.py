"""Settings: dataclass defaults, then override files, then command-line flags; the last one wins.

    python train.py configs/mqar_gpt.py --lr 3e-3 --n_layers=2

An override file is plain Python run in an empty namespace; every top-level name it sets is a setting (names that start
with an underscore are the file's own). A flag is `--key=value` or `--key value`; dashes in a key count as underscores and
a flag without a value means true. The dataclasses say what exists, of which type, and (in the comment beside each field)
why; `--help` is made from those comments. Whatever is wrong ends as one ConfigError: where, what, and what to do.
"""

import ast
import contextlib
import dataclasses
import difflib
import inspect
import io
import json
import math
import os
import sys
import tokenize
import types
import typing
from dataclasses import dataclass, field


class ConfigError(Exception):
    """One sentence for the user. `key` names the setting at fault, so that `build` can say where it was set."""

    def __init__(self, message, key=None):
        super().__init__(message)
        self.key = key


class RunError(Exception):
    """One sentence about a run that cannot go on although its settings are right: disk full, a rank lost."""


@dataclass(frozen=True)
class Setting:
    """One assignment as the user wrote it: the key, its text or Python value, and where it was set ("--lr", "f.py:3")."""

    key: str
    value: object
    source: str


def derived(default):
    """A field that another part of the program fills in (data tells the model its vocabulary); users cannot set it."""
    return field(default=default, metadata={"derived": True})


# ---- reading: command line and files -> a list of Settings -------------------------------------------------------------


def split_argv(argv):
    """Split a command line into positional words and a list of Settings, in order. `-h` is `--help`."""
    words, settings = [], []
    i = 0
    while i < len(argv):
        word = argv[i]
        i += 1
        if word == "-h":
            word = "--help"
        if not word.startswith("--"):
            words.append(word)
            continue
        key, equals, value = word[2:].partition("=")
        if not key.replace("-", "_").isidentifier():
            raise ConfigError(f"{word!r} is not a flag; write --key=value or --key value")
        if not equals:
            takes_next = i < len(argv) and not argv[i].startswith("--")
            value = argv[i] if takes_next else "true"
            i += takes_next
        settings.append(Setting(key.replace("-", "_"), value, "--" + key))
    return words, settings


def read_argv(argv):
    """A command line -> words that are no override files, and all Settings in the order in which they win."""
    words, flags = split_argv(argv)
    files = [w for w in words if w.endswith(".py")]
    return [w for w in words if w not in files], [s for path in files for s in run_override_file(path)] + flags


def run_override_file(path):
    """Run one override file and return its Settings, each with the line that set it last."""
    # A device may have no end.
    require(os.path.isfile(path) or not os.path.exists(path), f"{path} is no file", None)
    try:
        with open(path, encoding="utf-8") as f:
            source = f.read()
    except (OSError, UnicodeDecodeError, ValueError) as e:
        raise ConfigError(f"{path}: cannot read this override file ({e})") from None
    namespace = {}
    try:
        tree = ast.parse(source, path)
        # The file is the user's own program; what it prints belongs on the screen, but not on our standard output.
        with contextlib.redirect_stdout(sys.stderr):
            exec(compile(tree, path, "exec"), namespace)
    except (Exception, SystemExit) as e:
        line = line_of(e, path)
        raise ConfigError(f"{path}:{line}: this override file does not run ({type(e).__name__}: {e})") from None
    lines = _assigned_lines(tree)
    return [
        Setting(key, value, f"{path}:{lines.get(key, 1)}")
        for key, value in namespace.items()
        if isinstance(key, str) and not key.startswith("_") and not isinstance(value, types.ModuleType)
    ]


def line_of(error, path):
    """The line of the file at which it raised an error, or cannot be parsed."""
    line, traceback = getattr(error, "lineno", None) or 1, error.__traceback__
    while traceback:
        if traceback.tb_frame.f_code.co_filename == path:
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return line


def _assigned_lines(tree):
    stores = (n for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
    return {n.id: n.lineno for n in sorted(stores, key=lambda n: n.lineno)}


# ---- checking: Settings -> dataclass instances -------------------------------------------------------------------------


def field_names(cls):
    """The names a user may set on this dataclass."""
    return [f.name for f in dataclasses.fields(cls) if not f.metadata.get("derived")]


def reject_unknown(settings, *classes):
    """Refuse the first setting that none of the dataclasses has, naming the nearest one that exists."""
    known = [name for cls in classes for name in field_names(cls)]
    for s in settings:
        if s.key not in known:
            raise ConfigError(f"{s.source}: there is no setting {s.key!r}{_nearest(s.key, known)}")


def build_config(cls, settings, **told_values):
    """One checked instance of `cls` from the settings that belong to it; a key set twice takes its last value.

    A dataclass may have `check()`, which raises ConfigError(message, key) for values that cannot be, and `unused()`,
    which returns {name: reason} for settings that have no effect beside the others: setting one of those away from its
    default is refused rather than ignored.
    """
    hints = typing.get_type_hints(cls)
    mine = {s.key: s for s in settings if s.key in field_names(cls)}
    values = {}
    for key, s in mine.items():
        try:
            values[key] = convert(s.value, hints[key])
        except ValueError as e:
            raise ConfigError(f"{s.source}: {key} {e}") from None
    # What is told wins, and goes only to a config that has a field for it.
    config = cls(**{**values, **{k: v for k, v in told_values.items() if k in hints}})
    try:
        getattr(config, "check", lambda: None)()
    except ConfigError as e:
        raise ConfigError(f"{mine[e.key].source}: {e}" if e.key in mine else str(e), e.key) from None
    reject_unused(config, getattr(config, "unused", dict)(), mine)
    return config


def reject_unused(config, reasons, mine):
    """Raise for a setting in `reasons` (name -> why it has no effect) that differs from its default.

    mine: {name: Setting}, to say where it was set.
    """
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.name in reasons and value != f.default:
            where = f"{mine[f.name].source}: " if f.name in mine else ""
            raise ConfigError(f"{where}{f.name}={value!r} has no effect: {reasons[f.name]}; leave it out", f.name)


Json = dict | list | str  # the type of a setting that takes JSON


def convert(value, kind):
    """`value` (text from a flag, or a Python value from a file) as the annotated type; ValueError says what is wrong.

    Types: bool, int, float, str, tuples of them (`tuple[tuple[int, int], ...]`, written as a Python literal), and Structure.
    """
    if kind == Json:
        return _convert_structure(value)
    if typing.get_origin(kind) is tuple:
        return _convert_tuple(value, kind)
    shown = _short(value)
    if kind is str:
        if not isinstance(value, str):
            raise ValueError(f"takes text, not {shown}")
        if "\0" in value:
            raise ValueError(f"takes text that may name a file, not {shown}")
        return value
    if kind is bool:
        words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
        word = str(value).lower()
        if not isinstance(value, (bool, int, str)) or word not in words:
            raise ValueError(f"takes 0 or 1, not {shown}")
        return words[word]
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"takes a number, not {shown}")
    try:
        number = int(value) if isinstance(value, str) and kind is int else float(value)
    except (ValueError, OverflowError):
        try:  # 1e3 is a fine way to write an integer
            number = float(value)
        except (ValueError, OverflowError):
            raise ValueError(f"takes a number, not {shown}") from None
    if isinstance(number, float) and not math.isfinite(number):
        raise ValueError(f"takes a finite number, not {shown}")
    if kind is int and number != int(number):
        raise ValueError(f"takes a whole number, not {shown}")
    if kind is float:
        return float(number)
    number = int(value if isinstance(value, int) else number)
    if abs(number) >= 2**63:
        raise ValueError(f"takes a number below 2**63, not {shown}")
    return number


def _convert_structure(value):
    if isinstance(value, (dict, list, tuple)):
        return value
    if not isinstance(value, str):
        raise ValueError(f"takes text, a list or a dict, not {_short(value)}")
    if value.strip()[:1] not in ("{", "["):
        return value
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return read(value.strip())
    raise ValueError(f"is no JSON: {_short(value)}")


def _convert_tuple(value, kind):
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value.strip() or "()")
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # all that literal_eval raises
            raise ValueError(f"takes a list such as [(2, 200), (4, 60)], not {_short(value)}") from None
    if not isinstance(value, (tuple, list)):
        raise ValueError(f"takes a list, not {_short(value)}")
    kinds = typing.get_args(kind)
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        return tuple(convert(v, kinds[0]) for v in value)
    if len(value) != len(kinds):
        raise ValueError(f"takes {len(kinds)} values in each item, not {_short(value)}")
    return tuple(convert(v, k) for v, k in zip(value, kinds))


def _short(value):
    try:
        text = repr(value)
    except Exception:  # a file may hold any object, also one that cannot print itself
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def _nearest(name, known):
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else "; --help lists them all"


# ---- for check() in the dataclasses ------------------------------------------------------------------------------------


def at_least(config, low, *names):
    """Every named setting is >= low."""
    for name in names:
        if getattr(config, name) < low:
            raise ConfigError(f"{name}={getattr(config, name)} must be at least {low}", name)


def within(config, low, high, *names):
    """Every named setting is in [low, high]."""
    for name in names:
        if not low <= getattr(config, name) <= high:
            raise ConfigError(f"{name}={getattr(config, name)} must be between {low} and {high}", name)


def one_of(config, table, *names):
    """Every named setting is a key of `table`."""
    for name in names:
        value = getattr(config, name)
        if value not in table:
            close = difflib.get_close_matches(value, list(table), n=1)
            hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(table)}"
            raise ConfigError(f"{name}={value!r} is unknown; {hint}", name)


def require(condition, message, key):
    """Raise ConfigError(message, key) unless the condition holds."""
    if not condition:
        raise ConfigError(message, key)


# ---- what goes to the screen ---------------------------------------------------------------------


def printable(text, keep=""):
    """Text with every character spelled out that a terminal would obey or hide; those in `keep`
    stay as they are.

    >>> printable("a\\x1b[2Jb")
    'a\\\\x1b[2Jb'
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def say(*words, sep=" ", **where):
    """print(), for text that holds names and contents of files: they may hold escape sequences.
    Ends of lines stay."""
    print(printable(sep.join(map(str, words)), keep="\n\t"), **where)


# ---- help and the way out ----------------------------------------------------------------------------------------------


def field_docs(cls):
    """{field: (group, comment)} from the source of a dataclass and of those that it extends.

    The comment stands beside the field. A line `# -- optimizer` begins the group "optimizer".
    """
    found = {} if cls.__base__ is object else field_docs(cls.__base__)
    source = inspect.cleandoc("\n" + inspect.getsource(cls))
    comments, groups = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line, text = token.start[0], token.string.lstrip("# ")
            comments[line] = text
            if text.startswith("-- "):
                groups[line] = text[3:]
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            begun = [line for line in groups if line < node.lineno]
            group = groups[max(begun)] if begun else ""
            found[node.target.id] = group, comments.get(node.end_lineno, "")
    return found


def help_text(doc, *classes, common=()):
    """The script's docstring, then every setting with its default and reason.

    common: names of settings to show first. The others follow by dataclass and group.
    """
    sections = {"the settings that one turns most": dict.fromkeys(common)}
    for cls in classes:
        file = os.path.basename(inspect.getsourcefile(cls))
        docs = field_docs(cls)
        for f in dataclasses.fields(cls):
            if f.metadata.get("derived"):
                continue
            group, comment = docs[f.name]
            title = f"settings of {file}, {group}" if group else f"settings of {file}"
            section = sections["the settings that one turns most"]
            if f.name not in common:
                section = sections.setdefault(title, {})
            default = f"{f.name}={f.default}"
            section[f.name] = f"  --{default:32s} {comment}"
    lines = [doc.strip(), ""]
    for title, section in sections.items():
        shown = [line for line in section.values() if line]
        if shown:
            lines += [f"{title}:", *shown, ""]
    return "\n".join(lines)


class Screen:
    """Standard output or error, which never raises: the work goes on without it.

    Its reader may go (`... | head`), and its disk may be full.
    """

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self.attempt(lambda: self.stream.write(text))
        return len(text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, work):
        try:
            work()
        except OSError as e:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            # The stream keeps what it could not write, and tries again when the process ends.
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)
            if not isinstance(e, BrokenPipeError) and self is not sys.stderr:
                note = f"note: the output ends here ({e.strerror}); the work goes on"
                print(note, file=sys.stderr)


def open_screens():
    """Make Screens of standard output and error, also where the user has closed them (`>&-`)."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Takes the lowest free number. Else the next file gets it, and what a library prints.
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")
        if hasattr(stream, "reconfigure"):
            # A terminal that lacks a letter must not end the work.
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, Screen(stream))


def run_cli(main):
    """Run main(); a ConfigError becomes one line on standard error and exit status 2, a RunError one and exit status 1.

    Of the ranks under torchrun, the first one speaks.
    """
    open_screens()
    try:
        sys.exit(main())
    except (ConfigError, RunError) as e:
        if os.environ.get("RANK", "0") == "0":
            say(f"{os.path.basename(sys.argv[0])}: {e}", file=sys.stderr)
        sys.exit(2 if isinstance(e, ConfigError) else 1)
    except KeyboardInterrupt:
        say(f"{os.path.basename(sys.argv[0])}: interrupted", file=sys.stderr)
        sys.exit(130)
