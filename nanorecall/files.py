"""Files and directories that a crash, a full disk or a second process cannot spoil.

    atomic_write(path, lambda f: f.write(b"..."))   # a file: whole, or as it was before
    with atomic_directory(path) as work: ...        # a directory, likewise
    with only_writer(folder, "results"): ...        # no other process writes there meanwhile

A file or directory that is being written has a temporary name. Its writer locks it, and the system
ends the lock with the writer's process. The next writer deletes what has no lock.
"""

import contextlib
import errno
import glob
import hashlib
import json
import os
import secrets
import shutil
import signal
import stat
import sys
import threading
import zipfile

from nanorecall.settings import ConfigError, RunError, require, say

try:
    import fcntl
except ImportError:  # Windows: everything runs, without locks
    fcntl = None

# ---- files ---------------------------------------------------------------------------------------


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
        # Before it was locked, another process took it for a dead writer's. Make another one.
        f.close()


def remove_stale(pattern):
    """Delete what dead writers have left: files and directories whose locks are free.

    pattern: of their names, as glob takes it.
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

    The system releases a lock when its process ends, also if it is killed.
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


def remove(path):
    """Delete a file or directory, if there is one."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.remove(path)


# ---- directories ---------------------------------------------------------------------------------


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
    """SIGTERM, SIGHUP and SIGUSR1 leave the block as sys.exit would, so that it can clean up.

    A second one is ignored.
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


def lock_run_dir(folder, what="this run"):
    """Refuse a second process that writes into a directory -> the lock, for unlock.

    The lock ends with this process. It is None where directories cannot be opened
    (Windows). ConfigError if another process has it.
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
    """Give back the lock that lock_run_dir returned."""
    if handle is not None:
        os.close(handle)


@contextlib.contextmanager
def only_writer(folder, what):
    """In the block, no other process writes `what` into this directory.

    The directory is made if need be, and removed if it stays empty. ConfigError if another process
    is in such a block already, or if the disk refuses.
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


# ---- reading -------------------------------------------------------------------------------------


@contextlib.contextmanager
def reading(path):
    """Inside, errors of the disk or of memory become RunError.

    They say nothing about the contents of the file, which must not be taken for damaged.
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


def stamp(path):
    """Numbers that change when a file is replaced; None if there is no file.

    RunError if the disk does not answer.
    """
    with reading(path):
        try:
            os.lstat(path)
        except FileNotFoundError:
            return None
        about = os.stat(path)
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns


def size_of_file(path):
    """Bytes of a regular file. ValueError for another kind: reading a pipe might never end."""
    about = os.stat(path)
    if not stat.S_ISREG(about.st_mode):
        raise ValueError(f"{os.path.basename(path)} is no file")
    return about.st_size


def refuse_compressed(path):
    """ValueError for a zip that holds more bytes than the file has.

    torch.save compresses nothing. A zip bomb would fill the memory.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as z:
            size = sum(entry.file_size for entry in z.infolist())
        if size > os.path.getsize(path):
            raise ValueError(f"it expands to {size} bytes")


def is_inside(name):
    """Is this name, read from a file, a path inside of that file's folder?"""
    if not isinstance(name, str) or not name.isprintable() or len(name) >= 256:
        return False
    path = os.path.normpath(name)
    first = path.split(os.sep)[0]
    leaves = os.path.isabs(path) or os.path.splitdrive(path)[0]
    return not leaves and first not in (os.pardir, os.curdir)


def inside(folder, name):
    """<folder>/<name>, for a name that was read from a file there.

    ConfigError unless it is text and stays inside the folder.
    """
    require(is_inside(name), f"{folder} cannot hold a file named {name!r:.80}", None)
    return os.path.join(folder, os.path.normpath(name))


def sha256_file(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def dataset_sha256(path, is_verified=False):
    """SHA-256 of a data set, a file or a directory.

    is_verified: whoever reads the directory compares its files with the checksums in its
    metadata.json, so this file alone counts.
    """
    if is_verified and os.path.isfile(os.path.join(path, "metadata.json")):
        return sha256_file(os.path.join(path, "metadata.json"))
    if os.path.isfile(path):
        return sha256_file(path)
    found = glob.glob(os.path.join(glob.escape(path), "**"), recursive=True)
    sums = [(os.path.relpath(f, path), sha256_file(f)) for f in sorted(found) if os.path.isfile(f)]
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()
