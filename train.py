"""Train one model on one task, in a run directory that can be resumed and measured later.

    python train.py configs/mqar_gpt.py                          # one process
    python train.py configs/mqar_gpt.py --lr 1e-3 --seed 2       # flags win over files
    python train.py configs/mqar_gpt.py --model mine             # your own model file, mine.py
    python train.py --resume runs/RUN                            # after Ctrl-C, SIGTERM or a crash
    torchrun --standalone --nproc_per_node=4 train.py configs/mqar_gpt.py  # 4 GPUs or CPU processes
    sbatch train.slurm configs/mqar_gpt.py                       # SLURM, one or many nodes
    python train.py configs/mqar_gpt.py --track tensorboard      # or wandb
    python train.py configs/mqar_gpt.py --n_epochs 0             # print modules and settings, stop

From Python: run = train.train_run(["configs/mqar_gpt.py", "--max_steps", "100"]).

It writes <log_dir>/<run>/: config.json (every setting and where it came from), log.jsonl, ckpt.pt
and ckpt_prev.pt (to resume), best.pt (highest validation accuracy), status.json, curves.png.
Exit status: 0 if the run ended at or above `target_accuracy`, 1 if below it or if it failed,
2 for a mistake in the settings, 128 + signal number if it was stopped. Under torchrun a run that
ended below it exits with 0, since torchrun would start it again; status.json says "below target".
"""

import math
import sys
from dataclasses import dataclass

import numpy as np
import torch

from nanorecall import saved_run
from nanorecall.distributed import (
    PARALLEL,
    SINGLE_PROCESS,
    all_finite,
    clip_gradients,
    micro_batches,
    process_group,
    sparse_parameters,
    sum_sparse_gradients,
    sync_gradients,
)
from nanorecall.launch import after_restart, export_checkpoints, read_command_line
from nanorecall.metrics import autocast, slice_accuracy
from nanorecall.rng import IGNORE_INDEX, micro_batch_seed
from nanorecall.run import LOWER_LR, Run
from nanorecall.settings import Json, at_least, fits_in_a_path, one_of, require, run_cli, within
from nanorecall.sparse import SparseAdamW
from nanorecall.tracking import TRACKERS
from nanorecall.training_checkpoint import CHECKPOINT_FORMATS


