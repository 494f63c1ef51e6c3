r"""Facts to store, as text: synthetic QA, digit lookup, two-hop, HashHop, or your own documents.

    python data_synth.py                                             # print examples and this text
    python data_synth.py qa --num_pairs 10000 --output_dir qa_10K    # or digits, twohop, hashhop; --format parquet or jsonl
    python data_synth.py check --tokenizer tokenizer.json            # would the label masks be exact with this tokenizer?
    python train.py --data data_synth --task qa --num_pairs 2000     # made in memory
    python train.py --data data_synth --path qa_10K                  # what the second line wrote
    python train.py --data data_synth --task text --path notes.jsonl # lines with "text", or "question" and "answer"; or parquet

A document is one fact (or one HashHop problem). Only its answer is trained on and scored; [] marks it here.

qa: pairs of numbers, each shown as often in an epoch as its bucket says (exposures), some of each bucket never (0).

>>> show(Config(task="qa", num_pairs=16, buckets=(1, 4)))
'266133:[972938] '       {'exposures': 4, 'seen': 1}
'592345:[937705] '       {'exposures': 1, 'seen': 1}

digits: keys are words over the digits 1..n; the value is another such word, or follows a rule (value[i] = key[key[i]]).

>>> show(Config(task="digits", num_pairs=60, rule="selfindex"))
'51342:[25341] '         {'key': 'known'}
'11253:[11132] '         {'key': 'known'}

twohop: a>b for all entities; a>>c, where b>c, for some of them.

>>> show(Config(task="twohop", entities=50))
'16>>[30] '              {'query': 'trained'}
'43>[17] '               {'query': 'single fact'}

hashhop: chains of hashes in random order, and the end of one to tell (magicproduct/hash-hop).

>>> show(Config(task="hashhop", hash_len=2, block_size=80, hops=(2,)), 1)
"Wn = uy\niY = Dn\nuy = 'Ge'\nDn = 'AW'\n\nCOMPLETION:\nHops=2\n\nCoT=False\n\nWn = '[Ge]'\n" {'hops': 2}

Every document is a pure function of the settings and its number, every epoch an order of its own, from (seed, epoch).
"""

import os
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch

