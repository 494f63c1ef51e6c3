"""Let every example read one slot, or give one slot another value: which answers does that give?

    python ablate.py force runs/RUN --slot 7
    python ablate.py replace runs/RUN --slot 7 --pattern mean      # or zero, random
    python ablate.py replace runs/RUN --slot 7 --pattern slot --value 12
    python ablate.py replace runs/RUN --slot 7 --pattern vector --value v.npy

Without --slot, both commands exchange slots between pairs of examples (analysis/interchange.py).

Letters: B examples, n labels of an example, V width of a value, N measurements.
"""

import os
from functools import partial

import numpy as np
import torch

from analysis.ablation import memory_inputs, read_vector, reads_of_labels, to_columns
from analysis.hooks import forward_from, logit_diff, run_with_cache, sample_correct_examples
from analysis.memory_usage import require_slots
from analysis.trained_run import combine_columns, concat, save_result, select
from nanorecall.metrics import print_table
from nanorecall.plots import errorbars, figure, finish_figure
from nanorecall.settings import ConfigError, require, say
from nanorecall.stats import clustered_mean_ci, clustered_proportion, format_ci

# ---- values --------------------------------------------------------------------------------------


def zero_pattern(memory, config):
    return torch.zeros_like(memory.values[0])


def random_pattern(memory, config):
    """A random direction, in the mean length of the values."""
    generator = torch.Generator().manual_seed(config.seed)
    vector = torch.randn(memory.values.shape[1], generator=generator).to(memory.values)
    return vector / vector.norm() * memory.values.norm(dim=1).mean()


def mean_pattern(memory, config):
    return memory.values.mean(0)


def slot_pattern(memory, config):
    """The value of another slot, whose number is config.value."""
    n_slots = len(memory.values)
    is_slot = config.value.isdecimal() and int(config.value) < n_slots
    message = f"value={config.value!r} must be the number of a slot, 0 to {n_slots - 1}"
    require(is_slot, message, "value")
    return memory.values[int(config.value)]


def vector_pattern(memory, config):
    """The vector in config.value: numbers, or a .npy file."""
    try:
        if os.path.exists(config.value):
            # Not np.load, which also opens archives.
            with open(config.value, "rb") as f:
                numbers = np.lib.format.read_array(f, allow_pickle=False).astype(np.float32)
        else:
            numbers = np.array(config.value.replace(",", " ").split(), np.float32)
    except (ValueError, TypeError, OSError, EOFError, MemoryError) as e:
        why = " ".join(str(e).split())[:120]
        message = f"value={config.value!r} is neither a .npy file nor a list of numbers ({why})"
        raise ConfigError(message, "value") from None
    V = memory.values.shape[1]
    message = f"value={config.value!r} has shape {numbers.shape}; the values have {V} numbers"
    require(numbers.shape == (V,), message, "value")
    message = f"value={config.value!r} has numbers that are not finite"
    require(np.isfinite(numbers).all(), message, "value")
    return torch.from_numpy(numbers).to(memory.values)


PATTERNS = {  # (memory layer, settings) -> vector (V,)
    "zero": zero_pattern,
    "random": random_pattern,
    "mean": mean_pattern,
    "slot": slot_pattern,
    "vector": vector_pattern,
}


# ---- measurement ---------------------------------------------------------------------------------


@torch.no_grad()
def change_slot(run, name):
    """force: one head at a time reads config.slot only. replace: the slot gets another value."""
    require_slots(run)
    c = run.config
    message = "exposure_pairs chooses pairs, and --slot takes none"
    require(c.exposure_pairs == "any", message, "exposure_pairs")
    message = "replace --slot needs --pattern: zero, random, mean, slot or vector"
    require(name == "force" or c.pattern, message, "pattern")
    n_slots = run.model.config.mem_n_keys**2
    require(c.slot < n_slots, f"slot={c.slot} must be below {n_slots}, the slots", "slot")
    examples = sample_correct_examples(run)
    clean = run_with_cache(run.model, examples)
    change = CHANGES[name]
    tables = []
    for layer, memory in run.model.memory_layers().items():
        vector = PATTERNS[c.pattern](memory, c) if c.pattern else memory.values[c.slot]
        tables += change(run, layer, examples, clean, vector)
    columns = concat(tables)
    if name == "replace":
        columns["read"] = columns.pop("reads_in_reach") > 0
        if not columns["read"].any():
            say(f"no label of the {len(examples)} examples depends on slot {c.slot}")
    names = ("layer", "head") if name == "force" else ("layer", "read")
    effects = effects_by(columns, *names)
    shares = answer_shares(columns, run.token)
    describe = describe_force if name == "force" else describe_replace
    for sentence in describe(c, effects, shares):
        run.finding(sentence)
    print_effects(", ".join(names), effects)
    by_slice = {", ".join(names): effects, "layer, answer": shares}
    plot = partial(plot_change, run, columns, effects, ", ".join(names)) if shares else None
    save_result(run, name, {"n_examples": len(examples)}, by_slice, (), columns, plot)


