"""A user's model is tried on two sequences before it is trained, and before it decodes.

Training would end in an error of torch that does not say what a model must return, or in a number
that is too good: of a model that reads the answers. Decoding would write what the model did not
learn.

Letters: B sequences, T tokens, N labelled positions.
"""

import contextlib
import copy
import functools
import importlib
import inspect
import random
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from nanorecall.attention import check_window, softmax_attention
from nanorecall.build import enough_memory, training_advice
from nanorecall.distributed import is_out_of_memory
from nanorecall.metrics import autocast, eval_batches, evaluating, in_eval_mode
from nanorecall.rng import IGNORE_INDEX
from nanorecall.settings import ConfigError, RunError, last_line, require, say
from nanorecall.source_files import is_main_rank, is_users_file

CONTRACT = "Model(config) must take tokens and targets, both (B, T), and return logits"
CONTRACT += " (N, vocab_size) of the N labelled positions and their mean cross-entropy"
# How much logits of size 1 may differ by rounding, in the dtypes of training.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.05}


def is_users_model(settings):
    return is_users_file(settings.model_module, settings.files)


@contextlib.contextmanager
def users_errors(module, files, name, contract, key):
    """An error of a user's module in the block becomes a ConfigError that names file and line.

    name: the module in the user's words. contract: what it must do. key: the setting that has it.
    """
    try:
        yield
    except (ConfigError, RunError):
        raise
    except (Exception, SystemExit) as e:  # the user's code may raise anything
        if is_out_of_memory(e) or not is_users_file(module, files):
            raise
        where = last_line(e, module.__file__, files)
        error = " ".join(f"{type(e).__name__}: {e}".split())  # some have several lines
        message = f"{where}: {name} does not run ({error}); {contract}"
        raise ConfigError(message, key) from None


@contextlib.contextmanager
def named_errors(settings):
    """users_errors of the model."""
    name = settings.train.model
    with users_errors(settings.model_module, settings.files, name, CONTRACT, "model"):
        yield


def check_users_model(model, settings, data, device, dtype):
    """ConfigError unless a user's model returns logits and loss, and sees what it may see."""
    # A sharded table may be too large for one device.
    if not is_users_model(settings) or getattr(model, "column_sharded", tuple)():
        return
    indices = next(eval_batches(data, "val", 1), None)
    require(indices is not None, "the data has no group of examples in val", "data")
    tokens, targets, _, *cu_seqlens = data.batch("val", 0, indices)
    inputs = [x.to(device) for x in (tokens, targets, *cu_seqlens)]
    n_labels = int((targets != IGNORE_INDEX).sum())
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    with enough_memory(lambda: training_advice(model, device)), named_errors(settings):
        model.to(device)
        with evaluating(model), autocast(device, dtype):
            output = model(*inputs)
    problem = output_problem(output, n_labels, data.vocab_size)
    file = settings.model_module.__file__
    check_parameters(model, settings.files)
    message = f"{file}: {settings.train.model} returns {problem}; {CONTRACT}"
    require(not problem, message, "model")
    check_logits(model, settings, inputs[0][:1], data.vocab_size, device, dtype)
    with trial(model, settings, device, dtype):
        check_windows(model)
    new = {name for name, t in model.state_dict().items() if shapes.get(name) != t.shape}
    message = f"{file}: {settings.train.model} makes or changes {', '.join(sorted(new))} in forward"
    advice = "so no checkpoint would fit a new model; make it in __init__, or with persistent=False"
    require(not new, f"{message}, {advice}", "model")
    # Data that packs documents does so in training only.
    indices = list(data.batch_indices(0, 2))[:2]
    tokens, _, _, *cu_seqlens = data.batch("train", 0, indices)
    if not cu_seqlens:
        return
    message = f"{file}: {settings.train.model} cannot be trained on packed documents: its forward"
    advice = "must take (tokens, targets, cu_seqlens); or leave out pack_documents"
    require(takes_documents(model), f"{message} {advice}", "model")
    with trial(model, settings, device, dtype):
        ends = cu_seqlens[0].tolist()
        problem = packing_problem(model, tokens.to(device), ends, TOLERANCES[dtype])
    message = f"{file}: {settings.train.model} mixes packed documents: {problem}"
    require(not problem, f"{message}; {PACKING_ADVICE}", "model")


