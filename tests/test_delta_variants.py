"""delta_variants.py: chunks against the recurrence and the definition; models from their weights.

What KDA and DeltaProduct share with every model is tested in test_contract.py and test_hybrid.py.
"""

import itertools
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F

import data_track
import delta
import delta_variants
import train
from delta import recurrent_varlen
from delta_variants import (
    KDA,
    DeltaProduct,
    delta_product,
    kda,
    kda_chunkwise,
    kda_fla,
    kda_recurrent,
)
from naive import fla_naive, naive_activation, naive_heads, naive_qkv
from nanorecall.build import build_model_config, inference_state_bytes
from nanorecall.settings import ConfigError
from rules import (
    assert_all_close,
    detached,
    error,
    outputs_and_gradients,
    random_tokens,
    with_gradients,
)
from toys import assert_same

H, K, V = 2, 6, 5
DOCUMENTS = [0, 5, 5, 30, 37, 69, 70]  # one is empty, one is a single token


def kda_inputs(T=70, documents=False, B=2, dtype=torch.float64, beta_max=2.0):
    """[q, k, v, beta, decay, state, ends or None]: keys of length 1, a random initial state."""
    g = torch.Generator().manual_seed(0)
    B = 1 if documents else B
    n_states = len(DOCUMENTS) - 1 if documents else B

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    q, k, v = (normal(B, H, T, width) for width in (K, K, V))
    beta = beta_max * torch.rand(B, H, T, generator=g, dtype=torch.float64)
    decay = -3 * torch.rand(B, H, T, K, generator=g, dtype=torch.float64) ** 3
    tokens = [q, F.normalize(k, dim=-1), v, beta, decay, normal(n_states, H, K, V)]
    return [*with_gradients(tokens, dtype), torch.tensor(DOCUMENTS) if documents else None]


def product_inputs(n, T=23, documents=False, dtype=torch.float64):
    """[q, k, v, beta, state, ends or None] with n steps a token."""
    q, k, v, beta, _, state, ends = kda_inputs(n * T, B=1 if documents else 2)
    k, v, beta = (x.unflatten(2, (T, n)) for x in (k, v, beta))
    ends = torch.tensor([0, 5, 5, 22, 23]) if documents else None
    state = torch.cat([state] * 4) if documents else state
    return [*with_gradients([q[:, :, :T], k, v, beta, state], dtype), ends]


# ---- a decay for each row ------------------------------------------------------------------------


def test_the_loop_is_the_definition():
    """S_t = (I - beta k k^T) diag(exp(g)) S_{t-1} + beta k v^T; o = S^T q / sqrt(K)."""
    q, k, v, beta, g, S, _ = detached(kda_inputs(T=9))
    o, last = kda_recurrent(q, k, v, beta, g, S)
    eye = torch.eye(K, dtype=torch.float64)
    for b in range(2):
        for h in range(H):
            state = S[b, h]
            for t in range(9):
                key, strength = k[b, h, t], beta[b, h, t]
                forget = eye - strength * torch.outer(key, key)
                state = forget @ torch.diag(g[b, h, t].exp()) @ state
                state = state + strength * torch.outer(key, v[b, h, t])
                torch.testing.assert_close(o[b, h, t], state.T @ q[b, h, t] / K**0.5)
            torch.testing.assert_close(last[b, h], state)


@pytest.mark.parametrize("documents", [False, True], ids=["batch", "documents"])
def test_chunked_equals_loop_for_every_chunk_size(documents):
    arguments = kda_inputs(documents=documents)
    expected = outputs_and_gradients(kda_recurrent, arguments)
    for C in [*range(1, 20), 24, 32, 37, 64, 69, 70, 71, 128]:
        ours = outputs_and_gradients(kda_chunkwise, arguments, chunk_size=C)
        assert_all_close(ours, expected, 1e-10)


