"""Multi-query associative recall (MQAR): pairs of a key and a value, then the keys again; say the value of each.

    python data_mqar.py                                            # print an example and this text
    python data_mqar.py --output-dir mqar_data --num-samples 100000 --seq-len 512 --num-kv-pairs 16 \\
        --vocab-size 32000 --power-a 0.01 --num-copies 100 --output-format parquet
    python train.py --data data_mqar --path mqar_data              # train on what that wrote

Two layouts of one task. In memory, for training (`Data`), as in Zoology (arXiv 2312.04927): the value is never in the
input after a query, and its target is at the query's own position (logits there predict it; nothing to shift).

>>> show(Config(input_seq_len=16, num_kv_pairs=3, vocab_size=20, seed=1))
tokens   5 19  7 17  4 15  7  0  5  0  4  0  0  0  0  0
targets  .  .  .  .  .  . 17  . 19  . 15  .  .  .  .  .

On disk, for others (`write_dataset`), as in the LLMonade data set: storage and queries both hold the values, several
such blocks fill a row, and labels are unshifted (labels[i] == input_ids[i] at the values of the query half).

>>> show_stored(DatasetConfig(seq_len=16, num_kv_pairs=4, vocab_size=20, seed=0))
input_ids  4 11  3 16  6 13  2 19  6 13  2 19  3 16  4 11
labels     .  .  .  .  .  .  .  .  . 13  . 19  . 16  . 11

Every row is a pure function of (seed, split, length, pairs, row number): no batch size, call order or other generator
changes it. Letters: R rows, L tokens in a row, n pairs, u updates, V vocabulary, S query slots.
"""

import math
import os
import sys
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch

from nanorecall.mqar_files import DatasetConfig, StoredMQAR, make_disk_sequences, write_dataset
from nanorecall.rng import (
    IGNORE_INDEX,
    SPLITS,
    nth_not_in,
    philox_key,
    row_uniforms,
    sample_without_replacement,
    shuffled_epochs,
    weighted_permutation,
)
from nanorecall.settings import (
    ConfigError,
    at_least,
    build_config,
    help_text,
    read_argv,
    reject_unknown,
    require,
    run_cli,
    say,
    within,
)


@dataclass
class Config:
    input_seq_len: int = 128  # tokens in a row
    num_kv_pairs: int = 32  # pairs in a row, each queried once
    vocab_size: int = 2048  # token 0 is blank, keys are 1..V/2-1, values V/2..V-1
    power_a: float = 0.01  # query slot s has weight s^(a-1): 1 is uniform, small asks early pairs early
    random_non_queries: bool = False  # fill blanks with random tokens, never with one of the row's keys
    n_train_examples: int = 40000  # rows in the training set, and in an epoch
    n_val_examples: int = 1000  # rows per cell of the split that training watches; of a path, at most this many
    n_test_examples: int = 3000  # rows per cell of the split that is measured once, at the end; likewise
    fresh: bool = False  # new training rows for ever, instead of a fixed set seen again each epoch
    curriculum: tuple[tuple[int, int], ...] = ()  # first, stages (pairs, steps) of short fresh rows; same tokens a step
    train_cells: tuple[tuple[int, int], ...] = ()  # cells (length, pairs) that steps take turns in; empty: the one above
    test_cells: tuple[tuple[int, int], ...] = ()  # cells of val and test, reported one by one; empty: as in training
    updates: int = 0  # this many of the keys are stored again with a new value; the last one counts
    gap: int = 0  # 0..gap random tokens after each stored pair
    key_len: int = 1  # tokens in a key; longer keys are words over a small alphabet, so that they share tokens
    path: str = ""  # a directory that `python data_mqar.py --output-dir` wrote, to train on instead
    seed: int = 0  # of data and model

    def check(self):
        at_least(self, 0, "updates", "gap", "seed", "power_a")
        at_least(self, 1, "n_train_examples", "key_len", "num_kv_pairs")
        within(self, 1, 2**40, "n_val_examples", "n_test_examples")
        if self.path:
            return
        most = max(pairs for _, pairs in self.train_cells or ((0, self.num_kv_pairs),))
        message = f"updates={self.updates} exceeds the {most} pairs of a row: a pair is stored again once at most"
        require(self.updates <= most, message, "updates")
        for name in ("train_cells", "test_cells"):
            for length, pairs in getattr(self, name):
                TaskSize(length, pairs, self).check(name)
        if not self.train_cells:
            TaskSize(self.input_seq_len, self.num_kv_pairs, self).check("input_seq_len")
        # A cell that came twice would get the same rows twice.
        stages = [(min_length(pairs, self), pairs) for pairs, _ in self.curriculum if pairs >= 1]
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
            length = min_length(pairs, self)
            TaskSize(length, pairs, self).check("curriculum")
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
class TaskSize:
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
        need = min_length(n, self.config)
        require(self.slots >= n, f"{key}: {n} pairs need a row of at least {need} tokens, not {L}", key)
        require(L <= 2**20, f"{key}: a row of {L} tokens is longer than {2**20}", key)
        smallest = 2 * max(self.alphabet + 1, n + self.updates)
        message = f"vocab_size={V} is too small for {n} pairs: half of it are keys, half values; use at least {smallest}"
        require(V >= smallest, message, "vocab_size")
        require(V <= 2**24, f"vocab_size={V} is larger than {2**24}", "vocab_size")
        words = self.alphabet**self.config.key_len if self.config.key_len <= 20 else math.inf
        require(words <= 2**20, f"key_len={self.config.key_len} is too long: there are more than {2**20} such keys", "key_len")


