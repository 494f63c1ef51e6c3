"""Put what a model computed for one example into another, and measure which answer it then gives.

    python ablate.py force | inject | replace | swap | swap-matrix | patch runs/RUN

An interchange intervention (Geiger et al. 2021, arXiv 2106.02997) takes two examples: the model
runs on the base, with what a memory layer read for the source. Activation patching (Meng et al.
2022, arXiv 2202.05262) runs a corrupted example with one activation of the clean one.

Letters: B examples, P pairs of examples, M intervened copies, T tokens, n labels of an example, H
heads, k slots that a head reads. Reads of a memory layer are a dict, as in memory.py.
"""

from functools import partial

import numpy as np
import torch

from analysis.editing import require_facts
from analysis.hooks import (
    Examples,
    forward_from,
    hook_output,
    hook_points,
    hooked,
    index_reads,
    logit_diff,
    logits_at,
    put_reads,
    require_blocks,
    run_with_cache,
    run_with_hooks,
    sample_correct_examples,
)
from analysis.memory_usage import require_slots
from analysis.trained_run import combine_columns, concat, save_result, select
from nanorecall.metrics import in_eval_mode, print_table
from nanorecall.plots import errorbars, figure, finish_figure
from nanorecall.settings import require
from nanorecall.stats import clustered_proportion, format_ci, mean_ci

# ---- pairs of examples ---------------------------------------------------------------------------

EXPOSURE_PAIRS = {  # (is base, is source) seen more often than the median example?
    "any": None,
    "less_less": (False, False),
    "more_more": (True, True),
    "less_more": (False, True),
    "more_less": (True, False),
}


def sample_pairs(run):
    """Draw correct examples and pairs of them -> examples, base, source (P,), metrics of these.

    ConfigError if the run has no memory layers, or no facts whose answers are digits.
    """
    require_slots(run)
    require_facts(run)
    c = run.config
    examples = sample_correct_examples(run)
    base, source = draw_pairs(examples, c.n_pairs, c.exposure_pairs, c.seed)
    metrics = {"n_examples": len(examples), "n_pairs": len(base)}
    metrics["exposure_pairs"] = c.exposure_pairs
    return examples, base, source, metrics


def draw_pairs(examples, n_pairs, kind, seed):
    """Draw pairs of different examples -> base, source (P,), which count from 0 to B - 1.

    n_pairs: how many, 0 for all. kind: a name of EXPOSURE_PAIRS. ConfigError if no pair is of it.
    """
    B = len(examples)
    base, source = np.divmod(np.arange(B * B), B)
    fits = base != source
    if kind != "any":
        exposures = examples.slices.get("exposures")
        message = f"exposure_pairs={kind} needs examples with exposures, as in task=qa"
        require(exposures is not None, f"{message}; leave it out", "exposure_pairs")
        is_high = exposures > np.median(exposures)
        base_is_high, source_is_high = EXPOSURE_PAIRS[kind]
        fits &= (is_high[base] == base_is_high) & (is_high[source] == source_is_high)
    pairs = np.flatnonzero(fits)
    message = f"exposure_pairs={kind}: there is no such pair of examples; raise n_examples"
    require(len(pairs), message, "exposure_pairs")
    if n_pairs and n_pairs < len(pairs):
        pairs = np.sort(np.random.default_rng(seed).choice(pairs, n_pairs, replace=False))
    return base[pairs], source[pairs]


def name_exposure_pairs(exposures, base, source):
    """exposures (B,), base and source (P,) -> the name of each pair in EXPOSURE_PAIRS (P,)."""
    is_high = exposures > np.median(exposures)
    base_names = np.where(is_high[base], "more_", "less_")
    return np.char.add(base_names, np.where(is_high[source], "more", "less"))


def control_answers(base_answers, source_answers, alphabet, seed):
    """Draw a third answer of the alphabet for each pair of answers (M,) -> (M,); -1: there is none.

    An intervention that only damages the answer gives the source's answer as often as a third one.
    """
    M = len(base_answers)
    order = np.random.default_rng(seed).permuted(np.tile(alphabet, (M, 1)), axis=1)
    is_third = (order != base_answers[:, None]) & (order != source_answers[:, None])
    first_third = order[np.arange(M), is_third.argmax(1)]
    return np.where(is_third.any(1), first_third, -1)


