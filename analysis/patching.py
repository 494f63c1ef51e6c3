"""Put what a model computed for one row into another: slots, values, outputs, whole activations. Does the answer follow?

    python ablate.py force | inject | replace | swap | swap-matrix | patch runs/RUN

Letters: B rows, P pairs, M changed copies of rows, T tokens, n labels of a row, H heads, k slots that a head reads.
"""

import numpy as np
import torch

from analysis.hooks import (
    Examples,
    correct_cases,
    forward_from,
    gather_labels,
    hook_output,
    hook_points,
    hooked,
    logit_diff,
    logits_at,
    run_with_cache,
    run_with_hooks,
)
from analysis.trained_run import concat, save_result
from nanorecall.metrics import in_eval_mode, print_table
from nanorecall.plots import errorbars, figure, finish_figure
from nanorecall.settings import require
from nanorecall.stats import clustered_proportion, format_ci, mean_ci

EXPOSURE_PAIRS = {  # is this pair of exposures wanted? f(of the row is high, of the other is high)
    "any": lambda a, b: np.ones_like(a),
    "less_less": lambda a, b: ~a & ~b,
    "more_more": lambda a, b: a & b,
    "less_more": lambda a, b: ~a & b,
    "more_less": lambda a, b: a & ~b,
}


# ---- what one row reads, in another ------------------------------------------------------------------------------------


def force(mine, other, head):
    """One head reads the other row's strongest slot of that head alone, with all of its own weight."""
    m = torch.arange(len(head), device=head.device)
    best = other["weights"][m, head].argmax(-1)  # (M,)
    slots = mine["slots"].clone()
    slots[m, head] = other["slots"][m, head, best][:, None]
    return {"slots": slots, "weights": mine["weights"]}


def inject(mine, other, head):
    """Everything that the other row reads there: its slots and its weights."""
    return other


def swap(mine, other, head):
    """The other row's slots, in order of weight, under the row's own weights."""
    order, theirs = (f["weights"].argsort(-1, descending=True) for f in (mine, other))
    slots = torch.empty_like(mine["slots"]).scatter(-1, order, other["slots"].gather(-1, theirs))
    return {"slots": slots, "weights": mine["weights"]}


def strongest(found):
    """The slot with the largest weight of all heads: (M, H, k) -> (M,)"""
    best = found["weights"].flatten(1).argmax(-1)
    return found["slots"].flatten(1).gather(1, best[:, None]).squeeze(1)


# f(what the row reads at its label {"slots", "weights" (M, H, k)}, what the other row reads at its own, a head (M,))
# -> what the row is to read instead
EXCHANGES = {"force": force, "inject": inject, "swap": swap}  # and "replace", which does not look at one place only


def draw_pairs(cases, count, kind, seed):
    """Pairs of different rows, of the type `kind` -> row, other: (P,) indices; `count` of them, or all if it is 0."""
    B = len(cases)
    exposures = cases.tags.get("exposures")
    message = f"type={kind} needs rows with exposures, as in task=qa; leave it out"
    require(kind == "any" or exposures is not None, message, "type")
    high = exposures > np.median(exposures) if exposures is not None else np.zeros(B, bool)
    a, b = (x.ravel() for x in np.meshgrid(np.arange(B), np.arange(B), indexing="ij"))
    fitting = np.flatnonzero((a != b) & EXPOSURE_PAIRS[kind](high[a], high[b]))
    require(len(fitting), f"type={kind}: no two rows fit; raise rows", "type")
    if count and count < len(fitting):
        fitting = np.sort(np.random.default_rng(seed).choice(fitting, count, replace=False))
    return a[fitting], b[fitting]


def interchange(run, name):
    """Put what another row reads into a row, at one label, in one block (force: one head) at a time: does the row now give the
    other's answer there? Places where both have the same answer are left out."""
    cases, c = correct_cases(run), run.config
    a, b = draw_pairs(cases, c.pairs, c.type, c.seed)
    columns = exchanged(run.model, cases, a, b, name, c.chunk, c.seed)
    by_slice = {"layer": became_by(columns, "layer"), "layer, place": became_by(columns, "layer", "place")}
    if name == "force":
        by_slice["layer, head"] = became_by(columns, "layer", "head")
    if "type" in columns:
        by_slice["type"] = became_by(columns, "type")
    cells = [(f"{k}={v}", cell) for k in by_slice if k != "layer, place" for v, cell in by_slice[k].items()]
    lines = [(label, *(x for which in OUTCOMES for x in format_ci(cell[which])[1:])) for label, cell in cells]
    head = [x for outcome in OUTCOMES.values() for x in (outcome, "95% interval")]
    print_table((name, *head), lines)
    metrics = {"rows": len(cases), "pairs": len(a), "type": c.type}
    save_result(run, name, metrics, by_slice, (), columns, lambda path: plot_exchange(path, columns, by_slice, run))


