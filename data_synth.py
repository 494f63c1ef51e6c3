r"""Facts to store, as text: synthetic QA, digit lookup, two-hop, HashHop, or your own documents.

    python data_synth.py                                           # print this text, with examples
    python data_synth.py qa --num_pairs 10000 --output_dir qa_10K  # or digits, twohop, hashhop
    python data_synth.py check --tokenizer tokenizer.json          # are label masks exact with it?
    python train.py --data data_synth --task qa --num_pairs 2000   # made in memory
    python train.py --data data_synth --path qa_10K                # what the second line wrote
    python train.py --data data_synth --task text --path notes.jsonl  # documents of your own

A document is one fact, or one HashHop problem. Only its answer is trained on and scored; [] marks
it here.

qa: pairs of numbers. An epoch shows a pair as often as its bucket says (exposures); some pairs of
each bucket are held out (0).

>>> show(Config(task="qa", num_pairs=16, buckets=(1, 4)))
'266133:[972938] '       {'exposures': 4, 'seen': 1}
'592345:[937705] '       {'exposures': 1, 'seen': 1}

digits: keys are words over the digits 1..n. The value is another such word, or follows a rule
(selfindex: value[i] = key[key[i]]).

>>> show(Config(task="digits", num_pairs=60, rule="selfindex"))
'51342:[25341] '         {'key': 'known'}
'11253:[11132] '         {'key': 'known'}

twohop: a>b for all entities; a>>c, where b>c, for some of them.

>>> show(Config(task="twohop", entities=50))
'16>>[30] '              {'query': 'trained'}
'43>[17] '               {'query': 'single fact'}

hashhop: chains of hashes in random order; say where one of them ends (magicproduct/hash-hop).

>>> show(Config(task="hashhop", hash_len=2, block_size=80, hops=(2,)), 1)
... # doctest: +NORMALIZE_WHITESPACE
"Wn = uy\niY = Dn\nuy = 'Ge'\nDn = 'AW'\n\nCOMPLETION:\nHops=2\n\nCoT=False\n\nWn = '[Ge]'\n"
{'hops': 2}

Each document is a pure function of the settings and its index. Each epoch has an order of its own,
a function of (seed, epoch).

Letters: n pairs or entities, W digits of a word, R relations, E documents in an epoch, B documents
in a batch, T tokens, N labels.
"""

import math
import os
import sys
from dataclasses import dataclass

import numpy as np
import torch

from nanorecall.documents import (
    check_answers,
    is_fact,
    read_documents,
    split_by_content,
    survey,
)
from nanorecall.fact_files import (
    CheckConfig,
    FactDataset,
    check_tokenizer,
    guess_baselines,
    read_facts,
    write_and_report,
)
from nanorecall.rng import IGNORE_INDEX, STREAMS, rng_for
from nanorecall.settings import (
    Setting,
    at_least,
    build_config,
    help_text,
    one_of,
    read_argv,
    reject_unknown,
    require,
    run_cli,
    say,
    within,
)
from nanorecall.text import (
    BYTES,
    MASKS,
    label_documents,
    mark_answers,
    read_tokenizer,
    shift_labels,
)

SETTINGS_OF = {  # task: the settings that not all tasks use
    "qa": "num_pairs digits buckets heldout inverse",
    "digits": "num_pairs rule steps num_novel",
    "twohop": "entities relations phi ood markers cot",
    "hashhop": "cot hops test_hops hash_len num_queries n_train_examples block_size",
    "text": "block_size mask heldout_facts",
}


