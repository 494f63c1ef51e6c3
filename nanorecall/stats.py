"""Confidence intervals and significance tests. A measured number is {"value", "ci95", "n"}.

>>> correct, wrong = np.array([1, 1, 1, 1, 1, 0]) == 1, np.zeros(6, bool)
>>> mcnemar(correct, wrong)["p"]  # 5 to 0: 2 / 2**5
0.0625
>>> holm([0.01, 0.04, 0.03])
[0.03, 0.06, 0.06]

Labels of one example are correlated: a model that knows a fact predicts all of its digits.
Functions named clustered_* therefore take the number of the cluster, the example, of each label.

Letters: n measurements, N labels, G clusters.
"""

import math

import numpy as np

Z95 = 1.959964  # 95% of a normal distribution lie within this many standard deviations


# ---- intervals -----------------------------------------------------------------------------------


def wilson_interval(n_correct, n):
    """95% interval of the proportion n_correct / n of independent measurements (Wilson 1927).

    It stays in [0, 1] and is valid for 0 and n correct. Both may be fractions.
    """
    if n == 0:
        return 0.0, 1.0
    p = n_correct / n
    q = Z95 * Z95 / n
    middle = (p + q / 2) / (1 + q)
    half = Z95 * math.sqrt(p * (1 - p) / n + q / (4 * n)) / (1 + q)
    # Rounding may leave p just outside of the interval.
    return max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half))


def proportion(n_correct, n):
    """{"value", "ci95", "n"} of a proportion of independent measurements."""
    return {"value": n_correct / n, "ci95": wilson_interval(n_correct, n), "n": n}


def max_sample_size(p, n):
    """The sample size at which Wilson's interval of p is as long as that of n correct out of n.

    A few errors say little about the correlation within a cluster. Without this bound, a single
    error would make the interval many times shorter than no error does. The two lengths are
    2 z sqrt(p (1 - p) / N + z^2 / 4 N^2) / (1 + z^2 / N) and z^2 / (n + z^2).

    >>> round(max_sample_size(1.0, 100), 6), round(max_sample_size(0.999, 100), 1)
    (100.0, 105.6)
    """
    zz = Z95 * Z95
    squared = (n + zz) ** 2
    b = zz - 2 * p * (1 - p) * squared / zz
    return math.sqrt(b * b + squared - zz * zz) - b


def effective_sample_size(counts):
    """Number of independent labels whose accuracy varies as much as that of these clusters.

    It is the number of labels over the design effect (Kish 1965), which is at least 1, and at most
    `max_sample_size`. If all labels are correct or all are wrong, it is the number of clusters.
    counts: see `cluster_sums`.
    """
    n, G = counts["labels"], counts["n_examples"]
    p = counts["correct"] / n
    if not 0 < p < 1 or G < 2:
        return G
    # Sum over clusters of (correct labels - p * labels)^2
    squares = counts["correct_correct"] - 2 * p * counts["correct_labels"]
    squares += p * p * counts["labels_labels"]
    design_effect = squares * G / (G - 1) / (n * p * (1 - p))
    return min(n / max(1.0, design_effect), max_sample_size(p, G))


def cluster_sums(n_labels, n_correct):
    """Labels and correct labels of each cluster (G,) -> sums over clusters; batches add up.

    "exact_matches" counts clusters without a wrong label. The sums of squares are the second
    moments that the design effect needs.
    """
    per_cluster = {
        "correct": n_correct,
        "labels": n_labels,
        "exact_matches": n_correct == n_labels,
        "n_examples": np.ones_like(n_labels),
        "correct_correct": n_correct * n_correct,
        "correct_labels": n_correct * n_labels,
        "labels_labels": n_labels * n_labels,
    }
    return {name: int(x.sum()) for name, x in per_cluster.items()}


def cluster_counts(correct, cluster):
    """`cluster_sums` of labels: correct (N,) bool, cluster (N,)."""
    _, index = np.unique(cluster, return_inverse=True)
    return cluster_sums(np.bincount(index), np.bincount(index, correct).astype(int))


def label_accuracy(counts):
    """{"value", "ci95", "n"} of the proportion of correct labels in `cluster_sums`."""
    p, n = counts["correct"] / counts["labels"], effective_sample_size(counts)
    return {"value": p, "ci95": wilson_interval(p * n, n), "n": counts["labels"]}


def clustered_proportion(correct, cluster):
    """{"value", "ci95", "n"} of labels: correct (N,) bool, cluster (N,)."""
    return label_accuracy(cluster_counts(np.asarray(correct, bool), cluster))


def mean_ci(x):
    """{"value", "ci95", "n"} of the mean of independent measurements (n,): 1.96 standard errors."""
    x = np.asarray(x, float)
    mean = x.mean()
    half = Z95 * x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.inf
    return {"value": float(mean), "ci95": [float(mean - half), float(mean + half)], "n": len(x)}


