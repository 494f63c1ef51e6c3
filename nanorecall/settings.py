"""Settings: dataclass defaults, then override files, then command-line flags. The last one wins.

    python train.py configs/mqar_gpt.py --lr 3e-3 --n_layers=2

An override file is plain Python, run in an empty namespace. Every top-level name that it sets is a
setting, except names that start with an underscore. A flag is `--key=value` or `--key value`.
Dashes in a key count as underscores, and a flag without a value means true.

The dataclasses say which settings exist, of which type, and why: `--help` is made from the comment
beside each field. Every mistake ends as one ConfigError: where, what, and what to do.
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
import re
import shlex
import sys
import time
import tokenize
import traceback
import types
import typing
from dataclasses import dataclass, field


class ConfigError(Exception):
    """One sentence for the user about a mistake. key: the setting at fault, if there is one."""

    def __init__(self, message, key=None):
        super().__init__(message)
        self.key = key


class RunError(Exception):
    """One sentence about a run that fails although its settings are right (disk full, ...)."""


@dataclass(frozen=True)
class Setting:
    """One assignment as the user wrote it."""

    key: str
    value: object  # text of a flag, or a Python value of a file
    source: str  # where it was set: "--lr" or "f.py:3"


def derived(default):
    """A field that the program sets, and never the user: a model's vocabulary, from the data."""
    return field(default=default, metadata={"derived": True})


# ---- reading: command line and files -> a list of Setting ----------------------------------------


def split_argv(argv):
    """Command line -> positional arguments, and its flags as [Setting]. `-h` is `--help`."""
    args, flags = [], []
    i = 0
    while i < len(argv):
        arg = argv[i]
        i += 1
        if arg == "-h":
            arg = "--help"
        if not arg.startswith("--"):
            args.append(arg)
            continue
        key, equals, value = arg[2:].partition("=")
        # Dots are understood, to say in reject_unknown what to write instead.
        if not re.sub("[-.]", "_", key).isidentifier():
            raise ConfigError(f"{arg!r} is not a flag; write --key=value or --key value")
        if not equals:
            takes_next = i < len(argv) and not argv[i].startswith("--")
            value = argv[i] if takes_next else "true"
            i += takes_next
        flags.append(Setting(key.replace("-", "_"), value, "--" + key))
    return args, flags


def read_argv(argv):
    """Command line -> arguments that are no override files, and [Setting] of files, then flags."""
    args, flags = split_argv(argv)
    rest, settings = [], []
    for arg in args:
        if arg.endswith(".py"):
            settings += run_override_file(arg)
        else:
            rest.append(arg)
    return rest, settings + flags


def reject_args(args):
    """ConfigError if arguments are left over."""
    message = f"{' '.join(args)!r} is neither an override file (.py) nor a flag (--key=value)"
    require(not args, message, None)


def run_override_file(path):
    """Run one override file -> [Setting], each with the line that set it last."""
    # Reading from a device might never end.
    require(os.path.isfile(path) or not os.path.exists(path), f"{path} is no file", None)
    try:
        with open(path, encoding="utf-8") as f:
            source = f.read()
    except (OSError, UnicodeDecodeError, ValueError) as e:
        message = f"{path}: cannot read this override file ({e})"
        raise ConfigError(message + nearest_config(path)) from None
    namespace = {}
    try:
        tree = ast.parse(source, path)
        # The output of the user's program must not mix with our own on standard output.
        with contextlib.redirect_stdout(sys.stderr):
            exec(compile(tree, path, "exec"), namespace)
    except (Exception, SystemExit) as e:
        why = f"this override file does not run ({type(e).__name__}: {e})"
        raise ConfigError(f"{last_line(e, path)}: {why}") from None
    lines = _assigned_lines(tree)
    settings = []
    for key, value in namespace.items():
        is_setting = isinstance(key, str) and not key.startswith("_")
        if is_setting and not isinstance(value, types.ModuleType):
            settings.append(Setting(key, value, f"{path}:{lines.get(key, 1)}"))
    return settings


def nearest_config(path):
    """The config of this project that a path that is not there may mean, as the end of a sentence.

    It is "" if there is none in the working directory.
    """
    folder = "configs"
    if os.path.exists(path) or not os.path.isdir(folder):
        return ""
    names = [name for name in os.listdir(folder) if name.endswith(".py")]
    close = difflib.get_close_matches(os.path.basename(path), names, n=1)
    return f"; did you mean {os.path.join(folder, close[0])}?" if close else ""


def last_line(error, path, files=()):
    """FILE:LINE, the last line of path or of these files that led to an error of running path.

    It is path alone if none of their lines did.
    """
    files = {path, *files}
    lines = [path]
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename in files:
            lines.append(f"{frame.filename}:{frame.lineno}")
    if isinstance(error, SyntaxError) and error.filename in files:
        lines.append(f"{error.filename}:{error.lineno or 1}")
    return lines[-1]


