"""Softmax attention, one function for all models, with its naive twin; and rotary positions.

Letters: B batch, T tokens, n queried positions, H query heads, G key/value heads, K key width per
head, V value width per head, C queries of a block.
"""

import contextlib
import inspect
import math
import os

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanorecall.ops import accum_dtype, no_autocast
from nanorecall.second_order import FirstOrder, transformed
from nanorecall.settings import ConfigError, require

NO_FLASH = "flash-attn is not installed"
try:  # an optional extra, CUDA only: pip install flash-attn --no-build-isolation
    from flash_attn import flash_attn_varlen_func
except ImportError as e:
    flash_attn_varlen_func = None
    if not isinstance(e, ModuleNotFoundError):  # it was built for another version of torch
        NO_FLASH = f"flash-attn fails to load: {e}"

# ---- attention -----------------------------------------------------------------------------------


def softmax_attention(q, k, v, query_pos=None, documents=None, window=0):
    """Causal softmax attention: o_t = sum_{s<=t} softmax_s(q_t.k_s / sqrt(K)) v_s.

    q (B, H, n, K); k (B, G, T, K); v (B, G, T, V) with G
    dividing H -> (B, H, n, V). query_pos (B, n) is the position of each query; None means n == T,
    in order. With documents (and no query_pos), B is 1 and no query sees beyond its own document.
    With a window, s > t - window: a query sees that many tokens, its own included.
    Runs flash-attn's varlen kernel where why_no_flash returns None, else
    scaled_dot_product_attention.
    """
    # Under autocast some norms and feature maps return float32, but the kernels want one dtype.
    q = q.to(v.dtype)
    k = k.to(v.dtype)
    problem = why_no_flash(q.device, q.dtype, q.shape[-1], v.shape[-1])
    if query_pos is None and problem is None and not transformed():
        return flash_attention(q, k, v, documents, window)
    grouped = q.shape[1] != k.shape[1]
    if documents:
        # One padded sequence a document: on a CPU faster than a mask over all pairs of tokens.
        q, k, v = (documents.pad(x.transpose(1, 2)).transpose(1, 2) for x in (q, k, v))
        o = softmax_attention(q, k, v, window=window)
        return documents.pack(o.transpose(1, 2)).transpose(1, 2)
    key_pos = torch.arange(k.shape[2], device=k.device)
    if query_pos is None and 0 < window < len(key_pos):
        if len(key_pos) >= BLOCKWISE_LENGTH:
            return window_attention(q, k, v, window)
        query_pos = key_pos[None]
    if query_pos is None:
        return dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    distance = query_pos[:, None, :, None] - key_pos  # (B, 1, n, T)
    visible = distance >= 0
    if window:
        visible &= distance < window
    return dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=grouped)


BLOCKWISE_LENGTH = 512  # shorter sequences are faster with one mask over all pairs of tokens


def prefers_all_queries(query_pos, T, window):
    """Is attention with a window at positions query_pos (B, n) slower than at all T positions?

    The first computes n * T scores under a mask, the second 2 * window * T in blocks. On a CPU a
    score costs half as much under the mask.
    """
    if query_pos is None or not window or T < BLOCKWISE_LENGTH:
        return False
    return query_pos.shape[1] > 4 * window


def window_attention(q, k, v, window):
    """softmax_attention of all tokens with a window, in a time linear in T.

    A block of C queries sees C + window - 1 keys, those before the first token masked. Blocks as
    long as the window mask half of their scores; much shorter ones are many small products.
    """
    B, _, T, _ = q.shape
    C = max(window, 32)
    n_blocks = -(-T // C)
    n_after = n_blocks * C - T

    def to_blocks(x, n_before):  # (B, heads, T, width) -> (B * n_blocks, heads, tokens, width)
        x = F.pad(x, (0, 0, n_before, n_after)).unfold(2, n_before + C, C)
        return x.permute(0, 2, 1, 4, 3).flatten(0, 1)

    q, k, v = to_blocks(q, 0), to_blocks(k, window - 1), to_blocks(v, window - 1)
    # Query i of a block sees its keys i to i + window - 1.
    key_idx = torch.arange(k.shape[2], device=k.device)
    band = torch.ones(C, k.shape[2], dtype=torch.bool, device=k.device).triu().tril(window - 1)
    block_start = C * torch.arange(n_blocks, device=k.device)
    exists = block_start[:, None] + key_idx >= window - 1  # (n_blocks, keys)
    visible = (band & exists[:, None]).repeat(B, 1, 1)[:, None]  # (B * n_blocks, 1, C, keys)
    grouped = q.shape[1] != k.shape[1]
    o = dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=grouped)
    return o.unflatten(0, (B, n_blocks)).transpose(1, 2).flatten(2, 3)[:, :, :T]


