"""What the report card asks of a model before it is trained, and what a training step costs.

A check returns "" if the model passes, else what it does wrong, as the end of a sentence.

Letters: B sequences, T tokens, V vocabulary, N labelled positions.
"""

import functools
import inspect
import os
import time
import traceback

import torch

import train
from model import NEEDS_DOCUMENTS, GPTBlock
from nanorecall.build import (
    build_data,
    build_model,
    build_model_config,
    count_parameters,
    inference_state_bytes,
)
from nanorecall.model_checks import (
    INDEPENDENCE_ADVICE,
    PACKING_ADVICE,
    causality_problem,
    decoding_problem,
    describe_output,
    differences,
    independence_problem,
    is_repeatable,
    labels_problem,
    loss_problem,
    packing_problem,
    training_copy,
)
from nanorecall.rng import IGNORE_INDEX
from nanorecall.settings import ConfigError, RunError, printable, require

# A later token must not change an earlier logit. Float32 sums differ by about 1e-6 of it.
TOLERANCE = 1e-4
# Tokens in the checks. A mixer may leak or fail in long sequences only; tests have up to 1,024.
SHORT, LONG = 96, 1024
# The tokens from here on are changed. Few are multiples of a chunk: a mixer may leak inside one.
CUTS = {SHORT: (1, 2, 7, 16, 31, 50, 64, 95), LONG: (1, 300, 777)}


def new_model(argv):
    """A new model of this command line of train.py, with the weights of its seed."""
    settings = train.parse(argv)
    return build_model(settings, build_model_config(settings, build_data(settings)))


def example_batch(model_args, T=SHORT):
    """A new model, and example_inputs."""
    model = new_model([*model_args, f"--input_seq_len={T}", "--num_kv_pairs=4", "--vocab_size=64"])
    return model, *example_inputs(model, T)


