"""How sure a model is of its answers: rank, probability and perplexity of every answer token, and calibration.

    python eval.py logits runs/RUN

Letters: N labels, V vocabulary.
"""

import numpy as np
import torch

from analysis.trained_run import label_positions, map_batches, save_result
from nanorecall.metrics import print_table
from nanorecall.plots import errorbars, figure, finish_figure
from nanorecall.rng import IGNORE_INDEX
from nanorecall.stats import (
    cluster_counts,
    clustered_mean_ci,
    clustered_mean_proportion,
    clustered_proportion,
    format_ci,
    proportion,
)


def score_answer_tokens(run, batch):
    """Of each label: is it right (likeliest, the first of equals, as in eval.py), rank (1: none is likelier) and probability of
    the right token, the best 5 tokens, how sure the model is (entropy)."""
    logits, _ = run.model(batch.tokens, batch.targets)
    rows, _, place, answer = label_positions(batch)
    log_p = logits.float().cpu().log_softmax(-1)  # (N, V)
    mine = log_p.gather(1, torch.from_numpy(answer)[:, None])  # (N, 1)
    best = log_p.topk(min(5, log_p.shape[1]), dim=-1)
    return {
        "row": rows,
        "place": place,
        "answer": answer,
        "hit": log_p.argmax(-1).numpy() == answer,
        "rank": (1 + (log_p > mine).sum(1)).numpy(),
        "nll": -mine.squeeze(1).numpy(),
        "probability": mine.exp().squeeze(1).numpy(),
        "entropy": -(log_p.exp() * log_p.clamp(min=-1e9)).sum(1).numpy(),
        "confidence": best.values[:, 0].exp().numpy(),
        "top": best.indices.numpy(),  # (N, 5)
        "top_probability": best.values.exp().numpy(),
        **{f"tag {name}": values for name, values in batch.tags.items()},
    }


def logits(run):
    """Rank, probability and perplexity of every answer token, by slice, and whether the model's confidence can be believed."""
    found = map_batches(run, lambda batch: score_answer_tokens(run, batch))
    tags = {name[4:]: v for name, v in found.items() if name.startswith("tag ")}
    everything = summary(found, np.ones(len(found["rank"]), bool))
    by_slice = {
        tag: {str(v): summary(found, values == v) for v in np.unique(values)}
        for tag, values in tags.items()
        if len(np.unique(values)) <= 24
    }
    bins, error = calibration(found["confidence"], found["hit"], found["row"])
    if run.world.is_main:
        cells = [("all", everything)] + [(f"{tag}={v}", c) for tag, cs in by_slice.items() for v, c in cs.items()]
        head = ("slice", "labels", "accuracy", "95% interval", "probability", "95% interval", "mean rank", "perplexity")
        lines = [(*format_ci(c["accuracy"]), *format_ci(c["probability"])[1:], f"{c['rank']['value']:.2f}") for _, c in cells]
        print_table(head, [(n, *x, f"{c['perplexity']['value']:.3f}") for (n, c), x in zip(cells, lines)])
        print(f"expected calibration error: {error:.4f} (mean distance of confidence from accuracy, ten bins)")
    metrics = {**everything, "row_accuracy": exact_match(found), "calibration error": error, "calibration": bins}
    numbers = {k: v for k, v in found.items() if v.ndim == 1 and not k.startswith("tag ")}
    columns = {**numbers, **tags} | {f"top{i + 1}": found["top"][:, i] for i in range(found["top"].shape[1])}
    plot = lambda path: plot_logits(path, by_slice, bins, error, run.name)
    save_result(run, "logits", metrics, by_slice, logit_examples(run, found), columns, plot)


def summary(found, mine):
    row = found["row"][mine]
    nll = clustered_mean_ci(found["nll"][mine], row)
    perplexity = {"value": float(np.exp(nll["value"])), "ci95": np.exp(nll["ci95"]).tolist(), "n": nll["n"]}
    return {
        "accuracy": clustered_proportion(found["hit"][mine], row),
        "probability": clustered_mean_proportion(found["probability"][mine], row),
        "rank": clustered_mean_ci(found["rank"][mine], row),
        "perplexity": perplexity,
    }


def exact_match(found):
    counts = cluster_counts(found["hit"], found["row"])
    return proportion(counts["row_right"], counts["rows"])


def calibration(confidence, hit, row):
    """[(bin's mean confidence, accuracy with interval)] of ten bins of equal width, and the mean distance between the two."""
    which, bins, error = np.minimum((confidence * 10).astype(int), 9), [], 0.0
    for b in np.unique(which):
        mine = which == b
        cell = {"confidence": float(confidence[mine].mean()), **clustered_proportion(hit[mine], row[mine])}
        error += abs(cell["confidence"] - cell["value"]) * mine.mean()
        bins.append(cell)
    return bins, float(error)


def logit_examples(run, found, count=8):
    """A few rows in full: what was asked, what each token of the answer got, and the best five instead."""
    rows = np.unique(found["row"])
    for row in rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]:
        mine = np.flatnonzero(found["row"] == row)
        tokens, targets, *_ = run.data.batch(run.config.split, 0, [row])
        first = int(np.flatnonzero(targets[0] != IGNORE_INDEX)[0])
        yield {
            "row": int(row),
            "prompt": run.text(tokens[0, : first + 1])[-200:],
            "answer": run.text(found["answer"][mine]),
            "ranks": found["rank"][mine].tolist(),
            "probabilities": [round(float(p), 6) for p in found["probability"][mine]],
            "perplexity": float(np.exp(found["nll"][mine].mean())),
            "top_5": [
                [(run.token(t), round(float(p), 6)) for t, p in zip(found["top"][i], found["top_probability"][i])]
                for i in mine
            ],
        }


def plot_logits(path, by_slice, bins, error, title):
    """Probability of the right token by slice; accuracy against confidence."""
    plt, fig, axes = figure(1, max(1, len(by_slice)) + 1)
    for axis, (tag, cells) in zip(axes, by_slice.items()):
        p = [c["probability"] for c in cells.values()]
        errorbars(axis, range(len(p)), p)
        axis.set_xticks(range(len(p)), [f"{v}\nn={c['n']}" for v, c in zip(cells, p)], fontsize=7)
        axis.set(xlabel=tag, ylabel="probability of the right token (95%)", ylim=(-0.02, 1.02))
    errorbars(axes[-1], [b["confidence"] for b in bins], bins, label=f"calibration error {error:.3f}")
    axes[-1].plot([0, 1], [0, 1], "--", color="gray", lw=1, label="confidence is right")
    axes[-1].set(xlabel="probability of the likeliest token", ylabel="is it right? (95% interval)", ylim=(-0.02, 1.02))
    axes[-1].legend(fontsize=7)
    finish_figure(fig, plt, path, title)
