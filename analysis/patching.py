"""Activation patching: which activation, put into a corrupted run, restores the answer?

    python ablate.py patch runs/RUN

Meng et al. 2022 (arXiv 2202.05262) call it causal tracing. A corrupted example runs with one
activation of the clean one.

Letters: B examples, T tokens, D width of the residual stream.
"""

import math
from functools import partial

import numpy as np
import torch

from analysis.hooks import (
    Examples,
    hook_output,
    hook_points,
    hooked,
    logits_at,
    require_blocks,
    same_form,
    sample_correct_examples,
)
from analysis.trained_run import combine_columns, concat, require_facts, save_result
from nanorecall.distributed import SINGLE_PROCESS
from nanorecall.metrics import in_eval_mode, print_table
from nanorecall.plots import figure, finish_figure
from nanorecall.settings import require
from nanorecall.stats import clustered_mean_ci, format_ci, mean_ci


@torch.no_grad()
def patch(run):
    """Which activation, put into a corrupted run, restores the answer of the clean run?

    For each hook point, block and position: the fraction of the logit difference recovered.
    """
    require_blocks(run)
    if run.settings.train.data != "data_mqar":
        require_facts(run)
    clean, corrupted = corrupt(run, sample_correct_examples(run), run.config.seed)
    # Each position is a forward pass of its own for each hook point and block, so of long examples
    # fewer are taken.
    few = np.arange(min(len(clean), max(10, 6000 // clean.tokens.shape[1])))
    clean, corrupted = clean.select(few), corrupted.select(few)
    recovered, clean_diff, corrupted_diff = activation_patching(
        run.model, clean, corrupted, run.world
    )
    columns = patch_columns(recovered, clean, position_roles(run, clean))
    cells = recovered_by_role(columns)
    run.finding(describe(cells, len(clean)))
    # resid_pre is the sum of what the layers before it add, so it recovers the most.
    parts = [key for key in cells if not key.startswith("resid_pre")]
    best = sorted(parts, key=lambda key: -cells[key]["value"])[:8]
    head = ("activation, layer, position", "examples", "recovered", "95% interval")
    print_table(head, [(key, *format_ci(cells[key])) for key in best])
    metrics = {
        "n_examples": len(clean),
        "logit_diff, clean": mean_ci(clean_diff),
        "logit_diff, corrupted": mean_ci(corrupted_diff),
    }
    by_slice = {"hook_point, layer, role": cells}
    plot = partial(plot_patch, run, cells, len(clean))
    save_result(run, "patch", metrics, by_slice, (), columns, plot)


# ---- roles of positions --------------------------------------------------------------------------


def position_roles(run, examples):
    """The role of each position for the first answer: names (B, T), T up to its label.

    In a fact "key:value" it is the number of the key's digit, or the colon. In MQAR it is the asked
    key, its value, a pair that it replaced, the query, or another position.
    """
    labels = examples.label_pos[:, 0].cpu().numpy()
    tokens = examples.tokens[:, : labels.max() + 1].cpu().numpy()
    if not hasattr(run.data, "tokenizer"):
        return mqar_roles(tokens, labels, getattr(run.settings.data, "key_tokens", 1))
    roles = []
    n_digits = 0
    for token in tokens[0]:
        text = run.token(token)
        if text.isdigit():
            n_digits += 1
            text = f"digit {n_digits}"
        roles.append(text)
    return np.tile(roles, (len(tokens), 1))


MQAR_ROLES = ["asked key", "its value", "old pair", "others", "query"]


def mqar_roles(tokens, labels, key_tokens=1):
    """tokens (B, T), labels (B,): positions of the query -> names (B, T).

    key_tokens: the number of tokens of a key. The last one of a query has the label.

    >>> mqar_roles(np.array([[3, 9, 4, 8, 3]]), np.array([4])).tolist()
    [['asked key', 'its value', 'others', 'others', 'query']]
    >>> mqar_roles(np.array([[3, 9, 3, 7, 3]]), np.array([4])).tolist()
    [['old pair', 'old pair', 'asked key', 'its value', 'query']]
    """
    roles = np.full(tokens.shape, "others", "<U9")
    for b, label in enumerate(labels):
        query = slice(label + 1 - key_tokens, label + 1)
        stored = np.lib.stride_tricks.sliding_window_view(tokens[b, : query.start], key_tokens)
        starts = np.flatnonzero((stored == tokens[b, query]).all(1))
        for start in starts:
            roles[b, start : start + key_tokens + 1] = "old pair"
        # Only the last value counts, and the corrupted example has another one there alone.
        for start in starts[-1:]:
            roles[b, start : start + key_tokens] = "asked key"
            roles[b, start + key_tokens] = "its value"
        roles[b, query] = "query"
    return roles


def patch_columns(recovered, clean, roles):
    """{(hook point, block): fraction recovered (T, B)} -> {column: (N,)}, one for each position."""
    parts = []
    for (name, block), fractions in recovered.items():
        T, B = fractions.shape
        parts.append(
            {
                "hook_point": np.full(T * B, name),
                "layer": np.full(T * B, block),
                "position": np.repeat(np.arange(T), B),
                "role": roles[:, :T].T.ravel(),
                "example": np.tile(clean.indices, T),
                "recovered": fractions.ravel(),
            }
        )
    return concat(parts)


def recovered_by_role(columns):
    """{"hook_point, layer, role": mean over examples}"""
    roles = list(dict.fromkeys(columns["role"].tolist()))
    # Positions of a fact stand in order, and those of MQAR differ between examples.
    if set(roles) <= set(MQAR_ROLES):
        roles.sort(key=MQAR_ROLES.index)
    places = combine_columns(columns, "hook_point", "layer")
    cells = {}
    for place in dict.fromkeys(places.tolist()):
        for role in roles:
            mask = (places == place) & (columns["role"] == role)
            mean = clustered_mean_ci(columns["recovered"][mask], columns["example"][mask])
            cells[f"{place}, {role}"] = mean
    return cells


def describe(cells, n_examples):
    """The finding in a sentence: the best position of each part, and what recovers a half."""

    def recovered(key):
        return cells[key]["value"]

    by_part = {}
    for key in sorted(cells, key=recovered, reverse=True):
        by_part.setdefault(key.split(", ")[0], []).append(key)
    # resid_pre holds what all layers before it have added.
    by_part.pop("resid_pre")
    findings = []
    for keys in by_part.values():
        for key in keys:
            if key == keys[0] or recovered(key) >= 0.5:
                name, layer, role = key.split(", ")
                _, value, interval = format_ci(cells[key])
                findings.append(f"{name} of layer {layer} at {role!r} {value} ({interval})")
    listed = ", ".join(findings)
    fraction = "fraction of the logit difference that one activation restores"
    return f"{fraction}: {listed}; n = {n_examples}"


# ---- patching ------------------------------------------------------------------------------------


def corrupt(run, examples, seed):
    """Give examples another first answer -> clean, corrupted Examples.

    With text, the corrupted example is another one of the same form. With MQAR, it is the same one
    with another value under the first queried key. ConfigError if all first answers are the same.
    """
    rng = np.random.default_rng(seed)
    if hasattr(run.data, "tokenizer"):
        examples = same_form(examples)
        other = rng.permutation(len(examples))
        first_answers = examples.answers[:, 0].cpu().numpy()
        differ = np.flatnonzero(first_answers != first_answers[other])
        message = "all examples have the same first answer; raise n_examples"
        require(len(differ), message, None)
        return examples.select(differ), examples.select(other[differ])
    tokens, answers = examples.tokens.clone(), examples.answers.clone()
    values = np.arange(run.data.vocab_size // 2, run.data.vocab_size)
    for b in range(len(examples)):
        unused_values = np.setdiff1d(values, tokens[b].cpu().numpy())
        new = int(rng.choice(unused_values))
        tokens[b, tokens[b] == examples.answers[b, 0]] = new
        answers[b, 0] = new
    corrupted = Examples(examples.indices, tokens, examples.label_pos, answers, examples.slices)
    return examples, corrupted


@in_eval_mode
def activation_patching(model, clean, corrupted, world=SINGLE_PROCESS):
    """Put each activation of the clean run, at one position, into the corrupted run.

    -> {(hook point, block): fraction recovered (T, B)}, and the logit difference between the first
    answers of clean and corrupted examples, in the clean and in the corrupted run, (B,) each. A
    fraction of 1 is the clean run's difference, 0 the corrupted run's.
    """
    clean_answer, corrupted_answer = clean.answers[:, 0], corrupted.answers[:, 0]
    example = torch.arange(len(clean), device=clean_answer.device)
    # The model is causal: what comes after the first label cannot matter there.
    T = 1 + int(max(clean.label_pos[:, 0].max(), corrupted.label_pos[:, 0].max()))

    def answer_logit_diff(examples, hooks):
        with hooked(hooks):
            logits = logits_at(model, examples.tokens[:, :T], examples.label_pos[:, :1])[:, 0]
        return logits[example, clean_answer] - logits[example, corrupted_answer]

    activations, modules, hooks = {}, {}, []
    for name, blocks in hook_points(model).items():
        for block, module in blocks.items():
            modules[name, block] = module
            cache = partial(cache_activation, activations, (name, block))
            hooks.append(hook_output(name, module, cache))
    clean_diff = answer_logit_diff(clean, hooks)
    corrupted_diff = answer_logit_diff(corrupted, [])

    def recover(key):
        fractions = []
        for t in range(T):
            patch_in = partial(patch_position, activations[key], t)
            patched_diff = answer_logit_diff(
                corrupted, [hook_output(key[0], modules[key], patch_in)]
            )
            fraction = (patched_diff - corrupted_diff) / (clean_diff - corrupted_diff)
            fractions.append(fraction.cpu().numpy())
        return np.stack(fractions)

    keys = list(modules)
    recovered = dict(zip(keys, world.shared_map(recover, keys)))
    return recovered, clean_diff.cpu().numpy(), corrupted_diff.cpu().numpy()


def cache_activation(activations, key, x):
    activations[key] = x
    return x


def patch_position(activation, t, x):
    """x (B, T, D) with position t of another activation."""
    return x.index_copy(1, torch.tensor([t], device=x.device), activation[:, t : t + 1])


def plot_patch(run, cells, n_examples, path):
    """A heat map for each hook point: layers down, roles of positions across, numbers inside."""
    names = list(dict.fromkeys(key.split(", ")[0] for key in cells))
    roles = list(dict.fromkeys(key.split(", ", 2)[2] for key in cells))
    blocks = list(dict.fromkeys(key.split(", ")[1] for key in cells))
    n_rows = math.ceil(len(names) / 2)
    plt, fig, axes = figure(n_rows, 2, width=max(3, 0.55 * len(roles) + 1), grid=False)
    fig.set_figheight(n_rows * (1.2 + 0.4 * len(blocks)))
    for axis in axes[len(names) :]:
        axis.remove()
    axes = axes[: len(names)]
    for axis, name in zip(axes, names):
        own_blocks = [block for block in blocks if f"{name}, {block}, {roles[0]}" in cells]
        grid = np.empty((len(own_blocks), len(roles)))
        for row, block in enumerate(own_blocks):
            for column, role in enumerate(roles):
                # Rounded here: -0.004 would read -0.00.
                value = round(cells[f"{name}, {block}, {role}"]["value"], 2) + 0.0
                grid[row, column] = value
                color = "black" if value > 0.6 else "white"
                axis.text(column, row, f"{value:.2f}", ha="center", va="center", color=color)
        image = axis.imshow(grid, aspect="auto", vmin=0, vmax=1, cmap="viridis")
        axis.set_yticks(range(len(own_blocks)), own_blocks)
        axis.set_xticks(range(len(roles)), roles, rotation=45, ha="right")
        axis.set(title=name, ylabel="layer")
    fig.colorbar(image, ax=axes, label="fraction recovered")
    title = f"{run.name}: fraction of the logit difference recovered by one activation"
    finish_figure(fig, plt, path, f"{title}, mean of {n_examples} examples")
