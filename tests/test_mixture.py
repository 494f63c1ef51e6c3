"""mixture.py: the data set of each step, runs with a synthetic start that are resumed, mistakes."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data_mqar
import data_synth
import train
from nanorecall import checkpoint, mixture
from nanorecall.files import dataset_sha256
from nanorecall.records import read_json, write_json
from nanorecall.settings import ConfigError
from toy_facts import small_data, write_jsonl
from toys import as_flags, assert_same, contents, tokenizer_json

# That a run draws its curves is tested in test_progress.py.
pytestmark = pytest.mark.usefixtures("undrawn")


def settings(path, start, end, weight=1.0, seed=3):
    return SimpleNamespace(
        synthetic_dataset=str(path),
        synthetic_start_step=start,
        synthetic_end_step=end,
        synthetic_weight=weight,
        seed=seed,
        n_epochs=10,
        max_steps=2000,
        batch_size=8,
    )


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A directory of each kind that can be mixed in."""
    folder = tmp_path_factory.mktemp("stored")
    sizes = "--num-samples 40 --seq-len 16 --num-kv-pairs 4 --vocab-size 256 --num-copies 1"
    data_mqar.main([f"--output-dir={folder / 'mqar'}", *sizes.split()])
    sizes = ["--num_pairs=40", "--num_unseen=10"]
    data_synth.main(["digits", f"--output_dir={folder / 'digits'}", *sizes])
    write_jsonl(folder / "notes.jsonl", [{"text": f"note {i} " * 50} for i in range(30)])
    return folder


@pytest.fixture
def primary():
    return small_data("twohop")


# ---- which step takes which data set -------------------------------------------------------------


@pytest.mark.parametrize("name", ["mqar", "digits", "notes.jsonl"])
def test_window_steps_come_from_the_synthetic_data(stored, primary, name):
    """Inside the window the synthetic data set's own steps 0, 1, ...; else the primary one's."""
    both = mixture.mix(primary, settings(stored / name, 2, 5))
    synthetic = both.synthetic
    sources = [primary, primary, synthetic, synthetic, synthetic, primary]
    own_steps = [0, 1, 0, 1, 2, 2]
    for step, (data, own_step) in enumerate(zip(sources, own_steps)):
        indices = both.batch_indices(step, 8)
        assert indices == data.batch_indices(own_step, 8)
        mixed, own = both.batch("train", step, indices), data.batch("train", own_step, indices)
        assert_same(mixed[:2], own[:2])


@pytest.mark.parametrize("name", ["mqar", "digits", "notes.jsonl"])
def test_a_model_has_room_for_both_data_sets(stored, primary, name):
    both = mixture.mix(primary, settings(stored / name, 2, 5))
    assert both.vocab_size == max(primary.vocab_size, both.synthetic.vocab_size) == 259
    assert both.seq_len == max(primary.seq_len, both.synthetic.seq_len)


def test_validation_and_epochs_are_those_of_the_primary_data(stored, primary):
    both = mixture.mix(primary, settings(stored / "digits", 2, 5))
    mixed, own = both.batch("val", 3, range(5)), primary.batch("val", 0, range(5))
    assert_same(mixed[:2], own[:2])
    assert both.eval_groups("val") == primary.eval_groups("val")
    assert both.steps_per_epoch(8) == primary.steps_per_epoch(8)


def test_the_weight_is_the_fraction_of_synthetic_steps(stored, primary):
    both = mixture.mix(primary, settings(stored / "digits", 100, 1100, weight=0.3))
    own_steps = {both.primary: [], both.synthetic: []}
    synthetic_steps = []
    for step in range(1300):
        data, own_step = both.source_of_step(step)
        own_steps[data].append(own_step)
        if data is both.synthetic:
            synthetic_steps.append(step)
    assert 100 <= min(synthetic_steps) < 120 and 1080 < max(synthetic_steps) < 1100
    assert len(synthetic_steps) == pytest.approx(300, abs=60)  # four standard deviations
    for numbers in own_steps.values():  # each data set goes through all of its own steps
        assert numbers == list(range(len(numbers)))


def test_the_synthetic_steps_depend_on_the_seed(stored, primary):
    mixtures = []
    for seed in (3, 4):
        c = settings(stored / "digits", 100, 1100, weight=0.3, seed=seed)
        mixtures.append(mixture.mix(primary, c))
    assert not np.array_equal(mixtures[0].is_synthetic, mixtures[1].is_synthetic)


