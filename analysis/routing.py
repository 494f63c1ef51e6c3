"""Which path tokens take: MLP or memory, or which slots, by kind of token, position and layer.

    python eval.py routing runs/RUN                        # on the run's own examples
    python eval.py routing runs/RUN --data gsm8k.jsonl     # or on texts: "text", or "question"
                                                           # and "answer"

A table of routes has one entry for each token and memory layer.
Letters: R entries of the table, T tokens, H heads, k slots that a head reads.
"""

import math
import re

import numpy as np
import torch

from analysis.memory_usage import require_slots, usage_stats
from analysis.trained_run import concat, map_batches, save_result
from nanorecall.documents import documents_in
from nanorecall.metrics import print_table
from nanorecall.plots import errorbars, figure, finish_figure
from nanorecall.rng import IGNORE_INDEX
from nanorecall.settings import require
from nanorecall.stats import format_ci, mean_proportion

# ---- kinds of tokens -----------------------------------------------------------------------------

FUNCTION_WORDS = set(
    "a about after all also an and any are as at be because been before both but by can could did "
    "do does each for from had has have he her his how i if in into is it its many more most much "
    "not of on one or other she so some than that the their then there they this to was we were "
    "what when where which who will with would you your".split()
)
SYMBOLS = {
    "operator": "+-*/<>^%×÷",
    "equals sign": "=",
    "bracket": "()[]{}",
    "quote": "'\"`",
    "colon": ":",
}


def char_types(text):
    """For each character of a text the kind of token that it belongs to.

    >>> for text in ("7", "+", "(", ".", "Tom", "the", "apples", "USA", "aBc", " "):
    ...     print(repr(text), char_types(text)[0])
    '7' digit
    '+' operator
    '(' bracket
    '.' punctuation
    'Tom' capitalized
    'the' function word
    'apples' content word
    'USA' all caps
    'aBc' mixed letters
    ' ' blank
    """
    types = []
    for token in re.findall(r"\n|[^\S\n]+|\d+|[^\W\d_]+|.", text):
        types += [token_type(token)] * len(token)
    return types


def token_type(token):
    """The kind of a run of blanks, digits or letters, or of another character."""
    first = token[0]
    if first == "\n":
        return "new line"
    if first.isspace():
        return "blank"
    if first.isdigit():
        return "digit"
    if first.isalpha():
        return word_type(token)
    for name, characters in SYMBOLS.items():
        if first in characters:
            return name
    return "punctuation"


def word_type(word):
    if word in FUNCTION_WORDS:
        return "function word"
    if word.isupper() and len(word) > 1:
        return "all caps"
    if word.islower():
        return "content word"
    rest_is_lower = word[1:].islower() or len(word) == 1
    return "capitalized" if word[0].isupper() and rest_is_lower else "mixed letters"


def token_types(run, ids):
    """tokens (T,) -> their kinds, by the first character of each; without text, by number."""
    if not hasattr(run.data, "tokenizer"):
        return [mqar_type(i, run.data.vocab_size) for i in ids]
    texts = [run.data.tokenizer.token_strings[int(i)] for i in ids]
    types_of_chars = char_types("".join(texts))
    types, start = [], 0
    for text in texts:
        # The token " the" is a word. Its leading blank does not decide.
        n_blanks = len(text) - len(text.lstrip()) if text.strip() else 0
        types.append(types_of_chars[start + n_blanks] if text else "special")
        start += len(text)
    return types


def mqar_type(token, vocab_size):
    """In MQAR token 0 is blank, and keys come before values."""
    if token == 0:
        return "blank"
    return "key" if token < vocab_size // 2 else "value"


# ---- the table of routes -------------------------------------------------------------------------


def routing_table(run, batch):
    """The table of routes of one batch, without padding: {column: (R,)}, "slots" (R, H * k).

    kind: of the token; decile: tenth of the example, 0 to 9; memory: the router's weight of the
    memory, nan without a router; slots: those that the token reads.
    """
    *_, trace = run.model(batch.tokens, trace=True)
    ids = batch.tokens.cpu().numpy()
    tables = []
    for b, index in enumerate(batch.indices):
        real = ids[b] != run.pad
        token = ids[b][real]
        n = len(token)
        for layer, reads in zip(run.model.memory_layers(), trace):
            memory = np.full(n, np.nan, np.float32)
            if "route" in reads:
                memory = reads["route"][b, :, 1].float().cpu().numpy()[real]
            table = {
                "example": np.full(n, index),
                "layer": np.full(n, layer),
                "position": np.arange(n),
                "token": token,
                "kind": np.array(token_types(run, token)).astype("U16"),
                "decile": 10 * np.arange(n) // n,
                "memory": memory,
                "slots": reads["slots"][b].flatten(1).cpu().numpy()[real],
            }
            tables.append(table)
    return concat(tables)


