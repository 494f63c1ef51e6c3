"""Figures that compare sequence mixers at equal layer parameters: their state (see sweep.py).

The state of a matrix memory is H matrices of K x V. Its projections have 4 H K D weights (K = V).
So with H K fixed, the number of heads H changes the state and not the number of parameters.
"""

from collections import namedtuple
from dataclasses import replace

import numpy as np

from analysis.figure_lines import BANDS, draw_series
from analysis.sweep_runs import Point
from nanorecall.plots import figure

# ---- mixers --------------------------------------------------------------------------------------

# args: feature maps and norms as in the mixer's config in configs/. widths: of the residual stream
# with 1, 2, 4 and 8 heads; a narrower one pays for what a mixer has beside its projections, so that
# all models have as many layer parameters, within 1%. tracking: further args for state tracking.
Mixer = namedtuple("Mixer", "args widths tracking", defaults=[""])
HEADS = (1, 2, 4, 8)
HEADS_TIMES_WIDTH = 96
MEMORIES = {
    "linear": Mixer("--chunk_size 32", (64, 64, 64, 64)),
    "retnet": Mixer("--chunk_size 32", (64, 64, 64, 64)),
    "mamba2": Mixer("--chunk_size 32 --q_norm none --k_norm none", (64, 64, 63, 63)),
    "gla": Mixer("--chunk_size 32", (57, 57, 57, 57)),
    "mesa": Mixer("--chunk_size 64", (63, 63, 63, 62)),
    "delta": Mixer("--chunk_size 32", (64, 64, 63, 63), "--allow_neg_eigval 1"),
    "gated_delta": Mixer("--chunk_size 32", (63, 63, 63, 61), "--allow_neg_eigval 1"),
}
NO_FEATURE_MAP = "--q_kernel none --k_kernel none"
ATTENTION = "--model gpt --conv_size 4 --pos_emb none --q_norm rms --k_norm rms --init_std 1.0"
KV_WIDTHS = {2: 48, 1: 64}  # number of key/value heads: width of keys and values


def memory_args(name, heads):
    mixer = MEMORIES[name]
    width = HEADS_TIMES_WIDTH // heads
    args = f"--model {name} {NO_FEATURE_MAP} {mixer.args} --dim {mixer.widths[HEADS.index(heads)]}"
    return f"{args} --n_heads {heads} --dk {width} --dv {width}"


def attention_args(kv_heads, window):
    width = KV_WIDTHS[kv_heads]
    args = f"{ATTENTION} --dim 64 --n_heads 2 --n_kv_heads {kv_heads} --dk {width} --dv {width}"
    return f"{args} --window {window}"


# ---- points: first each learning rate with one seed, then the best one with all ------------------

RATES = (0.003, 0.01, 0.03)
# Number of pairs: heads of memories, windows of attention by its number of key/value heads.
SIZES = {
    64: (HEADS, {2: (16, 32, 64, 128, 256), 1: (16, 64, 256)}),
    32: ((2, 4, 8), {2: (16, 64, 256)}),
}
CURRICULUM = {
    64: "[(2, 80), (8, 40), (32, 40)]",
    32: "[(2, 80), (8, 40)]",
}  # (pairs, steps at most)
UPDATES = "keys stored again"
TASKS = {"parity": "--task parity", "S3": "--task s3 --elements swaps"}


def state_points():
    points = []
    for pairs, (of_memories, of_attention) in SIZES.items():
        panel = f"{pairs} pairs"
        for name in MEMORIES:
            for heads in of_memories:
                points += rates(panel, name, heads, recall_args(memory_args(name, heads), pairs))
        for kv_heads, windows in of_attention.items():
            for window in windows:
                args = recall_args(attention_args(kv_heads, window), pairs)
                points += rates(panel, f"attention, {kv_heads} KV heads", window, args)
    for name, args in one_size().items():
        points += rates(UPDATES, name, 0, recall_args(args, 32) + " --num_updates 16")
    for task in TASKS:
        for name in ("attention", *MEMORIES):
            points += rates(task, name, 0, tracking_args(task, name))
    return points


def one_size():
    """{mixer: its arguments in the panels that do not vary the state}"""
    args = {"attention": attention_args(2, 256)}
    for name in MEMORIES:
        args[name] = memory_args(name, 2)
    return args


def recall_args(model_args, pairs):
    """Steps of 4,096 tokens in sequences of 256."""
    return (
        f"{model_args} --n_layers 2 --input_seq_len 256 --num_kv_pairs {pairs} "
        f'--curriculum "{CURRICULUM[pairs]}" --stage_loss 0.8 --infinite_data 1 '
        "--max_steps 300 --batch_size 16 --warmup_steps 20 --lr_schedule cosine "
        "--eval_interval 50 --n_val_examples 100 --n_test_examples 300 --stop_accuracy 0.995"
    )


