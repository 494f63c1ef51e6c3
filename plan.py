"""What is to be trained: settings become checked configs, the classes to build, and a run directory; and back again.

    p, resume = train.read_command_line(["configs/mqar_gpt.py", "--lr", "1e-3"])   # settings -> Plan
    p, data, model, state = load_run("runs/RUN")                                    # a trained run, ready to look at

A model is a short name, file or file.Class; a task is a file. Either is imported by its name, from here or from the working
directory, so a fork needs no registry.
"""

import contextlib
import dataclasses
import glob
import importlib
import math
import os
import re
import shutil
import subprocess
import sys
import time
import types
from dataclasses import dataclass

import numpy as np
import torch

import configs
from checkpoint import data_hash, load_checkpoint, part, read_json
from configs import ConfigError, Setting, at_least, one_of, require, within
from parallel import FORMS, PARALLEL

HERE = os.path.dirname(os.path.abspath(__file__))
# A model file needs Config and Model (see GUIDE.md, Your own model or data file). A model class may also have
#   ignores {setting: why it has no effect}        the settings of Config that are refused for this model
#   label(config) -> str                           its part of a run's name
#   kernel_choice(config, device, dtype) -> str    which kernel runs and why, printed at the start
#   state_bytes(config) -> int                     what must be kept to read on, printed at the start and compared
#   learning_rates() -> {end of a name: factor}    parameters with a learning rate of their own (train.parameter_groups)
#   after_step(report) -> {block: usage} or {}     called after each training step
#   read(tokens, cache) -> logits, cache           decoding, for `eval.py --examples`
# and its file `correct(logits, targets)`, what counts as right (measure.scorer).
MODELS = {  # short names; anything else is file or file.Class
    "gpt": "model.GPT",
    "unified_kv": "model.UnifiedKV",
    "delta": "delta.DeltaNet",
    "gated_delta": "delta.GatedDeltaNet",
    "memory": "memory.Memory",
    "memory_router": "memory.MemoryRouter",
}
SCHEDULES = {  # share of lr at a step: f(config, epoch, progress in [0, 1])
    "exponential": lambda c, epoch, progress: c.lr_gamma**epoch,
    "cosine": lambda c, epoch, progress: c.lr_min + (1 - c.lr_min) * (1 + math.cos(math.pi * progress)) / 2,
    "linear": lambda c, epoch, progress: c.lr_min + (1 - c.lr_min) * (1 - progress),
    "constant": lambda c, epoch, progress: 1.0,
}


