"""What surrounds the runs of a race or a replay: locks, kills, names, hosts, clocks, ctrl-C."""

import errno
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, clean_environment, only_log, run_section
from forked import run_forked
from test_records import STAND_IN, stand_in, tool

from referee import harness, host
from tools import attempts, replay
from tools.cli import ToolError
from tools.comparison import Arm
from tools.runs import LoggedRun

FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("*/*.py")])
SCRIPTS = [path for path in FILES if "\n    finish(main" in path.read_text()]


def trainer_with(old: str, new: str) -> dict[str, str]:
    text = (STAND_IN / "train_gpt.py").read_text()
    assert old in text
    return {"train_gpt.py": text.replace(old, new)}


def test_a_host_is_its_machine_or_in_a_container_its_kernel(tmp_path, monkeypatch):
    seen = []
    for name, text in (("none", ""), ("BOOT_ID", "b"), ("MACHINE_ID", "m"), ("SYSTEMD", "")):
        monkeypatch.setattr(host, name, tmp_path / name, raising=False)
        monkeypatch.setattr(host.platform, "node", lambda name=name: name)  # a renamed host
        (tmp_path / name).write_text(text)
        seen.append(host.host_id())
    assert seen[1] == seen[2] and len(set(seen)) == 3


def test_sources_that_make_another_host_of_each_process_are_compared(tmp_path):
    changed = trainer_with('"host: h"', 'f"host: {uuid.uuid4().hex}"')
    a, b = (stand_in(tmp_path / f"2026-01-01_{x}", **changed) for x in "AB")
    assert "different hosts" not in tool("race", a, b, "-n", 2).stdout
    assert {run.host for x in (a, b) for run in Arm.read(x).runs} == {host.host_id()}


def test_one_race_at_a_time_runs_an_attempt_and_drops_what_made_no_step(tmp_path, monkeypatch):
    one, other, third = (attempts.copy_of(STAND_IN, tmp_path / "a", []) for _ in range(3))
    one.logs.mkdir(parents=True)
    for name, text in (("killed", "=== source x ===\n"), ("empty", ""), ("notes", "mine"),
                       ("ran", "=== source x ===\nstep:0/2")):  # fmt: skip
        (one.logs / f"{name}.txt").write_text(text)
    one.freeze()
    assert [path.stem for path in one.log_paths] == ["notes", "ran"]
    with pytest.raises(ToolError, match="another race runs"):
        other.freeze()

    def refuse(*words):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(attempts.fcntl, "flock", refuse)  # as some file servers do
    third.freeze()


def test_a_source_that_fails_before_its_first_step_leaves_no_attempt(tmp_path):
    origin, attempt = tmp_path / "origin", tmp_path / "out/A"
    attempts.sources.write_texts(trainer_with("step:0/2", "at:0/2"), stand_in(origin) / "source")
    done = tool("race", origin / "source", "-n", 2, "--crashing_seed=0", "--out", tmp_path / "out")
    assert done.returncode == 2 and not attempt.exists()
    assert "no run of source began: error: this run shall crash" in done.stderr


def test_names_of_any_kind_race_and_a_new_attempt_is_told(tmp_path):
    attempt = stand_in(tmp_path / f"Zwei Läufe {'x' * 90}")
    done = tool("race", attempt, "-n", 1)
    assert done.returncode == 0 and "is a new attempt" not in done.stderr, done.stderr
    assert harness.RunOptions(slug=dict(Arm.read(attempt).runs[0].flags)["--slug"])
    for code, said, *words in (
        (0, f"new is a new attempt: it gets the train_gpt.py of {ROOT}", tmp_path / "new"),
        (2, "--nproc_per_node at least 1", attempt, "--nproc_per_node=0"),
        (2, "--base: no attempt here keeps its own runs", STAND_IN, "--base", "/nowhere"),
    ):
        done = tool("race", "-n", 0, *words)
        assert done.returncode == code and said in done.stderr, done.stderr


