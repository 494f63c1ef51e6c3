"""Train one model on one task; the run directory it writes can be resumed, measured and taken apart.

    python train.py configs/mqar_gpt.py                          # one process
    python train.py configs/mqar_gpt.py --lr 1e-3 --seed 2       # flags win over files, later over earlier
    python train.py configs/mqar_gpt.py --model mine             # a model file of your own, mine.py
    python train.py --resume runs/RUN                            # go on after Ctrl-C, SIGTERM or a crash
    torchrun --standalone --nproc_per_node=4 train.py configs/mqar_gpt.py                 # 4 GPUs, or 4 CPU processes
    sbatch train.slurm configs/mqar_gpt.py                       # one or many nodes; see parallel.py, train.slurm
    python train.py configs/mqar_gpt.py --n_epochs 0             # print the model and its parameter counts, and stop

It writes <log_dir>/<run>/: config.json (every setting and where it came from), log.jsonl, ckpt.pt and ckpt_prev.pt (to
resume), best.pt (highest validation accuracy), status.json, curves.png; checkpoint.py says how they are kept whole. Exit
status: 0 if the run ended at or above `target`, 1 if below it or if it failed, 2 for a mistake in the settings, 128 +
signal number if it was stopped.
"""

import contextlib
import dataclasses
import math
import os
import re
import signal
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from nanorecall.checkpoint import (
    STATE,
    JsonlLog,
    check_kinds,
    first_valid_checkpoint,
    lock_run_dir,
    read_checkpoint,
    read_record,
    reading,
    unlock,
    write_json,
)
from nanorecall.distributed import (
    World,
    autodetect_device,
    convert_checkpoints,
    describe_batch,
    full_tensor,
    is_sharded,
    load_training_state,
    micro_batches,
    process_group,
    sync_gradients,
    training_state,
    wrap_model,
    write_checkpoint,
)
from nanorecall.metrics import autocast, check_slice, evaluate, print_baselines, print_slices, slice_accuracy
from nanorecall.plots import plot_curves
from nanorecall.pretrained import freeze, load_parts
from nanorecall.rng import IGNORE_INDEX
from nanorecall.run import (
    RESUMABLE,
    SCHEDULES,
    Settings,
    TrainConfig,
    build_data,
    build_model,
    build_model_config,
    check_data_unchanged,
    count_parameters,
    create_run_dir,
    enough_memory,
    find_restarted_run,
    launch_id,
    load_settings,
    require_same_settings,
    resolve,
    run_metadata,
    settings_text,
    training_advice,
)
from nanorecall.settings import ConfigError, RunError, help_text, printable, read_argv, require, run_cli, say

# ---- the loop ----------------------------------------------------------------------------------------------------------


def total_steps(c, data):
    """Steps of a whole run."""
    return c.max_steps or c.n_epochs * data.steps_per_epoch(c.batch_size)


