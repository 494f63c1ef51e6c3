"""What can happen to a run: kill -9, signals, damaged files, a full disk, two processes, SLURM."""

import builtins
import contextlib
import errno
import gc
import importlib.util
import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.nn.parallel import DistributedDataParallel

import nanorecall.run as run_module
import train
from nanorecall import checkpoint, files
from nanorecall.files import (
    atomic_directory,
    atomic_write,
    lock_run_dir,
    sha256_file,
    temporary_name,
    unlock,
)
from nanorecall.records import JsonlLog, read_json, read_log, write_json
from nanorecall.settings import ConfigError, RunError, run_cli
from toys import (
    TOY,
    Bomb,
    as_flags,
    assert_same,
    contents,
    flags,
    last_logged_step,
    run,
    status_of,
    wait_for_step,
)

pytestmark = pytest.mark.slow  # runs are killed and resumed

InMemoryMQAR = train.parse([]).data_module.InMemoryMQAR
resource = pytest.importorskip("resource", reason="kills and signals are tested on POSIX only")


def steps_of(out, *names):
    """The step of each of these checkpoints."""
    return [checkpoint.load_checkpoint(out, name)["step"] for name in names]


def start(folder, name, **changes):
    """Train the toy run in a process of its own, which does not ignore any signal.

    Tests started with nohup ignore SIGHUP; started in a script's background, SIGINT.
    """
    command = [sys.executable, train.__file__, *flags(folder, name, **changes)]

    def reset_signals():
        for number in (signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)

    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, **pipes, preexec_fn=reset_signals)


def in_child(work):
    """Run work() in a forked process -> its number, for exit_status."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            work()
            status = 0
        except SystemExit as e:
            status = e.code
        finally:
            os._exit(status)
    return pid


def exit_status(pid):
    """Wait for a child -> its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ---- kill -9 -------------------------------------------------------------------------------------


def test_killed_at_random_moments_and_resumed_a_run_ends_bit_for_bit_the_same(tmp_path):
    settings = dict(curriculum="[(2,15)]", max_steps=120, log_interval=1, weight_decay=0.1)
    _, whole = run(tmp_path, "whole", **settings)
    rng, out = random.Random(time.time_ns()), str(tmp_path / "killed")
    process = start(tmp_path, "killed", **settings)
    for low, high in ((1, 19), (20, 110)):  # before the first checkpoint, and after
        wait_for_step(out, rng.randrange(low, high), process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        with open(os.path.join(out, "log.jsonl"), "a") as f:
            f.write('{"kind": "train", "st')  # a line that the kill cut off
        command = [sys.executable, train.__file__, "--resume", out]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    assert process.wait() == 0
    assert_same(contents(out), contents(whole))


def test_killed_a_hundred_times_while_saving_it_always_has_a_checkpoint(tmp_path):
    """It is at least as far as the last row of the log, less the steps between two saves."""
    out, rng, reached = str(tmp_path / "run"), random.Random(time.time_ns()), 0
    settings = dict(max_steps=10**6, eval_interval=10**5, save_interval=3, log_interval=1)
    args = flags(tmp_path, "run", n_val_examples=8, **settings)

    def work():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        train.main([f"--resume={out}"] if os.path.exists(out) else args)

    for _ in range(100):
        pid = in_child(work)
        while os.waitpid(pid, os.WNOHANG) == (0, 0) and last_logged_step(out) < reached + 7:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.05)
        os.kill(pid, signal.SIGKILL)
        assert exit_status(pid) == -signal.SIGKILL
        step, step_before = steps_of(out, "ckpt", "ckpt_prev")
        assert step > reached and step >= last_logged_step(out) - 3
        assert step_before >= step - 3
        reached = step
    assert not [name for name in os.listdir(out) if "damaged" in name]


