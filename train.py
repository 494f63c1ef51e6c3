"""Train one model on one task; the run directory it writes can be resumed, measured and taken apart.

    python train.py configs/mqar_gpt.py                          # one process
    python train.py configs/mqar_gpt.py --lr 1e-3 --seed 2       # flags win over files, later over earlier
    python train.py --model gpt --dim 64 --dk 48 --dv 48 --n_heads 2 --n_layers 4 --n_epochs 10
    python train.py --resume runs/RUN                            # go on after Ctrl-C, SIGTERM or a crash
    python train.py configs/mqar_gpt.py --n_epochs 0             # print the model and its parameter counts, and stop

It writes <log_dir>/<run>/: config.json (every setting and where it came from), log.jsonl, ckpt.pt and ckpt_prev.pt (to
resume), best.pt (highest validation accuracy), status.json, curves.png. Exit status: 0 if the run ended at or above
`target`, 1 if below it or if it failed, 2 for a mistake in the settings, 128 + signal number if it was stopped.
"""

import contextlib
import dataclasses
import fcntl
import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

import configs
from configs import ConfigError, Setting, at_least, one_of, require, within

HERE = os.path.dirname(os.path.abspath(__file__))
MODELS = {  # short names; anything else is file or file.Class
    "gpt": "model.GPT",
    "unified_kv": "model.UnifiedKV",
    "delta": "delta.DeltaNet",
    "gated_delta": "delta.GatedDeltaNet",
}
MIGHT_CHANGE = "n_epochs max_steps stop_accuracy target log_interval eval_interval device threads compile".split()  # on resume


@dataclass
class TrainConfig:
    model: str = "gpt"  # gpt, unified_kv, delta, gated_delta, or file or file.Class for your own model file
    data: str = "data_mqar"  # file with the task
    n_epochs: int = 10  # passes over n_train_examples; 0 prints the model and stops
    max_steps: int = 0  # stop after this many optimiser steps instead; 0: by epochs
    batch_size: int = 32  # rows in an optimiser step over all accumulation steps; data may trade it for row length
    accumulate: int = 1  # split each batch into so many forward and backward passes, to save memory
    lr: float = 1e-3  # highest learning rate of AdamW
    schedule: str = "exponential"  # exponential (times lr_gamma an epoch), cosine (to lr_min), linear (to lr_min) or constant
    lr_gamma: float = 0.95  # factor an epoch of the exponential schedule
    lr_min: float = 0.0  # cosine, linear: share of lr at the last step
    warmup_steps: int = 0  # raise the learning rate from 0 over so many steps
    weight_decay: float = 0.0  # AdamW's, on matrices only
    beta1: float = 0.9  # AdamW's decay of the mean gradient
    beta2: float = 0.999  # AdamW's decay of the mean squared gradient
    clip_grad: float = 1.0  # scale gradients down to this norm; 0: never
    nan_limit: int = 5  # give up after so many steps in a row whose gradient is not finite (each is skipped)
    eval_interval: int = 0  # steps between evaluations on the val split, and between checkpoints; 0: an epoch
    eval_batch_size: int = 100  # rows in a forward pass of an evaluation
    log_interval: int = 20  # steps between rows of log.jsonl
    stop_accuracy: float = 0.0  # stop early once val token accuracy is at least this; 0: never
    target: float = 0.0  # exit with status 1 if test token accuracy ends below this
    log_dir: str = "runs"  # where run directories go
    exp_group: str = "0"  # label in the run's name
    run: str = ""  # name of the run directory; empty: made from the settings and the time
    resume: str = ""  # a run directory to continue; its config.json holds the settings
    seed: int = 0  # of the initial weights and of the data
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # float32 or bfloat16 (autocast); auto: bfloat16 on CUDA
    compile: bool = False  # torch.compile the model: 10-60 s at the start, steps up to 1.1 times as fast on a CPU
    threads: int = 0  # CPU threads; 0: torch's choice. Sums differ in the last bit between thread counts

    def check(self):
        at_least(self, 0, "n_epochs", "max_steps", "warmup_steps", "weight_decay", "eval_interval", "clip_grad")
        within(self, 0, 1024, "threads")
        at_least(self, 1, "batch_size", "accumulate", "nan_limit", "eval_batch_size", "log_interval")
        one_of(self, SCHEDULES, "schedule")
        one_of(self, ("auto", "float32", "bfloat16"), "dtype")
        within(self, 0, 1, "lr_gamma", "lr_min", "stop_accuracy", "target")
        within(self, 0, 0.99999, "beta1", "beta2")
        within(self, 0, 2**62, "seed")
        require(self.lr > 0, f"lr={self.lr} must be above 0", "lr")
        for name in ("run", "exp_group"):
            message = f"{name}={getattr(self, name)!r} becomes part of a directory name: letters, digits, . _ - only"
            require(re.fullmatch(r"[\w.-]*", getattr(self, name)) and getattr(self, name) not in (".", ".."), message, name)
        require(self.accumulate <= self.batch_size, "accumulate must not exceed batch_size", "accumulate")

    def unused(self):
        reasons = {} if self.schedule == "exponential" else {"lr_gamma": f"schedule is {self.schedule}"}
        if self.schedule not in ("cosine", "linear"):
            reasons["lr_min"] = f"schedule is {self.schedule}"
        return reasons


