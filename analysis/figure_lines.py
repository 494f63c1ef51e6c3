"""Lines over seeds and logarithmic axes, for the figures of sweep.py.

Drawing functions get results: {series: {x: [result of each seed]}}. A result is what
analysis.sweep_runs.read_point returns. They return pyplot, the figure and its caption.
"""

import numpy as np

from analysis.compare_figure import mean_and_range

# The end of a caption; sweep.py puts the number of seeds in.
BANDS = "\nmean of {seeds} seeds; bands: minimum to maximum"


def draw_series(axis, results, measure, x_of=None):
    """A line per series: the mean over seeds of measure(result), with a band over their range.

    x_of(results of the seeds): where to draw a point; None: at its own x.
    """
    for series, points in results.items():
        x, values = [], []
        for own_x, seeds in points.items():
            x.append(x_of(seeds) if x_of else own_x)
            values.append([measure(result) for result in seeds])
        mean_and_range(axis, x, np.array(values).T, label=series)


def token_accuracy(result):
    return result["all"]["value"]


def log_axis(axis, ticks):
    """A logarithmic x axis with these numbers as its only ticks."""
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.minorticks_off()
