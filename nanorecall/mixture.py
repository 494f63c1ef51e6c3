"""A second data set, mixed into training within a window of steps: the synthetic start of LLMonade's pipeline.

    python train.py --data data_synth --task text --path notes.jsonl \\
        --synthetic_dataset mqar_data --synthetic_start_step 0 --synthetic_end_step 200

Each step of the window takes all of its rows from one of the two: from the second with probability synthetic_weight. Which one,
and which rows, is a function of seed and step alone, so a resumed run repeats it. Validation and test stay with the main data.
Text is read with the main data's tokenizer. Tokens of MQAR are numbers, which share their embeddings with those of text.
"""

import os

import numpy as np

import data_mqar
import data_synth
from nanorecall.checkpoint import read_record
from nanorecall.documents import LONGEST_LINE
from nanorecall.rng import rng_for
from nanorecall.settings import ConfigError, Setting, build_config, require


def mix(main, c):
    """`main` with the data set of c (train.TrainConfig) in its window."""
    path, tokenizer = c.synthetic_dataset, getattr(getattr(main, "config", None), "tokenizer", "")
    try:
        second = open_dataset(path, c.seed, tokenizer)
    except ConfigError as e:
        raise ConfigError(f"synthetic_dataset={path}: {e}", "synthetic_dataset") from None
    return Mixture(main, second, c)


def open_dataset(path, seed, tokenizer=""):
    """The Data of a directory that data_mqar.py or data_synth.py wrote, or of documents of your own."""
    kind = "text"
    if os.path.exists(os.path.join(path, "metadata.json")):
        kind = read_record(os.path.join(path, "metadata.json"), {"dataset_type": "text"})["dataset_type"]
    module, task = (data_mqar, {}) if kind == "mqar" else (data_synth, {"task": kind, "tokenizer": tokenizer})
    task |= {"block_size": LONGEST_LINE} if kind == "text" else {}
    settings = [Setting(k, v, "synthetic_dataset") for k, v in {**task, "path": path, "seed": seed}.items()]
    return module.Data(build_config(module.Config, settings))


class Mixture:
    """Two data sets as one: what train.py needs of a data file's Data."""

    def __init__(self, main, second, c):
        self.main, self.second, self.baselines = main, second, getattr(main, "baselines", {})
        self.notes = getattr(main, "notes", [])
        self.vocab_size = max(main.vocab_size, second.vocab_size)
        self.seq_len = max(main.seq_len, second.seq_len)
        steps = c.max_steps or c.n_epochs * main.steps_per_epoch(c.batch_size)
        late = f"synthetic_start_step={c.synthetic_start_step} lies after the last of {steps} steps"
        require(c.synthetic_start_step < steps or not c.n_epochs, late, "synthetic_start_step")
        self.start, window = c.synthetic_start_step, max(0, min(c.synthetic_end_step, steps) - c.synthetic_start_step)
        self.drawn = rng_for(c.seed, 9).random(window) < c.synthetic_weight  # (window,), does that step go to the second?
        self.before = np.concatenate([[0], np.cumsum(self.drawn)])  # (window + 1,), steps of the second before it

    def turn(self, step):
        """A step -> the data set it belongs to, and its number among that one's steps."""
        place = step - self.start
        gone = int(self.before[min(max(place, 0), len(self.drawn))])
        inside = 0 <= place < len(self.drawn) and self.drawn[place]
        return (self.second, gone) if inside else (self.main, step - gone)

    def batch_indices(self, step, batch_size):
        data, number = self.turn(step)
        return data.batch_indices(number, batch_size)

    def batch(self, split, step, rows):
        data, number = self.turn(step) if split == "train" else (self.main, step)
        return data.batch(split, number, rows)

    def eval_groups(self, split):
        return self.main.eval_groups(split)

    def steps_per_epoch(self, batch_size):
        return self.main.steps_per_epoch(batch_size)
