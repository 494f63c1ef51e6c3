"""text.py: label masks against a reader that goes letter by letter, packing, other tokenizers."""

import json

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import data_synth
import model
from naive import naive_mask
from nanorecall.rng import IGNORE_INDEX
from nanorecall.settings import ConfigError, RunError
from nanorecall.text import BYTES, MASKS, label_mask, read_tokenizer, shift_labels
from toy_facts import own_data, write_jsonl
from toys import tokenizer_json

# ---- label masks ---------------------------------------------------------------------------------

PIECES = ["12", "7:34 ", ":", " ", "?", "Paris", "a>b", "1>2 ", "3>>45 ", ">", "COMPLETION:", "\n"]
PIECES += ["k = 'v'", "'", " = ", "é", "à", "Å", "…"]
NOTHING = np.zeros(0, np.int64)


@st.composite
def token_documents(draw):
    """Tokens of a document, with or without its BOS and EOS."""
    begin = draw(st.sampled_from([[], [BYTES.bos]]))
    text = "".join(draw(st.lists(st.sampled_from(PIECES), max_size=8)))
    end = draw(st.sampled_from([[], [BYTES.eos], [BYTES.eos, BYTES.bos]]))
    return np.concatenate([begin, BYTES.encode(text), end]).astype(np.int64)


@pytest.mark.parametrize("kind", MASKS)
@given(found=st.lists(token_documents(), max_size=6))
@example(found=[BYTES.encode(" = 'k = 'v' = 'w'").astype(np.int64)])
@settings(max_examples=300)
def test_labels_of_packed_documents_are_those_of_each_alone(kind, found):
    alone = np.concatenate([NOTHING, *[naive_mask(ids, kind) for ids in found]])
    cu_seqlens = np.cumsum([0, *map(len, found)])
    flat = np.concatenate([NOTHING, *found])
    assert np.array_equal(label_mask(flat, kind, cu_seqlens), alone)
    assert np.array_equal(label_mask(flat[None], kind, cu_seqlens), alone[None])


@pytest.mark.parametrize("kind", MASKS)
@given(found=st.lists(token_documents(), max_size=6))
@settings(max_examples=300)
def test_labels_of_padded_documents_are_those_of_each_alone(kind, found):
    longest = max(map(len, found), default=0) + 1
    tokens = np.full((len(found), longest), BYTES.pad)
    for row, ids in zip(tokens, found):
        row[: len(ids)] = ids
    for ids, labels in zip(found, label_mask(tokens, kind)):
        assert np.array_equal(labels[: len(ids)], naive_mask(ids, kind))
        assert (labels[len(ids) :] == IGNORE_INDEX).all()


HASHHOP = "ab = 'cd'\n\nCOMPLETION:\nHops=1\n\nCoT=False\n\nab = 'cd'\nx = 'a = b'\n"


@pytest.mark.parametrize(
    "kind, text, answer",
    [  # the first three are the examples of LLMonade's Masking Framework
        ("qa", "What is the capital of France?Paris", "Paris"),
        ("hashhop", "KmNp = 'QrSt'", "QrSt"),
        ("digits", "152435:145344 ", "145344"),
        ("qa", "1:2? 3:4?5", "5"),
        ("qa", "12:34 ", "34"),
        ("twohop", "017>>231 ", "231"),
        ("twohop", "017>>423>231 ", "423>231"),
        ("twohop", "017>a>b423>231 ", "423>231"),
        ("hashhop", HASHHOP, "cda = b"),
        ("text", "all", "all"),
        ("digits", "nothing here", ""),
        ("digits", "la:voilà Å:Åse ", "voilàÅse"),
        ("qa", "", ""),
    ],
)
def test_what_a_mask_keeps_of_a_text(kind, text, answer):
    ids = BYTES.encode(text)
    (labels,) = label_mask(ids[None], kind)
    is_label = labels != IGNORE_INDEX
    assert BYTES.decode(labels[is_label]) == answer
    assert np.array_equal(labels[is_label], ids[is_label])


