"""data_synth.py: the text of each generator, read by a reader written from its definition."""

import collections
import doctest
import re

import numpy as np
import pytest
import torch

import data_synth
import delta
import model
from data_synth import Config
from nanorecall import text as text_file
from nanorecall import twohop as twohop_file
from nanorecall.rng import IGNORE_INDEX
from nanorecall.settings import ConfigError
from nanorecall.twohop import build_twohop
from toy_facts import SMALL, SPLITS, WHOLE_SPLITS, documents, scored_texts, small_data, write_jsonl


@pytest.mark.parametrize("module", [data_synth, text_file, twohop_file])
def test_the_docstrings_examples(module):
    result = doctest.testmod(module)
    assert result.attempted >= 2 and result.failed == 0


# ---- qa ------------------------------------------------------------------------------------------

QA_SIZES = [
    dict(num_pairs=10000, buckets=(1, 2, 4, 8, 16, 32, 64, 128), heldout_frac=0.1, num_digits=6),
    dict(num_pairs=1, buckets=(3,), heldout_frac=0, num_digits=2),
]


@pytest.mark.parametrize("sizes", QA_SIZES)
def test_qa_shows_each_bucket_as_often_as_it_says(sizes):
    data = data_synth.Data(Config(**sizes, **WHOLE_SPLITS))
    n = data.source.count("train")
    shown = collections.Counter(documents(data, "train"))
    assert shown == collections.Counter(documents(data, "train", range(7 * n, 8 * n)))

    bucket_size = sizes["num_pairs"] // len(sizes["buckets"])
    n_heldout = round(sizes["heldout_frac"] * bucket_size)
    pairs_shown = collections.Counter(shown.values())
    assert pairs_shown == dict.fromkeys(sizes["buckets"], bucket_size - n_heldout)

    tested, slices = data.source.read("test", np.arange(data.source.count("test")))
    for text, exposures, seen in zip(tested, slices["exposures"], slices["seen"]):
        assert shown.get(text, 0) == exposures and seen == (exposures > 0)
    assert (slices["seen"] == 0).sum() == n_heldout * len(sizes["buckets"])


@pytest.mark.parametrize("sizes", QA_SIZES)
def test_qa_numbers_are_all_different_and_of_one_width(sizes):
    tested = documents(data_synth.Data(Config(**sizes, **WHOLE_SPLITS)), "test")
    assert len(set(tested)) == sizes["num_pairs"]
    numbers = []
    for text in tested:
        pair = re.fullmatch(r"(\d+):(\d+) ", text).groups()
        assert {len(number) for number in pair} == {sizes["num_digits"]}
        numbers += pair
    assert len(set(numbers)) == 2 * sizes["num_pairs"]


def test_qa_epochs_are_shuffled_and_depend_on_the_seed():
    data = small_data("qa", seed=3)
    n = data.source.count("train")
    first, second = documents(data, "train"), documents(data, "train", range(n, 2 * n))
    assert first != second and sorted(first) == sorted(second)
    assert documents(small_data("qa", seed=4), "train") != first


def test_an_example_depends_on_its_index_alone():
    data = small_data("qa", seed=3)
    n = data.source.count("train")
    at_once = documents(data, "train", range(2 * n))
    again = small_data("qa", seed=3)
    for index in reversed(range(2 * n)):
        assert documents(again, "train", [index]) == [at_once[index]]
    whole = data.batch("train", 0, range(8))[0]
    halves = [data.batch("train", 5, half)[0] for half in (range(4), range(4, 8))]
    assert torch.equal(whole, torch.cat(halves))


@pytest.mark.parametrize("reverse_pairs", ["probe", "train"])
def test_qa_reverse_pairs(reverse_pairs):
    data = small_data("qa", reverse_pairs=reverse_pairs)
    tested, slices = data.source.read("test", np.arange(data.source.count("test")))
    forward, turned_back, heldout = set(), set(), set()
    for text, direction, seen in zip(tested, slices["direction"], slices["seen"]):
        if direction == "forward":
            forward.add(text)
        else:
            x, y = text.strip().split(":")
            turned_back.add(f"{y}:{x} ")
        if not seen:
            heldout.add(text)
    assert forward == turned_back and len(forward) == 16
    trained = set(documents(data, "train"))
    assert bool(trained - forward) == (reverse_pairs == "train")
    assert not trained & heldout


