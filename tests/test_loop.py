"""The training loop against arithmetic of its own, and what it does at scripted evaluations."""

import json

import pytest
import torch
import torch.nn.functional as F

import train
from nanorecall import checkpoint
from nanorecall import run as run_file
from nanorecall.build import build_data, build_model, build_model_config
from nanorecall.run import load_settings
from toys import run

MEMORY = dict(model="memory", mem_n_keys=4, mem_heads=2, mem_knn=2, mem_k_dim=8)


@pytest.mark.parametrize("own, rate", [({}, 1.0), (dict(MEMORY, mem_value_lr_scale=3), 3.0)])
def test_five_steps_by_hand(tmp_path, own, rate):
    """AdamW as in its paper (Loshchilov and Hutter 2019), gradients cut to a norm of 0.1."""
    settings = dict(beta1=0.8, beta2=0.9, weight_decay=0.1, clip_grad=0.1, warmup_steps=3)
    settings |= dict(lr_schedule="linear", lr_min_ratio=0.5, max_steps=5, eval_interval=5, batch_size=4)
    _, out = run(tmp_path, **settings, **own)
    p = load_settings(out, train.TrainConfig)
    data = build_data(p)
    model = build_model(p, build_model_config(p, data))
    names, weights = zip(*model.named_parameters())
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    for step in range(5):
        tokens, targets, *_ = data.batch("train", step, data.batch_indices(step, 4))
        loss = F.cross_entropy(model(tokens)[0].flatten(0, 1), targets.flatten())
        gradients = torch.autograd.grad(loss, weights)
        norm = sum(g.square().sum() for g in gradients).sqrt()
        assert norm > 0.1
        lr = 1e-2 * min(1, (step + 1) / 3) * (0.5 + 0.5 * (1 - step / 5))
        for i, (name, w, g) in enumerate(zip(names, weights, gradients)):
            g = g * 0.1 / norm
            first[i] = 0.8 * first[i] + 0.2 * g
            second[i] = 0.9 * second[i] + 0.1 * g * g
            mean, square = first[i] / (1 - 0.8 ** (step + 1)), second[i] / (1 - 0.9 ** (step + 1))
            values = name.endswith("memory.values")
            decay = 0.1 if w.ndim >= 2 and not values else 0.0
            faster = rate if values else 1.0
            with torch.no_grad():
                w -= lr * faster * (decay * w + mean / (square.sqrt() + 1e-8))
    saved = checkpoint.load_checkpoint(out, "ckpt")["tensors"]
    for name, w in zip(names, weights):
        torch.testing.assert_close(saved[f"model.{name}"], w.detach(), rtol=1e-4, atol=1e-6)


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    """scripted(val accuracies, test accuracy, ...) -> status, folder, saved, weights tested."""
    evaluate, write = run_file.evaluate, run_file.write_checkpoint
    saved, tested = [], []

    def start(val, test, **changes):
        values = iter(val)

        def measured(model, data, split, *args):
            if split == "test":
                tested.append({n: t.clone() for n, t in model.state_dict().items()})
            result = evaluate(model, data, split, *args)
            return {**result, "accuracy": next(values) if split == "val" else test}

        def written(folder, name, state, *args):
            saved.append((name, state["step"]))
            write(folder, name, state, *args)

        monkeypatch.setattr(run_file, "evaluate", measured)
        monkeypatch.setattr(run_file, "write_checkpoint", written)
        status, out = run(tmp_path, max_steps=8, eval_interval=2, **changes)
        return status, out, saved, tested

    return start


def test_what_is_saved_when_and_which_weights_are_tested(scripted):
    """Accuracies 0.2, 0.5, 0.5 and 0.4 at steps 2, 4, 6 and 8: the first 0.5 stays the best."""
    status, out, saved, (tested,) = scripted([0.2, 0.5, 0.5, 0.4], 0.5, save_interval=3)
    steps = {name: [step for n, step in saved if n == name] for name in ("best", "ckpt")}
    assert status == 0 and steps == {"best": [2, 4], "ckpt": [2, 3, 4, 6, 8]}
    best, last = (checkpoint.load_checkpoint(out, name) for name in ("best", "ckpt"))
    assert (best["step"], last["step"]) == (4, 8)
    assert all(torch.equal(t, best["tensors"][f"model.{name}"]) for name, t in tested.items())
    assert any(not torch.equal(t, last["tensors"][f"model.{name}"]) for name, t in tested.items())


def test_a_run_stops_at_the_very_accuracy_that_it_was_to_reach(scripted):
    _, out, saved, _ = scripted([0.2, 0.5, 0.6], 0.5, stop_accuracy=0.5)
    assert saved[-1] == ("ckpt", 4) and json.loads(open(f"{out}/status.json").read())["step"] == 4


@pytest.mark.parametrize("target, status", [(0.75, 0), (0.7501, 1)])
def test_the_target_itself_is_enough(scripted, target, status):
    assert scripted([0.5] * 4, 0.75, target_accuracy=target)[0] == status
