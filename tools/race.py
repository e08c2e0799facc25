#!/usr/bin/env python3
"""Run one attempt with n seeds, or several attempts interleaved; of two, say which is faster.

    race.py records/embedded/2026-11-30_MyIdea -n 10    seeds 0 to 9, then the test of the target
    race.py A B -n 10 --turns 10                        in turns, then the verdict of diff.py

An attempt is a folder. The first call freezes this checkout's source in it, and runs start from
there; the same command resumes after an interruption. You may also name a log, a checkout (. is
this one) or a record with its README.md: the tool copies its source and flags, and writes new logs
to --out.
Crashed and aborted runs keep their logs, and count. Which run begins a pair is random. On a host
whose speed wanders, use --turns: the two runs of a pair then advance side by side, one at a time.

Exit code: 0, or of two attempts that of diff.py; 2 if the runs could not be made.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project's root
    from referee.start import finish

import argparse
from collections.abc import Callable

from tqdm import tqdm

from referee.sources import read_source, source_texts
from tools import stats
from tools.attempts import (
    Attempt,
    check_turns,
    copy_of,
    require_own_flags,
    run_jobs,
    scratch_folder,
    settle_dtype,
    settle_flags,
    takes_runs,
)
from tools.cli import EXIT_MISUSE, ToolError, flag_parser
from tools.comparison import Arm, Comparison, arm_warnings, compare
from tools.diff import target_text, text_report
from tools.sources import ENTRIES, ROOT, base_of, diff_of, keep_as_diff, kept_texts


def attempt_at(folder: Path, args, flags: list[str]) -> Attempt:
    """The attempt in a folder; a new one gets this checkout's source."""
    kept = kept_texts(folder)
    here = {path: ROOT / path for path in kept if (ROOT / path).exists()}
    here = {path: read_source(file) for path, file in here.items()}
    if others := [path for path, text in kept.items() if text != here.get(path)]:
        print(f"{folder} runs the source that it keeps; this checkout differs in "
              f"{', '.join(others)}", file=sys.stderr)  # fmt: skip
    texts = kept or source_texts(ROOT, args.entry or ENTRIES[0])
    diff = diff_of(folder)
    base = args.base or (base_of(diff) if diff else None)
    if base and (base.resolve() == folder.resolve() or not kept_texts(base)):
        raise ToolError(f"--base {base} is no other attempt that keeps its source")
    return Attempt(folder.resolve().name, folder, texts, flags, base=base)


def line_up(args, flags: list[str], out: Path) -> list[Attempt]:
    """What to run: the attempts named; in out, copies of what only lends its source."""
    paths = [path.resolve() for path in args.origins if takes_runs(path)]
    if len(set(paths)) < len(paths):
        raise ToolError("an attempt is named twice; name each folder once")
    attempts = []
    for i, origin in enumerate(args.origins):
        if takes_runs(origin):
            attempt = attempt_at(origin, args, flags)
        else:
            attempt = copy_of(origin, out / chr(ord("A") + i), flags, args.entry)
        attempt.processes = args.nproc_per_node or attempt.processes
        attempts.append(attempt)
        if attempt.folder.exists():
            attempt.claim()
    if args.out and len(paths) == len(args.origins):
        raise ToolError("--out: every attempt here keeps its own runs; leave it out")
    if args.base and not paths:
        raise ToolError("--base: no attempt here keeps its own runs; leave it out")
    check_turns(attempts, args.turns)
    settle_flags(attempts)
    if args.n:
        settle_dtype(attempts)
    for origin, attempt in zip(args.origins, attempts, strict=True):
        attempt.freeze()
        if attempt.is_new and attempt.folder == origin:
            print(f"{origin} is a new attempt: it gets the {attempt.entry} of {ROOT}",
                  file=sys.stderr)  # fmt: skip
    return attempts


def run_all(attempts: list[Attempt], count: int, turn_steps: int, declared: int) -> None:
    """Run every attempt until it has count logs, interleaved; print how each run ended."""
    have = [len(attempt.log_paths) for attempt in attempts]
    seed = stats.order_seed([(source_texts(a.source, a.entry), a.flags) for a in attempts])
    order = list(stats.draw_order(len(attempts), count, seed))
    left = [(i, turn) for i, turn in order if turn >= have[i]]
    todo = [(attempts[i], attempts[i].first_seed + turn) for i, turn in left]
    if todo and len(attempts) > 1:
        letters = "".join(chr(ord("A") + i) for i, _ in left)
        tqdm.write(f"order {letters}, random with seed {seed} of sources and flags")
    with tqdm(total=len(todo), unit="run", disable=not sys.stderr.isatty()) as bar:
        for ended in run_jobs(todo, declared, turn_steps):
            bar.update()
            result = ended.output[-1].partition(" time_to_target")[0] if ended.output else ""
            tqdm.write(f"{ended.attempt.name} seed {ended.seed}: {result}")
            if doubt := ended.clock_doubt:
                tqdm.write(f"  {doubt}")
            if ended.code:
                tqdm.write(f"  exit code {ended.code}: {ended.last_words}")


