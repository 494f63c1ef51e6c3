"""Random numbers for data files: every row is a pure function of a key and its own number, however rows are asked for.

Letters: R rows, n numbers drawn per row, m numbers to draw from, S query slots.
"""

import functools

import numpy as np

IGNORE_INDEX = -100  # the target of a position that is not scored
SPLITS = {"train": 0, "val": 1, "test": 2}


def philox_key(*words):
    """A Philox key from small non-negative integers (seed, split, length, ...). Zeros at the end do not count, so what comes
    after the seed must tell one purpose from another without them."""
    return np.random.SeedSequence(words).generate_state(2, np.uint64)


def rng_for(*words):
    """Random numbers for one purpose: a function of the words, the seed first."""
    return np.random.Generator(np.random.Philox(key=philox_key(*words)))


@functools.lru_cache(2)
def epoch_permutation(n, *words):
    """The order of n rows in one pass over them: (n,)"""
    return rng_for(*words).permutation(n).astype(np.int32)


def shuffled_epochs(rows, n, *words):
    """Row r of passes over n rows is row r % n of pass r // n, each pass in its own order: rows (R,) -> (R,) below n."""
    rows = np.asarray(rows, np.int64)
    which = np.empty_like(rows)
    for number in np.unique(rows // n).tolist():
        mine = rows // n == number
        which[mine] = epoch_permutation(n, *words, number)[rows[mine] % n]
    return which


def row_uniforms(key, rows, words):
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


def sample_without_replacement(u, m):
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


def weighted_permutation(u, power_a):
    """Order in which S slots are drawn without replacement with weights s^(a-1), s = 1..S: u (R, S) -> (R, S) slots.

    Successive weighted draws have the same law as sorting exponential clocks E_s / weight_s (Efraimidis and Spirakis).
    """
    weight = np.arange(1, u.shape[1] + 1) ** (power_a - 1.0)
    return np.argsort(-np.log1p(-u) / weight, axis=1)


def nth_not_in(x, taken):
    """The x-th number that is not in `taken`: x (R, m) counts, taken (R, a) different numbers -> (R, m)."""
    a = taken.shape[1]
    gaps = np.sort(taken, axis=1) - np.arange(a)  # x is behind taken number i if x >= gaps[i]
    offset = np.arange(len(x))[:, None] * (2**31)  # one search over all rows: shift each row into its own range
    behind = np.searchsorted((gaps + offset).ravel(), (x + offset).ravel(), side="right").reshape(x.shape)
    return x + behind - np.arange(len(x))[:, None] * a
