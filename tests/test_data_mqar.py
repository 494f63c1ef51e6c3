"""data_mqar.py against a solver that only has a dict, a loop with the same law, a damaged disk."""

import doctest
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import data_mqar as D
from naive import loop_sequences
from nanorecall import mqar_files as S
from nanorecall import rng
from nanorecall.settings import ConfigError, build_config, split_argv

IGNORE = D.IGNORE_INDEX


def config(*flags, **values):
    c = D.Config(**values) if values else build_config(D.Config, split_argv(list(flags))[1])
    c.check()
    return c


def test_doctests():
    assert doctest.testmod(D).failed == 0


# ---- the law -------------------------------------------------------------------------------------


def solve(tokens, size, alphabet):
    """Read a sequence with a dict: yield (position of the key's last token, value) of every query.

    Knows no generator. alphabet: the tokens that its keys are made of.
    """
    c, L = size.config, len(tokens)
    half, width = c.vocab_size // 2, c.key_tokens
    memory, t = {}, 0
    while (
        t < size.storage_len
    ):  # a value token that follows a key closes a pair; anything else is noise
        key = tuple(tokens[t : t + width])
        is_key = (
            all(1 <= x < half for x in key)
            and t + width < size.storage_len
            and tokens[t + width] >= half
        )
        if is_key and set(key) <= alphabet:
            memory[key] = tokens[t + width]
            t += width + 1
        else:
            t += 1
    while t + width <= L:
        key = tuple(tokens[t : t + width])
        if key in memory:
            yield t + width - 1, memory[key]
            t += width
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
]


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_a_dict_gives_every_label_and_no_other(task):
    c = config(**task)
    size = D.TaskSize(c.input_seq_len, c.num_kv_pairs, c)
    tokens, targets, slices = D.make_sequences(size, "train", np.arange(300))
    assert len(slices["distance"]) == (targets != IGNORE).sum() == 300 * c.num_kv_pairs
    for x, y in zip(tokens.tolist(), targets.tolist()):
        queried = [x[t - c.key_tokens + 1 : t + 1] for t in range(len(x)) if y[t] != IGNORE]
        alphabet = {token for key in queried for token in key}
        expected = [IGNORE] * len(x)
        for t, value in solve(x, size, alphabet):
            expected[t] = value
        assert y == expected
        assert len({tuple(k) for k in queried}) == c.num_kv_pairs  # every key once
        assert max(x) < c.vocab_size and min(x) >= 0


def test_labels_moved_by_one_are_wrong():
    """The check above is not blind: what it accepts is lost when labels move."""
    c = config(input_seq_len=32, num_kv_pairs=4, vocab_size=64)
    size = D.TaskSize(32, 4, c)
    tokens, targets, _ = D.make_sequences(size, "train", np.arange(1))
    alphabet = set(tokens[0][targets[0] != IGNORE].tolist())
    expected = np.full(32, IGNORE)
    for t, value in solve(tokens[0].tolist(), size, alphabet):
        expected[t] = value
    assert (expected == targets[0]).all() and (expected != np.roll(targets[0], 1)).any()


def read_slices(tokens, targets, size):
    """For each label of a row, as a person would read it: how far back its key was stored last, and
    how often it was stored."""
    c, width, found = size.config, size.config.key_tokens, []
    for label in (t for t in range(len(tokens)) if targets[t] != IGNORE):
        key = tokens[label - width + 1 : label + 1]
        stored = [
            t
            for t in range(size.storage_len)
            if tokens[t : t + width] == key
            and t + width < size.storage_len
            and tokens[t + width] >= c.vocab_size // 2
        ]
        assert tokens[stored[-1] + width] == targets[label]
        found.append((label - width + 1 - stored[-1], len(stored)))
    return found


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_the_slices_are_what_a_person_would_count(task):
    c = config(**task)
    size = D.TaskSize(c.input_seq_len, c.num_kv_pairs, c)
    tokens, targets, slices = D.make_sequences(size, "test", np.arange(60))
    found = [
        pair for x, y in zip(tokens.tolist(), targets.tolist()) for pair in read_slices(x, y, size)
    ]
    powers = [1 << (distance.bit_length() - 1) for distance, _ in found]
    assert slices["distance"].tolist() == powers and len(set(powers)) > 2
    if c.num_updates:
        assert slices["updated"].tolist() == [times - 1 for _, times in found]
        assert slices["updated"].sum() == 60 * c.num_updates
    else:
        assert "updated" not in slices


