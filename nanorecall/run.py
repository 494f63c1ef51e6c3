"""What is to be trained: settings become checked configs, the classes to build, and a run directory; and back again.

    p, resume = train.read_command_line(["configs/mqar_gpt.py", "--lr", "1e-3"])   # settings -> Plan
    p, data, model, state = load_run("runs/RUN")                                    # a trained run, ready to look at

A model is a short name, file or file.Class; a task is a file. Names of this repo's files mean these
files; any other file is imported by its name, from here or from the working directory, so a fork
needs no registry.
config.json keeps the path and the SHA-256 of such a file and of the files beside it that it
imports: looking at a run or resuming it
executes those and no others.
"""

import contextlib
import dataclasses
import glob
import hashlib
import importlib
import importlib.machinery
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import types
from dataclasses import dataclass, field

import numpy as np
import torch

from nanorecall.checkpoint import (
    check_kinds,
    dataset_sha256,
    load_checkpoint,
    lock_run_dir,
    nan_to_null,
    parse_json,
    read_record,
    remove,
    select_prefix,
    unlock,
)
from nanorecall.distributed import CHECKPOINT_FORMATS, PARALLEL
from nanorecall.settings import (
    ConfigError,
    Json,
    RunError,
    Setting,
    at_least,
    build_config,
    field_names,
    line_of,
    one_of,
    reject_unknown,
    reject_unused,
    require,
    say,
    within,
)

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the repo
# A model file needs Config and Model (see GUIDE.md, Your own model or data file). A model class may also have
#   inactive_settings {setting: why it has no effect}        the settings of Config that are refused for this model
#   label(config) -> str                           its part of a run's name
#   describe_backend(config, device, dtype) -> str    which kernel runs and why, printed at the start
#   inference_state_bytes(config) -> int or None             what must be kept to read on, printed at the start and compared
#   lr_scales() -> {end of a name: factor}    parameters with a learning rate of their own (train.parameter_groups)
#   on_step_end(report) -> {block: usage} or {}     called after each training step
#   read(tokens, cache) -> logits, cache           decoding, for `eval.py --examples`
#   correct(logits, targets)                     what counts as correct (metrics.correct_predictions)
# A mixer of your own in a block of model.py needs `forward` alone; with state_size, describe_backend and
# channels (see CausalSelfAttention) the model can also read on from a cache, and say more of itself.
MODELS = {  # short names; anything else is file or file.Class
    "gpt": "model.GPT",
    "unified_kv": "model.UnifiedKV",
    "delta": "delta.DeltaNet",
    "gated_delta": "delta.GatedDeltaNet",
    "memory": "memory.MemoryGPT",
    "memory_router": "memory.MemoryRouterGPT",
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
    init_map: Json = ""  # JSON {source: target} of blocks ("0-5": "0-5"), names or patterns; empty: all weights
    freeze: Json = ""  # names or patterns of parameters to hold still (*.att,embed), a JSON list or dict
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
        at_least(self, 1, "accumulate", "nan_limit", "eval_batch_size", "log_interval")
        within(self, 1, 2**24, "batch_size")
        one_of(self, SCHEDULES, "schedule")
        one_of(self, ("auto", "float32", "bfloat16"), "dtype")
        one_of(self, PARALLEL, "parallel")
        one_of(self, ("", *CHECKPOINT_FORMATS), "export")
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
class Settings:
    """Everything that settings decide: checked configs, the classes to build, and who set what."""

    train: TrainConfig
    model_module: object
    model_class: type
    data_module: object
    data: object  # the data file's Config
    settings: list  # in the order in which they win
    files: dict  # {path: SHA-256} of files that were executed and are not this repo's


OURS = (
    "model",
    "delta",
    "memory",
    "data_mqar",
    "data_synth",
)  # files of this repo that a run may name


@dataclass
class Foreign:
    """Files outside OURS that a plan executes. recorded: {path: SHA-256} of a run, and no other
    file is executed; None: the user names the files now, and they are recorded in `files`."""

    recorded: dict = None
    files: dict = field(default_factory=dict)

    def place_of(self, file):
        """The end of a sentence: where the run had a file of this name, if it recorded one."""
        there = [p for p in self.recorded or () if os.path.basename(p) == file]
        advice = "put that file there, and call this from its directory"
        return f"; the run used {there[0]}: {advice}" if there else ""

    def admit(self, path, source, key):
        """Take down a file whose source (bytes) is about to be executed; ConfigError if the run did
        not record this very file."""
        path, digest = os.path.realpath(path), hashlib.sha256(source).hexdigest()
        if self.recorded is not None:
            moved = self.place_of(os.path.basename(path))
            message = f"{path} is not executed: the run did not record it{moved}"
            require(path in self.recorded, message, key)
            changed = f"{path} is not executed: it has changed since the run began; put back the file that it was"
            require(self.recorded[path] == digest, changed, key)
            if path not in self.files and os.environ.get("RANK", "0") == "0":
                say(f"note: executing {path}, as the run recorded it", file=sys.stderr)
        self.files[path] = digest


class Admitted(importlib.machinery.SourceFileLoader):
    """Executes the bytes that were admitted: no compiled copy in __pycache__, which may be of
    another source."""

    def __init__(self, name, path, foreign, key):
        super().__init__(name, path)
        self.foreign, self.key = foreign, key

    def get_code(self, name):
        source = self.get_data(self.path)
        self.foreign.admit(self.path, source, self.key)
        return self.source_to_code(source, self.path)

    def spec(self, inside=None):
        return importlib.util.spec_from_file_location(
            self.name, self.path, loader=self, submodule_search_locations=inside
        )


class Beside:
    """Finds modules in the folder of a foreign file. Python asks it last: its own modules, those
    installed, and ours come first, and what is found here is admitted like the foreign file
    itself."""

    def __init__(self, folder, foreign, key):
        self.folder, self.foreign, self.key = folder, foreign, key

    def find_spec(self, name, path=None, target=None):
        place = os.path.join(self.folder, *name.split("."))
        for file, inside in ((os.path.join(place, "__init__.py"), []), (place + ".py", None)):
            if os.path.isfile(file):
                return Admitted(name, file, self.foreign, self.key).spec(inside)
        return None


def import_source_file(name, key, *needed, foreign=None):
    """Import NAME.py: this repo's if it is one of OURS, else from the current directory or this
    repo; it must define the names in `needed`. foreign: what may be executed beside OURS (see
    Foreign)."""
    require(re.fullmatch(r"[A-Za-z_]\w*", name), f"{key}={name!r} must be the name of a Python file, without .py", key)
    places = [os.path.join(folder, name + ".py") for folder in (os.getcwd(), HERE)]
    there = [path for path in places if os.path.isfile(path)]
    foreign = foreign or Foreign()
    lost = f"{key}={name!r}: there is no {name}.py here{foreign.place_of(name + '.py')}"
    require(there, lost, key)
    if name in OURS:
        module = import_ours(name, key, there)
    else:
        module = import_foreign(name, there[0], key, foreign)
    missing = [n for n in needed if not hasattr(module, n)]
    require(
        not missing, f"{name}.py has no {' and no '.join(missing)}, so it is no file for {key}", key
    )
    return module


def import_ours(name, key, there):
    """A file of this repo, whatever lies in the current directory under its name. there: the files
    of that name."""
    ours = os.path.join(HERE, name + ".py")
    if not os.path.samefile(there[0], ours) and os.environ.get("RANK", "0") == "0":
        say(
            f"note: {name} is this project's own; {there[0]} is not used: give it another name",
            file=sys.stderr,
        )
    module = importlib.import_module(name)
    other = (
        f"{key}={name}: Python takes {module.__file__} for this project's {name}.py; move it away"
    )
    require(os.path.samefile(module.__file__, ours), other, key)
    return module


def import_foreign(name, path, key, foreign):
    """Execute a file that is not one of OURS, once it is admitted; so are those beside it that it
    imports."""
    found = module_place(name)
    same = found in ("", path) or os.path.isfile(found) and os.path.samefile(found, path)
    require(
        same,
        f"{path} cannot be taken: Python has a module {name}, too ({found}); give yours another name",
        key,
    )
    if name in sys.modules:  # executed before in this process
        for file in getattr(sys.modules[name], "__executed__", [path]):
            with open(file, "rb") as f:
                foreign.admit(file, f.read(), key)
        return sys.modules[name]
    spec = Admitted(name, path, foreign, key).spec()
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    before, finder = (
        set(foreign.files),
        Beside(os.path.dirname(os.path.realpath(path)), foreign, key),
    )
    sys.meta_path.append(finder)
    try:
        spec.loader.exec_module(module)
    except ConfigError:
        del sys.modules[name]
        raise
    except (Exception, SystemExit) as e:
        del sys.modules[name]
        line = line_of(e, path)
        raise ConfigError(f"{path}:{line} does not run ({type(e).__name__}: {e})", key) from None
    finally:
        sys.meta_path.remove(finder)
    module.__executed__ = [file for file in foreign.files if file not in before]
    return module


def module_place(name):
    """Where Python has a module of this name: its file, "built in", or "" if it has none."""
    if name in sys.modules:
        return getattr(sys.modules[name], "__file__", None) or "built in"
    spec = importlib.util.find_spec(name)
    return "" if spec is None else spec.origin or "built in"


def resolve_model(name, foreign=None):
    """`gpt`, `file` or `file.Class` -> (module, class). foreign: Foreign."""
    full = MODELS.get(name, name)
    file, _, cls = full.partition(".")
    folders = (os.getcwd(), HERE)
    here = any(os.path.isfile(os.path.join(folder, file + ".py")) for folder in folders)
    if file not in OURS and not here:
        moved = foreign.place_of(file + ".py") if foreign else ""
        raise ConfigError(
            f"model={name!r} is neither one of {', '.join(MODELS)} nor a file here{moved}", "model"
        )
    cls = cls or "Model"
    require(cls.isidentifier() and cls != "py", f"model={name!r} must be file or file.Class, without .py", "model")
    module = import_source_file(file, "model", "Config", cls, foreign=foreign)
    found = getattr(module, cls)
    message = f"model={name!r}: Config of {file}.py must be a dataclass (@dataclass)"
    require(dataclasses.is_dataclass(module.Config), message, "model")
    is_module = isinstance(found, type) and issubclass(found, torch.nn.Module)
    require(is_module, f"model={name!r} is no torch.nn.Module", "model")
    # A part of one of our own models is no model; what a fork calls its own is its affair.
    whole = file not in OURS or issubclass(found, importlib.import_module("model").GPT)
    choice = f"choose from {', '.join(MODELS)}"
    require(whole, f"model={name!r} is a part of a model, no language model; {choice}", "model")
    return module, found


def resolve(settings, recorded=None):
    """Settings, in order -> Plan; ConfigError for whatever is wrong with them. recorded: see
    Foreign."""
    foreign = Foreign(recorded)
    try:
        first = build_config(TrainConfig, [s for s in settings if s.key in ("model", "data")])
        model_module, model_class = resolve_model(first.model, foreign)
        data_module = import_source_file(first.data, "data", "Config", "Data", foreign=foreign)
    except ConfigError as e:
        origin = {s.key: s.origin for s in settings}.get(e.key)
        raise ConfigError(f"{origin}: {e}" if origin else str(e)) from None
    reject_unknown(settings, TrainConfig, model_module.Config, data_module.Config)
    train = build_config(TrainConfig, settings)
    message = f"mem_stats_every={train.mem_stats_every} has no effect: {train.model} has no memory layers"
    require(not train.mem_stats_every or hasattr(model_class, "on_step_end"), message, "mem_stats_every")
    data = build_config(data_module.Config, settings)
    return Settings(train, model_module, model_class, data_module, data, settings, foreign.files)


def build_data(p):
    """The task, with the synthetic data set mixed in if there is one."""
    data = p.data_module.Data(p.data)
    if not p.train.synthetic_dataset:
        return data
    from nanorecall.mixture import mix  # only now: it imports both data files

    return mix(data, p.train)


def build_model_config(p, data):
    """The model's Config: settings, and what the data tells it."""
    config = build_config(p.model_module.Config, p.settings, vocab_size=data.vocab_size, seq_len=data.seq_len)
    reject_unused(config, getattr(p.model_class, "inactive_settings", {}), {s.key: s for s in p.settings})
    return config


def build_model(p, config):
    """A new model on the CPU, its weights a function of the seed alone."""
    torch.manual_seed(p.train.seed)
    try:
        return p.model_class(config)
    except (MemoryError, RuntimeError) as e:
        if not out_of_memory(e):
            raise
        with torch.device("meta"):  # sizes without numbers
            sizes = describe_size(p.model_class(config), 4)
        message = f"a model of these sizes does not fit in memory: {sizes}; make that smaller"
        raise ConfigError(message) from None


def describe_size(model, bytes_each):
    """How much memory a model takes at so many bytes a parameter, and what is largest, as text."""
    named = dict(model.named_parameters())
    count = sum(q.numel() for q in named.values())
    name, largest = max(named.items(), key=lambda item: item[1].numel())
    share = f"{largest.numel() / count:.0%} of it for {name} {tuple(largest.shape)}"
    return f"{count:,} parameters need {bytes_each * count / 2**30:.3g} GiB, {share}"


def out_of_memory(error):
    """Does this error of torch, numpy or Python mean that memory is full?"""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)


