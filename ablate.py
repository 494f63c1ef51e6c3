"""Take a trained run apart: remove, replace and exchange what it reads inside, and see which answers change.

    python ablate.py all runs/RUN                    # everything that fits the run, in ablate_report.md with its figures
    python ablate.py keys runs/RUN --modes zero      # each slot that a row reads, removed: importance of every slot
    python ablate.py layer runs/RUN                  # whole blocks: memory, its values, its keys, MLP, mixer
    python ablate.py heads runs/RUN                  # each head, before the last projection
    python ablate.py force | inject | replace | swap runs/RUN     # another row's slot, output, value or slots in this row
    python ablate.py swap-matrix | swap-pred runs/RUN             # which digits can stand in for which, token by token, too
    python ablate.py patch runs/RUN                  # causal tracing: one run's activations in another, block by position
    python ablate.py impact | keystats | occurrences | position | repeats runs/RUN     # read what keys wrote
    python ablate.py corr runs/RUN                   # ablation against swap

Each writes ablate_<what>.json, .parquet and .png into the run; settings away from their defaults
are part of the name, as in ablate_swap_type-less_more.json, and what reads a result takes the one
of the same settings, or the
only one. Rows are those that the model answers rightly, as many of each group (exposures) as there
are. Removing a slot with weight 0 leaves the layer in a state it never was in (off-distribution), so
`keys` also drops it (the next best slot comes in), and puts the mean value, a random one or another row's in its place.

Letters: B rows, M changed copies of rows, T tokens, n labels of a row, H heads, k slots that a head reads.
"""

from dataclasses import dataclass

import numpy as np
import torch

from analysis import importance, patching
from analysis.commands import analysis, fits_all, report, run_command
from analysis.editing import why_not_facts
from analysis.hooks import (
    ABLATIONS,
    SlotAblation,
    ablate_head,
    correct_cases,
    forward_from,
    gather_labels,
    hook_output,
    hook_points,
    logit_diff,
    logits_at,
    run_with_cache,
    run_with_hooks,
)
from analysis.memory_usage import why_not_slots
from analysis.trained_run import AnalysisConfig, concat, save_result
from nanorecall.metrics import print_table
from nanorecall.plots import figure, finish_figure
from nanorecall.settings import at_least, one_of, require, run_cli, say, within
from nanorecall.stats import (
    clustered_mean_ci,
    clustered_mean_proportion,
    clustered_proportion,
    format_ci,
)


@dataclass
class AblateConfig(AnalysisConfig):
    rows: int = 100  # rows to take apart, of those that the model answers rightly; 0: all of them
    modes: str = "zero drop mean random resample"  # keys: how a slot is removed
    pairs: int = 400  # force, inject, replace, swap, swap-matrix: pairs of rows; 0: every pair
    type: str = "any"  # swap and its kin: any, less_less, more_more, less_more, more_less (exposures of row and other row)
    chunk: int = 512  # changed copies of rows in one forward pass
    seed: int = 0  # of what is drawn: pairs, random slots

    def check(self):
        at_least(self, 0, "rows", "pairs")
        within(self, 0, 2**62, "seed")
        super().check()
        at_least(self, 1, "chunk")
        for mode in self.modes.split():
            require(mode in ABLATIONS, f"modes={self.modes!r} must be some of {', '.join(ABLATIONS)}", "modes")
        require(self.modes.split(), f"modes is empty; choose some of {', '.join(ABLATIONS)}", "modes")
        one_of(self, patching.EXPOSURE_PAIRS, "type")


# ---- keys --------------------------------------------------------------------------------------------------------------


def keys(run):
    """Remove each slot from each row that reads it, in every mode: how far does the right answer's lead fall?"""
    c, modes = run.model.config, run.config.modes.split()
    message = f"modes=drop needs a slot more than mem_knn={c.mem_knn} of mem_n_keys={c.mem_n_keys}; leave drop out"
    require("drop" not in modes or c.mem_knn < c.mem_n_keys, message, "modes")
    cases = correct_cases(run)
    found = remove_slots(run.model, cases, modes, run.config.chunk, run.config.seed)
    case = found.pop("case")
    columns = {"row": cases.rows[case], **{name: v[case] for name, v in cases.tags.items()}, **found}
    effects = effects_by_mode(columns)
    lines = [(*k, c["n"], *format_ci(c["fall"])[1:], f"{c['strongest']:.3f}", *format_ci(c["flip"])[1:]) for k, c in effects.items()]
    print_table(
        ("mode", "layer", "measured", "mean fall of the lead", "95% interval", "top 1%", "flips", "95% interval"), lines
    )
    off = "zero is off-distribution: no row was trained with less weight. " * ("zero" in modes)
    print(off + "control: slots that the row does not read.")
    by_slice = {"mode, layer": {f"{mode}, {block}": cell for (mode, block), cell in effects.items()}}
    plot = lambda path: importance.plot_keys(path, columns, run.name)
    save_result(run, "keys", {"rows": len(cases), "modes": modes}, by_slice, (), columns, plot)


