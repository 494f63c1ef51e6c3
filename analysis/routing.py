"""Which way tokens take: MLP or memory, or which slots, by kind of token, place in the row and layer.

    python eval.py routing runs/RUN                        # on the run's own rows
    python eval.py routing runs/RUN --data gsm8k.jsonl     # or on texts: "text", or "question" and "answer"

Letters: T tokens in a row, H heads, k slots that a head reads.
"""

import re

import numpy as np
import torch

from analysis.memory_usage import usage_stats
from analysis.trained_run import concat, map_batches, save_result
from nanorecall.documents import documents_in
from nanorecall.metrics import print_table
from nanorecall.plots import errorbars, figure, finish_figure
from nanorecall.rng import IGNORE_INDEX
from nanorecall.settings import require
from nanorecall.stats import format_ci, mean_proportion

FUNCTION_WORDS = set(
    "a about after all also an and any are as at be because been before both but by can could did do does each for from had "
    "has have he her his how i if in into is it its many more most much not of on one or other she so some than that the their "
    "then there they this to was we were what when where which who will with would you your".split()
)


def char_types(text):
    """A name for the kind of token that each letter of a text belongs to.

    >>> [(word, char_types(word)[0]) for word in ("7", "+", "(", ".", "Tom", "the", "apples", "USA", "aBc", " ")]
    ... # doctest: +NORMALIZE_WHITESPACE
    [('7', 'digit'), ('+', 'operator'), ('(', 'bracket'), ('.', 'punctuation'), ('Tom', 'capitalized'),
     ('the', 'function word'), ('apples', 'content word'), ('USA', 'all caps'), ('aBc', 'mixed letters'), (' ', 'blank')]
    """
    kinds = []
    for piece in re.findall(r"\n|[^\S\n]+|\d+|[^\W\d_]+|.", text):
        first = piece[0]
        if first == "\n":
            kind = "new line"
        elif first.isspace():
            kind = "blank"
        elif first.isdigit():
            kind = "digit"
        elif first.isalpha():
            kind = word_type(piece)
        else:
            groups = (
                ("operator", "+-*/<>^%×÷"),
                ("equals sign", "="),
                ("bracket", "()[]{}"),
                ("quote", "'\"`"),
                ("colon", ":"),
            )
            kind = next((name for name, letters in groups if first in letters), "punctuation")
        kinds += [kind] * len(piece)
    return kinds


def word_type(word):
    if word.lower() in FUNCTION_WORDS and word.islower():
        return "function word"
    if word.isupper() and len(word) > 1:
        return "all caps"
    if word.islower():
        return "content word"
    return "capitalized" if word[0].isupper() and (word[1:].islower() or len(word) == 1) else "mixed letters"


def token_types(run, ids):
    """tokens (T,) -> their kinds, by the first letter that each spells; of data without letters, that of the token's number."""
    if not hasattr(run.data, "tokenizer"):
        half = run.data.vocab_size // 2  # MQAR: 0 is blank, keys come before values
        return ["blank" if i == 0 else "key" if i < half else "value" for i in ids]
    spelled = [run.data.tokenizer.token_strings[int(i)] for i in ids]
    letters, at, kinds = char_types("".join(spelled)), 0, []
    for piece in spelled:
        # " the" is a word, not a blank: leading blanks of a token do not decide.
        skip = len(piece) - len(piece.lstrip()) if piece.strip() else 0
        kinds.append(letters[at + skip] if piece else "special")
        at += len(piece)
    return kinds


def routing_table(run, batch):
    """At each token and memory layer: kind of token, decile of its place, memory's share (nan without a router), slots."""
    *_, found = run.model(batch.tokens, trace=True)
    ids = batch.tokens.cpu().numpy()
    real = ids != run.pad
    parts = []
    for b in range(len(ids)):
        mine = ids[b][real[b]]
        kinds, decile = np.array(token_types(run, mine)), 10 * np.arange(len(mine)) // len(mine)
        for layer, f in zip(run.model.memory_layers(), found):
            n, slots = len(mine), f["slots"][b].flatten(1).cpu().numpy()[real[b]]  # (tokens, H * k)
            route = f["route"][b, :, 1].float().cpu().numpy()[real[b]] if "route" in f else np.full(n, np.nan, np.float32)
            cells = {"row": np.full(n, batch.rows[b]), "layer": np.full(n, layer), "position": np.arange(n), "token": mine}
            parts.append({**cells, "kind": kinds.astype("U16"), "decile": decile, "memory": route, "slots": slots})
    return concat(parts)


