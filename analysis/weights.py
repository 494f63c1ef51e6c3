"""Count, compare and convert the weights of memory models.

    python memory.py params configs/qa_2k_memory.py    # parameters, total and active per token
    python memory.py inspect runs/A runs/B             # names and shapes of weights; differences
    python memory.py convert runs/A x.pt --to memory_router
"""

import os

import torch

from nanorecall.build import build_model, build_model_config, resolve_model
from nanorecall.checkpoint import atomic_write
from nanorecall.metrics import print_table
from nanorecall.pretrained import our_name, read_weights
from nanorecall.settings import require, say, split_argv
from train import load_run, parse


def main(argv, usage):
    if not argv or argv[0] in ("-h", "--help"):
        print(usage.strip())
        return 0
    command, rest = argv[0], argv[1:]
    known = command in ("params", "inspect", "convert")
    require(known, f"{command!r} is none of params, inspect and convert", None)
    if command == "params":
        print_parameters(rest)
        return 0
    paths, settings = split_argv(rest)
    allowed = ("to",) if command == "convert" else ()
    unknown = [s.source for s in settings if s.key not in allowed]
    require(not unknown, f"{command} takes no {' '.join(unknown)}", None)
    if command == "inspect":
        compare_weights(paths)
    else:
        convert_checkpoint(paths, settings[0].value if settings else "")
    return 0


# ---- parameters ----------------------------------------------------------------------------------


def print_parameters(argv):
    """Print parameters by module: total, active per token, and FLOP and bytes of the active."""
    p = parse(argv)
    model = build_model(p, build_model_config(p, p.data_module.Data(p.data)))
    modules = {}
    for name, *numbers in count_active(model):
        module = name.rsplit(".", 1)[0] if name.endswith(("weight", "bias")) else name
        before = modules.get(module, [0, 0, 0])
        modules[module] = [a + b for a, b in zip(before, numbers)]
    bytes_per_number = 4
    rows = []
    for module, (total, active, flop) in modules.items():
        rows.append((module, total, active, flop, bytes_per_number * active))
    sums = [sum(row[i] for row in rows) for i in range(1, 5)]
    head = ("module", "parameters", "active a token", "flop a token", "bytes a token")
    print_table(head, [*rows, ("all", *sums)])


def count_active(model):
    """[(name, parameters, active parameters per token, FLOP per token)], shared parameters once.

    All sub-keys are compared with every query, so all are active. Of a table of values, heads * k
    rows are active; of an embedding, one. FLOP: a multiplication and an addition for each active
    number of a matrix, without the attention over other tokens.
    """
    c, rows = model.config, []
    for name, q in model.named_parameters():
        active = q.numel()
        flop = 2 * active if q.ndim >= 2 else 0
        if name.endswith("memory.values"):
            n_layers = len(c.memory_layers) if c.mem_share_values else 1
            active = min(q.numel(), n_layers * c.mem_heads * c.mem_knn * q.shape[1])
            flop = 2 * active
        elif name.startswith(("embed", "pos_embed")) and q is not model.lm_head.weight:
            active, flop = q.shape[1], 0
        rows.append((name, q.numel(), active, flop))
    return rows


# ---- comparison ----------------------------------------------------------------------------------


def compare_weights(paths):
    """Print names, shapes and sizes of the weights in a run or file; of two, also differences."""
    message = "name one or two runs or files: python memory.py inspect A [B]"
    require(1 <= len(paths) <= 2, message, None)
    weights = []
    for path in paths:
        weights.append({our_name(name): t for name, t in read_weights(path)[0].items()})
    rows = []
    for name in dict.fromkeys(name for of_one in weights for name in of_one):
        tensors = [of_one.get(name) for of_one in weights]
        present = [t for t in tensors if t is not None]
        shapes = [str(tuple(t.shape)) if t is not None else "-" for t in tensors]
        note = ""
        if len(paths) == 2:
            same_shape = len(present) == 2 and shapes[0] == shapes[1]
            note = max_difference(*tensors) if same_shape else shape_hint(name, *shapes)
        rows.append((name, *shapes, present[0].numel(), standard_deviation(present[0]), note))
    shape_heads = ("shape",) if len(paths) == 1 else ("shape in A", "shape in B")
    print_table(("name", *shape_heads, "numbers", "std", "largest difference"), rows)


def standard_deviation(t):
    return f"{t.double().std(correction=0):.3g}" if t.numel() else "-"


def max_difference(a, b):
    return f"{(a.double() - b.double()).abs().max():.3g}" if a.numel() else "-"


SHAPE_SETTINGS = {  # part of a parameter's name: settings that decide its shape
    "memory.values": "mem_n_keys (rows) or mem_v_dim (columns)",
    "memory.keys": "mem_heads, mem_n_keys or mem_k_dim",
    "memory.query": "mem_heads or mem_k_dim",
    "embed": "vocab_size or dim",
    "lm_head": "vocab_size or dim",
    "ffn": "dim or ffn_expand_factor",
    "att.": "n_heads, dk, dv or dim",
}


def shape_hint(name, a, b):
    """Where a parameter is missing ("-"), or which settings make its shapes differ."""
    if b == "-":
        return "only in A"
    if a == "-":
        return "only in B"
    for part, settings in SHAPE_SETTINGS.items():
        if part in name:
            return f"differ: {settings}"
    return "differ: dim"


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
    p, _, model, _ = load_run(folder, "ckpt")
    kind, kinds = p.train.model, ("memory", "memory_router")
    require(to in kinds, f"--to must be memory or memory_router, not {to!r}", None)
    message = f"{folder} holds a {kind}; only memory and memory_router can be converted"
    require(kind in kinds, message, None)
    require(kind != to, f"{folder} holds a {to} already", None)

    converted = resolve_model(to)[1](model.config)
    before, after = model.state_dict(), converted.state_dict()
    for name, t in after.items():
        if name in before:
            t.copy_(before[name])
        elif name.endswith("router.bias"):
            # softmax([-30, 30]) is [1e-26, 1] in float32.
            t.copy_(torch.tensor([-30.0, 30.0]))
        elif name.endswith("router.weight"):
            t.zero_()
    atomic_write(path, lambda f: torch.save({"model": after}, f))
    added = ", ".join(name for name in after if name not in before) or "none"
    dropped = ", ".join(name for name in before if name not in after) or "none"
    say(f"{path}: {to} with {len(after)} tensors; new: {added}; left out: {dropped}")
