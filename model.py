"""GPT and UnifiedKV: one trunk, two kinds of causal softmax attention, every switch of the MQAR experiments.

    python train.py configs/mqar_gpt.py              # keys and values apart
    python train.py configs/mqar_unified_kv.py       # one vector is both

Read from top to bottom: tables of small functions (feature maps, norms, activations), small modules, the two attention
modules, the block, the trunk. softmax_attention itself is in attention.py. Delta-rule and memory models in other files reuse
the trunk and replace the block.

Letters: B batch, T tokens, n queried positions, D model width, H query heads, G key/value heads, K key width per head,
V value width per head, N labelled positions in the batch, C channels of the short convolution.
"""

import contextlib
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from nanorecall.ops import PackedDocuments, apply_rotary, rope_table, softmax_attention, why_no_flash
from nanorecall.rng import IGNORE_INDEX
from nanorecall.second_order import Twinned, needs_twin, twin_gradients
from nanorecall.settings import derived, one_of, require, within


@dataclass
class Config:
    dim: int = 64  # width of the residual stream
    n_layers: int = 4  # number of blocks
    n_heads: int = 2  # query heads
    n_kv_heads: int = 0  # key/value heads shared by groups of query heads; 0: as many as n_heads
    dk: int = 64  # gpt, delta: width of a query or key per head
    dv: int = 64  # gpt, delta: width of a value per head
    du: int = 64  # unified_kv: width of the one vector per head that is key and value
    use_att: bool = True  # a token mixer in every block
    use_ffn: bool = False  # an MLP in every block; the recall task does not need one
    ffn_expand_factor: int = 4  # hidden width of the MLP over dim
    ffn_act: str = "silu"  # activation of the MLP: none relu gelu silu sigmoid tanh
    q_kernel: str = "none"  # feature map of queries: none relu relu2 elu1 silu exp softmax taylor
    k_kernel: str = "none"  # feature map of keys, as for queries
    v_kernel: str = "none"  # feature map of values, as for queries
    q_norm: str = "none"  # norm of each query after its feature map: none l2 l1 rms layer
    k_norm: str = "none"  # norm of each key after its feature map, as for queries
    q_gated: bool = False  # multiply queries by sigmoid(W x), after the norm
    k_gated: bool = False  # multiply keys by sigmoid(W x), after the norm
    att_use_output_gate: bool = False  # multiply the mixer's output by act(W x) before its last projection
    att_output_gate_act: str = "silu"  # activation of that gate, as for ffn_act
    residual_mul: bool = False  # x + f(norm x) * x instead of x + f(norm x)
    conv: int = 0  # width of a short causal convolution on queries, keys and values; 0: none
    pos: str = "rope"  # positions: rope, learned or none
    tie: bool = False  # the output head shares the embedding's weight
    init_std: float = 0.02  # standard deviation of the initial embedding; projections start as torch makes them
    chunk_size: int = 16  # delta models: tokens per chunk of the parallel form
    lr_temp: float = 1.0  # delta models: temperature of the write strength, sigmoid(z / lr_temp)
    vocab_size: int = derived(2048)
    seq_len: int = derived(128)

    def check(self):
        within(self, 1, 2**20, "dim", "n_layers", "n_heads", "dk", "dv", "du", "ffn_expand_factor", "chunk_size")
        within(self, 0, 2**20, "n_kv_heads", "conv")
        require(self.init_std > 0, "init_std must be above 0, or all tokens start the same", "init_std")
        one_of(self, ACTIVATIONS, "ffn_act", "att_output_gate_act")
        one_of(self, KERNELS, "q_kernel", "k_kernel", "v_kernel")
        one_of(self, NORMS, "q_norm", "k_norm")
        one_of(self, ("rope", "learned", "none"), "pos")
        require(self.lr_temp > 0, "lr_temp must be above 0", "lr_temp")
        require(self.use_att or self.use_ffn, "use_att=0 needs use_ffn=1: a block must hold something", "use_att")
        groups = self.n_kv_heads or self.n_heads
        require(self.n_heads % groups == 0, f"n_heads={self.n_heads} must be a multiple of n_kv_heads={groups}", "n_kv_heads")
        taylor = "taylor" in (self.q_kernel, self.k_kernel) and self.q_kernel != self.k_kernel
        require(not taylor, "taylor widens its input, so q_kernel and k_kernel must both be taylor or neither", "q_kernel")

    def unused(self):
        reasons = {}
        if not self.use_ffn:
            reasons |= dict.fromkeys(("ffn_expand_factor", "ffn_act"), "use_ffn is 0")
        if not self.att_use_output_gate:
            reasons["att_output_gate_act"] = "att_use_output_gate is 0"
        if not self.use_att:
            mixer = "n_heads n_kv_heads dk dv du q_kernel k_kernel v_kernel q_norm k_norm q_gated k_gated conv"
            reasons |= dict.fromkeys(mixer.split() + ["att_use_output_gate"], "use_att is 0")
        return reasons


