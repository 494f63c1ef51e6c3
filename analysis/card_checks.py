"""What the report card asks of a model before it is trained, and what a training step costs.

A check returns "" if the model passes, else what it does wrong, as the end of a sentence.

Letters: B sequences, T tokens, V vocabulary, N labelled positions.
"""

import time

import torch
import torch.nn.functional as F

import train
from nanorecall.build import (
    build_data,
    build_model,
    build_model_config,
    count_parameters,
    inference_state_bytes,
)
from nanorecall.rng import IGNORE_INDEX
from nanorecall.settings import ConfigError, printable, require

# A later token must not change an earlier logit. Float32 sums differ by about 1e-6 of it.
TOLERANCE = 1e-4
# The tokens from here on are changed. Few are multiples of a chunk: a mixer may leak inside one.
CUTS = (1, 2, 7, 16, 31, 50, 64, 95)


def new_model(argv):
    """A new model of this command line of train.py, with the weights of its seed."""
    settings = train.parse(argv)
    return build_model(settings, build_model_config(settings, build_data(settings)))


def example_batch(model_args, T=96):
    """A new model, tokens (3, T), and targets (3, T) at about a third of the positions."""
    model = new_model([*model_args, f"--input_seq_len={T}", "--num_kv_pairs=4", "--vocab_size=64"])
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(64, (3, T), generator=generator)
    is_label = torch.rand(tokens.shape, generator=generator) < 0.3
    # A part that starts at zero would hide what it does until it is trained.
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn(p.shape, generator=generator)
    return model, tokens, torch.where(is_label, tokens.flip(1), IGNORE_INDEX)


def differs(a, b):
    """The largest difference of logits a and b (..., V) at each position (...), 0 if tolerated."""
    scale = max(1.0, float(b.detach().abs().max()))
    difference = (a - b).detach().abs().amax(-1)
    # Not ">", which is false for a NaN on either side.
    is_equal = difference <= TOLERANCE * scale
    return torch.where(is_equal, 0.0, difference.nan_to_num(nan=torch.inf))


def contract(model, tokens, targets):
    """Logits (N, V) and mean loss at the labelled positions; every parameter has a gradient."""
    logits, loss = model(tokens)
    if logits.shape != (*tokens.shape, 64) or loss is not None:
        return f"without targets it returns {tuple(logits.shape)}, not logits (B, T, V) and None"
    scored, loss = model(tokens, targets)
    is_label = targets != IGNORE_INDEX
    expected = logits[is_label]
    if scored.shape != expected.shape or differs(scored, expected).any():
        return "with targets, its logits are not those of the labelled positions in order"
    if (loss - F.cross_entropy(expected, targets[is_label])).abs() > TOLERANCE * 10:
        return "its loss is not the mean cross-entropy of the labels"
    loss.backward()
    for name, p in model.named_parameters():
        if p.grad is None or not p.grad.abs().max() > 0:
            return f"the parameter {name} gets no gradient"
    return ""


@torch.no_grad()
def causality(model, tokens, targets):
    """No logit depends on a later token."""
    logits, _ = model(tokens)
    for cut in CUTS:
        changed = tokens.clone()
        changed[:, cut:] = (changed[:, cut:] + 1) % 64
        change = differs(model(changed)[0], logits)[:, :cut].amax(0)  # of each earlier position
        if change.any():
            position = int(change.argmax()) + 1
            size = f"its logits at token {position} change by {change.max():.2g}"
            return f"{size} when only the tokens after token {cut} change"
    return ""


@torch.no_grad()
def independence(model, tokens, targets):
    """No sequence depends on another one of the batch."""
    changed = tokens.clone()
    changed[1] = (changed[1] + 1) % 64
    change = differs(model(changed)[0], model(tokens)[0])[[0, 2]]
    if change.any():
        return f"its logits change by {change.max():.2g} with another sequence of the batch"
    return ""


def decoding(model, tokens, targets):
    """Half of the tokens at once, then one at a time, gives the logits of all at once."""
    if not hasattr(model, "forward_cached"):
        return "it has no forward_cached, so it cannot decode"
    half = tokens.shape[1] // 2
    try:
        logits, cache = model.forward_cached(tokens[:, :half], None)
        decoded = [logits]
        for t in range(half, tokens.shape[1]):
            logits, cache = model.forward_cached(tokens[:, t : t + 1], cache)
            decoded.append(logits)
    except ConfigError as e:  # a mixer without a cache
        return str(e)
    with torch.no_grad():
        change = differs(torch.cat(decoded, dim=1), model(tokens)[0])
    if change.any():
        position = int(change.amax(0).argmax()) + 1
        return f"decoded logits differ by {change.max():.2g} at token {position} from those at once"
    return ""


# Those that are needed to compare results; the others are findings.
NEEDED = {"contract": contract, "causality": causality, "independence": independence}
CHECKS = {**NEEDED, "decoding": decoding}
ADVICE = {
    "contract": "see `python -m pytest tests/test_contract.py --model=...`",
    "causality": "so it reads answers that come later; mask them",
    "independence": "sequences must not mix; no statistics over the batch",
}


# What the code of a mixer raises that does not do what the checks ask for.
WRONG_CODE = (RuntimeError, TypeError, ValueError, LookupError, AttributeError)


def check_model(model_args, name):
    """{check: "" or what is wrong}; ConfigError if a needed check fails."""
    found = {}
    for check, function in CHECKS.items():
        try:
            model, tokens, targets = example_batch(model_args)
            found[check] = function(model.eval(), tokens, targets)
        except WRONG_CODE as e:
            found[check] = f"it ends in {type(e).__name__}: {printable(str(e))}"
        if check in NEEDED:
            message = f"{name} fails {check}: {found[check]}; {ADVICE[check]}"
            require(not found[check], message, None)
    return found


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
        for _ in range(
            repeats + 1
        ):  # the first one warms up; in turn, so that both see one machine
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
