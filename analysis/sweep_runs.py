"""The runs behind the figures of sweep.py: train and measure what is missing, read the results.

In this file, config is sweep.py's Config.
"""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from tqdm import tqdm

import train
from analysis.compare import read_result, read_test
from nanorecall.metrics import slice_metrics
from nanorecall.records import read_log, read_record
from nanorecall.settings import ConfigError, RunError, build_config, field_names, require, say

ROOT = os.path.dirname(os.path.abspath(train.__file__))


@dataclass(frozen=True)
class Point:
    """One point of a figure: a training with several seeds, and what is measured afterwards.

    Arguments are written as on a command line. {run} stands for the run directory, {seed} for the
    seed.
    """

    series: str  # the line of the figure to which it belongs
    x: float  # where on that line
    name: str  # name of its runs, without the seed
    train_args: str = ""  # arguments of train.py; empty: nothing is trained
    eval_args: str = ""  # what to run after training: a script and its arguments
    result: str = ""  # the file that this writes into the run directory
    seeds: int = 0  # number of seeds: 0, 1, ...; 0: that of the command line


# ---- training ------------------------------------------------------------------------------------


def runs_of(points, config):
    """(point, seed, run directory) for every run of these points"""
    for seed in range(max([config.seeds, *[point.seeds for point in points]])):
        for point in points:
            if seed < (point.seeds or config.seeds):
                yield point, seed, os.path.join(config.log_dir, f"{point.name}_seed{seed}")


def missing_runs(points, config):
    """Run directories of these points that are not there, or not finished."""
    runs = runs_of(points, config)
    return [folder for point, _, folder in runs if not is_finished(point, folder)]


def is_trained(folder):
    path = os.path.join(folder, "status.json")
    if not os.path.exists(path):
        return False
    try:
        return read_record(path, {"status": "text"})["status"] == "finished"
    except ConfigError as e:
        say(f"note: {e}; training continues", file=sys.stderr)
        return False


def is_finished(point, folder):
    """Whether a run of the point has been trained and measured."""
    if point.train_args and not is_trained(folder):
        return False
    return not point.result or os.path.exists(os.path.join(folder, point.result))


def training_command(point, seed, folder, config):
    """The script and the arguments that train a run of the point, as text."""
    flags = f"--seed {seed} --num_threads 1 --log_dir {shlex.quote(config.log_dir)}"
    flags += f" --run_name {os.path.basename(folder)}"
    # A GPU would take bfloat16, and what is compared would depend on the machine.
    return f"train.py --dtype float32 {point.train_args} {config.extra_args} {flags}"


def split_command(command):
    """Words of a command, with paths of our own files, wherever the sweep is started."""
    return [os.path.join(ROOT, a) if a.endswith(".py") else a for a in shlex.split(command)]


