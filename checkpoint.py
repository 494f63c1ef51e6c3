"""The run directory: files that a crash, a full disk or a second process cannot spoil.

    python train.py --resume runs/RUN --export file      # rewrite the checkpoints of a run as one file each
    python train.py --resume runs/RUN --export shards    # or with their tensors in shards; every script reads either

<log_dir>/<run>/ holds config.json, log.jsonl, status.json and the checkpoints ckpt.pt (latest), ckpt_prev.pt (the one
before) and best.pt. A checkpoint is a dict of numbers and text and, under "tensors", a flat dict of tensors, named
"model.<parameter>" and "optimizer.<parameter>.exp_avg"; the names are those of the bare model, whatever wrapped it. It is
what torch.save writes, with the SHA-256 of everything before it as the comment of the zip: torch.load reads it, and no
changed byte goes unnoticed. A model spread over ranks (FSDP) writes its tensors with torch.distributed.checkpoint into
shards/<name>-<step>/, and the small file names them with their checksums; one rename makes both count.
"""

import contextlib
import fcntl
import glob
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import sys
import tempfile
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from configs import ConfigError, RunFailed, require, say

# ---- files that are whole or absent ------------------------------------------------------------------------------------


def write_file(path, write, before=lambda: None):
    """Call write(f) on a temporary file, bring it to disk, call before(), then give it its name: readers see all or nothing.

    RunFailed if that fails (disk full, read-only, ...); then path is as it was.
    """
    try:
        remove(path + ".tmp")  # it may be another name of a whole file: see keep
        with open(path + ".tmp", "w+b") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        before()
        os.replace(path + ".tmp", path)
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except BaseException as e:
        with contextlib.suppress(OSError):
            remove(path + ".tmp")
        cause = e if isinstance(e, OSError) else e.__context__  # torch.save hides it in a RuntimeError
        if isinstance(e, (OSError, RuntimeError)) and isinstance(cause, OSError):
            raise RunFailed(f"cannot write {path}: {cause.strerror}; what stood there before is whole") from None
        raise


def make_directory(path):
    """Make a directory to write into, if there is none; ConfigError if something else is in its
    place."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"cannot make the directory {path}: {e.strerror}") from None


@contextlib.contextmanager
def new_directory(path):
    """A temporary directory beside `path` to fill; it gets the name when the block ends: a directory of that name is always
    complete. ConfigError in one sentence if there is one already or the disk refuses; then nothing is left behind."""
    target = os.path.abspath(path)
    if os.path.exists(target):
        raise ConfigError(f"{path} exists already; name another --output-dir or delete it first", "output_dir")
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        work = tempfile.mkdtemp(prefix=os.path.basename(target) + ".partial-", dir=os.path.dirname(target))
    except OSError as e:
        raise ConfigError(f"cannot write beside {path}: {e.strerror}", "output_dir") from None
    try:
        yield work
        os.chmod(work, 0o755)  # mkdtemp made it private
        os.rename(work, target)
    except (OSError, RunFailed) as e:
        cause = e if isinstance(e, OSError) else e.__context__  # see write_file
        raise ConfigError(f"writing {path} failed ({cause.strerror or cause}); nothing was left behind") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def data_hash(path):
    """SHA-256 of a data set: of its metadata.json, which has the sums of its files, or else of the file or files there."""
    if os.path.isfile(os.path.join(path, "metadata.json")):
        return file_hash(os.path.join(path, "metadata.json"))
    if os.path.isfile(path):
        return file_hash(path)
    found = sorted(f for f in glob.glob(os.path.join(glob.escape(path), "**"), recursive=True) if os.path.isfile(f))
    sums = [(os.path.relpath(f, path), file_hash(f)) for f in found]
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def remove(path):
    """Delete a file or directory, if there is one."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.remove(path)


def finite(value):
    """The same with null for numbers that JSON does not know: the interval of one measurement, the loss of a run gone wrong."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path, value):
    write_file(path, lambda f: f.write(json.dumps(finite(value), indent=1).encode() + b"\n"))


# ---- what this project wrote, read back ----------------------------------------------------------

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
    "path inside": ("a path inside its folder", lambda v: isinstance(v, str) and is_inside(v)),
    "tensor": ("a tensor", lambda v: isinstance(v, torch.Tensor)),
    "hash": ("a SHA-256", lambda v: isinstance(v, str) and re.fullmatch("[0-9a-f]{64}", v)),
}


def is_inside(path):
    """Does a relative path stay in its folder?"""
    return path and "\0" not in path and not os.path.isabs(path) and ".." not in path.split("/")


def parse_json(text):
    """JSON as `write_json` and `Log` write it -> value; ValueError says what else it is.

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


