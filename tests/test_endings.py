"""How a run ends and starts again: what it prints, what it leaves, what the next start reads."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import eval as eval_script
import flex_generate
import memory
import nanorecall.run as run_module
import train
from analysis import trained_run
from nanorecall import build, checkpoint
from nanorecall.distributed import SINGLE_PROCESS, all_finite
from nanorecall.files import unlock
from nanorecall.records import read_json, read_log, write_json
from nanorecall.run_dir import create_run_dir, find_restarted_run
from nanorecall.settings import ConfigError, RunError
from toys import assert_same, contents, flags, run, status_of, torchrun

pytestmark = pytest.mark.slow  # whole runs from start to end

SHORT = dict(max_steps=4, eval_interval=2, log_interval=1, n_val_examples=8, n_test_examples=8)


# ---- nobody reads the output ---------------------------------------------------------------------


def in_shell(script, *args):
    """Run a script in bash -> CompletedProcess, whose stderr ends in the script's exit status."""
    path = os.path.join(os.path.dirname(train.__file__), script)
    command = " ".join([sys.executable, path, *args]) + "; echo ${PIPESTATUS[0]} >&2"
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True)


ENDS = ["| head -n 1", ">&- 2>&-", "> /dev/full 2> /dev/full", "> /dev/full"]


@pytest.mark.parametrize("end", ENDS)
def test_training_goes_on_without_its_output(tmp_path, end):
    done = in_shell("train.py", *(f"'{w}'" for w in flags(tmp_path, "run", **SHORT)), end)
    assert done.stderr.endswith("0\n") and "Traceback" not in done.stderr
    assert done.stderr.count("No space left on device") == (end == "> /dev/full")
    assert status_of(tmp_path / "run")["status"] == "finished"
    assert {"ckpt.pt", "best.pt", "curves.png"} <= set(os.listdir(tmp_path / "run"))


def test_measuring_goes_on_without_its_output(tmp_path):
    _, out = run(tmp_path, **SHORT)
    for end in ("| head -n 0", "> /dev/full"):
        done = in_shell("eval.py", out, end)
        assert done.stderr.endswith("0\n") and "Traceback" not in done.stderr
        assert os.path.exists(os.path.join(out, "eval_test.json"))
        os.remove(os.path.join(out, "eval_test.json"))


def test_a_screen_without_the_letters_shows_their_numbers():
    line = "from nanorecall.settings import run_cli; run_cli(lambda: print('␣\\udcff'))"
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", line]
    here = os.path.dirname(train.__file__)
    done = subprocess.run(command, capture_output=True, text=True, env=ascii_only, cwd=here)
    assert (done.returncode, done.stdout) == (0, "\\u2423\\udcff\n")


# ---- weights and losses that are not finite ------------------------------------------------------


def test_weights_that_are_not_finite_end_as_failed_and_are_not_saved(tmp_path, capsys):
    status, out = run(tmp_path, **{**SHORT, "lr": 1e38, "eval_interval": 0})
    assert status == 1 and status_of(out)["status"] == "failed"
    assert "not finite after step 4; lower lr" in capsys.readouterr().out
    assert not [name for name in os.listdir(out) if name.endswith(".pt")]


def test_a_loss_that_is_not_finite_in_an_evaluation_ends_as_failed(tmp_path, monkeypatch, capsys):
    evaluate = run_module.evaluate

    for bad in ("val", "test"):

        def spoilt(model, data, split, *rest, bad=bad):
            result = evaluate(model, data, split, *rest)
            return {**result, "loss": math.nan} if split == bad else result

        monkeypatch.setattr(run_module, "evaluate", spoilt)
        status, out = run(tmp_path, bad, **SHORT)
        assert status == 1 and status_of(out)["status"] == "failed"
        assert "not finite" in capsys.readouterr().out
        assert os.path.exists(os.path.join(out, "ckpt.pt")) == (bad == "test")


def test_a_weight_that_no_loss_shows_counts_too():
    model = torch.nn.Linear(2, 2)
    assert all_finite(model, SINGLE_PROCESS)
    model.weight.data[1, 1] = math.nan
    assert not all_finite(model, SINGLE_PROCESS)


