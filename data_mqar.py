"""Multi-query associative recall (MQAR): pairs of a key and a value, then the keys again; say the value of each.

    python data_mqar.py                                            # print an example and this text
    python data_mqar.py --output-dir mqar_data --num-samples 100000 --seq-len 512 --num-kv-pairs 16 \\
        --vocab-size 32000 --power-a 0.01 --num-copies 100 --output-format parquet
    python train.py --data data_mqar --path mqar_data              # train on what that wrote

Two layouts of one task. In memory, for training (`Data`), as in Zoology (arXiv 2312.04927): the value is never in the
input after a query, and its label stands on the query's own position (logits there predict it; nothing to shift).

>>> show(Config(input_seq_len=16, num_kv_pairs=3, vocab_size=20, seed=1))
tokens  5 19  7 17  4 15  7  0  5  0  4  0  0  0  0  0
labels  .  .  .  .  .  . 17  . 19  . 15  .  .  .  .  .

On disk, for others (`write_dataset`), as in the LLMonade data set: storage and queries both hold the values, several
such blocks fill a row, and labels are unshifted (labels[i] == input_ids[i] at the values of the query half).

>>> show_stored(StoreConfig(seq_len=16, num_kv_pairs=4, vocab_size=20, seed=0))
input_ids  4 11  3 16  6 13  2 19  6 13  2 19  3 16  4 11
labels     .  .  .  .  .  .  .  .  . 13  . 19  . 16  . 11

Every row is a pure function of (seed, split, length, pairs, row number): no batch size, call order or other generator
changes it. Letters: R rows, L tokens in a row, n pairs, u updates, V vocabulary, S query slots.
"""

import hashlib
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch
from tqdm import tqdm

import configs
from configs import ConfigError, at_least, require

IGNORE = -100
SPLITS = {"train": 0, "val": 1, "test": 2}


