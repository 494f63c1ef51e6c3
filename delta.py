"""The delta rule three ways (token by token, in chunks, a GPU kernel) and DeltaNet, a language model on model.py's trunk.

    python train.py configs/mqar_delta.py            # DeltaNet
    python train.py configs/mqar_gated_delta.py      # and its state decays

The memory of one head is a matrix S (K, V) that maps keys to values. Each token reads what S holds under its key, and
corrects it towards its value by the write strength beta in [0, 1] (Schlag et al. 2021, arXiv 2102.11174; Widrow and
Hoff's rule of 1960):

    u_t = beta_t (v_t - S_{t-1}^T k_t)        the error, times the write strength
    S_t = S_{t-1} + k_t u_t^T                 = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T
    o_t = S_t^T q_t / sqrt(K)

Storing a key again replaces its value (wholly if beta = 1 and |k| = 1), where linear attention would add the two. Gated
DeltaNet (Yang et al. 2024, arXiv 2412.06464) lets S decay first: S_{t-1} above becomes exp(g_t) S_{t-1}, with g_t <= 0 a
number per head. The recurrence is stable if beta_t |k_t|^2 <= 2, hence keys of length 1; beta in (1, 2) overshoots, which
gives the transition a negative eigenvalue and lets the state flip signs (Grazzi et al. 2024, arXiv 2411.12537).

Token by token this is T small steps one after another. In chunks of C tokens (Yang et al. 2024, arXiv 2406.06484: the WY
or UT form) nearly all of it is matrix products. Let S be the state before a chunk, G_i = g_1 + ... + g_i within the chunk
(0 without decay), and D_ij = exp(g_{j+1} + ... + g_i) for j <= i, the decay from j to i, else 0. Inserting one step into
the next,

    u_i + sum_{j<i} beta_i D_ij (k_i.k_j) u_j = beta_i (v_i - exp(G_i) S^T k_i)      for all i of the chunk, so with
    A = tril(diag(beta) K K^T * D, -1), P = tril(Q K^T * D)
    U = (I + A)^-1 diag(beta) V - (I + A)^-1 diag(beta exp(G)) K S =: U' - W S       errors of the chunk, (C, V)
    O = diag(exp(G)) Q S + P U
    S <- exp(G_C) S + (diag(exp(G_C - G)) K)^T U

Only the lines with S wait for the chunk before; the rest is done for all chunks at once. Cost per head and chunk, in
multiply-adds: C^2 (3 K + 2 V) + 3 C K V, and C^3 / 2 for the inverse, so linear in T. Solving with the triangular matrix
is safe where the product (I - A)(I + A^2)(I + A^4)... is not: for keys that resemble each other its factors overflow.

Letters: B batch, T tokens, H heads, K key width, V value width, C tokens in a chunk, M sequences times heads, R all their
chunks. In shapes of the model, D is the width of the residual stream; what is D above is `decay` in the code.
"""

import functools
import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import model
from model import ACTIVATIONS, GPT, CausalSelfAttention, GPTBlock, RMSNorm, accum_dtype, gather_positions
from nanorecall.ops import document_ends
from nanorecall.second_order import FirstOrder, Twinned, needs_twin, transformed, twin_gradients

# ---- the rule, token by token ------------------------------------------------------------------------------------------


