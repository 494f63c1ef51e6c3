"""One training run: its data, its model, and the methods that the loop in train.py calls."""

import contextlib
import dataclasses
import math
import os
import signal
import sys
import textwrap
import time

import torch
from tqdm import tqdm

from nanorecall.build import (
    build_data,
    build_model,
    build_model_config,
    count_parameters,
    enough_memory,
    inference_state_bytes,
    load_and_freeze,
    total_steps,
    training_advice,
)
from nanorecall.checkpoint import STATE, first_valid_checkpoint, read_checkpoint
from nanorecall.curriculum import Curriculum
from nanorecall.data_checks import check_users_data, named_data_errors
from nanorecall.distributed import (
    autodetect_device,
    check_parallel,
    describe_batch,
    has_lost_rank,
    is_dtensor,
    lost_rank,
    shard_columns,
    unsharded_notes,
    will_shard,
    wrap_model,
)
from nanorecall.files import lock_run_dir, unlock
from nanorecall.metrics import check_slice, evaluate, print_baselines, print_slices, slice_accuracy
from nanorecall.model_checks import check_users_model, named_errors
from nanorecall.plots import plot_curves
from nanorecall.progress import duration
from nanorecall.records import JsonlLog, check_kinds, read_log, read_record, write_json
from nanorecall.run_dir import (
    create_run_dir,
    has_checkpoint,
    is_under_torchrun,
    launch_id,
    run_metadata,
)
from nanorecall.saved_run import (
    check_data_unchanged,
    check_saved_settings,
    fixed_settings_json,
    load_settings,
    require_same_settings,
    require_unedited,
)
from nanorecall.settings import RunError, changed_settings, printable, require, say, tell_torchrun
from nanorecall.status import (
    accuracy_table,
    describe_test,
    read_ended_status,
    summarize_test,
    tested_weights,
)
from nanorecall.tensors import tensors_sha256
from nanorecall.tracking import Tracker, require_package
from nanorecall.training_checkpoint import load_training_state, training_state, write_checkpoint

LOWER_LR = "lower lr or raise warmup_steps"
COMPILE_NOTE = "compile: the first step and the first evaluation take 10 to 60 s each"


