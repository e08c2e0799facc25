"""GPT-2's tokenizer, alone or in several processes."""

import base64
import re
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken_ext import openai_public

ROOT = Path(__file__).resolve().parent.parent
GPT2_FILE = ROOT / "data" / "gpt2.tiktoken"
START, START_TEXT = 50256, "<|endoftext|>"
WORKER = threading.local()  # .pipe: to the process that works for this thread

PIECE_CHARS = 1 << 18
# Exactly what tiktoken's regular expression takes for \s; Python's \s is wider.
BLANK = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
LAST_SAFE_CUT = re.compile(f"(?s:.+)(?=[{BLANK}][^{BLANK}])")


class TextError(OSError):
    """What is wrong with which input, and what to do about it, in words for a person."""


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
            f"(it is in the GitHub repository openai/whisper, folder whisper/assets) to {GPT2_FILE}"
        ) from None


def read_ranks(file: Path) -> dict[bytes, int]:
    """Read a file with a token in base64, a space and its rank in each line."""
    try:
        lines = [line.split() for line in file.read_bytes().splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        in_order = sorted(ranks.values()) == list(range(min(len(lines), START)))
        if not in_order or any(bytes([byte]) not in ranks for byte in range(256)):
            raise ValueError(f"its ranks are not 0, 1, 2 ... below {START}, or a byte has none")
    except ValueError as error:
        raise TextError(
            f"{file} is no tokenizer ({error}); give a file in the format of gpt2.tiktoken"
        ) from None
    return ranks


def encoding_of(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        "photofinish_gpt2",
        pat_str=openai_public.r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={START_TEXT: START},
    )


def pieces(chunks: Iterable[str]) -> Iterator[str]:
    """Cut a text, which comes in chunks, into pieces of at most PIECE_CHARS characters.

    The tokens of the pieces are those of the text: GPT-2's regular expression never matches across
    the place before a blank that something else follows. Only where a stretch of PIECE_CHARS has no
    such place it is cut anyhow; it decodes to the same text, but tiktoken would need memory and
    time for it that grow without bound, or fail.
    """
    rest = ""
    for chunk in chunks:
        rest, start = rest + chunk, 0
        while len(rest) - start > PIECE_CHARS:
            safe = LAST_SAFE_CUT.match(rest, start, start + PIECE_CHARS)
            end = safe.end() if safe else start + PIECE_CHARS
            yield rest[start:end]
            start = end
        rest = rest[start:]
    yield rest


# ------------------------------------------------------------------------------ Processes


def encode_all(
    batches: Iterable[list], ranks: dict[bytes, int], workers: int, ahead: int
) -> Iterator[tuple[list, list[np.ndarray]]]:
    """Yield each batch of pieces, in order, with the tokens (N,) uint16 of each piece's text.

    ahead: batches that are read before their turn. Raises TextError if a process was killed.
    """
    pending = deque()
    with ThreadPoolExecutor(workers) as threads:
        try:
            for batch in batches:
                texts = [piece.text for piece in batch]
                pending.append((batch, threads.submit(encode_elsewhere, texts, ranks)))
                while pending and (pending[0][1].done() or len(pending) > ahead):
                    batch, tokens = pending.popleft()
                    yield batch, tokens.result()
            for batch, tokens in pending:
                yield batch, tokens.result()
        finally:
            threads.shutdown(cancel_futures=True)


def encode_elsewhere(texts: list[str], ranks: dict[bytes, int]) -> list[np.ndarray]:
    """The tokens of each text, from a process that this thread alone has a pipe to.

    So when one side is killed the other meets the end of the pipe at once. The pools of the
    standard library can hang then, or leave their processes behind.
    """
    try:
        if not hasattr(WORKER, "pipe"):
            WORKER.pipe, there = Pipe()
            command = [sys.executable, "-c", f"import data.gpt2; data.gpt2.serve({there.fileno()})"]
            # In a process group of its own: ctrl-C is for the parent alone.
            subprocess.Popen(command, cwd=ROOT, pass_fds=[there.fileno()], process_group=0)
            there.close()
            WORKER.pipe.send(ranks)
        WORKER.pipe.send(texts)
        return WORKER.pipe.recv()
    except (EOFError, OSError):
        raise TextError(
            "a worker was killed, most likely for want of memory; run the same command with "
            "fewer --workers, it goes on where it stopped"
        ) from None


def serve(descriptor: int) -> None:
    """What such a process does, until the thread ends."""
    pipe = Connection(descriptor)
    with suppress(EOFError, ConnectionError):
        encoding = encoding_of(pipe.recv())
        while True:
            texts = pipe.recv()  # in which START_TEXT is ordinary text
            tokens = [encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]
            pipe.send([part.astype(np.uint16) for part in tokens])
