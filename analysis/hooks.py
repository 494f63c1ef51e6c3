"""Change activations of a model, and continue its forward pass from there.

There are two ways. `forward_from` continues from a block's memory layer with cached activations, so
that many ablated copies of an example cost only the layers after the change. `hooked` puts hooks on
any modules for whole forward passes. Both leave the model as it was. Names are those of
TransformerLens: resid_pre, resid_mid, logit_diff, run_with_cache, run_with_hooks.

Letters: B examples, M changed copies of examples, T tokens, n labels of an example, H heads, k
slots that a head reads, D width of the residual stream, V width of a value. Reads of a memory layer
are a dict, as in memory.py: "slots" and "weights" (B, T, H, k), and "output" (B, T, V).
"""

import contextlib
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from analysis.trained_run import correct_examples
from nanorecall.metrics import in_eval_mode
from nanorecall.ops import gather_positions
from nanorecall.rng import IGNORE_INDEX
from nanorecall.settings import require

# ---- examples ------------------------------------------------------------------------------------


@dataclass
class Examples:
    """Examples of one shape: the same number of tokens and of labels."""

    indices: np.ndarray  # (B,) in the split
    tokens: torch.Tensor  # (B, T)
    label_pos: torch.Tensor  # (B, n) positions at which answers are predicted
    answers: torch.Tensor  # (B, n) the correct tokens there
    slices: dict  # {name: (B,)}, those whose value is the same for all labels of an example

    def __len__(self):
        return len(self.indices)

    def select(self, which):
        """Some of the examples: which (M,) counts from 0 to B - 1."""
        which = np.asarray(which)
        i = torch.as_tensor(which, device=self.tokens.device)
        slices = {name: values[which] for name, values in self.slices.items()}
        return Examples(
            self.indices[which], self.tokens[i], self.label_pos[i], self.answers[i], slices
        )


def load_examples(run, indices):
    """Load examples of the split -> those that have the most frequent shape, number of the others.

    A shape is a number of labels and a number of tokens without padding.
    """
    tokens, targets, slices, *_ = run.data.batch(run.config.split, 0, indices)
    is_label = targets != IGNORE_INDEX
    n_labels = is_label.sum(1)
    lengths = (tokens != run.pad).sum(1)
    shapes, shape_of_example, counts = torch.stack([n_labels, lengths], dim=1).unique(
        dim=0, return_inverse=True, return_counts=True
    )
    n, T = shapes[counts.argmax()].tolist()
    is_kept = shape_of_example == counts.argmax()
    label_pos = is_label[is_kept].nonzero()[:, 1].view(-1, n)
    answers = targets[is_kept].gather(1, label_pos)
    # As an array: numpy takes a tensor of one bool for the number 0 or 1.
    is_kept = is_kept.numpy()
    # Slices come with one value for each label.
    first_label = (n_labels.cumsum(0) - n_labels).numpy()
    example_of_label = np.repeat(np.arange(len(n_labels)), n_labels)
    example_slices = {}
    for name, values in slices.items():
        of_example = values[first_label]
        if (values == of_example[example_of_label]).all():
            example_slices[name] = of_example[is_kept]
    examples = Examples(
        np.asarray(indices)[is_kept],
        tokens[is_kept][:, :T].to(run.device),
        label_pos.to(run.device),
        answers.to(run.device),
        example_slices,
    )
    return examples, len(indices) - len(examples)


def same_form(examples):
    """The examples whose labels are at the same positions as those of the first example."""
    same = (examples.label_pos == examples.label_pos[:1]).all(1)
    return examples.select(np.flatnonzero(same.cpu().numpy()))


def in_largest_group(run, indices):
    """The indices in one eval group, the one with most of them."""
    groups = run.data.eval_groups(run.config.split)
    indices_in = [indices[np.isin(indices, np.asarray(group))] for group in groups]
    return max(indices_in, key=len)


