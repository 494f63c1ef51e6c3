"""ablate.py: what its ablations change, a model whose facts sit in known slots, every command."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ablate
import train
from analysis import ablation, hooks, slot_results, swap_positions
from analysis.trained_run import open_run, select
from nanorecall.distributed import SINGLE_PROCESS
from nanorecall.settings import ConfigError
from nanorecall.stats import proportion
from planted import N_SLOTS, VARIANTS, planted_facts
from toys import ablation_model, as_flags, load_result, some_examples


@pytest.fixture(params=VARIANTS)
def model(request):
    return ablation_model(**VARIANTS[request.param])


SMALL = dict(
    n_layers=2, dim=32, dk=16, dv=16, conv_size=8, init_std=1, lr=1e-2, batch_size=64,
    max_steps=80, eval_interval=80, num_threads=1,
)  # fmt: skip
FACTS = dict(
    data="data_synth", task="qa", num_pairs=40, buckets="[4,16]", model="memory", mem_n_keys=8,
    mem_k_dim=16, mem_knn=4, mem_heads=2, mem_value_lr_scale=4,
)  # fmt: skip
MQAR = dict(
    vocab_size=32, input_seq_len=16, num_kv_pairs=2, n_val_examples=40, n_test_examples=40,
    infinite_data=1,
)  # fmt: skip
NEW = dict(max_steps=1, eval_interval=1)
RUNS = {
    "two": {**FACTS, "memory_layers": "[0,1]"},
    "one": {**FACTS, "memory_layers": "[1]"},
    "new_gpt": {**MQAR, **NEW},
    "new_delta": {**MQAR, **NEW, "model": "delta"},
}
MQAR_RUNS = {
    "gpt": {**MQAR, "use_ffn": 1},
    "delta": {**MQAR, "model": "delta"},
}


def train_all(folder, runs):
    for name, settings in runs.items():
        train.main(as_flags({**SMALL, **settings, "run_name": name, "log_dir": folder}))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs that store facts, in two memory layers and in one, and new ones without such layers."""
    return train_all(tmp_path_factory.mktemp("runs"), RUNS)


@pytest.fixture(scope="module")
def all_runs(runs):
    """The same, and runs that answer some examples of MQAR correctly."""
    return train_all(runs, MQAR_RUNS)


# ---- slots ---------------------------------------------------------------------------------------


def test_slots_read_and_controls_by_hand():
    """Example 0 reads slot 2 twice (0.5, 0.25), slot 1 once; example 1 slot 2 once, 0 twice."""
    reads = {
        "slots": torch.tensor([[[[2, 1, 2]]], [[[2, 0, 0]]]]),
        "weights": torch.tensor([[[[0.5, 0.25, 0.25]]], [[[1.0, 0.0, 0.0]]]]),
    }
    pairs = ablation.slots_read(reads, n_slots=4)
    assert pairs["index"].tolist() == [0, 0, 1, 1]
    assert pairs["slot"].tolist() == [1, 2, 0, 2]
    assert pairs["reads"].tolist() == [1, 2, 2, 1]
    assert pairs["weight"].tolist() == [0.25, 0.75, 0, 1]
    pairs = ablation.add_controls(pairs, 4, np.random.default_rng(0))
    assert pairs["index"].tolist() == [0, 0, 1, 1, 0, 1]
    assert pairs["slot"][4] in (0, 3) and pairs["slot"][5] in (1, 3)
    assert pairs["reads"][4:].tolist() == pairs["weight"][4:].tolist() == [0, 0]


def test_an_example_that_reads_all_slots_has_no_control():
    pairs = {
        "index": np.array([0, 0]),
        "slot": np.array([0, 1]),
        "reads": np.array([1, 1]),
        "weight": np.array([0.5, 0.5]),
    }
    pairs = ablation.add_controls(pairs, 2, np.random.default_rng(0))
    assert pairs["index"].tolist() == [0, 0] and pairs["slot"].tolist() == [0, 1]
    assert pairs["index"].dtype.kind == "i"


@pytest.mark.parametrize("name", ablation.ABLATIONS)
def test_ablation_finds_the_slot_that_holds_the_fact(name):
    model, examples = planted_facts()
    logits = hooks.run_with_cache(model, examples).logits
    assert (logits.argmax(-1) == examples.answers).all()
    columns = ablation.measure_slots(model, examples, [name])
    holds_fact = columns["slot"] == columns["example"]  # slot s answers token s, in example s
    is_lost = columns["flip"] | (columns["drop"] > 1)
    assert holds_fact.sum() == 9 and not is_lost[~holds_fact].any()
    # A random slot's value may be the slot's own, and a random key nearer than the next best.
    expected = {"random": 0.8, "resample": 0.8, "key_noise": 0.6}.get(name, 0.99)
    assert is_lost[holds_fact].mean() > expected


