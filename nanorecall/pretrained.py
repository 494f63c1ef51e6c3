"""Weights from one model into another, and weights held still.

    python train.py configs/qa_2k_memory.py --freeze "*.att"                      # attention keeps its first weights
    python train.py configs/qa_10k_memory.py --init_from runs/RUN                 # all weights of another run's
    python train.py ... --init_from runs/RUN --init_map '{"0-5": "0-5", "6": "10"}'                   # blocks by number
    python train.py ... --init_from runs/RUN --init_map '{"layers.0.ffn.*": "layers.1.ffn.*"}'        # by name or pattern

Both take the forms of LLMonade's experiments and pipeline: names with or without "model." before them, its names of parts
(attn, mlp, k_proj), the JSON dict {pattern: "freeze"}, and {"layer_mappings": ..., "component_mappings": ...}.
A pattern that matches nothing is an error, not silence. The order is: build, load, freeze, wrap, make the optimizer.
"""

import difflib
import fnmatch
import glob
import os
import re
import zipfile

import torch

from nanorecall.checkpoint import load_checkpoint, plain_tensors, read_shards, reading, select_prefix, unreadable
from nanorecall.settings import ConfigError, require

PARTS = {  # LLMonade's names of parts: ours
    "attn": "att",
    "mlp": "ffn",
    "q_proj": "proj_q",
    "k_proj": "proj_k",
    "v_proj": "proj_v",
    "o_proj": "out_proj",
    "memory_retrieval": "memory",
    "memory_unlocking": "memory",
}

# ---- patterns ----------------------------------------------------------------------------------------------------------


def ours(name):
    """A name or pattern in this project's words: without "model.", and with our names of parts."""
    return ".".join(PARTS.get(word, word) for word in name.removeprefix("model.").split("."))


def matching(pattern, names):
    """The names that a pattern means: that very one, all under it ("layers.0", "layers.0."), or by stars ("*.memory.keys")."""
    p = pattern.rstrip(".")
    return [n for n in names if n == p or any(fnmatch.fnmatchcase(n, end) for end in (p, p + ".*"))]


def nearest(pattern, names):
    """A few names like the pattern, as text for an error."""
    found = difflib.get_close_matches(pattern.strip("*."), names, n=3, cutoff=0.3)
    return ", ".join(found or list(names)[:3])


# ---- freezing ----------------------------------------------------------------------------------------------------------


def freeze(model, patterns):
    """Hold still what patterns name -> one line about it. They are text (with commas), a list, or {pattern: "freeze"}.

    ConfigError for a pattern that matches no parameter, and if nothing is left to train.
    """
    if isinstance(patterns, dict):
        wrong = [f"{k!r}: {v!r}" for k, v in patterns.items() if v != "freeze"]
        require(not wrong, f'freeze takes {{pattern: "freeze"}}, not {{{", ".join(wrong)}}}', "freeze")
    patterns = [p.strip() for p in patterns.split(",")] if isinstance(patterns, str) else list(patterns)
    named = dict(model.named_parameters(remove_duplicate=False))
    frozen = set()
    for pattern in patterns:
        require(isinstance(pattern, str) and pattern, f"freeze needs names or patterns, not {pattern!r}", "freeze")
        found = matching(pattern, named) or matching(ours(pattern), named)
        message = f"freeze: {pattern!r} matches no parameter; near it: {nearest(ours(pattern), named)}"
        require(found, message, "freeze")
        frozen |= {named[n] for n in found}
    every = list(model.parameters())
    require(len(frozen) < len(every), "freeze leaves nothing to train", "freeze")
    for q in frozen:
        q.requires_grad_(False)
    size, whole = (sum(q.numel() for q in some) for some in (frozen, every))
    return f"frozen: {len(frozen)} of {len(every)} tensors, {size} of {whole} parameters ({size / whole:.1%})"


# ---- loading parts of another model ------------------------------------------------------------------------------------


def read_weights(path, step=-1):
    """{name: tensor} of a run directory, a checkpoint file, or a folder of torch.distributed.checkpoint; and where it is from.

    step: -1 for the latest; else that of one of the run's checkpoints, or N of LLMonade's checkpoint/step-N.
    """
    require(os.path.exists(path), f"{path} does not exist", "init_from")
    if os.path.isfile(path):
        require(step == -1, f"init_step={step} has no effect: {path} is one file", "init_step")
        return read_file(path), path
    if os.path.exists(os.path.join(path, "config.json")):
        state = pick_checkpoint(path, step)
        return select_prefix(state["tensors"], "model"), f"{path}, step {state['step']}"
    found = glob.glob(os.path.join(glob.escape(path), "**", "step-*"), recursive=True)
    folders = {int(f.rsplit("-", 1)[1]): f for f in found if f.rsplit("-", 1)[1].isdigit()}
    if folders:
        chosen = max(folders) if step == -1 else step
        message = f"init_step={step} is not in {path}; there is {', '.join(map(str, sorted(folders)))}"
        require(chosen in folders, message, "init_step")
        path = folders[chosen]
    message = f"{path} is no run directory, checkpoint file or folder of torch.distributed.checkpoint"
    require(os.path.exists(os.path.join(path, ".metadata")), message, "init_from")
    tensors = read_shards(path)
    return next(filter(None, (select_prefix(tensors, "model"), select_prefix(tensors, "state_dict"))), tensors), path


def pick_checkpoint(folder, step):
    """The latest checkpoint of a run, or the one of this step."""
    if step == -1:
        return load_checkpoint(folder, "ckpt", "ckpt_prev")
    there = []
    for name in ("ckpt", "ckpt_prev", "best"):
        try:
            state = load_checkpoint(folder, name)
        except ConfigError:
            continue
        if state["step"] == step:
            return state
        there.append(str(state["step"]))
    raise ConfigError(f"init_step={step} is not in {folder}; there is {', '.join(there) or 'no checkpoint'}", "init_step")


