"""Load parts of another model's weights, and freeze parameters.

    python train.py configs/qa_2k_memory.py --freeze "*.att"        # do not train attention
    python train.py configs/qa_10k_memory.py --init_from runs/RUN   # all weights of another run
    python train.py ... --init_from runs/RUN --init_map '{"0-5": "0-5", "6": "10"}'  # blocks
    python train.py ... --init_from runs/RUN --init_map '{"layers.0.ffn.*": "layers.1.ffn.*"}'

Both take the forms of LLMonade's experiments and pipeline: names with or without "model." before
them, its names of modules (attn, mlp, k_proj), the JSON dict {pattern: "freeze"}, and
{"layer_mappings": ..., "component_mappings": ...}. A pattern that matches nothing is an error. The
order is: build, load, freeze, wrap, make the optimizer.
"""

import difflib
import fnmatch
import glob
import os
import re

import torch

from nanorecall.checkpoint import load_checkpoint
from nanorecall.files import reading, refuse_compressed
from nanorecall.settings import ConfigError, require
from nanorecall.sharded_checkpoint import read_shards
from nanorecall.tensors import plain_tensors, select_prefix, unreadable

OUR_MODULES = {  # LLMonade's names of modules: ours
    "attn": "att",
    "mlp": "ffn",
    "q_proj": "proj_q",
    "k_proj": "proj_k",
    "v_proj": "proj_v",
    "o_proj": "out_proj",
    "memory_retrieval": "memory",
    "memory_unlocking": "memory",
}

# ---- patterns ------------------------------------------------------------------------------------


def our_name(name):
    """A name or pattern as this project writes it: without "model.", with our names of modules."""
    parts = []
    for part in name.removeprefix("model.").split("."):
        parts.append(OUR_MODULES.get(part, part))
    return ".".join(parts)


def matching(pattern, names):
    """The names that a pattern matches: as a whole, or from their start up to a dot.

    "layers.0" and "layers.0." match all names under layers.0. Stars match any text.
    """
    pattern = pattern.rstrip(".")
    matched = []
    for name in names:
        is_under = fnmatch.fnmatchcase(name, pattern + ".*")
        if name == pattern or fnmatch.fnmatchcase(name, pattern) or is_under:
            matched.append(name)
    return matched


def nearest(pattern, names):
    """A few names like the pattern, as text for an error."""
    close = difflib.get_close_matches(pattern.strip("*."), names, n=3, cutoff=0.3)
    return ", ".join(close or list(names)[:3])


# ---- freezing ------------------------------------------------------------------------------------


def freeze(model, patterns):
    """Freeze the parameters that patterns name -> one line about it.

    patterns: text (with commas), a list, or {pattern: "freeze"}. ConfigError for a pattern that
    matches no parameter, and if nothing is left to train.
    """
    if isinstance(patterns, dict):
        for pattern, value in patterns.items():
            message = f'freeze takes {{pattern: "freeze"}}, not {{{pattern!r}: {value!r}}}'
            require(value == "freeze", message, "freeze")
    if isinstance(patterns, str):
        patterns = [pattern.strip() for pattern in patterns.split(",")]
    named = dict(model.named_parameters(remove_duplicate=False))
    frozen = set()
    for pattern in patterns:
        message = f"freeze needs names or patterns, not {pattern!r}"
        require(isinstance(pattern, str) and pattern, message, "freeze")
        matched = matching(pattern, named) or matching(our_name(pattern), named)
        near = nearest(our_name(pattern), named)
        message = f"freeze: {pattern!r} matches no parameter; near it: {near}"
        require(matched, message, "freeze")
        frozen.update(named[name] for name in matched)
    every = list(model.parameters())
    require(len(frozen) < len(every), "freeze leaves nothing to train", "freeze")
    for parameter in frozen:
        parameter.requires_grad_(False)
    size = sum(parameter.numel() for parameter in frozen)
    total = sum(parameter.numel() for parameter in every)
    parameters = f"{size} of {total} parameters ({size / total:.1%})"
    return f"frozen: {len(frozen)} of {len(every)} tensors, {parameters}"


# ---- loading parts of another model --------------------------------------------------------------


