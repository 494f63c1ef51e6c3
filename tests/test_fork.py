"""Forks with the least that the contract asks: each command works, or refuses in one sentence."""

import copy
import os
import re
import subprocess
import sys

import pytest
import torch

import ablate
import eval as evaluate
import train
from analysis import card_checks
from nanorecall.build import build_data, build_model, build_model_config, resolve_model
from nanorecall.model_checks import check_users_model
from nanorecall.settings import ConfigError

# Figures of such models look like those of all others.
pytestmark = pytest.mark.usefixtures("undrawn")

TINY = """
from dataclasses import dataclass
import torch
import torch.nn.functional as F

@dataclass
class Config:
    {fields}

class Model(torch.nn.Module):
    {extra}
    def __init__(self, c):
        super().__init__()
        self.embed = torch.nn.Embedding(64, 16)
        self.head = torch.nn.Linear(16, 64)

    def forward(self, tokens, targets=None):
        logits = self.head(self.embed(tokens).cumsum(1))
        if targets is None:
            return logits, None
        some = targets != -100
        return logits[some], F.cross_entropy(logits[some], targets[some])
"""
OWN_BLOCK = """
import torch
from model import GPT, Config
from nanorecall.ops import gather_positions

class Block(torch.nn.Module):
    def __init__(self, c):
        super().__init__()
        self.proj = torch.nn.Linear(c.dim, c.dim)

    def forward(self, x, query_pos=None, **options):
        return gather_positions(x + self.proj(x).cumsum(1), query_pos)

class Model(GPT):
    block = Block
"""
GUIDE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "GUIDE.md")
with open(GUIDE, encoding="utf-8") as f:
    TEXT = f.read()
MIXER = re.search(r"### A mixer of your own.*?```python\n(.*?)```", TEXT, re.S).group(1)
ALIBI = re.search(r"### An attention function of.*?```python\n(.*?)```", TEXT, re.S).group(1)
FORKS = {
    "sizes told": TINY.format(fields="vocab_size: int = 8; seq_len: int = 8", extra=""),
    "sizes unknown": TINY.format(fields="width: int = 4", extra="layers = 3"),
    "mixer": MIXER,
    "block": OWN_BLOCK,
}
SMALL = (
    "--input_seq_len=32 --num_kv_pairs=4 --vocab_size=64 --n_train_examples=64 --n_val_examples=12 "
    "--n_test_examples=12 --max_steps=2 --batch_size=8 --num_threads=1 --log_dir=r"
).split()


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", FORKS)
def test_every_command_works_or_refuses_in_a_sentence(name, here, capsys):
    fork = f"fork_{name}".replace(" ", "_")
    (here / f"{fork}.py").write_text(FORKS[name])
    assert train.main([f"--model={fork}", *SMALL, "--run_name=a"]) == 0
    assert train.main(["--resume", "r/a", "--max_steps", "3"]) == 0
    more_pairs = ["r/a", "--num_kv_pairs=[4,16]"]  # longer sequences; none has positions
    logits = ["logits", "r/a", "--n_examples=8"]
    for args in (["r/a"], more_pairs, logits, ["compare", "r/*"]):
        evaluate.main(args)
    assert "  unknown  " in capsys.readouterr().out  # the bytes of its state: it cannot decode
    for path in ("r/a/eval_test.json", "r/a/eval_logits_n_examples-8.json", "r/compare.png"):
        assert os.path.exists(path)
    ablate.main(["all", "r/a", "--n_examples=8"])
    message = "method `forward_cached`|decoding needs a mixer with a cache"
    with pytest.raises(ConfigError, match=message):
        evaluate.main(["r/a", "--print_examples=2"])
    with pytest.raises(ConfigError, match="attention maps need"):
        evaluate.main(["attention", "r/a"])
    with pytest.raises(ConfigError, match="it needs a model with|have no heads|have no mixer"):
        ablate.main(["heads", "r/a"])
    if name == "block":
        with pytest.raises(ConfigError, match="its blocks have no att, ffn or memory, which could"):
            ablate.main(["layer", "r/a"])


