#!/usr/bin/env python3
"""Check logs: is each one sound, and can each attempt be a record?

A sound log is whole: its hashes fit, its sources are there. Each folder of logs is an attempt, and
so is a log that is named alone. Why one is no record is what leaderboard.py says; what concerns
more than its target and track also keeps diff.py and race.py from claiming a gain. Exit code:
0 all eligible, 1 some sound but not eligible, 2 misuse, 4 some invalid.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project's root
    from referee.start import finish

from tools.cli import EXIT_FAILED, EXIT_INVALID, EXIT_MISUSE, InvalidLog, flag_parser
from tools.comparison import Arm
from tools.runs import LoggedRun, find_logs, read_runs

CAVEAT = "hashes show damage, not forgery: people read the source, and race it again on their host"


def sound_runs(log: Path) -> list[LoggedRun]:
    """The runs of a log, if it is sound; else print its faults."""
    try:
        runs = read_runs(log)
    except InvalidLog as error:
        print(f"INVALID   {error}")
        return []
    faults = [fault for run in runs for fault in run.faults]
    for line, what in faults:
        print(f"INVALID   {log}:{line}: {what}")
    return [] if faults else runs


def judge(name: Path, logs: list[Path]) -> tuple[int, int]:
    """Print the judgment of one attempt; return (exit code, number of its sound logs)."""
    sound = [runs for runs in map(sound_runs, logs) if runs]
    if not sound:
        return EXIT_INVALID, 0
    arm = Arm("", [run for runs in sound for run in runs])
    obstacles, whole = arm.obstacles, len(sound) == len(logs)
    able = "eligible" if whole and not obstacles else "not eligible"
    print(f"{name}    {len(sound)} sound logs, {able} for a record")
    for obstacle in obstacles:
        print(f"    {obstacle}")
    return EXIT_FAILED if whole and obstacles else 0 if whole else EXIT_INVALID, len(sound)


def attempts_of(path: Path) -> dict[Path, list[Path]]:
    """A log, or the logs of a folder and of every folder logs/ below it, by folder."""
    if not path.is_dir():
        return {log: [log] for log in find_logs(path)}
    folders = [path, *(below for below in path.rglob("logs") if below.is_dir())]
    found = {log for folder in folders for log in find_logs(folder)}
    return {folder: sorted(log for log in found if log.parent == folder)
            for folder in sorted({log.parent for log in found})}  # fmt: skip


def main() -> int:
    parser = flag_parser(__doc__)
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG", help="or a folder of them")
    args = parser.parse_args()
    attempts = {name: logs for path in args.logs for name, logs in attempts_of(path).items()}
    if not attempts:
        parser.error("no logs (*.txt) there; name logs, or a folder such as records")
    codes, sound = zip(*(judge(*attempt) for attempt in attempts.items()), strict=True)
    count = sum(map(len, attempts.values()))
    print(f"{CAVEAT}\n{count} logs: {sum(sound)} sound, {count - sum(sound)} invalid; {len(codes)} "
          f"attempts: {codes.count(0)} eligible for a record (a try need not be)")  # fmt: skip
    return max(codes)


if __name__ == "__main__":
    finish(main, failed=EXIT_MISUSE)
