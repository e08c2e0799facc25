#!/usr/bin/env python3
"""Turn any text into shards: GPT-2 tokens, documents shuffled, validation apart.

First every document is tokenized, on all cores, and appended in the order of the input to one file,
below OUT/work. Then the documents are dealt into shards in an order that the seed sets: a random
permutation of all of them, for which memory holds some 40 bytes a document, and one shard. Both are
the same for any number of workers.

An interrupted run goes on where it stopped when it is started again. It reads again what it had
tokenized, and so notices if that has changed. Finished shards are never touched. Until the end both
the file of tokens and the shards are on the disk: 4 bytes a token.
"""

import argparse
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TypeVar

import numpy as np
from documents import (
    KINDS,
    STDIN,
    Record,
    TextError,
    articles,
    check_parquet,
    find_files,
    parquet_texts,
    read_records,
)
from filelock import FileLock, Timeout
from gpt2 import START, Workers, gpt2_ranks, ranks_sha256
from shards import file_sha256, open_shard, write_shard
from tqdm import tqdm

FOLDER = Path(__file__).resolve().parent
MAX_SHARD_TOKENS = 2**31 - 1  # the header's count is an int32

BATCH_BYTES = 1 << 20  # of text that a worker gets at once
AHEAD_BYTES = 4 << 20  # of text for each worker that is read, and not yet tokenized
SAVE_EVERY = 1.0  # seconds
CONVERTED = "refs/convert/parquet"  # where the hub puts parquet that it made itself
T = TypeVar("T")


@dataclass(frozen=True)
class Preset:
    """A dataset of the hub. prefix: of its parquet files; val: of its validation split's."""

    repo: str
    prefix: str
    val: str | None
    is_wikitext: bool


PRESETS = {
    "openwebtext": Preset("Skylion007/openwebtext", "", None, False),
    "wikitext103": Preset("Salesforce/wikitext", "wikitext-103-raw-v1/", "validation", True),
}


# ------------------------------------------------------------------------------ First pass


