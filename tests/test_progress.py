"""What a run shows while it works: its first screen, lines of progress, its curves."""

import json
import os
import sys
import time

import pytest

import train
from nanorecall import plots, progress
from nanorecall.curriculum import Curriculum
from toys import run


@pytest.fixture
def on_a_screen(monkeypatch):
    """on_a_screen(is_terminal): standard error is a terminal, or is none."""

    def choose(is_terminal):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)

    return choose


def test_elsewhere_than_on_a_terminal_a_line_says_what_is_left(monkeypatch, capsys, on_a_screen):
    """Ten items of 6 seconds: a line after at least 20 seconds, that is before items 4 and 8."""
    on_a_screen(False)
    seconds = iter(range(0, 600, 6))
    monkeypatch.setattr(time, "perf_counter", lambda: next(seconds))
    # The clock is also read before the first item.
    assert list(progress.progress(range(10), "files")) == list(range(10))
    printed = capsys.readouterr().err.splitlines()
    assert printed == ["files: 3 of 10, 00:56 left", "files: 7 of 10, 00:20 left"]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_other_ranks_print_nothing(monkeypatch, capsys, on_a_screen, is_terminal):
    on_a_screen(is_terminal)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    assert list(progress.progress([1, 2], "files", is_shown=False)) == [1, 2]
    assert capsys.readouterr().err == ""
    assert list(progress.progress([1, 2], "files")) == [1, 2]
    assert "files" in capsys.readouterr().err


def test_the_first_screen_names_what_is_not_the_default(tmp_path, capsys):
    _, out = run(tmp_path, max_steps=20, num_threads=1)
    printed = capsys.readouterr().out
    before = printed.partition("step ")[0]
    assert "lr=0.01" in before and "num_kv_pairs=4" in before
    assert "weight_decay" not in before and "ModuleList" not in before
    assert len(before.splitlines()) <= 12
    line = next(line for line in printed.splitlines() if line.startswith("step 15/20: "))
    assert " ms per step, 00:00 left" in line
    assert os.path.getsize(os.path.join(out, "curves.png")) > 5000


def test_without_epochs_it_prints_modules_and_all_settings(capsys):
    assert train.main(["--n_epochs=0", "--lr=0.5"]) == 0
    printed = capsys.readouterr().out
    assert "ModuleList" in printed and "'weight_decay': 0.0" in printed and "'lr': 0.5" in printed


def test_the_last_line_begins_with_the_target_slice(tmp_path, capsys):
    run(tmp_path, max_steps=20, target_slice="num_kv_pairs=4")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("num_kv_pairs=4: accuracy 0.") and " of 200 labels; test acc" in last


def test_where_stages_ended():
    fixed = Curriculum([5, 10])
    assert fixed.ends(20) == [5, 15] and fixed.ends(12) == [5] and fixed.ends(5) == []
    learned = Curriculum([5, 10], max_loss=1.0)
    learned.state["ends"] = [3]
    assert learned.ends(20) == [3, 13] and learned.ends(4) == [3]


def test_curves_show_the_target_slice_and_the_stages(tmp_path, monkeypatch):
    rows = []
    for step, correct in ((10, 1), (20, 3)):
        counts = {"4": {"correct": correct, "labels": 4}, "8": {"correct": 0, "labels": 4}}
        row = {"kind": "eval", "step": step, "seconds": 1.0, "loss": 1.0}
        row |= {"accuracy": correct / 8, "exact_match": 0.0, "labels": 8, "n_examples": 2}
        row["by_slice"] = {"size": counts}
        rows.append(json.dumps(row) + "\n")
    (tmp_path / "log.jsonl").write_text("".join(rows))
    figures = []
    monkeypatch.setattr(plots, "write_figure", lambda fig, *rest: figures.append(fig))
    plots.plot_curves(str(tmp_path), "title", "size=4", [12])
    _, accuracies = figures[0].axes
    lines = {line.get_label(): line for line in accuracies.lines}
    assert list(lines["labels of size=4"].get_ydata()) == [0.25, 0.75]
    assert list(lines["end of a curriculum stage"].get_xdata()) == [12, 12]
