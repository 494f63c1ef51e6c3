"""Small data sets of data_synth.py, and ways to read them, for several test files."""

import json

import numpy as np
import torch

import data_synth
from nanorecall.rng import IGNORE_INDEX

SPLITS = ("train", "val", "test")
SMALL = {
    "qa": dict(num_pairs=16, buckets=(1, 2, 4, 8)),
    "digits": dict(num_pairs=40, num_unseen=10),
    "twohop": dict(num_entities=30),
    "hashhop": dict(
        max_bytes=120,
        hash_len=3,
        hops=(1, 2),
        test_hops=(1, 2),
        n_val_examples=6,
        n_test_examples=8,
    ),
}
WHOLE_SPLITS = dict(n_val_examples=0, n_test_examples=0)


def small_data(task, **changes):
    """The Data of a task at toy size."""
    return data_synth.Data(data_synth.Config(task=task, **{**SMALL[task], **changes}))


def own_data(path, **settings):
    """The Data of documents in a file or directory."""
    return data_synth.Data(data_synth.Config(task="text", path=str(path), **settings))


def documents(data, split, indices=None):
    """The documents of a split, all or those of some indices."""
    if indices is None:
        indices = range(data.source.count(split))
    return data.source.read(split, np.asarray(indices))[0]


def counts(data):
    """How many documents train, val and test have."""
    return [data.source.count(split) for split in SPLITS]


def scored_texts(data, split, indices):
    """What is scored of each example, as text."""
    found = []
    for index in indices:
        tokens, targets, *_ = data.batch(split, 0, [index])
        position = np.flatnonzero(targets[0].numpy() != IGNORE_INDEX)
        assert torch.equal(tokens[0][position + 1], targets[0][position])  # the next token
        found.append(data.tokenizer.decode(targets[0][position]))
    return found


def write_jsonl(path, rows):
    """Write one line for each row -> the path, as text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