def learning_rate(c, step, steps_per_epoch, total_steps):
    """lr at a step counted from 0: linear warm-up times the schedule."""
    warm = min(1.0, (step + 1) / c.warmup_steps) if c.warmup_steps else 1.0
    return c.lr * warm * SCHEDULES[c.schedule](c, step // steps_per_epoch, min(1.0, step / max(1, total_steps)))


@dataclass
class Run:
    """A plan made real: what every rank of a run has."""

    plan: Settings
    folder: str
    world: World
    device: torch.device
    dtype: torch.dtype
    data: object
    model: torch.nn.Module
    wrapped: torch.nn.Module  # the same as a training step calls it: see parallel.spread
    settings: str  # see plan.settings_text


def train(run, resume=None, stopped_by=()):
    """Run the loop until the last step, stop_accuracy or a signal; -> ("finished", "failed" or "preempted"), state.

    resume: the checkpoint to go on from. Everything the loop remembers is in `state`, which is what is saved.
    stopped_by: what catch_signals fills.
    """
    c, data, model, world = run.plan.train, run.data, run.model, run.world
    steps_per_epoch = data.steps_per_epoch(c.batch_size)
    total = total_steps(c, data)
    every = c.eval_interval or steps_per_epoch
    optimizer = torch.optim.AdamW(parameter_groups_of(model, c.weight_decay), betas=(c.beta1, c.beta2), fused=True)
    state = {"step": 0, "best": -1.0, "best_of_all": -1.0, "bad_steps": 0, "seconds": 0.0}
    if resume:
        load_training_state(run.folder, resume, model, optimizer)
        state = {k: resume[k] for k in state}
    log = world.together(lambda: JsonlLog(run.folder, state["step"]), first_only=True)
    hidden = not (world.is_main and sys.stderr.isatty())
    bar = tqdm(total=total, initial=state["step"], desc="train", unit="step", disable=hidden)
    began = time.perf_counter() - state["seconds"]

    def save(name="ckpt"):
        state["seconds"] = time.perf_counter() - began
        tensors = training_state(model, optimizer if name == "ckpt" else None)
        about = {**state, "settings": run.settings}
        write_checkpoint(run.folder, name, about, tensors, is_sharded(model), world)

    while True:
        step = state["step"]
        # learning rate
        lr = learning_rate(c, step, steps_per_epoch, total)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        # eval and save
        last = step >= total
        if last or (step % every == 0 and step > 0):
            result = evaluate(model, data, "val", c.eval_batch_size, run.device, run.dtype, stopped_by, world)
            if result is None:  # cut short by a signal: done again after a resume
                save()
                outcome = "preempted"
                break
            accuracy, exact = slice_accuracy(result, c.target_slice), result["row_accuracy"]
            if world.is_main:
                log.write(kind="eval", step=step, split="val", seconds=time.perf_counter() - began, **result)
                of = f" of {c.target_slice}" * bool(c.target_slice)
                log_line(bar, f"step {step}: val accuracy{of} {accuracy:.4f}, rows {exact:.4f}, loss {result['loss']:.4f}")
            if not math.isfinite(result["loss"]) or not finite_weights(model, world):
                if world.is_main:
                    log_line(bar, f"stopped: weights or loss are not finite after step {step}; {LOWER}")
                outcome = "failed"
                break
            if (accuracy, result["accuracy"]) > (state["best"], state["best_of_all"]):  # a slice may stay at 1
                state |= {"best": accuracy, "best_of_all": result["accuracy"]}
                save("best")
            save()
            if last or (c.stop_accuracy and accuracy >= c.stop_accuracy):
                outcome = "finished"
                break
        elif c.save_every and step % c.save_every == 0 and step > 0:
            save()
        # accumulate
        loss, stop = forward_backward(run, step, stopped_by)
        # guard: a gradient that is not finite is not applied; it is a sum over ranks, so all of them see it
        norm = full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), c.clip_grad or math.inf))
        finite = bool(torch.isfinite(norm))
        state["bad_steps"] = 0 if finite else state["bad_steps"] + 1
        # step
        if finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state["step"] = step + 1
        if hasattr(model, "on_step_end"):
            report = model.on_step_end(report=c.mem_stats_every > 0 and state["step"] % c.mem_stats_every == 0)
            if report and world.is_main:
                log.write(kind="memory", step=state["step"], layers=report)
        # log
        bar.update()
        if state["step"] % c.log_interval == 0 or not finite:
            loss = world.all_gather(loss.item()).sum().item()
            if world.is_main:
                row = {"loss": loss, "lr": lr, "grad_norm": norm.item(), "skipped": not finite}
                log.write(kind="train", step=state["step"], seconds=time.perf_counter() - began, **row)
                bar.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.1e}")
                if hidden:
                    print(f"step {state['step']}/{total}: loss {loss:.4f}, lr {lr:.2e}", flush=True)
        # stop
        if state["bad_steps"] >= c.nan_limit:
            if world.is_main:
                many = f"{c.nan_limit} steps in a row"
                log_line(bar, f"stopped: the gradient was not finite {many}; {LOWER}")
            outcome = "failed"
            break
        if stop:
            save()
            outcome = "preempted"
            break
    bar.close()
    return outcome, state


LOWER = "lower lr or raise warmup_steps"


def finite_weights(model, world):
    """Are all parameters finite numbers, on every rank?"""
    shares = [q.to_local() if isinstance(q, DTensor) else q for q in model.parameters()]
    wrong = sum(not bool(torch.isfinite(q).all()) for q in shares)
    return not world.all_gather(wrong).any()


