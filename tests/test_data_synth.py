"""data_synth.py and its files: each generator against a reader of its text; packing; bad files."""

import collections
import doctest
import json
import os
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import data_synth as D
import delta
import eval as ev
import model as M
import train
from nanorecall import checkpoint, fact_files, metrics, rng
from nanorecall import text as K
from nanorecall.settings import ConfigError

SMALL = {
    "qa": dict(num_pairs=16, buckets=(1, 2, 4, 8)),
    "digits": dict(num_pairs=40, num_novel=10),
    "twohop": dict(entities=30),
    "hashhop": dict(
        block_size=120,
        hash_len=3,
        hops=(1, 2),
        test_hops=(1, 2),
        n_val_examples=6,
        n_test_examples=8,
    ),
}


def small(task, **changes):
    return D.Config(task=task, **{**SMALL[task], **changes})


def texts(data, split, rows=None):
    rows = range(data.source.count(split)) if rows is None else rows
    return data.source.read(split, np.asarray(rows))[0]


def scored(data, split, rows):
    """The text that is scored of each row: what a pair of (text, labels) says."""
    found = []
    for row in rows:
        tokens, targets, *_ = data.batch(split, 0, [row])
        at = np.flatnonzero(targets[0].numpy() != K.IGNORE_INDEX)
        assert torch.equal(tokens[0][at + 1], targets[0][at])  # a target is the next token
        found.append(data.tokenizer.decode(targets[0][at]))
    return found


@pytest.mark.parametrize("module", [D, K])
def test_the_docstrings_examples(module):
    result = doctest.testmod(module)
    assert result.attempted >= 2 and result.failed == 0


# ---- qa ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "num_pairs, buckets, held, digits",
    [(10000, (1, 2, 4, 8, 16, 32, 64, 128), 0.1, 6), (1, (3,), 0, 2)],
)
def test_qa_counts_and_held_out_pairs(num_pairs, buckets, held, digits):
    data = D.Data(
        D.Config(
            num_pairs=num_pairs, buckets=buckets, heldout=held, digits=digits, n_test_examples=10**6
        )
    )
    rows = np.arange(data.source.count("train"))
    epochs = [
        collections.Counter(texts(data, "train", rows + epoch * len(rows))) for epoch in (0, 7)
    ]
    assert epochs[0] == epochs[1]
    size = num_pairs // len(buckets)
    by_count = collections.Counter(epochs[0].values())
    assert by_count == {b: size - round(held * size) for b in buckets}
    everything, slices = data.source.read("test", np.arange(data.source.count("test")))
    assert len(set(everything)) == num_pairs and all(
        re.fullmatch(rf"\d{{{digits}}}:\d{{{digits}}} ", t) for t in everything
    )
    numbers = [n for t in everything for n in t.strip().split(":")]
    assert len(set(numbers)) == 2 * num_pairs  # all different
    for text, exposures, seen in zip(everything, slices["exposures"], slices["seen"]):
        assert epochs[0].get(text, 0) == exposures and seen == (exposures > 0)
    assert (slices["seen"] == 0).sum() == round(held * size) * len(buckets)


def test_qa_epochs_are_shuffled_and_pure_functions_of_the_row():
    a, b = D.Data(small("qa", seed=3)), D.Data(small("qa", seed=3))
    n = a.source.count("train")
    first, second = texts(a, "train", range(n)), texts(a, "train", range(n, 2 * n))
    assert first != second and sorted(first) == sorted(second)
    assert [texts(b, "train", [r])[0] for r in reversed(range(2 * n))] == (first + second)[
        ::-1
    ]  # any order, one by one
    assert texts(D.Data(small("qa", seed=4)), "train", range(n)) != first
    whole, halves = (
        a.batch("train", 0, range(8)),
        [a.batch("train", 5, rows) for rows in (range(4), range(4, 8))],
    )
    assert torch.equal(whole[0], torch.cat([h[0] for h in halves]))


def test_qa_inverse_pairs():
    for inverse in ("probe", "train"):
        data = D.Data(small("qa", inverse=inverse))
        found, slices = data.source.read("test", np.arange(data.source.count("test")))
        forward = {t for t, d in zip(found, slices["direction"]) if d == "forward"}
        inverse_pairs = [t for t, d in zip(found, slices["direction"]) if d == "inverse"]
        backward = {":".join(reversed(t.strip().split(":"))) + " " for t in inverse_pairs}
        assert forward == backward and len(forward) == 16
        trained = set(texts(data, "train"))
        assert bool(trained - forward) == (inverse == "train")
        assert not trained & {t for t, s in zip(found, slices["seen"]) if not s}


# ---- digits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_pairs, width", [(6000, 6), (20000, 6), (200000, 7), (1, 4)])
def test_digit_lookup_keys(num_pairs, width):
    many = dict(n_test_examples=10**6, n_val_examples=10**6)
    source = D.Digits.build(D.Config(task="digits", num_pairs=num_pairs, num_novel=100, **many))
    known = [source.texts[i] for i in source.splits["train"]]
    alphabet = f"[1-{width}]{{{width}}}"
    assert len(known) == num_pairs and all(
        re.fullmatch(f"{alphabet}:{alphabet} ", t) for t in known
    )
    keys = [t.split(":")[0] for t in source.texts]
    assert len(set(keys)) == num_pairs + 100
    val, test = ({source.texts[i] for i in source.splits[s]} - set(known) for s in ("val", "test"))
    assert len(val) == len(test) == 50 and not val & test


