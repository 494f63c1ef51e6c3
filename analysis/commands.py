"""The command table of eval.py and ablate.py: parsing, checks, and one report of all commands.

python eval.py logits runs/RUN --rows 100
python ablate.py all runs/RUN
"""

import contextlib
import difflib
import io
import os
import sys
import time
from collections import namedtuple

from analysis.trained_run import ending, open_run
from nanorecall.build import enough_memory
from nanorecall.checkpoint import atomic_write
from nanorecall.distributed import process_group
from nanorecall.settings import (
    ConfigError,
    build_config,
    help_text,
    printable,
    reject_unknown,
    reject_unused,
    require,
    say,
    split_argv,
)

ADVICE = "lower eval_batch_size, or measure on the CPU with --device cpu"  # when memory is full
MODEL = "split checkpoint eval_batch_size device dtype"  # settings of whatever runs a model

# work(run), or work(words, config) if it looks at no model; uses: its settings; why_not(run): why it does not fit, or "";
# shows: what a reader learns from it
Command = namedtuple("Command", "work looks uses why_not shows")


def fits_all(run):
    return ""


def analysis(work, uses, shows, why_not=fits_all):
    """A command that looks at one run."""
    return Command(work, True, f"{MODEL} {uses}", why_not, shows)


def run_command(doc, commands, kind, argv=None, default=None, prefix="eval"):
    """Read a command line, refuse what the command does not use, and run it. kind: the dataclass of settings; prefix: of the
    names of result files."""
    words, settings = split_argv(sys.argv[1:] if argv is None else argv)
    asked = any(s.key == "help" for s in settings)
    if asked or not words:
        say(help_text(doc, kind))
        require(asked, "name a run directory or a command" if default else "name a command and a run directory", None)
        return
    reject_unknown(settings, kind)
    config = build_config(kind, settings)
    near = difflib.get_close_matches(words[0], commands, n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(commands)}"
    is_run = default and (len(words) == 1 or os.path.isdir(words[0]))
    require(words[0] in commands or is_run, f"{words[0]!r} is no command; {hint}", None)
    name = words.pop(0) if words[0] in commands else default
    command = commands[name]
    users = {s: ", ".join(n for n, c in commands.items() if s in c.uses.split()) for s in kind.__dataclass_fields__}
    idle = {s: f"{name} does not use it, only {by}" for s, by in users.items() if s not in command.uses.split()}
    reject_unused(config, idle, {s.key: s for s in settings})
    if not command.looks:
        perform(command, words, config)
        return
    require(len(words) == 1, f"name one run directory, as in: {name} runs/RUN", None)
    with process_group(config.device) as world, enough_memory(lambda: ADVICE):
        with world.agree():
            run = open_run(words[0], config, world)
        run.prefix, run.uses = prefix, {n: c.uses for n, c in commands.items()}
        why_not = command.why_not(run)
        require(not why_not, f"{run.folder}: {why_not}", None)
        perform(command, run)


def perform(command, *args):
    """What command.work(*args) returns; RunError, with the settings to lower, if memory is full."""
    used = command.uses.split()
    sizes = [s for s in ("eval_batch_size", "rows", "pairs", "chunk") if s in used]
    lower = f"lower {' or '.join(sizes)}" if sizes else "look at fewer or smaller files"
    with enough_memory(lambda: lower):
        return command.work(*args)


def report(run, script, commands, names, file):
    """Run commands one after another and write a report into the run: what was printed, the figures, how long it took."""
    size, start = sum(q.numel() for q in run.model.parameters()), time.perf_counter()
    about = ", ".join(f"{k} {v}" for k, v in run.provenance().items())
    text = printable(
        f"# {run.name}\n\n{about}; {size:,} parameters. Intervals are 95%.\n", keep="\n"
    )
    stem, dot_md = os.path.splitext(file)
    path = os.path.join(run.folder, stem + ending(run, "all") + dot_md)
    for name in names:
        text += printable(f"\n## {name}\n\n" + run_section(run, script, name, commands[name]), keep="\n")
        if run.world.is_main:
            atomic_write(path, lambda f: f.write(text.encode()))
    run.world.print0(f"\nwrote {path} in {time.perf_counter() - start:.0f} s")


def run_section(run, script, name, command):
    """Run one command -> its part of the report."""
    run.read.clear()
    start, figures, printed = time.perf_counter(), len(run.figures), io.StringIO()
    why_not = command.why_not(run)
    run.world.print0(f"\n{name}: " + (f"left out, {why_not}" if why_not else command.shows))
    if why_not:
        return f"Left out: {why_not}.\n"
    try:
        with contextlib.redirect_stdout(printed):
            if command.looks:
                perform(command, run)
            elif run.world.is_main:
                run.figures.append(perform(command, [run.folder], run.config))
    except ConfigError as e:
        run.world.print0(f"left out: {e}")
        return f"Left out: {e}.\n"
    print(printed.getvalue(), end="", flush=True)
    body = "\n".join(line for line in printed.getvalue().split("\n") if not line.startswith("wrote ")).strip()
    pictures = "".join(f"![{name}]({os.path.basename(path)})\n" for path in run.figures[figures:])
    took = f"`python {script} {name} {run.folder}`, {time.perf_counter() - start:.1f} s"
    return f"{command.shows}\n{took}\n\n```\n{body}\n```\n\n{pictures}"
