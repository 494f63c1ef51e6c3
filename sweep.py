"""Make the figures of RESULTS.md: train the runs behind each of them, then draw it.

    python sweep.py                        # list the figures, their runs, and how many are missing
    python sweep.py lr                     # train what is missing, then draw figures/lr.png
    python sweep.py lr width --jobs 2      # two runs at a time, one thread each
    python sweep.py all --draw_only 1      # draw from the runs that exist, train nothing

A point of a figure is one run directory per seed in runs/sweep, which eval.py reads, too. Figures
share runs. A finished run is never trained again, and a stopped one is resumed.

For a figure of your own, write a function that lists its points and one that draws their results,
and add a line to FIGURES.
"""

import math
import os
import sys
from collections import namedtuple
from dataclasses import dataclass

import numpy as np

from analysis.compare_figure import mean_and_range
from analysis.sweep_runs import Point, collect_results, is_finished, run_missing, runs_of
from nanorecall.checkpoint import make_directory
from nanorecall.metrics import print_table
from nanorecall.plots import figure, finish_figure
from nanorecall.settings import (
    ConfigError,
    at_least,
    build_config,
    print_help,
    reject_unknown,
    require,
    run_cli,
    say,
    split_argv,
    wants_help,
)


@dataclass
class Config:
    jobs: int = 1  # runs at a time, one thread each
    seeds: int = 3  # runs per point: seeds 0, 1, ...
    log_dir: str = "runs/sweep"  # where run directories go
    output: str = "figures"  # where figures go
    draw_only: bool = False  # draw from the runs that exist, train nothing
    extra_args: str = ""  # extra flags for every training ("--max_steps 5"); use another log_dir

    def check(self):
        at_least(self, 1, "jobs", "seeds")


# The drawing functions below get results: {series: {x: [result of each seed]}}. A result is what
# analysis.sweep_runs.read_point returns. They return pyplot, the figure and its caption.
BANDS = "\nmean of {seeds} seeds; bands: minimum to maximum"


# ---- in context: how much a model recalls --------------------------------------------------------

# Each has 2 layers, 2 heads, a short convolution and no positions; parameters differ by 3% at most.
MODELS = {
    "gpt": "--model gpt --dk {qkv_dim} --dv {qkv_dim} --conv_size 4 --pos_emb none",
    "unified_kv": "--model unified_kv --du {dim} --conv_size 4 --pos_emb none",
    "delta": "--model delta --dk {qkv_dim} --dv {qkv_dim}",
    "gated_delta": "--model gated_delta --dk {qkv_dim} --dv {qkv_dim}",
}
CURRICULA = {  # number of pairs: the stages (pairs, steps) before them
    8: [(2, 60)],
    16: [(2, 60), (8, 40)],
    32: [(2, 60), (8, 40)],
    64: [(2, 60), (8, 40), (32, 40)],
}
LEARNING_RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
PAIRS = (8, 16, 32, 64)
WIDTHS = (16, 32, 48, 64)


