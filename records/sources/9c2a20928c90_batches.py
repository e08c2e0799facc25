"""From shards to batches: which tokens a step sees, and which a validation.

A trainer's shards are checked whole, its training rows packed from their documents in an order that
depends on the seed alone, dealt to the ranks and prefetched by a thread. hp is the trainer's
dataclass of hyperparameters, rt its Runtime. Its globs may be relative to the project's folder.
"""

import hashlib
import math
import queue
import threading
from bisect import bisect_left
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.shards import ShardError, check_tokens, find_shards, open_shard

ROOT = Path(__file__).resolve().parent.parent


def project_shards(pattern: str) -> list[Path]:
    return find_shards(str(ROOT / pattern))


def check_shards(hp) -> list[str]:
    """Read every shard once; return the log's lines. ShardError for anything that cannot train."""
    lines, whole = [], []
    for kind, pattern in (("train", hp.train_files), ("val", hp.val_files)):
        for path in project_shards(pattern):
            tokens, digest = check_tokens(path, hp.vocab_size)
            lines.append(f"{kind}_shard: {path.name} tokens:{len(tokens)} sha256:{digest}")
            whole.append(digest)
    found = hashlib.sha256(" ".join(whole).encode()).hexdigest()
    verdict = "as expected" if found == hp.data_sha256 else "DIFFERENT: losses are not comparable"
    return [*lines, f"data_sha256: {found} ({verdict if hp.data_sha256 else 'none expected'})"]


