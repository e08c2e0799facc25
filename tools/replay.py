#!/usr/bin/env python3
"""Run a log's own source again, with its flags and seed: are the losses the same, digit for digit?

    replay.py LOG [--out FOLDER] [--FLAG VALUE of the trainer]...

Exit code: 0 if they are, 1 if they are not, 2 if it cannot be run again.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project's root
    from referee.start import finish

from tempfile import TemporaryDirectory

from tools.attempts import copy_of, require_own_flags, run_group
from tools.cli import EXIT_MISUSE, ToolError, flag_parser
from tools.runs import LoggedRun, read_log

CAUSES = ("torch", "cpu", "device", "matmul_dtype", "threads")  # of losses that differ


def run_again(log: Path, folder: Path, flags: list[str]) -> tuple[LoggedRun, LoggedRun]:
    """(the run of a log, the new run of its source)."""
    old, attempt = read_log(log), copy_of(log, folder, flags)
    if "cpu_dtype" in attempt.settings:
        attempt.cpu_dtype = old.environment["matmul_dtype"].removeprefix("torch.")
    attempt.freeze()
    (ended,) = run_group([(attempt, int(old.seed))], declared=0)
    if not ended.run.finished:
        raise ToolError(f"the run {ended.run.path} did not finish: {ended.last_words}")
    return old, ended.run


def same_losses(old: LoggedRun, new: LoggedRun) -> int:
    """Print whether every loss of two runs agrees digit for digit; return the exit code."""
    curves = ("train", old.train_curve, new.train_curve), ("val", old.val_curve, new.val_curve)
    pairs = [(kind, step, x, y) for kind, before, after in curves
             for (step, _, x), (_, _, y) in zip(before, after, strict=False)]  # fmt: skip
    apart = [(kind, step, x, y) for kind, step, x, y in pairs if x != y]
    print(f"seed {old.seed}, {old.steps} steps: val_loss {old.val_loss:.6f} -> {new.val_loss:.6f}, "
          f"train_time {old.train_s:.2f} -> {new.train_s:.2f} s")  # fmt: skip
    if not apart and old.steps == new.steps:
        print(f"REPRODUCED  all {len(pairs)} losses are the same, digit for digit")
        return 0
    if apart:
        kind, step, x, y = apart[0]
        print(f"DIFFERENT   {len(apart)} of {len(pairs)} losses, first {kind} at step {step}: "
              f"{x} -> {y}, largest {max(abs(x - y) for *_, x, y in apart):.6f}")  # fmt: skip
    for key in CAUSES:
        before, now = old.environment.get(key), new.environment.get(key)
        if before != now:
            print(f"  {key}: {before} -> {now}, which may be why")
    return 1


def main() -> int:
    parser = flag_parser(__doc__)
    parser.add_argument("log", type=Path, metavar="LOG")
    parser.add_argument("--out", type=Path, help="keep source and log here (default: discard)")
    args, flags = parser.parse_known_args()
    require_own_flags(flags)
    if args.log.is_dir():
        parser.error(f"{args.log} is no log; name one, or run a folder's source: tools/race.py")
    if args.out and args.out.exists() and (args.out.is_file() or any(args.out.iterdir())):
        parser.error(f"--out {args.out} is a file, or not empty")
    with TemporaryDirectory(prefix="photofinish_replay_") as scratch:
        return same_losses(*run_again(args.log, args.out or Path(scratch, "replay"), flags))


if __name__ == "__main__":
    finish(main, failed=EXIT_MISUSE)  # 1 is a loss that differs
