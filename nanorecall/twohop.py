"""Two-hop questions: facts about entities, and queries that follow two of them in a row.

The task `twohop` of data_synth.py, whose Config is `c` here.

Letters: n entities, R relations.
"""

import re
import string

import numpy as np

from nanorecall.fact_files import FactDataset, guess_baselines
from nanorecall.rng import STREAMS, rng_for
from nanorecall.settings import require


def check_twohop(c):
    message = "cot_frac must be 0 or 1 for twohop: a query has one correct answer"
    require(c.cot_frac in (0, 1), message, "cot_frac")
    n_queries = c.num_entities * c.num_relations**2
    message = f"{n_queries} queries of two hops are too many; lower num_entities or num_relations"
    require(n_queries <= 10**6, message, "num_relations")
    require(c.markers or not c.cot_frac, "cot_frac needs markers=1", "cot_frac")
    require(c.markers or c.num_relations == 1, "num_relations needs markers=1", "num_relations")


def build_twohop(c):
    """Single facts "a>b " and two-hop queries "a>>c ", where b>c (Wang et al. 2024, arXiv
    2405.15071). Each relation is a permutation without fixed points.

    All single facts are trained on. A query is trained; or in-distribution: not trained, but
    trained queries use both of its facts; or out-of-distribution: no trained query uses either.
    """
    n, R = c.num_entities, c.num_relations
    rng = rng_for(c.seed, STREAMS["facts"])
    maps = np.stack([derangement(rng, n) for _ in range(R)])  # (R, n)
    r1, r2, a = np.indices((R, R, n)).reshape(3, -1)  # of all queries
    b = maps[r1, a]
    end = maps[r2, b]
    trained, in_dist, out_dist = split_queries(c, rng, r1, r2, a, b)

    names = [f"{entity:0{len(str(n - 1))}d}" for entity in range(n)]
    letters = [""] if R == 1 else string.ascii_lowercase
    mark = ">" if c.markers else ":"
    texts = []
    for r in range(R):
        for entity in range(n):
            texts.append(f"{names[entity]}{mark}{letters[r]}{names[maps[r, entity]]} ")
    for i in np.concatenate([trained, in_dist, out_dist]):
        marks = f">{letters[r1[i]]}>{letters[r2[i]]}" if c.markers else mark
        between = f"{names[b[i]]}>" if c.cot_frac else ""
        texts.append(f"{names[a[i]]}{marks}{between}{names[end[i]]} ")

    sizes = {
        "single fact": n * R,
        "trained": len(trained),
        "in-distribution": len(in_dist),
        "out-of-distribution": len(out_dist),
    }
    query = np.repeat(list(sizes), list(sizes.values()))
    splits = twohop_splits(query)
    compared = np.concatenate([trained, in_dist])
    is_trained = np.arange(len(compared)) < len(trained)
    words = np.array(names)
    guesses = guess_baselines(words[a[compared]], words[end[compared]], is_trained)
    baselines = {f"{guess} of the last entity": value for guess, value in guesses.items()}
    # Without markers the text has the form of digits, so it takes that label mask.
    kind = "twohop" if c.markers else "digits"
    return FactDataset(c, kind, texts, splits, {"query": query}, baselines)


def derangement(rng, n):
    """A permutation of range(n) without fixed points."""
    while True:
        permutation = rng.permutation(n)
        if (permutation != np.arange(n)).all():
            return permutation


def split_queries(c, rng, r1, r2, a, b):
    """Queries a -r1-> b -r2-> ? -> numbers of the trained, in- and out-of-distribution ones."""
    # Single facts that trained queries may use. The others are withheld two at a time, such that
    # one follows the other: otherwise there would be no out-of-distribution query.
    usable = np.ones((c.num_relations, c.num_entities), bool)
    for i in rng.permutation(len(a)):
        if (~usable).sum() >= c.ood_frac * usable.size:
            break
        usable[r1[i], a[i]] = False
        usable[r2[i], b[i]] = False
    both = usable[r1, a] & usable[r2, b]
    neither = ~usable[r1, a] & ~usable[r2, b]
    inside = rng.permutation(np.flatnonzero(both))
    out_dist = rng.permutation(np.flatnonzero(neither))
    n_usable = int(usable.sum())
    n_trained = round(c.phi * n_usable)
    most = int(90 * len(inside) / max(1, n_usable)) / 100
    asks = f"phi={c.phi:g} asks for {n_trained} of {len(inside)} queries"
    message = f"{asks}; use at most {most:.2f} or more relations"
    require(1 <= n_trained <= 0.9 * len(inside), message, "phi")
    trained, in_dist = np.split(inside, [n_trained])
    used = np.zeros_like(usable)
    used[r1[trained], a[trained]] = True
    used[r2[trained], b[trained]] = True
    in_dist = in_dist[used[r1[in_dist], a[in_dist]] & used[r2[in_dist], b[in_dist]]]
    return trained, in_dist, out_dist


def twohop_splits(query):
    """query: the kind of each document -> {split: numbers of its documents}.

    Trained documents are in all splits, each of the others in val or in test.
    """
    number = np.arange(len(query))
    train = (query == "single fact") | (query == "trained")
    even = number % 2 == 0
    return {"train": number[train], "val": number[train | even], "test": number[train | ~even]}


def read_two_hop(text):
    """A single fact or a query, "a>b " to "a>x>yb>c " -> entity, letters of its one or two
    relations, answer.

    >>> read_two_hop("16>>30 ")
    ('16', ['', ''], '30')
    >>> read_two_hop("16>x>y43>30 ")
    ('16', ['x', 'y'], '43>30')
    """
    entity, *letters, answer = re.fullmatch(r"(\d+)>([a-z]?)(>[a-z]?)?([\d>]+) ", text).groups()
    return entity, [mark.removeprefix(">") for mark in letters if mark is not None], answer