# ---- interchange of reads ------------------------------------------------------------------------


def force(base, source, head):
    """One head reads only the slot that it reads most for the source, with all of its weights."""
    m = torch.arange(len(head), device=head.device)
    strongest = source["weights"][m, head].argmax(-1)  # (M,)
    slots = base["slots"].clone()
    slots[m, head] = source["slots"][m, head, strongest][:, None]
    return {"slots": slots, "weights": base["weights"]}


def inject(base, source, head):
    """All heads read the source's slots with the source's weights."""
    return source


def swap(base, source, head):
    """All heads read the source's slots with the base's weights, matched by rank of weight."""
    base_order = base["weights"].argsort(-1, descending=True)
    source_order = source["weights"].argsort(-1, descending=True)
    ranked_slots = source["slots"].gather(-1, source_order)
    slots = torch.empty_like(base["slots"]).scatter(-1, base_order, ranked_slots)
    return {"slots": slots, "weights": base["weights"]}


# (reads of the base and of the source at their labels (M, H, k), head (M,)) -> reads of the base.
# "replace" is not among them: it changes reads at all positions.
INTERCHANGES = {"force": force, "inject": inject, "swap": swap}


def strongest_slot(reads):
    """The slot with the largest weight over all heads: reads (M, H, k) -> (M,)."""
    index = reads["weights"].flatten(1).argmax(-1)
    return reads["slots"].flatten(1).gather(1, index[:, None]).squeeze(1)


def forward_with_interchange(model, examples, clean, block, name, base, source, answer_pos, head):
    """Run bases with reads of their sources in one block -> logits (M, vocabulary) at one label.

    base, source, answer_pos (number of the label) and head: (M,) each.
    """
    base_pos = examples.label_pos[base, answer_pos]
    source_pos = examples.label_pos[source, answer_pos]
    reads = index_reads(clean.reads[block], base)  # (M, T, H, k)
    base_reads = index_reads(clean.reads[block], (base, base_pos))  # (M, H, k)
    source_reads = index_reads(clean.reads[block], (source, source_pos))
    if name == "replace":
        # As if the value in the table were overwritten: every read of the slot gives the new value.
        old = strongest_slot(base_reads)[:, None, None, None]
        new = strongest_slot(source_reads)[:, None, None, None]
        reads["slots"] = torch.where(reads["slots"] == old, new, reads["slots"])
    else:
        new_reads = INTERCHANGES[name](base_reads, source_reads, head)
        m = torch.arange(len(base), device=base.device)
        reads = put_reads((m, base_pos), new_reads, reads)
    resid_mid = clean.resid_mid[block][base]
    return forward_from(model, block, resid_mid, reads, base_pos[:, None]).squeeze(1)


