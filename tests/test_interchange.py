"""Interchange interventions: by hand, against full forward passes, and on a model of which the slot
of each fact is known (analysis/interchange.py, swap_matrix.py, swap_results.py)."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from analysis import hooks, interchange, swap_matrix, swap_results
from analysis.decoding import greedy_decode
from nanorecall.settings import ConfigError
from planted import planted_facts
from toys import ablation_model, some_examples

# ---- pairs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, n_pairs",
    [("any", 30), ("less_less", 6), ("more_more", 6), ("less_more", 9), ("more_less", 9)],
)
def test_pairs_by_exposures(kind, n_pairs):
    """Exposures 0 to 5: three examples are above the median."""
    examples = some_examples(B=6)
    base, source = interchange.draw_pairs(examples, 0, kind, 0)
    assert len(base) == n_pairs and (base != source).all()
    names = interchange.name_exposure_pairs(examples.slices["exposures"], base, source)
    assert kind == "any" or set(names) == {kind}


def test_high_exposures_are_above_the_median():
    """Of exposures 1, 4, 4, 4 and 9 only 9 is high."""
    exposures = np.array([1, 4, 4, 4, 9])
    examples = some_examples(B=5)
    examples.slices = {"exposures": exposures}
    for kind, n_pairs in (("less_less", 12), ("less_more", 4), ("more_less", 4)):
        assert len(interchange.draw_pairs(examples, 0, kind, 0)[0]) == n_pairs
    with pytest.raises(ConfigError, match="there is no such pair"):
        interchange.draw_pairs(examples, 0, "more_more", 0)
    base, source = np.array([0, 4, 1]), np.array([1, 3, 4])
    names = interchange.name_exposure_pairs(exposures, base, source)
    assert names.tolist() == ["less_less", "more_less", "less_more"]


def test_pairs_are_drawn_by_the_seed_without_repetition():
    drawn = []
    for seed in (1, 1, 2):
        base, source = interchange.draw_pairs(some_examples(B=6), 25, "any", seed)
        drawn.append(list(zip(base.tolist(), source.tolist())))
    assert len(set(drawn[0])) == 25
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_control_answer_is_neither_of_both():
    def control(base, source, alphabet):
        arrays = [np.array(x) for x in (base, source, alphabet)]
        return interchange.control_answers(*arrays, seed=0).tolist()

    assert control([1, 2], [2, 3], [1, 2, 3]) == [3, 1]
    assert control([1], [2], [1, 2]) == [-1]


# ---- interchange of reads ------------------------------------------------------------------------


def test_force_inject_swap_on_two_heads():
    base = {
        "slots": torch.tensor([[[1, 2, 3], [4, 5, 6]]]),
        "weights": torch.tensor([[[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]]]),
    }
    source = {
        "slots": torch.tensor([[[7, 8, 9], [10, 11, 12]]]),
        "weights": torch.tensor([[[0.6, 0.3, 0.1], [0.2, 0.7, 0.1]]]),
    }
    forced = interchange.force(base, source, torch.tensor([1]))
    assert forced["slots"].tolist() == [[[1, 2, 3], [11, 11, 11]]]
    assert torch.equal(forced["weights"], base["weights"])
    # Weight 0.5 reads the source's best slot, 0.3 its second, 0.2 its third.
    swapped = interchange.swap(base, source, None)
    assert swapped["slots"][0, 0].tolist() == [9, 7, 8]
    assert torch.equal(swapped["weights"], base["weights"])
    assert interchange.inject(base, source, None) is source
    assert interchange.strongest_slot(base).tolist() == [6]


@torch.no_grad()
def test_replace_changes_every_read_of_the_slot():
    """Two examples, each the other's source, at their third label, in block 0."""
    model, examples = ablation_model(), some_examples()
    clean = hooks.run_with_cache(model, examples)
    base, answer_pos = torch.tensor([0, 1]), torch.tensor([2, 2])
    logits = interchange.forward_with_interchange(
        model, examples, clean, 0, "replace", base, base.flip(0), answer_pos, None
    )
    strongest = []
    for b in range(2):
        at_label = ([b], examples.label_pos[b, 2][None])
        reads = hooks.index_reads(clean.reads[0], at_label)
        strongest.append(interchange.strongest_slot(reads))
    for b in range(2):

        def replace(reads, old=strongest[b], new=strongest[1 - b]):
            slots = torch.where(reads["slots"] == old, new, reads["slots"])
            return {"slots": slots, "weights": reads["weights"]}

        naive = model(examples.tokens[b][None], intervene={0: replace})[0]
        torch.testing.assert_close(logits[b], naive[0, examples.label_pos[b, 2]])


