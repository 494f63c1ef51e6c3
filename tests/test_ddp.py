"""Many ranks against one: the same batch, weights and evaluation, and checkpoints that fit all.

What is equal to what after 20 steps, and how exactly (micro-batches are those of each rank):

    ranks  micro-batches  parallel  equal to                       to within
    2      1              ddp       1 rank, 2 micro-batches        0: each bit, all else too
    1      4              ddp       1 rank, 1 micro-batch          1e-6 in each weight
    2      4              ddp       1 rank, 1 micro-batch          1e-6
    4      2              ddp       1 rank, 1 micro-batch          1e-6
    2      2              fsdp      2 ranks, 2 micro-batches, ddp  1e-6
    2      8              both      1 rank, 1 micro-batch          5e-6 with labels spread unevenly
    2      2              both      1 rank, 1 micro-batch          1e-6 with ranks that have no rows

A run that is resumed at 1 rank or at 2 is equal to one without an interruption, to the bit.
"""

import json
import math
import os
import shutil
import signal
import time
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

import nanorecall.run as run_module
import train
from nanorecall import checkpoint, distributed, metrics
from nanorecall.build import MODELS, build_data, build_model, build_model_config
from nanorecall.files import lock_run_dir
from nanorecall.records import read_json, read_log
from nanorecall.rng import IGNORE_INDEX
from nanorecall.saved_run import load_settings
from nanorecall.settings import ConfigError, RunError
from nanorecall.training_checkpoint import load_training_state, training_state
from toys import (
    TOY,
    as_flags,
    assert_same,
    contents,
    counts,
    flags,
    run,
    spread_labels_unevenly,
    status_of,
    torchrun,
    wait_for_step,
)

# Ranks are started again and again. That they draw curves.png is tested in test_endings.py.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("undrawn")]

SHORT = dict(max_steps=20, eval_interval=10, log_interval=1, lr=1e-3)
InMemoryMQAR = train.parse([]).data_module.InMemoryMQAR


def train_on(on_ranks, size, folder, name, **changes):
    """A toy run on forked ranks -> its directory."""
    args = flags(folder, name, **{**SHORT, **changes})
    assert on_ranks(size, lambda rank: train.main(args)) == [0] * size
    return os.path.join(folder, name)


def resume_on(on_ranks, size, out, **changes):
    args = [f"--resume={out}", *as_flags(changes)]
    assert on_ranks(size, lambda rank: train.main(args)) == [0] * size
    return out


def tensors(out, name="ckpt"):
    return checkpoint.load_checkpoint(out, name)["tensors"]


def train_log(out, column):
    """A column of the log, for every step of training."""
    return [row[column] for row in read_log(str(out)) if row["kind"] == "train"]


def model_flags(model):
    if model == "unified_kv":
        return dict(model=model, dk=None, dv=None, du=16)
    if model == "hybrid":
        blocks = "['delta dk=16 dv=16', 'gpt dk=16 dv=16 window=5']"
        return dict(model=model, dk=None, dv=None, conv_size=None, blocks=blocks)
    return dict(model=model)


def assert_close(a, b, limit=1e-6):
    assert a.keys() == b.keys()
    for name in a:
        if not name.endswith(".step"):
            assert (a[name] - b[name]).abs().max().item() <= limit, name


# ---- the same numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["gpt", "unified_kv", "delta"])
def test_two_ranks_with_a_micro_batch_each_equal_one_rank_with_two_bit_for_bit(
    on_ranks, tmp_path, model
):
    changes = dict(curriculum="[(2,5)]", lr=1e-2, weight_decay=0.1, clip_grad=0.5)
    changes |= model_flags(model)
    _, one = run(tmp_path, "one", grad_accum_steps=2, **{**SHORT, **changes})
    two = train_on(on_ranks, 2, tmp_path, "two", **changes)
    assert_same(contents(one)[0], contents(two)[0])
    norms = train_log(one, "grad_norm")
    assert len(norms) == 20 and max(norms) > 0.5 and norms == train_log(two, "grad_norm")
    assert status_of(one)["test"] == status_of(two)["test"]


