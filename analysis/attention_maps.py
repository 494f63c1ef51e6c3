"""Where the heads of a model look: their maps, and a label for what each one does.

    python eval.py attention runs/RUN                # a map per head for one row, and what each head does on average
    python eval.py attention runs/RUN --example 3

Letters: B rows, T tokens, H heads.
"""

import os

import numpy as np
import torch

from analysis.trained_run import batches, concat, ending, map_batches, save_result
from nanorecall.checkpoint import make_directory
from nanorecall.metrics import in_eval_mode, print_table
from nanorecall.ops import attention_weights, softmax_attention
from nanorecall.plots import figure, finish_figure, write_figure
from nanorecall.settings import require, say
from nanorecall.stats import mean_proportion

PATTERNS = {  # does a weight from token t on token s count? (tokens (B, T), t (T, 1), s (1, T)) -> (B, T, T) or (T, T) bool
    "previous token": lambda ids, t, s: s == t - 1,
    "2 to 8 back": lambda ids, t, s: (s < t - 1) & (s >= t - 8),
    "itself": lambda ids, t, s: s == t,
    "first token": lambda ids, t, s: (s == 0) & (t > 1),
    # the token after an earlier one like this: copies what followed (Olsson et al. 2022, arXiv 2209.11895)
    "induction": lambda ids, t, s: (previous_tokens(ids)[:, None, :] == ids[:, :, None]) & (s < t + 1) & (s > 0) & (s != t),
    "same token": lambda ids, t, s: (ids[:, None, :] == ids[:, :, None]) & (s < t),
}


def previous_tokens(ids):
    """Each place holds the token before it; -1 before the first."""
    return torch.cat([torch.full_like(ids[:, :1], -1), ids[:, :-1]], dim=1)


@in_eval_mode
def attention_maps(model, tokens, cu_seqlens=None):
    """Attention weights: tokens (B, T) -> {block: (B, H, T, T)}.

    ValueError if a block has no attention, or one whose output is no weighted sum of values.
    """
    if why_no_mixer(model):
        raise ValueError(why_no_mixer(model))
    caught = {}

    def watching(i, attend):
        def attend_and_keep(q, k, v, *more, **options):
            o = attend(q, k, v, *more, **options)
            caught.setdefault(i, []).append((q, k, v, o, attend, more, options))
            return o

        return attend_and_keep

    mixers = [layer.att for layer in model.layers]
    own = [{k: f for k, f in vars(mixer).items() if k == "attention_fn"} for mixer in mixers]
    try:
        for i, mixer in enumerate(mixers):
            vars(mixer)["attention_fn"] = watching(i, mixer.attention_fn)
        model(tokens, *(() if cu_seqlens is None else (None, cu_seqlens)))
    finally:
        for mixer, before in zip(mixers, own):
            vars(mixer).pop("attention_fn", None)
            vars(mixer).update(before)
    for i in range(len(mixers)):
        calls = len(caught.get(i, ()))
        if calls != 1:
            raise ValueError(f"block {i} called its attention_fn {calls} times, so it has no one map")
    return {i: weights_of(i, *calls[0]) for i, calls in sorted(caught.items())}


