"""One question in many templates, one answer: attention masks, encoding and caches.

A prompt is a prefix (instruction and examples), then templates, then the answer start, which is the
":" of "A:". A template attends to the prefix, to itself and, depending on the scheme, to other
templates. The answer start and all generated tokens attend to everything, so already the first
token of the answer depends on every template.

Positions are "sequential" (templates one after another) or "restart" (every template begins right
after the prefix). With "restart" no template is further from the answer than another, and a
template's keys and values can be used both alone and fused. They cannot be rotated to other
positions afterwards: its values already depend on the distance to the prefix.

A row is a pair (token ids, positions) of tokens that are encoded together.

Letters: B questions, n templates of a question, R rows, P tokens of the prefix, L tokens of the
longest row, S tokens in a cache, H query heads, G key/value heads, K head_dim.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

# ---- masks ---------------------------------------------------------------------------------------

PREFIX, ANSWER = -1, -2  # template numbers of tokens before and after the templates


def isolated(q, kv, is_manual):
    """A template attends to itself."""
    return q == kv


def manual_cross(q, kv, is_manual):
    """A template attends to itself, and a manual one also to the manual ones before it."""
    return (q == kv) | (is_manual[q] & is_manual[kv])


def full(q, kv, is_manual):
    """A template attends to all templates before it: plain concatenation."""
    return q == q


# scheme -> f(template of the query, template of the key, is_manual (n,)) -> bool
MASKS = {"isolated": isolated, "manual_cross": manual_cross, "full": full}


def dense_mask(scheme, template, is_manual):
    """Template number of each token, (S,), or PREFIX or ANSWER -> (S, S) bool, query x key."""
    q, kv = template[:, None], template[None, :]
    index = torch.arange(len(template))
    causal = index[:, None] >= index
    both_in_templates = (q >= 0) & (kv >= 0)
    allowed = MASKS[scheme](q.clamp(min=0), kv.clamp(min=0), is_manual) & both_in_templates
    return causal & (allowed | (kv == PREFIX) | (q == ANSWER))


def encode_groups(scheme, is_manual):
    """Templates that attend to each other must be encoded together -> lists of their numbers."""
    groups, rest = [], list(range(len(is_manual)))
    while rest:
        first = torch.tensor(rest[0])
        group = [i for i in rest if MASKS[scheme](torch.tensor(i), first, is_manual)]
        groups.append(group)
        rest = [i for i in rest if i not in group]
    return groups


def draw_mask(scheme, is_manual, path=None, n_generated=2):
    """The mask as text: a row for the prefix, each template and each generated token.

    With a path it is also saved as a picture.
    """
    names, counts = ["P"], {"M": 0, "A": 0}
    for manual in is_manual.tolist():
        kind = "M" if manual else "A"
        counts[kind] += 1
        names.append(f"{kind}{counts[kind]}")
    names += [f"G{i + 1}" for i in range(n_generated)]
    template = torch.tensor([PREFIX, *range(len(is_manual)), *[ANSWER] * n_generated])
    mask = dense_mask(scheme, template, is_manual)
    lines = ["    " + " ".join(f"{name:>2}" for name in names)]
    for name, row in zip(names, mask.tolist()):
        crosses = " ".join(" x" if attends else " ." for attends in row)
        lines.append(f"{name:>2} [{crosses} ]")
    if path:
        plot_mask(mask, names, f"{scheme}: manual M, automatic A, generated G", path)
    return "\n".join(lines)


def plot_mask(mask, names, title, path):
    from nanorecall.plots import figure, write_figure

    plt, fig, (axis,) = figure(1, 1, width=4.5)
    axis.imshow(mask.numpy(), cmap="Blues", vmin=0, vmax=1.4)
    axis.set_xticks(range(len(names)), names, fontsize=7)
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set(xlabel="key (P: prefix)", ylabel="query", title=title)
    axis.title.set_fontsize(8)
    write_figure(fig, plt, path)


# ---- layout --------------------------------------------------------------------------------------


@dataclass
class Question:
    """Token ids of one question."""

    templates: list  # n lists of token ids, each without its last token, which is answer_start
    is_manual: torch.Tensor  # (n,) bool
    answer_start: int  # the last token of every template, the first that attends to all of them
    separator: list  # token ids between two templates under sequential positions
    priors: list = ()  # n lists of token ids, as templates but without the subject, or none


def layout(question, prefix_length, scheme, positions):
    """Tokens and positions of one question -> rows, position of the answer start.

    A row here is (token ids, positions, template number of each token), one for each group of
    templates that attend to each other.
    """
    templates = [list(ids) for ids in question.templates]
    if positions == "sequential":
        for ids in templates[:-1]:
            ids += [question.answer_start, *question.separator]
        ends = prefix_length + np.cumsum([len(ids) for ids in templates])
        starts = [prefix_length, *ends[:-1]]
        answer_position = int(ends[-1])
    else:
        starts = [prefix_length] * len(templates)
        answer_position = prefix_length + max(map(len, templates))
    rows = []
    for group in encode_groups(scheme, question.is_manual):
        ids, row_positions, template_of_token = [], [], []
        for i in group:
            ids += templates[i]
            row_positions += range(starts[i], starts[i] + len(templates[i]))
            template_of_token += [i] * len(templates[i])
        rows.append((ids, row_positions, template_of_token))
    return rows, answer_position


# ---- prefill -------------------------------------------------------------------------------------
#
# Keys and values of rows are a list with a pair (keys, values) for each layer.


@torch.no_grad()
def prefill_prefix(model, ids):
    """Encode the tokens that all questions share -> keys and values (1, G, P, K)."""
    kv = []

    def attend(layer, q, k, v):
        kv.append((k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    tokens = torch.tensor([ids], device=model.rope_table.device)
    model(tokens, torch.arange(len(ids), device=tokens.device)[None], attend)
    return kv


@torch.no_grad()
def prefill_padded(model, prefix_kv, rows):
    """Encode rows; each attends to the prefix and, causally, to itself -> (R, G, L, K).

    The padding is at the end of a row, where no token attends to it.
    """
    R, L = len(rows), max(len(ids) for ids, _ in rows)
    P, device = prefix_kv[0][0].shape[2], model.rope_table.device
    tokens = torch.zeros(R, L, dtype=torch.long)
    positions = torch.zeros(R, L, dtype=torch.long)
    for r, (ids, row_positions) in enumerate(rows):
        tokens[r, : len(ids)] = torch.tensor(ids)
        positions[r, : len(ids)] = torch.as_tensor(np.asarray(row_positions))
    mask = torch.ones(L, P + L, dtype=torch.bool, device=device).tril(P)
    kv = []

    def attend(layer, q, k, v):
        kv.append((k, v))
        prefix_k, prefix_v = prefix_kv[layer]
        k = torch.cat([prefix_k.expand(R, -1, -1, -1), k], dim=2)  # (R, G, P + L, K)
        v = torch.cat([prefix_v.expand(R, -1, -1, -1), v], dim=2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    model(tokens.to(device), positions.to(device), attend)
    return kv


@torch.no_grad()
def prefill_flex(model, prefix_kv, rows, attention=None):
    """prefill_padded without padding: all rows end to end, under a FlexAttention block mask.

    Made for GPUs, where short rows leave most of the device idle. attention: flex_attention,
    compiled if None.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    P, device = prefix_kv[0][0].shape[2], model.rope_table.device
    tokens, positions, lengths = [], [], []
    for ids, row_positions in rows:
        tokens += ids
        positions += [int(p) for p in row_positions]
        lengths.append(len(ids))
    T = len(tokens)
    tokens = torch.tensor([tokens], device=device)
    positions = torch.tensor([positions], device=device)
    row = torch.arange(len(rows), device=device)
    row = row.repeat_interleave(torch.tensor(lengths, device=device))  # (T,)
    row_of_key = torch.cat([torch.full((P,), PREFIX, device=device), row])  # (P + T,)

    def mask(b, h, q, kv):
        same_row = row_of_key[kv] == row[q]
        return (row_of_key[kv] == PREFIX) | (same_row & (kv - P <= q))

    if attention is None:
        attention = torch.compile(flex_attention)
    block_mask = create_block_mask(mask, None, None, T, P + T, device=device)
    packed_kv = []

    def attend(layer, q, k, v):
        packed_kv.append((k, v))
        prefix_k, prefix_v = prefix_kv[layer]
        k, v = torch.cat([prefix_k, k], dim=2), torch.cat([prefix_v, v], dim=2)
        return attention(q, k, v, block_mask=block_mask, enable_gqa=True)

    model(tokens, positions, attend)
    indices = torch.arange(T, device=device).split(lengths)
    index = pad_sequence(indices, batch_first=True)  # (R, L)
    kv = []
    for k, v in packed_kv:  # each (1, G, T, K)
        kv.append((k[0][:, index].transpose(0, 1), v[0][:, index].transpose(0, 1)))
    return kv


