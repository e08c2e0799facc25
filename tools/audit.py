"""The one judgment of an attempt: why its runs prove neither a record nor a gain.

Hashes show damage, not forgery: a program that edits a log hashes it anew and keeps its figures
consistent. So the rules here are about what ran, not about figures that such a program sets.
docs/cheats.md says what guards, and what is out of reach.
"""

import hashlib
import math
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import cache

from referee.sources import GIT
from referee.task import TASKS
from tools import stats
from tools.runs import LoggedRun, changes, config_changes, read_log, source_changes
from tools.sources import ROOT

ACCOUNTS = {"startup", "compile", "turn", "validation", "checkpoint", "train", "end", "total"}
FIRST_LOSS = 0.3  # nats below a uniform guess: no untrained network starts there
FIRST_TRAIN_LOSS = 0.5  # the same of a batch; the lowest of an honest run was 0.30 below
UNTIMED_S = {"startup": 600, "compile": 1800, "end": 60}  # more than any work of its kind takes
VALIDATION_TIMES = 2.0  # of its tokens' time in training; honest runs took 0.24 to 1.34
REFEREE = re.compile(  # its files, now and in earlier layouts
    r"referee/\w+\.py|(records/)?harness\.py|(ranks|flags|environment|checkpoints)\.py|data/shards\.py"
)
SETUP = ("compile", "torch", "os", "python", "threads")
NEW_LAYOUT = "2026-12-01"  # later runs have the referee in referee/, unless their source is older
OPTIONS = {"track", "task", "seed", "slug", "log_dir", "save_every", "resume", "micro_batch_seqs",
           "compile", "fp32", "cpu_dtype", "source_dir", "declared_runs", "turn_steps",
           "rank_timeout_s"}  # fmt: skip


def objections(runs: list[LoggedRun]) -> list[str]:
    """Why the runs of one attempt prove nothing; with one reason no record and no gain."""
    if public := [run for run in runs if run.is_public]:
        return [f"{len(public)} of {len(runs)} are logs of the public speedrun, without seed, "
                "data hash and order"]  # fmt: skip
    checks = (check_clocks, check_first_losses, check_course, check_referee)
    found = Counter(what for run in runs for check in checks for what in check(run))
    return [*check_set(runs), *(f"{what} ({n} of {len(runs)} runs)" for what, n in found.items())]


def check_set(runs: list[LoggedRun]) -> Iterator[str]:
    """What is wrong with the choice of runs."""
    declared, n = declared_runs(runs), len(runs)
    if declared not in (0, n):
        yield f"{declared} runs were declared, {n} are there"
    if not declared and n > stats.MOST_LOOKS:
        yield f"{n} runs, not declared before the first; without that at most {stats.MOST_LOOKS}"
    seeds = Counter(run.seed for run in runs)
    if twice := [seed for seed, count in seeds.items() if count > 1]:
        yield f"seed {', '.join(twice)} ran more than once"
    elif n > 1 and not is_whole(sorted(map(int, seeds))):
        yield f"the seeds are not 0 to {n - 1}: some may have been left out"
    if mixed := mixture(runs):
        yield f"its runs differ in {', '.join(mixed)}"


def is_whole(seeds: list[int]) -> bool:
    """Whether none is left out, from 0 on, or from 1000 k on for idea k of tools/ideas.py."""
    return seeds[0] % 1000 == 0 and seeds == list(range(seeds[0], seeds[0] + len(seeds)))


def declared_runs(runs: list[LoggedRun]) -> int:
    """How many runs were declared before the first; 0: unknown."""
    declared = {int(run.config.get("declared_runs", 0)) for run in runs}
    return declared.pop() if len(declared) == 1 else 0


def mixture(runs: list[LoggedRun]) -> list[str]:
    """What differs between runs that should differ in their seeds alone."""
    first, found = runs[0], set()
    conditions = first.task | setup(first) | {"class": first.machine_class}
    for run in runs[1:]:
        found |= source_changes(first, run).keys() | config_changes(first, run).keys()
        own = run.task | setup(run) | {"class": run.machine_class}
        found |= changes(conditions, own).keys()
    return sorted(found)


def setup(run: LoggedRun) -> dict[str, str]:
    """What a run shares with those that it is compared with, beside host, class and task."""
    env = {"compile": run.config.get("compile", "none"), **run.environment}
    waits = re.search(r'"OMP_WAIT_POLICY": "(\w*)"', env.get("variables", ""))
    flags = [f"{name}={value}" for name, value in run.flags if name[2:] not in OPTIONS]
    found = {name: env.get(name, "none") for name in SETUP}
    found["OMP_WAIT_POLICY"] = waits[1] if waits else "none"
    return found | {"flags": " ".join(sorted(flags)) or "none"}


def off_track(run: LoggedRun) -> Iterator[str]:
    """How flags, data and validation differ from those of its track, as no record's may."""
    overridden = set(run.config.get("overrides", "none").split()) - {"none"}
    if overridden := overridden | {name[2:] for name, _ in run.flags} - OPTIONS:
        yield f"hyperparameters were overridden: {' '.join(sorted(overridden))}"
    track = run.config.get("track", "unknown")
    if not (track in TASKS and TASKS[track].data_sha256):
        yield f"no data hash is known of the track {track}"
        return
    for name, found in run.task.items():
        known = str(getattr(TASKS[track], {"data": "data_sha256"}.get(name, name)))
        if found != known:
            yield f"{name} is {found[:16]}, on the track {track} it is {known[:16]}"
    data = TASKS[track].data_sha256
    easiest = max(task.target_val_loss for task in TASKS.values() if task.data_sha256 == data)
    if run.target > easiest:  # earlier ones were lower
        yield f"target_val_loss is {run.target}, no track with this data has more than {easiest}"


