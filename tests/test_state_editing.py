"""state_editors.py and state_editing.py: closed forms with a known answer, what a run is told."""

import json

import pytest
import torch

import delta
import eval as eval_script
import hybrid
import model
import train
from analysis import state_editing, state_editors
from analysis.state_editors import EDITORS, Edit
from nanorecall.settings import ConfigError
from toys import as_flags, assert_same

MQAR = dict(
    n_layers=2, dim=32, dk=32, dv=32, conv_size=3, init_std=1, pos_emb="none", lr=1e-2,
    vocab_size=64, input_seq_len=32, num_kv_pairs=4, infinite_data=1, n_val_examples=40,
    n_test_examples=40, num_threads=1, max_steps=150, eval_interval=150,
)  # fmt: skip


# ---- closed forms --------------------------------------------------------------------------------


def orthonormal_keys(n, width, generator):
    """n keys of length 1, orthogonal to each other: (1, 2 heads, n, width), float64"""
    square = torch.randn(1, 2, width, width, dtype=torch.float64, generator=generator)
    return torch.linalg.qr(square)[0][:, :, :n]


def read_pairs(keys, values):
    """The state (1, H, K, V) after pairs, each written with strength 1."""
    strength = torch.ones_like(keys[..., 0])
    return delta.delta_rule_recurrent(keys, keys, values, strength)[1]


def test_a_state_is_edited_as_if_the_pairs_had_been_read_with_their_new_values():
    generator = torch.Generator().manual_seed(0)
    keys = orthonormal_keys(6, 8, generator)
    old, new = torch.randn(2, 1, 2, 6, 5, dtype=torch.float64, generator=generator)
    values = old.clone()
    values[:, :, [1, 4]] = new[:, :, [1, 4]]
    asked = 0.7 * keys[:, :, [1, 4]]  # a query may be shorter than the key
    edited = state_editors.least_squares(read_pairs(keys, old), asked, 0.7 * new[:, :, [1, 4]])
    torch.testing.assert_close(edited, read_pairs(keys, values), rtol=0, atol=1e-12)


def test_one_pair_is_a_step_of_the_delta_rule():
    generator = torch.Generator().manual_seed(1)
    S = torch.randn(3, 2, 8, 5, dtype=torch.float64, generator=generator)
    k = torch.randn(3, 2, 1, 8, dtype=torch.float64, generator=generator)
    v = torch.randn(3, 2, 1, 5, dtype=torch.float64, generator=generator)
    expected = S.clone()
    for b in range(3):
        for h in range(2):
            error = v[b, h, 0] - S[b, h].T @ k[b, h, 0]
            expected[b, h] += torch.outer(k[b, h, 0], error) / k[b, h, 0].dot(k[b, h, 0])
    torch.testing.assert_close(state_editors.least_squares(S, k, v), expected)


def test_what_an_orthogonal_key_reads_stays_and_a_similar_one_is_disturbed():
    generator = torch.Generator().manual_seed(2)
    keys = orthonormal_keys(4, 8, generator)
    S, values = torch.randn(2, 1, 2, 8, 8, dtype=torch.float64, generator=generator)
    edited = state_editors.least_squares(S, keys[:, :, :2], values[:, :, :2])
    torch.testing.assert_close(keys[:, :, 2:] @ edited, keys[:, :, 2:] @ S)
    similar = keys[:, :, :1] + keys[:, :, 2:3]
    assert (similar @ edited - similar @ S).abs().max() > 0.1


def test_similar_keys_need_to_be_solved_together():
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(1, 1, 3, 4, dtype=torch.float64, generator=generator)
    S, wanted = torch.randn(2, 1, 1, 4, 4, dtype=torch.float64, generator=generator)
    wanted = wanted[:, :, :3]
    torch.testing.assert_close(q @ state_editors.least_squares(S, q, wanted), wanted)
    one_by_one = S
    for i in range(3):
        one_by_one = state_editors.least_squares(
            one_by_one, q[:, :, i : i + 1], wanted[:, :, i : i + 1]
        )
    torch.testing.assert_close((q @ one_by_one)[:, :, 2], wanted[:, :, 2])
    assert (q @ one_by_one - wanted).abs().max() > 0.1


# ---- editors on models of random weights ---------------------------------------------------------


def random_edit(cls, config, block=0, offset=0):
    """Two sequences of three pairs (key, value), of which the first two are edited."""
    torch.manual_seed(0)
    small = dict(dim=16, n_layers=2, vocab_size=32, seq_len=32, **config)
    module = delta if issubclass(cls, delta.DeltaNet) else model
    m = cls(module.Config(**small)).eval()
    tokens = torch.tensor([[1, 20, 2, 21, 3, 22, 0, 0], [4, 23, 5, 24, 6, 25, 0, 0]])
    value_pos = torch.tensor([[1, 3], [3, 1]])
    values = torch.tensor([[30, 31], [28, 29]])
    keys = tokens.gather(1, value_pos - 1)[..., None]
    other_keys = keys + 6
    cache = state_editors.read(m, tokens)
    return Edit(m, tokens, cache, value_pos, values, keys, other_keys, block, offset)


