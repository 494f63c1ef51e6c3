"""analysis/importance.py and clustering.py: tables by hand, and effects that were put there."""

import numpy as np
import pytest

from analysis import clustering, importance


def test_tables_by_hand():
    columns = {
        "example": np.array([0, 0, 1, 1, 2]),
        "layer": np.zeros(5, int),
        "slot": np.array([4, 4, 4, 4, 5]),
        "flip": np.array([1, 0, 0, 0, 0]) == 1,
        "drop": np.array([1.0, 2.0, 3.0, 4.0, 7.0]),
    }
    table = importance.slot_table(columns)
    assert table["slot"].tolist() == [4, 5] and table["layer"].tolist() == [0, 0]
    assert table["n_examples"].tolist() == [2, 1]
    assert table["mean"].tolist() == [2.5, 7] and table["median"].tolist() == [2.5, 7]
    assert table["max"].tolist() == [4, 7] and table["flips"].tolist() == [0.25, 0]
    examples, drops = importance.per_example_mean(columns["example"], columns["drop"])
    assert examples.tolist() == [0, 1, 2] and drops.tolist() == [1.5, 3.5, 7]


def test_clusters_of_values_are_found_and_noise_has_none():
    rng = np.random.default_rng(0)
    centres = np.repeat(np.eye(4), 20, axis=0)
    vectors = centres + 0.05 * rng.normal(size=(80, 4))
    # k-means depends on its first centres: the best of five seeds.
    found = [clustering.spherical_k_means(vectors, 4, seed) for seed in range(5)]
    cluster, silhouette = max(found, key=lambda result: result[1])
    assert silhouette > 0.9
    for first in range(0, 80, 20):
        assert len(set(cluster[first : first + 20])) == 1
    _, silhouette = clustering.spherical_k_means(rng.normal(size=(80, 16)), 4)
    assert silhouette < 0.2


def test_a_position_that_differs_is_found():
    rng = np.random.default_rng(0)
    drops = rng.normal(size=(60, 4))
    assert (importance.position_permutation_test(drops) > 0.01).all()
    drops[:, 2] += 1
    assert importance.position_permutation_test(drops)[2] < 0.002
    p = []
    for _ in range(300):
        p.append(importance.position_permutation_test(rng.normal(size=(10, 3)), draws=99)[0])
    assert np.mean(np.array(p) <= 0.05) < 0.1


def test_rare_and_frequent_facts_are_told_apart():
    """Rare facts: two slots share the drop, and all answers flip. Frequent ones: one slot has it."""
    columns = {
        "example": np.repeat([0, 1, 2, 3], 2),
        "exposures": np.repeat([1, 1, 8, 8], 2),
        "flip": np.array([1, 1, 1, 1, 0, 0, 0, 0]),
        "drop": np.array([2.0, 2.0, 2.0, 2.0, 4.0, 0.0, 4.0, 0.0]),
    }
    found = importance.rare_and_frequent(columns)
    effective = found["slots that carry the drop (effective number)"]
    assert effective["rare"]["value"] == pytest.approx(2)
    assert effective["frequent"]["value"] == pytest.approx(1)
    assert found["fraction of ablations that flip an answer"]["rare"]["value"] == 1
    assert found["largest drop"]["frequent"]["value"] == 4


def test_means_are_joined_by_example():
    """Examples 2 to 6 are in both tables of layer 1; example 9 is in another layer."""
    ablated = {"example": np.array([1, 2, 3, 4, 5, 6, 6, 9]), "layer": np.array([1] * 7 + [0])}
    ablated["drop"] = np.array([9.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 9.0])
    swapped = {"example": np.array([2, 2, 3, 4, 5, 6, 9]), "layer": np.array([1] * 7)}
    swapped["drop"] = np.array([1.0, 3.0, 0.0, 0.0, 0.0, 5.0, 9.0])
    swapped["source_answer"] = np.array([True, False, False, True, True, True, True])
    table = importance.join_by_example(ablated, swapped, 1)
    assert table["example"].tolist() == [2, 3, 4, 5, 6] and (table["layer"] == 1).all()
    assert table["drop_by_ablation"].tolist() == [2, 3, 4, 5, 7]
    assert table["drop_by_swap"].tolist() == [2, 0, 0, 0, 5]
    assert table["source_answer_by_swap"].tolist() == [0.5, 0, 1, 1, 1]
