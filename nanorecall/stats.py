"""What a difference is worth: intervals, tests, and the repair of result files that were cut.

    python eval.py stats runs/A                  # intervals of its test results; what correlates with the loss
    python eval.py stats runs/A runs/B           # the same rows, two models: McNemar, paired bootstrap
    python eval.py repair results.jsonl          # keep every complete record of a cut file

>>> mcnemar(np.array([1, 1, 1, 1, 1, 0]) == 1, np.array([0, 0, 0, 0, 0, 0]) == 1)["p"]  # 5 to 0: 2 / 2**5
0.0625
>>> holm([0.01, 0.04, 0.03])
[0.03, 0.06, 0.06]

Letters: n examples, N labels, R rows.
"""

import contextlib
import hashlib
import json
import math
import os

import numpy as np

from analysis.trained_run import BOOLEAN, NUMBER, WHOLE, read_parquet
from nanorecall.checkpoint import atomic_write, read_record, write_json
from nanorecall.metrics import cluster_sums, figure, finish_figure, format_ci, label_share, mean_ci, print_table, proportion
from nanorecall.settings import ConfigError, require, say

# ---- tests -------------------------------------------------------------------------------------------------------------


def mcnemar(a, b):
    """Are two models right equally often? Exact and two-sided (McNemar 1947): a, b (n,) bool, right or not on the same examples
    -> {"only_a", "only_b", "p"}. Examples that both answer alike say nothing."""
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    n, fewer = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n
    return {"only_a": only_a, "only_b": only_b, "p": min(1.0, 2 * tail)}


def paired_bootstrap(difference, weights=None, draws=2000, seed=0):
    """Mean of paired differences (n,), with the 95% interval of resampled examples (Efron 1979, percentiles).

    weights (n,): the number of measurements of each example; the mean is over these.
    """
    difference = np.asarray(difference, float)
    weights = np.ones(len(difference)) if weights is None else np.asarray(weights, float)
    random, means = np.random.default_rng(seed), []
    for _ in range(draws):
        mine = random.integers(len(difference), size=len(difference))
        means.append((difference[mine] * weights[mine]).sum() / weights[mine].sum())
    ends = np.quantile(means, [0.025, 0.975]).tolist()
    return {"value": float((difference * weights).sum() / weights.sum()), "ci95": ends, "n": len(difference)}


def rankdata(x):
    """1 for the smallest; equal ones share the mean of their ranks: (n,) -> (n,)"""
    _, which, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


def pearson(x, y):
    x, y = np.asarray(x, float) - np.mean(x), np.asarray(y, float) - np.mean(y)
    size = math.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / size) if size > 0 else math.nan


def correlation(x, y, kind="spearman", draws=2000, seed=0):
    """{"value", "ci95", "n", "p"} of Pearson's or Spearman's correlation of x and y (n,).

    p: share of permutations of y with a correlation as large either way, the given one counted with them (two-sided); the
    interval is that of resampled pairs. All nan if x or y has one value only.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if kind == "spearman":
        x, y = rankdata(x), rankdata(y)
    value, random = pearson(x, y), np.random.default_rng(seed)
    if math.isnan(value):
        return {"value": value, "ci95": [value, value], "n": len(x), "p": value}
    shuffled = np.array([pearson(x, random.permutation(y)) for _ in range(draws)])
    p = (1 + (np.abs(shuffled) >= abs(value) - 1e-12).sum()) / (1 + draws)
    drawn = (random.integers(len(x), size=len(x)) for _ in range(draws))
    ends = np.nanquantile([pearson(x[mine], y[mine]) for mine in drawn], [0.025, 0.975])
    return {"value": value, "ci95": ends.tolist(), "n": len(x), "p": float(p)}


def holm(p):
    """p values of several tests -> adjusted ones: below 0.05 they hold with 5% for all together (Holm 1979)."""
    order, adjusted, least = np.argsort(p, kind="stable"), [0.0] * len(p), 0.0
    for i, at in enumerate(order):
        least = max(least, min(1.0, (len(p) - i) * p[at]))
        adjusted[at] = float(least)
    return adjusted


def add_holm(cells):
    """Each cell's p gets a p_holm beside it, corrected for all cells together."""
    for cell, p in zip(cells, holm([cell["p"] for cell in cells])):
        cell["p_holm"] = p