def test_sequences_without_an_answer_have_a_finite_loss():
    tokens = np.stack([BYTES.encode("12:34 "), BYTES.encode("123456")]).astype(np.int64)
    net = model.GPT(model.Config(dim=8, n_layers=1, dk=4, dv=4, vocab_size=259, seq_len=8))
    for some in (tokens, tokens[1:]):
        targets = torch.from_numpy(shift_labels(label_mask(some, "digits"))).long()
        _, loss = net(torch.from_numpy(some), targets)
        loss.backward()
        assert torch.isfinite(loss)
        for p in net.parameters():
            assert torch.isfinite(p.grad).all()


def test_wrong_arguments_are_named():
    tokens = np.zeros((1, 3), int)
    with pytest.raises(ValueError, match="must be one of qa, hashhop"):
        label_mask(tokens, "quiz")
    for cu_seqlens in ([0, 2], [1, 3], [0, 2, 1, 3]):
        with pytest.raises(ValueError, match="must rise from 0 to the 3 tokens"):
            label_mask(tokens, "qa", cu_seqlens)


def test_targets_are_labels_one_position_earlier():
    labels = np.array([[-100, 5, 6], [-100, -100, 7]])
    assert shift_labels(labels).tolist() == [[5, 6, -100], [-100, 7, -100]]


# ---- tokenizers ----------------------------------------------------------------------------------


@given(st.text())
def test_bytes_come_back(text):
    text = text.encode(errors="replace").decode()
    ids = BYTES.encode(text)
    assert BYTES.decode(ids) == text
    assert len(ids) == len(text.encode()) and (ids < 256).all()


@pytest.fixture
def tokenizers():
    return pytest.importorskip("tokenizers", reason="the tokenizers extra is not installed")


def save_words(tokenizers, path, vocabulary, unknown):
    """Save a tokenizer of whole words."""
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=unknown))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.save(str(path))


def change_json(path, **changes):
    """Change a tokenizer.json. model: what changes within the model."""
    with open(path) as f:
        content = json.load(f)
    content["model"].update(changes.pop("model", {}))
    content.update(changes)
    with open(path, "w") as f:
        json.dump(content, f)


@pytest.mark.parametrize(
    "merges, inexact",
    [
        ([], ""),
        # Words and pieces of hashes: masks stay exact.
        (["C O", "M P", "Ġ =", "a b", "c d"], ""),
        (["> >"], ""),
        (["1 2"], "digits qa twohop"),
        ([": 1"], "digits qa"),
        (["2 Ġ"], "digits qa twohop"),
        (["> a"], "twohop"),
        (["a 1"], "twohop"),
        (["2 >"], "twohop"),
        (["' a"], "hashhop"),
    ],
    ids=str,
)
def test_a_tokenizer_whose_masks_are_not_exact_is_found(tmp_path, merges, inexact, capsys):
    path = tokenizer_json(tmp_path, merges)
    inexact = inexact.split()
    if inexact:
        with pytest.raises(RunError, match="would not be exact"):
            data_synth.main(["check", f"--tokenizer={path}"])
    else:
        data_synth.main(["check", f"--tokenizer={path}"])
    found = {}
    for line in capsys.readouterr().out.splitlines():
        _, kind, problem = line.split(": ", 2)
        found[kind] = problem != "exact"
    assert found == {kind: kind in inexact for kind in ("digits", "qa", "twohop", "hashhop")}
    for task in ("digits", "qa"):
        config = data_synth.Config(task=task, tokenizer=path)
        if task in inexact:
            with pytest.raises(ConfigError, match="does not suit these documents"):
                data_synth.Data(config)
        else:
            data_synth.Data(config)


def test_a_text_comes_back_from_a_tokenizer(tmp_path):
    tokenizer = read_tokenizer(tokenizer_json(tmp_path, ["a b", "c d"]))
    assert tokenizer.decode(tokenizer.encode("ab = 'cd'\n")) == "ab = 'cd'\n"
    n_tokens = 256 + 2 + 3  # bytes, merges, and padding, BOS and EOS
    assert tokenizer.vocab_size == len(tokenizer.token_strings) == n_tokens


def test_a_special_token_that_a_text_spells_comes_back(tmp_path, tokenizers):
    path = tokenizer_json(tmp_path, [])
    inner = tokenizers.Tokenizer.from_file(path)
    inner.add_special_tokens(["<end>"])
    inner.save(path)
    tokenizer = read_tokenizer(path)
    ids = tokenizer.encode("a <end> b")
    assert tokenizer.decode(ids) == "a <end> b" and len(ids) == 5


