"""What is made of the results of keys: tables by hand, effects that were put there, slow twins."""

import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from analysis import clustering, hooks, importance, keystats, positions, slot_results
from nanorecall.distributed import SINGLE_PROCESS
from planted import N_SLOTS, VARIANTS, planted_facts
from toys import ablation_model, some_examples


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
        "weight": [1.0] * n,
        "flip": [False] * n,
    }
    made = {name: np.array(values) for name, values in {**plain, **columns}.items()}
    is_read = (~made["control"]).astype(int)
    return {"reads_at_label": is_read, "reads_in_reach": is_read, **made}


@pytest.fixture
def analyse(monkeypatch, capsys):
    """analyse(function, columns): what an analysis of these columns would save."""

    def call(function, columns, memory=None, data=None):
        run = SimpleNamespace(
            finding=print,
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
            saved.plot = plot

        module = sys.modules[function.__module__]
        monkeypatch.setattr(module, "load_table", lambda run, what: columns)
        monkeypatch.setattr(module, "save_result", save)
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
    slots = slot_results.slot_table(columns)
    assert slots["slot"].tolist() == [4, 5] and slots["layer"].tolist() == [0, 0]
    assert slots["n_examples"].tolist() == [2, 1]
    assert slots["mean"].tolist() == [2.5, 7] and slots["median"].tolist() == [2.5, 7]
    assert slots["max"].tolist() == [4, 7] and slots["flips"].tolist() == [0.25, 0]


def test_the_first_ablation_without_controls_is_chosen():
    columns = table(
        drop=[1.0, 2.0, 3.0], ablation=["mean", "zero", "mean"], control=[False, False, True]
    )
    chosen, ablation = slot_results.first_ablation(columns)
    assert ablation == "mean" and chosen["drop"].tolist() == [1]


def test_labels_at_which_a_slot_is_not_read_do_not_count(analyse):
    """A slot that is read at one of four labels costs 4 there, not 1 on average over all."""
    columns = table(drop=[4.0, 0.0, 0.0, 0.0], example=[0] * 4, answer_pos=range(4))
    columns["reads_at_label"] = columns["reads_in_reach"] = np.array([1, 0, 0, 0])
    saved = analyse(importance.impact, columns)
    cell = saved.by_slice["layer"]["0"]
    assert cell["drop"]["value"] == cell["drop where it is read"]["value"] == cell["median"] == 4
    assert cell["negligible"]["value"] == 0 and cell["labels"] == 1
    assert saved.metrics["left out"] == 0.75


def test_reads_at_the_label_and_earlier_are_told_apart(analyse):
    """Attention carries an earlier read to the second label, where the slot costs half as much."""
    columns = table(drop=[4.0, 2.0, 0.0], example=[0] * 3, answer_pos=range(3))
    columns["reads_at_label"] = np.array([1, 0, 0])
    columns["reads_in_reach"] = np.array([1, 1, 0])
    by_read = analyse(importance.impact, columns).by_slice["layer, where it is read"]
    drops = {name: cell["drop"]["value"] for name, cell in by_read.items()}
    assert drops == {"0, at the label": 4, "0, earlier only": 2}


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


def test_all_reads_of_the_split_count(monkeypatch):
    """Of 25 slots and 30 sequences in batches of 7: how often is each slot read, in each layer?"""
    model = ablation_model()
    tokens = some_examples(B=30).tokens
    run = SimpleNamespace(
        finding=print,
        model=model,
        device="cpu",
        dtype=torch.float32,
        pad=0,
        world=SINGLE_PROCESS,
        # occurrences is of all sequences, whatever number keys takes.
        config=SimpleNamespace(split="test", eval_batch_size=7, n_examples=4),
        data=SimpleNamespace(
            eval_groups=lambda split: [range(20), range(20, 30)],
            batch=lambda split, step, indices: (tokens[indices], tokens[indices], {}),
        ),
    )
    times, n_sequences = keystats.count_slot_reads(run)
    assert n_sequences == 30 and list(times) == [0, 2]
    *_, trace = model(tokens, trace=True)
    for reads, counted in zip(trace, times.values()):
        expected = [0] * N_SLOTS
        for b, t in (tokens != 0).nonzero().tolist():
            for slot in reads["slots"][b, t].flatten().tolist():
                expected[slot] += 1
        assert counted.tolist() == expected


def test_gini():
    assert keystats.gini(np.array([3, 1, 0, 0])) == pytest.approx((2 * (3 * 1 + 4 * 3) / 4 - 5) / 4)


def test_variances_of_weight_and_effect(analyse):
    """Slot 0 drops by 0 and 4 (variance 8) and is read with weights 1 and 3 (variance 2).

    Slots 1 and 2 were measured once, so they have no variance.
    """
    columns = table(drop=[0.0, 4.0, 1.0, 1.0], slot=[0, 0, 1, 2], weight=[1.0, 3.0, 5.0, 5.0])
    memory = ablation_model().memory_layers()[0]
    saved = analyse(keystats.keystats, columns, memory=memory)
    cell = saved.by_slice["layer"]["0"]
    assert cell["variance of effect"]["value"] == pytest.approx(8)
    assert cell["variance of weight"]["value"] == 2 and cell["variance of weight"]["n"] == 1
    assert saved.columns["n_examples"].tolist() == [2, 1, 1]


def test_clusters_of_keys_and_of_values(analyse, monkeypatch):
    """Keys fall into two directions by the second sub-key, values by the first.

    Slots 0 to 24 are (0, 0) to (4, 4). Sub-keys 0 and 1 are alike, and so are 2, 3 and 4.
    """
    memory = ablation_model().memory_layers()[0]
    direction = torch.tensor([0, 0, 1, 1, 1])
    with torch.no_grad():
        memory.keys.zero_()
        memory.keys[:, 1, range(5), direction] = 1
        memory.values.zero_()
        memory.values[range(25), direction.repeat_interleave(5)] = 1
    find = keystats.find_clusters
    monkeypatch.setattr(keystats, "find_clusters", lambda x, n, seed: find(x, 2, seed))
    columns = table(drop=np.ones(25), slot=range(25), example=[0] * 25)
    saved = analyse(keystats.keystats, columns, memory=memory)
    cell = saved.by_slice["layer"]["0"]
    for kind in ("keys", "values"):
        assert cell[f"clusters of {kind}"]["sizes"] == [15, 10]
        assert cell[f"clusters of {kind}"]["silhouette"] == pytest.approx(1)
    second = saved.columns["key_cluster"].reshape(5, 5)
    assert (second == second[0]).all() and len(set(second[0])) == 2
    first = saved.columns["value_cluster"].reshape(5, 5)
    assert (first.T == first[:, 0]).all() and len(set(first[:, 0])) == 2


def test_the_projection_keeps_the_plane_of_largest_variance():
    """Directions that differ in features 3 and 1 only."""
    angle = np.linspace(0, 1.5, 20)
    vectors = np.zeros((20, 5))
    vectors[:, 3], vectors[:, 1] = 2 * np.cos(angle), 2 * np.sin(angle)
    points = clustering.project(vectors)
    x = vectors / 2 - (vectors / 2).mean(0)
    np.testing.assert_allclose(points @ points.T, x @ x.T, atol=1e-9)
    assert points[:, 0].var() > points[:, 1].var()


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


def test_positions_that_no_two_examples_share_are_not_tested():
    """Each example has a drop at one position of its own: none can be exchanged with another."""
    rng = np.random.default_rng(0)
    columns = {
        "layer": np.zeros(40, int),
        "example": np.arange(40),
        "token_pos": np.arange(40) % 16,
        "drop": rng.normal(size=40),
        "flip": np.zeros(40, bool),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cells = positions.cells_by(columns, "token_pos")
    assert all(np.isnan(cell["p"]) and np.isnan(cell["p_holm"]) for cell in cells["0"].values())
    text = positions.describe_positions("0", "token_pos", cells["0"])
    assert text == "layer 0: no example has a drop at every token_pos, so there is no test"
    assert not positions.any_differs(cells)


def test_a_position_that_differs_is_found():
    rng = np.random.default_rng(0)
    drops = rng.normal(size=(60, 4))
    assert (positions.position_permutation_test(drops) > 0.01).all()
    drops[:, 2] += 1
    assert positions.position_permutation_test(drops)[2] < 0.002
    p = []
    for _ in range(300):
        p.append(positions.position_permutation_test(rng.normal(size=(10, 3)), draws=99)[0])
    assert np.mean(np.array(p) <= 0.05) < 0.1


def test_the_smallest_p_of_a_position_is_that_of_the_given_order():
    """Position 1 is far below the others in all of 40 examples: no permutation of 99 is as far."""
    drops = np.random.default_rng(0).normal(size=(40, 3))
    drops[:, 1] -= 5
    assert positions.position_permutation_test(drops, draws=99)[1] == 1 / 100
    assert (positions.position_permutation_test(np.ones((5, 2)), draws=9) == 1).all()


def test_repeated_digits(analyse):
    """112:121 has one repeated digit in the key, one in the value, and both digits shared."""
    texts = np.array(["112:121 ", "123:456 ", "111:111 ", "121:333 "])
    source = SimpleNamespace(slices={}, read=lambda split, indices: (texts[indices].tolist(), {}))
    columns = table(drop=[1.0, 0.0, 2.0, 1.0])
    saved = analyse(positions.repeated_digits, columns, data=SimpleNamespace(source=source))
    assert saved.columns["repeated digits of the key"].tolist() == [1, 0, 2, 1]
    assert saved.columns["repeated digits of the value"].tolist() == [1, 0, 2, 2]
    assert saved.columns["digits that key and value share"].tolist() == [2, 0, 1, 0]
    cell = saved.metrics["correlation"]["effect, repeated digits of the key"]
    assert cell["value"] == pytest.approx(1)
    assert saved.plot is None


def test_the_number_of_slots_goes_with_repeated_digits(analyse, tmp_path):
    """Example i has i repeated digits in its key and reads 1 + i slots; effects are the same."""
    texts = np.array(["123456:7 ", "123451:7 ", "123411:7 ", "123111:7 ", "121111:7 ", "111111:7 "])
    source = SimpleNamespace(slices={}, read=lambda split, indices: (texts[indices].tolist(), {}))
    example = np.repeat(range(6), [1, 2, 3, 4, 5, 6])
    columns = table(drop=np.ones(21), example=example, slot=range(21))
    saved = analyse(positions.repeated_digits, columns, data=SimpleNamespace(source=source))
    cells = saved.metrics["correlation"]
    assert cells["slots read, repeated digits of the key"]["value"] == pytest.approx(1)
    assert np.isnan(cells["effect, repeated digits of the key"]["value"])
    assert saved.columns["slots read"].tolist() == [1, 2, 3, 4, 5, 6]
    saved.plot(str(tmp_path / "repeats.png"))
    assert (tmp_path / "repeats.png").stat().st_size > 5000


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_layer_that_reads_nothing_at_one_token(variant):
    """Against a whole forward pass for each token, of which one layer's weights are 0 there."""
    model, examples = ablation_model(**VARIANTS[variant]), some_examples()
    columns = positions.measure_tokens(model, examples)
    before, _, _ = hooks.logit_diff(hooks.run_with_cache(model, examples).logits, examples.answers)
    n_compared = 0
    for layer in model.memory_layers():
        for t in range(9):

            def without(reads, t=t):
                weights = reads["weights"].clone()
                weights[:, t] = 0
                return {"slots": reads["slots"], "weights": weights}

            logits = hooks.run_with_hooks(model, examples, intervene={layer: without})
            drop = before - hooks.logit_diff(logits, examples.answers)[0]
            here = (columns["layer"] == layer) & (columns["token_pos"] == t)
            is_measured = np.zeros(drop.shape, bool)
            labels = columns["example"][here], columns["answer_pos"][here]
            is_measured[labels] = True
            np.testing.assert_allclose(columns["drop"][here], drop.numpy()[labels], atol=1e-4)
            # What was not measured does not depend on that token.
            assert np.abs(drop.numpy()[~is_measured]).max(initial=0) < 1e-5
            n_compared += here.sum()
    assert n_compared == len(columns["drop"]) > 2 * 6 * 3


def test_the_token_at_which_memory_matters(tmp_path):
    """planted_facts reads the fact at its second token; the first one says nothing.

    The first of two blocks has the memory, so that both tokens could matter.
    """
    model, examples = planted_facts(n_layers=2)
    columns = positions.measure_tokens(model, examples)
    cells = positions.cells_by(columns, "token_pos")["0"]
    assert list(cells) == [0, 1]
    assert cells[0]["drop"]["value"] == cells[0]["flips"]["value"] == 0
    assert cells[1]["drop"]["value"] > 1 and cells[1]["flips"]["value"] == 1
    assert positions.any_differs({"0": cells})
    by_layer = {"0": cells}
    positions.plot_position(by_layer, by_layer, "ab", "title", str(tmp_path / "position.png"))
    assert (tmp_path / "position.png").stat().st_size > 5000
