"""Models and facts that a user brings: each setting, tensor and row is computed, or refused."""

import json
import os
import random
import shutil

import numpy as np
import pytest
import torch

import flex_generate as flex
from myriadlama import (
    fact_files,
    gguf_files,
    hugging_face,
    llama,
    loading,
    prompts,
    results,
)
from nanorecall.settings import ConfigError

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file  # noqa: E402
from tokenizers import (  # noqa: E402
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

SIZES = dict(
    vocab_size=256,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=[2, 5],
)
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 500.0,
}  # fmt: skip
Q = "model.layers.0.self_attn.q_proj.weight"


def byte_level():
    """A tokenizer with a token for each byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def make(folder, **changes):
    """Save a random Llama as transformers does, with a tokenizer -> its directory as text."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | changes))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(folder)
    byte_level().save(os.path.join(folder, "tokenizer.json"))
    return str(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return make(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture
def plain(saved, tmp_path):
    """A copy of a plain model, to spoil."""
    return shutil.copytree(saved, tmp_path / "plain")


def change(file, drop=(), **values):
    """Set and drop keys of a JSON file."""
    found = json.loads(file.read_text()) | values
    for key in drop:
        del found[key]
    file.write_text(json.dumps(found))


def change_weights(folder, change):
    """change({name: tensor}) of model.safetensors."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def difference(folder, length=100):
    """The largest difference between our logits and transformers'."""
    folder = str(folder)
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model, _ = loading.load(folder)
    tokens = torch.randint(256, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(tokens).logits
    got = model.logits(model(tokens, torch.arange(length).expand(2, -1), llama.causal_attention))
    return float((got - expected).abs().max())


def refused(folder, message):
    with pytest.raises(ConfigError, match=message) as error:
        loading.load(str(folder))
    assert "\n" not in str(error.value)


# ---- settings of config.json -------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True},
        {"mlp_bias": True},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
        {"rope_parameters": LLAMA3},
        {"head_dim": 16, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ],
)
def test_settings_that_are_computed(tmp_path, changes):
    assert difference(make(tmp_path / "model", **changes)) < 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "default"}},
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
def test_rotary_settings_in_every_style(plain, changes):
    change(plain / "config.json", **changes)
    assert difference(plain, 300) < 1e-4


