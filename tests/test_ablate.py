"""ablate.py: controls that must change nothing, naive twins, a model in which one slot holds one fact, and every command."""

import json
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import ablate
import memory
import model as M
import train
from analysis import hooks as I
from analysis import importance, patching
from eval import greedy_decode
from nanorecall.settings import ConfigError
from nanorecall.stats import clustered_mean_ci
from toys import ABLATION_SIZES as SIZES
from toys import ablation_model as make
from toys import latest
from toys import some_examples as some_cases

MODELS = [
    ("shared", dict()),
    ("apart", dict(mem_share_values=False)),
    ("gated", dict(mem_gated=True, mem_v_dim=4)),
    ("sigmoid", dict(mem_score="sigmoid", residual_mul=True)),
    ("biased", dict(mem_balance_rate=0.01)),  # slots are chosen in another order than that of their scores
]


@pytest.fixture(params=[*MODELS, ("router", dict())], ids=lambda p: p[0])
def model(request):
    name, changes = request.param
    return make(memory.MemoryRouterGPT if name == "router" else memory.MemoryGPT, **changes)


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


# ---- from a block's memory on ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_going_on_from_the_middle_is_the_whole_model(model):
    cases = some_cases()
    clean = I.run_with_cache(model, cases)
    whole = I.gather_labels(model(cases.tokens)[0], cases.at)
    torch.testing.assert_close(clean.logits, whole)
    for block, found in clean.found.items():
        again = I.forward_from(model, block, clean.stream[block], {k: found[k] for k in ("slots", "weights")}, cases.at)
        torch.testing.assert_close(again, whole)


def remove_naively(model, block, slot, mode, other, borrowed):
    """One slot removed in one block, written from the definition: a change for the whole model."""
    layer = model.memory_layers()[block]

    def change(found):
        slots, weights = found["slots"].clone(), found["weights"].clone()
        hit = slots == slot
        if mode == "zero":
            weights[hit] = 0
        elif mode in ("random", "resample"):
            slots[hit] = other if mode == "random" else borrowed
        elif mode == "mean":
            read = (layer.values[slots] * (weights * ~hit)[..., None]).sum((-2, -3))
            return {**found, "output": read + (weights * hit).sum((-1, -2))[..., None] * layer.values.mean(0)}
        return {"slots": slots, "weights": weights}

    return {block: change}


@torch.no_grad()
def drop_naively(model, block, slot, tokens):
    """The whole model with one slot's score at minus infinity, all slots scored."""

    def change(found, caught):
        layer, x = model.memory_layers()[block], caught[0]
        q = M.NORMS[layer.config.mem_query_norm](layer.query(x).unflatten(-1, (layer.config.mem_heads, 2, -1)))
        halves = torch.einsum("bthse,hske->bthsk", q, layer.keys)
        biased = halves if layer.bias is None else halves + layer.bias
        scores, chosen_by = ((h[..., 0, :, None] + h[..., 1, None, :]).flatten(-2) for h in (halves, biased))
        chosen_by[..., slot] = -torch.inf
        slots = chosen_by.topk(layer.config.mem_knn, dim=-1).indices
        return {"slots": slots, "weights": memory.SCORES[layer.config.mem_score](scores.gather(-1, slots))}

    caught = []
    hook = model.layers[block].ffn_norm.register_forward_hook(lambda module, inputs, output: caught.append(output))
    logits = model(tokens, intervene={block: lambda found: change(found, caught)})[0]
    hook.remove()
    return logits


