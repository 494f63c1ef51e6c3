"""linear.py: chunks against the recurrence and the definition; each model from its weights."""

import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F

import linear
import train
from linear import (
    GLA,
    LinearAttention,
    Mamba2,
    MesaNet,
    RetNet,
    additive_chunkwise,
    additive_fla,
    additive_recurrent,
    least_squares_chunkwise,
    least_squares_recurrent,
)
from model import FEATURE_MAPS
from naive import fla_naive, naive_activation, naive_heads, naive_qkv, naive_rotation
from nanorecall.build import build_model_config, inference_state_bytes
from nanorecall.settings import ConfigError
from rules import assert_all_close, error, random_tokens, with_gradients

H, K, V = 2, 6, 5
DOCUMENTS = [0, 5, 5, 30, 37, 69, 70]  # one is empty, one is a single token
RULES = {  # name: (token by token, in chunks)
    "no decay": (additive_recurrent, additive_chunkwise),
    "decay of heads": (additive_recurrent, additive_chunkwise),
    "decay of rows": (additive_recurrent, additive_chunkwise),
    "least squares": (least_squares_recurrent, least_squares_chunkwise),
}
DECAYS = ["no decay", "decay of heads", "decay of rows"]


def inputs(kind, T=70, documents=False, B=2, dtype=torch.float64, seed=0):
    """Arguments of a rule that want gradients: keys of length 1, a random initial state."""
    g = torch.Generator().manual_seed(seed)
    B = 1 if documents else B
    n_states = len(DOCUMENTS) - 1 if documents else B

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    q, k, v = (normal(B, H, T, width) for width in (K, K, V))
    k = F.normalize(k, dim=-1)
    state = normal(n_states, H, K, V)
    if kind == "least squares":
        beta = torch.rand(B, H, T, generator=g, dtype=torch.float64)
        ridge = 0.25 + torch.rand(H, K, generator=g, dtype=torch.float64)
        Z = normal(n_states, H, K, K)
        tokens = [q, k, v, beta, ridge, torch.cat([Z @ Z.mT, state], dim=-1)]
    else:
        width = {"no decay": 0, "decay of heads": 1, "decay of rows": K}[kind]
        decay = -3 * torch.rand(B, H, T, width, generator=g, dtype=torch.float64) ** 3
        tokens = [q, k, v, decay if width else None, state]
    return [*with_gradients(tokens, dtype), torch.tensor(DOCUMENTS) if documents else None]


def outputs_and_gradients(rule, arguments, **options):
    """[o, state, gradient of every input that has one] for one fixed gradient of o and state.

    Z is symmetric, and of its gradient only the symmetric part has a meaning.
    """
    wanted = [x for x in arguments if x is not None and x.requires_grad]
    results = rule(*arguments, **options)
    g = torch.Generator().manual_seed(7)
    grads = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype) for x in results]
    found = list(torch.autograd.grad(results, wanted, grads))
    if wanted[-1].shape[-1] == K + V:
        Z, S = found[-1].split([K, V], dim=-1)
        found[-1] = torch.cat([Z + Z.mT, S], dim=-1)
    return [x.detach() for x in results] + found


# ---- the rules -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DECAYS)
def test_the_additive_loop_is_the_definition(kind):
    """S_t = diag(exp(g)) S_{t-1} + k v^T; o = S^T q / sqrt(K), as matrices."""
    q, k, v, g, S, _ = [None if x is None else x.detach() for x in inputs(kind, T=9)]
    o, last = additive_recurrent(q, k, v, g, S)
    for b in range(2):
        for h in range(H):
            state = S[b, h]
            for t in range(9):
                if g is not None:
                    state = torch.diag(g[b, h, t].exp().expand(K)) @ state
                state = state + torch.outer(k[b, h, t], v[b, h, t])
                torch.testing.assert_close(o[b, h, t], state.T @ q[b, h, t] / K**0.5)
            torch.testing.assert_close(last[b, h], state)


@pytest.mark.parametrize("rule", [least_squares_recurrent, least_squares_chunkwise])
def test_least_squares_is_the_solution_of_torch_for_each_token(rule):
    """Ridge regression as plain least squares: a row sqrt(L_r) e_r with target 0 for each r."""
    q, k, v, beta, ridge, *_ = inputs("least squares", T=9)
    o, _ = rule(q, k, v, beta, ridge)
    for h in range(H):
        for t in range(9):
            root = beta[0, h, : t + 1, None].sqrt()
            left = torch.cat([root * k[0, h, : t + 1], torch.diag(ridge[h].sqrt())])
            right = torch.cat([root * v[0, h, : t + 1], torch.zeros(K, V, dtype=torch.float64)])
            W = torch.linalg.lstsq(left, right).solution  # (K, V)
            torch.testing.assert_close(o[0, h, t], W.T @ q[0, h, t])


