"""A table of cheats, each done to the logs of a real record and hashed anew, and what finds it.

docs/cheats.md names them too, and those that no log can show.
"""

import dataclasses
import hashlib
import re
import shutil
from itertools import zip_longest
from pathlib import Path

import pytest
from conftest import ROOT
from forgery import forge
from test_records import tool

from tools import audit, comparison, leaderboard, runs, stats
from tools.attempts import Attempt, FinishedRun
from tools.cli import InvalidLog
from tools.sources import kept_texts, write_texts

LADDER = ROOT / "records/embedded"
ADAM, MUON = "2026-11-22_ModernBlock-Adam", "2026-11-22_Muon"
COPYING = LADDER / "2026-11-26_EarlyCopying"


@pytest.fixture(scope="module")
def raced(tmp_path_factory) -> Path:
    """Copies of two records of five runs each, dated as if race.py had raced them."""
    folder = tmp_path_factory.mktemp("raced") / "embedded"
    for name in (ADAM, MUON):
        shutil.copytree(LADDER / name, folder / name)
    date_runs(folder / MUON)
    return folder


@pytest.fixture
def record(raced, tmp_path) -> Path:
    """What a cheat has to start from, beside the record before it."""
    return shutil.copytree(raced, tmp_path / "embedded") / MUON


def logs_of(folder: Path) -> list[Path]:
    return runs.find_logs(folder)


def date_runs(record: Path, year: int = 2026, drawn: bool = True) -> None:
    """Let a record and the one before run in the order of race.py, or in a fixed A B B A."""
    logs = [logs_of(record.parent / ADAM), logs_of(record)]
    first = [runs.read_log(own[0]) for own in logs]
    seed = stats.order_seed([(run.source_texts, run.shared_flags) for run in first])
    by_hand = [(arm ^ turn % 2, turn) for turn in range(5) for arm in range(2)]
    order = stats.draw_order(2, 5, seed) if drawn else by_hand
    for hour, (arm, turn) in enumerate(order):
        log = logs[arm][turn]
        forge(log, log, (r"^utc: .*", f"utc: {year}-01-01T{hour:02}:00:00Z"))


def raced_as(cheat, **dates):
    """A cheat that was there before the race, whose order follows from source and flags."""

    def do(folder: Path):
        cheat(folder)
        date_runs(folder, **dates)

    return do


def change(*changes: tuple[str, str], logs: slice = slice(1)):
    """A cheat who edits the logs, by default that of the first run, and hashes them anew."""

    def do(folder: Path):
        for log in logs_of(folder)[logs]:
            forge(log, log, *changes)

    return do


def all_logs(*changes: tuple[str, str]):
    return change(*changes, logs=slice(None))


def edit(pattern: str, new: str):
    """A cheat who edits the first log and forgets the hashes."""

    def do(folder: Path):
        log = logs_of(folder)[0]
        text, count = re.subn(pattern, new, log.read_text(), count=1, flags=re.M)
        assert count, pattern
        log.write_text(text)

    return do


def source(path: str, change, logs: slice = slice(None)):
    """A cheat who changes the source before the runs, so that every log names it truly."""

    def do(folder: Path):
        before = kept_texts(folder)[path]
        text, kept = change(before), "source" if logs == slice(None) else "source_of_one"
        assert text != before
        (folder / kept).mkdir(exist_ok=True)
        write_texts({path: text}, folder / kept)
        digest = hashlib.sha256(text.encode()).hexdigest()
        heading = f"source {path} lines:{text.count(chr(10))} sha256:{digest} kept:../{kept}/{path}"
        for log in logs_of(folder)[logs]:
            forge(log, log, (rf"^=== source {path} .*", f"=== {heading} ==="))

    return do


def commented(text: str) -> str:
    return f"{text}# mine\n"


def with_ledger(compile_s: int, validation_s: int):
    total = 33.637 + compile_s + validation_s
    return change((r"^ledger: .*", f"ledger: startup:3.0s compile:{compile_s}.0s validation:"
        f"{validation_s}.0s train:30.437s end:0.2s total:{total:.3f}s"))  # fmt: skip


def as_seed(seed: int) -> list[tuple[str, str]]:
    return [(r"^seed: .*", f"seed: {seed}"), (r'"--seed", "\d+"', f'"--seed", "{seed}"')]