@contextlib.contextmanager
def enough_memory(advice):
    """RunFailed if the block needs more memory than there is. advice() says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:
        if not out_of_memory(e):
            raise
        raise RunError(f"memory is full; {advice()}") from None


def training_advice(model, device):
    """What to make smaller when training does not fit, as text.

    That is the batch, unless the model by itself takes half of the memory or more.
    """
    each = 16  # bytes in float32: weight, gradient, and AdamW's two moments
    if 2 * each * count_parameters(model)["total"] < memory_size(device):
        return "raise accumulate or lower batch_size or eval_batch_size"
    sizes = describe_size(model, each)
    return f"with gradients and AdamW's moments the model is too large: {sizes}; make that smaller"


def memory_size(device):
    """Bytes of the memory that a model on this device lives in; infinity where nothing says so."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        import resource
    except ImportError:  # Windows
        return math.inf
    allowed, _ = resource.getrlimit(resource.RLIMIT_AS)
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return installed if allowed == resource.RLIM_INFINITY else min(installed, allowed)


def count_parameters(model):
    """{"layers": parameters of the blocks only, "total": all of them, shared ones once}."""
    layers = getattr(model, "layers", None)
    layers = layers if isinstance(layers, torch.nn.Module) else torch.nn.Module()
    return {name: sum(q.numel() for q in m.parameters()) for name, m in (("layers", layers), ("total", model))}