def test_what_is_measured_has_as_many_of_each_kind():
    data = D.Data(
        D.Config(task="digits", num_pairs=900, num_novel=100, n_val_examples=60, n_test_examples=0)
    )
    for split, known, novel in (("val", 30, 30), ("test", 900, 50)):
        (rows,) = data.eval_groups(split)
        assert collections.Counter(data.source.read(split, rows)[1]["key"]) == {
            "known": known,
            "novel": novel,
        }
    val = texts(data, "val")
    assert sorted(val) != val and len({*val}) == 60


def test_the_rule_of_selfindex():
    for steps in (1, 2):
        source = D.Digits.build(
            D.Config(task="digits", num_pairs=10000, rule="selfindex", steps=steps)
        )
        for text in source.texts[:10000]:
            key, value = text.strip().split(":")
            for _ in range(steps):  # the word as a map, applied to itself
                key = "".join(key[int(d) - 1] for d in key)
            assert value == key
    word = np.array([[2, 3, 4, 1, 0, 5]])  # 345216
    assert "".join(str(d + 1) for d in np.take_along_axis(word, word, 1)[0]) == "521436"


def test_chance_by_hand():
    train_pairs, test_pairs = (
        [("12", "11"), ("21", "11"), ("22", "12")],
        [("11", "12"), ("12", "11")],
    )
    assert fact_files.guess_baselines(train_pairs, test_pairs) == {
        "majority digit": 3 / 4,
        "copy the key": 2 / 4,
    }
    ties = [
        ("1", digit) for digit in "73"
    ]  # the smallest of the most frequent digits, in every process
    assert fact_files.guess_baselines(ties, [("1", "3")])["majority digit"] == 1
    data = D.Data(D.Config(task="digits", num_pairs=20000, num_novel=1000))
    assert (
        data.baselines["majority digit"]
        == pytest.approx(1 / 6, abs=0.02)
        == data.baselines["copy the key"]
    )


def split_pair(text):
    key, *_, answer = re.split("[:>]+[a-z]?", text.strip())
    return key, answer


@pytest.mark.parametrize(
    "settings, tag, known, asked",
    [
        (dict(task="digits", num_pairs=40, num_novel=10), "key", "known", "novel"),
        (dict(num_pairs=64, buckets=(1, 2), heldout=0.5), "seen", 1, 0),
        (
            dict(task="twohop", entities=30, relations=2, phi=1.0),
            "query",
            "trained",
            "in-distribution",
        ),
    ],
    ids=["digits", "qa", "twohop"],
)
def test_what_is_asked_has_no_vote_in_the_guess(settings, tag, known, asked):
    """The most frequent digit of each place among trained answers, counted letter by letter."""
    source = D.Data(D.Config(**settings)).source
    pairs = [
        [split_pair(t) for t, v in zip(source.texts, source.slices[tag]) if v == kind]
        for kind in (known, asked)
    ]

    def share(voters):
        columns = zip(*(answer for _, answer in voters))
        usual = [
            min(collections.Counter(c).items(), key=lambda item: (-item[1], item[0]))[0]
            for c in columns
        ]
        hits = [a == b for _, answer in pairs[1] for a, b in zip(answer, usual)]
        return sum(hits) / len(hits)

    (found,) = (value for name, value in source.baselines.items() if name.startswith("majority"))
    assert found == pytest.approx(share(pairs[0]))
    assert found != pytest.approx(share(pairs[0] + pairs[1]))  # the check sees the difference


# ---- twohop --------------------------------------------------------------------------------------


def read_facts(found):
    """Single facts {(a, mark): b} and queries [(a, marks, answer)] of texts."""
    facts, queries = {}, []
    for text in found:
        a, rest = re.fullmatch(r"(\d+)(.*) ", text).groups()
        if single := re.fullmatch(r">([a-z]?)(\d+)", rest):
            facts[a, single[1]] = single[2]
        else:
            marks = re.match(r">([a-z]?)>([a-z]?)", rest)
            queries.append((a, marks.groups(), rest[marks.end() :]))
    return facts, queries


@pytest.mark.parametrize(
    "entities, relations, phi, cot, ood",
    [(5000, 1, 0.5, 0, 0.2), (100, 8, 4.0, 1, 0.2), (40, 3, 1.0, 0, 0), (3, 1, 0.3, 0, 0)],
)
def test_twohop_answers_and_splits(entities, relations, phi, cot, ood):
    many = dict(n_test_examples=10**6, n_val_examples=10**6)
    c = D.Config(
        task="twohop", entities=entities, relations=relations, phi=phi, cot=cot, ood=ood, **many
    )
    source = D.TwoHop.build(c)
    facts, trained = read_facts(source.texts[i] for i in source.splits["train"])
    assert len(facts) == entities * relations and all(a != b for (a, _), b in facts.items())
    used = set()
    for a, (r1, r2), answer in trained:
        middle, end = facts[a, r1], facts[facts[a, r1], r2]
        assert answer == (f"{middle}>{end}" if cot else end)
        used |= {(a, r1), (middle, r2)}
    query = source.slices["query"]
    assert (query == "trained").sum() == len(trained) == len(set(trained))
    for split, other in (("val", "test"), ("test", "val")):
        for kind in ("in-distribution", "out-of-distribution"):
            mine = [i for i in source.splits[split] if query[i] == kind]
            assert not set(mine) & set(source.splits[other].tolist()) and not set(mine) & set(
                source.splits["train"].tolist()
            )
            for a, (r1, r2), answer in read_facts(source.texts[i] for i in mine)[1]:
                assert answer.split(">")[-1] == facts[facts[a, r1], r2]
                atoms = {(a, r1), (facts[a, r1], r2)}
                assert atoms <= used if kind == "in-distribution" else not atoms & used
    known = len(facts) - len(facts) * ood
    assert len(trained) == pytest.approx(phi * known, rel=0.15, abs=1)
    queries = [re.match(r"\d+>[a-z]?(>[a-z]?)?", t)[0] for t in source.texts]
    assert len(set(queries)) == len(queries)  # one right answer for each