@pytest.mark.parametrize(
    "key, value",
    [
        ("hidden_act", "gelu"),
        ("hidden_act", "gelu_pytorch_tanh"),
        ("sliding_window", 16),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("use_qk_norm", True),
        ("num_local_experts", 8),
        ("quantization_config", {"quant_method": "fp8"}),
        ("attention_multiplier", 0.01),
        ("residual_multiplier", 0.22),
        ("embedding_multiplier", 12),
        ("logits_scaling", 8.0),
        ("partial_rotary_factor", 0.5),
        ("rope_interleaved", True),
        ("layer_types", ["sliding_attention", "full_attention"]),
        ("clip_qkv", 8),
        ("scale_depth", 1.4),
        ("auto_map", {"AutoModelForCausalLM": "own.Model"}),
        ("pruned_heads", {"0": [1]}),
    ],
)
def test_settings_that_are_refused_by_name(plain, key, value):
    change(plain / "config.json", **{key: value})
    refused(plain, f"config.json: '{key}' is ")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "mistral"}, "holds a 'mistral' model; a llama is needed"),
        ({"model_type": "qwen2"}, "holds a 'qwen2' model"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForCausalLM is needed"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4}}, "rotary scaling 'yarn' is not"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4}}, "scaling 'dynamic' is not"),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "longrope"}},
            "'longrope' is not known",
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, "config.json: factor is missing"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta is 0, but must be a number above 0"),
        ({"rope_parameters": {"attention_factor": 2}}, "'attention_factor' is 2, a setting that"),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": 4}}, "must be below high_freq_factor"),
        ({"rope_parameters": 3}, "its rotary settings are 3"),
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
def test_settings_that_cannot_be(plain, changes, message):
    os.remove(plain / "generation_config.json")
    change(plain / "config.json", **changes)
    refused(plain, message)


@pytest.mark.parametrize(
    "text", ["[]", "3", "{", "\ufeff{}", "[" * 5000, '{"a": 1' + "0" * 5000 + "}"]
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
def test_files_that_are_no_json_objects(plain, name, text):
    (plain / name).write_text(text)
    refused(plain, f"{name} (is no JSON|holds no JSON object|cannot be read)")


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
def test_tokens_that_end_an_answer(plain, generation, config, eos):
    os.remove(plain / "generation_config.json")
    if generation is not None:
        (plain / "generation_config.json").write_text(json.dumps(generation))
    change(plain / "config.json", eos_token_id=config)
    assert loading.load(str(plain))[0].config.eos_token_ids == eos


def test_a_prompt_longer_than_the_positions_is_a_sentence(saved):
    model, _ = loading.load(saved)
    tokens = torch.zeros(1, 513, dtype=torch.long)
    model(tokens[:, :512], torch.arange(512)[None], llama.causal_attention)
    with pytest.raises(
        ConfigError, match="a prompt of 513 tokens is longer than the 512 positions"
    ):
        model(tokens, torch.arange(513)[None], llama.causal_attention)


# ---- weights -----------------------------------------------------------------------------------


def set_weight(name, value):
    return lambda weights: weights.update({name: value})


@pytest.mark.parametrize(
    "spoil, message",
    [
        (set_weight("model.layers.0.self_attn.q_norm.weight", torch.ones(8)), "q_norm.weight'"),
        (set_weight(Q + "_scale", torch.ones(1)), "holds '.*q_proj.weight_scale'"),
        (set_weight(Q, torch.zeros(32, 32).to(torch.float8_e4m3fn)), "of type float8_e4m3fn"),
        (set_weight(Q, torch.zeros(32, 32, dtype=torch.int8)), "of type int8; only floats"),
        (set_weight(Q, torch.zeros(31, 32)), r"q_proj.weight has shape \(31, 32\), not \(32, 32\)"),
        (set_weight(Q, torch.zeros(32)), r"q_proj.weight has shape \(32,\)"),
        (set_weight("layers.0.self_attn.q_proj.weight", torch.ones(1)), "is there twice"),
        (
            set_weight("model.rotary_emb.inv_freq", torch.ones(4)),
            "other frequencies than config.json's",
        ),
        (lambda weights: weights.pop("lm_head.weight"), "has no weights for lm_head.weight"),
        (lambda weights: weights.pop(Q), f"has no weights for {Q}"),
    ],
)
def test_tensors_that_are_refused_by_name(plain, spoil, message):
    change_weights(plain, spoil)
    refused(plain, message)


def test_copies_of_rope_frequencies_and_a_tied_head(plain):
    turns = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    change_weights(plain, set_weight("model.layers.1.self_attn.rotary_emb.inv_freq", turns))
    assert difference(plain) < 1e-4
    change(plain / "config.json", tie_word_embeddings=True)
    refused(plain, "config.json ties lm_head.weight to the embeddings, but the file has another")
    change_weights(
        plain, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()})
    )
    assert difference(plain) < 1e-4


def index(folder, names):
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    text = json.dumps({"metadata": {}, "weight_map": names})
    (folder / hugging_face.INDEX).write_text(text)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../part.safetensors", "sub/part", "..", "", "a\0b"]
)
def test_an_index_stays_in_its_directory(plain, name):
    index(plain, {Q: name})
    refused(plain, "model.safetensors.index.json names '.*', outside it")


def test_links_of_an_index(plain, tmp_path):
    """One out of the directory is refused; the hub's cache has every file beside snapshots/."""
    index(plain, {Q: "part.safetensors"})
    (plain / "part.safetensors").rename(tmp_path / "elsewhere")
    (plain / "part.safetensors").symlink_to(tmp_path / "elsewhere")
    refused(plain, "names 'part.safetensors', outside it")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "elsewhere").rename(tmp_path / "blobs" / "sum")
    snapshot = tmp_path / "snapshots" / "1"
    shutil.copytree(plain, snapshot, symlinks=True)
    os.remove(snapshot / "part.safetensors")
    (snapshot / "part.safetensors").symlink_to("../../blobs/sum")
    assert difference(snapshot) < 1e-4


