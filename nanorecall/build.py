"""Settings -> checked configs, the classes they name, data and model.

    settings = resolve(assignments, TrainConfig)          # -> Settings
    data = build_data(settings)
    model = build_model(settings, build_model_config(settings, data))

A model is a short name of MODELS, file or file.Class; a task is a file (see source_files.py).
"""

import contextlib
import dataclasses
import importlib
import inspect
import math
import os
from dataclasses import dataclass

import torch
from torch.utils._pytree import tree_leaves

from nanorecall.distributed import is_out_of_memory, local_tensor
from nanorecall.hook_names import check_hook_names
from nanorecall.metrics import evaluating
from nanorecall.pretrained import freeze, load_parts
from nanorecall.settings import (
    ConfigError,
    RunError,
    build_config,
    reject_unknown,
    reject_unused,
    require,
)
from nanorecall.source_files import (
    REPO_FILES,
    UserFiles,
    close_name,
    find_source_file,
    import_source_file,
)

# A model file needs Config and Model (see GUIDE.md, Your own model or data file).
# A model class may also have
#   inactive_settings {setting: reason}          settings of Config that this model refuses
#   describe_backend(config, device, dtype)      -> str: which kernel runs and why
#   lr_scales() -> {end of a name: factor}       parameters with a learning rate of their own
#   sparse_gradients() -> [end of a name]        parameters whose gradients are sparse tensors
#   column_sharded() -> [end of a name]          parameters of which each rank keeps some columns
#   on_step_end(report) -> {block: usage} or {}  called after each training step
#   forward_cached(tokens, cache) -> logits, cache   decoding, for `eval.py --print_examples`
#   correct_predictions(logits, targets)         what counts as correct (see metrics.py)
# A mixer of your own in a block of model.py needs forward(x) alone; with a parameter `cache` the
# model can decode.
MODELS = {  # short names; anything else is file or file.Class
    "gpt": "model.GPT",
    "unified_kv": "model.UnifiedKV",
    "delta": "delta.DeltaNet",
    "gated_delta": "delta.GatedDeltaNet",
    "kda": "delta_variants.KDA",
    "delta_product": "delta_variants.DeltaProduct",
    "linear": "linear.LinearAttention",
    "retnet": "linear.RetNet",
    "mamba2": "linear.Mamba2",
    "gla": "linear.GLA",
    "mesa": "linear.MesaNet",
    "ttt_linear": "ttt.TTTLinear",
    "ttt_mlp": "ttt.TTTMLP",
    "memory": "memory.MemoryGPT",
    "memory_router": "memory.MemoryRouterGPT",
    "hybrid": "hybrid.Hybrid",
}


# ---- settings -> classes -------------------------------------------------------------------------


@dataclass
class Settings:
    """Everything that settings decide: checked configs, the classes to build, and who set what."""

    train: object  # TrainConfig
    model_module: object
    model_class: type
    data_module: object
    data: object  # the data file's Config
    assignments: list  # [Setting] as the user wrote them; later ones win
    files: dict  # {path: SHA-256} of the user's own files that were executed
    resume: str = ""  # the run directory to continue


def resolve(assignments, train_config, recorded=None):
    """[Setting] in order -> Settings; ConfigError if one of them is wrong.

    recorded: the user's files that may be executed (see UserFiles).
    """
    user_files = UserFiles(recorded)
    try:
        first = build_config(train_config, [s for s in assignments if s.key in ("model", "data")])
        model_module, model_class = resolve_model(first.model, user_files)
        data_module = import_source_file(
            first.data, "data", "Config", "Data", user_files=user_files
        )
    except ConfigError as e:
        source = {s.key: s.source for s in assignments}.get(e.key)
        raise ConfigError(f"{source}: {e}" if source else str(e)) from None
    reject_unknown(assignments, train_config, model_module.Config, data_module.Config)
    c = build_config(train_config, assignments)
    check_length(c, {s.key: s.source for s in assignments})
    message = f"mem_log_interval={c.mem_log_interval} has no effect: {c.model} has no memory layers"
    has_memory = hasattr(model_class, "on_step_end")
    require(not c.mem_log_interval or has_memory, message, "mem_log_interval")
    data = build_config(data_module.Config, assignments)
    return Settings(c, model_module, model_class, data_module, data, assignments, user_files.files)


