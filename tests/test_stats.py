"""stats.py: by hand, against scipy, and by simulation. repair.py: files cut at every byte."""

import json
import os

import numpy as np
import pytest

import eval as ev
from analysis.repair import complete_json, complete_lines
from nanorecall import metrics, stats
from nanorecall.settings import ConfigError


def test_mcnemar_by_hand():
    """11 examples only one model gets right, 1 of them a: 2 (1 + 11) / 2^11. Others do not count."""
    a = np.array([1] * 1 + [0] * 10 + [1] * 30 + [0] * 7) == 1
    b = np.array([0] * 1 + [1] * 10 + [1] * 30 + [0] * 7) == 1
    assert stats.mcnemar(a, b) == {"only_a": 1, "only_b": 10, "p": pytest.approx(2 * 12 / 2**11)}
    assert stats.mcnemar(a, a)["p"] == 1


def test_holm_by_hand():
    assert stats.holm([0.01, 0.02, 0.5, 0.04]) == pytest.approx([0.04, 0.06, 0.5, 0.08])
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # never below one with a smaller p
    assert stats.holm([0.3, 0.001]) == pytest.approx([0.3, 0.002]) and stats.holm([]) == []


def test_ranks_share_ties():
    assert stats.rankdata(np.array([10, 20, 10, 5])).tolist() == [2.5, 4, 2.5, 1]


def test_against_scipy():
    scipy_stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(0)
    x = random.integers(0, 8, 60)
    y = x + random.normal(0, 4, 60)
    for kind, theirs in (("pearson", scipy_stats.pearsonr), ("spearman", scipy_stats.spearmanr)):
        ours = stats.correlation(x, y, kind, draws=4000)
        expected = theirs(x, y)
        assert ours["value"] == pytest.approx(expected.statistic, abs=1e-12)
        assert ours["p"] == pytest.approx(expected.pvalue, abs=0.01)
        assert ours["ci95"][0] < ours["value"] < ours["ci95"][1]
    for only_a, only_b in ((3, 9), (0, 6), (5, 5), (20, 31)):
        a, b = np.repeat([True, False], [only_a, only_b]), np.repeat([False, True], [only_a, only_b])
        assert stats.mcnemar(a, b)["p"] == pytest.approx(scipy_stats.binomtest(only_a, only_a + only_b).pvalue)
    t = scipy_stats.bootstrap((y,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1))
    ours = stats.paired_bootstrap(y, draws=4000)["ci95"]
    assert ours == pytest.approx([t.confidence_interval.low, t.confidence_interval.high], abs=0.15)


def covers(interval, truth):
    return interval["ci95"][0] <= truth <= interval["ci95"][1]


def test_intervals_cover_the_truth_as_often_as_they_say():
    """1,000 draws each: 3 standard errors are 2%. A bootstrap of 60 examples is slightly narrow."""
    random = np.random.default_rng(0)
    plain = np.mean([covers(stats.mean_ci(random.exponential(1, 80)), 1) for _ in range(1000)])
    drawn = np.mean([covers(stats.paired_bootstrap(random.normal(0.3, 1, 60), draws=300), 0.3) for _ in range(1000)])
    assert 0.91 < plain < 0.97 and 0.915 < drawn < 0.97


def test_bootstrap_resamples_examples():
    """Ten equal labels per row: the interval is sqrt(10) times as wide as that of independent ones."""
    random = np.random.default_rng(0)
    rows = random.normal(0, 1, 200)
    width = lambda cell: cell["ci95"][1] - cell["ci95"][0]
    weighted = stats.paired_bootstrap(rows, np.full(200, 10))
    assert width(weighted) / width(stats.paired_bootstrap(np.repeat(rows, 10))) == pytest.approx(np.sqrt(10), rel=0.15)
    assert stats.paired_bootstrap([0.0, 1.0], [3, 1])["value"] == 0.25


