"""The directory of a run: its name, how it is made and found again, and what config.json records.

config.json holds every setting and the checksum of every file that the run reads, so that resume,
eval.py and ablate.py rebuild the run from there alone: see saved_run.py.
"""

import contextlib
import dataclasses
import glob
import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import torch

from nanorecall.build import count_parameters
from nanorecall.files import dataset_sha256, lock_run_dir, reading, remove, temporary_names, unlock
from nanorecall.mixture import dataset_type
from nanorecall.records import check_kinds, read_record
from nanorecall.settings import ConfigError, require
from nanorecall.source_files import REPO, is_users_file

# ---- its name ------------------------------------------------------------------------------------


def run_label(settings, config):
    """`exp6_gpt_L4-D64_FF0_OG0_H2_q-48-none-none-0_..._lr0.001`, as the ULTM experiments do."""
    parts = [f"exp{settings.train.exp_group}", settings.train.model]
    if hasattr(config, "q_kernel"):  # a model of your own may lack these settings
        parts.append(model_label(settings.model_class, config))
    if hasattr(settings.data, "label"):
        parts.append("data-" + settings.data.label())
    else:
        parts.append(settings.train.data)
    return "_".join(parts) + f"_lr{settings.train.lr:g}"


def model_label(model_class, c):
    """Sizes, then width, kernel, norm and gate of queries, keys and values, then memory layers.

    Blocks with settings of their own show their kinds instead, each kind once.
    """
    k, v = c.dk, c.dv
    if "dk" in getattr(model_class, "inactive_settings", {}):  # unified_kv
        k = v = c.du
    blocks = f"L{c.n_layers}-D{c.dim}_FF{c.use_ffn:d}_OG{c.att_use_output_gate:d}_H{c.n_heads}"
    queries = f"q-{k}-{c.q_kernel}-{c.q_norm}-{c.q_gated:d}"
    keys = f"k-{k}-{c.k_kernel}-{c.k_norm}-{c.k_gated:d}"
    label = f"{blocks}_{queries}_{keys}_v-{v}-{c.v_kernel}"
    if getattr(c, "blocks", ()):
        kinds = dict.fromkeys(text.split()[0] for text in c.blocks)
        label = "_".join([f"L{c.n_layers}-D{c.dim}_FF{c.use_ffn:d}", *kinds])
    if hasattr(c, "memory_layers"):
        layers = "-".join(map(str, c.memory_layers))
        label += f"_M{layers}_S{c.mem_n_keys**2}_H{c.mem_heads}_K{c.mem_knn}"
    return label


# ---- made and found ------------------------------------------------------------------------------


def create_run_dir(settings, config):
    """Create <log_dir>/<run> -> its path, and its lock.

    Without `run_name`, it ends in the Unix time, raised until the name is free. A directory that a
    run left before its config.json was written is used again.
    """
    c, now = settings.train, int(time.time())
    while True:
        folder = os.path.join(c.log_dir, c.run_name or f"{run_label(settings, config)}_{now}")
        try:
            os.makedirs(folder)
        except FileExistsError:
            if not c.run_name:
                now += 1
                continue
            require(never_began(folder), describe_existing(folder), "run_name")
        except OSError as e:
            message = f"cannot make the run directory {folder}: {e.strerror}"
            raise ConfigError(message, "log_dir") from None
        lock = lock_run_dir(folder)
        if not never_began(folder):  # another process was faster
            unlock(lock)
            raise ConfigError(describe_existing(folder), "run_name")
        for leftover in os.listdir(folder):
            remove(os.path.join(folder, leftover))
        return folder, lock


def describe_existing(folder):
    """Why a new run cannot be made in a folder, and what to do, as text."""
    how = f"continue it with --resume {folder}, or give another --run_name"
    message = f"{folder} exists; {how}"
    is_run = os.path.exists(os.path.join(folder, "config.json"))
    if is_run and not has_checkpoint(folder):
        message += "; it has no checkpoint, so --resume starts at step 0 with the same files; "
        message += "if no process uses the folder, you may delete it"
    return message


def never_began(folder):
    """Was a run stopped here before its config.json was written? Then nothing else is there."""
    if not os.path.isdir(folder):
        return False
    leftovers = glob.glob(temporary_names(os.path.join(folder, "config.json")))
    return len(leftovers) == len(os.listdir(folder))


def has_checkpoint(folder):
    """Has a run saved a checkpoint, even one damaged since? Without any it starts again."""
    with reading(folder):
        names = os.listdir(folder)
    return any(re.match(r"ckpt(_prev)?\.pt(\.damaged|$)", name) for name in names)


def launch_id():
    """torchrun's name for the processes it started together, kept when it restarts them; or ""."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return "" if name == "none" else name


def is_under_torchrun():
    """Did torchrun start this process? To it, every exit status but 0 means a crash."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def find_restarted_run(log_dir):
    """The run directory of this very launch if torchrun has started it again, else ""."""
    if not launch_id() or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return ""
    paths = glob.glob(os.path.join(glob.escape(log_dir), "*", "config.json"))
    for path in sorted(paths, key=os.path.getmtime, reverse=True):
        with contextlib.suppress(ConfigError):  # another run's may be damaged
            config = read_record(path, {"launch": "text", "argv": "list"})
            resumed = config.get("resumed", [])
            check_kinds(resumed, ["dict"], path)
            starts = [config, *resumed]
            # --rdzv_id may name two launches alike.
            if config["launch"] == launch_id() and starts[-1].get("argv") == sys.argv:
                return os.path.dirname(path)
    return ""


# ---- config.json ---------------------------------------------------------------------------------


def run_metadata(run):
    """config.json: enough to repeat the run, and to rebuild its model and data."""
    settings = run.settings
    return {
        "train": dataclasses.asdict(settings.train),
        "model": dataclasses.asdict(run.config),
        "data": dataclasses.asdict(settings.data),
        "set_by": {s.key: s.source for s in settings.assignments},
        "argv": sys.argv,
        "git_commit": git_commit(),
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "device": str(run.device),
        "dtype": str(run.dtype).removeprefix("torch."),
        "num_threads": torch.get_num_threads(),
        "world_size": run.world.size,
        "launch": launch_id(),
        "parameters": count_parameters(run.model),
        "data_sha256": {
            key: data_sha256(settings, key, path) for key, path in data_paths(settings).items()
        },
        "files": settings.files,
        "initial_sha256": run.initial_sha256,
    }


def data_sha256(settings, key, path):
    """SHA-256 of what a run reads from the path of the setting `key`."""
    # Documents of any origin are read without a look at metadata.json.
    if key == "synthetic_dataset":
        return dataset_sha256(path, dataset_type(path) != "text")
    is_ours = not is_users_file(settings.data_module, settings.files)
    is_verified = is_ours and key == "path" and getattr(settings.data, "task", "") != "text"
    return dataset_sha256(path, is_verified)


def data_paths(settings):
    """{setting: path} of what a run reads from disk, except the weights of init_from."""
    values = {**vars(settings.data), "synthetic_dataset": settings.train.synthetic_dataset}
    names = ("path", "tokenizer", "synthetic_dataset")
    return {key: values[key] for key in names if values.get(key)}


def git_commit():
    """The commit of this repo, or None outside git."""
    if not shutil.which("git"):
        return None
    command = ["git", "-C", REPO, "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