def delta_rule_recurrent(q, k, v, beta, log_decay=None, state=None, cu_seqlens=None):
    """The recurrence as it is written: the oracle of the tests, and one step of decoding.

    q, k (B, H, T, K); v (B, H, T, V); beta (B, H, T); log_decay (B, H, T), at most 0, or None for no decay;
    state (B, H, K, V) before the first token, or None for zeros. -> o (B, H, T, V) in v's dtype, and the state after the
    last token. It computes in float32 or, if q is float64, in that.

    cu_seqlens (documents + 1,): rows of several documents end to end. Then B must be 1, document d is tokens
    cu_seqlens[d] to cu_seqlens[d + 1], each begins with its own state, and states are (documents, H, K, V).
    """
    cu_seqlens = check_shapes(q, k, v, beta, log_decay, state, cu_seqlens)
    if cu_seqlens is not None:
        return recurrent_varlen(q, k, v, beta, log_decay, state, cu_seqlens)
    kind = accum_dtype(q)
    S = zero_state(q, v) if state is None else state.to(kind)
    outputs = []
    for t in range(q.shape[2]):
        q_t, k_t, v_t, beta_t = (x[:, :, t].to(kind) for x in (q, k, v, beta))
        if log_decay is not None:
            S = S * log_decay[:, :, t, None, None].to(kind).exp()
        u_t = beta_t[..., None] * (v_t - (S * k_t[..., None]).sum(-2))  # (B, H, V)
        S = S + k_t[..., None] * u_t[..., None, :]
        outputs.append((S * q_t[..., None]).sum(-2) / math.sqrt(q.shape[-1]))
    return torch.stack(outputs, dim=2).to(v.dtype) if outputs else v, S


def recurrent_varlen(q, k, v, beta, log_decay, state, cu_seqlens):
    ends, results = cu_seqlens.tolist(), []
    for d, (start, end) in enumerate(zip(ends[:-1], ends[1:])):
        parts = [None if x is None else x[:, :, start:end] for x in (q, k, v, beta, log_decay)]
        before = zero_state(q, v) if state is None else state[d : d + 1]
        results.append(delta_rule_recurrent(*parts, before))
    o, states = zip(*results)
    return torch.cat(o, dim=2), torch.cat(states)


def zero_state(q, v, n=None):
    """Zeros (n or B, H, K, V)."""
    return q.new_zeros(n or len(q), q.shape[1], q.shape[-1], v.shape[-1], dtype=accum_dtype(q))


def check_shapes(q, k, v, beta, log_decay, state, cu_seqlens):
    """cu_seqlens as document_ends gives them; ValueError in one sentence if shapes do not fit."""
    B, H, T, K = q.shape
    sequences = B
    expected = {"k": (k, (B, H, T, K)), "v": (v, (B, H, T, v.shape[-1])), "beta": (beta, (B, H, T))}
    if cu_seqlens is not None:
        cu_seqlens = document_ends(cu_seqlens, B, T, q.device)
        sequences = len(cu_seqlens) - 1
    expected |= {"log_decay": (log_decay, (B, H, T)), "state": (state, (sequences, H, K, v.shape[-1]))}
    for name, (x, shape) in expected.items():
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} must have shape {shape} beside q of {tuple(q.shape)}, not {tuple(x.shape)}")
    return cu_seqlens


# ---- the rule, in chunks -----------------------------------------------------------------------------------------------


@torch._disable_dynamo  # traced, the scan would be unrolled into a copy for each chunk
def delta_rule_chunkwise(q, k, v, beta, log_decay=None, state=None, cu_seqlens=None, chunk_size=16):
    """delta_loop by matrix products over chunks of chunk_size tokens: same arguments, same results, any T.

    Best on a CPU: 16 tokens for short rows and narrow heads, 32 for T >= 1024 or K = 64.
    """
    cu_seqlens = check_shapes(q, k, v, beta, log_decay, state, cu_seqlens)
    chunk_size = max(1, min(chunk_size, q.shape[2]))
    if cu_seqlens is None:
        chunks = BatchChunks(*q.shape[:3], chunk_size)
    else:
        chunks = DocumentChunks(cu_seqlens, q.shape[1], chunk_size)
    kind = accum_dtype(q)
    with torch.autocast(q.device.type, enabled=False):  # a triangular solve has no half precision
        S = zero_state(q, v, chunks.sequences) if state is None else state.to(kind)
        g = None if log_decay is None else chunks.cut(log_decay[..., None].to(kind))
        scaled = q.to(kind) / math.sqrt(q.shape[-1])
        parts = [chunks.cut(x.to(kind)) for x in (scaled, k, v, beta[..., None])]
        o, S = ChunkedDeltaRule.apply(*parts, g, chunks.sort(S).flatten(0, 1), chunks.sizes)
        return chunks.join(o).to(v.dtype), chunks.unsort(S.unflatten(0, (-1, q.shape[1])))


