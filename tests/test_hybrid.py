"""hybrid.py: a hybrid of one kind is that kind's model; blocks in turn; settings and refusals.

Packed documents, decoding and the cache's size are tested with the other models
(test_attention.py), training, resuming and causality in test_contract.py.
"""

import dataclasses

import pytest
import torch

import hybrid
import train
from nanorecall.build import build_model_config, inference_state_bytes
from nanorecall.settings import ConfigError, build_config

V, T = 19, 12
SIZES = dict(dim=8, n_layers=3, vocab_size=V, seq_len=T)
# For each kind, settings that are not its defaults.
OWN = {
    "gpt": dict(dk=6, dv=4, n_kv_heads=1, q_norm="rms", window=5),
    "unified_kv": dict(du=6, conv_size=2, k_gated=True),
    "delta": dict(dk=6, dv=4, q_kernel="none", use_out_norm=False),
    "gated_delta": dict(n_heads=4, dk=6, dv=4, att_use_output_gate=True),
    "kda": dict(dk=6, dv=4, chunk_size=4),
    "delta_product": dict(dk=6, dv=4, n_householder=3, allow_neg_eigval=True),
    "linear": dict(dk=6, dv=4, q_norm="none"),
    "retnet": dict(n_heads=1, dk=6, dv=4),
    "mamba2": dict(dk=6, dv=4, conv_size=2),
    "gla": dict(dk=6, dv=4, chunk_size=4),
    "mesa": dict(dk=6, dv=4),
    "ttt_linear": dict(dk=6, dv=6, inner_batch_size=4),
    "ttt_mlp": dict(dk=6, dv=6, inner_lr=0.1),
}


def batch():
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(V, (3, T), generator=g)
    targets = torch.where(torch.rand(3, T, generator=g) < 0.3, tokens.flip(1), -100)
    return tokens, targets


def as_text(kind, own):
    words = [f"{name}={value}" for name, value in own.items()]
    return " ".join([kind, *words])


def pure_and_hybrid(kind, **common):
    """The model of one kind, and the hybrid with its weights."""
    # The default of a kind may be another than the hybrid's.
    common = {"pos_emb": "rope", **common}
    config_class, model_class = hybrid.KINDS[kind]
    inactive = model_class.inactive_settings
    config = config_class(**SIZES, **OWN[kind])
    for name, value in common.items():
        if name not in inactive:
            config = dataclasses.replace(config, **{name: value})
    torch.manual_seed(0)
    pure = model_class(config)
    mixed = hybrid.Hybrid(hybrid.Config((as_text(kind, OWN[kind]),), **SIZES, **common))
    mixed.load_state_dict(pure.state_dict())
    return pure, mixed


@pytest.mark.parametrize("kind", hybrid.KINDS)
@pytest.mark.parametrize("common", [{}, dict(use_ffn=True, ffn_act="gelu", tie_weights=True)])
def test_a_hybrid_of_one_kind_equals_its_model_to_the_bit(kind, common):
    pure, mixed = pure_and_hybrid(kind, **common)
    outcomes = []
    for model in (pure, mixed):
        logits, loss = model(*batch())
        grads = torch.autograd.grad(loss, list(model.parameters()))
        outcomes.append([logits, loss, *grads, model.forward_cached(batch()[0])[0]])
    for a, b in zip(*outcomes, strict=True):
        assert torch.equal(a, b)
    assert inference_state_bytes(pure, T) == inference_state_bytes(mixed, T)


def test_every_kind_is_tested():
    assert OWN.keys() == hybrid.KINDS.keys()


def test_blocks_follow_each_other_and_begin_again():
    blocks = ("delta dk=6", "gpt window=4", "gpt")
    model = hybrid.Hybrid(hybrid.Config(blocks, **{**SIZES, "n_layers": 5}))
    names = [type(layer).__name__ for layer in model.layers]
    assert names == ["DeltaBlock", "GPTBlock", "GPTBlock", "DeltaBlock", "GPTBlock"]
    assert [layer.att.config.window for layer in model.layers] == [0, 4, 0, 0, 4]
    assert [layer.att.config.dk for layer in model.layers] == [6, 64, 64, 6, 64]


