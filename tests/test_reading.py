"""What is read back: damaged files, and files that others made, end in a sentence; nothing is lost.

Checkpoints and weights of strangers are tested in test_strangers.py, code in test_user_files.py.
"""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import ablate
import data_mqar
import data_synth
import eval as eval_script
import train
from analysis import compare
from analysis.sweep_runs import Point, is_finished
from nanorecall import plots
from nanorecall.records import parse_json, read_log
from nanorecall.saved_run import load_settings
from nanorecall.settings import ConfigError, RunError, printable

TOY = [
    *("--n_layers=1", "--dim=16", "--dk=8", "--dv=8", "--conv_size=2", "--num_threads=1"),
    *("--max_steps=2", "--eval_interval=1", "--infinite_data=1", "--vocab_size=32"),
    *("--input_seq_len=16", "--num_kv_pairs=2", "--n_val_examples=10", "--n_test_examples=10"),
]
FACTS = [
    *("--n_layers=1", "--dim=32", "--dk=16", "--dv=16", "--conv_size=8", "--num_threads=1"),
    *("--max_steps=120", "--eval_interval=120", "--batch_size=64", "--lr=1e-2", "--init_std=1"),
    *("--data=data_synth", "--task=qa", "--num_pairs=40", "--buckets=[4,16]"),
    *("--model=memory", "--memory_layers=[0]", "--mem_n_keys=8", "--mem_k_dim=16"),
    *("--mem_knn=4", "--mem_heads=2", "--mem_value_lr_scale=4"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two finished runs of MQAR."""
    folder = tmp_path_factory.mktemp("made")
    for seed in (0, 1):
        train.main([*TOY, f"--seed={seed}", f"--run_name=r{seed}", f"--log_dir={folder}"])
    return folder


@pytest.fixture
def runs(made, tmp_path):
    """A copy to damage."""
    return shutil.copytree(made, tmp_path / "runs")


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """A run with memory layers that knows its facts."""
    folder = tmp_path_factory.mktemp("facts")
    train.main([*FACTS, "--run_name=m", f"--log_dir={folder}"])
    return folder / "m"


def changed(path, change):
    """Rewrite a JSON file after change(value)."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


# ---- damaged files -------------------------------------------------------------------------------

ODD = {  # a whole file, or what stands in the place of a value
    "no UTF-8": b'{"step": "\xff\xfe"}',
    "no JSON": b'{"step": 1',
    "another type": b"[1, 2]",
    "null": b"null",
    "deep": b"[" * 100_000,
    "deep enough": b'{"test": ' + b"[" * 200 + b"]" * 200 + b"}",
    "a long number": b'{"step": ' + b"9" * 5000 + b"}",
    "not a number": b'{"step": NaN}',
    "infinite": b'{"test": {"all": {"correct": Infinity}}}',
    "empty": b"",
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("file", ["config.json", "status.json"])
@pytest.mark.usefixtures("undrawn")
def test_a_damaged_run_does_not_take_the_table_of_the_others_away(runs, file, odd, capsys):
    (runs / "r0" / file).write_bytes(ODD[odd])
    eval_script.main(["compare", str(runs / "*")])
    text = capsys.readouterr()
    assert "r1" in text.out and str(runs / "r0") in text.err and "Traceback" not in text.err
    with pytest.raises(ConfigError, match="no run with a test result"):
        eval_script.main(["compare", str(runs / "r0")])


def test_a_number_that_python_reads_as_infinity_is_damage():
    assert parse_json("[1.5, -2e-3, 3]") == [1.5, -0.002, 3]
    with pytest.raises(ValueError, match="1e999 is no number of JSON"):
        parse_json('{"value": 1e999}')


VALUES = ["7", "x", None, [], {}, -1, 1.5, True, 10**400, 1e300, [[1]], "\x1b[2J\ud800"]


def places(value, at=()):
    """Every place in a JSON value, as the keys on the way to it."""
    inner = ()
    if isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, list):
        inner = enumerate(value)
    for key, v in inner:
        yield (*at, key)
        yield from places(v, (*at, key))


def put(value, at, new):
    """A copy of value with `new` at a place; KeyError as `new` takes the key away."""
    value = json.loads(json.dumps(value))
    *way, last = at
    inner = value
    for key in way:
        inner = inner[key]
    if new is KeyError:
        del inner[last]
    else:
        inner[last] = new
    return value


def read_settings(folder):
    return load_settings(folder, train.TrainConfig)


@pytest.mark.parametrize("file", ["config.json", "status.json"])
def test_any_value_may_be_odd(runs, file):
    """A result or a sentence: of every value in a file, another one, or none."""
    path = runs / "r0" / file
    whole = json.loads(path.read_text())
    rng = np.random.default_rng(0)
    n_refused = 0
    for at in places(whole):
        for new in (KeyError, VALUES[rng.integers(len(VALUES))]):
            path.write_text(json.dumps(put(whole, at, new)))
            for read in (compare.read_result, read_settings):
                try:
                    read(str(runs / "r0"))
                except ConfigError as e:
                    assert len(str(e)) < 500
                    n_refused += 1
    assert n_refused > 50


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c["model"].pop("dim"), "dim=64, but the checkpoint was trained with dim=16"),
        (lambda c: c["model"].update(dim=24), "dim=24, but the checkpoint was trained with dim=16"),
        (lambda c: c["train"].update(lr=0.5), "lr=0.5, but the checkpoint was trained with lr="),
        (lambda c: c["data"].update(seed=7), "seed has two values, 0 and 7; which was it"),
    ],
)
def test_a_setting_that_is_missing_or_was_changed_is_not_believed(runs, change, message):
    changed(runs / "r0" / "config.json", change)
    with pytest.raises(ConfigError, match=message):
        eval_script.main([str(runs / "r0")])