def dot_product_attention(q, k, v, **options):
    """F.scaled_dot_product_attention; under torch.func in the one form with all derivatives.

    Its fast forms raise an error at a second derivative. A model that needs one outside of
    torch.func can use torch.nn.attention.sdpa_kernel(SDPBackend.MATH).
    """
    with sdpa_kernel(SDPBackend.MATH) if transformed() else contextlib.nullcontext():
        return F.scaled_dot_product_attention(q, k, v, **options)


def why_no_flash(device, dtype, key_width, value_width):
    """Why flash-attn cannot be used here, as text, or None if it can."""
    if device.type != "cuda":
        return "flash-attn runs on CUDA only"
    if flash_attn_varlen_func is None:
        return NO_FLASH
    if dtype not in (torch.bfloat16, torch.float16):
        return "flash-attn takes bfloat16 or float16 only"
    if key_width != value_width or key_width > 256:
        return "flash-attn needs keys and values of one width up to 256"
    return None


def flash_attention(q, k, v, documents=None, window=0):
    """softmax_attention over B sequences of T tokens through flash-attn's varlen kernel.

    Deterministic, so that a resumed run repeats the interrupted one.
    """
    B, _, T, _ = q.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B*T, H or G, width)
    if documents:
        # Empty documents are left out: the kernel is not known to take them.
        ends = documents.cu_seqlens.unique_consecutive().int()
        longest = documents.longest
    else:
        ends = torch.arange(0, (B + 1) * T, T, device=q.device, dtype=torch.int32)
        longest = T
    options = dict(causal=True, deterministic=True)
    if window:
        options["window_size"] = window - 1, 0  # tokens before and after the query's own
    o = flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, **options)  # (B*T, H, V)
    o = FirstOrder.apply(o, "flash-attn")
    return o.unflatten(0, (B, T)).transpose(1, 2)


def describe_function(attention_fn):
    """Name and file of an attention function, as text."""
    code = getattr(inspect.unwrap(attention_fn), "__code__", None)
    name = getattr(attention_fn, "__qualname__", type(attention_fn).__name__)
    if code is None:
        return name
    return f"{name} ({os.path.basename(code.co_filename)}:{code.co_firstlineno})"


def check_signature(attention_fn, window=0):
    """ConfigError unless attention_fn takes the arguments of softmax_attention.

    It needs `window` only where a model has one.
    """
    names = ["q", "k", "v", "query_pos", "documents"]
    options = {"window": window} if window else {}
    try:
        inspect.signature(attention_fn).bind(*names, **options)
    except TypeError as e:
        expected = ", ".join([*names, *options])
        described = describe_function(attention_fn)
        message = f"the attention function {described} must take ({expected}): {e}"
        function = getattr(attention_fn, "__func__", None)  # of a method
        if function and takes_arguments(function, names, options):
            message += "; as a method it gets self first: write attention_fn = staticmethod(...)"
        raise ConfigError(message, None) from None
    except ValueError:  # a builtin shows no signature
        pass


def takes_arguments(function, names, options):
    try:
        inspect.signature(function).bind(*names, **options)
    except TypeError:
        return False
    return True


def check_output(attention_fn, o, q, v):
    """ConfigError unless attention_fn returned a tensor (B, H, n, V) for q (B, H, n, K)."""
    expected = (*q.shape[:3], v.shape[-1])
    if torch.is_tensor(o) and o.shape == expected:
        return
    found = f"a tensor {tuple(o.shape)}" if torch.is_tensor(o) else f"a {type(o).__name__}"
    function = describe_function(attention_fn)
    message = f"the attention function {function} returns {found}, not (B, H, n, V) = {expected}"
    raise ConfigError(message, None)