@torch.no_grad()
@pytest.mark.parametrize("mode", I.ABLATIONS)
def test_many_removals_at_once_equal_one_whole_forward_pass_each(model, mode):
    """The batched sweep against its naive twin, every slot that the first rows read and one they do not."""
    cases = some_cases(B=3)
    found = ablate.remove_slots(model, cases, [mode], chunk=7)
    lead, _, _ = I.logit_diff(I.run_with_cache(model, cases).logits, cases.answers)
    n = cases.at.shape[1]
    assert (np.bincount(found["case"]) > 20).all() and found["control"].sum() == len(cases) * 2 * n
    random, seen = np.random.default_rng(0), 0
    for block in model.memory_layers():
        mine = found["layer"] == block
        case, slot = found["case"][mine][::n], found["slot"][mine][::n]
        other, borrowed = random.integers(25, size=len(case)), None
        control_or_not = found["control"][mine][::n]
        random_state = np.random.default_rng(1)
        for i in random_state.choice(len(case), 12, replace=False):
            tokens = cases.tokens[case[i] : case[i] + 1]
            if mode == "drop":
                logits = drop_naively(model, block, slot[i], tokens)
            elif mode in ("zero", "mean"):
                logits = model(tokens, intervene=remove_naively(model, block, slot[i], mode, other, borrowed))[0]
            else:
                if not control_or_not[i]:
                    continue  # which slot comes in is drawn: see the next test
                logits = model(tokens)[0]
            now, p, right = I.logit_diff(I.gather_labels(logits, cases.at[case[i] : case[i] + 1]), cases.answers[case[i] : case[i] + 1])
            np.testing.assert_allclose(found["fall"][mine].reshape(-1, n)[i], lead[case[i]] - now[0], atol=1e-4)
            np.testing.assert_allclose(found["p"][mine].reshape(-1, n)[i], p[0], atol=1e-5)
            seen += 1
    assert seen >= 12 or mode in ("random", "resample")


@torch.no_grad()
@pytest.mark.parametrize("mode", ["random", "resample"])
def test_another_slots_value_comes_in(mode):
    layer = make().memory_layers()[0]
    found = {"slots": torch.tensor([[[[3, 4], [3, 7]]]]), "weights": torch.tensor([[[[0.5, 0.5], [0.9, 0.1]]]])}
    removal = I.SlotAblation(layer, found, torch.tensor([3]), None, torch.tensor([11]), torch.tensor([12]))
    changed = I.ABLATIONS[mode](removal)
    comes = 11 if mode == "random" else 12
    assert changed["slots"].flatten().tolist() == [comes, 4, comes, 7] and torch.equal(changed["weights"], found["weights"])


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
@pytest.mark.parametrize("mode", I.ABLATIONS)
def test_a_slot_that_is_not_read_changes_nothing_bit_for_bit(model, mode):
    cases = some_cases()
    clean = I.run_with_cache(model, cases)
    for block, layer in model.memory_layers().items():
        stream, found = clean.stream[block], {k: clean.found[block][k] for k in ("slots", "weights")}
        unread = np.setdiff1d(np.arange(25), found["slots"][:1].unique())
        cell = lambda x: torch.full((1,), int(x))
        more = tuple(x[:1] for x in layer.topk_slots(model.layers[block].ffn_norm(stream), 4))
        one = {k: v[:1] for k, v in found.items()}
        changed = I.ABLATIONS[mode](I.SlotAblation(layer, one, cell(unread[0]), more, cell(1), cell(2)))
        before, after = (I.forward_from(model, block, stream[:1], f, cases.at[:1]) for f in (one, changed))
        if mode == "drop":  # its weights are made from the same scores again, in another order of work
            torch.testing.assert_close(before, after)
        else:
            assert torch.equal(before, after)


@torch.no_grad()
def test_all_slots_at_zero_are_the_layer_taken_out(model):
    cases = some_cases()
    silence = lambda found: {"slots": found["slots"], "weights": torch.zeros_like(found["weights"])}
    zeroed = I.run_with_hooks(model, cases, intervene=dict.fromkeys(model.memory_layers(), silence))
    changes = ablate.whole_block_changes(model)
    hooks = [hook for block in model.memory_layers() for hook in changes[block, "memory, full"][0]]
    assert torch.equal(zeroed, I.run_with_hooks(model, cases, hooks))
    assert not torch.allclose(zeroed, I.run_with_cache(model, cases).logits)


