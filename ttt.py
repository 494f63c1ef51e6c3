"""Test-time training: the state is the weights of a small net, on model.py.

    python train.py configs/mqar_ttt.py              # TTT-Linear
    python train.py configs/mqar_ttt_mlp.py

The memory of one head is a net f with weights W that maps keys to values (Sun et al. 2024, arXiv
2407.04620). Each token is a training example: W takes a gradient step that brings f(k_t) nearer to
v_t, and the token reads f(q_t).

    f(x; W) = x + LN(W^T x)                      TTT-Linear, W (K, K)
    f(x; W) = x + LN(W2^T gelu(W1^T x))          TTT-MLP, W1 (K, F) and W2 (F, K)
    l(W; k, v) = |f(k; W) - v|^2 / 2             the inner loss
    W_t = W_{t-1} - eta_t grad l(W'; k_t, v_t)   eta_t = inner_lr sigmoid(w.x_t), the inner rate
    o_t = f(q_t; W_t)

W' are the weights before the token's mini-batch. The inner_batch_size tokens of a mini-batch share
W', so their gradients are computed at once. W_0 is learned like any other parameter, and so are the
weight and bias of LN. Without LN and residual, TTT-Linear with one token per mini-batch is the
delta rule.

The weights W_i of each token need not be formed (the paper's dual form). For a layer and token j,
let h_j be the layer's input for the key k_j, and u_j the gradient at its output times eta_j. Both
are computed with W'. The step of token j adds -h_j u_j^T to the layer's weights. So if x_i is the
layer's input for the query q_i, its output is

    W_i^T x_i = W'^T x_i - sum_{j<=i} (x_i.h_j) u_j

and for all tokens of a mini-batch at once this is X W' - tril(X H^T) U. Only the weights after the
last token are formed. Gradients of the inner loss are written out below; autograd differentiates
through them.

The paper's loss has no 1/2, so its rate of 1 is inner_lr=2 here. Three things of the authors' code
are left out: biases of the layers, a division of eta by K, and a mean over the tokens of a
mini-batch, where the paper has a sum.

Letters: B batch, T tokens, H heads, K width of a query, key or value, F hidden width, C tokens in a
mini-batch or a part of one. In shapes of the model, D is the width of the residual stream.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import model
from delta import RecurrentLayer, check_shapes
from model import GPT, GPTBlock, feature_width
from nanorecall.ops import PackedDocuments, accum_dtype, no_autocast
from nanorecall.settings import require, within

EPS = 1e-6  # of the LayerNorm

# ---- the small net -------------------------------------------------------------------------------


def layer_norm(z, norm):
    """z (B, H, C, K) with a weight and a bias (H, K) for each head"""
    weight, bias = (x[:, None] for x in norm)
    return F.layer_norm(z, z.shape[-1:], eps=EPS) * weight + bias


def run_layers(weights, x):
    """-> inputs of each layer, (B, H, C, K or F), and its outputs"""
    inputs = []
    outputs = []
    for W in weights:
        inputs.append(F.gelu(outputs[-1]) if outputs else x)
        outputs.append(inputs[-1] @ W)
    return inputs, outputs


def inner_loss(weights, k, v, norm):
    """The inner loss, summed over all tokens; each head and sequence has its own weights."""
    _, outputs = run_layers(weights, k)
    return (k + layer_norm(outputs[-1], norm) - v).square().sum() / 2


def inner_gradients(weights, k, v, norm):
    """-> inputs of each layer, and gradients of the inner loss with respect to its outputs"""
    inputs, outputs = run_layers(weights, k)
    weight, bias = (x[:, None] for x in norm)
    z = outputs[-1]
    centred = z - z.mean(-1, keepdim=True)
    inverse_std = (centred.square().mean(-1, keepdim=True) + EPS).rsqrt()
    z_hat = centred * inverse_std
    g = weight * (k + weight * z_hat + bias - v)  # gradient with respect to z_hat
    # z_hat always has mean 0 and variance 1, so the parts of g that would change them are removed.
    g = g - g.mean(-1, keepdim=True) - z_hat * (g * z_hat).mean(-1, keepdim=True)
    gradients = [inverse_std * g]  # of the last layer first
    for W, hidden in zip(weights[:0:-1], outputs[-2::-1]):
        gradients.append(gradients[-1] @ W.mT * gelu_slope(hidden))
    return inputs, gradients[::-1]


def gelu_slope(x):
    """Derivative of gelu(x) = x P(x), where P is the normal distribution function"""
    density = (-0.5 * x.square()).exp() / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density


# ---- writing and reading it ----------------------------------------------------------------------


def ttt_recurrent(q, k, v, rate, weights, norm, inner_batch_size=16):
    """Token by token, with gradients by torch.func: the tests' oracle.

    q, k, v (B, H, T, K); rate (B, H, T), the eta of each token; weights, of one layer or of two:
    W_0 of each, (H, in, out); norm: weight and bias (H, K). -> o (B, H, T, K) and the weights after
    the last token, (B, H, in, out) each.
    """
    now = [W.expand(len(q), -1, -1, -1) for W in weights]
    outputs = []
    for t in range(q.shape[2]):
        if t % inner_batch_size == 0:
            start = now
        q_t, k_t, v_t, rate_t = (x[:, :, t : t + 1] for x in (q, k, v, rate[..., None]))
        gradients = torch.func.grad(inner_loss)(start, k_t, v_t, norm)
        now = [W - rate_t * g for W, g in zip(now, gradients)]
        _, of_layers = run_layers(now, q_t)
        outputs.append(q_t + layer_norm(of_layers[-1], norm))
    return torch.cat(outputs, dim=2), now


def one_mini_batch(q, k, v, rate, start, now, norm):
    """A mini-batch or a part of it, in the dual form; rate (B, H, C, 1).

    start: the weights at which gradients are taken; now: those before the first of these tokens.
    -> o (B, H, C, K), and the weights after the last token.
    """
    inputs, gradients = inner_gradients(start, k, v, norm)
    outputs = []
    after = []
    for W, h, g in zip(now, inputs, gradients):
        x = F.gelu(outputs[-1]) if outputs else q
        u = rate * g
        outputs.append(x @ W - (x @ h.mT).tril() @ u)
        after.append(W - h.mT @ u)
    return q + layer_norm(outputs[-1], norm), after


def check_ttt_inputs(q, k, v, rate, state, cu_seqlens):
    """-> cu_seqlens as int64, or None; ValueError in one sentence if shapes do not fit."""
    if v.shape != q.shape:
        raise ValueError(f"v must have the shape of q, {tuple(q.shape)}, not {tuple(v.shape)}")
    if rate.shape != q.shape[:3]:
        raise ValueError(f"rate must have shape {tuple(q.shape[:3])}, not {tuple(rate.shape)}")
    if state is not None and cu_seqlens is not None:
        raise ValueError("documents begin with W_0: give state or cu_seqlens, not both")
    return check_shapes(q, k, v, rate, None, None, cu_seqlens)


@torch._disable_dynamo  # traced, the loop would be unrolled into a copy for each mini-batch
def ttt(q, k, v, rate, weights, norm, state=None, cu_seqlens=None, inner_batch_size=16):
    """ttt_recurrent in the dual form: same arguments and results, but for states.

    state (start, now, filled): weights before the mini-batch that has begun, weights after its
    first `filled` tokens, and that number, so that tokens may come in pieces of any size. None: the
    beginning, with W_0. -> o in v's dtype, and such a state, with weights in float32 (float64 if q
    is).

    With cu_seqlens (documents + 1,), B is 1, and each document begins with W_0. They are padded to
    a sequence each, and have no state to go on from: None is returned. ValueError if shapes do not
    fit.
    """
    cu_seqlens = check_ttt_inputs(q, k, v, rate, state, cu_seqlens)
    if cu_seqlens is not None:
        documents = PackedDocuments(cu_seqlens, q[:, 0, :, 0])
        # Padding has a rate of 0.
        padded = [documents.pad(x.transpose(1, 2)).transpose(1, 2) for x in (q, k, v, rate)]
        o, _ = ttt(*padded, weights, norm, inner_batch_size=inner_batch_size)
        return documents.pack(o.transpose(1, 2)).transpose(1, 2), None
    dtype = accum_dtype(q)
    with no_autocast(q):  # steps of a gradient descent, rounded to bfloat16, would get lost
        norm = [x.to(dtype) for x in norm]
        if state is None:
            # Copies: the state must not change with the parameters.
            start = now = [W.to(dtype, copy=True).expand(len(q), -1, -1, -1) for W in weights]
            filled = 0
        else:
            start, now, filled = state
        sizes = piece_sizes(q.shape[2], filled, inner_batch_size)
        # split, since the backward of each slice would write zeros for all the others
        tokens = [x.to(dtype).split(sizes, dim=2) for x in (q, k, v, rate[..., None])]
        outputs = []
        for size, *piece in zip(sizes, *tokens):
            o, now = one_mini_batch(*piece, start, now, norm)
            outputs.append(o)
            filled += size
            if filled == inner_batch_size:
                start = now
                filled = 0
        return torch.cat(outputs, dim=2).to(v.dtype), (start, now, filled)


def piece_sizes(T, filled, inner_batch_size):
    """Cut T tokens where mini-batches end; the first mini-batch has `filled` tokens already."""
    ends = [*range(inner_batch_size - filled, T, inner_batch_size), T]
    starts = [0, *ends[:-1]]
    return [end - start for start, end in zip(starts, ends)]


# ---- layers --------------------------------------------------------------------------------------


@dataclass
class Config(model.Config):
    q_norm: str = "l2"  # norm of each query after its feature map: none l2 l1 rms layer
    k_norm: str = "l2"  # norm of each key after its feature map, as for queries
    conv_size: int = 4  # width of a short causal convolution on queries, keys and values; 0: none
    pos_emb: str = "none"  # positions: rope, learned or none
    inner_lr: float = 1.0  # largest inner rate; 1 in the paper for ttt_linear, 0.1 for ttt_mlp
    inner_batch_size: int = 16  # tokens whose inner gradients are taken at the same weights
    inner_expand_factor: int = 4  # ttt_mlp: hidden width of the inner net over dk
    use_out_norm: bool = True  # RMSNorm of each head's output

    def check(self):
        super().check()
        within(self, 1, 2**20, "inner_batch_size", "inner_expand_factor")
        require(self.inner_lr > 0, "inner_lr must be above 0", "inner_lr")
        K, V = feature_width(self.k_kernel, self.dk), feature_width(self.v_kernel, self.dv)
        message = f"keys and values of the inner net must have one width, not {K} and {V}"
        require(K == V or not self.use_att, message, "dv")

    def unused(self):
        reasons = super().unused()
        if not self.use_att:
            names = "inner_lr", "inner_batch_size", "inner_expand_factor", "use_out_norm"
            reasons |= dict.fromkeys(names, "use_att is 0")
        return reasons


class TTTLinearLayer(RecurrentLayer):
    """TTT-Linear in place of attention."""

    memory_name = "test-time training of a linear map"
    # In fla-core 0.6.0, W has a bias that is trained, too. Token i reads writes at the rate of
    # token i, not of the token that wrote, and W keeps those of a mini-batch at its last token's
    # rate. What is read is z + LN(z) with z = W^T q, not q + LN(z). Packed documents have no
    # backward pass.
    why_no_fla = "flash-linear-attention's kernel has a bias, other rates and another residual"

    def __init__(self, c):
        super().__init__(c)
        self.proj_rate = nn.Linear(c.dim, c.n_heads, bias=False)
        K, _ = self.head_dims(c)
        self.inner_weights = nn.ParameterList()
        for n_in, n_out, std in self.inner_sizes(c, K):
            W = std * torch.randn(c.n_heads, n_in, n_out)
            self.inner_weights.append(nn.Parameter(W))
        # Vectors, since weight decay is for matrices.
        self.inner_norm_weight = nn.Parameter(torch.ones(c.n_heads * K))
        self.inner_norm_bias = nn.Parameter(torch.zeros(c.n_heads * K))
        self.out_norm = self.make_out_norm(c)

    @staticmethod
    def inner_sizes(c, K):
        """Of each layer of the inner net: width of inputs, of outputs, std of the first weights."""
        # The paper's std. LN's gradient is large where its input is small, so the first inner steps
        # overwrite such small weights.
        return [(K, K, 0.02)]

    def recall(self, x, q, k, v, state, cu_seqlens):
        """-> o (B, H, T, K), the inner net's outputs for q, and the state after the last token"""
        c = self.config
        rate = c.inner_lr * torch.sigmoid(self.proj_rate(x)).transpose(1, 2)  # (B, H, T)
        norm = self.inner_norm_weight, self.inner_norm_bias
        norm = [p.unflatten(0, (self.n_heads, -1)) for p in norm]
        weights = list(self.inner_weights)
        return ttt(q, k, v, rate, weights, norm, state, cu_seqlens, c.inner_batch_size)

    @classmethod
    def describe_backend(cls, c, device, dtype):
        form = f"{cls.memory_name}, mini-batches of {c.inner_batch_size} tokens"
        return f"{form} ({cls.why_no_fla})"


