"""Attention against its definition: queried positions, packed documents, the cache, positions."""

import importlib.util
import sys
import types

import pytest
import torch
import torch.nn.functional as F

import delta
import hybrid
from analysis.decoding import greedy_decode
from model import GPT, CausalSelfAttention, Config, UnifiedKV
from nanorecall import attention
from nanorecall.build import inference_state_bytes
from nanorecall.rng import IGNORE_INDEX
from toys import T, V, build_gpt, outcome


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("some_positions", [False, True])
@pytest.mark.parametrize("window", [0, 1, 5])
def test_softmax_attention_equals_naive(groups, some_positions, window):
    torch.manual_seed(0)
    query_pos = torch.tensor([[0, 3, 11], [2, 2, 5]]) if some_positions else None
    queries = 3 if some_positions else T
    inputs = []
    for shape in ((2, 4, queries, 6), (2, groups, T, 6), (2, groups, T, 5)):
        inputs.append(torch.randn(shape, dtype=torch.float64, requires_grad=True))
    ours = attention.softmax_attention(*inputs, query_pos, window=window)
    naive = attention.naive_attention(*inputs, query_pos, window)
    torch.testing.assert_close(ours, naive, rtol=1e-10, atol=1e-12)
    grad = torch.randn_like(ours)
    ours_grads = torch.autograd.grad(ours, inputs, grad)
    for a, b in zip(ours_grads, torch.autograd.grad(naive, inputs, grad)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 40, 69, 70, 1000])
