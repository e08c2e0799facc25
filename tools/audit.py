"""What bars a sound log from proving something: broken rules, and traces of a forgery.

Hashes show damage, not forgery: whoever edits a log can hash it anew. A trace is a figure that a
forger must keep consistent with others and did not. A record needs logs without traces; with one,
a comparison claims no gain. docs/cheats.md lists what is found, and what no log can show.
"""

import ast
import hashlib
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from functools import cache
from itertools import combinations

from referee.sources import GIT
from tools.cli import ToolError
from tools.runs import LoggedRun
from tools.sources import ROOT, imported_modules, sha256_of, top_name

MISSED = "it missed the target"
ACCOUNTS = {"startup", "compile", "turn", "validation", "checkpoint", "train", "end", "total"}
FIRST_LOSS = 0.3  # nats below a uniform guess: no untrained network starts there
FIRST_TRAIN_LOSS = 0.5  # the same of a batch; the lowest of an honest run was 0.30 below
UNTIMED_S = {"startup": 600, "compile": 1800, "end": 60}  # more than any work of its kind takes
VALIDATION_TIMES = 2.0  # of its tokens' time in training; honest runs took 0.24 to 1.34
REFEREE = re.compile(  # its files, now and in earlier layouts
    r"referee/\w+\.py|(records/)?harness\.py|(ranks|flags|environment|checkpoints)\.py|data/shards\.py"
)
LOADERS = {"exec", "eval", "__import__", "import_module", "run_path", "run_module"}
# A source's own word on its data is no evidence, so the tools know each track's task.
EMBEDDED = {"data": "46ee993abd300d89907f21f46b034c6dad65e35e87b50afcdc9668e0617695f9",
            "val_tokens": "262144", "val_seq_len": "1024", "val_spread": "True"}  # fmt: skip
TASKS = {"embedded": EMBEDDED}  # by track
OPTIONS = {"track", "task", "seed", "slug", "log_dir", "save_every", "resume", "micro_batch_seqs",
           "compile", "fp32", "cpu_dtype", "source_dir", "declared_runs", "turn_steps",
           "rank_timeout_s"}  # fmt: skip


def ineligible(run: LoggedRun) -> list[str]:
    """Why a sound run is no record, a reason each; empty for an eligible one."""
    if run.is_public:
        return ["a log of the public speedrun: no seed, no data hash, no result line"]
    reasons, status = [], run.result.get("status", "none")
    if status != "success":
        reasons.append(MISSED if status == "missed" else f"status is {status}, not success")
    if overridden := overrides(run) | {name[2:] for name, _ in run.flags} - OPTIONS:
        reasons.append(f"hyperparameters were overridden: {' '.join(sorted(overridden))}")
    if run.number("resumed_from") > 0 or run.config.get("resume"):
        reasons.append(f"resumed from step {run.result['resumed_from']}")
    changed, kept = run.git.get("changed", "none"), [s.kept for s in run.sources.values()]
    if run.git.get("commit", "none") == "none" and not all(kept):
        reasons.append("no git commit")
    elif changed != "none" and not all(kept):
        reasons.append(f"{changed} differs from commit {run.git['commit'][:10]}: commit it")
    if run.number("recompiled") > 0:
        reasons.append(f"{run.result['recompiled']} graphs were compiled inside the timed part")
    if unknown := set(run.ledger) - ACCOUNTS:
        reasons.append(f"untimed work of an unknown kind: {', '.join(sorted(unknown))}")
    return [*reasons, *check_task(run), *traces(run), *check_sources(run), *run.warnings]


def overrides(run: LoggedRun) -> set[str]:
    return set(run.config.get("overrides", "none").split()) - {"none"}


def check_task(run: LoggedRun) -> Iterator[str]:
    """How data and validation differ from those of the track."""
    track = run.config.get("track", "unknown")
    if track not in TASKS:
        yield f"no data hash is known of the track {track}"
    for name, value in TASKS.get(track, {}).items():
        if run.task[name] != value:
            yield f"{name} is {run.task[name][:16]}, on the track {track} it is {value[:16]}"


def traces(run: LoggedRun) -> list[str]:
    """What no honest run shows, in a log whose hashes may fit all the same."""
    checks = (check_clock, check_wall_time, check_untimed, check_steps, check_data)
    return [] if run.is_public else [what for check in checks for what in check(run)]


def check_clock(run: LoggedRun) -> Iterator[str]:
    rate, tokens = run.number("tokens_per_s"), run.number("tokens")
    seconds = run.number("train_time") / 1000
    rounding = 0.5 * seconds + 0.0005 * rate  # to a token per second, and to a millisecond
    fresh = run.finished and not run.number("resumed_from") > 0
    if fresh and not abs(rate * seconds - tokens) <= 0.001 * tokens + rounding:
        yield "tokens / train_time is not tokens_per_s"


def check_wall_time(run: LoggedRun) -> Iterator[str]:
    if (noted := run.path.with_suffix(".doubt")).exists():  # by race.py, by its own clock
        yield noted.read_text(encoding="utf-8")


def check_untimed(run: LoggedRun) -> Iterator[str]:
    """Accounts that hold more than what they are for."""
    for account, most in UNTIMED_S.items():
        if (seconds := run.ledger.get(account, 0)) > most:
            yield f"{seconds:.0f} s of {account}: no work of that kind takes over {most} s"
    tokens = len(run.val_curve) * float(run.config.get("val_tokens", "nan"))
    times = run.ledger.get("validation", 0) * run.number("tokens_per_s") / tokens if tokens else 0
    if not run.number("resumed_from") > 0 and times > VALIDATION_TIMES:
        yield f"validation took {times:.1f} times as long as training on its tokens"


