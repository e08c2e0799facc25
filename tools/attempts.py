"""Run sources again and again, one run at a time or two that take turns.

Every run starts from a scratch copy of its source, so edits of the checkout change no run.
"""

import ast
import ctypes
import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from tempfile import mkdtemp

from referee.host import host_id
from referee.sources import GIT, sha256_of, source_texts
from tools import sources
from tools.cli import ToolError
from tools.runs import SINGLE_RUN_FLAGS, LoggedRun, find_logs, flag_pairs, read_log
from tools.sources import ENTRIES, ROOT, entry_of, kept_texts

PRCTL, PR_SET_PDEATHSIG = getattr(ctypes.CDLL(None), "prctl", None), 1  # of Linux alone


@dataclass
class Attempt:
    """A source to run, and the folder for it and its logs; ToolError if it cannot run."""

    name: str
    folder: Path
    texts: dict[str, str]  # the source, by path
    flags: list[str]
    processes: int = 1  # per run
    base: Path | None = None  # an attempt; after the runs, the source becomes a diff against its
    cpu_dtype: str = ""  # of all matmuls on a CPU; empty: each run measures which is faster
    first_seed: int = 0
    most_s: float | None = None  # after which a run is stopped
    is_new: bool = False  # frozen by this process
    lock: int | None = None  # the descriptor that holds it

    def __post_init__(self):
        self.source, self.logs = self.folder / "source", self.folder / "logs"
        self.entry = next((entry for entry in ENTRIES if entry in self.texts), None)
        if not self.entry:
            raise ToolError(f"the source of {self.name} holds neither {' nor '.join(ENTRIES)}")
        sources.require_whole(self.texts)
        self.settings = field_names(self.texts)

    @property
    def log_paths(self) -> list[Path]:
        return sorted(self.logs.glob("[!.]*.txt"))

    def claim(self) -> None:
        """Keep other races out while this process lives."""
        if self.lock is None:
            self.lock = lock_folder(self.folder)
        self.drop_empty_logs()

    def drop_empty_logs(self) -> None:
        """Delete what killed runs without a step left: they count for nothing."""
        for log in self.log_paths:
            text = log.read_bytes()
            if not text or text.startswith(b"=== source ") and b"\nstep:" not in text:
                log.unlink()

    def freeze(self) -> None:
        """Keep the source in source/, where its runs look for it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.claim()
        kept = kept_texts(self.folder)
        if self.texts != (kept or self.texts):
            raise ToolError(f"{self.folder} has runs of another source; name a new folder")
        self.is_new = not kept
        sources.write_texts(self.texts, self.source)
        self.logs.mkdir(exist_ok=True)

    def forget(self) -> None:
        """Discard a source that was frozen just now and of which no run began."""
        if self.is_new and not self.log_paths:
            shutil.rmtree(self.source)
            self.logs.rmdir()
            with suppress(OSError):  # it holds more
                self.folder.rmdir()


def lock_folder(folder: Path) -> int:
    """The descriptor that holds a lock while it is open; ToolError if another process has one."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ToolError(f"another race runs {folder}; wait for its end") from None
    except OSError:  # some file servers have no locks
        pass
    return lock


def field_names(texts: dict[str, str]) -> set[str]:
    """Names of the fields of a source's classes, among them all options and hyperparameters."""
    nodes = (node for text in texts.values() for node in ast.walk(ast.parse(text)))
    return {field.target.id for node in nodes if isinstance(node, ast.ClassDef)
            for field in node.body if isinstance(field, ast.AnnAssign)}  # fmt: skip


def takes_runs(origin: Path) -> bool:
    """Whether origin is an attempt's folder without a README.md, which gets more runs."""
    if not origin.exists():
        return True
    if origin.is_file() or entry_of(origin):
        return False
    inside, logs = {path.name for path in origin.iterdir()}, find_logs(origin)
    if kept_texts(origin):
        return not (logs and "README.md" in inside)
    return not logs and inside <= {"README.md", "logs", "source.part"}


