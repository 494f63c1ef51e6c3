"""Causal softmax attention over rows or over documents end to end, its naive twin, and rotary positions.

Letters: B batch, T tokens, n queried positions, H query heads, G key/value heads, K key width per head, V value width per
head, R documents in a row, L tokens in the longest.
"""

import contextlib
import math

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanorecall.second_order import FirstOrder, transformed
from nanorecall.settings import require

try:  # an optional extra, CUDA only: pip install flash-attn --no-build-isolation
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None


def document_ends(cu_seqlens, rows, tokens, device):
    """cu_seqlens (documents + 1,) of any integer dtype on any device -> long, on `device`.

    ValueError if they do not rise from 0 to the number of tokens in a single row. Two may be equal:
    a document may be empty.
    """
    number = torch.is_tensor(cu_seqlens) and not (
        cu_seqlens.is_floating_point() or cu_seqlens.is_complex() or cu_seqlens.dtype == torch.bool
    )
    if not number or cu_seqlens.ndim != 1:
        raise ValueError("cu_seqlens must be a tensor of integers with one axis")
    ends = cu_seqlens.tolist()
    fits = len(ends) >= 2 and ends[0] == 0 and ends[-1] == tokens and ends == sorted(ends)
    if rows != 1 or not fits:
        what = f"cu_seqlens must rise from 0 to T={tokens} over one row of tokens"
        raise ValueError(f"{what}; got {ends[:9]} for {rows} rows")
    return cu_seqlens.to(device, torch.long)


class PackedDocuments:
    """Documents end to end in one row (1, T, ...), and the same with a row for each, padded with zeros (R, L, ...)."""

    def __init__(self, cu_seqlens, tokens):
        """cu_seqlens (R + 1,) integers: document d is tokens cu_seqlens[d] to cu_seqlens[d + 1] of tokens (1, T).

        ValueError if they do not fit: see document_ends.
        """
        self.ends = document_ends(cu_seqlens, *tokens.shape, tokens.device)
        lengths = self.ends.diff()
        self.count, self.longest = len(lengths), int(lengths.max())
        self.number = number = torch.arange(self.count, device=lengths.device).repeat_interleave(lengths)  # (T,)
        every = torch.arange(len(number), device=lengths.device)
        self.position = every - self.ends[:-1][number]  # (T,), from 0
        self.place = None if int(lengths.min()) == self.longest else number * self.longest + self.position

    def split(self, x):
        """(1, T, ...) -> (R, L, ...)"""
        if self.place is None:  # all of one length
            return x.unflatten(1, (self.count, self.longest)).squeeze(0)
        rows = x.new_zeros(self.count * self.longest, *x.shape[2:])
        return rows.index_copy(0, self.place, x[0]).unflatten(0, (self.count, self.longest))

    def join(self, x):
        """(R, L, ...) -> (1, T, ...)"""
        flat = x.flatten(0, 1)
        return (flat if self.place is None else flat[self.place]).unsqueeze(0)


# ---- softmax attention -------------------------------------------------------------------------------------------------


def softmax_attention(q, k, v, rows=None, documents=None):
    """Causal softmax attention: o_t = sum_{s<=t} softmax_s(q_t.k_s / sqrt(K)) v_s. The one function all models call.

    q (B, H, n, K); k (B, G, T, K); v (B, G, T, V) with G dividing H -> (B, H, n, V).
    rows (B, n) gives the position of each query; None means n == T, in order. With documents (and no rows), B is 1 and no
    query sees beyond its own document.
    flash-attn's varlen kernel where `flash_problem` finds nothing against it, else scaled_dot_product_attention.
    """
    q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast some norms and feature maps return float32
    problem = why_no_flash(q.device, q.dtype, q.shape[-1], v.shape[-1])
    if rows is None and problem is None and not transformed():
        return flash_attention(q, k, v, documents)
    grouped = q.shape[1] != k.shape[1]
    if documents:  # a document per row: on a CPU faster than a mask over all pairs of tokens
        q, k, v = (documents.split(x.transpose(1, 2)).transpose(1, 2) for x in (q, k, v))
        o = dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return documents.join(o.transpose(1, 2)).transpose(1, 2)
    if rows is None:
        return dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    seen = rows[:, None, :, None] >= torch.arange(k.shape[2], device=k.device)  # (B, 1, n, T)
    return dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=grouped)