def test_without_markers_a_query_has_two_answers():
    data = D.Data(small("twohop", markers=False))
    questions = collections.Counter(t.split(":")[0] for t in texts(data, "train"))
    assert max(questions.values()) == 2 and data.kind == "digits"
    assert scored(data, "train", range(3)) == [
        t.strip().split(":")[1] for t in texts(data, "train", range(3))
    ]


# ---- hashhop -------------------------------------------------------------------------------------


def follow(text):
    """Read a problem as a person would: -> hops, has it a chain of thought, [(key, answer between
    the quotes, the chain by hand)]."""
    lines, completion = text.split("\n\nCOMPLETION:\n")
    pairs = dict(line.split(" = ") for line in lines.split("\n"))
    assert len(pairs) == lines.count("\n") + 1
    hops, cot, answers = re.fullmatch(
        r"Hops=(\d+)\n\nCoT=(True|False)\n\n(.*)\n", completion, re.S
    ).groups()
    found = []
    for answer in answers.split("\n"):
        key, value = re.fullmatch(r"(\w+) = '(.*)'", answer).groups()
        way = [pairs[key]]
        while not way[-1].startswith("'"):
            way.append(pairs[way[-1]])
        way[-1] = way[-1].strip("'")
        assert value == (" = ".join(way) if cot == "True" else way[-1])
        found.append((key, value, way))
        assert len(way) == int(hops)
    return int(hops), cot == "True", found


def test_hash_chains_followed_by_hand():
    c = D.Config(task="hashhop", hops=(1, 2, 3, 4), num_queries=3, cot=0.3, block_size=500)
    data, seen = D.Data(c), collections.Counter()
    rows, slices = data.source.read("train", range(10000))
    for text, *tag in zip(rows, slices["hops"], slices["hops_cot"]):
        hops, cot, found = follow(text)
        seen[hops, cot] += 1
        assert tag == [hops, f"{hops}{' cot' * cot}"]
        assert (
            len({key for key, *_ in found}) == 3
            and c.block_size - 40 - 14 * hops < len(text) + 1 <= c.block_size
        )
    assert {hops: seen[hops, True] + seen[hops, False] for hops in c.hops} == dict.fromkeys(
        c.hops, 2500
    )
    assert seen[1, True] == 0 and all(650 < seen[h, True] < 850 for h in (2, 3, 4))
    every = [{*texts(data, split, range(400))} for split in ("train", "val", "test")]
    assert len(set.union(*every)) == 1200  # no row stands in two splits
    for split in ("val", "test"):
        for level, segment in zip(c.test_hops, data.eval_groups(split)):
            assert all(
                follow(t)[0] == level and len(follow(t)[2]) == 1
                for t in texts(data, split, list(segment)[:5])
            )


@pytest.mark.parametrize("hops, hash_len, block", [(1, 2, 64), (4, 16, 400), (16, 2, 400)])
def test_hashhop_at_its_edges(hops, hash_len, block):
    data = D.Data(
        D.Config(
            task="hashhop", hops=(hops,), test_hops=(hops,), hash_len=hash_len, block_size=block
        )
    )
    for text in texts(data, "train", range(20)):
        assert follow(text)[0] == hops and len(text) + 1 <= block
    assert scored(data, "train", [3]) == [follow(texts(data, "train", [3])[0])[2][0][1]]


# ---- what a model gets ---------------------------------------------------------------------------


@pytest.mark.parametrize("task", SMALL)
def test_only_answers_are_scored_and_slices_fit(task):
    data = D.Data(small(task))
    for split in ("train", "val", "test"):
        rows = data.eval_groups(split)[0] if split != "train" else range(12)
        for text, answer in zip(texts(data, split, rows), scored(data, split, rows)):
            assert answer == re.split(r"[:>]|= '", text)[-1].strip(" '\n")
        tokens, targets, slices = data.batch(split, 0, rows)
        assert (
            tokens.shape == targets.shape
            and tokens.max() < data.vocab_size
            and tokens.shape[1] <= data.seq_len
        )
        assert {len(v) for v in slices.values()} == {int((targets != -100).sum())}
        counts = (targets != -100).sum(1).tolist()
        assert slices["place"].tolist() == [i for n in counts for i in range(n)]


@pytest.mark.parametrize("cls", [M.GPT, delta.DeltaNet])
@pytest.mark.parametrize("task", ["twohop", "hashhop", "text"])
def test_packed_training_equals_unpacked(cls, task, tmp_path):
    if task == "text":
        write_lines(tmp_path / "x.jsonl", [{"text": "ab " * n} for n in range(1, 40)])
    settings = dict(
        SMALL.get(task, dict(path=str(tmp_path / "x.jsonl"))), cot=1.0 * (task == "twohop")
    )
    apart, packed = (
        D.Data(D.Config(task=task, packing=p, **settings)) for p in ("none", "documents")
    )
    rows = range(10, 27)
    tokens, targets, _, ends = packed.batch("train", 0, rows)
    assert (
        tokens.shape[0] == 1
        and len(ends) == 18
        and tokens.shape[1] == ends[-1]
        and ends.dtype == torch.int32
    )
    config = dict(
        dim=32,
        dk=16,
        dv=16,
        n_layers=2,
        vocab_size=apart.vocab_size,
        seq_len=apart.seq_len,
        init_std=0.3,
    )
    outcomes = []
    for inputs in ((tokens, targets, ends), apart.batch("train", 0, rows)[:2]):
        torch.manual_seed(0)
        model = cls((M if cls is M.GPT else delta).Config(**config))
        loss = model(*inputs)[1]
        outcomes.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for a, b in zip(*outcomes):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def flags(folder, name, **changes):
    toy = dict(
        n_layers=1,
        dim=16,
        n_heads=1,
        dk=16,
        dv=16,
        batch_size=8,
        eval_interval=10,
        max_steps=20,
        num_threads=1,
    )
    changes = {
        **toy,
        "n_val_examples": 20,
        **changes,
        "log_dir": folder,
        "run_name": name,
        "data": "data_synth",
    }
    return [f"--{k}={v}" for k, v in changes.items()]