def check_clocks(run: LoggedRun) -> Iterator[str]:
    """What the outside clock says, and untimed accounts that hold more than what they are for."""
    if (noted := run.path.with_suffix(".doubt")).exists():  # by race.py, by its own clock
        yield noted.read_text(encoding="utf-8")
    if run.finished and not run.ledger:
        yield "the ledger of untimed work is missing"
    if unknown := run.ledger.keys() - ACCOUNTS:
        yield f"untimed work of an unknown kind: {', '.join(sorted(unknown))}"
    for account, most in UNTIMED_S.items():
        if run.ledger.get(account, 0) > most:
            yield f"over {most} s of {account}: no work of that kind takes so long"
    tokens = len(run.val_curve) * float(run.config.get("val_tokens", "nan"))
    times = run.ledger.get("validation", 0) * run.number("tokens_per_s") / tokens if tokens else 0
    if not run.number("resumed_from") > 0 and times > VALIDATION_TIMES:
        yield f"validation took over {VALIDATION_TIMES:g} times as long as training on its tokens"


def check_first_losses(run: LoggedRun) -> Iterator[str]:
    """Traces of training before the clock started."""
    if run.number("resumed_from") > 0:
        return
    guess = math.log(max(float(run.config.get("vocab_size", "nan")), 1))
    for kind, step, curve, most in (("val", 0, run.val_curve, FIRST_LOSS),
                                    ("train", 1, run.train_curve, FIRST_TRAIN_LOSS)):  # fmt: skip
        if run.finished and (not curve or curve[0][0] != step):
            yield f"no {kind}_loss at step {step}"
        elif curve and curve[0][0] == step and curve[0][2] < guess - most:
            yield f"{kind}_loss at step {step} is that of a trained network"


def check_course(run: LoggedRun) -> Iterator[str]:
    """Runs that did not go from the first planned step to the last one by themselves."""
    if run.number("resumed_from") > 0 or run.config.get("resume"):
        yield "resumed: a checkpoint told the train time"
    if "SLURM_RESTART_COUNT" in run.environment.get("variables", ""):
        yield "Slurm requeued its job: it was begun more than once"
    if run.finished and (planned := run.config.get("num_steps")) != str(run.steps):
        yield f"it took {run.steps} steps of num_steps {planned}"
    if run.number("recompiled") > 0:
        yield "graphs were compiled inside the timed part"
    if run.foreign_modules:
        yield f"modules from outside were loaded: {run.foreign_modules}"


def check_referee(run: LoggedRun) -> Iterator[str]:
    """A referee that no commit has, or one of an earlier layout after its time.

    The sources of published records may run again at any time.
    """
    files = referee_of(run)
    if not any(path.endswith("harness.py") for path, _ in files):
        yield "no referee is logged"
        return
    known = any(files <= commit for commit in known_referees())
    is_old = not all(path.startswith("referee/") for path, _ in files)
    if known and not (is_old and run.config.get("utc", "") >= NEW_LAYOUT):
        return
    if whole_source(run) not in published():
        each = {file for commit in known_referees() for file in commit}
        names = ", ".join(sorted(path for path, _ in files - each)) or "its files together"
        yield (f"the referee is of a layout that ended before {NEW_LAYOUT}" if known else
               f"the referee ({names}) is in no commit of this repository: read it; in a fork of "
               "your own, commit it")  # fmt: skip


def referee_of(run: LoggedRun) -> frozenset[tuple[str, str]]:
    """(path, git's id) of the referee's files in a log."""
    return frozenset((path, git_blob(source.text)) for path, source in run.sources.items()
                     if REFEREE.fullmatch(path))  # fmt: skip


def whole_source(run: LoggedRun) -> frozenset[tuple[str, str]]:
    return frozenset((path, source.sha256) for path, source in run.sources.items())


@cache
def known_referees() -> set[frozenset[tuple[str, str]]]:
    """The referee's files, as in referee_of, of each commit; of none without git."""
    files, known = {}, set()
    command = [*GIT, "log", "--first-parent", "-m", "--reverse", "--format=%%", "--raw",
               "--no-abbrev", "--no-renames"]  # fmt: skip
    with suppress(FileNotFoundError):
        history = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8").stdout
        for commit in history.split("%\n"):
            for blob, path in re.findall(r"^:\S+ \S+ \S+ (\w+) \w\t(.+)$", commit, re.M):
                if REFEREE.fullmatch(path):
                    files[path] = blob  # zeros, if it was deleted
            known.add(frozenset(files.items()))
    return known


@cache
def published() -> set[frozenset[tuple[str, str]]]:
    """The sources of records, as in whole_source, from before the present layout."""
    logs = sorted((ROOT / "records").glob("**/logs/*.txt"), reverse=True)
    firsts = map(read_log, {log.parent: log for log in logs}.values())
    return {whole_source(run) for run in firsts if run.config.get("utc", "") < NEW_LAYOUT}


@cache
def git_blob(text: str) -> str:
    """Git's id of a file with this text."""
    data = text.encode()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
