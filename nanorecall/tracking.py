"""train.py --track: what log.jsonl gets, also in TensorBoard or on wandb.

    python train.py configs/mqar_gpt.py --track tensorboard   # to see it: tensorboard --logdir runs
    python train.py configs/mqar_gpt.py --track wandb         # WANDB_MODE=offline works, too

log.jsonl is the record of a run. Each start of the run gives the tracker all rows that are kept
there, before new ones. So after a resume nothing is missing and nothing is there twice, even if the
run began without a tracker or its last rows were lost.

A tracker is a class and a line in TRACKERS, under the name of its package.
"""

import contextlib
import importlib.util
import math
import os
import secrets
import time
from dataclasses import asdict

from nanorecall.settings import require

PROJECT = "nanorecall"  # on wandb, unless WANDB_PROJECT names another


class Tracker:
    """Sends the log of a run to its tracker (main rank only).

    If the tracker fails (full disk, no network), a note says so, and training goes on without it.
    """

    def __init__(self, run):
        """Begin, or continue, the record of a run whose log.jsonl is open."""
        self.run, self.record = run, None
        name = run.settings.train.track
        if not name:
            return
        with self.note_on_error():
            self.record = TRACKERS[name](run.folder, hyperparameters(run), run.state["seconds"])
            for row in run.log():
                self.record.log(row["step"], numbers_of(row))

    @contextlib.contextmanager
    def note_on_error(self):
        try:
            yield
        except Exception as e:
            self.record = None
            name = self.run.settings.train.track
            reason = f"{type(e).__name__}: {e}".partition("\n")[0]
            self.run.print(f"note: {name} gets no more of this run ({reason}); log.jsonl has all")

    def log(self, row):
        """row: as in log.jsonl."""
        if self.record:
            with self.note_on_error():
                self.record.log(row["step"], numbers_of(row))

    def close(self, result):
        """result: what status.json says."""
        if self.record:
            with self.note_on_error():
                row = {"kind": "test", **result.get("test", {})}
                self.record.close(result["step"], numbers_of(row), result["status"] == "failed")


def hyperparameters(run):
    """{name: value} of all settings of a run, as numbers and text."""
    settings = {}
    for config in run.configs():
        for name, value in asdict(config).items():
            settings[name] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return settings


def numbers_of(row):
    """A row of log.jsonl -> {"train/loss": 0.5, ...}: its finite numbers, and those of layers.

    log.jsonl has null for numbers that are not finite.
    """
    kind = row.get("split", row["kind"])
    parts = {kind: row}
    for layer, usage in row.get("layers", {}).items():
        parts[f"{kind}/{layer}"] = usage
    numbers = {}
    for part, values in parts.items():
        for name, value in values.items():
            is_number = isinstance(value, (int, float)) and math.isfinite(value)
            if is_number and name != "step":
                numbers[f"{part}/{name}"] = value
    return numbers


class TensorBoard:
    """An event file in the run directory.

    SummaryWriter writes in a thread, whose errors end in a traceback on the screen. This writes at
    once.
    """

    def __init__(self, folder, settings, seconds):
        """seconds: that the run has trained before."""
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard.summary import hparams

        # TensorBoard reads the files of a directory in the order of their names.
        path = os.path.join(folder, f"events.out.tfevents.{time.time_ns()}")
        self.writer = RecordWriter(open(path, "xb"))
        self.began, self.seconds = time.time() - seconds, 0.0
        self.write(0, file_version="brain.Event:2")
        # TensorBoard now forgets what earlier starts wrote.
        self.write(0, session_log=SessionLog(status=SessionLog.START))
        # Its page HPARAMS compares runs by these.
        metrics = ("val/accuracy", "val/loss", "test/accuracy", "test/exact_match")
        experiment, start, self.end = hparams(settings, dict.fromkeys(metrics))
        self.write(0, summary=experiment)
        self.write(0, summary=start)

    def write(self, step, **content):
        from tensorboard.compat.proto.event_pb2 import Event

        event = Event(step=step, wall_time=self.began + self.seconds, **content)
        self.writer.write(event.SerializeToString())
        self.writer.flush()

    def log(self, step, numbers):
        from tensorboard.compat.proto.summary_pb2 import Summary

        # Rows of earlier starts keep their time.
        self.seconds = numbers.get("train/seconds", numbers.get("val/seconds", self.seconds))
        values = [Summary.Value(tag=name, simple_value=x) for name, x in numbers.items()]
        self.write(step, summary=Summary(value=values))

    def close(self, step, numbers, is_failed):
        self.log(step, numbers)
        self.write(step, summary=self.end)
        self.writer.close()


class Wandb:
    """A run on wandb, of the same id after each resume."""

    def __init__(self, folder, settings, seconds):
        import wandb

        path = os.path.join(folder, "wandb_id.txt")
        if not os.path.exists(path):
            with open(path, "w") as f:
                f.write(secrets.token_hex(4))
        with open(path) as f:
            run_id = f.read()
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.path.basename(os.path.normpath(folder)),
            id=run_id,
            resume="allow",
            dir=folder,
            config=settings,
            allow_val_change=True,  # a resumed run may have another max_steps
        )
        self.run.define_metric("*", step_metric="step")  # the x axis of all charts
        # wandb takes no step twice, and several rows of log.jsonl may be of one step. So the rows
        # are numbered. A continued record already has those before self.first.
        self.n_rows = 0
        self.first = self.run.step

    def log(self, step, numbers):
        if self.n_rows >= self.first:
            self.run.log({"step": step, **numbers}, step=self.n_rows)
        self.n_rows += 1

    def close(self, step, numbers, is_failed):
        self.run.summary.update(numbers)
        self.run.finish(exit_code=int(is_failed))


TRACKERS = {"tensorboard": TensorBoard, "wandb": Wandb}


def require_package(name):
    """ConfigError if the tracker of this name (or "") is not installed."""
    is_there = not name or importlib.util.find_spec(name)
    message = f'track={name} needs a package: pip install {name}; --track "" trains without it'
    require(is_there, message, "track")
