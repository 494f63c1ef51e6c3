"""Measure trained runs and look inside them.

    python eval.py runs/RUN                       # test accuracy by slice, with 95% intervals
    python eval.py runs/RUN --examples 8          # and what the model answers to eight rows; --example 3 shows row 3 whole
    python eval.py hashhop runs/RUN               # the same, for runs of one task: mqar, qa, digits, twohop, hashhop, text
    python eval.py all runs/RUN                   # everything that fits the run, in one report.md with its figures
    torchrun --standalone --nproc_per_node=2 eval.py all runs/RUN

    python eval.py logits runs/RUN                # rank and probability of every token of the answers, calibration
    python eval.py activations | norms | track | routing runs/RUN     # memory layers: slots, lengths, tokens, choices
    python eval.py attention runs/RUN             # a map per head, and what it does
    python eval.py edit runs/RUN                  # rewrite stored facts without gradients, beside fine-tuning
    python eval.py stats runs/A [runs/B]          # intervals and tests, of one run or of two on the same rows
    python eval.py compare 'runs/*'               # runs side by side, seeds as bands
    python eval.py repair results.jsonl           # every complete record of a cut file

Each writes eval_<what>.json {config, metrics, by_slice, examples}, .parquet and .png into the run (maps into attention/) and
prints a short table. Settings that decide what is measured are part of the name where they are not
the defaults: eval_routing_rows-20.json.
A run is rebuilt from its own config.json and checkpoint; no override file is run, and of your own
model and data files only those whose checksum is in config.json.
"""

from dataclasses import dataclass

import numpy as np
import torch

from analysis import attention_maps, editing
from analysis.commands import Command, analysis, fits_all, report, run_command
from analysis.compare import compare
from analysis.confidence import logits
from analysis.memory_usage import activations, norms, track, why_not_slots
from analysis.repair import repair
from analysis.routing import routing
from analysis.significance import stats
from analysis.trained_run import AnalysisConfig, map_batches, save_result
from nanorecall.metrics import (
    iter_predictions,
    merge_batches,
    print_baselines,
    print_slices,
    print_table,
    slice_metrics,
)
from nanorecall.plots import errorbars, figure, finish_figure
from nanorecall.rng import IGNORE_INDEX
from nanorecall.settings import at_least, one_of, require, run_cli, say
from nanorecall.stats import format_ci, label_accuracy, mean_ci, proportion


@dataclass
class EvalConfig(AnalysisConfig):
    examples: int = 0  # print this many rows with the answers that the model gives, token by token
    example: int = -1  # print this row whole (attention: draw it); -1: none (attention: the first)
    rows: int = 1000  # what looks inside: rows to look at, as many of each part of the split; 0: all
    data: str = ""  # routing: texts of a .jsonl or .parquet file instead of the run's own rows
    edits: tuple[int, ...] = (1, 3, 10, 30, 100)  # edit: how many facts to rewrite at once
    dtype: str = "auto"  # float32 or bfloat16; auto: as the run was trained
    out: str = ""  # compare: where to write, without ending; empty: compare beside the first run

    def check(self):
        super().check()
        at_least(self, 0, "examples", "rows")
        at_least(self, -1, "example")
        require(self.edits and min(self.edits) >= 1, f"edits={self.edits} needs numbers of at least 1", "edits")
        one_of(self, ("auto", "float32", "bfloat16"), "dtype")


# ---- accuracy by slice -------------------------------------------------------------------------------------------------