# ---- which weights were tested -------------------------------------------------------------------


def test_the_tested_weights_are_named(tmp_path, capsys):
    _, out = run(tmp_path)
    step = checkpoint.load_checkpoint(out, "best")["step"]
    assert status_of(out)["tested"] == {"weights": "best", "step": step}
    assert f"tested: the best weights, of step {step}\n" in capsys.readouterr().out


@pytest.mark.parametrize("spoil", [os.remove, lambda path: os.truncate(path, 100)])
def test_without_the_best_weights_the_last_are_tested(tmp_path, monkeypatch, capsys, spoil):
    tested = run_module.tested_weights

    def spoilt(folder, step):
        spoil(os.path.join(folder, "best.pt"))
        return tested(folder, step)

    monkeypatch.setattr(run_module, "tested_weights", spoilt)
    status, out = run(tmp_path)
    why = "best.pt is missing or damaged"
    assert status == 0 and status_of(out)["tested"] == {"weights": "last", "step": 60, "why": why}
    assert f"tested: the last weights, of step 60; {why}\n" in capsys.readouterr().out


# ---- killed before it began ----------------------------------------------------------------------


def killed(*args):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("where", ["before config.json", "in config.json"])
def test_killed_before_its_config_a_run_starts_again(on_ranks, tmp_path, monkeypatch, where):
    args, out = flags(tmp_path, "run", **SHORT), str(tmp_path / "run")
    if where == "before config.json":
        monkeypatch.setattr(run_module, "run_metadata", killed)
    else:
        monkeypatch.setattr(os, "replace", killed)
    assert on_ranks(1, lambda rank: train.main(args)) == [-signal.SIGKILL]
    monkeypatch.undo()
    assert len(os.listdir(out)) == (where == "in config.json")
    message = "no config.json: .*start it again .* --run_name run"
    with pytest.raises(ConfigError, match=message):
        train.main([f"--resume={out}"])
    with pytest.raises(ConfigError, match=message):
        train.load_run(out)
    assert train.main(args) == 0 and status_of(out)["status"] == "finished"
    assert not [name for name in os.listdir(out) if "tmp" in name]
    with pytest.raises(ConfigError, match="exists; continue it with --resume"):
        train.main(args)


def test_killed_before_its_config_torchrun_starts_it_again(on_ranks, tmp_path, monkeypatch):
    args = flags(tmp_path, "run", **SHORT)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "launch")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    monkeypatch.setattr(run_module, "run_metadata", killed)
    assert on_ranks(2, lambda rank: train.main(args)) == [-signal.SIGKILL, 1]
    monkeypatch.undo()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "launch")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert on_ranks(2, lambda rank: train.main(args)) == [0, 0]


def test_two_starts_of_one_name_make_one_run(tmp_path):
    p = train.parse(flags(tmp_path, "run", **SHORT))
    folder, held = create_run_dir(p, None)
    with pytest.raises(ConfigError, match="another process is writing this run"):
        create_run_dir(p, None)
    unlock(held)


def test_stopped_before_its_first_checkpoint_a_run_begins_with_the_weights_it_was_given(tmp_path):
    _, other = run(tmp_path, "other", **SHORT)
    _, whole = run(tmp_path, "whole", init_from=other, **SHORT, seed=3)
    out = str(tmp_path / "cut")
    shutil.copytree(whole, out)
    for name in os.listdir(out):
        if name != "config.json":
            os.remove(os.path.join(out, name))
    assert run(tmp_path, "cut", resume=True)[0] == 0
    assert_same(contents(out), contents(whole))


# ---- runs that have ended ------------------------------------------------------------------------


def times_of_files(out):
    """{name: time of the last change} of all that is in a directory."""
    return {name: os.stat(os.path.join(out, name)).st_mtime_ns for name in os.listdir(out)}


