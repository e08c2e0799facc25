"""Run the sources of attempts again and again, in an order that a drift of the host cannot bias.

An attempt is a folder: source/ holds the trainer as it was when the attempt began, logs/ one log a
run. Every run starts from a scratch copy of source/, so that editing train_gpt.py while runs go on
changes none of them.
"""

import ast
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory

from tools.cli import ToolError
from tools.runs import Run, find_logs, read_log

ROOT = Path(__file__).resolve().parent.parent
ENTRIES = ("train_gpt.py", "baselines/train_gpt2.py")  # the first is what a checkout is run for
TURNS_HELP = (
    "start each pair of runs at once and let them take turns of so many steps, such as 10: what a "
    "shared host does then falls on both alike (default: one run after the other)"
)


@dataclass
class Attempt:
    """What to run: an attempt's folder, the trainer's flags, and how many processes."""

    folder: Path
    flags: tuple[str, ...] = ()
    processes: int = 1

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def source(self) -> Path:
        return self.folder / "source"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def entry(self) -> str | None:
        """The trainer in source/; None if there is none."""
        return entry_of(self.source)

    @property
    def knows_turns(self) -> bool:
        harness = self.source / "records/harness.py"
        return harness.exists() and "turn_steps" in harness.read_text()

    def command(self, scratch: Path) -> list[str]:
        """The command of a run from a copy of the source in scratch."""
        command = [sys.executable]
        if self.processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc_per_node={self.processes}"]
        slug = self.name.partition("_")[2] or self.name
        return [*command, str(scratch / self.entry), *self.flags, "--slug", slug,
                "--log_dir", str(self.logs), "--source_dir", str(self.source)]  # fmt: skip

    def freeze(self, texts: dict[str, str]) -> None:
        """Write the trainer's files, by path, into source/."""
        for path, text in texts.items():
            (self.source / path).parent.mkdir(parents=True, exist_ok=True)
            (self.source / path).write_text(text)


def entry_of(folder: Path) -> str | None:
    return next((entry for entry in ENTRIES if (folder / entry).exists()), None)


