"""Closed-form edits of an MLP; projection on the null space of kept facts, there and in a table.

Edits of a memory layer's values alone are tested in test_memory.py.
"""

import copy
from types import SimpleNamespace

import pytest
import torch

import eval as eval_script
import train
from analysis import editing, mlp_editing
from analysis.edit_comparison import require_editable
from analysis.editors import EDITORS, applicable_editors
from analysis.finetuning import SPARSE
from memory import MemoryGPT, MemoryRouterGPT
from model import GPT, Config, UnifiedKV
from nanorecall.rng import IGNORE_INDEX
from nanorecall.settings import ConfigError
from toys import as_flags, build_gpt, memory_model, random_tokens


def facts(B=4, seed=3):
    """B sequences with 3, 2, 3, 2, ... labels at their ends, whose answers are read."""
    x, y = random_tokens(B, 6, seed=seed), torch.full((B, 6), IGNORE_INDEX)
    y[:, 3:] = random_tokens(B, 3, seed=seed + 100)
    y[1::2, 3] = IGNORE_INDEX
    x[:, 4:] = y[:, 3:5].clamp(min=0)
    return x, y


def kept_facts(B=6):
    """Two batches"""
    x, y = facts(2 * B, seed=7)
    return [(x[:B], y[:B]), (x[B:], y[B:])]


# ---- an MLP --------------------------------------------------------------------------------------

WITH_MLP = {
    "gpt": (build_gpt, GPT, dict(use_ffn=True, dim=32)),
    "unified_kv": (build_gpt, UnifiedKV, dict(use_ffn=True, dim=32)),
    "memory below": (memory_model, MemoryGPT, dict(dim=32, memory_layers=(0,))),
    "router": (memory_model, MemoryRouterGPT, dict(dim=32)),
}


@pytest.mark.parametrize("name", WITH_MLP)
@pytest.mark.parametrize("keep", [[], kept_facts()], ids=["plain", "keep"])
def test_an_edited_mlp_answers_and_changes_one_weight(name, keep):
    build, cls, options = WITH_MLP[name]
    m = build(cls, **options).eval()
    x, y = facts()
    answers = y[y != IGNORE_INDEX]
    before = {name: tensor.clone() for name, tensor in m.state_dict().items()}
    assert (m(x, y)[0].argmax(-1) != answers).any()
    mlp_editing.edit_mlp(m, x, y, keep=keep)
    logits = m(x, y)[0]
    assert torch.equal(logits.argmax(-1), answers)
    after = m.state_dict()
    changed = [name for name in before if not torch.equal(after[name], before[name])]
    assert changed == ["layers.1.ffn.down.weight"]


def keys_by_hand(m, x, y):
    """Activations before the last down projection at the labels, block by block."""
    block, h = m.layers[-1], m.layers[0](m.embed(x))
    h = h + block.att(block.att_norm(h))
    return torch.nn.functional.silu(block.ffn.up(block.ffn_norm(h)))[y != IGNORE_INDEX]


@torch.no_grad()
def test_the_change_solves_the_normal_equations():
    """min |change K - R|^2 + c |change L|^2, where L L^T is the second moment of kept keys."""
    m = build_gpt(use_ffn=True, dim=32).eval()
    x, y = facts()
    K = keys_by_hand(m, x, y)
    R = editing.target_updates(*updates_of(m, x, y), margin=2.0)
    for keep in ([], kept_facts()):
        before = copy.deepcopy(m.state_dict())
        mlp_editing.edit_mlp(m, x, y, keep=keep, ridge=1e-3)
        name = "layers.1.ffn.down.weight"
        change = (m.state_dict()[name] - before[name]).T  # (F, D)
        m.load_state_dict(before)
        C = torch.eye(K.shape[1], dtype=K.dtype)
        if keep:
            C = sum(k.T @ k for k in (keys_by_hand(m, *batch) for batch in keep))
            C = C + 1e-3 * C.trace() / len(C) * torch.eye(len(C), dtype=C.dtype)
        c = 1e-3 * (K @ C.inverse() @ K.T).trace() / len(K)
        expected = (K.T @ K + c * C).inverse() @ K.T @ R
        torch.testing.assert_close(change, expected, rtol=1e-6, atol=1e-8)


def updates_of(m, x, y):
    """The arguments of target_updates, computed without editing.py."""
    stream = []
    with m.final_norm.register_forward_pre_hook(lambda _, inputs: stream.append(inputs[0])):
        logits, _ = m(x, y)
    return m.lm_head.weight * m.final_norm.weight, stream[0], logits, y[y != IGNORE_INDEX]


