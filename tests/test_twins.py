"""Second derivatives and torch.func: correct for each operator with a backward, or refused."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import delta
import memory
from model import GPT, Config, UnifiedKV
from nanorecall import attention, ops, second_order
from nanorecall.rng import IGNORE_INDEX

V, T = 19, 12
SMALL = dict(dim=8, n_layers=2, n_heads=2, dk=4, dv=6, vocab_size=V, seq_len=T, init_std=0.3)
TABLE = dict(mem_n_keys=4, mem_knn=2, mem_heads=2, mem_k_dim=4)
NORMED = dict(q_norm="l2", k_norm="l2")
MODELS = {
    "gpt": lambda: GPT(Config(**SMALL)),
    "gpt, normed": lambda: GPT(Config(**SMALL, **NORMED)),
    "unified_kv": lambda: UnifiedKV(Config(**SMALL, du=6, pos_emb="learned")),
    "convolution": lambda: GPT(Config(**SMALL, conv_size=3, pos_emb="none")),
    "delta": lambda: delta.DeltaNet(delta.Config(**SMALL, chunk_size=4)),
    "gated_delta": lambda: delta.GatedDeltaNet(
        delta.Config(**SMALL, chunk_size=5, use_out_norm=False)
    ),
    "memory": lambda: memory.MemoryGPT(memory.Config(**SMALL, **TABLE)),
    "memory, delta": lambda: memory.MemoryGPT(memory.Config(**SMALL, **TABLE, blocks=("delta",))),
    "memory_router": lambda: memory.MemoryRouterGPT(memory.Config(**SMALL, **TABLE)),
}


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(V, (3, T), generator=g)
    labelled = torch.rand(3, T, generator=g) < 0.4
    return tokens, torch.where(labelled, tokens.flip(1), IGNORE_INDEX)


def make(name):
    """A model in float64, its parameters by name, and a direction in which to differentiate."""
    torch.manual_seed(0)
    model = MODELS[name]().double()
    parameters = dict(model.named_parameters())
    return model, parameters, {n: torch.randn_like(q) for n, q in parameters.items()}


def dot(a, b):
    return sum((a[name] * b[name]).sum() for name in b)


def hessian_times(model, parameters, direction, batch):
    """Gradient and Hessian-vector product by autograd.grad twice, then the product alone."""
    values = list(parameters.values())
    first = torch.autograd.grad(model(*batch)[1], values, create_graph=True)
    slope = dot(dict(zip(parameters, first)), direction)
    again = torch.autograd.grad(slope, values, allow_unused=True, materialize_grads=True)
    return [x.detach() for x in (*first, *again)]


def plain_convolution(x, w):
    """By torch's own convolution, whose kernels run the other way."""
    kernel = w.flip(0).T[:, None]
    return F.conv1d(F.pad(x.mT, (len(w) - 1, 0)), kernel, groups=w.shape[1]).mT


def plain_norm(x, n):
    return x / (x.square().sum(-1, keepdim=True) / n + 1e-6).sqrt()


@pytest.mark.parametrize("name", MODELS)
def test_hessian_vector_products_equal_those_of_plain_operations(name, batch, monkeypatch):
    model, parameters, direction = make(name)
    if name.startswith("memory"):
        naive = memory.naive_weighted_values
        monkeypatch.setattr(memory, "weighted_values", lambda *inputs: naive(*inputs[:3]))
    with sdpa_kernel(SDPBackend.MATH):
        ours = hessian_times(model, parameters, direction, batch)
        monkeypatch.setattr(ops.CrossEntropy, "apply", F.cross_entropy)
        monkeypatch.setattr(ops.CausalConv1d, "apply", plain_convolution)
        monkeypatch.setattr(ops.Normalize, "apply", plain_norm)
        monkeypatch.setattr(
            delta, "delta_rule_chunkwise", lambda *inputs: delta.delta_rule_recurrent(*inputs[:-1])
        )
        plain = hessian_times(model, parameters, direction, batch)
    assert max(x.abs().max() for x in plain[len(parameters) :]) > 1e-2
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_where_torch_has_no_second_derivative_it_says_so(batch):
    model, parameters, direction = make("memory")
    with sdpa_kernel(SDPBackend.MATH), pytest.raises(RuntimeError, match="embedding_bag.*not impl"):
        hessian_times(model, parameters, direction, batch)
    equal = GPT(Config(**{**SMALL, "dv": 4})).double()
    weight = equal.embed.weight
    (first,) = torch.autograd.grad(equal(*batch)[1], weight, create_graph=True)
    with pytest.raises(RuntimeError, match="flash_attention.*not implemented"):
        torch.autograd.grad(first.sum(), weight)


@pytest.mark.parametrize("name", MODELS)
def test_torch_func_equals_autograd(name, batch):
    model, parameters, direction = make(name)
    values = list(parameters.values())
    expected = dict(zip(parameters, torch.autograd.grad(model(*batch)[1], values)))

    def loss(p):
        return torch.func.functional_call(model, p, batch)[1]

    def slope(p):
        return dot(torch.func.grad(loss)(p), direction)

    at = {n: q.detach() for n, q in parameters.items()}
    two = {n: torch.stack([q, q + direction[n]]) for n, q in at.items()}
    gradient = torch.func.grad(loss)(at)
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-9)
    value, change = torch.func.jvp(loss, (at,), (direction,))
    torch.testing.assert_close(value, model(*batch)[1])
    torch.testing.assert_close(change, dot(expected, direction))
    each = torch.func.vmap(torch.func.grad(loss))(two)
    torch.testing.assert_close({n: g[0] for n, g in each.items()}, expected, rtol=1e-7, atol=1e-9)
    moved = torch.func.grad(loss)({n: q[1] for n, q in two.items()})
    torch.testing.assert_close({n: g[1] for n, g in each.items()}, moved, rtol=1e-7, atol=1e-9)
    backwards = torch.func.grad(slope)(at)
    forwards = torch.func.jvp(torch.func.grad(loss), (at,), (direction,))[1]
    torch.testing.assert_close(backwards, forwards, rtol=1e-7, atol=1e-9)


