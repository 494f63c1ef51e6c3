"""importance.py and clustering.py: tables by hand, effects that were put there, slow twins."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from analysis import clustering, importance


def table(**columns):
    """Columns as `ablate.py keys` writes them; all that is not named is the same everywhere."""
    n = len(columns["drop"])
    plain = {
        "example": range(n),
        "answer_pos": [0] * n,
        "ablation": ["zero"] * n,
        "control": [False] * n,
        "layer": [0] * n,
        "slot": [0] * n,
        "reads": [1] * n,
        "flip": [False] * n,
    }
    return {name: np.array(values) for name, values in {**plain, **columns}.items()}


@pytest.fixture
def analyse(monkeypatch, capsys):
    """analyse(function, columns): what an analysis of these columns would save."""

    def call(function, columns, values=None, data=None):
        memory = SimpleNamespace(values=values)
        run = SimpleNamespace(
            name="run",
            token=str,
            data=data,
            model=SimpleNamespace(memory_layers=lambda: {0: memory}),
            config=SimpleNamespace(seed=0, split="test"),
            settings=SimpleNamespace(
                train=SimpleNamespace(model="memory", data="data_synth"),
                data=SimpleNamespace(task="qa"),
            ),
        )
        saved = SimpleNamespace()

        def save(run, what, metrics, by_slice, examples, columns, plot):
            saved.metrics, saved.by_slice, saved.columns = metrics, by_slice, columns

        monkeypatch.setattr(importance, "load_table", lambda run, what: columns)
        monkeypatch.setattr(importance, "save_result", save)
        function(run)
        return saved

    return call


# ---- tables --------------------------------------------------------------------------------------


def test_tables_by_hand():
    columns = table(
        example=[0, 0, 1, 1, 2],
        slot=[4, 4, 4, 4, 5],
        flip=[True, False, False, False, False],
        drop=[1.0, 2.0, 3.0, 4.0, 7.0],
    )
    slots = importance.slot_table(columns)
    assert slots["slot"].tolist() == [4, 5] and slots["layer"].tolist() == [0, 0]
    assert slots["n_examples"].tolist() == [2, 1]
    assert slots["mean"].tolist() == [2.5, 7] and slots["median"].tolist() == [2.5, 7]
    assert slots["max"].tolist() == [4, 7] and slots["flips"].tolist() == [0.25, 0]
    examples, drops = importance.per_example_mean(columns["example"], columns["drop"])
    assert examples.tolist() == [0, 1, 2] and drops.tolist() == [1.5, 3.5, 7]


def test_the_first_ablation_without_controls_is_chosen():
    columns = table(
        drop=[1.0, 2.0, 3.0], ablation=["mean", "zero", "mean"], control=[False, False, True]
    )
    chosen, ablation = importance.first_ablation(columns)
    assert ablation == "mean" and chosen["drop"].tolist() == [1]


# ---- impact --------------------------------------------------------------------------------------


def test_the_best_slots_are_measured_on_the_other_half_of_the_examples():
    """Example 0: slot 0 drops by 10, the others by 0. Example 1: slot 1 by 7, the others by 1."""
    drop = np.ones(40)
    drop[:20] = 0
    drop[0], drop[21] = 10, 7
    slot = np.tile(np.arange(20), 2)
    columns = table(drop=drop, slot=slot, example=np.repeat([0, 1], 20))
    top, every = importance.top_and_all(columns)
    assert top.tolist() == [1, 0] and every.sum() == 10 + 7 + 19


def test_impact_in_numbers(analyse):
    """Drops 0.005, -0.5, 1, 3 of slots that are read; -0.25 and 0.125 of those that are not."""
    columns = table(
        drop=[0.005, -0.5, 1.0, 3.0, -0.25, 0.125],
        slot=[1, 2, 2, 3, 8, 9],
        flip=[False, True, False, False, True, True],
        control=[False] * 4 + [True] * 2,
    )
    saved = analyse(importance.impact, columns)
    assert saved.metrics["largest change by an unread slot"] == 0.25
    assert saved.columns["slot"].tolist() == [1, 2, 3]
    cell = saved.by_slice["layer"]["0"]
    assert cell["drop"]["value"] == pytest.approx((0.005 + 0.25 + 3) / 3)
    assert cell["median"] == pytest.approx((0.005 + 1) / 2) and cell["largest"] == 3
    assert cell["negligible"]["value"] == 0.25 and cell["flips"]["value"] == 0.25
    variance = np.mean(np.square([0.005, -0.5, 1, 3])) - 0.87625**2
    assert cell["std"] == pytest.approx(np.sqrt(variance))


def test_rare_and_frequent_facts_are_told_apart():
    """Rare facts: two slots share the drop, all answers flip. Frequent ones: one slot has it."""
    columns = table(
        example=np.repeat([0, 1, 2, 3], 2),
        flip=[True, True, True, True, False, False, False, False],
        drop=[2.0, 2.0, 2.0, 2.0, 4.0, 0.0, 4.0, 0.0],
    )
    columns["exposures"] = np.repeat([1, 1, 8, 8], 2)
    cells = importance.rare_and_frequent(columns)
    effective = cells["slots that carry the drop (effective number)"]
    assert effective["rare"]["value"] == pytest.approx(2)
    assert effective["frequent"]["value"] == pytest.approx(1)
    assert cells["fraction of ablations that flip an answer"]["rare"]["value"] == 1
    assert cells["largest drop"]["frequent"]["value"] == 4


def test_facts_with_the_median_of_exposures_are_rare():
    columns = table(drop=[4.0, 2.0, 1.0, 1.0])
    columns["exposures"] = np.array([1, 1, 1, 5])
    cell = importance.rare_and_frequent(columns)["mean drop"]
    assert cell["rare"]["value"] == pytest.approx(7 / 3) and cell["rare"]["n"] == 3
    assert cell["frequent"]["value"] == 1


# ---- slots ---------------------------------------------------------------------------------------


def test_reads_of_an_example_count_once(analyse):
    """Slot 0 is read three times by example 0, slot 1 once by example 1; both have two labels."""
    columns = table(
        drop=[0.0] * 4,
        example=[0, 0, 1, 1],
        answer_pos=[0, 1, 0, 1],
        slot=[0, 0, 1, 1],
        reads=[3, 3, 1, 1],
    )
    saved = analyse(importance.occurrences, columns, values=torch.zeros(4, 2))
    cell = saved.by_slice["layer"]["0"]
    assert saved.columns["times"].tolist() == [3, 1, 0, 0] and cell["reads"] == 4
    assert cell["unused"]["value"] == 0.5
    assert cell["gini"] == pytest.approx((2 * (3 * 1 + 4 * 3) / 4 - 5) / 4)
    assert cell["kl"] == pytest.approx(np.log(4) + 0.75 * np.log(0.75) + 0.25 * np.log(0.25))


def test_the_variance_of_an_effect(analyse):
    """Slot 0 drops by 0 and 4 (variance 4), slots 1 and 2 by 1 each."""
    columns = table(drop=[0.0, 4.0, 1.0, 1.0], slot=[0, 0, 1, 2])
    saved = analyse(importance.keystats, columns, values=torch.eye(3))
    cell = saved.by_slice["layer"]["0"]
    assert cell["variance of effect"]["value"] == pytest.approx(4 / 3)
    assert saved.columns["std"].tolist() == [2, 0, 0]
    assert saved.columns["n_examples"].tolist() == [2, 1, 1]


def test_clusters_are_found_and_noise_has_none():
    rng = np.random.default_rng(0)
    centres = np.repeat(np.eye(4), 20, axis=0)
    vectors = centres + 0.05 * rng.normal(size=(80, 4))
    # k-means depends on its first centres: take the best of five seeds.
    results = [clustering.spherical_k_means(vectors, 4, seed) for seed in range(5)]
    cluster, silhouette = max(results, key=lambda result: result[1])
    assert silhouette > 0.9
    for first in range(0, 80, 20):
        assert len(set(cluster[first : first + 20])) == 1
    _, silhouette = clustering.spherical_k_means(rng.normal(size=(80, 16)), 4)
    assert silhouette < 0.2


def naive_silhouette(vectors, cluster):
    """Rousseeuw's, pair by pair; 0 for a vector that is alone in its cluster."""
    x = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    silhouettes = []
    for i in range(len(x)):
        distances = {}  # {cluster: to its vectors}
        for j in range(len(x)):
            if i != j:
                distances.setdefault(cluster[j], []).append(1 - x[i] @ x[j])
        if cluster[i] not in distances:
            silhouettes.append(0.0)
            continue
        own = np.mean(distances.pop(cluster[i]))
        nearest = min(np.mean(d) for d in distances.values())
        silhouettes.append((nearest - own) / max(nearest, own))
    return np.mean(silhouettes)


