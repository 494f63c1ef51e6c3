"""A synthetic data set, mixed into training within a window of steps (LLMonade's synthetic start).

    python train.py --data data_synth --task text --path notes.jsonl \\
        --synthetic_dataset mqar_data --synthetic_start_step 0 --synthetic_end_step 200

A step of the window takes its whole batch from the synthetic data set with probability
synthetic_weight. Which steps do is a function of the seed, so a resumed run repeats it. Validation
and test stay with the primary data. Text is read with the primary data's tokenizer. Tokens of MQAR
are numbers, which share their embeddings with those of text.
"""

import importlib
import os

import numpy as np

from nanorecall.build import total_steps
from nanorecall.dataset_files import MAX_LINE_BYTES
from nanorecall.records import read_record
from nanorecall.rng import STREAMS, rng_for
from nanorecall.settings import ConfigError, Setting, build_config, require


def mix(primary, c):
    """Data `primary` with the synthetic data set of c (train.TrainConfig) in its window."""
    path = c.synthetic_dataset
    tokenizer = getattr(getattr(primary, "config", None), "tokenizer", "")
    try:
        synthetic = open_dataset(path, c.seed, tokenizer)
    except ConfigError as e:
        raise ConfigError(f"synthetic_dataset={path}: {e}", "synthetic_dataset") from None
    return Mixture(primary, synthetic, c)


def open_dataset(path, seed, tokenizer=""):
    """The Data of a directory that data_mqar.py or data_synth.py wrote, or of other documents."""
    kind = dataset_type(path)
    values = {"path": path, "seed": seed}
    if kind == "mqar":
        data_file = "data_mqar"
    else:
        data_file = "data_synth"
        values = {"task": kind, "tokenizer": tokenizer, **values}
    if kind == "text":
        values["max_bytes"] = MAX_LINE_BYTES
    settings = [Setting(key, value, "synthetic_dataset") for key, value in values.items()]
    module = importlib.import_module(data_file)  # by name: nanorecall imports no data file
    return module.Data(build_config(module.Config, settings))


def dataset_type(path):
    """The kind of data in a directory: mqar, a task of data_synth.py, or text (other documents)."""
    metadata = os.path.join(path, "metadata.json")
    if not os.path.exists(metadata):
        return "text"
    return read_record(metadata, {"dataset_type": "text"})["dataset_type"]


class Mixture:
    """Two data sets as one, with the methods of data_mqar.Data."""

    def __init__(self, primary, synthetic, c):
        self.primary, self.synthetic = primary, synthetic
        self.baselines = getattr(primary, "baselines", {})
        self.notes = getattr(primary, "notes", [])
        # A curriculum counts the steps of its own data alone, and must not see losses of others.
        curriculum = getattr(primary, "curriculum", None)
        learns = curriculum is not None and curriculum.max_loss > 0
        message = "stage_loss and synthetic_dataset do not work together; set stage_loss=0"
        require(not learns, message, "stage_loss")
        self.vocab_size = max(primary.vocab_size, synthetic.vocab_size)
        self.seq_len = max(primary.seq_len, synthetic.seq_len)
        steps = total_steps(c, primary)
        start = c.synthetic_start_step
        late = f"synthetic_start_step={start} lies after the last of {steps} steps"
        require(start < steps or not c.n_epochs, late, "synthetic_start_step")
        self.start = start
        n = max(0, min(c.synthetic_end_step, steps) - start)
        # (n,) bool, of the steps of the window.
        self.is_synthetic = rng_for(c.seed, STREAMS["mixture"]).random(n) < c.synthetic_weight
        # (n + 1,): synthetic steps before each.
        self.n_synthetic = np.concatenate([[0], np.cumsum(self.is_synthetic)])

    def source_of_step(self, step):
        """A step -> its data set, and its number among the steps of that data set."""
        n = len(self.is_synthetic)
        position = step - self.start
        n_before = int(self.n_synthetic[min(max(position, 0), n)])
        if 0 <= position < n and self.is_synthetic[position]:
            return self.synthetic, n_before
        return self.primary, step - n_before

    def batch_indices(self, step, batch_size):
        data, own_step = self.source_of_step(step)
        return data.batch_indices(own_step, batch_size)

    def batch(self, split, step, indices):
        if split != "train":
            return self.primary.batch(split, step, indices)
        data, own_step = self.source_of_step(step)
        return data.batch(split, own_step, indices)

    def eval_groups(self, split):
        return self.primary.eval_groups(split)

    def steps_per_epoch(self, batch_size):
        return self.primary.steps_per_epoch(batch_size)
