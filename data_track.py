"""State tracking: what is the product of all tokens so far? Asked after every token.

    python data_track.py                               # print this text, with examples
    python data_track.py --task s5 --elements swaps    # print the beginning of a sequence
    python train.py configs/track_parity_delta.py      # trained on 64 tokens, tested on up to 256

A token is a random element of a finite group. The target at each position is the product of the
tokens up to there. So the target at position t is also the answer to a sequence of t tokens, and
training on one length trains all shorter ones.

    parity     0 and 1: is the number of ones odd?
    mod_add    0..modulus-1: the sum modulo `modulus`
    s3, s5     the 6 or 120 permutations of 3 or 5 objects: where are the objects now?

>>> show(Config(task="parity"))
tokens  0 1 0 0 0 1 1 0 0 1 0 0 0 0 0 1
targets 0 1 1 1 1 0 1 1 1 0 0 0 0 0 0 1
>>> show(Config(task="s3", elements="swaps"))
tokens  1 5 0 1 0 2 5 0 1 5 0 1 1 0 1 5
targets 1 4 4 2 2 0 5 5 3 2 2 4 2 2 4 1

Permutations are numbered in lexicographic order: number 0, 012, moves nothing, and number 1, 021,
swaps the last two objects. Each token permutes the objects as the tokens before it left them.

What does a recurrent model need to solve this at every length? For parity, the state's transition
must have negative eigenvalues (Grazzi et al. 2024, arXiv 2411.12537). A step of the delta rule with
beta = 2 has one: it is a reflection, which can swap two objects. Other permutations take several
steps a token (Siems et al. 2025, arXiv 2502.10297) or several layers. Attention and diagonal
recurrences of constant depth are believed unable to track S5 at every length (Merrill et al. 2024,
arXiv 2404.08819).

Each sequence is a pure function of the settings, split, length and index.

Letters: B sequences, T tokens, n elements of the group.
"""

import itertools
import math
import sys
from dataclasses import dataclass

import numpy as np
import torch

from nanorecall.mqar_files import show_columns
from nanorecall.rng import STREAMS, philox_key, row_uniforms
from nanorecall.settings import (
    at_least,
    build_config,
    one_of,
    print_help,
    read_argv,
    reject_args,
    reject_unknown,
    require,
    run_cli,
    wants_help,
    within,
)


@dataclass
class Config:
    task: str = "s3"  # parity, mod_add, s3 or s5
    elements: str = "all"  # tokens of s3 and s5: all, or swaps (of two objects at most)
    modulus: int = 5  # of mod_add
    input_seq_len: int = 64  # tokens in a training sequence
    test_lengths: tuple[int, ...] = ()  # lengths to validate and test on; empty: input_seq_len
    n_train_examples: int = 40000  # sequences in an epoch; no two steps train on the same ones
    n_val_examples: int = 200  # validation sequences per length
    n_test_examples: int = 1000  # test sequences per length
    seed: int = 0  # of data and model

    def check(self):
        one_of(self, GROUPS, "task")
        one_of(self, ("all", "swaps"), "elements")
        within(self, 2, 1000, "modulus")
        at_least(self, 0, "seed")
        within(self, 1, 2**40, "n_train_examples", "n_val_examples", "n_test_examples")
        self.check_length(self.input_seq_len, "input_seq_len")
        for length in self.test_lengths:
            self.check_length(length, "test_lengths")
        message = f"test_lengths={self.test_lengths} names a length twice; name it once"
        is_once = len(set(self.test_lengths)) == len(self.test_lengths)
        require(is_once, message, "test_lengths")

    def check_length(self, length, setting):
        # Splits are drawn independently, so a test sequence may be trained on by chance. With 2^40
        # sequences to draw from, one of 1,000 test sequences is among a million training sequences
        # with a probability of 0.001.
        n = len(token_elements(self))
        shortest = math.ceil(40 / math.log2(n))
        message = f"{setting}={length} has too few different sequences to keep the splits apart"
        require(length >= shortest, f"{message}; use at least {shortest}", setting)
        require(length <= 2**20, f"{setting}={length} must be at most {2**20}", setting)

    def unused(self):
        reasons = {}
        if self.task != "mod_add":
            reasons["modulus"] = f"task is {self.task}"
        if self.task not in OBJECTS:
            reasons["elements"] = f"{self.task} has no swaps"
        return reasons

    def label(self):
        """The data's part of a run's name."""
        name = f"{self.task}-{self.modulus}" if self.task == "mod_add" else self.task
        if self.elements != "all":
            name += f"-{self.elements}"
        return f"{name}-{self.input_seq_len}"


# ---- groups --------------------------------------------------------------------------------------

OBJECTS = {"s3": 3, "s5": 5}  # how many the permutations of a task move


