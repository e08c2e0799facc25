"""The one reader of logs: photofinish's own, and those of the public 8xH100 speedrun.

`read_log` parses a log once, into a LoggedRun; its `faults` say where the log is damaged or
contradicts itself. Nothing here imports torch, so a comparison takes a second.
"""

import difflib
import gzip
import hashlib
import json
import math
import os
import re
import zlib
from dataclasses import dataclass, field
from datetime import datetime
from itertools import chain, pairwise
from pathlib import Path

from tools.cli import InvalidLog, ToolError
from tools.sources import find_source, lines_of, sha256_of

LINE_SECTIONS = ("config", "environment", "data", "run")  # the others are text, counted in lines
SINGLE_RUN_FLAGS = {"--seed", "--slug", "--log_dir", "--source_dir", "--declared_runs", "--resume",
                    "--turn_steps", "--cpu_dtype"}  # fmt: skip


def flag_pairs(words: list[str]) -> list[tuple[str, str]]:
    """(--name, value) of each flag of a command, given as --name=value or --name value."""
    pairs = []
    for word, following in pairwise([*words, ""]):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            pairs.append((name, value if equals else following))
    return pairs


def logged_flags(argv: str) -> list[tuple[str, str]]:
    """flag_pairs of a log's line argv; ValueError unless it is a list of words."""
    words = json.loads(argv)
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError("not a list of words")
    return flag_pairs(words)


CONFIG_TYPES = {
    "utc": datetime.fromisoformat,
    "seed": int,
    "target_val_loss": float,
    "declared_runs": int,
    "turn_steps": int,
    "vocab_size": int,
    "argv": logged_flags,
}
PUBLIC_RULE = "=" * 100 + "\n"  # between the source, the environment and the steps of a public log
LOGS, NO_LOGS = (".txt", ".log", ".txt.gz"), "metadata.txt"  # that is beside public logs
REWRITTEN = {  # what a log is that no longer holds the bytes that its run wrote
    rb"\A(\xff\xfe|\xfe\xff|.?\0)": "it is in UTF-16",
    rb"\A\xef\xbb\xbf": "it begins with a byte order mark",
    rb"===\r\n": "its lines end in CRLF",
}


@dataclass
class Source:
    sha256: str
    text: str
    kept: Path | None = None  # where it stands, if outside the log


@dataclass
class LoggedRun:
    """The contents of one log. Times are milliseconds of train time, losses nats per token."""

    path: Path
    is_public: bool = False
    sources: dict[str, Source] = field(default_factory=dict)
    config: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    data: list[str] = field(default_factory=list)
    train_curve: list[tuple[int, float, float]] = field(default_factory=list)  # step, ms, loss
    val_curve: list[tuple[int, float, float]] = field(default_factory=list)
    ledger: dict[str, float] = field(default_factory=dict)  # seconds by account
    calibrations: list[float] = field(default_factory=list)  # TFLOP/s of a matmul
    warnings: list[str] = field(default_factory=list)
    foreign_modules: str = ""  # from outside the project and the installed packages
    result: dict[str, str] = field(default_factory=dict)
    faults: list[tuple[int, str]] = field(default_factory=list)  # (line number, what)

    @property
    def finished(self) -> bool:
        return self.result.get("status") in ("success", "missed")

    @property
    def started(self) -> tuple[str, str]:
        """A key that sorts runs by their start; logs without a date come first."""
        return self.config.get("utc", ""), self.path.name

    @property
    def name(self) -> str:
        """Unique to this run."""
        return self.config.get("run", str(self.path))

    @property
    def seed(self) -> str:
        return self.config.get("seed", "unknown")

    @property
    def flags(self) -> list[tuple[str, str]]:
        """(--name, value) of each flag of its command."""
        return logged_flags(self.config.get("argv", "[]"))

    @property
    def shared_flags(self) -> list[str]:
        """Its flags in single words, without those that name the single run."""
        return [word for pair in self.flags if pair[0] not in SINGLE_RUN_FLAGS for word in pair]

    @property
    def source_texts(self) -> dict[str, str]:
        return {path: source.text for path, source in self.sources.items()}

    @property
    def steps(self) -> int:
        return self.val_curve[-1][0] if self.val_curve else 0

    @property
    def train_s(self) -> float:
        return self.val_curve[-1][1] / 1000 if self.val_curve else math.nan

    @property
    def val_loss(self) -> float:
        return self.val_curve[-1][2] if self.val_curve else math.nan

    @property
    def target(self) -> float:
        return float(self.config.get("target_val_loss", "nan"))

    @property
    def host(self) -> str:
        return self.environment.get("host", "unknown")

    @property
    def turn_steps(self) -> int:
        """Steps per turn of the two runs of a pair; 0 if it ran alone."""
        return int(self.config.get("turn_steps", 0))

    @property
    def machine_class(self) -> str:
        """Times are ranked within one class: machine, dtype of matmuls, turns."""
        turns = f", in turns of {self.turn_steps} steps" if self.turn_steps else ""
        return f"{self.machine}, {self.environment.get('matmul_dtype', 'unknown')}{turns}"

    @property
    def machine(self) -> str:
        """Device and count."""
        env = self.environment
        count = f"{env.get('world_size', '?')}x "
        if "gpu0" not in env:
            count = f"{env.get('threads', '?')} threads of "
        return f"{count}{env.get('device', 'unknown')}"

    @property
    def task(self) -> dict[str, str]:
        """What the loss is measured on; losses on different tasks are never compared."""
        hashes = [line.split()[1] for line in self.data if line.startswith("data_sha256: ")]
        names = ("val_tokens", "val_seq_len", "val_spread", "vocab_size")
        own = {name: self.config.get(name, "unknown") for name in names}
        return {"data": hashes[0] if hashes else "unknown", **own}

    def number(self, name: str) -> float:
        """A figure of the result line without its unit; nan if it is missing."""
        found = re.match(r"[-+]?\d+\.?\d*(?:e[-+]?\d+)?", self.result.get(name, ""), re.I)
        return float(found[0]) if found else math.nan


