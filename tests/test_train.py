"""train.py as a user meets it: runs, stops, resumes, mistakes; and its loop in arithmetic."""

import json
import math
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

import train
from nanorecall import checkpoint, metrics
from nanorecall import run as run_module
from nanorecall.build import build_model_config
from nanorecall.records import read_json, read_log
from nanorecall.run_dir import run_label
from nanorecall.settings import ConfigError, RunError
from toys import contents, counts, flags, run, status_of

# That a run draws its curves is tested in test_progress.py.
pytestmark = pytest.mark.usefixtures("undrawn")

ROOT = os.path.dirname(train.__file__)


# ---- whole runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["gpt", "delta", "gated_delta"])
def test_a_toy_run_learns_and_leaves_a_complete_directory(tmp_path, capsys, model):
    status, out = run(tmp_path, model=model, target_accuracy=0.9, max_steps=200)
    assert status == 0
    printed = capsys.readouterr().out
    for words in ("params: ", "state: ", "### LOGDIR: ", ">>> n_train_steps = 1250"):
        assert words in printed
    checkpoints = {"ckpt.pt", "ckpt_prev.pt", "best.pt"}
    made = {"config.json", "log.jsonl", "status.json", "curves.png"}
    assert set(os.listdir(out)) == checkpoints | made
    result = status_of(out)
    assert result["status"] == "finished" and result["test"]["accuracy"] > 0.9
    assert result["test"]["labels"] == 200
    assert result["test"]["by_slice"]["num_kv_pairs"]["4"]["labels"] == 200
    config = read_json(os.path.join(out, "config.json"))
    assert config["set_by"]["lr"] == "--lr" and config["train"]["lr"] == 0.01
    assert config["model"]["vocab_size"] == 32
    losses = [row["loss"] for row in read_log(out) if row["kind"] == "train"]
    assert len(losses) == 40 and losses[-1] < 0.5 < losses[0]


def test_log_lines_are_json(tmp_path):
    _, out = run(tmp_path, max_steps=5)
    with open(os.path.join(out, "log.jsonl")) as f:
        rows = [json.loads(line) for line in f]
    assert {row["kind"] for row in rows} == {"train", "eval"}


def test_the_best_weights_are_the_same_after_a_resume(tmp_path, monkeypatch):
    """The watched slice is at 1 in every evaluation. Then all labels decide, also of before."""
    evaluate, accuracies = run_module.evaluate, iter([0.9, 0.8, 0.7, 0.6])

    def measured(model, data, split, *rest):
        result = evaluate(model, data, split, *rest)
        if split == "val":
            result["accuracy"] = next(accuracies)
            watched = result["by_slice"]["num_kv_pairs"][4]
            watched["correct"] = watched["labels"]
        return result

    monkeypatch.setattr(run_module, "evaluate", measured)
    _, out = run(tmp_path, target_slice="num_kv_pairs=4", max_steps=40)
    assert checkpoint.load_checkpoint(out, "best")["step"] == 20
    run(tmp_path, resume=True, max_steps=60)
    assert checkpoint.load_checkpoint(out, "best")["step"] == 20


@pytest.mark.parametrize("name", ["gpt", "model.GPT"])
def test_our_names_mean_our_files(tmp_path, monkeypatch, capsys, name):
    """A user's file of the same name is not run, and the user is told."""
    for ours in ("data_mqar", "model"):
        (tmp_path / f"{ours}.py").write_text("raise SystemExit('was run')")
    monkeypatch.chdir(tmp_path)
    p = train.parse([f"--model={name}"])
    assert p.model_class.__name__ == "GPT" and p.data_module.__file__.startswith(ROOT)
    told = f"{tmp_path}/data_mqar.py is not used: give it another name"
    assert told in capsys.readouterr().err
    assert p.files == {}


def test_full_memory_is_a_sentence(tmp_path, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "forward_backward", full)
    with pytest.raises(RunError, match="memory is full; raise grad_accum_steps or lower batch_siz"):
        run(tmp_path)
    assert status_of(tmp_path / "run")["status"] == "failed"


def test_steps_of_an_evaluation_are_counted_size_by_size(tmp_path, capsys):
    sizes = "[(16,1),(16,2),(16,4)]"
    run(tmp_path, test_sizes=sizes, n_val_examples=10, eval_batch_size=8, max_steps=1)
    assert "n_val_steps = 6" in capsys.readouterr().out


def test_below_its_target_a_run_fails(tmp_path, capsys):
    status, out = run(tmp_path, target_accuracy=0.999, max_steps=2)
    printed = capsys.readouterr().err
    assert status == 1 and "< 0.999; a new run with --max_steps 4 may reach it" in printed
    assert status_of(out)["status"] == "below target"


