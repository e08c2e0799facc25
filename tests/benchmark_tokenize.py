#!/usr/bin/env python3
"""Compare tokenize_text.py with tiktoken alone, on the same text and as many processes, in turns.

    python -m tests.benchmark_tokenize english_train_000001.bin.xz --tokenizer_file gpt2.tiktoken

tiktoken alone: the documents lie in the memory of processes that have started already, and their
tokens are thrown away. tokenize_text.py: the whole command, from a .jsonl to shards and manifest.
"""

import argparse
import json
import lzma
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from data.gpt2 import START, encoding_of, gpt2_ranks
from referee.shards import HEADER_BYTES


def read_documents(paths: list[Path], encoding) -> list[str]:
    """Decode the whole documents of shards, packed with xz or not."""
    texts = []
    for path in paths:
        data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        tokens = np.frombuffer(data, "<u2", offset=HEADER_BYTES)
        parts = np.split(tokens, np.flatnonzero(tokens == START))[1:-1]
        texts += [encoding.decode(part[1:].tolist()) for part in parts]
    return texts


def encode_alone(encoding, texts: list[str], barrier) -> None:
    barrier.wait()
    for text in texts:
        encoding.encode_ordinary(text)


def tiktoken_seconds(encoding, texts: list[str], workers: int) -> float:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(workers + 1)
    processes = [
        context.Process(target=encode_alone, args=(encoding, texts[first::workers], barrier))
        for first in range(workers)
    ]
    for process in processes:
        process.start()
    barrier.wait()
    start = time.perf_counter()
    for process in processes:
        process.join()
    return time.perf_counter() - start


def command_seconds(corpus: Path, folder: Path, workers: int, tokenizer: Path | None) -> float:
    command = [sys.executable, ROOT / "data/tokenize_text.py", corpus, f"--out={folder}"]
    command += [f"--workers={workers}", *([f"--tokenizer_file={tokenizer}"] if tokenizer else [])]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards", nargs="+", type=Path, help="GPT-2 shards, .bin or .bin.xz")
    parser.add_argument("--tokenizer_file", type=Path, help="gpt2.tiktoken")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of both (default: %(default)s)")
    args = parser.parse_args()
    encoding = encoding_of(gpt2_ranks(args.tokenizer_file))
    texts = read_documents(args.shards, encoding)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{len(texts):,} documents, {megabytes:.1f} MB, {args.workers} processes")
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.jsonl"
        with corpus.open("w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        for number in range(args.rounds):
            alone = tiktoken_seconds(encoding, texts, args.workers)
            out = Path(folder) / str(number)
            command = command_seconds(corpus, out, args.workers, args.tokenizer_file)
            ratios.append(alone / command)
            print(
                f"tiktoken alone {megabytes / alone:.1f} MB/s  tokenize_text.py "
                f"{megabytes / command:.1f} MB/s  ratio {ratios[-1]:.3f}",
                flush=True,
            )
    print(f"median ratio {statistics.median(ratios):.3f} of {args.rounds} rounds")


if __name__ == "__main__":
    main()
