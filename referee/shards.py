"""The shard format: one reader and one writer for the trainer, the downloads and the checks.

A shard is a header of 256 little-endian int32 (magic 20240520, version 1, token count, zeros),
then that many little-endian uint16 tokens. This is the format of the public FineWeb10B shards.
"""

import glob
import hashlib
import os
import stat
from pathlib import Path

import numpy as np

from referee.files import whole

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
HEADER_BYTES = 4 * HEADER_INTS
MAKE = "make shards of your text: ./run.sh data/tokenize_text.py TEXT --name mine"


class ShardError(OSError):
    """What is wrong with which file, and what to do about it, in words for a person."""

    def __init__(self, problem: str, advice: str = ""):
        super().__init__(f"{problem}; {advice}" if advice else problem)
        self.problem, self.advice = problem, advice  # for callers with better advice


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write tokens (N,), each below 65,536; the name appears only when the file is complete."""
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < 1 << 16:
        raise ShardError(f"{path} cannot hold tokens outside 0..65535")
    header = np.zeros(HEADER_INTS, "<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as part, part.open("wb") as file:
        file.write(header.tobytes())
        file.write(np.ascontiguousarray(tokens, "<u2"))  # no copy of uint16


def open_shard(path: Path) -> np.ndarray:
    """Memory-map the tokens (N,) uint16 of one shard.

    Raises ShardError when the header's magic, version or count does not fit the file.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # above all a pipe, which would block
        raise ShardError(f"{path} is no file", "name shards")
    header = np.fromfile(path, "<i4", HEADER_INTS)
    if len(header) < HEADER_INTS or header[0] != MAGIC:
        raise ShardError(
            f"{path} is no token shard: it lacks the magic number (see referee/shards.py)", MAKE
        )
    if header[1] != VERSION:
        raise ShardError(f"{path} has shard version {header[1]}, not {VERSION}", MAKE)
    needed = HEADER_BYTES + 2 * int(header[2])
    if header[2] <= 0 or status.st_size != needed:
        raise ShardError(
            f"{path} is truncated or damaged: it has {status.st_size:,} bytes, and the "
            f"{header[2]:,} tokens of its header need {needed:,}",
            "copy it again from where it came",
        )
    return np.memmap(path, "<u2", mode="r", offset=HEADER_BYTES)


def file_sha256(path: Path) -> str:
    """sha256 of a whole file, header included, as sha256sum prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_tokens(path: Path, vocab_size: int) -> tuple[np.ndarray, str]:
    """Read a whole shard; return (tokens, sha256 of the tokens). ShardError for ids too large."""
    tokens = open_shard(path)
    if (largest := tokens.max()) >= vocab_size:
        raise ShardError(
            f"{path} holds token {largest}, but the vocabulary ends at {vocab_size - 1}",
            "choose the --track that it was made for, or raise --vocab_size",
        )
    return tokens, hashlib.sha256(tokens).hexdigest()


def absolute_glob(pattern: str) -> str:
    """A glob that is relative to the caller's folder as an absolute one.

    A path that exists is meant as it is, whatever [ and * are in it.
    """
    if os.path.exists(pattern):
        return glob.escape(os.path.abspath(pattern))
    return os.path.abspath(os.path.join(glob.escape(os.getcwd()), pattern))


def find_shards(pattern: str) -> list[Path]:
    """Sorted paths that match a glob, or a path that exists; ShardError if there are none."""
    paths = [pattern] if os.path.exists(pattern) else glob.glob(pattern)
    if not paths:
        raise ShardError(f"no shards match {pattern}", f"name those that are there, or {MAKE}")
    return sorted(map(Path, paths))
