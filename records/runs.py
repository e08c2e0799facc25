"""The one reader of logs: photofinish's own, and those of the public 8xH100 speedrun.

A log is parsed once into a Run; `faults` says what is wrong with it, `ineligible` why it is no
record. Nothing here imports torch: a comparison answers in a second.
"""

import difflib
import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

KEPT_SECTIONS = ("config", "environment", "git", "data", "run")
RESULT_FIELDS = "status val_loss target train_time steps tokens seed overrides resumed_from sha256"
PUBLIC_RULE = "=" * 100  # between the source, the environment and the steps of a public log


class InvalidLog(Exception):
    """What is wrong with which line of which log."""

    def __init__(self, path, line: int, what: str):
        super().__init__(f"{path}:{line}: {what}")


@dataclass
class Source:
    sha256: str
    text: str
    kept: Path | None = None  # where it stands, if outside the log


@dataclass
class Run:
    """What one log says. Times are milliseconds of train time, losses nats a token."""

    path: Path
    is_public: bool = False
    sources: dict[str, Source] = field(default_factory=dict)
    config: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    git: dict[str, str] = field(default_factory=dict)
    data: list[str] = field(default_factory=list)
    train_curve: list[tuple[int, float, float]] = field(default_factory=list)  # step, ms, loss
    val_curve: list[tuple[int, float, float]] = field(default_factory=list)
    ledger: dict[str, float] = field(default_factory=dict)  # seconds by account
    calibrations: list[dict[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    result: dict[str, str] = field(default_factory=dict)
    faults: list[tuple[int, str]] = field(default_factory=list)  # (line number, what)

    @property
    def finished(self) -> bool:
        return self.result.get("status") in ("success", "missed")

    @property
    def seed(self) -> str:
        return self.config.get("seed", "unknown")

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
    def hardware(self) -> str:
        """The class within which times may be ranked: device, count, arithmetic."""
        env = self.environment
        count = f"{env.get('world_size', '?')}x "
        if "CPU" in env.get("matmul_dtype", "") or "gpu0" not in env:
            count = f"{env.get('threads', '?')} threads of "
        return f"{count}{env.get('device', 'unknown')}, {env.get('matmul_dtype', 'unknown')}"

    @property
    def data_hash(self) -> str:
        return next((d.split()[1] for d in self.data if d.startswith("data_sha256:")), "unknown")

    def number(self, name: str) -> float:
        """A figure of the result line, without its unit; nan where it is missing or unknown."""
        found = re.match(r"[-+.\deE]+", self.result.get(name, ""))
        return float(found[0]) if found else math.nan


def read_log(path: Path) -> Run:
    """Parse one log; its faults stand in Run.faults. Raises InvalidLog if it is no log at all."""
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidLog(path, 1, f"cannot be read as UTF-8 text ({error})") from None
    if text.startswith("=== source "):
        return OwnLog(path, text).run
    if PUBLIC_RULE in text:
        return read_public_log(path, text)
    raise InvalidLog(path, 1, "neither a log of train_gpt.py nor one of the public speedrun")


def find_logs(paths: list[Path]) -> list[Path]:
    """The logs among files and folders; a folder may be an attempt, whose logs/ then counts."""
    found = []
    for path in paths:
        if path.is_dir():
            folder = path / "logs" if (path / "logs").is_dir() else path
            found += sorted(p for p in folder.iterdir() if p.suffix in (".txt", ".log"))
        else:
            found.append(path)
    return found


def read_arm(path: Path) -> list[Run]:
    """All runs of a log or a folder, in the order in which they began."""
    logs = find_logs([path])
    if not logs:
        raise InvalidLog(path, 0, "holds no logs (*.txt); give a log, or a folder of logs")
    return sorted((read_log(p) for p in logs), key=lambda r: (r.config.get("utc", ""), r.path.name))


class OwnLog:
    """One pass over the lines of a log of train_gpt.py."""

    def __init__(self, path: Path, text: str):
        self.run, self.lines, self.at = Run(path), text.split("\n"), 0
        self.hash, self.checked, self.changed = hashlib.sha256(), 0, False
        cut_short = bool(self.lines.pop())  # what stands after the last line end
        section = ""
        while self.at < len(self.lines):
            line = self.lines[self.at]
            if line.startswith("=== ") and line.endswith(" ==="):
                section = self.open_section(line)
                continue
            if line.startswith("check: "):
                self.compare_check(line.split()[1])
            elif line.startswith("result "):
                self.read_result(line)
            else:
                self.read_line(section, line)
            self.take(line)
        if cut_short or not self.run.result:
            self.fault("the log ends without a result line: the run was killed, or the log cut")
        self.check_consistency()

    def fault(self, what: str) -> None:
        self.run.faults.append((self.at + 1, what))

    def take(self, line: str) -> None:
        self.hash.update(line.encode() + b"\n")
        self.at += 1

    def open_section(self, heading: str) -> str:
        """Read a heading, and the lines that it counts; return the section's name."""
        words = heading[4:-4].split()
        name, attributes = words[0], dict(w.split(":", 1) for w in words if ":" in w)
        count = count_of(attributes)
        if name == "source":
            self.read_source(words[1], attributes, count)
        elif name == "git":
            self.run.git = attributes
            self.read_git_diff(count_of(attributes))
        elif name not in KEPT_SECTIONS:
            self.fault(f"unknown section {name}")
        for line in self.lines[self.at : self.at + 1 + count]:
            self.take(line)
        return name

    def read_source(self, path: str, attributes: dict[str, str], count: int) -> None:
        digest = attributes.get("sha256", "")
        text = "".join(f"{line}\n" for line in self.lines[self.at + 1 : self.at + 1 + count])
        kept = self.run.path.parent / attributes["kept"] if "kept" in attributes else None
        if kept is not None:
            try:
                text = kept.read_text()
            except OSError:
                self.fault(f"the source {path} is not at {kept}")
        self.run.sources[path] = Source(digest, text, kept)
        if hashlib.sha256(text.encode()).hexdigest() != digest:
            where = kept or f"lines {self.at + 2} to {self.at + 1 + count}"
            self.fault(f"the source {path} ({where}) is not what its sha256 says")

    def read_git_diff(self, count: int) -> None:
        """Which sources differ from the commit, where the heading of an older log does not say."""
        diff = self.lines[self.at + 1 : self.at + 1 + count]
        changed = [p for p in self.run.sources if f"+++ b/{p}" in diff]
        self.run.git.setdefault("changed", ",".join(changed) or "none")

    def compare_check(self, digest: str) -> None:
        if not self.changed and not self.hash.hexdigest().startswith(digest):
            self.fault(f"of the lines {self.checked + 1} to {self.at + 1} at least one was changed")
            self.changed = True
        self.checked = self.at + 1

    def read_result(self, line: str) -> None:
        self.run.result = dict(w.split(":", 1) for w in line.split()[1:] if ":" in w)
        if not self.changed and self.run.result.get("sha256") != self.hash.hexdigest():
            self.fault(f"of the lines {self.checked + 1} to {self.at + 1} at least one was changed")
        if self.at != len(self.lines) - 1:
            self.fault("lines follow the result")
        missing = [name for name in RESULT_FIELDS.split() if name not in self.run.result]
        if missing and self.run.val_curve:
            self.fault(f"the result lacks {', '.join(missing)}")

    def read_line(self, section: str, line: str) -> None:
        run, key, value = self.run, *line.partition(": ")[::2]
        if section == "config":
            run.config[key] = value
        elif section == "environment":
            run.environment[key] = value
        elif section == "data":
            run.data.append(line)
        elif line.startswith("step:"):
            self.read_step(line)
        elif key == "ledger":
            accounts = (word.split(":") for word in value.split())
            run.ledger = {name: float(seconds.rstrip("s")) for name, seconds in accounts}
        elif key == "calibration":
            run.calibrations.append(dict(word.split(":") for word in value.split()))
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
        if found[5] and abs(float(found[5]) * max(step, 1) - ms) > 0.5 + 0.006 * max(step, 1):
            self.fault("step_avg is not train_time / step")
        curve.append((step, ms, loss))

    def check_consistency(self) -> None:
        """Faults between lines: ledger against result, result against the last validation."""
        run, ledger = self.run, self.run.ledger
        if run.result and run.val_curve and run.finished:
            if abs(run.number("val_loss") - run.val_loss) > 1e-6:
                self.fault("the result's val_loss is not that of the last validation")
            if abs(run.number("train_time") / 1000 - run.train_s) > 0.01 * run.train_s + 0.01:
                self.fault("the result's train_time is not that of the last validation")
            wanted = run.val_loss <= run.target
            if (run.result["status"] == "success") != wanted:
                self.fault(f"status {run.result['status']} does not follow from loss and target")
        if ledger:
            total = sum(s for name, s in ledger.items() if name != "total")
            if abs(total - ledger.get("total", 0)) > 0.01 * total:
                self.fault("the ledger's accounts do not add up to its total")
            fresh = run.number("resumed_from") == 0
            if fresh and abs(ledger.get("train", 0) - run.number("train_time") / 1000) > 0.02:
                self.fault("the ledger's train time is not the result's")


def count_of(attributes: dict[str, str]) -> int:
    """Lines that belong to a heading; a source that is kept elsewhere has none."""
    return 0 if "kept" in attributes else int(attributes.get("lines", 0))


STEP = re.compile(
    r"step:(\d+)/\d+ (val|train)_loss:(\S+) train_time:(\d+)ms(?: step_avg:([\d.]+|nan)ms)?"
)


def read_public_log(path: Path, text: str) -> Run:
    """A log of the public speedrun: source, environment and steps between rules of 100 signs.

    It names neither host, seed, hyperparameters nor hashes; the source holds what there is.
    """
    source, _, rest = text.rpartition(PUBLIC_RULE)
    source, _, system = source.rpartition(PUBLIC_RULE)
    if not source:  # older logs have one rule only, after the source
        source, system = system, rest
    digest = hashlib.sha256(source.encode()).hexdigest()
    run = Run(path, is_public=True, sources={"train_gpt.py": Source(digest, source)})
    for step, kind, loss, ms in re.findall(
        r"^step:(\d+)/\d+ (?:(val|train)_loss:(\S+) )?train_time:(\d+)ms", rest, re.M
    ):
        curve = run.val_curve if kind == "val" else run.train_curve
        curve.append((int(step), float(ms), float(loss or "nan")))
    if not run.val_curve:
        raise InvalidLog(path, text.count("\n") + 1, "the log has no line with val_loss")
    planned = int(re.findall(r"^step:\d+/(\d+) ", rest, re.M)[-1])
    memory = re.search(r"peak memory \w+: (\d+) MiB", rest)
    run.result = {"status": "missed" if run.steps == planned else "aborted"}
    run.result |= {"peak_memory": f"{memory[1]}MiB"} if memory else {}
    if version := re.search(r"Running PyTorch (\S+)", system, re.I):
        run.environment["torch"] = version[1]
    gpus = re.findall(r"NVIDIA ([A-Z]+\d+[^|]*?)\s{2,}", system)
    if gpus:
        run.environment |= {"device": gpus[0], "gpu0": gpus[0], "world_size": str(len(gpus))}
    return run


def ineligible(run: Run) -> list[str]:
    """Why a sound run is no record, a reason each; empty for an eligible one."""
    if run.is_public:
        return ["a log of the public speedrun: no seed, no data hash, no result line"]
    reasons, status = [], run.result.get("status", "none")
    if status != "success":
        reasons.append(f"status is {status}, not success")
    if (overrides := run.config.get("overrides", "none")) != "none":
        reasons.append(f"hyperparameters were overridden: {overrides}")
    if run.number("resumed_from"):
        reasons.append(f"resumed from step {run.result['resumed_from']}")
    if not any("(as expected)" in line for line in run.data):
        reasons.append("the data is not what the track's hash expects, or no hash is known")
    changed, kept = run.git.get("changed", "none"), [s.kept for s in run.sources.values()]
    if run.git.get("commit", "none") == "none" and not all(kept):
        reasons.append("no git commit")
    elif changed != "none" and not all(kept):
        reasons.append(f"{changed} differs from commit {run.git['commit'][:10]}: commit it")
    if run.number("recompiled"):
        reasons.append(f"{run.result['recompiled']} graphs were compiled inside the timed part")
    untimed = {"startup", "compile", "validation", "checkpoint", "train", "end", "total"}
    if unknown := set(run.ledger) - untimed:
        reasons.append(f"untimed work of an unknown kind: {', '.join(sorted(unknown))}")
    return reasons + run.warnings


def source_changes(a: Run, b: Run) -> dict[str, tuple[int, int]]:
    """(lines added, lines removed) from a to b, by path of each source that differs."""
    changes = {}
    for path in sorted(a.sources.keys() | b.sources.keys()):
        diff = source_diff(a, b, path)
        added = sum(line.startswith("+") and not line.startswith("+++") for line in diff)
        removed = sum(line.startswith("-") and not line.startswith("---") for line in diff)
        if added or removed:
            changes[path] = added, removed
    return changes


def source_diff(a: Run, b: Run, path: str) -> list[str]:
    """The unified diff of one source from a to b, a line each."""
    texts = (run.sources[path].text if path in run.sources else "" for run in (a, b))
    lines = [text.splitlines() for text in texts]
    return list(difflib.unified_diff(*lines, f"A/{path}", f"B/{path}", lineterm=""))


RUN_BOUND = ("schema", "utc", "argv", "run", "seed", "slug", "log_dir", "source_dir",
             "declared_runs", "save_every", "resume", "overrides")  # fmt: skip


def config_changes(a: Run, b: Run) -> dict[str, tuple[str, str]]:
    """Hyperparameters and options that differ, but for those that name a single run."""
    keys = [k for k in a.config | b.config if k not in RUN_BOUND]
    pairs = {k: (a.config.get(k, "none"), b.config.get(k, "none")) for k in keys}
    return {k: pair for k, pair in pairs.items() if pair[0] != pair[1]}


def environment_changes(a: Run, b: Run) -> dict[str, tuple[str, str]]:
    keys = [k for k in a.environment | b.environment if k not in ("load_average",)]
    pairs = {k: (a.environment.get(k, "none"), b.environment.get(k, "none")) for k in keys}
    return {k: pair for k, pair in pairs.items() if pair[0] != pair[1]}


def variables(run: Run) -> dict:
    return json.loads(run.environment.get("variables", "{}"))
