"""How train.py starts: with new settings, with those of a run to resume, or again by torchrun."""

import os

from nanorecall.build import resolve
from nanorecall.files import lock_run_dir, unlock
from nanorecall.records import read_record
from nanorecall.run import LOWER_LR
from nanorecall.run_dir import find_restarted_run
from nanorecall.saved_run import RESUMABLE, load_settings
from nanorecall.settings import (
    ConfigError,
    RunError,
    print_help,
    read_argv,
    reject_args,
    reject_unknown,
    require,
    wants_help,
)
from nanorecall.training_checkpoint import convert_checkpoints


def read_command_line(argv, train_config, doc, common=()):
    """Command line -> Settings; with --resume, those of the run's config.json.

    train_config: the class TrainConfig. --help prints doc and all settings, `common` first, and
    exits.
    """
    args, assignments = read_argv(argv)
    if wants_help(assignments):
        chosen = [s for s in assignments if s.key in ("model", "data")]
        settings = resolve(chosen, train_config)
        classes = (train_config, settings.model_module.Config, settings.data_module.Config)
        print_help(doc, *classes, common=common)
    reject_args(args)
    resume = [s for s in assignments if s.key == "resume"]
    if not resume:
        settings = resolve(assignments, train_config)
        message = "--export_checkpoint rewrites the checkpoints of a run: name it with --resume"
        require(not settings.train.export_checkpoint, message, "export_checkpoint")
        return settings
    folder = str(resume[-1].value)
    require(folder, f"{resume[-1].source}: resume needs a run directory", "resume")
    changes = [s for s in assignments if s.key != "resume"]
    refuse_fixed(changes, folder, train_config)
    others = [s for s in changes if s.key != "export_checkpoint"]
    if others and len(others) < len(changes):
        message = f"{others[0].source} has no effect: --export_checkpoint does not train"
        raise ConfigError(f"{message}; leave one of them out", others[0].key)
    return load_settings(folder, train_config, changes)


def refuse_fixed(changes, folder, train_config):
    """ConfigError for a setting that does not exist, or that a run cannot change."""
    fixed = [s for s in changes if s.key not in RESUMABLE]
    if not fixed:
        return
    saved = load_settings(folder, train_config)
    reject_unknown(fixed, train_config, saved.model_module.Config, type(saved.data))
    first, *_ = fixed
    allowed = ", ".join(RESUMABLE)
    what = f"{first.source}: {first.key} cannot change in the middle of a run"
    raise ConfigError(f"{what} (only {allowed} can)", first.key)


def after_restart(settings, world):
    """Settings of the run that this launch has begun already, if torchrun has restarted it.

    torchrun repeats the command line after a rank has died, and that names no run to resume.
    """
    restarted = ""
    with world.agree():
        if world.is_main:
            restarted = find_restarted_run(settings.train.log_dir)
    restarted = world.broadcast(restarted)
    if not restarted:
        return settings
    with world.agree():
        if world.is_main:
            refuse_repetition(restarted)
    if settings.resume:
        return settings
    world.print0(f"started again by torchrun: going on with {restarted}")
    return load_settings(restarted, type(settings.train))


def refuse_repetition(folder):
    """RunError if a run failed by its numbers, as it would again. A crash may be tried again."""
    path = os.path.join(folder, "status.json")
    if not os.path.exists(path):
        return
    status = read_record(path, {"status": "text"})
    if status["status"] == "failed" and "error" not in status:
        raise RunError(f"{folder}: numbers were not finite, and would be so again; {LOWER_LR}")


def export_checkpoints(settings, world):
    """Rewrite the checkpoints of a run as settings.train.export_checkpoint says -> exit status."""
    message = "export needs a single process; run it without torchrun"
    require(world.size == 1, message, "export_checkpoint")
    lock = lock_run_dir(settings.resume)
    try:
        convert_checkpoints(settings.resume, settings.train.export_checkpoint, world)
    finally:
        unlock(lock)
    return 0