def takes_documents(model):
    """Can forward be called with tokens, targets and the ends of packed documents?"""
    try:
        inspect.signature(model.forward).bind("tokens", "targets", "cu_seqlens")
    except TypeError:
        return False
    return True


@contextlib.contextmanager
def trial(model, settings, device, dtype):
    """Eval mode in this context; a user's error becomes a ConfigError."""
    with named_errors(settings), evaluating(model), autocast(device, dtype):
        yield


def check_logits(model, settings, tokens, vocab_size, device, dtype):
    """ConfigError if logits of tokens (1, T) depend on what they must not, or are out of order.

    Also in training mode: a norm over the batch lets the loss depend on later tokens.
    """
    name = f"{settings.model_module.__file__}: {settings.train.model}"
    tolerance = TOLERANCES[dtype]
    other = (tokens + 1) % vocab_size
    two = torch.cat([tokens, other])
    where = cuts(tokens.shape[1])
    with trial(model, settings, device, dtype):
        once, again = (first_logits(model, tokens) for _ in range(2))
        is_random = differences(once, again, tolerance).any()
        message = f"{name} gives other logits for the same tokens in eval mode; dropout must not be"
        message += " applied there: F.dropout(x, p, self.training)"
        require(not is_random, message, "model")
        modes = (False, True)
        if not is_repeatable(model, tokens, tolerance):
            modes = (False,)
            if is_main_rank():
                note = "in training mode it is random, so only eval mode was tried on later tokens"
                say(f"note: {name}: {note}", file=sys.stderr)
    for is_training in modes:
        logits_of = functools.partial(first_logits, model, is_training=is_training)
        with trial(model, settings, device, dtype), raise_small_parameters(model):
            leak = causality_problem(logits_of, tokens, vocab_size, tolerance, where)
            mixing = independence_problem(logits_of, two, vocab_size, tolerance)
        mode = "in training mode " if is_training else ""
        message = f"{name} reads tokens that come later: {mode}{leak}; mask them"
        if is_training:
            message += ", or draw the same random numbers for any tokens"
        require(not leak, message, "model")
        message = f"{name} mixes sequences: {mode}{mixing}; {INDEPENDENCE_ADVICE}"
        require(not mixing, message, "model")
    number = torch.arange(two.numel(), device=device).view_as(two)
    # Other positions in each of the sequences.
    targets = torch.where(number % 7 % 3 == 1, two, IGNORE_INDEX)
    with trial(model, settings, device, dtype):
        logits = torch.cat([first_logits(model, tokens), first_logits(model, other)])
        scored, loss = model(two, targets)
        problem = labels_problem(scored, logits, targets, tolerance)
        of_loss = loss_problem(scored, loss, targets, vocab_size, tolerance)
    require(not problem, f"{name} {problem}; {CONTRACT}", "model")
    if of_loss and is_main_rank():
        use = "log.jsonl, curves.png and stage_loss take the loss, evaluations the logits"
        say(f"note: {name} {of_loss}; {use}", file=sys.stderr)


def is_repeatable(model, tokens, tolerance):
    """Does it give the same logits twice in training mode? Not with a random source of its own."""
    try:
        once, again = (first_logits(model, tokens, is_training=True) for _ in range(2))
    except (TypeError, RuntimeError):  # it cannot be copied: it keeps an activation, for example
        return False
    return not differences(once, again, tolerance).any()


