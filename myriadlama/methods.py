"""The methods of flex_generate.py: how templates of a question become one answer.

A method is a function: batch -> the text generated for each question.
"""

from typing import NamedTuple

from myriadlama import fusion


def separate_cache(batch, template=None):
    """A cache for each template alone, or for one template number of each question."""
    rows, kv = batch.encode_separately(1.0 if template is None else 1 / batch.n)
    members, next_pos = [], []
    for r, (ids, _) in enumerate(rows):
        if template is None or r % batch.n == template:
            members.append([r])
            next_pos.append(batch.prefix_length + len(ids))
    return fusion.build_cache(batch.prefix_kv, rows, kv, members, next_pos)


def separate_answers(batch):
    """Answer each template alone -> texts (B * n), confidence (B, n).

    The confidence is the probability that the model gives to its answer.
    """

    def compute():
        return batch.decode(separate_cache(batch))

    texts, probability = batch.meter.shared("separate_answers", compute)
    return texts, probability.view(-1, batch.n)


def decode_ensemble(batch, combine, confidence=None):
    """Decode all templates in parallel; their logits together choose each token.

    combine: see fusion.argmax_grouped.
    """
    choose = fusion.argmax_grouped(batch.n, combine, confidence)
    texts, _ = batch.decode(separate_cache(batch), choose)
    return texts[:: batch.n]  # all templates of a question have the same answer


def decode_fused(batch, chosen=None, bias=0.0):
    """Put templates that were encoded alone into one cache per question and decode.

    chosen: numbers of templates (B, m), or None for all. bias: on their attention scores, a number
    or (B, m), besides that of the setting score_bias.
    """
    rows, kv = batch.encode_separately()
    if chosen is None:
        chosen = [range(batch.n)] * len(batch.questions)
    members, next_pos = [], []
    for i, templates in enumerate(chosen):
        cache_rows = [i * batch.n + j for j in templates]
        members.append(cache_rows)
        next_pos.append(batch.prefix_length + max(len(rows[r][0]) for r in cache_rows))
    bias = bias + batch.score_bias(len(chosen[0]))
    return batch.decode(fusion.build_cache(batch.prefix_kv, rows, kv, members, next_pos, bias))[0]


def decode_scheme(batch, scheme):
    """Put all templates into one cache per question under an attention scheme and decode."""
    positions = batch.run.config.template_positions
    if scheme == "isolated" and positions == "restart":
        return decode_fused(batch)  # the templates are encoded as if they were alone
    rows, members, next_pos = [], [], []
    for question in batch.questions:
        first = len(rows)
        new_rows, answer_position = fusion.layout(question, batch.prefix_length, scheme, positions)
        rows += [(ids, row_positions) for ids, row_positions, _ in new_rows]
        members.append(range(first, len(rows)))
        next_pos.append(answer_position)
    kv, bias = batch.encode(rows), batch.score_bias(batch.n)
    return batch.decode(fusion.build_cache(batch.prefix_kv, rows, kv, members, next_pos, bias))[0]


def origin(batch):
    """The first template alone."""
    return batch.decode(separate_cache(batch, template=0))[0]


def per_prompt(batch):
    """Each template alone: a list of n answers to each question."""
    texts, _ = separate_answers(batch)
    return [texts[i : i + batch.n] for i in range(0, len(texts), batch.n)]


def average(batch):
    return decode_ensemble(batch, fusion.mean_logits)


def maximum(batch):
    return decode_ensemble(batch, fusion.max_probability)


def weighted_average(batch):
    return decode_ensemble(batch, fusion.weighted_mean_logits, separate_answers(batch)[1])


def weighted_maximum(batch):
    return decode_ensemble(batch, fusion.most_confident_logits, separate_answers(batch)[1])


def flex(batch):
    """All templates in one cache, each attending only to itself."""
    return decode_scheme(batch, "isolated")


def flex_adaptive(batch):
    """The half of the templates with the highest confidence, in one cache."""
    confidence = separate_answers(batch)[1]
    best = confidence.topk((batch.n + 1) // 2, dim=1).indices
    return decode_fused(batch, best.sort(dim=1).values.tolist())


def flex_weighted(batch):
    """All templates in one cache; attention to a template is multiplied by its confidence.

    The factors of a question have mean 1.
    """
    confidence = separate_answers(batch)[1]
    factors = confidence / confidence.mean(1, keepdim=True)
    return decode_fused(batch, bias=factors.log().clamp(min=-30).numpy(force=True))


def hybrid(batch):
    """Average the fused prompt's log probabilities with those of the single prompts."""
    rows, kv = batch.encode_separately()
    n, members, next_pos, bias = batch.n, [], [], []
    for first in range(0, len(rows), n):
        ends = [batch.prefix_length + len(ids) for ids, _ in rows[first : first + n]]
        for i in range(n):
            members.append([first + i])
        members.append(range(first, first + n))
        next_pos += [*ends, max(ends)]
        bias += [0.0] * n + [batch.score_bias(n)]

    def combine(logits, confidence):
        log_probs = logits.log_softmax(-1)  # (B, n + 1, V)
        return log_probs[:, :n].mean(1) + log_probs[:, n]

    cache = fusion.build_cache(batch.prefix_kv, rows, kv, members, next_pos, bias)
    return batch.decode(cache, fusion.argmax_grouped(n + 1, combine))[0][:: n + 1]


def flex_full(batch):
    """All templates in one cache, each attending to all before it."""
    return decode_scheme(batch, "full")


def flex_myriadlama(batch):
    """Manual and automatic templates in one cache, each attending only to itself."""
    return decode_scheme(batch, "isolated")


def flex_myriadlama_xattn(batch):
    """The same, with cross attention between manual templates (allow_manual_cross_attention)."""
    return decode_scheme(batch, "manual_cross")


# ---- the table -----------------------------------------------------------------------------------


class Method(NamedTuple):
    generate: object  # batch -> texts
    templates: str  # how many it uses for an answer: one, half, all
    fused_by: str


METHODS = {
    "origin": Method(origin, "one", "nothing"),
    "per_prompt": Method(per_prompt, "one", "nothing"),
    "avg": Method(average, "all", "logits"),
    "max": Method(maximum, "all", "probabilities"),
    "weighted_avg": Method(weighted_average, "all", "logits, by confidence"),
    "weighted_max": Method(weighted_maximum, "all", "the most confident one"),
    "flex": Method(flex, "all", "attention"),
    "flex_adaptive": Method(flex_adaptive, "half", "attention, the most confident half"),
    "flex_weighted": Method(flex_weighted, "all", "attention, by confidence"),
    "hybrid": Method(hybrid, "all", "attention and logits"),
    "flex_full": Method(flex_full, "all", "attention, all see all before"),
    "flex_myriadlama": Method(flex_myriadlama, "all", "attention"),
    "flex_myriadlama_xattn": Method(flex_myriadlama_xattn, "all", "attention, manual see manual"),
}
# They may put the templates one after another (setting template_positions).
ONE_PROMPT_METHODS = ("flex", "flex_full", "flex_myriadlama", "flex_myriadlama_xattn")
