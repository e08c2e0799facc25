#!/usr/bin/env python3
"""Download GPT-2 tokenized FineWeb10B shards: the validation shard, then N training shards.

They come from the dataset repository kjj0/fineweb10B-gpt2 of the Hugging Face hub, 100 million
tokens each. Shards that are there are kept: without a gap the network is not touched. A download
that was stopped goes on where it was; a shard gets its name when it has been checked in full.
"""

import argparse
import sys
from pathlib import Path

from hub import HubError, RemoteFile, download, free_bytes, list_files, say
from shards import ShardError, check_tokens, file_sha256, open_shard
from tqdm import tqdm

REPO = "kjj0/fineweb10B-gpt2"
FOLDER = Path(__file__).resolve().parent / "fineweb10B"
VOCAB_SIZE = 50257
TRAIN_SHARDS = 102
FINEWEB_TRACK = 9  # training shards


def shard_names(train_shards: int) -> list[str]:
    numbers = range(1, train_shards + 1)
    return ["fineweb_val_000000.bin", *(f"fineweb_train_{n:06d}.bin" for n in numbers)]


def damage(path: Path) -> str:
    """What header and size say against a file that is there; empty if nothing."""
    try:
        open_shard(path)
    except OSError as error:
        return str(error)
    return ""


def list_shards(names: list[str], folder: Path, revision: str) -> list[RemoteFile]:
    """The hub's entries for these shards. HubError if it has them not, or cannot be asked."""
    few = ", ".join(names)
    if len(names) > 3:
        few = f"{names[0]}, {names[1]} ... {names[-1]} ({len(names)} files)"
    bring = f"on a machine with network get {few}, and put them into {folder}"
    found = {file.name: file for file in list_files(REPO, revision, advice=bring)}
    for name in names:
        if name not in found:
            raise HubError(f"{REPO} at revision {revision} has no {name}; {bring}")
    return [found[name] for name in names]


def check_download(path: Path) -> None:
    """Read a file that has not got its name yet. Raises ShardError, without its usual advice."""
    try:
        check_tokens(path, VOCAB_SIZE)
    except ShardError as error:
        raise ShardError(error.problem) from None


def fetch(names: list[str], folder: Path, revision: str) -> None:
    """Download the shards that are not there, or not sound. Raises HubError."""
    lacking = {name: folder / name for name in names if damage(folder / name)}
    if not lacking:
        return
    files = list_shards(list(lacking), folder, revision)
    for path in lacking.values():
        if path.exists():
            say(f"refused, and fetched again: {damage(path)}")
            path.unlink()
    download(REPO, files, folder, revision, check_download)


def print_plan(names: list[str], folder: Path, revision: str) -> None:
    """Files and bytes that are there and that a download would fetch, and the free disk."""
    lacking = [name for name in names if damage(folder / name)]
    sizes = {}
    if lacking:
        sizes = {file.name: file.size for file in list_shards(lacking, folder, revision)}
    for name in names:
        size = sizes.get(name) or (folder / name).stat().st_size
        print(f"{name:24}  {size:>11,} bytes  {'to fetch' if name in sizes else 'there'}")
    print(
        f"{len(names)} files, {len(sizes)} to fetch: {sum(sizes.values()):,} bytes; "
        f"{free_bytes(folder):,} bytes are free in {folder}"
    )


def check(folder: Path, revision: str) -> bool:
    """Read every shard of the folder in full, print a line for each; are all sound?"""
    paths = sorted(folder.glob("fineweb_*.bin"))
    if not paths:
        raise ShardError(f"no shards in {folder}; run: python data/cached_fineweb10B.py")
    try:
        known = {file.name: file.sha256 for file in list_files(REPO, revision)}
    except HubError as error:
        say(f"no sha256 is compared with the hub's: {error}")
        known = {}
    all_sound = True
    for path in tqdm(paths, unit="file", disable=None):
        try:
            tokens, _ = check_tokens(path, VOCAB_SIZE)
            digest = file_sha256(path)
            if known.get(path.name) not in (None, digest):
                raise ShardError(
                    f"{path} has sha256 {digest}, the hub's has {known[path.name]}; delete it and "
                    "run: python data/cached_fineweb10B.py"
                )
        except OSError as error:
            say(f"error: {error}")
            all_sound = False
            continue
        verdict = "as on the hub" if known.get(path.name) else "not compared"
        tqdm.write(f"{path.name}  {len(tokens):,} tokens  sha256 {digest} ({verdict})")
    return all_sound


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
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--dry-run", action="store_true", help="print files, bytes and free disk; write nothing"
    )
    instead.add_argument(
        "--check",
        action="store_true",
        help="read every shard that is there in full, compare it with the hub; fetch nothing",
    )
    args = parser.parse_args()
    if not 0 <= args.shards <= TRAIN_SHARDS:
        parser.error(f"there are {TRAIN_SHARDS} training shards")
    return args


def main() -> int:
    args = parse()
    names = shard_names(args.shards)
    try:
        if args.check:
            return 0 if check(args.out, args.revision) else 1
        act = print_plan if args.dry_run else fetch
        act(names, args.out, args.revision)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on where this one was", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