def test_a_hybrid_is_its_blocks_one_after_another():
    """Two models of one kind each lend their blocks."""
    delta_net, _ = pure_and_hybrid("delta")
    gpt, _ = pure_and_hybrid("gpt")
    blocks = as_text("delta", OWN["delta"]), as_text("gpt", OWN["gpt"])
    mixed = hybrid.Hybrid(hybrid.Config(blocks, **SIZES))
    for i, lender in enumerate((delta_net, gpt, delta_net)):
        mixed.layers[i].load_state_dict(lender.layers[i].state_dict())
    tokens, _ = batch()
    x = mixed.embed(tokens)
    for i, lender in enumerate((delta_net, gpt, delta_net)):
        x = lender.layers[i](x)
    assert torch.equal(mixed(tokens)[0], mixed.lm_head(mixed.final_norm(x)))


def test_positions_hold_for_all_blocks_that_have_them():
    blocks = ("delta", "gpt")
    rotary = hybrid.Hybrid(hybrid.Config(blocks, **SIZES, pos_emb="rope"))
    assert not hasattr(rotary.layers[0].att, "rope") and hasattr(rotary.layers[1].att, "rope")
    learned = hybrid.Hybrid(hybrid.Config(blocks, **SIZES, pos_emb="learned"))
    assert learned.pos_embed is not None and not hasattr(learned.layers[1].att, "rope")


@pytest.mark.parametrize("kind, has_positions", [("delta", False), ("gpt", True)])
def test_blocks_without_positions_decode_any_number_of_tokens(kind, has_positions):
    model = hybrid.Hybrid(hybrid.Config((kind,), **SIZES)).eval()
    assert model.has_positions() == has_positions
    tokens = torch.zeros(1, T + 1, dtype=torch.long)
    if has_positions:
        with pytest.raises(ValueError, match="has positions for 12 tokens, not for 13"):
            model.forward_cached(tokens)
    else:
        torch.testing.assert_close(model.forward_cached(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--blocks=['gtp']", "there is no kind 'gtp'; choose from gpt, unified_kv"),
        ("--blocks=['memory']", "there is no kind 'memory'"),
        ("--blocks=['']", "there is no kind ''"),
        ("--blocks=[]", "blocks is empty"),
        ("--blocks=['gpt windw=3']", "--blocks: block 'gpt windw=3': .* did you mean window"),
        ("--blocks=['gpt window=x']", "window takes a number"),
        ("--blocks=['gpt window']", "window takes a number"),
        ("--blocks=['gpt window=-1']", "window=-1 must be between"),
        ("--blocks=['gpt dim=32']", "dim holds for the whole model; set it outside"),
        ("--blocks=['delta window=3']", "window=3 .block .* has no effect"),
        ("--blocks=['gpt lr_temp=2']", "lr_temp=2.0 .block .* has no effect"),
        ("--blocks=['gpt', 'delta use_beta=0 lr_temp=2']", "use_beta is 0"),
        ("--blocks=['gpt', 'gpt', 'gpt', 'gpt', 'gpt']", "lists 5 blocks, more than n_layers=4"),
        ("--ffn_act=relu", "ffn_act='relu' has no effect: use_ffn is 0"),
        ("--dim=0", "--dim: dim=0 must be between"),
        ("--pos_emb=rop", "--pos_emb: pos_emb='rop' is unknown"),
    ],
)
def test_mistakes_are_named(flag, message):
    with pytest.raises(ConfigError, match=message):
        settings = train.parse(["--model=hybrid", flag])
        build_model_config(settings, settings.data_module.Data(settings.data))


def test_a_block_has_the_defaults_of_its_kind():
    config = build_config(hybrid.Config, [], vocab_size=V, seq_len=T)
    _, delta_config = hybrid.parse_block("delta dk=6", config)
    _, gpt_config = hybrid.parse_block("gpt", config)
    assert delta_config == hybrid.KINDS["delta"][0](dk=6, vocab_size=V, seq_len=T)
    assert gpt_config == hybrid.KINDS["gpt"][0](vocab_size=V, seq_len=T)


def test_a_mixer_of_ones_own_says_that_it_has_positions():
    class Table(torch.nn.Module):
        has_positions = True

        def forward(self, x, cache=None):
            return x

    model = hybrid.Hybrid(hybrid.Config(("delta",), **SIZES))
    assert not model.has_positions()
    model.layers[0].att = Table()
    assert model.has_positions()
    with pytest.raises(ValueError, match=f"positions for {T} tokens, not for {T + 1}"):
        model.forward_cached(torch.zeros(1, T + 1, dtype=torch.long))
    model.layers[0].att = torch.nn.Sequential(torch.nn.Linear(8, 8))
    assert not model.has_positions()
    inner = hybrid.Hybrid(hybrid.Config(("gpt",), **SIZES)).layers[0].att
    model.layers[0].att.append(inner)  # one of ours, with rotary positions, in a mixer of one's own
    assert model.has_positions()