def dot_product_attention(q, k, v, **options):
    """F.scaled_dot_product_attention, under torch.func in the one form that has every derivative.

    Its fast forms refuse a second derivative in a sentence. Around a model that is to have one, put
    torch.nn.attention.sdpa_kernel(SDPBackend.MATH).
    """
    with sdpa_kernel(SDPBackend.MATH) if transformed() else contextlib.nullcontext():
        return F.scaled_dot_product_attention(q, k, v, **options)


def why_no_flash(device, dtype, key_width, value_width):
    """Why flash-attn cannot be used here, as text, or None if it can."""
    if device.type != "cuda":
        return "flash-attn runs on CUDA only"
    if flash_attn_varlen_func is None:
        return "flash-attn is not installed"
    if dtype not in (torch.bfloat16, torch.float16):
        return "flash-attn takes bfloat16 or float16 only"
    if key_width != value_width or key_width > 256:
        return "flash-attn needs keys and values of one width up to 256"
    return None


def flash_attention(q, k, v, documents=None):
    """Causal attention over B rows of T tokens through flash-attn's varlen kernel; arguments as in softmax_attention.

    Deterministic, so that a resumed run repeats the interrupted one.
    """
    B, _, T, _ = q.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B*T, H or G, width)
    if documents:
        # The kernel is not known to take a document without tokens, and none is needed for it.
        ends, longest = documents.ends.unique_consecutive().int(), documents.longest
    else:
        ends, longest = torch.arange(0, (B + 1) * T, T, device=q.device, dtype=torch.int32), T
    o = flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, causal=True, deterministic=True)  # (B*T, H, V)
    o = FirstOrder.apply(o, "flash-attn")
    return o.unflatten(0, (B, T)).transpose(1, 2)


def naive_attention(q, k, v, rows=None):
    """softmax_attention one query at a time, written from the definition: the oracle of the tests."""
    B, H, n, K = q.shape
    k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
    out = []
    for b in range(B):
        for i in range(n):
            t = i if rows is None else int(rows[b, i])
            scores = (k[b, :, : t + 1] @ q[b, :, i, :, None]).squeeze(-1) / math.sqrt(K)  # (H, t+1)
            out.append((scores.softmax(-1)[:, :, None] * v[b, :, : t + 1]).sum(1))
    return torch.stack(out).unflatten(0, (B, n)).transpose(1, 2)


def attention_weights(q, k, documents=None):
    """The weights in softmax_attention, as a matrix: q (B, H, T, K), k (B, G, T, K) -> (B, H, T, T), row t over s <= t."""
    H, T, K = q.shape[1:]
    k = k.repeat_interleave(H // k.shape[1], dim=1)
    seen = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    if documents:
        seen &= documents.number[:, None] == documents.number
    scores = (q.float() @ k.float().transpose(-1, -2)) / math.sqrt(K)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)


# ---- rotary positions --------------------------------------------------------------------------------------------------


def rope_table(width, seq_len, dtype=None):
    """Rotary positions (Su et al. 2021) as unit complex numbers, (T, K/2): position t turns the j-th pair of neighbouring
    features by t * 10000^(-2j/K). Stored as (T, K/2, 2) real numbers of dtype (None: torch's
    default), in float32 at least: bfloat16 cannot tell position 257 from 256.
    """
    message = f"pos=rope turns features in pairs, so a key's width must be even, not {width}; or set pos=none"
    require(width % 2 == 0, message, "pos")
    kind = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
    exponent = -torch.arange(0, width, 2, dtype=kind) / width
    angle = torch.outer(torch.arange(seq_len, dtype=kind), 10000.0**exponent)
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def apply_rotary(x, table, rows=None):
    """Turn x (B, n, H, K) by its positions: rows (B, n), or None for 0..n-1.

    A rotation is one complex product, in float32 at least.
    """
    turn = table[: x.shape[1], None] if rows is None else table[rows].unsqueeze(2)  # (n or B, n, 1, K/2, 2)
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
    return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turn)).flatten(-2).to(x.dtype)
