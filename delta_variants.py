"""Two variants of the delta rule: a decay for each row of the state, and several steps a token.

    python train.py configs/mqar_kda.py                  # Kimi Delta Attention
    python train.py configs/track_s3_delta_product.py    # DeltaProduct

The memory of one head is the matrix S (K, V) of delta.py, and so are q, k, v and beta.

Kimi Delta Attention (Kimi Team 2025, arXiv 2510.26692) lets each of the K rows of S decay by a
number of its own, where Gated DeltaNet has one for the head:

    S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T      g_t (K,), at most 0
    o_t = S_t^T q_t / sqrt(K)

In chunks this is the form of delta.py. Let S be the state before a chunk, and G_i = g_1 + ... + g_i
within the chunk. There a score is an inner product times one decay; here each of its K terms has a
decay of its own: (a.b)_ij = sum_r a_ir b_jr exp(G_ir - G_jr). linear.py computes such scores
without overflow. With A = diag(beta) (k.k), strictly lower triangular, P = (q.k), lower triangular,
Q divided by sqrt(K), and * elementwise,

    U = (I + A)^-1 diag(beta) (V - (exp(G) * K) S)                             errors, (C, V)
    O = (exp(G) * Q) S + P U
    S <- diag(exp(G_C)) S + (exp(G_C - G) * K)^T U

DeltaProduct (Siems et al. 2025, arXiv 2502.10297) makes n steps of the delta rule for each token,
with a key, a value and a write strength for each, and reads after the last:

    S_{t,0} = S_{t-1}
    S_{t,m} = (I - beta_m k_m k_m^T) S_{t,m-1} + beta_m k_m v_m^T      m = 1, ..., n
    S_t = S_{t,n}

With beta = 2 and |k| = 1 a step is a reflection. n reflections make up any orthogonal matrix that
leaves all but n dimensions as they are: one can swap two objects, two can move three objects around
in a circle. This is the delta rule on a sequence n times as long, so delta.py computes it, on a GPU
too.

Letters are those of delta.py; n is the number of steps a token.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import delta
from delta import DeltaNet, DeltaNetLayer, delta_rule, recurrent_varlen, without_empty
from linear import check_inputs, decay_to_end, in_chunks, scores_of_rows
from model import GPTBlock
from nanorecall.ops import accum_dtype
from nanorecall.second_order import FirstOrder, transformed
from nanorecall.settings import within

# ---- a decay for each row ------------------------------------------------------------------------


def check_kda_inputs(q, k, v, beta, log_decay, state, cu_seqlens):
    """-> cu_seqlens as int64, or None, and the state, zeros if None; ValueError as below."""
    if log_decay is None or log_decay.shape != q.shape:
        given = None if log_decay is None else tuple(log_decay.shape)
        raise ValueError(f"log_decay must have the shape of q, {tuple(q.shape)}, not {given}")
    return check_inputs(q, k, v, log_decay, state, cu_seqlens, beta)


def kda_recurrent(q, k, v, beta, log_decay, state=None, cu_seqlens=None):
    """The recurrence as it is written: the tests' oracle, and one step of decoding.

    q, k (B, H, T, K); v (B, H, T, V); beta (B, H, T); log_decay (B, H, T, K), at most 0; state
    (B, H, K, V) before the first token, or None for zeros. -> o (B, H, T, V) in v's dtype, and the
    state after the last token, which is float32 (float64 if q is).

    With cu_seqlens (documents + 1,), B is 1, document d is tokens cu_seqlens[d] to
    cu_seqlens[d + 1] and starts from a state of its own; states are (documents, H, K, V).
    ValueError if shapes do not fit.
    """
    cu_seqlens, S = check_kda_inputs(q, k, v, beta, log_decay, state, cu_seqlens)
    if cu_seqlens is not None:
        return recurrent_varlen(kda_recurrent, [q, k, v, beta, log_decay], S, cu_seqlens)
    dtype = accum_dtype(q)
    outputs = []
    for t in range(q.shape[2]):
        q_t, k_t, v_t, beta_t, g_t = (x[:, :, t].to(dtype) for x in (q, k, v, beta, log_decay))
        S = S * g_t[..., None].exp()
        u_t = beta_t[..., None] * (v_t - (S * k_t[..., None]).sum(-2))  # (B, H, V)
        S = S + k_t[..., None] * u_t[..., None, :]
        outputs.append((S * q_t[..., None]).sum(-2) / math.sqrt(q.shape[-1]))
    if not outputs:
        return v, S
    return torch.stack(outputs, dim=2).to(v.dtype), S


@torch._disable_dynamo  # traced, the scan would be unrolled into a copy for each chunk
def kda_chunkwise(q, k, v, beta, log_decay, state=None, cu_seqlens=None, chunk_size=16):
    """kda_recurrent by matrix products over chunks: same arguments and results, any T.

    Best with a power of two, which linear.py's decayed products halve down to single tokens.
    """
    cu_seqlens, S = check_kda_inputs(q, k, v, beta, log_decay, state, cu_seqlens)
    if q.shape[2] == 0:
        return v, S
    tokens = [q, k, v, beta[..., None], log_decay]
    return in_chunks(kda_chunks, tokens, S, cu_seqlens, chunk_size)


def kda_chunks(q, k, v, beta, g, S, sizes):
    """The chunk form of the docstring above: q, k, g (R, C, K), v (R, C, V), beta (R, C, 1).

    S (M, K, V), the states before the first chunks; sizes as in delta.BatchChunks. -> o (R, C, V),
    the states after the last chunks. Gradients are autograd's.
    """
    q = q / math.sqrt(q.shape[-1])
    decay_in = g.cumsum(1).exp()  # (R, C, K): exp(G_i)
    # For all chunks at once: everything without S.
    P, A = scores_of_rows(torch.stack([q, k]), k, g)
    known = beta * torch.cat([v, decay_in * k], dim=-1)
    # solve_triangular ignores the diagonal and all above it, and takes the diagonal as 1: I + A.
    solved = torch.linalg.solve_triangular(beta * A, known, upper=False, unitriangular=True)
    U, W = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    q_in = decay_in * q
    k_out = decay_to_end(g) * k  # exp(G_C - G) * K
    decay_chunk = decay_in[:, -1, :, None]  # (R, K, 1): exp(G_C)
    # The scan, one chunk of every sequence after another.
    outputs = []
    ended = []
    at_once = P, U, W, q_in, k_out, decay_chunk
    for of_step in zip(*(x.split(sizes) for x in at_once)):
        P, U, W, q_in, k_out, decay_chunk = of_step
        S, done = S.split([len(U), len(S) - len(U)])
        ended.append(done)  # of sequences without a chunk in this step
        U = U - W @ S
        outputs.append(q_in @ S + P @ U)
        S = decay_chunk * S + k_out.mT @ U
    return torch.cat(outputs), torch.cat([S, *reversed(ended)])


@functools.cache
def load_fla():
    """flash-linear-attention's kernel of Kimi Delta Attention, or why it cannot be imported."""
    try:
        from fla.ops.kda import chunk_kda
    except Exception as e:  # without triton or a driver for it this fails in many ways
        return f"flash-linear-attention cannot be imported: {e}"
    return chunk_kda


