"""Edit facts that a memory layer stores, in closed form.

edit_facts solves for the memory output that yields the new answers, then for the value vectors
that produce it (as MEMIT does in MLPs: Meng et al. 2023, arXiv 2210.07229). editors.py has it in a
table beside other ways to change facts, edit_comparison.py measures them.

Letters: B facts, T tokens, N labels, H heads, k slots that a head reads, S slots read at any label,
D model width, V width of a value.
"""

import torch

from nanorecall.metrics import in_eval_mode
from nanorecall.ops import labelled_positions


@in_eval_mode
def edit_facts(model, tokens, targets, keep=(), margin=2.0, ridge=1e-4):
    """Change values of the last block so that the model answers `targets` -> record for undo_edit.

    tokens, targets (B, T): labels as in training; each prompt is read with its new answer. There
    are two closed forms and no gradients. First, for each label, the smallest change of the memory
    output that puts the answer's logit `margin` above all others. Then the smallest change of
    values that produces it: least squares with a ridge. With keep, batches [(tokens, targets)] of
    facts, it is the change that disturbs those least (MEMIT, eq. 14).
    ValueError if the model is not editable.
    """
    check_editable(model)
    memory = model.layers[-1].memory
    slots, weights, hidden, logits, answers = last_layer_reads(model, tokens, targets)
    # Logits are head @ hidden, times a scale per position that the final norm sets.
    head = model.lm_head.weight * model.final_norm.weight  # (tokens, D)
    readout = head if memory.out is None else head @ memory.out.weight  # (tokens, V)
    updates = target_updates(readout, hidden, logits, answers, margin)  # (N, V)
    read_slots, columns = slots.unique(return_inverse=True)  # (S,), (N, H * k)
    # keys @ values[read_slots] is the memory output.
    keys = hidden.new_zeros(len(slots), len(read_slots))  # (N, S)
    keys.scatter_add_(1, columns.view_as(slots), weights)
    whitened = keys  # (N, S)
    if keep:
        C = add_ridge(key_second_moment(model, keep, read_slots).to(keys), ridge)
        whitened = torch.linalg.solve(C, keys.T).T
    solved = torch.linalg.solve(add_ridge(keys @ whitened.T, ridge), updates)  # (N, V)
    before = memory.values[read_slots]
    memory.values[read_slots] += whitened.T @ solved
    return {"slots": read_slots, "values": before, "written": memory.values[read_slots]}


@torch.no_grad()
def undo_edit(model, record):
    """Restore the values before an edit_facts, to the last bit; undo the latest edit first.

    ValueError, and no change, if these values are not as that edit left them.
    """
    values, slots = model.layers[-1].memory.values, record["slots"]
    # Compare bytes, because nan differs from itself.
    if not torch.equal(values[slots].view(torch.uint8), record["written"].view(torch.uint8)):
        raise ValueError("the values are not as this edit left them; undo later edits first")
    values[slots] = record["values"]


def undo_edits(model, records):
    """undo_edit of several edits, the latest of them first.

    ValueError, and no change, if one of them cannot be undone.
    """
    undone = []
    try:
        for record in reversed(records):
            undo_edit(model, record)
            undone.append(record)
    except ValueError:
        for record in reversed(undone):
            undo_edit(model, {**record, "values": record["written"], "written": record["values"]})
        raise


def check_editable(model):
    """ValueError unless values of the last block's memory act on the logits alone and linearly."""
    memory = model.layers[-1].memory
    if memory is None or memory.gate is not None or model.layers[-1].residual_mul:
        message = "editing needs a memory layer without gate in the last block, and no residual_mul"
        raise ValueError(message)
    if sum(m.values is memory.values for m in model.memory_layers().values()) > 1:
        # Earlier blocks would change, too.
        raise ValueError("editing needs mem_share_values=0, or no other block with a memory layer")


def last_layer_reads(model, tokens, targets):
    """What the last block reads at each label, and what follows from it.

    -> slots (N, H * k), weights (N, H * k) times the router's, last hidden state before the final
    norm (N, D), logits (N, tokens), answers (N,)
    """
    hidden = []

    def keep_input(module, inputs, output):
        hidden.append(inputs[0])

    with model.final_norm.register_forward_hook(keep_input):
        logits, _, reads = model(tokens, targets, trace=True)
    _, flat, answers = labelled_positions(targets)
    last = reads[-1]
    slots = last["slots"].flatten(-2).flatten(0, 1)[flat]
    weights = last["weights"].flatten(-2).flatten(0, 1)[flat]
    if "route" in last:
        weights = weights * last["route"].flatten(0, 1)[flat][:, 1:]
    return slots, weights.to(hidden[0].dtype), hidden[0], logits, answers


def target_updates(readout, hidden, logits, answers, margin, rounds=100):
    """Smallest updates to the memory output (N, V) that put each answer `margin` logits above all
    other tokens, with the final norm's scale held fixed. readout (tokens, V): d logits / d output.

    Each round projects onto the half-space in which the answer leads its strongest rival.
    """
    scale = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)  # (N, 1)
    # Divided by the scale, logits are linear in the memory output.
    start = logits / scale
    updates = hidden.new_zeros(len(hidden), readout.shape[1])
    for _ in range(rounds):
        now = start + updates @ readout.T  # (N, tokens)
        strongest, rival = now.scatter(1, answers[:, None], -torch.inf).max(1, keepdim=True)
        missing = strongest + margin / scale - now.gather(1, answers[:, None])  # (N, 1)
        if (missing <= 1e-3 / scale).all():
            break
        direction = readout[answers] - readout[rival.squeeze(1)]
        length = direction.square().sum(-1, keepdim=True)
        updates = updates + missing.clamp(min=0) * direction / length
    return updates


def add_ridge(matrix, ridge):
    """matrix + ridge * its mean diagonal * I, so that it can be inverted"""
    identity = torch.eye(len(matrix), device=matrix.device, dtype=matrix.dtype)
    return matrix + ridge * matrix.diagonal().mean() * identity


@in_eval_mode
def key_second_moment(model, batches, chosen):
    """Sum over labels of w w^T (S, S), MEMIT's C0. batches: [(tokens, targets)] of facts to keep.

    w are the weights of the chosen slots (S,) in the last block: an edit changes no others, and a
    matrix of all slots of a large table would not fit into memory.
    """
    n_slots = len(model.layers[-1].memory.values)
    # Where each slot stands among the chosen; others share a last column, which is dropped.
    column = torch.full((n_slots,), len(chosen), device=chosen.device)
    column[chosen] = torch.arange(len(chosen), device=chosen.device)
    total = torch.zeros(len(chosen), len(chosen), device=chosen.device)
    for tokens, targets in batches:
        slots, weights, *_ = last_layer_reads(model, tokens, targets)
        keys = torch.zeros(len(slots), len(chosen) + 1, device=chosen.device)
        keys.scatter_add_(1, column[slots], weights.float())
        keys = keys[:, :-1]
        total += keys.T @ keys
    return total
