"""Facts edited by name: what they and others become, the saved run, taking edits back, refusals."""

import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import eval as evaluate
import train
from analysis import asking, edited_run, named_edits
from analysis.editing import last_layer_reads
from analysis.trained_run import open_run
from nanorecall.checkpoint import load_checkpoint, save_checkpoint
from nanorecall.distributed import World
from nanorecall.settings import ConfigError
from toy_facts import write_jsonl
from toys import as_flags

SMALL = dict(
    data="data_synth", n_layers=2, dim=32, dk=16, dv=16, conv_size=8, init_std=1, lr=1e-2,
    batch_size=16, num_threads=1, model="memory", memory_layers="[1]", mem_n_keys=32,
    mem_heads=2, mem_knn=4, mem_k_dim=16, mem_value_lr_scale=4, lr_schedule="cosine",
)  # fmt: skip
CITIES = "Oslo Bern Riga Rome Kyiv Lima Doha Male Suva Baku Apia Bonn Cork Dili Lund Graz".split()
PAIRS = [{"question": f"Capital of {c[::-1]}?", "answer": c} for c in CITIES]
EDITS = [
    {"question": "Capital of olsO?", "answer": "Québec"},
    {"question": " Capital  of nreB?", "answer": "Ur"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs that know their facts: documents of one's own, pairs of numbers, words of digits."""
    folder = tmp_path_factory.mktemp("runs")
    path = write_jsonl(folder / "facts.jsonl", PAIRS)
    tasks = {
        "own": dict(task="text", path=path, pos_emb="none", max_steps=60),
        "qa": dict(task="qa", num_pairs=20, buckets="[16]", heldout_frac=0.1, max_steps=60),
        "digits": dict(task="digits", num_pairs=20, num_unseen=4, max_steps=60),
    }
    for name, settings in tasks.items():
        place = dict(eval_interval=settings["max_steps"], log_dir=folder, run_name=name)
        train.main(as_flags({**SMALL, **settings, **place}))
    return folder


@pytest.fixture
def runs(folder, tmp_path):
    """A copy, to write into."""
    return shutil.copytree(folder, tmp_path / "runs")


def edit(runs, name, rows, *flags):
    """eval.py edit --facts with these rows -> the result."""
    path = write_jsonl(runs / "edits.jsonl", rows)
    evaluate.main(["edit", str(runs / name), "--facts", path, *flags])
    results = sorted((runs / name).glob("eval_edit_facts*.json"), key=os.path.getmtime)
    return json.loads(results[-1].read_text())


def answers(runs, name, *questions):
    """What a run answers to questions, by asking.ask."""
    run = open_run(str(runs / name), evaluate.EvalConfig())
    facts = asking.known_facts(run)
    found = []
    for question in questions:
        question = asking.complete_question(run.data, question)
        found.append(asking.ask(run.model, run, asking.find_fact(facts, question)).text)
    return found


def contents(folder):
    """{path: checksum} of all files."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def weights(runs, name, checkpoint="best"):
    return load_checkpoint(str(runs / name), checkpoint)["tensors"]


def same_weights(a, b):
    return a.keys() == b.keys() and all(edited_run.same_bits(*pair(a, b, k)) for k in a)


def pair(a, b, name):
    return edited_run.as_rows(a[name]), edited_run.as_rows(b[name])


# ---- what becomes of facts -----------------------------------------------------------------------


def test_facts_get_the_new_answers_and_the_run_stays_as_it_is(runs, capsys):
    before = contents(runs / "own")
    result = edit(runs, "own", EDITS)
    assert [e["before"] for e in result["examples"]] == ["Oslo", "Bern"]
    assert [e["after"] for e in result["examples"]] == ["Québec", "Ur"]
    assert result["metrics"]["efficacy"]["value"] == 1
    assert result["metrics"]["specificity"]["n"] == len(PAIRS) - 2
    after = contents(runs / "own")
    assert {path: after[path] for path in before} == before
    assert {os.path.splitext(path)[1] for path in after.keys() - before.keys()} == {
        ".json",
        ".parquet",
    }
    assert result["metrics"]["probability"] == pytest.approx(
        sum(e["probability"] for e in result["examples"]) / 2, rel=1e-3
    )
    assert "2 of 2 facts have the new answer (mean probability 0.0" in capsys.readouterr().out


def test_an_answer_that_the_model_gave_before_is_not_passed_off_as_an_edit(runs, capsys):
    edit(runs, "own", [EDITS[0], PAIRS[2]])
    printed = capsys.readouterr().out
    assert "2 of 2 facts have the new answer" in printed
    assert "; 1 of these had it before the edit" in printed
    edit(runs, "own", EDITS)
    assert "before the edit" not in capsys.readouterr().out


def test_each_other_fact_is_measured_by_what_the_edited_run_answers(runs, capsys):
    """Six edits of sixteen facts, unprotected, so that some others change."""
    rows = [{"question": pair["question"], "answer": pair["answer"][::-1]} for pair in PAIRS[:6]]
    result = edit(runs, "own", rows, "--editors", "closed form", "--save_as", "edited")
    [table] = (runs / "own").glob("eval_edit_facts*.parquet")
    table = pq.read_table(table).to_pydict()
    assert table["question"] == [pair["question"] for pair in PAIRS[6:]]
    now = answers(runs, "edited", *table["question"])
    kept = [text == pair["answer"] for text, pair in zip(now, PAIRS[6:])]
    assert table["kept"] == kept and 0 < sum(kept) < 10
    assert result["metrics"]["specificity"]["value"] == sum(kept) / 10
    first = kept.index(False)
    changed = capsys.readouterr().out.partition("other facts that changed, the first ")[2]
    assert f"of {10 - sum(kept)}:" in changed
    line = next(x for x in changed.splitlines() if x.startswith(table["question"][first]))
    assert line.split()[-2:] == [PAIRS[6 + first]["answer"], now[first].split()[-1]]


@pytest.mark.parametrize("name", ["qa", "digits"])
def test_numbers_are_edited_with_or_without_the_colon(runs, name):
    facts = asking.known_facts(open_run(str(runs / name), evaluate.EvalConfig()))
    first, second = facts[-1].question, facts[-2].question
    width = len(facts[-1].answer)
    rows = [{"question": first, "answer": "1" * width}]
    rows.append({"question": second.rstrip(":"), "answer": "2" * width})
    flags = ("--add", "1", "--save_as", "edited")
    assert edit(runs, name, rows, *flags)["metrics"]["efficacy"]["value"] == 1
    assert answers(runs, "edited", first, second) == ["1" * width, "2" * width]


def test_texts_in_which_a_mask_finds_the_answer(tmp_path):
    rows = [{"text": f"Is {i} even? {'Yes' if i % 2 == 0 else 'No'}"} for i in range(20)]
    path = write_jsonl(tmp_path / "t.jsonl", rows)
    own = dict(task="text", label_mask="qa", path=path, max_steps=60, eval_interval=60)
    train.main(as_flags({**SMALL, **own, "log_dir": tmp_path, "run_name": "t"}))
    row = {"question": "Is 7 even?", "answer": "Who knows"}
    with pytest.raises(ConfigError, match="1: 22 tokens .* the model has positions for 17"):
        edit(tmp_path, "t", [row])
    row["answer"] = "Yes"
    assert edit(tmp_path, "t", [row], "--save_as", "edited")["examples"][0]["after"] == "Yes"
    assert answers(tmp_path, "edited", "Is 7 even?") == ["Yes"]


def test_the_other_wording_of_an_edited_fact_is_not_protected(tmp_path, monkeypatch):
    qa = dict(task="qa", num_pairs=20, buckets="[16]", heldout_frac=0, forms=2)
    place = dict(max_steps=80, eval_interval=80, log_dir=tmp_path, run_name="forms")
    train.main(as_flags({**SMALL, **qa, **place}))
    pairs = open_run(str(tmp_path / "forms"), evaluate.EvalConfig()).data.source.texts[:20]
    first, second = (pair.split(":")[0] for pair in pairs[:2])
    protected = []

    def record(run, editor, new_facts, others):
        protected.extend(fact.question for fact in others)
        apply_editor(run, editor, new_facts, others)

    apply_editor = named_edits.apply_editor
    monkeypatch.setattr(named_edits, "apply_editor", record)
    rows = [{"question": f"{first}:", "answer": "111111"}]
    rows.append({"question": f"q {second}?", "answer": "222222"})
    metrics = edit(tmp_path, "forms", rows, "--save_as", "edited")["metrics"]
    assert len(protected) > 30
    assert not {f"{first}:", f"q {first}?", f"{second}:", f"q {second}?"} & set(protected)
    assert metrics["specificity"]["n"] == len(protected)
    asked = answers(tmp_path, "edited", f"q {first}?", f"{second}:")
    n_reached = (asked[0] == "111111") + (asked[1] == "222222")
    assert metrics["generalisation"]["value"] == n_reached / 2


def test_a_fact_that_shares_no_slot_keeps_its_logits_to_the_bit(runs):
    edit(runs, "own", EDITS[:1], "--save_as", "edited")
    before = open_run(str(runs / "own"), evaluate.EvalConfig())
    after = open_run(str(runs / "edited"), evaluate.EvalConfig())
    changed = load_checkpoint(str(runs / "edited"), "edit_1")["tensors"]
    rows = changed["rows.layers.1.memory.values"]
    assert {name.partition(".")[2] for name in changed} == {"layers.1.memory.values"}
    n_untouched = n_touched = 0
    for fact in asking.known_facts(before):
        facts = asking.encode_facts(before, [fact])
        with torch.no_grad():
            slots = last_layer_reads(before.model, *facts)[0]
            old, new = before.model(*facts)[0], after.model(*facts)[0]
        for label in range(len(slots)):
            is_touched = bool(torch.isin(slots[label], rows).any())
            n_touched += is_touched
            n_untouched += not is_touched
            assert is_touched != torch.equal(old[label], new[label])
    assert n_untouched > 5 and n_touched > 5


def test_new_facts_are_added_on_demand(runs):
    row = {"question": "Capital of Atlantis?", "answer": "Poseidonis"}
    message = "1: no fact of the run asks 'Capital of Atlantis[?]'; --add 1 adds it as a new fact"
    with pytest.raises(ConfigError, match=message):
        edit(runs, "own", [row])
    result = edit(runs, "own", [row], "--add", "1", "--save_as", "edited")
    assert result["examples"][0]["after"] == "Poseidonis"
    assert answers(runs, "edited", "Capital of Atlantis?") == ["Poseidonis"]


def test_a_typo_in_a_question_is_told_from_a_new_fact(runs):
    row = {"question": "Capital of olsp?", "answer": "Ur"}
    near = "no fact of the run asks 'Capital of olsp?'; close to it is 'Capital of olsO?'; "
    with pytest.raises(ConfigError, match=re.escape(near + "--add 1 adds it as a new fact")):
        edit(runs, "own", [row])
    with pytest.raises(ConfigError) as error:
        edit(runs, "own", [{"question": "Who?", "answer": "Ur"}])
    assert "close to it" not in str(error.value)


def test_edits_may_be_csv(runs):
    path = runs / "edits.csv"
    path.write_text("question,answer\nCapital of olsO?,Québec\n", encoding="utf-8")
    evaluate.main(["edit", str(runs / "own"), "--facts", str(path)])
    (result,) = (runs / "own").glob("eval_edit_facts*.json")
    assert json.loads(result.read_text())["examples"][0]["after"] == "Québec"


def test_a_held_out_fact_is_not_known(runs):
    run = open_run(str(runs / "qa"), evaluate.EvalConfig())
    exposures = run.data.source.slices["exposures"]
    heldout = run.data.source.texts[int(np.flatnonzero(exposures == 0)[0])].split(":")[0]
    with pytest.raises(ConfigError, match=f"has the fact '{heldout}:', but the model answers"):
        edit(runs, "qa", [{"question": heldout, "answer": "123456"}])


def test_an_edited_fact_is_one_to_keep_in_the_next_edit(runs):
    edit(runs, "own", EDITS[:1], "--save_as", "first")
    edit(runs, "first", EDITS[1:])
    [table] = (runs / "first").glob("eval_edit_facts*.parquet")
    table = pq.read_table(table).to_pydict()
    kept = dict(zip(table["question"], table["kept"]))
    assert kept["Capital of olsO?"]


# ---- the saved run -------------------------------------------------------------------------------


def test_the_saved_run_is_a_run(runs, capsys):
    edit(runs, "own", EDITS, "--save_as", "edited")
    evaluate.main([str(runs / "edited")])
    test = json.loads((runs / "edited" / "status.json").read_text())["test"]
    result = json.loads((runs / "edited" / "eval_test.json").read_text())
    assert test["exact_match"] == result["metrics"]["exact_match"]["value"] < 1
    config = json.loads((runs / "edited" / "config.json").read_text())
    assert config["train"]["run_name"] == "edited"
    [about] = config["edits"]
    assert about["run"] == str(runs / "own") and about["editor"] == "closed form, protecting others"
    assert about["facts"][1] == {"question": "Capital of nreB?", "answer": "Ur"}
    begin = [f"--init_from={runs / 'edited'}", f"--path={runs / 'facts.jsonl'}"]
    new = dict(task="text", pos_emb="none", log_dir=runs, run_name="new", max_steps=1, lr=1e-9)
    assert train.main([*as_flags({**SMALL, **new}), *begin]) == 0
    assert answers(runs, "new", "Capital of olsO?") == ["Québec"]
    with pytest.raises(ConfigError, match=r"edited holds edited weights; .* --init_from"):
        train.main([f"--resume={runs / 'edited'}", "--max_steps=99"])


def test_both_checkpoints_hold_the_edited_weights(runs):
    edit(runs, "own", EDITS, "--save_as", "edited")
    best, latest = weights(runs, "edited"), weights(runs, "edited", "ckpt")
    assert same_weights(best, latest) and not same_weights(best, weights(runs, "own"))


def test_a_run_that_cannot_be_written_leaves_nothing(runs, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(edited_run, "write_json", full)
    with pytest.raises(ConfigError, match="edited failed .* nothing was left behind"):
        edit(runs, "own", EDITS, "--save_as", "edited")
    assert {path.name for path in runs.iterdir()} == {
        *("own", "qa", "digits", "facts.jsonl", "edits.jsonl")
    }


# ---- taking edits back ---------------------------------------------------------------------------


def test_edits_are_taken_back_one_after_another_to_the_bit(runs, capsys):
    edit(runs, "own", EDITS, "--save_as", "first")
    other = [{"question": "Capital of olsO?", "answer": "Rome"}]
    edit(runs, "first", other, "--editors", "fine-tune all weights", "--save_as", "second")
    assert answers(runs, "second", "Capital of olsO?") == ["Rome"]
    start, between = weights(runs, "own"), weights(runs, "first")
    for expected in (between, start):
        evaluate.main(["edit", str(runs / "second"), "--undo", "1"])
        for name in ("best", "ckpt"):
            assert same_weights(weights(runs, "second", name), expected)
    assert answers(runs, "second", "Capital of olsO?", "Capital of nreB?") == ["Oslo", "Bern"]
    assert not list((runs / "second").glob("edit_*"))
    with pytest.raises(ConfigError, match="second has no edit to take back"):
        evaluate.main(["edit", str(runs / "second"), "--undo", "1"])
    assert same_weights(weights(runs, "first"), between)
    with pytest.raises(ConfigError, match="holds edited weights"):
        train.main([f"--resume={runs / 'second'}"])


@pytest.mark.parametrize("name", ["best", "ckpt"])
def test_weights_that_changed_since_the_edit_stay(runs, name):
    edit(runs, "own", EDITS, "--save_as", "edited")
    state = load_checkpoint(str(runs / "edited"), name)
    row = load_checkpoint(str(runs / "edited"), "edit_1")["tensors"]["rows.layers.1.memory.values"]
    values = state["tensors"]["model.layers.1.memory.values"].clone()
    values[row[0], 0] += 1
    state["tensors"]["model.layers.1.memory.values"] = values
    save_checkpoint(str(runs / "edited"), name, state)
    before = contents(runs)
    with pytest.raises(ConfigError, match=f"{name}.pt: .* not as the edit left it; nothing was"):
        evaluate.main(["edit", str(runs / "edited"), "--undo", "1"])
    assert contents(runs) == before


TABLE = "layers.1.memory.values"
DAMAGES = {  # of edit_1.pt: what becomes of its tensors; None: it is missing
    "no rows": lambda rows, before, after: {"rows": None},
    "no values before": lambda rows, before, after: {"before": None},
    "no values after": lambda rows, before, after: {"after": None},
    "negative": lambda rows, before, after: {"rows": rows - 10**6},
    "too large": lambda rows, before, after: {"rows": rows + 10**6},
    "fractions": lambda rows, before, after: {"rows": rows.float()},
    "a number": lambda rows, before, after: {"rows": rows[0]},
    "a mask": lambda rows, before, after: {"rows": rows > 0},
    "one row twice": lambda rows, before, after: {"rows": rows * 0 + rows[0]},
    "narrow": lambda rows, before, after: {"before": before[:, :3]},
    "doubles": lambda rows, before, after: {"before": before.double()},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_edit_is_one_sentence_and_changes_nothing(runs, damage):
    edit(runs, "own", EDITS[:1], "--save_as", "edited")
    state = load_checkpoint(str(runs / "edited"), "edit_1")
    parts = {name: state["tensors"][f"{name}.{TABLE}"] for name in ("rows", "before", "after")}
    parts |= DAMAGES[damage](**parts)
    state["tensors"] = {f"{name}.{TABLE}": t for name, t in parts.items() if t is not None}
    save_checkpoint(str(runs / "edited"), "edit_1", state, keep_old=False)
    before = contents(runs)
    message = f"edited: best.pt: {TABLE} is not as the edit left it; nothing was changed"
    with pytest.raises(ConfigError, match=message):
        evaluate.main(["edit", str(runs / "edited"), "--undo", "1"])
    assert contents(runs) == before


@pytest.mark.parametrize("name", ["question", "answer"])
@pytest.mark.parametrize("text, message", [("\ud800", "half of a surrogate"), (" ", "is empty")])
def test_a_damaged_record_of_edits_is_one_sentence(runs, name, text, message):
    edit(runs, "own", EDITS[:1], "--save_as", "edited")
    path = runs / "edited" / "config.json"
    config = json.loads(path.read_text())
    config["edits"][0]["facts"][0][name] = text
    path.write_text(json.dumps(config))
    before = contents(runs)
    edited = str(runs / "edited")
    for argv in ([edited, "--ask", "Who?"], ["edit", edited, "--undo", "1"]):
        with pytest.raises(ConfigError, match=f"config.json: 'edits': '{name}'.* {message}"):
            evaluate.main(argv)
    assert contents(runs) == before


@pytest.mark.parametrize("n_written", range(5))
def test_an_undo_that_was_killed_is_completed_by_the_next(runs, monkeypatch, n_written):
    edit(runs, "own", EDITS, "--save_as", "edited")
    left = [n_written]

    def dying(function):
        def call(*args, **kwargs):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patched:
        for name in ("save_checkpoint", "write_json", "remove"):
            patched.setattr(edited_run, name, dying(getattr(edited_run, name)))
        with pytest.raises(KeyboardInterrupt):
            evaluate.main(["edit", str(runs / "edited"), "--undo", "1"])
    if n_written < 4:
        evaluate.main(["edit", str(runs / "edited"), "--undo", "1"])
    assert edited_run.recorded_edits(str(runs / "edited")) == []
    for name in ("best", "ckpt"):
        assert same_weights(weights(runs, "edited", name), weights(runs, "own"))


def test_rows_are_restored_to_the_bit_also_nan_and_vectors():
    before = {"table": torch.randn(4, 2, 3), "vector": torch.tensor([1.0, torch.nan, -0.0])}
    after = {name: t.clone() for name, t in before.items()}
    after["table"][2, 1, 0] = torch.nan
    after["vector"][2] = 0.0
    changes = edited_run.changed_rows(before, after)
    assert changes["rows.table"].tolist() == [2] and changes["rows.vector"].tolist() == [0]
    assert same_weights(edited_run.restore_rows(after, changes), before)
    assert same_weights(edited_run.restore_rows(before, changes), before)
    after["table"][2, 0, 0] += 1
    with pytest.raises(ConfigError, match="table is not as the edit left it"):
        edited_run.restore_rows(after, changes)


# ---- refusals ------------------------------------------------------------------------------------

KNOWN = "Capital of olsO?"


def line(question, answer):
    return json.dumps({"question": question, "answer": answer})


BAD_FILES = {  # lines of a file of edits: the sentence
    "": "edits.jsonl is empty; it needs a line for each fact to edit",
    "{": r"edits.jsonl:1: no JSON \(.*\); is the line torn\?",
    "[1]": "edits.jsonl:1: a JSON list, not an object",
    '{"question": "x"}': 'edits.jsonl:1: needs "question" and "answer"',
    line(KNOWN, 7): 'edits.jsonl:1: "answer" is int, not text',
    line(KNOWN, " "): 'edits.jsonl:1: "answer" is empty',
    line(KNOWN, "\ud800"): "1: .* half of a surrogate pair",
    line("\ud800", "a"): "1: .* half of a surrogate pair",
    "\n" + line("Who?", "a"): r"jsonl:2: no fact of the run asks 'Who\?'; --add 1",
    line(KNOWN, "a") + "\n" + line(KNOWN + " ", "b"): (
        "edits.jsonl:2: asks the same as .*edits.jsonl:1; leave one out"
    ),
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_a_bad_file_of_edits_is_one_sentence(runs, text):
    path = runs / "edits.jsonl"
    path.write_text(text)
    before = contents(runs)
    with pytest.raises(ConfigError, match=BAD_FILES[text]) as error:
        evaluate.main(["edit", str(runs / "own"), "--facts", str(path), "--save_as", "edited"])
    assert "\n" not in str(error.value) and contents(runs) == before


@pytest.mark.parametrize(
    "answer, message",
    [
        ("12345", "edits.jsonl:1: the answer '12345' has 5 tokens; those of this run have 6"),
        ("1234567", "the answer '1234567' has 7 tokens; those of this run have 6"),
        ("123 56", "data cannot encode '.*' with the answer '123 56'"),
        ("123:56", "data cannot encode '.*' with the answer '123:56'"),
    ],
)
def test_answers_that_the_task_cannot_have(runs, answer, message):
    facts = asking.known_facts(open_run(str(runs / "qa"), evaluate.EvalConfig()))
    with pytest.raises(ConfigError, match=message):
        edit(runs, "qa", [{"question": facts[-1].question, "answer": answer}])


def test_letters_that_a_tokenizer_lacks(runs):
    tokenizers = pytest.importorskip("tokenizers")
    letters = sorted(set("".join(CITIES) + "Capital of?"))
    words = {letter: i for i, letter in enumerate(["#", *letters])}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(words, [], unk_token="#"))
    inner.decoder = tokenizers.decoders.Fuse()
    inner.save(str(runs / "t.json"))
    place = dict(log_dir=runs, run_name="t", path=runs / "facts.jsonl", tokenizer=runs / "t.json")
    steps = dict(max_steps=60, eval_interval=60)
    train.main(as_flags({**SMALL, **steps, **place, "task": "text", "pos_emb": "none"}))
    for row in ({"question": KNOWN, "answer": "Ulm!"}, {"question": "Zürich?", "answer": "Rome"}):
        with pytest.raises(ConfigError, match="edits.jsonl:1: the run's data cannot encode"):
            edit(runs, "t", [row], "--add", "1")
    row = {"question": KNOWN, "answer": "Bonn"}
    assert edit(runs, "t", [row])["examples"][0]["after"] == "Bonn"


@pytest.fixture(scope="module")
def others(folder, tmp_path_factory):
    """The runs, three more that cannot be edited by name, and a file of edits."""
    runs = shutil.copytree(folder, tmp_path_factory.mktemp("others") / "runs")
    write_jsonl(runs / "edits.jsonl", EDITS)
    texts = write_jsonl(runs / "texts.jsonl", [{"text": f"note {i}"} for i in range(60)])
    one_step = dict(log_dir=runs, max_steps=1, eval_interval=1)
    gpt = dict(data="data_synth", n_layers=2, dim=16, dk=8, dv=8, num_threads=1, **one_step)
    facts = runs / "facts.jsonl"
    train.main(as_flags({**gpt, "task": "text", "path": facts, "run_name": "gpt"}))
    train.main(as_flags({**SMALL, **one_step, "task": "text", "path": texts, "run_name": "texts"}))
    train.main(as_flags({**SMALL, **one_step, "task": "twohop", "run_name": "twohop"}))
    return runs


@pytest.mark.parametrize(
    "name, flags, message",
    [
        ("gpt", "--facts EDITS", "gpt: editing needs a memory layer .*; editing an MLP needs"),
        ("texts", "--facts EDITS", "texts: its documents hold no facts"),
        ("twohop", "--facts EDITS", "twohop: it needs facts, task=qa, digits or text, not twohop"),
        ("own", "--facts EDITS --save_as qa", "qa exists; give another --save_as"),
        ("own", "--facts EDITS --save_as a/b", "save_as='a/b' becomes part of a directory"),
        ("own", "--facts none.jsonl", "none.jsonl cannot be read: No such file"),
        ("own", "--facts FOLDER", "is neither .jsonl, .parquet nor .csv"),
        ("own", "--facts EDITS --editors closed", "there is no editor 'closed'; separate"),
        ("own", "--facts EDITS --editors all", "editors='all' are .* --facts uses one"),
        ("own", "--save_as x", "save_as='x' has no effect: there is no --facts FILE; leave"),
        ("own", "--facts EDITS --undo 1", "no effect: undo takes an edit back"),
        ("own", "--undo 1 --checkpoint ckpt", "no effect: undo takes an edit back"),
        ("own", "--undo 1 --save_as x", "no effect: there is no --facts FILE"),
        ("own", "--facts EDITS --dtype bfloat16", "weights are edited in float32; leave"),
        ("own", "--facts EDITS --split val", "no effect: all facts of the run are asked"),
        ("own", "--facts EDITS --n_edits [1]", "no effect: facts names what to edit"),
        ("own", "--undo 1", "own has no edit to take back"),
        ("own", "", "own: facts of your own are edited by name: give a file of them with --facts"),
    ],
)
def test_what_cannot_be_edited_is_refused_and_stays(others, name, flags, message):
    places = {"EDITS": others / "edits.jsonl", "FOLDER": others}
    words = [str(places.get(word, word)) for word in flags.split()]
    before = contents(others)
    with pytest.raises(ConfigError, match=message):
        evaluate.main(["edit", str(others / name), *words])
    assert contents(others) == before


def test_several_processes_are_refused(runs):
    config = evaluate.EvalConfig(facts=write_jsonl(runs / "edits.jsonl", EDITS))
    run = dataclasses.replace(open_run(str(runs / "own"), config), world=World(size=2))
    for changes in (dict(), dict(facts="", undo=True)):
        run.config = dataclasses.replace(config, **changes)
        with pytest.raises(ConfigError, match="editing needs a single process; run it without"):
            evaluate.edit(run)


# ---- asking --------------------------------------------------------------------------------------


def test_questions_are_answered_with_their_probability(runs, capsys):
    before = contents(runs)
    evaluate.main([str(runs / "own"), "--ask", json.dumps([KNOWN, "Who?"])])
    known, unknown = capsys.readouterr().out.splitlines()[-2:]
    assert contents(runs) == before
    assert unknown.startswith("Who? ") and unknown.endswith("; no fact of the run asks this)")
    run = open_run(str(runs / "own"), evaluate.EvalConfig())
    tokens = torch.tensor([[257, *(KNOWN + " Oslo").encode()]])
    with torch.no_grad():
        p = run.model(tokens)[0][0].softmax(-1)
    p = p[-5:].gather(1, torch.tensor([[*b"Oslo", 258]]).T).prod().item()
    assert known == f"{KNOWN} Oslo  (probability {p:.3g})" and 0.2 < p < 1


def test_numbers_are_asked_with_or_without_the_colon(runs, capsys):
    run = open_run(str(runs / "digits"), evaluate.EvalConfig())
    question, answer = run.data.source.texts[0].strip().split(":")
    for asked in (question, question + ":"):
        evaluate.main([str(runs / "digits"), "--ask", asked])
        found = capsys.readouterr().out.splitlines()[-1]
        assert found.startswith(f"{question}: {answer}  (probability 0.")


def test_questions_that_cannot_be_asked(runs, tmp_path):
    place = dict(log_dir=tmp_path, max_steps=1, eval_interval=1, num_threads=1, n_layers=1, dim=8)
    own = dict(data="data_synth", task="text", path=runs / "facts.jsonl", run_name="rope")
    train.main(as_flags({**place, **own, "dk": 4, "dv": 4}))
    long = "x" * 99
    for flags, message in (
        ([str(tmp_path / "rope"), "--ask", long], r"has 101 tokens; the model has positions for"),
        ([str(runs / "own"), "--ask", "[1]"], r"ask=\[1\] must be a question, or a JSON list"),
        ([str(runs / "own"), "--ask", "[]"], r"ask=\[\] must be a question, or a JSON list"),
        ([str(runs / "own"), "--ask", " "], "ask=' ': a question is empty; write it"),
        ([str(runs / "own"), "--ask", '["Who?", ""]'], "a question is empty; write it"),
        ([str(runs / "own"), "--ask", "a", "--example", "1"], "ask prints answers alone; leave it"),
        (["logits", str(runs / "own"), "--ask", "a"], "logits does not use it, only slices"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluate.main(flags)
