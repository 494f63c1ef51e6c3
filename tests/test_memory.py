"""memory.py, editing and weights: lookup, layers, routing, slot usage, runs, edits, commands."""

import copy
import itertools
import math
import os
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import memory
import train
from analysis import editing, sparsity, weights
from memory import MemoryGPT, MemoryRouterGPT
from nanorecall import checkpoint
from nanorecall.build import build_model, build_model_config, load_and_freeze
from nanorecall.records import read_log
from nanorecall.rng import IGNORE_INDEX
from nanorecall.saved_run import load_settings
from nanorecall.settings import ConfigError
from toys import MEMORY_TOY, TOY, as_flags, assert_same, contents, memory_model, random_tokens, run

# That a run draws its curves is tested in test_progress.py.
pytestmark = pytest.mark.usefixtures("undrawn")

# ---- lookup --------------------------------------------------------------------------------------


@given(
    n=st.integers(1, 9),
    heads=st.integers(1, 3),
    data=st.data(),
    seed=st.integers(0, 2**20),
    biased=st.booleans(),
)
@settings(max_examples=60)
def test_product_keys_find_the_best_of_all_slots(n, heads, data, seed, biased):
    k = data.draw(st.integers(1, n))
    g = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, dtype=torch.double, generator=g)

    q = random(4, heads, 2, 3).requires_grad_()
    keys = random(heads, 2, n, 3).requires_grad_()
    bias = random(heads, 2, n) if biased else None
    outcomes = []
    for topk in (memory.product_key_topk, memory.naive_product_key_topk):
        scores, slots = topk(q, keys, k, bias)
        order = slots.argsort(-1)
        scores, slots = scores.gather(-1, order), slots.gather(-1, order)
        weight = torch.linspace(1, 2, k, dtype=torch.double)
        loss = (scores.softmax(-1) * weight).sum() + scores.sum()
        outcomes.append((slots, scores, *torch.autograd.grad(loss, (q, keys))))
    ours, naive = outcomes
    assert torch.equal(ours[0], naive[0])
    for a, b in zip(ours[1:], naive[1:]):
        torch.testing.assert_close(a, b)


def test_values_are_read_as_one_by_one():
    values = torch.randn(20, 4, dtype=torch.double, requires_grad=True)
    slots = torch.randint(20, (7, 6))
    slot_weights = torch.randn(7, 6, dtype=torch.double, requires_grad=True)
    outcomes = []
    for read in (memory.weighted_values, memory.naive_weighted_values):
        y = read(values, slots, slot_weights)
        outcomes.append((y, *torch.autograd.grad(y.square().sum(), (values, slot_weights))))
    for a, b in zip(*outcomes):
        torch.testing.assert_close(a, b)


# ---- the layer -----------------------------------------------------------------------------------


def layer_by_hand(m, x):
    """Memory layer m (2 heads, 5 x 5 slots, 3 read) on one token x (16,).

    -> for each head its slots (3,) and weights (3,); the memory output; the layer's output
    """
    q = m.query(x).view(2, 2, 3)
    mean, variance = q.mean(-1, keepdim=True), q.var(-1, unbiased=False, keepdim=True)
    q = (q - mean) / (variance + 1e-5).sqrt()
    heads = []
    output = torch.zeros(m.values.shape[1])
    for h in range(2):
        scores = []
        for i, j in itertools.product(range(5), range(5)):
            scores.append((q[h, 0] @ m.keys[h, 0, i] + q[h, 1] @ m.keys[h, 1, j]).item())
        slots = sorted(range(25), key=scores.__getitem__, reverse=True)[:3]
        best = torch.tensor([scores[slot] for slot in slots])
        slot_weights = best.softmax(0) if m.config.mem_score == "softmax" else best.sigmoid()
        heads.append((slots, slot_weights))
        for weight, slot in zip(slot_weights, slots):
            output = output + weight * m.values[slot]
    y = output * F.silu(m.gate(x)) if m.gate else output
    y = m.out(y) if m.out else y
    return heads, output, y