OUTCOMES = {"other's": "other's answer", "placebo": "a third answer", "own lost": "own answer lost"}  # columns of `exchanged`


def became_by(columns, *names):
    """{"value, value": {outcome: share}} for every combination of values of these columns."""
    keys = np.array([", ".join(map(str, values)) for values in zip(*(columns[name].tolist() for name in names))])
    found = {}
    for key in dict.fromkeys(keys.tolist()):
        mine = keys == key
        found[key] = {outcome: clustered_proportion(columns[outcome][mine], columns["row"][mine]) for outcome in OUTCOMES}
    return dict(sorted(found.items()))


def exchanged(model, cases, a, b, name, chunk=512, seed=0):
    """Measure EXCHANGES[name] for pairs of rows a, b (P,), each block, place (and head, of force) -> {column: (M,)}.

    other's: the answer became that of row b; placebo: it became one answer, drawn at random, that neither row has there.
    """
    clean, parts, n = run_with_cache(model, cases), [], cases.at.shape[1]
    answers, device = cases.answers.cpu().numpy(), cases.tokens.device
    heads = model.config.mem_heads if name == "force" else 1
    pair, place, head = (x.ravel() for x in np.meshgrid(np.arange(len(a)), np.arange(n), np.arange(heads), indexing="ij"))
    differ = answers[a[pair], place] != answers[b[pair], place]
    pair, place, head = pair[differ], place[differ], head[differ]
    require(len(pair), "all pairs of rows have the same answers; raise rows", None)
    third = control_answers(answers[a[pair], place], answers[b[pair], place], np.unique(answers), seed)
    for block in model.memory_layers():
        for first in range(0, len(pair), chunk):
            i, p, h, x = (v[first : first + chunk] for v in (pair, place, head, third))
            mine, other, t = (torch.as_tensor(v, device=device) for v in (a[i], b[i], p))
            logits = forward_with_interchange(model, cases, clean, block, name, mine, other, t, torch.as_tensor(h, device=device))
            own, theirs, now = cases.answers[mine, t], cases.answers[other, t], logits.argmax(-1)
            before = clean.logits[mine, t]
            measured = {
                "answer": own,
                "other answer": theirs,
                "now": now,
                "other's": now == theirs,
                "own lost": now != own,
                "fall": logit_diff(before, own)[0] - logit_diff(logits, own)[0],
                "p other": logits.softmax(-1).gather(1, theirs[:, None]).squeeze(1),
                "p other before": before.softmax(-1).gather(1, theirs[:, None]).squeeze(1),
            }
            parts.append({k: v.cpu().numpy() for k, v in measured.items()})
            parts[-1] |= {
                "row": cases.rows[a[i]],
                "other": cases.rows[b[i]],
                "layer": np.full(len(i), block),
                "place": p,
                "head": h,
            }
            parts[-1]["placebo"] = parts[-1]["now"] == x
            if "exposures" in cases.tags:
                parts[-1]["type"] = pair_types(cases.tags["exposures"], a[i], b[i])
    return concat(parts)


def control_answers(own, theirs, alphabet, seed):
    """For each pair of answers (M,) one of the others, at random; -1 if there is none."""
    order = np.random.default_rng(seed).permuted(np.tile(alphabet, (len(own), 1)), axis=1)  # (M, letters)
    free = (order != own[:, None]) & (order != theirs[:, None])
    return np.where(free.any(1), order[np.arange(len(own)), free.argmax(1)], -1)


def pair_types(exposures, a, b):
    """The name of each pair's type: less or more exposures than the median, of the row and of the other."""
    high = exposures > np.median(exposures)
    return np.char.add(np.where(high[a], "more_", "less_"), np.where(high[b], "more", "less"))


