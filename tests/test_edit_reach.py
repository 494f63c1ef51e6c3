"""edit_reach.py: which questions follow from an edit, and whether planted models answer them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ablate
import eval as eval_script
import train
from analysis import edit_reach
from analysis.edit_comparison import Cell, counterfactual, edit_in_portions
from analysis.editors import EDITORS
from nanorecall.settings import ConfigError
from nanorecall.twohop import read_two_hop
from planted import planted_memory
from toys import as_flags

SMALL = dict(
    data="data_synth", n_layers=2, dim=32, dk=16, dv=16, conv_size=8, init_std=1, lr=1e-2,
    batch_size=64, num_threads=1, model="memory", memory_layers="[1]", mem_n_keys=16,
    mem_k_dim=16, mem_value_lr_scale=4, run_name="a",
)  # fmt: skip


def run_on(texts, **slices):
    """A run of which edit_reach sees these documents, all in the test split."""
    columns = {name: np.array(values) for name, values in slices.items()}
    numbers = np.arange(len(texts))

    def read(split, indices):
        return [texts[i] for i in indices], {name: x[indices] for name, x in columns.items()}

    source = SimpleNamespace(texts=texts, slices=columns, read=read, splits={"test": numbers})
    data, config = SimpleNamespace(source=source), SimpleNamespace(split="test")
    return SimpleNamespace(data=data, config=config)


# ---- two wordings --------------------------------------------------------------------------------


def test_facts_known_in_both_wordings_are_edited():
    texts = ["1:2 ", "3:4 ", "q 1?2", "q 3?4", "5:6 ", "q 5?6"]
    run = run_on(texts, form=["first", "first", "second", "second", "first", "second"])
    known = np.array([0, 1, 2, 5])  # 3:4 in its first wording alone, 5:6 in its second
    indices, asked_beyond, before = edit_reach.editable_facts(run, known)
    assert indices.tolist() == [0]
    (share,) = before.values()
    assert share["value"] == 1 / 2 and share["n"] == 2
    assert asked_beyond(["1:2 "], ["1:7 "], ["8:9 "]) == {
        "generalisation": ["q 1?7"],
        "specificity, other wording": ["q 8?9"],
    }
    with pytest.raises(ConfigError, match="no fact in its first wording"):
        edit_reach.editable_facts(run, np.array([2, 5]))


def test_facts_of_one_wording_are_all_edited():
    run = run_on(["1:2 ", "3:4 ", "5:6 "])
    indices, asked_beyond, before = edit_reach.editable_facts(run, np.array([0, 2]))
    assert indices.tolist() == [0, 2] and before == {}
    assert asked_beyond(["1:2 "], ["1:7 "], ["5:6 "]) == {}


def planted_wordings(same_slot):
    """-> a model, and four facts in both wordings, (tokens, targets) each.

    Fact f is asked by token f, in the second wording by token f + 4; its answer is token f + 1.
    """
    answer_of = torch.tensor([1, 2, 3, 4, 1, 2, 3, 4, 8])
    model = planted_memory(answer_of)
    query = model.layers[0].memory.query.weight
    if same_slot:
        with torch.no_grad():
            query[:, 4:8] = query[:, 0:4]
    first, second = torch.arange(4)[:, None], torch.arange(4, 8)[:, None]
    targets = answer_of[:4, None]
    return model, (first, targets), (second, targets)


@pytest.mark.parametrize("same_slot", [True, False])
def test_an_edit_generalises_if_both_wordings_read_one_slot(same_slot):
    model, first, second = planted_wordings(same_slot)
    edited = (first[0][:2], torch.tensor([[7], [6]]))
    beyond = {
        "generalisation": (second[0][:2], edited[1]),
        "specificity, other wording": (second[0][2:], second[1][2:]),
    }
    others = (first[0][2:], first[1][2:])
    cell = Cell(edited, others, others, others, np.array(["all", "all"]), beyond)
    (measured,) = edit_in_portions(model, EDITORS["closed form"], cell, portions=1)
    assert measured["efficacy"]["value"] == measured["specificity"]["value"] == 1
    assert measured["generalisation"]["value"] == same_slot
    assert measured["specificity, other wording"]["value"] == 1


# ---- two hops ------------------------------------------------------------------------------------

SINGLE = ["1>x2 ", "2>x3 ", "3>x1 ", "1>y3 ", "3>y2 ", "2>y1 "]
QUERIES = ["1>x>y1 ", "2>x>y2 ", "3>y>x3 ", "2>y>x2 "]
KINDS = ["single fact"] * 6 + ["trained"] * 2 + ["in-distribution"] * 2


@pytest.mark.parametrize(
    "text, expected",
    [
        ("43>17 ", ("43", [""], "17")),
        ("16>>30 ", ("16", ["", ""], "30")),
        ("16>>43>30 ", ("16", ["", ""], "43>30")),
        ("1>x2 ", ("1", ["x"], "2")),
        ("1>x>y1 ", ("1", ["x", "y"], "1")),
        ("1>x>y2>1 ", ("1", ["x", "y"], "2>1")),
    ],
)
def test_two_hop_texts_are_read(text, expected):
    assert read_two_hop(text) == expected


def test_facts_that_are_both_hops_of_known_questions_are_edited():
    known = np.array([0, 1, 2, 3, 5, 6, 7, 8])  # not 3>y2, and not 2>y>x2
    run = run_on(SINGLE + QUERIES, query=KINDS)
    indices, _, before = edit_reach.editable_facts(run, known)
    # Known questions begin with 1>x, 2>x, 3>y, and end with 2>y, 3>y, 2>x.
    assert indices.tolist() == [1]
    assert {name: share["value"] for name, share in before.items()} == {
        "two-hop data, in-distribution": 1 / 2,
        "two-hop data, single fact": 5 / 6,
        "two-hop data, trained": 1,
    }


@pytest.mark.parametrize("cot", [False, True])
def test_answers_of_two_hops_follow_from_edited_facts(cot):
    between = ["2>", "3>", "2>", "1>"] if cot else [""] * 4
    queries = [f"{text[:-2]}{b}{text[-2:]}" for text, b in zip(QUERIES, between)]
    run = run_on(SINGLE + queries, query=KINDS)
    _, asked_beyond, _ = edit_reach.editable_facts(run, np.arange(10))
    # The new fact leads 1>x>y over 3, and 2>y>x from 1 to 3.
    assert asked_beyond(["1>x2 "], ["1>x3 "], []) == {
        "portability, first hop": ["1>x>y3>2 " if cot else "1>x>y2 "],
        "portability, second hop": ["2>y>x1>3 " if cot else "2>y>x3 "],
        "specificity, two hops": queries[1:3],
    }
    # Both hops of a question may be edited.
    both = asked_beyond(["2>y1 ", "3>x1 "], ["2>y3 ", "3>x2 "], [])
    assert both["portability, first hop"] == ["2>y>x3>2 " if cot else "2>y>x2 "]


def test_a_counterfactual_of_a_two_hop_fact_is_another_entity():
    rng = np.random.default_rng(0)
    new = {counterfactual("10>x24 ", ["02", "10", "24"], rng) for _ in range(50)}
    assert new == {"10>x02 ", "10>x10 "}


def test_reach_is_described_for_the_most_edits():
    results = []
    for method, edits, value in [("a", 1, 1.0), ("a", 9, 0.1), ("b", 9, 0.3), ("c", 9, 0.2)]:
        results.append({"method": method, "edits": edits, "generalisation": {"value": value}})
    assert list(edit_reach.describe_reach(results)) == [
        "generalisation, 9 facts edited together: a 10%, b 30%, c 20%"
    ]
    assert list(edit_reach.describe_reach([{"method": "a", "edits": 9}])) == []


# ---- runs ----------------------------------------------------------------------------------------


def edit(folder, n):
    """eval.py edit on a run -> its result of the closed form that protects others, n edits."""
    eval_script.main(["edit", str(folder), f"--n_edits=[1,{n}]"])
    assert (folder / f"eval_edit_n_edits-1-{n}.png").stat().st_size > 5000
    saved = json.loads((folder / f"eval_edit_n_edits-1-{n}.json").read_text())
    return saved["by_slice"]["method, edits"][f"closed form, protecting others, {n}"]


def test_a_run_with_two_wordings(tmp_path, capsys):
    facts = dict(task="qa", num_pairs=30, buckets="[8]", forms=2, max_steps=120, eval_interval=120)
    train.main(as_flags({**SMALL, **facts, "lr_schedule": "cosine", "log_dir": tmp_path}))
    result = edit(tmp_path / "a", 5)
    assert result["efficacy"]["value"] >= 0.8 and result["generalisation"]["n"] == 5
    assert result["specificity, other wording"]["n"] == result["specificity"]["n"]
    assert "before editing, known facts, in their other wording: " in capsys.readouterr().out
    with pytest.raises(ConfigError, match="it needs facts of one wording: train with forms=1"):
        ablate.main(["inject", str(tmp_path / "a")])


def test_a_run_with_two_hops(tmp_path, capsys):
    facts = dict(task="twohop", num_entities=10, num_relations=2, phi=1, ood_frac=0, cot_frac=1)
    steps = dict(max_steps=150, eval_interval=150, lr_schedule="cosine")
    train.main(as_flags({**SMALL, **facts, **steps, "log_dir": tmp_path}))
    result = edit(tmp_path / "a", 3)
    assert result["efficacy"]["value"] >= 0.8
    for hop in ("first hop", "second hop"):
        assert 1 <= result[f"portability, {hop}"]["n"] <= 24
    printed = capsys.readouterr().out
    assert "before editing, two-hop data, trained: " in printed
    assert "portability, first hop, 3 facts edited together: " in printed


def test_two_hop_facts_without_markers_are_not_edited(tmp_path):
    facts = dict(task="twohop", num_entities=10, markers=0, max_steps=1)
    train.main(as_flags({**SMALL, **facts, "log_dir": tmp_path}))
    with pytest.raises(ConfigError, match="train with markers=1"):
        eval_script.main(["edit", str(tmp_path / "a")])
