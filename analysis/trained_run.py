"""A trained run opened for analysis, the form of results, and the commands of both scripts.

    run = open_run("runs/RUN", config)
    table = map_batches(run, lambda batch: {"example": batch.indices, ...})

A result is eval_<what>.json (of ablate.py, ablate_<what>.json), {config, metrics, by_slice,
examples}, with every measured number as {"value", "ci95", "n"}; eval_<what>.parquet, the
measurements; and eval_<what>.png.

Letters: B examples in a batch, T tokens, N labels in a batch.
"""

import contextlib
import difflib
import functools
import hashlib
import io
import math
import os
import re
import sys
import time
from dataclasses import dataclass, field, fields
from types import SimpleNamespace

import numpy as np
import torch

from nanorecall.build import enough_memory
from nanorecall.distributed import SINGLE_PROCESS, autodetect_device, process_group
from nanorecall.files import atomic_write, dataset_sha256
from nanorecall.metrics import autocast, iter_predictions
from nanorecall.model_checks import check_decoding
from nanorecall.progress import progress
from nanorecall.records import read_record, write_json
from nanorecall.rng import IGNORE_INDEX
from nanorecall.settings import (
    ConfigError,
    at_least,
    build_config,
    field_names,
    help_text,
    one_of,
    print_help,
    printable,
    reject_unknown,
    reject_unused,
    require,
    say,
    split_argv,
    wants_help,
)
from nanorecall.source_files import is_users_file
from train import load_run

# ---- a trained run -------------------------------------------------------------------------------


@dataclass
class AnalysisConfig:
    """Settings of every command that runs a model."""

    split: str = "test"  # test or val
    checkpoint: str = "best"  # best (highest val accuracy) or ckpt (latest)
    eval_batch_size: int = 100  # examples in a forward pass
    device: str = "auto"  # auto, cpu, cuda, mps

    def check(self):
        at_least(self, 1, "eval_batch_size")
        one_of(self, ("test", "val"), "split")
        message = f"checkpoint={self.checkpoint!r} must be best or ckpt, which are files of a run"
        message += "; name the run itself without a flag: python eval.py runs/RUN"
        require(self.checkpoint in ("best", "ckpt"), message, "checkpoint")


@dataclass
class TrainedRun:
    """A trained run, as every analysis gets it, and what the present command notes about it."""

    folder: str
    settings: object  # nanorecall.build.Settings, as the run was trained
    data: object
    model: torch.nn.Module
    step: int  # of the checkpoint
    device: torch.device
    dtype: torch.dtype
    config: object  # the command's settings
    world: object = SINGLE_PROCESS
    prefix: str = "eval"  # names of result files begin with it
    options: dict = field(default_factory=dict)  # {command: names of its settings}
    suffixes_read: list = field(default_factory=list)  # of results that the command has read
    settings_read: dict = field(default_factory=dict)  # theirs, where they are not the command's
    figures: list = field(default_factory=list)  # paths of those that it has written
    findings: list = field(default_factory=list)  # its results in sentences
    sample: str = ""  # which sequences it measures; empty: all of them

    @property
    def name(self):
        return os.path.basename(os.path.normpath(self.folder))

    @property
    def pad(self):
        """The token that fills short examples up; -1 if there is none."""
        return self.data.tokenizer.pad if hasattr(self.data, "tokenizer") else -1

    def provenance(self):
        """Where a result comes from."""
        return {
            "run": self.folder,
            "split": self.config.split,
            "checkpoint": self.config.checkpoint,
            "step": self.step,
            "model": self.settings.train.model,
            "precision": str(self.dtype).removeprefix("torch."),
        }

    def finding(self, sentence):
        """Print a result as a sentence. The command's section of a report begins with these."""
        say(sentence)
        self.findings.append(sentence)

    def tensor(self, ids):
        return torch.from_numpy(np.asarray(ids, np.int64)).to(self.device)

    def text(self, ids):
        """Tokens as text, or as numbers where the data has no tokenizer."""
        ids = np.atleast_1d(np.asarray(ids))
        if hasattr(self.data, "tokenizer"):
            return self.data.tokenizer.decode(ids)
        return " ".join(map(str, ids.tolist()))

    def token(self, token_id):
        """One token as text that can be seen, also if it is a blank or a special token."""
        token_id = int(token_id)
        if not hasattr(self.data, "tokenizer"):
            return str(token_id)
        special = {self.pad: "PAD", self.pad + 1: "BOS", self.pad + 2: "EOS"}
        if token_id in special:
            return special[token_id]
        text = self.data.tokenizer.token_strings[token_id]
        if text == " ":
            return "␣"
        return text if text.isprintable() else repr(text)[1:-1]


