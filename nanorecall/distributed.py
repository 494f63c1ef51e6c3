"""One run on many processes: what the ranks of torchrun tell each other, and how a model is spread over them.

    torchrun --standalone --nproc_per_node=4 train.py configs/mqar_gpt.py                    # DDP: a whole copy on every rank
    torchrun --standalone --nproc_per_node=4 train.py configs/mqar_gpt.py --parallel=fsdp    # FSDP2: a share on every rank
    sbatch train.slurm configs/mqar_gpt.py                                                   # one or many nodes

Gradients are sums over the ranks, because each rank has weighted its loss by its labels' share of the global batch. Numbers
that decide something (labels in the batch, has anyone got a signal) go through `World.gather_numbers` on the CPU, so that all
ranks decide alike.
"""

import contextlib
import gc
import inspect
import os
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from nanorecall.checkpoint import (
    load_checkpoint,
    read_shards,
    remove_old_shards,
    save_checkpoint,
    save_shards,
    select_prefix,
    shard_dir,
    shard_metadata,
)
from nanorecall.settings import ConfigError, RunError, require, say

# ---- ranks -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """The ranks of one run. Without torchrun there is one, and nothing is sent."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the ranks of this machine
    backend: str = ""

    @property
    def is_main(self):
        """Is this the rank that prints and writes?"""
        return self.rank == 0

    def print0(self, *words):
        if self.is_main:
            say(*words, flush=True)

    def all_gather_object(self, value):
        """The value of every rank (anything that pickles), in order of rank, on every rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def all_gather(self, *numbers):
        """A few numbers of every rank: -> (size, n) float64, the same on every rank."""
        mine = torch.tensor([numbers], dtype=torch.float64)
        if self.size == 1:
            return mine
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(rows, mine)
        return torch.cat(rows)

    def together(self, work, first_only=False):
        """work() on every rank; what one of them raises as a sentence for the user, all raise."""
        value = problem = None
        if self.is_main or not first_only:
            try:
                value = work()
            except (ConfigError, RunError) as e:
                problem = e
        problems = self.all_gather_object(problem and (type(problem), str(problem), getattr(problem, "key", None)))
        for kind, text, key in filter(None, problems):
            raise kind(text, key) if kind is ConfigError else kind(text)
        return value

    def first_does(self, work):
        """What work() returns, or raises, on the first rank: on every rank."""
        return self.all_gather_object(self.together(work, first_only=True))[0]


SINGLE_PROCESS = World()


def init_process_group(device="auto"):
    """The World that torchrun's environment describes; connects its ranks. `device` is the setting of that name."""
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"} <= os.environ.keys():
        return SINGLE_PROCESS
    gpus = torch.cuda.is_available() and device != "cpu"
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    store, rank, size = next(dist.rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(size):
        # Started again, ranks of one machine find the store of the first start, with the addresses of processes that are gone
        # (torch 2.13). Those of many get a new one if TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, which train.slurm sets.
        store = dist.PrefixStore("start " + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(minutes=10))
    return World(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]), backend)


@contextlib.contextmanager
def process_group(device="auto"):
    """The World, for as long as this run lasts. A rank whose peers are gone ends with a sentence."""
    world = init_process_group(device)
    try:
        yield world
    except (ConfigError, RunError):
        shutdown()
        raise
    except RuntimeError as e:
        if world.size > 1 and (isinstance(e, dist.DistError) or "gloo" in str(e)):
            raise RunError("another rank has ended, so this one stops too; its own message says why") from e
        raise
    shutdown()


