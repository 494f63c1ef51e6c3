"""Ways to make a model answer facts anew: closed forms and fine-tuning.

An editor is a function f(model, tokens, targets, kept_tokens, kept_targets). It changes weights of
the model in place, so that the model answers the facts (tokens, targets). It may use the kept
facts, which should keep their answers.
"""

from analysis.editing import check_editable, edit_facts
from analysis.mlp_editing import check_mlp_editable, edit_mlp
from nanorecall.metrics import correct_predictions, evaluating, in_eval_mode
from nanorecall.sparse import SparseAdamW

# Eigenvalues up to this fraction of the largest are taken for 0: see solve_change.
NULL_SPACE = 1e-2


@in_eval_mode
def n_correct(model, tokens, targets):
    """Number of examples whose labels are all predicted correctly."""
    logits, _ = model(tokens, targets)
    return int(correct_predictions(logits, targets)[1].sum())


def closed_form(model, tokens, targets, kept, kept_targets):
    edit_facts(model, tokens, targets)


def closed_form_protecting(model, tokens, targets, kept, kept_targets):
    edit_facts(model, tokens, targets, keep=[(kept, kept_targets)])


def closed_form_in_null_space(model, tokens, targets, kept, kept_targets):
    keep = [(kept, kept_targets)]
    edit_facts(model, tokens, targets, keep=keep, null_space=NULL_SPACE)


def closed_form_mlp(model, tokens, targets, kept, kept_targets):
    edit_mlp(model, tokens, targets)


def closed_form_mlp_protecting(model, tokens, targets, kept, kept_targets):
    edit_mlp(model, tokens, targets, keep=[(kept, kept_targets)])


def closed_form_mlp_in_null_space(model, tokens, targets, kept, kept_targets):
    keep = [(kept, kept_targets)]
    edit_mlp(model, tokens, targets, keep=keep, null_space=NULL_SPACE)


def check_has_values(model):
    """ValueError unless the model has memory layers."""
    if not hasattr(model, "memory_layers"):
        raise ValueError("fine-tuning the values needs memory layers")


def fine_tune_values(model, *facts):
    values = [q for name, q in model.named_parameters() if "memory.values" in name]
    fine_tune(model, values, 1e-2, *facts)


def fine_tune_all(model, *facts):
    fine_tune(model, list(model.parameters()), 1e-3, *facts)


def fine_tune_all_replaying(model, *facts):
    fine_tune(model, list(model.parameters()), 1e-3, *facts, replay=True)


def fine_tune(model, parameters, lr, tokens, targets, kept, kept_targets, replay=False, steps=200):
    """Train parameters on the new facts until all are answered; with replay, on kept facts, too."""
    optimizer = SparseAdamW(parameters, lr=lr, weight_decay=0)  # Adam
    try:
        with evaluating(model):
            for _ in range(steps):
                model.zero_grad()
                loss = model(tokens, targets)[1]
                if replay:
                    loss = loss + model(kept, kept_targets)[1]
                loss.backward()
                optimizer.step()
                done = n_correct(model, tokens, targets) == len(tokens)
                if done and replay:
                    done = n_correct(model, kept, kept_targets) == len(kept)
                if done:
                    break
    finally:
        # Or the next training step would add its own gradients to these.
        model.zero_grad()


EDITORS = {
    "closed form": closed_form,
    "closed form, protecting others": closed_form_protecting,
    "closed form, null space of others": closed_form_in_null_space,
    "closed form in the MLP": closed_form_mlp,
    "closed form in the MLP, protecting others": closed_form_mlp_protecting,
    "closed form in the MLP, null space of others": closed_form_mlp_in_null_space,
    "fine-tune the values": fine_tune_values,
    "fine-tune all weights": fine_tune_all,
    "fine-tune all weights, replaying others": fine_tune_all_replaying,
}

# What an editor needs, as a function of the model that raises ValueError. Others take any model.
NEEDS = {
    "closed form": check_editable,
    "closed form, protecting others": check_editable,
    "closed form, null space of others": check_editable,
    "closed form in the MLP": check_mlp_editable,
    "closed form in the MLP, protecting others": check_mlp_editable,
    "closed form in the MLP, null space of others": check_mlp_editable,
    "fine-tune the values": check_has_values,
}


def applicable_editors(model, editors):
    """Those of editors {name: function} that the model can take, and {why not: other names}."""
    applicable, left_out = {}, {}
    for name, editor in editors.items():
        reason = why_not(NEEDS[name], model) if name in NEEDS else None
        if reason:
            left_out.setdefault(reason, []).append(name)
        else:
            applicable[name] = editor
    return applicable, left_out


def why_not(check, model):
    """The message of the ValueError that check(model) raises, or None."""
    try:
        check(model)
    except ValueError as e:
        return str(e)
    return None
