"""text.py: label masks against a reader that goes letter by letter, packing, other tokenizers."""

import contextlib
import json

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import data_synth as D
import model as M
from naive import naive_mask
from nanorecall import text as K
from nanorecall.settings import ConfigError, RunError
from toys import tokenizer_json

# ---- the rules, one letter after another ---------------------------------------------------------


PIECES = [
    "12",
    "7:34 ",
    ":",
    " ",
    "?",
    "Paris",
    "a>b",
    "1>2 ",
    "3>>45 ",
    ">",
    "COMPLETION:",
    "\n",
    "k = 'v'",
    "'",
    " = ",
    "é",
    "à",
    "Å",
    "…",
]
words = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)
begin, end = (
    st.sampled_from([[], [K.BYTES.bos]]),
    st.sampled_from([[], [K.BYTES.eos], [K.BYTES.eos, K.BYTES.bos]]),
)
frames = st.tuples(begin, words, end)
documents = frames.map(
    lambda parts: np.concatenate([parts[0], K.BYTES.encode(parts[1]), parts[2]]).astype(np.int64)
)


@pytest.mark.parametrize("kind", K.MASKS)
@given(found=st.lists(documents, max_size=6))
@example(found=[K.BYTES.encode(" = 'k = 'v' = 'w'").astype(np.int64)])
@settings(max_examples=300, deadline=None)
def test_a_pack_is_its_documents_masked_alone_in_rows_too(kind, found):
    alone = [naive_mask(ids, kind) for ids in found]
    ends = np.cumsum([0, *map(len, found)])
    flat = np.concatenate([np.zeros(0, np.int64), *found])
    packed = K.label_mask(flat, kind, ends)
    assert packed.tolist() == np.concatenate([np.zeros(0, np.int64), *alone]).tolist()
    assert K.label_mask(flat[None], kind, ends)[0].tolist() == packed.tolist()
    longest = max(map(len, found), default=0) + 1
    rows = np.full((len(found), longest), K.BYTES.pad)
    for row, ids in zip(rows, found):
        row[: len(ids)] = ids
    for ids, labels in zip(alone, K.label_mask(rows, kind)):
        assert (
            labels[: len(ids)].tolist() == ids.tolist()
            and (labels[len(ids) :] == K.IGNORE_INDEX).all()
        )


@pytest.mark.parametrize(
    "kind, text, answer",
    [  # the three examples of LLMonade's Masking Framework
        ("qa", "What is the capital of France?Paris", "Paris"),
        ("hashhop", "KmNp = 'QrSt'", "QrSt"),
        ("digits", "152435:145344 ", "145344"),
        ("qa", "1:2? 3:4?5", "5"),
        ("qa", "12:34 ", "34"),
        ("twohop", "017>>231 ", "231"),
        ("twohop", "017>>423>231 ", "423>231"),
        ("twohop", "017>a>b423>231 ", "423>231"),
        (
            "hashhop",
            "ab = 'cd'\n\nCOMPLETION:\nHops=1\n\nCoT=False\n\nab = 'cd'\nx = 'a = b'\n",
            "cda = b",
        ),
        ("text", "all", "all"),
        ("digits", "nothing here", ""),
        ("digits", "la:voilà Å:Åse ", "voilàÅse"),
        ("qa", "", ""),
    ],
)
def test_what_is_left_of_an_example(kind, text, answer):
    ids = K.BYTES.encode(text)
    labels = K.label_mask(ids[None], kind)[0]
    assert K.BYTES.decode(labels[labels != K.IGNORE_INDEX]) == answer
    assert (labels[labels != K.IGNORE_INDEX] == ids[labels != K.IGNORE_INDEX]).all()


def test_rows_without_an_answer_have_a_finite_loss():
    tokens = np.stack([K.BYTES.encode("12:34 "), K.BYTES.encode("123456")]).astype(np.int64)
    model = M.GPT(M.Config(dim=8, n_layers=1, dk=4, dv=4, vocab_size=259, seq_len=8))
    for rows in (tokens, tokens[1:]):
        loss = model(
            torch.from_numpy(rows),
            torch.from_numpy(K.shift_labels(K.label_mask(rows, "digits"))).long(),
        )[1]
        loss.backward()
        assert torch.isfinite(loss) and all(
            torch.isfinite(p.grad).all() for p in model.parameters()
        )


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="must be one of qa, hashhop"):
        K.label_mask(np.zeros((1, 3), int), "quiz")
    for ends in ([0, 2], [1, 3], [0, 2, 1, 3]):
        with pytest.raises(ValueError, match="must rise from 0 to the 3 tokens"):
            K.label_mask(np.zeros((1, 3), int), "qa", ends)


@given(st.text())
def test_bytes_come_back(text):
    text = text.encode(errors="replace").decode()
    ids = K.BYTES.encode(text)
    assert K.BYTES.decode(ids) == text and len(ids) == len(text.encode()) and (ids < 256).all()


def test_shift():
    assert K.shift_labels(np.array([[-100, 5, 6], [-100, -100, 7]])).tolist() == [
        [5, 6, -100],
        [-100, 7, -100],
    ]


