"""Run the sources of attempts again and again, in an order that a drift of the host cannot bias.

An attempt is a folder: source/ holds the trainer as it was when the attempt began, logs/ one log a
run. Every run starts from a scratch copy of source/, so that editing train_gpt.py while runs go on
changes none of them.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runs import Run, find_logs, read_log
from tool import Terminated, ToolError

ROOT = Path(__file__).resolve().parent.parent
ENTRY = "train_gpt.py"


@dataclass
class Attempt:
    """What to run: an attempt's folder, the trainer's flags, and how many processes."""

    folder: Path
    flags: tuple[str, ...] = ()
    processes: int = 1

    @property
    def source(self) -> Path:
        return self.folder / "source"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    def freeze(self, texts: dict[str, str]) -> None:
        """Write the trainer's files, by path, into source/."""
        for path, text in texts.items():
            (self.source / path).parent.mkdir(parents=True, exist_ok=True)
            (self.source / path).write_text(text)


def project_files(folder: Path) -> list[str]:
    """The entry file and every module of the project that it imports, as relative paths."""
    found, waiting = [], [ENTRY]
    while waiting:
        path = waiting.pop()
        found.append(path)
        for node in ast.walk(ast.parse((folder / path).read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules = (name.replace(".", "/") + ".py" for name in names)
            waiting += {m for m in modules if (folder / m).exists() and m not in found + waiting}
    return sorted(found)


def source_texts(folder: Path) -> dict[str, str]:
    """The project's files in a checkout or a source/, by path."""
    try:
        return {path: (folder / path).read_text() for path in project_files(folder)}
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ToolError(f"{folder} holds a source that is no Python: {error}") from None


def read_origin(origin: Path) -> tuple[dict[str, str], Run | None]:
    """(the project's files by path, a run) of a log, an attempt's folder or a checkout.

    An attempt's is the first sound one. A checkout has none: its logs may be of anything.
    """
    if (origin / ENTRY).exists():
        return source_texts(origin), None
    runs = [read_log(path) for path in find_logs([origin])]
    if not runs and (origin / "source" / ENTRY).exists():
        return source_texts(origin / "source"), None
    if not runs:
        raise ToolError(f"{origin} is neither a log, nor a folder with {ENTRY}, source/ or logs")
    run = next((run for run in runs if not run.faults), runs[0])
    if run.is_public or run.faults:
        why = "it is of the public speedrun" if run.is_public else run.faults[0][1]
        raise ToolError(f"{run.path} cannot be run again: {why}")
    return {path: source.text for path, source in run.sources.items()}, run


def flags_of(run: Run) -> list[str]:
    """The flags that a run was given, but for those that name the single run."""
    words, kept = json.loads(run.config.get("argv", "[]")), []
    single = {"--seed", "--slug", "--log_dir", "--source_dir", "--declared_runs", "--resume"}
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


def start(attempt: Attempt, seed: int, slug: str, declared: int) -> subprocess.CompletedProcess:
    """One run of an attempt, from a scratch copy of its source; the log lands in its logs/.

    On ctrl-C the run gets it too, SIGTERM is passed on; it then ends its log by itself.
    """
    with tempfile.TemporaryDirectory(prefix="photofinish_") as scratch:
        stage(attempt.source, Path(scratch))
        command = [sys.executable]
        if attempt.processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc_per_node={attempt.processes}"]
        command += [str(Path(scratch, ENTRY)), *attempt.flags, "--seed", str(seed), "--slug", slug,
                    "--log_dir", str(attempt.logs), "--declared_runs", str(declared),
                    "--source_dir", str(attempt.source)]  # fmt: skip
        process = subprocess.Popen(command, env=os.environ | git_places(scratch), text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
        try:
            output = process.communicate()
        except KeyboardInterrupt as stop:
            if isinstance(stop, Terminated):
                process.terminate()
            process.communicate()
            raise
        return subprocess.CompletedProcess(command, process.returncode, *output)


def git_places(scratch: str) -> dict[str, str]:
    """Variables by which git compares the scratch copy with this checkout's last commit."""
    if not shutil.which("git"):
        return {}
    git = subprocess.run(["git", "rev-parse", "--absolute-git-dir"], cwd=ROOT,
                         capture_output=True, text=True)  # fmt: skip
    return {"GIT_DIR": git.stdout.strip(), "GIT_WORK_TREE": scratch} if git.stdout else {}


def stage(source: Path, scratch: Path) -> None:
    """Make scratch a folder from which source runs: its files, and links to the data."""
    shutil.copytree(source, scratch, dirs_exist_ok=True)
    for folder in (ROOT / "data").iterdir():
        if folder.is_dir() and folder.name != "__pycache__":
            (scratch / "data" / folder.name).symlink_to(folder)


def last_words(done: subprocess.CompletedProcess) -> str:
    """What a failed run said last."""
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return lines[-1] if lines else f"it exited with {done.returncode}"