# ---- the run directory -------------------------------------------------------------------------------------------------


def run_label(p, config):
    """`exp6_gpt_L4-D64_FF0_OG0_H2_q-48-none-none-0_..._lr0.001`, as the ULTM experiments name their runs."""
    parts = [f"exp{p.train.exp_group}", p.train.model]
    if hasattr(p.model_class, "label"):
        parts.append(p.model_class.label(config))
    parts.append("data-" + p.data.label() if hasattr(p.data, "label") else p.train.data)
    return "_".join(parts) + f"_lr{p.train.lr:g}"


def create_run_dir(p, config):
    """Create <log_dir>/<run> -> its path, and its lock.

    Without `run_name`, it ends in the Unix time, raised until it is free.
    A directory that a run left before its config.json was written is taken again.
    """
    c, now = p.train, int(time.time())
    while True:
        folder = os.path.join(c.log_dir, c.run_name or f"{run_label(p, config)}_{now}")
        message = f"{folder} exists; continue it with --resume {folder}, or give another --run_name"
        try:
            os.makedirs(folder)
        except FileExistsError:
            if not c.run_name:
                now += 1
                continue
            require(never_began(folder), message, "run_name")
        except OSError as e:
            raise ConfigError(f"cannot make the run directory {folder}: {e.strerror}", "log_dir") from None
        held = lock_run_dir(folder)
        if not never_began(folder):  # another process was faster
            unlock(held)
            raise ConfigError(message, "run_name")
        for leftover in os.listdir(folder):
            remove(os.path.join(folder, leftover))
        return folder, held