@pytest.mark.parametrize("model", ["gpt", "delta"])
@pytest.mark.parametrize("size, micro_batches", [(1, 4), (2, 4), (4, 2)])
def test_any_split_of_the_batch_gives_the_same_weights(
    on_ranks, tmp_path, model, size, micro_batches
):
    _, one = run(tmp_path, "one", model=model, **SHORT)
    changes = dict(model=model, grad_accum_steps=micro_batches)
    many = train_on(on_ranks, size, tmp_path, "many", **changes)
    assert_close(tensors(many), tensors(one))


@pytest.mark.parametrize("model", ["gpt", "unified_kv", "delta", "kda", "ttt_mlp", "hybrid"])
def test_fsdp_equals_ddp(on_ranks, tmp_path, model):
    changes = dict(grad_accum_steps=2, weight_decay=0.1, tie_weights=1, clip_grad=0.5)
    changes |= model_flags(model)
    ddp = train_on(on_ranks, 2, tmp_path, "ddp", parallel="ddp", **changes)
    fsdp = train_on(on_ranks, 2, tmp_path, "fsdp", parallel="fsdp", **changes)
    assert_close(tensors(ddp), tensors(fsdp))
    assert_close(tensors(ddp, "best"), tensors(fsdp, "best"))
    norms = train_log(ddp, "grad_norm")
    assert len(norms) == 20 and norms == pytest.approx(train_log(fsdp, "grad_norm"), rel=1e-4)
    shards = os.listdir(os.path.join(fsdp, "shards", "ckpt-20"))
    assert sum(name.endswith(".distcp") for name in shards) == 2
    results = []
    for out in (ddp, fsdp):
        _, data, trained, _ = train.load_run(out)
        results.append(metrics.evaluate(trained, data, "test", 7, torch.device("cpu")))
    a, b = results
    assert counts(a) == counts(b) and a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_fsdp_gives_every_model_the_gradients_of_one_rank(on_ranks):
    """One start of two ranks for all models: each computes half of the batch."""

    def work(rank):
        with distributed.process_group():
            for name in MODELS:
                p = train.parse(as_flags({**TOY, **model_flags(name)}))
                data = build_data(p)
                whole = build_model(p, build_model_config(p, data))
                sharded = deepcopy(whole)
                distributed.wrap_model(sharded, "fsdp", torch.device("cpu"))
                tokens, targets, _ = data.batch("train", 0, range(8))
                whole(tokens, targets)[1].backward()
                mine = slice(4 * rank, 4 * rank + 4)
                _, loss = sharded(tokens[mine], targets[mine])
                (loss / 2).backward()  # FSDP sums over ranks
                ours = {}
                expected = {}
                for key, parameter in sharded.named_parameters():
                    assert distributed.is_dtensor(parameter), f"{name}: {key}"
                    ours[f"{name}: {key}"] = distributed.full_tensor(parameter.grad)
                for key, parameter in whole.named_parameters():
                    expected[f"{name}: {key}"] = parameter.grad
                assert_close(ours, expected)
        return 0

    assert on_ranks(2, work) == [0, 0]


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_loss_is_a_mean_over_labels_not_over_ranks(on_ranks, tmp_path, monkeypatch, how):
    """Ranks and micro-batches have different numbers of labels; the first micro-batch has none."""
    spread_labels_unevenly(monkeypatch, InMemoryMQAR)
    _, one = run(tmp_path, "one", **SHORT)
    two = train_on(on_ranks, 2, tmp_path, "two", grad_accum_steps=8, parallel=how)
    assert_close(tensors(two), tensors(one), 5e-6)
    assert train_log(one, "loss") == pytest.approx(train_log(two, "loss"), abs=1e-5)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_ranks_with_no_rows_still_take_part(on_ranks, tmp_path, how):
    """A step has 4 times 16 tokens, so one sequence of 64 for two ranks of two micro-batches."""
    sizes = dict(train_sizes="[(64,4)]", test_sizes="[(16,4)]", batch_size=4, num_kv_pairs=None)
    _, one = run(tmp_path, "one", **{**SHORT, **sizes})
    two = train_on(on_ranks, 2, tmp_path, how, parallel=how, grad_accum_steps=2, **sizes)
    assert_close(tensors(two), tensors(one))