@dataclass
class Config:
    task: str = "qa"  # qa, digits, twohop, hashhop or text
    path: str = ""  # a directory that data_synth.py wrote; text: .jsonl, .parquet or a directory
    num_pairs: int = 2000  # qa: pairs, with the held-out ones; digits: keys to train on
    digits: int = 6  # qa: digits in a number
    buckets: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)  # qa: exposures in an epoch
    heldout: float = 0.1  # qa: fraction of the pairs of each bucket that are never trained on
    inverse: str = "none"  # qa: "y:x" as well; probe: only measured; train: trained on, too
    rule: str = "random"  # digits: random values, or selfindex: value[i] = key[key[i]]
    steps: int = 1  # digits, selfindex: times that the rule is applied to its own result
    num_novel: int = 1000  # digits: keys that are never trained on
    entities: int = 100  # twohop: entities, each with one fact per relation
    relations: int = 1  # twohop: kinds of fact; from 2 on each has a letter: a>xb, and a>x>yc
    phi: float = 0.5  # twohop: trained two-hop queries per usable single fact (Wang et al.)
    ood: float = 0.2  # twohop: fraction of the single facts that no trained two-hop query uses
    markers: bool = True  # twohop: 0 writes a:b and a:c alike (LLMonade), with two answers a query
    cot: float = 0.0  # fraction of multi-hop answers with chain of thought; twohop: 0 or 1
    hops: tuple[int, ...] = (1,)  # hashhop: hops of training problems, in turn
    test_hops: tuple[int, ...] = (1, 2, 3, 4)  # hashhop: hops of val and test: easy to challenge
    hash_len: int = 4  # hashhop: letters in a hash
    num_queries: int = 1  # hashhop: queries in a training problem; others have one
    block_size: int = 256  # hashhop: bytes to fill; text: bytes of the longest document allowed
    n_train_examples: int = 20000  # hashhop: problems in an epoch; none is seen twice
    n_val_examples: int = 500  # validation documents, all groups alike; hashhop: per hops; 0: all
    n_test_examples: int = 5000  # test documents, likewise; 0: all (hashhop: 500)
    mask: str = "text"  # text: what to train on: text (everything), qa, hashhop, digits or twohop
    heldout_facts: float = 0.0  # text: fraction of the facts that are only measured, as seen=0
    packing: str = "none"  # documents: training documents end to end in one row; none: padded rows
    tokenizer: str = ""  # a tokenizer.json; empty: bytes
    seed: int = 0  # of data and model

    def check(self):
        one_of(self, TASKS, "task")
        one_of(self, MASKS, "mask")
        one_of(self, ("documents", "none"), "packing")
        one_of(self, ("none", "probe", "train"), "inverse")
        one_of(self, ("random", "selfindex"), "rule")
        at_least(self, 1, "num_pairs", "n_train_examples", "num_queries")
        at_least(self, 0, "seed", "num_novel", "n_val_examples", "n_test_examples")
        within(self, 1, 9, "digits", "steps")
        within(self, 2, 64, "hash_len")
        within(self, 1, 26, "relations")
        within(self, 3, 10**6, "entities")
        within(self, 8, 2**20, "block_size")
        within(self, 0, 0.9, "heldout", "heldout_facts", "ood")
        within(self, 0, 1, "cot")
        require(self.phi > 0, "phi must be above 0", "phi")
        for key in ("buckets", "hops", "test_hops"):
            values = getattr(self, key)
            message = f"{key}={values} needs numbers of at least 1"
            require(values and min(values) >= 1, message, key)
        unique = len(set(self.buckets)) == len(self.buckets)
        require(unique, f"buckets={self.buckets} names a bucket twice", "buckets")
        require(max(*self.hops, *self.test_hops) <= 16, "hops and test_hops end at 16", "hops")
        if self.task == "text":
            message = "--path FILE.jsonl, FILE.parquet or a directory"
            require(self.path, f"task=text needs the documents: {message}", "path")
        elif not self.path:
            TASKS[self.task].check(self)

    def unused(self):
        if self.path and self.task != "text":
            used = "task path packing tokenizer seed n_val_examples n_test_examples".split()
            reason = f"the data comes from path={self.path}"
            return {name: reason for name in vars(self) if name not in used}
        tasks_of = {}  # setting: the tasks that use it
        for task, names in SETTINGS_OF.items():
            for name in names.split():
                tasks_of.setdefault(name, []).append(task)
        reasons = {}
        for name, tasks in tasks_of.items():
            if self.task not in tasks:
                reasons[name] = f"only task {' '.join(tasks)} uses it"
        if self.rule == "random":
            reasons["steps"] = "rule is random"
        return reasons

    def label(self):
        """The data's part of a run's name."""
        if self.path:
            return f"{self.task}-{os.path.basename(os.path.normpath(self.path))}"
        return f"{self.task}-{TASKS[self.task].label(self)}"


# ---- the tasks: check(config), label(config), build(config) -> documents -------------------------
#
# What `build` returns has count(split), eval_groups(split), read(split, indices) -> texts and
# slices, .kind (of label mask) and .baselines (accuracy without knowledge).


