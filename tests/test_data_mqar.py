"""data_mqar.py against a solver that only has a dict, a loop with the same law, a damaged disk."""

import collections
import doctest
import json
import os
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import data_mqar
from naive import loop_sequences
from nanorecall import mqar_files, rng
from nanorecall.files import sha256_file
from nanorecall.rng import IGNORE_INDEX
from nanorecall.settings import ConfigError, build_config, split_argv


def config(*flags, **values):
    """A checked Config, of values or of a command line."""
    if values:
        c = data_mqar.Config(**values)
    else:
        c = build_config(data_mqar.Config, split_argv(list(flags))[1])
    c.check()
    return c


def test_doctests():
    assert doctest.testmod(data_mqar).failed == 0


# ---- the law -------------------------------------------------------------------------------------


def solve(tokens, size, alphabet):
    """Read a sequence with a dict: yield (position, token to predict there) of every query.

    Knows no generator. alphabet: the tokens that its keys are made of.
    """
    c, width, n_value = size.config, size.config.key_tokens, size.config.value_tokens
    half = c.vocab_size // 2
    memory, t = {}, 0
    # A value that follows a key closes a pair; anything else is noise.
    while t < size.storage_len:
        key = tuple(tokens[t : t + width])
        is_key = all(1 <= x < half for x in key) and set(key) <= alphabet
        if is_key and t + width < size.storage_len and tokens[t + width] >= half:
            memory[key] = tokens[t + width : t + width + n_value]
            t += width + n_value
        else:
            t += 1
    while t + width <= len(tokens):
        key = tuple(tokens[t : t + width])
        if key in memory:
            for i, token in enumerate(memory[key]):
                yield t + width - 1 + i, token
            t += width + n_value - 1
        else:
            t += 1


TASKS = [
    dict(input_seq_len=128, num_kv_pairs=32),
    dict(input_seq_len=64, num_kv_pairs=4, vocab_size=64, random_non_queries=True),
    dict(input_seq_len=64, num_kv_pairs=8, num_updates=5, vocab_size=101),
    dict(input_seq_len=96, num_kv_pairs=6, max_noise=3, vocab_size=64),
    dict(input_seq_len=96, num_kv_pairs=9, key_tokens=2, vocab_size=64),
    dict(
        input_seq_len=200,
        num_kv_pairs=12,
        key_tokens=3,
        num_updates=4,
        max_noise=2,
        random_non_queries=True,
        vocab_size=128,
    ),
    dict(input_seq_len=128, num_kv_pairs=32, power_a=1.0, vocab_size=66),
    dict(input_seq_len=96, num_kv_pairs=12, num_queries=5, vocab_size=64),
    dict(input_seq_len=128, num_kv_pairs=9, value_tokens=3, vocab_size=64),
    dict(
        input_seq_len=240,
        num_kv_pairs=12,
        num_queries=7,
        num_updates=4,
        max_noise=2,
        key_tokens=2,
        value_tokens=2,
        random_non_queries=True,
        vocab_size=24,
    ),
]


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_a_dict_gives_every_label_and_no_other(task):
    c = config(**task)
    size = data_mqar.TaskSize(c.input_seq_len, c.num_kv_pairs, c)
    tokens, targets, slices = data_mqar.make_sequences(size, "train", np.arange(300))
    n_queries = c.num_queries or c.num_kv_pairs
    n_labels = 300 * n_queries * c.value_tokens
    assert len(slices["distance"]) == (targets != IGNORE_INDEX).sum() == n_labels
    for x, y in zip(tokens.tolist(), targets.tolist()):
        queried = set()
        labelled = [t for t in range(len(x)) if y[t] != IGNORE_INDEX]
        for t in labelled[:: c.value_tokens]:
            queried.add(tuple(x[t - c.key_tokens + 1 : t + 1]))
        assert len(queried) == n_queries  # every key at most once
        expected = [IGNORE_INDEX] * len(x)
        for t, value in solve(x, size, set().union(*queried)):
            expected[t] = value
        assert y == expected
        assert max(x) < c.vocab_size and min(x) >= 0


def test_labels_moved_by_one_are_noticed():
    """The check above is not blind: what it accepts is lost when labels move."""
    c = config(input_seq_len=32, num_kv_pairs=4, vocab_size=64)
    size = data_mqar.TaskSize(32, 4, c)
    tokens, targets, _ = data_mqar.make_sequences(size, "train", np.arange(1))
    alphabet = set(tokens[0][targets[0] != IGNORE_INDEX].tolist())
    expected = np.full(32, IGNORE_INDEX)
    for t, value in solve(tokens[0].tolist(), size, alphabet):
        expected[t] = value
    assert (expected == targets[0]).all() and (expected != np.roll(targets[0], 1)).any()


