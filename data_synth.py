r"""Facts to store, as text: synthetic QA, digit lookup, two-hop, HashHop, or your own documents.

    python data_synth.py                                           # print this text, with examples
    python data_synth.py qa --num_pairs 10000 --output_dir qa_10K  # or digits, twohop, hashhop
    python data_synth.py check --tokenizer tokenizer.json          # are label masks exact with it?
    python train.py --data data_synth --task qa --num_pairs 2000   # made in memory
    python train.py --data data_synth --path qa_10K                # what the second line wrote
    python train.py --data data_synth --task text --path notes.jsonl  # documents of your own

A document is one fact, or one HashHop problem. Only its answer is trained on and scored; [] marks
it here.

qa: pairs of numbers. An epoch shows a pair as often as its bucket says (exposures). Some pairs of
each bucket are held out (exposures 0).

>>> show(Config(task="qa", num_pairs=16, buckets=(1, 4)))
'266133:[972938] '       {'exposures': 4, 'seen': 1}
'592345:[937705] '       {'exposures': 1, 'seen': 1}

With context_docs, other documents show pairs and ask one of them. With forms=2, each pair is also
asked in a second wording.

>>> show(Config(task="qa", num_pairs=12, buckets=(2,), forms=2))
'617214:[573826] '       {'exposures': 2, 'seen': 1, 'form': 'first'}
'q 617214?[573826]'      {'exposures': 2, 'seen': 1, 'form': 'second'}

digits: keys are words of W digits from 1 to W. The value is another such word, or follows a rule
(selfindex: value[i] = key[key[i]]).

>>> show(Config(task="digits", num_pairs=60, rule="selfindex"))
'51342:[25341] '         {'key': 'known'}
'11253:[11132] '         {'key': 'known'}

twohop: a>b for all entities; a>>c, where b>c, for some of them.

>>> show(Config(task="twohop", num_entities=50))
'16>>[30] '              {'query': 'trained'}
'43>[17] '               {'query': 'single fact'}

hashhop: chains of hashes in random order; say where one of them ends (magicproduct/hash-hop).

>>> show(Config(task="hashhop", hash_len=2, max_bytes=80, hops=(2,)), 1)
... # doctest: +NORMALIZE_WHITESPACE
"Wn = uy\niY = Dn\nuy = 'Ge'\nDn = 'AW'\n\nCOMPLETION:\nHops=2\n\nCoT=False\n\nWn = '[Ge]'\n"
{'hops': 2}

Each document is a pure function of the settings and its index. The order of an epoch is a function
of (seed, epoch).

Letters: n pairs, W digits of a word, E documents in an epoch, B in a batch, T tokens, N labels.
"""

import math
import os
import sys
from dataclasses import dataclass

import numpy as np
import torch

from nanorecall import fact_files
from nanorecall.documents import check_answers, read_and_split, survey
from nanorecall.fact_files import FactDataset, guess_baselines, read_facts
from nanorecall.hashhop import build_hashhop, check_hashhop
from nanorecall.rng import STREAMS, rng_for
from nanorecall.settings import at_least, one_of, require, run_cli, say, within
from nanorecall.text import MASKS, DocumentEncoder, mark_answers, read_tokenizer
from nanorecall.twohop import build_twohop, check_twohop

SETTINGS_OF = {  # task: the settings that not all tasks use
    "qa": "num_pairs num_digits buckets heldout_frac reverse_pairs forms second_form_frac "
    "context_docs context_pairs",
    "digits": "num_pairs rule rule_steps num_unseen",
    "twohop": "num_entities num_relations phi ood_frac markers cot_frac",
    "hashhop": "cot_frac hops test_hops hash_len hash_lens num_queries n_train_examples max_bytes",
    "text": "max_bytes label_mask heldout_facts",
}


