"""Figures that compare sequence mixers (see sweep.py).

They are compared by their state at equal layer parameters, and by the steps until recall appears.
The state of a matrix memory is H matrices of K x V. Its projections have 4 H K D weights (K = V).
So with H K fixed, the number of heads H changes the state and not the number of parameters.
"""

from collections import namedtuple
from dataclasses import replace

import numpy as np

from analysis.figure_lines import BANDS, draw_series, log_axis, token_accuracy
from analysis.sweep_runs import Point
from nanorecall.plots import figure

# ---- mixers --------------------------------------------------------------------------------------

# args      feature maps and norms, as in the mixer's config in configs/
# widths    of the residual stream with 1, 2, 4 and 8 heads. Mixers with more than projections get
#           a narrower one: all models have the same number of layer parameters, within 1%.
# tracking  further args for state tracking
# product   number of heads times key width
Mixer = namedtuple("Mixer", "args widths tracking product", defaults=["", 96])
HEADS = (1, 2, 4, 8)
MEMORIES = {
    "linear": Mixer("--chunk_size 32", (64, 64, 64, 64)),
    "retnet": Mixer("--chunk_size 32", (64, 64, 64, 64)),
    "mamba2": Mixer("--chunk_size 32 --q_norm none --k_norm none", (64, 64, 63, 63)),
    "gla": Mixer("--chunk_size 32", (57, 57, 57, 57)),
    "mesa": Mixer("--chunk_size 64", (63, 63, 63, 62)),
    "delta": Mixer("--chunk_size 32", (64, 64, 63, 63), "--allow_neg_eigval 1"),
    "gated_delta": Mixer("--chunk_size 32", (63, 63, 63, 61), "--allow_neg_eigval 1"),
    "kda": Mixer("--chunk_size 16", (57, 57, 57, 56), "--allow_neg_eigval 1"),
    "delta_product": Mixer("--chunk_size 16", (63, 63, 62, 61), "--allow_neg_eigval 1", 64),
    "ttt_linear": Mixer("--inner_lr 0.2", (57, 66, 71, 73), product=80),
}
# delta_product makes several steps a token. Recall needs one, so it is in state tracking only.
RECALLING = [name for name in MEMORIES if name != "delta_product"]
NO_FEATURE_MAP = "--q_kernel none --k_kernel none"
ATTENTION = "--model gpt --conv_size 4 --pos_emb none --q_norm rms --k_norm rms --init_std 1.0"
KV_WIDTHS = {2: 48, 1: 64}  # number of key/value heads: width of keys and values


def memory_args(name, heads):
    mixer = MEMORIES[name]
    width = mixer.product // heads
    args = f"--model {name} {NO_FEATURE_MAP} {mixer.args} --dim {mixer.widths[HEADS.index(heads)]}"
    return f"{args} --n_layers 2 --n_heads {heads} --dk {width} --dv {width}"


def attention_args(kv_heads, window):
    width = KV_WIDTHS[kv_heads]
    args = f"{ATTENTION} --dim 64 --n_layers 2 --n_heads 2 --n_kv_heads {kv_heads}"
    return f"{args} --dk {width} --dv {width} --window {window}"


def tracking_model(name):
    """One layer of width 32 with an MLP. Each step needs one token alone, so no convolution."""
    model_args = ATTENTION
    if name != "attention":
        mixer = MEMORIES[name]
        model_args = f"--model {name} {NO_FEATURE_MAP} {mixer.args} {mixer.tracking}"
    model_args += " --init_std 1.0 --conv_size 0 --v_kernel none"
    return f"{model_args} --n_layers 1 --dim 32 --n_heads 4 --dk 8 --dv 8 --use_ffn 1"


# ---- state: first learning rates with one seed, then the best one with all -----------------------

GRID = (0.001, 0.003, 0.01, 0.03, 0.06, 0.1, 0.2)  # of learning rates
RATES = (0.01, 0.03, 0.06)  # the first to be tried, for recall
TRACKING_RATES = (0.003, 0.01, 0.03)
SOLVED = 0.995  # validation accuracy at which training stops
PAIRS = 64  # in training
FEWER_PAIRS = 32  # the same models are also tested with these
WINDOWS = (16, 64, 256)  # of attention
CURRICULUM = ((2, 80), (8, 40), (32, 40))  # (pairs, steps at most), then those of the task
UPDATES = "keys stored again"
TASKS = {
    "parity": "--task parity",
    "S3, swaps": "--task s3 --elements swaps",
    "S3": "--task s3 --elements all",
}

