"""Measure and analyse trained runs.

    python eval.py runs/RUN                       # test accuracy by slice, with 95% intervals
    python eval.py runs/RUN --print_examples 8    # and what the model answers to eight examples
    python eval.py runs/RUN --example 3           # and to the example with index 3
    python eval.py runs/RUN --ask "34512:"        # the answer to a question, and its probability
    python eval.py hashhop runs/RUN               # the same for the runs of one task: mqar, qa,
                                                  # digits, twohop, hashhop, text
    python eval.py all runs/RUN                   # all that fits the run, with figures: report.md
    torchrun --standalone --nproc_per_node=2 eval.py all runs/RUN

    python eval.py logits runs/RUN                # rank and probability of answers, calibration
    python eval.py activations | norms | track | routing runs/RUN     # memory layers
    python eval.py attention runs/RUN             # attention maps, and the role of each head
    python eval.py edit runs/RUN                  # closed-form editing beside fine-tuning; of MQAR,
                                                  # pairs in the state or the cache
    python eval.py edit runs/RUN --facts edits.jsonl --save_as NAME   # rewrite facts of your choice
    python eval.py edit runs/NAME --undo 1        # and take that back
    python eval.py consolidate runs/RUN           # facts from the context into the memory table
    python eval.py stats runs/A [runs/B]          # intervals and tests of one run or two
    python eval.py compare 'runs/*'               # runs side by side, seeds as bands
    python eval.py choices DIR                    # results of flex_generate.py: does a choice of
                                                  # method or templates for each relation help?
    python eval.py repair results.jsonl           # every whole record of a damaged file

Each writes eval_<what>.json {config, metrics, by_slice, examples}, .parquet and .png into the run,
and prints a short table. Settings that decide what is measured are part of the name if they are
not the defaults: eval_routing_n_examples-20.json.

A run is rebuilt from its own config.json and checkpoint. No override file is executed, and of your
own model and data files only those whose checksum is in config.json.
"""

import functools
import sys
from dataclasses import dataclass, replace

import numpy as np

from analysis.asking import answer_questions
from analysis.attention_maps import attention
from analysis.compare import compare
from analysis.compare_figure import BANDS
from analysis.confidence import logits
from analysis.consolidation import consolidate
from analysis.decoding import decode_example, hashhop_errors
from analysis.edit_comparison import compare_editors
from analysis.editors import CLOSED_FORMS, MARGIN, choose_editors
from analysis.findings import describe_widest, percent
from analysis.finetuning import SPARSE, TOP_SLOTS
from analysis.memory_usage import activations, norms, track
from analysis.named_edits import edit_named_facts, undo
from analysis.repair import repair
from analysis.routing import routing
from analysis.significance import stats
from analysis.state_editing import data_of_sizes, edit_pairs
from analysis.stored_facts import stored_bits
from analysis.trained_run import (
    AnalysisConfig,
    Command,
    concat,
    parse_command,
    predictions,
    report,
    require_decoding,
    run_command,
    save_result,
)
from myriadlama.choices import choices
from nanorecall.metrics import merge_batches, print_baselines, print_slices, slice_metrics
from nanorecall.plots import draw_slice, drawn_slices, figure, finish_figure, large_cells
from nanorecall.settings import Json, at_least, fits_in_a_path, one_of, require, run_cli, say
from nanorecall.stats import label_accuracy


