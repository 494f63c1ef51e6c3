"""The delta rule three ways (token by token, in chunks, a GPU kernel), and DeltaNet on model.py.

    python train.py configs/mqar_delta.py            # DeltaNet
    python train.py configs/mqar_gated_delta.py      # Gated DeltaNet: the state decays

The memory of one head is a matrix S (K, V) that maps keys to values. Each token reads the value
that S holds under the token's key, and moves it towards the token's value by a fraction beta, the
write strength (Schlag et al. 2021, arXiv 2102.11174; Widrow and Hoff's rule of 1960):

    u_t = beta_t (v_t - S_{t-1}^T k_t)        the error, times the write strength
    S_t = S_{t-1} + k_t u_t^T                 = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T
    o_t = S_t^T q_t / sqrt(K)

Storing a key again replaces its value (wholly if beta = 1 and |k| = 1), where linear attention
would add the two. Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464) lets S decay first: S_{t-1}
above becomes exp(g_t) S_{t-1}, with g_t <= 0 a number per head. The recurrence is stable if
beta_t |k_t|^2 <= 2, so keys are normalised to length 1. With beta in (1, 2) the transition has a
negative eigenvalue, and the state can change its sign (Grazzi et al. 2024, arXiv 2411.12537).

Token by token this is T small steps one after another. In chunks of C tokens (Yang et al. 2024,
arXiv 2406.06484: the WY or UT form) nearly all of it is matrix products. Here Q, K, V and U have
a row for each token of a chunk, Q is divided by sqrt(K), and * is elementwise. Let S be the state
before the chunk, G_i = g_1 + ... + g_i within the chunk (0 without decay), and D_ij = exp(g_{j+1} +
... + g_i) for j <= i, the decay from j to i, else 0. The recurrence, written out, is

    u_i + sum_{j<i} beta_i D_ij (k_i.k_j) u_j = beta_i (v_i - exp(G_i) S^T k_i)

for each i of the chunk, so with A = tril(diag(beta) K K^T * D, -1) and P = tril(Q K^T * D)

    U = (I + A)^-1 diag(beta) V - (I + A)^-1 diag(beta exp(G)) K S =: U' - W S       errors, (C, V)
    O = diag(exp(G)) Q S + P U
    S <- exp(G_C) S + (diag(exp(G_C - G)) K)^T U

Only products with S wait for the chunk before; the rest is done for all chunks at once. Cost per
head and chunk, in multiply-adds: C^2 (3 K + 2 V) + 3 C K V, and C^3 / 2 for the inverse, so linear
in T. The inverse is a triangular solve, not the product (I - A)(I + A^2)(I + A^4)..., whose factors
overflow if keys resemble each other.

Letters: B batch, T tokens, H heads, K key width, V value width, C tokens in a chunk, M sequences
x heads, R chunks of all M. In shapes of the model, D is the width of the residual stream. The D
above is `decay` in the code.
"""

import functools
import importlib.util
import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import model
from model import ACTIVATIONS, GPT, CausalSelfAttention, GPTBlock, RMSNorm
from nanorecall.attention import apply_rotary
from nanorecall.ops import (
    accum_dtype,
    check_cu_seqlens,
    gather_positions,
    no_autocast,
    token_positions,
)
from nanorecall.second_order import FirstOrder, Twinned, needs_twin, transformed, twin_gradients

# ---- the rule, token by token --------------------------------------------------------------------


