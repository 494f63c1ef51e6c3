"""Text into tokens, the tokens to train on, and documents packed end to end.

>>> ids = BYTES.encode("152435:145344 ")
>>> BYTES.decode(ids[label_mask(ids[None], "digits")[0] != IGNORE_INDEX])
'145344'

A document is BOS, its text, and EOS where the text has no end of its own. Labels are unshifted (labels[i] is tokens[i] or
-100); `shift` moves each onto the position that predicts it.

Letters: B rows, T tokens in a row, N tokens altogether, R documents, L tokens in the longest.
"""

import functools
import json

import numpy as np

from nanorecall.rng import IGNORE_INDEX
from nanorecall.settings import ConfigError, require

# ---- tokenizers --------------------------------------------------------------------------------------------------------


class ByteTokenizer:
    """Every byte of the UTF-8 text is a token: nothing to download, and no token ever spans two digits or a quote."""

    name = "bytes"
    pad, bos, eos, vocab_size = 256, 257, 258, 259
    unknown = -1  # there is no token for what has none: every text has its bytes
    texts = (*map(chr, range(128)), *["\ufffd"] * 128, "", "", "")  # what each token stands for; from 128, part of a letter

    def encode(self, text):
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint16)

    def decode(self, ids):
        return bytes(i for i in np.asarray(ids).tolist() if i < 256).decode(errors="replace")


MOST_TOKENS = 2**20  # numbers of tokens end there; each costs a row of the embedding, used or not


class FileTokenizer:
    """A tokenizer.json, read by the `tokenizers` package.

    Padding, begin and end are three tokens after its own.

    It cuts text into tokens and does nothing else. What the file says of a longest length, of
    padding and of dropout is for other uses: it is left out.
    """

    def __init__(self, path):
        self.name, self.inner = path, read_json_tokenizer(path)
        self.inner.no_truncation()
        self.inner.no_padding()
        if getattr(self.inner.model, "dropout", None):
            self.inner.model.dropout = None
        vocabulary = self.inner.get_vocab()
        own = 1 + max(vocabulary.values(), default=0)  # numbers may have gaps
        large = f"{path} numbers a token {own - 1}; the largest number allowed is {MOST_TOKENS - 1}"
        require(own <= MOST_TOKENS, large, "tokenizer")
        named = {}
        for token, number in vocabulary.items():
            other = named.setdefault(number, token)
            message = f"{path} gives number {number} to two tokens, {other!r} and {token!r}"
            require(other == token, message, "tokenizer")
        self.pad, self.bos, self.eos, self.vocab_size = own, own + 1, own + 2, own + 3
        self.unknown = unknown_token(self.inner)
        spelled = str.maketrans({"▁": " ", "Ġ": " ", "Ċ": "\n"})  # SentencePiece and byte-level BPE
        self.texts = (*(named.get(i, "").translate(spelled) for i in range(own)), "", "", "")

    def encode(self, text):
        try:
            return np.array(self.inner.encode(text, add_special_tokens=False).ids, np.int32)
        except BaseException as e:
            raise refusal(e, f"{self.name} cannot encode {text[:40]!r}") from None

    def decode(self, ids):
        mine = [i for i in np.asarray(ids).tolist() if i < self.pad]
        return self.inner.decode(mine, skip_special_tokens=False)  # a text may spell one


