"""Accuracy and loss of a model over a split, in total and by slice, and tables of them.

Letters: B examples in a batch, T tokens, N labels in a batch.
"""

import contextlib
import functools

import numpy as np
import torch
import torch.nn.functional as F

from nanorecall.distributed import SINGLE_PROCESS
from nanorecall.progress import progress
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
    correct. A model with a method correct_predictions(logits, targets) is evaluated by that.
    """
    labelled = targets != IGNORE_INDEX
    correct = torch.ones_like(labelled)
    correct[labelled] = logits.argmax(-1) == targets[labelled]
    return correct[labelled], correct.all(1)


def eval_batches(data, split, batch_size):
    """Yield the indices of each batch of a split. The sequences of a batch are of one group."""
    for group in data.eval_groups(split):
        for first in range(0, len(group), batch_size):
            yield group[first : first + batch_size]


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
    batches = list(eval_batches(data, split, batch_size))
    rounds = range(0, len(batches), world.size)
    for first in progress(rounds, f"{split} batches", show_progress and world.is_main):
        if world.all_gather(len(stop)).any():
            return
        # FSDP gathers weights in every forward pass, so a rank without a batch needs a dummy one.
        index = first + world.rank
        examples = batches[min(index, len(batches) - 1)]
        tokens, targets, slices, *cu_seqlens = data.batch(split, 0, examples)
        logits = predict(model, tokens, targets, cu_seqlens, device, dtype)
        if index >= len(batches):
            yield None
            continue
        labelled = targets != IGNORE_INDEX
        correct, exact_match = correct_fn(logits, targets)
        loss = F.cross_entropy(logits.float(), targets[labelled], reduction="none")
        yield {
            "correct": correct.numpy(),
            "loss": loss.numpy(),
            "slices": slices,
            "example": np.repeat(np.asarray(examples), labelled.sum(1).numpy()),
            "exact_match": exact_match[labelled.any(1)].numpy(),
        }


def predict(model, tokens, targets, cu_seqlens, device, dtype):
    """-> logits of the labels (N, V), on the CPU. cu_seqlens: [tensor], or [] if not packed."""
    cu_seqlens = [x.to(device) for x in cu_seqlens]
    with autocast(device, dtype):
        logits, _ = model(tokens.to(device), targets.to(device), *cu_seqlens)
    return logits.cpu()


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
    return merge_counts(list(filter(None, world.gather_in_order(counts))))


# ---- counts --------------------------------------------------------------------------------------


def merge_batches(batches):
    """Batches of `iter_predictions` -> what `merge_counts` returns."""
    return merge_counts([count_batch(batch) for batch in batches])


def count_batch(batch):
    """A batch of `iter_predictions` -> numbers that add up: {"all", "by_slice"}.

    "all": `cluster_sums` of all labels, and their summed loss. "by_slice": {slice: {value: such
    numbers of the labels with this value}}.
    """
    correct, loss, example = batch["correct"], batch["loss"], batch["example"]

    def count(mask):
        total_loss = float(loss[mask].sum(dtype=np.float64))
        return {**cluster_counts(correct[mask], example[mask]), "loss": total_loss}

    total = count(np.ones(len(correct), bool))
    # Exact match is that of the model's own method, which may look at more than labels.
    total["exact_matches"] = int(batch["exact_match"].sum())
    total["n_examples"] = len(batch["exact_match"])
    by_slice = {}
    for name, values in batch["slices"].items():
        known = np.unique(values[values == values])  # NaN stands for no value
        by_slice[name] = {value.item(): count(values == value) for value in known}
    return {"all": total, "by_slice": by_slice}


def merge_counts(counts):
    """`count_batch` of all batches -> accuracies, mean loss, "all" and "by_slice" added up.

    In a slice an example is correct if its labels in that slice are.
    """
    total, by_slice = {}, {}
    for batch in counts:
        add_counts(total, batch["all"])
        for name, slices in batch["by_slice"].items():
            merged = by_slice.setdefault(name, {})
            for value, of_value in slices.items():
                add_counts(merged.setdefault(value, {}), of_value)
    return {
        "accuracy": total["correct"] / total["labels"],
        "exact_match": total["exact_matches"] / total["n_examples"],
        "loss": total["loss"] / total["labels"],
        "labels": total["labels"],
        "n_examples": total["n_examples"],
        "all": total,
        "by_slice": {name: dict(sorted(slices.items())) for name, slices in by_slice.items()},
    }


def add_counts(total, counts):
    """Add the numbers in counts to those in total."""
    for name, number in counts.items():
        total[name] = total.get(name, 0) + number


# ---- slices --------------------------------------------------------------------------------------


def slice_metrics(counts):
    """Counts of a slice -> label accuracy, exact match as "exact", and "nll" in nats per label."""
    exact = proportion(counts["exact_matches"], counts["n_examples"])
    return {**label_accuracy(counts), "exact": exact, "nll": counts["loss"] / counts["labels"]}


def slice_counts(result, name):
    """Counts of the slice "name=value" from what `merge_counts` returned."""
    slice_name, _, value = name.partition("=")
    return next(c for v, c in result["by_slice"][slice_name].items() if str(v) == value)


def slice_accuracy(result, name):
    """Token accuracy from what `merge_counts` returned: of the slice "name=value"; "": of all."""
    if not name:
        return result["accuracy"]
    counts = slice_counts(result, name)
    return counts["correct"] / counts["labels"]


def check_slice(data, name, batch_size):
    """ConfigError unless the slice "name=value" occurs in validation and in test."""
    slice_name, _, value = name.partition("=")
    for split in ("val", "test"):
        known = {}
        for indices in eval_batches(data, split, batch_size):
            _, _, slices, *_ = data.batch(split, 0, indices)
            for other, values in slices.items():
                known.setdefault(other, set()).update(map(str, np.unique(values)))
        choices = []
        for other, values in known.items():
            choices += [f"{other}={v}" for v in sorted(values)[:12]]
        message = f"target_slice={name} is not among the slices of {split}: {' '.join(choices)}"
        require(value in known.get(slice_name, ()), message, "target_slice")


# ---- tables --------------------------------------------------------------------------------------


def print_table(head, rows):
    """Print aligned columns: the first to the left, others to the right."""
    table = []
    for row in [head, *rows]:
        table.append([printable(cell) for cell in row])
    widths = [max(map(len, column)) for column in zip(*table)]
    for first, *others in table:
        line = [first.ljust(widths[0])]
        for text, width in zip(others, widths[1:]):
            line.append(text.rjust(width))
        print("  ".join(line))


def print_slices(result, max_values=24):
    """Print what `merge_counts` returned: accuracy, exact match and loss, in total and by slice.

    Slices with more than max_values values are left out; eval.py writes them to its files.
    """
    lines = [slice_line("all", "", result["all"])]
    for name, slices in result["by_slice"].items():
        if len(slices) <= max_values:
            for value, counts in slices.items():
                lines.append(slice_line(name, value, counts))
    head = ("slice", "value", "labels", "accuracy", "95% interval")
    print_table((*head, "examples", "exact", "95% interval", "nats per label"), lines)


def slice_line(name, value, counts):
    metrics = slice_metrics(counts)
    exact = format_ci(metrics["exact"])
    return (name, value, *format_ci(metrics), *exact, f"{metrics['nll']:.4f}")


def print_baselines(baselines):
    """Print the accuracy of guesses without knowledge: {name: value}."""
    for name, value in baselines.items():
        say(f"without knowledge: {name}: {value:.4f}")
