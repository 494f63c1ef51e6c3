"""The effects of interchanges on answers, from the results of `ablate.py force`, inject, ...

    python ablate.py interchanges runs/RUN  # force, inject, replace, swap, swap-matrix in a figure
    python ablate.py swap-pred runs/RUN     # after swap-matrix: what does each digit turn into?

Nothing here runs the model.
"""

from functools import partial

import numpy as np

from analysis.interchange import OUTCOMES, outcomes_by
from analysis.memory_usage import require_slots
from analysis.slot_results import load_table
from analysis.swap_matrix import DECODING, differing_answers
from analysis.trained_run import list_results, require_facts, save_result, select
from nanorecall.metrics import print_table
from nanorecall.plots import errorbars, figure, finish_figure
from nanorecall.settings import require
from nanorecall.stats import crossed_proportion, format_ci

# ---- all interchanges ----------------------------------------------------------------------------

INTERCHANGES = ("force", "replace", "swap", "inject")


def interchanges(run):
    """The outcomes of all interchanges that were measured, beside each other."""
    require_slots(run)
    require_facts(run)
    cells = {}
    for name in INTERCHANGES:
        if list_results(run, name):
            for layer, outcomes in outcomes_by(load_table(run, name), "layer").items():
                cells[f"{name} in layer {layer}"] = outcomes
    if list_results(run, "swap_matrix"):
        columns = differing_answers(load_table(run, "swap_matrix"))
        cells["swap-matrix in all layers"] = matrix_outcomes(columns)
    names = ", ".join([*INTERCHANGES[:-1], f"{INTERCHANGES[-1]} or swap-matrix"])
    message = f"{run.folder} has no result of {names}; python ablate.py inject {run.folder} writes"
    require(cells, f"{message} one", None)
    run.finding(describe(cells))
    lines = []
    for name, outcomes in cells.items():
        line = [name, outcomes["source_answer"]["n"]]
        for outcome in OUTCOMES:
            line += format_ci(outcomes[outcome])[1:]
        lines.append(line)
    head = ["interchange", "answers"]
    for title in OUTCOMES.values():
        head += [title, "95% interval"]
    print_table(head, lines)
    plot = partial(plot_interchanges, cells, run.name)
    save_result(run, "interchanges", {}, {"interchange": cells}, (), None, plot)


def matrix_outcomes(columns):
    """Outcomes of swap-matrix, teacher-forced as the others are -> {outcome: proportion}"""
    prediction = columns[DECODING[0]]
    pairs = columns["example"], columns["source_example"]
    outcomes = {
        "source_answer": prediction == columns["source_answer_token"],
        "control_answer": prediction == columns["control_answer_token"],
        "base_lost": prediction != columns["answer"],
    }
    return {name: crossed_proportion(x, *pairs) for name, x in outcomes.items()}


def describe(cells):
    """The finding: the strongest interchange, and those that bring no more than the control."""

    def rate(name):
        return cells[name]["source_answer"]["value"]

    idle = []
    for name, outcomes in cells.items():
        if outcomes["source_answer"]["ci95"][0] <= outcomes["control_answer"]["value"]:
            idle.append(name)
    if len(idle) == len(cells):
        return "no interchange is seen to bring the source's answer more often than a control one"
    best = max(cells, key=rate)
    _, value, interval = format_ci(cells[best]["source_answer"])
    control = cells[best]["control_answer"]["value"]
    text = f"{best} carries the most: the source's answer in {value} ({interval}), a control answer"
    text += f" in {control:.3f}"
    if idle:
        text += f"; no more than the control: {', '.join(idle)}"
    return text