# 97.5% quantiles of Student's t with 1, 2, ... degrees of freedom.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160)


def mean_interval(values):
    """95% interval of the mean of a few runs (Student's t): (n, P) -> lower, upper end (P,).

    With a single run it is the value itself.
    """
    n, mean = len(values), values.mean(0)
    if n == 1:
        return mean, mean
    # Beyond the table, within 1% of Student's t.
    t = T95[n - 2] if n - 2 < len(T95) else Z95 * (1 + 1.5 / n)
    half = t * values.std(0, ddof=1) / math.sqrt(n)
    return mean - half, mean + half


def clustered_mean_ci(x, cluster):
    """`mean_ci` of cluster means: measurements x (N,) of clusters (N,)."""
    return mean_ci(cluster_means(x, cluster))


def label_mean_ci(sums, n_labels):
    """{"value", "ci95", "n"} of the mean of labels, from their sums and numbers by cluster (G,).

    The interval is 1.96 standard errors of a ratio of two sums (Cochran 1977, 6.3). With as many
    labels in each cluster it is the interval of `mean_ci` of cluster means.
    """
    value, error = label_mean(sums, n_labels)
    ci95 = [value - Z95 * error, value + Z95 * error]
    return {"value": value, "ci95": ci95, "n": int(np.sum(n_labels))}


def label_mean_proportion(sums, n_labels):
    """`label_mean_ci` of labels between 0 and 1, with an interval as that of `mean_proportion`."""
    sums = np.clip(sums, 0, n_labels)  # rounding may leave [0, 1]
    p, error = label_mean(sums, n_labels)
    return proportion_of_variance(p, error**2, len(sums), int(np.sum(n_labels)))


def crossed_proportion(correct, first, second):
    """{"value", "ci95", "n"} of labels: correct (N,) bool, two kinds of clusters (N,) each.

    Pairs of examples share their first or their second one. The variance is that over each kind of
    clusters less that over their intersections (Cameron, Gelbach and Miller 2011, 10.1198/
    jbes.2010.07136), and at least that of one kind.
    """
    correct = np.asarray(correct, float)
    _, pair = np.unique(np.stack([first, second]), axis=1, return_inverse=True)
    variances, sizes = [], []
    for cluster in (first, second, pair.ravel()):
        sums, n_labels = totals(correct, cluster)
        p, error = label_mean(sums, n_labels)
        variances.append(error**2)
        sizes.append(len(sums))
    of_first, of_second, of_pairs = variances
    both = of_first + of_second - of_pairs if math.isfinite(of_pairs) else math.inf
    variance = max(of_first, of_second, both)
    return proportion_of_variance(p, variance, min(sizes), len(correct))


def proportion_of_variance(p, variance, G, n):
    """{"value", "ci95", "n"} of a proportion p of n labels in G clusters: Wilson's interval."""
    size = p * (1 - p) / variance if 0 < variance < math.inf else math.inf
    size = min(size, max_sample_size(p, G))
    return {"value": p, "ci95": list(wilson_interval(p * size, size)), "n": n}


def label_mean(sums, n_labels):
    """-> the mean of labels, and its standard error (see `label_mean_ci`)."""
    sums, n_labels = np.asarray(sums, float), np.asarray(n_labels)
    G, n = len(sums), n_labels.sum()
    value = float(sums.sum() / n)
    squares = float(((sums - value * n_labels) ** 2).sum())
    return value, math.sqrt(squares * G / (G - 1)) / n if G > 1 else math.inf


def mean_proportion(x):
    """{"value", "ci95", "n"} of the mean of independent measurements (n,) between 0 and 1.

    Wilson's interval stays in [0, 1]. Its sample size is that of a proportion with x's variance.
    """
    x = np.clip(np.asarray(x, float), 0, 1)  # rounding may leave [0, 1]
    p, n = x.mean(), len(x)
    variance = x.var(ddof=1) if n > 1 else 0.0
    size = n * p * (1 - p) / variance if variance > 0 else math.inf
    size = min(size, max_sample_size(p, n))
    return {"value": float(p), "ci95": list(wilson_interval(p * size, size)), "n": n}


def clustered_mean_proportion(x, cluster):
    """`mean_proportion` of cluster means: measurements x (N,) of clusters (N,)."""
    return mean_proportion(cluster_means(x, cluster))


def cluster_means(x, cluster):
    """Means (G,) of the measurements x (N,) of each cluster."""
    sums, n = totals(x, cluster)
    return sums / n


def totals(x, cluster):
    """-> sums and numbers (G,) of the measurements x (N,) of each cluster."""
    _, index = np.unique(cluster, return_inverse=True)
    return np.bincount(index, x), np.bincount(index)


