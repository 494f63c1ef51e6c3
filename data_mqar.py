"""Multi-query associative recall (MQAR): store pairs of a key and a value, then query the keys.

    python data_mqar.py                                # print this text, with an example
    python data_mqar.py --output-dir mqar_data --num-samples 100000 --seq-len 512 \\
        --num-kv-pairs 16 --vocab-size 32000 --power-a 0.01 --num-copies 100
    python train.py --data data_mqar --path mqar_data  # train on what that wrote

In memory, for training (`Data`), sequences are those of Zoology (arXiv 2312.04927). A query is not
followed by its value in the input. The value is the target at the position of the query.

>>> show(Config(input_seq_len=16, num_kv_pairs=3, vocab_size=20, seed=1))
tokens   5 19  7 17  4 15  7  0  5  0  4  0  0  0  0  0
targets  .  .  .  .  .  . 17  . 19  . 15  .  .  .  .  .

Below, two of three pairs are queried; the third is a distractor. Values have two tokens. The first
of them follows the query in the input, and is there to predict the second.

>>> options = dict(num_queries=2, value_tokens=2, vocab_size=20, seed=1)
>>> show(Config(input_seq_len=16, num_kv_pairs=3, **options))
tokens   5 19 17  7 14 15  4 10 13  4 10  0  5 19  0  0
targets  .  .  .  .  .  .  .  .  . 10 13  . 19 17  .  .

On disk, also for other programs (nanorecall/mqar_files.py), sequences are those of the LLMonade
data set. Queries are followed by their values, several blocks of pairs and queries fill a sequence,
and labels are not shifted: a label is at the position of its own token.

>>> show_on_disk(DatasetConfig(seq_len=16, num_kv_pairs=4, vocab_size=20, seed=0))
input_ids  4 11  3 16  6 13  2 19  6 13  2 19  3 16  4 11
labels     .  .  .  .  .  .  .  .  . 13  . 19  . 16  . 11

Each sequence is a pure function of the settings, split, length, pairs and index. It is the same in
every batch and at every batch size.

Letters: B sequences, T tokens, V vocabulary, n pairs, q queries, u updates, N labels.
"""

import math
import os
import sys
from dataclasses import dataclass

import numpy as np
import torch

from nanorecall.curriculum import Curriculum
from nanorecall.mqar_files import (
    DatasetConfig,  # noqa: F401 (in the example above)
    StoredMQAR,
    log2_permutations,
    parse_dataset,
    show_columns,
    show_on_disk,  # noqa: F401 (in the example above)
    write_and_report,
)
from nanorecall.rng import (
    IGNORE_INDEX,
    STREAMS,
    nth_not_in,
    philox_key,
    row_uniforms,
    sample_without_replacement,
    shuffled_epochs,
    weighted_permutation,
)
from nanorecall.settings import ConfigError, at_least, one_of, require, run_cli, within

IntPairs = tuple[tuple[int, int], ...]