def test_two_ranks_killed_while_they_write_shards_continue_from_the_last_whole_ones(
    on_ranks, tmp_path
):
    out, rng, reached = str(tmp_path / "run"), random.Random(time.time_ns()), 0
    settings = dict(max_steps=10**6, eval_interval=10**5, save_interval=2, log_interval=1)
    args = flags(tmp_path, "run", parallel="fsdp", **settings)

    def killed_after(step, save):
        def save_or_die(*args, **kwargs):
            if last_logged_step(out) > step:
                os.kill(os.getpid(), signal.SIGKILL)
            return save(*args, **kwargs)

        return save_or_die

    def until_killed(rank):
        limit = reached + 4 + 10 * rng.random()  # the same on both
        if rank == 0:  # as it writes the checkpoint
            torch.save = killed_after(limit, torch.save)
        else:  # as it writes its shards
            dcp.save = killed_after(limit + 1, dcp.save)
        return train.main([f"--resume={out}"] if reached else args)

    for _ in range(6):
        assert -signal.SIGKILL in on_ranks(2, until_killed)
        state = checkpoint.load_checkpoint(out, "ckpt")
        assert state["step"] > reached and state["step"] >= last_logged_step(out) - 2
        assert state["tensors"]
        reached = state["step"]
    # ckpt, ckpt_prev, and what one kill left
    assert len(os.listdir(os.path.join(out, "shards"))) <= 4


def test_the_leftovers_of_a_kill_between_two_names_spoil_nothing(tmp_path):
    """The temporary file may be another name of ckpt.pt: writing there would be writing into it."""
    for step in (1, 2):
        checkpoint.save_checkpoint(tmp_path, "ckpt", {"step": step})
    os.link(tmp_path / "ckpt.pt", temporary_name(str(tmp_path / "ckpt_prev.pt")))
    checkpoint.save_checkpoint(tmp_path, "ckpt_prev", {"step": 0})
    assert steps_of(tmp_path, "ckpt", "ckpt_prev") == [2, 0]
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "ckpt_prev.pt"]


# ---- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_saves_and_says_how_to_continue(tmp_path, monkeypatch, capfd, number):
    args, out = flags(tmp_path, "stopped"), str(tmp_path / "stopped")
    batch = InMemoryMQAR.batch

    def signal_in_step_9(self, split, step, rows):
        if split == "train" and step == 9:
            os.kill(os.getpid(), number)
        return batch(self, split, step, rows)

    def work():
        signal.signal(number, signal.SIG_DFL)
        run_cli(lambda: train.main(args))

    monkeypatch.setattr(InMemoryMQAR, "batch", signal_in_step_9)
    assert exit_status(in_child(work)) == 128 + number
    text, error = capfd.readouterr()
    assert f"--resume {out}" in text and "Traceback" not in error
    assert status_of(out)["status"] == "preempted" and status_of(out)["step"] == 10
    assert steps_of(out, "ckpt") == [10]


def test_a_signal_that_nohup_ignores_does_not_stop_a_run(tmp_path, monkeypatch):
    args, out = flags(tmp_path, "run"), str(tmp_path / "run")
    batch = InMemoryMQAR.batch

    def hang_up_in_step_9(self, split, step, rows):
        if split == "train" and step == 9:
            os.kill(os.getpid(), signal.SIGHUP)
        return batch(self, split, step, rows)

    def work():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        run_cli(lambda: train.main(args))

    monkeypatch.setattr(InMemoryMQAR, "batch", hang_up_in_step_9)
    assert exit_status(in_child(work)) == 0
    assert status_of(out)["status"] == "finished" and status_of(out)["step"] == 60


def test_after_a_signal_a_resumed_run_ends_bit_for_bit_the_same(tmp_path):
    settings = dict(log_interval=1, max_steps=10**6, eval_interval=10**5, lr_schedule="constant")
    process, out = start(tmp_path, "stopped", **settings), str(tmp_path / "stopped")
    wait_for_step(out, 7, process)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    # However many steps it made on a busy machine, a few more are enough.
    step = status_of(out)["step"]
    settings["max_steps"] = step + 20
    assert step >= 7 and run(tmp_path, "stopped", resume=True, max_steps=step + 20)[0] == 0
    _, whole = run(tmp_path, "whole", **settings)
    assert_same(contents(out), contents(whole))