@pytest.mark.parametrize("rule", [least_squares_recurrent, least_squares_chunkwise])
def test_least_squares_recalls_as_many_pairs_as_a_key_has_features(rule):
    """K keys in any directions, where an additive memory mixes them up; then one twice."""
    g = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 1, n, n, generator=g, dtype=torch.float64) for n in (8, 8))
    stored = torch.cat([keys, keys[:, :, :1]], dim=2)
    v = torch.cat([values, values[:, :, :1] + 2], dim=2)
    beta = torch.ones(1, 1, 9, dtype=torch.float64)
    ridge = torch.full((1, 8), 1e-9, dtype=torch.float64)
    o, state = rule(keys, keys, values, beta[:, :, :8], ridge)
    torch.testing.assert_close(o[:, :, 7], values[:, :, 7], rtol=1e-5, atol=1e-5)
    Z, S = rule(stored, stored, v, beta, ridge)[1].split([8, 8], dim=-1)
    answers = keys @ torch.linalg.solve(Z, S)
    values[:, :, 0] += 1  # the mean of its two values
    torch.testing.assert_close(answers, values, rtol=1e-5, atol=1e-5)
    _, added = additive_recurrent(keys, keys, values)
    assert (keys @ added - values).abs().max() > 1


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("documents", [False, True], ids=["batch", "documents"])
def test_chunked_equals_loop_for_every_chunk_size(documents, kind):
    recurrent, chunkwise = RULES[kind]
    arguments = inputs(kind, documents=documents)
    expected = outputs_and_gradients(recurrent, arguments)
    for C in [*range(1, 20), 24, 32, 37, 64, 69, 70, 71, 128]:
        ours = outputs_and_gradients(chunkwise, arguments, chunk_size=C)
        assert_all_close(ours, expected, 1e-10)


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("T", [1, 15, 16, 17])
def test_no_initial_state_is_zeros(kind, T):
    *tokens, state, _ = inputs(kind, T=T)
    expected = RULES[kind][0](*tokens, torch.zeros_like(state))
    for rule in RULES[kind]:
        assert_all_close(rule(*tokens), expected, 1e-11)


@pytest.mark.parametrize("kind", RULES)
def test_documents_do_not_mix(kind):
    q, k, v, *rest, state, ends = inputs(kind, documents=True)
    for rule in RULES[kind]:
        o, states = rule(q, k, v, *rest, state, ends)
        for d, (a, b) in enumerate(zip(DOCUMENTS[:-1], DOCUMENTS[1:])):
            cut = [x if x is None or x.dim() == 2 else x[:, :, a:b] for x in (q, k, v, *rest)]
            alone, after = rule(*cut, state[d : d + 1])
            torch.testing.assert_close(o[:, :, a:b], alone)
            torch.testing.assert_close(states[d], after[0])