def shutdown():
    """End the process group. No wrapped model may outlive it: if DDP's reducer holds the last reference, it joins gloo's
    thread while it holds the GIL, which that thread needs: a deadlock (torch 2.13)."""
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def micro_batches(rows, world, accumulate):
    """The global rows of a step -> [(number of the part, its rows)] for this rank; a part may be empty if rows are few."""
    cuts = [len(rows) * i // (world.size * accumulate) for i in range(world.size * accumulate + 1)]
    mine = range(world.rank * accumulate, (world.rank + 1) * accumulate)
    return [(i, rows[cuts[i] : cuts[i + 1]]) for i in mine]


def describe_batch(batch_size, world, accumulate):
    """One line on how a global batch is split; ConfigError if it does not divide."""
    parts = world.size * accumulate
    ranks = f"{world.size} rank" + "s" * (world.size > 1)
    message = f"batch_size={batch_size} does not divide into {ranks} x {accumulate} micro-batches; a multiple of {parts} does"
    require(batch_size % parts == 0, message, "batch_size")
    return f"batch: {batch_size} = {ranks} x {accumulate} micro x {batch_size // parts} rows"


# ---- device ------------------------------------------------------------------------------------------------------------


def autodetect_device(c, world=SINGLE_PROCESS):
    """-> torch.device, compute dtype, and one line that says why. c.device, c.dtype: settings, "auto" or a name."""
    if c.device == "auto":
        mps = torch.backends.mps.is_available() and world.size == 1
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
        why = "found" if name != "cpu" else "no GPU found"
    else:
        name, why = c.device, "asked for"
    one_gpu = f"device={name!r} would put all {world.size} ranks on one GPU; use cuda"
    require(world.size == 1 or ":" not in name, one_gpu, "device")
    if world.size > 1 and name == "cuda":
        name = f"cuda:{world.local_rank}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" makes tensors, but there is nothing in them
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        hint = "start no more ranks than it has GPUs" if ":" in name and world.size > 1 else "leave it out or use cpu"
        raise ConfigError(f"device={name!r} cannot be used on this machine; {hint}", "device") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    half = c.dtype == "bfloat16" or (c.dtype == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported(False))
    dtype = torch.bfloat16 if half else torch.float32
    why_dtype = "asked for" if c.dtype != "auto" else "fast on this GPU" if half else "the exact choice"
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    ranks = f"ranks: {world.size} ({world.backend}); " if world.size > 1 else ""
    return device, dtype, f"{ranks}device: {device} ({why}{threads}), dtype: {str(dtype)[6:]} ({why_dtype})"


# ---- models ------------------------------------------------------------------------------------------------------------


DDP_OPTIONS = inspect.signature(DistributedDataParallel).parameters
BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in DDP_OPTIONS else "broadcast_buffers"  # torch 2.13 renamed it


def wrap_ddp(model, device):
    """Every rank has all of the model; gradients are summed while the backward pass goes on (Li et al. 2020)."""
    devices = [device] if device.type == "cuda" else None
    buffers = {BUFFERS: False}  # each rank's are its own: what it read of a memory, until on_step_end has summed it
    wrapped = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True, **buffers)
    wrapped.register_comm_hook(None, sum_gradients)
    return wrapped


def sum_gradients(_, bucket):
    """DDP's own hook divides by the number of ranks; the loss is weighted already."""
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda future: future.value()[0])