@torch.no_grad()
def test_values_and_keys_of_a_layer_taken_out(model):
    """Exchanged values: as a model whose table was permuted. Random slots: weights stay, slots are others."""
    cases, changes = some_cases(), ablate.whole_block_changes(model, seed=3)
    clean = I.run_with_cache(model, cases)
    for block in model.memory_layers():
        exchanged = changes[block, "memory, values"][1][block](clean.found[block])
        order = torch.empty(25, dtype=torch.long)
        order[clean.found[block]["slots"].flatten()] = exchanged["slots"].flatten()
        again = changes[block, "memory, values"][1][block](clean.found[block])
        assert torch.equal(order[clean.found[block]["slots"]], again["slots"])  # one permutation for all reads
        drawn = changes[block, "memory, keys"][1][block](clean.found[block])
        assert torch.equal(drawn["weights"], clean.found[block]["weights"])
        assert (drawn["slots"] == clean.found[block]["slots"]).float().mean() < 0.2
        assert not torch.allclose(I.run_with_hooks(model, cases, intervene=changes[block, "memory, keys"][1]), clean.logits)


@torch.no_grad()
def test_a_head_taken_out_is_its_columns_at_zero():
    for name, make_one in (("gpt", lambda: M.GPT(M.Config(**SIZES))), ("memory", make), ("delta", delta_model)):
        model = make_one().eval()
        cases = some_cases()
        for block, head in ((0, 1), (2, 0)):
            mixer = model.layers[block].att
            hooked = I.run_with_hooks(model, cases, [I.ablate_head(mixer.out_proj, mixer.n_heads, head)])
            kept = mixer.out_proj.weight.clone()
            mixer.out_proj.weight.unflatten(1, (mixer.n_heads, -1))[:, head] = 0
            torch.testing.assert_close(hooked, I.logits_at(model, cases.tokens, cases.at), msg=name)
            mixer.out_proj.weight.copy_(kept)
            assert not torch.allclose(hooked, I.logits_at(model, cases.tokens, cases.at))


def delta_model():
    import delta

    torch.manual_seed(0)
    return delta.DeltaNet(delta.Config(**SIZES))


@torch.no_grad()
def test_patching_a_run_into_itself_changes_nothing_and_every_site_of_b_gives_b(model):
    a, b = some_cases(seed=1), some_cases(seed=2)
    b.at = a.at
    kept = {}
    places = [(name, block, module) for name, blocks in I.hook_points(model).items() for block, module in blocks.items()]
    assert {name for name, *_ in places} >= {"stream", "mixer", "memory"}

    def run(cases, change):
        with I.hooked([I.hook_output(name, module, change((name, block))) for name, block, module in places]):
            return I.logits_at(model, cases.tokens, cases.at)

    first = run(a, lambda key: lambda x: kept.setdefault(key, x))
    assert torch.equal(first, I.logits_at(model, a.tokens, a.at))
    assert torch.equal(run(a, lambda key: lambda x: kept[key]), first)
    assert torch.equal(run(b, lambda key: lambda x: kept[key]), first)
    assert not torch.allclose(I.logits_at(model, b.tokens, b.at), first)


def test_hooks_are_gone_after_an_exception(model):
    def fail(*_):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        I.run_with_hooks(model, some_cases(), [(model.layers[1].att, "after", fail), (model.layers[0], "before", lambda *_: None)])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    I.logits_at(model, some_cases().tokens, some_cases().at)


@torch.no_grad()
def test_a_row_with_its_own_reading_decodes_as_before():
    model, cases = make(), some_cases()
    cases.at = torch.arange(4, 7).expand(6, -1)  # answers that stand together
    clean = I.run_with_cache(model, cases)
    i = torch.arange(6)
    changes = patching.source_reads(clean, cases, i, i)
    torch.testing.assert_close(I.run_with_hooks(model, cases, intervene=changes), clean.logits)
    plain = greedy_decode(model, cases.tokens[:, :5], 3)
    assert torch.equal(patching.decode_with(model, cases, {b: lambda found: found for b in clean.found}), plain)


# ---- one slot, one fact ------------------------------------------------------------------------------------------------


