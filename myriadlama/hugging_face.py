"""Read a Hugging Face directory of a Llama: config.json, *.safetensors, tokenizer.json.

Mistral, Qwen2, Qwen2.5 and Qwen3 directories are read, too (FAMILIES).
"""

import json
import math
import os
from typing import NamedTuple

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
from myriadlama.llama import Config, interleave_rotary_pairs, rope_inv_freq
from nanorecall.settings import ConfigError, require
from nanorecall.text import refusal

INDEX = "model.safetensors.index.json"
TOKENIZER_CONFIG, CHAT_TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
ADDED_TOKENS = "added_tokens.json"

READ_BELOW = """
    model_type architectures vocab_size hidden_size intermediate_size num_hidden_layers
    num_attention_heads num_key_value_heads head_dim rms_norm_eps rope_theta rope_scaling
    rope_parameters max_position_embeddings tie_word_embeddings bos_token_id eos_token_id
    layer_types
""".split()
NO_EFFECT = """
    pad_token_id unk_token_id sep_token_id _name_or_path name_or_path _commit_hash
    transformers_version dtype torch_dtype use_cache initializer_range attention_dropout
    pretraining_tp hidden_dropout residual_dropout embedding_dropout resid_pdrop attn_pdrop
    embd_pdrop use_bfloat16 gradient_checkpointing _attn_implementation attn_implementation
    _attn_implementation_autoset _flash_attn_2_enabled experts_implementation return_dict
    output_attentions output_hidden_states torchscript tf_legacy_loss chunk_size_feed_forward
    tie_encoder_decoder is_decoder id2label label2id num_labels problem_type finetuning_task prefix
    task_specific_params tokenizer_class decoder_start_token_id is_llama_config max_sequence_length
    transformers.js_config unsloth_fixed unsloth_version model_max_length
    tokenizer_model_max_length tokenizer_padding_side bos_token eos_token pad_token unk_token
    trust_remote_code low_cpu_mem_usage use_flash_attn use_flash_attention use_sdpa use_recompute
    neftune_noise_alpha label_smoothing loss_type ignore_index keys_to_ignore_at_inference
    base_model_tp_plan base_model_pp_plan initializer_cutoff_factor max_window_layers
    output_router_logits router_aux_loss_coef output_past cross_attention_hidden_size
""".split()
# Settings of generation that do not change which tokens greedy decoding gives.
GENERATION = """
    max_length max_new_tokens do_sample early_stopping temperature top_k top_p top_h min_p typical_p
    epsilon_cutoff eta_cutoff num_return_sequences length_penalty renormalize_logits output_scores
    output_logits return_dict_in_generate remove_invalid_values cache_implementation cache_config
    max_cache_len prefill_chunk_size low_memory compile_config disable_compile
    continuous_batching_config generation_kwargs is_assistant num_assistant_tokens
    num_assistant_tokens_schedule assistant_confidence_threshold assistant_early_exit
    assistant_lookbehind assistant_ensemble_weight target_lookbehind prompt_lookup_num_tokens
    max_matching_ngram_size speculation_type use_mtp _from_model_config
""".split()
# Settings of generation that do, unless they have this value or are empty.
PENALTIES = {
    "min_length": 0,
    "min_new_tokens": 0,
    "max_time": None,
    "stop_strings": None,
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0,
    "penalty_alpha": 0,
    "dola_layers": None,
    "guidance_scale": 1,
    "repetition_penalty": 1,
    "encoder_repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "force_words_ids": None,
    "constraints": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "forced_decoder_ids": None,
    "exponential_decay_length_penalty": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "token_healing": False,
    "watermarking_config": None,
}
ALLOWED_VALUES = {  # key of config.json -> values with which this model computes what is meant
    **dict.fromkeys([*READ_BELOW, *NO_EFFECT, *GENERATION, *PENALTIES], ANY),
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
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "use_mrope": (None, False),
    "quantization_config": (None,),
    "sliding_window": (None,),
    "attention_multiplier": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "auto_map": (None,),
}