@dataclass
class EvalConfig(AnalysisConfig):
    print_examples: int = 0  # print this many examples with the answers that the model decodes
    ask: Json = ""  # print the model's answer to this question, or to each of a JSON list
    example: int = -1  # index of an example to print (attention: to draw); -1: none (the first)
    n_examples: int = 1000  # examples to analyse, equally many from each eval group; 0: all
    data: str = ""  # routing: a .jsonl, .parquet or .csv of texts, instead of the run's own data
    n_edits: tuple[int, ...] = (1, 3, 10, 30, 100)  # edit, consolidate: facts written at once
    editors: str = ""  # edit: names of methods, separated by ';'; all; empty: a short list
    new_facts: bool = False  # edit: add facts with new keys, instead of rewriting known ones
    portions: int = 1  # edit: portions of the facts, edited one after the other
    top_slots: int = TOP_SLOTS  # edit: slots that sparse methods train for each fact
    margin: float = MARGIN  # logits by which closed forms aim to put an answer above other tokens
    facts: str = ""  # edit: .jsonl, .parquet or .csv of facts to rewrite: question, new answer
    add: bool = False  # edit --facts: also write new facts, and known ones that it answers wrongly
    save_as: str = ""  # edit --facts: name of a run directory to write, with the edited weights
    undo: bool = False  # edit: take the latest edit of an edited run back
    num_kv_pairs: tuple[int, ...] = ()  # MQAR: pairs in a sequence; empty: as in the run's own test
    dtype: str = "auto"  # float32 or bfloat16; auto: as the run was trained
    band: str = "range"  # compare: band over seeds, lowest to highest; or interval, 95% of the mean
    path: str = ""  # choices: the facts that were asked, as for flex_generate.py; empty: built-in
    methods: str = ""  # choices: names of methods, separated by ';'; empty: all that are there
    output: str = ""  # compare, choices: path without extension; empty: a file beside the results

    def check(self):
        super().check()
        at_least(self, 0, "print_examples", "n_examples")
        at_least(self, -1, "example")
        message = f"n_edits={self.n_edits} needs numbers of at least 1"
        require(self.n_edits, message, "n_edits")
        for name in ("n_edits", "num_kv_pairs"):
            numbers = getattr(self, name)
            message = f"{name}={numbers} needs numbers of at least 1"
            require(min(numbers, default=1) >= 1, message, name)
            message = f"{name}={numbers} names a number twice; name it once"
            require(len(set(numbers)) == len(numbers), message, name)
        at_least(self, 1, "portions", "top_slots")
        message = f"portions={self.portions} needs n_edits of at least as many, not {self.n_edits}"
        require(self.portions <= min(self.n_edits), message, "portions")
        require(self.margin > 0, f"margin={self.margin} must be above 0", "margin")
        self.chosen_editors()
        one_of(self, ("auto", "float32", "bfloat16"), "dtype")
        one_of(self, BANDS, "band")
        fits_in_a_path(self, "save_as")
        message = f"ask={self.ask!r} must be a question, or a JSON list of them"
        questions = self.ask if isinstance(self.ask, list) else [self.ask]
        is_text = all(isinstance(question, str) for question in questions)
        require(is_text and self.ask != [], message, "ask")
        is_blank = self.ask != "" and not all(map(str.strip, questions))
        require(not is_blank, f"ask={self.ask!r}: a question is empty; write it", "ask")

    def chosen_editors(self):
        return choose_editors(self.editors, self.top_slots, self.margin)

    def unused(self):
        reasons = {}
        if self.ask:
            names = ("print_examples", "example", "num_kv_pairs")
            reasons |= dict.fromkeys(names, "ask prints answers alone")
        compared = ("n_edits", "new_facts", "portions", "num_kv_pairs")
        if self.undo:
            names = ("facts", "editors", "top_slots", "margin", "split", "checkpoint", *compared)
            reasons |= dict.fromkeys(names, "undo takes an edit back")
        if self.facts:
            reasons |= dict.fromkeys(compared, "facts names what to edit")
            reasons["split"] = "all facts of the run are asked"
        if self.undo or self.facts:
            reasons["dtype"] = "facts in the weights are edited in float32"
        if not self.facts:
            reasons |= dict.fromkeys(("add", "save_as"), "there is no --facts FILE")
        if not SPARSE.keys() & self.chosen_editors().keys():
            reasons.setdefault("top_slots", "editors names no sparse method")
        if not CLOSED_FORMS.keys() & self.chosen_editors().keys():
            reasons.setdefault("margin", "editors names no closed form")
        return reasons


def parse(argv):
    """Command line -> name of the command, its paths, EvalConfig."""
    return parse_command(argv, __doc__, COMMANDS, EvalConfig, default="slices")


def main(argv=None):
    name, paths, config = parse(sys.argv[1:] if argv is None else argv)
    run_command(name, paths, config, COMMANDS)


# ---- accuracy by slice ---------------------------------------------------------------------------


