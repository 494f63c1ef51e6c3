"""The README's commands are read by the programs they name, and its tables name files that exist."""

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
