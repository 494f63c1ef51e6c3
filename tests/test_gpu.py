"""On a GPU: kernels against the loops, models against the CPU, whole runs. Skipped without one.

    CUDA_VISIBLE_DEVICES=0 python -m pytest tests/test_gpu.py -n 4

Triton compiles each kernel at its first use, which takes most of the minutes.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import delta
import delta_variants
import hybrid
import linear
import memory
from myriadlama import fusion
from nanorecall import attention
from nanorecall.ops import PackedDocuments
from rules import error
from toys import assert_same, contents, run
from toys_llama import decode_fused, random_ids, random_llama, random_question

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU; CUDA_VISIBLE_DEVICES=0 shows one to tests"
)
CUDA = torch.device("cuda", 0)
# A number of bfloat16 has 8 digits of the base 2, so that one rounding costs up to 0.4%.
BFLOAT16_ERROR = 0.03


@pytest.fixture(autouse=True)
def one_variant_of_each_kernel(monkeypatch):
    """Triton's autotuner compiles dozens of variants of a kernel, and takes the fastest."""
    try:
        from triton.runtime.autotuner import Autotuner
    except ImportError:
        return
    prune = Autotuner.prune_configs
    monkeypatch.setattr(Autotuner, "prune_configs", lambda *args: prune(*args)[:1])


# ---- flash-linear-attention's kernels against the loops ------------------------------------------

H, K, V, T = 2, 48, 40, 200
DOCUMENTS = [0, 5, 70, 71, 200]
WITH_EMPTY = [0, 5, 5, 70, 71, 200, 200]


def why_no_fla(module, decay_of_heads=False):
    """Why a rule of this module has no kernel here, as text, or None."""
    if module is delta_variants:
        return module.why_no_fla(CUDA, torch.bfloat16, K)
    widths = (K, V) if module is linear else (K,)
    return module.why_no_fla(CUDA, torch.bfloat16, *widths, decay_of_heads)


def delta_arguments(q, k, v, beta, decay):
    return [q, k, v, beta, decay]


def additive_arguments(q, k, v, beta, decay):
    return [q, k, v, decay]


# name: (module, chooser, loop, its arguments without state and documents, shape of a token's decay)
RULES = {
    "delta": (delta, delta.delta_rule, delta.delta_rule_recurrent, delta_arguments, None),
    "gated_delta": (delta, delta.delta_rule, delta.delta_rule_recurrent, delta_arguments, ()),
    "kda": (
        delta_variants,
        delta_variants.kda,
        delta_variants.kda_recurrent,
        delta_arguments,
        (K,),
    ),
    "linear": (linear, linear.additive, linear.additive_recurrent, additive_arguments, None),
    "retnet": (linear, linear.additive, linear.additive_recurrent, additive_arguments, (1,)),
    "gla": (linear, linear.additive, linear.additive_recurrent, additive_arguments, (K,)),
}
WEAK, STRONG = -0.1, -30.0  # log decay of a token; every seventh has a strong one
BETA_MAX = 1.0


def rule_arguments(name, documents=None, strong=False, beta_max=BETA_MAX):
    """Arguments of a rule on the CPU: bfloat16 tokens, a float32 decay and initial state."""
    _, _, _, arrange, decay_shape = RULES[name]
    g = torch.Generator().manual_seed(0)
    B = 1 if documents else 2

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    q, k, v = (normal(B, H, T, width) for width in (K, K, V))
    k = F.normalize(k, dim=-1)
    beta = beta_max * torch.rand(B, H, T, generator=g)
    decay = None
    if decay_shape is not None:
        decay = WEAK * torch.rand(B, H, T, *decay_shape, generator=g)
        if strong:
            decay[:, :, ::7] = STRONG
    tokens = arrange(*(x.bfloat16() for x in (q, k, v, beta)), decay)
    state = normal(len(documents) - 1 if documents else B, H, K, V)
    return [*tokens, state, torch.tensor(documents) if documents else None]


def results_and_gradients(rule, arguments):
    """[o, state, gradients of all arguments that are numbers], in float64 on the CPU."""
    wanted = [x for x in arguments if x is not None and x.is_floating_point()]
    for x in wanted:
        x.requires_grad_()
    results = rule(*arguments)
    g = torch.Generator().manual_seed(7)
    grads = [torch.randn(x.shape, generator=g).bfloat16().to(x) for x in results]
    found = [*results, *torch.autograd.grad(results, wanted, grads)]
    return [x.detach().double().cpu() for x in found]


def check_rule(name, tolerance=BFLOAT16_ERROR, **options):
    module, rule, loop, _, decay_shape = RULES[name]
    problem = why_no_fla(module, decay_shape in ((), (1,)))
    if problem:
        pytest.skip(problem)
    arguments = rule_arguments(name, **options)
    on_gpu = [x if x is None else x.to(CUDA) for x in arguments]
    exact = [x.double() if x is not None and x.is_floating_point() else x for x in arguments]
    ours = results_and_gradients(rule, on_gpu)
    expected = results_and_gradients(loop, exact)
    errors = [error(a, b) for a, b in zip(ours, expected, strict=True)]
    print(name, options, [f"{e:.4f}" for e in errors])
    assert all(e <= tolerance for e in errors), errors


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["batch", "documents"])
def test_kernels_equal_the_loop(name, documents):
    check_rule(name, documents=documents)


