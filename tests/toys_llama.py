"""Small random Llamas, in memory, as transformers saves them, and as GGUF; questions for them."""

import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from myriadlama import decoding, fusion, gguf_files, llama, loading

# ---- in memory -----------------------------------------------------------------------------------

V = 61  # vocabulary of random_llama


def random_llama(n_layers=2, head_dim=8):
    """A Llama without files."""
    torch.manual_seed(0)
    config = llama.Config(
        vocab_size=V,
        dim=4 * head_dim,
        n_layers=n_layers,
        n_heads=4,
        n_kv_heads=2,
        head_dim=head_dim,
        intermediate_size=6 * head_dim,
        max_seq_len=512,
        tie_weights=False,
    )
    model = llama.Llama(config).eval().requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)  # makes attention uneven, so that masks matter
    return model


def random_ids(rng, n):
    return rng.integers(10, V, n).tolist()


def random_question(rng, n=4):
    """n templates of 2 to 8 tokens: two manual ones, the others automatic."""
    templates = [random_ids(rng, length) for length in rng.integers(2, 9, n)]
    return fusion.Question(templates, torch.arange(n) < 2, 7, [3, 4])


def causal_logits(model, tokens):
    """Our logits of every position: tokens (B, T) -> (B, T, V)."""
    positions = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
    return model.logits(model(tokens, positions, llama.causal_attention))


def never_stop(vocab_size, device="cpu"):
    nothing = torch.zeros(vocab_size, dtype=torch.bool, device=device)
    return decoding.StopCriteria(nothing[:0].long(), nothing, nothing)


def decode_fused(model, prefix, questions, scheme, positions, bias=0.0, max_new_tokens=6):
    """Decode as flex_generate does: the prefix once, all templates in a batch, with caches."""
    prefix_kv = fusion.prefill_prefix(model, prefix)
    rows, members, next_pos = [], [], []
    for question in questions:
        first = len(rows)
        new_rows, answer_position = fusion.layout(question, len(prefix), scheme, positions)
        rows += new_rows
        members.append(range(first, len(rows)))
        next_pos.append(answer_position)
    encoded = fusion.prefill(model, prefix_kv, rows)
    cache = fusion.build_cache(prefix_kv, encoded, members, next_pos, bias)
    tokens, _ = decoding.greedy_decode(
        model,
        cache,
        questions[0].answer_start,
        decoding.argmax_each,
        never_stop(model.config.vocab_size, model.rope_table.device),
        max_new_tokens,
    )
    return tokens.tolist()


def our_forward(model):
    """`forward` of naive_decode for our Llama."""

    def forward(ids, positions, scores):
        def attend(layer, q, k, v):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=scores, enable_gqa=True)

        return model.logits(model(ids, positions, attend))[0]

    return forward


def transformers_forward(model):
    """`forward` of naive_decode for a model of transformers, which takes a mask (1, 1, S, S)."""

    @torch.no_grad()
    def forward(ids, positions, scores):
        mask = scores.clamp(min=-1e9)[None, None]
        return model(ids, position_ids=positions, attention_mask=mask).logits[0]

    return forward


# ---- as transformers saves them ------------------------------------------------------------------

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
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 500.0,
}
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def byte_level_tokenizer():
    """A tokenizer with a token for each byte."""
    tokenizers = pytest.importorskip("tokenizers")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def save_llama(folder, max_shard_size="1GB", model_type="llama", **changes):
    """Save a random model as transformers does, with a tokenizer -> its directory as text."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **SIZES | changes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    byte_level_tokenizer().save(os.path.join(folder, "tokenizer.json"))
    return str(folder)


def load_theirs(folder, **options):
    """The same directory as transformers reads it."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, **options
    )
    return model.eval()


def logits_difference(folder, length=100):
    """The largest difference between our logits and transformers'."""
    tokens = torch.randint(256, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = load_theirs(str(folder))(tokens).logits
    model, _ = loading.load(str(folder))
    return float((causal_logits(model, tokens) - expected).abs().max())


def change_json(file, **values):
    """Set keys of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def change_weights(folder, change):
    """change({name: tensor}) of model.safetensors."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


# ---- as GGUF -------------------------------------------------------------------------------------


def gguf_name(name):
    """A parameter's name in a GGUF file."""
    stem, kind = name.removeprefix("model.").rsplit(".", 1)
    if not stem.startswith("layers."):
        top = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
        return f"{top[stem]}.{kind}"
    _, number, part = stem.split(".", 2)
    return f"blk.{number}.{gguf_files.LAYER_NAMES[part]}.{kind}"


def save_gguf(path, folder, tensors=None, fields=None, architecture=None):
    """Write the model of a directory as a GGUF file -> path as text.

    tensors {name: array} and fields {name: (method of the writer, value)} are added to it.
    architecture: that of the directory if None.
    """
    gguf = pytest.importorskip("gguf")
    tokenizers = pytest.importorskip("tokenizers")
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    head_dim = config.get("head_dim") or 8
    writer = gguf.GGUFWriter(str(path), architecture or config["model_type"])
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(config["num_key_value_heads"])
    if head_dim != 8:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*letters[:255], letters[0] + letters[1]])
    writer.add_token_types([1] * 256)
    writer.add_token_merges([letters[0] + " " + letters[1]])
    writer.add_eos_token_id(2)
    for key, (method, value) in (fields or {}).items():
        getattr(writer, method)(key, value)
    for name, weight in load_file(folder / "model.safetensors").items():
        name = gguf_name(name)
        if config["model_type"] == "llama" and ("attn_q" in name or "attn_k" in name):
            # llama.cpp's converter interleaves the two halves of each head of a Llama.
            halves = weight.view(-1, 2, head_dim // 2, *weight.shape[1:]).transpose(1, 2)
            weight = halves.reshape(weight.shape)
        writer.add_tensor(name, weight.numpy())
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, np.asarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)
