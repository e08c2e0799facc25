#!/usr/bin/env python3
"""Check each log: is it sound, and can it be a record?

A sound log is whole and does not contradict itself: hashes, required fields, sources, ledger,
clock, status. A record also needs: no override, no resume, committed or kept source, a known
referee, the track's data and validation, the target reached, and no trace of a forgery
(tools/audit.py), in a log or between those of one folder. Exit code: 0 all eligible, 1 some sound
but not eligible, 2 misuse, 4 some invalid.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project's root
    from referee.start import finish

from tools.audit import ineligible, overlaps, traces_between
from tools.cli import EXIT_FAILED, EXIT_INVALID, EXIT_MISUSE, InvalidLog, flag_parser
from tools.runs import LoggedRun, find_logs, read_log

CAVEAT = (
    "hashes show damage, not forgery: these checks find careless forgers; people read the source"
)


def print_findings(path: Path) -> tuple[int, LoggedRun | None]:
    """Print the findings on one log; return (exit code, the run if it is sound)."""
    try:
        run = read_log(path)
    except InvalidLog as error:
        print(f"INVALID   {error}")
        return EXIT_INVALID, None
    for line, what in run.faults:
        print(f"INVALID   {path}:{line}: {what}")
    if run.faults:
        return EXIT_INVALID, None
    reasons = ineligible(run)
    print(f"{path}    sound, {'not ' if reasons else ''}eligible for a record")
    for reason in reasons:
        print(f"    {reason}")
    return EXIT_FAILED if reasons else 0, run


def print_findings_between(runs: list[LoggedRun]) -> int:
    """Print what runs show only together; return the exit code."""
    folders = dict.fromkeys(run.path.parent for run in runs)
    found = [f"{folder}    {what}" for folder in folders
             for what in traces_between([r for r in runs if r.path.parent == folder])]  # fmt: skip
    found = found or overlaps(runs)  # of different folders
    print("\n".join([*found, CAVEAT]))
    return EXIT_FAILED if found else 0


def logs_of(path: Path) -> list[Path]:
    """A log, or the logs of a folder and of every folder logs/ below it."""
    folders = [path, *(below for below in path.rglob("logs") if below.is_dir())]
    return sorted({log for folder in folders for log in find_logs(folder)})


def main() -> int:
    parser = flag_parser(__doc__)
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG", help="or a folder of them")
    args = parser.parse_args()
    paths = [log for path in args.logs for log in logs_of(path)]
    if not paths:
        parser.error("no logs (*.txt) there; name logs, or a folder such as records")
    codes, runs = zip(*map(print_findings, paths), strict=True)
    code = max(*codes, print_findings_between([run for run in runs if run]))
    sound = sum(map(bool, runs))
    print(f"{len(paths)} logs: {sound} sound, {codes.count(0)} of them eligible for a record (a "
          f"try need not be); {len(paths) - sound} invalid")  # fmt: skip
    return code


if __name__ == "__main__":
    finish(main, failed=EXIT_MISUSE)
