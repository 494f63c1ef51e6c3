"""memory.py, editing and weights: lookup, layers, routing, slot usage, runs, edits, commands."""

import math
import os
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import memory as Mem
import train
from analysis import editing, weights
from nanorecall import checkpoint
from nanorecall.build import build_model, build_model_config, load_and_freeze
from nanorecall.run import load_settings
from nanorecall.settings import ConfigError
from toys import (
    MEMORY_TOY,
    TOY,
    assert_same,
    contents,
    memory_model,
    random_tokens,
    run,
)

# ---- lookup --------------------------------------------------------------------------------------


@given(n=st.integers(1, 9), heads=st.integers(1, 3), data=st.data(), seed=st.integers(0, 2**20), biased=st.booleans())
@settings(max_examples=60, deadline=None)
def test_product_keys_find_the_best_of_all_slots(n, heads, data, seed, biased):
    k = data.draw(st.integers(1, n))
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(4, heads, 2, 3, dtype=torch.double, generator=g).requires_grad_()
    keys = torch.randn(heads, 2, n, 3, dtype=torch.double, generator=g).requires_grad_()
    bias = torch.randn(heads, 2, n, dtype=torch.double, generator=g) if biased else None
    outcomes = []
    for find in (Mem.product_key_topk, Mem.naive_product_key_topk):
        scores, slots = find(q, keys, k, bias)
        order = slots.argsort(-1)
        scores, slots = scores.gather(-1, order), slots.gather(-1, order)
        weight = torch.linspace(1, 2, k, dtype=torch.double)
        outcomes.append((slots, scores, *torch.autograd.grad((scores.softmax(-1) * weight).sum() + scores.sum(), (q, keys))))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    for a, b in zip(outcomes[0][1:], outcomes[1][1:]):
        torch.testing.assert_close(a, b)


def test_values_are_read_as_one_by_one():
    values = torch.randn(20, 4, dtype=torch.double, requires_grad=True)
    slots, weights = torch.randint(20, (7, 6)), torch.randn(7, 6, dtype=torch.double, requires_grad=True)
    outcomes = []
    for read in (Mem.weighted_values, Mem.naive_weighted_values):
        y = read(values, slots, weights)
        outcomes.append((y, *torch.autograd.grad(y.square().sum(), (values, weights))))
    for a, b in zip(*outcomes):
        torch.testing.assert_close(a, b)


