"""The MQAR data set on disk, parquet or jsonl with checksums: data_mqar.py writes it and trains on it.

Letters: R rows, L tokens in a row, B blocks in a row, n pairs in a block, V vocabulary.
"""

import json
import math
import os
import sys
from dataclasses import asdict, dataclass

import numpy as np
import torch
from tqdm import tqdm

from nanorecall.checkpoint import atomic_directory, atomic_write, check_kinds, read_lines, read_record, sha256_file, write_json
from nanorecall.rng import (
    IGNORE_INDEX,
    SPLITS,
    philox_key,
    rng_for,
    row_uniforms,
    sample_without_replacement,
    weighted_permutation,
)
from nanorecall.settings import ConfigError, at_least, one_of, require


@dataclass
class DatasetConfig:
    output_dir: str = ""  # directory to write; it must not exist yet
    num_samples: int = 10000  # different rows in each of train, validation and test
    seq_len: int = 512  # tokens in a row, a multiple of 4 * num_kv_pairs: blocks of storage and queries
    num_kv_pairs: int = 8  # pairs in a block
    vocab_size: int = 10000  # token 0 is never used, keys are 1..V/2-1, values V/2..V-1
    power_a: float = 0.01  # the d-th latest pair is asked next with weight d^(a-1): small asks recent first
    num_copies: int = 1  # passes over the training rows, each in its own order, stored as row numbers
    output_format: str = "parquet"  # parquet or jsonl
    seed: int = 42  # same seed, same bytes

    def check(self):
        at_least(self, 1, "num_samples", "num_kv_pairs", "num_copies")
        at_least(self, 0, "power_a", "seed")
        one_of(self, ("parquet", "jsonl"), "output_format")
        V, block = self.vocab_size, 4 * self.num_kv_pairs
        low = max(block, self.seq_len // block * block)
        near = f"the nearest are {low} and {low + block}"
        message = f"seq_len={self.seq_len} must be a multiple of 4 * num_kv_pairs = {block}; {near}"
        require(self.seq_len % block == 0 and self.seq_len > 0, message, "seq_len")
        require(self.seq_len <= 2**20, f"seq_len={self.seq_len} is longer than {2**20}", "seq_len")
        smallest = 2 * (self.num_kv_pairs + 1)
        message = f"vocab_size={V} is too small for {self.num_kv_pairs} pairs; half of it are keys, use at least {smallest}"
        require(V <= 2**24, f"vocab_size={V} is larger than {2**24}", "vocab_size")
        require(smallest <= V, message, "vocab_size")
        # Rows of different splits are drawn apart; with so many possible rows, none can come up twice.
        B, n = self.seq_len // block, self.num_kv_pairs
        bits = sum(log2_permutations(m, B * n) if B * n <= m else B * log2_permutations(m, n) for m in (V // 2 - 1, V - V // 2))
        chance = 2 * math.log2(3 * self.num_samples) - 1 - bits
        message = f"vocab_size={V} and num_kv_pairs={self.num_kv_pairs} allow too few different rows to keep the splits apart"
        require(chance < -40, message + "; raise either, or lower num_samples", "vocab_size")


def log2_permutations(m, n):
    """log2 of m (m-1) ... (m-n+1)."""
    return (math.lgamma(m + 1) - math.lgamma(m - n + 1)) / math.log(2)


def keys_disjoint(c):
    """Are the keys of a row different across its blocks too? Only if there are enough of them."""
    return c.seq_len // 4 <= c.vocab_size // 2 - 1


def make_disk_sequences(c, split, rows):
    """input_ids (R, L) int32 and labels (R, L) int32 of StoreConfig c, L = B blocks of [n pairs | the n pairs, reordered]."""
    n, B, R = c.num_kv_pairs, c.seq_len // (4 * c.num_kv_pairs), len(rows)
    u = row_uniforms(philox_key(c.seed, SPLITS[split], c.seq_len, n), rows, 3 * B * n)
    u_keys, u_values, u_order = np.split(u, 3, axis=1)  # each (R, B*n)

    def draw(u, m, disjoint):
        return (sample_without_replacement(u, m) if disjoint else sample_without_replacement(u.reshape(R * B, n), m)).reshape(R, B, n)

    half, last = c.vocab_size // 2, c.vocab_size - c.vocab_size // 2
    keys = 1 + draw(u_keys, half - 1, keys_disjoint(c))
    values = half + draw(u_values, last, B * n <= last)
    pairs = np.stack([keys, values], axis=-1)  # (R, B, n, 2)
    # slot s of draw_slots has weight s^(a-1): let slot 1 be the pair stored last
    order = n - 1 - weighted_permutation(u_order.reshape(R * B, n), c.power_a).reshape(R, B, n)
    queries = np.take_along_axis(pairs, order[..., None], axis=2)
    labels = np.full((R, B, 2, n, 2), IGNORE_INDEX, np.int32)
    labels[:, :, 1, :, 1] = queries[..., 1]
    return np.stack([pairs, queries], axis=2).reshape(R, c.seq_len), labels.reshape(R, c.seq_len)


def write_dataset(c, shard_rows=20000):
    """Write train/, validation/ and test/ shards, orders/ and metadata.json; return the metadata.

    A directory of that name is always complete (checkpoint.new_directory). Memory does not grow with num_samples: half a
    million tokens are written at a time, in both formats. Copies of the training split are orders/train.npy, (num_copies,
    num_samples) row numbers.
    """
    with atomic_directory(c.output_dir) as work:
        splits = {name: write_split(c, work, name, shard_rows) for name in ("train", "validation", "test")}
        metadata = dataset_metadata(c, splits)
        if c.num_copies > 1:
            metadata["orders"] = write_epoch_orders(c, work)
        write_json(os.path.join(work, "metadata.json"), metadata)
    return metadata


def write_split(c, work, name, shard_rows):
    """Write one split as shards; return [{name, rows, bytes, sha256}]."""
    os.mkdir(os.path.join(work, name))
    split, files = {"validation": "val"}.get(name, name), []
    with tqdm(total=c.num_samples, desc=name, unit="row", disable=not sys.stderr.isatty()) as bar:
        for first in range(0, c.num_samples, shard_rows):
            last = min(first + shard_rows, c.num_samples)
            path = os.path.join(work, name, f"part-{len(files):05d}.{c.output_format}")
            size = max(1, 2**19 // c.seq_len)  # rows in memory at a time
            chunks = (range(a, min(a + size, last)) for a in range(first, last, size))
            atomic_write(path, lambda f: WRITERS[c.output_format](f, c, split, chunks, bar))
            file = {"name": f"{name}/{os.path.basename(path)}", "rows": last - first, "bytes": os.path.getsize(path)}
            files.append(file | {"sha256": sha256_file(path)})
            if bar.disable:
                print(f"{name}: {last} of {c.num_samples} rows", file=sys.stderr)
    return files


def write_parquet(f, c, split, chunks, bar):
    import pyarrow as pa
    import pyarrow.parquet as pq

    ids, mask = pa.list_(pa.int32()), pa.list_(pa.int8())
    schema = pa.schema([("input_ids", ids), ("labels", ids), ("attention_mask", mask)])
    # Random tokens do not repeat, so a dictionary of them only costs time; labels and mask are nearly constant.
    columns = ["labels.list.element", "attention_mask.list.element"]
    options = {"compression": "zstd", "compression_level": 1, "use_dictionary": columns, "write_page_checksum": True}
    with pq.ParquetWriter(f, schema, **options) as writer:
        for rows in chunks:
            tokens, labels = make_disk_sequences(c, split, np.arange(rows.start, rows.stop))
            ends = pa.array(np.arange(len(rows) + 1, dtype=np.int32) * c.seq_len)
            flat = (tokens, labels, np.ones(tokens.shape, np.int8))
            lists = [pa.ListArray.from_arrays(ends, pa.array(x.ravel())) for x in flat]
            writer.write_table(pa.Table.from_arrays(lists, schema=schema))
            bar.update(len(rows))


def write_jsonl(f, c, split, chunks, bar):
    ones = [1] * c.seq_len
    for rows in chunks:
        tokens, labels = make_disk_sequences(c, split, np.arange(rows.start, rows.stop))
        for ids, label in zip(tokens.tolist(), labels.tolist()):
            row = {"input_ids": ids, "labels": label, "attention_mask": ones}
            f.write(json.dumps(row, separators=(",", ":")).encode() + b"\n")
        bar.update(len(rows))


WRITERS = {"parquet": write_parquet, "jsonl": write_jsonl}


def write_epoch_orders(c, work):
    """Write orders/train.npy, (num_copies, num_samples): the row numbers of each copy; return {name, sha256}."""
    os.mkdir(os.path.join(work, "orders"))
    path = os.path.join(work, "orders", "train.npy")
    orders = np.lib.format.open_memmap(path, "w+", np.uint32, (c.num_copies, c.num_samples))
    for copy in range(c.num_copies):
        order = np.arange(c.num_samples, dtype=np.uint32)
        rng_for(c.seed, len(SPLITS), copy).shuffle(order)
        orders[copy] = order
    orders.flush()
    return {"name": "orders/train.npy", "sha256": sha256_file(path)}


def dataset_metadata(c, splits):
    half = c.vocab_size // 2
    return {
        "dataset_type": "mqar",
        "format_version": 1,
        **{k: v for k, v in asdict(c).items() if k != "output_dir"},
        "example_length": 4 * c.num_kv_pairs,
        "examples_per_sequence": c.seq_len // (4 * c.num_kv_pairs),
        "total_examples": {"train": c.num_samples * c.num_copies, "validation": c.num_samples, "test": c.num_samples},
        "key_vocab_range": [1, half],
        "value_vocab_range": [half, c.vocab_size],
        "keys_disjoint_over_row": keys_disjoint(c),
        "labels_shifted": False,
        "files": splits,
    }


STORED_FILE = {"name": "path inside", "rows": "count", "sha256": "hash"}
METADATA = {
    **dict.fromkeys(("num_samples", "num_kv_pairs", "vocab_size", "seq_len"), "size"),
    "files": {name: [STORED_FILE] for name in ("train", "validation", "test")},
}


class StoredMQAR:
    """A directory that write_dataset wrote, read into memory and checked against its checksums."""

    def __init__(self, config):
        self.path = config.path
        self.limit = {"val": config.n_val_examples, "test": config.n_test_examples}  # evaluating 100,000 rows takes minutes
        self.metadata = m = self.read_metadata()
        self.vocab_size, self.seq_len = m["vocab_size"], m["seq_len"]
        self.splits = {}
        orders = self.checked(m["orders"]) if "orders" in m else None
        self.orders = self.read_orders(orders) if orders else np.arange(m["num_samples"])[None]

    def read_metadata(self):
        place = os.path.join(self.path, "metadata.json")
        make = "`python data_mqar.py --output-dir DIR` makes one"
        require(
            os.path.exists(place),
            f"path={self.path} holds no data set (no metadata.json there); {make}",
            "path",
        )
        metadata = read_record(place, {"dataset_type": "text", "format_version": "count"})
        ours = metadata["dataset_type"] == "mqar" and metadata["format_version"] == 1
        require(ours, f"{place} is not that of an MQAR data set", "path")
        check_kinds(metadata, METADATA, place)
        n, L = metadata["num_kv_pairs"], metadata["seq_len"]
        require(
            L % (4 * n) == 0,
            f"{place}: rows of seq_len={L} are not made of examples of {n} pairs",
            "path",
        )
        if "orders" in metadata:
            check_kinds(
                metadata["orders"], {"name": "path inside", "sha256": "hash"}, f"{place}: 'orders'"
            )
        for name, files in metadata["files"].items():
            rows = sum(f["rows"] for f in files)
            message = f"{place} is damaged: the files of {name} have {rows} rows, not num_samples={metadata['num_samples']}"
            require(rows == metadata["num_samples"], message, "path")
        return metadata

    def read_orders(self, path):
        """(copies, num_samples) row numbers of training, in the order in which they come."""
        try:
            orders = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as e:
            raise ConfigError(f"{path} cannot be read: {e}", "path") from None
        n = self.metadata["num_samples"]
        rows = (
            orders.ndim == 2
            and orders.size > 0
            and orders.dtype.kind in "iu"
            and 0 <= orders.min()
            and orders.max() < n
        )
        require(rows, f"{path} holds no numbers of {n} rows; write the data set again", "path")
        return orders

    def load(self, split):
        """-> tokens (rows, L) int32, targets (rows, L) int32 with labels shifted onto the position that predicts them."""
        if split not in self.splits:
            name = {"val": "validation"}.get(split, split)
            files = self.metadata["files"][name]
            size = sum(f["rows"] for f in files), self.seq_len
            tokens, targets, first = np.empty(size, np.int32), np.full(size, IGNORE_INDEX, np.int32), 0
            for file in tqdm(files, desc=f"read {name}", disable=not sys.stderr.isatty()):
                ids, labels = self.read_shard(file)
                self.check_shard(file, ids, labels)
                tokens[first : first + len(ids)] = ids
                targets[first : first + len(ids), :-1] = labels[:, 1:]
                first += len(ids)
            self.splits[split] = tokens, targets
        return self.splits[split]

    def check_shard(self, file, ids, labels):
        """ConfigError unless a shard's rows (R, L) are as many, as long and of the tokens that
        metadata.json says."""
        path = os.path.join(self.path, file["name"])
        shape = (file["rows"], self.seq_len)
        same = ids.shape == labels.shape == shape
        require(
            same,
            f"{path} holds {ids.shape} tokens and {labels.shape} labels; metadata.json says {shape}",
            "path",
        )
        answers = labels != IGNORE_INDEX
        for numbers in (ids, labels[answers]):
            known = 0 <= numbers.min(initial=0) and numbers.max(initial=0) < self.vocab_size
            require(
                known,
                f"{path} holds tokens that are not below vocab_size={self.vocab_size} of metadata.json",
                "path",
            )
        each = self.seq_len // 4  # half of the tokens are queries and their values
        asked = (answers[:, 1:].sum(1) == each).all()
        require(
            asked,
            f"{path} has rows with another number of labels than {each}, a quarter of their tokens",
            "path",
        )

    def checked(self, file):
        """The path of a file of the data set, once its checksum is right."""
        path = os.path.join(self.path, file["name"])
        if not os.path.isfile(path) or sha256_file(path) != file["sha256"]:
            raise ConfigError(f"{path} is missing or damaged (its checksum differs); write the data set again", "path")
        return path

    def read_shard(self, file):
        path = self.checked(file)
        names = ("input_ids", "labels")
        if path.endswith(".jsonl"):
            rows, others = read_lines(path, dict.fromkeys(names, "list"))
            require(not others, f"{path}: {others} lines are no rows of an MQAR data set", "path")
            return [
                self.rows_of(path, [len(r[k]) for r in rows], [x for r in rows for x in r[k]])
                for k in names
            ]
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(path, columns=list(names), page_checksum_verification=True)
            columns = [table[name].combine_chunks() for name in names]
            return [
                self.rows_of(
                    path, pc.list_value_length(c).to_numpy(zero_copy_only=False), c.flatten()
                )
                for c in columns
            ]
        except (pa.ArrowException, OSError, KeyError) as e:
            reason = " ".join(str(e).split())[:80]
            raise ConfigError(
                f"{path} cannot be read as rows of an MQAR data set ({reason})", "path"
            ) from None

    def rows_of(self, path, lengths, flat):
        """Numbers end to end -> (R, L) int32; ConfigError for rows of other lengths, or of
        something else than whole numbers."""
        lengths = np.asarray(lengths)
        require(
            (lengths == self.seq_len).all(),
            f"{path} has rows that are not of seq_len={self.seq_len} tokens",
            "path",
        )
        numbers = np.asarray(flat)
        whole = numbers.size == 0 or numbers.dtype.kind in "iu" and abs(numbers).max() < 2**31
        require(whole, f"{path} holds something else than tokens", "path")
        return numbers.astype(np.int32).reshape(-1, self.seq_len)

    def batch_indices(self, step, batch_size):
        return range(step * batch_size, (step + 1) * batch_size)

    def steps_per_epoch(self, batch_size):
        return max(1, self.orders.size // batch_size)

    def eval_groups(self, split):
        return [range(min(self.metadata["num_samples"], self.limit[split]))]

    def batch(self, split, step, rows):
        rows, (tokens, targets) = np.asarray(rows, dtype=np.int64), self.load(split)
        if split == "train":  # row r of training: the copies one after another, then from the start again
            rows = self.orders.reshape(-1)[rows % self.orders.size].astype(np.int64)
        n, labels = self.metadata["num_kv_pairs"], self.seq_len // 4
        tags = {"num_kv_pairs": np.full(len(rows) * labels, n), "input_seq_len": np.full(len(rows) * labels, self.seq_len)}
        tags["query"] = np.tile(np.arange(labels) % n, len(rows))  # 0: the first query of its block
        return torch.from_numpy(tokens[rows]).long(), torch.from_numpy(targets[rows]).long(), tags
