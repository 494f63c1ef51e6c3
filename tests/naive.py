"""Slow twins, written from the definitions one vector, token or sequence at a time.

Tests compare our operators with them; bench.py takes some of them as the peer.
"""

import importlib.metadata
import importlib.util
import math

import numpy as np
import torch

import delta
from nanorecall.rng import IGNORE_INDEX
from nanorecall.text import BYTES

# ---- sequence mixers: B batch, T tokens, D features ----------------------------------------------


def naive_activation(name, z):
    return {
        "none": z,
        "sigmoid": 1 / (1 + torch.exp(-z)),
        "silu": z / (1 + torch.exp(-z)),
    }[name]


def taylor_features(x):
    """1, x and all products of two features, scaled so that dot products are 1 + s + s^2 / 2."""
    n = len(x)
    squares = torch.outer(x, x).flatten() / n**0.5 / 2**0.5
    return torch.cat([torch.ones(1).to(x), x / n**0.25, squares])


def naive_feature(x, kernel, norm):
    """Feature map and norm of one vector, spelled out."""
    y = {
        "none": lambda: x,
        "relu": lambda: torch.clamp(x, min=0),
        "relu2": lambda: torch.clamp(x, min=0) ** 2,
        "elu1": lambda: torch.where(x > 0, x + 1, torch.exp(torch.clamp(x, max=0))),
        "silu": lambda: x / (1 + torch.exp(-x)),
        "exp": lambda: torch.exp(x - x.max()),
        "softmax": lambda: torch.exp(x) / torch.exp(x).sum(),
        "taylor": lambda: taylor_features(x),
    }[kernel]()
    m = len(y)
    return {
        "none": lambda: y,
        "l2": lambda: y / torch.sqrt((y**2).sum() + 1e-6),
        "l1": lambda: y / (y.abs().sum() + 1e-6),
        "rms": lambda: y / torch.sqrt((y**2).sum() / m + 1e-6),
        "layer": lambda: (y - y.mean()) / torch.sqrt(((y - y.mean()) ** 2).sum() / m + 1e-5),
    }[norm]()


def naive_qkv(mixer, x, t):
    """Projections of token t of x (T, D) after the short convolution: (heads, width) each."""
    out = []
    first = 0
    for linear in (mixer.proj_q, *mixer.kv_projections()):
        y = linear.weight @ x[t]
        if mixer.conv:
            taps = mixer.conv.weight[:, first : first + len(y)]
            y = sum(taps[j] * (linear.weight @ x[t - j]) for j in range(len(taps)) if j <= t)
        first += len(y)
        out.append(y.view(mixer.n_heads if linear is mixer.proj_q else mixer.n_kv_heads, -1))
    q, *kv = out
    return q, kv[0], kv[-1]


def naive_heads(y, x, kernel, norm="none", gate=None):
    """Feature map, norm and gate of each head's vector: y (heads, width) of token x (D,)."""
    y = torch.stack([naive_feature(head, kernel, norm) for head in y])
    if gate is not None:
        y = y * naive_activation("sigmoid", gate.weight @ x).view(y.shape)
    return y


