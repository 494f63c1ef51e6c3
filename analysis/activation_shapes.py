"""Which shapes do the activations of a model have, and at which module do two models differ first?

    python memory.py inspect --trace runs/RUN                 # a run, or a config as it begins:
    python memory.py inspect --trace configs/qa_2k_memory.py
    python memory.py inspect --trace runs/A runs/B            # the first module that differs

Letters: B sequences, T tokens.
"""

from dataclasses import dataclass

import torch

from analysis.hooks import hooked
from nanorecall.build import build_model, build_model_config
from nanorecall.metrics import in_eval_mode, print_table
from nanorecall.settings import require, say
from train import load_run
from train import parse as parse_training


@dataclass
class Activation:
    """One tensor that a module returns, in the order in which the modules end."""

    name: str  # of the module; of the parts of a dict with their keys, as "layers.0.memory slots"
    kind: str  # its class
    inputs: str  # shapes of the module's inputs
    tensor: torch.Tensor = None  # None: it was called, but did not end

    @property
    def shape(self):
        return "failed" if self.tensor is None else shape_of(self.tensor)

    @property
    def dtype(self):
        return "" if self.tensor is None else str(self.tensor.dtype).removeprefix("torch.")


def print_activations(paths):
    """Print shape and dtype of each module's output; of two models, also where they differ first.

    paths: run directories or override files (.py). Two models get the same sequences if their
    vocabularies and lengths are the same. If a module fails, the table ends there.
    """
    message = "name one or two runs or configs: python memory.py inspect --trace A [B]"
    require(1 <= len(paths) <= 2, message, None)
    models, tasks = zip(*[open_model(path) for path in paths])
    sizes = [(task.vocab_size, task.seq_len) for task in tasks]
    has_values = sizes[0] == sizes[-1]
    traces = []
    for path, model, task in zip(paths, models, tasks):
        tokens = first_sequences(tasks[0] if has_values else task)
        activations, error = trace_activations(model, tokens)
        traces.append({a.name: a for a in activations})
        say(f"{path}: {describe_trace(model, traces[-1], error)}")
    a, b = traces[0], traces[-1]
    if len(paths) == 1:
        lines = [(x.name, x.kind, x.inputs, x.shape, x.dtype) for x in a.values()]
        print_table(("module", "class", "input", "output", "dtype"), lines)
        return
    say(describe_parting(a, b, has_values))
    lines = []
    for name in a | b:
        columns = [name]
        for trace in traces:
            columns += [trace[name].shape, trace[name].dtype] if name in trace else ["-", ""]
        lines.append((*columns, compare(a.get(name), b.get(name), has_values)))
    print_table(("module", "output in A", "dtype", "output in B", "dtype", "difference"), lines)


def open_model(path):
    """A run directory or override file -> model on the CPU, and its data."""
    if not path.endswith(".py"):
        _, data, model, _ = load_run(path, "ckpt")
        return model, data
    settings = parse_training([path])
    data = settings.data_module.Data(settings.data)
    return build_model(settings, build_model_config(settings, data)), data


def first_sequences(data, n=4):
    """Tokens (B, T) of the first n sequences of the test split."""
    tokens, *_ = data.batch("test", 0, list(data.eval_groups("test")[0])[:n])
    return tokens


@in_eval_mode
def trace_activations(model, tokens):
    """One forward pass of tokens (B, T) -> [Activation], and the error that ended it, or None."""
    found, running, hooks = [], [], []
    for name, module in model.named_modules():
        if name:
            hooks.append((module, "before", note_start(name, running)))
            hooks.append((module, "after", note_end(name, running, found)))
    error = None
    with hooked(hooks):
        try:
            found.append(Activation("logits", "", shape_of(tokens), model(tokens)[0]))
        except (RuntimeError, ValueError, TypeError, IndexError) as e:
            error = e
            # The innermost first: that is where it failed.
            for name, inputs in reversed(running):
                kind = type(model.get_submodule(name)).__name__
                found.append(Activation(name, kind, inputs))
    return found, error


def note_start(name, running):
    def note(module, inputs):
        shapes = [shape_of(x) for x in inputs if torch.is_tensor(x)]
        running.append((name, " ".join(shapes)))

    return note


def note_end(name, running, found):
    def note(module, inputs, output):
        _, shapes = running.pop()
        for part, tensor in named_tensors(name, output):
            found.append(Activation(part, type(module).__name__, shapes, tensor))

    return note


def named_tensors(name, output):
    """Yield (name, tensor) of what a module returned, which may be a tuple or dict of tensors."""
    if torch.is_tensor(output):
        yield name, output
    elif isinstance(output, dict):
        for key, value in output.items():
            yield from named_tensors(f"{name} {key}", value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from named_tensors(name, value)


def shape_of(tensor):
    return str(tuple(tensor.shape))


def describe_trace(model, trace, error):
    """The number of activations of a forward pass, or where it failed, as a sentence."""
    if error is not None:
        failed = next(a for a in trace.values() if a.tensor is None)
        why = " ".join(str(error).split())
        return f"{failed.name} ({failed.kind}) failed on input {failed.inputs}: {why}"
    fused = {}
    for name, module in model.named_modules():
        has_weights = next(module.parameters(recurse=False), None) is not None
        if has_weights and name not in trace:
            fused[name.rpartition(".")[2]] = True
    note = f"; {', '.join(fused)} are not called: their layers use the weights" if fused else ""
    return f"{len(trace)} activations, from tokens to logits {trace['logits'].shape}{note}"


def describe_parting(a, b, has_values):
    """Where two traces {name: Activation} differ first, in shapes and in values, as sentences.

    has_values: both are of the same tokens.
    """
    places = {"shapes": "", "values": ""}
    for name in a | b:
        shapes = compare_shapes(a.get(name), b.get(name))
        if shapes and not places["shapes"]:
            places["shapes"] = f"{name}: {shapes}"
        # Not "> 0", which is false for nan.
        is_other = not shapes and has_values and difference(a[name], b[name]) != 0
        if is_other and not places["values"]:
            places["values"] = f"{name}: {compare(a[name], b[name], has_values)}"
    sentences = []
    for what, place in places.items():
        if what == "values" and not has_values:
            sentences.append("values are not compared: vocabularies or lengths differ")
        else:
            sentences.append(f"{what} part at {place}" if place else f"no {what} differ")
    return "\n".join(sentences)


def compare_shapes(a, b):
    """How two Activations differ in shape or dtype, as text; "" if they do not."""
    if a is None or b is None:
        return "only in B" if a is None else "only in A"
    if a.shape != b.shape:
        return f"{a.shape} in A, {b.shape} in B"
    return "" if a.dtype == b.dtype else f"{a.dtype} in A, {b.dtype} in B"


def difference(a, b):
    """The largest difference of two Activations, nan if one is; of slots, how many differ."""
    if a.tensor is None:
        return 0.0
    if not a.tensor.is_floating_point():
        return int((a.tensor != b.tensor).sum())
    return float((a.tensor - b.tensor).abs().amax()) if a.tensor.numel() else 0.0


def compare(a, b, has_values):
    """How two Activations differ, as text."""
    differ = compare_shapes(a, b)
    if a is None or b is None:
        return differ
    if differ:
        return "shape or dtype"
    if not has_values:
        return ""
    amount = difference(a, b)
    if isinstance(amount, int):
        return f"{amount} of {a.tensor.numel()} differ"
    return f"at most {amount:.3g}"