@pytest.mark.parametrize("score", memory.SCORES)
@pytest.mark.parametrize("gated, width", [(False, 0), (False, 4), (True, 0), (True, 4)])
def test_a_layer_by_hand(score, gated, width):
    model = memory_model(mem_score=score, mem_gated=gated, mem_v_dim=width)
    m = model.layers[1].memory
    x = torch.randn(2, 3, 16)
    y, reads = m(x)
    for b, t in itertools.product(range(2), range(3)):
        heads, output, expected = layer_by_hand(m, x[b, t])
        for h, (slots, slot_weights) in enumerate(heads):
            assert reads["slots"][b, t, h].tolist() == slots
            ours = reads["weights"][b, t, h]
            torch.testing.assert_close(ours, slot_weights, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(reads["output"][b, t], output, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(y[b, t], expected, rtol=1e-4, atol=1e-5)


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


def test_softmax_over_one_slot_is_refused():
    message = "no gradient would reach queries and keys; use sigmoid or mem_knn=2"
    with pytest.raises(ConfigError, match=message):
        memory.Config(mem_knn=1).check()


@pytest.mark.parametrize("options", [dict(mem_knn=1, mem_score="sigmoid"), dict(mem_knn=2)])
def test_a_sigmoid_or_two_slots_teach_the_keys(options):
    memory.Config(**options).check()
    m = memory_model(**options)
    _, loss = m(random_tokens(2, 6), random_tokens(2, 6, seed=1))
    loss.backward()
    assert m.layers[1].memory.keys.grad.abs().max() > 0


@pytest.mark.parametrize(
    "flags, message",
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
def test_impossible_settings_are_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        p = train.parse(["--model=memory", *flags.split()])
        build_model_config(p, p.data_module.Data(p.data))


def test_settings_of_memory_layers_need_some():
    message = "mem_log_interval=5 has no effect: gpt has no memory layers"
    with pytest.raises(ConfigError, match=message):
        train.parse(["--mem_log_interval=5"])


# ---- reads and interventions ---------------------------------------------------------------------


@pytest.mark.parametrize("cls", [MemoryGPT, MemoryRouterGPT])
def test_a_trace_holds_the_reads_and_changes_nothing(cls):
    m = memory_model(cls, memory_layers=(0, 1)).eval()
    x, y = random_tokens(2, 6), random_tokens(2, 6, seed=1)
    y[:, :4] = IGNORE_INDEX
    logits, loss, reads = m(x, trace=True)
    assert loss is None and torch.equal(logits, m(x)[0]) and len(reads) == 2
    for layer in reads:
        slots = layer["slots"]
        assert slots.shape == layer["weights"].shape == (2, 6, 2, 3)
        assert layer["output"].shape == (2, 6, 16)
        assert (slots >= 0).all() and (slots < 25).all()
        torch.testing.assert_close(layer["weights"].sum(-1), torch.ones(2, 6, 2))
        assert ("route" in layer) == (cls is MemoryRouterGPT)
    scored, _, at_labels = m(x, y, trace=True)
    torch.testing.assert_close(scored, logits[y != IGNORE_INDEX], rtol=1e-4, atol=1e-5)
    assert torch.equal(at_labels[1]["slots"], reads[1]["slots"][:, 4:])


@pytest.fixture
def two_layers():
    """A model with two memory layers, and what it reads for some tokens."""
    model, tokens = memory_model(memory_layers=(0, 1)).eval(), random_tokens(2, 6)
    logits, _, reads = model(tokens, trace=True)
    return model, tokens, logits, reads


def no_weights(reads):
    return {**reads, "weights": torch.zeros_like(reads["weights"])}


def test_an_intervention_that_changes_nothing(two_layers):
    model, tokens, logits, reads = two_layers
    same, _ = model(tokens, intervene={1: lambda reads: reads})
    assert torch.equal(same, logits)
    unread = next(slot for slot in range(25) if slot not in reads[1]["slots"])

    def swap(reads):  # only where a slot is read that nobody reads
        return {**reads, "slots": torch.where(reads["slots"] == unread, 0, reads["slots"])}

    assert torch.equal(model(tokens, intervene={1: swap})[0], logits)


def test_weights_of_zero_are_an_output_of_zero(two_layers):
    model, tokens, logits, reads = two_layers
    without = {**reads[1], "output": torch.zeros_like(reads[1]["output"])}
    silent, _ = model(tokens, intervene={1: no_weights})
    assert torch.equal(silent, model(tokens, intervene={1: lambda reads: without})[0])
    assert not torch.equal(silent, logits)


def test_an_intervention_changes_its_layer_only(two_layers):
    model, tokens, _, reads = two_layers
    _, _, traced = model(tokens, intervene={1: no_weights}, trace=True)
    assert torch.equal(traced[0]["output"], reads[0]["output"])
    assert not traced[1]["output"].any()


def test_a_router_is_a_weighted_sum_or_one_of_two():
    m, x = memory_model(MemoryRouterGPT).eval(), torch.randn(2, 3, 16)
    block = m.layers[1]
    to_mlp, to_memory = block.router(x).softmax(-1).split(1, dim=-1)
    mlp, read = block.ffn(x), block.memory(x)[0]
    both = block.mlp_or_memory(x, None, None)
    torch.testing.assert_close(both, to_mlp * mlp + to_memory * read)
    block.top1 = True
    one = torch.where(to_mlp > to_memory, to_mlp * mlp, to_memory * read)
    torch.testing.assert_close(block.mlp_or_memory(x, None, None), one)
    assert m.layers[0].memory is None and m.layers[0].router is None


# ---- slot usage ----------------------------------------------------------------------------------


def test_usage_stats_of_four_reads():
    """Two of four reads are of slot 0, and slot 3 is read by none."""
    usage = memory.slot_usage(torch.tensor([2, 1, 1, 0]))
    assert usage["fraction"] == 0.75 and usage["dead"] == 1
    assert usage["top"][0] == (0, 0.5) and usage["top"][1][1] == 0.25
    assert usage["kl"] == pytest.approx(math.log(4) - 1.5 * math.log(2))  # log(slots) - entropy


def test_usage_stats_of_the_most_even_and_the_most_uneven_reads():
    assert memory.slot_usage(torch.tensor([3, 3]))["kl"] == 0
    assert memory.slot_usage(torch.tensor([0, 9, 0]))["kl"] == pytest.approx(math.log(3))


def test_read_counts_are_those_of_one_step():
    m = memory_model(memory_layers=(0, 1)).train()
    _, _, reads = m(random_tokens(2, 6), trace=True)
    report = m.on_step_end(report=True)
    for i in (0, 1):
        slots = reads[i]["slots"]
        most = slots.flatten().bincount().max().item() / slots.numel()
        assert report[str(i)]["fraction"] == len(slots.unique()) / 25
        assert report[str(i)]["top"][0][1] == pytest.approx(most)
        assert not m.layers[i].memory.count_reads().any()
    m.eval()
    m(random_tokens(2, 6))
    assert not any(layer.count_reads().any() for layer in m.memory_layers().values())


def test_load_balancing_evens_out_slot_usage():
    m = memory_model(mem_n_keys=8, mem_balance_rate=0.02).train()
    layer = m.layers[1].memory
    with torch.no_grad():
        layer.keys[:, :, 0] += 2  # one sub-key wins nearly always
        layer.query.bias.fill_(1.0)
    unevenness = []
    for _ in range(200):
        m(random_tokens(8, 12))
        first = layer.count_half_reads()[:, 0].float()
        unevenness.append(float((first.max(-1).values / first.mean(-1)).mean()))
        m.on_step_end()
    assert np.mean(unevenness[-10:]) < 0.75 * np.mean(unevenness[:10])
    assert layer.bias.abs().max() > 0 and "layers.1.memory.bias" in m.state_dict()


def test_frozen_keys_are_not_balanced():
    m = memory_model(mem_balance_rate=0.5, memory_layers=(0, 1))
    frozen, free = m.memory_layers().values()
    frozen.keys.requires_grad_(False)
    for layer in (frozen, free):
        layer.note_reads(torch.zeros(1, layer.keys.shape[0], 1, dtype=torch.long))  # slot 0 alone
    m.on_step_end()
    assert not frozen.bias.any() and not frozen.count_reads().any()
    first = [-0.5] + [0.5] * (free.bias.shape[2] - 1)
    assert free.bias.tolist() == [[first, first]] * len(free.bias)


@pytest.mark.parametrize("most", [3, 9])
def test_reads_count_alike_however_a_batch_is_split(most):
    """Sequences of 0 to 3 or 9 labels, of 12: the last block pads, or computes all tokens."""
    m = memory_model(mem_n_keys=8, memory_layers=(0, 1)).train()
    tokens, targets = random_tokens(8, 12), random_tokens(8, 12, seed=1)
    n_labels = torch.arange(8) * most // 7
    targets[torch.arange(12) >= n_labels[:, None]] = IGNORE_INDEX
    counts = []
    for size in (8, 4, 1):
        for rows in torch.arange(8).split(size):
            m(tokens[rows], targets[rows])
        counts.append([layer.count_reads() for layer in m.memory_layers().values()])
        m.on_step_end()
    c = m.config
    for first, last in counts:
        assert first.sum() == 8 * 12 * c.mem_heads * c.mem_knn
        n_counted = torch.where(2 * n_labels > 12, 12, n_labels).sum()
        assert last.sum() == n_counted * c.mem_heads * c.mem_knn
        assert torch.equal(first, counts[0][0]) and torch.equal(last, counts[0][1])


def test_values_have_their_own_learning_rate_and_do_not_decay():
    model = memory_model(mem_value_lr_scale=3.0)
    groups = train.configure_optimizer(model, train.TrainConfig(weight_decay=0.1)).param_groups
    (values,) = [group for group in groups if group["lr_scale"] == 3.0]
    assert values["weight_decay"] == 0 and [p.shape for p in values["params"]] == [(25, 16)]
    for group in groups:
        if group is not values:
            is_matrix = group["params"][0].ndim >= 2
            assert group["lr_scale"] == 1
            assert group["weight_decay"] == (0.1 if is_matrix else 0)


# ---- runs ----------------------------------------------------------------------------------------

# A block of the delta rule, then one of attention. Their settings take the place of the toy run's.
BLOCKS = {
    "blocks": "['delta dk=16 dv=16 conv_size=2', 'gpt dk=16 dv=16 conv_size=2']",
    **dict.fromkeys(("dk", "dv", "conv_size")),
}


def memory_log(rows):
    return [row for row in rows if row["kind"] == "memory"]


@pytest.mark.parametrize(
    "name, changes",
    [
        ("memory", {"mem_balance_rate": 0.01}),
        ("memory", BLOCKS),
        ("memory_router", {"mem_top1": 1}),
    ],
)
def test_a_run_learns_reports_and_resumes_exactly(tmp_path, name, changes):
    options = {**MEMORY_TOY, "model": name, **changes}
    options |= {"lr_schedule": "constant", "eval_interval": 60}
    status, whole = run(tmp_path, "whole", target_accuracy=0.8, max_steps=120, **options)
    assert status == 0
    rows = memory_log(read_log(whole))
    assert len(rows) == 24 and set(rows[0]["layers"]) == {"0", "1"}
    assert 0 < rows[0]["layers"]["0"]["fraction"] <= 1
    run(tmp_path, "cut", max_steps=60, **options)
    _, cut = run(tmp_path, "cut", resume=True, max_steps=120)
    (cut_state, cut_log), (state, log) = contents(cut), contents(whole)
    assert_same(cut_state["tensors"], state["tensors"])
    assert_same(memory_log(cut_log), memory_log(log))


@pytest.mark.parametrize("scale, stays", [(0, True), (1, False)])
def test_values_that_learn_at_rate_0_stay(tmp_path, scale, stays):
    options = dict(MEMORY_TOY, model="memory", mem_value_lr_scale=scale, max_steps=2)
    _, out = run(tmp_path, **options)
    p = load_settings(out, train.TrainConfig)
    initial = build_model(p, build_model_config(p, p.data_module.Data(p.data)))
    first = initial.state_dict()["layers.0.memory.values"]
    state = checkpoint.load_checkpoint(out, "ckpt")
    last = state["tensors"]["model.layers.0.memory.values"]
    assert torch.equal(first, last) == stays


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("blocks", [{}, BLOCKS], ids=["attention", "delta, attention"])
def test_ranks_agree(tmp_path, on_ranks, parallel, blocks):
    options = dict(MEMORY_TOY, model="memory", mem_balance_rate=0.01, mem_log_interval=2)
    options |= dict(max_steps=10, eval_interval=10, **blocks)
    _, one = run(tmp_path, "one", grad_accum_steps=2, **options)

    def work(rank):
        return run(tmp_path, "two", parallel=parallel, **options)[0]

    assert on_ranks(2, work) == [0, 0]
    (state, log), (two_state, two_log) = contents(one), contents(tmp_path / "two")
    for key, x in state["tensors"].items():
        torch.testing.assert_close(two_state["tensors"][key], x, rtol=1e-5, atol=1e-6)
    assert memory_log(two_log) == memory_log(log)


def test_dummy_micro_batches_do_not_count_as_reads(tmp_path):
    """Three sequences of 64 tokens per step in four micro-batches: one is a dummy, the first again.

    With a single sequence, the fractions of reads would be the same if it counted.
    """
    options = dict(MEMORY_TOY, model="memory", mem_balance_rate=0.01, mem_log_interval=1)
    options |= dict(batch_size=12, num_kv_pairs=None, train_sizes="[(64,4)]")
    options |= dict(max_steps=3, eval_interval=3)
    layers = []
    for n in (1, 4):
        _, out = run(tmp_path, f"a{n}", grad_accum_steps=n, **options)
        layers.append([row["layers"] for row in memory_log(read_log(out))])
    assert len(layers[0]) == 3 and layers[0] == layers[1]


# ---- editing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cls, options",
    [
        (MemoryGPT, {}),
        (MemoryGPT, {"mem_v_dim": 24}),
        (MemoryGPT, {"blocks": ("gated_delta",)}),
        (MemoryRouterGPT, {}),
    ],
)
def test_edits_are_answered_and_change_values_alone(cls, options):
    m = memory_model(cls, mem_n_keys=16, dim=32, **options).eval()
    x, y = random_tokens(5, 6, seed=3), torch.full((5, 6), IGNORE_INDEX)
    y[:, 3:] = random_tokens(5, 3, seed=4)
    x[:, 4:] = y[:, 3:5]  # each answer is read before the next of its letters
    answers = y[y != IGNORE_INDEX]
    before = {name: tensor.clone() for name, tensor in m.state_dict().items()}
    assert (m(x, y)[0].argmax(-1) != answers).any()
    editing.edit_facts(m, x, y)
    assert torch.equal(m(x, y)[0].argmax(-1), answers)
    after = m.state_dict()
    changed = [name for name in before if not torch.equal(after[name], before[name])]
    assert changed == ["layers.1.memory.values"]


def test_a_covariance_protects_other_facts():
    m = memory_model(mem_n_keys=6, dim=32).eval()
    x, y = random_tokens(2, 4, seed=3), torch.full((2, 4), IGNORE_INDEX)
    y[:, 3] = torch.tensor([1, 2])
    others = random_tokens(30, 4, seed=5)
    labels = torch.where(torch.arange(4) == 3, others, IGNORE_INDEX)
    batches = [(others[:15], labels[:15]), (others[15:], labels[15:])]
    every_slot, some_slots = torch.arange(36), torch.tensor([30, 2, 7, 11])
    of_all = editing.key_second_moment(m, batches, every_slot)
    torch.testing.assert_close(of_all, editing.key_second_moment(m, [(others, labels)], every_slot))
    assert (of_all[some_slots][:, some_slots] > 0).any()
    torch.testing.assert_close(
        of_all[some_slots][:, some_slots], editing.key_second_moment(m, batches, some_slots)
    )
    before = m(others, labels)[0]

    def change_of_others(keep):
        weights = copy.deepcopy(m.state_dict())
        editing.edit_facts(m, x, y, keep=keep)
        assert m(x, y)[0].argmax(-1).tolist() == [1, 2]
        change = (m(others, labels)[0] - before).square().sum().item()
        m.load_state_dict(weights)
        return change

    assert change_of_others(batches) < 0.8 * change_of_others([])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(memory_layers=(0,)), "needs a memory layer without gate in the last block"),
        (dict(mem_gated=True), "needs a memory layer without gate in the last block"),
        (dict(memory_layers=(0, 1)), "needs mem_share_values=0"),
    ],
)
def test_what_cannot_be_edited_is_refused(options, message):
    with pytest.raises(ValueError, match=f"editing {message}"):
        editing.edit_facts(memory_model(**options), random_tokens(1, 4), random_tokens(1, 4))