@pytest.mark.parametrize("name", RULES)
def test_documents_without_tokens_keep_their_state(name):
    check_rule(name, documents=WITH_EMPTY)


@pytest.mark.parametrize("name", [name for name in RULES if RULES[name][4] is not None])
def test_kernels_survive_a_strong_decay(name):
    check_rule(name, strong=True)


@pytest.mark.parametrize("name", ["delta", "gated_delta", "kda"])
def test_kernels_take_negative_eigenvalues(name):
    check_rule(name, beta_max=2.0)


def test_several_steps_a_token():
    problem = why_no_fla(delta)
    if problem:
        pytest.skip(problem)
    q, k, v, beta, _, state, _ = rule_arguments("delta")
    k, v = (torch.stack([x, x.flip(2)], dim=3) for x in (k, v))
    beta = torch.stack([beta, beta.flip(2)], dim=3)
    inputs = [q, k, v, beta, state]
    ours = delta_variants.delta_product(*(x.to(CUDA) for x in inputs))
    expected = delta_variants.delta_product(*(x.double() for x in inputs))
    for a, b in zip(ours, expected, strict=True):
        assert error(a.cpu(), b) <= BFLOAT16_ERROR


def test_kernels_refuse_second_derivatives():
    problem = why_no_fla(delta)
    if problem:
        pytest.skip(problem)
    q, *others = (x if x is None else x.to(CUDA) for x in rule_arguments("delta"))
    o, _ = delta.delta_rule(q.requires_grad_(), *others)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(o.float().sum(), q, create_graph=True)


# ---- attention -----------------------------------------------------------------------------------


def attention_inputs(B=2, n_tokens=130):
    g = torch.Generator().manual_seed(0)
    heads = 4, 2, 2
    return [torch.randn(B, h, n_tokens, 48, generator=g).bfloat16() for h in heads]


