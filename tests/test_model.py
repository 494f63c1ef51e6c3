"""model.py against definitions written out naively, and against the document it follows."""

import pytest
import torch
import torch.nn.functional as F

from model import (
    FEATURE_MAPS,
    GPT,
    NORMS,
    CausalSelfAttention,
    CausalSelfAttentionUnifiedKV,
    Config,
    RMSNorm,
    UnifiedKV,
    taylor,
)
from naive import naive_attention_layer
from nanorecall import metrics, ops
from nanorecall.build import inference_state_bytes
from nanorecall.rng import IGNORE_INDEX
from nanorecall.settings import ConfigError
from toys import T, V, build_gpt, gpt_config

B = 3


def random_batch(labels=(3, 0, 5)):
    """Tokens, and targets with this many labels in each sequence, at random positions."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(V, (len(labels), T), generator=generator)
    targets = torch.full_like(tokens, IGNORE_INDEX)
    for i, n in enumerate(labels):
        where = torch.randperm(T, generator=generator)[:n]
        targets[i, where] = torch.randint(V, (n,), generator=generator)
    return tokens, targets


# ---- the document: parameter counts and the printed tree -----------------------------------------

TREE = """GPT(
  (embed): Embedding(2048, 64)
  (layers): ModuleList(
    (0-3): 4 x GPTBlock(
      (att_norm): RMSNorm()
      (att): CausalSelfAttention(
        (proj_q): Linear(in_features=64, out_features=96, bias=False)
        (proj_k): Linear(in_features=64, out_features=96, bias=False)
        (proj_v): Linear(in_features=64, out_features=96, bias=False)
        (out_proj): Linear(in_features=96, out_features=64, bias=False)
      )
    )
  )
  (final_norm): RMSNorm()
  (lm_head): Linear(in_features=64, out_features=2048, bias=False)
)"""


def test_parameter_counts_and_tree_of_updatable_long_term_memory():
    def layers(model):
        return sum(p.numel() for p in model.layers.parameters())

    gpt = GPT(Config(dk=48, dv=48))
    assert str(gpt) == TREE
    assert layers(gpt) == 98560 and sum(p.numel() for p in gpt.parameters()) == 360768
    assert layers(GPT(Config(dk=32, dv=32))) == 65792
    assert layers(UnifiedKV(Config(du=64))) == 98560
    tied = GPT(Config(dk=48, dv=48, tie_weights=True))
    assert sum(p.numel() for p in tied.parameters()) == 229696


# ---- attention against its definition ------------------------------------------------------------


SWITCHES = (
    [dict(q_kernel=k, k_kernel=k, v_kernel=k, pos_emb="none") for k in FEATURE_MAPS]
    + [dict(q_kernel="silu", k_norm=n, q_norm=n) for n in NORMS]
    + [dict(att_use_output_gate=True, att_output_gate_act=a) for a in ("silu", "sigmoid", "none")]
    + [
        dict(q_gated=True),
        dict(k_gated=True),
        dict(conv_size=3),
        dict(n_kv_heads=1, conv_size=2, q_gated=True, k_gated=True),
    ]
)


@pytest.mark.parametrize("cls", [CausalSelfAttention, CausalSelfAttentionUnifiedKV])
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_attention_module_equals_naive_in_outputs_and_gradients(cls, switches):
    torch.manual_seed(0)
    att = cls(gpt_config(**switches)).double()
    x = torch.randn(1, 5, 8, dtype=torch.float64, requires_grad=True)
    inputs = [x, *att.parameters()]
    ours, naive = att(x), naive_attention_layer(att, x[0])[None]
    torch.testing.assert_close(ours, naive, rtol=1e-9, atol=1e-11)
    grad = torch.randn_like(ours)
    ours_grads = torch.autograd.grad(ours, inputs, grad, retain_graph=True)
    for a, b in zip(ours_grads, torch.autograd.grad(naive, inputs, grad)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    query_pos = torch.tensor([[1, 4]])
    torch.testing.assert_close(att(x, query_pos), ours[:, [1, 4]], rtol=1e-9, atol=1e-11)


# ---- small parts ---------------------------------------------------------------------------------


def test_taylor_features_are_a_second_order_exponential():
    x, y = torch.randn(2, 16, dtype=torch.float64)
    s = x @ y / 4
    torch.testing.assert_close(taylor(x) @ taylor(y), 1 + s + s**2 / 2)


def test_rms_norm_and_cross_entropy_equal_torch():
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    norm = RMSNorm(8).double()
    torch.nn.init.normal_(norm.weight)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (8,), norm.weight, 1e-6))
    answers = torch.tensor([1, 0, 7, 3])
    ours, theirs = ops.CrossEntropy.apply(x, answers), F.cross_entropy(x, answers)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(3 * ours, x), torch.autograd.grad(3 * theirs, x))


# ---- the model -----------------------------------------------------------------------------------

VARIANTS = [
    dict(),
    dict(pos_emb="learned", conv_size=2, tie_weights=True),
    dict(pos_emb="none", use_ffn=True, residual_mul=True, q_norm="l2", k_norm="l2"),
    dict(n_kv_heads=1, q_gated=True, att_use_output_gate=True),
    dict(use_att=False, use_ffn=True),
]


@pytest.mark.parametrize("cls", [GPT, UnifiedKV])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_no_logit_sees_the_future(cls, changes):
    model = build_gpt(cls, **changes)
    tokens, _ = random_batch((0, 0, 0))
    before, _ = model(tokens)
    for t in range(T):
        changed = tokens.clone()
        changed[:, t:] = (changed[:, t:] + 1 + torch.arange(T - t)) % V
        after, _ = model(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=1e-9, atol=1e-10)
    assert (after[:, -1] - before[:, -1]).abs().max() > 1e-3  # the test can see a change at all
    if changes.get("use_att", True):
        changed = tokens.clone()
        changed[:, 0] = (changed[:, 0] + 1) % V
        assert (model(changed)[0] - before)[:, -1].abs().max() > 1e-6  # and the past is seen


@pytest.mark.parametrize("cls", [GPT, UnifiedKV])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("labels", [(3, 0, 5), (4, 4, 4), (T, 1, T)], ids=str)
def test_labelled_positions_only_gives_the_same_logits_loss_and_gradients(cls, changes, labels):
    model = build_gpt(cls, **changes)
    tokens, targets = random_batch(labels)
    full, none = model(tokens)
    assert none is None and full.shape == (B, T, V)
    mask = targets != IGNORE_INDEX
    expected = F.cross_entropy(full[mask], targets[mask])
    logits, loss = model(tokens, targets)
    assert logits.shape == (sum(labels), V)
    torch.testing.assert_close(logits, full[mask], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(loss, expected)
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours = torch.autograd.grad(loss, parameters)
    for a, b in zip(ours, torch.autograd.grad(expected, parameters)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_correct_predictions_of_tokens_and_of_whole_sequences():
    targets = torch.tensor([[-100, 2, 1], [0, -100, -100], [-100, -100, -100]])
    logits = F.one_hot(torch.tensor([2, 0, 0]), 3).float()
    tokens, sequences = metrics.correct_predictions(logits, targets)
    assert tokens.tolist() == [True, False, True] and sequences.tolist() == [False, True, True]


TAYLOR = dict(q_kernel="taylor", k_kernel="taylor", pos_emb="none")


@pytest.mark.parametrize(
    "cls, changes, numbers",
    [
        (GPT, dict(seq_len=10), 2 * 10 * (6 + 4)),
        (UnifiedKV, dict(), 2 * T * 6),
        (UnifiedKV, dict(k_gated=True, seq_len=1), 2 * (6 + 6)),
        # The convolution also keeps the last 2 inputs of 2 heads of queries, keys and values.
        (GPT, dict(conv_size=3, seq_len=10), 2 * 10 * (6 + 4) + 2 * 2 * (6 + 6 + 4)),
        (GPT, dict(TAYLOR, n_kv_heads=1, seq_len=1), (1 + 6 + 36) + 4),
    ],
)
def test_state_bytes_counts_the_cache(cls, changes, numbers):
    """`numbers` of four bytes in each of two layers: 2 heads, keys of 6 and values of 4."""
    config = gpt_config(**changes)
    assert inference_state_bytes(cls(config), config.seq_len) == 4 * 2 * numbers


@pytest.mark.parametrize(
    "changes",
    [
        dict(n_heads=3, n_kv_heads=2),
        dict(q_kernel="taylor"),
        dict(q_kernel="reul"),
        dict(use_att=False),
        dict(lr_temp=0.0),
        dict(dim=0),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(changes):
    with pytest.raises(ConfigError):
        gpt_config(**changes).check()


def test_rotary_positions_need_an_even_width():
    with pytest.raises(ConfigError, match="even"):
        build_gpt(dk=5)