def test_an_index_and_its_files_say_the_same(plain):
    shutil.copy(plain / "model.safetensors", plain / "copy")
    index(plain, {Q: "part.safetensors", "model.more.weight": "part.safetensors"})
    refused(plain, "no file holds 'model.more.weight', which model.safetensors.index.json names")
    (plain / hugging_face.INDEX).write_text(json.dumps({"weight_map": [1]}))
    refused(plain, "has no weight_map of file names")
    (plain / "copy").rename(plain / "model.safetensors")
    refused(plain, "holds both model.safetensors and model.safetensors.index.json")


def test_an_adapter_is_not_left_out(plain):
    (plain / "adapter_config.json").write_text("{}")
    refused(plain, "holds an adapter; merge it into the weights first")


def test_a_name_twice_in_a_safetensors_file(plain):
    entry = '"a":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
    head = ("{" + entry % (0, 4) + "," + entry % (4, 8) + "}").encode()
    file = len(head).to_bytes(8, "little") + head + bytes(8)
    (plain / "model.safetensors").write_bytes(file)
    refused(plain, "model.safetensors cannot be read")


# ---- GGUF files --------------------------------------------------------------------------------


def gguf_file(path, folder, tensors=None, fields=None):
    """The model of a directory as a GGUF file, with other tensors {name: array} and fields."""
    gguf = pytest.importorskip("gguf")
    h = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(h["rope_parameters"]["rope_theta"])
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*letters[:255], letters[0] + letters[1]])
    writer.add_token_types([1] * 256)
    writer.add_token_merges([letters[0] + " " + letters[1]])
    writer.add_eos_token_id(2)
    for key, (add, value) in (fields or {}).items():
        getattr(writer, add)(key, value)
    parts = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
    for name, w in load_file(folder / "model.safetensors").items():
        stem, kind = name.removeprefix("model.").rsplit(".", 1)
        if stem.startswith("layers."):
            _, number, part = stem.split(".", 2)
            theirs = f"blk.{number}.{gguf_files.LAYER_NAMES[part]}.{kind}"
        else:
            theirs = f"{parts[stem]}.{kind}"
        if "attn_q" in theirs or "attn_k" in theirs:  # the converter's order of rows
            w = w.view(4 if "attn_q" in theirs else 2, 2, 4, -1).transpose(1, 2).reshape(w.shape)
        writer.add_tensor(theirs, w.numpy())
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def test_gguf_files_are_computed(tmp_path):
    """Biases, factors of the rotary frequencies (Llama 3's scaling) and linear scaling, as in transformers."""
    tokens = torch.randint(256, (2, 200), generator=torch.Generator().manual_seed(1))
    settings = {"attention_bias": True, "mlp_bias": True}
    for number, rope in enumerate(
        (LLAMA3, {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0})
    ):
        folder = tmp_path / str(number)
        make(folder, rope_parameters=rope, **settings)
        theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            expected = theirs(tokens).logits
        tensors, fields = {}, {"llama.rope.scaling.type": ("add_string", "linear")}
        fields["llama.rope.scaling.factor"] = ("add_float32", 4.0)
        if number == 0:
            plain = 500.0 ** -(torch.arange(0, 8, 2) / 8)
            factors = plain / theirs.model.rotary_emb.inv_freq
            tensors, fields = {"rope_freqs.weight": factors.numpy()}, {}
        file = gguf_file(tmp_path / f"{number}.gguf", folder, tensors, fields)
        model, _ = loading.load(file)
        got = model.logits(model(tokens, torch.arange(200).expand(2, -1), llama.causal_attention))
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_ends_of_answers_in_gguf_files(plain, tmp_path):
    names = {f"tokenizer.ggml.{k}_token_id": ("add_uint32", v) for k, v in (("eot", 7), ("eom", 9))}
    file = gguf_file(tmp_path / "model.gguf", plain, fields=names)
    assert loading.load(file)[0].config.eos_token_ids == (2, 7, 9)


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
def test_gguf_files_that_are_refused(plain, tmp_path, tensors, fields, message):
    refused(gguf_file(tmp_path / "model.gguf", plain, tensors, fields), message)


def test_a_length_beyond_the_end_of_a_gguf_file(plain, tmp_path):
    """A list of 10^12 tokens is refused at once."""
    file = gguf_file(tmp_path / "model.gguf", plain)
    with open(file, "rb") as f:
        data = f.read()
    at = data.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 8
    with open(file, "wb") as f:
        f.write(data[:at] + (10**12).to_bytes(8, "little") + data[at + 8 :])
    refused(file, "cannot be read as GGUF")


