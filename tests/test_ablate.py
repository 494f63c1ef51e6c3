"""ablate.py: controls that must change nothing, naive twins, a model in which one slot holds one fact, and every command."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import ablate
import train
from analysis import hooks as I
from analysis import importance
from nanorecall.settings import ConfigError
from nanorecall.stats import clustered_mean_ci
from planted import VARIANTS, planted_facts
from toys import ablation_model, latest, some_examples


@pytest.fixture(params=VARIANTS)
def model(request):
    return ablation_model(**VARIANTS[request.param])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs that answer some rows rightly: two memory layers, one, and MQAR with gpt and delta."""
    folder = tmp_path_factory.mktemp("runs")
    small = "--dim=32 --dk=16 --dv=16 --conv_size=8 --init_std=1 --lr=1e-2 --num_threads=1 --batch_size=64 --eval_interval=150"
    facts = (
        "--data=data_synth --task=qa --num_pairs=40 --buckets=[4,16] --n_layers=2 --model=memory --mem_n_keys=8 --mem_k_dim=16"
    )
    facts += " --mem_knn=4 --mem_heads=2 --mem_value_lr_scale=4 --max_steps=150"
    mqar = "--n_layers=2 --vocab_size=32 --input_seq_len=16 --num_kv_pairs=2 --n_val_examples=40 --n_test_examples=40 --infinite_data=1"
    for name, words in (
        ("two", f"{small} {facts} --memory_layers=[0,1]"),
        ("one", f"{small} {facts} --memory_layers=[1]"),
        ("gpt", f"{small} {mqar} --use_ffn=1 --max_steps=150"),
        ("delta", f"{small} {mqar} --model=delta --max_steps=150"),
    ):
        train.main([*words.split(), f"--run_name={name}", f"--log_dir={folder}"])
    return folder


def saved(runs, name, what):
    what = latest(runs / name, f"ablate_{what}")
    result = json.loads((runs / name / f"{what}.json").read_text())
    assert set(result) == {"config", "metrics", "by_slice", "examples"}
    assert (runs / name / f"{what}.png").stat().st_size > 5000
    path = runs / name / f"{what}.parquet"
    return result, {k: np.array(v) for k, v in pq.read_table(path).to_pydict().items()} if path.exists() else {}


def test_reads_of_a_row_by_hand():
    """Row 0 reads slot 2 twice with 0.5 and 0.25, slot 1 once; row 1 reads slot 2 once."""
    found = {
        "slots": torch.tensor([[[[2, 1, 2]]], [[[2, 0, 0]]]]),
        "weights": torch.tensor([[[[0.5, 0.25, 0.25]]], [[[1.0, 0.0, 0.0]]]]),
    }
    case, slot, reads, weight = ablate.read_in_rows(found, 4)
    assert list(zip(case, slot, reads, weight)) == [(0, 1, 1, 0.25), (0, 2, 2, 0.75), (1, 0, 2, 0.0), (1, 2, 1, 1.0)]
    case, slot, reads, _ = ablate.with_unread(case, slot, reads, weight, 4, np.random.default_rng(0))
    assert case[4:].tolist() == [0, 1] and slot[4] in (0, 3) and slot[5] in (1, 3) and reads[4:].tolist() == [0, 0]


# ---- controls ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_all_slots_at_zero_are_the_layer_taken_out(model):
    cases = some_examples()
    silence = lambda found: {"slots": found["slots"], "weights": torch.zeros_like(found["weights"])}
    zeroed = I.run_with_hooks(model, cases, intervene=dict.fromkeys(model.memory_layers(), silence))
    changes = ablate.whole_block_changes(model)
    hooks = [hook for block in model.memory_layers() for hook in changes[block, "memory, full"][0]]
    assert torch.equal(zeroed, I.run_with_hooks(model, cases, hooks))
    assert not torch.allclose(zeroed, I.run_with_cache(model, cases).logits)


