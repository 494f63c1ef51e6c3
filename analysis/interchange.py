"""Let an example read what a memory layer read for another one: which answer does it then give?

    python ablate.py force | inject | replace | swap runs/RUN
    python ablate.py interchanges runs/RUN  # all of them in one figure, with controls

An interchange intervention (Geiger et al. 2021, arXiv 2106.02997) takes two examples: the model
runs on the base, with what a memory layer read for the source.

Letters: P pairs of examples, M intervened copies, T tokens, H heads, k slots that a head reads.
Reads of a memory layer are a dict, as in memory.py.
"""

import numpy as np
import torch

from analysis.hooks import (
    forward_from,
    index_reads,
    logit_diff,
    put_reads,
    run_with_cache,
    sample_correct_examples,
)
from analysis.memory_usage import require_slots
from analysis.trained_run import combine_columns, concat, require_facts, save_result, select
from nanorecall.distributed import SINGLE_PROCESS
from nanorecall.metrics import print_table
from nanorecall.settings import require
from nanorecall.stats import crossed_proportion, format_ci

# ---- pairs of examples ---------------------------------------------------------------------------

EXPOSURE_PAIRS = {  # (is base, is source) seen more often than the median example?
    "any": None,
    "less_less": (False, False),
    "more_more": (True, True),
    "less_more": (False, True),
    "more_less": (True, False),
}


def sample_pairs(run):
    """Draw correct examples and pairs of them -> examples, base, source (P,), metrics of these.

    ConfigError if the run has no memory layers, or no facts whose answers are digits.
    """
    require_slots(run)
    require_facts(run)
    c = run.config
    examples = sample_correct_examples(run)
    base, source = draw_pairs(examples, c.n_pairs, c.exposure_pairs, c.seed)
    metrics = {"n_examples": len(examples), "n_pairs": len(base)}
    metrics["exposure_pairs"] = c.exposure_pairs
    return examples, base, source, metrics


def draw_pairs(examples, n_pairs, kind, seed):
    """Draw pairs of different examples -> base, source (P,), which count from 0 to B - 1.

    n_pairs: how many, 0 for all. kind: a name of EXPOSURE_PAIRS. ConfigError if no pair is of it.
    """
    B = len(examples)
    base, source = np.divmod(np.arange(B * B), B)
    fits = base != source
    if kind != "any":
        exposures = examples.slices.get("exposures")
        message = f"exposure_pairs={kind} needs examples with exposures, as in task=qa"
        require(exposures is not None, f"{message}; leave it out", "exposure_pairs")
        is_high = exposures > np.median(exposures)
        base_is_high, source_is_high = EXPOSURE_PAIRS[kind]
        fits &= (is_high[base] == base_is_high) & (is_high[source] == source_is_high)
    pairs = np.flatnonzero(fits)
    message = f"exposure_pairs={kind}: there is no such pair of examples; raise n_examples"
    require(len(pairs), message, "exposure_pairs")
    if n_pairs and n_pairs < len(pairs):
        pairs = np.sort(np.random.default_rng(seed).choice(pairs, n_pairs, replace=False))
    return base[pairs], source[pairs]


def name_exposure_pairs(exposures, base, source):
    """exposures (B,), base and source (P,) -> the name of each pair in EXPOSURE_PAIRS (P,)."""
    is_high = exposures > np.median(exposures)
    base_names = np.where(is_high[base], "more_", "less_")
    return np.char.add(base_names, np.where(is_high[source], "more", "less"))


def control_answers(base_answers, source_answers, alphabet, seed):
    """Draw a third answer of the alphabet for each pair of answers (M,) -> (M,); -1: there is none.

    An intervention that only damages the answer gives the source's answer as often as a third one.
    """
    M = len(base_answers)
    order = np.random.default_rng(seed).permuted(np.tile(alphabet, (M, 1)), axis=1)
    is_third = (order != base_answers[:, None]) & (order != source_answers[:, None])
    first_third = order[np.arange(M), is_third.argmax(1)]
    return np.where(is_third.any(1), first_third, -1)


# ---- interchange of reads ------------------------------------------------------------------------