def test_the_slices_of_a_row_by_hand():
    """Two pairs and one of them again, in six tokens, then asked at 6 and 8. From 6 back to 4 are 2
    tokens; from 8 back to 2 are 6, which count as 4."""
    c = config(input_seq_len=10, num_kv_pairs=2, num_updates=1, vocab_size=10)
    for row in range(50):
        tokens, targets, slices = D.make_sequences(
            D.TaskSize(10, 2, c), "train", np.arange(row, row + 1)
        )
        x = tokens[0].tolist()
        last = {x[0]: 0, x[2]: 2} | {x[4]: 4}
        asked = [t for t in range(10) if targets[0, t] != IGNORE]
        assert asked == [6, 8] and x[4] in (x[0], x[2])
        assert slices["updated"].tolist() == [int(x[t] == x[4]) for t in asked]
        assert slices["distance"].tolist() == [
            {2: 2, 4: 4, 6: 4, 8: 8}[t - last[x[t]]] for t in asked
        ]


@pytest.mark.parametrize(
    "task",
    [dict(max_noise=3), dict(random_non_queries=True), dict(max_noise=2, random_non_queries=True)],
    ids=str,
)
def test_noise_is_any_token_but_the_keys_of_its_row(task):
    c = config(input_seq_len=96, num_kv_pairs=6, vocab_size=32, **task)
    size, R = D.TaskSize(96, 6, c), 4000
    tokens, targets, _ = D.make_sequences(size, "train", np.arange(R))
    seen, possible = np.zeros(32), np.zeros(32)
    for x, y in zip(tokens.tolist(), targets.tolist()):
        keys = {x[t] for t in range(96) if y[t] != IGNORE}
        used = {t for t in range(96) if x[t] in keys}
        used |= {t + 1 for t in used if t < size.storage_len}
        rest = [t for t in range(96) if t not in used]
        noise = [
            x[t]
            for t in rest
            if (t < size.storage_len if c.max_noise else False)
            or (t >= size.storage_len and c.random_non_queries)
        ]
        assert [x.count(key) for key in keys] == [2] * 6  # stored and asked, and nowhere else
        assert all(x[t] == 0 for t in rest if t >= size.storage_len) or c.random_non_queries
        seen += np.bincount(noise, minlength=32)
        possible += [0 if token in keys else len(noise) / 26 for token in range(32)]
    assert possible.min() > 1000  # 0 and values, too: each as often as any other
    assert (np.abs(seen - possible) / np.sqrt(possible)).max() < 5


def test_gaps_are_of_every_length_up_to_the_longest():
    """Tokens of noise after a stored pair: 0, 1, 2 and 3 as often as each other."""
    size, R = (
        D.TaskSize(64, 6, config(input_seq_len=64, num_kv_pairs=6, vocab_size=32, max_noise=3)),
        2000,
    )
    tokens, targets, _ = D.make_sequences(size, "train", np.arange(R))
    gaps = []
    for x, y in zip(tokens.tolist(), targets.tolist()):
        keys = {x[t] for t in range(64) if y[t] != IGNORE}
        stored = [t for t in range(size.storage_len) if x[t] in keys]
        gaps += [later - t - 2 for t, later in zip(stored, stored[1:])]  # a key and its value
    counts = np.bincount(gaps, minlength=4)
    assert len(counts) == 4 and (np.abs(counts - 2500) < 5 * np.sqrt(2500)).all()