def test_a_slot_counts_where_it_is_read():
    """Two labels: slot u is read at the first token u, and slot v at the second, v.

    Ablation costs as much there as in an example with one label; over both labels it would be half.
    """
    model, examples = planted_facts()
    one_label = ablation.measure_slots(model, examples, ["zero"])
    examples.tokens[:, 0] = (examples.tokens[:, 1] + 1) % 9
    examples.answers = (examples.tokens + 4) % 9
    examples.label_pos = torch.tensor([[0, 1]]).expand(9, 2)
    columns = ablation.measure_slots(model, examples, ["zero"])
    drops = []
    for table in (one_label, columns):
        counted, _ = slot_results.first_ablation(table)
        slots = slot_results.slot_table(select(counted, counted["drop"] > 1))
        assert slots["slot"].tolist() == list(range(9)) and (slots["flips"] == 1).all()
        drops.append(slots["mean"])
    np.testing.assert_allclose(*drops, rtol=1e-5)
    slots = np.where(columns["answer_pos"] == 0, columns["example"] + 1, columns["example"]) % 9
    of_fact = columns["slot"] == slots
    assert (columns["reads_at_label"][of_fact] == 1).all() and of_fact.sum() == 18


@pytest.mark.parametrize("name", sorted(set(ablation.ABLATIONS) - set(ablation.KEY_ABLATIONS)))
def test_where_no_read_is_in_reach_nothing_changes(model, name):
    """The last of three blocks reads at labels, the first one at all tokens."""
    examples = some_examples()
    columns = ablation.measure_slots(model, examples, [name])
    clean = hooks.run_with_cache(model, examples)
    for i in range(0, len(columns["drop"]), 5):
        example, layer = columns["example"][i], columns["layer"][i]
        label = examples.label_pos[example, columns["answer_pos"][i]]
        is_slot = (clean.reads[layer]["slots"][example] == columns["slot"][i]).sum((-1, -2))  # (T,)
        assert columns["reads_at_label"][i] == is_slot[label]
        in_reach = is_slot[label] if layer == 2 else is_slot[: label + 1].sum()
        assert columns["reads_in_reach"][i] == in_reach
    out_of_reach = columns["reads_in_reach"] == 0
    assert out_of_reach.any() and np.abs(columns["drop"][out_of_reach]).max() < 1e-5
    assert (columns["drop"][~out_of_reach] != 0).mean() > 0.9


def test_noise_has_the_length_of_the_keys():
    layer = ablation_model().memory_layers()[0]
    noise, other = (ablation.noise_keys(layer, seed) for seed in (1, 2))
    torch.testing.assert_close(noise.norm(dim=-1), layer.keys.norm(dim=-1))
    assert torch.equal(noise, ablation.noise_keys(layer, 1)) and not torch.equal(noise, other)


def slot_columns(n, **changes):
    """n columns of measure_slots: zero ablation in layer 0 of a slot that example i reads.

    The drops are 0 to n - 1, and no answer flips.
    """
    plain = {
        "ablation": np.full(n, "zero"),
        "layer": np.zeros(n, int),
        "control": np.zeros(n, bool),
        "drop": np.arange(float(n)),
        "flip": np.zeros(n, bool),
        "example": np.arange(n),
        "reads_in_reach": np.ones(n, int),
    }
    return plain | {name: np.array(values) for name, values in changes.items()}


@pytest.mark.parametrize("n, strongest", [(200, (198 + 199) / 2), (99, 98)])
def test_the_strongest_percent_is_one_at_least(n, strongest):
    effects = ablate.summarize_slots(slot_columns(n))
    assert list(effects) == [("zero", "0")]
    cell = effects["zero", "0"]
    assert cell["strongest"] == strongest
    assert cell["drop"]["value"] == (n - 1) / 2 and cell["n"] == n


def test_layers_are_listed_by_number_and_controls_last():
    changes = dict(layer=[10, 2, 2], control=[False, False, True], reads_in_reach=[1, 1, 0])
    names = [layer for _, layer in ablate.summarize_slots(slot_columns(3, **changes))]
    assert names == ["2", "10", "control"]