@dataclass
class Config:
    input_seq_len: int = 128  # tokens in a row
    num_kv_pairs: int = 32  # pairs in a row, each queried once
    vocab_size: int = 2048  # token 0 is blank, keys are 1..V/2-1, values V/2..V-1
    power_a: float = 0.01  # query slot s has weight s^(a-1): 1 is uniform, small asks early pairs early
    random_non_queries: bool = False  # fill blanks with random tokens, never with one of the row's keys
    n_train_examples: int = 40000  # rows in the training set, and in an epoch
    n_val_examples: int = 1000  # rows per cell of the split that training watches; of a path, at most so many
    n_test_examples: int = 3000  # rows per cell of the split that is measured once, at the end; likewise
    fresh: bool = False  # new training rows for ever, instead of a fixed set seen again each epoch
    curriculum: tuple[tuple[int, int], ...] = ()  # first, stages (pairs, steps) of short fresh rows; same tokens a step
    train_cells: tuple[tuple[int, int], ...] = ()  # cells (length, pairs) that steps take turns in; empty: the one above
    test_cells: tuple[tuple[int, int], ...] = ()  # cells of val and test, reported one by one; empty: as in training
    updates: int = 0  # so many of the keys are stored again with a new value; the last one counts
    gap: int = 0  # 0..gap random tokens after each stored pair
    key_len: int = 1  # tokens in a key; longer keys are words over a small alphabet, so that they share tokens
    path: str = ""  # a directory that `python data_mqar.py --output-dir` wrote, to train on instead
    seed: int = 0  # of data and model

    def check(self):
        at_least(self, 0, "updates", "gap", "seed", "power_a")
        at_least(self, 1, "n_train_examples", "n_val_examples", "n_test_examples", "key_len", "num_kv_pairs")
        if self.path:
            return
        message = f"updates={self.updates} exceeds num_kv_pairs={self.num_kv_pairs}: a pair is stored again once at most"
        require(self.updates <= self.num_kv_pairs, message, "updates")
        for name in ("train_cells", "test_cells"):
            for length, pairs in getattr(self, name):
                Cell(length, pairs, self).check(name)
        if not self.train_cells:
            Cell(self.input_seq_len, self.num_kv_pairs, self).check("input_seq_len")
        # A cell that came twice would get the same rows twice.
        stages = [(shortest(pairs, self), pairs) for pairs, _ in self.curriculum if pairs >= 1]
        cells = self.train_cells or ((self.input_seq_len, self.num_kv_pairs),)
        twice = [cell for cell in (*stages, *cells) if (*stages, *cells).count(cell) > 1]
        if twice:
            key = "train_cells" if set(twice) & set(self.train_cells) else "curriculum"
            raise ConfigError(
                f"rows of {twice[0]} (tokens, pairs) come twice in curriculum and train_cells; name them once", key
            )
        for pairs, steps in self.curriculum:
            require(
                min(pairs, steps) >= 1, f"curriculum: stage {(pairs, steps)} needs at least 1 pair and 1 step", "curriculum"
            )
            length = shortest(pairs, self)
            Cell(length, pairs, self).check("curriculum")
            message = f"curriculum: {pairs} pairs need {length} tokens, more than input_seq_len={self.input_seq_len}"
            require(length <= self.input_seq_len, message, "curriculum")
        tokens = self.n_train_examples * max(length for length, _ in self.train_cells or [(self.input_seq_len, 0)])
        message = f"n_train_examples={self.n_train_examples} rows do not fit in memory; use fresh=1"
        require(self.fresh or tokens <= 2**28, message, "n_train_examples")

    def unused(self):
        if self.path:
            used = ("path", "seed", "n_val_examples", "n_test_examples")
            return {name: f"the data comes from path={self.path}" for name in asdict(self) if name not in used}
        return {"num_kv_pairs": "train_cells say it"} if self.train_cells else {}

    def label(self):
        """The data's part of a run's name."""
        if self.path:
            return os.path.basename(os.path.normpath(self.path))
        cells = self.train_cells or ((self.input_seq_len, self.num_kv_pairs),)
        return "+".join(f"{length}-{pairs}" for length, pairs in cells) + f"-{self.vocab_size}"


@dataclass(frozen=True, eq=False)
class Cell:
    """Rows of one size: length tokens, pairs to store, and the layout that follows from the other settings."""

    length: int
    pairs: int
    config: Config

    @property
    def updates(self):
        """How many of the pairs are stored a second time."""
        return min(self.config.updates, self.pairs)

    @property
    def alphabet(self):
        """Tokens that keys are made of: one per key, or for longer keys so few that any one of them is in many keys."""
        n, key_len = self.pairs, self.config.key_len
        return n if key_len == 1 else max(2, math.ceil((n + 1) ** (1 / key_len)))

    @property
    def storage(self):
        """Tokens before the query slots."""
        return (self.pairs + self.updates) * (self.config.key_len + 1 + self.config.gap)

    @property
    def slots(self):
        """Places for a query: a key and one blank."""
        return max(0, self.length - self.storage) // (self.config.key_len + 1)

    def check(self, key):
        V, L, n = self.config.vocab_size, self.length, self.pairs
        require(n >= 1, f"{key}: a cell needs at least one pair, not {n}", key)
        require(L % 2 == 0, f"{key}: a row of {L} tokens is odd; keys and values come in twos, use {L + 1}", key)
        need = shortest(n, self.config)
        require(self.slots >= n, f"{key}: {n} pairs need a row of at least {need} tokens, not {L}", key)
        require(L <= 2**20, f"{key}: a row of {L} tokens is longer than {2**20}", key)
        smallest = 2 * max(self.alphabet + 1, n + self.updates)
        message = f"vocab_size={V} is too small for {n} pairs: half of it are keys, half values; use at least {smallest}"
        require(V >= smallest, message, "vocab_size")
        require(V <= 2**24, f"vocab_size={V} is larger than {2**24}", "vocab_size")
        words = self.alphabet**self.config.key_len if self.config.key_len <= 20 else math.inf
        require(words <= 2**20, f"key_len={self.config.key_len} is too long: there are more than {2**20} such keys", "key_len")


