"""Edit facts that a memory model knows, in closed form, and compare with fine-tuning.

    python eval.py edit runs/RUN                       # 1 to 100 facts
    python eval.py edit runs/RUN --n_edits "[1,300]"

edit_facts solves for the memory output that yields the new answers, then for the value vectors
that produce it (as MEMIT does in MLPs: Meng et al. 2023, arXiv 2210.07229). A comparison measures
efficacy (edited facts get their new answer) and specificity (other facts keep theirs).

Letters: B facts, T tokens, N labels, H heads, k slots that a head reads, S slots read at any label,
D model width, V width of a value.
"""

import time

import numpy as np
import torch

from analysis.trained_run import correct_examples, save_result
from nanorecall.metrics import correct_predictions, evaluating, in_eval_mode, print_table
from nanorecall.ops import labelled_positions
from nanorecall.plots import errorbars, figure, finish_figure
from nanorecall.settings import ConfigError, require
from nanorecall.sparse import SparseAdamW
from nanorecall.stats import format_ci, proportion

# ---- editing -------------------------------------------------------------------------------------


@in_eval_mode
def edit_facts(model, tokens, targets, keep=(), margin=2.0, ridge=1e-4):
    """Change values of the last block so that the model answers `targets` -> record for undo_edit.

    tokens, targets (B, T): labels as in training; each prompt is read with its new answer. There
    are two closed forms and no gradients. First, for each label, the smallest change of the memory
    output that puts the answer's logit `margin` above all others. Then the smallest change of
    values that produces it: least squares with a ridge. With keep, batches [(tokens, targets)] of
    facts, it is the change that disturbs those least (MEMIT, eq. 14).
    ValueError if the model is not editable.
    """
    check_editable(model)
    memory = model.layers[-1].memory
    slots, weights, hidden, logits, answers = last_layer_reads(model, tokens, targets)
    # Logits are head @ hidden, times a scale per position that the final norm sets.
    head = model.lm_head.weight * model.final_norm.weight  # (tokens, D)
    readout = head if memory.out is None else head @ memory.out.weight  # (tokens, V)
    updates = target_updates(readout, hidden, logits, answers, margin)  # (N, V)
    read_slots, columns = slots.unique(return_inverse=True)  # (S,), (N, H * k)
    # keys @ values[read_slots] is the memory output.
    keys = hidden.new_zeros(len(slots), len(read_slots))  # (N, S)
    keys.scatter_add_(1, columns.view_as(slots), weights)
    whitened = keys  # (N, S)
    if keep:
        C = add_ridge(key_second_moment(model, keep, read_slots).to(keys), ridge)
        whitened = torch.linalg.solve(C, keys.T).T
    solved = torch.linalg.solve(add_ridge(keys @ whitened.T, ridge), updates)  # (N, V)
    before = memory.values[read_slots]
    memory.values[read_slots] += whitened.T @ solved
    return {"slots": read_slots, "values": before, "written": memory.values[read_slots]}


@torch.no_grad()
def undo_edit(model, record):
    """Restore the values before an edit_facts, to the last bit; undo the latest edit first.

    ValueError, and no change, if these values are not as that edit left them.
    """
    values, slots = model.layers[-1].memory.values, record["slots"]
    # Compare bytes, because nan differs from itself.
    if not torch.equal(values[slots].view(torch.uint8), record["written"].view(torch.uint8)):
        raise ValueError("the values are not as this edit left them; undo later edits first")
    values[slots] = record["values"]


def check_editable(model):
    """ValueError unless values of the last block's memory act on the logits alone and linearly."""
    memory = model.layers[-1].memory
    if memory is None or memory.gate is not None or model.layers[-1].residual_mul:
        message = "editing needs a memory layer without gate in the last block, and no residual_mul"
        raise ValueError(message)
    if sum(m.values is memory.values for m in model.memory_layers().values()) > 1:
        # Earlier blocks would change, too.
        raise ValueError("editing needs mem_share_values=0, or no other block with a memory layer")


def last_layer_reads(model, tokens, targets):
    """What the last block reads at each label, and what follows from it.

    -> slots (N, H * k), weights (N, H * k) times the router's, last hidden state before the final
    norm (N, D), logits (N, tokens), answers (N,)
    """
    hidden = []

    def keep_input(module, inputs, output):
        hidden.append(inputs[0])

    with model.final_norm.register_forward_hook(keep_input):
        logits, _, reads = model(tokens, targets, trace=True)
    _, flat, answers = labelled_positions(targets)
    last = reads[-1]
    slots = last["slots"].flatten(-2).flatten(0, 1)[flat]
    weights = last["weights"].flatten(-2).flatten(0, 1)[flat]
    if "route" in last:
        weights = weights * last["route"].flatten(0, 1)[flat][:, 1:]
    return slots, weights.to(hidden[0].dtype), hidden[0], logits, answers