def check_attention(inputs, **options):
    """softmax_attention of bfloat16 on the GPU against that of float64 on the CPU."""
    on_gpu = [x.to(CUDA).requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    found = []
    for tensors in (on_gpu, exact):
        if "documents" in options:
            tokens = torch.zeros(1, T, dtype=torch.long, device=tensors[0].device)
            options["documents"] = PackedDocuments(torch.tensor(DOCUMENTS), tokens)
        o = attention.softmax_attention(*tensors, **options)
        g = torch.Generator().manual_seed(7)
        grad = torch.randn(o.shape, generator=g).bfloat16().to(o)
        found.append([o, *torch.autograd.grad(o, tensors, grad)])
    for a, b in zip(*found, strict=True):
        assert error(a.detach().cpu(), b.detach()) <= BFLOAT16_ERROR


@pytest.mark.parametrize("window", [0, 2, 17, 1000])
def test_attention(window):
    check_attention(attention_inputs(), window=window)


@pytest.mark.parametrize("window", [0, 9])
def test_attention_in_documents(window):
    check_attention(attention_inputs(1, T), window=window, documents=True)


@pytest.mark.parametrize("window", [0, 17])
def test_flash_attention_runs_where_it_is_installed(window, monkeypatch):
    if attention.flash_attn_varlen_func is None:
        pytest.skip("flash-attn is not installed")
    calls = []
    kernel = attention.flash_attn_varlen_func

    def counted(*args, **options):
        calls.append(args)
        return kernel(*args, **options)

    monkeypatch.setattr(attention, "flash_attn_varlen_func", counted)
    check_attention(attention_inputs(), window=window)
    assert len(calls) == 1
    q, k, v = (x.to(CUDA).requires_grad_() for x in attention_inputs())
    with pytest.raises(RuntimeError, match="no second derivatives"):
        o = attention.softmax_attention(q, k, v)
        torch.autograd.grad(o.float().sum(), q, create_graph=True)


# ---- models --------------------------------------------------------------------------------------

SIZES = dict(dim=64, n_layers=2, vocab_size=64, seq_len=130)
MODELS = {kind: (kind, {}) for kind in hybrid.KINDS}
MODELS |= {
    "gpt, window": ("gpt", dict(window=20)),
    "gpt, conv and ffn": ("gpt", dict(conv_size=3, use_ffn=True)),
    "memory": ("memory", dict(mem_n_keys=16, mem_k_dim=16, use_ffn=True)),
    "memory, sparse": ("memory", dict(mem_n_keys=16, mem_k_dim=16, mem_sparse_grad=True)),
}


def build(name):
    """A model on the CPU. Its layers are 48 wide, where a head needs no other width."""
    kind, options = MODELS[name]
    torch.manual_seed(0)
    if kind == "memory":
        return memory.MemoryGPT(memory.Config(**SIZES, memory_layers=(0, 1), **options))
    config_class, model_class = hybrid.KINDS[kind]
    return model_class(config_class(**SIZES, dk=48, dv=48, du=48, **options))


def random_batch(B=4):
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(64, (B, 130), generator=g)
    targets = torch.where(torch.rand(B, 130, generator=g) < 0.5, tokens.roll(3, 1), -100)
    return tokens, targets


def loss_and_gradients(model, device, dtype=None):
    model = model.to(device)
    tokens, targets = (x.to(device) for x in random_batch())
    with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        _, loss = model(tokens, targets)
    model.zero_grad()
    loss.backward()
    grads = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            grads[name] = (p.grad.to_dense() if p.grad.is_sparse else p.grad).double().cpu()
    return loss.item(), grads


@pytest.mark.parametrize("name", MODELS)
def test_models_are_the_same_on_a_gpu(name):
    model = build(name)
    loss, grads = loss_and_gradients(model, torch.device("cpu"))
    gpu_loss, gpu_grads = loss_and_gradients(model, CUDA)
    assert gpu_loss == pytest.approx(loss, rel=1e-4)
    assert grads.keys() == gpu_grads.keys()
    for key, grad in grads.items():
        assert error(gpu_grads[key], grad) < 1e-3, key


@pytest.mark.parametrize("name", MODELS)
def test_models_in_bfloat16(name):
    """With kernels, where there are any: nearly the loss and the direction of float32."""
    model = build(name)
    loss, grads = loss_and_gradients(model, torch.device("cpu"))
    rounded_loss, rounded = loss_and_gradients(model, CUDA, torch.bfloat16)
    assert rounded_loss == pytest.approx(loss, rel=0.02)
    ours, exact = (torch.cat([x[key].flatten() for key in grads]) for x in (rounded, grads))
    assert F.cosine_similarity(ours, exact, dim=0) > 0.98


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_decoding_equals_the_whole_sequence(name, dtype):
    model = build(name).to(CUDA).eval()
    tokens = random_batch()[0][:, :60].to(CUDA)
    with torch.no_grad(), torch.autocast(CUDA.type, torch.bfloat16, enabled=dtype is not None):
        whole = model(tokens)[0]
        logits, cache = model.forward_cached(tokens[:, :50])
        parts = [logits]
        for t in range(50, 60):
            logits, cache = model.forward_cached(tokens[:, t : t + 1], cache)
            parts.append(logits)
    expected = whole.double().cpu()
    tolerance = 1e-3 if dtype is None else 0.05
    assert error(torch.cat(parts, dim=1).cpu(), expected) < tolerance


# ---- whole runs ----------------------------------------------------------------------------------

RUNS = {
    "gpt": {},
    "delta": dict(model="delta", dk=16, dv=16),
    "unified_kv": dict(model="unified_kv", dk=None, dv=None, du=16),
    "memory": dict(model="memory", mem_n_keys=8, mem_heads=2, mem_knn=4, mem_k_dim=8),
}


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_repeats_the_whole_one(tmp_path, name, dtype, capsys):
    settings = dict(RUNS[name], dtype=dtype, lr_schedule="constant")
    code, whole = run(str(tmp_path), "whole", **settings)
    printed = capsys.readouterr().out
    assert code == 0 and "device: cuda" in printed
    assert ("bfloat16 (fast on this GPU)" in printed) == (dtype == "auto")
    _, parts = run(str(tmp_path), "parts", max_steps=20, **settings)
    run(str(tmp_path), "parts", resume=True, max_steps=60)
    assert_same(contents(parts)[0]["tensors"], contents(whole)[0]["tensors"])


# ---- MyriadLAMA ----------------------------------------------------------------------------------


HEAD_DIM = 16  # wide enough for FlexAttention's kernel


@pytest.mark.parametrize("scheme", fusion.MASKS)
def test_the_compiled_mask_equals_blocks(scheme):
    model, rng = random_llama(head_dim=HEAD_DIM), np.random.default_rng(2)
    prefix = random_ids(rng, 5)
    rows = []
    for question in (random_question(rng), random_question(rng, n=3)):
        rows += fusion.layout(question, 5, scheme, "sequential")[0]
    blocks = fusion.prefill_blocks(model, fusion.prefill_prefix(model, prefix), rows)
    model = model.to(CUDA)
    packed = fusion.prefill(model, fusion.prefill_prefix(model, prefix), rows)
    assert blocks.paths == packed.paths
    for block_kv, packed_kv in zip(blocks.kv, packed.kv):
        for x, y in zip(block_kv, packed_kv):
            assert error(y.cpu(), x.double()) < 1e-3


@pytest.mark.parametrize("scheme", fusion.MASKS)
def test_fused_answers_are_the_same_on_a_gpu(scheme):
    answers = []
    for device in ("cpu", CUDA):
        model, rng = random_llama(head_dim=HEAD_DIM).to(device), np.random.default_rng(3)
        prefix = random_ids(rng, 9)
        questions = [random_question(rng) for _ in range(4)]
        answers.append(decode_fused(model, prefix, questions, scheme, "restart"))
    assert answers[0] == answers[1]
