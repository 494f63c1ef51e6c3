"""A run directory opened again: its settings, data and model, from its config.json alone.

    settings, data, model, checkpoint = load_run("runs/RUN", TrainConfig)  # a trained run
    settings = load_settings("runs/RUN", TrainConfig)                      # -> Settings: build.py

Its data files and its settings must be those of its training. Each difference is one ConfigError.
"""

import dataclasses
import json
import os
import sys
import types
import typing

from nanorecall.build import build_model, build_model_config, resolve
from nanorecall.checkpoint import load_checkpoint
from nanorecall.data_checks import named_data_errors
from nanorecall.files import dataset_sha256
from nanorecall.records import check_kinds, nan_to_null, parse_json, read_record
from nanorecall.run_dir import data_paths, data_sha256, never_began
from nanorecall.settings import ConfigError, Setting, convert, field_names, require, say
from nanorecall.source_files import is_main_rank
from nanorecall.tensors import require_same_shapes, select_prefix

RESUMABLE = (  # settings that may change when a run is resumed
    *("n_epochs", "max_steps", "stop_accuracy", "target_accuracy", "log_interval", "eval_interval"),
    *("save_interval", "max_skipped_steps", "grad_accum_steps", "parallel", "track"),
    *("export_checkpoint", "device", "num_threads", "compile"),
)

# Where files lie does not change the weights. check_data_unchanged compares what they hold.
PATHS = (
    *("log_dir", "run_name", "exp_group", "resume", "init_from", "path", "tokenizer"),
    "synthetic_dataset",
)

DERIVED = ("vocab_size", "seq_len")  # settings of a model that its data gives

SAVED_CONFIG = {  # what config.json must hold, whichever model and data it is of
    "train": {"model": "text", "data": "text"},
    "model": "dict",
    "data": "dict",
    "files": {"*": "hash"},
}

# ---- settings, data and model --------------------------------------------------------------------


def load_run(folder, train_config, which="best"):
    """A trained run: -> (Settings, data, model in eval mode on the CPU, checkpoint).

    which: "best" (highest validation accuracy) or "ckpt" (latest).
    """
    settings = load_settings(folder, train_config)
    # The synthetic data set was mixed into training only, and may be gone.
    check_data_unchanged(folder, settings, "synthetic_dataset")
    with named_data_errors(settings):
        data = settings.data_module.Data(settings.data)
    config = saved_model_config(folder, settings)
    model = build_model(settings, config)
    names = ("best",) if which == "best" else ("ckpt", "ckpt_prev")
    checkpoint = load_checkpoint(folder, *names)
    require_same_settings(folder, settings, config, checkpoint)
    weights = select_prefix(checkpoint["tensors"], "model")
    require_same_shapes(folder, {name: t.shape for name, t in weights.items()}, model)
    model.load_state_dict(weights)
    return settings, data, model.eval(), checkpoint


def load_settings(folder, train_config, changes=()):
    """Settings of an existing run, from its config.json alone. changes: [Setting] that win over it.

    ConfigError if a setting is missing or has two values.
    """
    path = os.path.join(folder, "config.json")
    if not os.path.exists(path):
        why = "it has no config.json"
        if never_began(folder):
            name = os.path.basename(os.path.normpath(folder))
            how = f"start it again as before, with --run_name {name}"
            why = f"{why}: the run was stopped before it began; {how}"
        elif os.path.exists(os.path.join("runs", folder, "config.json")):
            why = f"{why}; did you mean {os.path.join('runs', folder)}?"
        raise ConfigError(f"{folder} is not a run directory: {why}")
    saved = read_record(path, SAVED_CONFIG)
    model = {k: v for k, v in saved["model"].items() if k not in DERIVED}
    assignments, values = [], {}
    for group in (saved["train"], model, saved["data"]):
        for key, value in group.items():
            assignments.append(Setting(key, value, path))
            first = values.setdefault(key, value)
            message = f"{path}: {key} has two values, {first!r} and {value!r}; which was it?"
            require(first == value, message, key)
    settings = resolve(assignments + list(changes), train_config, saved["files"])
    settings.resume = folder
    note_new_settings(path, train_config, saved["train"])
    note_new_settings(path, settings.model_module.Config, model)
    note_new_settings(path, type(settings.data), saved["data"])
    return settings


def note_new_settings(path, cls, saved):
    """Print which settings of the class are newer than the run and take their defaults.

    Those that the checkpoint knows of are compared with it: see require_same_settings. There is no
    note on those that may change when a run is resumed (RESUMABLE), nor on PATHS, whose default is
    no file: their defaults cannot have changed the training.
    """
    known = {*saved, *DERIVED, *RESUMABLE, *PATHS}
    new = [name for name in field_names(cls) if name not in known]
    if new and is_main_rank():
        say(f"note: {path} has no {', '.join(new)}; their defaults are taken", file=sys.stderr)


