"""Accuracy and loss of a model over a split, in total and by slice, and tables of them.

Letters: B examples in a batch, T tokens, N labels in a batch.
"""

import contextlib
import functools

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from nanorecall.distributed import SINGLE_PROCESS
from nanorecall.rng import IGNORE_INDEX
from nanorecall.settings import printable, require, say
from nanorecall.stats import cluster_counts, format_ci, label_accuracy, proportion

# ---- predictions ---------------------------------------------------------------------------------


def autocast(device, dtype):
    """Mixed precision in dtype; for float32, a context that does nothing."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


@contextlib.contextmanager
def evaluating(model):
    """Eval mode in this context. At its end, each module gets back the mode that it had."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def in_eval_mode(function):
    """Decorator of function(model, ...): call it in `evaluating` and without gradients."""

    @functools.wraps(function)
    def wrapper(model, *args, **kwargs):
        with evaluating(model), torch.no_grad():
            return function(model, *args, **kwargs)

    return wrapper


def correct_predictions(logits, targets):
    """logits (N, V), targets (B, T) -> which labels (N,) and examples (B,) are correct, bool.

    An example is correct if all of its labels are (exact match). One without labels counts as
    correct. A model with a method of its own, correct(logits, targets), is evaluated by that.
    """
    labelled = targets != IGNORE_INDEX
    correct = torch.ones_like(labelled)
    correct[labelled] = logits.argmax(-1) == targets[labelled]
    return correct[labelled], correct.all(1)