# ---- tokenizers --------------------------------------------------------------------------------


def sentencepiece():
    """As Llama 2's: a space is put before a text, spaces are letters, other letters bytes."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "\u2581",
        *"QA:abc.[]MSK",
    ]
    model = models.BPE(
        {p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def test_pieces_of_a_prompt_are_encoded_as_in_the_whole():
    for tokenizer in (sentencepiece(), byte_level()):
        prefix, segment = "a b\n\nQ: a\nA: b\n\n", "Q: ab [MASK].\nA:"
        whole = tokenizer.encode(prefix + segment, add_special_tokens=False).ids
        first = loading.encode(tokenizer, prefix, 300, starts_prompt=True)
        assert first + loading.encode(tokenizer, segment, 300) == whole
        both = tokenizer.encode(segment + "\n\n" + segment, add_special_tokens=False).ids
        second = loading.encode(tokenizer, "\n\n", 300) + loading.encode(tokenizer, segment, 300)
        assert loading.encode(tokenizer, segment, 300, starts_prompt=True) + second == both


def test_settings_hidden_in_a_tokenizer(plain):
    tokenizer = byte_level()
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=64, pad_token="!")
    tokenizer.save(str(plain / "tokenizer.json"))
    assert len(loading.load(str(plain))[1].encode("a" * 40).ids) == 40


def test_merges_that_a_tokenizer_drops_at_random(plain):
    """A setting for training, which the file keeps."""
    found = json.loads((plain / "tokenizer.json").read_text())
    letters = [t for t, i in sorted(found["model"]["vocab"].items(), key=lambda pair: pair[1])]
    pair = letters[0], letters[1]
    found["model"]["vocab"] = {t: i for i, t in enumerate([*letters[:255], "".join(pair)])}
    found["model"] |= {"merges": [list(pair)], "dropout": 0.9}
    (plain / "tokenizer.json").write_text(json.dumps(found))
    assert loading.load(str(plain))[1].encode("".join(pair) * 30).ids == [255] * 30


def test_what_a_tokenizer_puts_before_a_text(plain):
    """Whatever config.json says: the prompt begins as the tokenizer begins it."""
    sentencepiece().save(str(plain / "tokenizer.json"))
    change(plain / "config.json", bos_token_id=None)
    assert loading.load(str(plain))[0].config.bos_token_id == 1
    twice = sentencepiece()
    twice.post_processor = processors.TemplateProcessing("<s> <s> $A", special_tokens=[("<s>", 1)])
    twice.save(str(plain / "tokenizer.json"))
    refused(plain, "puts 2 tokens before a text; at most one is known here")


def test_a_tokenizer_of_another_model():
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("Paris")])
    with pytest.raises(ConfigError, match="has tokens up to 256, the model only 256"):
        loading.encode(tokenizer, "Paris", 256)


# ---- damaged files -----------------------------------------------------------------------------


def test_damaged_files_are_sentences(saved, tmp_path, plain):
    """Each damaged model gives transformers' weights, so our logits, or one sentence."""
    draw = random.Random(0)
    file = gguf_file(tmp_path / "model.gguf", plain)
    names = ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors", file]
    whole = {n: (plain / n).read_bytes() for n in names}
    loaded = 0
    for number in range(60):
        name = names[number % 5]
        data = bytearray(whole[name])
        for _ in range(draw.choice((1, 1, 8))):
            # mostly in the head, where the structure is
            data[draw.randrange(min(len(data), 4000))] = draw.choice(
                (draw.randrange(256), 0, 255, 34)
            )
        if draw.random() < 0.2:
            data = data[: draw.randrange(len(data))]
        (plain / name).write_bytes(data)
        try:
            loading.load(name if name == file else str(plain))
            loaded += 1
        except ConfigError as e:
            assert "\n" not in str(e)
        (plain / name).write_bytes(whole[name])
    assert loaded < 50


# ---- facts -------------------------------------------------------------------------------------


def read(tmp_path, rows, name="facts.jsonl"):
    path = tmp_path / name
    text = rows if isinstance(rows, str) else "".join(json.dumps(r) + "\n" for r in rows)
    path.write_text(text, encoding="utf-8")
    return fact_files.read_facts(str(path))


