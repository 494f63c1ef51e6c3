"""A trained run, opened for a look inside: some of its rows in batches, shared out over the ranks, and one form of results.

    run = open_run("runs/RUN", config)
    found = map_batches(run, lambda batch: {"row": batch.rows, ...})      # arrays of all batches, end to end

A result is eval_<what>.json (of ablate.py, ablate_<what>.json), {config, metrics, by_slice, examples}, with every measured
number as {"value", "ci95", "n"}; eval_<what>.parquet, the measurements; and eval_<what>.png.

Letters: B rows in a batch, T tokens in a row, N labels in a batch.
"""

import hashlib
import os
import re
import sys
from dataclasses import dataclass, field, fields
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

from nanorecall.checkpoint import atomic_write, dataset_sha256, write_json
from nanorecall.distributed import SINGLE_PROCESS, autodetect_device
from nanorecall.metrics import autocast, iter_predictions
from nanorecall.rng import IGNORE_INDEX
from nanorecall.settings import ConfigError, at_least, one_of, require, say
from train import load_run


@dataclass
class AnalysisConfig:
    """Settings of every command that looks at a run."""

    split: str = "test"  # test or val
    checkpoint: str = "best"  # best (highest val accuracy) or ckpt (latest)
    eval_batch_size: int = 100  # rows in a forward pass
    device: str = "auto"  # auto, cpu, cuda, mps

    def check(self):
        at_least(self, 1, "eval_batch_size")
        one_of(self, ("test", "val"), "split")
        one_of(self, ("best", "ckpt"), "checkpoint")


@dataclass
class TrainedRun:
    folder: str
    settings: object  # nanorecall.run.Settings
    data: object
    model: torch.nn.Module
    step: int  # of the checkpoint
    device: torch.device
    dtype: torch.dtype
    config: object  # the command's settings: split, checkpoint, rows, eval_batch_size
    world: object = SINGLE_PROCESS
    prefix: str = "eval"  # of the names of result files
    uses: dict = field(default_factory=dict)  # {command: names of its settings}
    read: list = field(default_factory=list)  # endings of the results that the present command has read
    figures: list = field(default_factory=list)  # that were written

    @property
    def name(self):
        return os.path.basename(os.path.normpath(self.folder))

    @property
    def pad(self):
        """The token after the end of short rows; -1: there is none."""
        return self.data.tokenizer.pad if hasattr(self.data, "tokenizer") else -1

    def provenance(self):
        """What every result says of where it comes from."""
        c, model = self.config, self.settings.train.model
        return {"run": self.folder, "split": c.split, "checkpoint": c.checkpoint, "step": self.step, "model": model}

    def tensor(self, ids):
        return torch.from_numpy(np.asarray(ids, np.int64)).to(self.device)

    def text(self, ids):
        """Tokens as a reader knows them: text, or numbers where the data has no letters."""
        ids = np.atleast_1d(np.asarray(ids))
        return self.data.tokenizer.decode(ids) if hasattr(self.data, "tokenizer") else " ".join(map(str, ids.tolist()))

    def token(self, i):
        """One token as text, whatever it is."""
        if not hasattr(self.data, "tokenizer"):
            return str(int(i))
        names = {self.pad: "PAD", self.pad + 1: "BOS", self.pad + 2: "EOS"}
        text = names.get(int(i)) or self.data.tokenizer.token_strings[int(i)]
        return "␣" if text == " " else text if text.isprintable() else repr(text)[1:-1]


def open_run(folder, config, world=SINGLE_PROCESS):
    """The run in `folder`, its model on the device and in the dtype that the settings name."""
    with torch.random.fork_rng(devices=[]):  # a new model takes random numbers before it is filled
        p, data, model, state = load_run(folder, config.checkpoint)
    asked = getattr(config, "dtype", "float32")  # of ablate.py there is no other: effects are small
    wanted = SimpleNamespace(device=config.device, dtype=p.train.dtype if asked == "auto" else asked)
    device, dtype, line = autodetect_device(wanted, world)
    world.print0(f"{folder}: {config.checkpoint}.pt of step {state['step']}; {line}")
    return TrainedRun(folder, p, data, model.to(device), state["step"], device, dtype, config, world)