def calibration(confidence, correct, example):
    """Accuracy against confidence in ten bins of equal width -> (bins, expected calibration error).

    A bin is a proportion {"value", "ci95", "n"} with its mean "confidence". The error is the mean
    over labels of the distance between the two.
    """
    bin_of_label = np.minimum((confidence * 10).astype(int), 9)
    bins, error = [], 0.0
    for number in np.unique(bin_of_label):
        mask = bin_of_label == number
        accuracy = clustered_proportion(correct[mask], example[mask])
        cell = {"confidence": float(confidence[mask].mean()), **accuracy}
        error += abs(cell["confidence"] - cell["value"]) * mask.mean()
        bins.append(cell)
    return bins, float(error)


def format_ci(cell):
    """{"value", "ci95", "n"} -> n, and value and interval as text.

    The interval of one measurement is infinite, and its text empty.
    """
    low, high = cell["ci95"]
    interval = "" if math.isinf(low) else f"{low:.4f} - {high:.4f}"
    return cell["n"], f"{cell['value']:.4f}", interval


# ---- significance tests --------------------------------------------------------------------------
# scipy.stats has these too; the tests compare with it. It would be one more package of 35 MB.


def mcnemar(a, b):
    """Exact two-sided test of whether two models are correct equally often (McNemar 1947).

    a, b (n,) bool: correct or not on the same examples. -> {"only_a", "only_b", "p"}
    Only the examples on which the models differ count.
    """
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    n, fewer = only_a + only_b, min(only_a, only_b)
    # Whole numbers, each n over k from the one before.
    term, total = 1, 1
    for k in range(fewer):
        term = term * (n - k) // (k + 1)
        total += term
    tail = total / 2**n
    return {"only_a": only_a, "only_b": only_b, "p": min(1.0, 2 * tail)}


def paired_bootstrap(difference, weights=None, draws=2000, seed=0):
    """{"value", "ci95", "n"} of the mean of paired differences (n,), by resampling examples.

    The interval is that of percentiles (Efron 1979).
    weights (n,): the number of measurements of each example; the mean is over measurements.
    """
    difference = np.asarray(difference, float)
    weights = np.ones(len(difference)) if weights is None else np.asarray(weights, float)
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(draws):
        drawn = rng.integers(len(difference), size=len(difference))
        means.append((difference[drawn] * weights[drawn]).sum() / weights[drawn].sum())
    value = float((difference * weights).sum() / weights.sum())
    ci95 = np.quantile(means, [0.025, 0.975]).tolist()
    return {"value": value, "ci95": ci95, "n": len(difference)}


def rankdata(x):
    """Ranks of x (n,), 1 for the smallest; ties share the mean of their ranks -> (n,)"""
    _, index, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[index]


def pearson(x, y):
    """Pearson's correlation of x and y (n,); nan if one of them is constant."""
    x = np.asarray(x, float) - np.mean(x)
    y = np.asarray(y, float) - np.mean(y)
    size = math.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / size) if size > 0 else math.nan


def correlation(x, y, kind="spearman", draws=2000, seed=0):
    """{"value", "ci95", "n", "p"} of the correlation of x and y (n,), "spearman" or "pearson".

    p: two-sided permutation test, with the given order as one of the permutations. ci95: bootstrap
    over pairs. All are nan if x or y is constant.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if kind == "spearman":
        x, y = rankdata(x), rankdata(y)
    value = pearson(x, y)
    if math.isnan(value):
        return {"value": value, "ci95": [value, value], "n": len(x), "p": value}
    rng = np.random.default_rng(seed)
    permuted = np.array([pearson(x, rng.permutation(y)) for _ in range(draws)])
    # Permutations that give the same correlation may differ from it by rounding.
    n_extreme = (np.abs(permuted) >= abs(value) - 1e-12).sum()
    resampled = []
    for _ in range(draws):
        drawn = rng.integers(len(x), size=len(x))
        resampled.append(pearson(x[drawn], y[drawn]))
    ci95 = np.nanquantile(resampled, [0.025, 0.975]).tolist()
    return {"value": value, "ci95": ci95, "n": len(x), "p": float((1 + n_extreme) / (1 + draws))}


def holm(p):
    """Adjust the p values of several tests, so that 0.05 bounds the error of all (Holm 1979)."""
    adjusted = [0.0] * len(p)
    largest = 0.0
    for n_before, i in enumerate(np.argsort(p, kind="stable")):
        largest = max(largest, min(1.0, (len(p) - n_before) * p[i]))
        adjusted[i] = float(largest)
    return adjusted


def add_holm(cells):
    """Add "p_holm" to each of several results with a "p"."""
    for cell, p in zip(cells, holm([cell["p"] for cell in cells])):
        cell["p_holm"] = p


def correlation_lines(cells):
    """Lines of a table of {name: what `correlation` returned}, which get a "p_holm" each."""
    add_holm(cells.values())
    lines = []
    for name, cell in cells.items():
        lines.append((name, *format_ci(cell), f"{cell['p']:.4f}", f"{cell['p_holm']:.4f}"))
    return lines
