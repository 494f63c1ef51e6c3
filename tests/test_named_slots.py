"""analysis/named_slots.py on a model of which the slot of each fact is known."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ablate
from analysis import hooks, named_slots
from analysis.trained_run import list_results, short_value
from nanorecall.settings import ConfigError
from planted import planted_facts
from toys import ablation_model, some_examples


@pytest.fixture
def change(monkeypatch):
    """change(name, model, examples, slot=...): what `ablate.py force` or `replace` saves."""

    def call(name, model, examples, **settings):
        run = SimpleNamespace(model=model, name="run", token=str, finding=print)
        run.config = ablate.AblateConfig(**settings)
        run.config.check()
        run.settings = SimpleNamespace(train=SimpleNamespace(model="memory"))
        saved = SimpleNamespace()

        def save(run, what, metrics, by_slice, examples, columns, plot):
            saved.by_slice, saved.columns = by_slice, columns
            saved.plot = plot

        monkeypatch.setattr(named_slots, "sample_correct_examples", lambda run: examples)
        monkeypatch.setattr(named_slots, "save_result", save)
        named_slots.change_slot(run, name)
        return saved

    return call


def test_a_forced_slot_gives_its_answer_to_all_examples(change, tmp_path):
    """Slot 6 holds the answer 1: every example answers 1, and only example 6 keeps its own."""
    saved = change("force", *planted_facts(), slot=6)
    assert (saved.columns["prediction"] == 1).all()
    assert saved.columns["base_lost"].tolist() == [example != 6 for example in range(9)]
    shares = saved.by_slice["layer, answer"]["0, 1"]
    assert shares["before"]["value"] == pytest.approx(1 / 9) and shares["after"]["value"] == 1
    saved.plot(str(tmp_path / "force.png"))
    assert (tmp_path / "force.png").stat().st_size > 5000


@pytest.mark.parametrize("settings", [dict(value="4"), dict(value="", pattern="vector")])
def test_a_replaced_value_changes_the_answer_of_its_fact_only(change, settings):
    """The value of slot 4, which is the answer 8, in place of that of slot 6."""
    model, examples = planted_facts()
    vector = model.memory_layers()[0].values[4]
    if settings.get("pattern") == "vector":
        settings = dict(pattern="vector", value=" ".join(map(str, vector.tolist())))
    else:
        settings = dict(pattern="slot", **settings)
    before = model.memory_layers()[0].values.clone()
    columns = change("replace", model, examples, slot=6, **settings).columns
    assert columns["prediction"][6] == 8
    others = np.arange(9) != 6
    assert columns["base_lost"].tolist() == (~others).tolist()
    assert columns["read"][6] and not columns["read"].all()
    assert torch.equal(model.memory_layers()[0].values, before)


@pytest.mark.parametrize("pattern", ["zero", "mean", "random"])
def test_without_its_value_a_fact_is_lost(change, pattern):
    columns = change("replace", *planted_facts(), slot=6, pattern=pattern).columns
    assert columns["drop"][6] > 1 and np.abs(np.delete(columns["drop"], 6)).max() < 1e-4


def test_patterns():
    memory = ablation_model().memory_layers()[0].requires_grad_(False)
    config = ablate.AblateConfig(seed=3, slot=1, value="7")
    vectors = {name: f(memory, config) for name, f in list(named_slots.PATTERNS.items())[:4]}
    assert not vectors["zero"].any() and torch.equal(vectors["slot"], memory.values[7])
    assert torch.equal(vectors["mean"], memory.values.mean(0))
    length = memory.values.norm(dim=1).mean().item()
    assert vectors["random"].norm().item() == pytest.approx(length, rel=1e-5)


def test_a_vector_from_a_file(tmp_path):
    memory = ablation_model().memory_layers()[0]
    path = str(tmp_path / "v.npy")
    np.save(path, np.arange(16))
    config = ablate.AblateConfig(slot=1, pattern="vector", value=path)
    assert named_slots.vector_pattern(memory, config).tolist() == list(range(16))


def save_npz(path, vector):
    np.savez(path, v=vector)
    os.replace(f"{path}.npz", path)


def save_torn(path, vector):
    np.save(path, vector)
    os.replace(f"{path}.npy", path)
    os.truncate(path, 150)


def save_infinite(path, vector):
    with open(path, "wb") as f:
        np.save(f, vector / 0.0)


def save_names(path, vector):
    with open(path, "wb") as f:
        np.save(f, np.array(["a"] * 16))


@np.errstate(divide="ignore", invalid="ignore")
@pytest.mark.parametrize("save", [save_npz, save_torn, save_infinite, save_names])
def test_a_file_of_no_vector_is_refused(tmp_path, save):
    memory = ablation_model().memory_layers()[0]
    path = str(tmp_path / "v")
    save(path, np.arange(16.0))
    config = ablate.AblateConfig(slot=1, pattern="vector", value=path)
    with pytest.raises(ConfigError, match="neither a .npy file|not finite") as caught:
        named_slots.vector_pattern(memory, config)
    assert "\n" not in str(caught.value)


def test_results_of_other_vectors_have_other_names(tmp_path):
    path = tmp_path / "v.npy"
    names = set()
    for sign in (1, -1):
        np.save(path, sign * np.arange(16))
        names |= {short_value("value", str(path)), short_value("value", f"{sign} 2")}
    assert len(names) == 4 and short_value("value", "12") == "12"


@torch.no_grad()
@pytest.mark.parametrize("name", ["force", "replace"])
def test_changes_equal_full_forward_passes(change, name):
    """Both layers, against the whole model with the reads or the table changed by hand."""
    model, examples = ablation_model(mem_share_values=False), some_examples()
    settings = {"pattern": "mean"} if name == "replace" else {}
    columns = change(name, model, examples, slot=3, **settings).columns
    n = examples.answers.shape[1]
    for layer, memory in model.memory_layers().items():
        for head in range(2):
            expected = examples.answers.clone()
            for i in range(n):
                if name == "replace":
                    row = memory.values[3].clone()
                    memory.values[3] = memory.values.mean(0)
                    logits = hooks.run_with_hooks(model, examples)
                    memory.values[3] = row
                else:

                    def only_slot(reads, i=i, head=head):
                        slots = reads["slots"].clone()
                        slots[torch.arange(6), examples.label_pos[:, i], head] = 3
                        return {"slots": slots, "weights": reads["weights"]}

                    logits = hooks.run_with_hooks(model, examples, intervene={layer: only_slot})
                expected[:, i] = logits[:, i].argmax(-1)
            mask = columns["layer"] == layer
            if name == "force":
                mask &= columns["head"] == head
            assert columns["prediction"][mask].tolist() == expected.flatten().tolist()


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(slot=3), "replace --slot needs --pattern"),
        (dict(slot=9, pattern="mean"), "slot=9 must be below 9"),
        (dict(pattern="mean"), "name it with --slot"),
        (dict(slot=3, pattern="zeros"), "pattern='zeros' is unknown"),
        (dict(slot=3, pattern="slot"), "value='' must be the number of a slot, 0 to 8"),
        (dict(slot=3, pattern="slot", value="9"), "value='9' must be the number of a slot"),
        (dict(slot=3, pattern="mean", value="9"), "needs pattern=slot or pattern=vector"),
        (dict(slot=3, pattern="vector", value="1 2"), r"has shape \(2,\); the values have 18"),
        (dict(slot=3, pattern="vector", value="a b"), "neither a .npy file nor a list of numbers"),
        (dict(slot=3, pattern="mean", exposure_pairs="less_more"), "--slot takes none"),
    ],
)
def test_mistakes_are_one_sentence(change, settings, message):
    with pytest.raises(ConfigError, match=message):
        change("replace", *planted_facts(), **settings)


def test_a_slot_that_no_example_reads(change, capsys):
    model, examples = planted_facts()
    saved = change("replace", model, examples.select([0]), slot=8, pattern="mean")
    assert "no label of the 1 examples depends on slot 8" in capsys.readouterr().out
    assert not saved.columns["read"].any() and saved.plot is None


def test_what_one_slot_does_is_no_input_of_another_command(tmp_path):
    for name in ("ablate_force.parquet", "ablate_force_slot-7.parquet"):
        (tmp_path / name).touch()
    run = SimpleNamespace(folder=tmp_path, prefix="ablate", config=SimpleNamespace(split="test"))
    assert list_results(run, "force") == [""]