@torch.no_grad()
def test_values_and_keys_of_a_layer_taken_out(model):
    """Exchanged values: as a model whose table was permuted. Random slots: weights stay, slots are others."""
    cases, changes = some_examples(), ablate.whole_block_changes(model, seed=3)
    clean = I.run_with_cache(model, cases)
    for block in model.memory_layers():
        exchanged = changes[block, "memory, values"][1][block](clean.reads[block])
        order = torch.empty(25, dtype=torch.long)
        order[clean.reads[block]["slots"].flatten()] = exchanged["slots"].flatten()
        again = changes[block, "memory, values"][1][block](clean.reads[block])
        assert torch.equal(order[clean.reads[block]["slots"]], again["slots"])  # one permutation for all reads
        drawn = changes[block, "memory, keys"][1][block](clean.reads[block])
        assert torch.equal(drawn["weights"], clean.reads[block]["weights"])
        assert (drawn["slots"] == clean.reads[block]["slots"]).float().mean() < 0.2
        assert not torch.allclose(I.run_with_hooks(model, cases, intervene=changes[block, "memory, keys"][1]), clean.logits)


# ---- one slot, one fact ------------------------------------------------------------------------------------------------


def test_removal_finds_the_slot_that_holds_the_fact():
    model, cases = planted_facts()
    assert (I.run_with_cache(model, cases).logits.argmax(-1) == cases.answers).all()
    for mode in I.ABLATIONS:
        found = ablate.remove_slots(model, cases, [mode])
        holds = found["slot"] == cases.indices[found["case"]]
        lost = found["flip"] | (found["fall"] > 1)
        assert lost[holds].mean() > (0.8 if mode in ("random", "resample") else 0.99) and not lost[~holds].any()
        assert holds.sum() == 9


# ---- reading what was measured -----------------------------------------------------------------------------------------


def test_tables_by_hand():
    columns = {
        "row": np.array([0, 0, 1, 1, 2]),
        "layer": np.zeros(5, int),
        "slot": np.array([4, 4, 4, 4, 5]),
        "flip": np.array([1, 0, 0, 0, 0]) == 1,
        "fall": np.array([1.0, 2.0, 3.0, 4.0, 7.0]),
    }
    slots = importance.slot_table(columns)
    assert slots["slot"].tolist() == [4, 5] and slots["rows"].tolist() == [2, 1] and slots["mean"].tolist() == [2.5, 7]
    assert slots["median"].tolist() == [2.5, 7] and slots["max"].tolist() == [4, 7] and slots["flips"].tolist() == [0.25, 0]
    assert importance.per_example_mean(columns, np.array([2, 0])).tolist() == [7, 1.5]
    assert clustered_mean_ci(columns["fall"], columns["row"])["value"] == pytest.approx((1.5 + 3.5 + 7) / 3)


def test_groups_of_values_are_found_and_noise_is_none():
    random = np.random.default_rng(0)
    centres = np.eye(4)
    values = np.repeat(centres, 20, axis=0) + 0.05 * random.normal(size=(80, 4))
    group, quality = max((importance.spherical_k_means(values, 4, seed) for seed in range(5)), key=lambda found: found[1])
    assert quality > 0.9 and all(len(set(group[i : i + 20])) == 1 for i in range(0, 80, 20))
    assert importance.spherical_k_means(random.normal(size=(80, 16)), 4)[1] < 0.2


def test_a_place_unlike_the_others_is_found():
    random = np.random.default_rng(0)
    by_row = random.normal(size=(60, 4))
    assert (importance.position_permutation_test(by_row) > 0.01).all()
    by_row[:, 2] += 1
    p = importance.position_permutation_test(by_row)
    assert p[2] < 0.002
    p = [importance.position_permutation_test(random.normal(size=(10, 3)), draws=99)[0] for _ in range(300)]
    assert np.mean(np.array(p) <= 0.05) < 0.1


def test_rare_and_frequent_facts_are_told_apart():
    columns = {
        "row": np.repeat([0, 1, 2, 3], 2),
        "exposures": np.repeat([1, 1, 8, 8], 2),
        "flip": np.array([1, 1, 1, 1, 0, 0, 0, 0]),
    }
    columns["fall"] = np.array([2.0, 2.0, 2.0, 2.0, 4.0, 0.0, 4.0, 0.0])
    found = importance.frequent_or_rare(columns)
    carried = found["slots that carry the fall (effective number)"]
    assert carried[0]["value"] == pytest.approx(2) and carried[1]["value"] == pytest.approx(1)
    assert found["share of removals that flip an answer"][0]["value"] == 1 and found["largest fall"][1]["value"] == 4


