"""The run directory of an edited model: it holds what every run holds, and its edits.

config.json lists the edits, the latest last. edit_<number>.pt holds the rows of weights that the
edit changed, before and after, so that it can be taken back to the last bit.
"""

import os
import shutil

import torch

from nanorecall.checkpoint import load_checkpoint, save_checkpoint
from nanorecall.documents import validate_text
from nanorecall.files import atomic_directory, only_writer, remove
from nanorecall.metrics import evaluate
from nanorecall.records import check_kinds, read_record, write_json
from nanorecall.settings import ConfigError, require
from nanorecall.tensors import select_prefix
from nanorecall.training_checkpoint import training_state

EDIT = {  # of config.json's "edits"
    "run": "text",
    "checkpoint": "text",
    "step": "count",
    "editor": "text",
    "facts": [{"question": "text", "answer": "text"}],
}
CHECKPOINTS = ("best", "ckpt")  # both hold the edited weights

# ---- what an edit changed ------------------------------------------------------------------------


def changed_rows(before, after):
    """{name: tensor} of a model before and after an edit -> the rows that differ, as tensors.

    "rows.<name>" (n,) numbers of rows, "before.<name>" and "after.<name>" (n, ...).
    """
    changes = {}
    for name, old in before.items():
        old, new = as_rows(old), as_rows(after[name])
        rows = (as_bytes(old) != as_bytes(new)).any(1).nonzero()[:, 0]
        if len(rows):
            changes |= {f"rows.{name}": rows}
            changes |= {f"before.{name}": old[rows], f"after.{name}": new[rows]}
    return changes


def restore_rows(weights, changes):
    """Weights {name: tensor} with the rows before an edit, whose changed_rows these are.

    Rows that are as before already stay. ConfigError if others are not as the edit left them.
    """
    restored = dict(weights)
    for name in {key.partition(".")[2]: None for key in changes}:
        message = f"{name} is not as the edit left it; nothing was changed"
        parts = [changes.get(f"{kind}.{name}") for kind in ("rows", "before", "after")]
        require(name in weights and all(torch.is_tensor(part) for part in parts), message, None)
        rows, before, after = parts
        table = as_rows(weights[name]).clone()
        require(are_row_numbers(rows, len(table)), message, None)
        found = table[rows]
        require(before.shape == found.shape and before.dtype == found.dtype, message, None)
        if not same_bits(found, before):
            require(same_bits(found, after), message, None)
            table[rows] = before
        restored[name] = table.reshape(weights[name].shape)
    return restored


def are_row_numbers(rows, n):
    """Are these numbers of rows of a table of n rows, each at most once?"""
    if rows.dtype != torch.int64 or rows.ndim != 1 or len(rows) == 0:
        return False
    return bool(rows.min() >= 0 and rows.max() < n and len(rows.unique()) == len(rows))


def as_rows(tensor):
    """A tensor as a matrix; a vector is one row."""
    return torch.atleast_2d(tensor.detach()).flatten(1)


def as_bytes(matrix):
    # Bytes, because nan differs from itself.
    return matrix.contiguous().view(torch.uint8)


def same_bits(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(as_bytes(a), as_bytes(b))


# ---- the directory -------------------------------------------------------------------------------


def recorded_edits(folder):
    """The edits of a run, the first one first; [] if it was only trained."""
    path = os.path.join(folder, "config.json")
    edits = read_record(path, "dict").get("edits", [])
    check_kinds(edits, [EDIT], f"{path}: 'edits'")
    for edit in edits:
        for fact in edit["facts"]:
            for name in ("question", "answer"):
                validate_text(fact[name], f"{path}: 'edits': {name!r}")
    return edits


def new_folder(run, name):
    """The path of a new run directory beside the run. ConfigError if it exists."""
    path = os.path.join(os.path.dirname(os.path.normpath(run.folder)), name)
    require(not os.path.exists(path), f"{path} exists; give another --save_as", "save_as")
    return path


def save_edited_run(run, folder, before, edit):
    """Write the run's model, edited, as a new run directory, complete or not at all.

    before: {name: tensor} of the model before the edit. edit: a dict as EDIT has it.
    """
    edits = [*recorded_edits(run.folder), edit]
    state = load_checkpoint(run.folder, *run_checkpoints(run))
    state.pop("shards", None)
    state |= {"step": run.step, "tensors": weights_of(run.model)}
    changes = changed_rows(before, run.model.state_dict())
    changes = {name: t.cpu() for name, t in changes.items()}
    config = read_record(os.path.join(run.folder, "config.json"), {"train": "dict"})
    config["train"]["run_name"] = os.path.basename(folder)
    # Otherwise a restart by torchrun would take this run for the one that it restarts.
    config |= {"launch": "", "edits": edits}
    status = edited_status(run, state)
    with atomic_directory(folder) as work:
        for name in CHECKPOINTS:
            save_checkpoint(work, name, state)
        files = [f"edit_{number}.pt" for number in range(1, len(edits))]
        for file in ("log.jsonl", *files):
            if os.path.exists(os.path.join(run.folder, file)):
                shutil.copy(os.path.join(run.folder, file), work)
        save_checkpoint(work, f"edit_{len(edits)}", {"step": run.step, "tensors": changes})
        write_json(os.path.join(work, "config.json"), config)
        write_json(os.path.join(work, "status.json"), status)


def run_checkpoints(run):
    return ("best",) if run.config.checkpoint == "best" else ("ckpt", "ckpt_prev")


def weights_of(model):
    """{"model.<name>": tensor} for a checkpoint"""
    return {name: t.cpu() for name, t in training_state(model).items()}


def edited_status(run, state):
    """status.json: the test of the model as it is now, on the data that it was trained on."""
    size = run.config.eval_batch_size
    test = evaluate(run.model, run.data, "test", size, run.device, run.dtype)
    status = {"status": "edited", "step": state["step"], "seconds": state.get("seconds", 0.0)}
    return status | {"test": test}


def undo_latest_edit(run):
    """Restore the weights before the latest edit, in the run's directory and its model -> the edit.

    ConfigError, and nothing is written, if the weights are not as that edit left them. A call that
    was killed is completed by the next one.
    """
    folder = run.folder
    config_path = os.path.join(folder, "config.json")
    edits = recorded_edits(folder)
    require(edits, f"{folder} has no edit to take back", None)
    file = f"edit_{len(edits)}"
    with only_writer(folder, "its weights"):
        changes = load_checkpoint(folder, file)["tensors"]
        states = {name: state_before_edit(folder, name, changes) for name in CHECKPOINTS}
        latest = states["ckpt"]
        run.model.load_state_dict(select_prefix(latest["tensors"], "model"))
        status = edited_status(run, latest)
        # A killed undo leaves some of these files as they were. The next one finds them in the
        # state before or after the edit, and completes them: config.json, which counts, is last.
        for name, state in states.items():
            save_checkpoint(folder, name, state, keep_old=False)
        write_json(os.path.join(folder, "status.json"), status)
        write_json(config_path, read_record(config_path, "dict") | {"edits": edits[:-1]})
        remove(os.path.join(folder, file + ".pt"))
    return edits[-1]


def state_before_edit(folder, name, changes):
    """A checkpoint of an edited run, with the weights that it had before the edit."""
    state = load_checkpoint(folder, name)
    try:
        weights = restore_rows(select_prefix(state["tensors"], "model"), changes)
    except ConfigError as e:
        raise ConfigError(f"{folder}: {name}.pt: {e}") from None
    return state | {"tensors": {f"model.{key}": t for key, t in weights.items()}}