def forward_backward(run, step, stopped_by):
    """Gradients of the mean loss over all labels of a global batch: -> (this rank's share of the loss, stop?).

    Every part counts by its share of the batch's labels, so the sum over parts and ranks is the mean over the batch. The
    ranks also agree here whether one of them has been told to stop (`stopped_by`).
    """
    c, world = run.plan.train, run.world
    rows = np.asarray(run.data.batch_indices(step, c.batch_size))
    parts = []
    for number, mine in micro_batches(rows, world, c.accumulate):
        tokens, targets, _, *more = run.data.batch("train", step, mine if len(mine) else rows[:1])  # none left: run one along
        inputs = tokens, targets, *more
        parts.append((number, inputs, (targets != IGNORE_INDEX).sum().item() if len(mine) else 0, len(mine) > 0))
    labels, stops = world.all_gather(sum(n for *_, n, _ in parts), len(stopped_by)).sum(0).tolist()
    loss = 0.0
    for i, (number, inputs, n, counts) in enumerate(parts):
        run.wrapped.train(counts)  # a row that only runs along is none that a memory layer reads
        torch.manual_seed(micro_batch_seed(c.seed, step, number))
        with sync_gradients(run.wrapped, now=i == len(parts) - 1):
            with autocast(run.device, run.dtype):
                _, part_loss = run.wrapped(*(x.to(run.device) for x in inputs))
            part_loss = part_loss * (n / max(1, labels))
            part_loss.backward()
        loss = loss + part_loss.detach()
    run.wrapped.train()
    return loss, stops > 0