def read_json_tokenizer(path):
    """A tokenizer.json -> tokenizers.Tokenizer; ConfigError if it is none."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        message = f"tokenizer={path} needs a package: pip install tokenizers"
        raise ConfigError(message, "tokenizer") from None
    try:
        with open(path, encoding="utf-8-sig") as f:
            return Tokenizer.from_str(f.read())
    except BaseException as e:
        raise refusal(e, f"{path} cannot be read as a tokenizer.json") from None


def refusal(error, what):
    """The ConfigError for an error of the `tokenizers` package; any other comes back as it is.

    The package raises plain Exception. Where its own code fails it raises a PanicException,
    which is no Exception.
    """
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
        return ConfigError(f"{what} ({' '.join(str(error).split())[:80]})", "tokenizer")
    return error


def unknown_token(inner):
    """The number of the token that stands for whatever has none; -1: there is no such token."""
    about = json.loads(inner.to_str())["model"]
    if "unk_token" in about:
        number = inner.token_to_id(about["unk_token"] or "")
    else:
        number = about.get("unk_id")
    return -1 if number is None else number


BYTES = ByteTokenizer()


def read_tokenizer(path):
    """The tokenizer of a setting: "" is bytes, else the path of a tokenizer.json."""
    return FileTokenizer(path) if path else BYTES


@functools.cache
def token_class(tokenizer, characters):
    """(vocabulary,) bool: the tokens made of `characters`, with spaces around them or not; " " finds blank ones."""
    if characters == " ":
        return np.array([text != "" and text.isspace() for text in tokenizer.texts])
    return np.array([text.strip() != "" and set(text.strip()) <= set(characters) for text in tokenizer.texts])


# ---- masks -------------------------------------------------------------------------------------------------------------


class Segments:
    """Flat tokens (N,) and where each one's segment, a row or a document, begins and ends."""

    def __init__(self, ids, first, end, tokenizer):
        self.ids, self.is_main, self.end, self.tokenizer = ids, first, end, tokenizer
        self.here = np.arange(len(ids))
        self.special = ids >= tokenizer.pad

    def are(self, characters):
        return token_class(self.tokenizer, characters)[self.ids]

    def last(self, event):
        """(N,) index of the latest event at or before each token in its segment; -1: none."""
        found = np.maximum.accumulate(np.where(event, self.here, -1))
        return np.where(found >= self.is_main, found, -1)

    def before(self, event):
        """As `last`, but strictly before."""
        found = np.concatenate([[-1], np.maximum.accumulate(np.where(event, self.here, -1))[:-1]])
        return np.where(found >= self.is_main, found, -1)

    def count(self, event):
        """Events in each token's segment up to it, and in all of it."""
        sums = np.concatenate([[0], np.cumsum(event)])
        return sums[1:] - sums[self.is_main], sums[self.end] - sums[self.is_main]

    def spelled(self, text):
        """(N,) bool: the tokens that complete `text`, however the tokenizer cuts it after a line break or a space."""
        found = np.zeros(len(self.ids), bool)
        for tail in tokenizations(self.tokenizer, text):
            hit = np.ones(len(self.ids), bool)
            for back, token in enumerate(reversed(tail)):
                hit &= (np.roll(self.ids, back) == token) & (self.here - back >= self.is_main)
            found |= hit
        return found


@functools.cache
def tokenizations(tokenizer, text):
    """The token sequences that `text` may come as: the ends of its encodings after a few neighbours."""
    found = set()
    for before in ("", "\n", "\n\n", " "):
        ids = tokenizer.encode(before + text).tolist()
        while "".join(tokenizer.texts[i] for i in ids[1:]).strip().endswith(text):
            ids = ids[1:]
        found.add(tuple(ids))
    return found


def digits_mask(s):
    """`key:value `: from each colon to the next blank."""
    colon, end = s.are(":"), s.are(" ") | s.special
    opened = s.last(colon)
    return (opened >= 0) & (opened == s.last(colon | end)) & ~colon


def qa_mask(s):
    """Everything after the segment's last question mark, its end token too; without one, the value after its last colon."""
    seen, all_of = s.count(s.are("?"))
    answer = (seen == all_of) & ~s.are("?") & (s.ids != s.tokenizer.pad) & (s.ids != s.tokenizer.bos)
    colons, all_colons = s.count(s.are(":"))
    return np.where(all_of > 0, answer, digits_mask(s) & (colons == all_colons))