# ---- tables of options -------------------------------------------------------------------------------------------------


def taylor(x):
    """exp's second-order Taylor feature map (Based, arXiv 2402.18668): (..., K) -> (..., 1 + K + K^2).

    phi(x).phi(y) = 1 + s + s^2/2 with s = x.y / sqrt(K).
    """
    width = x.shape[-1]
    x = x / width**0.25
    second = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2) / math.sqrt(2)
    return torch.cat([torch.ones_like(x[..., :1]), x, second], dim=-1)


def accum_dtype(x):
    """What sums over x are taken in: float32 for half precision, else x's own dtype."""
    return torch.promote_types(x.dtype, torch.float32)


def dot(x, y):
    """x.y over the last axis, which is kept; in float32 at least, under autocast too: (..., K) -> (..., 1)."""
    kind = accum_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        return torch.linalg.vecdot(x.to(kind), y.to(kind)).unsqueeze(-1)


def naive_l2_norm(x):
    """x / sqrt(|x|^2 + 1e-6) over the last axis, in float32 at least."""
    return x * torch.rsqrt(dot(x, x) + 1e-6)


class L2Normalize(Twinned):
    """naive_l2_norm with a backward that takes half as many passes over memory as autograd's."""

    twin = staticmethod(naive_l2_norm)

    @staticmethod
    def forward(ctx, x):
        scale = torch.rsqrt(dot(x, x) + 1e-6)
        y = x * scale
        ctx.save_for_backward(x, y, scale)
        ctx.dtype = x.dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        x, y, scale = ctx.saved_tensors
        if needs_twin():
            return twin_gradients(naive_l2_norm, ctx, (x,), dy)
        return torch.addcmul(dy, y, dot(y, dy), value=-1).mul_(scale).to(ctx.dtype)


KERNELS = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "elu1": lambda x: 1 + F.elu(x),  # linear attention, Katharopoulos et al. 2020
    "silu": F.silu,
    "exp": lambda x: (x - x.amax(-1, keepdim=True)).exp(),  # its largest feature is 1; exp alone overflows
    "softmax": lambda x: x.softmax(-1),  # over features
    "taylor": taylor,
}

NORMS = {
    "none": lambda x: x,
    "l2": lambda x: L2Normalize.apply(x),
    "l1": lambda x: x / (x.abs().sum(-1, keepdim=True) + 1e-6),  # "sum" norm of Schlag et al. 2021
    "rms": lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6),
    "layer": lambda x: F.layer_norm(x, x.shape[-1:]),
}

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def feature_width(kernel, width):
    """Width of a feature map's output."""
    return 1 + width + width**2 if kernel == "taylor" else width


# ---- small modules -----------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis (Zhang and Sennrich 2019)."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        y = x * torch.rsqrt(dot(x, x) / x.shape[-1] + 1e-6) * self.weight
        return y.to(self.weight.dtype)  # a model in half precision stays in it


def naive_convolution(x, w):
    """y_t = sum_j w_j * x_{t-j}, j = 0..width-1, for each channel; x (B, T, C), w (width, C)."""
    shifted = (F.pad(x, (0, 0, j, 0))[:, : x.shape[1]] for j in range(len(w)))
    return sum(w[j] * y for j, y in enumerate(shifted))


class CausalConv1d(Twinned):
    """naive_convolution by shifted multiply-adds into one buffer.

    On a CPU, forward and backward take less than half the time of the same sum left to autograd,
    and of nn.Conv1d.
    """

    twin = staticmethod(naive_convolution)

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        y = x * w[0]
        for j in range(1, min(len(w), x.shape[1])):
            y[:, j:].addcmul_(x[:, :-j], w[j])
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        if needs_twin():
            return twin_gradients(naive_convolution, ctx, (x, w), dy)
        dx, dw = dy * w[0], torch.zeros_like(w)
        for j in range(min(len(w), x.shape[1])):
            if j:
                dx[:, :-j].addcmul_(dy[:, j:], w[j])
            dw[j] = (dy[:, j:] * x[:, : x.shape[1] - j]).sum((0, 1))
        return dx, dw


