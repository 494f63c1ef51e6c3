"""edit_comparison.py: what it measures on which facts, and what it refuses.

The closed form itself is tested in test_memory.py, and that it leaves no trace in test_traces.py.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval as eval_script
import train
from analysis import edit_comparison
from analysis.editors import EDITORS
from nanorecall.settings import ConfigError
from toys import as_flags

SMALL = dict(
    data="data_synth", n_layers=2, dim=32, dk=16, dv=16, conv_size=8, init_std=1, lr=1e-2,
    batch_size=64, num_threads=1, model="memory", memory_layers="[0,1]", mem_share_values=0,
    mem_n_keys=16, mem_k_dim=16, mem_value_lr_scale=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """A run that knows its 40 facts -> its directory."""
    folder = tmp_path_factory.mktemp("facts")
    place = dict(log_dir=folder, run_name="a", max_steps=80, eval_interval=80)
    train.main(as_flags({**SMALL, **place, "task": "qa", "num_pairs": 40, "buckets": "[16]"}))
    return folder / "a"


@pytest.fixture(scope="module")
def results(facts):
    """{(method, number of edits): result}"""
    eval_script.main(["edit", str(facts), "--n_edits=[1,5]"])
    saved = json.loads((facts / "eval_edit_n_edits-1-5.json").read_text())
    results = saved["by_slice"]["method, edits"].values()
    return {(result["method"], result["edits"]): result for result in results}


def test_every_editor_is_measured_and_drawn(facts, results):
    # Both blocks have a memory layer in place of the MLP.
    editors = {name for name in EDITORS if "MLP" not in name}
    assert {method for method, _ in results} == editors
    assert len(results) == 2 * len(editors)
    assert (facts / "eval_edit_n_edits-1-5.png").stat().st_size > 5000


@pytest.mark.parametrize("n", [1, 5])
def test_edited_facts_get_their_new_answer(results, n):
    assert results["closed form", n]["efficacy"]["n"] == n
    assert results["closed form", n]["efficacy"]["value"] >= 0.8
    assert results["fine-tune all weights", n]["efficacy"]["value"] == 1


@pytest.mark.parametrize("n", [1, 5])
def test_protecting_others_does_not_forget_more(results, n):
    plain, protecting = results["closed form", n], results["closed form, protecting others", n]
    assert protecting["retention"]["value"] >= 0.8
    assert protecting["specificity"]["value"] >= plain["specificity"]["value"] - 0.1


@pytest.mark.parametrize("n", [1, 5])
def test_editors_may_use_one_half_of_the_other_facts(results, n):
    result = results["closed form", n]
    assert abs(result["retention"]["n"] - result["specificity"]["n"]) <= 1


def test_too_few_known_facts_are_refused(facts):
    with pytest.raises(ConfigError, match=r"^the model answers \d+ facts .*1000.* needs 1010"):
        eval_script.main(["edit", str(facts), "--n_edits=[1000]"])


def test_texts_are_not_edited(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text("".join(f'{{"text": "{i}:{i} "}}\n' for i in range(40)))
    place = dict(log_dir=tmp_path, run_name="t", max_steps=1, eval_interval=1)
    train.main(as_flags({**SMALL, **place, "task": "text", "label_mask": "qa", "path": path}))
    with pytest.raises(ConfigError, match="needs facts of digits, task=qa or digits, not text"):
        eval_script.main(["edit", str(tmp_path / "t")])


def test_a_counterfactual_is_made_of_the_characters_that_answers_have():
    rng, alphabet = np.random.default_rng(0), list("12345")
    for _ in range(50):
        fact = edit_comparison.counterfactual("34512:51234 ", alphabet, rng)
        key, value = fact.strip().split(":")
        assert key == "34512" and set(value) <= set(alphabet)
        assert all(new != old for new, old in zip(value, "51234"))


class RecordingEditor:
    """An editor that changes nothing. n_correct answers all examples but one correctly."""

    def __init__(self):
        self.edited, self.kept, self.measured = [], [], []

    def __call__(self, model, edited, _, kept, kept_targets):
        self.edited.append(edited)
        self.kept.append(kept)

    def n_correct(self, model, facts, _):
        self.measured.append(facts)
        return len(facts) - 1


def keys(facts):
    return {fact.split(":")[0] for fact in facts}


def compare_without_a_model(monkeypatch, seeds):
    """compare_editors on 30 known facts, 4 of them edited -> RecordingEditor, texts, results."""
    texts = [f"{i:02}:{i * 7 % 97:02} " for i in range(30)]
    editor, results = RecordingEditor(), {}
    monkeypatch.setattr(edit_comparison, "require_editable", lambda run: None)
    monkeypatch.setattr(edit_comparison, "correct_examples", lambda run: np.arange(30))
    monkeypatch.setattr(edit_comparison, "encode", lambda run, facts: (facts, facts))
    monkeypatch.setattr(edit_comparison, "EDITORS", {"none": editor})
    monkeypatch.setattr(edit_comparison, "n_correct", editor.n_correct)

    def save_result(run, what, metrics, by_slice, *rest):
        results.update(by_slice["method, edits"])

    monkeypatch.setattr(edit_comparison, "save_result", save_result)
    source = SimpleNamespace(read=lambda split, indices: ([texts[i] for i in indices], {}))
    for seed in seeds:
        run = SimpleNamespace(
            model=torch.nn.Linear(1, 1),
            config=SimpleNamespace(n_edits=(4,), split="test"),
            settings=SimpleNamespace(train=SimpleNamespace(seed=seed)),
            data=SimpleNamespace(source=source),
            name="x",
            finding=print,
        )
        edit_comparison.compare_editors(run)
    return editor, texts, results


def test_edited_kept_and_unseen_facts_are_disjoint(monkeypatch):
    """Of 30 facts 4 are edited, 13 are kept, and 13 are unseen."""
    editor, texts, _ = compare_without_a_model(monkeypatch, seeds=[0])
    edited, unseen, kept = editor.measured
    assert (len(edited), len(unseen), len(kept)) == (4, 13, 13)
    assert len(keys(edited) | keys(unseen) | keys(kept)) == 30
    assert editor.kept == [kept] and editor.edited == [edited]
    assert set(kept) | set(unseen) <= set(texts) and not set(edited) & set(texts)


def test_results_count_edited_and_unseen_facts(monkeypatch):
    _, _, results = compare_without_a_model(monkeypatch, seeds=[0])
    result = results["none, 4"]
    assert result["efficacy"]["value"] == 3 / 4
    assert result["specificity"]["n"] == result["retention"]["n"] == 13


def test_the_seed_of_the_run_chooses_the_facts(monkeypatch):
    editor, _, _ = compare_without_a_model(monkeypatch, seeds=[0, 1])
    first, second = editor.edited
    assert keys(first) != keys(second)