def force(base, source, head):
    """One head reads only the slot that it reads most for the source, with all of its weights."""
    m = torch.arange(len(head), device=head.device)
    strongest = source["weights"][m, head].argmax(-1)  # (M,)
    slots = base["slots"].clone()
    slots[m, head] = source["slots"][m, head, strongest][:, None]
    return {"slots": slots, "weights": base["weights"]}


def inject(base, source, head):
    """All heads read the source's slots with the source's weights."""
    return source


def swap(base, source, head):
    """All heads read the source's slots with the base's weights, matched by rank of weight."""
    base_order = base["weights"].argsort(-1, descending=True)
    source_order = source["weights"].argsort(-1, descending=True)
    ranked_slots = source["slots"].gather(-1, source_order)
    slots = torch.empty_like(base["slots"]).scatter(-1, base_order, ranked_slots)
    return {"slots": slots, "weights": base["weights"]}


# (reads of the base and of the source at their labels (M, H, k), head (M,)) -> reads of the base.
# "replace" is not among them: it changes reads at all positions.
INTERCHANGES = {"force": force, "inject": inject, "swap": swap}


def strongest_slot(reads):
    """The slot with the largest weight over all heads: reads (M, H, k) -> (M,)."""
    index = reads["weights"].flatten(1).argmax(-1)
    return reads["slots"].flatten(1).gather(1, index[:, None]).squeeze(1)


def forward_with_interchange(model, examples, clean, block, name, base, source, answer_pos, head):
    """Run bases with reads of their sources in one block -> logits (M, vocabulary) at one label.

    base, source, answer_pos (number of the label) and head: (M,) each.
    """
    base_pos = examples.label_pos[base, answer_pos]
    source_pos = examples.label_pos[source, answer_pos]
    reads = index_reads(clean.reads[block], base)  # (M, T, H, k)
    base_reads = index_reads(clean.reads[block], (base, base_pos))  # (M, H, k)
    source_reads = index_reads(clean.reads[block], (source, source_pos))
    if name == "replace":
        # As if the value in the table were overwritten: every read of the slot gives the new value.
        old = strongest_slot(base_reads)[:, None, None, None]
        new = strongest_slot(source_reads)[:, None, None, None]
        reads["slots"] = torch.where(reads["slots"] == old, new, reads["slots"])
    else:
        new_reads = INTERCHANGES[name](base_reads, source_reads, head)
        m = torch.arange(len(base), device=base.device)
        reads = put_reads((m, base_pos), new_reads, reads)
    resid_mid = clean.resid_mid[block][base]
    return forward_from(model, block, resid_mid, reads, base_pos[:, None]).squeeze(1)


def interchange_effects(
    model, examples, base, source, name, batch_size=512, seed=0, world=SINGLE_PROCESS
):
    """Measure an interchange for pairs base, source (P,) -> {column: (M,)}.

    It is done in one block and at one label at a time; "force" also takes one head at a time.
    Labels at which base and source have the same answer are left out. Three outcomes are columns:
    source_answer, the prediction is the source's answer; control_answer, it is an answer drawn at
    random that neither has there; base_lost, it is no longer the base's answer.
    """
    clean = run_with_cache(model, examples)
    answers = examples.answers.cpu().numpy()
    device = examples.tokens.device
    n_heads = model.config.mem_heads if name == "force" else 1
    pair, answer_pos, head = np.indices((len(base), answers.shape[1], n_heads)).reshape(3, -1)
    # Where both have the same answer, an interchange that works cannot be seen.
    differ = answers[base[pair], answer_pos] != answers[source[pair], answer_pos]
    require(differ.any(), "all pairs of examples have the same answers; raise n_examples", None)
    pair, answer_pos, head = pair[differ], answer_pos[differ], head[differ]
    base, source = base[pair], source[pair]  # (M,)
    base_answers, source_answers = answers[base, answer_pos], answers[source, answer_pos]
    control = control_answers(base_answers, source_answers, np.unique(answers), seed)

    def measure_batch(item):
        block, start = item
        batch = slice(start, start + batch_size)
        indices = []
        for x in (base, source, answer_pos, head):
            indices.append(torch.as_tensor(x[batch], device=device))
        logits = forward_with_interchange(model, examples, clean, block, name, *indices)
        part = compare_logits(examples, clean, logits, *indices[:3])
        part["control_answer"] = part["prediction"] == control[batch]
        part["example"] = examples.indices[base[batch]]
        part["source_example"] = examples.indices[source[batch]]
        part["layer"] = np.full(len(logits), block)
        part["answer_pos"] = answer_pos[batch]
        part["head"] = head[batch]
        if "exposures" in examples.slices:
            exposures = examples.slices["exposures"]
            part["exposure_pairs"] = name_exposure_pairs(exposures, base[batch], source[batch])
        return part

    batches = []
    for block in model.memory_layers():
        for start in range(0, len(base), batch_size):
            batches.append((block, start))
    return concat(world.shared_map(measure_batch, batches))