def sample_correct_examples(run):
    """Draw run.config.n_examples of the examples that the model answers correctly -> Examples.

    They have one shape, and are balanced over the values of the first slice. ConfigError if there
    are fewer than 4.
    """
    c = run.config
    indices = correct_examples(run)
    n_correct = len(indices)
    if run.pad < 0:  # without padding, only sequences of one length fit in a batch
        indices = in_largest_group(run, indices)
    n_other_groups = n_correct - len(indices)
    message = f"only {len(indices)} examples of {c.split} are answered correctly, and 4 are needed"
    require(len(indices) >= 4, f"{message}; train it longer", None)
    order = np.random.default_rng(c.seed).permutation(len(indices))
    if c.n_examples and c.n_examples < len(indices):
        examples, _ = load_examples(run, indices[order])
        group = next(iter(examples.slices.values()), np.zeros(len(examples)))
        index_in_group = np.empty(len(examples), int)
        for value in np.unique(group):
            in_group = group == value
            index_in_group[in_group] = np.arange(in_group.sum())
        # A stable sort takes the first of every group, then the second of every group, and so on.
        balanced = np.argsort(index_in_group, kind="stable")
        indices = examples.indices[balanced[: c.n_examples]]
    examples, n_others = load_examples(run, indices)
    n_others += n_other_groups
    n_labels = examples.label_pos.shape[1]
    line = f"{len(examples)} examples answered correctly, {n_labels} labels each"
    if n_others:
        line += f"; {n_others} of other shapes left out"
    print(line)
    return examples


def logit_diff(logits, answers):
    """How far each answer is ahead of its strongest competitor.

    logits (..., vocabulary), answers (...) -> logit difference, probability of the answer, and is
    the answer the prediction; (...) each. Equal logits count as wrong.
    """
    index = answers.unsqueeze(-1)
    of_answer = logits.gather(-1, index).squeeze(-1)
    of_competitor = logits.scatter(-1, index, -torch.inf).amax(-1)
    p = logits.softmax(-1).gather(-1, index).squeeze(-1)
    return of_answer - of_competitor, p, of_answer > of_competitor


# ---- requirements --------------------------------------------------------------------------------


def require_blocks(run):
    """ConfigError unless the model is its blocks one after another, as in model.py."""
    model = run.model
    names = ("embed_tokens", "layers", "final_norm", "lm_head")
    has_all = all(hasattr(model, name) for name in names)
    require(has_all, f"it needs a model with {', '.join(names)}", None)
    positions = torch.arange(min(4, run.data.seq_len), device=run.device)[None]
    tokens = positions % run.data.vocab_size
    with torch.no_grad():
        try:
            ours = logits_at(model, tokens, positions)
            logits = model(tokens)[0]
            same = ours.shape == logits.shape and torch.allclose(ours, logits, 1e-3, 1e-3)
        except (TypeError, AttributeError, ValueError, RuntimeError):
            # The blocks of a forked model file may need more than x.
            same = False
    require(same, f"{', '.join(names)}, one after another, do not give its logits", None)


def require_heads(run):
    """ConfigError unless the mixers have heads and an output projection."""
    require_blocks(run)
    mixers = hook_points(run.model).get("mixer", {}).values()
    require(mixers, "its layers have no mixer (use_att=0)", None)
    for mixer in mixers:
        has_heads = hasattr(mixer, "n_heads") and hasattr(mixer, "out_proj")
        require(has_heads, "its mixers have no heads and out_proj", None)


# ---- forward passes from a memory layer on -------------------------------------------------------


@dataclass
class CleanRun:
    """Activations of the unchanged model, for each block that has a memory layer."""

    resid_mid: dict  # {block: (B, T, D)}, the residual stream between attention and memory
    reads: dict  # {block: reads of its memory layer}
    logits: torch.Tensor  # (B, n, vocabulary) at the labels


@in_eval_mode
def run_with_cache(model, examples):
    """Examples -> CleanRun. ConfigError for a fork whose forward pass is another one than here."""
    resid_mid = {}

    def cache(block, module, inputs):
        resid_mid[block] = inputs[0]

    blocks = list(model.memory_layers()) if hasattr(model, "memory_layers") else []
    hooks = [(model.layers[block].ffn_norm, "before", partial(cache, block)) for block in blocks]
    reads = []
    options = {"trace": reads} if blocks else {}
    with hooked(hooks):
        logits = logits_at(model, examples.tokens, examples.label_pos, **options)
    clean = CleanRun(resid_mid, dict(zip(blocks, reads)), logits)
    check_forward(model, examples, clean)
    return clean


def check_forward(model, examples, clean):
    """ConfigError unless the blocks, and forward_from each memory layer, give its logits."""
    label_pos = examples.label_pos[:1]
    expected = select_positions(model(examples.tokens[:1])[0], label_pos)
    found = [clean.logits[:1]]
    for block, reads in clean.reads.items():
        reads = {name: x[:1] for name, x in reads.items()}
        found.append(forward_from(model, block, clean.resid_mid[block][:1], reads, label_pos))
    same = all(torch.allclose(logits, expected, 1e-3, 1e-3) for logits in found)
    message = "its blocks, computed one after another as in memory.py, do not give its logits"
    require(same, message, None)


