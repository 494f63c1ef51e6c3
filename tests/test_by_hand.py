"""Numbers of the analyses against values worked out by hand, or in a slow way of their own."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from analysis import (
    attention_maps,
    clustering,
    compare,
    confidence,
    editing,
    importance,
    routing,
    significance,
    trained_run,
)
from analysis import hooks as I
from analysis.trained_run import write_parquet
from nanorecall import metrics, stats
from toys import ablation_model, some_examples

# ---- stats.py ------------------------------------------------------------------------------------

LABELS = {  # two rows of two labels, one of one; `kind` is of a row, `place` of a label
    "row": np.array([5, 5, 2, 2, 9]),
    "hit": np.array([1, 0, 1, 1, 0]) == 1,
    "loss": np.array([1.0, 3.0, 0.5, 0.5, 2.0]),
    "kind": np.array([7, 7, 8, 8, 7]),
    "place": np.array([0, 1, 0, 1, 0]),
}


def test_labels_are_read_in_the_order_of_their_rows(tmp_path):
    write_parquet(str(tmp_path / "eval_test.parquet"), LABELS)
    found = significance.read_labels(str(tmp_path), "test")
    assert found["row"].tolist() == [2, 2, 5, 5, 9] and found["loss"].tolist() == [
        0.5,
        0.5,
        1,
        3,
        2,
    ]


def test_rows_of_labels():
    found = significance.per_example(LABELS)
    assert found.keys() == {"row", "right", "labels", "hits", "loss", "kind"}
    assert found["row"].tolist() == [2, 5, 9] and found["right"].tolist() == [True, False, False]
    assert found["hits"].tolist() == [2, 1, 0] and found["labels"].tolist() == [2, 2, 1]
    assert found["loss"].tolist() == [1, 4, 2] and found["kind"].tolist() == [8, 7, 7]


def test_slices_have_two_to_24_values():
    rows = {
        "row": np.arange(50),
        "a": np.arange(50) % 24,
        "b": np.arange(50) % 25,
        "c": np.ones(50),
    }
    assert [name for name, _ in significance.slices_of(rows, ["a", "b", "c"])][1:] == [
        f"a={v}" for v in range(24)
    ]


def test_one_run_is_measured_per_label(capsys):
    """The loss of a row grows with `size`, that of its labels falls: they go together by -1."""
    size = np.arange(1, 9)
    rows = {
        "row": np.arange(8),
        "right": size > 6,
        "labels": size * size,
        "hits": size,
        "size": size,
    }
    found = significance.one_run({**rows, "loss": 1.0 * size}, ["size"])
    assert found["metrics"]["all"]["nll"]["value"] == pytest.approx(np.mean(1 / size))
    assert found["metrics"]["correlation with loss"]["size"]["value"] == pytest.approx(-1)
    assert found["metrics"]["all"]["exact"]["value"] == 2 / 8
    assert found["metrics"]["all"]["value"] == pytest.approx(36 / 204)


def test_two_runs_are_the_second_less_the_first(capsys):
    """A has 1 of 1 and 0 of 9 labels, B 0 of 1 and 9 of 9: B is better by 8 of 10 labels."""
    same = {"row": np.arange(2), "labels": np.array([1, 9]), "kind": np.array([0, 1])}
    a = {**same, "right": np.array([True, False]), "hits": np.array([1, 0])}
    b = {**same, "right": np.array([False, True]), "hits": np.array([0, 9])}
    a["loss"], b["loss"] = np.array([1.0, 18.0]), np.array([3.0, 0.0])
    found = significance.two_runs([a, b], ["kind"])
    whole = found["metrics"]["all"]
    assert whole["accuracy difference"]["value"] == pytest.approx(0.8)
    assert whole["nll difference"]["value"] == pytest.approx((3 - 1 + 0 - 18) / 10)
    for name, ends in (("accuracy difference", [-1, 1]), ("nll difference", [-2, 2])):
        assert whole[name]["ci95"] == pytest.approx(ends)  # of the same row twice
    assert whole["mcnemar"] == {"only_a": 1, "only_b": 1, "p": 1}  # not one of the slices
    for cell in found["by_slice"].values():
        assert cell["mcnemar"]["p_holm"] == 1


def test_seeds_decide_what_is_drawn():
    x, y = np.arange(20.0), np.sin(np.arange(20.0))
    for f in (
        lambda seed: stats.paired_bootstrap(y, seed=seed),
        lambda seed: stats.correlation(x, y, seed=seed),
    ):
        assert f(1) == f(1) and f(1)["ci95"] != f(2)["ci95"]


# ---- metrics.py ----------------------------------------------------------------------------------


def test_counts_of_a_batch():
    """Row 4 has a label right and one wrong, row 6 two right, row 8 none: a batch seen twice."""
    batch = {
        "hit": np.array([True, False, True, True]),
        "loss": np.array([0.25, 2.0, 0.5, 0.25], np.float32),
        "row": np.array([4, 4, 6, 6]),
        "row_hit": np.array([False, True, True]),
        "tags": {"kind": np.array([0, 1, 0, 0])},
    }
    found = metrics.merge_batches([batch, batch])
    assert (found["accuracy"], found["labels"]) == (6 / 8, 8)
    assert (found["row_accuracy"], found["rows"]) == (4 / 6, 6)
    assert found["loss"] == 2 * 3 / 8
    first, second = found["by_slice"]["kind"][0], found["by_slice"]["kind"][1]
    assert (first["right"], first["labels"], first["row_right"]) == (6, 6, 4)
    assert (second["right"], second["labels"], second["loss"]) == (0, 2, 4)


# ---- impact.py -----------------------------------------------------------------------------------


def result_of(monkeypatch, work, columns, **trained_run):
    """What an analysis saves of measurements {column: (N,)}: its metrics, by_slice and columns."""
    kept = {}

    def save(trained_run, what, metrics, by_slice, examples, columns, plot):
        kept.update(metrics=metrics, by_slice=by_slice, columns=columns)

    monkeypatch.setattr(importance, "load_table", lambda trained_run, what: columns)
    monkeypatch.setattr(importance, "save_result", save)
    parts = dict(model=SimpleNamespace(memory_layers=dict), data=None)
    train = SimpleNamespace(model="memory", data="data_synth")
    settings = SimpleNamespace(data=SimpleNamespace(task="qa"), train=train)
    config = SimpleNamespace(seed=0, split="test")
    parts |= dict(settings=settings, config=config, name="x", token=str)
    work(SimpleNamespace(**{**parts, **trained_run}))
    return kept["metrics"], kept["by_slice"], kept["columns"]


def measurements(**columns):
    """Columns as `keys` writes them; all that is not named is the same everywhere."""
    n = len(columns["drop"])
    plain = {
        "ablation": ["zero"] * n,
        "control": [False] * n,
        "layer": [0] * n,
        "slot": [0] * n,
        "flip": [False] * n,
    }
    plain |= {"example": range(n), "answer_pos": [0] * n, "reads": [1] * n}
    return {name: np.array(values) for name, values in {**plain, **columns}.items()}


def test_the_first_ablation_without_controls_is_chosen():
    columns = measurements(
        drop=[1.0, 2.0, 3.0], ablation=["mean", "zero", "mean"], control=[False, False, True]
    )
    found, ablation = importance.first_ablation(columns)
    assert ablation == "mean" and found["drop"].tolist() == [1]


def test_the_best_slots_are_measured_on_the_other_half_of_the_examples():
    """Example 0: slot 0 drops by 10, the others by 0. Example 1: slot 1 by 7, the others by 1."""
    slot = np.tile(np.arange(20), 2)
    drop = np.ones(40)
    drop[:20] = 0
    drop[0], drop[21] = 10, 7
    columns = measurements(drop=drop, slot=slot, example=np.repeat([0, 1], 20))
    best, every = importance.top_and_all(columns)
    assert best.tolist() == [1, 0] and every.sum() == 10 + 7 + 19


def test_impact_in_numbers(monkeypatch, capsys):
    """Drops 0.005, -0.5, 1, 3 of slots that are read; -0.25 and 0.125 of those that are not."""
    columns = measurements(
        drop=[0.005, -0.5, 1.0, 3.0, -0.25, 0.125],
        slot=[1, 2, 2, 3, 8, 9],
        flip=[False, True, False, False, True, True],
        control=[False] * 4 + [True] * 2,
    )
    metrics, by_slice, slots = result_of(monkeypatch, importance.impact, columns)
    cell = by_slice["layer"]["0"]
    assert metrics["largest change by an unread slot"] == 0.25 and slots["slot"].tolist() == [
        1,
        2,
        3,
    ]
    assert cell["drop"]["value"] == pytest.approx((0.005 + 0.25 + 3) / 3)
    assert cell["median"] == pytest.approx((0.005 + 1) / 2) and cell["largest"] == 3
    assert cell["negligible"]["value"] == 0.25 and cell["flips"]["value"] == 0.25
    assert cell["std"] == pytest.approx(
        np.sqrt(np.mean(np.square([0.005, -0.5, 1, 3])) - 0.87625**2)
    )


def test_rare_comes_before_frequent():
    columns = measurements(drop=[4.0, 2.0, 1.0, 1.0], example=[0, 1, 2, 3])
    columns["exposures"] = np.array([1, 1, 1, 5])
    cell = importance.rare_and_frequent(columns)["mean drop"]
    assert cell["rare"]["value"] == pytest.approx(7 / 3) and cell["rare"]["n"] == 3
    assert cell["frequent"]["value"] == 1


def test_reads_of_an_example_count_once(monkeypatch, capsys):
    """Slot 0 is read three times by example 0, slot 1 once by example 1; both have two labels."""
    columns = measurements(
        drop=[0.0] * 4,
        example=[0, 0, 1, 1],
        answer_pos=[0, 1, 0, 1],
        slot=[0, 0, 1, 1],
        reads=[3, 3, 1, 1],
    )
    memory = SimpleNamespace(values=torch.zeros(4, 2))
    model = SimpleNamespace(memory_layers=lambda: {0: memory})
    _, by_slice, found = result_of(monkeypatch, importance.occurrences, columns, model=model)
    cell = by_slice["layer"]["0"]
    assert found["times"].tolist() == [3, 1, 0, 0] and cell["reads"] == 4
    assert cell["unused"]["value"] == 0.5
    assert cell["gini"] == pytest.approx((2 * (3 * 1 + 4 * 3) / 4 - 5) / 4)
    assert cell["kl"] == pytest.approx(np.log(4) + 0.75 * np.log(0.75) + 0.25 * np.log(0.25))


def test_the_least_p_of_a_position_is_that_of_the_given_order():
    """Position 1 is far below the others in all of 40 examples, which no permutation of 99 repeats."""
    drops = np.random.default_rng(0).normal(size=(40, 3))
    drops[:, 1] -= 5
    assert importance.position_permutation_test(drops, draws=99)[1] == 1 / 100
    assert (importance.position_permutation_test(np.ones((5, 2)), draws=9) == 1).all()


def test_the_variance_of_an_effect(monkeypatch, capsys):
    """Slot 0 drops by 0 and 4 (variance 4), slots 1 and 2 by 1 each."""
    columns = measurements(drop=[0.0, 4.0, 1.0, 1.0], slot=[0, 0, 1, 2])
    memory = SimpleNamespace(values=torch.eye(3))
    model = SimpleNamespace(memory_layers=lambda: {0: memory})
    _, by_slice, found = result_of(monkeypatch, importance.keystats, columns, model=model)
    assert by_slice["layer"]["0"]["variance of effect"]["value"] == pytest.approx(4 / 3)
    assert found["std"].tolist() == [2, 0, 0] and found["n_examples"].tolist() == [2, 1, 1]


def naive_silhouette(x, group):
    """Rousseeuw's, pair by pair; 0 for a point that is alone in its group."""
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    quality = []
    for i in range(len(x)):
        away = {}
        for j in range(len(x)):
            if i != j:
                away.setdefault(group[j], []).append(1 - x[i] @ x[j])
        if group[i] not in away:
            quality.append(0.0)
            continue
        own = np.mean(away[group[i]])
        nearest = min(np.mean(d) for g, d in away.items() if g != group[i])
        quality.append((nearest - own) / max(nearest, own))
    return np.mean(quality)