class QA:
    """ "x:y " of numbers of one width, all different (LLMonade: MQAR and Synthetic QA). Buckets of
    equally many pairs have different exposures. The held-out pairs of each bucket are the control:
    no model can know them."""

    @staticmethod
    def check(c):
        n, n_buckets = c.num_pairs, len(c.buckets)
        near = max(1, round(n / n_buckets)) * n_buckets
        message = f"num_pairs={n} does not divide into {n_buckets} buckets; {near} does"
        require(n % n_buckets == 0, message, "num_pairs")
        need = f"{n} pairs need {2 * n} different numbers"
        message = f"{need}; digits={c.digits} has {10**c.digits}"
        require(2 * n <= 10**c.digits, message, "digits")
        size = n // n_buckets
        n_seen = size - QA.n_heldout(c)
        message = f"heldout={c.heldout} leaves no pair of {size} to train on"
        require(n_seen > 0, message, "heldout")
        E = n_seen * sum(c.buckets)
        message = f"an epoch of {E} documents is too long; lower buckets or num_pairs"
        require(E <= 10**8, message, "buckets")

    @staticmethod
    def label(c):
        return f"{c.num_pairs}-pairs"

    @staticmethod
    def n_heldout(c):
        """Held-out pairs in each bucket."""
        return max(1, round(c.heldout * c.num_pairs / len(c.buckets))) if c.heldout else 0

    @staticmethod
    def build(c):
        n = c.num_pairs
        rng = rng_for(c.seed, STREAMS["facts"])
        numbers = rng.choice(10**c.digits, 2 * n, replace=False)
        names = [f"{number:0{c.digits}d}" for number in numbers]
        pairs = list(zip(names[:n], names[n:]))
        # The names are in random order, so the first pairs of each bucket may be the held-out ones.
        size = n // len(c.buckets)
        bucket = np.repeat(c.buckets, size)
        number = np.arange(n)
        seen = number % size >= QA.n_heldout(c)
        texts = [f"{x}:{y} " for x, y in pairs]
        slices = {"exposures": np.where(seen, bucket, 0), "seen": seen.astype(int)}
        train = np.repeat(number[seen].astype(np.int32), bucket[seen])
        test = number
        if c.inverse != "none":
            texts += [f"{y}:{x} " for x, y in pairs]
            slices = {name: np.tile(values, 2) for name, values in slices.items()}
            slices["direction"] = np.repeat(["forward", "inverse"], n)
            test = np.arange(2 * n)
        if c.inverse == "train":
            train = np.concatenate([train, train + n])
        trained = [pair for pair, s in zip(pairs, seen) if s]
        heldout = [pair for pair, s in zip(pairs, seen) if not s]
        n_facts = len(trained) * (2 if c.inverse == "train" else 1)
        capacity = {"slice": "seen=1", "facts": n_facts, "bits": math.log2(10)}
        if c.inverse == "probe":  # an inverse answer follows from its pair
            capacity = {}
        splits = {"train": train, "val": test, "test": test}
        baselines = guess_baselines(trained, heldout)
        return FactDataset(c, "qa", texts, splits, slices, baselines, capacity)


class Digits:
    """ "key:value " of words of W digits from 1..W, W as small as the number of keys allows (6 for
    6K and 20K pairs, 7 for 200K). rule=random must be memorised; rule=selfindex, value[i] =
    key[key[i]], can be worked out for new keys."""

    @staticmethod
    def width(c):
        return next(W for W in range(2, 10) if W**W >= c.num_pairs + c.num_novel)

    @staticmethod
    def check(c):
        message = f"there are {9**9} keys; lower num_pairs"
        require(c.num_pairs + c.num_novel <= 9**9, message, "num_pairs")

    @staticmethod
    def label(c):
        return f"{c.num_pairs}-{c.rule}"

    @staticmethod
    def build(c):
        W = Digits.width(c)
        n, total = c.num_pairs, c.num_pairs + c.num_novel
        numbers = rng_for(c.seed, STREAMS["facts"]).choice(W**W, total, replace=False)
        keys = numbers[:, None] // W ** np.arange(W)[::-1] % W  # (total, W), digits from 0
        if c.rule == "random":
            values = rng_for(c.seed, STREAMS["values"]).integers(W, size=keys.shape)
            capacity = {"slice": "key=known", "facts": n, "bits": math.log2(W)}
        else:
            values = keys
            for _ in range(c.steps):  # the word, as a map of positions, applied to itself
                values = np.take_along_axis(values, values, axis=1)
            capacity = {}
        pairs = [(word(key), word(value)) for key, value in zip(keys, values)]
        known, novel = np.arange(n), np.arange(n, total)
        splits = {
            "train": known,
            "val": np.concatenate([known, novel[::2]]),
            "test": np.concatenate([known, novel[1::2]]),
        }
        texts = [f"{key}:{value} " for key, value in pairs]
        slices = {"key": np.repeat(["known", "novel"], [n, c.num_novel])}
        baselines = guess_baselines(pairs[:n], pairs[n:])
        return FactDataset(c, "digits", texts, splits, slices, baselines, capacity)


