"""Data files of a user's own: trained on, or refused in one sentence before training."""

import json
import sys

import pytest

import eval as evaluate
import train
from nanorecall.settings import ConfigError

pytestmark = pytest.mark.usefixtures("undrawn")

# Repeat the token before. The lines of the contract are apart, so that a test can change one.
COPY = """
from dataclasses import dataclass
import numpy as np
import torch

@dataclass
class Config:
    length: int = 8

class Data:
    def __init__(self, config):
        self.vocab_size = 16
        self.seq_len = config.length

    def steps_per_epoch(self, batch_size):
        return 4

    def batch_indices(self, step, batch_size):
        return range(step * batch_size, (step + 1) * batch_size)

    def eval_groups(self, split):
        return [range(6), range(6, 9)]

    def batch(self, split, step, indices):
        rng = np.random.default_rng([len(split), step, *indices])
        tokens = torch.from_numpy(rng.integers(0, 16, (len(indices), self.seq_len)))
        targets = tokens.clone()
        targets[:, :2] = -100
        n_labels = int((targets != -100).sum())
        return tokens, targets, {"half": np.arange(n_labels) % 2}
"""
FLAGS = ["--data=fork_copy", "--dim=16", "--n_heads=2", "--batch_size=8", "--max_steps=2"]
FLAGS += ["--log_dir=r", "--run_name=a", "--num_threads=1"]
SENTENCES = {
    "return 4": {"return 0": r"steps_per_epoch\(8\) is 0, not a whole number"},
    "self.vocab_size = 16": {
        "pass": r"fork_copy does not run \(AttributeError: .*vocab_size",
        "self.vocab_size = 8": "tokens of train are .* with this vocab_size, 0 to 7",
        "raise KeyError('x')": r"fork_copy.py:12: .* does not run \(KeyError: 'x'\)",
    },
    "[range(6), range(6, 9)]": {
        "[range(6)] if split == 'val' else []": "test has no sequences",
        "{'val': [range(6)]}[split]": r"fork_copy.py:22: .* does not run \(KeyError: 'test'\)",
    },
    "targets = tokens.clone()": {
        "targets = tokens[:, 1:]": r"tokens of train are \(8, 8\), targets \(8, 7\)",
        "targets = tokens.int()": "targets of train are a tensor .* of torch.int32",
        "targets = tokens.clone() if split != 'test' else tokens * 0 - 100": "the first 9 "
        "sequences of test have no labels",
        "targets = tokens - 1": "labels of .* are -1 to",
    },
    "self.seq_len = config.length": {"self.seq_len = 8.0": "seq_len is 8.0, not a whole number"},
    "np.arange(n_labels) % 2": {"np.zeros(1)": "slice 'half' of val has 1 values for 36 labels"},
}
CASES = []
for line, changes in SENTENCES.items():
    CASES += [(line, change, sentence) for change, sentence in changes.items()]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("fork_copy", None)  # the next test has another file of this name


def test_a_data_file_that_keeps_the_contract(here):
    (here / "fork_copy.py").write_text(COPY)
    assert train.main(FLAGS) == 0
    evaluate.main(["r/a"])
    result = json.loads((here / "r/a/eval_test.json").read_text())
    assert set(result["by_slice"]["half"]) == {"0", "1"}


def test_single_sequences_may_have_no_labels(here):
    unlabelled = "targets[0 if len(indices) > 1 else 1:][:1] = -100"
    code = COPY.replace("        n_labels =", f"        {unlabelled}\n        n_labels =")
    (here / "fork_copy.py").write_text(code)
    assert train.main(FLAGS) == 0


def test_most_sequences_may_have_no_labels(here):
    lonely = "targets[np.asarray(indices) != 8] = -100"  # the last one of val and of test
    sets = COPY.replace("        n_labels =", f"        {lonely}\n        n_labels =")
    (here / "fork_copy.py").write_text(sets.replace("range(6, 9)", "range(8, 9)"))
    assert train.main(FLAGS) == 0


def test_one_sequence_of_a_batch_may_have_all_labels(here):
    lonely = "targets[np.asarray(indices) % 32 != 31] = -100"
    sets = COPY.replace("        n_labels =", f"        {lonely}\n        n_labels =")
    (here / "fork_copy.py").write_text(sets.replace("range(6, 9)", "range(31, 32)"))
    assert train.main([*FLAGS, "--batch_size=32"]) == 0


PACKED = """
import data_synth

class Config(data_synth.Config):
    pass

class Data(data_synth.Data):
    pass
"""


def test_a_fork_of_ours_may_pack_documents(here):
    (here / "fork_copy.py").write_text(PACKED)
    packing = ["--task=qa", "--num_pairs=40", "--pack_documents=1"]
    assert train.main([*FLAGS, *packing]) == 0


@pytest.mark.parametrize("line, change, sentence", CASES)
def test_one_that_does_not_is_refused_before_training(line, change, sentence, here):
    assert COPY.count(line) == 1
    (here / "fork_copy.py").write_text(COPY.replace(line, change))
    with pytest.raises(ConfigError, match=sentence) as caught:
        train.main(FLAGS)
    assert "fork_copy.py" in str(caught.value) and "\n" not in str(caught.value)
    assert not (here / "r").exists()
