#!/usr/bin/env python3
"""Download GPT-2 tokenized FineWeb10B shards: the validation shard, then N training shards.

They come from the dataset repository kjj0/fineweb10B-gpt2 of the Hugging Face hub, 100 million
tokens each. Shards that are there are kept: without a gap the network is not touched. A shard gets
its name when it has been checked in full; a download that was stopped goes on with the next one.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project's root

from data.check_shards import check_all, compare, print_problems
from data.hub import HubError, RemoteFile, download, list_files, say
from referee.shards import ShardError, check_tokens, open_shard

REPO = "kjj0/fineweb10B-gpt2"
FOLDER = Path(__file__).resolve().parent / "fineweb10B"
VOCAB_SIZE, DOCUMENT_START = 50257, 50256
TRAIN_SHARDS = 102
FINEWEB_TRACK = 9  # training shards


def shard_names(train_shards: int) -> list[str]:
    numbers = range(1, train_shards + 1)
    return ["fineweb_val_000000.bin", *(f"fineweb_train_{n:06d}.bin" for n in numbers)]


def is_there(path: Path) -> bool:
    """Do header and size say that the whole shard is there? A damaged one is named."""
    try:
        open_shard(path)
    except FileNotFoundError:
        return False
    except ShardError as error:
        say(f"to be fetched again: {error.problem}")
        return False
    return True


def list_missing(names: list[str], folder: Path, revision: str) -> list[RemoteFile]:
    """The hub's entries for shards that are not there. HubError if it has not got them."""
    missing = [name for name in names if not is_there(folder / name)]
    if not missing:
        return []
    few = ", ".join(missing)
    if len(missing) > 3:
        few = f"{missing[0]}, {missing[1]} ... {missing[-1]} ({len(missing)} files)"
    bring = f"on a machine with network get {few}, and put them into {folder}"
    found = {file.name: file for file in list_files(REPO, revision, advice=bring)}
    if absent := set(missing) - set(found):
        raise HubError(f"{REPO} at revision {revision} has no {min(absent)}; {bring}")
    return [found[name] for name in missing]


def check(folder: Path, revision: str) -> int:
    """Read every shard of the folder in full, compare it with the hub; return the exit code."""
    paths = sorted(folder.glob("fineweb_*.bin"))
    if not paths:
        raise ShardError(f"no shards in {folder}; run: ./run.sh data/cached_fineweb10B.py")
    report = check_all(paths, VOCAB_SIZE, DOCUMENT_START)
    try:
        known = {file.name: {"sha256": file.sha256} for file in list_files(REPO, revision)}
        compare(report.facts, known, f"{REPO} at {revision}", report)
        print(f"{len(report.facts)} shards have been compared with the hub's")
    except HubError as error:
        say(f"no sha256 is compared with the hub's: {error}")
    if report.problems:
        say("delete what is damaged, then run: ./run.sh data/cached_fineweb10B.py")
    return print_problems(report)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "shards",
        nargs="?",
        type=int,
        default=FINEWEB_TRACK,
        help="training shards, 100M tokens each (default: %(default)s, for the fineweb track)",
    )
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder (default: %(default)s)")
    parser.add_argument("--revision", default="main", help="branch, tag or commit of the hub")
    parser.add_argument(
        "--check",
        action="store_true",
        help="read every shard that is there in full, compare it with the hub; fetch nothing",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print files and bytes; write nothing"
    )
    args = parser.parse_args()
    if not 0 <= args.shards <= TRAIN_SHARDS:
        parser.error(f"there are {TRAIN_SHARDS} training shards")
    return args


def main() -> int:
    args = parse()
    try:
        if args.check:
            return check(args.out, args.revision)
        files = list_missing(shard_names(args.shards), args.out, args.revision)
        if args.dry_run:
            for file in files:
                print(f"{file.name}  {file.size:,} bytes to fetch")
            total = sum(file.size for file in files)
            print(f"{total:,} bytes to fetch to {args.out}")
            return 0
        for file in files:
            (args.out / file.name).unlink(missing_ok=True)  # a damaged one may have the right size
        download(REPO, files, args.out, args.revision, lambda path: check_tokens(path, VOCAB_SIZE))
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on where this one was", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
