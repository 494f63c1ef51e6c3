"""analysis/patching.py: activation patching, on models of which the answer is known."""

from types import SimpleNamespace

import numpy as np
import torch

from analysis import hooks, patching
from planted import planted_facts


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
