"""Checkpoints of a run: written whole or not at all, and verified when they are read.

    python train.py --resume runs/RUN --export_checkpoint file    # one file each
    python train.py --resume runs/RUN --export_checkpoint shards  # or shards; all scripts read both

A run has ckpt.pt (latest), ckpt_prev.pt (the one before) and best.pt.

A checkpoint is a dict of numbers and text and, under "tensors", a flat dict of tensors, named
"model.<parameter>" and "optimizer.<parameter>.exp_avg". The names are those of the bare model,
also if DDP wraps it. The file is what torch.save writes, so torch.load reads it. The comment of its
zip is the SHA-256 of everything before, so no changed byte goes unnoticed.

A model sharded over ranks (FSDP) writes its tensors into shards/<name>-<step>/ (see
sharded_checkpoint.py). The small .pt file names them with their checksums. One rename makes both
valid.
"""

import contextlib
import hashlib
import os
import re
import shutil
import sys

import torch

from nanorecall.files import (
    atomic_write,
    from_system,
    inside,
    is_inside,
    reading,
    refuse_compressed,
    remove,
    remove_stale,
    sha256_file,
    size_of_file,
    stamp,
    temporary_name,
    temporary_names,
)
from nanorecall.records import check_kinds
from nanorecall.settings import ConfigError, RunError, require, say
from nanorecall.sharded_checkpoint import read_shards, shard_dir
from nanorecall.tensors import plain_tensors, unreadable

# Kinds of the values of a checkpoint that are not tensors. They are Run.state of run.py.
STATE = {
    "step": "count",
    "bad_steps": "count",
    **dict.fromkeys(("best", "best_overall", "seconds"), "number"),
    "curriculum": {"ends": ["count"], "mean_loss": "number"},
}

# ---- writing -------------------------------------------------------------------------------------


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


def remove_old_shards(folder):
    """Delete shards that no checkpoint names. While a checkpoint cannot be read, delete none."""
    directory = os.path.join(folder, "shards")
    if not os.path.isdir(directory):
        return
    used = set()
    for name in ("ckpt", "ckpt_prev", "best"):
        try:
            if stamp(os.path.join(folder, name + ".pt")) is None:
                continue
            state = read_checkpoint(folder, name)
            if "shards" in state:
                used.add(state["shards"]["folder"])
        except Exception:  # the checkpoint that cannot be read may need any of the shards
            return
    for label in os.listdir(directory):
        ours = re.fullmatch(r"(ckpt|ckpt_prev|best)-\d+(-\d+)?", label)
        if ours and label not in used:
            shutil.rmtree(os.path.join(directory, label), ignore_errors=True)
    if not os.listdir(directory):
        os.rmdir(directory)


# ---- reading -------------------------------------------------------------------------------------


def load_checkpoint(folder, *names):
    """The first of the named checkpoints that is whole, with all tensors, in a file or in shards.

    See first_valid_checkpoint.
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
        seen = stamp(path)
        while seen is not None:
            try:
                check_whole(folder, name)
                return name
            except Damaged as e:
                why = e
            # The run that trains here may have written another one meanwhile.
            before, seen = seen, stamp(path)
            if seen == before:
                say(f"{path} is damaged ({why}); trying an older one", file=sys.stderr)
                if holds_lock:
                    quarantine(path)
                break
    every = ", ".join(n + ".pt" for n in names)
    raise ConfigError(f"{folder} has no checkpoint that can be read ({every})")


class Damaged(Exception):
    """A checkpoint that is not as it was written; the text says why."""


def check_whole(folder, name):
    """Damaged unless the checkpoint <folder>/<name>.pt and its shards are as they were written."""
    path = os.path.join(folder, name + ".pt")
    with reading(path):
        verify_sha256(path)
    state = read_checkpoint(folder, name)
    verify_shards(folder, state)


def verify_sha256(path):
    """Damaged unless the file is as append_sha256 left it."""
    if not os.path.isfile(path):
        os.stat(path)  # raises OSError if it is the disk that does not answer
        raise Damaged("it is no file")
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        left = os.fstat(f.fileno()).st_size - 64
        while left > 0:
            block = f.read(min(left, 2**20))
            digest.update(block)
            left -= len(block)
        if left < 0 or f.read() != digest.hexdigest().encode():
            raise Damaged("its checksum differs")


def verify_shards(folder, state):
    """Damaged unless the shards that a checkpoint names are there and unchanged.

    A checkpoint in one file names none.
    """
    if "shards" not in state:
        return
    for file, digest in state["shards"]["files"].items():
        path = inside(shard_dir(folder, state), file)
        with reading(path):
            try:
                size_of_file(path)
                same = sha256_file(path) == digest
            except (FileNotFoundError, NotADirectoryError, ValueError):
                same = False
        if not same:
            raise Damaged(f"{path} is missing or its checksum differs")


def quarantine(path):
    """Rename a damaged file, or what is in its place, to *.damaged. It replaces an earlier one."""
    with contextlib.suppress(OSError):  # read-only: then it cannot be overwritten either
        remove(path + ".damaged")
        os.replace(path, path + ".damaged")


def read_checkpoint(folder, name):
    """The contents of <folder>/<name>.pt, its checksum unchecked.

    Tensors stay on disk until they are used. ConfigError if the file is no checkpoint of train.py;
    RunError if the disk or memory refuses.
    """
    path = os.path.join(folder, name + ".pt")
    with reading(path):
        try:
            refuse_compressed(path)
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as e:  # damaged files and those of strangers fail in many ways
            if from_system(e):
                raise
            raise unreadable(path, e) from None
    check_form(state, path)
    return state


def check_form(state, path):
    """ConfigError unless this is what save_checkpoint is given: see STATE."""
    try:
        check_kinds(state, "dict", path)
        require("step" in state, f"{path} has no 'step'", None)
        check_kinds(state, {name: STATE[name] for name in STATE.keys() & state.keys()}, path)
        if "settings" in state:
            check_kinds(state["settings"], "text", f"{path}: 'settings'")
        if "shards" in state:
            shards = {"folder": "path inside", "files": {"*": "hash"}}
            check_kinds(state["shards"], shards, f"{path}: 'shards'")
            all_inside = all(is_inside(name) for name in state["shards"]["files"])
            require(all_inside, f"{path} names files outside of its run", None)
        else:
            state["tensors"] = plain_tensors(state.get("tensors", {}), path)
    except ConfigError as e:
        raise ConfigError(f"{e}: it is no checkpoint of train.py") from None