@dataclass
class Config:
    input_seq_len: int = 128  # tokens in a sequence
    num_kv_pairs: int = 32  # pairs in a sequence, each queried at most once
    num_queries: int = 0  # pairs that are queried, the others are distractors; 0: all are queried
    vocab_size: int = 2048  # token 0 is blank, keys are 1..V/2-1, values V/2..V-1
    power_a: float = 0.01  # s-th query position: weight s^(a-1); 1: uniform; 0.01: mostly early
    random_non_queries: bool = False  # fill blanks with random tokens, never keys of the sequence
    n_train_examples: int = 40000  # sequences in the training set, and in an epoch
    n_val_examples: int = 1000  # validation sequences per size; with path, at most this many
    n_test_examples: int = 3000  # test sequences per size; with path, at most this many
    infinite_data: bool = False  # new training sequences in every step, not epochs over a fixed set
    curriculum: IntPairs = ()  # [(num_kv_pairs, steps), ...] to begin with, in short sequences
    stage_loss: float = 0.0  # leave a stage once its training loss is below this (nats); 0: no
    train_sizes: IntPairs = ()  # [(input_seq_len, num_kv_pairs), ...] in turn; empty: those above
    test_sizes: IntPairs = ()  # sizes to validate and test on, each reported; empty: train_sizes
    num_updates: int = 0  # keys that are stored again with a new value; the last value counts
    max_noise: int = 0  # 0..max_noise random tokens after each stored pair
    key_tokens: int = 1  # tokens in a key; longer keys share tokens, as words share letters
    value_tokens: int = 1  # tokens in a value; each is predicted from those before it
    loss_on: str = "answers"  # train on answers, or all: every next token; both measure answers
    path: str = ""  # train on a directory that `python data_mqar.py --output-dir` wrote instead
    seed: int = 0  # of data and model

    def sizes(self):
        return self.train_sizes or ((self.input_seq_len, self.num_kv_pairs),)

    def check(self):
        at_least(self, 0, "num_queries", "num_updates", "max_noise", "seed")
        at_least(self, 0, "power_a", "stage_loss")
        at_least(self, 1, "n_train_examples", "key_tokens", "num_kv_pairs")
        within(self, 1, 2**20, "value_tokens")
        one_of(self, ("answers", "all"), "loss_on")
        within(self, 1, 2**40, "n_val_examples", "n_test_examples")
        if self.path:
            return
        n = max(pairs for _, pairs in self.sizes())
        message = f"num_updates={self.num_updates} exceeds the {n} pairs"
        message += ": a pair is updated at most once"
        require(self.num_updates <= n, message, "num_updates")
        message = f"num_queries={self.num_queries} exceeds the {n} pairs"
        message += ": a pair is queried at most once"
        require(self.num_queries <= n, message, "num_queries")
        # Random keys and values cost several nats each, however well the answers are known.
        message = "stage_loss is a loss of answers; with loss_on=all set stage_loss=0"
        require(self.loss_on == "answers" or not self.stage_loss, message, "stage_loss")
        for setting in ("train_sizes", "test_sizes"):
            for length, pairs in getattr(self, setting):
                TaskSize(length, pairs, self).check(setting)
        if not self.train_sizes:
            TaskSize(self.input_seq_len, self.num_kv_pairs, self).check("input_seq_len")
        self.check_curriculum()
        n = self.n_train_examples
        n_tokens = n * max(length for length, _ in self.sizes())
        message = f"n_train_examples={n} do not fit in memory; use infinite_data=1"
        require(self.infinite_data or n_tokens <= 2**28, message, "n_train_examples")

    def check_curriculum(self):
        for pairs, steps in self.curriculum:
            message = f"curriculum: stage {(pairs, steps)} needs at least 1 pair and 1 step"
            require(min(pairs, steps) >= 1, message, "curriculum")
            T = min_length(pairs, self)
            TaskSize(T, pairs, self).check("curriculum")
            message = f"curriculum: {pairs} pairs need {T} tokens, more than input_seq_len"
            require(T <= self.input_seq_len, f"{message}={self.input_seq_len}", "curriculum")
        # Sequences are a function of their size: a size that comes twice would repeat its data.
        sizes = [(min_length(pairs, self), pairs) for pairs, _ in self.curriculum]
        sizes += self.sizes()
        twice = [size for size in sizes if sizes.count(size) > 1]
        if twice:
            setting = "train_sizes" if set(twice) & set(self.train_sizes) else "curriculum"
            message = f"{twice[0]} (tokens, pairs) comes twice in curriculum and train_sizes"
            raise ConfigError(f"{message}; name it once", setting)

    def unused(self):
        if self.path:
            used = ("path", "seed", "loss_on", "n_val_examples", "n_test_examples")
            reason = f"the data comes from path={self.path}"
            return {name: reason for name in vars(self) if name not in used}
        reasons = {}
        if self.train_sizes:
            reasons["num_kv_pairs"] = "train_sizes has it"
        if not self.curriculum:
            reasons["stage_loss"] = "there is no curriculum"
        return reasons

    def label(self):
        """The data's part of a run's name."""
        if self.path:
            return os.path.basename(os.path.normpath(self.path))
        sizes = "+".join(f"{length}-{pairs}" for length, pairs in self.sizes())
        return f"{sizes}-{self.vocab_size}"


