"""The training loop against arithmetic of its own, and what it does at scripted evaluations."""

import pytest
import torch
import torch.nn.functional as F

import train
from nanorecall import checkpoint
from nanorecall import run as run_module
from nanorecall.build import build_data, build_model, build_model_config
from nanorecall.records import read_json
from nanorecall.saved_run import load_settings
from toys import run

# That a run draws its curves is tested in test_progress.py.
pytestmark = pytest.mark.usefixtures("undrawn")

MEMORY = dict(model="memory", mem_n_keys=4, mem_heads=2, mem_knn=2, mem_k_dim=8)


@pytest.mark.parametrize("model", [{}, dict(MEMORY, mem_value_lr_scale=3)], ids=["gpt", "memory"])
def test_five_steps_by_hand(tmp_path, model):
    """AdamW as in its paper (Loshchilov and Hutter 2019), gradients cut to a norm of 0.1."""
    settings = dict(beta1=0.8, beta2=0.9, weight_decay=0.1, clip_grad=0.1, warmup_steps=3)
    settings |= dict(lr_schedule="linear", lr_min_ratio=0.5)
    settings |= dict(max_steps=5, eval_interval=5, batch_size=4)
    _, out = run(tmp_path, **settings, **model)
    p = load_settings(out, train.TrainConfig)
    data = build_data(p)
    model = build_model(p, build_model_config(p, data))
    names, weights = zip(*model.named_parameters())
    first = [torch.zeros_like(w) for w in weights]
    second = [torch.zeros_like(w) for w in weights]
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
            mean = first[i] / (1 - 0.8 ** (step + 1))
            square = second[i] / (1 - 0.9 ** (step + 1))
            is_values = name.endswith("memory.values")
            decay = 0.1 if w.ndim >= 2 and not is_values else 0.0
            scale = 3.0 if is_values else 1.0
            with torch.no_grad():
                w -= lr * scale * (decay * w + mean / (square.sqrt() + 1e-8))
    saved = checkpoint.load_checkpoint(out, "ckpt")["tensors"]
    for name, w in zip(names, weights):
        torch.testing.assert_close(saved[f"model.{name}"], w.detach(), rtol=1e-4, atol=1e-6)


def test_each_micro_batch_of_each_step_and_run_has_a_seed_of_its_own(tmp_path, monkeypatch):
    manual_seed, seeds = torch.manual_seed, []

    def note_seed(n):
        seeds.append(n)
        return manual_seed(n)

    monkeypatch.setattr(torch, "manual_seed", note_seed)
    for seed in (0, 1):
        run(tmp_path, f"run{seed}", seed=seed, grad_accum_steps=4, max_steps=3, eval_interval=3)
    of_weights = 1
    assert len(seeds) == len(set(seeds)) == 2 * (of_weights + 3 * 4)


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    """scripted(val accuracies, test accuracy, ...) -> status, folder, saved, weights tested."""
    evaluate, write = run_module.evaluate, run_module.write_checkpoint
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

        monkeypatch.setattr(run_module, "evaluate", measured)
        monkeypatch.setattr(run_module, "write_checkpoint", written)
        status, out = run(tmp_path, max_steps=8, eval_interval=2, **changes)
        return status, out, saved, tested

    return start


def test_what_is_saved_when_and_which_weights_are_tested(scripted):
    """Accuracies 0.2, 0.5, 0.5 and 0.4 at steps 2, 4, 6 and 8: the first 0.5 stays the best."""
    status, out, saved, (tested,) = scripted([0.2, 0.5, 0.5, 0.4], 0.5, save_interval=3)
    assert status == 0
    assert [step for name, step in saved if name == "best"] == [2, 4]
    assert [step for name, step in saved if name == "ckpt"] == [2, 3, 4, 6, 8]
    best, last = (checkpoint.load_checkpoint(out, name) for name in ("best", "ckpt"))
    assert (best["step"], last["step"]) == (4, 8)

    def is_tested(state):
        return all(torch.equal(t, state["tensors"][f"model.{name}"]) for name, t in tested.items())

    assert is_tested(best) and not is_tested(last)


def test_a_run_stops_at_the_very_accuracy_that_it_was_to_reach(scripted):
    _, out, saved, _ = scripted([0.2, 0.5, 0.6], 0.5, stop_accuracy=0.5)
    assert saved[-1] == ("ckpt", 4)
    assert read_json(f"{out}/status.json")["step"] == 4


@pytest.mark.parametrize("target, status", [(0.75, 0), (0.7501, 1)])
def test_the_target_itself_is_enough(scripted, target, status):
    assert scripted([0.5] * 4, 0.75, target_accuracy=target)[0] == status