@pytest.mark.parametrize("clusters", [2, 3, 9])
def test_the_silhouette_pair_by_pair(clusters):
    values = np.random.default_rng(clusters).normal(size=(17, 3))
    group, quality = clustering.spherical_k_means(values, clusters)
    assert quality == pytest.approx(naive_silhouette(values, group))


def test_permuted_values_keep_their_columns():
    values = np.arange(60).reshape(20, 3)
    found, other = clustering.permute_columns(values, 0), clustering.permute_columns(values, 1)
    assert np.array_equal(np.sort(found, axis=0), values) and not np.array_equal(found, other)
    assert not np.array_equal(found - found[:, :1], values - values[:, :1])  # each in its own order


def test_repeated_digits(monkeypatch, capsys):
    """112:121 has one repeated digit in the key, one in the value, and both digits shared."""
    texts = ["112:121 ", "123:456 ", "111:111 ", "121:333 "]
    source = SimpleNamespace(read=lambda split, rows: ([texts[r] for r in rows], {}))
    columns = measurements(drop=[1.0, 0.0, 2.0, 1.0])
    data = SimpleNamespace(source=source)
    metrics, _, found = result_of(monkeypatch, importance.repeated_digits, columns, data=data)
    assert found["repeated digits of the key"].tolist() == [1, 0, 2, 1]
    assert found["repeated digits of the value"].tolist() == [1, 0, 2, 2]
    assert found["digits that key and value share"].tolist() == [2, 0, 1, 0]
    assert metrics["correlation"]["repeated digits of the key"]["value"] == pytest.approx(1)


