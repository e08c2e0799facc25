#!/usr/bin/env python3
"""Turn any text into shards of GPT-2 tokens, in one pass over it and on all cores.

docs/data.md says what is read, and which documents validate. Where a document goes depends neither
on the number of threads nor on what follows it in the input, and no document is in both splits.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project's root
    from referee.start import finish

import argparse
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data.documents import KINDS, Document, articles, counts, find_files, kind_of, read_documents
from data.gpt2 import START, encode_all, encoding_of, gpt2_ranks, pieces, ranks_sha256
from data.hub import download, list_files, locked
from referee.files import write_text
from referee.flags import RunError
from referee.shards import HEADER_BYTES, file_sha256, write_shard

FOLDER = Path(__file__).resolve().parent
MAX_SHARD_TOKENS = 2**31 - 1  # the header's count is an int32
VAL_SHARE = 20  # one document in this many may go to validation
FIRST = np.array([START], np.uint16)  # token of each document


class Piece(NamedTuple):
    """A document, or a part of it if it is long."""

    split: str  # train, val, or both if its hash decides
    starts: bool  # is it the document's first piece?
    text: str


def read_pieces(splits: dict[str, Iterable[Document]], skipped: Counter) -> Iterator[Piece]:
    for split, documents in splits.items():
        for document in documents:
            for number, text in enumerate(pieces(document)):
                if text:
                    yield Piece(split, number == 0, text)
                else:
                    skipped["empty"] += 1


class Shards:
    """Deals the tokens of one run to its shards."""

    def __init__(self, out: Path, options: dict, ranks: dict[bytes, int]):
        self.out, self.options = out, options
        self.token_bytes = np.zeros(1 << 16, np.uint16)  # of text in each token
        self.token_bytes[list(ranks.values())] = [len(token) for token in ranks]
        self.train = np.empty(options["shard_tokens"], np.uint16)
        self.filled = 0  # tokens of train that are not written yet
        self.val, self.val_tokens = [], 0
        self.val_digests, self.first_digests = set(), set()
        self.split, self.skipped = "", Counter()
        self.written = []  # what the manifest says of each whole shard
        for part in out.glob(f"{options['name']}_*.part"):  # of a run that was killed
            part.unlink()
        if found := sorted(out.glob(f"{options['name']}_*.bin")):
            raise RunError(
                f"{found[0]} is there without the manifest.json of a finished run; delete it, or "
                "choose another --out or --name"
            )

    def take(self, piece: Piece, tokens: np.ndarray) -> None:
        """Put the next piece where it belongs."""
        if piece.starts:
            self.split = self.split_of(piece)
            tokens = np.concatenate((FIRST, tokens))
        if self.split == "train":
            self.fill(tokens)
        elif self.split == "val":
            if piece.split == "both":
                tokens = tokens[: self.options["val_tokens"] - self.val_tokens]
            self.val.append(tokens)
            self.val_tokens += len(tokens)

    def split_of(self, piece: Piece) -> str:
        """Where a document goes: train, val, or nowhere."""
        if piece.split != "both":
            return piece.split
        digest = hashlib.blake2b(piece.text.encode(), digest_size=8).digest()
        if digest in self.val_digests:
            self.skipped["in validation already"] += 1
            return ""
        if len(self.first_digests) < VAL_SHARE:  # else the only one could go to validation
            self.first_digests.add(digest)
        is_full = self.val_tokens == self.options["val_tokens"]
        if is_full or digest in self.first_digests or int.from_bytes(digest) % VAL_SHARE:
            return "train"
        self.val_digests.add(digest)
        return "val"

    def fill(self, tokens: np.ndarray) -> None:
        """Add tokens to training, and write each shard that becomes full."""
        while len(tokens):
            part, tokens = np.split(tokens, [len(self.train) - self.filled])
            self.train[self.filled : self.filled + len(part)] = part
            self.filled += len(part)
            if self.filled == len(self.train):
                self.written.append(self.write("train", self.train))
                self.filled = 0

    def hold_out_the_end(self) -> None:
        """Move the end of training to validation, which got no document."""
        tokens = self.filled + sum(shard["tokens"] for shard in self.written)
        count = min(self.options["val_tokens"], tokens // VAL_SHARE, self.filled // 2)
        self.filled -= count
        self.val, self.val_tokens = [self.train[self.filled : self.filled + count].copy()], count
        self.val[0][:1] = START
        print(f"validation is the end of the text, {count:,} tokens, for documents are too few; if "
              "a file holds many, give what stands between them: --separator TEXT",
              file=sys.stderr)  # fmt: skip

    def write(self, split: str, tokens: np.ndarray) -> dict:
        """Write one shard, as yet named .part; return what the manifest says of it."""
        number = len(self.written) + 1 if split == "train" else 0
        name = f"{self.options['name']}_{split}_{number:06d}.bin"
        part = self.out / f"{name}.part"
        write_shard(part, tokens)
        return {
            "name": name,
            "tokens": len(tokens),
            "documents": int(np.count_nonzero(tokens == START)),
            "bytes_of_text": int(self.token_bytes[tokens].sum(dtype=np.int64)),
            "sha256": file_sha256(part),
        }

    def finish(self) -> dict:
        """Write the last shards and the manifest; return that. RunError if nothing can train."""
        shards = self.written
        if self.options["val_tokens"] and not self.val_tokens:
            self.hold_out_the_end()
        if self.filled:
            shards.append(self.write("train", self.train[: self.filled]))
        if not shards:
            skipped = dict(self.skipped) or "nothing"
            raise RunError(f"no text is left to train on (skipped: {skipped}); give more")
        if self.val_tokens:
            shards.insert(0, self.write("val", np.concatenate(self.val)))
        manifest = {"created_by": "data/tokenize_text.py", "options": self.options}
        for key in ("documents", "tokens", "bytes_of_text"):
            manifest[key] = sum(shard[key] for shard in shards)
        manifest["bytes_per_token"] = round(manifest["bytes_of_text"] / manifest["tokens"], 6)
        manifest |= {"skipped": dict(sorted(self.skipped.items())), "shards": shards}
        for shard in shards:
            (self.out / f"{shard['name']}.part").replace(self.out / shard["name"])
        text = json.dumps(manifest, indent=1) + "\n"  # a path that is no UTF-8 is escaped
        write_text(self.out / "manifest.json", text)
        return manifest


def read_manifest(path: Path, options: dict) -> dict:
    """The manifest of a finished run. RunError if it had other options, or shards are gone."""
    anew = f"delete {path.parent} to begin anew"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found, shards = manifest["options"], manifest["shards"]
    except (ValueError, TypeError, KeyError):
        raise RunError(f"{path} is damaged; {anew}") from None
    found = {"separator": "", **found}  # older ones lack it
    changed = [f"{k}: {found.get(k)}, now {v}" for k, v in options.items() if found.get(k) != v]
    if changed:
        raise RunError(
            f"{path} is of a run with other options ({', '.join(changed)}); give those again, "
            f"choose another --out, or {anew}"
        )
    for shard in shards:
        file, size = path.with_name(shard["name"]), HEADER_BYTES + 2 * shard["tokens"]
        if not file.exists() or file.stat().st_size != size:
            raise RunError(f"{file} is not as {path} says; {anew}")
    return manifest


def wikitext103(out: Path) -> dict[str, list[Path]]:
    """The parquet files of each split, downloaded to a folder in out. Raises RunError."""
    repo, prefix = "Salesforce/wikitext", "wikitext-103-raw-v1/"
    advice = f"run this on a machine with network, and bring all that it writes to {out}"
    listed = {
        split: list_files(repo, "main", prefix + name, advice)
        for split, name in {"val": "validation-", "train": "train-"}.items()
    }
    folder = out / "parquet"
    return {split: download(repo, "main", files, folder) for split, files in listed.items()}


def tokenize(args: argparse.Namespace) -> dict:
    """Make the shards and the manifest, or find them finished; return the manifest."""
    ranks, files = gpt2_ranks(args.tokenizer_file), {}
    options = {
        "name": args.name,
        "inputs": args.inputs or [args.preset],
        "text_column": args.text_column,
        "separator": args.separator,
        "shard_tokens": args.shard_tokens,
        "val_tokens": args.val_tokens,
        "tokenizer_sha256": ranks_sha256(ranks),
    }
    if not args.preset:
        files["both"], left_out = find_files(args.inputs)
        print(f"files: {counts(Counter(map(kind_of, files['both'])))}; left out: "
              f"{counts(left_out)}", file=sys.stderr)  # fmt: skip
        options |= {"input_files": len(files["both"]), "input_bytes": size_of(files)}
    with locked(args.out):
        if (path := args.out / "manifest.json").exists():
            return read_manifest(path, options)
        shards = Shards(args.out, options, ranks)
        files = files or wikitext103(args.out)
        with tqdm(total=size_of(files), unit="B", unit_scale=True, disable=None) as bar:
            splits = {
                split: read_documents(paths, args.text_column, args.separator, shards.skipped, bar)
                for split, paths in files.items()
            }
            if args.preset:
                splits = {split: articles(rows) for split, rows in splits.items()}
            todo = read_pieces(splits, shards.skipped)
            for piece, tokens in encode_all(todo, encoding_of(ranks), args.workers):
                shards.take(piece, tokens)
        return shards.finish()


def size_of(files: dict[str, list[Path]]) -> int:
    return sum(path.stat().st_size for paths in files.values() for path in paths)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or " ").splitlines()[0])
    add = parser.add_argument
    kinds = f"files, folders or quoted globs ({', '.join(KINDS)})"
    add("inputs", nargs="*", metavar="INPUT", help=kinds)
    add("--preset", choices=["wikitext103"], help="a dataset of the Hugging Face hub")
    add("--name", help="of the shards (default: the preset's, or text)")
    add("--out", type=Path, help="folder (default: data/NAME)")
    add("--text_column", default="text", help="of JSON lines and parquet (default: %(default)s)")
    add("--separator", default="", metavar="TEXT", help="between the documents of a .txt or .md "
        "file, as in --separator '<|endoftext|>' (default: each file is one)")  # fmt: skip
    add("--shard_tokens", type=int, default=100_000_000, help="of training (default: %(default)s)")
    add("--val_tokens", type=int, default=1 << 20, help="of inputs, at most (default: %(default)s)")
    add("--tokenizer_file", type=Path, help="default: data/gpt2.tiktoken, or a download")
    # A Mac cannot say which cores this process may use.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add("--workers", type=int, default=cores, help="threads (default: one per core)")
    args = parser.parse_args()
    if bool(args.preset) == bool(args.inputs):
        parser.error("give either inputs or a --preset")
    for flag, least in (("shard_tokens", 1), ("val_tokens", 0), ("workers", 1)):
        if not least <= getattr(args, flag) <= MAX_SHARD_TOKENS:
            parser.error(f"--{flag} must be {least} to {MAX_SHARD_TOKENS}")
    args.name = args.name or args.preset or "text"
    if not re.fullmatch(r"(?!\.+$)[\w.+-]+", args.name):
        parser.error(f"--name {args.name!r} is no part of a file's name; its place: --out FOLDER")
    args.out = args.out or FOLDER / args.name
    return args


def main() -> None:
    args = parse()
    manifest = tokenize(args)
    for shard in manifest["shards"]:
        print(f"{args.out / shard['name']}  {shard['tokens']:,} tokens")
    for reason, count in manifest["skipped"].items():
        print(f"skipped {count:,} documents: {reason}", file=sys.stderr)


if __name__ == "__main__":
    finish(main, interrupted="stopped; the same command begins again")