def read_forms(source):
    """{(key, value): {"first" or "second": number of the document}}, read by its marks."""
    facts = collections.defaultdict(dict)
    for number, text in enumerate(source.texts):
        first = re.fullmatch(r"(\d{6}):(\d{6}) ", text)
        second = re.fullmatch(r"q (\d{6})\?(\d{6})", text)
        facts[(first or second).groups()]["first" if first else "second"] = number
    return facts


@pytest.mark.parametrize("second_form_frac, n_in_both", [(1.0, 18), (0.5, 9), (0.0, 0)])
def test_qa_in_two_wordings(second_form_frac, n_in_both):
    """Of 20 pairs in each bucket 2 are held out, and n_in_both are trained on in both wordings."""
    sizes = dict(num_pairs=40, buckets=(1, 3), **WHOLE_SPLITS)
    source = data_synth.build_qa(Config(forms=2, second_form_frac=second_form_frac, **sizes))
    shown = collections.Counter(source.splits["train"].tolist())
    pairs = collections.Counter()
    for numbers in read_forms(source).values():
        first, second = numbers["first"], numbers["second"]
        exposures = source.slices["exposures"][[first, second]]
        assert exposures[0] == exposures[1] == shown[first]
        forms = source.slices["form"][[first, second]].tolist()
        if shown[second]:
            assert shown[second] == shown[first] and forms == ["first", "second"]
        elif shown[first]:
            assert forms == ["first", "second, untrained"]
        else:
            assert forms == ["held out", "held out"]
        pairs[shown[first], shown[second] > 0] += 1
    assert sum(pairs.values()) == 40 and pairs[0, False] == 4
    for exposures in (1, 3):
        assert pairs[exposures, True] == n_in_both
        assert pairs[exposures, False] == 18 - n_in_both
    assert sorted(source.splits["test"]) == list(range(80))
    one_form = data_synth.build_qa(Config(**sizes))
    assert source.texts[:40] == one_form.texts
    assert bool(source.capacity) == (second_form_frac == 1)


@pytest.mark.parametrize("pack_documents", [False, True])
def test_answers_of_both_wordings_are_scored(pack_documents):
    data = small_data("qa", forms=2, pack_documents=pack_documents)
    texts = documents(data, "train", range(20))
    assert {text[0] == "q" for text in texts} == {False, True}
    for text, scored in zip(texts, scored_texts(data, "train", range(20))):
        assert scored == re.split("[:?]", text)[1].strip()
    tokens, targets, *_ = data.batch("train", 0, range(20))
    assert (targets != IGNORE_INDEX).sum() == 20 * 6


# ---- digits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_pairs, width", [(6000, 6), (20000, 6), (200000, 7), (1, 4)])
def test_digit_lookup_keys(num_pairs, width):
    c = Config(task="digits", num_pairs=num_pairs, num_unseen=100, **WHOLE_SPLITS)
    source = data_synth.build_digits(c)
    word = f"[1-{width}]{{{width}}}"
    for text in source.texts:
        assert re.fullmatch(f"{word}:{word} ", text)
    keys = {text.split(":")[0] for text in source.texts}
    assert len(keys) == num_pairs + 100
    trained, val, test = (set(source.splits[split].tolist()) for split in SPLITS)
    assert len(trained) == num_pairs and trained <= val and trained <= test
    assert len(val - trained) == len(test - trained) == 50 and val & test == trained


@pytest.mark.parametrize("rule_steps", [1, 2])
def test_the_rule_of_selfindex(rule_steps):
    c = Config(task="digits", num_pairs=10000, rule="selfindex", rule_steps=rule_steps)
    for text in data_synth.build_digits(c).texts:
        word, value = text.strip().split(":")
        for _ in range(rule_steps):  # the word as a map, applied to itself
            word = "".join(word[int(digit) - 1] for digit in word)
        assert value == word