@pytest.mark.parametrize("power_a", [0.01, 1.0])
def test_the_law_is_that_of_a_per_row_loop(power_a):
    c = config(input_seq_len=64, num_kv_pairs=8, vocab_size=64, power_a=power_a)
    size, R = D.TaskSize(64, 8, c), 20000
    ours = D.make_sequences(size, "train", np.arange(R))[:2]
    theirs = loop_sequences(size, R, np.random.default_rng(0))

    def statistics(tokens, targets):
        """How often slot s asks for pair i (8, 24), and how often token v is key i or value i."""
        r = np.arange(R)[:, None]
        asked = np.argmax(tokens[:, None, 16::2] == tokens[:, :16:2, None], axis=2)  # (R, 8)
        slot = np.stack([np.bincount(asked[:, i], minlength=24) for i in range(8)])
        key, value = (
            np.stack([np.bincount(tokens[:, j + 2 * i], minlength=64) for i in range(8)])
            for j in (0, 1)
        )
        assert (targets[r, 16 + 2 * asked] == tokens[:, 1:16:2]).all()
        return slot, key, value

    for a, b in zip(statistics(*ours), statistics(*theirs)):
        assert ((a == 0) == (b == 0)).all() and (a > 0).mean() > 0.4
        assert (
            np.abs(a - b) / np.sqrt(a + b + 1)
        ).max() < 5  # in deviations of a difference of two counts


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
    ],
    ids=str,
)
def test_a_row_is_a_function_of_seed_split_step_and_row(extra):
    c = dict(
        input_seq_len=32,
        num_kv_pairs=4,
        vocab_size=64,
        n_train_examples=50,
        n_val_examples=9,
        n_test_examples=9,
    )
    data = D.Data(config(**c, **extra))
    whole = {s: data.batch("train", s, range(40, 60)) for s in (7, 2, 0)}
    torch.manual_seed(99)
    np.random.seed(5)
    other = D.Data(config(**c, **extra))
    other.batch("val", 0, range(3))
    for step in (0, 2, 7):
        for rows in ([59], [41, 58, 40], range(45, 55)):
            for a, b in zip(other.batch("train", step, rows)[:2], whole[step][:2]):
                assert torch.equal(a, b[np.asarray(rows) - 40])
    assert torch.equal(data.batch("test", 0, range(9))[0][4:6], other.batch("test", 5, [4, 5])[0])
    changed = D.Data(config(**c, **extra, seed=1)).batch("train", 0, range(40, 60))[0]
    assert not torch.equal(changed, whole[0][0])


def test_splits_share_no_sequence_and_epochs_cover_the_set_in_new_orders():
    c = config(
        input_seq_len=32,
        num_kv_pairs=4,
        vocab_size=512,
        n_train_examples=300,
        n_val_examples=300,
        n_test_examples=300,
    )
    data = D.Data(c)
    sets = {s: {r.tobytes() for r in data.batch(s, 0, range(300))[0].numpy()} for s in rng.SPLITS}
    assert all(len(rows) == 300 for rows in sets.values()) and len(set.union(*sets.values())) == 900
    first, second = (data.batch("train", 0, range(a, a + 300))[0].numpy() for a in (0, 300))
    assert {r.tobytes() for r in first} == {r.tobytes() for r in second} == sets["train"]
    assert (first != second).any()
    steps = data.steps_per_epoch(30)
    assert steps == 10 and [data.batch_indices(s, 30) for s in (0, 9)] == [
        range(0, 30),
        range(270, 300),
    ]


def test_curriculum_goes_through_its_stages_at_equal_tokens():
    c = config(
        input_seq_len=64, num_kv_pairs=16, vocab_size=64, curriculum=((2, 3), (4, 2)), infinite_data=True
    )
    data = D.Data(c)
    shapes = [tuple(data.batch("train", s, data.batch_indices(s, 4))[0].shape) for s in range(7)]
    assert shapes == [(32, 8)] * 3 + [(16, 16)] * 2 + [(4, 64)] * 2
    assert data.batch_indices(5, 4) == range(0, 4) and data.batch_indices(6, 4) == range(4, 8)


def test_sizes_take_turns_and_test_sizes_are_reported_apart():
    c = config(
        vocab_size=256,
        train_sizes=((32, 4), (64, 8)),
        test_sizes=((32, 4), (128, 32)),
        n_test_examples=5,
        n_val_examples=5,
    )
    data = D.Data(c)
    assert [data.batch("train", s, data.batch_indices(s, 2))[0].shape for s in range(3)] == [
        (8, 32),
        (4, 64),
        (8, 32),
    ]
    assert data.seq_len == 128 and [len(s) for s in data.eval_groups("test")] == [5, 5]
    tokens, _, slices = data.batch("test", 0, data.eval_groups("test")[1])
    assert (
        tokens.shape == (5, 128)
        and set(slices["num_kv_pairs"]) == {32}
        and set(slices["size"]) == {"128x32"}
    )
    with pytest.raises(ValueError, match="one eval group"):
        data.batch("test", 0, range(3, 7))


# ---- on disk -------------------------------------------------------------------------------------

STORE = dict(num_samples=60, seq_len=48, num_kv_pairs=4, vocab_size=200, num_copies=3, seed=1)