def test_a_bootstrap_of_examples_of_unequal_weight():
    """Examples of many measurements differ more here: unweighted draws would lie elsewhere."""
    scipy_stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(0)
    weights = random.integers(1, 9, 40)
    difference = weights / 4 + random.normal(0, 0.5, 40)
    options = dict(paired=True, n_resamples=8000, method="percentile", vectorized=False)
    weighted = lambda d, w: np.average(d, weights=w)
    expected = scipy_stats.bootstrap((difference, weights), weighted, **options, rng=random)
    ours = stats.paired_bootstrap(difference, weights, draws=8000)
    assert ours["value"] == pytest.approx(np.average(difference, weights=weights), rel=1e-12)
    assert ours["ci95"] == pytest.approx([*expected.confidence_interval], abs=0.02)
    assert ours["ci95"][0] > difference.mean() and ours["n"] == 40


def test_the_given_order_is_one_of_the_permutations():
    """Of 12! orders two are as extreme as a straight line; of two points every order is."""
    line = np.arange(12)
    for kind in ("pearson", "spearman"):
        assert stats.correlation(line, -2 * line, kind, draws=99)["p"] == 1 / 100
    assert stats.correlation([0, 1], [0, 1], draws=99)["p"] == 1


def test_the_mean_by_hand():
    """1 and 3 have the variance 2 about their mean, so that its standard error is 1."""
    cell = stats.mean_ci([1, 3])
    assert cell == {"value": 2, "ci95": pytest.approx([2 - 1.959964, 2 + 1.959964]), "n": 2}
    assert stats.mean_ci([5.0])["ci95"] == [-np.inf, np.inf]


def test_effective_labels_by_hand():
    """Three rows of two labels with 2, 0 and 1 right: p = 1/2, squared distances 1 + 1 + 0.

    Times G / (G - 1) = 3/2 over 6 p (1 - p) = 3/2 is a design effect of 2: 3 labels of 6. With
    1, 1 and 1 right rows vary less than chance, and no label counts for more than one.
    """
    row = np.repeat([0, 1, 2], 2)
    assert stats.effective_sample_size(stats.cluster_counts(np.array([1, 1, 0, 0, 1, 0]) == 1, row)) == 3
    assert stats.effective_sample_size(stats.cluster_counts(np.array([1, 0, 0, 1, 1, 0]) == 1, row)) == 6


def test_clustered_proportion_allows_for_correlated_labels():
    """Ten equal labels count as one, independent ones as ten; and coverage by simulation."""
    random = np.random.default_rng(0)
    rows = np.repeat(np.arange(100), 10)
    alike = stats.clustered_proportion(np.repeat(random.random(100) < 0.3, 10), rows)
    assert alike["ci95"] == pytest.approx(stats.wilson_interval(100 * alike["value"], 100), abs=0.01)
    apart = stats.clustered_proportion(random.random(1000) < 0.3, rows)
    assert apart["ci95"] == pytest.approx(stats.wilson_interval(1000 * apart["value"], 1000), abs=0.01)
    assert stats.clustered_proportion(np.ones(1000), rows)["ci95"] == pytest.approx(stats.wilson_interval(100, 100))
    found = []
    for _ in range(1000):
        hard = random.beta(1, 2, 60).repeat(6)
        cell = stats.clustered_proportion(random.random(360) < hard, np.arange(360) // 6)
        found.append(covers(cell, 1 / 3))
    assert 0.92 < np.mean(found) < 0.975


def test_counts_of_batches_add_up_to_the_interval_of_all_rows():
    """Sums over batches give clustered_proportion of the whole."""
    random = np.random.default_rng(1)
    row = np.repeat(np.arange(200), random.integers(1, 9, 200))
    hit = random.random(len(row)) < random.beta(0.3, 0.3, 200)[row]
    batches = [(hit[row % 7 == i], row[row % 7 == i]) for i in range(7)]
    counts = [{**stats.cluster_counts(*b), "loss": 0.0, "by_slice": {}} for b in batches]
    cell = metrics.slice_metrics(metrics.merge_counts(counts)["all"])
    whole = stats.clustered_proportion(hit, row)
    assert cell["value"] == whole["value"] and cell["ci95"] == pytest.approx(whole["ci95"]) and cell["n"] == len(hit)
    width = lambda c: c["ci95"][1] - c["ci95"][0]
    assert width(cell) > 1.5 * width(stats.proportion(int(hit.sum()), len(hit)))


def test_permutation_p_values_are_uniform_without_correlation():
    random = np.random.default_rng(0)
    p = [stats.correlation(random.normal(size=12), random.normal(size=12), draws=99)["p"] for _ in range(1000)]
    assert abs(np.mean(np.array(p) <= 0.05) - 0.05) < 0.02 and abs(np.mean(np.array(p) <= 0.5) - 0.5) < 0.05


def test_correlation_with_a_constant_is_nan():
    found = stats.correlation([1, 1, 1], [1, 2, 3])
    assert np.isnan(found["value"]) and np.isnan(found["p"])


# ---- cut files -----------------------------------------------------------------------------------

RECORDS = [{"row": i, "text": 'a "b", [c] {d} ü\n', "more": [1.5, None, True, {"x": []}]} for i in range(4)]


def test_json_lines_cut_at_any_byte_keep_every_complete_record(tmp_path):
    whole = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in RECORDS).encode()
    ends = np.cumsum([len(line) + 1 for line in whole.split(b"\n")[:-1]])
    for cut in range(len(whole)):
        records, lost = complete_lines(whole[:cut].decode(errors="ignore"))
        complete = sum(cut >= end - 1 for end in ends)  # the record is whole without its line's end
        assert records == RECORDS[:complete] and lost == (cut > ([0, *ends][complete]))