class TTTMLPLayer(TTTLinearLayer):
    """TTT-MLP in place of attention."""

    memory_name = "test-time training of an MLP"
    why_no_fla = "flash-linear-attention has no kernel for it"

    @staticmethod
    def inner_sizes(c, K):
        hidden = c.inner_expand_factor * K
        # With a key of length 1, hidden units start with a variance of 1. With the paper's std of
        # 0.02 they would all be close to 0, where gelu is nearly linear.
        return [(K, hidden, 1.0), (hidden, K, 0.02)]


# ---- models --------------------------------------------------------------------------------------


class TTTLinearBlock(GPTBlock):
    mixer = TTTLinearLayer


class TTTMLPBlock(GPTBlock):
    mixer = TTTMLPLayer


class TTTLinear(GPT):
    """model.py's GPT with TTT-Linear in place of attention."""

    block = TTTLinearBlock
    inactive_settings = {
        "du": "only unified_kv has it",
        "n_kv_heads": "each head of an inner net has keys and values of its own",
        "lr_temp": "only delta models have it",
        "window": "an inner net reads no tokens but its weights",
        "chunk_size": "inner_batch_size decides how many tokens are computed at once",
        "inner_expand_factor": "only ttt_mlp has hidden units",
    }


class TTTMLP(TTTLinear):
    """model.py's GPT with TTT-MLP in place of attention."""

    block = TTTMLPBlock
    inactive_settings = dict(TTTLinear.inactive_settings)
    del inactive_settings["inner_expand_factor"]


Model = TTTLinear  # what `--model ttt` names
