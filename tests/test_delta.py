"""delta.py: the three forms of the rule against each other and its definition; DeltaNet."""

import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F

import delta
import linear
import train
from delta import delta_rule, delta_rule_chunkwise, delta_rule_fla, delta_rule_recurrent
from model import GPT, NORMS, RMSNorm, ShortConvolution
from naive import fla_naive, naive_delta_layer
from nanorecall import ops
from nanorecall.build import build_model_config, inference_state_bytes
from nanorecall.ops import CausalConv1d, Normalize
from nanorecall.settings import ConfigError
from rules import (
    assert_all_close,
    detached,
    error,
    outputs_and_gradients,
    random_tokens,
    with_gradients,
)

H, K, V = 2, 6, 5
DOCUMENTS = [0, 5, 5, 30, 37, 69, 70]  # one is empty, one is a single token


def inputs(T=70, documents=False, gated=False, dtype=torch.float64, B=2, beta_max=2.0, seed=0):
    """Arguments of the rule that want gradients: keys of length 1, a random initial state.

    -> [q, k, v, beta, decay or None, state, cu_seqlens or None]
    """
    g = torch.Generator().manual_seed(seed)
    B = 1 if documents else B
    n_states = len(DOCUMENTS) - 1 if documents else B
    q, k, v = (torch.randn(B, H, T, width, generator=g, dtype=dtype) for width in (K, K, V))
    beta = beta_max * torch.rand(B, H, T, generator=g, dtype=dtype)
    decay = -3 * torch.rand(B, H, T, generator=g, dtype=dtype) ** 3 if gated else None
    state = torch.randn(n_states, H, K, V, generator=g, dtype=dtype)
    arguments = with_gradients([q, F.normalize(k, dim=-1), v, beta, decay, state])
    return [*arguments, torch.tensor(DOCUMENTS) if documents else None]


# ---- the rule ------------------------------------------------------------------------------------


def test_the_loop_is_the_definition():
    """S_t = exp(g) (I - beta k k^T) S_{t-1} + beta k v^T; o = S^T q / sqrt(K), as matrices."""
    q, k, v, beta, g, S, _ = detached(inputs(T=9, gated=True))
    o, last = delta_rule_recurrent(q, k, v, beta, g, S)
    for b in range(2):
        for h in range(H):
            state = S[b, h]
            for t in range(9):
                kt = k[b, h, t][:, None]
                forget = torch.eye(K, dtype=torch.float64) - beta[b, h, t] * kt @ kt.T
                state = g[b, h, t].exp() * forget @ state + beta[b, h, t] * kt @ v[b, h, t][None]
                torch.testing.assert_close(o[b, h, t], state.T @ q[b, h, t] / K**0.5)
            torch.testing.assert_close(last[b, h], state)


@pytest.mark.parametrize("rule", [delta_rule_recurrent, delta_rule_chunkwise, delta_rule])
def test_a_key_stored_again_answers_with_its_last_value(rule):
    """Of eight orthogonal keys, three are stored again, and the first one once more."""
    g = torch.Generator().manual_seed(0)
    keys, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=g))
    stored = torch.cat([keys, keys[:3], keys[:1]])[None, None]
    v = torch.randn(1, 1, 12, 4, dtype=torch.float64, generator=g)
    beta = torch.ones(1, 1, 12, dtype=torch.float64)
    _, S = rule(torch.zeros_like(stored), stored, v, beta)
    expected = torch.cat([v[0, 0, 11:12], v[0, 0, 9:11], v[0, 0, 3:8]])
    torch.testing.assert_close(keys @ S[0, 0], expected)


@pytest.mark.parametrize("gated", [False, True], ids=["delta", "gated"])
@pytest.mark.parametrize("documents", [False, True], ids=["batch", "documents"])
def test_chunked_equals_loop_for_every_chunk_size(documents, gated):
    arguments = inputs(documents=documents, gated=gated)
    expected = outputs_and_gradients(delta_rule_recurrent, arguments)
    for C in range(1, 129):
        ours = outputs_and_gradients(delta_rule_chunkwise, arguments, chunk_size=C)
        assert_all_close(ours, expected, 1e-10)


