#!/usr/bin/env python3
"""Train the fineweb track at an eighth of its size, on a CPU in minutes; compare two sources.

    proxy.py . -n 4                                    this checkout with seeds 0 to 3
    proxy.py ../main . -n 2 --steps 1500 --out FOLDER  two sources, the same rows for both

A source is a checkout, a log or an attempt's folder; the tool scales its own fineweb settings. Rows
are documents of the training shards, in random order by seed, with tokens mapped to 2,048 ids. Each
run has one thread, and --jobs run side by side. With --out a repeated command makes only the runs
that are missing. docs/public_record.md says what the losses can tell, and how noisy they are.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project's root
    from referee.start import finish

import argparse
import json
import os
import shutil
import subprocess
from itertools import chain, product

import numpy as np

from referee.flags import as_flag
from referee.shards import absolute_glob, find_shards, open_shard, write_shard
from tools import attempts, stats
from tools.attempts import Attempt, scratch_folder
from tools.cli import ToolError, flag_parser
from tools.runs import flag_pairs, read_log
from tools.sources import ROOT

FRACTION = 8  # windows are so much shorter
VOCAB, OWN_IDS, ROW, VAL_ROWS = 2048, 2000, 256, 256
START = VOCAB - 1  # opens a document; rare tokens share the ids from OWN_IDS to here
SETTINGS = {  # replace those of the source
    "task": "fineweb", "vocab_size": VOCAB, "document_start": START, "val_seq_len": ROW,
    "val_tokens": VAL_ROWS * ROW, "val_spread": True, "fp32": True, "compile": False,
    "seq_len": ROW, "document_cap": (112, ROW, ROW), "max_epochs": 9, "num_heads": 2,
    "model_dim": 64, "bigram_rows": 5 * VOCAB,
}  # fmt: skip
WIDTHS = {"head_dim": 32, "mlp_dim": 256}  # of older sources, in which they were settings
ASK = "import json, train_gpt; print(json.dumps(vars(train_gpt.TRACKS['fineweb'])))"


def fold(tokens: np.ndarray, counts: np.ndarray, document_start: int) -> np.ndarray:
    """Ids below VOCAB, uint16: frequent tokens keep one of their own, by rank."""
    counts = counts.copy()
    counts[document_start] = 0
    to = OWN_IDS + (np.arange(len(counts)) * 2654435761 % 2**32 >> 7) % (START - OWN_IDS)
    to[np.argsort(-counts, kind="stable")[:OWN_IDS]] = np.arange(OWN_IDS)
    to[document_start] = START
    return to.astype(np.uint16)[tokens]


def prepare(args, folder: Path) -> None:
    """Write val.bin, and a training shard for each seed with its order of documents."""
    train = np.concatenate([open_shard(path) for path in find_shards(args.train_files)[:2]])
    val = open_shard(find_shards(args.val_files)[0])
    counts = np.bincount(train, minlength=1 << 16)  # of all ids that shards can hold
    train, val = (fold(tokens, counts, args.document_start) for tokens in (train, val))
    if len(val) < VAL_ROWS * ROW + 2:
        raise ToolError(f"{args.val_files} holds {len(val)} tokens, fewer than {VAL_ROWS} rows")
    # The referee spreads its rows over the shard, so cut it to start them at multiples of stride.
    stride = (len(val) - ROW - 2) // VAL_ROWS
    write_shard(folder / "val.bin", val[: (VAL_ROWS - 1) * stride + ROW + 1])
    starts = np.flatnonzero(train[:-1] == START)
    if not len(starts):
        raise ToolError(f"{args.train_files} holds no token {args.document_start}, which opens a "
                        "document; give the one of these shards: --document_start")  # fmt: skip
    lengths = np.diff(starts, append=len(train) - 1).clip(max=ROW + 1)  # no run reads further
    for seed in range(args.n):
        order = np.random.default_rng(seed).permutation(len(starts))
        parts = [train[starts[i] : starts[i] + lengths[i]] for i in order]
        write_shard(folder / f"train_{seed}.bin", np.concatenate([*parts, [START]]))


def scaled(own: dict, steps: int) -> dict:
    """The flags that make a source's fineweb an eighth; its schedules in proportion to steps."""
    found = SETTINGS | {name: WIDTHS[name] for name in own.keys() & WIDTHS}
    long_run = own["num_steps"]
    rows = (4, 8, 12) if steps >= 300 else (2, 4, 6)
    found |= {"num_steps": steps, "val_every": steps // 4}
    found["batch_tokens"] = tuple(ROW * n for n in rows)
    for name in own.keys() & {"window_tokens", "short_window_tokens"}:
        found[name] = tuple(tokens // FRACTION for tokens in own[name])
    found["val_window_tokens"] = own["val_window_tokens"] // FRACTION
    for name in own.keys() & {"momentum_warmup", "momentum_cooldown", "momentum_steps",
                              "extension_steps"}:  # fmt: skip
        counts = np.round(np.array(own[name]) * steps / long_run).astype(int)
        found[name] = counts.tolist()
    return found


def settings_of(attempt: Attempt) -> dict:
    """The hyperparameters of a source's fineweb track."""
    with attempts.staged(attempt.texts) as scratch:
        asked = subprocess.run([sys.executable, "-c", ASK], cwd=scratch, text=True,
                               capture_output=True)  # fmt: skip
    if asked.returncode:
        raise ToolError(f"{attempt.name} has no fineweb track: {asked.stderr.splitlines()[-1]}")
    return json.loads(asked.stdout)


def kept_curves(attempt: Attempt) -> dict[int, list[float]]:
    """Losses after each quarter, by seed, of an attempt's logs; ToolError if it has other flags."""
    runs = [read_log(path) for path in attempt.log_paths]
    for run in runs:
        # Without the rows' two flags and their values.
        if run.shared_flags[:-4] != attempt.flags:
            raise ToolError(f"{run.path} had other flags; name a new folder")
    return {int(run.seed): [loss for _, _, loss in run.val_curve[1:]] for run in runs}


def train_side_by_side(jobs: list[tuple[Attempt, int]], data: Path) -> None:
    """Run attempts with seeds, each in a scratch folder; keep and print the finished runs."""
    alone = []
    for attempt, seed in jobs:
        flags = [f"--train_files={data}/train_{seed}.bin", f"--val_files={data}/val.bin"]
        folder = data / f"{attempt.folder.name}{seed}"
        alone.append(Attempt(attempt.name, folder, attempt.texts, [*attempt.flags, *flags]))
        alone[-1].freeze()
    seeds = [seed for _, seed in jobs]
    try:
        group = attempts.run_group(list(zip(alone, seeds, strict=True)), 0)
    finally:
        if not (data / "val.bin").exists():
            raise ToolError(f"{data}, which held the rows of these runs, has vanished; run the "
                            "same command again")  # fmt: skip
    for ended in sorted(group, key=lambda ended: (ended.code != 0, ended.seed)):
        attempt, seed = jobs[alone.index(ended.attempt)]
        if ended.code or len(ended.run.val_curve) < 5:
            raise ToolError(f"{attempt.name} seed {seed} did not finish: {ended.last_words}")
        shutil.move(ended.run.path, attempt.logs)
        losses = "  ".join(f"{loss:.4f}" for loss in kept_curves(attempt)[seed])
        print(f"{attempt.name} seed {seed}: {losses}", flush=True)


def print_summary(names: list[str], finals: np.ndarray) -> None:
    """finals: the last losses, (sources, seeds)."""
    for name, found in zip(names, finals, strict=True):
        print(f"{name}: mean {found.mean():.4f}, sd {stats.sd(found):.4f}, n={len(found)}")
    if len(finals) == 2:
        change = stats.absolute(*finals, paired=True)
        print(f"B - A, in pairs: {change.change:+.4f}, 95% CI [{change.low:+.4f}, "
              f"{change.high:+.4f}], p={change.p:.2g}")  # fmt: skip


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = flag_parser(__doc__, "%(prog)s SOURCE [SOURCE] [-n N] [--FLAG VALUE of the trainer]")
    add = parser.add_argument
    add("sources", nargs="+", type=Path, metavar="SOURCE", help="checkout, log or attempt")
    add("-n", type=int, default=4, help="seeds, from 0 (default: %(default)s)")
    add("--steps", type=int, default=300, help="optimizer steps; below 300 with half the batch "
        "(default: %(default)s)")  # fmt: skip
    add("--train_files", default=str(ROOT / "data/fineweb10B/fineweb_train_*.bin"), help="training "
        "shards, of which the first two are read (default: FineWeb's)")  # fmt: skip
    add("--val_files", default=str(ROOT / "data/fineweb10B/fineweb_val_*.bin"))
    add("--document_start", type=int, default=50256, help="token that opens a document")
    add("--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: %(default)s)")
    add("--out", type=Path, metavar="FOLDER", help="keep sources and logs in FOLDER/A and FOLDER/B "
        "(default: discard them)")  # fmt: skip
    args, flags = parser.parse_known_args()
    if not 1 <= len(args.sources) <= 2 or min(args.n, args.jobs) < 1 or args.steps < 40:
        parser.error("one or two sources, -n and --jobs of at least 1, --steps of at least 40")
    if not 0 <= args.document_start < 1 << 16:
        parser.error("--document_start must be 0 to 65535")
    args.train_files, args.val_files = map(absolute_glob, (args.train_files, args.val_files))
    return args, flags


def main() -> int:
    args, flags = parse()
    attempts.require_own_flags(flags)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with scratch_folder() as data:
        arms = []
        prepare(args, data)
        for i, origin in enumerate(args.sources):
            attempt = attempts.copy_of(origin, (args.out or data) / chr(ord("A") + i), [])
            chosen = scaled(settings_of(attempt), args.steps)
            own = [f"--{name}={as_flag(value)}" for name, value in chosen.items()]
            attempt.flags = list(chain(*flag_pairs(["--track=fineweb", *own, *flags])))
            attempt.freeze()
            arms.append(attempt)
        seeds = product(range(args.n), arms)
        todo = [(attempt, seed) for seed, attempt in seeds if seed not in kept_curves(attempt)]
        for first in range(0, len(todo), args.jobs):
            train_side_by_side(todo[first : first + args.jobs], data)
        curves = [kept_curves(attempt) for attempt in arms]
    finals = [[found[seed][-1] for seed in range(args.n)] for found in curves]
    print_summary([attempt.name for attempt in arms], np.array(finals))
    return 0


if __name__ == "__main__":
    finish(main)
