"""Model and data files of a user: what a run records of them is executed, and nothing else."""

import importlib
import json
import os
import py_compile
import shutil
import sys

import pytest

import ablate
import eval as eval_script
import train
from nanorecall.files import sha256_file
from nanorecall.saved_run import load_run
from nanorecall.settings import ConfigError
from toys import flags, run

SHORT = dict(max_steps=2, eval_interval=1, n_val_examples=10, n_test_examples=10)
FORK = """
from model import GPT, Config
from my_helper import NAME

class Model(GPT):
    inner_name = NAME
"""


def forget_fork():
    """As in a new process."""
    for name in ("my_fork", "my_helper"):
        sys.modules.pop(name, None)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working directory: a run "f", its model file, and a file beside it that this imports."""
    place = tmp_path / "place"
    place.mkdir()
    (place / "my_fork.py").write_text(FORK)
    (place / "my_helper.py").write_text("NAME = 'helper'\n")
    monkeypatch.chdir(place)
    train.main(flags(place, "f", model="my_fork", **SHORT))
    forget_fork()
    yield place
    forget_fork()


def test_a_fork_is_executed_as_recorded_and_announced(place, capsys):
    paths = [place / "my_fork.py", place / "my_helper.py"]
    files = json.loads((place / "f" / "config.json").read_text())["files"]
    assert files == {str(path): sha256_file(path) for path in paths}
    capsys.readouterr()
    eval_script.main(["f"])
    text = capsys.readouterr().err
    eval_script.main(["f"])  # once in a process
    text += capsys.readouterr().err
    for path in paths:
        assert text.count(f"note: executing {path}, as the run recorded it") == 1


def test_a_file_that_python_would_find_by_itself_is_recorded_too(place, monkeypatch):
    """The folder of the scripts is on sys.path, and forks may lie there."""
    monkeypatch.syspath_prepend(str(place))
    train.main(flags(place, "on_path", model="my_fork", **SHORT))
    files = json.loads((place / "on_path" / "config.json").read_text())["files"]
    assert set(files) == {str(place / "my_fork.py"), str(place / "my_helper.py")}
    forget_fork()
    (place / "my_helper.py").write_text("NAME = 'other'\n")
    with pytest.raises(ConfigError, match="my_helper.py is not executed: it has changed"):
        eval_script.main(["on_path"])


COMMANDS = {
    "eval": lambda: eval_script.main(["f"]),
    "resume": lambda: train.main(["--resume", "f"]),
    "ablate": lambda: ablate.main(["layer", "f"]),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["my_fork", "my_helper"])
def test_a_fork_that_changed_is_not_executed(place, command, name):
    with open(place / f"{name}.py", "a") as f:
        f.write("raise SystemExit('was run')\n")
    message = f"{name}.py is not executed: it has changed since the run began; put back"
    with pytest.raises(ConfigError, match=message):
        COMMANDS[command]()


def test_a_file_that_was_edited_in_between_is_executed_anew(place):
    """In one process, as in a notebook: what a run records is what it ran."""
    assert load_run("f", train.TrainConfig)[2].inner_name == "helper"
    for name, text in (("my_helper", "NAME = 'second'\n"), ("my_fork", FORK + "\n    third = 3\n")):
        (place / f"{name}.py").write_text(text)
        with pytest.raises(ConfigError, match="changed since the run began"):
            load_run("f", train.TrainConfig)
        train.main(flags(place, name, model="my_fork", **SHORT))
        files = json.loads((place / name / "config.json").read_text())["files"]
        assert files == {str(p): sha256_file(p) for p in place.glob("*.py")}
        model = load_run(name, train.TrainConfig)[2]
        assert model.inner_name == "second" and hasattr(model, "third") == (name == "my_fork")


@pytest.mark.parametrize("is_imported", [False, True])
def test_imports_in_functions_are_recorded(place, monkeypatch, is_imported):
    """They are executed later, or were executed for another file before."""
    monkeypatch.syspath_prepend(str(place))
    (place / "my_late.py").write_text("import my_later\n")
    (place / "my_later.py").write_text("LATE = True\n")
    late = "class Model(GPT):\n    def late(self):\n        import my_late\n\n"
    (place / "my_fork.py").write_text(FORK.replace("class Model(GPT):\n", late))
    if is_imported:
        importlib.import_module("my_late")
    train.main(flags(place, "late", model="my_fork", **SHORT, n_epochs=0))
    settings = train.parse(flags(place, "late2", model="my_fork", **SHORT))
    names = {os.path.basename(path) for path in settings.files}
    assert names == {"my_fork.py", "my_helper.py", "my_late.py", "my_later.py"}
    for name in ("my_late", "my_later"):
        sys.modules.pop(name, None)


SETTINGS = {  # a setting of a fork, and why its run could not be opened again
    "hidden: int | None = None": "hidden takes a number, not None",
    "parts: list = field(default_factory=list)": "parts takes a number, not",
    "alpha: int = 0.5": "alpha takes a whole number, not 0.5",
    "reach: float = math.inf": "reach takes a finite number, not inf",
    "names: tuple[str, ...] = (1,)": "names ",
    "beta1: float = 0.5": "beta1 is 0.9 in train.TrainConfig and 0.5 in my_fork.Config; give one",
    "hidden: int": "hidden has no default; set --hidden",
}


@pytest.mark.parametrize("source", ["def half(:\n", b"\xff\xfe = 1\n", "x = 1\0\n"])
def test_a_file_that_never_runs_may_be_broken(place, source):
    (place / "my_fork.py").write_text(FORK + "\ndef plots():\n    import my_scratch\n")
    (place / "my_scratch.py").write_bytes(source if isinstance(source, bytes) else source.encode())
    assert train.main(flags(place, "broken", model="my_fork", **SHORT)) == 0
    recorded = json.loads((place / "broken" / "config.json").read_text())["files"]
    assert str(place / "my_scratch.py") in recorded


DATA = """
import data_mqar