def why_no_fla(device, dtype, key_width):
    """Why flash-linear-attention's kernel cannot be used here, as text, or None if it can."""
    problem = delta.why_no_fla(device, dtype, key_width)
    if problem:
        return problem
    return load_fla() if isinstance(load_fla(), str) else None


def kda_fla(q, k, v, beta, log_decay, state=None, cu_seqlens=None):
    """kda_recurrent through flash-linear-attention's Triton kernel.

    q, k and beta are rounded to v's dtype.
    """
    inputs = q, k, v, beta, log_decay
    cu_seqlens, state = check_kda_inputs(q, k, v, beta, log_decay, state, cu_seqlens)
    if cu_seqlens is not None and (cu_seqlens.diff() == 0).any():
        return without_empty(kda_fla, *inputs, state, cu_seqlens)
    # the kernel's layout is (B, T, H, width); it scales by 1 / sqrt(K) itself
    q, k, v, beta = (x.to(v.dtype).transpose(1, 2).contiguous() for x in (q, k, v, beta))
    g = log_decay.transpose(1, 2).float().contiguous()
    options = dict(initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens)
    o, state = load_fla()(q, k, v, g=g, beta=beta, **options)
    o = FirstOrder.apply(o, "flash-linear-attention")
    state = FirstOrder.apply(state, "flash-linear-attention")
    return o.transpose(1, 2), state


def kda(q, k, v, beta, log_decay, state=None, cu_seqlens=None, chunk_size=16):
    """The fastest form for these inputs; arguments and results as in kda_recurrent."""
    if q.shape[2] <= 1:
        return kda_recurrent(q, k, v, beta, log_decay, state, cu_seqlens)
    if why_no_fla(v.device, v.dtype, k.shape[-1]) is None and not transformed():
        return kda_fla(q, k, v, beta, log_decay, state, cu_seqlens)
    return kda_chunkwise(q, k, v, beta, log_decay, state, cu_seqlens, chunk_size)


# ---- several steps a token -----------------------------------------------------------------------