class ShortConvolution(nn.Module):
    """Depthwise causal convolution on (B, T, C).

    It lets a token see its predecessor before any attention, which is what binds a key to the value after it. One
    convolution serves queries, keys and values side by side, since every channel is on its own.
    """

    def __init__(self, channels, width):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, channels).uniform_(-(width**-0.5), width**-0.5))

    def forward(self, x, cache=None, documents=None):
        """x (B, T, C) -> (B, T, C). cache, a dict, holds the tokens just before x from call to call, (B, width-1, C)."""
        weight = self.weight.to(x.dtype)
        if documents:
            return documents.join(CausalConv1d.apply(documents.split(x), weight))
        if cache is None:
            return CausalConv1d.apply(x, weight)
        before = cache.get("window", x.new_zeros(len(x), len(weight) - 1, x.shape[-1]))
        x = torch.cat([before, x], dim=1)
        cache["window"] = x[:, x.shape[1] - before.shape[1] :].clone()  # a view would keep all of x
        return CausalConv1d.apply(x, weight)[:, before.shape[1] :]


class MLP(nn.Module):
    """The block's MLP: D -> expand * D -> D."""

    def __init__(self, c):
        super().__init__()
        self.up = nn.Linear(c.dim, c.ffn_expand_factor * c.dim, bias=False)
        self.down = nn.Linear(c.ffn_expand_factor * c.dim, c.dim, bias=False)
        self.act = c.ffn_act

    def forward(self, x):
        return self.down(ACTIVATIONS[self.act](self.up(x)))


