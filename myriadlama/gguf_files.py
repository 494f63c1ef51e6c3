"""Read a GGUF file of architecture llama, qwen2 or qwen3 with a byte-level BPE tokenizer."""

from typing import NamedTuple

import numpy as np
import torch

from myriadlama.chat import ChatTemplate
from myriadlama.file_checks import (
    ANY,
    check_settings,
    check_sizes,
    eos_ids,
    match_weights,
    positive_number,
    require_package,
    shown,
    true_or_false,
    whole_number,
)
from myriadlama.llama import Config, interleave_rotary_pairs
from nanorecall.settings import ConfigError, require

MODEL_NAMES = {  # module of Llama -> tensor in a GGUF file, without .weight
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
}
LAYER_NAMES = {  # the same within a layer
    "input_layernorm": "attn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

ARCHITECTURES = ("llama", "qwen2", "qwen3")
# Keys of which each architecture has its own, such as llama.vocab_size.
READ_BELOW = """
    vocab_size context_length embedding_length block_count feed_forward_length attention.head_count
    attention.head_count_kv attention.layer_norm_rms_epsilon attention.key_length
    attention.value_length rope.dimension_count rope.freq_base rope.scaling.type
    rope.scaling.factor rope.scale_linear
""".split()
NO_EFFECT = """
    rope.scaling.original_context_length rope.scaling.finetuned tensor_data_layout
""".split()
ALLOWED_VALUES = {  # key -> values with which this model computes what the file means
    **dict.fromkeys(READ_BELOW + NO_EFFECT, ANY),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "use_parallel_residual": (False,),
    "attention.causal": (True,),
    "attention.scale": (0,),
    "logit_scale": (0, 1),
}
ALLOWED_IN_ALL = {  # the same for keys that all architectures share
    "split.count": (0, 1),
    "tokenizer.ggml.add_space_prefix": (False,),
    "tokenizer.ggml.remove_extra_whitespaces": (False,),
}
# Kinds of tokens in tokenizer.ggml.token_type.
CONTROL, USER_DEFINED = 3, 4
# Runs of letters, digits, marks and white space, as in GPT-4's tokenizer.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def single_digits():
    from tokenizers import pre_tokenizers

    digits = pre_tokenizers.Digits(individual_digits=True)
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return pre_tokenizers.Sequence([digits, letters])


def split_words(pattern):
    from tokenizers import Regex, pre_tokenizers

    words = pre_tokenizers.Split(Regex(pattern), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([words, letters])


class TokenizerKind(NamedTuple):
    """What a name in tokenizer.ggml.pre means."""

    pre_tokenizer: object  # () -> a pre-tokenizer
    end_tokens: tuple = ()  # control tokens that end an answer, besides those that a file names
    nfc: bool = False  # text is normalised to NFC
    ignore_merges: bool = False  # a word that is a token is one, whatever the merges say
    add_bos: bool = False  # the default of tokenizer.ggml.add_bos_token


TOKENIZERS = {
    "smollm": TokenizerKind(single_digits),
    "llama-bpe": TokenizerKind(
        lambda: split_words(WORDS % "{1,3}"),
        ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        ignore_merges=True,
        add_bos=True,
    ),
    "qwen2": TokenizerKind(
        lambda: split_words(WORDS % ""),
        ("<|endoftext|>", "<|im_end|>"),
        nfc=True,
    ),
}


def gguf_name(parameter):
    """layers.3.self_attn.q_proj.weight -> blk.3.attn_q.weight"""
    module, kind = parameter.rsplit(".", 1)
    if not module.startswith("layers."):
        return f"{MODEL_NAMES[module]}.{kind}"
    _, layer, inner = module.split(".", 2)
    return f"blk.{layer}.{LAYER_NAMES[inner]}.{kind}"


def read_gguf(path):
    """-> Config, {parameter name: float32 tensor}, tokenizer"""
    require_package("gguf", "this model needs a package: pip install gguf")
    from gguf import MODEL_ARCH_NAMES

    fields, tensors = read_contents(path)
    architecture = fields.get("general.architecture")
    found = f"{path} is of architecture {str(architecture)[:60]}"
    message = f"{found}; only {', '.join(ARCHITECTURES)} are computed here"
    require(architecture in ARCHITECTURES, message, "model")
    allowed = {f"{architecture}.{key}": values for key, values in ALLOWED_VALUES.items()}
    allowed |= ALLOWED_IN_ALL
    settings = {}
    # An old package may not know this architecture by name.
    architectures = {architecture, *MODEL_ARCH_NAMES.values()}
    for key, value in fields.items():
        # Other keys are descriptions, notes of who made the file, and the tokenizer, which
        # gguf_tokenizer checks.
        if key in allowed or key.split(".")[0] in architectures:
            settings[key] = value
    check_settings(settings, allowed, path)
    tokenizer, vocab_size = gguf_tokenizer(fields, path)
    config = gguf_config(fields, tensors, architecture, vocab_size, path)
    weights = match_weights(config, tensors, gguf_name, path)
    # Files of a Llama have rotary pairs side by side; the others have them as Hugging Face.
    if architecture != "llama":
        interleave_rotary_pairs(weights, config)
    return config, weights, tokenizer


def gguf_config(fields, tensors, architecture, vocab_size, path):
    """-> Config. Removes rope_freqs.weight from tensors, see gguf_rope_scaling."""

    def size(key, default=None):
        return whole_number(fields, f"{architecture}.{key}", path, default)

    def number(key, default=None):
        return positive_number(fields, f"{architecture}.{key}", path, default)

    n_heads, dim = size("attention.head_count"), size("embedding_length")
    head_dim = size("attention.key_length", dim // n_heads or 1)
    for key in ("attention.value_length", "rope.dimension_count"):
        message = f"{path}: {architecture}.{key} is not the width of a head, {head_dim}"
        require(size(key, head_dim) == head_dim, message, "model")
    message = f"{path}: {architecture}.vocab_size is not its number of tokens, {vocab_size}"
    require(size("vocab_size", vocab_size) == vocab_size, message, "model")
    config = Config(
        vocab_size=vocab_size,
        dim=dim,
        n_layers=size("block_count"),
        n_heads=n_heads,
        n_kv_heads=size("attention.head_count_kv", n_heads),
        head_dim=head_dim,
        intermediate_size=size("feed_forward_length"),
        norm_eps=number("attention.layer_norm_rms_epsilon"),
        rope_base=number("rope.freq_base", 10000.0),
        rope_scaling=gguf_rope_scaling(fields, tensors, architecture, head_dim, path),
        max_seq_len=min(size("context_length"), 8192),
        tie_weights="output.weight" not in tensors,
        attention_bias=architecture == "qwen2" or "blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        qk_norm=architecture == "qwen3",
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
        bos_token_id=gguf_bos(fields, path, vocab_size),
        eos_token_ids=gguf_eos(fields, path, vocab_size),
        chat_template=gguf_chat_template(fields),
    )
    check_sizes(config, path)
    return config


def read_contents(path):
    """-> {key: value}, {name: float32 tensor}. ConfigError for a truncated or damaged file."""
    from gguf import GGUFReader, dequantize

    class BoundedReader(GGUFReader):
        def _get(self, offset, dtype, count=1, override_order=None):
            # The package does not check lengths: one of 10^12 would keep it busy for hours.
            end = int(offset) + int(count) * np.dtype(dtype).itemsize
            if end > len(self.data):
                raise ValueError("it ends too early")
            return super()._get(offset, dtype, count, override_order)

    try:
        reader = BoundedReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        # Many tensors of the same bytes would fill the memory.
        if sum(int(tensor.n_bytes) for tensor in reader.tensors) > len(reader.data):
            raise ValueError("its tensors overlap")
        tensors = {}
        for tensor in reader.tensors:
            values = np.array(dequantize(tensor.data, tensor.tensor_type), np.float32)
            tensors[tensor.name] = torch.from_numpy(values)
    except Exception as e:  # damaged files raise all kinds of exceptions
        reason = " ".join(str(e).split())[:100] or type(e).__name__
        raise ConfigError(f"{path} cannot be read as GGUF ({reason})", "model") from None
    return fields, tensors


def gguf_rope_scaling(fields, tensors, architecture, head_dim, path):
    """Config.rope_scaling. Removes rope_freqs.weight, the factors of each frequency, from tensors.

    rope.scale_linear is the older name of rope.scaling.factor.
    """
    rope = f"{architecture}.rope"
    kind = fields.get(f"{rope}.scaling.type", "none")
    unknown = f"{path}: rotary scaling {shown(kind)} is not known, only none and linear"
    require(kind in ("none", "linear"), unknown, "model")
    factor = positive_number(fields, f"{rope}.scale_linear", path, 1.0)
    factor = positive_number(fields, f"{rope}.scaling.factor", path, factor)
    if kind == "none" and f"{rope}.scaling.type" in fields:
        factor = 1.0
    factors = tensors.pop("rope_freqs.weight", None)
    if factors is None:
        return {"rope_type": "linear", "factor": factor} if factor != 1 else None
    n = head_dim // 2
    valid = factors.shape == (n,) and bool((factors > 0).all() & factors.isfinite().all())
    require(valid, f"{path}: rope_freqs.weight are not {n} factors above 0", "model")
    return {"rope_type": "each", "factors": (factors * factor).tolist()}


def gguf_bos(fields, path, vocab_size):
    """The token that the tokenizer puts before a prompt, or None."""
    default = TOKENIZERS[fields["tokenizer.ggml.pre"]].add_bos
    if not true_or_false(fields, "tokenizer.ggml.add_bos_token", path, default):
        return None
    return whole_number(fields, "tokenizer.ggml.bos_token_id", path, None, 0, vocab_size - 1)


def gguf_eos(fields, path, vocab_size):
    """All tokens that end an answer: end of sequence, of turn, of message.

    Many files name only one of them, so those of the tokenizer's kind are added.
    """
    ids = []
    for name in ("eos", "eot", "eom"):
        for token in eos_ids(fields.get(f"tokenizer.ggml.{name}_token_id"), path, vocab_size):
            if token not in ids:
                ids.append(token)
    ends = TOKENIZERS[fields["tokenizer.ggml.pre"]].end_tokens
    texts, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    for token, (text, kind) in enumerate(zip(texts, kinds)):
        if text in ends and kind == CONTROL and token not in ids:
            ids.append(token)
    return tuple(ids)


def gguf_chat_template(fields):
    texts, ends = fields["tokenizer.ggml.tokens"], []
    for name in ("bos", "eos"):
        token = fields.get(f"tokenizer.ggml.{name}_token_id")
        known = isinstance(token, int) and 0 <= token < len(texts)
        ends.append(texts[token] if known else None)
    return ChatTemplate(fields.get("tokenizer.chat_template"), *ends)


def gguf_tokenizer(fields, path):
    """-> the byte-level BPE tokenizer in a GGUF file's metadata, its number of tokens"""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    # Tokenizers of SentencePiece are "llama".
    algorithm = fields.get("tokenizer.ggml.model")
    message = f"{path}: its tokenizer is {shown(algorithm)}; only gpt2 is known"
    require(algorithm == "gpt2", f"{message}, give a directory instead", "model")
    pre = fields.get("tokenizer.ggml.pre")
    hint = f"only {', '.join(TOKENIZERS)} are known, give a directory instead"
    known = isinstance(pre, str) and pre in TOKENIZERS
    require(known, f"{path}: its tokenizer is of kind {shown(pre)}; {hint}", "model")
    kind_of_tokenizer = TOKENIZERS[pre]
    tokens = fields.get("tokenizer.ggml.tokens")
    merges = fields.get("tokenizer.ggml.merges")
    kinds = fields.get("tokenizer.ggml.token_type")
    all_lists = all(isinstance(x, list) for x in (tokens, merges, kinds))
    require(all_lists, f"{path}: its tokenizer has no tokens, merges or kinds of tokens", "model")
    consistent = len(tokens) == len(kinds) == len(set(tokens))
    require(consistent, f"{path}: its tokenizer has tokens twice, or without a kind", "model")
    try:
        vocabulary = {token: i for i, token in enumerate(tokens)}
        pairs = [tuple(merge.split(" ", 1)) for merge in merges]
        ignore_merges = kind_of_tokenizer.ignore_merges
        tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=ignore_merges))
    except Exception as e:  # the package raises plain Exception
        message = f"{path}: its tokenizer cannot be built ({shown(str(e))})"
        raise ConfigError(message, "model") from None
    if kind_of_tokenizer.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = kind_of_tokenizer.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    control, user_defined = [], []
    for token, kind in zip(tokens, kinds):
        if kind == CONTROL:
            control.append(AddedToken(token, normalized=False, special=True))
        elif kind == USER_DEFINED:
            user_defined.append(AddedToken(token, normalized=False))
    tokenizer.add_special_tokens(control)
    tokenizer.add_tokens(user_defined)
    return tokenizer, len(tokens)
