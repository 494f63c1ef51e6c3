"""Ways to give pairs of keys and values new values after a model has read them.

An editor is a function f(edit) -> cache, from which forward_cached continues. The cache before the
edit stays as it was: to undo an edit, continue from that one.

**State.** A head holds a matrix S (K, V), and a query q reads S^T q. The smallest change after
which q reads v* is one step of the delta rule (delta.py) with write strength 1,

    S <- S + q (v* - S^T q)^T / |q|^2,

and for n queries Q (n, K) at once S <- S + Q^+ (V* - Q S), with the pseudoinverse Q^+. Neither
needs the rule by which S was written, so they fit every memory that is read linearly.

q is the vector with which the model asks for a key. It is not one with which it stored the pair:
with a short convolution, a model may store a pair at the value, up to conv_size - 1 tokens later,
or a part of it at each of these, and seeds differ in that. A stored key may also be the opposite of
the query, with the opposite of the value stored under it. For the same reason v* is no stored
vector: it is the vector that q reads from a state that has seen this one pair alone, with its new
value.

**Cache.** The value vector (of unified_kv the vector that is key and value) of one token in one
block is replaced by that of a model that has read the pair alone.

Letters: B sequences, t tokens read, n pairs to change, H heads, K key width, V value width.
"""

from dataclasses import dataclass

import torch

from analysis.hooks import hooked, select_positions
from nanorecall.metrics import autocast


@dataclass
class Edit:
    """New values for n pairs of each of B sequences, of which the model has read the pairs."""

    model: object
    tokens: torch.Tensor  # (B, t), the tokens read
    cache: list  # after them
    value_pos: torch.Tensor  # (B, n), positions of the old values
    values: torch.Tensor  # (B, n), new values
    keys: torch.Tensor  # (B, n, tokens of a key)
    other_keys: torch.Tensor  # (B, n, tokens of a key), keys that the sequence does not hold
    block: int  # in which pairs are recalled
    offset: int = 0  # cache: tokens from a pair's value to its entry
    dtype: torch.dtype = torch.float32  # in which the model computes

    @property
    def of_block(self):
        return self.cache[self.block]


def conv_width(model):
    """Tokens whose short convolution sees one and the same token; 1 without a convolution.

    Blocks may differ in it. Those of somebody else's model may have no config.
    """
    widths = [1]
    for block in getattr(model, "layers", ()):
        config = getattr(getattr(block, "att", None), "config", None)
        widths.append(getattr(config, "conv_size", 0))
    return max(widths)


def read(model, tokens, dtype=torch.float32):
    """-> cache after these tokens (B, T)"""
    with autocast(tokens.device, dtype):
        return model.forward_cached(tokens)[1]


def reread(edit):
    """Read all sequences again, with the new values."""
    tokens = edit.tokens.scatter(1, edit.value_pos, edit.values)
    return read(edit.model, tokens, edit.dtype)


def pairs_alone(edit, keys):
    """A sequence (B * n, tokens) for each pair: its key, its new value, and blanks after it.

    The blanks are the tokens in which a convolution still sees the value.
    """
    keys, values = keys.flatten(0, 1), edit.values.flatten()[:, None]
    blanks = values.new_zeros(len(values), conv_width(edit.model) - 1)
    return torch.cat([keys, values, blanks], dim=1)


def changed(edit, **tensors):
    """The cache with other tensors in the block in which pairs are recalled."""
    cache = list(edit.cache)
    cache[edit.block] = {**edit.of_block, **tensors}
    return cache