class Family(NamedTuple):
    """What a model type means."""

    classes: str  # name of its classes in transformers
    allowed_values: dict  # other than ALLOWED_VALUES
    explicit: tuple = ()  # keys whose default in transformers is another than Llama's
    eos_token_id: int | None = None  # the default
    switches_window: bool = False  # without use_sliding_window, sliding_window means nothing


FAMILIES = {
    "llama": Family("Llama", {"attention_bias": ANY, "mlp_bias": ANY}, (), 2),
    "mistral": Family(
        "Mistral",
        {"sliding_window": ANY},
        ("num_key_value_heads", "sliding_window", "max_position_embeddings"),
        2,
    ),
    "qwen2": Family(
        "Qwen2",
        {
            "attention_bias": (None, True),
            "sliding_window": ANY,
            "use_sliding_window": (None, False, True),
        },
        ("num_key_value_heads", "max_position_embeddings"),
        switches_window=True,
    ),
    "qwen3": Family(
        "Qwen3",
        {
            "attention_bias": ANY,
            "use_qk_norm": (None, True),
            "sliding_window": ANY,
            "use_sliding_window": (None, False, True),
        },
        ("num_key_value_heads", "head_dim", "max_position_embeddings"),
        switches_window=True,
    ),
}
ROPE_PARAMETERS = {  # rope_type -> the numbers that it needs
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings"),
}
YARN_OPTIONS = ("attention_factor", "mscale", "mscale_all_dim", "truncate")


def read_directory(path, generation_config="strict"):
    """-> Config, {parameter name: float32 tensor}, tokenizer

    generation_config: plain allows what check_generation refuses.
    """
    require_package("safetensors", "this model needs a package: pip install safetensors")
    settings, where = read_json(path, "config.json"), os.path.join(path, "config.json")
    family = read_family(path, settings)
    check_settings(settings, ALLOWED_VALUES | family.allowed_values, where)
    is_adapter = os.path.exists(os.path.join(path, "adapter_config.json"))
    require(not is_adapter, f"{path} holds an adapter; merge it into the weights first", "model")
    config = read_config(path, settings, where)
    if generation_config == "strict":
        check_generation(path, config.not_applied)
    tokenizer, config.bos_token_id = read_tokenizer(os.path.join(path, "tokenizer.json"))
    tokenizer_config = read_json(path, TOKENIZER_CONFIG, {})
    check_tokenizer(path, tokenizer, tokenizer_config)
    check_added_tokens(path, tokenizer_config, config.bos_token_id is not None)
    config.chat_template = read_chat_template(path, tokenizer_config)
    tensors = read_weights(path, config)
    weights = match_weights(config, tensors, hugging_face_name, path)
    interleave_rotary_pairs(weights, config)
    return config, weights, tokenizer


def read_family(path, settings):
    """The Family of a directory."""
    model_type = settings.get("model_type")
    known = isinstance(model_type, str) and model_type in FAMILIES
    message = f"{path} holds a {shown(model_type)} model; one of {', '.join(FAMILIES)} is needed"
    require(known, message, "model")
    family = FAMILIES[model_type]
    wanted = f"{family.classes}ForCausalLM"
    architectures = settings.get("architectures") or [wanted]
    message = f"{path} holds {shown(architectures)}; {wanted} is needed"
    require(architectures in ([wanted], [f"{family.classes}Model"]), message, "model")
    for key in family.explicit:
        require(key in settings, f"{path}: config.json has no {key}; download it again", "model")
    return family


def hugging_face_name(parameter):
    """layers.3.mlp.up_proj.weight -> model.layers.3.mlp.up_proj.weight"""
    return parameter if parameter.startswith("lm_head.") else f"model.{parameter}"