def question(text="Who?", **more):
    return {"question": text, "answers": ["Me"], **more}


def fact(**more):
    return {"subject": "S", "answers": ["A"], "manual_templates": ["[X] [Y]"], **more}


def template(text="[X] [Y]", **more):
    row = {"uuid": "a", "rel_uri": "P", "sub_ent": "S", "obj_aliases": ["A"], "is_manual": True}
    return {**row, "template": text, **more}


def test_questions_without_a_uuid_are_numbered(tmp_path):
    rows = [question(f"Who {i}?", uuid=u) for i, u in enumerate((None, "", " ", 7, "x", None))]
    assert [f["uuid"] for f in read(tmp_path, rows)] == ["0", "1", "2", "7", "x", "5"]
    assert [f["uuid"][-2:] for f in read(tmp_path, [fact(uuid=None)])] == [":1"]
    assert [f["uuid"] for f in read(tmp_path, [fact(uuid=0)])] == ["0"]


@pytest.mark.parametrize(
    "rows, message",
    [
        (
            [fact(uuid="a"), fact(uuid="a", subject="T")],
            ":2: uuid 'a' is that of the fact at .*:1, too",
        ),
        (
            [fact(uuid=1), fact(uuid="1", subject="T")],
            ":2: uuid '1' is that of the fact at .*:1, too",
        ),
        ([fact(uuid="a"), fact(uuid="a ", subject="T")], "uuid 'a' is that of the fact at"),
        ([fact(uuid=1), fact(uuid=1.0, subject="T")], "uuid '1' is that of the fact at"),
        ([question("A?"), question("B?", uuid="0")], ":2: uuid '0' is that of the fact at .*:1"),
        ([fact(uuid="a"), fact(uuid="b")], ":2: the same fact as at .*:1; delete one of them"),
        ([question(), question("who? ")], ":2: the same fact as at .*:1"),
        (
            [template(), template("[Y] [X]", sub_ent="T")],
            ":2: uuid 'a' is that of another fact, at .*:1",
        ),
        (
            [template(), template("[Y] [X]", obj_aliases=["B"])],
            ":2: uuid 'a' is that of another fact",
        ),
        ([template(), template("[Y] [X]", rel_uri="Q")], ":2: uuid 'a' is that of another fact"),
        ([template(), template()], ":2: the fact of .*:1 has this template already"),
        ([template(is_manual="maybe")], ":1: \"is_manual\" must be true or false, not 'maybe'"),
        ([template(is_manual=2)], ":1: \"is_manual\" must be true or false, not '2'"),
        ([fact(uuid=True)], "\"uuid\" must be text or a whole number, not 'True'"),
        ([fact(uuid=[1])], '"uuid" must be text or a whole number'),
        ([fact(subject=["S"])], '"subject" must be text'),
        ([fact(uuid="\ud800")], '"uuid" holds half a character'),
        ([fact(answers=["\u200b"])], "in which there is nothing to read"),
        ([fact(answers=[1945])], '"answers" must be a list of texts'),
        ([fact(answers="['sax' 'phone")], '"answers" is no list that can be read'),
        ([fact(answers="{'sax'}")], '"answers" is no list that can be read'),
    ],
)
def test_rows_with_another_identity_or_answers_that_cannot_be(tmp_path, rows, message):
    with pytest.raises(ConfigError, match=message) as error:
        read(tmp_path, rows)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "value, manual",
    [(True, 1), ("yes", 1), ("True", 1), (1, 1), ("1.0", 1), (1.0, 1), (" true ", 1)]
    + [(False, 0), ("no", 0), ("FALSE", 0), (0, 0), ("0", 0), (0.0, 0)],
)
def test_what_is_manual(tmp_path, value, manual):
    (found,) = read(tmp_path, [template(is_manual=value)])
    assert (len(found["manual"]), len(found["auto"])) == (manual, 1 - manual)