def test_a_setting_that_is_newer_than_the_run_has_its_default(runs, capsys):
    """Its checkpoint does not know of it either."""
    changed(runs / "r0" / "config.json", lambda c: c["train"].pop("clip_grad"))
    # This one says where the log goes, which changes no result.
    changed(runs / "r0" / "config.json", lambda c: c["train"].pop("track"))
    eval_script.main([str(runs / "r0")])
    assert "config.json has no clip_grad; their defaults are taken" in capsys.readouterr().err


def test_damaged_lines_of_a_log_are_left_out_and_counted(runs, capsys):
    path = runs / "r0" / "log.jsonl"
    kept = read_log(str(runs / "r0"))
    odd = [b"\xff", b"[" * 9999, b"null", b'{"kind": "eval", "step": 1}']
    odd += [b'{"kind": "train", "step": "1", "loss": 1}']
    path.write_bytes(path.read_bytes() + b"".join(line + b"\n" for line in odd) + b'{"kind": "tr')
    capsys.readouterr()
    assert read_log(str(runs / "r0")) == kept
    assert f"note: 6 lines of {path} are damaged and left out" in capsys.readouterr().err
    eval_script.main(["compare", str(runs / "*")])
    train.main(["--resume", str(runs / "r0"), "--max_steps=3"])
    rows = read_log(str(runs / "r0"))
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [1, 2, 3]


def test_what_a_sweep_cannot_read_is_done_again(runs, capsys):
    os.rename(runs / "r0", runs / "r0_seed0")
    point = Point("a", 0, "r0", " ".join(TOY))
    folder = str(runs / "r0_seed0")
    assert is_finished(point, folder)
    for odd in ODD.values():
        (runs / "r0_seed0" / "status.json").write_bytes(odd)
        assert not is_finished(point, folder)
    assert "status.json is damaged" in capsys.readouterr().err


