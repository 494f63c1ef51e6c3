"""Data sets on disk, as data_mqar.py and data_synth.py write and read them.

train/, validation/ and test/ hold .parquet or .jsonl shards. metadata.json has the name, size and
SHA-256 of each. Every problem with a file is one ConfigError that names the file and the line
(parquet: the row).

Letters: R rows of a file, T tokens in a row.
"""

import collections
import csv
import functools
import json
import os
import sys

import numpy as np
from tqdm import tqdm

from nanorecall.files import atomic_write, sha256_file
from nanorecall.records import read_record
from nanorecall.settings import ConfigError, require

SPLIT_DIRS = {"train": "train", "val": "validation", "test": "test"}
SHARD = {"name": "path inside", "rows": "count", "sha256": "hash"}
SHARDS = {name: [SHARD] for name in SPLIT_DIRS.values()}  # kinds of "files" in metadata.json
MAX_LINE_BYTES = 2**20
MAX_CELL = 1000  # values of a list in parquet, on average
MAX_BATCH_BYTES = 2**30  # of a column of parquet, read at once

# ---- writing -------------------------------------------------------------------------------------


def write_splits(
    work,
    n_rows,
    read_columns,
    file_format,
    shard_rows,
    chunk_rows,
    parquet_options=None,
    json_separators=None,
):
    """Write each split as shards into the directory `work` -> "files" of metadata.json.

    That is {directory: [{"name", "rows", "bytes", "sha256"}]}.
    n_rows: {split: number of rows}. read_columns(split, indices (R,)) -> {name: column}; a column
    is a list of R values or an integer array (R, T). file_format: "parquet" or "jsonl".
    Memory does not grow with the rows: `chunk_rows` of them are held at a time.
    """
    files = {}
    for split, directory in SPLIT_DIRS.items():
        os.mkdir(os.path.join(work, directory))
        files[directory] = []
        total = n_rows[split]
        with tqdm(total=total, desc=directory, unit="row", disable=None) as bar:
            for first in range(0, total, shard_rows):
                rows = range(first, min(first + shard_rows, total))
                name = f"{directory}/part-{len(files[directory]):05d}.{file_format}"
                path = os.path.join(work, name)
                chunks = read_chunks(read_columns, split, rows, chunk_rows, bar)
                if file_format == "parquet":
                    write = functools.partial(write_parquet, chunks, parquet_options or {})
                else:
                    write = functools.partial(write_jsonl, chunks, json_separators)
                atomic_write(path, write)
                shard = {"name": name, "rows": len(rows), "bytes": os.path.getsize(path)}
                files[directory].append(shard | {"sha256": sha256_file(path)})
                if bar.disable:  # no terminal: a line in the log of a batch job instead
                    print(f"{directory}: {rows.stop} of {total} rows", file=sys.stderr)
    return files


def read_chunks(read_columns, split, rows, chunk_rows, bar):
    """Columns of `rows`, at most chunk_rows rows at a time."""
    for first in range(rows.start, rows.stop, chunk_rows):
        indices = np.arange(first, min(first + chunk_rows, rows.stop))
        yield read_columns(split, indices)
        bar.update(len(indices))


def write_parquet(chunks, options, f):
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer = None
    for columns in chunks:
        table = pa.table({name: arrow_column(column) for name, column in columns.items()})
        if writer is None:
            options = {"compression": "zstd", "write_page_checksum": True, **options}
            writer = pq.ParquetWriter(f, table.schema, **options)
        writer.write_table(table)
    writer.close()


def arrow_column(column):
    """A list of values, or an integer array (R, T), as a column of pyarrow; of R lists then."""
    import pyarrow as pa

    if not isinstance(column, np.ndarray):
        return pa.array(column)
    # From the flat array, which is far faster than from Python lists.
    R, T = column.shape
    offsets = pa.array(np.arange(R + 1, dtype=np.int32) * T)
    return pa.ListArray.from_arrays(offsets, pa.array(column.ravel()))


