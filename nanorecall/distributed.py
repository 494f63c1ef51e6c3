"""One run on several processes: what torchrun's ranks exchange, and how a model is split over them.

    torchrun --standalone --nproc_per_node=4 train.py configs/mqar_gpt.py                  # DDP
    torchrun --standalone --nproc_per_node=4 train.py configs/mqar_gpt.py --parallel=fsdp  # FSDP2
    sbatch train.slurm configs/mqar_gpt.py                                 # one or many nodes

With DDP every rank holds the whole model, with FSDP2 a shard of each tensor. A table of values may
be split by columns instead, also while it is in use (shard_columns). Gradients are summed
over the ranks, not averaged, because each rank has already divided its loss by the number of labels
in the global batch. Numbers on which the ranks must agree (labels in the batch, has any rank caught
a signal) are exchanged on the CPU by `World.all_gather`.
"""

import contextlib
import gc
import inspect
import os
import time
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from nanorecall.ops import sparse_rows
from nanorecall.settings import ConfigError, RunError, require, say
from nanorecall.sparse import coalesce

# FSDP2 (torch.distributed.fsdp) and DTensor (torch.distributed.tensor) take a second to import, so
# they are imported where they are used.

# ---- ranks ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """The ranks of one run. Without torchrun there is one rank, and nothing is sent."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the ranks of this machine
    backend: str = ""

    @property
    def is_main(self):
        """Is this the rank that prints and writes?"""
        return self.rank == 0

    def print0(self, *values):
        if self.is_main:
            say(*values, flush=True)

    def all_gather_object(self, value):
        """Collect a value (anything that pickles) from every rank -> list in order of rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value):
        """The main rank's value, on every rank."""
        return self.all_gather_object(value)[0]

    def gather_in_order(self, mine):
        """mine: this rank's items, numbers rank, rank + size, ... of a list -> the whole list."""
        of_ranks = self.all_gather_object(mine)
        n_items = sum(map(len, of_ranks))
        return [of_ranks[i % self.size][i // self.size] for i in range(n_items)]

    def shared_map(self, function, items):
        """function(item) of each item, in their order: ranks share the work, and each gets all."""
        return self.gather_in_order([function(item) for item in items[self.rank :: self.size]])

    def all_gather(self, *numbers):
        """Collect a few numbers from every rank -> (size, n) float64, the same on every rank."""
        mine = torch.tensor([numbers], dtype=torch.float64)
        if self.size == 1:
            return mine
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(rows, mine)
        return torch.cat(rows)

    @contextlib.contextmanager
    def agree(self):
        """If one rank raises ConfigError or RunError in the block, all ranks raise it after.

        Without it the other ranks would wait for the one that has failed. A rank that fails sends
        nothing, so the block must hold no collective call.
        """
        problem = None
        try:
            yield
        except (ConfigError, RunError) as e:
            problem = type(e), str(e), getattr(e, "key", None)
        for of_rank in self.all_gather_object(problem):
            if of_rank:
                kind, message, key = of_rank
                raise kind(message, key) if kind is ConfigError else kind(message)


SINGLE_PROCESS = World()


def init_process_group(device="auto"):
    """Connect the ranks that torchrun's environment describes -> World. device: that setting."""
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"} <= os.environ.keys():
        return SINGLE_PROCESS
    has_gpus = torch.cuda.is_available() and device != "cpu"
    backend = "cpu:gloo,cuda:nccl" if has_gpus else "gloo"
    store, rank, size = next(dist.rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(size):
        # After a restart, ranks of one machine find the store of the first start, which holds the
        # addresses of dead processes (torch 2.13); a prefix per start hides them. Ranks of several
        # machines get a new store if TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 (set by train.slurm).
        prefix = "start " + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(prefix, store)
    timeout = timedelta(minutes=10)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    local_rank = int(os.environ["LOCAL_RANK"])
    return World(dist.get_rank(), dist.get_world_size(), local_rank, backend)


@contextlib.contextmanager
def process_group(device="auto"):
    """The World, for the duration of a run. A rank that has lost the others raises RunError."""
    world = init_process_group(device)
    try:
        yield world
    except (ConfigError, RunError):
        # nccl would wait for the other ranks, which may wait for this one: its message would be
        # printed after ten minutes. gloo does not wait.
        if "nccl" not in world.backend:
            shutdown()
        raise
    except RuntimeError as e:
        if has_lost_rank(world, e):
            raise RunError(lost_rank(e)) from e
        raise
    shutdown()


LOST_RANK = "another rank has ended, so this one stops too; its own message says why"


def lost_rank(error):
    """LOST_RANK, and what nccl says: a network that is set up wrong ends all ranks alike."""
    lines = [line for line in str(error).splitlines() if "NCCL" in line]
    return f"{LOST_RANK} ({lines[0].strip()})" if lines else LOST_RANK


def has_lost_rank(world, error):
    """Does this error say that another rank is gone?"""
    is_of_ranks = isinstance(error, dist.DistError) or "gloo" in str(error)
    return world.size > 1 and isinstance(error, RuntimeError) and is_of_ranks


def shutdown():
    """End the process group.

    No DDP model may outlive it: if its reducer holds the last reference to the group, it joins
    gloo's thread while it holds the GIL, which that thread needs: a deadlock (torch 2.13).
    """
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def micro_batches(indices, world, grad_accum_steps):
    """Split the global batch of a step over ranks and micro-batches.

    indices: the examples of the step -> [(number of the micro-batch, its indices)] for this rank.
    A micro-batch is empty if there are fewer examples than micro-batches.
    """
    count = world.size * grad_accum_steps
    first = world.rank * grad_accum_steps
    mine = []
    for i in range(first, first + grad_accum_steps):
        start, end = len(indices) * i // count, len(indices) * (i + 1) // count
        mine.append((i, indices[start:end]))
    return mine


def describe_batch(batch_size, world, grad_accum_steps):
    """One line on how a global batch is split; ConfigError if it does not divide."""
    count = world.size * grad_accum_steps
    ranks = "1 rank" if world.size == 1 else f"{world.size} ranks"
    split = f"{ranks} x {grad_accum_steps} micro-batches; a multiple of {count} does"
    message = f"batch_size={batch_size} does not divide into {split}"
    require(batch_size % count == 0, message, "batch_size")
    each = batch_size // count
    return f"batch: {batch_size} = {ranks} x {grad_accum_steps} micro-batches x {each} sequences"


# ---- device --------------------------------------------------------------------------------------


def autodetect_device(c, world=SINGLE_PROCESS, why_dtype="asked for"):
    """-> torch.device, compute dtype, and one line on why. c.device, c.dtype: "auto" or a name.

    why_dtype: where a dtype that is not "auto" comes from.
    """
    if c.device != "auto":
        name, why = c.device, "asked for"
    elif torch.cuda.is_available():
        name, why = "cuda", "found"
    elif torch.backends.mps.is_available() and world.size == 1:
        name, why = "mps", "found"
    else:
        name, why = "cpu", "no GPU found"
    message = f"device={name!r} would put all {world.size} ranks on one GPU; use cuda"
    require(world.size == 1 or ":" not in name, message, "device")
    if name == "cuda":
        # set_device refuses a device without a number
        name = f"cuda:{world.local_rank}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" makes tensors, but they hold no numbers
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as e:
        reason = f"{e}".splitlines()[0] if str(e) else type(e).__name__
        if is_out_of_memory(e):  # another program has it, and may end
            raise RunError(f"device={name!r} has no free memory ({reason})") from None
        hint = "use --device cpu" if c.device == "auto" else "leave it out or use cpu"
        if ":" in name and world.size > 1:
            hint = "start no more ranks than it has GPUs"
        message = f"device={name!r} cannot be used on this machine; {hint} ({reason})"
        raise ConfigError(message, "device") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # Some systems set TF32 for all programs: products with 10 of the 23 bits of a fraction.
        torch.set_float32_matmul_precision("highest")
    # States that decay are full of numbers below 1e-38, for which a CPU takes many times as long.
    # Here they become 0, in this thread and in those that it starts from now on.
    torch.set_flush_denormal(True)
    dtype, why_dtype = autodetect_dtype(c.dtype, device, why_dtype)
    ranks = f"ranks: {world.size} ({world.backend}); " if world.size > 1 else ""
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    dtype_name = str(dtype).removeprefix("torch.")
    line = f"{ranks}device: {device} ({why}{threads}), dtype: {dtype_name} ({why_dtype})"
    return device, dtype, line


def is_out_of_memory(error):
    """Does this error of torch, numpy or Python mean that memory is full?"""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # As a CPU, CUDA and cuBLAS say it.
    texts = ("allocate memory", "out of memory", "ALLOC_FAILED")
    return any(text in str(error) for text in texts)


def now(device):
    """Seconds, once the device has done all that it was given: a GPU works behind our back."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def autodetect_dtype(name, device, why):
    """The setting dtype on this device -> compute dtype, and why.

    why: the reason for a name that is not "auto".
    """
    if name == "bfloat16":
        return torch.bfloat16, why
    if name != "auto":
        return torch.float32, why
    if device.type == "cuda" and torch.cuda.is_bf16_supported(False):
        return torch.bfloat16, "fast on this GPU"
    return torch.float32, "default"


# ---- models --------------------------------------------------------------------------------------


def wrap_ddp(model, device):
    """Every rank has the whole model; gradients are summed during backward (Li et al. 2020)."""
    options = inspect.signature(DistributedDataParallel).parameters
    # Buffers are not synchronized: each rank counts its own reads of a memory, and on_step_end sums
    # them. torch 2.13 renamed the option.
    sync_buffers = "broadcast_buffers"
    if "forward_sync_buffers" in options:
        sync_buffers = "forward_sync_buffers"
    sparse = sparse_parameters(model)
    for parameter in dict.fromkeys(sparse.values()):
        dist.broadcast(parameter.detach(), src=0)  # as DDP does with all that it does not ignore
    ignored = sparse | column_sharded_parameters(model)
    if ignored:
        # DDP cannot sum sparse gradients (see sum_sparse_gradients), and those of columns need no
        # sum. torch documents this method although its name is private.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(ignored))
        trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
        if trained <= set(ignored.values()):
            return model  # DDP refuses to do nothing
    ddp_model = DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **{sync_buffers: False},
    )
    ddp_model.register_comm_hook(None, sum_gradients)
    return ddp_model


def sum_gradients(_, bucket):
    """Sum a bucket of gradients. DDP's own hook would divide by the number of ranks as well."""
    summed = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return summed.then(lambda future: future.value()[0])


def wrap_fsdp(model, device):
    """Shard each parameter, gradient and optimizer state over the ranks (Zhao et al. 2023).

    A block's weights are gathered just before it runs and freed after. Parameter names and classes
    stay as they are (torch.distributed.fsdp.fully_shard).
    """
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    ignored = set(column_sharded_parameters(model).values())
    layers = list(getattr(model, "layers", ()))
    users = Counter()
    for layer in layers:
        users.update(set(layer.parameters()) - ignored)
    units = []
    for layer in layers:
        # A parameter that layers share must stay gathered over all of them, so it goes with the
        # rest of the model.
        if all(users[q] <= 1 for q in layer.parameters()):
            units.append(layer)
    for module in (*units, model):
        fully_shard(module, mesh=mesh, ignored_params=ignored)
        module.set_force_sum_reduction_for_comms(True)  # sums, as with DDP
        module.set_gradient_divide_factor(1.0)
    return model


PARALLEL = {"ddp": wrap_ddp, "fsdp": wrap_fsdp}


def will_shard(parallel):
    """Will wrap_model keep a part of each parameter on each rank?"""
    return parallel == "fsdp" and dist.is_initialized()


def wrap_model(model, parallel, device):
    """The model as a training step calls it; evaluation and checkpoints use the model itself."""
    return PARALLEL[parallel](model, device) if dist.is_initialized() else model


def unsharded_notes(model, parallel, world):
    """Sentences about settings that shard something, where one process keeps everything."""
    if world.size > 1:
        return []
    names = ["parallel=fsdp"] if parallel == "fsdp" else []
    names += ["mem_shard_values=1"] if column_sharded_parameters(model) else []
    return [f"note: {name} shards nothing on one process; start it with torchrun" for name in names]


def shard_columns(model, device):
    """Keep this rank's columns of the parameters that the model's column_sharded() names.

    Each becomes a DTensor on `device`, so optimizer and checkpoints know that it is a part.
    """
    named = column_sharded_parameters(model)
    if not named or not dist.is_initialized():
        return
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    parts = {}
    for name, whole in named.items():
        if whole not in parts:
            part = whole.detach().chunk(mesh.size(), dim=1)[mesh.get_local_rank()]
            # A copy, or the whole table would stay in memory.
            part = part.clone(memory_format=torch.contiguous_format).to(device)
            part = DTensor.from_local(part, mesh, [Shard(1)])
            parts[whole] = torch.nn.Parameter(part, requires_grad=whole.requires_grad)
        module, _, last = name.rpartition(".")
        setattr(model.get_submodule(module), last, parts[whole])


def is_sharded(model):
    """Has wrap_fsdp sharded the model?"""
    return hasattr(model, "set_requires_gradient_sync")


def sync_gradients(model, enabled):
    """Context of a forward and backward pass: sum gradients over the ranks now, or only add up."""
    if is_sharded(model):
        model.set_requires_gradient_sync(enabled)
    elif isinstance(model, DistributedDataParallel) and not enabled:
        return model.no_sync()
    return contextlib.nullcontext()


def check_parallel(model, parallel, world):
    """ConfigError if the model cannot be trained by this entry of PARALLEL on the world's ranks."""
    for name, parameter in column_sharded_parameters(model).items():
        columns = parameter.shape[1]
        message = f"mem_shard_values=1: the {columns} columns of {name} do not divide by the"
        message += f" {world.size} ranks; change mem_v_dim"
        require(columns % world.size == 0, message, "mem_shard_values")
    message = "parallel=fsdp takes no sparse gradients: set mem_sparse_grad=0 or parallel=ddp"
    require(parallel != "fsdp" or not sparse_parameters(model), message, "parallel")


# ---- gradients -----------------------------------------------------------------------------------


def named_by(model, method):
    """The parameters whose names end as this method of the model says -> {name: parameter}.

    {} if the model lacks the method. A shared parameter has several names.
    """
    ends = tuple(getattr(model, method)()) if hasattr(model, method) else ()
    named = model.named_parameters(remove_duplicate=False)
    return {name: parameter for name, parameter in named if name.endswith(ends)}


def sparse_parameters(model):
    """{name: parameter} of all that get sparse gradients."""
    named = named_by(model, "sparse_gradients")
    return {name: parameter for name, parameter in named.items() if parameter.requires_grad}


def column_sharded_parameters(model):
    """{name: parameter} of all that are split by columns (see shard_columns), or will be."""
    return named_by(model, "column_sharded")


def sum_sparse_gradients(model, world):
    """Sum sparse gradients over the ranks: each gathers the rows of all, with the same result."""
    if world.size == 1:
        return
    for parameter in model.parameters():
        if parameter.grad is not None and parameter.grad.is_sparse:
            grad = coalesce(parameter.grad)
            rows = gather_rows(grad.indices()[0], world)
            values = gather_rows(grad.values(), world)
            parameter.grad = sparse_rows(rows, values, grad.shape).coalesce()


def gather_rows(x, world):
    """x (n, ...) of every rank, each with its own n -> (sum of n, ...), in order of rank."""
    counts = world.all_gather(len(x)).long().flatten().tolist()
    # all_gather takes tensors of one shape.
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, counts)])


