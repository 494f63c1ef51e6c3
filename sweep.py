"""The figures of RESULTS.md, one command each: runs that differ in a few settings and in their seed, and one picture of them.

    python sweep.py                        # which figures there are, of how many runs, and what is still to do
    python sweep.py lr                     # train what is missing, then draw figures/lr.png
    python sweep.py lr width --jobs 2      # two runs at once, of one thread each
    python sweep.py all --draw 1           # draw what is there, train nothing

Every point is a run directory in runs/sweep, to look at with eval.py; figures share runs. What has finished is not run again,
what was stopped goes on.
"""

import json
import os
import shlex
import subprocess
import sys
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np
from tqdm import tqdm

from analysis.compare import mean_and_range, read_result, read_test
from nanorecall.checkpoint import make_directory, read_log, read_record
from nanorecall.metrics import print_table, slice_metrics
from nanorecall.plots import figure, finish_figure
from nanorecall.settings import (
    ConfigError,
    RunError,
    at_least,
    build_config,
    field_names,
    help_text,
    reject_unknown,
    require,
    run_cli,
    say,
    split_argv,
)
from train import parse

HERE = os.path.dirname(os.path.abspath(__file__))


@dataclass
class Config:
    jobs: int = 1  # runs at once, of one thread each
    seeds: int = 3  # runs of each point: seeds 0, 1, ...
    log_dir: str = "runs/sweep"  # where the runs go
    out: str = "figures"  # where the pictures go
    draw: bool = False  # draw what is there and run nothing
    more: str = ""  # flags added to every training, such as "--max_steps 5" for a try; give another log_dir, too

    def check(self):
        at_least(self, 1, "jobs", "seeds")


RANGE = "\nmean of {seeds} seeds; bands: lowest to highest"  # under a picture, the number filled in by save_figure

# A point of a figure: the line it belongs to, where on that line, the name of its run without the seed, how it is trained, and
# what looks at the run then, and the file that this makes. Words are those of a command line, {run} the run directory.
Point = namedtuple("Point", "line x name train then makes", defaults=("", ""))


# ---- in context: what MQAR takes ---------------------------------------------------------------------------------------

MIXER_NAMES = {  # 2 layers, 2 heads, a short convolution and no positions in all; parameters of the layers within 3%
    "gpt": "--model gpt --dk {w} --dv {w} --conv_size 4 --pos_emb none",
    "unified_kv": "--model unified_kv --du {dim} --conv_size 4 --pos_emb none",
    "delta": "--model delta --dk {w} --dv {w}",
    "gated_delta": "--model gated_delta --dk {w} --dv {w}",
}
CURRICULA = {  # pairs: stages before them, (pairs, steps)
    8: [(2, 60)],
    16: [(2, 60), (8, 40)],
    32: [(2, 60), (8, 40)],
    64: [(2, 60), (8, 40), (32, 40)],
}
RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
PAIRS, WIDTHS = (8, 16, 32, 64), (16, 32, 48, 64)


