"""HashHop: chains of hashes in the context, in random order; where does one of them end?

The task `hashhop` of data_synth.py, whose Config is `c` here. Each problem is generated when it is
read, so that none comes twice.
"""

import itertools
import string

import numpy as np

from nanorecall.fact_files import GeneratedDataset
from nanorecall.rng import STREAMS, rng_for
from nanorecall.settings import require

LETTERS = np.array(list(string.ascii_letters))


def check_hashhop(c):
    """ConfigError if max_bytes has no room for the chains, or too few hashes differ."""
    problems = [(hops, c.num_queries) for hops in c.hops]
    problems += [(hops, 1) for hops in c.test_hops]
    for (hops, queries), length in itertools.product(problems, hash_lengths(c)):
        fit = n_chains(c, hops, queries, length)
        need = max(2, queries)
        more = c.max_bytes + (need - fit) * (hops * (2 * length + 4) + 2)
        small = f"max_bytes={c.max_bytes} is too small for {need} chains of {hops} hops"
        require(fit >= need, f"{small}; use at least {more}", "max_bytes")
        n_hashes = fit * (hops + 1)
        message = f"hash_len={length} is too short for {n_hashes} hashes"
        # Otherwise most draws in unique_hashes would repeat a hash and be discarded.
        name = "hash_lens" if c.hash_lens else "hash_len"
        require(n_hashes**2 < 52**length * 8, message, name)


def build_hashhop(c):
    """Chains of hashes, "a = b" and at their end "c = 'd'", in random order; then "COMPLETION:",
    the number of hops, and queries: a hash and the end of its chain (the text of
    github.com/magicproduct/hash-hop). Val and test have a group for each of test_hops."""
    baselines = {}
    for hops in c.test_hops:
        name = f"any end of a chain, whole answers, hops={hops}"
        chances = [1 / n_chains(c, hops, 1, length) for length in hash_lengths(c)]
        baselines[name] = sum(chances) / len(chances)
    return GeneratedDataset(c, "hashhop", make_hashhop, len(c.test_hops), baselines)


def make_hashhop(c, split, index, group):
    """-> text of one problem, its slices {name: value}"""
    rng = rng_for(c.seed, STREAMS[split], index)
    lengths = hash_lengths(c)
    if split == "train":
        hops, queries = c.hops[index % len(c.hops)], c.num_queries
        # Each number of hops comes with every length.
        length = lengths[index // len(c.hops) % len(lengths)]
    else:
        hops, queries = c.test_hops[group], 1
        length = lengths[index % len(lengths)]
    cot = hops > 1 and rng.random() < c.cot_frac
    n = n_chains(c, hops, queries, length)
    hashes = unique_hashes(rng, n * (hops + 1), length)
    lines, ends, answers = [], [], []
    for i in range(n):
        chain = hashes[i * (hops + 1) : (i + 1) * (hops + 1)]
        for this, following in zip(chain, chain[1:-1]):
            lines.append(f"{this} = {following}")
        ends.append(f"{chain[-2]} = '{chain[-1]}'")
        if i < queries:  # the first chains: the order of the lines does not show which
            answer = " = ".join(chain[1:]) if cot else chain[-1]
            answers.append(f"{chain[0]} = '{answer}'")
    lines += ends
    shuffled = [lines[i] for i in rng.permutation(len(lines))]
    text = "\n".join([*shuffled, completion_header(hops, cot), *answers, ""])
    slices = {"hops": hops}
    if c.cot_frac:
        slices["hops_cot"] = f"{hops} cot" if cot else f"{hops}"
    if c.hash_lens:
        slices["hash_len"] = length
    return text, slices


def hash_lengths(c):
    """Letters in the hashes of problems, in turn."""
    return c.hash_lens or (c.hash_len,)


def n_chains(c, hops, queries, length):
    """Number of chains that fit into max_bytes tokens (bytes, and BOS) with the completion.

    length: letters in a hash.
    """
    pair = 2 * length + 4  # "a = b\n"
    answer = pair + 2
    if c.cot_frac > 0:
        answer += (hops - 1) * (length + 3)
    rest = 2 + len(completion_header(hops, False)) + queries * answer
    return (c.max_bytes - rest) // (hops * pair + 2)


def completion_header(hops, cot):
    return f"\nCOMPLETION:\nHops={hops}\n\nCoT={cot}\n"


def unique_hashes(rng, n, length):
    """n different random words."""
    while True:
        letters = LETTERS[rng.integers(len(LETTERS), size=(n, length))]
        words = ["".join(row) for row in letters]
        if len(set(words)) == n:
            return words