def run_until_decided(
    attempts: list[Attempt], most: int, turn_steps: int, is_decided: Callable
) -> Comparison:
    """Add pairs of runs, at most so many, until is_decided(comparison)."""
    for count in range(1, most + 1):
        run_all(attempts, count, turn_steps, declared=0)
        comparison = compare(*(Arm.read(attempt.logs, name=attempt.name) for attempt in attempts))
        if is_decided(comparison):
            break
    return comparison


def print_verdict(arms: list[Arm]) -> int:
    """Print the verdict on two arms, or the figures of each; return the exit code."""
    if len(arms) == 2:
        comparison = compare(*arms)
        print(text_report(comparison))
        return comparison.exit_code
    for arm in arms:
        print(f"{arm.name}: {len(arm.finished)} of {len(arm.runs)} runs finished")
        if arm.finished:
            print(f"val_loss {arm.losses.mean():.5f} (sd {stats.sd(arm.losses):.5f}) "
                  f"train_time {arm.times.mean():.2f} s (sd {stats.sd(arm.times):.2f})    "
                  f"target {arm.target:g}: {target_text(arm)}, needed p < {arm.level}")  # fmt: skip
        for warning in arm_warnings(arm):
            print(f"WARN      {warning}")
    return 0


def parse() -> tuple[argparse.Namespace, list[str]]:
    """(this tool's arguments, the trainer's flags)."""
    parser = flag_parser(__doc__, "%(prog)s ATTEMPT... [-n N] [--FLAG VALUE of the trainer]...")
    add = parser.add_argument
    add("origins", nargs="+", type=Path, metavar="ATTEMPT", help="folder, log or checkout")
    add("-n", type=int, default=10, help="runs per attempt, declared in every log (default: "
        "%(default)s; a record needs 5; 0: only freeze the source)")  # fmt: skip
    add("--until-decided", action="store_true", help="instead of -n: look after every pair, and "
        "stop at a verdict, or once a gain of --least percent is excluded")  # fmt: skip
    add("--most", type=int, default=stats.MOST_LOOKS, help="pairs, with --until-decided (default: "
        "%(default)s)")  # fmt: skip
    add("--least", type=float, default=1, metavar="PERCENT", help="smallest gain in time worth "
        "having, with --until-decided (default: %(default)s)")  # fmt: skip
    add("--turns", type=int, default=0, metavar="STEPS", help="start the runs of a pair together "
        "and let them alternate after so many steps, such as 10: a disturbance of the host then "
        "hits both (default: one run after the other)")  # fmt: skip
    add("--out", type=Path, metavar="FOLDER", help="keep the runs of what only lends its source in "
        "FOLDER/A, FOLDER/B ..., by position (default: discard them)")  # fmt: skip
    add("--base", type=Path, metavar="ATTEMPT", help="make this a try: after its runs, keep its "
        "source as a diff against another attempt's")  # fmt: skip
    add("--entry", choices=ENTRIES, help=f"trainer to freeze (default: {ENTRIES[0]})")
    add("--nproc_per_node", type=int, help="GPUs per run (default: 1, or the lender's)")
    args, flags = parser.parse_known_args()
    processes = 1 if args.nproc_per_node is None else args.nproc_per_node
    if min(args.n, args.turns, processes - 1) < 0:
        parser.error("-n and --turns must be at least 0, --nproc_per_node at least 1")
    allowed = args.least >= 0 and stats.MIN_RUNS <= args.most <= stats.MOST_LOOKS
    if args.until_decided and not (len(args.origins) == 2 and allowed):
        parser.error(f"--until-decided needs two attempts, --least at least 0, "
                     f"--most {stats.MIN_RUNS} to {stats.MOST_LOOKS}")  # fmt: skip
    if args.turns and (len(args.origins) != 2 or processes > 1):
        parser.error("--turns needs two attempts, with one process per run")
    return args, flags


def main() -> int:
    args, flags = parse()
    with scratch_folder() as scratch:
        require_own_flags(flags)
        attempts = line_up(args, flags, args.out or scratch)
        try:
            if args.until_decided:
                run_until_decided(attempts, args.most, args.turns,
                                  lambda c: c.is_decided(args.least / 100))  # fmt: skip
            else:
                run_all(attempts, args.n, args.turns, args.n)
        finally:
            for attempt in attempts:
                if args.n:
                    attempt.forget()
                if attempt.base and attempt.folder.exists():
                    keep_as_diff(attempt.folder, attempt.base)
        if not args.n:
            return 0
        return print_verdict([Arm.read(attempt.logs, name=attempt.name) for attempt in attempts])


if __name__ == "__main__":
    again = "interrupted; logs that were kept count, the same command resumes"
    finish(main, failed=EXIT_MISUSE, interrupted=again)  # 1 is a regression