def naive_rotation(y, t):
    """Each pair of neighbouring features of y (heads, width) turned by position t."""
    z = y.clone()
    width = y.shape[1]
    for j in range(width // 2):
        angle = t * 10000.0 ** (-2 * j / width)
        cos, sin = math.cos(angle), math.sin(angle)
        z[:, 2 * j] = y[:, 2 * j] * cos - y[:, 2 * j + 1] * sin
        z[:, 2 * j + 1] = y[:, 2 * j] * sin + y[:, 2 * j + 1] * cos
    return z


def naive_attention_layer(layer, x):
    """CausalSelfAttention, either kind, on x (T, D) one vector at a time, from its weights."""
    c = layer.config
    keys, values, out = [], [], []
    for t in range(len(x)):
        q, k, v = naive_qkv(layer, x, t)
        q = naive_heads(q, x[t], c.q_kernel, c.q_norm, layer.gate_q)
        k = naive_heads(k, x[t], c.k_kernel, c.k_norm, layer.gate_k)
        if c.pos_emb == "rope":
            q, k = naive_rotation(q, t), naive_rotation(k, t)
        keys.append(k)
        values.append(naive_heads(v, x[t], c.v_kernel))
        heads = []
        for h in range(layer.n_heads):
            g = h * layer.n_kv_heads // layer.n_heads
            scores = torch.stack([q[h] @ k[g] for k in keys]) / math.sqrt(q.shape[1])
            p = torch.exp(scores - scores.max())
            heads.append(sum(weight * v[g] for weight, v in zip(p / p.sum(), values)))
        o = torch.cat(heads)
        if layer.gate_out:
            o = o * naive_activation(c.att_output_gate_act, layer.gate_out.weight @ x[t])
        out.append(layer.out_proj.weight @ o)
    return torch.stack(out)


def naive_delta_layer(layer, x):
    """DeltaNetLayer and GatedDeltaNetLayer on x (T, D) one vector at a time."""
    c = layer.config
    out = []
    states = [torch.zeros(layer.head_dims(c), dtype=x.dtype) for _ in range(c.n_heads)]
    for t in range(len(x)):
        q, k, v = naive_qkv(layer, x, t)
        q = naive_heads(q, x[t], c.q_kernel, c.q_norm, layer.gate_q)
        k = naive_heads(k, x[t], c.k_kernel, c.k_norm, layer.gate_k)
        v = naive_heads(v, x[t], c.v_kernel)
        heads = []
        for h in range(c.n_heads):
            beta = torch.ones((), dtype=x.dtype)
            if c.use_beta:
                beta = naive_activation("sigmoid", layer.proj_beta.weight[h] @ x[t] / c.lr_temp)
                beta = 2 * beta if c.allow_neg_eigval else beta
            if isinstance(layer, delta.GatedDeltaNetLayer):
                rate = layer.proj_decay.weight[h] @ x[t] + layer.dt_bias[h]
                rate = torch.log(1 + torch.exp(rate))
                states[h] = states[h] * torch.exp(-torch.exp(layer.A_log[h]) * rate)
            states[h] = states[h] + beta * torch.outer(k[h], v[h] - states[h].T @ k[h])
            o = states[h].T @ q[h] / math.sqrt(q.shape[1])
            if layer.out_norm:
                o = o / torch.sqrt((o**2).mean() + 1e-6) * layer.out_norm.weight
            heads.append(o)
        o = torch.cat(heads)
        if layer.gate_out:
            o = o * naive_activation(c.att_output_gate_act, layer.gate_out.weight @ x[t])
        out.append(layer.out_proj.weight @ o)
    return torch.stack(out)


def fla_naive(name):
    """flash-linear-attention's own pure PyTorch file, or None.

    It is loaded by its path, because the package would import triton.
    """
    if importlib.util.find_spec("einops") is None:
        return None
    try:
        path = importlib.metadata.distribution("fla-core").locate_file(f"fla/ops/{name}/naive.py")
    except importlib.metadata.PackageNotFoundError:
        return None
    spec = importlib.util.spec_from_file_location(f"fla_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- tasks ---------------------------------------------------------------------------------------


def loop_sequences(size, n, rng):
    """Zoology's MQAR, one sequence of a TaskSize after another -> tokens, targets (n, L)."""
    c, pairs = size.config, size.pairs
    half = c.vocab_size // 2
    slots = (size.length - 2 * pairs) // 2
    p = np.arange(1, slots + 1) ** (c.power_a - 1)
    tokens = np.zeros((n, size.length), np.int64)
    targets = np.full((n, size.length), IGNORE_INDEX)
    for i in range(n):
        keys = rng.choice(np.arange(1, half), pairs, replace=False)
        values = rng.choice(np.arange(half, c.vocab_size), pairs, replace=False)
        query_pos = 2 * pairs + 2 * rng.choice(slots, pairs, replace=False, p=p / p.sum())
        tokens[i, 0 : 2 * pairs : 2] = keys
        tokens[i, 1 : 2 * pairs : 2] = values
        tokens[i, query_pos] = keys
        targets[i, query_pos] = values
    return tokens, targets


def naive_mask(ids, kind):
    """Labels of one document, from the rules, letter by letter."""
    letters = letters_of(ids)
    is_text = [i not in (BYTES.pad, BYTES.bos) for i in ids]
    if kind == "text":
        keep = is_text
    elif kind == "qa" and "?" in letters:
        last = last_index(letters, "?")
        keep = [n > last and found for n, found in enumerate(is_text)]
    elif kind == "qa":
        last = last_index(letters, ":")
        keep = [n > last and found for n, found in enumerate(digit_answers(letters))]
    elif kind == "digits":
        keep = digit_answers(letters)
    elif kind == "twohop":
        keep = hop_answers(letters)
    elif kind == "hashhop":
        keep = hash_answers(letters)
    return np.where(keep, ids, IGNORE_INDEX)


def letters_of(ids):
    """An empty text stands for BOS, EOS and padding, "*" for every byte that is not ASCII."""
    letters = []
    for i in ids:
        if i > 255:
            letters.append("")
        else:
            letters.append(chr(i) if i < 128 else "*")
    return letters


def last_index(letters, mark):
    return max((n for n, letter in enumerate(letters) if letter == mark), default=-1)


def digit_answers(letters):
    """What stands between a colon and the next blank."""
    keep = []
    inside = False
    for letter in letters:
        inside = (inside or letter == ":") and not (letter == "" or letter.isspace())
        keep.append(inside and letter != ":")
    return keep


def hop_answers(letters):
    """In each word what comes after >, from its first digit on."""
    keep = []
    state = "key"
    for letter in letters:
        if letter == "" or letter.isspace():
            state = "key"
        elif state == "key" and letter == ">":
            state = "marks"
        elif state == "marks" and letter.isdigit():
            state = "answer"
        keep.append(state == "answer")
    return keep


def hash_answers(letters):
    """After COMPLETION: what stands between quotation marks, of which the first follows a =."""
    text = "".join(letter or "\0" for letter in letters)
    first = text.find("COMPLETION:") + len("COMPLETION:") if "COMPLETION:" in text else 0
    keep = []
    inside = False
    for n, letter in enumerate(letters):
        if letter == "'":
            before = text[:n].rstrip(" \n\t\r\v\f\x1c\x1d\x1e\x1f")
            inside = before.endswith("=") and not inside
        elif letter == "":
            inside = False
        keep.append(inside and letter != "'" and n >= first)
    return keep


# ---- fused decoding ------------------------------------------------------------------------------


# Does template i attend to template j before it? are_manual: are both manual templates?
SEES = {
    "isolated": lambda are_manual: False,
    "manual_cross": lambda are_manual: are_manual,
    "full": lambda are_manual: True,
}


def fused_logits(forward, prefix, question, scheme, positions, biases, generated):
    """Logits of the next token, with all tokens in one row, a mask and no cache -> (V,)

    forward(ids (1, S), positions (1, S), biases of the scores (S, S)) -> logits (S, V). biases: for
    each template, added to the scores of answer tokens on it. generated: the tokens decoded so far.
    """
    ids, position, owner = [*prefix], [*range(len(prefix))], ["prefix"] * len(prefix)
    start = end = len(prefix)
    for i, template in enumerate(question.templates):
        is_last = i == len(question.templates) - 1
        if positions == "sequential" and not is_last:
            template = [*template, question.answer_start, *question.separator]
        ids += template
        position += range(start, start + len(template))
        owner += [i] * len(template)
        end = max(end, start + len(template))
        if positions == "sequential":
            start = end
    answer = [question.answer_start, *generated]
    ids += answer
    position += range(end, end + len(answer))
    owner += ["answer"] * len(answer)
    manual = question.is_manual.tolist()
    scores = torch.full((len(ids), len(ids)), -torch.inf)
    for q, querier in enumerate(owner):
        for k, attended in enumerate(owner[: q + 1]):
            if querier == attended or attended == "prefix":
                scores[q, k] = 0
            elif querier == "answer":
                scores[q, k] = biases[attended]
            elif SEES[scheme](manual[querier] and manual[attended]):
                scores[q, k] = 0
    return forward(torch.tensor([ids]), torch.tensor([position]), scores)[-1]


def naive_decode(forward, prefix, question, scheme, positions, bias=0.0, max_new_tokens=6):
    """Decode one question with fused_logits; one bias for all templates.

    -> tokens, logits of the first one (V,)
    """
    biases = [bias] * len(question.templates)
    tokens, first_logits = [], None
    for _ in range(max_new_tokens):
        logits = fused_logits(forward, prefix, question, scheme, positions, biases, tokens)
        if first_logits is None:
            first_logits = logits
        tokens.append(int(logits.argmax()))
    return tokens, first_logits