def read_slices(tokens, targets, size):
    """For each label of a sequence, as a person would read it:
    how far back its key was stored last, how often it was stored, and which token of its value
    the label is.
    """
    c, width, found = size.config, size.config.key_tokens, []
    for label in range(len(tokens)):
        if targets[label] == IGNORE_INDEX:
            continue
        i = len(found) % c.value_tokens
        query = label - i - width + 1
        key = tokens[query : query + width]
        stored = []
        for t in range(size.storage_len - width):
            if tokens[t : t + width] == key and tokens[t + width] >= c.vocab_size // 2:
                stored.append(t)
        assert tokens[stored[-1] + width + i] == targets[label]
        found.append((query - stored[-1], len(stored), i))
    return found


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_the_slices_are_what_a_person_would_count(task):
    c = config(**task)
    size = data_mqar.TaskSize(c.input_seq_len, c.num_kv_pairs, c)
    tokens, targets, slices = data_mqar.make_sequences(size, "test", np.arange(60))
    found = []
    for x, y in zip(tokens.tolist(), targets.tolist()):
        found += read_slices(x, y, size)
    powers = [1 << (distance.bit_length() - 1) for distance, _, _ in found]
    assert slices["distance"].tolist() == powers and len(set(powers)) > 2
    if c.num_updates:
        assert slices["updated"].tolist() == [times - 1 for _, times, _ in found]
        assert c.num_queries or slices["updated"].sum() == 60 * c.num_updates
    else:
        assert "updated" not in slices
    if c.value_tokens > 1:
        assert slices["answer_pos"].tolist() == [i for _, _, i in found]
    else:
        assert "answer_pos" not in slices


def test_the_slices_of_a_sequence_by_hand():
    """Two pairs and one of them again, in six tokens, then asked at 6 and 8.

    A distance counts as the power of two below it: 6 tokens, from 8 back to 2, count as 4.
    """
    c = config(input_seq_len=10, num_kv_pairs=2, num_updates=1, vocab_size=10)
    size = data_mqar.TaskSize(10, 2, c)
    for index in range(50):
        tokens, targets, slices = data_mqar.make_sequences(size, "train", np.array([index]))
        x = tokens[0].tolist()
        asked = [t for t in range(10) if targets[0, t] != IGNORE_INDEX]
        assert asked == [6, 8] and x[4] in (x[0], x[2])
        last_stored = {x[0]: 0, x[2]: 2} | {x[4]: 4}
        power_of = {2: 2, 4: 4, 6: 4, 8: 8}
        assert slices["updated"].tolist() == [int(x[t] == x[4]) for t in asked]
        assert slices["distance"].tolist() == [power_of[t - last_stored[x[t]]] for t in asked]


@pytest.mark.parametrize(
    "task",
    [dict(max_noise=3), dict(random_non_queries=True), dict(max_noise=2, random_non_queries=True)],
    ids=str,
)
def test_noise_is_any_token_but_the_keys_of_its_sequence(task):
    """Each token is as often noise as any other, but for the 6 keys of its sequence."""
    c = config(input_seq_len=96, num_kv_pairs=6, vocab_size=32, **task)
    size = data_mqar.TaskSize(96, 6, c)
    tokens, targets, _ = data_mqar.make_sequences(size, "train", np.arange(4000))
    found, expected = np.zeros(32), np.zeros(32)
    for x, y in zip(tokens.tolist(), targets.tolist()):
        keys = {x[t] for t in range(96) if y[t] != IGNORE_INDEX}
        assert [x.count(key) for key in keys] == [2] * 6  # stored and asked, and nowhere else
        noise = []
        t = 0
        while t < 96:
            in_storage = t < size.storage_len
            if x[t] in keys:
                t += 2 if in_storage else 1  # a value follows a key that is stored
                continue
            if c.max_noise if in_storage else c.random_non_queries:
                noise.append(x[t])
            elif not in_storage:
                assert x[t] == 0
            t += 1
        found += np.bincount(noise, minlength=32)
        for token in set(range(32)) - keys:
            expected[token] += len(noise) / 26
    assert expected.min() > 1000  # of 0 and of values, too
    assert (np.abs(found - expected) / np.sqrt(expected)).max() < 5


def test_noise_is_of_every_length_up_to_the_longest():
    """Tokens of noise after a stored pair: 0, 1, 2 and 3 as often as each other."""
    c = config(input_seq_len=64, num_kv_pairs=6, vocab_size=32, max_noise=3)
    size = data_mqar.TaskSize(64, 6, c)
    tokens, targets, _ = data_mqar.make_sequences(size, "train", np.arange(2000))
    lengths = []
    for x, y in zip(tokens.tolist(), targets.tolist()):
        keys = {x[t] for t in range(64) if y[t] != IGNORE_INDEX}
        stored = [t for t in range(size.storage_len) if x[t] in keys]
        for t, following in zip(stored, stored[1:]):
            lengths.append(following - t - 2)  # without a key and its value
    counts = np.bincount(lengths, minlength=4)
    assert len(counts) == 4 and (np.abs(counts - 2500) < 5 * np.sqrt(2500)).all()


