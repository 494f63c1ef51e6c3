"""Figures of facts in the weights: the points and the drawing of each (see sweep.py)."""

import numpy as np

from analysis.compare_figure import mean_and_range
from analysis.figure_lines import BANDS, draw_series, log_axis
from analysis.figures_in_context import RECIPES as IN_CONTEXT
from analysis.sweep_runs import Point
from nanorecall.plots import figure
from nanorecall.settings import require

# ---- how many facts are stored -------------------------------------------------------------------

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
    """Every model for 300 steps, and the smaller ones for 1000."""
    points = []
    for series, (name, train_args) in QA_MODELS.items():
        points.append(Point(series, 300, name, train_args, *MEASURED))
    for series in TRAINED_FOR_LONGER:
        name, train_args = QA_MODELS[series]
        train_args += " --max_steps 1000 --eval_interval 250"
        points.append(Point(series, 1000, f"{name}_steps1000", train_args, *MEASURED))
    return points


def draw_exposures(results):
    """Exact match against exposures, a panel for each number of steps."""
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
    """Bits stored against slots of the table: in total, and for each parameter or value."""
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
    """A panel for each of EDIT_METRICS, a line for each method."""
    plt, fig, axes = figure(1, 3, width=3.8)
    seeds = results["memory"][0]
    n_edits = numbers_of_edits(seeds[0])
    same = all(numbers_of_edits(result) == n_edits for result in seeds)
    advice = "run `python eval.py edit` on each again"
    require(same, f"the runs of qa_2k_memory1 have different --n_edits; {advice}", None)
    for axis, (metric, label) in zip(axes, EDIT_METRICS.items()):
        for method in methods_of(seeds):
            draw_by_edits(axis, seeds, method, metric, label=method)
        axis.set(xlabel="facts edited", ylabel=label, ylim=(-0.02, 1.02))
        log_axis(axis, n_edits)
    return plt, fig, "Facts of a memory model edited (exact match)" + BANDS


def numbers_of_edits(result):
    """The numbers of facts that were edited together."""
    return result["result"]["metrics"]["edits"]


def methods_of(seeds):
    edits = seeds[0]["result"]["by_slice"]["method, edits"]
    return dict.fromkeys(edit["method"] for edit in edits.values())


def edit_metric(seeds, method, n, metric):
    """[the metric for each seed], of n facts edited together with this method"""
    name = f"{method}, {n}"
    return [r["result"]["by_slice"]["method, edits"][name][metric]["value"] for r in seeds]


def draw_by_edits(axis, seeds, method, metric, label):
    """A line: the metric of one method against the number of facts edited together."""
    n_edits = numbers_of_edits(seeds[0])
    values = np.array([edit_metric(seeds, method, n, metric) for n in n_edits])
    mean_and_range(axis, n_edits, values.T, label=label)


# ---- learning more -------------------------------------------------------------------------------

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
    """Tables of three sizes, with three numbers of facts each, to which new facts are added."""
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
    n_edits = numbers_of_edits(cells[0][0])
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


# ---- in the context and in the weights: one update -----------------------------------------------

IN_WEIGHTS = {"memory table": "qa_2k_memory1", "MLP": "qa_2k_gpt"}
IN_TABLE = "closed form, protecting others"
IN_MLP = "closed form in the MLP, protecting others"
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
        seeds = points[0]
        ticks |= set(numbers_of_edits(seeds[0]))
        for axis, metric in zip(axes, ("efficacy", "specificity")):
            draw_by_edits(axis, seeds, CLOSED_FORMS[series], metric, label=series)
            axis.set(xlabel="facts or pairs edited together", ylabel=metric, ylim=(-0.02, 1.02))
    for axis in axes:
        log_axis(axis, sorted(ticks))
    caption = "Edited in closed form: in the context 32 pairs of MQAR, in the weights 2,000 facts"
    return plt, fig, caption + BANDS


# ---- several hops --------------------------------------------------------------------------------

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