MODELS = {
    "gpt": (model.GPT, dict(dk=8, dv=8)),
    "unified_kv": (model.UnifiedKV, dict(du=8)),
    "conv": (model.GPT, dict(dk=8, dv=8, conv_size=3, pos_emb="none")),
    "delta": (delta.DeltaNet, dict(dk=8, dv=8, conv_size=3)),
    "gated_delta": (delta.GatedDeltaNet, dict(dk=8, dv=8, conv_size=3)),
}


def copy_of(cache):
    return [{k: v.clone() if torch.is_tensor(v) else v for k, v in d.items()} for d in cache]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_an_editor_leaves_the_cache_before_it_as_it_was(name):
    edit = random_edit(*MODELS[name])
    before = copy_of(edit.cache)
    kind = state_editors.memory_kind(edit.of_block)
    assert kind == ("state" if "delta" in name else "cache")
    for editor in EDITORS[kind].values():
        after = editor(edit)
        assert_same(edit.cache, before)
        assert state_editing.bytes_changed(before, after) > 0


@pytest.mark.parametrize(
    "blocks, width",
    [(("gpt", "gpt"), 1), (("gpt conv_size=3", "gpt"), 3), (("delta conv_size=0", "delta"), 4)],
)
def test_the_widest_convolution_of_all_blocks_counts(blocks, width):
    config = hybrid.Config(vocab_size=16, seq_len=8, dim=16, n_layers=2, blocks=blocks)
    assert state_editors.conv_width(hybrid.Hybrid(config)) == width


def test_a_model_with_blocks_of_its_own_has_no_convolution_that_we_know():
    fork = torch.nn.Module()
    assert state_editors.conv_width(fork) == 1
    fork.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    assert state_editors.conv_width(fork) == 1


@pytest.mark.parametrize("name", ["delta", "gated_delta"])
@torch.no_grad()
def test_queries_read_from_the_edited_state_what_they_read_alone(name):
    edit = random_edit(*MODELS[name], block=1)
    after = EDITORS["state"]["overwrite"](edit)
    q, alone = state_editors.ask_alone(edit, edit.keys)
    torch.testing.assert_close(q @ after[1]["state"], alone, rtol=1e-4, atol=1e-5)
    # by hand, for the first pair of the second sequence: key 5, value 28, two blanks, key 5
    tokens = torch.tensor([[5, 28, 0, 0, 5]])
    mixer = edit.model.layers[1].att
    x = edit.model.layers[0](edit.model.embed(tokens))
    x = edit.model.layers[1].att_norm(x)
    projected = mixer.conv(torch.cat([mixer.proj_q(x), mixer.proj_k(x), mixer.proj_v(x)], -1))
    asked = torch.nn.functional.silu(projected[0, -1, :16].view(2, 8))
    asked = asked / asked.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(q[1, :, 0], asked, rtol=1e-4, atol=1e-5)
    erased = EDITORS["state"]["erase"](edit)
    torch.testing.assert_close(q @ erased[1]["state"], torch.zeros_like(alone), atol=1e-5, rtol=0)
    torch.testing.assert_close(after[0], edit.cache[0])


@pytest.mark.parametrize("name, entry", [("gpt", "v"), ("conv", "v"), ("unified_kv", "u")])
@torch.no_grad()
def test_an_entry_of_the_cache_is_replaced_by_that_of_the_pair_alone(name, entry):
    offset = 1 if name == "conv" else 0
    edit = random_edit(*MODELS[name], block=1, offset=offset)
    after = EDITORS["cache"]["overwrite"](edit)
    blanks = [0, 0] if name == "conv" else []
    alone = state_editors.read(edit.model, torch.tensor([[4, 29, *blanks]]))
    expected = edit.cache[1][entry].clone()
    # the second pair of the second sequence: key 4, value 29 at position 1
    expected[1, 1 + offset] = alone[1][entry][0, 1 + offset]
    others = torch.ones(expected.shape[:2], dtype=torch.bool)
    others[0, [1 + offset, 3 + offset]] = others[1, 3 + offset] = False
    torch.testing.assert_close(after[1][entry][others], expected[others])
    assert (after[1][entry][1, 3 + offset] != expected[1, 3 + offset]).any()
    assert torch.equal(after[1][entry][:, 6:], edit.cache[1][entry][:, 6:])


@torch.no_grad()
def test_every_block_of_a_gpt_edited_is_what_it_reads_again():
    """In the first block a value vector depends on its token alone; in later ones on all before."""
    edit = random_edit(*MODELS["gpt"])
    edited = EDITORS["cache"]["overwrite in every block"](edit)
    again = EDITORS["cache"]["read again"](edit)
    torch.testing.assert_close(edited[0]["v"], again[0]["v"])
    for b, positions in enumerate(edit.value_pos):
        assert torch.equal(edited[1]["v"][b, positions], again[1]["v"][b, positions])


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name in ("model", "delta"):
        own = dict(model=name, log_dir=folder, run_name=name)
        train.main(as_flags({**MQAR, **own}))
    return folder