def test_more_steps_are_not_advised_to_a_run_that_stopped_early(tmp_path, capsys):
    stops = {"stop_accuracy": 1e-9, "eval_interval": 1, "max_steps": 5}
    status, out = run(tmp_path, target_accuracy=1, **stops)
    assert status == 1 and capsys.readouterr().err.endswith("< 1.0\n")


def test_stop_accuracy_ends_a_run_early(tmp_path):
    _, out = run(tmp_path, stop_accuracy=0.01)
    assert status_of(out)["step"] == 20


@pytest.mark.parametrize(
    "args, count",
    [
        ("--model gpt --dk 32 --dv 32 --exp_group 29", 65792),
        ("--model gpt --dk 48 --dv 48 --use_ffn=0 --n_epochs=400", 98560),
        ("--model unified_kv --du 64 --use_ffn=0 --n_epochs=400", 98560),
    ],
)
def test_the_commands_of_updatable_long_term_memory_print_their_counts(capsys, args, count):
    sizes = "--batch_size 32 --dim 64 --n_heads 2 --n_layers 4".split()
    assert train.main([*args.split(), *sizes, "--n_epochs=0"]) == 0
    assert f"params: {count} " in capsys.readouterr().out



def test_epochs_beside_a_number_of_steps_have_no_effect(tmp_path):
    """A flag; a config may have both, whose steps a flag may shorten."""
    (tmp_path / "c.py").write_text("n_epochs = 5\nmax_steps = 7\n")
    config = str(tmp_path / "c.py")
    message = r"n_epochs=9 has no effect: max_steps=7 \(.*c.py:2\) ends the training"
    with pytest.raises(ConfigError, match=message):
        train.parse([config, "--n_epochs=9"])
    with pytest.raises(ConfigError, match="n_epochs=9 has no effect: max_steps=3 ends the tr"):
        train.parse(["--n_epochs=9", "--max_steps=3"])
    for argv in ([config, "--max_steps=3"], ["--n_epochs=9"], [config, "--n_epochs=0"]):
        train.parse(argv)
    train.parse([config, "--n_epochs=9", "--max_steps=0"])


