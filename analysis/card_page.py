"""The page of a report card (see card.py): findings in words, a table and a figure."""

import math

from analysis.figure_lines import log_axis
from nanorecall.plots import figure, finish_figure

REFERENCE = "gpt"  # whose time the cost is relative to

# ---- the findings --------------------------------------------------------------------------------


def findings(card, stored):
    """What the numbers of a card say, as sentences. stored: {name: card} of other mixers."""
    return [
        say_checks(card["checks"]),
        say_size(card, stored),
        say_state(card["state"]),
        say_place(card, stored),
        say_by_state(card["by_state"]),
        say_lengths(card["lengths"]),
        say_updates(card["updates"]),
        say_parity(card["parity"]),
        say_rates(card["rates"]),
        say_cost(card["cost"]),
    ]


def say_checks(checks):
    text = "It keeps the contract of a model, and no output depends on a later token"
    if checks["decoding"]:
        return f"{text}. Decoding fails: {checks['decoding']}."
    return f"{text}. Decoding token by token equals the parallel form."


def say_size(card, stored):
    """The table compares mixers of equal size, which a fork need not have."""
    parameters = card["parameters"]
    text = f"Its layers have {parameters:,} parameters"
    others = [of_other["parameters"] for of_other in stored.values()]
    if not others:
        return f"{text}."
    low, high = min(others), max(others)
    text += f", those of the others {low:,} to {high:,}"
    if 0.98 * low <= parameters <= 1.02 * high:
        return f"{text}."
    size = "larger" if parameters > high else "smaller"
    place = f"it is {size}, so its place is not one among equals"
    return f"{text}: {place}; change its widths (--model_args)."


def say_state(state):
    short, long = state["256"], state["1024"]
    if short is None:
        return "Its inference state is unknown, since decoding fails its check."
    text = f"Its state takes {short / 1000:,.0f} kB after 256 tokens"
    if long == short:
        return f"{text}, and does not grow."
    return f"{text}, and {long / 1000:,.0f} kB after 1,024."


def say_place(card, stored):
    text = f"With 64 pairs in 256 tokens it recalls {percent(card['pairs']['64'])}"
    others = {name: of_other["pairs"]["64"] or 0 for name, of_other in stored.items()}
    if not others:
        return f"{text}."
    n_better = sum(value > (card["pairs"]["64"] or 0) for value in others.values())
    best = max(others, key=others.get)
    place = f"place {n_better + 1} of {len(others) + 1}"
    return f"{text}: {place} (best other: {best}, {others[best]:.1%})."


def say_by_state(sizes):
    """sizes: the part "by_state" of a card."""
    if not sizes:
        return "Recall against state is unknown, since decoding fails its check."
    if len(sizes) == 1:
        return "Half and twice as many heads gave no other size of its state, so there is one size."
    text = "With other sizes of the state and as many layer parameters, it recalls of 64 pairs"
    parts = []
    for size in sizes:
        parts.append(f"{percent(size['accuracy'])} with {size['bytes'] / 1000:,.0f} kB")
    return f"{text} {', '.join(parts)}."


def say_lengths(lengths):
    text = f"Trained on 256 tokens, it recalls {percent(lengths['256'])} there"
    return f"{text} and {percent(lengths['1024'])} in sequences of 1,024."


def say_updates(updates):
    once, again = updates["0"], updates["1"]
    text = f"Keys that are stored again are recalled in {percent(again)} of the cases, others in"
    return f"{text} {percent(once)}."


def say_parity(parity):
    if parity["256"] >= 0.9:
        verdict = "it tracks the parity of its tokens"
    elif parity["64"] >= 0.9:
        verdict = "it tracks parity only at the length of its training"
    else:
        verdict = "it does not track parity"
    numbers = f"{percent(parity['64'])} at 64 tokens, {percent(parity['256'])} at 256; chance 50%"
    return f"State tracking: {verdict} ({numbers})."


def say_rates(rates):
    """Which learning rates are nearly as good as the best one?"""
    best = max(value or 0 for value in rates.values())
    good = [rate for rate, value in rates.items() if (value or 0) >= 0.95 * best]
    if best < 0.1:
        return f"It learned to recall 32 pairs at no learning rate of {', '.join(rates)}."
    text = f"Learning rates within 5% of the best accuracy ({percent(best)} with 32 pairs)"
    return f"{text}: {', '.join(good)} of {', '.join(rates)}."


def say_cost(cost):
    short, long = cost["128"], cost["1024"]
    text = f"A training step takes {short:.1f} times the CPU time of {REFERENCE} with sequences"
    return f"{text} of 128 tokens, and {long:.1f} times with 1,024 (equal tokens in a step)."


def percent(value):
    return "nothing (the run failed)" if value is None else f"{value:.1%}"


# ---- the page ------------------------------------------------------------------------------------