def delta_product(q, k, v, beta, state=None, cu_seqlens=None, chunk_size=16):
    """n steps of the delta rule for each token, by the fastest form that delta.py has.

    q (B, H, T, K); k (B, H, T, n, K); v (B, H, T, n, V); beta (B, H, T, n); state (B, H, K, V) or
    None; cu_seqlens as in delta_rule_recurrent. -> o (B, H, T, V), what is read after the last step
    of each token, and the state after the last token. ValueError if shapes do not fit.
    """
    n = k.shape[3]
    # delta_rule reads after every step. Only what is read after a token's last step is returned.
    q = q.repeat_interleave(n, dim=2)
    k, v, beta = (x.flatten(2, 3) for x in (k, v, beta))
    cu_seqlens = None if cu_seqlens is None else n * cu_seqlens
    o, state = delta_rule(q, k, v, beta, None, state, cu_seqlens, n * chunk_size)
    return o[:, :, n - 1 :: n], state


# ---- layers --------------------------------------------------------------------------------------


@dataclass
class Config(delta.Config):
    n_householder: int = 2  # delta_product: steps of the delta rule for each token

    def check(self):
        super().check()
        within(self, 1, 64, "n_householder")

    def unused(self):
        reasons = super().unused()
        if not self.use_att:
            reasons["n_householder"] = "use_att is 0"
        return reasons


class KDALayer(DeltaNetLayer):
    """DeltaNetLayer in which row r of the state decays by exp(-exp(A_log) softplus(z_r + dt_r)).

    z = W_2 W_1 x for each head and row, and dt is its bias. exp(A_log) starts between 1 and 16, and
    softplus(dt) between 0.001 and 0.1. W_1 has 16 rows, as in GLA. The paper's W_1 has as many rows
    as a value has features, here often more than the residual stream. The paper's output gate is
    att_use_output_gate=1 with att_output_gate_act=sigmoid, from a product of two matrices there.
    """

    memory_name = "Kimi delta attention"
    why_no_fla = staticmethod(why_no_fla)

    def __init__(self, c):
        super().__init__(c)
        n_rows = c.n_heads * self.head_dims(c)[0]
        self.proj_decay = nn.Sequential(
            nn.Linear(c.dim, 16, bias=False),
            nn.Linear(16, n_rows, bias=False),
        )
        self.A_log = nn.Parameter(torch.empty(c.n_heads).uniform_(1, 16).log())
        dt = torch.empty(n_rows).uniform_(math.log(1e-3), math.log(0.1)).exp()
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus(dt_bias) = dt

    def log_decay(self, x):
        z = self.proj_decay(x) + self.dt_bias
        rate = F.softplus(z.to(accum_dtype(z))).unflatten(-1, (self.n_heads, -1))  # (B, T, H, K)
        return -(self.A_log.exp()[:, None] * rate).transpose(1, 2)

    def recall(self, x, q, k, v, state, cu_seqlens):
        """-> o (B, H, T, V), what the queries read, and the state after the last token"""
        beta = self.beta(x).transpose(1, 2)  # (B, H, T)
        chunk_size = self.config.chunk_size
        return kda(q, k, v, beta, self.log_decay(x), state, cu_seqlens, chunk_size)


class DeltaProductLayer(DeltaNetLayer):
    """DeltaNetLayer with n_householder steps a token.

    Each step has a key, a value and a beta of its own, with projection and convolution; feature
    maps, norms and gates are those of the other keys and values. The paper's beta is in (0, 2):
    allow_neg_eigval=1.
    """

    memory_name = "delta rule, several steps a token"

    def add_projections(self, c):
        # Keys and values of all steps are heads side by side: first those of step 1.
        self.n_kv_heads = c.n_householder * c.n_heads
        super().add_projections(c)

    @staticmethod
    def qkv_dim(c):
        return c.n_heads * (c.dk + c.n_householder * (c.dk + c.dv))

    def recall(self, x, q, k, v, state, cu_seqlens):
        """k, v (B, n*H, T, width) -> o (B, H, T, V), and the state after the last token"""
        beta = self.beta(x).transpose(1, 2)  # (B, n*H, T)
        k, v, beta = (y.unflatten(1, (-1, self.n_heads)).movedim(1, 3) for y in (k, v, beta))
        return delta_product(q, k, v, beta, state, cu_seqlens, self.config.chunk_size)


# ---- models --------------------------------------------------------------------------------------


class KDABlock(GPTBlock):
    mixer = KDALayer


class DeltaProductBlock(GPTBlock):
    mixer = DeltaProductLayer


class KDA(DeltaNet):
    """DeltaNet in which each row of the state has a decay of its own: see KDALayer."""

    block = KDABlock
    inactive_settings = {
        **DeltaNet.inactive_settings,
        "n_householder": "only delta_product has it",
    }


class DeltaProduct(DeltaNet):
    """DeltaNet with several steps a token: see DeltaProductLayer."""

    block = DeltaProductBlock


Model = KDA  # what `--model delta_variants` names