# ---- data sets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_metadata_that_promises_other_rows_is_refused(tmp_path, format):
    """Else training goes on memory that nobody wrote."""
    words = "--num-samples=20 --seq-len=16 --num-kv-pairs=2 --vocab-size=1024"
    place = [f"--output-dir={tmp_path}/a", f"--output-format={format}"]
    data_mqar.main([*words.split(), *place])
    path = tmp_path / "a" / "metadata.json"
    whole = json.loads(path.read_text())

    def data():
        return data_mqar.Data(data_mqar.Config(path=str(tmp_path / "a"))).batch("train", 0, [0])

    data()
    for at, new, message in (
        (("files", "train", 0, "rows"), 30, "the files of train have 30 rows, not 20"),
        (("seq_len",), 8, "rows that are not of seq_len=8"),
        (("vocab_size",), 8, "tokens that are not below vocab_size=8"),
        (("num_samples",), "20", "'num_samples' is '20', not a whole number"),
        (("files", "train", 0, "name"), "../x", "is '../x', not a path inside its folder"),
        (("files", "train"), None, "'train' is None, not a list"),
    ):
        path.write_text(json.dumps(put(whole, at, new)))
        with pytest.raises(ConfigError, match=message):
            data()
    # Numbers that agree with each other, but not with the files.
    more = put(whole, ("num_samples",), 30)
    for split in ("train", "validation", "test"):
        more = put(more, ("files", split, 0, "rows"), 30)
    path.write_text(json.dumps(more))
    message = r"holds \(20, 16\) tokens .* says \(30, 16\)"
    if format == "parquet":
        message = "part-00000.parquet has not the 30 rows of metadata.json"
    with pytest.raises(ConfigError, match=message):
        data()


def test_metadata_of_facts_is_checked_too(tmp_path):
    data_synth.main(["qa", "--output_dir", str(tmp_path / "a"), "--num_pairs=16"])
    path = tmp_path / "a" / "metadata.json"
    whole = json.loads(path.read_text())
    for at, new, message in (
        (("files", "train", 0, "rows"), 9999, r"part-00000.parquet has 9999 rows; it has \d+"),
        (("label_mask",), "words", "label_mask='words' is not one of"),
        (("baselines", "majority digit"), "high", "not a number from 0 to 1"),
        (("capacity",), {"slice": "seen", "facts": 3, "bits": 1.0}, "be a slice and its value"),
    ):
        path.write_text(json.dumps(put(whole, at, new)))
        with pytest.raises(ConfigError, match=message):
            data_synth.Data(data_synth.Config(path=str(tmp_path / "a")))


# ---- the terminal --------------------------------------------------------------------------------

CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]")


def test_printable_by_hand():
    assert printable("a\x1b[2Jb\u202e\ud800é␣") == "a\\x1b[2Jb\\u202e\\ud800é␣"
    assert printable("a\nb\tc", keep="\n") == "a\nb\\tc" and printable("plain") == "plain"


def test_no_escape_sequence_reaches_the_terminal(runs, tmp_path, capsys, script):
    odd = runs / "a\x1b[31mred\x07"
    os.rename(runs / "r0", odd)
    (runs / "r1" / "status.json").write_text('{"status": "\x1b[2J')
    changed(odd / "config.json", lambda c: c["train"].update(exp_group="0"))
    eval_script.main(["compare", str(runs / "*")])
    eval_script.main([str(odd), "--print_examples=1"])
    eval_script.main(["all", str(odd), "--n_examples=4"])
    text = capsys.readouterr()
    assert "\\x1b[31mred" in text.out and not CONTROL.search(text.out + text.err)
    assert not CONTROL.search(next(odd.glob("report*.md")).read_text())
    notes = tmp_path / "n.jsonl"
    notes.write_text(json.dumps({"\x1b[2Jkey": "a"}) + "\n")
    done = script("train.py", "--data=data_synth", "--task=text", f"--path={notes}", "--n_epochs=0")
    assert done.returncode == 2 and "\\x1b[2Jkey" in done.stderr and not CONTROL.search(done.stderr)
    done = script("train.py", "--\x1b[2J=1")
    assert done.returncode == 2 and not CONTROL.search(done.stderr)


# ---- figures -------------------------------------------------------------------------------------