def shortest(pairs, config):
    """The least (even) number of tokens that holds `pairs` pairs and their queries: 4 per pair in the plain task."""
    cell = Cell(0, pairs, config)
    need = cell.storage + pairs * (config.key_len + 1)
    return need + need % 2


# ---- random numbers that depend on the row alone -----------------------------------------------------------------------


def stream_key(*words):
    """A Philox key from small non-negative integers (seed, split, length, ...)."""
    return np.random.SeedSequence(words).generate_state(2, np.uint64)


def uniforms(key, rows, words):
    """(R, words) uniform doubles in [0, 1); the numbers of row r depend on (key, r) alone.

    Philox (Salmon et al. 2011) turns a counter into four numbers, so row r simply owns its own stretch of counters, and
    consecutive rows are one call.
    """
    blocks = -(-words // 4)
    out = np.empty((len(rows), 4 * blocks))
    starts = np.flatnonzero(np.diff(rows, prepend=rows[0] - 2) != 1)
    for a, b in zip(starts, [*starts[1:], len(rows)]):
        rng = np.random.Generator(np.random.Philox(key=key, counter=int(rows[a]) * blocks))
        out[a:b] = rng.random((b - a, 4 * blocks))
    return out[:, :words]


def draw_distinct(u, m):
    """n different numbers of range(m) per row, in random order: u (R, n) uniform -> (R, n). Fisher-Yates on many rows."""
    R, n = u.shape
    out = np.empty((R, n), dtype=np.int32)
    chunk = max(1, 2**21 // m)  # the pools of a chunk stay in cache
    fresh_pool = np.tile(np.arange(m, dtype=np.int32), (min(chunk, R), 1))
    for a in range(0, R, chunk):
        part = u[a : a + chunk]
        pool, r = fresh_pool[: len(part)].copy(), np.arange(len(part))
        for i in range(n):
            j = i + (part[:, i] * (m - i)).astype(np.int64)
            pool[r, j], pool[:, i] = pool[:, i].copy(), pool[r, j]
        out[a : a + chunk] = pool[:, :n]
    return out


def draw_slots(u, power_a):
    """Order in which S slots are drawn without replacement with weights s^(a-1), s = 1..S: u (R, S) -> (R, S) slots.

    Successive weighted draws have the same law as sorting exponential clocks E_s / weight_s (Efraimidis and Spirakis).
    """
    weight = np.arange(1, u.shape[1] + 1) ** (power_a - 1.0)
    return np.argsort(-np.log1p(-u) / weight, axis=1)


def skip_over(x, taken):
    """The x-th number that is not in `taken`: x (R, m) counts, taken (R, a) different numbers -> (R, m)."""
    a = taken.shape[1]
    gaps = np.sort(taken, axis=1) - np.arange(a)  # x is behind taken number i if x >= gaps[i]
    offset = np.arange(len(x))[:, None] * (2**31)  # one search over all rows: shift each row into its own range
    behind = np.searchsorted((gaps + offset).ravel(), (x + offset).ravel(), side="right").reshape(x.shape)
    return x + behind - np.arange(len(x))[:, None] * a


# ---- the task in memory ------------------------------------------------------------------------------------------------


def make_rows(cell, split, rows):
    """Rows of one cell: -> tokens (R, L) int32, targets (R, L) int32 (-100: not scored), tags.

    tags: {name: (N,)} for the N labelled positions in row-major order: num_kv_pairs, input_seq_len, cell ("128x32"), distance
    (tokens since the key was stored, rounded down to a power of two), and updated (0 or 1) where the task has updates.
    """
    c, L, n, u = cell.config, cell.length, cell.pairs, cell.updates
    R, key_tokens, half = len(rows), c.vocab_size // 2 - 1, c.vocab_size // 2
    noisy = c.gap > 0 or c.random_non_queries
    sizes = [cell.alphabet, n * (c.key_len > 1), n + u, u, cell.slots, (n + u) * (c.gap > 0), L * noisy]
    key = stream_key(c.seed, SPLITS[split], L, n)
    parts = np.split(uniforms(key, rows, sum(sizes)), np.cumsum(sizes)[:-1], axis=1)
    u_alphabet, u_keys, u_values, u_updates, u_slots, u_gaps, u_filler = parts
    r = np.arange(R)[:, None]

    alphabet = 1 + draw_distinct(u_alphabet, key_tokens)  # (R, alphabet)
    if c.key_len == 1:
        keys = alphabet[:, :, None]  # (R, n, key_len)
    else:  # n different words over the alphabet, as numbers in base `alphabet`
        word = draw_distinct(u_keys, cell.alphabet**c.key_len)  # (R, n)
        digits = word[:, :, None] // cell.alphabet ** np.arange(c.key_len) % cell.alphabet
        keys = alphabet[r[:, :, None], digits]
    values = half + draw_distinct(u_values, c.vocab_size - half)  # (R, n+u), one for each time something is stored
    again = draw_distinct(u_updates, n)  # (R, u), the pairs that are stored a second time
    stored = np.concatenate([np.tile(np.arange(n), (R, 1)), again], axis=1)  # (R, n+u), which pair is stored when
    answer = values[:, :n].copy()
    answer[r, again] = values[:, n:]

    if noisy:
        filler = skip_over((u_filler * (c.vocab_size - cell.alphabet)).astype(np.int64), alphabet).astype(np.int32)
    tokens = filler.copy() if c.random_non_queries else np.zeros((R, L), np.int32)
    if c.gap:
        tokens[:, : cell.storage] = filler[:, : cell.storage]

    noise = (u_gaps * (c.gap + 1)).astype(np.int64)  # (R, n+u), tokens of noise behind each stored pair
    start = np.tile(np.arange(n + u) * (c.key_len + 1), (R, 1))
    if c.gap:
        start[:, 1:] += np.cumsum(noise, axis=1)[:, :-1]
    letters = np.arange(c.key_len)
    tokens[r[:, :, None], start[:, :, None] + letters] = keys[r, stored]
    tokens[r, start + c.key_len] = values

    slot = draw_slots(u_slots, c.power_a)[:, :n]  # the i-th drawn slot asks for pair i
    ask = cell.storage + slot * (c.key_len + 1)  # (R, n)
    tokens[r[:, :, None], ask[:, :, None] + letters] = keys
    targets = np.full((R, L), IGNORE, np.int32)
    label = ask + c.key_len - 1  # on the last token of the key
    targets[r, label] = answer

    stored_at = start[:, :n].copy()
    stored_at[r, again] = start[:, n:]
    by_position = np.argsort(ask, axis=1)  # labels in row-major order
    distance = np.take_along_axis(2 ** np.log2(ask - stored_at).astype(np.int64), by_position, 1).ravel()
    tags = {"num_kv_pairs": np.full(R * n, n), "input_seq_len": np.full(R * n, L), "distance": distance}
    if len(c.test_cells or c.train_cells) > 1:
        tags["cell"] = np.full(R * n, f"{L}x{n}")
    if c.updates:
        updated = np.zeros((R, n), np.int64)
        updated[r, again] = 1
        tags["updated"] = np.take_along_axis(updated, by_position, 1).ravel()
    return tokens, targets, tags


def Data(config):
    """The task as train.py and eval.py use it: made in memory, or read from config.path.

    .vocab_size, .seq_len (the longest row), and
    .rows(step, batch_size) -> the global row numbers of a training step, a range
    .batch(split, step, rows) -> tokens (B, T) long, targets (B, T) long, tags {name: (N,) array}
    .segments(split) -> ranges of rows of one length, for evaluation
    .steps_per_epoch(batch_size)
    """
    return StoredData(config) if config.path else MadeData(config)


class MadeData:
    """Rows made when asked for."""

    def __init__(self, config):
        self.config = c = config
        self.vocab_size = c.vocab_size
        cells = c.train_cells or ((c.input_seq_len, c.num_kv_pairs),)
        self.train_cells = [Cell(*cell, c) for cell in cells]
        self.test_cells = [Cell(*cell, c) for cell in c.test_cells or cells]
        self.stages = [(Cell(shortest(n, c), n, c), steps) for n, steps in c.curriculum]
        self.seq_len = max(cell.length for cell in self.train_cells + self.test_cells)
        self.fixed = {}  # cell -> its fixed training set, made at first use

    def stage(self, step):
        """(cell, index of this step among the steps in that cell, is it a fixed set) for a training step."""
        for cell, steps in self.stages:
            if step < steps:
                return cell, step, False
            step -= steps
        turn = step % len(self.train_cells)
        return self.train_cells[turn], step // len(self.train_cells), not self.config.fresh

    def rows(self, step, batch_size):
        cell, visit, _ = self.stage(step)
        count = self.rows_per_step(cell, batch_size)
        return range(visit * count, (visit + 1) * count)

    def rows_per_step(self, cell, batch_size):
        """As many tokens a step in every cell: batch_size counts rows of input_seq_len tokens, shorter ones are more."""
        return max(1, batch_size * self.config.input_seq_len // cell.length)

    def steps_per_epoch(self, batch_size):
        """Steps that n_train_examples rows make up. Cells take equal turns, so short ones come round sooner than long ones."""
        share = self.config.n_train_examples / len(self.train_cells)
        return max(1, round(sum(share / self.rows_per_step(cell, batch_size) for cell in self.train_cells)))

    def segments(self, split):
        n = self.config.n_val_examples if split == "val" else self.config.n_test_examples
        return [range(i * n, (i + 1) * n) for i in range(len(self.test_cells))]

    def batch(self, split, step, rows):
        rows = np.asarray(rows, dtype=np.int64)
        if split == "train":
            cell, _, fixed = self.stage(step)
            tokens, targets, tags = self.from_fixed_set(cell, rows) if fixed else make_rows(cell, split, rows)
        else:
            segment = rows // len(self.segments(split)[0])
            if (segment != segment[0]).any():
                raise ValueError("the rows of one batch must come from one segment")
            tokens, targets, tags = make_rows(self.test_cells[segment[0]], split, rows)
        return torch.from_numpy(tokens).long(), torch.from_numpy(targets).long(), tags

    def from_fixed_set(self, cell, rows):
        """Training row r is row r % n of pass r // n over the set, each pass in its own order."""
        n = max(1, self.config.n_train_examples // len(self.train_cells))
        if cell not in self.fixed:
            self.fixed[cell] = make_rows(cell, "train", np.arange(n))
        which = np.empty_like(rows)
        for number in np.unique(rows // n):
            key = stream_key(self.config.seed, len(SPLITS), cell.length, cell.pairs, int(number))
            order = np.random.Generator(np.random.Philox(key=key)).permutation(n)
            mine = rows // n == number
            which[mine] = order[rows[mine] % n]
        tokens, targets, tags = self.fixed[cell]
        return tokens[which], targets[which], {k: v.reshape(n, -1)[which].ravel() for k, v in tags.items()}


# ---- the data set on disk ----------------------------------------------------------------------------------------------


@dataclass
class StoreConfig:
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
        configs.one_of(self, ("parquet", "jsonl"), "output_format")
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
        bits = sum(log2_falling(m, B * n) if B * n <= m else B * log2_falling(m, n) for m in (V // 2 - 1, V - V // 2))
        chance = 2 * math.log2(3 * self.num_samples) - 1 - bits
        message = f"vocab_size={V} and num_kv_pairs={self.num_kv_pairs} allow too few different rows to keep the splits apart"
        require(chance < -40, message + "; raise either, or lower num_samples", "vocab_size")


def log2_falling(m, n):
    """log2 of m (m-1) ... (m-n+1)."""
    return (math.lgamma(m + 1) - math.lgamma(m - n + 1)) / math.log(2)


def keys_disjoint(c):
    """Are the keys of a row different across its blocks too? Only if there are enough of them."""
    return c.seq_len // 4 <= c.vocab_size // 2 - 1


def make_stored_rows(c, split, rows):
    """input_ids (R, L) int32 and labels (R, L) int32 of StoreConfig c, L = B blocks of [n pairs | the n pairs, reordered]."""
    n, B, R = c.num_kv_pairs, c.seq_len // (4 * c.num_kv_pairs), len(rows)
    u = uniforms(stream_key(c.seed, SPLITS[split], c.seq_len, n), rows, 3 * B * n)
    u_keys, u_values, u_order = np.split(u, 3, axis=1)  # each (R, B*n)

    def draw(u, m, disjoint):
        return (draw_distinct(u, m) if disjoint else draw_distinct(u.reshape(R * B, n), m)).reshape(R, B, n)

    half, last = c.vocab_size // 2, c.vocab_size - c.vocab_size // 2
    keys = 1 + draw(u_keys, half - 1, keys_disjoint(c))
    values = half + draw(u_values, last, B * n <= last)
    pairs = np.stack([keys, values], axis=-1)  # (R, B, n, 2)
    # slot s of draw_slots has weight s^(a-1): let slot 1 be the pair stored last
    order = n - 1 - draw_slots(u_order.reshape(R * B, n), c.power_a).reshape(R, B, n)
    queries = np.take_along_axis(pairs, order[..., None], axis=2)
    labels = np.full((R, B, 2, n, 2), IGNORE, np.int32)
    labels[:, :, 1, :, 1] = queries[..., 1]
    return np.stack([pairs, queries], axis=2).reshape(R, c.seq_len), labels.reshape(R, c.seq_len)


def write_dataset(c, shard_rows=20000):
    """Write train/, validation/ and test/ shards, orders/ and metadata.json; return the metadata.

    Everything goes to a temporary directory beside output_dir, which gets its name only when all of it is on disk: a
    directory of that name is always complete. Memory does not grow with num_samples: half a million tokens are written at
    a time, in both formats. Copies of the training split are orders/train.npy, (num_copies, num_samples) row numbers.
    """
    target = os.path.abspath(c.output_dir)
    if os.path.exists(target):
        raise ConfigError(f"{c.output_dir} exists already; name another --output-dir or delete it first", "output_dir")
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        work = tempfile.mkdtemp(prefix=os.path.basename(target) + ".partial-", dir=os.path.dirname(target))
    except OSError as e:
        raise ConfigError(f"cannot write beside {c.output_dir}: {e.strerror}", "output_dir") from None
    try:
        splits = {name: write_split(c, work, name, shard_rows) for name in ("train", "validation", "test")}
        metadata = describe(c, splits)
        if c.num_copies > 1:
            metadata["orders"] = write_orders(c, work)
        with open(os.path.join(work, "metadata.json"), "w") as f:
            json.dump(metadata, f, indent=1)
            sync(f)
        os.chmod(work, 0o755)  # mkdtemp made it private
        os.rename(work, target)
    except OSError as e:
        raise ConfigError(f"writing {c.output_dir} failed ({e.strerror or e}); nothing was left behind") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
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
            with open(path, "wb") as f:
                WRITERS[c.output_format](f, c, split, chunks, bar)
                sync(f)
            file = {"name": f"{name}/{os.path.basename(path)}", "rows": last - first, "bytes": os.path.getsize(path)}
            files.append(file | {"sha256": file_hash(path)})
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
            tokens, labels = make_stored_rows(c, split, np.arange(rows.start, rows.stop))
            ends = pa.array(np.arange(len(rows) + 1, dtype=np.int32) * c.seq_len)
            flat = (tokens, labels, np.ones(tokens.shape, np.int8))
            lists = [pa.ListArray.from_arrays(ends, pa.array(x.ravel())) for x in flat]
            writer.write_table(pa.Table.from_arrays(lists, schema=schema))
            bar.update(len(rows))


def write_jsonl(f, c, split, chunks, bar):
    ones = [1] * c.seq_len
    for rows in chunks:
        tokens, labels = make_stored_rows(c, split, np.arange(rows.start, rows.stop))
        for ids, label in zip(tokens.tolist(), labels.tolist()):
            row = {"input_ids": ids, "labels": label, "attention_mask": ones}
            f.write(json.dumps(row, separators=(",", ":")).encode() + b"\n")
        bar.update(len(rows))


WRITERS = {"parquet": write_parquet, "jsonl": write_jsonl}


def write_orders(c, work):
    """Write orders/train.npy, (num_copies, num_samples): the row numbers of each copy; return {name, sha256}."""
    os.mkdir(os.path.join(work, "orders"))
    path = os.path.join(work, "orders", "train.npy")
    orders = np.lib.format.open_memmap(path, "w+", np.uint32, (c.num_copies, c.num_samples))
    for copy in range(c.num_copies):
        order = np.arange(c.num_samples, dtype=np.uint32)
        np.random.Generator(np.random.Philox(key=stream_key(c.seed, len(SPLITS), copy))).shuffle(order)
        orders[copy] = order
    orders.flush()
    return {"name": "orders/train.npy", "sha256": file_hash(path)}


def describe(c, splits):
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


def sync(f):
    f.flush()
    os.fsync(f.fileno())


def file_hash(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class StoredData:
    """A directory that write_dataset wrote, read into memory and checked against its checksums."""

    def __init__(self, config):
        self.path = config.path
        self.limit = {"val": config.n_val_examples, "test": config.n_test_examples}  # evaluating 100,000 rows takes minutes
        self.metadata = m = self.read_metadata()
        self.vocab_size, self.seq_len = m["vocab_size"], m["seq_len"]
        self.splits = {}
        orders = self.checked(m["orders"]) if "orders" in m else None
        self.orders = np.load(orders, mmap_mode="r") if orders else np.arange(m["num_samples"])[None]

    def read_metadata(self):
        try:
            with open(os.path.join(self.path, "metadata.json")) as f:
                metadata = json.load(f)
            if metadata["dataset_type"] != "mqar" or metadata["format_version"] != 1:
                raise ValueError
            return {k: metadata[k] for k in ("num_samples", "num_kv_pairs", "vocab_size", "seq_len", "files")} | metadata
        except FileNotFoundError:
            make = "`python data_mqar.py --output-dir DIR` makes one"
            raise ConfigError(f"path={self.path} holds no data set (no metadata.json there); {make}", "path") from None
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(f"{self.path}/metadata.json is not that of an MQAR data set", "path") from None

    def load(self, split):
        """-> tokens (rows, L) int32, targets (rows, L) int32 with labels shifted onto the position that predicts them."""
        if split not in self.splits:
            name = {"val": "validation"}.get(split, split)
            files = self.metadata["files"][name]
            size = sum(f["rows"] for f in files), self.seq_len
            tokens, targets, first = np.empty(size, np.int32), np.full(size, IGNORE, np.int32), 0
            for file in tqdm(files, desc=f"read {name}", disable=not sys.stderr.isatty()):
                ids, labels = self.read_shard(file)
                tokens[first : first + len(ids)] = ids
                targets[first : first + len(ids), :-1] = labels[:, 1:]
                first += len(ids)
            self.splits[split] = tokens, targets
        return self.splits[split]

    def checked(self, file):
        """The path of a file of the data set, once its checksum is right."""
        path = os.path.join(self.path, file["name"])
        if not os.path.isfile(path) or file_hash(path) != file["sha256"]:
            raise ConfigError(f"{path} is missing or damaged (its checksum differs); write the data set again", "path")
        return path

    def read_shard(self, file):
        path = self.checked(file)
        if path.endswith(".jsonl"):
            with open(path) as f:
                rows = [json.loads(line) for line in f]
            return [np.array([r[k] for r in rows], np.int32) for k in ("input_ids", "labels")]
        import pyarrow.parquet as pq

        table = pq.read_table(path, columns=["input_ids", "labels"], page_checksum_verification=True)
        return [c.combine_chunks().flatten().to_numpy().reshape(-1, self.seq_len) for c in table.columns]

    def rows(self, step, batch_size):
        return range(step * batch_size, (step + 1) * batch_size)

    def steps_per_epoch(self, batch_size):
        return max(1, self.orders.size // batch_size)

    def segments(self, split):
        return [range(min(self.metadata["num_samples"], self.limit[split]))]

    def batch(self, split, step, rows):
        rows, (tokens, targets) = np.asarray(rows, dtype=np.int64), self.load(split)
        if split == "train":  # row r of training: the copies one after another, then from the start again
            rows = self.orders.reshape(-1)[rows % self.orders.size].astype(np.int64)
        n, labels = self.metadata["num_kv_pairs"], self.seq_len // 4
        tags = {"num_kv_pairs": np.full(len(rows) * labels, n), "input_seq_len": np.full(len(rows) * labels, self.seq_len)}
        tags["query"] = np.tile(np.arange(labels) % n, len(rows))  # 0: the first query of its block
        return torch.from_numpy(tokens[rows]).long(), torch.from_numpy(targets[rows]).long(), tags


# ---- command line ------------------------------------------------------------------------------------------------------


def show_row(**columns):
    """Print one row per line, tokens under each other; -100 as a dot."""
    name_width = max(map(len, columns))
    width = max(len(str(t)) for row in columns.values() for t in row if t != IGNORE)
    for name, row in columns.items():
        print(name.ljust(name_width), " ".join(("." if t == IGNORE else str(t)).rjust(width) for t in row))


def show(config):
    """Print training row 0 of an in-memory task."""
    tokens, targets, _ = make_rows(Cell(config.input_seq_len, config.num_kv_pairs, config), "train", np.arange(1))
    show_row(tokens=tokens[0].tolist(), labels=targets[0].tolist())


def show_stored(config):
    """Print training row 0 of a data set on disk."""
    ids, labels = make_stored_rows(config, "train", np.arange(1))
    show_row(input_ids=ids[0].tolist(), labels=labels[0].tolist())


def main(argv=None):
    words, settings = configs.collect(sys.argv[1:] if argv is None else argv)
    if any(s.key == "help" for s in settings):
        print(configs.help_text(__doc__, StoreConfig))
        return
    require(not words, f"{' '.join(words)!r} is neither an override file (.py) nor a flag (--key=value)", None)
    configs.check_names(settings, StoreConfig)
    config = configs.build(StoreConfig, settings)
    if not config.output_dir:
        require(not settings, "name the directory to write: --output-dir DIR", "output_dir")
        print(__doc__.strip())
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the temporary directory goes
    start = time.perf_counter()
    metadata = write_dataset(config)
    seconds = time.perf_counter() - start
    size = sum(f["bytes"] for files in metadata["files"].values() for f in files) / 1e6
    tokens = 3 * config.num_samples * config.seq_len
    print(f"{config.output_dir}: {3 * config.num_samples} rows, {tokens / 1e6:.1f} M tokens, {size:.1f} MB on disk")
    print(f"{seconds:.1f} s, {size / seconds:.1f} MB/s written, {tokens / 1e6 / seconds:.1f} M tokens/s")


if __name__ == "__main__":
    configs.exit_with_sentence(main)
