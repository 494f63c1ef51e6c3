"""Many ranks against one: the same batch, the same weights, the same evaluation, checkpoints that fit any number of ranks."""

import json
import math
import os
import shutil
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributed.fsdp import FSDPModule

import train
from nanorecall import checkpoint, distributed, metrics
from nanorecall.build import build_model, build_model_config
from nanorecall.run import load_settings
from nanorecall.settings import ConfigError
from toys import assert_same, contents, counts, flags, run, torchrun, wait_for_step

pytestmark = pytest.mark.slow  # ranks are started again and again

SHORT = dict(max_steps=20, eval_interval=10, log_interval=1, lr=1e-3)


def train_on(on_ranks, size, folder, name, **changes):
    """A toy run on forked ranks -> its directory."""
    words = flags(folder, name, **{**SHORT, **changes})
    assert on_ranks(size, lambda rank: train.main(words)) == [0] * size
    return os.path.join(folder, name)


def resume_on(on_ranks, size, out, **changes):
    words = [f"--resume={out}", *(f"--{k}={v}" for k, v in changes.items())]
    assert on_ranks(size, lambda rank: train.main(words)) == [0] * size
    return out


def tensors(out, name="ckpt"):
    return checkpoint.load_checkpoint(out, name)["tensors"]


def sizes(model):
    return dict(model=model, **(dict(dk=None, dv=None, du=16) if model == "unified_kv" else {}))


def assert_close(a, b, limit=1e-6):
    assert a.keys() == b.keys()
    assert max((a[k] - b[k]).abs().max().item() for k in a if not k.endswith(".step")) <= limit


# ---- the same numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["gpt", "unified_kv", "delta"])
def test_two_ranks_with_a_micro_batch_each_equal_one_rank_with_two_bit_for_bit(on_ranks, tmp_path, model):
    changes = dict(**sizes(model), curriculum="[(2,5)]", lr=1e-2, weight_decay=0.1, clip_grad=0.5)
    _, one = run(tmp_path, "one", grad_accum_steps=2, **{**SHORT, **changes})
    two = train_on(on_ranks, 2, tmp_path, "two", **changes)
    assert_same(*(contents(out)[0] for out in (one, two)))
    norms = [[r["grad_norm"] for r in contents(out)[1] if r["kind"] == "train"] for out in (one, two)]
    assert norms[0] == norms[1] and max(norms[0]) > 0.5 and len(norms[0]) == 20
    status = [checkpoint.read_json(os.path.join(out, "status.json")) for out in (one, two)]
    assert status[0]["test"] == status[1]["test"]


@pytest.mark.parametrize("model", ["gpt", "delta"])
def test_any_split_of_the_batch_gives_the_same_weights(on_ranks, tmp_path, model):
    _, one = run(tmp_path, "one", model=model, **SHORT)
    for size, grad_accum_steps in ((1, 4), (2, 4), (4, 2)):
        out = train_on(on_ranks, size, tmp_path, f"r{size}", model=model, grad_accum_steps=grad_accum_steps)
        assert_close(tensors(out), tensors(one))


