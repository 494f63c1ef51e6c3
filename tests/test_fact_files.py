"""fact_files.py: what is measured, baselines, data sets on disk, the command line."""

import collections
import json
import os
import re

import numpy as np
import pytest

import data_synth
from data_synth import Config
from nanorecall import rng
from nanorecall.fact_files import FactDataset, guess_baselines
from nanorecall.files import sha256_file
from nanorecall.metrics import count_batch
from nanorecall.rng import IGNORE_INDEX
from nanorecall.settings import ConfigError, RunError
from toy_facts import SMALL, SPLITS, WHOLE_SPLITS, documents, small_data
from toys import as_flags, tokenizer_json

# ---- what is measured ----------------------------------------------------------------------------


def test_equally_many_of_each_group_are_measured():
    sizes = dict(num_pairs=900, num_unseen=100, n_val_examples=60, n_test_examples=0)
    data = data_synth.Data(Config(task="digits", **sizes))
    for split, known, unseen in (("val", 30, 30), ("test", 900, 50)):
        (indices,) = data.eval_groups(split)
        _, slices = data.source.read(split, indices)
        assert collections.Counter(slices["key"]) == {"known": known, "unseen": unseen}
    val = documents(data, "val")
    assert sorted(val) != val and len(set(val)) == 60


def test_memory_does_not_grow_with_the_copies():
    """The orders of two epochs are kept, and each document once, however many epochs pass."""
    data = data_synth.Data(Config(num_pairs=800))
    n = data.source.count("train")
    for epoch in range(20):
        data.batch("train", 0, range(epoch * n, epoch * n + 8))
        assert rng.epoch_permutation.cache_info().currsize <= 2
    assert len(data.source.texts) == 800


# ---- baselines -----------------------------------------------------------------------------------


def test_baselines_by_hand():
    keys = ["12", "21", "22", "11", "12"]
    values = ["11", "11", "12", "12", "11"]
    trained = np.array([True, True, True, False, False])
    # The most frequent trained digits are 1 and 1; the answers are 12 and 11.
    expected = {"majority digit": 3 / 4, "copy the key": 2 / 4}
    assert guess_baselines(keys, values, trained) == expected


def test_of_equally_frequent_digits_the_smallest_is_guessed():
    trained = np.array([True, True, False])
    for answer, accuracy in (("3", 1), ("7", 0)):
        found = guess_baselines(["1", "1", "1"], ["7", "3", answer], trained)
        assert found["majority digit"] == accuracy


def test_slices_that_are_no_numbers_or_too_long_are_refused(tmp_path):
    splits = dict.fromkeys(("train", "val", "test"), np.arange(2))
    for odd in (np.nan, np.inf):
        with pytest.raises(ConfigError, match="slice 'x' has numbers that are not finite"):
            FactDataset(Config(), "qa", ["1:2 ", "3:4 "], splits, {"x": [1.0, odd]})


def test_nan_is_no_value_of_a_slice():
    batch = {"correct": np.ones(3, bool), "loss": np.ones(3), "example": np.arange(3)}
    batch |= {"exact_match": np.ones(3, bool), "slices": {"x": np.array([1.0, np.nan, 2.0])}}
    counts = count_batch(batch)["by_slice"]["x"]
    assert {value: count["labels"] for value, count in counts.items()} == {1.0: 1, 2.0: 1}


def test_without_facts_to_compare_there_is_no_baseline():
    for trained in (np.ones(2, bool), np.zeros(2, bool)):
        assert guess_baselines(["1", "2"], ["3", "4"], trained) == {}


def test_baselines_of_random_digits_are_at_chance():
    data = data_synth.Data(Config(task="digits", num_pairs=20000, num_unseen=1000))
    chance = pytest.approx(1 / 6, abs=0.02)
    assert data.baselines == {"majority digit": chance, "copy the key": chance}