def inputs_and_targets(rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Rows of T + 1 tokens as int64 inputs and targets (B, T)."""
    block = torch.from_numpy(rows.astype(np.int64))
    return block[:, :-1].contiguous(), block[:, 1:].contiguous()


# ------------------------------------------------------------------------------ Training


def documents(tokens: np.ndarray, hp) -> tuple[np.ndarray, np.ndarray]:
    """Where a shard's documents begin, and their lengths; the last token is a target only."""
    starts = np.flatnonzero(tokens[:-1] == hp.document_start)
    return starts, np.diff(starts, append=len(tokens) - 1)


def whole_rows(tokens: np.ndarray, hp) -> tuple[np.ndarray, np.ndarray]:
    """Where a shard's training rows begin if documents have no cap, and their one length.

    A row begins at a document's start, or where the row before it ended if that document runs on
    for a whole further row. Between rows only the end of a cut document is left out.
    """
    begins = documents(tokens, hp)[0].tolist()
    starts, position = [], begins[0] if begins else 0
    while position + hp.seq_len < len(tokens):
        starts.append(position)
        position += hp.seq_len
        following = bisect_left(begins, position)
        if following < len(begins) and begins[following] < position + hp.seq_len:
            position = begins[following]
    return np.array(starts, np.int64), np.full(len(starts), hp.seq_len)


def pieces(hp, seed: int):
    """Yield (shard's tokens, start, length) of what rows are made of, shuffled in each shard."""
    cut = documents if max(hp.document_cap) else whole_rows
    for epoch in range(hp.max_epochs):
        for index, path in enumerate(project_shards(hp.train_files)):
            tokens = open_shard(path)
            starts, lengths = cut(tokens, hp)
            order = np.random.default_rng((seed, epoch, index)).permutation(len(starts))
            yield from zip(repeat(tokens), starts[order], lengths[order], strict=False)


def packed_row(stream, hp, cap: int) -> list[tuple[np.ndarray, int, int]]:
    """Pieces of at most cap tokens that fill one row; what the cap or the row cuts off is lost."""
    row, room = [], hp.seq_len
    while room:
        if (piece := next(stream, None)) is None:
            raise ShardError("the training shards ended early; run: ./run.sh again")
        tokens, start, length = piece
        length = min(length, cap or length, room)
        row.append((tokens, start, length))
        room -= length
    return row


def gathered(row: list, ahead: int) -> np.ndarray:
    """The tokens of a row's pieces, or with ahead = 1 those that follow them; int64 (seq_len,)."""
    parts = [tokens[s + ahead : s + ahead + length] for tokens, s, length in row]
    return np.concatenate(parts).astype(np.int64)


def micro_batches(hp, rt, micro_seqs: int, seed: int, first_step: int):
    """Yield this rank's (inputs, targets), int64 (micro_seqs, seq_len), from first_step on.

    A step's rows are dealt to accumulation x ranks equal micro-batches: its global batch is the
    same for any number of ranks.
    """
    stream = pieces(hp, seed)
    for step in range(hp.num_steps):
        cap, count = hp.at(hp.document_cap, step), hp.at(hp.batch_tokens, step) // hp.seq_len
        rows = [packed_row(stream, hp, cap) for _ in range(count)]
        if step < first_step:
            continue
        for at in range(rt.rank * micro_seqs, count, rt.world_size * micro_seqs):
            chosen = rows[at : at + micro_seqs]
            yield tuple(
                torch.from_numpy(np.stack([gathered(row, ahead) for row in chosen]))
                for ahead in (0, 1)
            )


def check_supply(hp) -> None:
    """ShardError unless the training shards surely hold every row of every step."""
    needed = sum(hp.at(hp.batch_tokens, step) for step in range(hp.num_steps)) // hp.seq_len
    cap, rows = min(hp.document_cap), 0
    for path in project_shards(hp.train_files):
        if rows < needed and cap:  # a row leaves at most the rest of one capped document behind
            kept = documents(open_shard(path), hp)[1].clip(max=cap).sum()
            rows += hp.max_epochs * int(kept) // (hp.seq_len + cap)
        elif rows < needed:
            rows += hp.max_epochs * len(whole_rows(open_shard(path), hp)[0])
    if rows < needed:
        raise ShardError(
            f"{hp.train_files} holds {rows} rows of {hp.seq_len} tokens in {hp.max_epochs} passes, "
            f"{hp.num_steps} steps need {needed}",
            "get more shards, or lower --num_steps",
        )


def micro_batch_rows(hp, rt, asked: int, fixed_bytes: float, bytes_per_token: float) -> int:
    """Rows a forward pass: what was asked for, or the most that divides and fits in memory."""
    rows = math.gcd(*hp.batch_tokens) // hp.seq_len
    share = rows // rt.world_size
    if rows % rt.world_size or asked and share % asked:
        raise ShardError(
            f"{rows} rows a step cannot be dealt to {rt.world_size} ranks in equal forward passes "
            f"of {asked or 1}",
            "change --nproc_per_node or --micro_batch_seqs",
        )
    fits = (0.9 * rt.memory_bytes - fixed_bytes) / (hp.seq_len * bytes_per_token)
    most = max(n for n in range(1, share + 1) if share % n == 0 and (n <= fits or n == 1))
    return asked or most


def visible_keys(rows: Tensor, document_start: int, window: int) -> float:
    """Mean number of keys that a query of these rows (B, T) sees through a window."""
    index = torch.arange(rows.size(1)).expand_as(rows)
    opened = torch.where(rows == document_start, index, 0).cummax(1).values
    return (index - opened + 1).clamp(max=window).float().mean().item()


class Prefetcher:
    """Runs a generator of tensor pairs in a thread, ahead of the step that needs them."""

    def __init__(self, pairs, rt, depth: int = 4):
        self.rt, self.ready = rt, queue.Queue(depth)
        threading.Thread(target=self.fill, args=(pairs,), daemon=True).start()

    def fill(self, pairs):
        try:
            for pair in pairs:
                self.ready.put([t.pin_memory() for t in pair] if self.rt.is_gpu else pair)
        except Exception as error:
            self.ready.put(error)

    def __next__(self) -> list[Tensor]:
        if isinstance(item := self.ready.get(), Exception):
            raise item
        return [t.to(self.rt.device, non_blocking=True) for t in item]


# ------------------------------------------------------------------------------ Validation


def validation_batches(hp, rt, most_seqs: int) -> list[tuple[Tensor, Tensor]]:
    """This rank's share of the fixed validation rows, as (inputs, targets) on the host.

    most_seqs: rows that a batch may have.
    """
    tokens = np.concatenate([open_shard(path) for path in project_shards(hp.val_files)])
    count, last = hp.val_tokens // hp.val_seq_len, len(tokens) - hp.val_seq_len - 1
    if (count - 1) * hp.val_seq_len > last or count % rt.world_size:
        raise ShardError(
            f"{hp.val_files} holds {len(tokens)} tokens, from which {count} validation rows of "
            f"{hp.val_seq_len + 1} cannot be dealt to {rt.world_size} ranks equally",
            "get the whole validation shard, or change --val_tokens or --nproc_per_node",
        )
    starts = np.arange(count) * hp.val_seq_len
    if hp.val_spread:
        starts = np.arange(count) * last // max(count - 1, 1)
    starts = starts[rt.rank :: rt.world_size]
    batch_seqs = max(n for n in range(1, most_seqs + 1) if len(starts) % n == 0)
    rows = np.stack([tokens[s : s + hp.val_seq_len + 1] for s in starts])
    return [inputs_and_targets(part) for part in np.split(rows, len(rows) // batch_seqs)]