def without_the_third(*changes):
    """A cheat who leaves out a run, and edits the logs of the others."""

    def do(folder: Path):
        logs_of(folder)[2].unlink()
        all_logs(*changes)(folder)

    return do


def doubted(folder: Path) -> None:
    """What race.py notes by its own clock."""
    noted = "its ledger adds up to 30.0 s, its process took 45.0 s"
    logs_of(folder)[0].with_suffix(".doubt").write_text(noted)


FLAG = [(r"^argv: \[", 'argv: ["--muon_lr", "0.08", '), (r"^muon_lr: .*", "muon_lr: 0.08")]
CHEATS = {  # docs/cheats.md has the messages of each
    "a loss typed in": edit(r"^(step:400/500 val_loss:)\S+", r"\g<1>1.2"),
    "a step deleted": edit(r"^step:77/.*\n", ""),
    "the end cut": edit(r"^result .*\n", ""),
    "lines below the end": edit(r"\Z", "step:501\n"),
    "another config below the first": change((r"^=== data ===",
        "=== config ===\nnum_steps: 500\n=== data ===")),
    "a seed given twice": change((r"^seed: .*", r"seed: 9\nseed: 0")),
    "another source": lambda f: (f / "source/train_gpt.py").write_text("x\n"),
    "training before the clock": change((r"^(step:0/500 val_loss:)\S+", r"\g<1>3.140000")),
    "undone for the validation": change((r"^(step:1/500 train_loss:)\S+", r"\g<1>2.400000")),
    "not validated": change((r"^step:0/500 val_loss.*\n", "")),
    "training while compiling": with_ledger(2000, 4),
    "while validating": with_ledger(20, 120),
    "in an account of its own": change((r"^(ledger: .* )end:", r"\1coffee:")),
    "no ledger": change((r"^ledger: .*\n", "")),
    "a slow clock in a race": doubted,
    "a resumed run": change((r"resumed_from:0", "resumed_from:300")),
    "a requeued run": change((r"^variables: \{", 'variables: {"SLURM_RESTART_COUNT": "1", ')),
    "compilation inside the time": change((r"recompiled:0", "recompiled:3")),
    "fewer steps": change((r"^num_steps: 500", "num_steps: 600")),
    "another referee": raced_as(source("records/harness.py",
        lambda text: text.replace("return", "return 0.8 *"))),
    "files of two referees": raced_as(source("data/shards.py",
        lambda text: kept_texts(COPYING)["data/shards.py"])),
    "an earlier referee in a new run": raced_as(source("train_gpt.py", commented), year=2027),
    "a module from outside": change(
        (r"^(step:0/500 val_loss.*)", r"foreign_modules: fastmath\n\1")),
    "a run left out": without_the_third(),
    "undeclared": without_the_third((r"^declared_runs: .*", "declared_runs: 0")),
    "seeds chosen": change(*as_seed(7)),
    "a seed twice": change(*as_seed(1)),
    "a log twice": lambda f: shutil.copy(logs_of(f)[0], f / "logs/again.txt"),
    "a crashed run left in": change((r"^result status:success", "result status:aborted")),
    "runs of several sources": source("train_gpt.py", commented, logs=slice(3, 4)),
    "settings": change((r"^muon_lr: .*", "muon_lr: 0.05")),
    "machines": change((r"^threads: 2", "threads: 4")),
    "versions of torch": change((r"^torch: .*", "torch: 2.12.0")),
    "an override": raced_as(all_logs(*FLAG, (r"^overrides: .*", "overrides: muon_lr"))),
    "one not named": raced_as(all_logs(*FLAG)),
    "other data": all_logs((r"^data_sha256: .*", "data_sha256: 0123 (as expected)")),
    "fewer tokens": all_logs((r"^val_tokens: .*", "val_tokens: 1024")),
    "shorter rows": all_logs((r"^val_seq_len: .*", "val_seq_len: 64")),
    "easy rows": all_logs((r"^val_spread: .*", "val_spread: False")),
    "another vocabulary": all_logs((r"^vocab_size: .*", "vocab_size: 2")),
    "an easier target": all_logs((r"^target_val_loss: .*", "target_val_loss: 9")),
    "a faster host": all_logs((r"^host: .*", "host: fast")),
    "any order but race.py's": lambda folder: date_runs(folder, drawn=False),
    "other torch": all_logs((r"^torch: .*", "torch: 2.12.0")),
    "compile": all_logs((r"^compile: True", "compile: False")),
    "threads": all_logs((r"^threads: 2", "threads: 4")),
    "OMP_WAIT_POLICY": all_logs((r"^variables: {", 'variables: {"OMP_WAIT_POLICY": "active", ')),
}  # fmt: skip


