"""What every trainer does with its shards: check them, prefetch batches, cut validation rows.

hp is a trainer's dataclass of hyperparameters. Its globs may be relative to the project's folder.
"""

import hashlib
import queue
import threading
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.shards import ShardError, check_tokens, find_shards, open_shard

ROOT = Path(__file__).resolve().parent.parent


def project_shards(pattern: str) -> list[Path]:
    return find_shards(str(ROOT / pattern))


def check_shards(hp) -> list[str]:
    """Read every shard once; return the log's lines. Raises for anything that cannot train."""
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


class Prefetcher:
    """Runs a generator of tensor pairs in a thread, ahead of the step that needs them."""

    def __init__(self, pairs, rt, depth: int = 4):
        self.rt, self.ready = rt, queue.Queue(depth)
        threading.Thread(target=self.fill, args=(pairs,), daemon=True).start()

    def fill(self, pairs):
        try:
            for pair in pairs:
                self.ready.put([t.pin_memory() for t in pair] if self.rt.is_gpu else pair)
            self.ready.put(ShardError("the training shards ended early; run: ./run.sh again"))
        except Exception as error:
            self.ready.put(error)

    def __next__(self) -> list[Tensor]:
        if isinstance(item := self.ready.get(), Exception):
            raise item
        return [t.to(self.rt.device, non_blocking=True) for t in item]


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
