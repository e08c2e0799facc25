#!/usr/bin/env python3
"""Download GPT-2 tokenized FineWeb10B shards: the validation shard, then N training shards.

They come from the dataset repository kjj0/fineweb10B-gpt2 of the Hugging Face hub, 100 million
tokens each. Shards that are there are kept; if none is missing, the network is not used. A shard
gets its name when it has been checked in full; a download that was stopped goes on with the others.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project's root

from data.check_shards import check_all, compare, print_problems
from data.hub import HubError, download, few, list_files
from referee.flags import finish
from referee.shards import ShardError, check_tokens, open_shard

REPO = "kjj0/fineweb10B-gpt2"
FOLDER = Path(__file__).resolve().parent / "fineweb10B"
VOCAB_SIZE, DOCUMENT_START = 50257, 50256
TRAIN_SHARDS = 102
FINEWEB_TRACK = 9  # training shards


def is_there(path: Path) -> bool:
    """Do header and size say that the whole shard is there? A damaged one is named."""
    try:
        open_shard(path)
    except FileNotFoundError:
        return False
    except ShardError as error:
        print(f"to be fetched again: {error.problem}", file=sys.stderr)
        return False
    return True


def fetch(train_shards: int, folder: Path, revision: str, dry_run: bool) -> None:
    """Download the shards that are missing, or print which they are. Raises HubError."""
    numbers = range(1, train_shards + 1)
    names = ["fineweb_val_000000.bin", *(f"fineweb_train_{n:06d}.bin" for n in numbers)]
    files = []
    if missing := [name for name in names if not is_there(folder / name)]:
        bring = f"on a machine with network get {few(missing)}, and put them into {folder}"
        listed = list_files(REPO, revision, advice=bring)
        files = [file for file in listed if file.rfilename in missing]
        if absent := set(missing) - {file.rfilename for file in files}:
            raise HubError(f"{REPO} at revision {revision} has no {min(absent)}; {bring}")
    if dry_run:
        for file in files:
            print(f"{file.rfilename}  {file.size:,} bytes to fetch")
        print(f"{sum(file.size for file in files):,} bytes to fetch to {folder}")
        return
    for file in files:
        (folder / file.rfilename).unlink(missing_ok=True)  # if it is damaged
    download(REPO, files, folder, revision, lambda path: check_tokens(path, VOCAB_SIZE))


def check(folder: Path, revision: str) -> int:
    """Read every shard of the folder in full, compare it with the hub; return the exit code."""
    paths = sorted(folder.glob("fineweb_*.bin"))
    if not paths:
        raise ShardError(f"no shards in {folder}; run: ./run.sh data/cached_fineweb10B.py")
    report = check_all(paths, VOCAB_SIZE, DOCUMENT_START)
    try:
        listed = list_files(REPO, revision, "fineweb_")
        known = {file.rfilename: {"sha256": file.lfs.sha256} for file in listed}
        compare(report.facts, known, f"{REPO} at {revision}", report)
        print(f"{len(report.facts)} shards have been compared with the hub's")
    except HubError as error:
        print(f"no sha256 is compared with the hub's: {error}", file=sys.stderr)
    if report.problems:
        print(
            "delete what is damaged, then run: ./run.sh data/cached_fineweb10B.py", file=sys.stderr
        )
    return print_problems(report)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    of_shards = "training shards, 100M tokens each (default: %(default)s, for the fineweb track)"
    add("shards", nargs="?", type=int, default=FINEWEB_TRACK, help=of_shards)
    add("--out", type=Path, default=FOLDER, help="folder (default: %(default)s)")
    add("--revision", default="main", help="branch, tag or commit of the hub")
    of_check = "read every shard that is there in full, compare it with the hub; fetch nothing"
    add("--check", action="store_true", help=of_check)
    add("--dry-run", action="store_true", help="print files and bytes; write nothing")
    args = parser.parse_args()
    if not 0 <= args.shards <= TRAIN_SHARDS:
        parser.error(f"there are {TRAIN_SHARDS} training shards")
    if args.check:
        return check(args.out, args.revision)
    fetch(args.shards, args.out, args.revision, args.dry_run)
    return 0


if __name__ == "__main__":
    finish(main)