def accuracy_by_slice(run):
    """Accuracy of one run, whole and by slice, and what facts it stores."""
    c, data, model, world = run.config, run.data, run.model, run.world
    can_decode = hasattr(model, "forward_cached") or (c.examples == 0 and c.example < 0)
    require(can_decode, "examples are decoded, for which the model needs a method `forward_cached` as in model.py", "examples")
    last = data.eval_groups(c.split)[-1][-1]
    require(c.example <= last, f"example={c.example} is no row of {c.split}; the last is {last}", "example")
    mine = iter_predictions(model, data, c.split, c.eval_batch_size, run.device, run.dtype, show_progress=True, world=world)
    batches = [b for turn in zip(*world.all_gather_object(list(mine))) for b in turn if b]  # in the order that one process would take
    if not world.is_main:
        return
    result = merge_batches(batches)
    everything = slice_metrics(result["all"])
    metrics = {
        "accuracy": label_accuracy(result["all"]),
        "row_accuracy": everything["exact"],
        "loss": {"value": result["loss"], "n": result["labels"]},
        "without_knowledge": getattr(data, "baselines", {}),
        "stored": stored_bits(batches, data, model),
    }
    by_slice = {tag: {str(v): slice_metrics(cell) for v, cell in cells.items()} for tag, cells in result["by_slice"].items()}
    print_slices(result)
    print_baselines(metrics["without_knowledge"])
    for name, value in metrics["stored"].items():
        say(f"{name}: {value['value']:.4g} (95% interval {value['ci95'][0]:.4g} - {value['ci95'][1]:.4g})")
    columns = {k: np.concatenate([b[k] for b in batches]) for k in ("row", "hit", "loss")}
    columns |= {tag: np.concatenate([b["tags"][tag] for b in batches]) for tag in batches[0]["tags"]}
    rows = np.concatenate([list(s) for s in data.eval_groups(c.split)])
    some = rows[np.linspace(0, len(rows) - 1, min(c.examples, len(rows))).astype(int)] if c.examples else []
    shown_rows = [*some, *([c.example] if c.example >= 0 else [])]
    examples = [decode_example(run, row) for row in shown_rows]
    title = f"{run.name}, {c.split}"
    plot = lambda path: plot_slices(path, by_slice or {"all": {"all": everything}}, title)
    save_result(run, c.split, metrics, by_slice, examples, columns, plot)
    for row, example in zip(shown_rows, examples):
        say(f"row {row}", *(f"  {name:8} {value!r}" for name, value in example.items() if name != "row"), sep="\n")


def stored_bits(batches, data, model):
    """Bits of the trained facts that the model stores, as {name: {"value", "ci95", "n"}}; {} where answers follow from others.

    Of each fact the bits of its answer less its loss, at least 0 (Allen-Zhu and Li 2024, arXiv 2404.05405), here with the facts
    that were measured, times the number of all; the interval is that of the mean over facts.
    """
    knowledge = getattr(getattr(data, "source", None), "capacity", {})
    if not knowledge:
        return {}
    tag, value = knowledge["slice"].split("=")
    row, loss, kind = (
        np.concatenate([b[k] if k != "tag" else b["tags"][tag] for b in batches]) for k in ("row", "loss", "tag")
    )
    mine = kind.astype(str) == value
    _, which = np.unique(row[mine], return_inverse=True)
    labels, nats = np.bincount(which), np.bincount(which, loss[mine])
    bits = np.maximum(0, labels * knowledge["bits"] - nats / np.log(2))  # of each fact
    every = sum(q.numel() for q in model.parameters())
    values = {id(q): q.numel() for name, q in model.named_parameters() if name.endswith("memory.values")}
    sizes = {"bits stored": 1, "bits stored per parameter": every, "bits stored per memory value": sum(values.values())}
    of_all = {name: knowledge["facts"] / size for name, size in sizes.items() if size}
    return {name: mean_ci(bits * facts) for name, facts in of_all.items()}


def greedy_decode(model, tokens, count):
    """The count >= 1 tokens that follow tokens (B, T), each the most likely one after all before it -> (B, count)."""
    logits, cache = model.forward_cached(tokens)
    out = [logits[:, -1:].argmax(-1)]  # (B, 1)
    while len(out) < count:
        logits, cache = model.forward_cached(out[-1], cache)
        out.append(logits.argmax(-1))
    return torch.cat(out, dim=1)


def decode_example(run, row):
    """One row of text -> {"prompt", "answer", "model"}: what is asked, what is right, and what the model writes there.

    It reads the text and decodes greedily, its own tokens fed back, so from its first error on it may differ from what the
    accuracy of labels counts; whole rows that are right are right both ways.
    """
    tokens, targets, *_ = run.data.batch(run.config.split, 0, [row])
    at = np.flatnonzero(targets[0] != IGNORE_INDEX)
    if len(at) == 0:
        return {"row": int(row), "prompt": run.text(tokens[0]), "answer": "", "model": "(this row asks for nothing)"}
    at = at[at - np.arange(len(at)) == at[0]]  # the first answer of the row
    written = greedy_decode(run.model, tokens[:, : at[0] + 1].to(run.device), len(at))
    texts = (tokens[0, : at[0] + 1], targets[0, at], written[0].cpu())
    return {"row": int(row), **{name: run.text(ids) for name, ids in zip(("prompt", "answer", "model"), texts)}}


