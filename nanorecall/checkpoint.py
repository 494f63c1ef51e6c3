"""The run directory: files that a crash, a full disk or a second process cannot spoil.

    python train.py --resume runs/RUN --export_checkpoint file    # one file each
    python train.py --resume runs/RUN --export_checkpoint shards  # or shards; all scripts read both

<log_dir>/<run>/ holds config.json, log.jsonl, status.json and the checkpoints ckpt.pt (latest),
ckpt_prev.pt (the one before) and best.pt.

A checkpoint is a dict of numbers and text and, under "tensors", a flat dict of tensors, named
"model.<parameter>" and "optimizer.<parameter>.exp_avg". The names are those of the bare model,
whatever wraps it. The file is what torch.save writes, so torch.load reads it. The comment of its
zip is the SHA-256 of everything before, so no changed byte goes unnoticed.

A model sharded over ranks (FSDP) writes its tensors with torch.distributed.checkpoint into
shards/<name>-<step>/. The small .pt file names them with their checksums. One rename makes both
valid.
"""

import contextlib
import errno
import glob
import hashlib
import json
import math
import os
import pickle
import re
import secrets
import shutil
import signal
import stat
import sys
import threading
import warnings

import torch
import torch.distributed as dist

from nanorecall.settings import ConfigError, RunError, require, say

try:
    import fcntl
except ImportError:  # Windows: everything runs, without locks
    fcntl = None

# torch.distributed.checkpoint takes a second to import, so the functions that need it import it.

# ---- atomic files --------------------------------------------------------------------------------


def atomic_write(path, write, before=lambda: None):
    """Write a file so that readers see all of it or nothing.

    write(f) fills a temporary file; it is flushed and fsynced; before() is called; then it is
    renamed to path. If two processes write one path, the last one wins. RunError if the system
    refuses (disk full, read-only, ...); then path is as it was.
    """
    f = None
    try:
        remove_stale(temporary_names(path))
        with new_temporary(path) as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
            if fcntl is None:  # Windows renames no open file
                f.close()
            before()
            os.replace(f.name, path)
        fsync_directory(os.path.dirname(path) or ".")
    except BaseException as e:
        if f is not None:
            with contextlib.suppress(OSError):
                remove(f.name)
        # torch.save hides the OSError in a RuntimeError.
        cause = e if isinstance(e, OSError) else e.__context__
        if isinstance(e, (OSError, RuntimeError)) and isinstance(cause, OSError):
            message = f"cannot write {path}: {cause.strerror}; what stood there before is whole"
            raise RunError(message) from None
        raise


N_HEX_DIGITS = 16  # random ones, at the end of a temporary name


