"""finetuning.py: which slots are chosen, what is trained, what stays."""

import pytest
import torch

from analysis import finetuning
from analysis.editors import EDITORS, answered
from analysis.finetuning import Reads, choose_slots, reads_of_facts, total_reads
from memory import MemoryRouterGPT
from toys import memory_model, random_tokens

# Facts of six tokens, of which the last two are answers.
B, T = 3, 6


def some_facts(seed, n=B):
    tokens, targets = random_tokens(n, T, seed=seed), torch.full((n, T), -100)
    targets[:, -2:] = random_tokens(n, 2, seed=seed + 100)
    return tokens, targets


def editable(**changes):
    """A model whose last block has 64 slots, read 2 x 3 at a time, beside an MLP."""
    return memory_model(MemoryRouterGPT, mem_n_keys=8, mem_share_values=False, **changes)


# ---- which slots ---------------------------------------------------------------------------------


def test_reads_are_counted_as_a_loop_counts_them():
    model = editable()
    tokens, targets = some_facts(0, n=5)
    counted = reads_of_facts(model, tokens, targets)
    _, _, reads = model(tokens, targets, trace=True)
    by_hand = torch.zeros(5, 64)
    for fact in range(5):
        for slot in reads[-1]["slots"][fact].flatten().tolist():
            by_hand[fact, slot] += 1
    assert torch.equal(counted.float(), by_hand)
    assert counted.sum() == 5 * 2 * 2 * 3  # labels, heads, slots

    total = total_reads(model, tokens, targets, batch_size=2)
    assert torch.equal(total.counts.float(), by_hand.sum(0))
    assert torch.equal(total.facts, (by_hand > 0).sum(0))
    assert total.n_facts == 5


# A new fact reads slot 0 four times, slot 1 three times, slot 2 twice, slot 3 once, slot 4 never.
# Of nine kept facts all read slot 0, four slot 1, none slot 2, and nine slot 3.
READS = torch.tensor([[4, 3, 2, 1, 0]])
KEPT = Reads(torch.tensor([90, 8, 0, 9, 20]), torch.tensor([9, 4, 0, 9, 9]), 9)


def test_tf_idf_by_hand():
    """log(10 / 10) = 0, log(10 / 5) = 0.6931, log(10 / 1) = 2.3026, of 10 reads"""
    scores = finetuning.tf_idf(READS, KEPT)
    hand = [0.4 * 0, 0.3 * 0.693147, 0.2 * 2.302585, 0.1 * 0, 0]
    torch.testing.assert_close(scores, torch.tensor([hand]))
    assert choose_slots(finetuning.tf_idf, READS, KEPT, 2).tolist() == [1, 2]


def test_kl_by_hand():
    """Kept reads with one more each are 91, 9, 1, 10 and 21 of 132."""
    scores = finetuning.kl(READS, KEPT)
    p, q = torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([91, 9, 1, 10]) / 132
    torch.testing.assert_close(scores[0, :4], p * (p.log() - q.log()))
    assert scores[0, 4] == 0
    # Slot 0 has a score below that of slot 4, which the fact does not read.
    assert choose_slots(finetuning.kl, READS, KEPT, 5).tolist() == [0, 1, 2, 3]


def test_the_most_read_slots_are_chosen_by_tf():
    assert choose_slots(finetuning.tf, READS, KEPT, 2).tolist() == [0, 1]


def test_each_fact_has_its_own_slots():
    reads = torch.tensor([[9, 8, 1, 0, 0], [0, 1, 0, 2, 3]])
    assert choose_slots(finetuning.tf, reads, KEPT, 1).tolist() == [0, 4]
    assert choose_slots(finetuning.tf, reads, KEPT, 2).tolist() == [0, 1, 3, 4]