def read_weights(path, step=-1):
    """Weights on disk -> {name: tensor}, and where they are from, as text.

    path: a run directory, a checkpoint file, or a folder of torch.distributed.checkpoint. step: -1
    for the latest, else that of a checkpoint of the run, or N of LLMonade's checkpoint/step-N.
    """
    require(os.path.exists(path), f"{path} does not exist", "init_from")
    if os.path.isfile(path):
        require(step == -1, f"init_step={step} has no effect: {path} is one file", "init_step")
        return read_file(path), path
    if os.path.exists(os.path.join(path, "config.json")):
        state = pick_checkpoint(path, step)
        return select_prefix(state["tensors"], "model"), f"{path}, step {state['step']}"
    folders = {}  # by step
    for folder in glob.glob(os.path.join(glob.escape(path), "**", "step-*"), recursive=True):
        number = folder.rsplit("-", 1)[1]
        if number.isdigit():
            folders[int(number)] = folder
    if folders:
        chosen = max(folders) if step == -1 else step
        steps = ", ".join(map(str, sorted(folders)))
        message = f"init_step={step} is not in {path}; there is {steps}"
        require(chosen in folders, message, "init_step")
        path = folders[chosen]
    kinds = "run directory, checkpoint file or folder of torch.distributed.checkpoint"
    message = f"{path} is no {kinds}"
    require(os.path.exists(os.path.join(path, ".metadata")), message, "init_from")
    tensors = read_shards(path)
    named = select_prefix(tensors, "model") or select_prefix(tensors, "state_dict")
    return named or tensors, path


def pick_checkpoint(folder, step):
    """The latest checkpoint of a run, or the one of this step."""
    if step == -1:
        return load_checkpoint(folder, "ckpt", "ckpt_prev")
    steps = []
    for name in ("ckpt", "ckpt_prev", "best"):
        try:
            state = load_checkpoint(folder, name)
        except ConfigError:
            continue
        if state["step"] == step:
            return state
        steps.append(str(state["step"]))
    there = ", ".join(steps) or "no checkpoint"
    raise ConfigError(f"init_step={step} is not in {folder}; there is {there}", "init_step")


def read_file(path):
    """{name: tensor} of a file that torch.save wrote.

    It is a checkpoint of ours, or a state dict, which may be under "model" or "state_dict".
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
    if not isinstance(state, dict):
        state = {}
    message = f"the tensors of {path} are in shards beside it; name the run directory instead"
    require("shards" not in state, message, "init_from")
    if "tensors" in state:
        return select_prefix(plain_tensors(state["tensors"], path), "model")
    for key in ("model", "state_dict"):
        if isinstance(state.get(key), dict):
            state = state[key]
    tensors = {name: t for name, t in state.items() if isinstance(t, torch.Tensor)}
    require(tensors, f"{path} holds no named tensors", "init_from")
    return plain_tensors(tensors, path)


def resolve_map(mapping, names):
    """init_map -> {target name: source name}, and a note on entries that override others, or "".

    names: those of the source. An empty map maps each name onto itself. An entry is source: target:
    numbers of blocks ("0-5": "0-5", "6": "10"); a name, and all under it ("layers.0.ffn":
    "layers.1.ffn"); or a pattern ("*.memory.keys": "*.memory.keys"), whose star on the right takes
    the text that the star on the left matched. Names and patterns override numbers.
    """
    if not mapping:
        return {name: name for name in names}, ""
    of_blocks, of_names = {}, {}
    for source, target in flatten(mapping).items():
        such = 'such as "0-5" or "layers.0.ffn"'
        message = f"init_map: {source!r}: {target!r} must both be text, {such}"
        require(isinstance(source, str) and isinstance(target, str), message, "init_map")
        sources, targets = parse_blocks(source), parse_blocks(target)
        if sources is not None and targets is not None:
            entries = of_blocks
            entry = map_blocks(source, target, sources, targets, names)
        else:
            entries = of_names
            entry = map_names(source, target, names)
            if not entry:
                entry = map_names(our_name(source), our_name(target), names)
        near = nearest(our_name(source), names)
        message = f"init_map: {source!r} matches nothing in the source; near it: {near}"
        require(entry, message, "init_map")
        twice = set(entry) & set(entries)
        require(not twice, f"init_map gives {min(twice, default='')} two sources", "init_map")
        entries.update(entry)
    return of_blocks | of_names, describe_overrides(of_blocks, of_names)


def describe_overrides(of_blocks, of_names):
    """Which tensors entries with names take from elsewhere than entries with numbers would."""
    changed = []
    for target, source in of_names.items():
        if of_blocks.get(target, source) != source:
            changed.append(f"{target} comes from {source}, not {of_blocks[target]}")
    return "; ".join(changed)


def flatten(mapping):
    """LLMonade's {"layer_mappings": {...}, "component_mappings": {...}} as one dict."""
    nested = ("layer_mappings", "component_mappings")
    if not set(mapping) & set(nested):
        return mapping
    unknown = ", ".join(set(mapping) - set(nested))
    require(not unknown, f"init_map: {unknown} beside {' and '.join(nested)}", "init_map")
    flat = {}
    for name in nested:
        entries = mapping.get(name, {})
        message = f"init_map: {name} must hold a dict of source: target"
        require(isinstance(entries, dict), message, "init_map")
        twice = ", ".join(set(entries) & set(flat))
        require(not twice, f"init_map: {twice} stands in both {' and '.join(nested)}", "init_map")
        flat |= entries
    return flat