def micro_batch_seed(*words):
    """A seed for what is random in a part of a step (dropout): a function of its place, so that nothing needs saving."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


def parameter_groups_of(model, weight_decay):
    """Matrices decay, vectors (norm weights, biases) do not; a model's `lr_scales` may name parameters with their own
    share of the learning rate ("lr_scale"), which do not decay either."""
    own, groups = getattr(model, "lr_scales", dict)(), {}
    for name, q in model.named_parameters():
        if q.requires_grad:
            rate = next((rate for end, rate in own.items() if name.endswith(end)), None)
            decay = weight_decay if q.ndim >= 2 and rate is None else 0.0
            kind = (rate is not None, q.ndim >= 2)
            groups.setdefault(kind, {"params": [], "weight_decay": decay, "lr_scale": 1.0 if rate is None else rate})
            groups[kind]["params"].append(q)
    return [groups[kind] for kind in sorted(groups, key=lambda kind: (kind[0], not kind[1]))]  # matrices first


def stop_on_signals(world):
    """-> a list that collects caught signals (SIGTERM, SIGINT, SIGHUP, SIGUSR1), so that the loop can finish its step and save,
    and a function that restores the old handlers. On one process a second signal has its default effect; under torchrun,
    which forwards signals that each rank has got already, repeats are ignored."""
    caught = []

    def on_signal(number, frame):
        caught.append(number)
        if world.size == 1:
            signal.signal(number, signal.SIG_DFL)

    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
    # Windows lacks two of them.
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {n: signal.signal(n, on_signal) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}  # nohup ignores one
    return caught, lambda: [signal.signal(number, handler) for number, handler in before.items()]


def log_line(bar, text):
    """Print a line without breaking the progress bar."""
    text = printable(text)
    tqdm.write(text) if not bar.disable else say(text, flush=True)


# ---- command line ------------------------------------------------------------------------------------------------------


def read_command_line(argv):
    """-> Plan, and the run directory to resume or ""."""
    words, settings = read_argv(argv)
    if any(s.key == "help" for s in settings):
        p = resolve([s for s in settings if s.key in ("model", "data")])
        say(help_text(__doc__, TrainConfig, p.model_module.Config, p.data_module.Config))
        sys.exit(0)
    require(not words, f"{' '.join(words)!r} is neither an override file (.py) nor a flag (--key=value)", None)
    resume = [s for s in settings if s.key == "resume"]
    if not resume:
        p = resolve(settings)
        require(not p.train.export, "--export rewrites the checkpoints of a run: name it with --resume", "export")
        return p, ""
    folder = str(resume[-1].value)
    require(folder, f"{resume[-1].origin}: resume needs a run directory", "resume")
    changes = [s for s in settings if s.key != "resume"]
    for s in changes:
        fixed = f"{s.origin}: {s.key} cannot change in the middle of a run (only {', '.join(RESUMABLE)} can)"
        require(s.key in RESUMABLE, fixed, s.key)
    return load_settings(folder, changes), folder


def main(argv=None):
    p, folder = read_command_line(sys.argv[1:] if argv is None else argv)
    with process_group(p.train.device) as world:
        restarted = world.first_does(lambda: find_restarted_run(p.train.log_dir))
        if restarted and not folder:
            world.print0(f"started again by torchrun: going on with {restarted}")
            p, folder = load_settings(restarted), restarted
        if p.train.export:
            require(world.size == 1, "export is the work of one process; run it without torchrun", "export")
            handle = lock_run_dir(folder)
            convert_checkpoints(folder, p.train.export, world)
            unlock(handle)
            return 0
        return start(p, folder, world)


def start(p, folder, world):
    """Build what the plan says, and train it in a new run directory or, if `folder` names one, go on there."""
    c = p.train
    if c.threads:
        torch.set_num_threads(c.threads)
    device, dtype, device_line = world.together(lambda: autodetect_device(c, world))
    split_line = describe_batch(c.batch_size, world, c.accumulate)
    if folder:
        world.first_does(lambda: check_data_unchanged(folder, p))
    data = world.together(lambda: build_data(p))
    for note in getattr(data, "notes", ()):
        world.print0(note)
    if c.target_slice:
        world.together(lambda: check_slice(data, c.target_slice, c.eval_batch_size))
    config = build_model_config(p, data)
    model = world.together(lambda: build_model(p, config))
    goes_on = bool(folder) and world.first_does(lambda: has_checkpoint(folder))
    notes = world.together(lambda: load_and_freeze(model, c, goes_on))
    counts = count_parameters(model)
    world.print0(model)
    world.print0(f"params: {counts['layers']} in the layers, {counts['total']} with embedding, last norm and head")
    for note in notes:
        world.print0(note)
    world.print0(device_line)
    if hasattr(p.model_class, "describe_backend"):
        world.print0(f"mixer: {p.model_class.describe_backend(config, device, dtype)}")
    kept = p.model_class.inference_state_bytes(config) if hasattr(p.model_class, "inference_state_bytes") else None
    if kept is not None:
        world.print0(f"state: {kept} bytes to read on after {data.seq_len} tokens, in float32")
    if c.n_epochs == 0:
        return 0
    resumed = bool(folder)
    if resumed:
        held = world.first_does(lambda: lock_run_dir(folder))
    else:
        folder, held = world.first_does(lambda: create_run_dir(p, config))
    try:
        resume = find_resume(folder, world) if resumed else None
        if resume:
            require_same_settings(folder, p, config, resume)
            status = world.first_does(lambda: ended(folder, resume, c, total_steps(c, data)))
            if status:
                how = "raise --n_epochs or --max_steps"
                world.print0(f"{folder} has ended; to train it longer, {how}")
                return world.first_does(lambda: report(folder, status, c, data))
        if resumed:
            take_up(p, folder, world, resume, data)
        else:
            about = world.first_does(lambda: run_metadata(p, config, model, device, dtype, world))
            world.first_does(lambda: write_json(os.path.join(folder, "config.json"), about))
        world.print0(f"### LOGDIR: {folder}")
        everything = (c, config, p.data)
        world.print0({k: v for part in everything for k, v in dataclasses.asdict(part).items()})
        # a batch never crosses segments
        val_steps = sum(-(-len(s) // c.eval_batch_size) for s in data.eval_groups("val"))
        steps = data.steps_per_epoch(c.batch_size), val_steps
        world.print0(f"{split_line}\n>>> n_train_steps = {steps[0]}, n_val_steps = {steps[1]}")
        with enough_memory(lambda: training_advice(model, device)):
            model.to(device)
            if c.compile:
                model.compile()
            settings = settings_text(p, config)
            # No name here for the wrapped model: see parallel.leave.
            about = (p, folder, world, device, dtype, data, model)
            return finish(Run(*about, wrap_model(model, c.parallel, device), settings), resume)
    finally:
        if world.is_main:
            unlock(held)


def load_and_freeze(model, c, goes_on):
    """Load and freeze what the settings name -> lines about it.

    goes_on: the weights come from the run's own checkpoint.
    """
    notes = []
    if c.init_from and not goes_on:
        require(isinstance(c.init_map, dict) or not c.init_map, f"init_map={c.init_map!r} is no JSON dict", "init_map")
        notes.append(load_parts(model, c.init_from, c.init_step, c.init_map))
    if c.freeze:
        notes.append(freeze(model, c.freeze))
    return notes


def has_checkpoint(folder):
    """Has a run saved one, if only a damaged one? Without any it starts again."""
    with reading(folder):
        names = os.listdir(folder)
    return any(re.match(r"ckpt(_prev)?\.pt(\.damaged|$)", name) for name in names)


def find_resume(folder, world):
    """The last whole checkpoint of a run, or None if the run has none yet."""

    def find():
        if has_checkpoint(folder):
            return first_valid_checkpoint(folder, "ckpt", "ckpt_prev", holds_lock=True)

    name = world.first_does(find)
    if not name:
        return None
    resume = read_checkpoint(folder, name)
    lacking = sorted(STATE.keys() - resume.keys())
    message = f"{folder}: {name}.pt has no {', '.join(lacking)}; training cannot go on from it"
    require(not lacking, message, "resume")
    return resume


def take_up(p, folder, world, resume, data):
    """Say what differs from the run's start or last stop, and let config.json know."""
    c, path = p.train, os.path.join(folder, "config.json")
    saved = world.first_does(lambda: read_record(path, {"world_size": "count", "threads": "count"}))
    check_kinds(saved.get("resumed", []), "list", f"{path}: 'resumed'")
    began = (saved["world_size"], saved["threads"])
    if began != (world.size, torch.get_num_threads()):
        what = f"{began[0]} ranks of {began[1]} threads"
        world.print0(f"note: the run began with {what}; with other numbers its last bits will differ")
    if resume:
        before = world.first_does(lambda: load_settings(folder).train)
        for note in jump(before, c, data, resume["step"]):
            world.print0(note)
    step = resume["step"] if resume else 0
    again = {"step": step, "world_size": world.size, "launch": launch_id(), "argv": sys.argv}
    resumed = [*saved.get("resumed", []), again]
    saved |= {"train": dataclasses.asdict(c), "launch": launch_id(), "resumed": resumed}
    world.first_does(lambda: write_json(path, saved))  # n_epochs and a few others may be new


