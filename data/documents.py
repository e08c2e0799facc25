"""Read documents from text files, JSON lines and parquet as a stream, however large they are.

A .txt or .md file is one document, unless a separator cuts it; a line of JSON lines and a row of
.parquet are one each. Each comes as an iterable of its text in chunks.
"""

import glob
import io
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
from tqdm import tqdm
from tqdm.utils import CallbackIOWrapper

from referee.flags import RunError

KINDS = (".txt", ".md", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst", ".parquet")
HELD_OUT = re.compile("(?<![a-z])(validation|valid|val|dev|test)(?![a-z])", re.I)
LFS_POINTER = b"version https://git-lfs"
CHUNK_BYTES = 1 << 20
PARQUET_ROWS = 256
MAX_LINE_BYTES = 128 << 20  # of JSON: all that a run holds at once is a few times this
HEADING = re.compile(r" = (?!= ).*(?<! =) = \n?")  # of an article of WikiText, not of its sections

Document = Iterable[str]


def find_files(inputs: list[str]) -> tuple[list[Path], Counter]:
    """The files that the arguments name, in their order; those of a folder or glob sorted.

    Also how many others folders and globs name, by the reason why they are left out.
    """
    found, left_out = {}, Counter()
    for given in inputs:
        named = {}
        for name in [given] if os.path.lexists(given) else sorted(glob.glob(given)):
            top = Path(name) if name == given or Path(name).is_dir() else Path(name).parent
            paths = [Path(name), *sorted(Path(name).rglob("*"))]
            for path in [path for path in paths if not path.is_dir()]:
                if reason := reason_against(path, top):
                    left_out[reason] += 1
                else:
                    named[path] = None
        if not named:
            raise RunError(f"{given} names no file of the kinds {', '.join(KINDS)}; left out: "
                           f"{counts(left_out)}")  # fmt: skip
        found |= named
    return list(found), left_out


def reason_against(path: Path, top: Path) -> str:
    """Why a file that is below top, or is top, is left out; empty for one that is read."""
    inside = str(path.relative_to(top))
    if re.search(r"(^|/)\.[^/]", inside):
        return "hidden"
    if not path.is_file():
        return "a pipe, a device or a broken link"
    if not kind_of(path):
        return f"of no known kind: {path.suffix or path.name}"
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise RunError(f"{path} only stands for a file of Git LFS; run git lfs pull there")
    if word := HELD_OUT.search(inside):
        beside = glob.escape(inside[: word.start()]) + "train"
        if any(top.glob(beside)) or any(top.glob(f"{beside}[!a-z]*")):
            return "of validation or test, beside train"
    return ""


def counts(found: Counter) -> str:
    return ", ".join(f"{n:,} {what}" for what, n in sorted(found.items())) or "none"


def kind_of(path: Path) -> str | None:
    """Which of KINDS the name ends in."""
    return next((kind for kind in KINDS if path.name.lower().endswith(kind)), None)


def read_documents(
    files: list[Path], column: str, separator: str, skipped: Counter, bar: tqdm
) -> Iterator[Document]:
    """The documents of all files. Raises RunError.

    separator: what stands between those of a .txt or .md file, or empty; skipped: counts the others
    by the reason; bar: counts the bytes of the files.
    """
    for path in files:
        with errors_named(path):
            if kind_of(path) not in (".txt", ".md"):
                yield from rows_of(path, column, skipped, bar)
            elif encoding := other_encoding(path):
                skipped["not UTF-8"] += 1
                tqdm.write(f"skipped {path}: no UTF-8, but perhaps {encoding}; convert it with "
                           f"iconv -f {encoding} -t UTF-8", file=sys.stderr)  # fmt: skip
            elif separator:
                yield from split_at(text_chunks(path, bar), separator)
            else:
                yield text_chunks(path, bar)


@contextmanager
def errors_named(path: Path) -> Iterator[None]:
    """Turn what goes wrong in reading into a RunError."""
    try:
        yield
    except (OSError, ValueError, pa.ArrowException) as error:
        advice = "get it again or leave it out, then run this again"
        if "too much memory" in str(error):  # of a window that the writer chose
            advice = "unpack it first: zstd -d --long=31"
        raise RunError(f"{path} cannot be read ({error}); {advice}") from None


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


def split_at(chunks: Iterable[str], separator: str) -> Iterator[Document]:
    """The documents between separators, without blank lines around them."""
    rest = ""
    for chunk in chain(chunks, [separator]):
        *whole, rest = (rest + chunk).split(separator)
        yield from ([text.strip("\r\n")] for text in whole if text.strip())
        if len(rest) > MAX_LINE_BYTES:
            raise ValueError(f"{len(rest):,} letters without --separator {separator!r}")


def other_encoding(path: Path) -> str:
    """A guess at what a text is in that is no UTF-8, or empty.

    Reads all of it: if its end is wrong, its beginning must not be in a shard.
    """
    with path.open(encoding="utf-8") as file:
        try:
            while chunk := file.read(CHUNK_BYTES):
                if chunk.count("\0") > len(chunk) // 4:  # of ASCII every other byte is 0
                    return "UTF-16LE"
        except UnicodeDecodeError:
            file.buffer.seek(0)
            return "UTF-16" if file.buffer.read(2) in (b"\xff\xfe", b"\xfe\xff") else "ISO-8859-1"
    return ""


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
    source = path.open("rb")  # for pyarrow takes no path that is no UTF-8
    with source, pa.parquet.ParquetFile(source, buffer_size=CHUNK_BYTES, pre_buffer=False) as file:
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
