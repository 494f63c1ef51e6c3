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

Letters: B caches, n templates of a question, P tokens of the prefix, T tokens of all rows, S tokens
in a cache after the prefix, G key/value heads, K head_dim.
"""

import importlib.util
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from myriadlama.llama import causal_attention
from nanorecall.ops import accum_dtype

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
    axis.set_xticks(range(len(names)), names)
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel="key (P: prefix)", ylabel="query", title=title)
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

    There is a row for each group of templates that attend to each other.
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
        ids, row_positions = [], []
        for i in group:
            ids += templates[i]
            row_positions += range(starts[i], starts[i] + len(templates[i]))
        rows.append((ids, row_positions))
    return rows, answer_position


# ---- prefill -------------------------------------------------------------------------------------

BLOCK = 64  # tokens: fewer make matrices too small to be fast, more are computed in vain


@dataclass
class Encoded:
    """Rows that were encoded after a prefix. Rows with the same beginning share its tokens."""

    kv: list  # for each layer the keys and values of all tokens, both (1, G, T, K)
    paths: list  # for each row the numbers of its tokens, from 0 to T - 1


def prefill_prefix(model, ids):
    """Encode the tokens that all questions share -> [keys (1, G, P, K), values] of each layer."""
    tokens = torch.tensor([ids], device=model.rope_table.device)
    positions = torch.arange(len(ids), device=tokens.device)[None]
    return model.encode(tokens, positions, causal_attention)


def merge_beginnings(rows):
    """Rows as a trie: what rows have in common at their beginning is there once.

    A token's key and value depend only on the tokens before it in its row. Templates of a relation
    are the same for all its questions up to the subject, so a full batch saves a third of its
    tokens.
    -> token ids (1, T), positions (1, T), paths (see Encoded)
    """
    numbers, paths = {}, []  # numbers: (number of the token before, id, position) -> number
    for ids, positions in rows:
        number, path = None, []
        for token, position in zip(ids, positions):
            number = numbers.setdefault((number, token, int(position)), len(numbers))
            path.append(number)
        paths.append(path)
    _, ids, positions = zip(*numbers)
    return torch.tensor([ids]), torch.tensor([positions]), paths


def path_masks(paths, T):
    """For each block of the T tokens, yield the keys that it needs (n,) and a mask (tokens, n).

    A token attends to itself and those before it in its row.
    """
    paths = [torch.tensor(path) for path in paths]
    row, place = torch.zeros(T, dtype=torch.long), torch.zeros(T, dtype=torch.long)
    for r, path in enumerate(paths):
        row[path], place[path] = r, torch.arange(len(path))
    padded = pad_sequence(paths, batch_first=True)  # (rows, longest row)
    for tokens in torch.arange(T).split(BLOCK):
        is_before = torch.arange(padded.shape[1]) <= place[tokens, None]
        attended = torch.where(is_before, padded[row[tokens]], tokens[:, None])
        keys, column = attended.unique(return_inverse=True)
        yield keys, torch.zeros(len(tokens), len(keys), dtype=torch.bool).scatter(1, column, True)


def prefill_blocks(model, prefix_kv, rows):
    """Encode rows; each attends to the prefix and, causally, to itself -> Encoded.

    All tokens lie end to end, without padding. Blocks of them attend to the keys that some token of
    the block needs: one mask of all tokens would take a gigabyte for 256 questions.
    """
    P, device = prefix_kv[0][0].shape[2], model.rope_table.device
    tokens, positions, paths = merge_beginnings(rows)
    blocks = []  # numbers of keys, mask (queries of a block, these keys); all see the prefix
    for keys, mask in path_masks(paths, tokens.shape[1]):
        keys = torch.cat([torch.arange(P), P + keys])
        blocks.append((keys.to(device), F.pad(mask, (P, 0), value=True).to(device)))

    def attend(layer, q, k, v):
        prefix_k, prefix_v = prefix_kv[layer]
        k, v = torch.cat([prefix_k, k], dim=2), torch.cat([prefix_v, v], dim=2)  # (1, G, P + T, K)
        outputs = []
        for q_block, (keys, mask) in zip(q.split(BLOCK, dim=2), blocks):
            k_block, v_block = k.index_select(2, keys), v.index_select(2, keys)
            out = F.scaled_dot_product_attention(
                q_block, k_block, v_block, attn_mask=mask, enable_gqa=True
            )
            outputs.append(out)
        return torch.cat(outputs, dim=2)

    return Encoded(model.encode(tokens.to(device), positions.to(device), attend), paths)


def prefill_flex(model, prefix_kv, rows, attention=None):
    """prefill_blocks with FlexAttention, for GPUs: one kernel instead of one for each block.

    attention: flex_attention, compiled if None.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    P, device = prefix_kv[0][0].shape[2], model.rope_table.device
    tokens, positions, paths = merge_beginnings(rows)
    T = tokens.shape[1]
    # The mask function below may be asked for any pair.
    dense = torch.zeros(T, P + T, dtype=torch.bool, device=device)
    dense[:, :P] = True
    for rows_of_block, (keys, mask) in zip(dense.split(BLOCK), path_masks(paths, T)):
        rows_of_block[:, P + keys.to(device)] = mask.to(device)

    def mask(b, h, q, kv):
        return dense[q, kv]

    if attention is None:
        attention = torch.compile(flex_attention)
    block_mask = create_block_mask(mask, None, None, T, P + T, device=device)
    # For fewer than 128 queries torch takes its kernel for decoding. If query heads share keys, no
    # variant of that fits the blocks of the mask, and compiling fails.
    options = {"FORCE_USE_FLEX_ATTENTION": True}

    def attend(layer, q, k, v):
        prefix_k, prefix_v = prefix_kv[layer]
        k, v = torch.cat([prefix_k, k], dim=2), torch.cat([prefix_v, v], dim=2)
        return attention(q, k, v, block_mask=block_mask, enable_gqa=True, kernel_options=options)

    return Encoded(model.encode(tokens.to(device), positions.to(device), attend), paths)