def first_logits(model, tokens, is_training=False):
    """Logits (1, T, V) of the first sequence of tokens (B, T).

    In training mode those of a copy, whose statistics may change, without dropout of vectors.
    """
    # The targets are next tokens: a model that reads them reads ahead.
    targets = tokens.roll(-1, 1)
    targets[1:] = IGNORE_INDEX
    if not is_training:
        return model(tokens, targets)[0].detach()[None]
    with training_copy(model, tokens.device) as training:
        return training(tokens, targets)[0].detach()[None]


@contextlib.contextmanager
def training_copy(model, device):
    """A copy of the model in training mode, in a context without random numbers.

    Running statistics change with every call, but not those of the model.
    """
    kept = {}  # activations that a module keeps, which torch does not copy
    for module in model.modules():
        for value in vars(module).values():
            if torch.is_tensor(value) and not value.is_leaf:
                kept[id(value)] = value.detach()
    with same_random_numbers(device), WithoutNoise():
        yield copy.deepcopy(model, kept).train()


DROPOUTS = (
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout),
    *(F.alpha_dropout, F.feature_alpha_dropout),
)


CONSTANT = {torch.rand: 0.5, torch.rand_like: 0.5, torch.randn: 0.0, torch.randn_like: 0.0}


class WithoutNoise(TorchFunctionMode):
    """A context in which dropout of vectors returns its input, and random numbers are constant.

    The same seed does not give the same masks if tokens decide where they go, as to one of several
    experts: one that goes elsewhere takes the random numbers of the next. Dropout of attention
    takes as many numbers for any tokens, so it may stay.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in DROPOUTS:
            return args[0] if args else kwargs["input"]
        result = func(*args, **kwargs)
        return torch.full_like(result, CONSTANT[func]) if func in CONSTANT else result


@contextlib.contextmanager
def same_random_numbers(device):
    """In this context, torch, NumPy and Python draw the same numbers each time."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            random.seed(0)
            np.random.seed(0)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def check_decoding(model, settings, data, device):
    """ConfigError if a user's model decodes other logits than those of all tokens at once."""
    if not is_users_model(settings):
        return
    tokens = data.batch("val", 0, next(eval_batches(data, "val", 1)))[0].to(device)
    with named_errors(settings):
        # Trained weights enlarge what rounding changes.
        problem = decoding_problem(model, tokens, data.vocab_size, 1e-3, most=32)
    file = settings.model_module.__file__
    message = f"{file}: forward_cached of {settings.train.model} is no decoding: {problem}"
    require(not problem, message, None)


def check_parameters(model, files):
    """ConfigError if a user's file has weights outside of the model, or a module in a plain list.

    The optimizer would never see them. files: paths of the user's files.
    """
    for name, p in model.named_parameters():
        advice = "keep its real and imaginary parts as a real one, for torch.view_as_complex"
        require(not p.is_complex(), f"{type(model).__name__}: {name} is complex; {advice}", "model")
    known = {id(p) for p in model.parameters()}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            hidden = [p for p in weights_in(value) if p.requires_grad and id(p) not in known]
            where = f"{name}.{attribute}".lstrip(".")
            message = f"{type(model).__name__}: {where} holds weights that would not be trained or"
            advice = "saved; put modules into nn.ModuleList or nn.ModuleDict, tensors into"
            require(not hidden, f"{message} {advice} nn.Parameter", "model")
    for module in list(sys.modules.values()):
        if not is_users_file(module, files):
            continue
        for name, value in vars(module).items():
            parameters = [value] if isinstance(value, torch.nn.Parameter) else []
            if isinstance(value, torch.nn.Module):
                parameters = value.parameters()
            is_trained = all(id(p) in known or not p.requires_grad for p in parameters)
            message = f"{module.__file__}: {name} is no part of the model, so it would not be"
            advice = f"make it in __init__ of the class that uses it (self.{name} = ...)"
            require(is_trained, f"{message} trained; {advice}", "model")