@pytest.mark.parametrize("kind", RULES)
def test_first_and_second_derivatives_by_differences(kind):
    *arguments, _, _ = inputs(kind, T=5, B=1)

    def rule(*tokens):
        return RULES[kind][1](*tokens, chunk_size=2)

    assert torch.autograd.gradcheck(rule, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(rule, arguments, fast_mode=True)


@pytest.mark.parametrize("kind", ["decay of heads", "decay of rows"])
@pytest.mark.parametrize("weak", [0.0, -1e-6, -0.01])
@pytest.mark.parametrize("strong", [-9.0, -60.0, -1e4, -math.inf])
def test_strong_decay_between_weak_ones_neither_overflows_nor_cancels(kind, strong, weak):
    q, k, v, g, S, _ = inputs(kind, T=40)
    g = torch.full_like(g.detach(), weak)
    g[:, :, ::5] = strong
    arguments = with_gradients([q, k, v, g, S], torch.float64)
    exact = outputs_and_gradients(additive_recurrent, arguments)
    single = with_gradients(arguments, torch.float32)
    for C in (1, 4, 16, 37, 64):
        ours = outputs_and_gradients(additive_chunkwise, single, chunk_size=C)
        for a, b in zip(ours, exact, strict=True):
            assert (a - b).abs().max() < 1e-5 * max(1, b.abs().max())
        # The gradient of a strong decay is small, and its neighbours must not round it away.
        a, b = ours[5][:, :, ::5].double(), exact[5][:, :, ::5]
        assert strong < -50 or ((a - b).abs() < 1e-4 * b.abs() + 1e-9).all()


@pytest.mark.parametrize("kind", RULES)
def test_long_sequences_of_nearly_parallel_keys_stay_exact(kind):
    """Keys within 0.2 radians of each other: Z has eigenvalues of 4000 and of 10."""
    g = torch.Generator().manual_seed(0)
    T = 2048
    q, k, v = (torch.randn(1, 1, T, 16, generator=g, dtype=torch.float64) for _ in range(3))
    k = F.normalize(torch.ones(16, dtype=torch.float64) + 0.06 * k, dim=-1)
    rest = {
        "no decay": [None],
        "decay of heads": [torch.full((1, 1, T, 1), -0.01, dtype=torch.float64)],
        "decay of rows": [-0.01 * torch.rand(1, 1, T, 16, generator=g, dtype=torch.float64)],
        "least squares": [
            torch.ones(1, 1, T, dtype=torch.float64),
            torch.full((1, 16), 0.25, dtype=torch.float64),
        ],
    }[kind]
    recurrent, chunkwise = RULES[kind]
    arguments = with_gradients([q, k, v, *rest], torch.float64)
    exact = outputs_and_gradients(recurrent, arguments)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        single = with_gradients(arguments, dtype)
        if kind == "least squares" and dtype == torch.bfloat16:
            # Rounded keys are other keys: compare with their own exact solution.
            rounded = with_gradients(single, torch.float64)
            exact = outputs_and_gradients(recurrent, rounded)
        ours = outputs_and_gradients(chunkwise, single, chunk_size=32)
        assert ours[0].dtype == dtype and ours[1].dtype == torch.float32
        assert max(error(a, b) for a, b in zip(ours, exact, strict=True)) < tolerance


@pytest.mark.parametrize("kind", RULES)
def test_autocast_changes_nothing_inside(kind):
    for rule in RULES[kind]:
        arguments = inputs(kind, T=20, dtype=torch.float32)
        expected = rule(*arguments)
        with torch.autocast("cpu", torch.bfloat16):
            ours = rule(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("documents", [False, True], ids=["batch", "documents"])
def test_no_tokens_leave_the_state_alone(kind, documents):
    *tokens, state, _ = inputs(kind, T=1, B=1 if documents else 2)
    state = torch.cat([state, state])[:2]
    tokens = [x if x is None or x.dim() == 2 else x[:, :, :0] for x in tokens]
    ends = torch.tensor([0, 0, 0]) if documents else None
    for rule in RULES[kind]:
        o, after = rule(*tokens, state, ends)
        assert o.shape == tokens[2].shape and torch.equal(after, state)


def test_shapes_that_do_not_fit_are_refused_by_name():
    q, k, v, g, S, _ = inputs("decay of rows")
    for rule in (additive_recurrent, additive_chunkwise):
        with pytest.raises(ValueError, match="log_decay must have shape .* not .2, 2, 70, 5."):
            rule(q, k, v, g[..., :5])
        with pytest.raises(ValueError, match="state must have shape"):
            rule(q, k, v, g, S.mT)
        with pytest.raises(ValueError, match="k must have shape"):
            rule(q, k[..., :5], v)
        with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to T=70"):
            rule(q[:1], k[:1], v[:1], None, None, torch.tensor([0, 30, 60]))
    q, k, v, beta, ridge, state, _ = inputs("least squares")
    for rule in (least_squares_recurrent, least_squares_chunkwise):
        with pytest.raises(ValueError, match="beta must have shape"):
            rule(q, k, v, beta[..., None], ridge)
        with pytest.raises(ValueError, match="state must have shape .2, 2, 6, 11."):
            rule(q, k, v, beta, ridge, state[..., :K])


# ---- flash-linear-attention: its naive forms as oracles, its kernels by stand-ins ----------------


def in_their_layout(rule):
    """rule of (B, T, H, width) for tensors (B, H, T, width)."""

    def call(*tokens, **options):
        o, *states = rule(*(x.transpose(1, 2) for x in tokens), **options)
        return o.transpose(1, 2), *states

    return call


@pytest.mark.skipif(fla_naive("gla") is None, reason="fla-core is not installed")
@pytest.mark.parametrize("rule", [additive_recurrent, additive_chunkwise])
def test_equals_the_naive_forms_of_flash_linear_attention(rule):
    def linear_attention(q, k, v, state):
        naive = in_their_layout(fla_naive("linear_attn").naive_recurrent_linear_attn)
        return naive(q, k, v, initial_state=state, output_final_state=True)

    def one_decay(q, k, v, g, state):
        naive = fla_naive("simple_gla").naive_recurrent_simple_gla
        tokens = (x.transpose(1, 2) for x in (q, k, v, g[..., 0]))
        o, after = naive(*tokens, initial_state=state)
        return o.transpose(1, 2), after

    def decay_of_rows(q, k, v, g, state):
        naive = in_their_layout(fla_naive("gla").naive_recurrent_gla)
        return naive(q, k, v, g, initial_state=state, output_final_state=True)

    def ungated(q, k, v, state):
        return rule(q, k, v, None, state)

    q, k, v, _, state, _ = inputs("no decay", dtype=torch.float32)
    expected = outputs_and_gradients(linear_attention, [q, k, v, state])
    assert_all_close(outputs_and_gradients(ungated, [q, k, v, state]), expected, 2e-5)
    for kind, naive in (("decay of heads", one_decay), ("decay of rows", decay_of_rows)):
        arguments = inputs(kind, dtype=torch.float32)[:-1]
        expected = outputs_and_gradients(naive, arguments)
        assert_all_close(outputs_and_gradients(rule, arguments), expected, 2e-5)


@pytest.mark.skipif(fla_naive("based") is None, reason="fla-core is not installed")
@pytest.mark.parametrize("rule", [additive_recurrent, additive_chunkwise])
def test_taylor_features_give_the_scores_of_based_in_flash_linear_attention(rule):
    theirs = fla_naive("based")
    tokens = inputs("no decay", T=32, dtype=torch.float32)[:3]

    def ours(q, k, v):
        q, k = FEATURE_MAPS["taylor"](q), FEATURE_MAPS["taylor"](k)
        o, _ = rule(q, k, v)
        return (o * math.sqrt(q.shape[-1]),)

    def normalised(q, k, v):
        """Divided by the sum of scores, which is the output for values of 1."""
        (o,) = ours(q, k, torch.cat([v, torch.ones_like(v[..., :1])], dim=-1))
        return (o[..., :-1] / o[..., -1:],)

    def parallel(q, k, v):
        return (theirs.naive_parallel_based(q, k, v, use_norm=False),)

    def in_chunks_of_8(q, k, v):
        return (theirs.naive_chunk_based(q, k, v, chunk_size=8),)

    for form, naive in ((ours, parallel), (normalised, in_chunks_of_8)):
        expected = outputs_and_gradients(naive, tokens)
        assert_all_close(outputs_and_gradients(form, tokens), expected, 2e-5)


@pytest.mark.skipif(fla_naive("based") is None, reason="fla-core is not installed")
def test_a_layer_with_taylor_features_is_based_although_it_divides_by_no_sum():
    torch.manual_seed(0)
    plain = dict(v_kernel="none", q_norm="none", k_norm="none", conv_size=0)
    c = config(q_kernel="taylor", k_kernel="taylor", **plain)
    layer = linear.LinearAttentionLayer(c)
    x = 5 * torch.randn(2, 20, 8)  # so large that the 1e-6 in the norm makes no difference
    projections = layer.proj_q, layer.proj_k, layer.proj_v
    q, k, v = (p(x).unflatten(-1, (2, -1)).transpose(1, 2) for p in projections)
    o = fla_naive("based").naive_parallel_based(q, k, v)  # (B, H, T, V)
    expected = layer.out_proj(layer.out_norm(o).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(fla_naive("mesa_net") is None, reason="fla-core is not installed")
@pytest.mark.parametrize("rule", RULES["least squares"])
def test_least_squares_equals_the_exact_form_of_flash_linear_attention(rule):
    """Theirs has a decay, here none, and takes values as wide as keys."""
    q, k, _, beta, ridge, _, _ = inputs("least squares", T=20, dtype=torch.float32)
    v = torch.randn(2, H, 20, K).requires_grad_()
    Z = torch.eye(K).expand(2, H, K, K)
    S = torch.randn(2, H, K, K)

    def theirs(q, k, v, beta, ridge):
        q, k, v, b = (x.transpose(1, 2) for x in (q, k, v, beta))
        no_decay = torch.zeros_like(b)
        naive = fla_naive("mesa_net").naive_mesa_net_exact
        o, Z_last, S_last = naive(q, k, v, no_decay, ridge, b, Z, S)
        return o.transpose(1, 2), torch.cat([Z_last, S_last], dim=-1)

    def ours(*tokens):
        return rule(*tokens, torch.cat([Z, S], dim=-1))

    arguments = [q, k, v, beta, ridge]
    expected = outputs_and_gradients(theirs, arguments)
    assert_all_close(outputs_and_gradients(ours, arguments), expected, 1e-4)


@pytest.mark.skipif(fla_naive("retention") is None, reason="fla-core is not installed")
def test_retnet_decays_as_in_flash_linear_attention():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 20, width) for width in (6, 6, 5))
    layer = linear.RetNetLayer(config(n_heads=4))
    o, _ = layer.recall(torch.zeros(2, 20, 8), q, k, v, None, None)
    torch.testing.assert_close(o, fla_naive("retention").naive_retention(q, k, v))


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("documents", [False, True], ids=["batch", "documents"])
def test_kernels_get_their_arguments_in_their_layout(monkeypatch, kind, documents):
    """The kernels need a GPU. Stand-ins with the signatures of fla-core 0.6.0 check the call."""
    arguments = inputs(kind, documents=documents, dtype=torch.float32)
    called = []

    def check(q, k, v, g, scale, initial_state, output_final_state, state_v_first, cu_seqlens):
        assert q.shape[1:] == k.shape[1:] == (70, H, K) and v.shape[1:] == (70, H, V)
        assert all(x.is_contiguous() and x.dtype == v.dtype for x in (q, k, v))
        assert g is None or (g.dtype == torch.float32 and g.is_contiguous())
        assert scale is None and output_final_state and not state_v_first
        assert initial_state.dtype == torch.float32 and (cu_seqlens is not None) == documents
        q, k, v, g = (None if x is None else x.transpose(1, 2) for x in (q, k, v, g))
        o, state = additive_recurrent(q, k, v, g, initial_state, cu_seqlens)
        return o.transpose(1, 2), state

    def chunk_simple_gla(
        q,
        k,
        v,
        g=None,
        g_gamma=None,
        scale=None,
        initial_state=None,
        output_final_state=False,
        state_v_first=False,
        cu_seqlens=None,
        cu_seqlens_cpu=None,
        **kwargs,
    ):
        assert g_gamma is None and not kwargs and (g is None or g.shape == q.shape[:3])
        called.append("simple_gla")
        g = None if g is None else g[..., None]
        options = scale, initial_state, output_final_state, state_v_first, cu_seqlens
        return check(q, k, v, g, *options)

    def chunk_gla(
        q,
        k,
        v,
        g,
        scale=None,
        initial_state=None,
        output_final_state=False,
        state_v_first=False,
        cu_seqlens=None,
        cu_seqlens_cpu=None,
    ):
        assert g.shape == q.shape
        called.append("gla")
        options = scale, initial_state, output_final_state, state_v_first, cu_seqlens
        return check(q, k, v, g, *options)

    monkeypatch.setattr(linear, "load_fla", lambda: (chunk_simple_gla, chunk_gla))
    expected = outputs_and_gradients(additive_recurrent, arguments)
    assert_all_close(outputs_and_gradients(additive_fla, arguments), expected, 1e-5)
    assert called == ["gla" if kind == "decay of rows" else "simple_gla"]
    q, k, v, *rest = [None if x is None else x.detach() for x in arguments]
    v = v.to(torch.bfloat16)
    rest[0] = None if rest[0] is None else rest[0].to(torch.bfloat16)
    exact, last = additive_recurrent(q.to(torch.bfloat16), k.to(torch.bfloat16), v, *rest)
    o, state = additive_fla(q, k, v, *rest)
    assert o.dtype == torch.bfloat16 and torch.equal(o, exact) and torch.equal(state, last)
    for output in additive_fla(*arguments):
        with pytest.raises(RuntimeError, match="flash-linear-attention has no second derivatives"):
            torch.autograd.grad(output.sum(), arguments[1], create_graph=True)


def test_the_kernel_is_chosen_only_where_it_works(monkeypatch):
    *tokens, state, _ = inputs("decay of heads")
    calls = []

    def note_call(name):
        def call(*arguments):
            calls.append((name, len(arguments)))

        return call

    for name in ("additive_recurrent", "additive_chunkwise", "additive_fla"):
        monkeypatch.setattr(linear, name, note_call(name))
    linear.additive(*tokens, state, None, 5)
    linear.additive(*(x[:, :, :1] for x in tokens), state, None, 5)
    monkeypatch.setattr(linear, "why_no_fla", lambda *a: None)
    linear.additive(*tokens, state, None, 5)
    one = [x[:1] for x in tokens]
    linear.additive(*one, None, torch.tensor([0, 5, 70]), 5)
    linear.additive(*one, None, torch.tensor([0, 5, 5, 70]), 5)  # one is empty
    assert calls == [
        ("additive_chunkwise", 7),
        ("additive_recurrent", 6),
        ("additive_fla", 6),
        ("additive_fla", 6),
        ("additive_chunkwise", 7),
    ]


def test_torch_func_never_reaches_the_kernel(monkeypatch):
    *tokens, state, _ = inputs("decay of heads", T=9)
    q, *rest = [x.detach() for x in (*tokens, state)]
    monkeypatch.setattr(linear, "why_no_fla", lambda *a: None)
    monkeypatch.setattr(linear, "additive_fla", None)
    gradient = torch.func.grad(lambda q: linear.additive(q, *rest)[0].sum())(q)
    q.requires_grad_()
    expected = torch.autograd.grad(additive_recurrent(q, *rest)[0].sum(), q)[0]
    torch.testing.assert_close(gradient, expected)


def test_without_the_extra_the_reason_is_said(monkeypatch):
    for name in ("fla", "fla.ops.gla", "fla.ops.simple_gla"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    linear.load_fla.cache_clear()
    assert "cannot be imported" in linear.load_fla()
    kernels = types.SimpleNamespace(chunk_simple_gla="of heads", chunk_gla="of rows")
    for name in ("fla", "fla.ops", "fla.ops.gla", "fla.ops.simple_gla"):
        monkeypatch.setitem(sys.modules, name, kernels)
    linear.load_fla.cache_clear()
    assert linear.load_fla() == ("of heads", "of rows")
    linear.load_fla.cache_clear()


def test_the_backend_is_described(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    text = GLA.describe_backend(config(), cpu, torch.bfloat16)
    assert text == "additive memory, chunks of 4 tokens (flash-linear-attention runs on CUDA only)"
    assert "bfloat16" in linear.why_no_fla(cuda, torch.float32, 64, 64)
    monkeypatch.setattr(linear, "load_fla", lambda: "it cannot be imported: no triton")
    assert "no triton" in linear.why_no_fla(cuda, torch.bfloat16, 64, 64)
    monkeypatch.setattr(linear, "load_fla", lambda: (object(), object()))
    assert "even" in linear.why_no_fla(cuda, torch.bfloat16, 64, 87)
    assert linear.why_no_fla(cuda, torch.bfloat16, 64, 64) is None
    assert "its own chunks" in GLA.describe_backend(config(), cuda, torch.bfloat16)
    for device in (cpu, cuda):
        assert MesaNet.describe_backend(config(), device, torch.bfloat16) == (
            "least squares, chunks of 4 tokens (flash-linear-attention's kernel solves by "
            "conjugate gradients, so not exactly)"
        )
    assert GLA.describe_backend(config(use_att=False), cpu, torch.float32).startswith("none")


# ---- the models ----------------------------------------------------------------------------------

MODELS = [LinearAttention, RetNet, Mamba2, GLA, MesaNet]


def config(**changes):
    sizes = dict(dim=8, n_layers=2, n_heads=2, dk=6, dv=4, chunk_size=4)
    sizes |= dict(vocab_size=19, seq_len=12, init_std=0.3)
    return linear.Config(**{**sizes, **changes})


def build(cls, **changes):
    torch.manual_seed(0)
    c = config(**changes)
    c.check()
    return cls(c).double()


def naive_layer(layer, x):
    """Any layer of linear.py on x (T, D) one vector at a time, from its weights."""
    c = layer.config
    K, V = layer.head_dims(c)
    states = [torch.zeros(K, V, dtype=x.dtype)] * c.n_heads
    grams = [torch.zeros(K, K, dtype=x.dtype)] * c.n_heads
    out = []
    for t in range(len(x)):
        q, k, v = naive_qkv(layer, x, t)
        q = naive_heads(q, x[t], c.q_kernel, c.q_norm, layer.gate_q)
        k = naive_heads(k, x[t], c.k_kernel, c.k_norm, layer.gate_k)
        v = naive_heads(v, x[t], c.v_kernel)
        if c.pos_emb == "rope":
            q, k = naive_rotation(q, t), naive_rotation(k, t)
        heads = []
        for h in range(c.n_heads):
            decay = written = torch.ones((), dtype=x.dtype)
            scale = 1 / math.sqrt(K)
            if isinstance(layer, linear.RetNetLayer):
                decay = 1 - 1 / torch.tensor(2.0, dtype=x.dtype) ** (5 + h)
            if isinstance(layer, linear.Mamba2Layer):
                scale = 1
                z = layer.proj_dt.weight[h] @ x[t] + layer.dt_bias[h]
                written = torch.log(1 + torch.exp(z))
                decay = torch.exp(-torch.exp(layer.A_log[h]) * written)
            if isinstance(layer, linear.GLALayer):
                first, second = layer.proj_decay
                z = (second.weight @ (first.weight @ x[t]) + second.bias).view(c.n_heads, K)[h]
                decay = (naive_activation("sigmoid", z) ** (1 / 16))[:, None]
            if isinstance(layer, linear.MesaNetLayer):
                written = naive_activation("sigmoid", layer.proj_beta.weight[h] @ x[t])
            states[h] = decay * states[h] + written * torch.outer(k[h], v[h])
            read = scale * q[h]
            if isinstance(layer, linear.MesaNetLayer):
                grams[h] = grams[h] + written * torch.outer(k[h], k[h])
                ridge = 0.25 + torch.log(1 + torch.exp(layer.ridge[h]))
                read = torch.linalg.inv(grams[h] + torch.diag(ridge)) @ q[h]
            o = states[h].T @ read
            if isinstance(layer, linear.Mamba2Layer):
                o = o + layer.D[h] * v[h]
            if layer.out_norm:
                o = o / torch.sqrt((o**2).mean() + 1e-6) * layer.out_norm.weight
            heads.append(o)
        o = torch.cat(heads)
        if layer.gate_out:
            o = o * naive_activation(c.att_output_gate_act, layer.gate_out.weight @ x[t])
        out.append(layer.out_proj.weight @ o)
    return torch.stack(out)


SWITCHES = [
    dict(),
    dict(conv_size=0, q_kernel="relu", k_kernel="elu1", v_kernel="none"),
    dict(q_kernel="taylor", k_kernel="taylor", q_norm="none", k_norm="none", dk=3),
    dict(pos_emb="rope", q_gated=True, k_gated=True),
    dict(att_use_output_gate=True, att_output_gate_act="sigmoid", use_out_norm=False),
]


@pytest.mark.parametrize("cls", MODELS)
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_mixer_equals_naive_in_outputs_and_gradients(cls, switches):
    torch.manual_seed(0)
    mixer = cls.block.mixer(config(**switches)).double()
    x = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)
    parameters = [x, *mixer.parameters()]
    ours = mixer(x)
    naive = torch.stack([naive_layer(mixer, sequence) for sequence in x])
    torch.testing.assert_close(ours, naive, rtol=1e-9, atol=1e-11)
    grad = torch.randn_like(ours)
    ours_grads = torch.autograd.grad(ours, parameters, grad)
    for a, b in zip(ours_grads, torch.autograd.grad(naive, parameters, grad)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    query_pos = torch.tensor([[1, 4], [0, 6]])
    picked = torch.stack([ours[0, [1, 4]], ours[1, [0, 6]]])
    torch.testing.assert_close(mixer(x, query_pos), picked)


VARIANTS = [
    dict(),
    dict(conv_size=0, use_ffn=True, pos_emb="rope"),
    dict(att_use_output_gate=True, conv_size=1, pos_emb="learned"),
]


@pytest.mark.parametrize("cls", MODELS)
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_pieces_with_a_cache_equal_one_forward_pass(cls, changes):
    model, tokens = build(cls, **changes), random_tokens(3)
    expected, _ = model(tokens)
    for pieces in ([1] * 12, [12], [5, 1, 1, 5]):
        cache, logits = None, []
        for piece in tokens.split(pieces, dim=1):
            kept = [dict(layer) for layer in cache or []]
            new_logits, cache = model.forward_cached(piece, cache)
            logits.append(new_logits)
        torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-9, atol=1e-10)
        # the cache of the tokens before the last piece is as it was
        again, _ = model.forward_cached(piece, kept or None)
        assert torch.equal(again, logits[-1])


@pytest.mark.parametrize("cls", MODELS)
@pytest.mark.parametrize("changes", [*VARIANTS, SWITCHES[2]], ids=str)
def test_state_bytes_is_the_size_of_the_cache_of_any_length(cls, changes):
    model = build(cls, **changes).float()
    expected = inference_state_bytes(model, 12)
    assert expected == inference_state_bytes(model, 7) > 0
    for T in (1, 2, 12):
        _, cache = model.forward_cached(torch.zeros(1, T, dtype=torch.long))
        found = 0
        for layer in cache:
            found += sum(x.untyped_storage().nbytes() for x in layer.values() if torch.is_tensor(x))
        assert found == expected
    assert inference_state_bytes(cls(config(use_att=False, use_ffn=True)), 12) == 0


@pytest.mark.parametrize("cls", MODELS)
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_packed_documents_equal_a_sequence_each(cls, changes):
    model, tokens = build(cls, **changes), random_tokens(3)
    lengths = [7, 1, 12]
    alone = [model(row[None, :n])[0][0] for row, n in zip(tokens, lengths)]
    packed = torch.cat([row[:n] for row, n in zip(tokens, lengths)])[None]
    logits, _ = model(packed, cu_seqlens=torch.tensor([0, 7, 8, 20]))
    torch.testing.assert_close(logits[0], torch.cat(alone))


@pytest.mark.parametrize("cls", MODELS)
def test_chunk_size_is_used_and_changes_nothing(cls, monkeypatch):
    used = []
    in_chunks = linear.in_chunks

    def note_size(form, tokens, state, cu_seqlens, chunk_size):
        used.append(chunk_size)
        return in_chunks(form, tokens, state, cu_seqlens, chunk_size)

    monkeypatch.setattr(linear, "in_chunks", note_size)
    tokens = random_tokens(3)
    losses = [build(cls, chunk_size=C)(tokens, tokens)[1] for C in (1, 5, 16)]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-10, atol=1e-12)
    assert set(used) == {1, 5, 16}


@pytest.mark.parametrize("cls", MODELS)
def test_bfloat16_autocast_is_close_to_float32(cls):
    model, tokens = build(cls, dim=32, dk=16, dv=16).float(), random_tokens(8)
    parameters = list(model.parameters())
    exact, loss = model(tokens, tokens)
    grads = torch.autograd.grad(loss, parameters)
    with torch.autocast("cpu", torch.bfloat16):
        half, half_loss = model(tokens, tokens)
        _, cache = model.forward_cached(tokens)
    assert (half.float() - exact).abs().max() < 0.05 * exact.abs().max()
    assert cache[0]["state"].dtype == torch.float32
    for a, b in zip(torch.autograd.grad(half_loss, parameters), grads):
        if a.dim() == 1:  # a few small numbers, of which rounding leaves the size
            assert (a - b).abs().max() < 0.01
            continue
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.97


@pytest.mark.parametrize("cls", MODELS)
def test_gradients_of_many_models_at_once(cls):
    """torch.func goes through every layer: vmap of grad equals autograd, model by model."""
    model, tokens = build(cls), random_tokens(2)
    at = {name: p.detach() for name, p in model.named_parameters()}
    two = {name: torch.stack([p, 1.1 * p]) for name, p in at.items()}

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (tokens, tokens))[1]

    together = torch.func.vmap(torch.func.grad(loss))(two)
    for i in range(2):
        one = {name: p[i].clone().requires_grad_() for name, p in two.items()}
        expected = torch.autograd.grad(loss(one), list(one.values()))
        for name, grad in zip(one, expected):
            torch.testing.assert_close(together[name][i], grad, rtol=1e-8, atol=1e-10)