def weights_of(block, q, k, v, o, attend, more, options):
    """The weights (B, H, T, T) of one call o = attend(q, k, v, *more, **options)."""
    documents = options.get("documents", more[1] if len(more) > 1 else None)
    if attend is softmax_attention:
        return attention_weights(q, k, documents)
    # Whatever gives sums of values gives its weights when value s is 1 in feature s, else 0.
    B, G, T, _ = v.shape
    each = torch.eye(T, device=v.device).expand(B, G, T, T)
    with torch.autocast(v.device.type, enabled=False):
        weights = attend(q.float(), k.float(), each, *more, **options)
    if weights.shape == (*o.shape[:3], T):
        sums = weights @ v.float().repeat_interleave(o.shape[1] // G, dim=1)
        if sums.shape == o.shape and close(sums, o):
            return weights
    raise ValueError(f"what block {block} attends with is no weighted sum of its values")


def close(x, y):
    """Are they equal but for the rounding of y's dtype?"""
    y, rounding = y.float(), 30 * torch.finfo(y.dtype).eps
    return bool((x - y).abs().max() <= rounding * (1 + y.abs().max()))


def nanmean_ci(x):
    """Mean and interval of what is not nan, shares; None if all is."""
    return mean_proportion(x[~np.isnan(x)]) if (~np.isnan(x)).any() else None


def why_no_mixer(model):
    """Why a model has no mixers to watch, or ""."""
    layers = getattr(model, "layers", ())
    layers = layers if isinstance(layers, torch.nn.ModuleList) else ()
    if len(layers) and all(getattr(getattr(layer, "att", None), "attention_fn", None) for layer in layers):
        return ""
    return "attention maps need softmax attention in every block, as in gpt, unified_kv and memory"


def why_not_maps(model):
    """Why a model has no maps, or "": found out by drawing those of a few tokens."""
    config = getattr(model, "config", None)
    T, size = min(4, getattr(config, "seq_len", 4)), getattr(config, "vocab_size", 1)
    tokens = torch.arange(T, device=next(model.parameters()).device)[None] % size
    try:
        least = min(w.min() for w in attention_maps(model, tokens).values())
    except ValueError as e:
        return str(e)
    return "" if least >= 0 else "weights of its attention are below 0, so they are no shares"


def pattern_scores(weights, ids, real):
    """What share of its attention a head gives to each pattern, averaged over the tokens of a row that could do it.

    weights (B, H, T, T), ids (B, T), real (B, T) bool: no padding -> {pattern: (B, H)}, nan where no token could; and "entropy"
    over that of even attention, 1 for a head that looks everywhere alike.
    """
    t = torch.arange(ids.shape[1], device=ids.device)
    total = weights.sum(-1, keepdim=True)  # 1 with softmax; other attention may have any
    weights = torch.where((total - 1).abs() < 1e-4, weights, weights / total.clamp(min=1e-30))
    found = {}
    for name, pattern in PATTERNS.items():
        hit = pattern(ids, t[:, None], t[None]).expand(len(ids), -1, -1)  # (B, T, T)
        could = hit.any(-1) & real & (t > 0)  # at the first token there is nothing to choose
        given = (weights * hit[:, None]).sum(-1)  # (B, H, T)
        found[name] = (given * could[:, None]).sum(-1) / could.sum(-1)[:, None]
    entropy = -(weights * weights.clamp(min=1e-30).log()).sum(-1)[:, :, 1:] / (t[1:] + 1.0).log()  # (B, H, T - 1)
    there = real[:, None, 1:]
    found["entropy"] = (entropy * there).sum(-1) / there.sum(-1)
    return found


def head_role(cell):
    """{pattern: mean} of one head -> what it does, in a word: the strongest pattern, if it has 40% of the attention and that is
    not just what even attention would give."""
    best = max((name for name in PATTERNS if not np.isnan(cell[name])), key=lambda name: cell[name])
    if cell["entropy"] >= 0.85:
        return "diffuse"
    if cell[best] >= 0.4:
        return best
    return f"mixed, most to: {best}" if cell[best] >= 0.2 else "mixed"


def attention(run):
    """Maps of one row, and what each head does over all rows looked at."""

    def work(batch):
        real, parts = batch.tokens != run.pad, []
        for layer, weights in attention_maps(run.model, batch.tokens).items():
            B, H = weights.shape[:2]
            about = {"row": np.repeat(batch.rows, H), "layer": np.full(B * H, layer), "head": np.tile(np.arange(H), B)}
            measured = pattern_scores(weights, batch.tokens, real)
            parts.append(about | {name: x.flatten().cpu().numpy() for name, x in measured.items()})
        return concat(parts)

    found = map_batches(run, work)
    by_head = {}
    for layer, head in sorted({*zip(found["layer"].tolist(), found["head"].tolist())}):
        mine = (found["layer"] == layer) & (found["head"] == head)
        cell = {name: nanmean_ci(found[name][mine]) for name in [*PATTERNS, "entropy"]}
        means = {name: c["value"] if c else np.nan for name, c in cell.items()}
        by_head[f"layer {layer}, head {head}"] = {"does": head_role(means), **cell}
    row = example_row(run)
    tokens, targets, *_ = run.data.batch(run.config.split, 0, [row])
    tokens = tokens[:, : int((tokens[0] != run.pad).sum())].to(run.device)
    drawn = {layer: w[0].cpu().numpy() for layer, w in attention_maps(run.model, tokens).items()}
    texts = [run.token(i) for i in tokens[0].tolist()]
    if run.world.is_main:
        numbers = ([f"{c[p]['value']:.3f}" if c[p] else "-" for p in [*PATTERNS, "entropy"]] for c in by_head.values())
        lines = [(name, c["does"], *n) for (name, c), n in zip(by_head.items(), numbers)]
        print_table(("head", "does", *PATTERNS, "entropy (1: even)"), lines)
    weights = {f"layer_{layer}": {f"head_{h}": np.round(m, 4).tolist() for h, m in enumerate(w)} for layer, w in drawn.items()}
    example = {"row": int(row), "tokens": texts, "weights": weights}
    n = len(np.unique(found["row"]))
    title = f"{run.name}: maps of row {row}; what heads do, over {n} rows"
    plot = lambda path: plot_grid(path, drawn, texts, by_head, title)
    save_result(run, "attention", {"rows": n}, {"head": by_head}, [example], found, plot)
    if run.world.is_main:
        plot_heads(os.path.join(run.folder, "attention" + ending(run, "attention")), drawn, texts, by_head)


def example_row(run):
    """The row that --example names, or the first one looked at."""
    if run.config.example < 0:
        return int(batches(run)[0][0])
    last = run.data.eval_groups(run.config.split)[-1][-1]
    message = f"example={run.config.example} is no row of {run.config.split}; the last is {last}"
    require(run.config.example <= last, message, "example")
    return run.config.example


def draw_map(axis, weights, texts, title):
    """One head's map; every token is named where there is room."""
    drawn = axis.imshow(weights, vmin=0, vmax=max(1, weights.max()), cmap="Blues")
    axis.set_title(title, fontsize=7)
    if len(texts) <= 40:
        axis.set_xticks(range(len(texts)), texts, fontsize=5, rotation=90)
        axis.set_yticks(range(len(texts)), texts, fontsize=5)
    return drawn


def plot_grid(path, maps, texts, by_head, title):
    """A row of maps for each layer."""
    plt, fig, axes = figure(len(maps), max(len(w) for w in maps.values()), width=3.0, grid=False)
    cells = [(layer, h, m) for layer, w in maps.items() for h, m in enumerate(w)]
    for axis, (layer, h, m) in zip(axes, cells):
        drawn = draw_map(axis, m, texts, f"layer {layer}, head {h}: {by_head[f'layer {layer}, head {h}']['does']}")
    for axis in axes[len(cells) :]:
        axis.axis("off")
    fig.colorbar(drawn, ax=axes, shrink=0.6, label="attention weight")
    fig.supxlabel("token looked at", fontsize=8)
    fig.supylabel("token that looks", fontsize=8)
    finish_figure(fig, plt, path, title)


def plot_heads(folder, maps, texts, by_head):
    """A large map for each head: attention/layer_0_head_1.png and so on."""
    make_directory(folder)
    for layer, weights in maps.items():
        for h, m in enumerate(weights):
            plt, fig, (axis,) = figure(1, 1, width=6, grid=False)
            fig.set_size_inches(6.4, 5.6)
            drawn = draw_map(axis, m, texts, f"layer {layer}, head {h}: {by_head[f'layer {layer}, head {h}']['does']}")
            axis.set(xlabel="token looked at", ylabel="token that looks")
            fig.colorbar(drawn, ax=axis, label="attention weight")
            write_figure(fig, plt, os.path.join(folder, f"layer_{layer}_head_{h}.png"))
    say(f"wrote {folder}/layer_*_head_*.png")
