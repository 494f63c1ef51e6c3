"""Additive memories (linear attention, RetNet, Mamba-2, GLA) and MesaNet, on model.py.

    python train.py configs/mqar_linear.py    # linear attention: nothing decays
    python train.py configs/mqar_mamba2.py    # --model retnet, mamba2, gla: the state decays
    python train.py configs/mqar_mesa.py      # MesaNet: least squares

The memory of one head is a matrix S (K, V) that maps keys to values, as in delta.py. Each token
adds its value under its key, whatever S already holds there:

    S_t = exp(g_t) S_{t-1} + k_t v_t^T
    o_t = S_t^T q_t / sqrt(K)

    linear    g = 0              Katharopoulos et al. 2020, arXiv 2006.16236
    retnet    g of head h is log(1 - 2^(-5-h))              Sun et al. 2023, arXiv 2307.08621
    mamba2    g_t = -exp(A_log) dt_t, and v_t times dt_t    Dao and Gu 2024, arXiv 2405.21060
    gla       g_t = log(sigmoid(W x_t)) / 16, a number for each of the K rows of S
                                                            Yang et al. 2023, arXiv 2312.06635

In chunks of C tokens (RetNet's chunkwise form, Mamba-2's SSD) this is matrix products. Here Q, K
and V have a row for each token of a chunk, Q is divided by sqrt(K), and * is elementwise. Let S be
the state before the chunk, G_i = g_1 + ... + g_i within the chunk, and D_ij = exp(g_{j+1} + ... +
g_i) for j <= i, the decay from j to i, else 0. Then

    O = diag(exp(G)) Q S + (Q K^T * D) V
    S <- exp(G_C) S + (diag(exp(G_C - G)) K)^T V

With a decay for each row of S, the score of tokens i and j is a sum over the K rows of q_i k_j
exp(G_i - G_j). As the product of q exp(G) and k exp(-G) it would overflow. So a chunk is cut in two
halves, and these again. Let m be the middle. The scores of the second half with the first are
products of q exp(G_i - G_m) and k exp(G_m - G_j), and neither exponent is above 0. Gradients are
autograd's.

MesaNet (von Oswald et al. 2025, arXiv 2506.05233) has the state of linear attention and one more,

    Z_t = Z_{t-1} + beta_t k_t k_t^T                        beta_t in [0, 1], a write strength
    S_t = S_{t-1} + beta_t k_t v_t^T
    o_t = S_t^T x_t  with  x_t = (Z_t + L)^-1 q_t           L > 0 diagonal, learned

so it reads with the matrix W = (Z_t + L)^-1 S_t that minimises sum_j beta_j |v_j - W^T k_j|^2 +
tr(W^T L W): ridge regression on all pairs so far. The delta rule takes one gradient step per token
instead, on that token's pair alone. Unlike there, the order of the pairs makes no difference. In a
chunk, with keys times sqrt(beta) as rows of K and M = (Z + L)^-1 of the state before it, the matrix
inversion lemma for the first i tokens is

    x_i = M q_i - M K_i^T (I + K_i M K_i^T)^-1 K_i M q_i    K_i: the first i rows of K

Let F be the Cholesky factor of I + K M K^T. The factor for the first i tokens is the upper left
corner of F, so one F serves all tokens: of F^-1 K M q_i the first i numbers are kept, the others
set to 0, and F^-T is applied to that. So one (K, K) matrix is factored per chunk, not per token. No
eigenvalue of I + K M K^T is below 1, and none of Z + L below the smallest of L, so both factors
exist. In the paper Z decays, too, while L does not. Then F serves one token only, and each token
needs a system of its own (the paper uses conjugate gradients), so decay is left out here.

Letters: B batch, T tokens, H heads, K key width, V value width, C tokens in a chunk, M sequences
x heads, R chunks of all M; W is 1 or K, the width of a decay. In shapes of the model, D is the
width of the residual stream.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import model
from delta import (
    BatchChunks,
    DocumentChunks,
    RecurrentLayer,
    check_shapes,
    recurrent_varlen,
    scale,
    why_no_decay_of_heads,
    zero_state,
)
from model import GPT, GPTBlock
from nanorecall.ops import accum_dtype, no_autocast
from nanorecall.second_order import FirstOrder, transformed

# ---- the additive memory -------------------------------------------------------------------------


def additive_recurrent(q, k, v, log_decay=None, state=None, cu_seqlens=None):
    """The recurrence as it is written: the tests' oracle, and one step of decoding.

    q, k (B, H, T, K); v (B, H, T, V); log_decay, at most 0: (B, H, T, 1) for a head, (B, H, T, K)
    for each row of the state, or None for no decay; state (B, H, K, V) before the first token, or
    None for zeros. -> o (B, H, T, V) in v's dtype, and the state after the last token, which is
    float32 (float64 if q is).

    With cu_seqlens (documents + 1,), B is 1, document d is tokens cu_seqlens[d] to
    cu_seqlens[d + 1] and starts from a state of its own; states are (documents, H, K, V).
    ValueError if shapes do not fit.
    """
    cu_seqlens, S = check_inputs(q, k, v, log_decay, state, cu_seqlens)
    if cu_seqlens is not None:
        return recurrent_varlen(additive_recurrent, [q, k, v, log_decay], S, cu_seqlens)
    dtype = accum_dtype(q)
    outputs = []
    for t in range(q.shape[2]):
        q_t, k_t, v_t = (x[:, :, t].to(dtype) for x in (q, k, v))
        if log_decay is not None:
            S = S * log_decay[:, :, t, :, None].to(dtype).exp()
        S = S + k_t[..., None] * v_t[..., None, :]
        outputs.append((S * q_t[..., None]).sum(-2) / math.sqrt(q.shape[-1]))
    if not outputs:
        return v, S
    return torch.stack(outputs, dim=2).to(v.dtype), S


def check_inputs(q, k, v, log_decay, state, cu_seqlens, beta=None):
    """-> cu_seqlens as int64, or None, and the state, zeros if None; ValueError as above."""
    cu_seqlens = check_shapes(q, k, v, beta, None, state, cu_seqlens)
    shapes = (*q.shape[:3], 1), q.shape
    if log_decay is not None and log_decay.shape not in shapes:
        what = f"log_decay must have shape {shapes[0]} or {tuple(q.shape)}"
        raise ValueError(f"{what}, not {tuple(log_decay.shape)}")
    if state is None:
        n_states = len(q) if cu_seqlens is None else len(cu_seqlens) - 1
        return cu_seqlens, zero_state(q, v, n_states)
    return cu_seqlens, state.to(accum_dtype(q))


@torch._disable_dynamo  # traced, the scan would be unrolled into a copy for each chunk
def additive_chunkwise(q, k, v, log_decay=None, state=None, cu_seqlens=None, chunk_size=16):
    """additive_recurrent by matrix products over chunks: same arguments and results, any T.

    Best on a CPU: 32 or 64 tokens. With a decay for each row of the state, a power of two.
    """
    cu_seqlens, S = check_inputs(q, k, v, log_decay, state, cu_seqlens)
    if q.shape[2] == 0:
        return v, S
    return in_chunks(additive_chunks, [q, k, v, log_decay], S, cu_seqlens, chunk_size)


def in_chunks(form, tokens, state, cu_seqlens, chunk_size):
    """Cut tokens, q, k, v (B, H, T, width) and others or None, and put the results together.

    form(*chunks of each token input, states (M, K, V), sizes) -> o (R, C, V), states (M, K, V);
    sizes as in BatchChunks.
    """
    q, _, v, *_ = tokens
    chunk_size = min(chunk_size, q.shape[2])
    if cu_seqlens is None:
        chunks = BatchChunks(*q.shape[:3], chunk_size)
    else:
        chunks = DocumentChunks(cu_seqlens, q.shape[1], chunk_size)
    dtype = accum_dtype(q)
    with no_autocast(q):  # sums over many tokens, in bfloat16, would lose the small ones
        inputs = [None if x is None else chunks.to_chunks(x.to(dtype)) for x in tokens]
        S = chunks.to_chunk_order(state).flatten(0, 1)
        o, S = form(*inputs, S, chunks.sizes)
        S = chunks.from_chunk_order(S.unflatten(0, (-1, q.shape[1])))
        return chunks.from_chunks(o).to(v.dtype), S


def additive_chunks(q, k, v, g, S, sizes):
    """The chunk form of the docstring above: q, k (R, C, K), v (R, C, V), g (R, C, W) or None.

    S (M, K, V), the states before the first chunks. -> o (R, C, V), the states after the last.
    """
    q = q / math.sqrt(q.shape[-1])
    decay_in = decay_out = decay_chunk = None
    if g is None:
        scores = (q @ k.mT).tril()
    else:
        decay_in = g.cumsum(1).exp()  # (R, C, W): exp(G_i)
        decay_out = decay_to_end(g)  # (R, C, W): exp(G_C - G_j)
        decay_chunk = decay_in[:, -1, :, None]  # (R, W, 1): exp(G_C)
        score = scores_of_heads if g.shape[-1] == 1 else scores_of_rows
        scores = score(q, k, g)
    before, S = scan_chunks(scale(k, decay_out).mT @ v, decay_chunk, S, sizes)
    return scores @ v + scale(q, decay_in) @ before, S


def decay_to_end(g):
    """g (R, C, W) -> (R, C, W): exp(g_{j+1} + ... + g_C) at j."""
    return F.pad(g[:, 1:], (0, 0, 0, 1)).flip(1).cumsum(1).flip(1).exp()


def decay_between(g):
    """g (R, C, W) -> (R, C, C, W): exp(g_{j+1} + ... + g_i) at [i, j], for j <= i."""
    # Sums over the tokens from j to i, not differences of two long sums, which would cancel.
    C = g.shape[1]
    is_after = torch.ones(C, C, dtype=torch.bool, device=g.device).tril(-1)  # token i after j
    return g[:, :, None].where(is_after[..., None], 0).cumsum(1).exp()


def scores_of_heads(q, k, g):
    """Decayed scores with one decay for a head: g (R, C, 1) -> (R, C, C), 0 for j > i."""
    return (q @ k.mT * decay_between(g)[..., 0]).tril()


def scores_of_rows(q, k, g):
    """Decayed scores with a decay for each row of the state: g (R, C, K) -> (R, C, C).

    q may be several (n, R, C, K) that share k and g -> (n, R, C, C).
    """
    R, C, K = k.shape
    if C == 1:
        return (q * k).sum(-1, keepdim=True)
    if C % 2:
        return (q[..., None, :] * k[:, None] * decay_between(g)).sum(-1).tril()
    half = C // 2
    q_halves = q.reshape(*q.shape[:-3], 2 * R, half, K)
    within = scores_of_rows(q_halves, *(x.reshape(2 * R, half, K) for x in (k, g)))
    first, second = within.unflatten(-3, (R, 2)).unbind(-3)  # (R, half, half) each
    # What decays from the first half to the second decays to the middle, then from there.
    later = q[..., half:, :] * g[:, half:].cumsum(1).exp()
    earlier = k[:, :half] * decay_to_end(g[:, :half])
    upper = F.pad(first, (0, half))
    lower = torch.cat([later @ earlier.mT, second], dim=-1)
    return torch.cat([upper, lower], dim=-2)


def scan_chunks(written, decay_chunk, S, sizes):
    """What each chunk adds, (R, K, V), and its decay -> the states before it, and the last ones."""
    before = []
    ended = []
    decays = [None] * len(sizes) if decay_chunk is None else decay_chunk.split(sizes)
    # split, since the backward of each slice would write zeros for all the others
    for added, decay in zip(written.split(sizes), decays):
        S, done = S.split([len(added), len(S) - len(added)])
        ended.append(done)  # of sequences without a chunk in this step
        before.append(S)
        S = scale(S, decay) + added
    return torch.cat(before), torch.cat([S, *reversed(ended)])


@functools.cache
def load_fla():
    """flash-linear-attention's two kernels, or why they cannot be imported, as text."""
    try:
        from fla.ops.gla import chunk_gla
        from fla.ops.simple_gla import chunk_simple_gla
    except Exception as e:  # without triton or a driver for it this fails in many ways
        return f"flash-linear-attention cannot be imported: {e}"
    return chunk_simple_gla, chunk_gla


