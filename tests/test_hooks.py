"""analysis/hooks.py: sampling of examples, ablation of slots and heads, hooks.

The naive twin of an ablation is a forward pass of the whole model.
"""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import delta
import memory
from analysis import hooks
from analysis.ablation import (
    ABLATIONS,
    KEY_ABLATIONS,
    SELECTING_ABLATIONS,
    SlotAblation,
    measure_slots,
    noise_keys,
)
from model import GPT, NORMS, Config
from nanorecall.distributed import SINGLE_PROCESS
from nanorecall.settings import ConfigError
from planted import N_SLOTS, VARIANTS, planted_facts
from toys import ABLATION_SIZES, ablation_model, some_examples


@pytest.fixture(params=VARIANTS)
def model(request):
    return ablation_model(**VARIANTS[request.param])


# ---- examples ------------------------------------------------------------------------------------


def test_examples_of_the_most_frequent_shape_are_loaded():
    """9 is padding. Two of three examples have 4 tokens and 2 labels."""
    tokens = torch.tensor([[1, 2, 3, 9], [1, 2, 3, 4], [4, 3, 2, 1]])
    targets = torch.tensor([[-100, 5, -100, -100], [-100, 6, -100, 7], [8, -100, 9, -100]])
    slices = {"s": np.array([0, 1, 1, 2, 2]), "of a label": np.array([0, 0, 1, 0, 1])}
    data = SimpleNamespace(batch=lambda split, step, indices: (tokens, targets, slices))
    run = SimpleNamespace(data=data, config=SimpleNamespace(split="test"), pad=9, device="cpu")
    examples, n_others = hooks.load_examples(run, np.array([10, 11, 12]))
    assert n_others == 1 and examples.indices.tolist() == [11, 12]
    assert examples.label_pos.tolist() == [[1, 3], [0, 2]]
    assert examples.answers.tolist() == [[6, 7], [8, 9]]
    assert examples.slices.keys() == {"s"} and examples.slices["s"].tolist() == [1, 2]