TABLE = []

class Config(data_mqar.Config):
    pass

class Data(data_mqar.Data):
    def __init__(self, config):
        super().__init__(config)
        TABLE.append(config.vocab_size)
"""


def test_model_and_data_share_the_files_that_both_import(place):
    """Each file is executed once, and anew when it was edited: in a notebook, between two runs."""
    names = "my_data", "my_fork", "my_helper"
    (place / "my_fork.py").write_text("import my_data\n" + FORK)
    (place / "my_data.py").write_text("import my_helper\n" + DATA)
    args = flags(place, None, model="my_fork", data="my_data", **SHORT)
    try:
        train.main([*args, "--run_name=g"])
        first = [sys.modules[name] for name in names]
        assert first[0].TABLE == [32] and first[1].my_data is first[0]
        (place / "my_helper.py").write_text("NAME = 'another'\n")
        train.main([*args, "--run_name=h"])
        data, fork, helper = (sys.modules[name] for name in names)
        assert data is not first[0] and data.TABLE == [32]
        assert fork.my_data is data and data.my_helper is helper and fork.NAME == "another"
        train.main([*args, "--run_name=i"])
        assert data is sys.modules["my_data"] and data.TABLE == [32, 32]
    finally:
        sys.modules.pop("my_data", None)


LATE = """
import importlib
from model import GPT, Config
from my_lib import units
DYNAMIC = importlib.import_module("my_helper")

class Model(GPT):
    pass

def late():
    import my_late
    return my_late.x