def read_log(path: Path) -> LoggedRun:
    """Parse a log of one run, with its faults in LoggedRun.faults; InvalidLog if it is none."""
    run, *others = read_runs(path)
    if others:
        raise InvalidLog(path, 0, f"it holds {1 + len(others)} runs, not one")
    return run


def read_runs(path: Path) -> list[LoggedRun]:
    """The runs of a log; some public ones hold many, one after the other."""
    if os.path.lexists(path) and not path.is_file():
        raise InvalidLog(path, 0, "is a folder, a pipe, a device or a broken link; move it away")
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        for mark, what in REWRITTEN.items():
            if re.search(mark, data):
                raise InvalidLog(path, 1, f"{what}, as of Windows; copy it again, byte for byte")
        text = data.decode()
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise InvalidLog(path, 0, "is no whole gzip file; copy it again") from None
    except OSError as error:
        raise ToolError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InvalidLog(path, line, "cannot be read: this is no UTF-8 text") from None
    if text.startswith("=== source "):
        run, noted = OwnLog(path, text).run, path.with_suffix(".host")
        if noted.exists():  # by race.py, which knows better where it ran
            run.environment["host"] = noted.read_text(encoding="utf-8")
        return [run]
    if PUBLIC_RULE in text:
        return read_public_log(path, text)
    if re.match(r"s:0 t[er]l:", text):
        raise InvalidLog(path, 1, "a log of llm.c (s:... tel:...), which has no times to compare")
    raise InvalidLog(path, 1, "neither a log of train_gpt.py nor one of the public speedrun")


def find_logs(path: Path) -> list[Path]:
    """A log itself, or the logs of a folder, or of the folder logs/ in it.

    FOLDER/PATTERN, such as "records/x/baseline*", is that part of a folder, without hidden files.
    """
    if not path.is_dir():
        found = [] if path.exists() else path.parent.glob(path.name)
        return sorted(log for log in found if log.name[0] != ".") or [path]
    folder = path / "logs" if (path / "logs").is_dir() else path
    logs = (log for log in folder.iterdir() if log.name.endswith(LOGS))
    return sorted(log for log in logs if log.name[0] != "." and log.name != NO_LOGS)


def read_arm(path: Path) -> list[LoggedRun]:
    """All runs of a log or a folder, in the order in which they began."""
    logs = find_logs(path)
    if not logs:
        raise ToolError(f"{path} holds no logs (*.txt); give a log, or a folder of logs")
    return sorted(chain(*map(read_runs, logs)), key=lambda run: run.started)