def test_a_figure_that_cannot_be_written_leaves_the_one_before(runs, monkeypatch):
    from matplotlib.figure import Figure

    eval_script.main([str(runs / "r0")])
    whole = (runs / "r0" / "eval_test.png").read_bytes()
    savefig = Figure.savefig

    def full(self, f, **kwargs):
        savefig(self, f, **kwargs)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    message = "No space left on device; what stood there before is whole"
    run = str(runs / "r0")
    for words in ([run], ["compare", str(runs / "*")], ["attention", run]):
        with pytest.raises(RunError, match=message):
            eval_script.main(words)
    assert (runs / "r0" / "eval_test.png").read_bytes() == whole
    assert not [path for path in runs.rglob("*") if ".tmp" in path.name]
    assert not (runs / "compare.png").exists()


def test_a_run_without_state_is_drawn_beside_others(runs, monkeypatch):
    from matplotlib.axes import Axes

    scales, set_xscale = [], Axes.set_xscale

    def note_scale(axis, scale, **options):
        scales.append(scale)
        set_xscale(axis, scale, **options)

    monkeypatch.setattr(Axes, "set_xscale", note_scale)
    results = [compare.read_result(str(runs / name)) for name in ("r0", "r1")]
    results[0]["state"] = 0
    compare.plot_compare(str(runs / "c.png"), compare.group_seeds(results))
    assert "symlog" in scales and (runs / "c.png").stat().st_size > 5000


def test_a_log_without_evaluations_is_drawn(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"kind": "train", "step": 1, "loss": 2.0}\n')
    plots.plot_curves(str(tmp_path), "title")
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_every_figure_is_written_by_one_function():
    """Else one of them could leave half a figure behind."""
    root = Path(train.__file__).parent
    found = set()
    for folder in ("", "nanorecall", "analysis", "myriadlama"):
        for path in (root / folder).glob("*.py"):
            if "savefig" in path.read_text(encoding="utf-8"):
                found.add(path.name)
    assert found == {"plots.py"}


# ---- results beside each other -------------------------------------------------------------------

TEXTS = [f"--data=TEXTS/{name}/t.jsonl" for name in "ab"]  # two files of the same name
SPLITS = ["--split=val", "--checkpoint=ckpt"]
PAIRS = ["--n_pairs=8", "--n_pairs=8 --exposure_pairs=more_more", "--n_pairs=8 --seed=1"]
ANALYSES = [  # script, command, settings
    (eval_script.main, ["routing"], ["", "--n_examples=8", *SPLITS, *TEXTS]),
    (eval_script.main, ["logits"], ["", "--n_examples=8", "--dtype=bfloat16"]),
    (eval_script.main, [], ["", *SPLITS]),
    (ablate.main, ["swap"], PAIRS),
]


@pytest.mark.parametrize("main, command, settings", ANALYSES)
def test_a_second_analysis_leaves_the_first(facts, tmp_path, capsys, main, command, settings):
    """Each has files of its own, and says in them how it was measured."""
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "t.jsonl").write_text(f'{{"text": "{name} and 2"}}\n' * 6)
    contents, configs = {}, set()
    for args in settings:
        main([*command, str(facts), *args.replace("TEXTS", str(tmp_path)).split()])
        (name,) = re.findall(r"wrote (\S+), \.parquet", capsys.readouterr().out)
        path = Path(name)
        assert path not in contents
        for other, content in contents.items():
            assert other.read_text() == content
        contents[path] = path.read_text()
        configs.add(json.dumps(json.loads(contents[path])["config"]))
    assert len(configs) == len(settings)


def test_a_command_reads_what_was_measured_with_its_settings(facts, tmp_path, capsys):
    without_results = shutil.ignore_patterns("eval_*", "ablate_*")
    run = shutil.copytree(facts, tmp_path / "m", ignore=without_results)
    ablate.main(["keys", str(run), "--n_examples=12", "--ablations=zero"])
    capsys.readouterr()
    ablate.main(["impact", str(run)])  # one result of keys is there
    assert "reading ablate_keys_n_examples-12_ablations-zero" in capsys.readouterr().out
    result = json.loads((run / "ablate_impact_n_examples-12_ablations-zero.json").read_text())
    assert result["config"]["n_examples"] == 12 and result["config"]["ablations"] == "zero"
    ablate.main(["keys", str(run), "--n_examples=12", "--ablations=mean"])
    both = ", ".join(f"ablate_keys_n_examples-12_ablations-{name}" for name in ("mean", "zero"))
    with pytest.raises(ConfigError, match=f"has {both}; name one"):
        ablate.main(["impact", str(run)])
    same = ["--n_examples=12", "--ablations=zero"]
    ablate.main(["keystats", str(run), *same])
    assert (run / "ablate_keystats_n_examples-12_ablations-zero.json").exists()
    missing = "ablate_keys_n_examples-12_ablations-random.parquet"
    with pytest.raises(ConfigError, match=f"{missing} does not exist"):
        ablate.main(["keystats", str(run), "--n_examples=12", "--ablations=random"])