def check_length(c, source_of):
    """ConfigError for a flag n_epochs beside max_steps, which goes before it.

    A config may have it: then a flag max_steps shortens the run. source_of: {setting: who set it}.
    """
    is_flag = source_of.get("n_epochs", "").startswith("--")
    limit = f"max_steps={c.max_steps}"
    if not source_of.get("max_steps", "--").startswith("--"):
        limit += f" ({source_of['max_steps']})"
    message = f"n_epochs={c.n_epochs} has no effect: {limit} ends the training; change that instead"
    # With 0 epochs nothing is trained.
    require(not (c.max_steps and c.n_epochs and is_flag), message, "n_epochs")


def resolve_model(name, user_files=None):
    """`gpt`, `file` or `file.Class` -> (module, class). user_files: UserFiles."""
    file, _, cls = MODELS.get(name, name).partition(".")
    if file not in REPO_FILES and not find_source_file(file):
        moved = user_files.moved_hint(file + ".py") if user_files else ""
        choice = f"is neither one of {', '.join(MODELS)} nor a file here{moved}"
        raise ConfigError(f"model={name!r} {choice}", "model")
    cls = cls or "Model"
    message = f"model={name!r} must be file or file.Class, without .py"
    require(cls.isidentifier() and cls != "py", message, "model")
    module = import_source_file(file, "model", user_files=user_files)
    mixers = own_mixers(module)
    message = f"{file}.py has no {cls}, so it is no file for model"
    hint = close_name(cls, module) or own_models(module)
    message += hint or card_advice([f"{file}.{mixer}" for mixer in mixers])
    require(hasattr(module, cls), message, "model")
    model_class = getattr(module, cls)
    message = f"model={name!r} is a function; GUIDE.md, An attention function of your own, says how"
    require(not inspect.isfunction(model_class), f"{message} a model calls it", "model")
    message = f"{file}.py has no Config, so it is no file for model"
    message += card_advice([name] if cls in mixers else [])
    require(hasattr(module, "Config"), message, "model")
    message = f"model={name!r}: Config of {file}.py must be a dataclass (@dataclass)"
    require(dataclasses.is_dataclass(module.Config), message, "model")
    is_module = isinstance(model_class, type) and issubclass(model_class, torch.nn.Module)
    require(is_module, f"model={name!r} is no torch.nn.Module", "model")
    # A layer from our own files is refused. Only the author of a fork knows what is a model there.
    is_whole = True
    if file in REPO_FILES:
        is_whole = issubclass(model_class, importlib.import_module("model").GPT)
    choice = f"choose from {', '.join(MODELS)}"
    message = f"model={name!r} is a part of a model, no language model; {choice}"
    require(is_whole, message, "model")
    # A run that was trained is opened as it is.
    if file not in REPO_FILES and not (user_files and user_files.recorded is not None):
        check_hook_names(module, model_class, module.__executed__)
    return module, model_class


def own_models(module):
    """The classes in a file that are made from model.GPT, as the end of a sentence; or ""."""
    gpt, names = importlib.import_module("model").GPT, []
    for name, value in vars(module).items():
        is_own = inspect.isclass(value) and value.__module__ == module.__name__
        if is_own and issubclass(value, gpt):
            names.append(f"{module.__name__}.{name}")
    return f"; its models are {', '.join(names)}" if names else ""


def own_mixers(module):
    """Names of the classes in a file that may be mixers: those made from nn.Module itself."""
    names = []
    for name, value in vars(module).items():
        is_own = inspect.isclass(value) and value.__module__ == module.__name__
        if is_own and torch.nn.Module in value.__bases__:
            names.append(name)
    return names


def card_advice(mixers):
    """How to train one of these mixers (file.Class), as the end of a sentence; "" without one."""
    if not mixers:
        return ""
    cards = " or ".join(f"`python sweep.py card --mixer {mixer}`" for mixer in mixers)
    where = "a mixer is trained in a block (GUIDE.md, A mixer of your own)"
    return f"; {where}: {cards} checks it and writes a model file around it"


# ---- Settings -> data and model ------------------------------------------------------------------


def build_data(settings):
    """The task, with the synthetic data set mixed in if there is one."""
    data = settings.data_module.Data(settings.data)
    if not settings.train.synthetic_dataset:
        return data
    from nanorecall.mixture import mix  # here, because it imports both data files

    return mix(data, settings.train)