# One model on one task. x: number of heads, or the window; 0 in state tracking.
Cell = namedtuple("Cell", "panel name x train_args rates", defaults=[RATES])


def state_points():
    """The first learning rates, with one seed."""
    points = []
    for cell in all_cells():
        points += [point_of(cell, lr, seeds=1) for lr in cell.rates]
    return points


def next_rates(results):
    """{point: [result of seed 0]} -> points with the next learning rate of GRID.

    Only where the best rate so far is the lowest or highest one, as the next may be better.
    """
    points = []
    for cell in all_cells():
        qualities = qualities_of(cell, results)
        accuracies = [accuracy for accuracy, _ in qualities.values()]
        # Where all are at chance, or one is as good as can be, the rate decides nothing.
        if max(accuracies) >= SOLVED or max(accuracies) - min(accuracies) < 0.01:
            continue
        best = max(qualities, key=qualities.get)
        place = GRID.index(best)
        for lr in GRID[max(place - 1, 0) : place + 2]:
            if lr not in qualities:
                points.append(point_of(cell, lr, seeds=1))
    return points


def best_rates(results):
    """{point: [result of seed 0]} -> the points of the figure, with all seeds.

    Each has the learning rate of highest validation accuracy. The lower validation loss decides
    between equal accuracies.
    """
    points = []
    for cell in all_cells():
        qualities = qualities_of(cell, results)
        point = point_of(cell, max(qualities, key=qualities.get))
        points.append(point)
        if cell.panel == f"{PAIRS} pairs":
            points.append(fewer_pairs(point))
    return points


def qualities_of(cell, results):
    """{learning rate: (accuracy, -loss) on validation} of those with a result."""
    qualities = {}
    for lr in GRID:
        point = point_of(cell, lr, seeds=1)
        if point in results:
            qualities[lr] = quality(results[point][0])
    return qualities


def quality(result):
    return max((record["accuracy"], -record["loss"]) for record in result["evals"])


def all_cells():
    return [*recall_cells(), *update_cells(), *tracking_cells()]


def recall_cells(pairs=PAIRS):
    """Every mixer in each of its sizes."""
    models = []
    for name in RECALLING:
        models += [(name, heads, memory_args(name, heads)) for heads in HEADS]
    for kv_heads in KV_WIDTHS:
        name = f"attention, KV heads: {kv_heads}"
        models += [(name, window, attention_args(kv_heads, window)) for window in WINDOWS]
    cells = []
    for name, x, model_args in models:
        cells.append(Cell(f"{pairs} pairs", name, x, recall_args(model_args, pairs)))
    return cells


def update_cells():
    """One size of every mixer, with keys that are stored again."""
    cells = []
    for cell in recall_cells(FEWER_PAIRS):
        if cell.x in (2, max(WINDOWS)):
            train_args = f"{cell.train_args} --num_updates 16"
            cells.append(cell._replace(panel=UPDATES, train_args=train_args))
    return cells


def tracking_cells():
    cells = []
    for task in TASKS:
        for name in ("attention", *MEMORIES):
            train_args = tracking_args(tracking_model(name), task)
            cells.append(Cell(task, name, 0, train_args, TRACKING_RATES))
    return cells


def fewer_pairs(point):
    """The same runs, tested with fewer pairs than they were trained with."""
    series = point.series.replace(f"{PAIRS} pairs", f"{FEWER_PAIRS} pairs")
    eval_args = f'eval.py {{run}} --num_kv_pairs "[{FEWER_PAIRS}]" --device cpu'
    result = f"eval_test_num_kv_pairs-{FEWER_PAIRS}.json"
    return replace(point, series=series, eval_args=eval_args, result=result)


def point_of(cell, lr, seeds=0):
    run = run_name("state", cell.panel, cell.name, cell.x, f"lr{lr}")
    series = f"{cell.panel}: {cell.name}"
    return Point(series, cell.x, run, f"{cell.train_args} --lr {lr}", seeds=seeds)


