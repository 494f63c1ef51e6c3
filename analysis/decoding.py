"""Greedy decoding of examples, and the kinds of errors that a model makes on HashHop.

    python eval.py runs/RUN --print_examples 8
    python eval.py hashhop runs/RUN

Letters: B examples, T tokens.
"""

from functools import partial

import numpy as np
import torch

from analysis.trained_run import map_batches, require_decoding, save_result
from nanorecall.metrics import autocast, eval_batches, print_table
from nanorecall.plots import figure, finish_figure
from nanorecall.rng import IGNORE_INDEX
from nanorecall.stats import format_ci, proportion


def greedy_decode(model, tokens, count):
    """The count >= 1 most likely tokens after tokens (B, T), one at a time -> (B, count)."""
    logits, cache = model.forward_cached(tokens)
    decoded = [logits[:, -1:].argmax(-1)]  # (B, 1)
    while len(decoded) < count:
        logits, cache = model.forward_cached(decoded[-1], cache)
        decoded.append(logits.argmax(-1))
    return torch.cat(decoded, dim=1)


def decode_example(run, index):
    """One example as text -> {"example", "prompt", "answer", "model"}; "model" is what it writes.

    The model reads its own tokens, so after its first error it may differ from what the accuracy
    of labels counts. The two agree on which examples are correct as a whole.
    """
    tokens, targets, *_ = run.data.batch(run.config.split, 0, [index])
    labelled = np.flatnonzero(targets[0] != IGNORE_INDEX)
    if len(labelled) == 0:
        prompt, nothing = run.text(tokens[0]), "(this example has no labels)"
        return {"example": int(index), "prompt": prompt, "answer": "", "model": nothing}
    # An MQAR sequence has several answers. The first one ends where labels are not adjacent.
    start = labelled[0]
    answer = labelled[labelled - np.arange(len(labelled)) == start]
    prompt = tokens[:, : start + 1]
    with autocast(run.device, run.dtype):
        decoded = greedy_decode(run.model, prompt.to(run.device), len(answer))
    return {
        "example": int(index),
        "prompt": run.text(prompt[0]),
        "answer": run.text(targets[0, answer]),
        "model": run.text(decoded[0].cpu()),
    }


# ---- errors on HashHop ---------------------------------------------------------------------------

CORRECT = "correct"
ANSWER_KINDS = (
    CORRECT,
    "correct end, wrong path",
    "another hop of its chain",
    "another hash of the example",
    "not in the example",
    "malformed",
)


def classify_error(text, decoded):
    """What a model decoded for the last query of a HashHop example -> one of ANSWER_KINDS.

    The closing quote has no label, so no model learns to write it. `decoded` therefore has as many
    letters as the correct answer.

    >>> text = "ab = cd\\ncd = 'ef'\\ngh = 'ij'\\n\\nCOMPLETION:\\n"
    >>> text += "Hops=2\\n\\nCoT=False\\n\\nab = 'ef'\\n"
    >>> for decoded in ("ef", "xx = ef", "cd", "ij", "xy", "e="):
    ...     print(classify_error(text, decoded))
    correct
    correct end, wrong path
    another hop of its chain
    another hash of the example
    not in the example
    malformed
    """
    facts, completion = text.split("COMPLETION:")
    query = completion.strip().rsplit("\n", 1)[-1].replace("'", "")
    key, answer = query.split(" = ", 1)
    if decoded == answer:
        return CORRECT
    end = decoded.rsplit(" = ", 1)[-1]
    if end == answer.rsplit(" = ", 1)[-1]:
        return "correct end, wrong path"
    if len(end) != len(key) or not end.isalnum():
        return "malformed"
    next_hash = {}
    for line in facts.strip().split("\n"):
        source, target = line.replace("'", "").split(" = ")
        next_hash[source] = target
    chain = [key]
    while chain[-1] in next_hash:
        chain.append(next_hash[chain[-1]])
    if end in chain:
        return "another hop of its chain"
    if end in next_hash or end in next_hash.values():
        return "another hash of the example"
    return "not in the example"


