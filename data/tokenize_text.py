#!/usr/bin/env python3
"""Turn any text into shards of GPT-2 tokens, in one pass over it and on all cores.

Documents keep the order of the input, in which `fineweb` trains. One in 20 goes to validation,
chosen by the hash of its text, until --val_tokens are reached; later copies of such a document are
left out. So no document is in both, and where it goes depends neither on the number of workers nor
on what follows it in the input.

An interrupted run goes on after its last whole shard when it is started again: it reads what is in
those shards, and so notices if that has changed, but does not tokenize it. manifest.json is written
last: where it stands, the shards are finished.
"""

import argparse
import fcntl
import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project's root

import numpy as np
from tqdm import tqdm

from data.documents import KINDS, Document, articles, find_files, read_documents
from data.gpt2 import START, TextError, encode_all, gpt2_ranks, pieces
from referee.shards import HEADER_BYTES, file_sha256, write_shard

FOLDER = Path(__file__).resolve().parent
MAX_SHARD_TOKENS = 2**31 - 1  # the header's count is an int32
VAL_SHARE = 20  # one document in this many may go to validation
BATCH_CHARS = 1 << 20  # of text that a worker gets at once
AHEAD = 4  # batches per worker that are read before they can be encoded
FIRST = np.array([START], np.uint16)  # token of each document


class Piece(NamedTuple):
    """A document, or a part of it if it is long.

    digest: of the document's first piece, for which starts is true; checksum: of all that was read
    up to here; text: empty if it is in a whole shard already.
    """

    split: str
    starts: bool
    digest: str
    checksum: str
    text: str


def read_pieces(
    splits: dict[str, Iterable[Document]], done: int, skipped: Counter
) -> Iterator[Piece]:
    """All pieces of the input, of which the first `done` are in whole shards, or in validation."""
    checksum, count = hashlib.blake2b(digest_size=16), 0
    for split, documents in splits.items():
        for document in documents:
            for number, text in enumerate(pieces(document)):
                if not text:
                    skipped["empty"] += 1
                    continue
                own = hashlib.blake2b(text.encode(), digest_size=8)
                checksum.update(own.digest())
                if number == 0:
                    digest = own.hexdigest()
                count += 1
                text = text if count >= done or may_be_val(split, digest) else ""
                yield Piece(split, number == 0, digest, checksum.hexdigest(), text)


def may_be_val(split: str, digest: str) -> bool:
    return split == "val" or split == "both" and int(digest, 16) % VAL_SHARE == 0


def batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text) or 100  # batches of pieces without text end as well
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    yield batch


# ------------------------------------------------------------------------------ Shards