def test_a_router_weights_the_keys():
    """With a route of 0.25, a change of the MLP counts a quarter."""
    m = memory_model(MemoryRouterGPT).eval()
    x, y = facts()
    with torch.no_grad():
        m.layers[1].router.weight.zero_()
        m.layers[1].router.bias.copy_(torch.tensor([1.0, 3.0]).log())
    inputs = []
    m.layers[1].ffn.down.register_forward_hook(lambda module, args, out: inputs.append(args[0]))
    keys, *_ = mlp_editing.last_mlp_keys(m, x, y)
    assert keys.shape == (10, 64)
    # All of the five last positions are computed, or those of the labels alone.
    wide = m.layers[1].ffn.down.in_features
    computed = inputs[0].reshape(-1, wide)
    distances = torch.cdist(4 * keys, computed).min(1).values
    torch.testing.assert_close(distances, torch.zeros(10), rtol=0, atol=1e-3)


def test_second_moments_add_up_over_batches():
    m = build_gpt(use_ffn=True).eval()
    batches = kept_facts()
    whole = [tuple(torch.cat(parts) for parts in zip(*batches))]
    of_batches = mlp_editing.mlp_key_second_moment(m, batches)
    torch.testing.assert_close(of_batches, mlp_editing.mlp_key_second_moment(m, whole))
    assert of_batches.shape == (32, 32)


def planted_mlp(mixing=0.0):
    """A model of tokens 0 to 8 whose MLP has the key e_v for token v, and the answer v + 4 mod 9.

    mixing: of e_0 in the key of token 8. Tokens are one-hot in the first 9 features of the residual
    stream, and answers in the last 9.
    """
    V = 9
    c = Config(
        dim=2 * V, n_layers=1, use_att=False, use_ffn=True, ffn_expand_factor=1, ffn_act="relu",
        pos_emb="none", vocab_size=V, seq_len=2,
    )  # fmt: skip
    m = GPT(c).eval()
    with torch.no_grad():
        for p in m.parameters():
            p.zero_()
        m.layers[0].ffn_norm.weight.fill_((2 * V) ** -0.5)  # a one-hot vector stays one
        m.final_norm.weight.fill_(1)
        for v in range(V):
            m.embed.weight[v, v] = 1
            m.layers[0].ffn.up.weight[v, v] = 1
            m.layers[0].ffn.down.weight[V + (v + 4) % V, v] = 1
            m.lm_head.weight[v, V + v] = 5
        m.layers[0].ffn.up.weight[0, 8] = mixing
    return m


def asked(tokens, answers):
    """Facts of one token each -> tokens (B, 2), targets (B, 2)."""
    x = torch.tensor([[0, token] for token in tokens])
    return x, torch.tensor([[IGNORE_INDEX, answer] for answer in answers])


def test_the_change_of_a_planted_mlp_is_known():
    """Token 2 shall have the answer 1, not 6: a logit is 5 / |features| times the output.

    The residual stream holds a token and an answer, of 18 features. Its scale is 3, so a logit is
    15 times a feature. The answer must rise from 0 to 2 logits above 15: both of its features
    change by (15 + 2) / 15 / 2.
    """
    m = planted_mlp()
    down = m.layers[0].ffn.down.weight
    expected = down.detach().clone()
    expected[9 + 1, 2] += 17 / 30
    expected[9 + 6, 2] -= 17 / 30
    mlp_editing.edit_mlp(m, *asked([2], [1]))
    torch.testing.assert_close(down, expected, rtol=1e-3, atol=1e-4)


# ---- the null space ------------------------------------------------------------------------------


@torch.no_grad()
def change_of_others(m, edit, others, answers_of_others):
    """Largest change of a logit of others by an edit of token 8, which then has the answer 1."""
    others = asked(others, answers_of_others)
    before = m(*others)[0]
    edit(m, *asked([8], [1]), others)
    assert m(*asked([8], [1]))[0].argmax() == 1
    return (m(*others)[0] - before).abs().max()


@pytest.mark.parametrize("mixing", [0.0, 0.8])
def test_kept_facts_of_an_mlp_do_not_change(mixing):
    """The key of token 8 is e_8 + mixing * e_0. Token 0 is kept, so the edit changes e_8 only."""
    tokens, answers = range(8), [(v + 4) % 9 for v in range(8)]

    def plain(m, x, y, others):
        mlp_editing.edit_mlp(m, x, y)

    def in_null_space(m, x, y, others):
        mlp_editing.edit_mlp(m, x, y, keep=[others], null_space=1e-2)
        assert (m.layers[0].ffn.down.weight[:, 0] == before).all()

    m = planted_mlp(mixing)
    before = m.layers[0].ffn.down.weight[:, 0].clone()
    assert change_of_others(m, in_null_space, tokens, answers) < 1e-5
    plain_change = change_of_others(planted_mlp(mixing), plain, tokens, answers)
    assert plain_change > 1 if mixing else plain_change < 1e-5


@torch.no_grad()
def test_kept_facts_of_a_table_do_not_change():
    """One reads some of the slots that are edited."""
    m = memory_model(mem_n_keys=16, dim=32).double().eval()
    (x, y), others = facts(2), facts(1, seed=7)
    others[1][:, :5] = IGNORE_INDEX
    weights, before = copy.deepcopy(m.state_dict()), m(*others)[0]
    changes = []
    for options in (dict(), dict(keep=[others], null_space=1e-5)):
        editing.edit_facts(m, x, y, **options)
        assert torch.equal(m(x, y)[0].argmax(-1), y[y != IGNORE_INDEX])
        changes.append((m(*others)[0] - before).abs().max())
        m.load_state_dict(weights)
    assert changes[0] > 0.1 and changes[1] < 1e-5