def temporary_name(path):
    """A new hidden name beside `path`. A file under its final name is always complete."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name[:100]}.tmp-{secrets.token_hex(N_HEX_DIGITS // 2)}")


def temporary_names(path):
    """The pattern of such names; `path` may end with a star."""
    name = glob.escape(temporary_name(path)[:-N_HEX_DIGITS])
    return name.replace("[*]", "*") + "[0-9a-f]" * N_HEX_DIGITS


def new_temporary(path):
    """A new file beside `path`, open for reading and writing, and locked for as long as it is open.

    The lock says that its writer lives: see remove_stale.
    """
    while True:
        f = open(temporary_name(path), "x+b")
        if take_lock(f.fileno()) is not False and os.path.exists(f.name):
            return f
        f.close()  # before it was locked, another process took it for a dead one's: make another


def remove_stale(pattern):
    """Delete files and directories with names of this pattern (of glob) whose writers are dead:
    their locks are free.
    """
    if fcntl is None:
        return
    for path in glob.glob(pattern):
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            try:
                if take_lock(handle):
                    remove(path)
            finally:
                os.close(handle)


def take_lock(handle):
    """Lock an open file -> True; False if another process has the lock; None if there are no locks.

    The system releases a lock when its process ends, however it ends.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def fsync_directory(folder):
    """fsync a directory. Only then does a new name in it survive a power cut."""
    if fcntl is None:  # Windows opens no directories
        return
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def make_directory(path):
    """Make a directory if there is none. ConfigError if something else is in its place."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"cannot make the directory {path}: {e.strerror}") from None


@contextlib.contextmanager
def atomic_directory(path):
    """A temporary directory beside `path` to fill; it gets the name when the block ends.

    A directory of that name is therefore always complete. ConfigError if it exists already or the
    disk refuses. Nothing is left behind then, nor after a signal. What a killed process has left,
    the next call for this path deletes.
    """
    target = os.path.abspath(path)
    if os.path.exists(target):
        message = f"{path} exists already; name another --output-dir or delete it first"
        raise ConfigError(message, "output_dir")
    with signals_end_the_block():
        work = handle = None
        try:
            work, handle = open_partial(path)
            yield work
            os.rename(work, target)
        except (OSError, RunError) as e:
            cause = e if isinstance(e, OSError) else e.__context__  # see atomic_write
            why = cause.strerror or cause
            raise ConfigError(f"writing {path} failed ({why}); nothing was left behind") from None
        finally:
            if work is not None:
                shutil.rmtree(work, ignore_errors=True)
            if handle is not None:
                os.close(handle)


def open_partial(path):
    """-> a new directory beside `path`, and the open handle that locks it (None on Windows)."""
    target = os.path.abspath(path)
    begin = target + ".partial-"
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        remove_stale(glob.escape(begin) + "[0-9a-f]" * N_HEX_DIGITS)
        while True:
            work = begin + secrets.token_hex(N_HEX_DIGITS // 2)
            os.mkdir(work)
            if fcntl is None:
                return work, None
            with contextlib.suppress(FileNotFoundError):  # see new_temporary
                handle = os.open(work, os.O_RDONLY)
                if take_lock(handle) is not False and os.path.exists(work):
                    return work, handle
                os.close(handle)
    except OSError as e:
        raise ConfigError(f"cannot write beside {path}: {e.strerror}", "output_dir") from None


@contextlib.contextmanager
def signals_end_the_block():
    """SIGTERM, SIGHUP and SIGUSR1 leave the block as sys.exit would, so that it can clean up;
    a second one is ignored.
    """

    def leave(number, frame):
        for other in before:
            signal.signal(other, signal.SIG_IGN)
        sys.exit(128 + number)

    before = {}
    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        names = ("SIGTERM", "SIGHUP", "SIGUSR1")  # of which Windows has one
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        before = {n: signal.getsignal(n) for n in numbers}
    # What nohup ignores stays ignored.
    before = {n: handler for n, handler in before.items() if handler != signal.SIG_IGN}
    for number in before:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def dataset_sha256(path):
    """SHA-256 of a data set, a file or a directory.

    Of a directory with metadata.json that file counts, for it holds the checksums of the others.
    """
    if os.path.isfile(os.path.join(path, "metadata.json")):
        return sha256_file(os.path.join(path, "metadata.json"))
    if os.path.isfile(path):
        return sha256_file(path)
    found = glob.glob(os.path.join(glob.escape(path), "**"), recursive=True)
    sums = [(os.path.relpath(f, path), sha256_file(f)) for f in sorted(found) if os.path.isfile(f)]
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def remove(path):
    """Delete a file or directory, if there is one."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.remove(path)