def random_like(x):
    """Random vectors whose lengths are those of x, over the last dimension."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    return noise * x.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)


# ---- state ---------------------------------------------------------------------------------------


def ask_alone(edit, keys):
    """Read each key (B, n, tokens of a key) alone with its new value, then ask for it.

    -> the queries of the block (B, H, n, K), and what they read (B, H, n, V)
    """
    cache = read(edit.model, pairs_alone(edit, keys), edit.dtype)
    mixer, of_block = edit.model.layers[edit.block].att, cache[edit.block]
    inputs = []

    def keep_input(module, args):
        inputs.append(args[0])

    asked = keys.flatten(0, 1)
    with hooked([(mixer, "before", keep_input)]), autocast(asked.device, edit.dtype):
        edit.model.forward_cached(asked, cache)
        c, x = mixer.config, inputs[0]
        # The convolution puts its own state into the dict, so it gets a copy.
        q = mixer.qkv(x, x, None, dict(of_block), None)[0]
        q = mixer.split_heads(q, mixer.n_heads, c.q_kernel, c.q_norm, mixer.gate_q, x)
    state = of_block["state"].unflatten(0, keys.shape[:2])  # (B, n, H, K, V)
    q = q[:, -1].unflatten(0, keys.shape[:2]).transpose(1, 2).to(state.dtype)  # (B, H, n, K)
    return q, torch.einsum("bhnk,bnhkv->bhnv", q, state)


def least_squares(S, q, wanted):
    """The state next to S (B, H, K, V) from which q (B, H, n, K) reads wanted (B, H, n, V)."""
    return S + torch.linalg.pinv(q) @ (wanted - q @ S)


def change_state(edit, change, keys=None):
    """Let queries read change(before, alone) from the state, (B, H, n, V) each.

    before: what they read now; alone: what they read after the pair alone, with its new value.
    """
    q, alone = ask_alone(edit, edit.keys if keys is None else keys)
    S = edit.of_block["state"]
    wanted = change(q @ S, alone)
    return changed(edit, state=least_squares(S, q, wanted))


def overwrite_state(edit):
    return change_state(edit, lambda before, alone: alone)


def overwrite_state_in_turn(edit):
    """One pair after another: each step disturbs what similar queries read after those before."""
    q, alone = ask_alone(edit, edit.keys)
    state = edit.of_block["state"]
    for i in range(q.shape[2]):
        state = least_squares(state, q[:, :, i : i + 1], alone[:, :, i : i + 1])
    return changed(edit, state=state)


def overwrite_state_as_reread(edit):
    """With the vectors that queries read after the whole sequence, not after the pair alone."""
    q, _ = ask_alone(edit, edit.keys)
    wanted = q @ reread(edit)[edit.block]["state"]
    state = least_squares(edit.of_block["state"], q, wanted)
    return changed(edit, state=state)


def erase_state(edit):
    return change_state(edit, lambda before, alone: torch.zeros_like(before))


def random_state(edit):
    """Random values of the same norm."""
    return change_state(edit, lambda before, alone: random_like(alone))


def other_key_in_state(edit):
    """The new values under keys that the sequence does not hold."""
    return change_state(edit, lambda before, alone: alone, edit.other_keys)


# ---- cache ---------------------------------------------------------------------------------------


def entry_name(of_block):
    """The name under which a block keeps a value for each token, or None."""
    for name in ("u", "v"):
        if name in of_block:
            return name
    return None


def put_entries(entries, positions, new):
    """entries (B, t, ...) with others, new (B, n, ...), at positions (B, n)."""
    entries = entries.clone()
    entries[torch.arange(len(entries), device=entries.device)[:, None], positions] = new
    return entries


def change_entries(edit, change, shift=0):
    """Put change(entries (B, n, ...) of the pairs) there, or `shift` tokens away from there."""
    name = entry_name(edit.of_block)
    entries, positions = edit.of_block[name], edit.value_pos + edit.offset
    new = change(select_positions(entries, positions))
    entries = put_entries(entries, positions + shift, new)
    return changed(edit, **{name: entries})


def entries_alone(edit):
    """The entries (B, n, ...) of the pairs, read alone with their new values."""
    of_block = read(edit.model, pairs_alone(edit, edit.keys), edit.dtype)[edit.block]
    entries = of_block[entry_name(of_block)][:, edit.keys.shape[2] + edit.offset]
    return entries.unflatten(0, edit.values.shape)


def overwrite_entry(edit):
    return change_entries(edit, lambda old: entries_alone(edit))


def overwrite_every_block(edit):
    """The entries of all tokens that see the value, in all blocks, as reading again leaves them."""
    after = reread(edit)
    cache = list(edit.cache)
    for block, of_block in enumerate(edit.cache):
        name = entry_name(of_block)
        if name is None:
            continue
        entries = of_block[name]
        for offset in range(conv_width(edit.model)):
            positions = edit.value_pos + offset
            new = select_positions(after[block][name], positions)
            entries = put_entries(entries, positions, new)
        cache[block] = {**of_block, name: entries}
    return cache


def erase_entry(edit):
    return change_entries(edit, torch.zeros_like)


def random_entry(edit):
    """A random change of the same norm."""

    def change(old):
        difference = (entries_alone(edit) - old).flatten(2)
        return old + random_like(difference).view_as(old)

    return change_entries(edit, change)


def other_entry(edit):
    """The new values at the token before each pair's entry."""
    return change_entries(edit, lambda old: entries_alone(edit), shift=-1)


# The first of each table is the edit, and those after the second are controls.
EDITORS = {
    "state": {
        "overwrite": overwrite_state,
        "overwrite, one after another": overwrite_state_in_turn,
        "overwrite, as re-read": overwrite_state_as_reread,
        "erase": erase_state,
        "random value": random_state,
        "other key": other_key_in_state,
        "read again": reread,
    },
    "cache": {
        "overwrite": overwrite_entry,
        "overwrite in every block": overwrite_every_block,
        "erase": erase_entry,
        "random value": random_entry,
        "other key": other_entry,
        "read again": reread,
    },
}


def memory_kind(of_block):
    """The kind of a block's cache in EDITORS: "state", "cache", or None."""
    if "state" in of_block:
        return "state"
    return "cache" if entry_name(of_block) else None