class OwnLog:
    """One pass over the lines of a log of train_gpt.py."""

    def __init__(self, path: Path, text: str):
        self.run, self.lines, self.at = LoggedRun(path), text.split("\n"), 0
        self.hash, self.checked, self.changed = hashlib.sha256(), 0, False
        self.section, self.seen = "", set()  # headings, and keys by section
        cut_short = bool(self.lines.pop())  # what stands after the last line end
        while self.at < len(self.lines):
            counted = 0
            try:
                counted = self.read_line(self.lines[self.at])
            except (ValueError, IndexError, KeyError):
                self.fault(f"cannot be read: {self.lines[self.at][:60]}")
            self.take(1 + counted)
        if cut_short or not self.run.result:
            self.fault("the log ends without a result line: the run was killed, or the log cut")

    def fault(self, what: str) -> None:
        self.run.faults.append((self.at + 1, what))

    def take(self, count: int) -> None:
        taken = self.lines[self.at : self.at + count]
        self.hash.update("".join(f"{line}\n" for line in taken).encode())
        self.at += len(taken)

    def read_line(self, line: str) -> int:
        """Read one line; return how many of those below it were read with it."""
        if line.startswith("=== ") and line.endswith(" ==="):
            return self.open_section(line)
        if line.startswith("check: "):
            self.require_hash(self.hash.hexdigest().startswith(line.split()[1]))
        elif line.startswith("result "):
            self.read_result(line)
        else:
            self.read_entry(line)
        return 0

    def open_section(self, heading: str) -> int:
        """Read a heading and the lines that it counts; return their number."""
        words = heading[4:-4].split()
        self.section, attributes = words[0], dict(w.split(":", 1) for w in words if ":" in w)
        is_elsewhere = "kept" in attributes  # and has no lines here
        count = 0 if is_elsewhere else max(0, int(attributes.get("lines", 0)))
        if self.section == "source":
            self.read_source_section(words[1], attributes, count)
        elif self.section not in ("git", *LINE_SECTIONS):
            self.fault(f"unknown section {self.section}")
        self.require_first(words[1] if self.section == "source" else self.section, "section")
        return count

    def require_first(self, name: str, what: str) -> None:
        """A fault where a log gives something twice: a reader may see the one, a tool the other."""
        if (name, what) in self.seen:
            self.fault(f"a second {what} {name}")
        self.seen.add((name, what))

    def read_source_section(self, path: str, attributes: dict[str, str], count: int) -> None:
        digest = attributes.get("sha256", "")
        text = "".join(f"{line}\n" for line in self.lines[self.at + 1 : self.at + 1 + count])
        kept = None
        if "kept" in attributes:
            named = Path(os.path.normpath(self.run.path.parent / attributes["kept"]))
            try:
                kept, text = find_source(self.run.path, named, path, digest)
            except (OSError, ToolError) as error:
                return self.fault(f"the source {path} is not at {named}: {error}")
        self.run.sources[path] = Source(digest, text, kept)
        if sha256_of(text) != digest:
            where = kept or f"lines {self.at + 2} to {self.at + 1 + count}"
            self.fault(f"the source {path} ({where}) is not what its sha256 says")

    def require_hash(self, fits: bool) -> None:
        """A fault if the hash of all lines so far does not fit, the first time."""
        if not self.changed and not fits:
            self.fault(f"of the lines {self.checked + 1} to {self.at + 1} at least one was changed")
            self.changed = True
        self.checked = self.at + 1

    def read_result(self, line: str) -> None:
        self.run.result = dict(w.split(":", 1) for w in line.split()[1:] if ":" in w)
        if self.run.config.get("schema") != "1":
            self.hash.update(line.rpartition(" sha256:")[0].encode())
        self.require_hash(self.run.result.get("sha256") == self.hash.hexdigest())
        if self.at != len(self.lines) - 1:
            self.fault("lines follow the result")

    def read_entry(self, line: str) -> None:
        run, key, value = self.run, *line.partition(": ")[::2]
        if self.section in ("config", "environment"):
            self.require_first(key, "line of")
        if self.section == "config":
            CONFIG_TYPES.get(key, str)(value)  # a ValueError makes the line a fault
            run.config[key] = value
        elif self.section == "environment":
            run.environment[key] = value
        elif self.section == "data":
            run.data.append(line)
        elif line.startswith("step:"):
            self.read_step(line)
        elif key == "ledger":
            accounts = (word.split(":") for word in value.split())
            run.ledger = {name: float(seconds.rstrip("s")) for name, seconds in accounts}
        elif key == "calibration":
            rates = dict(word.split(":") for word in value.split())
            run.calibrations.append(float(rates["matmul_tflops"]))
        elif key == "foreign_modules":
            run.foreign_modules = value.removesuffix("none")
        elif key == "warning":
            run.warnings.append(value)

    def read_step(self, line: str) -> None:
        found = STEP.match(line)
        if not found:
            return self.fault(f"not a step line: {line[:60]}")
        step, kind, loss, ms = int(found[1]), found[2], float(found[3]), float(found[4])
        curve = self.run.val_curve if kind == "val" else self.run.train_curve
        if curve and (step <= curve[-1][0] or ms < curve[-1][1]):
            self.fault("steps or train times do not rise")
        curve.append((step, ms, loss))