@dataclass
class TrainConfig:
    # -- what to train
    model: str = "gpt"  # short name (MODELS in nanorecall/build.py lists all), or file.Class
    data: str = "data_mqar"  # file with the task
    # -- steps
    n_epochs: int = 10  # passes over the training set; 0 prints the model and stops
    max_steps: int = 0  # stop after this many optimizer steps instead; 0: by epochs
    batch_size: int = 32  # sequences per optimizer step, all ranks and micro-batches together
    grad_accum_steps: int = 1  # micro-batches into which each rank splits its part, to save memory
    parallel: str = "ddp"  # under torchrun: ddp (each rank has the model) or fsdp (a shard of it)
    # -- optimizer
    lr: float = 1e-3  # highest learning rate of AdamW
    lr_schedule: str = "exponential"  # or cosine, linear (to lr_min_ratio), constant; see SCHEDULES
    lr_gamma: float = 0.95  # exponential: lr is multiplied by this after each epoch
    lr_min_ratio: float = 0.0  # cosine, linear: the fraction of lr that is reached at the end
    warmup_steps: int = 0  # raise the learning rate from 0 over this many steps
    weight_decay: float = 0.0  # AdamW's, on matrices only
    beta1: float = 0.9  # AdamW's decay of the mean gradient
    beta2: float = 0.999  # AdamW's decay of the mean squared gradient
    clip_grad: float = 1.0  # scale gradients down to this norm; 0: never
    max_skipped_steps: int = 5  # give up after so many skipped steps in a row (NaN in the gradient)
    # -- evaluation, log and checkpoints
    eval_interval: int = 0  # steps between evaluations on the val split; 0: an epoch
    save_interval: int = 0  # steps between checkpoints, besides those at evaluations; 0: only those
    eval_batch_size: int = 100  # sequences in a forward pass of an evaluation
    log_interval: int = 20  # steps between lines of log.jsonl
    mem_log_interval: int = 0  # memory models: steps between log lines on the use of slots; 0: none
    track: str = ""  # where the log also goes: tensorboard or wandb; empty: nowhere
    stop_accuracy: float = 0.0  # stop early once val token accuracy is at least this; 0: never
    target_accuracy: float = 0.0  # test token accuracy to reach; below it, exit with status 1
    target_slice: str = ""  # slice=value whose accuracy the two above and best.pt take; empty: all
    # -- weights to begin with
    init_from: str = ""  # load weights of this run, checkpoint file or torch.distributed folder
    init_step: int = -1  # which of its steps; -1: the latest
    init_map: Json = ""  # JSON {source: target}: blocks ("0-5": "0-5"), names, patterns; empty: all
    freeze: Json = ""  # parameters not to train: names or patterns (*.att,embed), JSON list or dict
    # -- a second data set
    synthetic_dataset: str = ""  # a data set on disk to mix into training within a window of steps
    synthetic_start_step: int = 0  # the window's first step
    synthetic_end_step: int = 0  # and the one after its last
    synthetic_weight: float = 1.0  # fraction of the window's steps that take their batch from there
    # -- run directory
    log_dir: str = "runs"  # where run directories go
    exp_group: str = "0"  # label in the run's name
    run_name: str = ""  # name of the run directory; empty: made from the settings and the time
    resume: str = ""  # a run directory to continue; its config.json holds the settings
    export_checkpoint: str = ""  # with resume: rewrite checkpoints as `file` or `shards`, stop
    # -- machine
    seed: int = 0  # of the initial weights, and of the data
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # float32 or bfloat16 (autocast); auto: bfloat16 on CUDA
    compile: bool = False  # torch.compile: 10-60 s at the start, then 1.1 times as fast on a CPU
    num_threads: int = 0  # CPU threads; 0: torch decides. Another number changes last bits

    def check(self):
        at_least(self, 0, "n_epochs", "max_steps", "warmup_steps", "weight_decay", "clip_grad")
        at_least(self, 0, "eval_interval", "save_interval", "mem_log_interval")
        at_least(self, 0, "synthetic_start_step", "synthetic_end_step")
        at_least(self, 1, "grad_accum_steps", "max_skipped_steps")
        at_least(self, 1, "eval_batch_size", "log_interval")
        within(self, 1, 2**24, "batch_size")
        within(self, 0, 1024, "num_threads")
        within(self, 0, 1, "lr_gamma", "lr_min_ratio", "stop_accuracy", "target_accuracy")
        within(self, 0, 1, "synthetic_weight")
        within(self, 0, 0.99999, "beta1", "beta2")
        within(self, 0, 2**62, "seed")
        one_of(self, SCHEDULES, "lr_schedule")
        one_of(self, ("auto", "float32", "bfloat16"), "dtype")
        one_of(self, PARALLEL, "parallel")
        one_of(self, ("", *TRACKERS), "track")
        one_of(self, ("", *CHECKPOINT_FORMATS), "export_checkpoint")
        require(self.lr > 0, f"lr={self.lr} must be above 0", "lr")
        fits_in_a_path(self, "run_name", "exp_group")
        start, end = self.synthetic_start_step, self.synthetic_end_step
        message = f"synthetic_end_step={end} must be above synthetic_start_step={start}"
        require(end > start or not self.synthetic_dataset, message, "synthetic_end_step")
        message = "grad_accum_steps must not exceed batch_size"
        require(self.grad_accum_steps <= self.batch_size, message, "grad_accum_steps")

    def unused(self):
        """{setting: why it has no effect beside the others}"""
        reasons = {}
        if self.lr_schedule != "exponential":
            reasons["lr_gamma"] = f"lr_schedule is {self.lr_schedule}"
        if self.lr_schedule not in ("cosine", "linear"):
            reasons["lr_min_ratio"] = f"lr_schedule is {self.lr_schedule}"
        if not self.init_from:
            reasons |= dict.fromkeys(("init_step", "init_map"), "there is no init_from")
        if not self.synthetic_dataset:
            names = ("synthetic_start_step", "synthetic_end_step", "synthetic_weight")
            reasons |= dict.fromkeys(names, "there is no synthetic_dataset")
        return reasons


