"""Edit facts that the last block's MLP stores, in closed form (editing.py has the core).

The MLP's output is its down projection (D, F) times the activations before it, linear in both. So
the activations are keys, and the columns of the down projection are the values that they weight:
the same as a memory layer, but for keys that are not sparse (MEMIT: Meng et al. 2023, arXiv
2210.07229, which changes the down projections of several blocks).

Letters: B facts, T tokens, N labels, D model width, F hidden width of the MLP.
"""

from torch import nn

from analysis.editing import last_block_part, logit_head, solve_change, target_updates
from memory import in_float64
from nanorecall.metrics import in_eval_mode
from nanorecall.ops import labelled_positions


@in_eval_mode
def edit_mlp(model, tokens, targets, keep=(), margin=2.0, ridge=1e-8, null_space=None):
    """edit_facts of the last block's down projection.

    tokens, targets (B, T), keep, margin, ridge and null_space as for edit_facts.
    ValueError if the model has no such MLP.
    """
    check_mlp_editable(model)
    weight = model.layers[-1].ffn.down.weight  # (D, F)
    keys, hidden, logits, answers = last_mlp_keys(model, tokens, targets)
    updates = target_updates(logit_head(model), hidden, logits, answers, margin)  # (N, D)
    moment = in_float64(mlp_key_second_moment(model, keep)) if keep else None
    # In float64, with a small ridge: a router may make the key of one label 1000 times as small as
    # another's, and its answer needs a change that a larger ridge forbids.
    keys, updates = in_float64(keys), in_float64(updates)
    weight += solve_change(keys, updates, moment, ridge, null_space).T.to(weight)


def check_mlp_editable(model):
    """ValueError unless the last block's down projection acts on the logits linearly."""
    down = getattr(last_block_part(model, "ffn"), "down", None)
    if not isinstance(down, nn.Linear) or model.layers[-1].residual_mul:
        raise ValueError("editing an MLP needs one in the last block, and no residual_mul")


def last_mlp_keys(model, tokens, targets):
    """The inputs of the last block's down projection at each label, and the outputs that follow.

    -> keys (N, F) times the router's weight, last hidden state before the final norm (N, D),
    logits (N, tokens), answers (N,)
    """
    block = model.layers[-1]
    inputs = {}

    def keep_input(module, args, output):
        inputs[module] = args[0]

    router = getattr(block, "router", None)
    options = {"trace": True} if router else {}
    down, norm = block.ffn.down, model.final_norm
    with down.register_forward_hook(keep_input), norm.register_forward_hook(keep_input):
        logits, _, *reads = model(tokens, targets, **options)
    _, flat, answers = labelled_positions(targets)
    keys = inputs[down].flatten(0, 1)[flat]
    if router:
        route = reads[0][-1]["route"].flatten(0, 1)[flat]  # (N, 2)
        keys = keys * route[:, :1]
    return keys, inputs[norm], logits, answers


@in_eval_mode
def mlp_key_second_moment(model, batches):
    """Sum over labels of a a^T (F, F), MEMIT's C0. batches: [(tokens, targets)] of facts to keep.

    a are the activations that enter the last block's down projection.
    """
    total = 0
    for tokens, targets in batches:
        keys, *_ = last_mlp_keys(model, tokens, targets)
        total = total + keys.T @ keys
    return total
