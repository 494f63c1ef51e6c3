"""Documents on disk: what data_synth.py writes, parquet or jsonl with checksums, and documents that you bring.

Every problem with a file is one ConfigError that names the file and the line (in parquet, the row), before anything is trained.
"""

import glob
import json
import os
import sys
from dataclasses import asdict

import numpy as np
from tqdm import tqdm

from nanorecall.checkpoint import atomic_directory, atomic_write, check_kinds, read_record, sha256_file, write_json
from nanorecall.settings import ConfigError, require
from nanorecall.text import MASKS

SPLIT_DIRS = {"train": "train", "val": "validation", "test": "test"}
LONGEST_LINE = 2**20  # bytes
DOCUMENT = ("text", "question", "answer")  # what is read of a document of your own

# ---- writing -----------------------------------------------------------------------------------------------------------


def write_facts(c, source, shard_rows=200_000):
    """Write an epoch of `source` (data_synth.Facts or HashHop), shuffled, as train/, and validation/, test/ and metadata.json.

    A row is {"text": ..., tags}; a document with k exposures is there k times. -> the metadata. Memory is that of
    one shard.
    """
    not_stored = ("output_dir", "path", "packing", "tokenizer", "heldout_facts")
    with atomic_directory(c.output_dir) as work:
        files = {name: write_split(c, source, work, split, name, shard_rows) for split, name in SPLIT_DIRS.items()}
        metadata = {
            "dataset_type": c.task,
            "format_version": 1,
            **{k: v for k, v in asdict(c).items() if k not in not_stored},
            "mask": source.kind,
            "chance": source.baselines,
            "knowledge": getattr(source, "capacity", {}),
            "files": files,
        }
        write_json(os.path.join(work, "metadata.json"), metadata)
    return metadata


def write_split(c, source, work, split, name, shard_rows):
    os.mkdir(os.path.join(work, name))
    files, total = [], source.count(split)
    with tqdm(total=total, desc=name, unit="row", disable=not sys.stderr.isatty()) as bar:
        for first in range(0, total, shard_rows):
            rows = range(first, min(first + shard_rows, total))
            path = os.path.join(work, name, f"part-{len(files):05d}.{c.format}")
            atomic_write(path, lambda f: WRITERS[c.format](f, source, split, rows, bar))
            about = {"name": f"{name}/{os.path.basename(path)}", "rows": len(rows), "bytes": os.path.getsize(path)}
            files.append(about | {"sha256": sha256_file(path)})
    return files


def chunks(source, split, rows, bar, size=10_000):
    for first in range(rows.start, rows.stop, size):
        texts, tags = source.read(split, np.arange(first, min(first + size, rows.stop)))
        yield {"text": texts, **{k: v.tolist() for k, v in tags.items()}}
        bar.update(len(texts))


def write_parquet(f, source, split, rows, bar):
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer = None
    for columns in chunks(source, split, rows, bar):
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(f, table.schema, compression="zstd", write_page_checksum=True)
        writer.write_table(table)
    writer.close()


def write_jsonl(f, source, split, rows, bar):
    for columns in chunks(source, split, rows, bar):
        for row in zip(*columns.values()):
            f.write(json.dumps(dict(zip(columns, row))).encode() + b"\n")


WRITERS = {"parquet": write_parquet, "jsonl": write_jsonl}

# ---- reading what was written here -------------------------------------------------------------------------------------


STORED_FILE = {
    "name": "path inside",
    "rows": "count",
    "sha256": "hash",
}  # of a data set, in metadata.json
METADATA = {
    **{"mask": "text", "chance": {"*": "share"}, "knowledge": "dict"},
    "files": {name: [STORED_FILE] for name in SPLIT_DIRS.values()},
}


