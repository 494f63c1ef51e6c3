"""Data sets of facts, as data_synth.py makes them in memory, writes them and reads them back.

A row on disk is {"text": ..., slices}. A document with k exposures is in train/ k times.

Letters: n documents or facts, R indices of a read, W letters of a word.
"""

import os
import time
from dataclasses import asdict, dataclass

import numpy as np

from nanorecall.dataset_files import (
    SHARDS,
    SPLIT_DIRS,
    n_bytes,
    read_metadata,
    read_rows,
    verified_path,
    write_splits,
)
from nanorecall.files import atomic_directory
from nanorecall.metrics import print_baselines
from nanorecall.records import check_kinds, write_json
from nanorecall.rng import STREAMS, rng_for, shuffled_epochs
from nanorecall.settings import (
    RunError,
    Setting,
    build_config,
    print_help,
    read_argv,
    reject_args,
    reject_unknown,
    require,
    say,
    wants_help,
)
from nanorecall.text import MASKS, check_label_mask, read_tokenizer

MAX_SLICE_VALUE = 200  # letters


class FactDataset:
    """A fixed list of documents, the splits that each is in, and their slices.

    kind: the label mask, a key of text.MASKS. texts: n documents. splits: {"train", "val", "test"}
    of numbers of documents, those of training as often as in an epoch. slices: {name: (n,)}; the
    first names the groups of which val and test get equally many.
    baselines: {name: accuracy of a guess without knowledge}.
    capacity, where answers can only be memorised: {"slice": "name=value" of the trained facts,
    "facts": their number, "bits": entropy of a digit}. origins: "file:line" of each document.
    """

    def __init__(self, c, kind, texts, splits, slices, baselines=None, capacity=None, origins=None):
        self.config, self.kind, self.texts, self.origins = c, kind, texts, origins
        self.baselines = baselines or {}
        self.capacity = capacity or {}
        self.slices = {name: np.asarray(values) for name, values in slices.items()}
        for name, values in self.slices.items():
            valid = values.shape == (len(texts),) and values.dtype.kind in "biufU"
            message = f"path={c.path}: the slice {name!r} needs a number or a text in each row"
            require(valid, message, "path")
            finite = values.dtype.kind != "f" or np.isfinite(values).all()
            message = f"path={c.path}: the slice {name!r} has numbers that are not finite"
            require(finite, message, "path")
        # Before n_val_examples and n_test_examples.
        self.sizes = {split: len(numbers) for split, numbers in splits.items()}
        self.splits = {"train": np.asarray(splits["train"], np.int32)}
        # A random order, the same for all splits, so that a part of a split is a fair sample.
        order = rng_for(c.seed, STREAMS["subset"]).permutation(len(texts))
        for split, n in (("val", c.n_val_examples), ("test", c.n_test_examples)):
            numbers = splits[split][np.argsort(order[splits[split]])]
            self.splits[split] = np.asarray(self.subset(numbers, n), np.int32)

    def subset(self, numbers, n):
        """At most n of the documents `numbers`; 0: all.

        Equally many of each group, so that a large group does not crowd out a small one.
        """
        if n == 0:
            return numbers
        if not len(numbers) or not self.slices:
            return numbers[:n]
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


class GeneratedDataset:
    """Documents that are generated when they are read, with the methods of FactDataset.

    make_example(c, split, index, group) -> text, slices {name: value}. Val and test have n_groups
    groups of n_val_examples or n_test_examples each (0: 500); in training `group` is None.
    """

    capacity = {}  # nothing to store: no document comes twice

    def __init__(self, c, kind, make_example, n_groups, baselines):
        self.config, self.kind, self.baselines = c, kind, baselines
        self.make_example, self.n_groups = make_example, n_groups

    def group_size(self, split):
        c = self.config
        return (c.n_val_examples if split == "val" else c.n_test_examples) or 500

    def count(self, split):
        if split == "train":
            return self.config.n_train_examples
        return self.n_groups * self.group_size(split)

    def eval_groups(self, split):
        n = self.group_size(split)
        return [range(i * n, (i + 1) * n) for i in range(self.n_groups)]

    def read(self, split, indices):
        """-> texts of the indices (R,) of a split, slices {name: (R,)}."""
        texts, columns = [], {}
        for index in np.asarray(indices).tolist():
            group = None if split == "train" else index // self.group_size(split)
            text, slices = self.make_example(self.config, split, index, group)
            texts.append(text)
            for name, value in slices.items():
                columns.setdefault(name, []).append(value)
        return texts, {name: np.array(values) for name, values in columns.items()}


def guess_baselines(keys, values, trained):
    """{guess: accuracy per digit}, of guesses without knowledge.

    keys, values: n words each, all of one width. trained (n,) bool: the facts that are trained on.
    The guesses are the most frequent digit of each position among the trained values, and the key
    itself; they are measured on the other facts.
    """
    if trained.all() or not trained.any():
        return {}
    keys, values = letters_of(keys), letters_of(values)
    majority = np.array([mode(column) for column in values[trained].T])
    asked = ~trained
    return {
        "majority digit": float((values[asked] == majority).mean()),
        "copy the key": float((values[asked] == keys[asked]).mean()),
    }


def letters_of(words):
    """n words of one width -> (n, W)"""
    return np.array(words).view("U1").reshape(len(words), -1)


def mode(column):
    """The most frequent value; of several, the first in order."""
    values, counts = np.unique(column, return_counts=True)
    return values[counts.argmax()]


# ---- writing -------------------------------------------------------------------------------------

# Settings that say nothing about the documents.
NOT_STORED = ("output_dir", "path", "pack_documents", "tokenizer", "heldout_facts")