@dataclass
class Config:
    task: str = "qa"  # qa, digits, twohop, hashhop or text
    path: str = ""  # what data_synth.py wrote; text: .jsonl, .parquet, .csv or a directory
    num_pairs: int = 2000  # qa: pairs, with the held-out ones; digits: keys to train on
    num_digits: int = 6  # qa: digits in a number
    buckets: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)  # qa: exposures in an epoch
    heldout_frac: float = 0.1  # qa: fraction of each bucket's pairs that are never trained on
    reverse_pairs: str = "none"  # qa: add "y:x"; probe: only measured; train: also trained on
    forms: int = 1  # qa: wordings of each pair, "x:y " and with 2 also "q x?y"
    second_form_frac: float = 1.0  # qa: fraction of pairs that are trained on in both wordings
    context_docs: int = 0  # qa: training documents that show other pairs and ask one of them
    context_pairs: int = 4  # qa: pairs that such a document shows at most
    rule: str = "random"  # digits: random values, or selfindex: value[i] = key[key[i]]
    rule_steps: int = 1  # digits, selfindex: times that the rule is applied to its own result
    num_unseen: int = 1000  # digits: keys that are never trained on
    num_entities: int = 100  # twohop: entities, each with one fact per relation
    num_relations: int = 1  # twohop: kinds of fact; from 2 on each has a letter: a>xb, and a>x>yc
    phi: float = 0.5  # twohop: trained two-hop queries per usable single fact (Wang et al.)
    ood_frac: float = 0.2  # twohop: fraction of single facts that no trained two-hop query uses
    markers: bool = True  # twohop: 0 writes a:b and a:c alike (LLMonade), with two answers a query
    cot_frac: float = 0.0  # fraction of multi-hop answers with chain of thought; twohop: 0 or 1
    hops: tuple[int, ...] = (1,)  # hashhop: hops of training problems, in turn
    test_hops: tuple[int, ...] = (1, 2, 3, 4)  # hashhop: hops in val and test, in increasing order
    hash_len: int = 4  # hashhop: letters in a hash
    hash_lens: tuple[int, ...] = ()  # hashhop: mix these instead, one for each problem, in turn
    num_queries: int = 1  # hashhop: queries in a training problem; others have one
    max_bytes: int = 256  # hashhop: bytes to fill; text: bytes of the longest document allowed
    n_train_examples: int = 20000  # hashhop: problems in an epoch; none is seen twice
    n_val_examples: int = 500  # validation documents, balanced over the first slice; 0: all
    n_test_examples: int = 5000  # test documents, likewise; hashhop: per number of hops (0: 500)
    label_mask: str = "text"  # text: what to train on: text (all), qa, hashhop, digits or twohop
    heldout_facts: float = 0.0  # text: fraction of the facts that are only measured, as seen=0
    pack_documents: bool = False  # training documents end to end in one sequence; 0: padded
    tokenizer: str = ""  # a tokenizer.json; empty: bytes
    seed: int = 0  # of data and model

    def check(self):
        one_of(self, BUILD, "task")
        one_of(self, MASKS, "label_mask")
        one_of(self, ("none", "probe", "train"), "reverse_pairs")
        one_of(self, ("random", "selfindex"), "rule")
        at_least(self, 1, "num_pairs", "n_train_examples", "num_queries", "context_pairs")
        at_least(self, 0, "seed", "num_unseen", "context_docs", "n_val_examples", "n_test_examples")
        within(self, 1, 9, "num_digits", "rule_steps")
        within(self, 1, 2, "forms")
        within(self, 2, 64, "hash_len")
        message = f"hash_lens={self.hash_lens} needs different numbers from 2 to 64"
        valid = all(2 <= length <= 64 for length in self.hash_lens)
        valid = valid and len(set(self.hash_lens)) == len(self.hash_lens)
        require(valid, message, "hash_lens")
        within(self, 1, 26, "num_relations")
        within(self, 3, 10**6, "num_entities")
        within(self, 8, 2**20, "max_bytes")
        within(self, 0, 0.9, "heldout_frac", "heldout_facts", "ood_frac")
        within(self, 0, 1, "cot_frac", "second_form_frac")
        require(self.phi > 0, "phi must be above 0", "phi")
        for key in ("buckets", "hops", "test_hops"):
            values = getattr(self, key)
            message = f"{key}={values} needs numbers of at least 1"
            require(values and min(values) >= 1, message, key)
        unique = len(set(self.buckets)) == len(self.buckets)
        require(unique, f"buckets={self.buckets} names a bucket twice", "buckets")
        require(max(*self.hops, *self.test_hops) <= 16, "hops and test_hops end at 16", "hops")
        if self.task == "text":
            message = "--path FILE.jsonl, .parquet, .csv or a directory"
            require(self.path, f"task=text needs the documents: {message}", "path")
        elif not self.path:
            CHECK[self.task](self)

    def unused(self):
        if self.path and self.task != "text":
            used = "task path pack_documents tokenizer seed n_val_examples n_test_examples".split()
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
            reasons["rule_steps"] = "rule is random"
        if self.forms == 1:
            reasons["second_form_frac"] = "forms is 1"
        if not self.context_docs:
            reasons["context_pairs"] = "context_docs is 0"
        if self.hash_lens:
            reasons["hash_len"] = f"hash_lens={self.hash_lens} names the lengths"
        return reasons

    def label(self):
        """The data's part of a run's name."""
        if self.path:
            return f"{self.task}-{os.path.basename(os.path.normpath(self.path))}"
        labels = {
            "qa": f"{self.num_pairs}-pairs",
            "digits": f"{self.num_pairs}-{self.rule}",
            "twohop": f"{self.num_entities}x{self.num_relations}-phi{self.phi:g}",
            "hashhop": f"{'-'.join(map(str, self.hops))}-{self.max_bytes}",
        }
        return f"{self.task}-{labels[self.task]}"