def hashhop_mask(s):
    """Between `= '` and the next quote, in the part after COMPLETION: if the segment has one; quotes are masked."""
    completion = s.spelled("COMPLETION:")
    quote, blank = s.are("'"), s.are(" ")
    word = s.before(~blank)  # the last token that is no blank
    may_open = quote & (word >= 0) & s.are("=")[word]
    # The next quote closes, even after a "=": of quotes in a row that may open, every other one does.
    count, closed = s.count(may_open)[0], s.last((quote & ~may_open) | s.special)
    opens = may_open & ((count - np.where(closed >= 0, count[closed], 0)) % 2 == 1)
    opened = s.last(opens)
    inside = (opened >= 0) & (opened == s.last(quote | s.special)) & ~quote
    return inside & ((s.before(completion) >= 0) | (s.count(completion)[1] == 0))


def twohop_mask(s):
    """`a>b `, `a>>c `, `a>>b>c `, with letters among the marks or not: from the first digit after them to the blank."""
    digit, end = s.are("0123456789"), s.are(" ") | s.special
    starts = digit & (s.before(s.are(">")) > s.before(end)) & ~digit[np.maximum(s.here - 1, 0)]
    return (s.last(starts) > s.last(end)) & ~end


def text_mask(s):
    """Everything but padding and the first token of a document."""
    return (s.ids != s.tokenizer.pad) & (s.ids != s.tokenizer.bos)


MASKS = {"qa": qa_mask, "hashhop": hashhop_mask, "digits": digits_mask, "twohop": twohop_mask, "text": text_mask}


def label_mask(tokens, kind, cu_seqlens=None, tokenizer=BYTES):
    """Labels of tokens: the tokens of the answers, -100 elsewhere; unshifted.

    tokens: integers (B, T), each row a segment, padding at its end; or, with cu_seqlens (R + 1,), documents end to end, (N,) or
    (1, N), each a segment of its own: document d is tokens cu_seqlens[d] to cu_seqlens[d + 1]. -> int32, of the same shape.
    kind: a key of MASKS. These are the label masks of LLMonade (Masking Framework), taken segment by segment.
    """
    if kind not in MASKS:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(MASKS)}")
    tokens = np.asarray(tokens)
    flat = tokens.reshape(-1)
    if cu_seqlens is None:
        ends = np.arange(0, flat.size + 1, max(1, tokens.shape[-1]))
    else:
        ends = np.asarray(cu_seqlens)
        if len(ends) < 1 or ends[0] != 0 or ends[-1] != flat.size or (np.diff(ends) < 0).any():
            raise ValueError(f"cu_seqlens must rise from 0 to the {flat.size} tokens, got {ends.tolist()[:8]}...")
    if flat.size == 0:
        return tokens.astype(np.int32)
    lengths = np.diff(ends)
    s = Segments(flat, np.repeat(ends[:-1], lengths), np.repeat(ends[1:], lengths), tokenizer)
    return np.where(MASKS[kind](s), flat.astype(np.int32), IGNORE_INDEX).reshape(tokens.shape)


# ---- targets -----------------------------------------------------------------------------------------------------------


def shift_labels(labels):
    """Labels (B, T) -> targets (B, T): each label one position earlier, where it is predicted. The first token of a document
    has no label, so none moves into the document before."""
    targets = np.full_like(labels, IGNORE_INDEX)
    targets[:, :-1] = labels[:, 1:]
    return targets


# ---- check a tokenizer -------------------------------------------------------------------------------------------------


def check_label_mask(tokenizer, kind, texts):
    """What is wrong with the labels of texts under this tokenizer, as text; "" if they spell the answers that bytes spell,
    with a token for each digit."""
    for text in texts:
        spelled = []
        for t in (BYTES, tokenizer):
            labels = label_mask(t.encode(text)[None], kind, tokenizer=t)[0]
            ids = labels[labels != IGNORE_INDEX]
            spelled.append([t.texts[i] for i in ids] if text.isascii() else [t.decode(ids)])
        answer, found = map("".join, spelled)
        if answer != found:
            return f"the mask of {text!r} gives {found!r}, not {answer!r}: a token spans the end of an answer"
        merged = [token for token in spelled[1] if text.isascii() and sum(letter.isdigit() for letter in token) > 1]
        if merged:
            return f"{merged[0]!r} in {text!r} is one token: digits are merged"
    return ""
