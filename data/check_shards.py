#!/usr/bin/env python3
"""Check token shards: header, count, id range, documents, what train and val share, sha256.

A shard belongs to validation or training when its name has the word val or train in it. A document
runs from one document start to the next, within a shard; before a shard's first start lies the
rest of a document that was cut. Shards are compared with a manifest.json beside them. Exit code 0:
sound; 1: not sound, each reason on stderr; 2: misuse.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import bootstrap  # noqa: F401
import numpy as np
from tqdm import tqdm

from data.shards import ShardError, file_sha256, find_shards, open_shard

DIGEST_BYTES = 8  # a document's hash; chance makes 2 of 10 million alike once in 400,000 times
BAR_COLUMNS = 44


@dataclass
class Report:
    """What has been seen so far."""

    problems: list[str] = field(default_factory=list)
    facts: dict[Path, dict] = field(default_factory=dict)  # what a manifest says of each shard
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(40, np.int64))  # by power of two
    val_documents: set[bytes] = field(default_factory=set)  # their hashes
    shared: list[str] = field(default_factory=list)  # training documents that validation has too


def split_of(path: Path) -> str:
    """train or val, as the name says; empty if it does not."""
    found = re.search(r"(?:^|_)(train|val)(?:_|\.)", path.name)
    return found.group(1) if found else ""


def document_hashes(tokens: np.ndarray, starts: np.ndarray) -> Iterator[tuple[int, bytes]]:
    """Yield (number, hash) of every document that has tokens behind its start."""
    for number, document in enumerate(np.split(tokens, starts)[1:]):
        if len(document) > 1:
            yield number, hashlib.blake2b(document, digest_size=DIGEST_BYTES).digest()


def compare_splits(path: Path, tokens: np.ndarray, starts: np.ndarray, report: Report) -> None:
    """Remember the documents of a validation shard; look those of a training shard up."""
    split = split_of(path)
    if split == "val":
        report.val_documents.update(digest for _, digest in document_hashes(tokens, starts))
    elif split == "train" and report.val_documents:
        for number, digest in document_hashes(tokens, starts):
            if digest in report.val_documents:
                report.shared.append(f"document {number} of {path}")


def compare(facts: dict[Path, dict], known: dict[str, dict], where: str, report: Report) -> None:
    """Compare the facts of shards with those that are known of them, by file name, elsewhere."""
    for path, found in facts.items():
        if path.name not in known:
            report.problems.append(f"{path} is not in {where}")
        for key, value in known.get(path.name, {}).items():
            if found.get(key, value) != value:
                report.problems.append(f"{path} has {key} {found[key]}, {where} says {value}")


def check_manifest(manifest: Path, report: Report) -> None:
    """Compare the shards of one folder with the manifest in it."""
    try:
        known = {entry["name"]: entry for entry in json.loads(manifest.read_text())["shards"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        report.problems.append(f"{manifest} is damaged ({type(error).__name__}: {error})")
        return
    for name in known:
        if not manifest.with_name(name).exists():
            report.problems.append(f"{manifest.with_name(name)} is not there, but in {manifest}")
    beside = {path: found for path, found in report.facts.items() if path.parent == manifest.parent}
    compare(beside, known, str(manifest), report)


def check_shard(path: Path, vocab_size: int, document_start: int, report: Report) -> None:
    """Read one shard, print its line, add what is found to the report. Raises OSError."""
    tokens = open_shard(path)
    smallest, largest = tokens.min(), tokens.max()
    if largest >= vocab_size:
        report.problems.append(
            f"{path} holds token {largest}, but the vocabulary ends at {vocab_size - 1}; "
            "make it again, or give its --vocab_size"
        )
    starts = np.flatnonzero(tokens == document_start)
    lengths = np.diff(starts, append=len(tokens))
    report.lengths += np.bincount(np.log2(lengths).astype(int), minlength=len(report.lengths))
    digest = file_sha256(path)
    tqdm.write(
        f"{path}  {len(tokens):,} tokens  {len(starts):,} documents  ids {smallest}-{largest}  "
        f"sha256 {digest}"
    )
    report.facts[path] = {"tokens": len(tokens), "documents": len(starts), "sha256": digest}
    compare_splits(path, tokens, starts, report)


def check_all(paths: list[Path], vocab_size: int, document_start: int) -> Report:
    """Check the shards of validation first: those of training are compared with them."""
    report = Report()
    paths = sorted(paths, key=lambda path: (split_of(path) != "val", path))
    for path in tqdm(paths, unit="shard", disable=None):
        try:
            check_shard(path, vocab_size, document_start, report)
        except OSError as error:  # the advice of a ShardError is for a track's own data
            report.problems.append(error.problem if isinstance(error, ShardError) else str(error))
    return report


def print_histogram(lengths: np.ndarray) -> None:
    """Documents by length, their start included, in classes that double. At most 80 columns."""
    used = np.flatnonzero(lengths)
    if not len(used):
        return
    print(f"\n{'tokens per document':>22}  {'documents':>10}")
    for power in range(used[0], used[-1] + 1):
        bar = "█" * round(BAR_COLUMNS * lengths[power] / lengths.max())
        label = f"{1 << power:,}-{(2 << power) - 1:,}"
        print(f"{label:>22}  {lengths[power]:>10,} {bar}".rstrip())


def print_problems(report: Report) -> int:
    """Print every problem to stderr; return the exit code."""
    for problem in report.problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if report.problems else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("globs", nargs="+", metavar="GLOB", help="shards; a glob may be quoted")
    parser.add_argument(
        "--vocab_size", type=int, default=50257, help="ids lie below it (default: %(default)s)"
    )
    parser.add_argument(
        "--document_start", type=int, default=50256, help="token (default: %(default)s)"
    )
    args = parser.parse_args()
    try:
        paths = sorted({path for pattern in args.globs for path in find_shards(pattern)})
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    try:
        report = check_all(paths, args.vocab_size, args.document_start)
    except KeyboardInterrupt:
        return 130
    for manifest in sorted({path.with_name("manifest.json") for path in report.facts}):
        if manifest.exists():
            check_manifest(manifest, report)
    if report.shared:
        few = ", ".join(report.shared[:3]) + (", ..." if report.shared[3:] else "")
        report.problems.append(
            f"{len(report.shared):,} training documents stand in validation too: {few}"
        )
    print_histogram(report.lengths)
    tokens, documents = (sum(f[k] for f in report.facts.values()) for k in ("tokens", "documents"))
    print(f"\n{len(report.facts)} shards, {tokens:,} tokens, {documents:,} documents")
    return print_problems(report)


if __name__ == "__main__":
    sys.exit(main())