def why_no_fla(device, dtype, key_width, value_width, decay_of_heads=False):
    """Why flash-linear-attention's kernels cannot be used here, as text, or None if they can."""
    if device.type != "cuda":
        return "flash-linear-attention runs on CUDA only"
    if dtype not in (torch.bfloat16, torch.float16):
        return "flash-linear-attention is used in bfloat16 or float16 only"
    if key_width % 2 or value_width % 2:
        return "flash-linear-attention takes keys and values of even width only"
    if isinstance(load_fla(), str):
        return load_fla()
    return why_no_decay_of_heads() if decay_of_heads else None


def additive_fla(q, k, v, log_decay=None, state=None, cu_seqlens=None):
    """additive_recurrent through flash-linear-attention's Triton kernels.

    q and k are rounded to v's dtype.
    """
    cu_seqlens, state = check_inputs(q, k, v, log_decay, state, cu_seqlens)
    of_heads, of_rows = load_fla()
    # the kernels' layout is (B, T, H, width); they scale by 1 / sqrt(K) themselves
    q, k, v = (x.to(v.dtype).transpose(1, 2).contiguous() for x in (q, k, v))
    options = dict(initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens)
    g = None if log_decay is None else log_decay.transpose(1, 2).float().contiguous()
    if g is None:
        o, state = of_heads(q, k, v, **options)
    elif g.shape[-1] == 1:
        o, state = of_heads(q, k, v, g=g[..., 0], **options)
    else:
        o, state = of_rows(q, k, v, g=g, **options)
    o = FirstOrder.apply(o, "flash-linear-attention")
    state = FirstOrder.apply(state, "flash-linear-attention")
    return o.transpose(1, 2), state