def interchange_effects(model, examples, base, source, name, batch_size=512, seed=0):
    """Measure an interchange for pairs base, source (P,) -> {column: (M,)}.

    It is done in one block and at one label at a time; "force" also takes one head at a time.
    Labels at which base and source have the same answer are left out. Three outcomes are columns:
    source_answer, the prediction is the source's answer; control_answer, it is an answer drawn at
    random that neither has there; base_lost, it is no longer the base's answer.
    """
    clean = run_with_cache(model, examples)
    answers = examples.answers.cpu().numpy()
    device = examples.tokens.device
    n_heads = model.config.mem_heads if name == "force" else 1
    pair, answer_pos, head = np.indices((len(base), answers.shape[1], n_heads)).reshape(3, -1)
    # Where both have the same answer, an interchange that works cannot be seen.
    differ = answers[base[pair], answer_pos] != answers[source[pair], answer_pos]
    require(differ.any(), "all pairs of examples have the same answers; raise n_examples", None)
    pair, answer_pos, head = pair[differ], answer_pos[differ], head[differ]
    base, source = base[pair], source[pair]  # (M,)
    base_answers, source_answers = answers[base, answer_pos], answers[source, answer_pos]
    control = control_answers(base_answers, source_answers, np.unique(answers), seed)
    parts = []
    for block in model.memory_layers():
        for start in range(0, len(base), batch_size):
            batch = slice(start, start + batch_size)
            indices = []
            for x in (base, source, answer_pos, head):
                indices.append(torch.as_tensor(x[batch], device=device))
            logits = forward_with_interchange(model, examples, clean, block, name, *indices)
            part = compare_logits(examples, clean, logits, *indices[:3])
            part["control_answer"] = part["prediction"] == control[batch]
            part["example"] = examples.indices[base[batch]]
            part["source_example"] = examples.indices[source[batch]]
            part["layer"] = np.full(len(logits), block)
            part["answer_pos"] = answer_pos[batch]
            part["head"] = head[batch]
            if "exposures" in examples.slices:
                exposures = examples.slices["exposures"]
                part["exposure_pairs"] = name_exposure_pairs(exposures, base[batch], source[batch])
            parts.append(part)
    return concat(parts)


def compare_logits(examples, clean, logits, base, source, answer_pos):
    """Logits (M, vocabulary) after an interchange, beside the clean ones -> {column: (M,)}"""
    base_answer = examples.answers[base, answer_pos]
    source_answer = examples.answers[source, answer_pos]
    prediction = logits.argmax(-1)
    clean_logits = clean.logits[base, answer_pos]
    clean_diff, _, _ = logit_diff(clean_logits, base_answer)
    diff, _, _ = logit_diff(logits, base_answer)
    _, p_source_clean, _ = logit_diff(clean_logits, source_answer)
    _, p_source, _ = logit_diff(logits, source_answer)
    columns = {
        "answer": base_answer,
        "source_answer_token": source_answer,
        "prediction": prediction,
        "source_answer": prediction == source_answer,
        "base_lost": prediction != base_answer,
        "drop": clean_diff - diff,
        "p_source": p_source,
        "p_source_clean": p_source_clean,
    }
    return {name: x.cpu().numpy() for name, x in columns.items()}


OUTCOMES = {  # column of interchange_effects: title
    "source_answer": "source answer",
    "control_answer": "control answer",
    "base_lost": "base answer lost",
}


def interchange(run, name):
    """How often does the base get the source's answer with the source's reads?"""
    examples, base, source, metrics = sample_pairs(run)
    batch_size, seed = run.config.ablate_batch_size, run.config.seed
    columns = interchange_effects(run.model, examples, base, source, name, batch_size, seed)
    slices = ["layer", "layer, answer_pos"]
    if name == "force":
        slices.append("layer, head")
    if "exposure_pairs" in columns:
        slices.append("exposure_pairs")
    by_slice = {}
    for names in slices:
        by_slice[names] = outcomes_by(columns, *names.split(", "))
    print_outcomes(name, by_slice)
    plot = partial(plot_interchange, run, columns, by_slice)
    save_result(run, name, metrics, by_slice, (), columns, plot)


def outcomes_by(columns, *names):
    """{"value, value": {outcome: proportion}} for all combinations of values of these columns."""
    keys = combine_columns(columns, *names)
    cells = {}
    for key in np.unique(keys).tolist():
        part = select(columns, keys == key)
        cells[key] = {}
        for outcome in OUTCOMES:
            cells[key][outcome] = clustered_proportion(part[outcome], part["example"])
    return cells


def print_outcomes(name, by_slice):
    head = [name]
    for title in OUTCOMES.values():
        head += [title, "95% interval"]
    lines = []
    for names, values in by_slice.items():
        # The figure shows these.
        if names == "layer, answer_pos":
            continue
        for value, cells in values.items():
            line = [f"{names}={value}"]
            for outcome in OUTCOMES:
                line += format_ci(cells[outcome])[1:]
            lines.append(line)
    print_table(head, lines)