# ---- settings -> model and data ----------------------------------------------------------------------------------------


@dataclass
class Plan:
    """Everything that settings decide: checked configs, the classes to build, and who set what."""

    train: TrainConfig
    model_module: object
    model_class: type
    data_module: object
    data: object  # the data file's Config
    settings: list  # in the order in which they win


def import_file(name, key, *needed):
    """Import NAME.py from the current directory or this repo; it must define the names in `needed`."""
    require(re.fullmatch(r"[A-Za-z_]\w*", name), f"{key}={name!r} must be the name of a Python file, without .py", key)
    for folder in (os.getcwd(), HERE):
        if os.path.isfile(os.path.join(folder, name + ".py")):
            sys.path.insert(0, folder)
            try:
                module = importlib.import_module(name)
            finally:
                sys.path.remove(folder)
            missing = [n for n in needed if not hasattr(module, n)]
            require(not missing, f"{name}.py has no {' and no '.join(missing)}, so it is no file for {key}", key)
            return module
    raise ConfigError(f"{key}={name!r}: there is no {name}.py here", key)


def find_model(name):
    """`gpt`, `file` or `file.Class` -> (module, class)."""
    full = MODELS.get(name, name)
    file, _, cls = full.partition(".")
    if name not in MODELS and not any(os.path.isfile(os.path.join(d, file + ".py")) for d in (os.getcwd(), HERE)):
        raise ConfigError(f"model={name!r} is neither one of {', '.join(MODELS)} nor a file here", "model")
    cls = cls or "Model"
    require(cls.isidentifier() and cls != "py", f"model={name!r} must be file or file.Class, without .py", "model")
    module = import_file(file, "model", "Config", cls)
    found = getattr(module, cls)
    is_model = isinstance(found, type) and issubclass(found, torch.nn.Module)
    require(is_model, f"model={name!r} is no torch.nn.Module", "model")
    return module, found


def plan(settings):
    """Settings, in order -> Plan; ConfigError for whatever is wrong with them."""
    try:
        first = configs.build(TrainConfig, [s for s in settings if s.key in ("model", "data")])
        model_module, model_class = find_model(first.model)
        data_module = import_file(first.data, "data", "Config", "Data")
    except ConfigError as e:
        origin = {s.key: s.origin for s in settings}.get(e.key)
        raise ConfigError(f"{origin}: {e}" if origin else str(e)) from None
    configs.check_names(settings, TrainConfig, model_module.Config, data_module.Config)
    train = configs.build(TrainConfig, settings)
    return Plan(train, model_module, model_class, data_module, configs.build(data_module.Config, settings), settings)