@pytest.mark.parametrize("model", ["gpt", "delta"])
def test_runs_with_packing_equal_runs_without(tmp_path, model, capsys):
    for name, packing in (("a", "none"), ("b", "documents")):
        assert (
            train.main(
                flags(tmp_path, name, task="twohop", entities=30, packing=packing, model=model)
            )
            == 0
        )
    a, b = (checkpoint.load_checkpoint(str(tmp_path / name), "ckpt")["tensors"] for name in "ab")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)
    assert "without knowledge: majority digit of the last entity" in capsys.readouterr().out


def test_a_run_on_a_slice(tmp_path, capsys):
    options = dict(
        task="qa",
        num_pairs=8,
        buckets="(1,8)",
        max_steps=150,
        lr=1e-2,
        init_std=1,
        use_ffn=1,
        eval_interval=10,
    )
    assert train.main(flags(tmp_path, "a", **options, target_slice="exposures=8", target_accuracy=0.9)) == 0
    measured = [r for r in checkpoint.read_log(str(tmp_path / "a")) if r["kind"] == "eval"]
    watched = [(metrics.slice_accuracy(r, "exposures=8"), r["accuracy"]) for r in measured]
    assert (
        sum(w[0] == 1 for w in watched) >= 2
    )  # the slice is at 1 more than once: the best of these is the best of all rows
    assert (
        checkpoint.load_checkpoint(str(tmp_path / "a"), "best")["step"]
        == measured[watched.index(max(watched))]["step"]
    )
    printed = capsys.readouterr().out
    assert (
        re.search(r"^exposures +8 .* 1\.0000", printed, re.M)
        and "val accuracy of exposures=8" in printed
    )
    test = checkpoint.read_json(str(tmp_path / "a" / "status.json"))["test"]["by_slice"]
    assert test["seen"]["0"]["right"] < 0.6 * test["seen"]["0"]["labels"]
    ev.main([str(tmp_path / "a"), "--examples=72"])  # all rows
    examples = re.findall(
        r"prompt +'(.*)'\n +answer +'(.*)'\n +model +'(.*)'", capsys.readouterr().out
    )
    rows = checkpoint.read_json(str(tmp_path / "a" / "eval_test.json"))["metrics"]["row_accuracy"]
    assert len(examples) == rows["n"] and all(
        re.fullmatch(r"\d{6}:", prompt) for prompt, *_ in examples
    )
    assert sum(answer == model for _, answer, model in examples) == round(rows["value"] * rows["n"])
    stored = checkpoint.read_json(str(tmp_path / "a" / "eval_test.json"))["metrics"]["stored"]
    table = pq.read_table(tmp_path / "a" / "eval_test.parquet").to_pydict()
    nats = collections.Counter()
    for row, loss, seen in zip(table["row"], table["loss"], table["seen"]):
        nats[row] += loss if seen else 0
    bits = [max(0.0, 6 * np.log2(10) - n / np.log(2)) for n in nats.values() if n]
    assert len(bits) == 6 and stored["bits stored"]["value"] == pytest.approx(sum(bits), rel=1e-5)
    assert stored["bits stored"]["ci95"][0] < sum(bits) < stored["bits stored"]["ci95"][1]
    with pytest.raises(
        ConfigError,
        match="target_slice=exposures=9 is not among the slices of val: exposures=0 exposures=1",
    ):
        train.main(flags(tmp_path, "b", **options, target_slice="exposures=9"))
    assert not (tmp_path / "b").exists()
    ev.main(["compare", str(tmp_path / "*")])
    assert (tmp_path / "compare.png").stat().st_size > 5000


# ---- on disk -------------------------------------------------------------------------------------


def test_a_run_on_text_is_measured_and_knows_its_documents(tmp_path, capsys):
    path = write_lines(tmp_path / "t.jsonl", [{"text": f"note {i}"} for i in range(30)])
    assert train.main(flags(tmp_path, "a", task="text", path=path, max_steps=4)) == 0
    ev.main([str(tmp_path / "a"), "--examples=1"])
    assert (
        tmp_path / "a" / "eval_test.png"
    ).stat().st_size > 3000 and "model " in capsys.readouterr().out
    write_lines(tmp_path / "t.jsonl", [{"text": f"Note {i}"} for i in range(30)])
    for again in (
        lambda: train.main([f"--resume={tmp_path / 'a'}", "--max_steps=8"]),
        lambda: ev.main([str(tmp_path / "a")]),
    ):
        with pytest.raises(ConfigError, match="t.jsonl is another one than .*a was trained on"):
            again()
    os.remove(path)
    with pytest.raises(ConfigError, match="t.jsonl does not exist, and .*a was trained on it"):
        ev.main([str(tmp_path / "a")])


def test_what_a_mask_cannot_find_is_said_before_training(tmp_path):
    path = write_lines(tmp_path / "t{a}.jsonl", [{"text": f"note {i}"} for i in range(30)])
    with pytest.raises(
        ConfigError, match="mask=digits finds no answer in the first 28 documents of train"
    ):
        D.Data(D.Config(task="text", path=path, mask="digits"))
    write_lines(
        tmp_path / "t{a}.jsonl", [{"question": "a?", "answer": f"note {i}"} for i in range(30)]
    )
    with pytest.raises(
        ConfigError, match="mask=digits has no effect: the documents say what their answers are"
    ):
        D.Data(D.Config(task="text", path=path, mask="digits"))


