"""Random numbers for data files: each sequence is a pure function of a key and its own index.

It is the same in every batch and order in which it is read.

Letters: R rows (one for each sequence), n numbers drawn per row, m numbers to draw from, S slots.
"""

import functools

import numpy as np

IGNORE_INDEX = -100  # the target of a position that is not scored
SPLITS = {"train": 0, "val": 1, "test": 2}

# Purpose of a random stream: the number after the seed in its key. A new purpose takes a new
# number. To change one would change the data of every seed.
STREAMS = {
    **SPLITS,  # the content of sequences
    "facts": 0,  # what a fact data set holds: pairs of numbers, keys, relations
    "values": 1,  # random values of digits
    "epoch": 3,  # order of the examples in an epoch
    "subset": 7,  # which examples of val and test are measured
    "contexts": 8,  # pairs of numbers that are shown in the context, and which of them is asked
    "mixture": 9,  # which training steps take the synthetic data set
}


def philox_key(*key):
    """A Philox key from small non-negative integers: seed, stream, length, ...

    SeedSequence ignores zeros at the end, so (seed, stream) and (seed, stream, 0) are one key.
    Purposes must differ in some number that is not a zero at the end.
    """
    return np.random.SeedSequence(key).generate_state(2, np.uint64)


def rng_for(*key):
    """A generator for one purpose, a function of the integers alone: seed, stream, ..."""
    return np.random.Generator(np.random.Philox(key=philox_key(*key)))


@functools.lru_cache(2)
def epoch_permutation(n, *key):
    """The order of n examples in one epoch: (n,)"""
    return rng_for(*key).permutation(n).astype(np.int32)


def shuffled_epochs(indices, n, *key):
    """Index i of training is example i % n of epoch i // n, each epoch in an order of its own:
    indices (R,) -> examples (R,), all below n."""
    indices = np.asarray(indices, np.int64)
    epochs = indices // n
    examples = np.empty_like(indices)
    for epoch in np.unique(epochs).tolist():
        in_epoch = epochs == epoch
        order = epoch_permutation(n, *key, epoch)
        examples[in_epoch] = order[indices[in_epoch] % n]
    return examples


def row_uniforms(key, indices, n):
    """(R, n) uniform doubles in [0, 1); the numbers of row i depend on (key, i) alone.

    Philox (Salmon et al. 2011) turns a counter into four numbers. Each row owns a stretch of
    counters, and consecutive rows are one call.
    """
    n_blocks = -(-n // 4)
    out = np.empty((len(indices), 4 * n_blocks))
    is_start = np.diff(indices, prepend=indices[0] - 2) != 1
    starts = np.flatnonzero(is_start)
    for a, b in zip(starts, [*starts[1:], len(indices)]):
        counter = int(indices[a]) * n_blocks
        rng = np.random.Generator(np.random.Philox(key=key, counter=counter))
        out[a:b] = rng.random((b - a, 4 * n_blocks))
    return out[:, :n]


def sample_without_replacement(u, m):
    """n different numbers of range(m) per row, in random order: uniforms u (R, n) -> (R, n) int32.

    Fisher-Yates on many rows at once.
    """
    R, n = u.shape
    out = np.empty((R, n), dtype=np.int32)
    chunk = max(1, 2**21 // m)  # rows at a time, so that their pools stay in the cache
    full_pool = np.tile(np.arange(m, dtype=np.int32), (min(chunk, R), 1))
    for a in range(0, R, chunk):
        u_chunk = u[a : a + chunk]
        pool = full_pool[: len(u_chunk)].copy()
        r = np.arange(len(u_chunk))
        for i in range(n):
            j = i + (u_chunk[:, i] * (m - i)).astype(np.int64)
            pool[r, j], pool[:, i] = pool[:, i].copy(), pool[r, j]
        out[a : a + chunk] = pool[:, :n]
    return out


def weighted_permutation(u, power_a):
    """The order in which S slots are drawn without replacement, slot s = 1..S with weight s^(a-1):
    uniforms u (R, S) -> slots from 0 (R, S).

    Sorting exponential clocks E_s / weight_s has the same law as successive weighted draws
    (Efraimidis and Spirakis 2006).
    """
    weight = np.arange(1, u.shape[1] + 1) ** (power_a - 1.0)
    return np.argsort(-np.log1p(-u) / weight, axis=1)


def nth_not_in(x, taken):
    """The x-th number, from 0, that is not in `taken`: x (R, m), taken (R, a) different numbers
    -> (R, m)."""
    a = taken.shape[1]
    rank = np.sort(taken, axis=1) - np.arange(a)  # x lies behind taken number i if x >= rank[i]
    # One search over all rows: shift each row into a range of its own.
    offset = np.arange(len(x))[:, None] * (2**31)
    n_behind = np.searchsorted((rank + offset).ravel(), (x + offset).ravel(), side="right")
    # The search counts the taken numbers of the rows before, too.
    return x + n_behind.reshape(x.shape) - np.arange(len(x))[:, None] * a


def micro_batch_seed(*key):
    """Seed of the random numbers in a micro-batch, as for dropout. key: seed, step, its number."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
