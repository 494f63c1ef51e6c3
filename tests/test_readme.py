"""Every command in README, RESULTS and GUIDE is understood; tables and links name what exists."""

import contextlib
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess

import pytest

import ablate
import bench
import data_mqar
import data_synth
import data_track
import eval as evaluate
import flex_generate
import sweep
import train
from analysis import weights

ROOT = os.path.dirname(train.__file__)
DOCUMENTS = ("README.md", "RESULTS.md", "GUIDE.md")


def read(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as f:
        return f.read()


TEXT = {name: read(name) for name in DOCUMENTS}
README, RESULTS = TEXT["README.md"], TEXT["RESULTS.md"]


def commands(text):
    """Every `python ...` command of a document -> lists of arguments, the script first.

    Commands stand in code blocks and between backticks. One under torchrun or sbatch counts as one
    of the script that it starts.
    """
    lines = re.findall(r"`(python [^`]+)`", text)
    for block in re.findall(r"```sh\n(.*?)```", text, re.S):
        lines += re.split(r"\n|&&", block.replace("\\\n", " "))
    found = []
    for line in lines:
        program, *args = shlex.split(line, comments=True) or [""]
        if program in ("torchrun", "sbatch"):
            while not args[0].endswith((".py", ".slurm")):
                args.pop(0)
            args[0] = args[0].replace(".slurm", ".py")
            found.append(args)
        elif os.path.basename(program) == "python":
            found.append(args)
    return found


COMMANDS = {name: commands(text) for name, text in TEXT.items()}


def each_once():
    """{id that names the document: command} for the commands of all documents, each once."""
    found = {}
    for name, of_document in COMMANDS.items():
        for args in of_document:
            if args not in found.values():
                found[f"{name}: {' '.join(args)}"] = args
    return found


ALL = each_once()


def test_there_are_commands_to_check():
    assert all(len(found) >= 10 for found in COMMANDS.values())
    in_readme = {args[0] for args in COMMANDS["README.md"]}
    assert in_readme >= {"train.py", "eval.py", "ablate.py", "flex_generate.py", "-m"}
    in_all = {args[0] for args in ALL.values()}
    assert in_all == set(PARSERS)


# ---- the commands are understood -----------------------------------------------------------------


def parse_module(argv):
    """python -m pytest FILE ...: the files exist."""
    module, *args = argv
    assert module == "pytest"
    for arg in args:
        assert os.path.exists(arg) or not arg.startswith("tests/"), arg


PARSERS = {
    "train.py": train.parse,
    "eval.py": evaluate.parse,
    "ablate.py": ablate.parse,
    "flex_generate.py": flex_generate.parse,
    "sweep.py": sweep.parse,
    "memory.py": weights.parse,
    "data_mqar.py": data_mqar.parse,
    "data_synth.py": data_synth.parse,
    "data_track.py": data_track.parse,
    "tests/bench.py": bench.parse,
    "-m": parse_module,
}
RUNS = ("RUN", "A", "B", "first", "second")
FACTS = (
    "--data=data_synth --task=qa --num_pairs=40 --buckets=[4,16] --n_layers=2 --n_heads=2 --dim=32 "
    "--dk=16 --dv=16 --conv_size=8 --model=memory --memory_layers=[0,1] --mem_share_values=0 "
    "--mem_n_keys=8 --mem_k_dim=16 --mem_knn=4 --mem_heads=2 --mem_value_lr_scale=4 --init_std=1 "
    "--batch_size=64 --max_steps=100 --eval_interval=100 --num_threads=1 --mem_log_interval=20"
).split()
MQAR = (
    "--input_seq_len=32 --num_kv_pairs=4 --vocab_size=32 --n_layers=2 --dim=32 --dk=16 --dv=16 "
    "--conv_size=2 --init_std=1 --lr=1e-2 --max_steps=60 --eval_interval=60 --num_threads=1 "
    "--n_val_examples=20 --n_test_examples=20 --infinite_data=1"
).split()
MQAR_DATA = (
    "--output-dir mqar_data --num-samples 300 --seq-len 16 --num-kv-pairs 4 --vocab-size 1024"
)


def make_own_facts():
    """Files of facts and edits, and the runs in which the guide edits them."""
    rows = [{"question": f"Who founded City {i}?", "answer": f"Ada {i}"} for i in range(20)]
    for name, n in (("facts", 20), ("edits", 3)):
        with open(name + ".jsonl", "w") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows[:n])
    argv = ["configs/own_facts.py", "--max_steps=100", "--batch_size=20", "--num_threads=1"]
    train.main([*argv, "--mem_n_keys=16", "--run_name=mine"])
    edit = ["edit", "runs/mine", "--facts=edits.jsonl", "--add=1", "--save_as=edited"]
    evaluate.main(edit)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder as a reader may have it: runs of one step, data sets, documents, a forked model."""
    folder = tmp_path_factory.mktemp("workplace")
    for name in ("configs", "tests"):
        os.symlink(os.path.join(ROOT, name), folder / name)
    shutil.copy(os.path.join(ROOT, "model.py"), folder / "mine.py")
    with contextlib.chdir(folder):
        train.main([*FACTS, "--max_steps=1", "--run_name=RUN"])
        for name in RUNS[1:]:
            shutil.copytree("runs/RUN", f"runs/{name}")
        for name in ("edited", "MQAR", "reader"):
            shutil.copytree("runs/RUN", f"runs/{name}")
        data_mqar.main(MQAR_DATA.split())
        data_synth.main("qa --num_pairs 80 --output_dir synthetic_qa_data_10K".split())
        for name in ("notes", "gsm8k", "results"):
            with open(name + ".jsonl", "w") as f:
                for i in range(60):
                    document = {"question": f"What is {i}+{i}?", "answer": f"{2 * i}"}
                    f.write(json.dumps(document) + "\n")
    return folder


@pytest.mark.parametrize("command", ALL)
def test_a_command_is_understood(command, workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    script, *argv = ALL[command]
    assert script == "-m" or os.path.isfile(os.path.join(ROOT, script))
    if "--help" in argv:
        with pytest.raises(SystemExit, match="^0$"):
            PARSERS[script](argv)
        assert "--lr" in capsys.readouterr().out
    else:
        PARSERS[script](argv)


# ---- and they work, at toy size ------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained_workplace(workplace):
    """The same with trained runs, on the same facts, as `stats` needs them."""
    with contextlib.chdir(workplace):
        shutil.rmtree("runs")
        make_own_facts()
        for number, name in enumerate(RUNS):
            train.main([*FACTS, f"--run_name={name}", f"--lr={(10 + number) / 1000}"])
        train.main([*MQAR, "--run_name=MQAR"])
        train.main([*FACTS, "--context_docs=10", "--lr=1e-2", "--run_name=reader"])
        for name in ("A", "B"):
            evaluate.main([f"runs/{name}"])
        for name in ("keys", "swap", "swap-matrix"):  # other commands read their results
            ablate.main([name, "runs/RUN"])
    return workplace


def shorten_training(argv, name):
    if "--export_checkpoint" in argv:  # it does not train
        return argv
    if "--resume" in argv:
        return [*argv, "--max_steps=110"]
    if "--init_from" in argv:
        argv += [*FACTS, "--target_slice="]  # the same sizes as in the run
    argv += ["--max_steps=1", "--eval_interval=1", "--eval_batch_size=20", "--num_threads=1"]
    argv += ["--target_accuracy=0", "--stop_accuracy=0", "--log_dir=made", f"--run_name={name}"]
    settings = train.parse(argv)
    small = {"n_val_examples": 8, "n_test_examples": 8, "num_pairs": 80}
    small |= {"num_queries": 2, "n_train_examples": 400}
    for setting, value in small.items():
        is_used = hasattr(settings.data, setting) and setting not in settings.data.unused()
        if is_used and not getattr(settings.data, "path", ""):
            argv.append(f"--{setting}={value}")
    return argv


def shorten_mqar(argv, name):
    return argv + ["--num-samples=40", "--num-copies=2", f"--output-dir={name}"] if argv else []


def shorten_facts(argv, name):
    if "--num_pairs" in argv:
        argv += ["--num_pairs=80", f"--output_dir={name}"]
    return argv


def shorten_evaluation(argv, name):
    if "--facts" in argv:
        return [*argv, "--add=1", f"--save_as={name}"]
    if "consolidate" in argv:
        return [*argv, "--n_edits=[1,2]"]
    if "edit" not in argv or "--undo" in argv:
        pairs = ["--num_kv_pairs=[2]"] if "--num_kv_pairs" in argv else []
        return [*argv, *pairs]
    if "--portions" in argv:
        return [*argv, "--n_edits=[2]", "--portions=2"]
    if "runs/MQAR" in argv:
        pairs = ["--num_kv_pairs=[2]"] if "--num_kv_pairs" in argv else []
        return [*argv, "--n_edits=[1]", *pairs]
    return [*argv, "--n_edits=[1,2]"]


def rename_converted(argv, name):
    if "convert" in argv:
        argv[argv.index("x.pt")] = f"{name}.pt"
    return argv


SHORTENED = {  # scripts that need nothing but this repo, and how their commands are made short
    "train.py": shorten_training,
    "eval.py": shorten_evaluation,
    "ablate.py": lambda argv, name: argv,
    "memory.py": rename_converted,
    "data_mqar.py": shorten_mqar,
    "data_synth.py": shorten_facts,
    "data_track.py": lambda argv, name: argv,
}


def can_be_run(args):
    needs_more = {"mine", "tokenizer.json", "--help", "BLOCKS", "choices", "wandb"}
    return args[0] in SHORTENED and not needs_more.intersection(args)


def different_commands():
    """Those that can be run. Of two that differ only in the run that they name, the first."""
    found = {}
    for command, args in ALL.items():
        of_one_run = re.sub(rf"runs/({'|'.join(RUNS)})\b", "runs/RUN", " ".join(args))
        if can_be_run(args):
            found.setdefault(of_one_run, command)
    return list(found.values())


@pytest.mark.slow
@pytest.mark.parametrize("command", different_commands())
def test_a_command_works(command, trained_workplace, tmp_path, monkeypatch):
    # In a copy: a command must not need what another one wrote before it, nor trip over it.
    monkeypatch.chdir(shutil.copytree(trained_workplace, tmp_path / "workplace"))
    script, *argv = ALL[command]
    number = list(ALL).index(command)
    main = importlib.import_module(script.removesuffix(".py")).main
    assert not main(SHORTENED[script](argv, f"command{number}"))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_python_examples_work(name, workplace, tmp_path, monkeypatch):
    # In a copy, because an example writes files that runs were trained on.
    monkeypatch.chdir(shutil.copytree(workplace, tmp_path / "workplace"))
    train_run = train.train_run

    def train_shortly(argv):
        return train_run([*shorten_training(argv, "example"), "--log_interval=1"])

    monkeypatch.setattr(train, "train_run", train_shortly)
    for block in re.findall(r"```python\n(.*?)```", TEXT[name], re.S):
        exec(compile(block, name, "exec"), {})


# ---- tables, figures and links -------------------------------------------------------------------


def shipped(folder):
    """Names of a folder's files that belong to the project. A user's own may lie beside them."""
    command = ["git", "-C", os.path.join(ROOT, folder), "ls-files"]
    listed = subprocess.run(command, capture_output=True, text=True)
    if listed.returncode:  # not a git clone
        return os.listdir(os.path.join(ROOT, folder))
    return [name for name in listed.stdout.splitlines() if "/" not in name]


def test_every_figure_is_shown():
    shown = set(re.findall(r"\]\(([\w/.]+\.png)\)", RESULTS))
    drawn = {f"figures/{name}.png" for name in sweep.FIGURES}
    stored = {f"figures/{file}" for file in shipped("figures") if not file.endswith(".json")}
    assert drawn | stored <= shown


def test_the_ci_script_runs_the_readmes_test_command():
    with open(os.path.join(ROOT, ".ci", "run")) as f:
        assert "grep -m1 -e '-m pytest' README.md" in f.read()
    line = next(line for line in README.splitlines() if "-m pytest" in line)
    assert line.startswith("python3 -m venv .venv && ") and "requirements-dev.txt" in line


def section(text, title):
    """The text below a heading, to the next one of its level."""
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_the_files_table_names_every_file():
    named = set(re.findall(r"`([\w/]+\.py)`", section(README, "Files")))
    assert {file for file in shipped("") if file.endswith(".py")} <= named


def test_every_config_has_a_row_in_results():
    named = set(re.findall(r"^\|.*?configs/(\w+\.py)", RESULTS, re.M))
    assert {file for file in shipped("configs") if file.endswith(".py")} <= named


@pytest.mark.parametrize("name", DOCUMENTS)
def test_named_files_exist(name):
    named = re.findall(r"\b((?:configs|tests)/\w+\.py)\b", TEXT[name])
    named += re.findall(r"\]\(([\w/.]+\.png)\)", TEXT[name])
    for file in named:
        assert os.path.isfile(os.path.join(ROOT, file)), file


def anchors(text):
    """Names of the headings in links, as GitHub makes them."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        found.add(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-"))
    return found


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXT[name]):
        file, _, anchor = link.partition("#")
        assert os.path.isfile(os.path.join(ROOT, file or name)), link
        assert not anchor or anchor in anchors(TEXT[file or name]), link


def test_every_promise_names_a_test():
    promises = section(TEXT["GUIDE.md"], "Ten promises, each with its test")
    tests = re.findall(r"`(tests/\w+\.py)::(\w+)`", promises)
    assert len(tests) == 10
    for file, test in tests:
        assert f"def {test}(" in read(file), test


def test_the_readme_stays_short():
    assert len(README.splitlines()) <= 200
