"""Tensors in shards: a directory to which every rank writes its part (FSDP).

torch.distributed.checkpoint writes and reads it. Its index, .metadata, is a pickle, which could
execute anything. Here an unpickler that calls nothing reads it, and a new index is made of what it
says of tensors.
"""

import os
import pickle
import shutil
import warnings

import torch
import torch.distributed as dist

from nanorecall.files import from_system, inside, reading, sha256_file, size_of_file
from nanorecall.settings import ConfigError, RunError
from nanorecall.tensors import DTYPES, unreadable

# torch.distributed.checkpoint takes a second to import, so the functions that need it import it.

# ---- writing -------------------------------------------------------------------------------------


def save_shards(folder, label, tensors, world):
    """Every rank writes its shards of the tensors (DTensors, too) into <folder>/shards/<label>.

    -> {"folder", "files": {name: SHA-256}}. They are valid once a checkpoint is saved that holds
    this value.
    """
    import torch.distributed.checkpoint as dcp

    with world.agree():
        if world.is_main:
            label = unused_name(folder, label)
    label = world.broadcast(label)
    directory = os.path.join(folder, "shards", label)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that there is one process
            dcp.save(tensors, checkpoint_id=directory, no_dist=not dist.is_initialized())
    except (OSError, dcp.CheckpointException) as e:  # on all ranks, once all have stopped writing
        if world.is_main:
            shutil.rmtree(directory, ignore_errors=True)
        why = str(e).splitlines()[-1]
        message = f"cannot write {directory} ({why}); the checkpoints before it are whole"
        raise RunError(message) from None
    mine = {}
    for file in os.listdir(directory):
        if file.startswith(f"__{world.rank}_") or (world.is_main and file == ".metadata"):
            mine[file] = sha256_file(os.path.join(directory, file))
    files = {}
    for sums in world.all_gather_object(mine):
        files |= sums
    return {"folder": label, "files": files}


def unused_name(folder, label):
    """label, or label-N if it exists: shards that are there may be in use, or half written."""
    name, n = label, 0
    while os.path.exists(os.path.join(folder, "shards", name)):
        n += 1
        name = f"{label}-{n}"
    return name


# ---- reading -------------------------------------------------------------------------------------


def shard_dir(folder, state):
    """The directory with the shards of a checkpoint of a run."""
    return inside(os.path.join(folder, "shards"), state["shards"]["folder"])


def shard_metadata(directory):
    """{name: shape and type} of the tensors in a directory of torch.distributed.checkpoint."""
    return read_index(directory).state_dict_metadata


def read_shards(directory, into=None):
    """Fill the tensors of `into` {name: tensor or DTensor} from shards, of any number of ranks.

    into=None: read all tensors, whole. -> into
    ConfigError if they are not such shards; RunError if the disk or memory refuses.
    """
    import torch.distributed.checkpoint as dcp

    alone = not dist.is_initialized()
    with reading(directory):
        try:
            index = read_index(directory)
            if into is None:
                about = index.state_dict_metadata
                into = {n: torch.empty(m.size, dtype=m.properties.dtype) for n, m in about.items()}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that there is one process
                dcp.load(into, **tensor_reader(directory, index), no_dist=alone)
        # CheckpointException is no Exception.
        except (Exception, dcp.CheckpointException) as e:
            cause = first_error(e)
            if isinstance(cause, (ConfigError, RunError)) or from_system(cause):
                raise cause from None
            raise unreadable(directory, cause) from None
    return into


def first_error(error):
    """The error itself; of a CheckpointException, the error of the first rank that failed."""
    failures = getattr(error, "failures", {})  # rank: (its error, its traceback)
    return next(iter(failures.values()))[0] if failures else error


def tensor_reader(directory, index):
    """Arguments of dcp.load that read tensors alone, by an index that was checked.

    torch's own reader and planner would execute what they find in the index or in anything else.
    """
    import torch.distributed.checkpoint as dcp

    class TensorReader(dcp.FileSystemReader):
        def read_metadata(self, *args, **kwargs):
            return index

    class TensorPlanner(dcp.DefaultLoadPlanner):
        def load_bytes(self, read_item, value):
            raise ConfigError("only tensors are read from shards")

    return {"storage_reader": TensorReader(directory), "planner": TensorPlanner()}


# ---- the index -----------------------------------------------------------------------------------