@pytest.mark.parametrize("power_a", [0.01, 1.0])
def test_the_law_is_that_of_a_loop_over_sequences(power_a):
    c = config(input_seq_len=64, num_kv_pairs=8, vocab_size=64, power_a=power_a)
    size, n = data_mqar.TaskSize(64, 8, c), 20000
    ours = data_mqar.make_sequences(size, "train", np.arange(n))[:2]
    naive = loop_sequences(size, n, np.random.default_rng(0))

    def statistics(tokens, targets):
        """How often slot s asks for pair i (8, 24), and how often token v is key i or value i."""
        asked = np.argmax(tokens[:, None, 16::2] == tokens[:, :16:2, None], axis=2)  # (n, 8)
        assert (targets[np.arange(n)[:, None], 16 + 2 * asked] == tokens[:, 1:16:2]).all()
        slots = [np.bincount(asked[:, i], minlength=24) for i in range(8)]
        keys = [np.bincount(tokens[:, 2 * i], minlength=64) for i in range(8)]
        values = [np.bincount(tokens[:, 2 * i + 1], minlength=64) for i in range(8)]
        return np.stack(slots), np.stack(keys), np.stack(values)

    for a, b in zip(statistics(*ours), statistics(*naive)):
        assert ((a == 0) == (b == 0)).all() and (a > 0).mean() > 0.4
        # The standard deviation of the difference of two counts is the root of their sum.
        assert (np.abs(a - b) / np.sqrt(a + b + 1)).max() < 5


def test_each_pair_is_a_distractor_as_often_as_any_other():
    """And those that are queried are asked in the order of Zoology: stored early, asked early."""
    c = config(input_seq_len=40, num_kv_pairs=8, num_queries=3, vocab_size=64)
    size = data_mqar.TaskSize(40, 8, c)
    tokens, targets, _ = data_mqar.make_sequences(size, "train", np.arange(8000))
    labelled = np.nonzero(targets != IGNORE_INDEX)[1].reshape(8000, 3)
    asked = np.take_along_axis(tokens, labelled, axis=1)
    pair = np.argmax(tokens[:, None, :16:2] == asked[:, :, None], axis=2)  # (8000, 3), in time
    assert (np.sort(pair, axis=1)[:, 1:] > np.sort(pair, axis=1)[:, :-1]).all()
    counts = np.bincount(pair.ravel(), minlength=8)
    assert (np.abs(counts - 3000) < 5 * np.sqrt(3000)).all()
    assert (pair[:, 0] < pair[:, 2]).mean() > 0.57  # without an order, half of them


def test_tokens_of_long_values_are_any_tokens_of_values():
    c = config(input_seq_len=48, num_kv_pairs=4, value_tokens=3, vocab_size=16)
    size = data_mqar.TaskSize(48, 4, c)
    tokens, _, _ = data_mqar.make_sequences(size, "train", np.arange(4000))
    values = tokens[:, :16].reshape(4000, 4, 4)[:, :, 1:]
    for i in range(3):
        counts = np.bincount(values[:, :, i].ravel(), minlength=16)
        assert (counts[:8] == 0).all()
        assert (np.abs(counts[8:] - 2000) < 5 * np.sqrt(2000)).all()


def test_values_and_distractors_by_hand():
    """Three pairs of a key and two tokens, two of them asked: key, first token, blank."""
    c = config(input_seq_len=16, num_kv_pairs=3, num_queries=2, value_tokens=2, vocab_size=20)
    size = data_mqar.TaskSize(16, 3, c)
    for index in range(50):
        tokens, targets, _ = data_mqar.make_sequences(size, "train", np.array([index]))
        x, y = tokens[0].tolist(), targets[0].tolist()
        stored = {x[t]: x[t + 1 : t + 3] for t in (0, 3, 6)}
        assert len(stored) == 3
        for t in (9, 12):
            assert x[t + 1] == y[t] == stored[x[t]][0]
            assert y[t + 1] == stored[x[t]][1] and x[t + 2] == 0
        assert [t for t in range(16) if y[t] != IGNORE_INDEX] == [9, 10, 12, 13]


