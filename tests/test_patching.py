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


def test_roles_of_positions():
    """The query 3 at position 5; its key is stored at 2. Fractions are 1 at its value, 3."""
    tokens = np.array([[7, 9, 3, 8, 0, 3], [3, 9, 7, 8, 3, 0]])
    roles = patching.mqar_roles(tokens, np.array([5, 4]))
    assert roles[0].tolist() == ["others", "others", "asked key", "its value", "others", "query"]
    assert roles[1].tolist() == ["asked key", "its value", "others", "others", "query", "others"]
    # Keys of two tokens, of which another pair has the second: 3 4 is stored twice.
    tokens = np.array([[3, 4, 9, 5, 4, 8, 3, 4, 7, 0, 3, 4]])
    (found,) = patching.mqar_roles(tokens, np.array([11]), key_tokens=2).tolist()
    others, old, key = ["others"] * 3, ["old pair"] * 3, ["asked key"] * 2
    assert found == [*old, *others, *key, "its value", "others", "query", "query"]
    clean = SimpleNamespace(indices=np.arange(2))
    fractions = (roles == "its value").T.astype(float)
    columns = patching.patch_columns({("mixer", 0): fractions}, clean, roles)
    cells = patching.recovered_by_role(columns)
    values = {role: cell["value"] for role, cell in cells.items()}
    there = [role for role in patching.MQAR_ROLES if role != "old pair"]
    assert list(values) == [f"mixer, 0, {role}" for role in there]
    assert list(values.values()) == [0, 1, 0, 0]
    assert cells["mixer, 0, others"]["n"] == 2
    cells["resid_pre, 0, query"] = cells["mixer, 0, query"]
    assert "mixer of layer 0 at 'its value' 1.0000" in patching.describe(cells, 2)


def test_roles_of_a_fact():
    text = {0: "BOS", 1: "5", 2: "5", 3: ":"}
    run = SimpleNamespace(data=SimpleNamespace(tokenizer=None), token=lambda t: text[int(t)])
    tokens = torch.tensor([[0, 1, 2, 3, 1]] * 2)
    examples = hooks.Examples(np.arange(2), tokens, torch.tensor([[3], [3]]), tokens[:, 4:], {})
    roles = patching.position_roles(run, examples)
    assert roles.tolist() == [["BOS", "digit 1", "digit 2", ":"]] * 2
