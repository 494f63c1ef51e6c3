"""The README's commands are read by the programs they name, and its tables name files that exist."""

import contextlib
import dataclasses
import importlib
import json
import os
import re
import shlex

import pytest

import ablate
import configs
import data_mqar
import data_synth
import eval as ev
import flex_generate
import mqar_files
import sweep
import train

ROOT = os.path.dirname(train.__file__)
README = open(os.path.join(ROOT, "README.md"), encoding="utf-8").read()


def commands():
    """Every `python ...` command of the README: of its code blocks, and between backticks; train.py's under torchrun too."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.S)).replace("\\\n", " ")
    lines = [part for line in blocks.splitlines() for part in line.split("&&")] + re.findall(r"`(python [^`]+)`", README)
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:1] in (["torchrun"], ["sbatch"]):
            words = ["python", "train.py", *words[1 + next(i for i, w in enumerate(words) if w.startswith("train.")) :]]
        if words and re.fullmatch(r"(.*/)?python", words[0]):
            yield words[1:]


COMMANDS = list(commands())


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 10 and {"train.py", "eval.py", "data_mqar.py", "data_synth.py", "-m", "tests/bench.py"} <= {
        c[0] for c in COMMANDS
    }


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_is_understood(words, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    script, rest = words[0], words[1:]
    if script == "-m":
        assert rest[0] == "pytest" and all(os.path.exists(w) for w in rest[1:] if not w.startswith("-"))
        return
    assert os.path.isfile(script)
    positional, settings = configs.parse(rest)
    if script == "train.py" and not {"resume", "path", "help"} & {s.key for s in settings} and "mine" not in rest:
        assert train.read_command_line(rest)[0].train.log_dir == "runs"
    elif script == "train.py":
        data = data_synth if ("data", "data_synth") in {(s.key, s.value) for s in settings} else data_mqar
        configs.check_names([s for s in settings if s.key != "help"], train.TrainConfig, data.Config)
    elif script == "eval.py":
        configs.check_names(settings, ev.EvalConfig)
        assert positional[0].startswith("runs/") or all(w.startswith(("runs/", "results.")) for w in positional[1:])
        name = positional[0] if positional[0] in ev.COMMANDS else "slices"
        assert name == positional[0] or positional[0].startswith("runs/")
        assert {s.key for s in settings} <= {*ev.COMMANDS[name].uses.split()}
    elif script == "flex_generate.py":
        configs.build(flex_generate.Config, settings)
    elif script == "sweep.py":
        assert configs.build(sweep.Config, settings) and set(positional) <= {*sweep.FIGURES, "all"}
    elif script == "ablate.py":
        assert positional[0] in ablate.COMMANDS and all(w.startswith("runs/") for w in positional[1:])
        assert {s.key for s in settings} <= {*ablate.COMMANDS[positional[0]].uses.split()}
    elif script == "memory.py":
        assert positional[0] in ("params", "inspect", "convert") and {s.key for s in settings} <= {"to"}
    elif script == "data_synth.py" and positional == ["check"]:
        configs.check_names(settings, data_synth.CheckConfig)
    elif script == "data_synth.py" and positional:
        assert configs.build(data_synth.StoreConfig, [configs.Setting("task", *positional, "task"), *settings]).output_dir
    elif script == "data_mqar.py" and settings:
        assert configs.build(mqar_files.StoreConfig, settings).num_copies == 100


# ---- and they work, at toy size ----------------------------------------------------------------------------------------

TOY = "--max_steps 1 --eval_interval 1 --eval_batch_size 20 --target 0 --stop_accuracy 0 --threads 1 --log_dir made --run_name"
FACTS = (
    "--data=data_synth --task=qa --num_pairs=40 --buckets=[4,16] --n_layers=2 --n_heads=2 --dim=32 --dk=16 --dv=16 --conv=8 "
    "--model=memory --memory_layers=[0,1] --mem_share_values=0 --mem_n_keys=8 --mem_k_dim=16 --mem_knn=4 --mem_heads=2 "
    "--mem_value_lr=4 --init_std=1 --batch_size=64 --max_steps=150 --eval_interval=150 --threads=1 "
    "--mem_stats_every=50"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder as the README's reader may have it: trained runs, data sets on disk, documents."""
    folder = tmp_path_factory.mktemp("place")
    with contextlib.chdir(folder):
        for i, name in enumerate(("RUN", "A", "B", "first", "second")):  # on the same facts, as stats wants them
            train.main([*FACTS.split(), f"--run_name={name}", f"--lr={(10 + i) / 1000}"])
        for name in ("A", "B"):
            ev.main([f"runs/{name}"])
        data_mqar.main("--output-dir mqar_data --num-samples 300 --seq-len 16 --num-kv-pairs 4 --vocab-size 1024".split())
        data_synth.main("qa --num_pairs 80 --output_dir synthetic_qa_data_10K".split())
        for name in ("notes", "gsm8k", "results"):
            with open(name + ".jsonl", "w") as f:
                f.writelines(json.dumps({"question": f"What is {i}+{i}?", "answer": f"{2 * i}"}) + "\n" for i in range(60))
    return folder


