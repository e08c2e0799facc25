"""A run's log: one text file for people and programs, hashed as it is written line by line.

Sections `=== name ===` come in the order source, config, environment, git, data, run. The last one
has lines `step:N/M train_loss:X train_time:Yms`, `step:N/M val_loss:X train_time:Yms
step_avg:Zms`, and named ones such as `calibration:` and `ledger:`. The line `result ...` ends with
the sha256 of everything before it. Lines `check:` hold the first digits of the hash so far, which
tell where a log was changed. Losses are nats per token; a trainer's train_loss may weigh further
targets in.
"""

import fcntl
import hashlib
import json
import os
import sys
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import torch
from tqdm import tqdm

from referee.checkpoints import delete_parts
from referee.environment import ROOT, environment, shell
from referee.flags import RunError, as_flag
from referee.sources import GIT, read_source, sha256_of

SILENCE_S = 9  # a run that has printed nothing for so long says what it does
SCHEMA = 2  # in 1 the hash left out the result line itself


class Log:
    """One run's log. It writes nothing until it is opened, on rank 0 alone."""

    def __init__(self, folder: str, name: str, num_steps: int):
        self.path = Path(folder or ROOT / "logs") / f"{name}.txt"
        self.hash, self.num_steps = hashlib.sha256(), num_steps
        self.file = self.bar = None
        self.began = self.spoke = time.monotonic()
        self.doing, self.closed = "setting up", threading.Event()

    def open(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("x", buffering=1, encoding="utf-8")
            with suppress(OSError):  # on file systems without locks
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # while this run lives
        except KeyboardInterrupt:  # or SIGTERM, before the first line
            self.path.unlink(missing_ok=True)
            raise
        except OSError as error:
            raise self.failure(error) from None
        delete_parts(self.path.parent)
        if sys.stderr.isatty():
            self.bar = tqdm(total=self.num_steps, unit="step", dynamic_ncols=True, leave=False)
        threading.Thread(target=self.break_silence, daemon=True).start()

    def break_silence(self) -> None:
        """Until the log is closed, print what the run does whenever it has been silent."""
        while not self.closed.wait(max(0.0, self.spoke + SILENCE_S - time.monotonic())):
            if (now := time.monotonic()) < self.spoke + SILENCE_S:
                continue
            self.spoke, bar = now, self.bar
            with suppress(OSError):
                if bar is not None:
                    bar.refresh()
                else:  # without a lock of Python's, which would break an exit meanwhile
                    os.write(2, f"[{now - self.began:.0f} s] {self.doing}\n".encode())

    def line(self, text: str, show: bool = False) -> None:
        """Append text, and print it with show."""
        if self.file is None:
            return
        try:
            self.file.write(text + "\n")
        except OSError as error:
            raise self.failure(error) from None
        self.hash.update(text.encode() + b"\n")
        if show:
            self.show(text)

    def failure(self, error: OSError) -> RunError:
        return RunError(f"cannot write {self.path}: {error.strerror}; make room, or give --log_dir")

    def show(self, text: str) -> None:
        """Print text. A closed terminal, or a pipe that nobody reads, does not end a run."""
        if self.file is None:
            return
        self.spoke = time.monotonic()
        try:
            tqdm.write(text) if self.bar is not None else print(text, flush=True)
        except OSError:
            self.bar = None
            silence(sys.stdout)

    def section(self, name: str, lines=()) -> None:
        for text in (f"=== {name} ===", *lines):
            self.line(text)
        self.check()

    def check(self) -> None:
        self.line(f"check: {self.hash.hexdigest()[:12]}")

    def progress(self, step: int, text: str) -> None:
        self.doing = f"step {step}/{self.num_steps}: {text}"
        if self.bar is None:
            return
        try:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step - self.bar.n)
        except OSError:
            self.bar = None
            silence(sys.stderr)

    def close(self, result: str | None = None, show: bool = True) -> None:
        """End the file, with the result line and the hash over everything before that hash."""
        self.closed.set()
        if self.bar is not None:
            with suppress(OSError):
                self.bar.close()
            self.bar = None
        if self.file is not None and not self.file.closed:
            try:
                if result is not None:
                    self.hash.update(f"result {result}".encode())
                    self.line(f"result {result} sha256:{self.hash.hexdigest()}", show)
            finally:
                self.file.close()


def silence(stream) -> None:
    """Discard what is written to a stream from here on, and what its buffer holds."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def write_header(log, sources: dict[str, str], source_dir: str, config: dict, device: dict) -> None:
    """Write the sections above the data: sources, config, environment, git state.

    sources: text by path; config and device: one line per key.
    """
    for path, text in sources.items():
        lines = text[:-1].split("\n")
        heading = f"source {path} lines:{len(lines)} sha256:{sha256_of(text)}"
        if source_dir:
            kept = Path(source_dir, path)
            if not kept.exists() or read_source(kept) != text:
                raise RunError(f"{kept} is not the source that runs; give another --source_dir")
            log.section(f"{heading} kept:{os.path.relpath(kept, log.path.parent)}")
        else:
            log.section(heading, lines)
    utc = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")  # the order of runs
    config = {"schema": SCHEMA, "utc": utc, "argv": json.dumps(sys.argv[1:]), **config}
    log.section("config", [f"{key}: {as_flag(value)}" for key, value in config.items()])
    entries = {**device, **environment(on_gpu=torch.cuda.is_available())}
    log.section("environment", [f"{key}: {value}" for key, value in entries.items()])
    # A copy of the project inside another repository has no commit of its own.
    commit = (shell(*GIT, "ls-files", *sources) and shell(*GIT, "rev-parse", "HEAD")) or "none"
    changed = shell(*GIT, "diff", "--relative", "--name-only", "HEAD", "--", *sources).split()
    diff = []
    if changed and not source_dir:
        diff = shell(*GIT, "diff", "--relative", "HEAD", "--", *changed).splitlines()
    changed = ",".join(changed) or "none"
    log.section(f"git commit:{commit} changed:{changed} lines:{len(diff)}", diff)