def logits_at(model, tokens, positions, **options):
    """tokens (B, T) -> logits (B, n, vocabulary) at positions (B, n). Blocks get the options."""
    x = model.embed_tokens(tokens)
    for layer in model.layers:
        x = layer(x, **options)
    return model.lm_head(model.final_norm(select_positions(x, positions)))


def select_positions(x, positions):
    """x (B, T, ...) at positions (B, n) -> (B, n, ...)"""
    example = torch.arange(len(x), device=x.device)[:, None]
    return x[example, positions]


def index_reads(reads, index):
    """Slots and weights at an index of their first dimensions, such as (example, token)."""
    return {part: reads[part][index] for part in ("slots", "weights")}


def put_reads(index, new_reads, reads):
    """The reads, with new slots and weights at an index of their first dimensions."""
    return {part: reads[part].index_put(index, x) for part, x in new_reads.items()}


@in_eval_mode
def forward_from(model, block, resid_mid, reads, label_pos):
    """Run the model from a block's memory layer on -> logits (B, n, vocabulary).

    resid_mid (B, T, D) is the residual stream before that layer, reads are what the layer reads,
    and label_pos (B, n) the positions of the logits. Nothing before the layer is computed again.
    """
    last = len(model.layers) - 1
    if block == last:
        # No later block mixes positions, so the others are not needed.
        resid_mid = gather_positions(resid_mid, label_pos)
        reads = {name: select_positions(x, label_pos) for name, x in reads.items()}
    layer = model.layers[block]
    x = layer.add(resid_mid, layer.mlp_or_memory(layer.ffn_norm(resid_mid), reads=reads))
    for i in range(block + 1, last + 1):
        x = model.layers[i](x, label_pos if i == last else None)
    return model.lm_head(model.final_norm(x))


# ---- hooks ---------------------------------------------------------------------------------------
#
# A hook is (module, when, function). "after": function(module, inputs, output) returns another
# output; "before": function(module, inputs) returns other inputs. None leaves them as they are.


@contextlib.contextmanager
def hooked(hooks):
    """Put hooks on modules in this context. They are removed at its end, also after an error."""
    handles = []
    try:
        for module, when, function in hooks:
            if when == "after":
                handles.append(module.register_forward_hook(function))
            else:
                handles.append(module.register_forward_pre_hook(function))
        yield
    finally:
        for handle in handles:
            handle.remove()


def ablate_head(out_proj, n_heads, head):
    """A hook that sets one head's output to 0, before the mixer's last projection."""

    def ablate(module, inputs):
        x = inputs[0].unflatten(-1, (n_heads, -1)).clone()  # (B, T, H, V)
        x[..., head, :] = 0
        return (x.flatten(-2),)

    return out_proj, "before", ablate


def hook_points(model):
    """Where activations can be changed -> {name: {block: module}}.

    resid_pre is the residual stream that enters a block; mixer, mlp and memory are the outputs of
    these parts, which are added to it.
    """
    points = {"resid_pre": dict(enumerate(model.layers))}
    for name, attribute in (("mixer", "att"), ("mlp", "ffn"), ("memory", "memory")):
        modules = {}
        for block, layer in enumerate(model.layers):
            module = getattr(layer, attribute, None)
            if module is not None:
                modules[block] = module
        if modules:
            points[name] = modules
    return points


def hook_output(name, module, change):
    """A hook that applies change(x) -> x to the activation x (B, T, D) of a hook point."""

    def change_input(module, inputs):
        return (change(inputs[0]), *inputs[1:])

    def change_output(module, inputs, output):
        # A memory layer also returns its reads.
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    if name == "resid_pre":
        return module, "before", change_input
    return module, "after", change_output


@in_eval_mode
def run_with_hooks(model, examples, hooks=(), intervene=None):
    """Run the whole model with hooks -> logits (B, n, vocabulary) at the labels.

    intervene: {block: function of its memory layer's reads}, which returns other reads.
    """
    options = {"intervene": intervene} if intervene else {}
    with hooked(hooks):
        return logits_at(model, examples.tokens, examples.label_pos, **options)
