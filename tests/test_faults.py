"""What can happen to a run: kill -9 at any moment, signals, damaged files, a full disk, two processes, a cluster's queue."""

import builtins
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

import train
from nanorecall import checkpoint
from nanorecall.settings import ConfigError, RunError
from toys import Bomb, assert_same, contents, flags, last_logged_step, run, wait_for_step

pytestmark = pytest.mark.slow  # runs are killed and resumed

resource = pytest.importorskip("resource", reason="kills and signals are tested on POSIX only")


def start(folder, name, **changes):
    command = [sys.executable, train.__file__, *flags(folder, name, **changes)]

    def heed():  # started with nohup, tests have SIGHUP ignored; by a script in the background, SIGINT
        for number in (signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)

    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed)


def test_killed_at_random_moments_and_resumed_a_run_ends_bit_for_bit_the_same(tmp_path):
    settings = dict(curriculum="[(2,15)]", max_steps=120, log_interval=1, weight_decay=0.1)
    _, whole = run(tmp_path, "whole", **settings)
    r, out = random.Random(time.time_ns()), str(tmp_path / "killed")
    process = start(tmp_path, "killed", **settings)
    for low, high in ((1, 19), (20, 110)):  # before the first checkpoint, and after
        wait_for_step(out, r.randrange(low, high), process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        with open(os.path.join(out, "log.jsonl"), "a") as f:
            f.write('{"kind": "train", "st')  # a line that the kill cut off
        process = subprocess.Popen([sys.executable, train.__file__, "--resume", out], stdout=subprocess.DEVNULL)
    assert process.wait() == 0
    assert_same(contents(out), contents(whole))


def test_killed_a_hundred_times_while_saving_it_always_has_a_checkpoint(tmp_path):
    """At least as far as the last row of the log, less the steps between two saves."""
    out, r, reached = str(tmp_path / "run"), random.Random(time.time_ns()), 0
    words = flags(tmp_path, "run", max_steps=10**6, eval_interval=10**5, save_interval=3, log_interval=1, n_val_examples=8)
    for _ in range(100):
        pid = os.fork()
        if pid == 0:  # a process of its own, without the seconds that importing torch takes
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            try:
                train.main([f"--resume={out}"] if os.path.exists(out) else words)
            finally:
                os._exit(99)
        while os.waitpid(pid, os.WNOHANG) == (0, 0) and last_logged_step(out) < reached + 7:
            time.sleep(0.001)
        time.sleep(r.random() * 0.05)
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        step = checkpoint.load_checkpoint(out, "ckpt")["step"]
        assert step > reached and step >= last_logged_step(out) - 3
        assert checkpoint.load_checkpoint(out, "ckpt_prev")["step"] >= step - 3
        reached = step
    assert not [name for name in os.listdir(out) if "damaged" in name]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_saves_and_the_run_goes_on_from_there(tmp_path, number):
    settings = dict(log_interval=1, max_steps=1200, eval_interval=600)  # long enough for a busy machine
    process, out = start(tmp_path, "stopped", **settings), str(tmp_path / "stopped")
    wait_for_step(out, 7, process)
    process.send_signal(number)
    text, error = process.communicate()
    assert process.returncode == 128 + number and "Traceback" not in error
    assert f"--resume {out}" in text
    status = checkpoint.read_json(os.path.join(out, "status.json"))
    assert status["status"] == "preempted" and 7 <= status["step"] < 600
    assert checkpoint.load_checkpoint(out, "ckpt")["step"] == status["step"]
    if number != signal.SIGTERM:
        return  # from here on they are alike
    assert run(tmp_path, "stopped", resume=True)[0] == 0
    _, whole = run(tmp_path, "whole", **settings)
    assert_same(contents(out), contents(whole))


@pytest.fixture
def signals():
    """A run in this process that a signal stopped leaves its handlers behind."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


def test_a_signal_cuts_the_last_evaluation_short_too(tmp_path, monkeypatch, signals):
    batch = train.parse([]).data_module.InMemoryMQAR.batch

    def signal_in_test(self, split, step, rows):
        if split == "test":
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, split, step, rows)

    monkeypatch.setattr(train.parse([]).data_module.InMemoryMQAR, "batch", signal_in_test)
    status, out = run(tmp_path, eval_batch_size=10)
    assert status == 128 + signal.SIGTERM
    assert checkpoint.read_json(os.path.join(out, "status.json"))["status"] == "preempted"
    monkeypatch.undo()
    assert run(tmp_path, resume=True)[0] == 0


def test_a_signal_cuts_an_evaluation_short(tmp_path, monkeypatch, signals):
    """It is done again after the resume, so nothing is lost and nothing waits for 100,000 rows."""
    settings = dict(max_steps=30, eval_interval=10, eval_batch_size=10)
    _, whole = run(tmp_path, "whole", **settings)
    made, batch = [], train.parse([]).data_module.InMemoryMQAR.batch

    def signal_in_second_evaluation(self, split, step, rows):
        made.append(split)
        if made.count("val") == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, split, step, rows)

    monkeypatch.setattr(train.parse([]).data_module.InMemoryMQAR, "batch", signal_in_second_evaluation)
    status, out = run(tmp_path, "cut", **settings)
    assert status == 128 + signal.SIGTERM and made.count("val") == 7
    assert checkpoint.read_json(os.path.join(out, "status.json"))["step"] == 20
    assert run(tmp_path, "cut", resume=True)[0] == 0
    assert_same(contents(out), contents(whole))


def test_the_leftovers_of_a_kill_between_two_names_spoil_nothing(tmp_path):
    """The temporary file may be another name of ckpt.pt: writing there would be writing into it."""
    for step in (1, 2):
        checkpoint.save_checkpoint(tmp_path, "ckpt", {"step": step})
    os.link(tmp_path / "ckpt.pt", checkpoint.temporary_name(str(tmp_path / "ckpt_prev.pt")))
    checkpoint.save_checkpoint(tmp_path, "ckpt_prev", {"step": 0})
    assert [checkpoint.load_checkpoint(tmp_path, name)["step"] for name in ("ckpt", "ckpt_prev")] == [2, 0]
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "ckpt_prev.pt"]


def test_two_ranks_killed_while_they_write_shards_go_on_from_the_last_whole_ones(on_ranks, tmp_path):
    out, r, reached = str(tmp_path / "run"), random.Random(time.time_ns()), 0
    words = flags(tmp_path, "run", parallel="fsdp", max_steps=10**6, eval_interval=10**5, save_interval=2, log_interval=1)

    def until_killed(rank):
        limit = reached + 4 + 10 * r.random()  # the same on both
        if rank == 0:
            write, calls = checkpoint.torch.save, []

            def killed_here(*args, **kwargs):
                calls.append(1)
                if last_logged_step(out) > limit:
                    os.kill(os.getpid(), signal.SIGKILL)
                return write(*args, **kwargs)

            checkpoint.torch.save = killed_here
        else:
            save = dcp.save

            def killed_there(*args, **kwargs):
                if last_logged_step(out) > limit + 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                return save(*args, **kwargs)

            dcp.save = killed_there
        return train.main([f"--resume={out}"] if reached else words)

    for _ in range(6):
        assert -signal.SIGKILL in on_ranks(2, until_killed)
        state = checkpoint.load_checkpoint(out, "ckpt")
        assert state["step"] > reached and state["step"] >= last_logged_step(out) - 2 and state["tensors"]
        reached = state["step"]
    assert len(os.listdir(os.path.join(out, "shards"))) <= 4  # ckpt, ckpt_prev, and what one kill left


def damages(raw, fuse):
    """Every way to spoil a checkpoint: a name, and what writes it to a path."""
    r = random.Random(0)

    def write(data):
        return lambda path: path.write_bytes(data)

    for _ in range(200):
        flipped = bytearray(raw)
        flipped[r.randrange(len(raw))] ^= r.randrange(1, 256)
        yield write(bytes(flipped))
    for _ in range(20):
        yield write(raw[: r.randrange(len(raw))])
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
    raw = path.read_bytes()
    ways = list(damages(raw, fuse))
    capsys.readouterr()
    for spoil in ways:
        path.unlink(missing_ok=True)
        spoil(path)
        there = sorted(os.listdir(out))
        state = checkpoint.load_checkpoint(out, "ckpt", "ckpt_prev")
        error = capsys.readouterr().err
        assert state["step"] == 40 and error.count("\n") == 1 and "ckpt.pt is damaged (" in error, spoil
        assert sorted(os.listdir(out)) == there
        assert checkpoint.first_valid_checkpoint(out, "ckpt", "ckpt_prev", holds_lock=True) == "ckpt_prev"
        assert capsys.readouterr().err == error
        assert os.path.lexists(f"{path}.damaged") and not os.path.lexists(path)
    assert len(ways) == 225 and not fuse.exists()
    # With a checksum that is right, a stranger's file is not damaged but refused; it does not go
    # off either.
    checkpoint.save_checkpoint(out, "ckpt", {"step": 1, "tensors": Bomb(fuse)}, keep_old=False)
    with pytest.raises(ConfigError, match=r"ckpt\.pt cannot be read as weights"):
        checkpoint.first_valid_checkpoint(out, "ckpt", "ckpt_prev", holds_lock=True)
    assert path.exists() and not fuse.exists()
    path.write_bytes(raw)
    assert checkpoint.load_checkpoint(out, "ckpt")["step"] == 60
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
    """The disk and memory say nothing about what is in a file:
    reader and trainer stop, and change nothing.
    """
    state = {"step": 1, "tensors": {}, "shards": {"folder": "ckpt-1", "files": {"a": "0" * 64}}}
    for name in ("ckpt_prev", "best", "ckpt"):
        checkpoint.save_checkpoint(tmp_path, name, state, keep_old=False)
    os.makedirs(tmp_path / "shards" / "ckpt-1")
    (tmp_path / "shards" / "ckpt-1" / "a").write_bytes(b"x")
    before = {str(p): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    places = {
        "lstat": (checkpoint.os, "lstat"),
        "stat": (checkpoint.os, "stat"),
        "open": (builtins, "open"),
        "hash": (checkpoint, "sha256_file"),
        "load": (torch, "load"),
    }
    whole = getattr(*places[at])

    def refuse(path, *args, **kwargs):
        if str(path).endswith(("ckpt.pt", "best.pt", "shards/ckpt-1/a")):
            raise SYSTEM_ERRORS[error]
        return whole(path, *args, **kwargs)

    monkeypatch.setattr(*places[at], refuse)
    for names in (("ckpt", "ckpt_prev"), ("best",)):
        for holds_lock in (False, True):
            with pytest.raises(RunError, match=r"cannot read .*; nothing was changed"):
                checkpoint.first_valid_checkpoint(str(tmp_path), *names, holds_lock=holds_lock)
        with pytest.raises(RunError, match="cannot read"):
            checkpoint.load_checkpoint(str(tmp_path), *names)
    monkeypatch.undo()
    assert {str(p): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_reader_takes_the_checkpoint_that_replaced_its_own(tmp_path, monkeypatch, capsys):
    """The run that trains there deletes the shards of the one before,
    as eval.py is about to read them.
    """
    _, out = run(tmp_path)
    train.main([f"--resume={out}", "--export_checkpoint=shards"])
    capsys.readouterr()
    files = [os.path.join(out, name) for name in ("ckpt.pt", "ckpt_prev.pt")]
    aside = tmp_path / "aside"
    for function in ("verify_shards", "read_shards"):
        whole = getattr(checkpoint, function)
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(out, aside)

        def replaced(*args, function=function, whole=whole):
            monkeypatch.setattr(checkpoint, function, whole)
            os.replace(files[1], files[0])
            shutil.rmtree(os.path.join(out, "shards", "ckpt-60"))
            return whole(*args)

        monkeypatch.setattr(checkpoint, function, replaced)
        assert checkpoint.load_checkpoint(out, "ckpt")["step"] == 40
        assert not capsys.readouterr().err
        shutil.rmtree(out)
        shutil.copytree(aside, out)


def test_damaged_shards_are_noticed_too(tmp_path, capsys):
    _, out = run(tmp_path)
    assert train.main([f"--resume={out}", "--export_checkpoint=shards"]) == 0
    fuse, bomb = tmp_path / "fuse", pickle.dumps(Bomb(tmp_path / "fuse"))
    for i, file in enumerate((".metadata", "__0_0.distcp") * 10):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        copy = shutil.copytree(out, tmp_path / "copy")
        path = copy / "shards" / "ckpt-60" / file
        raw = bytearray(path.read_bytes())
        raw[i * 997 % len(raw)] ^= 1
        path.unlink() if i == 0 else path.write_bytes(bomb if i == 1 else raw)
        state = checkpoint.load_checkpoint(str(copy), "ckpt", "ckpt_prev")
        assert state["shards"]["folder"] == "ckpt_prev-40" and f"{file} is missing or its checksum" in capsys.readouterr().err
    # An index that is a bomb with the right checksum does not go off either.
    place = os.path.join(out, "shards", "ckpt-60", ".metadata")
    with open(place, "wb") as f:
        f.write(bomb)
    state = checkpoint.read_checkpoint(out, "ckpt")
    state["shards"]["files"][".metadata"] = checkpoint.sha256_file(place)
    checkpoint.save_checkpoint(out, "best", state)
    with pytest.raises(ConfigError, match="system has no place"):
        checkpoint.load_checkpoint(out, "best")
    assert not fuse.exists()


def test_a_resume_from_shards_that_were_left_half_written(tmp_path):
    """A save that was cut off leaves shards that nothing names; they are neither used nor in the way."""
    _, out = run(tmp_path)
    train.main([f"--resume={out}", "--export_checkpoint=shards"])
    os.makedirs(os.path.join(out, "shards", "ckpt-70"))
    train.main([f"--resume={out}", "--export_checkpoint=shards"])
    assert checkpoint.load_checkpoint(out, "ckpt")["step"] == 60
    kept = set(os.listdir(os.path.join(out, "shards")))
    assert len(kept) == 3 and "ckpt-70" not in kept


def test_shards_stay_while_a_checkpoint_cannot_be_read(tmp_path, monkeypatch):
    _, out = run(tmp_path)
    train.main([f"--resume={out}", "--export_checkpoint=shards"])
    os.makedirs(os.path.join(out, "shards", "ckpt-70"))
    before, read = sorted(os.listdir(os.path.join(out, "shards"))), checkpoint.read_checkpoint

    def stale(folder, name):
        if name == "ckpt_prev":
            raise OSError(errno.ESTALE, "stale file handle")
        return read(folder, name)

    monkeypatch.setattr(checkpoint, "read_checkpoint", stale)
    checkpoint.remove_old_shards(out)
    assert sorted(os.listdir(os.path.join(out, "shards"))) == before
    monkeypatch.undo()
    checkpoint.remove_old_shards(out)
    assert sorted(os.listdir(os.path.join(out, "shards"))) == [name for name in before if name != "ckpt-70"]


def test_what_json_cannot_say_is_null(tmp_path):
    log = checkpoint.JsonlLog(str(tmp_path), 0)
    log.write(kind="eval", step=1, loss=math.nan, by_slice={"hops": {1: {"loss": math.inf, "right": 2}}})
    assert json.loads((tmp_path / "log.jsonl").read_text())["by_slice"] == {"hops": {"1": {"loss": None, "right": 2}}}


@pytest.mark.parametrize("model", ["gpt", "delta", "gated_delta"])
def test_with_a_checkpoint_set_aside_a_run_does_not_begin_again(tmp_path, model):
    """As after falling back once and being killed before the next save: ckpt.pt is gone, ckpt_prev.pt is whole."""
    _, out = run(tmp_path, model=model)
    before, whole = checkpoint.read_log(out), contents(out)
    os.replace(os.path.join(out, "ckpt.pt"), os.path.join(out, "ckpt.pt.damaged"))
    assert run(tmp_path, resume=True)[0] == 0
    kept = [r for r in before if r["step"] < 40]
    assert checkpoint.read_log(out)[: len(kept)] == kept  # their times too: these steps were not run again
    assert_same(contents(out), whole)
    for name in ("ckpt.pt", "ckpt_prev.pt"):
        os.remove(os.path.join(out, name))
    with pytest.raises(ConfigError, match="no checkpoint that can be read"):
        run(tmp_path, resume=True)


def test_two_processes_never_write_one_run(tmp_path, capsys, monkeypatch):
    process = start(tmp_path, "run", max_steps=100000)
    out = os.path.join(tmp_path, "run")
    wait_for_step(out, 20, process)
    with pytest.raises(ConfigError, match="another process is writing this run"):
        run(tmp_path, resume=True)
    process.kill()
    process.communicate()
    assert run(tmp_path, resume=True, max_steps=40)[0] == 0  # killed, it holds the directory no longer

    def no_locks(*arguments):
        raise OSError("not supported")

    monkeypatch.setattr(checkpoint.fcntl, "flock", no_locks)
    assert run(tmp_path, resume=True, max_steps=60)[0] == 0 and "cannot be locked" in capsys.readouterr().err


def test_without_locks_everything_runs(tmp_path, monkeypatch, capsys):
    """As on Windows, which has no fcntl and opens no directories."""
    spec = importlib.util.spec_from_file_location("without_fcntl", checkpoint.__file__)
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

    monkeypatch.setattr(checkpoint, "fcntl", None)
    monkeypatch.setattr(os, "open", files_only)
    status, out = run(tmp_path)
    assert status == 0 and run(tmp_path, resume=True, max_steps=80)[0] == 0
    assert "cannot be locked here" in capsys.readouterr().err
    with checkpoint.atomic_directory(str(tmp_path / "made")) as work:
        checkpoint.write_json(os.path.join(work, "a.json"), 1)
    assert os.listdir(tmp_path / "made") == ["a.json"]


def in_child(work):
    """Run work() in a forked process -> its number, for status_of."""
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


def status_of(pid):
    """Wait for a child -> its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_two_writers_of_one_file_and_a_reader_do_not_disturb_each_other(tmp_path):
    path, rows = str(tmp_path / "x.json"), 2000
    checkpoint.write_json(path, [0] * rows)

    def write(number):
        def work():
            for _ in range(60):
                checkpoint.write_json(path, [number] * rows)

        return work

    writers = [in_child(write(n)) for n in (1, 2)]
    looks, ended = 0, (0, 0)
    while ended == (0, 0):
        found = checkpoint.read_json(path)
        assert len(found) == rows and len(set(found)) == 1
        looks += 1
        ended = os.waitpid(writers[0], os.WNOHANG)
    assert looks > 20 and ended[1] == 0 and status_of(writers[1]) == 0
    assert os.listdir(tmp_path) == ["x.json"]


def test_the_temporary_file_of_a_dead_writer_goes_that_of_a_living_one_stays(tmp_path):
    path = str(tmp_path / "x [1].json")

    def die(f):
        f.write(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)

    def meanwhile(f):
        f.write(b"1")
        checkpoint.write_json(path, 2)
        assert len(os.listdir(tmp_path)) == 2  # the other file, and this one

    assert status_of(in_child(lambda: checkpoint.atomic_write(path, die))) == -signal.SIGKILL
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".x [1].json.tmp-")
    checkpoint.atomic_write(path, meanwhile)
    assert os.listdir(tmp_path) == ["x [1].json"] and checkpoint.read_json(path) == 1
    # Of a file that nobody writes again, the next process that holds the directory deletes it.
    assert status_of(in_child(lambda: checkpoint.atomic_write(path, die))) == -signal.SIGKILL
    checkpoint.unlock(checkpoint.lock_run_dir(str(tmp_path)))
    assert os.listdir(tmp_path) == ["x [1].json"]