@torch.no_grad()
def clip_gradients(parameters, max_norm):
    """Scale all gradients so that their norm is at most max_norm -> their norm before, a scalar.

    The norm is that of all numbers together, over all parameters and ranks.
    """
    parameters = [p for p in parameters if p.grad is not None]
    groups = {}  # gradients by how they are split over the ranks
    for p in parameters:
        if p.grad.is_sparse:
            p.grad = coalesce(p.grad)
        grad = p.grad
        placement = "sparse" if grad.is_sparse else getattr(grad, "placements", None)
        groups.setdefault(placement, []).append(grad.values() if grad.is_sparse else grad)
    if len(groups) <= 1 and "sparse" not in groups:
        # With FSDP each rank has a part of the norm.
        return full_tensor(torch.nn.utils.clip_grad_norm_(parameters, max_norm))
    norms = [full_tensor(torch.nn.utils.get_total_norm(grads)) for grads in groups.values()]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for grads in groups.values():
        for grad in grads:
            local_tensor(grad).mul_(scale)
    return norm


# ---- tensors in shards ---------------------------------------------------------------------------


def full_tensor(x):
    """A DTensor of FSDP as a plain tensor; a plain tensor as it is."""
    return x.full_tensor() if is_dtensor(x) else x


def local_tensor(x):
    """The part of a DTensor that this rank has; a plain tensor as it is."""
    return x.to_local() if is_dtensor(x) else x


def is_dtensor(x):
    return hasattr(x, "full_tensor")


def all_finite(model, world):
    """Are all parameters finite numbers, on every rank?"""
    bad = 0
    for q in model.parameters():
        local = local_tensor(q)
        if local.numel() > 0:  # a rank may hold no part of a small tensor
            # torch.isfinite would take ten times as long, and 7 bytes more for each number.
            ends = torch.stack(torch.aminmax(local.detach()))  # NaN if there is one anywhere
            bad += not bool(torch.isfinite(ends).all())
    return not world.all_gather(bad).any()
