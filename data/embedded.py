#!/usr/bin/env python3
"""Build the embedded track's corpus: the Python sources that every install of torch carries.

A document is one file: the separator (token 256), then the file's bytes (tokens 0-255). Files that
differ between the CPU and CUDA wheels, generated files, files over 200,000 bytes, empty files and
exact duplicates are left out. A file belongs to validation when the sha256 of its path says so, so
the split does not move when files are added. Documents are shuffled with a fixed seed.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project's root
    from referee.start import finish

import argparse
import hashlib
import importlib.util
import random

import numpy as np

from referee.shards import ShardError, write_shard

FOLDER = Path(__file__).resolve().parent / "embedded"
SEPARATOR = 256
MAX_FILE_BYTES = 200_000
LEFT_OUT_FOLDERS = ("testing/", "_vendor/", "_native/")
LEFT_OUT_FILES = ("version.py", "sparse/_triton_ops_meta.py")
VAL_SHARE = 20  # one file in this many goes to validation
SHUFFLE_SEED = 20240520


def torch_folder() -> Path:
    """Folder of the installed torch package, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise ShardError("torch is not installed; run: ./run.sh")
    return Path(spec.origin).parent


def documents(package: Path) -> dict[str, bytes]:
    """Contents of every file of the corpus by relative posix path, sorted, no duplicates."""
    found, seen = {}, set()
    for path in sorted(package.rglob("*.py"), key=lambda p: p.relative_to(package).as_posix()):
        name = path.relative_to(package).as_posix()
        if name.startswith(LEFT_OUT_FOLDERS) or name in LEFT_OUT_FILES or "generated" in name:
            continue
        text = path.read_bytes()
        digest = hashlib.sha256(text).digest()
        if not text or len(text) > MAX_FILE_BYTES or digest in seen:
            continue
        seen.add(digest)
        found[name] = text
    return found


def is_validation(name: str) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % VAL_SHARE == 0


def build(folder: Path, package: Path) -> dict[str, int]:
    """Write embedded_train.bin and embedded_val.bin into folder; return tokens by file name."""
    texts, counts = documents(package), {}
    separator = np.array([SEPARATOR], np.uint16)
    for split in ("val", "train"):
        chosen = [t for name, t in texts.items() if is_validation(name) == (split == "val")]
        random.Random(SHUFFLE_SEED).shuffle(chosen)
        files = [np.frombuffer(text, np.uint8) for text in chosen]
        tokens = np.concatenate([part for file in files for part in (separator, file)])
        write_shard(folder / f"embedded_{split}.bin", tokens)
        counts[f"embedded_{split}.bin"] = len(tokens)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or " ").splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder (default: %(default)s)")
    args = parser.parse_args()
    for name, count in build(args.out, torch_folder()).items():
        print(f"{args.out / name}  {count:,} tokens", flush=True)


if __name__ == "__main__":
    finish(main)
