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

from tools.attempts import copy_of, require_own_flags, run_group, scratch_folder
from tools.cli import EXIT_MISUSE, ToolError, flag_parser
from tools.runs import LoggedRun, read_log

CAUSES = ("torch", "cpu", "device", "matmul_dtype", "threads")  # of losses that differ


def losses_of(run: LoggedRun) -> dict[tuple[str, int], str]:
    """Every loss of a run as text, so that nan equals nan, by kind and step."""
    curves = ("train", run.train_curve), ("val", run.val_curve)
    return {(kind, step): str(loss) for kind, curve in curves for step, _, loss in curve}


def run_again(log: Path, folder: Path, flags: list[str]) -> tuple[LoggedRun, LoggedRun]:
    """(the run of a log, the new run of its source)."""
    old, attempt = read_log(log), copy_of(log, folder, flags)
    if not losses_of(old):
        raise ToolError(f"{log} has no losses, for its run ended before its first step")
    if "cpu_dtype" in attempt.settings:
        attempt.cpu_dtype = old.environment["matmul_dtype"].removeprefix("torch.")
    attempt.freeze()
    (ended,) = run_group([(attempt, int(old.seed))], declared=0)
    if ended.run.result.get("status", "aborted") == "aborted":
        raise ToolError(f"the run {ended.run.path} did not finish: {ended.last_words}")
    return old, ended.run


def same_losses(old: LoggedRun, new: LoggedRun) -> int:
    """Print whether all losses of a log come again, digit for digit; return the exit code."""
    before, after = losses_of(old), losses_of(new)
    end, new_end = old.result["status"], new.result["status"]
    missing = before.keys() - after.keys()
    apart = [(kind, step) for kind, step in before.keys() & after.keys()
             if before[kind, step] != after[kind, step]]  # fmt: skip
    print(f"seed {old.seed}, {old.steps} steps: val_loss {old.val_loss:.6f} -> {new.val_loss:.6f}, "
          f"train_time {old.train_s:.2f} -> {new.train_s:.2f} s")  # fmt: skip
    ends_alike = end == "aborted" or (old.steps, old.finished) == (new.steps, new.finished)
    if not apart and not missing and ends_alike:
        how = "" if old.finished else f"; the log's run {end}"
        print(f"REPRODUCED  all {len(before)} losses are the same, digit for digit{how}")
        return 0
    if apart:
        kind, step = min(apart, key=lambda loss: loss[::-1])
        largest = max(abs(float(before[loss]) - float(after[loss])) for loss in apart)
        print(f"DIFFERENT   {len(apart)} of {len(before)} losses, first {kind} at step {step}: "
              f"{before[kind, step]} -> {after[kind, step]}, largest {largest:.6f}")  # fmt: skip
    else:
        print(f"DIFFERENT   {len(missing)} of {len(before)} losses are missing: {old.steps} steps, "
              f"{end} -> {new.steps} steps, {new_end}")  # fmt: skip
    for key in CAUSES:
        now = new.environment.get(key)
        if old.environment.get(key) != now:
            print(f"  {key}: {old.environment.get(key)} -> {now}, which may be why")
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
    with scratch_folder() as scratch:
        return same_losses(*run_again(args.log, args.out or scratch / "replay", flags))


if __name__ == "__main__":
    finish(main, failed=EXIT_MISUSE)  # 1 is a loss that differs