def write(tmp_path, name="set", **changes):
    c = S.DatasetConfig(output_dir=str(tmp_path / name), **{**STORE, **changes})
    c.check()
    S.write_dataset(c, shard_rows=25)
    return tmp_path / name


def read(folder, split):
    import pyarrow.parquet as pq

    files = sorted((folder / split).iterdir())
    if files[0].suffix == ".jsonl":
        return [json.loads(line) for f in files for line in open(f)]
    return [row for f in files for row in pq.read_table(f).to_pylist()]


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_stored_rows_are_solved_by_a_dict_and_splits_are_apart(tmp_path, form):
    folder = write(tmp_path, output_format=form)
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata["labels_shifted"] is False and metadata["total_examples"]["train"] == 180
    rows = {split: read(folder, split) for split in ("train", "validation", "test")}
    for row in rows["train"]:
        ids, labels = row["input_ids"], row["labels"]
        assert len(ids) == len(labels) == len(row["attention_mask"]) == 48 and set(
            row["attention_mask"]
        ) == {1}
        seen_keys = set()
        for b in range(0, 48, 16):
            memory = dict(zip(ids[b : b + 8 : 2], ids[b + 1 : b + 8 : 2]))
            assert (
                len(memory) == 4
                and not seen_keys & set(memory)
                and all(1 <= k < 100 <= v < 200 for k, v in memory.items())
            )
            seen_keys |= set(memory)
            assert sorted(ids[b + 8 : b + 16 : 2]) == sorted(memory)
            expected = [IGNORE] * 8 + [
                x for key in ids[b + 8 : b + 16 : 2] for x in (IGNORE, memory[key])
            ]
            assert labels[b : b + 16] == expected
    different = {tuple(r["input_ids"]) for split in rows.values() for r in split}
    assert len(different) == 180
    assert [len(files) for files in metadata["files"].values()] == [3, 3, 3]
    orders = np.load(folder / "orders" / "train.npy")
    assert (
        orders.shape == (3, 60)
        and all(sorted(o) == list(range(60)) for o in orders)
        and (orders[0] != orders[1]).any()
    )


def test_the_latest_pairs_are_asked_first_when_power_a_is_small():
    def first_asked(power_a):
        c = S.DatasetConfig(seq_len=64, num_kv_pairs=16, vocab_size=200, power_a=power_a)
        ids, _ = S.make_disk_sequences(c, "train", np.arange(4000))
        return np.bincount(np.argmax(ids[:, :32:2] == ids[:, 32:33], axis=1), minlength=16) / 4000

    skewed, uniform = first_asked(0.01), first_asked(1.0)
    d = np.arange(16, 0, -1.0)  # pair i stands d_i places before the end
    law = d**-0.99 / (d**-0.99).sum()
    assert np.abs(skewed - law).max() < 0.03 and np.abs(uniform - 1 / 16).max() < 0.02


def test_same_seed_same_bytes_and_other_sizes_share_their_rows(tmp_path):
    a, b, more = (
        write(tmp_path, "a"),
        write(tmp_path, "b"),
        write(tmp_path, "more", num_samples=100),
    )
    files = [f.relative_to(a) for f in a.rglob("*") if f.is_file()]
    assert len(files) == 11 and all((a / f).read_bytes() == (b / f).read_bytes() for f in files)
    assert read(more, "test")[:60] == read(a, "test")
    assert read(write(tmp_path, "c", seed=2), "test") != read(a, "test")


def test_training_reads_what_was_written(tmp_path):
    folder = write(tmp_path)
    data = D.Data(config("--path", str(folder)))
    assert (data.vocab_size, data.seq_len, data.steps_per_epoch(10)) == (200, 48, 18)
    rows = read(folder, "train")
    order = np.load(folder / "orders" / "train.npy").reshape(-1)
    tokens, targets, slices = data.batch("train", 3, [0, 61, 179, 180])
    for r, x, y in zip([0, 61, 179, 0], tokens.tolist(), targets.tolist()):
        assert x == rows[order[r]]["input_ids"] and y == rows[order[r]]["labels"][1:] + [IGNORE]
    assert all(len(v) == (targets != IGNORE).sum() for v in slices.values())
    assert data.eval_groups("test") == [range(60)]
    assert D.Data(config("--path", str(folder), "--n_test_examples=7")).eval_groups("test") == [
        range(7)
    ]
    with pytest.raises(ConfigError, match="no effect: the data comes from"):
        config("--path", str(folder), "--num_kv_pairs", "4")