def test_the_attention_function_of_the_guide(here, capsys):
    """It keeps the contract, and its weights fall with the distance, on one document and on two."""
    (here / "fork_alibi.py").write_text(ALIBI)
    flags = ["--model=fork_alibi", "--pos_emb=none", *SMALL]
    assert train.main([*flags, "--run_name=a"]) == 0
    assert "mixer: alibi (fork_alibi.py:5)\n" in capsys.readouterr().out
    evaluate.main(["r/a", "--print_examples=1"])
    module, cls = resolve_model("fork_alibi")
    model = cls(module.Config(vocab_size=64, seq_len=32, n_layers=2, pos_emb="none")).eval()
    tokens = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(0))
    # Equal keys, so that weights are the softmax of the bias alone: of 2 heads, slope 1/16.
    q, k, v = torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 3, 4), torch.eye(3)[None, None]
    o = model.layers[0].att.attention_fn(q, k, v.expand(1, 2, 3, 3), torch.tensor([[1]]))
    expected = torch.tensor([-1 / 16, 0]).softmax(0)
    torch.testing.assert_close(o[0, 0, 0], torch.cat([expected, torch.zeros(1)]))
    packed, ends = tokens.view(1, -1), torch.tensor([0, 8, 16])
    logits, _ = model(packed, packed, ends)
    torch.testing.assert_close(logits, model(tokens)[0].flatten(0, 1))


def test_decoding_that_reads_other_keys_breaks_the_contract(here):
    """With one query it sees the first key alone, as with a causal mask made from n."""
    wrong = ALIBI.replace("distance =", "query_pos = key_pos[: q.shape[2]][None]\n    distance =")
    (here / "fork_right.py").write_text(ALIBI)
    (here / "fork_first.py").write_text(wrong)
    contract = os.path.join(os.path.dirname(GUIDE), "tests", "test_contract.py")
    models = ["--model=fork_right", "--model=fork_first"]
    command = [sys.executable, "-m", "pytest", contract, *models, "-q", "-k", "decoding"]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=300).stdout
    assert "fork_first fails decoding: decoded logits differ by" in printed
    assert printed.count("FAILED ") == 1 and "fork_right" not in printed


def test_logits_of_other_positions_are_not_trained(here):
    """An attention function that takes n queries for the first n; logits by columns."""
    by_number = "query_pos = key_pos[: q.shape[2]][None]\n    distance ="
    forks = {"fork_number": ALIBI.replace("distance =", by_number)}
    code = TINY.format(fields="width: int = 4", extra="")
    kept = "logits[some]"
    assert code.count(kept) == 2
    code = code.replace(kept, "logits.transpose(0, 1)[some.T]")
    forks["fork_columns"] = code.replace("targets[some]", "targets.T[some.T]")
    message = "returns logits that are not those of the labelled positions in order"
    for fork, code in forks.items():
        (here / f"{fork}.py").write_text(code)
        flags = ["--pos_emb=none"] if fork == "fork_number" else []
        with pytest.raises(ConfigError, match=f"{fork} {message}"):
            train.main([f"--model={fork}", *flags, *SMALL])


def test_what_a_model_did_not_learn_is_not_decoded(here):
    """Its answers would be those of another model: every command that decodes refuses it."""
    first_key = "if q.shape[2] == 1:\n        query_pos = query_pos * 0\n    distance ="
    wrong = ALIBI.replace("distance =", first_key)
    (here / "fork_decodes.py").write_text(ALIBI)
    (here / "fork_misreads.py").write_text(wrong)
    message = "fork_misreads.py: forward_cached of fork_misreads is no decoding: decoded logits"
    for fork in ("fork_decodes", "fork_misreads"):
        argv = [f"--model={fork}", "--pos_emb=none", *SMALL, f"--run_name={fork}"]
        assert train.main(argv) == 0
    for command in (["mqar", "--print_examples=1"], ["edit", "--n_edits=[1]"]):
        evaluate.main([command[0], "r/fork_decodes", *command[1:]])
        with pytest.raises(ConfigError, match=message):
            evaluate.main([command[0], "r/fork_misreads", *command[1:]])