def last_answers(source, name, value):
    """The last word of each document in a slice."""
    texts = np.array(source.texts)[source.slices[name] == value]
    return [re.split("[:>]+[a-z]?", text.strip())[-1] for text in texts]


def majority_accuracy(voters, asked):
    """Accuracy per digit of the most frequent digit of each position, counted letter by letter."""
    n_correct = 0
    for position in range(len(asked[0])):
        votes = collections.Counter(answer[position] for answer in voters)
        guess = min(votes, key=lambda digit: (-votes[digit], digit))
        n_correct += sum(answer[position] == guess for answer in asked)
    return n_correct / (len(asked) * len(asked[0]))


ASKED = {
    "digits": (dict(task="digits", num_pairs=40, num_unseen=10), "key", "known", "unseen"),
    "qa": (dict(num_pairs=64, buckets=(1, 2), heldout_frac=0.5), "seen", 1, 0),
    "twohop": (
        dict(task="twohop", num_entities=30, num_relations=2, phi=1.0),
        "query",
        "trained",
        "in-distribution",
    ),
}


@pytest.mark.parametrize("task", ASKED)
def test_the_majority_digit_is_that_of_trained_answers(task):
    settings, name, trained, asked = ASKED[task]
    source = data_synth.Data(Config(**settings)).source
    voters = last_answers(source, name, trained)
    answers = last_answers(source, name, asked)
    suffix = " of the last entity" if task == "twohop" else ""
    found = source.baselines["majority digit" + suffix]
    assert found == pytest.approx(majority_accuracy(voters, answers))
    # This test would notice if the answers asked for had a vote, too.
    assert found != pytest.approx(majority_accuracy(voters + answers, answers))


# ---- on disk -------------------------------------------------------------------------------------

WRITTEN = {task: (task, {}) for task in SMALL}
WRITTEN["reverse"] = ("qa", dict(reverse_pairs="probe"))
WRITTEN["forms"] = ("qa", dict(forms=2))
WRITTEN["a form for some"] = ("qa", dict(forms=2, second_form_frac=0.5))
WRITTEN["no markers"] = ("twohop", dict(markers=0))
WRITTEN["cot"] = ("twohop", dict(num_relations=3, cot_frac=1))
N_PROBLEMS = 30  # of an epoch of hashhop


def write_data_set(folder, variant, file_format="parquet"):
    task, changes = WRITTEN[variant]
    settings = {**SMALL[task], **changes}
    if task == "hashhop":
        settings["n_train_examples"] = N_PROBLEMS
    args = [task, "--output_dir", str(folder), "--format", file_format, *as_flags(settings)]
    data_synth.main(args)
    return args


def open_data_set(folder, variant="qa", **settings):
    task, _ = WRITTEN[variant]
    return data_synth.Data(Config(task=task, path=str(folder), **settings))


def in_memory(variant):
    """-> the same data in memory, and the number of documents in an epoch."""
    task, changes = WRITTEN[variant]
    data = small_data(task, **changes)
    return data, N_PROBLEMS if task == "hashhop" else data.source.count("train")


def documents_with_slices(data, split, n):
    texts, slices = data.source.read(split, np.arange(n))
    return sorted(zip(texts, *slices.values()))


@pytest.mark.parametrize("file_format", ["parquet", "jsonl"])
@pytest.mark.parametrize("variant", WRITTEN)
def test_what_is_written_is_the_task_in_memory(tmp_path, variant, file_format):
    write_data_set(tmp_path / "a", variant, file_format)
    stored = open_data_set(tmp_path / "a", variant, **WHOLE_SPLITS)
    made, n_train = in_memory(variant)
    assert sorted(documents(stored, "train")) == sorted(documents(made, "train", range(n_train)))
    for split in ("val", "test"):
        n = made.source.count(split)
        assert documents_with_slices(stored, split, n) == documents_with_slices(made, split, n)
    assert stored.kind == made.kind and stored.baselines == made.baselines
    assert stored.source.capacity == made.source.capacity
    assert bool(stored.source.capacity) == (variant in ("qa", "digits", "forms"))
    _, targets, slices = stored.batch("test", 0, range(8))
    assert (targets != IGNORE_INDEX).any()
    assert slices.keys() == made.batch("test", 0, range(8))[2].keys()


