"""What train.py expects of any model file and any data file; a fork can check its own:

python -m pytest tests/test_contract.py --model=my_model --data=my_data
"""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval as evaluate
import train
from analysis.card_checks import decoding
from nanorecall.build import MODELS, build_model, build_model_config, resolve_model
from nanorecall.rng import IGNORE_INDEX
from nanorecall.settings import ConfigError, Setting, build_config
from nanorecall.source_files import import_source_file
from toys import as_flags, assert_same

# What is drawn is not part of the contract.
pytestmark = pytest.mark.usefixtures("undrawn")

SMALL = {
    "vocab_size": 64,
    "input_seq_len": 32,
    "num_kv_pairs": 4,
    "n_train_examples": 64,
    "n_val_examples": 12,
    "n_test_examples": 12,
}


def pytest_generate_tests(metafunc):
    models = metafunc.config.getoption("--model")
    datas = metafunc.config.getoption("--data")
    if not models and not datas:
        models, datas = list(MODELS), ["data_mqar", "data_track"]
    if "model_name" in metafunc.fixturenames:
        metafunc.parametrize("model_name", models or [])
    if "data_name" in metafunc.fixturenames:
        metafunc.parametrize("data_name", datas or [])


# ---- a model file --------------------------------------------------------------------------------


@pytest.fixture
def model(model_name):
    module, cls = resolve_model(model_name)
    torch.manual_seed(0)
    return cls(build_config(module.Config, [], vocab_size=64, seq_len=32)).eval()


@pytest.fixture
def batch():
    """Tokens (B, T), and targets in about a fifth of the positions."""
    tokens = torch.randint(64, (5, 32), generator=torch.Generator().manual_seed(0))
    is_label = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)) < 0.2
    return tokens, torch.where(is_label, tokens.flip(1), IGNORE_INDEX)


def test_logits_and_loss(model, batch):
    """With targets: logits (N, V) of the labelled positions, row-major, and their mean loss."""
    tokens, targets = batch
    logits, loss = model(tokens)
    assert logits.shape == (5, 32, 64) and loss is None
    scored, loss = model(tokens, targets)
    is_label = targets != IGNORE_INDEX
    expected = F.cross_entropy(logits[is_label], targets[is_label])
    torch.testing.assert_close(scored, logits[is_label], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_decoding_with_a_cache_gives_the_logits_of_all_tokens_at_once(model, batch):
    """Half of the tokens at once, then a quarter, then one at a time."""
    if not hasattr(model, "forward_cached"):
        pytest.skip("it has no forward_cached, so it cannot decode")
    tokens, _ = batch
    try:
        model.forward_cached(tokens[:, :1], None)
    except ConfigError as e:
        pytest.skip(str(e))
    assert decoding(model, *batch) == ""


@pytest.mark.parametrize("is_training", [False, True])
def test_it_is_causal_and_sequences_do_not_mix(model, batch, is_training):
    tokens, _ = batch
    changed = tokens.clone()
    changed[2, 20:] = (changed[2, 20:] + 1) % 64
    logits = []
    for x in (tokens, changed):
        torch.manual_seed(0)  # the same dropout in both
        logits.append(copy.deepcopy(model).train(is_training)(x)[0])
    a, b = logits
    torch.testing.assert_close(a[:, :20], b[:, :20], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a[[0, 1, 3, 4]], b[[0, 1, 3, 4]], rtol=1e-4, atol=1e-5)


def test_every_parameter_learns(model, batch):
    model(*batch)[1].backward()
    for name, p in model.named_parameters():
        assert not p.requires_grad or (p.grad is not None and p.grad.abs().max() > 0), name


def test_it_trains_resumes_and_is_evaluated(model_name, tmp_path, capsys):
    settings = {**SMALL, "log_dir": tmp_path, "run_name": "run", "batch_size": 8, "num_threads": 1}
    folder = str(tmp_path / "run")
    assert train.main(["--model", model_name, *as_flags(settings), "--max_steps", "2"]) == 0
    assert "test accuracy" in capsys.readouterr().out
    assert train.main(["--resume", folder, "--max_steps", "3"]) == 0
    assert "3 steps" in capsys.readouterr().out
    evaluate.main([folder])
    assert "accuracy" in capsys.readouterr().out


def test_weights_are_a_function_of_the_seed(model_name):
    """Of the seed in the settings, not of random numbers drawn before."""

    def weights(numbers_drawn_before):
        torch.rand(numbers_drawn_before)
        p = train.parse([f"--model={model_name}", *as_flags(SMALL)])
        return build_model(p, build_model_config(p, p.data_module.Data(p.data))).state_dict()

    assert_same(dict(weights(1)), dict(weights(100)))


# ---- a data file ---------------------------------------------------------------------------------


@pytest.fixture
def data(data_name):
    module = import_source_file(data_name, "data", "Config", "Data")
    settings = []
    for name, value in SMALL.items():
        if name in module.Config.__dataclass_fields__:
            settings.append(Setting(name, value, name))
    return module.Data(build_config(module.Config, settings))


def test_batches_are_pure_and_fit_together(data):
    """Of a step, all sequences at once are those of one at a time, in any order."""
    indices = data.batch_indices(0, 8)
    tokens, targets, slices = data.batch("train", 0, indices)
    assert tokens.dtype == targets.dtype == torch.long
    assert tokens.shape == targets.shape == (len(indices), tokens.shape[1])
    assert tokens.shape[1] <= data.seq_len
    assert 0 <= tokens.min() and tokens.max() < data.vocab_size
    singles = {}
    for index in reversed(indices):
        singles[index] = data.batch("train", 0, [index])
    for row, index in enumerate(indices):
        assert torch.equal(singles[index][0][0], tokens[row])
        assert torch.equal(singles[index][1][0], targets[row])
    labels = int((targets != IGNORE_INDEX).sum())
    assert labels > 0
    assert all(len(np.asarray(values)) == labels for values in slices.values())


@pytest.mark.parametrize("split", ["val", "test"])
def test_eval_groups_cover_val_and_test(data, split):
    seen = []
    for group in data.eval_groups(split):
        assert data.batch(split, 0, group)[0].shape[0] == len(group)
        seen += group
    assert len(seen) == len(set(seen)) > 0
    assert data.steps_per_epoch(8) >= 1
