"""Make the figures of RESULTS.md: train the runs behind each of them, then draw it.

    python sweep.py                        # list the figures, their runs, and how many are missing
    python sweep.py lr                     # train what is missing, then draw figures/lr.png
    python sweep.py lr width --jobs 2      # two runs at a time, one thread each
    python sweep.py all --draw_only 1      # draw from the runs that exist, train nothing

A point of a figure is one run directory per seed in runs/sweep, which eval.py reads, too. Figures
share runs. A finished run is never trained again, and a stopped one is resumed.

For a figure of your own, write a function that lists its points and one that draws their results
(analysis/figures_in_*.py), and add a line to FIGURES.
"""

import os
import sys
from collections import namedtuple
from dataclasses import dataclass

from analysis import figures_in_context as context
from analysis import figures_in_prompts as prompts
from analysis import figures_in_weights as weights
from analysis.figure_lines import BANDS
from analysis.sweep_runs import collect_results, is_finished, run_missing, runs_of
from nanorecall.checkpoint import make_directory
from nanorecall.metrics import print_table
from nanorecall.plots import finish_figure
from nanorecall.settings import (
    ConfigError,
    at_least,
    build_config,
    print_help,
    reject_unknown,
    require,
    run_cli,
    say,
    split_argv,
    wants_help,
)


@dataclass
class Config:
    jobs: int = 1  # runs at a time, one thread each
    seeds: int = 3  # runs per point: seeds 0, 1, ...
    log_dir: str = "runs/sweep"  # where run directories go
    output: str = "figures"  # where figures go
    draw_only: bool = False  # draw from the runs that exist, train nothing
    extra_args: str = ""  # extra flags for every training ("--max_steps 5"); use another log_dir

    def check(self):
        at_least(self, 1, "jobs", "seeds")


Figure = namedtuple("Figure", "points draw summary")
FIGURES = {
    "lr": Figure(context.lr_points, context.draw_lr, "MQAR: accuracy by learning rate"),
    "pairs": Figure(context.pairs_points, context.draw_pairs, "MQAR: accuracy by number of pairs"),
    "width": Figure(
        context.width_points, context.draw_width, "MQAR: accuracy by model width and by state size"
    ),
    "time": Figure(context.time_points, context.draw_time, "MQAR: seconds to 99% accuracy"),
    "exposures": Figure(
        weights.exposure_points, weights.draw_exposures, "synthetic QA: recall by exposures"
    ),
    "table": Figure(
        weights.table_points, weights.draw_table, "synthetic QA: bits stored by size of the table"
    ),
    "edits": Figure(
        weights.edit_points, weights.draw_edits, "edited facts: efficacy, specificity, retention"
    ),
    "forgetting": Figure(
        weights.forgetting_points, weights.draw_forgetting, "new facts: learned and retained"
    ),
    "memories": Figure(
        weights.memory_points, weights.draw_memories, "one update in cache, state, table, MLP"
    ),
    "hops": Figure(
        weights.hop_points, weights.draw_hops, "two-hop in and out of distribution, HashHop by hops"
    ),
    "templates": Figure(
        prompts.template_points, prompts.draw_templates, "fused answers by number of templates"
    ),
}


# ---- drawing -------------------------------------------------------------------------------------


def save_figure(name, results, config):
    try:
        plt, fig, caption = FIGURES[name].draw(results)
    except (KeyError, IndexError, TypeError, ValueError) as e:
        problem = f"the results of its runs lack what it shows ({type(e).__name__}: {e})"
        raise ConfigError(f"figure {name}: {problem}; run them again") from None
    if not any(axis.get_legend() for axis in fig.axes):
        handles, labels = fig.axes[0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside upper center", ncols=5)
    if config.seeds == 1:  # no mean and no bands
        caption = caption.replace(BANDS, "\n1 seed")
    fig.supxlabel(caption.format(seeds=config.seeds), fontsize=7)
    make_directory(config.output)
    path = os.path.join(config.output, name + ".png")
    finish_figure(fig, plt, path, "")
    say(f"wrote {path}")


# ---- command line --------------------------------------------------------------------------------


def parse(argv):
    """Command line -> names of figures, Config."""
    args, settings = split_argv(argv)
    if wants_help(settings):
        print_help(__doc__, Config)
    reject_unknown(settings, Config)
    config = build_config(Config, settings)
    names = list(FIGURES) if args == ["all"] else args
    unknown = " ".join(name for name in names if name not in FIGURES)
    choice = f"choose from {', '.join(FIGURES)}, or all"
    require(not unknown, f"there is no figure {unknown}; {choice}", None)
    return names, config


def print_figures(config):
    lines = []
    for name, (points, _, summary) in FIGURES.items():
        runs = list(runs_of(points(), config))
        n_missing = sum(not is_finished(point, folder) for point, _, folder in runs)
        lines.append((name, len(runs), n_missing, summary))
    print_table(("figure", "runs", "missing", "shows"), lines)


def main(argv=None):
    names, config = parse(sys.argv[1:] if argv is None else argv)
    if not names:
        print_figures(config)
        return
    if not config.draw_only:
        points = []
        for name in names:
            points += FIGURES[name].points()
        run_missing(points, config)
    errors = []
    for name in names:
        try:
            save_figure(name, collect_results(FIGURES[name].points(), config), config)
        except ConfigError as e:  # the other figures do not need these runs
            errors.append(str(e))
    require(not errors, "\n".join(errors), None)


if __name__ == "__main__":
    run_cli(main)