@pytest.mark.parametrize("rule", [kda_recurrent, kda_chunkwise])
def test_rows_that_decay_alike_are_gated_deltanet_and_without_decay_deltanet(rule):
    q, k, v, beta, g, S, _ = detached(kda_inputs(T=40))
    g = g[..., 0]
    of_rows = g[..., None].expand(-1, -1, -1, K)
    expected = delta.delta_rule_recurrent(q, k, v, beta, g, S)
    assert_all_close(rule(q, k, v, beta, of_rows, S), expected, 1e-12)
    expected = delta.delta_rule_recurrent(q, k, v, beta, None, S)
    assert_all_close(rule(q, k, v, beta, torch.zeros_like(of_rows), S), expected, 1e-12)


@pytest.mark.parametrize("T", [1, 15, 16, 17])
def test_no_initial_state_is_zeros(T):
    *tokens, state, _ = kda_inputs(T=T)
    expected = kda_recurrent(*tokens, torch.zeros_like(state))
    for rule in (kda_recurrent, kda_chunkwise, kda):
        assert_all_close(rule(*tokens), expected, 1e-12)


def test_documents_do_not_mix():
    *tokens, state, ends = kda_inputs(documents=True)
    for rule in (kda_recurrent, kda_chunkwise):
        o, states = rule(*tokens, state, ends)
        for d, (a, b) in enumerate(itertools.pairwise(DOCUMENTS)):
            alone, after = rule(*(x[:, :, a:b] for x in tokens), state[d : d + 1])
            torch.testing.assert_close(o[:, :, a:b], alone)
            torch.testing.assert_close(states[d], after[0])


def test_first_and_second_derivatives_by_differences():
    arguments = kda_inputs(T=5, B=1)[:6]

    def rule(*tokens):
        return kda_chunkwise(*tokens, chunk_size=2)

    assert torch.autograd.gradcheck(rule, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(rule, arguments, fast_mode=True)


@pytest.mark.parametrize("weak", [0.0, -1e-6, -0.01])
@pytest.mark.parametrize("strong", [-9.0, -60.0, -1e4, -math.inf])
def test_strong_decay_between_weak_ones_neither_overflows_nor_cancels(strong, weak):
    """In every other row of the state, at every fifth token."""
    q, k, v, beta, g, S, _ = kda_inputs(T=40)
    g = torch.full_like(g.detach(), weak)
    g[:, :, ::5, ::2] = strong
    arguments = with_gradients([q, k, v, beta, g, S], torch.float64)
    exact = outputs_and_gradients(kda_recurrent, arguments)
    single = with_gradients(arguments, torch.float32)
    for C in (1, 4, 16, 37, 64):
        ours = outputs_and_gradients(kda_chunkwise, single, chunk_size=C)
        for a, b in zip(ours, exact, strict=True):
            assert (a - b).abs().max() < 1e-5 * max(1, b.abs().max())
        # The gradient of a strong decay is small, and its neighbours must not round it away.
        a, b = ours[6][:, :, ::5, ::2].double(), exact[6][:, :, ::5, ::2]
        assert strong < -50 or ((a - b).abs() < 1e-4 * b.abs() + 1e-9).all()


def test_long_sequences_of_nearly_parallel_keys_stay_exact():
    """Keys within 0.2 radians of each other, beta near 1: the solve must not amplify rounding."""
    g = torch.Generator().manual_seed(0)
    T = 2048
    q, k, v = (torch.randn(1, 1, T, 16, generator=g, dtype=torch.float64) for _ in range(3))
    k = F.normalize(torch.ones(16, dtype=torch.float64) + 0.06 * k, dim=-1)
    beta = 1 - 0.01 * torch.rand(1, 1, T, generator=g, dtype=torch.float64)
    decay = -0.01 * torch.rand(1, 1, T, 16, generator=g, dtype=torch.float64)
    arguments = with_gradients([F.normalize(q, dim=-1), k, v, beta, decay], torch.float64)
    exact = outputs_and_gradients(kda_recurrent, arguments)
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 0.1)):
        single = with_gradients(arguments, dtype)
        ours = outputs_and_gradients(kda_chunkwise, single, chunk_size=32)
        assert ours[0].dtype == dtype and ours[1].dtype == torch.float32
        assert max(error(a, b) for a, b in zip(ours, exact, strict=True)) < tolerance