@torch.no_grad()
def iter_predictions(
    model,
    data,
    split,
    batch_size,
    device,
    dtype=torch.float32,
    show_progress=False,
    stop=(),
    world=SINGLE_PROCESS,
):
    """Go through a split in batches. Yields for each batch a dict of

    "correct" (N,) bool, "loss" (N,) in nats, "slices" {slice: values (N,)}, "example" (N,), the
    index of each label's example, and "exact_match", bool for each example that has labels. (An
    example without labels would be correct for every model, so it is not counted.)

    Ranks alternate: each yields its own batches, and None where no batch is left for it. All of
    them end early if `stop`, a list that a signal handler fills, is not empty on any.
    """
    correct_fn = getattr(model, "correct_predictions", correct_predictions)
    batches = []
    for group in data.eval_groups(split):
        batches += [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
    # None shows the bar on a terminal only.
    disable = None if show_progress and world.is_main else True
    for first in tqdm(range(0, len(batches), world.size), desc=split, disable=disable, leave=False):
        if world.all_gather(len(stop)).any():
            return
        # FSDP gathers weights in every forward pass, so a rank without a batch needs a dummy one.
        index = first + world.rank
        rows = batches[min(index, len(batches) - 1)]
        tokens, targets, tags, *more = data.batch(split, 0, rows)
        more = [x.to(device) for x in more]
        with autocast(device, dtype):
            logits, _ = model(tokens.to(device), targets.to(device), *more)
        if index >= len(batches):
            yield None
            continue
        labelled = targets != IGNORE_INDEX
        correct, row_correct = correct_fn(logits.cpu(), targets)
        loss = F.cross_entropy(logits.float().cpu(), targets[labelled], reduction="none")
        yield {
            "correct": correct.numpy(),
            "loss": loss.numpy(),
            "slices": tags,
            "example": np.repeat(np.asarray(rows), labelled.sum(1).numpy()),
            "exact_match": row_correct[labelled.any(1)].numpy(),
        }


@in_eval_mode
def evaluate(
    model, data, split, batch_size, device, dtype=torch.float32, stop=(), world=SINGLE_PROCESS
):
    """Evaluate over all ranks -> what `merge_counts` returns, the same on each; None if stopped."""
    options = dict(show_progress=True, stop=stop, world=world)
    counts = []
    for batch in iter_predictions(model, data, split, batch_size, device, dtype, **options):
        counts.append(count_batch(batch) if batch else None)
    if world.all_gather(len(stop)).any():
        return None
    # In the order of one process, because sums of losses depend on it in their last bits.
    in_order = [c for of_ranks in zip(*world.all_gather_object(counts)) for c in of_ranks]
    return merge_counts([c for c in in_order if c])


# ---- counts --------------------------------------------------------------------------------------


def merge_batches(batches):
    """Batches of `iter_predictions` -> what `merge_counts` returns."""
    return merge_counts([count_batch(b) for b in batches])


def count_batch(batch):
    """One batch of `iter_predictions` -> numbers that add up: of all labels, and "by_slice"."""
    correct, loss, example = batch["correct"], batch["loss"], batch["example"]

    def count(mask):
        total_loss = float(loss[mask].sum(dtype=np.float64))
        return {**cluster_counts(correct[mask], example[mask]), "loss": total_loss}

    by_slice = {}
    for tag, values in batch["slices"].items():
        by_slice[tag] = {v.item(): count(values == v) for v in np.unique(values)}
    counts = count(np.ones(len(correct), bool))
    # Exact match is that of the model's own `correct`, which may look at more than labels.
    counts["row_right"] = int(batch["exact_match"].sum())
    counts["rows"] = len(batch["exact_match"])
    return {**counts, "by_slice": by_slice}


def merge_counts(counts):
    """Counts of all batches -> accuracies, mean loss, and counts: "all", and "by_slice".

    by_slice is {slice: {value: counts}}. In a slice an example is correct if its labels there are.
    """
    # The order of the first batch: a set would have another order in every process.
    names = [name for name in counts[0] if name != "by_slice"]
    total = {name: sum(c[name] for c in counts) for name in names}
    by_slice = {}
    for batch in counts:
        for tag, of_values in batch["by_slice"].items():
            merged = by_slice.setdefault(tag, {})
            for value, cell in of_values.items():
                before = merged.get(value, dict.fromkeys(names, 0))
                merged[value] = {name: before[name] + cell[name] for name in names}
    return {
        "accuracy": total["right"] / total["labels"],
        "row_accuracy": total["row_right"] / total["rows"],
        "loss": total["loss"] / total["labels"],
        "labels": total["labels"],
        "rows": total["rows"],
        "all": total,
        "by_slice": {tag: dict(sorted(cells.items())) for tag, cells in by_slice.items()},
    }


# ---- slices --------------------------------------------------------------------------------------


def slice_metrics(counts):
    """Counts of a slice -> label accuracy, exact match as "exact", and "nll" in nats per label."""
    exact = proportion(counts["row_right"], counts["rows"])
    return {**label_accuracy(counts), "exact": exact, "nll": counts["loss"] / counts["labels"]}


def slice_accuracy(result, name):
    """Token accuracy from what `merge_counts` returned: of the slice "tag=value"; for "", of all."""
    if not name:
        return result["accuracy"]
    tag, _, value = name.partition("=")
    counts = next(c for v, c in result["by_slice"][tag].items() if str(v) == value)
    return counts["right"] / counts["labels"]


def check_slice(data, name, batch_size):
    """ConfigError unless the slice "tag=value" occurs in validation and in test."""
    tag, _, value = name.partition("=")
    for split in ("val", "test"):
        known = {}
        for group in data.eval_groups(split):
            for first in range(0, len(group), batch_size):
                _, _, tags, *_ = data.batch(split, 0, group[first : first + batch_size])
                for t, values in tags.items():
                    known.setdefault(t, set()).update(map(str, np.unique(values)))
        slices = " ".join(f"{t}={v}" for t, values in known.items() for v in sorted(values)[:12])
        message = f"target_slice={name} is not among the slices of {split}: {slices}"
        require(value in known.get(tag, ()), message, "target_slice")


# ---- tables --------------------------------------------------------------------------------------


def print_table(head, rows):
    """Print aligned columns: the first to the left, others to the right."""
    cells = [[printable(x) for x in row] for row in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for first, *others in cells:
        line = [first.ljust(widths[0])]
        line += [text.rjust(width) for text, width in zip(others, widths[1:])]
        print("  ".join(line))


SLICE_HEAD = (
    *("slice", "value", "labels", "accuracy", "95% interval"),
    *("rows", "exact", "95% interval", "nats per label"),
)


def print_slices(result, max_values=24):
    """Print what `merge_counts` returned: accuracy, exact match and loss, in total and by slice.

    Slices with more than max_values values are left out; eval.py writes them to its files.
    """
    rows = [("all", "", result["all"])]
    for tag, cells in result["by_slice"].items():
        if len(cells) <= max_values:
            rows += [(tag, value, counts) for value, counts in cells.items()]
    lines = []
    for tag, value, counts in rows:
        m = slice_metrics(counts)
        lines.append((tag, value, *format_ci(m), *format_ci(m["exact"]), f"{m['nll']:.4f}"))
    print_table(SLICE_HEAD, lines)


def print_baselines(baselines):
    """Print the accuracy of guesses without knowledge: {name: value}."""
    for name, value in baselines.items():
        say(f"without knowledge: {name}: {value:.4f}")
