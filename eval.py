"""Measure trained runs.

    python eval.py runs/RUN                       # test accuracy by slice, with 95% intervals
    python eval.py runs/RUN --split val --checkpoint ckpt
    python eval.py runs/RUN --examples 8          # and what the model answers to eight rows
    python eval.py compare 'runs/*'               # runs side by side: table, accuracy against steps, pairs and state
    python eval.py edit runs/RUN                  # rewrite stored facts without gradients (memory.write), beside fine-tuning

The first three write eval_<split>.json, .parquet (one row per label) and .png into the run; compare writes <out>.parquet
and <out>.png. A run is rebuilt from its own config.json and checkpoint; no override file is run.
"""

import glob
import json
import os
import sys
import time
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch

import configs
import model as model_file
from checkpoint import read_json, read_log, write_file, write_json
from configs import ConfigError, one_of, require
from measure import figure, predict, print_slices, share, shares, shown, summarise, table
from memory import reading_statistics, write, write_problem
from model import greedy
from parallel import choose_device
from tokens import mask, shift
from train import load_run, read_plan


@dataclass
class EvalConfig:
    split: str = "test"  # test or val
    checkpoint: str = "best"  # best (highest val accuracy) or ckpt (latest)
    eval_batch_size: int = 100  # rows in a forward pass
    examples: int = 0  # print so many rows with the answers that the model gives, token by token
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: str = "auto"  # float32 or bfloat16; auto: as the run was trained
    edits: tuple[int, ...] = (1, 10, 100)  # edit: how many facts to rewrite at once
    out: str = ""  # compare: where to write, without ending; empty: compare beside the first run

    def check(self):
        configs.at_least(self, 1, "eval_batch_size")
        configs.at_least(self, 0, "examples")
        require(self.edits and min(self.edits) >= 1, f"edits={self.edits} needs numbers of at least 1", "edits")
        one_of(self, ("test", "val"), "split")
        one_of(self, ("best", "ckpt"), "checkpoint")
        one_of(self, ("auto", "float32", "bfloat16"), "dtype")


# ---- one run -----------------------------------------------------------------------------------------------------------


def slices(words, config):
    """Accuracy of one run, whole and by slice."""
    require(len(words) == 1, "name one run directory: python eval.py runs/RUN", None)
    folder = words[0]
    p, data, model, state = load_run(folder, config.checkpoint)
    text = config.examples == 0 or hasattr(data, "tokenizer")
    require(text, f"examples={config.examples} prints text, and {p.train.data} has none; leave it out", "examples")
    if config.dtype == "auto":
        config.dtype = p.train.dtype
    device, dtype, line = choose_device(config)
    print(f"{folder}: {config.checkpoint}.pt of step {state['step']}; {line}")
    batches = list(predict(model.to(device), data, config.split, config.eval_batch_size, device, dtype, bar=True))
    result = summarise(batches)
    everything = shares(result["all"])
    metrics = {
        "accuracy": share(result["all"]["right"], result["all"]["labels"]),
        "row_accuracy": everything["exact"],
        "loss": {"value": result["loss"], "n": result["labels"]},
        "without_knowledge": getattr(data, "chance", {}),
        "stored": stored_bits(batches, data, model),
    }
    by_slice = {tag: {str(v): shares(cell) for v, cell in cells.items()} for tag, cells in result["by_slice"].items()}
    about = {
        "run": folder,
        "split": config.split,
        "checkpoint": config.checkpoint,
        "step": state["step"],
        "model": p.train.model,
    }
    print_slices(result)
    for name, value in metrics["without_knowledge"].items():
        print(f"without knowledge: {name}: {value:.4f}")
    for name, value in metrics["stored"].items():
        print(f"{name}: {value['value']:.4g} (95% interval {value['ci95'][0]:.4g} - {value['ci95'][1]:.4g})")
    path = os.path.join(folder, f"eval_{config.split}")
    write_json(
        path + ".json",
        {"config": about, "metrics": metrics, "by_slice": by_slice, "examples": os.path.basename(path) + ".parquet"},
    )
    columns = {tag: np.concatenate([b["tags"][tag] for b in batches]) for tag in batches[0]["tags"]}
    write_parquet(path + ".parquet", {k: np.concatenate([b[k] for b in batches]) for k in ("row", "hit", "loss")} | columns)
    plot_slices(
        path + ".png", by_slice or {"all": {"all": everything}}, f"{os.path.basename(os.path.normpath(folder))}, {config.split}"
    )
    print(f"wrote {path}.json, .parquet, .png")
    for example in answers(model, data, config.split, config.examples, device):
        print(*example, sep="\n  ")