def test_a_window_may_have_no_end(stored, primary):
    both = mixture.mix(primary, settings(stored / "digits", 0, 10**12))
    assert len(both.is_synthetic) == 2000  # the steps of the run


def test_text_is_read_with_the_tokenizer_of_the_primary_data(stored, tmp_path):
    path = tokenizer_json(tmp_path, ["n o"])
    primary = small_data("twohop", tokenizer=path)
    both = mixture.mix(primary, settings(stored / "notes.jsonl", 0, 5))
    assert both.synthetic.tokenizer.name == path


# ---- runs ----------------------------------------------------------------------------------------

WINDOW = dict(synthetic_start_step=2, synthetic_end_step=14, synthetic_weight=0.5)
RUN = dict(
    data="data_synth",
    task="twohop",
    num_entities=30,
    n_val_examples=20,
    n_layers=1,
    dim=16,
    n_heads=1,
    dk=16,
    dv=16,
    batch_size=8,
    eval_interval=4,
    max_steps=20,
    log_interval=1,
    num_threads=1,
)


def flags(folder, name, dataset, **changes):
    """The command line of a run that mixes in a data set; None: none."""
    mixed = dict(synthetic_dataset=dataset, **WINDOW)
    return as_flags({**RUN, **mixed, "log_dir": folder, "run_name": name, **changes})


def test_a_run_with_a_synthetic_start_resumes_exactly(tmp_path, stored):
    dataset = stored / "digits"
    assert train.main(flags(tmp_path, "whole", dataset)) == 0
    assert train.main(flags(tmp_path, "stopped", dataset, max_steps=8)) == 0
    assert train.main([f"--resume={tmp_path / 'stopped'}", "--max_steps=20"]) == 0
    whole, _ = contents(str(tmp_path / "whole"))
    resumed, _ = contents(str(tmp_path / "stopped"))
    assert_same(whole["tensors"], resumed["tensors"])


def test_a_file_beside_a_synthetic_data_set_changes_nothing(tmp_path, stored):
    """Who reads it compares its files with metadata.json. Other documents count as a whole."""
    for name in ("digits", "notes"):
        dataset = tmp_path / name
        if name == "digits":
            shutil.copytree(stored / name, dataset)
        else:
            dataset.mkdir()
            shutil.copy(stored / "notes.jsonl", dataset)
        assert train.main(flags(tmp_path, f"with_{name}", dataset, max_steps=8)) == 0
        resume = [f"--resume={tmp_path / f'with_{name}'}", "--max_steps=9"]
        if name == "digits":
            (dataset / "README.md").write_text("ten digits\n")
            assert train.main(resume) == 0
            config = tmp_path / "with_digits" / "config.json"  # as an older run recorded it
            recorded = read_json(config)
            recorded["data_sha256"] = {"synthetic_dataset": dataset_sha256(dataset)}
            write_json(config, recorded)
            assert train.main([*resume[:1], "--max_steps=10"]) == 0
            (dataset / "metadata.json").write_text('{"dataset_type": "digits"}')
        else:
            write_jsonl(dataset / "more.jsonl", [{"text": "another note"}])
        with pytest.raises(ConfigError, match="is another one than"):
            train.main(resume)


def test_a_synthetic_start_changes_the_weights(tmp_path, stored):
    assert train.main(flags(tmp_path, "mixed", stored / "digits")) == 0
    assert train.main(flags(tmp_path, "plain", None, **dict.fromkeys(WINDOW))) == 0
    mixed = checkpoint.load_checkpoint(str(tmp_path / "mixed"), "ckpt")["tensors"]
    plain = checkpoint.load_checkpoint(str(tmp_path / "plain"), "ckpt")["tensors"]
    assert any(not torch.equal(mixed[name], plain[name]) for name in plain)


def test_a_finished_run_is_measured_without_the_synthetic_data(tmp_path, stored):
    dataset = tmp_path / "mqar"
    shutil.copytree(stored / "mqar", dataset)
    assert train.main(flags(tmp_path, "run", dataset)) == 0
    shutil.rmtree(dataset)
    _, data, model, _ = train.load_run(str(tmp_path / "run"))
    assert isinstance(data, data_synth.Data)
    logits, _ = model(torch.zeros(1, 4, dtype=torch.long))
    assert logits.shape[-1] == 259


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"synthetic_dataset": None},
            "synthetic_start_step=2, .*weight=0.5 have no effect: there is no synthetic_dataset",
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
        train.main(flags(tmp_path, "run", stored / "digits", **changes))
    assert not (tmp_path / "run").exists()