def test_an_attention_function_that_ignores_documents_is_found(here):
    """By the contract, by the card, and by a training on packed documents."""
    lines = ALIBI.splitlines()
    kept = [line for line in lines if "documents:" not in line and "documents.doc_id" not in line]
    assert len(kept) == len(lines) - 2
    (here / "fork_mixes.py").write_text("\n".join(kept))
    message = "fork_mixes fails documents with 96 tokens: the logits of document 2 of 3 packed"
    message += " ones differ by .* no token may see another document"
    flags = ["--model=fork_mixes", "--pos_emb=none"]
    with pytest.raises(ConfigError, match=message):
        card_checks.check_all(flags, flags, "fork_mixes")
    contract = os.path.join(os.path.dirname(GUIDE), "tests", "test_contract.py")
    command = [sys.executable, "-m", "pytest", contract, "--model=fork_mixes", "-q", "-rN"]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=300).stdout
    assert "fork_mixes fails documents: the logits of document 2 of 3" in printed
    assert printed.count(" fails ") == 1
    packed = ["--data=data_synth", "--pack_documents=1", "--max_steps=2"]
    with pytest.raises(ConfigError, match="mixes packed documents: the logits of document 2 of 2"):
        train.main([*flags, *packed, "--num_threads=1", "--log_dir=r"])
    assert not (here / "r").exists()


MISSPELT = {  # what is replaced in ALIBI: by what, the sentence
    "attention_fn = ": ("attn_fn = ", "reads Attention.attn_fn of .*; did you mean attention_fn?"),
    "mixer = ": ("attention = ", "reads Block.attention of fork_.*; its hooks are: mixer"),
    "block = ": ("blok = ", "reads Model.blok of fork_.*; did you mean block?"),
}


@pytest.mark.parametrize("name", MISSPELT)
def test_a_hook_that_nothing_reads_is_refused(here, name):
    wrong, sentence = MISSPELT[name]
    file = f"fork_{wrong.split()[0]}"
    assert ALIBI.count(name) == 1
    (here / f"{file}.py").write_text(ALIBI.replace(name, wrong))
    with pytest.raises(ConfigError, match=f"nothing {sentence}".replace("?", r"\?")):
        train.main([f"--model={file}", "--pos_emb=none", *SMALL])


def test_a_class_that_nothing_uses_is_noted(here, capsys):
    """Else it would be GPT under the name of the fork."""
    (here / "fork_unused.py").write_text(ALIBI.replace("    mixer = Attention", "    pass"))
    resolve_model("fork_unused")
    note = "note: nothing uses the class Attention of fork_unused.py\n"
    assert capsys.readouterr().err == note


CAUSAL = "self.proj_out(self.proj_in(x).cumsum(1))"
CHUNKS = "unflatten(1, (-1, 16)).mean(2, keepdim=True).expand(-1, -1, 16, -1).flatten(1, 2)"
# A mixer that reads what it must not: what it returns in place of CAUSAL, and what is said of it.
READERS = {
    "later": ("x.mean(1, keepdim=True) + 0 * x", "reads tokens that come later: .* at token 1 ch"),
    "in its chunk": (f"x.{CHUNKS}", "reads tokens that come later: its logits at token 1 change"),
    # Its gate starts at 0, and opens in training.
    "gated": (f"self.gate * x.flip(1) + {CAUSAL}", "reads tokens that come later: .* at token 1 "),
    "batch": (f"x.mean(0) + {CAUSAL}", "mixes sequences: its logits change by .* over the batch"),
    "norm": (f"self.norm({CAUSAL}.transpose(1, 2)).transpose(1, 2)", "later: in training mode "),
    "dropout": (f"nn.functional.dropout({CAUSAL}, 0.5, self.training)", None),
    "norm kept": (
        f"setattr(self, 'last', self.norm({CAUSAL}.transpose(1, 2)).transpose(1, 2)) or self.last",
        "later: in training mode ",
    ),
    "random": (f"{CAUSAL} * (1 + self.training * numpy.random.rand())", None),
    "always": (f"nn.functional.dropout({CAUSAL}, 0.5)", "other logits .* in eval mode; dropout"),
    "causal": (CAUSAL, None),
    # torch does not copy such a tensor, nor the model.
    "kept": (f"setattr(self, 'last', {CAUSAL}) or self.last", None),
    "new buffer": (
        f"self.register_buffer('seen', torch.ones(x.shape[1])) or {CAUSAL}",
        "makes or changes layers.0.att.seen, layers.1.att.seen, .* in forward, so no checkpoint",
    ),
    "new not saved": (
        f"self.register_buffer('seen', torch.ones(x.shape[1]), persistent=False) or {CAUSAL}",
        None,
    ),
    "complex": (f"{CAUSAL} * self.phase.real", "layers.0.att.phase is complex; keep its real"),
}