def write_facts(c, source, shard_rows=200_000):
    """Write train/, validation/, test/ and metadata.json of a source -> the metadata.

    source: a FactDataset or GeneratedDataset. train/ is its first epoch, shuffled.
    """

    def read_columns(split, indices):
        texts, slices = source.read(split, indices)
        columns = {"text": texts}
        for name, values in slices.items():
            columns[name] = values.tolist()
        return columns

    n_rows = {split: source.count(split) for split in SPLIT_DIRS}
    metadata = {"dataset_type": c.task, "format_version": 1}
    for name, value in asdict(c).items():
        if name not in NOT_STORED:
            metadata[name] = value
    metadata["label_mask"] = source.kind
    metadata["baselines"] = source.baselines
    metadata["capacity"] = source.capacity
    with atomic_directory(c.output_dir) as work:
        files = write_splits(work, n_rows, read_columns, c.format, shard_rows, chunk_rows=10_000)
        metadata["files"] = files
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
    print_baselines(metadata["baselines"])


# ---- reading -------------------------------------------------------------------------------------

METADATA = {
    "label_mask": "text",
    "baselines": {"*": "share"},
    "capacity": "dict",
    "files": SHARDS,
}
CAPACITY = {"slice": "text", "facts": "size", "bits": "number"}


def read_facts(c, tasks):
    """The directory c.path, which write_facts wrote -> FactDataset. tasks: their names."""
    metadata, file = read_fact_metadata(c, tasks)
    number_of = {}  # text -> its number; its slices are the same in every split
    slices, splits, names = {}, {}, None
    for split, directory in SPLIT_DIRS.items():
        numbers = []
        for shard in metadata["files"][directory]:
            n_before = len(numbers)
            for row, where in read_rows(verified_path(c.path, shard)):
                text = row.pop("text", None)
                require(isinstance(text, str), f'{where}: "text" must be a text', "path")
                names = set(row) if names is None else names
                message = f"{where}: its slices are not those of the rows before"
                require(set(row) == names, message, "path")
                if text not in number_of:
                    number_of[text] = len(number_of)
                    for name, value in row.items():
                        # NumPy gives every row as much memory as the longest.
                        is_long = isinstance(value, str) and len(value) > MAX_SLICE_VALUE
                        message = f"{where}: {name!r} has more than {MAX_SLICE_VALUE} letters"
                        require(not is_long, message, "path")
                        slices.setdefault(name, []).append(value)
                numbers.append(number_of[text])
            n_rows = len(numbers) - n_before
            says = f"{file} says that {shard['name']} has {shard['rows']} rows; it has {n_rows}"
            require(n_rows == shard["rows"], f"{says}: write the data set again", "path")
        splits[split] = np.array(numbers, np.int32)
    capacity = metadata["capacity"]
    if capacity:
        name = capacity["slice"].split("=")[0]
        require(name in slices, f"{file}: there is no slice {name!r}", "path")
    kind, texts, baselines = metadata["label_mask"], list(number_of), metadata["baselines"]
    return FactDataset(c, kind, texts, splits, slices, baselines, capacity)


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
    capacity = metadata["capacity"]
    if capacity:
        check_kinds(capacity, CAPACITY, f"{file}: 'capacity'")
        message = f"{file}: {capacity['slice']!r} must be a slice and its value, name=value"
        require(capacity["slice"].count("=") == 1, message, "path")
    mask = metadata["label_mask"]
    message = f"{file}: label_mask={mask!r} is not one of {', '.join(MASKS)}"
    require(mask in MASKS, message, "path")
    return metadata, file


# ---- command line of data_synth.py ---------------------------------------------------------------


@dataclass
class CheckConfig:
    tokenizer: str = ""  # a tokenizer.json; empty: bytes


CHECK_CASES = {  # kind of mask: settings whose documents are tried
    "digits": [dict(task="digits"), dict(task="twohop", markers=False)],
    "qa": [dict(task="qa")],
    "twohop": [
        dict(task="twohop"),
        dict(task="twohop", num_relations=4),
        dict(task="twohop", num_relations=4, cot_frac=1),
    ],
    "hashhop": [
        dict(task="hashhop", hops=(1, 2, 3), cot_frac=0.5),
        dict(task="hashhop", hash_len=16, max_bytes=512),
    ],
}


def parse_command(argv, doc, builders, dataset_config):
    """Command line of data_synth.py -> command, its checked settings; without arguments "", None.

    builders: data_synth.BUILD. dataset_config: the class of the settings of a data set to write.
    """
    args, settings = read_argv(argv)
    if wants_help(settings):
        print_help(doc, dataset_config)
    command = args.pop(0) if args else ""
    reject_args(args)
    if not command and not settings:
        return "", None
    commands = [*builders, "check"]
    usage = f"python data_synth.py {'|'.join(commands)} --key=value"
    require(command in commands, f"name what to do first: {usage}", None)
    if command == "check":
        reject_unknown(settings, CheckConfig)
        return command, build_config(CheckConfig, settings)
    reject_unknown(settings, dataset_config)
    has_task = any(s.key == "task" for s in settings)
    require(not has_task, f"the task is {command} already; leave out --task", None)
    settings = [Setting("task", command, command), *settings]
    return command, build_config(dataset_config, settings)


def check_tokenizer(path, builders, config_class):
    """Print whether each label mask is exact with the tokenizer; RunError if one is not.

    builders, config_class: data_synth.BUILD and Config, which make the documents to try.
    """
    tokenizer = read_tokenizer(path)
    inexact = []
    for kind, cases in CHECK_CASES.items():
        texts = []
        for case in cases:
            source = builders[case["task"]](config_class(**case))
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
