"""Figures of fused prompts: the points and the drawing of each (see sweep.py)."""

from analysis.figure_lines import BANDS, draw_series, log_axis
from analysis.sweep_runs import Point
from nanorecall.plots import figure

N_TEMPLATES = ((1, 0), (1, 1), (2, 2), (5, 5))  # manual and automatic templates of a question


def template_points():
    points = []
    for method in ("avg", "flex"):
        for n_manual, n_auto in N_TEMPLATES:
            n = n_manual + n_auto
            command = "flex_generate.py --max_samples 100 --seed {seed} --out_dir {run}"
            command += f" --num_manual {n_manual} --num_auto {n_auto} --method {method}"
            result = f"smollm2_135m_it/table_m{n_manual}_a{n_auto}.json"
            points.append(Point(method, n, f"templates{n}_{method}", "", command, result))
    return points


def answer_accuracy(result):
    """Accuracy of the one method of this run; the table also has a majority baseline."""
    for method, metrics in result["result"]["metrics"].items():
        if method != "majority":
            return metrics["accuracy"]["value"]
    raise KeyError("no method")


def draw_templates(results):
    plt, fig, (axis,) = figure(1, 1, width=5)
    draw_series(axis, results, answer_accuracy)
    log_axis(axis, [n_manual + n_auto for n_manual, n_auto in N_TEMPLATES])
    axis.set(xlabel="templates of a question, half of them manual")
    axis.set(ylabel="accuracy of the first word", ylim=(0, 1))
    caption = "SmolLM2-135M-Instruct, 100 questions; each seed draws its own questions and examples"
    return plt, fig, caption + BANDS