def test_a_run_that_has_ended_says_so_and_trains_no_more(tmp_path, monkeypatch, capsys):
    """It prints its result as before, and makes what is missing, here the curves."""
    status, out = run(tmp_path, target_accuracy=0.999, **SHORT)
    os.remove(os.path.join(out, "curves.png"))
    before = times_of_files(out)
    first = capsys.readouterr()
    monkeypatch.setattr(train, "train", None)
    assert run(tmp_path, resume=True)[0] == status == 1
    again = capsys.readouterr()
    assert f"{out} has ended; to train it longer" in again.out
    result = again.out.splitlines()[-1]
    assert result == first.out.splitlines()[-1] and "test accuracy" in result
    assert first.err == again.err and "below target" in again.err
    after = times_of_files(out)
    assert after.pop("curves.png") and after == before


def test_a_run_that_has_ended_may_get_another_target_or_more_steps(tmp_path):
    _, out = run(tmp_path, target_accuracy=0.999, **SHORT)
    assert run(tmp_path, resume=True, target_accuracy=0)[0] == 0
    assert status_of(out)["step"] == 4
    assert run(tmp_path, resume=True, max_steps=6)[0] == 0
    assert status_of(out)["step"] == 6


def test_a_run_that_stop_accuracy_ended_goes_on_with_another(tmp_path):
    _, out = run(tmp_path, stop_accuracy=1e-9, max_steps=40)
    assert status_of(out)["step"] == 20
    assert run(tmp_path, resume=True)[0] == 0 and status_of(out)["step"] == 20
    assert run(tmp_path, resume=True, stop_accuracy=0)[0] == 0 and status_of(out)["step"] == 40


def test_ranks_that_miss_the_target_leave_together(on_ranks, tmp_path, capfd):
    args = flags(tmp_path, "run", target_accuracy=1, **SHORT)
    assert on_ranks(2, lambda rank: train.main(args)) == [1, 1]
    printed = capfd.readouterr()
    assert printed.out.count("test accuracy") == printed.err.count("below target") == 1
    assert os.path.exists(tmp_path / "run" / "curves.png")


def test_torchrun_does_not_train_a_finished_run_again(on_ranks, tmp_path, monkeypatch, capfd):
    args = flags(tmp_path, None, target_accuracy=1, **SHORT)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "launch")
    for restart_count in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restart_count)
        # Another status would be a crash to torchrun, which would start the run a third time.
        assert on_ranks(2, lambda rank: train.main(args)) == [0, 0]
    (name,) = os.listdir(tmp_path)
    text, error = capfd.readouterr()
    assert text.count("test accuracy") == error.count("below target:") == 2
    assert "started again by torchrun" in text and "has ended" in text
    assert read_json(tmp_path / name / "status.json")["status"] == "below target"
    assert text.count("step 4: val accuracy") == 1
    assert "resumed" not in read_json(tmp_path / name / "config.json")
    assert os.path.exists(tmp_path / name / "curves.png")


