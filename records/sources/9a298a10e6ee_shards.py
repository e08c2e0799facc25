"""The shard format: one reader and one writer for the trainer, the downloads and the checks.

A shard is a header of 256 little-endian int32 (magic 20240520, version 1, token count, zeros),
then that many little-endian uint16 tokens. This is the format of the public FineWeb10B shards.
"""

import glob
import hashlib
import os
from pathlib import Path

import numpy as np

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
HEADER_BYTES = 4 * HEADER_INTS


class ShardError(OSError):
    """What is wrong with which file, and what to do about it, in words for a person."""

    def __init__(self, problem: str, advice: str = ""):
        super().__init__(f"{problem}; {advice}" if advice else problem)
        self.problem = problem  # for those who have other advice


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write tokens (N,), each below 65,536; the name appears only when the file is complete."""
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < 1 << 16:
        raise ShardError(f"{path} cannot hold tokens outside 0..65535")
    header = np.zeros(HEADER_INTS, "<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(header.tobytes())
            file.write(tokens.astype("<u2").tobytes())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def open_shard(path: Path) -> np.ndarray:
    """Memory-map the tokens (N,) uint16 of one shard.

    Raises ShardError when the header's magic, version or count does not fit the file.
    """
    advice = f"delete {path} and get the data again: ./run.sh"
    size = path.stat().st_size
    header = np.fromfile(path, "<i4", HEADER_INTS)
    if len(header) < HEADER_INTS or header[0] != MAGIC:
        raise ShardError(f"{path} is no token shard (wrong magic number)", advice)
    if header[1] != VERSION:
        raise ShardError(f"{path} has shard version {header[1]}, not {VERSION}", advice)
    needed = HEADER_BYTES + 2 * int(header[2])
    if header[2] <= 0 or size != needed:
        raise ShardError(
            f"{path} is truncated or damaged: it has {size:,} bytes, and the {header[2]:,} tokens "
            f"of its header need {needed:,}",
            advice,
        )
    return np.memmap(path, "<u2", mode="r", offset=HEADER_BYTES)


def file_sha256(path: Path) -> str:
    """sha256 of a whole file, header included, as sha256sum prints it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_tokens(path: Path, vocab_size: int) -> tuple[np.ndarray, str]:
    """Read a whole shard; return (tokens, sha256 of the tokens). ShardError for ids too large."""
    tokens = open_shard(path)
    if (largest := tokens.max()) >= vocab_size:
        raise ShardError(
            f"{path} holds token {largest}, but the vocabulary ends at {vocab_size - 1}",
            "choose the --track that it was made for, or raise --vocab_size",
        )
    return tokens, hashlib.sha256(tokens).hexdigest()


def find_shards(pattern: str) -> list[Path]:
    """Sorted paths that match a glob; ShardError if there are none."""
    paths = sorted(Path(path) for path in glob.glob(pattern))
    if not paths:
        raise ShardError(f"no shards match {pattern}; run: ./run.sh")
    return paths
