"""Read a Hugging Face directory of a Llama: config.json, *.safetensors, tokenizer.json."""

import json
import os

import torch

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
from myriadlama.llama import Config, rope_inv_freq
from nanorecall.settings import ConfigError, require

INDEX = "model.safetensors.index.json"

READ_BELOW = """
    model_type architectures vocab_size hidden_size intermediate_size num_hidden_layers
    num_attention_heads num_key_value_heads head_dim rms_norm_eps rope_theta rope_scaling
    rope_parameters max_position_embeddings tie_word_embeddings attention_bias mlp_bias
    bos_token_id eos_token_id
""".split()
NO_EFFECT = """
    pad_token_id unk_token_id sep_token_id _name_or_path name_or_path _commit_hash
    transformers_version dtype torch_dtype use_cache initializer_range attention_dropout
    pretraining_tp hidden_dropout resid_pdrop attn_pdrop embd_pdrop use_bfloat16
    gradient_checkpointing _attn_implementation attn_implementation _attn_implementation_autoset
    _flash_attn_2_enabled experts_implementation return_dict output_attentions
    output_hidden_states torchscript tf_legacy_loss chunk_size_feed_forward tie_encoder_decoder
    is_decoder id2label label2id num_labels problem_type finetuning_task prefix
    task_specific_params tokenizer_class decoder_start_token_id is_llama_config
    max_sequence_length transformers.js_config unsloth_fixed unsloth_version model_max_length
""".split()
# Settings of generation. We always decode greedily, whatever the file advises.
GENERATION = """
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    bad_words_ids encoder_no_repeat_ngram_size num_return_sequences output_scores
    return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
""".split()
ALLOWED_VALUES = {  # key of config.json -> values with which this model computes what is meant
    **dict.fromkeys(READ_BELOW + NO_EFFECT + GENERATION, ANY),
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
ROPE_PARAMETERS = {  # rope_type -> the numbers that it needs
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read_directory(path):
    """-> Config, {parameter name: float32 tensor}, tokenizer"""
    require_package("safetensors", "this model needs a package: pip install safetensors")
    settings, where = read_json(path, "config.json"), os.path.join(path, "config.json")
    model_type = settings.get("model_type")
    message = f"{path} holds a {model_type!r} model; a llama is needed"
    require(model_type == "llama", message, "model")
    architectures = settings.get("architectures") or ["LlamaForCausalLM"]
    known = architectures in (["LlamaForCausalLM"], ["LlamaModel"])
    message = f"{path} holds {shown(architectures)}; LlamaForCausalLM is needed"
    require(known, message, "model")
    check_settings(settings, ALLOWED_VALUES, where)
    is_adapter = os.path.exists(os.path.join(path, "adapter_config.json"))
    require(not is_adapter, f"{path} holds an adapter; merge it into the weights first", "model")
    config = read_config(path, settings, where)
    tokenizer, config.bos_token_id = read_tokenizer(os.path.join(path, "tokenizer.json"))
    tensors = read_weights(path, config)
    weights = match_weights(config, tensors, hugging_face_name, path)
    for name, weight in weights.items():
        if ".q_proj." in name:
            weights[name] = interleave_pairs(weight, config.n_heads)
        elif ".k_proj." in name:
            weights[name] = interleave_pairs(weight, config.n_kv_heads)
    return config, weights, tokenizer


def hugging_face_name(parameter):
    """layers.3.mlp.up_proj.weight -> model.layers.3.mlp.up_proj.weight"""
    return parameter if parameter.startswith("lm_head.") else f"model.{parameter}"


def interleave_pairs(weight, n_heads):
    """Rows of each head from Hugging Face's order (all first features of the rotary pairs, then all
    second ones) to ours (the two features of a pair side by side)."""
    by_head = weight.view(n_heads, 2, weight.shape[0] // n_heads // 2, -1)
    return by_head.transpose(1, 2).reshape(weight.shape)


def read_config(path, settings, where):
    """config.json -> Config, still without bos_token_id, which only the tokenizer knows."""
    vocab_size = whole_number(settings, "vocab_size", where)
    dim = whole_number(settings, "hidden_size", where)
    n_heads = whole_number(settings, "num_attention_heads", where)
    if settings.get("head_dim") is None:
        message = f"{where}: {n_heads} heads cannot share {dim} features"
        require(dim % n_heads == 0, message, "model")
    max_seq_len = whole_number(settings, "max_position_embeddings", where, 2048, 1, 2**40)
    config = Config(
        vocab_size=vocab_size,
        dim=dim,
        n_layers=whole_number(settings, "num_hidden_layers", where),
        n_heads=n_heads,
        n_kv_heads=whole_number(settings, "num_key_value_heads", where, n_heads),
        head_dim=whole_number(settings, "head_dim", where, dim // n_heads),
        intermediate_size=whole_number(settings, "intermediate_size", where),
        norm_eps=positive_number(settings, "rms_norm_eps", where, 1e-6),
        max_seq_len=min(max_seq_len, 8192),
        tie_weights=true_or_false(settings, "tie_word_embeddings", where),
        attention_bias=true_or_false(settings, "attention_bias", where),
        mlp_bias=true_or_false(settings, "mlp_bias", where),
        eos_token_ids=read_eos_ids(path, settings, vocab_size),
    )
    config.rope_base, config.rope_scaling = read_rope(settings, max_seq_len, where)
    check_sizes(config, where)
    return config


def read_rope(settings, max_seq_len, where):
    """config.json -> rope_base, rope_scaling of Config."""
    rope = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    require(isinstance(rope, dict), f"{where}: its rotary settings are {shown(rope)}", "model")
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = isinstance(kind, str) and kind in ROPE_PARAMETERS
    only = ", ".join(ROPE_PARAMETERS)
    message = f"{where}: rotary scaling {shown(kind)} is not known, only {only}"
    require(known, message, "model")
    allowed = dict.fromkeys(("rope_type", "type", "rope_theta", *ROPE_PARAMETERS[kind]), ANY)
    allowed["partial_rotary_factor"] = (None, 1)
    check_settings(rope, allowed, where)
    base = positive_number(settings, "rope_theta", where, 10000.0)
    base = positive_number(rope, "rope_theta", where, base)
    defaults = {"original_max_position_embeddings": max_seq_len}
    scaling = {}
    for key in ROPE_PARAMETERS[kind]:
        scaling[key] = positive_number(rope, key, where, defaults.get(key))
    if kind == "llama3":
        ordered = scaling["low_freq_factor"] < scaling["high_freq_factor"]
        require(ordered, f"{where}: low_freq_factor must be below high_freq_factor", "model")
    return base, {"rope_type": kind, **scaling} if scaling else None


def read_eos_ids(path, settings, vocab_size):
    """Tokens that end an answer: generation_config.json's if it has any, else config.json's."""
    file_name = "generation_config.json"
    where = os.path.join(path, file_name)
    generation = read_json(path, file_name) if os.path.exists(where) else {}
    ids = eos_ids(generation.get("eos_token_id"), where, vocab_size)
    if ids:
        return ids
    # 2 is the default of transformers' LlamaConfig.
    return eos_ids(settings.get("eos_token_id", 2), os.path.join(path, "config.json"), vocab_size)


def read_tokenizer(file):
    """tokenizer.json -> Tokenizer, and the token that it puts before a text, or None."""
    from tokenizers import Tokenizer

    require(os.path.exists(file), f"{file} is missing; download it too", "model")
    try:
        tokenizer = Tokenizer.from_file(file)
        # The file keeps the training settings of whoever saved it. They would cut, fill up or
        # randomly split our texts.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if getattr(tokenizer.model, "dropout", None):
            tokenizer.model.dropout = None
        ids = tokenizer.encode("x").ids
        bare_ids = tokenizer.encode("x", add_special_tokens=False).ids
    except Exception as e:  # the package raises plain Exception
        reason = " ".join(str(e).split())[:80]
        message = f"{file} cannot be read as a tokenizer.json ({reason})"
        raise ConfigError(message, "model") from None
    before = []
    for start in range(len(ids)):
        if ids[start : start + len(bare_ids)] == bare_ids:
            before = ids[:start]
            break
    message = f"{file} puts {len(before)} tokens before a text; at most one is known here"
    require(len(before) <= 1, message, "model")
    return tokenizer, before[0] if before else None


# ---- weights -------------------------------------------------------------------------------------


def weight_files(path):
    """Names of the files with the weights. ConfigError if one is outside the directory."""
    index_file, single_file = os.path.join(path, INDEX), os.path.join(path, "model.safetensors")
    if not os.path.exists(index_file):
        return ["model.safetensors"]
    message = f"{path} holds both model.safetensors and {INDEX}; delete the one that is not meant"
    require(not os.path.exists(single_file), message, "model")
    weight_map = read_json(path, INDEX).get("weight_map")
    valid = isinstance(weight_map, dict) and weight_map
    valid = valid and all(isinstance(name, str) for name in weight_map.values())
    require(valid, f"{index_file} has no weight_map of file names", "model")
    names = sorted(set(weight_map.values()))
    for name in names:
        message = f"{path}: {INDEX} names {shown(name)}, outside it"
        require(is_in_directory(path, name), message, "model")
    return names


def is_in_directory(path, name):
    """Is this the name of a file in the directory, and no link to another place?

    The hub's cache is allowed: the files in snapshots/<commit>/ are links into blobs/.
    """
    if os.path.basename(name) != name or name in ("", ".", "..") or "\0" in name:
        return False
    directory, file = os.path.realpath(path), os.path.realpath(os.path.join(path, name))
    blobs = os.path.join(os.path.dirname(os.path.dirname(directory)), "blobs")
    return os.path.dirname(file) in (directory, blobs)


def read_weights(path, config):
    """{Hugging Face's name: float32 tensor} of all files.

    Some files also hold copies of what follows from config.json: rotary frequencies and a tied
    lm_head. These must agree with it and are then dropped.
    """
    tensors = {}
    for file_name in weight_files(path):
        file = os.path.join(path, file_name)
        message = f"{file} is missing; download all parts that {INDEX} names"
        require(os.path.exists(file), message, "model")
        for name, tensor in read_safetensors(file).items():
            if not name.startswith(("model.", "lm_head.")):
                name = f"model.{name}"  # saved from a LlamaModel
            require(name not in tensors, f"{file}: {shown(name)} is there twice", "model")
            is_float = tensor.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
            kind = str(tensor.dtype).removeprefix("torch.")
            message = f"{file}: {shown(name)} is of type {kind}; only floats are known here"
            require(is_float, message, "model")
            tensors[name] = tensor.float()
    if INDEX in os.listdir(path):
        listed = read_json(path, INDEX)["weight_map"]
        absent = [n for n in listed if n not in tensors and f"model.{n}" not in tensors]
        message = f"{path}: no file holds {shown(absent[:3])}, which {INDEX} names"
        require(not absent, message, "model")
    drop_rope_frequencies(tensors, config, path)
    if config.tie_weights:
        drop_tied_head(tensors, path)
    return tensors


def drop_rope_frequencies(tensors, config, path):
    expected = rope_inv_freq(config)
    for name in [n for n in tensors if n.endswith("rotary_emb.inv_freq")]:
        found = tensors.pop(name)
        # Old files stored them in half precision.
        same = expected.shape == found.shape and torch.allclose(expected, found, rtol=1e-2, atol=0)
        message = f"{path}: {shown(name)} are other frequencies than config.json's"
        require(same, message, "model")


def drop_tied_head(tensors, path):
    head, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if head is None or embedding is None:
        return
    same = head.shape == embedding.shape and torch.equal(head, embedding)
    tied = f"{path}: config.json ties lm_head.weight to the embeddings"
    require(same, f"{tied}, but the file has another", "model")
    del tensors["lm_head.weight"]


def read_safetensors(file):
    """{name: tensor} of one file; ConfigError if it is damaged."""
    from safetensors import safe_open

    def without_repeats(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name is there twice")
        return dict(pairs)

    try:
        with safe_open(file, "pt") as f:
            tensors = {name: f.get_tensor(name) for name in f.keys()}
        # The package accepts a header that names a tensor twice, so we read the header again.
        with open(file, "rb") as f:
            header_length = int.from_bytes(f.read(8), "little")
            json.loads(f.read(header_length), object_pairs_hook=without_repeats)
    except Exception as e:  # damaged files raise all kinds of exceptions
        reason = " ".join(str(e).split())[:100] or type(e).__name__
        message = f"{file} cannot be read ({reason}); download it again"
        raise ConfigError(message, "model") from None
    return tensors


def read_json(path, name):
    """The object in a JSON file of a directory."""
    file = os.path.join(path, name)
    try:
        with open(file, encoding="utf-8") as f:
            value = json.load(f)
    except FileNotFoundError:
        raise ConfigError(f"{file} is missing; download it too", "model") from None
    except OSError as e:
        raise ConfigError(f"{file} cannot be read: {e.strerror}", "model") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{file} is no JSON; download it again", "model") from None
    require(isinstance(value, dict), f"{file} holds no JSON object; download it again", "model")
    return value
