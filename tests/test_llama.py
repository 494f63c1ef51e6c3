"""llama.py and its readers, against transformers.

Each setting, tensor and file of a model that a user brings is computed, or refused in a sentence.
"""

import json
import os
import random
import shutil
import unicodedata

import numpy as np
import pytest
import torch

from myriadlama import decoding, fact_files, fusion, gguf_files, hugging_face, loading, prompts
from nanorecall.settings import ConfigError
from toys_llama import (
    LLAMA3,
    Q_PROJ,
    byte_level_tokenizer,
    causal_logits,
    change_json,
    change_weights,
    decode_fused,
    load_theirs,
    logits_difference,
    save_gguf,
    save_llama,
)

pytest.importorskip("transformers")
pytest.importorskip("safetensors")
from tokenizers import (  # noqa: E402
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)


def assert_refused(folder, message):
    with pytest.raises(ConfigError, match=message) as error:
        loading.load(str(folder))
    assert "\n" not in str(error.value)


# ---- the same logits as transformers -------------------------------------------------------------


@pytest.mark.parametrize("name, n_files", [("plain", 1), ("scaled", 10)])
def test_logits_equal_transformers(tiny_llamas, name, n_files):
    assert len(list((tiny_llamas / name).glob("*.safetensors"))) == n_files
    model, _ = loading.load(str(tiny_llamas / name))
    tokens = torch.randint(256, (3, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = load_theirs(tiny_llamas / name)(tokens).logits
    got = causal_logits(model, tokens)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    assert torch.equal(got.argmax(-1), expected.argmax(-1))
    assert model.config.eos_token_ids == (2, 5)


def test_smollm2_equals_transformers(smollm2):
    """1,000 prompts are encoded alike, and 300 tokens of them get the same logits."""
    model, tokenizer, theirs, their_tokenizer = smollm2
    texts = []
    for fact in fact_files.read_facts("")[:100]:
        for template in fact["manual"] + fact["auto"]:
            question = prompts.fill(template, fact["subject"])
            texts.append(f"Q: {question}\nA: {fact['answers'][0]}\n\n")
    assert len(texts) == 1000
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert ids == their_tokenizer(texts, add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([sum(ids, [])[:300]])
    with torch.no_grad():
        expected = theirs(tokens).logits
    got = causal_logits(model, tokens)
    assert torch.equal(got.argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-5)


def test_rope_stays_float32_under_bfloat16(tiny_llamas):
    model, _ = loading.load(str(tiny_llamas / "plain"), dtype=torch.bfloat16)
    assert model.rope_table.dtype == torch.float32
    assert model.embed_tokens.weight.dtype == torch.bfloat16


def test_a_prompt_longer_than_the_positions_is_a_sentence(plain_llama):
    model, _ = loading.load(str(plain_llama))
    causal_logits(model, torch.zeros(1, 512, dtype=torch.long))
    with pytest.raises(ConfigError, match="prompt of 513 tokens is longer than the 512 positions"):
        causal_logits(model, torch.zeros(1, 513, dtype=torch.long))


# ---- settings of config.json ---------------------------------------------------------------------


LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 500.0}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "rope_theta": 500.0,
    "original_max_position_embeddings": 128,
}
SHARED_VARIATIONS = [
    {},
    {"tie_word_embeddings": True},
    {"head_dim": 16},
    {"num_key_value_heads": 1},
    {"num_key_value_heads": 4, "rms_norm_eps": 0.1},
    {"rope_parameters": LINEAR},
    {"rope_parameters": YARN},
]
VARIATIONS = [
    *[(kind, changes) for kind in hugging_face.FAMILIES for changes in SHARED_VARIATIONS],
    ("llama", {"attention_bias": True}),
    ("llama", {"mlp_bias": True}),
    ("llama", {"head_dim": 16, "attention_bias": True, "mlp_bias": True}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("llama", {"rope_parameters": DYNAMIC}),
    ("llama", {"rope_parameters": YARN | {"attention_factor": 1.3}}),
    ("llama", {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}}),
    ("llama", {"rope_parameters": YARN | {"beta_fast": 8.0, "beta_slow": 2.0}}),
    ("llama", {"rope_parameters": YARN | {"truncate": False}}),
    # The last pair that is interpolated would lie beyond the last one.
    ("llama", {"rope_parameters": YARN | {"beta_slow": 2e-4}}),
    ("llama", {"rope_parameters": YARN | {"original_max_position_embeddings": 4}}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 101}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 101, "max_window_layers": 1}),
    ("qwen2", {"rope_parameters": YARN, "tie_word_embeddings": True, "num_key_value_heads": 4}),
    ("qwen3", {"attention_bias": True}),
    ("qwen3", {"attention_bias": True, "head_dim": 16, "tie_word_embeddings": True}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 101, "max_window_layers": 0}),
]


@pytest.mark.parametrize("model_type, changes", VARIATIONS)
def test_logits_and_greedy_tokens_of_every_variation(tmp_path, model_type, changes):
    """Those of transformers; the tokens are decoded from a cache, five after a prompt of 95."""
    if model_type == "qwen3":
        changes = {"head_dim": 8} | changes  # Qwen3 has a width of its own
    folder = save_llama(tmp_path / "model", model_type=model_type, **changes)
    model, _ = loading.load(folder)
    tokens = torch.randint(256, (2, 100), generator=torch.Generator().manual_seed(1))
    theirs = load_theirs(folder)
    with torch.no_grad():
        expected = theirs(tokens).logits
    got = causal_logits(model, tokens)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    assert float(expected.std()) > 0.1  # the variations would not show in a constant

    prompt = tokens[0, :95].tolist()
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(tokens[:1, :95], max_new_tokens=5, do_sample=False)[0, 95:].tolist()
    question = fusion.Question([prompt[20:94]], torch.tensor([True]), prompt[94], [])
    got = decode_fused(model, prompt[:20], [question], "isolated", "restart", max_new_tokens=5)
    assert got == [expected]