def batches(run):
    """Row numbers in batches: all of the split, or run.config.rows of them, as many from each of its segments."""
    c, segments = run.config, run.data.eval_groups(run.config.split)
    each = -(-c.rows // len(segments)) if c.rows else 0
    some = [s if not each or each >= len(s) else [s[i * len(s) // each] for i in range(each)] for s in segments]
    return [np.asarray(s[i : i + c.eval_batch_size]) for s in some for i in range(0, len(s), c.eval_batch_size)]


@torch.no_grad()
def map_batches(run, work, rows=None, read=None):
    """Run work(batch) -> {name: array} over batches of rows, each rank its own -> {name: arrays of all batches, end to end}.

    A batch has tokens (B, T), targets (B, T), rows (B,) and tags {name: (N,)}. Every rank gets the whole. rows: batches of
    row numbers, or those of `batches`; read(rows) -> tokens, targets, tags, or the run's own data.
    """
    todo, world, mine = batches(run) if rows is None else rows, run.world, []
    read = read or (lambda rows: run.data.batch(run.config.split, 0, rows))
    hidden = not (world.is_main and sys.stderr.isatty())
    for i in tqdm(range(world.rank, len(todo), world.size), desc=run.config.split, disable=hidden, leave=False):
        tokens, targets, tags, *_ = read(todo[i])
        batch = SimpleNamespace(tokens=tokens.to(run.device), targets=targets.to(run.device), rows=todo[i], tags=tags)
        with autocast(run.device, run.dtype):
            mine.append(work(batch))
    gathered = world.all_gather_object(mine)
    parts = [gathered[i % world.size][i // world.size] for i in range(len(todo))]
    return concat(parts)


def concat(parts):
    """[{name: array}] -> {name: the arrays of all parts}"""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def correct_examples(run):
    """Numbers of the split's rows that the model answers rightly, every label of them."""
    c = run.config
    found = list(iter_predictions(run.model, run.data, c.split, c.eval_batch_size, run.device, run.dtype, show_progress=True))
    return np.concatenate([np.setdiff1d(b["row"], b["row"][~b["hit"]]) for b in found])


def label_positions(batch):
    """Where the labels are: rows (N,), positions (N,), place in the row's answers (N,), the token asked for (N,)."""
    targets = batch.targets.cpu().numpy()
    b, t = np.nonzero(targets != IGNORE_INDEX)
    counts = (targets != IGNORE_INDEX).sum(1)
    place = np.arange(len(b)) - np.repeat(np.cumsum(counts) - counts, counts)
    return batch.rows[b], t, place, targets[b, t]


def write_parquet(path, columns):
    """{name: array or list} -> one parquet file, complete or absent."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    atomic_write(path, lambda f: pq.write_table(pa.table(columns), f, write_page_checksum=True))


NUMBER, WHOLE, BOOLEAN, TEXT = (
    "biuf",
    "biu",
    "b",
    "U",
)  # kinds of columns: what numpy calls the types that they may have


def read_parquet(path, kinds, advice):
    """What write_parquet wrote -> {name: (N,) array}, N at least 1; ConfigError with advice if it
    is not there, damaged or lacks one of the columns. kinds: {column: letters of numpy's kinds}."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    require(os.path.exists(path), f"{path} does not exist; {advice}", None)
    try:
        table = pq.read_table(path, page_checksum_verification=True).to_pydict()
        columns = {name: np.array(values) for name, values in table.items()}
    except (pa.ArrowException, OSError, ValueError, OverflowError, RecursionError) as e:
        raise ConfigError(
            f"{path} cannot be read as parquet ({' '.join(str(e).split())[:80]}); {advice}"
        ) from None
    for name in kinds:
        require(name in columns, f"{path} has no column {name!r}; {advice}", None)
    for name, values in columns.items():
        # numpy makes objects of nulls, and of lists of several lengths
        fits = values.dtype.kind in kinds.get(name, "biufU") and values.ndim == 1 and len(values)
        message = f"{path}: the column {name!r} holds something else than it should; {advice}"
        require(fits, message, None)
    return columns


# Settings that decide what is measured. Others, as eval_batch_size and device, decide how.
DECIDE = ("checkpoint", "dtype", "rows", "data", "edits", "modes", "pairs", "type", "seed")


def deciding(run, what):
    """{setting: value} of those that decide what a result of the command `what` says."""
    uses = run.uses.get(what.replace("_", "-"), run.uses.get("slices"))
    names = DECIDE + (
        ("example",) if what == "attention" else ()
    )  # elsewhere, a row that is printed as well
    return {
        n: getattr(run.config, n)
        for n in names
        if hasattr(run.config, n) and (uses is None or n in uses.split())
    }


def ending(run, what):
    """The end of a result's name: the split and the settings that differ from their defaults, so
    that a result never takes the place of one that was measured otherwise.

    ablate.py swap --type less_more: ablate_swap_type-less_more
    """
    split = run.config.split
    text = "" if split in ("test", what) else f"_{split}"
    defaults = {f.name: f.default for f in fields(run.config)}
    for name, value in deciding(run, what).items():
        if value != defaults[name]:
            text += f"_{name}-{short_name(name, value)}"
    return text


def short_name(name, value):
    """A setting's value as part of a file's name; of a file, with the beginning of its checksum."""
    text = str(value)
    said = re.sub(
        r"[^\w.]+", "-", os.path.basename(os.path.normpath(text)) if name == "data" else text
    ).strip("-.")
    if name == "data":
        return f"{said[:40]}-{dataset_sha256(text)[:8]}"
    return (
        said if len(said) <= 40 else f"{said[:24]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    )


def results(run, what):
    """Endings of the results of the command `what` in the run, on this split."""
    there, start = os.listdir(run.folder), f"{run.prefix}_{what}"
    split = "" if run.config.split == "test" else f"_{run.config.split}"
    ends = [
        f[len(start) : -len(".parquet")]
        for f in sorted(there)
        if f.startswith(start + split) and f.endswith(".parquet")
    ]
    known = tuple(f"_{name}-" for name in DECIDE)  # the rest of swap_matrix is no setting of swap
    return [e for e in ends if e == split or e[len(split) :].startswith(known)]


def save_result(run, what, metrics, by_slice=None, examples=(), columns=None, plot=None):
    """Write a result and its figure into the run; plot(path) draws it. Only the first rank writes."""
    if not run.world.is_main:
        return
    # What was computed from other results is named like these.
    end = "".join(dict.fromkeys(run.read)) or ending(run, what)
    path = os.path.join(run.folder, f"{run.prefix}_{what}{end}")
    run.read.clear()
    config = run.provenance() | deciding(run, what)
    measured = {"metrics": metrics, "by_slice": by_slice or {}, "examples": list(examples)}
    result = {"config": config, **measured}
    write_json(path + ".json", result)
    endings = [".json"]
    if columns:
        write_parquet(path + ".parquet", columns)
        endings.append(".parquet")
    if plot:
        plot(path + ".png")
        run.figures.append(path + ".png")
        endings.append(".png")
    say(f"wrote {path}{', '.join(endings)}")