def never_began(folder):
    """Was a run stopped here before its config.json was written? Then nothing else is there."""
    if not os.path.isdir(folder):
        return False
    return all("config.json" in name and name != "config.json" for name in os.listdir(folder))


def run_metadata(p, config, model, device, dtype, world):
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
        "launch": launch_id(),
        "parameters": count_parameters(model),
        "data_sha256": {key: dataset_sha256(path) for key, path in data_paths(p).items()},
        "files": p.files,
    }


def data_paths(p):
    """{setting: path} of what a run reads from disk, except weights to begin with."""
    settings = {**vars(p.data), "synthetic_dataset": p.train.synthetic_dataset}
    return {key: settings[key] for key in ("path", "tokenizer", "synthetic_dataset") if settings.get(key)}


def check_data_unchanged(folder, p, *left_out):
    """ConfigError if something that the run reads from disk is not what it was when the run began."""
    config = os.path.join(folder, "config.json")
    began = read_record(config, {"data_sha256": {"*": "hash"}})["data_sha256"]
    for key, path in data_paths(p).items():
        if key not in left_out:
            require(key in began, f"{config} does not say which {key} the run began with", key)
            require(os.path.exists(path), f"{key}={path} does not exist, and {folder} was trained on it", key)
            message = f"{key}={path} is another one than {folder} was trained on; put that one back, or start a new run"
            require(dataset_sha256(path) == began[key], message, key)