def test_what_a_digit_turns_into(monkeypatch, capsys):
    columns = {
        "example": np.array([0, 1, 2, 3, 4]),
        "answer": np.array([1, 1, 1, 2, 2]),
        "source_answer_token": np.array([2, 2, 2, 1, 2]),  # the last cannot be told apart
        "teacher-forced": np.array([2, 2, 3, 2, 2]),
        "token by token": np.array([1, 1, 1, 1, 1]),
    }
    _, by_slice, _ = result_of(monkeypatch, importance.swap_predictions, columns)
    shares = lambda how: [(c["value"], c["n"]) for c in by_slice[how].values()]
    assert shares("teacher-forced") == [(0.25, 4), (0.5, 4), (0.25, 4)]
    assert shares("token by token") == [(0.75, 4), (0.25, 4), (0, 4)]
    turned = by_slice["teacher-forced, digit"]
    assert {k: c["value"] for k, c in turned.items()} == {
        "1 to 2": 2 / 3,
        "1 to 3": 1 / 3,
        "2 to 2": 1,
    }


# ---- routing.py ----------------------------------------------------------------------------------


def test_tenths_are_of_the_row_without_its_padding():
    tokens = torch.tensor([[1, 2, 3, 4, 0, 0], [1, 2, 3, 4, 5, 6]])
    found = {"slots": torch.zeros(2, 6, 1, 1, dtype=torch.long)}
    found["route"] = torch.tensor([0.25, 0.75]).expand(2, 6, 2)
    model = lambda tokens, trace: (None, None, [found])
    model.memory_layers = lambda: {3: None}
    about = SimpleNamespace(model=model, pad=0, data=SimpleNamespace(vocab_size=8))
    got = routing.routing_table(about, SimpleNamespace(tokens=tokens, rows=np.array([7, 9])))
    assert got["decile"].tolist() == [0, 2, 5, 7] + [0, 1, 3, 5, 6, 8]
    assert (
        got["row"].tolist() == [7] * 4 + [9] * 6
        and (got["memory"] == 0.75).all()
        and (got["layer"] == 3).all()
    )


