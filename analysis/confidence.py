"""How sure a model is of its answers: rank and probability of each answer token, and calibration.

    python eval.py logits runs/RUN

A table of scores has one entry for each label. Letters: N labels, V vocabulary.
"""

from functools import partial

import numpy as np
import torch

from analysis.trained_run import label_positions, map_batches, save_result
from nanorecall.metrics import print_table
from nanorecall.plots import draw_slice, drawn_slices, errorbars, figure, finish_figure, large_cells
from nanorecall.rng import IGNORE_INDEX
from nanorecall.stats import (
    calibration,
    cluster_counts,
    clustered_proportion,
    format_ci,
    label_mean_ci,
    label_mean_proportion,
    proportion,
    totals,
)

SLICE = "slice "  # columns of the table of scores that begin so are slices
N_TOP = 5  # most likely tokens that are kept


def score_answer_tokens(run, batch):
    """The table of scores of one batch: {column: (N,)}; "top" and "top_probability" (N, N_TOP).

    rank: 1 if no token is likelier than the correct one; nll: -log of its probability;
    confidence: the largest probability; correct: whether the likeliest token (the first of
    equals, as in eval.py) is the label; entropy: of the prediction, in nats.
    """
    logits, _ = run.model(batch.tokens, batch.targets)
    example, _, answer_pos, answer = label_positions(batch)
    log_p = logits.float().cpu().log_softmax(-1)  # (N, V)
    answer_log_p = log_p.gather(1, torch.from_numpy(answer)[:, None])  # (N, 1)
    top = log_p.topk(min(N_TOP, log_p.shape[1]), dim=-1)
    table = {
        "example": example,
        "answer_pos": answer_pos,
        "answer": answer,
        "correct": log_p.argmax(-1).numpy() == answer,
        "rank": (1 + (log_p > answer_log_p).sum(1)).numpy(),
        "nll": -answer_log_p.squeeze(1).numpy(),
        "probability": answer_log_p.exp().squeeze(1).numpy(),
        # 0 * log 0 is 0, not nan.
        "entropy": -(log_p.exp() * log_p.clamp(min=-1e9)).sum(1).numpy(),
        "confidence": top.values[:, 0].exp().numpy(),
        "top": top.indices.numpy(),
        "top_probability": top.values.exp().numpy(),
    }
    for name, values in batch.slices.items():
        table[SLICE + name] = values
    return table


def logits(run):
    """Rank, probability and perplexity of each answer token, by slice; calibration."""
    table = map_batches(run, lambda batch: score_answer_tokens(run, batch))
    total = summarize(table, np.ones(len(table["rank"]), bool))
    by_slice, columns = {}, {}
    for column, values in table.items():
        name = column.removeprefix(SLICE)
        if values.ndim == 1:
            columns[name] = values
        if column.startswith(SLICE) and len(np.unique(values)) <= 24:
            by_slice[name] = {}
            for value in np.unique(values):
                by_slice[name][str(value)] = summarize(table, values == value)
    for i in range(table["top"].shape[1]):
        columns[f"top{i + 1}"] = table["top"][:, i]
    bins, error = calibration(table["confidence"], table["correct"], table["example"])
    if run.world.is_main:
        run.finding(describe_probability(total))
        run.finding(describe_calibration(table["confidence"], table["correct"], error))
        print_summary(total, by_slice)
        print(f"expected calibration error: {error:.4f} (|confidence - accuracy|, ten bins)")
    exact_match = exact_match_of(table)
    metrics = {**total, "exact_match": exact_match, "calibration error": error}
    metrics["calibration"] = bins

    plot = partial(plot_logits, by_slice, bins, error, run.name)
    save_result(run, "logits", metrics, by_slice, score_examples(run, table), columns, plot)


def summarize(table, mask):
    """Accuracy, probability, rank and perplexity of the labels in mask (N,) bool."""
    example = table["example"][mask]
    nll = label_mean_ci(*totals(table["nll"][mask], example))
    perplexity = {"value": float(np.exp(nll["value"])), "ci95": np.exp(nll["ci95"]).tolist()}
    return {
        "accuracy": clustered_proportion(table["correct"][mask], example),
        "probability": label_mean_proportion(*totals(table["probability"][mask], example)),
        "rank": label_mean_ci(*totals(table["rank"][mask], example)),
        "perplexity": {**perplexity, "n": nll["n"]},
    }