@pytest.mark.parametrize("name", ["force", "inject", "replace", "swap"])
def test_interchange_carries_the_fact(name):
    model, examples = planted_facts()
    base, source = interchange.draw_pairs(examples, 0, "any", 0)
    assert len(base) == 9 * 8
    columns = interchange.interchange_effects(model, examples, base, source, name)
    assert columns["source_answer"].all() and columns["base_lost"].all()
    assert not columns["control_answer"].any()
    assert (columns["p_source"] > columns["p_source_clean"]).all() and (columns["drop"] > 0).all()


@torch.no_grad()
def test_effects_of_inject_equal_full_forwards():
    """One pair: example 0 reads in one block what example 1 reads at its label. All columns."""
    model, examples = ablation_model(mem_share_values=False), some_examples(B=2)
    examples.answers[:, 1] = examples.answers[0, 1]  # the same answer: left out
    pair = np.array([0]), np.array([1])
    columns = interchange.interchange_effects(model, examples, *pair, "inject", seed=3)
    assert columns["layer"].tolist() == [0, 0, 2, 2]
    assert columns["answer_pos"].tolist() == [0, 2, 0, 2]
    assert (columns["example"] == 0).all() and (columns["source_example"] == 1).all()
    clean_logits, _, reads = model(examples.tokens, trace=True)
    reads = dict(zip((0, 2), reads))
    answers = examples.answers.numpy()
    base_answers, source_answers = answers[:, [0, 2]]
    control = interchange.control_answers(base_answers, source_answers, np.unique(answers), 3)
    for i, (block, k) in enumerate(zip(columns["layer"], columns["answer_pos"])):
        base_pos, source_pos = examples.label_pos[:, k]
        base_answer, source_answer = answers[:, k]

        def inject(base_reads, block=block, base_pos=base_pos, source_pos=source_pos):
            changed = {}
            for part in ("slots", "weights"):
                changed[part] = base_reads[part].clone()
                changed[part][0, base_pos] = reads[block][part][1, source_pos]
            return changed

        before = clean_logits[0, base_pos]
        after = model(examples.tokens[:1], intervene={block: inject})[0][0, base_pos]
        prediction = after.argmax()
        assert columns["prediction"][i] == prediction
        assert columns["source_answer"][i] == (prediction == source_answer)
        assert columns["control_answer"][i] == (prediction == control[k // 2])
        assert columns["base_lost"][i] == (prediction != base_answer)
        others = np.delete(np.arange(11), base_answer)
        diff_before = before[base_answer] - before[others].max()
        diff_after = after[base_answer] - after[others].max()
        assert columns["drop"][i] == pytest.approx(float(diff_before - diff_after), abs=1e-4)
        for name, logits in (("p_source", after), ("p_source_clean", before)):
            p = float(logits.softmax(0)[source_answer])
            assert columns[name][i] == pytest.approx(p, abs=1e-5)


def test_match_rates_count_where_base_and_source_differ():
    columns = {
        "example": np.array([0, 0, 1, 1]),
        "source_example": np.array([1, 1, 0, 0]),
        "answer_pos": np.array([0, 1, 0, 1]),
        "answer": np.array([3, 4, 3, 5]),
        "source_answer_token": np.array([3, 5, 4, 5]),
        "predicted": np.array([3, 5, 3, 5]),
    }
    rates = swap_matrix.match_rates(columns, "predicted")
    assert rates.keys() == {"0", "1"}
    assert (rates["0"]["value"], rates["0"]["n"]) == (0, 1)
    assert (rates["1"]["value"], rates["1"]["n"]) == (1, 1)


@torch.no_grad()
def test_interchange_with_itself_is_identity():
    model, examples = ablation_model(), some_examples()
    examples.label_pos = torch.arange(4, 7).expand(6, -1)  # answers of three tokens in a row
    clean = hooks.run_with_cache(model, examples)
    itself = torch.arange(6)
    interventions = swap_matrix.interchange_reads(clean, examples, itself, itself)
    logits = hooks.run_with_hooks(model, examples, intervene=interventions)
    torch.testing.assert_close(logits, clean.logits)

    def leave(reads):
        return reads

    decoded = swap_matrix.decode_with(model, examples, dict.fromkeys(clean.reads, leave))
    assert torch.equal(decoded, greedy_decode(model, examples.tokens[:, :5], 3))


# ---- results -------------------------------------------------------------------------------------


def test_what_a_digit_turns_into(monkeypatch):
    """The last digit is the same in base and source, so it cannot be told apart."""
    columns = {
        "example": np.array([0, 1, 2, 3, 4]),
        "source_example": np.array([1, 2, 3, 4, 0]),
        "answer": np.array([1, 1, 1, 2, 2]),
        "source_answer_token": np.array([2, 2, 2, 1, 2]),
        "teacher-forced": np.array([2, 2, 3, 2, 2]),
        "token by token": np.array([1, 1, 1, 1, 1]),
    }
    saved = []
    monkeypatch.setattr(swap_results, "load_table", lambda run, what: columns)
    monkeypatch.setattr(swap_results, "require_slots", lambda run: None)
    monkeypatch.setattr(swap_results, "require_facts", lambda run: None)
    monkeypatch.setattr(swap_results, "save_result", lambda *args: saved.append(args))
    swap_results.swap_predictions(SimpleNamespace(token=str, finding=print))
    by_slice = saved[0][3]
    fractions = {"teacher-forced": [0.25, 0.5, 0.25, 0], "token by token": [0.75, 0.25, 0, 0]}
    for decoding, expected in fractions.items():
        cells = list(by_slice[decoding].values())
        assert [cell["value"] for cell in cells] == expected and cells[0]["n"] == 4
    transitions = by_slice["teacher-forced, digit"]
    expected = {"1 to 2": 2 / 3, "1 to 3": 1 / 3, "2 to 2": 1}
    assert {name: cell["value"] for name, cell in transitions.items()} == expected


def test_interchanges_beside_each_other(monkeypatch):
    """inject always gives the source's answer; force gives it as often as a control answer."""
    n = 40
    columns = {"example": np.arange(n), "layer": np.zeros(n, int), "answer_pos": np.zeros(n, int)}
    columns["source_example"] = np.arange(n)[::-1]
    carried = {"source_answer": np.ones(n, bool), "control_answer": np.zeros(n, bool)}
    half = np.arange(n) % 2 == 0
    idle = {"source_answer": half, "control_answer": ~half}
    lost = {"base_lost": np.ones(n, bool)}
    tables = {"inject": columns | carried | lost, "force": columns | idle | lost}
    saved, findings = [], []
    monkeypatch.setattr(swap_results, "list_results", lambda run, name: name in tables)
    monkeypatch.setattr(swap_results, "load_table", lambda run, name: tables[name])
    monkeypatch.setattr(swap_results, "require_slots", lambda run: None)
    monkeypatch.setattr(swap_results, "require_facts", lambda run: None)
    monkeypatch.setattr(swap_results, "save_result", lambda *args: saved.append(args))
    run = SimpleNamespace(name="run", folder="r", finding=findings.append)
    swap_results.interchanges(run)
    cells = saved[0][3]["interchange"]
    assert list(cells) == ["force in layer 0", "inject in layer 0"]
    assert cells["inject in layer 0"]["source_answer"]["value"] == 1
    assert cells["force in layer 0"]["control_answer"]["value"] == 0.5
    assert findings[0].startswith("inject in layer 0 carries the most")
    assert findings[0].endswith("no more than the control: force in layer 0")
    del tables["inject"]
    swap_results.interchanges(run)
    assert findings[1].startswith("no interchange is seen to bring the source's answer")
    tables.clear()
    with pytest.raises(ConfigError, match="r has no result of force, replace, swap, inject or"):
        swap_results.interchanges(run)


def test_what_is_no_digit_is_counted_apart():
    columns = {
        "example": np.arange(4),
        "source_example": np.arange(4)[::-1],
        "answer": np.array([1, 1, 1, 1]),
        "source_answer_token": np.array([2, 2, 2, 2]),
        "teacher-forced": np.array([1, 2, 3, 50]),
    }
    names = {1: "1", 2: "2", 3: "3", 50: "\ufffd"}
    outcomes = swap_results.swap_outcomes(columns, "teacher-forced", lambda t: names[int(t)])
    assert [cell["value"] for cell in outcomes.values()] == [0.25] * 4
    assert list(outcomes)[-1] == "no digit"