def test_two_tokens_of_one_row_are_no_pair():
    """Row 0 reads slots 1, 2, 3 and has the share 0.2, row 1 slots 1, 4 and 0.8: 1 of 4 shared."""
    row = np.repeat([0, 1], 50)
    found = {
        "row": row,
        "layer": np.zeros(100, int),
        "token": np.full(100, 5),
        "kind": np.full(100, "digit"),
        "slots": np.array([[1, 2, 3], [1, 4, 4]])[row],
        "memory": np.array([0.2, 0.8])[row],
    }
    cells = routing.consistency(found)["0"]["same token"]
    assert cells["slots in common"]["value"] == 0.25 and cells["difference of shares"][
        "value"
    ] == pytest.approx(0.6)


def test_kinds_that_read_alike():
    """Slots 3, 4 times and 0 times against 0 and 5: the cosine is 4 / 5."""
    slots = np.array([0] * 3 + [1] * 4 + [1] * 5)[:, None]
    found = {"kind": np.array(["a"] * 7 + ["b"] * 5), "layer": np.zeros(12, int), "slots": slots}
    kinds, cosine = routing.similarity_of_kinds(found, 0, 2)
    np.testing.assert_allclose(cosine, [[1, 0.8], [0.8, 1]])


# ---- logits.py -----------------------------------------------------------------------------------