def target_updates(readout, hidden, logits, answers, margin, rounds=100):
    """Smallest updates to the memory output (N, V) that put each answer `margin` logits above all
    other tokens, with the final norm's scale held fixed. readout (tokens, V): d logits / d output.

    Each round projects onto the half-space in which the answer leads its strongest rival.
    """
    scale = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)  # (N, 1)
    # Divided by the scale, logits are linear in the memory output.
    start = logits / scale
    updates = hidden.new_zeros(len(hidden), readout.shape[1])
    for _ in range(rounds):
        now = start + updates @ readout.T  # (N, tokens)
        strongest, rival = now.scatter(1, answers[:, None], -torch.inf).max(1, keepdim=True)
        missing = strongest + margin / scale - now.gather(1, answers[:, None])  # (N, 1)
        if (missing <= 1e-3 / scale).all():
            break
        direction = readout[answers] - readout[rival.squeeze(1)]
        length = direction.square().sum(-1, keepdim=True)
        updates = updates + missing.clamp(min=0) * direction / length
    return updates


def add_ridge(matrix, ridge):
    """matrix + ridge * its mean diagonal * I, so that it can be inverted"""
    identity = torch.eye(len(matrix), device=matrix.device, dtype=matrix.dtype)
    return matrix + ridge * matrix.diagonal().mean() * identity


@in_eval_mode
def key_second_moment(model, batches, chosen):
    """Sum over labels of w w^T (S, S), MEMIT's C0. batches: [(tokens, targets)] of facts to keep.

    w are the weights of the chosen slots (S,) in the last block: an edit changes no others, and a
    matrix of all slots of a large table would not fit into memory.
    """
    n_slots = len(model.layers[-1].memory.values)
    # Where each slot stands among the chosen; others share a last column, which is dropped.
    column = torch.full((n_slots,), len(chosen), device=chosen.device)
    column[chosen] = torch.arange(len(chosen), device=chosen.device)
    total = torch.zeros(len(chosen), len(chosen), device=chosen.device)
    for tokens, targets in batches:
        slots, weights, *_ = last_layer_reads(model, tokens, targets)
        keys = torch.zeros(len(slots), len(chosen) + 1, device=chosen.device)
        keys.scatter_add_(1, column[slots], weights.float())
        keys = keys[:, :-1]
        total += keys.T @ keys
    return total


# ---- editors: f(model, tokens, targets, kept tokens, kept targets) -------------------------------


def closed_form(model, tokens, targets, kept, kept_targets):
    edit_facts(model, tokens, targets)


def closed_form_protecting(model, tokens, targets, kept, kept_targets):
    edit_facts(model, tokens, targets, keep=[(kept, kept_targets)])


def fine_tune_values(model, *facts):
    values = [q for name, q in model.named_parameters() if "memory.values" in name]
    fine_tune(model, values, 1e-2, *facts)


def fine_tune_all(model, *facts):
    fine_tune(model, list(model.parameters()), 1e-3, *facts)


def fine_tune_all_replaying(model, *facts):
    fine_tune(model, list(model.parameters()), 1e-3, *facts, replay=True)


def fine_tune(model, parameters, lr, tokens, targets, kept, kept_targets, replay=False, steps=200):
    """Train parameters on the new facts until all are answered; with replay, on kept facts, too."""
    optimizer = SparseAdamW(parameters, lr=lr, weight_decay=0)  # Adam
    try:
        with evaluating(model):
            for _ in range(steps):
                model.zero_grad()
                loss = model(tokens, targets)[1]
                if replay:
                    loss = loss + model(kept, kept_targets)[1]
                loss.backward()
                optimizer.step()
                done = n_correct(model, tokens, targets) == len(tokens)
                if done and replay:
                    done = n_correct(model, kept, kept_targets) == len(kept)
                if done:
                    break
    finally:
        # Or the next training step would add its own gradients to these.
        model.zero_grad()


EDITORS = {
    "closed form": closed_form,
    "closed form, protecting others": closed_form_protecting,
    "fine-tune the values": fine_tune_values,
    "fine-tune all weights": fine_tune_all,
    "fine-tune all weights, replaying others": fine_tune_all_replaying,
}


# ---- comparison ----------------------------------------------------------------------------------


METRICS = {
    "efficacy": "edited facts, new answer",
    "specificity": "other facts, old answer",
    "retention": "facts that an editor may use, old answer",
}


