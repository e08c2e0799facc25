"""Files on their way: full disks, logs that other programs wrote again, names that are none."""

import gzip
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, clean_environment
from test_records import REAL_LOGS, tool

from data import gpt2, tokenize_text
from evals import hellaswag
from referee import checkpoints, log
from referee.files import write_text
from referee.flags import BUG, RunError
from referee.harness import RunOptions
from referee.shards import write_shard
from tools import comparison, leaderboard, plots, report, runs, sources

LONG = "x" * 50_000
ARM = SimpleNamespace(times=np.arange(5) + 1)
WRITERS = {
    "README.md": lambda path: leaderboard.main(),
    "page.html": lambda path: report.main(),
    "ladder.png": lambda path: plots.plot_ladder("A", ["B"] * 9, [ARM] * 9, path),
    "config.json": lambda path: checkpoints.write_facts(path.parent, {"a": LONG}),
    "train.bin": lambda path: write_shard(path, np.zeros(50_000, np.uint16)),
    "x.py": lambda path: sources.write_texts({path.name: LONG}, path.parent),
}


@contextmanager
def full_disk():
    """No file grows beyond 10,000 bytes; a write then fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_what_was_there(name, tmp_path, monkeypatch):
    path, old = tmp_path / name, f"{LONG}{leaderboard.BEGIN}{leaderboard.END}"
    words = [] if name == "README.md" else ["records", "-o", str(path)]
    for owner, attribute, value in (
        (sys, "argv", ["program", *words]), (leaderboard, "ROOT", tmp_path),
        (leaderboard, "RECORDS", tmp_path), (leaderboard, "read_records", lambda root: []),
        (report, "record_sections", lambda *_: [LONG]),
    ):  # fmt: skip
        monkeypatch.setattr(owner, attribute, value)
    path.write_text(old)
    with full_disk(), pytest.raises(RunError, match=rf"cannot write .*{name}: File too large"):
        WRITERS[name](path)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {name: old}


def test_a_source_is_kept_whole_or_not_at_all(tmp_path):
    base, attempt = tmp_path / "2026-01-01_A", tmp_path / "2026-01-02_B"
    for path in ("gone.py", "a.py"):
        with full_disk(), pytest.raises(RunError, match="b.py"):
            sources.write_texts({path: "a = 1\n", "b.py": LONG}, attempt / "source")
        assert not (attempt / "source").exists()
    sources.write_texts({"a.py": "a = 1\n"}, base / "source")
    sources.write_texts({"a.py": f"{LONG}\n"}, attempt / "source")
    (attempt / "B.diff").write_text("old")
    with full_disk(), pytest.raises(RunError, match="B.diff"):
        sources.keep_as_diff(attempt, base)
    assert (attempt / "B.diff").read_text() == "old"
    assert sources.kept_texts(attempt) == {"a.py": f"{LONG}\n"}
    assert sorted(path.name for path in attempt.iterdir()) == ["B.diff", "source"]


def test_a_device_is_written_and_a_link_stays_one(tmp_path):
    link, page, (terminal, device) = tmp_path / "link", tmp_path / "page", os.openpty()
    link.symlink_to(page)
    for path in (link, Path(os.ttyname(device))):
        write_text(path, "new")
    assert link.is_symlink() and page.read_text() == "new" and os.read(terminal, 9) == b"new"


def test_logs_that_other_programs_wrote_again_are_named(tmp_path):
    text = REAL_LOGS[0].read_text()
    changed = {"UTF-16": text.encode("utf-16"), "byte order mark": text.encode("utf-8-sig"),
               "CRLF": text.replace("\n", "\r\n").encode(),
               "no whole gzip": gzip.compress(text.encode())[:-9]}  # fmt: skip
    for what, data in changed.items():
        copy = tmp_path / f"log.txt{'.gz' * ('gzip' in what)}"
        copy.write_bytes(data)
        done = tool("validate", copy)
        assert done.returncode == 4 and what in done.stdout.splitlines()[0], done.stdout


def test_what_is_no_file_is_named_and_the_rest_is_read(tmp_path):
    shutil.copy(runs.find_logs(ROOT / "records/embedded/2026-11-22_Default")[0], tmp_path)
    os.mkfifo(tmp_path / "a.txt")
    (tmp_path / "b.txt").mkdir()
    (tmp_path / "c.txt").symlink_to("nowhere")
    done = tool("validate", tmp_path)
    assert done.returncode == 4 and "4 logs: 1 sound" in done.stdout, done.stdout
    assert done.stdout.count("txt: is a folder, a pipe, a device or a broken link") == 3
    for read in (gpt2.read_ranks, hellaswag.read_examples):
        with pytest.raises(RunError, match="/dev/null is no .*file"):
            read(Path("/dev/null"))


def test_packed_logs_are_read_and_hidden_files_are_not(tmp_path):
    muon = ROOT / "records/embedded/2026-11-22_Muon"
    attempt, whole = shutil.copytree(muon, tmp_path / "A"), comparison.Arm.read(muon)
    packed, *_ = runs.find_logs(attempt)
    packed.with_name(f"{packed.name}.gz").write_bytes(gzip.compress(packed.read_bytes()))
    packed.rename(packed.with_name("kept"))
    (packed.parent / f"._{packed.name}").write_bytes(b"\0\5\26\7")
    for found in (comparison.Arm.read(attempt), comparison.Arm.read(packed.parent / "*.txt*")):
        found.require_sound()
        assert list(found.losses) == list(whole.losses)
    assert sources.kept_texts(attempt) == sources.kept_texts(muon)


def test_a_bug_is_no_regression_and_a_notebooks_backend_no_bug(monkeypatch):
    monkeypatch.setattr(comparison, "compare", lambda *_: 1 / 0)
    done = tool("diff", REAL_LOGS[0], REAL_LOGS[1])
    assert done.returncode == BUG and "Traceback" in done.stderr and "ZeroDivision" in done.stderr
    command = [sys.executable, str(ROOT / "tools/report.py"), "--help"]
    assert not subprocess.run(command, env=clean_environment(MPLBACKEND="inlined")).returncode


def test_a_title_stays_in_its_cell(tmp_path):
    folder = shutil.copytree(ROOT / "records/embedded/2026-11-22_Muon", tmp_path / "embedded/1_A")
    (folder / "README.md").write_text("# `a|b` | c\n")
    row = leaderboard.record_row(1, leaderboard.Record(folder), None, tmp_path / "README.md")
    assert r"| `a\|b` \| c |" in row and row.replace(r"\|", "").count("|") == 8


def test_dots_are_no_name(monkeypatch):
    with pytest.raises(RunError, match="--slug '..' is no part of a file's name"):
        RunOptions(slug="..")
    monkeypatch.setattr(sys, "argv", ["tokenize_text.py", "x.txt", "--name", ".."])
    with pytest.raises(SystemExit, match="2"):
        tokenize_text.parse()


def test_a_signal_as_the_log_opens_leaves_none(monkeypatch, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(log.fcntl, "flock", stop)
    with pytest.raises(KeyboardInterrupt):
        log.Log(str(tmp_path), "run", 1).open()
    assert not list(tmp_path.iterdir())