DROPOUT = """
from model import *

class NoDropout(GPT):
    def __init__(self, config, dropout=0.0):
        super().__init__(config)
        self.embed.weight.requires_grad_(False)
        self.embed.register_forward_hook(lambda module, i, x: F.dropout(x, dropout, self.training))

class Dropout(NoDropout):
    def __init__(self, config):
        super().__init__(config, dropout=0.1)
"""


@pytest.fixture(params=["ddp", "fsdp"])
def dropout(request, tmp_path, monkeypatch):
    """Flags of a run with dropout and a frozen embedding, under DDP and under FSDP."""
    file = tmp_path.name  # of this test only, since this process imports the files of all
    (tmp_path / f"{file}.py").write_text(DROPOUT)
    monkeypatch.chdir(tmp_path)
    return dict(model=f"{file}.Dropout", parallel=request.param)


def test_dropout_depends_on_the_place_in_the_batch_only(on_ranks, tmp_path, dropout):
    """Not on the rank that computes it. Without dropout the weights are others."""
    _, one = run(tmp_path, "one", **{**SHORT, **dropout}, grad_accum_steps=4)
    two = train_on(on_ranks, 2, tmp_path, "two", **dropout, grad_accum_steps=2)
    assert_close(tensors(two), tensors(one))
    name = dropout["model"].replace(".Dropout", ".NoDropout")
    options = {**SHORT, **dropout, "model": name, "grad_accum_steps": 2}
    _, without = run(tmp_path, "without", **options)
    head = "model.lm_head.weight"
    assert not torch.equal(tensors(without)[head], tensors(one)[head])


def test_dropout_after_a_resume(on_ranks, tmp_path, dropout):
    """Nor does it depend on what came before."""
    changes = dict(dropout, grad_accum_steps=2, lr_schedule="constant")
    cut = train_on(on_ranks, 2, tmp_path, "cut", **changes, max_steps=10)
    resume_on(on_ranks, 2, cut, max_steps=20)
    assert_same(tensors(cut), tensors(train_on(on_ranks, 2, tmp_path, "whole", **changes)))


def test_frozen_weights_stay_and_have_no_optimizer_state(on_ranks, tmp_path, dropout):
    out = train_on(on_ranks, 2, tmp_path, "run", **dropout, grad_accum_steps=2)
    p = load_settings(out, train.TrainConfig)
    initial = build_model(p, build_model_config(p, p.data_module.Data(p.data)))
    after = tensors(out)
    assert torch.equal(after["model.embed.weight"], initial.embed.weight)
    assert not torch.equal(after["model.lm_head.weight"], initial.lm_head.weight)
    assert not any(name.startswith("optimizer.embed.") for name in after)


def test_ddp_reduces_gradients_once_a_step(on_ranks, tmp_path, monkeypatch):
    """However many micro-batches the step has."""
    all_reduce, calls = torch.distributed.all_reduce, []

    def note_call(*args, **kwargs):
        calls.append(1)
        return all_reduce(*args, **kwargs)

    monkeypatch.setattr(torch.distributed, "all_reduce", note_call)

    def work(rank):
        status = train.main(flags(tmp_path, "run", grad_accum_steps=4, **SHORT))
        assert status == 0 and len(calls) == 20
        return 0

    assert on_ranks(2, work) == [0, 0]


def test_fsdp_reduces_gradients_once_a_step(on_ranks, tmp_path, monkeypatch):
    """With the last of four micro-batches."""
    set_sync, syncs = FSDPModule.set_requires_gradient_sync, []

    def note_sync(module, sync):
        syncs.append(sync)
        return set_sync(module, sync)

    monkeypatch.setattr(FSDPModule, "set_requires_gradient_sync", note_sync)

    def work(rank):
        args = flags(tmp_path, "run", parallel="fsdp", grad_accum_steps=4, **SHORT)
        assert train.main(args) == 0 and syncs == [False, False, False, True] * 20
        return 0

    assert on_ranks(2, work) == [0, 0]


