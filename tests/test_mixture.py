"""mixture.py: the data set of each step, runs with a synthetic start that are resumed, mistakes."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data_mqar
import data_synth
import train
from nanorecall import checkpoint, mixture
from nanorecall.settings import ConfigError
from toys import assert_same, contents


def settings(path, start, end, weight=1.0):
    return SimpleNamespace(
        synthetic_dataset=str(path),
        synthetic_start_step=start,
        synthetic_end_step=end,
        synthetic_weight=weight,
        seed=3,
        n_epochs=10,
        max_steps=2000,
        batch_size=8,
    )


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A directory of each kind that can be mixed in."""
    folder = tmp_path_factory.mktemp("stored")
    mqar = "--num-samples 40 --seq-len 16 --num-kv-pairs 4 --vocab-size 256 --num-copies 1"
    data_mqar.main([f"--output-dir={folder / 'mqar'}", *mqar.split()])
    data_synth.main(
        ["digits", f"--output_dir={folder / 'digits'}", "--num_pairs=40", "--num_unseen=10"]
    )
    (folder / "notes.jsonl").write_text(
        "".join(json.dumps({"text": f"note {i} " * 50}) + "\n" for i in range(30))
    )
    return folder


@pytest.fixture
def main_data():
    return data_synth.Data(data_synth.Config(task="twohop", num_entities=30))


@pytest.mark.parametrize("name", ["mqar", "digits", "notes.jsonl"])
def test_window_steps_come_from_the_synthetic_data(stored, main_data, name):
    """Inside the window the synthetic data set's own steps 0, 1, ...; else the primary one's."""
    both = mixture.mix(main_data, settings(stored / name, 2, 5))
    second = both.synthetic
    assert both.vocab_size == max(259, second.vocab_size) and both.seq_len == max(
        main_data.seq_len, second.seq_len
    )
    sources = [main_data, main_data, second, second, second, main_data]
    for step, (data, own) in enumerate(zip(sources, [0, 1, 0, 1, 2, 2])):
        rows = both.batch_indices(step, 8)
        assert rows == data.batch_indices(own, 8)
        assert_same([*both.batch("train", step, rows)[:2]], [*data.batch("train", own, rows)[:2]])
    assert_same([*both.batch("val", 3, range(5))[:2]], [*main_data.batch("val", 0, range(5))[:2]])
    assert both.eval_groups("val") == main_data.eval_groups("val") and both.steps_per_epoch(
        8
    ) == main_data.steps_per_epoch(8)


def test_a_weight_shares_out_the_window(stored, main_data):
    both = mixture.mix(main_data, settings(stored / "digits", 100, 1100, 0.3))
    turns = [both.source_of_step(step) for step in range(1300)]
    seconds = [i for i, (data, _) in enumerate(turns) if data is both.synthetic]
    assert 100 <= min(seconds) < 120 and 1080 < max(seconds) < 1100
    assert len(seconds) == pytest.approx(300, abs=60)  # four standard deviations
    for data in (both.primary, both.synthetic):  # each runs through its own steps, none left out
        numbers = [number for which, number in turns if which is data]
        assert numbers == list(range(len(numbers)))
    other = settings(stored / "digits", 100, 1100, 0.3)
    other.seed = 4
    assert not np.array_equal(both.is_synthetic, mixture.mix(main_data, other).is_synthetic)


def test_a_window_may_be_for_ever_and_text_is_read_with_the_same_tokenizer(stored, tmp_path):
    from toys import tokenizer_json

    path = tokenizer_json(tmp_path, ["n o"])
    main = data_synth.Data(data_synth.Config(task="twohop", num_entities=30, tokenizer=path))
    both = mixture.mix(main, settings(stored / "notes.jsonl", 0, 10**12))
    assert len(both.is_synthetic) == 2000 and both.synthetic.tokenizer.name == path


def flags(folder, name, stored, **changes):
    toy = dict(
        data="data_synth",
        task="twohop",
        num_entities=30,
        n_val_examples=20,
        n_layers=1,
        dim=16,
        n_heads=1,
        dk=16,
        dv=16,
    )
    toy |= dict(
        batch_size=8,
        eval_interval=4,
        max_steps=20,
        log_interval=1,
        num_threads=1,
        synthetic_dataset=stored / "digits",
    )
    toy |= dict(
        synthetic_start_step=2,
        synthetic_end_step=14,
        synthetic_weight=0.5,
        log_dir=folder,
        run_name=name,
    )
    return [f"--{k}={v}" for k, v in {**toy, **changes}.items() if v is not None]


def test_a_run_with_a_synthetic_start_resumes_exactly(tmp_path, stored):
    assert train.main(flags(tmp_path, "whole", stored)) == 0
    assert train.main(flags(tmp_path, "stopped", stored, max_steps=8)) == 0
    assert train.main([f"--resume={tmp_path / 'stopped'}", "--max_steps=20"]) == 0
    weights = [contents(str(tmp_path / name))[0]["tensors"] for name in ("whole", "stopped")]
    assert_same(*weights)
    none = dict.fromkeys(
        ("synthetic_dataset", "synthetic_start_step", "synthetic_end_step", "synthetic_weight")
    )
    assert train.main(flags(tmp_path, "without", stored, **none)) == 0
    without = checkpoint.load_checkpoint(str(tmp_path / "without"), "ckpt")["tensors"]
    assert any(not torch.equal(weights[0][k], without[k]) for k in without)


def test_a_finished_run_is_measured_without_the_second_data_set(tmp_path, stored):
    copy = tmp_path / "copy"
    os.system(f"cp -r {stored / 'mqar'} {copy}")
    assert train.main(flags(tmp_path, "run", stored, synthetic_dataset=copy)) == 0
    os.system(f"rm -r {copy}")
    _, data, model, _ = train.load_run(str(tmp_path / "run"))
    assert (
        isinstance(data, data_synth.Data)
        and model(torch.zeros(1, 4, dtype=torch.long))[0].shape[-1] == 259
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"synthetic_dataset": None},
            "synthetic_start_step=2 has no effect: there is no synthetic_dataset",
        ),
        ({"synthetic_end_step": 2}, "synthetic_end_step=2 must be above synthetic_start_step=2"),
        ({"synthetic_weight": 1.5}, "synthetic_weight=1.5"),
        (
            {"synthetic_dataset": "nowhere"},
            "synthetic_dataset=nowhere: path=nowhere does not exist",
        ),
        (
            {"synthetic_start_step": 20, "synthetic_end_step": 10**12},
            "synthetic_start_step=20 lies after the last of 20 steps",
        ),
    ],
)
def test_mistakes_are_named(tmp_path, stored, changes, message):
    with pytest.raises(ConfigError, match=message):
        train.main(flags(tmp_path, "run", stored, **changes))
    assert not (tmp_path / "run").exists()