def min_length(pairs, config):
    """The least (even) number of tokens that holds `pairs` pairs and their queries: 4 per pair in the plain task."""
    cell = TaskSize(0, pairs, config)
    need = cell.storage + pairs * (config.key_len + 1)
    return need + need % 2


# ---- the task in memory ------------------------------------------------------------------------------------------------


def make_sequences(cell, split, rows):
    """Rows of one cell: -> tokens (R, L) int32, targets (R, L) int32 (-100: not scored), tags.

    tags: {name: (N,)} for the N labelled positions in row-major order: num_kv_pairs, input_seq_len, cell ("128x32"), distance
    (tokens since the key was stored, rounded down to a power of two), and updated (0 or 1) where the task has updates.
    """
    c, L, n, u = cell.config, cell.length, cell.pairs, cell.updates
    R, key_tokens, half = len(rows), c.vocab_size // 2 - 1, c.vocab_size // 2
    noisy = c.gap > 0 or c.random_non_queries
    sizes = [cell.alphabet, n * (c.key_len > 1), n + u, u, cell.slots, (n + u) * (c.gap > 0), L * noisy]
    key = philox_key(c.seed, SPLITS[split], L, n)
    parts = np.split(row_uniforms(key, rows, sum(sizes)), np.cumsum(sizes)[:-1], axis=1)
    u_alphabet, u_keys, u_values, u_updates, u_slots, u_gaps, u_filler = parts
    r = np.arange(R)[:, None]

    alphabet = 1 + sample_without_replacement(u_alphabet, key_tokens)  # (R, alphabet)
    if c.key_len == 1:
        keys = alphabet[:, :, None]  # (R, n, key_len)
    else:  # n different words over the alphabet, as numbers in base `alphabet`
        word = sample_without_replacement(u_keys, cell.alphabet**c.key_len)  # (R, n)
        digits = word[:, :, None] // cell.alphabet ** np.arange(c.key_len) % cell.alphabet
        keys = alphabet[r[:, :, None], digits]
    values = half + sample_without_replacement(u_values, c.vocab_size - half)  # (R, n+u), one for each time something is stored
    again = sample_without_replacement(u_updates, n)  # (R, u), the pairs that are stored a second time
    stored = np.concatenate([np.tile(np.arange(n), (R, 1)), again], axis=1)  # (R, n+u), which pair is stored when
    answer = values[:, :n].copy()
    answer[r, again] = values[:, n:]

    if noisy:
        filler = nth_not_in((u_filler * (c.vocab_size - cell.alphabet)).astype(np.int64), alphabet).astype(np.int32)
    tokens = filler.copy() if c.random_non_queries else np.zeros((R, L), np.int32)
    if c.gap:
        tokens[:, : cell.storage] = filler[:, : cell.storage]

    noise = (u_gaps * (c.gap + 1)).astype(np.int64)  # (R, n+u), tokens of noise after each stored pair
    start = np.tile(np.arange(n + u) * (c.key_len + 1), (R, 1))
    if c.gap:
        start[:, 1:] += np.cumsum(noise, axis=1)[:, :-1]
    letters = np.arange(c.key_len)
    tokens[r[:, :, None], start[:, :, None] + letters] = keys[r, stored]
    tokens[r, start + c.key_len] = values

    slot = weighted_permutation(u_slots, c.power_a)[:, :n]  # the i-th drawn slot asks for pair i
    ask = cell.storage + slot * (c.key_len + 1)  # (R, n)
    tokens[r[:, :, None], ask[:, :, None] + letters] = keys
    targets = np.full((R, L), IGNORE_INDEX, np.int32)
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
    return StoredMQAR(config) if config.path else InMemoryMQAR(config)


