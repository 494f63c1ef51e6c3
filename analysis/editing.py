"""Rewrite facts that a memory model knows: efficacy (they have the new answer) and specificity (the others keep theirs).

python eval.py edit runs/RUN                       # 1 to 100 facts: memory.write beside fine-tuning
python eval.py edit runs/RUN --edits "[1,300]"
"""

import time

import numpy as np
import torch

from analysis.trained_run import correct_examples, save_result
from memory import check_editable, edit_facts, key_second_moment
from nanorecall.metrics import (
    correct_predictions,
    errorbars,
    evaluating,
    figure,
    finish_figure,
    format_ci,
    in_eval_mode,
    print_table,
    proportion,
)
from nanorecall.settings import require
from nanorecall.text import label_mask, shift_labels


def compare_editors(look):
    """Rewrite n facts at once, for each n of `edits`, with every method, and measure both sides.

    Of the other known facts one half may be used by a method (kept), the other half is only measured (others).
    """
    data, model, config = look.data, look.model, look.config
    require(look.world.size == 1, "edit is the work of one process; run it without torchrun", None)
    known = correct_examples(look)
    need = max(config.edits) + 10
    require(len(known) >= need, f"{look.folder} answers {len(known)} facts rightly; edits={config.edits} needs {need}", "edits")
    random = np.random.default_rng(look.plan.train.seed)
    texts = [data.source.read(config.split, [row])[0][0] for row in random.permutation(known)]
    letters = sorted(set("".join(text.strip().split(":")[1] for text in texts)))
    first = {n: t.clone() for n, t in model.state_dict().items()}
    results = []
    for n in config.edits:
        rewritten, rest = [counterfactual(t, letters, random) for t in texts[:n]], texts[n : n + 1000]
        new, kept, others = (encode(look, t) for t in (rewritten, rest[::2], rest[1::2]))
        for name, method in EDITORS.items():
            start = time.perf_counter()
            try:
                method(model, *new, *kept)
                seconds = time.perf_counter() - start
                sides = zip(METRICS, (new, others, kept))
                shares = {side: proportion(n_correct(model, *x), len(x[0])) for side, x in sides}
            finally:
                model.load_state_dict(first)
            results.append({"method": name, "edits": n, **shares, "seconds": seconds})
    head = ("method", "edits", *(word for side in METRICS for word in (side, "95% interval")), "seconds")
    cells = [[word for side in METRICS for word in format_ci(r[side])[1:]] for r in results]
    print_table(head, [(r["method"], r["edits"], *words, f"{r['seconds']:.2f}") for r, words in zip(results, cells)])
    print(
        "efficacy: rewritten facts, new answer; specificity: others, old answer; kept: others that a method may use, old answer"
    )
    by_slice = {"method and edits": {f"{r['method']}, {r['edits']}": r for r in results}}
    flat = [{k: v["value"] if isinstance(v, dict) else v for k, v in r.items()} for r in results]
    columns = {k: [r[k] for r in flat] for k in flat[0]}
    save_result(look, "edit", {"edits": list(config.edits)}, by_slice, (), columns, lambda path: plot_edits(path, results, look.name))


METRICS = ("efficacy", "specificity", "kept")  # shares of the rewritten facts, of the others, of those that a method may use


def why_not_edit(look):
    """Why the facts of this run cannot be rewritten, or ""."""
    if not hasattr(look.model, "memories"):
        return f"it rewrites memory layers, and {look.plan.train.model} has none"
    return why_not_facts(look) or check_editable(look.model)


def why_not_facts(look):
    """Why the rows of this run are no facts "key:value" of digits, or ""."""
    task = getattr(look.plan.data, "task", look.plan.train.data)
    return "" if task in ("qa", "digits") else f"it needs facts of digits, task=qa or digits, not {task}"


def counterfactual(text, letters, random):
    """The fact "key:value " with another value: each letter is another one of `letters`, those that values are made of."""
    key, value = text.strip().split(":")
    return f"{key}:{''.join(random.choice([x for x in letters if x != v]) for v in value)} "


def encode(look, texts):
    """Facts of one length -> tokens and targets (R, T)."""
    ids = np.stack([look.data.encode_document(text)[0] for text in texts])
    targets = shift_labels(label_mask(ids, look.data.kind, tokenizer=look.data.tokenizer))
    return tuple(torch.from_numpy(x).long().to(look.device) for x in (ids, targets))


@in_eval_mode
def n_correct(model, tokens, targets):
    """How many rows are right as a whole."""
    return int(correct_predictions(model(tokens, targets)[0], targets)[1].sum())


def fine_tune(lr, names, replay=False):
    """An editor that trains the parameters with one of `names` in theirs on the new facts until all are answered; with replay,
    on the kept ones beside them, until those are answered, too. 200 steps at most."""

    def learn(model, tokens, targets, kept, kept_targets):
        mine = [q for name, q in model.named_parameters() if any(n in name for n in names)]
        optimizer = torch.optim.Adam(mine, lr=lr)
        for _ in range(200):
            model.zero_grad()
            loss = model(tokens, targets)[1]
            (loss + model(kept, kept_targets)[1] if replay else loss).backward()
            optimizer.step()
            done = n_correct(model, tokens, targets) == len(tokens)
            if done and (not replay or n_correct(model, kept, kept_targets) == len(kept)):
                break

    def method(model, *facts):
        try:
            with evaluating(model):
                learn(model, *facts)
        finally:
            model.zero_grad()  # or the next training step would add its own to them

    return method


# f(model, tokens, targets, kept tokens, kept targets) changes the model so that it answers targets; the kept should stay
EDITORS = {
    "write": lambda model, x, y, *kept: edit_facts(model, x, y),
    "write, keeping others": lambda model, x, y, *kept: edit_facts(model, x, y, keep=key_second_moment(model, [kept])),
    "fine-tune the values": fine_tune(1e-2, ["memory.values"]),
    "fine-tune everything": fine_tune(1e-3, [""]),
    "fine-tune everything, replaying others": fine_tune(1e-3, [""], replay=True),
}


def plot_edits(path, results, title):
    """The three shares of each method against the number of facts rewritten."""
    plt, fig, axes = figure(1, len(METRICS), width=3.8)
    for axis, side in zip(axes, METRICS):
        for name in EDITORS:
            mine = [r for r in results if r["method"] == name]
            errorbars(axis, [r["edits"] for r in mine], [r[side] for r in mine], label=name)
        n = "" if side == "efficacy" else f" (n = {mine[-1][side]['n']})"
        ylabel = f"{side}{n}\nexact match, 95% interval"
        axis.set(xscale="log", xlabel="facts rewritten at once", ylabel=ylabel, ylim=(-0.02, 1.02))
    fig.legend(*axes[0].get_legend_handles_labels(), fontsize=7, loc="outside upper center", ncols=5)
    fig.supxlabel(title, fontsize=8)
    finish_figure(fig, plt, path, "")