@dataclass
class TrainConfig:
    model: str = "gpt"  # gpt, unified_kv, delta, gated_delta, memory, memory_router, or file or file.Class of your own
    data: str = "data_mqar"  # file with the task
    n_epochs: int = 10  # passes over the training set, as long as the data file says; 0 prints the model and stops
    max_steps: int = 0  # stop after this many optimizer steps instead; 0: by epochs
    batch_size: int = 32  # rows per optimizer step, over all ranks and micro-batches; more where a task has shorter rows
    accumulate: int = 1  # micro-batches that each rank's share of the batch is split into, to save memory
    parallel: str = "ddp"  # under torchrun: ddp (a copy of the model on every rank) or fsdp (a share of it)
    lr: float = 1e-3  # highest learning rate of AdamW
    schedule: str = "exponential"  # exponential (times lr_gamma an epoch), cosine (to lr_min), linear (to lr_min) or constant
    lr_gamma: float = 0.95  # factor an epoch of the exponential schedule
    lr_min: float = 0.0  # cosine, linear: share of lr at the last step
    warmup_steps: int = 0  # raise the learning rate from 0 over this many steps
    weight_decay: float = 0.0  # AdamW's, on matrices only
    beta1: float = 0.9  # AdamW's decay of the mean gradient
    beta2: float = 0.999  # AdamW's decay of the mean squared gradient
    clip_grad: float = 1.0  # scale gradients down to this norm; 0: never
    nan_limit: int = 5  # give up after this many steps in a row whose gradient is not finite (each is skipped)
    eval_interval: int = 0  # steps between evaluations on the val split; 0: an epoch
    save_every: int = 0  # steps between checkpoints, beside those at each evaluation; 0: only those
    eval_batch_size: int = 100  # rows in a forward pass of an evaluation
    log_interval: int = 20  # steps between rows of log.jsonl
    mem_stats_every: int = 0  # memory models: steps between rows of log.jsonl with the use of the slots; 0: none
    stop_accuracy: float = 0.0  # stop early once val token accuracy is at least this; 0: never
    target: float = 0.0  # exit with status 1 if test token accuracy ends below this
    target_slice: str = ""  # a slice of the data, tag=value (seen=1), that target, stop_accuracy and best.pt go by; empty: all
    init_from: str = ""  # begin with weights of this run, checkpoint file or folder of torch.distributed.checkpoint
    init_step: int = -1  # which of its steps; -1: the latest
    init_map: configs.Structure = ""  # JSON {source: target} of blocks ("0-5": "0-5"), names or patterns; empty: all weights
    freeze: configs.Structure = ""  # names or patterns of parameters to hold still (*.att,embed), a JSON list or dict
    synthetic_dataset: str = ""  # a second data set on disk, mixed into training within a window of steps
    synthetic_start_step: int = 0  # the window's first step
    synthetic_end_step: int = 0  # and the one after its last
    synthetic_weight: float = 1.0  # share of the window's steps that take their rows from there
    log_dir: str = "runs"  # where run directories go
    exp_group: str = "0"  # label in the run's name
    run_name: str = ""  # name of the run directory; empty: made from the settings and the time
    resume: str = ""  # a run directory to continue; its config.json holds the settings
    export: str = ""  # with resume: rewrite the run's checkpoints as one `file` each or as `shards`, and stop
    seed: int = 0  # of the initial weights and of the data
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # float32 or bfloat16 (autocast); auto: bfloat16 on CUDA
    compile: bool = False  # torch.compile the model: 10-60 s at the start, steps up to 1.1 times as fast on a CPU
    threads: int = 0  # CPU threads; 0: torch's choice. Sums differ in the last bit between thread counts

    def check(self):
        at_least(self, 0, "n_epochs", "max_steps", "warmup_steps", "weight_decay", "eval_interval", "save_every", "clip_grad")
        at_least(self, 0, "mem_stats_every")
        within(self, 0, 1024, "threads")
        at_least(self, 1, "batch_size", "accumulate", "nan_limit", "eval_batch_size", "log_interval")
        one_of(self, SCHEDULES, "schedule")
        one_of(self, ("auto", "float32", "bfloat16"), "dtype")
        one_of(self, PARALLEL, "parallel")
        one_of(self, ("", *FORMS), "export")
        within(self, 0, 1, "lr_gamma", "lr_min", "stop_accuracy", "target", "synthetic_weight")
        at_least(self, 0, "synthetic_start_step", "synthetic_end_step")
        window = f"synthetic_end_step={self.synthetic_end_step} must be above synthetic_start_step={self.synthetic_start_step}"
        ends = self.synthetic_end_step > self.synthetic_start_step
        require(ends or not self.synthetic_dataset, window, "synthetic_end_step")
        within(self, 0, 0.99999, "beta1", "beta2")
        within(self, 0, 2**62, "seed")
        require(self.lr > 0, f"lr={self.lr} must be above 0", "lr")
        for name in ("run_name", "exp_group"):
            message = f"{name}={getattr(self, name)!r} becomes part of a directory name: letters, digits, . _ - only"
            require(re.fullmatch(r"[\w.-]*", getattr(self, name)) and getattr(self, name) not in (".", ".."), message, name)
        require(self.accumulate <= self.batch_size, "accumulate must not exceed batch_size", "accumulate")

    def unused(self):
        reasons = {} if self.schedule == "exponential" else {"lr_gamma": f"schedule is {self.schedule}"}
        if not self.init_from:
            reasons |= dict.fromkeys(("init_step", "init_map"), "there is no init_from")
        if not self.synthetic_dataset:
            window = ("synthetic_start_step", "synthetic_end_step", "synthetic_weight")
            reasons |= dict.fromkeys(window, "there is no synthetic_dataset")
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


def import_file(name, key, *needed, folders=None):
    """Import NAME.py from the first of `folders` (the current directory, then this repo) that has it; it must define the names
    in `needed`."""
    require(re.fullmatch(r"[A-Za-z_]\w*", name), f"{key}={name!r} must be the name of a Python file, without .py", key)
    for folder in folders or (os.getcwd(), HERE):
        path = os.path.join(folder, name + ".py")
        if os.path.isfile(path):
            sys.path.insert(0, folder)
            try:
                module = importlib.import_module(name)
            finally:
                sys.path.remove(folder)
            other = not os.path.samefile(module.__file__, path)
            require(not other, f"{path} cannot be taken: {name} is a file of this repo, too; give yours another name", key)
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
    module = import_file(file, "model", "Config", cls, folders=(HERE,) if name in MODELS else None)
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
    message = f"mem_stats_every={train.mem_stats_every} has no effect: {train.model} has no memory layers"
    require(not train.mem_stats_every or hasattr(model_class, "after_step"), message, "mem_stats_every")
    return Plan(train, model_module, model_class, data_module, configs.build(data_module.Config, settings), settings)