class Shards:
    """Deals the tokens of one run to its shards.

    OUT/unfinished.json is written with each whole shard of training, and says how much of the input
    is in those. Validation is written last: the next run tokenizes what may belong to it again.
    """

    def __init__(self, out: Path, options: dict, ranks: dict[bytes, int]):
        self.out, self.options, self.journal = out, options, out / "unfinished.json"
        self.token_bytes = np.zeros(1 << 16, np.uint16)  # of text in each token
        self.token_bytes[list(ranks.values())] = [len(token) for token in ranks]
        self.train, self.filled = np.empty(options["shard_tokens"], np.uint16), 0
        self.val, self.val_tokens, self.val_digests = [], 0, set()
        self.pieces, self.goal, self.skipped = 0, "", Counter()
        # The last whole shard ends in the piece of this number, after `offset` of its tokens.
        self.done = {"options": options, "pieces": 0, "offset": 0, "checksum": "", "shards": []}
        for part in out.glob(f"{options['name']}_*.part"):  # of a run that was killed
            part.unlink()
        if self.journal.exists():
            self.done = {**read_made(self.journal, options), "options": options}
        elif found := sorted(out.glob(f"{options['name']}_*.bin")):
            raise TextError(
                f"{found[0]} is there, from no run that could be continued; choose another "
                "--out or --name, or delete it"
            )
        else:
            write_json(self.journal, self.done)

    def take(self, piece: Piece, tokens: np.ndarray) -> None:
        """Put the next piece where it belongs. Raises TextError if the input has changed."""
        self.pieces += 1
        is_last_done = self.pieces == self.done["pieces"]
        if is_last_done and piece.checksum != self.done["checksum"]:
            raise self.changed()
        if piece.starts:
            self.goal = self.goal_of(piece)
            tokens = np.concatenate((FIRST, tokens))
        if self.goal == "train" and self.pieces >= self.done["pieces"]:
            self.fill(tokens, self.done["offset"] if is_last_done else 0, piece.checksum)
        elif self.goal == "val":
            if piece.split == "both":
                tokens = tokens[: self.options["val_tokens"] - self.val_tokens]
            self.val.append(tokens)
            self.val_tokens += len(tokens)

    def goal_of(self, piece: Piece) -> str:
        """Where a document goes: train, val, or nowhere."""
        if piece.split != "both":
            return piece.split
        if piece.digest in self.val_digests:
            self.skipped["in validation already"] += 1
            return ""
        is_full = self.val_tokens == self.options["val_tokens"]
        if is_full or not may_be_val(piece.split, piece.digest):
            return "train"
        self.val_digests.add(piece.digest)
        return "val"

    def fill(self, tokens: np.ndarray, begin: int, checksum: str) -> None:
        """Add tokens[begin:] to training, and write each shard that they make whole."""
        while begin < len(tokens):
            part = tokens[begin : begin + len(self.train) - self.filled]
            self.train[self.filled : self.filled + len(part)] = part
            self.filled, begin = self.filled + len(part), begin + len(part)
            if self.filled == len(self.train):
                self.done["shards"].append(self.write("train", self.train))
                self.done |= {"pieces": self.pieces, "offset": begin, "checksum": checksum}
                write_json(self.journal, self.done)
                self.filled = 0

    def write(self, split: str, tokens: np.ndarray) -> dict:
        """Write one shard; return what the manifest says of it."""
        number = len(self.done["shards"]) + 1 if split == "train" else 0
        path = self.out / f"{self.options['name']}_{split}_{number:06d}.bin"
        write_shard(path, tokens)
        return {
            "name": path.name,
            "tokens": len(tokens),
            "documents": int(np.count_nonzero(tokens == START)),
            "bytes_of_text": int(self.token_bytes[tokens].sum(dtype=np.int64)),
            "sha256": file_sha256(path),
        }

    def finish(self) -> dict:
        """Write the last shards and the manifest; return that. TextError if nothing can train."""
        if self.pieces < self.done["pieces"]:
            raise self.changed()
        shards = self.done["shards"]
        if not self.filled and not shards:
            raise TextError(
                f"no text is left to train on ({self.val_tokens:,} tokens are in validation, "
                f"skipped: {dict(self.skipped) or 'nothing'}); give more, or --val_tokens 0"
            )
        if self.filled:
            shards.append(self.write("train", self.train[: self.filled]))
        if self.val_tokens:
            shards.insert(0, self.write("val", np.concatenate(self.val)))
        manifest = {"created_by": "data/tokenize_text.py", "options": self.options}
        for key in ("documents", "tokens", "bytes_of_text"):
            manifest[key] = sum(shard[key] for shard in shards)
        manifest["bytes_per_token"] = round(manifest["bytes_of_text"] / manifest["tokens"], 6)
        manifest |= {"skipped": dict(sorted(self.skipped.items())), "shards": shards}
        write_json(self.out / "manifest.json", manifest)
        self.journal.unlink()
        return manifest

    def changed(self) -> TextError:
        return TextError(
            "the input is not what it was when this work began; restore it, or delete "
            f"{self.out} to begin anew"
        )


def read_made(path: Path, options: dict) -> dict:
    """Read a journal or manifest. TextError if it has other options, or shards that are gone."""
    made = {"options": {}, "shards": []}
    with suppress(ValueError, TypeError):  # if it is damaged it has none of these
        made |= json.loads(path.read_text())
    found = made["options"]
    changed = [f"{k}: {found.get(k)}, now {v}" for k, v in options.items() if found.get(k) != v]
    if changed and (made["shards"] or not found):  # without a shard nothing is lost
        raise TextError(
            f"{path} is of a run with other options ({', '.join(changed)}); give those again, "
            f"choose another --out, or delete {path.parent} to begin anew"
        )
    for shard in made["shards"]:
        file, size = path.with_name(shard["name"]), HEADER_BYTES + 2 * shard["tokens"]
        if not file.exists() or file.stat().st_size != size:
            raise TextError(f"{file} is not as {path} says; delete {path.parent} to begin anew")
    return made


def write_json(path: Path, value: dict) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    part.replace(path)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep other processes from a folder."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TextError(f"another process is writing to {out}; wait, or choose --out") from None
        yield


# ------------------------------------------------------------------------------ WikiText-103