def test_numbers_of_tokens_may_have_gaps(tmp_path, tokenizers):
    save_words(tokenizers, tmp_path / "t.json", {"a": 0, "b": 1, "d": 9}, "a")
    tokenizer = read_tokenizer(str(tmp_path / "t.json"))
    assert (tokenizer.pad, tokenizer.vocab_size, len(tokenizer.token_strings)) == (10, 13, 13)
    assert tokenizer.encode("b d").tolist() == [1, 9] and tokenizer.decode([9, 10]) == "d"


@pytest.mark.parametrize(
    "vocabulary, message",
    [
        ({"a": 0, "b": 10**7}, "numbers a token 10000000; the largest number allowed is 1048575"),
        ({"a": 0, "b": 1, "c": 1}, "gives number 1 to two tokens, '[bc]' and '[bc]'"),
    ],
)
def test_numbers_of_tokens_are_bounded_and_all_different(tmp_path, tokenizers, vocabulary, message):
    save_words(tokenizers, tmp_path / "t.json", {"a": 0}, "a")
    change_json(tmp_path / "t.json", model={"vocab": vocabulary})
    with pytest.raises(ConfigError, match=f"t.json {message}"):
        read_tokenizer(str(tmp_path / "t.json"))


def test_a_tokenizer_only_cuts_text(tmp_path):
    """A longest length, padding or dropout that a file asks for would change the labels."""
    path = tokenizer_json(tmp_path, ["a b", "c d"])
    plain = read_tokenizer(path).encode("abcd " * 9).tolist()
    assert len(plain) == 27
    cut = {"max_length": 16, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    padded = {"strategy": {"Fixed": 60}, "direction": "Right", "pad_to_multiple_of": None}
    padded |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
    change_json(path, truncation=cut, padding=padded, model={"dropout": 0.9})
    for _ in range(3):
        assert read_tokenizer(path).encode("abcd " * 9).tolist() == plain


def test_a_broken_file_is_named(tmp_path, tokenizers):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ConfigError, match="x.json cannot be read as a tokenizer.json"):
        read_tokenizer(str(tmp_path / "x.json"))


# ---- tokenizers and documents of your own --------------------------------------------------------


def test_a_tokenizer_that_alters_documents_is_named(tmp_path):
    tokenizer = tokenizer_json(tmp_path, [])
    notes = write_jsonl(tmp_path / "x.jsonl", [{"text": f"Note {i}"} for i in range(9)])
    assert len(own_data(notes, tokenizer=tokenizer).notes) == 1
    change_json(tokenizer, normalizer={"type": "Lowercase"})
    note = own_data(notes, tokenizer=tokenizer).notes[1]
    assert "9 of 9 documents do not come back" in note
    assert "x.jsonl:1 for example, where 'Note 0' becomes 'note 0'" in note


QUESTIONS = [{"question": "Who?", "answer": "Ada"}, {"question": "Who??", "answer": "Bob"}]


@pytest.mark.parametrize(
    "unknown, message",
    [("[UNK]", "no token for a part of the answer"), ("gone", "cannot encode 'Who")],
)
def test_an_answer_with_an_unknown_word_is_rejected(tmp_path, tokenizers, unknown, message):
    vocabulary = {"Who": 0, "?": 1, "Ada": 2, "[UNK]": 3}
    save_words(tokenizers, tmp_path / "t.json", vocabulary, unknown)
    path = write_jsonl(tmp_path / "x.jsonl", QUESTIONS)
    with pytest.raises(ConfigError, match=message):
        own_data(path, tokenizer=str(tmp_path / "t.json"))


def test_an_answer_of_which_no_token_is_left_is_rejected(tmp_path, tokenizers):
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({"W": 0, "A": 1}, []))
    inner.save(str(tmp_path / "t.json"))  # it drops letters that it has no token for
    path = write_jsonl(tmp_path / "x.jsonl", QUESTIONS)
    message = "x.jsonl:2: tokenizer=.* no token for a part of the answer"
    with pytest.raises(ConfigError, match=message):
        own_data(path, tokenizer=str(tmp_path / "t.json"))
