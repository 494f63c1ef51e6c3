"""Your own documents: read from files, split, and checked before a run.

A document is a text, or a tuple (question, answer). Every problem with a file is one ConfigError
that names the file and the line (parquet: the row), before anything is trained.

Letters: n documents that differ, E documents with all copies.
"""

import glob
import hashlib
import os
import unicodedata

import numpy as np
from tqdm import tqdm

from nanorecall.dataset_files import SPLIT_DIRS, has_data_suffix, read_rows, require_data_suffix
from nanorecall.rng import IGNORE_INDEX, SPLITS
from nanorecall.settings import ConfigError, require
from nanorecall.text import BYTES, check_label_mask, label_mask

COLUMNS = ("text", "question", "answer")  # the columns of a row that are read
FACT_MASKS = ("qa", "digits", "twohop")  # masks that find the answer of a fact in a text

# ---- reading -------------------------------------------------------------------------------------


def read_and_split(c):
    """Read c.path (c: data_synth.Config) -> documents that differ, the "file:line" of each, splits.

    splits: {split: numbers of documents}. A document is in "train" once for each copy, in "val" and
    "test" once.
    """
    texts, origins, splits = read_documents(c.path, c.max_bytes)
    facts = np.array([is_fact(text, c.label_mask) for text in texts], bool)
    can_hold_out = "" in splits and facts.any()
    message = "heldout_facts has no effect: it needs facts that are not in folders for the splits"
    require(can_hold_out or not c.heldout_facts, message, "heldout_facts")
    if "" in splits:
        splits = split_by_content(c, texts, facts, splits[""])
    for split in ("val", "test"):
        splits[split] = np.unique(splits[split])
    return texts, origins, splits


def read_documents(path, max_bytes):
    """Files with "text", or with "question" and "answer" -> documents, their "file:line", splits.

    The documents differ from each other. splits: {split: numbers of documents, one for each copy}.
    path: a .jsonl, .parquet or .csv file or a directory of them, all of it the split ""; or one
    with train/, validation/ and test/. ConfigError for a document of more than `max_bytes` tokens,
    counted as bytes and two for its ends.
    """
    number_of, origins, splits = {}, [], {}
    for split, source in split_paths(path).items():
        numbers = []
        for document, where in documents_in(source, max_bytes):
            if document not in number_of:
                number_of[document] = len(number_of)
                origins.append(where)
            numbers.append(number_of[document])
        splits[split] = np.array(numbers, np.int32)
    return list(number_of), origins, splits


def split_paths(path):
    """{split: the file or directory of its documents}"""
    require(os.path.exists(path), f"path={path} does not exist", "path")
    directories = {split: os.path.join(path, name) for split, name in SPLIT_DIRS.items()}
    if all(map(os.path.isdir, directories.values())):
        return directories
    names = ("train", "val", *SPLIT_DIRS.values())
    found = [name for name in names if os.path.isdir(os.path.join(path, name))]
    message = f"{path} has {', '.join(found)}; name all three: {', '.join(SPLIT_DIRS.values())}"
    require(not found, message, "path")
    return {"": path}


def documents_in(path, max_bytes):
    """(document, "file:line") of a file, or of all files in a directory."""
    if os.path.isfile(path):
        files = [path]
    else:
        entries = glob.glob(os.path.join(glob.escape(path), "*"))
        files = sorted(file for file in entries if has_data_suffix(file))
    require(files, f"{path} holds no .jsonl, .parquet or .csv file", "path")
    for file in tqdm(files, desc="read", disable=None):
        require_data_suffix(file, "path")
        for row, where in read_rows(file, COLUMNS):
            yield validate_document(row, where, max_bytes), where


def validate_document(row, where, max_bytes):
    """One row -> its text, or (question, answer)."""
    given = [name for name in COLUMNS if row.get(name) is not None]
    message = f'{where}: has "text", and "question" and "answer" as well; leave out one form'
    require(len(given) < len(COLUMNS), message, "path")
    # A table with both forms has null where a row lacks a column.
    is_question = "text" not in row or given == ["question", "answer"]
    names = ("question", "answer") if is_question else ("text",)
    missing = [name for name in names if name not in row]
    found = ", ".join(map(str, row)) or "nothing"
    message = f'{where}: needs "text", or "question" and "answer"; it has {found[:200]}'
    require(not missing, message, "path")
    for name in names:
        validate_text(row[name], f'{where}: "{name}"')
    parts = [row[name] for name in names]
    if is_question and not parts[0][-1].isspace():
        parts[0] += " "
    size = sum(len(part.encode()) for part in parts) + 2
    message = f"{where}: a document of {size} bytes, more than max_bytes={max_bytes}"
    require(size <= max_bytes, f"{message}; cut it, or raise max_bytes", "path")
    return tuple(parts) if is_question else parts[0]


