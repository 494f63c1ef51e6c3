"""trained_run.py, confidence.py, memory_usage.py, routing.py and decoding.py: against values worked
out by hand, slow ways and planted truths."""

import doctest
import importlib
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import eval as eval_script
import memory
import train
from analysis import confidence, decoding, memory_usage, routing, trained_run
from nanorecall.distributed import SINGLE_PROCESS, World
from nanorecall.settings import ConfigError
from nanorecall.text import BYTES
from toys import as_flags, load_result

SMALL = dict(n_layers=2, dim=32, dk=16, dv=16, lr=1e-2, num_threads=1)
MEMORY = dict(init_std=1, conv_size=4, batch_size=64, mem_log_interval=10, data="data_synth")
TABLE = dict(mem_n_keys=8, mem_k_dim=16, mem_knn=4, mem_heads=2)
FACTS = {**MEMORY, **TABLE, "task": "qa", "num_pairs": 40, "buckets": "[4,16]"}
HOPS = dict(task="hashhop", max_bytes=220, num_queries=3, hops="[1,2]", cot_frac=0.5)
FEW = dict(n_val_examples=10, n_test_examples=12)
RUNS = {
    "memory": {**FACTS, "memory_layers": "[0,1]", "mem_share_values": 0, "max_steps": 60},
    "router": {**FACTS, "model": "memory_router", "memory_layers": "[1]", "max_steps": 20},
    "hops": {**MEMORY, **HOPS, **FEW, "memory_layers": "[1]", "max_steps": 10},
    "mqar": dict(
        model="gpt", conv_size=2, vocab_size=32, input_seq_len=16, num_kv_pairs=4,
        n_val_examples=20, n_test_examples=30, max_steps=10,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A memory model, one with a router, one for HashHop, and a GPT for MQAR, trained a little."""
    folder = tmp_path_factory.mktemp("runs")
    for name, settings in RUNS.items():
        place = {"run_name": name, "log_dir": folder}
        train.main(as_flags({"model": "memory", **SMALL, **settings, **place}))
    return folder


def open_run(runs, name, n_examples=0, **settings):
    config = eval_script.EvalConfig(n_examples=n_examples, **settings)
    return trained_run.open_run(str(runs / name), config)


@pytest.mark.parametrize(
    "file",
    [
        "nanorecall.stats",
        "analysis.repair",
        "analysis.token_kinds",
        "analysis.decoding",
        "analysis.keystats",
        "analysis.slot_results",
        "myriadlama.metrics",
        "myriadlama.prompts",
    ],
)
def test_the_examples_in_docstrings(file):
    result = doctest.testmod(importlib.import_module(file))
    assert result.attempted > 0 and result.failed == 0


# ---- batches and ranks ---------------------------------------------------------------------------


def batches_of(groups, **settings):
    data = SimpleNamespace(eval_groups=lambda split: groups)
    config = SimpleNamespace(split="test", **settings)
    batches = trained_run.sample_batches(SimpleNamespace(data=data, config=config))
    return [batch.tolist() for batch in batches]


def test_examples_are_spread_over_their_groups():
    """7 of groups of 20, 30 and 2 examples are 3 of each, evenly spaced; the last has only 2."""
    groups = [range(0, 20), range(20, 50), range(50, 52)]
    batches = batches_of(groups, n_examples=7, eval_batch_size=2)
    assert batches == [[0, 6], [13], [20, 30], [40], [50, 51]]


@pytest.mark.parametrize("n_examples", [0, 1000])
def test_all_examples_are_taken_if_there_are_no_more(n_examples):
    groups = [range(0, 20), range(20, 50), range(50, 52)]
    batches = batches_of(groups, n_examples=n_examples, eval_batch_size=7)
    assert sorted(sum(batches, [])) == list(range(52))


def test_examples_of_a_run_are_as_many_of_each_group(runs):
    run = open_run(runs, "hops", n_examples=8, eval_batch_size=3)
    indices = np.concatenate(trained_run.sample_batches(run))
    assert len(set(indices)) == len(indices)
    for group in run.data.eval_groups("test"):
        assert np.isin(indices, group).sum() == 2


@pytest.mark.parametrize("n_items", [0, 2, 7])
def test_items_that_ranks_took_in_turn_come_in_order(n_items):
    class ThreeRanks(World):
        def all_gather_object(self, value):
            return [list(range(rank, n_items, 3)) for rank in range(3)]

    assert ThreeRanks(size=3).gather_in_order(None) == list(range(n_items))


def test_a_correct_example_has_no_wrong_label(monkeypatch):
    batches = [
        {"example": np.array([3, 3, 4, 4, 5]), "correct": np.array([1, 1, 1, 0, 1], bool)},
        {"example": np.array([9, 8]), "correct": np.array([False, True])},
    ]
    monkeypatch.setattr(trained_run, "iter_predictions", lambda *_, **__: batches)
    config = SimpleNamespace(split="test", eval_batch_size=5)
    run = SimpleNamespace(config=config, model=None, data=None, device=None, dtype=None)
    run.world = SINGLE_PROCESS
    assert trained_run.correct_examples(run).tolist() == [3, 5, 8]


def test_positions_of_labels_by_hand():
    targets = torch.tensor([[-100, 4, -100, 6], [-100, -100, -100, -100], [7, -100, 8, 9]])
    batch = SimpleNamespace(targets=targets, indices=np.array([5, 6, 7]))
    example, position, answer_pos, answer = trained_run.label_positions(batch)
    assert example.tolist() == [5, 5, 7, 7, 7]
    assert position.tolist() == [1, 3, 0, 2, 3]
    assert answer_pos.tolist() == [0, 1, 0, 1, 2]
    assert answer.tolist() == [4, 6, 7, 8, 9]


@pytest.mark.parametrize("name", ["memory", "hops", "mqar"])
def test_batches_do_not_change_results(runs, name):
    """One example at a time or all together, also where shorter examples are padded."""
    tables = []
    for size in (1, 64):
        run = open_run(runs, name, eval_batch_size=size)
        measure = lambda batch, run=run: confidence.score_answer_tokens(run, batch)
        tables.append(trained_run.map_batches(run, measure))
    one, many = tables
    assert np.array_equal(one["rank"], many["rank"])
    assert np.array_equal(one["example"], many["example"])
    np.testing.assert_allclose(one["nll"], many["nll"], atol=2e-5)


@pytest.mark.parametrize(
    "args, file",
    [
        (["logits", "memory"], "eval_logits.json"),
        (["activations", "memory"], "eval_activations.json"),
        (["mqar"], "eval_test.json"),
    ],
)
def test_two_ranks_write_what_one_process_writes(runs, on_ranks, args, file):
    *command, name = args
    argv = [*command, str(runs / name), "--eval_batch_size=7", "--device=cpu"]
    path = runs / name / file
    eval_script.main(argv)
    alone = path.read_bytes()
    assert on_ranks(2, lambda rank: eval_script.main(argv)) == [0, 0]
    assert path.read_bytes() == alone


# ---- confidence.py -------------------------------------------------------------------------------


def test_scores_by_hand():
    """Logits 0, 1, 2, 3: the second best token has rank 2 and probability e^2 / (1+e+e^2+e^3)."""
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0], [5.0, 0.0, 0.0, 0.0]])
    run = SimpleNamespace(model=lambda tokens, targets: (logits, None))
    targets = torch.tensor([[-100, 2, 0]])
    slices = {"kind": np.array([1, 2])}
    batch = SimpleNamespace(tokens=None, targets=targets, indices=np.array([7]), slices=slices)
    table = confidence.score_answer_tokens(run, batch)
    assert table["rank"].tolist() == [2, 1]
    assert table["correct"].tolist() == [False, True]
    assert table["example"].tolist() == [7, 7]
    assert table["answer_pos"].tolist() == [0, 1]
    assert table["slice kind"].tolist() == [1, 2]
    assert table["top"][0].tolist() == [3, 2, 1, 0]
    p = np.exp([0, 1, 2, 3]) / np.exp([0, 1, 2, 3]).sum()
    assert table["probability"][0] == pytest.approx(p[2])
    assert table["entropy"][0] == pytest.approx(-(p * np.log(p)).sum(), rel=1e-5)


def test_calibration_by_hand():
    """Ten labels at 0.85 of which 6 are correct, ten at 0.25 of which 5 are: both 0.25 off."""
    probability = np.repeat([0.85, 0.25], 10)
    correct = np.array([1] * 6 + [0] * 4 + [1] * 5 + [0] * 5) == 1
    bins, error = confidence.calibration(probability, correct, np.arange(20))
    assert error == pytest.approx(0.25)
    assert [cell["value"] for cell in bins] == [0.5, 0.6]


def test_a_confidence_of_1_is_in_the_last_bin():
    correct = np.array([True, False])
    bins, error = confidence.calibration(np.array([1.0, 0.95]), correct, np.arange(2))
    assert len(bins) == 1 and bins[0]["value"] == 0.5
    assert error == pytest.approx(0.475)


def test_means_are_over_labels_and_exact_match_over_examples():
    """Example 0 has two labels, example 1 has one."""
    table = {
        "example": np.array([0, 0, 1, 2]),
        "correct": np.array([True, False, True, False]),
        "rank": np.array([1, 3, 1, 9]),
        "probability": np.array([0.5, 0.1, 0.9, 0.0]),
        "nll": np.log([2.0, 4.0, 1.0, 99.0]),
    }
    cell = confidence.summarize(table, table["example"] < 2)
    assert cell["accuracy"]["value"] == pytest.approx(2 / 3)
    assert cell["rank"]["value"] == pytest.approx(5 / 3)
    assert cell["probability"]["value"] == pytest.approx(0.5)
    assert cell["perplexity"]["value"] == pytest.approx(2)
    assert confidence.exact_match_of(table)["value"] == pytest.approx(1 / 3)


def test_logits_and_slices_agree(runs):
    eval_script.main(["logits", str(runs / "memory")])
    eval_script.main(["qa", str(runs / "memory")])
    result, columns = load_result(runs / "memory", "eval_logits")
    plain = json.loads((runs / "memory" / "eval_test.json").read_text())
    metrics, plain_metrics = result["metrics"], plain["metrics"]
    assert metrics["accuracy"] == plain_metrics["accuracy"]
    assert metrics["exact_match"]["value"] == plain_metrics["exact_match"]["value"]
    nll = np.log(metrics["perplexity"]["value"])
    assert nll == pytest.approx(plain_metrics["loss"]["value"], rel=1e-4)
    for name, cells in plain["by_slice"].items():
        for value, cell in cells.items():
            assert result["by_slice"][name][value]["accuracy"]["value"] == cell["value"]
    assert (columns["rank"] == 1).mean() == metrics["accuracy"]["value"]


def test_examples_of_logits_show_prompt_ranks_and_top_five(runs):
    eval_script.main(["logits", str(runs / "memory")])
    example = load_result(runs / "memory", "eval_logits")[0]["examples"][0]
    assert example["prompt"].endswith(":")
    assert len(example["ranks"]) == 6 and len(example["top_5"][0]) == 5


# ---- memory_usage.py -----------------------------------------------------------------------------


def test_reads_are_the_trace_one_by_one(runs):
    run = open_run(runs, "hops", eval_batch_size=5, n_examples=8)
    table = trained_run.map_batches(run, lambda batch: memory_usage.slot_reads(run, batch))
    expected = []
    for indices in trained_run.sample_batches(run):
        tokens, targets, *_ = run.data.batch("test", 0, indices)
        with torch.no_grad():
            trace = run.model(tokens, trace=True)[2]
        for layer, reads in zip(run.model.memory_layers(), trace):
            slots, weights = reads["slots"].tolist(), reads["weights"].tolist()
            for b, t, h, k in np.ndindex(*reads["slots"].shape):
                if tokens[b, t] != run.pad:
                    token, labelled = int(tokens[b, t]), bool(targets[b, t] != -100)
                    place = (int(indices[b]), t, token, labelled, layer, h)
                    expected.append((*place, slots[b][t][h][k], weights[b][t][h][k]))
    names = ("example", "position", "token", "labelled", "layer", "head", "slot", "weight")
    found = zip(*(table[name].tolist() for name in names))
    assert list(found) == [pytest.approx(entry) for entry in expected]


def test_usage_stats_of_four_reads():
    """Three reads of slot 0 and one of slot 2, of four slots: entropy 0.562 nats, 1.75 slots."""
    usage = memory_usage.usage_stats(np.array([0, 0, 2, 0]), 4)
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert usage["used"] == 2 and usage["fraction"] == 0.5
    assert usage["effective"] == pytest.approx(np.exp(entropy))
    assert usage["kl"] == pytest.approx(np.log(4) - entropy)


@pytest.fixture(scope="module")
def all_reads(runs):
    """The table of reads of all examples of the memory run, as `activations` writes it."""
    eval_script.main(["activations", str(runs / "memory"), "--n_examples=0"])
    return load_result(runs / "memory", "eval_activations")


def test_activations_count_every_read(all_reads):
    result, reads = all_reads
    n_examples, n_tokens, n_layers, n_heads, k = 40, 15, 2, 2, 4
    assert len(reads["slot"]) == n_examples * n_tokens * n_layers * n_heads * k
    used = np.unique(reads["slot"][reads["layer"] == 0])
    assert result["by_slice"]["layer"]["0"]["used"] == len(used)


def test_examples_of_activations_begin_with_the_largest_weight(all_reads):
    result, reads = all_reads
    example = result["examples"][0]
    row, column, weight = example["top_slots"]["layer 1"]["position 7"][0]
    here = (reads["example"] == example["example"]) & (reads["layer"] == 1)
    here = np.flatnonzero(here & (reads["position"] == 7))
    largest = here[np.argmax(reads["weight"][here])]
    assert row * TABLE["mem_n_keys"] + column == reads["slot"][largest]
    assert weight == pytest.approx(reads["weight"][largest], abs=1e-4)


def test_track_counts_the_reads_of_each_slot_and_token(runs, all_reads):
    _, reads = all_reads
    eval_script.main(["track", str(runs / "memory"), "--n_examples=0"])
    result, table = load_result(runs / "memory", "eval_track")
    assert table["times"].sum() == len(reads["slot"])
    i = int(np.argmax(table["times"]))
    same = np.ones(len(reads["slot"]), bool)
    for name in ("layer", "slot", "token"):
        same &= reads[name] == table[name][i]
    assert same.sum() == table["times"][i]
    assert reads["weight"][same].sum() == pytest.approx(table["weight"][i], rel=1e-5)
    assert result["metrics"]["while training"]["0"]["fraction"] <= 1


def test_batches_of_one_example_change_no_count(runs, all_reads):
    run = open_run(runs, "memory", eval_batch_size=1, n_examples=0)
    table = trained_run.map_batches(run, lambda batch: memory_usage.reads_by_token(run, batch))
    table = memory_usage.sum_by_token(run, table)
    keys = np.stack([table[name] for name in ("layer", "slot", "token")])
    expected = np.stack([all_reads[1][name] for name in ("layer", "slot", "token")])
    expected, times = np.unique(expected, axis=1, return_counts=True)
    assert np.array_equal(keys, expected) and np.array_equal(table["times"], times)
    in_use = trained_run.map_batches(run, lambda batch: memory_usage.slots_in_use(run, batch))
    assert {*zip(in_use["layer"], in_use["slot"])} == {*zip(*expected[:2])}


def test_purity_is_the_share_of_the_most_frequent_token(runs):
    eval_script.main(["track", str(runs / "memory"), "--n_examples=0"])
    result, table = load_result(runs / "memory", "eval_track")
    in_layer = table["layer"] == 1
    slots, times = table["slot"][in_layer], table["times"][in_layer]
    largest = sum(times[slots == slot].max() for slot in set(slots))
    purity = result["metrics"]["fraction of reads at a slot's most frequent token"]["1"]
    assert purity["value"] == pytest.approx(largest / times.sum()) and purity["n"] == times.sum()
    assert 0 < purity["by chance"] < 1


def test_purity_by_chance():
    """Slots that are read often are read at the more frequent of two tokens in 3 of 4 cases."""
    reads = {"token": np.array([7, 9]), "times": np.array([30, 10])}
    assert memory_usage.purity_by_chance(reads, np.array([10**6])) == pytest.approx(0.75, abs=0.01)
    assert memory_usage.purity_by_chance(reads, np.ones(5, int)) == 1


def test_norms_of_values_and_of_outputs(runs):
    eval_script.main(["norms", str(runs / "memory"), "--n_examples=0"])
    result, table = load_result(runs / "memory", "eval_norms")
    lengths = open_run(runs, "memory").model.memory_layers()[0].values.norm(dim=1)
    total = sum(cell["value"] * cell["n"] for cell in result["metrics"]["layers 0"].values())
    assert total == pytest.approx(float(lengths.detach().sum()), rel=1e-4)
    cell = result["by_slice"]["layer, position"]["1, 3"]
    outputs = table["norm"][(table["layer"] == 1) & (table["position"] == 3)]
    assert cell["n"] == 40 and cell["std"] == pytest.approx(np.std(outputs), rel=1e-5)


@pytest.mark.parametrize(
    "shared, expected",
    [(True, {"layers 0 1": [1, 2]}), (False, {"layers 0": [1], "layers 1": [2]})],
)
def test_a_shared_table_is_counted_once(shared, expected):
    """Layer 0 reads slot 1, and layer 1 reads slot 2."""
    sizes = dict(dim=8, dk=4, dv=4, n_layers=2, memory_layers=(0, 1))
    table = dict(mem_n_keys=4, mem_knn=2, mem_k_dim=4, mem_share_values=shared)
    model = memory.MemoryGPT(memory.Config(**sizes, **table))
    reads = {"slot": np.array([1, 2]), "layer": np.array([0, 1])}
    found = {}
    for name, (_, used) in memory_usage.value_norms(model, reads).items():
        found[name] = used.nonzero()[0].tolist()
    assert found == expected


# ---- routing.py ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bias, weight", [((30.0, -30.0), 0.0), ((-30.0, 30.0), 1.0)])
def test_a_router_fixed_to_one_path_says_so(runs, bias, weight):
    run = open_run(runs, "router")
    router = run.model.layers[1].router
    with torch.no_grad():
        router.weight.zero_()
        router.bias.copy_(torch.tensor(bias))
    routing.routing(run)
    result, columns = load_result(runs / "router", "eval_routing")
    for cells in result["by_slice"].values():
        for cell in cells.values():
            assert cell["value"] == pytest.approx(weight, abs=1e-12)
    assert set(columns["kind"]) == {"special", "digit", "colon", "blank"}
    assert set(columns["decile"]) == set(range(10))


def test_hashes_of_hashhop_have_their_roles(runs):
    """Beside a reading of the text line by line."""
    run = open_run(runs, "hops")
    table = trained_run.map_batches(run, lambda batch: routing.routing_table(run, batch))
    found_all = set()
    for index in range(run.data.source.count("test")):
        mask = (table["example"] == index) & (table["layer"] == 1)
        text = bytes(table["token"][mask][1:].tolist()).decode()  # without BOS
        problem, completion = text.split("COMPLETION:")
        lines = [line.replace("'", "").split(" = ") for line in problem.split("\n") if line]
        (asked,) = [line for line in completion.split("\n") if " = " in line]
        asked, *between, answer = asked.replace("'", "").split(" = ")
        expected = {
            "key": "".join(key for key, _ in lines),
            "value": "".join(value for _, value in lines),
            "asked hash": asked,
            "hash in between": "".join(between),
            "answer": answer,
        }
        kinds = table["kind"][mask][1:]
        found = {}
        for role in expected:
            found[role] = "".join(c for c, kind in zip(text, kinds) if kind == role)
        assert found == expected
        found_all |= set(kinds)
    others = {"blank", "equals sign", "quote", "new line", "header"}
    assert found_all == set(expected) | others


def test_routing_intervals_are_of_sequences():
    """Two sequences of 200 tokens: what all tokens of one share counts once."""
    example = np.repeat([0, 1], 200)
    table = {
        "example": example,
        "layer": np.zeros(400, int),
        "kind": np.full(400, "digit"),
        "memory": np.array([0.9, 1.0])[example],
        "slots": np.zeros((400, 1), int),
    }
    cell = routing.cells_of(table, "kind", 4)["0, digit"]
    low, high = cell["ci95"]
    assert cell["value"] == pytest.approx(0.95) and (cell["n"], cell["tokens"]) == (2, 400)
    assert low < 0.6 and high <= 1


def test_findings_of_routing_name_the_extremes():
    cells = {"1, digit": {"value": 0.2}, "1, answer": {"value": 0.9}, "0, quote": {"value": 1}}
    cosine = np.array([[1, 0.5, 0.1], [0.5, 1, 0.7], [0.1, 0.7, 1]])
    pairs = {"same token": {"slots in common": {"value": 0.75}}}
    text = routing.describe_layer("1", cells, (["a", "b", "c"], cosine), pairs)
    assert "most weight at answer (0.90) and least at digit (0.20)" in text
    assert "b and c read the most similar slots (cosine 0.70), a and c the least (0.10)" in text
    assert "same token 0.75" in text


def test_same_tokens_read_the_same_slots_without_attention(runs):
    """Then only the token counts, and kinds of tokens differ."""
    run = open_run(runs, "memory")
    for layer in run.model.layers:
        layer.att = None
    table = trained_run.map_batches(run, lambda batch: routing.routing_table(run, batch))
    cells = routing.consistency(table)["1"]
    assert cells["same token"]["slots in common"]["value"] == 1
    assert cells["other kind"]["slots in common"]["value"] < 0.9
    _, cosine = routing.similarity_of_kinds(table, 1, 64)
    np.testing.assert_allclose(np.diag(cosine), 1)


def test_texts_of_a_file_are_routed(runs, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"question": "Tom has 3+4", "answer": "7 (seven)"}\n{"text": "the end"}\n' * 3)
    eval_script.main(["routing", str(runs / "router"), f"--data={path}", "--eval_batch_size=2"])
    result, columns = load_result(runs / "router", "eval_routing")
    assert result["metrics"]["data"] == str(path)
    assert set(columns["example"]) == set(range(6))
    seq_len = open_run(runs, "router").data.seq_len
    tokens = [BYTES.bos, *BYTES.encode("Tom has 3+4 7 (seven)").tolist()][:seq_len]
    assert columns["token"][columns["example"] == 0].tolist() == tokens


def test_tenths_are_of_the_example_without_its_padding():
    tokens = torch.tensor([[1, 2, 3, 4, 0, 0], [1, 2, 3, 4, 5, 6]])
    reads = {"slots": torch.zeros(2, 6, 1, 1, dtype=torch.long)}
    reads["route"] = torch.tensor([0.25, 0.75]).expand(2, 6, 2)
    model = lambda tokens, trace: (None, None, [reads])
    model.memory_layers = lambda: {3: None}
    run = SimpleNamespace(model=model, pad=0, data=SimpleNamespace(vocab_size=8))
    batch = SimpleNamespace(tokens=tokens, indices=np.array([7, 9]))
    table = routing.routing_table(run, batch)
    assert table["decile"].tolist() == [0, 2, 5, 7, *[0, 1, 3, 5, 6, 8]]
    assert table["example"].tolist() == [7] * 4 + [9] * 6
    assert (table["memory"] == 0.75).all() and (table["layer"] == 3).all()


def test_two_tokens_of_one_example_are_no_pair():
    """Example 0 reads slots 1, 2, 3 with weight 0.2, example 1 slots 1, 4 with 0.8."""
    example = np.repeat([0, 1], 50)
    table = {
        "example": example,
        "layer": np.zeros(100, int),
        "token": np.full(100, 5),
        "kind": np.full(100, "digit"),
        "slots": np.array([[1, 2, 3], [1, 4, 4]])[example],
        "memory": np.array([0.2, 0.8])[example],
    }
    cells = routing.consistency(table)["0"]["same token"]
    assert cells["slots in common"]["value"] == 0.25
    assert cells["difference of weights"]["value"] == pytest.approx(0.6)


def test_similarity_of_kinds_by_hand():
    """One kind reads two slots 3 and 4 times, another 0 and 5 times: the cosine is 4 / 5."""
    slots = np.array([0] * 3 + [1] * 4 + [1] * 5)[:, None]
    table = {"kind": np.array(["a"] * 7 + ["b"] * 5), "layer": np.zeros(12, int), "slots": slots}
    _, cosine = routing.similarity_of_kinds(table, 0, 2)
    np.testing.assert_allclose(cosine, [[1, 0.8], [0.8, 1]])


# ---- HashHop, reports, errors --------------------------------------------------------------------


def test_correct_answers_of_hashhop_are_those_that_slices_count(runs, capsys):
    eval_script.main(["hashhop", str(runs / "hops"), "--eval_batch_size=7", "--example=2"])
    result, _ = load_result(runs / "hops", "eval_hashhop")
    plain = json.loads((runs / "hops" / "eval_test.json").read_text())
    assert set(plain["by_slice"]["hops_cot"]) == set(result["by_slice"]["hops"])
    for level, cells in result["by_slice"]["hops"].items():
        exact = plain["by_slice"]["hops_cot"][level]["exact"]
        assert cells["correct"]["value"] == exact["value"]
        assert sum(cell["value"] for cell in cells.values()) == pytest.approx(1)
    example = plain["examples"][0]
    assert example["example"] == 2 and "COMPLETION:" in example["prompt"]
    assert "  model " in capsys.readouterr().out


def test_kinds_of_errors_are_of_all_examples(runs, capsys):
    decoding.hashhop_errors(open_run(runs, "hops", n_examples=2))
    result, columns = load_result(runs / "hops", "eval_hashhop_n_examples-2")
    plain = json.loads((runs / "hops" / "eval_test.json").read_text())
    assert len(columns["example"]) == plain["metrics"]["exact_match"]["n"] > 2


@pytest.mark.slow
@pytest.mark.parametrize("name, n_figures", [("memory", 7), ("mqar", 3)])
def test_a_report_of_everything(runs, name, n_figures):
    eval_script.main(["all", str(runs / name), "--n_edits=[1]", "--n_examples=20"])
    report = (runs / name / "report_n_examples-20_n_edits-1.md").read_text()
    for command in ("logits", "attention", "stats", "edit"):
        assert f"## {command}\n" in report
    assert ("## routing\n" in report) == (name == "memory")
    if name == "memory":
        section = report.partition("## routing\n")[2].partition("```")[0]
        assert "- layer 1: " in section and "read the most similar slots" in section
    lines = [line for line in report.splitlines() if line.startswith("![")]
    assert len(lines) >= n_figures
    for line in lines:
        assert (runs / name / line.split("(")[1].removesuffix(")")).exists()
    assert ("(gpt has no memory layers)" in report) == (name == "mqar")


@pytest.fixture(scope="module")
def measured(runs):
    """The runs with their test results, and `other`: mqar on another seed of its data."""
    for name in ("mqar", "memory", "router"):
        eval_script.main([str(runs / name)])
    shutil.copytree(runs / "mqar", runs / "other")
    config = json.loads((runs / "other" / "config.json").read_text())
    config["data"]["seed"] += 1
    (runs / "other" / "config.json").write_text(json.dumps(config))
    return runs


@pytest.mark.parametrize(
    "args, message",
    [
        (["stats", "mqar", "other"], "not measured on the same examples; give both the same data"),
        (["stats", "mqar", "memory"], "were not measured on the same examples"),
        (["twohop", "memory"], "is a run of qa, not of twohop; run python eval.py qa"),
        (["activations", "mqar"], "mqar: gpt has no memory layers"),
        (["routing", "mqar"], "mqar: gpt has no memory layers"),
        (["routing", "router", "--data=gone.jsonl"], "gone.jsonl"),
        (["attention", "mqar", "--example=30"], "example=30 is not in test; the last is 29"),
        (["memory", "--example=99"], "example=99 is not in test; the last is 39"),
    ],
)
def test_what_does_not_fit_a_run_is_one_sentence(measured, args, message):
    args = [str(measured / arg) if (measured / arg).is_dir() else arg for arg in args]
    with pytest.raises(ConfigError, match=message) as error:
        eval_script.main(args)
    assert "\n" not in str(error.value)


def test_two_runs_on_the_same_examples_are_compared(measured, capsys):
    folders = [measured / name for name in ("memory", "router")]
    eval_script.main(["stats", *map(str, folders)])
    assert "McNemar" in capsys.readouterr().out
    result = json.loads((folders[1] / "eval_stats_against_memory.json").read_text())
    a, b = (pq.read_table(f / "eval_test.parquet").to_pydict() for f in folders)
    difference = np.mean(b["correct"]) - np.mean(a["correct"])
    assert result["metrics"]["all"]["accuracy difference"]["value"] == pytest.approx(difference)