def recall(model, x, pairs=32, dim=64, lr=0.01, steps=600):
    """A point of MQAR: `steps` of 4,096 tokens in rows of 256; lr 0.01 is best or nearly so for all (figure lr)."""
    words = MIXER_NAMES[model].format(dim=dim, w=dim * 3 // 4) + f" --dim {dim} --lr {lr} --num_kv_pairs {pairs}"
    words += f' --curriculum "{CURRICULA[pairs]}" --n_layers 2 --input_seq_len 256 --batch_size 16 --infinite_data 1 --warmup_steps 30'
    words += f" --lr_schedule cosine --max_steps {steps} --eval_interval 100 --n_val_examples 200 --n_test_examples 1000"
    return Point(model, x, f"{model}_pairs{pairs}_dim{dim}_lr{lr}_steps{steps}", words)


def lr_points():
    return [recall(model, lr, lr=lr, steps=300) for model in MIXER_NAMES for lr in RATES]


def pairs_points():
    return [recall(model, pairs, pairs=pairs) for model in MIXER_NAMES for pairs in PAIRS]


def width_points():
    return [recall(model, dim, dim=dim) for model in MIXER_NAMES for dim in WIDTHS]


def accuracy(result):
    return result["all"]["value"]


def draw_lr(found):
    plt, fig, (axis,) = figure(1, 1, width=5)
    lines(axis, found, accuracy)
    axis.set(xscale="log", xlabel="highest learning rate", ylabel="test token accuracy", ylim=(-0.02, 1.02))
    return plt, fig, "MQAR, 32 pairs in 256 tokens, 2 layers of width 64, 300 steps" + RANGE


def draw_pairs(found):
    plt, fig, (axis,) = figure(1, 1, width=5)
    lines(axis, found, accuracy)
    axis.set(xscale="log", xlabel="pairs in 256 tokens", ylabel="test token accuracy (axis cut)")
    axis.set_xticks(PAIRS, PAIRS)
    axis.minorticks_off()
    return plt, fig, "MQAR, 2 layers of width 64, 600 steps" + RANGE


def draw_width(found):
    plt, fig, (left, right) = figure(1, 2, width=4.5)
    lines(left, found, accuracy)
    lines(right, found, accuracy, at=lambda results: results[0]["state"])
    left.set(xscale="log", xlabel="model width", ylabel="test token accuracy", ylim=(-0.02, 1.02))
    left.set_xticks(WIDTHS, WIDTHS)
    left.minorticks_off()
    right.set(xscale="log", xlabel="state after 256 tokens (bytes, float32)", ylim=(-0.02, 1.02))
    return plt, fig, "MQAR, 32 pairs in 256 tokens, 2 layers, 600 steps" + RANGE


# ---- in context: how long it takes -------------------------------------------------------------------------------------

RECIPES = ("mqar_gpt", "mqar_unified_kv", "mqar_conv", "mqar_delta", "mqar_gated_delta")


def time_points():
    every = "--eval_interval 20 --n_val_examples 200 --stop_accuracy 0.993 --target_accuracy 0"
    return [Point(name, 0, f"time_{name}", f"configs/{name}.py {every}") for name in RECIPES]


def seconds_to_99(result):
    """Seconds until the first evaluation with 99% of the labels right; infinite if there was none."""
    return next((row["seconds"] for row in result["evals"] if row["accuracy"] >= 0.99), float("inf"))


def draw_time(found):
    plt, fig, (left, right) = figure(1, 2, width=4.5)
    for number, (line, cells) in enumerate(found.items()):
        for i, result in enumerate(cells[0]):
            x, y = zip(*[(row["seconds"], row["accuracy"]) for row in result["evals"]])
            left.plot(x, y, lw=1, color=f"C{number}", label=line if i == 0 else None)
        ends = [(result["evals"][-1]["seconds"], seconds_to_99(result)) for result in cells[0]]
        right.plot([there for _, there in ends if there < np.inf], [number] * sum(t < np.inf for _, t in ends), f"C{number}o")
        right.plot([end for end, there in ends if there == np.inf], [number] * sum(t == np.inf for _, t in ends), f"C{number}x")
    left.set(xscale="log", xlabel="seconds of training, one thread", ylabel="val token accuracy", ylim=(-0.02, 1.02))
    right.set_yticks(range(len(found)), found)
    right.invert_yaxis()
    right.set(xlabel="seconds to 99% (cross: ended without)", xlim=(0, None))
    for axis in (left, right):
        axis.grid(alpha=0.3)
    title = "MQAR, 32 pairs in 128 tokens: the cell of Updatable Long-Term Memory"
    return plt, fig, title + "\nlines and points: each of {seeds} seeds"


# ---- in the weights ----------------------------------------------------------------------------------------------------

NARROW = "--dim 64 --dk 16 --dv 16 --ffn_expand_factor 3"  # an MLP with as many active parameters as the memory layers
FACTS = {  # line: name of its runs, how they are trained
    "MLP": ("qa_2k_gpt_narrow", f"configs/qa_2k_gpt.py {NARROW}"),
    "memory": ("qa_2k_memory", "configs/qa_2k_memory.py"),
    "memory beside an MLP": ("qa_2k_router", "configs/qa_2k_router.py"),
    "MLP, 4 times the parameters": ("qa_2k_gpt", "configs/qa_2k_gpt.py"),
}
STEPS = (300, 1000)
MEASURED = ("eval.py {run}", "eval_test.json")


def exposure_points():
    points = [Point(line, 300, name, f"{train} --target_accuracy 0", *MEASURED) for line, (name, train) in FACTS.items()]
    for line, (name, train) in [*FACTS.items()][:3]:
        words = f"{train} --target_accuracy 0 --max_steps 1000 --eval_interval 250"
        points.append(Point(line, 1000, f"{name}_steps1000", words, *MEASURED))
    return points


def draw_exposures(found):
    plt, fig, axes = figure(1, 2, width=4.5)
    for axis, steps in zip(axes, STEPS):
        for line, cells in found.items():
            if steps in cells:
                shown = list(cells[steps][0]["cells"]["exposures"])
                values = [[r["cells"]["exposures"][v]["exact"]["value"] for v in shown] for r in cells[steps]]
                mean_and_range(axis, range(len(shown)), np.array(values), None, line)
        axis.set_xticks(range(len(shown)), shown)
        label = f"exact match after {steps:,} steps"
        axis.set(xlabel="times shown in an epoch (0: held out)", ylabel=label, ylim=(-0.02, 1.02))
        axis.grid(alpha=0.3)
    return plt, fig, "Synthetic QA, 2,000 pairs: 225 at each number of exposures, 200 held out" + RANGE


def table_points():
    def point(keys):
        name, other = ("qa_2k_memory", "") if keys == 32 else (f"qa_2k_memory_keys{keys}", f" --mem_n_keys {keys}")
        return Point("memory", keys**2, name, f"configs/qa_2k_memory.py --target_accuracy 0{other}", *MEASURED)

    return [point(keys) for keys in (8, 16, 32, 64)]


def stored(name):
    return lambda result: result["made"]["metrics"]["stored"][name]["value"]


def draw_table(found):
    plt, fig, axes = figure(1, 2, width=4.5)
    for name, label in (("bits stored per parameter", "of all"), ("bits stored per memory value", "of the table")):
        lines(axes[1], {label: found["memory"]}, stored(name))
    lines(axes[0], found, stored("bits stored"))
    axes[0].set(ylabel="bits stored, of 35,880")
    axes[1].set(ylabel="bits stored per parameter", yscale="log")
    axes[1].legend(fontsize=7)
    for axis in axes:
        axis.set(xscale="log", xlabel="slots in the table")
        axis.set_xticks(list(found["memory"]), [f"{n:,}" for n in found["memory"]])
        axis.minorticks_off()
    return plt, fig, "Synthetic QA, 1,800 trained pairs, memory layers, 300 steps" + RANGE


def edit_points():
    words = ("configs/qa_2k_memory1.py --target_accuracy 0", "eval.py edit {run}", "eval_edit.json")
    return [Point("memory", 0, "qa_2k_memory1", *words)]


def draw_edits(found):
    plt, fig, axes = figure(1, 3, width=3.8)
    made = [result["made"] for result in found["memory"][0]]
    counts = made[0]["metrics"]["edits"]
    message = "the runs of qa_2k_memory1 were measured with different --edits; run `python eval.py edit` on each again"
    require(all(m["metrics"]["edits"] == counts for m in made), message, None)
    runs = [m["by_slice"]["method and edits"] for m in made]
    sides = {
        "efficacy": "efficacy: rewritten facts right",
        "specificity": "specificity: other facts right",
        "kept": "other facts that a method may use, right",
    }
    for axis, (side, label) in zip(axes, sides.items()):
        for method in dict.fromkeys(cell["method"] for cell in runs[0].values()):
            values = np.array([[run[f"{method}, {n}"][side]["value"] for n in counts] for run in runs])
            mean_and_range(axis, counts, values, None, method)
        axis.set(xscale="log", xlabel="facts rewritten at once", ylabel=label, ylim=(-0.02, 1.02))
        axis.yaxis.label.set_fontsize(8)
        axis.set_xticks(counts, counts)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    return plt, fig, "Facts of a memory model rewritten (exact match)" + RANGE


HOPS = ("twohop_gpt", "twohop_memory", "twohop_cot_gpt", "twohop_cot_memory", "hashhop_gpt", "hashhop_cot_gpt")


def hop_points():
    return [Point(name, 0, name, f"configs/{name}.py --target_accuracy 0") for name in HOPS]


def draw_hops(found):
    plt, fig, axes = figure(1, 2, width=5)
    for axis, task, tag in zip(axes, ("twohop", "hashhop"), ("query", "hops")):
        mine = {line: cells[0] for line, cells in found.items() if line.startswith(task)}
        shown = list(dict.fromkeys(v for results in mine.values() for r in results for v in r["cells"][tag]))
        for number, (line, results) in enumerate(mine.items()):
            at = [i for i, v in enumerate(shown) if v in results[0]["cells"][tag]]
            values = np.array([[r["cells"][tag][shown[i]]["exact"]["value"] for i in at] for r in results])
            width = 0.8 / len(mine)
            x, mean = np.array(at) + (number - (len(mine) - 1) / 2) * width, values.mean(0)
            axis.bar(x, mean, 0.9 * width, label=line, alpha=0.5)
            axis.plot(x, values.T, "k.", ms=4)
        axis.set_xticks(range(len(shown)), [v.replace("-distribution", "-\ndistribution") for v in shown])
        axis.set(xlabel=tag, ylabel="exact match", ylim=(0, 1.02))
        axis.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    title = "Two facts in the weights put together; hashes followed in the row"
    return plt, fig, title + "\nbars: mean of {seeds} seeds; points: each"


# ---- across prompts ----------------------------------------------------------------------------------------------------

COUNTS = ((1, 0), (1, 1), (2, 2), (5, 5))  # manual and automatic templates of a question


def template_points():
    def point(method, m, a):
        words = f"--num_manual {m} --num_auto {a} --method {method}"
        command = f"flex_generate.py --max_samples 100 --seed {{seed}} --out_dir {{run}} {words}"
        return Point(method, m + a, f"templates{m + a}_{method}", "", command, "smollm2_135m_it/table.json")

    return [point(method, m, a) for method in ("avg", "flex") for m, a in COUNTS]


def draw_templates(found):
    plt, fig, (axis,) = figure(1, 1, width=5)
    metrics = lambda result: next(v for name, v in result["made"]["metrics"].items() if name != "majority")
    lines(axis, found, lambda result: metrics(result)["accuracy"]["value"])
    axis.set(xscale="log", xlabel="templates of a question, half of them manual", ylabel="first word right", ylim=(0, 1))
    axis.set_xticks([1, 2, 4, 10], [1, 2, 4, 10])
    axis.minorticks_off()
    return plt, fig, "SmolLM2-135M-Instruct, 100 questions; each seed draws other ones, and other examples" + RANGE


FIGURES = {  # points, how they are drawn, what a reader learns
    "lr": (lr_points, draw_lr, "MQAR: how much the learning rate decides, for each model"),
    "pairs": (pairs_points, draw_pairs, "MQAR: accuracy by number of pairs"),
    "width": (width_points, draw_width, "MQAR: accuracy by model width, and by what must be kept to read on"),
    "time": (time_points, draw_time, "MQAR: seconds until 99% of the answers are right"),
    "exposures": (exposure_points, draw_exposures, "synthetic QA: recall by how often a fact was shown"),
    "table": (table_points, draw_table, "synthetic QA: bits stored by size of the memory table"),
    "edits": (edit_points, draw_edits, "facts rewritten: what is answered anew, what stays"),
    "hops": (hop_points, draw_hops, "two-hop in and out of distribution, HashHop by hops"),
    "templates": (template_points, draw_templates, "one answer from many templates: accuracy by their number"),
}


# ---- runs --------------------------------------------------------------------------------------------------------------


def folder_of(point, seed, c):
    return os.path.join(c.log_dir, f"{point.name}_seed{seed}")


def finished(point, folder):
    """Has this run been trained, and looked at?"""
    path = os.path.join(folder, "status.json")
    trained = not point.train
    if point.train and os.path.exists(path):
        try:
            trained = read_record(path, {"status": "text"})["status"] == "finished"
        except ConfigError as e:
            say(f"note: {e}; the run is trained on", file=sys.stderr)
    return trained and (not point.makes or os.path.exists(os.path.join(folder, point.makes)))


def training(point, seed, c):
    """The command line that trains a run."""
    folder = folder_of(point, seed, c)
    return (
        f"train.py {point.train} {c.more} --seed {seed} --num_threads 1 --log_dir {c.log_dir} --run_name {os.path.basename(folder)}"
    )


def run_point(point, seed, c):
    """Run what is missing for one run -> "" or, if a command failed, that command and its last words."""
    folder, commands = folder_of(point, seed, c), []
    if not finished(point._replace(makes=""), folder):
        begun = os.path.exists(os.path.join(folder, "config.json"))
        commands.append(f"train.py --resume {folder}" if begun else training(point, seed, c))
    for line in commands + ([point.then.format(run=folder, seed=seed)] if point.then else []):
        words = [os.path.join(HERE, w) if w.endswith(".py") else w for w in shlex.split(line)]
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        run = subprocess.run([sys.executable, *words], env=one_thread, text=True, capture_output=True)
        if run.returncode:
            return f"python {line}\n{run.stderr.strip()[-500:]}"
    return ""


def run_all(points, c):
    """Every run of the points that is missing, `jobs` at once."""
    todo = {folder_of(p, seed, c): (p, seed) for seed in range(c.seeds) for p in points}
    todo = [(p, seed) for folder, (p, seed) in todo.items() if not finished(p, folder)]
    shown, failed = sys.stderr.isatty(), []
    with ThreadPoolExecutor(c.jobs) as pool:
        pending = [pool.submit(run_point, p, seed, c) for p, seed in todo]
        try:
            for i, f in enumerate(tqdm(pending, desc="runs", disable=not shown)):
                failed.append(f.result())
                if not shown:
                    say(f"{i + 1}/{len(todo)} {folder_of(*todo[i], c)}", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)  # the runs themselves got the signal, too, and save
            raise
    if any(failed):
        message = f"{sum(map(bool, failed))} runs failed; the others are kept, and the same command goes on:"
        raise RunError("\n".join([message, *filter(None, failed)]))


# ---- results -----------------------------------------------------------------------------------------------------------


VALUE = {"value": "number"}
MADE = {  # what the pictures need of a file that a look at a run makes
    "eval_test.json": {"metrics": {"stored": {"*": VALUE}}},
    "eval_edit.json": {
        "metrics": {"edits": ["size"]},
        "by_slice": {
            "method and edits": {
                "*": {"method": "text", "efficacy": VALUE, "specificity": VALUE, "kept": VALUE}
            }
        },
    },
    "table.json": {"metrics": {"*": "dict"}},
}


def read(point, folder):
    """What the pictures show of one run."""
    result = read_result(folder) if point.train else {}
    if point.train:
        cells = read_test(folder)[1]["by_slice"]
        result["cells"] = {tag: {v: slice_metrics(cell) for v, cell in values.items()} for tag, values in cells.items()}
        result["evals"] = [r for r in read_log(folder) if r["kind"] == "eval"]
    if point.makes:
        result["made"] = read_record(
            os.path.join(folder, point.makes), MADE[os.path.basename(point.makes)]
        )
    return result


def collect(points, c):
    """{line: {x: [result of each seed]}}"""
    found, folders_of = {}, {p: [folder_of(p, seed, c) for seed in range(c.seeds)] for p in points}
    missing = [f for p, folders in folders_of.items() for f in folders if not finished(p, f)]
    require(not missing, f"{len(missing)} runs are missing, {' '.join(missing[:1])} for one; leave --draw out", "draw")
    for p, folders in folders_of.items():
        for seed, folder in enumerate(folders if p.train else ()):
            other = changed_settings(folder, shlex.split(training(p, seed, c))[1:])
            message = f"{folder} was trained with another {', '.join(other)}; delete it, or give another --log_dir"
            require(not other, message, "log_dir")
        found.setdefault(p.line, {})[p.x] = [read(p, f) for f in folders]
    return found


def changed_settings(folder, words):
    """Settings of a run that a training with these words would not have now, whether they or a config have changed."""
    saved = read_record(
        os.path.join(folder, "config.json"), {"train": "dict", "data": "dict", "model": "dict"}
    )
    p = parse(words)
    parts = {"train": p.train, "data": p.data, "model": build_config(p.model_module.Config, p.assignments)}
    wanted = {part: json.loads(json.dumps(asdict(config))) for part, config in parts.items()}
    names = [(part, k) for part, config in parts.items() for k in field_names(type(config))]
    names = [(part, k) for part, k in names if k not in ("log_dir", "resume")]
    return [k for part, k in names if saved[part].get(k) != wanted[part][k]]


def lines(axis, found, value, at=None):
    """A line for each model: mean over seeds of value(result), with a band from lowest to highest."""
    for line, cells in found.items():
        x = [at(results) if at else key for key, results in cells.items()]
        mean_and_range(axis, x, np.array([[value(r) for r in results] for results in cells.values()]).T, None, line)
    axis.grid(alpha=0.3)


def save_figure(name, found, draw, c):
    try:
        plt, fig, title = draw(found)
    except (KeyError, IndexError, TypeError, ValueError) as e:
        why = f"{type(e).__name__}: {e}"
        raise ConfigError(
            f"figure {name}: the results of its runs do not hold what it shows ({why}); run them again"
        ) from None
    if not any(axis.get_legend() for axis in fig.axes):
        fig.legend(*fig.axes[0].get_legend_handles_labels(), fontsize=7, loc="outside upper center", ncols=5)
    fig.supxlabel(title.format(seeds=c.seeds), fontsize=7)
    make_directory(c.out)
    path = os.path.join(c.out, name + ".png")
    finish_figure(fig, plt, path, "")
    say(f"wrote {path}")


def main(argv=None):
    words, given = split_argv(sys.argv[1:] if argv is None else argv)
    if any(s.key == "help" for s in given):
        say(help_text(__doc__, Config))
        return
    reject_unknown(given, Config)
    c = build_config(Config, given)
    names = list(FIGURES) if words == ["all"] else words
    unknown = [w for w in names if w not in FIGURES]
    require(not unknown, f"there is no figure {' '.join(unknown)}; choose from {', '.join(FIGURES)}, or all", None)
    if not names:
        rows = []
        for name, (points, _, shows) in FIGURES.items():
            done = [finished(p, folder_of(p, seed, c)) for p in points() for seed in range(c.seeds)]
            rows.append((name, len(done), done.count(False), shows))
        return print_table(("figure", "runs", "to do", "shows"), rows)
    if not c.draw:
        run_all([p for name in names for p in FIGURES[name][0]()], c)
    wrong = []
    for name in names:
        points, draw, _ = FIGURES[name]
        try:
            save_figure(name, collect(points(), c), draw, c)
        except ConfigError as e:  # the other figures do not need these runs
            wrong.append(str(e))
    require(not wrong, "\n".join(wrong), None)


if __name__ == "__main__":
    run_cli(main)