RESUMABLE = (  # on resume
    "n_epochs max_steps stop_accuracy target log_interval eval_interval save_every nan_limit "
    "accumulate parallel export device threads compile"
).split()
# Where things are does not change the weights. What is in them is compared by require_same_data.
PLACES = "log_dir run_name exp_group resume init_from path tokenizer synthetic_dataset".split()


def settings_text(p, config):
    """What a checkpoint says of the settings that it was trained with.

    -> JSON: {"train": {name: value}, "model": {...}, "data": {...}}, without what may change.
    """
    parts = {"train": p.train, "model": config, "data": p.data}
    values = {}
    for part_name, part_config in parts.items():
        fixed = {k: v for k, v in vars(part_config).items() if k not in (*RESUMABLE, *PLACES)}
        values[part_name] = fixed
    return json.dumps(nan_to_null(values), sort_keys=True, default=str)


def require_same_settings(folder, p, config, state):
    """ConfigError if config.json is not what the checkpoint `state` was trained with.

    Older checkpoints do not say.
    """
    if "settings" not in state:
        return
    now, path = json.loads(settings_text(p, config)), os.path.join(folder, "config.json")
    try:
        began = parse_json(state["settings"])
        check_kinds(began, dict.fromkeys(now, "dict"), f"{folder}: the checkpoint's settings")
    except ValueError as e:
        raise ConfigError(f"{folder}: the settings in its checkpoint are damaged ({e})") from None
    for part_name, values in now.items():
        for key, value in began[part_name].items():
            mine = values.get(key, value)
            said = f"{path} says {key}={mine!r}"
            trained = f"the checkpoint was trained with {key}={value!r}"
            message = f"{said}, but {trained}; put that back, or start a new run"
            require(mine == value, message, None)