def lock(folder):
    """Refuse a second process that writes into a run directory. The lock ends with this process, however it ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ConfigError(f"{folder}: another process is writing this run; wait for it, or stop it first", "resume") from None
    except OSError:  # a file system without locks
        say(f"note: {folder} cannot be locked here; start no second process in it", file=sys.stderr)
    return handle


class Log:
    """log.jsonl: one JSON object per line, {"kind": "train" | "eval" | "memory", "step": ..., ...}."""

    def __init__(self, folder, step):
        """Open for appending. Rows logged after `step`, the checkpoint's, are dropped, so that no step is logged twice."""
        self.path = os.path.join(folder, "log.jsonl")
        rows = read_log(folder) if os.path.exists(self.path) else []
        kept = [r for r in rows if r["step"] < step or (r["step"] == step and r["kind"] != "eval")]
        write_file(self.path, lambda f: f.writelines(json.dumps(r).encode() + b"\n" for r in kept))
        self.file = open(self.path, "a", encoding="utf-8")

    def write(self, **row):
        try:
            self.file.write(json.dumps(finite(row)) + "\n")
            self.file.flush()
        except OSError as e:
            raise RunFailed(f"cannot write {self.path}: {e.strerror}; the checkpoints are whole") from None


MEASURED = {
    "loss": "number or null",
    "accuracy": "share",
    "row_accuracy": "share",
    "labels": "count",
    "rows": "count",
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


# What a checkpoint holds beside tensors: see train.train.
STATE = {
    "step": "count",
    "bad_steps": "count",
    **dict.fromkeys(("best", "best_of_all", "seconds"), "number"),
}

# ---- checkpoints in one file -------------------------------------------------------------------------------------------


def save_checkpoint(folder, name, state, keep_old=True):
    """Write state (tensors, numbers, text) as <folder>/<name>.pt; an older ckpt.pt stays as ckpt_prev.pt if keep_old.

    Until the new file has its name, ckpt.pt is the old one: there is no moment without it.
    """
    path, previous = (os.path.join(folder, n + ".pt") for n in (name, "ckpt_prev"))

    def write(f):
        torch.save(state, f)
        seal(f)

    write_file(path, write, before=(lambda: keep(path, previous)) if keep_old and name == "ckpt" else lambda: None)


def keep(path, previous):
    """Let `previous` name the present file `path` too, if there is one."""
    if not os.path.isfile(path):
        return
    try:
        remove(previous + ".tmp")
        os.link(path, previous + ".tmp")
        os.replace(previous + ".tmp", previous)
    except OSError:  # a file system without hard links
        with open(path, "rb") as old:
            write_file(previous, lambda f: shutil.copyfileobj(old, f))


def seal(f):
    """Put the SHA-256 of a zip file (open for reading and writing, without a comment) into its comment."""
    f.seek(-2, os.SEEK_END)
    f.write((64).to_bytes(2, "little"))  # a zip ends with the length of its comment, then the comment
    f.seek(0)
    digest = hashlib.file_digest(f, "sha256").hexdigest()
    f.write(digest.encode())


def check_seal(path):
    """ValueError unless the file is as `seal` left it."""
    with open(path, "rb") as f:
        left, digest = os.fstat(f.fileno()).st_size - 64, hashlib.sha256()
        while left > 0:
            block = f.read(min(left, 2**20))
            digest.update(block)
            left -= len(block)
        if left < 0 or f.read() != digest.hexdigest().encode():
            raise ValueError("its checksum differs")


def find_checkpoint(folder, *names):
    """The first of the named checkpoints that is whole, shards included.

    A damaged one is set aside under another name, so that it never replaces a whole one, and the user is told.
    """
    for name in names:
        path = os.path.join(folder, name + ".pt")
        if not os.path.lexists(path):
            continue
        try:
            check_seal(path)
            check_shards(folder, read_checkpoint(folder, name))
            return name
        except ConfigError:  # whole, but not ours
            raise
        except (MemoryError, PermissionError) as e:  # says nothing about the file
            raise RunFailed(
                f"cannot read {path}: {e.strerror if isinstance(e, OSError) else 'out of memory'}"
            ) from None
        except Exception as e:  # damaged files fail in many ways; each means: try the next one
            why = str(e).splitlines()[0] if str(e) else type(e).__name__
            say(f"{path} is damaged ({why}); trying an older one", file=sys.stderr)
            set_aside(path)
    raise ConfigError(f"{folder} has no checkpoint that can be read ({', '.join(n + '.pt' for n in names)})")


def set_aside(path):
    """Rename a damaged file (or whatever is in its place); one damaged before makes room."""
    with contextlib.suppress(OSError):  # read-only: then it cannot be overwritten either
        remove(path + ".damaged")
        os.replace(path, path + ".damaged")


def read_checkpoint(folder, name):
    """The contents of <folder>/<name>.pt, its checksum unchecked; tensors stay on disk until they
    are used.

    ConfigError if it is not a checkpoint of train.py but of another tool.
    """
    path = os.path.join(folder, name + ".pt")
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    try:
        check_kinds(state, STATE, path)
        if "shards" in state:
            check_kinds(
                state["shards"],
                {"folder": "path inside", "files": {"*": "hash"}},
                f"{path}: 'shards'",
            )
            require(
                all(map(is_inside, state["shards"]["files"])),
                f"{path} names files outside of its run",
                None,
            )
        else:
            check_kinds(state, {"tensors": {"*": "tensor"}}, path)
            require(
                all(isinstance(n, str) for n in state["tensors"]),
                f"{path} has tensors without a name",
                None,
            )
    except ConfigError as e:
        raise ConfigError(f"{e}: it is no checkpoint of train.py") from None
    return state


def load_checkpoint(folder, *names):
    """The first of the named checkpoints that is whole, with all tensors, from whichever form it has."""
    state = read_checkpoint(folder, find_checkpoint(folder, *names))
    if "shards" in state:
        state["tensors"] = read_shards(shards_of(folder, state))
    return state


def part(tensors, prefix):
    """{"model.a": x, "optimizer.b": y}, "model" -> {"a": x}."""
    return {name.removeprefix(prefix + "."): t for name, t in tensors.items() if name.startswith(prefix + ".")}


# ---- checkpoints in shards ---------------------------------------------------------------------------------------------


def save_shards(folder, label, tensors, world):
    """Every rank writes its part of the tensors (DTensors too) under <folder>/shards/<label>; -> what names them.

    It does not count until a checkpoint that holds the returned value is saved.
    """
    label = world.first_does(lambda: free_label(folder, label))
    place = os.path.join(folder, "shards", label)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that there is one process
            dcp.save(tensors, checkpoint_id=place, no_dist=not dist.is_initialized())
    except (OSError, dcp.CheckpointException) as e:  # on all ranks, once all have stopped writing
        if world.first:
            shutil.rmtree(place, ignore_errors=True)
        raise RunFailed(f"cannot write {place} ({str(e).splitlines()[-1]}); the checkpoints before it are whole") from None
    mine = [f for f in os.listdir(place) if f.startswith(f"__{world.rank}_") or (world.first and f == ".metadata")]
    sums = world.gather({f: file_hash(os.path.join(place, f)) for f in mine})
    return {"folder": label, "files": {f: h for part in sums for f, h in part.items()}}


def free_label(folder, label):
    """label, with a number after it if it is taken: shards that are there may be in use, or half written."""
    taken = set(os.listdir(os.path.join(folder, "shards"))) if os.path.isdir(os.path.join(folder, "shards")) else set()
    return next(name for name in (label, *(f"{label}-{i}" for i in range(1, len(taken) + 2))) if name not in taken)


def shards_of(folder, state):
    """The directory with the shards of a checkpoint of a run."""
    return os.path.join(folder, "shards", state["shards"]["folder"])


def shard_index(place):
    """{name: shape and type} of the tensors in a directory of torch.distributed.checkpoint."""
    found = SafeReader(place).read_metadata().state_dict_metadata
    return {name: about for name, about in found.items() if hasattr(about, "size")}  # a trainer's own state has none


def read_shards(place, into=None):
    """Fill the tensors of `into` {name: tensor or DTensor} from shards, of however many ranks; without it, all, whole."""
    if into is None:
        into = {n: torch.empty(m.size, dtype=m.properties.dtype) for n, m in shard_index(place).items()}
    reader = SafeReader(place)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is one process
        dcp.load(into, storage_reader=reader, no_dist=not dist.is_initialized())
    return into


class SafeReader(dcp.FileSystemReader):
    """torch's own, but its index is a pickle: only the classes that describe tensors may come out of it."""

    def read_metadata(self, *args, **kwargs):
        with open(os.path.join(self.path, ".metadata"), "rb") as f:
            metadata = IndexUnpickler(f).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class IndexUnpickler(pickle.Unpickler):
    ALLOWED = {
        "torch.distributed.checkpoint.metadata": {
            *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "ChunkStorageMetadata"),
            *("TensorProperties", "_MEM_FORMAT_ENCODING", "BytesStorageMetadata"),
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size", "float32", "float64", "bfloat16", "float16", "int64", "int32", "uint8", "bool"},
        "pathlib": {"PosixPath"},
    }

    def find_class(self, module, name):
        if name not in self.ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in the index of a checkpoint")
        return super().find_class(module, name)


def check_shards(folder, state):
    """ValueError unless the files that a checkpoint names are there, unchanged."""
    for file, digest in state.get("shards", {"files": {}})["files"].items():
        path = os.path.join(shards_of(folder, state), file)
        if not os.path.isfile(path) or file_hash(path) != digest:
            raise ValueError(f"{path} is missing or its checksum differs")


def remove_old_shards(folder):
    """Delete shards that no checkpoint names; none, while a checkpoint is there that cannot be read."""
    place, used = os.path.join(folder, "shards"), set()
    if not os.path.isdir(place):
        return
    for name in ("ckpt", "ckpt_prev", "best"):
        try:
            used.add(read_checkpoint(folder, name)["shards"]["folder"])
        except (FileNotFoundError, KeyError):  # absent, or one file
            continue
        except Exception:  # a disk that does not answer says nothing about what the checkpoint needs
            return
    for label in os.listdir(place):
        if label not in used:
            shutil.rmtree(os.path.join(place, label), ignore_errors=True)
    if not os.listdir(place):
        os.rmdir(place)


def file_hash(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
