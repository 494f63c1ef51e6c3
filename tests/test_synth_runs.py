"""Runs of train.py and eval.py on the tasks of data_synth.py."""

import collections
import os
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import eval as eval_script
import train
from nanorecall import checkpoint, metrics
from nanorecall.records import read_json, read_log
from nanorecall.settings import ConfigError
from toy_facts import write_jsonl
from toys import as_flags

TINY = dict(
    data="data_synth",
    n_layers=1,
    dim=16,
    n_heads=1,
    dk=16,
    dv=16,
    batch_size=8,
    eval_interval=10,
    max_steps=20,
    n_val_examples=20,
    num_threads=1,
)


def train_tiny(folder, name, **changes):
    """Train a tiny model -> exit status."""
    return train.main(as_flags({**TINY, **changes, "log_dir": folder, "run_name": name}))


def weights(folder):
    return checkpoint.load_checkpoint(str(folder), "ckpt")["tensors"]


@pytest.mark.parametrize("model", ["gpt", "delta"])
def test_runs_with_packing_equal_runs_without(tmp_path, model, capsys):
    for name, pack_documents in (("padded", 0), ("packed", 1)):
        task = dict(task="twohop", num_entities=30, pack_documents=pack_documents)
        assert train_tiny(tmp_path, name, model=model, **task) == 0
    padded, packed = weights(tmp_path / "padded"), weights(tmp_path / "packed")
    for name in padded:
        torch.testing.assert_close(padded[name], packed[name], rtol=1e-4, atol=1e-5)
    assert "without knowledge: majority digit of the last entity" in capsys.readouterr().out


# ---- a run that is measured on one slice ---------------------------------------------------------

QA = dict(
    task="qa",
    num_pairs=8,
    buckets="(1,8)",
    max_steps=150,
    lr=1e-2,
    init_std=1,
    use_ffn=1,
    target_slice="exposures=8",
)


@pytest.fixture(scope="module")
def qa_run(tmp_path_factory):
    """A run that stores the pairs shown eight times an epoch -> its directory."""
    folder = tmp_path_factory.mktemp("qa")
    assert train_tiny(folder, "run", target_accuracy=0.9, **QA) == 0
    return folder / "run"


def test_the_best_checkpoint_is_that_of_the_slice(qa_run):
    found = []  # (accuracy of the slice, accuracy of all, step) of each evaluation
    for row in read_log(str(qa_run)):
        if row["kind"] == "eval":
            accuracy = metrics.slice_accuracy(row, "exposures=8")
            found.append((accuracy, row["accuracy"], -row["step"]))
    # Several evaluations have the whole slice. The best of these has the most of all examples.
    assert sum(accuracy == 1 for accuracy, _, _ in found) >= 2
    assert checkpoint.load_checkpoint(str(qa_run), "best")["step"] == -max(found)[2]


def test_pairs_never_shown_are_not_stored(qa_run):
    by_slice = read_json(str(qa_run / "status.json"))["test"]["by_slice"]
    heldout = by_slice["seen"]["0"]
    assert heldout["correct"] < 0.6 * heldout["labels"]


def test_the_report_has_the_slice(tmp_path, capsys):
    train_tiny(tmp_path, "run", **QA)
    printed = capsys.readouterr().out
    assert re.search(r"^exposures +8 .* 1\.0000", printed, re.M)
    assert "val accuracy of exposures=8" in printed


def test_an_unknown_slice_is_named_before_training(tmp_path):
    message = "exposures=9 is not among the slices of val: exposures=0 exposures=1"
    with pytest.raises(ConfigError, match=f"target_slice={message}"):
        train_tiny(tmp_path, "run", **{**QA, "target_slice": "exposures=9"})
    assert not (tmp_path / "run").exists()


def test_printed_examples_are_those_counted(qa_run, capsys):
    eval_script.main([str(qa_run), "--print_examples=72"])  # all of them
    form = r"prompt +'(.*)'\n +answer +'(.*)'\n +model +'(.*)'"
    examples = re.findall(form, capsys.readouterr().out)
    result = read_json(str(qa_run / "eval_test.json"))["metrics"]["exact_match"]
    assert len(examples) == result["n"]
    n_correct = 0
    for prompt, answer, output in examples:
        assert re.fullmatch(r"\d{6}:", prompt)
        n_correct += answer == output
    assert n_correct == round(result["value"] * result["n"])


def test_bits_stored_follow_from_the_losses(qa_run):
    """Six digits are 6 log2(10) bits; the loss of a pair says how many of them are missing."""
    eval_script.main([str(qa_run)])
    stored = read_json(str(qa_run / "eval_test.json"))["metrics"]["stored"]
    table = pq.read_table(qa_run / "eval_test.parquet").to_pydict()
    nats = collections.Counter()
    for example, loss, seen in zip(table["example"], table["loss"], table["seen"]):
        if seen:
            nats[example] += loss
    bits = 6 * np.log2(10) - np.array(list(nats.values())) / np.log(2)
    total = np.maximum(bits, 0).sum()
    assert len(bits) == 6
    assert stored["bits stored"]["value"] == pytest.approx(total, rel=1e-5)
    low, high = stored["bits stored"]["ci95"]
    assert low < total < high


def test_runs_on_facts_are_compared(qa_run):
    eval_script.main(["compare", str(qa_run)])
    assert (qa_run.parent / "compare.png").stat().st_size > 5000


# ---- runs on documents of your own ---------------------------------------------------------------


@pytest.fixture
def text_run(tmp_path):
    """A short run on tmp_path/t.jsonl -> its directory."""
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": f"note {i}"} for i in range(30)])
    assert train_tiny(tmp_path, "run", task="text", path=path, max_steps=4) == 0
    return tmp_path / "run"


def test_a_run_on_text_is_measured(text_run, capsys):
    """Without slices there is nothing to compare, and no figure."""
    eval_script.main([str(text_run), "--print_examples=1"])
    assert (text_run / "eval_test.json").exists() and not (text_run / "eval_test.png").exists()
    assert "model " in capsys.readouterr().out


def test_a_run_is_bound_to_its_documents(text_run, tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": f"Note {i}"} for i in range(30)])
    message = "t.jsonl is another one than .*run was trained on"
    with pytest.raises(ConfigError, match=message):
        train.main([f"--resume={text_run}", "--max_steps=8"])
    with pytest.raises(ConfigError, match=message):
        eval_script.main([str(text_run)])
    os.remove(path)
    with pytest.raises(ConfigError, match="t.jsonl does not exist, and .*run was trained on it"):
        eval_script.main([str(text_run)])


def test_documents_without_an_answer_are_not_counted_as_correct(tmp_path, capsys):
    """Of 200 lines every other one has an answer. A model that knows nothing has none correct."""
    lines = [{"text": f"{i}:{7 * i} " if i % 2 else f"note {i}"} for i in range(200)]
    path = write_jsonl(tmp_path / "x.jsonl", lines)
    settings = dict(task="text", path=path, label_mask="digits", n_val_examples=500)
    assert train_tiny(tmp_path, "run", max_steps=1, lr=1e-9, **settings) == 0
    unanswered = "without an answer, so not counted: 90 of train, 5 of val, 5 of test"
    assert unanswered in capsys.readouterr().out
    test = read_json(str(tmp_path / "run" / "status.json"))["test"]
    assert test["n_examples"] == test["all"]["n_examples"] == 100 and test["exact_match"] == 0
    eval_script.main([str(tmp_path / "run")])
    result = read_json(str(tmp_path / "run" / "eval_test.json"))["metrics"]
    assert result["exact_match"]["n"] == 100 and result["exact_match"]["value"] == 0