from facts import TASKS, FactDataset, said
from nanorecall.documents import read_stored, write_facts
from nanorecall.metrics import print_baselines
from nanorecall.rng import IGNORE_INDEX, SPLITS
from nanorecall.settings import (
    RunError,
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
from nanorecall.text import BYTES, MASKS, check_label_mask, label_mask, read_tokenizer, shift_labels

TASK_OF = {  # setting: the tasks that use it
    "num_pairs": "qa digits",
    "digits": "qa",
    "buckets": "qa",
    "heldout": "qa",
    "inverse": "qa",
    "rule": "digits",
    "steps": "digits",
    "num_novel": "digits",
    "entities": "twohop",
    "relations": "twohop",
    "phi": "twohop",
    "ood": "twohop",
    "markers": "twohop",
    "cot": "twohop hashhop",
    "hops": "hashhop",
    "test_hops": "hashhop",
    "hash_len": "hashhop",
    "num_queries": "hashhop",
    "n_train_examples": "hashhop",
    "block_size": "hashhop text",
    "mask": "text",
    "heldout_facts": "text",
}


@dataclass
class Config:
    task: str = "qa"  # qa, digits, twohop, hashhop or text
    path: str = ""  # a directory that `python data_synth.py TASK --output_dir` wrote; text: .jsonl, .parquet or a directory
    num_pairs: int = 2000  # qa: pairs, the held-out ones included; digits: keys to train on
    digits: int = 6  # qa: digits in a number
    buckets: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)  # qa: exposures in an epoch; as many pairs in each bucket
    heldout: float = 0.1  # qa: share of the pairs of each bucket that are never trained on
    inverse: str = "none"  # qa: "y:x" as well; probe: measured, never trained on; train: trained on, too
    rule: str = "random"  # digits: random values, or selfindex: value[i] = key[key[i]]
    steps: int = 1  # digits, selfindex: times that the rule is applied to its own result
    num_novel: int = 1000  # digits: keys that are never trained on
    entities: int = 100  # twohop: entities, each with one fact per relation
    relations: int = 1  # twohop: kinds of fact; from 2 on each has a letter: a>xb, and a>x>yc
    phi: float = 0.5  # twohop: trained queries of two hops per single fact that they may use (phi of Wang et al.)
    ood: float = 0.2  # twohop: share of the single facts that are in no trained query of two hops
    markers: bool = True  # twohop: 0 writes a:b and a:c alike, as LLMonade does, so that a query has two right answers
    cot: float = 0.0  # share of multi-hop answers that spell out the hashes or entities on the way; twohop: 0 or 1
    hops: tuple[int, ...] = (1,)  # hashhop: hops of training rows, which take turns in these
    test_hops: tuple[int, ...] = (1, 2, 3, 4)  # hashhop: measured hops: easy, medium, hard, challenge
    hash_len: int = 4  # hashhop: letters in a hash
    num_queries: int = 1  # hashhop: queries in a training row; one in others
    block_size: int = 256  # hashhop: bytes to fill; text: bytes of the longest document allowed
    n_train_examples: int = 20000  # hashhop: rows in an epoch; none is seen twice
    n_val_examples: int = 500  # validation documents, as many of each group of the first tag; hashhop: per hops; 0: all
    n_test_examples: int = 5000  # documents to measure at the end, likewise; 0: all (hashhop: 500)
    mask: str = "text"  # text: what is trained on of "text": text (everything), qa, hashhop, digits or twohop
    heldout_facts: float = 0.0  # text: share of the facts that are only measured, as seen=0
    packing: str = "none"  # documents: training documents end to end in one row, nothing crosses; none: a padded row for each
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
            require(values and min(values) >= 1, f"{key}={values} needs numbers of at least 1", key)
        require(len(set(self.buckets)) == len(self.buckets), f"buckets={self.buckets} names a bucket twice", "buckets")
        require(max(*self.hops, *self.test_hops) <= 16, "hops and test_hops end at 16", "hops")
        if self.task == "text":
            require(self.path, "task=text needs the documents: --path FILE.jsonl, FILE.parquet or a directory", "path")
        elif not self.path:
            TASKS[self.task].check(self)

    def unused(self):
        if self.path and self.task != "text":
            used = "task path packing tokenizer seed n_val_examples n_test_examples".split()
            return {name: f"the data comes from path={self.path}" for name in vars(self) if name not in used}
        reasons = {key: f"only task {tasks} uses it" for key, tasks in TASK_OF.items() if self.task not in tasks.split()}
        if self.rule == "random":
            reasons["steps"] = "rule is random"
        return reasons

    def label(self):
        """The data's part of a run's name."""
        if self.path:
            return f"{self.task}-{os.path.basename(os.path.normpath(self.path))}"
        return f"{self.task}-{TASKS[self.task].label(self)}"


# ---- the task, as train.py and eval.py use it --------------------------------------------------------------------------