def test_a_signal_before_the_first_step_saves_too(tmp_path, monkeypatch):
    """And a run in this process leaves the handlers as they were."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    wrap_model = run_module.wrap_model

    def wrap_slowly(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return wrap_model(*args)

    monkeypatch.setattr(run_module, "wrap_model", wrap_slowly)
    for start in range(2):
        status, out = run(tmp_path, resume=start > 0)
        assert status == 128 + signal.SIGTERM
        # A step that is evaluated is evaluated again after the resume; others are made first.
        assert status_of(out)["status"] == "preempted" and status_of(out)["step"] == start + 1
        assert steps_of(out, "ckpt") == [start + 1]
        assert [signal.getsignal(number) for number in numbers] == before
    monkeypatch.setattr(run_module, "wrap_model", wrap_model)
    assert run(tmp_path, resume=True)[0] == 0


def signal_in_batch(monkeypatch, wanted_split, number):
    """Let the process get SIGTERM in that batch of a split -> the splits of all batches."""
    data_class = train.parse([]).data_module.InMemoryMQAR
    batch, splits = data_class.batch, []

    def batch_with_signal(self, split, step, rows):
        splits.append(split)
        if split == wanted_split and splits.count(split) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, split, step, rows)

    monkeypatch.setattr(data_class, "batch", batch_with_signal)
    return splits


def test_a_signal_cuts_the_last_evaluation_short_too(tmp_path, monkeypatch):
    splits = signal_in_batch(monkeypatch, "test", 1)
    status, out = run(tmp_path, eval_batch_size=10)
    assert status == 128 + signal.SIGTERM and splits.count("test") == 1
    assert status_of(out)["status"] == "preempted"
    assert run(tmp_path, resume=True)[0] == 0


def test_a_signal_cuts_an_evaluation_short(tmp_path, monkeypatch):
    """It is done again after the resume, so nothing is lost and nobody waits for its end."""
    settings = dict(max_steps=30, eval_interval=10, eval_batch_size=10)
    _, whole = run(tmp_path, "whole", **settings)
    splits = signal_in_batch(monkeypatch, "val", 7)  # in the second evaluation of five batches
    status, out = run(tmp_path, "cut", **settings)
    assert status == 128 + signal.SIGTERM and splits.count("val") == 7
    assert status_of(out)["step"] == 20
    assert run(tmp_path, "cut", resume=True)[0] == 0
    assert_same(contents(out), contents(whole))


# ---- damaged files -------------------------------------------------------------------------------


def damages(raw, fuse):
    """Every way to spoil a checkpoint: functions of its path."""
    rng = random.Random(0)

    def write(data):
        return lambda path: path.write_bytes(data)

    for _ in range(200):
        flipped = bytearray(raw)
        flipped[rng.randrange(len(raw))] ^= rng.randrange(1, 256)
        yield write(bytes(flipped))
    for _ in range(20):
        yield write(raw[: rng.randrange(len(raw))])
    yield write(b"")
    yield write(raw + b"x")
    yield lambda path: path.mkdir()
    yield write(pickle.dumps(Bomb(fuse)))
    yield lambda path: torch.save({"step": 1, "tensors": Bomb(fuse)}, path)


def test_every_damage_is_noticed_and_the_checkpoint_before_taken(tmp_path, capsys):
    """By a reader, which changes nothing, and by the process that holds the lock of the run,
    which sets the file aside.
    """
    _, out = run(tmp_path)
    path, fuse = tmp_path / "run" / "ckpt.pt", tmp_path / "fuse"
    ways = list(damages(path.read_bytes(), fuse))
    assert len(ways) == 225
    capsys.readouterr()
    for spoil in ways:
        path.unlink(missing_ok=True)
        spoil(path)
        before = sorted(os.listdir(out))
        state = checkpoint.load_checkpoint(out, "ckpt", "ckpt_prev")
        error = capsys.readouterr().err
        assert state["step"] == 40, spoil
        assert error.count("\n") == 1 and "ckpt.pt is damaged (" in error, spoil
        assert sorted(os.listdir(out)) == before
        names = ("ckpt", "ckpt_prev")
        assert checkpoint.first_valid_checkpoint(out, *names, holds_lock=True) == "ckpt_prev"
        assert capsys.readouterr().err == error
        assert os.path.lexists(f"{path}.damaged") and not os.path.lexists(path)
    assert not fuse.exists()


def test_a_strangers_checkpoint_with_a_right_checksum_is_refused(tmp_path):
    """It is not damaged, so it is not set aside; it does not go off either."""
    _, out = run(tmp_path)
    fuse = tmp_path / "fuse"
    checkpoint.save_checkpoint(out, "ckpt", {"step": 1, "tensors": Bomb(fuse)}, keep_old=False)
    with pytest.raises(ConfigError, match=r"ckpt\.pt cannot be read as weights"):
        checkpoint.first_valid_checkpoint(out, "ckpt", "ckpt_prev", holds_lock=True)
    assert os.path.exists(os.path.join(out, "ckpt.pt")) and not fuse.exists()


def test_without_a_checkpoint_that_can_be_read_there_is_a_sentence(tmp_path):
    _, out = run(tmp_path)
    for name in ("ckpt.pt", "ckpt_prev.pt"):
        os.truncate(os.path.join(out, name), 1000)
    with pytest.raises(ConfigError, match="no checkpoint that can be read"):
        checkpoint.load_checkpoint(out, "ckpt", "ckpt_prev")


SYSTEM_ERRORS = {
    "EIO": OSError(errno.EIO, "Input/output error"),
    "ESTALE": OSError(errno.ESTALE, "Stale file handle"),
    "ETIMEDOUT": TimeoutError(errno.ETIMEDOUT, "Connection timed out"),
    "EMFILE": OSError(errno.EMFILE, "Too many open files"),
    "ENOMEM": RuntimeError("unable to mmap 704 bytes from file <x>: Cannot allocate memory (12)"),
    "allocator": RuntimeError("DefaultCPUAllocator: Error code 12 (Cannot allocate memory)"),
    "memory": MemoryError(),
}


@pytest.mark.parametrize("error", SYSTEM_ERRORS)
@pytest.mark.parametrize("at", ["lstat", "stat", "open", "hash", "load"])
def test_a_read_error_is_no_damage(tmp_path, monkeypatch, error, at):
    """A failing disk or a full memory does not mean that the file is damaged.

    So reader and trainer stop, and change nothing.
    """
    state = {"step": 1, "tensors": {}, "shards": {"folder": "ckpt-1", "files": {"a": "0" * 64}}}
    for name in ("ckpt_prev", "best", "ckpt"):
        checkpoint.save_checkpoint(tmp_path, name, state, keep_old=False)
    os.makedirs(tmp_path / "shards" / "ckpt-1")
    (tmp_path / "shards" / "ckpt-1" / "a").write_bytes(b"x")

    def all_files():
        return {str(p): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    before = all_files()
    functions = {
        "lstat": (os, "lstat"),
        "stat": (os, "stat"),
        "open": (builtins, "open"),
        "hash": (checkpoint, "sha256_file"),
        "load": (torch, "load"),
    }
    function = getattr(*functions[at])

    def refuse(path, *args, **kwargs):
        if str(path).endswith(("ckpt.pt", "best.pt", "shards/ckpt-1/a")):
            raise SYSTEM_ERRORS[error]
        return function(path, *args, **kwargs)

    monkeypatch.setattr(*functions[at], refuse)
    for names in (("ckpt", "ckpt_prev"), ("best",)):
        for holds_lock in (False, True):
            with pytest.raises(RunError, match=r"cannot read .*; nothing was changed"):
                checkpoint.first_valid_checkpoint(str(tmp_path), *names, holds_lock=holds_lock)
        with pytest.raises(RunError, match="cannot read"):
            checkpoint.load_checkpoint(str(tmp_path), *names)
    monkeypatch.undo()
    assert all_files() == before


@pytest.mark.parametrize("function", ["verify_shards", "read_shards"])
def test_a_reader_takes_the_checkpoint_that_replaced_its_own(
    tmp_path, monkeypatch, capsys, function
):
    """The run that trains there deletes the shards of the checkpoint before, as eval.py is about
    to read them.
    """
    _, out = run(tmp_path)
    train.main([f"--resume={out}", "--export_checkpoint=shards"])
    capsys.readouterr()
    original = getattr(checkpoint, function)

    def replaced(*args):
        monkeypatch.setattr(checkpoint, function, original)
        os.replace(os.path.join(out, "ckpt_prev.pt"), os.path.join(out, "ckpt.pt"))
        shutil.rmtree(os.path.join(out, "shards", "ckpt-60"))
        return original(*args)

    monkeypatch.setattr(checkpoint, function, replaced)
    assert checkpoint.load_checkpoint(out, "ckpt")["step"] == 40
    assert not capsys.readouterr().err


@pytest.fixture
def sharded(tmp_path):
    """A run whose checkpoints are in shards."""
    _, out = run(tmp_path)
    assert train.main([f"--resume={out}", "--export_checkpoint=shards"]) == 0
    return out


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp"])
def test_damaged_shards_are_noticed_too(sharded, tmp_path, capsys, file):
    """Bytes that differ, a missing file, and a bomb in its place."""
    fuse = tmp_path / "fuse"
    path = os.path.join(sharded, "shards", "ckpt-60", file)
    with open(path, "rb") as f:
        raw = f.read()
    spoilt = [None, pickle.dumps(Bomb(fuse))]
    for i in range(2, 20, 2):
        flipped = bytearray(raw)
        flipped[i * 997 % len(raw)] ^= 1
        spoilt.append(bytes(flipped))
    for data in spoilt:
        os.remove(path)
        if data is not None:
            with open(path, "wb") as f:
                f.write(data)
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        copy = shutil.copytree(sharded, tmp_path / "copy")
        state = checkpoint.load_checkpoint(str(copy), "ckpt", "ckpt_prev")
        assert state["shards"]["folder"] == "ckpt_prev-40"
        assert f"{file} is missing or its checksum" in capsys.readouterr().err
        if data is None:
            open(path, "wb").close()
    assert not fuse.exists()


def test_an_index_of_shards_that_is_a_bomb_does_not_go_off(sharded, tmp_path):
    """Its checksum is right."""
    fuse = tmp_path / "fuse"
    path = os.path.join(sharded, "shards", "ckpt-60", ".metadata")
    with open(path, "wb") as f:
        pickle.dump(Bomb(fuse), f)
    state = checkpoint.read_checkpoint(sharded, "ckpt")
    state["shards"]["files"][".metadata"] = sha256_file(path)
    checkpoint.save_checkpoint(sharded, "best", state)
    with pytest.raises(ConfigError, match="system has no place"):
        checkpoint.load_checkpoint(sharded, "best")
    assert not fuse.exists()


def test_shards_that_a_save_left_half_written_are_neither_used_nor_in_the_way(sharded):
    """No checkpoint names them."""
    os.makedirs(os.path.join(sharded, "shards", "ckpt-70"))
    train.main([f"--resume={sharded}", "--export_checkpoint=shards"])
    assert steps_of(sharded, "ckpt") == [60]
    kept = set(os.listdir(os.path.join(sharded, "shards")))
    assert len(kept) == 3 and "ckpt-70" not in kept


def test_shards_stay_while_a_checkpoint_cannot_be_read(sharded, monkeypatch):
    shards = os.path.join(sharded, "shards")
    os.makedirs(os.path.join(shards, "ckpt-70"))
    before, read = set(os.listdir(shards)), checkpoint.read_checkpoint

    def stale(folder, name):
        if name == "ckpt_prev":
            raise OSError(errno.ESTALE, "stale file handle")
        return read(folder, name)

    monkeypatch.setattr(checkpoint, "read_checkpoint", stale)
    checkpoint.remove_old_shards(sharded)
    assert set(os.listdir(shards)) == before
    monkeypatch.undo()
    checkpoint.remove_old_shards(sharded)
    assert set(os.listdir(shards)) == before - {"ckpt-70"}


def test_what_json_cannot_say_is_null(tmp_path):
    log = JsonlLog(str(tmp_path), 0)
    by_slice = {"hops": {1: {"loss": math.inf, "labels": 2}}}
    log.write(kind="eval", step=1, loss=math.nan, by_slice=by_slice)
    row = json.loads((tmp_path / "log.jsonl").read_text())
    assert row["loss"] is None
    assert row["by_slice"] == {"hops": {"1": {"loss": None, "labels": 2}}}


@pytest.mark.parametrize("model", ["gpt", "delta", "gated_delta"])
def test_with_a_checkpoint_set_aside_a_run_does_not_begin_again(tmp_path, model):
    """As after falling back once and being killed before the next save."""
    _, out = run(tmp_path, model=model)
    before, whole = read_log(out), contents(out)
    os.replace(os.path.join(out, "ckpt.pt"), os.path.join(out, "ckpt.pt.damaged"))
    assert run(tmp_path, resume=True)[0] == 0
    kept = [row for row in before if row["step"] < 40]
    # Their times are the same, too: these steps were not run again.
    assert read_log(out)[: len(kept)] == kept
    assert_same(contents(out), whole)
    for name in ("ckpt.pt", "ckpt_prev.pt"):
        os.remove(os.path.join(out, name))
    with pytest.raises(ConfigError, match="no checkpoint that can be read"):
        run(tmp_path, resume=True)


# ---- two processes -------------------------------------------------------------------------------


def test_two_processes_never_write_one_run(tmp_path):
    process = start(tmp_path, "run", max_steps=100000)
    wait_for_step(os.path.join(tmp_path, "run"), 20, process)
    with pytest.raises(ConfigError, match="another process is writing this run"):
        run(tmp_path, resume=True)
    process.kill()
    process.communicate()
    # Killed, it holds the directory no longer.
    assert run(tmp_path, resume=True, max_steps=40)[0] == 0


def test_a_file_system_without_locks_is_a_warning(tmp_path, capsys, monkeypatch):
    def no_locks(*arguments):
        raise OSError("not supported")

    run(tmp_path, max_steps=20)
    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    assert run(tmp_path, resume=True, max_steps=40)[0] == 0
    assert "cannot be locked" in capsys.readouterr().err


def test_without_locks_everything_runs(tmp_path, monkeypatch, capsys):
    """As on Windows, which has no fcntl and opens no directories."""
    spec = importlib.util.spec_from_file_location("without_fcntl", files.__file__)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "fcntl", None)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    assert module.fcntl is None
    opened = os.open

    def files_only(path, *args, **kwargs):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(os, "open", files_only)
    status, out = run(tmp_path)
    assert status == 0 and run(tmp_path, resume=True, max_steps=80)[0] == 0
    assert "cannot be locked here" in capsys.readouterr().err
    with atomic_directory(str(tmp_path / "made")) as work:
        write_json(os.path.join(work, "a.json"), 1)
    assert os.listdir(tmp_path / "made") == ["a.json"]


def test_two_writers_of_one_file_and_a_reader_do_not_disturb_each_other(tmp_path):
    path, length = str(tmp_path / "x.json"), 2000
    write_json(path, [0] * length)

    def write(number):
        def work():
            for _ in range(60):
                write_json(path, [number] * length)

        return work

    writers = [in_child(write(n)) for n in (1, 2)]
    n_reads, ended = 0, (0, 0)
    while ended == (0, 0):
        found = read_json(path)
        assert len(found) == length and len(set(found)) == 1
        n_reads += 1
        ended = os.waitpid(writers[0], os.WNOHANG)
    assert n_reads > 20 and ended[1] == 0 and exit_status(writers[1]) == 0
    assert os.listdir(tmp_path) == ["x.json"]


def test_the_temporary_file_of_a_dead_writer_goes_that_of_a_living_one_stays(tmp_path):
    path = str(tmp_path / "x [1].json")

    def die(f):
        f.write(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)

    def meanwhile(f):
        f.write(b"1")
        write_json(path, 2)
        assert len(os.listdir(tmp_path)) == 2  # the other file, and this one

    assert exit_status(in_child(lambda: atomic_write(path, die))) == -signal.SIGKILL
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".x [1].json.tmp-")
    atomic_write(path, meanwhile)
    assert os.listdir(tmp_path) == ["x [1].json"] and read_json(path) == 1
    # Of a file that nobody writes again, the next process that holds the directory deletes it.
    assert exit_status(in_child(lambda: atomic_write(path, die))) == -signal.SIGKILL
    unlock(lock_run_dir(str(tmp_path)))
    assert os.listdir(tmp_path) == ["x [1].json"]


def test_a_new_file_can_be_read_by_those_who_could_read_the_old_one(tmp_path):
    before = os.umask(0o022)
    write_json(str(tmp_path / "x.json"), 1)
    os.umask(before)
    assert (tmp_path / "x.json").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGKILL])
def test_a_data_set_that_was_stopped_leaves_nothing(tmp_path, number):
    """kill -9 leaves a temporary directory, which the next writer deletes; a user's own stays."""
    target, own = str(tmp_path / "set"), tmp_path / "set.partial-mine"
    own.mkdir()

    def stopped():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with atomic_directory(target) as work:
            write_json(os.path.join(work, "a.json"), 1)
            os.kill(os.getpid(), number)
            time.sleep(10)

    status = exit_status(in_child(stopped))
    left = set(os.listdir(tmp_path)) - {own.name}
    if number == signal.SIGKILL:
        assert status == -number and len(left) == 1
    else:
        assert status == 128 + number and not left
    with atomic_directory(target):
        pass
    assert sorted(os.listdir(tmp_path)) == ["set", own.name]