def test_a_sure_model_is_in_the_last_bin():
    bins, error = confidence.calibration(np.array([1.0, 0.95]), np.array([True, False]), np.arange(2))
    assert len(bins) == 1 and bins[0]["value"] == 0.5 and error == pytest.approx(0.475)


def test_means_are_over_rows():
    """Row 0 has two labels, row 1 one: each row counts once."""
    found = {
        "row": np.array([0, 0, 1, 2]),
        "hit": np.array([True, False, True, False]),
        "rank": np.array([1, 3, 1, 9]),
        "probability": np.array([0.5, 0.1, 0.9, 0.0]),
        "confidence": np.array([0.5, 0.6, 0.9, 0.9]),
        "place": np.array([0, 1, 0, 0]),
        "nll": np.log([2.0, 8.0, 1.0, 99.0]),
    }
    cell = confidence.summary(found, found["row"] < 2)
    assert cell["accuracy"]["value"] == pytest.approx(2 / 3) and cell["rank"]["value"] == 1.5
    assert cell["probability"]["value"] == pytest.approx(0.6) and cell["perplexity"][
        "value"
    ] == pytest.approx(2)
    assert confidence.exact_match(found)["value"] == pytest.approx(1 / 3)


# ---- attention_maps.py ---------------------------------------------------------------------------


def test_the_entropy_of_even_and_of_sharp_attention():
    """A token of t earlier ones and itself: even attention has the entropy log(t + 1), called 1."""
    ids, real = torch.arange(5)[None], torch.ones(1, 5) == 1
    even = torch.ones(1, 1, 5, 5).tril()
    even = even / even.sum(-1, keepdim=True)
    assert float(attention_maps.pattern_scores(even, ids, real)["entropy"]) == pytest.approx(1)
    assert float(
        attention_maps.pattern_scores(torch.eye(5)[None, None], ids, real)["entropy"]
    ) == pytest.approx(0, abs=1e-6)
    cells = attention_maps.pattern_scores(even, ids, real)
    assert float(cells["previous token"]) == pytest.approx(np.mean([1 / 2, 1 / 3, 1 / 4, 1 / 5]))
    assert float(cells["first token"]) == pytest.approx(np.mean([1 / 3, 1 / 4, 1 / 5]))


