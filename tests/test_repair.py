"""repair.py: files that are cut or damaged anywhere keep every whole record."""

import json
import os

import numpy as np
import pytest

import eval as evaluate
from analysis.repair import whole_json, whole_records
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
        lost = []
        records = whole_records(whole[:cut].decode(errors="surrogateescape"), lost)
        # The last record is complete without the end of its line.
        n_complete = int((ends[1:] - 1 <= cut).sum())
        assert records == RECORDS[:n_complete]
        assert len(lost) == (cut > ends[n_complete])


@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_cut_at_any_byte_keeps_every_complete_record(indent):
    whole = json.dumps(RECORDS, indent=indent)
    assert whole_json(whole) == (RECORDS, [])
    n_before = 0
    for cut in range(1, len(whole)):
        records, lost = whole_json(whole[:cut])
        records = records or []
        assert len(lost) == 1 and records == RECORDS[: len(records)]
        assert len(records) in (n_before, n_before + 1)
        n_before = len(records)
    assert n_before == len(RECORDS)


def test_a_result_cut_at_any_byte_keeps_its_head_and_whole_examples():
    result = {
        "config": {"run": "a", "step": 12},
        "metrics": {"accuracy": {"value": 0.5, "n": 34}},
        "examples": RECORDS,
    }
    whole = json.dumps(result, indent=1)
    for cut in range(1, len(whole)):
        value, lost = whole_json(whole[:cut])
        value = value or {}
        assert len(lost) == 1 and list(value) == list(result)[: len(value)]
        examples = value.get("examples", [])
        assert examples == RECORDS[: len(examples)]
        if cut >= whole.index('"metrics"'):
            assert value["config"] == result["config"]


def test_a_number_that_may_be_cut_is_dropped():
    """3 may have been 34."""
    assert whole_json('{"a": {"value": 0.5, "n": 3')[0] == {"a": {"value": 0.5}}
    assert whole_json('{"a": {"value": 0.5, "n": 34,')[0] == {"a": {"value": 0.5, "n": 34}}


@pytest.mark.parametrize("text", ["12 x", "true x", '"abc" x', "", "nul", "[" * 100_000])
def test_bare_json_values_are_not_records(text):
    assert whole_json(text)[0] is None
    lost = []
    assert whole_records(text + '\n{"a": 1}\n', lost) == [{"a": 1}]
    assert len(lost) == bool(text)


@pytest.mark.parametrize(
    "text, kept, places",
    [
        ('[{"a": 1}, {"a": 2,, "b": 3}, {"a": 4}]', [1, 4], [11]),
        ('[{"a": 1}, {"a": 2,, "b": {"a": 3}}, {"a": 4}]', [1, 4], [11]),
        # A quote is missing, at the end of a string or of a name.
        ('[{"a": 1}, {"a": "x}, {"a": 3}]', [1, 3], [11]),
        ('[{"a": 1}, {"a: 2}, {"a": 3}]', [1, 3], [11]),
        # The middle is missing: the third record begins inside of the second.
        ('[{"a": 1}, {"a": 2, "b": "x{"a": 3, "b": "y"}, {"a": 4}]', [1, 3, 4], [11]),
        ('[{"a": 1}, {"a": 2, "b": {"a": 3, "b": 0}, {"a": 4}]', [1, 3, 4], [11]),
        ('[\n {"a": 1},\n {"b": [2, "a": 3},\n {"a": 4}\n]', [1, 4], [14]),
        ('[{"a": 1},, {"a": 2}]', [1, 2], [10]),
        ('[{"a": 1} {"a": 2},]', [1, 2], []),
        ('[{"a": 1}, {"a": "\udcc3"}, {"a": 3}] x', [1, 3], [11, 33]),
        ('\ufeff[{"a": 1}]', [1], []),
        ('{"a": 1}{"a": 2}\n{"a": 3}', [1, 2, 3], []),
        ('{"a": 1}{"a": 2,,}, {"a": 3}', [1, 3], [8]),
        ('[{"a": 1}]\n\ufeff[{"a": 2}]', [1, 2], []),
        ('{"a": 1} x\n\0\0{"a": 2}\n12\n{"a": 3}', [1, 2, 3], [9, 22]),
        ('\0\0{"a": 1}\n{"a": 2}', [1, 2], [0]),
        ('[{"a": 1}, {"a": 2}, "b": 0}, {"a": 3}]', [1, 2, 3], [21]),
        ('"a": 0}\n{"a": 1, "b{"a": 2}\n{"a": 3}', [2, 3], [0, 8]),
    ],
)
def test_damage_costs_one_record(text, kept, places):
    records, lost = whole_json(text)
    assert [record["a"] for record in records] == kept
    assert [start for start, _, _ in lost] == places


@pytest.mark.parametrize("added", ['"', ",", "}", "\n"])
def test_a_character_too_many_costs_one_record(added):
    whole = json.dumps(RECORDS)
    for at in range(3, len(whole)):
        records, _ = whole_json(whole[:at] + added + whole[at:])
        assert sum(record in RECORDS for record in records) >= 3


def test_line_breaks_in_strings_do_no_harm():
    lost = []
    records = whole_records('{"a": "x\n{"}\n{"a": "y"}\n', lost)
    assert records == [{"a": "x\n{"}, {"a": "y"}] and not lost


def test_an_object_keeps_its_whole_members():
    text = '{"a": {"b": 1, @}, "c": tru, "d": "x, "e": [{"f": 1}, {"f": @}, {"f": 2}], @}'
    kept, lost = whole_json(text)
    assert kept == {"a": {"b": 1}, "e": [{"f": 1}, {"f": 2}]}
    assert [text[start:end] for start, end, _ in lost] == ["@", "tru", '"x', '{"f": @}', "@"]


def test_repair_writes_a_new_file_and_says_what_it_kept(tmp_path, capsys):
    path = tmp_path / "r.jsonl"
    path.write_text("".join(LINES)[:-20])
    evaluate.main(["repair", str(path)])
    out = capsys.readouterr().out
    assert "r.repaired.jsonl: 3 records kept, 1 lost\n  line 4, column 1: Expecting" in out
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
        (["a.json"], "holds no whole record"),
        (["deep.json"], "nested too deeply"),
        (["pipe.jsonl"], "is no file"),
    ],
)
def test_mistakes_are_one_sentence(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text('"abc" x')
    (tmp_path / "deep.json").write_text('{"a":' * 100_000)
    os.mkfifo("pipe.jsonl")
    with pytest.raises(ConfigError, match=message):
        evaluate.main(["repair", *argv])