def plot_slices(path, by_slice, title):
    """One panel per tag: accuracy of each of its values, with intervals. A tag with a single value says nothing: left out."""
    tags = [t for t in by_slice if len(by_slice[t]) > 1] or list(by_slice)[:1]
    plt, fig, axes = figure(1, len(tags))
    for axis, tag in zip(axes, tags):
        cells = list(by_slice[tag].values())
        errorbars(axis, range(len(cells)), cells)
        axis.set_xticks(range(len(cells)), [f"{v}\nn={c['n']}" for v, c in by_slice[tag].items()], fontsize=7)
        lowest = min(c["ci95"][0] for c in cells)
        axis.set(xlabel=tag, ylabel="accuracy (95% interval)", ylim=(min(0.98, lowest) - 0.02, 1.005))
    finish_figure(fig, plt, path, title)


# ---- hashhop: what kind of mistake -------------------------------------------------------------------------------------

ERRORS = (
    *("right", "right end, wrong way", "another hop of its chain", "another hash of the row", "not in the row", "malformed"),
)


def classify_error(text, written):
    """What a model wrote after the last "= '" of a HashHop row -> one of ERRORS.

    The closing quote is no label, so no model learns to write it: what counts is as many letters as the right answer has.

    >>> text = "ab = cd\\ncd = 'ef'\\ngh = 'ij'\\n\\nCOMPLETION:\\nHops=2\\n\\nCoT=False\\n\\nab = 'ef'\\n"
    >>> [classify_error(text, w) for w in ("ef", "xx = ef", "cd", "ij", "xy", "e=")]  # doctest: +NORMALIZE_WHITESPACE
    ['right', 'right end, wrong way', 'another hop of its chain', 'another hash of the row', 'not in the row', 'malformed']
    """
    head, completion = text.split("COMPLETION:")
    key, right = completion.strip().rsplit("\n", 1)[-1].replace("'", "").split(" = ", 1)
    after, last = dict(line.replace("'", "").split(" = ") for line in head.strip().split("\n")), written.rsplit(" = ", 1)[-1]
    if written == right:
        return "right"
    if last == right.rsplit(" = ", 1)[-1]:
        return "right end, wrong way"
    if len(last) != len(key) or not last.isalnum():
        return "malformed"
    chain = [key]
    while chain[-1] in after:
        chain.append(after[chain[-1]])
    if last in chain:
        return "another hop of its chain"
    return "another hash of the row" if last in after or last in after.values() else "not in the row"


def hashhop(run):
    """Accuracy by hops, and what the wrong answers are, decoded token by token."""
    accuracy_by_slice(run)
    data, split = run.data, run.config.split

    def work(batch):
        texts, tags = data.source.read(split, batch.rows)
        cuts = [text.index("'", text.index("COMPLETION:")) + 1 for text in texts]
        prompts = [data.add_special_tokens(data.tokenizer.encode(text[:cut])) for text, cut in zip(texts, cuts)]
        answers = [data.tokenizer.encode(text[cut:].rstrip().rstrip("'")) for text, cut in zip(texts, cuts)]
        kinds, sizes = np.empty(len(texts), "U24"), np.array([(len(p), len(a)) for p, a in zip(prompts, answers)])
        for size in np.unique(sizes, axis=0):  # prompts and answers of one length are decoded together
            mine = np.flatnonzero((sizes == size).all(1))
            written = greedy_decode(run.model, run.tensor(np.stack([prompts[i] for i in mine])), int(size[1])).cpu()
            for i, ids in zip(mine, written):
                kinds[i] = classify_error(texts[i], run.text(ids))
        return {"row": batch.rows, "hops": tags.get("hops_cot", tags["hops"]).astype("U8"), "answer": kinds}

    found = map_batches(run, work)
    by_slice = {"hops": {}}
    for level in sorted(np.unique(found["hops"]), key=lambda level: (int(level.split()[0]), level)):
        mine = found["answer"][found["hops"] == level]
        by_slice["hops"][level] = {kind: proportion(int((mine == kind).sum()), len(mine)) for kind in ERRORS}
    if run.world.is_main:
        lines = [(h, kind, *format_ci(cell)) for h, cells in by_slice["hops"].items() for kind, cell in cells.items()]
        print_table(("hops", "answer", "rows", "share", "95% interval"), lines)
    save_result(run, "hashhop", {}, by_slice, (), found, lambda path: plot_mistakes(path, by_slice["hops"], run.name))