@pytest.mark.parametrize("n_clusters", [2, 3, 9])
def test_the_silhouette_pair_by_pair(n_clusters):
    vectors = np.random.default_rng(n_clusters).normal(size=(17, 3))
    cluster, silhouette = clustering.spherical_k_means(vectors, n_clusters)
    assert silhouette == pytest.approx(naive_silhouette(vectors, cluster))


def test_permuted_vectors_keep_their_columns():
    vectors = np.arange(60).reshape(20, 3)
    permuted = clustering.permute_columns(vectors, seed=0)
    assert np.array_equal(np.sort(permuted, axis=0), vectors)
    assert not np.array_equal(permuted, clustering.permute_columns(vectors, seed=1))
    # Each column in an order of its own.
    assert not np.array_equal(permuted - permuted[:, :1], vectors - vectors[:, :1])


# ---- examples ------------------------------------------------------------------------------------


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


def test_the_smallest_p_of_a_position_is_that_of_the_given_order():
    """Position 1 is far below the others in all of 40 examples: no permutation of 99 is as far."""
    drops = np.random.default_rng(0).normal(size=(40, 3))
    drops[:, 1] -= 5
    assert importance.position_permutation_test(drops, draws=99)[1] == 1 / 100
    assert (importance.position_permutation_test(np.ones((5, 2)), draws=9) == 1).all()