def test_the_control_chooses_any_slots_that_are_read():
    reads = (torch.arange(200) % 2)[None].repeat(50, 1)
    kept = Reads(torch.zeros(200), torch.zeros(200), 1)
    state = torch.get_rng_state()
    chosen = choose_slots(finetuning.random, reads, kept, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert (chosen % 2 == 1).all()
    assert len(chosen) > 60  # of 150 draws from 100


# ---- what is trained -----------------------------------------------------------------------------


@pytest.mark.parametrize("top_slots", [1, 4])
@pytest.mark.parametrize("name", finetuning.SPARSE)
def test_slots_that_are_not_chosen_stay_bit_equal(name, top_slots, monkeypatch):
    chosen = []

    def choose(*arguments):
        chosen.append(choose_slots(*arguments))
        return chosen[-1]

    monkeypatch.setattr(finetuning, "choose_slots", choose)
    model = editable()
    before = {n: q.detach().clone() for n, q in model.named_parameters()}
    finetuning.SPARSE[name](model, *some_facts(0), *some_facts(1), top_slots=top_slots)
    for n, parameter in model.named_parameters():
        assert parameter.requires_grad and parameter.grad is None
        if n != "layers.1.memory.values":
            assert torch.equal(parameter, before[n]), n
    changed = (model.layers[1].memory.values != before["layers.1.memory.values"]).any(1)
    assert torch.equal(changed.nonzero()[:, 0], chosen[0])
    assert 0 < len(chosen[0]) <= B * top_slots


@pytest.mark.parametrize("name", EDITORS)
def test_each_editor_learns_a_few_facts(name):
    """Random models: what an editor may use is no fact that it should keep."""
    model = editable()
    facts = some_facts(0)
    assert not answered(model, *facts).all()
    EDITORS[name](model, *facts, *some_facts(1))
    if name != "fine-tune all weights, replaying others":
        assert answered(model, *facts).all()


def test_with_all_slots_sparse_fine_tuning_is_fine_tuning_of_the_values():
    one, other = editable(), editable()
    facts = (*some_facts(0), *some_facts(1))
    finetuning.fine_tune_values(one, *facts)
    finetuning.sparse_tf(other, *facts, top_slots=64)
    torch.testing.assert_close(one.layers[1].memory.values, other.layers[1].memory.values)
    assert not torch.equal(one.layers[1].memory.values, editable().layers[1].memory.values)


def test_a_tenth_is_replayed():
    replayed = []
    original = finetuning.fine_tune_all_replaying

    def record(model, tokens, targets, kept, kept_targets):
        replayed.append((kept, kept_targets))
        original(model, tokens, targets, kept, kept_targets)

    model, kept = editable(), some_facts(1, n=11)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetuning, "fine_tune_all_replaying", record)
        finetuning.fine_tune_all_replaying_some(model, *some_facts(0), *kept)
    [(tokens, targets)] = replayed
    assert torch.equal(tokens, kept[0][:2]) and torch.equal(targets, kept[1][:2])
    assert answered(model, *some_facts(0)).all()


def test_lora_merged_equals_unmerged(monkeypatch):
    """The last logits of training are those of the model afterwards, with changes of rank 4."""
    seen = []
    fine_tune = finetuning.fine_tune

    def recording(model, parameters, optimizer, facts, forward):
        def keep(tokens, targets):
            logits, loss = forward(tokens, targets)
            seen.append(logits.detach())
            return logits, loss

        fine_tune(model, parameters, optimizer, facts, keep)

    monkeypatch.setattr(finetuning, "fine_tune", recording)
    model, facts = editable(dim=24, ffn_expand_factor=2), some_facts(0)
    before = {n: q.detach().clone() for n, q in model.named_parameters()}
    finetuning.fine_tune_lora(model, *facts, *some_facts(1))
    assert len(seen) > 2 and not torch.allclose(seen[0], seen[-1])
    torch.testing.assert_close(model(*facts)[0], seen[-1])
    for name, parameter in model.named_parameters():
        change = parameter.detach() - before[name]
        if name.split(".")[2:3] in (["att"], ["ffn"]) and parameter.ndim == 2:
            singular = torch.linalg.svdvals(change)
            assert singular[3] > 0 and singular[4] < 1e-5 * singular[0], name
        else:
            assert not change.any(), name


def test_training_ends_when_all_is_learned():
    model, (tokens, targets) = editable(), some_facts(0)
    with torch.no_grad():
        logits = model(tokens, targets)[0]
    targets[targets != -100] = logits.argmax(-1)
    before = model.lm_head.weight.detach().clone()
    finetuning.fine_tune_all(model, tokens, targets, *some_facts(1))
    assert torch.equal(model.lm_head.weight, before)


def test_training_ends_after_200_steps(monkeypatch):
    """The same question with two answers cannot be learned."""
    steps = []
    step = finetuning.SparseAdamW.step
    monkeypatch.setattr(finetuning.SparseAdamW, "step", lambda self: steps.append(step(self)))
    model, (tokens, targets) = editable(), some_facts(0, n=2)
    tokens[1] = tokens[0]
    targets[1, -1] = (targets[0, -1] + 1) % 11
    finetuning.fine_tune_values(model, tokens, targets, *some_facts(1))
    assert len(steps) == 200