def test_a_launch_of_the_same_name_with_other_arguments_is_another(tmp_path, monkeypatch):
    """`torchrun --rdzv_id=1` may name many launches alike."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "launch")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setattr(sys, "argv", ["train.py", "a.py"])
    train.main(flags(tmp_path, "run", **SHORT))
    assert find_restarted_run(str(tmp_path)) == str(tmp_path / "run")
    (tmp_path / "damaged").mkdir()
    for resumed in ([3], 3, None):
        damaged = {"launch": "launch", "argv": ["train.py", "a.py"], "resumed": resumed}
        write_json(tmp_path / "damaged" / "config.json", damaged)
        assert find_restarted_run(str(tmp_path)) == str(tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["train.py", "b.py"])
    assert find_restarted_run(str(tmp_path)) == ""


def test_torchrun_does_not_repeat_what_is_not_finite(on_ranks, tmp_path, monkeypatch, capfd):
    """But a run that crashed, it does."""
    args = flags(tmp_path, None, **{**SHORT, "lr": 1e38, "eval_interval": 0})
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "launch")
    for restart_count in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restart_count)
        assert on_ranks(2, lambda rank: train.main(args)) == [1, 1]
    # A run that is resumed is not trained again, either.
    (name,) = os.listdir(tmp_path)
    resume = [f"--resume={tmp_path / name}"]
    assert on_ranks(2, lambda rank: train.main(resume)) == [1, 1]
    printed = capfd.readouterr()
    assert printed.out.count("n_train_steps") == 1
    again = f"{tmp_path / name}: numbers were not finite, and would be so again; lower lr or raise"
    assert printed.err.count(again) == 2
    write_json(tmp_path / name / "status.json", {"status": "failed", "error": "OSError: no disk"})
    assert on_ranks(2, lambda rank: train.main(args)) == [1, 1]
    assert "started again by torchrun" in capfd.readouterr().out


def test_torchruns_report_shows_our_sentence(tmp_path):
    process = torchrun(2, *flags(tmp_path, "run", batch_size=3, **SHORT))
    _, error = process.communicate()
    sentence = "batch_size=3 does not divide into 2 ranks x 1 micro-batches; a multiple of 2 does"
    # Ours, then those of the two ranks in the report.
    assert process.returncode == 1 and error.count(sentence) == 3
    assert "To enable traceback" not in error
    # One that ends as failed, too.
    process = torchrun(1, *flags(tmp_path, "nan", **{**SHORT, "lr": 1e38, "eval_interval": 0}))
    _, error = process.communicate()
    assert "the run failed, since numbers were not finite; lower lr or raise" in error
    assert process.returncode == 1 and "To enable traceback" not in error


# ---- the queue of a cluster ----------------------------------------------------------------------


@pytest.fixture
def job(tmp_path):
    """job(what srun does) -> exit status of train.slurm, and what scontrol was asked for so far."""
    (tmp_path / "bin").mkdir()
    shutil.copy(os.path.join(os.path.dirname(train.__file__), "train.slurm"), tmp_path)
    (tmp_path / "runs" / "t-7").mkdir(parents=True)
    (tmp_path / "train.py").touch()
    starts = []

    def start(srun, scontrol="exit 0", python="exit 0", args=(), **more):
        starts.append(1)
        notes = f'[ "$1" = show ] || echo "$@" >> {tmp_path}/asked'
        bodies = {"srun": srun, "scontrol": f"{notes}; {scontrol}", "python": python}
        for name, body in bodies.items():
            (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
            (tmp_path / "bin" / name).chmod(0o755)
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        env = {"PATH": path, "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NAME": "t"}
        env |= {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(len(starts) - 1)}
        command = ["bash", "train.slurm", *args]
        code = subprocess.run(command, cwd=tmp_path, env=env | more).returncode
        asked = tmp_path / "asked"
        return code, asked.read_text().splitlines() if asked.exists() else []

    return start


PREEMPTED = """echo '{
 "status": "preempted",
 "step": 3
}' > runs/t-7/status.json; exit 1"""


def test_a_job_of_an_array_queues_itself_and_has_its_number_as_seed(job, tmp_path):
    """The first job has the array's own id, which would queue all of them."""
    shows_arguments = 'echo "$@" > arguments; ' + PREEMPTED
    of_array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    assert job(shows_arguments, **of_array) == (0, ["requeue 7_2"])
    assert "--seed 2" in (tmp_path / "arguments").read_text()


def test_only_a_start_that_was_preempted_queues_the_job_again(job):
    assert job(PREEMPTED) == (0, ["requeue 7"])
    assert job(PREEMPTED) == (0, ["requeue 7"] * 2)
    assert job("exit 2") == (2, ["requeue 7"] * 2)  # its data has changed
    assert job("exit 1") == (1, ["requeue 7"] * 2)


def test_a_start_that_is_stopped_before_it_has_a_status_queues_the_job_again(job, tmp_path):
    """SIGTERM goes to each process of the step, so also to the shell that waits for torchrun."""
    torchrun = 'case "$*" in *distributed.run*) {} ;; esac'
    stopped = dict(srun='exec "$@"', python=torchrun.format("kill -TERM $PPID; exit 1"))
    crashed = dict(srun='exec "$@"', python=torchrun.format("exit 1"))
    status = tmp_path / "runs" / "t-7" / "status.json"
    for before in ("", "preempted", "running"):
        if before:
            status.write_text(f'{{\n "status": "{before}"\n}}')
        assert job(**stopped)[0] == 0 and not status.exists()
        assert job(**crashed)[0] == 1
    assert (tmp_path / "asked").read_text() == "requeue 7\n" * 3
    write = f'echo \'{{ "status": "failed" }}\' > {status}; kill -TERM $PPID; exit 1'
    assert job(**{**stopped, "python": torchrun.format(write)})[0] == 1
    assert (tmp_path / "asked").read_text() == "requeue 7\n" * 3
    assert not list((tmp_path / "runs").glob(".*"))