def test_the_most_and_the_least_harmful_ablation_are_named_without_controls():
    lost = {("zero", "0"): 0.5, ("mean", "2"): 0.25, ("zero", "control"): 0.0}
    effects = {key: {"flip": {"value": value}} for key, value in lost.items()}
    words = "loses 50.00% of the answers (zero, layer 0) to 25.00% (mean, layer 2)"
    assert ablate.describe_ablations(effects).endswith(words)


@pytest.mark.parametrize("name", ["force", "replace"])
def test_slot_0_can_be_named_too(monkeypatch, name):
    changed = []
    monkeypatch.setattr(ablate, "change_slot", lambda run, name: changed.append(name))
    getattr(ablate, name)(SimpleNamespace(config=ablate.AblateConfig(slot=0)))
    assert changed == [name]


# ---- parts of blocks and heads -------------------------------------------------------------------


@torch.no_grad()
def test_all_slots_at_zero_equal_the_ablated_layer(model):
    examples = some_examples()

    def zero(reads):
        return {"slots": reads["slots"], "weights": torch.zeros_like(reads["weights"])}

    interventions = dict.fromkeys(model.memory_layers(), zero)
    zeroed = hooks.run_with_hooks(model, examples, intervene=interventions)
    ablations = ablation.part_ablations(model)
    all_hooks = []
    for layer in model.memory_layers():
        all_hooks += ablations[layer, "memory, full"][0]
    assert torch.equal(zeroed, hooks.run_with_hooks(model, examples, all_hooks))
    assert not torch.allclose(zeroed, hooks.run_with_cache(model, examples).logits)


@torch.no_grad()
def test_values_and_keys_of_a_layer_ablated(model):
    """Values: one permutation of the table for all reads. Keys: other slots, the same weights."""
    examples = some_examples()
    ablations = ablation.part_ablations(model, seed=3)
    clean = hooks.run_with_cache(model, examples)
    for layer, reads in clean.reads.items():
        permute = ablations[layer, "memory, values"][1][layer]
        permuted = permute(reads)["slots"]
        order = torch.empty(N_SLOTS, dtype=torch.long)
        order[reads["slots"].flatten()] = permuted.flatten()
        assert torch.equal(order[reads["slots"]], permuted)
        _, intervention = ablations[layer, "memory, keys"]
        drawn = intervention[layer](reads)
        assert torch.equal(drawn["weights"], reads["weights"])
        assert (drawn["slots"] == reads["slots"]).float().mean() < 0.2
        logits = hooks.run_with_hooks(model, examples, intervene=intervention)
        assert not torch.allclose(logits, clean.logits)


@pytest.mark.parametrize("part", ["memory, values", "memory, keys"])
def test_permutations_and_random_slots_depend_on_the_seed(part):
    model = ablation_model()
    reads = {"slots": torch.arange(N_SLOTS).view(1, 1, 1, -1)}
    reads["weights"] = torch.ones(1, 1, 1, N_SLOTS)

    def slots(seed):
        _, intervention = ablation.part_ablations(model, seed)[0, part]
        return intervention[0](reads)["slots"]

    assert torch.equal(slots(1), slots(1)) and not torch.equal(slots(1), slots(2))


class FakeRun:
    """A run of `ablation_model` whose predictions are the answers."""

    def __init__(self):
        self.model = ablation_model(mem_share_values=False)
        self.examples = some_examples()
        with torch.no_grad():
            predictions = self.model(self.examples.tokens)[0].argmax(-1)
        self.examples.answers = predictions.gather(1, self.examples.label_pos)
        self.name = "fake"
        self.config = ablate.AblateConfig()
        self.world = SINGLE_PROCESS
        self.data = self
        self.device = "cpu"
        self.seq_len, self.vocab_size = 9, 11

    def token(self, i):
        return str(i)

    def finding(self, sentence):
        print(sentence)