class Children:
    """The processes that this one has started and waits for, each in a thread of its own."""

    def __init__(self):
        self.running = set()
        self.stopped_by = None  # the number of the signal that stopped this process

    def run(self, argv):
        """Run Python with these arguments -> exit status, standard error."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        with subprocess.Popen([sys.executable, *argv], env=env, **options) as process:
            self.running.add(process)
            if self.stopped_by:  # while it was being started
                process.send_signal(self.stopped_by)
            _, error = process.communicate()
            self.running.remove(process)
        return process.returncode, error

    @contextlib.contextmanager
    def stopped_with_this_process(self):
        """In the block, SIGTERM and SIGHUP go to the children, too, and raise SystemExit here.

        Ctrl-C needs no help: a terminal sends it to all of them.
        """

        def stop(number, frame):
            self.stopped_by = number
            for process in list(self.running):
                process.send_signal(number)
            raise SystemExit(128 + number)

        old_handlers = {}
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows lacks SIGHUP
            if number and signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                old_handlers[number] = signal.signal(number, stop)
        try:
            yield
        finally:
            for number, handler in old_handlers.items():
                signal.signal(number, handler)


def run_point(point, seed, folder, config, children):
    """Train and measure one run -> "", or the command that failed and the end of its output."""
    commands = []
    if point.train_args and not is_trained(folder):
        if os.path.exists(os.path.join(folder, "config.json")):
            commands.append(f"train.py --resume {shlex.quote(folder)}")
        else:
            commands.append(training_command(point, seed, folder, config))
    if point.eval_args:
        commands.append(point.eval_args.format(run=shlex.quote(folder), seed=seed))
    for command in commands:
        exit_status, error = children.run(split_command(command))
        if exit_status:
            return f"python {command}\n{error.strip()[-500:]}"
    return ""


def run_points(points, *args):
    """run_point of several points with the same training -> "", or the first error."""
    for point in points:
        error = run_point(point, *args)
        if error:
            return error
    return ""


def run_missing(points, config):
    """Run all that is missing, config.jobs runs at a time. RunError names the runs that failed."""
    # Figures share runs, and may measure the same run differently. A run is trained by one job.
    todo = {}  # {(folder, seed): {eval_args: point}}
    for point, seed, folder in runs_of(points, config):
        if not is_finished(point, folder):
            todo.setdefault((folder, seed), {})[point.eval_args] = point
    errors = []
    children = Children()
    with ThreadPoolExecutor(config.jobs) as pool, children.stopped_with_this_process():
        pending = {}
        for (folder, seed), of_run in todo.items():
            args = of_run.values(), seed, folder, config, children
            pending[folder] = pool.submit(run_points, *args)
        bar = tqdm(pending.items(), desc="runs", disable=None)  # None: on terminals only
        try:
            for number, (folder, future) in enumerate(bar, 1):
                error = future.result()
                if error:
                    errors.append(error)
                if bar.disable:
                    say(f"{number}/{len(todo)} {folder}", flush=True)
        except (KeyboardInterrupt, SystemExit):
            # The runs got the same signal, and save a checkpoint.
            pool.shutdown(cancel_futures=True)
            say("stopped: the runs are saved; the same command goes on with them", flush=True)
            raise
    if errors:
        message = f"{len(errors)} runs failed; the others are kept; run the same command again:"
        raise RunError("\n".join([message, *errors]))


# ---- results -------------------------------------------------------------------------------------

VALUE = {"value": "number"}
EDIT_METRICS = {"method": "text", "efficacy": VALUE, "specificity": VALUE}
RESULT_KINDS = {  # beginning of a result file's name: its parts that a figure shows
    "eval_test": {"metrics": {"accuracy": VALUE, "stored": {"*": VALUE}}},
    "eval_edit": {
        "metrics": {"edits": ["size"]},
        "by_slice": {"method, edits": {"*": EDIT_METRICS}},
    },
    "table": {"metrics": {"*": "dict"}},
}


def collect_results(points, config):
    """{point: [result of each seed]}; ConfigError for missing runs and for changed ones."""
    missing = missing_runs(points, config)
    message = f"{len(missing)} runs are missing, such as {' '.join(missing[:1])}"
    require(not missing, f"{message}; leave out --draw_only to train them", "draw_only")
    results = {}
    for point, seed, folder in runs_of(points, config):
        if point.train_args:
            argv = split_command(training_command(point, seed, folder, config))[1:]
            changed = ", ".join(changed_settings(folder, argv))
            message = f"{folder} was trained with another {changed}"
            require(not changed, f"{message}; delete it, or use another --log_dir", "log_dir")
        results.setdefault(point, []).append(read_point(point, folder))
    return results


EVAL = ("step", "seconds", "accuracy", "loss")  # what is kept of an evaluation in the log


def read_point(point, folder):
    """The result of one run of a point, as a dict for the figures.

    For a training: what analysis.compare.read_result returns; "slices" {slice: {value: metrics}};
    "evals", the evaluations in its log. "result" is the file that point.eval_args wrote.
    """
    result = {}
    if point.train_args:
        result = read_result(folder)
        result["slices"] = {}
        _, test = read_test(folder)
        for name, values in test["by_slice"].items():
            result["slices"][name] = {value: slice_metrics(n) for value, n in values.items()}
        result["evals"] = []
        for record in read_log(folder):
            if record["kind"] == "eval":
                result["evals"].append({name: record[name] for name in EVAL})
    if point.result:
        path = os.path.join(folder, point.result)
        name = os.path.basename(path)
        kinds = next(RESULT_KINDS[start] for start in RESULT_KINDS if name.startswith(start))
        result["result"] = read_record(path, kinds)
    return result


def changed_settings(folder, argv):
    """Names of the settings that differ between a run and a training with these arguments."""
    path = os.path.join(folder, "config.json")
    saved = read_record(path, {"train": "dict", "data": "dict", "model": "dict"})
    now = train.parse(argv)
    model = build_config(now.model_module.Config, now.assignments)
    changed = []
    for part, config in (("train", now.train), ("data", now.data), ("model", model)):
        values = json.loads(json.dumps(asdict(config)))  # as in the file: lists, not tuples
        # A run that is older than a setting was trained as with its default of now.
        saved_values = json.loads(json.dumps(asdict(type(config)()))) | saved[part]
        for name in field_names(type(config)):
            is_path = part == "train" and name in ("log_dir", "resume")
            if not is_path and saved_values[name] != values[name]:
                changed.append(name)
    return changed


# ---- what a figure shows, as a file --------------------------------------------------------------

SHOWN = {"seeds": "size", "points": [{"series": "text", "x": "number", "results": ["dict"]}]}


def shown_results(results, parts, seeds):
    """The parts of each result that a figure shows, as write_json takes it.

    results: {point: [result of each seed]}; parts: paths in a result ("slices.query").
    """
    points = []
    for point, of_seeds in results.items():
        small = [pick_parts(result, parts) for result in of_seeds]
        points.append({"series": point.series, "x": point.x, "results": small})
    return {"seeds": seeds, "points": points}


def pick_parts(result, parts):
    """{"a": {"b": 1, "c": 2}}, ["a.b"] -> {"a": {"b": 1}}; parts that it lacks are left out.

    A "*" in a path stands for every name: "slices.query.*.value".
    """
    picked = {}
    for path in parts:
        copy_part(result, picked, path.split("."))
    return picked


def copy_part(source, target, path):
    """Copy what lies at path, a list of names, from one nested dict to the other."""
    first, *rest = path
    names = list(source) if first == "*" else [first]
    for name in names:
        if name not in source:
            continue
        if rest:
            copy_part(source[name], target.setdefault(name, {}), rest)
        else:
            target[name] = source[name]


def read_shown(path):
    """A file of shown_results; ConfigError if it is damaged."""
    return read_record(path, SHOWN)


def by_series(shown):
    """What shown_results returns -> {series: {x: [result of each seed]}}"""
    results = {}
    for point in shown["points"]:
        results.setdefault(point["series"], {})[point["x"]] = point["results"]
    return results