def recall_args(model_args, pairs):
    """Steps of 4,096 tokens in sequences of 256."""
    curriculum = [stage for stage in CURRICULUM if stage[0] < pairs]
    return (
        f"{model_args} --input_seq_len 256 --num_kv_pairs {pairs} "
        f'--curriculum "{curriculum}" --stage_loss 0.8 --infinite_data 1 '
        "--max_steps 300 --batch_size 16 --warmup_steps 20 --lr_schedule cosine "
        f"--eval_interval 50 --n_val_examples 100 --n_test_examples 300 --stop_accuracy {SOLVED}"
    )


def tracking_args(model_args, task):
    """Trained on 64 tokens, tested on 64 and on 256."""
    return (
        f"{model_args} --data data_track {TASKS[task]} --test_lengths [64,256] "
        "--max_steps 500 --batch_size 32 --warmup_steps 20 --lr_schedule cosine "
        "--eval_interval 50 --n_val_examples 100 --n_test_examples 300 --stop_accuracy 1.0"
    )


def run_name(*parts):
    name = "_".join(map(str, parts))
    return name.replace(", ", "_").replace(": ", "").replace(" ", "-")


def state_kilobytes(seeds):
    return seeds[0]["state"] / 1000


def accuracy_of_fewer_pairs(result):
    return result["result"]["metrics"]["accuracy"]["value"]


