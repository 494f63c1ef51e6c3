"""{name: tensor} from a file that anyone may have made: checked before it is used as weights."""

import hashlib
import os

import torch

from nanorecall.settings import ConfigError, require

# Those of real numbers. Complex and quantized tensors are no weights of ours.
DTYPES = {torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.bool}
DTYPES |= {torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8}
DTYPES |= {torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64}


def plain_tensors(found, path):
    """What was read as weights from the file `path`, any object -> {name: tensor}.

    The tensors are without the attributes that others may have given them. ConfigError unless names
    are printable text and tensors plain ones of real numbers. A tensor may not have more numbers
    than the file has bytes: with a stride of 0, one number in the file would be 10^12 in memory.
    """
    size = os.path.getsize(path)

    def need(condition, name, what):
        require(condition, f"{path} cannot be read as weights: {name!r:.80} is {what}", "init_from")

    message = f"{path} cannot be read as weights: no tensors by name"
    require(isinstance(found, dict), message, "init_from")
    for name, t in found.items():
        need(isinstance(name, str) and name.isprintable(), name, "no name of a tensor")
        plain = type(t) in (torch.Tensor, torch.nn.Parameter)
        need(plain, name, f"a {type(t).__name__}, no tensor")
        need(t.layout is torch.strided and not t.is_nested, name, "no dense tensor")
        need(t.device.type == "cpu", name, "a tensor without data")
        need(t.dtype in DTYPES, name, f"a tensor of {str(t.dtype).removeprefix('torch.')}")
        count = torch.Tensor.numel(t)
        need(count <= size, name, f"a tensor of {count} numbers, in a file of {size} bytes")
    return {name: torch.Tensor.detach(t) for name, t in found.items()}


def unreadable(path, error):
    """The ConfigError for a file of which torch or pickle has raised `error`."""
    why = " ".join(str(error).split())[:120] or type(error).__name__
    return ConfigError(f"{path} cannot be read as weights ({why})", "init_from")


def tensors_sha256(named):
    """SHA-256 of tensors {name: tensor}: of names, kinds, shapes and numbers."""
    hasher = hashlib.sha256()
    for name in sorted(named):
        tensor = named[name].detach().cpu().contiguous()
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return hasher.hexdigest()


def require_same_shapes(folder, shapes, model, key=None):
    """ConfigError unless the weights of a run's checkpoint, {name: shape}, are those of the model.

    key: the setting that named the run.
    """
    same = shapes == {name: t.shape for name, t in model.state_dict().items()}
    message = f"the checkpoint in {folder} is not of the model that its config.json describes"
    require(same, message, key)


def select_prefix(tensors, prefix):
    """{"model.a": x, "optimizer.b": y}, "model" -> {"a": x}."""
    found = {}
    for name, t in tensors.items():
        if name.startswith(prefix + "."):
            found[name.removeprefix(prefix + ".")] = t
    return found