def stored_bits(batches, data, model):
    """Bits of the trained facts that the model stores, as {name: {"value", "ci95", "n"}}; {} where answers follow from others.

    Of each fact the bits of its answer less its loss, at least 0 (Allen-Zhu and Li 2024, arXiv 2404.05405), here with the facts
    that were measured, times the number of all; the interval is that of the mean over facts.
    """
    knowledge = getattr(getattr(data, "source", None), "knowledge", {})
    if not knowledge:
        return {}
    tag, value = knowledge["slice"].split("=")
    row, loss, kind = (
        np.concatenate([b[k] if k != "tag" else b["tags"][tag] for b in batches]) for k in ("row", "loss", "tag")
    )
    mine = kind.astype(str) == value
    _, which = np.unique(row[mine], return_inverse=True)
    labels, nats = np.bincount(which), np.bincount(which, loss[mine])
    bits = np.maximum(0, labels * knowledge["bits"] - nats / np.log(2))  # of each fact
    mean, half = bits.mean(), 1.96 * bits.std(ddof=1) / np.sqrt(len(bits))
    every = sum(q.numel() for q in model.parameters())
    values = {id(q): q.numel() for name, q in model.named_parameters() if name.endswith("memory.values")}
    sizes = {"bits stored": 1, "bits stored per parameter": every, "bits stored per memory value": sum(values.values())}
    ends = np.array([mean, mean - half, mean + half]) * knowledge["facts"]
    return {
        name: {"value": ends[0] / size, "ci95": [ends[1] / size, ends[2] / size], "n": len(bits)}
        for name, size in sizes.items()
        if size
    }


def answers(model, data, split, count, device):
    """Yield, for rows spread over a split, the text before the answer, the answer, and what the model writes there.

    It reads the text and decodes greedily, its own tokens fed back, so from its first error on it may differ from what the
    accuracy of labels counts; whole rows that are right are right both ways.
    """
    rows = np.concatenate([list(s) for s in data.segments(split)])
    for row in rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]:
        tokens, targets, *_ = data.batch(split, 0, [row])
        at = np.flatnonzero(targets[0] != -100)
        if len(at) == 0:
            yield [f"row {row} has no answer"]
            continue
        at = at[at - np.arange(len(at)) == at[0]]  # the first answer of the row
        written = greedy(model, tokens[:, : at[0] + 1].to(device), len(at))
        texts = (tokens[0, : at[0] + 1], targets[0, at], written[0].cpu())
        yield [f"{name:8} {data.tokenizer.decode(ids)!r}" for name, ids in zip(("prompt", "answer", "model"), texts)]