ODD_NUMBERS = [
    ("example", 10**6, "names examples that test has not"),
    ("example", -1, "names examples that test has not"),
    ("slot", 10**6, "names slots that do not exist"),
    ("layer", 7, "names layers without a memory"),
    ("answer_pos", 99, "names labels that its examples have not"),
    ("answer_pos", -1, "names labels that its examples have not"),
]


@pytest.mark.parametrize("column, value, message", ODD_NUMBERS)
def test_a_table_of_other_examples_or_slots_is_refused(column, value, message, facts, tmp_path):
    without_results = shutil.ignore_patterns("eval_*", "ablate_*")
    run = shutil.copytree(facts, tmp_path / "m", ignore=without_results)
    ablate.main(["keys", str(run), "--n_examples=12", "--ablations=zero"])
    (path,) = run.glob("ablate_keys*.parquet")
    table = pq.read_table(path).to_pydict()
    table[column] = [value] * len(table[column])
    # Every label needs each of its slots, so that `corr` looks at all of them.
    table["flip"] = [True] * len(table[column])
    pq.write_table(pa.table(table), path)
    with pytest.raises(ConfigError, match=message):
        ablate.main(["corr", str(run)])


def test_tables_and_statistics_of_other_runs_stay(runs):
    eval_script.main(["compare", str(runs / "*")])
    whole = (runs / "compare.parquet").read_bytes()
    eval_script.main(["compare", str(runs / "r0")])
    assert (runs / "compare.parquet").read_bytes() == whole
    assert len(list(runs.glob("compare_1_runs-*.parquet"))) == 1
    shutil.copytree(runs, runs / "more", ignore=shutil.ignore_patterns("compare*"))
    for folder in (runs, runs / "more"):
        for name in ("r0", "r1"):
            eval_script.main([str(folder / name)])
    eval_script.main(["stats", str(runs / "r0"), str(runs / "r0")])
    eval_script.main(["stats", str(runs / "more" / "r0"), str(runs / "r0")])
    assert len(list((runs / "r0").glob("eval_stats_against_r0*.json"))) == 2


LABELS = {"example": [1, 2, 3], "correct": [True] * 3, "loss": [0.5] * 3}
ODD_COLUMNS = {
    "text": dict.fromkeys(LABELS, ["a"] * 3),
    "null": dict.fromkeys(LABELS, [None] * 3),
    "lists": dict.fromkeys(LABELS, [[1], [], [2]]),
    "nothing": dict.fromkeys(LABELS, []),
    "a slice of nulls": {**LABELS, "kind": [None] * 3},
    "a slice of lists": {**LABELS, "kind": [[1], [], [2]]},
    "other columns": {"x": [1]},
}


@pytest.mark.parametrize("odd", ODD_COLUMNS)
def test_odd_parquet_is_a_sentence(runs, odd):
    pq.write_table(pa.table(ODD_COLUMNS[odd]), runs / "r0" / "eval_test.parquet")
    with pytest.raises(ConfigError, match="python eval.py .* writes it"):
        eval_script.main(["stats", str(runs / "r0")])


def test_a_flipped_bit_of_parquet_is_noticed_or_harmless(runs):
    path = runs / "r0" / "eval_test.parquet"
    eval_script.main([str(runs / "r0")])
    whole, n_noticed = path.read_bytes(), 0
    for at in range(4, len(whole), 97):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            eval_script.main(["stats", str(runs / "r0")])
        except ConfigError:
            n_noticed += 1
    assert n_noticed > 3