def write_jsonl(chunks, separators, f):
    for columns in chunks:
        lists = [c.tolist() if isinstance(c, np.ndarray) else c for c in columns.values()]
        for values in zip(*lists):
            row = dict(zip(columns, values))
            f.write(json.dumps(row, separators=separators).encode() + b"\n")


def n_bytes(metadata):
    """Bytes of all shards."""
    total = 0
    for shards in metadata["files"].values():
        total += sum(shard["bytes"] for shard in shards)
    return total


# ---- reading a data set --------------------------------------------------------------------------


def read_metadata(path, hint):
    """metadata.json of a data set -> dict with dataset_type and format_version, its path.

    The caller checks the other keys. hint: how to write such a data set.
    """
    file = os.path.join(path, "metadata.json")
    missing = f"path={path} holds no data set (no metadata.json there); {hint}"
    require(os.path.exists(file), missing, "path")
    return read_record(file, {"dataset_type": "text", "format_version": "count"}), file


def verified_path(path, file):
    """The path of a file of the data set, {"name", "sha256"} in its metadata.json.

    ConfigError unless its checksum is right.
    """
    full = os.path.join(path, file["name"])
    if not os.path.isfile(full) or sha256_file(full) != file["sha256"]:
        damaged = f"{full} is missing or damaged (its checksum differs); write the data set again"
        raise ConfigError(damaged, "path")
    return full


# ---- reading rows --------------------------------------------------------------------------------

csv.field_size_limit(MAX_LINE_BYTES)  # otherwise 131,072 letters
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors put it before UTF-8
UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # the first bytes of such a file


def require_data_suffix(path, key):
    """ConfigError unless the name of a file says how to read it. key: the setting that has it."""
    message = f"{path} is neither .jsonl, .parquet nor .csv"
    require(has_data_suffix(path), message, key)


def has_data_suffix(file):
    return file.endswith(tuple(READERS))


def read_rows(path, columns=()):
    """Rows of a file of one of READERS, one after another -> (row as a dict, "file:line").

    columns: read these columns of a table, if it has any of them; otherwise all.
    """
    # A pipe might never end.
    require(not os.path.exists(path) or os.path.isfile(path), f"{path} is no file", "path")
    return READERS[os.path.splitext(path)[1]](path, columns)


def read_jsonl(path, columns=()):
    """read_rows of a .jsonl file. `columns` is not used: a line is read as a whole."""
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            where = f"{path}:{number}"
            yield parse_line(line, where), where


def read_csv(path, columns=()):
    """read_rows of a .csv file whose first line has the names of the columns. Values are text.

    `columns` is not used, as in read_jsonl.
    """
    rows = csv.reader(read_lines(path), strict=True, skipinitialspace=True)
    names = []
    while True:
        where = f"{path}:{rows.line_num + 1}"  # of the row's first line: a cell may have several
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as e:
            message = f"{where}: the row that begins here is no csv ({e}); is a quote not closed, "
            message += "or are lines ended by a carriage return alone?"
            raise ConfigError(message, "path") from None
        if not cells:  # an empty line
            continue
        if not names:
            names = [name.strip() for name in cells]
            twice = repeated(names)
            message = f"{where}: two columns have the same name {twice!r}; rename one"
            require(twice is None, message, "path")
            continue
        require("\0" not in "".join(cells), f"{where}: a zero byte, which no text has", "path")
        # A comma in a cell without quotes would cut an answer in two.
        than = f"cells than the {len(names)} names of the first line"
        message = f"{where}: more {than}; put quotes around commas"
        require(len(cells) <= len(names), message, "path")
        require(len(cells) >= len(names), f"{where}: fewer {than}; is a comma missing?", "path")
        yield dict(zip(names, cells)), where