def gather_positions(x, rows):
    """The tokens of x (B, T, C) at positions rows (B, n) -> (B, n, C); all of them if rows is None."""
    return x if rows is None else x.gather(1, rows.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def fused_linear(x, *linears, then=lambda y: y):
    """Several bias-free projections of the same tokens as one matrix product, which is faster than one after another.

    `then` is applied to all of them side by side.
    """
    weight = torch.cat([m.weight for m in linears])
    return then(F.linear(x, weight)).split([m.out_features for m in linears], dim=-1)


def token_positions(x, cache=None, documents=None):
    """Positions of the tokens of x (B, T, D) in their documents, (B, T); None: 0..T-1."""
    if documents:
        return documents.position[None]
    if cache and cache["seen"]:
        return torch.arange(cache["seen"], cache["seen"] + x.shape[1], device=x.device).expand(len(x), -1)
    return None


def grown(cache, name, new):
    """cache[name] (B, earlier tokens, ...) with new (B, T, ...) behind it; it is kept, too."""
    # A copy even of the first: a view would keep all that was projected beside it.
    cache[name] = torch.cat([cache[name], new] if name in cache else [new], dim=1)
    return cache[name]


# ---- attention modules -------------------------------------------------------------------------------------------------


class CausalSelfAttention(nn.Module):
    """Multi-head causal softmax attention; queries, keys and values each go

        projection -> short convolution -> heads -> feature map -> norm -> gate -> rotary positions

    where every step but the projection is optional (and values have neither norm, gate nor positions). `rows` asks for
    the output at some positions only, (B, n): keys and values are still made from every token.
    """

    attend = staticmethod(softmax_attention)  # what looks inside puts its own function here for a while

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.heads, self.groups = c.n_heads, c.n_kv_heads or c.n_heads
        self.add_projections(c)
        key_width, value_width = self.widths(c)
        self.gate_q = nn.Linear(c.dim, self.heads * key_width, bias=False) if c.q_gated else None
        self.gate_k = nn.Linear(c.dim, self.groups * key_width, bias=False) if c.k_gated else None
        self.gate_out = nn.Linear(c.dim, self.heads * value_width, bias=False) if c.att_use_output_gate else None
        if c.pos == "rope":
            self.register_buffer("turns", rope_table(key_width, c.seq_len), persistent=False)
        self.out_proj = nn.Linear(self.heads * value_width, c.dim, bias=False)

    def _apply(self, fn, recurse=True):
        """What .to(), .double() and .bfloat16() call.

        They would round the positions, or add digits that are not there.
        """
        super()._apply(fn, recurse)
        if "turns" in self._buffers:
            T, pairs, _ = self.turns.shape
            self.turns = rope_table(2 * pairs, T, self.turns.dtype).to(self.turns.device)
        return self

    def add_projections(self, c):
        self.proj_q = nn.Linear(c.dim, self.heads * c.dk, bias=False)
        self.proj_k = nn.Linear(c.dim, self.groups * c.dk, bias=False)
        self.proj_v = nn.Linear(c.dim, self.groups * c.dv, bias=False)
        self.conv = ShortConvolution(self.channels(c), c.conv) if c.conv else None

    @staticmethod
    def channels(c):
        """Width of queries, keys and values side by side."""
        groups = c.n_kv_heads or c.n_heads
        return (c.n_heads + groups) * c.dk + groups * c.dv

    @staticmethod
    def widths(c):
        """Width per head of a key and of a value, after their feature maps."""
        return feature_width(c.k_kernel, c.dk), feature_width(c.v_kernel, c.dv)

    @classmethod
    def cached_width(cls, c):
        """Numbers per token and key/value head that must be kept to read on."""
        return sum(cls.widths(c))

    @classmethod
    def state_size(cls, c, tokens):
        """Numbers per row that must be kept of `tokens` tokens to read on: here, the cache."""
        return cls.cached_width(c) * (c.n_kv_heads or c.n_heads) * tokens

    @classmethod
    def describe_backend(cls, c, device, dtype):
        """Which kernel runs and why, as one line."""
        problem = why_no_flash(device, dtype, *cls.widths(c))
        if problem is None:
            return "flash-attn varlen; scaled_dot_product_attention for the labelled positions of the last block"
        return f"scaled_dot_product_attention ({problem})"

    def stored(self):
        """The projections that make what is stored of a token: keys and values."""
        return self.proj_k, self.proj_v

    def queries_keys_values(self, x, query_x, rows, cache=None, documents=None):
        """x (B, T, D), query_x = take(x, rows) -> q (B, n, H * dk), k (B, T, G * dk), v (B, T, G * dv).

        cache, documents: see ShortConv.
        """
        if rows is not None and not self.conv:
            q, stored = self.proj_q(query_x), fused_linear(x, *self.stored())
        else:  # a convolution needs the neighbours of the queries' tokens, too
            conv = (lambda y: self.conv(y, cache, documents)) if self.conv else (lambda y: y)
            q, *stored = fused_linear(x, self.proj_q, *self.stored(), then=conv)
            q = gather_positions(q, rows)
        return q, stored[0], stored[-1]

    def forward(self, x, rows=None, cache=None, documents=None):
        """x (B, T, D) -> (B, T, D), or (B, n, D) at the positions rows (B, n).

        cache: {"seen": 0} before the first token, then what was left there by earlier calls: what
        `remember` keeps of all tokens seen, and "window", what the convolution looks back on. It is
        brought up to date in place.
        documents: see softmax_attention; all of their tokens are queries, and rows are picked afterwards.
        """
        c = self.config
        query_rows = None if documents else rows
        query_x = gather_positions(x, query_rows)  # (B, n, D)
        q, k, v = self.queries_keys_values(x, query_x, query_rows, cache, documents)
        q = self.feature(q, self.heads, c.q_kernel, c.q_norm, self.gate_q, query_x)  # (B, n, H, K)
        at = token_positions(x, cache, documents)
        if c.pos == "rope":
            q = apply_rotary(q, self.turns, at if query_rows is None else query_rows)
        if cache is None:
            k, v = self.keys(k, x, at), self.values(v)
        else:
            k, v = self.remember(cache, k, v, x, at)
            query_rows = at
        o = self.attend(*(y.transpose(1, 2) for y in (q, k, v)), query_rows, documents)  # (B, H, n, V)
        o = gather_positions(o.transpose(1, 2).flatten(2), rows if documents else None)  # (B, n, H*V)
        if self.gate_out:
            o = o * ACTIVATIONS[c.att_output_gate_act](self.gate_out(gather_positions(x, rows)))
        return self.out_proj(o)

    def keys(self, k, x=None, at=None):
        """Projected keys (B, T, G * dk) of x (B, T, D) at positions `at` -> (B, T, G, K)."""
        c = self.config
        k = self.feature(k, self.groups, c.k_kernel, c.k_norm, self.gate_k, x)
        return apply_rotary(k, self.turns, at) if c.pos == "rope" else k

    def values(self, v):
        """Projected values (B, T, G * dv) -> (B, T, G, V), ready for use."""
        # exp and softmax widen bfloat16
        return self.feature(v, self.groups, self.config.v_kernel).to(v.dtype)

    def remember(self, cache, k, v, x, at):
        """Add projected keys and values to the cache -> those of all tokens seen, ready for use."""
        return grown(cache, "k", self.keys(k, x, at)), grown(cache, "v", self.values(v))

    @staticmethod
    def feature(x, heads, kernel, norm="none", gate=None, source=None):
        """(B, T, heads * width) -> (B, T, heads, width'): feature map, then norm, then gate."""
        x = NORMS[norm](KERNELS[kernel](x.unflatten(-1, (heads, -1))))
        return x * torch.sigmoid(gate(source)).unflatten(-1, (heads, -1)) if gate else x


class CausalSelfAttentionUnifiedKV(CausalSelfAttention):
    """Attention in which one vector u per head and token is both key and value: o_t = sum_s softmax_s(q_t.u_s) u_s.

    This is a Hopfield-style store with one bank of patterns: the cache is half as large, and a key can only answer with
    itself. The score uses a copy of u with k_kernel, k_norm, k_gated and rotary positions; the value copy has v_kernel
    only, so that what is read does not turn with its position. "Updatable Long-Term Memory" prints one projection of
    H * du, which another reading fits as well: a single key/value head of du + du under H query heads (multi-query
    attention) has the same parameter count. The one number `du` for key and value decides for the tied reading; the
    other one is `--model gpt --n_kv_heads 1`.
    """

    def add_projections(self, c):
        self.proj_q = nn.Linear(c.dim, self.heads * c.du, bias=False)
        self.proj_kv = nn.Linear(c.dim, self.groups * c.du, bias=False)
        self.conv = ShortConvolution(self.channels(c), c.conv) if c.conv else None

    @staticmethod
    def channels(c):
        return (c.n_heads + (c.n_kv_heads or c.n_heads)) * c.du

    @staticmethod
    def widths(c):
        return feature_width(c.k_kernel, c.du), feature_width(c.v_kernel, c.du)

    @classmethod
    def cached_width(cls, c):
        # Key and value are both made from u, but a gated key needs its token.
        return c.du + c.k_gated * cls.widths(c)[0]

    def remember(self, cache, k, v, x, at):
        """Keeps u, and makes keys and values anew from it; of a gated key, the key, too."""
        if self.gate_k:
            k = grown(cache, "k", self.keys(k, x, at))
        u = grown(cache, "u", v)
        return k if self.gate_k else self.keys(u), self.values(u)

    def stored(self):
        return (self.proj_kv,)


# ---- blocks and the trunk ----------------------------------------------------------------------------------------------


class GPTBlock(nn.Module):
    """Pre-norm block: x + att(norm x), then x + ffn(norm x), each part optional."""

    attention = CausalSelfAttention

    def __init__(self, c):
        super().__init__()
        self.residual_mul = c.residual_mul
        self.att_norm = RMSNorm(c.dim) if c.use_att else None
        self.att = self.attention(c) if c.use_att else None
        self.ffn_norm = RMSNorm(c.dim) if c.use_ffn else None
        self.ffn = MLP(c) if c.use_ffn else None

    def forward(self, x, rows=None, **extra):
        """(B, T, D) -> (B, T, D), or (B, n, D) at the positions rows (B, n). extra is handed on to the mixer."""
        y = gather_positions(x, rows)
        if self.att:
            y = self.add(y, self.att(self.att_norm(x), rows, **extra))
        if self.ffn:
            y = self.add(y, self.ffn(self.ffn_norm(y)))
        return y

    def add(self, x, change):
        return x + change * x if self.residual_mul else x + change


class UnifiedKVBlock(GPTBlock):
    attention = CausalSelfAttentionUnifiedKV


@torch._disable_dynamo  # sizes depend on the labels, so this part stays eager
def labelled_positions(targets):
    """Where the labels are: targets (B, T) -> rows (B, n), flat (N,), answers (N,), all long.

    n is the largest number of labels in a row of the batch; a row with fewer is padded. rows are positions in ascending
    order, flat picks the real labels from the flattened (B, n), row-major. If less than half of the work would be saved,
    rows is None and flat picks from (B, T) instead.
    """
    mask = targets != IGNORE_INDEX
    answers = targets[mask]
    count = mask.sum(1)
    # A batch without labels, or without rows, has a loss of 0.
    n = max(1, int(count.max()) if len(count) else 0)
    if 2 * n > targets.shape[1]:
        return None, mask.flatten().nonzero().squeeze(1), answers
    rows = mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :n]
    used = torch.arange(n, device=targets.device) < count[:, None]  # (B, n)
    return rows, used.flatten().nonzero().squeeze(1), answers