def build_model_config(settings, data):
    """The model's Config, from the settings; vocab_size and seq_len are those of the data."""
    sizes = {"vocab_size": data.vocab_size, "seq_len": data.seq_len}
    config = build_config(settings.model_module.Config, settings.assignments, **sizes)
    inactive = getattr(settings.model_class, "inactive_settings", {})
    reject_unused(config, inactive, {s.key: s for s in settings.assignments})
    return config


def build_model(settings, config):
    """A new model on the CPU. Its weights are a function of the seed alone."""
    torch.manual_seed(settings.train.seed)
    try:
        return settings.model_class(config)
    except (MemoryError, RuntimeError) as e:
        if not is_out_of_memory(e):
            raise
        with torch.device("meta"):  # shapes without memory
            sizes = describe_size(settings.model_class(config), 4)
        message = f"a model of these sizes does not fit in memory: {sizes}; make that smaller"
        raise ConfigError(message) from None


# ---- weights -------------------------------------------------------------------------------------


def load_and_freeze(model, c, has_checkpoint):
    """Load and freeze the weights that settings name -> lines about it.

    has_checkpoint: all weights will come from the run's own checkpoint, so init_from is skipped.
    """
    notes = []
    if c.init_from and not has_checkpoint:
        is_map = isinstance(c.init_map, dict) or not c.init_map
        require(is_map, f"init_map={c.init_map!r} is no JSON dict", "init_map")
        notes.append(load_parts(model, c.init_from, c.init_step, c.init_map))
    if c.freeze:
        notes.append(freeze(model, c.freeze))
    return notes


def count_parameters(model):
    """{"layers": parameters of the blocks, "total": all of them}; shared ones count once."""
    layers = getattr(model, "layers", None)
    in_layers = layers.parameters() if isinstance(layers, torch.nn.Module) else ()
    return {
        "layers": sum(q.numel() for q in in_layers),
        "total": sum(q.numel() for q in model.parameters()),
    }


def inference_state_bytes(model, T):
    """Bytes of the cache of one sequence of T tokens; None: the model has no cache."""
    if not hasattr(model, "forward_cached"):
        return None
    device = next(model.parameters()).device
    try:
        with evaluating(model):  # in which a memory layer counts no reads
            tokens = torch.zeros(1, T, dtype=torch.long, device=device)
            _, cache = model.forward_cached(tokens, None)
    except Exception:  # a mixer without a cache, or a user's that fails in any way
        return None
    return sum(x.nbytes for x in tree_leaves(cache) if torch.is_tensor(x))


def total_steps(c, data):
    """Optimizer steps of a whole run."""
    return c.max_steps or c.n_epochs * data.steps_per_epoch(c.batch_size)


# ---- memory --------------------------------------------------------------------------------------


def describe_size(model, bytes_each):
    """The model's memory at bytes_each for each parameter, and its largest tensor, as text."""
    named = dict(model.named_parameters())
    count = sum(q.numel() for q in named.values())
    name = max(named, key=lambda n: named[n].numel())
    largest = named[name]
    part = f"{largest.numel() / count:.0%} of it for {name} {tuple(largest.shape)}"
    return f"{count:,} parameters need {bytes_each * count / 2**30:.3g} GiB, {part}"


@contextlib.contextmanager
def enough_memory(advice):
    """RunError if the block runs out of memory. advice() says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:
        if not is_out_of_memory(e):
            raise
        raise RunError(f"memory is full; {advice()}") from None


def training_advice(model, device):
    """Advice for a training that does not fit in memory, as text.

    That is the batch, unless the model by itself takes half of the memory or more.
    """
    bytes_each = 16  # float32: weight, gradient, and AdamW's two moments
    n_here = sum(local_tensor(q).numel() for q in model.parameters())
    if 2 * bytes_each * n_here < memory_size(device):
        return "raise grad_accum_steps or lower batch_size or eval_batch_size"
    sizes = describe_size(model, bytes_each)
    return f"with gradients and AdamW's moments the model is too large: {sizes}; make that smaller"


def memory_size(device):
    """Bytes of memory for a model on this device; infinity where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        import resource
    except ImportError:  # Windows
        return math.inf
    allowed, _ = resource.getrlimit(resource.RLIMIT_AS)
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return installed if allowed == resource.RLIM_INFINITY else min(installed, allowed)