def force_slot(run, layer, examples, clean, vector):
    """One head at one label reads the vector with all its weights -> `measure_change` by head."""
    model = run.model
    inputs = memory_inputs(model, layer, clean, examples.label_pos)
    _, reads, label_pos = inputs
    example = torch.arange(len(examples), device=label_pos.device)
    tables = []
    for head in range(model.config.mem_heads):
        logits = []
        for answer_pos in range(label_pos.shape[1]):
            is_forced = torch.zeros_like(reads["slots"], dtype=torch.bool)
            is_forced[example, label_pos[:, answer_pos], head] = True
            of_labels = forward_with_vector(model, layer, inputs, is_forced, vector)
            logits.append(of_labels[:, answer_pos])
        about = {"layer": layer, "head": head}
        tables.append(measure_change(examples, clean, torch.stack(logits, 1), about))
    return tables


def replace_value(run, layer, examples, clean, vector):
    """Every read of config.slot gives the vector -> [`measure_change`], with reads_in_reach."""
    model = run.model
    inputs = memory_inputs(model, layer, clean, examples.label_pos)
    _, reads, label_pos = inputs
    is_slot = reads["slots"] == run.config.slot
    logits = forward_with_vector(model, layer, inputs, is_slot, vector)
    is_last = layer == len(model.layers) - 1
    _, in_reach = reads_of_labels(is_slot, label_pos, is_last)
    about = {"layer": layer}
    return [measure_change(examples, clean, logits, about, reads_in_reach=in_reach)]


CHANGES = {"force": force_slot, "replace": replace_value}


def forward_with_vector(model, layer, inputs, is_replaced, vector):
    """Logits (B, n, vocabulary), if some of a layer's reads give the vector (V,)."""
    resid, reads, label_pos = inputs
    changed = read_vector(model.memory_layers()[layer], reads, is_replaced, vector)
    return forward_from(model, layer, resid, changed, label_pos)


def measure_change(examples, clean, logits, about, **further):
    """Logits (B, n, vocabulary) after a change, beside the clean ones -> columns of `to_columns`.

    They are drop, base_lost, prediction, prediction_clean, and further ones {name: (B, n)}.
    """
    before, _, _ = logit_diff(clean.logits, examples.answers)
    diff, _, correct = logit_diff(logits, examples.answers)
    columns = {
        "drop": before - diff,
        "base_lost": ~correct,
        "prediction_clean": clean.logits.argmax(-1),
        "prediction": logits.argmax(-1),
    }
    return to_columns(examples, about, columns | further)


# ---- output --------------------------------------------------------------------------------------


def effects_by(columns, *names):
    """{"value, value": {"base_lost", "drop"}} for each combination of values of these columns."""
    keys = combine_columns(columns, *names)
    effects = {}
    for key in dict.fromkeys(keys.tolist()):
        part = select(columns, keys == key)
        effects[key] = {
            "base_lost": clustered_proportion(part["base_lost"], part["example"]),
            "drop": clustered_mean_ci(part["drop"], part["example"]),
        }
    return effects


def answer_shares(columns, token):
    """How often each token is the answer, before and after: {"layer, token": {"before", "after"}}.

    With replace, only labels that depend on the slot count.
    """
    if "read" in columns:
        columns = select(columns, columns["read"])
    shares = {}
    for layer in np.unique(columns["layer"]):
        part = select(columns, columns["layer"] == layer)
        for answer in np.unique([part["prediction_clean"], part["prediction"]]):
            shares[f"{layer}, {token(answer)}"] = {
                "before": clustered_proportion(part["prediction_clean"] == answer, part["example"]),
                "after": clustered_proportion(part["prediction"] == answer, part["example"]),
            }
    return shares