def route_texts(run, path):
    """The table of routes of a .jsonl or .parquet file, each document cut to the model's length."""
    config, seq_len = run.config, run.data.seq_len
    message = f"data={path} is text, and {run.settings.train.data} has numbers"
    require(hasattr(run.data, "tokenizer"), message, "data")
    tokenizer = run.data.tokenizer
    documents, n_tokens, n_read = [], 0, 0
    for text, _ in documents_in(path, 10**9):
        text = text if isinstance(text, str) else "".join(text)
        ids = np.concatenate([[tokenizer.bos], tokenizer.encode(text)]).astype(np.int64)
        documents.append(ids[:seq_len])
        n_tokens += len(ids)
        n_read += len(documents[-1])
        if len(documents) == config.n_examples:  # 0: all
            break
    require(documents, f"{path} holds no documents", "data")
    if n_read < n_tokens:
        cut = f"the first {seq_len} of each text (seq_len)"
        run.world.print0(f"{path}: {n_read} of {n_tokens} tokens are read, {cut}")

    def read(indices):
        longest = max(len(documents[i]) for i in indices)
        tokens = torch.full((len(indices), longest), run.pad)
        for b, i in enumerate(indices):
            tokens[b, : len(documents[i])] = torch.from_numpy(documents[i])
        return tokens, torch.full_like(tokens, IGNORE_INDEX), {}

    n_batches = math.ceil(len(documents) / config.eval_batch_size)
    batches = np.array_split(np.arange(len(documents)), n_batches)
    return map_batches(run, lambda batch: routing_table(run, batch), batches, read)


# ---- the analysis --------------------------------------------------------------------------------


def routing(run):
    """MLP or memory by kind of token, position and layer; without a router, slots read by these."""
    require_slots(run)
    if run.config.data:
        table = route_texts(run, run.config.data)
    else:
        table = map_batches(run, lambda batch: routing_table(run, batch))
    has_router = not np.isnan(table["memory"]).all()
    size = run.model.config.mem_n_keys**2
    by_slice = {}
    for column in ("kind", "decile"):
        cells = by_slice[f"layer, {column}"] = {}
        for layer in np.unique(table["layer"]):
            for value in np.unique(table[column]):
                mask = (table["layer"] == layer) & (table[column] == value)
                if not mask.any():
                    continue
                if has_router:
                    cell = mean_proportion(table["memory"][mask])
                else:
                    cell = usage_stats(table["slots"][mask].ravel(), size)
                cells[f"{layer}, {value}"] = {**cell, "n": int(mask.sum())}
    similarities = {}
    for layer in np.unique(table["layer"]):
        similarities[str(layer)] = similarity_of_kinds(table, layer, size)
    consistencies = consistency(table)
    if run.world.is_main:
        print_routing(by_slice, consistencies, has_router, size)
    metrics = {
        "what": "weight of memory" if has_router else "slots",
        "data": run.config.data or run.config.split,
        "consistency": consistencies,
    }
    columns = {**table, "slots": list(table["slots"])}

    def plot(path):
        n_tokens = len(table["kind"]) // len(similarities)
        n_examples = len(np.unique(table["example"]))
        title = f"{run.name}, {n_tokens} tokens of {n_examples} examples"
        plot_routing(path, by_slice, similarities, consistencies, has_router, title)

    save_result(run, "routing", metrics, by_slice, (), columns, plot)


def similarity_of_kinds(table, layer, size):
    """Kinds of token, and the cosine similarity (kinds, kinds) of the slots that they read."""
    in_layer = table["layer"] == layer
    kinds, counts = [], []
    for kind in np.unique(table["kind"]):
        mask = in_layer & (table["kind"] == kind)
        if mask.sum() >= 5:
            kinds.append(kind)
            counts.append(np.bincount(table["slots"][mask].ravel(), minlength=size))
    counts = np.array(counts, float).reshape(len(kinds), size)
    # To length 1, because kinds of many tokens read more.
    counts /= np.linalg.norm(counts, axis=1, keepdims=True)
    return kinds, counts @ counts.T


def consistency(table, n_pairs=2000):
    """Do similar tokens take the same path?

    -> {layer: {pair: {"slots in common", "difference of weights"}}}. A pair is two tokens of two
    examples: the same token, two of one kind, or two of different kinds. The slots in common are
    Jaccard's index; the weights are those that a router gives to memory.
    """
    rng = np.random.default_rng(0)
    example, has_router = table["example"], not np.isnan(table["memory"]).all()
    found = {}
    for layer in np.unique(table["layer"]):
        in_layer = np.flatnonzero(table["layer"] == layer)
        # Two random tokens are rarely the same, so many more are drawn than are used.
        a, b = rng.choice(in_layer, 60 * n_pairs), rng.choice(in_layer, 60 * n_pairs)
        # Tokens of one example attend to the same tokens, which would make them similar.
        apart = example[a] != example[b]
        a, b = a[apart], b[apart]
        same_token = table["token"][a] == table["token"][b]
        same_kind = table["kind"][a] == table["kind"][b]
        pairs = {
            "same token": same_token,
            "same kind": same_kind & ~same_token,
            "other kind": ~same_kind,
        }
        cells = found[str(layer)] = {}
        for name, mask in pairs.items():
            i, j = a[mask][:n_pairs], b[mask][:n_pairs]
            if len(i) < 20:  # too few for an interval
                continue
            common = [jaccard(x, y) for x, y in zip(table["slots"][i], table["slots"][j])]
            cells[name] = {"slots in common": mean_proportion(common)}
            if has_router:
                difference = np.abs(table["memory"][i] - table["memory"][j])
                cells[name]["difference of weights"] = mean_proportion(difference)
    return found