def test_patterns_pair_by_pair():
    """Random weights and tokens; a pattern's share is counted weight by weight."""
    g = torch.Generator().manual_seed(0)
    ids, weights = torch.randint(4, (1, 14), generator=g), torch.rand(1, 1, 14, 14, generator=g)
    weights /= weights.sum(-1, keepdim=True)
    x = ids[0].tolist()
    rules = {
        "previous token": lambda t, s: s == t - 1,
        "2 to 8 back": lambda t, s: 2 <= t - s <= 8,
        "itself": lambda t, s: s == t,
        "first token": lambda t, s: s == 0 and t >= 2,  # token 1 has it as the previous one
        "induction": lambda t, s: 0 < s < t and x[s - 1] == x[t],
        "same token": lambda t, s: s < t and x[s] == x[t],
    }
    found = attention_maps.pattern_scores(weights, ids, torch.ones(1, 14) == 1)
    for name, rule in rules.items():
        shares = []
        for t in range(1, 14):
            some = [float(weights[0, 0, t, s]) for s in range(14) if rule(t, s)]
            shares += [sum(some)] if some else []
        assert float(found[name]) == pytest.approx(np.mean(shares), rel=1e-5), name


@pytest.mark.parametrize(
    "cell, word",
    [
        (dict(entropy=0.85), "diffuse"),
        (dict(entropy=0.84), "itself"),
        (dict(itself=0.39), "mixed, most to: itself"),
        (dict(itself=0.2), "mixed, most to: itself"),
        (dict(itself=0.19), "mixed"),
        (dict(induction=0.5), "induction"),
        (dict(itself=np.nan), "mixed"),
    ],
)
def test_a_head_in_a_word(cell, word):
    plain = dict.fromkeys(attention_maps.PATTERNS, 0.0) | {"itself": 0.4, "entropy": 0.1}
    assert attention_maps.head_role(plain | cell) == word


# ---- look.py -------------------------------------------------------------------------------------


def test_rows_are_spread_over_their_segments():
    """Five of 20 and 30 rows are three of each, evenly; a segment of two gives both."""
    segments = [range(0, 20), range(20, 50), range(50, 52)]
    data = SimpleNamespace(eval_groups=lambda split: segments)
    batches = lambda **c: [
        b.tolist()
        for b in trained_run.batches(SimpleNamespace(data=data, config=SimpleNamespace(split="test", **c)))
    ]
    assert batches(rows=7, eval_batch_size=2) == [[0, 6], [13], [20, 30], [40], [50, 51]]
    assert sum(map(len, batches(rows=0, eval_batch_size=7))) == 52
    assert sum(map(len, batches(rows=1000, eval_batch_size=100))) == 52


def test_a_known_row_has_no_wrong_label(monkeypatch):
    found = [
        {"row": np.array([3, 3, 4, 4, 5]), "hit": np.array([True, True, True, False, True])},
        {"row": np.array([9, 8]), "hit": np.array([False, True])},
    ]
    monkeypatch.setattr(trained_run, "iter_predictions", lambda *_, **__: found)
    config = SimpleNamespace(split="test", eval_batch_size=5)
    about = SimpleNamespace(config=config, model=None, data=None, device=None, dtype=None)
    assert trained_run.correct_examples(about).tolist() == [3, 5, 8]


def test_labels_have_places_in_their_rows():
    targets = torch.tensor([[-100, 4, -100, 6], [-100, -100, -100, -100], [7, -100, 8, 9]])
    rows, at, place, answer = trained_run.label_positions(
        SimpleNamespace(targets=targets, rows=np.array([5, 6, 7]))
    )
    assert rows.tolist() == [5, 5, 7, 7, 7] and at.tolist() == [1, 3, 0, 2, 3]
    assert place.tolist() == [0, 1, 0, 1, 2] and answer.tolist() == [4, 6, 7, 8, 9]


# ---- edits.py ------------------------------------------------------------------------------------


