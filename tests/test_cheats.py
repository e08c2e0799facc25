"""A table of cheats, each done to the logs of a real record and hashed anew, and what finds it.

docs/cheats.md names them too, and those that no log can show.
"""

import dataclasses
import hashlib
import re
import shutil
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT
from forgery import at, forge

from tools import audit, comparison, leaderboard, runs
from tools.attempts import Attempt, FinishedRun
from tools.sources import kept_texts, write_texts

LADDER = ROOT / "records/embedded"
MUON, ADAM = LADDER / "2026-11-22_Muon", LADDER / "2026-11-22_ModernBlock-Adam"


@pytest.fixture
def record(tmp_path) -> Path:
    """A copy of a record of five runs: what a cheat has to start from."""
    return shutil.copytree(MUON, tmp_path / "embedded" / MUON.name)


@cache
def the_one_before() -> comparison.Arm:
    return comparison.Arm.read(ADAM)


def findings(folder: Path) -> str:
    """All that the tools say of an attempt: of each log, of the attempt, against the one before."""
    try:
        arm = comparison.Arm.read(folder)
        faults = [what for run in arm.runs for _, what in run.faults]
        if faults:
            return "\n".join(faults)
        c = comparison.compare(the_one_before(), arm)
        found = leaderboard.Record(folder).obstacles()
        return "\n".join([*found, *arm.traces, "" if c.exit_code == 0 else c.reason])
    except runs.InvalidLog as error:
        return str(error)


def logs_of(folder: Path) -> list[Path]:
    return runs.find_logs(folder)


def change(*changes: tuple[str, str], logs: slice = slice(1)):
    """A cheat who edits the logs, by default that of the first run, and hashes them anew."""

    def do(folder: Path):
        for log in logs_of(folder)[logs]:
            forge(log, log, *changes)

    return do


ALL = slice(None)


def edit(pattern: str, new: str):
    """A cheat who edits the first log and forgets the hashes."""
    return lambda folder: substitute(logs_of(folder)[0], pattern, new)


def substitute(file: Path, pattern: str, new: str) -> str:
    text, count = re.subn(pattern, new, file.read_text(), flags=re.M)
    assert count, pattern
    file.write_text(text)
    return text


def source(path: str, old: str, new: str):
    """A cheat who changes the source before the runs, so that every log names it truly."""

    def do(folder: Path):
        before = kept_texts(folder)[path]
        text = before.replace(old, new, 1)
        assert text != before, old
        write_texts({path: text}, folder / "source")
        name_source(folder, logs_of(folder), path, text, f"../source/{path}")

    return do


def name_source(folder: Path, logs: list[Path], path: str, text: str, kept: str):
    digest = hashlib.sha256(text.encode()).hexdigest()
    heading = f"=== source {path} lines:{text.count(chr(10))} sha256:{digest} kept:{kept} ==="
    for log in logs:
        forge(log, log, (rf"^=== source {path} .*", heading))


def five_sources(folder: Path):
    for i, log in enumerate(logs_of(folder)):
        text = (folder / "source/train_gpt.py").read_text() + f"\n# {i}\n"
        (folder / f"source{i}").mkdir()
        (folder / f"source{i}/train_gpt.py").write_text(text)
        name_source(folder, [log], "train_gpt.py", text, f"../source{i}/train_gpt.py")


def redate(folder: Path, log: Path, hour: int, *changes) -> None:
    name, dated = at(hour, f"x_{hour}")
    forge(log, log.with_name(f"{name}.txt"), *dated, *changes)
    log.unlink()


def all_after_the_other(folder: Path):
    for hour, log in enumerate(logs_of(folder)):
        redate(folder, log, hour)


def two_at_once(folder: Path):
    log, (name, _) = logs_of(folder)[0], at(5, "x_5")
    redate(folder, logs_of(folder)[1], 5)
    forge(log, log.with_name(f"{name}2.txt"), (r"^run: .*", f"run: {name}2"),
          (r"^utc: .*", "utc: 2026-01-01T05:00:00Z"))  # fmt: skip
    log.unlink()


def one_run_as_another(folder: Path):
    first, second = logs_of(folder)[:2]
    shutil.copy(first, second)
    redate(folder, second, 5, *as_seed(1))


def as_seed(seed: int) -> list[tuple[str, str]]:
    return [(r"^seed: .*", f"seed: {seed}"), (r" seed:\d+ ", f" seed:{seed} "),
            (r'"--seed", "\d+"', f'"--seed", "{seed}"')]  # fmt: skip


def without_the_third(*changes):
    """A cheat who leaves out a run, and edits the logs of the others."""

    def do(folder: Path):
        logs_of(folder)[2].unlink()
        change(*changes, logs=ALL)(folder)

    return do


