"""Greedy decoding from caches: when an answer ends, what attends, and who chooses the next token.

Several rows may decode one answer together. Their logits are combined (`argmax_grouped`), or their
hidden states (`fused_layers`).

The rows of a question lie next to each other. `sizes` says how many each question has.

Letters: B caches, n rows of a question, P tokens of the prefix, S tokens in a cache after it, H
query heads, G key/value heads, K head_dim, D a layer's width, V vocabulary.
"""

import contextlib
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from myriadlama.hugging_face import decoded
from nanorecall.ops import accum_dtype


@dataclass
class StopCriteria:
    """An answer ends before an eos token, or before a line break once it has some text."""

    eos: torch.Tensor  # (number of eos tokens,)
    has_line_break: torch.Tensor  # (V,) bool
    is_blank: torch.Tensor  # (V,) bool

    @classmethod
    def from_tokenizer(cls, tokenizer, eos, vocab_size, device):
        has_line_break, is_blank = [], []
        for token in range(vocab_size):
            text = decoded(tokenizer, [token], skip_special_tokens=False)
            has_line_break.append("\n" in text)
            is_blank.append(not text.strip())
        return cls(
            torch.tensor(list(eos), device=device, dtype=torch.long),
            torch.tensor(has_line_break, device=device),
            torch.tensor(is_blank, device=device),
        )


# ---- attention of the new token ------------------------------------------------------------------
#
# scores (B, G, H/G, P + S) of prefix, templates and answer, is_template (P + S,) bool: which tokens
# are those of templates -> weights of the same shape


def softmax_weights(scores, is_template):
    return scores.softmax(-1)


def ape_weights(scores, is_template, temperature, scale):
    """Adaptive Parallel Encoding (Yang et al. 2025, arXiv 2502.05431).

    Scores of templates are divided by the temperature. The log of the sum of their exponentials,
    which decides how much attention all templates get, is multiplied by scale * temperature, as in
    the authors' code. With 1 and 1 this is plain attention.
    """
    scores = torch.where(is_template, scores / temperature, scores)
    log_sum = scores.masked_fill(~is_template, -torch.inf).logsumexp(-1, keepdim=True)
    change = (scale * temperature - 1) * log_sum
    return torch.where(is_template, scores + change, scores).softmax(-1)


def attend_to_cache(q, prefix_kv, k, v, weigh):
    """Attend with one token to the prefix, which all caches share uncopied, and to the rest.

    q (B, H, 1, K), prefix_kv two of (1, G, P, K), k and v (B, G, S, K) -> (B, H, 1, K). weigh:
    scores (B, G, H/G, P + S) -> weights.
    """
    prefix_k, prefix_v = prefix_kv[0][0], prefix_kv[1][0]  # (G, P, K)
    P = prefix_k.shape[1]
    # Scores in bfloat16 have three digits, too few for a softmax.
    dtype = accum_dtype(q)
    q = q[:, :, 0].unflatten(1, (len(prefix_k), -1)).to(dtype)  # (B, G, H/G, K)
    to_prefix = torch.einsum("bghk,gpk->bghp", q, prefix_k.to(dtype))
    to_rest = q @ k.to(dtype).transpose(-1, -2)
    scores = torch.cat([to_prefix, to_rest], -1) / math.sqrt(q.shape[-1])
    weights = weigh(scores).to(v.dtype)
    out = torch.einsum("bghp,gpk->bghk", weights[..., :P], prefix_v) + weights[..., P:] @ v
    return out.flatten(1, 2).unsqueeze(2)


# ---- decoding ------------------------------------------------------------------------------------