def jump(before, c, data, step):
    """[a line if the learning rate jumps at this step].

    It does if the schedule of the settings `before` ends at another step.
    """
    each, ends = data.steps_per_epoch(c.batch_size), [total_steps(x, data) for x in (before, c)]
    old, new = (learning_rate(c, step, each, end) for end in ends)
    if old == new:
        return []
    was = learning_rate(c, max(0, step - 1), each, ends[0])
    end = f"the {c.schedule} schedule now ends at step {ends[1]} instead of {ends[0]}"
    return [f"note: {end}: the learning rate goes from {was:.3g} to {new:.3g}"]


COUNTS = {  # of a slice: see measure.total
    "right": "count",
    "labels": "size",
    "row_right": "count",
    "rows": "size",
    "right_right": "count",
    "right_labels": "count",
    "labels_labels": "count",
    "loss": "number",
}
TESTED = {  # what status.json says of a run that was tested
    "status": "text",
    "step": "count",
    "seconds": "number",
    "target": "number",
    "test": {
        "accuracy": "share",
        "labels": "size",
        "row_accuracy": "share",
        "rows": "size",
        "all": COUNTS,
        "by_slice": {"*": {"*": COUNTS}},
    },
}


def ended(folder, resume, c, total):
    """status.json of a run that has nothing left to do, or None.

    resume: its last checkpoint; total: its last step.
    """
    status = {}
    # Killed before it wrote one, or damaged: then it is tested and written again.
    with contextlib.suppress(ConfigError):
        status = read_record(os.path.join(folder, "status.json"), TESTED)
    tested = status.get("status") in ("finished", "below target") and status.get("target") == c.target
    at_end = resume["step"] >= total or (c.stop_accuracy and resume["best"] >= c.stop_accuracy)
    return status if tested and at_end and status["step"] == resume["step"] else None


