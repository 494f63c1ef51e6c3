"""significance.py: results read back, statistics of one run and of two, by hand."""

import os

import numpy as np
import pytest

import eval as eval_script
import train
from analysis import significance
from analysis.trained_run import write_parquet
from nanorecall import stats
from nanorecall.settings import ConfigError
from toys import run

# Two examples of two labels, one of one. `kind` is of an example, `answer_pos` of a label.
LABELS = {
    "example": np.array([5, 5, 2, 2, 9]),
    "correct": np.array([True, False, True, True, False]),
    "loss": np.array([1.0, 3.0, 0.5, 0.5, 2.0]),
    "kind": np.array([7, 7, 8, 8, 7]),
    "answer_pos": np.array([0, 1, 0, 1, 0]),
}


def test_labels_are_read_in_the_order_of_their_examples(tmp_path):
    write_parquet(str(tmp_path / "eval_test.parquet"), LABELS)
    labels = significance.read_labels(str(tmp_path), "test")
    assert labels["example"].tolist() == [2, 2, 5, 5, 9]
    assert labels["loss"].tolist() == [0.5, 0.5, 1, 3, 2]


def test_labels_of_an_example_are_added():
    examples = significance.per_example(LABELS)
    assert examples.keys() == {"example", "exact_match", "labels", "correct", "loss", "kind"}
    assert examples["example"].tolist() == [2, 5, 9]
    assert examples["exact_match"].tolist() == [True, False, False]
    assert examples["correct"].tolist() == [2, 1, 0]
    assert examples["labels"].tolist() == [2, 2, 1]
    assert examples["loss"].tolist() == [1, 4, 2]
    assert examples["kind"].tolist() == [8, 7, 7]


def test_slices_have_two_to_24_values():
    index = np.arange(50)
    examples = {"example": index, "a": index % 24, "b": index % 25, "c": np.ones(50)}
    names = [name for name, _ in significance.slices_of(examples, ["a", "b", "c"])]
    assert names == ["all", *(f"a={value}" for value in range(24))]


def test_one_run_is_measured_per_label():
    """The loss of an example grows with `size`, that of its labels falls: the correlation is -1."""
    size = np.arange(1, 9)
    examples = {
        "example": np.arange(8),
        "exact_match": size > 6,
        "labels": size * size,
        "correct": size,
        "loss": 1.0 * size,
        "size": size,
    }
    metrics = significance.one_run(examples, ["size"])["metrics"]
    assert metrics["all"]["nll"]["value"] == pytest.approx(36 / 204)
    assert metrics["correlation with loss"]["size"]["value"] == pytest.approx(-1)
    assert metrics["all"]["exact"]["value"] == 2 / 8
    assert metrics["all"]["value"] == pytest.approx(36 / 204)


def test_two_runs_are_the_second_less_the_first():
    """A has 1 of 1 and 0 of 9 labels, B 0 of 1 and 9 of 9: B is better by 8 of 10 labels."""
    same = {"example": np.arange(2), "labels": np.array([1, 9]), "kind": np.array([0, 1])}
    a = {**same, "exact_match": np.array([True, False]), "correct": np.array([1, 0])}
    b = {**same, "exact_match": np.array([False, True]), "correct": np.array([0, 9])}
    a["loss"], b["loss"] = np.array([1.0, 18.0]), np.array([3.0, 0.0])
    result = significance.two_runs(a, b, ["kind"])
    total = result["metrics"]["all"]
    assert total["accuracy difference"]["value"] == pytest.approx(0.8)
    assert total["nll difference"]["value"] == pytest.approx((3 - 1 + 0 - 18) / 10)
    # The extremes of the bootstrap are the same example twice.
    assert total["accuracy difference"]["ci95"] == pytest.approx([-1, 1])
    assert total["nll difference"]["ci95"] == pytest.approx([-2, 2])
    # The test over all examples is not one of several, so it is not corrected.
    assert total["mcnemar"] == {"only_a": 1, "only_b": 1, "p": 1}
    for cell in result["by_slice"].values():
        assert cell["mcnemar"]["p_holm"] == 1


def bootstrap(seed):
    return stats.paired_bootstrap(np.sin(np.arange(20.0)), seed=seed)


def correlation(seed):
    return stats.correlation(np.arange(20.0), np.sin(np.arange(20.0)), seed=seed)


@pytest.mark.parametrize("function", [bootstrap, correlation])
def test_the_seed_decides_what_is_drawn(function):
    assert function(1) == function(1)
    assert function(1)["ci95"] != function(2)["ci95"]


def test_statistics_are_those_of_the_checkpoint(tmp_path):
    """Of that which a report names, and not of an earlier step."""
    _, out = run(tmp_path, max_steps=2, eval_interval=1)
    eval_script.main([out])
    eval_script.main(["stats", out])
    os.remove(os.path.join(out, "eval_stats.json"))
    eval_script.main(["all", out, "--checkpoint=ckpt"])
    written = [name for name in os.listdir(out) if name.startswith("eval_stats")]
    assert "eval_stats_checkpoint-ckpt.json" in written and "eval_stats.json" not in written
    # The best weights are now those of a later step.
    train.main([f"--resume={out}", "--max_steps=60"])
    message = "eval_test.parquet is of step .*, and best.pt of step .*; run python eval.py .* again"
    with pytest.raises(ConfigError, match=message):
        eval_script.main(["stats", out])
    eval_script.main([out])
    eval_script.main(["stats", out])