def write_parquet(path, columns):
    """{name: array or list} -> one parquet file, complete or absent."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_file(path, lambda f: pq.write_table(pa.table(columns), f))


def plot_slices(path, by_slice, title):
    """One panel per tag: accuracy of each of its values, with intervals. A tag with a single value says nothing: left out."""
    tags = [t for t in by_slice if len(by_slice[t]) > 1] or list(by_slice)[:1]
    plt, fig, axes = figure(1, len(tags))
    for axis, tag in zip(axes, tags):
        cells = list(by_slice[tag].values())
        y = np.array([c["value"] for c in cells])
        low, high = np.array([c["ci95"] for c in cells]).T
        axis.errorbar(range(len(cells)), y, yerr=[np.maximum(0, y - low), np.maximum(0, high - y)], fmt="o-", ms=4, capsize=3)
        axis.set_xticks(range(len(cells)), [f"{v}\nn={c['n']}" for v, c in by_slice[tag].items()], fontsize=7)
        axis.set(xlabel=tag, ylabel="accuracy (95% interval)", ylim=(min(0.98, low.min()) - 0.02, 1.005))
        axis.grid(alpha=0.3)
    fig.suptitle(title, fontsize=8)
    fig.savefig(path, dpi=120)
    plt.close(fig)


# ---- rewriting facts ---------------------------------------------------------------------------------------------------


def edit(words, config):
    """Rewrite facts that a memory model knows: are they answered anew, and the others as before?"""
    require(len(words) == 1, "name one run directory: python eval.py edit runs/RUN", None)
    folder = words[0]
    p, data, model, _ = load_run(folder, config.checkpoint)
    require(hasattr(model, "memories"), f"edit rewrites memory layers, and {p.train.model} has none", None)
    problem = write_problem(model)
    require(not problem, f"{folder} cannot be edited: {problem}", None)
    require(getattr(data, "kind", "") in ("qa", "digits"), f"edit rewrites key:value facts, not those of {p.train.data}", None)
    batches = list(predict(model, data, config.split, config.eval_batch_size, torch.device("cpu"), bar=True))
    rows = np.unique(np.concatenate([b["row"] for b in batches]))
    known = rows[np.concatenate([b["row_hit"] for b in batches])]
    need = max(config.edits) + 10
    require(len(known) >= need, f"{folder} answers {len(known)} facts rightly; edits={config.edits} needs {need}", "edits")
    random = np.random.default_rng(p.train.seed)
    texts = [data.source.read(config.split, [row])[0][0] for row in random.permutation(known)]
    first = {n: t.clone() for n, t in model.state_dict().items()}
    results = []
    for n in config.edits:
        new, others = encode(data, [other_answer(t, random) for t in texts[:n]]), encode(data, texts[n : n + 1000])
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
    path = os.path.join(folder, "eval_edit")
    write_json(path + ".json", {"config": {"run": folder, "edits": config.edits}, "results": results})
    flat = [{k: v["value"] if isinstance(v, dict) else v for k, v in r.items()} for r in results]
    write_parquet(path + ".parquet", {k: [r[k] for r in flat] for k in flat[0]})
    plot_edits(path + ".png", results, os.path.basename(os.path.normpath(folder)))
    print(f"wrote {path}.json, .parquet, .png")


def other_answer(text, random):
    """The fact "key:value " with another value: every digit is another one of those in the value's alphabet."""
    key, value = text.strip().split(":")
    digits = sorted(set("123456") | set(value)) if set(value) <= set("1234567") else list("0123456789")
    return f"{key}:{''.join(random.choice([d for d in digits if d != v]) for v in value)} "


def encode(data, texts):
    """Facts of one length -> tokens and targets (R, T)."""
    ids = np.stack([data.document(text)[0] for text in texts])
    targets = shift(mask(ids, data.kind, tokenizer=data.tokenizer))
    return torch.from_numpy(ids).long(), torch.from_numpy(targets).long()


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


# ---- several runs ------------------------------------------------------------------------------------------------------


def compare(words, config):
    """Finished runs side by side."""
    require(words, "name the runs to compare: python eval.py compare 'runs/*'", None)
    folders = sorted({f for word in words for f in glob.glob(word) if os.path.isdir(f)})
    runs, left_out = [], []
    for folder in folders:
        if os.path.exists(os.path.join(folder, "config.json")):
            try:
                runs.append(read_result(folder))
            except (OSError, json.JSONDecodeError, KeyError, TypeError, ConfigError) as e:
                left_out.append(f"{folder} ({type(e).__name__}: {e})")
    if left_out:
        print("left out, because they have no test result that can be read:", *left_out, sep="\n  ", file=sys.stderr)
    require(runs, f"no run with a test result matches {' '.join(words)}", None)
    head = ("run", "model", "layer params", "state bytes", "seed", "steps", "seconds", "accuracy", "95% interval")
    names = ("run", "model", "params", "state", "seed", "steps", "seconds")
    table(head, [(*(r[k] for k in names), *shown(r["all"])[1:]) for r in runs])
    out = config.out or os.path.join(os.path.dirname(os.path.normpath(folders[0])) or ".", "compare")
    flat = [
        {k: v for k, v in r.items() if k not in ("all", "by_slice", "curve", "settings")} | {"accuracy": r["all"]["value"]}
        for r in runs
    ]
    write_parquet(out + ".parquet", {k: [r[k] for r in flat] for k in flat[0]})
    plot_compare(out + ".png", runs)
    print(f"wrote {out}.parquet, {out}.png")