def planted_run(groups, n_examples, seed=0, wrong=()):
    """A run of the planted model on one example for each group, which answers all but `wrong`."""
    model, facts = planted_facts()
    groups = np.array(groups)

    def batch(split, step, indices):
        fact = np.asarray(indices) % len(facts)
        targets = torch.full_like(facts.tokens[fact], -100)
        targets[:, 1] = facts.answers[fact, 0]
        targets[np.isin(indices, wrong), 1] = 0
        return facts.tokens[fact], targets, {"group": groups[indices]}

    data = SimpleNamespace(batch=batch, eval_groups=lambda split: [np.arange(len(groups))])
    config = SimpleNamespace(split="test", eval_batch_size=7, n_examples=n_examples, seed=seed)
    return SimpleNamespace(
        model=model,
        data=data,
        config=config,
        world=SINGLE_PROCESS,
        pad=-1,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def test_sampled_examples_are_answered_correctly():
    run = planted_run([0] * 12, n_examples=0, wrong=[2, 11])
    examples = hooks.sample_correct_examples(run)
    assert sorted(examples.indices) == [0, 1, 3, 4, 5, 6, 7, 8, 9, 10]
    logits = hooks.run_with_cache(run.model, examples).logits
    assert (logits.argmax(-1) == examples.answers).all()


@pytest.mark.parametrize("n_examples, n_rare", [(1, 0), (6, 3), (29, 3), (30, 3), (31, 3), (0, 3)])
def test_samples_are_balanced_over_groups(n_examples, n_rare):
    """27 examples of one group, 3 of another."""
    examples = hooks.sample_correct_examples(planted_run([0] * 27 + [1] * 3, n_examples))
    assert len(examples) == min(30, n_examples or 30)
    assert (examples.slices["group"] == 1).sum() >= n_rare
    assert np.array_equal(examples.slices["group"], examples.indices >= 27)


def test_samples_are_drawn_by_the_seed():
    sampled = []
    for seed in (0, 0, 1):
        run = planted_run([0] * 27 + [1] * 3, n_examples=6, seed=seed)
        sampled.append(sorted(hooks.sample_correct_examples(run).indices))
    assert sampled[0] == sampled[1] != sampled[2]


class BoundedBlock(memory.MemoryBlock):
    def forward(self, *args, **options):
        return super().forward(*args, **options).tanh()


class BoundedModel(memory.MemoryGPT):
    def forward(self, *args, **options):
        logits, *others = super().forward(*args, **options)
        return 0.5 * (2 * logits).tanh(), *others


def test_a_fork_with_another_forward_pass_is_not_ablated():
    """What would be measured is not its model."""
    hooks.run_with_cache(ablation_model(), some_examples())
    message = "its blocks, computed one after another as in memory.py, do not give its logits"
    with pytest.raises(ConfigError, match=message):
        hooks.run_with_cache(ablation_model(BoundedModel), some_examples())
    for block in (0, 2):
        model = ablation_model()
        model.layers[block].__class__ = BoundedBlock
        with pytest.raises(ConfigError, match=message):
            hooks.run_with_cache(model, some_examples())


def test_samples_are_of_one_eval_group(capsys):
    """Sequences of two lengths do not fit in one batch. 9 of 12 correct ones are in group 1."""
    run = planted_run([0] * 4 + [1] * 9, n_examples=5, wrong=[2])
    run.data.eval_groups = lambda split: [range(0, 4), range(4, 13)]
    assert set(hooks.sample_correct_examples(run).indices) <= set(range(4, 13))
    assert "3 of other shapes left out" in capsys.readouterr().out


def test_fewer_than_four_correct_examples_are_refused():
    with pytest.raises(ConfigError, match="only 3 examples of test are answered correctly"):
        hooks.sample_correct_examples(planted_run([0] * 5, n_examples=0, wrong=[1, 2]))


def test_logit_diff_of_three_answers():
    """1 is 0.5 ahead of 0.5. An answer with the same logit as another token counts as wrong."""
    scores = torch.tensor([[0.5, 1.0, -2.0], [3.0, 3.0, 0.0], [0.0, 2.0, 5.0]])
    diff, p, correct = hooks.logit_diff(scores, torch.tensor([1, 0, 1]))
    assert diff.tolist() == [0.5, 0, -3] and correct.tolist() == [True, False, False]
    torch.testing.assert_close(p, torch.tensor([1.0, 3.0, 2.0]).exp() / scores.exp().sum(1))


# ---- forward passes from a memory layer on -------------------------------------------------------


@torch.no_grad()
def test_forward_from_a_block_equals_full_forward(model):
    examples = some_examples()
    clean = hooks.run_with_cache(model, examples)
    logits = hooks.select_positions(model(examples.tokens)[0], examples.label_pos)
    torch.testing.assert_close(clean.logits, logits)
    for block, resid_mid in clean.resid_mid.items():
        reads = slots_and_weights(clean.reads[block])
        again = hooks.forward_from(model, block, resid_mid, reads, examples.label_pos)
        torch.testing.assert_close(again, logits)


def slots_and_weights(reads):
    return {"slots": reads["slots"], "weights": reads["weights"]}


# ---- ablation of slots ---------------------------------------------------------------------------


def naive_ablation(layer, ablation, slot, new_slot):
    """One slot ablated, from the definition, as forward(intervene=) takes it; not next_best."""

    def intervene(reads):
        slots, weights = reads["slots"].clone(), reads["weights"].clone()
        ablated = slots == slot
        if ablation in ("random", "resample"):
            slots[ablated] = new_slot
            return {"slots": slots, "weights": weights}
        values = layer.values[slots]
        if ablation == "mean":
            values[ablated] = layer.values.mean(0)
            return {**reads, "output": (values * weights[..., None]).sum((-2, -3))}
        weights[ablated] = 0
        return {"slots": slots, "weights": weights}

    return intervene


def naive_selection(layer, x, slot, ablation):
    """Reads of x (1, T, D) if one slot has another score, or none: the scores of all, sorted."""
    c = layer.config
    q = NORMS[c.mem_query_norm](layer.query(x).unflatten(-1, (c.mem_heads, 2, -1)))

    def slot_scores(keys):
        return all_slots(torch.einsum("bthse,hske->bthsk", q, keys))

    scores = slot_scores(layer.keys)
    if ablation == "next_best":
        scores[..., slot] = -torch.inf
    elif ablation == "key_zero":
        scores[..., slot] = 0
    else:
        scores[..., slot] = slot_scores(noise_keys(layer, seed=5))[..., slot]
    ranking = scores if layer.bias is None else scores + all_slots(layer.bias)
    slots = ranking.topk(c.mem_knn, dim=-1).indices
    return {"slots": slots, "weights": memory.SCORES[c.mem_score](scores.gather(-1, slots))}


def all_slots(half_scores):
    """Scores of both halves (..., 2, n) -> of all slots (..., n * n)."""
    return (half_scores[..., 0, :, None] + half_scores[..., 1, None, :]).flatten(-2)


def naive_logits(model, block, ablation, tokens, slot, new_slot):
    """Logits (1, T, vocabulary) of the whole model without one slot of one block."""
    layer = model.memory_layers()[block]
    intervene = naive_ablation(layer, ablation, slot, new_slot)
    inputs = []
    if ablation in SELECTING_ABLATIONS:

        def intervene(reads):
            return naive_selection(layer, inputs[0], slot, ablation)

    def keep(module, _, output):
        inputs.append(output)

    with hooks.hooked([(model.layers[block].ffn_norm, "after", keep)]):
        return model(tokens, intervene={block: intervene})[0]


@torch.no_grad()
@pytest.mark.parametrize("ablation", ABLATIONS)
def test_a_batch_of_ablations_equals_one_full_forward_each(model, ablation):
    """Every slot of the table, in one batch of copies of one example."""
    examples = some_examples(B=1)
    clean = hooks.run_with_cache(model, examples)
    copy = torch.zeros(N_SLOTS, dtype=torch.long)
    slot, new_slot = torch.arange(N_SLOTS), torch.arange(N_SLOTS).roll(7)
    for block, layer in model.memory_layers().items():
        resid_mid = clean.resid_mid[block][copy]
        reads = {}
        for name, x in slots_and_weights(clean.reads[block]).items():
            reads[name] = x[copy]
        x = model.layers[block].ffn_norm(resid_mid)
        lookup = (layer.half_queries(x), noise_keys(layer, seed=5))
        change = SlotAblation(
            layer, reads, slot, layer.topk_slots(x, 4), new_slot, new_slot, *lookup
        )
        changed = ABLATIONS[ablation](change)
        label_pos = examples.label_pos[copy]
        logits = hooks.forward_from(model, block, resid_mid, changed, label_pos)
        for i in range(N_SLOTS):
            naive = naive_logits(model, block, ablation, examples.tokens, slot[i], new_slot[i])
            torch.testing.assert_close(logits[i], naive[0, examples.label_pos[0]])
        assert not torch.allclose(logits, clean.logits.expand_as(logits))


@torch.no_grad()
@pytest.mark.parametrize("ablation", ["zero", "mean", "next_best", "key_zero", "key_noise"])
def test_measured_drops_equal_full_forwards(model, ablation):
    """What `ablate.py keys` measures in batches of 7, against a full forward pass each."""
    examples = some_examples(B=2)
    n = examples.label_pos.shape[1]
    columns = measure_slots(model, examples, [ablation], 7, seed=5)
    clean = hooks.run_with_cache(model, examples)
    clean_diff, _, _ = hooks.logit_diff(clean.logits, examples.answers)
    for i in range(0, len(columns["slot"]), n):
        example, slot, block = columns["example"][i], columns["slot"][i], columns["layer"][i]
        tokens = examples.tokens[example][None]
        logits = naive_logits(model, block, ablation, tokens, slot, None)
        logits = logits[0, examples.label_pos[example]]
        diff, p, _ = hooks.logit_diff(logits, examples.answers[example])
        of_labels = slice(i, i + n)
        drop = clean_diff[example] - diff
        np.testing.assert_allclose(columns["drop"][of_labels], drop, atol=1e-4)
        np.testing.assert_allclose(columns["p"][of_labels], p, atol=1e-5)
    # A control in each example and block, which changes nothing unless a new key attracts queries.
    assert columns["control"].sum() == 2 * 2 * n and len(columns["slot"]) > 20 * n
    if ablation not in KEY_ABLATIONS:
        np.testing.assert_allclose(columns["drop"][columns["control"]], 0, atol=1e-5)


@pytest.mark.parametrize("ablation, new_slot", [("random", 11), ("resample", 12)])
def test_random_and_resample_replace_one_slot(ablation, new_slot):
    slots = torch.tensor([[[[3, 4], [3, 7]]]])
    weights = torch.tensor([[[[0.5, 0.5], [0.9, 0.1]]]])
    one = [torch.tensor([x]) for x in (3, 11, 12)]
    reads = {"slots": slots, "weights": weights}
    change = SlotAblation(None, reads, one[0], None, *one[1:])
    changed = ABLATIONS[ablation](change)
    assert changed["slots"].flatten().tolist() == [new_slot, 4, new_slot, 7]
    assert torch.equal(changed["weights"], weights)


@torch.no_grad()
@pytest.mark.parametrize("ablation", sorted(set(ABLATIONS) - set(KEY_ABLATIONS)))
def test_ablation_of_a_slot_that_is_not_read_is_exact_identity(model, ablation):
    examples = some_examples(B=1)
    clean = hooks.run_with_cache(model, examples)
    for block, layer in model.memory_layers().items():
        resid_mid, reads = clean.resid_mid[block], slots_and_weights(clean.reads[block])
        unread = np.setdiff1d(np.arange(N_SLOTS), reads["slots"].unique())
        one = [torch.tensor([x]) for x in (unread[0], 1, 2)]
        best = layer.topk_slots(model.layers[block].ffn_norm(resid_mid), 4)
        change = SlotAblation(layer, reads, one[0], best, *one[1:])
        changed = ABLATIONS[ablation](change)
        before = hooks.forward_from(model, block, resid_mid, reads, examples.label_pos)
        after = hooks.forward_from(model, block, resid_mid, changed, examples.label_pos)
        if ablation == "next_best":
            # Its weights are computed again from the scores, so they may be rounded otherwise.
            torch.testing.assert_close(before, after)
        else:
            assert torch.equal(before, after)


# ---- hooks ---------------------------------------------------------------------------------------


def gpt():
    return GPT(Config(**ABLATION_SIZES)).eval()


def delta_net():
    return delta.DeltaNet(delta.Config(**ABLATION_SIZES)).eval()


@torch.no_grad()
@pytest.mark.parametrize("build", [gpt, ablation_model, delta_net])
@pytest.mark.parametrize("block, head", [(0, 1), (2, 0)])
def test_ablating_a_head_equals_zero_columns_of_out_proj(build, block, head):
    model, examples = build(), some_examples()
    mixer = model.layers[block].att
    hook = hooks.ablate_head(mixer.out_proj, mixer.n_heads, head)
    ablated = hooks.run_with_hooks(model, examples, [hook])
    assert not torch.allclose(ablated, hooks.run_with_hooks(model, examples))
    mixer.out_proj.weight.unflatten(1, (mixer.n_heads, -1))[:, head] = 0
    torch.testing.assert_close(ablated, hooks.run_with_hooks(model, examples))


@torch.no_grad()
def test_a_run_patched_at_all_hook_points_of_another_gives_its_logits(model):
    a, b = some_examples(seed=1), some_examples(seed=2)
    b.label_pos = a.label_pos
    points = []
    for name, modules in hooks.hook_points(model).items():
        for block, module in modules.items():
            points.append((name, block, module))
    assert {name for name, _, _ in points} >= {"resid_pre", "mixer", "memory"}
    activations = {}

    def cache(key, x):
        activations[key] = x
        return x

    def patch(key, x):
        return activations[key]

    def run(examples, change):
        changes = []
        for name, block, module in points:
            changes.append(hooks.hook_output(name, module, partial(change, (name, block))))
        return hooks.run_with_hooks(model, examples, changes)

    logits = run(a, cache)
    assert torch.equal(logits, hooks.run_with_hooks(model, a))
    assert torch.equal(run(a, patch), logits)
    assert torch.equal(run(b, patch), logits)
    assert not torch.allclose(hooks.run_with_hooks(model, b), logits)


def test_hooks_are_removed_after_an_exception(model):
    def fail(*_):
        raise RuntimeError("on purpose")

    def leave(*_):
        return None

    changes = [(model.layers[1].att, "after", fail), (model.layers[0], "before", leave)]
    with pytest.raises(RuntimeError, match="on purpose"):
        hooks.run_with_hooks(model, some_examples(), changes)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    hooks.run_with_hooks(model, some_examples())