def read_index(directory):
    """A new index of what the index of a torch.distributed.checkpoint directory says of tensors.

    Other entries are left out. ConfigError if it does not fit the files of the directory.
    """
    from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

    path = os.path.join(directory, ".metadata")
    with reading(path):
        try:
            with open(path, "rb") as f:
                found = fields_of(RestrictedUnpickler(f).load(), "Metadata")
            tensors = {}
            for name, about in found["state_dict_metadata"].items():
                if type(about).__name__ == "TensorStorageMetadata":
                    tensors[name] = describe_tensor(about)
            storage = {}  # which part of a tensor: where it is
            for entry in found["storage_data"].items():
                index, info = find_chunk(*entry)
                if index.fqn in tensors:
                    storage[index] = info
            files = {info.relative_path for info in storage.values()}
            held = sum(size_of_file(inside(directory, file)) for file in files)
            need = sum(t.size.numel() * t.properties.dtype.itemsize for t in tensors.values())
            if need > held:
                raise ValueError(f"it says {need} bytes, its files have {held}")
        except FileNotFoundError as e:
            raise ConfigError(f"{e.filename} is missing") from None
        except (OSError, MemoryError, ConfigError):
            raise
        except Exception as e:  # a pickle of anything
            raise unreadable(directory, e) from None
    return Metadata(tensors, storage_data=storage, storage_meta=StorageMeta())


def fields_of(stub, kind):
    """{field: value} of one of torch's objects in the index; ValueError if it is another kind."""
    if type(stub).__name__ != kind or not isinstance(stub.state, dict):
        raise ValueError(f"it has no {kind} there")
    return stub.state


def describe_tensor(stub):
    """TensorStorageMetadata of the index -> torch's own; ValueError unless its chunks fill it."""
    from torch.distributed.checkpoint import metadata

    about = fields_of(stub, "TensorStorageMetadata")
    size, dtype = about["size"], about["properties"].state[0]
    if type(size) is not torch.Size or dtype not in DTYPES:
        raise ValueError("a tensor without shape or type")
    chunks = []
    for chunk in about["chunks"]:
        part = fields_of(chunk, "ChunkStorageMetadata")
        begin, extent = torch.Size(part["offsets"]), torch.Size(part["sizes"])
        edges = zip(begin, extent, size)
        fits = len(begin) == len(extent) == len(size)
        if not fits or any(a < 0 or n < 0 or a + n > whole for a, n, whole in edges):
            raise ValueError("a part outside its tensor")
        chunks.append(metadata.ChunkStorageMetadata(begin, extent))
    if sum(chunk.sizes.numel() for chunk in chunks) != size.numel():
        raise ValueError("a tensor that its parts do not fill")
    return metadata.TensorStorageMetadata(metadata.TensorProperties(dtype), size, chunks)


def find_chunk(index, info):
    """An entry of the index, where a part of a tensor is -> the same in torch's own classes."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import MetadataIndex

    index, info = fields_of(index, "MetadataIndex"), fields_of(info, "_StorageInfo")
    numbers = info["offset"], info["length"]
    if type(index["fqn"]) is not str or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError("a part without an offset and a length")
    if info.get("transform_descriptors"):
        raise ValueError("its files are compressed")
    key = MetadataIndex(index["fqn"], index.get("offset"))
    return key, _StorageInfo(info["relative_path"], *numbers)


class Stub:
    """Stands in for a class of torch in the index: it keeps an object's state and does nothing."""

    state = None

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        self.state = state


# Python's own unpickler, because a few bytes make the one in C fill all memory.
class RestrictedUnpickler(pickle._Unpickler):
    """Reads the index, a pickle, and calls nothing in it.

    An object of torch becomes a Stub of the same name.
    """

    VALUES = {"Size", *(str(kind).removeprefix("torch.") for kind in DTYPES)}
    KINDS = {
        "torch.distributed.checkpoint.metadata": {
            *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata"),
            *("ChunkStorageMetadata", "TensorProperties", "BytesStorageMetadata"),
            "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "pathlib": {"PosixPath"},
    }

    def find_class(self, module, name):
        if module == "torch" and name in self.VALUES:
            return getattr(torch, name)
        if name not in self.KINDS.get(module, ()):
            message = f"{module}.{name} has no place in the index of a checkpoint"
            raise pickle.UnpicklingError(message)
        return type(name, (Stub,), {})
