"""GPT-2's tokenizer, and its use on several threads."""

import base64
import hashlib
import re
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken_ext import openai_public

from referee.flags import RunError

GPT2_FILE = Path(__file__).resolve().parent / "gpt2.tiktoken"
START, START_TEXT = 50256, "<|endoftext|>"
BATCH_CHARS = 1 << 20  # of text that a thread encodes at once
BATCHES_AHEAD = 4  # per thread

PIECE_CHARS = 1 << 18
# Exactly what tiktoken's regular expression takes for \s; Python's \s is wider.
BLANK = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
LAST_SAFE_CUT = re.compile(f"(?s:.+)(?=[{BLANK}][^{BLANK}])")


def gpt2_ranks(file: Path | None) -> dict[bytes, int]:
    """The rank of each token of GPT-2, from a file or, if there is none, from the network."""
    if file or GPT2_FILE.exists():
        return read_ranks(file or GPT2_FILE)
    try:
        return openai_public.gpt2()["mergeable_ranks"]
    except (OSError, ValueError) as error:
        raise RunError(
            f"cannot download the GPT-2 tokenizer ({type(error).__name__}); bring gpt2.tiktoken "
            "(it is in the GitHub repository openai/whisper, folder whisper/assets) to "
            f"{GPT2_FILE}, or give your own: --tokenizer_file FILE"
        ) from None


def read_ranks(file: Path) -> dict[bytes, int]:
    """Read a file with a token in base64, a space and its rank in each line."""
    try:
        if not file.is_file():  # a device might never end
            raise ValueError("it is no file")
        lines = [line.split() for line in file.read_bytes().splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        in_order = sorted(ranks.values()) == list(range(min(len(lines), START)))
        if not in_order or any(bytes([byte]) not in ranks for byte in range(256)):
            raise ValueError(f"its ranks are not 0, 1, 2 ... below {START}, or a byte has none")
    except ValueError as error:
        raise RunError(
            f"{file} is no tokenizer ({error}); give a file in the format of gpt2.tiktoken"
        ) from None
    return ranks


def ranks_sha256(ranks: dict[bytes, int]) -> str:
    """What a manifest says of the tokenizer."""
    return hashlib.sha256(b" ".join(sorted(ranks, key=ranks.get))).hexdigest()


def encoding_of(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        "photofinish_gpt2",
        pat_str=openai_public.r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={START_TEXT: START},
    )


def pieces(chunks: Iterable[str]) -> Iterator[str]:
    """Cut a text, which comes in chunks, into pieces of at most PIECE_CHARS characters.

    The pieces have the same tokens as the whole text: GPT-2's regular expression never matches
    across the place before a blank that is followed by a non-blank, and the cuts lie there. A
    stretch of PIECE_CHARS without such a place is cut at its end: it decodes to the same text, and
    tiktoken, whose memory and time grow without bound on such a stretch, does not fail.
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


def encode_all(
    pieces: Iterable, encoding: tiktoken.Encoding, threads: int
) -> Iterator[tuple[object, np.ndarray]]:
    """Yield each piece, in order, with the tokens (N,) uint16 of its .text.

    Threads suffice: tiktoken releases the interpreter's lock while it encodes. Each takes a batch
    at once, and only so many batches are read ahead.
    """

    def encode(batch: list) -> list[tuple[object, np.ndarray]]:
        # START_TEXT in a text is ordinary text.
        tokens = [encoding.encode_to_numpy(piece.text, disallowed_special=()) for piece in batch]
        return [(piece, part.astype(np.uint16)) for piece, part in zip(batch, tokens, strict=True)]

    batch, chars, pending = [], 0, deque()
    with ThreadPoolExecutor(threads) as pool:
        for piece in pieces:
            batch.append(piece)
            chars += len(piece.text)
            if chars >= BATCH_CHARS:
                pending.append(pool.submit(encode, batch))
                batch, chars = [], 0
            if len(pending) > BATCHES_AHEAD * threads:
                yield from pending.popleft().result()
        for encoded in pending:
            yield from encoded.result()
    yield from encode(batch)
