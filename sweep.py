"""Make the figures of RESULTS.md: train the runs behind each of them, then draw it.

    python sweep.py                        # list the figures, their runs, and how many are missing
    python sweep.py lr                     # train what is missing, then draw figures/lr.png
    python sweep.py lr time --jobs 2       # two runs at a time, one thread each
    python sweep.py all --draw_only 1      # draw from the runs that exist, train nothing
    python sweep.py card --model mine      # a report card of one mixer (card --help)

What a figure shows is also kept as numbers, in figures/NAME.json. --draw_only draws from that file
where runs are missing. It names the figures that have neither, and draws the others.

A point of a figure is one run directory per seed in runs/sweep, which eval.py reads, too. Figures
share runs. A finished run is never trained again, and a stopped one is resumed.

For a figure of your own, write a function that lists its points and one that draws their results
(analysis/figure*.py), and add a line to FIGURES.
"""

import os
import sys
from collections import namedtuple
from dataclasses import dataclass

from analysis import card
from analysis import figure_of_zoology as zoology
from analysis import figures_in_context as context
from analysis import figures_in_prompts as prompts
from analysis import figures_in_weights as weights
from analysis import figures_of_mixers as mixers
from analysis.figure_lines import BANDS
from analysis.sweep_runs import (
    by_series,
    collect_results,
    missing_runs,
    read_shown,
    run_missing,
    runs_of,
    shown_results,
)
from nanorecall.files import make_directory
from nanorecall.metrics import print_table
from nanorecall.plots import finish_figure
from nanorecall.records import write_json
from nanorecall.settings import (
    ConfigError,
    at_least,
    build_config,
    has_closed_quotes,
    print_help,
    reject_unknown,
    require,
    require_known,
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
    draw_only: bool = False  # draw from the runs that exist, or else the .json; train nothing
    extra_args: str = ""  # extra flags for every training ("--max_steps 5"); use another log_dir

    def check(self):
        at_least(self, 1, "jobs", "seeds")
        has_closed_quotes(self, "extra_args")


# What makes a figure:
#   points() -> [Point]       the runs that it shows, or those from whose results it chooses
#   draw(results) -> pyplot, figure, caption; results: {series: {x: [result of each seed]}}
#   parts                     paths in a result to what draw needs (see shown_results)
#   summary                   what it shows, for the list of figures
# Where the points to draw follow from the results of others, {point: [result of each seed]}:
#   tune(results) -> [Point]    further points to train; [] if there are enough
#   choose(results) -> [Point]  the points to draw
Figure = namedtuple("Figure", "points draw parts summary tune choose", defaults=[None, None])
IN_EDIT = [
    "result.metrics.edits",
    "result.metrics.stored.*.value",
    "result.by_slice.method, edits.*.method",
]
for _metric in (*weights.EDIT_METRICS, "retained"):
    IN_EDIT.append(f"result.by_slice.method, edits.*.{_metric}.value")
FIGURES = {
    "lr": Figure(
        context.lr_points,
        context.draw_lr,
        ["all"],
        "MQAR: accuracy by learning rate",
    ),
    "time": Figure(
        context.time_points,
        context.draw_time,
        ["evals"],
        "MQAR: seconds to 99% accuracy",
    ),
    "state": Figure(
        mixers.state_points,
        mixers.draw_state,
        [
            *("all.value", "state", "result.metrics.accuracy.value"),
            *("slices.updated.*.value", "slices.input_seq_len.*.value"),
        ],
        "every mixer: accuracy by state size at equal parameters, updates, state tracking",
        mixers.next_rates,
        mixers.best_rates,
    ),
    "zoology": Figure(
        zoology.zoology_points,
        zoology.draw_zoology,
        ["slices.size.*.value"],
        "every mixer: accuracy by model width at the four sizes of Zoology's figure",
        choose=zoology.all_widths,
    ),
    "plateau": Figure(
        mixers.plateau_points,
        mixers.draw_plateau,
        ["evals"],
        f"{len(mixers.RECIPES)} models: steps until recall appears, with and without a curriculum",
    ),
    "exposures": Figure(
        weights.exposure_points,
        weights.draw_exposures,
        ["slices.exposures"],
        "synthetic QA: recall by exposures",
    ),
    "table": Figure(
        weights.table_points,
        weights.draw_table,
        ["result.metrics.stored"],
        "synthetic QA: bits stored by size of the table",
    ),
    "edits": Figure(
        weights.edit_points,
        weights.draw_edits,
        IN_EDIT,
        "edited facts: efficacy, specificity",
    ),
    "forgetting": Figure(
        weights.forgetting_points,
        weights.draw_forgetting,
        IN_EDIT,
        "new facts: learned and retained",
    ),
    "memories": Figure(
        weights.memory_points,
        weights.draw_memories,
        IN_EDIT,
        "one update in cache, state, table, MLP",
    ),
    "hops": Figure(
        weights.hop_points,
        weights.draw_hops,
        ["slices.query", "slices.hops"],
        "two-hop in and out of distribution, HashHop by hops",
    ),
    "templates": Figure(
        prompts.template_points,
        prompts.draw_templates,
        ["result.metrics"],
        "fused answers by number of templates",
    ),
}


# ---- points --------------------------------------------------------------------------------------


def points_of(name, config):
    """-> the points that a figure shows, and all that are trained for it.

    If it chooses its points by results that are missing, these are the points to choose from.
    """
    figure = FIGURES[name]
    points = figure.points()
    if not figure.choose:
        return points, points
    while not missing_runs(points, config):
        results = collect_results(points, config)
        more = figure.tune(results) if figure.tune else []
        if not more:
            chosen = figure.choose(results)
            return chosen, points + chosen
        points = points + more
    return points, points


def trained_points(names, config):
    """All points that are trained for these figures, as far as they are known."""
    points = []
    for name in names:
        points += points_of(name, config)[1]
    return points


def train_missing(names, config):
    points = []
    more = trained_points(names, config)
    while len(more) > len(points):  # some points follow from the results of others
        points = more
        run_missing(points, config)
        more = trained_points(names, config)


# ---- drawing -------------------------------------------------------------------------------------


def make_figure(name, config):
    """Draw a figure from its runs, and keep what it shows as <name>.json.

    With draw_only, a figure whose runs are missing is drawn from that file.
    """
    path = os.path.join(config.output, name + ".json")
    points, _ = points_of(name, config)
    if config.draw_only and os.path.exists(path) and missing_runs(points, config):
        say(f"{name}: runs are missing, so it shows {path}")
        shown = read_shown(path)
        save_figure(name, shown, config)
        return
    shown = shown_results(collect_results(points, config), FIGURES[name].parts, config.seeds)
    save_figure(name, shown, config)
    write_json(path, shown, indent=None)


def save_figure(name, shown, config):
    try:
        plt, fig, caption = FIGURES[name].draw(by_series(shown))
    except (KeyError, IndexError, TypeError, ValueError) as e:
        problem = f"the results of its runs lack what it shows ({type(e).__name__}: {e})"
        raise ConfigError(f"{problem}; run them again") from None
    if not any(axis.get_legend() for axis in fig.axes):
        handles, labels = fig.axes[0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside upper center", ncols=5)
    if shown["seeds"] == 1:  # no mean and no bands
        caption = caption.replace(BANDS, "\n1 seed")
    fig.supxlabel(caption.format(seeds=shown["seeds"]), fontsize=7)
    make_directory(config.output)
    path = os.path.join(config.output, name + ".png")
    finish_figure(fig, plt, path, "")
    say(f"wrote {path}")


# ---- command line --------------------------------------------------------------------------------


def parse(argv):
    """Command line -> names of figures, Config; or ["card"], the Config of a card."""
    if argv[:1] == ["card"]:
        return ["card"], card.parse(argv[1:])
    args, settings = split_argv(argv)
    if wants_help(settings):
        print_help(__doc__, Config)
    names = list(FIGURES) if args == ["all"] else args
    # First: a misspelt `card` has settings that figures have not.
    for name in names:
        require_known("figure", name, [*FIGURES, "all", "card"])
        message = f"{name} stands alone, before its settings: python sweep.py {name}"
        require(name in FIGURES, message, None)
    reject_unknown(settings, Config)
    config = build_config(Config, settings)
    return names, config


def print_figures(config):
    lines = []
    for name, figure in FIGURES.items():
        try:
            points = trained_points([name], config)
        except ConfigError as e:  # which runs it needs depends on runs that cannot be used
            lines.append((name, "-", "-", str(e)))
            continue
        folders = {folder for _, _, folder in runs_of(points, config)}
        missing = set(missing_runs(points, config))
        lines.append((name, len(folders), len(missing), figure.summary))
    print_table(("figure", "runs", "missing", "shows"), lines)


def main(argv=None):
    names, config = parse(sys.argv[1:] if argv is None else argv)
    if names == ["card"]:
        card.make_card(config)
        return
    if not names:
        print_figures(config)
        return
    if not config.draw_only:
        train_missing(names, config)
    errors = []
    for name in names:
        try:
            make_figure(name, config)
        except ConfigError as e:  # the other figures do not need these runs
            errors.append(f"{name}: {e}")
    require(not errors, "\n".join(errors), None)


if __name__ == "__main__":
    run_cli(main)