def test_sides_of_an_edit_share_no_fact(monkeypatch, capsys):
    """30 known facts, 4 rewritten: 13 that a method may use, 13 others, each answered as before."""
    texts = [f"{i:02}:{i * 7 % 97:02} " for i in range(30)]
    source = SimpleNamespace(read=lambda split, rows: ([texts[r] for r in rows], {}))
    model, given, asked = torch.nn.Linear(1, 1), [], []
    config = SimpleNamespace(edits=(4,), split="test")

    def a_look(seed):
        plan = SimpleNamespace(train=SimpleNamespace(seed=seed))
        world, data = SimpleNamespace(size=1), SimpleNamespace(source=source)
        return SimpleNamespace(
            model=model, config=config, settings=plan, world=world, data=data, name="x", folder="x"
        )

    monkeypatch.setattr(editing, "correct_examples", lambda look: np.arange(30))
    monkeypatch.setattr(editing, "encode", lambda trained_run, some: (some, some))
    method = lambda model, x, y, kept, kept_y: given.append((x, kept))
    monkeypatch.setattr(editing, "EDITORS", {"none": method})
    monkeypatch.setattr(editing, "n_correct", lambda model, x, y: asked.append(x) or len(x) - 1)
    kept = {}
    monkeypatch.setattr(editing, "save_result", lambda trained_run, what, metrics, *rest: kept.update(rest[0]))
    for seed in (0, 1):
        editing.compare_editors(a_look(seed))
    (new, may_use), (new_again, _) = given
    _, others, measured = asked[:3]
    assert len(new) == 4 and len(may_use) == len(others) == 13 and measured == may_use
    keys = lambda some: {text.split(":")[0] for text in some}
    assert len(keys(new) | keys(may_use) | keys(others)) == 30
    assert set(may_use) | set(others) <= set(texts) and not set(new) & set(texts)
    cell = kept["method and edits"]["none, 4"]
    assert (
        cell["efficacy"]["value"] == 3 / 4 and cell["specificity"]["n"] == cell["kept"]["n"] == 13
    )
    assert keys(new) != keys(new_again)  # the run's seed decides


# ---- compare.py ----------------------------------------------------------------------------------


def a_run(name, settings, curve):
    by_slice = {"kind": {"1": 0.5, "2": 0.25}}
    cell = {"value": 0.5, "ci95": [0.4, 0.6], "n": 9}
    return dict(
        run=name,
        series="gpt",
        settings=settings,
        curve=curve,
        by_slice=by_slice,
        state=0,
        params=5,
        all=cell,
    )


def test_seeds_share_a_line_with_mean_and_range(monkeypatch, tmp_path):
    """Two seeds at steps 1 and 2, one of which went on to 3, beside a run with other settings."""
    runs = [
        a_run("a", "x", [(1, 2.0, 0.1), (2, 1.0, 0.3), (3, 0.5, 0.5)]),
        a_run("b", "x", [(1, 4.0, 0.2), (2, 3.0, 0.7)]),
        a_run("c", "y", [(1, 9.0, 0.0)]),
    ]
    assert [len(same) for same in compare.group_seeds(runs).values()] == [2, 1]
    drawn = []
    monkeypatch.setattr(compare, "finish_figure", lambda fig, *_: drawn.extend(fig.axes))
    compare.plot_compare(str(tmp_path / "x.png"), runs)
    losses, accuracies, slices, _ = drawn
    assert losses.lines[0].get_xydata().tolist() == [[1, 3], [2, 2]]
    np.testing.assert_allclose(accuracies.lines[0].get_xydata(), [[1, 0.15], [2, 0.5]])
    band = losses.collections[0].get_paths()[0].vertices
    assert {(1.0, 2.0), (1.0, 4.0), (2.0, 1.0), (2.0, 3.0)} <= {tuple(v) for v in band.tolist()}
    assert slices.lines[0].get_xydata().tolist() == [[0, 0.5], [1, 0.25]]
