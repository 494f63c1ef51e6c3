"""Looking inside a run: logits, slots, routing, attention maps, the report; each against a slow way or a planted truth."""

import doctest
import importlib
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import eval as ev
import memory
import model as M
import train
from analysis import attention_maps as maps_file
from analysis import confidence as logits_file
from analysis import memory_usage as slots_file
from analysis import routing
from analysis import trained_run as look_file
from nanorecall.ops import softmax_attention
from nanorecall.settings import ConfigError
from nanorecall.text import BYTES
from toys import latest


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A memory model, a router, a GPT over MQAR and HashHop with a memory layer, trained a little."""
    folder = tmp_path_factory.mktemp("runs")
    small = (
        "--n_layers=2 --dim=32 --dk=16 --dv=16 --conv_size=4 --init_std=1 --lr=1e-2 --num_threads=1 --mem_log_interval=10 --batch_size=64"
    )
    facts = (
        "--data=data_synth --task=qa --num_pairs=40 --buckets=[4,16] --mem_n_keys=8 --mem_k_dim=16 --mem_knn=4 --mem_heads=2"
    )
    hops = "--data=data_synth --task=hashhop --max_bytes=220 --num_queries=3 --n_val_examples=10 --n_test_examples=12"
    mqar = "--n_layers=2 --dim=32 --dk=16 --dv=16 --conv_size=2 --lr=1e-2 --num_threads=1 --vocab_size=32 --input_seq_len=16"
    for name, words in (
        ("memory", f"{small} {facts} --model=memory --memory_layers=[0,1] --mem_share_values=0 --max_steps=60"),
        ("router", f"{small} {facts} --model=memory_router --memory_layers=[1] --max_steps=20"),
        ("hops", f"{small} {hops} --model=memory --memory_layers=[1] --hops=[1,2] --cot_frac=0.5 --max_steps=10"),
        ("mqar", f"{mqar} --num_kv_pairs=4 --n_val_examples=20 --n_test_examples=30 --max_steps=10"),
    ):
        train.main([*words.split(), f"--run_name={name}", f"--log_dir={folder}"])
    return folder


def open_look(runs, name, **changes):
    config = ev.EvalConfig(rows=changes.pop("rows", 0), **changes)
    return look_file.open_run(str(runs / name), config)


def saved(runs, name, what):
    """-> result, columns of its parquet file"""
    folder, what = runs / name, latest(runs / name, f"eval_{what}")
    result = json.loads((folder / f"{what}.json").read_text())
    assert set(result) == {"config", "metrics", "by_slice", "examples"}
    assert (folder / f"{what}.png").stat().st_size > 5000
    return result, {k: np.array(v) for k, v in pq.read_table(folder / f"{what}.parquet").to_pydict().items()}


@pytest.mark.parametrize("file", [
        "nanorecall.stats",
        "analysis.repair",
        "analysis.routing",
        "eval",
        "analysis.importance",
        "myriadlama.prompts",
    ])
def test_the_examples_in_docstrings(file):
    result = doctest.testmod(importlib.import_module(file))
    assert result.attempted > 0 and result.failed == 0


# ---- rows, batches, ranks ----------------------------------------------------------------------------------------------


def test_rows_are_as_many_of_each_segment(runs):
    look = open_look(runs, "hops", rows=8, eval_batch_size=3)
    rows = np.concatenate(look_file.batches(look))
    segments = look.data.eval_groups("test")
    assert [sum(r in s for r in rows) for s in segments] == [2] * len(segments) and len(set(rows)) == len(rows)
    assert len(np.concatenate(look_file.batches(open_look(runs, "hops")))) == sum(map(len, segments))


@pytest.mark.parametrize("name", ["memory", "hops", "mqar"])
def test_one_row_at_a_time_gives_the_same(runs, name):
    """Batched or not, also where rows of different lengths are padded: the same ranks, losses and slots."""
    found = []
    for size in (1, 64):
        look = open_look(runs, name, eval_batch_size=size)
        found.append(look_file.map_batches(look, lambda batch: logits_file.score_answer_tokens(look, batch)))
    one, many = found
    assert np.array_equal(one["rank"], many["rank"]) and np.array_equal(one["row"], many["row"])
    np.testing.assert_allclose(one["nll"], many["nll"], atol=2e-5)


def test_ranks_share_the_rows_and_agree_with_one_process(runs, on_ranks, capfd):
    commands = [["logits", str(runs / "memory")], ["activations", str(runs / "memory")], [str(runs / "mqar")]]
    for words in commands:
        ev.main([*words, "--eval_batch_size=7"])
    alone = [
        (runs / name).read_bytes()
        for name in ("memory/eval_logits.json", "memory/eval_activations.json", "mqar/eval_test.json")
    ]
    for words in commands:
        assert on_ranks(2, lambda rank: ev.main([*words, "--eval_batch_size=7", "--device=cpu"])) == [0, 0]
    ranks = [
        (runs / name).read_bytes()
        for name in ("memory/eval_logits.json", "memory/eval_activations.json", "mqar/eval_test.json")
    ]
    assert alone == ranks


# ---- logits ------------------------------------------------------------------------------------------------------------


def test_logits_by_hand(runs):
    """Logits (0, 1, 2, 3): the second best token has rank 2 and probability e^2 / (1 + e + e^2 + e^3)."""
    look = SimpleNamespace(model=lambda tokens, targets: (torch.tensor([[0.0, 1.0, 2.0, 3.0], [5.0, 0.0, 0.0, 0.0]]), None))
    batch = SimpleNamespace(
        tokens=None, targets=torch.tensor([[-100, 2, 0]]), rows=np.array([7]), tags={"kind": np.array([1, 2])}
    )
    found = logits_file.score_answer_tokens(look, batch)
    total = np.exp([0, 1, 2, 3]).sum()
    assert found["rank"].tolist() == [2, 1] and found["row"].tolist() == [7, 7] and found["place"].tolist() == [0, 1]
    assert (
        found["probability"][0] == pytest.approx(np.exp(2) / total)
        and found["top"].tolist()[0] == [3, 2, 1, 0]
        and found["hit"].tolist() == [False, True]
    )
    p = np.exp([0, 1, 2, 3]) / total
    assert found["entropy"][0] == pytest.approx(-(p * np.log(p)).sum(), rel=1e-5)


def test_calibration_by_hand():
    """Ten labels at 0.85 of which 6 are right, ten at 0.25 of which 5 are: both 0.25 off."""
    confidence = np.repeat([0.85, 0.25], 10)
    bins, error = logits_file.calibration(confidence, np.array([1] * 6 + [0] * 4 + [1] * 5 + [0] * 5) == 1, np.arange(20))
    assert error == pytest.approx(0.25) and [b["value"] for b in bins] == [0.5, 0.6]


def test_logits_agree_with_slices(runs):
    ev.main(["logits", str(runs / "memory")])
    ev.main(["qa", str(runs / "memory")])
    found, columns = saved(runs, "memory", "logits")
    plain = json.loads((runs / "memory" / "eval_test.json").read_text())
    assert found["metrics"]["accuracy"] == plain["metrics"]["accuracy"]
    assert np.log(found["metrics"]["perplexity"]["value"]) == pytest.approx(plain["metrics"]["loss"]["value"], rel=1e-4)
    assert found["metrics"]["row_accuracy"]["value"] == plain["metrics"]["row_accuracy"]["value"]
    for tag, cells in plain["by_slice"].items():
        for value, cell in cells.items():
            assert found["by_slice"][tag][value]["accuracy"]["value"] == cell["value"]
    example = found["examples"][0]
    assert example["prompt"].endswith(":") and len(example["ranks"]) == 6 and len(example["top_5"][0]) == 5
    assert (columns["rank"] == 1).mean() == found["metrics"]["accuracy"]["value"]


# ---- slots -------------------------------------------------------------------------------------------------------------


def test_reads_are_the_trace_one_by_one(runs):
    look = open_look(runs, "hops", eval_batch_size=5, rows=8)
    found = look_file.map_batches(look, lambda batch: slots_file.slot_reads(look, batch))
    expected = []
    for rows in look_file.batches(look):
        tokens, targets, *_ = look.data.batch("test", 0, rows)
        with torch.no_grad():
            trace = look.model(tokens, trace=True)[2]
        for layer, f in zip(look.model.memory_layers(), trace):
            for b, t in [(b, t) for b in range(len(tokens)) for t in range(tokens.shape[1]) if tokens[b, t] != look.pad]:
                for h in range(f["slots"].shape[2]):
                    for slot, weight in zip(f["slots"][b, t, h].tolist(), f["weights"][b, t, h].tolist()):
                        labelled = bool(targets[b, t] != -100)
                        expected.append((int(rows[b]), t, int(tokens[b, t]), labelled, layer, h, slot, weight))
    names = ("row", "position", "token", "labelled", "layer", "head", "slot", "weight")
    ours = list(zip(*(found[n].tolist() for n in names)))
    assert ours == [pytest.approx(e) for e in expected]


def test_use_by_hand():
    """Three reads of slot 0 and one of slot 2 of four: entropy 0.562 nats is 1.75 slots, ln 4 - 0.562 from even."""
    use = slots_file.usage_stats(np.array([0, 0, 2, 0]), 4)
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert use["used"] == 2 and use["share"] == 0.5
    assert use["effective"] == pytest.approx(np.exp(entropy)) and use["kl"] == pytest.approx(np.log(4) - entropy)


def test_activations_norms_and_track(runs, capsys):
    for what in ("activations", "norms", "track"):
        ev.main([what, str(runs / "memory"), "--rows=0"])
    result, reads = saved(runs, "memory", "activations")
    n = len(reads["slot"])
    assert n == 40 * 15 * 2 * 2 * 4  # rows, tokens, layers, heads, slots
    assert result["by_slice"]["layer"]["0"]["used"] == len(np.unique(reads["slot"][reads["layer"] == 0]))
    first = result["examples"][0]["top_slots"]["layer 1"]["position 7"][0]
    here = (reads["row"] == result["examples"][0]["row"]) & (reads["layer"] == 1) & (reads["position"] == 7)
    best = np.flatnonzero(here)[np.argmax(reads["weight"][here])]
    assert first[0] * 8 + first[1] == reads["slot"][best] and first[2] == pytest.approx(reads["weight"][best], abs=1e-4)
    result, tokens = saved(runs, "memory", "track")
    assert tokens["times"].sum() == n
    i = int(np.argmax(tokens["times"]))
    mine = (
        (reads["layer"] == tokens["layer"][i]) & (reads["slot"] == tokens["slot"][i]) & (reads["token"] == tokens["token"][i])
    )
    assert mine.sum() == tokens["times"][i] and reads["weight"][mine].sum() == pytest.approx(tokens["weight"][i], rel=1e-5)
    assert result["metrics"]["while training"]["0"]["share"] <= 1
    here = tokens["layer"] == 1
    slots, of_slot = tokens["slot"][here], tokens["times"][here]
    purest = [of_slot[slots == slot].max() / of_slot[slots == slot].sum() for slot in set(slots)]
    purity = result["metrics"]["share of a slot's most frequent token"]["1"]
    assert purity["value"] == pytest.approx(np.mean(purest)) and purity["n"] == len(purest)
    result, norms = saved(runs, "memory", "norms")
    model = open_look(runs, "memory").model
    lengths = model.memory_layers()[0].values.norm(dim=1)
    cells = [c for name, c in result["metrics"]["layers 0"].items()]
    assert sum(c["value"] * c["n"] for c in cells) == pytest.approx(float(lengths.detach().sum()), rel=1e-4)
    cell, here = result["by_slice"]["layer and position"]["1, 3"], norms["layer"] == 1
    lengths = norms["norm"][here & (norms["position"] == 3)]
    assert cell["n"] == 40 and cell["std"] == pytest.approx(np.std(lengths), rel=1e-5)


def test_a_shared_table_is_counted_once(runs):
    config = memory.Config(dim=8, dk=4, dv=4, n_layers=2, memory_layers=(0, 1), mem_n_keys=4, mem_knn=2, mem_k_dim=4)
    read = {"slot": np.array([1, 2]), "layer": np.array([0, 1])}
    shared = slots_file.value_norms(memory.MemoryGPT(config), read)
    assert list(shared) == ["layers 0 1"] and shared["layers 0 1"][1].sum() == 2
    config.mem_share_values = False
    apart = slots_file.value_norms(memory.MemoryGPT(config), read)
    assert [used.nonzero()[0].tolist() for _, used in apart.values()] == [[1], [2]]


# ---- routing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias, share", [((30.0, -30.0), 0.0), ((-30.0, 30.0), 1.0)])
def test_a_router_fixed_to_one_way_says_so(runs, bias, share):
    look = open_look(runs, "router")
    with torch.no_grad():
        look.model.layers[1].router.weight.zero_()
        look.model.layers[1].router.bias.copy_(torch.tensor(bias))
    routing.routing(look)
    result, columns = saved(runs, "router", "routing")
    shares = [c["value"] for cells in result["by_slice"].values() for c in cells.values()]
    assert shares == pytest.approx([share] * len(shares), abs=1e-12)
    assert set(columns["kind"]) == {"special", "digit", "colon", "blank"} and set(columns["decile"]) == set(range(10))


def test_same_tokens_take_the_same_slots_where_only_the_token_counts(runs):
    """A model without attention reads the same slots for the same token everywhere, and kinds differ."""
    look = open_look(runs, "memory")
    for layer in look.model.layers:
        layer.att = None
    found = look_file.map_batches(look, lambda batch: routing.routing_table(look, batch))
    cells = routing.consistency(found)["1"]
    assert cells["same token"]["slots in common"]["value"] == 1
    assert cells["other kind"]["slots in common"]["value"] < 0.9
    kinds, alike = routing.similarity_of_kinds(found, 1, 64)
    np.testing.assert_allclose(np.diag(alike), 1)


def test_texts_of_a_file_are_routed(runs, tmp_path, capsys):
    path = tmp_path / "t.jsonl"
    path.write_text('{"question": "Tom has 3+4", "answer": "7 (seven)"}\n{"text": "the end"}\n' * 3)
    ev.main(["routing", str(runs / "router"), f"--data={path}", "--eval_batch_size=2"])
    result, columns = saved(runs, "router", "routing")
    assert result["metrics"]["data"] == str(path) and set(columns["row"]) == set(range(6))
    words = BYTES.encode("Tom has 3+4 7 (seven)")[: open_look(runs, "router").data.seq_len - 1]
    assert columns["token"][columns["row"] == 0].tolist() == [BYTES.bos, *words.tolist()]
    with pytest.raises(ConfigError, match="gone.jsonl"):
        ev.main(["routing", str(runs / "router"), "--data=gone.jsonl"])


# ---- attention ---------------------------------------------------------------------------------------------------------


def test_maps_are_softmax_of_queries_and_keys_by_hand():
    torch.manual_seed(0)
    model = M.GPT(M.Config(dim=8, n_layers=2, n_heads=2, n_kv_heads=1, dk=4, dv=4, pos_emb="none", vocab_size=9, seq_len=6)).eval()
    tokens = torch.randint(9, (3, 6))
    found = maps_file.attention_maps(model, tokens)
    x = model.layers[0].att_norm(model.embed(tokens))
    att = model.layers[0].att
    q, k = att.proj_q(x).view(3, 6, 2, 4), att.proj_k(x)
    for b, h, t in [(0, 0, 0), (1, 1, 3), (2, 0, 5)]:
        scores = torch.stack([q[b, t, h] @ k[b, s] / 2 for s in range(t + 1)])
        torch.testing.assert_close(found[0][b, h, t, : t + 1], scores.softmax(0))
        assert (found[0][b, h, t, t + 1 :] == 0).all()
    for weights in found.values():
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, 6))
    assert all("attention_fn" not in layer.att.__dict__ for layer in model.layers)


def test_weights_times_values_are_what_attention_gives():
    """Whatever comes before the scores (rotary positions, norms, convolution), the map is the one that was used."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 7, 6), torch.randn(2, 2, 7, 6), torch.randn(2, 2, 7, 5)
    weights = maps_file.attention_weights(q, k)
    torch.testing.assert_close(weights @ v.repeat_interleave(2, 1), softmax_attention(q, k, v))