# ---- loss on all tokens --------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [{}, {"infinite_data": True}, {"value_tokens": 2}], ids=str)
def test_a_loss_on_all_tokens_asks_for_the_next_one_and_measures_answers(extra):
    sizes = dict(input_seq_len=32, num_kv_pairs=4, vocab_size=64, n_train_examples=30, **extra)
    answers = data_mqar.Data(config(**sizes))
    everything = data_mqar.Data(config(**sizes, loss_on="all"))
    for step in (0, 5):
        indices = answers.batch_indices(step, 10)
        tokens, targets, _ = answers.batch("train", step, indices)
        same_tokens, all_targets, slices = everything.batch("train", step, indices)
        assert torch.equal(tokens, same_tokens) and slices == {}
        for x, y, found in zip(tokens.tolist(), targets.tolist(), all_targets.tolist()):
            expected = [*x[1:], IGNORE_INDEX]
            for t in range(32):
                if y[t] != IGNORE_INDEX:
                    expected[t] = y[t]
            assert found == expected
    for split in ("val", "test"):
        ours, theirs = (data.batch(split, 0, range(20)) for data in (answers, everything))
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
        assert all((ours[2][name] == theirs[2][name]).all() for name in {**ours[2], **theirs[2]})


def test_uniform_without_replacement():
    u = rng.row_uniforms(rng.philox_key(3), np.arange(60000), 3)
    seen = np.bincount(rng.sample_without_replacement(u, 5) @ [25, 5, 1], minlength=125)
    seen = seen[seen > 0]
    assert len(seen) == 5 * 4 * 3 and np.abs(seen - 1000).max() < 5 * 1000**0.5


# ---- purity, splits, stages ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"infinite_data": True},
        {"infinite_data": True, "curriculum": ((2, 3),)},
        {"train_sizes": ((32, 4), (16, 2))},
        {"num_queries": 2, "value_tokens": 2, "loss_on": "all"},
    ],
    ids=str,
)
def test_a_sequence_is_a_function_of_seed_split_step_and_index(extra):
    sizes = dict(input_seq_len=32, num_kv_pairs=4, vocab_size=64)
    sizes |= dict(n_train_examples=50, n_val_examples=9, n_test_examples=9, **extra)
    data = data_mqar.Data(config(**sizes))
    whole = {step: data.batch("train", step, range(40, 60)) for step in (7, 2, 0)}
    # A second one, after other random numbers and other batches.
    torch.manual_seed(99)
    np.random.seed(5)
    again = data_mqar.Data(config(**sizes))
    again.batch("val", 0, range(3))
    for step in (0, 2, 7):
        tokens, targets, _ = whole[step]
        for indices in ([59], [41, 58, 40], range(45, 55)):
            some_tokens, some_targets, _ = again.batch("train", step, indices)
            where = np.asarray(indices) - 40
            assert torch.equal(some_tokens, tokens[where])
            assert torch.equal(some_targets, targets[where])
    test, _, _ = data.batch("test", 0, range(9))
    assert torch.equal(test[4:6], again.batch("test", 5, [4, 5])[0])
    other_seed = data_mqar.Data(config(**sizes, seed=1)).batch("train", 0, range(40, 60))[0]
    assert not torch.equal(other_seed, whole[0][0])


def test_splits_share_no_sequence_and_epochs_cover_the_set_in_new_orders():
    sizes = dict(n_train_examples=300, n_val_examples=300, n_test_examples=300)
    data = data_mqar.Data(config(input_seq_len=32, num_kv_pairs=4, vocab_size=512, **sizes))

    def sequences(split, first=0):
        tokens, _, _ = data.batch(split, 0, range(first, first + 300))
        return [row.tobytes() for row in tokens.numpy()]

    splits = {split: set(sequences(split)) for split in rng.SPLITS}
    assert all(len(found) == 300 for found in splits.values())
    assert len(set.union(*splits.values())) == 900
    first, second = sequences("train"), sequences("train", 300)
    assert set(first) == set(second) == splits["train"] and first != second
    assert data.steps_per_epoch(30) == 10
    assert data.batch_indices(0, 30) == range(0, 30)
    assert data.batch_indices(9, 30) == range(270, 300)


def shapes_of_steps(data, n_steps, batch_size):
    """Sequences and their length, for each of the first steps of training."""
    shapes = []
    for step in range(n_steps):
        tokens, _, _ = data.batch("train", step, data.batch_indices(step, batch_size))
        shapes.append(tuple(tokens.shape))
    return shapes


def test_curriculum_goes_through_its_stages_at_equal_tokens():
    curriculum = dict(curriculum=((2, 3), (4, 2)), infinite_data=True)
    data = data_mqar.Data(config(input_seq_len=64, num_kv_pairs=16, vocab_size=64, **curriculum))
    assert shapes_of_steps(data, 7, 4) == [(32, 8)] * 3 + [(16, 16)] * 2 + [(4, 64)] * 2
    assert data.batch_indices(5, 4) == range(0, 4) and data.batch_indices(6, 4) == range(4, 8)


