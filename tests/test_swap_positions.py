"""analysis/swap_positions.py: on models of which it is known if content depends on the position."""

import numpy as np
import pytest
import torch

from analysis import hooks, swap_positions
from analysis.interchange import draw_pairs
from nanorecall.settings import ConfigError
from planted import planted_positions
from toys import ablation_model, some_examples


def summary_of(depends, exchange):
    model, examples = planted_positions(depends)
    logits = hooks.run_with_cache(model, examples).logits
    assert (logits.argmax(-1) == examples.answers).all()
    pairs = draw_pairs(examples, 0, "any", 0)
    columns = swap_positions.position_effects(model, examples, *pairs, exchange)
    return swap_positions.summarize_positions(columns)["0"], columns


@pytest.mark.parametrize("exchange", swap_positions.EXCHANGES)
def test_content_that_says_the_same_everywhere(exchange):
    cells, columns = summary_of(False, exchange)
    for place in ("own position", "other position", "same example"):
        assert cells[place]["source_answer"]["value"] == 1
        assert cells[place]["control_answer"]["value"] == 0
    assert cells["own - other"]["source_answer"]["value"] == 0
    assert cells["own - other"]["drop"]["value"] == pytest.approx(0, abs=1e-5)
    assert "no dependence" in swap_positions.describe("0", cells, exchange)
    matrix = swap_positions.matrix_cells(columns)
    # An example moved to its own position is left out.
    assert len(matrix) == 4 + 2
    assert matrix["0, another example, 0, 1"]["source_answer"]["value"] == 1


@pytest.mark.parametrize("exchange", swap_positions.EXCHANGES)
def test_content_that_depends_on_the_position(exchange):
    """Reads of the same answer position carry the answer here, too: other positions tell."""
    cells, columns = summary_of(True, exchange)
    assert cells["own position"]["source_answer"]["value"] == 1
    assert cells["other position"]["source_answer"]["value"] == 0
    assert cells["same example"]["source_answer"]["value"] == 0
    assert cells["own - other"]["source_answer"]["value"] == 1
    sentence = swap_positions.describe("0", cells, exchange)
    assert "depends on the position" in sentence
    verb = {"slots": "bring their", "output": "brings its"}[exchange]
    assert f"the {exchange} of another example {verb} answer along in 100%" in sentence
    moved = (columns["i"] != columns["j"]) & columns["is_pair"]
    assert (columns["drop"][moved] > 0).all()


def test_pairs_with_the_same_answers_are_refused():
    model, examples = planted_positions(False)
    pair = np.zeros(1, int)
    with pytest.raises(ConfigError, match="have the same answers; raise n_examples"):
        swap_positions.position_effects(model, examples, pair, pair, "output")


@torch.no_grad()
def test_moves_equal_full_forwards():
    """One pair, in both memory layers: drops and predictions from the definition."""
    model, examples = ablation_model(mem_share_values=False), some_examples(B=2)
    examples.label_pos = torch.tensor([[2, 4, 5]]).expand(2, 3)
    pair = np.array([0]), np.array([1])
    columns = swap_positions.position_effects(model, examples, *pair, "output")
    clean_logits, _, reads = model(examples.tokens, trace=True)
    reads = dict(zip((0, 2), reads))
    answers = examples.answers
    assert set(columns["j"][columns["layer"] == 0].tolist()) == set(range(6))
    for row in range(len(columns["drop"])):
        layer, i, j = (int(columns[name][row]) for name in ("layer", "i", "j"))
        source = int(columns["relation"][row] == swap_positions.RELATIONS[0])

        def move(base_reads, layer=layer, i=i, j=j, source=source):
            changed = {}
            for part in ("slots", "weights"):
                changed[part] = base_reads[part].clone()
                changed[part][0, j] = reads[layer][part][source, i]
            return changed

        logits = model(examples.tokens[:1], intervene={layer: move})[0]
        drops = []
        for label, position in enumerate((2, 4, 5)):
            if position >= j:
                diffs = []
                for x in (clean_logits[0, position], logits[0, position]):
                    others = x.clone()
                    others[answers[0, label]] = -torch.inf
                    diffs.append(x[answers[0, label]] - others.max())
                drops.append(float(diffs[0] - diffs[1]))
        assert columns["drop"][row] == pytest.approx(sum(drops), abs=1e-4)
        if columns["is_pair"][row]:
            source_answer = answers[source, (2, 4, 5).index(i)]
            assert columns["source_answer"][row] == (logits[0, j].argmax() == source_answer)
