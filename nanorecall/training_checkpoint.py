"""Model and optimizer in a checkpoint: saved by all ranks together, loaded by any number."""

import os

import torch

from nanorecall.checkpoint import load_checkpoint, remove_old_shards, save_checkpoint
from nanorecall.distributed import is_dtensor
from nanorecall.settings import require
from nanorecall.sharded_checkpoint import read_shards, save_shards, shard_dir, shard_metadata
from nanorecall.tensors import require_same_shapes, select_prefix


def training_state(model, optimizer=None):
    """{"model.<name>": tensor, "optimizer.<parameter>.exp_avg": tensor, ...} for a checkpoint.

    Tensors are DTensors under FSDP. Without an optimizer, the model's alone.
    """
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    if optimizer:
        for name, q in model.named_parameters():
            for key, t in optimizer.state.get(q, {}).items():
                tensors[f"optimizer.{name}.{key}"] = t
    return tensors


def load_training_state(folder, state, model, optimizer=None):
    """Copy the tensors of a checkpoint (read_checkpoint's dict) into model and optimizer.

    They may be in one file or in shards of any number of ranks; each rank takes its own shard.
    """
    sharded = "shards" in state
    if sharded:
        metadata = shard_metadata(shard_dir(folder, state))
        shapes = {name: t.size for name, t in metadata.items()}
    else:
        shapes = {name: t.shape for name, t in state["tensors"].items()}
    require_same_shapes(folder, select_prefix(shapes, "model"), model, "resume")
    if optimizer:
        of_optimizer = select_prefix(shapes, "optimizer")
        # Before the first step there is nothing to keep.
        message = f"the checkpoint in {folder} has no state of the optimizer, as best.pt has none"
        how = f"start a new run with --init_from {folder}"
        require(of_optimizer or state["step"] == 0, f"{message}; {how}", "resume")
        make_optimizer_state(folder, of_optimizer, model, optimizer)
    into = training_state(model, optimizer)
    with torch.no_grad():
        if sharded:
            read_shards(shard_dir(folder, state), into)
            return
        for name, t in into.items():
            source = state["tensors"][name]
            t.copy_(shard_like(source, t) if is_dtensor(t) else source)


def make_optimizer_state(folder, shapes, model, optimizer):
    """Give a new optimizer the tensors that a checkpoint has of it, zeros still.

    shapes: {"<parameter>.<key>": shape}.
    """
    parameters = dict(model.named_parameters())
    for name, shape in shapes.items():
        parameter, _, key = name.rpartition(".")
        q = parameters.get(parameter)
        fits = q is not None and shape in (q.shape, torch.Size())
        message = f"the checkpoint in {folder} has an optimizer's {name} that fits no parameter"
        require(fits, message, "resume")
        if shape == q.shape and q.ndim > 0:
            optimizer.state[q][key] = torch.zeros_like(q).detach()
        else:  # the number of steps
            optimizer.state[q][key] = torch.zeros(shape, device=q.device)


def shard_like(tensor, target):
    """This rank's shard of a tensor that every rank has read: nothing is sent."""
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(target.device)
    return distribute_tensor(tensor, target.device_mesh, target.placements, src_data_rank=None)


def write_checkpoint(folder, name, state, tensors, sharded, world, keep_old=True):
    """Save state and tensors as <name>.pt, on all ranks together.

    The main rank writes one file, or each rank a shard beside it. keep_old: an older ckpt.pt stays
    as ckpt_prev.pt.
    """
    if sharded:
        shards = save_shards(folder, f"{name}-{state['step']}", tensors, world)
        state = {**state, "shards": shards}
    with world.agree():
        if world.is_main:
            if not sharded:
                state = {**state, "tensors": {k: t.cpu() for k, t in tensors.items()}}
            save_checkpoint(folder, name, state, keep_old)
            remove_old_shards(folder)


CHECKPOINT_FORMATS = {"file": False, "shards": True}


def convert_checkpoints(folder, form, world):
    """Rewrite the checkpoints of a run in the given form, `file` or `shards`."""
    sharded = CHECKPOINT_FORMATS[form]
    paths = {name: os.path.join(folder, f"{name}.pt") for name in ("ckpt", "ckpt_prev", "best")}
    there_is_one = any(map(os.path.exists, paths.values()))
    require(there_is_one, f"{folder} has no checkpoint to export", "export_checkpoint")
    for name, path in paths.items():
        if os.path.exists(path):
            state = load_checkpoint(folder, name)
            tensors = state.pop("tensors")
            state.pop("shards", None)
            write_checkpoint(folder, name, state, tensors, sharded, world, keep_old=False)
            world.print0(f"rewrote {path}, step {state['step']}, as {form}")