class Spool:
    """Tokens of all documents in the order of the input, in a folder, and a journal of the work.

    The journal says how many batches are in the file of tokens, and which text they were: what
    stands in the file beyond that, a killed run had not finished.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.tokens, self.journal = folder / "tokens", folder / "journal.json"
        self.done = {"batches": 0, "tokens": 0, "sha256": hashlib.sha256().hexdigest()}
        self.done |= {"skipped": {}, "complete": False}
        if self.journal.exists():
            self.done = read_json(self.journal)
        self.saved = time.monotonic()

    def fill(self, records: Iterable[Record], workers: Workers) -> None:
        """Tokenize what is not yet there. Raises TextError, also if the input has changed."""
        todo, digest = batches(records), hashlib.sha256()
        for _ in range(self.done["batches"]):
            add_to_digest(digest, next(todo, []))
        if digest.hexdigest() != self.done["sha256"]:
            raise self.changed()
        pending, ahead, most = deque(), 0, AHEAD_BYTES * len(workers.processes)
        with self.tokens.open("ab") as file:
            file.truncate(2 * self.done["tokens"])
            for batch in todo:
                if self.done["complete"]:
                    raise self.changed()
                add_to_digest(digest, batch)
                size = sum(len(data) for _, data in batch)
                while pending and (ahead + size > most or pending[0][0].done()):
                    ahead -= self.store(file, *pending.popleft())
                pending.append((workers.submit(batch), size, digest.hexdigest()))
                ahead += size
            while pending:
                self.store(file, *pending.popleft())
            self.done["complete"] = True
            self.save(file)

    def changed(self) -> TextError:
        return TextError(
            "the input is not what it was when this work began; restore it, or delete "
            f"{self.tokens.parent.parent} to begin anew"
        )

    def store(self, file, future: Future, size: int, sha256: str) -> int:
        """Append the next batch, whose text is `size` bytes; return that."""
        tokens, skipped = future.result()
        file.write(tokens.astype("<u2", copy=False))
        self.done["batches"] += 1
        self.done["tokens"] += len(tokens)
        self.done["sha256"] = sha256
        self.done["skipped"] = dict(Counter(self.done["skipped"]) + skipped)
        if time.monotonic() - self.saved > SAVE_EVERY:
            self.save(file)
        return size

    def save(self, file) -> None:
        file.flush()
        os.fsync(file.fileno())  # a power cut must not leave the journal ahead of the tokens
        write_json(self.journal, self.done)
        self.saved = time.monotonic()


def batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    batch, size = [], 0
    for record in records:
        batch.append(record)
        size += len(record[1])
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def add_to_digest(digest, batch: list[Record]) -> None:
    for kind, data in batch:
        data = data.encode() if isinstance(data, str) else data
        digest.update(b"%s %d " % (kind.encode(), len(data)))
        digest.update(data)


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise TextError(
            f"{path} is damaged ({error}); delete {path.parent} to begin anew"
        ) from None


def write_json(path: Path, value: dict) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    part.replace(path)


# ------------------------------------------------------------------------------ Second pass


class Stream:
    """The documents of a spool, one behind the other in a random order, or in that of the input."""

    def __init__(self, spool: Spool, seed: int | None):
        starts = find_starts(spool.tokens)
        lengths = np.diff(starts, append=spool.done["tokens"])
        order = np.arange(len(starts))
        if seed is not None:
            order = np.random.default_rng(seed).permutation(len(starts))
        self.path, self.starts, self.ends = spool.tokens, starts[order], np.cumsum(lengths[order])

    def __len__(self) -> int:
        """Tokens."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def document_end(self, position: int) -> int:
        """Where the document ends that holds the token before a position > 0."""
        return int(self.ends[np.searchsorted(self.ends, position)])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as uint16. What lies close together in the file is read together."""
        first = int(np.searchsorted(self.ends, start, "right"))
        last = int(np.searchsorted(self.ends, stop)) + 1
        ends = self.ends[first:last].clip(max=stop)
        begins = np.concatenate(([start], ends[:-1]))
        sources = self.starts[first:last].copy()
        sources[0] += start - (self.ends[first - 1] if first else 0)  # it may have begun before
        order = np.argsort(sources)
        tokens = np.empty(stop - start, "<u2")
        view = memoryview(tokens).cast("B")
        with self.path.open("rb") as file:
            for source, begin, end in np.stack((sources, begins, ends))[:, order].T.tolist():
                read_at(file.fileno(), 2 * source, view[2 * (begin - start) : 2 * (end - start)])
        return tokens


def read_at(descriptor: int, offset: int, view: memoryview) -> None:
    """Fill the view with bytes of a file."""
    while view:
        if not (count := os.preadv(descriptor, [view], offset)):
            raise OSError("a file of tokens is too short; delete the folder work to begin anew")
        view, offset = view[count:], offset + count


def find_starts(path: Path) -> np.ndarray:
    """Positions of the documents (N,) int64 in a file of tokens: no text is encoded as START."""
    found, position = [np.empty(0, np.int64)], 0
    with path.open("rb") as file:
        while len(tokens := np.fromfile(file, "<u2", 1 << 22)):
            found.append(np.flatnonzero(tokens == START) + position)
            position += len(tokens)
    return np.concatenate(found)


def deal(spools: dict[str, Spool], options: dict) -> list[tuple[str, Stream, int, int]]:
    """(name, stream, start, stop) of every shard. Raises TextError if no training text is left.

    Where validation has no text of its own, it gets the first documents of the shuffled order, the
    last of them cut at the exact count; what is cut off is in no shard.
    """
    name, asked, begin = options["name"], options["val_tokens"], 0
    train = Stream(spools["train"], options["seed"])
    shards = []
    if "val" in spools:
        val = Stream(spools["val"], None)
        shards.append((f"{name}_val_000000.bin", val, 0, len(val)))
    elif asked:
        begin = train.document_end(asked) if asked < len(train) else len(train)
        shards.append((f"{name}_val_000000.bin", train, 0, asked))
    if begin == len(train):
        skipped = sum(sum(spool.done["skipped"].values()) for spool in spools.values())
        raise TextError(
            f"the input has {len(train):,} tokens in {len(train.ends):,} documents ({skipped:,} "
            "were skipped), and none is left to train on; give more text, or less to --val_tokens"
        )
    for number, start in enumerate(range(begin, len(train), options["shard_tokens"]), 1):
        stop = min(start + options["shard_tokens"], len(train))
        shards.append((f"{name}_train_{number:06d}.bin", train, start, stop))
    return shards


def describe(path: Path, token_bytes: np.ndarray) -> dict:
    """What the manifest says of a shard; token_bytes: (65536,), of text in each token."""
    tokens = open_shard(path)
    parts = np.array_split(tokens, len(tokens) // (1 << 22) + 1)
    counts = sum(np.bincount(part, minlength=len(token_bytes)) for part in parts)
    return {
        "name": path.name,
        "tokens": len(tokens),
        "documents": int(counts[START]),
        "bytes_of_text": int(counts @ token_bytes),
        "sha256": file_sha256(path),
    }


# ------------------------------------------------------------------------------ Presets


def preset_files(preset: Preset, folder: Path) -> dict[str, list[Path]]:
    """The parquet files of each split: those that were brought to the folder, or the hub's."""
    if files := brought_files(preset, folder):
        return files
    from hub import download, list_files  # slow to import, and only needed here

    advice = f"{where_to_bring(preset, folder)}, then run this again"
    for revision in ("main", CONVERTED):
        listed = list_files(preset.repo, revision, preset.prefix, advice)
        files = by_split(preset, {file.name: file for file in listed})
        if all(files.values()):
            return {
                split: download(preset.repo, chosen, folder, revision, check_parquet)
                for split, chosen in files.items()
            }
    raise TextError(f"{preset.repo} has no parquet files of all its splits; {advice}")