def plot_interchange(run, columns, by_slice, path):
    """Outcomes by layer and answer position; and the source answer by pair of answers."""
    blocks, positions = np.unique(columns["layer"]), np.unique(columns["answer_pos"])
    plt, fig, axes = figure(1, 1 + len(blocks), width=4.6, grid=False)
    styles = {"source_answer": "-", "control_answer": "--"}
    for block in blocks:
        for outcome, style in styles.items():
            cells = []
            for position in positions:
                cells.append(by_slice["layer, answer_pos"][f"{block}, {position}"][outcome])
            errorbars(
                axes[0], positions, cells, label=f"layer {block}: {OUTCOMES[outcome]}", ls=style
            )
    axes[0].set(xlabel="answer position", ylabel="fraction of answers (95%)", ylim=(-0.02, 1.02))
    axes[0].legend()
    tokens = np.unique(columns["answer"])
    for axis, block in zip(axes[1:], blocks):
        part = select(columns, columns["layer"] == block)
        grid = answer_pair_grid(part, part["source_answer"], tokens)
        title = f"layer {block}: fraction with the source answer"
        plot_answer_pairs(run, fig, axis, grid, tokens, title)
    finish_figure(fig, plt, path, f"{run.name}, {len(columns['example'])} interventions")


def answer_pair_grid(columns, outcome, tokens):
    """Mean of outcome (N,) by base answer and source answer -> (tokens, tokens); nan: none."""
    grid = np.full((len(tokens), len(tokens)), np.nan)
    for i, base_answer in enumerate(tokens):
        for j, source_answer in enumerate(tokens):
            inside = columns["answer"] == base_answer
            inside &= columns["source_answer_token"] == source_answer
            if inside.any():
                grid[i, j] = outcome[inside].mean()
    return grid


def plot_answer_pairs(run, fig, axis, grid, tokens, title):
    names = [run.token(token) for token in tokens]
    image = axis.imshow(grid, vmin=0, vmax=1, cmap="viridis")
    axis.set_xticks(range(len(names)), names)
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel="source answer", ylabel="base answer", title=title)
    fig.colorbar(image, ax=axis, shrink=0.8)


# ---- interchange of all reads: which answers stand in for which ----------------------------------

# Teacher forcing shows the base's answers so far, which speak against those of the source.
DECODING = ("teacher-forced", "token by token")


def interchange_reads(clean, examples, base, source):
    """Interventions in all memory layers: at its labels, each base reads what its source reads.

    base, source (M,) -> {block: function of the reads}, as forward(intervene=) takes them.
    """
    m = torch.arange(len(base), device=base.device)[:, None]
    base_pos, source_pos = examples.label_pos[base], examples.label_pos[source]  # (M, n)
    interventions = {}
    for block, reads in clean.reads.items():
        source_reads = index_reads(reads, (source[:, None], source_pos))
        interventions[block] = partial(put_reads, (m, base_pos), source_reads)
    return interventions


@in_eval_mode
def decode_with(model, examples, interventions):
    """Decode answers greedily under interventions -> predictions (B, n).

    Each predicted token goes into the sequence, so the correct answers are never shown.
    """
    tokens = examples.tokens.clone()
    example = torch.arange(len(tokens), device=tokens.device)
    predictions = []
    for i in range(examples.label_pos.shape[1]):
        position = examples.label_pos[:, i]
        if predictions:
            tokens[example, position] = predictions[-1]
        logits = logits_at(model, tokens, position[:, None], intervene=interventions)
        predictions.append(logits[:, 0].argmax(-1))
    return torch.stack(predictions, 1)