def _assigned_lines(tree):
    """{name: the last line that assigns it}"""
    lines = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            lines[node.id] = max(node.lineno, lines.get(node.id, 0))
    return lines


# ---- checking: [Setting] -> dataclass instances --------------------------------------------------


def field_names(cls):
    """The names that a user may set on this dataclass."""
    return [f.name for f in dataclasses.fields(cls) if not f.metadata.get("derived")]


OUR_SETTINGS = {  # a setting of LLMonade's commands: the setting here that does the same
    "pretrained_layer_path": "init_from",
    "pretrained_layer_step": "init_step",
    "pretrained_layer_map": "init_map",
    "freeze_layer_map": "freeze",
    "apply_qa_mask": "label_mask=qa with data=data_synth and task=text",
    "apply_synthetic_qa_mask": "label_mask=qa with data=data_synth and task=text",
    "apply_hashhop_mask": "label_mask=hashhop with data=data_synth and task=text",
    "apply_digit_lookup_mask": "label_mask=digits with data=data_synth and task=text",
}


def changed_settings(config):
    """{name: value} of the settings of a dataclass that differ from their defaults."""
    changed = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if not f.metadata.get("derived") and value != f.default:
            changed[f.name] = value
    return changed


def reject_unknown(settings, *classes):
    """ConfigError if no dataclass has a setting; it names the nearest one, or ours for LLMonade's.

    A command of LLMonade has several such settings. Each is named.
    """
    known = []
    for cls in classes:
        known += field_names(cls)
    unknown = [s for s in settings if s.key not in known]
    if not unknown:
        return
    first, *others = unknown
    ours = our_setting(first.key, known)
    hint = f"; write {ours}" if ours else _nearest(first.key, known)
    message = f"{first.source}: there is no setting {first.key!r}{hint}"
    for s in others:
        ours = our_setting(s.key, known)
        if ours:
            message += f"; for {s.source} write {ours}"
    raise ConfigError(message)


def our_setting(key, known):
    """What to write for a setting of LLMonade such as "training.lr"; "" if there is nothing."""
    name = key.rpartition(".")[2]
    return OUR_SETTINGS.get(name, name if name in known else "")


def build_config(cls, settings, **derived_values):
    """A checked instance of `cls` from those settings that belong to it. The last one wins.

    A dataclass may have two methods. `check()` raises ConfigError(message, key) for values that
    cannot be. `unused()` returns {name: reason} for settings without effect: if one of them is not
    at its default, it is refused rather than ignored.
    """
    hints = typing.get_type_hints(cls)
    mine = {s.key: s for s in settings if s.key in field_names(cls)}
    values = {}
    for key, s in mine.items():
        try:
            values[key] = convert(s.value, hints[key])
        except ValueError as e:
            raise ConfigError(f"{s.source}: {key} {e}") from None
    for key, value in derived_values.items():
        if key in hints:  # a model file need not have a field for it
            values[key] = value
    for f in dataclasses.fields(cls):
        has_default = {f.default, f.default_factory} != {dataclasses.MISSING}
        has_value = f.name in values or not f.init or has_default
        require(has_value, f"{f.name} has no default; set --{f.name}", f.name)
    config = cls(**values)
    try:
        if hasattr(config, "check"):
            config.check()
    except ConfigError as e:
        where = f"{mine[e.key].source}: " if e.key in mine else ""
        raise ConfigError(f"{where}{e}", e.key) from None
    if hasattr(config, "unused"):
        reject_unused(config, config.unused(), mine)
    return config


def reject_unused(config, reasons, mine):
    """ConfigError for the settings in `reasons` (name -> why) that differ from their defaults.

    mine: {name: Setting}, to say where they were set.
    """
    unused = {}  # {reason: {file where they were set: ["name=value"]}}
    names = []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.name in reasons and value != f.default:
            source = mine[f.name].source if f.name in mine else ""
            # A flag has the name of its setting.
            file = "" if source.startswith("--") else source
            of_reason = unused.setdefault(reasons[f.name], {})
            of_reason.setdefault(file, []).append(f"{f.name}={value!r}")
            names.append(f.name)
    if not unused:
        return
    parts = []
    for reason, of_files in unused.items():
        shown = []
        for file, assignments in of_files.items():
            shown.append(", ".join(assignments) + (f" ({file})" if file else ""))
        n = sum(map(len, of_files.values()))
        verb = "has" if n == 1 else "have"
        parts.append(f"{', '.join(shown)} {verb} no effect: {reason}")
    what = "it" if len(names) == 1 else "them"
    raise ConfigError(f"{'; '.join(parts)}; leave {what} out", names[0])


Json = dict | list | str  # the type of a setting that takes JSON


def convert(value, kind):
    """A value (text of a flag, or a Python value of a file) as the annotated type.

    Types: bool, int, float, str, Json, and tuples of them (`tuple[tuple[int, int], ...]`, written
    as a Python literal). ValueError says what is wrong.
    """
    if kind == Json:
        return _convert_json(value)
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
    return _convert_number(value, kind, shown)