@pytest.mark.parametrize("blockwise_length", [512, 0])
def test_a_window_equals_full_attention_with_a_band_in_its_mask(
    monkeypatch, window, blockwise_length
):
    """With one mask, and in blocks, of which 70 tokens are no multiple."""
    monkeypatch.setattr(attention, "BLOCKWISE_LENGTH", blockwise_length)
    torch.manual_seed(0)
    inputs = []
    for shape in ((2, 4, 70, 6), (2, 2, 70, 6), (2, 2, 70, 5)):
        inputs.append(torch.randn(shape, dtype=torch.float64, requires_grad=True))
    t = torch.arange(70)
    band = (t <= t[:, None]) & (t > t[:, None] - window)
    q, k, v = inputs
    masked = F.scaled_dot_product_attention(q, k, v, attn_mask=band, enable_gqa=True)
    ours = attention.softmax_attention(q, k, v, window=window)
    torch.testing.assert_close(ours, masked, rtol=1e-10, atol=1e-12)
    grad = torch.randn_like(ours)
    ours_grads = torch.autograd.grad(ours, inputs, grad)
    for a, b in zip(ours_grads, torch.autograd.grad(masked, inputs, grad)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("window", [0, 5])
def test_flash_attention_lays_its_arguments_out_as_varlen_expects(monkeypatch, window):
    """The kernel needs a GPU; a stand-in with its documented semantics checks the call."""

    def stand_in(q, k, v, cu_q, cu_k, max_q, max_k, causal, deterministic, window_size=(-1, -1)):
        assert causal and deterministic and max_q == max_k == T
        assert window_size[1] == (0 if window else -1)
        n_seen = window_size[0] + 1  # the query's own token, and those before; 0: all
        assert q.shape == (2 * T, 4, 6) and k.shape == v.shape == (2 * T, 2, 6)
        assert cu_q.dtype == torch.int32 and cu_q.tolist() == [0, T, 2 * T]
        outputs = []
        for a, b in zip(cu_q[:-1], cu_q[1:]):
            sequence = [x[a:b].transpose(0, 1)[None] for x in (q, k, v)]
            output = attention.naive_attention(*sequence, window=n_seen)
            outputs.append(output[0].transpose(0, 1))
        return torch.cat(outputs)

    monkeypatch.setattr(attention, "flash_attn_varlen_func", stand_in)
    q, k, v = (torch.randn(2, h, T, 6) for h in (4, 2, 2))
    ours = attention.flash_attention(q, k, v, window=window)
    torch.testing.assert_close(ours, attention.softmax_attention(q, k, v, window=window))


def test_flash_is_chosen_only_where_it_works(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert "CUDA" in attention.why_no_flash(cpu, torch.bfloat16, 64, 64)
    monkeypatch.setattr(attention, "flash_attn_varlen_func", None)
    assert "not installed" in attention.why_no_flash(cuda, torch.bfloat16, 64, 64)
    monkeypatch.setattr(attention, "flash_attn_varlen_func", object())
    assert "bfloat16" in attention.why_no_flash(cuda, torch.float32, 64, 64)
    assert "one width" in attention.why_no_flash(cuda, torch.bfloat16, 64, 32)
    assert attention.why_no_flash(cuda, torch.bfloat16, 512, 512) is not None
    assert attention.why_no_flash(cuda, torch.bfloat16, 64, 64) is None


def test_a_flash_attn_that_fails_to_load_says_so(monkeypatch):
    for module, problem in (
        (None, "flash-attn is not installed"),
        (types.ModuleType("flash_attn"), "flash-attn fails to load: cannot import name"),
    ):
        monkeypatch.setitem(sys.modules, "flash_attn", module)
        spec = importlib.util.spec_from_file_location("another_attention", attention.__file__)
        another = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(another)
        found = another.why_no_flash(torch.device("cuda"), torch.bfloat16, 64, 64)
        assert found.startswith(problem)


def test_a_function_of_one_dtype_is_tried_in_it():
    """Kernels of half precision take nothing else; in training, autocast gives them that."""
    windows = []

    def attend(q, k, v, query_pos=None, documents=None, window=0):
        assert v.dtype == torch.bfloat16, "only bfloat16"
        windows.append(window)
        return attention.softmax_attention(q, k, v, window=window)

    layer = CausalSelfAttention(Config(dim=8, dk=4, dv=4, window=3, seq_len=9))
    with torch.autocast("cpu", torch.bfloat16):
        attention.check_window(attend, layer)
    assert windows == [3, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_odd_width_are_rotated(dtype):
    """A row of queries, keys and values may be odd, as with one head of 8 and values of 33."""
    torch.manual_seed(0)
    model = GPT(Config(dim=8, n_heads=1, dk=8, dv=33, n_layers=1, vocab_size=V, seq_len=T))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        _, loss = model(*random_batch())
    loss.backward()
    assert loss.isfinite()


def random_batch():
    tokens = torch.arange(2 * T).view(2, T) % V
    return tokens, tokens.flip(1)


def test_rotary_scores_depend_on_distance_only():
    table = attention.rope_table(6, 32)
    q, k = torch.randn(2, 6)
    turned = [attention.apply_rotary(x.expand(1, 32, 1, 6), table)[0, :, 0] for x in (q, k)]
    scores = turned[0] @ turned[1].T  # (32, 32)
    for distance in range(32):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-5)
    assert (scores[:, 0] - scores[0, 0]).abs().max() > 1e-2


def test_rotation_keeps_the_digits_of_its_input_and_rounds_no_position():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 300, 1, 6, generator=g, dtype=torch.float64)
    j = torch.arange(3, dtype=torch.float64)
    angle = torch.arange(300, dtype=torch.float64)[:, None] * 10000.0 ** (-2 * j / 6)
    pairs = torch.view_as_complex(x.unflatten(-1, (3, 2)))
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)[:, None])
    exact = turned.flatten(-2)
    double = attention.apply_rotary(x, attention.rope_table(6, 300, torch.float64))
    assert double.dtype == torch.float64
    torch.testing.assert_close(double, exact, rtol=1e-12, atol=1e-12)
    for kind, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.03), (torch.float16, 0.004)):
        turned = attention.apply_rotary(x.to(kind), attention.rope_table(6, 300, kind))
        assert turned.dtype == kind and (turned.double() - exact).abs().max() < tolerance


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, torch.float16])
def test_a_model_in_another_dtype_has_positions_of_its_own_precision(kind):
    att = CausalSelfAttention(Config(dim=8, dk=6, dv=6, seq_len=300))
    single, moved = att.rope.clone(), att.to(kind).rope
    assert torch.equal(moved, attention.rope_table(6, 300, kind))
    assert moved.dtype == torch.promote_types(kind, torch.float32)
    assert torch.equal(att.float().rope, single)