@pytest.mark.parametrize("gated", [False, True], ids=["delta", "gated"])
@pytest.mark.parametrize("documents", [False, True], ids=["batch", "documents"])
def test_chunked_equals_loop_in_float32(documents, gated):
    arguments = inputs(documents=documents, gated=gated, beta_max=1.0)
    exact = outputs_and_gradients(delta_rule_recurrent, arguments)
    single = [*with_gradients(arguments[:6], torch.float32), arguments[6]]
    for C in (1, 7, 16, 32, 64, 128):
        ours = outputs_and_gradients(delta_rule_chunkwise, single, chunk_size=C)
        for a, b in zip(ours, exact, strict=True):
            assert a.dtype == torch.float32
            assert (a - b).abs().max() <= 1e-5 * max(1, b.abs().max())


@pytest.mark.parametrize("T", [1, 15, 16, 17])
def test_no_initial_state_is_zeros(T):
    q, k, v, beta, g, S, _ = inputs(T=T, gated=True)
    expected = delta_rule_recurrent(q, k, v, beta, g, torch.zeros_like(S))
    for rule in (delta_rule_recurrent, delta_rule_chunkwise, delta_rule):
        assert_all_close(rule(q, k, v, beta, g), expected, 1e-12)


def test_documents_do_not_mix():
    q, k, v, beta, g, S, ends = inputs(documents=True, gated=True)
    whole, states = delta_rule_chunkwise(q, k, v, beta, g, S, ends)
    for d, (a, b) in enumerate(zip(DOCUMENTS[:-1], DOCUMENTS[1:])):
        if a == b:
            torch.testing.assert_close(states[d], S[d])
            continue
        o, state = delta_rule_recurrent(*(x[:, :, a:b] for x in (q, k, v, beta, g)), S[d : d + 1])
        torch.testing.assert_close(whole[:, :, a:b], o)
        torch.testing.assert_close(states[d], state[0])


