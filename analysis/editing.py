"""Edit facts that the last block stores, in closed form: the core, and edits of a memory layer.

edit_facts solves for the memory output that yields the new answers, then for the value vectors
that produce it (as MEMIT does in MLPs: Meng et al. 2023, arXiv 2210.07229). mlp_editing.py does the
same in an MLP: there, rows are columns of the down projection, and keys are what enters it.
editors.py has both in a table beside other ways to change facts, edit_comparison.py measures them.

Letters: B facts, T tokens, N labels, H heads, k slots that a head reads, S slots read at any label,
D model width, V width of a value.
"""

import torch

from memory import in_float64
from nanorecall.metrics import in_eval_mode
from nanorecall.ops import labelled_positions


@in_eval_mode
def edit_facts(model, tokens, targets, keep=(), margin=2.0, ridge=1e-4, null_space=None):
    """Change values of the last block so that the model answers `targets`.

    tokens, targets (B, T): labels as in training; each prompt is read with its new answer. There
    are two closed forms and no gradients. First, for each label, the smallest change of the memory
    output that puts the answer's logit `margin` above all others. Then the smallest change of
    values that produces it: least squares with a ridge. keep, batches [(tokens, targets)] of facts,
    and null_space protect other facts: see solve_change.
    ValueError if the model is not editable.
    """
    check_editable(model)
    memory = model.layers[-1].memory
    slots, weights, hidden, logits, answers = last_layer_reads(model, tokens, targets)
    head = logit_head(model)
    readout = head if memory.out is None else head @ memory.out.weight  # (tokens, V)
    updates = target_updates(readout, hidden, logits, answers, margin)  # (N, V)
    read_slots, columns = slots.unique(return_inverse=True)  # (S,), (N, H * k)
    # keys @ values[read_slots] is the memory output.
    keys = hidden.new_zeros(len(slots), len(read_slots))  # (N, S)
    keys.scatter_add_(1, columns.view_as(slots), weights)
    moment = key_second_moment(model, keep, read_slots).to(keys) if keep else None
    memory.values[read_slots] += solve_change(keys, updates, moment, ridge, null_space)


# ---- shared by edits of memory layers and MLPs ---------------------------------------------------


def logit_head(model):
    """d logits / d output of the last block (tokens, D).

    The final norm multiplies logits by a scale for each position, too, which is left out.
    """
    return model.lm_head.weight * model.final_norm.weight


def solve_change(keys, updates, moment=None, ridge=1e-4, null_space=None):
    """Change of the rows that keys weight: keys (N, S), updates (N, V) -> (S, V).

    With K the keys and R the updates, it is the smallest change with K change = R:
        change = K^T (K K^T)^-1 R
    With moment, C = K0^T K0 (S, S) of the keys K0 of facts to keep, it is the change that disturbs
    these least (MEMIT, eq. 14, in the limit of facts that must get their answers):
        change = C^-1 K^T (K C^-1 K^T)^-1 R
    With null_space as well, the change leaves these alone, and updates out of its reach are not
    made (AlphaEdit: Fang et al. 2025, arXiv 2410.02355, without earlier edits):
        change = P K^T (K P K^T)^-1 R
    P projects on the eigenvectors of C whose eigenvalues are at most null_space times the largest.
    Each inverted matrix gets a ridge. In the notation of both papers a key is a column, and all
    matrices are transposed.
    """
    whitened = keys  # (N, S)
    if moment is not None and null_space is not None:
        whitened = project_on_null_space(keys, moment, null_space)
    elif moment is not None:
        whitened = torch.linalg.solve(add_ridge(moment, ridge), keys.T).T
    solved = torch.linalg.solve(add_ridge(keys @ whitened.T, ridge), updates)  # (N, V)
    return whitened.T @ solved


def project_on_null_space(keys, moment, threshold):
    """keys (N, S) without their part that keys of kept facts may have: keys @ P."""
    # float32 would give eigenvalues of 0 an error of about 1e-7 times the largest.
    eigenvalues, vectors = torch.linalg.eigh(in_float64(moment))
    null_vectors = vectors[:, eigenvalues <= threshold * eigenvalues[-1]]
    return (in_float64(keys) @ null_vectors @ null_vectors.T).to(keys)


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
    matrix = matrix.clone()
    diagonal = matrix.diagonal()
    # A matrix of zeros is inverted, too: the null space may hold no key, or kept facts no slot.
    diagonal += ridge * diagonal.mean().clamp(min=1e-12)
    return matrix


def last_block_part(model, name):
    """The last block's `memory` or `ffn`; None if it has none, or the logits do not follow it."""
    has_all = all(hasattr(model, part) for part in ("layers", "final_norm", "lm_head"))
    return getattr(model.layers[-1], name, None) if has_all else None


# ---- memory layers -------------------------------------------------------------------------------


def check_editable(model):
    """ValueError unless values of the last block's memory act on the logits alone and linearly."""
    memory = last_block_part(model, "memory")
    if memory is None or memory.gate is not None or model.layers[-1].residual_mul:
        message = "editing needs a memory layer without gate in the last block, and no residual_mul"
        raise ValueError(message)
    if sum(m.values is memory.values for m in model.memory_layers().values()) > 1:
        # Earlier blocks would change, too.
        raise ValueError("editing needs mem_share_values=0, or no other block with a memory layer")


def last_layer_reads(model, tokens, targets):
    """The reads of the last block at each label, and the outputs that follow.

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