STEP = re.compile(r"step:(\d+)/\d+ (val|train)_loss:(\S+) train_time:(\d+)ms")

PUBLIC_STEP = re.compile(
    r"^step:(\d+)/\d+ (?:(val|train)_loss:(\S+) )?(?:\w+:\S+ )*?train_time:([\d.]+)(m?s)\b", re.M
)


def read_public_log(path: Path, text: str) -> list[LoggedRun]:
    """A log of the public speedrun: source, environment and steps between rules of 100 signs.

    It names neither host, seed, hyperparameters nor hashes. The run's name stands in the source and
    is left out here. Times are milliseconds, or seconds with a decimal point. Where the steps fall
    another run begins. One that ends with a validation is whole, though it had planned more steps.
    """
    source, *between, rest = text.split(PUBLIC_RULE)
    system = "\n".join(between) or rest  # older logs have one rule only, after the source
    source = re.sub(r"^(\s*run_id\b[^=\n]*= *)([\"']).*?\2", r"\1...", source, flags=re.M)
    found, last = [], math.inf
    for step, kind, loss, time, unit in PUBLIC_STEP.findall(rest):
        if int(step) < last:
            found.append(LoggedRun(path, is_public=True))
        last, run = int(step), found[-1]
        curve = run.val_curve if kind == "val" else run.train_curve
        ms = float(time) * (1 if unit == "ms" else 1000)
        curve.append((last, ms, float(loss or "nan")))
        run.result["status"] = "missed" if kind == "val" else "aborted"
    if not all(run.val_curve for run in found) or not found:
        raise InvalidLog(path, text.count("\n") + 1, "the log has no line with val_loss")
    environment = {}
    if version := re.search(r"Running PyTorch (\S+)", system, re.I):
        environment["torch"] = version[1]
    gpus = re.findall(r"NVIDIA ([A-Z]+\d+[^|]*?)\s{2,}", system)
    if named := re.search(r"device_name=NVIDIA (.+) with world_size=(\d+)", system):
        gpus = [named[1]] * int(named[2])
    if gpus:
        environment |= {"device": gpus[0], "gpu0": gpus[0], "world_size": str(len(gpus))}
    memory = re.search(r"peak memory \w+: (\d+) MiB", rest)
    for number, run in enumerate(found, 1):
        run.sources = {"train_gpt.py": Source(sha256_of(source), source)}
        run.environment = environment
        run.config = {"run": f"{path} run {number}"} if len(found) > 1 else {}
        run.result |= {"peak_memory": f"{memory[1]}MiB"} if memory else {}
    return found


def source_changes(a: LoggedRun, b: LoggedRun) -> dict[str, tuple[int, int]]:
    """(lines added, lines removed) from a to b, by path of each source that differs."""
    counts = {}
    for path in sorted(a.sources.keys() | b.sources.keys()):
        lines = source_diff(a, b, path)[2:]  # without the names of the files
        added, removed = (sum(line[0] == sign for line in lines) for sign in "+-")
        if added or removed:
            counts[path] = added, removed
    return counts


def source_diff(a: LoggedRun, b: LoggedRun, path: str) -> list[str]:
    """The lines of a unified diff of one source from a to b."""
    texts = [run.sources[path].text if path in run.sources else "" for run in (a, b)]
    if texts[0] == texts[1]:
        return []
    lines = [[line.rstrip("\n") for line in lines_of(text)] for text in texts]
    return list(difflib.unified_diff(*lines, f"A/{path}", f"B/{path}", lineterm=""))


RUN_BOUND = ("schema", "utc", "argv", "run", "seed", "slug", "log_dir", "source_dir", "cpu_dtype",
             "declared_runs", "save_every", "resume", "other_source", "rank_timeout_s",
             "overrides")  # fmt: skip


def config_changes(a: LoggedRun, b: LoggedRun) -> dict[str, tuple[str, str]]:
    """Hyperparameters and options that differ, except those that name a single run."""
    return changes(a.config, b.config, RUN_BOUND)


def environment_changes(a: LoggedRun, b: LoggedRun) -> dict[str, tuple[str, str]]:
    return changes(a.environment, b.environment, ("load_average", "bf16_gain"))


def changes(a: dict[str, str], b: dict[str, str], but_for=()) -> dict[str, tuple[str, str]]:
    pairs = {k: (a.get(k, "none"), b.get(k, "none")) for k in a | b if k not in but_for}
    return {k: pair for k, pair in pairs.items() if pair[0] != pair[1]}