@torch.no_grad()
@pytest.mark.parametrize(
    "command, what, by, name, columns",
    [
        (ablate.ablate_layers, "layer", "layer, what", "1, mixer", slice(None)),
        (ablate.ablate_heads, "heads", "head", "L1H1", slice(8, 16)),
    ],
)
def test_ablated_parts_equal_zero_weights(monkeypatch, command, what, by, name, columns):
    """Columns of the output projection at 0, in block 1: all of them, or those of head 1."""
    run = FakeRun()
    examples, saved = run.examples, {}

    def save(run, what, metrics, by_slice, *rest):
        saved[what] = by_slice

    monkeypatch.setattr(ablate, "sample_correct_examples", lambda run: examples)
    monkeypatch.setattr(ablate, "save_result", save)
    command(run)
    logits = hooks.run_with_cache(run.model, examples).logits
    clean, _, _ = hooks.logit_diff(logits, examples.answers)
    run.model.layers[1].att.out_proj.weight[:, columns] = 0
    logits = hooks.run_with_cache(run.model, examples).logits
    diff, _, correct = hooks.logit_diff(logits, examples.answers)
    cell = saved[what][by][name]
    assert cell["drop"]["value"] == pytest.approx(float((clean - diff).mean()), abs=1e-4)
    assert cell["accuracy"]["value"] == pytest.approx(float(correct.float().mean()))
    assert cell["drop"]["value"] > 0


def test_what_leaves_95_percent_can_be_spared():
    shares = {"0, mixer": 19, "1, mixer": 18, "2, memory": 2}
    effects = {name: {"accuracy": proportion(n, 20)} for name, n in shares.items()}
    sentence = ablate.describe_effects(effects)
    assert sentence.startswith("the memory of layer 2 is needed most: without it 0.1000 (")
    assert "; 1 of 3 can be spared one at a time, with 95% still correct" in sentence


def test_the_head_that_an_answer_needs_most():
    """Ablation of L0H1 costs answer 7 the most, and that of L0H0 answer 5."""
    columns = {
        "answer": np.array([5, 7, 5, 7]),
        "name": np.array(["L0H0", "L0H0", "L0H1", "L0H1"]),
        "drop": np.array([3.0, 1.0, 2.0, 4.0]),
        "correct": np.array([True, False, True, True]),
        "example": np.array([0, 1, 0, 1]),
    }
    by_answer, most_needed = ablate.summarize_by_answer(columns, token=str)
    assert most_needed == {"5": "L0H0", "7": "L0H1"}
    assert by_answer["'7', L0H0"]["drop"]["value"] == 1
    assert by_answer["'7', L0H0"]["accuracy"]["value"] == 0
    assert ablate.summarize_by_answer(columns, token=str, most=1) == ({}, {})


# ---- commands ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name, n_left_out", [("two", 0), ("gpt", 15), ("delta", 15)])
def test_all_commands_and_their_report(all_runs, name, n_left_out):
    runs = all_runs
    settings = ["--n_examples=8", "--n_pairs=20", "--ablations=zero next_best"]
    ablate.main(["all", str(runs / name), *settings])
    end = "_n_examples-8_ablations-zero-next_best_n_pairs-20"
    report = (runs / name / f"ablate_report{end}.md").read_text()
    last = report.splitlines()[-1]
    assert report.count("Left out") == last.startswith("Left out: ") == (n_left_out > 0)
    n_sections = report.count("\n## ")
    assert n_sections == len(ablate.COMMANDS) - 1 - n_left_out
    # Findings come before the table, and once.
    of_heads = report.split("\n## heads\n")[1].split("\n## ")[0]
    finding = of_heads.split("\n- ")[1].split(".\n")[0]
    assert "is needed most" in finding
    assert finding not in of_heads.split("```")[1] and report.count(finding) == 1
    figures = [line for line in report.splitlines() if line.startswith("![")]
    # Numbers of force, inject, replace and swap are in the figure of interchanges. position,
    # repeats and corr draw only what is there.
    assert 11 <= len(figures) <= 14 if n_left_out == 0 else len(figures) == 3
    for line in figures:
        figure = line.split("(")[1].rstrip(")")
        assert (runs / name / figure).stat().st_size > 5000
    result, columns = load_result(runs / name, "ablate_heads")
    n_heads = 2 * 2
    assert len(result["by_slice"]["head"]) == n_heads
    n_measured = len(np.unique(columns["example"])) * len(np.unique(columns["answer_pos"]))
    assert len(columns["drop"]) == n_heads * n_measured
    assert result["config"]["run"] == str(runs / name)