@dataclass(frozen=True, eq=False)
class TaskSize:
    """Length and pairs of a sequence, and the layout that follows from them:
    storage_len tokens of pairs and noise, then n_query_slots slots, each as long as a pair: for a
    key, all tokens of its value but the last, and a blank."""

    length: int
    pairs: int
    config: Config

    @property
    def updates(self):
        return min(self.config.num_updates, self.pairs)

    @property
    def queries(self):
        return min(self.config.num_queries or self.pairs, self.pairs)

    @property
    def pair_len(self):
        return self.config.key_tokens + self.config.value_tokens

    @property
    def alphabet_size(self):
        """Tokens that keys are made of: one per key; for longer keys the fewest that give one key
        more than there are pairs, so that each token is in many keys."""
        if self.config.key_tokens == 1:
            return self.pairs
        return max(2, math.ceil((self.pairs + 1) ** (1 / self.config.key_tokens)))

    @property
    def storage_len(self):
        return (self.pairs + self.updates) * (self.pair_len + self.config.max_noise)

    @property
    def n_query_slots(self):
        return max(0, self.length - self.storage_len) // self.pair_len

    @property
    def log2_sequences(self):
        """log2 of how many different sequences there are, not counting where the queries are."""
        c, n = self.config, self.pairs
        n_values = c.vocab_size - c.vocab_size // 2
        n_keys = self.alphabet_size**c.key_tokens if c.key_tokens > 1 else c.vocab_size // 2 - 1
        keys = log2_permutations(n_keys, n)
        if c.value_tokens == 1:
            values = log2_permutations(n_values, n)
        else:
            values = n * c.value_tokens * math.log2(n_values)
        return keys + values + log2_permutations(n, self.queries)

    def check(self, setting):
        """ConfigError, which names this setting, if such sequences cannot be made."""
        c, T, n, V = self.config, self.length, self.pairs, self.config.vocab_size
        require(n >= 1, f"{setting}: there must be at least one pair, not {n}", setting)
        # As in Zoology, where pairs and query slots take two tokens each.
        require(T % 2 == 0, f"{setting}: a length of {T} is odd; use {T + 1}", setting)
        message = f"{setting}: {n} pairs need a sequence of at least {min_length(n, c)} tokens"
        require(self.n_query_slots >= self.queries, f"{message}, not {T}", setting)
        require(T <= 2**20, f"{setting}: {T} tokens are more than {2**20}", setting)
        n_values = n + self.updates if c.value_tokens == 1 else 1
        smallest = 2 * max(self.alphabet_size + 1, n_values)
        message = f"vocab_size={V} is too small for {n} pairs: half of it are keys, half values"
        require(V >= smallest, f"{message}; use at least {smallest}", "vocab_size")
        require(V <= 2**24, f"vocab_size={V} is larger than {2**24}", "vocab_size")
        n_keys = self.alphabet_size**c.key_tokens if c.key_tokens <= 20 else math.inf
        message = f"key_tokens={c.key_tokens} is too long: there are more than {2**20} such keys"
        require(n_keys <= 2**20, message, "key_tokens")


def min_length(pairs, config):
    """The least even number of tokens for these pairs and their queries; by default 4 a pair."""
    size = TaskSize(0, pairs, config)
    length = size.storage_len + size.queries * size.pair_len
    return length + length % 2


def make_sequences(size, split, indices):
    """Sequences `indices` (B,) of one TaskSize -> tokens (B, T) int32, targets (B, T) int32 (-100:
    not scored), slices.

    slices {name: (N,)}, of the N labels in row-major order: num_kv_pairs, input_seq_len, and
    distance (tokens since the key was stored, rounded down to a power of two). With several test
    sizes also size ("128x32"), with num_updates also updated (0 or 1), with values of several
    tokens also answer_pos (from 0).
    """
    n, n_key = size.pairs, size.config.key_tokens
    draws = draw_uniforms(size, split, indices)
    b = np.arange(len(indices))[:, None]
    alphabet, keys = draw_keys(size, draws)  # (B, n, key_tokens)
    values = draw_values(size, draws)  # (B, n+u, value_tokens)
    tokens = draw_filler(size, draws, alphabet)  # (B, T)

    # Store the pairs in order, then u of them again with a new value.
    updated = sample_without_replacement(draws["updates"], n)  # (B, u)
    stored = np.concatenate([np.tile(np.arange(n), (len(b), 1)), updated], axis=1)  # (B, n+u)
    start = storage_positions(size, draws)  # (B, n+u)
    put(tokens, start, keys[b, stored])
    put(tokens, start + n_key, values)
    answers = values[:, :n].copy()
    answers[b, updated] = values[:, n:]

    # Query q of them. The last token of a value does not follow its query, it is only predicted.
    queried = draw_queried(size, draws)  # (B, q)
    query_pos = query_positions(size, draws)  # (B, q)
    put(tokens, query_pos, keys[b, queried])
    put(tokens, query_pos + n_key, answers[b, queried, :-1])
    # Only answers are scored: pairs are random, and blanks are easy to predict.
    targets = np.full(tokens.shape, IGNORE_INDEX, np.int32)
    put(targets, query_pos + n_key - 1, answers[b, queried])  # from the key's last token on

    stored_pos = start[:, :n].copy()
    stored_pos[b, updated] = start[:, n:]
    is_updated = np.zeros((len(b), n), np.int64)
    is_updated[b, updated] = 1
    slices = label_slices(size, query_pos, stored_pos[b, queried], is_updated[b, queried])
    return tokens, targets, slices


