#!/usr/bin/env python3
"""Download GPT-2 tokenized FineWeb10B shards: the validation shard, then N training shards.

docs/data.md says what happens to shards that are there, and without network. The hub's sha256 of
each stands in manifest.json, with which data/check_shards.py compares them.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project's root
    from referee.start import finish

import argparse
import json

from data.hub import download, few, list_files
from referee.files import write_text
from referee.flags import RunError
from referee.shards import ShardError, check_tokens, open_shard

REPO = "kjj0/fineweb10B-gpt2"
FOLDER = Path(__file__).resolve().parent / "fineweb10B"
VOCAB_SIZE = 50257
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


def fetch(train_shards: int, folder: Path) -> None:
    """Download the shards that are missing. RunError if that is not possible."""
    numbers = range(1, train_shards + 1)
    names = ["fineweb_val_000000.bin", *(f"fineweb_train_{n:06d}.bin" for n in numbers)]
    if not (missing := [name for name in names if not is_there(folder / name)]):
        return
    bring = f"on a machine with network get {few(missing)}, and put them into {folder}"
    listed = list_files(REPO, "main", "fineweb_", bring)
    files = [file for file in listed if file.rfilename in missing]
    if absent := set(missing) - {file.rfilename for file in files}:
        raise RunError(f"{REPO} has no {min(absent)}; {bring}")
    for file in files:
        (folder / file.rfilename).unlink(missing_ok=True)  # if it is damaged
    download(REPO, "main", files, folder, lambda path: check_tokens(path, VOCAB_SIZE))
    found = [file for file in listed if (folder / file.rfilename).exists()]
    shards = [{"name": file.rfilename, "sha256": file.lfs.sha256} for file in found]
    write_text(folder / "manifest.json", json.dumps({"shards": shards}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or " ").splitlines()[0])
    add = parser.add_argument
    of_shards = "training shards, 100M tokens each (default: %(default)s, for the fineweb track)"
    add("shards", nargs="?", type=int, default=FINEWEB_TRACK, help=of_shards)
    add("--out", type=Path, default=FOLDER, help="folder (default: %(default)s)")
    args = parser.parse_args()
    if not 0 <= args.shards <= TRAIN_SHARDS:
        parser.error(f"there are {TRAIN_SHARDS} training shards")
    fetch(args.shards, args.out)


if __name__ == "__main__":
    finish(main)