# --help shows these first.
COMMON = (
    *("model", "data", "max_steps", "batch_size", "lr", "seed", "run_name", "resume"),
    *("n_layers", "dim", "n_heads", "vocab_size", "input_seq_len", "num_kv_pairs", "task"),
)


def parse(argv):
    """Command line -> Settings."""
    return read_command_line(argv, TrainConfig, __doc__, COMMON)


def main(argv=None):
    settings = parse(sys.argv[1:] if argv is None else argv)
    # One World for this process alone, or for all of torchrun's ranks. Every rank runs this file
    # from top to bottom. Only the main rank prints and writes (each rank, its own shards).
    with process_group(settings.train.device) as world:
        settings = after_restart(settings, world)
        if settings.train.export_checkpoint:
            return export_checkpoints(settings, world)
        run = Run.resume(settings, world) if settings.resume else Run.create(settings, world)
        run.print_summary()
        if settings.train.n_epochs == 0:
            return 0
        # `stop` lists the signals caught so far (Ctrl-C, SIGTERM), at first none. An error
        # in this block is recorded in status.json.
        with run.running() as stop:
            if run.has_ended:
                return run.report_again()
            outcome = train(run, stop)
            return run.finish(outcome, stop)


def train(run, stop):
    """Train until the last step, stop_accuracy or a signal -> "finished", "failed" or "preempted".

    All that the loop must remember is in run.state and in the optimizer, and both are in each
    checkpoint. Everything random is a function of the seed and the step. A resumed run therefore
    continues bit for bit, on the same machine with as many ranks and threads.
    """
    c, model = run.settings.train, run.model
    optimizer = configure_optimizer(model, c)
    run.begin(optimizer)  # loads the checkpoint of a resumed run
    run.note_new_schedule(learning_rate)  # a resumed run may end at another step than planned
    state = run.state  # {"step", "best", "best_overall", "bad_steps", ...}

    while True:
        step = state["step"]

        # Set the learning rate. It is a function of the settings and the step, so a resumed run
        # needs no state of a scheduler. If stages end by their loss, cosine and linear decay begin
        # with the task itself.
        start = run.curriculum.decay_start(step)
        lr = learning_rate(c, step, run.steps_per_epoch, run.total_steps, start)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

        # Once in a while: evaluate (all ranks take part) and save. This comes before the update,
        # so step counts the updates made so far, and the loop is entered once more after the last.
        # A run that resumes at such a step measures it again, with the same result.
        is_last = step >= run.total_steps
        if run.evaluates_at(step):
            result = run.evaluate("val", stop)
            if result is None:  # a signal cut it short: it is done again after a resume
                run.save("ckpt", optimizer)
                return "preempted"
            accuracy = slice_accuracy(result, c.target_slice)
            run.log_eval(result, accuracy)
            # A run with broken weights must fail here, not be saved over the last good checkpoint.
            if not math.isfinite(result["loss"]) or not all_finite(model, run.world):
                run.print(f"stopped: weights or loss are not finite after step {step}; {LOWER_LR}")
                return "failed"
            # best.pt holds the weights of highest val accuracy; these are tested at the end.
            # A slice may stay at an accuracy of 1. Then the accuracy over all labels decides.
            if (accuracy, result["accuracy"]) > (state["best"], state["best_overall"]):
                state["best"], state["best_overall"] = accuracy, result["accuracy"]
                run.save("best")
            run.save("ckpt", optimizer)  # to resume from: weights, optimizer and run.state
            if is_last or (c.stop_accuracy and accuracy >= c.stop_accuracy):
                return "finished"
        elif c.save_interval and step % c.save_interval == 0 and step > 0:
            run.save("ckpt", optimizer)

        # Forward and backward, in micro-batches to simulate a larger batch than fits in memory.
        loss, must_stop = forward_backward(run, step, stop)

        # Clip the gradient: one odd batch must not move the weights far. A single NaN would reach
        # all weights and both of AdamW's moments, so such a step is skipped, and its batch is lost.
        # The gradient is the same on all ranks, so all of them skip it.
        norm = clip_gradients(model.parameters(), c.clip_grad or math.inf)
        is_finite = bool(torch.isfinite(norm))
        if is_finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state["bad_steps"] = 0 if is_finite else state["bad_steps"] + 1
        state["step"] = step + 1

        # Memory layers count how often each slot is read. The counts are of one step, so they are
        # used (to balance the slots, and for the log) and set to 0 here.
        if hasattr(model, "on_step_end"):
            must_report = c.mem_log_interval > 0 and state["step"] % c.mem_log_interval == 0
            usage = model.on_step_end(must_report)
            if usage:
                run.write_log(kind="memory", step=state["step"], layers=usage)

        # Log, but not every step: ranks have to exchange their parts of the loss for it. Only a
        # curriculum sees every loss, the same on all ranks, until its last stage is learned.
        run.bar.update()
        is_logged = state["step"] % c.log_interval == 0 or not is_finite
        is_learning = run.curriculum.is_learning(step)
        if is_logged or is_learning:
            mean_loss = run.world.all_gather(loss.item()).sum().item()
        if is_logged:
            run.log_step(mean_loss, lr, grad_norm=norm.item(), skipped=not is_finite)
        if is_learning:
            run.curriculum.end_step(step, mean_loss)

        # One bad batch may be skipped. If skipping does not help, the weights or lr are at fault.
        if state["bad_steps"] >= c.max_skipped_steps:
            times = f"{c.max_skipped_steps} steps in a row"
            run.print(f"stopped: the gradient was not finite {times}; {LOWER_LR}")
            return "failed"

        # A signal waits until here, so that what is saved is a whole step.
        if must_stop:
            run.save("ckpt", optimizer)
            return "preempted"