@pytest.mark.parametrize("name", READERS)
def test_a_model_that_reads_what_it_must_not_is_not_trained(here, name):
    returned, message = READERS[name]
    assert MIXER.count(CAUSAL) == 1
    parts = "super().__init__()\n        self.gate = nn.Parameter(torch.zeros(()))\n"
    parts += "        self.norm = nn.BatchNorm1d(config.dim)"
    if name == "complex":
        parts += "\n        self.phase = nn.Parameter(torch.ones((), dtype=torch.cfloat))"
    code = MIXER.replace(CAUSAL, returned).replace("super().__init__()", parts)
    file = "fork_reads_" + name.replace(" ", "_")
    (here / f"{file}.py").write_text("import numpy\nimport torch\n" + code)
    command = [f"--model={file}", *SMALL]
    if message is None:
        assert train.main(command) == 0
        return
    with pytest.raises(ConfigError, match=message):
        train.main(command)
    assert not (here / "r").exists()


HIDDEN = {
    "self.parts = [nn.Linear(4, 4)]": "parts holds weights that would not be trained",
    "self.parts = {'a': (nn.Linear(4, 4),)}": "parts holds weights that would not be trained",
    "self.scale = torch.ones(3, requires_grad=True)": "scale holds weights that would not be tr",
    "self.parts = nn.ModuleList([nn.Linear(4, 4)])": None,
    "self.kept = [self.proj_in]": None,
    "self.table = [torch.ones(3)]": None,
}


EXPERTS = """
import torch
from torch import nn
from model import GPT, Config, GPTBlock

class Experts(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.router = nn.Linear(config.dim, 2)
        self.experts = nn.ModuleList(nn.Linear(config.dim, config.dim) for _ in range(2))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        y, chosen = torch.zeros_like(x), self.router(x).argmax(-1)
        for number, expert in enumerate(self.experts):
            mine = chosen == number
            y[mine] = self.dropout(expert(x[mine]))
        return y

class Block(GPTBlock):
    mixer = Experts

class Model(GPT):
    block = Block
"""


BY_HAND = "(y := expert(x[mine])) * (torch.rand_like(y) > 0.5 * self.training)"


@pytest.mark.parametrize("name", ["dropout", "by hand"])
def test_dropout_in_experts_reads_no_later_token(here, name):
    """A token that goes to another expert changes the masks of all tokens after it."""
    file = "fork_experts_" + name.replace(" ", "_")
    code = EXPERTS
    if name == "by hand":
        assert EXPERTS.count("self.dropout(expert(x[mine]))") == 1
        code = EXPERTS.replace(
            "y[mine] = self.dropout(expert(x[mine]))", f"z = {BY_HAND}\n            out[mine] = z"
        )
        code = code.replace("y, chosen =", "out, chosen =").replace("return y", "return out")
    (here / f"{file}.py").write_text(code)
    assert train.main([f"--model={file}", *SMALL, "--run_name=a"]) == 0


RANDOM = """
import torch
from model import GPT, Config

SOURCE = torch.Generator()

class Model(GPT):
    def forward(self, *args, **options):
        logits, loss = super().forward(*args, **options)
        noise = torch.empty(()).normal_(generator=SOURCE) if self.training else 0
        return logits + noise, loss
"""


def test_what_cannot_be_tried_in_training_mode_is_said(here, capsys):
    (here / "fork_source.py").write_text(RANDOM)
    assert train.main(["--model=fork_source", *SMALL]) == 0
    assert "fork_source: in training mode it is random, so only" in capsys.readouterr().err


HALF = """
from model import GPT, Config

class Model(GPT):
    def forward(self, tokens, targets=None):
        logits, loss = super().forward(tokens, targets)
        return logits.bfloat16(), loss
"""


def test_rounded_logits_are_decoded_and_packing_is_refused_by_name(here):
    (here / "fork_half.py").write_text(HALF)
    assert train.main(["--model=fork_half", *SMALL, "--run_name=a"]) == 0
    evaluate.main(["r/a", "--print_examples=1"])
    packing = [
        "--data=data_synth",
        "--task=qa",
        "--num_pairs=40",
        "--pack_documents=1",
        "--log_dir=r",
        "--max_steps=2",
    ]
    message = r"cannot be trained on packed documents: its forward must take \(tokens, targets, cu"
    with pytest.raises(ConfigError, match=message):
        train.main(["--model=fork_half", "--dim=16", *packing])


