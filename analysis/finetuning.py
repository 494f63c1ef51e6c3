"""Fine-tune a model on new facts: all its weights, its memory values, LoRA, or a few slots.

Each editor here is a function f(model, tokens, targets, kept_tokens, kept_targets), as in
editors.py. It trains until the model answers all new facts, and for STEPS steps at most.

Letters: B facts, N labels, H heads, k slots that a head reads, t slots that are trained, V width of
a value.
"""

import itertools
import math
from collections import namedtuple

import torch
from torch import nn
from torch.func import functional_call

from analysis.editing import last_layer_reads
from nanorecall.metrics import correct_predictions, evaluating, in_eval_mode
from nanorecall.rng import IGNORE_INDEX
from nanorecall.sparse import SparseAdamW

STEPS = 200
# Slots that are trained for each new fact. With 32, a tenth of 30 facts was not learned.
TOP_SLOTS = 64


def fine_tune(model, parameters, optimizer, facts, forward=None):
    """Train parameters until all facts are answered. facts: [(tokens, targets)], of equal weight.

    forward(tokens, targets) -> logits, loss is the model's own, unless parameters stand outside.
    """
    forward = forward or model
    try:
        with evaluating(model):
            for _ in range(STEPS):
                loss, is_learned = 0, True
                for tokens, targets in facts:
                    logits, loss_of_part = forward(tokens, targets)
                    loss = loss + loss_of_part
                    is_learned &= bool(correct_predictions(logits, targets)[0].all())
                if is_learned:
                    break
                # Not loss.backward(), which would compute gradients of all other weights, too.
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
                for parameter, gradient in zip(parameters, gradients):
                    parameter.grad = gradient
                optimizer.step()
    finally:
        # Or the next training step would add its own gradients to these.
        for parameter in parameters:
            parameter.grad = None


def adam(parameters, lr):
    return SparseAdamW(parameters, lr=lr, weight_decay=0)


def adam_of_values(values):
    return adam(values, 1e-2)


def sgd_of_values(values):
    # A value's gradient is small: it is read at one label of many, with a weight of 1/8 or less.
    return torch.optim.SGD(values, lr=30)


# ---- all values, all weights ---------------------------------------------------------------------


def fine_tune_values(model, tokens, targets, kept, kept_targets):
    values = [q for name, q in model.named_parameters() if "memory.values" in name]
    fine_tune(model, values, adam_of_values(values), [(tokens, targets)])


def fine_tune_all(model, tokens, targets, kept, kept_targets):
    parameters = list(model.parameters())
    fine_tune(model, parameters, adam(parameters, 1e-3), [(tokens, targets)])


def fine_tune_all_replaying(model, tokens, targets, kept, kept_targets):
    parameters = list(model.parameters())
    facts = [(tokens, targets), (kept, kept_targets)]
    fine_tune(model, parameters, adam(parameters, 1e-3), facts)


def fine_tune_all_replaying_some(model, tokens, targets, kept, kept_targets):
    n = math.ceil(len(kept) / 10)
    fine_tune_all_replaying(model, tokens, targets, kept[:n], kept_targets[:n])


# ---- LoRA ----------------------------------------------------------------------------------------


def fine_tune_lora(model, tokens, targets, kept, kept_targets, rank=4):
    """W + B A in place of each matrix W of attention and MLPs (Hu et al. 2021, arXiv 2106.09685).

    B (outputs, rank) starts at 0, A (rank, inputs) at random. Both are trained, and merged into W.
    """
    generator = torch.Generator().manual_seed(0)  # the global one stays as it was
    weights, factors = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (".att." in name or ".ffn." in name):
            W = module.weight.detach()
            A = torch.randn(rank, W.shape[1], generator=generator) * W.shape[1] ** -0.5
            B = torch.zeros(W.shape[0], rank)
            weights[f"{name}.weight"] = W
            factors[f"{name}.weight"] = [x.to(W).requires_grad_() for x in (B, A)]

    def merged():
        return {name: W + factors[name][0] @ factors[name][1] for name, W in weights.items()}

    def forward(tokens, targets):
        return functional_call(model, merged(), (tokens, targets))

    parameters = list(itertools.chain.from_iterable(factors.values()))
    fine_tune(model, parameters, adam(parameters, 3e-3), [(tokens, targets)], forward)
    with torch.no_grad():
        for name, W in merged().items():
            weights[name].copy_(W)


# ---- sparse memory fine-tuning -------------------------------------------------------------------

# Reads of several facts at their labels. counts (slots,): of each slot of the last block; facts
# (slots,): number of facts that read it; n_facts: number of facts.
Reads = namedtuple("Reads", "counts facts n_facts")


