"""How train.py starts: with new settings, with those of a run to resume, or again by torchrun."""

from nanorecall.build import resolve
from nanorecall.files import lock_run_dir, unlock
from nanorecall.run_dir import find_restarted_run
from nanorecall.saved_run import RESUMABLE, load_settings
from nanorecall.settings import print_help, read_argv, reject_args, require, wants_help
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
    allowed = ", ".join(RESUMABLE)
    for s in changes:
        message = f"{s.source}: {s.key} cannot change in the middle of a run (only {allowed} can)"
        require(s.key in RESUMABLE, message, s.key)
    return load_settings(folder, train_config, changes)


def after_restart(settings, world):
    """Settings of the run that this launch has begun already, if torchrun has restarted it.

    torchrun repeats the command line after a rank has died, and that names no run to resume.
    """
    restarted = ""
    with world.agree():
        if world.is_main:
            restarted = find_restarted_run(settings.train.log_dir)
    restarted = world.broadcast(restarted)
    if settings.resume or not restarted:
        return settings
    world.print0(f"started again by torchrun: going on with {restarted}")
    return load_settings(restarted, type(settings.train))


def export_checkpoints(settings, world):
    """Rewrite the checkpoints of a run as settings.train.export_checkpoint says -> exit status."""
    message = "export needs a single process; run it without torchrun"
    require(world.size == 1, message, "export_checkpoint")
    lock = lock_run_dir(settings.resume)
    convert_checkpoints(settings.resume, settings.train.export_checkpoint, world)
    unlock(lock)
    return 0