def test_a_file_of_models_names_them(here):
    code = "from model import GPT, Config\n\nclass Wide(GPT):\n    pass\n"
    (here / "fork_wide.py").write_text(code)
    with pytest.raises(ConfigError, match="has no Model, .*; its models are fork_wide.Wide$"):
        train.main(["--model=fork_wide", *SMALL])


@pytest.mark.parametrize("line", HIDDEN)
def test_weights_that_the_optimizer_would_not_see_are_refused(here, line):
    file = f"fork_hidden{list(HIDDEN).index(line)}"
    return_line = "    def forward(self, x):"
    assert MIXER.count(return_line) == 1
    code = MIXER.replace(return_line, f"        {line}\n{return_line}")
    (here / f"{file}.py").write_text("import torch\n" + code)
    if HIDDEN[line] is None:
        assert train.main([f"--model={file}", *SMALL]) == 0
        return
    with pytest.raises(ConfigError, match=HIDDEN[line]):
        train.main([f"--model={file}", *SMALL])


def test_helpers_for_a_notebook_are_no_hooks(here):
    helpers = """
    def attention_map(self, x):
        return x
    def forward_step(self, x):
        return x
    @staticmethod
    def from_run(folder):
        return folder
"""
    (here / "fork_helpers.py").write_text(MIXER + helpers)
    resolve_model("fork_helpers")


@pytest.mark.parametrize("value", ["staticmethod(lambda q, k, v: v)", "staticmethod(own)"])
def test_a_static_method_that_nothing_reads_is_noted(here, capsys, value):
    """It may be for a notebook, or stand where attention_fn is meant."""
    code = ALIBI.replace("attention_fn = staticmethod(alibi)", f"attend = {value}")
    own = "    @staticmethod\n    def own(q, k, v):\n        return v\n\n    attend"
    code = code.replace("    attend", own) if "own" in value else code
    name = f"fork_static_{len(value)}"
    (here / f"{name}.py").write_text(code)
    assert train.main([f"--model={name}", "--pos_emb=none", *SMALL, "--run_name=a"]) == 0
    noted = capsys.readouterr().err
    assert f"note: nothing reads Attention.attend of {name}.py; its hooks are: " in noted


def test_a_model_that_reads_its_targets_is_not_trained(here):
    code = TINY.format(fields="width: int = 4", extra="")
    reads = "logits = logits + F.one_hot(targets.clamp(min=0), 64)\n        some = "
    code = code.replace("some = ", reads)
    (here / "fork_targets.py").write_text(code)
    with pytest.raises(ConfigError, match="reads tokens that come later: its logits at token 1"):
        train.main(["--model=fork_targets", *SMALL])


def test_a_loss_that_is_no_mean_is_noted(here, capsys):
    """log.jsonl calls the sum nats per label."""
    code = TINY.format(fields="width: int = 4", extra="")
    code = code.replace("targets[some])", "targets[some], reduction='sum')")
    (here / "fork_sum.py").write_text(code)
    assert train.main(["--model=fork_sum", *SMALL]) == 0
    note = "note: .*fork_sum.py: fork_sum returns a loss of .* where the mean cross-entropy of its"
    assert len(re.findall(note, capsys.readouterr().err)) == 1
    (here / "fork_mean.py").write_text(TINY.format(fields="width: int = 4", extra=""))
    assert train.main(["--model=fork_mean", *SMALL]) == 0
    assert "returns a loss" not in capsys.readouterr().err


def test_a_model_is_tried_and_stays_as_it_was(here):
    """Weights that begin at 0 are trained from 0."""
    start = "super().__init__()\n        self.gate = nn.Parameter(torch.zeros(3))"
    code = MIXER.replace("super().__init__()", start)
    (here / "fork_zero.py").write_text("import torch\n" + code)
    settings = train.parse(["--model=fork_zero", *SMALL])
    data = build_data(settings)
    model = build_model(settings, build_model_config(settings, data))
    before = copy.deepcopy(model.state_dict())
    check_users_model(model, settings, data, torch.device("cpu"), torch.float32)
    assert before["layers.0.att.gate"].tolist() == [0, 0, 0]
    assert before.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_misspelt_hook_is_refused_in_a_linked_file(here):
    (here / "forks").mkdir()
    (here / "forks" / "fork_linked.py").write_text(ALIBI.replace("attention_fn = ", "attn_fn = "))
    os.symlink(here / "forks" / "fork_linked.py", here / "fork_linked.py")
    with pytest.raises(ConfigError, match="nothing reads Attention.attn_fn"):
        resolve_model("fork_linked")


