"""The settings reader: what it takes, what it refuses and in which words, and that nothing else ever escapes it."""

import os
import random
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

import delta
import train
from nanorecall.build import build_model_config
from nanorecall.settings import (
    ConfigError,
    Setting,
    at_least,
    build_config,
    derived,
    field_docs,
    field_names,
    help_text,
    read_argv,
    reject_unknown,
    run_override_file,
    split_argv,
)


@dataclass
class Toy:
    lr: float = 1e-3  # learning rate
    layers: int = 4  # blocks
    tie: bool = False  # share weights
    name: str = "a"  # label
    stages: tuple[tuple[int, int], ...] = ()  # pairs, steps
    vocab: int = derived(7)

    def check(self):
        at_least(self, 1, "layers")

    def unused(self):
        return {"name": "tie is 0"} if not self.tie else {}


def settings(*words):
    return split_argv(list(words))[1]


def test_both_forms_of_a_flag_dashes_and_bare_flags():
    words, found = split_argv(
        ["a.py", "--lr=1e-2", "--layers", "3", "--num-copies", "-5", "--tie", "--name=x=y"]
    )
    assert words == ["a.py"]
    expected = [
        ("lr", "1e-2"),
        ("layers", "3"),
        ("num_copies", "-5"),
        ("tie", "true"),
        ("name", "x=y"),
    ]
    assert [(s.key, s.value) for s in found] == expected


def test_later_wins_and_types_are_converted():
    toy = build_config(
        Toy,
        settings(
            "--lr", "1", "--lr=2", "--layers=1e1", "--tie", "1", "--stages=[(2, 200), [4, 60]]"
        ),
    )
    assert toy == Toy(lr=2.0, layers=10, tie=True, stages=((2, 200), (4, 60)))
    assert isinstance(toy.lr, float) and isinstance(toy.layers, int)


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--lr=fast", "--lr: lr takes a number, not 'fast'"),
        ("--lr=nan", "finite"),
        ("--layers=2.5", "whole number"),
        ("--layers=0", "--layers: layers=0 must be at least 1"),
        ("--tie=maybe", "0 or 1"),
        ("--stages=5", "takes a list"),
        ("--stages=[(1,)]", "takes 2 values"),
        ("--name=b", "no effect: tie is 0"),
    ],
)
def test_a_wrong_value_is_one_sentence(flag, words):
    with pytest.raises(ConfigError) as error:
        build_config(Toy, settings(flag))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_unknown_names_point_to_the_nearest():
    with pytest.raises(
        ConfigError, match="--layrs: there is no setting 'layrs'; did you mean layers?"
    ):
        reject_unknown(settings("--layrs=2"), Toy)
    with pytest.raises(
        ConfigError, match="there is no setting 'vocab'"
    ):  # told by the data, not by the user
        reject_unknown(settings("--vocab=2"), Toy)


def test_files_come_first_and_in_order(tmp_path):
    for name, lr in (("a.py", 1), ("b.py", 2)):
        (tmp_path / name).write_text(f"lr = {lr}\nlayers = {lr}")
    words, found = read_argv(["--layers=7", str(tmp_path / "a.py"), "x", str(tmp_path / "b.py")])
    assert words == ["x"] and build_config(Toy, found) == Toy(lr=2.0, layers=7)


def test_override_file_gives_file_and_line(tmp_path):
    path = tmp_path / "c.py"
    path.write_text('"""header"""\nimport math\n_private = 1\nlr = math.sqrt(4)\n\nlayers = -1\n')
    found = run_override_file(str(path))
    assert found == [Setting("lr", 2.0, f"{path}:4"), Setting("layers", -1, f"{path}:6")]
    with pytest.raises(ConfigError, match=f"{path}:6: layers=-1 must be at least 1"):
        build_config(Toy, found)
    path.write_text("a = 1\nb = a / 0\n")
    with pytest.raises(ConfigError, match=f"{path}:2: .*ZeroDivisionError"):
        run_override_file(str(path))
    path.write_text("a = (\n")
    with pytest.raises(ConfigError, match="SyntaxError"):
        run_override_file(str(path))
    with pytest.raises(ConfigError, match="cannot read"):
        run_override_file(str(tmp_path / "none.py"))