def nan_to_null(value):
    """The same with None for NaN and infinity, which JSON lacks (the loss of a failed run)."""
    if isinstance(value, dict):
        return {str(k): nan_to_null(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [nan_to_null(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path, value, indent=1):
    """indent=None: all in one line, for long lists of numbers."""
    text = json.dumps(nan_to_null(value), indent=indent)
    atomic_write(path, lambda f: f.write(text.encode() + b"\n"))


# ---- reading what this project wrote -------------------------------------------------------------


def is_inside(name):
    """Is this, from a file, the name of a place in that file's folder?"""
    if not isinstance(name, str) or not name.isprintable() or len(name) >= 256:
        return False
    path = os.path.normpath(name)
    first = path.split(os.sep)[0]
    leaves = os.path.isabs(path) or os.path.splitdrive(path)[0]
    return not leaves and first not in (os.pardir, os.curdir)


DEEPEST = 40  # lists and dicts inside each other; what is written here has 6
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

    text: str or bytes. Refused beside what is no JSON: NaN and Infinity, deep nesting.
    """

    def refuse(word):
        raise ValueError(f"{word} is no number of JSON")

    try:
        value = json.loads(
            text.decode() if isinstance(text, bytes) else text, parse_constant=refuse
        )
        deep = is_deep(value)
    except UnicodeDecodeError as e:
        raise ValueError(f"byte {e.start + 1} is no UTF-8") from None
    except RecursionError:
        deep = True
    if deep:
        raise ValueError("nested too deeply")
    return value


def is_deep(value, left=DEEPEST):
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return left == 0 or any(is_deep(v, left - 1) for v in inner)


def check_kinds(value, kinds, where):
    """ConfigError unless value is of its kind: a key of KINDS, or {key: kind} for a dict that has
    these keys and maybe more.

    The key "*" stands for every key; [kind] is a list of such values. where: the file, for the
    sentence.
    """
    if isinstance(kinds, str):
        name, fits = KINDS[kinds]
        if not fits(value):
            shown = repr(value)
            raise ConfigError(
                f"{where} is {shown if len(shown) <= 40 else shown[:37] + '...'}, not {name}"
            )
        return
    check_kinds(value, "list" if isinstance(kinds, list) else "dict", where)
    if isinstance(kinds, list):
        for i, item in enumerate(value):
            check_kinds(item, kinds[0], f"{where}[{i}]")
        return
    for key, kind in kinds.items():
        if key != "*" and key not in value:
            raise ConfigError(f"{where} has no {key!r}")
        for k in value if key == "*" else (key,):
            check_kinds(value[k], kind, f"{where}: {k!r}")


def read_json(path):
    """A JSON file of this project; ConfigError in a sentence if it is not there, unreadable or
    damaged."""
    try:
        with open(path, "rb") as f:
            return parse_json(f.read())
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}") from None
    except ValueError as e:
        raise ConfigError(f"{path} is damaged, or not of this project ({e})") from None


def read_record(path, kinds):
    """`read_json` of a file that must have `kinds` (see check_kinds)."""
    value = read_json(path)
    check_kinds(value, kinds, path)
    return value


def read_lines(path, kinds):
    """Rows of a .jsonl file that have `kinds` -> (rows, number of other lines). A line that a kill
    cut off is one of these."""
    rows, others = [], 0
    try:
        with open(path, "rb") as f:
            for line in filter(bytes.strip, f):
                try:
                    row = parse_json(line)
                    check_kinds(row, kinds, path)
                    rows.append(row)
                except (ValueError, ConfigError):
                    others += 1
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}") from None
    return rows, others


def lock_run_dir(folder, what="this run"):
    """Refuse a second process that writes into a directory. The lock ends with this process,
    however it ends.

    -> the handle to close, or None where directories cannot be opened (Windows).
    """
    handle = os.open(folder, os.O_RDONLY) if fcntl else None
    held = take_lock(handle)
    if held is False:
        os.close(handle)
        message = f"{folder}: another process is writing {what}; wait for it, or stop it first"
        raise ConfigError(message, "resume")
    if held is None:
        say(f"note: {folder} cannot be locked here; start no second process in it", file=sys.stderr)
    remove_stale(temporary_names(os.path.join(folder, "*")))
    return handle


def unlock(handle):
    """Give back what `lock` returned."""
    if handle is not None:
        os.close(handle)


@contextlib.contextmanager
def only_writer(folder, what):
    """In the block, no other process writes `what` into this directory. It is made if need be, and
    goes if it stays empty.

    ConfigError if another process is in such a block already, or if the disk refuses.
    """
    made, above = [], os.path.abspath(folder)
    while not os.path.isdir(above):
        made.append(above)
        above = os.path.dirname(above)
    try:
        os.makedirs(folder, exist_ok=True)
        handle = lock_run_dir(folder, what)
    except OSError as e:
        raise ConfigError(f"cannot write in {folder}: {e.strerror}", "out_dir") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # one of them holds something
            for path in made:
                os.rmdir(path)
        unlock(handle)


class JsonlLog:
    """log.jsonl: a JSON object per line, {"kind": "train", "eval" or "memory", "step", ...}."""

    def __init__(self, folder, step):
        """Open for appending. Rows after `step` (of the checkpoint) go: they will be made again."""
        self.path = os.path.join(folder, "log.jsonl")
        rows = read_log(folder) if os.path.exists(self.path) else []
        lines = []
        for row in rows:
            # A resumed run begins with the evaluation of its first step.
            if row["step"] < step or (row["step"] == step and row["kind"] != "eval"):
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


# What a checkpoint holds beside tensors: see run.Run.state.
STATE = {
    "step": "count",
    "bad_steps": "count",
    **dict.fromkeys(("best", "best_overall", "seconds"), "number"),
    "curriculum": {"ends": ["count"], "mean_loss": "number"},
}

# ---- checkpoints in one file ---------------------------------------------------------------------


def save_checkpoint(folder, name, state, keep_old=True):
    """Write state (tensors, numbers, text) as <folder>/<name>.pt.

    keep_old: an older ckpt.pt stays as ckpt_prev.pt. At every moment there is a ckpt.pt, the old
    one until the new one is complete.
    """
    path = os.path.join(folder, name + ".pt")

    def write(f):
        torch.save(state, f)
        append_sha256(f)

    def before():
        if keep_old and name == "ckpt":
            keep_previous(path, os.path.join(folder, "ckpt_prev.pt"))

    atomic_write(path, write, before)


def keep_previous(path, previous):
    """Let `previous` name the present file `path` too, if there is one."""
    if not os.path.isfile(path):
        return
    remove_stale(temporary_names(previous))
    other = temporary_name(previous)
    try:
        os.link(path, other)
        os.replace(other, previous)
    except OSError:  # a file system without hard links
        with open(path, "rb") as old:
            atomic_write(previous, lambda f: shutil.copyfileobj(old, f))


def append_sha256(f):
    """Make the SHA-256 of a zip file its comment. f: open for reading and writing."""
    f.seek(-2, os.SEEK_END)
    # A zip ends with the length of its comment (2 bytes), then the comment.
    f.write((64).to_bytes(2, "little"))
    f.seek(0)
    digest = hashlib.file_digest(f, "sha256").hexdigest()
    f.write(digest.encode())


def verify_sha256(path):
    """Damaged unless the file is as append_sha256 left it."""
    if not os.path.isfile(path):
        os.stat(path)  # a disk that does not answer looks like no file, too
        raise Damaged("it is no file")
    with open(path, "rb") as f:
        left, digest = os.fstat(f.fileno()).st_size - 64, hashlib.sha256()
        while left > 0:
            block = f.read(min(left, 2**20))
            digest.update(block)
            left -= len(block)
        if left < 0 or f.read() != digest.hexdigest().encode():
            raise Damaged("its checksum differs")


class Damaged(Exception):
    """A checkpoint that is not as it was written; the text says why."""


def first_valid_checkpoint(folder, *names, holds_lock=False):
    """The first of the named checkpoints that is whole, shards included.

    Damage means: a checksum differs. The user is told of it. Only the process that holds the lock
    of the run sets the damaged file aside under another name, so that it never replaces a whole
    one; a reader changes nothing. RunError if the disk or memory refuses, which says nothing
    about the file; ConfigError if nothing is whole, or if a whole file is no checkpoint of
    train.py.
    """
    for name in names:
        path = os.path.join(folder, name + ".pt")
        while (seen := stamp(path)) is not None:
            try:
                check_whole(folder, name)
                return name
            except Damaged as e:
                # The run that trains here may have written another one meanwhile.
                if stamp(path) != seen:
                    continue
                say(f"{path} is damaged ({e}); trying an older one", file=sys.stderr)
                if holds_lock:
                    quarantine(path)
                break
    every = ", ".join(n + ".pt" for n in names)
    raise ConfigError(f"{folder} has no checkpoint that can be read ({every})")


def check_whole(folder, name):
    """Damaged unless the checkpoint <folder>/<name>.pt and its shards are as they were written."""
    path = os.path.join(folder, name + ".pt")
    with reading(path):
        verify_sha256(path)
    state = read_checkpoint(folder, name)
    verify_shards(folder, state)


def stamp(path):
    """What changes when a file is replaced; None if there is none.

    RunError if the disk does not answer.
    """
    with reading(path):
        try:
            os.lstat(path)
        except FileNotFoundError:
            return None
        about = os.stat(path)
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns


@contextlib.contextmanager
def reading(path):
    """Errors of the disk or of memory become RunError inside:
    they say nothing about what is in the file.
    """
    try:
        yield
    except (OSError, MemoryError, RuntimeError) as e:
        if not from_system(e):
            raise
        why = getattr(e, "strerror", None) or str(e).split("\n")[0] or "out of memory"
        raise RunError(f"cannot read {path}: {why}; nothing was changed, so try again") from None


def from_system(error):
    """Did the system refuse? torch puts its message into a RuntimeError."""
    if isinstance(error, RuntimeError):
        return any(os.strerror(number) in str(error) for number in errno.errorcode)
    return isinstance(error, (OSError, MemoryError))


def quarantine(path):
    """Rename a damaged file (or whatever is in its place); one damaged before makes room."""
    with contextlib.suppress(OSError):  # read-only: then it cannot be overwritten either
        remove(path + ".damaged")
        os.replace(path, path + ".damaged")


def read_checkpoint(folder, name):
    """The contents of <folder>/<name>.pt, its checksum unchecked; tensors stay on disk until they
    are used.

    ConfigError if they are not those of a checkpoint of train.py; RunError if the disk or memory
    refuses.
    """
    path = os.path.join(folder, name + ".pt")
    with reading(path):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as e:  # damaged files and those of strangers fail in many ways
            if from_system(e):
                raise
            raise unreadable(path, e) from None
    check_form(state, path)
    return state


def unreadable(path, error):
    """ConfigError that says so in one sentence,
    with the message of an error that torch or pickle raised.
    """
    why = " ".join(str(error).split())[:120] or type(error).__name__
    return ConfigError(f"{path} cannot be read as weights ({why})", "init_from")


def check_form(state, path):
    """ConfigError unless this is what save_checkpoint is given:
    numbers, and tensors or the names of shards.
    """
    try:
        check_kinds(state, "dict", path)
        require("step" in state, f"{path} has no 'step'", None)
        check_kinds(state, {name: STATE[name] for name in STATE.keys() & state.keys()}, path)
        if "settings" in state:
            check_kinds(state["settings"], "text", f"{path}: 'settings'")
        if "shards" in state:
            shards = {"folder": "path inside", "files": {"*": "hash"}}
            check_kinds(state["shards"], shards, f"{path}: 'shards'")
            inside = all(is_inside(name) for name in state["shards"]["files"])
            require(inside, f"{path} names files outside of its run", None)
        else:
            state["tensors"] = plain_tensors(state.get("tensors", {}), path)
    except ConfigError as e:
        raise ConfigError(f"{e}: it is no checkpoint of train.py") from None


DTYPES = {torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.bool}
DTYPES |= {torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8}
DTYPES |= {torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64}


def plain_tensors(found, path):
    """{name: tensor}, checked: what a stranger calls weights may be of any kind. -> the same,
    without attributes.

    ConfigError for anything but text that can be shown and plain tensors of real numbers, and for
    tensors of more numbers than the file has bytes: a stride of 0 makes 10^12 numbers of one.
    """
    size = os.path.getsize(path)

    def need(condition, name, what):
        require(condition, f"{path} cannot be read as weights: {name!r:.80} is {what}", "init_from")

    message = f"{path} cannot be read as weights: no tensors by name"
    require(isinstance(found, dict), message, "init_from")
    for name, t in found.items():
        need(isinstance(name, str) and name.isprintable(), name, "no name of a tensor")
        plain = type(t) in (torch.Tensor, torch.nn.Parameter)
        need(plain, name, f"a {type(t).__name__}, no tensor")
        need(t.layout is torch.strided and not t.is_nested, name, "no dense tensor")
        need(t.device.type == "cpu", name, "a tensor without data")
        need(t.dtype in DTYPES, name, f"a tensor of {str(t.dtype).removeprefix('torch.')}")
        count = torch.Tensor.numel(t)
        need(count <= size, name, f"a tensor of {count} numbers, in a file of {size} bytes")
    return {name: torch.Tensor.detach(t) for name, t in found.items()}


def load_checkpoint(folder, *names):
    """The first of the named checkpoints that is whole, with all tensors,
    from whichever form it has. See first_valid_checkpoint.
    """
    while True:
        name = first_valid_checkpoint(folder, *names)
        path = os.path.join(folder, name + ".pt")
        seen = stamp(path)
        try:
            state = read_checkpoint(folder, name)
            if "shards" in state:
                state["tensors"] = read_shards(shard_dir(folder, state))
            return state
        except (ConfigError, RunError):
            if stamp(path) == seen:
                raise
            # The run that trains here has replaced it meanwhile, and deleted its shards.


def select_prefix(tensors, prefix):
    """{"model.a": x, "optimizer.b": y}, "model" -> {"a": x}."""
    found = {}
    for name, t in tensors.items():
        if name.startswith(prefix + "."):
            found[name.removeprefix(prefix + ".")] = t
    return found


# ---- checkpoints in shards -----------------------------------------------------------------------


def save_shards(folder, label, tensors, world):
    """Every rank writes its shards of the tensors (DTensors, too) into <folder>/shards/<label>.

    -> {"folder", "files": {name: SHA-256}}. They are valid once a checkpoint is saved that holds
    this value.
    """
    import torch.distributed.checkpoint as dcp

    with world.agree():
        if world.is_main:
            label = unused_name(folder, label)
    label = world.broadcast(label)
    directory = os.path.join(folder, "shards", label)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that there is one process
            dcp.save(tensors, checkpoint_id=directory, no_dist=not dist.is_initialized())
    except (OSError, dcp.CheckpointException) as e:  # on all ranks, once all have stopped writing
        if world.is_main:
            shutil.rmtree(directory, ignore_errors=True)
        why = str(e).splitlines()[-1]
        message = f"cannot write {directory} ({why}); the checkpoints before it are whole"
        raise RunError(message) from None
    mine = {}
    for file in os.listdir(directory):
        if file.startswith(f"__{world.rank}_") or (world.is_main and file == ".metadata"):
            mine[file] = sha256_file(os.path.join(directory, file))
    files = {}
    for sums in world.all_gather_object(mine):
        files |= sums
    return {"folder": label, "files": files}


def unused_name(folder, label):
    """label, or label-N if it exists: shards that are there may be in use, or half written."""
    name, n = label, 0
    while os.path.exists(os.path.join(folder, "shards", name)):
        n += 1
        name = f"{label}-{n}"
    return name


def shard_dir(folder, state):
    """The directory with the shards of a checkpoint of a run."""
    return inside(os.path.join(folder, "shards"), state["shards"]["folder"])


def inside(folder, name):
    """<folder>/<name>, for a name that a file gives.

    ConfigError unless it is text and stays inside the folder.
    """
    require(is_inside(name), f"{folder} cannot hold a file named {name!r:.80}", None)
    return os.path.join(folder, os.path.normpath(name))


def shard_metadata(directory):
    """{name: shape and type} of the tensors in a directory of torch.distributed.checkpoint."""
    return read_index(directory).state_dict_metadata


def read_shards(directory, into=None):
    """Fill the tensors of `into` {name: tensor or DTensor} from shards, of however many ranks;
    without it, all, whole.

    ConfigError if they are not such shards; RunError if the disk or memory refuses.
    """
    import torch.distributed.checkpoint as dcp

    alone = not dist.is_initialized()
    with reading(directory):
        try:
            index = read_index(directory)
            if into is None:
                about = index.state_dict_metadata
                into = {n: torch.empty(m.size, dtype=m.properties.dtype) for n, m in about.items()}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that there is one process
                dcp.load(into, **tensor_reader(directory, index), no_dist=alone)
        # The latter, errors of all ranks, is no Exception.
        except (Exception, dcp.CheckpointException) as e:
            cause = next(iter(getattr(e, "failures", {}).values()), (e,))[0]
            if isinstance(cause, (ConfigError, RunError)) or from_system(cause):
                raise cause from None
            raise unreadable(directory, cause) from None
    return into


def tensor_reader(directory, index):
    """Arguments of dcp.load that read tensors alone, by an index that was checked.

    torch's own reader and planner would execute what they find in the index or in anything else.
    """
    import torch.distributed.checkpoint as dcp

    class TensorReader(dcp.FileSystemReader):
        def read_metadata(self, *args, **kwargs):
            return index

    class TensorPlanner(dcp.DefaultLoadPlanner):
        def load_bytes(self, read_item, value):
            raise ConfigError("only tensors are read from shards")

    return {"storage_reader": TensorReader(directory), "planner": TensorPlanner()}


def read_index(directory):
    """The index of a directory of torch.distributed.checkpoint, made anew from what it says of
    tensors.

    What else a trainer keeps there is left out. ConfigError if it does not fit the files beside it.
    """
    from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

    path = os.path.join(directory, ".metadata")
    with reading(path):
        try:
            with open(path, "rb") as f:
                found = fields_of(RestrictedUnpickler(f).load(), "Metadata")
            tensors = {}
            for name, about in found["state_dict_metadata"].items():
                if type(about).__name__ == "TensorStorageMetadata":
                    tensors[name] = describe_tensor(about)
            chunks = [find_chunk(*entry) for entry in found["storage_data"].items()]
            storage = {index: info for index, info in chunks if index.fqn in tensors}
            files = {info.relative_path for info in storage.values()}
            held = sum(size_of_file(inside(directory, file)) for file in files)
            need = sum(t.size.numel() * t.properties.dtype.itemsize for t in tensors.values())
            if need > held:
                raise ValueError(f"it says {need} bytes, its files have {held}")
        except FileNotFoundError as e:
            raise ConfigError(f"{e.filename} is missing") from None
        except (OSError, MemoryError, ConfigError):
            raise
        except Exception as e:  # a pickle of anything
            raise unreadable(directory, e) from None
    return Metadata(tensors, storage_data=storage, storage_meta=StorageMeta())


def fields_of(thing, kind):
    """{field: value} of one of torch's objects in the index; ValueError if it is another kind."""
    if type(thing).__name__ != kind or not isinstance(thing.state, dict):
        raise ValueError(f"it has no {kind} there")
    return thing.state


def describe_tensor(thing):
    """TensorStorageMetadata of the index -> torch's own;
    ValueError unless its chunks fill the tensor.
    """
    from torch.distributed.checkpoint import metadata

    about = fields_of(thing, "TensorStorageMetadata")
    size, dtype = about["size"], about["properties"].state[0]
    if type(size) is not torch.Size or dtype not in DTYPES:
        raise ValueError("a tensor without shape or type")
    chunks = []
    for chunk in about["chunks"]:
        part = fields_of(chunk, "ChunkStorageMetadata")
        begin, extent = torch.Size(part["offsets"]), torch.Size(part["sizes"])
        edges = zip(begin, extent, size)
        fits = len(begin) == len(extent) == len(size)
        if not fits or any(a < 0 or n < 0 or a + n > whole for a, n, whole in edges):
            raise ValueError("a part outside its tensor")
        chunks.append(metadata.ChunkStorageMetadata(begin, extent))
    if sum(chunk.sizes.numel() for chunk in chunks) != size.numel():
        raise ValueError("a tensor that its parts do not fill")
    return metadata.TensorStorageMetadata(metadata.TensorProperties(dtype), size, chunks)


def find_chunk(index, info):
    """An entry of the index, which part of a tensor is where -> the same in torch's own classes."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import MetadataIndex

    index, info = fields_of(index, "MetadataIndex"), fields_of(info, "_StorageInfo")
    numbers = info["offset"], info["length"]
    if type(index["fqn"]) is not str or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError("a part without an offset and a length")
    if info.get("transform_descriptors"):
        raise ValueError("its files are compressed")
    key = MetadataIndex(index["fqn"], index.get("offset"))
    return key, _StorageInfo(info["relative_path"], *numbers)


def size_of_file(path):
    """Bytes of a file that is one: a pipe would wait for ever. ValueError otherwise."""
    about = os.stat(path)
    if not stat.S_ISREG(about.st_mode):
        raise ValueError(f"{os.path.basename(path)} is no file")
    return about.st_size


class Stub:
    """Stands in for a class of torch in the index: it keeps an object's state and does nothing."""

    state = None

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        self.state = state


# Python's own unpickler, because a few bytes make the one in C fill all memory.
class RestrictedUnpickler(pickle._Unpickler):
    """Reads the index, a pickle, and calls nothing in it:
    an object of torch becomes a Stub of the same name.
    """

    VALUES = {"Size", *(str(kind).removeprefix("torch.") for kind in DTYPES)}
    KINDS = {
        "torch.distributed.checkpoint.metadata": {
            *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata"),
            *("ChunkStorageMetadata", "TensorProperties", "BytesStorageMetadata"),
            "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "pathlib": {"PosixPath"},
    }

    def find_class(self, module, name):
        if module == "torch" and name in self.VALUES:
            return getattr(torch, name)
        if name not in self.KINDS.get(module, ()):
            message = f"{module}.{name} has no place in the index of a checkpoint"
            raise pickle.UnpicklingError(message)
        return type(name, (Stub,), {})


def verify_shards(folder, state):
    """Damaged unless the files that a checkpoint names are there, unchanged."""
    for file, digest in state.get("shards", {"files": {}})["files"].items():
        path = inside(shard_dir(folder, state), file)
        with reading(path):
            try:
                size_of_file(path)
                same = sha256_file(path) == digest
            except (FileNotFoundError, NotADirectoryError, ValueError):
                same = False
        if not same:
            raise Damaged(f"{path} is missing or its checksum differs")


def remove_old_shards(folder):
    """Delete shards that no checkpoint names. While a checkpoint cannot be read, delete none."""
    directory = os.path.join(folder, "shards")
    used = set()
    if not os.path.isdir(directory):
        return
    for name in ("ckpt", "ckpt_prev", "best"):
        try:
            if stamp(os.path.join(folder, name + ".pt")) is None:
                continue
            state = read_checkpoint(folder, name)
            if "shards" in state:
                used.add(state["shards"]["folder"])
        except Exception:  # it may need any of them
            return
    for label in os.listdir(directory):
        ours = re.fullmatch(r"(ckpt|ckpt_prev|best)-\d+(-\d+)?", label)
        if ours and label not in used:
            shutil.rmtree(os.path.join(directory, label), ignore_errors=True)
    if not os.listdir(directory):
        os.rmdir(directory)


def sha256_file(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
