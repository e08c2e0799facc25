"""Read documents from text files, JSON lines and parquet as a stream, however large they are.

A .txt or .md file is one document, and so is a line of .jsonl and a row of .parquet. Each comes as
an iterable of its text in chunks.
"""

import glob
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
from tqdm import tqdm
from tqdm.utils import CallbackIOWrapper

from referee.flags import RunError

KINDS = (".txt", ".md", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
CHUNK_BYTES = 1 << 20
PARQUET_ROWS = 256
MAX_LINE_BYTES = 128 << 20  # of JSON: all that a run holds at once is a few times this
HEADING = re.compile(r" = (?!= ).*(?<! =) = \n?")  # of an article of WikiText, not of its sections

Document = Iterable[str]


def find_files(inputs: list[str]) -> list[Path]:
    """The files that the arguments name, in their order; those of a folder or glob sorted."""
    found = []
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            matches = sorted(p for p in path.rglob("*") if kind_of(p) and p.is_file())
        elif path.exists():
            matches = [path]
        else:
            matches = sorted(Path(p) for p in glob.glob(given))
        if not matches:
            raise RunError(f"{given} names no file of the kinds {', '.join(KINDS)}")
        found += matches
    for path in found:
        if not kind_of(path):
            raise RunError(f"{path} is of no known kind; rename it to end in {', '.join(KINDS)}")
    return list(dict.fromkeys(found))


def kind_of(path: Path) -> str | None:
    """Which of KINDS the name ends in."""
    return next((kind for kind in KINDS if path.name.lower().endswith(kind)), None)


def read_documents(
    files: list[Path], column: str, skipped: Counter, bar: tqdm
) -> Iterator[Document]:
    """The documents of all files. Raises RunError.

    skipped: counts the others by the reason; bar: counts the bytes of the files.
    """
    for path in files:
        with errors_named(path):
            if kind_of(path) not in (".txt", ".md"):
                yield from rows_of(path, column, skipped, bar)
            elif is_utf8(path):
                yield text_chunks(path, bar)
            else:
                skipped["not UTF-8"] += 1


@contextmanager
def errors_named(path: Path) -> Iterator[None]:
    """Turn what goes wrong in reading into a RunError."""
    try:
        yield
    except (OSError, ValueError, pa.ArrowException) as error:
        raise RunError(
            f"{path} cannot be read ({error}); get it again or leave it out, then run this again"
        ) from None


def opened(path: Path, bar: tqdm) -> io.BufferedReader:
    """The contents, decompressed; the bar counts bytes of the file."""
    form = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())
    if form and not path.stat().st_size:
        raise ValueError("it has no bytes")
    counted = CallbackIOWrapper(bar.update, path.open("rb"), "read")
    return io.BufferedReader(pa.input_stream(counted, form), CHUNK_BYTES)


def text_chunks(path: Path, bar: tqdm) -> Iterator[str]:
    with errors_named(path), io.TextIOWrapper(opened(path, bar), "utf-8", newline="") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def is_utf8(path: Path) -> bool:
    """Reads all of it: if its end is wrong, its beginning must not be in a shard."""
    with path.open(encoding="utf-8") as file:
        try:
            while file.read(CHUNK_BYTES):
                pass
        except UnicodeDecodeError:
            return False
    return True


def rows_of(path: Path, column: str, skipped: Counter, bar: tqdm) -> Iterator[Document]:
    if kind_of(path) == ".parquet":
        values, key = parquet_values(path, column, bar), None
    else:
        values, key = json_lines(path, bar), column
    for data in values:
        try:
            yield [text_of(data, key)]
        except ValueError as reason:
            skipped[str(reason)] += 1


def json_lines(path: Path, bar: tqdm) -> Iterator[bytes]:
    file = opened(path, bar)
    while line := file.readline(MAX_LINE_BYTES):
        if len(line) == MAX_LINE_BYTES:
            raise ValueError(f"a line has {MAX_LINE_BYTES:,} bytes or more")
        yield line.strip()


def parquet_values(path: Path, column: str, bar: tqdm) -> Iterator[bytes]:
    """The column's values, an empty one for null."""
    size = path.stat().st_size
    with pa.parquet.ParquetFile(path, buffer_size=CHUNK_BYTES, pre_buffer=False) as file:
        names = file.schema_arrow.names
        if column not in names:
            raise RunError(
                f"{path} has no column {column}; choose one with --text_column: {', '.join(names)}"
            )
        for rows in file.iter_batches(PARQUET_ROWS, columns=[column], use_threads=False):
            for text in rows.column(0).cast(pa.large_binary()).to_pylist():
                yield text or b""
            bar.update(size * len(rows) / file.metadata.num_rows)


def text_of(data: bytes, json_key: str | None) -> str:
    """The text itself, or that of a line of JSON; ValueError with the reason if there is none."""
    try:
        if json_key is not None and data:
            data = json.loads(data)[json_key].encode()  # which fails for a lone surrogate
        return data.decode()
    except UnicodeError:
        raise ValueError("not UTF-8") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"no JSON object with a text {json_key} (--text_column)") from None


def articles(rows: Iterable[Document]) -> Iterator[Document]:
    """Put WikiText's rows, one a line, together: a row ` = Title = ` after a blank one begins."""
    text, after_blank = "", True
    for (row,) in rows:
        if after_blank and text and HEADING.fullmatch(row):
            yield [text]
            text = ""
        text += row
        after_blank = not row.strip()
    if text:
        yield [text]