@pytest.mark.parametrize("file_format", ["parquet", "jsonl"])
@pytest.mark.parametrize("variant", WRITTEN)
def test_training_files_are_the_first_epoch_as_pandas_reads_them(tmp_path, variant, file_format):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    write_data_set(tmp_path / "a", variant, file_format)
    path = tmp_path / "a" / "train" / f"part-00000.{file_format}"
    if file_format == "jsonl":
        frame = pandas.read_json(path, lines=True)
    else:
        frame = pandas.read_parquet(path)
    made, n_train = in_memory(variant)
    assert frame["text"].tolist() == documents(made, "train", range(n_train))


@pytest.mark.parametrize("file_format", ["parquet", "jsonl"])
@pytest.mark.parametrize("variant", SMALL)
def test_the_same_seed_writes_the_same_bytes(tmp_path, variant, file_format):
    write_data_set(tmp_path / "a", variant, file_format)
    write_data_set(tmp_path / "b", variant, file_format)
    shards = sorted((tmp_path / "a").rglob(f"*.{file_format}"))
    assert len(shards) == 3
    for shard in shards:
        twin = tmp_path / "b" / shard.relative_to(tmp_path / "a")
        assert shard.read_bytes() == twin.read_bytes()


def test_a_data_set_is_not_overwritten(tmp_path):
    args = write_data_set(tmp_path / "a", "qa")
    with pytest.raises(ConfigError, match="exists already"):
        data_synth.main(args)


@pytest.mark.parametrize("task, other", [("qa", "digits"), ("hashhop", "qa")])
def test_a_data_set_of_another_task_is_rejected(tmp_path, task, other):
    write_data_set(tmp_path / "a", task)
    with pytest.raises(ConfigError, match=f"holds task {task}; say --task {task}"):
        open_data_set(tmp_path / "a", other)


def test_a_damaged_shard_is_noticed(tmp_path):
    write_data_set(tmp_path / "a", "qa")
    path = tmp_path / "a" / "train" / "part-00000.parquet"
    whole = path.read_bytes()
    for position in (0, len(whole) // 3, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match="part-00000.parquet is missing or damaged"):
            open_data_set(tmp_path / "a")
    path.unlink()
    with pytest.raises(ConfigError, match="missing or damaged"):
        open_data_set(tmp_path / "a")


def test_damaged_or_missing_metadata_is_noticed(tmp_path):
    write_data_set(tmp_path / "a", "qa")
    (tmp_path / "a" / "metadata.json").write_text("{")
    with pytest.raises(ConfigError, match="metadata.json is damaged, or not of this project"):
        open_data_set(tmp_path / "a")
    with pytest.raises(ConfigError, match="holds no data set"):
        open_data_set(tmp_path)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ('"exposures": 0', '"exposures": null', "'exposures' needs a number or a text in each row"),
        ('"exposures": 0', '"times": 0', "its slices are not those of the rows before"),
        ('"text": "', '"text": 1, "was": "', '"text" must be a text'),
    ],
)
def test_rows_that_others_changed_are_named(tmp_path, old, new, message):
    write_data_set(tmp_path / "a", "qa", "jsonl")
    path = tmp_path / "a" / "validation" / "part-00000.jsonl"
    path.write_text(path.read_text().replace(old, new))
    file = tmp_path / "a" / "metadata.json"
    metadata = json.loads(file.read_text())
    metadata["files"]["validation"][0]["sha256"] = sha256_file(path)
    file.write_text(json.dumps(metadata))
    with pytest.raises(ConfigError, match=message):
        open_data_set(tmp_path / "a")