def test_no_weight_crosses_documents():
    torch.manual_seed(0)
    model = M.GPT(M.Config(dim=8, n_layers=1, n_heads=2, dk=4, dv=4, vocab_size=9, seq_len=6)).eval()
    tokens = torch.randint(9, (1, 9))
    packed = maps_file.attention_maps(model, tokens, torch.tensor([0, 4, 9], dtype=torch.int32))[0]
    assert (packed[0, :, 4:, :4] == 0).all() and (packed[0, :, :4, 4:] == 0).all()
    torch.testing.assert_close(packed[:, :, 4:, 4:], maps_file.attention_maps(model, tokens[:, 4:])[0])
    torch.testing.assert_close(packed[:, :, :4, :4], maps_file.attention_maps(model, tokens[:, :4])[0])


def test_hooks_are_gone_after_an_exception():
    model = M.GPT(M.Config(dim=8, n_layers=2, n_heads=1, dk=4, dv=4, vocab_size=9, seq_len=4))
    with pytest.raises(IndexError):
        maps_file.attention_maps(model, torch.tensor([[99]]))
    assert all("attention_fn" not in layer.att.__dict__ for layer in model.layers)


def scores_of(q, k):
    """Scaled scores (B, H, T, T), and which tokens are seen."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    T = q.shape[2]
    return q @ k.mT / q.shape[-1] ** 0.5, torch.ones(T, T).tril()


def sigmoid_weights(q, k):
    scores, seen = scores_of(q, k)
    return scores.sigmoid() * seen


def window_weights(q, k):
    """Softmax over the token and the one before it."""
    scores, seen = scores_of(q, k)
    return scores.masked_fill((seen - seen.tril(-2)) == 0, -torch.inf).softmax(-1)


def linear_weights(q, k):
    """Of any sign, and any sum."""
    scores, seen = scores_of(q, k)
    return scores * seen


def attend_with(weights):
    def attend(q, k, v, rows=None, documents=None):
        return weights(q, k) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)

    return attend


def fork(cls=M.GPT, **parts):
    """A model whose mixers are of a subclass with these attributes."""
    mixer = type("Mixer", (cls.block.mixer,), parts)
    block = type("Block", (cls.block,), {"mixer": mixer})
    torch.manual_seed(0)
    sizes = dict(dim=8, n_layers=2, n_heads=2, n_kv_heads=1, dk=4, dv=6, du=4, k_kernel="silu")
    return type("Fork", (cls,), {"block": block})(M.Config(**sizes, vocab_size=9, seq_len=6)).eval()


@pytest.mark.parametrize("cls", [M.GPT, M.UnifiedKV])
@pytest.mark.parametrize("weights", [sigmoid_weights, window_weights])
def test_maps_of_a_fork_are_those_of_its_own_attend(cls, weights):
    caught = []

    def attend(q, k, v, rows=None, documents=None):
        caught.append((q, k))
        return attend_with(weights)(q, k, v)

    model = fork(cls, attention_fn=staticmethod(attend))
    assert maps_file.why_not_maps(model) == ""
    caught.clear()
    for block, found in maps_file.attention_maps(model, torch.arange(6)[None]).items():
        torch.testing.assert_close(found, weights(*caught[block]))
    assert (found.sum(-1) - 1).abs().max() > 0.1 or weights is window_weights


def test_a_method_or_an_attribute_may_attend():
    def method(self, *args):
        return attend_with(sigmoid_weights)(*args)

    one, two = fork(attention_fn=method), fork()
    for layer in two.layers:
        layer.att.attention_fn = attend_with(sigmoid_weights)
    expected = maps_file.attention_maps(one, torch.arange(6)[None])
    for model in (one, two):
        before = [vars(layer.att).get("attention_fn") for layer in model.layers]
        torch.testing.assert_close(maps_file.attention_maps(model, torch.arange(6)[None]), expected)
        assert [vars(layer.att).get("attention_fn") for layer in model.layers] == before


def twice(self, x, rows=None, **extra):
    """Differential attention: one map less another."""
    return M.CausalSelfAttention.forward(self, x) - M.CausalSelfAttention.forward(self, x.flip(-1))


NO_MAPS = {
    "block 0 called its attention_fn 0 times": dict(forward=lambda self, x, rows=None, **extra: x),
    "block 0 called its attention_fn 2 times": dict(forward=twice),
    "block 0 attends with is no weighted sum": dict(
        attention_fn=staticmethod(lambda q, k, v, *_: attend_with(sigmoid_weights)(q, k, v).tanh())
    ),
    "are below 0": dict(attention_fn=staticmethod(attend_with(linear_weights))),
    "attention maps need softmax attention": dict(attention_fn=None, forward=lambda self, x, *_, **__: x),
}


@pytest.mark.parametrize("message, parts", NO_MAPS.items(), ids=NO_MAPS)
def test_what_has_no_one_map_is_refused(message, parts):
    assert message in maps_file.why_not_maps(fork(**parts))


def test_shares_of_attention_that_does_not_sum_to_one():
    weights = torch.tensor([[[[0.5, 0.0, 0.0], [0.9, 0.3, 0.0], [0.0, 0.0, 0.0]]]])
    found = maps_file.pattern_scores(weights, torch.tensor([[1, 2, 3]]), torch.ones(1, 3, dtype=torch.bool))
    assert found["previous token"].item() == pytest.approx((0.75 + 0) / 2)
    assert found["itself"].item() == pytest.approx((0.25 + 0) / 2)


def induction_model(V, T):
    """Two blocks by hand: the first copies the token before into each place, the second looks for places behind its token.

    The residual stream holds the token (V), its position (T) and the token before (V), one-hot each.
    """
    D, sharp = 2 * V + T, 200.0
    width = max(V, T)
    c = M.Config(dim=D, n_layers=2, n_heads=1, dk=width, dv=width, pos_emb="learned", vocab_size=V, seq_len=T)
    model = M.GPT(c).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        for norm in (model.final_norm, *(layer.att_norm for layer in model.layers)):
            norm.weight.fill_(1)
        model.embed.weight[:, :V] = torch.eye(V)
        model.pos_embed.weight[:, V : V + T] = torch.eye(T)
        first, second = (layer.att for layer in model.layers)
        for t in range(1, T):
            first.proj_q.weight[t - 1, V + t] = sharp  # position t asks for position t - 1
        for t in range(T):
            first.proj_k.weight[t, V + t] = 1
        for v in range(V):
            first.proj_v.weight[v, v] = 1
            first.out_proj.weight[V + T + v, v] = 1
            second.proj_q.weight[v, v] = sharp  # this token
            second.proj_k.weight[v, V + T + v] = 1  # behind an earlier one
    return model


def test_a_hand_built_induction_head_is_found():
    model = induction_model(12, 16)
    torch.manual_seed(0)
    tokens = torch.stack([torch.randperm(12)[:8].repeat(2) for _ in range(6)])  # every token comes twice
    found = {}
    for layer, weights in maps_file.attention_maps(model, tokens).items():
        cells = maps_file.pattern_scores(weights, tokens, torch.ones_like(tokens, dtype=torch.bool))
        found[layer] = {name: float(x.nanmean()) for name, x in cells.items()}
    assert maps_file.head_role(found[0]) == "previous token" and found[0]["previous token"] > 0.99
    assert maps_file.head_role(found[1]) == "induction" and found[1]["induction"] > 0.9
    even = torch.ones(6, 1, 16, 16).tril()
    even = maps_file.pattern_scores(even / even.sum(-1, keepdim=True), tokens, torch.ones_like(tokens, dtype=torch.bool))
    assert maps_file.head_role({n: float(x.nanmean()) for n, x in even.items()}) == "diffuse"


def test_patterns_leave_padding_and_impossible_tokens_out():
    ids = torch.tensor([[5, 6, 5, 0]])
    weights = torch.zeros(1, 1, 4, 4)
    weights[0, 0, 0, 0] = weights[0, 0, 1, 0] = weights[0, 0, 3, 3] = 1
    weights[0, 0, 2, 1] = 1  # the second 5 looks at what came behind the first
    cells = maps_file.pattern_scores(weights, ids, torch.tensor([[True, True, True, False]]))
    assert float(cells["induction"]) == 1 and float(cells["previous token"]) == 1 and float(cells["itself"]) == 0
    assert torch.isnan(
        maps_file.pattern_scores(weights, ids[:, [1, 0, 3, 3]] + torch.arange(4), torch.ones(1, 4) == 1)["induction"]
    ).all()


def test_attention_of_a_run(runs, capsys):
    ev.main(["attention", str(runs / "mqar"), "--example=4"])
    result, columns = saved(runs, "mqar", "attention")
    example = result["examples"][0]
    assert example["row"] == 4 and len(example["tokens"]) == 16
    head = np.array(example["weights"]["layer_1"]["head_0"])
    assert head.shape == (16, 16) and np.allclose(head.sum(-1), 1, atol=2e-3)
    assert (runs / "mqar" / "attention_example-4" / "layer_1_head_0.png").exists() and len(columns["row"]) == 30 * 2 * 2
    with pytest.raises(ConfigError, match="example=30 is no row of test; the last is 29"):
        ev.main(["attention", str(runs / "mqar"), "--example=30"])


# ---- hashhop, report, mistakes -----------------------------------------------------------------------------------------


def test_right_answers_of_hashhop_are_those_that_slices_count(runs, capsys):
    ev.main(["hashhop", str(runs / "hops"), "--eval_batch_size=7", "--example=2"])
    result, columns = saved(runs, "hops", "hashhop")
    plain = json.loads((runs / "hops" / "eval_test.json").read_text())
    assert set(plain["by_slice"]["hops_cot"]) == set(result["by_slice"]["hops"])
    for level, cells in result["by_slice"]["hops"].items():
        assert cells["right"]["value"] == plain["by_slice"]["hops_cot"][level]["exact"]["value"]
        assert sum(c["value"] for c in cells.values()) == pytest.approx(1)
    assert "COMPLETION:" in plain["examples"][0]["prompt"] and plain["examples"][0]["row"] == 2
    assert "  model " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["memory", "mqar"])
def test_a_report_of_everything(runs, name, capsys):
    ev.main(["all", str(runs / name), "--edits=[1]", "--rows=20"])
    report = (runs / name / "report_rows-20_edits-1.md").read_text()
    for word in ("logits", "attention", "routing", "edit", "stats"):
        assert f"## {word}\n" in report
    figures = [line.split("(")[1][:-1] for line in report.splitlines() if line.startswith("![")]
    assert len(figures) >= (7 if name == "memory" else 4) and all((runs / name / f).exists() for f in figures)
    assert ("Left out: gpt has no memory layers" in report) == (name == "mqar")


@pytest.mark.parametrize(
    "words, message",
    [
        (["stats", "mqar", "other"], "were not measured on the same rows; give both the same data, seed and split"),
        (["twohop", "memory"], "is a run of qa, not of twohop: python eval.py qa"),
        (["activations", "mqar"], "gpt has no memory layers"),
        (["routing", "mqar"], "gpt has no memory layers"),
        (["logits", "memory", "--examples=3"], "logits does not use it, only"),
        (["logits"], "name one run directory, as in: logits runs/RUN"),
        (["stats", "mqar", "memory"], "were not measured on the same rows"),
        (["memory", "--example=99"], "example=99 is no row of test; the last is 39"),
        (["routing", "memory", "--rows=-1"], "rows=-1 must be at least 0"),
    ],
)
def test_mistakes_are_one_sentence(runs, words, message):
    for name in ("mqar", "memory"):
        ev.main([str(runs / name)])
    words = [str(runs / w) if w in ("memory", "mqar", "other") else w for w in words]
    if "other" in " ".join(words) and not (runs / "other").exists():  # the same rows by their tags, another seed
        shutil.copytree(runs / "mqar", runs / "other")
        config = json.loads((runs / "other" / "config.json").read_text())
        config["data"]["seed"] += 1
        (runs / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message) as error:
        ev.main(words)
    assert "\n" not in str(error.value)


def test_two_runs_on_the_same_rows_are_compared(runs, capsys):
    for name in ("memory", "router"):
        ev.main([str(runs / name)])
    capsys.readouterr()
    ev.main(["stats", str(runs / "memory"), str(runs / "router")])
    assert "McNemar" in capsys.readouterr().out
    result = json.loads((runs / "router" / "eval_stats_against_memory.json").read_text())
    a, b = (pq.read_table(runs / n / "eval_test.parquet").to_pydict() for n in ("memory", "router"))
    difference = np.mean(b["hit"]) - np.mean(a["hit"])
    assert result["metrics"]["all"]["accuracy difference"]["value"] == pytest.approx(difference)