def test_a_class_with_two_names_and_the_model_itself_are_used(here, capsys):
    (here / "fork_named.py").write_text(ALIBI)
    code = """
from fork_named import Attention as Mixer, Config
from model import GPT, GPTBlock
import torch

class Block(GPTBlock):
    mixer = Mixer

class Base(torch.nn.Module):
    pass

class Model(Base):
    def __init__(self, config):
        super().__init__()
        self.model = GPT(config)
"""
    (here / "fork_renames.py").write_text(code)
    resolve_model("fork_renames")
    assert "Attention" not in capsys.readouterr().err
    resolve_model("fork_renames.Model")
    assert "class Model" not in capsys.readouterr().err


def test_a_misspelt_method_is_refused(here):
    code = ALIBI.replace(
        "attention_fn = staticmethod(alibi)", "def attn_fn(self, *args):\n        pass"
    )
    (here / "fork_attn.py").write_text(code)
    with pytest.raises(ConfigError, match="Attention.attn_fn .* did you mean attention_fn"):
        resolve_model("fork_attn")


def test_names_of_a_forks_own_are_taken(here):
    own = ALIBI.replace("block = Block", "block = Block\n    norm = torch.nn.LayerNorm")
    own += """
    version = 2
    def generate(self, tokens):
        return self.norm(tokens)
    def lr_scales(self):
        return {}
    def lr_scales2(self):
        return {}
"""
    (here / "fork_own.py").write_text(own)
    assert train.main(["--model=fork_own", "--pos_emb=none", *SMALL, "--run_name=a"]) == 0
    misspelt = own.replace("lr_scales(", "lr_scale(").replace("lr_scales2", "other")
    (here / "fork_method.py").write_text(misspelt)
    with pytest.raises(ConfigError, match="nothing reads Model.lr_scale .*did you mean lr_scales"):
        resolve_model("fork_method")


OUTPUTS = {  # what is returned in place of attention's output: what the sentence says of it
    "None": "a NoneType",
    "v[..., :1]": r"a tensor \(1, 2, 32, 1\)",
    "q.transpose(1, 2)": r"a tensor \(1, 32, 2, 64\)",
}


@pytest.mark.parametrize("output", OUTPUTS)
def test_an_attention_function_of_another_shape_is_refused(here, output):
    lines = ALIBI.splitlines()
    (line,) = [i for i, line in enumerate(lines) if "return F.scaled_dot" in line]
    lines[line] = f"    return {output}"
    file = f"fork_shape{list(OUTPUTS).index(output)}"
    (here / f"{file}.py").write_text("\n".join(lines))
    message = rf"alibi \({file}.py:5\) returns {OUTPUTS[output]}, not \(B, H, n, V\) = \(1, 2, 32"
    with pytest.raises(ConfigError, match=message):
        train.main([f"--model={file}", "--pos_emb=none", *SMALL])


def test_a_mixer_of_another_shape_is_refused(here):
    """(B, T, 1) would be added to each feature, without an error."""
    whole = "self.proj_out(self.proj_in(x).cumsum(1))"
    for file, result, found in (
        ("fork_thin", f"{whole}[..., :1]", r"a tensor \(1, 32, 1\)"),
        ("fork_none", "None", "a NoneType"),
    ):
        (here / f"{file}.py").write_text(MIXER.replace(whole, result))
        message = rf"the mixer Mixer takes \(B, T, D\) = \(1, 32, 64\) and returns {found}"
        with pytest.raises(ConfigError, match=message):
            train.main([f"--model={file}", *SMALL])


def test_a_mixer_in_place_of_a_model_says_how_it_is_trained(here):
    (here / "fork_bare.py").write_text(MIXER.split("class Block")[0].replace("Config, ", ""))
    message = "no Config.*: `python sweep.py card --mixer fork_bare.Mixer` checks it and writes"
    with pytest.raises(ConfigError, match=message):
        train.main(["--model=fork_bare.Mixer", *SMALL])
    message = "fork_bare.py has no mixer, so it is no file for model; did you mean Mixer?"
    with pytest.raises(ConfigError, match=re.escape(message)):
        train.main(["--model=fork_bare.mixer", *SMALL])
    with open(here / "fork_bare.py", "a") as f:
        f.write("import model\nfrom torch.nn import Module\n")  # not what is meant by Model
    sys.modules.pop("fork_bare")
    message = "fork_bare.py has no Model, .*: `python sweep.py card --mixer fork_bare.Mixer` checks"
    with pytest.raises(ConfigError, match=message):
        train.main(["--model=fork_bare", *SMALL])


