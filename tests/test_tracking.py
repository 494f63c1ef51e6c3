"""--track: TensorBoard and wandb get what log.jsonl gets, once, and cannot stop a training."""

import importlib.machinery
import json
import os
import sys
import types

import numpy as np
import pytest

import train
from nanorecall import tracking
from nanorecall.settings import ConfigError, RunError
from toys import MEMORY_TOY, flags, run


def rows_of(out, kind=None):
    with open(os.path.join(out, "log.jsonl")) as f:
        rows = [json.loads(line) for line in f]
    return [row for row in rows if kind in (None, row["kind"])]


def points_of(out):
    """{name: [(step, value)]} of all numbers in log.jsonl, and of the test in status.json."""
    points = {}
    for row in rows_of(out):
        for name in row.keys() - {"kind", "split", "step", "all", "by_slice", "layers"}:
            tag = f"{row.get('split', row['kind'])}/{name}"
            points.setdefault(tag, []).append((row["step"], row[name]))
    with open(os.path.join(out, "status.json")) as f:
        status = json.load(f)
    for name in status["test"].keys() - {"split", "all", "by_slice"}:
        points[f"test/{name}"] = [(status["step"], status["test"][name])]
    return points


def train_until_it_breaks(tmp_path, monkeypatch, step, **changes):
    """Train the toy run, with a checkpoint at step 20, until an error after that -> its folder."""
    forward_backward = train.forward_backward

    def broken(run, now, stop):
        if now == step:
            raise RunError("the machine breaks down")
        return forward_backward(run, now, stop)

    with monkeypatch.context() as patch:
        patch.setattr(train, "forward_backward", broken)
        with pytest.raises(RunError, match="breaks down"):
            run(tmp_path, max_steps=40, **changes)
    out = os.path.join(tmp_path, "run")
    assert rows_of(out)[-1]["step"] > 20
    return out


# ---- TensorBoard ---------------------------------------------------------------------------------