def forward_with_interchange(model, cases, clean, block, name, mine, other, place, head):
    """Rows mine (M,) with what rows other (M,) read at their labels at place (M,) -> logits (M, tokens) there."""
    here, there = cases.at[mine, place], cases.at[other, place]  # positions of the label in both rows
    found = {k: clean.found[block][k][mine] for k in ("slots", "weights")}  # (M, T, H, k)
    m = torch.arange(len(mine), device=mine.device)
    own = {k: v[m, here] for k, v in found.items()}  # (M, H, k)
    theirs = {k: clean.found[block][k][other, there] for k in found}
    if name == "replace":  # a value is overwritten wherever it is read
        slots = torch.where(
            found["slots"] == strongest(own)[:, None, None, None], strongest(theirs)[:, None, None, None], found["slots"]
        )
        changed = {"slots": slots, "weights": found["weights"]}
    else:
        new = EXCHANGES[name](own, theirs, head)
        changed = {k: v.index_put((m, here), new[k]) for k, v in found.items()}
    return forward_from(model, block, clean.stream[block][mine], changed, here[:, None]).squeeze(1)


def plot_exchange(path, columns, by_slice, run):
    """Where the other row's answer comes through, by block and place; and which digits become which."""
    blocks, places, digits = (np.unique(columns[name]) for name in ("layer", "place", "answer"))
    plt, fig, axes = figure(1, 1 + len(blocks), width=4.6, grid=False)
    for block in blocks:
        cells = [by_slice["layer, place"][f"{block}, {p}"] for p in places]
        errorbars(axes[0], places, [c["other's"] for c in cells], label=f"layer {block}: the other's")
        errorbars(axes[0], places, [c["placebo"] for c in cells], label=f"layer {block}: a third", ls="--")
    axes[0].set(xlabel="place in the answer", ylabel="share of answers (95%)", ylim=(-0.02, 1.02))
    axes[0].legend(fontsize=7)
    for axis, block in zip(axes[1:], blocks):
        mine = columns["layer"] == block
        of_block = {k: columns[k][mine] for k in ("answer", "other answer", "other's")}
        digit_heatmap(fig, axis, of_block, of_block["other's"], digits, run, f"layer {block}: share that became the other's")
    finish_figure(fig, plt, path, f"{run.name}, {len(columns['row'])} changes")


def digit_heatmap(fig, axis, columns, hit, digits, run, title):
    """Share of `hit` (N,) for each pair of own answer and other answer; white: none measured."""
    pairs = [[hit[(columns["answer"] == x) & (columns["other answer"] == y)] for y in digits] for x in digits]
    grid, names = [[h.mean() if len(h) else np.nan for h in row] for row in pairs], [run.token(x) for x in digits]
    drawn = axis.imshow(grid, vmin=0, vmax=1, cmap="viridis")
    axis.set_xticks(range(len(names)), names, fontsize=7)
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set(xlabel="the other row's answer", ylabel="the row's own answer")
    axis.set_title(title, fontsize=8)
    fig.colorbar(drawn, ax=axis, shrink=0.8)


# ---- which digits stand in for which ------------------------------------------------------------------------------------

DECODING = ("teacher-forced", "token by token")


def source_reads(clean, cases, mine, other):
    """{block: change}: at the labels of rows mine (M,), whatever rows other (M,) read at theirs."""
    rows = torch.arange(len(mine), device=mine.device)[:, None]

    def change(new):
        return lambda found: {k: found[k].index_put((rows, cases.at[mine]), new[k]) for k in ("slots", "weights")}

    taken = {
        block: {k: gather_labels(f[k][other], cases.at[other]) for k in ("slots", "weights")} for block, f in clean.found.items()
    }
    return {block: change(new) for block, new in taken.items()}


@in_eval_mode
def decode_with(model, cases, changes):
    """Answers decoded token by token under `changes`, the row's own answers never shown: -> (B, n)."""
    tokens, rows, out = cases.tokens.clone(), torch.arange(len(cases.tokens), device=cases.tokens.device), []
    for place in range(cases.at.shape[1]):
        if out:
            tokens[rows, cases.at[:, place]] = out[-1]
        logits = logits_at(model, tokens, cases.at[:, place : place + 1], intervene=changes)
        out.append(logits[:, 0].argmax(-1))
    return torch.stack(out, 1)


