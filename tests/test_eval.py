"""eval.py: accuracy by slice and its files, examples, stored bits, the command line."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import data_mqar
import eval as eval_script
import train
from nanorecall import distributed, metrics, stats
from nanorecall.settings import ConfigError
from toys import run as train_toy


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run with two sizes of test sequences."""
    folder = tmp_path_factory.mktemp("runs")
    sizes = dict(test_sizes="[(16,4),(32,8)]", n_val_examples=20, n_test_examples=30)
    train_toy(folder, "r1", max_steps=40, **sizes)
    return folder


@pytest.fixture(scope="module")
def result(runs):
    """The .json of one run, and columns {name: (N,)} of its .parquet."""
    eval_script.main([str(runs / "r1")])
    saved = json.loads((runs / "r1" / "eval_test.json").read_text())
    columns = pq.read_table(runs / "r1" / "eval_test.parquet").to_pydict()
    return saved, {name: np.array(values) for name, values in columns.items()}


@pytest.mark.parametrize("trained, auto", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_auto_is_the_precision_of_training(tmp_path, capsys, monkeypatch, trained, auto):
    """Not what `auto` would be on this machine."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    autodetect_dtype = distributed.autodetect_dtype

    def elsewhere(name):
        def choose(asked, *others):
            return (dtypes[name], "there") if asked == "auto" else autodetect_dtype(asked, *others)

        return choose

    monkeypatch.setattr(distributed, "autodetect_dtype", elsewhere(trained))
    _, out = train_toy(tmp_path, "r", max_steps=2)
    monkeypatch.setattr(distributed, "autodetect_dtype", elsewhere(auto))
    capsys.readouterr()
    for asked, used, why in (("auto", trained, "as in training"), (auto, auto, "asked for")):
        eval_script.main([out, f"--dtype={asked}"])
        assert f"dtype: {used} ({why})" in capsys.readouterr().out
    for suffix, used in (("", trained), (f"_dtype-{auto}", auto)):
        saved = json.loads((tmp_path / "r" / f"eval_test{suffix}.json").read_text())
        assert saved["config"]["precision"] == used


# ---- accuracy by slice ---------------------------------------------------------------------------


def test_wilson_by_hand():
    """8 of 10: (0.8 + 0.19207) / 1.38415 -+ ... = 0.4902 to 0.9433; the ends stay in [0, 1]."""
    assert stats.wilson_interval(8, 10) == pytest.approx((0.49016, 0.94331), abs=1e-4)
    low, high = stats.wilson_interval(0, 10)
    assert low == 0 and high == pytest.approx(0.27753, abs=1e-4)
    assert stats.wilson_interval(10, 10) == pytest.approx((1 - 0.27753, 1), abs=1e-4)
    assert stats.wilson_interval(0, 0) == (0, 1)


def test_wilson_covers_the_truth_as_often_as_it_says():
    """Coverage of one p swings around 95%, so the mean is held more tightly than each."""
    rng = np.random.default_rng(0)
    coverage = []
    for p in (0.02, 0.1, 0.5, 0.9, 0.97):
        intervals = [stats.wilson_interval(int(k), 200) for k in rng.binomial(200, p, 1000)]
        coverage.append(np.mean([low <= p <= high for low, high in intervals]))
    assert 0.91 < min(coverage) and max(coverage) < 0.985
    assert abs(np.mean(coverage) - 0.95) < 0.015


def test_counts_of_two_batches():
    """Example 4 has a correct and a wrong label, example 6 two correct ones, example 8 no label."""
    batch = {
        "correct": np.array([True, False, True, True]),
        "loss": np.array([0.25, 2.0, 0.5, 0.25], np.float32),
        "example": np.array([4, 4, 6, 6]),
        "exact_match": np.array([False, True, True]),
        "slices": {"kind": np.array([0, 1, 0, 0])},
    }
    found = metrics.merge_batches([batch, batch])
    assert (found["accuracy"], found["labels"]) == (6 / 8, 8)
    assert (found["exact_match"], found["n_examples"]) == (4 / 6, 6)
    assert found["loss"] == 2 * 3 / 8
    first, second = found["by_slice"]["kind"][0], found["by_slice"]["kind"][1]
    assert (first["correct"], first["labels"], first["exact_matches"]) == (6, 6, 4)
    assert (second["correct"], second["labels"], second["loss"]) == (0, 2, 4)


def test_a_target_slice_must_be_in_val_and_in_test():
    def batch(split, step, indices):
        values = {"val": [1, 2], "test": [1, 3]}[split]
        return None, None, {"hops": np.array(values)}

    data = SimpleNamespace(eval_groups=lambda split: [range(2)], batch=batch)
    metrics.check_slice(data, "hops=1", 10)
    message = "hops=2 is not among the slices of test: hops=1 hops=3"
    with pytest.raises(ConfigError, match=message):
        metrics.check_slice(data, "hops=2", 10)
    with pytest.raises(ConfigError, match="among the slices of val: hops=1 hops=2"):
        metrics.check_slice(data, "hops=3", 10)


def test_counts_come_in_one_order():
    """Whatever PYTHONHASHSEED is: results of several ranks are compared byte by byte."""
    ones = np.ones(2)
    batch = dict(correct=ones > 0, loss=ones, example=ones, exact_match=ones > 0)
    found = metrics.merge_batches([{**batch, "slices": {"z": ones, "a": ones}}] * 2)
    order = ["correct", "labels", "exact_matches", "n_examples"]
    order += ["correct_correct", "correct_labels", "labels_labels", "loss"]
    assert list(found["all"]) == list(found["by_slice"]["z"][1]) == order
    assert list(found["by_slice"]) == ["z", "a"]


def test_the_accuracy_is_that_of_training(runs, result):
    status = json.loads((runs / "r1" / "status.json").read_text())
    assert result[0]["metrics"]["accuracy"]["value"] == status["test"]["accuracy"]


@pytest.mark.parametrize("n", [4, 8])
def test_a_slice_is_the_mean_of_its_labels(result, n):
    saved, columns = result
    in_slice = columns["num_kv_pairs"] == n
    correct, example = columns["correct"][in_slice], columns["example"][in_slice]
    cell = saved["by_slice"]["num_kv_pairs"][str(n)]
    assert cell["n"] == 30 * n
    assert cell["value"] == pytest.approx(correct.mean())
    assert cell["ci95"][0] <= cell["value"] <= cell["ci95"][1]
    assert cell["nll"] == pytest.approx(columns["loss"][in_slice].mean(), rel=1e-5)
    exact = [correct[example == index].all() for index in set(example)]
    assert cell["exact"]["n"] == len(exact) == 30
    assert cell["exact"]["value"] == pytest.approx(np.mean(exact))


def test_the_table_has_every_label(runs, result):
    saved, columns = result
    assert len(columns["correct"]) == 30 * 4 + 30 * 8
    assert set(columns["example"]) == set(range(60))
    assert set(columns["size"]) == set(saved["by_slice"]["size"]) == {"16x4", "32x8"}
    loss = saved["metrics"]["loss"]["value"]
    assert loss == pytest.approx(columns["loss"].mean(), rel=1e-5)
    assert (runs / "r1" / "eval_test.png").stat().st_size > 5000


def test_slices_are_printed(runs, capsys):
    eval_script.main([str(runs / "r1")])
    printed = capsys.readouterr().out
    assert "num_kv_pairs" in printed and "95% interval" in printed


def test_other_numbers_of_pairs_than_in_the_runs_own_test(runs, result):
    eval_script.main([str(runs / "r1"), "--num_kv_pairs", "[2, 4]"])
    path = runs / "r1" / "eval_test_num_kv_pairs-2-4.json"
    saved = json.loads(path.read_text())
    cells = saved["by_slice"]["num_kv_pairs"]
    assert {pairs: cell["n"] for pairs, cell in cells.items()} == {"2": 30 * 2, "4": 30 * 4}
    assert saved["metrics"]["accuracy"]["n"] == 30 * 2 + 30 * 4
    assert saved["config"]["num_kv_pairs"] == [2, 4]
    # The run's own result stays.
    own = json.loads((runs / "r1" / "eval_test.json").read_text())
    assert own["by_slice"]["num_kv_pairs"].keys() == {"4", "8"}


def test_numbers_of_pairs_of_a_data_set_on_disk_are_its_own(tmp_path):
    folder = str(tmp_path / "mqar")
    sizes = "--num-samples 100 --seq-len 16 --num-kv-pairs 4 --vocab-size 1024 --num-copies 1"
    data_mqar.main([*sizes.split(), f"--output-dir={folder}"])
    toy = "--n_layers=1 --dim=8 --dk=4 --dv=4 --max_steps=1 --batch_size=4"
    train.main([f"--path={folder}", *toy.split(), f"--log_dir={tmp_path}", "--run_name=disk"])
    with pytest.raises(ConfigError, match="num_kv_pairs needs the task made in memory"):
        eval_script.main([str(tmp_path / "disk"), "--num_kv_pairs=[2]"])


def test_numbers_of_pairs_are_for_mqar(tmp_path):
    sizes = (
        "--n_layers=1 --dim=8 --dk=4 --dv=4 --n_val_examples=8 --n_test_examples=8 --max_steps=1"
    )
    train.main(["--data=data_track", *sizes.split(), f"--log_dir={tmp_path}", "--run_name=parity"])
    with pytest.raises(ConfigError, match="is for runs of data_mqar.py, not of data_track.py"):
        eval_script.main([str(tmp_path / "parity"), "--num_kv_pairs=[2]"])


def test_checkpoint_and_split_can_be_chosen(runs, capsys):
    eval_script.main([str(runs / "r1"), "--split", "val", "--checkpoint=ckpt"])
    assert "ckpt.pt of step 40" in capsys.readouterr().out
    assert (runs / "r1" / "eval_val_checkpoint-ckpt.json").exists()


def test_an_example_of_numbers_is_printed(runs):
    eval_script.main([str(runs / "r1"), "--example=3"])
    example = json.loads((runs / "r1" / "eval_test.json").read_text())["examples"][0]
    assert example["example"] == 3
    assert example["prompt"].split()[-1].isdigit()
    assert 16 <= int(example["answer"]) < 32  # values are the upper half of the vocabulary


def test_printed_examples_are_spread_over_the_whole_split():
    data = SimpleNamespace(eval_groups=lambda split: [range(0, 4), range(4, 10)])
    config = eval_script.EvalConfig(print_examples=4, example=7)
    run = SimpleNamespace(data=data, config=config)
    assert eval_script.indices_to_print(run) == [0, 3, 6, 9, 7]


def test_accuracy_stands_beside_the_best_guess():
    metrics = {
        "accuracy": stats.proportion(9, 10),
        "exact_match": stats.proportion(1, 2),
        "without_knowledge": {"copy the key": 0.1, "majority digit": 0.25},
    }
    sentence = eval_script.describe_accuracy(metrics, "val")
    assert sentence.endswith("the best guess without knowledge (majority digit) gets 25.0%")


def test_bits_stored_by_hand():
    """Three trained facts of two digits, 3 bits each: one known except for 1 bit, one except for 3
    bits, one worse than a guess, which counts as 0."""
    bits_lost = np.array([0.5, 0.5, 2.0, 1.0, 9.0, 9.0, 0.0, 0.0])
    batch = {
        "example": np.repeat(range(4), 2),
        "loss": np.log(2) * bits_lost,
        "slices": {"seen": np.repeat([1, 1, 1, 0], 2)},
    }
    source = SimpleNamespace(capacity={"slice": "seen=1", "facts": 6, "bits": 3.0})
    model = torch.nn.Linear(3, 1)  # 4 parameters
    stored = eval_script.stored_bits([batch], SimpleNamespace(source=source), model)
    assert set(stored) == {"bits stored", "bits stored per parameter"}
    assert stored["bits stored"]["value"] == pytest.approx(6 * (5 + 3 + 0) / 3)
    assert stored["bits stored"]["n"] == 3
    assert stored["bits stored per parameter"]["value"] == pytest.approx(16 / 4)


def test_a_task_without_facts_stores_no_bits():
    data = SimpleNamespace(source=SimpleNamespace(capacity={}))
    assert eval_script.stored_bits([], data, None) == {}


def test_it_reads_config_json_and_runs_no_override_file(tmp_path):
    """A run stays readable when the file that made it is gone or changed."""
    override_file = tmp_path / "c.py"
    override_file.write_text("max_steps = 2\nlog_interval = 1\n")
    args = "--n_layers=1 --dim=8 --dk=4 --dv=4 --input_seq_len=16 --num_kv_pairs=4 --vocab_size=32"
    args += f" --n_test_examples=5 --n_val_examples=5 --run_name=b --log_dir={tmp_path}"
    assert train.main([str(override_file), *args.split()]) == 0
    override_file.write_text("raise SystemExit('was run')")
    assert not eval_script.main([os.path.join(tmp_path, "b")])


# ---- the command line ----------------------------------------------------------------------------


def test_a_command_line_is_parsed_and_not_run():
    name, paths, config = eval_script.parse(["stats", "runs/A", "runs/B", "--split=val"])
    assert (name, paths, config.split) == ("stats", ["runs/A", "runs/B"], "val")


def test_a_run_directory_alone_means_slices():
    name, paths, config = eval_script.parse(["runs/RUN", "--print_examples", "8"])
    assert (name, paths, config.print_examples) == ("slices", ["runs/RUN"], 8)


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "name a run directory or a command"),
        (["nowhere"], "not a run directory"),
        (["compare", "nowhere/*"], "no run with a test result"),
        (["compare"], "name the runs"),
        (["xxxx", "b"], "'xxxx' is no command; choose from slices"),
        (["lgits", "b"], "'lgits' is no command; did you mean logits?"),
        (["logits"], "name one run directory, as in: logits runs/RUN"),
        (["logits", "a", "b"], "name one run directory"),
        (["a", "--splt=val"], "did you mean split"),
        (["a", "--split=vale"], "did you mean val"),
        (["--checkpoint", "a"], "checkpoint='a' must be best or ckpt.*name the run itself without"),
        (["compare", "a", "--split=val"], "no effect: compare does not use it"),
        (["compare", "a", "--print_examples=2"], "no effect: compare does not use it"),
        (["logits", "a", "--print_examples=3"], "logits does not use it, only slices, mqar"),
        (["a", "--output=b"], "no effect: slices does not use it, only compare"),
        (["a", "--n_edits=[2]"], "slices does not use it, only edit, consolidate, all"),
        (["edit", "a", "--n_edits=[0]"], "numbers of at least 1"),
        (["routing", "a", "--n_examples=-1"], "n_examples=-1 must be at least 0"),
    ],
)
def test_a_mistake_is_one_sentence(args, message):
    with pytest.raises(ConfigError, match=message) as error:
        eval_script.main(args)
    assert "\n" not in str(error.value)


def test_all_runs_every_analysis_of_one_run(monkeypatch):
    """Each decides by itself whether it fits the run."""
    called = []

    def report(run, script, commands, names, file):
        called.extend(names)

    monkeypatch.setattr(eval_script, "report", report)
    monkeypatch.setattr(eval_script, "task_of", lambda run: "slices")
    eval_script.run_all(None)
    tasks = {"mqar", "qa", "digits", "twohop", "hashhop", "text"}
    assert set(called) == eval_script.COMMANDS.keys() - tasks - {
        "compare",
        "repair",
        "choices",
        "all",
    }