def launch_id():
    """torchrun's name for the processes that it started together, the same when it starts them again; "" without one."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return "" if name == "none" else name


def find_restarted_run(log_dir):
    """The run directory of this very launch, if torchrun has started it again after a rank died; else ""."""
    if not launch_id() or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return ""
    found = sorted(glob.glob(os.path.join(glob.escape(log_dir), "*", "config.json")), key=os.path.getmtime, reverse=True)
    for path in found:
        with contextlib.suppress(ConfigError):  # another run's may be damaged
            if read_record(path, {"launch": "text"})["launch"] == launch_id():
                return os.path.dirname(path)
    return ""


def git_commit():
    if not shutil.which("git"):
        return None
    return subprocess.run(["git", "-C", HERE, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip() or None


SETTINGS = {  # what config.json must hold, whichever model and data it is of
    "train": {"model": "text", "data": "text"},
    "model": "dict",
    "data": "dict",
    "files": {"*": "hash"},
}


def load_settings(folder, changes=()):
    """The Plan of an existing run, from its config.json alone; `changes` are Settings that win over
    it.

    ConfigError if a setting is missing or has two values, rather than a run with another one.
    """
    path = os.path.join(folder, "config.json")
    if not os.path.exists(path):
        why = "it has no config.json"
        if never_began(folder):
            name = os.path.basename(os.path.normpath(folder))
            again = f"start it again as before, with --run_name {name}"
            why = f"{why}: the run was stopped before it began; {again}"
        raise ConfigError(f"{folder} is not a run directory: {why}")
    saved = read_record(path, SETTINGS)
    told = ("vocab_size", "seq_len")  # the data tells the model again
    groups = [
        saved["train"],
        {k: v for k, v in saved["model"].items() if k not in told},
        saved["data"],
    ]
    settings = [Setting(k, v, path) for group in groups for k, v in group.items()]
    values = {}
    for s in settings:
        same = values.setdefault(s.key, s.value) == s.value
        require(
            same,
            f"{path}: {s.key} has two values, {values[s.key]!r} and {s.value!r}; which was it?",
            s.key,
        )
    p = resolve(settings + list(changes), saved["files"])
    for cls, group in zip((TrainConfig, p.model_module.Config, type(p.data)), groups):
        lost = [n for n in field_names(cls) if n not in group and n not in told]
        # Settings that are newer than the run. What the checkpoint knows of is compared with it.
        if lost and os.environ.get("RANK", "0") == "0":
            note = f"note: {path} has no {', '.join(lost)}; their defaults are taken"
            say(note, file=sys.stderr)
    return p


def saved_model_config(folder, p):
    """The model's Config of an existing run, without its data."""
    path = os.path.join(folder, "config.json")
    saved = read_record(path, SETTINGS)["model"]
    # A model file's Config may leave out what the data tells it.
    told = {"vocab_size": None, "seq_len": None}
    needed = told.keys() & {f.name for f in dataclasses.fields(p.model_module.Config)}
    check_kinds(saved, dict.fromkeys(sorted(needed), "size"), f"{path}: 'model'")
    return build_model_config(p, types.SimpleNamespace(**{**told, **saved}))


def shapes(tensors):
    return {name: t.shape for name, t in tensors.items()}


def load_run(folder, which="best"):
    """A trained run, ready to look at: -> (Plan, data, model in eval mode on the CPU, checkpoint).

    which: "best" (highest validation accuracy) or "ckpt" (latest).
    """
    p = load_settings(folder)
    check_data_unchanged(folder, p, "synthetic_dataset")  # that start is over, and its data set may be gone
    data = p.data_module.Data(p.data)
    config = saved_model_config(folder, p)
    model = build_model(p, config)
    state = load_checkpoint(folder, *(("best",) if which == "best" else ("ckpt", "ckpt_prev")))
    require_same_settings(folder, p, config, state)
    weights = select_prefix(state["tensors"], "model")
    message = f"the checkpoint in {folder} is not of the model that its config.json describes"
    require(shapes(weights) == shapes(model.state_dict()), message, None)
    model.load_state_dict(weights)
    return p, data, model.eval(), state