NUMBER = "number or null"  # null: that run failed, or decoding fails its check
CARD = {  # the parts of card.json; numbers of them that are in words or in the table have names
    "parameters": "count",
    "checks": {"decoding": "text"},
    "state": {"256": NUMBER, "1024": NUMBER},
    "cost": {"128": "number", "1024": "number", "*": NUMBER},
    "pairs": {"64": NUMBER, "*": NUMBER},
    "rates": {"*": NUMBER},
    "lengths": {"256": "number", "1024": "number", "*": NUMBER},
    "updates": {"0": "number", "1": "number", "*": NUMBER},
    "parity": {"64": "number", "256": "number", "*": NUMBER},
}
BY_STATE = [{"bytes": "size", "accuracy": NUMBER}]  # 64 pairs with several sizes of the state
COLUMNS = {  # column of the table: a part of the card, which number, how it is written
    "state, kB": ("state", "256", lambda value: f"{value / 1000:,.0f}"),
    "64 pairs": ("pairs", "64", "{:.3f}".format),
    "1,024 tokens": ("lengths", "1024", "{:.3f}".format),
    "stored again": ("updates", "1", "{:.3f}".format),
    "parity, 256 tokens": ("parity", "256", "{:.3f}".format),
    "cost, 128 tokens": ("cost", "128", "{:.1f}".format),
    "cost, 1,024 tokens": ("cost", "1024", "{:.1f}".format),
}
PANELS = {  # part of the card: title, label of the x axis, label of the y axis
    "pairs": ("recall at the best learning rate", "pairs in 256 tokens", "test token accuracy"),
    "lengths": ("32 pairs, trained on 256 tokens", "tokens", "test token accuracy"),
    "updates": ("16 of 32 keys stored again", "times that a key is updated", "test token accuracy"),
    "parity": ("parity, trained on 64 tokens", "tokens", "test accuracy"),
    "rates": ("32 pairs in 256 tokens", "learning rate", "test token accuracy"),
    "cost": ("training step of 4,096 tokens", "tokens in a sequence", f"time, {REFERENCE} = 1"),
    "by_state": ("64 pairs, equal layer parameters", "kB of state", "test token accuracy"),
}


N_COLOURS = 10  # then matplotlib takes the first one again


def page(name, card, stored):
    """The card as markdown."""
    lines = [f"# {name}", ""]
    lines += [f"- {sentence}" for sentence in findings(card, stored)]
    lines += ["", f"![Seven panels: {name} beside other mixers](card.png)", ""]
    columns = ["mixer", "layer parameters", *COLUMNS, "64 pairs by state, kB"]
    lines.append(f"| {' | '.join(columns)} |")
    lines.append("|---" * len(columns) + "|")
    lines.append(table_row(f"**{name}**", card))
    lines += [table_row(other, of_other) for other, of_other in stored.items()]
    lines += [
        "",
        "One seed each. Recall: 200 steps of 4,096 tokens, at the best of four learning rates.",
        "Keys stored again: at the better of that rate and the next lower one. Parity: 500 steps",
        "of 2,048 tokens, one layer, at the better of two. Cost: CPU time of a step without the",
        f"optimizer, relative to {REFERENCE}.",
        "",
    ]
    return "\n".join(lines)


def table_row(name, card):
    cells = [name, f"{card['parameters']:,}"]
    for part, key, write in COLUMNS.values():
        value = card[part][key]
        cells.append("-" if value is None else write(value))
    cells.append(write_by_state(card["by_state"]))
    return f"| {' | '.join(cells)} |"


def write_by_state(sizes):
    """sizes: the part "by_state" of a card -> "22: 0.801, 44: 0.900" """
    cells = []
    for size in sizes:
        if size["accuracy"] is not None:  # else the run failed
            cells.append(f"{size['bytes'] / 1000:,.0f}: {size['accuracy']:.3f}")
    return ", ".join(cells) or "-"


def draw(path, name, card, stored):
    plt, fig, axes = figure(2, 4, width=4)
    for axis, (part, (title, xlabel, ylabel)) in zip(axes, PANELS.items()):
        draw_part = draw_by_state if part == "by_state" else draw_line
        for number, (other, of_other) in enumerate(stored.items()):
            dashes = "-" if number < N_COLOURS else "--"
            style = {"ls": dashes, "lw": 1, "ms": 3, "alpha": 0.6}
            draw_part(axis, of_other[part], **style, label=other)
        draw_part(axis, card[part], lw=2, ms=5, color="black", label=name)
        axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
        if part != "cost":
            axis.set_ylim(-0.02, 1.02)
    *_, empty = axes
    empty.axis("off")
    empty.legend(*axes[0].get_legend_handles_labels(), loc="center")
    finish_figure(fig, plt, path, "")


def draw_line(axis, values, **style):
    """values {x: number or None}: a point each, and nothing where a run failed"""
    heights = [math.nan if value is None else value for value in values.values()]
    axis.plot(range(len(values)), heights, marker="o", **style)
    axis.set_xticks(range(len(values)), values)


def draw_by_state(axis, sizes, **style):
    """sizes: the part "by_state" of a card"""
    kilobytes = [size["bytes"] / 1000 for size in sizes]
    heights = [math.nan if size["accuracy"] is None else size["accuracy"] for size in sizes]
    axis.plot(kilobytes, heights, marker="o", **style)
    log_axis(axis, (10, 20, 50, 100, 200, 400))
