#!/usr/bin/env python3
"""Run a log's own source again, with its flags and seed; or interleave it with another.

    replay.py LOG                       once, with the seed of LOG: are the losses the same?
    replay.py B --against A -n 5        A B B A ..., n runs each, then the diff of the two

A and B are logs, attempts' folders, or checkouts (`.` for this one).
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import bootstrap  # noqa: F401
from tqdm import tqdm

from tools.attempts import (
    TURNS_HELP,
    Attempt,
    carry_out,
    check_turns,
    flags_of,
    interleaved,
    read_origin,
    start,
)
from tools.cli import EXIT_MISUSE, ToolError, finish
from tools.comparison import Arm, compare
from tools.diff import text_report
from tools.runs import Run, read_arm


def attempt_like(origin: Path, folder: Path, flags: list[str]) -> tuple[Attempt, Run | None]:
    """An attempt in a new folder that repeats origin, and a run of origin, if it has one."""
    texts, run = read_origin(origin)
    given = [*flags_of(run), *flags] if run else flags
    processes = int(run.environment.get("world_size", 1)) if run else 1
    attempt = Attempt(folder, tuple(given), processes)
    attempt.freeze(texts)
    attempt.logs.mkdir()
    return attempt, run


def finished_run(attempt: Attempt, seed: int) -> Run:
    """A run that counts in no comparison; ToolError if it does not finish."""
    (ended,) = start([(attempt, seed)], 0)
    run = ended.run
    if not run.finished:
        raise ToolError(f"the run {ended.log} did not finish: {ended.last_words}")
    return run


def same_losses(old: Run, new: Run) -> int:
    """Print whether every loss of two runs agrees digit for digit; return the exit code."""
    pairs = [(kind, step, x, y) for kind in ("train_curve", "val_curve")
             for (step, _, x), (_, _, y) in zip(getattr(old, kind), getattr(new, kind),
                                                strict=False)]  # fmt: skip
    apart = [(kind.partition("_")[0], step, x, y) for kind, step, x, y in pairs if x != y]
    print(f"seed {old.seed}, {old.steps} steps: val_loss {old.val_loss:.6f} -> {new.val_loss:.6f}, "
          f"train_time {old.train_s:.2f} -> {new.train_s:.2f} s")  # fmt: skip
    if not apart and old.steps == new.steps:
        print(f"REPRODUCED  all {len(pairs)} losses are the same, digit for digit")
        return 0
    if apart:
        kind, step, x, y = apart[0]
        print(f"DIFFERENT   {len(apart)} of {len(pairs)} losses, first {kind} at step {step}: "
              f"{x} -> {y}, largest {max(abs(x - y) for *_, x, y in apart):.6f}")  # fmt: skip
    for key in ("torch", "cpu", "device", "matmul_dtype", "threads"):
        before, now = old.environment.get(key), new.environment.get(key)
        if before != now:
            print(f"  {key}: {before} -> {now}, which may be why")
    return 1


def replay_one(origin: Path, out: Path, flags: list[str]) -> int:
    if origin.is_dir():
        raise ToolError(f"{origin} is no log; name one, or give --against and -n")
    attempt, old = attempt_like(origin, out / "replay", flags)
    return same_losses(old, finished_run(attempt, int(old.seed)))


def replay_against(
    b: Path, a: Path, count: int, turn_steps: int, out: Path, flags: list[str]
) -> int:
    """Interleave count runs of each after one burn-in run each, which is discarded."""
    pair = [attempt_like(x, out / letter, flags)[0] for x, letter in ((a, "A"), (b, "B"))]
    if turn_steps and any(attempt.processes > 1 for attempt in pair):
        raise ToolError("--turns is for runs of one process; leave it out")
    check_turns(pair, turn_steps)
    for attempt in tqdm(pair, desc="burn-in", unit="run", disable=not sys.stderr.isatty()):
        finished_run(attempt, 0).path.unlink()
    todo = [(pair[i], seed) for i, seed in interleaved(2, count)]
    runs = carry_out(todo, count, turn_steps)
    for ended in tqdm(runs, total=len(todo), unit="run", disable=not sys.stderr.isatty()):
        if not ended.run.finished:
            tqdm.write(f"{ended.attempt.name} seed {ended.seed} did not finish, and counts: "
                       f"{ended.last_words}")  # fmt: skip
    comparison = compare(*(Arm(origin.resolve().stem, read_arm(attempt.folder))
                           for origin, attempt in zip((a, b), pair, strict=True)))  # fmt: skip
    print(text_report(comparison))
    return comparison.exit_code


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("b", type=Path, metavar="B", help="a log; with --against also a folder")
    parser.add_argument("--against", type=Path, metavar="A", help="what to interleave it with")
    parser.add_argument("-n", type=int, default=10, help="runs each with --against (default: 10)")
    parser.add_argument("--out", type=Path, help="keep sources and logs here (default: discard)")
    parser.add_argument("--turns", type=int, default=0, metavar="STEPS", help=TURNS_HELP)
    args, flags = parser.parse_known_args()
    if args.n < 1 or args.turns < 0:
        parser.error("-n must be at least 1, --turns at least 0")
    if args.turns and not args.against:
        parser.error("--turns needs --against")
    if args.out and args.out.exists() and (args.out.is_file() or any(args.out.iterdir())):
        parser.error(f"--out {args.out} is a file, or not empty")
    out = args.out or Path(tempfile.mkdtemp(prefix="photofinish_replay_"))
    try:
        if args.against is None:
            return replay_one(args.b, out, flags)
        return replay_against(args.b, args.against, args.n, args.turns, out, flags)
    finally:
        if not args.out:
            shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    finish(main, failed=EXIT_MISUSE)  # 1 is a regression, or a loss that differs