def wikitext103(out: Path) -> dict[str, list[Path]]:
    """The parquet files of each split, downloaded to a folder in out. Raises HubError."""
    from data.hub import download, list_files  # slow to import, and only needed here

    repo, prefix = "Salesforce/wikitext", "wikitext-103-raw-v1/"
    advice = f"run this on a machine with network, and bring all that it writes to {out}"
    listed = {
        split: list_files(repo, prefix=prefix + name, advice=advice)
        for split, name in {"val": "validation-", "train": "train-"}.items()
    }
    return {split: download(repo, files, out / "parquet") for split, files in listed.items()}


# ------------------------------------------------------------------------------ Main


def tokenize(args: argparse.Namespace) -> dict:
    """Make the shards and the manifest, or find them finished; return the manifest."""
    ranks, files = gpt2_ranks(args.tokenizer_file), {}
    options = {
        "name": args.name,
        "inputs": args.inputs or [args.preset],
        "text_column": args.text_column,
        "shard_tokens": args.shard_tokens,
        "val_tokens": args.val_tokens,
        "tokenizer_sha256": hashlib.sha256(b" ".join(sorted(ranks, key=ranks.get))).hexdigest(),
    }
    if not args.preset:
        files = {"both": find_files(args.inputs)}
        options |= {"input_files": len(files["both"]), "input_bytes": size_of(files)}
    with locked(args.out):
        if (path := args.out / "manifest.json").exists():
            return read_made(path, options)
        shards = Shards(args.out, options, ranks)
        files = files or wikitext103(args.out)
        with tqdm(total=size_of(files), unit="B", unit_scale=True, disable=None) as bar:
            splits = {
                split: read_documents(paths, args.text_column, shards.skipped, bar)
                for split, paths in files.items()
            }
            if args.preset:
                splits = {split: articles(rows) for split, rows in splits.items()}
            todo = batches(read_pieces(splits, shards.done["pieces"], shards.skipped))
            for batch, tokens in encode_all(todo, ranks, args.workers, AHEAD * args.workers):
                for piece, piece_tokens in zip(batch, tokens, strict=True):
                    shards.take(piece, piece_tokens)
        return shards.finish()


def size_of(files: dict[str, list[Path]]) -> int:
    return sum(path.stat().st_size for paths in files.values() for path in paths)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    kinds = f"files, folders or quoted globs ({', '.join(KINDS)})"
    add("inputs", nargs="*", metavar="INPUT", help=kinds)
    add("--preset", choices=["wikitext103"], help="a dataset of the Hugging Face hub")
    add("--name", help="of the shards (default: the preset's, or text)")
    add("--out", type=Path, help="folder (default: data/NAME)")
    add("--text_column", default="text", help="of JSON lines and parquet (default: %(default)s)")
    add("--shard_tokens", type=int, default=100_000_000, help="of training (default: %(default)s)")
    add("--val_tokens", type=int, default=1 << 20, help="of inputs, at most (default: %(default)s)")
    add("--tokenizer_file", type=Path, help="default: data/gpt2.tiktoken, or a download")
    # A Mac cannot say which cores this process may use.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add("--workers", type=int, default=cores, help="processes (default: one per core)")
    args = parser.parse_args()
    if bool(args.preset) == bool(args.inputs):
        parser.error("give either inputs or a --preset")
    for flag, least in (("shard_tokens", 1), ("val_tokens", 0), ("workers", 1)):
        if not least <= getattr(args, flag) <= MAX_SHARD_TOKENS:
            parser.error(f"--{flag} must be {least} to {MAX_SHARD_TOKENS}")
    args.name = args.name or args.preset or "text"
    if not re.fullmatch(r"[\w.+-]+", args.name):
        parser.error(f"--name {args.name!r} is no part of a file's name; its place: --out FOLDER")
    args.out = args.out or FOLDER / args.name
    return args


def main() -> int:
    args = parse()
    try:
        manifest = tokenize(args)
    except OSError as error:
        # An error of writing, above all that the disk is full, has a number and names no file.
        nameless = error.errno and not error.filename
        where = f"cannot write to {args.out}; make room, then run this again: " if nameless else ""
        print(f"error: {where}{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on where this one was", file=sys.stderr)
        return 130
    for shard in manifest["shards"]:
        print(f"{args.out / shard['name']}  {shard['tokens']:,} tokens")
    for reason, count in manifest["skipped"].items():
        print(f"skipped {count:,} documents: {reason}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