@pytest.fixture(scope="module", params=["model", "delta"])
def result(request, runs):
    """{method, edits: result} of a run, and the whole file"""
    eval_script.main(["edit", str(runs / request.param), "--n_edits=[1,2]"])
    saved = json.loads((runs / request.param / "eval_edit_n_edits-1-2.json").read_text())
    return saved


def test_edits_are_answered_and_controls_fail(result):
    cells = result["by_slice"]["method, edits"]

    def value(method, metric):
        return cells[f"{method}, 1"][metric]["value"]

    assert value("read again", "efficacy") > 0.8
    assert value("overwrite", "efficacy") > 0.7 and value("overwrite", "specificity") > 0.7
    for control in ("erase", "random value", "other key"):
        assert value(control, "efficacy") < 0.2
    assert value("overwrite", "unchanged") < value("other key", "unchanged") - 0.5
    assert cells["overwrite, 1"]["bytes"] < cells["read again, 1"]["bytes"]


def test_the_number_of_pairs_can_be_chosen(runs):
    flags = ["--n_edits=[1]", "--num_kv_pairs=[2,8]"]
    eval_script.main(["edit", str(runs / "delta"), *flags])
    path = runs / "delta" / "eval_edit_n_edits-1_num_kv_pairs-2-8.json"
    cells = json.loads(path.read_text())["by_slice"]["method, edits"]
    few, many = cells["overwrite, 1, 2 pairs"], cells["overwrite, 1, 8 pairs"]
    assert (few["num_kv_pairs"], many["num_kv_pairs"]) == (2, 8)
    assert few["specificity"]["n"] < many["specificity"]["n"]


@pytest.mark.parametrize(
    "changes, message",
    [
        (["--n_edits=[9]"], "at most 3 pairs can be edited"),
        (["--num_kv_pairs=[0]"], "numbers of at least 1"),
        (["--num_kv_pairs=[2,2]"], r"num_kv_pairs=\(2, 2\) names a number twice; name it once"),
        (["--n_edits=[1,1]"], r"n_edits=\(1, 1\) names a number twice; name it once"),
        (["--facts=x.jsonl"], "delta: it needs facts, task=qa, digits or text, not data_mqar"),
        (["--editors=closed form"], "editors is for runs that store facts in their weights; this"),
        (["--new_facts=1"], "new_facts is for runs that store facts in their weights; this is one"),
        (["--n_edits=[2]", "--portions=2"], "portions is for runs that store facts in their wei"),
        (["--num_kv_pairs=[40]"], "vocab_size=64 is too small for 40 pairs"),
    ],
)
def test_what_cannot_be_edited_is_said_in_a_sentence(runs, changes, message):
    with pytest.raises(ConfigError, match=message):
        eval_script.main(["edit", str(runs / "delta"), *changes])


def test_a_model_that_recalls_nothing_is_not_edited(tmp_path):
    own = dict(log_dir=tmp_path, run_name="a", max_steps=1, eval_interval=1, lr=1e-6)
    train.main(as_flags({**MQAR, **own}))
    with pytest.raises(ConfigError, match="no pair|too few pairs"):
        eval_script.main(["edit", str(tmp_path / "a"), "--n_edits=[1]", "--eval_batch_size=2"])
    assert not list((tmp_path / "a").glob("eval_edit*"))


MIXED = dict(model="hybrid", blocks="['delta dk=8 dv=8', 'gpt window=4']")


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(num_queries=2), "num_queries=2, value_tokens=1"),
        (dict(value_tokens=2), "num_queries=0, value_tokens=2"),
        (dict(model="mesa"), "the state of mesa is not read linearly"),
        (dict(model="ttt_linear"), "the state of ttt_linear is not read linearly"),
        (dict(model="retnet", pos_emb="rope"), "train with pos_emb=none"),
        # 8 tokens of pairs: an entry of the cache is not where its token is.
        (dict(model="gpt", window=8), "needs all 8 stored tokens in the cache; .* block 0 holds 7"),
        (
            dict(MIXED, dk=None, dv=None, conv_size=None),
            "needs all 8 stored tokens in the cache; that of block 1 holds 3, because of its",
        ),
    ],
)
def test_pairs_that_no_query_reads_from_a_state_are_refused(tmp_path, changes, message):
    own = dict(log_dir=tmp_path, run_name="a", max_steps=1, eval_interval=1)
    train.main(as_flags({**MQAR, **own, **changes}))
    with pytest.raises(ConfigError, match=message):
        eval_script.main(["edit", str(tmp_path / "a"), "--n_edits=[1]"])


def test_numbers_of_edits_that_do_not_fit_are_named(runs, capsys):
    eval_script.main(["edit", str(runs / "delta"), "--n_edits=[1,9]"])
    assert "left out: [9] edits" in capsys.readouterr().out
