"""What train.py expects of any model file and any data file; a fork can check its own:

python -m pytest tests/test_contract.py --model=my_model --data=my_data
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval as evaluate
import train
from nanorecall.build import MODELS, build_model, build_model_config, resolve_model
from nanorecall.settings import Setting, build_config
from nanorecall.source_files import import_source_file

SMALL = {
    "vocab_size": 64,
    "input_seq_len": 32,
    "num_kv_pairs": 4,
    "n_train_examples": 64,
    "n_val_examples": 12,
    "n_test_examples": 12,
}


def pytest_generate_tests(metafunc):
    models, datas = metafunc.config.getoption("--model"), metafunc.config.getoption("--data")
    if "model_name" in metafunc.fixturenames:
        metafunc.parametrize("model_name", models or ([] if datas else list(MODELS)))
    if "data_name" in metafunc.fixturenames:
        metafunc.parametrize("data_name", datas or ([] if models else ["data_mqar"]))


@pytest.fixture
def model(model_name):
    module, cls = resolve_model(model_name)
    torch.manual_seed(0)
    return cls(build_config(module.Config, [], vocab_size=64, seq_len=32)).eval()


@pytest.fixture
def batch():
    tokens = torch.randint(64, (5, 32), generator=torch.Generator().manual_seed(0))
    targets = torch.where(torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)) < 0.2, tokens.flip(1), -100)
    return tokens, targets


def test_logits_and_loss(model, batch):
    tokens, targets = batch
    logits, loss = model(tokens)
    assert logits.shape == (5, 32, 64) and loss is None
    scored, loss = model(tokens, targets)
    mask = targets != -100
    torch.testing.assert_close(scored, logits[mask], rtol=1e-4, atol=1e-5)  # row-major, labelled positions only
    torch.testing.assert_close(loss, F.cross_entropy(logits[mask], targets[mask]), rtol=1e-4, atol=1e-5)


def test_it_is_causal_and_rows_do_not_mix(model, batch):
    tokens, _ = batch
    changed = tokens.clone()
    changed[2, 20:] = (changed[2, 20:] + 1) % 64
    a, b = model(tokens)[0], model(changed)[0]
    torch.testing.assert_close(a[:, :20], b[:, :20], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a[[0, 1, 3, 4]], b[[0, 1, 3, 4]], rtol=1e-4, atol=1e-5)


def test_every_parameter_learns(model, batch):
    model(*batch)[1].backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert silent == []


def test_it_trains_resumes_and_is_evaluated(model_name, tmp_path, capsys):
    flags = [f"--{name}={value}" for name, value in SMALL.items()]
    folder = str(tmp_path / "run")
    flags += ["--log_dir", str(tmp_path), "--run_name", "run", "--batch_size", "8", "--num_threads", "1"]
    assert train.main(["--model", model_name, *flags, "--max_steps", "2"]) == 0
    assert "test accuracy" in capsys.readouterr().out
    assert train.main(["--resume", folder, "--max_steps", "3"]) == 0
    assert "3 steps" in capsys.readouterr().out
    evaluate.main([folder])
    assert "accuracy" in capsys.readouterr().out


def test_weights_are_a_function_of_the_seed(model_name):
    def weights(noise):
        torch.rand(noise)
        p = train.parse([f"--model={model_name}", *(f"--{k}={v}" for k, v in SMALL.items())])
        return build_model(p, build_model_config(p, p.data_module.Data(p.data))).state_dict()

    a, b = weights(1), weights(100)
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def data(data_name):
    module = import_source_file(data_name, "data", "Config", "Data")
    names = set(module.Config.__dataclass_fields__)
    return module.Data(build_config(module.Config, [Setting(k, v, k) for k, v in SMALL.items() if k in names]))


def test_batches_are_pure_and_fit_together(data):
    first = data.batch_indices(0, 8)
    tokens, targets, tags = data.batch("train", 0, first)
    assert tokens.dtype == targets.dtype == torch.long and tokens.shape == targets.shape == (len(first), tokens.shape[1])
    assert tokens.shape[1] <= data.seq_len and 0 <= tokens.min() and tokens.max() < data.vocab_size
    again = [data.batch("train", 0, [r]) for r in reversed(first)][::-1]
    assert torch.equal(torch.cat([x for x, _, _ in again]), tokens) and torch.equal(
        torch.cat([y for _, y, _ in again]), targets
    )
    labels = int((targets != -100).sum())
    assert labels > 0 and all(len(np.asarray(v)) == labels for v in tags.values())


def test_segments_cover_val_and_test(data):
    for split in ("val", "test"):
        rows = [r for segment in data.eval_groups(split) for r in segment]
        assert len(rows) == len(set(rows)) > 0
        for segment in data.eval_groups(split):
            assert data.batch(split, 0, segment)[0].shape[0] == len(segment)
    assert data.steps_per_epoch(8) >= 1