# ---- the layer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("score", Mem.SCORES)
@pytest.mark.parametrize("gated, width", [(False, 0), (False, 4), (True, 0), (True, 4)])
def test_a_layer_by_hand(score, gated, width):
    m = memory_model(mem_score=score, mem_gated=gated, mem_v_dim=width).layers[1].memory
    x = torch.randn(2, 3, 16)
    y, found = m(x)
    for b in range(2):
        for t in range(3):
            total = torch.zeros(m.values.shape[1])
            q = m.query(x[b, t]).view(2, 2, 3)
            q = (q - q.mean(-1, keepdim=True)) / (q.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            for h in range(2):
                scores = [float(q[h, 0] @ m.keys[h, 0, i] + q[h, 1] @ m.keys[h, 1, j]) for i in range(5) for j in range(5)]
                best = sorted(range(25), key=scores.__getitem__, reverse=True)[:3]
                assert best == found["slots"][b, t, h].tolist()
                s = torch.tensor([scores[slot] for slot in best])
                w = s.softmax(0) if score == "softmax" else s.sigmoid()
                torch.testing.assert_close(found["weights"][b, t, h], w, rtol=1e-4, atol=1e-5)
                total = total + sum(share * m.values[slot] for share, slot in zip(w, best))
            torch.testing.assert_close(found["output"][b, t], total, rtol=1e-4, atol=1e-5)
            total = total * F.silu(m.gate(x[b, t])) if gated else total
            torch.testing.assert_close(y[b, t], m.out(total) if m.out else total, rtol=1e-4, atol=1e-5)


def test_one_table_inside_a_model_and_none_between_two():
    a, b = (memory_model(memory_layers=(0, 1)) for _ in range(2))
    first, second = a.memory_layers().values()
    assert first.values is second.values and first.keys is not second.keys
    assert b.layers[0].memory.values is not first.values
    with torch.no_grad():
        first.values.add_(1)
    assert not torch.equal(first.values, b.layers[0].memory.values)
    apart = memory_model(memory_layers=(0, 1), mem_share_values=False)
    assert apart.layers[0].memory.values is not apart.layers[1].memory.values
    names = {name for name, _ in a.named_parameters(remove_duplicate=False)}
    assert {"layers.0.memory.keys", "layers.0.memory.values", "layers.1.memory.values"} <= names


def test_softmax_over_one_slot_is_refused_and_two_teach_the_keys():
    with pytest.raises(ConfigError, match="no gradient would reach queries and keys; use sigmoid or mem_knn=2"):
        Mem.Config(mem_knn=1).check()
    for options in (dict(mem_knn=1, mem_score="sigmoid"), dict(mem_knn=2)):
        Mem.Config(**options).check()
        m = memory_model(**options)
        m(random_tokens(2, 6), random_tokens(2, 6, seed=1))[1].backward()
        assert m.layers[1].memory.keys.grad.abs().max() > 0


@pytest.mark.parametrize(
    "words, message",
    [
        ("--mem_knn 33", "mem_knn=33 is more than mem_n_keys=32"),
        ("--mem_k_dim 7", "must be even"),
        ("--memory_layers [4]", r"must lie in 0 to 3"),
        ("--memory_layers [1,1]", "once each"),
        ("--memory_layers []", "must name blocks"),
        ("--use_ffn 0", "use_ffn=1"),
        ("--mem_top1 1", "only memory_router chooses"),
        ("--mem_score tanh", "softmax, sigmoid"),
    ],
)
def test_mistakes_are_named(words, message):
    p = train.parse(["--model=memory"])
    with pytest.raises(ConfigError, match=message):
        p = train.parse(["--model=memory", *words.split()])
        build_model_config(p, p.data_module.Data(p.data))
    with pytest.raises(ConfigError, match="mem_log_interval=5 has no effect: gpt has no memory layers"):
        train.parse(["--mem_log_interval=5"])


# ---- traces and interventions --------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Mem.MemoryGPT, Mem.MemoryRouterGPT])
def test_a_trace_holds_the_reads_and_changes_nothing(cls):
    m, x, y = memory_model(cls, memory_layers=(0, 1)).eval(), random_tokens(2, 6), random_tokens(2, 6, seed=1)
    y[:, :4] = -100
    logits, loss, found = m(x, trace=True)
    assert loss is None and torch.equal(logits, m(x)[0]) and len(found) == 2
    for f in found:
        assert f["slots"].shape == f["weights"].shape == (2, 6, 2, 3) and f["output"].shape == (2, 6, 16)
        torch.testing.assert_close(f["weights"].sum(-1), torch.ones(2, 6, 2))
        assert (f["slots"] >= 0).all() and (f["slots"] < 25).all() and ("route" in f) == (cls is Mem.MemoryRouterGPT)
    scored, loss, at_labels = m(x, y, trace=True)
    torch.testing.assert_close(scored, logits[y != -100], rtol=1e-4, atol=1e-5)
    assert torch.equal(at_labels[1]["slots"], found[1]["slots"][:, 4:])


def test_interventions_change_one_layer():
    m, x = memory_model(memory_layers=(0, 1)).eval(), random_tokens(2, 6)
    clean, _, found = m(x, trace=True)
    unchanged, _ = m(x, intervene={1: lambda f: f})
    assert torch.equal(unchanged, clean)

    def silence(f):
        return {**f, "weights": torch.zeros_like(f["weights"])}

    without = {**found[1], "output": torch.zeros_like(found[1]["output"])}
    assert torch.equal(m(x, intervene={1: silence})[0], m(x, intervene={1: lambda f: without})[0])
    traced = m(x, intervene={1: silence}, trace=True)[2]
    assert torch.equal(traced[0]["output"], found[0]["output"]) and not traced[1]["output"].any()
    unread = next(s for s in range(25) if s not in found[1]["slots"])

    def swap(f):  # a slot that nobody reads, set to another that nobody reads
        return {**f, "slots": torch.where(f["slots"] == unread, 0, f["slots"])}

    assert torch.equal(m(x, intervene={1: swap})[0], clean)


def test_a_router_is_a_weighted_sum_or_one_of_two():
    m, x = memory_model(Mem.MemoryRouterGPT).eval(), torch.randn(2, 3, 16)
    block = m.layers[1]
    share = block.router(x).softmax(-1)
    mlp, read = block.ffn(x), block.memory(x)[0]
    torch.testing.assert_close(block.mlp_or_memory(x, None, None), share[..., :1] * mlp + share[..., 1:] * read)
    block.top1 = True
    first = (share[..., :1] > share[..., 1:]).float()
    torch.testing.assert_close(block.mlp_or_memory(x, None, None), first * share[..., :1] * mlp + (1 - first) * share[..., 1:] * read)
    assert m.layers[0].memory is None and m.layers[0].router is None


# ---- slot usage ----------------------------------------------------------------------------------


def test_usage_by_hand():
    found = Mem.slot_usage(torch.tensor([4, 0, 2, 2]))
    assert found["share"] == 0.75 and found["dead"] == 1 and found["top"][0] == (0, 0.5) and found["top"][1][1] == 0.25
    assert found["kl"] == pytest.approx(math.log(4) - 1.5 * math.log(2))  # log(slots) - entropy
    assert Mem.slot_usage(torch.tensor([3, 3]))["kl"] == 0 and Mem.slot_usage(torch.tensor([0, 9, 0]))["kl"] == pytest.approx(math.log(3))


def test_read_counts_are_those_of_one_step():
    m = memory_model(memory_layers=(0, 1)).train()
    _, _, found = m(random_tokens(2, 6), trace=True)
    report = m.on_step_end(report=True)
    for i in (0, 1):
        slots = found[i]["slots"]
        assert report[str(i)]["share"] == len(slots.unique()) / 25
        assert report[str(i)]["top"][0][1] == pytest.approx(slots.flatten().bincount().max().item() / slots.numel())
        assert not m.layers[i].memory.read_counts.any()
    m.eval()
    m(random_tokens(2, 6))
    assert not any(memory.read_counts.any() for memory in m.memory_layers().values())


def test_load_balancing_evens_out_slot_usage():
    m = memory_model(mem_n_keys=8, mem_balance_rate=0.02).train()
    memory = m.layers[1].memory
    with torch.no_grad():
        memory.keys[:, :, 0] += 2  # one sub-key wins nearly always
        memory.query.bias.fill_(1.0)
    spread = []
    for _ in range(200):
        m(random_tokens(8, 12))
        first = memory.read_counts.view(2, 8, 8).sum(2).float()
        spread.append(float((first.max(-1).values / first.mean(-1)).mean()))
        m.on_step_end()
    assert np.mean(spread[-10:]) < 0.75 * np.mean(spread[:10])
    assert memory.bias.abs().max() > 0 and "layers.1.memory.bias" in m.state_dict()


def test_values_have_their_own_learning_rate_and_do_not_decay():
    groups = train.configure_optimizer(memory_model(mem_value_lr_scale=3.0), train.TrainConfig(weight_decay=0.1)).param_groups
    values = [g for g in groups if g["lr_scale"] == 3.0]
    assert len(values) == 1 and values[0]["weight_decay"] == 0 and [p.shape for p in values[0]["params"]] == [(25, 16)]
    assert all(g["weight_decay"] == (0.1 if g["params"][0].ndim >= 2 else 0) for g in groups if g["lr_scale"] == 1)


# ---- runs ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, changes", [("memory", {"mem_balance_rate": 0.01}), ("memory_router", {"mem_top1": 1})])
def test_a_run_learns_reports_and_resumes_exactly(tmp_path, name, changes):
    options = {**MEMORY_TOY, "model": name, **changes, "lr_schedule": "constant", "eval_interval": 60}
    status, whole = run(tmp_path, "whole", target_accuracy=0.8, max_steps=120, **options)
    assert status == 0
    rows = [r for r in checkpoint.read_log(whole) if r["kind"] == "memory"]
    assert len(rows) == 24 and set(rows[0]["layers"]) == {"0", "1"} and 0 < rows[0]["layers"]["0"]["share"] <= 1
    run(tmp_path, "cut", max_steps=60, **options)
    run(tmp_path, "cut", resume=True, max_steps=120)
    outcomes = [contents(os.path.join(tmp_path, n)) for n in ("cut", "whole")]
    assert_same(*(state["tensors"] for state, _ in outcomes))
    assert_same(*([r for r in log if r["kind"] == "memory"] for _, log in outcomes))


def test_values_that_learn_at_rate_0_stay(tmp_path):
    for rate in (0, 1):
        _, out = run(tmp_path, f"rate{rate}", model="memory", **MEMORY_TOY, mem_value_lr_scale=rate, max_steps=2)
        p = load_settings(out, train.TrainConfig)
        first = build_model(p, build_model_config(p, p.data_module.Data(p.data))).state_dict()["layers.0.memory.values"]
        last = checkpoint.load_checkpoint(out, "ckpt")["tensors"]["model.layers.0.memory.values"]
        assert torch.equal(first, last) == (rate == 0)


def test_ranks_agree(tmp_path, on_ranks):
    options = dict(MEMORY_TOY, model="memory", mem_balance_rate=0.01, max_steps=10, eval_interval=10, mem_log_interval=2)

    def work(parallel):
        return lambda rank: run(tmp_path, parallel, parallel=parallel, **options)[0]

    run(tmp_path, "one", grad_accum_steps=2, **options)
    alone, log = contents(os.path.join(tmp_path, "one"))
    for parallel in ("ddp", "fsdp"):
        assert on_ranks(2, work(parallel)) == [0, 0]
        state, rows = contents(os.path.join(tmp_path, parallel))
        for key, x in alone["tensors"].items():
            torch.testing.assert_close(state["tensors"][key], x, rtol=1e-5, atol=1e-6)
        assert [r for r in rows if r["kind"] == "memory"] == [r for r in log if r["kind"] == "memory"]


def test_dummy_micro_batches_do_not_count_as_reads(tmp_path):
    """One sequence of 64 tokens per step in four micro-batches: three are dummies."""
    options = dict(MEMORY_TOY, model="memory", mem_balance_rate=0.01, max_steps=3, mem_log_interval=1, batch_size=4, eval_interval=3)
    options |= dict(num_kv_pairs=None, train_sizes="[(64,4)]")
    logs = [contents(run(tmp_path, f"a{n}", grad_accum_steps=n, **options)[1])[1] for n in (1, 4)]
    one, four = ([r["layers"] for r in log if r["kind"] == "memory"] for log in logs)
    assert len(one) == 3 and one == four


# ---- editing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls, options", [(Mem.MemoryGPT, {}), (Mem.MemoryGPT, {"mem_v_dim": 24}), (Mem.MemoryRouterGPT, {})])
def test_edits_are_answered_and_undone_to_the_bit(cls, options):
    m = memory_model(cls, mem_n_keys=16, dim=32, **options).eval()
    x, y = random_tokens(5, 6, seed=3), torch.full((5, 6), -100)
    y[:, 3:] = random_tokens(5, 3, seed=4)
    x[:, 4:] = y[:, 3:5]  # each answer is read before the next of its letters
    before = {n: t.clone() for n, t in m.state_dict().items()}
    assert (m(x, y)[0].argmax(-1) != y[y != -100]).any()
    record = editing.edit_facts(m, x, y)
    assert torch.equal(m(x, y)[0].argmax(-1), y[y != -100])
    changed = [n for n, t in m.state_dict().items() if not torch.equal(t, before[n])]
    assert changed == ["layers.1.memory.values"]
    editing.undo_edit(m, record)
    assert all(torch.equal(t, before[n]) for n, t in m.state_dict().items())


def test_a_covariance_protects_other_facts():
    m = memory_model(mem_n_keys=6, dim=32).eval()
    x, y, others = random_tokens(2, 4, seed=3), torch.full((2, 4), -100), random_tokens(30, 4, seed=5)
    y[:, 3] = torch.tensor([1, 2])
    labels = torch.where(torch.arange(4) == 3, others, -100)
    keep = editing.key_second_moment(m, [(others[:15], labels[:15]), (others[15:], labels[15:])])
    torch.testing.assert_close(keep, editing.key_second_moment(m, [(others, labels)]))
    clean, moved = m(others, labels)[0], []
    for k in (None, keep):
        record = editing.edit_facts(m, x, y, covariance=k)
        assert m(x, y)[0].argmax(-1).tolist() == [1, 2]
        moved.append((m(others, labels)[0] - clean).square().sum().item())
        editing.undo_edit(m, record)
    assert moved[1] < 0.8 * moved[0]


def test_what_cannot_be_edited_is_refused():
    for options in (dict(memory_layers=(0,)), dict(mem_gated=True)):
        with pytest.raises(ValueError, match="editing needs a memory layer without gate in the last block"):
            editing.edit_facts(memory_model(**options), random_tokens(1, 4), random_tokens(1, 4))
    with pytest.raises(ValueError, match="editing needs mem_share_values=0"):
        editing.edit_facts(memory_model(memory_layers=(0, 1)), random_tokens(1, 4), random_tokens(1, 4))


# ---- weights -------------------------------------------------------------------------------------


def test_parameters_by_hand():
    """16 wide, 2 blocks: block 0 with an MLP of 64, block 1 with 25 slots read 2 * 3 at a time."""
    rows = {name: numbers for name, *numbers in weights.count_active(memory_model())}
    assert rows["layers.1.memory.values"] == [25 * 16, 6 * 16, 2 * 6 * 16]
    assert rows["layers.1.memory.keys"] == [2 * 2 * 5 * 3] * 2 + [2 * 60] and rows["layers.0.ffn.up.weight"][0] == 64 * 16
    assert rows["embed.weight"] == [11 * 16, 16, 0] and rows["lm_head.weight"][2] == 2 * 11 * 16
    for options in ({}, dict(memory_layers=(0, 1)), dict(tie_weights=True)):
        m = memory_model(**options)
        assert sum(total for _, total, *_ in weights.count_active(m)) == sum(q.numel() for q in m.parameters())
    assert {n: a for n, _, a, _ in weights.count_active(memory_model(memory_layers=(0, 1)))}["layers.0.memory.values"] == 2 * 6 * 16


def test_conversion_as_a_user_starts_it(tmp_path, script):
    """As a script memory.py is another module than the one that models are built from."""
    run(tmp_path, "a", model="memory", **{**MEMORY_TOY, "max_steps": 2})
    run(tmp_path, "g", max_steps=2)
    done = script("memory.py", "convert", tmp_path / "a", tmp_path / "x.pt", "--to", "memory_router")
    assert done.returncode == 0 and "new: layers.0.ffn.up.weight" in done.stdout, done.stderr
    done = script("memory.py", "convert", tmp_path / "g", tmp_path / "y.pt", "--to", "memory")
    assert done.returncode == 2 and "g holds a gpt; only memory and memory_router can be converted" in done.stderr


def test_the_command_line(tmp_path, capsys):
    options = {**MEMORY_TOY, "max_steps": 2}
    run(tmp_path, "a", model="memory", **options)
    run(tmp_path, "b", model="memory", **{**options, "mem_n_keys": 6, "seed": 1})
    a, b, out = str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "x.pt")
    capsys.readouterr()
    assert Mem.main(["params", "--model=memory", "--mem_n_keys=16"]) == 0
    assert re.search(r"layers.1.memory.values +16384 +2048 +4096 +8192", capsys.readouterr().out)
    assert Mem.main(["inspect", a, b]) == 0
    printed = capsys.readouterr().out
    assert "layers.0.memory.values" in printed and "differ: mem_n_keys (rows) or mem_v_dim (columns)" in printed
    assert Mem.main(["convert", a, out, "--to", "memory_router"]) == 0
    assert "new: layers.0.ffn.up.weight" in capsys.readouterr().out
    router = dict(options, model="memory_router", init_from=out)
    p = train.parse([f"--{k}={v}" for k, v in {**TOY, **router, "log_dir": tmp_path}.items()])
    m = build_model(p, build_model_config(p, p.data_module.Data(p.data)))
    load_and_freeze(m, p.train, has_checkpoint=False)
    _, data, before, _ = train.load_run(a, "ckpt")
    x = data.batch("test", 0, range(4))[0]
    torch.testing.assert_close(m.eval()(x)[0], before(x)[0])  # it answers as before
    for words, message in (
        (["convert", a, out, "--to=memory_router"], "exists already"),
        (["convert", a, out + "2", "--to=memory"], "holds a memory already"),
        (["convert", a, out + "2", "--to=gpt"], "must be memory or memory_router"),
        (["convert", a], "name a run and the file"),
        (["inspect"], "name one or two"),
        (["inspect", a, "--to=b"], "inspect takes no --to"),
        (["look", a], "'look' is none of params"),
    ):
        with pytest.raises(ConfigError, match=message):
            Mem.main(words)