def test_selfindex_as_llmonade_has_it():
    word = np.array([[2, 3, 4, 1, 0, 5]])  # 345216, digits from 0
    assert data_synth.digit_words(np.take_along_axis(word, word, 1)) == ["521436"]


# ---- twohop --------------------------------------------------------------------------------------


def read_twohop(source, numbers):
    """Single facts {(a, letter): b} and queries [(a, letters, answer)] of some documents."""
    facts, queries = {}, []
    for number in numbers:
        text = source.texts[number]
        query = re.fullmatch(r"(\d+)>([a-z]?)>([a-z]?)(\d+(?:>\d+)?) ", text)
        if query:
            a, r1, r2, answer = query.groups()
            queries.append((a, r1, r2, answer))
        else:
            a, r, b = re.fullmatch(r"(\d+)>([a-z]?)(\d+) ", text).groups()
            facts[a, r] = b
    return facts, queries


def facts_of(facts, queries):
    """The single facts that queries need."""
    used = set()
    for a, r1, r2, _ in queries:
        used |= {(a, r1), (facts[a, r1], r2)}
    return used


TWOHOP_SIZES = [
    dict(num_entities=5000, num_relations=1, phi=0.5, cot_frac=0, ood_frac=0.2),
    dict(num_entities=100, num_relations=8, phi=4.0, cot_frac=1, ood_frac=0.2),
    dict(num_entities=40, num_relations=3, phi=1.0, cot_frac=0, ood_frac=0),
    dict(num_entities=3, num_relations=1, phi=0.3, cot_frac=0, ood_frac=0),
]


@pytest.fixture(scope="module", params=TWOHOP_SIZES)
def twohop(request):
    """-> settings, the source, its single facts, its trained queries."""
    c = Config(task="twohop", **request.param, **WHOLE_SPLITS)
    source = build_twohop(c)
    return c, source, *read_twohop(source, source.splits["train"])


def test_twohop_answers_follow_from_two_facts(twohop):
    c, source, facts, _ = twohop
    assert len(facts) == c.num_entities * c.num_relations
    for (a, _), b in facts.items():
        assert a != b
    _, queries = read_twohop(source, range(len(source.texts)))
    for a, r1, r2, answer in queries:
        between = facts[a, r1]
        end = facts[between, r2]
        assert answer == (f"{between}>{end}" if c.cot_frac else end)
    asked = {(a, r1, r2) for a, r1, r2, _ in queries}
    assert len(asked) == len(queries)  # one correct answer for each


def test_twohop_trains_on_phi_queries_a_usable_fact(twohop):
    c, source, facts, trained = twohop
    assert (source.slices["query"] == "trained").sum() == len(trained) == len(set(trained))
    n_usable = len(facts) * (1 - c.ood_frac)
    assert len(trained) == pytest.approx(c.phi * n_usable, rel=0.15, abs=1)


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("kind", ["in-distribution", "out-of-distribution"])
def test_twohop_queries_out_of_training(twohop, split, kind):
    _, source, facts, trained = twohop
    numbers = source.splits[split]
    numbers = numbers[source.slices["query"][numbers] == kind]
    for other in SPLITS:
        assert other == split or not np.isin(numbers, source.splits[other]).any()
    used = facts_of(facts, trained)
    for query in read_twohop(source, numbers)[1]:
        needed = facts_of(facts, [query])
        assert needed <= used if kind == "in-distribution" else not needed & used


def test_without_markers_a_query_has_two_answers():
    data = small_data("twohop", markers=False)
    trained = documents(data, "train")
    questions = collections.Counter(text.split(":")[0] for text in trained)
    assert max(questions.values()) == 2 and data.kind == "digits"
    for text, scored in zip(trained[:3], scored_texts(data, "train", range(3))):
        assert scored == text.strip().split(":")[1]