def routing(run):
    """MLP or memory by kind of token, place in the row and layer; without a router, how the slots of kinds differ."""
    if run.config.data:
        found = over_texts(run, run.config.data)
    else:
        found = map_batches(run, lambda batch: routing_table(run, batch))
    router = not np.isnan(found["memory"]).all()
    size = run.model.config.mem_n_keys**2
    if router:
        measured = lambda mine: mean_proportion(found["memory"][mine])
    else:
        measured = lambda mine: usage_stats(found["slots"][mine].ravel(), size)
    by_slice = {name: {} for name in ("layer and kind", "layer and decile")}
    for layer in np.unique(found["layer"]):
        for name, column in (("layer and kind", "kind"), ("layer and decile", "decile")):
            for value in np.unique(found[column]):
                mine = (found["layer"] == layer) & (found[column] == value)
                if mine.any():
                    by_slice[name][f"{layer}, {value}"] = {**measured(mine), "n": int(mine.sum())}
    alike = {str(layer): similarity_of_kinds(found, layer, size) for layer in np.unique(found["layer"])}
    steady = consistency(found)
    if run.world.is_main:
        print_routing(by_slice, steady, router, size)
    metrics = {
        "what": "memory's share" if router else "slots",
        "data": run.config.data or run.config.split,
        "consistency": steady,
    }
    columns = {k: v for k, v in found.items() if k != "slots"} | {"slots": list(found["slots"])}
    plot = lambda path: plot_routing(path, found, by_slice, alike, steady, router, run.name)
    save_result(run, "routing", metrics, by_slice, (), columns, plot)


