#!/usr/bin/env python3
"""Run an attempt with n seeds, several attempts interleaved, and test the target.

An attempt is a folder such as records/embedded/2026-11-30_MyIdea. The first call freezes the
trainer's source in it; runs then start from there. Calling it again goes on with the next seeds,
up to n. Crashed and aborted runs keep their logs, and count.
"""

import argparse
import sys
from pathlib import Path

import stats
from arms import ENTRY, ROOT, Arm, ArmError, interleaved, keep_source, last_words, start
from comparison import Arm as ReadArm
from runs import InvalidLog, find_logs
from tqdm import tqdm


def attempts(paths: list[Path], flags: list[str], processes: int) -> list[Arm]:
    """The arms to run; an attempt without source gets that of this checkout."""
    arms = [Arm(path, tuple(flags), processes) for path in paths]
    for arm in arms:
        if not (arm.source / ENTRY).exists():
            keep_source(ROOT, arm)
        arm.logs.mkdir(parents=True, exist_ok=True)
    return arms


def run_all(arms: list[Arm], count: int) -> None:
    """Run every arm until it has count logs, interleaved; a failed run is told and counted."""
    have = [len(find_logs([arm.folder])) for arm in arms]
    todo = [(arms[i], seed) for i, seed in interleaved(len(arms), count) if seed >= have[i]]
    bar = tqdm(todo, unit="run", disable=not sys.stderr.isatty())
    for arm, seed in bar:
        name = arm.folder.resolve().name
        bar.set_description(f"{name} seed {seed}")
        done = start(arm, seed, name.partition("_")[2] or "run", count)
        if len(find_logs([arm.folder])) == seed:
            raise ArmError(f"no run of {arm.folder} began: {last_words(done)}")
        result = (done.stdout or "").strip().splitlines()[-1:] or [""]
        tqdm.write(f"{name} seed {seed}: {result[0].partition(' time_to_target')[0]}")
        if done.returncode:
            tqdm.write(f"  exit code {done.returncode}: {last_words(done)}")


def summary(arm: Arm) -> str:
    """The loss and time of all runs of an attempt, and its test of the target."""
    read = ReadArm.read(arm.folder)
    (status, p), n, name = read.target_status(), len(read.runs), read.name
    if not len(read.losses):
        return f"{name}: none of {n} runs finished"
    words = {"PASS": "reached", "FAIL": "not reached", "open": "not shown to be reached"}
    text = (
        f"{name}: n={n} val_loss {read.losses.mean():.5f} (sd {sd(read.losses):.5f}) "
        f"train_time {read.times.mean():.2f} s (sd {sd(read.times):.2f})    "
    )
    if read.unfinished:
        text += f"{sum(read.unfinished.values())} of {n} runs did not finish, and count; "
    if not read.declared and n not in stats.LOOKS:
        looks = ", ".join(map(str, stats.LOOKS))
        return f"{text}target: n was not declared, so a look is allowed at {looks} runs only"
    return f"{text}target {read.target:g} {words[status]}: p={p:.2g}, needed < {read.level}"


def sd(values) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def main() -> int:
    usage = "%(prog)s [-n N] [--nproc_per_node K] ATTEMPT... [--FLAG VALUE of train_gpt.py]..."
    parser = argparse.ArgumentParser(
        description=__doc__, usage=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("attempts", nargs="+", type=Path, metavar="ATTEMPT", help="folder")
    parser.add_argument("-n", type=int, default=10, help="runs an attempt, declared in each log "
                        "(default: %(default)s; at least 5 for a record)")  # fmt: skip
    parser.add_argument("--nproc_per_node", type=int, default=1, help="GPUs (default: 1)")
    args, flags = parser.parse_known_args()
    if args.n < 1 or args.nproc_per_node < 1:
        parser.error("-n and --nproc_per_node must be at least 1")
    arms = []
    try:
        arms = attempts(args.attempts, flags, args.nproc_per_node)
        run_all(arms, args.n)
    except (ArmError, InvalidLog, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the run that was going counts; the same command goes on after it",
              file=sys.stderr)  # fmt: skip
        return 130
    for arm in arms:
        print(summary(arm))
    return 0


if __name__ == "__main__":
    sys.exit(main())
