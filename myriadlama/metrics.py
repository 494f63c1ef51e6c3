"""MyriadLAMA's metrics: how much answers depend on the template, whether confidence is justified.

Zhao et al. 2024, arXiv 2406.12277. All are computed from answers and confidences that are there, so
no model is needed. Letters: B questions, n templates of a question.

>>> right, wrong, paris, rome = True, False, ("paris",), ("rome",)
>>> correct = [[right, wrong, wrong], [wrong, right, wrong], [right, wrong, wrong]]
>>> answers = [[paris, rome, rome], [rome, paris, rome], [rome, paris, paris]]
>>> metrics = compare_templates(correct, answers)
>>> metrics["oracle"]["value"], round(metrics["best"]["value"], 2), metrics["worst"]["value"]
(1.0, 0.67, 0.0)
>>> round(metrics["range"], 2), round(metrics["consistency"]["value"], 2)
(0.67, 0.33)
"""

from collections import Counter

import numpy as np

from nanorecall.metrics import print_table
from nanorecall.plots import errorbars, figure, finish_figure
from nanorecall.stats import (
    calibration,
    clustered_mean_ci,
    clustered_mean_proportion,
    clustered_proportion,
    format_ci,
    mean_proportion,
)

# ---- templates alone -----------------------------------------------------------------------------


def agreement(answers):
    """The proportion of pairs of answers, out of n >= 2, that are equal."""
    n = len(answers)
    n_equal = sum(count * (count - 1) for count in Counter(answers).values())
    return n_equal / (n * (n - 1))


def compare_templates(correct, answers):
    """Each template asked alone: correct (B lists of n bool), answers (B lists of n).

    - best, worst: the template numbers with the highest and the lowest accuracy, and that accuracy.
      They are chosen on these questions, so best is too high and worst too low.
    - oracle: questions with at least one correct template
    - fluctuation: range and sample standard deviation of the accuracies of the numbers
    - consistency: mean over questions of the pairs of templates with equal answers

    Automatic templates are drawn for each question, so one number is then not one template. Numbers
    that some question has not are left out of best, worst, range and std. n must be 2 or more.
    """
    B, n = len(correct), min(map(len, correct))
    by_number = np.array([row[:n] for row in correct]).T  # (n, B)
    accuracy = by_number.mean(1)
    best, worst = int(accuracy.argmax()), int(accuracy.argmin())
    # As in the table of methods, so that equal answers have equal intervals. With one answer to a
    # question its design effect is n / (n - 1), a little more careful than Wilson's interval.
    questions = np.arange(B)
    return {
        "best": {"template": best + 1, **clustered_proportion(by_number[best], questions)},
        "worst": {"template": worst + 1, **clustered_proportion(by_number[worst], questions)},
        "oracle": clustered_proportion([any(row) for row in correct], questions),
        "range": float(accuracy[best] - accuracy[worst]),
        "std": float(accuracy.std(ddof=1)),
        "consistency": mean_proportion([agreement(row) for row in answers]),
    }


def print_templates(metrics):
    """Print what compare_templates returned."""
    names = {
        f"best template: number {metrics['best']['template']}": "best",
        f"worst template: number {metrics['worst']['template']}": "worst",
        "any template is correct (oracle)": "oracle",
        "pairs of templates that agree (consistency)": "consistency",
    }
    rows = []
    for name, key in names.items():
        rows.append((name, *format_ci(metrics[key])[1:]))
    rows.append(("fluctuation: range", f"{metrics['range']:.4f}", ""))
    rows.append(("fluctuation: standard deviation", f"{metrics['std']:.4f}", ""))
    print_table(("templates alone", "value", "95% interval"), rows)


# ---- confidence ----------------------------------------------------------------------------------


def measure_confidence(confidence, correct, question):
    """Over-confidence of N answers: confidence (N,), correct (N,) bool, question (N,).

    -> mean "confidence"; "overconfidence", the mean of confidence minus accuracy; "calibration" in
    ten bins and the expected "calibration_error" (see stats.calibration). Answers to one question
    are correlated, so they are one cluster.
    """
    confidence, correct = np.array(confidence), np.array(correct, bool)
    question = np.array(question)
    bins, error = calibration(confidence, correct, question)
    return {
        "confidence": clustered_mean_proportion(confidence, question),
        "overconfidence": clustered_mean_ci(confidence - correct, question),
        "calibration_error": error,
        "calibration": bins,
    }


def print_confidence(summaries):
    """Print a line for each method: {name: what measure_confidence returned}."""
    rows = []
    for name, summary in summaries.items():
        confidence = summary["confidence"]["value"]
        _, over, interval = format_ci(summary["overconfidence"])
        rows.append(
            (name, f"{confidence:.4f}", over, interval, f"{summary['calibration_error']:.4f}")
        )
    print_table(
        ("method", "confidence", "minus accuracy", "95% interval", "calibration error"), rows
    )


def plot_reliability(path, summaries, title):
    """Accuracy against confidence in ten bins, a panel for each method."""
    n_columns = min(4, len(summaries))
    n_rows = -(-len(summaries) // n_columns)
    plt, fig, axes = figure(n_rows, n_columns, width=2.4)
    fig.set_size_inches(2.4 * n_columns, 2.2 * n_rows + 0.6)
    for axis, (name, summary) in zip(axes, summaries.items()):
        bins = summary["calibration"]
        axis.plot([0, 1], [0, 1], ls="--", lw=1, color="gray")
        errorbars(axis, [cell["confidence"] for cell in bins], bins)
        over = summary["overconfidence"]["value"]
        axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), title=f"{name}: {over:+.2f}")
    for axis in axes[len(summaries) :]:
        axis.axis("off")
    fig.supxlabel("confidence, mean of a bin")
    fig.supylabel("accuracy (95% interval)")
    title += "\nconfidence minus accuracy above each panel; below the diagonal: over-confident"
    finish_figure(fig, plt, path, title)