@pytest.mark.parametrize("labels", [0, 1])
def test_a_batch_of_few_labels(labels):
    p = train.parse([])
    model = p.model_class(p.model_module.Config(vocab_size=32, seq_len=16))
    targets = torch.full((2, 16), IGNORE_INDEX)
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
    batch, seen = data.batch, []

    def note_batch(split, step, rows):
        seen.append(list(rows))
        return batch(split, step, rows)

    def work(rank):
        with distributed.process_group() as world:
            data.batch = note_batch
            got = metrics.evaluate(model, data, "test", 8, torch.device("cpu"), world=world)
            assert got == whole and len(seen) == 3
            return 0

    assert on_ranks(3, work) == [0, 0, 0]


# ---- checkpoints and ranks -----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("size", [1, 2])
def test_resume_is_bit_exact(on_ranks, tmp_path, size, how):
    whole = train_on(on_ranks, size, tmp_path, "whole", parallel=how)
    cut = train_on(on_ranks, size, tmp_path, "cut", parallel=how, stop_accuracy=1e-9)
    assert checkpoint.load_checkpoint(cut, "ckpt")["step"] == 10
    resume_on(on_ranks, size, cut, stop_accuracy=0)
    (cut_state, cut_log), (state, log) = contents(cut), contents(whole)
    # Checksums of files that name their run's directory.
    cut_state.pop("shards", None)
    state.pop("shards", None)
    assert_same(cut_state, state)
    assert_same(cut_log, log)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_one_rank_then_two_then_one_see_the_same_rows(on_ranks, tmp_path, monkeypatch, how):
    batch, seen = InMemoryMQAR.batch, tmp_path / "seen"

    def note_batch(self, split, step, rows):
        if split == "train":
            with open(seen, "a") as f:
                f.write(json.dumps([step, [int(row) for row in rows]]) + "\n")
        return batch(self, split, step, rows)

    monkeypatch.setattr(InMemoryMQAR, "batch", note_batch)

    def rows_by_step():
        found = {}
        for line in seen.read_text().splitlines():
            step, rows = json.loads(line)
            found[step] = sorted(found.get(step, []) + rows)
        seen.unlink()
        return found

    run(tmp_path, "whole", **SHORT)
    expected = rows_by_step()
    assert sorted(expected) == list(range(20))
    _, out = run(tmp_path, how, parallel=how, **{**SHORT, "max_steps": 6})
    resume_on(on_ranks, 2, out, max_steps=13)
    assert run(tmp_path, how, resume=True, max_steps=20)[0] == 0
    assert rows_by_step() == expected


def zeros_like_run(p, data):
    """A sharded copy of a run's model with all weights 0, and an optimizer for it."""
    copy = build_model(p, build_model_config(p, data))
    for parameter in copy.parameters():
        parameter.data.zero_()
    distributed.wrap_model(copy, "fsdp", torch.device("cpu"))
    return copy, torch.optim.AdamW(copy.parameters(), fused=True)


@pytest.fixture(scope="module")
def two(on_ranks, tmp_path_factory):
    """A run of two ranks whose batch three can share, too -> its directory."""
    folder = tmp_path_factory.mktemp("two")
    return train_on(on_ranks, 2, folder, "two", parallel="fsdp", batch_size=24)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("form", ["shards", "file"])
def test_a_checkpoint_of_two_ranks_loads_on_one_and_three(on_ranks, two, tmp_path, size, form):
    """From its shards, or each rank its part of one file."""
    out = str(shutil.copytree(two, tmp_path / "two"))
    saved = tensors(out)
    p, data, _, _ = train.load_run(out, "ckpt")

    def work(rank):
        with distributed.process_group() as world:
            copy, optimizer = zeros_like_run(p, data)
            state = {"tensors": saved}
            if form == "shards":
                name = checkpoint.first_valid_checkpoint(out, "ckpt")
                state = checkpoint.read_checkpoint(out, name)
            load_training_state(out, state, copy, optimizer)
            loaded = {}
            for name, tensor in training_state(copy, optimizer).items():
                loaded[name] = distributed.full_tensor(tensor)
            assert_same(loaded, saved)
            assert world.size == size
            return 0

    assert on_ranks(size, work) == [0] * size