def test_an_attention_function_in_place_of_a_model_is_refused(here):
    (here / "fork_function.py").write_text(ALIBI)
    message = "model='fork_function.alibi' is a function; GUIDE.md, An attention function of your"
    with pytest.raises(ConfigError, match=message):
        train.main(["--model=fork_function.alibi", *SMALL])
    assert "### An attention function of your own" in TEXT


@pytest.mark.parametrize("part", ["nn.Parameter(torch.ones(64))", "nn.LayerNorm(64)"])
def test_a_parameter_outside_of_the_model_is_refused(here, part):
    """The optimizer would never change it."""
    uses = "OUTSIDE(x)" if "Norm" in part else "OUTSIDE * x"
    code = MIXER.replace("self.proj_in(x)", f"self.proj_in({uses})", 1)
    code = code.replace("class Mixer", f"import torch\n\nOUTSIDE = {part}\n\n\nclass Mixer", 1)
    file = "fork_outside_" + re.sub(r"\W", "", part.split("(")[0])
    (here / f"{file}.py").write_text(code)
    message = f"{file}.py: OUTSIDE is no part of the model, .* not be trained; make it in __init__"
    with pytest.raises(ConfigError, match=message):
        train.main([f"--model={file}", *SMALL])
    assert not (here / "r").exists()
    init = "super().__init__()\n"
    inside = code.replace(init, f"{init}        self.outside = OUTSIDE\n", 1)
    (here / f"{file}_inside.py").write_text(inside)
    assert train.main([f"--model={file}_inside", *SMALL]) == 0