@pytest.mark.parametrize("feature, update", [(3.0, 4.5), (0.5, 0.75)])
def test_the_margin_of_an_edit_is_in_logits_at_any_scale_of_the_norm(feature, update):
    """Token 1 is one logit behind and shall be two ahead: the difference grows by 3.

    With hidden features of 3, a logit is a third of the memory output: that takes 9. With features
    of 0.5, a logit is twice the output: that takes 1.5. Each of the two tokens gives one half.
    """
    hidden = torch.full((1, 5), feature)
    logits, answer = torch.tensor([[1.0, 0.0]]), torch.tensor([1])
    change = editing.target_updates(torch.eye(2), hidden, logits, answer, margin=2.0)
    torch.testing.assert_close(change, torch.tensor([[-update, update]]), rtol=1e-5, atol=1e-5)


# ---- weights -------------------------------------------------------------------------------------


def test_parameters_by_hand():
    """16 wide, 2 blocks: block 0 with an MLP of 64, block 1 with 25 slots read 2 * 3 at a time."""
    rows = {name: numbers for name, *numbers in weights.count_active(memory_model())}
    assert rows["layers.1.memory.values"] == [25 * 16, 6 * 16, 2 * 6 * 16]
    assert rows["layers.1.memory.keys"] == [2 * 2 * 5 * 3, 2 * 2 * 5 * 3, 2 * 60]
    assert rows["layers.0.ffn.up.weight"][0] == 64 * 16
    assert rows["embed.weight"] == [11 * 16, 16, 0]
    assert rows["lm_head.weight"][2] == 2 * 11 * 16


