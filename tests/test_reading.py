"""What is read back: damaged files, other people's files, and names in the wrong place end in a
sentence; nothing is lost."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import ablate
import data_mqar
import data_synth
import eval as ev
import train
from analysis import compare
from analysis.sweep_runs import Point, is_finished
from nanorecall import checkpoint, plots, stats
from nanorecall.files import sha256_file
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
    ev.main(["compare", str(runs / "*")])
    text = capsys.readouterr()
    assert "r1" in text.out and str(runs / "r0") in text.err and "Traceback" not in text.err
    with pytest.raises(ConfigError, match="no run with a test result"):
        ev.main(["compare", str(runs / "r0")])


def test_a_number_that_python_reads_as_infinity_is_damage():
    assert parse_json("[1.5, -2e-3, 3]") == [1.5, -0.002, 3]
    with pytest.raises(ValueError, match="1e999 is no number of JSON"):
        parse_json('{"value": 1e999}')


VALUES = ["7", "x", None, [], {}, -1, 1.5, True, 10**400, 1e300, [[1]], "\x1b[2J\ud800"]


def places(value, at=()):
    """Every place in a JSON value, as the keys on the way to it."""
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
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
    whole, random, refused = json.loads(path.read_text()), np.random.default_rng(0), 0
    for at in places(whole):
        for new in (KeyError, VALUES[random.integers(len(VALUES))]):
            path.write_text(json.dumps(put(whole, at, new)))
            for read in (compare.read_result, read_settings):
                try:
                    read(str(runs / "r0"))
                except ConfigError as e:
                    assert len(str(e)) < 500
                    refused += 1
    assert refused > 50


def test_a_setting_that_is_missing_or_has_two_values_is_not_replaced(runs):
    path = runs / "r0" / "config.json"
    for change, message in (
        (
            lambda c: c["model"].pop("dim"),
            "dim=64, but the checkpoint was trained with dim=16",
        ),
        (lambda c: c["train"].update(lr=0.5), "lr=0.5, but the checkpoint was trained with lr="),
        (lambda c: c["data"].update(seed=7), "seed has two values, 0 and 7; which was it"),
    ):
        whole = path.read_text()
        changed(path, change)
        with pytest.raises(ConfigError, match=message):
            ev.main([str(runs / "r0")])
        path.write_text(whole)


def test_a_model_of_other_sizes_is_a_sentence(runs):
    changed(runs / "r0" / "config.json", lambda c: c["model"].update(dim=24))
    with pytest.raises(ConfigError, match="dim=24, but the checkpoint was trained with dim=16"):
        ev.main([str(runs / "r0")])


@pytest.mark.parametrize(
    "state",
    [
        [1],
        {"step": "3"},
        {"epoch": 3, "tensors": {}},
        {"step": 3, "tensors": 7},
        {"step": 3, "shards": {"folder": "../x"}},
    ],
)
def test_a_sealed_checkpoint_of_another_tool_is_refused_and_stays(runs, state):
    rest = {"best": 0.0, "best_overall": 0.0, "bad_steps": 0, "seconds": 0.0}
    state = {**rest, **state} if isinstance(state, dict) else state
    checkpoint.save_checkpoint(str(runs / "r0"), "best", state)
    before = (runs / "r0" / "best.pt").read_bytes()
    with pytest.raises(ConfigError, match="best.pt.* it is no checkpoint of train.py"):
        ev.main([str(runs / "r0")])
    assert (runs / "r0" / "best.pt").read_bytes() == before


def test_damaged_lines_of_a_log_are_left_out_and_counted(runs, capsys):
    path = runs / "r0" / "log.jsonl"
    kept = read_log(str(runs / "r0"))
    odd = [
        b"\xff",
        b"[" * 9999,
        b"null",
        b'{"kind": "eval", "step": 1}',
        b'{"kind": "train", "step": "1", "loss": 1}',
    ]
    path.write_bytes(path.read_bytes() + b"".join(line + b"\n" for line in odd) + b'{"kind": "tr')
    capsys.readouterr()
    assert read_log(str(runs / "r0")) == kept
    assert f"note: 6 lines of {path} are damaged and left out" in capsys.readouterr().err
    ev.main(["compare", str(runs / "*")])
    train.main(["--resume", str(runs / "r0"), "--max_steps=3"])
    assert [r["step"] for r in read_log(str(runs / "r0")) if r["kind"] == "eval"] == [
        1,
        2,
        3,
    ]


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
    data = lambda: data_mqar.Data(data_mqar.Config(path=str(tmp_path / "a"))).batch("train", 0, [0])
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
    more = put(whole, ("files", "train", 0, "rows"), 30)
    path.write_text(
        json.dumps(put(put(more, ("files", "test", 0, "rows"), 30), ("num_samples",), 30))
    )
    with pytest.raises(ConfigError):
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


# ---- files of your own ---------------------------------------------------------------------------

FORK = """
from model import GPT, Config
from my_helper import NAME

