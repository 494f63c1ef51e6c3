"""Text into tokens, and the tokens of the answers as labels.

>>> ids = BYTES.encode("152435:145344 ")
>>> labels = label_mask(ids[None], "digits")[0]
>>> BYTES.decode(labels[labels != IGNORE_INDEX])
'145344'

A document is BOS, its text, and EOS where the text has no end of its own. Labels are unshifted:
labels[i] is tokens[i] or -100. `shift_labels` moves each to the position that predicts it.

Letters: B sequences of a batch, T tokens in one, D documents, N tokens of all documents together.
"""

import functools
import json

import numpy as np

from nanorecall.files import size_of_file
from nanorecall.rng import IGNORE_INDEX
from nanorecall.settings import ConfigError, require

# ---- tokenizers ----------------------------------------------------------------------------------


class ByteTokenizer:
    """Every byte of the UTF-8 text is a token: nothing to download, and no token ever spans two
    digits or a quote."""

    name = "bytes"
    pad, bos, eos, vocab_size = 256, 257, 258, 259
    unknown = -1  # no such token: every text has its bytes
    # The text of each token. A byte from 128 on is a part of a letter.
    token_strings = (*map(chr, range(128)), *["\ufffd"] * 128, "", "", "")

    def encode(self, text):
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint16)

    def decode(self, ids):
        return bytes(i for i in np.asarray(ids).tolist() if i < 256).decode(errors="replace")


MAX_TOKENS = 2**20  # token ids end there; each costs a row of the embedding, used or not


class FileTokenizer:
    """A tokenizer.json, read by the `tokenizers` package. Padding, BOS and EOS are three tokens
    after its own.

    It only cuts text into tokens. Truncation, padding and dropout, which the file may ask for, are
    switched off: they would change the labels.
    """

    def __init__(self, path):
        self.name = path
        self.inner = read_json_tokenizer(path)
        self.inner.no_truncation()
        self.inner.no_padding()
        if getattr(self.inner.model, "dropout", None):
            self.inner.model.dropout = None
        vocabulary = self.inner.get_vocab()
        size = 1 + max(vocabulary.values(), default=0)  # ids may have gaps
        large = f"{path} numbers a token {size - 1}; the largest number allowed is {MAX_TOKENS - 1}"
        require(size <= MAX_TOKENS, large, "tokenizer")
        token_of = {}
        for token, number in vocabulary.items():
            other = token_of.setdefault(number, token)
            message = f"{path} gives number {number} to two tokens, {other!r} and {token!r}"
            require(other == token, message, "tokenizer")
        self.pad, self.bos, self.eos, self.vocab_size = size, size + 1, size + 2, size + 3
        self.unknown = unknown_token(self.inner)
        # SentencePiece and byte-level BPE write blanks as visible characters.
        blanks = str.maketrans({"▁": " ", "Ġ": " ", "Ċ": "\n"})
        strings = [token_of.get(i, "").translate(blanks) for i in range(size)]
        self.token_strings = (*strings, "", "", "")

    def encode(self, text):
        try:
            return np.array(self.inner.encode(text, add_special_tokens=False).ids, np.int32)
        except BaseException as e:
            raise refusal(e, f"{self.name} cannot encode {text[:40]!r}") from None

    def decode(self, ids):
        ids = [i for i in np.asarray(ids).tolist() if i < self.pad]
        try:
            # A text may spell a special token of the file's, so these are not skipped.
            return self.inner.decode(ids, skip_special_tokens=False)
        except BaseException as e:
            raise refusal(e, f"{self.name} cannot decode {str(ids)[:40]}") from None