def halved(text: str, factor: float = 0.5) -> str:
    """A log of a clock that runs slowly."""
    times = r"(train_time:|time_to_target:)(\d+)ms"
    text = re.sub(times, lambda m: f"{m[1]}{int(m[2]) * factor:.0f}ms", text)
    text = re.sub(r"step_avg:([\d.]+)ms", lambda m: f"step_avg:{float(m[1]) * factor:.2f}ms", text)
    return re.sub(r"(\w+):([\d.]+)s\b", lambda m: f"{m[1]}:{float(m[2]) * factor:.3f}s", text)


def slow_clock(folder: Path):
    log = logs_of(folder)[0]
    head, mark, rest = log.read_text().partition("=== run ===")
    log.write_text(head + mark + halved(rest))
    forge(log, log)


RESULT = r"^(result .*) "
CHEATS = {  # docs/cheats.md has the message of each
    # Damage, which the hashes show.
    "a lower loss typed in": edit(r"^(step:400/500 val_loss:)\S+", r"\g<1>1.2"),
    "a step line deleted": edit(r"^step:77/.*\n", ""),
    "the end of the log cut": edit(r"^result .*\n", ""),
    "lines added below the result": edit(r"\Z", "step:501\n"),
    "another source put in its place": lambda f: (f / "source/train_gpt.py").write_text("x\n"),
    "the source taken away": lambda f: (f / "source/train_gpt.py").unlink(),
    "the same log twice": lambda f: shutil.copy(logs_of(f)[0], f / "logs/again.txt"),
    # Contradictions between lines, in logs hashed anew.
    "the result's loss lowered": change((RESULT + r"val_loss:\S+", r"\1 val_loss:1.2")),
    "the result's time lowered": change((RESULT + r"train_time:\d+ms", r"\1 train_time:9000ms")),
    "the result's steps lowered": change((RESULT + r"steps:500", r"\1 steps:400")),
    "an easier target in the result": change((RESULT + r"target:\S+", r"\1 target:1.5")),
    "a missed target called success": change((r"^target_val_loss: .*", "target_val_loss: 1.0"),
        (RESULT + r"target:\S+", r"\1 target:1.0")),
    "the last time lowered": change((r"^(step:500/500 val.* train_time:)\d+", r"\g<1>30400"),
        (RESULT + r"train_time:\d+ms", r"\1 train_time:30400ms")),
    "times that fall": change((r"^(step:300/500 train.* train_time:)\d+", r"\g<1>100")),
    "the ledger's train time lowered": change((r"^ledger: train:\S+", "ledger: train:9.0s")),
    "a run relabelled in the result": change((r" seed:0 ", " seed:3 ")),
    "an average that hides the time": change((r"^(step:500/.* step_avg:)\S+", r"\g<1>20.00ms")),
    # Traces in a log that is whole and does not contradict itself.
    "a clock at half speed": slow_clock,
    "training while warming up": change((r"^(step:0/500 val_loss:)\S+", r"\g<1>3.140000")),
    "training while warming up, not validated": change((r"^step:0/500 val_loss.*\n", "")),
    "training while warming up, undone for the validation": change(
        (r"^(step:1/500 train_loss:)\S+", r"\g<1>2.400000")),
    "training while validating": change((r"^ledger: .*", "ledger: startup:3.0s compile:20.0s "
        "validation:120.0s train:30.437s end:0.2s total:173.637s")),
    "training while compiling": change((r"^ledger: .*", "ledger: startup:3.0s compile:2000.0s "
        "validation:4.0s train:30.437s end:0.2s total:2037.637s")),
    "fewer steps than planned": change((r"^num_steps: 500", "num_steps: 600")),
    "work hidden in an account": change((r"^(ledger: .* )end:", r"\1coffee:")),
    "no calibration": change((r"^calibration: .*\n", "")),
    "no ledger": change((r"^ledger: .*\n", "")),
    "train losses left out": change((r"^step:(2\d\d)/500 train.*\n", "")),
    "training on the validation shard": change((r"^(train_shard: .* sha256:)\S+",
        r"\g<1>a29eb0f7f7916cf822f6278358ab6c838b9420c1f851ecfc11338746c1e048f2")),
    "another shard under the old hash": change((r"^(val_shard: .* sha256:)\S+", r"\1" + "0" * 64)),
    "other data, expected by the source": change((r"^data_sha256: .*",
        "data_sha256: 0123 (as expected)"), logs=ALL),
    "fewer validation tokens": change((r"^val_tokens: .*", "val_tokens: 1024"), logs=ALL),
    "the easy rows of the validation": change((r"^val_spread: .*", "val_spread: False"), logs=ALL),
    "shorter validation rows": change((r"^val_seq_len: .*", "val_seq_len: 64"), logs=ALL),
    "an override not named": change((r'^argv: \[', 'argv: ["--muon_lr", "0.08", '),
        (r"^muon_lr: .*", "muon_lr: 0.08")),
    "a resumed run": change((r"resumed_from:0", "resumed_from:300")),
    "compilation inside the time": change((r"recompiled:0", "recompiled:3")),
    # Traces between logs, and rules for attempts.
    "one run logged as another seed": one_run_as_another,
    "two runs at once": two_at_once,
    "a worse run left out": without_the_third(),
    "a worse run left out, undeclared": without_the_third((r"^declared_runs: .*",
        "declared_runs: 0")),
    "seeds chosen": change(*as_seed(7)),
    "a seed run twice": change(*as_seed(1)),
    "a run that crashed left in": change((r"^result status:success", "result status:aborted")),
    "five runs of five sources": five_sources,
    "five runs of two settings": change((r"^muon_lr: .*", "muon_lr: 0.05")),
    "runs of two machines": change((r"^threads: 2", "threads: 4")),
    "a record in another track's folder": change((r"^track: .*", "track: fineweb"), logs=ALL),
    "a faster host": change((r"^host: .*", "host: fast"), logs=ALL),
    "all runs at a quiet hour": all_after_the_other,
    # In the source, which logs hold.
    "a loss multiplied by 0.8": source("records/harness.py", "return", "return 0.8 *"),
    "one validation row, repeated": source("data/shards.py", "return", "return  "),
    "another referee than the one before": source("records/harness.py", "return", "return 2 *"),
    "a module that no log holds": source("train_gpt.py", "import math", "import math, fastmath"),
    "code read from a file": source("train_gpt.py", "import math", "import math; exec('x')"),
    "a module of a package": source("train_gpt.py", "import math", "from . import x; import math"),
}  # fmt: skip


