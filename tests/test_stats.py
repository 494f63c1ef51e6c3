"""stats.py: by hand, against scipy, and by simulation."""

import numpy as np
import pytest

from nanorecall import metrics, stats


def width(cell):
    low, high = cell["ci95"]
    return high - low


def covers(cell, truth):
    low, high = cell["ci95"]
    return low <= truth <= high


def test_mcnemar_by_hand():
    """Of 11 examples that only one model gets right, a has 1: p = 2 (1 + 11) / 2^11.

    The 37 others do not count.
    """
    a = np.repeat([True, False, True, False], [1, 10, 30, 7])
    b = np.repeat([False, True, True, False], [1, 10, 30, 7])
    assert stats.mcnemar(a, b) == {"only_a": 1, "only_b": 10, "p": pytest.approx(2 * 12 / 2**11)}
    assert stats.mcnemar(a, a)["p"] == 1
    many = np.arange(20000) < 10100  # p of a normal with the variance n / 4: 0.157
    assert stats.mcnemar(many, ~many)["p"] == pytest.approx(0.157, abs=3e-3)


def test_holm_by_hand():
    assert stats.holm([0.01, 0.02, 0.5, 0.04]) == pytest.approx([0.04, 0.06, 0.5, 0.08])
    assert stats.holm([0.3, 0.001]) == pytest.approx([0.3, 0.002])
    assert stats.holm([]) == []
    # Never below that of a smaller p.
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_ranks_share_ties():
    assert stats.rankdata(np.array([10, 20, 10, 5])).tolist() == [2.5, 4, 2.5, 1]


@pytest.fixture
def scipy_stats():
    return pytest.importorskip("scipy.stats")


def correlated_pairs():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 8, 60)
    return x, x + rng.normal(0, 4, 60)


@pytest.mark.parametrize("kind, name", [("pearson", "pearsonr"), ("spearman", "spearmanr")])
def test_correlation_against_scipy(scipy_stats, kind, name):
    x, y = correlated_pairs()
    ours = stats.correlation(x, y, kind, draws=4000)
    expected = getattr(scipy_stats, name)(x, y)
    assert ours["value"] == pytest.approx(expected.statistic, abs=1e-12)
    assert ours["p"] == pytest.approx(expected.pvalue, abs=0.01)
    assert covers(ours, ours["value"])


@pytest.mark.parametrize("only_a, only_b", [(3, 9), (0, 6), (5, 5), (20, 31)])
def test_mcnemar_against_scipy(scipy_stats, only_a, only_b):
    a = np.repeat([True, False], [only_a, only_b])
    expected = scipy_stats.binomtest(only_a, only_a + only_b).pvalue
    assert stats.mcnemar(a, ~a)["p"] == pytest.approx(expected)


def test_bootstrap_against_scipy(scipy_stats):
    _, y = correlated_pairs()
    options = dict(n_resamples=4000, method="percentile", rng=np.random.default_rng(1))
    expected = scipy_stats.bootstrap((y,), np.mean, **options).confidence_interval
    ours = stats.paired_bootstrap(y, draws=4000)["ci95"]
    assert ours == pytest.approx([expected.low, expected.high], abs=0.15)


def test_intervals_cover_the_truth_as_often_as_they_say():
    """1,000 draws each: 3 standard errors are 2%. A bootstrap of 60 examples is slightly narrow."""
    rng = np.random.default_rng(0)
    n_covered = 0
    for _ in range(1000):
        n_covered += covers(stats.mean_ci(rng.exponential(1, 80)), 1)
    assert 910 < n_covered < 970
    n_covered = 0
    for _ in range(1000):
        n_covered += covers(stats.paired_bootstrap(rng.normal(0.3, 1, 60), draws=300), 0.3)
    assert 915 < n_covered < 970


def test_bootstrap_resamples_examples():
    """Ten equal labels per example: sqrt(10) times the width of ten independent ones."""
    examples = np.random.default_rng(0).normal(0, 1, 200)
    weighted = stats.paired_bootstrap(examples, np.full(200, 10))
    independent = stats.paired_bootstrap(np.repeat(examples, 10))
    assert width(weighted) / width(independent) == pytest.approx(np.sqrt(10), rel=0.15)
    assert stats.paired_bootstrap([0.0, 1.0], [3, 1])["value"] == 0.25