@pytest.mark.parametrize("options", [{}, dict(memory_layers=(0, 1)), dict(tie_weights=True)])
def test_each_parameter_is_counted_once(options):
    m = memory_model(**options)
    total = sum(count for _, count, *_ in weights.count_active(m))
    assert total == sum(p.numel() for p in m.parameters())


def test_a_shared_table_is_active_once_for_each_layer():
    rows = weights.count_active(memory_model(memory_layers=(0, 1)))
    active = {name: count for name, _, count, _ in rows}
    assert active["layers.0.memory.values"] == 2 * 6 * 16


@pytest.mark.parametrize("sparse", [False, True])
def test_bytes_in_training_are_those_of_adamw(sparse):
    m = memory_model(mem_sparse_grad=sparse)
    m.layers[0].requires_grad_(False)
    tokens = random_tokens(2, 12)
    optimizer = train.configure_optimizer(m, train.TrainConfig())
    m(tokens, tokens)[1].backward()
    optimizer.step()
    held = 0
    for q in m.parameters():
        held += q.nbytes
        # A gradient of rows is as large as the reads: it counts as nothing.
        if q.grad is not None and not q.grad.is_sparse:
            held += q.grad.nbytes
    for state in optimizer.state.values():
        held += sum(x.nbytes for x in state.values() if torch.is_tensor(x) and x.ndim > 0)
    assert held == sum(weights.training_bytes(m, name) for name, _ in m.named_parameters())