# ---- the results of one run, or of two over the same rows --------------------------------------------------------------


LABELS = {"row": WHOLE, "hit": BOOLEAN, "loss": NUMBER}


def read_labels(path, split):
    """A run, or eval_<split>.json or .parquet in it -> {column: (N,) array}, a value for each label, sorted by row."""
    place = os.path.join(path, f"eval_{split}.parquet") if os.path.isdir(path) else os.path.splitext(path)[0] + ".parquet"
    columns = read_parquet(place, LABELS, f"python eval.py {path} --split {split} writes it")
    order = np.argsort(columns["row"], kind="stable")
    return {name: values[order] for name, values in columns.items()}


def per_example(labels):
    """{column: (N,)} -> {"row", "right" (all labels), "labels", "hits", "loss" (sum)}, (R,) each, and the
    tags that all labels of a row share."""
    row, first, which = np.unique(labels["row"], return_index=True, return_inverse=True)
    counts, hits = np.bincount(which), np.bincount(which, labels["hit"])
    tags = {name: v[first] for name, v in labels.items() if name not in ("row", "hit", "loss") and (v == v[first][which]).all()}
    sums = {"labels": counts, "hits": hits, "loss": np.bincount(which, labels["loss"])}
    return {"row": row, "right": hits == counts, **sums, **tags}


def stats(words, config):
    """Intervals and tests of one run's results, or of two over the same rows -> the path of the figure."""
    require(len(words) in (1, 2), "name one or two runs: python eval.py stats runs/A [runs/B]", None)
    found = [read_labels(w, config.split) for w in words]
    rows = [per_example(labels) for labels in found]
    tags = [name for name in rows[0] if name not in ("row", "right", "labels", "hits", "loss")]
    if len(words) == 1:
        result = one_run(rows[0], tags)
    else:
        same = found[0].keys() == found[1].keys() and all(
            np.array_equal(found[0][k], found[1][k]) for k in found[0] if k not in ("hit", "loss")
        )
        same &= data_of(words[0]) == data_of(words[1])
        advice = "give both the same data, seed and split"
        require(same, f"{words[0]} and {words[1]} were not measured on the same rows; {advice}", None)
        result = two_runs(rows, tags)
    name = f"eval_stats{stem_of(words[-1], config.split)}"
    if len(words) == 2:
        name += f"_against_{os.path.basename(os.path.splitext(os.path.normpath(words[0]))[0])}"
        places = [os.path.dirname(os.path.realpath(w)) for w in words]
        if places[0] != places[1]:  # another directory may have a run of this name, too
            name += f"-{hashlib.sha256(places[0].encode()).hexdigest()[:8]}"
    path = os.path.join(words[-1] if os.path.isdir(words[-1]) else os.path.dirname(words[-1]), name)
    write_json(path + ".json", {"config": {"runs": words, "split": config.split}, **result, "examples": []})
    plot_stats(path + ".png", result, words)
    say(f"wrote {path}.json, .png")
    return path + ".png"


def stem_of(path, split):
    """What a run's, or a result file's, name adds to the name of its statistics:
    eval_val_rows-10.json -> _val_rows-10"""
    stem = f"eval_{split}" if os.path.isdir(path) else os.path.basename(os.path.splitext(path)[0])
    rest = stem.removeprefix("eval_")
    return (
        ""
        if rest == "test"
        else rest.removeprefix("test")
        if rest.startswith("test_")
        else f"_{rest}"
    )


def data_of(path):
    """What decides which rows a run was measured on: the data in its config.json, or None for results without one."""
    path = os.path.join(path if os.path.isdir(path) else os.path.dirname(path), "config.json")
    if not os.path.exists(path):
        return None
    saved = read_record(path, {"data": "dict", "data_sha256": "dict"})
    not_rows = ("curriculum", "train_cells", "fresh", "n_train_examples")  # of training alone
    return {k: v for k, v in saved["data"].items() if k not in not_rows}, saved["data_sha256"]