def mqar_point(model, x, pairs=32, dim=64, lr=0.01, steps=600):
    """Steps of 4,096 tokens in sequences of 256. For every model lr 0.01 is best or close to it."""
    model_args = MODELS[model].format(dim=dim, qkv_dim=dim * 3 // 4)
    train_args = (
        f"{model_args} --dim {dim} --n_layers 2 --lr {lr} --warmup_steps 30 --lr_schedule cosine "
        f"--max_steps {steps} --batch_size 16 --input_seq_len 256 --num_kv_pairs {pairs} "
        f'--curriculum "{CURRICULA[pairs]}" --infinite_data 1 '
        "--eval_interval 100 --n_val_examples 200 --n_test_examples 1000"
    )
    return Point(model, x, f"{model}_pairs{pairs}_dim{dim}_lr{lr}_steps{steps}", train_args)


def mqar_points(setting, values, **fixed):
    """For each model, points with these values of one argument of mqar_point."""
    points = []
    for model in MODELS:
        for value in values:
            points.append(mqar_point(model, value, **{setting: value}, **fixed))
    return points


def lr_points():
    return mqar_points("lr", LEARNING_RATES, steps=300)


def pairs_points():
    return mqar_points("pairs", PAIRS)


def width_points():
    return mqar_points("dim", WIDTHS)


def token_accuracy(result):
    return result["all"]["value"]


def state_bytes(seeds):
    return seeds[0]["state"]


def draw_lr(results):
    plt, fig, (axis,) = figure(1, 1, width=5)
    draw_series(axis, results, token_accuracy)
    axis.set(xscale="log", xlabel="learning rate (maximum of the schedule)")
    axis.set(ylabel="test token accuracy", ylim=(-0.02, 1.02))
    return plt, fig, "MQAR, 32 pairs in 256 tokens, 2 layers of width 64, 300 steps" + BANDS


def draw_pairs(results):
    plt, fig, (axis,) = figure(1, 1, width=5)
    draw_series(axis, results, token_accuracy)
    log_axis(axis, PAIRS)
    axis.set(xlabel="pairs in 256 tokens", ylabel="test token accuracy (axis cut)")
    return plt, fig, "MQAR, 2 layers of width 64, 600 steps" + BANDS


def draw_width(results):
    plt, fig, (by_width, by_state) = figure(1, 2, width=4.5)
    draw_series(by_width, results, token_accuracy)
    draw_series(by_state, results, token_accuracy, x_of=state_bytes)
    log_axis(by_width, WIDTHS)
    by_width.set(xlabel="model width", ylabel="test token accuracy", ylim=(-0.02, 1.02))
    by_state.set(xlabel="inference state after 256 tokens (bytes, float32)")
    by_state.set(xscale="log", ylim=(-0.02, 1.02))
    return plt, fig, "MQAR, 32 pairs in 256 tokens, 2 layers, 600 steps" + BANDS


# ---- in context: how long it takes ---------------------------------------------------------------

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


# ---- in the weights ------------------------------------------------------------------------------

MEASURED = ("eval.py {run}", "eval_test.json")
NARROW = "--dim 64 --dk 16 --dv 16 --ffn_expand_factor 3"  # as many active parameters as memory
QA_MODELS = {  # series: name of its runs, arguments of train.py
    "MLP": ("qa_2k_gpt_narrow", f"configs/qa_2k_gpt.py {NARROW} --target_accuracy 0"),
    "memory": ("qa_2k_memory", "configs/qa_2k_memory.py --target_accuracy 0"),
    "memory beside an MLP": ("qa_2k_router", "configs/qa_2k_router.py --target_accuracy 0"),
    "MLP, 4 times the parameters": ("qa_2k_gpt", "configs/qa_2k_gpt.py --target_accuracy 0"),
}
TRAINED_FOR_LONGER = ("MLP", "memory", "memory beside an MLP")


def exposure_points():
    points = []
    for series, (name, train_args) in QA_MODELS.items():
        points.append(Point(series, 300, name, train_args, *MEASURED))
    for series in TRAINED_FOR_LONGER:
        name, train_args = QA_MODELS[series]
        train_args += " --max_steps 1000 --eval_interval 250"
        points.append(Point(series, 1000, f"{name}_steps1000", train_args, *MEASURED))
    return points


def draw_exposures(results):
    plt, fig, axes = figure(1, 2, width=4.5)
    exposures = list(results["MLP"][300][0]["slices"]["exposures"])
    for axis, steps in zip(axes, (300, 1000)):
        for series, points in results.items():
            if steps in points:
                values = exact_match(points[steps], "exposures", exposures)
                mean_and_range(axis, range(len(exposures)), values, label=series)
        axis.set_xticks(range(len(exposures)), exposures)
        axis.set(xlabel="exposures per epoch (0: held out)")
        axis.set(ylabel=f"exact match after {steps:,} steps", ylim=(-0.02, 1.02))
    caption = "Synthetic QA, 2,000 pairs: 225 at each number of exposures, 200 held out"
    return plt, fig, caption + BANDS


def exact_match(seeds, slice_name, values):
    """Exact match (seeds, values) in the slices of these values."""
    table = []
    for result in seeds:
        metrics = result["slices"][slice_name]
        table.append([metrics[value]["exact"]["value"] for value in values])
    return np.array(table)


def table_points():
    points = []
    for n_keys in (8, 16, 32, 64):
        name, train_args = QA_MODELS["memory"]
        if n_keys != 32:  # 32 is the config's own
            name += f"_keys{n_keys}"
            train_args += f" --mem_n_keys {n_keys}"
        points.append(Point("memory", n_keys**2, name, train_args, *MEASURED))
    return points


def stored(name):
    """-> function of a result: its number `name` under `stored` in eval_test.json."""

    def measure(result):
        return result["result"]["metrics"]["stored"][name]["value"]

    return measure


def draw_table(results):
    plt, fig, (total, relative) = figure(1, 2, width=4.5)
    draw_series(total, results, stored("bits stored"))
    for label, name in (("all", "parameter"), ("the table", "memory value")):
        measure = stored(f"bits stored per {name}")
        draw_series(relative, {f"of {label}": results["memory"]}, measure)
    relative.legend()
    total.set(ylabel="bits stored, of 35,880")
    relative.set(ylabel="bits stored per parameter", yscale="log")
    for axis in (total, relative):
        axis.set(xlabel="slots in the table")
        log_axis(axis, list(results["memory"]))
    return plt, fig, "Synthetic QA, 1,800 trained pairs, memory layers, 300 steps" + BANDS


def edit_points():
    train_args = "configs/qa_2k_memory1.py --target_accuracy 0"
    name, eval_args, result = "qa_2k_memory1", "eval.py edit {run}", "eval_edit.json"
    return [Point("memory", 0, name, train_args, eval_args, result)]


EDIT_METRICS = {  # name in eval_edit.json: label
    "efficacy": "efficacy (edited facts)",
    "specificity": "specificity (facts not shown)",
    "specificity, shown": "specificity (facts shown to the method)",
}


def draw_edits(results):
    plt, fig, axes = figure(1, 3, width=3.8)
    seeds = [result["result"] for result in results["memory"][0]]
    n_edits = seeds[0]["metrics"]["edits"]
    same = all(result["metrics"]["edits"] == n_edits for result in seeds)
    advice = "run `python eval.py edit` on each again"
    require(same, f"the runs of qa_2k_memory1 have different --n_edits; {advice}", None)
    edits = [result["by_slice"]["method, edits"] for result in seeds]
    methods = dict.fromkeys(edit["method"] for edit in edits[0].values())
    for axis, (metric, label) in zip(axes, EDIT_METRICS.items()):
        for method in methods:
            values = []
            for of_seed in edits:
                values.append([of_seed[f"{method}, {n}"][metric]["value"] for n in n_edits])
            mean_and_range(axis, n_edits, np.array(values), label=method)
        axis.set(xlabel="facts edited", ylabel=label, ylim=(-0.02, 1.02))
        log_axis(axis, n_edits)
    return plt, fig, "Facts of a memory model edited (exact match)" + BANDS


# ---- in the weights: learning more ---------------------------------------------------------------

FORGETTING_EDITORS = (
    "closed form, protecting others",
    "fine-tune the values",
    "fine-tune all weights",
    "fine-tune all weights, replaying a tenth",
    "fine-tune LoRA",
    "sparse tf-idf",
    "sparse random",
)


def forgetting_points():
    eval_args = "eval.py edit {run} --new_facts 1 --n_edits [10,30,100]"
    eval_args += f' --editors "{"; ".join(FORGETTING_EDITORS)}"'
    result = "eval_edit_n_edits-10-30-100_new_facts-True"
    result += "_editors-closed-form-protecting-o-973b87f1.json"  # the names' checksum
    points = []
    for n_keys in (32, 64, 128):
        # 8 buckets of equally many pairs; a tenth of them is held out.
        for pairs, steps in ((496, 300), (2000, 300), (10000, 800)):
            train_args = f"configs/qa_2k_memory1.py --num_pairs {pairs} --mem_n_keys {n_keys}"
            train_args += f" --max_steps {steps} --target_accuracy 0"
            series, name = f"{n_keys**2:,} slots", f"qa_{pairs}_keys{n_keys}"
            points.append(Point(series, pairs, name, train_args, eval_args, result))
    return points


def draw_forgetting(results):
    """Retained facts against the load of the table, after the fewest and the most new facts."""
    plt, fig, axes = figure(1, 2, width=4.8)
    cells = []  # [result of each seed], from the emptiest table to the fullest
    for points in results.values():
        cells += points.values()
    cells.sort(key=mean_load)
    n_edits = cells[0][0]["result"]["metrics"]["edits"]
    for axis, n in zip(axes, (min(n_edits), max(n_edits))):
        for number, method in enumerate(methods_of(cells[0])):
            draw_retained(axis, cells, method, n, f"C{number}")
        axis.set(xscale="log", xlabel="load: bits stored per memory value before the edit")
        axis.set(title=f"{n} new facts (filled: 95% of them are learned)")
        axis.set(ylabel="retained", ylim=(-0.02, 1.02))
    caption = "Synthetic QA, new facts added to a trained model with one memory layer"
    return plt, fig, caption + BANDS


def draw_retained(axis, cells, method, n, color):
    loads = [mean_load(seeds) for seeds in cells]
    retained = [edit_metric(seeds, method, n, "retained") for seeds in cells]
    mean_and_range(axis, loads, np.array(retained).T, label=method, color=color)
    for load, seeds, values in zip(loads, cells, retained):
        is_learned = np.mean(edit_metric(seeds, method, n, "efficacy")) >= 0.95
        axis.plot(load, np.mean(values), "o", ms=5, mec=color, mfc=color if is_learned else "white")


def mean_load(seeds):
    return np.mean([stored("bits stored per memory value")(result) for result in seeds])


def methods_of(seeds):
    edits = seeds[0]["result"]["by_slice"]["method, edits"]
    return dict.fromkeys(edit["method"] for edit in edits.values())


def edit_metric(seeds, method, n, metric):
    """Of n facts edited with a method: [the metric for each seed]"""
    name = f"{method}, {n}"
    return [r["result"]["by_slice"]["method, edits"][name][metric]["value"] for r in seeds]


# ---- in the context and in the weights: one update -----------------------------------------------

IN_CONTEXT = ("mqar_gpt", "mqar_unified_kv", "mqar_conv", "mqar_delta", "mqar_gated_delta")
IN_WEIGHTS = {"memory table": "qa_2k_memory1", "MLP": "qa_2k_gpt"}
IN_TABLE, IN_MLP = "closed form, protecting others", "closed form in the MLP, protecting others"
# What each kind of memory is edited with.
CLOSED_FORMS = {**dict.fromkeys(IN_CONTEXT, "overwrite"), "memory table": IN_TABLE, "MLP": IN_MLP}


def memory_points():
    points = []
    for name in IN_CONTEXT:
        train_args = f"configs/{name}.py --target_accuracy 0"
        points.append(Point(name, 0, name, train_args, "eval.py edit {run}", "eval_edit.json"))
    eval_args = f'eval.py edit {{run}} --editors "{IN_TABLE}; {IN_MLP}"'
    result = "eval_edit_editors-closed-form-protecting-o-ad5506dc.json"  # the names' checksum
    for series, config in IN_WEIGHTS.items():
        train_args = f"configs/{config}.py --target_accuracy 0"
        points.append(Point(series, 0, config, train_args, eval_args, result))
    return points


def draw_memories(results):
    """One panel for efficacy and one for specificity; a line for each memory that is edited."""
    plt, fig, axes = figure(1, 2, width=4.5)
    ticks = set()
    for series, points in results.items():
        seeds = [result["result"] for result in points[0]]
        cells = [result["by_slice"]["method, edits"] for result in seeds]
        method = CLOSED_FORMS[series]
        n_edits = seeds[0]["metrics"]["edits"]
        ticks |= set(n_edits)
        for axis, metric in zip(axes, ("efficacy", "specificity")):
            values = []
            for of_seed in cells:
                values.append([of_seed[f"{method}, {n}"][metric]["value"] for n in n_edits])
            mean_and_range(axis, n_edits, np.array(values), label=series)
            axis.set(xlabel="facts or pairs edited together", ylabel=metric, ylim=(-0.02, 1.02))
    for axis in axes:
        log_axis(axis, sorted(ticks))
    caption = "Edited in closed form: in the context 32 pairs of MQAR, in the weights 2,000 facts"
    return plt, fig, caption + BANDS


# ---- in the weights: several hops ----------------------------------------------------------------

HOPS = ("twohop_gpt", "twohop_memory", "twohop_cot_gpt", "twohop_cot_memory")
HOPS += ("hashhop_gpt", "hashhop_cot_gpt")


def hop_points():
    return [Point(name, 0, name, f"configs/{name}.py --target_accuracy 0") for name in HOPS]


def draw_hops(results):
    plt, fig, (twohop, hashhop) = figure(1, 2, width=5)
    draw_bars(twohop, results, "twohop", "query")
    draw_bars(hashhop, results, "hashhop", "hops")
    caption = "Two-hop questions over stored facts; HashHop in the context"
    return plt, fig, caption + "\nbars: mean of {seeds} seeds; points: each seed"


def draw_bars(axis, results, task, slice_name):
    """Bars of exact match by slice, side by side for the configs of a task."""
    configs = [name for name in results if name.startswith(task)]
    shown = {}  # values in the order in which they first occur
    for config in configs:
        for result in results[config][0]:
            shown |= result["slices"][slice_name]
    shown = list(shown)
    width = 0.8 / len(configs)
    for number, config in enumerate(configs):
        seeds = results[config][0]
        values = [value for value in shown if value in seeds[0]["slices"][slice_name]]
        heights = exact_match(seeds, slice_name, values)
        x = np.array([shown.index(value) for value in values])
        x = x + (number - (len(configs) - 1) / 2) * width
        axis.bar(x, heights.mean(0), 0.9 * width, label=config, alpha=0.5)
        axis.plot(x, heights.T, "k.", ms=4)
    labels = [value.replace("-distribution", "-\ndistribution") for value in shown]
    axis.set_xticks(range(len(shown)), labels)
    axis.set(xlabel=slice_name, ylabel="exact match", ylim=(0, 1.02))
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)


