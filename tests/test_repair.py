"""repair.py: files cut at every byte keep every complete record."""

import json
import os

import numpy as np
import pytest

import eval as evaluate
from analysis.repair import complete_json, complete_lines
from nanorecall.settings import ConfigError

RECORDS = []
for i in range(4):
    nested = [1.5, None, True, {"x": []}]
    RECORDS.append({"example": i, "text": 'a "b", [c] {d} ü\n', "more": nested})
LINES = [json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS]


def test_json_lines_cut_at_any_byte_keep_every_complete_record():
    whole = "".join(LINES).encode()
    ends = np.cumsum([0] + [len(line.encode()) for line in LINES])
    for cut in range(len(whole)):
        records, n_lost = complete_lines(whole[:cut].decode(errors="ignore"))
        # The last record is complete without the end of its line.
        n_complete = int((ends[1:] - 1 <= cut).sum())
        assert records == RECORDS[:n_complete]
        assert n_lost == (cut > ends[n_complete])


@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_cut_at_any_byte_keeps_every_complete_record(indent):
    whole = json.dumps(RECORDS, indent=indent)
    assert complete_json(whole) == (RECORDS, True)
    n_before = 0
    for cut in range(1, len(whole)):
        value, was_whole = complete_json(whole[:cut])
        assert not was_whole and value == RECORDS[: len(value)]
        assert len(value) in (n_before, n_before + 1)
        n_before = len(value)
    assert n_before == len(RECORDS)


def test_a_result_cut_at_any_byte_keeps_its_head_and_whole_examples():
    result = {
        "config": {"run": "a", "step": 12},
        "metrics": {"accuracy": {"value": 0.5, "n": 34}},
        "examples": RECORDS,
    }
    whole = json.dumps(result, indent=1)
    for cut in range(1, len(whole)):
        value, _ = complete_json(whole[:cut])
        assert list(value) == list(result)[: len(value)]
        examples = value.get("examples", [])
        assert examples == RECORDS[: len(examples)]
        if cut >= whole.index('"metrics"'):
            assert value["config"] == result["config"]


def test_a_number_that_may_be_cut_is_dropped():
    """3 may have been 34."""
    assert complete_json('{"a": {"value": 0.5, "n": 3') == ({"a": {"value": 0.5}}, False)
    assert complete_json('{"a": {"value": 0.5, "n": 34,') == ({"a": {"value": 0.5, "n": 34}}, False)


@pytest.mark.parametrize("text", ["12 x", "true x", '"abc" x', "", "nul", "[" * 100_000])
def test_bare_json_values_are_not_records(text):
    value, was_whole = complete_json(text)
    assert not isinstance(value, (dict, list)) and not was_whole
    assert complete_lines(text + '\n{"a": 1}\n') == ([{"a": 1}], 1 if text else 0)


def test_repair_writes_a_new_file_and_says_what_it_kept(tmp_path, capsys):
    path = tmp_path / "r.jsonl"
    path.write_text("".join(LINES)[:-20])
    evaluate.main(["repair", str(path)])
    assert "3 records kept, 1 lines lost" in capsys.readouterr().out
    repaired = (tmp_path / "r.repaired.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in repaired] == RECORDS[:3]
    with pytest.raises(ConfigError, match="exists already"):
        evaluate.main(["repair", str(path)])


@pytest.mark.parametrize(
    "argv, message",
    [
        (["no.json"], "cannot be read: No such file"),
        (["x.txt"], "neither .json nor .jsonl"),
        (["a.json", "--split=val"], "repair does not use it"),
        (["a.json"], "holds no complete record"),
        (["pipe.jsonl"], "is no file"),
    ],
)
def test_mistakes_are_one_sentence(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text('"abc" x')
    os.mkfifo("pipe.jsonl")
    with pytest.raises(ConfigError, match=message):
        evaluate.main(["repair", *argv])