def plot_interchanges(cells, title, path):
    """Bars of the outcomes of each interchange, with intervals."""
    plt, fig, (axis,) = figure(1, 1, width=max(5, 1.3 + 1.1 * len(cells)))
    x = np.arange(len(cells))
    width = 0.8 / len(OUTCOMES)
    for i, (outcome, label) in enumerate(OUTCOMES.items()):
        of_outcome = [cell[outcome] for cell in cells.values()]
        middle = x + (i - (len(OUTCOMES) - 1) / 2) * width
        axis.bar(middle, [cell["value"] for cell in of_outcome], width, label=label)
        errorbars(axis, middle, of_outcome, ls="none", marker="", color="black", capsize=2)
    names = []
    for name, cell in cells.items():
        names.append(f"{name.replace(' in ', chr(10))}\nn = {cell['source_answer']['n']}")
    axis.set_xticks(x, names)
    axis.grid(False, axis="x")
    axis.set(ylabel="fraction of answers (95%)", ylim=(0, 1.02))
    axis.legend(loc="upper left")
    finish_figure(fig, plt, path, f"{title}: answers of the base, with reads of the source")


# ---- what each digit turns into ------------------------------------------------------------------


def swap_predictions(run):
    """What does each digit turn into after the interchange? Reads the result of swap-matrix."""
    require_slots(run)
    require_facts(run)
    columns = load_table(run, "swap_matrix")
    changed = differing_answers(columns)
    by_slice, lines = {}, []
    for decoding in DECODING:
        outcomes = swap_outcomes(changed, decoding, run.token)
        parts = [f"{name} in {cell['value']:.3f}" for name, cell in outcomes.items()]
        run.finding(f"{decoding}, a digit turns into {', '.join(parts)}")
        by_slice[decoding] = outcomes
        by_slice[f"{decoding}, digit"] = digit_transitions(changed, decoding, run.token)
        for outcome, cell in outcomes.items():
            lines.append((outcome, decoding, *format_ci(cell)))
    print_table(("a digit turns into", "decoding", "digits", "fraction", "95% interval"), lines)
    plot = partial(plot_swap_predictions, run, columns)
    save_result(run, "swap_pred", {}, by_slice, (), None, plot)


def swap_outcomes(columns, decoding, token):
    """{outcome: fraction of digits}"""
    is_base = columns[decoding] == columns["answer"]
    is_source = columns[decoding] == columns["source_answer_token"]
    is_digit = are_digits(columns[decoding], token)
    outcomes = {
        "the base's digit": is_base,
        "the source's digit": is_source,
        "another digit": is_digit & ~is_base & ~is_source,
        "no digit": ~is_digit & ~is_base & ~is_source,
    }
    pairs = columns["example"], columns["source_example"]
    return {name: crossed_proportion(x, *pairs) for name, x in outcomes.items()}


def are_digits(tokens, token):
    """tokens (N,) -> bool"""
    known = np.unique(tokens)
    return np.isin(tokens, [t for t in known if token(t).isdigit()])


def digit_transitions(columns, decoding, token):
    """{"digit to digit": fraction of the first that became the second}"""
    transitions = {}
    for before in np.unique(columns["answer"]):
        of_digit = select(columns, columns["answer"] == before)
        pairs = of_digit["example"], of_digit["source_example"]
        for after in np.unique(of_digit[decoding]):
            cell = crossed_proportion(of_digit[decoding] == after, *pairs)
            transitions[f"{token(before)} to {token(after)}"] = cell
    return transitions


def plot_swap_predictions(run, columns, path):
    """For each decoding, what each digit turns into; tokens that are no digits are one column."""
    plt, fig, axes = figure(1, 2, width=4.2, grid=False)
    changed = differing_answers(columns)
    digits = np.unique(changed["answer"])
    names = [run.token(digit) for digit in digits]
    for axis, decoding in zip(axes, DECODING):
        grid = np.zeros((len(digits), len(digits) + 1))
        for row, digit in enumerate(digits):
            after = changed[decoding][changed["answer"] == digit]
            for column, other in enumerate(digits):
                grid[row, column] = (after == other).mean()
            grid[row, -1] = 1 - grid[row].sum()
        image = axis.imshow(grid, cmap="viridis", vmin=0, vmax=1)
        axis.set_xticks(range(len(digits) + 1), [*names, "other"])
        axis.set_yticks(range(len(digits)), names)
        axis.set(xlabel="digit after the interchange", ylabel="digit before")
        axis.set_title(f"{decoding}, n = {len(changed['answer'])}")
        fig.colorbar(image, ax=axis, label="fraction of the row", shrink=0.8)
    finish_figure(fig, plt, path, run.name)