@pytest.mark.parametrize("model", ["gpt", "unified_kv", "delta"])
def test_fsdp_equals_ddp(on_ranks, tmp_path, model):
    changes = dict(**sizes(model), grad_accum_steps=2, weight_decay=0.1, tie_weights=1, clip_grad=0.5)
    ddp, fsdp = (train_on(on_ranks, 2, tmp_path, how, parallel=how, **changes) for how in ("ddp", "fsdp"))
    assert_close(tensors(ddp), tensors(fsdp))
    assert_close(tensors(ddp, "best"), tensors(fsdp, "best"))
    a, b = ([r["grad_norm"] for r in contents(out)[1] if r["kind"] == "train"] for out in (ddp, fsdp))
    assert a == pytest.approx(b, rel=1e-4) and len(a) == 20
    assert len([f for f in os.listdir(os.path.join(fsdp, "shards", "ckpt-20")) if f.endswith(".distcp")]) == 2
    a, b = (metrics.evaluate(m, d, "test", 7, torch.device("cpu")) for _, d, m, _ in map(train.load_run, (ddp, fsdp)))
    assert counts(a) == counts(b) and a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_labels_count_alike_wherever_they_are(on_ranks, tmp_path, monkeypatch):
    """Row r has r labels, so ranks and parts differ in theirs, and the first part has none at all."""
    batch = train.parse([]).data_module.InMemoryMQAR.batch

    def uneven(self, split, step, rows):
        tokens, targets, tags = batch(self, split, step, rows)
        if split == "train":
            keep = torch.arange(targets.shape[1])[None] >= 16 - torch.as_tensor(np.asarray(rows) % 32 // 4)[:, None]
            targets = torch.where(keep, targets, -100)
        return tokens, targets, tags

    monkeypatch.setattr(train.parse([]).data_module.InMemoryMQAR, "batch", uneven)
    _, one = run(tmp_path, "one", **SHORT)
    assert_close(tensors(train_on(on_ranks, 2, tmp_path, "two", grad_accum_steps=8)), tensors(one), 5e-6)
    assert_close(tensors(train_on(on_ranks, 2, tmp_path, "sharded", grad_accum_steps=8, parallel="fsdp")), tensors(one), 5e-6)
    losses = [[r["loss"] for r in checkpoint.read_log(str(tmp_path / name)) if r["kind"] == "train"] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_rank_without_rows_keeps_step(on_ranks, tmp_path):
    """Rows of 64 tokens in a batch of 4 times 16 tokens: one row for four parts."""
    cells = dict(train_sizes="[(64,4)]", test_sizes="[(16,4)]", batch_size=4, num_kv_pairs=None)
    _, one = run(tmp_path, "one", **{**SHORT, **cells})
    for how in ("ddp", "fsdp"):
        assert_close(tensors(train_on(on_ranks, 2, tmp_path, how, parallel=how, grad_accum_steps=2, **cells)), tensors(one))


DROPOUT = """
from model import *

class Sure(GPT):
    def __init__(self, config, dropout=0.0):
        super().__init__(config)
        self.embed.weight.requires_grad_(False)
        self.embed.register_forward_hook(lambda module, i, x: F.dropout(x, dropout, self.training))

class Mine(Sure):
    def __init__(self, config):
        super().__init__(config, dropout=0.1)
"""


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_dropout_and_frozen_weights(on_ranks, tmp_path, monkeypatch, how):
    """What is random in a step depends on where in the batch it is, not on who computes it or what came before."""
    file = f"dropout_{how}"  # a name of its own: this process imports both
    (tmp_path / f"{file}.py").write_text(DROPOUT)
    monkeypatch.chdir(tmp_path)
    changes = dict(model=f"{file}.Mine", grad_accum_steps=2, parallel=how)
    _, one = run(tmp_path, "one", **{**SHORT, **changes, "grad_accum_steps": 4})
    two = train_on(on_ranks, 2, tmp_path, "two", **changes)
    assert_close(tensors(two), tensors(one))
    p = load_settings(one, train.TrainConfig)
    initial = build_model(p, build_model_config(p, p.data_module.Data(p.data)))
    assert torch.equal(tensors(two)["model.embed.weight"], initial.embed.weight)
    assert not torch.equal(tensors(two)["model.lm_head.weight"], initial.lm_head.weight)
    assert not any(name.startswith("optimizer.embed.") for name in tensors(two))
    train_on(on_ranks, 2, tmp_path, "parts", **changes, lr_schedule="constant", max_steps=10)
    parts = resume_on(on_ranks, 2, os.path.join(tmp_path, "parts"), max_steps=20)
    assert_same(tensors(parts), tensors(train_on(on_ranks, 2, tmp_path, "whole", **changes, lr_schedule="constant")))
    sure = {**SHORT, **changes, "model": f"{file}.Sure"}
    without = tensors(run(tmp_path, "sure", **sure)[1])
    assert not torch.equal(without["model.lm_head.weight"], tensors(one)["model.lm_head.weight"])


def test_each_part_of_each_step_has_a_seed_of_its_own(tmp_path, monkeypatch):
    seed, seeds = torch.manual_seed, []
    monkeypatch.setattr(torch, "manual_seed", lambda n: seeds.append(n) or seed(n))
    run(tmp_path, "run", grad_accum_steps=4, **SHORT)
    assert len(seeds) == len(set(seeds)) == 1 + 20 * 4  # the first one is of the weights


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_gradients_are_exchanged_once_a_step(on_ranks, tmp_path, monkeypatch, how):
    """However many parts the step has."""
    calls, orders = [], []
    reduce, order = torch.distributed.all_reduce, FSDPModule.set_requires_gradient_sync
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *args, **kwargs: calls.append(1) or reduce(*args, **kwargs))
    monkeypatch.setattr(FSDPModule, "set_requires_gradient_sync", lambda m, now: orders.append(now) or order(m, now))

    def work(rank):
        assert train.main(flags(tmp_path, how, parallel=how, grad_accum_steps=4, **SHORT)) == 0
        return 0 if (len(calls) == 20 if how == "ddp" else orders == [False, False, False, True] * 20) else 98

    assert on_ranks(2, work) == [0, 0]


@pytest.mark.parametrize("labels", [0, 1])
def test_a_batch_of_few_labels(labels):
    p = train.parse([])
    model = p.model_class(p.model_module.Config(vocab_size=32, seq_len=16))
    targets = torch.full((2, 16), -100)
    targets[0, :labels] = 3
    logits, loss = model(torch.zeros(2, 16, dtype=torch.long), targets)
    loss.backward()
    assert logits.shape == (labels, 32) and torch.isfinite(loss) and (loss > 0) == labels
    assert all(torch.isfinite(q.grad).all() for q in model.parameters() if q.grad is not None)


def test_evaluation_is_shared_out_and_adds_up(on_ranks, tmp_path):
    """7 batches on 3 ranks: the sums are those of one process, in its order."""
    _, out = run(tmp_path, "run", **SHORT)
    _, data, model, _ = train.load_run(out)
    whole = metrics.evaluate(model, data, "test", 8, torch.device("cpu"))

    def work(rank):
        with distributed.process_group() as world:
            seen = []
            batch = data.batch
            data.batch = lambda split, step, rows: seen.append(list(rows)) or batch(split, step, rows)
            got = metrics.evaluate(model, data, "test", 8, torch.device("cpu"), world=world)
            return 0 if got == whole and len(seen) == 3 else 98

    assert on_ranks(3, work) == [0, 0, 0]


# ---- checkpoints and ranks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("size", [1, 2])
def test_resume_is_bit_exact(on_ranks, tmp_path, size, how):
    whole = train_on(on_ranks, size, tmp_path, "whole", parallel=how)
    out = train_on(on_ranks, size, tmp_path, "parts", parallel=how, stop_accuracy=1e-9)
    assert checkpoint.load_checkpoint(out, "ckpt")["step"] == 10
    resume_on(on_ranks, size, out, stop_accuracy=0)
    (a, rows), (b, rows_too) = contents(out), contents(whole)
    a.pop("shards", None), b.pop("shards", None)
    assert_same((a, rows), (b, rows_too))


def test_one_rank_then_two_then_one_see_the_same_rows(on_ranks, tmp_path, monkeypatch):
    module = train.parse([]).data_module
    batch, seen = module.InMemoryMQAR.batch, tmp_path / "seen"

    def noted(self, split, step, rows):
        if split == "train":
            with open(seen, "a") as f:
                f.write(json.dumps([step, [int(r) for r in rows]]) + "\n")
        return batch(self, split, step, rows)

    monkeypatch.setattr(module.InMemoryMQAR, "batch", noted)

    def rows_by_step():
        found = {}
        for line in open(seen):
            step, rows = json.loads(line)
            found[step] = sorted(found.get(step, []) + rows)
        seen.unlink()
        return found

    _, whole = run(tmp_path, "whole", **SHORT)
    expected = rows_by_step()
    for how in ("ddp", "fsdp"):
        _, out = run(tmp_path, how, parallel=how, **{**SHORT, "max_steps": 6})
        resume_on(on_ranks, 2, out, max_steps=13)
        assert run(tmp_path, how, resume=True, max_steps=20)[0] == 0
        assert rows_by_step() == expected and sorted(expected) == list(range(20))


def test_shards_of_two_ranks_load_on_one_and_three(on_ranks, tmp_path):
    out = train_on(on_ranks, 2, tmp_path, "two", parallel="fsdp", batch_size=24)
    saved = tensors(out)
    p, data, model, _ = train.load_run(out, "ckpt")

    def work(rank):
        with distributed.process_group() as world:
            copy = build_model(p, build_model_config(p, data))
            for q in copy.parameters():
                q.data.zero_()
            distributed.wrap_model(copy, "fsdp", torch.device("cpu"))
            optimizer = torch.optim.AdamW(copy.parameters(), fused=True)
            state = checkpoint.read_checkpoint(out, checkpoint.first_valid_checkpoint(out, "ckpt"))
            distributed.load_training_state(out, state, copy, optimizer)
            got = {k: distributed.full_tensor(t) for k, t in distributed.training_state(copy, optimizer).items()}
            assert_same(got, saved)
            # and the other way: a share of one file
            state = {"tensors": saved}
            for q in copy.parameters():
                q.data.zero_()
            distributed.load_training_state(out, state, copy, optimizer)
            assert_same({k: distributed.full_tensor(t) for k, t in distributed.training_state(copy, optimizer).items()}, saved)
            return 0 if world.size == size else 98

    for size in (1, 3):
        assert on_ranks(size, work) == [0] * size
    for name in ("three", "one"):
        shutil.copytree(out, tmp_path / name)
    resume_on(on_ranks, 3, str(tmp_path / "three"), max_steps=30)
    assert run(tmp_path, "one", resume=True, max_steps=30)[0] == 0
    assert_close(tensors(str(tmp_path / "three")), tensors(str(tmp_path / "one")))


def test_export_there_and_back(on_ranks, tmp_path, capsys):
    out = train_on(on_ranks, 2, tmp_path, "run", parallel="fsdp")
    saved = tensors(out), tensors(out, "best")
    steps = [checkpoint.load_checkpoint(out, name)["step"] for name in ("ckpt", "ckpt_prev")]
    for form in ("file", "shards", "file"):
        assert train.main([f"--resume={out}", f"--export_checkpoint={form}"]) == 0
        assert os.path.isdir(os.path.join(out, "shards")) == (form == "shards")
        assert_same((tensors(out), tensors(out, "best")), saved)
        assert [checkpoint.load_checkpoint(out, name)["step"] for name in ("ckpt", "ckpt_prev")] == steps
    plain = torch.load(os.path.join(out, "ckpt.pt"), weights_only=True)  # what others read
    assert_same(plain["tensors"], saved[0])
    with pytest.raises(ConfigError, match="name it with --resume"):
        train.main(["--export_checkpoint=file"])


# ---- mistakes ----------------------------------------------------------------------------------------------------------


def test_a_batch_that_does_not_divide_is_refused_in_one_sentence(on_ranks, tmp_path, capfd):
    words = flags(tmp_path, "run", batch_size=64, grad_accum_steps=3)
    assert on_ranks(2, lambda rank: train.main(words)) == [2, 2]
    error = capfd.readouterr().err
    assert error.count("batch_size=64 does not divide into 2 ranks x 3 micro-batches; a multiple of 6 does") == 1
    assert "Traceback" not in error and not os.listdir(tmp_path)
    world = SimpleNamespace(size=2)
    assert distributed.describe_batch(64, world, 4) == "batch: 64 = 2 ranks x 4 micro x 8 rows"


def test_a_mistake_that_only_the_first_rank_notices_stops_all(on_ranks, tmp_path, capfd):
    words = flags(tmp_path, "run", **SHORT)
    os.makedirs(tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("a directory of the user's own")
    assert on_ranks(2, lambda rank: train.main(words)) == [2, 2]
    assert capfd.readouterr().err.count("exists; continue it with --resume") == 1


def test_a_mistake_on_one_rank_stops_all(on_ranks, capfd):
    def work(rank):
        def fail():
            if rank == 1:
                raise ConfigError("rank 1 has no such thing", "device")

        with distributed.process_group() as world:
            with world.agree():
                fail()

    assert on_ranks(2, work) == [2, 2]
    assert capfd.readouterr().err.count("rank 1 has no such thing") == 1


def test_devices_of_ranks():
    world = distributed.World(rank=1, size=2, local_rank=1)
    with pytest.raises(ConfigError, match="all 2 ranks on one GPU"):
        distributed.autodetect_device(train.TrainConfig(device="cuda:0"), world)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="'cuda:1' cannot be used"):
            distributed.autodetect_device(train.TrainConfig(device="cuda"), world)
    device, _, line = distributed.autodetect_device(train.TrainConfig(device="cpu"), world)
    assert device.type == "cpu" and line.startswith("ranks: 2")


def test_torchrun_leaves_our_flags_alone():
    """Before Python 3.12.3 its parser refuses, even behind the script's name, what begins two of its own flags (--run would);
    `--` before the script's name helps."""
    from torch.distributed.run import get_args_parser

    p = train.parse([])
    names = [f for c in (train.TrainConfig, p.model_module.Config, p.data_module.Config) for f in c.__dataclass_fields__]
    for name in names:
        dashes = ["--"] if name == "du" else []
        args = get_args_parser().parse_args(["--nproc_per_node=2", *dashes, "train.py", f"--{name}", "1"])
        assert args.training_script == "train.py" and args.training_script_args == [f"--{name}", "1"]


# ---- torchrun ----------------------------------------------------------------------------------------------------------


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as f:
        return [int(p) for p in f.read().split()]


def test_sigterm_to_torchrun_stops_both_ranks_on_one_step(on_ranks, tmp_path):
    changes = {**SHORT, "max_steps": 300, "eval_interval": 150, "grad_accum_steps": 1}
    process, out = torchrun(2, *flags(tmp_path, "stopped", **changes)), str(tmp_path / "stopped")
    wait_for_step(out, 7, process)
    process.send_signal(signal.SIGTERM)
    text, error = process.communicate()
    assert process.returncode != 0 and f"--resume {out}" in text
    status = checkpoint.read_json(os.path.join(out, "status.json"))
    assert status["status"] == "preempted" and 7 <= status["step"] < 150
    assert checkpoint.load_checkpoint(out, "ckpt")["step"] == status["step"]
    resume_on(on_ranks, 2, out)
    whole = train_on(on_ranks, 2, tmp_path, "whole", **changes)
    assert_same(contents(out), contents(whole))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_all_on_one_step(on_ranks, tmp_path, rank):
    words = flags(tmp_path, "run", **{**SHORT, "max_steps": 5000, "eval_interval": 2500})
    data = train.parse([]).data_module.InMemoryMQAR
    batch = data.batch

    def work(me):
        def kill_in_step_9(self, split, step, rows):
            if me == rank and step == 9:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)  # from the system, and again from torchrun
            return batch(self, split, step, rows)

        data.batch = kill_in_step_9
        return train.main(words)

    try:
        assert on_ranks(2, work) == [128 + signal.SIGTERM] * 2
    finally:
        data.batch = batch
    status = checkpoint.read_json(tmp_path / "run" / "status.json")
    assert status["status"] == "preempted" and status["step"] == 10


