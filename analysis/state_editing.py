"""Edit pairs of MQAR in the context: in the state or the cache of a model that has read them.

    python eval.py edit runs/RUN
    python eval.py edit runs/RUN --n_edits "[1,2,4]" --num_kv_pairs "[8,16,32]"

The model reads the pairs of a sequence, some of them get new values (state_editors.py), and it goes
on from there with the queries.

Efficacy: edited pairs are answered with their new value. Specificity: other pairs that were
answered correctly keep their answer.

Letters: B sequences, T tokens, t tokens up to the first query, N pairs of a sequence, n edited.
"""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from analysis.hooks import select_positions
from analysis.state_editors import (
    EDITORS,
    Edit,
    ask_alone,
    conv_width,
    entry_name,
    memory_kind,
    read,
)
from analysis.trained_run import (
    combine_columns,
    concat,
    require_decoding,
    require_single_process,
    save_result,
    select,
)
from data_mqar import min_length
from nanorecall.distributed import now
from nanorecall.metrics import autocast, evaluating, print_table
from nanorecall.plots import errorbars, figure, finish_figure
from nanorecall.rng import IGNORE_INDEX
from nanorecall.settings import require, say
from nanorecall.stats import clustered_proportion, format_ci

N_SEQUENCES = 200  # of each size; enough for intervals of one point
METRICS = {
    "efficacy": "edited pairs, new value",
    "unchanged": "edited pairs, old value",
    "specificity": "other pairs that were correct, old value",
}
COSINES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 1.0)  # edges of the bins


@dataclass
class Sequences:
    indices: np.ndarray  # (B,) in the split
    tokens: torch.Tensor  # (B, T)
    stored_len: int  # tokens of pairs and noise, before the first query
    label_pos: torch.Tensor  # (B, N)
    answers: torch.Tensor  # (B, N)
    value_pos: torch.Tensor  # (B, N), where these answers are stored
    n_editable: int  # the number of pairs that may be edited: those that are stored first

    @property
    def stored(self):
        return self.tokens[:, : self.stored_len]


@dataclass(frozen=True)
class Place:
    """Where a model recalls pairs: in the state or the cache of a block."""

    kind: str  # of EDITORS: state or cache
    block: int
    offset: int  # cache: tokens from a pair's value to its entry


def edit_pairs(run):
    """Edit n pairs of each sequence, for each n of n_edits, with every editor; measure METRICS."""
    require_editable(run)
    with torch.no_grad(), evaluating(run.model):
        place, efficacies = find_place(run)
        run.finding(describe_place(place, efficacies))
        data = data_of_sizes(run)
        tables = []
        for group, size in zip(data.eval_groups(run.config.split), data.source.test_sizes):
            group = group[:N_SEQUENCES]
            for first in range(0, len(group), run.config.eval_batch_size):
                indices = group[first : first + run.config.eval_batch_size]
                sequences = load_sequences(run, data, size, indices)
                tables += measure_batch(run, sequences, place)
    columns = concat(tables)
    results = summarize(columns)
    cosines = specificity_by_cosine(columns)
    for sentence in describe_editors(results, cosines):
        run.finding(sentence)
    print_results(results)
    n_edits = sorted({r["edits"] for r in results})
    left_out = [n for n in run.config.n_edits if n not in n_edits]
    if left_out:
        say(f"left out: {left_out} edits, which are more than the pairs that can be edited")
    metrics = {
        "edits": n_edits,
        "memory": place.kind,
        "block": place.block,
        "tokens after the value": place.offset,
    }
    several = len(data.source.test_sizes) > 1
    cells = {}
    for r in results:
        name = f"{r['method']}, {r['edits']}"
        name += f", {r['num_kv_pairs']} pairs" if several else ""
        cells[name] = r
    by_slice = {"method, edits": cells, "edits, cosine": cosines}
    plot = partial(plot_edits, results, cosines, run.name)
    save_result(run, "edit", metrics, by_slice, (), columns, plot)


def require_editable(run):
    """ConfigError unless the run is MQAR made in memory, of a model with a state or a cache."""
    data = run.settings.data
    message = "editing pairs needs the task made in memory; this run's data comes from"
    require(not data.path, f"{message} path={data.path}", None)
    message = "editing pairs needs a query for every pair, and values of one token; this run has"
    message += f" num_queries={data.num_queries}, value_tokens={data.value_tokens}"
    require(not data.num_queries and data.value_tokens == 1, message, None)
    require_decoding(run, "editing pairs")
    require_single_process(run)


