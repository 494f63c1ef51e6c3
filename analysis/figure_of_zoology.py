"""Accuracy against model width at four sizes of MQAR, for every mixer (see sweep.py).

The protocol of figure 2 of Zoology (arXiv 2312.04927), made small enough for a CPU. Zoology trains
a run for each size and each width from 64 to 512, at four learning rates, for 64 epochs of 100,000
sequences. Here one run trains on all four sizes in turn (configs/mqar_zoology.py), with a
curriculum, for at most 400 steps of 4,096 tokens. The learning rate is chosen at one width.
"""

from analysis.figure_lines import draw_series, log_axis
from analysis.figures_of_mixers import MEMORIES, NO_FEATURE_MAP, RECALLING, quality, run_name
from analysis.sweep_runs import Point
from nanorecall.plots import figure

WIDTHS = (32, 64, 128)
WIDTH_OF_RATES = 64  # at which the learning rate is chosen
RATES = (0.01, 0.03)
SIZES = ((64, 4), (128, 8), (256, 16), (512, 64))  # (tokens, pairs), of configs/mqar_zoology.py
TRAINING = (
    f'--vocab_size 8192 --train_sizes "{list(SIZES)}" --infinite_data 1 '
    '--curriculum "[(2, 100), (8, 60)]" --stage_loss 0.8 --warmup_steps 20 --lr_schedule cosine '
    "--max_steps 400 --eval_interval 50 --n_val_examples 50 --n_test_examples 300 "
    "--stop_accuracy 0.9985"
)
ATTENTION = "--n_heads 1 --conv_size 4 --pos_emb none --q_norm rms --k_norm rms"
BASED = "linear n_heads=1 dk=16 dv={D} q_kernel=taylor k_kernel=taylor v_kernel=none"
BASED += " q_norm=none k_norm=none"
WINDOW = "gpt n_heads=1 dk={D} dv={D} q_norm=rms k_norm=rms conv_size=4 window=64"
# {D} is the width of the model. A mixer has one head of that width, as attention in the figure.
MIXERS = {
    "attention": f"--model gpt {ATTENTION} --dk {{D}} --dv {{D}}",
    "unified_kv": f"--model unified_kv {ATTENTION} --du {{D}}",
    "Based": f"--model hybrid --pos_emb none --blocks \"['{BASED}', '{WINDOW}']\"",
}
for _name in RECALLING:
    _mixer = MEMORIES[_name]
    _args = f"--model {_name} {NO_FEATURE_MAP} {_mixer.args} --n_heads 1"
    MIXERS[_name] = f"{_args} --dk {{D}} --dv {{D}}"


def zoology_point(name, width, lr):
    model_args = f"{MIXERS[name].format(D=width)} --dim {width} --n_layers 2 --init_std 0.02"
    train_args = f"{model_args} {TRAINING} --lr {lr}"
    run = run_name("zoology", name, width, f"lr{lr}")
    return Point(name, width, run, train_args, seeds=1)


def zoology_points():
    """Every mixer at one width, with every learning rate."""
    points = []
    for name in MIXERS:
        points += [zoology_point(name, WIDTH_OF_RATES, lr) for lr in RATES]
    return points


def all_widths(results):
    """{point: [result]} -> the points of the figure: every width, at the best learning rate."""
    points = []
    for name in MIXERS:
        candidates = {lr: results[zoology_point(name, WIDTH_OF_RATES, lr)][0] for lr in RATES}
        best = max(RATES, key=lambda lr: quality(candidates[lr]))
        points += [zoology_point(name, width, best) for width in WIDTHS]
    return points


def accuracy_at(tokens, pairs):
    """-> function of a result: its test token accuracy at this size"""

    def measure(result):
        return result["slices"]["size"][f"{tokens}x{pairs}"]["value"]

    return measure


def draw_zoology(results):
    """A panel for each size, a line for each mixer."""
    plt, fig, axes = figure(1, len(SIZES), width=3.2)
    for axis, (tokens, pairs) in zip(axes, SIZES):
        axis.set_prop_cycle(color=["black", "navy", "tab:cyan", *plt.cm.tab10.colors])
        draw_series(axis, results, accuracy_at(tokens, pairs))
        log_axis(axis, WIDTHS)
        axis.set(title=f"{tokens} tokens, {pairs} pairs", xlabel="model width")
        axis.set(ylabel="test token accuracy", ylim=(-0.02, 1.02))
    caption = "MQAR, 2 layers, one head, a short convolution, no positions; one run for all sizes"
    return plt, fig, f"{caption}; learning rate chosen at width {WIDTH_OF_RATES}; 1 seed"
