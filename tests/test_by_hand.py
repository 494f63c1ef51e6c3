"""Numbers of the analyses against values worked out by hand, or in a slow way of their own."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from analysis import (
    attention_maps,
    compare,
    confidence,
    editing,
    routing,
    significance,
    trained_run,
)
from analysis.trained_run import write_parquet
from nanorecall import metrics, stats

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