def test_a_data_set_is_finished_after_a_signal_that_nohup_ignores(tmp_path):
    def hung_up():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with atomic_directory(str(tmp_path / "set")):
            os.kill(os.getpid(), signal.SIGHUP)

    assert exit_status(in_child(hung_up)) == 0
    assert os.listdir(tmp_path) == ["set"]


def test_data_sets_that_are_written_at_once_do_not_disturb_each_other(tmp_path):
    target = str(tmp_path / "set")
    with atomic_directory(target) as work:
        with atomic_directory(str(tmp_path / "other")):
            pass
        with pytest.raises(ConfigError, match="stop"):
            with atomic_directory(target) as second:
                assert os.path.isdir(work) and second != work
                raise OSError("stop")
    assert sorted(os.listdir(tmp_path)) == ["other", "set"]


# ---- file systems and disks ----------------------------------------------------------------------


def test_without_hard_links_the_older_checkpoint_is_a_copy(tmp_path, monkeypatch):
    def no_links(*paths):
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", no_links)
    for step in (1, 2, 3):
        checkpoint.save_checkpoint(tmp_path, "ckpt", {"step": step})
    assert steps_of(tmp_path, "ckpt", "ckpt_prev") == [3, 2]
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "ckpt_prev.pt"]


@pytest.mark.parametrize("at", ["open", "save", "fsync", "link", "replace"])
def test_a_disk_that_refuses_leaves_the_old_checkpoint(tmp_path, monkeypatch, at):
    for step in (1, 2):
        checkpoint.save_checkpoint(tmp_path, "ckpt", {"step": step})

    def refuse(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    def full(state, f):
        f.write(b"half of it")
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904, as torch.save does

    functions = {
        "open": [(builtins, "open", refuse)],
        "save": [(torch, "save", full)],
        "fsync": [(os, "fsync", refuse)],
        "link": [(os, "link", refuse), (shutil, "copyfileobj", refuse)],
        "replace": [(os, "replace", refuse)],
    }
    for function in functions[at]:
        monkeypatch.setattr(*function)
    with pytest.raises(RunError, match=r"cannot write .*ckpt(_prev)?\.pt: (No space|Read-only)"):
        checkpoint.save_checkpoint(tmp_path, "ckpt", {"step": 3})
    monkeypatch.undo()
    assert checkpoint.load_checkpoint(tmp_path, "ckpt")["step"] == 2
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "ckpt_prev.pt"]