def accuracy_by_slice(run):
    """Accuracy of labels and of whole examples, in total and by slice, and the bits stored."""
    config = run.config
    if config.ask:
        answer_questions(run)
        return
    if config.num_kv_pairs:
        is_mqar = run.settings.train.data == "data_mqar"
        message = f"num_kv_pairs is for runs of data_mqar.py, not of {run.settings.train.data}.py"
        require(is_mqar, message, "num_kv_pairs")
        run = replace(run, data=data_of_sizes(run))
    require_printed_examples(run)
    batches = predictions(run)
    if not run.world.is_main:
        return
    result = merge_batches(batches)
    by_slice = {}
    for name, values in result["by_slice"].items():
        by_slice[name] = {str(value): slice_metrics(counts) for value, counts in values.items()}
    metrics = {
        "accuracy": label_accuracy(result["all"]),
        "exact_match": slice_metrics(result["all"])["exact"],
        "loss": {"value": result["loss"], "n": result["labels"]},
        "without_knowledge": getattr(run.data, "baselines", {}),
        "stored": stored_bits(batches, run.data, run.model),
    }
    drawn = drawn_slices(by_slice)
    run.finding(describe_accuracy(metrics, config.split))
    if drawn:
        run.finding(describe_widest(by_slice, "token accuracy"))
    print_slices(result)
    print_baselines(metrics["without_knowledge"])
    print_stored(metrics["stored"])
    examples = [decode_example(run, index) for index in indices_to_print(run)]
    plot = None
    if drawn:  # without slices to compare, the table has all that a figure would show
        plot = functools.partial(plot_slices, drawn, f"{run.name}, {config.split}")
    save_result(run, config.split, metrics, by_slice, examples, label_columns(batches), plot)
    print_examples(examples)


def label_columns(batches):
    """Batches of `predictions` -> {column: (N,)}: example, correct and loss of labels, slices."""
    tables = []
    for batch in batches:
        measured = {name: batch[name] for name in ("example", "correct", "loss")}
        tables.append({**measured, **batch["slices"]})
    return concat(tables)


def print_stored(stored):
    """Print what `stored_bits` returned."""
    for name, number in stored.items():
        low, high = number["ci95"]
        say(f"{name}: {number['value']:.4g} (95% interval {low:.4g} - {high:.4g})")


def print_examples(examples):
    """Print what `decode_example` returned for each example."""
    for example in examples:
        say(f"example {example['example']}")
        for name in ("prompt", "answer", "model"):
            say(f"  {name:8} {example[name]!r}")


def describe_accuracy(metrics, split):
    """Accuracy beside the best guess without knowledge, as a sentence."""
    labels, examples = percent(metrics["accuracy"]), percent(metrics["exact_match"])
    text = f"{labels} of the {split} labels are correct, and all of them in {examples} of examples"
    guesses = metrics["without_knowledge"]
    if guesses:
        best = max(guesses, key=guesses.get)
        text += f"; the best guess without knowledge ({best}) gets {guesses[best]:.1%}"
    return text


def require_printed_examples(run):
    """ConfigError unless the examples that --print_examples and --example name can be decoded."""
    config = run.config
    if config.print_examples > 0 or config.example >= 0:
        require_decoding(run, "printing examples", "print_examples")
    last = run.data.eval_groups(config.split)[-1][-1]
    message = f"example={config.example} is not in {config.split}; the last is {last}"
    require(config.example <= last, message, "example")


def indices_to_print(run):
    """Indices of --print_examples examples, evenly spaced over the split, and that of --example."""
    config = run.config
    indices = []
    if config.print_examples:
        every = np.concatenate([list(g) for g in run.data.eval_groups(config.split)])
        n = min(config.print_examples, len(every))
        indices += every[np.linspace(0, len(every) - 1, n).astype(int)].tolist()
    if config.example >= 0:
        indices.append(config.example)
    return indices


def plot_slices(by_slice, title, path):
    """One panel for each slice: accuracy of each of its values, with intervals."""
    plt, fig, axes = figure(1, len(by_slice))
    lowest = 0.98
    for axis, (name, cells) in zip(axes, by_slice.items()):
        draw_slice(axis, name, cells)
        axis.set_ylabel("accuracy (95% interval)")
        lowest = min(lowest, *(cell["ci95"][0] for cell in large_cells(cells.values())))
    for axis in axes:
        axis.set_ylim(lowest - 0.02, 1.005)
    finish_figure(fig, plt, path, title)


# ---- editing -------------------------------------------------------------------------------------