class Model(GPT):
    pass
"""


@pytest.fixture
def fork(tmp_path, monkeypatch):
    """A run of a model file in the working directory, which imports a file beside it; both modules
    are forgotten again."""
    import sys

    place = tmp_path / "place"
    place.mkdir()
    (place / "my_fork.py").write_text(FORK)
    (place / "my_helper.py").write_text("NAME = 'helper'\n")
    monkeypatch.chdir(place)
    train.main([*TOY, "--model=my_fork", "--run_name=f", f"--log_dir={place}"])

    def forget():
        for name in ("my_fork", "my_helper"):
            sys.modules.pop(name, None)

    forget()
    yield place, forget
    forget()


def test_a_fork_is_executed_as_recorded_and_announced(fork, capsys):
    place, _ = fork
    files = json.loads((place / "f" / "config.json").read_text())["files"]
    assert files == {
        str(place / name): sha256_file(place / name) for name in ("my_fork.py", "my_helper.py")
    }
    capsys.readouterr()
    ev.main(["f"])
    text = capsys.readouterr().err
    assert (
        f"note: executing {place}/my_fork.py" in text
        and f"note: executing {place}/my_helper.py" in text
    )


@pytest.mark.parametrize(
    "command",
    [
        lambda: ev.main(["f"]),
        lambda: train.main(["--resume", "f"]),
        lambda: ablate.main(["layer", "f"]),
    ],
)
@pytest.mark.parametrize("name", ["my_fork", "my_helper"])
def test_a_fork_that_changed_is_not_executed(fork, command, name):
    place, _ = fork
    with open(place / f"{name}.py", "a") as f:
        f.write("raise SystemExit('was run')\n")
    with pytest.raises(
        ConfigError,
        match=f"{name}.py is not executed: it has changed since the run began; put back",
    ):
        command()


def test_a_fork_elsewhere_or_gone_is_not_executed(fork, tmp_path, monkeypatch):
    place, forget = fork
    shutil.copytree(place, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    with pytest.raises(
        ConfigError,
        match=f"the run did not record it; the run used {place}/my_fork.py: put that file there",
    ):
        ev.main(["f"])
    os.remove(tmp_path / "copy" / "my_fork.py")
    with pytest.raises(ConfigError, match=f"nor a file here; the run used {place}/my_fork.py: put"):
        ev.main(["f"])


def test_compiled_copies_are_not_trusted(fork):
    """__pycache__ may hold the code of another source of the same size and time."""
    import py_compile

    place, _ = fork
    source = place / "my_fork.py"
    whole, about = source.read_text(), os.stat(source)
    source.write_text("raise SystemExit('was run')".ljust(len(whole)))
    py_compile.compile(str(source), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    source.write_text(whole)
    os.utime(source, ns=(about.st_atime_ns, about.st_mtime_ns))
    ev.main(["f"])


@pytest.mark.parametrize("name", ["pwned", "json", "pwned.Model", "numpy", "configs"])
def test_a_name_in_a_strangers_config_executes_nothing(runs, tmp_path, monkeypatch, name):
    (tmp_path / f"{name.split('.')[0]}.py").write_text("import os\nos.mkdir('was_run')\n")
    monkeypatch.chdir(tmp_path)
    for part in ("model", "data"):
        changed(runs / "r0" / "config.json", lambda c: c["train"].update({part: name}))
        for main, words in (
            (ev.main, ["runs/r0"]),
            (train.main, ["--resume", "runs/r0"]),
            (ablate.main, ["layer", "runs/r0"]),
        ):
            with pytest.raises(ConfigError):
                main(words)
    assert not (tmp_path / "was_run").exists()


def test_a_script_called_from_elsewhere_takes_its_own_files(runs, tmp_path, script):
    for name in ("data_mqar", "model", "draws", "configs", "tokens"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('was run')")
    done = script("eval.py", runs / "r0", cwd=tmp_path)
    assert done.returncode == 0 and "was run" not in done.stderr, done.stderr


def test_a_file_of_your_own_that_fails_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "my_broken.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="my_broken.py:1 does not run \\(SyntaxError"):
        train.parse(["--model=my_broken"])
    (tmp_path / "json.py").write_text("")
    with pytest.raises(ConfigError, match="json.py cannot be taken: Python has a module json, too"):
        train.parse(["--model=json"])


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
    ev.main(["compare", str(runs / "*")])
    ev.main([str(odd), "--print_examples=1"])
    ev.main(["all", str(odd), "--n_examples=4"])
    text = capsys.readouterr()
    assert "\\x1b[31mred" in text.out and not CONTROL.search(text.out + text.err)
    assert not CONTROL.search(next(odd.glob("report*.md")).read_text())
    notes = tmp_path / "n.jsonl"
    notes.write_text(json.dumps({"\x1b[2Jkey": "a"}) + "\n")
    done = script("train.py", "--data=data_synth", "--task=text", f"--path={notes}", "--\x1b[2J=1")
    assert done.returncode == 2 and not CONTROL.search(done.stderr)
    done = script("train.py", "--data=data_synth", "--task=text", f"--path={notes}", "--n_epochs=0")
    assert done.returncode == 2 and "\\x1b[2Jkey" in done.stderr and not CONTROL.search(done.stderr)


# ---- figures -------------------------------------------------------------------------------------


def test_a_figure_that_cannot_be_written_leaves_the_one_before(runs, monkeypatch):
    from matplotlib.figure import Figure

    ev.main([str(runs / "r0")])
    whole = (runs / "r0" / "eval_test.png").read_bytes()
    real = Figure.savefig

    def full(self, f, **kwargs):
        real(self, f, **kwargs)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    for words in (
        [str(runs / "r0")],
        ["compare", str(runs / "*")],
        ["attention", str(runs / "r0")],
    ):
        with pytest.raises(
            RunError, match="No space left on device; what stood there before is whole"
        ):
            ev.main(words)
    assert (runs / "r0" / "eval_test.png").read_bytes() == whole
    assert not [f for _, _, files in os.walk(runs) for f in files if ".tmp" in f]
    assert not (runs / "compare.png").exists()


def test_every_figure_is_written_by_one_function():
    folder = os.path.dirname(plots.__file__)
    found = [
        f
        for f in os.listdir(folder)
        if f.endswith(".py") and "savefig" in open(os.path.join(folder, f)).read()
    ]
    assert found == ["plots.py"]


# ---- results beside each other -------------------------------------------------------------------


TEXTS = [f"--data=TEXTS/{name}/t.jsonl" for name in "ab"]  # two files of the same name
ANALYSES = [
    (
        ev.main,
        ["routing"],
        ["", "--n_examples=8", "--split=val", "--checkpoint=ckpt", *TEXTS],
    ),
    (ev.main, ["logits"], ["", "--n_examples=8", "--dtype=bfloat16"]),
    (ev.main, [], ["", "--split=val", "--checkpoint=ckpt"]),
    (
        ablate.main,
        ["swap"],
        ["--n_pairs=8", "--n_pairs=8 --exposure_pairs=more_more", "--n_pairs=8 --seed=1"],
    ),
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
        (path,) = re.findall(r"wrote (\S+), \.parquet", capsys.readouterr().out)
        assert path not in contents
        for file, content in contents.items():
            assert open(file).read() == content
        contents[path] = open(path).read()
        configs.add(json.dumps(json.loads(contents[path])["config"]))
    assert len(configs) == len(settings)


def test_a_command_reads_what_was_measured_with_its_settings(facts, tmp_path, capsys):
    run = shutil.copytree(
        facts, tmp_path / "m", ignore=shutil.ignore_patterns("eval_*", "ablate_*")
    )
    ablate.main(["keys", str(run), "--n_examples=12", "--ablations=zero"])
    capsys.readouterr()
    ablate.main(["impact", str(run)])  # one result of keys is there
    assert "reading ablate_keys_n_examples-12_ablations-zero" in capsys.readouterr().out
    ablate.main(["keys", str(run), "--n_examples=12", "--ablations=mean"])
    with pytest.raises(
        ConfigError,
        match="has ablate_keys_n_examples-12_ablations-mean, "
        "ablate_keys_n_examples-12_ablations-zero; name one",
    ):
        ablate.main(["impact", str(run)])
    same = ["--n_examples=12", "--ablations=zero"]
    ablate.main(["keystats", str(run), *same])
    assert (run / "ablate_keystats_n_examples-12_ablations-zero.json").exists()
    missing = "ablate_keys_n_examples-12_ablations-random.parquet"
    with pytest.raises(ConfigError, match=f"{missing} does not exist"):
        ablate.main(["keystats", str(run), "--n_examples=12", "--ablations=random"])


def test_tables_and_statistics_of_other_runs_stay(runs):
    ev.main(["compare", str(runs / "*")])
    whole = (runs / "compare.parquet").read_bytes()
    ev.main(["compare", str(runs / "r0")])
    assert (runs / "compare.parquet").read_bytes() == whole and len(
        list(runs.glob("compare_1_runs-*.parquet"))
    ) == 1
    shutil.copytree(runs, runs / "more", ignore=shutil.ignore_patterns("compare*"))
    for folder in (runs, runs / "more"):
        for name in ("r0", "r1"):
            ev.main([str(folder / name)])
    ev.main(["stats", str(runs / "r0"), str(runs / "r0")])
    ev.main(["stats", str(runs / "more" / "r0"), str(runs / "r0")])
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
        ev.main(["stats", str(runs / "r0")])


def test_a_flipped_bit_of_parquet_is_noticed_or_harmless(runs):
    path = runs / "r0" / "eval_test.parquet"
    ev.main([str(runs / "r0")])
    whole, noticed = path.read_bytes(), 0
    for at in range(4, len(whole), 97):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            ev.main(["stats", str(runs / "r0")])
        except ConfigError:
            noticed += 1
    assert noticed > 3


# ---- order and intervals -------------------------------------------------------------------------


def test_keys_of_results_come_in_one_order(script):
    """Whatever PYTHONHASHSEED is."""
    code = "from nanorecall import metrics; import numpy as np; x = np.arange(2); "
    code += "b = dict(correct=x > 0, loss=x * 1.0, example=x, exact_match=x > 0, slices={'a': x}); "
    code += "print(metrics.merge_counts([metrics.count_batch(b)] * 2))"
    command, folder = [sys.executable, "-c", code], os.path.dirname(train.__file__)
    printed = set()
    for seed in ("1", "2", "3"):
        env = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
        printed.add(done.stdout)
    assert len(printed) == 1 and "correct_correct" in printed.pop()


def length(cell):
    return cell["ci95"][1] - cell["ci95"][0]


@pytest.mark.parametrize("size", [1, 6, 32])
def test_intervals_are_shortest_where_all_is_correct(size):
    """300 examples of `size` labels, with more and more errors, each in an example of its own or
    all in as few as hold them."""
    example = np.repeat(np.arange(300), size)
    whole = stats.clustered_proportion(np.ones(len(example)), example)
    assert whole["ci95"] == pytest.approx(stats.wilson_interval(300, 300))
    for alone in (True, False):
        before = whole
        for errors in (1, 2, 3, 5, 9, 30, 100):
            correct = np.ones(len(example), bool)
            wrong = np.arange(errors)
            if alone:
                wrong = wrong * size % len(example)
            correct[wrong] = False
            cell = stats.clustered_proportion(correct, example)
            low, high = cell["ci95"]
            assert 0 <= low <= cell["value"] <= high <= 1 and length(cell) >= length(whole) - 1e-12
            assert low <= before["ci95"][0] + 1e-12
            turned = stats.clustered_proportion(~correct, example)
            assert [1 - x for x in turned["ci95"]] == pytest.approx([high, low])
            before = cell


def test_a_bound_on_what_labels_count_by_hand():
    """Of 1 in 100 examples: as long as 3.8415 / 103.8415. Far from the ends the bound is far above
    all labels."""
    assert stats.max_sample_size(1.0, 100) == pytest.approx(100) == stats.max_sample_size(0.0, 100)
    for p in (0.99, 0.999, 0.9999):
        n = stats.max_sample_size(p, 100)
        low, high = stats.wilson_interval(p * n, n)
        assert high - low == pytest.approx(3.841459 / 103.841459, rel=1e-5) and n > 100
    assert stats.max_sample_size(0.5, 100) > 100_000 / 100


def test_means_of_fractions_stay_between_0_and_1():
    for x in ([1.0] * 10, [0.0] * 10, [0.999] * 9 + [0.9], [0.5], [0.2, 0.9, 0.4]):
        cell = stats.mean_proportion(x)
        assert 0 <= cell["ci95"][0] <= cell["value"] <= cell["ci95"][1] <= 1 and cell[
            "value"
        ] == pytest.approx(np.mean(x))
    correct = np.arange(100) < 80  # of measurements that are 0 or 1: Wilson's, but for n - 1
    interval = stats.wilson_interval(80, 100)
    assert stats.mean_proportion(correct)["ci95"] == pytest.approx(interval, abs=2e-3)
    random = np.random.default_rng(0)
    found = [stats.mean_proportion(random.beta(2, 5, 50))["ci95"] for _ in range(1000)]
    assert 0.93 < np.mean([low <= 2 / 7 <= high for low, high in found]) < 0.97


def test_a_run_without_state_is_drawn_beside_others(runs, monkeypatch):
    from matplotlib.axes import Axes

    scales, real = [], Axes.set_xscale
    monkeypatch.setattr(
        Axes,
        "set_xscale",
        lambda axis, scale, **more: scales.append(scale) or real(axis, scale, **more),
    )
    results = [compare.read_result(str(runs / name)) for name in ("r0", "r1")]
    results[0]["state"] = 0
    compare.plot_compare(str(runs / "c.png"), compare.group_seeds(results))
    assert "symlog" in scales and (runs / "c.png").stat().st_size > 5000


def test_a_setting_that_is_newer_than_the_run_has_its_default(runs, capsys):
    """Its checkpoint does not know of it either."""
    changed(runs / "r0" / "config.json", lambda c: c["train"].pop("clip_grad"))
    # This one says where the log goes, which changes no result.
    changed(runs / "r0" / "config.json", lambda c: c["train"].pop("track"))
    ev.main([str(runs / "r0")])
    assert "config.json has no clip_grad; their defaults are taken" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.GPTBlock", "model.RMSNorm", "memory.MemoryLayer"])
def test_a_part_of_a_model_is_no_model(name):
    with pytest.raises(ConfigError, match="a part of a model, no language model; choose from gpt"):
        train.parse([f"--model={name}"])


def test_a_log_without_evaluations_is_drawn(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"kind": "train", "step": 1, "loss": 2.0}\n')
    plots.plot_curves(str(tmp_path), "title")
    assert (tmp_path / "curves.png").stat().st_size > 5000