def where_to_bring(preset: Preset, folder: Path) -> str:
    source = f"https://huggingface.co/datasets/{preset.repo}"
    return f"bring {preset.prefix}*.parquet from {source} to {folder}"


def brought_files(preset: Preset, folder: Path) -> dict[str, list[Path]] | None:
    return complete_splits(preset, sorted(folder.rglob("*.parquet")))


def complete_splits(preset: Preset, paths: list[Path]) -> dict[str, list[Path]] | None:
    """The files of each split, if their names (...-of-00002.parquet) say that all are here."""
    files = by_split(preset, {path.as_posix(): path for path in paths})
    for chosen in files.values():
        totals = [re.search(r"-of-(\d+)\.parquet$", path.name) for path in chosen]
        if not totals or any(m is None or int(m[1]) != len(chosen) for m in totals):
            return None
    return files


def by_split(preset: Preset, files: dict[str, T]) -> dict[str, list[T]]:
    """Files, by name, of the splits that become shards."""
    hub_names = {"val": preset.val, "train": "train"} if preset.val else {"train": "train"}
    return {
        split: [f for n, f in files.items() if re.search(rf"(^|[/-]){hub}[-/].*\.parquet$", n)]
        for split, hub in hub_names.items()
    }


# ------------------------------------------------------------------------------ Main