def test_a_new_file_can_be_read_by_those_who_could_read_the_old_one(tmp_path):
    before = os.umask(0o022)
    checkpoint.write_json(str(tmp_path / "x.json"), 1)
    os.umask(before)
    assert (tmp_path / "x.json").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGKILL])
def test_a_data_set_that_was_stopped_leaves_nothing(tmp_path, number):
    target, own = str(tmp_path / "set"), tmp_path / "set.partial-mine"
    own.mkdir()  # a user's, whatever its name

    def stopped():
        with checkpoint.atomic_directory(target) as work:
            checkpoint.write_json(os.path.join(work, "a.json"), 1)
            os.kill(os.getpid(), number)
            time.sleep(10)

    def heed():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        stopped()

    status = status_of(in_child(heed))
    left = [name for name in os.listdir(tmp_path) if name != own.name]
    if number == signal.SIGKILL:
        assert status == -number and len(left) == 1
    else:
        assert status == 128 + number and not left
    with checkpoint.atomic_directory(target) as work:
        with checkpoint.atomic_directory(str(tmp_path / "other")):
            pass
        with pytest.raises(ConfigError, match="stop"), checkpoint.atomic_directory(target) as second:
            assert os.path.isdir(work) and second != work
            raise OSError("stop")
    assert sorted(os.listdir(tmp_path)) == ["other", "set", own.name]


