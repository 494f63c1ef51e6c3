"""Hybrids: blocks of several kinds in one model, such as delta rule and attention in turn.

    python train.py configs/mqar_hybrid.py
    python train.py --model hybrid --blocks "['delta dk=32 dv=32', 'gpt window=16']"

`blocks` lists the kinds of the first layers; the layers after them repeat the list. A kind is
followed by settings of its blocks. Those that are left out have the defaults of that kind.
Settings of the whole model are in Config below. memory.py takes `blocks` too: there a memory layer
replaces the MLP of such a block.
"""

from dataclasses import dataclass, fields

import delta
import delta_variants
import linear
import model
import ttt
from nanorecall.settings import (
    ConfigError,
    Setting,
    build_config,
    derived,
    field_names,
    reject_unknown,
    reject_unused,
    require,
)

KINDS = {  # kind: Config of its blocks, and the model of such blocks alone
    "gpt": (model.Config, model.GPT),
    "unified_kv": (model.Config, model.UnifiedKV),
    "delta": (delta.Config, delta.DeltaNet),
    "gated_delta": (delta.Config, delta.GatedDeltaNet),
    "kda": (delta_variants.Config, delta_variants.KDA),
    "delta_product": (delta_variants.Config, delta_variants.DeltaProduct),
    "linear": (linear.Config, linear.LinearAttention),
    "retnet": (linear.Config, linear.RetNet),
    "mamba2": (linear.Config, linear.Mamba2),
    "gla": (linear.Config, linear.GLA),
    "mesa": (linear.Config, linear.MesaNet),
    "ttt_linear": (ttt.Config, ttt.TTTLinear),
    "ttt_mlp": (ttt.Config, ttt.TTTMLP),
}


@dataclass
class Config:
    blocks: tuple[str, ...] = ("delta", "delta", "delta", "gpt")  # kinds, each with its settings
    dim: int = 64  # width of the residual stream
    n_layers: int = 4  # number of blocks
    use_ffn: bool = False  # an MLP in every block; the recall task does not need one
    ffn_expand_factor: int = 4  # hidden width of the MLP over dim
    ffn_act: str = "silu"  # activation of the MLP: none relu gelu silu sigmoid tanh
    residual_mul: bool = False  # x + f(norm x) * x instead of x + f(norm x)
    pos_emb: str = "rope"  # positions: rope (in blocks that have it), learned or none
    tie_weights: bool = False  # the output head shares the embedding's weight
    init_std: float = 0.02  # of the initial embedding; projections start as torch makes them
    vocab_size: int = derived(2048)
    seq_len: int = derived(128)

    def check(self):
        require(self.blocks, f"blocks is empty; name kinds of {', '.join(KINDS)}", "blocks")
        parse_blocks(self)


def parse_blocks(c):
    """[(model class, Config)] of all n_layers blocks: see parse_block."""
    count = len(c.blocks)
    kinds = [parse_block(text, c) for text in c.blocks]
    message = f"blocks lists {count} blocks, more than n_layers={c.n_layers}; leave some out"
    require(count <= c.n_layers, message, "blocks")
    return [kinds[i % count] for i in range(c.n_layers)]


def parse_block(text, c):
    """A kind and its settings, "gpt window=16" -> model class of the kind, Config of the block.

    c: the model's Config. Its settings that are also in Config above hold for all blocks.
    ConfigError if the text or a setting is wrong.
    """
    kind, *words = text.split() or [""]
    message = f"block {text!r}: there is no kind {kind!r}; choose from {', '.join(KINDS)}"
    require(kind in KINDS, message, "blocks")
    config_class, model_class = KINDS[kind]
    common = {f.name: getattr(c, f.name) for f in fields(Config)}
    # memory.py has settings of the whole model that no kind has.
    not_of_kind = set(field_names(type(c))) - set(field_names(config_class))
    settings = []
    for word in words:
        name, _, value = word.partition("=")
        message = f"block {text!r}: {name} holds for the whole model; set it outside of blocks"
        require(name not in common and name not in not_of_kind, message, "blocks")
        settings.append(Setting(name, value, f"block {text!r}"))
    inactive = model_class.inactive_settings
    active = {name: value for name, value in common.items() if name not in inactive}
    try:
        reject_unknown(settings, config_class)
        config = build_config(config_class, settings, **active)
        reject_unused(config, inactive, {s.key: s for s in settings})
    except ConfigError as e:
        raise ConfigError(str(e), e.key if e.key in common else "blocks") from None
    return model_class, config


class Hybrid(model.GPT):
    """GPT whose layers are blocks of the kinds in `blocks`, repeated up to n_layers."""

    inactive_settings = {}

    def make_layers(self, c):
        return [model_class.block(config) for model_class, config in parse_blocks(c)]

    @classmethod
    def describe_backend(cls, c, device, dtype):
        """Which kernel each kind of block runs and why, as one line."""
        lines = []
        for text in dict.fromkeys(c.blocks):
            model_class, config = parse_block(text, c)
            lines.append(f"{text}: {model_class.describe_backend(config, device, dtype)}")
        return "; ".join(lines)


Model = Hybrid  # what `--model hybrid` names