def example_inputs(model, T=SHORT):
    """Tokens (3, T) of 64, and targets (3, T) at about a third of the positions.

    The model's weights get some noise: a part that starts at zero would hide what it does until it
    is trained.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(64, (3, T), generator=generator)
    is_label = torch.rand(tokens.shape, generator=generator) < 0.3
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn(p.shape, generator=generator)
    return tokens, torch.where(is_label, tokens.flip(1), IGNORE_INDEX)


def shapes(model, tokens, targets):
    """The mixer in a block of model.py returns what it takes."""

    def check(mixer, inputs, output):
        # Added to the residual stream, an output of (B, T, 1) would be one of (B, T, D).
        expected = f"{inputs[0].dtype} {tuple(inputs[0].shape)}"
        found = type(output).__name__
        if torch.is_tensor(output):
            found = f"{output.dtype} {tuple(output.shape)}"
        message = f"the mixer takes {expected} and returns {found}"
        require(found == expected, message, None)

    for layer in getattr(model, "layers", ()):
        # A block of its own may take other outputs.
        if getattr(type(layer), "mix", None) is GPTBlock.mix and layer.att is not None:
            layer.att.register_forward_hook(check)
    try:
        model(tokens)
    except ConfigError as e:
        return str(e)
    return ""


def contract(model, tokens, targets):
    """Logits (N, V) and mean loss at the labelled positions; every parameter has a gradient."""
    output = model(tokens)
    is_pair = isinstance(output, (tuple, list)) and len(output) == 2
    if not is_pair or not torch.is_tensor(output[0]):
        return f"it returns {describe_output(output)}, not logits and loss"
    logits, loss = output
    if logits.shape != (*tokens.shape, 64) or loss is not None:
        return f"without targets it returns {tuple(logits.shape)}, not logits (B, T, V) and None"
    if not torch.isfinite(logits).all():
        return "its logits are not finite"
    if differences(model(tokens)[0], logits, TOLERANCE).any():
        return "a second call with the same tokens gives other logits in eval mode"
    scored, loss = model(tokens, targets)
    problem = labels_problem(scored, logits, targets, TOLERANCE)
    if problem:
        return f"with targets, it {problem}"
    problem = loss_problem(scored, loss, targets, 64, TOLERANCE)
    if problem:
        return f"it {problem}"
    loss.backward()
    for name, p in model.named_parameters():
        if p.requires_grad and (p.grad is None or not p.grad.abs().max() > 0):
            return f"the parameter {name} gets no gradient"
    return ""


def logits_of(model, tokens, is_training):
    """Logits (B, T, V) in training with targets, or in eval mode without."""
    if not is_training:
        with torch.no_grad():
            return model(tokens)[0]
    with training_copy(model, tokens.device) as training:
        return training(tokens, tokens.roll(-1, 1))[0].unflatten(0, tokens.shape)


def in_each_mode(find_problem, model, tokens, *args):
    """What find_problem(logits_of, tokens, 64, TOLERANCE, *args) says, in eval mode if in both."""
    # A random source of its own would look like a change.
    modes = (False, True) if is_repeatable(model, tokens, TOLERANCE) else (False,)
    for is_training in modes:
        logits = functools.partial(logits_of, model, is_training=is_training)
        problem = find_problem(logits, tokens, 64, TOLERANCE, *args)
        if problem:
            return f"in training mode {problem}" if is_training else problem
    return ""


def causality(model, tokens, targets):
    """No logit depends on a later token."""
    return in_each_mode(causality_problem, model, tokens, CUTS[tokens.shape[1]])


def independence(model, tokens, targets):
    """No sequence depends on another one of the batch."""
    return in_each_mode(independence_problem, model, tokens)


def documents(model, tokens, targets):
    """Documents packed into one sequence have the logits that each has alone, or are refused."""
    if "cu_seqlens" not in inspect.signature(model.forward).parameters:
        return ""
    T = tokens.shape[1]
    lengths = (T // 2, T // 3, T - T // 2 - T // 3)
    pieces, ends = [], [0]
    for row, length in zip(tokens, lengths):
        pieces.append(row[:length])
        ends.append(ends[-1] + length)
    try:
        with torch.no_grad():
            return packing_problem(model, torch.cat(pieces)[None], ends, TOLERANCE)
    except NotImplementedError:  # it does not take packed documents, and says so
        return ""
    except ConfigError as e:  # so does a mixer without them; anything else is a fault
        return "" if str(e).startswith(NEEDS_DOCUMENTS) else str(e)


def decoding(model, tokens, targets):
    """Half of the tokens at once, then a quarter, then one at a time, as all at once."""
    if not hasattr(model, "forward_cached"):
        return "it has no forward_cached, so it cannot decode"
    try:
        return decoding_problem(model, tokens, 64, TOLERANCE)
    except ConfigError as e:  # a mixer without a cache
        return str(e)


# Those that are needed to compare results; the others are findings.
NEEDED = {
    "shapes": shapes,
    "contract": contract,
    "causality": causality,
    "independence": independence,
    "documents": documents,
}
CHECKS = {**NEEDED, "decoding": decoding}
ADVICE = {
    "shapes": "; its output must have the shape and dtype of its input, (B, T, D)",
    "causality": "; so it reads answers that come later; mask them",
    "independence": f"; {INDEPENDENCE_ADVICE}",
    "documents": f"; {PACKING_ADVICE}; or raise NotImplementedError if there are documents",
}


def check_all(recall_args, parity_args, name):
    """{check: "" or the first finding} in each situation of the trainings.

    ConfigError if a needed check fails.
    """
    situations = {
        f"{SHORT} tokens": (recall_args, SHORT),
        "the model for parity": (parity_args, SHORT),
        f"{LONG:,} tokens": (recall_args, LONG),
    }
    found = dict.fromkeys(CHECKS, "")
    for where, (model_args, T) in situations.items():
        for check in CHECKS:
            problem = run_check(check, functools.partial(example_batch, model_args, T))
            message = f"{name} fails {check} with {where}: {problem}"
            require(check not in NEEDED or not problem, message, None)
            found[check] = found[check] or problem
    return found


def run_check(check, make_example):
    """Check what make_example() returns: a model, tokens and targets.

    -> "" or what is wrong and what to do about it, as the end of a sentence.
    """
    try:
        model, *inputs = make_example()
        problem = CHECKS[check](model.eval(), *inputs)
    except (ConfigError, RunError):
        raise
    except (Exception, SystemExit) as e:  # the code of a mixer may raise anything
        return f"it ends in {type(e).__name__} at {raised_at(e)}: {printable(str(e))}"
    return problem and problem + ADVICE.get(check, "")


def raised_at(error):
    """File and line where an error comes from, outside of torch."""
    torch_folder = os.path.dirname(torch.__file__)
    lines = []
    for frame in traceback.extract_tb(error.__traceback__):
        if not frame.filename.startswith(torch_folder):
            lines.append(f"{os.path.basename(frame.filename)}:{frame.lineno}")
    return lines[-1]


# ---- sizes and cost ------------------------------------------------------------------------------

LENGTHS = (128, 256, 512, 1024)
STEP_TOKENS = 4096


def layer_parameters(model_args):
    return count_parameters(new_model(model_args))["layers"]


def state_bytes(model_args):
    """{tokens: bytes of the state of one sequence, or None if it cannot decode}"""
    sizes = {}
    for T in (256, 1024):
        model = new_model([*model_args, f"--input_seq_len={T}"])
        sizes[str(T)] = inference_state_bytes(model, T)
    return sizes


def relative_cost(model_args, reference_args, repeats=3):
    """{tokens: CPU time of forward and backward over 4,096 tokens, relative to the reference}"""
    ratios = {}
    for T in LENGTHS:
        models = []
        for args in (model_args, reference_args):
            models.append(new_model([*args, f"--input_seq_len={T}"]))
        times = [[], []]
        # The first one warms up. They take turns, so that both see one machine.
        for _ in range(repeats + 1):
            for model, of_model in zip(models, times):
                of_model.append(step_seconds(model, T))
        seconds, reference = (min(of_model[1:]) for of_model in times)
        ratios[str(T)] = seconds / reference
    return ratios


def step_seconds(model, T):
    """CPU seconds of a training step without the optimizer; a quarter of the tokens is scored."""
    tokens = torch.randint(2048, (STEP_TOKENS // T, T), generator=torch.Generator().manual_seed(0))
    targets = tokens.roll(-1, 1)
    targets[:, : 3 * T // 4] = IGNORE_INDEX
    start = time.process_time()
    model(tokens, targets)[1].backward()
    return time.process_time() - start