@in_eval_mode
def reads_of_facts(model, tokens, targets):
    """How often each fact reads each slot of the last block at its labels: (B, slots)"""
    slots, *_ = last_layer_reads(model, tokens, targets)  # (N, H * k)
    fact = (targets != IGNORE_INDEX).nonzero()[:, :1]  # (N, 1)
    n_slots = len(model.layers[-1].memory.values)
    flat = (fact * n_slots + slots).flatten()
    return torch.bincount(flat, minlength=len(tokens) * n_slots).view(len(tokens), n_slots)


def total_reads(model, tokens, targets, batch_size=100):
    """Reads of all these facts together. In batches, since a large table has many slots."""
    counts, facts = 0, 0
    for x, y in zip(tokens.split(batch_size), targets.split(batch_size)):
        reads = reads_of_facts(model, x, y)
        counts = counts + reads.sum(0)
        facts = facts + (reads > 0).sum(0)
    return Reads(counts, facts, len(tokens))


# Scores (B, slots) of each slot for each new fact. reads (B, slots): how often a new fact reads a
# slot. kept: Reads of the facts that should not change.


def tf(reads, kept):
    """The fraction of a fact's reads that fall on a slot."""
    return reads / reads.sum(1, keepdim=True)


def tf_idf(reads, kept):
    """The same, times log((facts + 1) / (facts that read the slot + 1)): Lin et al. 2025."""
    return tf(reads, kept) * torch.log((kept.n_facts + 1) / (kept.facts + 1))


def kl(reads, kept):
    """Each slot's part of the divergence of a fact's reads from those of kept facts, in nats."""
    p = tf(reads, kept)
    q = (kept.counts + 1) / (kept.counts + 1).sum()  # + 1: no slot has probability 0
    return torch.xlogy(p, p / q)


def random(reads, kept):
    """A control: any slots that the fact reads."""
    generator = torch.Generator().manual_seed(0)  # the global one stays as it was
    return torch.rand(reads.shape, generator=generator).to(reads.device)


def choose_slots(score, reads, kept, top_slots):
    """The top_slots slots of each fact by score, of all facts together: (t,), in order.

    A fact has no gradient at slots that it does not read, so it may have fewer.
    """
    scores = score(reads, kept).masked_fill(reads == 0, -torch.inf)  # (B, slots)
    best, slots = scores.topk(min(top_slots, scores.shape[1]))
    return slots[best > -torch.inf].unique()


def parameter_name(model, parameter):
    """Its name in the model: the first, if it has several."""
    return next(name for name, p in model.named_parameters() if p is parameter)


def fine_tune_slots(model, score, optimizer, top_slots, tokens, targets, kept, kept_targets):
    """Train the values of top_slots slots for each new fact, and nothing else.

    This is sparse memory fine-tuning (Lin et al. 2025, arXiv 2510.15103). The last block's queries
    stay as they are, so its slots are chosen once.
    """
    reads = reads_of_facts(model, tokens, targets)
    slots = choose_slots(score, reads, total_reads(model, kept, kept_targets), top_slots)
    values = model.layers[-1].memory.values
    name = parameter_name(model, values)
    rows = values.detach()[slots].requires_grad_()  # (t, V)

    def forward(tokens, targets):
        changed = values.detach().index_copy(0, slots, rows)
        return functional_call(model, {name: changed}, (tokens, targets))

    fine_tune(model, [rows], optimizer([rows]), [(tokens, targets)], forward)
    with torch.no_grad():
        values[slots] = rows


def sparse_tf_idf(model, *facts, top_slots=TOP_SLOTS):
    fine_tune_slots(model, tf_idf, adam_of_values, top_slots, *facts)


def sparse_tf_idf_sgd(model, *facts, top_slots=TOP_SLOTS):
    fine_tune_slots(model, tf_idf, sgd_of_values, top_slots, *facts)


def sparse_kl(model, *facts, top_slots=TOP_SLOTS):
    fine_tune_slots(model, kl, adam_of_values, top_slots, *facts)


def sparse_tf(model, *facts, top_slots=TOP_SLOTS):
    fine_tune_slots(model, tf, adam_of_values, top_slots, *facts)


def sparse_random(model, *facts, top_slots=TOP_SLOTS):
    fine_tune_slots(model, random, adam_of_values, top_slots, *facts)


SPARSE = {  # these take top_slots
    "sparse tf-idf": sparse_tf_idf,
    "sparse tf-idf, SGD": sparse_tf_idf_sgd,
    "sparse KL": sparse_kl,
    "sparse tf": sparse_tf,
    "sparse random": sparse_random,
}
