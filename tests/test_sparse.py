"""Sparse gradients of a table of values: the operator, the optimizer, clipping, runs, ranks."""

import math
import os

import pytest
import torch

import memory
import train
from analysis import editors
from nanorecall import distributed, sparse
from nanorecall.ops import sparse_embedding_bag, sparse_rows
from nanorecall.settings import ConfigError
from nanorecall.sparse import SparseAdamW
from toys import MEMORY_TOY, assert_same, contents, flags, memory_model, random_tokens, run

# That a run draws its curves is tested in test_progress.py.
pytestmark = pytest.mark.usefixtures("undrawn")

# ---- the operator --------------------------------------------------------------------------------


def test_a_sparse_gradient_equals_that_of_values_one_by_one():
    g = torch.Generator().manual_seed(0)
    values = torch.randn(20, 4, dtype=torch.double, generator=g).requires_grad_()
    slots = torch.randint(12, (7, 6), generator=g)
    weights = torch.randn(7, 6, dtype=torch.double, generator=g).requires_grad_()
    outcomes = []
    for read in (sparse_embedding_bag, lambda s, v, w: memory.naive_weighted_values(v, s, w)):
        y = read(slots, values, weights)
        outcomes.append((y, *torch.autograd.grad(y.square().sum(), (values, weights))))
    ours, naive = outcomes
    assert ours[1].is_sparse and ours[1].is_coalesced()
    assert ours[1].indices()[0].tolist() == slots.unique().tolist()
    for a, b in zip(ours, naive):
        torch.testing.assert_close(a.to_dense(), b)


def test_second_derivatives_are_refused_and_torch_func_has_them():
    model = memory_model(mem_sparse_grad=True).double()
    parameters = dict(model.named_parameters())
    tokens, targets = random_tokens(2, 6), random_tokens(2, 6, seed=1)
    values = parameters["layers.1.memory.values"]
    with pytest.raises(RuntimeError, match="no second derivatives: set mem_sparse_grad=0"):
        torch.autograd.grad(model(tokens, targets)[1], values, create_graph=True)

    def loss(p):
        return torch.func.functional_call(model, p, (tokens, targets))[1]

    gradients = torch.func.grad(loss)({name: q.detach() for name, q in parameters.items()})
    (expected,) = torch.autograd.grad(model(tokens, targets)[1], values)
    torch.testing.assert_close(gradients["layers.1.memory.values"], expected.to_dense())


def gradients(share, sparse_grad, **changes):
    """{name: dense gradient} of a model with two memory layers, after two micro-batches."""
    table = dict(memory_layers=(0, 1), mem_share_values=share, mem_sparse_grad=sparse_grad)
    model = memory_model(**table, **changes)
    for seed in (0, 2):
        model(random_tokens(2, 6, seed=seed), random_tokens(2, 6, seed=seed + 1))[1].backward()
    return model, {name: q.grad.to_dense().clone() for name, q in model.named_parameters()}


@pytest.mark.parametrize("share", [True, False])
def test_layers_and_micro_batches_add_up(share):
    model, ours = gradients(share, True)
    _, dense = gradients(share, False)
    table = model.layers[0].memory.values
    assert table.grad.is_sparse and ours.keys() == dense.keys()
    for name, grad in ours.items():
        torch.testing.assert_close(grad, dense[name])


@pytest.mark.parametrize("rows", [[2, 0, 2], [0, 2, 2], [0, 1, 3], [3, 1, 0]])
def test_rows_that_occur_twice_are_summed(rows):
    """On CUDA, torch lists the rows of two gradients one after the other."""
    grad = sparse_rows(torch.tensor(rows), torch.arange(6.0).view(3, 2), (4, 2))
    found = sparse.coalesce(grad)
    assert found.is_coalesced() and found.indices()[0].tolist() == sorted(set(rows))
    assert torch.equal(found.to_dense(), grad.to_dense())


# ---- the optimizer -------------------------------------------------------------------------------