# ---- other tokenizers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "merges, bad",
    [
        ([], set()),
        (
            ["C O", "M P", "Ġ =", "a b", "c d"],
            set(),
        ),  # words and pieces of hashes: masks stay exact
        (["1 2"], {"digits", "qa", "twohop"}),
        ([": 1"], {"digits", "qa"}),
        (["2 Ġ"], {"digits", "qa", "twohop"}),
        (["> a"], {"twohop"}),
        (["a 1"], {"twohop"}),
        (["2 >"], {"twohop"}),
        (["' a"], {"hashhop"}),
        (["> >"], set()),
    ],
    ids=lambda v: str(sorted(v)),
)
def test_a_tokenizer_whose_masks_are_not_exact_is_found(tmp_path, merges, bad, capsys):
    path = tokenizer_json(tmp_path, merges)
    tokenizer = K.read_tokenizer(path)
    ids = tokenizer.encode("ab = 'cd'\n")
    assert (
        tokenizer.decode(ids) == "ab = 'cd'\n"
        and tokenizer.vocab_size == len(tokenizer.token_strings) == 256 + len(merges) + 3
    )
    outcome = (
        pytest.raises(RunError, match="would not be exact") if bad else contextlib.nullcontext()
    )
    with outcome:
        D.main(["check", f"--tokenizer={path}"])
    lines = [line.split(": ") for line in capsys.readouterr().out.splitlines()]
    assert {kind for _, kind, *problem in lines if problem != ["exact"]} == bad and len(lines) == 4
    for task in ("digits", "qa"):
        with (
            pytest.raises(ConfigError, match="does not suit these documents")
            if task in bad
            else contextlib.nullcontext()
        ):
            D.Data(D.Config(task=task, tokenizer=path))


def test_numbers_of_tokens_may_have_gaps(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="the tokenizers extra is not installed")
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"a": 0, "b": 1, "d": 9}, unk_token="a")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.save(str(tmp_path / "t.json"))
    tokenizer = K.read_tokenizer(str(tmp_path / "t.json"))
    assert (tokenizer.pad, tokenizer.vocab_size, len(tokenizer.token_strings)) == (10, 13, 13)
    assert tokenizer.encode("b d").tolist() == [1, 9] and tokenizer.decode([9, 10]) == "d"


def changed(path, change):
    """A tokenizer.json with a change in it."""
    about = json.loads(open(path).read())
    change(about)
    with open(path, "w") as f:
        json.dump(about, f)
    return path


def test_a_tokenizer_only_cuts_text(tmp_path):
    """What the file says of a longest length, of padding and of dropout would make other labels."""
    path = tokenizer_json(tmp_path, ["a b", "c d"])
    plain = K.read_tokenizer(path).encode("abcd " * 9).tolist()
    cut = {"max_length": 16, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    padded = {"strategy": {"Fixed": 60}, "direction": "Right", "pad_to_multiple_of": None}
    padded |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
    changed(
        path,
        lambda about: (
            about.update(truncation=cut, padding=padded),
            about["model"].update(dropout=0.9),
        ),
    )
    assert (
        len(plain) == 27
        and [K.read_tokenizer(path).encode("abcd " * 9).tolist() for _ in range(3)] == [plain] * 3
    )


def test_numbers_of_tokens_are_bounded_and_all_different(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="the tokenizers extra is not installed")
    path = str(tmp_path / "t.json")
    for vocabulary, message in (
        (
            {"a": 0, "b": 10**7},
            "t.json numbers a token 10000000; the largest number allowed is 1048575",
        ),
        ({"a": 0, "b": 1, "c": 1}, "t.json gives number 1 to two tokens, '[bc]' and '[bc]'"),
    ):
        tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(path)
        changed(path, lambda about: about["model"].update(vocab=vocabulary))
        with pytest.raises(ConfigError, match=message):
            K.read_tokenizer(path)


def test_what_a_tokenizer_alters_is_said_and_what_it_lacks_is_refused(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="the tokenizers extra is not installed")
    path, notes = tokenizer_json(tmp_path, []), tmp_path / "x.jsonl"
    notes.write_text("".join(json.dumps({"text": f"Note {i}"}) + "\n" for i in range(9)))
    settings = dict(task="text", path=str(notes), tokenizer=path)
    assert len(D.Data(D.Config(**settings)).notes) == 1
    changed(path, lambda about: about.update(normalizer={"type": "Lowercase"}))
    said = D.Data(D.Config(**settings)).notes[1]
    assert (
        "9 of 9 documents do not come back" in said
        and "x.jsonl:1 for one, where 'Note 0' becomes 'note 0'" in said
    )
    words = {"Who": 0, "?": 1, "Ada": 2, "[UNK]": 3}
    for unknown, message in (
        ("[UNK]", "no token for a part of the answer"),
        ("gone", "cannot encode 'Who"),
    ):
        inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token=unknown))
        inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        inner.save(path)
        notes.write_text(
            '{"question": "Who?", "answer": "Ada"}\n{"question": "Who??", "answer": "Bob"}\n'
        )
        with pytest.raises(ConfigError, match=message):
            D.Data(D.Config(**settings))
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE({"W": 0, "A": 1}, [])
    )  # it drops what it has no token for
    inner.save(path)
    with pytest.raises(
        ConfigError, match="x.jsonl:2: tokenizer=.* no token for a part of the answer"
    ):
        D.Data(D.Config(**settings))


def test_a_special_token_that_a_text_spells_comes_back(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="the tokenizers extra is not installed")
    path = tokenizer_json(tmp_path, [])
    inner = tokenizers.Tokenizer.from_file(path)
    inner.add_special_tokens(["<end>"])
    inner.save(path)
    tokenizer = K.read_tokenizer(path)
    ids = tokenizer.encode("a <end> b")
    assert tokenizer.decode(ids) == "a <end> b" and len(ids) == 5


def test_bytes_are_exact_and_a_broken_file_is_named(tmp_path):
    assert D.main(["check"]) == 0
    pytest.importorskip("tokenizers", reason="the tokenizers extra is not installed")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ConfigError, match="x.json cannot be read as a tokenizer.json"):
        K.read_tokenizer(str(tmp_path / "x.json"))