@pytest.mark.parametrize("gated", [False, True], ids=["delta", "gated"])
def test_long_sequences_of_nearly_parallel_keys_stay_exact(gated):
    """Keys within 0.2 radians of each other, beta near 1: the solve must not amplify rounding."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 4096, 16, generator=g, dtype=torch.float64) for _ in range(3))
    k = F.normalize(torch.ones(16, dtype=torch.float64) + 0.06 * k, dim=-1)
    q = F.normalize(q, dim=-1)
    beta = 1 - 0.01 * torch.rand(1, 1, 4096, generator=g, dtype=torch.float64)
    decay = -0.01 * torch.rand(1, 1, 4096, generator=g, dtype=torch.float64) if gated else None

    def first(T, dtype):
        """The arguments up to token T, rounded."""
        cut = [x if x is None else x[:, :, :T] for x in (q, k, v, beta, decay)]
        return with_gradients(cut, dtype)

    o_exact, S_exact = delta_rule_recurrent(q, k, v, beta, decay)
    exact = outputs_and_gradients(delta_rule_recurrent, first(2048, torch.float64))
    for C in (16, 64):
        o, S = delta_rule_chunkwise(*first(4096, torch.float32), chunk_size=C)
        assert error(o, o_exact) < 1e-5 and error(S, S_exact) < 1e-5
        o, S = delta_rule_chunkwise(*first(4096, torch.bfloat16), chunk_size=C)
        assert o.dtype == torch.bfloat16 and S.dtype == torch.float32
        assert error(o, o_exact) < 0.05 and error(S, S_exact) < 0.05
        for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 0.1)):
            ours = outputs_and_gradients(delta_rule_chunkwise, first(2048, dtype), chunk_size=C)
            assert all(error(a, b) < tolerance for a, b in zip(ours, exact, strict=True))


@pytest.mark.parametrize("strong", [-60.0, -1e4, -math.inf])
@pytest.mark.parametrize("weak, every", [(0.0, 5), (-1e-6, 5), (-0.01, 5), (-0.01, 1)])
def test_strong_decay_between_weak_ones_neither_overflows_nor_cancels(strong, weak, every):
    q, k, v, beta, _, S, _ = inputs(T=40)
    decay = torch.full((2, H, 40), weak, dtype=torch.float64)
    decay[:, :, ::every] = strong
    exact = outputs_and_gradients(delta_rule_recurrent, [q, k, v, beta, decay.requires_grad_(), S])
    single = with_gradients([q, k, v, beta, decay, S], torch.float32)
    for C in (4, 16, 64):
        ours = outputs_and_gradients(delta_rule_chunkwise, single, chunk_size=C)
        for a, b in zip(ours, exact, strict=True):
            assert (a - b).abs().max() < 1e-5 * max(1, b.abs().max())


@pytest.mark.parametrize("strong", [-9.0, -16.5, -40.0])
def test_the_gradient_of_a_strong_decay_keeps_its_digits(strong):
    """It is smaller than its neighbours by exp(strong), and none of them may round it away."""
    decay = torch.full((2, H, 40), -0.01, dtype=torch.float64)
    decay[:, :, ::5] = strong
    q, k, v, beta, _, S, _ = inputs(T=40)
    arguments = [q, k, v, beta, decay.requires_grad_(), S]
    exact = outputs_and_gradients(delta_rule_recurrent, arguments)[6]
    single = with_gradients(arguments, torch.float32)
    for C in (1, 4, 16, 64):
        ours = outputs_and_gradients(delta_rule_chunkwise, single, chunk_size=C)[6].double()
        error = (ours - exact).abs() / exact.abs()
        assert error[:, :, ::5].max() < 1e-4
        assert (ours - exact).abs().max() < 1e-5 * exact.abs().max()
        double = outputs_and_gradients(delta_rule_chunkwise, arguments, chunk_size=C)[6]
        torch.testing.assert_close(double, exact, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gated", [False, True], ids=["delta", "gated"])
def test_half_precision_is_rounding_of_the_inputs_only(dtype, gated):
    """State and sums are float32: its error on the rounded inputs, then one rounding of o."""
    arguments = [x if x is None else x.detach().to(dtype) for x in inputs(gated=gated)[:6]]
    exact, last = delta_rule_recurrent(*(x if x is None else x.double() for x in arguments))
    for rule in (delta_rule_recurrent, delta_rule_chunkwise):
        o, S = rule(*arguments)
        assert o.dtype == dtype and S.dtype == torch.float32
        torch.testing.assert_close(S.double(), last, rtol=1e-5, atol=1e-5)
        rtol = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(o.double(), exact.to(dtype).double(), rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("documents", [False, True], ids=["batch", "documents"])
def test_no_tokens_leave_the_state_alone(documents):
    S, B = torch.randn(2, H, K, V), 1 if documents else 2
    empty = [torch.zeros(B, H, 0, *width) for width in ((K,), (K,), (V,), (), ())]
    ends = torch.tensor([0, 0, 0]) if documents else None
    for rule in (delta_rule_recurrent, delta_rule_chunkwise, delta_rule):
        o, after = rule(*empty, S, ends)
        assert o.shape == empty[2].shape and torch.equal(after, S)


def test_gradients_passed_in_are_read_only_and_may_have_any_strides():
    arguments = inputs(gated=True)
    for rule in (delta_rule_recurrent, delta_rule_chunkwise):
        o, S = rule(*arguments)
        do = torch.ones(V, dtype=o.dtype).expand(o.shape)
        dS = torch.randn(2, H, V, K, dtype=S.dtype).mT
        before = dS.clone()
        grads = torch.autograd.grad((o, S), arguments[:6], (do, dS))
        assert torch.equal(dS, before)
        outputs = delta_rule_recurrent(*arguments)
        expected = torch.autograd.grad(outputs, arguments[:6], (do.contiguous(), before))
        assert_all_close(grads, expected, 1e-10)


def test_the_chosen_form_gets_every_argument(monkeypatch):
    arguments = inputs(documents=True, gated=True)
    assert_all_close(delta_rule(*arguments), delta_rule_recurrent(*arguments), 1e-10)
    calls = []

    def note_call(name):
        def call(*arguments):
            calls.append((name, *map(id, arguments[:7]), *arguments[7:]))

        return call

    for name in ("delta_rule_recurrent", "delta_rule_chunkwise", "delta_rule_fla"):
        monkeypatch.setattr(delta, name, note_call(name))
    one = [x[:, :, :1] for x in arguments[:5]] + [arguments[5][:1], torch.tensor([0, 1])]
    delta_rule(*arguments, chunk_size=5)
    delta_rule(*one, chunk_size=5)
    monkeypatch.setattr(delta, "why_no_fla", lambda *a: None)
    delta_rule(*arguments, chunk_size=5)
    assert calls == [
        ("delta_rule_chunkwise", *map(id, arguments), 5),
        ("delta_rule_recurrent", *map(id, one)),
        ("delta_rule_fla", *map(id, arguments)),
    ]


def test_autocast_changes_nothing_inside():
    arguments = inputs(dtype=torch.float32, gated=True)
    expected = outputs_and_gradients(delta_rule_chunkwise, arguments)
    with torch.autocast("cpu", torch.bfloat16):
        ours = outputs_and_gradients(delta_rule_chunkwise, arguments)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_shapes_that_do_not_fit_are_refused_by_name():
    q, k, v, beta, g, S, _ = inputs()
    for rule in (delta_rule_recurrent, delta_rule_chunkwise):
        with pytest.raises(ValueError, match="beta must have shape"):
            rule(q, k, v, beta[..., None])
        with pytest.raises(ValueError, match="state must have shape"):
            rule(q, k, v, beta, None, S.mT)
        with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to T=70"):
            rule(q[:1], k[:1], v[:1], beta[:1], None, None, torch.tensor([0, 30, 60]))
        with pytest.raises(ValueError, match="cu_seqlens must rise"):
            rule(q[:1], k[:1], v[:1], beta[:1], None, None, torch.tensor([0]))
        with pytest.raises(ValueError, match="one sequence"):
            rule(q, k, v, beta, None, None, torch.tensor([0, 70]))


ODD_ENDS = [
    ([1, 70], "must rise from 0 to T=70"),
    ([0, 40, 30, 70], "must rise from 0 to T=70"),
    ([-5, 70], "must rise from 0 to T=70"),
    ([0, 71], "must rise from 0 to T=70"),
    ([70], "must rise from 0 to T=70"),
    ([], "tensor of integers with one axis"),
    ([[0, 70]], "tensor of integers with one axis"),
    ([0.0, 70.0], "tensor of integers with one axis"),
    ([False, True], "tensor of integers with one axis"),
]


@pytest.mark.parametrize("ends, message", ODD_ENDS, ids=str)
def test_odd_ends_of_documents_are_refused_alike_everywhere(ends, message):
    q, k, v, beta, g, S, _ = inputs(documents=True, gated=True)
    model = GPT(config(seq_len=70))
    tokens = torch.zeros(1, 70, dtype=torch.long)
    for rule in (delta_rule_recurrent, delta_rule_chunkwise, delta_rule_fla, delta_rule):
        with pytest.raises(ValueError, match=message):
            rule(q, k, v, beta, g, None, torch.tensor(ends))
    with pytest.raises(ValueError, match=message):
        model(tokens, None, torch.tensor(ends))
    with pytest.raises(ValueError, match="tensor of integers"):
        model(tokens, None, [0, 70])


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_ends_may_be_integers_of_any_size(kind):
    arguments = inputs(documents=True, gated=True)
    ends = arguments[6].to(kind)
    for rule in (delta_rule_recurrent, delta_rule_chunkwise):
        assert_all_close(rule(*arguments[:6], ends), rule(*arguments), 0)


# ---- flash-linear-attention: its naive form as an oracle, its kernels by a stand-in --------------


@pytest.mark.skipif(fla_naive("delta_rule") is None, reason="fla-core is not installed")
@pytest.mark.parametrize("rule", [delta_rule_recurrent, delta_rule_chunkwise])
def test_equals_the_naive_forms_of_flash_linear_attention(rule):
    q, k, v, beta, g, S, _ = inputs(T=64, gated=True, dtype=torch.float32, beta_max=1.0)
    theirs = fla_naive("delta_rule")
    gated_theirs = fla_naive("gated_delta_rule").naive_recurrent_gated_delta_rule

    def ungated(q, k, v, beta, S):
        return rule(q, k, v, beta, None, S)

    def gated(q, k, v, beta, g, S):
        layout = [x.transpose(1, 2) for x in (q, k, v, beta, g)]  # (B, T, H, ...)
        o, state = gated_theirs(*layout, None, S, True)
        return o.transpose(1, 2), state

    for ours, naive, arguments in (
        (ungated, theirs.delta_rule_recurrence, [q, k, v, beta, S]),
        (rule, theirs.delta_rule_chunkwise, [q, k, v, beta]),
        (rule, gated, [q, k, v, beta, g, S]),
    ):
        expected = outputs_and_gradients(naive, arguments)
        assert_all_close(outputs_and_gradients(ours, arguments), expected, 2e-5)


def test_the_gradient_of_a_convolution_is_summed_in_float32(monkeypatch):
    """In bfloat16, a sum of 2048 parts would not grow beyond a few hundred of them."""
    monkeypatch.setattr(ops, "CONV_BLOCK", 1)  # a part for each sequence
    g = torch.Generator().manual_seed(0)
    x = (1 + 0.1 * torch.randn(2048, 8, 4, generator=g)).bfloat16()
    w = torch.randn(3, 4, generator=g).bfloat16().requires_grad_()
    exact = w.detach().double().requires_grad_()
    ours, expected = ops.causal_conv1d(x, w), ops.naive_causal_conv1d(x.double(), exact)
    (dw,) = torch.autograd.grad(ours, w, torch.ones_like(ours))
    (expected_dw,) = torch.autograd.grad(expected, exact, torch.ones_like(expected))
    assert dw.dtype == torch.bfloat16 and error(dw, expected_dw) < 0.005


@pytest.mark.parametrize("gated", [False, True], ids=["delta", "gated"])
@pytest.mark.parametrize("documents", [False, True], ids=["batch", "documents"])
def test_kernels_get_their_arguments_in_their_layout(monkeypatch, gated, documents):
    """The kernels need a GPU. Stand-ins with the signatures of fla-core 0.6.0 check the call."""
    arguments = inputs(gated=gated, documents=documents, dtype=torch.float32)

    def check(q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens):
        T = arguments[0].shape[2]
        assert q.shape[1:] == k.shape[1:] == (T, H, K)
        assert v.shape[1:] == (T, H, V) and beta.shape[1:] == (T, H)
        assert all(x.is_contiguous() and x.dtype == q.dtype for x in (q, k, v, beta))
        assert g is None or g.dtype == torch.float32
        assert scale is None and output_final_state and (cu_seqlens is not None) == documents
        assert not documents or (cu_seqlens.dtype == torch.long and cu_seqlens.diff().min() > 0)
        layout = [x if x is None else x.transpose(1, 2) for x in (q, k, v, beta, g)]
        o, state = delta_rule_recurrent(*layout, initial_state, cu_seqlens)
        return o.transpose(1, 2), state

    def chunk_delta_rule(
        q,
        k,
        v,
        beta,
        scale=None,
        initial_state=None,
        output_final_state=False,
        use_qk_l2norm_in_kernel=False,
        cu_seqlens=None,
        cu_seqlens_cpu=None,
        **kwargs,
    ):
        assert not use_qk_l2norm_in_kernel and not kwargs
        return check(q, k, v, None, beta, scale, initial_state, output_final_state, cu_seqlens)

    def chunk_gated_delta_rule(
        q,
        k,
        v,
        g,
        beta,
        scale=None,
        initial_state=None,
        output_final_state=False,
        use_qk_l2norm_in_kernel=False,
        use_beta_sigmoid_in_kernel=False,
        allow_neg_eigval=False,
        state_v_first=False,
        cu_seqlens=None,
        **kwargs,
    ):
        assert not use_qk_l2norm_in_kernel and not use_beta_sigmoid_in_kernel
        assert not state_v_first and not kwargs
        return check(q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens)

    monkeypatch.setattr(delta, "load_fla", lambda: (chunk_delta_rule, chunk_gated_delta_rule))
    expected = outputs_and_gradients(delta_rule_recurrent, arguments)
    assert_all_close(outputs_and_gradients(delta_rule_fla, arguments), expected, 1e-5)
    no_state = [*arguments[:5], None, arguments[6]]
    assert_all_close(delta_rule_fla(*no_state), delta_rule_recurrent(*no_state), 1e-5)
    # The kernels take one dtype: that of the values.
    q, k, v, beta = (x.detach().to(torch.bfloat16) for x in arguments[:4])
    exact, last = delta_rule_recurrent(q, k, v, beta, *arguments[4:])
    for mixed in ((q, k, v, beta), (q.float(), k.float(), v, beta.float())):
        o, S = delta_rule_fla(*mixed, *arguments[4:])
        assert o.dtype == torch.bfloat16 and torch.equal(o, exact) and torch.equal(S, last)
    with pytest.raises(ValueError, match="state must have shape"):
        delta_rule_fla(*arguments[:5], arguments[5].mT, arguments[6])


def test_the_kernel_is_chosen_only_where_it_works(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert "CUDA" in delta.why_no_fla(cpu, torch.bfloat16, 64)
    monkeypatch.setattr(delta, "load_fla", lambda: "it cannot be imported: no triton")
    assert "no triton" in delta.why_no_fla(cuda, torch.bfloat16, 64)
    monkeypatch.setattr(delta, "load_fla", lambda: (object(), object()))
    assert "bfloat16" in delta.why_no_fla(cuda, torch.float32, 64)
    assert "256" in delta.why_no_fla(cuda, torch.bfloat16, 273)
    assert delta.why_no_fla(cuda, torch.bfloat16, 64) is None
    backend = delta.DeltaNet.describe_backend(config(), cuda, torch.bfloat16)
    assert "its own chunks" in backend
    backend = delta.DeltaNet.describe_backend(config(), cpu, torch.bfloat16)
    assert "chunks of 4 tokens (flash-linear-attention runs on" in backend


@pytest.fixture
def pretend_hardware(monkeypatch):
    """pretend_hardware(hopper=..., triton=...): what flash-linear-attention finds on a machine."""

    def pretend(hopper, triton):
        found = types.SimpleNamespace(
            IS_NVIDIA_HOPPER=hopper,
            TRITON_ABOVE_3_4_0=triton >= (3, 4, 0),
            TRITON_ABOVE_3_7_1=triton >= (3, 7, 1),
        )
        monkeypatch.setitem(sys.modules, "fla", types.SimpleNamespace(utils=found))
        monkeypatch.setitem(sys.modules, "tilelang", None)
        for module in (delta, linear):
            monkeypatch.setattr(module, "load_fla", lambda: (object(), object()))
        delta.why_no_decay_of_heads.cache_clear()

    yield pretend
    delta.why_no_decay_of_heads.cache_clear()


@pytest.mark.parametrize(
    "hopper, triton, is_wrong",
    [
        (True, (3, 6, 0), True),
        (True, (3, 4, 0), True),
        (True, (3, 3, 1), False),
        (True, (3, 7, 1), False),
        (False, (3, 6, 0), False),
    ],
)
def test_a_kernel_that_triton_compiles_wrongly_is_not_chosen(
    pretend_hardware, hopper, triton, is_wrong
):
    pretend_hardware(hopper, triton)
    cuda = torch.device("cuda")
    of_heads = delta.GatedDeltaNet, linear.RetNet, linear.Mamba2
    others = delta.DeltaNet, linear.LinearAttention, linear.GLA
    for model_class in of_heads + others:
        backend = model_class.describe_backend(config(), cuda, torch.bfloat16)
        assert ("Triton 3.7.1" in backend) == (is_wrong and model_class in of_heads)
        assert ("its own chunks" in backend) != ("Triton 3.7.1" in backend)


@pytest.mark.parametrize("name", ["no decay", "decay of heads", "decay of rows"])
def test_the_rules_ask_for_the_kernel_of_their_decay(monkeypatch, name):
    asked = []

    def why_not(*arguments):
        asked.append(arguments[-1])
        return "a reason"

    monkeypatch.setattr(delta, "why_no_fla", why_not)
    monkeypatch.setattr(linear, "why_no_fla", why_not)
    q, k, v, beta, g, _, _ = inputs(gated=True)
    decay = {"no decay": None, "decay of heads": g[..., None], "decay of rows": g[..., None] * k**2}
    linear.additive(q, k, v, decay[name])
    if name != "decay of rows":
        delta.delta_rule(q, k, v, beta, None if name == "no decay" else g)
    assert set(asked) == {name == "decay of heads"}


def test_without_the_extra_the_reason_is_said(monkeypatch):
    for name in ("fla", "fla.ops.delta_rule", "fla.ops.gated_delta_rule"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    delta.load_fla.cache_clear()
    assert "cannot be imported" in delta.load_fla()
    kernels = types.SimpleNamespace(chunk_delta_rule="plain", chunk_gated_delta_rule="gated")
    for name in ("fla", "fla.ops", "fla.ops.delta_rule", "fla.ops.gated_delta_rule"):
        monkeypatch.setitem(sys.modules, name, kernels)
    delta.load_fla.cache_clear()
    assert delta.load_fla() == ("plain", "gated")
    delta.load_fla.cache_clear()


# ---- DeltaNet ------------------------------------------------------------------------------------


def config(**changes):
    sizes = dict(dim=8, n_layers=2, n_heads=2, dk=6, dv=4, chunk_size=4)
    sizes |= dict(vocab_size=19, seq_len=12, init_std=0.3)
    return delta.Config(**{**sizes, **changes})


def build(cls=delta.DeltaNet, **changes):
    torch.manual_seed(0)
    c = config(**changes)
    c.check()
    return cls(c).double()


SWITCHES = [
    dict(),
    dict(conv_size=0, q_kernel="relu", k_kernel="elu1", v_kernel="none"),
    dict(q_kernel="taylor", k_kernel="taylor", k_norm="l2"),
    dict(k_norm="l1", q_norm="rms", k_kernel="softmax"),
    dict(q_gated=True, k_gated=True),
    dict(att_use_output_gate=True),
    dict(att_use_output_gate=True, att_output_gate_act="sigmoid", use_out_norm=False),
    dict(use_beta=False),
    dict(lr_temp=0.3, allow_neg_eigval=True),
]


@pytest.mark.parametrize("cls", [delta.DeltaNetLayer, delta.GatedDeltaNetLayer])
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_mixer_equals_naive_in_outputs_and_gradients(cls, switches):
    torch.manual_seed(0)
    mixer = cls(config(**switches)).double()
    x = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)
    parameters = [x, *mixer.parameters()]
    ours = mixer(x)
    naive = torch.stack([naive_delta_layer(mixer, sequence) for sequence in x])
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
    dict(conv_size=0, use_ffn=True, residual_mul=True),
    dict(att_use_output_gate=True, tie_weights=True, conv_size=1),
]


@pytest.mark.parametrize("cls", [delta.DeltaNet, delta.GatedDeltaNet])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_pieces_with_a_cache_equal_one_forward_pass(cls, changes):
    model, tokens = build(cls, **changes), random_tokens(3)
    expected, _ = model(tokens)
    for pieces in ([1] * 12, [12], [5, 1, 1, 5], [2, 10]):
        cache, logits = None, []
        for piece in tokens.split(pieces, dim=1):
            new_logits, cache = model.forward_cached(piece, cache)
            logits.append(new_logits)
        torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("cls", [delta.DeltaNet, delta.GatedDeltaNet])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_continuations_leave_the_cache_of_their_prompt_alone(cls, changes):
    model, tokens = build(cls, **changes), random_tokens(3)
    _, prompt = model.forward_cached(tokens[:, :6])
    first, _ = model.forward_cached(tokens[:, 6:], prompt)
    model.forward_cached(tokens[:, :6].flip(1), prompt)
    again, _ = model.forward_cached(tokens[:, 6:], prompt)
    torch.testing.assert_close(again, first)


@pytest.mark.parametrize("cls", [delta.DeltaNet, delta.GatedDeltaNet])
@pytest.mark.parametrize(
    "changes", [*VARIANTS, dict(q_kernel="taylor", k_kernel="taylor"), dict(conv_size=3)], ids=str
)
def test_state_bytes_is_the_size_of_the_cache_of_any_length(cls, changes):
    model = build(cls, **changes).float()
    expected = inference_state_bytes(model, 12)
    assert expected == inference_state_bytes(model, 1000) > 0
    for T in (1, 2, 12):
        _, cache = model.forward_cached(torch.zeros(1, T, dtype=torch.long))
        found = 0
        for layer in cache:
            found += sum(x.untyped_storage().nbytes() for x in layer.values() if torch.is_tensor(x))
        assert found == expected


@pytest.mark.parametrize("cls", [delta.DeltaNet, delta.GatedDeltaNet])
def test_without_a_mixer_nothing_is_cached(cls):
    assert inference_state_bytes(cls(config(use_att=False, use_ffn=True)), 12) == 0


@pytest.mark.parametrize("cls", [delta.DeltaNet, delta.GatedDeltaNet])
def test_chunk_size_is_used_and_changes_nothing(cls, monkeypatch):
    """A chunk of 16 is cut to the 12 tokens."""
    used, init = [], delta.BatchChunks.__init__

    def note_size(self, B, H, T, C):
        used.append(C)
        init(self, B, H, T, C)

    monkeypatch.setattr(delta.BatchChunks, "__init__", note_size)
    tokens = random_tokens(3)
    losses = [build(cls, chunk_size=C)(tokens, tokens)[1] for C in (1, 5, 16)]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-10, atol=1e-12)
    assert set(used) == {1, 5, 12}


def test_bfloat16_autocast_is_close_to_float32():
    model, tokens = build(dim=32, dk=16, dv=16).float(), random_tokens(8)
    parameters = list(model.parameters())
    exact, loss = model(tokens, tokens)
    grads = torch.autograd.grad(loss, parameters)
    with torch.autocast("cpu", torch.bfloat16):
        half, half_loss = model(tokens, tokens)
        _, cache = model.forward_cached(tokens)
    assert (half.float() - exact).abs().max() < 0.05 * exact.abs().max()
    assert cache[0]["state"].dtype == torch.float32
    for a, b in zip(torch.autograd.grad(half_loss, parameters), grads):
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.99


def test_short_convolution_keeps_the_dtype():
    x = torch.zeros(1, 5, 3, dtype=torch.bfloat16)
    assert ShortConvolution(3, 4)(x).dtype == torch.bfloat16


def test_norms_sum_in_float32():
    """Under autocast, too: the squares of 300 overflow float16."""
    x = 300 * torch.ones(2, 12).to(torch.float16)
    with torch.autocast("cpu", torch.bfloat16):
        assert (NORMS["l2"](x).norm(dim=-1) - 1).abs().max() < 1e-5
        x = torch.randn(4, 64)
        torch.testing.assert_close(RMSNorm(64)(x), F.rms_norm(x, (64,), eps=1e-6))


def test_decay_starts_in_the_range_of_the_paper():
    """Steps log-uniform between 0.001 and 0.1, rates uniform between 0 and 16."""
    layer = delta.GatedDeltaNetLayer(config(n_heads=200))
    dt, rate = F.softplus(layer.dt_bias), layer.A_log.exp()
    assert 1e-3 <= dt.min() < 0.0015 and 0.007 < dt.median() < 0.014 and 0.065 < dt.max() <= 0.1
    assert rate.min() < 0.5 and 6 < rate.median() < 10 and 15 < rate.max() <= 16


def test_weight_decay_leaves_the_decay_alone():
    layer = delta.GatedDeltaNetLayer(config())
    optimizer = train.configure_optimizer(layer, train.TrainConfig(weight_decay=0.1))
    decay, no_decay = optimizer.param_groups
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.1, 0)
    assert {id(layer.A_log), id(layer.dt_bias)} <= {id(p) for p in no_decay["params"]}


def test_short_convolution_and_norms_have_the_right_gradients():
    torch.manual_seed(0)
    for T in (1, 2, 6):
        x, w = torch.randn(2, T, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
        torch.autograd.gradcheck(CausalConv1d.apply, (x.requires_grad_(), w.requires_grad_()))
        for n in (1, 3):
            torch.autograd.gradcheck(Normalize.apply, (x, n))


def model_config(*flags):
    p = train.parse(["--model", "delta", *flags])
    return build_model_config(p, p.data_module.Data(p.data))


def describe_backend(*flags):
    c = model_config(*flags)
    return delta.DeltaNet.describe_backend(c, torch.device("cpu"), torch.float32)


def test_defaults_of_delta_models():
    assert model_config().conv_size == 4 and model_config().k_norm == "l2"


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--pos_emb rope", "pos_emb='rope' has no effect: the recurrence knows"),
        ("--n_kv_heads 1", "n_kv_heads"),
        ("--use_beta 0 --allow_neg_eigval 1", "use_beta is 0"),
        ("--use_att 0 --use_ffn 1 --use_out_norm 0", "use_att is 0"),
    ],
)
def test_settings_without_effect_are_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        model_config(*flags.split())


@pytest.mark.parametrize(
    "flags", ["--k_norm none", "--k_norm rms", "--k_norm layer --k_kernel softmax"]
)
def test_long_keys_are_warned_of(flags):
    assert "long keys may" in describe_backend(*flags.split())


def test_the_backend_is_described():
    assert "long keys" not in describe_backend()
    assert "long keys" not in describe_backend("--k_norm=none", "--k_kernel=softmax")
    assert describe_backend("--use_att", "0", "--use_ffn", "1") == "none (use_att is 0)"
