"""Where each head attends: its attention maps, and a label for its role.

    python eval.py attention runs/RUN                # maps of one example, and the roles of heads
    python eval.py attention runs/RUN --example 3

Letters: B examples, T tokens, H heads.
"""

import io
import math
import os
from functools import partial

import numpy as np
import torch

from analysis.trained_run import concat, map_batches, result_suffix, sample_batches, save_result
from nanorecall.attention import attention_weights, softmax_attention
from nanorecall.files import atomic_write, make_directory
from nanorecall.metrics import in_eval_mode, print_table
from nanorecall.plots import figure, finish_figure, write_figure
from nanorecall.settings import ConfigError, require, say
from nanorecall.stats import mean_proportion

# ---- patterns ------------------------------------------------------------------------------------
# Does a weight from token t on token s belong to the pattern?
# ids (B, T), t (T, 1), s (1, T) -> bool, (B, T, T) or (T, T)


def induction(ids, t, s):
    """s comes after an earlier occurrence of token t (Olsson et al. 2022, arXiv 2209.11895)."""
    return (previous_tokens(ids)[:, None, :] == ids[:, :, None]) & (s < t + 1) & (s > 0) & (s != t)


def same_token(ids, t, s):
    return (ids[:, None, :] == ids[:, :, None]) & (s < t)


PATTERNS = {
    "previous token": lambda ids, t, s: s == t - 1,
    "2 to 8 back": lambda ids, t, s: (s < t - 1) & (s >= t - 8),
    "itself": lambda ids, t, s: s == t,
    "first token": lambda ids, t, s: (s == 0) & (t > 1),
    "induction": induction,
    "same token": same_token,
}


def previous_tokens(ids):
    """ids (B, T) shifted by one; -1 stands before the first."""
    return torch.cat([torch.full_like(ids[:, :1], -1), ids[:, :-1]], dim=1)


def pattern_scores(weights, ids, real, window=0):
    """The fraction of its attention that a head gives to each pattern, and its entropy.

    weights (B, H, T, T), ids (B, T), real (B, T) bool: tokens that count, window: how many tokens a
    head sees, 0: all -> {pattern: (B, H)}, the mean over tokens that see the pattern; nan where
    there are none. "entropy" is divided by that of even attention: 1 for a head that attends
    equally to all tokens that it sees.
    """
    t = torch.arange(ids.shape[1], device=ids.device)
    # Rows sum to 1 with softmax; other attention functions may have any sum.
    total = weights.sum(-1, keepdim=True)
    weights = torch.where((total - 1).abs() < 1e-4, weights, weights / total.clamp(min=1e-30))
    n_seen = (t + 1).clamp(max=window or len(t))  # (T,)
    is_seen = t[None] > (t - n_seen)[:, None]  # (T, T)
    scores = {}
    for name, pattern in PATTERNS.items():
        in_pattern = pattern(ids, t[:, None], t[None]) & is_seen
        in_pattern = in_pattern.expand(len(ids), -1, -1)  # (B, T, T)
        # The first token has nothing to choose from.
        possible = in_pattern.any(-1) & real & (t > 0)  # (B, T)
        attention = (weights * in_pattern[:, None]).sum(-1)  # (B, H, T)
        scores[name] = (attention * possible[:, None]).sum(-1) / possible.sum(-1)[:, None]
    entropy = -(weights * weights.clamp(min=1e-30).log()).sum(-1)[:, :, 1:]  # (B, H, T - 1)
    # One token alone leaves no choice. Its entropy is 0, and log(2) is any number above 0.
    entropy = entropy / n_seen[1:].clamp(min=2).log()
    counted = real[:, None, 1:]
    scores["entropy"] = (entropy * counted).sum(-1) / counted.sum(-1)
    return scores


def head_role(scores):
    """{pattern: mean} of a head -> its role in a word.

    This is the strongest pattern if it gets 40% of the attention, and even attention would not.
    """
    if scores["entropy"] >= 0.85:
        return "diffuse"
    possible = [name for name in PATTERNS if not np.isnan(scores[name])]
    strongest = max(possible, key=scores.get)
    if scores[strongest] >= 0.4:
        return strongest
    return f"mixed, most to: {strongest}" if scores[strongest] >= 0.2 else "mixed"


# ---- maps ----------------------------------------------------------------------------------------