def tokenize(args: argparse.Namespace) -> dict:
    """Make the shards and the manifest, or find them finished; return the manifest."""
    preset = PRESETS.get(args.preset)
    try:
        ranks = gpt2_ranks(args.tokenizer_file)
    except TextError as error:
        if preset and not brought_files(preset, args.out / "parquet"):  # all that is to be brought
            raise TextError(f"{error}; {where_to_bring(preset, args.out / 'parquet')}") from None
        raise
    options = options_of(args, ranks)
    files = {"train": find_files(args.inputs)} if not preset else None
    if finished := finished_manifest(args.out, options, files):
        shutil.rmtree(args.out / "work", ignore_errors=True)
        return finished
    files = files or preset_files(preset, args.out / "parquet")
    with working_folder(args.out, options) as work:
        spools = fill_spools(work, files, preset, args, ranks)
        token_bytes = np.zeros(1 << 16, np.int64)
        for token, rank in ranks.items():
            token_bytes[rank] = len(token)
        shards = []
        for name, stream, start, stop in tqdm(deal(spools, options), unit="shard", disable=None):
            if not (args.out / name).exists():
                write_shard(work / name, stream.read(start, stop))
                (work / name).replace(args.out / name)
            shards.append(describe(args.out / name, token_bytes))
        skipped = sum((Counter(spool.done["skipped"]) for spool in spools.values()), Counter())
        manifest = manifest_of(options, size_of(files), skipped, shards)
        write_json(args.out / "manifest.json", manifest)
    return manifest


def options_of(args: argparse.Namespace, ranks: dict[bytes, int]) -> dict:
    """All that sets the contents of the shards, apart from the contents of the input."""
    return {
        "name": args.name,
        "inputs": args.inputs or [args.preset],
        "text_column": args.text_column,
        "shard_tokens": args.shard_tokens,
        "val_tokens": args.val_tokens,
        "seed": args.seed,
        "tokenizer_sha256": ranks_sha256(ranks),
    }


def size_of(files: dict[str, list[Path | str]]) -> dict[str, int]:
    paths = [path for chosen in files.values() for path in chosen]
    return {
        "files": len(paths),
        "bytes": sum(path.stat().st_size for path in paths if path != STDIN),
    }


def finished_manifest(out: Path, options: dict, files: dict | None) -> dict | None:
    """The manifest of a finished run with these options; TextError if it had others."""
    if not (path := out / "manifest.json").exists():
        return None
    manifest = read_json(path)
    found = manifest["options"] | ({"input": manifest["input"]} if files else {})
    asked = options | ({"input": size_of(files)} if files else {})
    if found != asked:
        raise TextError(
            f"{out} holds shards that were made otherwise ({differences(found, asked)}); choose "
            f"another --out, or delete {path} and the shards beside it"
        )
    for entry in manifest["shards"]:
        if len(open_shard(out / entry["name"])) != entry["tokens"]:
            raise TextError(f"{out / entry['name']} is not as in {path}; delete both")
    return manifest


def differences(found: dict, asked: dict) -> str:
    return ", ".join(f"{k}: {found.get(k)}, now {v}" for k, v in asked.items() if found.get(k) != v)


@contextmanager
def working_folder(out: Path, options: dict) -> Iterator[Path]:
    """OUT/work for this process alone, with what a run with the same options left there."""
    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(work / "lock").acquire(timeout=0)
    except Timeout:
        raise TextError(f"another process is writing to {out}; wait, or choose --out") from None
    with lock:
        noted = work / "options.json"
        if not noted.exists():
            if shards := sorted(out.glob(f"{options['name']}_*.bin")):
                raise TextError(
                    f"{shards[0]} is there, from no run that could be continued; choose another "
                    "--out or --name, or delete it"
                )
            write_json(noted, options)
        elif (found := read_json(noted)) != options:
            raise TextError(
                f"{work} holds the work of an interrupted run with other options "
                f"({differences(found, options)}); give those again, or delete it and the shards "
                "beside it"
            )
        yield work
        shutil.rmtree(work)