def test_a_model_has_positions_for_a_stage_longer_than_train_sizes():
    sizes = dict(train_sizes=((32, 4),), curriculum=((16, 1),), input_seq_len=64, vocab_size=64)
    data = data_mqar.Data(config(**sizes))
    assert shapes_of_steps(data, 1, 4) == [(4, 64)] and data.seq_len == 64


def test_sizes_alternate_and_test_sizes_are_reported_apart():
    sizes = dict(train_sizes=((32, 4), (64, 8)), test_sizes=((32, 4), (128, 32)))
    data = data_mqar.Data(config(vocab_size=256, n_test_examples=5, n_val_examples=5, **sizes))
    assert shapes_of_steps(data, 3, 2) == [(8, 32), (4, 64), (8, 32)]
    groups = data.eval_groups("test")
    assert data.seq_len == 128 and [len(group) for group in groups] == [5, 5]
    tokens, _, slices = data.batch("test", 0, groups[1])
    assert tokens.shape == (5, 128)
    assert set(slices["num_kv_pairs"]) == {32} and set(slices["size"]) == {"128x32"}
    with pytest.raises(ValueError, match="one eval group"):
        data.batch("test", 0, range(3, 7))


# ---- on disk -------------------------------------------------------------------------------------

STORE = dict(num_samples=60, seq_len=48, num_kv_pairs=4, vocab_size=200, num_copies=3, seed=1)


def write(tmp_path, name="set", **changes):
    c = mqar_files.DatasetConfig(output_dir=str(tmp_path / name), **{**STORE, **changes})
    c.check()
    mqar_files.write_dataset(c, shard_rows=25)
    return tmp_path / name


def read(folder, split):
    """The rows of all files of a split."""
    import pyarrow.parquet as pq

    rows = []
    for file in sorted((folder / split).iterdir()):
        if file.suffix == ".jsonl":
            rows += map(json.loads, file.read_text().splitlines())
        else:
            rows += pq.read_table(file).to_pylist()
    return rows


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_stored_sequences_are_solved_by_a_dict_and_splits_are_apart(tmp_path, form):
    folder = write(tmp_path, output_format=form)
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata["labels_shifted"] is False and metadata["total_examples"]["train"] == 180
    rows = {split: read(folder, split) for split in ("train", "validation", "test")}
    for row in rows["train"]:
        ids, labels = row["input_ids"], row["labels"]
        assert len(ids) == len(labels) == 48 and row["attention_mask"] == [1] * 48
        seen_keys = set()
        for b in range(0, 48, 16):
            # Each copy has its own pairs: 4 keys and values, then the keys in another order.
            memory = dict(zip(ids[b : b + 8 : 2], ids[b + 1 : b + 8 : 2]))
            queries = ids[b + 8 : b + 16 : 2]
            assert len(memory) == 4 and sorted(queries) == sorted(memory)
            assert all(1 <= key < 100 <= value < 200 for key, value in memory.items())
            assert not seen_keys & set(memory)
            seen_keys |= set(memory)
            expected = [IGNORE_INDEX] * 8
            for key in queries:
                expected += [IGNORE_INDEX, memory[key]]
            assert labels[b : b + 16] == expected
    sequences = [tuple(row["input_ids"]) for split in rows for row in rows[split]]
    assert len(set(sequences)) == 180
    assert [len(files) for files in metadata["files"].values()] == [3, 3, 3]


def test_each_copy_of_the_training_set_has_its_own_order(tmp_path):
    orders = np.load(write(tmp_path) / "orders" / "train.npy")
    assert orders.shape == (3, 60) and (orders[0] != orders[1]).any()
    assert all(sorted(order) == list(range(60)) for order in orders)


def test_repeated_rows_are_those_that_training_reads_by_number(tmp_path):
    """Any reader of the parquet files finds each sequence num_copies times."""
    by_number = data_mqar.Data(config("--path", str(write(tmp_path, "numbers"))))
    folder = write(tmp_path, "rows", repeat_rows=True)
    rows = read(folder, "train")
    assert len(rows) == 180 and not (folder / "orders").exists()
    copies = collections.Counter(tuple(row["input_ids"]) for row in rows)
    assert set(copies.values()) == {3} and len(copies) == 60
    assert [row["input_ids"] for row in rows[:60]] != [row["input_ids"] for row in rows[60:120]]
    data = data_mqar.Data(config("--path", str(folder)))
    assert data.steps_per_epoch(10) == by_number.steps_per_epoch(10) == 18
    for indices in ([0, 59, 60, 179], [180, 200]):
        for found, expected in zip(
            data.batch("train", 0, indices)[:2], by_number.batch("train", 0, indices)[:2]
        ):
            assert found.equal(expected)
    assert read(folder, "test") == read(tmp_path / "numbers", "test")
    with pytest.raises(ConfigError, match="repeat_rows repeats nothing with num_copies=1"):
        write(tmp_path, "one", num_copies=1, repeat_rows=True)