# ---- documents end to end ------------------------------------------------------------------------

KINDS = {
    "gpt": (GPT, dict(n_kv_heads=1)),
    "gpt, learned positions, gates": (
        GPT,
        dict(pos_emb="learned", q_gated=True, k_gated=True, att_use_output_gate=True),
    ),
    "gpt, window": (GPT, dict(n_kv_heads=1, window=3)),
    "unified_kv, conv, mlp": (UnifiedKV, dict(conv_size=3, use_ffn=True)),
    "unified_kv, window": (UnifiedKV, dict(window=4)),
    "unified_kv, window, gated": (UnifiedKV, dict(window=5, k_gated=True)),
    "delta": (delta.DeltaNet, {}),
    "gated_delta": (delta.GatedDeltaNet, dict(att_use_output_gate=True)),
    "delta, gpt": (hybrid.Hybrid, dict(blocks=("delta", "gpt n_kv_heads=1"))),
    "unified_kv, gated_delta, gpt": (
        hybrid.Hybrid,
        dict(
            blocks=("unified_kv du=6 window=4", "gated_delta conv_size=2", "gpt window=5"),
            n_layers=3,
            pos_emb="learned",
        ),
    ),
}


def build_kind(kind, **changes):
    cls, options = KINDS[kind]
    sizes = dict(dim=8, n_layers=2, vocab_size=V, seq_len=T, init_std=0.3)
    if issubclass(cls, hybrid.Hybrid):
        config_class = hybrid.Config
    elif issubclass(cls, delta.DeltaNet):
        config_class = delta.Config
        sizes |= dict(n_heads=2, dk=6, dv=4)
    else:
        return build_gpt(cls, **{**options, **changes})
    torch.manual_seed(0)
    return cls(config_class(**{**sizes, **options, **changes})).double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [(7, 1, 12, 5), (6, 6, 6), (1, 1)], ids=str)
@pytest.mark.parametrize("labelled", [0.3, 1.0])
def test_packed_equals_a_sequence_for_each_document(kind, lengths, labelled):
    """With labels at so many positions that the last block skips some, or none."""
    model, g = build_kind(kind, seq_len=30), torch.Generator().manual_seed(0)
    tokens = torch.randint(V, (len(lengths), max(lengths)), generator=g)
    inside = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    is_label = (torch.rand(tokens.shape, generator=g) < labelled) & inside
    targets = torch.where(is_label, tokens.flip(1), IGNORE_INDEX)
    targets[0, 0] = 3  # one at least
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = outcome(model, tokens[inside][None], targets[inside][None], ends)
    for a, b in zip(packed, outcome(model, tokens, targets)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    if len(lengths) > 2:  # the check would notice: the loss of one long document is another
        _, one_document = model(tokens[inside][None], targets[inside][None])
        assert (one_document - packed[1]).abs() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_packed_logits_without_targets_and_an_empty_document(kind):
    model = build_kind(kind)
    tokens = torch.randint(V, (1, T), generator=torch.Generator().manual_seed(0))
    logits = model(tokens, None, torch.tensor([0, 4, 4, 12], dtype=torch.int32))[0]
    apart = torch.cat([model(tokens[:, :4])[0], model(tokens[:, 4:])[0]], dim=1)
    torch.testing.assert_close(logits, apart, rtol=1e-6, atol=1e-7)


# ---- decoding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_with_a_cache_equal_one_forward_pass(kind):
    model = build_kind(kind)
    tokens = torch.randint(V, (3, T), generator=torch.Generator().manual_seed(0))
    expected, _ = model(tokens)
    for pieces in ([1] * T, [T], [5, 1, 1, 5]):
        cache, logits = None, []
        for piece in tokens.split(pieces, dim=1):
            part, cache = model.forward_cached(piece, cache)
            logits.append(part)
        torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_models_of_any_dtype_and_batches_without_sequences_tokens_or_labels(kind, dtype):
    model = build_kind(kind).to(dtype)
    for shape in ((2, T), (0, T), (2, 0), (1, 1)):
        tokens = torch.randint(V, shape)
        for targets in (tokens, torch.full_like(tokens, IGNORE_INDEX)):
            logits, loss = model(tokens, targets)
            loss.backward()
            labels = int((targets != IGNORE_INDEX).sum())
            assert logits.shape == (labels, V) and (loss == 0) == (labels == 0)
        assert model.forward_cached(tokens)[0].shape == (*shape, V)
    assert all(q.grad.dtype == dtype and q.grad.isfinite().all() for q in model.parameters())
    tokens = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(0))
    exact, ours = build_kind(kind)(tokens)[0], model(tokens)[0]
    assert ours.dtype == dtype
    assert (ours - exact).abs().max() < 16 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blockwise_length", [512, 0])