@pytest.mark.parametrize(
    "cell, answers",
    [
        ("['sax' 'saxophone']", ["sax", "saxophone"]),
        ("['sax'\n 'saxophone']", ["sax", "saxophone"]),
        ("['sax', 'saxophone']", ["sax", "saxophone"]),
        ("['O\\'Neill' \"D'Arcy\"]", ["O'Neill", "D'Arcy"]),
        ("(I Can't Get No) Satisfaction", ["(I Can't Get No) Satisfaction"]),
        ("O'Neill", ["O'Neill"]),
    ],
)
def test_lists_in_cells(cell, answers):
    assert fact_files.parse_list(cell, "f.csv:2", "answers") == answers


def test_csv_files_of_other_programs(tmp_path):
    head = "subject,answers,manual_templates\n"
    (found,) = read(tmp_path, "\ufeff" + head + "S,A,[X] [Y]\n", "facts.csv")
    assert found["subject"] == "S"
    with pytest.raises(ConfigError, match="facts.csv:2: more cells than the first line has names"):
        read(tmp_path, head + "S,A,[X] is, [Y]\n", "facts.csv")
    with pytest.raises(ConfigError, match="two columns have the same name"):
        read(tmp_path, "subject,subject,answers\n", "facts.csv")


@pytest.mark.parametrize(
    "said, answer",
    [
        ("Caf\u00e9", "Cafe\u0301"),
        ("O\u2019Neill", "O'Neill"),
        ("O'Neill", "O\u2019Neill"),
        ("Jean\u2011Paul", "Jean-Paul"),
        ("STRASSE", "Stra\u00dfe"),
        ("LEAVES", "leaves"),
        ("sax", "sax."),
        ("sax", '"sax"'),
        ("Yahoo", "Yahoo!"),
        ("U.S.", "U.S."),
        ("Par\u00adis", "Paris"),
        ("C++", "C++"),
    ],
)
def test_one_answer_in_two_spellings(said, answer):
    assert prompts.is_correct(said, [answer])


def test_marks_that_make_another_answer():
    assert not prompts.is_correct("C", ["C++"]) and not prompts.is_correct("C", ["C#"])
    assert not prompts.is_correct("...", ["Paris..."]) and prompts.is_correct("...", ["..."])


def test_how_much_of_a_text_counts():
    """The first word where one is asked for; two where no answer has less; all where a few are."""
    one = {"subject": "S", "answers": ["New York", "NYC"]}
    two = {"subject": "S", "answers": ["New York", "State of New York"]}
    few = {"subject": "", "answers": ["New York", "NYC"]}
    text = "New York City"
    said = [prompts.prediction(f, text) for f in (one, two, few)]
    assert said == ["New", "New York", "New York City"]
    assert [prompts.is_correct(p, f["answers"]) for p, f in zip(said, (one, two, few))] == [
        False,
        True,
        True,
    ]


def test_an_example_in_other_templates_gives_the_answer_away(tmp_path):
    asked = read(tmp_path, [fact(subject="New York", manual_templates=["[X] is [Y]"])])
    pool = read(tmp_path, [fact(subject="new  york"), fact(subject="Rome")], "pool.jsonl")
    assert [f["subject"] for f in prompts.exclude(pool, asked)] == ["Rome"]
    asked, pool = read(tmp_path, [question("Who?")]), [question("who? "), question("Where?")]
    pool = read(tmp_path, pool, "pool.jsonl")
    assert [f["manual"] for f in prompts.exclude(pool, asked)] == [["Where?"]]


def test_the_majority_of_two_files_that_number_their_rows():
    """Question 0 of the file of examples is not question 0 of the file of questions."""
    made = lambda u, a: {"uuid": u, "relation": "", "subject": "", "answers": [a]}
    facts, shots = [made("0", "New York"), made("1", "x")], {"": [made("0", "New York")]}
    assert prompts.majority_baseline(shots, facts) == [True, False]


# ---- results are bound to what they are made from ----------------------------------------------


