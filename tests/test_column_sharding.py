"""A table of values split by columns over two ranks equals a whole one in one process."""

import os

import pytest
import torch

import train
from nanorecall import metrics
from nanorecall.records import read_json
from nanorecall.settings import ConfigError
from toys import MEMORY_TOY, assert_same, contents, flags, run, spread_labels_unevenly

COLUMNS = {**MEMORY_TOY, "model": "memory", "mem_n_keys": 8, "mem_shard_values": 1}
COLUMNS |= {"max_steps": 20, "eval_interval": 10, "log_interval": 1, "lr": 1e-3, "clip_grad": 0.5}
InMemoryMQAR = train.parse([]).data_module.InMemoryMQAR


def train_on_two(on_ranks, folder, name, **changes):
    """A toy run on two ranks -> its directory."""
    args = flags(folder, name, **{**COLUMNS, **changes})
    assert on_ranks(2, lambda rank: train.main(args)) == [0, 0]
    return os.path.join(folder, name)


def assert_close(a, b):
    """Two runs have the same losses, norms, weights and moments."""
    (state, log), (other_state, other_log) = contents(a), contents(b)
    assert state["tensors"].keys() == other_state["tensors"].keys()
    for name, tensor in state["tensors"].items():
        expected = other_state["tensors"][name]
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)
    for column in ("loss", "grad_norm"):
        ours, theirs = ([r[column] for r in rows if column in r] for rows in (log, other_log))
        assert len(ours) >= 20 and ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("share", [1, 0])
def test_two_ranks_equal_one_process(on_ranks, tmp_path, monkeypatch, how, share):
    """Also with labels spread unevenly over ranks, and so tokens in the last block."""
    spread_labels_unevenly(monkeypatch, InMemoryMQAR)
    changes = dict(mem_share_values=share, mem_gated=1, weight_decay=0.1)
    two = train_on_two(on_ranks, tmp_path, "two", parallel=how, grad_accum_steps=2, **changes)
    _, one = run(tmp_path, "one", **{**COLUMNS, **changes})
    assert_close(two, one)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_each_rank_keeps_half_of_the_columns_and_resumes_exactly(on_ranks, tmp_path, how):
    begin = train.Run.begin

    def work(rank):
        def check_shapes(self, optimizer):
            begin(self, optimizer)
            tables = [layer.values for layer in self.model.memory_layers().values()]
            assert tables[0] is tables[1] and tables[0].shape == (64, 32)
            assert tables[0].to_local().untyped_storage().nbytes() == 4 * 64 * 16

        train.Run.begin = check_shapes
        options = {**COLUMNS, "parallel": how, "lr_schedule": "constant"}
        return train.main(flags(tmp_path, "cut", **{**options, "max_steps": 10}))

    assert on_ranks(2, work) == [0, 0]
    args = [f"--resume={tmp_path / 'cut'}", "--max_steps=20"]
    assert on_ranks(2, lambda rank: train.main(args)) == [0, 0]
    whole = train_on_two(on_ranks, tmp_path, "whole", parallel=how, lr_schedule="constant")
    assert_same(contents(tmp_path / "cut")[0]["tensors"], contents(whole)[0]["tensors"])


@pytest.mark.slow
def test_a_run_is_exported_and_evaluated_and_continued_by_one_process(on_ranks, tmp_path):
    out = train_on_two(on_ranks, tmp_path, "run")
    weights = contents(out)[0]["tensors"]
    assert os.path.isdir(os.path.join(out, "shards"))
    assert train.main([f"--resume={out}", "--export_checkpoint=file"]) == 0
    assert not os.path.isdir(os.path.join(out, "shards"))
    assert_same(contents(out)[0]["tensors"], weights)
    _, data, model, _ = train.load_run(out)
    ours = metrics.evaluate(model, data, "test", 7, torch.device("cpu"))
    tested = read_json(os.path.join(out, "status.json"))["test"]
    assert ours["loss"] == pytest.approx(tested["loss"], rel=1e-5)
    assert ours["labels"] == tested["labels"] and ours["accuracy"] == tested["accuracy"]
    assert run(tmp_path, "run", resume=True, max_steps=25)[0] == 0
    args = [f"--resume={out}", "--max_steps=30"]  # and again by two ranks, from one file
    assert on_ranks(2, lambda rank: train.main(args)) == [0, 0]


@pytest.mark.slow
def test_columns_that_do_not_divide_are_refused(on_ranks, tmp_path, capfd):
    args = flags(tmp_path, "run", **{**COLUMNS, "mem_v_dim": 5})
    assert on_ranks(2, lambda rank: train.main(args)) == [2, 2]
    message = "the 5 columns of layers.0.memory.values do not divide by the 2 ranks"
    assert capfd.readouterr().err.count(message) == 1
    assert not os.listdir(tmp_path)


def test_sparse_gradients_of_columns_are_refused(tmp_path):
    message = "mem_shard_values=1 takes no sparse gradients: set mem_sparse_grad=0"
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, **COLUMNS, mem_sparse_grad=1)