class InMemoryMQAR:
    """Rows made when asked for."""

    def __init__(self, config):
        self.config = c = config
        self.vocab_size = c.vocab_size
        cells = c.train_cells or ((c.input_seq_len, c.num_kv_pairs),)
        self.train_cells = [TaskSize(*cell, c) for cell in cells]
        self.test_cells = [TaskSize(*cell, c) for cell in c.test_cells or cells]
        self.stages = [(TaskSize(min_length(n, c), n, c), steps) for n, steps in c.curriculum]
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
            tokens, targets, tags = self.from_fixed_set(cell, rows) if fixed else make_sequences(cell, split, rows)
        else:
            segment = rows // len(self.segments(split)[0])
            if (segment != segment[0]).any():
                raise ValueError("the rows of one batch must come from one segment")
            tokens, targets, tags = make_sequences(self.test_cells[segment[0]], split, rows)
        return torch.from_numpy(tokens).long(), torch.from_numpy(targets).long(), tags

    def from_fixed_set(self, cell, rows):
        """Training rows in passes over the set, each pass in its own order (draws.rows_of_passes)."""
        n = max(1, self.config.n_train_examples // len(self.train_cells))
        if cell not in self.fixed:
            self.fixed[cell] = make_sequences(cell, "train", np.arange(n))
        which = shuffled_epochs(rows, n, self.config.seed, len(SPLITS), cell.length, cell.pairs)
        tokens, targets, tags = self.fixed[cell]
        return tokens[which], targets[which], {k: v.reshape(n, -1)[which].ravel() for k, v in tags.items()}


# ---- command line ------------------------------------------------------------------------------------------------------


def show_row(**columns):
    """Print one row per line, tokens under each other; -100 as a dot."""
    name_width = max(map(len, columns))
    width = max(len(str(t)) for row in columns.values() for t in row if t != IGNORE_INDEX)
    for name, row in columns.items():
        print(name.ljust(name_width), " ".join(("." if t == IGNORE_INDEX else str(t)).rjust(width) for t in row))


def show(config):
    """Print training row 0 of an in-memory task."""
    tokens, targets, _ = make_sequences(TaskSize(config.input_seq_len, config.num_kv_pairs, config), "train", np.arange(1))
    show_row(tokens=tokens[0].tolist(), targets=targets[0].tolist())


def show_stored(config):
    """Print training row 0 of a data set on disk."""
    ids, labels = make_disk_sequences(config, "train", np.arange(1))
    show_row(input_ids=ids[0].tolist(), labels=labels[0].tolist())


def main(argv=None):
    words, settings = read_argv(sys.argv[1:] if argv is None else argv)
    if any(s.key == "help" for s in settings):
        say(help_text(__doc__, DatasetConfig))
        return
    require(not words, f"{' '.join(words)!r} is neither an override file (.py) nor a flag (--key=value)", None)
    reject_unknown(settings, DatasetConfig)
    config = build_config(DatasetConfig, settings)
    if not config.output_dir:
        require(not settings, "name the directory to write: --output-dir DIR", "output_dir")
        print(__doc__.strip())
        return
    start = time.perf_counter()
    metadata = write_dataset(config)
    seconds = time.perf_counter() - start
    size = sum(f["bytes"] for files in metadata["files"].values() for f in files) / 1e6
    tokens = 3 * config.num_samples * config.seq_len
    say(f"{config.output_dir}: {3 * config.num_samples} rows, {tokens / 1e6:.1f} M tokens, {size:.1f} MB on disk")
    print(f"{seconds:.1f} s, {size / seconds:.1f} MB/s written, {tokens / 1e6 / seconds:.1f} M tokens/s")


if __name__ == "__main__":
    run_cli(main)