def plot_mistakes(path, cells, title):
    """One bar for each number of hops, cut by what was answered."""
    plt, fig, (axis,) = figure(1, 1, width=6)
    bottom, numbers = np.zeros(len(cells)), [next(iter(c.values()))["n"] for c in cells.values()]
    for kind in ERRORS:
        height = np.array([c[kind]["value"] for c in cells.values()])
        axis.bar(range(len(cells)), height, bottom=bottom, label=kind, width=0.6)
        bottom += height
    axis.set_xticks(range(len(cells)), [f"{h}\nn={n}" for h, n in zip(cells, numbers)], fontsize=8)
    axis.set(xlabel="hops", ylabel="share of rows", ylim=(0, 1))
    fig.legend(*axis.get_legend_handles_labels(), fontsize=7, loc="outside right upper")
    finish_figure(fig, plt, path, title)


# ---- everything in one report ------------------------------------------------------------------------------------------


def task_of(run):
    """The name of the run's task: mqar, qa, ...; of a data file of your own, "slices"."""
    task = getattr(run.settings.data, "task", "mqar" if run.settings.train.data == "data_mqar" else "slices")
    return task if task in COMMANDS else "slices"


def run_all(run):
    """Each command that fits, and report.md."""
    names = (task_of(run), "stats", "logits", "attention", "activations", "norms", "track", "routing", "edit")
    report(run, "eval.py", COMMANDS, names, "report.md")


def of_task(name):
    """The command for runs of one task."""

    def work(run):
        message = f"{run.folder} is a run of {task_of(run)}, not of {name}: python eval.py {task_of(run)} {run.folder}"
        require(task_of(run) == name, message, None)
        (hashhop if name == "hashhop" and hasattr(run.model, "forward_cached") else accuracy_by_slice)(run)

    return work


RIGHT = "How many labels and whole rows are right."

COMMANDS = {
    "slices": analysis(accuracy_by_slice, "examples example", RIGHT),
    **{name: analysis(of_task(name), "examples example", RIGHT) for name in ("mqar", "qa", "digits", "twohop", "hashhop", "text")},
    "logits": analysis(logits, "rows", "How probable the right tokens are, and whether that confidence is right."),
    "attention": analysis(
        attention_maps.attention,
        "rows example",
        "Where each head looks: one row's maps, and the pattern that has most of its attention over all rows.",
        lambda run: attention_maps.why_not_maps(run.model),
    ),
    "activations": analysis(activations, "rows", "Which slots are read, and how evenly.", why_not_slots),
    "norms": analysis(norms, "rows", "How long the value rows are, and what is read from them.", why_not_slots),
    "track": analysis(track, "rows", "At which tokens each slot is read, and the use of slots while training.", why_not_slots),
    "routing": analysis(routing, "rows data", "MLP or memory, or which slots, by kind of token, place and layer.", why_not_slots),
    "edit": analysis(editing.compare_editors, "edits", "Facts rewritten without gradients, beside fine-tuning.", editing.why_not_edit),
    "stats": Command(stats, False, "split", fits_all, "Intervals of every slice, and what correlates with the loss."),
    "compare": Command(compare, False, "out", fits_all, "Runs side by side."),
    "repair": Command(repair, False, "", fits_all, "Every complete record of a cut file."),
    "all": analysis(run_all, "rows example examples edits", "Everything that fits the run."),
}


def main(argv=None):
    run_command(__doc__, COMMANDS, EvalConfig, argv, default="slices")


if __name__ == "__main__":
    run_cli(main)