def model_config(p, data):
    """The model's Config: settings, and what the data tells it."""
    config = configs.build(p.model_module.Config, p.settings, vocab_size=data.vocab_size, seq_len=data.seq_len)
    configs.refuse_unused(config, getattr(p.model_class, "ignores", {}), {s.key: s for s in p.settings})
    return config


def make_model(p, config):
    """A new model on the CPU, its weights a function of the seed alone."""
    torch.manual_seed(p.train.seed)
    try:
        return p.model_class(config)
    except (MemoryError, RuntimeError) as e:
        if "alloc" not in str(e):
            raise
        raise ConfigError("a model of these sizes does not fit in memory; lower dim, n_layers or vocab_size") from None


def count_parameters(model):
    """{"layers": parameters of the blocks only, "total": all of them, shared ones once}."""
    layers = getattr(model, "layers", torch.nn.Module())
    return {name: sum(q.numel() for q in m.parameters()) for name, m in (("layers", layers), ("total", model))}


def choose_device(c):
    """-> torch.device, compute dtype, and one line that says why."""
    if c.device == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
        why = "found" if name != "cpu" else "no GPU found"
    else:
        name, why = c.device, "asked for"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ConfigError(f"device={name!r} cannot be used on this machine; leave it out or use cpu", "device") from None
    half = c.dtype == "bfloat16" or (c.dtype == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported(False))
    dtype = torch.bfloat16 if half else torch.float32
    why_dtype = "asked for" if c.dtype != "auto" else "fast on this GPU" if half else "the exact choice"
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return device, dtype, f"device: {device} ({why}{threads}), dtype: {str(dtype)[6:]} ({why_dtype})"


# ---- run directory: config.json, log.jsonl, status.json, checkpoints ---------------------------------------------------


def write_file(path, write):
    """Call write(f) on a temporary file, bring it to disk, then give it its name: readers see all of it or none."""
    with open(path + ".tmp", "wb") as f:
        write(f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def write_json(path, value):
    write_file(path, lambda f: f.write(json.dumps(value, indent=1).encode() + b"\n"))


def read_json(path):
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def run_name(p, config):
    """`exp6_gpt_L4-D64_FF0_OG0_H2_q-48-none-none-0_..._lr0.001`, as the ULTM experiments name their runs."""
    parts = [f"exp{p.train.exp_group}", p.train.model]
    if hasattr(p.model_class, "label"):
        parts.append(p.model_class.label(config))
    parts.append("data-" + p.data.label() if hasattr(p.data, "label") else p.train.data)
    return "_".join(parts) + f"_lr{p.train.lr:g}"


def make_run_directory(p, config):
    """Create and return <log_dir>/<run>. Without `run`, the name ends in the Unix time, raised until it is free."""
    c, now = p.train, int(time.time())
    while True:
        folder = os.path.join(c.log_dir, c.run or f"{run_name(p, config)}_{now}")
        try:
            os.makedirs(folder)
            return folder
        except FileExistsError:
            if c.run:
                message = f"{folder} exists; continue it with --resume {folder}, or give another --run"
                raise ConfigError(message, "run") from None
            now += 1
        except OSError as e:
            raise ConfigError(f"cannot make the run directory {folder}: {e.strerror}", "log_dir") from None


def describe_run(p, config, model, device, dtype):
    """config.json: enough to repeat the run, and to rebuild its model and data."""
    values = {"train": p.train, "model": config, "data": p.data}
    return {
        **{name: dataclasses.asdict(value) for name, value in values.items()},
        "set_by": {s.key: s.origin for s in p.settings},
        "argv": sys.argv,
        "git_commit": git_commit(),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__},
        "device": str(device),
        "dtype": str(dtype)[6:],
        "threads": torch.get_num_threads(),
        "world_size": 1,
        "parameters": count_parameters(model),
    }