def page_rows() -> dict[str, tuple[str, str]]:
    """(message of validate.py, of diff.py) of each cheat; one column is for both tools."""
    found = {}
    for row in re.findall(r"^\| (.+) \|$", (ROOT / "docs/cheats.md").read_text(), re.M):
        names, first, *others = (cell.split("; ") for cell in row.split(" | "))
        if not names[0].startswith(("cheats", "-")):
            for name, *said in zip_longest(names, first, *others, fillvalue=""):
                found[name] = said[0].strip("-"), said[-1]
    return found


ROWS = page_rows()


def test_the_page_is_one_screen_and_lists_every_cheat():
    assert list(ROWS) == list(CHEATS) and len(CHEATS) >= 40
    assert (ROOT / "docs/cheats.md").read_text().count("\n") <= 50


@pytest.mark.parametrize("name", CHEATS)
def test_each_cheat_bars_the_record_and_the_gain(name, record):
    """What concerns two attempts bars the gain alone: a table of records does not show it."""
    CHEATS[name](record)
    of_record, of_gain = ROWS[name]
    done = tool("diff", record.parent / ADAM, record)
    said = done.stdout + done.stderr
    assert done.returncode in (3, 4, 5) and of_gain in said, said
    done = tool("validate", record)
    assert done.returncode == (4 if "INVALID" in said else 1 if of_record else 0), done.stdout
    assert of_record in done.stdout, done.stdout
    try:
        ranked = leaderboard.Record(record)
        assert any(of_record in obstacle for obstacle in ranked.obstacles()) or not of_record
        gain = leaderboard.gain_over(leaderboard.Record(record.parent / ADAM), ranked)
        assert gain == "-" or re.search("inconclusive|order by hand", gain)
    except InvalidLog:
        assert done.returncode == 4


@pytest.mark.parametrize("year", [2026, 2027])
def test_an_honest_race_of_published_sources_is_believed(record, year):
    date_runs(record, year)
    done = tool("diff", record.parent / ADAM, record)
    assert done.returncode == 0 and "B FASTER by" in done.stdout, done.stdout
    log = logs_of(record)[0]
    assert forge(log, record / "copy.txt").read_bytes() == log.read_bytes()
    assert tool("diff", record, record.parent / ADAM).returncode == 1
    assert tool("validate", record).returncode == 0 and not leaderboard.Record(record).obstacles()


def test_every_checked_in_log_is_sound_and_not_suspected():
    logs = sorted(ROOT.glob("records/**/logs/*.txt")) + sorted(ROOT.glob("tests/logs/*/logs/*.txt"))
    folders = dict.fromkeys(log.parent for log in logs)
    assert len(logs) >= 186
    for folder in folders:
        arm = comparison.Arm.read(folder)
        arm.require_sound()
        explored = ("short", "first_gpu_run", "proxy")  # with flags of their own, undeclared
        assert folder.parent.name in explored or arm.objections == [], folder
        assert not any("referee" in what for what in arm.objections), folder
        if folder.is_relative_to(LADDER) and folder.parent.name != "short":
            assert not any(list(audit.off_track(run)) for run in arm.runs), folder


def test_options_of_a_run_are_no_overrides_that_a_log_would_have_to_name():
    from referee.harness import RunOptions

    names = {field.name for field in dataclasses.fields(RunOptions)}
    assert names - {"other_source"} <= audit.OPTIONS  # which bars a record by itself


def test_the_referee_of_this_checkout_is_known():
    files = {path.relative_to(ROOT).as_posix(): path for path in ROOT.glob("referee/*.py")}
    assert all(map(audit.REFEREE.fullmatch, files))
    own = {(name, audit.git_blob(path.read_text())) for name, path in files.items()}
    assert any(own <= known for known in audit.known_referees())


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