# ---- across prompts ------------------------------------------------------------------------------

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


Figure = namedtuple("Figure", "points draw summary")
FIGURES = {
    "lr": Figure(lr_points, draw_lr, "MQAR: accuracy by learning rate"),
    "pairs": Figure(pairs_points, draw_pairs, "MQAR: accuracy by number of pairs"),
    "width": Figure(width_points, draw_width, "MQAR: accuracy by model width and by state size"),
    "time": Figure(time_points, draw_time, "MQAR: seconds to 99% accuracy"),
    "exposures": Figure(exposure_points, draw_exposures, "synthetic QA: recall by exposures"),
    "table": Figure(table_points, draw_table, "synthetic QA: bits stored by size of the table"),
    "edits": Figure(edit_points, draw_edits, "edited facts: efficacy, specificity"),
    "forgetting": Figure(forgetting_points, draw_forgetting, "new facts: learned and retained"),
    "memories": Figure(memory_points, draw_memories, "one update in cache, state, table, MLP"),
    "hops": Figure(hop_points, draw_hops, "two-hop in and out of distribution, HashHop by hops"),
    "templates": Figure(template_points, draw_templates, "fused answers by number of templates"),
}


# ---- drawing -------------------------------------------------------------------------------------


def draw_series(axis, results, measure, x_of=None):
    """A line per series: the mean over seeds of measure(result), with a band over their range.

    x_of(results of the seeds): where to draw a point; None: at its own x.
    """
    for series, points in results.items():
        x, values = [], []
        for own_x, seeds in points.items():
            x.append(x_of(seeds) if x_of else own_x)
            values.append([measure(result) for result in seeds])
        mean_and_range(axis, x, np.array(values).T, label=series)


