"""consolidation.py: what is written is what was read, and what it measures."""

import json

import pytest
import torch

import data_synth
import eval as eval_script
import train
from analysis import consolidation
from analysis.asking import known_facts
from analysis.trained_run import open_run
from nanorecall.settings import ConfigError
from toys import as_flags

SMALL = dict(
    data="data_synth", n_layers=2, dim=32, dk=16, dv=16, conv_size=8, init_std=1, lr=1e-2,
    batch_size=64, num_threads=1, model="memory", memory_layers="[1]", pos_emb="none",
    mem_n_keys=32, mem_k_dim=16, mem_value_lr_scale=4, max_steps=60, eval_interval=60,
    task="qa", num_pairs=40, num_digits=3, buckets="[16]",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run that knows 36 facts, and has not learned to read others in its context."""
    folder = tmp_path_factory.mktemp("runs")
    place = dict(log_dir=folder, run_name="a", context_docs=60, context_pairs=3)
    train.main(as_flags({**SMALL, **place}))
    return folder / "a"


def consolidate(folder, n):
    eval_script.main(["consolidate", str(folder), f"--n_edits=[{n}]"])
    result = json.loads((folder / f"eval_consolidate_n_edits-{n}.json").read_text())
    return result["by_slice"]["facts"][str(n)], result["examples"]


def test_what_was_read_is_written_also_if_it_is_wrong(folder):
    row, examples = consolidate(folder, 7)
    wrong = [example for example in examples if not example["fact"].endswith(example["read"])]
    assert len(examples) == 7 and len(wrong) > 3
    assert all(example["alone"] == example["read"] for example in examples)
    for metric in ("in context", "alone"):
        assert row[metric]["value"] == 1 - len(wrong) / 7
    assert row["alone, before"]["value"] == 0


def test_a_reader_that_finds_every_answer(folder, monkeypatch):
    def read(run, documents):
        return [answer for _, answer in documents]

    monkeypatch.setattr(consolidation, "answers", read)
    row, _ = consolidate(folder, 5)
    assert row["alone"]["value"] == 1 and row["alone, before"]["value"] == 0
    assert row["specificity, shown"]["value"] >= 0.9
    assert row["specificity"]["n"] + row["specificity, shown"]["n"] <= 36


def test_the_model_stays_as_it_is(folder):
    run = open_run(str(folder), eval_script.EvalConfig(n_edits=(2, 4)))
    before = {name: t.clone() for name, t in run.model.state_dict().items()}
    run.options = {"consolidate": ("n_edits",)}
    consolidation.consolidate(run)
    for name, t in run.model.state_dict().items():
        assert torch.equal(t, before[name]), name


def test_contexts_are_no_facts_to_edit_or_to_keep(folder):
    run = open_run(str(folder), eval_script.EvalConfig())
    assert len(known_facts(run)) == 40
    argv = ["--n_edits=[3]", "--new_facts=1", "--editors=closed form"]
    eval_script.main(["edit", str(folder), *argv])
    path = folder / "eval_edit_n_edits-3_new_facts-True_editors-closed-form.json"
    assert json.loads(path.read_text())["by_slice"]["method, edits"]["closed form, 3"]["edits"] == 3


def test_facts_in_contexts_of_some_size():
    found = consolidation.in_context(["1:2 ", "3:4 ", "5:6 "], 2)
    assert found == [("1:2 3:4 1:", "2"), ("1:2 3:4 3:", "4"), ("5:6 5:", "6")]


def test_a_run_that_reads_no_contexts_is_refused(tmp_path):
    place = dict(log_dir=tmp_path, run_name="a", max_steps=1, eval_interval=1)
    train.main(as_flags({**SMALL, **place}))
    with pytest.raises(ConfigError, match="a: consolidation needs .* trained with context_docs"):
        eval_script.main(["consolidate", str(tmp_path / "a")])


# ---- the documents -------------------------------------------------------------------------------


def test_documents_ask_a_pair_that_they_show():
    settings = dict(num_pairs=16, buckets=(1, 4))
    plain = data_synth.build_qa(data_synth.Config(**settings))
    source = data_synth.build_qa(data_synth.Config(**settings, context_docs=50, context_pairs=3))
    documents = [text for text in source.texts if isinstance(text, tuple)]
    assert source.texts[:16] == plain.texts and len(documents) == 50
    sizes = set()
    for question, answer in documents:
        *pairs, asked = question.split(" ")
        assert f"{asked}{answer}" in pairs
        sizes.add(len(pairs))
    assert sizes == {1, 2, 3}
    E = len(plain.splits["train"])
    assert (source.splits["train"][:E] == plain.splits["train"]).all()
    assert source.splits["train"][E:].tolist() == list(range(16, 66))
    for split in ("val", "test"):
        assert source.splits[split].max() < 16


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--context_pairs=2"], "context_pairs=2 has no effect: context_docs is 0"),
        (["--context_docs=9", "--context_pairs=0"], "context_pairs=0 must be at least 1"),
        (["--context_docs=-1"], "context_docs=-1 must be at least 0"),
        (["--context_docs=9"], "context_docs=9 has no effect: what is written are single facts"),
    ],
)
def test_settings_without_effect_or_sense(argv, message):
    with pytest.raises(ConfigError, match=message):
        data_synth.parse(["qa", *argv])