class Data:
    """.vocab_size, .seq_len (tokens of the longest document), .baselines {name: accuracy without knowledge}, and

    .batch_indices(step, batch_size) -> the global row numbers of a training step, a range; a row is a document
    .batch(split, step, rows) -> tokens (B, T) long, targets (B, T) long, tags {name: (N,) array}; and cu_seqlens (R + 1,) if
        packing=documents and split is train: then B is 1
    .eval_groups(split) -> ranges of rows, for evaluation
    .steps_per_epoch(batch_size)
    .notes: lines about documents of your own, for train.py to print
    """

    def __init__(self, config):
        self.config = c = config
        self.tokenizer = read_tokenizer(c.tokenizer)
        stored = c.path and c.task != "text"
        self.source = FactDataset(c, *read_stored(c.path, c.task, TASKS)) if stored else TASKS[c.task].make(c)
        self.kind, self.baselines, self.vocab_size = self.source.kind, self.source.baselines, self.tokenizer.vocab_size
        self.seq_len = self.longest()
        # the place of a digit or letter in its answer is a tag, unless every answer is a sentence
        self.has_positions = self.kind != "text" and any(isinstance(t, str) for t in getattr(self.source, "texts", [""]))
        self.require_answers()
        self.notes = survey(self) if c.task == "text" else []

    def require_answers(self):
        """ConfigError if a split has nothing to score, or if the labels would not be exact with this tokenizer."""
        c, plain = self.config, []  # the documents whose answers the mask has to find
        for split in SPLITS:
            rows = range(min(self.source.count(split), 1000))
            require(rows, f"no document is left for {split}; give it more of them", "path")
            texts, _ = self.source.read(split, rows)
            plain += [text for text in texts if isinstance(text, str)]
            message = f"mask={self.kind} finds no answer in the first {len(rows)} documents of {split}"
            require((self.batch(split, 0, rows)[1] != IGNORE_INDEX).any(), message, "mask")
        require(plain or c.mask == "text", f"mask={c.mask} has no effect: the documents say what their answers are", "mask")
        if self.tokenizer is not BYTES and self.kind != "text":
            problem = check_label_mask(self.tokenizer, self.kind, plain[:300])
            require(not problem, f"tokenizer={c.tokenizer} does not suit these documents: {problem}", "tokenizer")

    def longest(self):
        if isinstance(self.source, FactDataset):
            return max(len(self.document(text)[0]) for text in self.source.texts)
        # bytes fill block_size at most; another tokenizer makes no more tokens than bytes of text, and a few for its own needs
        return self.config.block_size + (0 if self.tokenizer.name == "bytes" else 64)

    def batch_indices(self, step, batch_size):
        return range(step * batch_size, (step + 1) * batch_size)

    def steps_per_epoch(self, batch_size):
        return max(1, self.source.count("train") // batch_size)

    def eval_groups(self, split):
        return self.source.eval_groups(split)

    def document(self, text):
        """A text, or (question, answer) -> tokens (L,), and where the answer begins (0: not said)."""
        if isinstance(text, tuple):
            question, answer = (self.tokenizer.encode(part) for part in text)
            return self.framed(question, answer), 1 + len(question)
        return self.framed(self.tokenizer.encode(text)), 0

    def framed(self, *parts):
        """BOS before, and EOS after what has no end of its own."""
        end = [self.tokenizer.eos] * (self.config.task == "text")
        return np.concatenate([[self.tokenizer.bos], *parts, end]).astype(np.int32)

    def labelled(self, texts):
        """R documents -> their tokens end to end (N,), labels (N,), cu_seqlens (R + 1,)."""
        documents, begins = zip(*map(self.document, texts))
        lengths = np.array([len(d) for d in documents])
        ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        flat = np.concatenate(documents)
        labels = label_mask(flat, self.kind, ends, self.tokenizer)
        answered = np.array(begins) > 0
        if answered.any():
            place = np.arange(len(flat)) - np.repeat(ends[:-1], lengths)
            known = np.repeat(answered, lengths)
            labels = np.where(known, np.where(place >= np.repeat(begins, lengths), flat, IGNORE_INDEX), labels)
        # An end without an answer before it asks for nothing: every model would be right.
        spelled = np.add.reduceat((labels != IGNORE_INDEX) & (flat < self.tokenizer.pad), ends[:-1])
        return flat, np.where(np.repeat(spelled > 0, lengths), labels, IGNORE_INDEX), ends

    def batch(self, split, step, rows):
        texts, tags = self.source.read(split, rows)
        flat, labels, ends = self.labelled(texts)
        lengths = np.diff(ends)
        # (R, L), the tokens of each document in a padded row
        inside = np.arange(lengths.max()) < lengths[:, None]
        counts = np.add.reduceat(labels != IGNORE_INDEX, ends[:-1])
        tags = {name: np.repeat(values, counts) for name, values in tags.items()}
        if self.has_positions:
            tags["place"] = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        if self.config.packing == "documents" and split == "train":
            tokens, targets = flat[None], shift_labels(labels[None])
            return *map(torch.from_numpy, (tokens.astype(np.int64), targets.astype(np.int64))), tags, torch.from_numpy(ends)
        tokens, padded = np.full(inside.shape, self.tokenizer.pad, np.int64), np.full(inside.shape, IGNORE_INDEX, np.int64)
        tokens[inside], padded[inside] = flat, labels
        return torch.from_numpy(tokens), torch.from_numpy(shift_labels(padded)), tags


# ---- what there is to say of your own documents ------------------------------------------------


def survey(data):
    """Lines about the documents of task text: what is in each split, and what is odd about them.

    ConfigError for an answer that the tokenizer cannot spell: something else would be scored.
    """
    source, found = data.source, []
    for first in range(0, len(source.texts), 1000):
        texts = source.texts[first : first + 1000]
        tokens, labels, ends = data.labelled(texts)
        for number, (text, a, b) in enumerate(zip(texts, ends[:-1], ends[1:]), first):
            where = source.places[number]
            found.append(look_at(data, text, tokens[a:b], labels[a:b], where))
    answered, altered, questions = zip(*found)
    lines = [sizes_of_splits(source, np.array(answered))]
    if any(altered):
        lines.append(altered_documents(data, altered))
    return lines + several_answers(source, questions)


def look_at(data, text, tokens, labels, where):
    """One document -> has it an answer? does the tokenizer alter it? what it asks, or ""."""
    tokenizer, kind = data.tokenizer, data.kind
    at = np.flatnonzero(labels != IGNORE_INDEX)
    no_token = f"tokenizer={tokenizer.name} has no token for a part of the answer"
    message = f"{where}: {no_token}; use another, or bytes"
    if isinstance(text, tuple):
        require(len(at), message, "tokenizer")
    if isinstance(text, tuple) or kind != "text":
        require(tokenizer.unknown < 0 or tokenizer.unknown not in labels, message, "tokenizer")
    altered = tokenizer is not BYTES and tokenizer.decode(tokens) != joined(text)
    question = ""
    if isinstance(text, tuple):
        question = said(text[0])
    elif kind in TASKS["text"].FACT_MASKS and len(at):
        question = said(tokenizer.decode(tokens[: at[0]]))
    return len(at) > 0, altered, question


def sizes_of_splits(source, answered):
    """One line: documents in each split, how many are trained on, and how many have no answer."""
    train, parts, without = source.splits["train"], [], []
    for split in SPLITS:
        mine = source.splits[split]
        text, different = f"{split} {len(mine)}", len(np.unique(mine))
        if split == "train":
            text += f" ({different} different)" if different < len(mine) else ""
        else:
            text += f" of {source.sizes[split]}" if len(mine) < source.sizes[split] else ""
            text += f" ({np.isin(mine, train).sum()} of them trained on)"
        parts.append(text)
        if not answered[mine].all():
            without.append(f"{(~answered[mine]).sum()} of {split}")
    line = "documents: " + ", ".join(parts)
    if without:
        line += f"; without an answer, so not counted: {', '.join(without)}"
    return line


def altered_documents(data, altered):
    """A line about the documents that a tokenizer does not give back; altered (n,) bool."""
    number = altered.index(True)
    text = data.source.texts[number]
    was, now = difference(joined(text), data.tokenizer.decode(data.document(text)[0]))
    many = f"{sum(altered)} of {len(altered)} documents do not come back from the tokenizer"
    example = f"{data.source.places[number]} for one, where {was!r} becomes {now!r}"
    return f"note: {many} as they were, {example}"


def several_answers(source, questions):
    """A line about questions that two documents answer differently, or none."""
    first, pairs = {}, []
    for number, question in enumerate(questions):
        before = first.setdefault(question, number)
        texts = [said(joined(source.texts[i])) for i in (before, number)]
        if question and texts[0] != texts[1]:
            pairs.append(f"{source.places[before]} and {source.places[number]}")
    if not pairs:
        return []
    many = f"questions with more than one answer: {len(pairs)}, {pairs[0]} for one"
    return [f"note: {many}; no model can be right on both"]


def joined(text):
    return text if isinstance(text, str) else "".join(text)


def difference(a, b, around=12):
    """Where two texts begin to differ: a few letters of each."""
    same = zip(a, b)
    first = next((i for i, (x, y) in enumerate(same) if x != y), min(len(a), len(b)))
    part = slice(max(0, first - around), first + around)
    return a[part], b[part]


# ---- command line ------------------------------------------------------------------------------------------------------


@dataclass
class DatasetConfig(Config):
    output_dir: str = ""  # directory to write; it must not exist yet; empty: qa-2000-pairs and the like
    format: str = "parquet"  # parquet or jsonl
    n_val_examples: int = 0  # documents of validation at most; 0: all (hashhop: 500 per number of hops)
    n_test_examples: int = 0  # likewise

    def unused(self):
        return super().unused() | dict.fromkeys(("packing", "tokenizer"), "what is written is text")

    def check(self):
        super().check()
        one_of(self, ("parquet", "jsonl"), "format")
        require(self.task != "text", "task=text reads documents; there is nothing to write", "task")
        require(not self.path, f"path={self.path} is a data set already; leave it out to write another", "path")
        self.output_dir = self.output_dir or self.label()


def show(config, documents=2):
    """Print the first training documents with [] around what is scored, and their tags."""
    data = Data(config)
    texts, _ = data.source.read("train", range(documents))
    for row, text in enumerate(texts):
        tokens, targets, tags, *_ = data.batch("train", 0, [row])
        answer = np.flatnonzero(targets[0].numpy() != IGNORE_INDEX) + 1
        marked = text
        if isinstance(text, str):
            pieces, scored = [], set(answer.tolist())
            for i, token in enumerate(tokens[0].tolist()):
                opens, closes = i in scored and i - 1 not in scored, i not in scored and i - 1 in scored
                pieces.append("[" * opens + "]" * closes + data.tokenizer.decode([token]))
            marked = "".join(pieces)
        say(f"{marked!r:24}", {k: v[0].item() for k, v in tags.items() if k != "place"} or "")


def main(argv=None):
    words, settings = read_argv(sys.argv[1:] if argv is None else argv)
    if any(s.key == "help" for s in settings):
        say(help_text(__doc__, DatasetConfig))
        return 0
    command = words.pop(0) if words else ""
    require(not words, f"{' '.join(words)!r} is neither an override file (.py) nor a flag (--key=value)", None)
    if not command and not settings:
        print(__doc__.strip())
        return 0
    names = [*TASKS, "check"]
    require(command in names, f"name what to do first: python data_synth.py {'|'.join(names)} --key=value", None)
    if command == "check":
        reject_unknown(settings, CheckConfig)
        return check(build_config(CheckConfig, settings).tokenizer)
    reject_unknown(settings, DatasetConfig)
    require("task" not in {s.key for s in settings}, f"the task is {command} already; leave out --task", None)
    config = build_config(DatasetConfig, [Setting("task", command, command), *settings])
    start = time.perf_counter()
    metadata = write_facts(config, TASKS[config.task].make(config))
    rows = {split: sum(f["rows"] for f in files) for split, files in metadata["files"].items()}
    size = sum(f["bytes"] for files in metadata["files"].values() for f in files) / 1e6
    say(f"{config.output_dir}: {rows} rows, {size:.1f} MB, {time.perf_counter() - start:.1f} s")
    print_baselines(metadata["chance"])
    return 0


@dataclass
class CheckConfig:
    tokenizer: str = ""  # a tokenizer.json; empty: bytes


CHECK_CASES = {  # kind of mask: settings whose documents are tried
    "digits": [dict(task="digits"), dict(task="twohop", markers=False)],
    "qa": [dict(task="qa")],
    "twohop": [dict(task="twohop"), dict(task="twohop", relations=4), dict(task="twohop", relations=4, cot=1)],
    "hashhop": [dict(task="hashhop", hops=(1, 2, 3), cot=0.5), dict(task="hashhop", hash_len=16, block_size=512)],
}


def check(path):
    """Print whether each label mask is exact with the tokenizer; RunFailed if one is not."""
    tokenizer, bad = read_tokenizer(path), []
    for kind, settings in CHECK_CASES.items():
        texts = [t for s in settings for t in TASKS[s["task"]].make(Config(**s)).read("train", range(300))[0]]
        asked = [f"What is the value of {t[:6]}?{t[7:13]}" for t in texts] if kind == "qa" else []
        problem = check_label_mask(tokenizer, kind, texts + asked)
        say(f"{tokenizer.name}: {kind}: {problem or 'exact'}")
        bad += [kind] if problem else []
    if bad:
        raise RunError(f"masks of {', '.join(bad)} would not be exact with {tokenizer.name}; use another, or bytes")
    return 0


if __name__ == "__main__":
    run_cli(main)