def test_a_fork_that_is_not_there_ends_the_contract_in_one_sentence(here):
    contract = os.path.join(os.path.dirname(GUIDE), "tests", "test_contract.py")
    command = [sys.executable, "-m", "pytest", contract, "--model=fork_gone", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 4 and not done.stdout.strip()
    assert "ERROR: model='fork_gone' is neither one of" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_an_attention_function_with_other_arguments_is_refused(here):
    code = ALIBI.replace("q, k, v, query_pos=None, documents=None):", "q, k, v):")
    (here / "fork_three.py").write_text(code)
    message = r"alibi \(fork_three.py:5\) must take \(q, k, v, query_pos, documents\): too many"
    with pytest.raises(ConfigError, match=message):
        train.main(["--model=fork_three", *SMALL])
    (here / "fork_alibi_too.py").write_text(ALIBI)
    message = r"must take \(q, k, v, query_pos, documents, window\): got an unexpected keyword"
    with pytest.raises(ConfigError, match=message):
        train.main(["--model=fork_alibi_too", "--window=4", *SMALL])
    assert not (here / "r").exists()


def test_an_attention_function_that_is_no_staticmethod_is_refused(here):
    (here / "fork_method_fn.py").write_text(ALIBI.replace("staticmethod(alibi)", "alibi"))
    message = r"too many positional arguments; as a method it gets self first: .*staticmethod"
    with pytest.raises(ConfigError, match=message):
        train.main(["--model=fork_method_fn", *SMALL])


FORGETS_WINDOW = """
import torch
import model

Config = model.Config


def attend(q, k, v, query_pos=None, documents=None, window=0):
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
    if query_pos is not None:
        distance = query_pos[:, None, :, None] - torch.arange(k.shape[2])
    hidden = distance < 0
    scores = (q @ k.transpose(-1, -2)).masked_fill(hidden, -1e9)
    return scores.softmax(-1) @ v


class Attention(model.CausalSelfAttention):
    attention_fn = staticmethod(attend)


class Block(model.GPTBlock):
    mixer = Attention


class Model(model.GPT):
    block = Block
"""


def test_an_attention_function_that_forgets_its_window_is_refused(here):
    (here / "fork_forgets.py").write_text(FORGETS_WINDOW)
    message = r"attend \(fork_forgets.py:8\) lets a query see more than its window of 4 tokens"
    with pytest.raises(ConfigError, match=message):
        train.main(["--model=fork_forgets", "--window=4", *SMALL])
    hides = "hidden = (distance < 0) | (distance >= window)"
    code = FORGETS_WINDOW.replace("hidden = distance < 0", hides)
    (here / "fork_wide.py").write_text(code.replace(">= window", "> window"))
    with pytest.raises(ConfigError, match="fork_wide.py"):
        train.main(["--model=fork_wide", "--window=4", *SMALL])
    assert not (here / "r").exists()
    (here / "fork_window.py").write_text(code)
    train.main(["--model=fork_window", "--window=4", *SMALL])
    # Without a window there is nothing to forget. A mixer of another kind is left alone.
    train.main(["--model=fork_forgets", *SMALL])
    init = "super().__init__()\n"
    code = MIXER.replace(init, f"{init}        self.attention_fn = len\n", 1)
    (here / "fork_other_kind.py").write_text(code)
    train.main(["--model=fork_other_kind", "--window=4", *SMALL])


def test_a_method_without_a_window_is_not_told_to_be_static(here):
    method = "    def attention_fn(self, q, k, v, query_pos=None, documents=None): return v\n"
    code = FORGETS_WINDOW.replace("    attention_fn = staticmethod(attend)\n", method)
    (here / "fork_no_window.py").write_text(code)
    with pytest.raises(ConfigError, match="unexpected keyword argument 'window'") as e:
        train.main(["--model=fork_no_window", "--window=4", *SMALL])
    assert "staticmethod" not in str(e.value)


def test_a_run_that_crashed_at_once_says_what_to_do_with_its_folder(here):
    # Two sequences are tried before the run has a folder.
    crash = "    if len(q) > 2:\n        raise RuntimeError\n    key_pos"
    code = ALIBI.replace("    key_pos", crash, 1)
    (here / "fork_crash.py").write_text(code)
    argv = ["--model=fork_crash", *SMALL, "--run_name=a"]
    with pytest.raises(RuntimeError):
        train.main(argv)
    message = "a exists; continue .* no checkpoint, so --resume starts at step 0 .*may delete it"
    with pytest.raises(ConfigError, match=message):
        train.main(argv)


def test_a_model_that_reads_its_weights_is_trained(here, capsys):
    """Its cache is measured on the model itself, so no part of it is without numbers."""
    code = "from model import *\n\nclass Model(GPT):\n    def __init__(self, c):\n"
    code += "        super().__init__(c)\n        self.size = self.embed.weight.norm().item()\n"
    (here / "fork_reads.py").write_text(code)
    assert train.main(["--model=fork_reads", *SMALL, "--run_name=a"]) == 0
    assert "inference state: 131072 bytes" in capsys.readouterr().out


def test_a_config_that_is_no_dataclass_is_refused(here):
    plain = TINY.replace("@dataclass\n", "").format(fields="a = 1", extra="")
    (here / "fork_plain.py").write_text(plain)
    with pytest.raises(ConfigError, match="Config of fork_plain.py must be a dataclass"):
        train.main(["--model=fork_plain", *SMALL])


def test_logits_that_are_not_the_sum_of_the_parts_are_not_taken_apart(here):
    twice = """
    def forward(self, tokens, targets=None):
        logits, loss = super().forward(tokens, targets)
        return 2 * logits, loss
"""
    (here / "fork_twice.py").write_text(OWN_BLOCK + twice)
    assert train.main(["--model=fork_twice", *SMALL, "--run_name=a"]) == 0
    with pytest.raises(ConfigError, match="one after another, do not give its logits"):
        ablate.main(["layer", "r/a"])


def test_a_mixer_of_x_alone_refuses_what_it_cannot_do(here):
    (here / "fork_alone.py").write_text(MIXER)
    module, cls = resolve_model("fork_alone")
    model = cls(module.Config(n_layers=2, vocab_size=64, seq_len=8))
    tokens = torch.randint(64, (1, 8))
    logits, _ = model(tokens)
    scored, _ = model(tokens, torch.where(torch.arange(8) % 4 == 1, tokens, -100))
    torch.testing.assert_close(scored, logits[0, [1, 5]])
    assert cls.describe_backend(model.config, None, None) == "Mixer"
    with pytest.raises(ConfigError, match="forward of Mixer does not take cache"):
        model.forward_cached(tokens)
    with pytest.raises(ConfigError, match="forward of Mixer does not take documents"):
        model(tokens, tokens, torch.tensor([0, 3, 8]))
