"""ttt.py: the dual form against a loop with torch.func; each model from its weights."""

import math

import pytest
import torch
import torch.nn.functional as F

import train
import ttt
from naive import fla_naive, naive_activation, naive_heads, naive_qkv, naive_rotation
from nanorecall.build import build_model_config, inference_state_bytes
from nanorecall.settings import ConfigError
from rules import assert_all_close, random_tokens
from ttt import TTTMLP, TTTLinear, ttt_recurrent

H, K, HIDDEN = 2, 5, 7
SIZES = {"linear": [(K, K)], "mlp": [(K, HIDDEN), (HIDDEN, K)]}
DOCUMENTS = [0, 5, 5, 24, 29, 36, 37]  # one is empty, one is a single token


def inputs(kind, T=37, B=2, dtype=torch.float64):
    """q, k, v, rate, weights of the inner net and of its norm, all of which want gradients."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    q, k, v = (normal(B, H, T, K) for _ in range(3))
    rate = torch.rand(B, H, T, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weights = [normal(H, *size) for size in SIZES[kind]]
    return q, k, v, rate, weights, [normal(H, K), normal(H, K)]


def rounded(tokens, weights, norm, dtype=torch.float64, of_parameters=torch.float64):
    """Copies of [q, k, v, rate], weights and norm in other dtypes that want gradients."""

    def copies(tensors, dtype):
        return [x.detach().to(dtype).requires_grad_() for x in tensors]

    return copies(tokens, dtype), copies(weights, of_parameters), copies(norm, of_parameters)


def dual_form(q, k, v, rate, weights, norm, inner_batch_size):
    """-> o, the weights after the last token"""
    o, (_, now, _) = ttt.ttt(q, k, v, rate, weights, norm, inner_batch_size=inner_batch_size)
    return o, now


def outputs_and_gradients(form, q, k, v, rate, weights, norm, inner_batch_size):
    """[o, weights after the last token, gradients of all inputs] for one gradient of the first."""
    o, now = form(q, k, v, rate, weights, norm, inner_batch_size)
    g = torch.Generator().manual_seed(7)
    results = [o, *now]
    grads = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype) for x in results]
    found = torch.autograd.grad(results, [q, k, v, rate, *weights, *norm], grads)
    return [x.detach() for x in results] + list(found)


# ---- the rule ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("T", [1, 7, 16, 37])
def test_the_dual_form_equals_the_loop_for_every_mini_batch(kind, T):
    arguments = inputs(kind, T)
    for inner_batch_size in (1, 2, 5, 7, 8, 16, 36, 37, 38, 64):
        expected = outputs_and_gradients(ttt_recurrent, *arguments, inner_batch_size)
        ours = outputs_and_gradients(dual_form, *arguments, inner_batch_size)
        # Small variances in the LayerNorm multiply both results and rounding.
        assert_all_close(ours, expected, 1e-10 * max(1, expected[1].abs().max().item()))


@pytest.mark.parametrize("kind", SIZES)
def test_pieces_of_any_size_equal_the_whole(kind):
    q, k, v, rate, weights, norm = inputs(kind)
    for inner_batch_size in (1, 8, 37, 50):
        whole, now = dual_form(q, k, v, rate, weights, norm, inner_batch_size)
        for sizes in ([1] * 37, [3, 10, 0, 20, 4], [8, 8, 21], [36, 1]):
            state = None
            outputs = []
            for piece in zip(*(x.split(sizes, dim=2) for x in (q, k, v, rate))):
                o, state = ttt.ttt(*piece, weights, norm, state, inner_batch_size=inner_batch_size)
                outputs.append(o)
            assert state[2] == 37 % inner_batch_size
            assert_all_close([torch.cat(outputs, dim=2), *state[1]], [whole, *now], 1e-9)


@pytest.mark.parametrize("kind", SIZES)
def test_packed_documents_equal_a_sequence_each(kind):
    q, k, v, rate, weights, norm = inputs(kind, B=1)
    ends = torch.tensor(DOCUMENTS)
    packed, state = ttt.ttt(q, k, v, rate, weights, norm, None, ends, 4)
    alone = []
    for start, end in zip(DOCUMENTS[:-1], DOCUMENTS[1:]):
        if end > start:
            tokens = [x[:, :, start:end] for x in (q, k, v, rate)]
            alone.append(ttt_recurrent(*tokens, weights, norm, 4)[0])
    alone = torch.cat(alone, dim=2)
    torch.testing.assert_close(packed, alone, rtol=1e-10, atol=1e-10)
    assert state is None
    wanted = [q, k, v, rate, *weights, *norm]
    ours = torch.autograd.grad(packed.square().sum(), wanted)
    assert_all_close(ours, torch.autograd.grad(alone.square().sum(), wanted), 1e-8)


@pytest.mark.parametrize("kind", SIZES)
def test_a_pair_that_is_repeated_is_learned(kind):
    """The LayerNorm can answer any v with v - k of mean 0 and variance 1."""
    _, k, v, _, weights, _ = [x if isinstance(x, list) else x.detach() for x in inputs(kind, 1)]
    norm = [torch.ones(H, K, dtype=k.dtype), torch.zeros(H, K, dtype=k.dtype)]
    v = k + F.layer_norm(v, (K,), eps=0)
    tokens = [x.expand(-1, -1, 300, -1) for x in (k, k, v)]
    rate = torch.full((2, H, 300), 0.1, dtype=k.dtype)
    o, _ = ttt.ttt(*tokens, rate, weights, norm, inner_batch_size=4)
    error = (o - tokens[2]).norm(dim=-1)
    assert error[:, :, 0].min() > 0.3 and error[:, :, -1].max() < 1e-3


@pytest.mark.parametrize("kind", SIZES)
def test_long_sequences_stay_finite(kind):
    """Rates far above those of training, too: the LayerNorm divides by what grows."""
    for scale in (1.0, 30.0):
        q, k, v, rate, weights, norm = inputs(kind, T=2048, B=1, dtype=torch.float32)
        results = outputs_and_gradients(dual_form, q, k, v, scale * rate, weights, norm, 16)
        assert all(x.isfinite().all() for x in results)


@pytest.mark.parametrize("kind", SIZES)
def test_long_sequences_of_nearly_parallel_keys_stay_exact(kind):
    """128 mini-batches with keys within 0.2 radians of each other, against float64."""
    q, k, v, rate, weights, norm = inputs(kind, T=2048, B=1)
    q = F.normalize(q, dim=-1)
    k = F.normalize(1 + 0.1 * k, dim=-1)
    norm = [1 + 0.1 * norm[0], 0.1 * norm[1]]
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 0.01)):
        # As under autocast: parameters are in float32.
        tokens, *parameters = rounded([q, k, v, rate], weights, norm, dtype, torch.float32)
        ours = outputs_and_gradients(dual_form, *tokens, *parameters, 16)
        # Rounded keys are other keys: compare with their own exact solution.
        tokens, *parameters = rounded(tokens, *parameters)
        exact = outputs_and_gradients(dual_form, *tokens, *parameters, 16)
        assert ours[0].dtype == dtype and ours[1].dtype == torch.float32
        for a, b in zip(ours, exact, strict=True):
            assert (a.double() - b).abs().max() < tolerance * b.abs().max()


@pytest.mark.parametrize("kind", SIZES)
def test_half_precision_is_rounding_of_the_inputs_only(kind):
    """The inner steps are made in float32, under autocast, too."""
    q, k, v, rate, weights, norm = inputs(kind, dtype=torch.float32)
    half = [x.detach().to(torch.bfloat16) for x in (q, k, v, rate)]
    exact, _ = dual_form(*(x.float() for x in half), weights, norm, 8)
    with torch.autocast("cpu", torch.bfloat16):
        o, now = dual_form(*half, weights, norm, 8)
    assert o.dtype == torch.bfloat16 and all(W.dtype == torch.float32 for W in now)
    assert torch.equal(o, exact.to(torch.bfloat16))


@pytest.mark.skipif(fla_naive("ttt") is None, reason="fla-core is not installed")
def test_a_mini_batch_changes_the_weights_as_in_flash_linear_attention():
    """Theirs has a bias, which is still 0 in the first mini-batch, and one rate for all tokens."""
    q, k, v, _, weights, norm = inputs("linear", T=8, dtype=torch.float32)
    eta = torch.full((2, H, 8, 1), 0.3)
    start = weights[0].expand(2, -1, -1, -1)
    theirs = fla_naive("ttt").ttt_linear
    with torch.no_grad():
        _, after, _ = theirs(q.clone(), k, v, *norm, eta, 1.0, ttt.EPS, 8, start, None, True)
        _, (ours,) = dual_form(q, k, v, eta[..., 0], weights, norm, 8)
    torch.testing.assert_close(ours, after, rtol=1e-4, atol=1e-5)


def mirrored(x, sign):
    """x (B, H, T/2, K) -> (B, H, T, K): behind each token, itself times the sign."""
    return torch.stack([x, sign * x], dim=3).flatten(2, 3)


@pytest.mark.skipif(fla_naive("ttt") is None, reason="fla-core is not installed")
def test_many_mini_batches_answer_as_in_flash_linear_attention():
    """Where the two forms agree, in outputs, weights and gradients.

    Theirs differs in three ways. Their layer z has a bias: it stays 0 if each pair (k, v) is
    followed by (-k, -v), for then their steps cancel. Their writes have the rate of the token that
    reads: within a mini-batch all rates are the same here. Their answer is z + LN(z): if LN has one
    weight for all features and no bias, LN(their answer) is LN(z) without the weight.
    """
    q, k, v, rate, weights, norm = inputs("linear", T=20, dtype=torch.float32)
    rate, weight = rate[:, :, :5], norm[0][:, :1]
    arguments = q, k, v, rate, weights[0], weight

    def tokens_and_norm(q, k, v, rate, weight):
        tokens = mirrored(q, 1), mirrored(k, -1), mirrored(v, -1)
        norm = weight.expand(-1, K), torch.zeros(H, K)
        return *tokens, rate.repeat_interleave(8, dim=2), norm

    def theirs(q, k, v, rate, start, weight):
        *tokens, rate, norm = tokens_and_norm(q, k, v, rate, weight)
        start = start.expand(2, -1, -1, -1)
        naive = fla_naive("ttt").ttt_linear
        o, after, bias = naive(*tokens, *norm, rate[..., None], 1.0, ttt.EPS, 8, start, None, True)
        assert bias.abs().max() < 1e-5
        return q + weight[:, None] * F.layer_norm(o[:, :, 1::2], (K,), eps=0), after

    def ours(q, k, v, rate, start, weight):
        *tokens, rate, norm = tokens_and_norm(q, k, v, rate, weight)
        o, (after,) = dual_form(*tokens, rate, [start], norm, 8)
        return o[:, :, 1::2], after

    outcomes = []
    for form in (ours, theirs):
        o, after = form(*arguments)
        gradients = torch.autograd.grad(o.square().sum() + after.square().sum(), arguments)
        outcomes.append([o, after, *gradients])
    assert_all_close(*outcomes, 1e-4)


def test_shapes_that_do_not_fit_are_refused_by_name():
    q, k, v, rate, weights, norm = inputs("linear")
    with pytest.raises(ValueError, match="rate must have shape"):
        ttt.ttt(q, k, v, rate[..., None], weights, norm)
    with pytest.raises(ValueError, match="v must have the shape of q"):
        ttt.ttt(q, k, v[..., :-1], rate, weights, norm)
    _, state = ttt.ttt(q, k, v, rate, weights, norm)
    message = "^documents begin with W_0: give state or cu_seqlens, not both$"
    with pytest.raises(ValueError, match=message):
        ttt.ttt(q[:1], k[:1], v[:1], rate[:1], weights, norm, state, torch.tensor([0, 37]))
    with pytest.raises(ValueError, match="one sequence"):
        ttt.ttt(q, k, v, rate, weights, norm, None, torch.tensor([0, 37]))


# ---- the models ----------------------------------------------------------------------------------

MODELS = [TTTLinear, TTTMLP]


def config(**changes):
    sizes = dict(dim=8, n_layers=2, n_heads=2, dk=6, dv=6, inner_batch_size=5)
    sizes |= dict(vocab_size=19, seq_len=12, init_std=0.3)
    return ttt.Config(**{**sizes, **changes})


def build(cls, **changes):
    torch.manual_seed(0)
    c = config(**changes)
    c.check()
    return cls(c).double()


def naive_answer(weights, norm, x):
    """The inner net on one vector."""
    z = weights[0].T @ x
    if len(weights) == 2:
        z = weights[1].T @ (z * (1 + torch.erf(z / math.sqrt(2))) / 2)
    z = z - z.mean()
    return x + norm[0] * z / torch.sqrt((z**2).mean() + 1e-6) + norm[1]


def naive_layer(layer, x):
    """A layer of ttt.py on x (T, D) one vector at a time, from its weights."""
    c = layer.config
    K = layer.head_dims(c)[0]
    out = []
    norms = torch.stack([layer.inner_norm_weight, layer.inner_norm_bias]).view(2, c.n_heads, K)
    states = [[W[h] for W in layer.inner_weights] for h in range(c.n_heads)]
    starts = list(states)
    for t in range(len(x)):
        if t % c.inner_batch_size == 0:
            starts = list(states)
        q, k, v = naive_qkv(layer, x, t)
        q = naive_heads(q, x[t], c.q_kernel, c.q_norm, layer.gate_q)
        k = naive_heads(k, x[t], c.k_kernel, c.k_norm, layer.gate_k)
        v = naive_heads(v, x[t], c.v_kernel)
        if c.pos_emb == "rope":
            q, k = naive_rotation(q, t), naive_rotation(k, t)
        heads = []
        for h in range(c.n_heads):
            loss = ((naive_answer(starts[h], norms[:, h], k[h]) - v[h]) ** 2).sum() / 2
            gradients = torch.autograd.grad(loss, starts[h], create_graph=True)
            rate = c.inner_lr * naive_activation("sigmoid", layer.proj_rate.weight[h] @ x[t])
            states[h] = [W - rate * g for W, g in zip(states[h], gradients)]
            o = naive_answer(states[h], norms[:, h], q[h])
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
    dict(conv_size=0, q_kernel="relu", k_kernel="elu1", v_kernel="silu", inner_lr=0.1),
    dict(q_kernel="taylor", k_kernel="taylor", v_kernel="taylor", dk=2, dv=2, k_norm="none"),
    dict(pos_emb="rope", q_gated=True, k_gated=True, inner_batch_size=1),
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
    torch.testing.assert_close(ours, naive, rtol=1e-9, atol=1e-10)
    grad = torch.randn_like(ours)
    ours_grads = torch.autograd.grad(ours, parameters, grad)
    for a, b in zip(ours_grads, torch.autograd.grad(naive, parameters, grad)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    query_pos = torch.tensor([[1, 4], [0, 6]])
    picked = torch.stack([ours[0, [1, 4]], ours[1, [0, 6]]])
    torch.testing.assert_close(mixer(x, query_pos), picked)


VARIANTS = [
    dict(),
    dict(conv_size=0, use_ffn=True, pos_emb="rope"),
    dict(att_use_output_gate=True, conv_size=1, pos_emb="learned", inner_batch_size=1),
]


@pytest.mark.parametrize("cls", MODELS)
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_pieces_with_a_cache_equal_one_forward_pass(cls, changes):
    model, tokens = build(cls, **changes), random_tokens(3)
    expected, _ = model(tokens)
    for pieces in ([1] * 12, [12], [5, 1, 1, 5], [3, 9]):
        cache, logits = None, []
        for piece in tokens.split(pieces, dim=1):
            kept = [dict(layer) for layer in cache or []]
            new_logits, cache = model.forward_cached(piece, cache)
            logits.append(new_logits)
        torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-8, atol=1e-9)
        # the cache of the tokens before the last piece is as it was
        again, _ = model.forward_cached(piece, kept or None)
        assert torch.equal(again, logits[-1])


@pytest.mark.parametrize("cls", MODELS)
def test_a_cache_does_not_change_with_the_parameters(cls):
    """Fewer tokens than a mini-batch, so that the weights are still those it starts with."""
    model, tokens = build(cls), random_tokens(3)
    _, cache = model.forward_cached(tokens[:, :2])
    before = [W.clone() for W in cache[0]["state"][0]]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    for W, kept in zip(cache[0]["state"][0], before):
        assert torch.equal(W, kept)


@pytest.mark.parametrize("cls", MODELS)
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_state_bytes_is_the_size_of_the_cache_of_any_length(cls, changes):
    """Per layer and head two sets of weights, 6 x 6 or 6 x 24 and 24 x 6 numbers."""
    model = build(cls, **changes).float()
    numbers = 2 * 2 * (36 if cls is TTTLinear else 2 * 6 * 24)
    convolution = 3 * 2 * 6 * max(0, model.config.conv_size - 1)
    for T in (1, 2, 5, 12):
        assert inference_state_bytes(model, T) == 4 * 2 * (numbers + convolution)
    assert inference_state_bytes(cls(config(use_att=False, use_ffn=True)), 12) == 0


@pytest.mark.parametrize("cls", MODELS)
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_models_keep_packed_documents_apart(cls, changes):
    model, tokens = build(cls, **changes), random_tokens(3)
    lengths = [7, 1, 12]
    alone = [model(row[None, :n])[0][0] for row, n in zip(tokens, lengths)]
    packed = torch.cat([row[:n] for row, n in zip(tokens, lengths)])[None]
    logits, _ = model(packed, cu_seqlens=torch.tensor([0, 7, 8, 20]))
    torch.testing.assert_close(logits[0], torch.cat(alone))


@pytest.mark.parametrize("cls", MODELS)
def test_bfloat16_autocast_is_close_to_float32(cls):
    model, tokens = build(cls, dim=32, dk=16, dv=16, inner_lr=0.1).float(), random_tokens(8)
    parameters = list(model.parameters())
    exact, loss = model(tokens, tokens)
    grads = torch.autograd.grad(loss, parameters)
    with torch.autocast("cpu", torch.bfloat16):
        half, half_loss = model(tokens, tokens)
        _, cache = model.forward_cached(tokens)
    assert (half.float() - exact).abs().max() < 0.1 * exact.abs().max()
    assert cache[0]["state"][1][0].dtype == torch.float32
    for a, b in zip(torch.autograd.grad(half_loss, parameters), grads):
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.9


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
            torch.testing.assert_close(together[name][i], grad, rtol=1e-7, atol=1e-9)


def test_the_inner_net_starts_small_but_for_the_hidden_units():
    expected = {TTTLinear: [(0.02, 16, 16)], TTTMLP: [(1.0, 16, 48), (0.02, 48, 16)]}
    for cls, layers in expected.items():
        c = ttt.Config(dk=16, dv=16, n_heads=20, inner_expand_factor=3)
        torch.manual_seed(0)
        weights = cls.block.mixer(c).inner_weights
        assert len(weights) == len(layers)
        for W, (std, *sizes) in zip(weights, layers):
            assert [*W.shape] == [20, *sizes] and abs(W.std() / std - 1) < 0.05


def test_weight_decay_leaves_the_inner_norm_alone():
    layer = ttt.TTTMLPLayer(config())
    optimizer = train.configure_optimizer(layer, train.TrainConfig(weight_decay=0.1))
    decay, no_decay = optimizer.param_groups
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.1, 0)
    left_alone = {id(p) for p in no_decay["params"]}
    assert {id(layer.inner_norm_weight), id(layer.inner_norm_bias)} <= left_alone


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--model ttt_linear --dk 32", "keys and values .* must have one width, not 32 and 64"),
        ("--model ttt_mlp --q_kernel taylor --k_kernel taylor", "one width, not 4161 and 64"),
        ("--model ttt_linear --inner_lr 0", "inner_lr must be above 0"),
        ("--model ttt_linear --inner_batch_size 0", "inner_batch_size=0 must be between"),
        ("--model ttt_linear --inner_expand_factor 2", "only ttt_mlp has hidden units"),
        ("--model ttt_mlp --chunk_size 8", "inner_batch_size decides"),
        ("--model ttt_mlp --n_kv_heads 1", "n_kv_heads=1 has no effect"),
        ("--model ttt_mlp --use_att 0 --use_ffn 1 --inner_lr 2", "use_att is 0"),
        ("--model gpt --inner_lr 2", "inner_lr"),
    ],
)
def test_settings_that_do_not_fit_are_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        p = train.parse(flags.split())
        build_model_config(p, p.data_module.Data(p.data))


def test_short_names_and_what_runs():
    flags = [["--model", "ttt_linear"], ["--model", "ttt_mlp", "--inner_expand_factor", "2"]]
    whats = "a linear map", "an MLP"
    reasons = "kernel has a bias, other rates and another residual", "has no kernel for it"
    for own, cls, what, reason in zip(flags, MODELS, whats, reasons):
        p = train.parse(own)
        assert p.model_class is cls
        c = build_model_config(p, p.data_module.Data(p.data))
        for device in ("cpu", "cuda"):
            backend = cls.describe_backend(c, torch.device(device), torch.float32)
            form, _, why = backend.partition(" (flash-linear-attention")
            assert form == f"test-time training of {what}, mini-batches of 16 tokens"
            assert why.endswith(f" {reason})")
