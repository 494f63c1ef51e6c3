"""The commands in README, RESULTS and GUIDE are read by the programs they name; tables and links name what exists."""

import contextlib
import dataclasses
import importlib
import json
import os
import re
import shlex

import pytest

import ablate
import data_mqar
import data_synth
import eval as ev
import flex_generate
import sweep
import train
from nanorecall import mqar_files
from nanorecall.settings import Setting, build_config, reject_unknown, split_argv

ROOT = os.path.dirname(train.__file__)
DOCUMENTS = ("README.md", "RESULTS.md", "GUIDE.md")
TEXT = {name: open(os.path.join(ROOT, name), encoding="utf-8").read() for name in DOCUMENTS}
README, RESULTS = TEXT["README.md"], TEXT["RESULTS.md"]


def commands(text):
    """Every `python ...` command of a document, in code blocks and between backticks -> lists of words from the script on.

    A command under torchrun or sbatch counts as one of the script that it starts.
    """
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.S)).replace("\\\n", " ")
    lines = [part for line in blocks.splitlines() for part in line.split("&&")] + re.findall(r"`(python [^`]+)`", text)
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:1] in (["torchrun"], ["sbatch"]):
            i = next(i for i, w in enumerate(words) if w.endswith((".py", ".slurm")))
            words = ["python", words[i].replace(".slurm", ".py"), *words[i + 1 :]]
        if words and re.fullmatch(r"(.*/)?python", words[0]):
            yield words[1:]


COMMANDS = {name: list(commands(text)) for name, text in TEXT.items()}


def each_once(wanted=lambda words: True):
    """The commands of all documents, each once, as pytest parameters whose ids name the document."""
    seen, found = [], []
    for name in DOCUMENTS:
        for words in COMMANDS[name]:
            if words not in seen and wanted(words):
                seen.append(words)
                found.append(pytest.param(words, id=f"{name}: {' '.join(words)}"))
    return found


def test_there_are_commands_to_check():
    assert all(len(found) >= 10 for found in COMMANDS.values())
    scripts = {"train.py", "eval.py", "ablate.py", "flex_generate.py", "-m"}
    assert scripts <= {c[0] for c in COMMANDS["README.md"]}
    scripts = {"sweep.py", "memory.py", "data_mqar.py", "data_synth.py", "tests/bench.py"}
    assert scripts <= {c[0] for found in COMMANDS.values() for c in found}