def copy_of(origin: Path, folder: Path, flags: list[str], entry: str | None = None) -> Attempt:
    """An attempt in folder with the source of a log, a folder of logs, or a checkout.

    A log lends its flags too; a folder lends those of its first sound log.
    """
    name = origin.resolve().name.removesuffix(".txt")
    if found := entry_of(origin):
        return Attempt(name, folder, source_texts(origin, entry or found), flags)
    runs = [read_log(path) for path in find_logs(origin)]
    if not runs:
        trainers = " or ".join(ENTRIES)
        raise ToolError(f"{origin} is neither a log, nor an attempt, nor a folder with {trainers}")
    run = next((run for run in runs if not run.faults), runs[0])
    if run.is_public or run.faults:
        why = "it is of the public speedrun" if run.is_public else run.faults[0][1]
        raise ToolError(f"{run.path} cannot be run again: {why}")
    processes = int(run.environment.get("world_size", 1))
    return Attempt(name, folder, run.source_texts, [*run.shared_flags, *flags], processes)


def require_own_flags(flags: list[str]) -> None:
    """ToolError for a flag of the trainer that the tools give to each run themselves."""
    if taken := sorted(SINGLE_RUN_FLAGS & {flag.partition("=")[0] for flag in flags}):
        raise ToolError(f"{taken[0]} is given to each run by this tool; leave it out")


def settle_flags(attempts: list[Attempt]) -> None:
    """An attempt without flags keeps those of its runs; ToolError if it has others."""
    for attempt in attempts:
        attempt.flags = list(chain(*flag_pairs(attempt.flags)))
        for run in map(read_log, attempt.log_paths):
            had = run.shared_flags
            attempt.flags = attempt.flags or had
            if "argv" in run.config and had != attempt.flags:
                raise ToolError(f"the runs of {attempt.name} have other flags of the trainer: "
                                f"{' '.join(had) or 'none'}; leave yours out to go on, or name a "
                                "new folder")  # fmt: skip


def settle_dtype(attempts: list[Attempt]) -> None:
    """Let all runs multiply in the dtype of those that ran, or in the faster one on this host."""
    younger = [attempt for attempt in attempts if "cpu_dtype" in attempt.settings]
    paths = [path for attempt in younger for path in attempt.log_paths]
    found = read_log(paths[0]).environment["matmul_dtype"] if paths else ""
    if younger and not found:
        code = "from referee.ranks import Runtime; rt = Runtime(); rt.choose_arithmetic(''); " \
               "print(rt.matmul_dtype)"  # fmt: skip
        found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, text=True,
                               stdout=subprocess.PIPE).stdout.strip()  # fmt: skip
    for attempt in younger:
        attempt.cpu_dtype = found.removeprefix("torch.")


def check_turns(attempts: list[Attempt], turn_steps: int) -> None:
    """ToolError if the attempts cannot run in turns of so many steps."""
    arms = [[read_log(path) for path in attempt.log_paths] for attempt in attempts]
    for attempt, runs in zip(attempts, arms, strict=True):
        if turn_steps and "turn_steps" not in attempt.settings:
            raise ToolError(f"the source of {attempt.name} is older than --turns; leave it out")
        if runs and runs[0].turn_steps != turn_steps:
            raise ToolError(f"the runs of {attempt.name} have turns of {runs[0].turn_steps} steps; "
                            f"go on with --turns {runs[0].turn_steps}")  # fmt: skip
    if turn_steps and len(counts := {len(runs) for runs in arms}) > 1:
        raise ToolError(f"one attempt has {min(counts)} runs, the other {max(counts)}, so a run "
                        "would lack its pair; name new folders")  # fmt: skip


