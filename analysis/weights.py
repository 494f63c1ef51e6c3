"""Count, compare and convert the weights of memory models.

python memory.py params configs/qa_2k_memory.py    # parameters, active ones, bytes, by block
python memory.py params runs/RUN                   # and how sparse its activations are
python memory.py inspect runs/A runs/B             # names and shapes of weights; differences
python memory.py inspect --trace runs/A runs/B     # the same of activations, module by module
python memory.py convert runs/A x.pt --to memory_router
"""

import os

import numpy as np
import torch

from analysis.activation_shapes import print_activations
from analysis.sparsity import print_sparsity
from nanorecall.build import build_model, build_model_config, resolve_model
from nanorecall.files import atomic_write
from nanorecall.metrics import print_table
from nanorecall.pretrained import freeze, our_name, read_weights
from nanorecall.settings import require, say, split_argv
from train import load_run
from train import parse as parse_training


def main(argv, usage):
    if not argv or argv[0] in ("-h", "--help"):
        print(usage.strip())
        return 0
    command, arguments = parse(argv)
    command(*arguments)
    return 0


def parse(argv):
    """Command line -> function, its arguments."""
    command, rest = argv[0], argv[1:]
    known = command in ("params", "inspect", "convert")
    require(known, f"{command!r} is none of params, inspect and convert", None)
    if command == "params" and len(rest) == 1 and os.path.isdir(rest[0]):
        return print_run, (rest[0],)
    if command == "params":
        return print_config, (parse_training(rest),)
    is_traced = command == "inspect" and "--trace" in rest
    if is_traced:
        # Otherwise split_argv would take the path after it for its value.
        rest = [word for word in rest if word != "--trace"]
    paths, settings = split_argv(rest)
    for setting in settings:
        is_known = command == "convert" and setting.key == "to"
        message = f"{command} takes no {setting.source}; name runs and files without a flag"
        require(is_known, message, None)
    if is_traced:
        return print_activations, (paths,)
    if command == "inspect":
        return compare_weights, (paths,)
    return convert_checkpoint, (paths, settings[-1].value if settings else "")


# ---- parameters ----------------------------------------------------------------------------------

BYTES_PER_NUMBER = 4  # float32


def print_config(settings):
    """Print the parameters of a new model. settings: what train.parse returns."""
    data = settings.data_module.Data(settings.data)
    print_parameters(build_model(settings, build_model_config(settings, data)), settings)


def print_run(folder):
    """Print the parameters of a trained run, and how sparse its activations are."""
    settings, data, model, _ = load_run(folder, "ckpt")
    print_parameters(model, settings)
    print_sparsity(model, data)


def print_parameters(model, settings):
    """Print parameters by module and by block: total and active per token; FLOP and bytes."""
    if settings.train.freeze:
        say(freeze(model, settings.train.freeze))
    modules, blocks = {}, {}
    for name, *numbers in count_active(model):
        module = name.rsplit(".", 1)[0] if name.endswith(("weight", "bias")) else name
        block = name.split(".")[1] if name.startswith("layers.") else "others"
        numbers = np.array([*numbers, training_bytes(model, name)])
        modules[module] = modules.get(module, 0) + numbers
        blocks[block] = blocks.get(block, 0) + numbers
    modules["all"] = sum(modules.values())
    total, active, _, in_training = modules["all"]
    weights, with_moments = BYTES_PER_NUMBER * total / 1e6, in_training / 1e6
    say(f"{active / total:.1%} of {total} parameters are active for a token")
    say(f"{weights:.3g} MB of weights; {with_moments:.3g} MB with gradients and AdamW's moments\n")
    lines = []
    for module, (total, active, flop, in_training) in modules.items():
        lines.append((module, total, active, flop, BYTES_PER_NUMBER * active, in_training))
    head = ("module", "parameters", "active a token", "flop a token", "bytes a token")
    print_table((*head, "bytes in training"), lines)
    lines = []
    for block, (total, active, *_) in blocks.items():
        lines.append((block, total, active, f"{active / total:.1%}"))
    print()
    print_table(("block", "parameters", "active a token", "share"), lines)


def training_bytes(model, name):
    """Bytes of a parameter in training: weight, gradient, two moments; if frozen, the weight."""
    q = model.get_parameter(name)
    sparse = model.sparse_gradients() if hasattr(model, "sparse_gradients") else []
    copies = 4 if q.requires_grad else 1
    if q.requires_grad and name.endswith(tuple(sparse)):
        # Its gradient has only the rows that a step reads.
        copies = 3
    return copies * BYTES_PER_NUMBER * q.numel()