CODES = [("exit 2", 2), ("exit 1", 1), ("kill -9 $$", 137), ("exit 0", 0)]


@pytest.mark.parametrize("ends, code", CODES)
def test_a_start_that_fails_before_it_trains_ends_the_job(job, ends, code):
    assert job(PREEMPTED)[1] == ["requeue 7"]
    assert job(ends) == (code, ["requeue 7"])


def test_a_queue_that_refuses_is_no_success(job, capfd):
    assert job(PREEMPTED, scontrol="exit 1") == (1, ["requeue 7"])
    assert "goes on with: python train.py --resume runs/t-7\n" in capfd.readouterr().err


def below_target(code):
    return PREEMPTED.replace("preempted", "below target").replace("exit 1", f"exit {code}")


def test_a_run_below_its_target_is_no_success_of_the_job(job):
    assert job(below_target(0)) == (1, [])
    assert job("exit 0") == (1, [])  # queued by hand: train.py reports it again
    assert job(below_target(7)) == (7, [])


def test_the_folder_of_the_runs_is_a_variable_of_the_script(job, tmp_path):
    folder = str(tmp_path / "else where")
    os.makedirs(f"{folder}/t-7")
    preempted = PREEMPTED.replace("runs/t-7", '"$LOG_DIR"/t-7')
    preempted = preempted.replace("exit", 'echo "$@" > got; exit')
    assert job(preempted, LOG_DIR=folder) == (0, ["requeue 7"])
    assert (tmp_path / "got").read_text().endswith(f" --run_name t-7 --log_dir {folder}\n")
    (tmp_path / "else where" / "t-7" / "config.json").write_text("{}")
    assert job(preempted, LOG_DIR=folder) == (0, ["requeue 7"] * 2)
    assert (tmp_path / "got").read_text().endswith(f" -- train.py --resume {folder}/t-7\n")


@pytest.mark.parametrize("flag", ["--log_dir", "--run-name=x", "--resume=runs/x"])
def test_what_the_script_sets_itself_is_refused(job, capfd, flag):
    assert job("exit 0", args=["--lr=1", flag, "x"]) == (2, [])
    name = flag.partition("=")[0]
    assert f"train.slurm: leave out {name}, which the script sets itself;" in capfd.readouterr().err


def test_a_mistake_in_the_settings_ends_the_job_before_torchrun(job, tmp_path, capfd):
    python = f'[ "$1" = -c ] && exit; shift; exec {sys.executable} {train.__file__} "$@"'
    assert job("touch started", python=python, args=["--lr=-1"]) == (2, [])
    assert capfd.readouterr().err.count("train.py: --lr: lr=-1.0 must be above 0") == 1
    assert not (tmp_path / "started").exists()
    assert job("touch started", python=python, args=["--n_train_examples=32"]) == (0, [])
    assert (tmp_path / "started").exists() and not os.listdir(tmp_path / "runs" / "t-7")


def test_the_environment_beside_the_code_is_activated_where_torch_is_missing(job, tmp_path):
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text("export FROM_VENV=3\n")
    assert job("exit ${FROM_VENV:-1}")[0] == 1
    # Also beside an environment of conda without torch.
    needs_venv = '[ "$1" = -c ] && [ -z "$FROM_VENV" ] && exit 1; exit 0'
    assert job("exit ${FROM_VENV:-1}", python=needs_venv, CONDA_PREFIX="base")[0] == 3


def test_all_cores_of_the_job_go_to_the_ranks(job):
    assert job("exit ${SRUN_CPUS_PER_TASK-7}", SLURM_CPUS_PER_TASK="5")[0] == 5
    assert job("exit ${SRUN_CPUS_PER_TASK-7}")[0] == 7