def additive(q, k, v, log_decay=None, state=None, cu_seqlens=None, chunk_size=16):
    """The fastest form for these inputs; arguments and results as in additive_recurrent."""
    if q.shape[2] <= 1:
        return additive_recurrent(q, k, v, log_decay, state, cu_seqlens)
    # A kernel may not know documents without tokens.
    has_empty = cu_seqlens is not None and bool((cu_seqlens.diff() == 0).any())
    decay_of_heads = log_decay is not None and log_decay.shape[-1] == 1
    problem = why_no_fla(v.device, v.dtype, k.shape[-1], v.shape[-1], decay_of_heads)
    if problem is None and not has_empty and not transformed():
        return additive_fla(q, k, v, log_decay, state, cu_seqlens)
    return additive_chunkwise(q, k, v, log_decay, state, cu_seqlens, chunk_size)


# ---- least squares -------------------------------------------------------------------------------


def least_squares_recurrent(q, k, v, beta, ridge, state=None, cu_seqlens=None):
    """MesaNet's recurrence, a system of K equations for each token: oracle and decoding.

    As additive_recurrent, but beta (B, H, T) is the write strength, ridge (H, K) is L, above 0,
    and state (B, H, K, K + V) holds Z and S side by side. Nothing is divided by sqrt(K).
    """
    kv = torch.cat([k, v], dim=-1)
    cu_seqlens, state = check_inputs(q, k, kv, None, state, cu_seqlens, beta)
    if cu_seqlens is not None:
        rule = least_squares_recurrent
        return recurrent_varlen(rule, [q, k, v, beta], state, cu_seqlens, ridge=ridge)
    dtype = accum_dtype(q)
    ridge = torch.diag_embed(ridge.to(dtype))  # (H, K, K)
    outputs = []
    for t in range(q.shape[2]):
        q_t, k_t, kv_t, beta_t = (x[:, :, t].to(dtype) for x in (q, k, kv, beta))
        written_t = beta_t[..., None] * k_t
        state = state + written_t[..., None] * kv_t[..., None, :]
        Z, S = state.split([q.shape[-1], v.shape[-1]], dim=-1)
        x_t = torch.linalg.solve(Z + ridge, q_t[..., None])  # (B, H, K, 1)
        outputs.append((S * x_t).sum(-2))
    if not outputs:
        return v, state
    return torch.stack(outputs, dim=2).to(v.dtype), state