def count_active(model):
    """[(name, parameters, active parameters per token, FLOP per token)], shared parameters once.

    All sub-keys are compared with every query, so all are active. Of a table of values, heads * k
    rows are active; of an embedding, one. FLOP: a multiplication and an addition for each active
    number of a matrix, without the attention over other tokens.
    """
    c, counts = model.config, []
    for name, q in model.named_parameters():
        active = q.numel()
        flop = 2 * active if q.ndim >= 2 else 0
        if name.endswith("memory.values"):
            n_layers = len(c.memory_layers) if c.mem_share_values else 1
            active = min(q.numel(), n_layers * c.mem_heads * c.mem_knn * q.shape[1])
            flop = 2 * active
        elif name.startswith(("embed", "pos_embed")) and q is not model.lm_head.weight:
            active, flop = q.shape[1], 0
        counts.append((name, q.numel(), active, flop))
    return counts


# ---- comparison ----------------------------------------------------------------------------------


def compare_weights(paths):
    """Print names, shapes and sizes of the weights in a run or file; of two, also differences."""
    message = "name one or two runs or files: python memory.py inspect A [B]"
    require(1 <= len(paths) <= 2, message, None)
    weights = [read_named_weights(path) for path in paths]
    a, b = weights[0], weights[-1]
    lines = []
    for name in a | b:
        shapes = [shape_of(tensors.get(name)) for tensors in weights]
        tensor = a[name] if name in a else b[name]
        note = ""
        if len(weights) == 2:
            note = compare_tensors(name, a.get(name), b.get(name))
        lines.append((name, *shapes, tensor.numel(), standard_deviation(tensor), note))
    shape_heads = ("shape",) if len(weights) == 1 else ("shape in A", "shape in B")
    print_table(("name", *shape_heads, "numbers", "std", "largest difference"), lines)


def read_named_weights(path):
    """Weights on disk -> {our name: tensor}"""
    tensors, _ = read_weights(path)
    return {our_name(name): tensor for name, tensor in tensors.items()}


def shape_of(tensor):
    return "-" if tensor is None else str(tuple(tensor.shape))


def compare_tensors(name, a, b):
    """The largest difference of two tensors, or why they have none. None: not in that model."""
    if a is None:
        return "only in B"
    if b is None:
        return "only in A"
    if a.shape == b.shape:
        return f"{(a.double() - b.double()).abs().max():.3g}" if a.numel() else "-"
    for part, settings in SHAPE_SETTINGS.items():
        if part in name:
            return f"differ: {settings}"
    return "differ: dim"


def standard_deviation(t):
    return f"{t.double().std(correction=0):.3g}" if t.numel() else "-"


SHAPE_SETTINGS = {  # part of a parameter's name: settings that decide its shape
    "memory.values": "mem_n_keys (rows) or mem_v_dim (columns)",
    "memory.keys": "mem_heads, mem_n_keys or mem_k_dim",
    "memory.query": "mem_heads or mem_k_dim",
    "embed": "vocab_size or dim",
    "lm_head": "vocab_size or dim",
    "ffn": "dim or ffn_expand_factor",
    "att.": "n_heads, dk, dv or dim",
}


# ---- conversion ----------------------------------------------------------------------------------


def convert_checkpoint(args, to):
    """Write the weights of a run as those of the other kind of memory model, for --init_from.

    memory to memory_router: MLPs and routers are added; the model answers as before, because the
    routers choose memory with a probability of almost 1. memory_router to memory: MLPs beside
    memory layers are dropped, so the model must be trained further.
    """
    message = "name a run and the file to write: python memory.py convert runs/RUN x.pt"
    require(len(args) == 2, f"{message} --to memory_router", None)
    folder, path = args
    message = f"{path} exists already; name another file or delete it first"
    require(not os.path.exists(path), message, None)
    settings, _, model, _ = load_run(folder, "ckpt")
    kind = settings.train.model
    kinds = ("memory", "memory_router")
    require(to in kinds, f"--to must be memory or memory_router, not {to!r}", None)
    message = f"{folder} holds a {kind}; only memory and memory_router can be converted"
    require(kind in kinds, message, None)
    require(kind != to, f"{folder} holds a {to} already", None)

    _, model_class = resolve_model(to)
    before = model.state_dict()
    after = model_class(model.config).state_dict()
    for name, t in after.items():
        if name in before:
            t.copy_(before[name])
        elif name.endswith("router.bias"):
            # Choose memory: softmax([-30, 30]) is [1e-26, 1] in float32.
            t.copy_(torch.tensor([-30.0, 30.0]))
        elif name.endswith("router.weight"):
            t.zero_()
    atomic_write(path, lambda f: torch.save({"model": after}, f))
    added = ", ".join(name for name in after if name not in before) or "none"
    dropped = ", ".join(name for name in before if name not in after) or "none"
    say(f"{path}: {to} with {len(after)} tensors; new: {added}; left out: {dropped}")
