"""Figures of recall in the context: the points and the drawing of each (see sweep.py)."""

import math

from analysis.figure_lines import BANDS, draw_series, token_accuracy
from analysis.sweep_runs import Point
from nanorecall.plots import figure

# ---- learning rate -------------------------------------------------------------------------------

# Each has 2 layers, 2 heads, a short convolution and no positions; parameters differ by 3% at most.
MODELS = {
    "gpt": "--model gpt --dk 48 --dv 48 --conv_size 4 --pos_emb none",
    "unified_kv": "--model unified_kv --du 64 --conv_size 4 --pos_emb none",
    "delta": "--model delta --dk 48 --dv 48",
    "gated_delta": "--model gated_delta --dk 48 --dv 48",
}
LEARNING_RATES = (0.001, 0.003, 0.01, 0.03, 0.1)


def lr_points():
    """Steps of 4,096 tokens in sequences of 256."""
    points = []
    for model, model_args in MODELS.items():
        for lr in LEARNING_RATES:
            train_args = (
                f"{model_args} --dim 64 --n_layers 2 --lr {lr} --warmup_steps 30 "
                "--lr_schedule cosine --max_steps 300 --batch_size 16 --input_seq_len 256 "
                '--num_kv_pairs 32 --curriculum "[(2, 60), (8, 40)]" --infinite_data 1 '
                "--eval_interval 100 --n_val_examples 200 --n_test_examples 1000"
            )
            points.append(Point(model, lr, f"lr_{model}_{lr}", train_args))
    return points


def draw_lr(results):
    plt, fig, (axis,) = figure(1, 1, width=5)
    draw_series(axis, results, token_accuracy)
    axis.set(xscale="log", xlabel="learning rate (maximum of the schedule)")
    axis.set(ylabel="test token accuracy", ylim=(-0.02, 1.02))
    return plt, fig, "MQAR, 32 pairs in 256 tokens, 2 layers of width 64, 300 steps" + BANDS


# ---- how long it takes ---------------------------------------------------------------------------

RECIPES = ("mqar_gpt", "mqar_unified_kv", "mqar_conv", "mqar_delta", "mqar_gated_delta")


def time_points():
    flags = "--eval_interval 20 --n_val_examples 200 --stop_accuracy 0.993 --target_accuracy 0"
    return [Point(name, 0, f"time_{name}", f"configs/{name}.py {flags}") for name in RECIPES]


def seconds_to_99(result):
    """Seconds until the first evaluation with a token accuracy of 0.99; infinite without one."""
    for evaluation in result["evals"]:
        if evaluation["accuracy"] >= 0.99:
            return evaluation["seconds"]
    return math.inf


def draw_time(results):
    """Validation accuracy against seconds, and the seconds until 99%, for each config."""
    plt, fig, (curves, times) = figure(1, 2, width=4.5)
    for number, (config, points) in enumerate(results.items()):
        color, label = f"C{number}", config
        for result in points[0]:
            seconds = [evaluation["seconds"] for evaluation in result["evals"]]
            accuracies = [evaluation["accuracy"] for evaluation in result["evals"]]
            curves.plot(seconds, accuracies, lw=1, color=color, label=label)
            label = None  # one entry in the legend for all seeds
            if seconds_to_99(result) < math.inf:
                times.plot(seconds_to_99(result), number, "o", color=color)
            else:
                times.plot(seconds[-1], number, "x", color=color)
    curves.set(xscale="log", xlabel="seconds of training, one thread")
    curves.set_xticks((2, 5, 10, 20, 50, 100), ("2", "5", "10", "20", "50", "100"))
    curves.set_xticks([], minor=True)
    curves.set(ylabel="val token accuracy", ylim=(-0.02, 1.02))
    times.set(xlabel="seconds to 99% (cross: ended below)", xlim=(0, None))
    times.set_yticks(range(len(results)), results)
    times.invert_yaxis()
    caption = "MQAR, 32 pairs in 128 tokens: the task of Updatable Long-Term Memory"
    return plt, fig, caption + "\nlines and points: each of {seeds} seeds"
