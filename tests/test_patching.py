"""analysis/patching.py: interchange interventions and activation patching, by hand, against full
forward passes, and on a model of which the slot of each fact is known."""

import numpy as np
import pytest
import torch

from analysis import hooks, patching
from eval import greedy_decode
from planted import planted_facts
from toys import ablation_model, some_examples

# ---- pairs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, n_pairs",
    [("any", 30), ("less_less", 6), ("more_more", 6), ("less_more", 9), ("more_less", 9)],
)
def test_pairs_by_exposures(kind, n_pairs):
    """Exposures 0 to 5: three examples are above the median."""
    examples = some_examples(B=6)
    base, source = patching.draw_pairs(examples, 0, kind, 0)
    assert len(base) == n_pairs and (base != source).all()
    names = patching.name_exposure_pairs(examples.slices["exposures"], base, source)
    assert kind == "any" or set(names) == {kind}


def test_drawn_pairs_are_different():
    base, source = patching.draw_pairs(some_examples(B=6), 5, "any", 0)
    assert len({*zip(base.tolist(), source.tolist())}) == 5


def test_a_control_answer_is_neither_of_both():
    def control(base, source, alphabet):
        arrays = [np.array(x) for x in (base, source, alphabet)]
        return patching.control_answers(*arrays, seed=0).tolist()

    assert control([1, 2], [2, 3], [1, 2, 3]) == [3, 1]
    assert control([1], [2], [1, 2]) == [-1]


# ---- interchange of reads ------------------------------------------------------------------------


def test_force_inject_swap_on_two_heads():
    base = {
        "slots": torch.tensor([[[1, 2, 3], [4, 5, 6]]]),
        "weights": torch.tensor([[[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]]]),
    }
    source = {
        "slots": torch.tensor([[[7, 8, 9], [10, 11, 12]]]),
        "weights": torch.tensor([[[0.6, 0.3, 0.1], [0.2, 0.7, 0.1]]]),
    }
    forced = patching.force(base, source, torch.tensor([1]))
    assert forced["slots"].tolist() == [[[1, 2, 3], [11, 11, 11]]]
    assert torch.equal(forced["weights"], base["weights"])
    # Weight 0.5 reads the source's best slot, 0.3 its second, 0.2 its third.
    swapped = patching.swap(base, source, None)
    assert swapped["slots"][0, 0].tolist() == [9, 7, 8]
    assert torch.equal(swapped["weights"], base["weights"])
    assert patching.inject(base, source, None) is source
    assert patching.strongest_slot(base).tolist() == [6]


@torch.no_grad()
def test_replace_changes_every_read_of_the_slot():
    """Two examples, each the other's source, at their third label, in block 0."""
    model, examples = ablation_model(), some_examples()
    clean = hooks.run_with_cache(model, examples)
    base, answer_pos = torch.tensor([0, 1]), torch.tensor([2, 2])
    logits = patching.forward_with_interchange(
        model, examples, clean, 0, "replace", base, base.flip(0), answer_pos, None
    )
    strongest = []
    for b in range(2):
        at_label = ([b], examples.label_pos[b, 2][None])
        reads = hooks.index_reads(clean.reads[0], at_label)
        strongest.append(patching.strongest_slot(reads))
    for b in range(2):

        def replace(reads, old=strongest[b], new=strongest[1 - b]):
            slots = torch.where(reads["slots"] == old, new, reads["slots"])
            return {"slots": slots, "weights": reads["weights"]}

        naive = model(examples.tokens[b][None], intervene={0: replace})[0]
        torch.testing.assert_close(logits[b], naive[0, examples.label_pos[b, 2]])


@pytest.mark.parametrize("name", ["force", "inject", "replace", "swap"])
def test_interchange_carries_the_fact(name):
    model, examples = planted_facts()
    base, source = patching.draw_pairs(examples, 0, "any", 0)
    assert len(base) == 9 * 8
    columns = patching.interchange_effects(model, examples, base, source, name)
    assert columns["source_answer"].all() and columns["base_lost"].all()
    assert not columns["control_answer"].any()
    assert (columns["p_source"] > columns["p_source_clean"]).all() and (columns["drop"] > 0).all()


@torch.no_grad()
def test_interchange_with_itself_is_identity():
    model, examples = ablation_model(), some_examples()
    examples.label_pos = torch.arange(4, 7).expand(6, -1)  # answers of three tokens in a row
    clean = hooks.run_with_cache(model, examples)
    itself = torch.arange(6)
    interventions = patching.interchange_reads(clean, examples, itself, itself)
    logits = hooks.run_with_hooks(model, examples, intervene=interventions)
    torch.testing.assert_close(logits, clean.logits)

    def leave(reads):
        return reads

    decoded = patching.decode_with(model, examples, dict.fromkeys(clean.reads, leave))
    assert torch.equal(decoded, greedy_decode(model, examples.tokens[:, :5], 3))


# ---- activation patching -------------------------------------------------------------------------


def test_activation_patching_finds_memory_at_the_label():
    model, clean = planted_facts()
    corrupted = clean.select(np.roll(np.arange(9), 1))
    recovered, clean_diff, corrupted_diff = patching.activation_patching(model, clean, corrupted)
    assert (clean_diff > 0).all() and (corrupted_diff < 0).all()
    np.testing.assert_allclose(recovered["memory", 0][1], 1, atol=1e-4)
    np.testing.assert_allclose(recovered["resid_pre", 0][1], 1, atol=1e-4)
    np.testing.assert_allclose(recovered["memory", 0][0], 0, atol=1e-4)
    np.testing.assert_allclose(recovered["mixer", 0], 0, atol=1e-4)