def planted(V=9, n=3):
    """A model without attention in which slot s holds what follows token s: (s + 4) mod 9. Tokens and answers are one-hot."""
    c = memory.Config(
        dim=2 * V, n_layers=1, n_heads=1, dk=2, dv=2, pos_emb="none", vocab_size=V, seq_len=2,
        memory_layers=(0,), mem_n_keys=n, mem_heads=1, mem_knn=2, mem_k_dim=2 * n, mem_query_norm="none",
    )  # fmt: skip
    model = memory.MemoryGPT(c).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.layers[0].ffn_norm.weight.fill_(1)
        model.final_norm.weight.fill_(1)
        layer = model.layers[0].memory
        for v in range(V):
            model.embed.weight[v, v] = 1
            layer.query.weight[v // n, v] = 20
            layer.query.weight[n + v % n, v] = 20
            layer.values[v, V + (v + 4) % V] = 1
            model.lm_head.weight[v, V + v] = 5
        for half in range(2):
            layer.keys[0, half] = torch.eye(n)
    tokens = torch.stack([torch.zeros(V, dtype=torch.long), torch.arange(V)], 1)
    answers = ((torch.arange(V) + 4) % V)[:, None]
    tags = {"exposures": np.arange(V)}
    return model, I.Examples(np.arange(V), tokens, torch.ones(V, 1, dtype=torch.long), answers, tags)


def test_removal_finds_the_slot_that_holds_the_fact():
    model, cases = planted()
    assert (I.run_with_cache(model, cases).logits.argmax(-1) == cases.answers).all()
    for mode in I.ABLATIONS:
        found = ablate.remove_slots(model, cases, [mode])
        holds = found["slot"] == cases.rows[found["case"]]
        lost = found["flip"] | (found["fall"] > 1)
        assert lost[holds].mean() > (0.8 if mode in ("random", "resample") else 0.99) and not lost[~holds].any()
        assert holds.sum() == 9


@pytest.mark.parametrize("name", ["force", "inject", "replace", "swap"])
def test_exchange_carries_the_fact(name):
    model, cases = planted()
    a, b = patching.draw_pairs(cases, 0, "any", 0)
    assert len(a) == 72
    columns = patching.exchanged(model, cases, a, b, name)
    assert columns["other's"].all() and columns["own lost"].all() and not columns["placebo"].any()
    assert (columns["p other"] > columns["p other before"]).all() and (columns["fall"] > 0).all()


def test_patch_finds_memory_at_the_label():
    model, cases = planted()
    other = cases.pick(np.roll(np.arange(9), 1))
    back, first, second = patching.recovered(model, cases, other)
    assert (first > 0).all() and (second < 0).all()
    np.testing.assert_allclose(back["memory", 0][1], 1, atol=1e-4)
    np.testing.assert_allclose(back["stream", 0][1], 1, atol=1e-4)
    np.testing.assert_allclose(back["memory", 0][0], 0, atol=1e-4)
    np.testing.assert_allclose(back["mixer", 0], 0, atol=1e-4)


def test_exchanges_by_hand():
    mine = {"slots": torch.tensor([[[1, 2, 3], [4, 5, 6]]]), "weights": torch.tensor([[[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]]])}
    other = {"slots": torch.tensor([[[7, 8, 9], [10, 11, 12]]]), "weights": torch.tensor([[[0.6, 0.3, 0.1], [0.2, 0.7, 0.1]]])}
    forced = patching.force(mine, other, torch.tensor([1]))
    assert forced["slots"].tolist() == [[[1, 2, 3], [11, 11, 11]]] and torch.equal(forced["weights"], mine["weights"])
    swapped = patching.swap(mine, other, torch.tensor([0]))
    assert swapped["slots"][0, 0].tolist() == [9, 7, 8]  # 0.5 reads the other's best, 0.3 its second, 0.2 its third
    assert patching.strongest(mine).tolist() == [6]
    assert patching.inject(mine, other, None) is other


def test_a_replaced_value_is_replaced_wherever_it_is_read():
    model = make()
    cases = some_cases()
    clean = I.run_with_cache(model, cases)
    i, place = torch.tensor([0, 1]), torch.tensor([2, 2])
    got = patching.forward_with_interchange(model, cases, clean, 0, "replace", i, i.flip(0), place, torch.zeros(2, dtype=torch.long))
    for m in range(2):
        read = lambda r: {k: clean.found[0][k][r, cases.at[r, 2]][None] for k in ("slots", "weights")}
        own, theirs = (patching.strongest(read(r)) for r in (m, 1 - m))
        swap = lambda found, own=own, theirs=theirs: {
            **found,
            "slots": torch.where(found["slots"] == own, theirs, found["slots"]),
        }
        without_read = lambda found, swap=swap: {k: v for k, v in swap(found).items() if k != "output"}
        with torch.no_grad():
            naive = model(cases.tokens[m : m + 1], intervene={0: without_read})[0][0, cases.at[m, 2]]
        torch.testing.assert_close(got[m], naive)


def test_pairs_by_type():
    cases = some_cases(B=6)
    for kind, count in (("any", 30), ("less_less", 6), ("more_more", 6), ("less_more", 9), ("more_less", 9)):
        a, b = patching.draw_pairs(cases, 0, kind, 0)
        assert len(a) == count and (a != b).all()
        names = patching.pair_types(cases.tags["exposures"], a, b)
        assert kind == "any" or set(names) == {kind}
    a, b = patching.draw_pairs(cases, 5, "any", 0)
    assert len({*zip(a.tolist(), b.tolist())}) == 5
    third = patching.control_answers(np.array([1, 2]), np.array([2, 3]), np.array([1, 2, 3]), 0)
    assert third.tolist() == [3, 1] and patching.control_answers(np.array([1]), np.array([2]), np.array([1, 2]), 0) == [-1]


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
    ablate.main(["all", str(runs / name), "--rows=8", "--pairs=20", "--modes=zero drop"])
    report = (runs / name / "ablate_report_rows-8_modes-zero-drop_pairs-20.md").read_text()
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
        assert set(swapped["type"]) <= {"less_less", "more_more", "less_more", "more_less"}


def result_labels(columns):
    return len(np.unique(columns["place"]))


@pytest.mark.parametrize(
    "words, message",
    [
        (["keys"], "name one run directory, as in: keys runs/RUN"),
        (["keyz", "two"], "'keyz' is no command; did you mean keys?"),
        (["keys", "two", "--modes=zero,drop"], "must be some of zero, drop"),
        (["keys", "two", "--type=more_more"], "keys does not use it, only force"),
        (["swap", "two", "--type=less"], "type='less' is unknown"),
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
    ablate.main(["keys", str(runs / "one"), "--rows=4", "--modes=zero"])
    path = runs / "one" / "ablate_keys_rows-4_modes-zero.json"
    result = json.loads(path.read_text())
    result["config"]["step"] += 1
    path.write_text(json.dumps(result))
    with pytest.raises(ConfigError, match="the checkpoint of step .*; measure again"):
        ablate.main(["impact", str(runs / "one"), "--rows=4", "--modes=zero"])


def test_rows_are_as_many_of_each_group(runs):
    from analysis.trained_run import open_run

    look = open_run(str(runs / "two"), ablate.AblateConfig(rows=10))
    cases = I.correct_cases(look)
    counts = {e: int((cases.tags["exposures"] == e).sum()) for e in np.unique(cases.tags["exposures"])}
    assert len(cases) <= 10 and max(counts.values()) <= 6
    logits = I.run_with_cache(look.model, cases).logits
    assert (logits.argmax(-1) == cases.answers).all()


def test_dropping_needs_a_next_best_slot(runs):
    from analysis.trained_run import open_run

    look = open_run(str(runs / "one"), ablate.AblateConfig(rows=4, modes="zero drop"))
    look.model.config.mem_knn = look.model.config.mem_n_keys
    with pytest.raises(ConfigError, match="modes=drop needs a slot more than mem_knn=8 of mem_n_keys=8"):
        ablate.keys(look)


def test_rows_of_the_most_frequent_shape():
    data = SimpleNamespace()
    tokens = torch.tensor([[1, 2, 3, 9], [1, 2, 3, 4], [4, 3, 2, 1]])
    targets = torch.tensor([[-100, 5, -100, -100], [-100, 6, -100, 7], [8, -100, 9, -100]])
    data.batch = lambda split, step, rows: (tokens, targets, {"t": np.array([0, 1, 1, 2, 2])})
    look = SimpleNamespace(data=data, config=SimpleNamespace(split="test"), pad=9, device="cpu")
    cases, left = I.read_cases(look, np.array([10, 11, 12]))
    assert left == 1 and cases.rows.tolist() == [11, 12] and cases.at.tolist() == [[1, 3], [0, 2]]
    assert cases.answers.tolist() == [[6, 7], [8, 9]] and cases.tags["t"].tolist() == [1, 2]