def edit(run):
    """With --facts rewrite facts, with --undo take an edit back; else compare the ways to edit."""
    if run.config.undo:
        undo(run)
    elif run.config.facts:
        edit_named_facts(run)
    elif run.settings.train.data == "data_mqar":
        for name in ("editors", "new_facts", "portions", "top_slots", "margin"):
            message = f"{name} is for runs that store facts in their weights; this is one of MQAR"
            is_default = getattr(run.config, name) == getattr(EvalConfig, name)
            require(is_default, f"{message}; leave it out", name)
        edit_pairs(run)
    else:
        message = "num_kv_pairs is for runs of MQAR; this run stores facts in its weights"
        require(not run.config.num_kv_pairs, message, "num_kv_pairs")
        message = f"dtype={run.config.dtype} is for runs of MQAR; facts in the weights are edited"
        require(run.config.dtype in ("auto", "float32"), f"{message} in float32", "dtype")
        is_own = getattr(run.settings.data, "task", "") == "text"
        message = "facts of your own are edited by name: give a file of them with --facts"
        require(not is_own, message, None)
        compare_editors(run)


# ---- commands ------------------------------------------------------------------------------------


def task_of(run):
    """The name of the run's task: mqar, qa, ...; for a data file of your own, "slices"."""
    default = "mqar" if run.settings.train.data == "data_mqar" else "slices"
    task = getattr(run.settings.data, "task", default)
    return task if task in COMMANDS else "slices"


def accuracy_of_task(task, run):
    """accuracy_by_slice for a run of this task, and for HashHop its kinds of errors."""
    actual = task_of(run)
    message = f"{run.folder} is a run of {actual}, not of {task}"
    require(actual == task, f"{message}; run python eval.py {actual} {run.folder}", None)
    accuracy_by_slice(run)
    if task == "hashhop" and hasattr(run.model, "forward_cached"):
        hashhop_errors(run)


def run_all(run):
    """Every command that fits the run, and report.md."""
    memory = ("activations", "norms", "track", "routing", "edit", "consolidate")
    names = (task_of(run), "stats", "logits", "attention", *memory)
    report(run, "eval.py", COMMANDS, names, "report.md")


def task_command(task, *own_options):
    """The Command of a task. own_options: settings that no other task has."""
    return Command(
        functools.partial(accuracy_of_task, task),
        ("print_examples", "ask", "example", *own_options),
        f"Accuracy of labels and of whole examples, for runs of {task}.",
    )


COMMANDS = {
    "slices": Command(
        accuracy_by_slice,
        ("print_examples", "ask", "example", "num_kv_pairs"),
        "Accuracy of labels and of whole examples.",
    ),
    "mqar": task_command("mqar", "num_kv_pairs"),
    "qa": task_command("qa"),
    "digits": task_command("digits"),
    "twohop": task_command("twohop"),
    "hashhop": task_command("hashhop"),
    "text": task_command("text"),
    "logits": Command(
        logits,
        ("n_examples",),
        "How probable the correct tokens are, and whether the model's confidence is calibrated.",
    ),
    "attention": Command(
        attention,
        ("n_examples", "example"),
        "Attention maps of one example, and the pattern that each head attends to most.",
    ),
    "activations": Command(activations, ("n_examples",), "Which slots are read, and how evenly."),
    "norms": Command(norms, ("n_examples",), "Norms of the values and of the memory output."),
    "track": Command(
        track, ("n_examples",), "At which tokens each slot is read, and slot usage in training."
    ),
    "routing": Command(
        routing,
        ("n_examples", "data"),
        "MLP or memory, or which slots, by kind of token, position and layer.",
    ),
    "edit": Command(
        edit,
        (
            *("n_edits", "editors", "new_facts", "portions", "top_slots", "margin"),
            *("facts", "add", "save_as", "undo", "num_kv_pairs"),
        ),
        "Facts edited in closed form, beside fine-tuning; of MQAR, pairs in state or cache.",
    ),
    "consolidate": Command(
        consolidate,
        ("n_edits", "margin"),
        "Facts that the model reads in its context, written into its memory table.",
    ),
    "stats": Command(
        stats,
        ("split",),
        "Intervals of every slice, and what correlates with the loss.",
        needs_model=False,
    ),
    "compare": Command(compare, ("output", "band"), "Runs side by side.", needs_model=False),
    "choices": Command(
        choices,
        ("path", "methods", "output"),
        "Method and templates chosen for each relation, from results of flex_generate.py.",
        needs_model=False,
    ),
    "repair": Command(repair, (), "Every whole record of a damaged file.", needs_model=False),
    "all": Command(
        run_all,
        ("print_examples", "example", "n_examples", "n_edits"),
        "Everything that fits the run.",
    ),
}


if __name__ == "__main__":
    run_cli(main)
