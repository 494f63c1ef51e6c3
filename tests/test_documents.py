"""documents.py: documents of your own, how they are split, and files that cannot be read."""

import collections
import os
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import train
from data_synth import Config
from nanorecall.dataset_files import read_rows, rows_at_once
from nanorecall.files import dataset_sha256, sha256_file
from nanorecall.rng import IGNORE_INDEX
from nanorecall.run_dir import data_sha256
from nanorecall.settings import ConfigError
from nanorecall.text import BYTES
from toy_facts import SPLITS, counts, documents, own_data, scored_texts, write_jsonl
from toys import tokenizer_json

NOTES = [{"text": f"note {i}"} for i in range(100)]
FACTS = []  # 200 questions with an answer, sorted by first name
for first_name in "abcdefghijklmnopqrst":
    for surname in "ABCDEFGHIJ":
        question = f"Where does {first_name} {surname} live?"
        FACTS.append({"question": question, "answer": f"in {first_name}{surname}"})


def split_sets(data):
    """The documents of train, val and test, as sets."""
    return [set(documents(data, split)) for split in SPLITS]


# ---- forms of documents --------------------------------------------------------------------------


def test_all_of_a_text_is_scored_and_its_end(tmp_path):
    data = own_data(write_jsonl(tmp_path / "x.jsonl", [{"text": "one\nü"}, *NOTES]))
    assert scored_texts(data, "test", [0]) == documents(data, "test", [0])
    assert data.batch("test", 0, [0])[1].max() == BYTES.eos


@pytest.mark.parametrize("pack_documents", [False, True])
def test_of_a_question_the_answer_is_scored(tmp_path, pack_documents):
    rows = [{"question": "Who? Me?", "answer": f"You? {i}"} for i in range(3)]
    data = own_data(write_jsonl(tmp_path / "x.jsonl", rows), pack_documents=pack_documents)
    assert sorted(scored_texts(data, "test", range(3))) == ["You? 0", "You? 1", "You? 2"]
    _, targets, *_ = data.batch("train", 0, range(3))
    assert (targets != IGNORE_INDEX).sum() == 3 * 7  # six letters and the end


def test_a_mask_finds_the_answer_in_a_text(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "Is it? Yes"}] * 3)
    assert scored_texts(own_data(path, label_mask="qa"), "train", [0]) == [" Yes"]


def test_the_end_alone_is_no_answer(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "Is it?"}, {"text": "Is it? Yes"}] * 9)
    encoder = own_data(path, label_mask="qa").encoder
    for text, n_labels in (("Is it?", 0), ("Is it? Yes", 5)):
        _, labels, _ = encoder.encode_and_label([text])
        assert (labels != IGNORE_INDEX).sum() == n_labels


def test_a_mask_that_finds_no_answer_is_named(tmp_path):
    path = write_jsonl(tmp_path / "t{a}.jsonl", NOTES[:30])
    message = "label_mask=digits finds no answer in the first 28 documents of train"
    with pytest.raises(ConfigError, match=message):
        own_data(path, label_mask="digits")