@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_cut_at_any_byte_keeps_every_complete_record(indent):
    whole = json.dumps(RECORDS, indent=indent)
    assert complete_json(whole) == (RECORDS, True)
    kept = []
    for cut in range(1, len(whole)):
        value, was_whole = complete_json(whole[:cut])
        assert not was_whole and value == RECORDS[: len(value)] and len(value) in (len(kept), len(kept) + 1)
        kept = value
    assert kept == RECORDS


def test_a_result_cut_at_any_byte_keeps_its_head_and_whole_examples():
    result = {"config": {"run": "a", "step": 12}, "metrics": {"accuracy": {"value": 0.5, "n": 34}}, "examples": RECORDS}
    whole = json.dumps(result, indent=1)
    for cut in range(1, len(whole)):
        value, _ = complete_json(whole[:cut])
        assert list(value) == list(result)[: len(value)]
        assert value.get("examples", []) == RECORDS[: len(value.get("examples", []))]
        if cut >= whole.index('"metrics"'):
            assert value["config"] == result["config"]
        if 0 < cut - whole.index("34") < 2:
            assert "n" not in value["metrics"]["accuracy"]  # 3 is not what it said


@pytest.mark.parametrize("text", ["12 x", "true x", '"abc" x', "", "nul", "[" * 100_000])
def test_bare_json_values_are_not_records(text):
    value, whole = complete_json(text)
    assert not isinstance(value, (dict, list)) and not whole
    assert complete_lines(text + '\n{"a": 1}\n') == ([{"a": 1}], 1 if text else 0)


def test_repair_writes_a_new_file_and_says_what_it_kept(tmp_path, capsys):
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in RECORDS)[:-20])
    ev.main(["repair", str(path)])
    assert "3 records kept, 1 lines lost" in capsys.readouterr().out
    assert [json.loads(line) for line in (tmp_path / "r.repaired.jsonl").read_text().splitlines()] == RECORDS[:3]
    other = tmp_path / "o.json"
    other.write_text('"abc" x')
    for words, message in (
        (["repair", str(path)], "exists already"),
        (["repair", str(tmp_path / "no.json")], "cannot be read: No such file"),
        (["repair", "x.txt"], "neither .json nor .jsonl"),
        (["repair", str(path), "--split=val"], "repair does not use it"),
        (["repair", str(other)], "holds no complete record"),
    ):
        with pytest.raises(ConfigError, match=message):
            ev.main(words)


def test_what_is_no_file_is_not_repaired(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(ConfigError, match="is no file"):
        ev.main(["repair", str(tmp_path / "a.jsonl")])