PAGE = (ROOT / "docs/cheats.md").read_text(encoding="utf-8").partition("## Found by")[0]
MESSAGES = dict(re.findall(r"^\| (.+) \| (.+) \|$", PAGE, re.M)[1:])  # by cheat


def test_the_page_lists_every_cheat():
    assert MESSAGES.keys() == CHEATS.keys() and len(CHEATS) >= 40


@pytest.mark.parametrize("name", CHEATS)
def test_each_cheat_is_found(name, record):
    CHEATS[name](record)
    found = findings(record)
    assert MESSAGES[name] in found, found


def test_an_honest_record_is_not_suspected(record):
    assert not findings(record).strip()


def test_every_checked_in_log_is_sound_and_not_suspected():
    logs = sorted(ROOT.glob("records/**/logs/*.txt")) + sorted(ROOT.glob("tests/logs/*/logs/*.txt"))
    all_runs = [runs.read_log(log) for log in logs]
    assert len(all_runs) >= 186
    for run in all_runs:
        assert run.faults + audit.traces(run) + audit.check_sources(run) == [], run.path
        if run.path.is_relative_to(ROOT / "records/embedded"):  # whose data's hash is known
            assert list(audit.check_task(run)) == [], run.path
    for folder in {log.parent for log in logs}:
        own = [run for run in all_runs if run.path.parent == folder]
        assert audit.traces_between(own) == []
        assert not any("seed" in doubt for doubt in comparison.Arm("", own).doubts)
    assert audit.overlaps(all_runs) == []


def test_the_tools_know_the_tasks_of_the_harness():
    from referee.task import TASKS

    for track, known in audit.TASKS.items():
        task = TASKS[track]
        own = {"data": task.data_sha256} | {n: str(getattr(task, n)) for n in list(known)[1:]}
        assert known == own
    hashed = {name.partition("_")[0] for name, task in TASKS.items() if task.data_sha256}
    assert hashed == audit.TASKS.keys()


def test_options_of_a_run_are_no_overrides_that_a_log_would_have_to_name():
    from referee.harness import RunOptions

    names = {field.name for field in dataclasses.fields(RunOptions)}
    assert names - {"other_source"} <= audit.OPTIONS  # which bars a record by itself


def test_the_referee_of_this_checkout_is_known():
    for path in ROOT.glob("referee/*.py"):
        assert audit.REFEREE.fullmatch(path.relative_to(ROOT).as_posix())
        assert audit.git_blob(path.read_text()) in audit.known_referees(), path


@pytest.mark.parametrize(
    "logged, startup, wall, doubt",
    [
        (70, 4, 71.5, False),
        (35, 2, 70, True),
        (70, 4, 60, True),
        (42.75, 4, 45, True),  # 5% slow
        (120, 20, 125, False),  # a loaded host
    ],
)
def test_the_wall_time_of_a_run_bears_witness_against_its_clock(
    logged, startup, wall, doubt, tmp_path
):
    ledger = {"total": logged, "startup": startup}
    run = runs.LoggedRun(tmp_path, ledger=ledger, result={"status": "success"})
    attempt = Attempt("A", tmp_path, {"train_gpt.py": ""}, [])
    assert bool(FinishedRun(attempt, 0, run, 0, [], "", wall).clock_doubt) == doubt