def over_texts(run, path):
    """`routed` over the documents of a .jsonl or .parquet file, each cut to what the model can read."""
    require(hasattr(run.data, "tokenizer"), f"data={path} is text, and {run.settings.train.data} has numbers", "data")
    c, tokenizer, texts = run.config, run.data.tokenizer, []
    for text, _ in documents_in(path, 10**9):
        texts.append(text if isinstance(text, str) else "".join(text))
        if c.rows and len(texts) == c.rows:
            break
    require(texts, f"{path} holds no documents", "data")
    whole = [np.concatenate([[tokenizer.bos], tokenizer.encode(t)]).astype(np.int64) for t in texts]
    ids = [x[: run.data.seq_len] for x in whole]
    read, there = (sum(map(len, some)) for some in (ids, whole))
    if read < there:
        run.world.print0(f"{path}: {read} of {there} tokens are read, the first {run.data.seq_len} of each text (seq_len)")

    def read(rows):
        tokens = torch.full((len(rows), max(len(ids[i]) for i in rows)), run.pad)
        for b, i in enumerate(rows):
            tokens[b, : len(ids[i])] = torch.from_numpy(ids[i])
        return tokens, torch.full_like(tokens, IGNORE_INDEX), {}

    rows = np.array_split(np.arange(len(ids)), -(-len(ids) // c.eval_batch_size))
    return map_batches(run, lambda batch: routing_table(run, batch), rows, read)


def similarity_of_kinds(found, layer, size):
    """Names of kinds of tokens, and the cosine between the slots that two of them read, (kinds, kinds)."""
    kinds = [k for k in np.unique(found["kind"]) if ((found["kind"] == k) & (found["layer"] == layer)).sum() >= 5]
    if not kinds:
        return [], np.zeros((0, 0))
    counts = np.array(
        [np.bincount(found["slots"][(found["kind"] == k) & (found["layer"] == layer)].ravel(), minlength=size) for k in kinds],
        float,
    )
    # Lengths one: a kind of many tokens is no more alike to others for having read more.
    counts /= np.linalg.norm(counts, axis=1, keepdims=True)
    return kinds, counts @ counts.T


def consistency(found, pairs=2000):
    """Do similar tokens take the same way?

    -> {layer: {pair: {"slots in common": Jaccard's share, "difference of shares" (of memory, with a router)}}}, where a pair is
    two tokens of two rows: the same token, two of one kind, two of different kinds.
    """
    random, out = np.random.default_rng(0), {}
    for layer in np.unique(found["layer"]):
        mine = np.flatnonzero(found["layer"] == layer)
        # Two tokens drawn at random are seldom the same one, so many more are drawn than are used. Two of one row share what
        # they attend to, so they would be alike for another reason.
        a, b = (random.choice(mine, 60 * pairs) for _ in range(2))
        a, b = a[found["row"][a] != found["row"][b]], b[found["row"][a] != found["row"][b]]
        token, kind = found["token"][a] == found["token"][b], found["kind"][a] == found["kind"][b]
        cells = {}
        for name, which in (("same token", token), ("same kind", kind & ~token), ("other kind", ~kind)):
            i, j = a[which][:pairs], b[which][:pairs]
            if len(i) < 20:  # too few for an interval
                continue
            common = [len(np.intersect1d(x, y)) / len(np.union1d(x, y)) for x, y in zip(found["slots"][i], found["slots"][j])]
            cells[name] = {"slots in common": mean_proportion(common)}
            if not np.isnan(found["memory"]).all():
                cells[name]["difference of shares"] = mean_proportion(np.abs(found["memory"][i] - found["memory"][j]))
        out[str(layer)] = cells
    return out


def print_routing(by_slice, steady, router, size):
    for name, cells in by_slice.items():
        if router:
            print_table((name, "tokens", "memory's share", "95% interval"), [(k, *format_ci(c)) for k, c in cells.items()])
        else:
            head = (name, "tokens", "slots used", f"of {size}", "effective")
            print_table(head, [(k, c["n"], c["used"], f"{c['share']:.1%}", f"{c['effective']:.0f}") for k, c in cells.items()])
        print()
    rows = [
        (layer, pair, what, *format_ci(c)) for layer, cells in steady.items() for pair, m in cells.items() for what, c in m.items()
    ]
    print_table(("layer", "two tokens", "measure", "pairs", "mean", "95% interval"), rows)


def plot_routing(path, found, by_slice, alike, steady, router, title):
    layers = list(alike)
    n_columns = 3 if len(layers) <= 3 else 3 + len(layers) // 2
    plt, fig, axes = figure(2, n_columns, width=4.6, grid=False)
    for axis in axes[3 + len(layers) :]:
        axis.axis("off")
    for axis, name, label in ((axes[0], "layer and kind", "kind of token"), (axes[1], "layer and decile", "tenth of the row")):
        values = list(dict.fromkeys(k.split(", ", 1)[1] for k in by_slice[name]))
        for layer in layers:
            cells = {values.index(k.split(", ", 1)[1]): c for k, c in by_slice[name].items() if k.split(", ", 1)[0] == layer}
            if router:
                errorbars(axis, list(cells), list(cells.values()), label=f"layer {layer}")
            else:
                axis.plot(list(cells), [c["effective"] for c in cells.values()], "o-", ms=4, label=f"layer {layer}")
        turned = {"rotation": 45, "ha": "right"} if axis is axes[0] else {}
        axis.set_xticks(range(len(values)), values, fontsize=7, **turned)
        axis.set(xlabel=label, ylabel="memory's share (95%)" if router else "effective number of slots")
        axis.set_ylim((-0.02, 1.02) if router else (0, 1.1 * axis.get_ylim()[1]))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    for layer, cells in steady.items():
        errorbars(axes[2], range(len(cells)), [c["slots in common"] for c in cells.values()], label=f"layer {layer}")
        axes[2].set_xticks(range(len(cells)), list(cells))
    axes[2].set(xlabel="two tokens of two rows", ylabel="slots in common (Jaccard, 95%)", ylim=(-0.02, 1.02))
    if any(steady.values()):
        axes[2].legend(fontsize=7)
    for axis, layer in zip(axes[3:], layers):
        kinds, cosine = alike[layer]
        drawn = axis.imshow(cosine, vmin=0, vmax=1, cmap="viridis")
        axis.set_xticks(range(len(kinds)), kinds, rotation=45, ha="right", fontsize=7)
        axis.set_yticks(range(len(kinds)), kinds, fontsize=7)
        axis.set_title(f"layer {layer}: cosine of the slots read", fontsize=8)
        fig.colorbar(drawn, ax=axis, shrink=0.8)
    finish_figure(fig, plt, path, f"{title}, {len(found['kind']) // len(layers)} tokens of {len(np.unique(found['row']))} rows")
