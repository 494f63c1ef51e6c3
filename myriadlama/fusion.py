"""Many templates of one question, one answer: which tokens attend to which, encoding each template once, decoding from caches.

A prompt has a prefix (instruction and examples), segments (one template each), and a cue, the last token, ":" of "A:". Segments
see the prefix and, by the scheme, themselves or each other; the cue and everything that is generated see all of them, so the
first token of the answer is fused already. Positions: "sequential", segments one after another, or "restart", each begins
right after the prefix, so that none is further from the answer than another and its keys serve alone and fused. Turning keys
to other positions afterwards would not do: after a shared prefix the values depend on the distance to it, too.

Letters: B questions, n segments of a question, R rows, P tokens of the prefix, L tokens in the longest segment, S tokens of a
question in all, H query heads, G key/value heads, K width of a head, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

# ---- who sees whom -----------------------------------------------------------------------------------------------------

PREFIX, FUSED = -1, -2  # "segments" of tokens before and after the templates


def isolated(q, kv, manual):
    """A segment sees itself."""
    return q == kv


def manual_cross(q, kv, manual):
    """A segment sees itself; manual ones see each other, too (those before them: attention stays causal)."""
    return (q == kv) | (manual[q] & manual[kv])


def full(q, kv, manual):
    """Every segment sees all before it: plain concatenation."""
    return q == q  # always


# f(segment of the token that looks, segment of the token looked at, which segments are manual) -> bool, numbers or tensors
MASKS = {"isolated": isolated, "manual_cross": manual_cross, "full": full}


def dense_mask(scheme, segment, manual):
    """The dense mask of a question: segment (S,) of each token (PREFIX, FUSED or a number) -> (S, S) bool, row sees column."""
    q, kv, place = segment[:, None], segment[None, :], torch.arange(len(segment))
    inner = MASKS[scheme](q.clamp(min=0), kv.clamp(min=0), manual) & (q >= 0) & (kv >= 0)
    return (place[:, None] >= place) & (inner | (kv == PREFIX) | (q == FUSED))


def encode_groups(scheme, manual):
    """Segments that see each other, as lists of their numbers: what is encoded as one row."""
    rows, left = [], list(range(len(manual)))
    while left:
        i = left[0]
        together = [j for j in left if bool(MASKS[scheme](torch.tensor(j), torch.tensor(i), manual))]
        rows.append(together)
        left = [j for j in left if j not in together]
    return rows


def draw_mask(scheme, manual, path=None, generated=2):
    """The mask between templates as text, a row for each and for generated tokens; with a path also as a picture."""
    n = len(manual)
    kinds = ["M" if m else "A" for m in manual.tolist()]
    names = ["P", *(f"{k}{kinds[: i + 1].count(k)}" for i, k in enumerate(kinds)), *(f"G{i + 1}" for i in range(generated))]
    segment = torch.tensor([PREFIX, *range(n), *[FUSED] * generated])
    seen = dense_mask(scheme, segment, manual)
    lines = ["    " + " ".join(f"{name:>2}" for name in names)]
    lines += [f"{name:>2} [" + " ".join(" x" if x else " ." for x in row) + " ]" for name, row in zip(names, seen.tolist())]
    if path:
        from nanorecall.plots import figure, write_figure

        plt, fig, (axis,) = figure(1, 1, width=4.5, grid=False)
        axis.imshow(seen.numpy(), cmap="Blues", vmin=0, vmax=1.4)
        axis.set_xticks(range(len(names)), names, fontsize=7)
        axis.set_yticks(range(len(names)), names, fontsize=7)
        axis.set(xlabel="seen (P: prefix)", ylabel="sees", title=f"{scheme}: manual M, automatic A, generated G")
        axis.title.set_fontsize(8)
        write_figure(fig, plt, path)
    return "\n".join(lines)


# ---- layout ------------------------------------------------------------------------------------------------------------


@dataclass
class Question:
    """Token ids of one question: segments without their last token, which is the cue, the same for all."""

    segments: list  # n arrays
    manual: torch.Tensor  # (n,) bool
    cue: int
    between: list  # token ids between two segments under sequential positions (the cue comes before them)


def layout(question, prefix, scheme, positions):
    """Where everything goes -> rows [(ids, positions, segment of each token)], one for each group, and the cue's position."""
    whole = [list(s) for s in question.segments]
    if positions == "sequential":
        whole = [s + [question.cue, *question.between] for s in whole[:-1]] + whole[-1:]
        starts = prefix + np.concatenate([[0], np.cumsum([len(s) for s in whole])])
        cue = int(starts[-1])
    else:
        starts, cue = np.full(len(whole), prefix), prefix + max(map(len, whole))
    rows = []
    for group in encode_groups(scheme, question.manual):
        ids = [t for i in group for t in whole[i]]
        at = [starts[i] + j for i in group for j in range(len(whole[i]))]
        rows.append((ids, at, [i for i in group for _ in whole[i]]))
    return rows, cue