def describe_probability(total):
    """How probable the correct tokens are, as a sentence."""
    probability, rank = total["probability"]["value"], total["rank"]["value"]
    perplexity = total["perplexity"]["value"]
    text = f"the correct token has probability {probability:.3f} and rank {rank:.2f} on average"
    return f"{text} (perplexity {perplexity:.2f})"


def describe_calibration(confidence, correct, error):
    """Whether confidence exceeds accuracy, as a sentence."""
    means = f"mean confidence is {confidence.mean():.1%}, accuracy {correct.mean():.1%}"
    if error < 0.02:
        return f"{means}: the model is calibrated (expected calibration error {error:.3f})"
    is_over = confidence.mean() > correct.mean()
    kind = "overconfident" if is_over else "underconfident"
    return f"{means}: the model is {kind} (expected calibration error {error:.3f})"


def print_summary(total, by_slice):
    cells = {"all": total}
    for name, of_values in by_slice.items():
        for value, cell in of_values.items():
            cells[f"{name}={value}"] = cell
    lines = []
    for name, cell in cells.items():
        rank, perplexity = cell["rank"]["value"], cell["perplexity"]["value"]
        intervals = (*format_ci(cell["accuracy"]), *format_ci(cell["probability"])[1:])
        lines.append((name, *intervals, f"{rank:.2f}", f"{perplexity:.3f}"))
    head = ("slice", "labels", "accuracy", "95% interval", "probability", "95% interval")
    print_table((*head, "mean rank", "perplexity"), lines)


def exact_match_of(table):
    """Proportion of examples with every label correct."""
    counts = cluster_counts(table["correct"], table["example"])
    return proportion(counts["exact_matches"], counts["n_examples"])


def score_examples(run, table, n_examples=8):
    """Yield a few examples: the prompt, and for each answer token its rank and the top five."""
    indices = np.unique(table["example"])
    n = min(n_examples, len(indices))
    for index in indices[np.linspace(0, len(indices) - 1, n).astype(int)]:
        labels = np.flatnonzero(table["example"] == index)
        tokens, targets, *_ = run.data.batch(run.config.split, 0, [index])
        first = int(np.flatnonzero(targets[0] != IGNORE_INDEX)[0])
        top = []
        for i in labels:
            tokens_with_p = zip(table["top"][i], table["top_probability"][i])
            top.append([(run.token(token), round(float(p), 6)) for token, p in tokens_with_p])
        yield {
            "example": int(index),
            "prompt": run.text(tokens[0, : first + 1])[-200:],
            "answer": run.text(table["answer"][labels]),
            "ranks": table["rank"][labels].tolist(),
            "probabilities": [round(float(p), 6) for p in table["probability"][labels]],
            "perplexity": float(np.exp(table["nll"][labels].mean())),
            "top_5": top,
        }


def plot_logits(by_slice, bins, error, title, path):
    """Probability of the correct token by slice; accuracy against confidence."""
    drawn = drawn_slices(by_slice)
    plt, fig, axes = figure(1, len(drawn) + 1)
    for axis, (name, cells) in zip(axes, drawn.items()):
        probabilities = {value: cell["probability"] for value, cell in cells.items()}
        draw_slice(axis, name, probabilities)
        axis.set(ylabel="probability of the correct token (95%)", ylim=(-0.02, 1.02))
    axis = axes[-1]
    large = large_cells(bins)
    small = [cell for cell in bins if cell not in large]
    for cells, color, label in ((large, "C0", "ten bins"), (small, "darkgray", "n < 1%")):
        confidence = [cell["confidence"] for cell in cells]
        errorbars(axis, confidence, cells, label=label, ls="none", color=color)
    axis.set_title(f"calibration error {error:.3f}")
    axis.plot([0, 1], [0, 1], "--", color="gray", lw=1, label="perfectly calibrated")
    axis.set(xlabel="confidence: largest probability", ylabel="accuracy (95% interval)")
    axis.set_ylim(-0.02, 1.02)
    axis.legend()
    finish_figure(fig, plt, path, title)