def read_file(path):
    """{name: tensor} of a file that torch.save wrote: ours, or a state dict, in "model" or
    "state_dict" or bare.

    ConfigError if it holds anything but plain tensors there; RunError if the disk or memory
    refuses.
    """
    with reading(path):
        try:
            refuse_compressed(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, MemoryError):
            raise
        except Exception as e:  # torch raises many kinds
            raise unreadable(path, e) from None
    in_shards = isinstance(state, dict) and "shards" in state
    require(not in_shards, f"the tensors of {path} are in shards beside it; name the run directory instead", "init_from")
    if isinstance(state, dict) and "tensors" in state:
        return select_prefix(plain_tensors(state["tensors"], path), "model")
    for key in ("model", "state_dict"):
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)} if isinstance(state, dict) else {}
    require(tensors, f"{path} holds no named tensors", "init_from")
    return plain_tensors(tensors, path)


def refuse_compressed(path):
    """ValueError for a zip that holds more bytes than it has:
    torch.save compresses nothing, a bomb does.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as z:
            held = sum(entry.file_size for entry in z.infolist())
        if held > os.path.getsize(path):
            raise ValueError(f"it expands to {held} bytes")


def pairs(mapping, names):
    """{target name: source name} that a map means for these source names; an empty one: each onto its own name.

    Entries, source to target: "0-5": "0-5" and "6": "10" (numbers of blocks), "layers.0.ffn": "layers.1.ffn" (a name, and all
    under it), "*.memory.keys": "*.memory.keys" (each star on the right stands for what that on the left matched).
    """
    if not mapping:
        return {n: n for n in names}
    nested = ("layer_mappings", "component_mappings")
    if set(mapping) & set(nested):
        unknown = set(mapping) - set(nested)
        require(not unknown, f"init_map: {', '.join(unknown)} beside {' and '.join(nested)}", "init_map")
        flat = [name for name in nested if not isinstance(mapping.get(name, {}), dict)]
        require(not flat, f"init_map: {', '.join(flat)} must hold a dict of source: target", "init_map")
        mapping = {k: v for name in nested for k, v in mapping.get(name, {}).items()}
    found = {}
    for source, target in mapping.items():
        message = f'init_map: {source!r}: {target!r} must both be text, such as "0-5" or "layers.0.ffn"'
        require(isinstance(source, str) and isinstance(target, str), message, "init_map")
        blocks = [re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", x.strip()) for x in (source, target)]
        if all(blocks):
            entry = by_number(source, target, *(range(int(b[1]), int(b[2] or b[1]) + 1) for b in blocks), names)
        else:
            entry = by_name(source, target, names) or by_name(ours(source), ours(target), names)
        near = nearest(ours(source), names)
        require(entry, f"init_map: {source!r} matches nothing in the source; near it: {near}", "init_map")
        twice = set(entry) & set(found)
        require(not twice, f"init_map gives {min(twice, default='')} two sources", "init_map")
        found |= entry
    return found


def by_number(source, target, sources, targets, names):
    message = f"init_map: {source!r} is {len(sources)} blocks, {target!r} is {len(targets)}"
    require(len(sources) == len(targets), message, "init_map")
    entry = {}
    for i, j in zip(sources, targets):
        inside = [n for n in names if n.startswith(f"layers.{i}.")]
        require(inside, f"init_map: {source!r}: the source has no block {i}", "init_map")
        entry |= {f"layers.{j}." + n.removeprefix(f"layers.{i}."): n for n in inside}
    return entry


def by_name(source, target, names):
    source, target = source.rstrip("."), target.rstrip(".")
    stars = source.count("*"), target.count("*")
    require(stars[0] == stars[1], f"init_map: {source!r} has {stars[0]} stars and {target!r} {stars[1]}", "init_map")
    pattern = re.compile("(.*)".join(map(re.escape, source.split("*"))) + r"((?:\..*)?)")
    entry = {}
    for n in names:
        match = pattern.fullmatch(n)
        if match:
            *filled, below = match.groups()
            pieces = target.split("*")
            entry["".join(x for pair in zip(pieces, [*filled, ""]) for x in pair) + below] = n
    return entry


@torch.no_grad()
def load_parts(model, path, step=-1, mapping=None):
    """Copy weights of another model into this one -> one line about it. ConfigError if a name or a shape does not fit.

    The optimizer starts afresh. Every rank reads the source; DDP and FSDP then share the result out as usual.
    """
    source, where = read_weights(path, step)
    names = {ours(n): n for n in source}
    lost = [n for n in source if names[ours(n)] != n]
    require(not lost, f"{path} has two tensors for {', '.join(map(ours, lost[:1]))}", "init_from")
    target = model.state_dict()
    wanted = pairs(mapping, list(names))
    for to, name in wanted.items():
        message = f"init_map: the model has no {to}; near it: {nearest(to, target)}; name the parts to take with init_map"
        require(to in target, message, "init_map")
        have, need = tuple(source[names[name]].shape), tuple(target[to].shape)
        require(have == need, f"init_map: {name} is {have} in the source, {to} is {need} here", "init_map")
    missing = [] if mapping else [n for n in target if n not in wanted]
    message = f"init_from={path} has no {', '.join(missing[:3])}; name the parts to take with init_map"
    require(not missing, message, "init_from")
    for to, name in wanted.items():
        target[to].copy_(source[names[name]])
    size = sum(target[to].numel() for to in wanted)
    return f"loaded: {len(wanted)} tensors, {size} numbers from {where}"