def fill_spools(
    work: Path, files: dict, preset: Preset | None, args: argparse.Namespace, ranks: dict
) -> dict[str, Spool]:
    """Tokenize the files of each split."""
    spools = {split: Spool(work / split) for split in files}
    total = size_of(files)["bytes"] or None
    with (
        Workers(args.workers, ranks, args.text_column) as workers,
        tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar,
    ):
        for split, spool in spools.items():
            if preset and preset.is_wikitext:
                rows = (parquet_texts(path, args.text_column, bar) for path in files[split])
                records = (("text", text) for text in articles(chain.from_iterable(rows)))
            else:
                records = read_records(files[split], args.text_column, bar)
            spool.fill(records, workers)
    return spools


def manifest_of(options: dict, size: dict, skipped: Counter, shards: list[dict]) -> dict:
    tokens, text_bytes = (sum(s[key] for s in shards) for key in ("tokens", "bytes_of_text"))
    return {
        "name": options["name"],
        "created_by": "data/tokenize_text.py",
        "tokenizer": {"name": "gpt2", "sha256": options["tokenizer_sha256"]},
        "options": options,
        "input": size,
        "documents": sum(shard["documents"] for shard in shards),
        "tokens": tokens,
        "bytes_of_text": text_bytes,
        "bytes_per_token": round(text_bytes / tokens, 6),
        "skipped": dict(sorted(skipped.items())),
        "shards": shards,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help=f"files, folders or quoted globs ({', '.join(KINDS)}), or - for standard input",
    )
    parser.add_argument("--preset", choices=PRESETS, help="a dataset of the Hugging Face hub")
    parser.add_argument("--name", help="of the shards (default: the preset's, or text)")
    parser.add_argument("--out", type=Path, help="folder (default: data/NAME)")
    parser.add_argument(
        "--text_column",
        default="text",
        help="of JSON lines and parquet (default: %(default)s)",
    )
    parser.add_argument(
        "--shard_tokens",
        type=int,
        default=100_000_000,
        help="in each training shard but the last (default: %(default)s)",
    )
    parser.add_argument(
        "--val_tokens",
        type=int,
        help="in the validation shard; 0: none (default: 1048576, or the preset's own split)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order (default: %(default)s)")
    parser.add_argument(
        "--tokenizer_file",
        type=Path,
        help="gpt2.tiktoken (default: data/gpt2.tiktoken, or a download)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes (default: one a core)",
    )
    args = parser.parse_args()
    if bool(args.preset) == bool(args.inputs):
        parser.error("give either inputs or a --preset")
    if not 1 <= args.shard_tokens <= MAX_SHARD_TOKENS:
        parser.error(f"--shard_tokens must be 1 to {MAX_SHARD_TOKENS}")
    if args.val_tokens is None:
        args.val_tokens = 0 if args.preset and PRESETS[args.preset].val else 1 << 20
    elif not 0 <= args.val_tokens <= MAX_SHARD_TOKENS:
        parser.error(f"--val_tokens must be 0 to {MAX_SHARD_TOKENS}")
    elif args.preset and PRESETS[args.preset].val:
        parser.error(f"--preset {args.preset} has a validation split of its own: no --val_tokens")
    if args.workers < 1:
        parser.error("--workers must be 1 or more")
    args.name = args.name or args.preset or "text"
    args.out = args.out or FOLDER / args.name
    return args


def explained(error: OSError, out: Path) -> str:
    """The error in a sentence; a disk that is full names no file by itself."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return str(error)
    return (
        f"cannot write to {out} ({error.strerror}); make room and run the same command again, "
        "it goes on where it stopped"
    )


def stop(number: int, _frame) -> None:
    raise KeyboardInterrupt(number)


def main() -> int:
    args = parse()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        manifest = tokenize(args)
    except OSError as error:
        print(f"error: {explained(error, args.out)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stopped:
        print("stopped; the same command goes on where this one was", file=sys.stderr)
        return 128 + stopped.args[0]
    for shard in manifest["shards"]:
        print(f"{args.out / shard['name']}  {shard['tokens']:,} tokens")
    for reason, count in manifest["skipped"].items():
        print(f"skipped {count:,} documents: {reason}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