def word(digits):
    return "".join(str(digit + 1) for digit in digits)


class TwoHop:
    """Single facts "a>b ", all trained on, and composed ones "a>>c ", c the fact of the fact, some
    of them trained on (Wang et al. 2024, arXiv 2405.15071). A composed query is trained;
    in-distribution: not trained, but trained queries use both of its facts; or out-of-distribution:
    no trained query uses either. Each relation is a permutation without fixed points."""

    @staticmethod
    def check(c):
        message = "cot must be 0 or 1 for twohop: a query has one right answer"
        require(c.cot in (0, 1), message, "cot")
        n_queries = c.entities * c.relations**2
        message = f"{n_queries} queries of two hops are too many; lower entities or relations"
        require(n_queries <= 10**6, message, "relations")
        require(c.markers or not c.cot, "cot needs markers=1", "cot")
        require(c.markers or c.relations == 1, "relations need markers=1", "relations")

    @staticmethod
    def label(c):
        return f"{c.entities}x{c.relations}-phi{c.phi:g}"

    @staticmethod
    def build(c):
        n, R = c.entities, c.relations
        rng = rng_for(c.seed, STREAMS["facts"])
        maps = np.stack([derangement(rng, n) for _ in range(R)])  # (R, n)
        r1, r2, a = (index.ravel() for index in np.indices((R, R, n)))  # of all queries
        b = maps[r1, a]
        end = maps[r2, b]
        trained, in_dist, out_dist = TwoHop.split_queries(c, rng, r1, r2, a, b)

        def name(entity):
            return f"{entity:0{len(str(n - 1))}d}"

        mark = [""] if R == 1 else [chr(ord("a") + r) for r in range(R)]
        one = ">" if c.markers else ":"
        texts = []
        for r in range(R):
            for entity in range(n):
                texts.append(f"{name(entity)}{one}{mark[r]}{name(maps[r, entity])} ")
        for i in np.concatenate([trained, in_dist, out_dist]):
            marks = f">{mark[r1[i]]}>{mark[r2[i]]}" if c.markers else one
            between = f"{name(b[i])}>" if c.cot else ""
            texts.append(f"{name(a[i])}{marks}{between}{name(end[i])} ")
        sizes = {
            "single fact": n * R,
            "trained": len(trained),
            "in-distribution": len(in_dist),
            "out-of-distribution": len(out_dist),
        }
        query = np.repeat(list(sizes), list(sizes.values()))
        number = np.arange(len(texts))
        # What is trained on is in all splits, the other queries in one of val and test.
        train = (query == "single fact") | (query == "trained")
        even = number % 2 == 0
        splits = {
            "train": number[train],
            "val": number[train | even],
            "test": number[train | ~even],
        }
        trained_pairs = [(name(a[i]), name(end[i])) for i in trained]
        in_dist_pairs = [(name(a[i]), name(end[i])) for i in in_dist]
        baselines = {}
        for guess, accuracy in guess_baselines(trained_pairs, in_dist_pairs).items():
            baselines[f"{guess} of the last entity"] = accuracy
        kind = "twohop" if c.markers else "digits"
        return FactDataset(c, kind, texts, splits, {"query": query}, baselines)

    @staticmethod
    def split_queries(c, rng, r1, r2, a, b):
        """Queries a -r1-> b -r2-> ? -> numbers of the trained, in- and out-of-distribution ones."""
        # Single facts that trained queries may use. The others are withheld in pairs that compose,
        # so that there are out-of-distribution queries.
        usable = np.ones((c.relations, c.entities), bool)
        for i in rng.permutation(len(a)):
            if (~usable).sum() >= c.ood * usable.size:
                break
            usable[r1[i], a[i]] = usable[r2[i], b[i]] = False
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
        used[r1[trained], a[trained]] = used[r2[trained], b[trained]] = True
        in_dist = in_dist[used[r1[in_dist], a[in_dist]] & used[r2[in_dist], b[in_dist]]]
        return trained, in_dist, out_dist