"""


@pytest.mark.parametrize("name", ["my_lib/units", "my_late", "my_helper"])
def test_what_is_recorded_was_executed(place, monkeypatch, name):
    """However a file is imported. It is edited between two runs of one process."""
    monkeypatch.syspath_prepend(place)
    (place / "my_lib").mkdir()
    (place / "my_lib" / "__init__.py").write_text("")
    for file in ("my_lib/units", "my_late", "my_helper"):
        (place / f"{file}.py").write_text("x = 1\n")
    (place / "my_fork.py").write_text(LATE)
    path, modules = place / f"{name}.py", ("my_lib", "my_lib.units", "my_late")

    def values():
        fork = sys.modules["my_fork"]
        return {"my_lib/units": fork.units.x, "my_late": fork.late(), "my_helper": fork.DYNAMIC.x}

    try:
        for number in (1, 2, 2):
            path.write_text(f"x = {number}\n")
            out = f"r{len(os.listdir(place))}"
            train.main(flags(place, out, model="my_fork", **SHORT))
            recorded = json.loads((place / out / "config.json").read_text())["files"]
            assert values()[name] == number and recorded[str(path)] == sha256_file(path)
        config = json.loads((place / out / "config.json").read_text())
        del config["files"][str(path)]
        (place / out / "config.json").write_text(json.dumps(config))
        with pytest.raises(ConfigError, match="is not executed: the run did not record it"):
            load_run(out, train.TrainConfig)
    finally:
        for module in modules:
            sys.modules.pop(module, None)


def test_files_in_folders_are_recorded(place, monkeypatch):
    """With imports in functions, and relative ones."""
    lib = place / "my_lib"
    (lib / "deep").mkdir(parents=True)
    for path in (lib / "__init__.py", lib / "deep" / "__init__.py"):
        path.write_text("")
    (lib / "model.py").write_text("from . import units\n")  # also the name of a file of ours
    (lib / "units.py").write_text("def f():\n    from .deep.below import x\n")
    (lib / "deep" / "below.py").write_text("from ..above import x\n")
    (lib / "above.py").write_text("x = 1\n")
    late = "\ndef late():\n    from my_lib.model import units\n"
    (place / "my_fork.py").write_text(FORK + late)
    train.main(flags(place, "g", model="my_fork", **SHORT))
    recorded = json.loads((place / "g" / "config.json").read_text())["files"]
    names = {os.path.relpath(path, place) for path in recorded}
    parts = "__init__", "model", "units", "above", "deep/__init__", "deep/below"
    assert names == {"my_fork.py", "my_helper.py", *(f"my_lib/{name}.py" for name in parts)}
    (lib / "above.py").write_text("x = 2\n")
    forget_fork()
    with pytest.raises(ConfigError, match="above.py is not executed: it has changed"):
        eval_script.main(["g"])


def test_a_tuple_for_a_setting_that_takes_json(place):
    (place / "override.py").write_text('freeze = ("embed.*", "layers.0.*")\n')
    args = ["override.py", *flags(place, "g", model="my_fork", **SHORT)]
    assert train.main(args) == 0
    forget_fork()
    assert train.main(["--resume=g", "--max_steps=3"]) == 0


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_that_could_not_be_read_again_are_refused(place, setting):
    code = "import math\nfrom dataclasses import dataclass, field\nfrom model import Config as Ours"
    code += FORK + f"\n@dataclass(kw_only=True)\nclass Config(Ours):\n    {setting}\n"
    (place / "my_fork.py").write_text(code)
    with pytest.raises(ConfigError, match=SETTINGS[setting]):
        train.main(flags(place, "g", model="my_fork", **SHORT))
    assert not (place / "g").exists()


def test_settings_that_can_be_read_again(place):
    code = "from dataclasses import dataclass\nfrom model import Config as Ours"
    code += FORK + "\n@dataclass\nclass Config(Ours):\n    pairs: tuple[tuple[int, float], ...] = "
    code += "((1, 0.5),)\n    name: str = ''\n    seed: int = 0\n    scale: float = 1\n"
    (place / "my_fork.py").write_text(code)
    train.main(flags(place, "g", model="my_fork", **SHORT))
    eval_script.main(["g"])


def test_a_fork_elsewhere_or_gone_is_not_executed(place, tmp_path, monkeypatch):
    shutil.copytree(place, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    moved = f"the run used {place}/my_fork.py: put that file there"
    with pytest.raises(ConfigError, match=f"the run did not record it; {moved}"):
        eval_script.main(["f"])
    os.remove(tmp_path / "copy" / "my_fork.py")
    with pytest.raises(ConfigError, match=f"nor a file here; {moved}"):
        eval_script.main(["f"])


def test_compiled_copies_are_not_trusted(place):
    """__pycache__ may hold the code of another source of the same size and time."""
    source = place / "my_fork.py"
    whole, about = source.read_text(), os.stat(source)
    source.write_text("raise SystemExit('was run')".ljust(len(whole)))
    unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile(str(source), invalidation_mode=unchecked)
    source.write_text(whole)
    os.utime(source, ns=(about.st_atime_ns, about.st_mtime_ns))
    eval_script.main(["f"])


# ---- names of other code -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of our own model and task."""
    folder = tmp_path_factory.mktemp("trained")
    run(folder, **SHORT)
    return folder


@pytest.mark.parametrize("name", ["pwned", "json", "pwned.Model", "numpy", "configs"])
def test_a_name_in_a_strangers_config_executes_nothing(trained, tmp_path, monkeypatch, name):
    shutil.copytree(trained / "run", tmp_path / "f")
    (tmp_path / f"{name.split('.')[0]}.py").write_text("import os\nos.mkdir('was_run')\n")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "f" / "config.json"
    for part in ("model", "data"):
        config = json.loads(path.read_text())
        config["train"][part] = name
        path.write_text(json.dumps(config))
        for command in COMMANDS.values():
            with pytest.raises(ConfigError):
                command()
    assert not (tmp_path / "was_run").exists()


