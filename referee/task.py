"""What a run is measured by: its data, its validation rows, its target loss. No torch here."""

import dataclasses
import glob
import hashlib
import json
import os
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from referee.flags import RunError, check_ranges, option
from referee.shards import ShardError, check_tokens, find_shards, open_shard
from referee.sources import ROOT

DATA = ROOT / "data"
DATA_FIELDS = ("train_files", "val_files", "data_sha256")


@dataclass(frozen=True)
class Task:
    """A track's data, validation rows and target: the same for every trainer."""

    # Globs are relative to the project's folder; those in flags are relative to the caller's.
    train_files: str = option("data/fineweb10B/fineweb_train_*.bin", "glob of training shards")
    val_files: str = option("data/fineweb10B/fineweb_val_*.bin", "glob of validation shards")
    data_sha256: str = option("", "expected hash over all shards; empty: none is known")
    vocab_size: int = option(50257, "token ids in the shards are below it", 2)
    document_start: int = option(50256, "token that opens every document")
    val_tokens: int = option(10_485_760, "validation targets", 1)
    val_seq_len: int = option(131_072, "tokens per validation row", 2)
    val_spread: bool = option(False, "spread validation rows evenly instead of taking the first")
    target_val_loss: float = option(3.28, "nats per token")

    def __post_init__(self):
        check_ranges(self)
        if not (self.train_files and self.val_files):
            raise RunError("--train_files and --val_files must name shards; leave them out for the "
                           "track's own")  # fmt: skip
        if self.document_start >= self.vocab_size:
            raise RunError(f"--document_start {self.document_start} is not below --vocab_size "
                           f"{self.vocab_size}")  # fmt: skip
        if self.val_tokens % self.val_seq_len:
            raise RunError(f"--val_tokens {self.val_tokens} is not a multiple of --val_seq_len "
                           f"{self.val_seq_len}")  # fmt: skip

    def batch_rows(self, most: int, ranks: int) -> int:
        """The largest number of rows, at most `most` but at least 1, that divides a rank's."""
        share = self.val_tokens // self.val_seq_len // ranks
        return max(n for n in range(1, max(most, 1) + 1) if share % n == 0)


EMBEDDED = Task(
    train_files="data/embedded/embedded_train.bin",
    val_files="data/embedded/embedded_val.bin",
    data_sha256="46ee993abd300d89907f21f46b034c6dad65e35e87b50afcdc9668e0617695f9",
    vocab_size=257,
    document_start=256,
    val_tokens=262_144,
    val_seq_len=1024,
    val_spread=True,
    target_val_loss=1.01,
)
TASKS = {
    "embedded": EMBEDDED,
    "embedded_1.34": dataclasses.replace(EMBEDDED, target_val_loss=1.34),
    "fineweb": Task(),
    "fineweb_8min": Task(target_val_loss=3.40),  # some eight minutes on one H100, by estimate
    "fineweb_medium": Task(target_val_loss=2.92),
    "wikitext103": Task(
        train_files="data/wikitext103/wikitext103_train_*.bin",
        val_files="data/wikitext103/wikitext103_val_*.bin",
        val_tokens=245_760,
        val_seq_len=8192,
        target_val_loss=3.8,
    ),
}


HOW_TO_GET = {  # the shards of each folder of data/ that a track reads
    "embedded": "run: ./run.sh data/embedded.py",
    "fineweb10B": "run: ./run.sh data/cached_fineweb10B.py {count}",
    "wikitext103": "delete manifest.json and *.bin in {folder}, then run: "
                   "./run.sh data/tokenize_text.py --preset wikitext103",
}  # fmt: skip


@contextmanager
def track_advice(path: str | Path):
    """Let a ShardError about a track's own shards name the command that gets them."""
    try:
        yield
    except ShardError as error:
        folder, number = Path(path).parent, Path(path).stem.rpartition("_")[2]
        of_track = str(folder.parent) in (str(DATA), glob.escape(str(DATA)))
        count = max(9, int(number)) if number.isdecimal() else 9
        command = HOW_TO_GET.get(folder.name, "").format(folder=folder, count=count)
        raise ShardError(error.problem, of_track and command or error.advice) from None


def task_shards(pattern: str) -> list[Path]:
    """Sorted paths of a task's shards; ShardError if there are none."""
    pattern = os.path.join(glob.escape(str(ROOT)), pattern)
    with track_advice(pattern):
        return find_shards(pattern)


def check_shards(task: Task) -> tuple[str, list[str]]:
    """Read every shard once; return (hash over all of them, the log's lines).

    ShardError for anything that cannot train.
    """
    lines, digests, trained = [], [], set()
    for kind, pattern in (("train", task.train_files), ("val", task.val_files)):
        for path in task_shards(pattern):
            with track_advice(path):
                tokens, digest = check_tokens(path, task.vocab_size)
            lines.append(f"{kind}_shard: {path.name} tokens:{len(tokens)} sha256:{digest}")
            if kind == "train":
                trained.add(digest)
            elif digest in trained:
                raise ShardError(f"{path} is a training shard too", "change --train_files")
            digests.append(digest)
    found = hashlib.sha256(" ".join(digests).encode()).hexdigest()
    verdict = "as expected" if found == task.data_sha256 else "DIFFERENT: losses are not comparable"
    verdict = verdict if task.data_sha256 else "none expected"
    return found, [*lines, f"data_sha256: {found} ({verdict})"]


def tokenizer_sha256(task: Task) -> str:
    """The tokenizer that made the training shards, as the manifest beside them says; or empty."""
    with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        manifest = task_shards(task.train_files)[0].with_name("manifest.json")
        return str(json.loads(manifest.read_text(encoding="utf-8"))["options"]["tokenizer_sha256"])
    return ""


def validation_rows(task: Task, ranks: int = 1) -> np.ndarray:
    """All validation rows, (rows, val_seq_len + 1) uint16.

    ShardError where the shards do not hold them, or so many ranks cannot share them equally.
    """
    tokens = np.concatenate([open_shard(path) for path in task_shards(task.val_files)])
    count, last = task.val_tokens // task.val_seq_len, len(tokens) - task.val_seq_len - 1
    if (count - 1) * task.val_seq_len > last or count % ranks:
        raise ShardError(
            f"{task.val_files} holds {len(tokens)} tokens, from which {count} validation rows "
            f"of {task.val_seq_len + 1} cannot be dealt to {ranks} ranks equally",
            "get the whole validation shard, or change --val_tokens or --nproc_per_node",
        )
    starts = np.arange(count) * task.val_seq_len
    if task.val_spread:
        starts = np.arange(count) * last // max(count - 1, 1)
    return np.stack([tokens[s : s + task.val_seq_len + 1] for s in starts])
