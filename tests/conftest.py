"""Small shards, small models, and the trainer as a process of its own."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "data"), str(ROOT / "records")]

from data.shards import write_shard  # noqa: E402
from records.harness import as_flag  # noqa: E402
from train_gpt import TRACKS  # noqa: E402

VOCAB, START = 64, 63
TINY = dict(
    vocab_size=VOCAB,
    document_start=START,
    val_tokens=2048,
    val_seq_len=64,
    target_val_loss=1.0,
    num_steps=20,
    batch_tokens=(512,),
    seq_len=64,
    val_every=10,
    layers="sL-S",
    num_heads=2,
    head_dim=16,
    model_dim=32,
    mlp_dim=64,
    num_value_embeds=1,
    bigram_rows=128,
    shift_taps=2,
    key_offset=True,
    head_gates=True,
    skip_from=1,
    skip_to=3,
    backout_layer=2,
    window_tokens=(16, 32, 48),
    lookahead=0.5,
    muon_decay=1.2,
    adam_decay=0.005,
    adam_every=2,
)


@pytest.fixture
def tiny_hp(shards):
    return dataclasses.replace(
        TRACKS["embedded"],
        **TINY,
        data_sha256="",
        train_files=str(shards / "train_*.bin"),
        val_files=str(shards / "val.bin"),
    )


def documents(seed: int, count: int) -> np.ndarray:
    """A stream of documents of 5 to 200 tokens, in which each token mostly sets the next."""
    rng, parts = np.random.default_rng(seed), []
    for _ in range(count):
        length, token, tokens = rng.integers(5, 200), rng.integers(START), [START]
        for _ in range(length):
            token = (5 * token + 3) % START if rng.random() < 0.9 else rng.integers(START)
            tokens.append(token)
        parts.append(np.array(tokens, np.uint16))
    return np.concatenate(parts)


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for i in range(3):
        write_shard(folder / f"train_{i}.bin", documents(i, 200))
    write_shard(folder / "val.bin", documents(99, 40))
    return folder


@pytest.fixture
def flags(shards, tmp_path) -> list[str]:
    """Flags of a tiny run, whose log goes to tmp_path."""
    tiny = [f"--{name}={as_flag(value)}" for name, value in TINY.items()]
    return [
        "--track=embedded",
        f"--train_files={shards}/train_*.bin",
        f"--val_files={shards}/val.bin",
        f"--log_dir={tmp_path}",
        "--compile=false",
        *tiny,
    ]


def clean_environment(**changes) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **changes}


def command(flags: list[str], ranks: int = 1) -> list[str]:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*launcher, str(ROOT / "train_gpt.py"), *flags]


def train(flags: list[str], ranks: int = 1, **changes) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(flags, ranks),
        env=clean_environment(**changes),
        capture_output=True,
        text=True,
        timeout=180,
    )


def losses(log: Path) -> dict[tuple[str, int], str]:
    """Loss as printed, by (kind, step)."""
    found = re.findall(r"^step:(\d+)/\d+ (train|val)_loss:(\S+)", run_section(log), re.M)
    return {(kind, int(step)): loss for step, kind, loss in found}


def run_section(log: Path) -> str:
    return log.read_text().rpartition("=== run ===\n")[2]


def only_log(folder: Path) -> Path:
    (log,) = folder.glob("*.txt")
    return log
