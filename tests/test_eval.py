"""eval.py: its intervals by hand, its files, its figures, its mistakes."""

import json
import os
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

import eval as ev
import train
from analysis import compare
from nanorecall import stats
from nanorecall.settings import ConfigError


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two small finished runs with two test cells, and one that never finished."""
    folder = tmp_path_factory.mktemp("runs")
    toy = "--n_layers=2 --dim=32 --dk=16 --dv=16 --conv_size=2 --init_std=1 --lr=1e-2 --max_steps=40 --infinite_data=1 --num_threads=1"
    cells = "--vocab_size=32 --input_seq_len=16 --num_kv_pairs=4 --test_sizes=[(16,4),(32,8)]"
    toy += " --n_val_examples=20 --n_test_examples=30"
    for seed in (1, 2):
        train.main([*toy.split(), *cells.split(), f"--seed={seed}", f"--run_name=r{seed}", f"--log_dir={folder}"])
    (folder / "unfinished").mkdir()
    (folder / "unfinished" / "config.json").write_text((folder / "r1" / "config.json").read_text())
    return folder


def test_wilson_by_hand():
    """8 of 10: (0.8 + 0.19207) / 1.38415 -+ ... = 0.4902 to 0.9433; the ends stay in [0, 1]."""
    assert stats.wilson_interval(8, 10) == pytest.approx((0.49016, 0.94331), abs=1e-4)
    low, high = stats.wilson_interval(0, 10)
    assert low == 0 and high == pytest.approx(0.27753, abs=1e-4)
    assert stats.wilson_interval(10, 10) == pytest.approx((1 - 0.27753, 1), abs=1e-4)
    assert stats.wilson_interval(0, 0) == (0, 1)


def test_wilson_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    coverage = []
    for p in (0.02, 0.1, 0.5, 0.9, 0.97):  # it swings about 95% with p, so the mean is held tighter than each
        hits = [low <= p <= high for low, high in (stats.wilson_interval(int(k), 200) for k in rng.binomial(200, p, 1000))]
        coverage.append(np.mean(hits))
    assert 0.91 < min(coverage) and max(coverage) < 0.985 and abs(np.mean(coverage) - 0.95) < 0.015


def test_slices_add_up_and_are_saved(runs, capsys):
    ev.main([str(runs / "r1")])
    printed = capsys.readouterr().out
    assert "num_kv_pairs" in printed and "95% interval" in printed
    saved = json.loads((runs / "r1" / "eval_test.json").read_text())
    status = json.loads((runs / "r1" / "status.json").read_text())
    assert saved["metrics"]["accuracy"]["value"] == status["test"]["accuracy"]
    table = pq.read_table(runs / "r1" / "eval_test.parquet").to_pydict()
    hit, pairs, row = (np.array(table[name]) for name in ("hit", "num_kv_pairs", "row"))
    assert len(hit) == 30 * 4 + 30 * 8 and set(table["row"]) == set(range(60))
    for n in (4, 8):
        cell = saved["by_slice"]["num_kv_pairs"][str(n)]
        assert cell["n"] == (pairs == n).sum() and cell["value"] == pytest.approx(hit[pairs == n].mean())
        assert cell["ci95"][0] <= cell["value"] <= cell["ci95"][1]
        rows = [hit[(pairs == n) & (row == r)].all() for r in set(row[pairs == n])]
        assert cell["exact"]["n"] == len(rows) == 30 and cell["exact"]["value"] == pytest.approx(np.mean(rows))
        assert cell["nll"] == pytest.approx(np.array(table["loss"])[pairs == n].mean(), rel=1e-5)
    assert saved["metrics"]["loss"]["value"] == pytest.approx(np.mean(table["loss"]), rel=1e-5)
    assert (runs / "r1" / "eval_test.png").stat().st_size > 5000
    assert set(saved["by_slice"]["size"]) == {"16x4", "32x8"} == set(table["size"])


def test_checkpoint_and_split_can_be_chosen(runs, capsys):
    ev.main([str(runs / "r1"), "--split", "val", "--checkpoint=ckpt"])
    assert "ckpt.pt of step 40" in capsys.readouterr().out
    ev.main([str(runs / "r1"), "--example=3"])  # of numbers, not of letters
    example = json.loads((runs / "r1" / "eval_test.json").read_text())["examples"][0]
    assert example["row"] == 3 and example["prompt"].split()[-1].isdigit() and 16 <= int(example["answer"]) < 32
    assert (runs / "r1" / "eval_val_checkpoint-ckpt.json").exists()


def test_compare_puts_runs_side_by_side(runs, capsys, tmp_path):
    ev.main(["compare", str(runs / "*")])
    text = capsys.readouterr()
    assert "r1" in text.out and "r2" in text.out and "left out" in text.err and "unfinished" in text.err
    table = pq.read_table(runs / "compare.parquet").to_pydict()
    assert table["run"] == ["r1", "r2"] and table["seed"] == [1, 2]
    assert table["state"] == [4 * 2 * (2 * (16 + 16) * 32 + 2 * 3 * 16)] * 2  # cache of 32 tokens, and a convolution of 2
    assert (runs / "compare.png").stat().st_size > 5000
    both = [compare.read_result(str(runs / name)) for name in ("r1", "r2")]
    assert [len(same) for same in compare.group_seeds(both).values()] == [2]  # two seeds of one line
    layers = train.load_run(str(runs / "r1"))[2].layers
    assert both[0]["params"] == sum(q.numel() for q in layers.parameters())
    shutil.copytree(runs / "r1", tmp_path / "early")
    status = json.loads((runs / "r1" / "status.json").read_text()) | {"step": 17}
    (tmp_path / "early" / "status.json").write_text(json.dumps(status))
    assert compare.read_result(str(tmp_path / "early"))["steps"] == 17  # not max_steps


@pytest.mark.parametrize(
    "words, message",
    [
        (["nowhere"], "not a run directory"),
        (["compare", "nowhere/*"], "no run with a test result"),
        (["compare"], "name the runs"),
        (["xxxx", "b"], "'xxxx' is no command; choose from slices"),
        (["lgits", "b"], "'lgits' is no command; did you mean logits?"),
        (["logits", "a", "b"], "name one run"),
        (["a", "--splt=val"], "did you mean split"),
        (["a", "--split=vale"], "did you mean val"),
        (["compare", "a", "--split=val"], "no effect: compare does not use it"),
        (["compare", "a", "--examples=2"], "no effect: compare does not use it"),
        (["a", "--out=b"], "no effect: slices does not use it, only compare"),
        ([], "name a run directory"),
    ],
)
def test_mistakes_are_one_sentence(words, message):
    with pytest.raises(ConfigError, match=message) as error:
        ev.main(words)
    assert "\n" not in str(error.value)


def test_it_reads_config_json_and_runs_no_override_file(runs, tmp_path, script):
    """A run stays readable when the file that made it is gone or changed."""
    bomb = tmp_path / "c.py"
    bomb.write_text("max_steps = 2\nlog_interval = 1\n")
    words = "--n_layers=1 --dim=8 --dk=4 --dv=4 --input_seq_len=16 --num_kv_pairs=4 --vocab_size=32 --n_test_examples=5"
    done = script("train.py", bomb, *words.split(), "--n_val_examples=5", "--run_name=b", f"--log_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    bomb.write_text("raise SystemExit('was run')")
    done = script("eval.py", os.path.join(tmp_path, "b"))
    assert done.returncode == 0 and "was run" not in done.stderr


# ---- rewriting facts ---------------------------------------------------------------------------------------------------


def test_facts_are_rewritten_and_the_model_is_as_before(tmp_path, capsys):
    toy = (
        "--data=data_synth --task=qa --num_pairs=40 --buckets=[16] --n_layers=2 --dim=32 --dk=16 --dv=16 --conv_size=8 --init_std=1"
    )
    toy += (
        " --model=memory --memory_layers=[0,1] --mem_share_values=0 --mem_n_keys=16 --mem_k_dim=16 --lr=1e-2 --mem_value_lr_scale=4"
    )
    toy += " --max_steps=250"
    toy_text = "--data=data_synth --task=text --label_mask=qa --model=memory --mem_n_keys=8 --mem_k_dim=8 --mem_share_values=0"
    train.main([*toy.split(), "--batch_size=64", "--num_threads=1", f"--log_dir={tmp_path}", "--run_name=a", "--eval_interval=250"])
    folder = str(tmp_path / "a")
    capsys.readouterr()
    ev.main(["edit", folder, "--edits=[1,5]"])
    printed = capsys.readouterr().out
    cells = json.loads((tmp_path / "a" / "eval_edit_edits-1-5.json").read_text())["by_slice"]["method and edits"]
    results = {(r["method"], r["edits"]): r for r in cells.values()}
    assert len(results) == 10 and "fine-tune everything" in printed and (tmp_path / "a" / "eval_edit_edits-1-5.png").stat().st_size > 5000
    for n in (1, 5):
        written, kept = results["write", n], results["write, keeping others", n]
        assert written["efficacy"]["value"] >= 0.8 and written["efficacy"]["n"] == n
        assert abs(written["kept"]["n"] - written["specificity"]["n"]) <= 1 and kept["kept"]["value"] >= 0.8
        assert kept["specificity"]["value"] >= written["specificity"]["value"] - 0.1
        assert results["fine-tune everything", n]["efficacy"]["value"] == 1
    path = tmp_path / "t.jsonl"
    path.write_text("".join(f'{{"text": "{i}:{i} "}}\n' for i in range(40)))
    toy_text += f" --path={path} --log_dir={tmp_path} --run_name=t --max_steps=1 --eval_interval=1 --num_threads=1"
    train.main(toy_text.split())
    for words, message in (
        (["edit", str(tmp_path / "t")], "it needs facts of digits, task=qa or digits, not text"),
        (["edit", folder, "--edits=[1000]"], "edits=.* needs 1010"),
        (["edit", folder, "--out=x"], "only compare"),
        ([folder, "--edits=[2]"], "slices does not use it, only edit, all"),
        (["edit", folder, "--edits=[0]"], "numbers of at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            ev.main(words)


def test_another_answer_is_made_of_the_letters_that_answers_have():
    from analysis import editing

    random, letters = np.random.default_rng(0), list("12345")
    for _ in range(50):
        other = editing.counterfactual("34512:51234 ", letters, random)
        key, value = other.strip().split(":")
        assert key == "34512" and set(value) <= set(letters) and all(a != b for a, b in zip(value, "51234"))


def test_bits_stored_by_hand():
    """Three trained facts of two digits: one known but for 1 bit, one half known, one worse than a guess, which counts as 0."""
    from types import SimpleNamespace

    import torch

    nats = np.log(2) * np.array([0.5, 0.5, 2.0, 1.0, 9.0, 9.0, 0.0, 0.0])
    batch = {"row": np.repeat(range(4), 2), "loss": nats, "tags": {"seen": np.repeat([1, 1, 1, 0], 2)}}
    source = SimpleNamespace(capacity={"slice": "seen=1", "facts": 6, "bits": 3.0})
    found = ev.stored_bits([batch], SimpleNamespace(source=source), torch.nn.Linear(3, 1))
    assert found["bits stored"]["value"] == pytest.approx(6 * (5 + 3 + 0) / 3) and found["bits stored"]["n"] == 3
    assert found["bits stored per parameter"]["value"] == pytest.approx(16 / 4) and len(found) == 2
    assert ev.stored_bits([batch], SimpleNamespace(source=SimpleNamespace(capacity={})), None) == {}