# ---- encoding ----------------------------------------------------------------------------------------------------------


@dataclass
class Cache:
    """Keys and values of R rows, per layer (R, G, S, K), and a bias on the scores (R, 1, 1, S): 0, -inf for padding."""

    k: list
    v: list
    bias: torch.Tensor
    at: torch.Tensor  # (R,) position of the next token


@torch.no_grad()
def prefill_prefix(model, ids):
    """The tokens that all questions share, once -> keys and values (1, G, P, K) of each layer."""
    kept = []

    def attend(layer, q, k, v):
        kept.append((k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    tokens = torch.tensor([ids], device=model.turns.device)
    model(tokens, torch.arange(len(ids), device=tokens.device)[None], attend)
    return kept


@torch.no_grad()
def prefill_padded(model, prefix, rows):
    """Rows of [(ids, positions)] after a shared prefix, each seeing it and itself, causally -> keys and values (R, G, L, K) of
    each layer. Padding is at the end, where no token attends to it."""
    L, device = max(len(ids) for ids, _ in rows), model.turns.device
    tokens, at = torch.zeros(len(rows), L, dtype=torch.long), torch.zeros(len(rows), L, dtype=torch.long)
    for r, (ids, where) in enumerate(rows):
        tokens[r, : len(ids)], at[r, : len(ids)] = torch.tensor(ids), torch.as_tensor(np.asarray(where))
    P, kept = prefix[0][0].shape[2], []
    seen = torch.ones(L, P + L, dtype=torch.bool, device=device).tril(P)

    def attend(layer, q, k, v):
        kept.append((k, v))
        k, v = (torch.cat([old.expand(len(rows), -1, -1, -1), new], dim=2) for old, new in zip(prefix[layer], (k, v)))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)

    model(tokens.to(device), at.to(device), attend)
    return kept


@torch.no_grad()
def prefill_flex(model, prefix, rows, attention=None):
    """encode_rows with all rows end to end in one, under a FlexAttention block mask: for GPUs, where short rows leave most of
    the device idle. attention: flex_attention itself (compiled on CUDA if None)."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device, P = model.turns.device, prefix[0][0].shape[2]
    lengths = [len(ids) for ids, _ in rows]
    tokens = torch.tensor([[t for ids, _ in rows for t in ids]], device=device)
    at = torch.tensor([[int(p) for _, where in rows for p in where]], device=device)
    row = torch.arange(len(rows), device=device).repeat_interleave(torch.tensor(lengths, device=device))
    row_of_key = torch.cat([torch.full((P,), -1, device=device), row])  # -1: the prefix

    def mask(b, h, q, kv):
        return (row_of_key[kv] == -1) | ((row_of_key[kv] == row[q]) & (kv - P <= q))

    attention = attention or torch.compile(flex_attention)
    block_mask, kept = create_block_mask(mask, None, None, len(row), P + len(row), device=device), []

    def attend(layer, q, k, v):
        kept.append((k, v))
        k, v = (torch.cat([old, new], dim=2) for old, new in zip(prefix[layer], (k, v)))
        return attention(q, k, v, block_mask=block_mask, enable_gqa=True)

    model(tokens, at, attend)
    place = torch.nn.utils.rnn.pad_sequence(torch.arange(len(row), device=device).split(lengths), batch_first=True)  # (R, L)
    return [tuple(x[0][:, place].transpose(0, 1) for x in layer) for layer in kept]


def prefill(model, prefix, rows):
    """encode_packed on CUDA; else encode_rows for rows of about one length at a time, so that little of the work is padding."""
    if model.turns.device.type == "cuda":
        return prefill_flex(model, prefix, rows)
    sizes = [len(ids).bit_length() for ids, _ in rows]
    L, parts, order = max(len(ids) for ids, _ in rows), [], []
    for size in sorted(set(sizes)):
        mine = [r for r, s in enumerate(sizes) if s == size]
        order += mine
        kept = prefill_padded(model, prefix, [rows[r] for r in mine])
        parts.append([tuple(F.pad(x, (0, 0, 0, L - x.shape[2])) for x in layer) for layer in kept])
    back = torch.tensor(order).argsort().to(model.turns.device)
    return [tuple(torch.cat(side)[back] for side in zip(*layers)) for layers in zip(*parts)]


@torch.no_grad()
def build_cache(prefix, rows, encoded, places, next_at, bias=0.0):
    """What B caches hold: the prefix, then the tokens of some rows -> Cache.

    rows [(ids, positions)], encoded: their keys and values; places: for each cache the numbers of its rows; next_at (B,): the
    position of the next token; bias: on the scores of the rows' tokens, a number, one for each cache, or for each row of each.
    """
    device, P = encoded[0][0].device, prefix[0][0].shape[2]
    L = encoded[0][0].shape[2]
    tokens = [torch.tensor([r * L + j for r in mine for j in range(len(rows[r][0]))], device=device) for mine in places]
    lengths = torch.tensor([len(t) for t in tokens], device=device)
    at = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)  # (B, longest) into the flattened (R, L)

    def gather(x, old):
        G, K = x.shape[1], x.shape[3]
        mine = x.transpose(1, 2).reshape(-1, G, K)[at].transpose(1, 2)  # (B, G, longest, K)
        return torch.cat([old.expand(len(at), -1, -1, -1), mine], dim=2)

    k, v = ([gather(layer[i], old[i]) for layer, old in zip(encoded, prefix)] for i in (0, 1))
    there = torch.arange(at.shape[1], device=device) < lengths[:, None]
    bias = [bias] * len(places) if np.ndim(bias) == 0 else bias
    of_rows = [np.broadcast_to(b, len(mine)).tolist() for b, mine in zip(bias, places)]
    of_tokens = [[b for b, r in zip(bs, mine) for _ in rows[r][0]] for bs, mine in zip(of_rows, places)]
    of_tokens = [torch.tensor(b, dtype=k[0].dtype, device=device) for b in of_tokens]
    scores = torch.where(there, torch.nn.utils.rnn.pad_sequence(of_tokens, batch_first=True), -torch.inf)
    scores = torch.cat([scores.new_zeros(len(at), P), scores], dim=1)[:, None, None]
    return Cache(k, v, scores, torch.as_tensor(next_at, device=device))


# ---- decoding ----------------------------------------------------------------------------------------------------------


@dataclass
class StopCriteria:
    """Which tokens end an answer: one of `eos`, or with a line break in it once there is something before it."""

    eos: torch.Tensor  # (E,)
    breaks: torch.Tensor  # (V,) bool
    blank: torch.Tensor  # (V,) bool

    @classmethod
    def of(cls, tokenizer, eos, device, size):
        texts = [tokenizer.decode([i], skip_special_tokens=False) for i in range(size)]
        table = lambda f: torch.tensor([f(t) for t in texts], device=device)
        return cls(
            torch.tensor(list(eos), device=device, dtype=torch.long), table(lambda t: "\n" in t), table(lambda t: not t.strip())
        )


@torch.no_grad()
def greedy_decode(model, cache, cue, choose, stop, most=10):
    """Decode greedily from R caches, the cue first: -> tokens (R, up to `most`), -1 after the end, and the probability (R,)
    that the model gives to what was chosen. choose(logits (R, V)) -> tokens (R,). The cache is not changed."""
    R, device = len(cache.at), cache.at.device
    S = cache.k[0].shape[2]
    # room for what comes, so that nothing is copied in a step
    k, v = ([F.pad(x, (0, 0, 0, most)) for x in side] for side in (cache.k, cache.v))
    bias = F.pad(cache.bias, (0, most))
    token, out = torch.as_tensor(cue, device=device).expand(R).clone(), []
    done, begun, probability = (torch.zeros(R, dtype=kind, device=device) for kind in (torch.bool, torch.bool, torch.float))
    for step in range(most):
        end = S + step + 1

        def attend(layer, q, new_k, new_v, end=end):
            k[layer][:, :, end - 1 : end], v[layer][:, :, end - 1 : end] = new_k, new_v
            old = k[layer][:, :, :end], v[layer][:, :, :end]
            return F.scaled_dot_product_attention(q, *old, attn_mask=bias[..., :end], enable_gqa=True)

        logits = model.logits(model(token[:, None], (cache.at + step)[:, None], attend)[:, -1]).float()  # (R, V)
        token = choose(logits)
        ends = torch.isin(token, stop.eos) | (stop.breaks[token] & begun)
        live = ~done & ~ends
        probability += torch.where(done, 0, logits.log_softmax(-1).gather(1, token[:, None]).squeeze(1))
        out.append(torch.where(live, token, -1))
        begun |= live & ~stop.blank[token]
        done |= ends
        if done.all():
            break
    return torch.stack(out, 1), probability.exp()


def argmax_each(logits):
    """Every row goes its own way."""
    return logits.argmax(-1)


def argmax_grouped(n, combine):
    """Rows in groups of n go one way, that of combine(logits (B, n, V)) -> scores (B, V)."""
    return lambda logits: combine(logits.unflatten(0, (-1, n))).argmax(-1).repeat_interleave(n)


# combine(weights (B, n)) -> f(logits (B, n, V)) -> scores (B, V)
ENSEMBLES = {
    "avg": lambda w: lambda logits: logits.mean(1),  # of raw logits: the geometric mean of the probabilities
    "max": lambda w: lambda logits: logits.softmax(-1).amax(1),
    "weighted_avg": lambda w: lambda logits: (logits * (w / w.sum(1, keepdim=True)).unsqueeze(-1)).sum(1),
    "weighted_max": lambda w: lambda logits: logits[torch.arange(len(w), device=w.device), w.argmax(1)],
}