def check_windows(model):
    """ConfigError if an attention function of a user's sees more than the window of its layer."""
    forward = importlib.import_module("model").CausalSelfAttention.forward
    for layer in model.modules():
        # Another forward may call it with other arguments, and mask by itself.
        is_ours = getattr(type(layer), "forward", None) is forward
        if is_ours and layer.attention_fn is not softmax_attention:
            check_window(layer.attention_fn, layer)


def weights_in(value, depth=3):
    """Tensors without a history in an attribute of a module: in lists, dicts, modules in them."""
    if torch.is_tensor(value):
        return [value] if value.is_leaf else []
    if isinstance(value, torch.nn.Module):
        return list(value.parameters())
    if isinstance(value, dict):
        value = list(value.values())
    found = []
    if isinstance(value, (list, tuple)) and depth > 0:
        for item in value:
            found += weights_in(item, depth - 1)
    return found


@contextlib.contextmanager
def raise_small_parameters(model, size=0.02):
    """In this context, trained parameters that are near 0 are between 0 and `size`.

    A gate that starts at 0 hides what is behind it until it is trained. Others stay as they are.
    """
    generator = torch.Generator().manual_seed(0)
    kept = []
    try:
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad and p.is_floating_point() and not (p.abs() >= size).any():
                    kept.append((p, p.clone()))
                    p.copy_(size * torch.rand(p.shape, generator=generator))
        yield
    finally:
        with torch.no_grad():
            for p, values in kept:
                p.copy_(values)