def read_stored(path, task, tasks):
    """A directory of write_facts -> what data_synth.Facts is made of: kind of mask, texts, splits, tags, chance, knowledge."""
    place = os.path.join(path, "metadata.json")
    make = f"`python data_synth.py {task} --output_dir DIR` makes one; documents of your own need --task text"
    require(
        os.path.exists(place),
        f"path={path} holds no data set (no metadata.json there); {make}",
        "path",
    )
    metadata = read_record(place, {"dataset_type": "text", "format_version": "count"})
    kind = metadata["dataset_type"]
    known = kind in tasks and metadata["format_version"] == 1
    require(known, f"{path} holds a data set of {kind!r}, not of data_synth.py", "path")
    require(kind == task, f"{path} holds task {kind}; say --task {kind}", "task")
    check_kinds(metadata, METADATA, place)
    knowledge = metadata["knowledge"]
    if knowledge:
        check_kinds(
            knowledge, {"slice": "text", "facts": "size", "bits": "number"}, f"{place}: 'knowledge'"
        )
        require(
            knowledge["slice"].count("=") == 1,
            f"{place}: {knowledge['slice']!r} is no slice tag=value",
            "path",
        )
    require(
        metadata["mask"] in MASKS,
        f"{place}: mask={metadata['mask']!r} is not one of {', '.join(MASKS)}",
        "path",
    )
    number, tags, splits, columns = {}, {}, {}, None  # text -> its number; the tags of a text are the same in every split
    for split, name in SPLIT_DIRS.items():
        which = []
        for file in metadata["files"][name]:
            rows = 0
            for row, where in read_rows(verified_path(path, file["name"], file["sha256"])):
                rows += 1
                text = row.pop("text", None)
                require(isinstance(text, str), f'{where}: "text" is no text', "path")
                columns = columns or set(row)
                require(set(row) == columns, f"{where}: its tags are not those of the rows before", "path")
                if text not in number:
                    number[text] = len(number)
                    for key, value in row.items():
                        tags.setdefault(key, []).append(value)
                which.append(number[text])
            message = f"{place} says that {file['name']} has {file['rows']} rows; it has {rows}: write the data set again"
            require(rows == file["rows"], message, "path")
        splits[split] = np.array(which, np.int32)
    if knowledge:
        tag = knowledge["slice"].split("=")[0]
        require(tag in tags, f"{place}: there is no tag {tag!r}", "path")
    return metadata["mask"], list(number), splits, tags, metadata["chance"], knowledge


def verified_path(path, name, sha256):
    """The path of a file of the data set, once its checksum is right."""
    place = os.path.join(path, name)
    if not os.path.isfile(place) or sha256_file(place) != sha256:
        raise ConfigError(f"{place} is missing or damaged (its checksum differs); write the data set again", "path")
    return place


# ---- reading documents of your own -------------------------------------------------------------------------------------

BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors put it before UTF-8
UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # what such a file begins with


def read_documents(path, longest):
    """Files with "text", or with "question" and "answer" -> {split: [(document, "file:line")]}.

    path: a .jsonl or .parquet file or a directory of them, all of it the split ""; or a directory
    with train/, validation/ and test/. A document is a string or (question, answer). ConfigError
    for one of more than `longest` tokens, counted as bytes with the two at its ends.
    """
    require(os.path.exists(path), f"path={path} does not exist", "path")
    folders = {split: os.path.join(path, name) for split, name in SPLIT_DIRS.items()}
    if all(map(os.path.isdir, folders.values())):
        return {split: list(documents_in(folder, longest)) for split, folder in folders.items()}
    there = [name for name in ("train", "val", *SPLIT_DIRS.values()) if os.path.isdir(os.path.join(path, name))]
    require(not there, f"{path} has {', '.join(there)}; name all three: {', '.join(SPLIT_DIRS.values())}", "path")
    return {"": list(documents_in(path, longest))}


def documents_in(path, longest):
    """(document, "file:line") of a file, or of all files in a directory."""
    files = [path] if os.path.isfile(path) else sorted(f for f in glob.glob(os.path.join(glob.escape(path), "*")) if has_data_suffix(f))
    require(files, f"{path} holds no .jsonl or .parquet file", "path")
    for file in tqdm(files, desc="read", disable=not sys.stderr.isatty()):
        require(has_data_suffix(file), f"{file} is neither .jsonl nor .parquet", "path")
        for row, where in read_rows(file, DOCUMENT):
            yield document(row, where, longest), where


