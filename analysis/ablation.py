"""Ablate slots of memory layers, and whole parts of blocks: measurements for ablate.py.

Letters: B examples, M ablated copies of examples, P pairs (example, slot), T tokens, n labels of an
example, N measurements, H heads, k slots that a head reads, n sub-keys, Q width of a query, V width
of a value.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from analysis.hooks import (
    forward_from,
    hook_output,
    hook_points,
    index_reads,
    logit_diff,
    run_with_cache,
    select_positions,
)
from analysis.trained_run import concat, select
from memory import SCORES, weighted_values
from nanorecall.distributed import SINGLE_PROCESS


def to_columns(examples, about, measured):
    """One entry for each label of each example -> {column: (B * n,)}

    about: {column: value, or values (B,)}; measured: {column: tensor (B, n)}. Further columns:
    example (its index in the split), its slices, answer_pos, answer.
    """
    B, n = examples.answers.shape
    columns = {"answer_pos": np.tile(np.arange(n), B)}
    for name, values in {"example": examples.indices, **examples.slices, **about}.items():
        columns[name] = np.repeat(np.broadcast_to(values, B), n)
    for name, values in {"answer": examples.answers, **measured}.items():
        # A copy in numpy's memory: small tensors that stay would keep torch's from being reused.
        columns[name] = values.flatten().cpu().numpy().copy()
    return columns


def measure(examples, clean, logits, about):
    """Effects of an ablation -> columns of `to_columns`: drop in logit difference, p, correct.

    clean: what `logit_diff` returned without the ablation; logits (B, n, vocabulary) with it.
    """
    diff, p, correct = logit_diff(logits, examples.answers)
    return to_columns(examples, about, {"drop": clean[0] - diff, "p": p, "correct": correct})


# ---- ways to ablate a slot -----------------------------------------------------------------------


@dataclass
class SlotAblation:
    """One slot to ablate in each of M copies of examples, and what may replace it."""

    memory: object  # the memory layer
    reads: dict  # slots and weights (M, T, H, k) of each copy
    slot: torch.Tensor  # (M,) to ablate
    best: tuple  # scores and slots (M, T, H, k + 1) of each head's best; for SELECTING_ABLATIONS
    random_slot: torch.Tensor  # (M,) of the whole table
    resampled_slot: torch.Tensor  # (M,) read by another example
    queries: torch.Tensor = None  # (M, T, H, 2, Q/2); only for key_noise
    noise: torch.Tensor = None  # (H, 2, n, Q/2) in place of the sub-keys; only for key_noise

    def matches(self, slots):
        """Is it the slot to ablate? slots (M, T, H, k) -> bool"""
        return slots == self.slot[:, None, None, None]

    def replaced_by(self, slot):
        """The reads, with slot (M,) in place of the ablated one."""
        slots, weights = self.reads["slots"], self.reads["weights"]
        replaced = torch.where(self.matches(slots), slot[:, None, None, None], slots)
        return {"slots": replaced, "weights": weights}

    def rescored(self, score):
        """The layer's reads if the slot's score is score (M, T, H), and all others stay."""
        scores, slots = self.best
        scores = scores.masked_fill(self.matches(slots), -torch.inf)
        slot = self.slot[:, None, None, None].expand(score.unsqueeze(-1).shape)
        # The k best of all slots are among the k best others and this one.
        scores = torch.cat([scores, score.unsqueeze(-1)], dim=-1)
        slots = torch.cat([slots, slot], dim=-1)
        ranking = scores + selection_bias(self.memory, slots)
        chosen = ranking.topk(self.reads["slots"].shape[-1], dim=-1).indices
        weights = SCORES[self.memory.config.mem_score](scores.gather(-1, chosen))
        return {"slots": slots.gather(-1, chosen), "weights": weights}


def selection_bias(memory, slots):
    """The bias of slots (M, T, H, k) in the choice of slots -> the same shape; 0 without a bias."""
    if memory.bias is None:
        return 0
    n = memory.config.mem_n_keys
    head = torch.arange(slots.shape[2], device=slots.device)[:, None]
    return memory.bias[head, 0, slots // n] + memory.bias[head, 1, slots % n]


def zero_ablation(a):
    """Zero ablation: the slot's weight is 0, and the others keep theirs."""
    slots, weights = a.reads["slots"], a.reads["weights"]
    return {"slots": slots, "weights": weights.masked_fill(a.matches(slots), 0)}