@torch.no_grad()
def remove_slots(model, cases, modes, chunk=512, seed=0):
    """Every (row, block, slot) of which the row reads the slot, and a slot that it does not read as control, in every mode

    -> {name: (M * n,)}: case (index of the row), block, slot, mode, control, reads and weight of the slot in the row, place,
    answer, fall (of the lead, in logits), p_clean, p, flip (right before, wrong now).
    Of the last block, only what is read at the labels counts.
    """
    clean, random, parts = run_with_cache(model, cases), np.random.default_rng(seed), []
    lead, p_clean, right = logit_diff(clean.logits, cases.answers)  # (B, n)
    for block, memory in model.memory_layers().items():
        stream, found, at = clean.stream[block], {k: clean.found[block][k] for k in ("slots", "weights")}, cases.at
        if block == len(model.layers) - 1:  # what other positions read there, no answer sees
            stream, found = gather_labels(stream, at), {k: gather_labels(v, at) for k, v in found.items()}
            at = torch.arange(at.shape[1], device=at.device).expand(len(at), -1)
        size = len(memory.values)
        more = memory.topk_slots(model.layers[block].ffn_norm(stream), model.config.mem_knn + 1) if "drop" in modes else None
        case, slot, reads, weight = with_unread(*read_in_rows(found, size), size, random)
        other, borrowed = random.integers(size, size=len(case)), random.permutation(slot)
        for mode in modes:
            for first in range(0, len(case), chunk):
                mine = slice(first, first + chunk)
                i, target, *replacements = (torch.as_tensor(x[mine], device=at.device) for x in (case, slot, other, borrowed))
                copies, best = {k: v[i] for k, v in found.items()}, None if more is None else tuple(x[i] for x in more)
                removal = SlotAblation(memory, copies, target, best, *replacements)
                now, p, still = logit_diff(forward_from(model, block, stream[i], ABLATIONS[mode](removal), at[i]), cases.answers[i])  # (M, n)
                n = now.shape[1]
                known = {"case": case, "slot": slot, "control": reads == 0, "reads": reads, "weight": weight}
                parts.append({name: np.repeat(x[mine], n) for name, x in known.items()})
                parts[-1] |= {"layer": np.full(len(i) * n, block), "mode": np.full(len(i) * n, mode, "U8")}
                measured = {"answer": cases.answers[i], "fall": lead[i] - now, "p_clean": p_clean[i], "p": p}
                measured["flip"] = right[i] & ~still
                parts[-1] |= {"place": np.tile(np.arange(n), len(i))} | {
                    k: v.flatten().cpu().numpy() for k, v in measured.items()
                }
    return concat(parts)


def with_unread(case, slot, reads, weight, size, random):
    """Add to (row, slot) pairs one slot for each row that it does not read, with 0 reads, if there is one."""
    unread = [(b, np.setdiff1d(np.arange(size), slot[case == b])) for b in np.unique(case)]
    more = np.array([(b, random.choice(free)) for b, free in unread if len(free)], np.int64).reshape(-1, 2)
    nothing = np.zeros(len(more), int)
    return np.append(case, more[:, 0]), np.append(slot, more[:, 1]), np.append(reads, nothing), np.append(weight, nothing)


def read_in_rows(found, size):
    """{"slots", "weights" (B, T, H, k)} -> case, slot, times read, sum of weights, (P,) each: the slots of each row."""
    slots, weights = (found[name].flatten(1).cpu().numpy() for name in ("slots", "weights"))
    at, which, reads = np.unique(slots + size * np.arange(len(slots))[:, None], return_inverse=True, return_counts=True)
    return at // size, at % size, reads, np.bincount(which.ravel(), weights.ravel())