def join(first, second):
    """Two Encoded, behind the same prefix, as one: the rows of the first, then of the second."""
    T = first.kv[0][0].shape[2]
    kv = []
    for (k1, v1), (k2, v2) in zip(first.kv, second.kv):
        kv.append((torch.cat([k1, k2], dim=2), torch.cat([v1, v2], dim=2)))
    paths = [[T + number for number in path] for path in second.paths]
    return Encoded(kv, first.paths + paths)


def why_no_flex(model):
    """Why prompts are not encoded by FlexAttention, as text, or None if they are."""
    if model.rope_table.device.type != "cuda":
        return "FlexAttention is used on CUDA only"
    if model.config.head_dim < 16:
        return "FlexAttention's kernel takes keys of a width of at least 16"
    if importlib.util.find_spec("triton") is None:
        return "FlexAttention needs the package triton"
    return None


def prefill(model, prefix_kv, rows):
    """Encode rows after the prefix -> Encoded."""
    encode = prefill_blocks if why_no_flex(model) else prefill_flex
    return encode(model, prefix_kv, rows)


# ---- caches --------------------------------------------------------------------------------------


@dataclass
class KVCache:
    prefix_kv: list  # for each layer keys and values (1, G, P, K): all caches share them
    k: list  # for each layer (B, G, S, K), of the tokens after the prefix
    v: list
    score_bias: torch.Tensor  # (B, 1, 1, P + S), added to attention scores; -inf at padding
    next_pos: torch.Tensor  # (B,) position of the next token


@torch.no_grad()
def build_cache(prefix_kv, encoded, members, next_pos, bias=0.0):
    """Caches of the prefix followed by some rows -> KVCache.

    encoded: the rows. members: for each of B caches the numbers of its rows. next_pos (B,). bias is
    added to the attention scores of the rows' tokens: a number, or for each cache a number or one
    for each of its rows.
    """
    device, dtype = prefix_kv[0][0].device, accum_dtype(prefix_kv[0][0])
    P = prefix_kv[0][0].shape[2]
    index, score_bias = [], []
    for b, cache_rows in enumerate(members):
        cache_bias = bias if np.isscalar(bias) else bias[b]
        row_bias = np.broadcast_to(cache_bias, len(cache_rows)).tolist()
        numbers, token_bias = [], [0.0] * P
        for r, one_bias in zip(cache_rows, row_bias):
            numbers += encoded.paths[r]
            token_bias += [one_bias] * len(encoded.paths[r])
        index.append(torch.tensor(numbers))
        score_bias.append(torch.tensor(token_bias, dtype=dtype))
    index = pad_sequence(index, batch_first=True).to(device)  # (B, S)
    score_bias = pad_sequence(score_bias, batch_first=True, padding_value=-torch.inf).to(device)
    keys, values = [], []
    for k, v in encoded.kv:
        keys.append(k[0][:, index].transpose(0, 1))
        values.append(v[0][:, index].transpose(0, 1))
    next_pos = torch.as_tensor(next_pos, device=device)
    return KVCache(prefix_kv, keys, values, score_bias[:, None, None], next_pos)