def test_sparsity_of_a_planted_model():
    """Half of an MLP is 0, one of two heads adds little, and all tokens read the same 3 slots."""
    m = memory_model(ffn_act="none", mem_score="sigmoid")
    first, second = m.layers
    with torch.no_grad():
        first.ffn.up.weight[:32] = 0
        first.att.out_proj.weight[:, 8:] = 0
        second.att.proj_v.weight[8:] = 0.01 * second.att.proj_v.weight[:8]
        layer = second.memory
        layer.query.weight.zero_()
        layer.query.bias[6:] = layer.query.bias[:6]
        layer.keys[1] = layer.keys[0]
    tokens = random_tokens(2, 12)
    is_token = torch.ones_like(tokens, dtype=torch.bool)
    is_token[1, 5:] = False
    one, two = sparsity.measure_sparsity(m, tokens, is_token)
    assert one == {"MLP values": 0.5, "attention heads": 0.5}
    assert two["attention heads"] == 0.5 and two["memory heads"] == 1
    assert two["slots a token"] == two["slots at all"] == 3 / 25


def test_a_head_is_active_if_it_adds_a_tenth_of_the_strongest():
    lengths = torch.tensor([[1.0, 0.11, 0.09], [2.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    assert sparsity.active_heads(lengths) == pytest.approx(4 / 9)


# ---- commands of memory.py -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three short runs: two memory models, b with a larger table, and a GPT."""
    folder = tmp_path_factory.mktemp("runs")
    options = {**MEMORY_TOY, "model": "memory", "max_steps": 2}
    run(folder, "a", **options)
    run(folder, "b", **{**options, "mem_n_keys": 6, "seed": 1})
    run(folder, "gpt", max_steps=2)
    return folder


def test_conversion_as_a_user_starts_it(runs, tmp_path, script):
    """As a script memory.py is another module than the one that models are built from."""
    done = script("memory.py", "convert", runs / "a", tmp_path / "x.pt", "--to", "memory_router")
    assert done.returncode == 0, done.stderr
    assert "new: layers.0.ffn.up.weight" in done.stdout


def test_params_prints_a_table(capsys):
    assert memory.main(["params", "--model=memory", "--mem_n_keys=16"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"layers.1.memory.values +16384 +2048 +4096 +8192 +262144", printed)


def test_params_of_a_run_measures_its_sparsity(runs, capsys):
    assert memory.main(["params", str(runs / "a")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^0( +-)( +\d+\.\d%){4}$", printed, re.M)
    assert memory.main(["params", str(runs / "gpt")]) == 0
    assert re.search(r"^0 +- +\d+\.\d%( +-){3}$", capsys.readouterr().out, re.M)


def test_inspect_compares_two_runs(runs, capsys):
    assert memory.main(["inspect", str(runs / "a"), str(runs / "b")]) == 0
    printed = capsys.readouterr().out
    assert "layers.0.memory.values" in printed
    assert "differ: mem_n_keys (rows) or mem_v_dim (columns)" in printed


def test_a_converted_model_answers_as_before(runs, tmp_path, capsys):
    out = str(tmp_path / "x.pt")
    assert memory.main(["convert", str(runs / "a"), out, "--to", "memory_router"]) == 0
    assert "new: layers.0.ffn.up.weight" in capsys.readouterr().out
    options = {**TOY, **MEMORY_TOY, "model": "memory_router", "init_from": out}
    p = train.parse(as_flags({**options, "log_dir": tmp_path}))
    router = build_model(p, build_model_config(p, p.data_module.Data(p.data)))
    load_and_freeze(router, p.train, has_checkpoint=False)
    _, data, before, _ = train.load_run(str(runs / "a"), "ckpt")
    x, _, _ = data.batch("test", 0, range(4))
    torch.testing.assert_close(router.eval()(x)[0], before(x)[0])


@pytest.mark.parametrize(
    "args, message",
    [
        (["convert", "A", "OLD", "--to=memory_router"], "exists already"),
        (["convert", "A", "NEW", "--to=memory"], "holds a memory already"),
        (["convert", "GPT", "NEW", "--to=memory"], "a gpt; only memory and memory_router can be"),
        (["convert", "A", "NEW", "--to=gpt"], "must be memory or memory_router"),
        (["convert", "A"], "name a run and the file"),
        (["inspect"], "name one or two"),
        (["inspect", "A", "--to=b"], "inspect takes no --to"),
        (["look", "A"], "'look' is none of params"),
    ],
)
def test_commands_that_cannot_be_are_refused(runs, tmp_path, args, message):
    (tmp_path / "old.pt").touch()
    paths = {"A": runs / "a", "GPT": runs / "gpt"}
    paths |= {"OLD": tmp_path / "old.pt", "NEW": tmp_path / "new.pt"}
    with pytest.raises(ConfigError, match=message):
        memory.main([str(paths.get(arg, arg)) for arg in args])
    assert not os.path.exists(paths["NEW"])