def test_without_hard_links_the_older_checkpoint_is_a_copy(tmp_path, monkeypatch):
    def no_links(*paths):
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", no_links)
    for step in (1, 2, 3):
        checkpoint.save_checkpoint(tmp_path, "ckpt", {"step": step})
    assert [checkpoint.load_checkpoint(tmp_path, name)["step"] for name in ("ckpt", "ckpt_prev")] == [3, 2]
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

    places = {"open": (builtins, "open"), "save": (torch, "save"), "link": (shutil, "copyfileobj")}
    monkeypatch.setattr(*places.get(at, (os, at)), full if at == "save" else refuse)
    if at == "link":
        monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(RunError, match=r"cannot write .*ckpt(_prev)?\.pt: (No space|Read-only)"):
        checkpoint.save_checkpoint(tmp_path, "ckpt", {"step": 3})
    monkeypatch.undo()
    assert checkpoint.load_checkpoint(tmp_path, "ckpt")["step"] == 2
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "ckpt_prev.pt"]


@pytest.mark.parametrize("how", ["one process", "ddp", "fsdp"])
def test_a_full_disk_ends_a_run_with_a_sentence_and_loses_nothing(on_ranks, tmp_path, capfd, how):
    size, parallel = (1, "ddp") if how == "one process" else (2, how)
    words = flags(tmp_path, "run", parallel=parallel, max_steps=20)
    assert on_ranks(size, lambda rank: train.main(words)) == [0] * size
    out, largest = str(tmp_path / "run"), 60000 if how != "fsdp" else 20000
    before = checkpoint.load_checkpoint(out, "ckpt")
    capfd.readouterr()

    def on_a_small_disk(rank):
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))  # files end there, as on a full disk
        try:
            return train.main([f"--resume={out}", "--max_steps=40"])
        except RunError as e:  # while the error is at hand the DDP model is gone: distributed.shutdown
            assert e.__traceback__ and not any(isinstance(o, DistributedDataParallel) for o in gc.get_objects())
            raise

    assert on_ranks(size, on_a_small_disk) == [1] * size
    error = capfd.readouterr().err
    assert error.count("cannot write") == 1 and "File too large" in error and "Traceback" not in error
    assert checkpoint.read_json(f"{out}/status.json")["status"] == "failed"
    assert not [name for name in os.listdir(out) if ".tmp-" in name or name.endswith(".damaged")]
    assert_same(checkpoint.load_checkpoint(out, "ckpt"), before)
    assert on_ranks(size, lambda rank: train.main([f"--resume={out}", "--max_steps=40"])) == [0] * size
    assert checkpoint.load_checkpoint(out, "ckpt")["step"] == 40