def report(folder, status, c, data):
    """Print the test result in status.json's words and draw curves.png; -> exit status."""
    test = status["test"]
    by_label = f"{test['accuracy']:.4f} of {test['labels']} labels"
    summary = f"test accuracy {by_label}, {test['row_accuracy']:.4f} of {test['rows']} rows"
    print_slices(test)
    print_baselines(getattr(data, "baselines", {}))
    plot_curves(folder, f"{os.path.basename(os.path.normpath(folder))}\n{summary}")
    print(f"{summary}; {status['step']} steps, {status['seconds']:.0f} s; {folder}", flush=True)
    if status["status"] == "finished":
        return 0
    of = f" on {c.target_slice}" if c.target_slice else ""
    print(f"below target{of}: {slice_accuracy(test, c.target_slice):.4f} < {c.target}", file=sys.stderr)
    return 1


def tested_weights(folder, step):
    """What the test is of: {"weights": "best" or "last", "step": its step}, with "why" if last.

    step: the last one of the run.
    """
    try:
        name = first_valid_checkpoint(folder, "best", holds_lock=True)
    except ConfigError:
        return {"weights": "last", "step": step, "why": "best.pt is missing or damaged"}
    return {"weights": name, "step": read_checkpoint(folder, name)["step"]}


def finish(run, resume):
    """Train, measure the best weights on the test split, write status.json and curves.png; -> exit status."""
    p, folder, world = run.plan, run.folder, run.world

    def write_status(**values):
        world.first_does(lambda: write_json(os.path.join(folder, "status.json"), values))

    write_status(status="running", pid=os.getpid())
    stopped_by, release_signals = stop_on_signals(world)
    try:
        outcome, state = train(run, resume, stopped_by)
        result = {"status": outcome, "step": state["step"], "seconds": state["seconds"]}
        if outcome == "finished":
            tested = world.first_does(lambda: tested_weights(folder, state["step"]))
            if tested["weights"] == "best":
                load_training_state(folder, read_checkpoint(folder, "best"), run.model)
            why = f"; {tested['why']}" if "why" in tested else ""
            world.print0(f"tested: the {tested['weights']} weights, of step {tested['step']}{why}")
            size = p.train.eval_batch_size
            test = evaluate(run.model, run.data, "test", size, run.device, run.dtype, stopped_by, world)
            result |= tested_result(test, tested, p.train)
    except BaseException as e:
        if world.is_main:
            with contextlib.suppress(RunError):  # what failed may be the disk
                write_json(os.path.join(folder, "status.json"), {"status": "failed", "error": f"{type(e).__name__}: {e}"})
        raise
    finally:
        run.wrapped = None  # even where an error holds on to the run: see parallel.leave
    write_status(**result)
    # Else they stay caught: torchrun may repeat them until this process has ended.
    if world.size == 1 and result["status"] != "preempted":
        release_signals()
    return world.first_does(lambda: leave_run(folder, result, p.train, run.data, stopped_by))


def tested_result(test, tested, c):
    """What status.json says of the test: {"status", ...}. test: what `evaluate` returned."""
    if test is None:  # cut short by a signal
        return {"status": "preempted"}
    about = {"tested": tested, "target": c.target, "test": test}
    if not math.isfinite(test["loss"]):
        return {"status": "failed", **about}
    reached = slice_accuracy(test, c.target_slice) >= c.target
    return {"status": "finished" if reached else "below target", **about}


def leave_run(folder, result, c, data, stopped_by):
    """Say how a run ended; -> the exit status of all its ranks."""
    if result["status"] == "preempted":
        how = f"python train.py --resume {folder}"
        print(f"stopped after step {result['step']} and saved; go on with: {how}", flush=True)
        return 128 + (stopped_by[0] if stopped_by else signal.SIGTERM)
    if result["status"] == "failed":
        if "test" in result:
            print(f"failed: the loss of the test is not finite; {LOWER}", flush=True)
        return 1
    return report(folder, result, c, data)


if __name__ == "__main__":
    run_cli(main)