def _convert_number(value, kind, shown):
    """kind: int or float. shown: the value as text, for errors."""
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


def _convert_json(value):
    if isinstance(value, tuple):
        return list(value)  # as it comes back from JSON
    if isinstance(value, (dict, list)):
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
        # All that literal_eval raises.
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            message = f"takes a list such as [(2, 200), (4, 60)], not {_short(value)}"
            raise ValueError(message) from None
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


# ---- for check() in the dataclasses --------------------------------------------------------------


def at_least(config, low, *names):
    """Every named setting is >= low."""
    for name in names:
        if getattr(config, name) < low:
            raise ConfigError(f"{name}={getattr(config, name)} must be at least {low}", name)


def within(config, low, high, *names):
    """Every named setting is in [low, high]."""
    for name in names:
        value = getattr(config, name)
        if not low <= value <= high:
            raise ConfigError(f"{name}={value} must be between {low} and {high}", name)


def one_of(config, table, *names):
    """Every named setting is a key of `table`."""
    for name in names:
        require_known(name, getattr(config, name), table)


def require_known(name, value, table):
    """Raise ConfigError if the value of a setting, or a part of it, is no key of `table`."""
    if value not in table:
        close = difflib.get_close_matches(value, list(table), n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(table)}"
        raise ConfigError(f"{name}={value!r} is unknown; {hint}", name)


def fits_in_a_path(config, *names):
    """Every named setting can be part of the name of a directory."""
    for name in names:
        value = getattr(config, name)
        is_name = re.fullmatch(r"[\w.-]*", value) and value not in (".", "..")
        allowed = "letters, digits, . _ - only"
        message = f"{name}={value!r} becomes part of a directory name: {allowed}"
        require(is_name, message, name)


def has_closed_quotes(config, name):
    """The setting can be split into arguments as a shell does it."""
    value = getattr(config, name)
    try:
        shlex.split(value)
    except ValueError as e:
        raise ConfigError(f"{name}={value!r} is no list of arguments: {e}", name) from None


def require(condition, message, key):
    """Raise ConfigError(message, key) unless the condition holds."""
    if not condition:
        raise ConfigError(message, key)


# ---- the screen ----------------------------------------------------------------------------------


def printable(text, keep=""):
    """Text with control characters, which a terminal would obey or hide, spelled out.

    keep: characters that stay as they are.

    >>> printable("a\\x1b[2Jb")
    'a\\\\x1b[2Jb'
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def say(*values, sep=" ", **kwargs):
    """print() for names and contents of files: escape sequences in them are spelled out."""
    print(printable(sep.join(map(str, values)), keep="\n\t"), **kwargs)


# ---- help, and the exit status -------------------------------------------------------------------


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
    most_used = dict.fromkeys(common)  # in this order
    sections = {"most used settings": most_used}
    for cls in classes:
        file = os.path.basename(inspect.getsourcefile(cls))
        docs = field_docs(cls)
        for f in dataclasses.fields(cls):
            if f.metadata.get("derived"):
                continue
            group, comment = docs[f.name]
            title = f"settings of {file}, {group}" if group else f"settings of {file}"
            section = most_used
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


def wants_help(settings):
    return any(s.key == "help" for s in settings)


def print_help(doc, *classes, common=()):
    """Print `help_text` and exit."""
    say(help_text(doc, *classes, common=common))
    sys.exit(0)


class Screen:
    """Standard output or error that never raises, so that a training does not end with its output.

    The reader of a pipe may end before (`... | head`), or the disk may be full.
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
            # This takes the lowest free number. Otherwise the next file that is opened would get
            # it, and with it what a library prints.
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")
        if hasattr(stream, "reconfigure"):
            # A terminal that lacks a letter must not end the work.
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, Screen(stream))


def tell_torchrun(sentence):
    """Let torchrun's report, which follows on the screen, show a sentence (torch elastic, errors).

    Without it the report says "To enable traceback see ...". Of several ranks it shows the first.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        message = {"message": sentence, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError), open(path, "w") as f:
            json.dump({"message": message}, f)


def run_cli(main):
    """Run main() and exit with the status that it returns.

    A ConfigError becomes one line on standard error and exit status 2, a RunError one and status 1.
    Under torchrun only the main rank prints it.
    """
    open_screens()
    try:
        sys.exit(main())
    except (ConfigError, RunError) as e:
        if os.environ.get("RANK", "0") == "0":
            say(f"{os.path.basename(sys.argv[0])}: {e}", file=sys.stderr)
        if not e.__cause__:  # else it stops because another rank has, which says why
            tell_torchrun(str(e))
        sys.exit(2 if isinstance(e, ConfigError) else 1)
    except KeyboardInterrupt:
        say(f"{os.path.basename(sys.argv[0])}: interrupted", file=sys.stderr)
        sys.exit(130)
