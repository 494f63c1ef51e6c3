"""A user's data file is tried on a few sequences of each split before a run trains on it.

Training would end in an error of torch, or only at its first evaluation.

Letters: B sequences, T tokens, N labelled positions.
"""

import contextlib
import itertools

import numpy as np
import torch

from nanorecall.metrics import eval_batches
from nanorecall.model_checks import describe_output, users_errors
from nanorecall.rng import IGNORE_INDEX
from nanorecall.settings import require
from nanorecall.source_files import is_users_file

CONTRACT = "see class Data of data_mqar.py for what a data file must have"
SPLITS = ("train", "val", "test")
N_SEQUENCES = 8  # looked at together
MOST_SEQUENCES = 1000  # of a split, until one has a label


@contextlib.contextmanager
def named_data_errors(settings):
    """An error of a user's data file in the block becomes a ConfigError of file and line."""
    name = settings.train.data
    with users_errors(settings.data_module, settings.files, name, CONTRACT, "data"):
        yield


def check_users_data(data, settings):
    """ConfigError unless a user's Data has sequences, labels and slices in each split."""
    if not is_users_file(settings.data_module, settings.files):
        return
    file, batch_size = settings.data_module.__file__, settings.train.batch_size
    with named_data_errors(settings):
        problem = sizes_problem(data, batch_size)
        for split in SPLITS:
            problem = problem or split_problem(data, split, batch_size)
    require(not problem, f"{file}: {problem}; {CONTRACT}", "data")


def sizes_problem(data, batch_size):
    """What is wrong with the numbers of a data set, as a sentence; "" if nothing."""
    numbers = {
        "vocab_size": data.vocab_size,
        "seq_len": data.seq_len,
        f"steps_per_epoch({batch_size})": data.steps_per_epoch(batch_size),
    }
    for name, value in numbers.items():
        if not isinstance(value, (int, np.integer)) or value < 1:
            return f"{name} is {value!r}, not a whole number of at least 1"
    return ""


def split_problem(data, split, batch_size):
    """What is wrong with the first sequences of a split, as a sentence; "" if nothing."""
    n_seen = 0
    for step, indices in first_batches(data, split, batch_size):
        batch = data.batch(split, step, indices)
        problem = batch_problem(data, split, *batch)
        if problem or (batch[1] != IGNORE_INDEX).any():
            return problem
        n_seen += len(indices)
    if n_seen == 0:
        return f"{split} has no sequences"
    return f"the first {n_seen} sequences of {split} have no labels: all targets are {IGNORE_INDEX}"


def first_batches(data, split, batch_size):
    """Yield steps and indices of a few sequences of a split, about MOST_SEQUENCES in all."""
    most = MOST_SEQUENCES // N_SEQUENCES
    if split == "train":
        batches = training_batches(data, batch_size)
    else:
        batches = ((0, indices) for indices in eval_batches(data, split, N_SEQUENCES))
    yield from itertools.islice(batches, most)


def training_batches(data, batch_size):
    """Yield steps and indices of N_SEQUENCES at a time, of the first epoch."""
    for step in range(data.steps_per_epoch(batch_size)):
        indices = data.batch_indices(step, batch_size)
        for first in range(0, len(indices), N_SEQUENCES):
            yield step, indices[first : first + N_SEQUENCES]


def batch_problem(data, split, tokens, targets, slices, cu_seqlens=None):
    """What is wrong with a batch of a split, as a sentence; "" if nothing."""
    for name, value in {"tokens": tokens, "targets": targets}.items():
        if not torch.is_tensor(value) or value.ndim != 2 or value.dtype != torch.long:
            return f"{name} of {split} are {describe_output(value)}, not (B, T) of torch.int64"
    if tokens.shape != targets.shape:
        return f"tokens of {split} are {tuple(tokens.shape)}, targets {tuple(targets.shape)}"
    # A packed sequence holds several documents, each of which has positions of its own.
    longest = tokens.shape[1] if cu_seqlens is None else int(cu_seqlens.diff().max())
    if longest > data.seq_len:
        return f"{split} has a sequence of {longest} tokens; seq_len is {data.seq_len}"
    labels = targets[targets != IGNORE_INDEX]
    for name, ids in {"tokens": tokens, "labels": labels}.items():
        if ids.numel() == 0:
            continue
        if ids.min() < 0 or ids.max() >= data.vocab_size:
            found = f"{name} of {split} are {ids.min()} to {ids.max()}"
            return f"{found}; with this vocab_size, 0 to {data.vocab_size - 1}"
    if split == "train":
        return ""
    for name, values in slices.items():
        if len(values) != len(labels):
            return f"slice {name!r} of {split} has {len(values)} values for {len(labels)} labels"
    return ""