def test_the_latest_pairs_are_asked_first_when_power_a_is_small():
    def first_asked(power_a):
        c = mqar_files.DatasetConfig(seq_len=64, num_kv_pairs=16, vocab_size=200, power_a=power_a)
        ids, _ = mqar_files.make_disk_sequences(c, "train", np.arange(4000))
        return np.bincount(np.argmax(ids[:, :32:2] == ids[:, 32:33], axis=1), minlength=16) / 4000

    skewed, uniform = first_asked(0.01), first_asked(1.0)
    d = np.arange(16, 0, -1.0)  # pair i comes d_i pairs before the end
    law = d**-0.99 / (d**-0.99).sum()
    assert np.abs(skewed - law).max() < 0.03 and np.abs(uniform - 1 / 16).max() < 0.02


def test_same_seed_same_bytes_and_other_sizes_share_their_sequences(tmp_path):
    a, b = write(tmp_path, "a"), write(tmp_path, "b")
    files = [file.relative_to(a) for file in a.rglob("*") if file.is_file()]
    assert len(files) == 11
    assert all((a / file).read_bytes() == (b / file).read_bytes() for file in files)
    more = write(tmp_path, "more", num_samples=100)
    assert read(more, "test")[:60] == read(a, "test")
    assert read(write(tmp_path, "c", seed=2), "test") != read(a, "test")


def test_training_reads_what_was_written(tmp_path):
    folder = write(tmp_path)
    data = data_mqar.Data(config("--path", str(folder)))
    assert (data.vocab_size, data.seq_len, data.steps_per_epoch(10)) == (200, 48, 18)
    rows = read(folder, "train")
    order = np.load(folder / "orders" / "train.npy").reshape(-1)
    tokens, targets, slices = data.batch("train", 3, [0, 61, 179, 180])
    for i, x, y in zip([0, 61, 179, 0], tokens.tolist(), targets.tolist()):
        row = rows[order[i]]
        assert x == row["input_ids"] and y == row["labels"][1:] + [IGNORE_INDEX]
    assert all(len(values) == (targets != IGNORE_INDEX).sum() for values in slices.values())
    assert data.eval_groups("test") == [range(60)]
    fewer = data_mqar.Data(config("--path", str(folder), "--n_test_examples=7"))
    assert fewer.eval_groups("test") == [range(7)]
    with pytest.raises(ConfigError, match="no effect: the data comes from"):
        config("--path", str(folder), "--num_kv_pairs", "4")
    everything = data_mqar.Data(config("--path", str(folder), "--loss_on=all"))
    _, all_targets, _ = everything.batch("train", 3, [0, 61, 179, 180])
    assert torch.equal(all_targets[:, :-1], tokens[:, 1:])
    assert torch.equal(everything.batch("test", 0, [3])[1], data.batch("test", 0, [3])[1])


def test_hugging_face_datasets_reads_it(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for form in ("parquet", "jsonl"):
        folder = write(tmp_path, form, output_format=form)
        loaded = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
        assert {split: len(rows) for split, rows in loaded.items()} == {
            "train": 60,
            "validation": 60,
            "test": 60,
        }
        assert loaded["test"][0] == read(tmp_path / form, "test")[0]


def test_pandas_and_page_checksums(tmp_path):
    import pyarrow.parquet as pq

    file = write(tmp_path) / "train" / "part-00000.parquet"
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = pandas.read_parquet(file)
    assert list(frame.columns) == ["input_ids", "labels", "attention_mask"] and len(frame) == 25
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 3] ^= 1
    file.write_bytes(raw)
    with pytest.raises(OSError):
        pq.read_table(file, page_checksum_verification=True)


def damage(file):
    raw = bytearray(file.read_bytes())
    raw[100] ^= 1
    file.write_bytes(raw)


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
@pytest.mark.parametrize("spoil", [damage, os.remove])
def test_a_damaged_or_missing_shard_is_refused(tmp_path, form, spoil):
    folder = write(tmp_path, output_format=form)
    spoil(folder / "test" / f"part-00001.{form}")
    with pytest.raises(ConfigError, match="part-00001.* is missing or damaged"):
        data_mqar.Data(config("--path", str(folder)))


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
@pytest.mark.parametrize("name", ["orders/train.npy", "metadata.json"])
def test_a_damaged_order_or_metadata_is_refused(tmp_path, form, name):
    folder = write(tmp_path, output_format=form)
    (folder / name).write_bytes(b"{")
    message = "train.npy is missing or damaged"
    if name == "metadata.json":
        message = "metadata.json is damaged, or not of this project"
    with pytest.raises(ConfigError, match=message):
        data_mqar.Data(config("--path", str(folder)))


