"""Read documents from text files, JSON lines and parquet, whatever their size, as a stream.

What is read comes as records, which are small enough to hold in memory, in an order that only the
input sets:

    ("text", str or UTF-8 bytes)  a document, or its beginning
    ("more", str)                 the next piece of the document before it
    ("json", bytes)               a line of JSON lines, still to be parsed
    ("skip", reason)              a document that cannot be used

A .txt or .md file is one document, so is all of standard input; a line of .jsonl and a row of
.parquet is one.
"""

import codecs
import glob
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm
from tqdm.utils import CallbackIOWrapper

STDIN = "-"
KINDS = (".txt", ".md", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
CHUNK_BYTES = 1 << 20
PARQUET_ROWS = 256
MAX_LINE_BYTES = 128 << 20  # of JSON: all that a run holds at once is a few times this

PIECE_CHARS = 1 << 18
# Exactly what tiktoken's regular expression takes for \s; Python's \s is wider.
BLANK = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
LAST_SAFE_CUT = re.compile(f"(?s:.+)(?=[{BLANK}][^{BLANK}])")
HEADING = re.compile(rb" = (?!= ).*(?<! =) = \n?")  # of an article, not of its sections

Record = tuple[str, str | bytes]


class TextError(OSError):
    """What is wrong with which input, and what to do about it, in words for a person."""


def find_files(inputs: list[str]) -> list[Path | str]:
    """The files that the arguments name, in their order; of a folder or glob, sorted."""
    found = []
    for given in inputs:
        path = Path(given)
        if given == STDIN:
            found.append(STDIN)
        elif path.is_dir():
            below = sorted(p for p in path.rglob("*") if kind_of(p) and p.is_file())
            if not below:
                raise TextError(f"folder {given} holds no file of the kinds {', '.join(KINDS)}")
            found += below
        else:
            matches = [path] if path.exists() else sorted(Path(p) for p in glob.glob(given))
            if not matches:
                raise TextError(f"there is no {given}; give files, folders, quoted globs, or -")
            found += matches
    for path in found:
        if path != STDIN and not kind_of(path):
            raise TextError(f"{path} is of no known kind; rename it to end in {', '.join(KINDS)}")
    return list(dict.fromkeys(found))


def kind_of(path: Path) -> str | None:
    """Which of KINDS the name ends in."""
    return next((kind for kind in KINDS if path.name.lower().endswith(kind)), None)


def read_records(files: list[Path | str], column: str, bar: tqdm) -> Iterator[Record]:
    """Records of all files; the bar counts the bytes of the files. Raises TextError."""
    for path in files:
        if path == STDIN:
            yield from stdin_records(bar)
        elif kind_of(path) == ".parquet":
            yield from (("text", text) for text in parquet_texts(path, column, bar))
        elif kind_of(path) in (".txt", ".md"):
            yield from text_file_records(path, bar)
        else:
            yield from json_records(path, bar)


# ------------------------------------------------------------------------------ Text


def text_file_records(path: Path, bar: tqdm) -> Iterator[Record]:
    """One document. It is read twice, so that no part of it counts if its end is not UTF-8."""
    try:
        for _ in decoded(file_chunks(path)):
            pass
    except UnicodeDecodeError:
        yield "skip", "not UTF-8"
    else:
        yield from piece_records(decoded(file_chunks(path, bar)))


def stdin_records(bar: tqdm) -> Iterator[Record]:
    def chunks() -> Iterator[bytes]:
        while chunk := sys.stdin.buffer.read(CHUNK_BYTES):
            bar.update(len(chunk))
            yield chunk

    try:
        yield from piece_records(decoded(chunks()))
    except UnicodeDecodeError as error:
        raise TextError(
            f"standard input is not UTF-8 ({error.reason}); convert it, for example with iconv"
        ) from None


def piece_records(chunks: Iterable[str]) -> Iterator[Record]:
    kind = "text"
    for piece in pieces(chunks):
        yield kind, piece
        kind = "more"


def decoded(chunks: Iterable[bytes]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    for chunk in chunks:
        yield decoder.decode(chunk)
    yield decoder.decode(b"", final=True)


def pieces(chunks: Iterable[str]) -> Iterator[str]:
    """Cut a text, which comes in chunks, into pieces of at most PIECE_CHARS characters.

    The tokens of the pieces are those of the text: GPT-2's regular expression never matches across
    the place before a blank that something else follows. Only where a stretch of PIECE_CHARS has no
    such place it is cut anyhow; it decodes to the same text, but tiktoken would need memory and
    time for it that grow without bound, or fail.
    """
    rest = ""
    for chunk in chunks:
        rest, start = rest + chunk, 0
        while len(rest) - start > PIECE_CHARS:
            safe = LAST_SAFE_CUT.match(rest, start, start + PIECE_CHARS)
            end = safe.end() if safe else start + PIECE_CHARS
            yield rest[start:end]
            start = end
        rest = rest[start:]
    yield rest


# ------------------------------------------------------------------------------ JSON lines


def json_records(path: Path, bar: tqdm) -> Iterator[Record]:
    for line in lines(file_chunks(path, bar)):
        yield ("skip", "line too long") if line is None else ("json", line)


def lines(chunks: Iterable[bytes]) -> Iterator[bytes | None]:
    """Lines without their ends; None for one that is longer than MAX_LINE_BYTES."""
    held, size = [], 0
    for chunk in chunks:
        *ends, tail = chunk.split(b"\n")
        for end in ends:
            yield None if size + len(end) > MAX_LINE_BYTES else b"".join((*held, end))
            held, size = [], 0
        size += len(tail)
        held = [*held, tail] if size <= MAX_LINE_BYTES else []
    if size:
        yield None if size > MAX_LINE_BYTES else b"".join(held)


def file_chunks(path: Path, bar: tqdm | None = None) -> Iterator[bytes]:
    """The contents, decompressed; the bar counts bytes of the file. Raises TextError."""
    form = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())
    read = 0
    with path.open("rb") as raw:
        file = raw if bar is None else CallbackIOWrapper(bar.update, raw, "read")
        try:
            if form and not path.stat().st_size:
                raise OSError("it has no bytes")
            file = arrow().CompressedInputStream(file, form) if form else file
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
                read += len(chunk)
        except OSError as error:
            raise damaged(path, f"{read:,} bytes of text", error) from None


def damaged(path: Path, place: str, error: Exception) -> TextError:
    return TextError(
        f"{path} is damaged after {place} ({error}); get it again or leave it out, "
        "then run this again"
    )


# ------------------------------------------------------------------------------ Parquet


def arrow():
    """pyarrow, imported where it is needed: that takes a while, and workers do without it."""
    import pyarrow.parquet

    return pyarrow


def parquet_texts(path: Path, column: str, bar: tqdm) -> Iterator[bytes]:
    """The column's values as UTF-8, an empty one for null. Raises TextError."""
    row, size, pa = 0, path.stat().st_size, arrow()
    try:
        with pa.parquet.ParquetFile(path, buffer_size=CHUNK_BYTES, pre_buffer=False) as file:
            require_text(path, file.schema_arrow, column)
            batches = file.iter_batches(PARQUET_ROWS, columns=[column], use_threads=False)
            for batch in batches:
                for text in batch.column(0).cast(pa.large_binary()).to_pylist():
                    yield text or b""
                row += len(batch)
                bar.update(size * len(batch) / file.metadata.num_rows)
    except TextError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, f"row {row:,}", error) from None


def check_parquet(path: Path) -> None:
    """Raises TextError unless the file ends as parquet does; damage inside is found on reading."""
    pa = arrow()
    try:
        pa.parquet.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, "row 0", error) from None


def require_text(path: Path, schema, column: str) -> None:
    """Raise TextError unless the pyarrow schema has this column, of text."""
    pa = arrow()
    fits = [pa.string(), pa.large_string(), pa.binary(), pa.large_binary()]
    texts = [field.name for field in schema if field.type in fits]
    if column not in texts:
        raise TextError(
            f"{path} has no text in a column {column}; choose one with --text_column: "
            f"{', '.join(texts) or 'it has none'}"
        )


def articles(rows: Iterable[bytes]) -> Iterator[bytes]:
    """Put WikiText's rows, one a line, together: a row ` = Title = ` after a blank one begins."""
    held, after_blank = [], True
    for row in rows:
        if after_blank and held and HEADING.fullmatch(row):
            yield b"".join(held)
            held = []
        held.append(row)
        after_blank = not row.strip()
    if held:
        yield b"".join(held)