class BatchChunks:
    """How B rows of T tokens are cut into chunks: all rows' first chunks, then all second ones, and so on.

    So a step of the scan finds its chunks side by side in memory: sizes[n] of them in step n, each (C, width). Rows are
    padded at the end with zeros, which change neither outputs nor state: a key of zeros writes nothing.
    """

    def __init__(self, B, H, T, C):
        self.sequences, self.heads, self.tokens, self.chunk = B, H, T, C
        self.steps = -(-T // C)
        self.sizes = [B * H] * self.steps

    def cut(self, x):
        """(B, H, T, width) -> (R, C, width)"""
        missing = self.steps * self.chunk - self.tokens
        x = F.pad(x, (0, 0, 0, missing)) if missing else x
        return x.unflatten(2, (self.steps, self.chunk)).permute(2, 0, 1, 3, 4).flatten(0, 2).contiguous()

    def join(self, x):
        """(R, C, width) -> (B, H, T, width)"""
        x = x.unflatten(0, (self.steps, self.sequences, self.heads)).permute(1, 2, 0, 3, 4)
        return x.flatten(2, 3)[:, :, : self.tokens]

    def sort(self, S):
        return S

    def unsort(self, S):
        return S


class DocumentChunks:
    """As BatchChunks, for documents end to end in one row. Each is cut on its own, the one with the most chunks comes
    first, so those that still go on in step n are the first sizes[n] / H ones."""

    def __init__(self, cu_seqlens, H, C):
        device, starts, lengths = cu_seqlens.device, cu_seqlens[:-1], cu_seqlens.diff()
        counts = (lengths + C - 1) // C  # chunks of each document
        self.sequences, self.heads = len(lengths), H
        self.order = counts.argsort(descending=True, stable=True)
        active = [int((counts > n).sum()) for n in range(int(counts.max()))]  # documents in step n
        self.sizes = [m * H for m in active]
        step = torch.repeat_interleave(
            torch.arange(len(active), device=device), torch.tensor(active, device=device, dtype=torch.long)
        )
        which = torch.cat([self.order[:m] for m in active]) if active else self.order[:0]  # (R / H,) document of each chunk
        inside = step[:, None] * C + torch.arange(C, device=device)  # (R / H, C) position in its document
        padding = inside >= lengths[which][:, None]
        self.token = (starts[which][:, None] + inside).masked_fill(padding, int(cu_seqlens[-1]))  # one past the end: zeros
        self.place = torch.empty(int(cu_seqlens[-1]) + 1, dtype=torch.long, device=device)  # token -> where cut puts it
        self.place[self.token.flatten()] = torch.arange(self.token.numel(), device=device)

    def cut(self, x):
        """(1, H, T, width) -> (R, C, width)"""
        x = F.pad(x[0].transpose(0, 1), (0, 0, 0, 0, 0, 1))  # (T + 1, H, width)
        return x[self.token].transpose(1, 2).flatten(0, 1).contiguous()

    def join(self, x):
        """(R, C, width) -> (1, H, T, width)"""
        x = x.unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(0, 1)  # (R / H * C, H, width)
        return x[self.place[:-1]].transpose(0, 1)[None]

    def sort(self, S):
        return S[self.order]

    def unsort(self, S):
        return S[self.order.argsort()]


def scale(x, scale):
    """x * scale, where None stands for 1: without decay nothing is multiplied."""
    return x if scale is None else x * scale


def chunk_slices(sizes):
    """[(the chunks of step n as a slice of all R, how many)] in order."""
    ends = list(itertools.accumulate(sizes))
    return [(slice(end - m, end), m) for end, m in zip(ends, sizes)]


def naive_chunks(q, k, v, beta, g, S, sizes):
    """ChunkedDeltaRule token by token; q is scaled already."""
    outputs = []
    for rows, m in chunk_slices(sizes):
        parts = (x[rows, None] for x in (q * math.sqrt(q.shape[-1]), k, v))
        strengths = (None if x is None else x[rows, None, :, 0] for x in (beta, g))
        o, after = delta_rule_recurrent(*parts, *strengths, S[:m, None])
        outputs.append(o[:, 0])
        S = torch.cat([after[:, 0], S[m:]])
    return torch.cat(outputs) if outputs else torch.zeros_like(v), S


# Below this log decay, a fast sum of its gradient cancels terms 1 / exp(decay) times larger.
STRONG_DECAY = -8.0


def decay_gradient(between, reads, writes, through):
    """Gradients of the log decays (R, C, 1), each a sum of terms with exp(g_t) as a factor.

    Gradient times value of what decays from an earlier token j to i: between (R, C, C), [i, j];
    from the chunk's start to i: reads (R, C, 1); from j to its end: writes (R, C, 1); from its
    start to its end: through (R,).
    """
    across = between.cumsum(2).flip(1).cumsum(1).flip(1)
    across = across.diagonal(-1, 1, 2)  # (R, C - 1): the sum over i >= t > j
    later = reads.flip(1).cumsum(1).flip(1)
    earlier = F.pad(writes.cumsum(1)[:, :-1], (0, 0, 1, 0))
    return F.pad(across, (1, 0))[..., None] + later + earlier + through[:, None, None]


class ChunkedDeltaRule(Twinned):
    """The chunk form of the module's docstring, with its backward written out for speed.

    q, k (R, C, K); v (R, C, V); beta (R, C, 1); g (R, C, 1), the log decays, or None; S (M, K, V), the states before the
    first chunks; sizes: chunks in each step, at most M, never rising. -> o (R, C, V) and the states after the last
    chunks. All of one dtype, float32 or float64.
    """

    twin = staticmethod(naive_chunks)

    @staticmethod
    def forward(ctx, q, k, v, beta, g, S, sizes):
        decay = since_start = to_end = whole = None
        if g is not None:
            # Sums over the tokens between j and i, not differences of two long sums, which would cancel.
            decay = g.expand(-1, -1, g.shape[1]).tril(-1).cumsum(1).exp()  # (R, C, C), [i, j]; only j <= i has a meaning
            since_start, to_end = g.cumsum(1).exp(), decay[:, -1:].mT  # (R, C, 1): exp(G_i) and exp(G_C - G_j)
            whole = since_start[:, -1:]  # (R, 1, 1)
        P = scale(torch.bmm(q, k.mT), decay).tril_()
        A = scale(torch.bmm(k, k.mT), decay).tril_(-1).mul_(beta)
        eye = torch.eye(q.shape[1], dtype=q.dtype, device=q.device).expand_as(A)
        inverse = torch.linalg.solve_triangular(A, eye, upper=False, unitriangular=True)  # (I + A)^-1
        solve_beta = inverse * beta.mT  # (I + A)^-1 diag(beta)
        U, W = torch.bmm(solve_beta, v), torch.bmm(solve_beta, scale(k, since_start))
        k_out = scale(k, to_end)
        before = q.new_empty(len(q), *S.shape[1:])  # (R, K, V), the state before each chunk
        initial, S = S, S.clone()
        for rows, m in chunk_slices(sizes):
            before[rows] = S[:m]
            U[rows].baddbmm_(W[rows], S[:m], alpha=-1)
            if whole is not None:
                S[:m] *= whole[rows]
            S[:m].baddbmm_(k_out[rows].mT, U[rows])
        o = torch.bmm(scale(q, since_start), before).baddbmm_(P, U)
        made = decay, since_start, to_end, whole, P, inverse, U, W, before
        ctx.save_for_backward(q, k, v, beta, g, initial, *made)
        ctx.sizes = sizes
        return o, S

    @staticmethod
    def backward(ctx, do, dS):
        inputs, made = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
        q, k, v, beta, g, _ = inputs
        decay, since_start, to_end, whole, P, inverse, U, W, before = made
        with torch.autocast(q.device.type, enabled=False):
            if needs_twin():
                return twin_gradients(naive_chunks, ctx, (*inputs, ctx.sizes), do, dS)
            do, dS = do.contiguous(), dS.clone()
            # The scan backwards. Keys have two parts to play: as `k` they are written, as `r` they read the state and the
            # keys before them; dk collects the first, dr the second.
            dU, dk = torch.bmm(P.mT, do), torch.empty_like(k)
            q_in, k_out, carried = scale(q, since_start), scale(k, to_end), q.new_empty(len(q))
            for rows, m in reversed(chunk_slices(ctx.sizes)):
                torch.bmm(U[rows], dS[:m].mT, out=dk[rows])
                dU[rows].baddbmm_(k_out[rows], dS[:m])
                if whole is not None:
                    dS[:m] *= whole[rows]
                    carried[rows] = (before[rows] * dS[:m]).sum((1, 2))
                dS[:m].baddbmm_(q_in[rows].mT, do[rows]).baddbmm_(W[rows].mT, dU[rows], alpha=-1)
            # U solves (I + A) U = diag(beta) E with E = V - diag(exp(G)) K S.
            dE = torch.bmm(inverse.mT, dU)  # of E, over beta
            dP = scale(torch.bmm(do, U.mT), decay).tril_()
            dA = scale(torch.bmm(dE, U.mT), decay).tril_(-1)  # of -A, over beta
            dq = scale(torch.bmm(do, before.mT), since_start).baddbmm_(dP, k)
            dr = scale(torch.bmm(dE, before.mT), since_start).baddbmm_(dA, k)  # of -r, over beta
            dk = scale(dk, to_end)
            strong = whole is not None and bool((g < STRONG_DECAY).any())
            if strong:
                between = dP * torch.bmm(q, k.mT) - beta * dA * torch.bmm(k, k.mT)  # (R, C, C)
                from_q = (q * torch.bmm(do, before.mT)).sum(-1, True)
                from_k = (k * torch.bmm(dE, before.mT)).sum(-1, True)
                reads = since_start * (from_q - beta * from_k)  # (R, C, 1)
                dg_strong = decay_gradient(between.tril(-1), reads, (k * dk).sum(-1, True), carried)
            if whole is not None:
                carried += (k * dk).sum((1, 2))
            dk.baddbmm_(dP.mT, q).baddbmm_((dA * beta).mT, k, alpha=-1)
            dbeta = ((v * dE).sum(-1) - (k * dr).sum(-1))[..., None]
            dr *= beta
            dg = None
            if whole is not None:
                # What reads at i carries exp(G_i), what is written at j exp(-G_j), the state at the end exp(G_C); g_t is
                # in all G_i from t on.
                dG = (q * dq).sum(-1) - (k * dr).sum(-1) - (k * dk).sum(-1)  # (R, C)
                dG[:, -1] += carried
                dg = dG.flip(1).cumsum(1).flip(1)[..., None]
            if strong:
                dg = torch.where(g < STRONG_DECAY, dg_strong, dg)
            return dq, dk.sub_(dr), dE.mul_(beta), dbeta, dg, dS, None


# ---- the rule on a GPU, and which of the three runs ----------------------------------------------------------------------


@functools.cache
def load_fla():
    """flash-linear-attention's two kernels (an optional extra, CUDA only: pip install "fla-core[cuda]"), or why not."""
    try:
        from fla.ops.delta_rule import chunk_delta_rule
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except Exception as e:  # without triton or a driver for it this fails in many ways
        return f"flash-linear-attention cannot be imported: {e}"
    return chunk_delta_rule, chunk_gated_delta_rule


def why_no_fla(device, dtype, key_width):
    """Why flash-linear-attention's kernel cannot be used here, as text, or None if it can."""
    if device.type != "cuda":
        return "flash-linear-attention runs on CUDA only"
    if dtype not in (torch.bfloat16, torch.float16):
        return "flash-linear-attention takes bfloat16 or float16 only"
    if key_width > 256:
        return "flash-linear-attention takes keys of a width up to 256"
    return load_fla() if isinstance(load_fla(), str) else None


def delta_rule_fla(q, k, v, beta, log_decay=None, state=None, cu_seqlens=None):
    """delta_loop through flash-linear-attention's Triton kernels; q, k and beta are rounded to v's dtype."""
    cu_seqlens = check_shapes(q, k, v, beta, log_decay, state, cu_seqlens)
    if cu_seqlens is not None and (cu_seqlens.diff() == 0).any():
        return without_empty(delta_rule_fla, q, k, v, beta, log_decay, state, cu_seqlens)
    plain, gated = load_fla()
    q, k, v, beta = (x.transpose(1, 2).contiguous() for x in (q.to(v.dtype), k.to(v.dtype), v, beta.to(v.dtype)))
    options = dict(initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens)  # the kernels scale by 1 / sqrt(K)
    if log_decay is None:
        o, state = plain(q, k, v, beta, **options)
    else:
        o, state = gated(q, k, v, g=log_decay.transpose(1, 2).float(), beta=beta, **options)
    o, state = (FirstOrder.apply(x, "flash-linear-attention") for x in (o, state))
    return o.transpose(1, 2), state


def without_empty(rule, q, k, v, beta, log_decay, state, cu_seqlens):
    """rule over documents of which some are empty, for a kernel that may not know such.

    They keep their state.
    """
    full = cu_seqlens.diff() > 0
    states = zero_state(q, v, len(full)) if state is None else state.to(accum_dtype(q))
    o, after = rule(q, k, v, beta, log_decay, states[full], cu_seqlens.unique_consecutive())
    return o, states.index_copy(0, full.nonzero().squeeze(1), after)


def delta_rule(q, k, v, beta, log_decay=None, state=None, cu_seqlens=None, chunk_size=16):
    """The fastest form for these inputs; arguments and results as in delta_loop."""
    if q.shape[2] <= 1:
        return delta_rule_recurrent(q, k, v, beta, log_decay, state, cu_seqlens)
    if why_no_fla(v.device, v.dtype, k.shape[-1]) is None and not transformed():
        return delta_rule_fla(q, k, v, beta, log_decay, state, cu_seqlens)
    return delta_rule_chunkwise(q, k, v, beta, log_decay, state, cu_seqlens, chunk_size)


# ---- DeltaNet ------------------------------------------------------------------------------------------------------------


@dataclass
class Config(model.Config):
    q_kernel: str = "silu"  # feature map of queries: none relu relu2 elu1 silu exp softmax taylor
    k_kernel: str = "silu"  # feature map of keys, as for queries
    v_kernel: str = "silu"  # feature map of values, as for queries
    q_norm: str = "l2"  # norm of each query after its feature map: none l2 l1 rms layer
    k_norm: str = "l2"  # norm of each key, as for queries; keys longer than 1 may make the state grow without bound
    conv: int = 4  # width of a short causal convolution on queries, keys and values; 0: none
    pos: str = "none"  # the recurrence knows the order; nothing is added
    use_beta: bool = True  # write with strength sigmoid(z / lr_temp), z a projection of the token; 0: with strength 1
    allow_neg_eigval: bool = False  # twice that strength, in (0, 2)
    use_out_norm: bool = True  # RMSNorm of each head's output

    def unused(self):
        reasons = super().unused()
        if not self.use_beta:
            reasons |= dict.fromkeys(("lr_temp", "allow_neg_eigval"), "use_beta is 0")
        if not self.use_att:
            reasons |= dict.fromkeys(("chunk_size", "lr_temp", "use_beta", "allow_neg_eigval", "use_out_norm"), "use_att is 0")
        return reasons


class DeltaNetLayer(CausalSelfAttention):
    """The delta rule in attention's place (the DeltaNet layer of arXiv 2406.06484). Queries, keys and values go

        projection -> short convolution -> heads -> feature map -> norm -> gate

    as in CausalSelfAttention, beta = sigmoid(W x / lr_temp) per head, and the output goes

        delta rule -> RMSNorm per head -> output gate -> last projection.
    """

    attend = None  # there are no attention weights to look at

    def __init__(self, c):
        super().__init__(c)
        self.proj_beta = nn.Linear(c.dim, c.n_heads, bias=False) if c.use_beta else None
        self.out_norm = RMSNorm(self.widths(c)[1]) if c.use_out_norm else None

    @classmethod
    def state_size(cls, c, tokens):
        """Numbers per row that must be kept to read on: one matrix per head, after any number of tokens."""
        key_width, value_width = cls.widths(c)
        return c.n_heads * key_width * value_width

    @classmethod
    def describe_backend(cls, c, device, dtype):
        """Which form of the delta rule runs and why, as one line."""
        problem = why_no_fla(device, dtype, cls.widths(c)[0])
        choice = f"chunks of {c.chunk_size} tokens ({problem})" if problem else "flash-linear-attention, its own chunks"
        bounded = c.k_norm in ("l2", "l1") or (c.k_norm == "none" and c.k_kernel == "softmax")
        note = "" if bounded else f"; note: with k_norm={c.k_norm} long keys may make the state grow without bound"
        return f"delta rule, {choice}{note}"

    def forward(self, x, rows=None, cache=None, documents=None):
        """x (B, T, D) -> (B, T, D), or (B, n, D) at the positions rows (B, n): the recurrence still needs every token.

        cache: {"seen": 0} before the first token, then what was left there by earlier calls, of constant size: "S"
        (B, H, K, V) and "window", what the convolution looks back on. It is brought up to date in place.
        documents (attention.Documents): each begins with an empty state.
        """
        c = self.config
        q, k, v = self.queries_keys_values(x, x, None, cache, documents)
        q = self.feature(q, self.heads, c.q_kernel, c.q_norm, self.gate_q, x)  # (B, T, H, K)
        k = self.feature(k, self.heads, c.k_kernel, c.k_norm, self.gate_k, x)  # (B, T, H, K)
        v = self.feature(v, self.heads, c.v_kernel).to(v.dtype)  # (B, T, H, V)
        q, k, v, beta = (y.transpose(1, 2) for y in (q, k, v, self.beta(x)))
        state = cache.get("S") if cache else None
        ends = documents.ends if documents else None
        o, state = delta_rule(q, k, v, beta, self.log_decay(x), state, ends, c.chunk_size)  # (B, H, T, V)
        if cache is not None:
            cache["S"] = state
        o = gather_positions(o.transpose(1, 2).flatten(2), rows)  # (B, n, H*V)
        if self.out_norm:
            o = self.out_norm(o.unflatten(-1, (self.heads, -1))).flatten(2)
        if self.gate_out:
            o = o * ACTIVATIONS[c.att_output_gate_act](self.gate_out(gather_positions(x, rows)))
        return self.out_proj(o)

    def beta(self, x):
        """beta (B, T, H)"""
        c = self.config
        if not c.use_beta:
            return x.new_ones(*x.shape[:2], self.heads)
        beta = torch.sigmoid(self.proj_beta(x) / c.lr_temp)
        return 2 * beta if c.allow_neg_eigval else beta

    def log_decay(self, x):
        """g (B, H, T), or None: no decay"""
        return None


class GatedDeltaNetLayer(DeltaNetLayer):
    """DeltaMixer whose state decays by alpha = exp(-exp(A_log) softplus(W x + dt_bias)) per head before each token, the
    parametrisation and initial values of Gated DeltaNet. The paper's output gate is att_use_output_gate=1."""

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
    attention = DeltaNetLayer


class GatedDeltaBlock(GPTBlock):
    attention = GatedDeltaNetLayer


class DeltaNet(GPT):
    """The trunk of model.py with the delta rule in place of attention. What `read` keeps does not grow (inference_state_bytes)."""

    block = DeltaBlock
    inactive_settings = {
        "du": "only unified_kv has it",
        "n_kv_heads": "each head of the delta rule has keys and values of its own",
        "pos": "the recurrence knows the order of its tokens",
    }


class GatedDeltaNet(DeltaNet):
    """DeltaNet whose state decays: see GatedDeltaMixer."""

    block = GatedDeltaBlock


Model = DeltaNet  # what `--model delta` names
