"""How sparse are the activations of each block: values of its MLP, heads, slots?

    python memory.py params runs/RUN    # after the parameters

It is measured on test sequences, without padding. A value of an MLP is active if it is not 0: with
relu many are not, with silu or gelu all are. A head is active for a token if what it adds is at
least a tenth as long as what the strongest head of its layer adds. A slot is active if it is read.
Letters: B sequences, T tokens, N tokens of all sequences, H heads, k slots that a head reads.
"""

import torch

from analysis.hooks import hooked
from nanorecall.metrics import in_eval_mode, print_table
from nanorecall.settings import say

ACTIVE_LENGTH = 0.1  # of the strongest head
N_SEQUENCES = 100


def print_sparsity(model, data):
    """Print the share of values, heads and slots of each block that test sequences use."""
    indices = list(data.eval_groups("test")[0])[:N_SEQUENCES]
    tokens, *_ = data.batch("test", 0, indices)
    pad = data.tokenizer.pad if hasattr(data, "tokenizer") else -1
    is_token = tokens != pad
    lines = []
    for block, shares in enumerate(measure_sparsity(model, tokens, is_token)):
        cells = [f"{shares[name]:.1%}" if name in shares else "-" for name in SHARES]
        lines.append((str(block), *cells))
    n_tokens = int(is_token.sum())
    say(f"\nactive share of each block, in {n_tokens} tokens of {len(tokens)} test sequences:")
    print_table(("block", *SHARES), lines)


SHARES = (
    "MLP values",
    "attention heads",
    "memory heads",
    "slots a token",  # different slots that a token reads, of the table
    "slots at all",  # that any of the tokens reads
)


@in_eval_mode
def measure_sparsity(model, tokens, is_token):
    """For each block {name in SHARES: share from 0 to 1}, of those parts that it has.

    tokens (B, T), is_token (B, T) bool: False for padding.
    """
    blocks = [{} for _ in model.layers]
    hooks = []
    for shares, layer in zip(blocks, model.layers):
        mixer, mlp = getattr(layer, "att", None), getattr(layer, "ffn", None)
        if hasattr(mixer, "out_proj") and hasattr(mixer, "n_heads"):
            hooks.append((mixer.out_proj, "before", note_heads(shares, mixer, is_token)))
        if hasattr(mlp, "down"):
            hooks.append((mlp.down, "before", note_values(shares, is_token)))
    has_memory = hasattr(model, "memory_layers")
    with hooked(hooks):
        _, _, *reads = model(tokens, **({"trace": True} if has_memory else {}))
    if has_memory:
        for (block, memory), of_layer in zip(model.memory_layers().items(), reads[0]):
            blocks[block] |= slot_shares(memory, of_layer, is_token)
    return blocks


def note_values(shares, is_token):
    def note(module, inputs):
        shares["MLP values"] = float((inputs[0][is_token] != 0).double().mean())

    return note


def note_heads(shares, mixer, is_token):
    def note(out_proj, inputs):
        x = inputs[0][is_token].unflatten(-1, (mixer.n_heads, -1))  # (N, H, V)
        weight = out_proj.weight.unflatten(1, (mixer.n_heads, -1))  # (D, H, V)
        # A head at a time: of all heads, N x H x D numbers would have to fit.
        lengths = [(x[:, h] @ weight[:, h].T).norm(dim=-1) for h in range(mixer.n_heads)]
        shares["attention heads"] = active_heads(torch.stack(lengths, dim=1))

    return note


def active_heads(lengths):
    """lengths (N, H) of what heads add -> the share of heads that are active, over all tokens."""
    strongest = lengths.amax(1, keepdim=True)
    return float(((lengths >= ACTIVE_LENGTH * strongest) & (lengths > 0)).double().mean())


def slot_shares(memory, reads, is_token):
    """The shares of a memory layer. Its heads are compared before gate and output projection."""
    slots, weights = reads["slots"][is_token], reads["weights"][is_token]  # (N, H, k)
    size = len(memory.values)
    lengths = []
    for h in range(slots.shape[1]):
        read = (memory.values[slots[:, h]] * weights[:, h, :, None]).sum(1)  # (N, V)
        lengths.append(read.norm(dim=-1))
    in_order = slots.flatten(1).sort(dim=1).values  # (N, H * k)
    n_different = 1 + (in_order.diff(dim=1) > 0).sum(1)
    return {
        "memory heads": active_heads(torch.stack(lengths, dim=1)),
        "slots a token": float(n_different.double().mean()) / size,
        "slots at all": len(slots.unique()) / size,
    }