def wrap_fsdp(model, device):
    """Every rank keeps a share of each parameter, gradient and optimizer state; a block's weights are gathered just before
    it runs and dropped after (Zhao et al. 2023; torch.distributed.fsdp.fully_shard). Names and classes stay."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    layers = list(getattr(model, "layers", ()))
    seen = Counter(q for layer in layers for q in layer.parameters())
    alone = [layer for layer in layers if all(seen[q] == 1 for q in layer.parameters())]  # the others stay with the rest
    for module in (*alone, model):
        fully_shard(module, mesh=mesh)
        module.set_force_sum_reduction_for_comms(True)  # sums, as with DDP
        module.set_gradient_divide_factor(1.0)
    return model


PARALLEL = {"ddp": wrap_ddp, "fsdp": wrap_fsdp}


def wrap_model(model, parallel, device):
    """-> what a training step calls. Evaluation and checkpoints use the model itself. One process needs neither."""
    return PARALLEL[parallel](model, device) if dist.is_initialized() else model


def is_sharded(model):
    return isinstance(model, FSDPModule)


def sync_gradients(wrapped, now):
    """A context for one forward and backward pass: gradients are summed over the ranks in it if `now`, else they wait."""
    if is_sharded(wrapped):
        wrapped.set_requires_gradient_sync(now)
    elif isinstance(wrapped, DistributedDataParallel) and not now:
        return wrapped.no_sync()
    return contextlib.nullcontext()


def full_tensor(x):
    """A number that FSDP keeps in shares, as a plain tensor."""
    return x.full_tensor() if isinstance(x, DTensor) else x


# ---- tensors of model and optimizer, by name ---------------------------------------------------------------------------


def training_state(model, optimizer=None):
    """{"model.<name>": tensor, "optimizer.<parameter>.exp_avg": tensor, ...}; DTensors under FSDP. See checkpoint.py."""
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    if optimizer:
        for name, p in model.named_parameters():
            tensors |= {f"optimizer.{name}.{key}": t for key, t in optimizer.state.get(p, {}).items()}
    return tensors


def load_training_state(folder, state, model, optimizer=None):
    """Give model and optimizer the tensors of a checkpoint (read_checkpoint's dict), in one file or shards of any number
    of ranks; every rank takes its share."""
    sharded = "shards" in state
    saved = shard_metadata(shard_dir(folder, state)) if sharded else state["tensors"]
    sizes = {name: torch.Size(t.size if sharded else t.shape) for name, t in saved.items()}
    into = training_state(model)
    same = {name: t.shape for name, t in into.items()} == {n: size for n, size in sizes.items() if n.startswith("model.")}
    require(same, f"the checkpoint in {folder} is not of the model that its config.json describes", "resume")
    parameters = dict(model.named_parameters())
    for name in select_prefix(sizes, "optimizer") if optimizer else ():
        parameter, _, key = name.rpartition(".")
        p, size = parameters.get(parameter), sizes[f"optimizer.{name}"]
        fits = p is not None and size in (p.shape, torch.Size())
        message = f"the checkpoint in {folder} has an optimizer's {name} that fits no parameter"
        require(fits, message, "resume")
        like_p = size == p.shape and p.ndim > 0
        fresh = torch.zeros_like(p) if like_p else torch.zeros(size, device=p.device)
        into[f"optimizer.{name}"] = optimizer.state[p][key] = fresh.detach()
    with torch.no_grad():
        if sharded:
            read_shards(shard_dir(folder, state), into)
            return
        for name, t in into.items():
            source = state["tensors"][name]
            if isinstance(t, DTensor):  # each rank cuts its share from its own copy of the file: nothing is sent
                source = distribute_tensor(source.to(t.device), t.device_mesh, t.placements, src_data_rank=None)
            t.copy_(source)


def write_checkpoint(folder, name, state, tensors, sharded, world, keep_old=True):
    """Save state and tensors as <name>.pt: one file, written by the first rank, or with a shard per rank beside it. keep_old:
    an older ckpt.pt stays as ckpt_prev.pt."""
    if sharded:
        state = {**state, "shards": save_shards(folder, f"{name}-{state['step']}", tensors, world)}

    def write():
        held = {} if sharded else {"tensors": {k: t.cpu() for k, t in tensors.items()}}
        save_checkpoint(folder, name, {**state, **held}, keep_old)
        remove_old_shards(folder)

    world.first_does(write)


CHECKPOINT_FORMATS = {"file": False, "shards": True}


def convert_checkpoints(folder, form, world):
    """Rewrite the checkpoints of a run in the given form, `file` or `shards`."""
    for name in ("ckpt", "ckpt_prev", "best"):
        if os.path.exists(os.path.join(folder, name + ".pt")):
            state = load_checkpoint(folder, name)
            tensors = state.pop("tensors")
            state.pop("shards", None)
            write_checkpoint(folder, name, state, tensors, CHECKPOINT_FORMATS[form], world, keep_old=False)
            world.print0(f"rewrote {os.path.join(folder, name)}.pt, step {state['step']}, as {form}")
