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

from arms import Arm, ArmError, flags_of, interleaved, keep_source, last_words, start
from comparison import EXIT_INVALID, compare
from comparison import Arm as ReadArm
from diff import text_report
from runs import InvalidLog, Run, find_logs, read_arm, read_log
from tqdm import tqdm


def arm_of(origin: Path, folder: Path, flags: list[str]) -> tuple[Arm, Run | None]:
    """An arm in folder that repeats origin, and origin's first run, if it has logs."""
    logs = find_logs([origin]) if origin.is_file() or (origin / "logs").is_dir() else []
    first = read_log(logs[0]) if logs else None
    given = [*flags_of(first), *flags] if first else flags
    processes = int(first.environment.get("world_size", 1)) if first else 1
    arm = Arm(folder, tuple(given), processes)
    keep_source(origin, arm)
    return arm, first


def run_once(arm: Arm, seed: int, declared: int) -> Run:
    """One finished run; ArmError if it left no such log."""
    before = set(find_logs([arm.folder])) if arm.logs.is_dir() else set()
    done = start(arm, seed, "replay", declared)
    new = set(find_logs([arm.folder])) - before if arm.logs.is_dir() else set()
    if not new:
        raise ArmError(f"the run of {arm.folder} left no log: {last_words(done)}")
    run = read_log(new.pop())
    if not run.finished:
        raise ArmError(f"the run {run.path} did not finish: {last_words(done)}")
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
    if not origin.is_file():
        raise ArmError(f"{origin} is no log; name one, or give --against and -n")
    arm, old = arm_of(origin, out / "replay", flags)
    return same_losses(old, run_once(arm, int(old.seed), 0))


def replay_against(b: Path, a: Path, count: int, out: Path, flags: list[str]) -> int:
    """Interleave count runs of each after one burn-in run each, which is discarded."""
    arms = [arm_of(origin, out / letter, flags)[0] for origin, letter in ((a, "A"), (b, "B"))]
    for arm in tqdm(arms, desc="burn-in", unit="run", disable=not sys.stderr.isatty()):
        run_once(arm, 0, 0).path.unlink()
    order = list(interleaved(2, count))
    for i, seed in tqdm(order, unit="run", disable=not sys.stderr.isatty()):
        run_once(arms[i], seed, count)
    comparison = compare(*(ReadArm(o.resolve().stem, read_arm(arm.folder))
                           for o, arm in zip((a, b), arms, strict=True)))  # fmt: skip
    print(text_report(comparison, False))
    return comparison.exit_code


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("b", type=Path, metavar="B", help="a log; with --against also a folder")
    parser.add_argument("--against", type=Path, metavar="A", help="what to interleave it with")
    parser.add_argument("-n", type=int, default=5, help="runs each with --against (default: 5)")
    parser.add_argument("--out", type=Path, help="keep sources and logs here (default: discard)")
    args, flags = parser.parse_known_args()
    if args.n < 1:
        parser.error("-n must be at least 1")
    if args.out and args.out.exists() and any(args.out.iterdir()):
        parser.error(f"--out {args.out} is not empty")
    out = args.out or Path(tempfile.mkdtemp(prefix="photofinish_replay_"))
    try:
        if args.against is None:
            return replay_one(args.b, out, flags)
        return replay_against(args.b, args.against, args.n, out, flags)
    except InvalidLog as error:
        print(f"INVALID   {error}", file=sys.stderr)
        return EXIT_INVALID
    except (ArmError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        if not args.out:
            shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