def test_a_run_of_two_ranks_continues_alike_on_one_and_three(on_ranks, two, tmp_path):
    three = shutil.copytree(two, tmp_path / "three")
    one = shutil.copytree(two, tmp_path / "one")
    resume_on(on_ranks, 3, str(three), max_steps=30)
    assert run(tmp_path, "one", resume=True, max_steps=30)[0] == 0
    assert_close(tensors(str(three)), tensors(str(one)))


def test_export_there_and_back(on_ranks, tmp_path):
    out = train_on(on_ranks, 2, tmp_path, "run", parallel="fsdp")

    def steps():
        return [checkpoint.load_checkpoint(out, name)["step"] for name in ("ckpt", "ckpt_prev")]

    weights, best, saved_steps = tensors(out), tensors(out, "best"), steps()
    for form in ("file", "shards", "file"):
        assert train.main([f"--resume={out}", f"--export_checkpoint={form}"]) == 0
        assert os.path.isdir(os.path.join(out, "shards")) == (form == "shards")
        assert_same(tensors(out), weights)
        assert_same(tensors(out, "best"), best)
        assert steps() == saved_steps
    plain = torch.load(os.path.join(out, "ckpt.pt"), weights_only=True)  # what others read
    assert_same(plain["tensors"], weights)


def test_export_needs_a_run():
    with pytest.raises(ConfigError, match="name it with --resume"):
        train.main(["--export_checkpoint=file"])


def test_export_of_nothing_or_with_other_settings_is_refused(tmp_path):
    _, out = run(tmp_path, **SHORT)
    with pytest.raises(ConfigError, match="--max_steps has no effect"):
        train.main([f"--resume={out}", "--export_checkpoint=file", "--max_steps=9"])
    for name in ("ckpt", "ckpt_prev", "best"):
        os.remove(os.path.join(out, f"{name}.pt"))
    for _ in range(2):  # the first one leaves no lock behind
        with pytest.raises(ConfigError, match="has no checkpoint to export"):
            train.main([f"--resume={out}", "--export_checkpoint=file"])


def test_what_is_not_sharded_is_said(tmp_path, capsys):
    run(tmp_path, parallel="fsdp", **SHORT)
    assert "note: parallel=fsdp shards nothing on one process" in capsys.readouterr().out


# ---- mistakes ------------------------------------------------------------------------------------


def test_a_batch_that_does_not_divide_is_refused_in_one_sentence(on_ranks, tmp_path, capfd):
    args = flags(tmp_path, "run", batch_size=64, grad_accum_steps=3)
    assert on_ranks(2, lambda rank: train.main(args)) == [2, 2]
    error = capfd.readouterr().err
    message = "batch_size=64 does not divide into 2 ranks x 3 micro-batches; a multiple of 6 does"
    assert error.count(message) == 1
    assert "Traceback" not in error and not os.listdir(tmp_path)


def test_the_batch_is_described():
    world = SimpleNamespace(size=2)
    assert distributed.describe_batch(64, world, 4) == (
        "batch: 64 = 2 ranks x 4 micro-batches x 8 sequences"
    )


def test_a_mistake_that_only_the_first_rank_notices_stops_all(on_ranks, tmp_path, capfd):
    args = flags(tmp_path, "run", **SHORT)
    os.makedirs(tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("a directory of the user's own")
    assert on_ranks(2, lambda rank: train.main(args)) == [2, 2]
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


@pytest.mark.parametrize("local_rank", [0, 1])
def test_a_gpu_has_the_number_that_set_device_needs(monkeypatch, local_rank):
    """set_device raises ValueError for torch.device("cuda"). Here it is a stand-in."""
    numbers = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: numbers.append(device.index))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda n, device: zeros(n))
    world = distributed.World(local_rank, 1 + local_rank, local_rank)
    for name, why in (("auto", "found"), ("cuda", "asked for")):
        config = train.TrainConfig(device=name)
        device, dtype, line = distributed.autodetect_device(config, world)
        assert device == torch.device("cuda", local_rank) and dtype == torch.bfloat16
        assert f"device: cuda:{local_rank} ({why})" in line
    assert numbers == [local_rank, local_rank]