def test_a_script_called_from_elsewhere_takes_its_own_files(trained, tmp_path, script):
    for name in ("data_mqar", "model", "memory", "configs", "analysis"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('was run')")
    done = script("eval.py", trained / "run", cwd=tmp_path)
    assert done.returncode == 0 and "was run" not in done.stderr, done.stderr


def test_a_file_of_your_own_that_fails_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "my_broken.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="my_broken.py:1 does not run \\(SyntaxError"):
        train.parse(["--model=my_broken"])
    (tmp_path / "json.py").write_text("")
    with pytest.raises(ConfigError, match="json.py cannot be taken: Python has a module json, too"):
        train.parse(["--model=json"])


WRONG = """
import torch
from torch import nn
from model import GPT, Config

class Mixer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.proj = nn.Linear(config.dim, config.dim)
    def forward(self, x):
        return self.proj(x)

class TwoInputs(Mixer):
    def forward(self, x, targets):
        return self.proj(x)

class Fails(GPT):
    def __init__(self, config):
        super().__init__(config)
        self.head_size = config.head_size

class Scale(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
    def forward(self, tokens, targets):
        labels = targets[targets >= 0]
        logits = self.gain * nn.functional.one_hot(tokens[targets >= 0], 32).float()
        return self.wrong(logits, labels, nn.functional.cross_entropy(logits, labels))

WRONG = {
    "One": lambda self, logits, labels, loss: logits,
    "Three": lambda self, logits, labels, loss: (logits, loss, loss),
    "NoTensor": lambda self, logits, labels, loss: (logits.tolist(), loss),
    "All": lambda self, logits, labels, loss: (logits.repeat(2, 1), loss),
    "Few": lambda self, logits, labels, loss: (logits[:, :7], loss),
    "Integers": lambda self, logits, labels, loss: (logits.long(), loss),
    "NoLoss": lambda self, logits, labels, loss: (logits, None),
    "Losses": lambda self, logits, labels, loss: (logits, loss.repeat(2)),
    "Cut": lambda self, logits, labels, loss: (logits, loss.detach()),
    "Padded": lambda self, logits, labels, loss: (nn.functional.pad(logits, (0, 9)), loss),
}
for name, wrong in WRONG.items():
    globals()[name] = type(name, (Scale,), {"wrong": wrong})
"""
SENTENCES = {  # class of WRONG: what the sentence says after the name of the file
    "Mixer": r": my_wrong.Mixer does not run \(TypeError: .*forward\(\) takes 2",
    "TwoInputs": r":15: my_wrong.TwoInputs does not run \(RuntimeError: mat1 and mat2",
    "Fails": r":20: my_wrong.Fails does not run \(AttributeError: .*head_size",
    "One": r": my_wrong.One returns a tensor \(4, 32\) of torch.float32;",
    "Three": ": my_wrong.Three returns a tuple of 3 items;",
    "NoTensor": ": my_wrong.NoTensor returns as logits a list of 4 items for 4 labels;",
    "All": r": my_wrong.All returns as logits a tensor \(8, 32\) of torch.float32 for 4 labels;",
    "Few": ": my_wrong.Few returns logits of 7 tokens with a vocab_size of 32;",
    "Integers": r": my_wrong.Integers returns as logits a tensor \(4, 32\) of torch.int64 for",
    "NoLoss": ": my_wrong.NoLoss returns as loss a NoneType, not one number;",
    "Losses": r": my_wrong.Losses returns as loss a tensor \(2,\) of .*, not one number;",
    "Cut": ": my_wrong.Cut returns a loss that has no gradient;",
}


@pytest.mark.parametrize("name", SENTENCES)
def test_a_model_that_returns_no_logits_and_loss_is_a_sentence(tmp_path, monkeypatch, name):
    (tmp_path / "my_wrong.py").write_text(WRONG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_wrong", raising=False)
    what = f"my_wrong.py{SENTENCES[name]}.* Model\\(config\\) must take tokens and targets, both"
    try:
        with pytest.raises(ConfigError, match=what):
            run(tmp_path, model=f"my_wrong.{name}", **SHORT)
        assert not (tmp_path / "run").exists()
        assert run(tmp_path, model="my_wrong.Padded", **SHORT)[0] == 0
    finally:
        sys.modules.pop("my_wrong", None)


@pytest.mark.parametrize("name", ["model.GPTBlock", "model.RMSNorm", "memory.MemoryLayer"])
def test_a_part_of_a_model_is_no_model(name):
    with pytest.raises(ConfigError, match="a part of a model, no language model; choose from gpt"):
        train.parse([f"--model={name}"])