# ---- sequences -----------------------------------------------------------------------------------


def data_of_sizes(run):
    """The run's data, or the same with the numbers of pairs that num_kv_pairs asks for."""
    pairs = run.config.num_kv_pairs
    if not pairs:
        return run.data
    path = run.settings.data.path
    message = f"num_kv_pairs needs the task made in memory; this run's data comes from path={path}"
    require(not path, message, "num_kv_pairs")
    sizes = []
    for n in pairs:
        length = max(run.data.seq_len, min_length(n, run.settings.data))
        message = f"num_kv_pairs={n} needs {length} tokens, and the model has positions for"
        # A fork need not be made from model.GPT.
        has_positions = getattr(run.model, "has_positions", bool)()
        fits = length <= run.data.seq_len or not has_positions
        require(fits, f"{message} {run.data.seq_len}", "num_kv_pairs")
        sizes.append((length, n))
    config = replace(run.settings.data, test_sizes=tuple(sizes))
    config.check()
    return type(run.data)(config)


def load_sequences(run, data, size, indices):
    """Sequences of one size (data_mqar.TaskSize) of the split -> Sequences."""
    tokens, targets, _ = data.batch(run.config.split, 0, indices)
    label_pos = (targets != IGNORE_INDEX).nonzero()[:, 1].view(len(indices), size.pairs)
    answers = targets.gather(1, label_pos)
    t = size.storage_len
    # A value follows its key. If a key has several values, the answer is the one that counts.
    is_value = tokens[:, None, 1:t] == answers[:, :, None]  # (B, N, t - 1)
    is_behind_key = tokens[:, None, : t - 1] == tokens.gather(1, label_pos)[:, :, None]
    value_pos = 1 + (is_value & is_behind_key).int().argmax(-1)
    # A convolution may store a pair with the tokens after it, which must have been read, too.
    n_read = (value_pos + conv_width(run.model) <= t).sum(1)
    return Sequences(
        np.asarray(indices),
        tokens.to(run.device),
        t,
        label_pos.to(run.device),
        answers.to(run.device),
        value_pos.to(run.device),
        int(n_read.min()),
    )