VARIANTS = {
    **{task: (task, {}) for task in SMALL},
    "inverse": ("qa", dict(inverse="probe")),
    "no markers": ("twohop", dict(markers=0)),
    "cot": ("twohop", dict(relations=3, cot=1)),
}


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_written_is_the_task_in_memory(tmp_path, variant, format, capsys, monkeypatch):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    task, changes = VARIANTS[variant]
    options = {**SMALL[task], **changes}
    words = [f"--{k}={v}" for k, v in options.items()] + ["--n_train_examples=30"] * (
        task == "hashhop"
    )
    assert D.main([task, "--output_dir", str(tmp_path / "a"), "--format", format, *words]) == 0
    made, stored = (
        D.Data(small(task, **changes)),
        D.Data(D.Config(task=task, path=str(tmp_path / "a"), n_test_examples=10**6)),
    )
    count = 30 if task == "hashhop" else made.source.count("train")
    assert sorted(texts(stored, "train")) == sorted(texts(made, "train", range(count)))
    for split in ("val", "test"):
        rows = range(made.source.count(split))
        a, b = (
            sorted(zip(found, *slices.values()))
            for found, slices in (d.source.read(split, rows) for d in (made, stored))
        )
        assert a == b
    kind = getattr(pandas, f"read_{'json' if format == 'jsonl' else format}")
    frame = kind(
        tmp_path / "a" / "train" / f"part-00000.{format}",
        **{"lines": True} if format == "jsonl" else {},
    )
    assert frame["text"].tolist() == texts(
        made, "train", range(count)
    )  # in the order of the first epoch
    slices = [data.batch("test", 0, [0])[2].keys() for data in (stored, made)]
    assert (stored.batch("test", 0, range(8))[1] != K.IGNORE_INDEX).any()
    assert (
        stored.kind == made.kind and stored.baselines == made.baselines and slices[0] == slices[1]
    )
    assert stored.source.capacity == getattr(made.source, "capacity", {})
    assert bool(stored.source.capacity) == (variant in ("qa", "digits"))
    assert D.main([task, "--output_dir", str(tmp_path / "b"), "--format", format, *words]) == 0
    for file in sorted(p for p in (tmp_path / "a").rglob("*.*") if p.name != "metadata.json"):
        assert (
            file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()
        )  # same seed, same bytes
    with pytest.raises(ConfigError, match="exists already"):
        D.main([task, "--output_dir", str(tmp_path / "a"), *words])
    other = "digits" if task != "digits" else "qa"
    with pytest.raises(ConfigError, match=f"holds task {task}; say --task {task}"):
        D.Data(D.Config(task=other, path=str(tmp_path / "a")))


