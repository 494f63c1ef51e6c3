"""What looks inside a model, or edits it, leaves no trace, also after an error.

Compared are weights, gradients, hooks, modes, counted reads and the states of random numbers, to
the bit.
"""

import copy
import random

import numpy as np
import pytest
import torch

import ablate
import eval as eval_script
import train
from analysis import (
    attention_maps,
    editing,
    editors,
    hooks,
    interchange,
    mlp_editing,
    patching,
    swap_matrix,
)
from analysis.ablation import measure_slots
from analysis.trained_run import Command, open_run, run_command
from memory import MemoryGPT, MemoryRouterGPT
from model import GPT, Config
from nanorecall import attention, metrics, pretrained
from nanorecall.settings import ConfigError, RunError
from toys import ablation_model, memory_model, random_tokens, some_examples


def hooks_of(module):
    return {name: list(x) for name, x in vars(module).items() if "hooks" in name}


def state(model):
    """Everything that must not change, in a form that == compares to the bit."""
    modules = list(model.modules())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    memories = model.memory_layers().values() if hasattr(model, "memory_layers") else ()
    return {
        "numbers": {name: t.detach().numpy().tobytes() for name, t in tensors.items()},
        "gradients": {n: (q.requires_grad, q.grad is None) for n, q in model.named_parameters()},
        "modes": [m.training for m in modules],
        "hooks": [hooks_of(m) for m in modules],
        "attributes": [sorted(vars(m)) for m in modules],
        "reads": [memory.count_reads().tolist() for memory in memories],
        "torch": torch.get_rng_state().tolist(),
        "numpy": repr(np.random.get_state()),
        "python": random.getstate(),
        "process": (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()),
    }


def assert_untouched(before, model, what):
    after = state(model)
    changed = [name for name in before if before[name] != after[name]]
    assert not changed, f"{what} changed {', '.join(changed)}"


class Broken(Exception):
    pass


class Bomb:
    """Counts the calls of a module; raises Broken at the one numbered `at`."""

    def __init__(self, module):
        self.calls, self.at = 0, 0
        module.register_forward_hook(self.call)

    def call(self, *_):
        self.calls += 1
        if self.calls == self.at:
            raise Broken


# ---- every command -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    small = "--n_layers=2 --dim=32 --dk=16 --dv=16 --conv_size=8 --init_std=1 --lr=1e-2"
    small += " --num_threads=1 --batch_size=64 --max_steps=80 --eval_interval=80"
    facts = "--data=data_synth --task=qa --num_pairs=40 --buckets=[4,16] --model=memory"
    facts += " --memory_layers=[0,1] --mem_n_keys=8 --mem_k_dim=16 --mem_knn=4 --mem_heads=2"
    facts += " --mem_value_lr_scale=4 --mem_share_values=0"
    mqar = "--vocab_size=32 --input_seq_len=16 --num_kv_pairs=2 --infinite_data=1"
    mqar += " --n_val_examples=40 --n_test_examples=40"
    words = {"memory": facts, "gpt": f"{mqar} --use_ffn=1", "delta": f"{mqar} --model=delta"}
    for name, own in words.items():
        place = [f"--run_name={name}", f"--log_dir={folder}"]
        train.main([*small.split(), *own.split(), *place])
    return folder


SCRIPTS = {
    "eval": (eval_script.COMMANDS, eval_script.EvalConfig, dict(n_examples=6, n_edits=(1,))),
    "ablate": (
        ablate.COMMANDS,
        ablate.AblateConfig,
        dict(n_examples=8, n_pairs=40, ablations="zero next_best"),
    ),
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("run", ["memory", "gpt", "delta"])
def test_commands_leave_no_trace(runs, run, script, undrawn, capsys):
    commands, kind, settings = SCRIPTS[script]
    opened = open_run(str(runs / run), kind(**settings))
    opened.prefix = script
    bomb, measured = Bomb(opened.model.lm_head), 0
    before = state(opened.model)
    for name, command in commands.items():
        if name == "all" or not command.needs_model:
            continue
        bomb.calls, bomb.at = 0, 0
        try:
            command.function(opened)
        except ConfigError:  # it does not fit this run
            assert_untouched(before, opened.model, f"{name}, refused,")
            continue
        measured += 1
        assert_untouched(before, opened.model, name)
        calls, bomb.calls, bomb.at = bomb.calls, 0, bomb.calls // 2 + 1
        if calls:
            with pytest.raises(Broken):
                command.function(opened)
            assert_untouched(before, opened.model, f"{name} with an error")
    assert measured >= (3 if run != "memory" else 8)


def test_opening_a_run_takes_no_random_numbers(runs):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    open_run(str(runs / "gpt"), eval_script.EvalConfig())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 TB")]
)
def test_full_memory_is_a_sentence_with_what_to_lower(runs, error):
    def analysis(run):
        raise error

    commands = {"x": Command(analysis, ("n_examples", "ablate_batch_size"), "")}
    settings = "eval_batch_size or n_examples or ablate_batch_size"
    sentence = f"memory is full; lower {settings}, or measure"
    path = [str(runs / "gpt")]
    with pytest.raises(RunError, match=sentence):
        run_command("x", path, eval_script.EvalConfig(), commands)
    error.args = ("another error",)
    if isinstance(error, RuntimeError):
        with pytest.raises(RuntimeError, match="another error"):
            run_command("x", path, eval_script.EvalConfig(), commands)