def swap_matrix(run):
    """Rows take all that another row reads at its labels, in all blocks: digit by digit, what comes out? With the right answer
    so far shown (teacher-forced), and decoded token by token."""
    cases, c = correct_cases(run), run.config
    a, b = draw_pairs(cases, c.pairs, c.type, c.seed)
    clean, n, parts = run_with_cache(run.model, cases), cases.at.shape[1], []
    for first in range(0, len(a), c.chunk):
        i, j = (torch.as_tensor(x[first : first + c.chunk], device=cases.tokens.device) for x in (a, b))
        mine, changes = cases.pick(i.cpu()), source_reads(clean, cases, i, j)
        forced = run_with_hooks(run.model, mine, intervene=changes).softmax(-1)  # (M, n, tokens)
        tensors = {
            "answer": mine.answers,
            "other answer": cases.answers[j],
            "p other": forced.gather(-1, cases.answers[j].unsqueeze(-1)).squeeze(-1),
            "teacher-forced": forced.argmax(-1),
            "token by token": decode_with(run.model, mine, changes),
        }
        rows = {
            "row": np.repeat(mine.rows, n),
            "other": np.repeat(cases.rows[j.cpu()], n),
            "place": np.tile(np.arange(n), len(i)),
        }
        parts.append(rows | {k: v.flatten().cpu().numpy() for k, v in tensors.items()})
    columns = concat(parts)
    by_slice = {}
    for how in DECODING:
        by_slice[f"{how}, place"] = matches(columns, how, "other answer", "place")
        by_slice[f"{how}, own digit and other's"] = digit_pairs(columns, how, run)
    lines = [(how, p, *format_ci(cell)) for how in DECODING for p, cell in by_slice[f"{how}, place"].items()]
    print_table(("the other row's digit", "place", "digits", "share", "95% interval"), lines)
    metrics = {"rows": len(cases), "pairs": len(a), "type": c.type}
    save_result(run, "swap_matrix", metrics, by_slice, (), columns, lambda path: plot_swap_matrix(path, columns, run))


def matches(columns, how, which, by):
    """By a column: of the digits in which two rows differ, the share that is now the column `which`."""
    hit, differ, found = columns[how] == columns[which], columns["answer"] != columns["other answer"], {}
    for value in np.unique(columns[by][differ]):
        mine = differ & (columns[by] == value)
        found[str(value)] = clustered_proportion(hit[mine], columns["row"][mine])
    return found


def digit_pairs(columns, how, run):
    hit, found = columns[how] == columns["other answer"], {}
    for x, y in sorted({*zip(columns["answer"].tolist(), columns["other answer"].tolist())}):
        mine = (columns["answer"] == x) & (columns["other answer"] == y)
        cell = clustered_proportion(hit[mine], columns["row"][mine])
        found[f"{run.token(x)}, {run.token(y)}"] = {**cell, "probability": float(columns["p other"][mine].mean())}
    return found


def plot_swap_matrix(path, columns, run):
    plt, fig, axes = figure(2, 2, width=4.6, grid=False)
    for axis, below, how in zip(axes[:2], axes[2:], DECODING):
        hit = columns[how] == columns["other answer"]
        digit_heatmap(fig, axis, columns, hit, np.unique(columns["answer"]), run, f"{how}: share that became the other's")
        for which, label in (("other answer", "the other row's"), ("answer", "still its own")):
            cells = matches(columns, how, which, "place")
            errorbars(below, list(map(int, cells)), list(cells.values()), label=label)
        below.set(xlabel="place in the answer", ylabel=f"share of digits, {how} (95%)", ylim=(-0.02, 1.02))
        below.legend(fontsize=7)
    finish_figure(fig, plt, path, f"{run.name}, {len(columns['row'])} digits")


# ---- activation patching -----------------------------------------------------------------------------------------------


