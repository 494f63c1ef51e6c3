"""The methods of flex_generate.py: how templates of a question become one answer.

A method is a function: batch -> Answers, a text and its confidence for each question. The
confidence is the probability that the method gives to a text that begins with what is scored.

Two methods from elsewhere are settings of `flex`, in which each template attends to the shared
prefix and to itself, and the answer to everything:

- parallel context windows (Ratner et al. 2023, arXiv 2212.10947): --score_bias 0. Positions
  restart and scores are not changed. Here windows share the prefix.
- star attention (Acharya et al. 2024, arXiv 2411.17116): --score_bias 0 --template_positions
  sequential, with the prefix as anchor block. Its merge of blocks by the log of their sums of
  exponentials equals one softmax over all blocks, which is what is computed here.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
import torch

from myriadlama import decoding, fusion, prompts
from myriadlama.batch import Answers

# ---- parts of methods ----------------------------------------------------------------------------


def cache_after_prefix(batch, encoded, members, bias=0.0):
    """Caches of rows that all begin right after the prefix; the answer begins after the longest.

    members, bias: see fusion.build_cache.
    """
    next_pos = []
    for rows in members:
        next_pos.append(batch.prefix_length + max(len(encoded.paths[r]) for r in rows))
    return fusion.build_cache(batch.prefix_kv, encoded, members, next_pos, bias)


def separate_cache(batch):
    """A cache for each template alone."""
    encoded = batch.encode_separately()
    return cache_after_prefix(batch, encoded, [[r] for r in range(len(encoded.paths))])


def fused_cache(batch, chosen=None, bias=0.0):
    """Templates that were encoded alone, in one cache per question.

    chosen: for each question rows of its templates, or None for all. bias: on their attention
    scores, see fusion.build_cache.
    """
    rows = batch.template_rows if chosen is None else chosen
    return cache_after_prefix(batch, batch.encode_separately(), rows, bias)


def separate_answers(batch):
    """Answer each template alone -> Answers, lists of n."""

    def compute():
        return batch.decode_rows(separate_cache(batch), batch.counts)

    return batch.meter.shared("separate_answers", compute)


def relative_weights(batch):
    """For each question the weights of its templates (n,), divided by the highest one.

    The probability of a long answer is too small for float32.
    """
    return [(own - own.max()).exp() for own in separate_answers(batch).log_weight]


def decode_together(batch, cache, sizes, combine, weights=None, **options):
    """Decode several rows a question in parallel; their logits together choose each token.

    combine, weights: see decoding.argmax_grouped. options: see Batch.decode_rows.
    """
    choose = decoding.argmax_grouped(sizes, combine, weights)
    return batch.decode(cache, sizes, choose=choose, **options)


def decode_ensemble(batch, combine, weights=None):
    """Decode all templates in parallel, see decode_together."""
    return decode_together(batch, separate_cache(batch), batch.counts, combine, weights)


def count_votes(batch, weights):
    """The answer that most templates give when they are asked alone; of equals the first one.

    weights: for each question (n,), how much the vote of each template counts. Answers are equal
    if what is scored of them is. The confidence is the share of the votes.
    """
    winners, shares = [], []
    for fact, texts, own_weights in zip(batch.facts, separate_answers(batch).texts, weights):
        votes, first_text = {}, {}
        for text, weight in zip(texts, own_weights.tolist()):
            answer = prompts.scored_words(fact, text)
            votes[answer] = votes.get(answer, 0) + weight
            first_text.setdefault(answer, text)
        winner = max(votes, key=votes.get)
        winners.append(first_text[winner])
        shares.append(votes[winner] / sum(votes.values()))
    return Answers(winners, torch.tensor(shares, dtype=torch.float64))


def decode_scheme(batch, scheme):
    """Put all templates into one cache per question under an attention scheme and decode."""
    positions = batch.run.config.template_positions
    bias = [batch.score_bias(n) for n in batch.counts]
    if scheme == "isolated" and positions == "restart":
        # The templates are encoded as if they were alone.
        return batch.decode(fused_cache(batch, bias=bias))
    rows, members, next_pos = [], [], []
    for question in batch.questions:
        first = len(rows)
        new_rows, answer_position = fusion.layout(question, batch.prefix_length, scheme, positions)
        rows += new_rows
        members.append(range(first, len(rows)))
        next_pos.append(answer_position)
    encoded = batch.encode(rows, [len(cache_rows) for cache_rows in members])
    return batch.decode(fusion.build_cache(batch.prefix_kv, encoded, members, next_pos, bias))


def decode_fused_layers(batch, part, combine):
    """Decode all templates in parallel; they share hidden states of each new token.

    From the layer ensemble_layer on. part, combine: see decoding.fused_layers.
    """
    model, first_layer = batch.run.model, batch.run.config.ensemble_layer
    if first_layer < 0:
        first_layer = model.config.n_layers * 3 // 4
    cache = separate_cache(batch)  # the templates themselves are encoded without sharing

    def forward(live, *inputs):
        live = live.tolist()
        # All rows of a question end at the same token, so its first row is enough.
        sizes = [len(own) for own in batch.template_rows if own[0] in live]
        with decoding.fused_layers(model, first_layer, sizes, part, combine):
            return model(*inputs)

    return decode_together(batch, cache, batch.counts, decoding.mean_logits, forward=forward)


# ---- templates alone -----------------------------------------------------------------------------


def origin(batch):
    """The first template alone."""
    encoded = batch.encode_separately(1 / np.array(batch.counts))
    first_rows = [own[:1] for own in batch.template_rows]
    return batch.decode(cache_after_prefix(batch, encoded, first_rows))


def per_prompt(batch):
    """Each template alone: as many answers to a question as it has templates."""
    return separate_answers(batch)


def vote(batch):
    """The most frequent answer of the templates, each asked alone."""
    return count_votes(batch, [torch.ones(n) for n in batch.counts])


def weighted_vote(batch):
    """The answer with the highest sum of weights."""
    return count_votes(batch, relative_weights(batch))


# ---- logits --------------------------------------------------------------------------------------


def average(batch):
    return decode_ensemble(batch, decoding.mean_logits)


def mixture(batch):
    return decode_ensemble(batch, decoding.mean_probability)


def maximum(batch):
    return decode_ensemble(batch, decoding.max_probability)


def weighted_average(batch):
    return decode_ensemble(batch, decoding.weighted_mean_logits, relative_weights(batch))


def weighted_maximum(batch):
    return decode_ensemble(batch, decoding.highest_weight_logits, relative_weights(batch))


def contrast(batch):
    """Divide the probability of the answer by that after the template without its subject."""
    priors = []
    for question in batch.questions:
        priors += question.priors
    encoded_priors = batch.encode(batch.rows(priors), batch.counts)
    encoded = fusion.join(batch.encode_separately(), encoded_priors)
    members = []
    for own in batch.template_rows:
        members += [[r] for r in own]
        members += [[len(priors) + r] for r in own]
    cache = cache_after_prefix(batch, encoded, members)

    def combine(logits, weight):
        return decoding.contrast_with_prior(logits, batch.run.config.prior_weight)

    return decode_together(batch, cache, [2 * n for n in batch.counts], combine)


# ---- hidden states -------------------------------------------------------------------------------


def layer_output_avg(batch):
    """The mean of what each layer puts out."""
    return decode_fused_layers(batch, "layer_output", lambda x: x.mean(0))


def ffn_activation_avg(batch):
    """The mean of the activations within each MLP."""
    return decode_fused_layers(batch, "ffn_activation", lambda x: x.mean(0))


def ffn_activation_max(batch):
    """The maximum of the activations within each MLP."""
    return decode_fused_layers(batch, "ffn_activation", lambda x: x.amax(0))


# ---- attention -----------------------------------------------------------------------------------


def flex(batch):
    """All templates in one cache, each attending only to itself. flex_myriadlama is the same."""
    return batch.meter.shared("flex", lambda: decode_scheme(batch, "isolated"))


def flex_adaptive(batch):
    """The half of the templates with the highest weight, in one cache."""
    chosen, bias = [], []
    for own, log_weight in zip(batch.template_rows, separate_answers(batch).log_weight):
        m = (len(own) + 1) // 2
        best = log_weight.topk(m).indices.sort().values
        chosen.append([own[j] for j in best.tolist()])
        bias.append(batch.score_bias(m))
    return batch.decode(fused_cache(batch, chosen, bias))


def flex_weighted(batch):
    """All templates in one cache; attention to a template is multiplied by its weight.

    The factors of a question have mean 1.
    """
    bias = []
    for n, log_weight in zip(batch.counts, separate_answers(batch).log_weight):
        log_mean = log_weight.logsumexp(0) - math.log(n)
        bias.append((log_weight - log_mean).numpy(force=True) + batch.score_bias(n))
    return batch.decode(fused_cache(batch, bias=bias))


def ape(batch):
    """All templates in one cache, under the attention of Adaptive Parallel Encoding."""
    config = batch.run.config
    weigh = functools.partial(
        decoding.ape_weights, temperature=config.ape_temperature, scale=config.ape_scale
    )
    return batch.decode(fused_cache(batch), weigh=weigh)


def hybrid(batch):
    """Average the fused prompt's log probabilities with the mean of the single prompts'."""
    members, bias = [], []
    for own in batch.template_rows:
        members += [[r] for r in own]
        members.append(own)
        bias += [0.0] * len(own) + [batch.score_bias(len(own))]

    def combine(logits, weight):
        log_probs = logits.log_softmax(-1)  # (n + 1, V)
        return (log_probs[:-1].mean(0) + log_probs[-1]) / 2

    cache = cache_after_prefix(batch, batch.encode_separately(), members, bias)
    return decode_together(batch, cache, [n + 1 for n in batch.counts], combine)


def flex_full(batch):
    """All templates in one cache, each attending to all before it."""
    return decode_scheme(batch, "full")


def flex_myriadlama_xattn(batch):
    """As flex, but manual templates attend to manual ones before them."""
    return decode_scheme(batch, "manual_cross")


# ---- the table -----------------------------------------------------------------------------------


class Method(NamedTuple):
    generate: object  # batch -> Answers
    templates: str  # how many it uses for an answer: one, half, all
    fused_by: str
    settings: tuple = ()  # those that it uses and some other method does not


ATTENTION = ("score_bias",)
# They may put the templates one after another.
ONE_PROMPT = ("score_bias", "template_positions")
LAYERS = ("ensemble_layer",)
METHODS = {
    "origin": Method(origin, "one", "nothing"),
    "per_prompt": Method(per_prompt, "one", "nothing"),
    "vote": Method(vote, "all", "answers"),
    "weighted_vote": Method(weighted_vote, "all", "answers, weighted"),
    "avg": Method(average, "all", "logits: product of experts"),
    "mixture": Method(mixture, "all", "probabilities: mean"),
    "max": Method(maximum, "all", "probabilities: maximum"),
    "weighted_avg": Method(weighted_average, "all", "logits, weighted"),
    "weighted_max": Method(weighted_maximum, "all", "logits of the highest weight"),
    "contrast": Method(contrast, "all", "logits, less those without subject", ("prior_weight",)),
    "layer_output_avg": Method(layer_output_avg, "all", "layer outputs: mean", LAYERS),
    "ffn_activation_avg": Method(ffn_activation_avg, "all", "MLP activations: mean", LAYERS),
    "ffn_activation_max": Method(ffn_activation_max, "all", "MLP activations: maximum", LAYERS),
    "flex": Method(flex, "all", "attention", ONE_PROMPT),
    "flex_adaptive": Method(flex_adaptive, "half", "attention, half of them", ATTENTION),
    "flex_weighted": Method(flex_weighted, "all", "attention, weighted", ATTENTION),
    "ape": Method(ape, "all", "attention, rescaled", ("ape_temperature", "ape_scale")),
    "hybrid": Method(hybrid, "all", "attention and logits", ATTENTION),
    "flex_full": Method(flex_full, "all", "attention, all see all before", ONE_PROMPT),
    "flex_myriadlama": Method(
        flex, "all", "attention", (*ONE_PROMPT, "allow_manual_cross_attention")
    ),
    "flex_myriadlama_xattn": Method(
        flex_myriadlama_xattn, "all", "attention, manual see manual", ONE_PROMPT
    ),
}


def settings_of_others(methods):
    """Settings that some methods have and none of these has, in the order of the table."""
    names = {}
    for other in METHODS.values():
        names.update(dict.fromkeys(other.settings))
    for method in methods:
        for name in METHODS[method].settings:
            names.pop(name, None)
    return list(names)