@pytest.mark.parametrize(
    "size, parallel, largest", [(1, "ddp", 60000), (2, "ddp", 60000), (2, "fsdp", 20000)]
)
def test_a_full_disk_ends_a_run_with_a_sentence_and_loses_nothing(
    on_ranks, tmp_path, capfd, size, parallel, largest
):
    args = flags(tmp_path, "run", parallel=parallel, max_steps=20)
    assert on_ranks(size, lambda rank: train.main(args)) == [0] * size
    out = str(tmp_path / "run")
    resume = [f"--resume={out}", "--max_steps=40"]
    before = checkpoint.load_checkpoint(out, "ckpt")
    capfd.readouterr()

    def on_a_small_disk(rank):
        # Files end at this size, as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        try:
            return train.main(resume)
        except RunError as e:
            # Although the error's traceback is kept, the DDP model is gone: distributed.shutdown.
            objects = gc.get_objects()
            assert e.__traceback__
            assert not any(isinstance(o, DistributedDataParallel) for o in objects)
            raise

    assert on_ranks(size, on_a_small_disk) == [1] * size
    error = capfd.readouterr().err
    assert error.count("cannot write") == 1 and "File too large" in error
    assert "Traceback" not in error
    assert status_of(out)["status"] == "failed"
    assert not [name for name in os.listdir(out) if ".tmp-" in name or name.endswith(".damaged")]
    assert_same(checkpoint.load_checkpoint(out, "ckpt"), before)
    assert on_ranks(size, lambda rank: train.main(resume)) == [0] * size
    assert steps_of(out, "ckpt") == [40]