# ---- qa ------------------------------------------------------------------------------------------


def build_qa(c):
    """Pairs of numbers "x:y ", of one width and all different (LLMonade: MQAR and Synthetic QA).

    Buckets of equally many pairs have different exposures. The held-out pairs of each bucket are
    the control: no model can know them. With forms=2, of some pairs both wordings are trained on,
    and of the others the first.
    """
    n = c.num_pairs
    words = draw_numbers(rng_for(c.seed, STREAMS["facts"]), 2 * n, c.num_digits)
    keys, values = words[:n], words[n:]
    size = n // len(c.buckets)
    # The numbers are in random order, so the first pairs of each bucket may be the held-out ones.
    seen = np.arange(n) % size >= n_heldout(c)
    exposures = np.where(seen, np.repeat(c.buckets, size), 0)
    texts = fact_texts(keys, values)
    slices = {"exposures": exposures, "seen": seen.astype(int)}
    # int32, because an epoch may have 10^8 documents.
    train = np.repeat(np.arange(n, dtype=np.int32), exposures)
    test = np.arange(n)
    capacity = {"slice": "seen=1", "facts": int(seen.sum()), "bits": math.log2(10)}
    if c.reverse_pairs != "none":
        texts += fact_texts(values, keys)
        slices = {name: np.tile(column, 2) for name, column in slices.items()}
        slices["direction"] = np.repeat(["forward", "reverse"], n)
        test = np.arange(2 * n)
    if c.reverse_pairs == "train":
        train = np.concatenate([train, train + n])
        capacity["facts"] *= 2
    if c.forms == 2:
        texts += [second_form(text) for text in texts]
        slices = {name: np.tile(column, 2) for name, column in slices.items()}
        in_both = seen & (np.arange(n) % size < n_heldout(c) + n_in_both_forms(c))
        second = np.where(in_both, "second", "second, untrained")
        forms = np.concatenate([np.repeat("first", n), second])
        slices["form"] = np.where(slices["seen"], forms, "held out")
        train = np.concatenate([train, n + train[in_both[train]]])
        test = np.arange(2 * n)
    if c.reverse_pairs == "probe" or c.forms == 2 and not in_both[seen].all():
        # The other answers follow from stored pairs, so their bits are not stored bits.
        capacity = {}
    if c.context_docs:
        train = np.concatenate([train, len(texts) + np.arange(c.context_docs)])
        texts = texts + context_documents(c)
        for name, column in slices.items():
            # They are in no split that is measured, so any value does.
            slices[name] = np.concatenate([column, np.repeat(column[:1], c.context_docs)])
    splits = {"train": train, "val": test, "test": test}
    baselines = guess_baselines(keys, values, seen)
    return FactDataset(c, "qa", texts, splits, slices, baselines, capacity)


def check_qa(c):
    n, n_buckets = c.num_pairs, len(c.buckets)
    near = max(1, round(n / n_buckets)) * n_buckets
    message = f"num_pairs={n} does not divide into {n_buckets} buckets; {near} does"
    require(n % n_buckets == 0, message, "num_pairs")
    need = f"{n} pairs need {2 * n} different numbers"
    message = f"{need}; num_digits={c.num_digits} has {10**c.num_digits}"
    require(2 * n <= 10**c.num_digits, message, "num_digits")
    size = n // n_buckets
    n_seen = size - n_heldout(c)
    message = f"heldout_frac={c.heldout_frac} leaves no pair of {size} to train on"
    require(n_seen > 0, message, "heldout_frac")
    message = f"a context of {c.context_pairs} pairs needs {2 * c.context_pairs} different numbers"
    enough = c.context_docs == 0 or 2 * c.context_pairs <= 10**c.num_digits
    require(enough, f"{message}; num_digits={c.num_digits} has {10**c.num_digits}", "context_pairs")
    message = "forms=2 takes no reversed pairs: leave out reverse_pairs"
    require(c.forms == 1 or c.reverse_pairs == "none", message, "reverse_pairs")
    n_shown = n_seen + (n_in_both_forms(c) if c.forms == 2 else 0)
    E = n_shown * sum(c.buckets) + c.context_docs
    message = f"an epoch of {E} documents is too long; lower buckets, num_pairs or context_docs"
    require(E <= 10**8, message, "buckets")