def slices_of(rows, tags):
    """("tag=value", (R,) bool) for every slice of tags with at most 24 values; first all rows."""
    yield "all", np.ones(len(rows["row"]), bool)
    for tag in tags:
        values = np.unique(rows[tag])
        if 1 < len(values) <= 24:
            yield from ((f"{tag}={v}", rows[tag] == v) for v in values)


def one_run(rows, tags):
    by_slice = {
        name: {
            **label_share(cluster_sums(rows["labels"][mine], rows["hits"][mine])),
            "exact": proportion(int(rows["right"][mine].sum()), int(mine.sum())),
            "nll": mean_ci(rows["loss"][mine] / rows["labels"][mine]),
        }
        for name, mine in slices_of(rows, tags)
    }
    head = ("slice", "labels", "accuracy", "95% interval", "rows", "exact", "95% interval", "nats per label", "95% interval")
    print_table(head, [(k, *format_ci(c), *format_ci(c["exact"]), *format_ci(c["nll"])[1:]) for k, c in by_slice.items()])
    numeric = [t for t in tags if np.issubdtype(rows[t].dtype, np.number) and len(np.unique(rows[t])) > 1]
    found = {t: correlation(rows[t], rows["loss"] / rows["labels"]) for t in numeric}
    add_holm(found.values())
    if found:
        head = ("Spearman's correlation with the loss", "rows", "value", "95% interval", "p (permutations)", "Holm")
        print_table(head, [(t, *format_ci(c), f"{c['p']:.4f}", f"{c['p_holm']:.4f}") for t, c in found.items()])
    return {"metrics": {"all": by_slice.pop("all"), "correlation with loss": found}, "by_slice": by_slice}


def two_runs(rows, tags):
    a, b = rows
    by_slice = {}
    for name, mine in slices_of(a, tags):
        rate = (b["hits"][mine] - a["hits"][mine]) / a["labels"][mine]
        nll = (b["loss"][mine] - a["loss"][mine]) / a["labels"][mine]
        by_slice[name] = {
            "exact": [proportion(int(r["right"][mine].sum()), int(mine.sum())) for r in rows],
            "mcnemar": mcnemar(a["right"][mine], b["right"][mine]),
            "accuracy difference": paired_bootstrap(rate, a["labels"][mine]),
            "nll difference": paired_bootstrap(nll, a["labels"][mine]),
        }
    slices = [c for name, c in by_slice.items() if name != "all"]
    add_holm([c["mcnemar"] for c in slices])
    head = ("slice", "rows", "exact A", "exact B", "only A", "only B", "McNemar p", "Holm", "labels B - A", "95% interval")
    cells = []
    for name, c in by_slice.items():
        m, d = c["mcnemar"], c["accuracy difference"]
        exact = [f"{x['value']:.4f}" for x in c["exact"]]
        tests = (m["only_a"], m["only_b"], f"{m['p']:.4g}", f"{m['p_holm']:.4g}" if "p_holm" in m else "")
        cells.append((name, d["n"], *exact, *tests, f"{d['value']:+.4f}", f"{d['ci95'][0]:+.4f} - {d['ci95'][1]:+.4f}"))
    print_table(head, cells)
    return {"metrics": {"all": by_slice.pop("all")}, "by_slice": by_slice}


def plot_stats(path, result, words):
    """Every slice's accuracy with its interval; of two runs, the difference."""
    rows = {"all": result["metrics"]["all"], **result["by_slice"]}
    cells = [c.get("accuracy difference", c) for c in rows.values()]
    plt, fig, (axis,) = figure(1, 1, width=6)
    fig.set_size_inches(6, 1.2 + 0.22 * len(rows))
    y, at = np.array([c["value"] for c in cells]), np.arange(len(cells))[::-1]
    low, high = np.array([c["ci95"] for c in cells]).T
    axis.errorbar(y, at, xerr=np.maximum(0, [y - low, high - y]), fmt="o", ms=4, capsize=3)
    axis.set_yticks(at, [f"{name}, n = {c['n']}" for name, c in zip(rows, cells)], fontsize=7)
    names, two = [os.path.basename(os.path.normpath(w)) for w in words], len(words) == 2
    axis.set_xlabel((f"accuracy of labels, {names[1]} less {names[0]}" if two else "accuracy of labels") + " (95% interval)")
    if two:
        axis.axvline(0, color="gray", lw=1)
    axis.grid(alpha=0.3)
    finish_figure(fig, plt, path, " against ".join(names))