def saved_model_config(folder, settings):
    """The model's Config of an existing run, without its data."""
    path = os.path.join(folder, "config.json")
    saved = read_record(path, SAVED_CONFIG)["model"]
    # A model file's Config need not have all that is derived.
    fields = {f.name for f in dataclasses.fields(settings.model_module.Config)}
    needed = sorted(fields.intersection(DERIVED))
    check_kinds(saved, dict.fromkeys(needed, "size"), f"{path}: 'model'")
    derived = {**dict.fromkeys(DERIVED), **saved}
    return build_model_config(settings, types.SimpleNamespace(**derived))


def check_saved_settings(settings, config):
    """ConfigError unless the settings of a user's files come back from config.json as they are.

    Else the run could be trained and never be opened again. config: the model's.
    """
    if not settings.files:
        return
    values, class_of = {}, {}
    for part in (settings.train, config, settings.data):
        cls = type(part)
        hints = typing.get_type_hints(cls)
        for name in field_names(cls):
            if part is config and name in DERIVED:
                continue
            value = getattr(part, name)
            first = values.setdefault(name, value)
            other = class_of.setdefault(name, cls)
            message = f"{name} is {first!r} in {other.__module__}.{other.__name__} and {value!r} in"
            message += f" {cls.__module__}.{cls.__name__}; give one of them another name"
            require(first == value, message, name)
            try:
                same = convert(json.loads(json.dumps(value)), hints[name]) == value
                problem = "is not the same when it is read again"
            except (TypeError, ValueError) as e:
                same, problem = False, str(e)
            message = f"{cls.__module__}.{cls.__name__}: {name} {problem}; its type must be bool,"
            message += f" int, float, str or a tuple of them, and its default, {value!r}, of that"
            require(same, message, name)


# ---- is it still the same? -----------------------------------------------------------------------


def check_data_unchanged(folder, settings, *except_for):
    """ConfigError if a file that the run reads is not what it was when the run began."""
    config = os.path.join(folder, "config.json")
    before = read_record(config, {"data_sha256": {"*": "hash"}})["data_sha256"]
    for key, path in data_paths(settings).items():
        if key not in except_for:
            require(key in before, f"{config} does not say which {key} the run began with", key)
            message = f"{key}={path} does not exist, and {folder} was trained on it"
            require(os.path.exists(path), message, key)
            how = "put that one back, or start a new run"
            message = f"{key}={path} is another one than {folder} was trained on; {how}"
            is_same = before[key] == data_sha256(settings, key, path)
            # Older runs have recorded all files of a directory.
            require(is_same or before[key] == dataset_sha256(path), message, key)


def fixed_settings_json(settings, config):
    """JSON of the settings that may not change, for checkpoints.

    -> {"train": {name: value}, "model": {...}, "data": {...}}
    """
    values = {}
    for name, part in (("train", settings.train), ("model", config), ("data", settings.data)):
        values[name] = {k: v for k, v in vars(part).items() if k not in RESUMABLE + PATHS}
    return json.dumps(nan_to_null(values), sort_keys=True, default=str)


def require_same_settings(folder, settings, config, checkpoint):
    """ConfigError if config.json is not what the checkpoint was trained with.

    Older checkpoints have no settings, and pass.
    """
    if "settings" not in checkpoint:
        return
    now = json.loads(fixed_settings_json(settings, config))
    path = os.path.join(folder, "config.json")
    try:
        before = parse_json(checkpoint["settings"])
        check_kinds(before, dict.fromkeys(now, "dict"), f"{folder}: the checkpoint's settings")
    except ValueError as e:
        message = f"{folder}: the settings in its checkpoint are damaged ({e})"
        raise ConfigError(message) from None
    for name, values in now.items():
        for key, value in before[name].items():
            mine = values.get(key, value)
            trained = f"the checkpoint was trained with {key}={value!r}"
            message = f"{path} says {key}={mine!r}, but {trained}"
            require(mine == value, f"{message}; put that back, or start a new run", None)


def require_unedited(folder):
    """ConfigError for a run that `eval.py edit --save_as` wrote: it has no optimizer's state."""
    message = f"{folder} holds edited weights; train from them with --init_from {folder}"
    config = read_record(os.path.join(folder, "config.json"), "dict")
    require("edits" not in config, f"{message} in a new run", "resume")