@in_eval_mode
def attention_maps(model, tokens, cu_seqlens=None):
    """Attention weights: tokens (B, T) -> {block: (B, H, T, T)}.

    They are those of whatever attention_fn the blocks have. ValueError if a block has no
    attention, or one whose output is no weighted sum of values.
    """
    check_mixers(model)
    calls_of = {}

    def record_calls(block, attention_fn):
        def recording(q, k, v, *more, **options):
            output = attention_fn(q, k, v, *more, **options)
            call = (q, k, v, output, attention_fn, more, options)
            calls_of.setdefault(block, []).append(call)
            return output

        return recording

    mixers = [layer.att for layer in model.layers]
    # A recorder takes the place of attention_fn. Some mixers have their own, beside their class's.
    own = [vars(mixer).get("attention_fn") for mixer in mixers]
    try:
        for block, mixer in enumerate(mixers):
            vars(mixer)["attention_fn"] = record_calls(block, mixer.attention_fn)
        if cu_seqlens is None:
            model(tokens)
        else:
            model(tokens, None, cu_seqlens)
    finally:
        for mixer, attention_fn in zip(mixers, own):
            vars(mixer).pop("attention_fn", None)
            if attention_fn is not None:
                vars(mixer)["attention_fn"] = attention_fn
    maps = {}
    for block in range(len(mixers)):
        calls = calls_of.get(block, [])
        if len(calls) != 1:
            message = f"layer {block} called its attention_fn {len(calls)} times"
            raise ValueError(f"{message}, so it has no single map")
        maps[block] = weights_of_call(block, *calls[0])
    return maps


def check_mixers(model):
    """ValueError unless each block has an attention_fn."""
    layers = getattr(model, "layers", None)
    has_attention = isinstance(layers, torch.nn.ModuleList) and len(layers) > 0
    for layer in layers if has_attention else ():
        mixer = getattr(layer, "att", None)
        has_attention = has_attention and getattr(mixer, "attention_fn", None) is not None
    if not has_attention:
        models = "as in gpt, unified_kv and memory"
        raise ValueError(f"attention maps need softmax attention in every layer, {models}")