@pytest.mark.parametrize(
    "text, kind, message",
    [
        ("no kernel\nfor this", ConfigError, r"cannot be used .*; use --device cpu \(no kernel\)"),
        ("CUDA error: out of memory", RunError, "has no free memory .CUDA error: out of memory."),
    ],
)
def test_a_gpu_that_cannot_be_used_says_why(monkeypatch, text, kind, message):
    """A full one may be free at the next start, which exit status 2 would rule out."""

    def zeros(*_, **__):
        raise RuntimeError(text)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(kind, match=message):
        distributed.autodetect_device(train.TrainConfig())


@pytest.mark.parametrize("backend, ended", [("gloo", 1), ("cpu:gloo,cuda:nccl", 0)])
def test_a_rank_that_fails_does_not_wait_for_the_others(monkeypatch, backend, ended):
    """nccl's end waits for all ranks, of which one may wait for this one."""
    ends = []
    world = distributed.World(0, 2, 0, backend)
    monkeypatch.setattr(distributed, "init_process_group", lambda device: world)
    monkeypatch.setattr(distributed, "shutdown", lambda: ends.append(1))
    with pytest.raises(RunError, match="the disk is full"):
        with distributed.process_group():
            raise RunError("the disk is full")
    assert len(ends) == ended
    with pytest.raises(RunError, match=r"another rank has ended.*\(NCCL error: Duplicate GPU"):
        with distributed.process_group():
            raise dist.DistBackendError("in init\nNCCL error: Duplicate GPU detected\nat line 3")


def test_torchrun_leaves_our_flags_alone():
    """Before Python 3.12.3 its parser refuses what begins two of its own flags, as --run would.

    It does so even behind the script's name; `--` before the script's name helps.
    """
    from torch.distributed.run import get_args_parser

    p = train.parse([])
    for config in (train.TrainConfig, p.model_module.Config, p.data_module.Config):
        for name in config.__dataclass_fields__:
            dashes = ["--"] if name == "du" else []
            ours = [f"--{name}", "1"]
            command = ["--nproc_per_node=2", *dashes, "train.py", *ours]
            args = get_args_parser().parse_args(command)
            assert args.training_script == "train.py" and args.training_script_args == ours


# ---- torchrun ------------------------------------------------------------------------------------


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as f:
        return [int(p) for p in f.read().split()]


def test_sigterm_to_torchrun_stops_both_ranks_on_one_step(on_ranks, tmp_path):
    changes = {**SHORT, "max_steps": 10**6, "eval_interval": 10**5, "lr_schedule": "constant"}
    process, out = torchrun(2, *flags(tmp_path, "stopped", **changes)), str(tmp_path / "stopped")
    wait_for_step(out, 7, process)
    process.send_signal(signal.SIGTERM)
    text, error = process.communicate()
    assert process.returncode != 0 and f"--resume {out}" in text
    status = read_json(os.path.join(out, "status.json"))
    assert status["status"] == "preempted" and status["step"] >= 7
    assert checkpoint.load_checkpoint(out, "ckpt")["step"] == status["step"]
    # However many steps it made on a busy machine, a few more are enough.
    changes["max_steps"] = status["step"] + 10
    resume_on(on_ranks, 2, out, max_steps=changes["max_steps"])
    whole = train_on(on_ranks, 2, tmp_path, "whole", **changes)
    assert_same(contents(out), contents(whole))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_all_on_one_step(on_ranks, tmp_path, rank):
    args = flags(tmp_path, "run", **{**SHORT, "max_steps": 5000, "eval_interval": 2500})
    batch = InMemoryMQAR.batch

    def work(me):
        def kill_in_step_9(self, split, step, rows):
            if me == rank and step == 9:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)  # from the system, and again from torchrun
            return batch(self, split, step, rows)

        InMemoryMQAR.batch = kill_in_step_9
        return train.main(args)

    assert on_ranks(2, work) == [128 + signal.SIGTERM] * 2
    status = status_of(tmp_path / "run")
    assert status["status"] == "preempted" and status["step"] == 10