def swap_matrix(run):
    """Interchange all reads at all labels: which answer tokens can stand in for which?

    It is measured with the base's answers so far in the sequence, and decoded token by token.
    """
    examples, base, source, metrics = sample_pairs(run)
    clean = run_with_cache(run.model, examples)
    batch_size = run.config.ablate_batch_size
    parts = []
    for start in range(0, len(base), batch_size):
        batch = slice(start, start + batch_size)
        parts.append(swap_all_reads(run.model, examples, clean, base[batch], source[batch]))
    columns = concat(parts)
    by_slice = {}
    lines = []
    for decoding in DECODING:
        rates = match_rates(columns, decoding, "source_answer_token", "answer_pos")
        by_slice[f"{decoding}, answer_pos"] = rates
        by_slice[f"{decoding}, base answer, source answer"] = answer_pairs(columns, decoding, run)
        for answer_pos, cell in rates.items():
            lines.append((decoding, answer_pos, *format_ci(cell)))
    head = ("source answer", "answer position", "answers", "fraction", "95% interval")
    print_table(head, lines)
    plot = partial(plot_swap_matrix, run, columns)
    save_result(run, "swap_matrix", metrics, by_slice, (), columns, plot)


def swap_all_reads(model, examples, clean, base, source):
    """Predict with all reads of the sources: base, source (M,) -> {column: (M * n,)}"""
    device = examples.tokens.device
    b, s = torch.as_tensor(base, device=device), torch.as_tensor(source, device=device)
    bases, source_answers = examples.select(base), examples.answers[s]  # answers (M, n)
    interventions = interchange_reads(clean, examples, b, s)
    p = run_with_hooks(model, bases, intervene=interventions).softmax(-1)  # (M, n, vocabulary)
    M, n = source_answers.shape
    columns = {
        "example": np.repeat(bases.indices, n),
        "source_example": np.repeat(examples.indices[source], n),
        "answer_pos": np.tile(np.arange(n), M),
    }
    measured = {
        "answer": bases.answers,
        "source_answer_token": source_answers,
        "p_source": p.gather(-1, source_answers.unsqueeze(-1)),
        "teacher-forced": p.argmax(-1),
        "token by token": decode_with(model, bases, interventions),
    }
    for name, x in measured.items():
        columns[name] = x.flatten().cpu().numpy()
    return columns


def match_rates(columns, predictions, answers, by):
    """How often one column equals another, by values of a third -> {value: proportion}.

    Only labels at which base and source have different answers count.
    """
    matches = columns[predictions] == columns[answers]
    differ = columns["answer"] != columns["source_answer_token"]
    rates = {}
    for value in np.unique(columns[by][differ]):
        inside = differ & (columns[by] == value)
        rates[str(value)] = clustered_proportion(matches[inside], columns["example"][inside])
    return rates


def answer_pairs(columns, decoding, run):
    """{"base answer, source answer": fraction with the source answer, and its mean probability}"""
    matches = columns[decoding] == columns["source_answer_token"]
    pairs = np.stack([columns["answer"], columns["source_answer_token"]])  # (2, N)
    cells = {}
    for pair in np.unique(pairs, axis=1).T:
        inside = (pairs == pair[:, None]).all(0)
        cell = clustered_proportion(matches[inside], columns["example"][inside])
        cell["p_source"] = float(columns["p_source"][inside].mean())
        cells[f"{run.token(pair[0])}, {run.token(pair[1])}"] = cell
    return cells


def plot_swap_matrix(run, columns, path):
    """For each decoding: the source answer by pair of answers; and outcomes by answer position."""
    plt, fig, axes = figure(2, 2, width=4.6, grid=False)
    tokens = np.unique(columns["answer"])
    for upper, lower, decoding in zip(axes[:2], axes[2:], DECODING):
        is_source = columns[decoding] == columns["source_answer_token"]
        grid = answer_pair_grid(columns, is_source, tokens)
        title = f"{decoding}: fraction with the source answer"
        plot_answer_pairs(run, fig, upper, grid, tokens, title)
        for answers, label in (
            ("source_answer_token", "source answer"),
            ("answer", "base answer kept"),
        ):
            rates = match_rates(columns, decoding, answers, "answer_pos")
            positions = [int(position) for position in rates]
            errorbars(lower, positions, list(rates.values()), label=label)
        ylabel = f"fraction of answers, {decoding} (95%)"
        lower.set(xlabel="answer position", ylabel=ylabel, ylim=(-0.02, 1.02))
        lower.legend()
    finish_figure(fig, plt, path, f"{run.name}, {len(columns['example'])} answer tokens")


# ---- activation patching -------------------------------------------------------------------------