# ---- the queue of a cluster ----------------------------------------------------------------------


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """SLURM's commands on PATH, and a copy of the repo to run in -> job number.

    sbatch runs the script's body here, srun its command; scontrol notes what it is asked for.
    """
    notes = f'echo "$@" >> {tmp_path}/asked'
    scripts = {
        "sbatch": 'script="$1"; shift; exec bash "$script" "$@"',
        "srun": 'exec "$@"',
        "scontrol": f'if [ "$1" = show ]; then echo localhost; else {notes}; fi',
    }
    (tmp_path / "bin").mkdir()
    for name, body in scripts.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    python = os.path.dirname(sys.executable)
    job = str(random.Random(time.time_ns()).randrange(10**6))
    variables = {
        "PATH": f"{tmp_path / 'bin'}:{python}:{os.environ['PATH']}",
        "SLURM_JOB_NAME": "t",
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_SUBMIT_DIR": str(tmp_path / "repo"),
        "RANKS": "2",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    ignore = shutil.ignore_patterns("runs", ".git", "tests", ".venv", "__pycache__")
    shutil.copytree(os.path.dirname(train.__file__), tmp_path / "repo", ignore=ignore)
    return job


def descendants(pid):
    found = []
    with contextlib.suppress(OSError):  # it has ended meanwhile
        with open(f"/proc/{pid}/task/{pid}/children") as f:
            for child in f.read().split():
                found += [int(child), *descendants(child)]
    return found


def find_torchrun(pid):
    """The shell that waits for torchrun, among the descendants of another process."""
    for child in descendants(pid):
        with contextlib.suppress(OSError), open(f"/proc/{child}/cmdline") as f:
            # Once it has a child, it also has its trap.
            if "torch.distributed.run" in f.read() and descendants(child):
                return child


def stop_step(process):
    """SIGTERM to each process of the step that srun started, as SLURM does -> exit status."""
    shell = find_torchrun(process.pid)
    for pid in [shell, *descendants(shell)]:
        os.kill(pid, signal.SIGTERM)
    process.communicate()
    return process.returncode


def test_the_slurm_script_stops_in_time_queues_again_and_goes_on(tmp_path, slurm):
    repo, asked = tmp_path / "repo", tmp_path / "asked"
    out = str(repo / "runs" / f"t-{slurm}")
    assert subprocess.run(["bash", "-n", "train.slurm"], cwd=repo).returncode == 0
    settings = dict(max_steps=300, eval_interval=300, log_interval=1)
    args = as_flags({**TOY, **settings})
    command = ["sbatch", "train.slurm", *args]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen(command, cwd=repo, **pipes)
    wait_for_step(out, 5, process)
    assert stop_step(process) == 0
    assert asked.read_text() == f"requeue {slurm}\n"
    stopped = status_of(out)
    assert stopped["status"] == "preempted" and 5 <= stopped["step"] < 300
    # The next start is stopped before its ranks have read the checkpoint.
    process = subprocess.Popen(command, cwd=repo, **pipes)
    while not find_torchrun(process.pid):
        time.sleep(0.01)
    assert stop_step(process) == 0
    assert asked.read_text() == f"requeue {slurm}\n" * 2
    assert not os.path.exists(f"{out}/status.json")
    done = subprocess.run(command, cwd=repo, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "32 = 2 ranks x 1 micro-batches x 16 sequences" in done.stdout
    assert "started again by torchrun" not in done.stdout  # it knew at once where to go on
    assert asked.read_text() == f"requeue {slurm}\n" * 2
    assert status_of(out)["status"] == "finished"
    config = read_json(f"{out}/config.json")
    assert config["resumed"][0]["step"] == stopped["step"]
