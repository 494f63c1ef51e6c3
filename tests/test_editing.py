"""edit_comparison.py: what it measures on which facts, and what it refuses.

The closed form itself is tested in test_memory.py, and that it leaves no trace in test_traces.py.
"""

import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval as eval_script
import train
from analysis import consolidation, edit_comparison, peak_memory
from analysis.asking import ask, find_facts
from analysis.editors import EDITORS, answer_probabilities, answered
from analysis.peak_memory import peak_memory_of
from analysis.trained_run import open_run
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
    eval_script.main(["edit", str(facts), "--n_edits=[1,5]", "--editors=all"])
    return read_results(facts / "eval_edit_n_edits-1-5_editors-all.json")


def read_results(path):
    results = json.loads(path.read_text())["by_slice"]["method, edits"].values()
    return {(result["method"], result["edits"]): result for result in results}


def test_facts_are_known_in_the_precision_of_the_edits(facts, monkeypatch):
    run = open_run(str(facts), eval_script.EvalConfig())
    run.dtype = torch.bfloat16

    class Seen(Exception):
        pass

    def look(run):
        raise Seen(run.dtype)

    for module, command in (
        (edit_comparison, edit_comparison.compare_editors),
        (consolidation, consolidation.consolidate),
    ):
        monkeypatch.setattr(module, "correct_examples", look)
        monkeypatch.setattr(module, "require_consolidation", bool, raising=False)
        with pytest.raises(Seen) as seen:
            command(run)
        assert seen.value.args == (torch.float32,) and run.dtype == torch.bfloat16


def test_every_editor_is_measured_and_drawn(facts, results):
    # Both blocks have a memory layer in place of the MLP.
    editors = {name for name in EDITORS if "MLP" not in name}
    assert {method for method, _ in results} == editors
    assert len(results) == 2 * len(editors)
    assert (facts / "eval_edit_n_edits-1-5_editors-all.png").stat().st_size > 5000


@pytest.mark.parametrize("n", [1, 5])
def test_edited_facts_get_their_new_answer(results, n):
    assert results["closed form", n]["efficacy"]["n"] == n
    assert results["closed form", n]["efficacy"]["value"] >= 0.8
    assert results["fine-tune all weights", n]["efficacy"]["value"] == 1


@pytest.mark.parametrize("n", [1, 5])
def test_protecting_others_does_not_forget_more(results, n):
    plain, protecting = results["closed form", n], results["closed form, protecting others", n]
    assert protecting["specificity, shown"]["value"] >= 0.8
    assert protecting["specificity"]["value"] >= plain["specificity"]["value"] - 0.1


@pytest.mark.parametrize("n", [1, 5])
def test_editors_may_use_one_half_of_the_other_facts(results, n):
    result = results["closed form", n]
    assert abs(result["specificity, shown"]["n"] - result["specificity"]["n"]) <= 1


def test_too_few_known_facts_are_refused(facts):
    with pytest.raises(ConfigError, match=r"^the model answers \d+ facts .*1000.* needs 1010"):
        eval_script.main(["edit", str(facts), "--n_edits=[1000]"])