def forward_backward(run, step, stop):
    """Gradients of the mean loss over all labels of the global batch.

    -> (this rank's part of that loss, a scalar tensor; has any rank caught a signal?)

    Sequences differ in their number of labels. Each micro-batch is therefore weighted by its
    fraction of the labels of the whole batch; the sum over micro-batches and ranks is then the
    mean over the batch, however it is split. (sync_gradients sums over ranks; plain DDP averages.)
    """
    c = run.settings.train
    indices = np.asarray(run.data.batch_indices(step, c.batch_size))
    batches = []
    # number: 0 to ranks * grad_accum_steps - 1, counted over all ranks
    for number, mine in micro_batches(indices, run.world, c.grad_accum_steps):
        # The last batch of an epoch may leave nothing for this rank. DDP and FSDP wait for every
        # rank in every pass, so it computes one sequence more, with weight 0.
        is_real = len(mine) > 0
        example = run.data.batch("train", step, mine if is_real else indices[:1])
        tokens, targets, _, *rest = example  # rest: cu_seqlens of packed documents
        n_labels = (targets != IGNORE_INDEX).sum().item() if is_real else 0
        batches.append((number, (tokens, targets, *rest), n_labels, is_real))

    # One exchange of numbers: how many labels the whole batch has, and whether any rank has caught
    # a signal. The ranks must agree on that, or one would leave while the others wait for it.
    n_labels_here = sum(n_labels for _, _, n_labels, _ in batches)
    n_labels_all, n_stop = run.world.all_gather(n_labels_here, len(stop)).sum(0).tolist()

    # The traceback of an error keeps local variables alive, and the process group cannot be closed
    # while a DDP model lives. So run.parallel_model gets no local name.
    loss = 0.0
    for i, (number, inputs, n_labels, is_real) in enumerate(batches):
        run.parallel_model.train(is_real)  # in eval mode, memory layers do not count reads
        # What a model of your own draws (dropout) is a function of seed, step and micro-batch. So
        # no checkpoint has to hold the state of a generator.
        torch.manual_seed(micro_batch_seed(c.seed, step, number))
        # Gradients add up over micro-batches. The ranks exchange them with the last one only.
        is_last_batch = i == len(batches) - 1
        with sync_gradients(run.parallel_model, enabled=is_last_batch):
            # Under bfloat16, matrix products run in half precision; weights stay in float32.
            with autocast(run.device, run.dtype):
                _, micro_loss = run.parallel_model(*(x.to(run.device) for x in inputs))
            micro_loss = micro_loss * (n_labels / max(1, n_labels_all))
            micro_loss.backward()
        loss = loss + micro_loss.detach()
    sum_sparse_gradients(run.model, run.world)  # DDP leaves those of large tables to us
    run.parallel_model.train()  # as it was, also after a dummy sequence
    return loss, n_stop > 0


