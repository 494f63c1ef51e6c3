"""The results of `ablate.py keys` and `swap-matrix`, read again, and summaries that commands share.

A label counts for a slot only if the ablation of the slot can change it: the slot is read at the
label's position or, below the last block, at an earlier position, from which attention can carry it
on. At every other label the drop is 0 by construction, and would only dilute a mean.

Letters: N measurements, E examples, S slots.
"""

import os

import numpy as np

from analysis.swap_matrix import DECODING
from analysis.trained_run import (
    BOOLEAN,
    DECISIVE,
    NUMBER,
    TEXT,
    WHOLE,
    list_results,
    read_parquet,
    result_suffix,
    select,
)
from nanorecall.records import read_record
from nanorecall.settings import ConfigError, require

DROP = "drop in logit difference"  # in figures

# The columns that are read here of each table, and their kinds.
INTERCHANGE = {
    **dict.fromkeys(("example", "source_example", "layer", "answer_pos"), WHOLE),
    "drop": NUMBER,
    **dict.fromkeys(("source_answer", "control_answer", "base_lost"), BOOLEAN),
}
COLUMNS = {
    "keys": {
        **dict.fromkeys(("example", "layer", "slot", "answer_pos", "answer"), WHOLE),
        **dict.fromkeys(("reads", "reads_at_label", "reads_in_reach"), WHOLE),
        **dict.fromkeys(("weight", "drop", "p", "p_clean"), NUMBER),
        **{"ablation": TEXT, "control": BOOLEAN, "flip": BOOLEAN},
    },
    **dict.fromkeys(("force", "inject", "replace", "swap"), INTERCHANGE),
    "swap_matrix": {
        **dict.fromkeys(("example", "source_example", "answer_pos", "answer"), WHOLE),
        **dict.fromkeys(("source_answer_token", "control_answer_token", *DECODING), WHOLE),
    },
}


# ---- tables --------------------------------------------------------------------------------------


def load_table(run, what):
    """The parquet file that `ablate.py <what>` wrote into the run -> {column: (N,)}

    It is the one with the same settings. If the command line names none, it is the only one there.
    ConfigError if there is none, if there are several, or if it does not fit the checkpoint.
    """
    command = what.replace("_", "-")
    suffix, present = result_suffix(run, what), list_results(run, what)
    is_chosen = any(f"_{name}-" in suffix for name in DECISIVE)
    if suffix not in present and present and not is_chosen:
        names = ", ".join(f"ablate_{what}{s}" for s in present)
        message = f"{run.folder} has {names}; name one by giving its settings"
        require(len(present) == 1, message, None)
        suffix = present[0]
        run.world.print0(f"reading ablate_{what}{suffix}")
    is_own = suffix == result_suffix(run, what)
    run.suffixes_read.append(suffix)
    path = os.path.join(run.folder, f"ablate_{what}{suffix}")
    again = f"run it again: python ablate.py {command} {run.folder}"
    advice = f"python ablate.py {command} {run.folder} writes it"
    columns = read_parquet(path + ".parquet", COLUMNS[what], advice)
    config = check_table(run, path, columns, again)
    if not is_own:
        run.settings_read |= {name: config[name] for name in DECISIVE if name in config}
    return columns


def check_table(run, path, columns, advice):
    """-> the settings of a table (path without extension).

    ConfigError unless it is of this checkpoint, and of its slots and examples.
    """
    try:
        record = read_record(path + ".json", {"config": {"step": "count"}})
    except ConfigError as e:
        raise ConfigError(f"{e}; {advice}") from None
    path += ".parquet"
    step = record["config"]["step"]
    message = f"{path} is of step {step}, and the checkpoint of step {run.step}; {advice}"
    require(step == run.step, message, "checkpoint")
    memory_layers = run.model.memory_layers()
    if "layer" in columns:
        known = np.isin(columns["layer"], list(memory_layers)).all()
        require(known, f"{path} names layers without a memory; {advice}", None)
    if "example" in columns:
        last = run.data.eval_groups(run.config.split)[-1][-1]
        known = (columns["example"] >= 0).all() and (columns["example"] <= last).all()
        require(known, f"{path} names examples that {run.config.split} has not; {advice}", None)
    if "slot" in columns:
        size = min(len(memory.values) for memory in memory_layers.values())
        known = (columns["slot"] >= 0).all() and (columns["slot"] < size).all()
        require(known, f"{path} names slots that do not exist; {advice}", None)
    return record["config"]


def first_ablation(columns):
    """Measurements that count, with the first ablation in the table, and its name.

    That is zero, unless --ablations names others. A measurement counts if the slot is read where
    the label can depend on it.
    """
    ablation = str(columns["ablation"][0])
    mask = (columns["ablation"] == ablation) & (columns["reads_in_reach"] > 0)
    message = "the result of keys holds no slot that an example reads; run keys again"
    require(mask.any(), message, None)
    return select(columns, mask), ablation


def slot_table(columns):
    """One entry for each layer and slot -> {column: (S,)}

    n_examples that read it; mean, median, max and std of the drop; flips, the fraction that flip;
    weight_var, the variance over examples of the weight with which they read it. std and weight_var
    are nan for one measurement.
    """
    key = columns["layer"].astype(np.int64) * 10**9 + columns["slot"]
    keys, which = np.unique(key, return_inverse=True)
    # Sort by slot once, and cut: a mask for each of thousands of slots would be slow.
    order = np.argsort(which, kind="stable")
    statistics = []
    for part in np.split(order, np.cumsum(np.bincount(which))[:-1]):
        drop = columns["drop"][part]
        # An example's weight stands at each of its labels.
        _, first = np.unique(columns["example"][part], return_index=True)
        weight = columns["weight"][part][first]
        std = drop.std(ddof=1) if len(drop) > 1 else np.nan
        weight_var = weight.var(ddof=1) if len(weight) > 1 else np.nan
        flips = columns["flip"][part].mean()
        numbers = (len(weight), drop.mean(), np.median(drop), drop.max(), std, flips, weight_var)
        statistics.append(numbers)
    table = {"layer": keys // 10**9, "slot": keys % 10**9}
    names = ("n_examples", "mean", "median", "max", "std", "flips", "weight_var")
    for name, values in zip(names, zip(*statistics)):
        table[name] = np.array(values)
    return table


def mean_drops(columns, examples, name, values):
    """Mean drop by example and by value of the column `name` -> (examples, values)

    nan where nothing was measured. examples must ascend.

    >>> columns = {"example": np.array([4, 4, 7]), "slot": np.array([9, 9, 2])}
    >>> columns["drop"] = np.array([1.0, 3.0, 5.0])
    >>> mean_drops(columns, np.array([4, 7]), "slot", np.array([9, 2])).tolist()
    [[2.0, nan], [nan, 5.0]]
    """
    mask = np.isin(columns["example"], examples) & np.isin(columns[name], values)
    row = np.searchsorted(examples, columns["example"][mask])
    order = np.argsort(values)  # searchsorted needs ascending values
    column = order[np.searchsorted(values, columns[name][mask], sorter=order)]
    sums = np.zeros((len(examples), len(values)))
    counts = np.zeros_like(sums)
    np.add.at(sums, (row, column), columns["drop"][mask])
    np.add.at(counts, (row, column), 1)
    return np.where(counts > 0, sums / np.maximum(1, counts), np.nan)