def test_a_folder_of_notes_is_no_run_that_was_stopped(tmp_path):
    """Only the temporary file of a config.json may be deleted."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json.bak").write_text("mine")
    with pytest.raises(ConfigError, match="run exists; continue it with --resume"):
        run(tmp_path, max_steps=1)
    assert (tmp_path / "run" / "config.json.bak").read_text() == "mine"


@pytest.mark.parametrize(
    "flags, model",
    [
        ("--dk 48 --dv 48", "gpt_L4-D64_FF0_OG0_H2_q-48-none-none-0_k-48-none-none-0_v-48-none"),
        (
            "--model unified_kv --du 32 --k_gated 1",
            "unified_kv_L4-D64_FF0_OG0_H2_q-32-none-none-0_k-32-none-none-1_v-32-none",
        ),
        (
            "--model memory --dk 16 --dv 8 --memory_layers [0,2]",
            "memory_L4-D64_FF1_OG0_H2_q-16-none-none-0_k-16-none-none-0_v-8-none"
            "_M0-2_S1024_H4_K8",
        ),
    ],
)
def test_run_names_follow_the_documents_grammar(flags, model):
    p = train.parse(["--exp_group=6", *flags.split()])
    config = build_model_config(p, p.data_module.Data(p.data))
    assert run_label(p, config) == f"exp6_{model}_data-128-32-2048_lr0.001"


# ---- resuming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("end, steps", [(15, [10, 15, 20, 25]), (10, [10, 20, 25])])
def test_a_resumed_run_keeps_each_evaluation_once(tmp_path, end, steps):
    """The one at an end of the run that was no multiple of eval_interval is not made again."""
    _, out = run(tmp_path, max_steps=end, eval_interval=10)
    run(tmp_path, resume=True, max_steps=25)
    rows = read_log(out)
    assert [row["step"] for row in rows if row["kind"] == "eval"] == steps


def test_resume_keeps_the_settings_and_changes_only_what_may_change(tmp_path):
    _, out = run(tmp_path)
    assert run(tmp_path, resume=True, max_steps=70)[0] == 0
    assert status_of(out)["step"] == 70
    config = read_json(os.path.join(out, "config.json"))
    assert config["train"]["max_steps"] == 70
    with pytest.raises(ConfigError, match="--lr: lr cannot change"):
        run(tmp_path, resume=True, lr=1)
    with pytest.raises(ConfigError, match="--max_step: .* did you mean max_steps"):
        run(tmp_path, resume=True, max_step=1)
    with pytest.raises(ConfigError, match="exists; continue it with --resume"):
        run(tmp_path)


def test_resume_needs_a_run_directory(tmp_path):
    with pytest.raises(ConfigError, match="--resume: resume needs a run directory"):
        train.main(["--resume="])
    with pytest.raises(ConfigError, match="has no config.json"):
        train.main([f"--resume={tmp_path}"])


# ---- the loop against arithmetic -----------------------------------------------------------------


def test_accumulation_is_one_large_batch(tmp_path):
    weights = []
    for n in (1, 4):
        _, out = run(tmp_path, f"a{n}", grad_accum_steps=n, max_steps=3, eval_interval=3)
        weights.append(contents(out)[0]["tensors"])
    one, four = weights
    for name in one:
        torch.testing.assert_close(one[name], four[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "bad_steps, ends, exit_status", [((2, 3, 5), "finished", 0), ((2, 3, 5, 6, 7), "failed", 1)]
)
def test_gradients_that_are_not_finite_are_skipped_and_too_many_end_the_run(
    tmp_path, capsys, monkeypatch, bad_steps, ends, exit_status
):
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def sometimes_nan(parameters, limit):
        parameters = list(parameters)
        calls.append(1)
        if len(calls) in bad_steps:
            parameters[0].grad.fill_(math.nan)
        return clip(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", sometimes_nan)
    status, out = run(tmp_path, max_skipped_steps=3, max_steps=10, eval_interval=1)
    assert status_of(out)["status"] == ends and status == exit_status
    printed = capsys.readouterr().out
    assert ("not finite 3 steps in a row" in printed) == (ends == "failed")
    skipped = [row["step"] for row in read_log(out) if row.get("skipped")]
    assert skipped == list(bad_steps)
    assert all(torch.isfinite(w).all() for w in contents(out)[0]["tensors"].values())


@pytest.mark.parametrize(
    "total, changes, expected",
    [
        (100, dict(lr_schedule="constant", warmup_steps=10), [0.2, 1.2, 2.0, 2.0]),
        (100, dict(lr_gamma=0.5), [2.0, 2.0, 1.0, 0.5]),
        (20, dict(lr_schedule="linear", lr_min_ratio=0.5), [2.0, 1.75, 1.5, 1.0]),
        (20, dict(lr_schedule="cosine"), [2.0, 1 + 0.5**0.5, 1.0, 0.0]),
    ],
)
def test_learning_rates(total, changes, expected):
    """At steps 0, 5, 10 and 25 of so many in all, 10 of them an epoch."""
    c = train.TrainConfig(lr=2.0, **changes)
    rates = [train.learning_rate(c, step, 10, total) for step in (0, 5, 10, 25)]
    assert rates == pytest.approx(expected, abs=1e-12)


def test_matrices_decay_and_vectors_do_not():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    optimizer = train.configure_optimizer(model, train.TrainConfig(weight_decay=0.1))
    decay, no_decay = optimizer.param_groups
    assert [p.ndim for p in decay["params"]] == [2] and decay["weight_decay"] == 0.1
    assert [p.ndim for p in no_decay["params"]] == [1, 1, 1] and no_decay["weight_decay"] == 0


def test_evaluation_does_not_depend_on_its_batch_size(tmp_path):
    _, out = run(tmp_path)
    _, data, model, _ = train.load_run(out)
    small = metrics.evaluate(model, data, "test", 7, torch.device("cpu"))
    large = metrics.evaluate(model, data, "test", 50, torch.device("cpu"))
    assert counts(small) == counts(large) and small["exact_match"] == large["exact_match"]
    assert small["loss"] == pytest.approx(large["loss"], rel=1e-5)


# ---- mistakes and forks --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args, message",
    [
        (["--n_heds=2"], "did you mean n_heads"),
        (["--model=gtp"], "neither one of gpt"),
        (["--model=model.py"], "without .py"),
        (["--model=model.Config"], "no torch.nn.Module"),
        (["--dim=1000000", "--vocab_size=10000000"], "does not fit in memory"),
        (["--num_threads=1e12"], "between 0 and 1024"),
        (["--model=unified_kv", "--dk=32"], "dk=32 has no effect: only gpt has it"),
        (["--du=32"], "no effect"),
        (["--lr_temp=2"], "only delta models have it"),
        (["--ffn_act=relu"], "use_ffn is 0"),
        (["--data=nothing"], "there is no nothing.py"),
        (["--input_seq_len=127"], "is odd"),
        (["--vocab_size=40"], "too small"),
        (["--input_seq_len=64"], "at least 128 tokens"),
        (["--path=/nowhere/set"], "holds no data set"),
        (["--lr=0"], "above 0"),
        (["--lr_min_ratio=0.1"], "schedule is exponential"),
        (["--device=cuda:77"], "cannot be used on this machine"),
        (["--run_name=../x"], "letters, digits"),
        (["configs/none.py"], "cannot read this override file"),
        (["config/mqar_gtp.py"], "or directory: 'config/mqar_gtp.py'); did you mean configs/mqar"),
        (["mqar_gpt"], "neither an override file"),
        (["--dk=5"], "must be even"),
    ],
)
def test_a_mistake_is_one_sentence(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError) as error:
        train.main([*args, f"--log_dir={tmp_path}"])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert os.listdir(tmp_path) == []


def test_a_run_that_is_not_there_is_one_sentence():
    with pytest.raises(ConfigError) as error:
        train.main(["--resume=nowhere"])
    assert "no config.json" in str(error.value) and "\n" not in str(error.value)


def test_a_run_of_runs_is_proposed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("runs", "mine", max_steps=2)
    message = "mine is not a run directory: it has no config.json; did you mean runs/mine?"
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        train.main(["--resume=mine"])


def test_a_mistake_exits_with_status_2_and_no_traceback(script):
    done = script("train.py", "--n_heds", "2")
    assert done.returncode == 2 and done.stdout == ""
    sentence = "--n_heds: there is no setting 'n_heds'; did you mean n_heads?"
    assert done.stderr == f"train.py: {sentence}\n"


def test_help_shows_the_settings_of_all_parts(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        train.main(["--help", "--model=memory"])
    shown = capsys.readouterr().out
    for setting in ("--lr_gamma", "--n_layers", "--mem_knn", "--num_kv_pairs"):
        assert f"  {setting}=" in shown


def test_a_fork_is_one_file(tmp_path, monkeypatch):
    with open(os.path.join(ROOT, "model.py")) as f:
        source = f.read()
    for ours, mine in (
        ("class GPT(nn.Module)", "class Mine(nn.Module)"),
        ("(GPT)", "(Mine)"),
        ("GPT.inactive_settings", "Mine.inactive_settings"),
        ("Model = GPT", "Model = Mine"),
    ):
        source = source.replace(ours, mine)
    (tmp_path / "my_model.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    status, out = run(tmp_path, model="my_model", max_steps=2)
    assert status == 0
    config = read_json(os.path.join(out, "config.json"))
    assert config["train"]["model"] == "my_model"
    assert train.parse(["--model=my_model.Mine"]).model_class.__name__ == "Mine"
    with pytest.raises(ConfigError, match="no Theirs"):
        train.parse(["--model=my_model.Theirs"])


def test_shipped_configs_state_what_they_are_for():
    folder = os.path.join(ROOT, "configs")
    names = [name for name in sorted(os.listdir(folder)) if name.endswith(".py")]
    assert "mqar_gpt.py" in names
    for name in names:
        path = os.path.join(folder, name)
        target = train.parse([path]).train.target_accuracy
        assert target > 0, name
        with open(path) as f:
            header = f.read().split('"""')[1]
        assert re.search(r"\b(minutes?|seconds?|hours?)\b", header), f"{name}: how long?"
        assert "CPU cores" in header, f"{name}: on what?"
        expected = re.findall(r"0\.\d+", header.partition("Expected: ")[2])
        assert expected and max(map(float, expected)) >= target, f"{name}: what to expect?"