def compare_logits(examples, clean, logits, base, source, answer_pos):
    """Logits (M, vocabulary) after an interchange, beside the clean ones -> {column: (M,)}"""
    base_answer = examples.answers[base, answer_pos]
    source_answer = examples.answers[source, answer_pos]
    prediction = logits.argmax(-1)
    clean_logits = clean.logits[base, answer_pos]
    clean_diff, _, _ = logit_diff(clean_logits, base_answer)
    diff, _, _ = logit_diff(logits, base_answer)
    _, p_source_clean, _ = logit_diff(clean_logits, source_answer)
    _, p_source, _ = logit_diff(logits, source_answer)
    columns = {
        "answer": base_answer,
        "source_answer_token": source_answer,
        "prediction": prediction,
        "source_answer": prediction == source_answer,
        "base_lost": prediction != base_answer,
        "drop": clean_diff - diff,
        "p_source": p_source,
        "p_source_clean": p_source_clean,
    }
    return {name: x.cpu().numpy() for name, x in columns.items()}


OUTCOMES = {  # column of interchange_effects: title
    "source_answer": "source answer",
    "control_answer": "control answer",
    "base_lost": "base answer lost",
}


def interchange(run, name):
    """How often does the base get the source's answer with the source's reads?"""
    examples, base, source, metrics = sample_pairs(run)
    batch_size, seed = run.config.ablate_batch_size, run.config.seed
    columns = interchange_effects(
        run.model, examples, base, source, name, batch_size, seed, run.world
    )
    slices = ["layer", "layer, answer_pos"]
    if name == "force":
        slices.append("layer, head")
    if "exposure_pairs" in columns:
        slices.append("exposure_pairs")
    by_slice = {}
    for names in slices:
        by_slice[names] = outcomes_by(columns, *names.split(", "))
    for layer, cells in by_slice["layer"].items():
        run.finding(describe(name, layer, cells))
    print_outcomes(name, by_slice)
    save_result(run, name, metrics, by_slice, (), columns)


def outcomes_by(columns, *names):
    """{"value, value": {outcome: proportion}} for all combinations of values of these columns."""
    keys = combine_columns(columns, *names)
    cells = {}
    for key in np.unique(keys).tolist():
        part = select(columns, keys == key)
        cells[key] = {}
        for outcome in OUTCOMES:
            pairs = part["example"], part["source_example"]
            cells[key][outcome] = crossed_proportion(part[outcome], *pairs)
    return cells


def describe(name, layer, cells):
    """The finding of one layer in a sentence."""
    _, value, interval = format_ci(cells["source_answer"])
    control = cells["control_answer"]["value"]
    lost = cells["base_lost"]["value"]
    return (
        f"{name} in layer {layer}: the source's answer comes in {value} ({interval}), a control "
        f"answer in {control:.3f}; the base's answer is lost in {lost:.3f}"
    )


def print_outcomes(name, by_slice):
    head = [name]
    for title in OUTCOMES.values():
        head += [title, "95% interval"]
    lines = []
    for names, values in by_slice.items():
        # The .json holds these.
        if names == "layer, answer_pos":
            continue
        for value, cells in values.items():
            line = [f"{names}={value}"]
            for outcome in OUTCOMES:
                line += format_ci(cells[outcome])[1:]
            lines.append(line)
    print_table(head, lines)