def seal(folder, **changes):
    """Give metadata.json the checksums of its files, as a stranger could."""
    metadata = json.loads((folder / "metadata.json").read_text()) | changes
    files = [*sum(metadata["files"].values(), []), metadata["orders"]]
    for file in files:
        file["sha256"] = sha256_file(folder / file["name"])
    metadata.pop("metadata_sha256", None)
    (folder / "metadata.json").write_text(json.dumps(metadata))


def list_among_numbers(folder):
    row = {"input_ids": [1, [5], *[1] * 46], "labels": [1] * 48}
    file = folder / "train" / "part-00000.jsonl"
    file.write_text(json.dumps(row) + "\n" + "".join(file.read_text().splitlines(True)[1:]))


def very_negative(folder):
    file = folder / "train" / "part-00000.jsonl"
    row = json.loads(file.read_text().splitlines()[0])
    row["input_ids"][0] = -(2**63)
    file.write_text(json.dumps(row) + "\n" + "".join(file.read_text().splitlines(True)[1:]))


def archive_of_orders(folder):
    with open(folder / "orders" / "train.npy", "wb") as f:
        np.savez(f, a=np.zeros((1, 4)))


ODD_SETS = {  # how a stranger changed a data set, and what the sentence says
    list_among_numbers: "part-00000.jsonl holds something else than tokens",
    very_negative: "part-00000.jsonl holds something else than tokens",
    archive_of_orders: "train.npy holds no numbers of",
}


@pytest.mark.parametrize("change", ODD_SETS)
def test_odd_contents_with_the_right_checksums(tmp_path, change):
    folder = write(tmp_path, output_format="jsonl")
    change(folder)
    seal(folder)
    with pytest.raises(ConfigError, match=ODD_SETS[change]):
        data_mqar.Data(config("--path", str(folder))).batch("train", 0, [0])


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_a_number_of_rows_that_would_fill_the_memory(tmp_path, form):
    folder = write(tmp_path, output_format=form)
    metadata = json.loads((folder / "metadata.json").read_text())
    files = metadata["files"]
    for shards in files.values():
        shards[0]["rows"] = 10**10
        del shards[1:]
    seal(folder, num_samples=10**10, files=files)
    with pytest.raises(ConfigError, match="has not the 10000000000 rows of metadata.json"):
        data_mqar.Data(config("--path", str(folder)))


def test_long_rows_of_parquet_are_not_read(tmp_path):
    """A million equal tokens take a few bytes in the file."""
    folder = write(tmp_path)
    file = folder / "train" / "part-00000.parquet"
    table = pa.table({name: [[1] * 10**6] * 25 for name in ("input_ids", "labels")})
    pq.write_table(table, file)
    seal(folder)
    with pytest.raises(ConfigError, match="part-00000.parquet has rows that are not of seq_len="):
        data_mqar.Data(config("--path", str(folder)))


def test_interruption_leaves_nothing_that_looks_finished(tmp_path):
    """Not even the temporary directory."""
    flags = ["--output-dir", tmp_path / "big", "--num-samples", "2000000", "--seq-len", "64"]
    command = [sys.executable, data_mqar.__file__, *map(str, flags)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    while not any(tmp_path.iterdir()) and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.5)
    process.terminate()
    process.wait()
    assert process.returncode == 128 + 15
    assert not any(tmp_path.iterdir())