def log_axis(axis, ticks):
    """A logarithmic x axis with these numbers as its only ticks."""
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.minorticks_off()


def save_figure(name, results, config):
    try:
        plt, fig, caption = FIGURES[name].draw(results)
    except (KeyError, IndexError, TypeError, ValueError) as e:
        problem = f"the results of its runs lack what it shows ({type(e).__name__}: {e})"
        raise ConfigError(f"figure {name}: {problem}; run them again") from None
    if not any(axis.get_legend() for axis in fig.axes):
        handles, labels = fig.axes[0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside upper center", ncols=5)
    if config.seeds == 1:  # no mean and no bands
        caption = caption.replace(BANDS, "\n1 seed")
    fig.supxlabel(caption.format(seeds=config.seeds), fontsize=7)
    make_directory(config.output)
    path = os.path.join(config.output, name + ".png")
    finish_figure(fig, plt, path, "")
    say(f"wrote {path}")


# ---- command line --------------------------------------------------------------------------------


def parse(argv):
    """Command line -> names of figures, Config."""
    args, settings = split_argv(argv)
    if wants_help(settings):
        print_help(__doc__, Config)
    reject_unknown(settings, Config)
    config = build_config(Config, settings)
    names = list(FIGURES) if args == ["all"] else args
    unknown = " ".join(name for name in names if name not in FIGURES)
    choice = f"choose from {', '.join(FIGURES)}, or all"
    require(not unknown, f"there is no figure {unknown}; {choice}", None)
    return names, config


def print_figures(config):
    lines = []
    for name, (points, _, summary) in FIGURES.items():
        runs = list(runs_of(points(), config))
        n_missing = sum(not is_finished(point, folder) for point, _, folder in runs)
        lines.append((name, len(runs), n_missing, summary))
    print_table(("figure", "runs", "missing", "shows"), lines)


def main(argv=None):
    names, config = parse(sys.argv[1:] if argv is None else argv)
    if not names:
        print_figures(config)
        return
    if not config.draw_only:
        points = []
        for name in names:
            points += FIGURES[name].points()
        run_missing(points, config)
    errors = []
    for name in names:
        try:
            save_figure(name, collect_results(FIGURES[name].points(), config), config)
        except ConfigError as e:  # the other figures do not need these runs
            errors.append(str(e))
    require(not errors, "\n".join(errors), None)


if __name__ == "__main__":
    run_cli(main)
