"""The Llama model: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Touvron et al. 2023, arXiv 2302.13971; Grattafiori et al. 2024, arXiv 2407.21783. Mistral 7B
(2310.06825), Qwen2 (2407.10671) and Qwen3 (2505.09388) are the same model with other settings.
Parameters are named as in Hugging Face's transformers, without the leading "model.".
`loading.load` reads the weights.

The two features of a rotary pair are neighbours in queries and keys, which is what
nanorecall.attention.apply_rotary expects. Hugging Face stores the two halves of a head apart;
interleave_rotary_pairs reorders them.

Letters: B sequences, T tokens, S tokens in the cache and new ones, D model width, H query heads,
G key/value heads, K head_dim, V vocabulary.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from nanorecall.attention import apply_rotary
from nanorecall.settings import require


@dataclass
class Config:
    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    rope_scaling: dict | None = None  # "rope_type", a key of ROPE_SCALINGS, and its parameters
    max_seq_len: int = 8192
    tie_weights: bool = True
    attention_bias: bool = False  # on q_proj, k_proj and v_proj
    output_bias: bool = False  # on o_proj
    qk_norm: bool = False  # RMSNorm of each head's query and key, before they are rotated
    mlp_bias: bool = False
    bos_token_id: int | None = None  # set if the tokenizer puts it before a prompt
    eos_token_ids: tuple[int, ...] = ()
    not_applied: tuple[str, ...] = ()  # what the files ask for beyond greedy decoding
    chat_template: object = None  # a chat.ChatTemplate


# ---- rotary positions ----------------------------------------------------------------------------


def scale_linear(inv_freq, scaling):
    """Divide every frequency by the same factor."""
    return inv_freq / scaling["factor"]


def scale_llama3(inv_freq, scaling):
    """Divide low frequencies by a factor, keep high ones, and interpolate between the two.

    A frequency is low if its wavelength exceeds the context length of pre-training.
    """
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    n_turns = scaling["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    keep = ((n_turns - low) / (high - low)).clamp(0, 1)  # 1: high enough to keep
    return (1 - keep) * inv_freq / scaling["factor"] + keep * inv_freq


def scale_yarn(inv_freq, scaling):
    """Divide low frequencies by a factor, keep high ones, and interpolate by the pair's number.

    YaRN (Peng et al. 2023, arXiv 2309.00071): a pair that turns beta_fast times within the context
    length of pre-training is kept, one that turns beta_slow times is divided.
    """
    n_pairs, length = len(inv_freq), scaling["original_max_position_embeddings"]

    def pair_with(n_turns):
        """The number of the pair that turns so often, as a real number."""
        wavelength = length / n_turns
        return n_pairs * math.log(wavelength / (2 * math.pi)) / math.log(scaling["rope_theta"])

    first, last = pair_with(scaling["beta_fast"]), pair_with(scaling["beta_slow"])
    if scaling["truncate"]:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * n_pairs - 1)
    if first == last:
        last += 0.001  # no division by zero
    number = torch.arange(n_pairs, device=inv_freq.device)
    divide = ((number - first) / (last - first)).clamp(0, 1)
    return divide * inv_freq / scaling["factor"] + (1 - divide) * inv_freq


def scale_each(inv_freq, scaling):
    """Divide each frequency by its own factor. GGUF files store Llama 3's scaling this way."""
    return inv_freq / torch.tensor(scaling["factors"], device=inv_freq.device)


ROPE_SCALINGS = {
    "linear": scale_linear,
    "llama3": scale_llama3,
    "yarn": scale_yarn,
    "each": scale_each,
}