@pytest.mark.slow
def test_two_ranks_write_what_one_process_writes(runs, on_ranks, undrawn, monkeypatch):
    """Every command, in batches so small that both ranks have some; each rank measures a part."""
    argv = ["all", str(runs / "two"), "--n_examples=6", "--n_pairs=10", "--ablate_batch_size=7"]
    argv += ["--ablations=zero next_best", "--eval_batch_size=9", "--device=cpu"]
    paths = sorted((runs / "two").glob("ablate_*"))
    for path in paths:
        path.unlink()
    ablate.main(argv)
    alone = {path: path.read_bytes() for path in (runs / "two").glob("ablate_*.json")}
    tables = {path: path.read_bytes() for path in (runs / "two").glob("ablate_*.parquet")}
    assert len(alone) == len(ablate.COMMANDS) - 1
    for path in [*alone, *tables]:
        path.unlink()
    n_passes = []
    forward_from = swap_positions.forward_from

    def count(*args):
        n_passes.append(1)
        return forward_from(*args)

    def work(rank):
        monkeypatch.setattr(swap_positions, "forward_from", count)
        ablate.main(argv)
        (runs / f"passes{rank}").write_text(str(len(n_passes)))

    assert on_ranks(2, work) == [0, 0]
    for path, content in {**alone, **tables}.items():
        assert path.read_bytes() == content, path
    passes = [int((runs / f"passes{rank}").read_text()) for rank in range(2)]
    assert min(passes) > 0 and abs(passes[0] - passes[1]) <= 2 * max(passes) // 10


def test_controls_of_a_trained_run_change_nothing(runs):
    ablate.main(["keys", str(runs / "two"), "--n_examples=4", "--ablations=zero"])
    result, columns = load_result(runs / "two", "ablate_keys")
    assert columns["control"].any() and (columns["drop"][columns["control"]] == 0).all()
    assert result["by_slice"]["ablation, layer"]["zero, control"]["flip"]["value"] == 0


@pytest.mark.parametrize(
    "args, message",
    [
        (["keys"], "name one run directory, as in: keys runs/RUN"),
        (["keyz", "two"], "'keyz' is no command; did you mean keys?"),
        (["keys", "two", "--ablations=zero,next_best"], "with spaces between them: zero, next"),
        (["keys", "two", "--exposure_pairs=more_more"], "keys does not use it, only force"),
        (["swap", "two", "--exposure_pairs=less"], "exposure_pairs='less' is unknown"),
        (["swap", "new_gpt"], "gpt has no memory layers"),
        (["keys", "new_delta"], "delta has no memory layers"),
        (["impact", "fresh"], "ablate_keys.parquet does not exist; python ablate.py keys"),
        (["heads", "nowhere"], "is not a run directory"),
        (["layer", "new_gpt", f"--seed={2**64}"], "takes a number below 2..63"),
        (["layer", "new_gpt", "--device=meta"], "device='meta' cannot be used on this machine"),
        (["layer", "new_gpt", "--device=hpu"], "device='hpu' cannot be used on this machine"),
    ],
)
def test_mistakes_are_one_sentence(runs, args, message):
    if "fresh" in args:
        without_results = shutil.ignore_patterns("ablate_*")
        shutil.copytree(runs / "one", runs / "fresh", ignore=without_results, dirs_exist_ok=True)
    command, *rest = args
    if rest:
        rest[0] = str(runs / rest[0])
    with pytest.raises(ConfigError, match=message) as error:
        ablate.main([command, *rest])
    assert "\n" not in str(error.value)


def test_a_result_of_another_checkpoint_is_refused(runs):
    settings = ["--n_examples=4", "--ablations=zero"]
    ablate.main(["keys", str(runs / "one"), *settings])
    path = runs / "one" / "ablate_keys_n_examples-4_ablations-zero.json"
    result = json.loads(path.read_text())
    result["config"]["step"] += 1
    path.write_text(json.dumps(result))
    with pytest.raises(ConfigError, match="the checkpoint of step .*; run it again"):
        ablate.main(["impact", str(runs / "one"), *settings])


def test_one_example_is_enough_to_read_its_result(runs):
    """Without a second half of the examples, no slots can be chosen as the best."""
    settings = ["--n_examples=1", "--ablations=zero"]
    ablate.main(["keys", str(runs / "one"), *settings])
    ablate.main(["impact", str(runs / "one"), *settings])
    result, _ = load_result(runs / "one", "ablate_impact")
    assert result["by_slice"]["layer"]["1"]["best 5% of slots"] is None


def test_next_best_needs_a_further_slot(runs):
    config = ablate.AblateConfig(n_examples=4, ablations="zero next_best")
    run = open_run(str(runs / "one"), config)
    run.model.config.mem_knn = run.model.config.mem_n_keys
    message = "next_best needs mem_knn=8 below mem_n_keys=8; leave it out"
    with pytest.raises(ConfigError, match=message):
        ablate.ablate_slots(run)