def to_run():
    """The README's commands that take no package or machine of their own; each once."""
    seen = []
    for words in COMMANDS:
        other = (
            words[0] in ("-m", "tests/bench.py", "flex_generate.py", "sweep.py") or "mine" in words or "tokenizer.json" in words
        )
        if not other and words not in seen:
            seen.append(words)
    return seen


@pytest.mark.parametrize("words", to_run(), ids=" ".join)
def test_a_command_works(words, place, monkeypatch, capsys):
    script, rest = words[0].removesuffix(".py"), list(words[1:])
    main = importlib.import_module(script).main
    monkeypatch.chdir(place)
    rest = [os.path.join(ROOT, w) if w.startswith("configs/") else w for w in rest]
    if "--help" in rest:
        with pytest.raises(SystemExit, match="0"):
            main(rest)
        assert "--lr" in capsys.readouterr().out
        return
    if script == "train" and "--resume" not in rest:
        rest += [*FACTS.split(), "--target_slice="] if "--init_from" in rest else []  # of the same sizes
        rest += f"{TOY} {len(os.listdir(place / 'made')) if (place / 'made').exists() else 0}".split()
        p = train.plan(configs.collect(rest)[1])
        small = {"n_val_examples": 8, "n_test_examples": 8, "num_pairs": 80, "num_queries": 2, "n_train_examples": 400}
        used = {f.name: f.default for f in dataclasses.fields(p.data)}
        smaller = {k: v for k, v in small.items() if k in used and k not in p.data.unused()} if not p.data.path else {}
        rest += [f"--{k}={v}" for k, v in smaller.items()]
    elif script == "data_mqar" and rest:
        rest += ["--num-samples=40", "--num-copies=2", "--output-dir=made_mqar"]
    elif script == "data_synth" and "--num_pairs" in rest:
        rest += ["--num_pairs=80", f"--output_dir=made{len(os.listdir(place))}"]
    elif script == "eval" and "edit" in rest:
        rest += ["--edits=[1,2]"]
    elif script == "memory" and "convert" in rest:
        rest[2] = f"x{len(os.listdir(place))}.pt"
    assert not main(rest)


def test_every_figure_is_shown():
    assert {f"figures/{name}.png" for name in sweep.FIGURES} <= set(re.findall(r"\]\(([\w/.]+\.png)\)", README))
    shown = {os.path.join("figures", f) for f in os.listdir(os.path.join(ROOT, "figures"))}
    assert shown <= set(re.findall(r"\]\(([\w/.]+\.png)\)", README)), "a figure that nobody sees"


def test_the_ci_script_runs_the_readmes_test_command():
    script = open(os.path.join(ROOT, ".ci", "run")).read()
    assert "grep -m1 -e '-m pytest' README.md" in script
    line = next(line for line in README.splitlines() if "-m pytest" in line)
    assert line.startswith("python3 -m venv .venv && ") and "requirements.txt" in line


def test_files_and_configs_in_tables_exist():
    named = re.findall(r"^\| `([\w./]+\.py)`", README, re.M)
    assert {f for f in os.listdir(ROOT) if f.endswith(".py")} <= set(named)
    named += re.findall(r"configs/\w+\.py", README)
    missing = [f for f in named if not os.path.isfile(os.path.join(ROOT, f))]
    assert missing == []
    shipped = {f"configs/{f}" for f in os.listdir(os.path.join(ROOT, "configs")) if f.endswith(".py")} - {"configs/__init__.py"}
    assert shipped <= set(named), "a config has no row in the README"
    assert all(os.path.isfile(os.path.join(ROOT, f)) for f in re.findall(r"\]\(([\w/.]+\.png)\)", README))