def test_hugging_face_datasets_reads_it(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for form in ("parquet", "jsonl"):
        loaded = datasets.load_dataset(
            str(write(tmp_path, form, output_format=form)), cache_dir=str(tmp_path / "cache")
        )
        assert {k: len(v) for k, v in loaded.items()} == {"train": 60, "validation": 60, "test": 60}
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


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_a_damaged_or_missing_shard_is_refused(tmp_path, form):
    folder = write(tmp_path, output_format=form)
    file = folder / "test" / f"part-00001.{form}"
    raw = bytearray(file.read_bytes())
    raw[100] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ConfigError, match="part-00001.* is missing or damaged"):
        D.Data(config("--path", str(folder))).batch("test", 0, [0])
    (folder / "orders" / "train.npy").write_bytes(b"x")
    with pytest.raises(ConfigError, match="train.npy is missing or damaged"):
        D.Data(config("--path", str(folder)))
    (folder / "orders" / "train.npy").unlink()
    folder = write(tmp_path, "other", output_format=form)
    file = folder / "test" / f"part-00001.{form}"
    file.unlink()
    with pytest.raises(ConfigError, match="missing or damaged"):
        D.Data(config("--path", str(folder))).batch("test", 0, [0])
    (folder / "metadata.json").write_text("{")
    with pytest.raises(ConfigError, match="metadata.json is damaged, or not of this project"):
        D.Data(config("--path", str(folder)))


def test_interruption_leaves_nothing_that_looks_finished(tmp_path):
    flags = ["--output-dir", tmp_path / "big", "--num-samples", "2000000", "--seq-len", "64"]
    process = subprocess.Popen(
        [sys.executable, D.__file__, *map(str, flags)], stderr=subprocess.PIPE
    )
    while not any(tmp_path.iterdir()) and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.5)
    process.terminate()
    process.wait()
    assert not (tmp_path / "big").exists()
    assert process.returncode == 128 + 15 and not any(
        tmp_path.iterdir()
    )  # not even the temporary directory


def test_writing_twice_is_refused_and_loses_nothing(tmp_path, script):
    folder = write(tmp_path)
    before = (folder / "metadata.json").read_bytes()
    done = script("data_mqar.py", "--output-dir", folder, "--num-samples", "10")
    assert done.returncode == 2 and "exists already" in done.stderr and done.stderr.count("\n") == 1
    assert (folder / "metadata.json").read_bytes() == before


def test_memory_does_not_grow_with_the_number_of_rows(tmp_path):
    """Peak memory of a writer of 15,000 long rows stays near that of one of 1,500."""

    def peak(samples):
        code = [
            "import resource",
            "from nanorecall.mqar_files import DatasetConfig, write_dataset",
            f"folder = {str(tmp_path / str(samples))!r}",
            f"c = DatasetConfig(output_dir=folder, num_samples={samples}, num_copies=4)",
            "write_dataset(c)",
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)",
        ]
        words = [sys.executable, "-c", "\n".join(code)]
        folder = os.path.dirname(D.__file__)
        done = subprocess.run(words, capture_output=True, text=True, cwd=folder)
        return int(done.stdout) / 1024

    small, large = peak(1500), peak(15000)
    assert large < small + 80 and large < 1024


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, words",
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
    ],
)
def test_impossible_tasks_are_refused_in_one_sentence(flags, words):
    with pytest.raises(ConfigError, match=words) as error:
        D.Data(config(*flags))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--seq-len=500", "--num-kv-pairs=16"], "nearest are 448 and 512"),
        (["--vocab-size=10", "--output-dir=x"], "too small"),
        (["--num-kv-pairs=1", "--seq-len=4", "--vocab-size=20"], "too few different rows"),
        (["--output-format=csv"], "choose from parquet, jsonl"),
        (["--num-sample=5"], "did you mean num_samples"),
        (["--num-samples=5"], "name the directory"),
    ],
)
def test_impossible_data_sets_are_refused_in_one_sentence(flags, words, script):
    done = script("data_mqar.py", *flags)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1


def test_without_arguments_it_explains_itself(script):
    done = script("data_mqar.py")
    assert (
        done.returncode == 0 and "--output-dir mqar_data" in done.stdout and "labels" in done.stdout
    )