def test_a_mask_without_texts_has_no_effect(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", FACTS[:30])
    message = "label_mask=digits has no effect: all documents have an answer field"
    with pytest.raises(ConfigError, match=message):
        own_data(path, label_mask="digits")


# ---- splits --------------------------------------------------------------------------------------


def test_texts_are_split_in_ninety_five_and_five(tmp_path):
    data = own_data(write_jsonl(tmp_path / "x.jsonl", NOTES))
    parts = split_sets(data)
    assert [len(part) for part in parts] == counts(data) == [90, 5, 5]
    assert len(set.union(*parts)) == 100


def test_the_split_of_texts_depends_on_seed_and_content_alone(tmp_path):
    data = own_data(write_jsonl(tmp_path / "x.jsonl", NOTES))
    turned = own_data(write_jsonl(tmp_path / "turned.jsonl", NOTES[::-1]))
    assert split_sets(data) == split_sets(turned)
    other_seed = own_data(tmp_path / "x.jsonl", seed=1)
    assert split_sets(other_seed)[2] != split_sets(data)[2]


@pytest.mark.parametrize("form", ["question", "text"])
def test_all_facts_of_your_own_are_trained_on_and_measured(tmp_path, form):
    if form == "question":
        data = own_data(write_jsonl(tmp_path / "x.jsonl", FACTS))
    else:
        lines = [{"text": f"{i}:{7 * i} "} for i in range(200)]
        data = own_data(write_jsonl(tmp_path / "x.jsonl", lines), label_mask="digits")
    trained, val, test = split_sets(data)
    assert counts(data) == [200] * 3 and trained == val == test
    assert "seen" not in data.batch("test", 0, [0])[2]
    line = "train 200, val 200 (200 of them trained on), test 200 (200 of them trained on)"
    assert data.notes == [f"documents: {line}"]


def test_the_notes_say_that_a_part_is_measured(tmp_path):
    data = own_data(write_jsonl(tmp_path / "x.jsonl", FACTS), n_val_examples=50)
    assert "val 50 of 200 (50 of them trained on), test 200" in data.notes[0]


def test_held_out_facts_are_a_slice(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", FACTS + FACTS[:3])
    data = own_data(path, heldout_facts=0.1)
    trained, val, test = split_sets(data)
    assert len(trained) == 180 and trained < test and val == test and counts(data)[2] == 200
    _, targets, slices = data.batch("test", 0, range(200))
    n_labels = (targets != IGNORE_INDEX).sum(1).numpy()
    is_trained = [document in trained for document in documents(data, "test")]
    assert np.array_equal(slices["seen"], np.repeat(is_trained, n_labels))


def test_held_out_facts_are_a_random_sample(tmp_path):
    data = own_data(write_jsonl(tmp_path / "x.jsonl", FACTS), heldout_facts=0.1)
    trained, _, test = split_sets(data)
    first_names = {question.split()[2] for question, _ in test - trained}
    assert len(first_names) > 5  # not the last lines of the file, which have two


def test_heldout_facts_that_cannot_be_are_rejected(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", FACTS)
    with pytest.raises(ConfigError, match="holds out none, or all"):
        own_data(path, heldout_facts=0.001)
    with pytest.raises(ConfigError, match="heldout_facts=0.95 must be between 0 and 0.9"):
        Config(task="text", path=path, heldout_facts=0.95).check()
    path = write_jsonl(tmp_path / "notes.jsonl", NOTES)
    with pytest.raises(ConfigError, match="heldout_facts has no effect"):
        own_data(path, heldout_facts=0.5)


def test_a_held_out_question_is_not_trained_on_in_other_words(tmp_path):
    """In another Unicode form or with other blanks it is the same question."""
    rows = []
    for form in ("caf\u00e9 {}?", "cafe\u0301  {}?"):
        for i in range(40):
            rows.append({"question": form.format(i), "answer": "yes"})
    data = own_data(write_jsonl(tmp_path / "x.jsonl", rows), heldout_facts=0.5)
    trained, _, test = split_sets(data)
    numbers = []
    for part in (trained, test - trained):
        questions = " ".join(question for question, _ in part)
        numbers.append(set(re.findall(r"\d+", questions)))
    assert [len(part) for part in numbers] == [20, 20] and not numbers[0] & numbers[1]
    assert len(data.notes) == 1  # two forms of one fact are no second answer


def without_form(text):
    """A text without its blanks and its Unicode form."""
    return "".join(text.replace("e\u0301", "\u00e9").split())


def test_copies_of_a_text_share_a_split(tmp_path):
    """Ten lines twenty times, in two Unicode forms and with other blanks."""
    forms = ["caf\u00e9 {}", "cafe\u0301 {}", "caf\u00e9  {}\n"]
    lines = [{"text": forms[i % 3].format(i % 10)} for i in range(200)]
    data = own_data(write_jsonl(tmp_path / "x.jsonl", lines))
    parts = [set(map(without_form, part)) for part in split_sets(data)]
    assert [len(part) for part in parts] == [8, 1, 1] and len(set.union(*parts)) == 10
    # Trained on as often as they are there, measured once in each form.
    assert counts(data) == [160, 3, 3]
    trained = collections.Counter(map(without_form, documents(data, "train")))
    assert trained == dict.fromkeys(parts[0], 20)
    line = "documents: train 160 (24 different), val 3 (0 of them trained on)"
    assert data.notes[0].startswith(line)


def test_texts_that_are_all_the_same_cannot_be_split(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", NOTES[:2] * 50)
    with pytest.raises(ConfigError, match="x.jsonl has 2 documents that differ"):
        own_data(path)


@pytest.fixture
def folders(tmp_path):
    """train/, validation/ and test/ that share some texts."""
    rows = {"train": NOTES[:6] * 2, "validation": NOTES[5:7] * 3, "test": NOTES[:8]}
    for name in rows:
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "x.jsonl", rows[name])
    return tmp_path


def test_folders_say_what_they_share(folders):
    data = own_data(folders)
    line = (
        "documents: train 12 (6 different), val 2 (1 of them trained on), "
        "test 8 (6 of them trained on)"
    )
    assert data.notes == [line]
    trained, _, _ = split_sets(data)
    for index in range(8):
        _, _, slices = data.batch("test", 0, [index])
        assert slices["seen"][0] == (documents(data, "test", [index])[0] in trained)
    with pytest.raises(ConfigError, match="heldout_facts has no effect"):
        own_data(folders, heldout_facts=0.5)


def test_folders_of_parquet(tmp_path):
    for name in ("train", "validation", "test"):
        (tmp_path / name).mkdir()
        pq.write_table(pa.Table.from_pylist(FACTS[:3]), tmp_path / name / "a.parquet")
    assert counts(own_data(tmp_path)) == [3, 3, 3]


def test_two_answers_to_one_question_are_named(tmp_path):
    answers = (("Who?", "A"), ("caf\u00e9?", "B"), ("Who? ", "C"), ("cafe\u0301?", "B"))
    rows = [{"question": question, "answer": answer} for question, answer in answers]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    assert own_data(path).notes[1:] == [
        f"note: questions with more than one answer: 1, {path}:1 and {path}:3 for example; "
        "no model can answer both correctly"
    ]
    texts = ("12:3 ", "12:4 ", "13:4 ", "12:3 ")
    path = write_jsonl(tmp_path / "y.jsonl", [{"text": text} for text in texts])
    assert f"1, {path}:1 and {path}:2 for example" in own_data(path, label_mask="digits").notes[1]


def test_the_labels_of_every_document_are_exact(tmp_path):
    """A merge of two digits may occur in the last one only."""
    texts = [f"{n}:{n % 7}" for n in range(100, 1500) if "98" not in str(n)]
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": text} for text in (*texts, "3:98")])
    tokenizer = tokenizer_json(tmp_path, ["9 8"])
    with pytest.raises(ConfigError, match="'98' in '3:98' is one token: digits are merged"):
        own_data(path, label_mask="qa", tokenizer=tokenizer)


def test_the_checksum_of_a_folder_is_of_names_and_contents(folders, tmp_path_factory):
    """A run is bound to its documents by it, wherever they lie."""
    before = dataset_sha256(str(folders))
    place = tmp_path_factory.mktemp("elsewhere") / "x"
    assert dataset_sha256(shutil.copytree(folders, place)) == before
    write_jsonl(place / "test" / "x.jsonl", NOTES[:9])
    changed = dataset_sha256(place)
    os.rename(place / "test" / "x.jsonl", place / "test" / "y.jsonl")
    assert len({before, changed, dataset_sha256(place)}) == 3


def test_documents_beside_a_metadata_json_are_compared(folders, tmp_path_factory):
    """Unlike those of a data set whose reader compares them with it."""
    place = tmp_path_factory.mktemp("with_metadata") / "x"
    shutil.copytree(folders, place)
    (place / "metadata.json").write_text("{}")
    settings = train.parse(["--data=data_synth", "--task=text", f"--path={place}"])
    sums = set()
    for n in (8, 9):
        write_jsonl(place / "test" / "x.jsonl", NOTES[:n])
        sums.add(data_sha256(settings, "path", str(place)))
    assert len(sums) == 2
    facts = train.parse(["--data=data_synth", "--task=qa", f"--path={place}"])
    assert data_sha256(facts, "path", str(place)) == sha256_file(place / "metadata.json")


# ---- files of other programs ---------------------------------------------------------------------


def test_a_byte_order_mark_and_line_ends_of_windows_are_no_text(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"text": "ab"}\r\n\r\n{"text": "cd"}\r\n{"text": "ef"}')
    assert sorted(own_data(path).source.texts) == ["ab", "cd", "ef"]


def test_utf_16_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes('{"text": "ab"}\n'.encode("utf-16"))
    with pytest.raises(ConfigError, match="x.jsonl is UTF-16; save it as UTF-8"):
        own_data(path)


def test_null_stands_for_what_a_row_lacks_and_other_columns_are_left_out(tmp_path):
    empty = {"text": None, "question": None, "answer": None}
    rows = [{"text": "ab"}, {"question": "Who?", "answer": "me"}, {"text": "cd"}, {"text": "ef"}]
    table = pa.Table.from_pylist([{**empty, **row} for row in rows])
    # Values that Python's datetime cannot hold.
    table = table.append_column("when", pa.array([2**62, None, 0, 1], pa.timestamp("ns")))
    table = table.append_column("long", pa.array([2**62] * 4, pa.duration("s")))
    pq.write_table(table, tmp_path / "x.parquet")
    found = own_data(tmp_path / "x.parquet").source.texts
    assert set(found) == {"ab", ("Who? ", "me"), "cd", "ef"}


def test_a_text_that_many_rows_of_parquet_share_does_not_fill_the_memory(tmp_path):
    shared = pa.DictionaryArray.from_arrays(pa.array([0] * 3000, pa.int32()), ["a" * 2**23])
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": shared}), path, store_schema=False)
    assert os.path.getsize(path) < 2**20
    assert 1 <= rows_at_once(pq.read_metadata(path), ["text"]) <= 2**30 // 2**23
    with pytest.raises(ConfigError, match="row 1: 'text' has more than 1048576 letters"):
        own_data(path)


def test_long_lists_of_parquet_do_not_fill_the_memory(tmp_path):
    zeros = pa.ListArray.from_arrays(pa.array([0, 10**6], pa.int32()), pa.nulls(10**6, pa.int8()))
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": zeros}), path)
    assert os.path.getsize(path) < 2**12
    with pytest.raises(ConfigError, match="cells of more than 1000 values"):
        own_data(path)
    # Such as an embedding beside the text, which is not read.
    pq.write_table(pa.table({"text": ["a" * 9], "zeros": zeros}), path)
    assert rows_at_once(pq.read_metadata(path), ["text"]) == 1000
    assert list(read_rows(str(path), ("text",))) == [({"text": "a" * 9}, f"{path}: row 1")]


def test_a_pipe_is_no_tokenizer(tmp_path):
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    write_jsonl(tmp_path / "x.jsonl", NOTES)
    os.mkfifo(tmp_path / "t.json")
    with pytest.raises(ConfigError, match="cannot be read as a tokenizer.json .t.json is no file"):
        own_data(tmp_path / "x.jsonl", tokenizer=str(tmp_path / "t.json"))


def test_a_pipe_is_no_file_of_documents(tmp_path):
    os.mkfifo(tmp_path / "x.jsonl")
    with pytest.raises(ConfigError, match="x.jsonl is no file"):
        own_data(tmp_path)


def test_thousands_of_columns_are_compared_at_once(tmp_path):
    (tmp_path / "x.csv").write_text(",".join(f"c{i}" for i in range(10**5)) + ",c7\n")
    with pytest.raises(ConfigError, match="two columns have the same name 'c7'"):
        own_data(tmp_path / "x.csv")


def test_two_columns_of_one_name_are_rejected(tmp_path):
    columns = [pa.array(["a"]), pa.array(["b"])]
    table = pa.Table.from_arrays(columns, names=["text", "text"])
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match="has two columns named"):
        own_data(tmp_path / "x.parquet")


CSV = b'''id,question,answer\r
7,"Who, and ""when""?",1921\r
\r
8,Where?,"Bern
(Zurich)"
9,Why?,so
'''


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_csv_is_read_as_text(tmp_path, mark):
    path = tmp_path / "x.csv"
    path.write_bytes(mark + CSV)
    texts = [('Who, and "when"? ', "1921"), ("Where? ", "Bern\n(Zurich)"), ("Why? ", "so")]
    source = own_data(path).source
    assert source.texts == texts
    # An empty line, and a cell of two lines.
    assert source.origins == [f"{path}:2", f"{path}:4", f"{path}:6"]


# ---- files that cannot be read -------------------------------------------------------------------

BAD_LINES = {  # name: (bytes of line 2, what the sentence says)
    "torn": (b'{"text": "ab', "no JSON"),
    "column": (b'{"txt": "ab"}', 'needs "text", or "question" and "answer"; it has txt'),
    "half": (b'{"question": "ab"}', 'needs "text", or "question" and "answer"; it has question'),
    "utf-8": (b'{"text": "ab\xff"}', "byte 13 of the line is no UTF-8"),
    "null": (b'{"text": null}', '"text" is NoneType, not text'),
    "number": (b'{"text": 3}', '"text" is int, not text'),
    "list": (b'["text"]', "a JSON list, not an object"),
    "empty": (b'{"text": " "}', '"text" is empty'),
    "long": (b'{"text": "' + b"a" * 10_000_000 + b'"}', "a line of more than 1048576 bytes"),
    "document": (
        b'{"text": "' + b"a" * 300 + b'"}',
        "a document of 302 bytes, more than max_bytes=256",
    ),
    "surrogate": (b'{"text": "\\ud800"}', "half of a surrogate pair"),
    "deep": (b"[" * 100_000, "no JSON"),
    "twice": (b'{"question": "a", "question": "b"}', "the name 'question' comes twice"),
    "digits": (b'{"text": ' + b"1" * 5000 + b"}", "Exceeds the limit"),
    "both": (b'{"text": "a", "question": "b", "answer": "c"}', 'has "text", and "question"'),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named(tmp_path, name):
    line, message = BAD_LINES[name]
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "ab"}\n' + line + b'\n{"text": "cd"}\n')
    expected = re.escape(f"{path}:2: ") + ".*" + re.escape(message)
    with pytest.raises(ConfigError, match=expected) as e:
        own_data(path)
    assert "\n" not in str(e.value) and len(str(e.value)) < 400


def test_csv_may_have_spaces_after_commas_and_long_cells(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(f'question, answer\na, "b, c"\nd, {"e" * 200_000}\n')
    rows = [row for row, _ in read_rows(str(path))]
    assert rows[0] == {"question": "a", "answer": "b, c"}
    assert rows[1] == {"question": "d", "answer": "e" * 200_000}


BAD_ROWS = {  # lines 2 to 4 of a .csv: what the sentence says
    b'a,b\nc,"d\ne,f': "x.csv:3: the row that begins here is no csv",
    b'a,b\nc,"d"e\n': "x.csv:3: the row that begins here is no csv",
    b"a,b\nc\n": "x.csv:3: fewer cells than the 2 names of the first line; is a comma missing?",
    b"a,b\nc,d,e\n": "x.csv:3: more cells than the 2 names of the first line; put quotes",
    b"a,b\nc,d\0\n": "x.csv:3: a zero byte",
    b"a,b\nc,Z\xfcrich\n": "x.csv:3: byte 4 of the line is no UTF-8",
    b"a,b\nc, \n": 'x.csv:3: "answer" is empty',
}


@pytest.mark.parametrize("rows", BAD_ROWS)
def test_a_bad_row_of_csv_is_named(tmp_path, rows):
    path = tmp_path / "x.csv"
    path.write_bytes(b"question,answer\n" + rows)
    with pytest.raises(ConfigError, match=re.escape(BAD_ROWS[rows])) as e:
        own_data(path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "text, message",
    [
        (b"question;answer\na;b\n", "x.csv:2: needs .* it has question;answer"),
        (b"answer,a,b,,\na,b\n", "x.csv:1: two columns have the same name '';"),
        (b"question,answer\rQ,A\r", "or are lines ended by a carriage return alone"),
        (b"answer,answer\na,b\n", "x.csv:1: two columns have the same name"),
        ("question,answer\na,b\n".encode("utf-16"), "x.csv is UTF-16; save it as UTF-8"),
        (b"question,answer\n", "has 0 documents"),
    ],
)
def test_a_bad_head_of_csv_is_named(tmp_path, text, message):
    (tmp_path / "x.csv").write_bytes(text)
    with pytest.raises(ConfigError, match=message):
        own_data(tmp_path / "x.csv")


def test_bad_input_ends_a_run_with_a_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"text": "ab"}\n{"text": "a')
    with pytest.raises(ConfigError, match="x.jsonl:2: no JSON"):
        train.main(["--data=data_synth", "--task=text", "--path=x.jsonl", "--log_dir=runs"])
    assert os.listdir(tmp_path) == ["x.jsonl"]


def test_a_flipped_bit_of_parquet_is_named(tmp_path):
    path = tmp_path / "x.parquet"
    generator = np.random.default_rng(0)
    letters = generator.integers(97, 122, (2000, 40))
    table = pa.table({"text": ["".join(map(chr, row)) for row in letters]})
    pq.write_table(table, path, write_page_checksum=True, use_dictionary=False, compression="none")
    whole, n_noticed = path.read_bytes(), 0
    for position in np.linspace(0, len(whole) - 1, 60).astype(int):
        damaged = bytearray(whole)
        damaged[position] ^= 1  # another letter, mostly: only the checksum shows it
        path.write_bytes(damaged)
        try:
            own_data(path)
        except ConfigError as e:
            n_noticed += 1
            assert "x.parquet: " in str(e) and "\n" not in str(e)
    assert n_noticed >= 55  # a flip in a part that no reader needs changes nothing


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"text": "a"}, {"text": None}], 'row 2: "text" is NoneType'),
        ([{"x": 1}], "row 1: needs"),
    ],
)
def test_a_bad_row_of_parquet_is_named(tmp_path, rows, message):
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match=message):
        own_data(tmp_path / "x.parquet")


@pytest.mark.parametrize(
    "name, message",
    [
        ("nowhere", "does not exist"),
        ("", "holds no .jsonl"),
        ("x.txt", "neither .jsonl, .parquet nor .csv"),
        ("e.jsonl", "has 0 doc"),
    ],
)
def test_paths_that_hold_nothing(tmp_path, name, message):
    if "." in name:
        (tmp_path / name).write_text("")
    with pytest.raises(ConfigError, match=message):
        own_data(tmp_path / name)
