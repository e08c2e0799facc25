#!/usr/bin/env python3
"""Download GPT-2 tokenized FineWeb10B shards: the validation shard, then N training shards.

They come from the dataset repository kjj0/fineweb10B-gpt2 of the Hugging Face hub, 100 million
tokens each. Shards that are there and sound are kept, so running this again is safe.
"""

import argparse
import sys
from pathlib import Path

from huggingface_hub import hf_hub_download
from shards import open_shard

REPO = "kjj0/fineweb10B-gpt2"
FOLDER = Path(__file__).resolve().parent / "fineweb10B"
TRAIN_SHARDS = 102


def is_sound(path: Path) -> bool:
    try:
        return len(open_shard(path)) > 0
    except OSError:
        return False


def fetch(name: str, folder: Path) -> None:
    """Download one shard into folder and check it; OSError if that fails."""
    path = folder / name
    if is_sound(path):
        return
    print(f"downloading {name}", flush=True)
    try:
        part = Path(hf_hub_download(REPO, name, repo_type="dataset", local_dir=folder / "part"))
        open_shard(part)
        part.replace(path)
    except Exception as error:
        raise OSError(
            f"cannot get {name} from {REPO} ({type(error).__name__}: {error}); on a machine "
            f"without network, copy it from another to {path}"
        ) from None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "shards", nargs="?", type=int, default=9, help="training shards (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder (default: %(default)s)")
    args = parser.parse_args()
    if not 0 <= args.shards <= TRAIN_SHARDS:
        parser.error(f"there are {TRAIN_SHARDS} training shards")
    numbers = range(1, args.shards + 1)
    try:
        for name in ["fineweb_val_000000.bin", *(f"fineweb_train_{n:06d}.bin" for n in numbers)]:
            fetch(name, args.out)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