@torch.no_grad()
def greedy_decode(
    model, cache, first_token, choose, stop, max_new_tokens=10, weigh=softmax_weights, forward=None
):
    """Decode greedily from B caches, after first_token.

    choose(logits (B, V)) -> tokens (B,), log of their probability (B,). Returns tokens (B, up to
    max_new_tokens), -1 after the end of an answer, and the log probability of each, as `choose`
    gives it, 0 after the end. The end has one, too. The cache is not changed.

    forward(live, ...): a model call that must know which of the B rows are still computed, (rows,);
    None is the plain call.
    """
    B, device = len(cache.next_pos), cache.next_pos.device
    P, S = cache.prefix_kv[0][0].shape[2], cache.k[0].shape[2]
    # Make room for the new tokens once, so that no step copies the cache.
    keys = [F.pad(k, (0, 0, 0, max_new_tokens)) for k in cache.k]
    values = [F.pad(v, (0, 0, 0, max_new_tokens)) for v in cache.v]
    score_bias = F.pad(cache.score_bias, (0, max_new_tokens))
    index = torch.arange(P + S + max_new_tokens, device=device)
    is_template = (index >= P) & (index < P + S)

    def attend(length, layer, q, k, v):
        """Store one new key and value, attend to the prefix and the first `length` tokens."""
        keys[layer][:, :, length - 1 : length] = k
        values[layer][:, :, length - 1 : length] = v
        k, v = keys[layer][:, :, :length], values[layer][:, :, :length]
        bias, of_templates = score_bias[..., : P + length], is_template[: P + length]
        prefix_kv = cache.prefix_kv[layer]
        return attend_to_cache(q, prefix_kv, k, v, lambda x: weigh(x + bias, of_templates))

    token = torch.as_tensor(first_token, device=device).expand(B).clone()
    finished = torch.zeros(B, dtype=torch.bool, device=device)
    has_text = torch.zeros(B, dtype=torch.bool, device=device)
    live = torch.arange(B, device=device)  # rows that are still computed
    generated, log_probs = [], []
    for step in range(max_new_tokens):
        positions = (cache.next_pos[live] + step)[:, None]
        attention_fn = functools.partial(attend, S + step + 1)
        inputs = token[live, None], positions, attention_fn
        x = model(*inputs) if forward is None else forward(live, *inputs)  # (rows, 1, D)
        live_logits = model.logits(x[:, -1]).float()
        logits = live_logits.new_zeros(B, live_logits.shape[1]).index_copy(0, live, live_logits)
        token, log_prob = choose(logits)
        ends = torch.isin(token, stop.eos) | (stop.has_line_break[token] & has_text)
        log_probs.append(torch.where(finished, 0, log_prob))
        in_answer = ~finished & ~ends
        generated.append(torch.where(in_answer, token, -1))
        has_text |= in_answer & ~stop.is_blank[token]
        finished |= ends
        is_open = ~finished[live]
        if not is_open.any():
            break
        # Copying a cache costs about as much as a step, so wait until half of the rows are done.
        if 2 * is_open.sum() <= len(live):
            keys = [k[is_open] for k in keys]
            values = [v[is_open] for v in values]
            live, score_bias = live[is_open], score_bias[is_open]
    return torch.stack(generated, 1), torch.stack(log_probs, 1)


def argmax_each(logits):
    """Every row chooses its own token: logits (B, V) -> tokens (B,), log probabilities (B,)."""
    token = logits.argmax(-1)
    return token, logits.log_softmax(-1).gather(1, token[:, None]).squeeze(1)


def argmax_grouped(sizes, combine, weights=None):
    """A `choose` for questions of several rows, which all take the same token.

    The token is the argmax of combine(logits (n, V), weight (n,)) -> scores (V,), the log of a
    probability up to a constant. weights: one for each question, or None if combine needs none.
    """
    if weights is None:
        weights = [None] * len(sizes)

    def choose(logits):
        scores = []
        for own_logits, weight in zip(logits.split(sizes), weights):
            scores.append(combine(own_logits, weight))
        token, log_prob = argmax_each(torch.stack(scores))
        n_rows = torch.tensor(sizes, device=logits.device)
        return token.repeat_interleave(n_rows), log_prob.repeat_interleave(n_rows)

    return choose


# ---- combined logits -----------------------------------------------------------------------------
#
# logits (n, V) of the rows of one question, weight (n,) or None -> scores (V,)


def mean_logits(logits, weight):
    """A product of experts: the geometric mean of the probabilities."""
    return logits.mean(0)


def mean_probability(logits, weight):
    """A mixture of experts: the mean of the probabilities."""
    return logits.log_softmax(-1).logsumexp(0)


def max_probability(logits, weight):
    return logits.softmax(-1).amax(0).log()


def weighted_mean_logits(logits, weight):
    return (logits * (weight / weight.sum()).unsqueeze(-1)).sum(0)


def highest_weight_logits(logits, weight):
    """The logits of the template with the highest weight."""
    return logits[weight.argmax()]


def contrast_with_prior(logits, prior_weight):
    """Mean over templates of log p(token | template) - weight * log p(token | without subject).

    logits (2n, V): of the n templates, then of the same templates without their subject. Tokens
    that get less than a tenth of the highest mean are left out, as in contrastive decoding (Li et
    al. 2023, arXiv 2210.15097): the ratio of two tiny probabilities is noise.
    """
    log_p, log_prior = logits.log_softmax(-1).chunk(2)
    log_p, log_prior = log_p.mean(0), log_prior.mean(0)  # (V,)
    is_plausible = log_p >= log_p.max() - math.log(10)
    return (log_p - prior_weight * log_prior).masked_fill(~is_plausible, -torch.inf)


# ---- combined hidden states ----------------------------------------------------------------------


@contextlib.contextmanager
def fused_layers(model, first_layer, sizes, part, combine):
    """While this is open, the rows of a question share hidden states from a layer on.

    part: "layer_output", or "ffn_activation" for the input of down_proj. combine(x (n, 1, D)) ->
    (1, D) is what each of the n rows goes on with.
    """

    def fuse(x):  # (rows, 1, D)
        return torch.cat([combine(own).expand_as(own) for own in x.split(sizes)])

    hooks = []
    for layer in model.layers[first_layer:]:
        if part == "layer_output":
            hooks.append(layer.register_forward_hook(lambda module, args, output: fuse(output)))
        else:
            down_proj = layer.mlp.down_proj
            hooks.append(down_proj.register_forward_pre_hook(lambda module, args: fuse(*args)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