def test_a_job_from_another_folder_is_refused(job, tmp_path, capfd):
    (tmp_path / "train.py").unlink()
    assert job("touch started") == (1, [])
    assert "call sbatch from the folder of train.py" in capfd.readouterr().err
    assert not (tmp_path / "started").exists()


def test_a_job_without_its_environment_ends_at_once(job, tmp_path, capfd):
    assert job("touch started", python='echo "$@" >&2; exit 127') == (1, [])
    assert "import torch\ntrain.slurm: no Python with torch; " in capfd.readouterr().err
    assert not (tmp_path / "started").exists()


def test_a_result_of_an_earlier_start_stays(job, tmp_path):
    path = tmp_path / "runs" / "t-7" / "status.json"
    path.write_text('{\n "status": "finished"\n}')
    assert job("exit 1") == (1, []) and json.loads(path.read_text())["status"] == "finished"


# ---- what a checkpoint was trained with ----------------------------------------------------------


CHANGES = [("train", "lr", 0.5), ("train", "beta1", 0.5), ("data", "seed", 9)]
CHANGES += [("model", "pos_emb", "none")]


@pytest.mark.parametrize("part, key, value", CHANGES)
def test_a_config_that_was_changed_is_not_resumed(tmp_path, part, key, value):
    _, out = run(tmp_path, **SHORT)
    path = os.path.join(out, "config.json")
    saved = read_json(path)
    trained_with = saved[part][key]
    saved[part][key] = value
    if key == "seed":
        saved["train"]["seed"] = saved["data"]["seed"] = value  # one setting of both
    write_json(path, saved)
    trained = f"the checkpoint was trained with {key}={trained_with!r}; put that back"
    message = f"config.json says {key}={value!r}, but {trained}"
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, resume=True, max_steps=6)
    with pytest.raises(ConfigError, match=message):
        train.load_run(out)
    assert status_of(out)["step"] == 4


def test_a_checkpoint_that_does_not_say_is_resumed(tmp_path):
    _, out = run(tmp_path, **SHORT)
    for name in ("ckpt", "ckpt_prev", "best"):
        state = checkpoint.load_checkpoint(out, name)
        assert json.loads(state.pop("settings"))["train"]["lr"] == 0.01
        checkpoint.save_checkpoint(out, name, state, keep_old=False)
    train.load_run(out)
    assert run(tmp_path, resume=True, max_steps=6)[0] == 0


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_a_later_end_of_the_schedule_is_said_with_both_rates(tmp_path, capsys, schedule):
    _, out = run(tmp_path, **{**SHORT, "lr_schedule": schedule})
    capsys.readouterr()
    run(tmp_path, resume=True, max_steps=8)
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: the ")]
    rates = [r["lr"] for r in read_log(out) if r["kind"] == "train"]
    expected = f"the learning rate goes from {rates[3]:.3g} to {rates[4]:.3g}"
    ends = f"note: the {schedule} schedule now ends at step 8 instead of 4: {expected}"
    assert notes == ([] if schedule == "constant" else [ends])


# ---- machines that lack something ----------------------------------------------------------------