def compare_editors(run):
    """Edit n facts at a time, for each n of n_edits, with every editor, and measure METRICS.

    Of up to 1000 other facts that the model knows, editors may use one half, and not the other.
    """
    require_editable(run)
    data, model, config = run.data, run.model, run.config
    known = correct_examples(run)
    n_needed = max(config.n_edits) + 10
    message = f"the model answers {len(known)} facts correctly; n_edits={config.n_edits} needs"
    require(len(known) >= n_needed, f"{message} {n_needed}", "n_edits")
    rng = np.random.default_rng(run.settings.train.seed)
    facts = []
    for index in rng.permutation(known):
        texts, _ = data.source.read(config.split, [index])
        facts.append(texts[0])
    alphabet = sorted(set("".join(fact.strip().split(":")[1] for fact in facts)))
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    results = []
    for n in config.n_edits:
        others = facts[n : n + 1000]
        edited = encode(run, [counterfactual(fact, alphabet, rng) for fact in facts[:n]])
        kept, unseen = encode(run, others[::2]), encode(run, others[1::2])
        for name, editor in EDITORS.items():
            try:
                measured = measure_editor(model, editor, edited, kept, unseen)
            finally:
                model.load_state_dict(weights)
            results.append({"method": name, "edits": n, **measured})
    for sentence in describe_editors(results):
        run.finding(sentence)
    print_results(results)
    columns = {}
    for name in ("method", "edits", *METRICS, "seconds"):
        values = [r[name] for r in results]
        columns[name] = [v["value"] for v in values] if name in METRICS else values

    def plot(path):
        plot_edits(path, results, run.name)

    metrics = {"edits": list(config.n_edits)}
    by_slice = {"method, edits": {f"{r['method']}, {r['edits']}": r for r in results}}
    save_result(run, "edit", metrics, by_slice, (), columns, plot)


def measure_editor(model, editor, edited, kept, unseen):
    """Edit the model -> METRICS and the seconds that it took. Facts: (tokens, targets)."""
    start = time.perf_counter()
    editor(model, *edited, *kept)
    seconds = time.perf_counter() - start
    measured = {}
    for metric, (tokens, targets) in zip(METRICS, (edited, unseen, kept)):
        measured[metric] = proportion(n_correct(model, tokens, targets), len(tokens))
    return {**measured, "seconds": seconds}


def describe_editors(results):
    """Yield sentences on the first editor and the best of the others, with the most edits."""
    n = max(r["edits"] for r in results)
    of_most = [r for r in results if r["edits"] == n]
    for r in of_most[:1] + sorted(of_most[1:], key=overall)[-1:]:
        efficacy, specificity = r["efficacy"]["value"], r["specificity"]["value"]
        method = r["method"] if r is of_most[0] else f"best of the other editors, {r['method']}"
        what = f"{efficacy:.0%} of them get the new answer, {specificity:.0%} of others keep theirs"
        yield f"{n} facts edited together, {method}: {what} ({r['seconds']:.2f} s)"


def overall(result):
    """Mean of efficacy and specificity."""
    return result["efficacy"]["value"] + result["specificity"]["value"]


def print_results(results):
    head = ["method", "edits"]
    for metric in METRICS:
        head += [metric, "95% interval"]
    lines = []
    for r in results:
        line = [r["method"], r["edits"]]
        for metric in METRICS:
            line += format_ci(r[metric])[1:]
        lines.append([*line, f"{r['seconds']:.2f}"])
    print_table([*head, "seconds"], lines)
    print("; ".join(f"{metric}: {meaning}" for metric, meaning in METRICS.items()))


def require_editable(run):
    """ConfigError unless the facts of this run can be edited."""
    message = f"editing needs memory layers, and {run.settings.train.model} has none"
    require(hasattr(run.model, "memory_layers"), message, None)
    require_facts(run)
    try:
        check_editable(run.model)
    except ValueError as e:
        raise ConfigError(str(e)) from None
    require(run.world.size == 1, "editing needs a single process; run it without torchrun", None)


def require_facts(run):
    """ConfigError unless the examples are facts "key:value" of digits."""
    task = getattr(run.settings.data, "task", run.settings.train.data)
    message = f"it needs facts of digits, task=qa or digits, not {task}"
    require(task in ("qa", "digits"), message, None)


def counterfactual(fact, alphabet, rng):
    """The fact "key:value " with another value: each character becomes another one of alphabet."""
    key, value = fact.strip().split(":")
    new_value = ""
    for character in value:
        others = [x for x in alphabet if x != character]
        new_value += rng.choice(others)
    return f"{key}:{new_value} "


def encode(run, facts):
    """Facts of one length -> tokens and targets (B, T)."""
    tokens, targets, *_ = run.data.encoder.batch(facts, packed=False)
    return run.tensor(tokens), run.tensor(targets)


@in_eval_mode
def n_correct(model, tokens, targets):
    """Number of examples whose labels are all predicted correctly."""
    logits, _ = model(tokens, targets)
    return int(correct_predictions(logits, targets)[1].sum())


def plot_edits(path, results, title):
    """METRICS of each editor against the number of edited facts."""
    plt, fig, axes = figure(1, len(METRICS), width=3.8)
    for axis, metric in zip(axes, METRICS):
        for name in EDITORS:
            of_editor = [r for r in results if r["method"] == name]
            measured = [r[metric] for r in of_editor]
            errorbars(axis, [r["edits"] for r in of_editor], measured, label=name)
        n = "" if metric == "efficacy" else f" (n = {measured[-1]['n']})"
        ylabel = f"{metric}{n}\nexact match, 95% interval"
        axis.set(xscale="log", xlabel="facts edited together", ylabel=ylabel, ylim=(-0.02, 1.02))
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    fig.supxlabel(title)
    finish_figure(fig, plt, path, "")
