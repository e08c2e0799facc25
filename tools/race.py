#!/usr/bin/env python3
"""Run one attempt with n seeds, or several attempts interleaved; of two, say which is faster.

    race.py records/embedded/2026-11-30_MyIdea -n 10    seeds 0 to 9, then the test of the target
    race.py A B -n 10 --turns 10                        A B B A ..., then the verdict of diff.py

An attempt is a folder. The first call freezes this checkout's source in it, and runs start from
there; the same command goes on after an interruption, up to n. A log, another checkout (. for this
one) or a record that has its README.md lends its source and flags, and its runs go to --out.
Crashed and aborted runs keep their logs, and count. On a host whose speed wanders, --turns lets the
two runs of a pair advance side by side, one of them at a time.

Exit code: 0, or of two attempts that of diff.py; 2 if the runs could not be made.
"""

import argparse
import sys
from pathlib import Path
from string import ascii_uppercase
from tempfile import TemporaryDirectory

import bootstrap  # noqa: F401
from tqdm import tqdm

from tools import stats
from tools.attempts import Attempt, carry_out, check_turns, copy_of, interleaved, takes_runs
from tools.cli import EXIT_MISUSE, ToolError, finish
from tools.comparison import Arm, compare
from tools.diff import text_report
from tools.runs import read_arm
from tools.sources import ENTRIES, ROOT, base_of, diff_of, keep_as_diff, kept_texts, source_texts


def attempt_at(folder: Path, args, flags: list[str]) -> Attempt:
    """The attempt whose runs go to folder; a new one gets this checkout's source."""
    texts = kept_texts(folder) or source_texts(ROOT, args.entry or ENTRIES[0])
    diff = diff_of(folder)
    base = args.base or (base_of(diff) if diff else None)
    if base and (base.resolve() == folder.resolve() or not kept_texts(base)):
        raise ToolError(f"--base {base} is no other attempt that keeps its source")
    return Attempt(folder.resolve().name, folder, texts, flags, args.nproc_per_node or 1, base)


def line_up(args, flags: list[str], out: Path) -> list[Attempt]:
    """What to run: the attempts named, and copies in out of what lends its source."""
    paths = [path.resolve() for path in args.origins if takes_runs(path)]
    if len(set(paths)) < len(paths):
        raise ToolError("an attempt is named twice; name each folder once")
    attempts = []
    for origin, letter in zip(args.origins, ascii_uppercase, strict=False):
        if takes_runs(origin):
            attempts.append(attempt_at(origin, args, flags))
        else:
            attempt = copy_of(origin, out / letter, flags, args.entry)
            attempt.processes = args.nproc_per_node or attempt.processes
            attempts.append(attempt)
    check_turns(attempts, args.turns)
    for attempt in attempts:
        attempt.freeze()
    return attempts


def run_all(attempts: list[Attempt], count: int, turn_steps: int) -> None:
    """Run every attempt until it has count logs, interleaved; a failed run is told and counted."""
    have = [len(attempt.log_paths) for attempt in attempts]
    todo = [(attempts[i], seed) for i, seed in interleaved(len(attempts), count) if seed >= have[i]]
    with tqdm(total=len(todo), unit="run", disable=not sys.stderr.isatty()) as bar:
        for ended in carry_out(todo, count, turn_steps):
            bar.update()
            result = ended.output[-1].partition(" time_to_target")[0] if ended.output else ""
            tqdm.write(f"{ended.attempt.name} seed {ended.seed}: {result}")
            if ended.code:
                tqdm.write(f"  exit code {ended.code}: {ended.last_words}")
            if not ended.run.val_curve:
                raise ToolError(f"{ended.run.path} ended before its first validation, as every run "
                                f"would: {ended.last_words}")  # fmt: skip


def report(arms: list[Arm]) -> int:
    """Print the verdict on two arms, or of each the test of its target; return the exit code."""
    if len(arms) == 2:
        comparison = compare(*arms)
        print(text_report(comparison))
        return comparison.exit_code
    for arm in arms:
        print(summary(arm))
    return 0


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


def parse() -> tuple[argparse.Namespace, list[str]]:
    """(this tool's arguments, the trainer's flags)."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage="%(prog)s ATTEMPT... [-n N] [--turns STEPS] [--FLAG VALUE of the trainer]...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("origins", nargs="+", type=Path, metavar="ATTEMPT", help="folder, log or checkout")
    add("-n", type=int, default=10, help="runs of each attempt, declared in every log (default: "
        "%(default)s; a record needs 5; 0: only freeze the source)")  # fmt: skip
    add("--turns", type=int, default=0, metavar="STEPS", help="start each pair of runs at once and "
        "let them take turns of so many steps, such as 10: what a shared host does then falls on "
        "both alike (default: one run after the other)")  # fmt: skip
    add("--out", type=Path, metavar="FOLDER", help="keep the runs of what lends its source in "
        "FOLDER/A, FOLDER/B ..., by its place above (default: discard them)")  # fmt: skip
    add("--base", type=Path, metavar="ATTEMPT", help="this is a try: after its runs keep its "
        "source as a diff against that of another attempt")  # fmt: skip
    add("--entry", choices=ENTRIES, help=f"trainer to freeze (default: {ENTRIES[0]})")
    add("--nproc_per_node", type=int, help="GPUs of a run (default: 1, or those of the lender)")
    args, flags = parser.parse_known_args()
    processes = args.nproc_per_node or 1
    if min(args.n, args.turns, processes - 1) < 0:
        parser.error("-n and --turns must be at least 0, --nproc_per_node at least 1")
    if args.turns and (len(args.origins) != 2 or processes > 1):
        parser.error("--turns needs two attempts, of one process a run")
    return args, flags


def main() -> int:
    args, flags = parse()
    with TemporaryDirectory(prefix="photofinish_race_") as scratch:
        attempts = line_up(args, flags, args.out or Path(scratch))
        try:
            run_all(attempts, args.n, args.turns)
        except KeyboardInterrupt:
            print("interrupted: what was running counts; the same command goes on after it",
                  file=sys.stderr)  # fmt: skip
            raise
        finally:
            for attempt in attempts:
                if attempt.base:
                    keep_as_diff(attempt.folder, attempt.base)
        if not args.n:
            return 0
        return report([Arm(attempt.name, read_arm(attempt.logs)) for attempt in attempts])


if __name__ == "__main__":
    finish(main, failed=EXIT_MISUSE)  # 1 is a regression
