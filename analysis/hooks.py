"""Change what a model does inside and go on from there: slots of memory layers, heads, whole outputs of a block.

Two ways. `forward_from` starts at a block's memory layer from what was computed before, so that many changed copies of a row cost only
what comes after the change. `replaced` puts functions after (or before) any modules of a model, for whole forward passes.
Nothing stays in the model afterwards.

Letters: B rows or changed copies of rows, T tokens, n labels of a row, H heads, k slots that a head reads, D width of the
residual stream, V width of a value.
"""

import contextlib
from dataclasses import dataclass

import numpy as np
import torch

from analysis.trained_run import correct_examples
from memory import SCORES, weighted_values
from nanorecall.metrics import in_eval_mode
from nanorecall.ops import gather_positions
from nanorecall.rng import IGNORE_INDEX
from nanorecall.settings import require

# ---- rows and where they are asked --------------------------------------------------------------------------------------


@dataclass
class Examples:
    """Rows of one shape: as many tokens, and as many labels, at the same places or not."""

    rows: np.ndarray  # (B,) their numbers
    tokens: torch.Tensor  # (B, T)
    at: torch.Tensor  # (B, n) positions of the labels
    answers: torch.Tensor  # (B, n) tokens asked for
    tags: dict  # {name: (B,)}, those that all labels of a row share

    def __len__(self):
        return len(self.rows)

    def pick(self, which):
        """Some of the rows, by index (M,)."""
        i = torch.as_tensor(which, device=self.tokens.device)
        tags = {name: v[np.asarray(which)] for name, v in self.tags.items()}
        return Examples(self.rows[np.asarray(which)], self.tokens[i], self.at[i], self.answers[i], tags)


def read_cases(run, rows):
    """Rows by number -> Cases of those that have the most frequent shape, and how many were left out."""
    tokens, targets, tags, *_ = run.data.batch(run.config.split, 0, rows)
    counts, lengths = (targets != IGNORE_INDEX).sum(1), (tokens != run.pad).sum(1)
    shapes, which, size = torch.stack([counts, lengths], 1).unique(dim=0, return_inverse=True, return_counts=True)
    mine = which == size.argmax()
    n, T = shapes[size.argmax()].tolist()
    at = (targets[mine] != IGNORE_INDEX).nonzero()[:, 1].view(-1, n)
    first, row = (counts.cumsum(0) - counts).numpy(), np.repeat(np.arange(len(counts)), counts)
    here = mine.numpy()  # numpy takes a tensor of one truth value for the number 1
    tags = {name: v[first[here]] for name, v in tags.items() if (v == v[first][row]).all()}
    tokens, targets = tokens[mine][:, :T], targets[mine]
    answers = targets.gather(1, at)
    tensors = (x.to(run.device) for x in (tokens, at, answers))
    cases = Examples(np.asarray(rows)[here], *tensors, tags)
    return cases, len(rows) - len(cases)


def correct_cases(run):
    """Rows that the model answers rightly, as Cases: run.config.rows of them, as many of each group as there are."""
    c = run.config
    require(run.world.size == 1, "ablate.py is the work of one process; run it without torchrun", None)
    rows = correct_examples(run)
    few = f"{run.folder} answers {len(rows)} rows of {c.split} rightly; there is nothing to take apart"
    require(len(rows) >= 4, few, None)
    order = np.random.default_rng(c.seed).permutation(len(rows))
    if c.rows and c.rows < len(rows):
        cases, _ = read_cases(run, rows[order])
        group = next(iter(cases.tags.values()), np.zeros(len(cases)))
        place = np.empty(len(cases), int)  # of each row within its group
        for g in np.unique(group):
            place[group == g] = np.arange((group == g).sum())
        rows = cases.rows[np.argsort(place, kind="stable")[: c.rows]]
    cases, left = read_cases(run, rows)
    print(
        f"{len(cases)} rows answered rightly, {cases.at.shape[1]} labels each"
        + (f"; {left} of other shapes left out" if left else "")
    )
    return cases


def logit_diff(logits, answers):
    """How far the right token leads its strongest rival: logits (..., tokens), answers (...) -> margin, probability, right."""
    mine = logits.gather(-1, answers.unsqueeze(-1))
    rival = logits.scatter(-1, answers.unsqueeze(-1), -torch.inf).amax(-1)
    return mine.squeeze(-1) - rival, logits.softmax(-1).gather(-1, answers.unsqueeze(-1)).squeeze(-1), mine.squeeze(-1) > rival


# ---- from a block's memory on ------------------------------------------------------------------------------------------


@dataclass
class Clean:
    """What an untouched model computes: of each block with a memory layer, the stream before it and what it reads."""

    stream: dict  # {block: (B, T, D)}
    found: dict  # {block: {"slots", "weights" (B, T, H, k), "output" (B, T, V)}}
    logits: torch.Tensor  # (B, n, tokens)


@in_eval_mode
def run_with_cache(model, cases):
    """Cases -> Clean."""
    stream = {}

    def keep(i):
        return lambda module, args: stream.__setitem__(i, args[0])  # ffn_norm sees the stream between attention and memory

    trace, blocks = [], list(model.memory_layers()) if hasattr(model, "memory_layers") else []
    with hooked([(model.layers[i].ffn_norm, "before", keep(i)) for i in blocks]):
        logits = logits_at(model, cases.tokens, cases.at, **({"trace": trace} if blocks else {}))
    return Clean(stream, dict(zip(blocks, trace)), logits)