def step_both(rows_of_step, **options):
    """Steps of AdamW and SparseAdamW with the same gradients -> both, with their parameters.

    A table (10, 3), whose gradient has the rows that are given for a step, and a dense vector.
    """
    g = torch.Generator().manual_seed(0)
    first = torch.randn(10, 3, generator=g), torch.randn(4, generator=g)
    results = []
    for kind in (torch.optim.AdamW, SparseAdamW):
        table, vector = (torch.nn.Parameter(x.clone()) for x in first)
        results.append((kind([table, vector], fused=True, **options), table, vector))
    for rows in rows_of_step:
        table_grad, vector_grad = torch.zeros(10, 3), torch.randn(4, generator=g)
        table_grad[rows] = torch.randn(len(rows), 3, generator=g)
        for optimizer, table, vector in results:
            table.grad, vector.grad = table_grad.clone(), vector_grad.clone()
            if isinstance(optimizer, SparseAdamW):
                table.grad = table_grad.to_sparse(1)
            optimizer.step()
            optimizer.zero_grad()
    return results


@pytest.mark.parametrize("at_a_time", [4, 4096])
def test_rows_that_are_always_read_change_as_under_adamw(monkeypatch, at_a_time):
    monkeypatch.setattr(sparse, "ROWS_AT_A_TIME", at_a_time)
    options = dict(lr=0.1, betas=(0.8, 0.9), weight_decay=0.1)
    (dense, *theirs), (ours, *mine) = step_both([range(10)] * 4, **options)
    for a, b in zip(theirs, mine):
        # Vector and scalar instructions differ in the last bit, so the size of a part matters.
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-7)
        assert dense.state[a].keys() == ours.state[b].keys()
        for name, tensor in dense.state[a].items():
            torch.testing.assert_close(ours.state[b][name], tensor, rtol=1e-5, atol=1e-7)


def test_rows_that_are_not_read_stay_and_so_do_their_moments():
    (dense, theirs, _), (ours, mine, _) = step_both([range(10), [1, 3]], lr=0.1)
    (_, after_one, _), (first, before, _) = step_both([range(10)], lr=0.1)
    read = torch.tensor([1, 3])
    others = torch.tensor([0, 2, 4, 5, 6, 7, 8, 9])
    torch.testing.assert_close(mine[read], theirs[read], rtol=1e-5, atol=1e-7)
    assert torch.equal(mine[others], before[others])
    assert not torch.equal(theirs[others], after_one[others])  # AdamW moves them
    for name in ("exp_avg", "exp_avg_sq"):
        moment, expected = ours.state[mine][name], dense.state[theirs][name]
        torch.testing.assert_close(moment[read], expected[read], rtol=1e-5, atol=1e-7)
        assert torch.equal(moment[others], first.state[before][name][others])
    assert ours.state[mine]["step"] == 2


def test_a_run_uses_it_for_sparse_gradients_only():
    c = train.TrainConfig()
    optimizer = train.configure_optimizer(memory_model(), c)
    assert type(optimizer) is torch.optim.AdamW
    model = memory_model(mem_sparse_grad=True, mem_value_lr_scale=3)
    optimizer = train.configure_optimizer(model, c)
    assert type(optimizer) is SparseAdamW and optimizer.param_groups[-1]["lr_scale"] == 3
    model.layers[1].memory.values.requires_grad_(False)
    assert type(train.configure_optimizer(model, c)) is torch.optim.AdamW
    model(random_tokens(2, 6), random_tokens(2, 6, seed=1))[1].backward()
    assert model.layers[1].memory.values.grad is None


# ---- clipping ------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [0.05, math.inf])
@pytest.mark.parametrize("share", [True, False])
def test_the_norm_is_that_of_all_gradients_and_all_are_scaled(share, max_norm):
    dense, before = gradients(share, False)
    norm = torch.nn.utils.clip_grad_norm_(dense.parameters(), max_norm)
    model, _ = gradients(share, True)
    ours = distributed.clip_gradients(model.parameters(), max_norm)
    torch.testing.assert_close(ours, norm)
    assert norm > 0.1
    for name, q in model.named_parameters():
        expected = before[name] * min(1, max_norm / norm.item())
        torch.testing.assert_close(q.grad.to_dense(), expected, rtol=1e-4, atol=1e-7)


# ---- reads ---------------------------------------------------------------------------------------