def n_heldout(c):
    """Held-out pairs in each bucket."""
    if c.heldout_frac == 0:
        return 0
    return max(1, round(c.heldout_frac * c.num_pairs / len(c.buckets)))


def n_in_both_forms(c):
    """Pairs in each bucket that are trained on in both wordings."""
    n_seen = c.num_pairs // len(c.buckets) - n_heldout(c)
    return round(c.second_form_frac * n_seen)


def draw_numbers(rng, n, num_digits):
    """n different numbers of one width, as text."""
    numbers = rng.choice(10**num_digits, n, replace=False)
    return [f"{number:0{num_digits}d}" for number in numbers]


def fact_texts(keys, values):
    return [f"{key}:{value} " for key, value in zip(keys, values)]


def second_form(fact):
    """The second wording of a fact: "x:y " -> "q x?y". The label mask qa finds both answers."""
    key, value = fact.strip().split(":")
    return f"q {key}?{value}"


def context_documents(c):
    """Documents that show 1 to context_pairs pairs and ask one of them: [(question, answer)].

    The pairs differ in each document, so that the answer must be found in the context.
    """
    rng = rng_for(c.seed, STREAMS["contexts"])
    documents = []
    for _ in range(c.context_docs):
        n = rng.integers(1, c.context_pairs + 1)
        words = draw_numbers(rng, 2 * n, c.num_digits)
        pairs = fact_texts(words[:n], words[n:])
        question, answer = split_fact(pairs[rng.integers(n)])
        documents.append(("".join(pairs) + question, answer))
    return documents


def split_fact(fact):
    """A fact "x:y " -> its question "x:", its answer "y"."""
    key, value = fact.strip().split(":")
    return f"{key}:", value


# ---- digits --------------------------------------------------------------------------------------


def build_digits(c):
    """Words "key:value " of W digits from 1..W, W as small as the number of keys allows: 6 for 6K
    and 20K pairs, 7 for 200K.

    rule=random must be memorised; rule=selfindex, value[i] = key[key[i]], holds for unseen keys.
    """
    n, n_keys = c.num_pairs, c.num_pairs + c.num_unseen
    W = 2
    while W**W < n_keys:
        W += 1
    numbers = rng_for(c.seed, STREAMS["facts"]).choice(W**W, n_keys, replace=False)
    keys = numbers[:, None] // W ** np.arange(W)[::-1] % W  # (n_keys, W), digits from 0
    if c.rule == "random":
        values = rng_for(c.seed, STREAMS["values"]).integers(W, size=keys.shape)
        capacity = {"slice": "key=known", "facts": n, "bits": math.log2(W)}
    else:
        values = keys
        for _ in range(c.rule_steps):  # a word maps position i to word[i]: apply it to itself
            values = np.take_along_axis(values, values, axis=1)
        capacity = {}
    key_words, value_words = digit_words(keys), digit_words(values)
    number = np.arange(n_keys)
    known = number < n
    even = (number - n) % 2 == 0
    # Known keys are in all splits, each unseen one in val or in test.
    splits = {"train": number[known], "val": number[known | even], "test": number[known | ~even]}
    slices = {"key": np.where(known, "known", "unseen")}
    texts = fact_texts(key_words, value_words)
    baselines = guess_baselines(key_words, value_words, known)
    return FactDataset(c, "digits", texts, splits, slices, baselines, capacity)


def check_digits(c):
    message = f"there are {9**9} keys; lower num_pairs"
    require(c.num_pairs + c.num_unseen <= 9**9, message, "num_pairs")


def digit_words(digits):
    """Digits from 0 (n, W) -> n words over the digits 1..W."""
    return ["".join(map(str, row)) for row in (digits + 1).tolist()]


# ---- text ----------------------------------------------------------------------------------------


def build_text(c):
    """Your own documents: "text", or "question" and "answer", of which the answer is scored.

    A directory with train, validation and test in it names the splits. Otherwise: a fact is a
    question with its answer, or a text in which the label mask finds one. All facts are trained on
    and measured, to count how many are stored; the fraction `heldout_facts` is only measured. Of
    other texts a twentieth is for validation and a twentieth for the test.

    A document that occurs several times is trained on as often, and measured once.
    """
    texts, origins, splits = read_and_split(c)
    trained = np.isin(np.arange(len(texts)), splits["train"])
    seen = trained[np.concatenate([splits["val"], splits["test"]])]
    slices = {"seen": trained.astype(int)} if seen.any() and not seen.all() else {}
    return FactDataset(c, c.label_mask, texts, splits, slices, origins=origins)


