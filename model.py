"""GPT and UnifiedKV: a transformer whose parts are all options.

    python train.py configs/mqar_gpt.py              # keys and values of their own
    python train.py configs/mqar_unified_kv.py       # one vector is both key and value

Settings have the names that they have in "Updatable Long-Term Memory" (README, Sources).

Read from top to bottom: settings, tables of options, small modules, the two attention modules, the
block, the model. Delta-rule and memory models (delta.py, memory.py) reuse the model and replace the
block. The operators are in nanorecall/ops.py and nanorecall/attention.py.

Letters: B batch, T tokens, n queried positions, N labelled positions, D model width, C channels,
H query heads, G key/value heads, K key width per head, V value width per head, R documents.
"""

import inspect
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from nanorecall import attention, ops
from nanorecall.settings import derived, one_of, require, within


@dataclass
class Config:
    dim: int = 64  # width of the residual stream
    n_layers: int = 4  # number of blocks
    n_heads: int = 2  # query heads
    n_kv_heads: int = 0  # key/value heads, each shared by a group of query heads; 0: n_heads
    dk: int = 64  # width of a query or key per head; unified_kv has du
    dv: int = 64  # width of a value per head
    du: int = 64  # unified_kv: width of the one vector per head that is key and value
    use_att: bool = True  # a sequence mixer (attention or another) in every block
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
    att_use_output_gate: bool = False  # multiply the mixer's output by act(W x) before out_proj
    att_output_gate_act: str = "silu"  # activation of that gate, as for ffn_act
    residual_mul: bool = False  # x + f(norm x) * x instead of x + f(norm x)
    window: int = 0  # tokens that attention sees, the query's own and those before; 0: all
    conv_size: int = 0  # width of a short causal convolution on queries, keys and values; 0: none
    pos_emb: str = "rope"  # positions: rope, learned or none
    tie_weights: bool = False  # the output head shares the embedding's weight
    init_std: float = 0.02  # of the initial embedding; projections start as torch makes them
    chunk_size: int = 16  # delta, linear: tokens per chunk of the parallel form
    lr_temp: float = 1.0  # delta models: a token is written with strength sigmoid(z / lr_temp)
    vocab_size: int = derived(2048)
    seq_len: int = derived(128)

    def check(self):
        within(self, 1, 2**20, "dim", "n_layers", "n_heads", "dk", "dv", "du")
        within(self, 1, 2**20, "ffn_expand_factor", "chunk_size")
        within(self, 0, 2**20, "n_kv_heads", "window", "conv_size")
        one_of(self, ACTIVATIONS, "ffn_act", "att_output_gate_act")
        one_of(self, FEATURE_MAPS, "q_kernel", "k_kernel", "v_kernel")
        one_of(self, NORMS, "q_norm", "k_norm")
        one_of(self, ("rope", "learned", "none"), "pos_emb")
        message = "init_std must be above 0, or all tokens start the same"
        require(self.init_std > 0, message, "init_std")
        require(self.lr_temp > 0, "lr_temp must be above 0", "lr_temp")
        message = "use_att=0 needs use_ffn=1: a block must hold something"
        require(self.use_att or self.use_ffn, message, "use_att")
        n_kv = self.n_kv_heads or self.n_heads
        message = f"n_heads={self.n_heads} must be a multiple of n_kv_heads={n_kv}"
        require(self.n_heads % n_kv == 0, message, "n_kv_heads")
        message = "taylor widens its input, so q_kernel and k_kernel must both be taylor or neither"
        require((self.q_kernel == "taylor") == (self.k_kernel == "taylor"), message, "q_kernel")

    def unused(self):
        """{setting without effect: why}"""
        reasons = {}
        if not self.use_ffn:
            reasons |= dict.fromkeys(("ffn_expand_factor", "ffn_act"), "use_ffn is 0")
        if not self.att_use_output_gate:
            reasons["att_output_gate_act"] = "att_use_output_gate is 0"
        if not self.use_att:
            names = ["n_heads", "n_kv_heads", "dk", "dv", "du", "q_kernel", "k_kernel", "v_kernel"]
            names += ["q_norm", "k_norm", "q_gated", "k_gated", "window", "conv_size"]
            names += ["att_use_output_gate"]
            reasons |= dict.fromkeys(names, "use_att is 0")
        return reasons