def chunks(gated):
    """Arguments of ChunkwiseDeltaRule: one sequence of two chunks of three tokens, one of one."""
    g = torch.Generator().manual_seed(0)

    def some(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    decay = -3 * some(3, 3, 1).abs() if gated else None
    keys = F.normalize(some(3, 3, 3), dim=-1)
    return some(3, 3, 3), keys, some(3, 3, 2), some(3, 3, 1).sigmoid(), decay, some(2, 3, 2), [2, 1]


def operators():
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((2, 6, 4), (3, 4)))
    answers = torch.tensor([1, 0, 3, 3, 2, 1])
    yield "cross-entropy", ops.CrossEntropy, (x[0], answers)
    yield "l2 norm", ops.Normalize, (x, 1)
    yield "rms norm", ops.Normalize, (x, 4)
    yield "convolution", ops.CausalConv1d, (x, w)
    yield "convolution wider than the sequence", ops.CausalConv1d, (x[:, :2], w)
    yield "delta rule", delta.ChunkwiseDeltaRule, chunks(gated=False)
    yield "gated delta rule", delta.ChunkwiseDeltaRule, chunks(gated=True)
    for gated in (False, True):
        name = "delta rule without a state, gated" if gated else "delta rule without a state"
        *inputs, _, sizes = chunks(gated)
        yield name, delta.ChunkwiseDeltaRule, (*inputs, None, sizes)


OPERATORS = {name: rest for name, *rest in operators()}


@pytest.mark.parametrize("function, inputs", OPERATORS.values(), ids=OPERATORS)
def test_first_and_second_derivatives_by_differences(function, inputs):
    def is_number(x):
        return torch.is_tensor(x) and x.is_floating_point()

    inputs = [x.clone().requires_grad_() if is_number(x) else x for x in inputs]
    torch.testing.assert_close(function.apply(*inputs), function.twin(*inputs))
    assert torch.autograd.gradcheck(function.apply, inputs)
    assert torch.autograd.gradgradcheck(function.apply, inputs)


def test_one_tensor_as_several_inputs_and_inputs_without_gradient():
    q, k, v, beta, g, S, sizes = chunks(gated=True)
    x, S = q.requires_grad_(), torch.cat([S, S.sin()], dim=-1)[..., :3]

    def tied(rule):
        o, _ = rule(x, x, x, beta, g, S, sizes)
        (first,) = torch.autograd.grad(o.square().sum(), x, create_graph=True)
        return first, torch.autograd.grad(first.sin().sum(), x)[0]

    for a, b in zip(tied(delta.ChunkwiseDeltaRule.apply), tied(delta.naive_chunks)):
        torch.testing.assert_close(a, b)


def test_an_ordinary_backward_leaves_the_twins_alone(monkeypatch, batch):
    def fail(*_):
        raise AssertionError("the slow twin was called")

    for file in (ops, delta):
        monkeypatch.setattr(file, "twin_gradients", fail)
    for name in ("gpt, normed", "convolution", "gated_delta"):
        make(name)[0](*batch)[1].backward()
    with pytest.raises(AssertionError, match="slow twin"):
        model, parameters, _ = make("gpt")
        torch.autograd.grad(model(*batch)[1], parameters.values(), create_graph=True)


def test_kernels_without_a_twin_refuse_second_derivatives(monkeypatch):
    q, k, v, beta, _, S, _ = chunks(gated=False)
    shape = dict(q=q[None], k=k[None], v=v[None], beta=beta[None, ..., 0], state=None)
    q = shape["q"].requires_grad_()

    def kernel(q, k, v, beta, **options):
        parts = (x.transpose(1, 2) for x in (q, k, v, beta))
        o, state = delta.delta_rule_recurrent(*parts)
        return o.transpose(1, 2), state

    monkeypatch.setattr(delta, "load_fla", lambda: (kernel, None))
    monkeypatch.setattr(attention, "flash_attn_varlen_func", lambda q, *_, **__: q * q)
    with torch.enable_grad():
        outputs = delta.delta_rule_fla(**shape)[0], attention.flash_attention(q, q, q)
    for o in outputs:
        torch.autograd.grad(o.sum(), q, retain_graph=True)
        with pytest.raises(RuntimeError, match="^flash-.* has no second derivatives; take them in"):
            torch.autograd.grad(o.sum(), q, create_graph=True)
    monkeypatch.setattr(delta, "why_no_fla", lambda *_: None)
    monkeypatch.setattr(delta, "delta_rule_fla", None)  # a kernel that torch.func must not reach
    gradient = torch.func.grad(lambda q: delta.delta_rule(**{**shape, "q": q})[0].sum())(q.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(outputs[0].sum(), q)[0])


def test_forward_mode_goes_by_the_twin():
    import torch.autograd.forward_ad as fw

    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with fw.dual_level():
        y = ops.Normalize.apply(fw.make_dual(x, x.sin()), 5)
        change = fw.unpack_dual(y).tangent
    assert not second_order.transformed()
    expected = torch.func.jvp(lambda x: plain_norm(x, 5), (x,), (x.sin(),))[1]
    torch.testing.assert_close(change, expected)