def test_what_decays_starts_where_the_papers_do():
    c = config(n_heads=200)
    mamba, gla, mesa = (cls.block.mixer(c) for cls in (Mamba2, GLA, MesaNet))
    dt, A = F.softplus(mamba.dt_bias), mamba.A_log.exp()
    assert 1e-3 <= dt.min() < 0.0015 and 0.007 < dt.median() < 0.014 and 0.065 < dt.max() <= 0.1
    assert 1 <= A.min() < 1.5 and 7 < A.median() < 10 and 15 < A.max() <= 16
    decay = gla.log_decay(torch.randn(1, 50, 8)).exp()
    assert 0.85 < decay.min() and 0.95 < decay.median() < 0.965  # 0.5^(1/16) = 0.958
    torch.testing.assert_close(0.25 + F.softplus(mesa.ridge), torch.ones(200, 6))


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--model mesa --n_kv_heads 1", "n_kv_heads=1 has no effect"),
        ("--model gla --lr_temp 2", "only delta models have it"),
        ("--model linear --du 32", "only unified_kv has it"),
        ("--model retnet --use_att 0 --use_ffn 1 --use_out_norm 0", "use_att is 0"),
        ("--model mamba2 --q_kernel taylor", "both be taylor or neither"),
        ("--model gpt --chunk_size 8", "only models with a recurrent state have it"),
    ],
)
def test_settings_without_effect_are_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        p = train.parse(flags.split())
        build_model_config(p, p.data_module.Data(p.data))


def test_every_model_has_its_short_name():
    for name, cls in zip(("linear", "retnet", "mamba2", "gla", "mesa"), MODELS):
        p = train.parse(["--model", name])
        assert p.model_class is cls
        assert build_model_config(p, p.data_module.Data(p.data)).conv_size == 4