# ---- commands ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, left_out", [("two", 0), ("gpt", 13), ("delta", 13)])
def test_a_report_of_everything(runs, name, left_out, capsys):
    ablate.main(["all", str(runs / name), "--n_examples=8", "--n_pairs=20", "--ablations=zero next_best"])
    report = (runs / name / "ablate_report_n_examples-8_ablations-zero-next_best_n_pairs-20.md").read_text()
    assert report.count("Left out") == left_out
    figures = [line.split("(")[1][:-1] for line in report.splitlines() if line.startswith("![")]
    assert len(figures) == 16 - left_out and all((runs / name / f).stat().st_size > 5000 for f in figures)
    result, columns = saved(runs, name, "heads")
    mixers = 2 * 2
    assert len(result["by_slice"]["head"]) == mixers and len(columns["fall"]) == mixers * len(
        np.unique(columns["row"])
    ) * result_labels(columns)
    assert result["config"]["run"] == str(runs / name)
    if name == "two":
        result, columns = saved(runs, name, "keys")
        assert (columns["fall"][columns["control"]] == 0).all() and result["by_slice"]["mode, layer"]["zero, control"]["flip"][
            "value"
        ] == 0
        _, swapped = saved(runs, name, "swap")
        assert set(swapped["exposure_pairs"]) <= {"less_less", "more_more", "less_more", "more_less"}


def result_labels(columns):
    return len(np.unique(columns["place"]))


@pytest.mark.parametrize(
    "words, message",
    [
        (["keys"], "name one run directory, as in: keys runs/RUN"),
        (["keyz", "two"], "'keyz' is no command; did you mean keys?"),
        (["keys", "two", "--ablations=zero,next_best"], "must be some of zero, next_best"),
        (["keys", "two", "--exposure_pairs=more_more"], "keys does not use it, only force"),
        (["swap", "two", "--exposure_pairs=less"], "exposure_pairs='less' is unknown"),
        (["swap", "gpt"], "gpt has no memory layers"),
        (["keys", "delta"], "delta has no memory layers"),
        (["impact", "fresh"], "ablate_keys.parquet does not exist; python ablate.py keys"),
        (["heads", "nowhere"], "is not a run directory"),
        (["layer", "gpt", f"--seed={2**64}"], "takes a number below 2..63"),
        (["layer", "gpt", "--device=meta"], "device='meta' cannot be used on this machine"),
        (["layer", "gpt", "--device=hpu"], "device='hpu' cannot be used on this machine"),
    ],
)
def test_mistakes_are_one_sentence(runs, words, message):
    words = [str(runs / w) if w in ("two", "gpt", "delta", "nowhere") else w for w in words]
    if "fresh" in words:
        import shutil

        shutil.copytree(runs / "one", runs / "fresh", ignore=shutil.ignore_patterns("ablate_*"), dirs_exist_ok=True)
        words = [words[0], str(runs / "fresh")]
    with pytest.raises(ConfigError, match=message) as error:
        ablate.main(words)
    assert "\n" not in str(error.value)


def test_what_was_measured_on_another_checkpoint_is_refused(runs, capsys):
    ablate.main(["keys", str(runs / "one"), "--n_examples=4", "--ablations=zero"])
    path = runs / "one" / "ablate_keys_n_examples-4_ablations-zero.json"
    result = json.loads(path.read_text())
    result["config"]["step"] += 1
    path.write_text(json.dumps(result))
    with pytest.raises(ConfigError, match="the checkpoint of step .*; measure again"):
        ablate.main(["impact", str(runs / "one"), "--n_examples=4", "--ablations=zero"])


def test_dropping_needs_a_next_best_slot(runs):
    from analysis.trained_run import open_run

    look = open_run(str(runs / "one"), ablate.AblateConfig(n_examples=4, ablations="zero next_best"))
    look.model.config.mem_knn = look.model.config.mem_n_keys
    with pytest.raises(ConfigError, match="ablations=next_best needs a slot more than mem_knn=8 of mem_n_keys=8"):
        ablate.keys(look)