def test_updates_out_of_reach_are_not_made():
    """A kept fact is to be edited: its key is not in the null space, so nothing changes."""
    m = planted_mlp()
    before = m.layers[0].ffn.down.weight.clone()
    mlp_editing.edit_mlp(m, *asked([2], [1]), keep=[asked([2], [6])], null_space=1e-2)
    assert torch.equal(m.layers[0].ffn.down.weight, before)


def random_problem(N=3, S=7, V=4):
    g = torch.Generator().manual_seed(0)
    return torch.randn(N, S, generator=g), torch.randn(N, V, generator=g)


def test_the_null_space_has_the_eigenvectors_below_the_threshold():
    """Eigenvalues 1, 0.1, 0.001 and 0: of 7 directions, a threshold of 0.01 leaves 5."""
    keys, updates = random_problem()
    basis = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(1))).Q
    C = basis @ torch.diag(torch.tensor([1.0, 0.1, 0.001, 0, 0, 0, 0])) @ basis.T
    change = editing.solve_change(keys, updates, C, ridge=1e-6, null_space=0.01)
    torch.testing.assert_close(keys @ change, updates, rtol=1e-3, atol=1e-3)
    parts = (basis.T @ change).norm(dim=1)
    assert parts[:2].max() < 1e-5 and parts[2] > 0.01


def test_slots_that_no_kept_fact_reads_need_no_protection():
    keys, updates = random_problem()
    plain = editing.solve_change(keys, updates)
    for null_space in (None, 0.01):
        change = editing.solve_change(keys, updates, torch.zeros(7, 7), null_space=null_space)
        torch.testing.assert_close(change, plain, rtol=1e-3, atol=1e-4)


# ---- what cannot be edited -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "m",
    [
        build_gpt(),
        build_gpt(use_ffn=True, residual_mul=True),
        memory_model(),
        torch.nn.Linear(2, 2),
    ],
    ids=["no MLP", "residual_mul", "a memory layer in its place", "no blocks"],
)
def test_a_model_without_such_an_mlp_is_refused(m):
    with pytest.raises(ValueError, match="editing an MLP needs one in the last block"):
        mlp_editing.edit_mlp(m, *facts())


# ---- eval.py edit --------------------------------------------------------------------------------


def test_editors_are_those_that_the_model_can_take():
    in_table = {name for name in EDITORS if name.startswith("closed form,")} | {"closed form"}
    in_table |= SPARSE.keys()
    in_mlp = {name for name in EDITORS if name.startswith("closed form in the MLP")}
    assert (len(in_table), len(in_mlp)) == (3 + len(SPARSE), 3)
    for m, lacks in [
        (build_gpt(use_ffn=True), in_table | {"fine-tune the values"}),
        (memory_model(), in_mlp),
        (memory_model(memory_layers=(0,)), in_table),
        (memory_model(MemoryRouterGPT), set()),
    ]:
        applicable, left_out = applicable_editors(m, EDITORS)
        assert set(applicable) == EDITORS.keys() - lacks
        assert set(sum(left_out.values(), [])) == lacks


def test_a_model_with_neither_is_refused_in_a_sentence():
    data = SimpleNamespace(task="qa")
    settings = SimpleNamespace(data=data, train=SimpleNamespace(data="data_synth"))
    source = SimpleNamespace(source=SimpleNamespace(slices={}))
    world = SimpleNamespace(size=1)
    options = dict(settings=settings, data=source, world=world)
    config = SimpleNamespace(new_facts=False)
    run = SimpleNamespace(model=build_gpt(), config=config, **options)
    message = "^editing needs a memory layer .*; editing an MLP needs one in the last block"
    with pytest.raises(ConfigError, match=message):
        require_editable(run)
    run.model = build_gpt(use_ffn=True)
    require_editable(run)


def test_a_gpt_run_is_edited(tmp_path, capsys):
    """80 steps on 16 facts, most of which it then knows."""
    flags = as_flags(
        dict(
            data="data_synth", task="qa", num_pairs=20, buckets="[16]", use_ffn=1, n_layers=1,
            dim=32, dk=16, dv=16, conv_size=8, init_std=1, lr=1e-2, batch_size=64, num_threads=1,
            log_dir=tmp_path, run_name="a", max_steps=80, eval_interval=80,
        )
    )  # fmt: skip
    train.main(flags)
    eval_script.main(["edit", str(tmp_path / "a"), "--n_edits=[1]"])
    out = capsys.readouterr().out
    assert "left out: closed form; closed form, protecting others (" in out
    assert "1 facts edited together, closed form in the MLP: 100% of them get the new answer" in out