def logits_at(model, tokens, at, **extra):
    """The model's logits at positions (B, n) alone: tokens (B, T) -> (B, n, tokens). extra is handed on to the blocks."""
    x = model.embed_tokens(tokens)
    for layer in model.layers:
        x = layer(x, **extra)
    return model.lm_head(model.final_norm(gather_labels(x, at)))


def gather_labels(x, at):
    """x (B, T, ...) at positions (B, n) -> (B, n, ...)"""
    return x[torch.arange(len(x), device=x.device)[:, None], at]


@in_eval_mode
def forward_from(model, block, stream, found, at):
    """From a block's memory layer to the logits: stream (B, T, D) before it, found: what it is to read -> (B, n, tokens) at the
    positions (B, n). Nothing before is computed again, and of the last block only what is asked for."""
    last = len(model.layers) - 1
    if block == last:
        stream, found = gather_positions(stream, at), {name: gather_labels(x, at) for name, x in found.items()}
    layer = model.layers[block]
    x = layer.add(stream, layer.mlp_or_memory(layer.ffn_norm(stream), reads=found))
    for i in range(block + 1, last + 1):
        x = model.layers[i](x, at if i == last else None)
    return model.lm_head(model.final_norm(x))


# ---- one slot less -----------------------------------------------------------------------------------------------------


@dataclass
class SlotAblation:
    """What a mode of removing a slot may use. More than one mode needs little of it."""

    memory: object  # the memory layer
    found: dict  # slots, weights (B, T, H, k) of each copy
    target: torch.Tensor  # (B,) the slot to remove
    more: tuple  # scores and slots (B, T, H, k + 1) of the best k + 1
    other: torch.Tensor  # (B,) a random slot of the table
    borrowed: torch.Tensor  # (B,) a slot that another row reads at such a place


def hit(r):
    return r.found["slots"] == r.target[:, None, None, None]


def zero(r):
    """Its weight is 0; the others keep theirs."""
    return {"slots": r.found["slots"], "weights": r.found["weights"].masked_fill(hit(r), 0)}


def next_best(r):
    """As if it were not in the table: the next best takes its place, and weights are made anew. (Best as lookup orders them,
    which with a bias is not by score.)"""
    scores, slots = r.more
    place = (slots == r.target[:, None, None, None]).int().argsort(dim=-1, stable=True)[..., : r.found["slots"].shape[-1]]
    return {"slots": slots.gather(-1, place), "weights": SCORES[r.memory.config.mem_score](scores.gather(-1, place))}


def random(r):
    """Another slot's value under its weight."""
    return {"slots": torch.where(hit(r), r.other[:, None, None, None], r.found["slots"]), "weights": r.found["weights"]}


def resample(r):
    """The value of a slot that another row reads, under its weight."""
    return {"slots": torch.where(hit(r), r.borrowed[:, None, None, None], r.found["slots"]), "weights": r.found["weights"]}


def mean(r):
    """The mean of all values under its weight."""
    rest, lost = zero(r), (r.found["weights"] * hit(r)).sum((-1, -2))  # (B, T)
    read = weighted_values(r.memory.values, rest["slots"].flatten(0, 1).flatten(1), rest["weights"].flatten(0, 1).flatten(1))
    return {**rest, "output": read.unflatten(0, lost.shape) + lost.unsqueeze(-1) * r.memory.values.mean(0)}


ABLATIONS = {"zero": zero, "drop": next_best, "random": random, "mean": mean, "resample": resample}


# ---- any module --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def hooked(changes):
    """For a while, put functions at modules: changes [(module, "after" or "before", f)].

    "after": f(module, inputs, output) -> another output, or None to leave it; "before": f(module, inputs) -> other inputs, or
    None. They are gone afterwards, whatever happens.
    """
    hooks = []
    try:
        for module, when, f in changes:
            hooks.append(module.register_forward_hook(f) if when == "after" else module.register_forward_pre_hook(f))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def ablate_head(module, heads, head):
    """A change for `replaced` that takes one head out of a mixer, before its last projection: of every row, or head (B,)."""

    def silence(_, inputs):
        x = inputs[0].unflatten(-1, (heads, -1)).clone()  # (B, n, H, V)
        x[..., head, :] = 0
        return (x.flatten(-2),)

    return module, "before", silence


def hook_points(model):
    """{name: {block: module whose output is that}}: what a block adds, and the stream that enters it ("before")."""
    out = {"stream": {}, "mixer": {}, "mlp": {}, "memory": {}}
    for i, layer in enumerate(model.layers):
        names = {"mixer": "att", "mlp": "ffn", "memory": "memory"}
        parts = {name: getattr(layer, part, None) for name, part in names.items()}
        parts["stream"] = layer
        for name, module in parts.items():
            if module is not None:
                out[name][i] = module
    return {name: blocks for name, blocks in out.items() if blocks}


def hook_output(site, module, change):
    """A change for `replaced` at a site: change(x) -> other x, on what the module gives (of "stream": what enters it)."""
    if site == "stream":
        return module, "before", lambda _, inputs: (change(inputs[0]), *inputs[1:])
    # a memory layer gives what it found, too
    return module, "after", lambda _, inputs, y: (change(y[0]), *y[1:]) if isinstance(y, tuple) else change(y)


@in_eval_mode
def run_with_hooks(model, cases, hooks=(), intervene=None):
    """The whole model, changed -> logits at the labels (B, n, tokens)."""
    with hooked(hooks):
        return logits_at(model, cases.tokens, cases.at, **({"intervene": intervene} if intervene else {}))
