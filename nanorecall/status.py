"""status.json: how a run ended, and the results of testing its best weights."""

import contextlib
import math
import os

from nanorecall.checkpoint import first_valid_checkpoint, read_checkpoint
from nanorecall.metrics import slice_accuracy, slice_counts, slice_metrics
from nanorecall.records import read_record
from nanorecall.settings import ConfigError

SLICE_COUNTS = {  # see metrics.merge_counts
    "correct": "count",
    "labels": "size",
    "exact_matches": "count",
    "n_examples": "size",
    "correct_correct": "count",
    "correct_labels": "count",
    "labels_labels": "count",
    "loss": "number",
}

TESTED_STATUS = {  # status.json of a run that was tested
    "status": "text",
    "step": "count",
    "seconds": "number",
    "target_accuracy": "number",
    "test": {
        "accuracy": "share",
        "labels": "size",
        "exact_match": "share",
        "n_examples": "size",
        "all": SLICE_COUNTS,
        "by_slice": {"*": {"*": SLICE_COUNTS}},
    },
}


def read_ended_status(folder, state, c, last_step):
    """status.json of a run that has nothing left to do, else None. state: of its checkpoint."""
    status = {}
    # If it is missing (killed before) or damaged, the run is tested again.
    with contextlib.suppress(ConfigError):
        status = read_record(os.path.join(folder, "status.json"), TESTED_STATUS)
    was_tested = status.get("status") in ("finished", "below target")
    same_target = was_tested and status["target_accuracy"] == c.target_accuracy
    if not same_target or status["step"] != state["step"]:
        return None
    is_accurate = c.stop_accuracy and state["best"] >= c.stop_accuracy
    return status if state["step"] >= last_step or is_accurate else None


def tested_weights(folder, step):
    """Which weights to test: {"weights": "best" or "last", "step": theirs, "why" if last}.

    step: the last one of the run.
    """
    try:
        name = first_valid_checkpoint(folder, "best", holds_lock=True)
    except ConfigError:
        return {"weights": "last", "step": step, "why": "best.pt is missing or damaged"}
    return {"weights": name, "step": read_checkpoint(folder, name)["step"]}


def describe_test(test, tested, c):
    """What status.json says of the test. test: what evaluate returned, None if cut short."""
    if test is None:
        return {"status": "preempted"}
    about = {"tested": tested, "target_accuracy": c.target_accuracy, "test": test}
    if not math.isfinite(test["loss"]):
        return {"status": "failed", **about}
    is_reached = slice_accuracy(test, c.target_slice) >= c.target_accuracy
    return {"status": "finished" if is_reached else "below target", **about}


def summarize_test(test, target_slice):
    """The result of a test in one line, the target slice first."""
    by_label = f"{test['accuracy']:.4f} of {test['labels']} labels"
    by_example = f"{test['exact_match']:.4f} of {test['n_examples']} examples"
    summary = f"test accuracy {by_label}, exact match {by_example}"
    if not target_slice:
        return summary
    n = slice_counts(test, target_slice)["labels"]
    accuracy = slice_accuracy(test, target_slice)
    return f"{target_slice}: accuracy {accuracy:.4f} of {n} labels; {summary}"


def accuracy_table(test):
    """Rows {"slice", "value", "accuracy", "ci95", "n", ...}: all labels, then each slice."""
    rows = [{"slice": "all", "value": "", **table_row(test["all"])}]
    for name, values in test["by_slice"].items():
        for value, counts in values.items():
            rows.append({"slice": name, "value": str(value), **table_row(counts)})
    return rows


def table_row(counts):
    """Counts of a slice -> {"accuracy", "ci95", "n", ...}."""
    metrics = slice_metrics(counts)
    return {"accuracy": metrics.pop("value"), **metrics}
