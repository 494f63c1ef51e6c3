"""The MQAR data set on disk: data_mqar.py writes it and trains on it.

A sequence holds N blocks, each [n pairs | the same n pairs, reordered]: storage and queries both
show the values, and labels are unshifted, as in the LLMonade data set.

Letters: B sequences, T tokens, N blocks in a sequence, n pairs in a block, V vocabulary.
"""

import itertools
import math
import os
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch
from tqdm import tqdm

from nanorecall.dataset_files import (
    SHARDS,
    SPLIT_DIRS,
    column_chunks,
    n_bytes,
    read_metadata,
    verified_path,
    write_splits,
)
from nanorecall.files import atomic_directory, sha256_file
from nanorecall.records import check_kinds, read_lines, write_json
from nanorecall.rng import (
    IGNORE_INDEX,
    STREAMS,
    philox_key,
    rng_for,
    row_uniforms,
    sample_without_replacement,
    weighted_permutation,
)
from nanorecall.settings import (
    ConfigError,
    at_least,
    build_config,
    field_names,
    one_of,
    print_help,
    read_argv,
    reject_args,
    reject_unknown,
    require,
    say,
    wants_help,
)


@dataclass
class DatasetConfig:
    output_dir: str = ""  # directory to write; it must not exist yet
    num_samples: int = 10000  # different sequences in each of train, validation and test
    seq_len: int = 512  # tokens in a sequence, a multiple of 4 * num_kv_pairs
    num_kv_pairs: int = 8  # pairs in a block of storage and queries
    vocab_size: int = 10000  # token 0 is never used, keys are 1..V/2-1, values V/2..V-1
    power_a: float = 0.01  # query the d-th latest pair with weight d^(a-1): small a is recent first
    num_copies: int = 1  # epochs over the training split, each in its own order (row numbers)
    repeat_rows: bool = False  # write each copy's rows, for other readers; 0: only row numbers
    output_format: str = "parquet"  # parquet or jsonl
    seed: int = 42  # same seed, same bytes

    def check(self):
        at_least(self, 1, "num_samples", "num_kv_pairs", "num_copies")
        at_least(self, 0, "power_a", "seed")
        one_of(self, ("parquet", "jsonl"), "output_format")
        message = "repeat_rows repeats nothing with num_copies=1; raise num_copies"
        require(self.num_copies > 1 or not self.repeat_rows, message, "repeat_rows")
        V, T, n = self.vocab_size, self.seq_len, self.num_kv_pairs
        block = 4 * n
        low = max(block, T // block * block)
        message = (
            f"seq_len={T} must be a multiple of 4 * num_kv_pairs = {block}; "
            f"the nearest are {low} and {low + block}"
        )
        require(T % block == 0 and T > 0, message, "seq_len")
        require(T <= 2**20, f"seq_len={T} is longer than {2**20}", "seq_len")
        smallest = 2 * (n + 1)
        message = (
            f"vocab_size={V} is too small for {n} pairs; "
            f"half of it are keys, use at least {smallest}"
        )
        require(V <= 2**24, f"vocab_size={V} is larger than {2**24}", "vocab_size")
        require(smallest <= V, message, "vocab_size")
        message = (
            f"vocab_size={V} and num_kv_pairs={n} allow too few different rows to keep the "
            "splits apart; raise either, or lower num_samples"
        )
        require(self.log2_collision() < -40, message, "vocab_size")

    def log2_collision(self):
        """log2 of a bound on the probability that two of the 3 * num_samples sequences are equal.

        Splits are drawn independently. What keeps them apart is the number of possible sequences.
        """
        V, n = self.vocab_size, self.num_kv_pairs
        N = self.seq_len // (4 * n)
        bits = 0.0
        for n_tokens in (V // 2 - 1, V - V // 2):  # keys, values
            if N * n <= n_tokens:  # different across all blocks
                bits += log2_permutations(n_tokens, N * n)
            else:
                bits += N * log2_permutations(n_tokens, n)
        return 2 * math.log2(3 * self.num_samples) - 1 - bits


def log2_permutations(m, n):
    """log2 of m (m-1) ... (m-n+1)."""
    return (math.lgamma(m + 1) - math.lgamma(m - n + 1)) / math.log(2)


# ---- writing -------------------------------------------------------------------------------------


def keys_disjoint(c):
    """Are the keys of a sequence different across its blocks too? Only if there are enough."""
    return c.seq_len // 4 <= c.vocab_size // 2 - 1


def make_disk_sequences(c, split, indices):
    """Sequences `indices` (B,) of a split -> input_ids, labels, both (B, T) int32.

    Labels are -100 except at the values of queries. c: DatasetConfig.
    """
    B, n = len(indices), c.num_kv_pairs
    N = c.seq_len // (4 * n)
    half = c.vocab_size // 2
    n_values = c.vocab_size - half
    key = philox_key(c.seed, STREAMS[split], c.seq_len, n)
    uniforms = row_uniforms(key, indices, 3 * N * n)
    u_keys, u_values, u_order = np.split(uniforms, 3, axis=1)  # each (B, N*n)

    def draw_tokens(u, n_tokens, disjoint):
        """N*n tokens below n_tokens, different within each block or (disjoint) across them."""
        if not disjoint:
            u = u.reshape(B * N, n)
        return sample_without_replacement(u, n_tokens).reshape(B, N, n)

    keys = 1 + draw_tokens(u_keys, half - 1, keys_disjoint(c))
    values = half + draw_tokens(u_values, n_values, N * n <= n_values)
    pairs = np.stack([keys, values], axis=-1)  # (B, N, n, 2)
    # Slot s of weighted_permutation has weight s^(a-1). Slot 1 is to be the pair stored last.
    order = n - 1 - weighted_permutation(u_order.reshape(B * N, n), c.power_a).reshape(B, N, n)
    queries = np.take_along_axis(pairs, order[..., None], axis=2)
    labels = np.full((B, N, 2, n, 2), IGNORE_INDEX, np.int32)
    labels[:, :, 1, :, 1] = queries[..., 1]
    input_ids = np.stack([pairs, queries], axis=2)
    return input_ids.reshape(B, c.seq_len), labels.reshape(B, c.seq_len)


# Random tokens do not repeat, so a dictionary of them only costs time. Labels and mask are nearly
# constant.
PARQUET_OPTIONS = {
    "compression_level": 1,
    "use_dictionary": ["labels.list.element", "attention_mask.list.element"],
}


def write_dataset(c, shard_rows=20000):
    """Write train/, validation/ and test/ shards, orders/ and metadata.json; return the metadata.

    The directory gets its name when it is complete. Memory does not grow with num_samples: half a
    million tokens are made and written at a time. Copies of the training split are
    orders/train.npy, (num_copies, num_samples) row numbers; with repeat_rows they are rows of
    train/, one copy after another.
    """
    n_rows = dict.fromkeys(SPLIT_DIRS, c.num_samples)
    if c.repeat_rows:
        n_rows["train"] *= c.num_copies

    def read_columns(split, indices):
        if split == "train" and c.repeat_rows:
            indices = rows_of_copies(c, indices)
        input_ids, labels = make_disk_sequences(c, split, indices)
        mask = np.ones(input_ids.shape, np.int8)
        return {"input_ids": input_ids, "labels": labels, "attention_mask": mask}

    with atomic_directory(c.output_dir) as work:
        files = write_splits(
            work,
            n_rows,
            read_columns,
            c.output_format,
            shard_rows,
            chunk_rows=max(1, 2**19 // c.seq_len),
            parquet_options=PARQUET_OPTIONS,
            json_separators=(",", ":"),
        )
        metadata = dataset_metadata(c, files)
        if c.num_copies > 1 and not c.repeat_rows:
            metadata["orders"] = write_epoch_orders(c, work)
        write_json(os.path.join(work, "metadata.json"), metadata)
    return metadata


def write_epoch_orders(c, work):
    """Write orders/train.npy, (num_copies, num_samples) row numbers; return {name, sha256}."""
    os.mkdir(os.path.join(work, "orders"))
    path = os.path.join(work, "orders", "train.npy")
    shape = (c.num_copies, c.num_samples)
    orders = np.lib.format.open_memmap(path, "w+", np.uint32, shape)
    for copy in range(c.num_copies):
        orders[copy] = order_of_copy(c, copy)
    orders.flush()
    return {"name": "orders/train.npy", "sha256": sha256_file(path)}


def order_of_copy(c, copy):
    """Row numbers (num_samples,) of one copy of the training split."""
    order = np.arange(c.num_samples, dtype=np.uint32)
    rng_for(c.seed, STREAMS["epoch"], copy).shuffle(order)
    return order


def rows_of_copies(c, indices):
    """Indices (R,) into all copies, one copy after another -> numbers of the rows there (R,)."""
    copies = indices // c.num_samples
    rows = np.empty_like(indices)
    for copy in np.unique(copies):
        here = copies == copy
        rows[here] = order_of_copy(c, int(copy))[indices[here] % c.num_samples]
    return rows


def dataset_metadata(c, files):
    """metadata.json without "orders". files: what write_splits returned."""
    half = c.vocab_size // 2
    settings = asdict(c)
    del settings["output_dir"]
    return {
        "dataset_type": "mqar",
        "format_version": 1,
        **settings,
        "example_length": 4 * c.num_kv_pairs,
        "examples_per_sequence": c.seq_len // (4 * c.num_kv_pairs),
        "total_examples": {
            "train": c.num_samples * c.num_copies,
            "validation": c.num_samples,
            "test": c.num_samples,
        },
        "key_vocab_range": [1, half],
        "value_vocab_range": [half, c.vocab_size],
        "keys_disjoint_over_row": keys_disjoint(c),
        "labels_shifted": False,
        "files": files,
    }


def parse_dataset(argv, doc, in_memory):
    """Command line of data_mqar.py -> DatasetConfig; its output_dir is empty without settings.

    in_memory: the Config of training data, whose settings are refused by that name.
    """
    args, settings = read_argv(argv)
    if wants_help(settings):
        print_help(doc, DatasetConfig)
    reject_args(args)
    elsewhere = set(field_names(in_memory)) - set(field_names(DatasetConfig))
    for setting in settings:
        message = f"{setting.source}: a data set on disk has no {setting.key}; train.py has it"
        require(setting.key not in elsewhere, message, setting.key)
    reject_unknown(settings, DatasetConfig)
    config = build_config(DatasetConfig, settings)
    has_directory = config.output_dir or not settings
    require(has_directory, "name the directory to write: --output-dir DIR", "output_dir")
    return config


def write_and_report(c):
    """Write a data set; print its size and how fast it was written."""
    start = time.perf_counter()
    metadata = write_dataset(c)
    seconds = time.perf_counter() - start
    n_rows = 0
    for shards in metadata["files"].values():
        n_rows += sum(shard["rows"] for shard in shards)
    tokens = n_rows * c.seq_len / 1e6
    megabytes = n_bytes(metadata) / 1e6
    say(f"{c.output_dir}: {n_rows} rows, {tokens:.1f} M tokens, {megabytes:.1f} MB on disk")
    rates = f"{megabytes / seconds:.1f} MB/s written, {tokens / seconds:.1f} M tokens/s"
    print(f"{seconds:.1f} s, {rates}")


def show_on_disk(config):
    """Print training sequence 0 of a data set on disk."""
    input_ids, labels = make_disk_sequences(config, "train", np.arange(1))
    show_columns(input_ids=input_ids[0], labels=labels[0])


def show_columns(**columns):
    """Print named lists of tokens under each other; -100 as a dot."""
    texts = {}
    width = 0
    for name, tokens in columns.items():
        texts[name] = ["." if token == IGNORE_INDEX else str(token) for token in tokens]
        width = max(width, *map(len, texts[name]))
    name_width = max(map(len, texts))
    for name, row in texts.items():
        print(name.ljust(name_width), *(text.rjust(width) for text in row))


# ---- reading -------------------------------------------------------------------------------------

METADATA = {
    **dict.fromkeys(("num_samples", "num_kv_pairs", "vocab_size", "seq_len"), "size"),
    "files": SHARDS,
}


def n_rows_of(metadata, directory):
    """Rows of train, validation or test: num_samples, or in train with repeat_rows all copies."""
    if directory == "train" and metadata.get("repeat_rows"):
        return metadata["num_samples"] * metadata["num_copies"]
    return metadata["num_samples"]


def check_row_count(path, n_rows, T):
    """ConfigError if a shard cannot have n_rows of T tokens. The caller reserves memory for them.

    load compares them with what it has read.
    """
    message = f"{path} has not the {n_rows} rows of metadata.json"
    if path.endswith(".jsonl"):
        require(n_rows <= os.path.getsize(path), message, "path")
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path)
    except (pa.ArrowException, OSError) as e:
        reason = " ".join(str(e).split())[:80]
        message = f"{path} cannot be read as rows of an MQAR data set ({reason})"
        raise ConfigError(message, "path") from None
    require(metadata.num_rows == n_rows, message, "path")
    # A million equal tokens take a few bytes in a file.
    for rows, chunk in column_chunks(metadata, ("input_ids", "labels")):
        message = f"{path} has rows that are not of seq_len={T} tokens"
        require(chunk.num_values == rows * T, message, "path")


class StoredMQAR:
    """A directory that write_dataset wrote.

    Its checksums are verified when it is opened. A split is read into memory when it is first used.
    """

    def __init__(self, config):
        self.path = config.path
        # So many at most, because evaluating 100,000 sequences takes minutes.
        self.n_examples = {"val": config.n_val_examples, "test": config.n_test_examples}
        self.metadata = self.read_metadata()
        self.seq_len = self.metadata["seq_len"]
        # All now: else a damaged test split would stop a run only after its training.
        for shard in itertools.chain.from_iterable(self.metadata["files"].values()):
            check_row_count(verified_path(self.path, shard), shard["rows"], self.seq_len)
        self.vocab_size = self.metadata["vocab_size"]
        self.splits = {}
        if "orders" in self.metadata:
            orders = verified_path(self.path, self.metadata["orders"])
            self.epoch_orders = self.read_orders(orders)
        else:
            self.epoch_orders = np.arange(n_rows_of(self.metadata, "train"))[None]

    def read_metadata(self):
        """metadata.json, checked; ConfigError if it is no MQAR data set, or damaged."""
        hint = "`python data_mqar.py --output-dir DIR` makes one"
        metadata, file = read_metadata(self.path, hint)
        ours = metadata["dataset_type"] == "mqar" and metadata["format_version"] == 1
        require(ours, f"{file} is not that of an MQAR data set", "path")
        check_kinds(metadata, METADATA, file)
        T, n = metadata["seq_len"], metadata["num_kv_pairs"]
        uneven = f"{file}: rows of seq_len={T} are not made of examples of {n} pairs"
        require(T % (4 * n) == 0, uneven, "path")
        if "orders" in metadata:
            kinds = {"name": "path inside", "sha256": "hash"}
            check_kinds(metadata["orders"], kinds, f"{file}: 'orders'")
        if metadata.get("repeat_rows"):
            check_kinds(metadata, {"num_copies": "size"}, file)
        for name, shards in metadata["files"].items():
            rows = sum(shard["rows"] for shard in shards)
            expected = n_rows_of(metadata, name)
            message = f"{file} is damaged: the files of {name} have {rows} rows, not {expected}"
            require(rows == expected, message, "path")
        return metadata

    def read_orders(self, path):
        """(num_copies, num_samples) row numbers of training, in the order in which they come."""
        try:
            orders = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as e:
            raise ConfigError(f"{path} cannot be read: {e}", "path") from None
        n = self.metadata["num_samples"]
        is_array = isinstance(orders, np.ndarray)  # or an archive of some
        integers = is_array and orders.ndim == 2 and orders.size > 0 and orders.dtype.kind in "iu"
        valid = integers and 0 <= orders.min() and orders.max() < n
        require(valid, f"{path} holds no numbers of {n} rows; write the data set again", "path")
        return orders

    def load(self, split):
        """-> tokens and targets, (rows, T) int32 each.

        In the targets, each label has moved to the position that predicts it.
        """
        if split not in self.splits:
            name = SPLIT_DIRS[split]
            shards = self.metadata["files"][name]
            shape = (n_rows_of(self.metadata, name), self.seq_len)
            tokens = np.empty(shape, np.int32)
            targets = np.full(shape, IGNORE_INDEX, np.int32)
            first = 0
            for shard in tqdm(shards, desc=f"read {name}", disable=None):
                input_ids, labels = self.read_shard(shard)
                self.check_shard(shard, input_ids, labels)
                last = first + len(input_ids)
                tokens[first:last] = input_ids
                targets[first:last, :-1] = labels[:, 1:]
                first = last
            self.splits[split] = tokens, targets
        return self.splits[split]

    def check_shard(self, shard, input_ids, labels):
        """ConfigError unless a shard holds what metadata.json says."""
        path = os.path.join(self.path, shard["name"])
        shape = (shard["rows"], self.seq_len)
        message = (
            f"{path} holds {input_ids.shape} tokens and {labels.shape} labels; "
            f"metadata.json says {shape}"
        )
        require(input_ids.shape == labels.shape == shape, message, "path")
        is_label = labels != IGNORE_INDEX
        message = (
            f"{path} holds tokens that are not below vocab_size={self.vocab_size} of metadata.json"
        )
        for tokens in (input_ids, labels[is_label]):
            in_range = 0 <= tokens.min(initial=0) and tokens.max(initial=0) < self.vocab_size
            require(in_range, message, "path")
        n_labels = self.seq_len // 4  # half of the tokens are queries and their values
        message = (
            f"{path} has rows with another number of labels than {n_labels}, "
            "a quarter of their tokens"
        )
        require((is_label[:, 1:].sum(1) == n_labels).all(), message, "path")

    def read_shard(self, shard):
        """-> input_ids and labels, (R, T) int32 each."""
        path = os.path.join(self.path, shard["name"])
        if path.endswith(".jsonl"):
            return self.read_jsonl_shard(path)
        return self.read_parquet_shard(path)

    def read_jsonl_shard(self, path):
        rows, n_others = read_lines(path, {"input_ids": "list", "labels": "list"})
        require(not n_others, f"{path}: {n_others} lines are no rows of an MQAR data set", "path")
        arrays = []
        for name in ("input_ids", "labels"):
            lengths = [len(row[name]) for row in rows]
            flat = list(itertools.chain.from_iterable(row[name] for row in rows))
            arrays.append(self.to_array(path, lengths, flat))
        return arrays

    def read_parquet_shard(self, path):
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        names = ["input_ids", "labels"]
        try:
            table = pq.read_table(path, columns=names, page_checksum_verification=True)
            arrays = []
            for name in names:
                column = table[name].combine_chunks()
                lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
                arrays.append(self.to_array(path, lengths, column.flatten()))
            return arrays
        except (pa.ArrowException, OSError, KeyError) as e:
            reason = " ".join(str(e).split())[:80]
            message = f"{path} cannot be read as rows of an MQAR data set ({reason})"
            raise ConfigError(message, "path") from None

    def to_array(self, path, lengths, flat):
        """All tokens of a column, row after row -> (R, T) int32.

        ConfigError for rows of another length, or for values that are no tokens.
        """
        message = f"{path} has rows that are not of seq_len={self.seq_len} tokens"
        require((np.asarray(lengths) == self.seq_len).all(), message, "path")
        message = f"{path} holds something else than tokens"
        try:
            tokens = np.asarray(flat)
        except ValueError:  # lists among numbers
            raise ConfigError(message, "path") from None
        integers = tokens.size == 0 or tokens.dtype.kind in "iu"
        # Not their absolute value: that of -2^63 is negative.
        integers = integers and -(2**31) < tokens.min(initial=0) <= tokens.max(initial=0) < 2**31
        require(integers, message, "path")
        return tokens.astype(np.int32).reshape(-1, self.seq_len)

    # The data contract; see data_mqar.Data.

    def batch_indices(self, step, batch_size):
        return range(step * batch_size, (step + 1) * batch_size)

    def steps_per_epoch(self, batch_size):
        return max(1, self.epoch_orders.size // batch_size)

    def eval_groups(self, split):
        return [range(min(self.metadata["num_samples"], self.n_examples[split]))]

    def batch(self, split, step, indices):
        rows = np.asarray(indices, dtype=np.int64)
        tokens, targets = self.load(split)
        if split == "train":  # one copy after another, then from the first again
            order = self.epoch_orders.reshape(-1)
            rows = order[rows % order.size].astype(np.int64)
        n = self.metadata["num_kv_pairs"]
        n_labels = self.seq_len // 4
        slices = {
            "num_kv_pairs": np.full(len(rows) * n_labels, n),
            "input_seq_len": np.full(len(rows) * n_labels, self.seq_len),
            "query": np.tile(np.arange(n_labels) % n, len(rows)),  # 0: the first of its block
        }
        return torch.from_numpy(tokens[rows]).long(), torch.from_numpy(targets[rows]).long(), slices