def git_commit():
    if not shutil.which("git"):
        return None
    return subprocess.run(["git", "-C", HERE, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip() or None


def read_plan(folder, changes=()):
    """The Plan of an existing run, from its config.json alone; `changes` are Settings that win over it."""
    path = os.path.join(folder, "config.json")
    try:
        saved = read_json(path)
        told = ("vocab_size", "seq_len")  # the data tells the model again
        groups = [saved["train"], {k: v for k, v in saved["model"].items() if k not in told}, saved["data"]]
        settings = [Setting(k, v, path) for group in groups for k, v in group.items()]
    except FileNotFoundError:
        raise ConfigError(f"{folder} is not a run directory: it has no config.json") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise ConfigError(f"{path} cannot be read as the settings of a run") from None
    return plan(settings + list(changes))


def save_checkpoint(folder, name, state):
    """Write state (tensors, numbers, text) as <folder>/<name>.pt; an older ckpt.pt stays as ckpt_prev.pt.

    Until the new file has its name, ckpt.pt is the old one: there is no moment without it.
    """
    path, previous = (os.path.join(folder, n + ".pt") for n in (name, "ckpt_prev"))
    if name == "ckpt" and os.path.exists(path):
        with contextlib.suppress(FileNotFoundError):
            os.remove(previous + ".tmp")
        try:
            os.link(path, previous + ".tmp")
            os.replace(previous + ".tmp", previous)
        except OSError:  # a file system without hard links
            with open(path, "rb") as old:
                write_file(previous, lambda f: shutil.copyfileobj(old, f))
    write_file(path, lambda f: torch.save(state, f))


def load_checkpoint(folder, *names):
    """The first of the named checkpoints that is whole; its checksums are verified.

    A damaged one is set aside under another name, so that it never replaces a whole one, and the user is told.
    """
    for name in names:
        path = os.path.join(folder, name + ".pt")
        if not os.path.exists(path):
            continue
        try:
            with zipfile.ZipFile(path) as z:  # torch's own reader skips the zip's checksums
                if z.testzip() is not None:
                    raise ValueError("a checksum differs")
            return torch.load(path, map_location="cpu", weights_only=True)
        except (MemoryError, PermissionError):  # says nothing about the file
            raise
        except Exception as e:  # damaged files fail in many ways; each means: try the next one
            os.replace(path, path + ".damaged")
            print(f"{path} is damaged ({type(e).__name__}: {str(e).splitlines()[0]}); trying an older one", file=sys.stderr)
    raise ConfigError(f"{folder} has no checkpoint that can be read ({', '.join(n + '.pt' for n in names)})")


def load_run(folder, which="best"):
    """A trained run, ready to look at: -> (Plan, data, model in eval mode on the CPU, checkpoint).

    which: "best" (highest validation accuracy) or "ckpt" (latest).
    """
    p = read_plan(folder)
    data = p.data_module.Data(p.data)
    model = make_model(p, model_config(p, data))
    state = load_checkpoint(folder, *(("best",) if which == "best" else ("ckpt", "ckpt_prev")))
    model.load_state_dict(state["model"])
    return p, data, model.eval(), state


class Log:
    """log.jsonl: one JSON object per line, {"kind": "train" | "eval", "step": ..., ...}."""

    def __init__(self, folder, step):
        """Open for appending; rows of a lost stretch after `step` are cut, so that none stands there twice."""
        self.path = os.path.join(folder, "log.jsonl")
        rows = read_log(folder) if os.path.exists(self.path) else []
        kept = [r for r in rows if r["step"] < step or (r["step"] == step and r["kind"] == "train")]
        write_file(self.path, lambda f: f.writelines(json.dumps(r).encode() + b"\n" for r in kept))
        self.file = open(self.path, "a", encoding="utf-8")

    def write(self, **row):
        row = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in row.items()}  # JSON has no nan
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()


def read_log(folder):
    """Rows of log.jsonl; a line that a kill cut off is dropped."""
    rows = []
    with open(os.path.join(folder, "log.jsonl"), encoding="utf-8") as f:
        for line in f:
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return rows


# ---- learning rate and evaluation --------------------------------------------------------------------------------------

SCHEDULES = {  # share of lr at a step: f(config, epoch, progress in [0, 1])
    "exponential": lambda c, epoch, progress: c.lr_gamma**epoch,
    "cosine": lambda c, epoch, progress: c.lr_min + (1 - c.lr_min) * (1 + math.cos(math.pi * progress)) / 2,
    "linear": lambda c, epoch, progress: c.lr_min + (1 - c.lr_min) * (1 - progress),
    "constant": lambda c, epoch, progress: 1.0,
}


def learning_rate(c, step, steps_per_epoch, total_steps):
    """lr at a step counted from 0: linear warm-up times the schedule."""
    warm = min(1.0, (step + 1) / c.warmup_steps) if c.warmup_steps else 1.0
    return c.lr * warm * SCHEDULES[c.schedule](c, step // steps_per_epoch, min(1.0, step / max(1, total_steps)))


def autocast(device, dtype):
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()


@torch.no_grad()
def predict(model, data, split, batch_size, device, dtype=torch.float32, bar=False, stop=()):
    """Yield, batch by batch over a whole split, a dict of

    hit (N,) bool, loss (a sum over labels), tags {name: (N,)}, row (N,) the row of each label, row_hit (B,) bool.
    """
    from_model = sys.modules[type(model).__module__]
    correct = getattr(from_model, "correct", None) or import_file("model", "model").correct
    batches = [s[i : i + batch_size] for s in data.segments(split) for i in range(0, len(s), batch_size)]
    for rows in tqdm(batches, desc=split, disable=not (bar and sys.stderr.isatty()), leave=False):
        if stop:
            return
        tokens, targets, tags = data.batch(split, 0, rows)
        with autocast(device, dtype):
            logits, loss = model(tokens.to(device), targets.to(device))
        hit, row_hit = correct(logits.cpu(), targets)
        row = np.repeat(np.asarray(rows), (targets != -100).sum(1).numpy())
        yield {"hit": hit.numpy(), "loss": loss.item() * len(hit), "tags": tags, "row": row, "row_hit": row_hit.numpy()}


def evaluate(model, data, split, batch_size, device, dtype=torch.float32, stop=()):
    """Token accuracy, row accuracy (exact match), mean loss, and {tag: {value: [right, labels]}} over all labels.

    None if `stop` (a list that a signal fills) is not empty before the end.
    """
    was_training = model.training
    model.eval()
    batches = list(predict(model, data, split, batch_size, device, dtype, bar=True, stop=stop))
    model.train(was_training)
    return None if stop else summarise(batches)


def summarise(batches):
    """What predict yielded -> accuracies, mean loss, their counts, and {tag: {value: [right, labels]}}."""
    hit, row_hit = (np.concatenate([b[k] for b in batches]) for k in ("hit", "row_hit"))
    by_slice = {}
    for tag in batches[0]["tags"]:
        values = np.concatenate([b["tags"][tag] for b in batches])
        by_slice[tag] = {v.item(): [int(hit[values == v].sum()), int((values == v).sum())] for v in np.unique(values)}
    return {
        "accuracy": float(hit.mean()),
        "row_accuracy": float(row_hit.mean()),
        "loss": sum(b["loss"] for b in batches) / len(hit),
        "labels": len(hit),
        "rows": len(row_hit),
        "by_slice": by_slice,
    }


# ---- the loop ----------------------------------------------------------------------------------------------------------


def train(p, folder, data, model, device, dtype, resume=None):
    """Run the loop until the last step, stop_accuracy or a signal; -> ("finished", "failed" or "preempted"), state.

    resume: the checkpoint to go on from. Everything the loop remembers is in `state`, which is what is saved.
    """
    c = p.train
    steps_per_epoch = data.steps_per_epoch(c.batch_size)
    total = c.max_steps or c.n_epochs * steps_per_epoch
    every = c.eval_interval or steps_per_epoch
    optimizer = torch.optim.AdamW(parameter_groups(model, c.weight_decay), betas=(c.beta1, c.beta2), fused=True)
    state = {"step": 0, "best": -1.0, "bad_steps": 0, "seconds": 0.0}
    if resume:
        optimizer.load_state_dict(resume["optimizer"])
        torch.set_rng_state(resume["rng"])
        state = {k: resume[k] for k in state}
    log, (stopped_by, release_signals) = Log(folder, state["step"]), catch_signals()
    bar = tqdm(total=total, initial=state["step"], desc="train", unit="step", disable=not sys.stderr.isatty())
    began = time.perf_counter() - state["seconds"]

    def save(name="ckpt"):
        state["seconds"] = time.perf_counter() - began
        weights = {k: v.cpu() for k, v in model.state_dict().items()}
        extra = {"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()} if name == "ckpt" else {}
        save_checkpoint(folder, name, {"model": weights, **state, **extra})

    while True:
        step = state["step"]
        # learning rate
        lr = learning_rate(c, step, steps_per_epoch, total)
        for group in optimizer.param_groups:
            group["lr"] = lr
        # eval and save
        last = step >= total
        if last or (step % every == 0 and step > 0):
            result = evaluate(model, data, "val", c.eval_batch_size, device, dtype, stopped_by)
            if result is None:  # cut short by a signal: done again after a resume
                save()
                outcome, state["signal"] = "preempted", stopped_by[0]
                break
            log.write(kind="eval", step=step, split="val", seconds=time.perf_counter() - began, **result)
            accuracy, exact = result["accuracy"], result["row_accuracy"]
            show(bar, f"step {step}: val accuracy {accuracy:.4f}, rows {exact:.4f}, loss {result['loss']:.4f}")
            if accuracy > state["best"]:
                state["best"] = accuracy
                save("best")
            save()
            if last or (c.stop_accuracy and accuracy >= c.stop_accuracy):
                outcome = "finished"
                break
        # accumulate: every part counts by its share of the batch's labels, so the sum is the mean over the batch
        rows = np.asarray(data.rows(step, c.batch_size))
        parts = [data.batch("train", step, r)[:2] for r in np.array_split(rows, c.accumulate) if len(r)]
        counts = [(targets != -100).sum().item() for _, targets in parts]
        loss = 0.0
        for (tokens, targets), count in zip(parts, counts):
            with autocast(device, dtype):
                logits, part_loss = model(tokens.to(device), targets.to(device))
            part_loss = part_loss * (count / sum(counts))
            part_loss.backward()
            loss = loss + part_loss.detach()
        # guard: a gradient that is not finite is not applied
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), c.clip_grad or math.inf)
        finite = bool(torch.isfinite(norm))
        state["bad_steps"] = 0 if finite else state["bad_steps"] + 1
        # step
        if finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state["step"] = step + 1
        # log
        bar.update()
        if state["step"] % c.log_interval == 0 or not finite:
            row = {"loss": loss.item(), "lr": lr, "grad_norm": norm.item(), "skipped": not finite}
            log.write(kind="train", step=state["step"], seconds=time.perf_counter() - began, **row)
            bar.set_postfix(loss=f"{row['loss']:.3f}", lr=f"{lr:.1e}")
            if bar.disable:
                print(f"step {state['step']}/{total}: loss {row['loss']:.4f}, lr {lr:.2e}", flush=True)
        # stop
        if state["bad_steps"] >= c.nan_limit:
            show(bar, f"stopped: the gradient was not finite {c.nan_limit} steps in a row; lower lr or raise warmup_steps")
            outcome = "failed"
            break
        if stopped_by:
            save()
            outcome, state["signal"] = "preempted", stopped_by[0]
            break
    bar.close()
    release_signals()
    return outcome, state


def parameter_groups(model, weight_decay):
    """Matrices decay, vectors (norm weights, biases) do not."""
    trained = [q for q in model.parameters() if q.requires_grad]
    return [
        {"params": [q for q in trained if q.ndim >= 2], "weight_decay": weight_decay},
        {"params": [q for q in trained if q.ndim < 2], "weight_decay": 0.0},
    ]


def catch_signals():
    """A list that gets the signal's number on SIGTERM or SIGINT, so that the loop can end its step and save first, and a
    function that ends this. A second signal acts at once, as it would without."""
    caught = []

    def on_signal(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    return caught, lambda: [signal.signal(number, handler) for number, handler in before.items()]


def show(bar, text):
    """Print a line without breaking the progress bar."""
    tqdm.write(text) if not bar.disable else print(text, flush=True)


def plot_curves(folder, title):
    """curves.png: loss and validation accuracy against steps, from log.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_log(folder)
    measured = [r for r in rows if r["kind"] == "eval"]
    trained = [r for r in rows if r["kind"] == "train" and r["loss"] is not None]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
    left.plot([r["step"] for r in trained], [r["loss"] for r in trained], lw=1, label="train batch")
    for axis, key, label in (
        (left, "loss", "val"),
        (right, "accuracy", "labels (token accuracy)"),
        (right, "row_accuracy", "whole rows (exact match)"),
    ):
        axis.plot([r["step"] for r in measured], [r[key] for r in measured], "o-", ms=3, label=label)
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    labels, in_rows = measured[-1]["labels"], measured[-1]["rows"]
    left.set(xlabel="step", ylabel="loss (nats per label)", yscale="log")
    right.set(
        xlabel="step",
        ylabel="val accuracy",
        ylim=(-0.02, 1.02),
        xlim=left.get_xlim(),
        title=f"n = {labels} labels in {in_rows} rows",
    )
    right.title.set_fontsize(8)
    figure.suptitle(title, fontsize=8)
    figure.savefig(os.path.join(folder, "curves.png"), dpi=120)
    plt.close(figure)


# ---- command line ------------------------------------------------------------------------------------------------------


def read_command_line(argv):
    """-> Plan, and the run directory to resume or ""."""
    words, settings = configs.collect(argv)
    if any(s.key == "help" for s in settings):
        p = plan([s for s in settings if s.key in ("model", "data")])
        print(configs.help_text(__doc__, TrainConfig, p.model_module.Config, p.data_module.Config))
        sys.exit(0)
    require(not words, f"{' '.join(words)!r} is neither an override file (.py) nor a flag (--key=value)", None)
    resume = [s for s in settings if s.key == "resume"]
    if not resume:
        return plan(settings), ""
    folder = str(resume[-1].value)
    require(folder, f"{resume[-1].origin}: resume needs a run directory", "resume")
    changes = [s for s in settings if s.key != "resume"]
    for s in changes:
        fixed = f"{s.origin}: {s.key} cannot change in the middle of a run (only {', '.join(MIGHT_CHANGE)} can)"
        require(s.key in MIGHT_CHANGE, fixed, s.key)
    return read_plan(folder, changes), folder


def main(argv=None):
    p, folder = read_command_line(sys.argv[1:] if argv is None else argv)
    c, resume = p.train, None
    if c.threads:
        torch.set_num_threads(c.threads)
    device, dtype, device_line = choose_device(c)
    data = p.data_module.Data(p.data)
    config = model_config(p, data)
    model = make_model(p, config)
    counts = count_parameters(model)
    print(model)
    print(f"params: {counts['layers']} in the layers, {counts['total']} with embedding, last norm and head")
    print(device_line)
    if hasattr(p.model_class, "kernel_choice"):
        print(f"mixer: {p.model_class.kernel_choice(config, device, dtype)}")
    if hasattr(p.model_class, "state_bytes"):
        print(f"state: {p.model_class.state_bytes(config)} bytes to read on after {config.seq_len} tokens, in float32")
    if c.n_epochs == 0:
        return 0
    resumed, folder = bool(folder), folder or make_run_directory(p, config)
    with only_process_in(folder):
        if resumed:
            resume = take_up(folder, model, c)
        else:
            write_json(os.path.join(folder, "config.json"), describe_run(p, config, model, device, dtype))
        print(f"### LOGDIR: {folder}")
        print({k: v for part in (c, config, p.data) for k, v in dataclasses.asdict(part).items()})
        val_rows = sum(len(s) for s in data.segments("val"))
        steps = data.steps_per_epoch(c.batch_size), -(-val_rows // c.eval_batch_size)
        print(f">>> n_train_steps = {steps[0]}, n_val_steps = {steps[1]}", flush=True)
        model.to(device)
        if c.compile:
            model.compile()
        return finish(p, folder, data, model, device, dtype, resume)


@contextlib.contextmanager
def only_process_in(folder):
    """Refuse a second process that writes into a run directory. The system ends the lock with the process, however it ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ConfigError(f"{folder}: another process is writing this run; wait for it, or stop it first", "resume") from None
    except OSError:  # a file system without locks
        print(f"note: {folder} cannot be locked here; start no second process in it", file=sys.stderr)
    try:
        yield
    finally:
        os.close(handle)


def take_up(folder, model, c):
    """Load the weights of a run's last whole checkpoint into model -> the checkpoint, or None if the run has none yet."""
    resume, path = None, os.path.join(folder, "config.json")
    # Without any, not even a damaged one, the run was stopped before its first checkpoint and starts again.
    if any(name.startswith("ckpt") and not name.endswith(".tmp") for name in os.listdir(folder)):
        resume = load_checkpoint(folder, "ckpt", "ckpt_prev")
        model.load_state_dict(resume["model"])
    saved = read_json(path)
    write_json(path, {**saved, "train": dataclasses.asdict(c)})  # n_epochs and a few others may be new
    if saved["threads"] != torch.get_num_threads():
        print(f"note: the run began with {saved['threads']} threads; with another number its last bits will differ")
    return resume


def finish(p, folder, data, model, device, dtype, resume):
    """Train, measure the best weights on the test split, write status.json and curves.png; -> exit status."""
    status = os.path.join(folder, "status.json")
    write_json(status, {"status": "running", "pid": os.getpid()})
    try:
        outcome, state = train(p, folder, data, model, device, dtype, resume)
        result = {"status": outcome, "step": state["step"], "seconds": state["seconds"]}
        if outcome == "finished":
            model.load_state_dict(load_checkpoint(folder, "best", "ckpt")["model"])
            test = evaluate(model, data, "test", p.train.eval_batch_size, device, dtype)
            reached = test["accuracy"] >= p.train.target
            result |= {"status": outcome if reached else "below target", "target": p.train.target, "test": test}
    except BaseException as e:
        write_json(status, {"status": "failed", "error": f"{type(e).__name__}: {e}"})
        raise
    write_json(status, result)
    if outcome == "preempted":
        print(f"stopped after step {state['step']} and saved; go on with: python train.py --resume {folder}")
        return 128 + state["signal"]
    if outcome == "failed":
        return 1
    by_label, by_row = (
        f"{test['accuracy']:.4f} of {test['labels']} labels",
        f"{test['row_accuracy']:.4f} of {test['rows']} rows",
    )
    summary = f"test accuracy {by_label}, {by_row}"
    plot_curves(folder, f"{os.path.basename(folder)}\n{summary}")
    print(f"{summary}; {state['step']} steps, {state['seconds']:.0f} s; {folder}")
    if not reached:
        print(f"below target: {test['accuracy']:.4f} < {p.train.target}", file=sys.stderr)
    return 0 if reached else 1


if __name__ == "__main__":
    configs.exit_with_sentence(main)