def prefill(model, prefix_kv, rows):
    """Encode rows after the prefix -> keys and values (R, G, L, K)."""
    device = model.rope_table.device
    if device.type == "cuda":
        return prefill_flex(model, prefix_kv, rows)
    # Encode rows of similar length together, so that little of the work is padding.
    rows_by_size = {}
    for r, (ids, _) in enumerate(rows):
        rows_by_size.setdefault(len(ids).bit_length(), []).append(r)
    L = max(len(ids) for ids, _ in rows)
    order, batches = [], []
    for size in sorted(rows_by_size):
        members = rows_by_size[size]
        order += members
        batches.append(prefill_padded(model, prefix_kv, [rows[r] for r in members]))
    original_order = torch.tensor(order).argsort().to(device)
    kv = []
    for layer in range(len(prefix_kv)):
        keys, values = [], []
        for batch in batches:
            k, v = batch[layer]
            padding = (0, 0, 0, L - k.shape[2])
            keys.append(F.pad(k, padding))
            values.append(F.pad(v, padding))
        kv.append((torch.cat(keys)[original_order], torch.cat(values)[original_order]))
    return kv


# ---- caches --------------------------------------------------------------------------------------


@dataclass
class KVCache:
    k: list  # for each layer (B, G, S, K)
    v: list
    score_bias: torch.Tensor  # (B, 1, 1, S), added to attention scores; -inf at padding
    next_pos: torch.Tensor  # (B,) position of the next token
    prefix_length: int  # tokens before the templates