def read_lines(path):
    """Lines of a UTF-8 file as text, without a byte order mark."""
    try:
        with open(path, "rb") as f:
            # readline with a limit: a file without line breaks must not fill the memory
            lines = iter(functools.partial(f.readline, MAX_LINE_BYTES + 1), b"")
            for number, line in enumerate(lines, 1):
                where = f"{path}:{number}"
                if number == 1:
                    is_utf_16 = line.startswith(UTF_16)
                    require(not is_utf_16, f"{path} is UTF-16; save it as UTF-8", "path")
                    line = line.removeprefix(BYTE_ORDER_MARK)
                long = f"{where}: a line of more than {MAX_LINE_BYTES} bytes; cut it"
                require(len(line) <= MAX_LINE_BYTES, long, "path")
                try:
                    yield line.decode()
                except UnicodeDecodeError as e:
                    message = f"{where}: byte {e.start + 1} of the line is no UTF-8"
                    raise ConfigError(message, "path") from None
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}", "path") from None


def parse_line(line, where):
    """One line of JSON -> dict."""
    try:
        row = json.loads(line, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as e:
        raise ConfigError(f"{where}: no JSON ({e.msg}); is the line torn?", "path") from None
    except RecursionError:
        raise ConfigError(f"{where}: no JSON (nested too deeply)", "path") from None
    except ValueError as e:
        raise ConfigError(f"{where}: JSON that cannot be read ({str(e)[:120]})", "path") from None
    require(isinstance(row, dict), f"{where}: a JSON {type(row).__name__}, not an object", "path")
    return row


def unique_keys(pairs):
    """A JSON object as a dict; ValueError if a name comes twice, where json would take the last."""
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = repeated(name for name, _ in pairs)
        raise ValueError(f"the name {twice!r} comes twice")
    return row


def repeated(names):
    """The first of the names that comes twice; None if there is none."""
    counts = collections.Counter(names)
    return next((name for name, n in counts.items() if n > 1), None)


def read_parquet(path, columns=()):
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            twice = repeated(names)
            require(twice is None, f"{path} has two columns named {twice!r}; leave one out", "path")
            # Other columns may be of types that Python has no values for, so they are not read.
            wanted = [name for name in columns if name in names] or names
            large = f"{path}: cells of more than {MAX_CELL} values"
            require(not has_large_cells(file.metadata, wanted), large, "path")
            for batch in file.iter_batches(rows_at_once(file.metadata, wanted), columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    where = f"{path}: row {number}"
                    for name, value in row.items():
                        long = f"{where}: {name!r} has more than {MAX_LINE_BYTES} letters; cut it"
                        require(not is_long_text(value), long, "path")
                    yield row, where
    except (pa.ArrowException, OSError, ValueError, OverflowError) as e:
        reason = " ".join(str(e).split())[:120]
        damaged = f"{path}: damaged after row {number}, or no parquet ({reason})"
        raise ConfigError(damaged, "path") from None


def column_chunks(metadata, names):
    """Yield (rows, column chunk) of these columns of a parquet file, also of lists in them."""
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        for j in range(group.num_columns):
            chunk = group.column(j)
            if any(f"{chunk.path_in_schema}.".startswith(f"{name}.") for name in names):
                yield group.num_rows, chunk


def rows_at_once(metadata, names):
    """How many rows of a parquet file may be in memory at a time, 1 to 1,000.

    A text that many rows share is stored once, but has memory in each of the rows that are read.
    No text is longer than its column chunk.
    """
    sizes = [chunk.total_uncompressed_size for _, chunk in column_chunks(metadata, names)]
    return min(max(MAX_BATCH_BYTES // max(sizes, default=1), 1), 1000)


def has_large_cells(metadata, names):
    """Are lists in these columns long? A million equal numbers take a few bytes in a file."""
    chunks = column_chunks(metadata, names)
    return any(chunk.num_values > MAX_CELL * max(n_rows, 1) for n_rows, chunk in chunks)


def is_long_text(value):
    return isinstance(value, str) and len(value) > MAX_LINE_BYTES


READERS = {".jsonl": read_jsonl, ".parquet": read_parquet, ".csv": read_csv}