def largest_gain(shares, layer):
    """The answer whose fraction rises most in a layer, as part of a sentence."""
    gains = {}
    for key, cell in shares.items():
        of_layer, _, token = key.partition(", ")
        if of_layer == layer:
            gains[token] = (cell["after"]["value"] - cell["before"]["value"], cell)
    token, (gain, cell) = max(gains.items(), key=lambda item: item[1][0])
    if gain <= 0:
        return "no answer is given more often"
    shares = f"from {cell['before']['value']:.1%} to {cell['after']['value']:.1%}"
    return f"{token!r} gains most, {shares} of the answers"


IN_WORDS = {
    "zero": "zeros",
    "random": "a random vector",
    "mean": "the mean of all values",
    "slot": "the value of slot {}",
    "vector": "the given vector",
}


def describe_slot(config):
    """The slot and its value, as part of a sentence."""
    if not config.pattern:
        return f"slot {config.slot}"
    return f"slot {config.slot} holding {IN_WORDS[config.pattern].format(config.value)}"


def describe_force(config, effects, shares):
    """Yield a sentence for each layer."""
    lost = {}
    for key, effect in effects.items():
        layer, head = key.split(", ")
        lost.setdefault(layer, {})[head] = effect["base_lost"]["value"]
    for layer, of_heads in lost.items():
        head = max(of_heads, key=of_heads.get)
        mean = np.mean(list(of_heads.values()))
        text = f"layer {layer}: if one head reads only {describe_slot(config)}, {mean:.1%}"
        text += f" of the answers are lost (head {head}: {of_heads[head]:.1%})"
        yield f"{text}; {largest_gain(shares, layer)}"


def describe_replace(config, effects, shares):
    """Yield a sentence for each layer."""
    for key, effect in effects.items():
        layer, is_read = key.split(", ")
        if is_read == "True":
            text = f"layer {layer}: with {describe_slot(config)},"
            text += f" {effect['base_lost']['value']:.1%} of the answers that depend on it are lost"
            yield f"{text} (n = {effect['base_lost']['n']}); {largest_gain(shares, layer)}"


def print_effects(names, effects):
    lines = []
    for name, effect in effects.items():
        lines.append((name, *format_ci(effect["base_lost"]), *format_ci(effect["drop"])[1:]))
    head = (names, "labels", "answers lost", "95% interval", "mean drop in logit diff")
    print_table((*head, "95% interval"), lines)


def plot_change(run, columns, effects, names, path, most=20):
    """Answers lost, and for each layer how the shares of the answers change by answer position."""
    n = len(np.unique(columns["example"]))
    if "read" in columns:
        columns = select(columns, columns["read"])
    layers = np.unique(columns["layer"])
    plt, fig, axes = figure(1, 1 + len(layers), width=4.6, grid=False)
    height = np.arange(len(effects))[::-1]
    lost = [effect["base_lost"] for effect in effects.values()]
    errorbars(axes[0], height, lost, horizontal=True, ls="none")
    axes[0].set_yticks(height, list(effects))
    axes[0].set(xlabel="fraction of answers lost (95%)", ylabel=names, xlim=(0, None))
    tokens, counts = np.unique(columns["prediction"], return_counts=True)
    # The most frequent ones, by number: the digits of an answer in their order.
    tokens = np.sort(tokens[np.argsort(-counts, kind="stable")[:most]])
    for axis, layer in zip(axes[1:], layers):
        part = select(columns, columns["layer"] == layer)
        positions = np.unique(part["answer_pos"])
        change = np.zeros((len(positions), len(tokens)))
        for i, answer_pos in enumerate(positions):
            here = select(part, part["answer_pos"] == answer_pos)
            for j, token in enumerate(tokens):
                before = here["prediction_clean"] == token
                after = here["prediction"] == token
                change[i, j] = after.mean() - before.mean()
        limit = max(0.01, np.abs(change).max())
        image = axis.imshow(change, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        axis.set_xticks(range(len(tokens)), [run.token(token) for token in tokens])
        axis.set_yticks(range(len(positions)), positions)
        axis.set(xlabel="answer of the model", ylabel="answer position", title=f"layer {layer}")
        fig.colorbar(image, ax=axis, label="change of its share of the answers")
    finish_figure(fig, plt, path, f"{run.name}: {describe_slot(run.config)}, {n} examples")
