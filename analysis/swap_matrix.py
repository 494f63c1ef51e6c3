"""Interchange all reads of memory layers between examples: which digits can stand in for which?

    python ablate.py swap-matrix runs/RUN

Letters: P pairs of examples, M intervened copies, n labels of an example.
"""

from functools import partial

import numpy as np
import torch

from analysis.hooks import index_reads, logits_at, put_reads, run_with_cache, run_with_hooks
from analysis.interchange import control_answers, sample_pairs
from analysis.trained_run import concat, save_result, select
from nanorecall.metrics import in_eval_mode, print_table
from nanorecall.plots import figure, finish_figure
from nanorecall.stats import crossed_proportion, format_ci

# Teacher forcing shows the base's answers so far, which speak against those of the source.
DECODING = ("teacher-forced", "token by token")


def interchange_reads(clean, examples, base, source):
    """Interventions in all memory layers: at its labels, each base reads what its source reads.

    base, source (M,) -> {block: function of the reads}, as forward(intervene=) takes them.
    """
    m = torch.arange(len(base), device=base.device)[:, None]
    base_pos = examples.label_pos[base]  # (M, n)
    source_pos = examples.label_pos[source]
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

    def measure_batch(start):
        batch = slice(start, start + batch_size)
        return swap_all_reads(
            run.model, examples, clean, base[batch], source[batch], run.config.seed
        )

    columns = concat(run.world.shared_map(measure_batch, range(0, len(base), batch_size)))
    by_slice = {}
    lines = []
    for decoding in DECODING:
        rates = match_rates(columns, decoding)
        by_slice[f"{decoding}, answer_pos"] = rates
        by_slice[f"{decoding}, base answer, source answer"] = answer_pairs(columns, decoding, run)
        for answer_pos, cell in rates.items():
            lines.append((decoding, answer_pos, *format_ci(cell)))
    for decoding in DECODING:
        run.finding(describe(columns, decoding, run.token))
    head = ("source answer", "answer position", "answers", "fraction", "95% interval")
    print_table(head, lines)
    plot = partial(plot_swap_matrix, run, columns)
    save_result(run, "swap_matrix", metrics, by_slice, (), columns, plot)


def swap_all_reads(model, examples, clean, base, source, seed=0):
    """Predict with all reads of the sources: base, source (M,) -> {column: (M * n,)}

    control_answer_token is one of neither: how often does it come instead? -1 if there is none.
    """
    device = examples.tokens.device
    b = torch.as_tensor(base, device=device)
    s = torch.as_tensor(source, device=device)
    bases = examples.select(base)
    source_answers = examples.answers[s]  # (M, n)
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
    alphabet = np.unique(examples.answers.cpu().numpy())
    columns["control_answer_token"] = control_answers(
        columns["answer"], columns["source_answer_token"], alphabet, seed
    )
    return columns


def describe(columns, decoding, token):
    """The finding of one decoding in a sentence: how often the source's answer comes, and whose."""
    columns = differing_answers(columns)
    is_source = columns[decoding] == columns["source_answer_token"]
    is_control = columns[decoding] == columns["control_answer_token"]
    rate = crossed_proportion(is_source, columns["example"], columns["source_example"])
    _, value, interval = format_ci(rate)
    fractions = {}
    for answer in np.unique(columns["source_answer_token"]):
        fractions[token(answer)] = is_source[columns["source_answer_token"] == answer].mean()
    best, worst = max(fractions, key=fractions.get), min(fractions, key=fractions.get)
    text = f"{decoding}: with the source's reads, its answer comes in {value} ({interval})"
    text += f", a control answer in {is_control.mean():.3f}"
    if rate["ci95"][0] <= is_control.mean():
        return f"{text}: reads are not seen to carry an answer"
    return (
        f"{text}; {best!r} comes most easily ({fractions[best]:.2f}), "
        f"{worst!r} least ({fractions[worst]:.2f})"
    )


def differing_answers(columns):
    """Without answers that base and source share: there, an interchange cannot be seen."""
    return select(columns, columns["answer"] != columns["source_answer_token"])


def match_rates(columns, decoding):
    """How often the source's answer comes, by answer position -> {position: proportion}."""
    columns = differing_answers(columns)
    matches = columns[decoding] == columns["source_answer_token"]
    rates = {}
    for position in np.unique(columns["answer_pos"]):
        here = columns["answer_pos"] == position
        pairs = columns["example"][here], columns["source_example"][here]
        rates[str(position)] = crossed_proportion(matches[here], *pairs)
    return rates


def answer_pairs(columns, decoding, run):
    """{"base answer, source answer": fraction with the source answer, and its mean probability}"""
    matches = columns[decoding] == columns["source_answer_token"]
    pairs = np.stack([columns["answer"], columns["source_answer_token"]])  # (2, N)
    cells = {}
    for pair in np.unique(pairs, axis=1).T:
        inside = (pairs == pair[:, None]).all(0)
        examples = columns["example"][inside], columns["source_example"][inside]
        cell = crossed_proportion(matches[inside], *examples)
        cell["p_source"] = float(columns["p_source"][inside].mean())
        cells[f"{run.token(pair[0])}, {run.token(pair[1])}"] = cell
    return cells


def plot_swap_matrix(run, columns, path):
    """For each decoding, how often the source answer comes, by pair of answers."""
    plt, fig, axes = figure(1, 2, width=4.2, grid=False)
    tokens = np.unique(columns["answer"])
    columns = differing_answers(columns)
    for axis, decoding in zip(axes, DECODING):
        is_source = columns[decoding] == columns["source_answer_token"]
        grid = answer_pair_grid(columns, is_source, tokens)
        title = f"{decoding}: fraction with the source answer"
        plot_answer_pairs(run, fig, axis, grid, tokens, title)
    finish_figure(fig, plt, path, f"{run.name}, {len(columns['example'])} answers; white: the same")


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
