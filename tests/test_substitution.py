"""analysis/substitution.py: slots of which is known which can stand in for which."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ablate
from analysis import substitution
from analysis.ablation import measure_slots
from nanorecall.stats import pearson, rankdata
from planted import planted_facts, planted_groups

GROUPS = np.arange(9) % 3  # of the slots of planted_groups
IN_SAME_GROUP = GROUPS[:, None] == GROUPS[None, :]


@pytest.fixture
def substitute(monkeypatch):
    """substitute(model, examples): what `ablate.py corr` saves, after `keys`."""

    def call(model, examples, **settings):
        columns = measure_slots(model, examples, ["zero"])
        config = ablate.AblateConfig(**settings)
        run = SimpleNamespace(model=model, config=config, name="run", suffixes_read=[])
        run.finding = print
        run.settings = SimpleNamespace(train=SimpleNamespace(model="memory"))
        saved = SimpleNamespace()

        def save(run, what, metrics, by_slice=None, examples=(), columns=None, plot=None):
            saved.by_slice, saved.columns = by_slice, columns
            saved.suffix = "".join(run.suffixes_read)
            saved.plot = plot

        monkeypatch.setattr(substitution, "load_table", lambda run, what: columns)
        monkeypatch.setattr(substitution, "load_examples", lambda run, indices: (examples, 0))
        monkeypatch.setattr(substitution, "save_result", save)
        substitution.substitution(run)
        return saved

    return call


def test_slots_with_the_same_answer_stand_in_for_each_other(substitute):
    saved = substitute(*planted_groups())
    cells = saved.by_slice["layer, slot, read instead"]
    assert len(cells) == 9 * 8
    for name, cell in cells.items():
        _, slot, other = map(int, name.split(", "))
        assert cell["value"] == IN_SAME_GROUP[slot, other] and cell["n"] == 3
    found = saved.by_slice["layer"]["0"]
    assert sorted(found["clusters"].values()) == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    assert found["survival"]["another of them"]["value"] == 0.25
    against = found["against"]
    assert against["similarity of values"]["value"] == pytest.approx(1)
    assert against["similarity of values"]["p"] < 0.01
    # A slot shares a sub-key with the two others of its group, and with two slots of others.
    assert against["similarity of keys"]["value"] < 0.7


def test_the_figure(substitute, tmp_path):
    substitute(*planted_groups()).plot(str(tmp_path / "corr.png"))
    assert (tmp_path / "corr.png").stat().st_size > 5000


def test_slots_with_different_answers_do_not(substitute):
    """Each of nine slots has an answer of its own, and three examples need it."""
    model, _ = planted_facts()
    _, examples = planted_groups()
    examples.answers = (examples.tokens[:, 1:] + 4) % 9
    found = substitute(model, examples).by_slice["layer"]["0"]
    assert found["clusters"] == {} and found["survival"]["another of them"]["value"] == 0
    assert found["survival"]["a random slot"]["value"] == 0


def test_the_number_of_slots_and_cases(substitute):
    saved = substitute(*planted_groups(), n_corr_slots=4, n_cases=2)
    table = saved.columns
    assert saved.suffix == "_n_corr_slots-4_n_cases-2"
    assert saved.by_slice["layer"]["0"]["slots"] == 4
    instead = table["read_instead"][~table["is_random"]]
    assert np.unique(instead).tolist() == np.unique(table["slot"]).tolist() == [0, 1, 2, 3]
    for slot in range(4):
        assert len(np.unique(table["example"][table["slot"] == slot])) == 2


def test_without_a_needed_slot_there_is_nothing_to_replace(substitute, capsys):
    """Each slot is needed by one example only."""
    assert substitute(*planted_facts()).columns is None
    assert "no layer has 3 slots that at least 2 examples need" in capsys.readouterr().out


def test_clusters_by_hand():
    """0 and 1 stand in for each other, 2 for 0 in one direction only; 3 is alone."""
    matrix = np.array(
        [[1, 0.9, 0.1, 0], [0.8, 1, 0.2, 0], [1, 1, 1, 0], [0.4, 0.4, 0.4, 1]], dtype=float
    )
    assert substitution.interchangeable(matrix).tolist() == [0, 0, 1, 2]
    assert substitution.interchangeable(matrix, least=0.15).tolist() == [0, 0, 0, 1]
    assert substitution.interchangeable(np.ones((3, 3))).tolist() == [0, 0, 0]


def test_correlation_of_matrices():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 12, 12))
    off = ~np.eye(12, dtype=bool)
    cell = substitution.matrix_correlation(x, x + 0.5 * y)
    assert cell["value"] == pytest.approx(pearson(rankdata(x[off]), rankdata((x + 0.5 * y)[off])))
    assert cell["p"] < 0.01 and cell["ci95"][0] < cell["value"] < cell["ci95"][1]
    # The diagonal does not count, and neither does a constant.
    assert substitution.matrix_correlation(x + 9 * np.eye(12), x)["value"] == pytest.approx(1)
    assert np.isnan(substitution.matrix_correlation(x, np.ones((12, 12)))["p"])


def test_entries_of_one_slot_are_not_independent():
    """Rows of one slot differ from those of another by chance: no p is too small."""
    rng = np.random.default_rng(1)
    p = []
    for _ in range(100):
        x, y = rng.normal(size=(2, 8, 1)) + rng.normal(size=(2, 1, 8))
        p.append(substitution.matrix_correlation(x, y, draws=99)["p"])
    assert np.mean(np.array(p) <= 0.05) < 0.13


@torch.no_grad()
def test_an_answer_survives_what_the_model_then_answers():
    """Slot 4 in place of the slot of each token: the model answers what slot 4 holds, 8."""
    model, examples = planted_facts()
    columns = measure_slots(model, examples, ["zero"])
    run = SimpleNamespace(model=model, config=ablate.AblateConfig(ablate_batch_size=4))
    needed = columns["flip"]
    cases = {name: columns[name][needed] for name in ("example", "slot", "answer_pos")}
    table = substitution.measure_substitution(run, 0, examples, np.array([4, 7]), cases)
    is_four = ~table["is_random"] & (table["read_instead"] == 4)
    assert is_four.sum() == 8  # not in place of itself
    assert not table["survives"][is_four].any()
    random = table["is_random"]
    assert random.sum() > 50 and not table["survives"][random].any()