@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -9), (signal.SIGHUP, 129)])
def test_a_race_that_is_killed_takes_its_run_and_its_scratch_folders_along(tmp_path, number, code):
    waits = trainer_with("-> int:\n", "-> int:\n    __import__('time').sleep(600)\n")
    attempt, scratch = stand_in(tmp_path / "2026-01-01_A", **waits), tmp_path / "tmp"
    scratch.mkdir()
    command = [sys.executable, str(ROOT / "tools/race.py"), str(attempt), "-n", "1"]
    process = subprocess.Popen(command, env=clean_environment(TMPDIR=str(scratch)))

    def is_running() -> bool:
        done = subprocess.run(["pgrep", "-f", f"[-]-log_dir={attempt}"], capture_output=True)
        return done.returncode == 0

    while not is_running():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(60) == code
    until = time.monotonic() + 60
    while (is_running() or list(scratch.iterdir())) and time.monotonic() < until:
        time.sleep(0.05)
    assert not is_running() and not list(scratch.iterdir())


def test_an_end_that_a_source_dates_back_does_not_hide_its_slow_clock(tmp_path):
    changed = trainer_with("    print(result)\n", "    __import__('time').sleep(2)\n"
                           "    os.utime(Path(args.log_dir, f'{name}.txt'), (0, now.timestamp()))\n"
                           "    print(result)\n")  # fmt: skip
    attempt = stand_in(tmp_path / "A", **changed)
    done = tool("race", attempt, "-n", 1)
    assert "  its ledger adds up to 0.0 s, its process took 2." in done.stdout, done.stderr
    assert any("its ledger adds up to 0.0 s" in doubt for doubt in Arm.read(attempt).objections)


def logged(first: int, last: int, status: str, loss=2.5) -> LoggedRun:
    curve = [(step, 9.0, loss) for step in range(first, last + 1)]
    return LoggedRun(Path("x"), train_curve=curve, val_curve=curve, result={"status": status})


def test_a_replay_compares_what_has_the_same_step(capsys):
    whole, nan = logged(1, 20, "missed"), float("nan")
    for old, new, code, said in (
        (logged(11, 20, "missed"), whole, 0, "REPRODUCED  all 20 losses"),  # a resumed run
        (logged(1, 7, "aborted"), whole, 0, "digit for digit; the log's run aborted"),
        (logged(1, 7, "diverged", nan), logged(1, 7, "diverged", nan), 0, "log's run diverged"),
        (logged(1, 7, "diverged"), whole, 1, "DIFFERENT   0 of 14 losses are missing"),
        (whole, logged(1, 7, "diverged"), 1, "DIFFERENT   26 of 40 losses are missing"),
        (whole, logged(1, 20, "missed", 3.0), 1, "40 of 40 losses, first train at step 1: 2.5"),
    ):
        assert replay.same_losses(old, new) == code and said in capsys.readouterr().out, said


def test_closed_streams_end_no_run_and_no_file_takes_their_place(flags, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import os, runpy, sys\nos.close(2)\nsys.stderr = None\n"
                      "runpy.run_path(sys.argv.pop(1), run_name='__main__')\n")  # fmt: skip
    done = run_forked([str(script), str(ROOT / "train_gpt.py"), *flags])
    assert done.returncode == 0 and "result status:" in run_section(only_log(tmp_path))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_ctrl_c_while_a_script_starts_prints_nothing(script, tmp_path):
    """It comes as argparse is imported, before all that takes time."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Stop:\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name == 'argparse':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Stop)\n"
    )
    done = subprocess.run([sys.executable, script], env=clean_environment(PYTHONPATH=str(tmp_path)),
                          capture_output=True)  # fmt: skip
    assert (done.returncode, done.stdout + done.stderr) == (-signal.SIGINT, b"")


def test_ctrl_c_at_the_end_prints_nothing():
    code = ("import atexit, os, signal; from referee.flags import finish\n"
            "atexit.register(os.kill, os.getpid(), signal.SIGINT); finish(lambda: 0)")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, b"")