def delta_rule_recurrent(q, k, v, beta, log_decay=None, state=None, cu_seqlens=None):
    """The recurrence as it is written: the tests' oracle, and one step of decoding.

    q, k (B, H, T, K); v (B, H, T, V); beta (B, H, T); log_decay (B, H, T), at most 0, or None for
    no decay; state (B, H, K, V) before the first token, or None for zeros. -> o (B, H, T, V) in v's
    dtype, and the state after the last token, which is float32 (float64 if q is).

    With cu_seqlens (documents + 1,), B is 1, document d is tokens cu_seqlens[d] to
    cu_seqlens[d + 1] and starts from a state of its own; states are (documents, H, K, V).
    ValueError if shapes do not fit.
    """
    cu_seqlens = check_shapes(q, k, v, beta, log_decay, state, cu_seqlens)
    if cu_seqlens is not None:
        S = zero_state(q, v, len(cu_seqlens) - 1) if state is None else state
        return recurrent_varlen(delta_rule_recurrent, [q, k, v, beta, log_decay], S, cu_seqlens)
    dtype = accum_dtype(q)
    S = zero_state(q, v) if state is None else state.to(dtype)
    outputs = []
    for t in range(q.shape[2]):
        q_t, k_t, v_t, beta_t = (x[:, :, t].to(dtype) for x in (q, k, v, beta))
        if log_decay is not None:
            S = S * log_decay[:, :, t, None, None].to(dtype).exp()
        u_t = beta_t[..., None] * (v_t - (S * k_t[..., None]).sum(-2))  # (B, H, V)
        S = S + k_t[..., None] * u_t[..., None, :]
        outputs.append((S * q_t[..., None]).sum(-2) / math.sqrt(q.shape[-1]))
    if not outputs:
        return v, S
    return torch.stack(outputs, dim=2).to(v.dtype), S


def recurrent_varlen(rule, tokens, state, cu_seqlens, **options):
    """rule(*tokens, state) over one document after another."""
    outputs = []
    states = []
    for d, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        of_document = [None if x is None else x[:, :, start:end] for x in tokens]
        o, after = rule(*of_document, state=state[d : d + 1], **options)
        outputs.append(o)
        states.append(after)
    return torch.cat(outputs, dim=2), torch.cat(states)


def zero_state(q, v, n=None):
    """Zeros (n or B, H, K, V)."""
    n = len(q) if n is None else n
    return q.new_zeros(n, q.shape[1], q.shape[-1], v.shape[-1], dtype=accum_dtype(q))


def check_shapes(q, k, v, beta, log_decay, state, cu_seqlens):
    """-> cu_seqlens as int64, or None; ValueError in one sentence if shapes do not fit."""
    B, H, T, K = q.shape
    V = v.shape[-1]
    n_states = B
    if cu_seqlens is not None:
        cu_seqlens = check_cu_seqlens(cu_seqlens, B, T, q.device)
        n_states = len(cu_seqlens) - 1
    expected = {
        "k": (k, (B, H, T, K)),
        "v": (v, (B, H, T, V)),
        "beta": (beta, (B, H, T)),
        "log_decay": (log_decay, (B, H, T)),
        "state": (state, (n_states, H, K, V)),
    }
    for name, (x, shape) in expected.items():
        if x is not None and x.shape != shape:
            what = f"{name} must have shape {shape} beside q of {tuple(q.shape)}"
            raise ValueError(f"{what}, not {tuple(x.shape)}")
    return cu_seqlens


# ---- the rule, in chunks -------------------------------------------------------------------------