def open_run(folder, config, world=SINGLE_PROCESS):
    """The run in `folder`, its model on the device and in the dtype that the config names."""
    # A new model takes random numbers before it is filled from the checkpoint.
    with torch.random.fork_rng(devices=[]):
        settings, data, model, state = load_run(folder, config.checkpoint)
    # ablate.py has no dtype: its effects are too small for bfloat16.
    dtype, why_dtype = getattr(config, "dtype", "float32"), "asked for"
    if dtype == "auto":
        # What "auto" was where the run was trained may be another one here.
        saved = read_record(os.path.join(folder, "config.json"), {})
        dtype, why_dtype = saved.get("dtype", settings.train.dtype), "as in training"
    wanted = SimpleNamespace(device=config.device, dtype=dtype)
    device, dtype, description = autodetect_device(wanted, world, why_dtype)
    step = state["step"]
    world.print0(f"{folder}: {config.checkpoint}.pt of step {step}; {description}")
    return TrainedRun(folder, settings, data, model.to(device), step, device, dtype, config, world)


def in_float32(command):
    """A command whose forward passes run in float32, as the edits that it measures."""

    @functools.wraps(command)
    def wrapped(run):
        dtype, run.dtype = run.dtype, torch.float32
        try:
            command(run)
        finally:
            run.dtype = dtype

    return wrapped


# ---- batches -------------------------------------------------------------------------------------