@pytest.mark.parametrize("rule", [kda_recurrent, kda_chunkwise])
def test_autocast_changes_nothing_inside(rule):
    arguments = kda_inputs(T=20, dtype=torch.float32)
    expected = rule(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        ours = rule(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("documents", [False, True], ids=["batch", "documents"])
def test_no_tokens_leave_the_state_alone(documents):
    *tokens, state, _ = kda_inputs(T=1, B=1 if documents else 2)
    state = torch.cat([state, state])[:2]
    tokens = [x[:, :, :0] for x in tokens]
    ends = torch.tensor([0, 0, 0]) if documents else None
    for rule in (kda_recurrent, kda_chunkwise, kda):
        o, after = rule(*tokens, state, ends)
        assert o.shape == tokens[2].shape and torch.equal(after, state)


def test_shapes_that_do_not_fit_are_refused_by_name():
    q, k, v, beta, g, S, _ = kda_inputs()
    for rule in (kda_recurrent, kda_chunkwise, kda_fla):
        for wrong in (g[..., :5], g[..., :1], None):
            with pytest.raises(ValueError, match="log_decay must have the shape of q"):
                rule(q, k, v, beta, wrong)
        with pytest.raises(ValueError, match="state must have shape"):
            rule(q, k, v, beta, g, S.mT)
        with pytest.raises(ValueError, match="beta must have shape"):
            rule(q, k, v, beta[..., None], g)
        with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to T=70"):
            rule(*(x[:1] for x in (q, k, v, beta, g)), None, torch.tensor([0, 30, 60]))


# ---- several steps a token -----------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_token_is_the_product_of_its_steps(n):
    """One matrix at a time, without the error that delta.py computes."""
    q, k, v, beta, S, _ = detached(product_inputs(n, T=7))
    o, last = delta_product(q, k, v, beta, S, chunk_size=3)
    eye = torch.eye(K, dtype=torch.float64)
    for b in range(2):
        for h in range(H):
            state = S[b, h]
            for t in range(7):
                for j in range(n):
                    key, strength = k[b, h, t, j], beta[b, h, t, j]
                    state = (eye - strength * torch.outer(key, key)) @ state
                    state = state + strength * torch.outer(key, v[b, h, t, j])
                torch.testing.assert_close(o[b, h, t], state.T @ q[b, h, t] / K**0.5)
            torch.testing.assert_close(last[b, h], state)


def product_recurrent(q, k, v, beta, state, cu_seqlens=None):
    """delta_product one step after another: each is one step of gradient descent."""
    if cu_seqlens is not None:
        return recurrent_varlen(product_recurrent, [q, k, v, beta], state, cu_seqlens)
    outputs = [v[:, :, :0, 0]]  # of a document without tokens
    for t in range(q.shape[2]):
        for j in range(k.shape[3]):
            key = k[:, :, t, j, :, None]  # (B, H, K, 1)
            u = v[:, :, t, j, None] - key.mT @ state  # (B, H, 1, V)
            state = state + beta[:, :, t, j, None, None] * key @ u
        outputs.append(q[:, :, t, None] @ state / math.sqrt(q.shape[-1]))
    return torch.cat(outputs, dim=2), state


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("documents", [False, True], ids=["batch", "documents"])
def test_product_equals_its_steps_for_every_chunk_size(documents, n):
    """In outputs, states and gradients, for sizes that divide 23 tokens and those that do not."""
    arguments = product_inputs(n, documents=documents)
    expected = outputs_and_gradients(product_recurrent, arguments)
    for C in [*range(1, 13), 16, 22, 23, 24, 64]:
        ours = outputs_and_gradients(delta_product, arguments, chunk_size=C)
        assert_all_close(ours, expected, 1e-10)


def test_long_products_of_nearly_parallel_keys_stay_exact():
    """Two steps for each of 1,024 tokens; keys within 0.2 radians of each other, beta near 1."""
    g = torch.Generator().manual_seed(0)
    T, n = 1024, 2
    k, v = (torch.randn(1, 1, T, n, 16, generator=g, dtype=torch.float64) for _ in range(2))
    k = F.normalize(torch.ones(16, dtype=torch.float64) + 0.06 * k, dim=-1)
    q = F.normalize(torch.randn(1, 1, T, 16, generator=g, dtype=torch.float64), dim=-1)
    beta = 1 - 0.01 * torch.rand(1, 1, T, n, generator=g, dtype=torch.float64)
    state = torch.randn(1, 1, 16, 16, generator=g, dtype=torch.float64)
    arguments = with_gradients([q, k, v, beta, state], torch.float64)
    exact = outputs_and_gradients(product_recurrent, arguments)
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 0.1)):
        rounded = with_gradients(arguments, dtype)
        ours = outputs_and_gradients(delta_product, rounded, chunk_size=32)
        assert ours[0].dtype == dtype and ours[1].dtype == torch.float32
        assert max(error(a, b) for a, b in zip(ours, exact, strict=True)) < tolerance