@pytest.mark.parametrize("words", each_once())
def test_a_command_is_understood(words, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    script, rest = words[0], words[1:]
    if script == "-m":
        assert rest[0] == "pytest" and all(os.path.exists(w) for w in rest[1:] if w.startswith("tests/"))
        return
    assert os.path.isfile(script)
    positional, settings = split_argv(rest)
    if script == "train.py" and not {"resume", "path", "help"} & {s.key for s in settings} and "mine" not in rest:
        assert train.parse(rest).train.log_dir == "runs"
    elif script == "train.py":
        data = data_synth if ("data", "data_synth") in {(s.key, s.value) for s in settings} else data_mqar
        reject_unknown([s for s in settings if s.key != "help"], train.TrainConfig, data.Config)
    elif script == "eval.py":
        reject_unknown(settings, ev.EvalConfig)
        assert positional[0].startswith("runs/") or all(w.startswith(("runs/", "results.")) for w in positional[1:])
        name = positional[0] if positional[0] in ev.COMMANDS else "slices"
        assert name == positional[0] or positional[0].startswith("runs/")
        assert {s.key for s in settings} <= {*ev.COMMANDS[name].uses.split()}
    elif script == "flex_generate.py":
        build_config(flex_generate.Config, settings)
    elif script == "sweep.py":
        assert build_config(sweep.Config, settings) and set(positional) <= {*sweep.FIGURES, "all"}
    elif script == "ablate.py":
        assert positional[0] in ablate.COMMANDS and all(w.startswith("runs/") for w in positional[1:])
        assert {s.key for s in settings} <= {*ablate.COMMANDS[positional[0]].uses.split()}
    elif script == "memory.py":
        assert positional[0] in ("params", "inspect", "convert") and {s.key for s in settings} <= {"to"}
    elif script == "data_synth.py" and positional == ["check"]:
        reject_unknown(settings, data_synth.CheckConfig)
    elif script == "data_synth.py" and positional:
        assert build_config(data_synth.DatasetConfig, [Setting("task", *positional, "task"), *settings]).output_dir
    elif script == "data_mqar.py" and settings:
        assert build_config(mqar_files.DatasetConfig, settings).num_copies == 100


# ---- and they work, at toy size ----------------------------------------------------------------------------------------

TOY = "--max_steps 1 --eval_interval 1 --eval_batch_size 20 --target_accuracy 0 --stop_accuracy 0 --num_threads 1 --log_dir made --run_name"
FACTS = (
    "--data=data_synth --task=qa --num_pairs=40 --buckets=[4,16] --n_layers=2 --n_heads=2 --dim=32 --dk=16 --dv=16 --conv_size=8 "
    "--model=memory --memory_layers=[0,1] --mem_share_values=0 --mem_n_keys=8 --mem_k_dim=16 --mem_knn=4 --mem_heads=2 "
    "--mem_value_lr_scale=4 --init_std=1 --batch_size=64 --max_steps=150 --eval_interval=150 --num_threads=1 "
    "--mem_log_interval=50"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder as a reader may have it: trained runs, data sets on disk, documents."""
    folder = tmp_path_factory.mktemp("place")
    with contextlib.chdir(folder):
        for i, name in enumerate(("RUN", "A", "B", "first", "second")):  # on the same facts, as stats wants them
            train.main([*FACTS.split(), f"--run_name={name}", f"--lr={(10 + i) / 1000}"])
        for name in ("A", "B"):
            ev.main([f"runs/{name}"])
        ablate.main(["keys", "runs/RUN"])  # what impact, keystats and the like read
        data_mqar.main("--output-dir mqar_data --num-samples 300 --seq-len 16 --num-kv-pairs 4 --vocab-size 1024".split())
        data_synth.main("qa --num_pairs 80 --output_dir synthetic_qa_data_10K".split())
        for name in ("notes", "gsm8k", "results"):
            with open(name + ".jsonl", "w") as f:
                f.writelines(json.dumps({"question": f"What is {i}+{i}?", "answer": f"{2 * i}"}) + "\n" for i in range(60))
    return folder


def runs_anywhere(words):
    """Does the command need no package, model or machine of its own?"""
    other = words[0] in ("-m", "tests/bench.py", "flex_generate.py", "sweep.py")
    return not (other or "mine" in words or "tokenizer.json" in words)


@pytest.mark.slow
@pytest.mark.parametrize("words", each_once(runs_anywhere))
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
        p = train.parse(rest)
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


@pytest.mark.parametrize("name", DOCUMENTS)
def test_python_examples_work(name, place, monkeypatch):
    monkeypatch.chdir(place)
    for block in re.findall(r"```python\n(.*?)```", TEXT[name], re.S):
        exec(compile(block, name, "exec"), {})


# ---- tables, figures and links -----------------------------------------------------------------------------------------


def test_every_figure_is_shown():
    shown = set(re.findall(r"\]\(([\w/.]+\.png)\)", RESULTS))
    assert {f"figures/{name}.png" for name in sweep.FIGURES} <= shown
    assert {os.path.join("figures", f) for f in os.listdir(os.path.join(ROOT, "figures"))} <= shown, "a figure nobody sees"


def test_the_ci_script_runs_the_readmes_test_command():
    script = open(os.path.join(ROOT, ".ci", "run")).read()
    assert "grep -m1 -e '-m pytest' README.md" in script
    line = next(line for line in README.splitlines() if "-m pytest" in line)
    assert line.startswith("python3 -m venv .venv && ") and "requirements-dev.txt" in line


def section(text, title):
    """The text below a heading, to the next one of its level."""
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_the_files_table_names_every_file():
    named = set(re.findall(r"`([\w/]+\.py)`", section(README, "Files")))
    assert {f for f in os.listdir(ROOT) if f.endswith(".py")} <= named


def test_every_config_has_a_row_in_results():
    named = set(re.findall(r"^\|.*?(configs/\w+\.py)", RESULTS, re.M))
    shipped = {f"configs/{f}" for f in os.listdir(os.path.join(ROOT, "configs")) if f.endswith(".py")}
    assert shipped <= named


@pytest.mark.parametrize("name", DOCUMENTS)
def test_named_files_exist(name):
    found = re.findall(r"\b((?:configs|tests)/\w+\.py)\b", TEXT[name]) + re.findall(r"\]\(([\w/.]+\.png)\)", TEXT[name])
    assert [f for f in found if not os.path.isfile(os.path.join(ROOT, f))] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXT[name]):
        file, _, anchor = link.partition("#")
        assert os.path.isfile(os.path.join(ROOT, file or name)), link
        headings = re.findall(r"^#+ (.*)$", TEXT[file or name], re.M) if anchor else []
        anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}  # as GitHub makes them
        assert not anchor or anchor in anchors, link


def test_every_promise_names_a_test():
    promises = re.findall(r"`(tests/\w+\.py)::(\w+)`", section(README, "Ten promises, each with its test"))
    assert len(promises) == 10
    for file, test in promises:
        assert f"def {test}(" in open(os.path.join(ROOT, file), encoding="utf-8").read(), test


def test_the_readme_stays_short():
    assert len(README.splitlines()) <= 200
