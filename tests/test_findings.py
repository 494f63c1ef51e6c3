"""Sentences computed from numbers that are known, and figures that do not mislead."""

import json

import numpy as np
import pytest

import eval as eval_script
from analysis import (
    attention_maps,
    confidence,
    decoding,
    edit_comparison,
    findings,
    memory_usage,
    significance,
)
from nanorecall import plots
from nanorecall.settings import ConfigError
from nanorecall.stats import proportion
from toys import MEMORY_TOY
from toys import run as train_toy


def test_the_widest_slice_leaves_out_what_may_be_chance():
    by_slice = {
        "few": {"a": proportion(0, 4), "b": proportion(600, 1000)},
        "close": {"a": proportion(50, 100), "b": proportion(55, 100)},
        "apart": {"x": proportion(20, 100), "y": proportion(50, 100), "z": proportion(90, 100)},
        "one": {"x": proportion(1, 2)},
    }
    assert findings.widest_slice(by_slice) == ("apart", "x", "z")
    sentence = findings.describe_widest(by_slice, "accuracy")
    assert sentence == "accuracy differs most by apart: 20.0% at x to 90.0% at z"
    del by_slice["apart"]
    assert findings.widest_slice(by_slice) is None
    assert findings.describe_widest(by_slice, "accuracy").startswith("no slice has values")


def test_heads_are_named_by_role():
    def cells(role, value):
        found = dict.fromkeys(attention_maps.PATTERNS, {"value": 0.0})
        return {**found, "role": role, role: {"value": value}}

    roles = {(0, 0): "diffuse", (1, 0): "previous token", (1, 1): "previous token"}
    by_head = {
        "layer 0, head 0": cells("diffuse", 0.9),
        "layer 1, head 0": cells("previous token", 0.88),
        "layer 1, head 1": cells("previous token", 0.98),
    }
    sentence = attention_maps.describe_roles(by_head, roles)
    assert "diffuse: 0.0; " in sentence
    assert sentence.endswith("previous token: 1.0, 1.1 (0.88 to 0.98 of the attention)")


@pytest.mark.parametrize("accuracy, kind", [(0.5, "overconfident"), (1.0, "underconfident")])
def test_confidence_above_or_below_accuracy(accuracy, kind):
    correct = np.arange(10) < 10 * accuracy
    sentence = confidence.describe_calibration(np.full(10, 0.8), correct, 0.3)
    assert f"mean confidence is 80.0%, accuracy {accuracy:.1%}: the model is {kind}" in sentence


def test_the_most_frequent_error_is_named():
    cells = {kind: proportion(0, 10) for kind in decoding.ANSWER_KINDS}
    cells |= {"correct": proportion(6, 10), "malformed": proportion(3, 10)}
    cells |= {"not in the example": proportion(1, 10)}
    sentence = decoding.describe_errors({"2": cells})
    assert sentence.endswith("60.0% correct with 2 hops (most frequent error: malformed, 30.0%)")


def test_the_first_editor_stands_beside_the_best_of_the_others():
    results = []
    for method, kept in (("a", 0.7), ("b", 0.2), ("c", 0.9)):
        for edits in (1, 10):
            cell = {"efficacy": {"value": 1.0}, "specificity": {"value": kept}}
            cell |= {"probability": 0.5, "seconds": 1.0}
            results.append({"method": method, "edits": edits, **cell})
    first, second = edit_comparison.describe_editors(results)
    assert first.startswith("10 facts edited together, a: 100% of them") and "70%" in first
    assert second.startswith("10 facts edited together, best of the other editors, c:")


@pytest.mark.parametrize(
    "p, words", [(0.2, "no difference in exact match is seen"), (0.01, "B is correct more often")]
)
def test_two_runs_in_words(p, words):
    cell = {"mcnemar": {"p": p}, "exact": [{"value": 0.5}, {"value": 0.6}]}
    cell["accuracy difference"] = {"value": 0.1, "ci95": [-0.1, 0.3]}
    assert words in significance.describe_difference(cell)


def test_few_labels_do_not_set_the_axis():
    """As in MQAR, where 12 of 96,000 labels have a distance of 8."""
    cells = {"8": proportion(12, 12), "16": proportion(9900, 10000)}
    assert plots.large_cells(cells.values()) == [cells["16"]]
    _, _, (axis,) = plots.figure(1, 1)
    plots.draw_slice(axis, "distance", cells)
    assert axis.get_xlabel() == "distance; gray: n < 1%"
    assert not any(line.get_linestyle() == "-" for line in axis.lines)


def test_many_counts_do_not_run_together():
    _, _, (axis,) = plots.figure(1, 1)
    plots.draw_slice(axis, "exposures", {str(i): proportion(1, 1350 + i) for i in range(9)})
    assert {label.get_rotation() for label in axis.get_xticklabels()} == {90}
    _, _, (axis,) = plots.figure(1, 1)
    plots.draw_slice(axis, "position", {str(i): proportion(1, 1350) for i in range(6)})
    assert axis.get_xlabel() == "position (n = 1350 each)"
    assert [label.get_text() for label in axis.get_xticklabels()] == list("012345")


def test_a_report_begins_its_sections_with_findings(tmp_path, capsys):
    _, out = train_toy(tmp_path, "r", max_steps=40, n_test_examples=60)
    eval_script.main(["all", out, "--n_examples=20"])
    report = (tmp_path / "r" / "report_n_examples-20.md").read_text()
    section = report.partition("## mqar")[2].partition("```")[0]
    assert "- " in section and "% of the test labels are correct" in section
    assert "20 of 60 test sequences" in report.partition("## logits")[2].partition("```")[0]
    assert report.splitlines()[-1].startswith("Left out: activations, norms, track, routing")
    saved = json.loads((tmp_path / "r" / "eval_test.json").read_text())
    accuracy = saved["metrics"]["accuracy"]["value"]
    assert f"- {accuracy:.1%} of the test labels" in section


def test_too_many_reads_for_the_memory_are_refused(tmp_path, monkeypatch):
    """A sequence of 16 tokens reads 2 slots with each of 2 heads in 2 layers: 128."""
    _, out = train_toy(tmp_path, "m", max_steps=2, model="memory", **MEMORY_TOY)
    monkeypatch.setattr(memory_usage, "MAX_READS", 1280)
    with pytest.raises(ConfigError, match=r"20 examples read up to 2,560 .*; give --n_examples 10"):
        eval_script.main(["activations", out, "--n_examples=20"])
    eval_script.main(["activations", out, "--n_examples=10"])
    for name in ("norms", "track"):  # they hold no table of all reads
        eval_script.main([name, out, "--n_examples=20"])