def draw_uniforms(size, split, indices):
    """All random numbers of sequences `indices`: {what they are for: (B, how many)}.

    They come from one call. The generator is counter-based (Philox): sequence i has numbers of its
    own, whichever other sequences are in the batch. So ranks can split a batch, and a resumed run
    needs no state of a generator.
    """
    c, T, n, u = size.config, size.length, size.pairs, size.updates
    n_draws = {
        "alphabet": size.alphabet_size,
        "keys": n if c.key_tokens > 1 else 0,
        "values": (n + u) * c.value_tokens,
        "updates": u,
        "slots": size.n_query_slots,
        "gaps": n + u if c.max_noise else 0,
        "filler": T if c.max_noise or c.random_non_queries else 0,
        "queried": size.queries if size.queries < n else 0,
    }
    key = philox_key(c.seed, STREAMS[split], T, n)
    uniforms = row_uniforms(key, indices, sum(n_draws.values()))
    ends = np.cumsum(list(n_draws.values()))
    return dict(zip(n_draws, np.split(uniforms, ends[:-1], axis=1)))


def draw_keys(size, draws):
    """-> the tokens of keys (B, alphabet), keys (B, n, key_tokens).

    Keys are all different: a key that comes twice would have two answers.
    """
    n_key, half = size.config.key_tokens, size.config.vocab_size // 2
    alphabet = 1 + sample_without_replacement(draws["alphabet"], half - 1)
    if n_key == 1:
        return alphabet, alphabet[:, :, None]
    # different numbers, written with key_tokens digits of base `alphabet`
    numbers = sample_without_replacement(draws["keys"], size.alphabet_size**n_key)  # (B, n)
    digits = numbers[:, :, None] // size.alphabet_size ** np.arange(n_key) % size.alphabet_size
    b = np.arange(len(alphabet))[:, None, None]
    return alphabet, alphabet[b, digits]


def draw_values(size, draws):
    """-> (B, n+u, value_tokens), a value for each time that a pair is stored.

    Values of one token are all different, as in Zoology. Of longer ones each token is any token of
    values.
    """
    c, half = size.config, size.config.vocab_size // 2
    n_tokens = c.vocab_size - half
    if c.value_tokens == 1:
        return half + sample_without_replacement(draws["values"], n_tokens)[:, :, None]
    values = half + (draws["values"] * n_tokens).astype(np.int32)
    return values.reshape(len(values), -1, c.value_tokens)


def draw_filler(size, draws, alphabet):
    """-> (B, T) int32, what stands between pairs and queries: blanks or random tokens."""
    c, T = size.config, size.length
    tokens = np.zeros((len(alphabet), T), np.int32)
    if c.max_noise or c.random_non_queries:
        # A key of the sequence among the noise would be one more query, or one more pair.
        noise = (draws["filler"] * (c.vocab_size - size.alphabet_size)).astype(np.int64)
        noise_len = T if c.random_non_queries else size.storage_len
        tokens[:, :noise_len] = nth_not_in(noise, alphabet)[:, :noise_len]
    return tokens


def storage_positions(size, draws):
    """-> (B, n+u), of the first token of each stored pair."""
    n_stored = size.pairs + size.updates
    start = np.tile(np.arange(n_stored) * size.pair_len, (len(draws["gaps"]), 1))
    if size.config.max_noise:
        gaps = (draws["gaps"] * (size.config.max_noise + 1)).astype(np.int64)
        start[:, 1:] += np.cumsum(gaps, axis=1)[:, :-1]
    return start


def draw_queried(size, draws):
    """-> (B, q), the numbers of the pairs that are queried, in the order in which they are stored.

    The others are distractors: they take as much memory, and lie between the queried ones.
    """
    if size.queries == size.pairs:
        return np.tile(np.arange(size.pairs), (len(draws["queried"]), 1))
    return np.sort(sample_without_replacement(draws["queried"], size.pairs), axis=1)


