"""Checks of a model's files. A setting or tensor is either computed exactly or refused by name.

All functions here raise ConfigError with one sentence that names the file and what is wrong in it.
"""

import importlib.util

import torch

from myriadlama.llama import Llama
from nanorecall.settings import require

ANY = object()  # in a table of settings: every value is allowed


def require_package(package, message):
    """Raise ConfigError(message) unless a Python package is installed."""
    require(importlib.util.find_spec(package) is not None, message, "model")


def shown(value):
    """A value from a file as text of at most 60 characters, with control characters escaped."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        text = ", ".join(map(repr, value))
    else:
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def check_settings(found, allowed_values, where):
    """Refuse the first setting that would change what the model computes.

    allowed_values: {key: ANY or a tuple of values}. An unknown key is refused too, unless its value
    is None.
    """
    for key, value in found.items():
        allowed = allowed_values.get(key)
        if allowed is ANY:
            continue
        if allowed is None and value is None:
            continue
        found_here = f"{where}: {key[:60]!r} is {shown(value)}"
        hint = "if it does not change what the model computes, take it out"
        message = f"{found_here}, a setting that is not known here; {hint}"
        require(allowed is not None, message, "model")
        only = " or ".join(map(repr, allowed))
        require(value in allowed, f"{found_here}; only {only} is computed here", "model")


def get_or_default(found, key, where, default):
    value = found.get(key)
    if value is None:
        value = default
    require(value is not None, f"{where}: {key} is missing", "model")
    return value


def whole_number(found, key, where, default=None, low=1, high=10**7):
    """found[key], a whole number from low to high."""
    value = get_or_default(found, key, where, default)
    valid = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    rule = f"must be a whole number from {low} to {high}"
    require(valid, f"{where}: {key} is {shown(value)}, but {rule}", "model")
    return value


def positive_number(found, key, where, default=None):
    """found[key], a finite number above 0, as a float."""
    value = get_or_default(found, key, where, default)
    valid = isinstance(value, (int, float)) and not isinstance(value, bool)
    valid = valid and 0 < value < 1e30  # False for NaN
    require(valid, f"{where}: {key} is {shown(value)}, but must be a number above 0", "model")
    return float(value)


def true_or_false(found, key, where, default=False):
    """found[key], a bool."""
    value = found.get(key, default)
    message = f"{where}: {key} is {shown(value)}, not true or false"
    require(isinstance(value, bool), message, "model")
    return value


def eos_ids(value, where, vocab_size):
    """A token id, a list of token ids or None -> tuple of token ids, all below vocab_size."""
    if value is None:
        return ()
    checked = []
    for token in value if isinstance(value, list) else [value]:
        found = {"eos_token_id": token}
        checked.append(whole_number(found, "eos_token_id", where, None, 0, vocab_size - 1))
    return tuple(checked)


def check_sizes(config, where):
    """Refuse sizes that do not fit together."""
    heads = f"{where}: {config.n_heads} heads of width {config.head_dim}"
    require(config.head_dim % 2 == 0, f"{heads}: rotary positions need an even width", "model")
    require(config.n_heads * config.head_dim <= 10**7, f"{heads} are too many", "model")
    message = f"{config.n_heads} heads cannot share {config.n_kv_heads} key and value heads"
    require(config.n_heads % config.n_kv_heads == 0, f"{where}: {message}", "model")


def match_weights(config, tensors, file_name, path):
    """{name in the file: tensor} -> {parameter name: tensor}.

    The tensors must be exactly the parameters of Llama(config), each of its shape.
    file_name(parameter name) -> name in the file.
    """
    # Building a model of a million layers would take forever, even without its weights.
    too_few = f"{path} has {len(tensors)} tensors, too few for {config.n_layers} layers"
    require(config.n_layers < len(tensors), f"{too_few}; is a file missing?", "model")
    with torch.device("meta"):
        parameters = dict(Llama(config).named_parameters())
    names = {file_name(parameter): parameter for parameter in parameters}
    unknown = sorted(tensors.keys() - names.keys())
    problem = "no weight of a Llama with these settings, and would be left out"
    require(not unknown, f"{path} holds {shown(unknown[:3])}: {problem}", "model")
    weights = {}
    for name, parameter in names.items():
        require(name in tensors, f"{path} has no weights for {name}; is a file missing?", "model")
        shape, expected = tuple(tensors[name].shape), tuple(parameters[parameter].shape)
        require(shape == expected, f"{path}: {name} has shape {shape}, not {expected}", "model")
        weights[parameter] = tensors[name]
    return weights