def transpositions(permutation):
    """Pairs to swap one after another that make a permutation of objects: i goes to p[i]."""
    swaps = []
    at = list(range(len(permutation)))  # which object lies where
    for place in range(len(at)):
        wanted = list(permutation).index(place)
        other = at.index(wanted)
        if other != place:
            swaps.append((place, other))
            at[place], at[other] = at[other], at[place]
    return swaps


@pytest.mark.parametrize("task", ["s3", "s5"])
def test_one_step_fewer_than_objects_tracks_every_permutation(task):
    """A hand-made memory: a row is a place, a swap a reflection along two rows' difference."""
    data = data_track.Data(data_track.Config(task=task, input_seq_len=80))
    tokens, targets, _ = data.batch("test", 0, [0])
    n_objects = data_track.OBJECTS[task]
    n = n_objects - 1
    permutations = data_track.permutations(n_objects)
    k = torch.zeros(1, 1, 80, n, n_objects)
    beta = torch.zeros(1, 1, 80, n)
    for t, token in enumerate(tokens[0].tolist()):
        for j, (a, b) in enumerate(transpositions(permutations[token])):
            k[0, 0, t, j, a], k[0, 0, t, j, b] = math.sqrt(0.5), -math.sqrt(0.5)
            beta[0, 0, t, j] = 2
    start = torch.eye(n_objects)[None, None]  # object i lies in place i
    v = torch.zeros(1, 1, 80, n, n_objects)
    place = torch.arange(n_objects, dtype=torch.float32).expand(1, 1, 80, -1)
    q = place * math.sqrt(n_objects)  # reads where each object lies
    o, _ = delta_product(q, k, v, beta, start)
    expected = torch.from_numpy(permutations)[targets[0]]
    torch.testing.assert_close(o[0, 0], expected.float(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("documents", [False, True], ids=["batch", "documents"])
def test_a_batch_and_documents_are_their_sequences(documents):
    arguments = product_inputs(2, documents=documents)
    *tokens, state, ends = arguments
    for C in (1, 3, 16, 64):
        o, states = delta_product(*arguments, chunk_size=C)
        pairs = [(0, 5), (5, 5), (5, 22), (22, 23)] if documents else [(0, 23)] * 2
        for d, (a, b) in enumerate(pairs):
            row = 0 if documents else d
            cut = [x[row : row + 1, :, a:b] for x in tokens]
            alone, after = delta_product(*cut, state[d : d + 1], chunk_size=5)
            torch.testing.assert_close(o[row : row + 1, :, a:b], alone)
            torch.testing.assert_close(states[d], after[0])


# ---- flash-linear-attention: its naive forms as oracles, its kernel by a stand-in ----------------


@pytest.mark.skipif(fla_naive("kda") is None, reason="fla-core is not installed")
@pytest.mark.parametrize("rule", [kda_recurrent, kda_chunkwise])
def test_equals_the_naive_forms_of_flash_linear_attention(rule):
    theirs = fla_naive("kda")
    arguments = kda_inputs(T=64, dtype=torch.float32, beta_max=1.0)[:6]

    def in_their_layout(naive):
        def call(q, k, v, beta, g, S):
            q, k, v, beta, g = (x.transpose(1, 2) for x in (q, k, v, beta, g))
            o, state = naive(q, k, v, g, beta, initial_state=S, output_final_state=True)
            return o.transpose(1, 2), state

        return call

    ours = outputs_and_gradients(rule, arguments)
    for naive in (theirs.naive_recurrent_kda, theirs.naive_chunk_kda):
        expected = outputs_and_gradients(in_their_layout(naive), arguments)
        assert_all_close(ours, expected, 5e-5)


@pytest.mark.skipif(fla_naive("gated_delta_product") is None, reason="fla-core is not installed")
@pytest.mark.parametrize("documents", [False, True], ids=["batch", "documents"])
def test_product_equals_the_naive_form_of_flash_linear_attention(documents):
    arguments = product_inputs(3, documents=documents, dtype=torch.float32)

    def theirs(q, k, v, beta, S, ends):
        q = q.transpose(1, 2)
        k, v, beta = (x.flatten(2, 3).transpose(1, 2) for x in (k, v, beta))
        naive = fla_naive("gated_delta_product").naive_recurrent_gated_delta_product
        o, state = naive(q, k, v, None, beta, K**-0.5, ends, S, True, 3)
        return o.transpose(1, 2), state

    expected = outputs_and_gradients(theirs, arguments)
    assert_all_close(outputs_and_gradients(delta_product, arguments), expected, 1e-4)


@pytest.mark.parametrize("documents", [False, True], ids=["batch", "documents"])
def test_the_kernel_gets_its_arguments_in_its_layout(monkeypatch, documents):
    """The kernel needs a GPU. A stand-in with the signature of fla-core 0.6.0 checks the call."""
    arguments = kda_inputs(documents=documents, dtype=torch.float32)

    def chunk_kda(
        q,
        k,
        v,
        g,
        beta,
        scale=None,
        initial_state=None,
        output_final_state=False,
        use_qk_l2norm_in_kernel=False,
        use_gate_in_kernel=False,
        use_beta_sigmoid_in_kernel=False,
        allow_neg_eigval=False,
        cu_seqlens=None,
        **kwargs,
    ):
        assert q.shape[1:] == k.shape[1:] == g.shape[1:] == (70, H, K)
        assert v.shape[1:] == (70, H, V) and beta.shape[1:] == (70, H)
        assert all(x.is_contiguous() and x.dtype == v.dtype for x in (q, k, v, beta))
        assert g.dtype == initial_state.dtype == torch.float32 and g.is_contiguous()
        assert not use_qk_l2norm_in_kernel and not use_gate_in_kernel and not kwargs
        assert not use_beta_sigmoid_in_kernel and not allow_neg_eigval
        assert scale is None and output_final_state and (cu_seqlens is not None) == documents
        assert not documents or (cu_seqlens.dtype == torch.long and cu_seqlens.diff().min() > 0)
        layout = [x.transpose(1, 2) for x in (q, k, v, beta, g)]
        o, state = kda_recurrent(*layout, initial_state, cu_seqlens)
        return o.transpose(1, 2), state

    monkeypatch.setattr(delta_variants, "load_fla", lambda: chunk_kda)
    expected = outputs_and_gradients(kda_recurrent, arguments)
    assert_all_close(outputs_and_gradients(kda_fla, arguments), expected, 1e-5)
    # The kernel takes one dtype: that of the values; but decays in float32.
    q, k, v, beta, g = (x.detach().to(torch.bfloat16) for x in arguments[:5])
    exact, last = kda_recurrent(q, k, v, beta, g, *arguments[5:])
    o, S = kda_fla(q.float(), k.float(), v, beta.float(), g, *arguments[5:])
    assert o.dtype == torch.bfloat16 and torch.equal(o, exact) and torch.equal(S, last)
    for output in kda_fla(*arguments):
        with pytest.raises(RuntimeError, match="flash-linear-attention has no second derivatives"):
            torch.autograd.grad(output.sum(), arguments[1], create_graph=True)


def test_the_chosen_form_gets_every_argument(monkeypatch):
    arguments = kda_inputs(documents=True)
    calls = []

    def note_call(name):
        def call(*arguments):
            calls.append((name, *map(id, arguments[:7]), *arguments[7:]))

        return call

    for name in ("kda_recurrent", "kda_chunkwise", "kda_fla"):
        monkeypatch.setattr(delta_variants, name, note_call(name))
    one = [x[:, :, :1] for x in arguments[:5]] + [arguments[5][:1], torch.tensor([0, 1])]
    kda(*arguments, chunk_size=5)
    kda(*one, chunk_size=5)
    monkeypatch.setattr(delta_variants, "why_no_fla", lambda *a: None)
    kda(*arguments, chunk_size=5)
    assert calls == [
        ("kda_chunkwise", *map(id, arguments), 5),
        ("kda_recurrent", *map(id, one)),
        ("kda_fla", *map(id, arguments)),
    ]


def test_torch_func_never_reaches_the_kernel(monkeypatch):
    q, *rest = detached(kda_inputs(T=9))
    monkeypatch.setattr(delta_variants, "why_no_fla", lambda *a: None)
    monkeypatch.setattr(delta_variants, "kda_fla", None)
    gradient = torch.func.grad(lambda q: kda(q, *rest)[0].sum())(q)
    q.requires_grad_()
    expected = torch.autograd.grad(kda_recurrent(q, *rest)[0].sum(), q)[0]
    torch.testing.assert_close(gradient, expected)


def test_without_the_extra_the_reason_is_said(monkeypatch):
    for name in ("fla", "fla.ops.kda"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    delta_variants.load_fla.cache_clear()
    assert "cannot be imported" in delta_variants.load_fla()
    kernels = types.SimpleNamespace(chunk_kda="kernel")
    for name in ("fla", "fla.ops", "fla.ops.kda"):
        monkeypatch.setitem(sys.modules, name, kernels)
    delta_variants.load_fla.cache_clear()
    assert delta_variants.load_fla() == "kernel"
    delta_variants.load_fla.cache_clear()


def test_the_backend_is_described(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    text = KDA.describe_backend(config(), cpu, torch.bfloat16)
    assert text == (
        "Kimi delta attention, chunks of 4 tokens (flash-linear-attention runs on CUDA only)"
    )
    assert "long keys may" in KDA.describe_backend(config(k_norm="none"), cpu, torch.float32)
    monkeypatch.setattr(delta, "load_fla", lambda: (object(), object()))
    monkeypatch.setattr(delta_variants, "load_fla", lambda: "it cannot be imported: no KDA")
    assert "no KDA" in KDA.describe_backend(config(), cuda, torch.bfloat16)
    assert "its own chunks" in DeltaProduct.describe_backend(config(), cuda, torch.bfloat16)
    monkeypatch.setattr(delta_variants, "load_fla", lambda: object())
    assert "its own chunks" in KDA.describe_backend(config(), cuda, torch.bfloat16)
    assert "256" in KDA.describe_backend(config(dk=257), cuda, torch.bfloat16)


# ---- the models ----------------------------------------------------------------------------------

MODELS = [KDA, DeltaProduct]


def config(**changes):
    sizes = dict(dim=8, n_layers=2, n_heads=2, dk=6, dv=4, chunk_size=4, n_householder=3)
    sizes |= dict(vocab_size=19, seq_len=12, init_std=0.3)
    return delta_variants.Config(**{**sizes, **changes})


def build(cls, **changes):
    torch.manual_seed(0)
    c = config(**changes)
    c.check()
    return cls(c).double()


def naive_layer(layer, x):
    """KDALayer or DeltaProductLayer on x (T, D) one vector at a time, from its weights."""
    c = layer.config
    K, V = layer.head_dims(c)
    states = [torch.zeros(K, V, dtype=x.dtype)] * c.n_heads
    is_kda = isinstance(layer, delta_variants.KDALayer)
    n_steps = 1 if is_kda else c.n_householder
    out = []
    for t in range(len(x)):
        q, k, v = naive_qkv(layer, x, t)
        q = naive_heads(q, x[t], c.q_kernel, c.q_norm, layer.gate_q)
        k = naive_heads(k, x[t], c.k_kernel, c.k_norm, layer.gate_k)
        v = naive_heads(v, x[t], c.v_kernel)
        heads = []
        for h in range(c.n_heads):
            if is_kda:
                first, second = layer.proj_decay
                z = second.weight @ (first.weight @ x[t]) + layer.dt_bias
                rate = torch.log(1 + torch.exp(z.view(c.n_heads, K)[h]))
                decay = torch.exp(-torch.exp(layer.A_log[h]) * rate)
                states[h] = decay[:, None] * states[h]
            for j in range(n_steps):
                i = j * c.n_heads + h
                beta = torch.ones((), dtype=x.dtype)
                if c.use_beta:
                    beta = naive_activation("sigmoid", layer.proj_beta.weight[i] @ x[t] / c.lr_temp)
                    beta = 2 * beta if c.allow_neg_eigval else beta
                states[h] = states[h] + beta * torch.outer(k[i], v[i] - states[h].T @ k[i])
            o = states[h].T @ q[h] / math.sqrt(K)
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
    dict(q_kernel="taylor", k_kernel="taylor", dk=3),
    dict(k_norm="l1", q_norm="rms", k_kernel="softmax"),
    dict(q_gated=True, k_gated=True),
    dict(att_use_output_gate=True, att_output_gate_act="sigmoid", use_out_norm=False),
    dict(use_beta=False),
    dict(lr_temp=0.3, allow_neg_eigval=True),
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


def test_one_step_a_token_is_deltanet_to_the_bit():
    product, plain = build(DeltaProduct, n_householder=1), build(delta.DeltaNet)
    assert_same(product.state_dict(), plain.state_dict())
    tokens = random_tokens(3)
    assert torch.equal(product(tokens)[0], plain(tokens)[0])


VARIANTS = [
    dict(),
    dict(conv_size=0, use_ffn=True, residual_mul=True),
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
    """In tokens: a chunk of DeltaProduct has three steps for each. At most 12 tokens."""
    used, init = [], delta.BatchChunks.__init__

    def note_size(self, B, H, T, C):
        used.append(C)
        init(self, B, H, T, C)

    monkeypatch.setattr(delta.BatchChunks, "__init__", note_size)
    tokens = random_tokens(3)
    losses = [build(cls, chunk_size=C)(tokens, tokens)[1] for C in (1, 5, 16)]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-10, atol=1e-12)
    assert set(used) == ({1, 5, 12} if cls is KDA else {3, 15, 36})


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


def test_decay_starts_where_the_paper_has_it_and_is_no_matrix_that_decays():
    layer = KDA.block.mixer(config(n_heads=200))
    dt, A = F.softplus(layer.dt_bias), layer.A_log.exp()
    assert 1e-3 <= dt.min() < 0.0015 and 0.007 < dt.median() < 0.014 and 0.065 < dt.max() <= 0.1001
    assert 1 <= A.min() < 1.5 and 7 < A.median() < 10 and 15 < A.max() <= 16
    optimizer = train.configure_optimizer(layer, train.TrainConfig(weight_decay=0.1))
    _, no_decay = optimizer.param_groups
    assert no_decay["weight_decay"] == 0
    assert {id(layer.A_log), id(layer.dt_bias)} <= {id(p) for p in no_decay["params"]}


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--model kda --n_householder 3", "n_householder=3 has no effect: only delta_product"),
        ("--model kda --n_kv_heads 1", "n_kv_heads=1 has no effect"),
        ("--model kda --pos_emb rope", "pos_emb='rope' has no effect: the recurrence knows"),
        ("--model delta_product --n_householder 0", "n_householder=0 must be between 1 and"),
        ("--model delta_product --use_beta 0 --allow_neg_eigval 1", "use_beta is 0"),
        ("--model delta_product --use_att 0 --use_ffn 1 --n_householder 3", "use_att is 0"),
        ("--model delta --n_householder 3", "there is no setting 'n_householder'"),
    ],
)
def test_settings_without_effect_are_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        p = train.parse(flags.split())
        build_model_config(p, p.data_module.Data(p.data))


def test_every_model_has_its_short_name():
    for name, cls in zip(("kda", "delta_product"), MODELS):
        assert train.parse(["--model", name]).model_class is cls