def sample_batches(run):
    """Indices in batches: of the whole split, or of n_examples, equally many from each group."""
    config = run.config
    groups = run.data.eval_groups(config.split)
    per_group = math.ceil(config.n_examples / len(groups))  # 0: all
    batches = []
    for group in groups:
        size = len(group)
        if 0 < per_group < size:
            group = [group[i * size // per_group] for i in range(per_group)]
        for first in range(0, len(group), config.eval_batch_size):
            batches.append(np.asarray(group[first : first + config.eval_batch_size]))
    n, n_all = sum(map(len, batches)), sum(map(len, groups))
    run.sample = f"{n} of {n_all} {config.split} sequences" if n < n_all else ""
    return batches


@torch.no_grad()
def map_batches(run, measure, batches=None, read=None):
    """Call measure(batch) -> {name: array} on batches -> {name: the arrays of all batches}.

    A batch has tokens (B, T), targets (B, T), indices (B,) and slices {name: (N,)}. Ranks share
    the batches, and each gets the whole result. batches: indices, or those of sample_batches.
    read(indices) -> tokens, targets, slices, or the run's own data.
    """
    world = run.world
    split = run.config.split
    if batches is None:
        batches = sample_batches(run)
    parts = []
    rank_batches = batches[world.rank :: world.size]
    for indices in progress(rank_batches, f"{split} batches", world.is_main):
        tokens, targets, slices, *_ = read(indices) if read else run.data.batch(split, 0, indices)
        tokens, targets = tokens.to(run.device), targets.to(run.device)
        batch = SimpleNamespace(tokens=tokens, targets=targets, indices=indices, slices=slices)
        with autocast(run.device, run.dtype):
            parts.append(measure(batch))
    return concat(world.gather_in_order(parts))


def concat(tables):
    """[{name: array}] -> {name: the arrays of all tables}"""
    columns = {}
    for name in tables[0]:
        columns[name] = np.concatenate([table[name] for table in tables])
    return columns


def select(columns, mask):
    """Some of the measurements: mask (N,) bool, or a slice."""
    return {name: values[mask] for name, values in columns.items()}


def combine_columns(columns, *names):
    """The values of several columns, joined by ", ": the key in by_slice of each of N entries."""
    values = [columns[name].tolist() for name in names]
    return np.array([", ".join(map(str, combination)) for combination in zip(*values)])


def require_decoding(run, purpose, key=None):
    """ConfigError unless the model can decode. purpose: "answering"; key: the setting that asks."""
    message = f"{purpose} needs a model with a method `forward_cached`, as in model.py"
    require(hasattr(run.model, "forward_cached"), message, key)
    check_decoding(run.model, run.settings, run.data, run.device)


def require_facts(run, all_forms=False):
    """ConfigError unless the examples are facts "key:value" of digits; with all_forms, they may
    have a second wording."""
    task = getattr(run.settings.data, "task", run.settings.train.data)
    if task not in ("qa", "digits"):
        message = f"it needs facts of digits, task=qa or digits, not {task}"
        if is_users_file(run.settings.data_module, run.settings.files):
            message += "; a data file of your own is none of our tasks to an analysis"
        raise ConfigError(message)
    has_forms = "form" in run.data.source.slices
    require(all_forms or not has_forms, "it needs facts of one wording: train with forms=1", None)


def predictions(run):
    """What `iter_predictions` yields over the split, on all ranks: a list of batches."""
    options = dict(dtype=run.dtype, show_progress=True, world=run.world)
    split, batch_size = run.config.split, run.config.eval_batch_size
    mine = iter_predictions(run.model, run.data, split, batch_size, run.device, **options)
    # A rank without a batch in the last round has None.
    return [batch for batch in run.world.gather_in_order(list(mine)) if batch]


def require_single_process(run):
    """ConfigError under torchrun with several ranks: an edit changes the weights of one process."""
    require(run.world.size == 1, "editing needs a single process; run it without torchrun", None)


def correct_examples(run):
    """Indices of the examples of the split of which the model predicts every label correctly."""
    correct = []
    for batch in predictions(run):
        wrong = batch["example"][~batch["correct"]]
        correct.append(np.setdiff1d(batch["example"], wrong))
    return np.concatenate(correct)


def label_positions(batch):
    """Where the labels are: example (N,), position (N,), answer position (N,), label (N,)."""
    targets = batch.targets.cpu().numpy()
    labelled = targets != IGNORE_INDEX
    b, t = np.nonzero(labelled)
    n_labels = labelled.sum(1)  # (B,)
    first = np.cumsum(n_labels) - n_labels  # the number of each example's first label
    answer_pos = np.arange(len(b)) - np.repeat(first, n_labels)
    return batch.indices[b], t, answer_pos, targets[b, t]


# ---- parquet -------------------------------------------------------------------------------------


def write_parquet(path, columns):
    """{name: array or list} -> one parquet file, complete or absent."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    atomic_write(path, lambda f: pq.write_table(pa.table(columns), f, write_page_checksum=True))


# What a column may hold, as letters of numpy's kinds of dtypes.
NUMBER = "biuf"
WHOLE = "biu"
BOOLEAN = "b"
TEXT = "U"


def read_parquet(path, kinds, advice):
    """Read what write_parquet wrote -> {name: (N,) array}, N at least 1.

    kinds: {column: NUMBER, WHOLE, BOOLEAN or TEXT}. ConfigError with the advice if the file is
    missing or damaged, or lacks one of these columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    require(os.path.exists(path), f"{path} does not exist; {advice}", None)
    try:
        table = pq.read_table(path, page_checksum_verification=True).to_pydict()
        columns = {name: np.array(values) for name, values in table.items()}
    except (pa.ArrowException, OSError, ValueError, OverflowError, RecursionError) as e:
        why = " ".join(str(e).split())[:80]
        raise ConfigError(f"{path} cannot be read as parquet ({why}); {advice}") from None
    for name in kinds:
        require(name in columns, f"{path} has no column {name!r}; {advice}", None)
    for name, values in columns.items():
        # numpy makes objects of nulls, and of lists of several lengths.
        right_kind = values.dtype.kind in kinds.get(name, "biufU")
        message = f"{path}: the column {name!r} holds values of another type; {advice}"
        require(right_kind and values.ndim == 1 and len(values) > 0, message, None)
    return columns


# ---- results -------------------------------------------------------------------------------------

# Settings that decide what is measured. Others, as eval_batch_size and device, decide how.
DECISIVE = (
    "checkpoint",
    "dtype",
    "n_examples",
    "data",
    "n_edits",
    "facts",
    "add",
    "num_kv_pairs",
    "new_facts",
    "portions",
    "editors",
    "top_slots",
    "margin",
    "ablations",
    "slot",
    "pattern",
    "value",
    "n_corr_slots",
    "n_cases",
    "n_pairs",
    "exposure_pairs",
    "exchange",
    "seed",
)


def decisive_settings(run, what):
    """{setting: value} of those that decide what a result of the command `what` says."""
    used = run.options.get(what.replace("_", "-"), run.options.get("slices"))
    names = list(DECISIVE)
    if what == "attention":
        # In other commands it names an example to print, which changes no measurement.
        names.append("example")
    # A setting without effect decides nothing.
    unused = run.config.unused() if hasattr(run.config, "unused") else {}
    values = {}
    for name in names:
        if name in unused:
            continue
        if hasattr(run.config, name) and (used is None or name in used):
            values[name] = getattr(run.config, name)
    return values


def result_suffix(run, what):
    """The end of a result's name: the split, and the settings that differ from their defaults.

    So no result replaces one that was measured otherwise. ablate.py swap --n_pairs 8 writes
    ablate_swap_n_pairs-8.
    """
    split = run.config.split
    suffix = "" if split in ("test", what) else f"_{split}"
    return suffix + settings_suffix(run, decisive_settings(run, what))


def settings_suffix(run, names):
    """The part of a result's name for these settings: "_name-value" of those not at defaults."""
    defaults = {f.name: f.default for f in fields(run.config)}
    suffix = ""
    for name in names:
        value = getattr(run.config, name)
        if value != defaults[name]:
            suffix += f"_{name}-{short_value(name, value)}"
    return suffix


def short_value(name, value):
    """A setting's value as part of a file name; a path with the beginning of its checksum."""
    text = str(value)
    is_path = name in ("data", "facts") or (name == "value" and os.path.isfile(text))
    shown = os.path.basename(os.path.normpath(text)) if is_path else text
    shown = re.sub(r"[^\w.]+", "-", shown).strip("-.")
    if is_path:
        return f"{shown[:40]}-{dataset_sha256(text)[:8]}"
    # Vectors that differ in signs alone would have one name.
    if len(shown) > 40 or (name == "value" and shown != text):
        return f"{shown[:24]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return shown


def list_results(run, what):
    """Suffixes of the results of the command `what` that the run has on this split."""
    stem = f"{run.prefix}_{what}"
    split = "" if run.config.split == "test" else f"_{run.config.split}"
    # The rest of ablate_swap_matrix is no setting of swap.
    beginnings = tuple(f"{split}_{name}-" for name in DECISIVE)
    suffixes = []
    for file in sorted(os.listdir(run.folder)):
        name, extension = os.path.splitext(file)
        if name.startswith(stem) and extension == ".parquet":
            suffix = name.removeprefix(stem)
            # Results of a chosen slot (`force --slot`) are no input of other commands.
            of_one_slot = "_slot-" in suffix
            if not of_one_slot and (suffix == split or suffix.startswith(beginnings)):
                suffixes.append(suffix)
    return suffixes


def save_result(run, what, metrics, by_slice=None, examples=(), columns=None, plot=None):
    """Write a result into the run. plot(path) draws its figure. Only the main rank writes."""
    if not run.world.is_main:
        return
    # A result that was computed from others gets their suffixes.
    suffix = "".join(dict.fromkeys(run.suffixes_read)) or result_suffix(run, what)
    config = run.provenance() | decisive_settings(run, what) | run.settings_read
    run.suffixes_read.clear()
    run.settings_read.clear()
    path = os.path.join(run.folder, f"{run.prefix}_{what}{suffix}")
    result = {
        "config": config,
        "metrics": metrics,
        "by_slice": by_slice or {},
        "examples": list(examples),
    }
    write_json(path + ".json", result)
    written = f"{path}.json"
    if columns:
        write_parquet(path + ".parquet", columns)
        written += ", .parquet"
    if plot:
        plot(path + ".png")
        run.figures.append(path + ".png")
        written += ", .png"
    say(f"wrote {written}")


# ---- commands ------------------------------------------------------------------------------------

MODEL_OPTIONS = ("split", "checkpoint", "eval_batch_size", "device", "dtype")


@dataclass(frozen=True)
class Command:
    function: object  # f(run) or, without a model, f(paths, config); ConfigError if it cannot
    options: tuple  # names of its settings, besides MODEL_OPTIONS
    summary: str  # what a reader learns from it
    needs_model: bool = True

    def all_options(self):
        return MODEL_OPTIONS + self.options if self.needs_model else self.options


def parse_command(argv, doc, commands, config_class, default=None):
    """Command line -> name of the command, its paths, its settings. Nothing is run.

    default: the command if the first argument is a run directory.
    """
    args, settings = split_argv(argv)
    if wants_help(settings):
        print_help(doc, config_class)
    reject_unknown(settings, config_class)
    config = build_config(config_class, settings)
    if not args:
        say(help_text(doc, config_class))
    first = "a run directory or a command" if default else "a command and a run directory"
    require(args, f"name {first}", None)
    name, *paths = args
    if name not in commands:
        nearest = difflib.get_close_matches(name, commands, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"choose from {', '.join(commands)}"
        is_run = default and (not paths or os.path.isdir(name))
        require(is_run, f"{name!r} is no command; {hint}", None)
        name, paths = default, args
    reasons = {}
    for option in field_names(config_class):
        users = [n for n, command in commands.items() if option in command.all_options()]
        if name not in users:
            reasons[option] = f"{name} does not use it, only {', '.join(users)}"
    reject_unused(config, reasons, {s.key: s for s in settings})
    if commands[name].needs_model:
        require(len(paths) == 1, f"name one run directory, as in: {name} runs/RUN", None)
    return name, paths, config


def run_command(name, paths, config, commands, prefix="eval"):
    """Run what parse_command returned. prefix: the beginning of the names of result files."""
    command = commands[name]
    if not command.needs_model:
        with enough_memory(lambda: "read fewer or smaller files"):
            command.function(paths, config)
        return
    with process_group(config.device) as world, enough_memory(lambda: memory_advice(command)):
        with world.agree():
            run = open_run(paths[0], config, world)
        run.prefix = prefix
        run.options = {n: c.all_options() for n, c in commands.items()}
        # Each rank has the whole result; one prints and writes it.
        output = sys.stdout if world.is_main else io.StringIO()
        try:
            with contextlib.redirect_stdout(output):
                command.function(run)
                if run.sample:
                    say(f"measured on {run.sample}; --n_examples 0 takes all")
        except ConfigError as e:
            # An error without a key is about the run, so name it. A message that begins with a file
            # of the run does already.
            if e.key is not None or str(e).startswith(run.folder):
                raise
            raise ConfigError(f"{run.folder}: {e}") from None


def memory_advice(command):
    """Advice for memory that is full, as text."""
    sizes = ("eval_batch_size", "n_examples", "n_pairs", "ablate_batch_size")
    used = [name for name in sizes if name in command.all_options()]
    return f"lower {' or '.join(used)}, or measure on the CPU with --device cpu"


def report(run, script, commands, names, file):
    """Run these commands and write a report into the run: what they printed, figures, seconds."""
    start = time.perf_counter()
    stem, extension = os.path.splitext(file)
    path = os.path.join(run.folder, stem + result_suffix(run, "all") + extension)
    provenance = ", ".join(f"{name} {value}" for name, value in run.provenance().items())
    n_params = sum(p.numel() for p in run.model.parameters())
    text = f"# {run.name}\n\n{provenance}; {n_params:,} parameters. Intervals are 95%.\n"
    left_out = {}
    for name in names:
        run.world.print0(f"\n{name}: {commands[name].summary}")
        try:
            section = report_section(run, script, name, commands[name])
            text += f"\n## {name}\n\n{section}"
        except ConfigError as e:
            run.world.print0(f"left out: {e}")
            left_out.setdefault(str(e), []).append(name)
        # Other ranks wait: the next command may read what the main rank has just written.
        run.world.all_gather(0)
        if run.world.is_main:
            readable = printable(text + left_out_line(left_out), keep="\n").encode()
            atomic_write(path, lambda f: f.write(readable))
    run.sample = ""  # each section has said its own
    run.world.print0(f"\nwrote {path} in {time.perf_counter() - start:.0f} s")


def left_out_line(left_out):
    """{reason: names of commands} -> the report's last line, or nothing."""
    if not left_out:
        return ""
    parts = [f"{', '.join(names)} ({reason})" for reason, names in left_out.items()]
    return f"\nLeft out: {'; '.join(parts)}.\n"


def accuracy_result(run):
    """What `eval.py stats` reads of the run: of this checkpoint and dtype, on this split."""
    split = run.config.split
    suffix = result_suffix(run, split)
    if not suffix:
        return run.folder
    return os.path.join(run.folder, f"{run.prefix}_{split}{suffix}.json")


def report_section(run, script, name, command):
    """Run one command -> its section of the report, without the heading, or ConfigError."""
    start = time.perf_counter()
    run.figures.clear()
    run.findings.clear()
    run.suffixes_read.clear()
    run.settings_read.clear()
    run.sample = ""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        if command.needs_model:
            command.function(run)
        elif run.world.is_main:
            figure = command.function([accuracy_result(run)], run.config)
            run.figures += [figure] if figure else []
    printed = output.getvalue()
    print(printed, end="", flush=True)
    findings = ""
    for sentence in run.findings:
        printed = printed.replace(printable(sentence, keep="\n\t") + "\n", "", 1)
        findings += f"- {sentence}.\n"
    table = re.sub(r"^wrote .*\n", "", printed, flags=re.M).strip()
    figures = [f"![{name}]({os.path.basename(path)})\n" for path in run.figures]
    sample = f"{run.sample}, " if run.sample else ""
    took = f"`python {script} {name} {run.folder}`, {sample}{time.perf_counter() - start:.1f} s"
    return f"{command.summary}\n\n{findings}\n{took}\n\n```\n{table}\n```\n\n{''.join(figures)}"