def derangement(rng, n):
    """A permutation of range(n) that leaves nothing in its place."""
    while True:
        permutation = rng.permutation(n)
        if (permutation != np.arange(n)).all():
            return permutation


LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"))


class HashHop:
    """Chains of hashes, "a = b" and at their end "c = 'd'", in random order; then "COMPLETION:",
    the number of hops, and queries: a hash and the end of its chain (the text of
    github.com/magicproduct/hash-hop). Problems are made when they are asked for."""

    kind = "hashhop"

    def __init__(self, c):
        self.config = c
        self.baselines = {}
        for hops in c.test_hops:
            name = f"any end of a chain, whole answers, hops={hops}"
            self.baselines[name] = 1 / self.n_chains(c, hops, 1)

    @staticmethod
    def header(hops, cot):
        return f"\nCOMPLETION:\nHops={hops}\n\nCoT={cot}\n\n"

    @staticmethod
    def n_chains(c, hops, queries):
        """Chains that fit into block_size tokens (bytes, and BOS) beside the completion."""
        pair = 2 * c.hash_len + 4
        answer = pair + 2
        if c.cot > 0:
            answer += (hops - 1) * (c.hash_len + 3)
        rest = 1 + len(HashHop.header(hops, False)) + queries * answer
        return (c.block_size - rest) // (hops * pair + 2)

    @staticmethod
    def check(c):
        problems = [(hops, c.num_queries) for hops in c.hops]
        problems += [(hops, 1) for hops in c.test_hops]
        for hops, queries in problems:
            fit = HashHop.n_chains(c, hops, queries)
            need = max(2, queries)
            more = c.block_size + (need - fit) * (hops * (2 * c.hash_len + 4) + 2)
            small = f"block_size={c.block_size} is too small for {need} chains of {hops} hops"
            require(fit >= need, f"{small}; use at least {more}", "block_size")
            n_hashes = fit * (hops + 1)
            message = f"hash_len={c.hash_len} is too short for {n_hashes} hashes"
            # Else most draws of unique_hashes would repeat a hash and be thrown away.
            require(n_hashes**2 < 52**c.hash_len * 8, message, "hash_len")

    @staticmethod
    def label(c):
        return f"{'-'.join(map(str, c.hops))}-{c.block_size}"

    @classmethod
    def build(cls, c):
        return cls(c)

    def count(self, split):
        if split == "train":
            return self.config.n_train_examples
        return sum(len(group) for group in self.eval_groups(split))

    def eval_groups(self, split):
        c = self.config
        n = (c.n_val_examples if split == "val" else c.n_test_examples) or 500
        return [range(i * n, (i + 1) * n) for i in range(len(c.test_hops))]

    def read(self, split, indices):
        texts, hops, hops_cot = [], [], []
        for index in np.asarray(indices).tolist():
            text, n_hops, cot = self.make_example(split, index)
            texts.append(text)
            hops.append(n_hops)
            hops_cot.append(f"{n_hops} cot" if cot else f"{n_hops}")
        slices = {"hops": np.array(hops)}
        if self.config.cot:
            slices["hops_cot"] = np.array(hops_cot)
        return texts, slices

    def make_example(self, split, index):
        """-> text, hops, has it a chain of thought?"""
        c = self.config
        rng = rng_for(c.seed, STREAMS[split], index)
        if split == "train":
            hops, queries = c.hops[index % len(c.hops)], c.num_queries
        else:
            hops, queries = c.test_hops[index // len(self.eval_groups(split)[0])], 1
        cot = hops > 1 and rng.random() < c.cot
        n = self.n_chains(c, hops, queries)
        hashes = unique_hashes(rng, n * (hops + 1), c.hash_len)
        chains = [hashes[i * (hops + 1) : (i + 1) * (hops + 1)] for i in range(n)]
        lines = []
        for chain in chains:
            lines += [f"{a} = {b}" for a, b in zip(chain, chain[1:-1])]
        lines += [f"{chain[-2]} = '{chain[-1]}'" for chain in chains]
        lines = [lines[i] for i in rng.permutation(len(lines))]
        answers = []
        for chain in chains[:queries]:  # any will do: the lines are in random order
            answer = " = ".join(chain[1:]) if cot else chain[-1]
            answers.append(f"{chain[0]} = '{answer}'")
        parts = ["\n".join(lines), self.header(hops, cot) + "\n".join(answers), ""]
        return "\n".join(parts), hops, cot


def unique_hashes(rng, n, length):
    """n different random words."""
    while True:
        letters = LETTERS[rng.integers(len(LETTERS), size=(n, length))]
        words = ["".join(row) for row in letters]
        if len(set(words)) == n:
            return words


class Text:
    """Your own documents: "text", or "question" and "answer", of which the answer is trained on.

    A directory with train, validation and test in it says what is in each. Otherwise: a fact is a
    question with its answer, or a text in which a mask finds one. All facts are trained on and
    measured, for what counts is how many are stored; `heldout_facts` of them are only measured. Of
    other texts a twentieth is for validation, and as many for the test.

    A document that is there several times is trained on as often, and measured once.
    """

    @staticmethod
    def build(c):
        texts, origins, splits = read_documents(c.path, c.block_size)
        facts = np.array([is_fact(text, c.mask) for text in texts], bool)
        can_hold_out = "" in splits and facts.any()
        message = "heldout_facts has no effect: it takes facts from a file that has no folders"
        require(can_hold_out or not c.heldout_facts, message, "heldout_facts")
        if "" in splits:
            splits = split_by_content(c, texts, facts, splits[""])
        for split in ("val", "test"):
            splits[split] = np.unique(splits[split])
        trained = np.isin(np.arange(len(texts)), splits["train"])
        seen = trained[np.concatenate([splits["val"], splits["test"]])]
        slices = {"seen": trained.astype(int)} if seen.any() and not seen.all() else {}
        source = FactDataset(c, c.mask, texts, splits, slices)
        source.origins = origins  # "file:line" of each document
        # before n_val_examples and n_test_examples
        source.sizes = {split: len(numbers) for split, numbers in splits.items()}
        return source


TASKS = {"qa": QA, "digits": Digits, "twohop": TwoHop, "hashhop": HashHop, "text": Text}


# ---- the data, as train.py and eval.py use it ----------------------------------------------------


class Data:
    """.vocab_size, .seq_len (of the longest document), .baselines {name: accuracy without
    knowledge}, .notes (lines about your own documents, for train.py to print), and the methods of
    data_mqar.Data. With packing=documents a training batch is one row, and batch returns
    cu_seqlens, too."""

    def __init__(self, config):
        self.config = c = config
        self.tokenizer = read_tokenizer(c.tokenizer)
        if c.path and c.task != "text":
            self.source = read_facts(c, TASKS)
        else:
            self.source = TASKS[c.task].build(c)
        self.kind, self.baselines = self.source.kind, self.source.baselines
        self.vocab_size = self.tokenizer.vocab_size
        self.seq_len = self.max_length()
        # The position of a digit or letter in its answer is a slice, unless answers are sentences.
        texts = getattr(self.source, "texts", [""])
        has_words = any(isinstance(text, str) for text in texts)
        self.has_positions = self.kind != "text" and has_words
        check_answers(self)
        self.notes = survey(self) if c.task == "text" else []

    def max_length(self):
        if isinstance(self.source, FactDataset):
            return max(len(self.encode_document(text)[0]) for text in self.source.texts)
        # Bytes fill block_size at most. Another tokenizer makes no more tokens than there are
        # bytes, and a few for its own needs.
        return self.config.block_size + (0 if self.tokenizer is BYTES else 64)

    def batch_indices(self, step, batch_size):
        return range(step * batch_size, (step + 1) * batch_size)

    def steps_per_epoch(self, batch_size):
        return max(1, self.source.count("train") // batch_size)

    def eval_groups(self, split):
        return self.source.eval_groups(split)

    def batch(self, split, step, indices):
        """-> tokens (B, T) long, targets (B, T) long, slices {name: (N,) array}; if packed, B is 1
        and cu_seqlens (documents + 1,) int32 comes fourth."""
        texts, slices = self.source.read(split, indices)
        flat, labels, cu_seqlens = self.encode_and_label(texts)
        n_labels = np.add.reduceat(labels != IGNORE_INDEX, cu_seqlens[:-1])  # of each document
        slices = {name: np.repeat(values, n_labels) for name, values in slices.items()}
        if self.has_positions:
            first = np.cumsum(n_labels) - n_labels
            slices["place"] = np.arange(n_labels.sum()) - np.repeat(first, n_labels)
        if self.config.packing == "documents" and split == "train":
            tokens = torch.from_numpy(flat[None]).long()
            targets = torch.from_numpy(shift_labels(labels[None])).long()
            return tokens, targets, slices, torch.from_numpy(cu_seqlens)
        lengths = np.diff(cu_seqlens)
        inside = np.arange(lengths.max()) < lengths[:, None]  # (B, T), not padding
        tokens = np.full(inside.shape, self.tokenizer.pad, np.int64)
        padded_labels = np.full(inside.shape, IGNORE_INDEX, np.int64)
        tokens[inside] = flat
        padded_labels[inside] = labels
        targets = shift_labels(padded_labels)
        return torch.from_numpy(tokens), torch.from_numpy(targets), slices

    def encode_and_label(self, texts):
        """-> tokens (N,) of documents end to end, labels (N,), cu_seqlens (documents + 1,)."""
        documents, answer_starts = zip(*map(self.encode_document, texts))
        return label_documents(documents, answer_starts, self.kind, self.tokenizer)

    def encode_document(self, text):
        """A text, or (question, answer) -> tokens (T,), start of the answer (0: unknown)."""
        if isinstance(text, tuple):
            question, answer = (self.tokenizer.encode(part) for part in text)
            return self.add_special_tokens(question, answer), 1 + len(question)
        return self.add_special_tokens(self.tokenizer.encode(text)), 0

    def add_special_tokens(self, *parts):
        """BOS before, and EOS after what has no end of its own."""
        end = [self.tokenizer.eos] if self.config.task == "text" else []
        return np.concatenate([[self.tokenizer.bos], *parts, end]).astype(np.int32)


# ---- command line --------------------------------------------------------------------------------


@dataclass
class DatasetConfig(Config):
    output_dir: str = ""  # directory to write; it must not exist yet; empty: qa-2000-pairs etc.
    format: str = "parquet"  # parquet or jsonl
    n_val_examples: int = 0  # documents of validation at most; 0: all (hashhop: 500 for each hops)
    n_test_examples: int = 0  # likewise

    def unused(self):
        return super().unused() | dict.fromkeys(("packing", "tokenizer"), "what is written is text")

    def check(self):
        super().check()
        one_of(self, ("parquet", "jsonl"), "format")
        message = "task=text reads documents; there is nothing to write"
        require(self.task != "text", message, "task")
        message = f"path={self.path} is a data set already; leave it out to write another"
        require(not self.path, message, "path")
        self.output_dir = self.output_dir or self.label()


def show(config, documents=2):
    """Print the first training documents with [] around what is scored, and their slices."""
    data = Data(config)
    texts, _ = data.source.read("train", range(documents))
    for index, text in enumerate(texts):
        tokens, targets, slices, *_ = data.batch("train", 0, [index])
        if isinstance(text, str):
            text = mark_answers(data.tokenizer, tokens[0].tolist(), targets[0].tolist())
        slices.pop("place", None)
        slices = {name: values[0].item() for name, values in slices.items()}
        say(f"{text!r:24}", slices or "")


def main(argv=None):
    args, settings = read_argv(sys.argv[1:] if argv is None else argv)
    if any(s.key == "help" for s in settings):
        say(help_text(__doc__, DatasetConfig))
        return 0
    command = args.pop(0) if args else ""
    unknown = f"{' '.join(args)!r} is neither an override file (.py) nor a flag (--key=value)"
    require(not args, unknown, None)
    if not command and not settings:
        print(__doc__.strip())
        return 0
    commands = [*TASKS, "check"]
    usage = f"python data_synth.py {'|'.join(commands)} --key=value"
    require(command in commands, f"name what to do first: {usage}", None)
    if command == "check":
        reject_unknown(settings, CheckConfig)
        return check_tokenizer(build_config(CheckConfig, settings).tokenizer, Config, TASKS)
    reject_unknown(settings, DatasetConfig)
    has_task = any(s.key == "task" for s in settings)
    require(not has_task, f"the task is {command} already; leave out --task", None)
    config = build_config(DatasetConfig, [Setting("task", command, command), *settings])
    write_and_report(config, TASKS[config.task].build(config))
    return 0


if __name__ == "__main__":
    run_cli(main)