def has_data_suffix(file):
    return file.endswith((".jsonl", ".parquet"))


def document(row, where, longest):
    """One row -> its text, or (question, answer)."""
    given = [name for name in DOCUMENT if row.get(name) is not None]
    message = f'{where}: has "text", and "question" and "answer", too; leave out one or the others'
    require(len(given) < len(DOCUMENT), message, "path")
    # A table of both kinds holds null for what a row lacks.
    asked = "text" not in row or given == ["question", "answer"]
    names = ("question", "answer") if asked else ("text",)
    missing = [n for n in names if n not in row]
    found = ", ".join(map(str, row)) or "nothing"
    message = f'{where}: needs "text", or "question" and "answer"; it has {found[:200]}'
    require(not missing, message, "path")
    for name in names:
        require(isinstance(row[name], str), f'{where}: "{name}" is {type(row[name]).__name__}, not text', "path")
        require(row[name].strip(), f'{where}: "{name}" is empty', "path")
        try:
            row[name].encode()
        except UnicodeEncodeError:
            raise ConfigError(f'{where}: "{name}" holds half of a surrogate pair, which is no text', "path") from None
    parts = [row[name] for name in names]
    if len(parts) == 2 and not parts[0][-1].isspace():
        parts[0] += " "
    size = sum(len(p.encode()) for p in parts) + 2
    long = f"{where}: a document of {size} bytes, more than block_size={longest}; cut it, or raise block_size"
    require(size <= longest, long, "path")
    return parts[0] if len(parts) == 1 else tuple(parts)


def read_rows(path, names=()):
    """(row as a dict, "file:line") one after another.

    names: the columns to read of a table, if it has any of them; else all are read.
    """
    return READERS[os.path.splitext(path)[1]](path, names)


def read_jsonl(path, names=()):
    try:
        with open(path, "rb") as f:
            for number, line in enumerate(iter(lambda: f.readline(LONGEST_LINE + 1), b""), 1):
                where = f"{path}:{number}"
                if number == 1:
                    utf_16 = line.startswith(UTF_16)
                    require(not utf_16, f"{path} is UTF-16; save it as UTF-8", "path")
                    line = line.removeprefix(BYTE_ORDER_MARK)
                require(len(line) <= LONGEST_LINE, f"{where}: a line of more than {LONGEST_LINE} bytes; cut it", "path")
                if line.strip():
                    yield parse_line(line, where), where
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}", "path") from None


def parse_line(line, where):
    try:
        row = json.loads(line.decode(), object_pairs_hook=once)
    except UnicodeDecodeError as e:
        raise ConfigError(f"{where}: byte {e.start + 1} of the line is no UTF-8", "path") from None
    except json.JSONDecodeError as e:
        raise ConfigError(f"{where}: no JSON ({e.msg}); is the line torn?", "path") from None
    except RecursionError:
        raise ConfigError(f"{where}: no JSON (nested too deeply)", "path") from None
    except ValueError as e:
        raise ConfigError(f"{where}: JSON that cannot be read ({str(e)[:120]})", "path") from None
    require(isinstance(row, dict), f"{where}: a JSON {type(row).__name__}, not an object", "path")
    return row


def once(pairs):
    """A JSON object as a dict; ValueError if a name comes twice, where json would take the last."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} comes twice")
    return row


def read_parquet(path, names=()):
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            there = file.schema_arrow.names
            twice = [name for name in there if there.count(name) > 1]
            require(not twice, f"{path} has two columns named {twice[:1]}; leave one out", "path")
            # The others may be of types that Python has no values for.
            wanted = [name for name in names if name in there] or None
            for batch in file.iter_batches(10_000, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield row, f"{path}: row {number}"
    except (pa.ArrowException, OSError, ValueError, OverflowError) as e:
        reason = " ".join(str(e).split())[:120]
        raise ConfigError(f"{path}: damaged after row {number}, or no parquet ({reason})", "path") from None


READERS = {".jsonl": read_jsonl, ".parquet": read_parquet}