def test_damage_to_a_data_set_is_noticed(tmp_path):
    D.main(["qa", "--output_dir", str(tmp_path / "a"), "--num_pairs=16"])
    path = tmp_path / "a" / "train" / "part-00000.parquet"
    whole = bytearray(path.read_bytes())
    for place in (0, len(whole) // 3, len(whole) - 1):
        whole[place] ^= 1
        path.write_bytes(whole)
        with pytest.raises(ConfigError, match="part-00000.parquet is missing or damaged"):
            D.Data(D.Config(path=str(tmp_path / "a")))
        whole[place] ^= 1
    path.unlink()
    with pytest.raises(ConfigError, match="missing or damaged"):
        D.Data(D.Config(path=str(tmp_path / "a")))
    (tmp_path / "a" / "metadata.json").write_text("{")
    with pytest.raises(ConfigError, match="metadata.json is damaged, or not of this project"):
        D.Data(D.Config(path=str(tmp_path / "a")))
    with pytest.raises(ConfigError, match="holds no data set"):
        D.Data(D.Config(path=str(tmp_path)))


# ---- documents of your own -----------------------------------------------------------------------


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_texts_questions_and_folders(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [{"text": f"line {i}\nü"} for i in range(100)])
    data = D.Data(D.Config(task="text", path=path))
    parts = [set(texts(data, split)) for split in ("train", "val", "test")]
    assert [len(p) for p in parts] == [90, 5, 5] and len(set.union(*parts)) == 100
    assert scored(data, "test", [0]) == texts(data, "test", [0])  # all of it, and its end
    assert data.batch("test", 0, [0])[1].max() == K.BYTES.eos
    rows = [{"question": "Who? Me?", "answer": f"You? {i}"} for i in range(3)]
    for name in ("train", "validation", "test"):
        (tmp_path / "d" / name).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d" / name / "a.parquet")
    data = D.Data(D.Config(task="text", path=str(tmp_path / "d")))
    assert [data.source.count(s) for s in ("train", "val", "test")] == [3, 3, 3]
    assert sorted(scored(data, "test", range(3))) == ["You? 0", "You? 1", "You? 2"]
    packed = D.Data(D.Config(task="text", path=str(tmp_path / "d"), packing="documents")).batch(
        "train", 0, range(3)
    )
    assert (packed[1] != -100).sum() == 3 * 7
    data = D.Data(
        D.Config(
            task="text",
            path=write_lines(tmp_path / "y.jsonl", [{"text": "Is it? Yes"}] * 3),
            mask="qa",
        )
    )
    assert scored(data, "train", [0]) == [" Yes"]


def own(path, **settings):
    return D.Data(D.Config(task="text", path=str(path), **settings))


FIRST, LAST = "abcdefghijklmnopqrst", "ABCDEFGHIJ"
NAMES = [
    {"question": f"Where does {f} {s} live?", "answer": f"in {f}{s}"} for f in FIRST for s in LAST
]


def test_all_facts_of_your_own_are_trained_on_and_measured(tmp_path):
    data = own(write_lines(tmp_path / "x.jsonl", NAMES))
    parts = [set(texts(data, split)) for split in ("train", "val", "test")]
    assert [data.source.count(split) for split in ("train", "val", "test")] == [200] * 3
    assert parts[0] == parts[1] == parts[2] and "seen" not in data.batch("test", 0, [0])[2]
    assert data.notes == [
        "documents: train 200, val 200 (200 of them trained on), test 200 (200 of them trained on)"
    ]
    data = own(
        write_lines(tmp_path / "y.jsonl", [{"text": f"{i}:{7 * i} "} for i in range(40)]),
        mask="digits",
    )
    assert [data.source.count(split) for split in ("train", "val", "test")] == [40] * 3
    some = own(tmp_path / "x.jsonl", n_val_examples=50)
    assert "val 50 of 200 (50 of them trained on), test 200" in some.notes[0]


def test_held_out_facts_are_a_slice(tmp_path):
    data = own(write_lines(tmp_path / "x.jsonl", NAMES + NAMES[:3]), heldout_facts=0.1)
    trained, measured = set(texts(data, "train")), texts(data, "test")
    assert len(trained) == 180 and len(measured) == 200 and trained < set(measured)
    _, targets, slices = data.batch("test", 0, range(200))
    seen = np.repeat([t in trained for t in measured], (targets != K.IGNORE_INDEX).sum(1))
    assert slices["seen"].tolist() == seen.astype(int).tolist()
    assert set(texts(data, "val")) == set(measured)
    held_out = {question for question, _ in set(measured) - trained}
    surnames = {question.split()[-2] for question in held_out}
    assert len(surnames) > 5  # not the last lines of the file
    for share, message in ((0.001, "holds out none, or all"), (0.95, "must be between 0 and 0.9")):
        with pytest.raises(ConfigError, match=message):
            c = D.Config(task="text", path=str(tmp_path / "x.jsonl"), heldout_facts=share)
            c.check()
            D.Data(c)
    with pytest.raises(ConfigError, match="heldout_facts has no effect"):
        own(
            write_lines(tmp_path / "t.jsonl", [{"text": f"note {i}"} for i in range(9)]),
            heldout_facts=0.5,
        )


def test_a_held_out_question_is_not_trained_on_in_other_words(tmp_path):
    """In another Unicode form or with other blanks it is the same question."""
    forms = [f"caf\u00e9 {i}?" for i in range(40)], [f"cafe\u0301  {i}?" for i in range(40)]
    rows = [{"question": q, "answer": "yes"} for form in forms for q in form]
    data = own(write_lines(tmp_path / "x.jsonl", rows), heldout_facts=0.5)
    trained = texts(data, "train")
    held_out = set(texts(data, "test")) - set(trained)
    number = lambda document: re.search(r"\d+", document[0])[0]
    numbers = set(map(number, trained)), set(map(number, held_out))
    assert [len(n) for n in numbers] == [20, 20] and not numbers[0] & numbers[1]
    assert len(data.notes) == 1  # two forms of one fact are no second answer


def test_slices_of_a_data_set_are_numbers_or_text(tmp_path):
    D.main(["qa", "--output_dir", str(tmp_path / "a"), "--num_pairs=16", "--format=jsonl"])
    path, about = tmp_path / "a" / "validation/part-00000.jsonl", tmp_path / "a" / "metadata.json"
    path.write_text(path.read_text().replace('"exposures": 0', '"exposures": null'))
    metadata = json.loads(about.read_text())
    metadata["files"]["validation"][0]["sha256"] = checkpoint.sha256_file(path)
    about.write_text(json.dumps(metadata))
    with pytest.raises(ConfigError, match="the tag 'exposures' is no number or text in each row"):
        D.Data(D.Config(path=str(tmp_path / "a")))


def test_no_copy_of_a_text_stands_in_another_split(tmp_path):
    """Ten lines twenty times, in two Unicode forms and with other blanks."""
    forms = ["caf\u00e9 {}", "cafe\u0301 {}", "caf\u00e9  {}\n"]
    lines = [{"text": forms[i % 3].format(i % 10)} for i in range(200)]
    data = own(write_lines(tmp_path / "x.jsonl", lines))
    plain = lambda text: "".join(text.replace("e\u0301", "\u00e9").split())
    parts = [{plain(t) for t in texts(data, split)} for split in ("train", "val", "test")]
    assert [len(p) for p in parts] == [8, 1, 1] and len(set.union(*parts)) == 10
    assert [data.source.count(split) for split in ("train", "val", "test")] == [160, 3, 3]
    assert collections.Counter(map(plain, texts(data, "train"))) == dict.fromkeys(parts[0], 20)
    assert data.notes[0].startswith(
        "documents: train 160 (24 different), val 3 (0 of them trained on)"
    )
    with pytest.raises(ConfigError, match="x.jsonl has 2 documents that differ"):
        own(write_lines(tmp_path / "x.jsonl", lines[:2] * 50))


def test_the_split_of_texts_depends_on_seed_and_content_alone(tmp_path):
    lines = [{"text": f"note {i}"} for i in range(100)]
    a, b = (
        own(write_lines(tmp_path / f"{n}.jsonl", some))
        for n, some in enumerate((lines, lines[::-1]))
    )
    parts = [[set(texts(data, split)) for split in ("train", "val", "test")] for data in (a, b)]
    assert parts[0] == parts[1] and [len(p) for p in parts[0]] == [90, 5, 5]
    other = own(tmp_path / "0.jsonl", seed=1)
    assert set(texts(other, "test")) != parts[0][2]


def test_folders_say_what_they_share(tmp_path):
    lines = [{"text": f"note {i}"} for i in range(8)]
    for name, some in (
        ("train", lines[:6] * 2),
        ("validation", lines[5:7] * 3),
        ("test", lines[:8]),
    ):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "x.jsonl", some)
    data = own(tmp_path)
    assert data.notes == [
        "documents: train 12 (6 different), val 2 (1 of them trained on), "
        "test 8 (6 of them trained on)"
    ]
    trained = [texts(data, "test", [row])[0] in {r["text"] for r in lines[:6]} for row in range(8)]
    assert [data.batch("test", 0, [row])[2]["seen"][0] for row in range(8)] == trained
    with pytest.raises(ConfigError, match="heldout_facts has no effect"):
        own(tmp_path, heldout_facts=0.5)