def cuts(T):
    """Where to change later tokens. Few are multiples of a chunk, inside of which a model may leak.

    All are of sequences of length T, so none is 0 or T.
    """
    return sorted({1, T // 3, T // 2, T - 1} - {0, T})


def causality_problem(logits_of, tokens, vocab_size, tolerance, cuts):
    """How logits depend on later tokens, as the end of a sentence; "" if they do not.

    logits_of: tokens (B, T) -> their logits (B, T, V). cuts: the tokens from there on are changed.
    tolerance: of logits of size 1.
    """
    logits = logits_of(tokens)
    for cut in cuts:
        changed = tokens.clone()
        # Not a permutation, which a mean over all tokens would not show.
        changed[:, cut:] = (changed[:, cut:] + 1) % vocab_size
        change = differences(logits_of(changed), logits, tolerance)[:, :cut].amax(0)
        if change.any():
            position = int(change.argmax()) + 1
            size = f"its logits at token {position} change by {change.max():.2g}"
            return f"{size} when only the tokens after token {cut} change"
    return ""


def labels_problem(scored, logits, targets, tolerance):
    """How the logits that a model returns with targets (B, T) differ from logits (B, T, V).

    As the end of a sentence; "" if they are those of the labelled positions.
    """
    expected = logits[targets != IGNORE_INDEX]
    if scored.shape != expected.shape or differences(scored, expected, tolerance).any():
        return "returns logits that are not those of the labelled positions in order"
    return ""


def loss_problem(logits, loss, targets, vocab_size, tolerance):
    """How a loss differs from the mean cross-entropy of logits (N, V), as the end of a sentence."""
    logits, loss = logits.detach(), loss.detach()
    # A model may pad its vocabulary, and its loss leave the padding out.
    for V in (vocab_size, logits.shape[1]):
        expected = F.cross_entropy(logits[:, :V].float(), targets[targets != IGNORE_INDEX])
        # Not ">", which is false for a NaN.
        if (loss - expected).abs() <= 10 * tolerance * max(1.0, float(expected)):
            return ""
    found = f"returns a loss of {float(loss):.4g} where the mean cross-entropy of its labels is"
    return f"{found} {float(expected):.4g}"


@in_eval_mode
def decoding_problem(model, tokens, vocab_size, tolerance, most=None):
    """How decoded logits differ from those of all tokens (B, T) at once (see causality_problem).

    Half of the tokens are read at once, then the others but the last quarter, and these one at a
    time; at most `most`.
    """
    T = tokens.shape[1]
    n_single = T // 4 if most is None else min(T // 4, most)
    sizes = [T // 2, T - T // 2 - n_single, *[1] * n_single]
    pieces = tokens.split([size for size in sizes if size > 0], dim=1)
    decoded, cache = [], None
    for piece in pieces:
        if len(decoded) == 1:
            # The cache must stay as it was, so that other tokens can follow instead.
            model.forward_cached((piece + 1) % vocab_size, cache)
        logits, cache = model.forward_cached(piece, cache)
        decoded.append(logits)
    at_once = model(tokens)[0]
    for logits in (decoded[0], at_once):  # one rounding of them is no difference
        tolerance = max(tolerance, torch.finfo(logits.dtype).eps)
    change = differences(torch.cat(decoded, dim=1), at_once, tolerance)
    if change.any():
        position = int(change.amax(0).argmax()) + 1
        return f"decoded logits differ by {change.max():.2g} at token {position} from those at once"
    return ""


INDEPENDENCE_ADVICE = "sequences must not mix; no statistics over the batch"


def independence_problem(logits_of, tokens, vocab_size, tolerance):
    """How logits of others depend on the second sequence of the batch (see causality_problem)."""
    changed = tokens.clone()
    changed[1:2] = (changed[1:2] + 1) % vocab_size
    change = differences(logits_of(changed), logits_of(tokens), tolerance)
    change[1:2] = 0
    if change.any():
        return f"its logits change by {change.max():.2g} with another sequence of the batch"
    return ""


def differences(a, b, tolerance):
    """The largest difference of logits a and b (..., V) at each position (...), 0 if tolerated.

    tolerance: of logits of size 1.
    """
    scale = max(1.0, float(b.detach().abs().max()))
    difference = (a - b).detach().abs().amax(-1)
    # Not ">", which is false for a NaN on either side.
    is_equal = difference <= tolerance * scale
    return torch.where(is_equal, 0.0, difference.nan_to_num(nan=torch.inf))


PACKING_ADVICE = "no token may see another document (doc_id of `documents` says which is whose)"


def packing_problem(model, tokens, ends, tolerance):
    """How packed documents differ from each of them alone, as a part of a sentence; "" if not.

    tokens (1, T); document d is tokens ends[d] to ends[d + 1]. tolerance: of logits of size 1.
    """
    # A token is its own target, so all positions are scored.
    packed = model(tokens, tokens, torch.tensor(ends, device=tokens.device))[0].detach()
    for number, (start, end) in enumerate(zip(ends, ends[1:]), 1):
        document = tokens[:, start:end]
        alone = model(document, document)[0].detach()
        difference = differences(packed[start:end], alone, tolerance).max()
        if difference > 0:
            found = f"the logits of document {number} of {len(ends) - 1} packed ones differ by"
            return f"{found} {difference:.2g} from those of the same document alone"
    return ""


def output_problem(output, n_labels, vocab_size):
    """What a model returns in place of logits and loss, as a part of a sentence; "" if nothing."""
    if not isinstance(output, (tuple, list)) or len(output) != 2:
        return describe_output(output)
    logits, loss = output
    # More logits than tokens are no error: some models pad their vocabulary.
    is_floating = torch.is_tensor(logits) and logits.is_floating_point()
    if not is_floating or logits.ndim != 2 or len(logits) != n_labels:
        return f"as logits {describe_output(logits)} for {n_labels} labels"
    if logits.shape[1] < vocab_size:
        return f"logits of {logits.shape[1]} tokens with a vocab_size of {vocab_size}"
    if not torch.is_tensor(loss) or not loss.is_floating_point() or loss.numel() != 1:
        return f"as loss {describe_output(loss)}, not one number"
    return "" if loss.requires_grad else "a loss that has no gradient"


def describe_output(output):
    if torch.is_tensor(output):
        return f"a tensor {tuple(output.shape)} of {output.dtype}"
    if isinstance(output, (tuple, list)):
        return f"a {type(output).__name__} of {len(output)} items"
    return f"a {type(output).__name__}"
