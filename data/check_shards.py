#!/usr/bin/env python3
"""Check token shards: header, count, id range, documents, what train and val share, sha256.

A shard with the word val in its name belongs to validation, the others to training. A document runs
from one document start to the next, within a shard. Shards are compared with a manifest.json beside
them. Exit code 0: sound; 1: not sound, each reason on stderr; 2: misuse.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project's root

import numpy as np
from tqdm import tqdm

from referee.flags import finish
from referee.shards import ShardError, file_sha256, find_shards, open_shard

DIGEST_BYTES = 8  # a document's hash; chance makes 2 of 10 million alike once in 400,000 times


@dataclass
class Report:
    """What has been seen so far."""

    problems: list[str] = field(default_factory=list)
    facts: dict[Path, dict] = field(default_factory=dict)  # what a manifest says of each shard
    val_documents: set[bytes] = field(default_factory=set)  # their hashes


def is_validation(path: Path) -> bool:
    return "val" in path.stem.split("_")


def check_all(paths: Iterable[Path], vocab_size: int, document_start: int) -> Report:
    """Check the shards of validation first: those of training are compared with them."""
    report = Report()
    paths = sorted(paths, key=lambda path: (not is_validation(path), path))
    for path in tqdm(paths, unit="shard", disable=None):
        try:
            check_shard(path, vocab_size, document_start, report)
        except OSError as error:  # the advice of a ShardError is for a track's own data
            report.problems.append(error.problem if isinstance(error, ShardError) else str(error))
    return report


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
    digest = file_sha256(path)
    tqdm.write(
        f"{path}  {len(tokens):,} tokens  {len(starts):,} documents  ids {smallest}-{largest}  "
        f"sha256 {digest}"
    )
    report.facts[path] = {"tokens": len(tokens), "documents": len(starts), "sha256": digest}
    if is_validation(path):
        report.val_documents |= set(document_hashes(tokens, starts))
    elif report.val_documents:
        hashes = document_hashes(tokens, starts)
        if shared := sum(digest in report.val_documents for digest in hashes):
            report.problems.append(f"{path} has {shared:,} documents that are in validation too")


def document_hashes(tokens: np.ndarray, starts: np.ndarray) -> list[bytes]:
    """The hash of each document that is not empty."""
    documents = np.split(tokens, starts)[1:]  # what lies before the first start was cut
    return [hashlib.blake2b(d, digest_size=DIGEST_BYTES).digest() for d in documents if len(d) > 1]


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
        shards = json.loads(manifest.read_text(encoding="utf-8"))["shards"]
        known = {Path(entry["name"]).name: entry for entry in shards}
    except (OSError, ValueError, KeyError, TypeError) as error:
        report.problems.append(f"{manifest} is damaged ({type(error).__name__}: {error})")
        return
    for name in known:
        if not manifest.with_name(name).exists():
            report.problems.append(f"{manifest.with_name(name)} is not there, but in {manifest}")
    beside = {path: found for path, found in report.facts.items() if path.parent == manifest.parent}
    compare(beside, known, str(manifest), report)


def print_problems(report: Report) -> int:
    """Print every problem to stderr; return the exit code."""
    for problem in report.problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if report.problems else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("globs", nargs="+", metavar="GLOB", help="shards; a glob may be quoted")
    add("--vocab_size", type=int, default=50257, help="ids lie below it (default: %(default)s)")
    add("--document_start", type=int, default=50256, help="token (default: %(default)s)")
    args = parser.parse_args()
    paths = {path for pattern in args.globs for path in find_shards(pattern)}
    report = check_all(paths, args.vocab_size, args.document_start)
    for manifest in sorted({path.with_name("manifest.json") for path in report.facts}):
        if manifest.exists():
            check_manifest(manifest, report)
    facts = report.facts.values()
    tokens, documents = (sum(f[k] for f in facts) for k in ("tokens", "documents"))
    print(f"{len(facts)} shards, {tokens:,} tokens, {documents:,} documents", flush=True)
    return print_problems(report)


if __name__ == "__main__":
    finish(main)