def open_data(p):
    """The task, with the synthetic data set mixed in if there is one."""
    data = p.data_module.Data(p.data)
    if not p.train.synthetic_dataset:
        return data
    from mixture import mixed  # only now: it imports both data files

    return mixed(data, p.train)


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
        if not out_of_memory(e):
            raise
        raise ConfigError("a model of these sizes does not fit in memory; lower dim, n_layers or vocab_size") from None


def out_of_memory(error):
    """Does this error of torch, numpy or Python mean that memory is full?"""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)


def count_parameters(model):
    """{"layers": parameters of the blocks only, "total": all of them, shared ones once}."""
    layers = getattr(model, "layers", torch.nn.Module())
    return {name: sum(q.numel() for q in m.parameters()) for name, m in (("layers", layers), ("total", model))}


# ---- the run directory -------------------------------------------------------------------------------------------------


def label(p, config):
    """`exp6_gpt_L4-D64_FF0_OG0_H2_q-48-none-none-0_..._lr0.001`, as the ULTM experiments name their runs."""
    parts = [f"exp{p.train.exp_group}", p.train.model]
    if hasattr(p.model_class, "label"):
        parts.append(p.model_class.label(config))
    parts.append("data-" + p.data.label() if hasattr(p.data, "label") else p.train.data)
    return "_".join(parts) + f"_lr{p.train.lr:g}"


def make_run_directory(p, config):
    """Create and return <log_dir>/<run>. Without `run_name`, it ends in the Unix time, raised until it is free."""
    c, now = p.train, int(time.time())
    while True:
        folder = os.path.join(c.log_dir, c.run_name or f"{label(p, config)}_{now}")
        try:
            os.makedirs(folder)
            return folder
        except FileExistsError:
            if c.run_name:
                message = f"{folder} exists; continue it with --resume {folder}, or give another --run_name"
                raise ConfigError(message, "run_name") from None
            now += 1
        except OSError as e:
            raise ConfigError(f"cannot make the run directory {folder}: {e.strerror}", "log_dir") from None


def describe_run(p, config, model, device, dtype, world):
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
        "world_size": world.size,
        "launch": launch(),
        "parameters": count_parameters(model),
        "data_sha256": {key: data_hash(path) for key, path in data_paths(p).items()},
    }


def data_paths(p):
    """{setting: path} of what a run reads from disk, except weights to begin with."""
    settings = {**vars(p.data), "synthetic_dataset": p.train.synthetic_dataset}
    return {key: settings[key] for key in ("path", "tokenizer", "synthetic_dataset") if settings.get(key)}


def require_same_data(folder, p, *left_out):
    """ConfigError if something that the run reads from disk is not what it was when the run began."""
    began = read_json(os.path.join(folder, "config.json")).get("data_sha256", {})
    for key, path in data_paths(p).items():
        if key in began and key not in left_out:
            require(os.path.exists(path), f"{key}={path} does not exist, and {folder} was trained on it", key)
            message = f"{key}={path} is another one than {folder} was trained on; put that one back, or start a new run"
            require(data_hash(path) == began[key], message, key)


def launch():
    """torchrun's name for the processes that it started together, the same when it starts them again; "" without one."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return "" if name == "none" else name


def restarted_run(log_dir):
    """The run directory of this very launch, if torchrun has started it again after a rank died; else ""."""
    if not launch() or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return ""
    found = sorted(glob.glob(os.path.join(glob.escape(log_dir), "*", "config.json")), key=os.path.getmtime, reverse=True)
    for path in found:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # another run's may be damaged
            if read_json(path).get("launch") == launch():
                return os.path.dirname(path)
    return ""


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


def load_run(folder, which="best"):
    """A trained run, ready to look at: -> (Plan, data, model in eval mode on the CPU, checkpoint).

    which: "best" (highest validation accuracy) or "ckpt" (latest).
    """
    p = read_plan(folder)
    require_same_data(folder, p, "synthetic_dataset")  # that start is over, and its data set may be gone
    data = p.data_module.Data(p.data)
    sizes = types.SimpleNamespace(**read_json(os.path.join(folder, "config.json"))["model"])
    model = make_model(p, model_config(p, sizes))
    state = load_checkpoint(folder, *(("best",) if which == "best" else ("ckpt", "ckpt_prev")))
    model.load_state_dict(part(state["tensors"], "model"))
    return p, data, model.eval(), state