def jaccard(x, y):
    """Size of the intersection of two sets, divided by that of their union."""
    return len(np.intersect1d(x, y)) / len(np.union1d(x, y))


def print_routing(by_slice, consistencies, has_router, size):
    for name, cells in by_slice.items():
        lines = []
        for value, cell in cells.items():
            if has_router:
                lines.append((value, *format_ci(cell)))
            else:
                usage = (cell["used"], f"{cell['fraction']:.1%}", f"{cell['effective']:.0f}")
                lines.append((value, cell["n"], *usage))
        usage = ("slots used", f"of {size}", "effective")
        head = ("weight of memory", "95% interval") if has_router else usage
        print_table((name, "tokens", *head), lines)
        print()
    lines = []
    for layer, pairs in consistencies.items():
        for pair, measures in pairs.items():
            for measure, cell in measures.items():
                lines.append((layer, pair, measure, *format_ci(cell)))
    print_table(("layer", "two tokens", "measure", "pairs", "mean", "95% interval"), lines)


# ---- figure --------------------------------------------------------------------------------------


def plot_routing(path, by_slice, similarities, consistencies, has_router, title):
    """Routes by kind and by decile, consistency, and the similarity of kinds in each layer."""
    layers = list(similarities)
    n_columns = 3 if len(layers) <= 3 else 3 + len(layers) // 2
    plt, fig, axes = figure(2, n_columns, width=4.6, grid=False)
    kinds_axis, deciles_axis, pairs_axis, *heat_maps = axes
    plot_by_layer(kinds_axis, by_slice["layer, kind"], layers, has_router)
    kinds_axis.set_xlabel("kind of token")
    plt.setp(kinds_axis.get_xticklabels(), rotation=45, ha="right")
    plot_by_layer(deciles_axis, by_slice["layer, decile"], layers, has_router)
    deciles_axis.set_xlabel("tenth of the example")
    plot_consistency(pairs_axis, consistencies)
    for axis, layer in zip(heat_maps, layers):
        kinds, cosine = similarities[layer]
        image = axis.imshow(cosine, vmin=0, vmax=1, cmap="viridis")
        axis.set_xticks(range(len(kinds)), kinds, rotation=45, ha="right")
        axis.set_yticks(range(len(kinds)), kinds)
        axis.set_title(f"layer {layer}: cosine of the slots read")
        fig.colorbar(image, ax=axis, shrink=0.8)
    for axis in heat_maps[len(layers) :]:
        axis.axis("off")
    finish_figure(fig, plt, path, title)


def plot_by_layer(axis, cells, layers, has_router):
    """cells {"layer, value": cell}: weight of memory or effective number of slots, by layer."""
    values = list(dict.fromkeys(key.split(", ", 1)[1] for key in cells))
    for layer in layers:
        x, of_layer = [], []
        for i, value in enumerate(values):
            if f"{layer}, {value}" in cells:
                x.append(i)
                of_layer.append(cells[f"{layer}, {value}"])
        if has_router:
            errorbars(axis, x, of_layer, label=f"layer {layer}")
        else:
            effective = [cell["effective"] for cell in of_layer]
            axis.plot(x, effective, "o-", ms=4, label=f"layer {layer}")
    axis.set_xticks(range(len(values)), values)
    if has_router:
        axis.set(ylabel="weight of memory (95%)", ylim=(-0.02, 1.02))
    else:
        axis.set(ylabel="effective number of slots", ylim=(0, 1.1 * axis.get_ylim()[1]))
    axis.grid(True)
    axis.legend()


def plot_consistency(axis, consistencies):
    """Slots in common of pairs of tokens."""
    for layer, pairs in consistencies.items():
        cells = [measures["slots in common"] for measures in pairs.values()]
        errorbars(axis, range(len(cells)), cells, label=f"layer {layer}")
        axis.set_xticks(range(len(cells)), list(pairs))
    axis.set(xlabel="two tokens of two examples", ylabel="slots in common (Jaccard, 95%)")
    axis.set_ylim(-0.02, 1.02)
    if any(consistencies.values()):
        axis.legend()