def choose_edits(run, sequences, n):
    """-> which pairs (B, n), their new values (B, n), n keys that are not stored (B, n, tokens)."""
    c = run.settings.data
    chosen, values, other_keys = [], [], []
    for b, index in enumerate(sequences.indices):
        # The pairs to edit are among those to edit with a larger n.
        rng = np.random.default_rng((run.settings.train.seed, int(index)))
        in_order = sequences.value_pos[b].cpu().numpy().argsort()
        chosen.append(rng.permutation(in_order[: sequences.n_editable])[:n])
        used = sequences.tokens[b].cpu().numpy()
        new_values = np.setdiff1d(np.arange(run.data.vocab_size // 2, run.data.vocab_size), used)
        new_keys = np.setdiff1d(np.arange(1, run.data.vocab_size // 2), used)
        message = "editing needs tokens that a sequence does not hold; raise vocab_size"
        require(len(new_values) and len(new_keys), message, None)
        values.append(rng.choice(new_values, n, replace=len(new_values) < n))
        other_keys.append(rng.choice(new_keys, (n, c.key_tokens)))
    return tuple(run.tensor(np.stack(x)) for x in (chosen, values, other_keys))


def make_edit(run, sequences, cache, place, chosen, values, other_keys):
    """The Edit of what choose_edits returned; cache: after the pairs of the sequences."""
    value_pos = sequences.value_pos.gather(1, chosen)
    key_pos = value_pos[:, :, None] + torch.arange(-other_keys.shape[2], 0, device=run.device)
    keys = select_positions(sequences.tokens, key_pos.flatten(1)).view_as(other_keys)
    pairs = value_pos, values, keys, other_keys
    where = dict(block=place.block, offset=place.offset)
    return Edit(run.model, sequences.stored, cache, *pairs, **where, dtype=run.dtype)


# ---- measuring -----------------------------------------------------------------------------------


def read_stored(run, sequences):
    """The cache after the pairs of the sequences. ConfigError if a window has left some out."""
    cache = read(run.model, sequences.stored, run.dtype)
    for block, of_block in enumerate(cache):
        if memory_kind(of_block) == "cache":
            n = of_block[entry_name(of_block)].shape[1]
            message = f"editing pairs needs all {sequences.stored_len} stored tokens in the cache;"
            message += f" that of block {block} holds {n}, because of its window"
            require(n == sequences.stored_len, message, None)
    return cache


def places_of(run, cache):
    """Every Place that this model may recall pairs from."""
    places = []
    for block, of_block in enumerate(cache):
        kind = memory_kind(of_block)
        n_offsets = conv_width(run.model) if kind == "cache" else 1
        if kind:
            places += [Place(kind, block, offset) for offset in range(n_offsets)]
    return places


def require_linear_reads(run, cache):
    """ConfigError if a block's queries q do not read S^T q from its state S (K, V)."""
    for layer, of_block in zip(run.model.layers, cache):
        if memory_kind(of_block) != "state":
            continue
        message = f"editing a state needs queries made as in delta.py; {run.settings.train.model}"
        message += " makes its own"
        mixer = getattr(layer, "att", None)
        has_queries = all(hasattr(mixer, name) for name in ("qkv", "split_heads", "head_dims"))
        require(has_queries, message, None)
        c = mixer.config
        # MesaNet's state also holds the sum of k k^T, which takes part in every read. That of
        # test-time training is a tuple: weights of a net.
        state = of_block["state"]
        is_linear = torch.is_tensor(state) and state.shape[-1] == mixer.head_dims(c)[1]
        message = f"the state of {run.settings.train.model} is not read linearly"
        require(is_linear, f"{message}; edit a run of another model", None)
        message = "with pos_emb=rope a query depends on its position; train with pos_emb=none"
        require(c.pos_emb != "rope", message, None)


def find_place(run):
    """Where pairs are recalled: of all places, that where overwriting one pair of each validation
    sequence is most efficacious -> Place, {place: efficacy}"""
    val = replace(run, config=replace(run.config, split="val"))
    group, size = run.data.eval_groups("val")[0], run.data.source.test_sizes[0]
    sequences = load_sequences(val, run.data, size, group[: run.config.eval_batch_size])
    message = "no pair can be edited, for its convolution sees a value beyond the first query"
    require(sequences.n_editable > 0, message, None)
    cache = read_stored(run, sequences)
    require_linear_reads(run, cache)
    places = places_of(run, cache)
    message = f"the cache of {run.settings.train.model} holds neither a state nor values of tokens"
    require(places, message, None)
    edits = choose_edits(val, sequences, 1)
    efficacies = {}
    for place in places:
        edit = make_edit(val, sequences, cache, place, *edits)
        after = EDITORS[place.kind]["overwrite"](edit)
        is_new = answer(val, sequences, after).gather(1, edits[0]) == edit.values
        efficacies[place] = float(is_new.float().mean())
    return max(efficacies, key=efficacies.get), efficacies


def answer(run, sequences, cache):
    """Read the rest of the sequences from this cache -> predictions at the labels (B, N)"""
    rest = sequences.tokens[:, sequences.stored_len :]
    with autocast(run.device, run.dtype):
        logits, _ = run.model.forward_cached(rest, cache)
    return select_positions(logits.argmax(-1), sequences.label_pos - sequences.stored_len)


def measure_batch(run, sequences, place):
    """Edit these sequences in every way -> a table of their labels for each way."""
    cache = read_stored(run, sequences)
    is_known = answer(run, sequences, cache) == sequences.answers  # (B, N)
    message = "the model answers no pair of a batch correctly, so there is nothing to edit"
    require(is_known.any(), message, None)
    B, N = sequences.answers.shape
    cosines = key_cosines(run, sequences, cache, place)  # (B, N, N)
    fitting = [n for n in run.config.n_edits if n <= sequences.n_editable]
    message = f"n_edits={run.config.n_edits}: at most {sequences.n_editable} pairs can be edited"
    require(fitting, message, "n_edits")
    tables = []
    for n in fitting:
        chosen, *new = choose_edits(run, sequences, n)
        edit = make_edit(run, sequences, cache, place, chosen, *new)
        is_edited = torch.zeros_like(is_known).scatter(1, chosen, True)
        wanted = sequences.answers.scatter(1, chosen, edit.values)
        cosine = cosines.masked_fill(~is_edited[:, None], 0).amax(-1)  # (B, N)
        for method, editor in EDITORS[place.kind].items():
            start = now(run.device)
            after = editor(edit)
            seconds = now(run.device) - start
            predicted = answer(run, sequences, after)
            of_labels = {
                "example": torch.from_numpy(sequences.indices)[:, None].expand(B, N),
                "edited": is_edited,
                "known": is_known,
                "new": is_edited & (predicted == wanted),
                "old": predicted == sequences.answers,
                "cosine": cosine.float(),
            }
            table = {name: x.flatten().cpu().numpy() for name, x in of_labels.items()}
            of_batch = {
                "method": method,
                "edits": n,
                "num_kv_pairs": N,
                "seconds": seconds / B,
                "bytes": bytes_changed(cache, after) / B,
            }
            table |= {name: np.full(B * N, value) for name, value in of_batch.items()}
            tables.append(table)
    return tables


def key_cosines(run, sequences, cache, place):
    """|cosine| between the keys of any two pairs, mean over heads -> (B, N, N)

    Keys are the queries' vectors for a state, and stored vectors for a cache.
    """
    B, N = sequences.answers.shape
    everything = torch.arange(N, device=run.device).expand(B, N)
    no_other = torch.zeros(B, N, run.settings.data.key_tokens, dtype=torch.long, device=run.device)
    edit = make_edit(run, sequences, cache, place, everything, sequences.answers, no_other)
    if place.kind == "state":
        keys, _ = ask_alone(edit, edit.keys)  # (B, H, N, K)
    else:
        of_block = cache[place.block]
        stored = of_block["k"] if "k" in of_block else of_block[entry_name(of_block)]
        # If the entry of a pair has not been read yet, the last entry takes its place.
        positions = (edit.value_pos + place.offset).clamp(max=sequences.stored_len - 1)
        n_heads = run.model.layers[place.block].att.n_kv_heads
        keys = select_positions(stored, positions).view(B, N, n_heads, -1).transpose(1, 2)
    keys = keys / keys.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    return (keys @ keys.mT).abs().mean(1)


def bytes_changed(before, after):
    """Bytes of the numbers that differ between two caches."""
    total = 0
    for old, new in zip(before, after):
        for name, tensor in old.items():
            if torch.is_tensor(tensor):
                total += int((tensor != new[name]).sum()) * tensor.element_size()
    return total


# ---- results -------------------------------------------------------------------------------------


def summarize(columns):
    """Tables of `measure_batch` -> a dict for each editor and number of edits and pairs.

    {"method", "edits", "num_kv_pairs", METRICS, "bytes", "seconds"}; the last two of a sequence.
    """
    ways = combine_columns(columns, "num_kv_pairs", "edits", "method")
    results = []
    for way in dict.fromkeys(ways.tolist()):
        table = select(columns, ways == way)
        edited, others = table["edited"], ~table["edited"] & table["known"]
        message = "the model answers too few pairs correctly to measure the others; train it longer"
        require(others.any(), message, None)
        result = {name: table[name][0].item() for name in ("method", "edits", "num_kv_pairs")}
        for metric, answer_is, labels in (
            ("efficacy", "new", edited),
            ("unchanged", "old", edited),
            ("specificity", "old", others),
        ):
            is_given = table[answer_is][labels]
            result[metric] = clustered_proportion(is_given, table["example"][labels])
        result["bytes"] = float(table["bytes"].mean())
        result["seconds"] = float(table["seconds"].mean())
        results.append(result)
    return results


def specificity_by_cosine(columns):
    """Specificity of "overwrite" by the largest cosine between a pair's key and an edited one.

    -> {"edits, low to high": cell}; of the largest number of pairs in a sequence. Bins of fewer
    than 20 pairs are left out.
    """
    largest = columns["num_kv_pairs"] == columns["num_kv_pairs"].max()
    others = ~columns["edited"] & columns["known"] & (columns["method"] == "overwrite") & largest
    table = select(columns, others)
    cells = {}
    for n in np.unique(table["edits"]):
        for low, high in zip(COSINES, COSINES[1:]):
            within = (table["cosine"] >= low) & (table["cosine"] < high) & (table["edits"] == n)
            if within.sum() >= 20:
                cell = clustered_proportion(table["old"][within], table["example"][within])
                cells[f"{n}, {low} to {high}"] = cell
    return cells


def describe_place(place, efficacies):
    others = [fraction for other, fraction in efficacies.items() if other != place]
    where = f"the {place.kind} of block {place.block}"
    if place.kind == "cache":
        where += f", {place.offset} tokens after the value"
    text = f"overwriting one pair in {where} gives its new answer in {efficacies[place]:.0%}"
    if others:
        text += f" of validation sequences; at any other place in {max(others):.0%} at most"
    return text


def describe_editors(results, cosines):
    """Yield sentences: the most edits beside reading again, and the cosines of the keys."""
    most = max((r["num_kv_pairs"], r["edits"]) for r in results)
    of_most = {}
    for r in results:
        if (r["num_kv_pairs"], r["edits"]) == most:
            of_most[r["method"]] = r
    for method in ("overwrite", "read again"):
        r = of_most[method]
        what = f"{r['efficacy']['value']:.0%} of them get the new answer"
        what += f", {r['specificity']['value']:.0%} of the others keep theirs"
        cost = f"{r['bytes']:,.0f} bytes and {1000 * r['seconds']:.2f} ms a sequence"
        yield f"{most[1]} of {most[0]} pairs, {method}: {what} ({cost})"
    of_most_edits = [name for name in cosines if name.startswith(f"{most[1]}, ")]
    if len(of_most_edits) > 1:
        ends = []
        for name in (of_most_edits[0], of_most_edits[-1]):
            ends.append(f"{cosines[name]['value']:.1%} at {name.split(', ')[1]}")
        yield f"of those others, by the largest cosine with an edited key: {' and '.join(ends)}"


def print_results(results):
    head = ["method", "pairs", "edits"]
    for metric in METRICS:
        head += [metric, "95% interval"]
    lines = []
    for r in results:
        line = [r["method"], r["num_kv_pairs"], r["edits"]]
        for metric in METRICS:
            line += format_ci(r[metric])[1:]
        lines.append([*line, f"{r['bytes']:,.0f}", f"{1000 * r['seconds']:.2f}"])
    print_table([*head, "bytes", "ms"], lines)
    print("; ".join(f"{metric}: {meaning}" for metric, meaning in METRICS.items()))


def plot_edits(results, cosines, title, path):
    """Efficacy and specificity against edits, specificity by cosine, and against load."""
    loads = sorted({r["num_kv_pairs"] for r in results})
    plt, fig, axes = figure(1, 3 + (len(loads) > 1), width=3.8)
    of_largest = [r for r in results if r["num_kv_pairs"] == loads[-1]]
    for axis, metric in zip(axes, ("efficacy", "specificity")):
        for method in dict.fromkeys(r["method"] for r in of_largest):
            of_method = [r for r in of_largest if r["method"] == method]
            edits = [r["edits"] for r in of_method]
            errorbars(axis, edits, [r[metric] for r in of_method], label=method)
        axis.set(xscale="log", xlabel=f"edited pairs, of {loads[-1]}", ylim=(-0.02, 1.02))
        axis.set_ylabel(f"{metric}, 95% interval")
        ticks = sorted({r["edits"] for r in of_largest})
        axis.set_xticks(ticks, ticks)
        axis.minorticks_off()
    labels = [f"{low}–{high}" for low, high in zip(COSINES, COSINES[1:])]
    names = [f"{low} to {high}" for low, high in zip(COSINES, COSINES[1:])]
    for n in sorted({r["edits"] for r in results}):
        drawn = [i for i, name in enumerate(names) if f"{n}, {name}" in cosines]
        cells = [cosines[f"{n}, {names[i]}"] for i in drawn]
        errorbars(axes[2], drawn, cells, label=f"{n} edits")
    axes[2].set_xticks(range(len(labels)), labels)
    axes[2].set(xlabel="largest |cosine| with an edited key", ylabel="specificity of overwrite")
    if cosines:  # none if each bin has fewer than 20 pairs
        axes[2].legend()
    if len(loads) > 1:
        for n in sorted({r["edits"] for r in results}):
            of_n = [r for r in results if r["edits"] == n and r["method"] == "overwrite"]
            x = [r["num_kv_pairs"] for r in of_n]
            errorbars(axes[3], x, [r["specificity"] for r in of_n], label=f"{n} edits")
        axes[3].set(xscale="log", xlabel="pairs in a sequence", ylabel="specificity of overwrite")
        axes[3].set_xticks(loads, loads)
        axes[3].minorticks_off()
        axes[3].legend()
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    fig.supxlabel(title)
    finish_figure(fig, plt, path, "")