def test_a_loop_that_ends_no_step_keeps_no_more_slots_than_counts():
    m = memory_model(mem_n_keys=16).train()  # 2 heads x 256 slots; 2 x 6 tokens read 72
    layer, all_slots = m.layers[1].memory, []
    for i in range(50):
        _, _, reads = m(random_tokens(2, 6, seed=i), trace=True)
        all_slots.append(reads[0]["slots"].flatten(0, 1))
        assert sum(slots.numel() for slots in layer.slots_read) <= 2 * 256
    halves, counts = layer.count_half_reads(), layer.count_reads()
    for head in range(2):
        slots = torch.cat(all_slots)[:, head].flatten()
        assert counts[head].tolist() == slots.bincount(minlength=256).tolist()
        assert halves[head, 0].tolist() == (slots // 16).bincount(minlength=16).tolist()
        assert halves[head, 1].tolist() == (slots % 16).bincount(minlength=16).tolist()
    m.on_step_end()
    assert not layer.count_reads().any() and not layer.count_half_reads().any()


def test_a_step_counts_no_slots_unless_asked(monkeypatch):
    m = memory_model(mem_n_keys=16, mem_balance_rate=0.1).train()
    monkeypatch.setattr(memory.MemoryLayer, "count_reads", None)
    m(random_tokens(2, 6))
    m.on_step_end()
    with pytest.raises(TypeError):
        m.on_step_end(report=True)


# ---- runs ----------------------------------------------------------------------------------------

SPARSE = {**MEMORY_TOY, "model": "memory", "mem_sparse_grad": 1}


def test_a_run_in_which_every_slot_is_read_equals_a_dense_one(tmp_path):
    options = {**SPARSE, "max_steps": 20, "clip_grad": 0.5, "mem_log_interval": 1}
    options |= {"mem_n_keys": 2, "weight_decay": 0.1, "mem_value_lr_scale": 3}
    _, ours = run(tmp_path, "sparse", **options)
    _, dense = run(tmp_path, "dense", **{**options, "mem_sparse_grad": 0})
    (state, log), (dense_state, _) = contents(ours), contents(dense)
    assert all(row["layers"]["0"]["dead"] == 0 for row in log if row["kind"] == "memory")
    assert state["tensors"].keys() == dense_state["tensors"].keys()
    for name, tensor in state["tensors"].items():
        torch.testing.assert_close(tensor, dense_state["tensors"][name], rtol=1e-5, atol=1e-6)


def test_a_resumed_run_equals_one_without_interruption(tmp_path):
    options = {**SPARSE, "mem_n_keys": 8, "lr_schedule": "constant", "eval_interval": 20}
    _, whole = run(tmp_path, "whole", max_steps=40, **options)
    run(tmp_path, "cut", max_steps=20, **options)
    _, cut = run(tmp_path, "cut", resume=True, max_steps=40)
    assert_same(contents(cut)[0]["tensors"], contents(whole)[0]["tensors"])


def test_a_gradient_that_is_not_finite_is_skipped(tmp_path, monkeypatch):
    backward, calls = torch.Tensor.backward, []

    def spoil(loss):
        calls.append(1)
        backward(loss * math.nan if len(calls) == 3 else loss)

    monkeypatch.setattr(torch.Tensor, "backward", spoil)
    _, out = run(tmp_path, **{**SPARSE, "max_steps": 5, "log_interval": 1})
    state, log = contents(out)
    assert [row["step"] for row in log if row.get("skipped")] == [3]
    assert all(t.isfinite().all() for t in state["tensors"].values())
    assert state["tensors"]["optimizer.layers.0.memory.values.step"] == 4


def test_fsdp_refuses_them(tmp_path):
    message = "parallel=fsdp takes no sparse gradients: set mem_sparse_grad=0 or parallel=ddp"
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, **SPARSE, parallel="fsdp")


def test_weights_of_a_run_are_loaded_and_converted(tmp_path):
    _, out = run(tmp_path, **{**SPARSE, "max_steps": 2})
    converted = str(tmp_path / "router.pt")
    assert memory.main(["convert", out, converted, "--to", "memory_router"]) == 0
    options = {**SPARSE, "model": "memory_router", "init_from": converted, "n_epochs": 0}
    options |= {"max_steps": None, "freeze": "*.memory.keys"}
    loaded = train.train_run(flags(tmp_path, "router", **options))
    table = contents(out)[0]["tensors"]["model.layers.0.memory.values"]
    assert torch.equal(loaded.model.layers[0].memory.values, table)


