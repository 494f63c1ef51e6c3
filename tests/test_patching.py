"""analysis/patching.py: interchange interventions and activation patching, by hand, against full
forward passes, and on a model of which the slot of each fact is known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from analysis import hooks, patching
from analysis.decoding import greedy_decode
from nanorecall.settings import ConfigError
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


def test_high_exposures_are_above_the_median():
    """Of exposures 1, 4, 4, 4 and 9 only 9 is high."""
    exposures = np.array([1, 4, 4, 4, 9])
    examples = some_examples(B=5)
    examples.slices = {"exposures": exposures}
    for kind, n_pairs in (("less_less", 12), ("less_more", 4), ("more_less", 4)):
        assert len(patching.draw_pairs(examples, 0, kind, 0)[0]) == n_pairs
    with pytest.raises(ConfigError, match="there is no such pair"):
        patching.draw_pairs(examples, 0, "more_more", 0)
    base, source = np.array([0, 4, 1]), np.array([1, 3, 4])
    names = patching.name_exposure_pairs(exposures, base, source)
    assert names.tolist() == ["less_less", "more_less", "less_more"]


def test_pairs_are_drawn_by_the_seed_without_repetition():
    drawn = []
    for seed in (1, 1, 2):
        base, source = patching.draw_pairs(some_examples(B=6), 25, "any", seed)
        drawn.append(list(zip(base.tolist(), source.tolist())))
    assert len(set(drawn[0])) == 25
    assert drawn[0] == drawn[1] != drawn[2]


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
def test_effects_of_inject_equal_full_forwards():
    """One pair: example 0 reads in one block what example 1 reads at its label. All columns."""
    model, examples = ablation_model(mem_share_values=False), some_examples(B=2)
    examples.answers[:, 1] = examples.answers[0, 1]  # the same answer: left out
    pair = np.array([0]), np.array([1])
    columns = patching.interchange_effects(model, examples, *pair, "inject", seed=3)
    assert columns["layer"].tolist() == [0, 0, 2, 2]
    assert columns["answer_pos"].tolist() == [0, 2, 0, 2]
    assert (columns["example"] == 0).all() and (columns["source_example"] == 1).all()
    clean_logits, _, reads = model(examples.tokens, trace=True)
    reads = dict(zip((0, 2), reads))
    answers = examples.answers.numpy()
    base_answers, source_answers = answers[:, [0, 2]]
    control = patching.control_answers(base_answers, source_answers, np.unique(answers), 3)
    for i, (block, k) in enumerate(zip(columns["layer"], columns["answer_pos"])):
        base_pos, source_pos = examples.label_pos[:, k]
        base_answer, source_answer = answers[:, k]

        def inject(base_reads, block=block, base_pos=base_pos, source_pos=source_pos):
            changed = {}
            for part in ("slots", "weights"):
                changed[part] = base_reads[part].clone()
                changed[part][0, base_pos] = reads[block][part][1, source_pos]
            return changed

        before = clean_logits[0, base_pos]
        after = model(examples.tokens[:1], intervene={block: inject})[0][0, base_pos]
        prediction = after.argmax()
        assert columns["prediction"][i] == prediction
        assert columns["source_answer"][i] == (prediction == source_answer)
        assert columns["control_answer"][i] == (prediction == control[k // 2])
        assert columns["base_lost"][i] == (prediction != base_answer)
        others = np.delete(np.arange(11), base_answer)
        diff_before = before[base_answer] - before[others].max()
        diff_after = after[base_answer] - after[others].max()
        assert columns["drop"][i] == pytest.approx(float(diff_before - diff_after), abs=1e-4)
        for name, logits in (("p_source", after), ("p_source_clean", before)):
            p = float(logits.softmax(0)[source_answer])
            assert columns[name][i] == pytest.approx(p, abs=1e-5)


def test_match_rates_count_where_base_and_source_differ():
    columns = {
        "example": np.array([0, 0, 1, 1]),
        "answer_pos": np.array([0, 1, 0, 1]),
        "answer": np.array([3, 4, 3, 5]),
        "source_answer_token": np.array([3, 5, 4, 5]),
        "predicted": np.array([3, 5, 3, 5]),
    }
    rates = patching.match_rates(columns, "predicted", "source_answer_token", "answer_pos")
    assert rates.keys() == {"0", "1"}
    assert (rates["0"]["value"], rates["0"]["n"]) == (0, 1)
    assert (rates["1"]["value"], rates["1"]["n"]) == (1, 1)


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


def test_a_corrupted_mqar_sequence_has_another_value_everywhere():
    """Keys are below 6, values from 6 on; the first queried key has value 6 or 9."""
    run = SimpleNamespace(data=SimpleNamespace(vocab_size=12))
    tokens = torch.tensor([[1, 6, 2, 7, 1, 0], [1, 8, 3, 9, 3, 0]] * 20)
    label_pos, answers = torch.tensor([[4]] * 40), torch.tensor([[6], [9]] * 20)
    examples = hooks.Examples(np.arange(40), tokens, label_pos, answers, {})
    clean, corrupted = patching.corrupt(run, examples, 0)
    assert clean is examples and torch.equal(clean.tokens, tokens)
    old, new = answers, corrupted.answers
    assert torch.equal(corrupted.tokens, torch.where(tokens == old, new, tokens))
    assert (new >= 6).all() and not (tokens == new).any()
    _, same_seed = patching.corrupt(run, examples, 0)
    _, other_seed = patching.corrupt(run, examples, 1)
    assert torch.equal(same_seed.answers, new) and not torch.equal(other_seed.answers, new)


def test_activation_patching_finds_memory_at_the_label():
    model, clean = planted_facts()
    corrupted = clean.select(np.roll(np.arange(9), 1))
    recovered, clean_diff, corrupted_diff = patching.activation_patching(model, clean, corrupted)
    assert (clean_diff > 0).all() and (corrupted_diff < 0).all()
    np.testing.assert_allclose(recovered["memory", 0][1], 1, atol=1e-4)
    np.testing.assert_allclose(recovered["resid_pre", 0][1], 1, atol=1e-4)
    np.testing.assert_allclose(recovered["memory", 0][0], 0, atol=1e-4)
    np.testing.assert_allclose(recovered["mixer", 0], 0, atol=1e-4)