def read_events(out):
    """What TensorBoard shows of a run: {name: [(step, value)]}, and the reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(out, {"scalars": 0})
    events.Reload()
    points = {}
    for tag in events.Tags()["scalars"]:
        points[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    return points, events


def assert_same_points(shown, expected):
    """TensorBoard has float32."""
    assert shown.keys() == expected.keys()
    for name, points in expected.items():
        assert shown[name] == [(step, np.float32(value)) for step, value in points], name


@pytest.fixture
def tensorboard():
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install tensorboard")


def test_tensorboard_shows_the_log_number_for_number(tensorboard, tmp_path, undrawn):
    _, out = run(tmp_path, max_steps=40, track="tensorboard")
    shown, events = read_events(out)
    assert len(shown["train/loss"]) == 8 and len(shown["val/accuracy"]) == 2
    assert {"train/lr", "train/grad_norm", "val/exact_match", "test/accuracy"} <= shown.keys()
    assert_same_points(shown, points_of(out))

    from tensorboard.plugins.hparams import metadata

    contents = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    start = metadata.parse_session_start_info_plugin_data(contents)
    assert start.hparams["lr"].number_value == 0.01
    assert start.hparams["n_layers"].number_value == 2
    assert start.hparams["lr_schedule"].string_value == "cosine"
    assert start.hparams["curriculum"].string_value == "()"
    assert "_hparams_/session_end_info" in events.summary_metadata

    _, plain = run(tmp_path, name="plain", max_steps=40)
    losses = [row["loss"] for row in rows_of(out)]
    assert losses == [row["loss"] for row in rows_of(plain)]


def test_tensorboard_shows_the_use_of_memory_slots(tensorboard, tmp_path, undrawn):
    _, out = run(tmp_path, max_steps=10, model="memory", track="tensorboard", **MEMORY_TOY)
    shown, _ = read_events(out)
    for layer in ("0", "1"):
        used = [(row["step"], row["layers"][layer]["dead"]) for row in rows_of(out, "memory")]
        assert shown[f"memory/{layer}/dead"] == used and len(used) == 2


def test_after_a_resume_no_point_is_missing_or_there_twice(
    tensorboard, tmp_path, undrawn, monkeypatch
):
    out = train_until_it_breaks(tmp_path, monkeypatch, 37, track="tensorboard")
    assert len(read_events(out)[0]["train/loss"]) == 7
    run(tmp_path, resume=True)
    assert_same_points(read_events(out)[0], points_of(out))


def test_a_resumed_run_can_be_tracked_from_its_first_step(
    tensorboard, tmp_path, undrawn, monkeypatch
):
    out = train_until_it_breaks(tmp_path, monkeypatch, 26)
    run(tmp_path, resume=True, track="tensorboard")
    assert_same_points(read_events(out)[0], points_of(out))


def test_one_rank_of_two_writes(tensorboard, tmp_path, on_ranks):
    args = flags(tmp_path, "run", max_steps=10, track="tensorboard")
    assert on_ranks(2, lambda rank: train.main(args)) == [0, 0]
    out = tmp_path / "run"
    assert sum("tfevents" in name for name in os.listdir(out)) == 1
    assert_same_points(read_events(str(out))[0], points_of(out))


# ---- wandb, by a module that acts like it --------------------------------------------------------


class FakeRun:
    """A run on a server: a dict that later starts find again."""

    def __init__(self, server, config):
        self.rows = server.setdefault("rows", {})
        self.summary = server.setdefault("summary", {})
        self.server, self.config = server, config
        self.step = max(self.rows, default=-1) + 1

    def define_metric(self, name, step_metric):
        self.server["x"] = name, step_metric

    def log(self, numbers, step):
        assert step > max(self.rows, default=-1), "wandb ignores these with a warning"
        self.rows[step] = numbers

    def finish(self, exit_code):
        self.server["exit_code"] = exit_code


@pytest.fixture
def servers(monkeypatch):
    """A fake wandb -> {id: what it has of a run}"""
    servers = {}

    def init(id, **options):
        server = servers.setdefault(id, {})
        server["options"] = options
        return FakeRun(server, options["config"])

    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return servers


def assert_server_has_the_log(server, out):
    rows = server["rows"]
    assert list(rows) == list(range(len(rows_of(out))))
    for number, row in enumerate(rows_of(out)):
        assert rows[number]["step"] == row["step"]
        assert rows[number][f"{row.get('split', row['kind'])}/loss"] == row["loss"]
    tested = {name: points[0][1] for name, points in points_of(out).items() if "test/" in name}
    assert server["summary"] == tested and server["exit_code"] == 0


def test_wandb_gets_the_log_and_a_resumed_run_goes_on_there(
    servers, tmp_path, undrawn, monkeypatch
):
    # With a schedule that does not depend on max_steps: what is made again is the same.
    changes = dict(track="wandb", lr_schedule="constant")
    out = train_until_it_breaks(tmp_path, monkeypatch, 37, **changes)
    (server,) = servers.values()
    assert len(server["rows"]) == 8
    run(tmp_path, resume=True, max_steps=60)
    assert list(servers.values()) == [server]
    assert_server_has_the_log(server, out)
    options = server["options"]
    assert options["project"] == "nanorecall" and options["name"] == "run"
    assert options["dir"] == out and options["resume"] == "allow" and server["x"] == ("*", "step")
    assert options["config"]["lr"] == 0.01 and options["config"]["max_steps"] == 60


def test_a_record_that_wandb_does_not_have_is_sent_whole(servers, tmp_path, undrawn, monkeypatch):
    """As after WANDB_MODE=offline, where each start begins anew."""
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    out = train_until_it_breaks(tmp_path, monkeypatch, 26, track="wandb")
    (run_id,) = servers
    servers.clear()
    run(tmp_path, resume=True)
    assert list(servers) == [run_id]
    assert_server_has_the_log(servers[run_id], out)
    assert servers[run_id]["options"]["project"] == "mine"


# ---- faults --------------------------------------------------------------------------------------


def test_a_missing_package_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="^track=wandb needs a package: pip install wandb; "):
        run(tmp_path, track="wandb")
    with pytest.raises(ConfigError, match="^--track: track='tensorbord' .* mean tensorboard?"):
        run(tmp_path, track="tensorbord")
    assert os.listdir(tmp_path) == []


class FullDisk:
    """A tracker that can write a few rows."""

    room = 0

    def __init__(self, folder, settings, seconds):
        self.left = self.room

    def log(self, step, numbers):
        self.left -= 1
        if self.left < 0:
            raise OSError("no space left")

    def close(self, step, numbers, is_failed):
        raise OSError("no space left")


@pytest.mark.parametrize("room", [0, 3, 1000])
def test_a_tracker_that_fails_costs_one_note(tmp_path, monkeypatch, capsys, undrawn, room):
    monkeypatch.setattr(FullDisk, "room", room)
    monkeypatch.setitem(tracking.TRACKERS, "wandb", FullDisk)
    monkeypatch.setattr("nanorecall.run.require_package", lambda name: None)
    status, out = run(tmp_path, track="wandb", max_steps=20)
    assert status == 0
    assert capsys.readouterr().out.count("note: wandb gets no more of this run (") == 1
    assert len(rows_of(out)) == 5
    assert os.path.exists(os.path.join(out, "ckpt.pt"))


def test_what_is_not_finite_is_left_out():
    row = {"kind": "train", "step": 3, "loss": float("nan"), "lr": 0.5, "skipped": True}
    assert tracking.numbers_of(row) == {"train/lr": 0.5, "train/skipped": True}
    assert tracking.numbers_of({**row, "loss": None}) == {"train/lr": 0.5, "train/skipped": True}