@pytest.mark.parametrize(
    "model_type, changes",
    [
        ("mistral", {"sliding_window": 32}),
        # A Mistral's window has no switch.
        ("mistral", {"sliding_window": 32, "use_sliding_window": False}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}),
    ],
)
def test_prompts_end_where_a_sliding_window_begins_to_slide(tmp_path, model_type, changes):
    """32 tokens are equal to transformers'; 33 are refused, and would be other ones."""
    folder = save_llama(tmp_path / "model", model_type=model_type, **changes)
    assert logits_difference(folder, 32) < 1e-4
    model, _ = loading.load(folder)
    tokens = torch.zeros(1, 33, dtype=torch.long)
    with pytest.raises(ConfigError, match="33 tokens is longer than the 32 positions"):
        causal_logits(model, tokens)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_a_window_that_is_not_switched_on(other_families, tmp_path, model_type):
    """Qwen's window means nothing without use_sliding_window, whose default is false."""
    folder = shutil.copytree(other_families[model_type], tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    del settings["use_sliding_window"]
    (folder / "config.json").write_text(json.dumps(settings | {"sliding_window": 32}))
    assert logits_difference(folder, 100) < 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {"residual_dropout": 0.1, "pad_token": "<pad>", "neftune_noise_alpha": 5},
        {"output_router_logits": False, "router_aux_loss_coef": 0.01, "max_window_layers": 21},
        {"keys_to_ignore_at_inference": ["past_key_values"], "pad_token_id": -1},
        {"pretraining_tp": 2, "attention_dropout": 0.5, "torch_dtype": "float16"},
    ],
)
def test_settings_of_no_effect(plain_llama, changes):
    change_json(plain_llama / "config.json", **changes)
    assert logits_difference(plain_llama, 100) < 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "default"}},
        {"rope_parameters": LINEAR | {"original_max_position_embeddings": 32}},
        {"rope_parameters": DYNAMIC | {"original_max_position_embeddings": 32}},
        {"rope_parameters": None, "rope_theta": 300.0},
        {
            "rope_parameters": None,
            "rope_theta": 300.0,
            "rope_scaling": {"type": "linear", "factor": 2},
        },
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 300.0},
        {"rope_parameters": {k: v for k, v in LLAMA3.items() if not k.startswith("original")}},
    ],
)
def test_rotary_settings_in_every_style(plain_llama, changes):
    change_json(plain_llama / "config.json", **changes)
    assert logits_difference(plain_llama, 300) < 1e-4


@pytest.mark.parametrize(
    "key, value",
    [
        ("hidden_act", "gelu"),
        ("hidden_act", "gelu_pytorch_tanh"),
        ("sliding_window", 16),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("use_qk_norm", True),
        ("qk_layernorm", True),
        ("use_sliding_window", True),
        ("use_mrope", True),
        ("is_encoder_decoder", True),
        ("add_cross_attention", True),
        ("logit_scale", 0.5),
        ("no_rope_layers", [0, 1]),
        ("attention_chunk_size", 64),
        ("num_experts", 8),
        ("num_local_experts", 8),
        ("quantization_config", {"quant_method": "fp8"}),
        ("attention_multiplier", 0.01),
        ("residual_multiplier", 0.22),
        ("embedding_multiplier", 12),
        ("logits_scaling", 8.0),
        ("partial_rotary_factor", 0.5),
        ("rope_interleaved", True),
        ("layer_types", ["sliding_attention", "full_attention"]),
        ("scale_emb", 12),
        ("query_pre_attn_scalar", 256),
        ("quantization", {"bits": 4}),
        ("rotary_pct", 0.5),
        ("use_bias", True),
        ("clip_qkv", 8),
        ("scale_depth", 1.4),
        ("auto_map", {"AutoModelForCausalLM": "own.Model"}),
        ("pruned_heads", {"0": [1]}),
    ],
)
def test_settings_that_are_refused_by_name(plain_llama, key, value):
    change_json(plain_llama / "config.json", **{key: value})
    assert_refused(plain_llama, f"config.json: '{key}' is ")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "gemma2"}, "holds a 'gemma2' model; one of llama, mistral, qwen2, qwen3"),
        ({"model_type": ["llama"]}, "holds a 'llama' model; one of"),
        ({"model_type": "qwen2"}, "holds 'LlamaForCausalLM'; Qwen2ForCausalLM is needed"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForCausalLM is needed"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "config.json: factor is missing"),
        ({"rope_parameters": YARN | {"rope_theta": 1}}, "yarn needs one above 1"),
        ({"rope_parameters": YARN | {"beta_slow": 0}}, "beta_slow is 0, but must be a number"),
        ({"rope_parameters": YARN | {"truncate": 1}}, "truncate is 1, not true or false"),
        ({"rope_parameters": YARN | {"mscale": "a", "mscale_all_dim": 1}}, "mscale is 'a'"),
        ({"rope_parameters": YARN | {"attention_factor": -1}}, "attention_factor is -1"),
        ({"rope_parameters": YARN | {"short_factor": [1]}}, "'short_factor' is "),
        ({"rope_parameters": {"full_attention": YARN}}, "'full_attention' is "),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "'partial_rotary_factor' is 0.5"),
        ({"rope_parameters": {"rope_type": "proportional"}}, "scaling 'proportional' is not"),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "longrope"}},
            "'longrope' is not known",
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, "config.json: factor is missing"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta is 0, but must be a number above 0"),
        ({"rope_parameters": {"attention_factor": 2}}, "'attention_factor' is 2, a setting that"),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": 4}}, "must be below high_freq_factor"),
        ({"rope_parameters": 3}, "its rotary settings are 3"),
        ({"layer_types": ["full_attention"]}, "layer_types names 1 layers, not 2"),
        ({"layer_types": []}, "layer_types names 0 layers, not 2"),
        ({"vocab_size": "256"}, "vocab_size is '256', but must be a whole number"),
        ({"hidden_size": 10**30}, "hidden_size is 1000000"),
        ({"num_hidden_layers": 10**6}, "too few for 1000000 layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_key_value_heads": 3}, "4 heads cannot share 3 key and value heads"),
        ({"head_dim": 7}, "rotary positions need an even width"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"attention_bias": "yes"}, "attention_bias is 'yes', not true or false"),
        ({"attention_bias": True}, "has no weights for model.layers.0.self_attn.q_proj.bias"),
        ({"num_hidden_layers": 1}, "holds 'model.layers.1.input_layernorm.weight', .*left out"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id is 'x'"),
        ({"eos_token_id": 256}, "eos_token_id is 256"),
    ],
)
def test_settings_that_cannot_be(plain_llama, changes, message):
    os.remove(plain_llama / "generation_config.json")
    change_json(plain_llama / "config.json", **changes)
    assert_refused(plain_llama, message)