@torch.no_grad()
def build_cache(prefix_kv, rows, rows_kv, members, next_pos, bias=0.0):
    """Caches of the prefix followed by some rows -> KVCache.

    rows_kv: their keys and values. members: for each of B caches the numbers of its rows. next_pos
    (B,). bias is added to the attention scores of the rows' tokens: a number, or for each cache a
    number or one for each of its rows.
    """
    rows_k = rows_kv[0][0]
    L, device = rows_k.shape[2], rows_k.device
    B, P = len(members), prefix_kv[0][0].shape[2]
    lengths = []
    for cache_rows in members:
        lengths.append(sum(len(rows[r][0]) for r in cache_rows))
    # index: where each token of a cache is among the R * L tokens of the padded rows
    index = torch.zeros(B, max(lengths), dtype=torch.long)
    score_bias = torch.full((B, P + max(lengths)), -torch.inf, dtype=rows_k.dtype)
    score_bias[:, :P] = 0
    for b, cache_rows in enumerate(members):
        cache_bias = bias if np.ndim(bias) == 0 else bias[b]
        row_bias = np.broadcast_to(cache_bias, len(cache_rows)).tolist()
        start = 0
        for i, r in enumerate(cache_rows):
            end = start + len(rows[r][0])
            index[b, start:end] = torch.arange(end - start) + r * L
            score_bias[b, P + start : P + end] = row_bias[i]
            start = end
    index = index.to(device)

    def gather(prefix, x):
        """prefix (1, G, P, K), x (R, G, L, K) -> (B, G, S, K)"""
        tokens = x.transpose(1, 2).flatten(0, 1)  # (R * L, G, K)
        tokens = tokens[index].transpose(1, 2)
        return torch.cat([prefix.expand(B, -1, -1, -1), tokens], dim=2)

    keys, values = [], []
    for (prefix_k, prefix_v), (k, v) in zip(prefix_kv, rows_kv):
        keys.append(gather(prefix_k, k))
        values.append(gather(prefix_v, v))
    score_bias = score_bias.to(device)[:, None, None]
    next_pos = torch.as_tensor(next_pos, device=device)
    return KVCache(keys, values, score_bias, next_pos, P)