def test_facts_are_edited_by_fine_tuning():
    model = memory_model(mem_sparse_grad=True, mem_n_keys=8)
    x, y = random_tokens(2, 6), torch.full((2, 6), -100)
    y[:, 5] = torch.tensor([3, 4])
    editors.fine_tune_values(model, x, y, x, y)
    assert model(x, y)[0].argmax(-1).tolist() == [3, 4]


# ---- ranks ---------------------------------------------------------------------------------------


def train_on_two(on_ranks, folder, name, **changes):
    args = flags(folder, name, **changes)
    assert on_ranks(2, lambda rank: train.main(args)) == [0, 0]
    return contents(os.path.join(folder, name))


@pytest.mark.slow
@pytest.mark.parametrize("share", [1, 0])
def test_two_ranks_equal_one_process(on_ranks, tmp_path, share):
    options = {**SPARSE, "mem_n_keys": 8, "mem_share_values": share, "mem_balance_rate": 0.01}
    options |= {"max_steps": 20, "eval_interval": 10, "clip_grad": 0.5, "lr": 1e-3}
    two, two_log = train_on_two(on_ranks, tmp_path, "two", **options, grad_accum_steps=2)
    _, out = run(tmp_path, "one", **options)
    one, log = contents(out)
    for name, tensor in one["tensors"].items():
        # AdamW divides by the size of a gradient, so a tiny one's rounding shows.
        torch.testing.assert_close(two["tensors"][name], tensor, rtol=0, atol=5e-6)
    assert [row for row in log if row["kind"] == "memory"] == [
        row for row in two_log if row["kind"] == "memory"
    ]


@pytest.mark.slow
def test_both_ranks_have_the_same_table_and_a_resume_is_exact(on_ranks, tmp_path):
    options = {**SPARSE, "mem_n_keys": 8, "lr_schedule": "constant", "eval_interval": 10}
    build = train.Run.create

    def work(rank):
        def differently(settings, world):
            made = build(settings, world)
            with torch.no_grad():
                made.model.layers[0].memory.values.add_(rank)
            return made

        train.Run.create = differently
        run_of_rank = []
        begin = train.Run.begin
        train.Run.begin = lambda self, optimizer: (run_of_rank.append(self), begin(self, optimizer))
        status = train.main(flags(tmp_path, "whole", **options, max_steps=20))
        with torch.no_grad():
            table = run_of_rank[0].model.layers[0].memory.values
            torch.save(table, tmp_path / f"table{rank}.pt")
        return status

    assert on_ranks(2, work) == [0, 0]
    assert torch.equal(torch.load(tmp_path / "table0.pt"), torch.load(tmp_path / "table1.pt"))
    whole = contents(tmp_path / "whole")
    assert_same(train_on_two(on_ranks, tmp_path, "again", **options, max_steps=20), whole)
    train_on_two(on_ranks, tmp_path, "cut", **options, max_steps=10)
    args = [f"--resume={tmp_path / 'cut'}", "--max_steps=20"]
    assert on_ranks(2, lambda rank: train.main(args)) == [0, 0]
    assert_same(contents(tmp_path / "cut")[0]["tensors"], whole[0]["tensors"])


@pytest.mark.slow
def test_two_ranks_train_values_alone(on_ranks, tmp_path):
    frozen = "embed,*.att,*.att_norm,*.ffn_norm,*.keys,*.query,final_norm,lm_head"
    options = {**SPARSE, "max_steps": 4, "eval_interval": 4, "freeze": frozen}
    two, _ = train_on_two(on_ranks, tmp_path, "two", **options)
    _, out = run(tmp_path, "one", **options)
    one = contents(out)[0]
    name = "model.layers.0.memory.values"
    torch.testing.assert_close(two["tensors"][name], one["tensors"][name], rtol=0, atol=1e-6)
    assert [n for n in two["tensors"] if n.startswith("optimizer")][0].startswith(
        "optimizer.layers.0.memory.values"
    )