@pytest.fixture(scope="session")
def other_families(tmp_path_factory):
    """Directories of the other model types: {model type: path}."""
    folders = {}
    for kind in ("mistral", "qwen2", "qwen3"):
        folders[kind] = tmp_path_factory.mktemp("families") / kind
        save_llama(folders[kind], model_type=kind, head_dim=8, sliding_window=None)
    return folders


@pytest.mark.parametrize(
    "model_type, changes, message",
    [
        ("mistral", {"attention_bias": True}, "'attention_bias' is True; only None or False"),
        ("mistral", {"mlp_bias": True}, "'mlp_bias' is True"),
        ("mistral", {"use_sliding_window": True}, "'use_sliding_window' is True"),
        ("mistral", {"sliding_window": "all"}, "sliding_window is 'all', but must be a whole"),
        ("mistral", {"layer_types": ["sliding_attention"] * 2}, "only full_attention are comp"),
        ("mistral", {"num_key_value_heads": ...}, "config.json has no num_key_value_heads"),
        ("mistral", {"sliding_window": ...}, "config.json has no sliding_window"),
        ("qwen2", {"attention_bias": False}, "'attention_bias' is False; only None or True"),
        ("qwen2", {"mlp_bias": True}, "'mlp_bias' is True"),
        ("qwen2", {"use_mrope": True}, "'use_mrope' is True"),
        ("qwen2", {"use_qk_norm": True}, "'use_qk_norm' is True"),
        ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 4}}, "that is not known here"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "only full_attention are comp"),
        ("qwen2", {"layer_types": ["linear_attention"]}, "'layer_types' is 'linear_attention'"),
        ("qwen2", {"layer_types": 3}, "'layer_types' is 3"),
        ("qwen2", {"use_sliding_window": "no"}, "'use_sliding_window' is 'no'"),
        ("qwen3", {"use_qk_norm": False}, "'use_qk_norm' is False; only None or True"),
        ("qwen3", {"mlp_bias": True}, "'mlp_bias' is True"),
        ("qwen3", {"num_experts": 4}, "'num_experts' is 4"),
        ("qwen3", {"head_dim": ...}, "config.json has no head_dim"),
        ("qwen3", {"attention_bias": True}, "has no weights for model.layers.0.self_attn.q_proj.b"),
    ],
)
def test_settings_of_other_families_are_refused(
    other_families, tmp_path, model_type, changes, message
):
    """... stands for a key that is missing, whose default is another than Llama's."""
    folder = shutil.copytree(other_families[model_type], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    assert_refused(folder, message)


@pytest.mark.parametrize(
    "model_type, other, message",
    [
        ("mistral", "qwen2", "no weights for model.layers.0.self_attn.q_proj.bias"),
        ("mistral", "qwen3", "no weights for model.layers.0.self_attn.q_norm.weight"),
        ("qwen2", "llama", "holds 'model.layers.0.self_attn.k_proj.bias'"),
        ("qwen2", "qwen3", "holds 'model.layers.0.self_attn.k_proj.bias'"),
        ("qwen3", "llama", "holds 'model.layers.0.self_attn.k_norm.weight'"),
        ("qwen3", "qwen2", "holds 'model.layers.0.self_attn.k_norm.weight'"),
    ],
)
def test_a_family_is_not_taken_for_another(other_families, tmp_path, model_type, other, message):
    """Its tensors say what it is."""
    folder = shutil.copytree(other_families[model_type], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for key in ("attention_bias", "sliding_window", "use_sliding_window", "max_window_layers"):
        config.pop(key, None)
    classes = hugging_face.FAMILIES[other].classes
    config |= {"model_type": other, "architectures": [f"{classes}ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    assert_refused(folder, message)


# Each changes which tokens transformers gives, or how long it goes on, without sampling.
ASKS_FOR_MORE = {
    "min_length": 5,
    "min_new_tokens": 5,
    "max_time": 3.0,
    "stop_strings": ["."],
    "num_beams": 4,
    "num_beam_groups": 2,
    "diversity_penalty": 0.5,
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "guidance_scale": 1.5,
    "repetition_penalty": 1.05,
    "encoder_repetition_penalty": 1.1,
    "no_repeat_ngram_size": 3,
    "encoder_no_repeat_ngram_size": 3,
    "bad_words_ids": [[7]],
    "force_words_ids": [[7]],
    "constraints": [7],
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 2,
    "forced_decoder_ids": [[1, 7]],
    "exponential_decay_length_penalty": [2, 1.5],
    "sequence_bias": [[[7], -2.0]],
    "suppress_tokens": [7],
    "begin_suppress_tokens": [7],
    "token_healing": True,
    "watermarking_config": {"bias": 2.5},
}
NEUTRAL = {
    "min_length": 0,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "suppress_tokens": [],
    "bad_words_ids": None,
    "token_healing": False,
}
SAMPLING = {
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.8,
    "min_p": 0.1,
    "typical_p": 0.9,
    "renormalize_logits": True,
    "max_new_tokens": 2,
}


@pytest.mark.parametrize("key", ASKS_FOR_MORE)
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_more_than_greedy_decoding_is_refused_by_name(plain_llama, name, key):
    change_json(plain_llama / name, **SAMPLING, **NEUTRAL | {key: ASKS_FOR_MORE[key]})
    assert_refused(plain_llama, f"asks for '{key}' .* --generation_config plain")
    model, _ = loading.load(str(plain_llama), generation_config="plain")
    assert [text.split()[0] for text in model.config.not_applied] == [f"'{key}'"]


def test_all_settings_that_change_greedy_decoding_are_tested():
    assert hugging_face.PENALTIES.keys() == ASKS_FOR_MORE.keys()


def test_an_unknown_setting_of_generation_is_refused(plain_llama):
    change_json(plain_llama / "generation_config.json", unheard_of=1)
    assert_refused(plain_llama, "asks for 'unheard_of' 1 ")


def test_settings_of_sampling_are_not_refused(plain_llama):
    change_json(plain_llama / "generation_config.json", **SAMPLING, **NEUTRAL)
    assert loading.load(str(plain_llama))[0].config.not_applied == ()


def test_a_value_in_generation_config_goes_before_one_in_config(plain_llama):
    change_json(plain_llama / "config.json", num_beams=4)
    change_json(plain_llama / "generation_config.json", num_beams=1)
    assert loading.load(str(plain_llama))[0].config.not_applied == ()


@pytest.mark.parametrize(
    "text", ["[]", "3", "{", "\ufeff{}", "[" * 5000, '{"a": 1' + "0" * 5000 + "}"]
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
def test_files_that_are_no_json_objects(plain_llama, name, text):
    (plain_llama / name).write_text(text)
    assert_refused(plain_llama, f"{name} (is no JSON|holds no JSON object|cannot be read)")


@pytest.mark.parametrize(
    "generation, config, eos",
    [
        ({"eos_token_id": None}, [7, 8], (7, 8)),
        ({"eos_token_id": [9, 10, 11]}, 7, (9, 10, 11)),
        ({}, 7, (7,)),
        (None, 7, (7,)),
        ({"eos_token_id": []}, 7, (7,)),
        (None, None, ()),
    ],
)
def test_tokens_that_end_an_answer(plain_llama, generation, config, eos):
    os.remove(plain_llama / "generation_config.json")
    if generation is not None:
        (plain_llama / "generation_config.json").write_text(json.dumps(generation))
    change_json(plain_llama / "config.json", eos_token_id=config)
    assert loading.load(str(plain_llama))[0].config.eos_token_ids == eos


# ---- weights -------------------------------------------------------------------------------------


def set_weight(name, value):
    return lambda weights: weights.update({name: value})


@pytest.mark.parametrize(
    "spoil, message",
    [
        (set_weight("model.layers.0.self_attn.q_norm.weight", torch.ones(8)), "q_norm.weight'"),
        (set_weight(Q_PROJ + "_scale", torch.ones(1)), "holds '.*q_proj.weight_scale'"),
        (set_weight(Q_PROJ, torch.zeros(32, 32).to(torch.float8_e4m3fn)), "of type float8_e4m3fn"),
        (set_weight(Q_PROJ, torch.zeros(32, 32, dtype=torch.int8)), "of type int8; only floats"),
        (set_weight(Q_PROJ, torch.zeros(31, 32)), r"has shape \(31, 32\), not \(32, 32\)"),
        (set_weight(Q_PROJ, torch.zeros(32)), r"q_proj.weight has shape \(32,\)"),
        (set_weight("layers.0.self_attn.q_proj.weight", torch.ones(1)), "is there twice"),
        (
            set_weight("model.rotary_emb.inv_freq", torch.ones(4)),
            "other frequencies than config.json's",
        ),
        (lambda weights: weights.pop("lm_head.weight"), "has no weights for lm_head.weight"),
        (lambda weights: weights.pop(Q_PROJ), f"has no weights for {Q_PROJ}"),
    ],
)
def test_tensors_that_are_refused_by_name(plain_llama, spoil, message):
    change_weights(plain_llama, spoil)
    assert_refused(plain_llama, message)


def test_copies_of_rope_frequencies_are_left_out(plain_llama):
    frequencies = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    change_weights(plain_llama, set_weight(name, frequencies))
    assert logits_difference(plain_llama) < 1e-4


def test_a_tied_head_may_be_there_if_it_is_the_same(plain_llama):
    change_json(plain_llama / "config.json", tie_word_embeddings=True)
    message = "config.json ties lm_head.weight to the embeddings, but the file has another"
    assert_refused(plain_llama, message)

    def tie(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    change_weights(plain_llama, tie)
    assert logits_difference(plain_llama) < 1e-4


def write_index(folder, names):
    """Rename the file of weights, and write an index with {name of a weight: file}."""
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    text = json.dumps({"metadata": {}, "weight_map": names})
    (folder / hugging_face.INDEX).write_text(text)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../part.safetensors", "sub/part", "..", "", "a\0b"]
)
def test_an_index_stays_in_its_directory(plain_llama, name):
    write_index(plain_llama, {Q_PROJ: name})
    assert_refused(plain_llama, "model.safetensors.index.json names '.*', outside it")


def test_links_of_an_index(plain_llama, tmp_path):
    """One out of the directory is refused; the hub's cache has every file beside snapshots/."""
    write_index(plain_llama, {Q_PROJ: "part.safetensors"})
    (plain_llama / "part.safetensors").rename(tmp_path / "elsewhere")
    (plain_llama / "part.safetensors").symlink_to(tmp_path / "elsewhere")
    assert_refused(plain_llama, "names 'part.safetensors', outside it")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "elsewhere").rename(tmp_path / "blobs" / "sum")
    snapshot = tmp_path / "snapshots" / "1"
    shutil.copytree(plain_llama, snapshot, symlinks=True)
    os.remove(snapshot / "part.safetensors")
    (snapshot / "part.safetensors").symlink_to("../../blobs/sum")
    assert logits_difference(snapshot) < 1e-4


def test_an_index_and_its_files_say_the_same(plain_llama):
    shutil.copy(plain_llama / "model.safetensors", plain_llama / "copy")
    write_index(plain_llama, {Q_PROJ: "part.safetensors", "model.more.weight": "part.safetensors"})
    message = "no file holds 'model.more.weight', which model.safetensors.index.json names"
    assert_refused(plain_llama, message)
    (plain_llama / hugging_face.INDEX).write_text(json.dumps({"weight_map": [1]}))
    assert_refused(plain_llama, "has no weight_map of file names")
    (plain_llama / "copy").rename(plain_llama / "model.safetensors")
    assert_refused(plain_llama, "has no weight_map of file names")
    index = {"weight_map": {Q_PROJ: "part.safetensors"}}
    (plain_llama / hugging_face.INDEX).write_text(json.dumps(index))
    assert_refused(plain_llama, "holds model.safetensors and an .* of other files")
    # MLX writes an index beside the only file.
    index = {"weight_map": {"a": "model.safetensors"}}
    (plain_llama / hugging_face.INDEX).write_text(json.dumps(index))
    assert hugging_face.weight_files(plain_llama) == ["model.safetensors"]


def test_weights_in_another_form(plain_llama):
    (plain_llama / "model.safetensors").rename(plain_llama / "pytorch_model.bin")
    assert_refused(plain_llama, "model.safetensors is missing, and there is no model.safetensors.i")


def test_an_adapter_is_not_left_out(plain_llama):
    (plain_llama / "adapter_config.json").write_text("{}")
    assert_refused(plain_llama, "holds an adapter; merge it into the weights first")


def test_a_name_twice_in_a_safetensors_file(plain_llama):
    entry = '"a":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
    head = ("{" + entry % (0, 4) + "," + entry % (4, 8) + "}").encode()
    file = len(head).to_bytes(8, "little") + head + bytes(8)
    (plain_llama / "model.safetensors").write_bytes(file)
    assert_refused(plain_llama, "model.safetensors cannot be read")


# ---- GGUF files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model_type, changes",
    [
        ("llama", {}),
        ("llama", {"head_dim": 16, "tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "num_key_value_heads": 4}),
        ("qwen2", {}),
        ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
        ("qwen3", {"head_dim": 16}),
        ("qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 8, "attention_bias": True}),
    ],
)
def test_gguf_files_of_every_architecture(tmp_path, model_type, changes):
    folder = tmp_path / "model"
    save_llama(folder, model_type=model_type, **changes)
    model, _ = loading.load(save_gguf(tmp_path / "model.gguf", folder))
    tokens = torch.randint(256, (2, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = load_theirs(folder)(tokens).logits
    torch.testing.assert_close(causal_logits(model, tokens), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("rope_type", ["llama3", "linear"])
def test_gguf_files_are_computed(tmp_path, rope_type):
    """With biases and rotary scaling: Llama 3's is a tensor there, linear scaling two fields."""
    rope = LLAMA3
    if rope_type == "linear":
        rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
    folder = tmp_path / "model"
    save_llama(folder, rope_parameters=rope, attention_bias=True, mlp_bias=True)
    theirs = load_theirs(folder)
    tokens = torch.randint(256, (2, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(tokens).logits
    tensors, fields = {}, {}
    if rope_type == "linear":
        fields["llama.rope.scaling.type"] = ("add_string", "linear")
        fields["llama.rope.scaling.factor"] = ("add_float32", 4.0)
    else:
        unscaled = 500.0 ** -(torch.arange(0, 8, 2) / 8)
        factors = unscaled / theirs.model.rotary_emb.inv_freq
        tensors["rope_freqs.weight"] = factors.numpy()
    model, _ = loading.load(save_gguf(tmp_path / "model.gguf", folder, tensors, fields))
    torch.testing.assert_close(causal_logits(model, tokens), expected, atol=1e-4, rtol=0)


def test_ends_of_answers_in_gguf_files(plain_llama, tmp_path):
    fields = {
        "tokenizer.ggml.eot_token_id": ("add_uint32", 7),
        "tokenizer.ggml.eom_token_id": ("add_uint32", 9),
    }
    file = save_gguf(tmp_path / "model.gguf", plain_llama, fields=fields)
    assert loading.load(file)[0].config.eos_token_ids == (2, 7, 9)


def test_notes_in_a_gguf_file_are_no_settings(plain_llama, tmp_path):
    """Whoever quantizes a file may leave keys of their own in it."""
    fields = {"somebody.quantize_version": ("add_uint32", 2), "note": ("add_string", "mine")}
    loading.load(save_gguf(tmp_path / "model.gguf", plain_llama, fields=fields))


@pytest.mark.parametrize(
    "tensors, fields, message",
    [
        ({"blk.0.attn_q.bias": np.zeros(32, np.float32)}, {}, "no weights for blk.0.attn_k.bias"),
        (
            {"blk.0.attn_q_norm.weight": np.ones(8, np.float32)},
            {},
            "holds 'blk.0.attn_q_norm.weight'",
        ),
        ({"rope_freqs.weight": np.zeros(4, np.float32)}, {}, "are not 4 factors above 0"),
        ({}, {"llama.rope.scaling.type": ("add_string", "yarn")}, "scaling 'yarn' is not known"),
        ({}, {"llama.rope.dimension_count": ("add_uint32", 4)}, "is not the width of a head, 8"),
        ({}, {"llama.attention.sliding_window": ("add_uint32", 4)}, "a setting that is not known"),
        ({}, {"llama.expert_count": ("add_uint32", 8)}, "'llama.expert_count' is 8; only 0"),
        ({}, {"llama.vocab_size": ("add_uint32", 300)}, "is not its number of tokens, 256"),
        ({}, {"tokenizer.ggml.eot_token_id": ("add_uint32", 999)}, "eos_token_id is 999"),
        ({}, {"tokenizer.ggml.add_bos_token": ("add_bool", True)}, "bos_token_id is missing"),
    ],
)
def test_gguf_files_that_are_refused(plain_llama, tmp_path, tensors, fields, message):
    assert_refused(save_gguf(tmp_path / "model.gguf", plain_llama, tensors, fields), message)


@pytest.mark.parametrize(
    "model_type, architecture, message",
    [
        ("llama", "qwen2", "has no weights for blk.0.attn_q.bias"),
        ("qwen3", "qwen2", "holds 'blk.0.attn_k_norm.weight'"),
        ("llama", "qwen3", "has no weights for blk.0.attn_q_norm.weight"),
        ("llama", "gemma2", "is of architecture gemma2; only llama, qwen2, qwen3 are computed"),
    ],
)
def test_an_architecture_is_not_taken_for_another(tmp_path, model_type, architecture, message):
    folder = tmp_path / "model"
    save_llama(folder, model_type=model_type, head_dim=8)
    file = save_gguf(tmp_path / "model.gguf", folder, architecture=architecture)
    assert_refused(file, message)


END_TOKENS = {
    "smollm": [],
    "llama-bpe": ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"],
    "qwen2": ["<|endoftext|>", "<|im_end|>"],
}


def trained_fields(pre):
    """Metadata of a GGUF file whose tokenizer was trained on the built-in facts.

    Its merges join more than any kind of tokenizer may, and the token " zzqq" has no merges.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=499,
        special_tokens=["<|start|>", *END_TOKENS[pre]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3 + fact_texts(), trainer)
    found = json.loads(tokenizer.to_str())["model"]
    tokens = [*sorted(found["vocab"], key=found["vocab"].get), "\u0120zzqq"]
    return {
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in found["merges"]],
        "tokenizer.ggml.token_type": [3 if token.startswith("<|") else 1 for token in tokens],
    }


TEXTS = [
    " 1234567 1234567 7654321 7654321 zzqq",
    "Q: The H\u00e9l\u00e8ne  of 1234567 m\u00b2 isn't [MASK].\nA: 42\n\n",
    "Q: We'LL see  12 or\t123 \r\n x\u0301 e\u0301\u4e2d\u6587 in 2024!!\nA:",
    "\n\n  a b c 1,000.00 they're\u00a0HERE \u0e01\u0e33",
]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"qwen2.rope.scaling.type": ("add_string", "yarn")}, "scaling 'yarn' is not known"),
        ({"qwen2.attention.sliding_window": ("add_uint32", 4)}, "'qwen2.attention.sliding_window'"),
        ({"qwen2.expert_count": ("add_uint32", 8)}, "'qwen2.expert_count' is 8; only 0"),
        ({"qwen2.logit_scale": ("add_float32", 8)}, "'qwen2.logit_scale' is 8.0; only 0 or 1"),
        ({"llama.context_length": ("add_uint32", 8)}, "'llama.context_length' is 8, a setting"),
        ({"qwen2.rope.dimension_count": ("add_uint32", 4)}, "qwen2.rope.dimension_count is not"),
    ],
)
def test_settings_of_another_architecture_are_refused(other_families, tmp_path, fields, message):
    file = save_gguf(tmp_path / "model.gguf", other_families["qwen2"], fields=fields)
    assert_refused(file, message)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tokenizer.ggml.model": "llama"}, "is 'llama'; only gpt2 is known, give a directory"),
        ({"tokenizer.ggml.pre": "gpt-4o"}, "of kind 'gpt-4o'; only smollm, llama-bpe, qwen2 are"),
        ({"tokenizer.ggml.pre": None}, "of kind None"),
        ({"tokenizer.ggml.merges": ["no"]}, "its tokenizer cannot be built"),
    ],
)
def test_gguf_tokenizers_that_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        gguf_files.gguf_tokenizer(trained_fields("qwen2") | changes, "file")


def fact_texts():
    texts = []
    for fact in fact_files.read_facts("")[:40]:
        texts += [prompts.fill(template, fact["subject"]) for template in fact["manual"]]
    return texts


@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe"])
def test_gguf_tokenizers_equal_transformers(pre):
    """On facts, and on digits, accents, spaces and apostrophes."""
    import inspect

    import transformers
    from transformers.convert_slow_tokenizer import TikTokenConverter

    fields = trained_fields(pre)
    ours, size = gguf_files.gguf_tokenizer(fields, "file")
    vocabulary = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    if pre == "qwen2":
        theirs = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=merges)._tokenizer
    else:
        pattern = inspect.signature(TikTokenConverter).parameters["pattern"].default
        theirs = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
        theirs.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    for text in TEXTS + fact_texts():
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == unicodedata.normalize("NFC", text) or pre == "llama-bpe"
    assert size == 500 and len(ours.encode("<|start|>").ids) == 1


@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe", "smollm"])
def test_end_tokens_that_a_gguf_file_does_not_name(pre):
    """Those of the tokenizer's kind that are control tokens. Llama 3's also has a first token."""
    fields = trained_fields(pre) | {"tokenizer.ggml.eos_token_id": 400}
    others = range(1, 1 + len(END_TOKENS[pre]))
    assert gguf_files.gguf_eos(fields, "file", 500) == (400, *others)
    fields["tokenizer.ggml.token_type"] = [1] * 500
    assert gguf_files.gguf_eos(fields, "file", 500) == (400,)
    begins = fields | {"tokenizer.ggml.bos_token_id": 5}
    expected = 5 if pre == "llama-bpe" else None
    assert gguf_files.gguf_bos(begins, "file", 500) == expected
    begins["tokenizer.ggml.add_bos_token"] = pre != "llama-bpe"
    assert gguf_files.gguf_bos(begins, "file", 500) == (None if expected else 5)


def test_tensors_of_the_same_bytes_in_a_gguf_file(plain_llama, tmp_path):
    """A small file of very many would fill the memory."""
    gguf = pytest.importorskip("gguf")
    file = save_gguf(tmp_path / "model.gguf", plain_llama)
    reader = gguf.GGUFReader(file, "r+")
    for tensor in reader.tensors:
        tensor.field.parts[-1][0] = 0  # its place
    reader.data.flush()
    with open(file, "r+b") as f:
        f.truncate(int(reader.data_offset + max(t.n_bytes for t in reader.tensors)))
    assert_refused(file, r"cannot be read as GGUF \(its tensors overlap\)")


def test_a_length_beyond_the_end_of_a_gguf_file(plain_llama, tmp_path):
    """A list of 10^12 tokens is refused at once."""
    file = save_gguf(tmp_path / "model.gguf", plain_llama)
    with open(file, "rb") as f:
        data = f.read()
    at = data.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 8
    with open(file, "wb") as f:
        f.write(data[:at] + (10**12).to_bytes(8, "little") + data[at + 8 :])
    assert_refused(file, "cannot be read as GGUF")


# ---- tokenizers ----------------------------------------------------------------------------------


def sentencepiece():
    """As Llama 2's: a space is put before a text, spaces are letters, other letters bytes."""
    space = "\u2581"
    all_bytes = [f"<0x{i:02X}>" for i in range(256)]
    pieces = ["<unk>", "<s>", "</s>", *all_bytes, space, *"QA:abc.[]MSK"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    before = [normalizers.Prepend(space), normalizers.Replace(" ", space)]
    tokenizer.normalizer = normalizers.Sequence(before)
    after = [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(after)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def metaspace():
    """As newer files of Llama 2's: the space is put before the first text only."""
    tokenizer = sentencepiece()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


@pytest.mark.parametrize("make", [sentencepiece, metaspace, byte_level_tokenizer])
def test_pieces_of_a_prompt_are_encoded_as_in_the_whole(make):
    tokenizer = make()
    prefix, template, separator = "a b\n\nQ: a\nA: b\n\n", "Q: ab [MASK].\nA:", "\n\n"

    def encode(text, starts_prompt=False):
        return loading.encode(tokenizer, text, 300, starts_prompt)

    whole = tokenizer.encode(prefix + template, add_special_tokens=False).ids
    assert encode(prefix, starts_prompt=True) + encode(template) == whole
    whole = tokenizer.encode(template + separator + template, add_special_tokens=False).ids
    pieces = encode(template, starts_prompt=True) + encode(separator) + encode(template)
    assert pieces == whole


def test_settings_hidden_in_a_tokenizer(plain_llama):
    tokenizer = byte_level_tokenizer()
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=64, pad_token="!")
    tokenizer.save(str(plain_llama / "tokenizer.json"))
    assert len(loading.load(str(plain_llama))[1].encode("a" * 40).ids) == 40


def test_merges_that_a_tokenizer_drops_at_random(plain_llama):
    """Dropout is a setting for training that the file keeps."""
    file = plain_llama / "tokenizer.json"
    found = json.loads(file.read_text())
    vocabulary = found["model"]["vocab"]
    letters = sorted(vocabulary, key=vocabulary.get)[:255]
    pair = letters[0] + letters[1]
    found["model"]["vocab"] = {piece: i for i, piece in enumerate([*letters, pair])}
    found["model"] |= {"merges": [letters[:2]], "dropout": 0.9}
    file.write_text(json.dumps(found))
    assert loading.load(str(plain_llama))[1].encode(pair * 30).ids == [255] * 30


def test_what_a_tokenizer_puts_before_a_text(plain_llama):
    """Whatever config.json says: the prompt begins as the tokenizer begins it."""
    sentencepiece().save(str(plain_llama / "tokenizer.json"))
    change_json(plain_llama / "config.json", bos_token_id=None)
    assert loading.load(str(plain_llama))[0].config.bos_token_id == 1
    twice = sentencepiece()
    twice.post_processor = processors.TemplateProcessing("<s> <s> $A", special_tokens=[("<s>", 1)])
    twice.save(str(plain_llama / "tokenizer.json"))
    assert_refused(plain_llama, "puts 2 tokens before a text; at most one is known here")


@pytest.mark.parametrize(
    "name, found, message",
    [
        ("tokenizer_config.json", {"256": {"content": "<s>"}}, "make token '256' of '<s>'"),
        ("tokenizer_config.json", {"7": {"content": "!"}}, "does not make token '7' of '!'"),
        ("tokenizer_config.json", {"7": 3}, "has 3, in which there is no token"),
        ("tokenizer_config.json", [7], "is no JSON object"),
        ("added_tokens.json", {"<s>": 256}, "does not make token 256 of '<s>'"),
    ],
)
def test_tokens_that_tokenizer_json_lacks(plain_llama, name, found, message):
    """transformers adds them. Text with them would be encoded letter by letter here."""
    if name == "tokenizer_config.json":
        found = {"added_tokens_decoder": found}
    (plain_llama / name).write_text(json.dumps(found))
    assert_refused(plain_llama, message)


@pytest.mark.parametrize("make", [sentencepiece, metaspace])
def test_whether_a_space_is_put_before_a_text(plain_llama, make):
    """Llama's classes of transformers follow tokenizer_config.json here."""
    change_json(plain_llama / "config.json", vocab_size=300)
    make().save(str(plain_llama / "tokenizer.json"))
    settings = {"tokenizer_class": "LlamaTokenizerFast", "add_prefix_space": False}
    added = {"added_tokens_decoder": {"1": {"content": "<s>"}}}
    (plain_llama / "tokenizer_config.json").write_text(json.dumps(settings | added))
    assert_refused(plain_llama, "wants no space before a text, tokenizer.json puts one")
    byte_level_tokenizer().save(str(plain_llama / "tokenizer.json"))
    change_json(plain_llama / "config.json", vocab_size=256)
    (plain_llama / "tokenizer_config.json").write_text(json.dumps(settings))
    loading.load(str(plain_llama))


@pytest.mark.parametrize(
    ("file_puts", "settings", "message"),
    [
        (False, {"add_bos_token": True, "bos_token": "<s>"}, "asks for one BOS token"),
        (True, {"add_bos_token": False, "bos_token": "<s>"}, "for no BOS token, .* puts one"),
        # Where one of the settings is there, the other is false by default.
        (True, {"add_eos_token": False}, "asks for no BOS token"),
        (False, {"add_eos_token": True, "eos_token": "</s>"}, "for one EOS token, .* puts none"),
        (False, {"add_bos_token": "yes"}, "add_bos_token is 'yes', not true or false"),
        (True, {"add_bos_token": True, "bos_token": "<s>"}, ""),
        (True, {"add_bos_token": True}, ""),
        (False, {"add_bos_token": True, "bos_token": None}, ""),
        (False, {"add_bos_token": None}, ""),
        (True, {"bos_token": "<s>"}, ""),
    ],
)
def test_whether_a_token_is_put_before_a_text(plain_llama, file_puts, settings, message):
    """transformers follows tokenizer_config.json where it says so, else tokenizer.json."""
    tokenizer = byte_level_tokenizer()
    if file_puts:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="! $A", special_tokens=[("!", 0)]
        )
    tokenizer.save(str(plain_llama / "tokenizer.json"))
    change_json(plain_llama / "config.json", vocab_size=256)
    (plain_llama / "tokenizer_config.json").write_text(json.dumps(settings))
    if message:
        assert_refused(plain_llama, message)
    else:
        assert loading.load(str(plain_llama))[0].config.bos_token_id == (0 if file_puts else None)


def test_a_tokenizer_that_puts_tokens_after_a_text(plain_llama):
    tokenizer = byte_level_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A !", special_tokens=[("!", 0)]
    )
    tokenizer.save(str(plain_llama / "tokenizer.json"))
    assert_refused(plain_llama, "puts 1 tokens after a text, where the answer is to follow")


PANICS = {  # parts of a tokenizer.json with which the package ends in a PanicException
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [],
        "special_tokens": {},
    },
    "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    "decoder": {"type": "Strip", "content": "!", "start": 1, "stop": 1},
}


@pytest.mark.parametrize("part", PANICS)
def test_a_tokenizer_with_which_its_package_panics(plain_llama, part):
    change_json(plain_llama / "tokenizer.json", **{part: PANICS[part]})
    with pytest.raises(ConfigError, match="cannot be read as a tokenizer.json|cannot decode"):
        tokenizer = loading.load(str(plain_llama))[1]
        decoding.StopCriteria.from_tokenizer(tokenizer, [], 256, torch.device("cpu"))


def test_a_text_that_a_tokenizer_cannot_encode():
    """A vocabulary of whole words, without a token for all others."""
    with pytest.raises(ConfigError, match="the tokenizer cannot encode 'Q: x' .*UNK") as error:
        loading.encode(Tokenizer(models.WordLevel({"x": 0}, unk_token="[UNK]")), "Q: x", 300)
    assert "\n" not in str(error.value)


def test_a_tokenizer_of_another_model():
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens([AddedToken("Paris")])
    with pytest.raises(ConfigError, match="has tokens up to 256, the model only 256"):
        loading.encode(tokenizer, "Paris", 256)


# ---- damaged files -------------------------------------------------------------------------------


def test_damaged_files_are_sentences(tmp_path, plain_llama):
    """60 damaged models: each is loaded, or refused in one sentence."""
    draw = random.Random(0)
    gguf = save_gguf(tmp_path / "model.gguf", plain_llama)
    names = ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors"]
    files = [plain_llama / name for name in names] + [tmp_path / "model.gguf"]
    whole = [file.read_bytes() for file in files]
    loaded = 0
    for number in range(60):
        file = files[number % 5]
        data = bytearray(whole[number % 5])
        for _ in range(draw.choice((1, 1, 8))):
            where = draw.randrange(min(len(data), 4000))  # mostly structure, not weights
            data[where] = draw.choice((draw.randrange(256), 0, 255, 34))
        if draw.random() < 0.2:
            data = data[: draw.randrange(len(data))]
        file.write_bytes(data)
        try:
            loading.load(gguf if number % 5 == 4 else str(plain_llama))
            loaded += 1
        except ConfigError as e:
            assert "\n" not in str(e)
        file.write_bytes(whole[number % 5])
    assert loaded < 50