def test_writing_twice_is_refused_and_loses_nothing(tmp_path):
    folder = write(tmp_path)
    before = (folder / "metadata.json").read_bytes()
    with pytest.raises(ConfigError, match="exists already"):
        data_mqar.main(["--output-dir", str(folder), "--num-samples", "10"])
    assert (folder / "metadata.json").read_bytes() == before


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_sequences(tmp_path):
    """Peak memory of a writer of 15,000 long sequences stays near that of one of 1,500."""

    def peak(samples):
        code = [
            "import resource",
            "from nanorecall.mqar_files import DatasetConfig, write_dataset",
            f"folder = {str(tmp_path / str(samples))!r}",
            f"c = DatasetConfig(output_dir=folder, num_samples={samples}, num_copies=4)",
            "write_dataset(c)",
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)",
        ]
        command = [sys.executable, "-c", "\n".join(code)]
        folder = os.path.dirname(data_mqar.__file__)
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        return int(done.stdout) / 1024

    small, large = peak(1500), peak(15000)
    assert large < small + 80 and large < 1024


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--input_seq_len=127"], "odd"),
        (["--input_seq_len=100"], "at least 128 tokens, not 100"),
        (["--vocab_size=60"], "use at least 66"),
        (["--num_kv_pairs=0"], "at least 1"),
        (["--num_updates=40"], "num_updates=40 exceeds the 32 pairs"),
        (["--num_updates=70", "--train_sizes=[(512,64)]"], "num_updates=70 exceeds the 64 pairs"),
        (["--num_updates=20"], "32 pairs need a sequence of at least 168 tokens"),
        (["--curriculum=[(64,10)]"], "more than input_seq_len"),
        (["--test_sizes=[(128,33)]"], "test_sizes"),
        (["--train_sizes=[(64,4),(64,4)]"], "comes twice"),
        (["--curriculum=[(2,5),(32,5)]"], "comes twice"),
        (["--key_tokens=40", "--input_seq_len=4096"], "key_tokens=40 is too long"),
        (["--path=/nowhere"], "holds no data set"),
        (["--n_train_examples=1e12"], "infinite_data=1"),
        (["--power_a=-1"], "at least 0"),
        (["--num_queries=33"], "num_queries=33 exceeds the 32 pairs"),
        (["--num_queries=-1"], "at least 0"),
        (["--num_kv_pairs=40", "--num_queries=30"], "need a sequence of at least 140 tokens"),
        (["--value_tokens=2"], "32 pairs need a sequence of at least 192 tokens, not 128"),
        (["--value_tokens=0"], "value_tokens=0"),
        (["--loss_on=queries"], "choose from answers, all"),
        (["--loss_on=all", "--curriculum=[(2,9)]", "--stage_loss=0.8"], "set stage_loss=0"),
    ],
)
def test_impossible_tasks_are_refused_in_one_sentence(flags, message):
    with pytest.raises(ConfigError, match=message) as error:
        data_mqar.Data(config(*flags))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--seq-len=500", "--num-kv-pairs=16"], "nearest are 448 and 512"),
        (["--vocab-size=10", "--output-dir=x"], "too small"),
        (["--num-kv-pairs=1", "--seq-len=4", "--vocab-size=20"], "too few different rows"),
        (["--output-format=csv"], "choose from parquet, jsonl"),
        (["--num-sample=5"], "did you mean num_samples"),
        (["--num-samples=5"], "name the directory"),
        (["--value-tokens=2", "--output-dir=x"], "a data set on disk has no value_tokens"),
        (["--num-queries=2", "--output-dir=x"], "a data set on disk has no num_queries"),
    ],
)
def test_impossible_data_sets_are_refused_in_one_sentence(flags, message):
    with pytest.raises(ConfigError) as error:
        data_mqar.main(flags)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("length", "pairs", "vocab", "number", "least", "most"),
    [(8, 2, 12, "1,200", 0.99, 1), (12, 3, 20, "2,177,280", 0.01, 0.03), (32, 4, 64, "", 0, 1e-4)],
)
def test_test_sequences_that_are_trained_on_are_noted(length, pairs, vocab, number, least, most):
    """In tasks so small that there are few different sequences."""
    c = config(input_seq_len=length, num_kv_pairs=pairs, vocab_size=vocab, n_test_examples=3000)
    size = data_mqar.TaskSize(length, pairs, c)
    tokens, *_ = data_mqar.make_sequences(size, "train", np.arange(40_000))
    trained = {row.tobytes() for row in tokens}
    tested, *_ = data_mqar.make_sequences(size, "test", np.arange(3000))
    assert least <= np.mean([row.tobytes() in trained for row in tested]) <= most
    notes = data_mqar.Data(c).notes
    assert len(notes) == bool(number) and number in "".join(notes)


@pytest.mark.parametrize(
    ("flags", "number"),
    [
        (["--num_queries=1"], 4 * 3 * 5 * 4 * 2),  # keys, values, which of them is asked
        (["--value_tokens=2", "--input_seq_len=12"], 4 * 3 * 5**4 * 2),
        (["--key_tokens=2", "--input_seq_len=12"], 4 * 3 * 5 * 4 * 2),  # of 4 keys of 2 tokens
    ],
)
def test_the_number_of_different_sequences(flags, number):
    size = ["--input_seq_len=8", "--num_kv_pairs=2", "--vocab_size=10"]
    notes = data_mqar.Data(config(*size, *flags)).notes
    assert f"there are {number:,}, not" in notes[0]


def test_without_arguments_it_explains_itself(capsys):
    data_mqar.main([])
    shown = capsys.readouterr().out
    assert "--output-dir mqar_data" in shown and "labels" in shown