def query_positions(size, draws):
    """-> (B, q), of the first token of each queried key.

    Each pair in turn, in the order of storage, draws a slot without replacement. With a small
    power_a, most queries come soon after the pairs and a few much later (Zoology).
    """
    slots = weighted_permutation(draws["slots"], size.config.power_a)[:, : size.queries]
    return size.storage_len + slots * size.pair_len


def put(tokens, start, spans):
    """Write spans (B, m, w), m of w tokens each, into tokens (B, T) from start (B, m) on."""
    b = np.arange(len(tokens))[:, None, None]
    tokens[b, start[:, :, None] + np.arange(spans.shape[2])] = spans


def label_slices(size, query_pos, stored_pos, is_updated):
    """Arrays (B, q) in the order of the pairs -> slices (N,) in the order of the labels.

    query_pos, stored_pos: of the first tokens of the queried key, and of its pair.
    """
    c, n_value = size.config, size.config.value_tokens
    by_position = np.argsort(query_pos, axis=1)

    def of_labels(values):
        return np.repeat(np.take_along_axis(values, by_position, axis=1), n_value)

    n_labels = query_pos.size * n_value
    slices = {
        "num_kv_pairs": np.full(n_labels, size.pairs),
        "input_seq_len": np.full(n_labels, size.length),
        "distance": of_labels(2 ** np.log2(query_pos - stored_pos).astype(np.int64)),
    }
    if len(c.test_sizes or c.train_sizes) > 1:
        slices["size"] = np.full(n_labels, f"{size.length}x{size.pairs}")
    if c.num_updates:
        slices["updated"] = of_labels(is_updated)
    if n_value > 1:
        slices["answer_pos"] = np.tile(np.arange(n_value), query_pos.size)
    return slices


def next_token_targets(tokens, targets):
    """Targets for loss_on=all: the answers, and the next token wherever no answer is due.

    tokens, targets (B, T) -> (B, T); -100 at the end.
    """
    following = torch.full_like(targets, IGNORE_INDEX)
    following[:, :-1] = tokens[:, 1:]
    return torch.where(targets == IGNORE_INDEX, following, targets)


class Data:
    """The task as train.py and eval.py use it: made in memory, or read from config.path.

    .vocab_size, .seq_len (of the longest sequence), .curriculum, .notes (lines for the start of a
    training), and the methods below.
    """

    def __init__(self, config):
        self.config = config
        self.source = StoredMQAR(config) if config.path else InMemoryMQAR(config)
        self.vocab_size = self.source.vocab_size
        self.seq_len = self.source.seq_len
        self.curriculum = getattr(self.source, "curriculum", None)
        self.notes = getattr(self.source, "notes", ())

    def batch_indices(self, step, batch_size):
        """The indices of the sequences of a training step, over all ranks: a range."""
        return self.source.batch_indices(step, batch_size)

    def batch(self, split, step, indices):
        """-> tokens (B, T) long, targets (B, T) long, slices {name: (N,) array}."""
        tokens, targets, slices = self.source.batch(split, step, indices)
        # Validation and test score answers alone, so that accuracy and loss can be compared,
        # whichever tokens were trained on. Slices are of answers, so a loss of all tokens has none.
        if split == "train" and self.config.loss_on == "all":
            return tokens, next_token_targets(tokens, targets), {}
        return tokens, targets, slices

    def eval_groups(self, split):
        """Indices of val or test in groups of equal length, a range each."""
        return self.source.eval_groups(split)

    def steps_per_epoch(self, batch_size):
        return self.source.steps_per_epoch(batch_size)


