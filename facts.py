"""The generators of data_synth.py: pairs of numbers, digit lookup, two-hop queries, HashHop, and your own documents.

Each has check(config), label(config) and make(config) -> its documents. What `make` returns has count(split), segments(split),
read(split, rows) -> texts and tags, .kind, the kind of its label mask, and .baselines, the accuracy of guesses without knowledge.

Letters: n pairs or entities, N letters of a word, R rows or relations, E documents in an epoch.
"""

import hashlib
import math
import unicodedata

import numpy as np

from nanorecall.documents import read_documents
from nanorecall.rng import IGNORE_INDEX, SPLITS, rng_for, shuffled_epochs
from nanorecall.settings import require
from nanorecall.text import BYTES, label_mask

# ---- documents with names ----------------------------------------------------------------------------------------------


class FactDataset:
    """A fixed list of documents, which of them are in which split (training ones as often as in an epoch), and their tags."""

    def __init__(self, c, kind, texts, splits, tags, chance=None, knowledge=None):
        """kind: a key of tokens.MASKS; texts: n strings; splits {"train": (E,), "val": ..., "test": ...} of numbers below n.

        tags {name: (n,)}: the first names the groups that val and test should have in equal numbers. knowledge, where answers
        can only be known: {"slice": "tag=value" of those trained on, "facts": their number, "bits": of a digit not known}.
        """
        self.config, self.kind, self.texts, self.baselines, self.capacity = c, kind, texts, chance or {}, knowledge or {}
        self.tags = {k: np.asarray(v) for k, v in tags.items()}
        for name, values in self.tags.items():
            plain = values.shape == (len(texts),) and values.dtype.kind in "biufU"
            message = f"path={c.path}: the tag {name!r} is no number or text in each row"
            require(plain, message, "path")
        group = next(iter(self.tags.values()), np.zeros(len(texts), int))
        order = rng_for(c.seed, 7).permutation(len(texts))  # so that a part of a split is a fair sample
        for split, n in (("val", c.n_val_examples), ("test", c.n_test_examples)):
            chosen = splits[split][np.argsort(order[splits[split]])]
            if n and len(chosen):  # as many of each group at most, so that none crowds out another
                groups = np.unique(group[chosen])
                share = n if c.task == "hashhop" else max(1, n // len(groups))
                chosen = np.concatenate([chosen[group[chosen] == g][:share] for g in groups])
            splits[split] = chosen
        self.splits = {split: np.asarray(which, np.int32) for split, which in splits.items()}

    def count(self, split):
        return len(self.splits[split])

    def eval_groups(self, split):
        return [range(self.count(split))]

    def numbers(self, split, rows):
        """Rows of a split -> documents; those of training in passes (draws.rows_of_passes)."""
        which = self.splits[split]
        if split == "train":
            rows = shuffled_epochs(rows, len(which), self.config.seed, len(SPLITS))
        return which[rows]

    def read(self, split, rows):
        """-> texts of rows (R,) of a split, {tag: (R,)}"""
        numbers = self.numbers(split, np.asarray(rows, np.int64))
        return [self.texts[i] for i in numbers], {name: values[numbers] for name, values in self.tags.items()}


def guess_baselines(train, test):
    """The accuracy of guesses without knowledge on `test`: [(key, value)] of one width -> {name: accuracy per digit}.

    The most frequent digit of each position among the training values; and the key itself.
    """
    if not train or not test:
        return {}
    width = min(len(v) for _, v in train + test)
    values, keys, right = (np.array([list(x[i][:width]) for x in part]) for part, i in ((train, 1), (test, 0), (test, 1)))
    usual = [mode(column) for column in values.T]
    return {"majority digit": float((right == usual).mean()), "copy the key": float((right == keys).mean())}


def mode(column):
    """The first in order of those that occur most often."""
    found, times = np.unique(column, return_counts=True)
    return found[times.argmax()]


# ---- qa ----------------------------------------------------------------------------------------------------------------


class QA:
    """ "x:y " of fixed-width numbers, all different. As LLMonade documents it (MQAR and Synthetic QA in LLMonade): exposure
    buckets with as many pairs in each, and held-out pairs in each, the control that nobody can know."""

    @staticmethod
    def check(c):
        near = max(1, round(c.num_pairs / len(c.buckets))) * len(c.buckets)
        message = f"num_pairs={c.num_pairs} does not divide into {len(c.buckets)} buckets; {near} does"
        require(c.num_pairs % len(c.buckets) == 0, message, "num_pairs")
        message = f"{c.num_pairs} pairs need {2 * c.num_pairs} different numbers; digits={c.digits} has {10**c.digits}"
        require(2 * c.num_pairs <= 10**c.digits, message, "digits")
        size = c.num_pairs // len(c.buckets)
        require(QA.held(c) < size, f"heldout={c.heldout} leaves no pair of {size} to train on", "heldout")
        rows = (size - QA.held(c)) * sum(c.buckets)
        require(rows <= 10**8, f"an epoch of {rows} documents is too long; lower buckets or num_pairs", "buckets")

    @staticmethod
    def label(c):
        return f"{c.num_pairs}-pairs"

    @staticmethod
    def held(c):
        """Held-out pairs in each bucket."""
        return max(1, round(c.heldout * c.num_pairs / len(c.buckets))) if c.heldout else 0

    @staticmethod
    def make(c):
        n, size, held = c.num_pairs, c.num_pairs // len(c.buckets), QA.held(c)
        names = [f"{i:0{c.digits}d}" for i in rng_for(c.seed, 0).choice(10**c.digits, 2 * n, replace=False)]
        pairs = list(zip(names[:n], names[n:]))
        bucket = np.repeat(c.buckets, size)  # the names are in random order, so the first pairs of a bucket are any
        seen = np.arange(n) % size >= held
        texts, number = [f"{x}:{y} " for x, y in pairs], np.arange(n)
        tags = {"exposures": np.where(seen, bucket, 0), "seen": seen.astype(int)}
        train, test = np.repeat(number[seen].astype(np.int32), bucket[seen]), number
        if c.inverse != "none":
            texts += [f"{y}:{x} " for x, y in pairs]
            tags = {k: np.tile(v, 2) for k, v in tags.items()}
            tags["direction"] = np.repeat(["forward", "inverse"], n)
            test = np.arange(2 * n)
            if c.inverse == "train":
                train = np.concatenate([train, train + n])
        held_out = [pair for pair, s in zip(pairs, seen) if not s]
        guess = guess_baselines([pair for pair, s in zip(pairs, seen) if s], held_out)
        facts = int(seen.sum()) * (2 if c.inverse == "train" else 1)
        knowledge = {"slice": "seen=1", "facts": facts, "bits": math.log2(10)} if c.inverse != "probe" else {}
        return FactDataset(c, "qa", texts, {"train": train, "val": test, "test": test}, tags, guess, knowledge)


# ---- digits ------------------------------------------------------------------------------------------------------------


class Digits:
    """ "key:value ": keys are words of N letters over the digits 1..N, N the smallest with enough words (6 for 6K and 20K
    pairs, 7 for 200K). rule=random must be memorised; rule=selfindex, value[i] = key[key[i]], can be worked out."""

    @staticmethod
    def width(c):
        return next(n for n in range(2, 10) if n**n >= c.num_pairs + c.num_novel)

    @staticmethod
    def check(c):
        require(c.num_pairs + c.num_novel <= 9**9, f"there are {9**9} keys; lower num_pairs", "num_pairs")

    @staticmethod
    def label(c):
        return f"{c.num_pairs}-{c.rule}"

    @staticmethod
    def make(c):
        N, n, total = Digits.width(c), c.num_pairs, c.num_pairs + c.num_novel
        places = N ** np.arange(N)[::-1]
        keys = rng_for(c.seed, 0).choice(N**N, total, replace=False)[:, None] // places % N  # (total, N) digits from 0
        if c.rule == "random":
            values = rng_for(c.seed, 1).integers(N, size=keys.shape)
        else:
            values = keys
            for _ in range(c.steps):  # the word, as a map of positions, applied to itself
                values = np.take_along_axis(values, values, axis=1)
        pairs = [tuple("".join(map(str, word + 1)) for word in pair) for pair in zip(keys, values)]
        number, novel = np.arange(total), np.arange(n, total)
        splits = {"train": number[:n], "val": np.concatenate([number[:n], novel[::2]])}
        splits["test"] = np.concatenate([number[:n], novel[1::2]])
        key = np.repeat(["known", "novel"], [n, c.num_novel])
        guess = guess_baselines(pairs[:n], pairs[n:])
        knowledge = {"slice": "key=known", "facts": n, "bits": math.log2(N)} if c.rule == "random" else {}
        return FactDataset(c, "digits", [f"{k}:{v} " for k, v in pairs], splits, {"key": key}, guess, knowledge)


# ---- twohop ------------------------------------------------------------------------------------------------------------


class TwoHop:
    """Single facts "a>b ", all trained on, and composed ones "a>>c " with c the fact of the fact, some of them trained on
    (Wang et al. 2024, arXiv 2405.15071). Queries are trained, in-distribution (not trained, but both of their facts are used in
    trained ones) or out-of-distribution (neither is in any). Each relation is a permutation without fixed points."""

    @staticmethod
    def check(c):
        require(c.cot in (0, 1), "cot must be 0 or 1 for twohop: a query has one right answer", "cot")
        n = c.entities * c.relations**2
        require(n <= 10**6, f"{n} queries of two hops are too many; lower entities or relations", "relations")
        require(c.markers or not c.cot, "cot needs markers=1", "cot")
        require(c.markers or c.relations == 1, "relations need markers=1", "relations")

    @staticmethod
    def label(c):
        return f"{c.entities}x{c.relations}-phi{c.phi:g}"

    @staticmethod
    def make(c):
        n, R, random = c.entities, c.relations, rng_for(c.seed, 0)
        maps = np.stack([derangement(random, n) for _ in range(R)])  # (R, n)
        r1, r2, a = (x.ravel() for x in np.indices((R, R, n)))
        b = maps[r1, a]
        known = np.ones((R, n), bool)  # single facts that trained queries may use; the others go in pairs that compose
        for i in random.permutation(len(a)):
            if (~known).sum() >= c.ood * known.size:
                break
            known[r1[i], a[i]] = known[r2[i], b[i]] = False
        end, both, neither = maps[r2, b], known[r1, a] & known[r2, b], ~known[r1, a] & ~known[r2, b]
        inside, outside = random.permutation(np.flatnonzero(both)), random.permutation(np.flatnonzero(neither))
        n_trained, most = round(c.phi * int(known.sum())), int(90 * len(inside) / max(1, int(known.sum()))) / 100
        message = f"phi={c.phi:g} asks for {n_trained} of {len(inside)} queries; use at most {most:.2f} or more relations"
        require(1 <= n_trained <= 0.9 * len(inside), message, "phi")
        trained, inside = np.split(inside, [n_trained])
        used = np.zeros((R, n), bool)
        used[r1[trained], a[trained]] = used[r2[trained], b[trained]] = True
        inside = inside[used[r1[inside], a[inside]] & used[r2[inside], b[inside]]]

        def name(i):
            return f"{i:0{len(str(n - 1))}d}"

        mark = [""] if R == 1 else [chr(ord("a") + r) for r in range(R)]
        one = ">" if c.markers else ":"
        texts = [f"{name(a)}{one}{mark[r]}{name(maps[r, a])} " for r in range(R) for a in range(n)]
        for i in np.concatenate([trained, inside, outside]):
            way = f"{name(b[i])}>" if c.cot else ""
            marks = f">{mark[r1[i]]}>{mark[r2[i]]}" if c.markers else one
            texts.append(f"{name(a[i])}{marks}{way}{name(end[i])} ")
        sizes = {
            "single fact": n * R,
            "trained": len(trained),
            "in-distribution": len(inside),
            "out-of-distribution": len(outside),
        }
        query = np.repeat(list(sizes), list(sizes.values()))
        number = np.arange(len(texts))
        all_of = (query == "single fact") | (query == "trained")  # in all splits; the others in one of val and test
        even = number % 2 == 0
        splits = {"train": number[all_of], "val": number[all_of | even], "test": number[all_of | ~even]}
        answers = [(name(a[i]), name(end[i])) for i in np.concatenate([trained, inside])]
        guess = {f"{k} of the last entity": v for k, v in guess_baselines(answers[: len(trained)], answers[len(trained) :]).items()}
        return FactDataset(c, "twohop" if c.markers else "digits", texts, splits, {"query": query}, guess)


def derangement(random, n):
    """A permutation of range(n) that leaves nothing in its place."""
    while True:
        p = random.permutation(n)
        if (p != np.arange(n)).all():
            return p


# ---- hashhop -----------------------------------------------------------------------------------------------------------

LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"))


class HashHop:
    """Chains of hashes, "a = b" and at their end "c = 'd'", in random order; then "COMPLETION:", the number of hops, and for a
    query that is named the end of its chain (the text of github.com/magicproduct/hash-hop). Rows are made when asked for."""

    kind, default = "hashhop", 500  # rows per number of hops in validation and test

    def __init__(self, c):
        self.config = c
        self.baselines = {f"any end of a chain, whole answers, hops={h}": 1 / self.chains(c, h, 1) for h in c.test_hops}

    @staticmethod
    def header(hops, cot):
        return f"\nCOMPLETION:\nHops={hops}\n\nCoT={cot}\n\n"

    @staticmethod
    def chains(c, hops, queries):
        """Chains that fit into block_size tokens (bytes, and BOS) beside the completion."""
        L, pair = c.hash_len, 2 * c.hash_len + 4
        answer = pair + 2 + (hops - 1) * (L + 3) * (c.cot > 0)
        rest = 1 + len(HashHop.header(hops, False)) + queries * answer
        return (c.block_size - rest) // (hops * pair + 2)

    @staticmethod
    def check(c):
        for hops, queries in (*((h, c.num_queries) for h in c.hops), *((h, 1) for h in c.test_hops)):
            fit, need = HashHop.chains(c, hops, queries), max(2, queries)
            more = c.block_size + (need - fit) * (hops * (2 * c.hash_len + 4) + 2)
            message = f"block_size={c.block_size} is too small for {need} chains of {hops} hops; use at least {more}"
            require(fit >= need, message, "block_size")
            words = fit * (hops + 1)
            require(words**2 < 52**c.hash_len * 8, f"hash_len={c.hash_len} is too short for {words} hashes", "hash_len")

    @staticmethod
    def label(c):
        return f"{'-'.join(map(str, c.hops))}-{c.block_size}"

    make = classmethod(lambda cls, c: cls(c))

    def count(self, split):
        c = self.config
        return {"train": c.n_train_examples}.get(split) or sum(map(len, self.eval_groups(split)))

    def eval_groups(self, split):
        n = {"val": self.config.n_val_examples, "test": self.config.n_test_examples}[split] or self.default
        return [range(i * n, (i + 1) * n) for i in range(len(self.config.test_hops))]

    def read(self, split, rows):
        texts, hops, cot = zip(*(self.problem(split, row) for row in np.asarray(rows).tolist()))
        tags = {"hops": np.array(hops)}
        if self.config.cot:
            tags["hops_cot"] = np.array([f"{h} cot" if spelled else f"{h}" for h, spelled in zip(hops, cot)])
        return list(texts), tags

    def problem(self, split, row):
        """-> text, hops, cot of one row"""
        c, random = self.config, rng_for(self.config.seed, SPLITS[split], row)
        levels = c.hops if split == "train" else c.test_hops
        hops = levels[row % len(levels)] if split == "train" else levels[row // len(self.eval_groups(split)[0])]
        cot = hops > 1 and random.random() < c.cot
        queries = c.num_queries if split == "train" else 1
        n = self.chains(c, hops, queries)
        words = unique_hashes(random, n * (hops + 1), c.hash_len)
        chains = [words[i * (hops + 1) : (i + 1) * (hops + 1)] for i in range(n)]
        lines = [f"{a} = {b}" for chain in chains for a, b in zip(chain, chain[1:-1])]
        lines += [f"{chain[-2]} = '{chain[-1]}'" for chain in chains]
        lines = [lines[i] for i in random.permutation(len(lines))]
        asked = chains[:queries]  # any: the lines are in random order
        answers = [f"{chain[0]} = '{' = '.join(chain[1:]) if cot else chain[-1]}'" for chain in asked]
        return "\n".join(lines) + "\n" + self.header(hops, cot) + "\n".join(answers) + "\n", hops, cot


def unique_hashes(random, n, length):
    """n different random words."""
    while True:
        words = ["".join(w) for w in LETTERS[random.integers(len(LETTERS), size=(n, length))]]
        if len(set(words)) == n:
            return words


# ---- text --------------------------------------------------------------------------------------------------------------


class Text:
    """Your own documents: "text", or "question" and "answer", which is all that is trained on.

    A directory with train, validation and test in it says itself what is in each. Otherwise:
    A fact is a question with its answer, or a text in which a mask of FACT_MASKS finds one. All
    are trained on and measured, for what counts is how many are stored; `heldout_facts` of them
    are only measured. Of other texts a twentieth is for validation, and as much for test.

    What stands several times in training is trained on as often. It is measured once.
    """

    FACT_MASKS = ("qa", "digits", "twohop")

    @staticmethod
    def is_fact(text, kind):
        if isinstance(text, tuple):
            return True
        if kind not in Text.FACT_MASKS:
            return False
        return bool((label_mask(BYTES.encode(text)[None], kind) != IGNORE_INDEX).any())

    @staticmethod
    def make(c):
        found = read_documents(c.path, c.block_size)
        number, places, splits = {}, [], {}
        for split, documents in found.items():
            for document, where in documents:
                if document not in number:
                    number[document] = len(number)
                    places.append(where)
            splits[split] = np.array([number[document] for document, _ in documents], np.int32)
        texts = list(number)
        facts = np.array([Text.is_fact(text, c.mask) for text in texts], bool)
        able = "" in splits and facts.any()
        message = "heldout_facts has no effect: it takes facts from a file that has no folders"
        require(able or not c.heldout_facts, message, "heldout_facts")
        if "" in splits:
            splits = split_by_content(c, texts, facts, splits[""])
        trained = np.isin(np.arange(len(texts)), splits["train"])
        splits |= {split: np.unique(splits[split]) for split in ("val", "test")}
        seen = trained[np.concatenate([splits["val"], splits["test"]])]
        tags = {"seen": trained.astype(int)} if seen.any() and not seen.all() else {}
        sizes = {split: len(which) for split, which in splits.items()}
        source = FactDataset(c, c.mask, texts, splits, tags)
        source.places = places  # "file:line" of each document
        source.sizes = sizes  # of the splits, before n_val_examples and n_test_examples cut them
        return source


def split_by_content(c, texts, facts, rows):
    """The documents of one file in splits: {"train": numbers of texts (E',), "val", "test"}.

    facts: is each text one? (n,) bool. rows (E,): numbers of texts, one for each time it is there.
    It depends on the seed and on what the documents say, not on their order. Documents that say
    the same stay together.
    """
    stored, others = {}, {}  # what it says -> numbers of the documents that say it
    for number, text in enumerate(texts):
        kind = stored if facts[number] else others
        says = said(text[0] if isinstance(text, tuple) else text)
        kind.setdefault(says, []).append(number)
    stored, others = (by_chance(kind, c.seed) for kind in (stored, others))
    held = round(c.heldout_facts * len(stored))
    few = f"heldout_facts={c.heldout_facts} of {len(stored)} holds out none, or all"
    require(not c.heldout_facts or 0 < held < len(stored), few, "heldout_facts")
    need = "training, validation and test need one each at least"
    few = f"{c.path} has {len(others)} documents that differ; {need}"
    require(stored or len(others) >= 3, few, "path")
    n = max(1, len(others) // 20) if len(others) >= 3 else 0
    untrained = flat(stored[:held] + others[: 2 * n])
    return {
        "train": rows[~np.isin(rows, untrained)],
        "val": flat(stored + others[:n]),
        "test": flat(stored + others[n : 2 * n]),
    }


def by_chance(groups, seed):
    """{text: group} -> its groups in an order that the seed and each text alone decide."""
    digest = lambda text: hashlib.sha256(f"{seed} {text}".encode()).digest()
    return [groups[text] for text in sorted(groups, key=digest)]


def flat(groups):
    return np.array([number for group in groups for number in group], np.int32)


def said(text):
    """What tells two documents apart: neither the Unicode form nor blanks do."""
    return " ".join(unicodedata.normalize("NFC", text).split())


TASKS = {"qa": QA, "digits": Digits, "twohop": TwoHop, "hashhop": HashHop, "text": Text}