def corrupt(run, cases, seed):
    """Cases -> the same, and runs that end in another first answer: of text, another row of the same form; of MQAR, the same
    row with another value under the first key that is asked for."""
    random = np.random.default_rng(seed)
    if hasattr(run.data, "tokenizer"):
        cases = cases.pick(np.flatnonzero((cases.at == cases.at[:1]).all(1).cpu().numpy()))
        other, first = random.permutation(len(cases)), cases.answers[:, 0].cpu().numpy()
        keep = np.flatnonzero(first != first[other])
        require(len(keep), "all rows have the same first answer; raise rows", None)
        return cases.pick(keep), cases.pick(other[keep])
    tokens, answers, values = (
        cases.tokens.clone(),
        cases.answers.clone(),
        np.arange(run.data.vocab_size // 2, run.data.vocab_size),
    )
    for b in range(len(cases)):
        old = cases.answers[b, 0]
        new = int(random.choice(np.setdiff1d(values, tokens[b].cpu().numpy())))
        tokens[b][tokens[b] == old], answers[b, 0] = new, new
    return cases, Examples(cases.rows, tokens, cases.at, answers, cases.tags)


@torch.no_grad()
def patch(run):
    """Causal tracing (Meng et al. 2022, arXiv 2202.05262): a run with another key, one activation of the right run put into it,
    block by position: how much of the first answer comes back (1: all of the difference in logits, 0: none)?"""
    cases, other = corrupt(run, correct_cases(run), run.config.seed)
    few = np.arange(min(len(cases), max(10, 6000 // cases.tokens.shape[1])))  # long rows have many places to patch
    cases, other = cases.pick(few), other.pick(few)
    back, first, second = recovered(run.model, cases, other)
    T, B = next(iter(back.values())).shape
    columns = {
        "site": np.repeat([name for name, _ in back], T * B),
        "layer": np.repeat([block for _, block in back], T * B),
        "position": np.tile(np.repeat(np.arange(T), B), len(back)),
        "row": np.tile(cases.rows, T * len(back)),
        "back": np.concatenate([x.ravel() for x in back.values()]),
    }
    cells = {f"{site}, {block}, {t}": mean_ci(x[t]) for (site, block), x in back.items() for t in range(T)}
    best = sorted(cells.items(), key=lambda item: -item[1]["value"])[:12]
    print_table(
        ("site, layer, position", "rows", "share of the answer back", "95% interval"), [(k, *format_ci(c)) for k, c in best]
    )
    metrics = {"rows": B, "lead of the answer, right key": mean_ci(first), "lead of the answer, other key": mean_ci(second)}
    by_slice = {"site, layer, position": cells}
    save_result(run, "patch", metrics, by_slice, (), columns, lambda path: plot_patch(path, back, cases, run))


@in_eval_mode
def recovered(model, cases, other):
    """Put each activation of `cases` at (site, block, position) into the runs of `other` -> {(site, block): (T, B)}, the share
    of the difference that comes back; and how far the first answer of `cases` leads that of `other` in both, (B,) each."""
    mine, theirs = cases.answers[:, 0], other.answers[:, 0]
    rows = torch.arange(len(cases), device=mine.device)
    places = [(name, block, module) for name, blocks in hook_points(model).items() for block, module in blocks.items()]
    kept, back, T = {}, {}, 1 + int(max(cases.at[:, 0].max(), other.at[:, 0].max()))  # what comes later cannot matter

    def lead(some, hooks):
        with hooked(hooks):
            logits = logits_at(model, some.tokens[:, :T], some.at[:, :1])[:, 0]
        return logits[rows, mine] - logits[rows, theirs]

    def keep(key):
        return lambda x: kept.setdefault(key, x)

    def put(key, t):
        return lambda x: x.index_copy(1, torch.tensor([t], device=x.device), kept[key][:, t : t + 1])

    first = lead(cases, [hook_output(name, module, keep((name, block))) for name, block, module in places])
    second = lead(other, [])
    for name, block, module in places:
        now = [lead(other, [hook_output(name, module, put((name, block), t))]) for t in range(T)]
        back[name, block] = np.stack([((x - second) / (first - second)).cpu().numpy() for x in now])
    return back, first.cpu().numpy(), second.cpu().numpy()


def plot_patch(path, back, cases, run):
    """A heatmap for each site: blocks down, positions across."""
    names, texts = (
        list(dict.fromkeys(name for name, _ in back)),
        [run.token(i) for i in cases.tokens[0, : len(next(iter(back.values())))].tolist()],
    )
    plt, fig, axes = figure(len(names), 1, width=9, grid=False)
    fig.set_size_inches(max(7, min(16, 0.22 * len(texts) + 2)), 1.2 + 1.5 * len(names))
    step = max(1, len(texts) // 40)
    for axis, name in zip(axes, names):
        blocks = [b for n, b in back if n == name]
        drawn = axis.imshow([back[name, b].mean(1) for b in blocks], aspect="auto", vmin=0, vmax=1, cmap="viridis")
        axis.set_yticks(range(len(blocks)), blocks, fontsize=7)
        text = hasattr(run.data, "tokenizer")
        axis.set_xticks(range(0, len(texts), step), texts[::step] if text else range(0, len(texts), step), fontsize=6)
        axis.set_ylabel(f"{name}\nblock", fontsize=8)
        fig.colorbar(drawn, ax=axis)
    axes[-1].set_xlabel(f"position (tokens of row {cases.rows[0]})" if text else "position")
    finish_figure(fig, plt, path, f"{run.name}: share of the answer that one activation brings back, mean of {len(cases)} rows")