def test_repeated_digits(analyse):
    """112:121 has one repeated digit in the key, one in the value, and both digits shared."""
    texts = np.array(["112:121 ", "123:456 ", "111:111 ", "121:333 "])
    source = SimpleNamespace(read=lambda split, indices: (texts[indices].tolist(), {}))
    columns = table(drop=[1.0, 0.0, 2.0, 1.0])
    saved = analyse(importance.repeated_digits, columns, data=SimpleNamespace(source=source))
    assert saved.columns["repeated digits of the key"].tolist() == [1, 0, 2, 1]
    assert saved.columns["repeated digits of the value"].tolist() == [1, 0, 2, 2]
    assert saved.columns["digits that key and value share"].tolist() == [2, 0, 1, 0]
    cell = saved.metrics["correlation"]["repeated digits of the key"]
    assert cell["value"] == pytest.approx(1)


def test_means_are_joined_by_example():
    """Examples 2 to 6 are in both tables of layer 1; example 9 is in another layer."""
    ablated = {"example": np.array([1, 2, 3, 4, 5, 6, 6, 9]), "layer": np.array([1] * 7 + [0])}
    ablated["drop"] = np.array([9.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 9.0])
    swapped = {"example": np.array([2, 2, 3, 4, 5, 6, 9]), "layer": np.array([1] * 7)}
    swapped["drop"] = np.array([1.0, 3.0, 0.0, 0.0, 0.0, 5.0, 9.0])
    swapped["source_answer"] = np.array([True, False, False, True, True, True, True])
    joined = importance.join_by_example(ablated, swapped, layer=1)
    assert joined["example"].tolist() == [2, 3, 4, 5, 6] and (joined["layer"] == 1).all()
    assert joined["drop_by_ablation"].tolist() == [2, 3, 4, 5, 7]
    assert joined["drop_by_swap"].tolist() == [2, 0, 0, 0, 5]
    assert joined["source_answer_by_swap"].tolist() == [0.5, 0, 1, 1, 1]