def check_window(attention_fn, layer):
    """ConfigError if attention_fn lets a query see more tokens than layer.config.window.

    layer: the attention layer that calls it. A function may take `window` and forget it.
    """
    c = layer.config
    T = c.window + 1
    if not c.window or T > c.seq_len:
        return
    generator = torch.Generator().manual_seed(0)
    device = layer.out_proj.weight.device

    dtype = torch.float32
    if torch.is_autocast_enabled(device.type):  # it may know the dtype of training only
        dtype = torch.get_autocast_dtype(device.type)

    def random(heads, width):
        return torch.randn(1, heads, T, width, generator=generator).to(device, dtype)

    K, V = layer.head_dims(c)
    q, k, v = random(layer.n_heads, K), random(layer.n_kv_heads, K), random(layer.n_kv_heads, V)
    # The first token is the only one that the last query must not see.
    is_first = torch.arange(T, device=device)[:, None] == 0
    o = attention_fn(q, k, v, None, None, window=c.window)
    k, v = (torch.where(is_first, x + 1, x) for x in (k, v))
    changed = attention_fn(q, k, v, None, None, window=c.window)
    # Not ">", which is false for a NaN.
    if (changed - o)[:, :, -1].abs().max() <= 1e-5 * o.abs().max():
        return
    function = describe_function(attention_fn)
    message = f"the attention function {function} lets a query see more than its window of"
    raise ConfigError(f"{message} {c.window} tokens; mask those before it", None)


def naive_attention(q, k, v, query_pos=None, window=0):
    """softmax_attention one query at a time, written from the definition: the tests' oracle."""
    B, H, n, K = q.shape
    k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
    out = []
    for b in range(B):
        for i in range(n):
            t = i if query_pos is None else int(query_pos[b, i])
            seen = slice(max(0, t + 1 - window) if window else 0, t + 1)
            scores = (k[b, :, seen] @ q[b, :, i, :, None]).squeeze(-1) / math.sqrt(K)  # (H, seen)
            out.append((scores.softmax(-1)[:, :, None] * v[b, :, seen]).sum(1))
    return torch.stack(out).unflatten(0, (B, n)).transpose(1, 2)


def attention_weights(q, k, documents=None, window=0):
    """The weights of softmax_attention: q (B, H, T, K), k (B, G, T, K) -> (B, H, T, T).

    Row t holds the weights on tokens s <= t that the query sees, zeros elsewhere.
    """
    H, T, K = q.shape[1:]
    k = k.repeat_interleave(H // k.shape[1], dim=1)
    visible = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    if documents:
        visible &= documents.doc_id[:, None] == documents.doc_id
    if window:
        visible = visible.triu(1 - window)
    with no_autocast(q):
        scores = (q.float() @ k.float().transpose(-1, -2)) / math.sqrt(K)
        return scores.masked_fill(~visible, -torch.inf).softmax(-1)


# ---- rotary positions ----------------------------------------------------------------------------


def rope_table(width, seq_len, dtype=None):
    """Rotary positions (Su et al. 2021) as unit complex numbers, (T, K/2, 2) real numbers.

    Position t turns the j-th pair of neighbouring features by t * 10000^(-2j/K). The table has
    dtype (None: torch's default), or float32 if that is wider: bfloat16 cannot tell position 257
    from 256.
    """
    message = f"pos_emb=rope turns features in pairs, so a key's width must be even, not {width}"
    require(width % 2 == 0, f"{message}; or set pos_emb=none", "pos_emb")
    dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
    exponent = -torch.arange(0, width, 2, dtype=dtype) / width
    angle = torch.outer(torch.arange(seq_len, dtype=dtype), 10000.0**exponent)
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def apply_rotary(x, table, positions=None):
    """Turn x (B, n, H, K) by its positions (B, n), or by 0..n-1 if they are None.

    A rotation is one complex product, in float32 at least; the result has x's dtype.
    """
    if positions is None:
        turn = table[: x.shape[1], None]  # (n, 1, K/2, 2)
    else:
        turn = table[positions].unsqueeze(2)  # (B, n, 1, K/2, 2)
    # Complex numbers need rows that begin at even places, which a part of a wider row may not.
    pairs = x.to(accum_dtype(x)).contiguous().unflatten(-1, (-1, 2))
    turned = torch.view_as_complex(pairs) * torch.view_as_complex(turn)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)