@dataclass
class FinishedRun:
    """A run whose process has ended."""

    attempt: Attempt
    seed: int
    run: LoggedRun
    code: int
    output: list[str]  # lines
    last_words: str  # its error, or else the last line that it wrote
    wall_s: float  # of its process, by this process's clock

    @property
    def clock_doubt(self) -> str:
        """How its ledger contradicts the wall time, which its source cannot read; or empty.

        No ledger holds what Python does before the first import and after the result line: up to
        1.6 s where startup takes 4. A loaded host draws out both, so the slack grows by what
        startup takes beyond. That helps no cheat: a false startup contradicts no wall time anyway.
        """
        logged, startup_s = (self.run.ledger.get(name, 0.0) for name in ("total", "startup"))
        slack = 1.6 + max(startup_s - 4, 0) + 0.01 * self.wall_s
        slack += 10 if self.attempt.processes > 1 else 0  # torchrun's own start and end
        if not self.run.finished or -0.05 < self.wall_s - logged < slack:
            return ""
        return f"its ledger adds up to {logged:.1f} s, its process took {self.wall_s:.1f} s"


Job = tuple[Attempt, int]  # an attempt and a seed


def run_jobs(jobs: list[Job], declared: int, turn_steps: int) -> Iterator[FinishedRun]:
    """Run every job, one after the other; with turn_steps, neighbours of one seed take turns."""
    groups = (list(pair) for _, pair in groupby(jobs, key=lambda job: job[1]))
    for group in groups if turn_steps else ([job] for job in jobs):
        yield from run_group(group, declared, turn_steps)


def run_group(jobs: list[Job], declared: int, turn_steps: int = 0) -> list[FinishedRun]:
    """Run jobs side by side, or two that take turns; return them in the order in which they ended.

    Jobs side by side need a folder each, in which their logs are found.
    On ctrl-C the runs get the signal too; SIGTERM is passed on. They end their logs by themselves.
    """
    before = {path for attempt, _ in jobs for path in attempt.log_paths}
    with ExitStack() as stack:
        scratches = [stack.enter_context(staged(attempt.texts)) for attempt, _ in jobs]
        pool, running = stack.enter_context(ThreadPoolExecutor()), {}
        ends = [None] * len(jobs)
        if turn_steps:
            ends = [stack.enter_context(end) for end in socket.socketpair()]
            ends[1].send(b"1")  # the first turn is the first job's
        try:
            for job, scratch, end in zip(jobs, scratches, ends, strict=True):
                began = time.monotonic()
                process = start_process(*job, scratch, declared, turn_steps, end)
                end = pool.submit(wait_for, process, job[0].most_s)
                running[end] = process, *job, began
            for end in ends if turn_steps else ():
                end.close()
            ended = [(*running[future], *future.result()) for future in as_completed(running)]
        except BaseException as stop:
            if type(stop) is not KeyboardInterrupt:  # which the runs get as well
                for process, *_ in running.values():
                    process.terminate()
            raise
    # If one run of a pair broke, the other one ends because of it, and later.
    return [finished_run(*one, before) for one in sorted(ended, key=lambda one: one[-1])]


def wait_for(process: subprocess.Popen, most_s: float | None) -> tuple[str, str, float]:
    """A process's output, its errors, and when it ended; after most_s it must end its log."""
    try:
        output, errors = process.communicate(timeout=most_s)
    except subprocess.TimeoutExpired:
        process.terminate()
        output, errors = process.communicate()
    return output, errors, time.monotonic()


@contextmanager
def scratch_folder():
    """A temporary folder; a process of its own deletes it when this one ends, or is killed."""
    delete = 'read _; rm -rf "$1" 2>/dev/null || sleep 3; rm -rf "$1"'  # a run may still write
    name = mkdtemp(prefix="photofinish_")
    command = ["sh", "-c", delete, "sh", name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True):
        yield Path(name)