def test_a_bootstrap_of_examples_of_unequal_weight(scipy_stats):
    """Examples of many measurements differ more here: unweighted draws would lie elsewhere."""
    rng = np.random.default_rng(0)
    weights = rng.integers(1, 9, 40)
    difference = weights / 4 + rng.normal(0, 0.5, 40)

    def weighted_mean(difference, weights):
        return np.average(difference, weights=weights)

    options = dict(paired=True, n_resamples=8000, method="percentile", vectorized=False, rng=rng)
    expected = scipy_stats.bootstrap((difference, weights), weighted_mean, **options)
    ours = stats.paired_bootstrap(difference, weights, draws=8000)
    assert ours["value"] == pytest.approx(weighted_mean(difference, weights), rel=1e-12)
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
    assert stats.format_ci(stats.mean_ci([5.0])) == (1, "5.0000", "")


def test_the_mean_of_labels_by_hand():
    """Two clusters, 1 label of 3 and 3 that sum to 1: the mean is 4 / 4, residuals 3 - 1 and 1 - 3.

    Their squares sum to 8, so the standard error is sqrt(8 * 2) / 4.
    """
    cell = stats.label_mean_ci([3, 1], [1, 3])
    assert cell == {"value": 1, "ci95": pytest.approx([1 - 1.959964, 1 + 1.959964]), "n": 4}
    assert stats.label_mean_ci([5.0], [2])["ci95"] == [-np.inf, np.inf]


def test_pairs_of_examples_share_their_first_or_their_second_one():
    """The outcome of a pair is an effect of each of its two examples: 95% of intervals cover it."""
    rng = np.random.default_rng(0)
    first, second = np.divmod(np.arange(30 * 30), 30)
    n_covered, n_naive = 0, 0
    for _ in range(400):
        effect = rng.normal(size=30)[first] + rng.normal(size=30)[second]
        correct = effect + rng.normal(size=900) > 0
        n_covered += covers(stats.crossed_proportion(correct, first, second), 0.5)
        n_naive += covers(stats.clustered_proportion(correct, first), 0.5)
    assert 366 <= n_covered <= 394 and n_naive < 360
    one = stats.crossed_proportion(np.ones(900), first, second)
    assert one["value"] == 1 and one["ci95"][1] == 1


def test_means_of_clusters_with_as_many_labels_are_means_of_cluster_means():
    rng = np.random.default_rng(0)
    x, cluster = rng.random(60), np.repeat(np.arange(20), 3)
    totals = stats.totals(x, cluster)
    pairs = {stats.label_mean_ci: stats.clustered_mean_ci}
    pairs[stats.label_mean_proportion] = stats.clustered_mean_proportion
    for of_labels, of_clusters in pairs.items():
        cell, expected = of_labels(*totals), of_clusters(x, cluster)
        assert cell["value"] == pytest.approx(expected["value"])
        assert cell["ci95"] == pytest.approx(expected["ci95"])
    assert stats.label_mean_proportion([2.0, 3.0], [2, 3])["ci95"][1] == 1


@pytest.mark.parametrize("correct, n", [([1, 1, 0, 0, 1, 0], 3), ([1, 0, 0, 1, 1, 0], 6)])
def test_effective_sample_size_by_hand(correct, n):
    """Three clusters of two labels with 2, 0 and 1 correct: p = 1/2, squared distances 1 + 1 + 0.

    Times G / (G - 1) = 3/2 over 6 p (1 - p) = 3/2 is a design effect of 2: 3 labels of 6. With
    1, 1 and 1 correct, clusters vary less than chance, and no label counts for more than one.
    """
    counts = stats.cluster_counts(np.array(correct) == 1, np.repeat([0, 1, 2], 2))
    assert stats.effective_sample_size(counts) == n


def test_equal_labels_of_a_cluster_count_as_one():
    """100 clusters of ten equal labels have the interval of 100 labels; independent, of 1,000."""
    rng = np.random.default_rng(0)
    cluster = np.repeat(np.arange(100), 10)
    equal = stats.clustered_proportion(np.repeat(rng.random(100) < 0.3, 10), cluster)
    expected = stats.wilson_interval(100 * equal["value"], 100)
    assert equal["ci95"] == pytest.approx(expected, abs=0.01)
    independent = stats.clustered_proportion(rng.random(1000) < 0.3, cluster)
    expected = stats.wilson_interval(1000 * independent["value"], 1000)
    assert independent["ci95"] == pytest.approx(expected, abs=0.01)
    all_correct = stats.clustered_proportion(np.ones(1000), cluster)
    assert all_correct["ci95"] == pytest.approx(stats.wilson_interval(100, 100))