# ---- the queue of a cluster --------------------------------------------------------------------------------------------


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Commands by the names of SLURM's on PATH: sbatch runs the script's body here, srun its command, scontrol takes notes."""
    scripts = {
        "sbatch": 'script="$1"; shift; exec bash "$script" "$@"',
        "srun": 'exec "$@"',
        "scontrol": f'if [ "$1" = show ]; then echo localhost; else echo "$@" >> {tmp_path}/asked; fi',
    }
    (tmp_path / "bin").mkdir()
    for name, body in scripts.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    here, python = os.path.dirname(train.__file__), os.path.dirname(sys.executable)
    job = random.Random(time.time_ns()).randrange(10**6)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{python}:{os.environ['PATH']}")
    names = dict(SLURM_JOB_NAME="t", SLURM_JOB_ID=str(job), SLURM_JOB_NODELIST="localhost", SLURM_JOB_NUM_NODES="1", RANKS="2")
    for name, value in {**names, "SLURM_SUBMIT_DIR": str(tmp_path / "repo")}.items():
        monkeypatch.setenv(name, value)
    shutil.copytree(here, tmp_path / "repo", ignore=shutil.ignore_patterns("runs", ".git", "tests", ".venv", "__pycache__"))
    return str(tmp_path / "repo" / "runs" / f"t-{job}"), tmp_path / "asked", job


def test_the_slurm_script_stops_in_time_queues_again_and_goes_on(tmp_path, slurm):
    out, asked, job = slurm
    assert subprocess.run(["bash", "-n", "train.slurm"], cwd=tmp_path / "repo").returncode == 0
    words = [w for w in flags("", None, max_steps=600, eval_interval=600, log_interval=1) if "log_dir" not in w]
    command = ["sbatch", "train.slurm", *words]
    process = subprocess.Popen(command, cwd=tmp_path / "repo", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for_step(out, 5, process)
    (torchrun,) = [p for p in descendants(process.pid) if "torchrun" in open(f"/proc/{p}/cmdline").read()]
    for pid in [torchrun, *descendants(torchrun)]:  # SLURM signals every process of the step
        os.kill(pid, signal.SIGTERM)
    text = process.communicate()[0]
    assert process.returncode == 0, text
    assert asked.read_text() == f"requeue {job}\n"
    step = checkpoint.read_json(f"{out}/status.json")["step"]
    assert checkpoint.read_json(f"{out}/status.json")["status"] == "preempted" and 5 <= step < 600
    done = subprocess.run(command, cwd=tmp_path / "repo", capture_output=True, text=True)
    assert done.returncode == 0 and "32 = 2 ranks x 1 micro x 16 rows" in done.stdout, done.stderr
    assert "started again by torchrun" not in done.stdout  # it knew at once where to go on
    assert asked.read_text() == f"requeue {job}\n"  # once
    assert checkpoint.read_json(f"{out}/status.json")["status"] == "finished"
    assert checkpoint.read_json(f"{out}/config.json")["resumed"][0]["step"] == step


def descendants(pid):
    found = []
    with open(f"/proc/{pid}/task/{pid}/children") as f:
        for child in f.read().split():
            found += [int(child), *descendants(child)]
    return found
