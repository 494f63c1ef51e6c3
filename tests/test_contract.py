"""What train.py expects of any model file and any data file; a fork can check its own:

python -m pytest tests/test_contract.py --model=my_model --data=my_data
"""

import numpy as np
import pytest
import torch

import eval as evaluate
import train
from analysis.card_checks import CHECKS, SHORT, example_inputs, run_check
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
    for option, names in (("model", models), ("data", datas)):
        if option + "_name" in metafunc.fixturenames:
            not_named = pytest.mark.skip(reason=f"no --{option} is named")
            names = names or [pytest.param("", marks=not_named)]
            metafunc.parametrize(option + "_name", names)


# ---- a model file --------------------------------------------------------------------------------


@pytest.mark.parametrize("check", CHECKS)
def test_the_model_passes(model_name, check):
    """The checks of the report card (analysis/card_checks.py), with the model's own defaults."""

    def make_example():
        module, cls = resolve_model(model_name)
        torch.manual_seed(0)
        model = cls(build_config(module.Config, [], vocab_size=64, seq_len=SHORT))
        return model, *example_inputs(model)

    try:
        problem = run_check(check, make_example)
    except ConfigError as e:
        problem = str(e)
    # These two are refusals. A model need not decode.
    if "it cannot decode" in problem or "decoding needs a mixer with a cache" in problem:
        pytest.skip(problem)
    if problem:
        pytest.fail(f"{model_name} fails {check}: {problem}", pytrace=False)


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