@pytest.fixture
def words(plain, tmp_path):
    """The command line of a small run."""
    rows = [
        {"uuid": f"u{i}", "relation": "r", "subject": "abcd"[i], "answers": ["q"]}
        | {"manual_templates": ["[X] a [Y]."], "auto_templates": ["c [X] [Y]."]}
        for i in range(4)
    ]
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    more = ["--method=origin", "--num_shots=1", "--max_new_tokens=2", "--device=cpu"]
    return [f"--model={plain}", f"--path={path}", f"--out_dir={tmp_path / 'out'}", *more]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "config.json", "generation_config.json"]
)
def test_other_files_of_the_model_are_other_results(plain, words, name):
    flex.main(words)
    if name == "model.safetensors":
        change_weights(plain, lambda weights: weights[Q].mul_(1.01))
    elif name == "generation_config.json":
        os.remove(plain / name)
    else:
        (plain / name).write_text((plain / name).read_text() + " ")
    with pytest.raises(ConfigError, match=f"holds results with another file {name}; give another"):
        flex.main(words)


def test_another_program_or_dtype_is_another_result(words, monkeypatch):
    flex.main(words)
    with pytest.raises(ConfigError, match="holds results with another dtype"):
        flex.main([*words, "--dtype=bfloat16"])
    monkeypatch.setattr(results, "PROGRAM", results.PROGRAM[:-1])
    with pytest.raises(ConfigError, match="holds results with another program"):
        flex.main(words)


def test_the_files_of_a_sharded_model_and_of_the_facts_that_come_with_it(plain):
    index(plain, {Q: "part.safetensors"})
    before = results.result_key(flex.Config(model=str(plain)), torch.float32)
    assert {
        "file part.safetensors",
        f"file {hugging_face.INDEX}",
        "file config.json",
    } <= before.keys()
    assert len(before["path"]) == 64


@pytest.mark.parametrize(
    "spoil",
    [
        lambda row: {**row, "seconds": "1"},
        lambda row: {**row, "seconds": float("nan")},
        lambda row: {**row, "generation": None},
        lambda row: {**row, "generation": ["q"]},
        lambda row: {**row, "uuid": 3},
        lambda row: {**row, "method": ["origin"]},
        lambda row: {**row, "method": "per_prompt"},
        lambda row: {**row, "templates": "x"},
        lambda row: {**row, "templates": 3, "method": "per_prompt", "generation": []},
        lambda row: {"event": "of another tool"},
        lambda row: [row],
        lambda row: None,
        lambda row: json.dumps(row)[:40],
    ],
)
def test_lines_that_are_no_records_are_asked_again(words, tmp_path, capsys, spoil):
    flex.main(words)
    folder = tmp_path / "out" / "plain"
    table = json.loads((folder / "table.json").read_text())["metrics"]["origin"]["accuracy"]
    begun, first, *others = filter(None, (folder / "progress.0.jsonl").read_text().split("\n"))
    lines = [begun, json.dumps(spoil(json.loads(first))), *others]
    (folder / "progress.0.jsonl").write_text("\n".join(lines))
    (folder / "progress.old.jsonl").write_text("no JSON")
    capsys.readouterr()
    flex.main(words)
    printed = capsys.readouterr().out
    assert "note: 1 lines of" in printed and "2 of them answered already" in printed
    assert json.loads((folder / "table.json").read_text())["metrics"]["origin"]["accuracy"] == table


def test_records_without_settings_are_asked_again(words, tmp_path, capsys):
    """Nobody knows which model made them."""
    flex.main(words)
    file = tmp_path / "out" / "plain" / "progress.0.jsonl"
    lines = [line for line in file.read_text().split("\n") if line]
    for first in (b"", b'{"settings": 3}\n', b"\xff\xfe{\n"):
        file.write_bytes(first + "\n".join(lines[1:]).encode())
        capsys.readouterr()
        flex.main(words)
        assert "0 of them answered already" in capsys.readouterr().out


@pytest.mark.parametrize("positions, letters", [("restart", 500), ("sequential", 250)])
def test_a_question_too_long_for_the_model_leaves_nothing(words, tmp_path, positions, letters):
    """Before the first is asked: a template, or all of them one after another, needs more."""
    path = tmp_path / "facts.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[3]["manual_templates"] = [f"[X] {a * letters} [Y]." for a in "ab"]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    more = ["--method=flex", f"--template_positions={positions}", "--num_shots=0", "--num_manual=2"]
    with pytest.raises(ConfigError, match="is longer than the 512 positions of this model"):
        flex.main([*words, *more])
    assert not (tmp_path / "out").exists()


def test_facts_are_a_file(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(ConfigError, match="a.jsonl is no file"):
        fact_files.read_facts(str(tmp_path / "a.jsonl"))