def cyclic(n):
    """Addition modulo n -> (n, n)"""
    return np.add.outer(np.arange(n), np.arange(n)) % n


def permutations(n_objects):
    """All permutations in lexicographic order (n, n_objects); object i goes to p[i]."""
    return np.array(list(itertools.permutations(range(n_objects))))


def symmetric(n_objects):
    """Permutations one after another -> (n, n), [a, b]: first a, then b"""
    p = permutations(n_objects)
    products = p[:, p].swapaxes(0, 1)  # (n, n, n_objects), [a, b, i] = p[b][p[a][i]]
    # Lexicographic order is the order of the numbers that the permutations spell as digits.
    digits = n_objects ** np.arange(n_objects)[::-1]
    return np.searchsorted(p @ digits, products @ digits)


# task -> table of products, [earlier, later]
GROUPS = {
    "parity": lambda c: cyclic(2),
    "mod_add": lambda c: cyclic(c.modulus),
    "s3": lambda c: symmetric(3),
    "s5": lambda c: symmetric(5),
}


def token_elements(config):
    """The elements that occur as tokens, in order."""
    if config.task not in OBJECTS or config.elements == "all":
        return np.arange(len(GROUPS[config.task](config)))
    p = permutations(OBJECTS[config.task])
    n_moved = (p != p[0]).sum(1)
    return np.flatnonzero(n_moved <= 2)


def running_product(products, tokens):
    """products (n, n), tokens (B, T) -> (B, T): the product of the tokens up to each."""
    states = tokens.copy()
    for t in range(1, tokens.shape[1]):
        states[:, t] = products[states[:, t - 1], tokens[:, t]]
    return states


# ---- the data, as train.py and eval.py use it ----------------------------------------------------


class Data:
    """The methods of data_mqar.Data; .vocab_size, the number of elements of the group; .seq_len, of
    the longest sequence; .baselines {name: accuracy of guessing}."""

    def __init__(self, config):
        self.config = config
        self.products = GROUPS[config.task](config)
        self.elements = token_elements(config)
        self.vocab_size = len(self.products)
        self.test_lengths = config.test_lengths or (config.input_seq_len,)
        self.seq_len = max(config.input_seq_len, *self.test_lengths)
        self.baselines = {"a random element": 1 / self.vocab_size}

    def batch_indices(self, step, batch_size):
        """The indices of the sequences of a training step, over all ranks: a range."""
        return range(step * batch_size, (step + 1) * batch_size)

    def steps_per_epoch(self, batch_size):
        return max(1, self.config.n_train_examples // batch_size)

    def eval_groups(self, split):
        """Indices of val or test in groups of equal length, a range each."""
        n = self.config.n_val_examples if split == "val" else self.config.n_test_examples
        return [range(i * n, (i + 1) * n) for i in range(len(self.test_lengths))]

    def batch(self, split, step, indices):
        """-> tokens (B, T) long, targets (B, T) long, slices {name: (B*T,)}: input_seq_len, and
        position (from 1, rounded down to a power of two). ValueError if the indices are of several
        lengths."""
        indices = np.asarray(indices, np.int64)
        length = self.config.input_seq_len
        if split != "train":
            group = indices // len(self.eval_groups(split)[0])
            if (group != group[0]).any():
                raise ValueError("the indices of one batch must be of one eval group")
            length = self.test_lengths[group[0]]
        key = philox_key(self.config.seed, STREAMS[split], length)
        uniforms = row_uniforms(key, indices, length)
        tokens = self.elements[(uniforms * len(self.elements)).astype(np.int64)]
        targets = running_product(self.products, tokens)
        position = 2 ** np.log2(np.arange(1, length + 1)).astype(np.int64)
        slices = {
            "input_seq_len": np.full(tokens.size, length),
            "position": np.tile(position, len(tokens)),
        }
        return torch.from_numpy(tokens), torch.from_numpy(targets), slices


# ---- command line --------------------------------------------------------------------------------


def show(config, n_tokens=16):
    """Print the beginning of training sequence 0."""
    tokens, targets, _ = Data(config).batch("train", 0, [0])
    show_columns(tokens=tokens[0, :n_tokens].tolist(), targets=targets[0, :n_tokens].tolist())


def parse(argv):
    """Command line -> Config; None without settings."""
    args, settings = read_argv(argv)
    if wants_help(settings):
        print_help(__doc__, Config)
    reject_args(args)
    reject_unknown(settings, Config)
    return build_config(Config, settings) if settings else None


def main(argv=None):
    config = parse(sys.argv[1:] if argv is None else argv)
    if config:
        show(config)
    else:
        print(__doc__.strip())


if __name__ == "__main__":
    run_cli(main)
