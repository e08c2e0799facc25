"""GPT-2's tokenizer, and processes that encode batches of documents with it."""

import base64
import hashlib
import json
import multiprocessing
import signal
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import tiktoken
from documents import Record, TextError, pieces
from tiktoken_ext import openai_public

GPT2_FILE = Path(__file__).resolve().parent / "gpt2.tiktoken"
START, START_TEXT = 50256, "<|endoftext|>"

# ------------------------------------------------------------------------------ Tokenizer


def gpt2_ranks(file: Path | None) -> dict[bytes, int]:
    """The rank of each token of GPT-2, from a file or, if there is none, from the network."""
    if file is None and GPT2_FILE.exists():
        file = GPT2_FILE
    if file is not None:
        return read_ranks(file)
    try:
        return openai_public.gpt2()["mergeable_ranks"]
    except (OSError, ValueError) as error:
        raise TextError(
            f"cannot download the GPT-2 tokenizer ({type(error).__name__}); bring gpt2.tiktoken "
            "(it is in the GitHub repository openai/whisper, folder whisper/assets) to "
            f"{GPT2_FILE}, or name its place with --tokenizer_file"
        ) from None


def read_ranks(file: Path) -> dict[bytes, int]:
    """Read a file with a token in base64, a space and its rank in each line."""
    advice = "give a file in the format of gpt2.tiktoken"
    ranks = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise TextError(
                f"{file}, line {number} is not a token and its rank; {advice}"
            ) from None
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise TextError(f"{file} has no token for some bytes; {advice}")
    if len(set(ranks.values())) < len(ranks) or not 0 <= min(ranks.values()):
        raise TextError(f"{file} gives two tokens one rank, or a negative one; {advice}")
    if (largest := max(ranks.values())) >= START:
        raise TextError(
            f"{file} has rank {largest}, but ranks must stay below {START}, which is "
            f"{START_TEXT}; {advice}"
        )
    return ranks


def encoding_of(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        "photofinish_gpt2",
        pat_str=openai_public.r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={START_TEXT: START},
    )


def ranks_sha256(ranks: dict[bytes, int]) -> str:
    """The sha256 of the file that read_ranks reads, with its lines in the order of the ranks."""
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in ordered)
    return hashlib.sha256(b"".join(lines)).hexdigest()


# ------------------------------------------------------------------------------ Workers


class Workers:
    """Processes that encode batches, each at the other end of a pipe.

    concurrent.futures has such a pool, but it hangs when a worker is killed while it answers, and
    its workers outlive a parent that is killed. Here both sides meet the end of a pipe.
    """

    def __init__(self, count: int, ranks: dict[bytes, int], column: str):
        context = multiprocessing.get_context("spawn")
        self.threads = ThreadPoolExecutor(count)
        self.idle, self.processes = SimpleQueue(), []
        # ctrl-C is for the parent alone: the workers inherit that they ignore it.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        for _ in range(count):
            here, there = context.Pipe()
            self.processes.append(context.Process(target=serve, args=(there, ranks, column)))
            self.processes[-1].start()
            there.close()
            self.idle.put(here)
        signal.signal(signal.SIGINT, handler)

    def submit(self, batch: list[Record]) -> Future:
        """The result of encode, later; TextError if the worker has died."""
        return self.threads.submit(self.ask, batch)

    def ask(self, batch: list[Record]) -> tuple[np.ndarray, Counter]:
        worker = self.idle.get()
        try:
            worker.send(batch)
            return worker.recv()
        except (EOFError, ConnectionError):
            raise TextError(
                "a worker was killed, most likely for want of memory; run the same command with "
                "fewer --workers, it goes on where it stopped"
            ) from None
        finally:
            self.idle.put(worker)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes:
            process.terminate()  # nobody waits for what they are at
        self.threads.shutdown(cancel_futures=True)


def serve(pipe: Connection, ranks: dict[bytes, int], column: str) -> None:
    """A worker's life."""
    encoding = encoding_of(ranks)
    with suppress(EOFError, ConnectionError):  # the parent is gone
        while True:
            pipe.send(encode(pipe.recv(), column, encoding))


def encode(
    records: list[Record], column: str, encoding: tiktoken.Encoding
) -> tuple[np.ndarray, Counter]:
    """The tokens (N,) uint16 of a batch, each document behind START; how many were skipped, why."""
    parts, skipped = [np.empty(0, np.uint16)], Counter()
    for kind, data in records:
        try:
            text = text_of(kind, data, column)
        except ValueError as reason:
            skipped[str(reason)] += 1
            continue
        if kind != "more":
            parts.append(np.array([START], np.uint16))
        for piece in pieces([text]):  # START_TEXT in a document is ordinary text
            tokens = encoding.encode_to_numpy(piece, disallowed_special=())
            parts.append(tokens.astype(np.uint16))
    return np.concatenate(parts), skipped


def text_of(kind: str, data: str | bytes, column: str) -> str:
    """The text of a record; ValueError with the reason if it is to be skipped."""
    if kind == "skip":
        raise ValueError(data)
    try:
        if kind == "json" and data.strip():
            data = json.loads(data)[column]
            data.encode()  # a lone surrogate is no text
        text = data if isinstance(data, str) else data.decode()
    except UnicodeError:
        raise ValueError("not UTF-8") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"no JSON object with a text {column}") from None
    if not text:
        raise ValueError("empty")
    return text