def test_bfloat16_autocast_is_close_to_float32(monkeypatch, kind, blockwise_length):
    """A window with one mask, and in blocks."""
    monkeypatch.setattr(attention, "BLOCKWISE_LENGTH", blockwise_length)
    model = build_kind(kind, dim=32).float()
    tokens = torch.randint(V, (8, T), generator=torch.Generator().manual_seed(0))
    exact, _, *grads = outcome(model, tokens, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        half, _, *half_grads = outcome(model, tokens, tokens)
        decoded, _ = model.forward_cached(tokens)
    assert (half.float() - exact).abs().max() < 0.05 * exact.abs().max()
    assert (decoded.flatten(0, 1).float() - exact).abs().max() < 0.05 * exact.abs().max()
    for a, b in zip(half_grads, grads):
        assert a.dtype == torch.float32
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.97


CACHED = [
    (GPT, dict(n_kv_heads=1, conv_size=3)),
    (GPT, dict(k_kernel="taylor", q_kernel="taylor", v_kernel="exp", pos_emb="none", conv_size=1)),
    (GPT, dict(use_att=False, use_ffn=True)),
    (UnifiedKV, dict()),
    (UnifiedKV, dict(n_kv_heads=1, conv_size=4, v_kernel="taylor", pos_emb="none")),
    (UnifiedKV, dict(k_gated=True, k_norm="l2", k_kernel="silu")),
    (GPT, dict(window=1)),
    (GPT, dict(window=4, conv_size=2, n_layers=1)),
    (UnifiedKV, dict(window=5)),
    (UnifiedKV, dict(window=3, k_gated=True)),
    (delta.DeltaNet, dict(conv_size=2)),
    (delta.DeltaNet, dict(conv_size=0, k_kernel="taylor", q_kernel="taylor", v_kernel="taylor")),
    (delta.GatedDeltaNet, dict(n_layers=1)),
    (hybrid.Hybrid, dict(blocks=("delta", "gpt window=4", "unified_kv conv_size=2"), n_layers=4)),
]


@pytest.mark.parametrize("cls, changes", CACHED, ids=str)
@pytest.mark.parametrize("T", [1, 5, 12])
def test_state_bytes_is_the_size_of_the_cache_and_decoding_from_it_is_correct(cls, changes, T):
    torch.manual_seed(0)
    sizes = dict(dim=8, n_layers=2, vocab_size=V, seq_len=T)
    if cls is hybrid.Hybrid:
        config_class = hybrid.Config
    else:
        config_class = delta.Config if issubclass(cls, delta.DeltaNet) else Config
        sizes |= dict(n_heads=2, dk=6, dv=4, du=6)
    model = cls(config_class(**{**sizes, **changes}))
    tokens = torch.randint(V, (1, T))
    cache, logits = None, []
    for token in tokens.T:
        some, cache = model.forward_cached(token[None], cache)
        logits.append(some)
    torch.testing.assert_close(torch.cat(logits, 1), model(tokens)[0], rtol=1e-4, atol=1e-4)
    values, storages = 0, {}
    for layer in cache:
        for x in layer.values():
            if torch.is_tensor(x):
                values += x.numel()
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    expected = inference_state_bytes(model, T)
    assert 4 * values == sum(storages.values()) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_equals_the_argmax_of_whole_sequences(kind):
    model = build_kind(kind)
    tokens = torch.randint(V, (3, 4), generator=torch.Generator().manual_seed(0))
    out = greedy_decode(model, tokens, T - 4)
    assert out.shape == (3, T - 4)
    whole = torch.cat([tokens, out], dim=1)
    assert torch.equal(model(whole)[0][:, 3:-1].argmax(-1), out)
    assert torch.equal(greedy_decode(model, tokens, 1), out[:, :1])


@pytest.mark.parametrize("cls, numbers", [(GPT, 2 * (6 + 4)), (UnifiedKV, 2 * 6)])
@pytest.mark.parametrize("window, kept", [(1, 0), (2, 1), (5, 4), (12, 11), (13, 12), (0, 12)])
def test_a_window_bounds_the_cache(cls, numbers, window, kept):
    """Of each of two layers: the tokens that the next one sees besides itself."""
    model = build_gpt(cls, window=window)
    assert inference_state_bytes(model, T) == 8 * 2 * kept * numbers


def test_a_model_with_a_window_sees_no_further():
    """With two layers, the last logits depend on the last 2 * (window - 1) + 1 tokens."""
    tokens = torch.randint(V, (1, T), generator=torch.Generator().manual_seed(0))
    model = build_gpt(window=3)
    last = model(tokens)[0][0, -1]
    for position in range(T):
        changed = tokens.clone()
        changed[0, position] = (changed[0, position] + 1) % V
        is_seen = bool((model(changed)[0][0, -1] != last).any())
        assert is_seen == (position >= T - 5), position


@pytest.mark.parametrize("cls", [GPT, UnifiedKV])
def test_many_labels_and_a_window_are_computed_in_blocks(monkeypatch, cls):
    """A mask over all pairs of label and token would make long sequences cost as T^2."""
    labelled = torch.zeros(2, T, dtype=torch.bool)
    labelled[0, [1, 2, 5, 8, 9, 11]] = True
    labelled[1, [0, 3, 7]] = True
    tokens = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(0))
    targets = tokens.roll(1, dims=1).where(labelled, IGNORE_INDEX)
    model = build_gpt(cls, window=1, conv_size=3, att_use_output_gate=True)
    under_mask = outcome(model, tokens, targets)

    window_attention = attention.window_attention
    n_queries = []

    def count_queries(q, k, v, window):
        n_queries.append(q.shape[2])
        return window_attention(q, k, v, window)

    monkeypatch.setattr(attention, "BLOCKWISE_LENGTH", 0)
    monkeypatch.setattr(attention, "window_attention", count_queries)
    in_blocks = outcome(model, tokens, targets)
    assert n_queries == [T] * len(model.layers)
    for a, b in zip(in_blocks, under_mask):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_more_tokens_than_positions_are_refused():
    with pytest.raises(ValueError, match="positions for 12 tokens, not for 13"):
        build_gpt().forward_cached(torch.zeros(1, T + 1, dtype=torch.long))
    build_gpt(pos_emb="none", conv_size=2).forward_cached(torch.zeros(1, T + 1, dtype=torch.long))


@pytest.mark.parametrize("ends", [[0, 2, 4], [1, 3, 6], [0, 4, 2, 6], [0], [0, 6, 7]])
@pytest.mark.parametrize("cls", [GPT, delta.DeltaNet])
def test_ends_that_do_not_fit_the_sequence_are_refused(cls, ends):
    config_class = delta.Config if cls is delta.DeltaNet else Config
    model = cls(config_class(dim=8, n_layers=1, dk=4, dv=4, vocab_size=9, seq_len=8))
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to T=6 over one sequence"):
        model(torch.zeros(1, 6, dtype=torch.long), cu_seqlens=torch.tensor(ends))
    with pytest.raises(ValueError, match="for 2 sequences"):
        model(torch.zeros(2, 6, dtype=torch.long), cu_seqlens=torch.tensor([0, 6]))