# ---- cut files ---------------------------------------------------------------------------------------------------------


def repair(words, config):
    """Every complete record of a cut .json or .jsonl file, in a new file beside it."""
    require(len(words) == 1, "name one file: python eval.py repair results.jsonl", None)
    (path,) = words
    base, ending = os.path.splitext(path)
    require(ending in (".json", ".jsonl"), f"{path} is neither .json nor .jsonl", None)
    out = f"{base}.repaired{ending}"
    require(not os.path.exists(out), f"{out} exists already; move it away first", None)
    # A device may have no end.
    require(os.path.isfile(path) or not os.path.exists(path), f"{path} is no file", None)
    try:
        with open(path, "rb") as f:
            text = f.read().decode(errors="ignore")  # a cut may fall inside a letter
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}") from None
    if ending == ".jsonl":
        records, lost = complete_lines(text)
        body = "".join(json.dumps(r) + "\n" for r in records)
        says = f"{len(records)} records kept, {lost} lines lost"
    else:
        try:
            value, whole = complete_json(text)
        except RecursionError:
            raise ConfigError(f"{path} is nested too deeply") from None
        require(isinstance(value, (dict, list)), f"{path} holds no complete record", None)
        body, says = json.dumps(value, indent=1) + "\n", "it was whole" if whole else f"{len(value)} records kept"
    atomic_write(out, lambda f: f.write(body.encode()))
    say(f"{out}: {says}")


def complete_lines(text):
    """-> records of whole lines, number of other lines. A last line without its end counts if it is a whole object or list."""
    records, lost = [], 0
    for line in filter(str.strip, text.split("\n")):
        try:
            record = json.loads(line)
            whole = isinstance(record, (dict, list))  # 12 may be the beginning of 123
        except (ValueError, RecursionError):
            whole = False
        records, lost = (records + [record], lost) if whole else (records, lost + 1)
    return records, lost


def complete_json(text):
    """The longest beginning of cut JSON that says whole things: -> value (None if there is none), was it whole?

    Every complete member of an object and element of a list is kept. Of the member that the cut fell into, a list or an object,
    its complete part; of an element of a list nothing, for that is a record.
    """
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text), True
    try:
        value, _ = parse_prefix(text, skip_whitespace(text, 0))
    except RecursionError:  # no record nests so deeply
        value = None
    return value, False


def parse_prefix(text, at):
    """The value that begins at text[at] -> its complete part (None: nothing), and the place after it (None: it was cut)."""
    if text[at : at + 1] not in ("[", "{"):
        try:
            value, end = json.JSONDecoder().raw_decode(text, at)
        except ValueError:
            return None, None
        # a number at the very end may go on after the cut
        return (value, end) if end < len(text) or isinstance(value, (str, bool)) or value is None else (None, None)
    closing, found = ("]", []) if text[at] == "[" else ("}", {})
    at = skip_whitespace(text, at + 1)
    while text[at : at + 1] != closing:
        name = None
        if isinstance(found, dict):
            name, end = parse_prefix(text, at)
            at = None if end is None else skip_whitespace(text, end)
            if at is None or not isinstance(name, str) or text[at : at + 1] != ":":
                return found, None
            at = skip_whitespace(text, at + 1)
        value, end = parse_prefix(text, at)
        if end is not None or name is not None and isinstance(value, (list, dict)) and value:
            found.append(value) if name is None else found.update({name: value})
        if end is None:
            return found, None
        at = skip_whitespace(text, end)
        if text[at : at + 1] == ",":
            at = skip_whitespace(text, at + 1)
        elif text[at : at + 1] != closing:
            return found, None
    return found, at + 1


def skip_whitespace(text, at):
    while text[at : at + 1] in (" ", "\n", "\t", "\r"):
        at += 1
    return at