def read_config(path, settings, where):
    """config.json -> Config, still without bos_token_id, which only the tokenizer knows."""
    vocab_size = whole_number(settings, "vocab_size", where)
    dim = whole_number(settings, "hidden_size", where)
    n_heads = whole_number(settings, "num_attention_heads", where)
    if settings.get("head_dim") is None:
        message = f"{where}: {n_heads} heads cannot share {dim} features"
        require(dim % n_heads == 0, message, "model")
    max_seq_len = whole_number(settings, "max_position_embeddings", where, 2048, 1, 2**40)
    model_type = settings["model_type"]
    attention_bias = true_or_false(settings, "attention_bias", where)
    config = Config(
        vocab_size=vocab_size,
        dim=dim,
        n_layers=whole_number(settings, "num_hidden_layers", where),
        n_heads=n_heads,
        n_kv_heads=whole_number(settings, "num_key_value_heads", where, n_heads),
        head_dim=whole_number(settings, "head_dim", where, dim // n_heads),
        intermediate_size=whole_number(settings, "intermediate_size", where),
        norm_eps=positive_number(settings, "rms_norm_eps", where, 1e-6),
        max_seq_len=min(max_seq_len, 8192, read_window(settings, where)),
        tie_weights=true_or_false(settings, "tie_word_embeddings", where),
        attention_bias=attention_bias or model_type == "qwen2",
        output_bias=attention_bias and model_type != "qwen2",
        qk_norm=model_type == "qwen3",
        mlp_bias=true_or_false(settings, "mlp_bias", where),
    )
    config.rope_base, config.rope_scaling = read_rope(settings, max_seq_len, where)
    config.eos_token_ids, config.not_applied = read_generation(path, settings, vocab_size)
    check_sizes(config, where)
    return config


def read_window(settings, where):
    """How many tokens a token may attend to.

    A sliding window changes nothing as long as all tokens fit into it, so this limits the length.
    """
    window = settings.get("sliding_window")
    switches_window = FAMILIES[settings["model_type"]].switches_window
    if switches_window and not settings.get("use_sliding_window"):
        window = None
    layer_types = settings.get("layer_types")
    known = ("full_attention",) if window is None else ("full_attention", "sliding_attention")
    valid = layer_types is None
    valid = valid or isinstance(layer_types, list) and all(kind in known for kind in layer_types)
    message = f"{where}: 'layer_types' is {shown(layer_types)}"
    require(valid, f"{message}; only {' and '.join(known)} are computed here", "model")
    n_layers = settings.get("num_hidden_layers")
    message = f"{where}: layer_types names {len(layer_types or ())} layers, not {shown(n_layers)}"
    require(layer_types is None or len(layer_types) == n_layers, message, "model")
    if window is None:
        return math.inf
    return whole_number(settings, "sliding_window", where, None, 1, 2**40)


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
    if kind == "yarn":
        allowed |= dict.fromkeys(YARN_OPTIONS, ANY)
    elif kind in ("linear", "dynamic"):
        allowed["original_max_position_embeddings"] = ANY  # they do not use it
    check_settings(rope, allowed, where)
    base = positive_number(settings, "rope_theta", where, 10000.0)
    base = positive_number(rope, "rope_theta", where, base)
    defaults = {"original_max_position_embeddings": max_seq_len, "beta_fast": 32, "beta_slow": 1}
    scaling = {}
    for key in ROPE_PARAMETERS[kind]:
        scaling[key] = positive_number(rope, key, where, defaults.get(key))
    if kind == "llama3":
        ordered = scaling["low_freq_factor"] < scaling["high_freq_factor"]
        require(ordered, f"{where}: low_freq_factor must be below high_freq_factor", "model")
    elif kind == "yarn":
        require(base > 1, f"{where}: rope_theta is {base}, but yarn needs one above 1", "model")
        scaling |= {"rope_theta": base, "truncate": true_or_false(rope, "truncate", where, True)}
        scaling["attention_factor"] = yarn_attention_factor(rope, scaling["factor"], where)
    # Dynamic scaling begins beyond max_position_embeddings, where we refuse a prompt.
    has_effect = kind not in ("default", "dynamic")
    return base, {"rope_type": kind, **scaling} if has_effect else None


def yarn_attention_factor(rope, factor, where):
    """By how much YaRN lengthens queries and keys: as given, or 0.1 ln(factor) + 1."""

    def length(mscale):
        return 0.1 * mscale * math.log(max(factor, 1.0)) + 1.0

    if rope.get("attention_factor") is not None:
        return positive_number(rope, "attention_factor", where)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        mscale = positive_number(rope, "mscale", where)
        return length(mscale) / length(positive_number(rope, "mscale_all_dim", where))
    return length(1)


def read_generation(path, settings, vocab_size):
    """-> eos_token_ids, not_applied of Config.

    generation_config.json's end tokens if it has any, else config.json's.
    """
    file_name = "generation_config.json"
    where = os.path.join(path, file_name)
    found = {key: settings[key] for key in PENALTIES if key in settings}
    ids = ()
    if os.path.exists(where):
        generation = read_json(path, file_name)
        ids = eos_ids(generation.get("eos_token_id"), where, vocab_size)
        found |= generation
    if not ids:
        default = FAMILIES[settings["model_type"]].eos_token_id
        where = os.path.join(path, "config.json")
        ids = eos_ids(settings.get("eos_token_id", default), where, vocab_size)
    not_applied = []
    for key in sorted(found.keys() - {*READ_BELOW, *NO_EFFECT, *GENERATION}):
        if found[key] not in (None, [], {}, PENALTIES.get(key)):
            not_applied.append(f"{shown(key)} {shown(found[key])}")
    return ids, tuple(not_applied)


def check_generation(path, not_applied):
    """ConfigError if the files of a directory ask for more than greedy decoding."""
    message = f"{path} asks for {', '.join(not_applied)} in generation_config.json or config.json"
    hint = "answers here are decoded greedily without; to accept that, --generation_config plain"
    require(not not_applied, f"{message}; {hint}", "model")


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
    except BaseException as e:
        raise refusal(e, f"{file} cannot be read as a tokenizer.json", "model") from None
    n = len(bare_ids)
    starts = [i for i in range(len(ids) - n + 1) if ids[i : i + n] == bare_ids]
    require(starts, f"{file} puts other tokens in place of those of a text", "model")
    before, after = ids[: starts[0]], ids[starts[0] + n :]
    message = f"{file} puts {len(before)} tokens before a text; at most one is known here"
    require(len(before) <= 1, message, "model")
    message = f"{file} puts {len(after)} tokens after a text, where the answer is to follow"
    require(not after, message, "model")
    return tokenizer, before[0] if before else None


def token_ids(tokenizer, text):
    """Token ids of a text, without those that the tokenizer puts around it."""
    try:
        return tokenizer.encode(text, add_special_tokens=False).ids
    except BaseException as e:
        raise refusal(e, f"the tokenizer cannot encode {shown(text)}", "model") from None


def decoded(tokenizer, ids, **options):
    """The text of token ids."""
    try:
        return tokenizer.decode(ids, **options)
    except BaseException as e:
        raise refusal(e, f"the tokenizer cannot decode {shown(ids)}", "model") from None


def adds_space(tokenizer):
    """Does it put a space before a text, as SentencePiece does?"""
    letter, after_line_break = token_ids(tokenizer, "Q"), token_ids(tokenizer, "\nQ")
    return after_line_break[len(after_line_break) - len(letter) :] != letter


def check_added_tokens(path, found, has_bos):
    """ConfigError if tokenizer_config.json asks for other tokens around a text.

    found: this file. Where it has one of the settings, transformers follows both, and not
    tokenizer.json, which puts a BOS token if has_bos, and no EOS token.
    """
    if "add_bos_token" not in found and "add_eos_token" not in found:
        return
    for name, is_put in (("bos", has_bos), ("eos", False)):
        setting = f"add_{name}_token"
        is_asked = found.get(setting) is not None and true_or_false(found, setting, path)
        token = f"{name}_token"
        if is_asked and token not in found:  # another file has it, or its class
            continue
        # A token that is null is put nowhere.
        is_asked = is_asked and bool(found[token])
        asks = f"{TOKENIZER_CONFIG} asks for {'one' if is_asked else 'no'} {name.upper()} token"
        message = f"{path}: {asks}, tokenizer.json puts {'one' if is_put else 'none'}"
        require(is_asked == is_put, f"{message}; save the tokenizer again", "model")


def check_tokenizer(path, tokenizer, found):
    """ConfigError if other files ask for another tokenizer than tokenizer.json.

    found: tokenizer_config.json.
    """
    differs = found.get("add_prefix_space") is False and adds_space(tokenizer)
    # Other classes of transformers do not read this setting.
    differs = differs and str(found.get("tokenizer_class")).startswith("Llama")
    message = f"{path}: {TOKENIZER_CONFIG} wants no space before a text, tokenizer.json puts one"
    require(not differs, f"{message}; save the tokenizer again", "model")
    number_of = read_json(path, ADDED_TOKENS, {})
    decoder = found.get("added_tokens_decoder") or {}
    require(isinstance(decoder, dict), f"{path}: added_tokens_decoder is no JSON object", "model")
    for number, entry in decoder.items():
        message = f"{path}: added_tokens_decoder has {shown(entry)}, in which there is no token"
        valid = isinstance(entry, dict) and isinstance(entry.get("content"), str)
        require(valid, message, "model")
        number_of[entry["content"]] = number
    for text, number in number_of.items():
        ids = token_ids(tokenizer, text)
        message = f"{path}: tokenizer.json does not make token {shown(number)} of {shown(text)}"
        hint = f"as {TOKENIZER_CONFIG} or {ADDED_TOKENS} says; save the tokenizer again"
        require(str(number) in map(str, ids), f"{message}, {hint}", "model")


def read_chat_template(path, found):
    """-> ChatTemplate; chat_template.jinja goes before the one in found, tokenizer_config.json."""
    source, file = found.get("chat_template"), os.path.join(path, CHAT_TEMPLATE)
    if os.path.exists(file):
        try:
            with open(file, encoding="utf-8") as f:
                source = f.read()
        except (OSError, ValueError) as e:
            reason = " ".join(str(e).split())[:80]
            raise ConfigError(f"{file} cannot be read ({reason})", "model") from None
    return ChatTemplate(source, found.get("bos_token"), found.get("eos_token"))


# ---- weights -------------------------------------------------------------------------------------


def weight_files(path):
    """Names of the files with the weights. ConfigError if one is outside the directory."""
    index_file, single_file = os.path.join(path, INDEX), os.path.join(path, "model.safetensors")
    if not os.path.exists(index_file):
        return ["model.safetensors"]
    weight_map = read_json(path, INDEX).get("weight_map")
    valid = isinstance(weight_map, dict) and weight_map
    valid = valid and all(isinstance(name, str) for name in weight_map.values())
    require(valid, f"{index_file} has no weight_map of file names", "model")
    names = sorted(set(weight_map.values()))
    message = f"{path} holds model.safetensors and an {INDEX} of other files; keep what is meant"
    is_one = "model.safetensors" in names or not os.path.exists(single_file)
    require(is_one, message, "model")
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
    has_index = os.path.exists(os.path.join(path, INDEX))
    for file_name in weight_files(path):
        file = os.path.join(path, file_name)
        message = f"{file} is missing; download all parts that {INDEX} names"
        if not has_index:
            message = f"{file} is missing, and there is no {INDEX}; other forms are not read"
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
    if has_index:
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


def read_json(path, name, default=None):
    """The object in a JSON file of a directory; of a file that is missing the default, if given."""
    file = os.path.join(path, name)
    if default is not None and not os.path.exists(file):
        return default
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