class Run:
    """One training run: data and model, built from settings, and a directory to write into.

        run = Run.create(settings, world)      # or Run.resume(settings, world)
        with run.running() as stop:
            run.finish(train(run, stop), stop)

    For a notebook: .settings (Settings), .data, .model, .folder, .state (step, best accuracy, ...),
    .result (what status.json says), .log() and .metrics(), lists of dicts for pandas.
    """

    def __init__(self, settings, world, has_checkpoint=False):
        """Build data and model. Every rank does the same, and the ranks agree on each error."""
        c = settings.train
        self.settings, self.world, self.folder = settings, world, settings.resume
        if c.num_threads:
            torch.set_num_threads(c.num_threads)
        with world.agree():
            self.device, self.dtype, self.device_line = autodetect_device(c, world)
        self.batch_line = describe_batch(c.batch_size, world, c.grad_accum_steps)
        with world.agree(), named_data_errors(settings):
            self.data = build_data(settings)
            check_users_data(self.data, settings)
        for note in getattr(self.data, "notes", ()):
            world.print0(note)
        with world.agree():
            if c.target_slice:
                check_slice(self.data, c.target_slice, c.eval_batch_size)
        self.config = build_model_config(settings, self.data)
        check_saved_settings(settings, self.config)
        with world.agree(), named_errors(settings):
            self.model = build_model(settings, self.config)
        with world.agree():
            check_users_model(self.model, settings, self.data, self.device, self.dtype)
        with world.agree():
            self.notes = load_and_freeze(self.model, c, has_checkpoint)
            check_parallel(self.model, c.parallel, world)
            self.notes += unsharded_notes(self.model, c.parallel, world)
            require_package(c.track)
        # A run that is killed before its first checkpoint must begin with the same weights again.
        self.initial_sha256 = None
        if c.init_from and not has_checkpoint:
            self.initial_sha256 = tensors_sha256(self.model.state_dict())
        self.steps_per_epoch = self.data.steps_per_epoch(c.batch_size)
        self.total_steps = total_steps(c, self.data)
        self.fixed_settings = fixed_settings_json(settings, self.config)  # goes into checkpoints
        self.state = {"step": 0, "best": -1.0, "best_overall": -1.0, "bad_steps": 0, "seconds": 0.0}
        self.curriculum = getattr(self.data, "curriculum", None) or Curriculum([])
        self.state["curriculum"] = self.curriculum.state
        self.result = None  # status.json, once the run has ended
        self.previous = None  # TrainConfig of the last start, if there is a checkpoint to resume
        self.has_ended = False
        self.parallel_model = None  # the model as a training step calls it, under DDP or FSDP

    @classmethod
    def create(cls, settings, world):
        """A new run. Its directory is made by `running`."""
        return cls(settings, world)

    @classmethod
    def resume(cls, settings, world):
        """The run in settings.resume. Its checkpoint is read by `running`."""
        is_saved = False
        with world.agree():
            if world.is_main:
                require_unedited(settings.resume)
                check_data_unchanged(settings.resume, settings)
                is_saved = has_checkpoint(settings.resume)
        return cls(settings, world, world.broadcast(is_saved))

    def print_summary(self):
        """Print the model's size, the device, and the size of its state when it decodes.

        With n_epochs=0, which ends here, also its modules and all settings.
        """
        print0, model_class = self.world.print0, self.settings.model_class
        counts = count_parameters(self.model)
        total = f"{counts['total']} with embedding, last norm and head"
        if self.settings.train.n_epochs == 0:
            print0(self.model)
            values = {}
            for config in self.configs():
                values |= dataclasses.asdict(config)
            print0(values)
        model = self.settings.train.model
        print0(f"model: {model}, params: {counts['layers']} in the layers, {total}")
        for note in self.notes:
            print0(note)
        print0(self.device_line)
        if hasattr(model_class, "describe_backend"):
            backend = model_class.describe_backend(self.config, self.device, self.dtype)
            print0(f"mixer: {backend}")
        size = inference_state_bytes(self.model, self.data.seq_len)
        if size is not None:
            print0(f"inference state: {size} bytes after {self.data.seq_len} tokens, in float32")

    # ---- from the first step to the last ----

    @contextlib.contextmanager
    def running(self):
        """Hold the run directory and train in the block -> stop, a list of the signals caught.

        In this order: catch signals, make or lock the directory, read the last checkpoint, write
        config.json, move the model to its device. An error in the block is recorded in
        status.json. If the run has ended already (has_ended), only the lock is taken.
        """
        # First, since a run with a directory must end as "preempted": moving and wrapping a large
        # model take a while, and train.slurm does not queue a job again that just died.
        stop = self.stop_on_signals()
        lock = None
        try:
            lock = self.lock_folder()
            self.read_last_checkpoint()
            if self.has_ended:
                self.restore_signals()
                yield []
                return
            self.write_config()
            self.print_start()
            with enough_memory(lambda: training_advice(self.model, self.device)):
                c = self.settings.train
                # Before the whole table would have to fit on one device.
                shard_columns(self.model, self.device)
                if not will_shard(c.parallel):  # that moves a block at a time, and keeps a part
                    self.model.to(self.device)
                if c.compile:
                    self.world.print0(COMPILE_NOTE)
                    # dynamic: else it is compiled again when the curriculum changes sizes.
                    self.model.compile(dynamic=True)
                self.parallel_model = wrap_model(self.model, c.parallel, self.device)
                with self.status_on_error():
                    yield stop
        finally:
            # Even if an error holds a reference to the run: see distributed.shutdown.
            self.parallel_model = None
            unlock(lock)
            # Ranks keep them: torchrun may repeat a signal until this process has ended.
            if self.world.size == 1:
                self.restore_signals()

    def lock_folder(self):
        """Make the directory of a new run, or lock a resumed one's -> the main rank's lock."""
        lock = None
        with self.world.agree():
            if self.world.is_main:
                if self.folder:
                    lock = lock_run_dir(self.folder)
                else:
                    self.folder, lock = create_run_dir(self.settings, self.config)
        self.folder = self.world.broadcast(self.folder)
        return lock

    def read_last_checkpoint(self):
        """Set state and has_ended of a resumed run. Without a checkpoint it starts at step 0."""
        world, c = self.world, self.settings.train
        self.checkpoint = None
        if not self.settings.resume:
            return
        name = ""
        with world.agree():
            if world.is_main and has_checkpoint(self.folder):
                name = first_valid_checkpoint(self.folder, "ckpt", "ckpt_prev", holds_lock=True)
        name = world.broadcast(name)
        if not name:
            return
        self.checkpoint = read_checkpoint(self.folder, name)
        missing = ", ".join(sorted(STATE.keys() - self.checkpoint.keys()))
        message = f"{self.folder}: {name}.pt has no {missing}; training cannot go on from it"
        require(not missing, message, "resume")
        require_same_settings(self.folder, self.settings, self.config, self.checkpoint)
        self.state = {key: self.checkpoint[key] for key in self.state}
        self.curriculum.state = self.state["curriculum"]
        with world.agree():
            if world.is_main:
                self.result = read_ended_status(self.folder, self.state, c, self.total_steps)
        self.result = world.broadcast(self.result)
        self.has_ended = self.result is not None

    def write_config(self):
        """Write config.json of a new run, or add this start to that of a resumed one."""
        path = os.path.join(self.folder, "config.json")
        with self.world.agree():
            if self.world.is_main:
                if self.settings.resume:
                    config = self.resumed_config(path)
                else:
                    config = run_metadata(self)
                write_json(path, config)
        self.previous = self.world.broadcast(self.previous)

    def resumed_config(self, path):
        """config.json with this start added; says what differs from the run's first start."""
        c, step = self.settings.train, self.state["step"]
        config = read_record(path, {"world_size": "count", "num_threads": "count"})
        check_kinds(config.get("resumed", []), "list", f"{path}: 'resumed'")
        now = self.world.size, torch.get_num_threads()
        if (config["world_size"], config["num_threads"]) != now:
            began = f"{config['world_size']} ranks of {config['num_threads']} threads"
            note = f"note: the run began with {began}; with other numbers its last bits will differ"
            self.world.print0(note)
        message = f"init_from={c.init_from} holds other weights than when {self.folder} began"
        weights = (self.initial_sha256, config.get("initial_sha256"))
        is_same = None in weights or weights[0] == weights[1]
        require(is_same, f"{message}; start a new run", None)
        dtype = str(self.dtype).removeprefix("torch.")
        if config.get("dtype", dtype) != dtype:  # dtype=auto on another device
            note = f"note: the run began in {config['dtype']} and goes on in {dtype}"
            self.world.print0(f"{note}; --device chooses between them")
        if self.checkpoint:
            self.previous = load_settings(self.folder, type(c)).train
        start = {"step": step, "world_size": self.world.size, "launch": launch_id()}
        start["argv"] = sys.argv
        # Settings of RESUMABLE may be new.
        config |= {"train": dataclasses.asdict(c), "launch": launch_id()}
        config["resumed"] = [*config.get("resumed", []), start]
        return config

    def configs(self):
        """The dataclasses that hold all settings."""
        return self.settings.train, self.config, self.settings.data

    def print_start(self):
        """Print the directory, the settings that are not the defaults, and the number of steps."""
        print0 = self.world.print0
        changed = {}
        for config in self.configs():
            changed |= changed_settings(config)
        words = ", ".join(f"{name}={value}" for name, value in changed.items())
        # A batch never crosses groups.
        size = self.settings.train.eval_batch_size
        n_val_steps = sum(math.ceil(len(s) / size) for s in self.data.eval_groups("val"))
        print0(f"### LOGDIR: {self.folder}")
        if self.settings.resume:
            print0(f"goes on after step {self.state['step']}")
        print0(textwrap.fill(f"not defaults: {words}", 100, break_on_hyphens=False))
        print0(self.batch_line)
        print0(f">>> n_train_steps = {self.steps_per_epoch}, n_val_steps = {n_val_steps}")

    @contextlib.contextmanager
    def status_on_error(self):
        """Say in status.json that the run is running, and, if the block raises, that it failed."""
        self.write_status({"status": "running", "pid": os.getpid()})
        try:
            yield
        except BaseException as e:
            if self.world.is_main and self.result is None:
                error = f"{type(e).__name__}: {e}"
                if has_lost_rank(self.world, e):
                    error = lost_rank(e)
                status = {"status": "failed", "error": error}
                with contextlib.suppress(RunError):  # what failed may be the disk
                    write_json(os.path.join(self.folder, "status.json"), status)
            raise

    def write_status(self, status):
        with self.world.agree():
            if self.world.is_main:
                write_json(os.path.join(self.folder, "status.json"), status)

    def stop_on_signals(self):
        """Catch SIGTERM, SIGINT, SIGHUP and SIGUSR1, so that train can finish its step and save.

        -> a list that collects them. On one process a second signal has its default effect. Under
        torchrun repeats are ignored: it forwards signals that each rank has got already.
        """
        stop = []

        def on_signal(number, frame):
            stop.append(number)
            if self.world.size == 1:
                signal.signal(number, signal.SIG_DFL)

        self.old_handlers = {}
        for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):
            number = getattr(signal, name, None)  # Windows lacks two of them
            if number and signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                self.old_handlers[number] = signal.signal(number, on_signal)
        return stop

    def restore_signals(self):
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)

    # ---- in the loop ----

    def begin(self, optimizer):
        """Load the last checkpoint, if there is one, and open log.jsonl and the progress bar."""
        world = self.world
        if self.checkpoint:
            load_training_state(self.folder, self.checkpoint, self.model, optimizer)
            self.checkpoint = None
        with world.agree():
            if world.is_main:
                step = self.state["step"]
                self.jsonl = JsonlLog(self.folder, step, self.evaluates_at(step))
        self.bar = tqdm(
            total=self.total_steps,
            initial=self.state["step"],
            desc="train",
            bar_format="{l_bar}{bar}| step {n_fmt}/{total_fmt}, {elapsed}{postfix}",
            disable=not (world.is_main and sys.stderr.isatty()),
        )
        self.tracker = Tracker(self) if world.is_main else None
        self.start_time = time.perf_counter() - self.state["seconds"]
        self.before = self.state["step"], self.state["seconds"]  # what earlier starts did
        self.restart_clock()

    def restart_clock(self):
        """The next log line says how long steps take from here on."""
        self.timed_from = self.state["step"], time.perf_counter()

    def note_new_schedule(self, learning_rate):
        """Print a note if the learning rate jumps because a resumed run has a new last step."""
        if not self.previous:
            return
        c, step, epoch = self.settings.train, self.state["step"], self.steps_per_epoch
        old_end, new_end = total_steps(self.previous, self.data), self.total_steps
        start = self.curriculum.decay_start(step)
        new = learning_rate(c, step, epoch, new_end, start)
        if learning_rate(c, step, epoch, old_end, start) != new:
            before = max(0, step - 1)
            last = learning_rate(c, before, epoch, old_end, self.curriculum.decay_start(before))
            end = f"the {c.lr_schedule} schedule now ends at step {new_end} instead of {old_end}"
            jump = f"the learning rate goes from {last:.3g} to {new:.3g}"
            self.world.print0(f"note: {end}: {jump}")

    def seconds(self):
        """Time spent in the loop, earlier starts included."""
        return time.perf_counter() - self.start_time

    def evaluates_at(self, step):
        """Whether the loop evaluates the weights that have had `step` updates."""
        interval = self.settings.train.eval_interval or self.steps_per_epoch
        return step >= self.total_steps or (step % interval == 0 and step > 0)

    def evaluate(self, split, stop):
        """metrics.evaluate on a split, shared by the ranks; None if a signal cut it short."""
        size = self.settings.train.eval_batch_size
        return evaluate(
            self.model, self.data, split, size, self.device, self.dtype, stop, self.world
        )

    def save(self, name, optimizer=None):
        """Write <name>.pt, on all ranks together. Without an optimizer, the weights alone."""
        self.state["seconds"] = self.seconds()
        about = {**self.state, "settings": self.fixed_settings}
        tensors = training_state(self.model, optimizer)
        sharded = any(is_dtensor(t) for t in tensors.values())
        write_checkpoint(self.folder, name, about, tensors, sharded, self.world)
        self.restart_clock()

    def write_log(self, **row):
        """Add a row to log.jsonl (main rank only)."""
        if self.world.is_main:
            self.jsonl.write(**row)
            self.tracker.log(row)

    def print(self, text):
        """Print a line without breaking the progress bar (main rank only)."""
        if not self.world.is_main:
            return
        if self.bar.disable:
            say(text, flush=True)
        else:
            tqdm.write(printable(text))

    def log_eval(self, result, accuracy):
        """Log an evaluation on val: a row of log.jsonl, and a line. accuracy: of target_slice."""
        step, name = self.state["step"], self.settings.train.target_slice
        self.write_log(kind="eval", step=step, split="val", seconds=self.seconds(), **result)
        where = f" of {name}" if name else ""
        exact, loss = result["exact_match"], result["loss"]
        text = f"val accuracy{where} {accuracy:.4f}, exact match {exact:.4f}, loss {loss:.4f}"
        self.print(f"step {step}: {text}")

    def log_step(self, loss, lr, **row):
        """Log the step that was just made: a row of log.jsonl, and a line or the progress bar."""
        step = self.state["step"]
        self.write_log(kind="train", step=step, seconds=self.seconds(), loss=loss, lr=lr, **row)
        text = f"loss {loss:.4f}, lr {lr:.2e}, {self.pace()}"
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            self.print(f"step {step}/{self.total_steps}: {text}")
        self.restart_clock()

    def pace(self):
        """Milliseconds per step since the last line, and the time left, as text."""
        step, first_step, began = self.state["step"], *self.timed_from
        milliseconds = 1000 * (time.perf_counter() - began) / (step - first_step)
        # Unlike the milliseconds per step, the time left includes evaluations and checkpoints.
        steps_before, seconds_before = self.before
        seconds_per_step = (self.seconds() - seconds_before) / (step - steps_before)
        left = duration(seconds_per_step * (self.total_steps - step))
        return f"{milliseconds:.0f} ms per step, {left} left"

    # ---- after the loop ----

    def finish(self, outcome, stop):
        """Test the best weights, write status.json, draw curves.png -> exit status.

        outcome: "finished", "preempted" or "failed", as train returned it.
        """
        world, c = self.world, self.settings.train
        self.bar.close()
        result = {"status": outcome, "step": self.state["step"], "seconds": self.state["seconds"]}
        if outcome == "finished":
            tested = self.load_best()
            why = f"; {tested['why']}" if "why" in tested else ""
            world.print0(f"tested: the {tested['weights']} weights, of step {tested['step']}{why}")
            result |= describe_test(self.evaluate("test", stop), tested, c)
        self.write_status(result)
        self.result = result
        if world.is_main:
            self.tracker.close(result)
        if world.size == 1 and result["status"] != "preempted":
            self.restore_signals()  # Ctrl-C stops the drawing at once
        return self.report(stop)

    def load_best(self):
        """Load the weights to be tested -> {"weights": "best" or "last", "step", "why" if last}."""
        tested = None
        with self.world.agree():
            if self.world.is_main:
                tested = tested_weights(self.folder, self.state["step"])
        tested = self.world.broadcast(tested)
        if tested["weights"] == "best":
            best = read_checkpoint(self.folder, "best")
            load_training_state(self.folder, best, self.model)
        return tested

    def report_again(self):
        """Report on a run that has_ended, as finish did -> exit status."""
        setting = "max_steps" if self.settings.train.max_steps else "n_epochs"
        advice = f"to train it longer, raise --{setting}; if it stopped early, also --stop_accuracy"
        self.world.print0(f"{self.folder} has ended; {advice}")
        return self.report()

    def report(self, stop=()):
        """report_on_main on the main rank -> exit status, the same on every rank."""
        exit_status = None
        with self.world.agree():
            if self.world.is_main:
                exit_status = self.report_on_main(stop)
        return self.world.broadcast(exit_status)

    def report_on_main(self, stop):
        """Print how the run ended, and draw curves.png if it was tested -> exit status."""
        result, c = self.result, self.settings.train
        if result["status"] == "preempted":
            how = f"go on with: python train.py --resume {self.folder}"
            print(f"stopped after step {result['step']} and saved; {how}", flush=True)
            return 128 + (stop[0] if stop else signal.SIGTERM)
        if result["status"] == "failed":
            if "test" in result:
                print(f"failed: the loss of the test is not finite; {LOWER_LR}", flush=True)
            tell_torchrun(f"the run failed, since numbers were not finite; {LOWER_LR}")
            return 1
        test = result["test"]
        summary = summarize_test(test, c.target_slice)
        print_slices(test)
        print_baselines(getattr(self.data, "baselines", {}))
        title = f"{os.path.basename(os.path.normpath(self.folder))}\n{summary}"
        stage_ends = self.curriculum.ends(result["step"])
        plot_curves(self.folder, title, c.target_slice, stage_ends)
        took = f"{result['step']} steps, {result['seconds']:.0f} s"
        print(f"{summary}; {took}; {self.folder}", flush=True)
        if result["status"] == "finished":
            return 0
        where = f" on {c.target_slice}" if c.target_slice else ""
        reached = slice_accuracy(test, c.target_slice)
        missed = f"below target{where}: {reached:.4f} < {c.target_accuracy}"
        if result["step"] == self.total_steps:
            missed += f"; a new run with --max_steps {2 * self.total_steps} may reach it"
        print(missed, file=sys.stderr)
        # torchrun would start the run again, which has ended. train.slurm reads status.json.
        return 0 if is_under_torchrun() else 1

    # ---- for pandas ----

    def log(self, kind=None):
        """Rows of log.jsonl as dicts. kind: "train", "eval" or "memory" alone."""
        return [row for row in read_log(self.folder) if kind in (None, row["kind"])]

    def metrics(self):
        """Test accuracy, a dict {"slice", "value", "accuracy", "ci95", ...} for each slice."""
        test = (self.result or {}).get("test")
        return accuracy_table(test) if test else []