def test_two_answers_to_one_question_are_named(tmp_path):
    rows = [
        {"question": q, "answer": a}
        for q, a in (("Who?", "A"), ("caf\u00e9?", "B"), ("Who? ", "C"), ("cafe\u0301?", "B"))
    ]
    path = write_lines(tmp_path / "x.jsonl", rows)
    assert own(path).notes[1:] == [
        f"note: questions with more than one answer: 1, {path}:1 and {path}:3 for one; "
        "no model can be right on both"
    ]
    path = write_lines(
        tmp_path / "y.jsonl", [{"text": t} for t in ("12:3 ", "12:4 ", "13:4 ", "12:3 ")]
    )
    assert f"1, {path}:1 and {path}:2 for one" in own(path, mask="digits").notes[1]


def test_rows_without_an_answer_are_not_counted_as_right(tmp_path, capsys):
    lines = [{"text": f"{i}:{7 * i} " if i % 2 else f"note {i}"} for i in range(200)]
    path = write_lines(tmp_path / "x.jsonl", lines)
    settings = dict(task="text", path=path, mask="digits", max_steps=1, lr=1e-9, n_val_examples=500)
    assert train.main(flags(tmp_path, "a", **settings)) == 0
    test = checkpoint.read_json(str(tmp_path / "a" / "status.json"))["test"]
    assert test["rows"] == test["all"]["rows"] == 100 and test["row_accuracy"] == 0
    assert (
        "without an answer, so not counted: 90 of train, 5 of val, 5 of test"
        in capsys.readouterr().out
    )
    ev.main([str(tmp_path / "a")])
    share = checkpoint.read_json(str(tmp_path / "a" / "eval_test.json"))["metrics"]["row_accuracy"]
    assert share["n"] == 100 and share["value"] == 0
    asked = own(
        write_lines(tmp_path / "q.jsonl", [{"text": "Is it?"}, {"text": "Is it? Yes"}] * 9),
        mask="qa",
    )
    assert [
        (asked.encode_and_label([t])[1] != K.IGNORE_INDEX).sum() for t in ("Is it?", "Is it? Yes")
    ] == [
        0,
        5,
    ]  # no end alone