def draw_state(results):
    """Recall against bytes of state with two numbers of pairs; bars for updates and tracking."""
    plt, fig, axes = figure(2, 2, width=5)
    accuracies = {PAIRS: token_accuracy, FEWER_PAIRS: accuracy_of_fewer_pairs}
    colors = [*plt.cm.tab10.colors[: len(RECALLING)], "black", "navy"]
    for axis, (pairs, accuracy) in zip(axes, accuracies.items()):
        axis.set_prop_cycle(color=colors)
        draw_series(axis, of_panel(results, f"{pairs} pairs"), accuracy, x_of=state_kilobytes)
        axis.set(title=f"MQAR, tested with {pairs} pairs")
        axis.set(ylabel="test token accuracy", ylim=(-0.02, 1.02))
        axis.set(xlabel="inference state after 256 tokens (kB, float32)")
        log_axis(axis, (10, 20, 50, 100, 200, 400))
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
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=6)
    caption = (
        f"MQAR: 256 tokens, trained with {PAIRS} pairs for at most 300 steps with a curriculum, "
        "the best of three or more learning rates;\n2 layers, a short convolution, no positions, "
        "51,600 layer parameters"
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
        (seeds,) = points.values()
        accuracies[mixer] = [result["slices"][name][value]["value"] for result in seeds]
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
    axis.set(ylabel="test accuracy", ylim=(0, 1.3))  # room for the legend
    axis.legend(loc="upper center", ncols=3)


# ---- plateau: steps until recall appears ---------------------------------------------------------

RECIPES = {  # mixer: the config whose model and learning rate it has
    "attention": "configs/mqar_gpt.py",
    "attention, convolution": "configs/mqar_conv.py",
    # The config's target is what lies in the window; here all labels count, as for the others.
    "attention, window": "configs/mqar_window.py --target_slice ''",
    "unified_kv": "configs/mqar_unified_kv.py",
    "linear": "configs/mqar_linear.py",
    "retnet": "configs/mqar_retnet.py",
    "mamba2": "configs/mqar_mamba2.py",
    "gla": "configs/mqar_gla.py",
    "mesa": "configs/mqar_mesa.py",
    "delta": "configs/mqar_delta.py",
    "gated_delta": "configs/mqar_gated_delta.py",
    "kda": "configs/mqar_kda.py",
    "delta_product": "configs/mqar_delta_product.py",
    "ttt_linear": "configs/mqar_ttt.py",
    "ttt_mlp": "configs/mqar_ttt_mlp.py",
    "delta rule, window": "configs/mqar_hybrid.py",
    "Based": "configs/mqar_based.py",
}
WITHOUT = "no curriculum"  # one seed: most stay near chance until the last step, which takes long
STARTS = {"curriculum": "", WITHOUT: "--curriculum [] --stage_loss 0"}
MAX_STEPS = 500
LEVELS = (0.5, 0.95)  # of validation accuracy
LONG = "512 tokens"
LONG_MIXERS = {
    "gated_delta": "--model gated_delta --chunk_size 32",
    "kda": "--model kda --chunk_size 16",
}
LONG_CURRICULUM = '--curriculum "[(2, 100), (8, 60), (32, 60)]" --stage_loss 0.8'


def plateau_points():
    """Each recipe with and without its curriculum, and LONG_MIXERS on longer sequences."""
    points = []
    for name, config in RECIPES.items():
        for start, start_args in STARTS.items():
            train_args = f"{config} {start_args} --max_steps {MAX_STEPS} --eval_interval 20 "
            train_args += "--n_val_examples 100 --n_test_examples 300 --stop_accuracy 0.95 "
            train_args += "--target_accuracy 0"
            run = run_name("plateau", name, start)
            seeds = 1 if start == WITHOUT else 0
            points.append(Point(f"{start}: {name}", 0, run, train_args, seeds=seeds))
    for name, model_args in LONG_MIXERS.items():
        run = f"plateau_long_{name}"
        train_args = f"{long_args(model_args)} {LONG_CURRICULUM}"
        points.append(Point(f"{LONG}: {name}", 0, run, train_args))
        train_args = f"{long_args(model_args)} {STARTS[WITHOUT]}"
        series = f"{LONG}: {name}, {WITHOUT}"
        points.append(Point(series, 0, run_name(run, WITHOUT), train_args, seeds=1))
    return points


def long_args(model_args):
    """The model and task of a rerun of Kimi Linear's MQAR."""
    return (
        f"{model_args} {NO_FEATURE_MAP} --n_layers 2 --dim 128 --n_heads 2 --dk 128 --dv 128 "
        "--input_seq_len 512 --num_kv_pairs 128 --num_queries 64 --infinite_data 1 "
        "--max_steps 600 --batch_size 8 --lr 0.005 --warmup_steps 20 --lr_schedule cosine "
        "--eval_interval 20 --n_val_examples 50 --n_test_examples 200 --stop_accuracy 0.95"
    )


def steps_until(result, level):
    """Steps until the first evaluation with this accuracy; None without one."""
    for evaluation in result["evals"]:
        if evaluation["accuracy"] >= level:
            return evaluation["step"]
    return None


def draw_plateau(results):
    """Steps until each of LEVELS, and the learning curves of LONG_MIXERS."""
    plt, fig, (steps, curves) = figure(1, 2, width=5)
    for number, start in enumerate(STARTS):
        panel = of_panel(results, start)
        heights = np.arange(len(panel)) + 0.3 * (number - 0.5)
        for height, points in zip(heights, panel.values()):
            draw_steps(steps, points[0], height, f"C{number}")
        for level, fill in zip(LEVELS, ("white", f"C{number}")):
            label = f"{level:.0%}, {start}"
            steps.plot([], [], "o", ms=5, mec=f"C{number}", mfc=fill, label=label)
        steps.set_yticks(range(len(panel)), panel)
    log_axis(steps, (20, 50, 100, 200, 500))
    steps.set(xlabel=f"steps (cross: below 95% after {MAX_STEPS:,})")
    steps.set(title="MQAR, 32 pairs in 128 tokens: validation accuracy reaches")
    steps.invert_yaxis()
    steps.legend()
    for name, points in of_panel(results, LONG).items():
        color = "C0" if name.startswith("gated_delta") else "C1"
        style = ":" if name.endswith(WITHOUT) else "-"
        for seed, result in enumerate(points[0]):
            x = [evaluation["step"] for evaluation in result["evals"]]
            y = [evaluation["accuracy"] for evaluation in result["evals"]]
            # One entry in the legend for all seeds.
            curves.plot(x, y, style, color=color, lw=1, label=name if seed == 0 else None)
    curves.set(title="MQAR, 128 pairs in 512 tokens", xlabel="step")
    curves.set(ylabel="validation token accuracy", ylim=(-0.02, 1.02))
    curves.legend()
    caption = "Model, learning rate and curriculum of configs/\n"
    return plt, fig, caption + "points and lines: {seeds} seeds; without a curriculum 1"


def draw_steps(axis, seeds, height, color):
    """The steps until each level, a point for each seed."""
    for result in seeds:
        low, high = (steps_until(result, level) for level in LEVELS)
        if low:
            axis.plot(low, height, "o", ms=4, mec=color, mfc="white")
        if high:
            axis.plot(high, height, "o", ms=4, mec=color, mfc=color)
        else:
            axis.plot(result["evals"][-1]["step"], height, "x", ms=4, color=color)