# Schedules: factor of lr. epoch counts from 0; progress through the run is in [0, 1]. A new one is
# a function and a line in the table; its name is then a value of --lr_schedule.


def exponential(c, epoch, progress):
    return c.lr_gamma**epoch


def cosine(c, epoch, progress):
    return c.lr_min_ratio + (1 - c.lr_min_ratio) * (1 + math.cos(math.pi * progress)) / 2


def linear(c, epoch, progress):
    return c.lr_min_ratio + (1 - c.lr_min_ratio) * (1 - progress)


def constant(c, epoch, progress):
    return 1.0


SCHEDULES = {
    "exponential": exponential,
    "cosine": cosine,
    "linear": linear,
    "constant": constant,
}


def learning_rate(c, step, steps_per_epoch, total_steps, start=0):
    """Learning rate of a step counted from 0: linear warm-up times the schedule.

    cosine and linear decay from step `start` on, and are flat before it.
    """
    # AdamW's first steps are as long as lr whatever the gradient is, since its moments are still
    # those of a few batches. Small steps at first keep them from throwing the model far off.
    warmup = min(1.0, (step + 1) / c.warmup_steps) if c.warmup_steps else 1.0
    epoch = step // steps_per_epoch
    progress = min(1.0, (step - start) / max(1, total_steps - start))
    return c.lr * warmup * SCHEDULES[c.lr_schedule](c, epoch, progress)


def configure_optimizer(model, c):
    """AdamW. Matrices decay toward 0; vectors do not, since norm weights belong near 1.

    A model's lr_scales() may name parameters with a learning rate of their own: the values of a
    memory layer, each of which gets a gradient only when it is read. They do not decay either.
    """
    lr_scales = model.lr_scales() if hasattr(model, "lr_scales") else {}
    groups = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:  # frozen by --freeze
            continue
        scale = next((lr_scales[end] for end in lr_scales if name.endswith(end)), None)
        has_own_scale, is_matrix = scale is not None, p.ndim >= 2
        group = {
            "params": [],
            "weight_decay": c.weight_decay if is_matrix and not has_own_scale else 0.0,
            "lr_scale": scale if has_own_scale else 1.0,
        }
        # Sorted by key, so matrices are the first group.
        groups.setdefault((has_own_scale, not is_matrix), group)["params"].append(p)
    groups = [groups[key] for key in sorted(groups)]
    optimizer_class = SparseAdamW if sparse_parameters(model) else torch.optim.AdamW
    # fused: one kernel updates all parameters, instead of a dozen small ones for each of them
    return optimizer_class(groups, betas=(c.beta1, c.beta2), fused=True)


# ---- from Python or a notebook -------------------------------------------------------------------


def train_run(argv):
    """Train as the command line would, in one process -> the Run, with the tested weights.

    With n_epochs=0 the Run has a new model and the data, and no directory.

        run = train_run(["configs/mqar_gpt.py", "--max_steps", "100"])
        pandas.DataFrame(run.log("train")), pandas.DataFrame(run.metrics()), run.model(tokens)
    """
    settings = parse(argv)
    create = Run.resume if settings.resume else Run.create
    run = create(settings, SINGLE_PROCESS)
    if settings.train.n_epochs == 0:
        return run
    with run.running() as stop:
        if run.has_ended:
            run.load_best()
        else:
            run.finish(train(run, stop), stop)
    run.model.eval()
    return run


def load_run(folder, which="best"):
    """A trained run -> (Settings, data, model in eval mode on the CPU, checkpoint).

    which: "best" (highest validation accuracy) or "ckpt" (latest).
    """
    return saved_run.load_run(folder, TrainConfig, which)


if __name__ == "__main__":
    run_cli(main)