def rope_inv_freq(config):
    """(K/2,) angle in radians by which each pair of features turns per position, scaled."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    inv_freq = config.rope_base**-exponent
    if config.rope_scaling is None:
        return inv_freq
    scale = ROPE_SCALINGS[config.rope_scaling["rope_type"]]
    return scale(inv_freq, config.rope_scaling)


def rope_table(config):
    """(max_seq_len, K/2, 2): cosine and sine of each pair's angle at each position.

    YaRN's attention_factor multiplies both, and so lengthens queries and keys.
    """
    positions = torch.arange(config.max_seq_len, dtype=torch.float32)
    angle = torch.outer(positions, rope_inv_freq(config))
    length = (config.rope_scaling or {}).get("attention_factor", 1.0)
    return torch.stack([angle.cos(), angle.sin()], -1) * length


def interleave_rotary_pairs(weights, config):
    """{parameter name: tensor} from Hugging Face's order of features to ours, in place.

    In a head, Hugging Face has all first features of the rotary pairs, then all second ones.
    """
    n_heads = {".q_proj.": config.n_heads, ".k_proj.": config.n_kv_heads}
    n_heads |= {".q_norm.": 1, ".k_norm.": 1}
    for name, weight in weights.items():
        for module, n in n_heads.items():
            if module in name:
                halves = weight.view(n, 2, len(weight) // n // 2, -1)
                weights[name] = halves.transpose(1, 2).reshape(weight.shape)


# ---- the model -----------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        q_width = config.n_heads * config.head_dim
        kv_width = config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, q_width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.dim, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.dim, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(q_width, config.dim, bias=config.output_bias)
        self.q_norm = self.k_norm = nn.Identity()
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)

    def forward(self, x, rope_table, positions, attention_fn):
        """x (B, T, D) at positions (B, T) -> (B, T, D).

        attention_fn(q, k, v) is that of Llama.forward, for this layer.
        """
        q = self.q_proj(x).unflatten(-1, (self.n_heads, -1))  # (B, T, H, K)
        q = apply_rotary(self.q_norm(q), rope_table, positions).transpose(1, 2)
        k, v = self.keys_values(x, rope_table, positions)
        out = attention_fn(q, k, v)  # (B, H, T, K)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def keys_values(self, x, rope_table, positions):
        """x (B, T, D) at positions (B, T) -> keys and values, both (B, G, T, K)"""
        k = self.k_proj(x).unflatten(-1, (self.n_kv_heads, -1))  # (B, T, G, K)
        v = self.v_proj(x).unflatten(-1, (self.n_kv_heads, -1))
        k = apply_rotary(self.k_norm(k), rope_table, positions)
        return k.transpose(1, 2), v.transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.dim, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.dim, bias=config.mlp_bias)

    def forward(self, x):
        # In place: these are the largest tensors of a pass.
        gate = F.silu(self.gate_proj(x), inplace=True)
        return self.down_proj(gate.mul_(self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rope_table, positions, attention_fn):
        x = x + self.self_attn(self.input_layernorm(x), rope_table, positions, attention_fn)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.embed_tokens.weight
        self.register_buffer("rope_table", rope_table(config), persistent=False)

    @torch.no_grad()
    def forward(self, tokens, positions, attention_fn):
        """tokens (B, T) at positions (B, T) -> residual stream after the last block (B, T, D).

        attention_fn(layer, q (B, H, T, K), k (B, G, T, K), v (B, G, T, K)) -> (B, H, T, K) decides
        which tokens attend to which, and stores keys and values if they are needed again.
        `causal_attention` is the usual one. `logits` turns the result into logits.

        Raises ConfigError for a position beyond max_seq_len.
        """
        self.check_length(int(positions.max()) + 1)
        x = self.embed_tokens(tokens)
        for i, layer in enumerate(self.layers):
            x = layer(x, self.rope_table, positions, functools.partial(attention_fn, i))
        return x

    @torch.no_grad()
    def encode(self, tokens, positions, attention_fn):
        """As forward, but -> for each layer the keys and values, both (B, G, T, K).

        Nothing reads the output of the last block, so it is not computed.
        """
        self.check_length(int(positions.max()) + 1)
        kv = []

        def store_and_attend(layer, q, k, v):
            kv.append((k, v))
            return attention_fn(layer, q, k, v)

        x = self.embed_tokens(tokens)
        for i, layer in enumerate(self.layers[:-1]):
            x = layer(x, self.rope_table, positions, functools.partial(store_and_attend, i))
        last = self.layers[-1]
        x = last.input_layernorm(x)
        kv.append(last.self_attn.keys_values(x, self.rope_table, positions))
        return kv

    def check_length(self, length):
        """Raise ConfigError unless the model has positions for `length` tokens."""
        limit = len(self.rope_table)
        message = f"a prompt of {length} tokens is longer than the {limit} positions of this model"
        hint = "give fewer shots or templates, or shorter ones"
        require(length <= limit, f"{message}; {hint}", "num_shots")

    @torch.no_grad()
    def logits(self, x):
        """(..., D) -> (..., V)"""
        return self.lm_head(self.norm(x))


def causal_attention(layer, q, k, v):
    """Each token attends to itself and those before it. Nothing is stored."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
