#!/usr/bin/env python3
"""Run an attempt with n seeds, several attempts interleaved, and test the target.

An attempt is a folder such as records/embedded/2026-11-30_MyIdea. The first call freezes the
trainer's source in it; runs then start from there. Calling it again goes on with the next seeds,
up to n. Crashed and aborted runs keep their logs, and count. On a host whose speed wanders, --turns
lets the two runs of a pair advance side by side, one of them at a time.
"""

import argparse
import sys
from pathlib import Path

import bootstrap  # noqa: F401
from tqdm import tqdm

from tools import stats
from tools.attempts import (
    ENTRIES,
    ROOT,
    TURNS_HELP,
    Attempt,
    carry_out,
    check_turns,
    interleaved,
    source_texts,
)
from tools.cli import ToolError, finish
from tools.comparison import Arm
from tools.runs import find_logs


def attempts(paths: list[Path], flags: list[str], processes: int, entry: str) -> list[Attempt]:
    """The attempts to run; a new one gets this checkout's source of the trainer entry."""
    if len({path.resolve() for path in paths}) < len(paths):
        raise ToolError("an attempt is named twice; name each folder once")
    found = [Attempt(path, tuple(flags), processes) for path in paths]
    for attempt in found:
        if attempt.folder.is_file():
            raise ToolError(f"{attempt.folder} is a file; name a folder")
        if not attempt.entry:
            if attempt.folder.is_dir() and find_logs([attempt.folder]):
                raise ToolError(f"{attempt.folder} has logs but no source/; name a new folder")
            attempt.freeze(source_texts(ROOT, entry))
        attempt.logs.mkdir(parents=True, exist_ok=True)
    return found


def run_all(attempts: list[Attempt], count: int, turn_steps: int) -> None:
    """Run every attempt until it has count logs, interleaved; a failed run is told and counted."""
    check_turns(attempts, turn_steps)
    have = [len(find_logs([attempt.folder])) for attempt in attempts]
    todo = [(attempts[i], seed) for i, seed in interleaved(len(attempts), count) if seed >= have[i]]
    with tqdm(total=len(todo), unit="run", disable=not sys.stderr.isatty()) as bar:
        for ended in carry_out(todo, count, turn_steps):
            bar.update()
            run = ended.run
            result = ended.output.strip().splitlines()[-1:] or [""]
            name = f"{ended.attempt.name} seed {ended.seed}"
            tqdm.write(f"{name}: {result[0].partition(' time_to_target')[0]}")
            if ended.code:
                tqdm.write(f"  exit code {ended.code}: {ended.last_words}")
            if not run.val_curve:
                raise ToolError(f"{ended.log} ended before its first validation, as every run "
                                f"would: {ended.last_words}")  # fmt: skip


def summary(arm: Arm) -> str:
    """The loss and time of all runs of an attempt, and its test of the target."""
    (status, p), n, name = arm.target_status(), len(arm.runs), arm.name
    if not arm.finished:
        return f"{name}: none of {n} runs finished"
    words = {"PASS": "reached", "FAIL": "not reached", "open": "not shown to be reached"}
    text = (
        f"{name}: n={n} val_loss {arm.losses.mean():.5f} (sd {stats.sd(arm.losses):.5f}) "
        f"train_time {arm.times.mean():.2f} s (sd {stats.sd(arm.times):.2f})    "
    )
    if arm.unfinished:
        text += f"{sum(arm.unfinished.values())} of {n} runs did not finish, and count; "
    if not arm.declared and n not in stats.LOOKS:
        looks = ", ".join(map(str, stats.LOOKS))
        return f"{text}target: n was not declared, so a look is allowed at {looks} runs only"
    return f"{text}target {arm.target:g} {words[status]}: p={p:.2g}, needed < {arm.level}"


def main() -> int:
    usage = "%(prog)s [-n N] [--nproc_per_node K] ATTEMPT... [--FLAG VALUE of the trainer]..."
    parser = argparse.ArgumentParser(
        description=__doc__, usage=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("attempts", nargs="+", type=Path, metavar="ATTEMPT", help="folder")
    parser.add_argument("-n", type=int, default=10, help="runs an attempt, declared in each log "
                        "(default: %(default)s; at least 5 for a record)")  # fmt: skip
    parser.add_argument("--nproc_per_node", type=int, default=1, help="GPUs (default: 1)")
    parser.add_argument("--entry", choices=ENTRIES, default=ENTRIES[0],
                        help="trainer of new attempts (default: %(default)s)")  # fmt: skip
    parser.add_argument("--turns", type=int, default=0, metavar="STEPS", help=TURNS_HELP)
    args, flags = parser.parse_known_args()
    if args.n < 1 or args.nproc_per_node < 1 or args.turns < 0:
        parser.error("-n and --nproc_per_node must be at least 1, --turns at least 0")
    if args.turns and (len(args.attempts) != 2 or args.nproc_per_node > 1):
        parser.error("--turns needs two attempts, of one process a run")
    try:
        run_all(attempts(args.attempts, flags, args.nproc_per_node, args.entry), args.n, args.turns)
    except KeyboardInterrupt:
        print("interrupted: what was running counts; the same command goes on after it",
              file=sys.stderr)  # fmt: skip
        raise
    for folder in args.attempts:
        print(summary(Arm.read(folder)))
    return 0


if __name__ == "__main__":
    finish(main)
