"""Data sets of facts, as data_synth.py makes them in memory, writes them and reads them back.

A row on disk is {"text": ..., slices}. A document with k exposures is in train/ k times.
"""

import os
import time
from dataclasses import asdict, dataclass

import numpy as np

from nanorecall.checkpoint import atomic_directory, check_kinds, write_json
from nanorecall.metrics import print_baselines
from nanorecall.rng import STREAMS, rng_for, shuffled_epochs
from nanorecall.settings import RunError, require, say
from nanorecall.shards import (
    SHARDS,
    SPLIT_DIRS,
    n_bytes,
    read_metadata,
    read_rows,
    verified_path,
    write_splits,
)
from nanorecall.text import MASKS, check_label_mask, read_tokenizer


class FactDataset:
    """A fixed list of documents, the splits that each is in, and their slices.

    kind: the label mask, a key of text.MASKS. texts: n documents. splits: {"train", "val", "test"}
    of numbers of documents, those of training as often as in an epoch. slices: {name: (n,)}; the
    first names the groups that val and test are to have equally many of.
    baselines: {name: accuracy of a guess without knowledge}.
    capacity, where answers can only be memorised: {"slice": "name=value" of the trained facts,
    "facts": their number, "bits": entropy of a digit}.
    """

    def __init__(self, c, kind, texts, splits, slices, baselines=None, capacity=None):
        self.config, self.kind, self.texts = c, kind, texts
        self.baselines = baselines or {}
        self.capacity = capacity or {}
        self.slices = {name: np.asarray(values) for name, values in slices.items()}
        for name, values in self.slices.items():
            valid = values.shape == (len(texts),) and values.dtype.kind in "biufU"
            message = f"path={c.path}: the tag {name!r} is no number or text in each row"
            require(valid, message, "path")
        self.splits = {"train": np.asarray(splits["train"], np.int32)}
        # A random order, the same for all splits, so that a part of a split is a fair sample.
        order = rng_for(c.seed, STREAMS["subset"]).permutation(len(texts))
        for split, n in (("val", c.n_val_examples), ("test", c.n_test_examples)):
            numbers = splits[split][np.argsort(order[splits[split]])]
            self.splits[split] = np.asarray(self.subset(numbers, n), np.int32)

    def subset(self, numbers, n):
        """At most n of the documents `numbers`, 0: all; of each group alike, so that none crowds
        out another."""
        if not n or not len(numbers) or not self.slices:
            return numbers[: n or None]
        group = next(iter(self.slices.values()))[numbers]
        groups = np.unique(group)
        size = n if self.config.task == "hashhop" else max(1, n // len(groups))
        return np.concatenate([numbers[group == g][:size] for g in groups])

    def count(self, split):
        return len(self.splits[split])

    def eval_groups(self, split):
        return [range(self.count(split))]

    def read(self, split, indices):
        """-> texts of the indices (R,) of a split, slices {name: (R,)}."""
        numbers = self.splits[split]
        indices = np.asarray(indices, np.int64)
        if split == "train":
            key = (self.config.seed, STREAMS["epoch"])
            indices = shuffled_epochs(indices, len(numbers), *key)
        numbers = numbers[indices]
        slices = {name: values[numbers] for name, values in self.slices.items()}
        return [self.texts[i] for i in numbers], slices


def guess_baselines(train, test):
    """Accuracy per digit of guesses without knowledge on `test`; both [(key, value)] of one width.

    The guesses are the most frequent digit of each position among the training values, and the
    key itself.
    """
    if not train or not test:
        return {}
    width = min(len(value) for _, value in train + test)
    trained_values = np.array([list(value[:width]) for _, value in train])
    keys = np.array([list(key[:width]) for key, _ in test])
    values = np.array([list(value[:width]) for _, value in test])
    majority = [mode(column) for column in trained_values.T]
    return {
        "majority digit": float((values == majority).mean()),
        "copy the key": float((values == keys).mean()),
    }


def mode(column):
    """The most frequent value; of several, the first in order."""
    values, counts = np.unique(column, return_counts=True)
    return values[counts.argmax()]


# ---- on disk -------------------------------------------------------------------------------------

METADATA = {
    "mask": "text",
    "chance": {"*": "share"},
    "knowledge": "dict",
    "files": SHARDS,
}
CAPACITY = {"slice": "text", "facts": "size", "bits": "number"}
# Settings that say nothing about the documents.
NOT_STORED = ("output_dir", "path", "packing", "tokenizer", "heldout_facts")


def write_facts(c, source, shard_rows=200_000):
    """Write the first epoch of `source` (FactDataset or HashHop), shuffled, as train/, and
    validation/, test/ and metadata.json. -> the metadata."""

    def read_columns(split, indices):
        texts, slices = source.read(split, indices)
        return {"text": texts, **{name: values.tolist() for name, values in slices.items()}}

    n_rows = {split: source.count(split) for split in SPLIT_DIRS}
    with atomic_directory(c.output_dir) as work:
        files = write_splits(work, n_rows, read_columns, c.format, shard_rows, chunk_rows=10_000)
        metadata = {
            "dataset_type": c.task,
            "format_version": 1,
            **{name: value for name, value in asdict(c).items() if name not in NOT_STORED},
            "mask": source.kind,
            "chance": source.baselines,
            "knowledge": getattr(source, "capacity", {}),
            "files": files,
        }
        write_json(os.path.join(work, "metadata.json"), metadata)
    return metadata


def write_and_report(c, source):
    """Write a data set; print its size and what guesses without knowledge reach."""
    start = time.perf_counter()
    metadata = write_facts(c, source)
    seconds = time.perf_counter() - start
    rows = {}
    for directory, shards in metadata["files"].items():
        rows[directory] = sum(shard["rows"] for shard in shards)
    say(f"{c.output_dir}: {rows} rows, {n_bytes(metadata) / 1e6:.1f} MB, {seconds:.1f} s")
    print_baselines(metadata["chance"])


def read_facts(c, tasks):
    """The directory c.path, which write_facts wrote -> FactDataset. tasks: their names."""
    metadata, file = read_fact_metadata(c, tasks)
    number_of = {}  # text -> its number; its slices are the same in every split
    slices, splits, columns = {}, {}, None
    for split, directory in SPLIT_DIRS.items():
        numbers = []
        for shard in metadata["files"][directory]:
            n_rows = 0
            for row, where in read_rows(verified_path(c.path, shard)):
                n_rows += 1
                text = row.pop("text", None)
                require(isinstance(text, str), f'{where}: "text" is no text', "path")
                columns = columns or set(row)
                message = f"{where}: its tags are not those of the rows before"
                require(set(row) == columns, message, "path")
                if text not in number_of:
                    number_of[text] = len(number_of)
                    for name, value in row.items():
                        slices.setdefault(name, []).append(value)
                numbers.append(number_of[text])
            message = (
                f"{file} says that {shard['name']} has {shard['rows']} rows; it has {n_rows}: "
                "write the data set again"
            )
            require(n_rows == shard["rows"], message, "path")
        splits[split] = np.array(numbers, np.int32)
    capacity = metadata["knowledge"]
    if capacity:
        name = capacity["slice"].split("=")[0]
        require(name in slices, f"{file}: there is no tag {name!r}", "path")
    texts = list(number_of)
    return FactDataset(c, metadata["mask"], texts, splits, slices, metadata["chance"], capacity)


def read_fact_metadata(c, tasks):
    """-> checked metadata, its path."""
    write = f"`python data_synth.py {c.task} --output_dir DIR` makes one"
    hint = f"{write}; documents of your own need --task text"
    metadata, file = read_metadata(c.path, hint)
    kind = metadata["dataset_type"]
    known = kind in tasks and metadata["format_version"] == 1
    require(known, f"{c.path} holds a data set of {kind!r}, not of data_synth.py", "path")
    require(kind == c.task, f"{c.path} holds task {kind}; say --task {kind}", "task")
    check_kinds(metadata, METADATA, file)
    capacity = metadata["knowledge"]
    if capacity:
        check_kinds(capacity, CAPACITY, f"{file}: 'knowledge'")
        message = f"{file}: {capacity['slice']!r} is no slice tag=value"
        require(capacity["slice"].count("=") == 1, message, "path")
    mask = metadata["mask"]
    require(mask in MASKS, f"{file}: mask={mask!r} is not one of {', '.join(MASKS)}", "path")
    return metadata, file


# ---- check a tokenizer ---------------------------------------------------------------------------


@dataclass
class CheckConfig:
    tokenizer: str = ""  # a tokenizer.json; empty: bytes


CHECK_CASES = {  # kind of mask: settings whose documents are tried
    "digits": [dict(task="digits"), dict(task="twohop", markers=False)],
    "qa": [dict(task="qa")],
    "twohop": [
        dict(task="twohop"),
        dict(task="twohop", relations=4),
        dict(task="twohop", relations=4, cot=1),
    ],
    "hashhop": [
        dict(task="hashhop", hops=(1, 2, 3), cot=0.5),
        dict(task="hashhop", hash_len=16, block_size=512),
    ],
}


def check_tokenizer(path, config_class, tasks):
    """Print whether each label mask is exact with the tokenizer; RunError if one is not.

    config_class, tasks: data_synth.Config and TASKS, which make the documents to try.
    """
    tokenizer = read_tokenizer(path)
    inexact = []
    for kind, cases in CHECK_CASES.items():
        texts = []
        for case in cases:
            source = tasks[case["task"]].build(config_class(**case))
            texts += source.read("train", range(300))[0]
        if kind == "qa":
            texts += [f"What is the value of {text[:6]}?{text[7:13]}" for text in texts]
        problem = check_label_mask(tokenizer, kind, texts)
        say(f"{tokenizer.name}: {kind}: {problem or 'exact'}")
        if problem:
            inexact.append(kind)
    if inexact:
        masks = f"masks of {', '.join(inexact)} would not be exact with {tokenizer.name}"
        raise RunError(f"{masks}; use another, or bytes")
    return 0