@pytest.mark.parametrize("cls", [train.TrainConfig, delta.Config])  # one extends another
def test_help_shows_every_setting_with_its_reason(cls):
    text = help_text("Title.", cls)
    docs = field_docs(cls)
    assert "Title." in text and set(field_names(cls)) <= set(docs)
    for name in field_names(cls):
        _, reason = docs[name]
        assert len(reason) > 10, f"{name} has no reason beside it"
        assert f"--{name}=" in text and reason in text


@dataclass
class Grouped:
    steps: int = 5  # how many
    # -- optimizer
    lr: float = 1.0  # how fast
    decay: float = 0.0  # and how slow


def test_help_shows_common_settings_first_then_groups():
    file = "settings of test_configs.py"
    assert help_text("Title.", Grouped, common=("decay", "no_such")).splitlines() == [
        *("Title.", ""),
        *("the settings that one turns most:", f"  --{'decay=0.0':32s} and how slow", ""),
        *(f"{file}:", f"  --{'steps=5':32s} how many", ""),
        *(f"{file}, optimizer:", f"  --{'lr=1.0':32s} how fast"),
    ]


KEYS = "lr model data n_layers num_kv_pairs curriculum test_sizes path use_ffn q_kernel k_norm pos_emb conv_size dim dk du seed zzz"
KEYS = KEYS.split() + ["run_name", "vocab_size", "seq_len"]
TEXTS = [
    "",
    "0",
    "1",
    "-1",
    "1e3",
    "nan",
    "inf",
    "1e999",
    "9" * 5000,
    "9" * 400,
    "9" * 4000,
    "gpt",
    "unified_kv",
    "gated_delta",
    "delta.X",
    "model",
    "os",
    "None",
    "[]",
]
TEXTS += [
    "[(2,200)]",
    "((",
    "[[[[",
    "{}",
    "é",
    "\x00",
    "../x",
    "a b",
    "True",
    "data_mqar",
    "silu",
    "--",
    "-h=",
    "=",
    "0x10",
]
VALUES = "1 -1 2.5 'x' True None [] [(2,3)] {} 1/0 (1,2) lambda:0 object() 10**400 float('nan') [1]*5 b'x' __import__('os')".split()


def random_command_line(r):
    words = []
    for _ in range(r.randrange(6)):
        key = (
            r.choice(KEYS)
            if r.random() < 0.9
            else "".join(r.choices("abc-_=. 1é", k=r.randrange(6)))
        )
        text = (
            r.choice(TEXTS)
            if r.random() < 0.8
            else "".join(r.choices("0123456789.eE+-()[], ", k=r.randrange(12)))
        )
        words += r.choice(
            [[f"--{key}={text}"], [f"--{key}", text], [f"--{key}"], [text], [f"-{key}"]]
        )
    return [w for w in words if w not in ("--help", "-h")]


def random_file(r):
    lines = []
    for _ in range(r.randrange(5)):
        line = f"{r.choice(KEYS)} = {r.choice(VALUES)}"
        lines.append(
            r.choice(
                [
                    line,
                    line,
                    line,
                    "import os",
                    "raise SystemExit(3)",
                    "x = (",
                    "def f(): pass",
                    "del lr",
                    "\tx=1",
                ]
            )
        )
    return "\n".join(lines).encode() + (r.randbytes(r.randrange(8)) if r.random() < 0.1 else b"")


def test_only_config_errors_escape_4000_random_command_lines_and_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    r, outcomes = random.Random(0), {"accepted": 0, "refused": 0}
    for i in range(4000):
        argv = random_command_line(r)
        if i % 2:
            (tmp_path / "c.py").write_bytes(random_file(r))
            argv.insert(0, "c.py")
        try:
            p = train.parse(argv)
            build_model_config(p, SimpleNamespace(vocab_size=64, seq_len=32))
            outcomes["accepted"] += 1
        except ConfigError as e:
            outcomes["refused"] += 1
            assert str(e).strip()
    assert min(outcomes.values()) > 100, outcomes  # the fuzz reaches both ends


def test_an_override_file_is_a_file(tmp_path):
    os.mkfifo(tmp_path / "a.py")
    with pytest.raises(ConfigError, match="a.py is no file"):
        run_override_file(str(tmp_path / "a.py"))