def test_the_margin_of_an_edit_is_in_logits_at_any_scale_of_the_norm():
    """By hand: with hidden features of 3, logits are a third of the memory output."""
    reach, hidden = torch.eye(2), torch.full((1, 5), 3.0)
    change = editing.target_updates(reach, hidden, torch.tensor([[1.0, 0.0]]), torch.tensor([1]), margin=2.0)
    torch.testing.assert_close(change, torch.tensor([[-4.5, 4.5]]), rtol=1e-5, atol=1e-5)
    # With features of 0.5, logits are twice the output, so a lead of 3 logits is 1.5 there.
    change = editing.target_updates(reach, hidden / 6, torch.tensor([[1.0, 0.0]]), torch.tensor([1]), margin=2.0)
    torch.testing.assert_close(change, torch.tensor([[-0.75, 0.75]]), rtol=1e-5, atol=1e-5)


def test_frozen_keys_are_not_balanced():
    m = memory_model(mem_balance_rate=0.5, memory_layers=(0, 1))
    frozen, free = m.memory_layers().values()
    frozen.keys.requires_grad_(False)
    for layer in (frozen, free):
        layer.count_reads(torch.zeros(1, layer.keys.shape[0], 1, dtype=torch.long))  # slot 0 alone
    m.on_step_end()
    assert not frozen.bias.any() and not frozen.read_counts.any()
    first = [-0.5] + [0.5] * (free.bias.shape[2] - 1)
    assert free.bias.tolist() == [[first, first]] * len(free.bias)