@torch._disable_dynamo
def least_squares_chunkwise(q, k, v, beta, ridge, state=None, cu_seqlens=None, chunk_size=16):
    """least_squares_recurrent with one system per chunk: same arguments and results, any T."""
    kv = torch.cat([k, v], dim=-1)
    cu_seqlens, state = check_inputs(q, k, kv, None, state, cu_seqlens, beta)
    if q.shape[2] == 0:
        return v, state

    def form(*inputs):
        return least_squares_chunks(*inputs, ridge.to(state.dtype))

    return in_chunks(form, [q, k, v, beta[..., None]], state, cu_seqlens, chunk_size)


def least_squares_chunks(q, k, v, beta, state, sizes, ridge):
    """As additive_chunks: beta (R, C, 1), ridge (H, K), states (M, K, K + V)."""
    # Padding has a beta of 0, where the square root has no derivative.
    strength = beta.clamp_min(1e-20).sqrt()
    k = k * strength
    v = v * strength
    written = k.mT @ torch.cat([k, v], dim=-1)
    before, state = scan_chunks(written, None, state, sizes)
    Z, S = before.split([k.shape[-1], v.shape[-1]], dim=-1)  # (R, K, K), (R, K, V)
    ridge = torch.diag_embed(ridge).repeat(len(q) // len(ridge), 1, 1)  # of each chunk's head
    factor = torch.linalg.cholesky(Z + ridge)
    Mq = torch.cholesky_solve(q.mT, factor)  # (R, K, C)
    Mk = torch.cholesky_solve(k.mT, factor)  # (R, K, C)
    eye = torch.eye(q.shape[1], dtype=q.dtype, device=q.device)
    F_chunk = torch.linalg.cholesky(eye + k @ Mk)  # (R, C, C)
    seen = torch.linalg.solve_triangular(F_chunk, k @ Mq, upper=False).triu()  # [j, i], j <= i
    x = Mq - Mk @ torch.linalg.solve_triangular(F_chunk.mT, seen, upper=True)  # (R, K, C)
    return (k @ x).triu().mT @ v + x.mT @ S, state


def least_squares(q, k, v, beta, ridge, state=None, cu_seqlens=None, chunk_size=16):
    """The faster form for these inputs; arguments and results as in least_squares_recurrent."""
    if q.shape[2] <= 1:
        return least_squares_recurrent(q, k, v, beta, ridge, state, cu_seqlens)
    return least_squares_chunkwise(q, k, v, beta, ridge, state, cu_seqlens, chunk_size)


# ---- layers --------------------------------------------------------------------------------------


@dataclass
class Config(model.Config):
    q_kernel: str = "silu"  # feature map of queries: none relu relu2 elu1 silu exp softmax taylor
    k_kernel: str = "silu"  # feature map of keys, as for queries
    v_kernel: str = "silu"  # feature map of values, as for queries
    q_norm: str = "l2"  # norm of each query after its feature map: none l2 l1 rms layer
    k_norm: str = "l2"  # norm of each key after its feature map, as for queries
    conv_size: int = 4  # width of a short causal convolution on queries, keys and values; 0: none
    pos_emb: str = "none"  # positions: rope (in RetNet's paper), learned or none
    use_out_norm: bool = True  # RMSNorm of each head's output

    def unused(self):
        reasons = super().unused()
        if not self.use_att:
            reasons |= dict.fromkeys(("chunk_size", "use_out_norm"), "use_att is 0")
        return reasons


class LinearAttentionLayer(RecurrentLayer):
    """An additive memory in place of attention.

    Linear attention divides by the sum of scores (Katharopoulos et al. 2020). That is left out:
    RMSNorm of a head's output removes any such factor. With taylor feature maps this is the linear
    layer of Based (Arora et al. 2024, arXiv 2402.18668).
    """

    memory_name = "additive memory"
    decay_of_heads = False  # does each head have one decay for all of its state?

    def __init__(self, c):
        super().__init__(c)
        self.out_norm = self.make_out_norm(c)

    def recall(self, x, q, k, v, state, cu_seqlens):
        """-> o (B, H, T, V), what the queries read, and the state after the last token"""
        chunk_size = self.config.chunk_size
        return additive(q, k, v, self.log_decay(x), state, cu_seqlens, chunk_size)

    @classmethod
    def describe_backend(cls, c, device, dtype):
        problem = why_no_fla(device, dtype, *cls.head_dims(c), cls.decay_of_heads)
        if problem:
            return f"{cls.memory_name}, chunks of {c.chunk_size} tokens ({problem})"
        return f"{cls.memory_name}, flash-linear-attention, its own chunks"


class RetNetLayer(LinearAttentionLayer):
    """The state of head h decays by 1 - 2^(-5-h) per token, to a half in 22 * 2^h tokens."""

    decay_of_heads = True

    def log_decay(self, x):
        h = torch.arange(self.n_heads, dtype=accum_dtype(x), device=x.device)
        g = torch.log1p(-(2.0 ** (-5 - h)))
        return g[None, :, None, None].expand(len(x), -1, x.shape[1], 1)


class Mamba2Layer(LinearAttentionLayer):
    """Mamba-2's state space: its B, C and x are k, q and v, its step dt = softplus(W x + dt_bias).

    Each head has a step of its own, with the parametrisation and initial values of the paper, and a
    skip D v. In the paper all heads share q and k, which have no norm (q_norm = k_norm = none), and
    the gate (att_use_output_gate=1) comes before the norm of the output.
    """

    decay_of_heads = True

    def __init__(self, c):
        super().__init__(c)
        self.proj_dt = nn.Linear(c.dim, c.n_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(c.n_heads).uniform_(1, 16).log())
        dt = torch.empty(c.n_heads).uniform_(math.log(1e-3), math.log(0.1)).exp()
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus(dt_bias) = dt
        self.D = nn.Parameter(torch.ones(c.n_heads))

    def recall(self, x, q, k, v, state, cu_seqlens):
        z = self.proj_dt(x) + self.dt_bias
        dt = F.softplus(z.to(accum_dtype(z))).transpose(1, 2)[..., None]  # (B, H, T, 1)
        A, D = (p[:, None, None] for p in (self.A_log.exp(), self.D))
        written = (dt * v).to(v.dtype)
        # The paper does not divide by sqrt(K): what is read would be too small beside the skip.
        q = q * math.sqrt(q.shape[-1])
        o, state = additive(q, k, written, -A * dt, state, cu_seqlens, self.config.chunk_size)
        return o + (D * v).to(v.dtype), state


class GLALayer(LinearAttentionLayer):
    """Gated linear attention: row r of the state decays by sigmoid(W_2 W_1 x + b)_r^(1/16).

    W_1 has 16 rows, as in the paper. Its output gate is att_use_output_gate=1.
    """

    def __init__(self, c):
        super().__init__(c)
        self.proj_decay = nn.Sequential(
            nn.Linear(c.dim, 16, bias=False),
            nn.Linear(16, c.n_heads * self.head_dims(c)[0]),
        )

    def log_decay(self, x):
        z = self.proj_decay(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (B, H, T, K)
        return F.logsigmoid(z.to(accum_dtype(z))) / 16


class MesaNetLayer(LinearAttentionLayer):
    """Least squares over all tokens so far, in place of attention; its state also holds Z.

    beta = sigmoid(W x) per head; L = 1/4 + softplus(.) per head and row, 1 at the start, as in the
    paper's code.
    """

    memory_name = "least squares"

    def __init__(self, c):
        super().__init__(c)
        self.proj_beta = nn.Linear(c.dim, c.n_heads, bias=False)
        start = math.log(math.expm1(0.75))  # softplus(start) = 0.75
        self.ridge = nn.Parameter(torch.full((c.n_heads, self.head_dims(c)[0]), start))

    def recall(self, x, q, k, v, state, cu_seqlens):
        beta = torch.sigmoid(self.proj_beta(x)).transpose(1, 2)  # (B, H, T)
        ridge = 0.25 + F.softplus(self.ridge)
        return least_squares(q, k, v, beta, ridge, state, cu_seqlens, self.config.chunk_size)

    @classmethod
    def describe_backend(cls, c, device, dtype):
        # The kernel makes 30 steps. It takes values as wide as keys only.
        problem = "flash-linear-attention's kernel solves by conjugate gradients, so not exactly"
        return f"{cls.memory_name}, chunks of {c.chunk_size} tokens ({problem})"


# ---- models --------------------------------------------------------------------------------------


class LinearAttentionBlock(GPTBlock):
    mixer = LinearAttentionLayer


class RetNetBlock(GPTBlock):
    mixer = RetNetLayer


class Mamba2Block(GPTBlock):
    mixer = Mamba2Layer


class GLABlock(GPTBlock):
    mixer = GLALayer


class MesaNetBlock(GPTBlock):
    mixer = MesaNetLayer


class LinearAttention(GPT):
    """model.py's GPT with an additive memory in place of attention: its cache does not grow."""

    block = LinearAttentionBlock
    inactive_settings = {
        "du": "only unified_kv has it",
        "n_kv_heads": "each head of an additive memory has keys and values of its own",
        "lr_temp": "only delta models have it",
        "window": "an additive memory reads no tokens but a state",
    }


class RetNet(LinearAttention):
    """LinearAttention whose state decays at a fixed rate: see RetNetLayer."""

    block = RetNetBlock


class Mamba2(LinearAttention):
    """LinearAttention whose decay and write strength are one step: see Mamba2Layer."""

    block = Mamba2Block


class GLA(LinearAttention):
    """LinearAttention in which each row of the state has a decay of its own: see GLALayer."""

    block = GLABlock


class MesaNet(LinearAttention):
    """LinearAttention that reads by least squares: see MesaNetLayer."""

    block = MesaNetBlock


Model = LinearAttention  # what `--model linear` names