# ---- command line --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args, message",
    [
        ("quiz --output_dir=x", "name what to do first"),
        ("qa --task=digits", "the task is qa already"),
        ("qa --pack_documents=1", "what is written is text"),
        ("check --num_pairs=8", "there is no setting 'num_pairs'"),
        ("qa --path=x", "path=x is a data set already"),
        ("qa --num_pairs=15", "num_pairs=15 does not divide into 8 buckets; 16 does"),
        ("qa --num_digits=2 --num_pairs=800", "800 pairs need 1600 different numbers"),
        ("qa --buckets=[1] --num_pairs=1", "heldout_frac=0.1 leaves no pair of 1 to train on"),
        ("qa --buckets=[1,1]", "names a bucket twice"),
        ("qa --forms=3", "forms=3 must be between 1 and 2"),
        ("qa --forms=2 --reverse_pairs=train", "forms=2 takes no reversed pairs"),
        ("qa --second_form_frac=0.5", "forms is 1"),
        ("digits --forms=2", "only task qa uses it"),
        ("digits --buckets=[1,2]", "only task qa uses it"),
        ("digits --rule_steps=2", "rule is random"),
        ("twohop --phi=3", r"at most 0.8\d or more relations"),
        ("twohop --cot_frac=0.5", "cot_frac must be 0 or 1"),
        ("hashhop --max_bytes=60", "max_bytes=60 is too small for 2 chains of 1 hops"),
        ("hashhop --hash_len=2 --max_bytes=3000", "hash_len=2 is too short"),
        ("text", "task=text"),
        ("qa --pairs=3", "no setting 'pairs'"),
    ],
)
def test_mistakes_are_named(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        data_synth.main(args.split())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "flags, name",
    [
        ("qa --num_pairs=80", "qa-80-pairs"),
        ("digits --rule=selfindex", "digits-2000-selfindex"),
        ("twohop --num_relations=3 --phi=1.5", "twohop-100x3-phi1.5"),
        ("hashhop --hops=[1,2]", "hashhop-1-2-256"),
    ],
)
def test_a_data_set_is_named_by_its_settings(flags, name):
    _, config = data_synth.parse(flags.split())
    assert config.output_dir == name


def test_a_command_line_is_read_without_running_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert data_synth.parse([]) == ("", None)
    command, config = data_synth.parse(["qa", "--num_pairs=80"])
    assert command == "qa" and config.num_pairs == 80
    command, config = data_synth.parse(["check", "--tokenizer=x.json"])
    assert command == "check" and config.tokenizer == "x.json"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "task, setting, value",
    [("hashhop", "max_bytes", 60), ("qa", "num_pairs", 15), ("twohop", "phi", 3)],
)
def test_the_advice_of_a_refusal_works(task, setting, value, tmp_path):
    args = [task, f"--output_dir={tmp_path / 'a'}"]
    args += [f"--n_{split}_examples=3" for split in SPLITS if task == "hashhop"]
    for _ in range(5):  # each number of hops needs its own size, so it may take several times
        try:
            data_synth.main([*args, f"--{setting}={value}"])
            break
        except ConfigError as e:
            advice = re.search(r"(?:use at least|use at most|buckets;) ([\d.]+)", str(e))
            value = advice[1]
    assert os.path.isdir(tmp_path / "a")


def test_help_lists_the_settings(capsys):
    with pytest.raises(SystemExit, match="0"):
        data_synth.main(["qa", "--help"])
    assert "--num_pairs=2000" in capsys.readouterr().out


def test_check_finds_the_masks_of_bytes_exact(capsys):
    data_synth.main(["check"])
    assert capsys.readouterr().out.count("exact") == 4


def test_check_says_why_a_tokenizer_does_not_fit(tmp_path, capsys):
    path = tokenizer_json(tmp_path, ["1 2"])
    with pytest.raises(RunError, match="masks of digits, qa, twohop would not be exact"):
        data_synth.main(["check", f"--tokenizer={path}"])
    assert "digits are merged" in capsys.readouterr().out