def next_best_ablation(a):
    """Leave the slot out of the top k: the next best comes in, and weights are renormalised."""
    scores, slots = a.best
    k = a.reads["slots"].shape[-1]
    # Stable: the others stay in the order of their choice, which is not that of their scores if
    # the layer has a selection bias.
    kept = a.matches(slots).int().argsort(dim=-1, stable=True)[..., :k]
    weights = SCORES[a.memory.config.mem_score](scores.gather(-1, kept))
    return {"slots": slots.gather(-1, kept), "weights": weights}


def random_ablation(a):
    """A random slot's value under the slot's weight."""
    return a.replaced_by(a.random_slot)


def resample_ablation(a):
    """Resample ablation: the value of a slot of another example, under the slot's weight."""
    return a.replaced_by(a.resampled_slot)


def mean_ablation(a):
    """Mean ablation: the mean of all values under the slot's weight."""
    return read_vector(a.memory, a.reads, a.matches(a.reads["slots"]), a.memory.values.mean(0))


def read_vector(memory, reads, is_replaced, vector):
    """The reads, with vector (V,) in place of some values, under their weights.

    is_replaced: bool, in the shape of the weights (M, T, H, k).
    """
    slots, weights = reads["slots"], reads["weights"]
    kept = weights.masked_fill(is_replaced, 0)
    weight_of_vector = (weights * is_replaced).sum((-1, -2))  # (M, T)
    output = weighted_values(  # (M * T, V)
        memory.values, slots.flatten(0, 1).flatten(1), kept.flatten(0, 1).flatten(1)
    )
    output = output.unflatten(0, weight_of_vector.shape)
    output = output + weight_of_vector.unsqueeze(-1) * vector
    return {"slots": slots, "weights": kept, "output": output}


# A slot's key is a sub-key of each half, which it shares with other slots. Only the slot's own
# score is changed here, as if it had a key of its own.


def key_zero_ablation(a):
    """A key of zeros: the slot's score is 0."""
    scores, _ = a.best
    return a.rescored(torch.zeros_like(scores[..., 0]))


