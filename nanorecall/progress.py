"""The progress of long work: a bar on a terminal, elsewhere a line now and then."""

import sys
import time

from tqdm import tqdm

from nanorecall.settings import say

SECONDS_BETWEEN_LINES = 20


def duration(seconds):
    """Seconds as text: 83 -> "01:23"."""
    return tqdm.format_interval(seconds)


def progress(items, name, is_shown=True):
    """Yield each of items, a sequence; standard error says how many are done and what is left.

    is_shown: False on ranks that do not print.
    """
    if not is_shown:
        yield from items
    elif sys.stderr.isatty():
        yield from tqdm(items, desc=name, leave=False)
    else:
        yield from lines_of_progress(items, name)


def lines_of_progress(items, name):
    start = last_line = time.perf_counter()
    for n_done, item in enumerate(items):
        now = time.perf_counter()
        if n_done > 0 and now - last_line >= SECONDS_BETWEEN_LINES:
            left = duration((now - start) / n_done * (len(items) - n_done))
            say(f"{name}: {n_done} of {len(items)}, {left} left", file=sys.stderr, flush=True)
            last_line = now
        yield item