def test_texts_are_not_edited(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text("".join(f'{{"text": "{i}:{i} "}}\n' for i in range(40)))
    place = dict(log_dir=tmp_path, run_name="t", max_steps=1, eval_interval=1)
    train.main(as_flags({**SMALL, **place, "task": "text", "label_mask": "qa", "path": path}))
    with pytest.raises(ConfigError, match="facts of your own are edited by name"):
        eval_script.main(["edit", str(tmp_path / "t")])


def test_a_counterfactual_is_made_of_the_characters_that_answers_have():
    rng, alphabet = np.random.default_rng(0), list("12345")
    for _ in range(50):
        fact = edit_comparison.counterfactual("34512:51234 ", alphabet, rng)
        key, value = fact.strip().split(":")
        assert key == "34512" and set(value) <= set(alphabet)
        assert all(new != old for new, old in zip(value, "51234"))


class RecordingEditor:
    """An editor that adds 1 to the model's weight. It answers all examples but the first."""

    def __init__(self):
        self.edited, self.kept, self.measured = [], [], []

    def __call__(self, model, edited, _, kept, kept_targets):
        self.edited.append(edited.tolist())
        self.kept.append(kept.tolist())
        with torch.no_grad():
            model.weight += 1

    def answered(self, model, facts, _):
        self.measured.append(facts.tolist())
        return torch.arange(len(facts)) > 0


def numbers(facts):
    """key:value, of two digits each, as one number"""
    return [int(fact.replace(":", "")) for fact in facts]


def keys(facts):
    return {fact // 100 for fact in facts}


def compare_without_a_model(monkeypatch, seeds, has_slices=True, **settings):
    """compare_editors on 30 known facts, 4 of them edited -> RecordingEditor, facts, result."""
    texts = [f"{i:02}:{i * 7 % 97:02} " for i in range(30)]
    groups = np.arange(len(texts)) % 2
    editor, results = RecordingEditor(), {}

    def encode(run, facts):
        return torch.tensor(numbers(facts)), torch.tensor(numbers(facts))

    def n_correct(*facts):
        return int(editor.answered(*facts).sum())

    def save_result(run, what, metrics, by_slice, *rest):
        results.update(by_slice)

    fakes = dict(
        require_editable=lambda run: None,
        correct_examples=lambda run: np.arange(30),
        predictions=lambda run: [],
        stored_bits=lambda *facts: {},
        encode=encode,
        choose_editors=lambda *names: {"none": editor},
        answered=editor.answered,
        n_correct=n_correct,
        answer_probabilities=lambda model, facts, _: torch.arange(len(facts)) / 10,
        save_result=save_result,
    )
    for name, fake in fakes.items():
        monkeypatch.setattr(edit_comparison, name, fake)

    def read(split, indices):
        slices = {"exposures": groups[indices]} if has_slices else {}
        return [texts[i] for i in indices], slices

    source = SimpleNamespace(read=read, texts=texts)
    config = dict(n_edits=(4,), split="test", new_facts=False, portions=1, editors="")
    config |= dict(top_slots=1, margin=2)
    for seed in seeds:
        model = torch.nn.Linear(1, 1)
        torch.nn.init.ones_(model.weight)
        run = SimpleNamespace(
            model=model,
            config=SimpleNamespace(**{**config, **settings}),
            settings=SimpleNamespace(train=SimpleNamespace(seed=seed)),
            data=SimpleNamespace(source=source),
            name="x",
            dtype=torch.float32,
            finding=print,
        )
        edit_comparison.compare_editors(run)
        assert model.weight.item() == 1
    return editor, numbers(texts), results


def test_edited_kept_and_unseen_facts_are_disjoint(monkeypatch):
    """Of 30 facts 4 are edited, 13 are kept, and 13 are unseen. All 26 are old."""
    editor, facts, _ = compare_without_a_model(monkeypatch, seeds=[0])
    edited, unseen, kept, old = editor.measured
    assert (len(edited), len(unseen), len(kept)) == (4, 13, 13)
    assert len(keys(edited) | keys(unseen) | keys(kept)) == 30
    assert editor.kept == [kept] and editor.edited == [edited]
    assert sorted(unseen + kept) == sorted(old)
    assert set(old) <= set(facts) and not set(edited) & set(facts)


def test_results_count_edited_and_unseen_facts(monkeypatch):
    _, _, results = compare_without_a_model(monkeypatch, seeds=[0])
    result = results["method, edits"]["none, 4"]
    assert result["efficacy"]["value"] == 3 / 4
    assert result["probability"] == pytest.approx((0 + 0.1 + 0.2 + 0.3) / 4)
    assert result["specificity"]["n"] == result["specificity, shown"]["n"] == 13
    assert result["retained"]["value"] == 25 / 26
    by_group = result["retained_by"]
    assert set(by_group) == {"exposures=0", "exposures=1"}
    assert sum(cell["n"] for cell in by_group.values()) == 26
    assert sorted(cell["value"] == 1 for cell in by_group.values()) == [False, True]


def test_facts_without_slices_are_one_group(monkeypatch):
    _, _, results = compare_without_a_model(monkeypatch, seeds=[0], has_slices=False)
    assert results["method, edits"]["none, 4"]["retained_by"]["all"]["n"] == 26


def test_the_seed_of_the_run_chooses_the_facts(monkeypatch):
    editor, _, _ = compare_without_a_model(monkeypatch, seeds=[0, 1])
    first, second = editor.edited
    assert keys(first) != keys(second)


def test_new_facts_have_new_keys_and_no_old_fact_is_lost(monkeypatch):
    editor, facts, _ = compare_without_a_model(monkeypatch, seeds=[0], new_facts=True)
    edited, unseen, kept, old = editor.measured
    assert len(keys(edited)) == 4 and not keys(edited) & keys(facts)
    assert sorted(old) == sorted(facts) and sorted(unseen + kept) == sorted(old)


def test_new_keys_that_do_not_exist_are_refused():
    rng = np.random.default_rng(0)
    texts = ["12:21 ", "21:12 ", "22:11 "]
    assert edit_comparison.unknown_facts(1, texts, texts, rng)[0].startswith("11:")
    with pytest.raises(ConfigError, match="n_edits=2 new facts need keys .* there are 1"):
        edit_comparison.unknown_facts(2, texts, texts, rng)


def test_portions_are_edited_one_after_the_other(monkeypatch):
    """4 facts in 3 portions; each adds 1 to a weight of 1."""
    editor, _, results = compare_without_a_model(monkeypatch, seeds=[0], portions=3)
    assert [len(portion) for portion in editor.edited] == [2, 1, 1]
    earlier = [[], editor.edited[0], sum(editor.edited[:2], [])]
    assert [kept[:-13] for kept in editor.kept] == earlier
    rows = [results["method, edits, portion"][f"none, 4, {i}"] for i in (1, 2, 3)]
    assert rows[-1] == results["method, edits"]["none, 4"]
    assert [row["so_far"] for row in rows] == [2, 3, 4]
    assert [row["efficacy"]["value"] for row in rows] == [1 / 2, 2 / 3, 3 / 4]
    assert [row["last_portion"]["n"] for row in rows] == [2, 1, 1]
    assert [row["growth"] for row in rows] == [2, 3, 4]
    assert [row["bytes"] for row in rows] == [4, 4, 4]
    so_far = editor.measured[0::5]
    assert so_far[0] == editor.edited[0] and so_far[2] == sum(editor.edited, [])


def test_portions_of_a_closed_form_and_of_few_slots(facts):
    options = ["--n_edits=[6]", "--portions=3", "--new_facts=1", "--top_slots=128"]
    eval_script.main(["edit", str(facts), *options, "--editors=closed form; sparse tf-idf"])
    name = "n_edits-6_new_facts-True_portions-3_editors-closed-form-sparse-tf-idf"
    name += "_top_slots-128"
    saved = json.loads((facts / f"eval_edit_{name}.json").read_text())["by_slice"]
    rows = saved["method, edits, portion"]
    assert len(rows) == 6
    for portion in (1, 2, 3):
        assert rows[f"closed form, 6, {portion}"]["last_portion"]["value"] == 1
    # With a table of 256 slots, 200 steps may be too few for both facts of a portion.
    assert max(rows[f"sparse tf-idf, 6, {i}"]["last_portion"]["value"] for i in (1, 2, 3)) >= 0.5
    for method in ("closed form", "sparse tf-idf"):
        slots = [rows[f"{method}, 6, {i}"]["slots"] for i in (1, 2, 3)]
        assert 0 < slots[0] <= slots[1] <= slots[2] <= 256
        assert rows[f"{method}, 6, 1"]["bytes"] <= slots[0] * 32 * 4


def test_what_an_edit_costs(results):
    for (method, _), result in results.items():
        only_values = method.startswith(("closed", "sparse", "fine-tune the values"))
        assert only_values == (result["bytes"] <= result["slots"] * 32 * 4), method
        assert (result["slots"] == 0) == (method == "fine-tune LoRA")
        assert result["seconds"] > 0 and result["peak_memory"] >= 0
        assert result["growth"] > 0 and result["growth"] != 1


def test_the_load_of_the_table_is_that_of_eval(facts, results):
    eval_script.main([str(facts)])
    of_eval = json.loads((facts / "eval_test.json").read_text())["metrics"]["stored"]
    path = facts / "eval_edit_n_edits-1-5_editors-all.json"
    assert json.loads(path.read_text())["metrics"]["stored"] == of_eval
    assert of_eval["bits stored per memory value"]["value"] > 0


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--editors=sparse"], "there is no editor 'sparse'; separate names by ';': closed form;"),
        (["--portions=6"], "portions=6 needs n_edits of at least as many, not "),
        (["--top_slots=0"], "top_slots=0 must be at least 1"),
        (["--margin=0"], "margin=0.0 must be above 0"),
        (["--margin=3", "--editors=sparse KL"], "margin=3.0 has no effect: editors names no clo"),
        (["--dtype=bfloat16"], "dtype=bfloat16 is for runs of MQAR; facts .* edited in float32"),
        (["--top_slots=8"], "top_slots=8 has no effect: editors names no sparse method"),
        (["--num_kv_pairs=[8]"], "num_kv_pairs is for runs of MQAR; this run stores facts"),
    ],
)
def test_a_mistake_is_one_sentence(facts, flags, message):
    with pytest.raises(ConfigError, match=message):
        eval_script.main(["edit", str(facts), "--n_edits=[5]", *flags])