@torch.no_grad()
def patch(run):
    """Which activation, put into a corrupted run, brings the answer of the clean run back?

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
    recovered, clean_diff, corrupted_diff = activation_patching(run.model, clean, corrupted)
    parts = []
    cells = {}
    for (name, block), fractions in recovered.items():
        T, B = fractions.shape
        parts.append(
            {
                "hook_point": np.full(T * B, name),
                "layer": np.full(T * B, block),
                "position": np.repeat(np.arange(T), B),
                "example": np.tile(clean.indices, T),
                "recovered": fractions.ravel(),
            }
        )
        for t in range(T):
            cells[f"{name}, {block}, {t}"] = mean_ci(fractions[t])
    best = sorted(cells, key=lambda key: -cells[key]["value"])[:12]
    head = ("hook point, layer, position", "examples", "recovered", "95% interval")
    print_table(head, [(key, *format_ci(cells[key])) for key in best])
    metrics = {
        "n_examples": len(clean),
        "logit_diff, clean": mean_ci(clean_diff),
        "logit_diff, corrupted": mean_ci(corrupted_diff),
    }
    by_slice = {"hook_point, layer, position": cells}
    plot = partial(plot_patch, run, recovered, clean)
    save_result(run, "patch", metrics, by_slice, (), concat(parts), plot)


def corrupt(run, examples, seed):
    """Give examples another first answer -> clean, corrupted Examples.

    Of text, a corrupted example is another one of the same form. Of MQAR, it is the same one with
    another value under the first queried key. ConfigError if all first answers are the same.
    """
    rng = np.random.default_rng(seed)
    if hasattr(run.data, "tokenizer"):
        same_form = (examples.label_pos == examples.label_pos[:1]).all(1)
        examples = examples.select(np.flatnonzero(same_form.cpu().numpy()))
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
def activation_patching(model, clean, corrupted):
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
    recovered = {}
    for (name, block), module in modules.items():
        fractions = []
        for t in range(T):
            patch_in = partial(patch_position, activations[name, block], t)
            patched_diff = answer_logit_diff(corrupted, [hook_output(name, module, patch_in)])
            fraction = (patched_diff - corrupted_diff) / (clean_diff - corrupted_diff)
            fractions.append(fraction.cpu().numpy())
        recovered[name, block] = np.stack(fractions)
    return recovered, clean_diff.cpu().numpy(), corrupted_diff.cpu().numpy()


def cache_activation(activations, key, x):
    activations[key] = x
    return x


def patch_position(activation, t, x):
    """x (B, T, D) with position t of another activation."""
    return x.index_copy(1, torch.tensor([t], device=x.device), activation[:, t : t + 1])


def plot_patch(run, recovered, clean, path):
    """A heat map for each hook point: layers down, positions across."""
    names = list(dict.fromkeys(name for name, _ in recovered))
    T = len(next(iter(recovered.values())))
    plt, fig, axes = figure(len(names), 1, width=9, grid=False)
    fig.set_size_inches(max(7, min(16, 0.22 * T + 2)), 1.2 + 1.5 * len(names))
    ticks = range(0, T, max(1, T // 40))
    labels = ticks
    xlabel = "position"
    if hasattr(run.data, "tokenizer"):
        labels = [run.token(clean.tokens[0, t]) for t in ticks]
        xlabel += f" (tokens of example {clean.indices[0]})"
    for axis, name in zip(axes, names):
        blocks = [block for point, block in recovered if point == name]
        grid = [recovered[name, block].mean(1) for block in blocks]
        image = axis.imshow(grid, aspect="auto", vmin=0, vmax=1, cmap="viridis")
        axis.set_yticks(range(len(blocks)), blocks)
        axis.set_xticks(ticks, labels, fontsize=6)
        axis.set_ylabel(f"{name}\nlayer")
        fig.colorbar(image, ax=axis)
    axes[-1].set_xlabel(xlabel)
    title = f"{run.name}: fraction of the logit difference recovered by one activation"
    finish_figure(fig, plt, path, f"{title}, mean of {len(clean)} examples")