def read_result(folder):
    """What compare shows of one finished run; KeyError if it has no test result."""
    status, saved = (read_json(os.path.join(folder, name + ".json")) for name in ("status", "config"))
    test = status["test"]
    own = ("seed", "run_name", "log_dir", "exp_group", "device", "threads")  # what may differ between runs of one line
    p = read_plan(folder)
    sizes = SimpleNamespace(**saved["model"])
    state = p.model_class.state_bytes(sizes) if hasattr(p.model_class, "state_bytes") else 0
    shape = f"D{sizes.dim} L{sizes.n_layers}" if hasattr(sizes, "n_layers") else ""
    return {
        "run": os.path.basename(os.path.normpath(folder)),
        "model": p.train.model,
        "line": f"{p.train.model} {shape}, {saved['parameters']['layers']} params",
        "settings": json.dumps([{k: v for k, v in saved[part].items() if k not in own} for part in ("train", "model", "data")]),
        "params": saved["parameters"]["layers"],
        "state": state,
        "seed": p.train.seed,
        "steps": status["step"],
        "seconds": round(status["seconds"], 1),
        "all": share(round(test["accuracy"] * test["labels"]), test["labels"]),
        "curve": [(r["step"], r["accuracy"]) for r in read_log(folder) if r["kind"] == "eval"],
        "by_slice": {tag: {v: shares(c)["value"] for v, c in cells.items()} for tag, cells in test["by_slice"].items()},
    }


def plot_compare(path, runs):
    """Accuracy against steps, the first slices that all runs have, and state.

    Runs that differ in their seed only are one colour, with mean and range.
    """
    common = [tag for tag in runs[0]["by_slice"] if all(tag in r["by_slice"] for r in runs)]
    tag = common[0] if common else None
    names = list(dict.fromkeys(v for r in runs for v in r["by_slice"].get(tag, {})))
    names = sorted(names, key=int) if all(v.isdigit() for v in names) else names
    plt, fig, (first, left, right) = figure(1, 3)
    lines = {
        settings: [r for r in runs if r["settings"] == settings] for settings in dict.fromkeys(r["settings"] for r in runs)
    }
    for same in lines.values():
        line = same[0]["line"]
        if sum(line == others[0]["line"] for others in lines.values()) > 1:
            line += f", {same[0]['run'][-40:]}"  # same model, other settings
        values = [[r["by_slice"][tag][v] for r in same if v in r["by_slice"][tag]] for v in names]
        at = [i for i, found in enumerate(values) if found]
        mean, low, high = ([f(values[i]) for i in at] for f in (np.mean, min, max))
        (drawn,) = left.plot(at, mean, "o-", ms=4, label=f"{line} (runs: {len(same)})")
        left.fill_between(at, low, high, alpha=0.2, color=drawn.get_color())
        for r in same:
            first.plot(*zip(*r["curve"]), ".-", ms=4, lw=1, color=drawn.get_color())
        y = [r["all"]["value"] for r in same]
        ends = np.array([r["all"]["ci95"] for r in same]).T
        errors = np.maximum(0, [y - ends[0], ends[1] - y])
        right.errorbar([r["state"] for r in same], y, yerr=errors, fmt="o", ms=4, capsize=3, color=drawn.get_color())
    first.set(xlabel="step", ylabel="val token accuracy, each run")
    left.set(xlabel=tag or "(no slices that all runs have)", ylabel="test token accuracy, mean and range")
    left.set_xticks(range(len(names)), names, fontsize=7)
    right.set(xlabel="state at the longest test row (bytes, float32)", ylabel="test token accuracy, 95% interval")
    fig.legend(*left.get_legend_handles_labels(), fontsize=7, loc="outside upper center", ncols=2)
    for axis in (first, right):
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
    for axis in (first, left, right):
        axis.set_ylim(-0.02, 1.02)
        axis.grid(alpha=0.3)
        axis.yaxis.label.set_fontsize(8)
    fig.savefig(path, dpi=120)
    plt.close(fig)


COMMANDS = {"slices": slices, "edit": edit, "compare": compare}  # `python eval.py RUN` is short for `python eval.py slices RUN`
IGNORES = {
    "slices": {"out": "only compare writes there", "edits": "only edit rewrites facts"},
    "edit": {"out": "only compare writes there", "examples": "only the slices of a run come with examples"},
    "compare": dict.fromkeys(set(EvalConfig.__dataclass_fields__) - {"out"}, "compare only reads results"),
}


def main(argv=None):
    words, settings = configs.parse(sys.argv[1:] if argv is None else argv)
    if any(s.key == "help" for s in settings) or not words:
        print(configs.help_text(__doc__, EvalConfig))
        if not words and not any(s.key == "help" for s in settings):
            raise ConfigError("name a run directory or a command")
        return
    configs.check_names(settings, EvalConfig)
    config = configs.build(EvalConfig, settings)
    command = words.pop(0) if words[0] in COMMANDS else "slices"
    configs.refuse_unused(config, IGNORES[command], {s.key: s for s in settings})
    COMMANDS[command](words, config)


if __name__ == "__main__":
    configs.exit_with_sentence(main)
