"""A curriculum whose stages end when they are learned: by hand, in a run, resumed, on two ranks."""

import os

import pytest
import torch

import data_mqar
import train
from nanorecall import checkpoint
from nanorecall.curriculum import LARGEST, Curriculum
from nanorecall.records import read_log
from nanorecall.settings import ConfigError
from toys import assert_same, contents, flags, run

# That a run draws its curves is tested in test_progress.py.
pytestmark = pytest.mark.usefixtures("undrawn")

# Half of the toy's first stage is enough for a loss of 2.5 nats; chance is 2.8.
LEARNED = dict(curriculum="[(1,40),(2,40)]", stage_loss=2.5, max_steps=60, eval_interval=10)


def feed(curriculum, losses):
    """Give it the losses of steps 0, 1, ..., as the training loop does."""
    for step, loss in enumerate(losses):
        if curriculum.is_learning(step):
            curriculum.end_step(step, loss)
    return curriculum


def test_a_stage_ends_when_the_running_mean_is_low_enough():
    """Means 2.0, 0.7 * 2 + 0.3 * 1 = 1.7, then 0.7 * 1.7 + 0.3 * 0.1 = 1.22."""
    curriculum = feed(Curriculum([10, 10], max_loss=1.5), [2.0, 1.0, 0.1])
    assert curriculum.state["ends"] == [3]
    assert curriculum.state["mean_loss"] == pytest.approx(1.22)
    assert curriculum.stage(2) == (0, 2) and curriculum.stage(3) == (1, 0)


def test_the_mean_starts_anew_with_each_stage():
    curriculum = feed(Curriculum([10, 10], max_loss=1.5), [1.0, 9.0])
    assert curriculum.state == {"ends": [1], "mean_loss": 9.0}


def test_a_stage_takes_at_most_its_steps():
    curriculum = feed(Curriculum([2, 3], max_loss=0.1), [5.0] * 9)
    assert curriculum.state["ends"] == [2, 5]
    assert curriculum.stage(7) == (2, 2) and not curriculum.is_learning(5)


def test_a_loss_that_is_no_number_ends_no_stage():
    curriculum = feed(Curriculum([9], max_loss=1.0), [float("nan"), 0.5, 0.5])
    assert curriculum.state["ends"] == []
    assert curriculum.state["mean_loss"] == pytest.approx(0.49 * LARGEST + 0.51 * 0.5)


def test_without_a_loss_all_stages_take_their_steps():
    curriculum = feed(Curriculum([2, 3]), [0.0] * 9)
    stages = [curriculum.stage(step)[0] for step in range(7)]
    assert stages == [0, 0, 1, 1, 1, 2, 2]
    assert curriculum.state["ends"] == [] and curriculum.decay_start(6) == 0


def test_the_learning_rate_is_flat_until_the_task_begins():
    curriculum = feed(Curriculum([10], max_loss=1.0), [3.0, 3.0, 0.0, 0.0, 0.0, 0.0])
    assert curriculum.state["ends"] == [6]
    c = train.TrainConfig(lr=1.0, lr_schedule="linear", max_steps=10)
    rates = [train.learning_rate(c, t, 100, 10, curriculum.decay_start(t)) for t in range(10)]
    assert rates == [1.0] * 7 + [0.75, 0.5, 0.25]


def test_the_data_follows_the_stages():
    sizes = dict(input_seq_len=16, num_kv_pairs=4, vocab_size=32, infinite_data=True)
    config = data_mqar.Config(**sizes, curriculum=((1, 9), (2, 9)), stage_loss=1.0)
    data = data_mqar.Data(config)
    feed(data.curriculum, [5.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    lengths = []
    for step in range(8):
        tokens, _, _ = data.batch("train", step, data.batch_indices(step, 4))
        lengths.append(tokens.shape[1])
    # Means of the first stage: 5, 3.5, 2.45, 1.72, 1.2, 0.84; the second is learned at once.
    assert lengths == [4] * 6 + [8, 16]


def test_a_loss_without_a_curriculum_is_refused():
    with pytest.raises(ConfigError, match="stage_loss=1.0 has no effect: there is no curriculum"):
        train.parse(["--stage_loss=1"])


def test_a_second_data_set_is_refused(tmp_path):
    """Its steps are none of the curriculum's."""
    store = str(tmp_path / "set")
    sizes = ["--num_samples=20", "--seq_len=16", "--num_kv_pairs=4", "--vocab_size=200"]
    data_mqar.main(["--output_dir", store, *sizes])
    settings = dict(synthetic_dataset=store, synthetic_end_step=5, **LEARNED)
    with pytest.raises(ConfigError, match="stage_loss and synthetic_dataset do not work together"):
        run(tmp_path, **settings)
    run(tmp_path, **{**settings, "stage_loss": None, "max_steps": 3, "eval_interval": 3})


def test_a_checkpoint_with_odd_stages_is_refused(tmp_path):
    _, out = run(tmp_path, **LEARNED)
    state = checkpoint.load_checkpoint(out, "ckpt")
    state["curriculum"]["ends"] = ["soon"]
    checkpoint.save_checkpoint(out, "ckpt", state, keep_old=False)
    os.unlink(os.path.join(out, "ckpt_prev.pt"))
    with pytest.raises(ConfigError, match="'soon'"):
        run(tmp_path, resume=True, max_steps=70)


def test_a_later_end_is_said_with_the_rates_of_the_run(tmp_path, capsys):
    """The note's rates are those that the log holds."""
    _, out = run(tmp_path, **LEARNED, log_interval=1)
    capsys.readouterr()
    run(tmp_path, resume=True, max_steps=80, log_interval=1)
    note = next(x for x in capsys.readouterr().out.splitlines() if "the learning rate goes" in x)
    rates = {row["step"]: row["lr"] for row in read_log(out) if row["kind"] == "train"}
    assert note.endswith(f"goes from {rates[60]:.3g} to {rates[61]:.3g}")


def stage_ends(out):
    return checkpoint.load_checkpoint(out, "ckpt")["curriculum"]["ends"]


def test_a_run_that_is_stopped_within_a_stage_resumes_exactly(tmp_path):
    _, whole = run(tmp_path, "whole", **LEARNED)
    first, second = stage_ends(whole)
    assert 10 < first < 40 and first < second < 60
    _, cut = run(tmp_path, "cut", **{**LEARNED, "stop_accuracy": 1e-9})
    assert checkpoint.load_checkpoint(cut, "ckpt")["step"] == 10
    run(tmp_path, "cut", resume=True, stop_accuracy=0)
    assert_same(contents(cut), contents(whole))


def test_two_ranks_leave_a_stage_in_the_same_step_as_one(tmp_path, on_ranks):
    _, one = run(tmp_path, "one", grad_accum_steps=2, **LEARNED)
    args = flags(tmp_path, "two", **LEARNED)
    assert on_ranks(2, lambda rank: train.main(args)) == [0, 0]
    assert stage_ends(os.path.join(tmp_path, "two")) == stage_ends(one)


@pytest.mark.slow
def test_a_model_is_compiled_for_training_and_for_evaluation_not_for_each_size(
    tmp_path, monkeypatch
):
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()

    def compile(self, **options):
        self._compiled_call_impl = torch.compile(self._call_impl, backend=counter, **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    stages = "[(1,4),(2,4),(3,4)]"
    changes = dict(compile=True, curriculum=stages, max_steps=20, eval_interval=5)
    run(tmp_path, num_kv_pairs=4, input_seq_len=32, **changes)
    assert counter.frame_count <= 3  # there are four sizes in training, and two splits
