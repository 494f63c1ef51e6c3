"""settings.py: what it accepts, and that everything else is refused in one sentence."""

import os
import random
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

import data_synth
import delta
import train
from nanorecall.build import build_model_config
from nanorecall.settings import (
    OUR_SETTINGS,
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
    reject_unused,
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
    argv = "a.py --lr=1e-2 --layers 3 --num-copies -5 --tie --name=x=y".split()
    args, found = split_argv(argv)
    assert args == ["a.py"]
    assert {s.key: s.value for s in found} == {
        "lr": "1e-2",
        "layers": "3",
        "num_copies": "-5",
        "tie": "true",
        "name": "x=y",
    }


def test_later_wins_and_types_are_converted():
    flags = ["--lr", "1", "--lr=2", "--layers=1e1", "--tie", "1", "--stages=[(2, 200), [4, 60]]"]
    toy = build_config(Toy, settings(*flags))
    assert toy == Toy(lr=2.0, layers=10, tie=True, stages=((2, 200), (4, 60)))
    assert isinstance(toy.lr, float) and isinstance(toy.layers, int)


@pytest.mark.parametrize(
    "flag, message",
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
def test_a_wrong_value_is_one_sentence(flag, message):
    with pytest.raises(ConfigError) as error:
        build_config(Toy, settings(flag))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_all_settings_without_effect_are_named_at_once():
    first, second = Setting("layers", 2, "a.py:3"), Setting("name", "b", "--name")
    mine = {s.key: s for s in (first, second)}
    toy = Toy(layers=2, name="b", lr=0.1)
    with pytest.raises(ConfigError) as error:
        reject_unused(toy, {"layers": "tie is 0", "name": "tie is 0", "lr": "none is left"}, mine)
    assert str(error.value) == (
        "lr=0.1 has no effect: none is left; layers=2 (a.py:3), name='b' have no effect: "
        "tie is 0; leave them out"
    )
    reject_unused(Toy(), {"layers": "tie is 0"}, {})


def test_unknown_names_point_to_the_nearest():
    message = "--layrs: there is no setting 'layrs'; did you mean layers?"
    with pytest.raises(ConfigError, match=message):
        reject_unknown(settings("--layrs=2"), Toy)


def test_settings_of_llmonade_point_to_ours():
    flags = ["--lr=1", "--checkpoint.pretrained_layer_path=x", "--training.layers", "3"]
    flags += ["--checkpoint.pretrained-layer-map={}", "--training.apply_qa_mask", "--odd"]
    with pytest.raises(ConfigError) as error:
        reject_unknown(settings(*flags), Toy)
    assert str(error.value) == (
        "--checkpoint.pretrained_layer_path: there is no setting "
        "'checkpoint.pretrained_layer_path'; write init_from; "
        "for --training.layers write layers; "
        "for --checkpoint.pretrained-layer-map write init_map; "
        "for --training.apply_qa_mask write label_mask=qa with data=data_synth and task=text"
    )


def test_what_llmonade_settings_point_to_exists():
    known = field_names(train.TrainConfig) + field_names(data_synth.Config)
    for ours in OUR_SETTINGS.values():
        name, _, value = ours.partition("=")
        assert name in known
        assert not value or value.split()[0] in data_synth.MASKS


def test_a_derived_value_is_no_setting():
    with pytest.raises(ConfigError, match="there is no setting 'vocab'"):
        reject_unknown(settings("--vocab=2"), Toy)


def test_files_come_first_and_in_order(tmp_path):
    for name, lr in (("a.py", 1), ("b.py", 2)):
        (tmp_path / name).write_text(f"lr = {lr}\nlayers = {lr}")
    files = [str(tmp_path / "a.py"), str(tmp_path / "b.py")]
    args, found = read_argv(["--layers=7", files[0], "x", files[1]])
    assert args == ["x"] and build_config(Toy, found) == Toy(lr=2.0, layers=7)


def test_override_file_gives_file_and_line(tmp_path):
    path = tmp_path / "c.py"
    path.write_text('"""header"""\nimport math\n_private = 1\nlr = math.sqrt(4)\n\nlayers = -1\n')
    found = run_override_file(str(path))
    assert found == [Setting("lr", 2.0, f"{path}:4"), Setting("layers", -1, f"{path}:6")]
    with pytest.raises(ConfigError, match=f"{path}:6: layers=-1 must be at least 1"):
        build_config(Toy, found)


def test_an_override_file_that_does_not_run(tmp_path):
    path = tmp_path / "c.py"
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
        *("most used settings:", f"  --{'decay=0.0':32s} and how slow", ""),
        *(f"{file}:", f"  --{'steps=5':32s} how many", ""),
        *(f"{file}, optimizer:", f"  --{'lr=1.0':32s} how fast"),
    ]


KEYS = (
    "lr model data n_layers num_kv_pairs curriculum test_sizes path use_ffn q_kernel k_norm "
    "pos_emb conv_size dim dk du seed run_name vocab_size seq_len no_such_setting"
).split()
NUMBERS = ["", "0", "1", "-1", "1e3", "nan", "inf", "1e999", "9" * 400, "9" * 5000, "0x10"]
NAMES = "gpt unified_kv gated_delta delta.X model os None True data_mqar silu ../x é".split()
ODD = ["[]", "[(2,200)]", "((", "[[[[", "{}", "\x00", "a b", "--", "-h=", "="]
VALUES = (
    "1 -1 2.5 'x' True None [] [(2,3)] {} 1/0 (1,2) lambda:0 object() 10**400 float('nan') [1]*5 "
    "b'x' __import__('os')"
).split()
STATEMENTS = ["import os", "raise SystemExit(3)", "x = (", "def f(): pass", "del lr", "\tx=1"]


def random_text(rng, letters, longest):
    return "".join(rng.choices(letters, k=rng.randrange(longest)))


def random_flag(rng):
    key = rng.choice(KEYS)
    if rng.random() < 0.1:
        key = random_text(rng, "abc-_=. 1é", 6)
    text = rng.choice(NUMBERS + NAMES + ODD)
    if rng.random() < 0.2:
        text = random_text(rng, "0123456789.eE+-()[], ", 12)
    forms = [[f"--{key}={text}"], [f"--{key}", text], [f"--{key}"], [text], [f"-{key}"]]
    return rng.choice(forms)


def random_command_line(rng):
    argv = []
    for _ in range(rng.randrange(6)):
        argv += random_flag(rng)
    return [arg for arg in argv if arg not in ("--help", "-h")]


def random_file(rng):
    lines = []
    for _ in range(rng.randrange(5)):
        line = f"{rng.choice(KEYS)} = {rng.choice(VALUES)}"
        lines.append(rng.choice([line, line, line, *STATEMENTS]))
    noise = rng.randbytes(rng.randrange(8)) if rng.random() < 0.1 else b""
    return "\n".join(lines).encode() + noise


def test_only_config_errors_escape_4000_random_command_lines_and_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    n_accepted = n_refused = 0
    for i in range(4000):
        argv = random_command_line(rng)
        if i % 2:
            (tmp_path / "c.py").write_bytes(random_file(rng))
            argv.insert(0, "c.py")
        try:
            parsed = train.parse(argv)
            build_model_config(parsed, SimpleNamespace(vocab_size=64, seq_len=32))
            n_accepted += 1
        except ConfigError as e:
            n_refused += 1
            assert str(e).strip()
    assert n_accepted > 100 and n_refused > 100  # both happen


def test_an_override_file_is_a_file(tmp_path):
    os.mkfifo(tmp_path / "a.py")
    with pytest.raises(ConfigError, match="a.py is no file"):
        run_override_file(str(tmp_path / "a.py"))