# ---- functions, on a model in training -----------------------------------------------------------


def labelled():
    x, y = random_tokens(5, 6, seed=3), torch.full((5, 6), -100)
    y[:, 3:] = random_tokens(5, 3, seed=4)
    return x, y


def edit_and_restore(model):
    before = copy.deepcopy(model.state_dict())
    editing.edit_facts(model, *labelled())
    model.load_state_dict(before)


def edit_mlp_and_restore(model):
    before = copy.deepcopy(model.state_dict())
    mlp_editing.edit_mlp(model, *labelled(), keep=[labelled()])
    model.load_state_dict(before)


def run_without_a_mixer(model):
    hook = hooks.hook_output("mixer", model.layers[1].att, torch.zeros_like)
    hooks.run_with_hooks(model, some_examples(), [hook])


def exchange_all(model):
    pairs = np.array([0, 1]), np.array([2, 3])
    interchange.interchange_effects(model, some_examples(), *pairs, "swap")


FUNCTIONS = {
    "edit": edit_and_restore,
    "edit of the MLP": edit_mlp_and_restore,
    "key_second_moment": lambda model: editing.key_second_moment(
        model, [labelled()], torch.arange(3)
    ),
    "answered": lambda model: editors.n_correct(model, *labelled()),
    "attention_maps": lambda model: attention_maps.attention_maps(model, random_tokens(2, 6)),
    "run_with_cache": lambda model: hooks.run_with_cache(model, some_examples()),
    "run_with_hooks": run_without_a_mixer,
    "measure_slots": lambda model: measure_slots(model, some_examples(), ["zero", "next_best"]),
    "interchange": exchange_all,
    "decode_with": lambda model: swap_matrix.decode_with(model, some_examples(), {}),
    "activation_patching": lambda model: patching.activation_patching(
        model, some_examples(), some_examples(seed=2)
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_leave_no_trace_on_a_model_in_training(name):
    """One block is in eval mode among others in training: one flag for all is not enough."""
    cls = MemoryRouterGPT if "MLP" in name else MemoryGPT
    model = ablation_model(cls, mem_share_values=False).train()
    model.layers[1].eval()
    bomb = Bomb(model.lm_head)
    before = state(model)
    FUNCTIONS[name](model)
    assert_untouched(before, model, name)
    for at in {1, bomb.calls}:
        bomb.calls, bomb.at = 0, at
        with pytest.raises(Broken):
            FUNCTIONS[name](model)
        assert_untouched(before, model, f"{name} with an error at call {at}")


@pytest.mark.parametrize("at", [0, 1, 5])
def test_fine_tuning_changes_weights_only(at):
    model = ablation_model(mem_share_values=False).train()
    model.layers[1].eval()
    bomb, facts = Bomb(model.lm_head), (*labelled(), *labelled())
    before = state(model)
    bomb.at = at
    try:
        editors.EDITORS["fine-tune all weights, replaying others"](model, *facts)
    except Broken:
        assert at
    after = state(model)
    assert [k for k in before if before[k] != after[k]] == ([] if at == 1 else ["numbers"])


def test_an_evaluation_that_fails_leaves_the_modes(runs):
    run = open_run(str(runs / "gpt"), eval_script.EvalConfig())
    model = run.model
    model.train()
    model.layers[0].eval()
    bomb = Bomb(model.lm_head)
    before = state(model)
    metrics.evaluate(model, run.data, "val", 16, run.device)
    assert_untouched(before, model, "evaluate")
    bomb.at, bomb.calls = 2, 0
    with pytest.raises(Broken):
        metrics.evaluate(model, run.data, "val", 16, run.device)
    assert_untouched(before, model, "evaluate with an error")


def test_maps_keep_a_function_that_was_there():
    """One that looks inside while another does."""
    config = Config(dim=8, n_layers=2, n_heads=1, dk=4, dv=4, vocab_size=11, seq_len=6)
    model, seen = GPT(config), []
    mixer = model.layers[0].att

    def watched(*args):
        seen.append(1)
        return attention.softmax_attention(*args)

    mixer.attention_fn = watched
    attention_maps.attention_maps(model, random_tokens(1, 4))
    assert mixer.attention_fn is watched and len(seen) == 2  # once more for its weights
    assert "attention_fn" not in model.layers[1].att.__dict__


def test_a_refused_freeze_freezes_nothing():
    model = memory_model()
    for patterns in ("*", ["layers.0", "nothing"]):
        with pytest.raises(ConfigError):
            pretrained.freeze(model, patterns)
        assert all(q.requires_grad for q in model.parameters())