# ---- hashhop -------------------------------------------------------------------------------------

Problem = collections.namedtuple("Problem", "hops cot queries answers")


def follow(text):
    """Read a problem as a person would, and check its answers. -> Problem"""
    lines, completion = text.split("\n\nCOMPLETION:\n")
    next_hash = dict(line.split(" = ") for line in lines.split("\n"))
    assert len(next_hash) == lines.count("\n") + 1
    form = r"Hops=(\d+)\n\nCoT=(True|False)\n\n(.*)\n"
    hops, cot, completed = re.fullmatch(form, completion, re.S).groups()
    queries, answers = [], []
    for line in completed.split("\n"):
        query, answer = re.fullmatch(r"(\w+) = '(.*)'", line).groups()
        chain = [next_hash[query]]
        while not chain[-1].startswith("'"):
            chain.append(next_hash[chain[-1]])
        chain[-1] = chain[-1].strip("'")
        assert len(chain) == int(hops)
        assert answer == (" = ".join(chain) if cot == "True" else chain[-1])
        queries.append(query)
        answers.append(answer)
    return Problem(int(hops), cot == "True", queries, answers)


@pytest.fixture(scope="module")
def hashhop():
    c = Config(task="hashhop", hops=(1, 2, 3, 4), num_queries=3, cot_frac=0.3, max_bytes=500)
    return data_synth.Data(c)


def test_hash_chains_followed_by_hand(hashhop):
    n_problems, n_cot = collections.Counter(), collections.Counter()
    texts, slices = hashhop.source.read("train", range(10000))
    for text, hops, hops_cot in zip(texts, slices["hops"], slices["hops_cot"]):
        problem = follow(text)
        n_problems[problem.hops] += 1
        n_cot[problem.hops] += problem.cot
        assert hops == problem.hops
        assert hops_cot == (f"{hops} cot" if problem.cot else f"{hops}")
        assert len(set(problem.queries)) == 3
        least = 500 - 40 - 14 * problem.hops  # else one more chain would fit
        assert least < len(text) + 1 <= 500
    assert n_problems == dict.fromkeys((1, 2, 3, 4), 2500)
    assert n_cot[1] == 0  # one hop has nothing in between
    for hops in (2, 3, 4):
        assert 650 < n_cot[hops] < 850


def test_hashhop_splits_share_no_problem(hashhop):
    texts = []
    for split in SPLITS:
        texts += documents(hashhop, split, range(400))
    assert len(set(texts)) == 1200


@pytest.mark.parametrize("split", ["val", "test"])
def test_hashhop_is_measured_by_hops(hashhop, split):
    groups = hashhop.eval_groups(split)
    assert len(groups) == 4
    for hops, group in zip((1, 2, 3, 4), groups):
        for text in documents(hashhop, split, group[:5]):
            problem = follow(text)
            assert problem.hops == hops and len(problem.queries) == 1


def test_lengths_of_hashes_are_mixed():
    c = Config(task="hashhop", hash_lens=(3, 8), hops=(1, 2), test_hops=(1, 2), max_bytes=300)
    c.check()
    data = data_synth.Data(c)
    for split, group_size in (("train", None), ("test", data.source.group_size("test"))):
        counts = collections.Counter()
        indices = range(12)
        if group_size:
            indices = [*range(6), *range(group_size, group_size + 6)]
        texts, slices = data.source.read(split, indices)
        for text, hops, length in zip(texts, slices["hops"], slices["hash_len"]):
            problem = follow(text)
            words = re.findall(r"[A-Za-z]+", text.split("COMPLETION")[0])
            assert set(map(len, words)) == {length}
            assert len(text) + 1 <= 300 and problem.hops == hops
            counts[hops, length] += 1
        assert counts == dict.fromkeys([(1, 3), (1, 8), (2, 3), (2, 8)], 3)
    with pytest.raises(ConfigError, match="hash_lens=.* needs different numbers from 2 to 64"):
        Config(task="hashhop", hash_lens=(3, 3)).check()
    with pytest.raises(ConfigError, match="max_bytes=120 is too small for 2 chains"):
        Config(task="hashhop", hash_lens=(2, 40), max_bytes=120).check()


