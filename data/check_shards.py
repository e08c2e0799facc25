#!/usr/bin/env python3
"""Check token shards: header, count, id range, documents, what train and val share, sha256.

A shard with the word val in its name belongs to validation, the others to training. A document runs
from one document start to the next, within a shard. Shards are compared with a manifest.json beside
them. Exit code 0: sound; 1: not sound, each reason on stderr; 2: misuse.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project's root
    from referee.start import finish

import argparse
import hashlib
import json

import numpy as np
from tqdm import tqdm

from referee.shards import ShardError, file_sha256, find_shards, open_shard

DIGEST_BYTES = 8  # a document's hash; chance makes 2 of 10 million alike once in 400,000 times


def is_validation(path: Path) -> bool:
    return "val" in path.stem.split("_")


def check_shard(path: Path, args, val_documents: set[bytes], problems: list[str]) -> dict:
    """Read one shard, print its line; return what a manifest says of it. Raises OSError.

    val_documents: hashes of the validation's documents, which shards of validation extend.
    """
    tokens = open_shard(path)
    smallest, largest = tokens.min(), tokens.max()
    if largest >= args.vocab_size:
        problems.append(
            f"{path} holds token {largest}, but the vocabulary ends at {args.vocab_size - 1}; "
            "make it again, or give its --vocab_size"
        )
    starts = np.flatnonzero(tokens == args.document_start)
    digest = file_sha256(path)
    tqdm.write(
        f"{path}  {len(tokens):,} tokens  {len(starts):,} documents  ids {smallest}-{largest}  "
        f"sha256 {digest}"
    )
    hashes = document_hashes(tokens, starts)
    if is_validation(path):
        val_documents.update(hashes)
    elif shared := sum(digest in val_documents for digest in hashes):
        problems.append(f"{path} has {shared:,} documents that are in validation too")
    return {"tokens": len(tokens), "documents": len(starts), "sha256": digest}


def document_hashes(tokens: np.ndarray, starts: np.ndarray) -> list[bytes]:
    """The hash of each document that is not empty."""
    documents = np.split(tokens, starts)[1:]  # what lies before the first start was cut
    return [hashlib.blake2b(d, digest_size=DIGEST_BYTES).digest() for d in documents if len(d) > 1]


def check_manifest(manifest: Path, facts: dict[Path, dict], problems: list[str]) -> None:
    """Compare the shards of one folder with what the manifest in it says of them."""
    try:
        shards = json.loads(manifest.read_text(encoding="utf-8"))["shards"]
        known = {Path(entry["name"]).name: entry for entry in shards}
    except (OSError, ValueError, KeyError, TypeError) as error:
        problems.append(f"{manifest} is damaged ({type(error).__name__}: {error})")
        return
    for name in known:
        if not manifest.with_name(name).exists():
            problems.append(f"{manifest.with_name(name)} is not there, but in {manifest}")
    for path, found in facts.items():
        if path.parent != manifest.parent:
            continue
        if path.name not in known:
            problems.append(f"{path} is not in {manifest}")
        for key, value in known.get(path.name, {}).items():
            if found.get(key, value) != value:
                problems.append(f"{path} has {key} {found[key]}, {manifest} says {value}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or " ").splitlines()[0])
    add = parser.add_argument
    add("globs", nargs="+", metavar="GLOB", help="shards; a glob may be quoted")
    add("--vocab_size", type=int, default=50257, help="ids lie below it (default: %(default)s)")
    add("--document_start", type=int, default=50256, help="token (default: %(default)s)")
    args = parser.parse_args()
    paths = {path for pattern in args.globs for path in find_shards(pattern)}
    # Validation first: the documents of training are compared with its.
    paths = sorted(paths, key=lambda path: (not is_validation(path), path))
    facts, val_documents, problems = {}, set(), []
    for path in tqdm(paths, unit="shard", disable=None):
        try:
            facts[path] = check_shard(path, args, val_documents, problems)
        except OSError as error:  # the advice of a ShardError is for a track's own data
            problems.append(error.problem if isinstance(error, ShardError) else str(error))
    for manifest in sorted({path.with_name("manifest.json") for path in facts}):
        if manifest.exists():
            check_manifest(manifest, facts, problems)
    tokens = sum(found["tokens"] for found in facts.values())
    documents = sum(found["documents"] for found in facts.values())
    if facts and not documents:
        problems.append(f"no shard holds token {args.document_start}, which opens a document; give "
                        "the one of these shards: --document_start")  # fmt: skip
    print(f"{len(facts)} shards, {tokens:,} tokens, {documents:,} documents", flush=True)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    finish(main)
