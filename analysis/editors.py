"""Ways to give facts new answers, in a table: closed forms and fine-tuning.

An editor is a function f(model, tokens, targets, kept_tokens, kept_targets). It changes weights of
the model in place, so that the model answers the facts (tokens, targets). It may use the kept
facts, which should keep their answers.
"""

import functools

import torch

from analysis.editing import check_editable, edit_facts
from analysis.finetuning import (
    SPARSE,
    fine_tune_all,
    fine_tune_all_replaying,
    fine_tune_all_replaying_some,
    fine_tune_lora,
    fine_tune_values,
)
from analysis.mlp_editing import check_mlp_editable, edit_mlp
from nanorecall.metrics import correct_predictions, in_eval_mode
from nanorecall.rng import IGNORE_INDEX
from nanorecall.settings import require, say

# Eigenvalues up to this fraction of the largest are taken for 0: see solve_change.
NULL_SPACE = 1e-2
# Logits by which a closed form aims to put an answer above all other tokens. A larger margin harms
# other facts more.
MARGIN = 2.0


@in_eval_mode
def answered(model, tokens, targets, batch_size=500):
    """Which examples have all labels predicted correctly: (B,) bool"""
    parts = []
    for x, y in zip(tokens.split(batch_size), targets.split(batch_size)):
        logits, _ = model(x, y)
        parts.append(correct_predictions(logits, y)[1])
    return torch.cat(parts)


def n_correct(model, tokens, targets):
    """Number of examples whose labels are all predicted correctly."""
    return int(answered(model, tokens, targets).sum())


@in_eval_mode
def answer_probabilities(model, tokens, targets):
    """The probability of each example's answer, all its labels together: (B,)"""
    logits, _ = model(tokens, targets)  # (N, tokens)
    labelled = targets != IGNORE_INDEX
    example, answers = labelled.nonzero()[:, 0], targets[labelled]
    log_p = logits.float().log_softmax(-1).gather(1, answers[:, None])[:, 0]
    return log_p.new_zeros(len(tokens)).index_add(0, example, log_p).exp()


def closed_form(model, tokens, targets, kept, kept_targets, margin=MARGIN):
    edit_facts(model, tokens, targets, margin=margin)


def closed_form_protecting(model, tokens, targets, kept, kept_targets, margin=MARGIN):
    edit_facts(model, tokens, targets, keep=[(kept, kept_targets)], margin=margin)


def closed_form_in_null_space(model, tokens, targets, kept, kept_targets, margin=MARGIN):
    keep = [(kept, kept_targets)]
    edit_facts(model, tokens, targets, keep=keep, null_space=NULL_SPACE, margin=margin)


def closed_form_mlp(model, tokens, targets, kept, kept_targets, margin=MARGIN):
    edit_mlp(model, tokens, targets, margin=margin)


def closed_form_mlp_protecting(model, tokens, targets, kept, kept_targets, margin=MARGIN):
    edit_mlp(model, tokens, targets, keep=[(kept, kept_targets)], margin=margin)


def closed_form_mlp_in_null_space(model, tokens, targets, kept, kept_targets, margin=MARGIN):
    keep = [(kept, kept_targets)]
    edit_mlp(model, tokens, targets, keep=keep, null_space=NULL_SPACE, margin=margin)


def check_has_values(model):
    """ValueError unless the model has memory layers."""
    if not hasattr(model, "memory_layers"):
        raise ValueError("fine-tuning the values needs memory layers")


CLOSED_FORMS = {  # these take margin
    "closed form": closed_form,
    "closed form, protecting others": closed_form_protecting,
    "closed form, null space of others": closed_form_in_null_space,
    "closed form in the MLP": closed_form_mlp,
    "closed form in the MLP, protecting others": closed_form_mlp_protecting,
    "closed form in the MLP, null space of others": closed_form_mlp_in_null_space,
}
EDITORS = {
    **CLOSED_FORMS,
    "fine-tune the values": fine_tune_values,
    "fine-tune all weights": fine_tune_all,
    "fine-tune all weights, replaying others": fine_tune_all_replaying,
    "fine-tune all weights, replaying a tenth": fine_tune_all_replaying_some,
    "fine-tune LoRA": fine_tune_lora,
    **SPARSE,
}

# What `eval.py edit` compares if it is not told: they take about a minute.
DEFAULT_EDITORS = (
    "closed form",
    "closed form, protecting others",
    "closed form in the MLP",
    "closed form in the MLP, protecting others",
    "fine-tune the values",
    "fine-tune all weights",
    "fine-tune all weights, replaying others",
)

# What an editor needs, as a function of the model that raises ValueError. Others take any model.
NEEDS = {
    "closed form": check_editable,
    "closed form, protecting others": check_editable,
    "closed form, null space of others": check_editable,
    "closed form in the MLP": check_mlp_editable,
    "closed form in the MLP, protecting others": check_mlp_editable,
    "closed form in the MLP, null space of others": check_mlp_editable,
    "fine-tune the values": check_has_values,
    **dict.fromkeys(SPARSE, check_editable),
}


def choose_editors(names, top_slots, margin):
    """{name: editor} of names separated by ";", of all, or of DEFAULT_EDITORS if names is empty.

    top_slots: of the SPARSE ones. margin: of CLOSED_FORMS. ConfigError for a name that is not in
    EDITORS.
    """
    chosen = DEFAULT_EDITORS
    if names == "all":
        chosen = EDITORS
    elif names:
        chosen = [name.strip() for name in names.split(";")]
    editors = {}
    for name in chosen:
        message = f"there is no editor {name!r}; separate names by ';': {'; '.join(EDITORS)}"
        require(name in EDITORS, message, "editors")
        editors[name] = EDITORS[name]
        if name in SPARSE:
            editors[name] = functools.partial(EDITORS[name], top_slots=top_slots)
        elif name in CLOSED_FORMS:
            editors[name] = functools.partial(EDITORS[name], margin=margin)
    return editors


def say_margin(editors, margin):
    """Print what the closed forms among the editors {name: function} aim at."""
    if CLOSED_FORMS.keys() & editors.keys():
        goal = f"{margin:g} logits between a new answer and other tokens"
        say(f"closed forms aim at {goal} (--margin)")


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