def test_seconds_are_those_of_the_function_alone(monkeypatch):
    monkeypatch.setattr(peak_memory, "reset_peak", lambda: time.sleep(0.3) or False)
    _, seconds = peak_memory_of(lambda: time.sleep(0.05), torch.device("cpu"))
    assert 0.05 <= seconds < 0.3


def test_efficacy_and_probability_are_those_of_greedy_decoding(facts):
    """Of 5 facts edited in closed form, and of the same with answers that were not edited in."""
    run = open_run(str(facts), eval_script.EvalConfig())
    texts = run.data.source.texts[:10]
    alphabet = list("0123456789")
    rng = np.random.default_rng(0)
    edited = [edit_comparison.counterfactual(text, alphabet, rng) for text in texts]
    encoded = edit_comparison.encode(run, edited)
    EDITORS["closed form"](run.model, *(x[:5] for x in encoded), None, None)
    is_answered = answered(run.model, *encoded).tolist()
    probabilities = answer_probabilities(run.model, *encoded).tolist()
    assert is_answered[:5] == [True] * 5 and not all(is_answered[5:])
    decoded = find_facts(run.data, edited)
    for fact, is_right, probability in zip(decoded, is_answered, probabilities):
        answer = ask(run.model, run, fact)
        assert np.array_equal(answer.tokens, fact.answer) == is_right
        assert not is_right or probability == pytest.approx(answer.probability, rel=1e-3)


def test_a_larger_margin_makes_new_answers_more_probable(facts):
    found = {}
    for margin in (2, 6):
        name = "" if margin == 2 else f"_margin-{margin}.0"
        argv = ["--n_edits=[5]", "--editors=closed form", f"--margin={margin}"]
        eval_script.main(["edit", str(facts), *argv])
        path = facts / f"eval_edit_n_edits-5_editors-closed-form{name}.json"
        found[margin] = read_results(path)["closed form", 5]
        assert json.loads(path.read_text())["config"]["margin"] == margin
        assert found[margin]["efficacy"]["value"] == 1
    assert found[6]["probability"] > 2 * found[2]["probability"]


def test_peak_memory_is_what_a_function_needs():
    """40 MB, of which nothing stays."""
    cpu = torch.device("cpu")
    for _ in range(2):  # the second time, no less for what the first one freed
        needed, _ = peak_memory_of(lambda: torch.ones(10_000_000), cpu)
        if needed is None:
            pytest.skip("only Linux counts it")
        assert 39e6 < needed < 60e6