def check_steps(run: LoggedRun) -> Iterator[str]:
    guess = math.log(max(float(run.config.get("vocab_size", "nan")), 1))
    starts = [
        ("val", 0, run.val_curve, FIRST_LOSS),
        ("train", 1, run.train_curve, FIRST_TRAIN_LOSS),
    ]
    for kind, step, curve, most in starts:
        if curve and curve[0][0] == step and curve[0][2] < guess - most:
            yield f"{kind}_loss at step {step} is {curve[0][2]}: trained before the clock started"
    if not run.finished:
        return
    if not run.number("resumed_from") > 0 and run.val_curve[0][0] != 0:
        yield "no validation before its first step"
    if (planned := run.config.get("num_steps")) != str(run.steps):
        yield f"it took {run.steps} steps of num_steps {planned}"
    resumed = run.number("resumed_from")
    first = int(resumed) + 1 if resumed > 0 else 1
    if [step for step, *_ in run.train_curve] != list(range(first, run.steps + 1)):
        yield "lines with train_loss are missing"
    if not run.ledger or len(run.calibrations) != 2:
        yield "the ledger or a calibration is missing"


def check_data(run: LoggedRun) -> Iterator[str]:
    shards = re.findall(r"^(train|val)_shard: .* sha256:(\S+)", "\n".join(run.data), re.M)
    train, val = ({digest for kind, digest in shards if kind == k} for k in ("train", "val"))
    if train & val:
        yield "a validation shard is a training shard"
    if shards and sha256_of(" ".join(digest for _, digest in shards)) != run.task["data"]:
        yield "data_sha256 is not that of the shards"


def check_sources(run: LoggedRun) -> list[str]:
    """Modules that no log holds, and referee files of no known version."""
    logged = frozenset(run.sources)
    found = [what for path, source in run.sources.items()
             for what in unfollowed(path, source.text, logged)]  # fmt: skip
    return found + [f"the referee's {path} is not in this repository's history"
                    for path in unknown_referees(run)]  # fmt: skip


def unknown_referees(run: LoggedRun) -> dict[str, str]:
    """sha256 by path of the referee's files in a log that this repository never committed."""
    if run.is_public:
        return {}
    files = {path: source for path, source in run.sources.items() if REFEREE.fullmatch(path)}
    if not any(path.endswith("harness.py") for path in files):
        return {"harness.py": "not logged"}
    return {path: source.sha256 for path, source in files.items()
            if git_blob(source.text) not in known_referees()}  # fmt: skip


@cache
def known_referees() -> set[str]:
    """Git's ids of the referee's files: every version in history, and those of published records.

    A shallow clone, or a machine without git, knows the latter alone.
    """
    published = (ROOT / "records/sources").glob("*.py")
    known = {git_blob(path.read_text(encoding="utf-8")) for path in published}
    command = [*GIT, "log", "--format=", "--raw", "--no-abbrev", "--no-renames", "-m"]
    with suppress(FileNotFoundError):
        history = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8").stdout
        changes = re.findall(r"^:\S+ \S+ \S+ (\w+) [AM]\t(.+)$", history, re.M)
        known |= {blob for blob, path in changes if REFEREE.fullmatch(path)}
    return known


def git_blob(text: str) -> str:
    """Git's id of a file with this text."""
    data = text.encode()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@cache
def pinned() -> frozenset[str]:
    """Names of the modules that a run may import from outside."""
    names = re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text("utf-8"), re.M)
    return frozenset(name.replace("-", "_") for name in names) | {"triton"}  # of torch's CUDA build


@cache
def unfollowed(path: str, text: str, logged: frozenset[str]) -> list[str]:
    """What a source loads that is neither in its log nor a pinned package."""
    try:
        modules, tree = imported_modules(path, text), ast.parse(text)
    except ToolError as error:
        return [str(error)]
    outside = {top_name(places[0]) for places in modules if not logged & set(places)}
    unknown = outside - pinned() - sys.stdlib_module_names
    found = [f"{path} imports {name}, neither pinned nor logged" for name in sorted(unknown)]
    called = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = {f.id for f in called if isinstance(f, ast.Name)}
    names |= {f.attr for f in called if isinstance(f, ast.Attribute)} - {"eval"}  # a module's
    relative = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level]
    loaders = sorted(names & LOADERS) + ["a relative import"] * bool(relative)
    return found + [f"{path} loads code by {name}, which nobody can follow" for name in loaders]


def traces_between(runs: list[LoggedRun]) -> list[str]:
    """What the runs of one attempt show together and no honest attempt does."""
    own = [run for run in runs if not run.is_public]
    curves = [(run, [point[::2] for point in run.val_curve + run.train_curve]) for run in own]
    same = [f"seeds {one.seed} and {other.seed} have the same losses, digit for digit"
            for (one, a), (other, b) in combinations(curves, 2)
            if len(a) > 1 and a == b and one.seed != other.seed]  # fmt: skip
    return same[:1] + overlaps(own)


def overlaps(runs: list[LoggedRun]) -> list[str]:
    """Runs that shared their host, except the two of a pair that takes turns."""
    spans = []
    for run in runs:
        if "utc" in run.config:
            start = datetime.fromisoformat(run.config["utc"]).timestamp()
            waited = run.ledger.get("startup", 0) + run.ledger.get("turn", 0)
            spans.append((start, start + run.ledger.get("total", 0) - waited, run))
    spans.sort(key=lambda span: span[0])
    return [f"{one.name} and {other.name} overlap"
            for (_, end, one), (start, _, other) in combinations(spans, 2)
            if start < end - 1 and one.host == other.host and one.name != other.name
            and not (one.turn_steps and other.turn_steps and one.seed == other.seed)]  # fmt: skip