# task -> FactDataset or GeneratedDataset. Two-hop and HashHop have files of their own.
BUILD = {
    "qa": build_qa,
    "digits": build_digits,
    "twohop": build_twohop,
    "hashhop": build_hashhop,
    "text": build_text,
}
CHECK = {"qa": check_qa, "digits": check_digits, "twohop": check_twohop, "hashhop": check_hashhop}


# ---- the data, as train.py and eval.py use it ----------------------------------------------------


class Data:
    """The methods of data_mqar.Data, and .vocab_size, .seq_len (of the longest document),
    .baselines {name: accuracy without knowledge}, .notes (lines about your own documents, for
    train.py to print). With pack_documents a training batch is one sequence, and has cu_seqlens."""

    def __init__(self, config):
        self.config = c = config
        if c.path and c.task != "text":
            self.source = read_facts(c, BUILD)
        else:
            self.source = BUILD[c.task](c)
        self.kind, self.baselines = self.source.kind, self.source.baselines
        self.tokenizer = read_tokenizer(c.tokenizer)
        self.encoder = DocumentEncoder(self.tokenizer, self.kind, add_eos=c.task == "text")
        self.vocab_size = self.tokenizer.vocab_size
        self.seq_len = self.max_length()
        # The position of a digit or letter in its answer is a slice, unless answers are sentences.
        texts = getattr(self.source, "texts", [""])
        self.has_positions = self.kind != "text" and any(isinstance(text, str) for text in texts)
        check_answers(self)
        self.notes = survey(self) if c.task == "text" else []

    def max_length(self):
        if isinstance(self.source, FactDataset):
            return max(len(self.encoder.encode(text)[0]) for text in self.source.texts)
        # A problem has at most max_bytes bytes. Another tokenizer makes no more tokens than bytes,
        # except for a few of its own.
        return self.config.max_bytes + (64 if self.config.tokenizer else 0)

    def batch_indices(self, step, batch_size):
        return range(step * batch_size, (step + 1) * batch_size)

    def steps_per_epoch(self, batch_size):
        return max(1, self.source.count("train") // batch_size)

    def eval_groups(self, split):
        return self.source.eval_groups(split)

    def batch(self, split, step, indices):
        """-> tokens (B, T) long, targets (B, T) long, slices {name: (N,) array}; if packed, B is 1
        and cu_seqlens (documents + 1,) int32 comes fourth."""
        documents, slices = self.source.read(split, indices)
        packed = self.config.pack_documents and split == "train"
        tokens, targets, cu_seqlens, n_labels = self.encoder.batch(documents, packed)
        slices = {name: np.repeat(values, n_labels) for name, values in slices.items()}
        if self.has_positions:
            first = np.cumsum(n_labels) - n_labels
            slices["answer_pos"] = np.arange(n_labels.sum()) - np.repeat(first, n_labels)
        tokens, targets = torch.from_numpy(tokens).long(), torch.from_numpy(targets).long()
        if packed:
            return tokens, targets, slices, torch.from_numpy(cu_seqlens)
        return tokens, targets, slices


# ---- command line --------------------------------------------------------------------------------


@dataclass
class DatasetConfig(Config):
    output_dir: str = ""  # directory to write; it must not exist yet; empty: qa-2000-pairs etc.
    format: str = "parquet"  # parquet or jsonl
    n_val_examples: int = 0  # validation documents at most; 0: all (hashhop: 500 per hops)
    n_test_examples: int = 0  # likewise

    def unused(self):
        reason = "what is written is text"
        reasons = super().unused() | {"pack_documents": reason, "tokenizer": reason}
        return reasons | {"context_docs": "what is written are single facts"}

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
    for index in range(documents):
        tokens, targets, slices, *_ = data.batch("train", 0, [index])
        text = mark_answers(data.tokenizer, tokens[0].tolist(), targets[0].tolist())
        slices.pop("answer_pos", None)
        slices = {name: values[0].item() for name, values in slices.items()}
        say(f"{text!r:24}", slices)


def parse(argv):
    """Command line -> command, its checked settings; without arguments "", None."""
    return fact_files.parse_command(argv, __doc__, BUILD, DatasetConfig)


def main(argv=None):
    command, config = parse(sys.argv[1:] if argv is None else argv)
    if command == "check":
        fact_files.check_tokenizer(config.tokenizer, BUILD, Config)
    elif command:
        fact_files.write_and_report(config, BUILD[command](config))
    else:
        print(__doc__.strip())


if __name__ == "__main__":
    run_cli(main)