def project_files(folder: Path, entry: str) -> list[str]:
    """The entry file and every module of the project that it imports, as relative paths."""
    found, waiting = [], [entry]
    while waiting:
        path = waiting.pop()
        found.append(path)
        for node in ast.walk(ast.parse((folder / path).read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules = (name.replace(".", "/") + ".py" for name in names)
            waiting += {m for m in modules if (folder / m).exists() and m not in found + waiting}
    return sorted(found)


def source_texts(folder: Path, entry: str) -> dict[str, str]:
    """The project's files in a checkout or a source/, by path."""
    try:
        return {path: (folder / path).read_text() for path in project_files(folder, entry)}
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ToolError(f"{folder} holds a source that is no Python: {error}") from None


def read_origin(origin: Path) -> tuple[dict[str, str], Run | None]:
    """(the project's files by path, a run) of a log, an attempt's folder or a checkout.

    An attempt's is the first sound one. A checkout has none: its logs may be of anything.
    """
    if entry := entry_of(origin):
        return source_texts(origin, entry), None
    runs = [read_log(path) for path in find_logs([origin])]
    if not runs and (entry := entry_of(origin / "source")):
        return source_texts(origin / "source", entry), None
    if not runs:
        trainers = " or ".join(ENTRIES)
        raise ToolError(f"{origin} is neither a log, nor a folder with {trainers}, source/ or logs")
    run = next((run for run in runs if not run.faults), runs[0])
    if run.is_public or run.faults:
        why = "it is of the public speedrun" if run.is_public else run.faults[0][1]
        raise ToolError(f"{run.path} cannot be run again: {why}")
    return {path: source.text for path, source in run.sources.items()}, run


def flags_of(run: Run) -> list[str]:
    """The flags that a run was given, but for those that name the single run."""
    words, kept = json.loads(run.config.get("argv", "[]")), []
    single = {"--seed", "--slug", "--log_dir", "--source_dir", "--declared_runs", "--resume",
              "--turn_steps"}  # fmt: skip
    words = [
        part for word in words for part in (word.split("=", 1) if word[:2] == "--" else [word])
    ]
    while words:
        flag = words.pop(0)
        value = [words.pop(0)] if words and not words[0].startswith("--") else []
        kept += [] if flag in single else [flag, *value]
    return kept


def interleaved(count: int, runs: int) -> Iterator[tuple[int, int]]:
    """(arm, round) for so many rounds: arms 0 1 2, 2 1 0, 0 1 2 ..., which cancels linear drift."""
    for turn in range(runs):
        order = range(count) if turn % 2 == 0 else reversed(range(count))
        yield from ((arm, turn) for arm in order)


@dataclass
class Ended:
    """A run that ended: its attempt and seed, its log (None if it left none), what it printed."""

    attempt: Attempt
    seed: int
    log: Path | None
    code: int
    output: str
    errors: str

    @property
    def last_words(self) -> str:
        """What a failed run said last."""
        lines = (self.errors.strip() or self.output.strip()).splitlines()
        return lines[-1] if lines else f"it exited with {self.code}"

    @property
    def run(self) -> Run:
        """What its log says; ToolError if it left none."""
        if not self.log:
            raise ToolError(f"no run of {self.attempt.folder} began: {self.last_words}")
        return read_log(self.log)


def check_turns(attempts: list[Attempt], turn_steps: int) -> None:
    """ToolError where the attempts cannot begin, or go on, with turns of so many steps."""
    arms = [[read_log(path) for path in find_logs([attempt.folder])] for attempt in attempts]
    for attempt, runs in zip(attempts, arms, strict=True):
        if turn_steps and not attempt.knows_turns:
            raise ToolError(f"the source of {attempt.name} is of before --turns; leave it out")
        if runs and runs[0].turn_steps != turn_steps:
            raise ToolError(f"the runs of {attempt.folder} have turns of {runs[0].turn_steps} "
                            f"steps; go on with --turns {runs[0].turn_steps}")  # fmt: skip
    if turn_steps and len(counts := {len(runs) for runs in arms}) > 1:
        raise ToolError(f"one attempt has {min(counts)} runs, the other {max(counts)}, so a run "
                        "would lack its pair; name new folders")  # fmt: skip


def carry_out(jobs: list[tuple[Attempt, int]], declared: int, turn_steps: int) -> Iterator[Ended]:
    """Run every job (attempt, seed) and tell how it ended.

    One after the other; with turn_steps those two in a row that share a seed take turns.
    """
    groups = (list(pair) for _, pair in groupby(jobs, key=lambda job: job[1]))
    for group in groups if turn_steps else ([job] for job in jobs):
        yield from start(group, declared, turn_steps)


def start(jobs: list[tuple[Attempt, int]], declared: int, turn_steps: int = 0) -> list[Ended]:
    """Run one job, or two that take turns of so many steps; return them in the order they ended.

    Each runs from a scratch copy of its source, and its log lands in its attempt's logs/. On ctrl-C
    the runs get it too, SIGTERM is passed on; they then end their logs by themselves.
    """
    before = {path for attempt, _ in jobs for path in find_logs([attempt.folder])}
    with ExitStack() as stack:
        scratches = [Path(stack.enter_context(TemporaryDirectory(prefix="photofinish_")))
                     for _ in jobs]  # fmt: skip
        for (attempt, _), scratch in zip(jobs, scratches, strict=True):
            stage(attempt.source, scratch)
        ends = [stack.enter_context(end) for end in socket.socketpair()]
        ends[1].send(b"1")  # the first turn is the first job's
        pool, ended = stack.enter_context(ThreadPoolExecutor()), {}
        try:
            for (attempt, seed), scratch, end in zip(jobs, scratches, ends, strict=False):
                turns = [f"--turn_steps={turn_steps}"] if turn_steps else []
                process = subprocess.Popen(
                    [*attempt.command(scratch), f"--seed={seed}", f"--declared_runs={declared}",
                     *turns], env=os.environ | git_places(scratch), text=True,
                    stdin=end if turns else None, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                )  # fmt: skip
                ended[pool.submit(process.communicate)] = process, attempt, seed
            for end in ends:
                end.close()
            return [ended_run(*ended[future], *future.result(), before)
                    for future in as_completed(ended)]  # fmt: skip
        except BaseException as stop:
            if type(stop) is not KeyboardInterrupt:  # of which the runs know
                for process, *_ in ended.values():
                    process.terminate()
            raise


def ended_run(process, attempt: Attempt, seed: int, output: str, errors: str, before) -> Ended:
    log = next((path for path in find_logs([attempt.folder]) if path not in before), None)
    return Ended(attempt, seed, log, process.returncode, output, errors)


def git_places(scratch: Path) -> dict[str, str]:
    """Variables by which git compares the scratch copy with this checkout's last commit."""
    if not shutil.which("git"):
        return {}
    git = subprocess.run(["git", "rev-parse", "--absolute-git-dir"], cwd=ROOT,
                         capture_output=True, text=True)  # fmt: skip
    return {"GIT_DIR": git.stdout.strip(), "GIT_WORK_TREE": str(scratch)} if git.stdout else {}


def stage(source: Path, scratch: Path) -> None:
    """Make scratch a folder from which source runs: its files, and links to the data."""
    shutil.copytree(source, scratch, dirs_exist_ok=True)
    for folder in (ROOT / "data").iterdir():
        if folder.is_dir() and folder.name != "__pycache__":
            (scratch / "data" / folder.name).symlink_to(folder)