# ---- tables of options: a new one is a line here, and its name a value of the setting ------------


def taylor(x):
    """exp's second-order Taylor feature map (Based, arXiv 2402.18668): K -> 1 + K + K^2 features.

    phi(x).phi(y) = 1 + s + s^2/2 with s = x.y / sqrt(K).
    """
    width = x.shape[-1]
    # sqrt(sqrt(K)) on both sides gives the usual sqrt(K) in the score
    x = x / width**0.25
    # all K^2 products; |x y^T|^2 = s^2, and the series wants half of it
    second = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2) / math.sqrt(2)  # (..., K^2)
    return torch.cat([torch.ones_like(x[..., :1]), x, second], dim=-1)


# Over the last axis, a vector per head. The delta rule and linear attention score a query and a key
# by the product of their features. With relu, elu1 and exp it is never negative, as in softmax.
FEATURE_MAPS = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "elu1": lambda x: 1 + F.elu(x),  # linear attention, Katharopoulos et al. 2020
    "silu": F.silu,
    "exp": lambda x: (x - x.amax(-1, keepdim=True)).exp(),  # largest feature 1: exp alone overflows
    "softmax": lambda x: x.softmax(-1),
    "taylor": taylor,
}

# Of a vector after its feature map. Keys of length 1 keep the delta rule stable. Attention's scores
# are bounded if queries and keys have a fixed length. 1e-6 avoids a division by zero.
NORMS = {
    "none": lambda x: x,
    "l2": ops.l2_normalize,
    "l1": lambda x: x / (x.abs().sum(-1, keepdim=True) + 1e-6),  # "sum" norm, Schlag et al. 2021
    "rms": ops.rms_normalize,
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
    """Number of features that a feature map makes of `width`."""
    return 1 + width + width**2 if kernel == "taylor" else width


# ---- small modules -------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis (Zhang and Sennrich 2019).

    Not nn.RMSNorm, which is slower here and prints as RMSNorm((64,), ...); the module tree in
    "Updatable Long-Term Memory" has RMSNorm().
    """

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        # It sums in float32, since squares of large activations overflow float16. On a CPU this
        # takes about 60% of the time of F.rms_norm, forward and backward.
        y = ops.rms_normalize(x) * self.weight
        return y.to(self.weight.dtype)  # a model in half precision stays in it


class ShortConvolution(nn.Module):
    """Depthwise causal convolution on (B, T, C).

    Queries, keys and values then also depend on the few tokens before their own. In MQAR this binds
    a value to the key before it, for which attention alone needs a layer.
    """

    def __init__(self, channels, width):
        super().__init__()
        bound = width**-0.5  # as nn.Conv1d starts
        self.weight = nn.Parameter(torch.empty(width, channels).uniform_(-bound, bound))

    def forward(self, x, cache=None, documents=None):
        """x (B, T, C) -> (B, T, C). cache["conv_state"]: the width - 1 tokens before x."""
        weight = self.weight.to(x.dtype)  # x is bfloat16 under autocast
        if documents:
            # Documents are padded to a sequence each, or the first tokens of one would see the end
            # of the one before.
            return documents.pack(ops.causal_conv1d(documents.pad(x), weight))
        if cache is None:
            return ops.causal_conv1d(x, weight)
        n_before = len(weight) - 1
        before = cache.get("conv_state", x.new_zeros(len(x), n_before, x.shape[-1]))
        x = torch.cat([before, x], dim=1)
        cache["conv_state"] = x[:, x.shape[1] - n_before :].clone()  # a view would keep all of x
        return ops.causal_conv1d(x, weight)[:, n_before:]


class MLP(nn.Module):
    """D -> expand * D -> D, for each token alone."""

    def __init__(self, c):
        super().__init__()
        # There are no biases here and in attention, as in Llama.
        self.up = nn.Linear(c.dim, c.ffn_expand_factor * c.dim, bias=False)
        self.down = nn.Linear(c.ffn_expand_factor * c.dim, c.dim, bias=False)
        self.act = c.ffn_act

    def forward(self, x):
        return self.down(ACTIVATIONS[self.act](self.up(x)))


# ---- attention -----------------------------------------------------------------------------------


class CausalSelfAttention(nn.Module):
    """Multi-head causal softmax attention; queries, keys and values each go

        projection -> short convolution -> heads -> feature map -> norm -> gate -> rotary positions

    where every step but the projection is optional, and values have neither norm, gate nor
    positions.
    """

    attention_fn = staticmethod(attention.softmax_attention)  # `eval.py attention` wraps it
    has_positions = property(lambda self: "rope" in self._buffers)

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.n_heads = c.n_heads
        if self.attention_fn:
            attention.check_signature(self.attention_fn, c.window)
        # Fewer key/value heads than query heads make the cache smaller (grouped-query attention).
        self.n_kv_heads = c.n_kv_heads or c.n_heads
        self.add_projections(c)
        self.conv = ShortConvolution(self.qkv_dim(c), c.conv_size) if c.conv_size else None
        # widths after the feature maps: taylor makes vectors wider
        K, V = self.head_dims(c)
        self.gate_q = nn.Linear(c.dim, self.n_heads * K, bias=False) if c.q_gated else None
        self.gate_k = nn.Linear(c.dim, self.n_kv_heads * K, bias=False) if c.k_gated else None
        self.gate_out = None
        if c.att_use_output_gate:
            self.gate_out = nn.Linear(c.dim, self.n_heads * V, bias=False)
        if c.pos_emb == "rope":
            # Not in the checkpoint: it can be computed again, and would not fit a longer seq_len.
            self.register_buffer("rope", attention.rope_table(K, c.seq_len), persistent=False)
        self.out_proj = nn.Linear(self.n_heads * V, c.dim, bias=False)

    def add_projections(self, c):
        self.proj_q = nn.Linear(c.dim, self.n_heads * c.dk, bias=False)
        self.proj_k = nn.Linear(c.dim, self.n_kv_heads * c.dk, bias=False)
        self.proj_v = nn.Linear(c.dim, self.n_kv_heads * c.dv, bias=False)

    def kv_projections(self):
        """In the order in which `qkv` returns their outputs."""
        return self.proj_k, self.proj_v

    def _apply(self, fn, recurse=True):
        """What .to(), .double() and .bfloat16() call."""
        super()._apply(fn, recurse)
        # Cast to bfloat16, the table would mix up far positions; cast to float64, it would still
        # have float32's errors. So it is computed again.
        if "rope" in self._buffers:
            T, half_width, _ = self.rope.shape
            table = attention.rope_table(2 * half_width, T, self.rope.dtype)
            self.rope = table.to(self.rope.device)
        return self

    def forward(self, x, query_pos=None, cache=None, documents=None):
        """x (B, T, D) -> (B, T, D), or (B, n, D) at the positions query_pos (B, n).

        cache: {"seen": 0} before the first token, then what earlier calls left there; updated in
        place. documents (PackedDocuments): no token sees another document.
        """
        c = self.config
        output_pos = query_pos
        if documents or attention.prefers_all_queries(query_pos, x.shape[1], c.window):
            # The operators for packed documents and for a window take every token as a query. So
            # all outputs are computed, and output_pos are picked from them at the end.
            query_pos = None
        query_x = ops.gather_positions(x, query_pos)  # (B, n, D)
        q, k, v = self.qkv(x, query_x, query_pos, cache, documents)
        positions = ops.token_positions(x, cache, documents)
        q = self.split_heads(q, self.n_heads, c.q_kernel, c.q_norm, self.gate_q, query_x)
        if c.pos_emb == "rope":
            # After the rotation, the product of a query and a key depends on their positions only
            # by the distance between them.
            q = attention.apply_rotary(q, self.rope, positions if query_pos is None else query_pos)
        # Keys and values are computed for all tokens, queries maybe not: (B, T, G, K or V).
        if cache is None:
            k = self.keys(k, x, positions)
            v = self.values(v)
        else:
            k, v = self.update_cache(cache, k, v, x, positions)
            # k and v now cover earlier tokens, too, so the mask needs the positions of the queries
            # among them. With a window, the earliest tokens have left the cache.
            if positions is not None:
                query_pos = positions - self.first_cached(cache, x, k)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, H or G, n or T, K or V)
        # The attention function of a fork need not know windows.
        options = {"window": c.window} if c.window else {}
        o = self.attention_fn(q, k, v, query_pos, documents, **options)  # (B, H, n, V)
        attention.check_output(self.attention_fn, o, q, v)
        o = o.transpose(1, 2).flatten(2)  # (B, n, H*V)
        if query_pos is None:
            o = ops.gather_positions(o, output_pos)
        if self.gate_out:
            z = self.gate_out(ops.gather_positions(x, output_pos))
            o = o * ACTIVATIONS[c.att_output_gate_act](z)
        return self.out_proj(o)

    def qkv(self, x, query_x, query_pos, cache, documents):
        """x (B, T, D) -> q (B, n, H*dk) at query_pos, k (B, T, G*dk), v (B, T, G*dv)."""
        kv = self.kv_projections()
        widths = [m.out_features for m in kv]
        if query_pos is not None and not self.conv:
            # the last block in training: only labelled tokens need a query
            return self.proj_q(query_x), *ops.fused_linear(x, *kv).split(widths, dim=-1)
        y = ops.fused_linear(x, self.proj_q, *kv)  # (B, T, C)
        if self.conv:
            # A query's convolution reads the tokens before it, so queries are picked afterwards.
            # It is depthwise, so one convolution serves q, k and v side by side.
            y = self.conv(y, cache, documents)
        q, *kv = y.split([self.proj_q.out_features, *widths], dim=-1)
        return ops.gather_positions(q, query_pos), *kv

    def keys(self, k, x=None, positions=None):
        """Projected keys (B, T, G*dk) of x (B, T, D) -> (B, T, G, K)."""
        c = self.config
        k = self.split_heads(k, self.n_kv_heads, c.k_kernel, c.k_norm, self.gate_k, x)
        return attention.apply_rotary(k, self.rope, positions) if c.pos_emb == "rope" else k

    def values(self, v):
        """Projected values (B, T, G*dv) -> (B, T, G, V)."""
        # Back to v's dtype: under autocast exp and softmax return float32. Queries and keys stay in
        # it for the rotation, and softmax_attention casts them.
        return self.split_heads(v, self.n_kv_heads, self.config.v_kernel).to(v.dtype)

    @staticmethod
    def split_heads(x, n_heads, kernel, norm="none", gate=None, gate_x=None):
        """(B, T, heads * width) -> (B, T, heads, features): feature map, then norm, then gate."""
        x = x.unflatten(-1, (n_heads, -1))
        x = NORMS[norm](FEATURE_MAPS[kernel](x))
        if gate:
            x = x * torch.sigmoid(gate(gate_x)).unflatten(-1, (n_heads, -1))
        return x

    def update_cache(self, cache, k, v, x, positions):
        """Add projected keys and values to the cache -> keys and values of all it holds."""
        # Keys are stored after norm and rotation, so a new token computes one key and one value.
        window = self.config.window
        k = ops.append_to_cache(cache, "k", self.keys(k, x, positions), window)
        v = ops.append_to_cache(cache, "v", self.values(v), window)
        return k, v

    @staticmethod
    def first_cached(cache, x, k):
        """Position of the first of the keys k (B, keys, ...), of which the tokens x are the last"""
        return cache["seen"] + x.shape[1] - k.shape[1]

    @staticmethod
    def head_dims(c):
        """Width per head of a key and of a value, after their feature maps."""
        return feature_width(c.k_kernel, c.dk), feature_width(c.v_kernel, c.dv)

    @staticmethod
    def qkv_dim(c):
        """Width of queries, keys and values side by side."""
        n_kv = c.n_kv_heads or c.n_heads
        return (c.n_heads + n_kv) * c.dk + n_kv * c.dv

    @classmethod
    def describe_backend(cls, c, device, dtype):
        if cls.attention_fn is not attention.softmax_attention:
            return attention.describe_function(cls.attention_fn)
        problem = attention.why_no_flash(device, dtype, *cls.head_dims(c))
        if problem:
            return f"scaled_dot_product_attention ({problem})"
        at_labels = "scaled_dot_product_attention for the labelled positions of the last block"
        return f"flash-attn varlen; {at_labels}"


class CausalSelfAttentionUnifiedKV(CausalSelfAttention):
    """Attention with one vector u per head and token as key and value: o_t = sum_s p_ts u_s.

    As in a Hopfield network, a query reads the same vectors that it is compared with. The cache is
    half as large as with separate keys and values of that width. k_kernel, k_norm, k_gated and
    rotary positions apply to u as a key only, v_kernel to u as a value.

    "Updatable Long-Term Memory" shows only the size of the projection, H * du. With H = 2 that also
    fits a single key/value head with a key and a value of its own, which is
    `--model gpt --n_kv_heads 1`. We tie key and value, since there is one width, du, for both.
    """

    def add_projections(self, c):
        self.proj_q = nn.Linear(c.dim, self.n_heads * c.du, bias=False)
        self.proj_kv = nn.Linear(c.dim, self.n_kv_heads * c.du, bias=False)

    def kv_projections(self):
        return (self.proj_kv,)

    def qkv(self, *inputs):
        q, u = super().qkv(*inputs)
        return q, u, u

    def update_cache(self, cache, k, v, x, positions):
        """Stores u alone, and makes keys and values from it."""
        # This takes half the memory, but computes all keys and values again for every new token. A
        # gated key also depends on x, which is not stored, so the key is stored as well.
        window = self.config.window
        u = ops.append_to_cache(cache, "u", v, window)
        if self.gate_k:
            k = ops.append_to_cache(cache, "k", self.keys(k, x, positions), window)
        else:
            u_pos = ops.token_positions(u, {"seen": self.first_cached(cache, x, u)})
            k = self.keys(u, positions=u_pos)
        return k, self.values(u)

    @staticmethod
    def head_dims(c):
        return feature_width(c.k_kernel, c.du), feature_width(c.v_kernel, c.du)

    @staticmethod
    def qkv_dim(c):
        return (c.n_heads + (c.n_kv_heads or c.n_heads)) * c.du


# ---- block and model -----------------------------------------------------------------------------


def takes(module, option):
    """Does a mixer's forward have this parameter: query_pos, cache or documents?"""
    return option in inspect.signature(module.forward).parameters


def check_mixer_output(mixer, y, x):
    """ConfigError unless the output y of a mixer is a tensor of the shape of its input x."""
    found = f"a tensor {tuple(y.shape)}" if torch.is_tensor(y) else f"a {type(y).__name__}"
    message = f"the mixer {type(mixer).__name__} takes (B, T, D) = {tuple(x.shape)}"
    require(torch.is_tensor(y) and y.shape == x.shape, f"{message} and returns {found}", None)


class GPTBlock(nn.Module):
    """Pre-norm block: x + att(norm x), then x + ffn(norm x), each optional.

    `mixer` may be any class of causal modules (B, T, D) -> (B, T, D), made from a Config. If its
    forward also takes query_pos, cache or documents (see CausalSelfAttention.forward), it gets
    them. If not, the model refuses to decode, or to train on packed documents.
    """

    mixer = CausalSelfAttention

    def __init__(self, c):
        super().__init__()
        self.residual_mul = c.residual_mul
        # Norms stand before the modules, not after: the residual stream stays a plain sum, through
        # which gradients reach the first block unchanged.
        self.att_norm = RMSNorm(c.dim) if c.use_att else None
        self.att = self.mixer(c) if c.use_att else None
        self.att_takes_query_pos = c.use_att and takes(self.att, "query_pos")
        self.ffn_norm = RMSNorm(c.dim) if c.use_ffn else None
        self.ffn = MLP(c) if c.use_ffn else None

    def forward(self, x, query_pos=None, **options):
        """x (B, T, D) -> (B, T, D), or (B, n, D) at query_pos; options are for the mixer."""
        # The mixer reads all of x, but the residual stream goes on at query_pos alone.
        y = ops.gather_positions(x, query_pos)  # (B, n, D)
        if self.att is not None:
            y = self.add(y, self.mix(self.att_norm(x), query_pos, **options))
        if self.ffn is not None:
            y = self.add(y, self.ffn(self.ffn_norm(y)))
        return y

    def mix(self, x, query_pos=None, **options):
        """The mixer's output at query_pos: (B, n, D)"""
        if self.att_takes_query_pos:
            return self.att(x, query_pos, **options)
        # A plain mixer computes all positions: the same result, only slower in the last block.
        y = self.att(x, **options)
        # Added to the residual stream, an output of (B, T, 1) would pass for one of (B, T, D).
        check_mixer_output(self.att, y, x)
        return ops.gather_positions(y, query_pos)

    def add(self, x, change):
        # residual_mul is an experiment: each feature of x scales the change that is added to it
        return x + change * x if self.residual_mul else x + change


class UnifiedKVBlock(GPTBlock):
    mixer = CausalSelfAttentionUnifiedKV


NEEDS_DOCUMENTS = "packed documents need a mixer that keeps them apart"


class GPT(nn.Module):
    """Embedding, blocks, norm, output head.

    forward(tokens (B, T), targets (B, T) or None) -> (logits, loss). Without targets, logits are
    (B, T, vocabulary) and loss is None. With targets, only positions whose target is not -100 are
    scored: logits are (N, vocabulary) in row-major order, loss is their mean cross-entropy.
    With cu_seqlens (R + 1,), B is 1 and the sequence holds R documents, with no attention across
    them. Other keyword arguments go to the blocks.
    """

    block = GPTBlock
    inactive_settings = {"du": "only unified_kv has it"}  # setting: why it has no effect here
    inactive_settings["chunk_size"] = "only models with a recurrent state have it"
    inactive_settings["lr_temp"] = "only delta models have it"

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.embed = nn.Embedding(c.vocab_size, c.dim)
        self.pos_embed = nn.Embedding(c.seq_len, c.dim) if c.pos_emb == "learned" else None
        self.layers = nn.ModuleList(self.make_layers(c))
        self.final_norm = RMSNorm(c.dim)
        self.lm_head = nn.Linear(c.dim, c.vocab_size, bias=False)
        # torch's own std of 1 would give large first logits where the head shares this weight
        nn.init.normal_(self.embed.weight, std=c.init_std)
        if self.pos_embed:
            nn.init.normal_(self.pos_embed.weight, std=c.init_std)
        if c.tie_weights:
            # one parameter with two names, which the checkpoint holds once
            self.lm_head.weight = self.embed.weight

    def make_layers(self, c):
        """The blocks, of one kind; hybrid.py has several."""
        return [self.block(c) for _ in range(c.n_layers)]

    def forward(self, tokens, targets=None, cu_seqlens=None, **options):
        query_pos = documents = None
        if targets is not None:
            # The CPU waits here until the GPU has counted the labels. So this comes first: later,
            # it would also have to wait for all work queued before.
            query_pos, label_index, labels = ops.labelled_positions(targets)
        if cu_seqlens is not None:
            self.require_mixers("documents", NEEDS_DOCUMENTS)
            documents = options["documents"] = ops.PackedDocuments(cu_seqlens, tokens)
        x = self.embed_tokens(tokens, documents=documents)  # (B, T, D)
        for layer in self.layers[:-1]:
            x = layer(x, **options)
        # Nothing after the last block's keys and values mixes tokens, so only labelled positions
        # are computed. In MQAR they are few, and the head has as many weights as all blocks.
        x = self.layers[-1](x, query_pos, **options)  # (B, n, D)
        if targets is None:
            return self.lm_head(self.final_norm(x)), None
        # Sequences may differ in their number of labels. label_index leaves the padding out.
        x = x.flatten(0, 1)[label_index]  # (N, D)
        logits = self.lm_head(self.final_norm(x))  # (N, vocabulary)
        return logits, ops.cross_entropy(logits, labels)

    def embed_tokens(self, tokens, cache=None, documents=None):
        """tokens (B, T) -> (B, T, D), with learned positions if it has them"""
        x = self.embed(tokens)
        if self.pos_embed:
            positions = ops.token_positions(x, cache, documents)
            if positions is None:  # a slice is faster than a lookup, and serves all sequences
                x = x + self.pos_embed.weight[: tokens.shape[1]]
            else:
                x = x + self.pos_embed(positions)
        return x

    @torch.no_grad()
    def forward_cached(self, tokens, cache=None):
        """tokens (B, T) that follow those of the cache -> logits (B, T, vocabulary), new cache.

        The logits are those of one forward pass over all tokens. cache is None before the first
        token, else what an earlier call returned; that stays as it was, so that several
        continuations can start from it. T may be 1 (decoding) or a whole prompt (prefill).
        ValueError beyond seq_len, where a model has positions.
        """
        if cache is None:
            self.require_mixers("cache", "decoding needs a mixer with a cache")
            cache = [{"seen": 0} for _ in self.layers]
        # Mixers put new tensors in and change none in place, so copies of the dicts are enough.
        cache = [dict(of_layer) for of_layer in cache]
        end = cache[0]["seen"] + tokens.shape[1]
        if end > self.config.seq_len and self.has_positions():
            known = f"the model has positions for {self.config.seq_len} tokens"
            raise ValueError(f"{known}, not for {end}")
        x = self.embed_tokens(tokens, cache[0])
        for layer, of_layer in zip(self.layers, cache):
            x = layer(x, cache=of_layer)
            of_layer["seen"] = end  # only now, since the layer takes its positions from it
        return self.lm_head(self.final_norm(x)), cache

    def has_positions(self):
        """Does the embedding or any mixer tell positions apart, up to seq_len?

        A mixer of one's own with a table of positions says so: has_positions = True.
        """
        parts = (part for layer in self.layers for part in layer.modules())
        return self.pos_embed is not None or any(getattr(p, "has_positions", False) for p in parts)

    def require_mixers(self, option, why):
        """ConfigError unless every mixer takes this option.

        A block without `att` counts as its own mixer.
        """
        for layer in self.layers:
            mixer = getattr(layer, "att", layer)
            message = f"{why}: the forward of {type(mixer).__name__} does not take {option}"
            require(mixer is None or takes(mixer, option), message, None)

    @classmethod
    def describe_backend(cls, c, device, dtype):
        """Which kernel the mixer runs and why, as one line."""
        mixer = getattr(cls.block, "mixer", cls.block)
        if not c.use_att:
            return "none (use_att is 0)"
        if not hasattr(mixer, "describe_backend"):
            return mixer.__name__
        return mixer.describe_backend(c, device, dtype)


class UnifiedKV(GPT):
    """GPT with one vector per head and token as key and value: see CausalSelfAttentionUnifiedKV."""

    block = UnifiedKVBlock
    inactive_settings = dict.fromkeys(("dk", "dv"), "only gpt has it; unified_kv has du")
    inactive_settings["chunk_size"] = "only models with a recurrent state have it"
    inactive_settings["lr_temp"] = "only delta models have it"


Model = GPT  # what `--model model` names
