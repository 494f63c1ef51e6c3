"""Ablate slots of memory layers, and whole parts of blocks: measurements for ablate.py.

Letters: B examples, M ablated copies of examples, P pairs (example, slot), T tokens, n labels of an
example, N measurements, H heads, k slots that a head reads.
"""

from functools import partial

import numpy as np
import torch

from analysis.hooks import (
    ABLATIONS,
    SlotAblation,
    forward_from,
    gather_labels,
    hook_output,
    hook_points,
    index_reads,
    logit_diff,
    run_with_cache,
)
from analysis.trained_run import concat


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
        columns[name] = values.flatten().cpu().numpy()
    return columns


def measure(examples, clean, logits, about):
    """Effects of an ablation -> columns of `to_columns`: drop in logit difference, p, correct.

    clean: what `logit_diff` returned without the ablation; logits (B, n, vocabulary) with it.
    """
    diff, p, correct = logit_diff(logits, examples.answers)
    return to_columns(examples, about, {"drop": clean[0] - diff, "p": p, "correct": correct})


# ---- slots ---------------------------------------------------------------------------------------


@torch.no_grad()
def measure_slots(model, examples, ablations, batch_size=512, seed=0):
    """Ablate each slot that an example reads, and as a control one that it does not, by layer.

    -> {column: (N,)}: those of `to_columns`, layer, slot, ablation, control, reads and weight of
    the slot in the example, drop in logit difference, p_clean and p (probability of the answer
    before and after), flip (correct before, wrong after).
    """
    clean = run_with_cache(model, examples)
    diff_clean, p_clean, was_correct = logit_diff(clean.logits, examples.answers)  # (B, n)
    to_tensor = partial(torch.as_tensor, device=examples.tokens.device)
    rng = np.random.default_rng(seed)
    tables = []
    for layer, memory in model.memory_layers().items():
        resid, reads, label_pos = memory_inputs(model, layer, clean, examples.label_pos)
        best = ()
        if "next_best" in ablations:
            # One more than is read, because one of them may be the ablated slot.
            x = model.layers[layer].ffn_norm(resid)
            best = memory.topk_slots(x, model.config.mem_knn + 1)
        n_slots = len(memory.values)
        # Controls check the method: without a slot that is not read, nothing may change.
        pairs = add_controls(slots_read(reads, n_slots), n_slots, rng)
        index, slot = to_tensor(pairs["index"]), to_tensor(pairs["slot"])
        # Drawn here, so results depend neither on the batch size nor on the other ablations.
        random_slot = to_tensor(rng.integers(n_slots, size=len(slot)))
        resampled_slot = to_tensor(rng.permutation(pairs["slot"]))
        for ablation in ablations:
            for first in range(0, len(index), batch_size):
                some = slice(first, first + batch_size)
                i = index[some]  # the example of each of the M copies
                changed = ABLATIONS[ablation](
                    SlotAblation(
                        memory,
                        reads=index_reads(reads, i),
                        slot=slot[some],
                        best=tuple(x[i] for x in best),
                        random_slot=random_slot[some],
                        resampled_slot=resampled_slot[some],
                    )
                )
                logits = forward_from(model, layer, resid[i], changed, label_pos[i])
                diff, p, correct = logit_diff(logits, examples.answers[i])  # (M, n)
                about = {name: pairs[name][some] for name in ("slot", "reads", "weight")}
                about |= {"layer": layer, "ablation": ablation, "control": about["reads"] == 0}
                measured = {
                    "drop": diff_clean[i] - diff,
                    "p_clean": p_clean[i],
                    "p": p,
                    "flip": was_correct[i] & ~correct,
                }
                tables.append(to_columns(examples.select(pairs["index"][some]), about, measured))
    return concat(tables)


def memory_inputs(model, layer, clean, label_pos):
    """What a forward pass from a memory layer on needs -> residual stream, reads, label_pos.

    In the last block these are of the labels alone: no answer depends on other positions there.
    """
    resid = clean.resid_mid[layer]
    reads = {name: clean.reads[layer][name] for name in ("slots", "weights")}
    if layer < len(model.layers) - 1:
        return resid, reads, label_pos
    resid = gather_labels(resid, label_pos)
    reads = {name: gather_labels(x, label_pos) for name, x in reads.items()}
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