@torch._disable_dynamo  # traced, the scan would be unrolled into a copy for each chunk
def delta_rule_chunkwise(q, k, v, beta, log_decay=None, state=None, cu_seqlens=None, chunk_size=16):
    """delta_rule_recurrent by matrix products over chunks: same arguments and results, any T.

    Best on a CPU: 16 tokens for short sequences and narrow heads, 32 for T >= 1024 or K = 64.
    """
    cu_seqlens = check_shapes(q, k, v, beta, log_decay, state, cu_seqlens)
    chunk_size = max(1, min(chunk_size, q.shape[2]))
    if cu_seqlens is None:
        chunks = BatchChunks(*q.shape[:3], chunk_size)
    else:
        chunks = DocumentChunks(cu_seqlens, q.shape[1], chunk_size)
    dtype = accum_dtype(q)
    with no_autocast(q):  # a triangular solve has no half precision
        S = g = None
        if state is not None:
            S = chunks.to_chunk_order(state.to(dtype)).flatten(0, 1)  # (M, K, V)
        if log_decay is not None:
            g = chunks.to_chunks(log_decay[..., None].to(dtype))  # (R, C, 1)
        scaled = q.to(dtype) / math.sqrt(q.shape[-1])
        inputs = [chunks.to_chunks(x.to(dtype)) for x in (scaled, k, v, beta[..., None])]
        o, S = ChunkwiseDeltaRule.apply(*inputs, g, S, chunks.sizes)
        S = S.unflatten(0, (len(S) // q.shape[1], q.shape[1]))
        # An empty document, which comes last in the order of chunks, ends with a state of zeros.
        S = F.pad(S, (0, 0, 0, 0, 0, 0, 0, chunks.n_sequences - len(S)))
        S = chunks.from_chunk_order(S)
        return chunks.from_chunks(o).to(v.dtype), S


class BatchChunks:
    """B sequences of T tokens as chunks: all first chunks, then all second ones, and so on.

    So a step of the scan finds its chunks side by side in memory: sizes[n] of them in step n, each
    (C, width). Sequences are padded at the end with zeros, which change neither outputs nor state:
    a key of zeros writes nothing.
    """

    def __init__(self, B, H, T, C):
        self.n_sequences = B
        self.n_heads = H
        self.n_tokens = T
        self.chunk_size = C
        self.n_steps = -(-T // C)
        self.sizes = [B * H] * self.n_steps

    def to_chunks(self, x):
        """(B, H, T, width) -> (R, C, width)"""
        missing = self.n_steps * self.chunk_size - self.n_tokens
        if missing:
            x = F.pad(x, (0, 0, 0, missing))
        x = x.unflatten(2, (self.n_steps, self.chunk_size))  # (B, H, steps, C, width)
        return x.permute(2, 0, 1, 3, 4).flatten(0, 2).contiguous()

    def from_chunks(self, x):
        """(R, C, width) -> (B, H, T, width)"""
        x = x.unflatten(0, (self.n_steps, self.n_sequences, self.n_heads))
        return x.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : self.n_tokens]

    def to_chunk_order(self, S):
        return S

    def from_chunk_order(self, S):
        return S


class DocumentChunks:
    """As BatchChunks, for documents end to end in one sequence, each cut into chunks of its own.

    The document with the most chunks comes first. So the documents that still have a chunk in step
    n are the first sizes[n] / H, and their states are one slice.
    """

    def __init__(self, cu_seqlens, H, C):
        device = cu_seqlens.device
        T = int(cu_seqlens[-1])
        starts = cu_seqlens[:-1]
        lengths = cu_seqlens.diff()
        n_chunks = (lengths + C - 1) // C  # of each document
        self.n_sequences = len(lengths)
        self.n_heads = H
        self.order = n_chunks.argsort(descending=True, stable=True)
        active = [int((n_chunks > n).sum()) for n in range(int(n_chunks.max()))]  # in step n
        self.sizes = [m * H for m in active]
        steps = torch.arange(len(active), device=device)
        step = steps.repeat_interleave(torch.tensor(active, device=device, dtype=torch.long))
        doc_id = self.order[:0]
        if active:
            doc_id = torch.cat([self.order[:m] for m in active])  # (R / H,)
        position = step[:, None] * C + torch.arange(C, device=device)  # (R / H, C) in the document
        is_padding = position >= lengths[doc_id][:, None]
        # Padding takes the token one past the end, which to_chunks fills with zeros.
        self.token = (starts[doc_id][:, None] + position).masked_fill(is_padding, T)
        self.flat_index = torch.empty(T + 1, dtype=torch.long, device=device)  # of each token
        self.flat_index[self.token.flatten()] = torch.arange(self.token.numel(), device=device)

    def to_chunks(self, x):
        """(1, H, T, width) -> (R, C, width)"""
        x = F.pad(x[0].transpose(0, 1), (0, 0, 0, 0, 0, 1))  # (T + 1, H, width)
        return x[self.token].transpose(1, 2).flatten(0, 1).contiguous()

    def from_chunks(self, x):
        """(R, C, width) -> (1, H, T, width)"""
        x = x.unflatten(0, (-1, self.n_heads)).transpose(1, 2).flatten(0, 1)  # (R/H * C, H, width)
        return x[self.flat_index[:-1]].transpose(0, 1)[None]

    def to_chunk_order(self, S):
        return S[self.order]

    def from_chunk_order(self, S):
        return S[self.order.argsort()]


def scale(x, factor):
    """x * factor, or x itself if factor is None: a product with ones would cost time."""
    return x if factor is None else x * factor


def chunk_slices(sizes):
    """[(the chunks of step n as a slice of all R, how many)] in order."""
    ends = itertools.accumulate(sizes)
    return [(slice(end - m, end), m) for end, m in zip(ends, sizes)]


def naive_chunks(q, k, v, beta, g, S, sizes):
    """ChunkwiseDeltaRule token by token: same arguments and results."""
    outputs = []
    q = q * math.sqrt(q.shape[-1])  # delta_rule_recurrent divides by it, and q is divided already
    if S is None:
        S = q.new_zeros(sizes[0] if sizes else 0, q.shape[-1], v.shape[-1])
    for chunks, m in chunk_slices(sizes):
        tokens = [x[chunks, None] for x in (q, k, v)]
        numbers = [None if x is None else x[chunks, None, :, 0] for x in (beta, g)]
        o, after = delta_rule_recurrent(*tokens, *numbers, S[:m, None])
        outputs.append(o[:, 0])
        S = torch.cat([after[:, 0], S[m:]])  # sequences that have ended keep their state
    return torch.cat(outputs) if outputs else torch.zeros_like(v), S


# The fast formula for the gradient of a log decay g is a difference of sums, whose terms are up to
# exp(-g) times larger than the result. Below this g, float32 would keep too few of its digits.
STRONG_DECAY = -8.0


def strong_decay_gradient(between, reads, writes, carried):
    """Gradients of the log decays (R, C, 1), by a formula without differences of large sums.

    The gradient of g_t adds up gradient times value of everything that decays across token t. It
    decays from a token j to a later i: between (R, C, C), [i, j]; from the chunk's start to i:
    reads (R, C, 1); from j to the chunk's end: writes (R, C, 1); or from start to end: carried
    (R,).
    """
    across = between.cumsum(2).flip(1).cumsum(1).flip(1)
    across = across.diagonal(-1, 1, 2)  # (R, C - 1): the sum over i >= t > j
    later = reads.flip(1).cumsum(1).flip(1)
    earlier = F.pad(writes.cumsum(1)[:, :-1], (0, 0, 1, 0))
    return F.pad(across, (1, 0))[..., None] + later + earlier + carried[:, None, None]


class ChunkwiseDeltaRule(Twinned):
    """The chunk form of the module's docstring, with its backward written out for speed.

    q, k (R, C, K), q scaled; v (R, C, V); beta (R, C, 1); g (R, C, 1), the log decays, or None;
    S (M, K, V), the states before the first chunks, or None for zeros; sizes: chunks in each step,
    at most M, never increasing. -> o (R, C, V) and the states after the last chunks. All of one
    dtype, float32 or float64. decay_in is exp(G_i), decay_out exp(G_C - G_j), decay_chunk exp(G_C).

    Without S, the state before the chunks of the first step is zero, so products with it are left
    out: `before` and W begin with chunk number `first`. In training this saves a quarter of the
    products with states if a sequence has four chunks, and nearly all if it has one.
    """

    twin = staticmethod(naive_chunks)

    @staticmethod
    def forward(ctx, q, k, v, beta, g, S, sizes):
        decay = decay_in = decay_out = decay_chunk = None
        if g is not None:
            # Sums over the tokens from j to i, not differences of two long sums, which would
            # cancel. Entries with j > i are not used.
            decay = g.expand(-1, -1, g.shape[1]).tril(-1).cumsum(1).exp()  # (R, C, C), [i, j]
            decay_in = g.cumsum(1).exp()  # (R, C, 1)
            decay_out = decay[:, -1:].mT  # (R, C, 1)
            decay_chunk = decay_in[:, -1:]  # (R, 1, 1)
        # For all chunks at once: everything without S.
        P = scale(torch.bmm(q, k.mT), decay).tril_()
        A = scale(torch.bmm(k, k.mT), decay).tril_(-1).mul_(beta)
        # unitriangular takes the diagonal of A as 1, so this is the inverse of I + A.
        eye = torch.eye(q.shape[1], dtype=q.dtype, device=q.device).expand_as(A)
        inverse = torch.linalg.solve_triangular(A, eye, upper=False, unitriangular=True)
        solve_beta = inverse * beta.mT  # (I + A)^-1 diag(beta)
        U = torch.bmm(solve_beta, v)
        first = sizes[0] if S is None and sizes else 0
        W = torch.bmm(solve_beta[first:], scale(k, decay_in)[first:])
        k_out = scale(k, decay_out)
        # The scan, one chunk of every sequence after another.
        state_size = q.shape[-1], v.shape[-1]
        before = q.new_empty(len(q) - first, *state_size)  # (R - first, K, V), before each chunk
        initial = S
        S = q.new_zeros(first, *state_size) if S is None else S.clone()
        for chunks, m in chunk_slices(sizes):
            if chunks.start >= first:
                reads = slice(chunks.start - first, chunks.stop - first)
                before[reads] = S[:m]
                U[chunks].baddbmm_(W[reads], S[:m], alpha=-1)
                if decay_chunk is not None:
                    S[:m] *= decay_chunk[chunks]
            S[:m].baddbmm_(k_out[chunks].mT, U[chunks])
        o = torch.bmm(P, U)
        o[first:].baddbmm_(scale(q, decay_in)[first:], before)
        decays = decay, decay_in, decay_out, decay_chunk
        ctx.save_for_backward(q, k, v, beta, g, initial, *decays, P, inverse, U, W, before)
        ctx.sizes, ctx.first = sizes, first
        ctx.set_materialize_grads(False)  # dS is None if nobody uses the last states
        return o, S

    @staticmethod
    def backward(ctx, do, dS):
        q, k, v, beta, g, initial, *computed = ctx.saved_tensors
        decay, decay_in, decay_out, decay_chunk, P, inverse, U, W, before = computed
        first = ctx.first
        n_states = first if initial is None else len(initial)

        def zero_states():
            return q.new_zeros(n_states, q.shape[-1], v.shape[-1])

        with no_autocast(q):
            do = torch.zeros_like(v) if do is None else do.contiguous()
            if needs_twin():
                inputs = q, k, v, beta, g, initial, ctx.sizes
                dS = zero_states() if dS is None else dS
                return twin_gradients(naive_chunks, ctx, inputs, do, dS)
            dS = dS if dS is None else dS.clone()
            # The scan backwards. A key has two uses: the write k_t u_t^T, whose gradient is dk, and
            # the read S_{t-1}^T k_t. In the read it is called r here, and its gradient is dr.
            dU = torch.bmm(P.mT, do)
            dk = torch.zeros_like(k)
            q_in = scale(q, decay_in)
            k_out = scale(k, decay_out)
            carried = q.new_zeros(len(q))
            for chunks, m in reversed(chunk_slices(ctx.sizes)):
                if dS is not None:
                    torch.bmm(U[chunks], dS[:m].mT, out=dk[chunks])
                    dU[chunks].baddbmm_(k_out[chunks], dS[:m])
                if chunks.start < first:
                    break
                reads = slice(chunks.start - first, chunks.stop - first)
                dS = zero_states() if dS is None else dS
                if decay_chunk is not None:
                    dS[:m] *= decay_chunk[chunks]
                    carried[chunks] = (before[reads] * dS[:m]).sum((1, 2))
                dS[:m].baddbmm_(q_in[chunks].mT, do[chunks])
                dS[:m].baddbmm_(W[reads].mT, dU[chunks], alpha=-1)
            # U solves (I + A) U = diag(beta) E with E = V - diag(exp(G)) K S.
            dE = torch.bmm(inverse.mT, dU)  # gradient of E, divided by beta
            dP = scale(torch.bmm(do, U.mT), decay).tril_()
            dA = scale(torch.bmm(dE, U.mT), decay).tril_(-1)  # gradient of -A, divided by beta
            # Gradients of q, and of -r divided by beta, through the states before their chunks; the
            # decay follows below.
            through_q = torch.bmm(do[first:], before.mT)
            through_r = torch.bmm(dE[first:], before.mT)
            late_decay = None if decay_in is None else decay_in[first:]
            dq = torch.bmm(dP, k)
            dq[first:] += scale(through_q, late_decay)
            dr = torch.bmm(dA, k)  # gradient of -r, divided by beta
            dr[first:] += scale(through_r, late_decay)
            dk = scale(dk, decay_out)
            is_strong = g is not None and bool((g < STRONG_DECAY).any())
            if is_strong:
                between = dP * torch.bmm(q, k.mT) - beta * dA * torch.bmm(k, k.mT)  # (R, C, C)
                from_q = (q[first:] * through_q).sum(-1, True)
                from_r = beta[first:] * (k[first:] * through_r).sum(-1, True)
                reads = torch.zeros_like(decay_in)  # (R, C, 1)
                reads[first:] = late_decay * (from_q - from_r)
                writes = (k * dk).sum(-1, True)  # (R, C, 1)
                dg_strong = strong_decay_gradient(between.tril(-1), reads, writes, carried)
            if g is not None:
                carried += (k * dk).sum((1, 2))
            dk.baddbmm_(dP.mT, q).baddbmm_((dA * beta).mT, k, alpha=-1)
            dbeta = ((v * dE).sum(-1) - (k * dr).sum(-1))[..., None]
            dr *= beta
            dg = None
            if g is not None:
                # Token i reads with a factor exp(G_i) and writes with exp(-G_i). The state after
                # the chunk has the factor exp(G_C). g_t is a term of every G_i with i >= t.
                dG = (q * dq).sum(-1) - (k * dr).sum(-1) - (k * dk).sum(-1)  # (R, C)
                dG[:, -1] += carried
                dg = dG.flip(1).cumsum(1).flip(1)[..., None]
            if is_strong:
                dg = torch.where(g < STRONG_DECAY, dg_strong, dg)
            dS = None if initial is None else dS
            return dq, dk.sub_(dr), dE.mul_(beta), dbeta, dg, dS, None


# ---- the rule on a GPU, and which of the three runs ----------------------------------------------


@functools.cache
def load_fla():
    """flash-linear-attention's two kernels, or why they cannot be imported, as text.

    An optional extra, CUDA only: pip install "fla-core[cuda]"
    """
    try:
        from fla.ops.delta_rule import chunk_delta_rule
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except Exception as e:  # without triton or a driver for it this fails in many ways
        return f"flash-linear-attention cannot be imported: {e}"
    return chunk_delta_rule, chunk_gated_delta_rule


@functools.cache
def why_no_decay_of_heads():
    """Why flash-linear-attention's kernels with one decay a head cannot train here, or None.

    If Triton 3.4 to 3.7.0 compiles their backward pass for a Hopper GPU (H100, H200), its results
    would be wrong, so the library refuses to run it (its issue 640).
    """
    from fla import utils

    is_wrong = (
        utils.IS_NVIDIA_HOPPER
        and utils.TRITON_ABOVE_3_4_0
        and not utils.TRITON_ABOVE_3_7_1
        and importlib.util.find_spec("tilelang") is None
    )
    if not is_wrong:
        return None
    need = "Triton 3.7.1 or the package tilelang"
    return f"flash-linear-attention's kernel of a decay a head needs {need} on a Hopper GPU"


def why_no_fla(device, dtype, key_width, decay_of_heads=False):
    """Why flash-linear-attention's kernel cannot be used here, as text, or None if it can."""
    if device.type != "cuda":
        return "flash-linear-attention runs on CUDA only"
    if dtype not in (torch.bfloat16, torch.float16):
        return "flash-linear-attention takes bfloat16 or float16 only"
    if key_width > 256:
        return "flash-linear-attention takes keys of a width up to 256"
    if isinstance(load_fla(), str):
        return load_fla()
    return why_no_decay_of_heads() if decay_of_heads else None


def delta_rule_fla(q, k, v, beta, log_decay=None, state=None, cu_seqlens=None):
    """delta_rule_recurrent through flash-linear-attention's Triton kernels.

    q, k and beta are rounded to v's dtype.
    """
    cu_seqlens = check_shapes(q, k, v, beta, log_decay, state, cu_seqlens)
    if cu_seqlens is not None and (cu_seqlens.diff() == 0).any():
        return without_empty(delta_rule_fla, q, k, v, beta, log_decay, state, cu_seqlens)
    plain, gated = load_fla()
    # the kernels' layout is (B, T, H, width); they scale by 1 / sqrt(K) themselves
    q, k, v, beta = (x.to(v.dtype).transpose(1, 2).contiguous() for x in (q, k, v, beta))
    options = dict(initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens)
    if log_decay is None:
        o, state = plain(q, k, v, beta, **options)
    else:
        o, state = gated(q, k, v, g=log_decay.transpose(1, 2).float(), beta=beta, **options)
    o = FirstOrder.apply(o, "flash-linear-attention")
    state = FirstOrder.apply(state, "flash-linear-attention")
    return o.transpose(1, 2), state


def without_empty(rule, q, k, v, beta, log_decay, state, cu_seqlens):
    """rule over the documents that are not empty; the others keep their state.

    A kernel may not know documents without tokens.
    """
    is_full = cu_seqlens.diff() > 0
    states = zero_state(q, v, len(is_full)) if state is None else state.to(accum_dtype(q))
    ends = cu_seqlens.unique_consecutive()
    o, after = rule(q, k, v, beta, log_decay, states[is_full], ends)
    return o, states.index_copy(0, is_full.nonzero().squeeze(1), after)


def delta_rule(q, k, v, beta, log_decay=None, state=None, cu_seqlens=None, chunk_size=16):
    """The fastest form for these inputs; arguments and results as in delta_rule_recurrent."""
    if q.shape[2] <= 1:
        return delta_rule_recurrent(q, k, v, beta, log_decay, state, cu_seqlens)
    problem = why_no_fla(v.device, v.dtype, k.shape[-1], log_decay is not None)
    if problem is None and not transformed():
        return delta_rule_fla(q, k, v, beta, log_decay, state, cu_seqlens)
    return delta_rule_chunkwise(q, k, v, beta, log_decay, state, cu_seqlens, chunk_size)


# ---- DeltaNet ------------------------------------------------------------------------------------


@dataclass
class Config(model.Config):
    q_kernel: str = "silu"  # feature map of queries: none relu relu2 elu1 silu exp softmax taylor
    k_kernel: str = "silu"  # feature map of keys, as for queries
    v_kernel: str = "silu"  # feature map of values, as for queries
    q_norm: str = "l2"  # norm of each query after its feature map: none l2 l1 rms layer
    k_norm: str = "l2"  # norm of each key; keys longer than 1 may make the state grow without bound
    conv_size: int = 4  # width of a short causal convolution on queries, keys and values; 0: none
    pos_emb: str = "none"  # no positions: the recurrence knows the order of its tokens
    use_beta: bool = True  # write strength sigmoid(z / lr_temp), z = W x; 0: a write strength of 1
    allow_neg_eigval: bool = False  # double the write strength, to (0, 2): the state can flip sign
    use_out_norm: bool = True  # RMSNorm of each head's output

    def unused(self):
        reasons = super().unused()
        if not self.use_beta:
            reasons |= dict.fromkeys(("lr_temp", "allow_neg_eigval"), "use_beta is 0")
        if not self.use_att:
            names = ("chunk_size", "lr_temp", "use_beta", "allow_neg_eigval", "use_out_norm")
            reasons |= dict.fromkeys(names, "use_att is 0")
        return reasons


class RecurrentLayer(CausalSelfAttention):
    """A memory of constant size in place of attention. Subclasses define `recall`.

    Queries, keys and values are made as in CausalSelfAttention. `recall` writes keys and values to
    the memory and reads it with the queries. What is read goes through

        RMSNorm per head -> output gate -> output projection.
    """

    attention_fn = None  # there are no attention weights to look at

    def make_out_norm(self, c):
        return RMSNorm(self.head_dims(c)[1]) if c.use_out_norm else None

    def forward(self, x, query_pos=None, cache=None, documents=None):
        """x (B, T, D) -> (B, T, D), or (B, n, D) at the positions query_pos (B, n).

        cache: {"seen": 0} before the first token, then also "state" (B, H, K, V) and "conv_state";
        of constant size, updated in place. documents (PackedDocuments) start from an empty state.
        """
        c = self.config
        # The recurrence needs every token, so query_pos are picked from its output.
        q, k, v = self.qkv(x, x, None, cache, documents)
        positions = token_positions(x, cache, documents)
        q = self.split_heads(q, self.n_heads, c.q_kernel, c.q_norm, self.gate_q, x)  # (B, T, H, K)
        if c.pos_emb == "rope":
            q = apply_rotary(q, self.rope, positions)
        k = self.keys(k, x, positions)  # (B, T, H, K)
        v = self.values(v)  # (B, T, H, V)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        state = cache.get("state") if cache else None
        cu_seqlens = documents.cu_seqlens if documents else None
        o, state = self.recall(x, q, k, v, state, cu_seqlens)  # (B, H, T, V)
        if cache is not None:
            cache["state"] = state
        o = gather_positions(o.transpose(1, 2).flatten(2), query_pos)  # (B, n, H*V)
        if self.out_norm:
            o = self.out_norm(o.unflatten(-1, (self.n_heads, -1))).flatten(2)
        if self.gate_out:
            z = self.gate_out(gather_positions(x, query_pos))
            o = o * ACTIVATIONS[c.att_output_gate_act](z)
        return self.out_proj(o)

    def log_decay(self, x):
        """g (B, H, T) or more, or None: no decay"""
        return None


class DeltaNetLayer(RecurrentLayer):
    """The delta rule in place of attention: the DeltaNet layer of arXiv 2406.06484.

    beta = sigmoid(W x / lr_temp) per head.
    """

    memory_name = "delta rule"
    why_no_fla = staticmethod(why_no_fla)

    def __init__(self, c):
        super().__init__(c)
        self.proj_beta = nn.Linear(c.dim, self.n_kv_heads, bias=False) if c.use_beta else None
        self.out_norm = self.make_out_norm(c)

    def recall(self, x, q, k, v, state, cu_seqlens):
        """-> o (B, H, T, V), what the queries read, and the state after the last token"""
        beta = self.beta(x).transpose(1, 2)  # (B, H, T)
        chunk_size = self.config.chunk_size
        return delta_rule(q, k, v, beta, self.log_decay(x), state, cu_seqlens, chunk_size)

    def beta(self, x):
        """Write strength of each key (B, T, H)"""
        c = self.config
        if not c.use_beta:
            return x.new_ones(*x.shape[:2], self.n_kv_heads)
        beta = torch.sigmoid(self.proj_beta(x) / c.lr_temp)
        return 2 * beta if c.allow_neg_eigval else beta

    @classmethod
    def describe_backend(cls, c, device, dtype):
        problem = cls.why_no_fla(device, dtype, cls.head_dims(c)[0])
        form = "flash-linear-attention, its own chunks"
        if problem:
            form = f"chunks of {c.chunk_size} tokens ({problem})"
        is_bounded = c.k_norm in ("l2", "l1") or (c.k_norm == "none" and c.k_kernel == "softmax")
        if is_bounded:
            return f"{cls.memory_name}, {form}"
        note = f"note: with k_norm={c.k_norm} long keys may make the state grow without bound"
        return f"{cls.memory_name}, {form}; {note}"


class GatedDeltaNetLayer(DeltaNetLayer):
    """DeltaNetLayer whose state decays by exp(-exp(A_log) softplus(W x + dt_bias)) per token.

    Each head has a decay of its own. Parametrisation and initial values are those of the paper's
    code, which takes them from Mamba-2. The paper's output gate is att_use_output_gate=1.
    """

    why_no_fla = staticmethod(functools.partial(why_no_fla, decay_of_heads=True))

    def __init__(self, c):
        super().__init__(c)
        self.proj_decay = nn.Linear(c.dim, c.n_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(c.n_heads).uniform_(0, 16).log())
        dt = torch.empty(c.n_heads).uniform_(math.log(1e-3), math.log(0.1)).exp()
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus(dt_bias) = dt

    def log_decay(self, x):
        z = self.proj_decay(x) + self.dt_bias
        rate = F.softplus(z.to(accum_dtype(z)))  # (B, T, H)
        return -(self.A_log.exp() * rate).transpose(1, 2)


class DeltaBlock(GPTBlock):
    mixer = DeltaNetLayer


class GatedDeltaBlock(GPTBlock):
    mixer = GatedDeltaNetLayer


class DeltaNet(GPT):
    """model.py's GPT with the delta rule in place of attention: its cache does not grow."""

    block = DeltaBlock
    inactive_settings = {
        "du": "only unified_kv has it",
        "n_kv_heads": "each head of the delta rule has keys and values of its own",
        "window": "the delta rule reads no tokens but a state",
        "pos_emb": "the recurrence knows the order of its tokens",
    }


class GatedDeltaNet(DeltaNet):
    """DeltaNet whose state decays: see GatedDeltaNetLayer."""

    block = GatedDeltaBlock


Model = DeltaNet  # what `--model delta` names