def tracking_args(task, name):
    """One layer of width 32 with an MLP; trained on 64 tokens, tested on 64 and on 256."""
    if name == "attention":
        model_args = ATTENTION
    else:
        mixer = MEMORIES[name]
        model_args = f"--model {name} {mixer.args} {mixer.tracking} --init_std 1.0"
    return (
        f"{model_args} --n_layers 1 --dim 32 --n_heads 2 --dk 16 --dv 16 --use_ffn 1 "
        f"--data data_track {TASKS[task]} --test_lengths [64,256] "
        "--max_steps 500 --batch_size 32 --warmup_steps 20 --lr_schedule cosine "
        "--eval_interval 50 --n_val_examples 100 --n_test_examples 300 --stop_accuracy 1.0"
    )


def rates(panel, name, x, train_args):
    """A point with one seed for each learning rate."""
    points = []
    for lr in RATES:
        run = f"state_{panel}_{name}_{x}_lr{lr}".replace(", ", "_").replace(" ", "-")
        points.append(Point(f"{panel}: {name}", x, run, f"{train_args} --lr {lr}", seeds=1))
    return points


def best_rates(results):
    """{point: [result of seed 0]} -> of each cell the learning rate of highest validation accuracy.

    These points have all seeds. The lower validation loss decides between equal accuracies.
    """
    best = {}
    for point, (result,) in results.items():
        cell = point.series, point.x
        quality = max((record["accuracy"], -record["loss"]) for record in result["evals"])
        if cell not in best or quality > best[cell][0]:
            best[cell] = quality, replace(point, seeds=0)
    return [point for _, point in best.values()]


# ---- drawing -------------------------------------------------------------------------------------


def token_accuracy(result):
    return result["all"]["value"]


def state_bytes(seeds):
    return seeds[0]["state"]


def draw_state(results):
    plt, fig, axes = figure(2, 2, width=5)
    for axis, pairs in zip(axes, SIZES):
        draw_series(axis, of_panel(results, f"{pairs} pairs"), token_accuracy, x_of=state_bytes)
        axis.set(title=f"MQAR, {pairs} pairs", ylabel="test token accuracy", ylim=(-0.02, 1.02))
        axis.set(xlabel="inference state after 256 tokens (bytes, float32)", xscale="log")
    updates, tracking = axes[2:]
    panel = of_panel(results, UPDATES)
    bars = {
        "stored once": in_slice(panel, "updated", "0"),
        "stored again": in_slice(panel, "updated", "1"),
    }
    draw_bars(updates, bars)
    updates.set(title="MQAR, 32 pairs, 16 of them stored again with a new value")
    bars = {}
    for task in TASKS:
        panel = of_panel(results, task)
        for length in ("64", "256"):
            bars[f"{task}, {length} tokens"] = in_slice(panel, "input_seq_len", length)
    draw_bars(tracking, bars)
    tracking.set(title="state tracking, trained on 64 tokens: one layer of width 32 with an MLP")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    caption = (
        "MQAR: 256 tokens, 2 layers, a short convolution, no positions, 51,600 layer parameters"
    )
    return plt, fig, caption + BANDS + "; bars: mean, points: each seed"


def of_panel(results, panel):
    """The series of a panel, without its name."""
    found = {}
    for series, points in results.items():
        start, _, name = series.partition(": ")
        if start == panel:
            found[name] = points
    return found


def in_slice(panel, name, value):
    """{mixer: test token accuracy of each seed in a slice}"""
    accuracies = {}
    for mixer, points in panel.items():
        accuracies[mixer] = [result["slices"][name][value]["value"] for result in points[0]]
    return accuracies


def draw_bars(axis, bars):
    """bars: {label: {mixer: value of each seed}}, side by side for each mixer."""
    width = 0.8 / len(bars)
    for number, (label, mixers) in enumerate(bars.items()):
        heights = np.array(list(mixers.values()))  # (mixers, seeds)
        x = np.arange(len(heights)) + (number - (len(bars) - 1) / 2) * width
        axis.bar(x, heights.mean(1), 0.9 * width, label=label, alpha=0.5)
        axis.plot(x, heights, "k.", ms=3)
        axis.set_xticks(range(len(heights)), mixers, rotation=20, ha="right")
    axis.set(ylabel="test accuracy", ylim=(0, 1.02))
    axis.legend(loc="lower right")