def test_a_killed_rank_brings_the_job_down_and_restarted_it_ends_the_same(on_ranks, tmp_path):
    changes = {**SHORT, "max_steps": 200, "eval_interval": 50, "save_interval": 10}
    words = flags(tmp_path, None, **changes)  # torchrun repeats them, and they do not name the run
    process = torchrun(2, *words, max_restarts=1)
    out = None
    while process.poll() is None and not out:
        out = next((str(tmp_path / d) for d in os.listdir(tmp_path) if os.path.exists(tmp_path / d / "log.jsonl")), None)
        time.sleep(0.01)
    wait_for_step(out, 30, process)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    text, error = process.communicate()
    assert process.returncode == 0, error
    assert f"started again by torchrun: going on with {out}" in text and os.listdir(tmp_path) == [os.path.basename(out)]
    assert checkpoint.read_json(os.path.join(out, "config.json"))["resumed"][0]["step"] >= 20
    whole = train_on(on_ranks, 2, tmp_path, "whole", **changes)
    assert_same(contents(out), contents(whole))


def test_a_rank_that_dies_takes_the_others_with_it(on_ranks, tmp_path, capfd):
    data = train.parse([]).data_module.InMemoryMQAR
    batch = data.batch

    def work(rank):
        def die_in_step_5(self, split, step, rows):
            if rank == 1 and step == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return batch(self, split, step, rows)

        data.batch = die_in_step_5
        return train.main(flags(tmp_path, "run", **SHORT))

    began = time.time()
    assert on_ranks(2, work) == [1, -signal.SIGKILL] and time.time() - began < 30
    assert "another rank has ended" in capfd.readouterr().err
    assert checkpoint.read_json(tmp_path / "run" / "status.json")["status"] == "failed"


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_on_all(on_ranks, tmp_path, how, bad):
    data = train.parse([]).data_module.InMemoryMQAR
    batch = data.batch
    bad_steps = {"finished": (2, 4), "failed": (2, 4, 5, 6)}
    for outcome, steps in bad_steps.items():

        def work(rank, steps=steps, outcome=outcome):
            loss = torch.Tensor.backward

            def spoil(self, *args, **kwargs):
                loss(self * bad if rank == 1 and now[0] in steps else self, *args, **kwargs)

            def note(self, split, step, rows):
                now[0] = step
                return batch(self, split, step, rows)

            now = [0]
            data.batch, torch.Tensor.backward = note, spoil
            return train.main(flags(tmp_path, outcome, parallel=how, max_skipped_steps=3, **{**SHORT, "max_steps": 10}))

        assert on_ranks(2, work) == [int(outcome == "failed")] * 2
        assert checkpoint.read_json(tmp_path / outcome / "status.json")["status"] == outcome
        skipped = [r["step"] - 1 for r in checkpoint.read_log(str(tmp_path / outcome)) if r.get("skipped")]
        assert skipped == list(steps)
    assert all(torch.isfinite(t).all() for t in tensors(str(tmp_path / "finished")).values())


def test_two_jobs_never_write_one_run(on_ranks, tmp_path, capfd):
    out = train_on(on_ranks, 2, tmp_path, "run")
    held = checkpoint.lock_run_dir(out)
    assert on_ranks(2, lambda rank: train.main([f"--resume={out}", "--max_steps=30"])) == [2, 2]
    assert capfd.readouterr().err.count("another process is writing this run") == 1
    os.close(held)
    resume_on(on_ranks, 2, out, max_steps=30)