def validate_text(text, where):
    require(isinstance(text, str), f"{where} is {type(text).__name__}, not text", "path")
    require(text.strip(), f"{where} is empty", "path")
    try:
        text.encode()
    except UnicodeEncodeError:
        message = f"{where} has half of a surrogate pair, which is not valid text"
        raise ConfigError(message, "path") from None


# ---- splits --------------------------------------------------------------------------------------


def is_fact(document, kind):
    """Does a document have an answer to store: its own, or one that the mask `kind` finds?"""
    if isinstance(document, tuple):
        return True
    if kind not in FACT_MASKS:
        return False
    labels = label_mask(BYTES.encode(document)[None], kind)
    return bool((labels != IGNORE_INDEX).any())


def split_by_content(c, texts, facts, numbers):
    """The documents of one file in splits: {"train": numbers of texts (E,), "val", "test"}.

    facts (n,) bool: is each text one? numbers (E,): of texts, one for each copy.
    The splits depend on the seed and the content, not on the order of the documents. Documents with
    the same content share a split.
    """
    same_fact, same_text = {}, {}  # normalized content -> numbers of its documents
    for number, text in enumerate(texts):
        groups = same_fact if facts[number] else same_text
        key = normalize(text[0] if isinstance(text, tuple) else text)
        groups.setdefault(key, []).append(number)
    stored = hash_order(same_fact, c.seed)
    others = hash_order(same_text, c.seed)
    n_heldout = round(c.heldout_facts * len(stored))
    message = f"heldout_facts={c.heldout_facts} of {len(stored)} holds out none, or all"
    require(not c.heldout_facts or 0 < n_heldout < len(stored), message, "heldout_facts")
    few = f"{c.path} has {len(others)} documents that differ"
    need = "training, validation and test need at least one each"
    require(stored or len(others) >= 3, f"{few}; {need}", "path")
    # A twentieth each for val and test. All facts are in both: whether they are stored is measured.
    n = max(1, len(others) // 20) if len(others) >= 3 else 0
    untrained = concatenate(stored[:n_heldout] + others[: 2 * n])
    return {
        "train": numbers[~np.isin(numbers, untrained)],
        "val": concatenate(stored + others[:n]),
        "test": concatenate(stored + others[n : 2 * n]),
    }


def normalize(text):
    """A text in one Unicode form, with single blanks: equal for documents of the same content."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def hash_order(groups, seed):
    """{text: group} -> the groups, sorted by a hash of the seed and the text.

    Other documents do not change the order of two, so a file may grow.
    """

    def digest(text):
        return hashlib.sha256(f"{seed} {text}".encode()).digest()

    return [groups[text] for text in sorted(groups, key=digest)]


def concatenate(groups):
    numbers = []
    for group in groups:
        numbers += group
    return np.array(numbers, np.int32)


# ---- checks before a run -------------------------------------------------------------------------


def check_answers(data):
    """ConfigError if a split of data_synth.Data has nothing to score, or if labels are not exact.

    They are not if the tokenizer has tokens that span the end of an answer.
    """
    source, mask = data.source, data.config.label_mask
    plain = []  # texts whose answers the mask has to find
    # A thousand documents of a split show whether a mask fits, and take no noticeable time.
    for split in SPLITS:
        indices = range(min(source.count(split), 1000))
        require(indices, f"there is no document for {split}; add more documents", "path")
        texts, _ = source.read(split, indices)
        plain += [text for text in texts if isinstance(text, str)]
        where = f"the first {len(indices)} documents of {split}"
        has_labels = (data.batch(split, 0, indices)[1] != IGNORE_INDEX).any()
        require(has_labels, f"label_mask={data.kind} finds no answer in {where}", "label_mask")
    message = f"label_mask={mask} has no effect: all documents have an answer field"
    require(plain or mask == "text", message, "label_mask")
    if data.tokenizer is not BYTES and data.kind != "text":
        require_exact_labels(data, plain)


def require_exact_labels(data, texts):
    """ConfigError if the tokenizer gives texts other labels than their bytes have."""
    problem = check_label_mask(data.tokenizer, data.kind, texts)
    message = f"tokenizer={data.config.tokenizer} does not suit these documents: {problem}"
    require(not problem, message, "tokenizer")


def survey(data):
    """Look at all documents of data (data_synth.Data of task text) -> lines about them.

    They name the sizes of the splits, and documents that a tokenizer alters or that contradict each
    other. ConfigError for an answer that the tokenizer cannot spell: another would be scored.
    """
    source = data.source
    answered, altered, questions = [], [], []
    for first in range(0, len(source.texts), 1000):
        texts = source.texts[first : first + 1000]
        if data.tokenizer is not BYTES and data.kind != "text":
            require_exact_labels(data, [text for text in texts if isinstance(text, str)])
        flat, labels, cu_seqlens = data.encoder.encode_and_label(texts)
        for i, text in enumerate(texts):
            document = slice(cu_seqlens[i], cu_seqlens[i + 1])
            tokens, document_labels = flat[document], labels[document]
            is_label = document_labels != IGNORE_INDEX
            check_spelling(data, text, document_labels[is_label], source.origins[first + i])
            answered.append(is_label.any())
            comes_back = data.tokenizer is BYTES or data.tokenizer.decode(tokens) == joined(text)
            altered.append(not comes_back)
            questions.append(question_of(data, text, tokens, is_label))
    lines = [describe_splits(source, np.array(answered))]
    if any(altered):
        lines.append(describe_altered(data, altered))
    return lines + describe_several_answers(source, questions)


def check_spelling(data, text, answer, where):
    """ConfigError if the tokenizer has no token for a part of the answer (n,)."""
    tokenizer = data.tokenizer
    lacks = f"tokenizer={tokenizer.name} has no token for a part of the answer"
    message = f"{where}: {lacks}; use another, or bytes"
    if isinstance(text, tuple):
        require(len(answer), message, "tokenizer")
    if isinstance(text, tuple) or data.kind != "text":
        require(tokenizer.unknown < 0 or tokenizer.unknown not in answer, message, "tokenizer")


def question_of(data, text, tokens, is_label):
    """The question of a document, normalized; "" if it has none."""
    if isinstance(text, tuple):
        return normalize(text[0])
    if data.kind in FACT_MASKS and is_label.any():
        return normalize(data.tokenizer.decode(tokens[: is_label.argmax()]))
    return ""


def describe_splits(source, answered):
    """One line: documents in each split, how many are trained on, and how many have no answer.

    answered (n,) bool: has the document labels?
    """
    train = source.splits["train"]
    parts, unanswered = [], []
    for split in SPLITS:
        numbers = source.splits[split]
        part = f"{split} {len(numbers)}"
        if split == "train":
            different = len(np.unique(numbers))
            if different < len(numbers):
                part += f" ({different} different)"
        else:
            if len(numbers) < source.sizes[split]:
                part += f" of {source.sizes[split]}"
            part += f" ({np.isin(numbers, train).sum()} of them trained on)"
        parts.append(part)
        if not answered[numbers].all():
            unanswered.append(f"{(~answered[numbers]).sum()} of {split}")
    line = "documents: " + ", ".join(parts)
    if unanswered:
        line += f"; without an answer, so not counted: {', '.join(unanswered)}"
    return line


def describe_altered(data, altered):
    """A line about the documents that the tokenizer does not give back; altered: n bools."""
    number = altered.index(True)
    text = data.source.texts[number]
    decoded = data.tokenizer.decode(data.encoder.encode(text)[0])
    was, now = difference(joined(text), decoded)
    many = f"{sum(altered)} of {len(altered)} documents do not come back from the tokenizer"
    example = f"{data.source.origins[number]} for example, where {was!r} becomes {now!r}"
    return f"note: {many} as they were, {example}"


def describe_several_answers(source, questions):
    """A line about questions that two documents answer differently, or none."""
    first, pairs = {}, []  # question -> number of the first document that asks it
    for number, question in enumerate(questions):
        other = first.setdefault(question, number)
        same = normalize(joined(source.texts[other])) == normalize(joined(source.texts[number]))
        if question and not same:
            pairs.append(f"{source.origins[other]} and {source.origins[number]}")
    if not pairs:
        return []
    many = f"questions with more than one answer: {len(pairs)}, {pairs[0]} for example"
    return [f"note: {many}; no model can answer both correctly"]


def joined(text):
    """A document as one text."""
    return text if isinstance(text, str) else "".join(text)


def difference(a, b, around=12):
    """Where two texts begin to differ: a few letters of each."""
    first = min(len(a), len(b))
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            first = i
            break
    part = slice(max(0, first - around), first + around)
    return a[part], b[part]