def parse_blocks(text):
    """The range of block numbers that text such as "0-5" or "6" means; None for other text."""
    match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", text.strip())
    if not match:
        return None
    first, last = match.groups()
    return range(int(first), int(last or first) + 1)


def map_blocks(source, target, sources, targets, names):
    """{target name: source name} of an entry such as "0-5": "0-5". sources, targets: ranges."""
    message = f"init_map: {source!r} is {len(sources)} blocks, {target!r} is {len(targets)}"
    require(len(sources) == len(targets), message, "init_map")
    entry = {}
    for i, j in zip(sources, targets):
        inside = [name for name in names if name.startswith(f"layers.{i}.")]
        require(inside, f"init_map: {source!r}: the source has no block {i}", "init_map")
        for name in inside:
            entry[f"layers.{j}." + name.removeprefix(f"layers.{i}.")] = name
    return entry


def map_names(source, target, names):
    """{target name: source name} of an entry with names or patterns."""
    source, target = source.rstrip("."), target.rstrip(".")
    n_source, n_target = source.count("*"), target.count("*")
    message = f"init_map: {source!r} has {n_source} stars and {target!r} {n_target}"
    require(n_source == n_target, message, "init_map")
    # A group for each star, and one for all that is under the name.
    pattern = re.compile("(.*)".join(map(re.escape, source.split("*"))) + r"((?:\..*)?)")
    first, *others = target.split("*")
    entry = {}
    for name in names:
        match = pattern.fullmatch(name)
        if match:
            *filled, below = match.groups()
            target_name = first
            for text, other in zip(filled, others):
                target_name += text + other
            entry[target_name + below] = name
    return entry


@torch.no_grad()
def load_parts(model, path, step=-1, mapping=None):
    """Copy weights of another model into this one -> one line about it.

    ConfigError if a name or a shape does not fit. Every rank reads the source; DDP or FSDP wraps
    the result as usual.
    """
    source, where = read_weights(path, step)
    names = {}  # our name: name in the source
    for name in source:
        message = f"{path} has two tensors for {our_name(name)}"
        require(our_name(name) not in names, message, "init_from")
        names[our_name(name)] = name
    target = model.state_dict()
    mapped, overridden = resolve_map(mapping, list(names))
    written = {}  # what tables that several names share are loaded from, by their address
    for to, name in mapped.items():
        near = f"near it: {nearest(to, target)}; name the parts to take with init_map"
        message = f"init_map: the model has no {to}; {near}"
        require(to in target, message, "init_map")
        have, need = tuple(source[names[name]].shape), tuple(target[to].shape)
        message = f"init_map: {name} is {have} in the source, {to} is {need} here"
        require(have == need, message, "init_map")
        first = written.setdefault(target[to].data_ptr(), name)
        message = f"init_map: {first} and {name} would both go to {to}, which blocks share here; "
        message += "set mem_share_values=0 or tie_weights=0, or name one of them"
        same = first == name or torch.equal(source[names[first]], source[names[name]])
        require(same, message, "init_map")
    if not mapping:
        missing = [name for name in target if name not in mapped]
        first = ", ".join(missing[:3])
        message = f"init_from={path} has no {first}; name the parts to take with init_map"
        require(not missing, message, "init_from")
    for to, name in mapped.items():
        target[to].copy_(source[names[name]])
    size = sum(target[to].numel() for to in mapped)
    note = f"; names override blocks: {overridden}" if overridden else ""
    return f"loaded: {len(mapped)} tensors, {size} numbers from {where}{note}"
