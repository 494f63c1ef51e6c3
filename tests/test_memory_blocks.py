"""Memory layers in blocks of any kind: the `blocks` of memory.py.

A toy run that learns and resumes, ranks that agree and an edit are in test_memory.py.
"""

import pytest
import torch

import hybrid
import memory
import train
from memory import MemoryGPT, MemoryRouterGPT
from nanorecall.build import build_model_config
from nanorecall.rng import IGNORE_INDEX
from nanorecall.run_dir import model_label
from nanorecall.settings import ConfigError
from toys import memory_model, outcome, random_tokens

# Of every kind, and of two kinds in turn.
BLOCKS = [(kind,) for kind in hybrid.KINDS]
BLOCKS += [("delta conv_size=2", "gpt window=4 dk=8"), ("gpt use_att=0", "gla")]


def small(blocks, cls=MemoryGPT, **changes):
    """A model of two such blocks, each with a memory layer, in float64."""
    options = dict(blocks=blocks, memory_layers=(0, 1), **changes)
    return memory_model(cls, **options).double()


def batch():
    """Tokens and targets (3, 12), of which the last block computes some positions."""
    tokens, targets = random_tokens(3, 12), random_tokens(3, 12, seed=1)
    is_label = torch.rand(3, 12, generator=torch.Generator().manual_seed(2)) < 0.3
    return tokens, torch.where(is_label, targets, IGNORE_INDEX)


# ---- the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [MemoryGPT, MemoryRouterGPT])
def test_blocks_of_attention_are_those_without_blocks_to_the_bit(cls):
    attention = dict(n_heads=4, dk=6, dv=4, conv_size=2, window=5, q_norm="rms")
    words = " ".join(f"{name}={value}" for name, value in attention.items())
    plain = memory_model(cls, memory_layers=(0, 1), **attention)
    made = memory_model(cls, memory_layers=(0, 1), blocks=("gpt " + words,))
    assert plain.state_dict().keys() == made.state_dict().keys()
    for a, b in zip(plain.parameters(), made.parameters()):
        assert torch.equal(a, b)
    for a, b in zip(outcome(plain, *batch()), outcome(made, *batch())):
        assert torch.equal(a, b)


@torch.no_grad()
def test_a_memory_layer_stands_in_place_of_the_mlp_of_its_block():
    """Blocks of a hybrid lend mixers and MLPs; the memory layer by hand is in test_memory.py."""
    made = memory_model(blocks=("gated_delta dk=6", "linear dk=4"), memory_layers=(1,)).double()
    assert made.layers[0].memory is None and made.layers[1].ffn is None
    c = made.config
    sizes = dict(dim=c.dim, n_layers=2, vocab_size=c.vocab_size, seq_len=c.seq_len)
    lender = hybrid.Hybrid(hybrid.Config(c.blocks, use_ffn=True, **sizes)).double()
    lender.load_state_dict(made.state_dict(), strict=False)
    tokens, _ = batch()
    x = lender.layers[0](lender.embed(tokens))
    second = lender.layers[1]
    x = x + second.att(second.att_norm(x))
    x = x + made.layers[1].memory(second.ffn_norm(x))[0]
    expected = lender.lm_head(lender.final_norm(x))
    torch.testing.assert_close(made(tokens)[0], expected)


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_no_output_depends_on_a_later_token_and_decoding_is_the_parallel_form(blocks):
    model, (tokens, _) = small(blocks).eval(), batch()
    logits, _, reads = model(tokens, trace=True)
    changed = tokens.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 11
    torch.testing.assert_close(model(changed)[0][:, :8], logits[:, :8])
    assert not torch.allclose(model(changed)[0][:, 8:], logits[:, 8:])
    cache, pieces = None, []
    for piece in tokens.split([5, 1, 1, 5], dim=1):
        some, cache = model.forward_cached(piece, cache)
        pieces.append(some)
    torch.testing.assert_close(torch.cat(pieces, dim=1), logits)
    assert [of_layer["slots"].shape for of_layer in reads] == [(3, 12, 2, 3)] * 2


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_packed_documents_are_apart_and_gradients_reach_the_shared_table(blocks):
    model, (tokens, targets) = small(blocks), batch()
    assert model.layers[0].memory.values is model.layers[1].memory.values
    apart = outcome(model, tokens, targets)
    ends = torch.tensor([0, 12, 24, 36], dtype=torch.int32)
    packed = outcome(model, tokens.view(1, -1), targets.view(1, -1), ends)
    for a, b in zip(packed, apart):
        torch.testing.assert_close(a, b)
    for (name, _), gradient in zip(model.named_parameters(), apart[2:]):
        assert gradient.abs().max() > 0, name


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--blocks=['gtp']"], "there is no kind 'gtp'"),
        (["--blocks=['memory']"], "there is no kind 'memory'"),
        (["--blocks=['delta windw=3']"], "there is no setting 'windw'; did you mean window"),
        (["--blocks=['delta mem_knn=3']"], "mem_knn holds for the whole model; set it outside"),
        (["--blocks=['delta memory_layers=3']"], "memory_layers holds for the whole model"),
        (["--blocks=['delta dim=32']"], "dim holds for the whole model; set it outside"),
        (["--blocks=['delta window=3']"], "window=3 .block .* has no effect"),
        (["--blocks=['delta']", "--dk=8"], "dk=8 has no effect: blocks gives each block settings"),
        (["--blocks=['delta']", "--chunk_size=8"], "chunk_size=8 has no effect: blocks gives each"),
        (["--blocks=['gpt','delta','gpt']", "--n_layers=2"], "lists 3 blocks, more than n_layers"),
        (["--blocks=['gpt']", "--memory_layers=[4]"], "must lie in 0 to 3"),
        (["--blocks=['gpt']", "--use_ffn=0"], "memory layers take the place of MLPs"),
    ],
)
def test_mistakes_are_named(flags, message):
    with pytest.raises(ConfigError, match=message):
        settings = train.parse(["--model=memory", *flags])
        build_model_config(settings, settings.data_module.Data(settings.data))


def test_the_name_of_a_run_and_its_kernels_tell_the_kinds():
    c = memory.Config(blocks=("delta dk=6", "gpt window=4"), n_layers=2)
    assert model_label(MemoryGPT, c) == "L2-D64_FF1_delta_gpt_M1_S1024_H4_K8"
    line = MemoryGPT.describe_backend(c, torch.device("cpu"), torch.float32)
    assert "delta dk=6: delta rule" in line and "gpt window=4: scaled_dot_product" in line