def test_marks_and_names_of_other_programs(tmp_path):
    """A byte order mark, line ends of Windows, null for what a row lacks, odd columns."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"text": "ab"}\r\n\r\n{"text": "cd"}\r\n{"text": "ef"}')
    assert sorted(own(path).source.texts) == ["ab", "cd", "ef"]
    path.write_bytes('{"text": "ab"}\n'.encode("utf-16"))
    with pytest.raises(ConfigError, match="x.jsonl is UTF-16; save it as UTF-8"):
        own(path)
    rows = [{"text": "ab"}, {"question": "Who?", "answer": "me"}, {"text": "cd"}, {"text": "ef"}]
    table = pa.Table.from_pylist(
        [{"text": None, "question": None, "answer": None, **row} for row in rows]
    )
    odd = pa.array([2**62, None, 0, 1], pa.timestamp("ns")), pa.array([2**62] * 4, pa.duration("s"))
    table = table.append_column("when", odd[0]).append_column("long", odd[1])
    pq.write_table(table, tmp_path / "x.parquet")
    assert set(own(tmp_path / "x.parquet").source.texts) == {"ab", ("Who? ", "me"), "cd", "ef"}
    pq.write_table(
        pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]),
        tmp_path / "x.parquet",
    )
    with pytest.raises(ConfigError, match="has two columns named"):
        own(tmp_path / "x.parquet")


BAD = {  # name: (bytes of line 2, what the sentence says)
    "torn": (b'{"text": "ab', "no JSON"),
    "column": (b'{"txt": "ab"}', 'needs "text", or "question" and "answer"; it has txt'),
    "half": (b'{"question": "ab"}', 'needs "text", or "question" and "answer"; it has question'),
    "utf-8": (b'{"text": "ab\xff"}', "byte 13 of the line is no UTF-8"),
    "null": (b'{"text": null}', '"text" is NoneType, not text'),
    "number": (b'{"text": 3}', '"text" is int, not text'),
    "list": (b'["text"]', "a JSON list, not an object"),
    "empty": (b'{"text": " "}', '"text" is empty'),
    "long": (b'{"text": "' + b"a" * 10_000_000 + b'"}', "a line of more than 1048576 bytes"),
    "document": (
        b'{"text": "' + b"a" * 300 + b'"}',
        "a document of 302 bytes, more than block_size=256",
    ),
    "surrogate": (b'{"text": "\\ud800"}', "half of a surrogate pair"),
    "deep": (b"[" * 100_000, "no JSON"),
    "twice": (b'{"question": "a", "question": "b"}', "the name 'question' comes twice"),
    "digits": (b'{"text": ' + b"1" * 5000 + b"}", "Exceeds the limit"),
    "both": (b'{"text": "a", "question": "b", "answer": "c"}', 'has "text", and "question"'),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_named(tmp_path, name):
    line, message = BAD[name]
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "ab"}\n' + line + b'\n{"text": "cd"}\n')
    with pytest.raises(
        ConfigError, match=re.escape(f"{path}:2: ") + ".*" + re.escape(message)
    ) as e:
        D.Data(D.Config(task="text", path=str(path)))
    assert "\n" not in str(e.value) and len(str(e.value)) < 400


def test_bad_input_ends_a_run_with_a_sentence_and_leaves_nothing(tmp_path, script):
    (tmp_path / "x.jsonl").write_text('{"text": "ab"}\n{"text": "a')
    done = script(
        "train.py",
        "--data=data_synth",
        "--task=text",
        "--path=x.jsonl",
        "--log_dir=runs",
        cwd=tmp_path,
    )
    assert done.returncode == 2 and "x.jsonl:2" in done.stderr and "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == ["x.jsonl"]


def test_bad_parquet_is_named(tmp_path):
    path = tmp_path / "x.parquet"
    generator = np.random.default_rng(0)
    table = pa.table(
        {"text": ["".join(map(chr, generator.integers(97, 122, 40))) for _ in range(2000)]}
    )
    pq.write_table(table, path, write_page_checksum=True, use_dictionary=False, compression="none")
    whole, noticed = path.read_bytes(), 0
    for place in np.linspace(0, len(whole) - 1, 60).astype(int):
        damaged = bytearray(whole)
        damaged[place] ^= 1  # another letter, mostly: nothing but the checksum tells
        path.write_bytes(damaged)
        try:
            D.Data(D.Config(task="text", path=str(path)))
        except ConfigError as e:
            noticed += 1
            assert "x.parquet: " in str(e) and "\n" not in str(e)
    assert noticed >= 55  # a flip in a part that no reader needs changes nothing
    for rows, message in (
        ([{"text": "a"}, {"text": None}], 'row 2: "text" is NoneType'),
        ([{"x": 1}], "row 1: needs"),
    ):
        pq.write_table(pa.Table.from_pylist(rows), path)
        with pytest.raises(ConfigError, match=message):
            D.Data(D.Config(task="text", path=str(path)))


def test_paths_that_hold_nothing(tmp_path):
    mistakes = {
        "nowhere": "does not exist",
        "": "holds no .jsonl",
        "x.txt": "neither .jsonl nor",
        "e.jsonl": "has 0 doc",
    }
    for path, message in mistakes.items():
        if "." in path:
            (tmp_path / path).write_text("")
        with pytest.raises(ConfigError, match=message):
            D.Data(D.Config(task="text", path=str(tmp_path / path)))


# ---- command line --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, message",
    [
        (["quiz", "--output_dir=x"], "name what to do first"),
        (["qa", "--task=digits"], "the task is qa already"),
        (["qa", "--packing=documents"], "what is written is text"),
        (["check", "--num_pairs=8"], "there is no setting 'num_pairs'"),
        (["qa", "--path=x"], "path=x is a data set already"),
        (
            ["qa", "--output_dir=x", "--num_pairs=15"],
            "num_pairs=15 does not divide into 8 buckets; 16 does",
        ),
        (
            ["qa", "--output_dir=x", "--digits=2", "--num_pairs=800"],
            "800 pairs need 1600 different numbers",
        ),
        (["digits", "--output_dir=x", "--buckets=[1,2]"], "only task qa uses it"),
        (["digits", "--output_dir=x", "--steps=2"], "rule is random"),
        (["twohop", "--output_dir=x", "--phi=3"], "at most 0.8\\d or more relations"),
        (["twohop", "--output_dir=x", "--cot=0.5"], "cot must be 0 or 1"),
        (
            ["hashhop", "--output_dir=x", "--block_size=60"],
            "block_size=60 is too small for 2 chains of 1 hops",
        ),
        (
            ["hashhop", "--output_dir=x", "--hash_len=2", "--block_size=3000"],
            "hash_len=2 is too short",
        ),
        (["text", "--output_dir=x"], "task=text"),
        (["qa", "--output_dir=x", "--pairs=3"], "no setting 'pairs'"),
    ],
)
def test_mistakes_are_named(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        D.main(words)
    assert os.listdir(tmp_path) == []


def test_the_advice_of_a_refusal_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = [f"--n_{split}_examples=3" for split in ("train", "val", "test")]
    commands = {
        "block_size": ["hashhop", *few, "--block_size=60"],
        "num_pairs": ["qa", "--num_pairs=15"],
    }
    commands |= {"phi": ["twohop", "--phi=3"]}
    for number, (advice, words) in enumerate(commands.items()):
        for _ in range(
            5
        ):  # one setting may ask for more than once: each number of hops needs its own size
            try:
                assert D.main([*words, f"--output_dir=d{number}"]) == 0
                break
            except ConfigError as e:
                better = re.search(r"(?:use at least|use at most|buckets;) ([\d.]+)", str(e))[1]
                words = [*words[:-1], f"--{advice}={better}"]
        assert os.path.isdir(f"d{number}")


def test_check_speaks_and_fails_loudly(capsys, tmp_path, script):
    assert D.main(["check"]) == 0
    assert capsys.readouterr().out.count("exact") == 4
    from test_tokens import tokenizer_json

    done = script("data_synth.py", "check", f"--tokenizer={tokenizer_json(tmp_path, ['1 2'])}")
    assert (
        done.returncode == 1
        and "would not be exact" in done.stderr
        and "digits are merged" in done.stdout
    )


def test_memory_does_not_grow_with_the_copies():
    """The orders of two epochs are kept, and each document once, however many epochs pass."""
    data = D.Data(D.Config(num_pairs=800))
    n = data.source.count("train")
    for epoch in range(20):
        data.batch("train", 0, range(epoch * n, epoch * n + 8))
        assert rng.epoch_permutation.cache_info().currsize <= 2 and len(data.source.texts) == 800