def hashhop_errors(run):
    """What kind the answers are, by number of hops, decoded token by token."""
    require_decoding(run, "decoding")
    # All examples, as the accuracy that is printed above.
    batches = list(eval_batches(run.data, run.config.split, run.config.eval_batch_size))
    table = map_batches(run, lambda batch: decode_batch(run, batch), batches)
    by_hops = {}
    levels = np.unique(table["hops"]).tolist()
    for level in sorted(levels, key=lambda level: (int(level.split()[0]), level)):
        kinds = table["answer"][table["hops"] == level]
        by_hops[level] = {}
        for kind in ANSWER_KINDS:
            by_hops[level][kind] = proportion(int((kinds == kind).sum()), len(kinds))
    if run.world.is_main:
        run.finding(describe_errors(by_hops))
        lines = []
        for level, cells in by_hops.items():
            lines += [(level, kind, *format_ci(cell)) for kind, cell in cells.items()]
        print_table(("hops", "answer", "examples", "proportion", "95% interval"), lines)
    plot = partial(plot_errors, by_hops, run.name)
    save_result(run, "hashhop", {}, {"hops": by_hops}, (), table, plot)


def describe_errors(by_hops):
    """The correct answers and the most frequent error by number of hops, as a sentence."""
    parts = []
    for level, cells in by_hops.items():
        part = f"{cells[CORRECT]['value']:.1%} correct with {level} hops"
        errors = [kind for kind in ANSWER_KINDS if kind != CORRECT]
        worst = max(errors, key=lambda kind: cells[kind]["value"])
        if cells[worst]["value"] > 0:
            part += f" (most frequent error: {worst}, {cells[worst]['value']:.1%})"
        parts.append(part)
    return f"decoded token by token: {'; '.join(parts)}"


def decode_batch(run, batch):
    """{"example", "hops", "answer"} (B,): the number of hops, and the kind of the answer."""
    data = run.data
    texts, slices = data.source.read(run.config.split, batch.indices)
    prompts, answers = [], []
    for text in texts:
        start = text.index("'", text.index("COMPLETION:")) + 1
        prompts.append(data.encoder.encode(text[:start])[0])
        answers.append(data.tokenizer.encode(text[start:].rstrip().rstrip("'")))
    sizes = np.array([(len(p), len(a)) for p, a in zip(prompts, answers)])
    kinds = np.empty(len(texts), "U32")
    # Prompts and answers of the same lengths are decoded together.
    for size in np.unique(sizes, axis=0):
        same_size = np.flatnonzero((sizes == size).all(1))
        tokens = run.tensor(np.stack([prompts[i] for i in same_size]))
        with autocast(run.device, run.dtype):
            decoded = greedy_decode(run.model, tokens, int(size[1])).cpu()
        for i, ids in zip(same_size, decoded):
            kinds[i] = classify_error(texts[i], run.text(ids))
    hops = slices["hops_cot"] if "hops_cot" in slices else slices["hops"]
    return {"example": batch.indices, "hops": hops.astype("U8"), "answer": kinds}


def plot_errors(by_hops, title, path):
    """One bar for each number of hops, divided by kind of answer."""
    plt, fig, (axis,) = figure(1, 1, width=6)
    x, bottom = np.arange(len(by_hops)), np.zeros(len(by_hops))
    for kind in ANSWER_KINDS:
        heights = np.array([cells[kind]["value"] for cells in by_hops.values()])
        axis.bar(x, heights, bottom=bottom, label=kind, width=0.6)
        bottom += heights
    axis.set_xticks(x, [f"{h}\nn={cells[CORRECT]['n']}" for h, cells in by_hops.items()])
    axis.set(xlabel="hops", ylabel="proportion of examples", ylim=(0, 1))
    fig.legend(*axis.get_legend_handles_labels(), loc="outside right upper")
    finish_figure(fig, plt, path, title)