@contextmanager
def staged(texts: dict[str, str]):
    """A temporary folder to run a source from: its files, and links to the data."""
    with scratch_folder() as scratch:
        sources.write_texts(texts, scratch)
        (scratch / "data").mkdir(exist_ok=True)
        for folder in (ROOT / "data").iterdir():
            if folder.is_dir() and folder.name != "__pycache__":
                (scratch / "data" / folder.name).symlink_to(folder)
        yield scratch


def start_process(
    attempt: Attempt, seed: int, scratch: Path, declared: int, turn_steps: int, stdin
) -> subprocess.Popen:
    """Start a run from its scratch folder."""
    command = [sys.executable]
    if attempt.processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={attempt.processes}"]
    command += [str(scratch / attempt.entry), *attempt.flags, f"--seed={seed}"]
    slug = re.sub(r"[^A-Za-z0-9_.+-]+", "-", sources.slug_of(attempt.name))[:60]
    command += [f"--slug={slug or 'run'}", f"--log_dir={attempt.logs}"]
    newer = {"source_dir": attempt.source, "declared_runs": declared, "turn_steps": turn_steps,
             "cpu_dtype": attempt.cpu_dtype}  # fmt: skip
    command += [f"--{flag}={value}" for flag, value in newer.items() if flag in attempt.settings]
    return subprocess.Popen(command, env=variables(scratch), text=True, stdin=stdin,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            preexec_fn=end_with_parent)  # fmt: skip


def end_with_parent() -> None:
    """Let this process get SIGTERM when its parent is killed, and so end its log."""
    if PRCTL:
        PRCTL(PR_SET_PDEATHSIG, signal.SIGTERM)


def variables(scratch: Path) -> dict[str, str]:
    """A run's environment: no checkout on its path, and git compares scratch with our HEAD."""
    found = dict(os.environ)
    folders = [folder for folder in found.pop("PYTHONPATH", "").split(os.pathsep) if folder]
    if others := [folder for folder in folders if not entry_of(Path(folder))]:
        found["PYTHONPATH"] = os.pathsep.join(others)
    with suppress(OSError, subprocess.CalledProcessError):  # without git, or no clone
        command = [*GIT, "rev-parse", "--absolute-git-dir"]
        git = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        found |= {"GIT_DIR": git.stdout.strip(), "GIT_WORK_TREE": str(scratch)}
    return found


def last_words(said: str, code: int) -> str:
    """The last line by which a process names its error, or else how it ended."""
    lines = said.strip().splitlines()
    named = [line for line in lines if re.match(r"error: |[\w.]+(Error|Exception)\b", line)]
    killed = [f"signal {-code} ended it"] if code < 0 else []
    return [f"it exited with {code}", *lines[-1:], *killed, *named[-1:]][-1]


def finished_run(
    process, attempt: Attempt, seed: int, began: float, output: str, errors: str, end: float, before
) -> FinishedRun:
    """ToolError if the process made no step. Beside its log stands what only this process knows."""
    lines, words = output.splitlines(), last_words(errors or output, process.returncode)
    attempt.drop_empty_logs()
    if not (log := next((path for path in attempt.log_paths if path not in before), None)):
        raise ToolError(f"no run of {attempt.name} began: {words}")
    run = read_log(log)
    others = [path for path, source in run.sources.items()
              if source.sha256 != sha256_of(attempt.texts.get(path, ""))]  # fmt: skip
    if others or attempt.entry not in run.sources:
        raise ToolError(f"{log} names another {', '.join(others) or attempt.entry} than the one "
                        "that ran: its source writes to its own files")  # fmt: skip
    ended = FinishedRun(attempt, seed, run, process.returncode, lines, words, end - began)
    if run.host != host_id():  # an older source makes another hash, some a new one in every run
        log.with_suffix(".host").write_text(host_id(), encoding="utf-8")
    if ended.clock_doubt:
        log.with_suffix(".doubt").write_text(ended.clock_doubt, encoding="utf-8")
    return ended