# ---- start-up, and from Python -------------------------------------------------------------------

SLOW_IMPORTS = {
    *("torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp"),
    *("torch.distributed.tensor", "matplotlib", "pyarrow", "sympy", "tensorboard", "wandb"),
}


@pytest.mark.parametrize("name, flags", [("train", ["--model=delta"]), ("eval", [])])
def test_help_does_not_import_what_it_does_not_use(name, flags):
    code = f"""
import sys
import {name} as script
try:
    script.main(["--help", *{flags}])
except SystemExit:
    pass
print(*sys.modules, file=sys.stderr)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert "--eval_batch_size" in done.stdout and "torch" in done.stderr.split()
    assert not SLOW_IMPORTS.intersection(done.stderr.split())


def test_a_run_from_python(tmp_path):
    trained = train.train_run(flags(tmp_path, "run", target_slice="num_kv_pairs=4"))
    assert [row["step"] for row in trained.log("eval")] == [20, 40, 60]
    assert {row["kind"] for row in trained.log()} == {"train", "eval"}
    rows = trained.metrics()
    assert [(row["slice"], row["value"]) for row in rows[:2]] == [
        ("all", ""),
        ("num_kv_pairs", "4"),
    ]
    assert rows[0]["accuracy"] == rows[1]["accuracy"] == trained.result["test"]["accuracy"]
    tokens, _, _ = trained.data.batch("test", 0, range(3))
    logits, _ = trained.model(tokens)
    assert not trained.model.training and logits.shape == (3, 16, 32)
    again = train.train_run([f"--resume={trained.folder}"])
    assert again.has_ended and torch.equal(again.model(tokens)[0], logits)
    assert again.metrics() == rows
    _, _, model, _ = train.load_run(trained.folder)
    assert torch.equal(model(tokens)[0], logits)


def test_a_run_from_python_leaves_the_signal_handlers_alone(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train.train_run(flags(tmp_path, "run", max_steps=2))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