def key_noise_ablation(a):
    """A random key of the same length, half by half, in each head."""
    n = a.memory.config.mem_n_keys
    first = a.noise[:, 0, a.slot // n]  # (H, M, Q/2)
    second = a.noise[:, 1, a.slot % n]
    score = torch.einsum("mthq,hmq->mth", a.queries[..., 0, :], first)
    return a.rescored(score + torch.einsum("mthq,hmq->mth", a.queries[..., 1, :], second))


def noise_keys(memory, seed):
    """Random directions with the lengths of the sub-keys: (H, 2, n, Q/2)."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(memory.keys.shape, generator=generator).to(memory.keys)
    return noise * memory.keys.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)


ABLATIONS = {  # SlotAblation -> reads
    "zero": zero_ablation,
    "next_best": next_best_ablation,
    "mean": mean_ablation,
    "random": random_ablation,
    "resample": resample_ablation,
    "key_zero": key_zero_ablation,
    "key_noise": key_noise_ablation,
}
KEY_ABLATIONS = ("key_zero", "key_noise")
SELECTING_ABLATIONS = ("next_best", *KEY_ABLATIONS)  # after these, the layer chooses slots again


# ---- slots ---------------------------------------------------------------------------------------


@torch.no_grad()
def measure_slots(model, examples, ablations, batch_size=512, seed=0, world=SINGLE_PROCESS):
    """Ablate each slot that an example reads, and as a control one that it does not, by layer.

    -> {column: (N,)}: those of `to_columns`, layer, slot, ablation, control, reads and weight of
    the slot in the example, reads_at_label (at the label's own position) and reads_in_reach (where
    the label can depend on them), drop in logit difference, p_clean and p (probability of the
    answer before and after), flip (correct before, wrong after).
    """
    clean = run_with_cache(model, examples)
    before = logit_diff(clean.logits, examples.answers)  # (B, n) each
    rng = np.random.default_rng(seed)
    tables = []
    for layer, memory in model.memory_layers().items():
        resid, reads, label_pos = memory_inputs(model, layer, clean, examples.label_pos)
        best, queries = (), None
        if set(ablations) & set(SELECTING_ABLATIONS):
            x = model.layers[layer].ffn_norm(resid)
            # One more than is read, because one of them may be the ablated slot.
            best = memory.topk_slots(x, model.config.mem_knn + 1)
            queries = memory.half_queries(x)
        n_slots = len(memory.values)
        # Controls check the method: without a slot that is not read, nothing may change.
        pairs = add_controls(slots_read(reads, n_slots), n_slots, rng)
        # Drawn here, so results depend neither on the batch size nor on the other ablations.
        pairs["random_slot"] = rng.integers(n_slots, size=len(pairs["slot"]))
        pairs["resampled_slot"] = rng.permutation(pairs["slot"])
        inputs = (resid, reads, label_pos, best, queries, noise_keys(memory, seed))
        for ablation in ablations:
            batches = []
            for first in range(0, len(pairs["slot"]), batch_size):
                batches.append(select(pairs, slice(first, first + batch_size)))
            measure_batch = partial(
                measure_ablation, model, layer, ablation, examples, before, inputs
            )
            tables += world.shared_map(measure_batch, batches)
    return concat(tables)


def measure_ablation(model, layer, ablation, examples, before, inputs, pairs):
    """Ablate the slot of each of M pairs in a copy of its example -> columns of `measure_slots`.

    before: what `logit_diff` returned without the ablation; inputs: those of `memory_inputs`, the
    best slots, queries and noise keys.
    """
    resid, reads, label_pos, best, queries, noise = inputs
    pairs_on_device = {}
    for name in ("index", "slot", "random_slot", "resampled_slot"):
        pairs_on_device[name] = torch.as_tensor(pairs[name], device=resid.device)
    i = pairs_on_device.pop("index")
    change = SlotAblation(
        model.memory_layers()[layer],
        reads=index_reads(reads, i),
        best=tuple(x[i] for x in best),
        queries=None if queries is None else queries[i],
        noise=noise,
        **pairs_on_device,
    )
    changed = ABLATIONS[ablation](change)
    logits = forward_from(model, layer, resid[i], changed, label_pos[i])
    diff, p, correct = logit_diff(logits, examples.answers[i])  # (M, n)
    diff_clean, p_clean, was_correct = before
    about = {name: pairs[name] for name in ("slot", "reads", "weight")}
    about |= {"layer": layer, "ablation": ablation, "control": pairs["reads"] == 0}
    is_read = change.matches(change.reads["slots"])
    is_last = layer == len(model.layers) - 1
    at_label, in_reach = reads_of_labels(is_read, label_pos[i], is_last)
    measured = {
        "reads_at_label": at_label,
        "reads_in_reach": in_reach,
        "drop": diff_clean[i] - diff,
        "p_clean": p_clean[i],
        "p": p,
        "flip": was_correct[i] & ~correct,
    }
    return to_columns(examples.select(pairs["index"]), about, measured)


def reads_of_labels(is_read, label_pos, is_last):
    """Reads of a slot at each label, and reads that the label can depend on: counts (M, n) each.

    is_read (M, T, H, k) bool: is it this slot? label_pos (M, n). Attention of later blocks carries
    a read on to later positions. After the last block there is none: there, a label depends on the
    reads at its own position alone.
    """
    reads = is_read.sum((-1, -2))  # (M, T)
    at_label = reads.gather(1, label_pos)
    if is_last:
        return at_label, at_label
    return at_label, reads.cumsum(1).gather(1, label_pos)


def memory_inputs(model, layer, clean, label_pos):
    """The inputs of `forward_from` a memory layer -> residual stream, reads, label_pos.

    In the last block these are of the labels alone: no answer depends on other positions there.
    """
    resid = clean.resid_mid[layer]
    reads = {name: clean.reads[layer][name] for name in ("slots", "weights")}
    if layer < len(model.layers) - 1:
        return resid, reads, label_pos
    resid = select_positions(resid, label_pos)
    reads = {name: select_positions(x, label_pos) for name, x in reads.items()}
    return resid, reads, torch.arange(label_pos.shape[1], device=resid.device).expand_as(label_pos)


def slots_read(reads, n_slots):
    """The slots that each example reads: slots and weights (B, T, H, k) -> {column: (P,)}

    index of the example, slot, reads (how often it is read), weight (sum of the weights).
    """
    slots, weights = reads["slots"].flatten(1), reads["weights"].flatten(1)
    # One number for each (example, slot).
    key = slots.cpu().numpy() + n_slots * np.arange(len(slots))[:, None]
    key, pair, counts = np.unique(key, return_inverse=True, return_counts=True)
    weight = np.bincount(pair.ravel(), weights.cpu().numpy().ravel())
    return {"index": key // n_slots, "slot": key % n_slots, "reads": counts, "weight": weight}


def add_controls(pairs, n_slots, rng):
    """Add for each example a random slot that it does not read, with 0 reads, if there is one."""
    index, slot = [], []
    for i in np.unique(pairs["index"]):
        unread = np.setdiff1d(np.arange(n_slots), pairs["slot"][pairs["index"] == i])
        if len(unread):
            index.append(i)
            slot.append(rng.choice(unread))
    controls = np.zeros((4, len(index)), int)
    controls[0] = index
    controls[1] = slot
    names = ("index", "slot", "reads", "weight")
    return {name: np.append(pairs[name], x) for name, x in zip(names, controls)}


# ---- parts of blocks -----------------------------------------------------------------------------


def part_ablations(model, seed=0):
    """{(layer, part): arguments (hooks, intervene) of `run_with_hooks` that ablate it}

    The output of a mixer, an MLP or a memory layer becomes 0. "memory, values" permutes the values
    among the slots, so a layer reads the slots that it read before, with other values. "memory,
    keys" lets it read random slots.
    """
    ablations = {}
    for name, modules in hook_points(model).items():
        if name == "resid_pre":
            continue
        part = "memory, full" if name == "memory" else name
        for layer, module in modules.items():
            ablations[layer, part] = ([hook_output(name, module, torch.zeros_like)], None)
    memory_layers = model.memory_layers() if hasattr(model, "memory_layers") else {}
    generator = torch.Generator().manual_seed(seed)
    for layer, memory in memory_layers.items():
        n_slots = len(memory.values)
        order = torch.randperm(n_slots, generator=generator)
        ablations[layer, "memory, values"] = ([], {layer: partial(permute_slots, order)})
        ablations[layer, "memory, keys"] = ([], {layer: partial(draw_slots, n_slots, generator)})
    return dict(sorted(ablations.items()))


def permute_slots(order, reads):
    """Reads with slot order[i] in place of slot i."""
    slots = reads["slots"]
    return {"slots": order.to(slots.device)[slots], "weights": reads["weights"]}


def draw_slots(n_slots, generator, reads):
    """Reads with random slots."""
    slots = torch.randint(n_slots, reads["slots"].shape, generator=generator)
    return {"slots": slots.to(reads["slots"].device), "weights": reads["weights"]}