@pytest.mark.parametrize("hops, hash_len, max_bytes", [(1, 2, 64), (4, 16, 400), (16, 2, 400)])
def test_hashhop_at_its_edges(hops, hash_len, max_bytes):
    sizes = dict(hops=(hops,), test_hops=(hops,), hash_len=hash_len, max_bytes=max_bytes)
    data = data_synth.Data(Config(task="hashhop", **sizes))
    texts = documents(data, "train", range(20))
    for text, scored in zip(texts, scored_texts(data, "train", range(20))):
        problem = follow(text)
        assert problem.hops == hops and len(text) + 1 <= max_bytes
        assert problem.answers == [scored]


# ---- what a model gets ---------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", SMALL)
def test_only_answers_are_scored(task, split):
    data = small_data(task)
    indices = range(12) if split == "train" else data.eval_groups(split)[0]
    texts = documents(data, split, indices)
    for text, scored in zip(texts, scored_texts(data, split, indices)):
        assert scored == re.split(r"[:>]|= '", text)[-1].strip(" '\n")


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", SMALL)
def test_slices_have_a_value_for_each_label(task, split):
    data = small_data(task)
    indices = range(12) if split == "train" else data.eval_groups(split)[0]
    tokens, targets, slices = data.batch(split, 0, indices)
    assert tokens.shape == targets.shape and tokens.shape[1] <= data.seq_len
    assert tokens.max() < data.vocab_size
    n_labels = (targets != IGNORE_INDEX).sum(1).numpy()
    for values in slices.values():
        assert len(values) == n_labels.sum()
    answer_pos = [np.arange(n) for n in n_labels]
    assert np.array_equal(slices["answer_pos"], np.concatenate(answer_pos))


@pytest.mark.parametrize("module, cls", [(model, model.GPT), (delta, delta.DeltaNet)])
@pytest.mark.parametrize("task", ["twohop", "hashhop", "text"])
def test_packed_training_equals_unpacked(module, cls, task, tmp_path):
    """Loss and gradients of documents end to end are those of one padded row each."""
    if task == "text":
        path = write_jsonl(tmp_path / "x.jsonl", [{"text": "ab " * n} for n in range(1, 40)])
        settings = dict(path=path)
    else:
        settings = dict(SMALL[task], cot_frac=1.0 if task == "twohop" else 0.0)
    padded = data_synth.Data(Config(task=task, **settings))
    packed = data_synth.Data(Config(task=task, pack_documents=True, **settings))
    indices = range(10, 27)
    tokens, targets, _, cu_seqlens = packed.batch("train", 0, indices)
    assert tokens.shape == (1, cu_seqlens[-1])
    assert len(cu_seqlens) == 18 and cu_seqlens.dtype == torch.int32

    sizes = dict(dim=32, dk=16, dv=16, n_layers=2, init_std=0.3)
    config = module.Config(vocab_size=padded.vocab_size, seq_len=padded.seq_len, **sizes)
    results = []
    for inputs in ((tokens, targets, cu_seqlens), padded.batch("train", 0, indices)[:2]):
        torch.manual_seed(0)
        net = cls(config)
        _, loss = net(*inputs)
        results.append([loss, *torch.autograd.grad(loss, list(net.parameters()))])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_an_epoch_that_is_too_long_is_refused():
    with pytest.raises(ConfigError, match="an epoch of 180000000 documents is too long"):
        Config(num_pairs=200, buckets=(10**6,)).check()


def test_contexts_that_need_more_numbers_than_there_are_are_refused():
    sizes = dict(task="qa", num_digits=1, num_pairs=4, buckets=(2,), context_docs=50)
    with pytest.raises(ConfigError, match="needs 12 different numbers; num_digits=1 has 10"):
        Config(**sizes, context_pairs=6).check()
    Config(**sizes, context_pairs=5).check()
