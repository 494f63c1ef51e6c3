"""Rewrite facts that a memory model knows: are they answered anew, and the others as before?

python eval.py edit runs/RUN                       # 1, 10 and 100 facts: memory.write beside fine-tuning
python eval.py edit runs/RUN --edits "[1,3,300]"
"""

import time

import numpy as np
import torch

import model as model_file
from configs import require
from look import save
from measure import figure, predict, share, shown, table
from memory import reading_statistics, write, write_problem
from tokens import mask, shift


def edit(look):
    """Rewrite so many facts at once, with every method, and measure both sides."""
    data, model, config = look.data, look.model, look.config
    require(look.world.size == 1, "edit is the work of one process; run it without torchrun", None)
    batches = list(predict(model, data, config.split, config.eval_batch_size, look.device, look.dtype, bar=True))
    rows = np.unique(np.concatenate([b["row"] for b in batches]))
    known = rows[np.concatenate([b["row_hit"] for b in batches])]
    need = max(config.edits) + 10
    require(len(known) >= need, f"{look.folder} answers {len(known)} facts rightly; edits={config.edits} needs {need}", "edits")
    random = np.random.default_rng(look.plan.train.seed)
    texts = [data.source.read(config.split, [row])[0][0] for row in random.permutation(known)]
    first = {n: t.clone() for n, t in model.state_dict().items()}
    results = []
    for n in config.edits:
        new, others = (encode(look, t) for t in ([other_answer(t, random) for t in texts[:n]], texts[n : n + 1000]))
        for name, method in EDITORS.items():
            start = time.perf_counter()
            method(model, *new, others)
            seconds = time.perf_counter() - start
            efficacy, specificity = (share(answered(model, *x), len(x[0])) for x in (new, others))
            results.append({"method": name, "edits": n, "efficacy": efficacy, "specificity": specificity, "seconds": seconds})
            model.load_state_dict(first)
    head = ("method", "edits", "answered anew", "95% interval", "others as before", "95% interval", "seconds")
    cells = [(shown(r["efficacy"])[1:], shown(r["specificity"])[1:]) for r in results]
    table(head, [(r["method"], r["edits"], *a, *b, f"{r['seconds']:.2f}") for r, (a, b) in zip(results, cells)])
    by_slice = {"method and edits": {f"{r['method']}, {r['edits']}": r for r in results}}
    flat = [{k: v["value"] if isinstance(v, dict) else v for k, v in r.items()} for r in results]
    columns = {k: [r[k] for r in flat] for k in flat[0]}
    save(look, "edit", {"edits": list(config.edits)}, by_slice, (), columns, lambda path: plot_edits(path, results, look.name))


def problem(look):
    """Why the facts of this run cannot be rewritten, or ""."""
    if not hasattr(look.model, "memories"):
        return f"it rewrites memory layers, and {look.plan.train.model} has none"
    if getattr(look.data, "kind", "") not in ("qa", "digits"):
        return f"it rewrites key:value facts, not {getattr(look.plan.data, 'task', look.plan.train.data)}"
    return write_problem(look.model)


def other_answer(text, random):
    """The fact "key:value " with another value: every digit is another one of those in the value's alphabet."""
    key, value = text.strip().split(":")
    digits = sorted(set("123456") | set(value)) if set(value) <= set("1234567") else list("0123456789")
    return f"{key}:{''.join(random.choice([d for d in digits if d != v]) for v in value)} "


def encode(look, texts):
    """Facts of one length -> tokens and targets (R, T)."""
    ids = np.stack([look.data.document(text)[0] for text in texts])
    targets = shift(mask(ids, look.data.kind, tokenizer=look.data.tokenizer))
    return tuple(torch.from_numpy(x).long().to(look.device) for x in (ids, targets))


@torch.no_grad()
def answered(model, tokens, targets):
    """How many rows are right as a whole."""
    return int(model_file.correct(model.eval()(tokens, targets)[0], targets)[1].sum())


def fine_tune(lr, names):
    """An editor that trains the parameters with one of `names` in theirs on the new facts alone, until all are answered."""

    def method(model, tokens, targets, others):
        mine = [q for name, q in model.named_parameters() if any(n in name for n in names)]
        optimizer = torch.optim.Adam(mine, lr=lr)
        for _ in range(200):
            model.zero_grad()
            model(tokens, targets)[1].backward()
            optimizer.step()
            if answered(model, tokens, targets) == len(tokens):
                break

    return method


EDITORS = {  # what changes the model so that it answers (tokens, targets); others (tokens, targets) should stay
    "write": lambda model, tokens, targets, others: write(model, tokens, targets),
    "write, keeping others": lambda model, tokens, targets, others: write(
        model, tokens, targets, keep=reading_statistics(model, [others])
    ),
    "fine-tune the values": fine_tune(1e-2, ["memory.values"]),
    "fine-tune everything": fine_tune(1e-3, [""]),
}


def plot_edits(path, results, title):
    """Efficacy and specificity of each method against the number of facts rewritten."""
    plt, fig, (left, right) = figure(1, 2)
    for name in EDITORS:
        mine = [r for r in results if r["method"] == name]
        for axis, key in ((left, "efficacy"), (right, "specificity")):
            y = np.array([r[key]["value"] for r in mine])
            low, high = np.array([r[key]["ci95"] for r in mine]).T
            errors = np.maximum(0, [y - low, high - y])
            axis.errorbar([r["edits"] for r in mine], y, yerr=errors, fmt="o-", ms=4, capsize=3, label=name)
    for axis, label in (
        (left, "rewritten facts answered anew"),
        (right, f"other facts as before (n = {mine[-1]['specificity']['n']})"),
    ):
        axis.set(
            xscale="log", xlabel="facts rewritten at once", ylabel=label + "\nwhole answers, 95% interval", ylim=(-0.02, 1.02)
        )
        axis.grid(alpha=0.3)
    fig.legend(*left.get_legend_handles_labels(), fontsize=7, loc="outside upper center", ncols=2)
    fig.suptitle(title, fontsize=8, y=0.02, va="bottom")
    fig.savefig(path, dpi=120)
    plt.close(fig)