def test_a_signal_to_one_rank_before_the_first_step_stops_all_after_it(on_ranks, tmp_path):
    args = flags(tmp_path, "run", **SHORT)
    wrap_model = run_module.wrap_model

    def work(me):
        def kill_and_wrap(*inputs):
            if me == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return wrap_model(*inputs)

        run_module.wrap_model = kill_and_wrap
        return train.main(args)

    assert on_ranks(2, work) == [128 + signal.SIGTERM] * 2
    status = status_of(tmp_path / "run")
    assert status["status"] == "preempted" and status["step"] == 1


def wait_for_run(folder, process):
    """The only run in a directory, once it has a log; None if the process ends before."""
    while process.poll() is None:
        logs = list(folder.glob("*/log.jsonl"))
        if logs:
            return str(logs[0].parent)
        time.sleep(0.01)


def test_a_killed_rank_brings_the_job_down_and_restarted_it_ends_the_same(on_ranks, tmp_path):
    changes = {**SHORT, "max_steps": 200, "eval_interval": 50, "save_interval": 10}
    # torchrun repeats the flags, and they do not name the run. Once in a dozen runs a
    # process of the restart has aborted (SIGABRT, torch 2.13), which a second restart mends.
    process = torchrun(2, *flags(tmp_path, None, **changes), max_restarts=2)
    out = wait_for_run(tmp_path, process)
    wait_for_step(out, 30, process)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    text, error = process.communicate()
    assert process.returncode == 0, error
    assert f"started again by torchrun: going on with {out}" in text
    assert os.listdir(tmp_path) == [os.path.basename(out)]
    config = read_json(os.path.join(out, "config.json"))
    assert config["resumed"][0]["step"] >= 20
    whole = train_on(on_ranks, 2, tmp_path, "whole", **changes)
    assert_same(contents(out), contents(whole))


def test_a_rank_that_dies_takes_the_others_with_it(on_ranks, tmp_path, capfd):
    batch = InMemoryMQAR.batch

    def work(rank):
        def die_in_step_5(self, split, step, rows):
            if rank == 1 and step == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return batch(self, split, step, rows)

        InMemoryMQAR.batch = die_in_step_5
        return train.main(flags(tmp_path, "run", **SHORT))

    began = time.time()
    assert on_ranks(2, work) == [1, -signal.SIGKILL]
    assert time.time() - began < 30
    assert "another rank has ended" in capfd.readouterr().err
    status = status_of(tmp_path / "run")
    assert status["status"] == "failed" and status["error"].startswith("another rank has ended")


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "bad_steps, ends, status", [((2, 4), "finished", 0), ((2, 4, 5, 6), "failed", 1)]
)
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_on_all(
    on_ranks, tmp_path, how, bad, bad_steps, ends, status
):
    batch, backward = InMemoryMQAR.batch, torch.Tensor.backward

    def work(rank):
        current = [0]

        def note_step(self, split, step, rows):
            current[0] = step
            return batch(self, split, step, rows)

        def spoil(loss, *args, **kwargs):
            is_bad = rank == 1 and current[0] in bad_steps
            return backward(loss * bad if is_bad else loss, *args, **kwargs)

        InMemoryMQAR.batch, torch.Tensor.backward = note_step, spoil
        changes = {**SHORT, "max_steps": 10, "max_skipped_steps": 3, "parallel": how}
        return train.main(flags(tmp_path, "run", **changes))

    assert on_ranks(2, work) == [status] * 2
    assert status_of(tmp_path / "run")["status"] == ends
    rows = read_log(str(tmp_path / "run"))
    assert [row["step"] - 1 for row in rows if row.get("skipped")] == list(bad_steps)
    if ends == "finished":
        assert all(torch.isfinite(t).all() for t in tensors(str(tmp_path / "run")).values())


def test_two_jobs_never_write_one_run(on_ranks, tmp_path, capfd):
    out = train_on(on_ranks, 2, tmp_path, "run")
    held = lock_run_dir(out)
    args = [f"--resume={out}", "--max_steps=30"]
    assert on_ranks(2, lambda rank: train.main(args)) == [2, 2]
    assert capfd.readouterr().err.count("another process is writing this run") == 1
    os.close(held)
    resume_on(on_ranks, 2, out, max_steps=30)