def read_json_tokenizer(path):
    """A tokenizer.json -> tokenizers.Tokenizer; ConfigError if it cannot be read."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        message = f"tokenizer={path} needs a package: pip install tokenizers"
        raise ConfigError(message, "tokenizer") from None
    try:
        size_of_file(path)
        with open(path, encoding="utf-8-sig") as f:
            return Tokenizer.from_str(f.read())
    except BaseException as e:
        raise refusal(e, f"{path} cannot be read as a tokenizer.json") from None


def refusal(error, what, key="tokenizer"):
    """The ConfigError for an error of the `tokenizers` package; any other error is returned as is.

    key: the setting that names the tokenizer.

    The package raises plain Exception. Where its Rust code fails it raises a PanicException, which
    is not a subclass of Exception.
    """
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
        return ConfigError(f"{what} ({' '.join(str(error).split())[:80]})", key)
    return error


def unknown_token(inner):
    """The id of the token for unknown text; -1: there is none."""
    model = json.loads(inner.to_str())["model"]
    if "unk_token" in model:
        number = inner.token_to_id(model["unk_token"] or "")
    else:
        number = model.get("unk_id")
    return -1 if number is None else number


BYTES = ByteTokenizer()


def read_tokenizer(path):
    """The tokenizer of a setting: "" is bytes, else the path of a tokenizer.json."""
    return FileTokenizer(path) if path else BYTES


@functools.cache
def token_class(tokenizer, characters):
    """(vocabulary,) bool: the tokens made of `characters`, with or without spaces around them;
    " " finds blank tokens."""
    if characters == " ":
        return np.array([text != "" and text.isspace() for text in tokenizer.token_strings])
    allowed = set(characters)
    stripped = [text.strip() for text in tokenizer.token_strings]
    return np.array([text != "" and set(text) <= allowed for text in stripped])


# ---- label masks ---------------------------------------------------------------------------------


class Segments:
    """Tokens of segments (rows or documents) end to end, with the questions that masks are made of.

    ids (N,); start, end (N,): where the segment of each token begins and ends. Each method answers
    for all tokens at once, and no answer depends on another segment.
    """

    def __init__(self, ids, start, end, tokenizer):
        self.ids, self.start, self.end = ids, start, end
        self.tokenizer = tokenizer
        self.index = np.arange(len(ids))
        self.special = ids >= tokenizer.pad

    def is_in(self, characters):
        return token_class(self.tokenizer, characters)[self.ids]

    def last_index(self, event):
        """(N,) index of the latest event up to each token; -1: none."""
        latest = np.maximum.accumulate(np.where(event, self.index, -1))
        return np.where(latest >= self.start, latest, -1)

    def last_index_before(self, event):
        """As `last_index`, but strictly before each token."""
        latest = np.maximum.accumulate(np.where(event, self.index, -1))
        latest = np.concatenate([[-1], latest[:-1]])
        return np.where(latest >= self.start, latest, -1)

    def cumulative_count(self, event):
        """-> events up to each token (N,), and in all of its segment (N,)."""
        sums = np.concatenate([[0], np.cumsum(event)])
        before = sums[self.start]
        return sums[1:] - before, sums[self.end] - before

    def completes(self, text):
        """(N,) bool: does this token end `text`, in any way that the tokenizer may cut it?"""
        is_end = np.zeros(len(self.ids), bool)
        for tokens in tokenizations(self.tokenizer, text):
            matches = np.ones(len(self.ids), bool)
            for back, token in enumerate(reversed(tokens)):
                inside = self.index - back >= self.start
                matches &= (np.roll(self.ids, back) == token) & inside
            is_end |= matches
        return is_end


@functools.cache
def tokenizations(tokenizer, text):
    """The token sequences that may stand for `text`: a tokenizer may cut it differently after a
    line break or a space."""
    sequences = set()
    for before in ("", "\n", "\n\n", " "):
        ids = tokenizer.encode(before + text).tolist()
        # Drop tokens in front as long as the rest still spells the text.
        while "".join(tokenizer.token_strings[i] for i in ids[1:]).strip().endswith(text):
            ids = ids[1:]
        sequences.add(tuple(ids))
    return sequences


def digits_mask(s):
    """`key:value `: from each colon to the next blank."""
    colon = s.is_in(":")
    end = s.is_in(" ") | s.special
    opened = s.last_index(colon)
    return (opened >= 0) & (opened == s.last_index(colon | end)) & ~colon


def qa_mask(s):
    """Everything after the last question mark, the end token too; without a question mark, the
    value after the last colon."""
    mark = s.is_in("?")
    marks, all_marks = s.cumulative_count(mark)
    answer = (marks == all_marks) & ~mark & text_mask(s)
    colons, all_colons = s.cumulative_count(s.is_in(":"))
    return np.where(all_marks > 0, answer, digits_mask(s) & (colons == all_colons))


def hashhop_mask(s):
    """Between `= '` and the next quote, without the quotes; in a segment with COMPLETION: only
    after it."""
    quote = s.is_in("'")
    last_word = s.last_index_before(~s.is_in(" "))  # the last token that is no blank
    may_open = quote & (last_word >= 0) & s.is_in("=")[last_word]
    # The next quote closes, even after a "=". Of quotes in a row that may open, every other one
    # does, so count them from the last certain end.
    count = s.cumulative_count(may_open)[0]
    closed = s.last_index((quote & ~may_open) | s.special)
    since_closed = count - np.where(closed >= 0, count[closed], 0)
    opened = s.last_index(may_open & (since_closed % 2 == 1))
    inside = (opened >= 0) & (opened == s.last_index(quote | s.special)) & ~quote
    completion = s.completes("COMPLETION:")
    has_completion = s.cumulative_count(completion)[1] > 0
    return inside & (~has_completion | (s.last_index_before(completion) >= 0))


def twohop_mask(s):
    """`a>b `, `a>>c `, `a>>b>c `, with or without letters among the marks: from the first digit
    after the marks to the blank."""
    digit = s.is_in("0123456789")
    end = s.is_in(" ") | s.special
    after_mark = s.last_index_before(s.is_in(">")) > s.last_index_before(end)
    starts = digit & after_mark & ~digit[np.maximum(s.index - 1, 0)]
    return (s.last_index(starts) > s.last_index(end)) & ~end


def text_mask(s):
    """Everything but padding and the first token of a document."""
    return (s.ids != s.tokenizer.pad) & (s.ids != s.tokenizer.bos)


MASKS = {
    "qa": qa_mask,
    "hashhop": hashhop_mask,
    "digits": digits_mask,
    "twohop": twohop_mask,
    "text": text_mask,
}


def label_mask(tokens, kind, cu_seqlens=None, tokenizer=BYTES):
    """Labels of tokens: the tokens of the answers, -100 elsewhere; unshifted, int32, of the same
    shape.

    tokens: integers (B, T), each row a segment with padding at its end; or, with cu_seqlens
    (D + 1,), documents end to end, (N,) or (1, N): document d is tokens cu_seqlens[d] to
    cu_seqlens[d + 1]. kind: a key of MASKS. ValueError for another kind, or if cu_seqlens does
    not fit. These are the label masks of LLMonade (Masking Framework), segment by segment.
    """
    if kind not in MASKS:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(MASKS)}")
    tokens = np.asarray(tokens)
    flat = tokens.reshape(-1)
    if cu_seqlens is None:
        cu_seqlens = np.arange(0, flat.size + 1, max(1, tokens.shape[-1]))
    else:
        cu_seqlens = np.asarray(cu_seqlens)
        fits = len(cu_seqlens) >= 1 and cu_seqlens[0] == 0 and cu_seqlens[-1] == flat.size
        if not fits or (np.diff(cu_seqlens) < 0).any():
            start = cu_seqlens.tolist()[:8]
            message = f"cu_seqlens must rise from 0 to the {flat.size} tokens, got {start}..."
            raise ValueError(message)
    if flat.size == 0:
        return tokens.astype(np.int32)
    lengths = np.diff(cu_seqlens)
    start = np.repeat(cu_seqlens[:-1], lengths)
    end = np.repeat(cu_seqlens[1:], lengths)
    is_label = MASKS[kind](Segments(flat, start, end, tokenizer))
    return np.where(is_label, flat.astype(np.int32), IGNORE_INDEX).reshape(tokens.shape)


# ---- documents -----------------------------------------------------------------------------------


class DocumentEncoder:
    """Documents -> tokens and labels. A document is a text, or a tuple (question, answer).

    kind: a key of MASKS, which finds the answer in a text. add_eos: end each document with EOS,
    for texts that have no end of their own.
    """

    def __init__(self, tokenizer, kind, add_eos):
        self.tokenizer, self.kind, self.add_eos = tokenizer, kind, add_eos

    def encode(self, document):
        """-> tokens (T,) int32, index at which the answer starts; 0: the mask has to find it."""
        if isinstance(document, tuple):
            question, answer = document
            prompt = self.tokenizer.encode(question)
            # Encoded apart, so that no token spans the end of the question.
            parts = [prompt, self.tokenizer.encode(answer)]
            answer_start = 1 + len(prompt)
        else:
            parts = [self.tokenizer.encode(document)]
            answer_start = 0
        end = [self.tokenizer.eos] if self.add_eos else []
        tokens = np.concatenate([[self.tokenizer.bos], *parts, end]).astype(np.int32)
        return tokens, answer_start

    def encode_and_label(self, documents):
        """D documents end to end -> tokens (N,), labels (N,), cu_seqlens (D + 1,), all int32."""
        encoded, answer_starts = [], []
        for document in documents:
            tokens, answer_start = self.encode(document)
            encoded.append(tokens)
            answer_starts.append(answer_start)
        lengths = np.array([len(tokens) for tokens in encoded])
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        flat = np.concatenate(encoded)
        labels = label_mask(flat, self.kind, cu_seqlens, self.tokenizer)
        answer_start = np.repeat(answer_starts, lengths)
        position = np.arange(len(flat)) - np.repeat(cu_seqlens[:-1], lengths)
        given = np.where(position >= answer_start, flat, IGNORE_INDEX)
        labels = np.where(answer_start > 0, given, labels)
        # A document whose only label is its end has no answer. To score it would count a point
        # that every model gets.
        is_answer = (labels != IGNORE_INDEX) & (flat < self.tokenizer.pad)
        has_answer = np.add.reduceat(is_answer, cu_seqlens[:-1]) > 0
        labels = np.where(np.repeat(has_answer, lengths), labels, IGNORE_INDEX)
        return flat, labels, cu_seqlens

    def batch(self, documents, packed):
        """D documents -> tokens (B, T), targets (B, T), cu_seqlens (D + 1,), labels of each (D,).

        tokens, targets and cu_seqlens are int32; labels of each: how many a document has.
        packed: all in one sequence, end to end; else one document in a sequence, with padding.
        """
        flat, labels, cu_seqlens = self.encode_and_label(documents)
        n_labels = np.add.reduceat(labels != IGNORE_INDEX, cu_seqlens[:-1])
        if packed:
            return flat[None], shift_labels(labels[None]), cu_seqlens, n_labels
        lengths = np.diff(cu_seqlens)
        inside = np.arange(lengths.max()) < lengths[:, None]  # (B, T), not padding
        tokens = np.full(inside.shape, self.tokenizer.pad, np.int32)
        padded_labels = np.full(inside.shape, IGNORE_INDEX, np.int32)
        tokens[inside] = flat
        padded_labels[inside] = labels
        return tokens, shift_labels(padded_labels), cu_seqlens, n_labels


def shift_labels(labels):
    """Labels (B, T) -> targets (B, T): each label one position earlier, where it is predicted.

    The first token of a document has no label, so none moves into the document before.
    """
    targets = np.full_like(labels, IGNORE_INDEX)
    targets[:, :-1] = labels[:, 1:]
    return targets


def mark_answers(tokenizer, tokens, targets):
    """A document, lists of tokens and targets, as text with [] around the scored tokens."""
    pieces, scored = [], False
    for i, token in enumerate(tokens):
        was_scored, scored = scored, i > 0 and targets[i - 1] != IGNORE_INDEX
        if scored and not was_scored:
            pieces.append("[")
        if was_scored and not scored:
            pieces.append("]")
        pieces.append(tokenizer.decode([token]))
    if scored:
        pieces.append("]")
    return "".join(pieces)


# ---- check a tokenizer ---------------------------------------------------------------------------


def check_label_mask(tokenizer, kind, texts):
    """What is wrong with the labels of texts under this tokenizer, as a sentence; "" if nothing is.

    Labels must spell the same answers as with bytes, with a token for each digit.
    """
    for text in texts:
        answer = "".join(answer_tokens(BYTES, kind, text))
        tokens = answer_tokens(tokenizer, kind, text)
        labelled = "".join(tokens)
        if answer != labelled:
            problem = "a token spans the end of an answer"
            return f"the mask of {text!r} gives {labelled!r}, not {answer!r}: {problem}"
        for token in tokens:
            if text.isascii() and sum(letter.isdigit() for letter in token) > 1:
                return f"{token!r} in {text!r} is one token: digits are merged"
    return ""


def answer_tokens(tokenizer, kind, text):
    """The labels of a text as strings: one for each token.

    One for all if the text is not ASCII, because a token may be a part of a letter then.
    """
    labels = label_mask(tokenizer.encode(text)[None], kind, tokenizer=tokenizer)[0]
    ids = labels[labels != IGNORE_INDEX]
    if text.isascii():
        return [tokenizer.token_strings[i] for i in ids]
    return [tokenizer.decode(ids)]