class InMemoryMQAR:
    """Sequences made when they are asked for. The fixed training sets are kept."""

    def __init__(self, config):
        self.config = c = config
        self.vocab_size = c.vocab_size
        self.train_sizes = [TaskSize(*size, c) for size in c.sizes()]
        self.test_sizes = [TaskSize(*size, c) for size in c.test_sizes or c.sizes()]
        self.stage_sizes = [TaskSize(min_length(n, c), n, c) for n, _ in c.curriculum]
        self.curriculum = Curriculum([steps for _, steps in c.curriculum], c.stage_loss)
        sizes = self.train_sizes + self.test_sizes + self.stage_sizes
        self.seq_len = max(size.length for size in sizes)
        self.fixed_sets = {}  # TaskSize -> its training set, made at its first use
        self.notes = self.repeated_sequences()

    def repeated_sequences(self):
        """Sentences about test sequences that are likely to be trained on, in very small tasks."""
        n = self.config.n_train_examples / len(self.train_sizes)
        trained = {(size.length, size.pairs) for size in self.train_sizes}
        notes = []
        for size in self.test_sizes:
            share = -math.expm1(-n * 2.0**-size.log2_sequences)
            if (size.length, size.pairs) in trained and share > 1e-3:
                what = f"test sequences of {size.pairs} pairs in {size.length} tokens"
                text = f"note: up to {share:.1%} of the {what} are trained on, too"
                # Each epoch has new sequences, and this share again.
                text += ", in each epoch" if self.config.infinite_data else ""
                text += ": there are"
                text += f" {2**size.log2_sequences:,.0f}, not counting where the queries are; raise"
                notes.append(f"{text} vocab_size or num_kv_pairs")
        return notes

    def size_of_step(self, step):
        """A training step -> its TaskSize, its number among the steps of that size, and whether
        that size has a fixed training set."""
        stage, number = self.curriculum.stage(step)
        if stage < len(self.stage_sizes):
            return self.stage_sizes[stage], number, False
        n = len(self.train_sizes)
        return self.train_sizes[number % n], number // n, not self.config.infinite_data

    def sequences_per_step(self, size, batch_size):
        # batch_size counts sequences of input_seq_len. A step takes more of shorter ones, so that
        # each step has as many tokens and takes as long.
        return max(1, batch_size * self.config.input_seq_len // size.length)

    def batch_indices(self, step, batch_size):
        size, step_of_size, _ = self.size_of_step(step)
        n = self.sequences_per_step(size, batch_size)
        return range(step_of_size * n, (step_of_size + 1) * n)

    def steps_per_epoch(self, batch_size):
        # Sizes alternate step by step, so a set of short sequences is seen more often than one of
        # long ones. The curriculum's steps are steps of the first epochs as well.
        n_examples = self.config.n_train_examples / len(self.train_sizes)
        steps = sum(n_examples / self.sequences_per_step(s, batch_size) for s in self.train_sizes)
        return max(1, round(steps))

    def eval_groups(self, split):
        n = self.config.n_val_examples if split == "val" else self.config.n_test_examples
        return [range(i * n, (i + 1) * n) for i in range(len(self.test_sizes))]

    def batch(self, split, step, indices):
        indices = np.asarray(indices, dtype=np.int64)
        if split == "train":
            size, _, has_fixed_set = self.size_of_step(step)
        else:
            group = indices // len(self.eval_groups(split)[0])
            if (group != group[0]).any():
                raise ValueError("the indices of one batch must be of one eval group")
            size, has_fixed_set = self.test_sizes[group[0]], False
        if has_fixed_set:
            tokens, targets, slices = self.from_fixed_set(size, indices)
        else:
            tokens, targets, slices = make_sequences(size, split, indices)
        # int32 on the way, to halve the memory of fixed sets; torch's embedding wants long
        return torch.from_numpy(tokens).long(), torch.from_numpy(targets).long(), slices

    def from_fixed_set(self, size, indices):
        """The training set of a size, epoch after epoch, each in an order of its own."""
        n = max(1, self.config.n_train_examples // len(self.train_sizes))
        if size not in self.fixed_sets:
            self.fixed_sets[size] = make_sequences(size, "train", np.arange(n))
        key = (self.config.seed, STREAMS["epoch"], size.length, size.pairs)
        rows = shuffled_epochs(indices, n, *key)
        tokens, targets, slices = self.fixed_sets[size]
        slices = {name: values.reshape(n, -1)[rows].ravel() for name, values in slices.items()}
        return tokens[rows], targets[rows], slices


# ---- command line --------------------------------------------------------------------------------


def show(config):
    """Print training sequence 0 of the task in memory."""
    size = TaskSize(config.input_seq_len, config.num_kv_pairs, config)
    tokens, targets, _ = make_sequences(size, "train", np.arange(1))
    show_columns(tokens=tokens[0], targets=targets[0])


def parse(argv):
    """Command line -> DatasetConfig."""
    return parse_dataset(argv, __doc__, in_memory=Config)


def main(argv=None):
    config = parse(sys.argv[1:] if argv is None else argv)
    if config.output_dir:
        write_and_report(config)
    else:
        print(__doc__.strip())


if __name__ == "__main__":
    run_cli(main)