def weights_of_call(block, q, k, v, output, attention_fn, more, options):
    """The weights (B, H, T, T) of one call, output = attention_fn(q, k, v, *more, **options)."""
    if attention_fn is softmax_attention:
        documents = options.get("documents", more[1] if len(more) > 1 else None)
        return attention_weights(q, k, documents, options.get("window", 0))
    # A weighted sum of one-hot values is the weights.
    B, n_kv_heads, T, _ = v.shape
    one_hot = torch.eye(T, device=v.device).expand(B, n_kv_heads, T, T)
    with torch.autocast(v.device.type, enabled=False):
        weights = attention_fn(q.float(), k.float(), one_hot, *more, **options)
    if weights.shape == (*output.shape[:3], T):
        values = v.float().repeat_interleave(output.shape[1] // n_kv_heads, dim=1)
        sums = weights @ values
        if sums.shape == output.shape and is_close(sums, output):
            return weights
    raise ValueError(f"what layer {block} attends with is no weighted sum of its values")


def is_close(x, y):
    """Whether x and y are equal except for the rounding of y's dtype."""
    tolerance = 30 * torch.finfo(y.dtype).eps
    y = y.float()
    return bool((x - y).abs().max() <= tolerance * (1 + y.abs().max()))


def require_maps(run):
    """ConfigError if the model has no attention maps, or some with weights below 0.

    This is found out by making those of a few tokens.
    """
    T, vocab_size = min(4, run.data.seq_len), run.data.vocab_size
    tokens = torch.arange(T, device=run.device)[None] % vocab_size
    try:
        maps = attention_maps(run.model, tokens)
    except ValueError as e:
        raise ConfigError(str(e)) from None
    lowest = min(weights.min() for weights in maps.values())
    message = "weights of its attention are below 0, so they are no fractions"
    require(lowest >= 0, message, None)


# ---- the analysis --------------------------------------------------------------------------------

MAX_WEIGHTS = 2**25  # attention weights that are held at a time: 128 MiB
MAX_JSON = 1_000_000  # attention weights that are written as text: 10 MB


def attention(run):
    """Maps of one example, and the role of each head over all examples."""
    require_maps(run)
    index = example_to_draw(run)
    table = map_batches(run, lambda batch: score_heads(run, batch))
    by_head, roles = summarize_heads(table)
    maps, texts = maps_of_example(run, index)
    folder = os.path.join(run.folder, "attention" + result_suffix(run, "attention"))
    weights = f"{folder}/maps.npz"
    if len(maps) * len(texts) ** 2 <= MAX_JSON:
        weights = weights_as_lists(maps)
    if run.world.is_main:
        run.finding(describe_roles(by_head, roles))
        print_heads(by_head)
    n = len(np.unique(table["example"]))
    title = f"{run.name}: attention maps of example {index}; roles of heads over {n} examples"

    plot = partial(plot_grid, maps, texts, roles, title)
    example = {"example": int(index), "tokens": texts, "weights": weights}
    save_result(run, "attention", {"n_examples": n}, {"head": by_head}, [example], table, plot)
    if run.world.is_main:
        make_directory(folder)
        save_maps(f"{folder}/maps.npz", maps)
        plot_heads(folder, maps, texts, roles)


def summarize_heads(table):
    """Scores of `score_heads` -> means {"layer 0, head 0": {"role", pattern: cell or None}}, roles.

    roles: {(layer, head): role}. A cell is None if no token could attend to the pattern.
    """
    by_head, roles = {}, {}
    for layer, head in sorted(set(zip(table["layer"].tolist(), table["head"].tolist()))):
        mask = (table["layer"] == layer) & (table["head"] == head)
        cells, means = {}, {}
        for name in (*PATTERNS, "entropy"):
            x = table[name][mask]
            x = x[~np.isnan(x)]
            cells[name] = mean_proportion(x) if len(x) else None
            means[name] = cells[name]["value"] if len(x) else np.nan
        roles[layer, head] = head_role(means)
        by_head[f"layer {layer}, head {head}"] = {"role": roles[layer, head], **cells}
    return by_head, roles


def maps_of_example(run, index):
    """One example of the split -> {(layer, head): map (T, T)}, its T tokens as text."""
    tokens, *_ = run.data.batch(run.config.split, 0, [index])
    n_tokens = int((tokens[0] != run.pad).sum())
    tokens = tokens[:, :n_tokens].to(run.device)
    maps = {}
    for layer, maps_of_layer in attention_maps(run.model, tokens).items():
        for head, x in enumerate(maps_of_layer[0].cpu().numpy()):
            maps[layer, head] = x
    return maps, [run.token(token) for token in tokens[0].tolist()]


def weights_as_lists(maps):
    """{(layer, head): (T, T)} -> {"layer_0": {"head_0": T lists of T numbers}}"""
    weights = {}
    for (layer, head), x in maps.items():
        rounded = np.round(x, 4).tolist()
        weights.setdefault(f"layer_{layer}", {})[f"head_{head}"] = rounded
    return weights


def save_maps(path, maps):
    """Write {(layer, head): (T, T)} as the arrays "layer_0_head_0", ... of one .npz file."""
    arrays = {f"layer_{layer}_head_{head}": x for (layer, head), x in maps.items()}
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    atomic_write(path, lambda f: f.write(file.getvalue()))


def example_to_draw(run):
    """The index that --example names, or the first one of the batches."""
    index, split = run.config.example, run.config.split
    if index < 0:
        return int(sample_batches(run)[0][0])
    last = run.data.eval_groups(split)[-1][-1]
    message = f"example={index} is not in {split}; the last is {last}"
    require(index <= last, message, "example")
    return index


def score_heads(run, batch):
    """{"example", "layer", "head", pattern} (B * layers * H,) of one batch."""
    tables = []
    # Maps grow with the square of the tokens, so few examples are held at a time.
    size = examples_at_a_time(run.model, batch.tokens.shape[1])
    for first in range(0, len(batch.tokens), size):
        ids = batch.tokens[first : first + size]
        indices = batch.indices[first : first + size]
        for layer, weights in attention_maps(run.model, ids).items():
            B, H = weights.shape[:2]
            table = {
                "example": np.repeat(indices, H),
                "layer": np.full(B * H, layer),
                "head": np.tile(np.arange(H), B),
            }
            att = run.model.layers[layer].att
            window = getattr(getattr(att, "config", None), "window", 0)
            for name, x in pattern_scores(weights, ids, real_tokens(run, ids), window).items():
                table[name] = x.flatten().cpu().numpy()
            tables.append(table)
    return concat(tables)


def real_tokens(run, ids):
    """Which of the tokens ids (B, T) are no padding, and in MQAR no blanks (token 0).

    Every blank but the first has an earlier copy, which would count as a pattern to attend to.
    """
    real = ids != run.pad
    return real & (ids != 0) if run.settings.train.data == "data_mqar" else real


def examples_at_a_time(model, T):
    """How many examples' maps fit into MAX_WEIGHTS; at least one."""
    n_heads = getattr(getattr(model, "config", None), "n_heads", 1)
    return max(1, MAX_WEIGHTS // (len(model.layers) * n_heads * T * T))


def describe_roles(by_head, roles):
    """Which heads have which role, with the least and the largest share, as a sentence.

    roles {(layer, head): role}, by_head {"layer 0, head 0": {pattern: cell}}
    """
    heads_of = {}
    for key, role in roles.items():
        heads_of.setdefault(role.split(",")[0], []).append(key)
    parts = []
    for role, keys in heads_of.items():
        names = ", ".join(f"{layer}.{head}" for layer, head in keys)
        part = f"{role}: {names}" if len(keys) <= 4 else f"{role}: {len(keys)} of {len(roles)}"
        if role in PATTERNS:
            cells = [by_head[f"layer {layer}, head {head}"][role] for layer, head in keys]
            shares = [cell["value"] for cell in cells]
            part += f" ({min(shares):.2f} to {max(shares):.2f} of the attention)"
        parts.append(part)
    return f"what heads (layer.head) attend to: {'; '.join(parts)}"


def print_heads(by_head):
    lines = []
    for name, cells in by_head.items():
        line = [name, cells["role"]]
        for pattern in (*PATTERNS, "entropy"):
            cell = cells[pattern]
            line.append(f"{cell['value']:.3f}" if cell else "-")
        lines.append(line)
    print_table(("head", "role", *PATTERNS, "entropy (1: even)"), lines)


# ---- figures -------------------------------------------------------------------------------------


N_COLUMNS = 16  # panels of the grid in a row; a layer with more heads takes several rows
MAX_LARGE = 6  # with more heads, panels are small: a number, and the role as a colour


def draw_map(axis, weights, texts, title, n_named):
    """One head's map (T, T), with about n_named of its tokens along the axes."""
    import matplotlib.colors

    # On an even scale a weight of 1/128 would be white, and a diffuse head has no others.
    scale = matplotlib.colors.PowerNorm(0.4, vmin=0, vmax=max(1, weights.max()))
    image = axis.imshow(weights, norm=scale, cmap="Blues", interpolation="nearest")
    axis.set_title(title, fontsize=7)
    every = math.ceil(len(texts) / n_named)
    named = range(0, len(texts), every)
    labels = [texts[t] if every == 1 else f"{t}: {texts[t]}" for t in named]
    axis.set_xticks(named, labels, fontsize=5, rotation=90)
    axis.set_yticks(named, labels, fontsize=5)
    return image


def plot_grid(maps, texts, roles, title, path):
    """All maps {(layer, head): (T, T)}; the panels of a layer begin a new row."""
    n_heads = max(head for _, head in maps) + 1
    is_small = n_heads > MAX_LARGE
    n_columns = min(n_heads, N_COLUMNS)
    rows_each = math.ceil(n_heads / n_columns)
    layers = sorted({layer for layer, _ in maps})
    n_rows = rows_each * len(layers)
    plt, fig, axes = figure(n_rows, n_columns, grid=False)
    if is_small:
        fig.set_size_inches(n_columns, 1.15 * n_rows + 0.8)
    else:
        # A panel is a square map with the names of its tokens; an inch for the colour bar.
        fig.set_size_inches(3.0 * n_columns + 1, 2.9 * n_rows + 0.8)
    for axis in axes:
        axis.axis("off")
    for (layer, head), weights in maps.items():
        axis = axes[layers.index(layer) * rows_each * n_columns + head]
        axis.axis("on")
        if is_small:
            image = draw_map(axis, weights, texts, f"{layer}.{head}", 1)
            frame_by_role(axis, roles[layer, head])
        else:
            label = f"layer {layer}, head {head}\n{roles[layer, head]}"
            image = draw_map(axis, weights, texts, label, 16)
    if is_small:
        name_roles(fig, roles)
        title += "; a panel is layer.head"
    fig.colorbar(image, ax=axes, shrink=0.6, label="attention weight")
    fig.supxlabel("key (token attended to)")
    fig.supylabel("query (token that attends)")
    finish_figure(fig, plt, path, title)


def role_color(role):
    """A colour for each pattern, and for "diffuse"; gray for a mixed head."""
    names = [*PATTERNS, "diffuse"]
    return f"C{names.index(role)}" if role in names else "gray"


def frame_by_role(axis, role):
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set(color=role_color(role), linewidth=2)


def name_roles(fig, roles):
    """A legend of the colours of the roles that occur."""
    from matplotlib.lines import Line2D

    handles = {}
    for role in roles.values():
        name = role.split(",")[0]
        handles[name] = Line2D([], [], color=role_color(name), lw=3, label=name)
    fig.legend(handles=list(handles.values()), loc="outside right upper")


def plot_heads(folder, maps, texts, roles):
    """A large map for each head, in files such as attention/layer_0_head_1.png."""
    # One figure for all, because making one takes longer than the rest.
    plt, fig, (axis,) = figure(1, 1, width=6, grid=False)
    fig.set_size_inches(7.2, 6.2)
    image = draw_map(axis, next(iter(maps.values())), texts, "", 70)
    axis.set(xlabel="key (token attended to)", ylabel="query (token that attends)")
    fig.colorbar(image, ax=axis, label="attention weight")
    for (layer, head), weights in maps.items():
        image.set_data(weights)
        axis.set_title(f"layer {layer}, head {head}: {roles[layer, head]}", fontsize=7)
        write_figure(fig, plt, os.path.join(folder, f"layer_{layer}_head_{head}.png"))
        fig.set_layout_engine("none")  # it stays as it is laid out now
    say(f"wrote {folder}/layer_*_head_*.png")