def effects_by_mode(columns):
    """{(mode, block or "control"): {"fall", "flip"}}, over rows."""
    cells = {}
    for mode in dict.fromkeys(columns["mode"].tolist()):
        groups = [(str(b), (columns["layer"] == b) & ~columns["control"]) for b in np.unique(columns["layer"])]
        for name, mine in [*groups, ("control", columns["control"])]:
            mine = mine & (columns["mode"] == mode)
            if mine.any():
                fall = clustered_mean_ci(columns["fall"][mine].astype(float), columns["row"][mine])
                flip = clustered_mean_proportion(columns["flip"][mine], columns["row"][mine])
                strongest = np.sort(columns["fall"][mine])[-max(1, mine.sum() // 100) :].mean()
                cells[mode, name] = {"fall": fall, "flip": flip, "strongest": float(strongest), "n": int(mine.sum())}
    return cells


# ---- layers and heads --------------------------------------------------------------------------------------------------


def whole_block_changes(model, seed=0):
    """{(block, what): (hooks, intervene)}: what a block adds is taken out; of a memory layer also, its values are exchanged
    among the slots (what is read where stays), or its slots are drawn at random (the values stay)."""
    changes, g = {}, torch.Generator().manual_seed(seed)
    for name, blocks in hook_points(model).items():
        for i, module in blocks.items() if name != "stream" else ():
            changes[i, "memory, full" if name == "memory" else name] = ([hook_output(name, module, torch.zeros_like)], None)
    for i, memory in model.memory_layers().items() if hasattr(model, "memory_layers") else ():
        changes[i, "memory, values"] = ([], {i: other_values(torch.randperm(len(memory.values), generator=g))})
        changes[i, "memory, keys"] = ([], {i: random_slots(len(memory.values), g)})
    return dict(sorted(changes.items()))


def other_values(order):
    return lambda found: {"slots": order.to(found["slots"].device)[found["slots"]], "weights": found["weights"]}


def random_slots(size, g):
    def change(found):
        slots = torch.randint(size, found["slots"].shape, generator=g).to(found["slots"].device)
        return {"slots": slots, "weights": found["weights"]}

    return change


def layer(run):
    """Take out what each block adds: attention or another mixer, MLP, memory; of memory also values or keys alone."""
    cases = correct_cases(run)
    lead, _, _ = logit_diff(run_with_cache(run.model, cases).logits, cases.answers)
    parts = []
    for (block, what), (hooks, intervene) in whole_block_changes(run.model, run.config.seed).items():
        now, p, right = logit_diff(run_with_hooks(run.model, cases, hooks, intervene), cases.answers)
        parts.append(measured(cases, {"layer": block, "what": what}, lead - now, p, right))
    columns = concat(parts)
    by_slice = {"layer, what": {}, "layer, what, place": {}}
    for block, what in dict.fromkeys(zip(columns["layer"].tolist(), columns["what"].tolist())):
        mine = (columns["layer"] == block) & (columns["what"] == what)
        by_slice["layer, what"][f"{block}, {what}"] = effect(columns, mine)
        for place in np.unique(columns["place"]):
            here = mine & (columns["place"] == place)
            by_slice["layer, what, place"][f"{block}, {what}, {place}"] = effect(columns, here)
    print_effects("layer, without its", by_slice["layer, what"])
    save_result(run, "layer", {"rows": len(cases)}, by_slice, (), columns, lambda path: plot_effects(path, by_slice, run.name))


def measured(cases, about, fall, p, right):
    """Effects (B, n) -> columns (B * n,)"""
    B, n = fall.shape
    each = {name: np.full(B * n, v) for name, v in about.items()}
    tags = {name: np.repeat(v, n) for name, v in cases.tags.items()}
    place, answer = np.tile(np.arange(n), B), cases.answers.flatten().cpu().numpy()
    numbers = {"fall": fall, "p": p, "right": right}
    return {**each, "row": np.repeat(cases.rows, n), **tags, "place": place, "answer": answer} | {
        name: x.flatten().float().cpu().numpy() for name, x in numbers.items()
    }


def effect(columns, mine):
    """Of some measurements: accuracy that is left, and the mean fall of the lead; intervals over rows."""
    right = clustered_proportion(columns["right"][mine] > 0, columns["row"][mine])
    return {"accuracy": right, "fall": clustered_mean_ci(columns["fall"][mine], columns["row"][mine])}


def print_effects(head, cells):
    lines = [(name, *format_ci(c["accuracy"]), *format_ci(c["fall"])[1:]) for name, c in cells.items()]
    print_table((head, "labels", "accuracy left", "95% interval", "mean fall of the lead", "95% interval"), lines)


def plot_effects(path, by_slice, title):
    """Accuracy that is left without each part; the fall of the lead by place in the answer."""
    whole, by_place = by_slice.values()
    plt, fig, (left, right) = figure(1, 2, width=5.5, grid=False)
    fig.set_size_inches(11, max(3.2, 0.6 + 0.24 * len(whole)))
    cells, at = [c["accuracy"] for c in whole.values()], np.arange(len(whole))[::-1]
    y, (low, high) = np.array([c["value"] for c in cells]), np.array([c["ci95"] for c in cells]).T
    left.errorbar(y, at, xerr=np.maximum(0, [y - low, high - y]), fmt="o", ms=4, capsize=3)
    left.set_yticks(at, list(whole), fontsize=7)
    left.set(xlabel=f"accuracy left (95%, n = {cells[0]['n']} labels)", xlim=(-0.02, 1.02), ylabel=next(iter(by_slice)))
    left.grid(alpha=0.3)
    places = sorted({int(k.rsplit(", ", 1)[1]) for k in by_place})
    grid = np.array([[by_place[f"{name}, {p}"]["fall"]["value"] for p in places] for name in whole])
    drawn = right.imshow(grid, aspect="auto", cmap="magma_r", vmin=0)
    right.set_xticks(range(len(places)), places, fontsize=7)
    right.set_yticks(range(len(whole)), list(whole), fontsize=7)
    right.set_xlabel("place in the answer")
    fig.colorbar(drawn, ax=right, label="mean fall of the lead (logits)")
    finish_figure(fig, plt, path, title)


def heads(run):
    """Take out each head: how far does the lead fall, at which place of the answer, for which digit?"""
    cases = correct_cases(run)
    lead, _, _ = logit_diff(run_with_cache(run.model, cases).logits, cases.answers)
    parts = []
    for block, mixer in hook_points(run.model).get("mixer", {}).items():
        for head in range(mixer.n_heads):
            hooks = [ablate_head(mixer.out_proj, mixer.n_heads, head)]
            now, p, right = logit_diff(run_with_hooks(run.model, cases, hooks), cases.answers)
            parts.append(measured(cases, {"layer": block, "head": head}, lead - now, p, right))
    columns = concat(parts)
    columns["name"] = np.array([f"L{b}H{h}" for b, h in zip(columns["layer"], columns["head"])])
    by_slice, digits = {"head": {}, "head, place": {}}, {}
    for name in dict.fromkeys(columns["name"].tolist()):
        mine = columns["name"] == name
        by_slice["head"][name] = effect(columns, mine)
        for place in np.unique(columns["place"]):
            by_slice["head, place"][f"{name}, {place}"] = effect(columns, mine & (columns["place"] == place))
        for answer in np.unique(columns["answer"]) if len(np.unique(columns["answer"])) <= 24 else ():
            here = mine & (columns["answer"] == answer)
            digits.setdefault(run.token(answer), {})[name] = effect(columns, here)
    print_effects("without head", by_slice["head"])
    hurt = {digit: max(cells, key=lambda name: cells[name]["fall"]["value"]) for digit, cells in digits.items()}
    if hurt:
        say("the head that each answer needs most:", ", ".join(f"{d!r}: {name}" for d, name in hurt.items()))
    by_slice["answer, head"] = {f"{d!r}, {name}": c for d, cells in digits.items() for name, c in cells.items()}
    two = {k: by_slice[k] for k in ("head", "head, place")}
    metrics = {"rows": len(cases), "head of each answer": hurt}
    save_result(run, "heads", metrics, by_slice, (), columns, lambda path: plot_effects(path, two, run.name))


# ---- all ---------------------------------------------------------------------------------------------------------------


def run_all(run):
    """Each command that fits_all, and ablate_report.md."""
    report(run, "ablate.py", COMMANDS, [name for name in COMMANDS if name != "all"], "ablate_report.md")


def why_not_memory(run):
    """Why answers are not digits after a key, read from memory, or ""."""
    return why_not_slots(run) or why_not_facts(run)


def why_not_blocks(run):
    """Why blocks cannot be taken apart, or ""."""
    model, needed = run.model, ("embed_tokens", "layers", "final_norm", "lm_head")
    if not all(hasattr(model, name) for name in needed):
        return f"it needs a model with {', '.join(needed)}"
    tokens = torch.arange(min(4, run.data.seq_len), device=run.device)[None]
    tokens = tokens % run.data.vocab_size
    with torch.no_grad():
        try:
            ours = logits_at(model, tokens, torch.arange(tokens.shape[1], device=run.device)[None])
            whole = model(tokens)[0]
            same = ours.shape == whole.shape and torch.allclose(ours, whole, rtol=1e-3, atol=1e-3)
        except (TypeError, AttributeError, ValueError, RuntimeError):
            # A fork's layers may want more than x.
            same = False
    return "" if same else f"{', '.join(needed)}, one after another, do not give its logits"


def why_not_heads(run):
    if why_not_blocks(run):
        return why_not_blocks(run)
    mixers = hook_points(run.model).get("mixer", {}).values()
    if not mixers:
        return "its layers have no mixer (use_att=0)"
    parted = all(hasattr(m, "n_heads") and hasattr(m, "out_proj") for m in mixers)
    return "" if parted else "its mixers have no heads and out_proj"


def why_not_pairs(run):
    """Why rows cannot be set beside others of the same form with another answer, or ""."""
    return why_not_blocks(run) or ("" if run.settings.train.data == "data_mqar" else why_not_facts(run))


PAIRS = "rows pairs type chunk seed"
KEYS = "rows modes seed"  # of what reads the result of keys: which one
COMMANDS = {
    "keys": analysis(
        keys,
        "rows modes chunk seed",
        "Every slot that a row reads, removed: which matter, and how much.",
        why_not_slots,
    ),
    "impact": analysis(
        importance.impact,
        KEYS,
        "Which slots matter, by how much more than a random one, for which facts.",
        why_not_slots,
    ),
    "keystats": analysis(
        importance.keystats,
        KEYS,
        "How often slots are read, how their effects vary, which are alike.",
        why_not_slots,
    ),
    "occurrences": analysis(
        importance.occurrences,
        KEYS,
        "How reads spread over the slots: unused ones, Gini's coefficient.",
        why_not_slots,
    ),
    "position": analysis(
        importance.position, KEYS, "At which places of the answer removal costs most.", why_not_slots
    ),
    "repeats": analysis(
        importance.repeated_digits, KEYS, "Are keys with repeated digits easier to remove?", why_not_memory
    ),
    "layer": analysis(layer, "rows seed", "Whole parts of layers, taken out.", why_not_blocks),
    "heads": analysis(
        heads,
        "rows seed",
        "Heads, taken out one by one: which are needed, where, for which digit.",
        why_not_heads,
    ),
    **{
        name: analysis(
            lambda run, name=name: patching.interchange(run, name), PAIRS, shows, why_not_memory
        )
        for name, shows in (
            ("force", "One head reads another row's strongest slot alone."),
            ("inject", "Everything that another row reads at its label, in one layer."),
            (
                "replace",
                "The strongest slot's value, overwritten with that of another row's strongest slot.",
            ),
            (
                "swap",
                "Another row's slots under the row's own weights, by how often both were shown.",
            ),
        )
    },
    "swap-matrix": analysis(
        patching.swap_matrix,
        PAIRS,
        "All that another row reads: which digits stand in for which.",
        why_not_memory,
    ),
    "swap-pred": analysis(
        importance.swap_predictions,
        "rows pairs type seed",
        "What each digit turns into after the exchange.",
        why_not_memory,
    ),
    "corr": analysis(
        importance.ablation_vs_swap,
        "rows modes pairs type seed",
        "Do rows that suffer from removal take another row's answer?",
        why_not_memory,
    ),
    "patch": analysis(
        patching.patch, "rows seed", "Causal tracing: where the answer is decided.", why_not_pairs
    ),
    "all": analysis(
        run_all, "rows modes pairs type chunk seed", "Everything that fits the run.", fits_all
    ),
}


def main(argv=None):
    run_command(__doc__, COMMANDS, AblateConfig, argv, prefix="ablate")


if __name__ == "__main__":
    run_cli(main)