def test_a_run_on_a_machine_without_posix(tmp_path, script):
    lacks = f"""
import signal, sys
sys.modules["fcntl"] = sys.modules["resource"] = None
del signal.SIGHUP, signal.SIGUSR1
sys.path.insert(0, {os.path.dirname(train.__file__)!r})
import train, eval, flex_generate, torch
assert train.main({flags(tmp_path, "run", **SHORT)!r}) == 0
assert train.main(["--resume={tmp_path}/run", "--max_steps=6"]) == 0
eval.main(["{tmp_path}/run"])
flex_generate.peak_memory(torch.device("cpu"))
"""
    done = subprocess.run([sys.executable, "-c", lacks], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert status_of(tmp_path / "run")["step"] == 6


def test_a_device_without_float64_leaves_it_to_the_cpu():
    here = torch.arange(3)
    there = SimpleNamespace(device=SimpleNamespace(type="mps"), cpu=lambda: here)
    assert memory.in_float64(there).dtype == memory.in_float64(here).dtype == torch.float64


FULL = "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when", "can't allocate memory: 9"


@pytest.mark.parametrize("text", FULL)
def test_full_memory_of_a_device_is_recognised(text):
    with pytest.raises(RunError, match="memory is full; lower it"):
        with build.enough_memory(lambda: "lower it"):
            raise RuntimeError(text)


def test_full_memory_names_what_is_too_large(monkeypatch):
    p = train.parse(["--model=memory", "--mem_n_keys=64", "--dim=32"])
    model = build.build_model(p, build.build_model_config(p, p.data_module.Data(p.data)))
    cpu, count = torch.device("cpu"), build.count_parameters(model)["total"]
    advice = build.training_advice(model, cpu)
    assert advice.startswith("raise grad_accum_steps or lower batch_size")
    monkeypatch.setattr(build, "memory_size", lambda device: 20 * count)
    advice = build.training_advice(model, cpu)
    assert "the model is too large" in advice and "batch_size" not in advice
    assert "memory.values (4096, 32); make that smaller" in advice


def test_a_model_beyond_all_memory_names_what_is_too_large(tmp_path):
    args = ["--model=memory", "--mem_n_keys=4096", "--dim=1048576", "--dk=2", "--dv=2"]
    args += ["--n_layers=1", "--memory_layers=[0]", "--vocab_size=32"]
    args += ["--input_seq_len=16", "--num_kv_pairs=2"]
    with pytest.raises(ConfigError, match=r"not fit in memory: .*values \(16777216, 1048576\)"):
        train.main([*args, f"--log_dir={tmp_path}"])


def full_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_memory_that_training_does_not_get_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "to", full_memory)
    with pytest.raises(RunError, match="memory is full; raise grad_accum_steps"):
        run(tmp_path, **SHORT)


@pytest.mark.parametrize(
    "module, function", [(trained_run, "iter_predictions"), (trained_run, "open_run")]
)
def test_memory_that_an_evaluation_does_not_get_is_a_sentence(
    tmp_path, monkeypatch, module, function
):
    _, out = run(tmp_path, **SHORT)
    monkeypatch.setattr(module, function, full_memory)
    with pytest.raises(RunError, match="memory is full; lower eval_batch_size"):
        eval_script.main([out])


def test_memory_that_generation_does_not_get_is_a_sentence(monkeypatch):
    monkeypatch.setattr(flex_generate, "generate", full_memory)
    with pytest.raises(RunError, match="memory is full; lower batch_size"):
        flex_generate.main([])


# ---- settings that no machine can follow ---------------------------------------------------------


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--batch_size=1e30", "takes a number below 2"),
        ("--batch_size=1e9", "must be between 1 and"),
        ("--eval_batch_size=1e30", "takes a number below 2"),
        ("--n_val_examples=1e18", "must be between 1 and"),
        ("--n_test_examples=9223372036854775808", "takes a number below 2"),
        ("--device=meta", "device='meta' cannot be used on this machine"),
        ("--device=hpu", "device='hpu' cannot be used on this machine"),
        ("--device=privateuseone", "cannot be used on this machine"),
        ("--log_dir=a\0b", "takes text that may name a file"),
        ("--seed=1e30", "takes a number below 2"),
        ("--input_seq_len=1e18", "more than 1048576"),
    ],
)
def test_a_setting_out_of_reach_is_one_sentence(tmp_path, flag, message):
    name, _, value = flag.removeprefix("--").partition("=")
    with pytest.raises(ConfigError) as error:
        train.main(flags(tmp_path, "run", **{**SHORT, name: value}))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "changes",
    [
        dict(dim=1, dk=2, dv=2),
        dict(dim=1, dk=2, model="memory"),
        dict(dim=1, dk=2, model="gated_delta"),
        dict(eval_batch_size=2**62, log_interval=2**62, save_interval=2**62, warmup_steps=2**62),
        dict(seed=2**62),
        dict(lr=1e-300, clip_grad=1e-300),
    ],
)
def test_an_odd_setting_that_is_legal_trains(tmp_path, changes):
    assert run(tmp_path, **{**SHORT, **changes})[0] == 0