def test_clustered_proportion_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    n_covered = 0
    for _ in range(1000):
        p = rng.beta(1, 2, 60).repeat(6)
        cell = stats.clustered_proportion(rng.random(360) < p, np.arange(360) // 6)
        n_covered += covers(cell, 1 / 3)
    assert 920 < n_covered < 975


@pytest.mark.parametrize("size", [1, 6, 32])
@pytest.mark.parametrize("each_in_its_own", [True, False])
def test_intervals_are_shortest_where_all_is_correct(size, each_in_its_own):
    """300 examples of `size` labels, with more and more errors.

    Each error is in an example of its own, or all are in as few as hold them.
    """
    example = np.repeat(np.arange(300), size)
    whole = stats.clustered_proportion(np.ones(len(example)), example)
    assert whole["ci95"] == pytest.approx(stats.wilson_interval(300, 300))
    before = whole
    for n_errors in (1, 2, 3, 5, 9, 30, 100):
        wrong = np.arange(n_errors)
        if each_in_its_own:
            wrong = wrong * size % len(example)
        correct = np.ones(len(example), bool)
        correct[wrong] = False
        cell = stats.clustered_proportion(correct, example)
        low, high = cell["ci95"]
        assert 0 <= low <= cell["value"] <= high <= 1
        assert width(cell) >= width(whole) - 1e-12
        assert low <= before["ci95"][0] + 1e-12
        inverse = stats.clustered_proportion(~correct, example)
        assert [1 - x for x in inverse["ci95"]] == pytest.approx([high, low])
        before = cell


def test_the_largest_sample_size_by_hand():
    """The interval of all correct in 100 examples is 3.8415 / 103.8415 long.

    Just below 1 the bound gives an interval of that length. Far from 0 and 1 it does not matter.
    """
    assert stats.max_sample_size(1.0, 100) == pytest.approx(100) == stats.max_sample_size(0.0, 100)
    for p in (0.99, 0.999, 0.9999):
        n = stats.max_sample_size(p, 100)
        low, high = stats.wilson_interval(p * n, n)
        assert high - low == pytest.approx(3.841459 / 103.841459, rel=1e-5) and n > 100
    assert stats.max_sample_size(0.5, 100) > 1000


def test_means_of_fractions_stay_between_0_and_1():
    """And no interval is shorter than that of as many ones, which is Wilson's."""
    low, high = stats.wilson_interval(10, 10)
    shortest = high - low
    assert width(stats.mean_proportion([1.0] * 10)) == pytest.approx(shortest)
    for x in ([1.0] * 10, [0.0] * 10, [0.999] * 9 + [0.9], [0.5] * 10, [0.2, 0.9, 0.4] * 3 + [0.5]):
        cell = stats.mean_proportion(x)
        low, high = cell["ci95"]
        assert 0 <= low <= cell["value"] <= high <= 1
        assert cell["value"] == pytest.approx(np.mean(x))
        assert width(cell) >= shortest - 1e-12
    assert stats.mean_proportion([0.5])["value"] == 0.5


def test_the_interval_of_a_mean_of_fractions():
    """Of zeros and ones it is Wilson's, but for n - 1."""
    interval = stats.wilson_interval(80, 100)
    zeros_and_ones = np.arange(100) < 80
    assert stats.mean_proportion(zeros_and_ones)["ci95"] == pytest.approx(interval, abs=2e-3)
    rng = np.random.default_rng(0)
    n_covered = 0
    for _ in range(1000):
        n_covered += covers(stats.mean_proportion(rng.beta(2, 5, 50)), 2 / 7)
    assert 930 < n_covered < 970


def test_counts_of_batches_add_up_to_the_interval_of_all_examples():
    """Sums over batches give clustered_proportion of the whole."""
    rng = np.random.default_rng(1)
    cluster = np.repeat(np.arange(200), rng.integers(1, 9, 200))
    correct = rng.random(len(cluster)) < rng.beta(0.3, 0.3, 200)[cluster]
    counts = []
    for i in range(7):
        in_batch = cluster % 7 == i
        sums = stats.cluster_counts(correct[in_batch], cluster[in_batch])
        counts.append({"all": {**sums, "loss": 0.0}, "by_slice": {}})
    cell = metrics.slice_metrics(metrics.merge_counts(counts)["all"])
    whole = stats.clustered_proportion(correct, cluster)
    assert cell["value"] == whole["value"] and cell["n"] == len(correct)
    assert cell["ci95"] == pytest.approx(whole["ci95"])
    assert width(cell) > 1.5 * width(stats.proportion(int(correct.sum()), len(correct)))


def test_permutation_p_values_are_uniform_without_correlation():
    rng = np.random.default_rng(0)
    p = np.zeros(1000)
    for i in range(1000):
        p[i] = stats.correlation(rng.normal(size=12), rng.normal(size=12), draws=99)["p"]
    assert np.mean(p <= 0.05) == pytest.approx(0.05, abs=0.02)
    assert np.mean(p <= 0.5) == pytest.approx(0.5, abs=0.05)


def test_correlation_with_a_constant_is_nan():
    found = stats.correlation([1, 1, 1], [1, 2, 3])
    assert np.isnan(found["value"]) and np.isnan(found["p"])