def naive_cross_entropy(logits, answers):
    """Mean cross-entropy of logits (N, V) float against answers (N,); 0 if N is 0."""
    log_p = logits.log_softmax(-1)
    return -log_p.gather(1, answers[:, None]).sum() / max(1, len(answers))


class CrossEntropy(Twinned):
    """naive_cross_entropy with a leaner backward.

    The gradient is (softmax - one_hot) / N, written in one buffer; torch's own first fills an (N, V) gradient of the log
    probabilities with zeros. Worth 5% of a training step on a CPU.
    """

    twin = staticmethod(naive_cross_entropy)

    @staticmethod
    def forward(ctx, logits, answers):
        log_p = logits.log_softmax(-1)
        ctx.save_for_backward(logits, log_p, answers)
        return -log_p.gather(1, answers[:, None]).sum() / max(1, len(answers))

    @staticmethod
    def backward(ctx, grad):
        logits, log_p, answers = ctx.saved_tensors
        if needs_twin():
            return twin_gradients(naive_cross_entropy, ctx, (logits, answers), grad)
        p = log_p.exp()
        p[torch.arange(len(p), device=p.device), answers] -= 1
        return p.mul_(grad / max(1, len(p))), None


class GPT(nn.Module):
    """The trunk: embedding, blocks, norm, output head.

    forward(tokens (B, T), targets (B, T) or None) -> (logits, loss). Without targets, logits are (B, T, vocabulary) and
    loss is None. With targets, only positions whose target is not -100 are scored: the last block and the head run on
    those positions alone, logits are (N, vocabulary) in row-major order and loss is their mean cross-entropy.
    With cu_seqlens (R + 1,) integers, B is 1 and the row holds R documents end to end, which know nothing of each other.
    """

    block = GPTBlock
    inactive_settings = {  # setting: why it has no effect here
        "du": "only unified_kv has it",
        "chunk_size": "only delta models have it",
        "lr_temp": "only delta models have it",
    }

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.embed = nn.Embedding(c.vocab_size, c.dim)
        self.pos_embed = nn.Embedding(c.seq_len, c.dim) if c.pos == "learned" else None
        self.layers = nn.ModuleList(self.block(c) for _ in range(c.n_layers))
        self.final_norm = RMSNorm(c.dim)
        self.lm_head = nn.Linear(c.dim, c.vocab_size, bias=False)
        nn.init.normal_(self.embed.weight, std=c.init_std)
        if self.pos_embed:
            nn.init.normal_(self.pos_embed.weight, std=c.init_std)
        if c.tie:
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens, targets=None, cu_seqlens=None, **extra):
        """extra is handed on to the blocks."""
        rows, flat, answers = (None, None, None) if targets is None else labelled_positions(targets)
        documents = None if cu_seqlens is None else PackedDocuments(cu_seqlens, tokens)
        x = self.embedded(tokens, documents=documents)  # (B, T, D)
        extra |= {"documents": documents} if documents else {}
        for layer in self.layers[:-1]:
            x = layer(x, **extra)
        x = self.layers[-1](x, rows, **extra)  # (B, n, D)
        if targets is None:
            return self.lm_head(self.final_norm(x)), None
        logits = self.lm_head(self.final_norm(x.flatten(0, 1)[flat]))  # (N, vocabulary)
        return logits, CrossEntropy.apply(logits.to(accum_dtype(logits)), answers)

    def embedded(self, tokens, cache=None, documents=None):
        """tokens (B, T) -> (B, T, D), with learned positions if it has them"""
        x = self.embed(tokens)
        if self.pos_embed:
            at = token_positions(x, cache, documents)
            x = x + (self.pos_embed.weight[: tokens.shape[1]] if at is None else self.pos_embed(at))
        return x

    @torch.no_grad()
    def read(self, tokens, cache=None):
        """The forward pass with a cache: tokens (B, T) after everything it has seen -> logits (B, T, vocabulary), new cache.

        cache is None before the first token; else what an earlier call returned, which stays as it was, so that several
        continuations can start from it. T may be 1 (decoding) or a whole prompt (prefill), and the logits are those of one
        forward pass over all tokens; no gradients. ValueError beyond seq_len, where a model has positions.
        """
        c = self.config
        mixer = self.mixer()
        message = f"it cannot read on: {mixer.__name__} has no state_size, so it keeps no cache"
        require(not c.use_att or hasattr(mixer, "state_size"), message, None)
        cache = [{"seen": 0} for _ in self.layers] if cache is None else [dict(m) for m in cache]
        end = cache[0]["seen"] + tokens.shape[1]
        if end > c.seq_len and c.pos != "none":
            raise ValueError(f"the model has positions for {c.seq_len} tokens, not for {end}")
        x = self.embedded(tokens, cache[0])
        for layer, m in zip(self.layers, cache):
            x = layer(x, cache=m)
            m["seen"] = end
        return self.lm_head(self.final_norm(x)), cache

    @classmethod
    def mixer(cls):
        """The class of its mixers; of a block that has no `attention`, the block itself."""
        return getattr(cls.block, "attention", cls.block)

    @classmethod
    def inference_state_bytes(cls, config):
        """Bytes of float32 per row that must be kept to read on after seq_len tokens.

        None if the mixer does not say what it keeps.
        """
        c, mixer = config, cls.mixer()
        if not c.use_att:
            return 0
        if not hasattr(mixer, "state_size"):
            return None
        # what the short convolution looks back on
        window = max(0, c.conv - 1) * mixer.channels(c) if hasattr(mixer, "channels") else 0
        return 4 * c.n_layers * (mixer.state_size(c, c.seq_len) + window)

    @classmethod
    def label(cls, c):
        """The model's part of a run's name: sizes, then kernel, norm and gate of queries and keys, kernel of values."""
        k, v = (c.du, c.du) if issubclass(cls, UnifiedKV) else (c.dk, c.dv)
        q_and_k = f"q-{k}-{c.q_kernel}-{c.q_norm}-{int(c.q_gated)}_k-{k}-{c.k_kernel}-{c.k_norm}-{int(c.k_gated)}"
        blocks = f"L{c.n_layers}-D{c.dim}_FF{int(c.use_ffn)}_OG{int(c.att_use_output_gate)}_H{c.n_heads}"
        return f"{blocks}_{q_and_k}_v-{v}-{c.v_kernel}"

    @classmethod
    def describe_backend(cls, config, device, dtype):
        """Which kernel the mixer runs and why, as one line."""
        mixer = cls.mixer()
        if not config.use_att:
            return "none (use_att is 0)"
        named = hasattr(mixer, "describe_backend")
        return mixer.describe_backend(config, device, dtype) if named else mixer.__name__


class UnifiedKV(GPT):
    """GPT with one vector per head and token as key and value: see CausalSelfAttentionUnifiedKV."""

    block = UnifiedKVBlock
    inactive_settings = dict.fromkeys(("dk", "dv"), "only gpt has it; unified_kv has du")
    inactive_settings |= {name: GPT.inactive_settings[name] for name in ("chunk_size", "lr_temp")}


Model = GPT  # what `--model model` names


@contextlib.contextmanager
def evaluating(model):
    """Eval mode for a while. Then every module has its own mode again, also after an error."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def in_eval_mode(work):
    """A decorator for work(model, ...): it runs in `evaluating`, without gradients."""

    @functools.wraps(work)
    def quiet(model, *args, **kwargs):
        with evaluating(model), torch.no_grad():
            return work(model, *args, **kwargs)

    return quiet


def correct_predictions(logits, targets):
    """Which labelled positions are right: logits (N, vocabulary), targets (B, T) -> (tokens (N,) bool, rows (B,) bool).

    A row is right if all of its labels are: exact match. A row without labels counts as right.
    """
    mask = targets != IGNORE_INDEX
    hit = torch.ones_like(mask)
    hit[mask] = logits.argmax(-1) == targets[mask]
    return hit[mask], hit.all(1)
