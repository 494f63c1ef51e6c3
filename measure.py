"""Accuracy and loss of a model over a split, and the curves of a run, for train.py to watch itself and for eval.py."""

import contextlib
import os
import sys

import numpy as np
import torch
from tqdm import tqdm

import model as model_file
from checkpoint import read_log
from parallel import ALONE


def autocast(device, dtype):
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()


@torch.no_grad()
def predict(model, data, split, batch_size, device, dtype=torch.float32, bar=False, stop=(), world=ALONE):
    """Yield, batch by batch over a whole split, a dict of

    hit (N,) bool, loss (a sum over labels), tags {name: (N,)}, row (N,) the row of each label, row_hit (B,) bool.

    Ranks take turns: each yields its own batches, None where there is none left for it, and ends early, together with
    the others, once `stop` (a list that a signal fills) of any is not empty.
    """
    correct = scorer(model)
    batches = [s[i : i + batch_size] for s in data.segments(split) for i in range(0, len(s), batch_size)]
    hidden = not (bar and world.first and sys.stderr.isatty())
    for turn in tqdm(range(0, len(batches), world.size), desc=split, disable=hidden, leave=False):
        if world.table(len(stop)).any():
            return
        # FSDP gathers weights in every forward pass, so a rank without a batch runs one along
        rows = batches[min(turn + world.rank, len(batches) - 1)]
        tokens, targets, tags = data.batch(split, 0, rows)
        with autocast(device, dtype):
            logits, loss = model(tokens.to(device), targets.to(device))
        if turn + world.rank >= len(batches):
            yield None
            continue
        hit, row_hit = correct(logits.cpu(), targets)
        row = np.repeat(np.asarray(rows), (targets != -100).sum(1).numpy())
        yield {"hit": hit.numpy(), "loss": loss.item() * len(hit), "tags": tags, "row": row, "row_hit": row_hit.numpy()}


def scorer(model):
    """`correct` of the file that the model comes from, or model.py's."""
    files = (sys.modules[cls.__module__] for cls in type(model).__mro__)  # the class of a sharded model is made by torch
    return next((f.correct for f in files if hasattr(f, "correct")), model_file.correct)


def evaluate(model, data, split, batch_size, device, dtype=torch.float32, stop=(), world=ALONE):
    """Token accuracy, row accuracy (exact match), mean loss, and {tag: {value: [right, labels]}} over all labels.

    Shared out over the ranks, and the same on each. None if `stop` cut it short.
    """
    was_training = model.training
    model.eval()
    mine = [b and count(b) for b in predict(model, data, split, batch_size, device, dtype, True, stop, world)]
    model.train(was_training)
    if world.table(len(stop)).any():
        return None
    turns = zip(*world.gather(mine))
    return total([counts for turn in turns for counts in turn if counts])  # in the order that one process would take


def summarise(batches):
    """What predict yielded -> accuracies, mean loss, their counts, and {tag: {value: [right, labels]}}."""
    return total([count(b) for b in batches])


def count(batch):
    """What predict yielded for one batch, in numbers that add up."""
    hit, by_slice = batch["hit"], {}
    for tag, values in batch["tags"].items():
        by_slice[tag] = {v.item(): [int(hit[values == v].sum()), int((values == v).sum())] for v in np.unique(values)}
    rows = batch["row_hit"]
    sums = {"right": int(hit.sum()), "labels": len(hit), "row_right": int(rows.sum()), "rows": len(rows)}
    return {**sums, "loss": batch["loss"], "by_slice": by_slice}


def total(counts):
    """The counts of all batches -> what `evaluate` returns."""
    sums = {k: sum(c[k] for c in counts) for k in ("right", "labels", "row_right", "rows", "loss")}
    by_slice = {}
    for c in counts:
        for tag, cells in c["by_slice"].items():
            for value, (right, n) in cells.items():
                cell = by_slice.setdefault(tag, {}).setdefault(value, [0, 0])
                cell[0], cell[1] = cell[0] + right, cell[1] + n
    return {
        "accuracy": sums["right"] / sums["labels"],
        "row_accuracy": sums["row_right"] / sums["rows"],
        "loss": sums["loss"] / sums["labels"],
        "labels": sums["labels"],
        "rows": sums["rows"],
        "by_slice": {tag: dict(sorted(cells.items())) for tag, cells in by_slice.items()},
    }


def figure(*shape, width=4.2):
    """A figure without a window -> (pyplot, figure, list of axes)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(*shape, figsize=(width * shape[1], 3.2 * shape[0]), squeeze=False, constrained_layout=True)
    return plt, fig, list(axes.flat)


def plot_curves(folder, title):
    """curves.png: loss and validation accuracy against steps, from log.jsonl."""
    rows = read_log(folder)
    measured = [r for r in rows if r["kind"] == "eval"]
    trained = [r for r in rows if r["kind"] == "train" and r["loss"] is not None]
    plt, fig, (left, right) = figure(1, 2, width=4.5)
    left.plot([r["step"] for r in trained], [r["loss"] for r in trained], lw=1, label="train batch")
    for axis, key, label in (
        (left, "loss", "val"),
        (right, "accuracy", "labels (token accuracy)"),
        (right, "row_accuracy", "whole rows (exact match)"),
    ):
        axis.plot([r["step"] for r in measured], [r[key] for r in measured], "o-", ms=3, label=label)
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    labels, in_rows = measured[-1]["labels"], measured[-1]["rows"]
    left.set(xlabel="step", ylabel="loss (nats per label)", yscale="log")
    right.set(
        xlabel="step",
        ylabel="val accuracy",
        ylim=(-0.02, 1.02),
        xlim=left.get_xlim(),
        title=f"n = {labels} labels in {in_rows} rows",
    )
    right.title.set_fontsize(8)
    fig.suptitle(title, fontsize=8)
    fig.savefig(os.path.join(folder, "curves.png"), dpi=120)
    plt.close(fig)
