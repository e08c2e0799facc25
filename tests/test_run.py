"""The trainer as its user meets it: a process, its exit code, its log and its messages."""

import dataclasses
import gc
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    built,
    clean_environment,
    command,
    losses,
    only_log,
    run_section,
    settings,
    tiny_flags,
    train,
    trainer,
)
from forked import Forked, run_forked

import kernels
import referee.log
from kernels import Softcap
from referee.clock import Stopwatch
from referee.flags import RunError
from referee.harness import (
    STOP_SIGNALS,
    Run,
    StopRequest,
    carry_out,
    dont_compile,
    parse_flags,
    time_to_target,
    warm_up,
)
from referee.ranks import Runtime
from referee.sources import read_source, source_texts
from referee.task import check_shards
from tools.audit import objections
from tools.runs import read_log
from tools.sources import write_texts
from train_gpt import PROCESS_START, TRACKS, Hyperparameters, Trainer


class Finished(NamedTuple):
    """A run that has ended."""

    folder: Path
    log: Path
    done: subprocess.CompletedProcess
    wall_s: float


def run_to_its_end(shards, folder, *flags) -> Finished:
    started = time.perf_counter()
    done = train([*tiny_flags(shards, folder), *flags])
    assert done.returncode == 0, done.stderr
    return Finished(folder, only_log(folder), done, time.perf_counter() - started)


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory) -> Finished:
    """A run of 20 steps that has left a checkpoint."""
    return run_to_its_end(shards, tmp_path_factory.mktemp("finished"), "--save_every=10")


LONG = ("--num_steps=60", "--target_val_loss=4.0")


@pytest.fixture(scope="module")
def long(shards, tmp_path_factory) -> Finished:
    return run_to_its_end(shards, tmp_path_factory.mktemp("long"), *LONG)


def checkpoint_in(folder) -> Path:
    (found,) = folder.glob("*_step*")
    return found


def test_two_runs_take_turns_of_so_many_steps(flags, tmp_path, finished):
    """This test is the other run: between two of its bytes the trainer takes so many steps."""
    ours, its = socket.socketpair()
    words = command([*flags, "--turn_steps=7"])
    with subprocess.Popen(words, env=clean_environment(), stdin=its) as process, ours:
        its.close()
        ours.settimeout(180)
        ours.send(b".")
        assert ours.recv(1) == b"." and not list(tmp_path.iterdir())
        for last_step in ([], [7], [14]):
            ours.send(b".")
            assert ours.recv(1) == b"."
            time.sleep(0.3)
            steps = [n for kind, n in losses(only_log(tmp_path)) if kind == "train"]
            assert steps[-1:] == last_step and process.poll() is None
        ours.send(b".")
        assert ours.recv(1) == b""  # only when nothing of the process can disturb the other
        assert not Path(f"/proc/{process.pid}/maps").read_text()
        assert process.wait(60) == 0
    log = only_log(tmp_path)
    assert losses(log) == losses(finished.log)
    (waited,) = re.findall(r"^ledger: .* turn:([\d.]+)s", log.read_text(), re.M)
    assert float(waited) > 3 * 0.3 and " turn:" not in finished.log.read_text()


def test_turns_need_another_run(flags, tmp_path):
    done = train([*flags, "--turn_steps=3"])
    assert done.returncode == 1 and "tools/race.py --turns" in done.stderr
    script = tmp_path / "script.py"
    script.write_text(
        "import os, runpy, socket, sys\n"
        "ours, its = socket.socketpair()\n"
        "ours.send(b'1')\n"
        "ours.close()  # the other run has ended before it was set up\n"
        "os.dup2(its.fileno(), 0)\n"
        "runpy.run_path(sys.argv.pop(1), run_name='__main__')\n"
    )
    done = run_forked([str(script), *command([*flags, "--turn_steps=3"])[1:]])
    assert done.returncode == 1 and "before its first step" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.glob("*.txt"))


def wait_for(folder, pattern: str, process, seconds=180) -> Path:
    """The newest log once it holds pattern."""
    for _ in range(seconds * 20):
        for log in folder.glob("*.txt"):
            if re.search(pattern, run_section(log)):
                return log
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError(f"no {pattern} within {seconds} s")


def test_importing_the_file_touches_nothing(tmp_path):
    (tmp_path / "script.py").write_text(
        f"import os, threading, torch; os.chdir({str(tmp_path)!r}); import train_gpt\n"
        "assert os.listdir('.') == ['script.py']\n"
        "assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()\n"
        "assert threading.active_count() == 1\n"
    )
    done = run_forked([str(tmp_path / "script.py")])
    assert done.returncode == 0, done.stderr


def test_a_run_learns_and_its_log_holds_everything(long, tmp_path):
    text, lines = long.log.read_text(), long.log.read_text().splitlines()
    result = dict(pair.split(":", 1) for pair in lines[-1].split()[1:])
    assert lines[-1].startswith("result status:success")
    assert long.done.stdout.splitlines()[-1] == lines[-1]
    seen = losses(long.log)
    assert float(seen["val", 0]) == pytest.approx(np.log(64), abs=0.05)
    assert float(seen["val", 60]) < 3.0 and result["val_loss"] == seen["val", 60]
    assert all(("train", step) in seen for step in range(1, 61))
    above = text.rpartition(" sha256:")[0]
    assert hashlib.sha256(above.encode()).hexdigest() == result["sha256"]
    source = (ROOT / "train_gpt.py").read_text()
    assert f"=== source train_gpt.py lines:{len(source.splitlines())} sha256:" in lines[0]
    assert text.partition("\n")[2].startswith(source)
    for name in ("config", "environment", "git", "data", "run"):
        assert re.search(rf"^=== {name}\b", text, re.M)
    assert re.search(r"^overrides: .*\bnum_steps\b", text, re.M) and "\nnum_steps: 60\n" in text
    assert len(re.findall(r"^train_shard: \S+ tokens:\d+ sha256:[0-9a-f]{64}$", text, re.M)) == 3
    assert objections([read_log(long.log)]) == [] and text.count("\nforeign_modules: none\n") == 1
    (tmp_path / "log.txt").write_text(text.replace("modules: none", "modules: tqdm.py, ../x.py"))
    said = objections([read_log(tmp_path / "log.txt")])
    assert any("loaded: tqdm.py, ../x.py" in what for what in said)


def test_timed_and_untimed_seconds_add_up_to_the_wall_time(finished):
    ledger = re.search(r"^ledger: (.*) total:([\d.]+)s$", finished.log.read_text(), re.M)
    accounts = [float(pair.split(":")[1][:-1]) for pair in ledger[1].split()]
    assert sum(accounts) == pytest.approx(float(ledger[2]), abs=0.01)
    assert float(ledger[2]) < finished.wall_s  # which holds the start of the process, too


def test_no_attribute_of_what_a_trainer_is_handed_leads_to_the_referee(fresh_run):
    """Neither to an object of the run nor to anything that one refers to."""
    handed = []
    with pytest.raises(ZeroDivisionError):
        carry_out(fresh_run, lambda *parts: handed.append(parts) or 1 / 0)
    reached, waiting = {}, [handed]
    while waiting:
        thing = waiting.pop()
        if id(thing) in reached or isinstance(thing, type | torch.dtype | torch.device):
            continue
        reached[id(thing)] = thing
        waiting += thing if isinstance(thing, list | tuple) else vars(thing).values() if hasattr(
            thing, "__dict__") else ()  # fmt: skip
    run = fresh_run
    owned = run, run.rt, run.clock, run.log, run.task, run.options, run.curve, run.validation
    assert len(reached) > 50 and not reached.keys() & set(map(id, owned))


def test_warm_up_leaves_no_trace(tiny_task, tiny_hp):
    (run, warm), cold = built(tiny_task, tiny_hp), trainer(tiny_task, tiny_hp)
    warm_up(run, warm)
    batches = [cold.batches(0) for _ in range(2)]
    for step in range(3):
        assert torch.equal(warm.update(step, batches[0]), cold.update(step, batches[1]))
    for name, tensor in cold.state().items():
        assert torch.equal(tensor, warm.state()[name]), name


@pytest.fixture
def handlers():
    """Restores how this process takes signals."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def fresh_run(tiny_task, tiny_hp, tmp_path, handlers) -> Run:
    chosen = settings(tiny_task, tiny_hp, log_dir=str(tmp_path))
    return Run(chosen, "train_gpt.py", Runtime(), StopRequest(), PROCESS_START)


@pytest.fixture
def run(fresh_run) -> Run:
    """A run whose log is open."""
    fresh_run.log.open()
    return fresh_run


def test_the_collector_leaves_what_exists_alone_while_training(fresh_run):
    frozen = []

    class Watched(Trainer):
        def steps(self, first):
            frozen.append(gc.get_freeze_count())
            return super().steps(first)

    fresh_run.compiler = lambda: dont_compile
    carry_out(fresh_run, Watched)
    assert frozen[0] > 100_000 and gc.get_freeze_count() == 0


@pytest.mark.parametrize("dtype, bound", [("float32", 2.5e-6), ("bfloat16", 5e-3)])
def test_two_ranks_give_the_losses_of_one(shards, tmp_path, finished, dtype, bound):
    one = finished
    if dtype == "bfloat16":
        one = run_to_its_end(shards, tmp_path / "one", "--cpu_dtype=bfloat16")
    done = train([*tiny_flags(shards, tmp_path / "two"), f"--cpu_dtype={dtype}"], ranks=2)
    assert done.returncode == 0, done.stderr
    one, two = losses(one.log), losses(only_log(tmp_path / "two"))
    assert one.keys() == two.keys() and len(one) == 23
    for key, loss in one.items():  # both rounded to 1e-6
        assert abs(float(loss) - float(two[key])) < bound, key


ENDLESS = ("--num_steps=400", "--max_epochs=9")


def forked_at_step_5(flags, tmp_path, ranks=1) -> Forked:
    process = Forked(command([*flags, *ENDLESS])[1:], ranks)
    wait_for(tmp_path, r"step:5/400", process)
    return process


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)]
)
def test_a_rank_that_is_killed_or_stands_still_is_named(flags, tmp_path, number):
    flags = [*flags, "--save_every=3", "--rank_timeout_s=5"]
    process = forked_at_step_5(flags, tmp_path, ranks=2)
    first, second = process.ranks
    os.kill(second.pid, number)
    if number == signal.SIGKILL:  # torchrun then ends the others
        second.join(60)
        os.kill(first.pid, signal.SIGTERM)
    first.join(90)
    second.kill()
    _, errors = process.communicate()
    reason = re.search(r"error: lost contact with rank 1 \((.*?)\)", errors)[1]
    timed_out = re.search("timeout|timed out", reason, re.I)
    assert bool(timed_out) == (number == signal.SIGSTOP) and first.exitcode == 1
    assert re.search(r"^to resume from step \d+: .* --resume ", errors, re.M)
    assert "status:aborted" in only_log(tmp_path).read_text()


def test_killed_runs_resume_to_the_same_digits(flags, tmp_path, long):
    flags = [*flags, *LONG]
    killed, resumed = tmp_path / "killed", tmp_path / "resumed"
    process = Forked(command([*flags, "--save_every=7", f"--log_dir={killed}"])[1:])
    log = wait_for(killed, r"checkpoint: \S+ step:24\n", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and "result" not in run_section(log)
    done = train([*flags, f"--log_dir={resumed}", f"--resume={checkpoint_in(killed)}"])
    assert done.returncode == 0, done.stderr
    expected, found = losses(long.log), losses(only_log(resumed))
    assert len(found) >= 35
    assert found == {key: expected[key] for key in found}
    assert re.search(r"resumed_from:\d\d", only_log(resumed).read_text())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_interrupted_runs_save_a_checkpoint_and_say_how_to_go_on(flags, tmp_path, number):
    process = forked_at_step_5(flags, tmp_path)
    for _ in range(3):  # within milliseconds, as a key bounces or a launcher passes it on
        process.send_signal(number)
        time.sleep(0.01)
    _, errors = process.communicate()
    assert process.returncode == 128 + number, errors
    assert errors.count("stopping after this step; press again to abort without") == 1
    assert re.search(r"^result status:aborted", only_log(tmp_path).read_text(), re.M)
    saved = json.loads((checkpoint_in(tmp_path) / "config.json").read_text())
    assert saved["step"] >= 6 and saved["step"] % 2 == 0  # so that no gradients wait for Adam
    assert not list(tmp_path.glob("*.part"))
    line = errors.splitlines()[-1]
    assert line.startswith(f"to resume from step {saved['step']}: ")
    words = shlex.split(line.partition(": ")[2])
    assert words[:2] == process.args[:2]
    same = parse_flags(words[2:], TRACKS, "embedded", "")
    assert Path(same.options.resume) == checkpoint_in(tmp_path)
    before = parse_flags(process.args[2:], TRACKS, "embedded", "")
    assert same[:3] == before[:3] and same.options.seed == before.options.seed


def torchrun(*words) -> subprocess.Popen:
    """Two ranks of a script, as run.sh starts them."""
    script = f'python={sys.executable}\n{run_sh_function("launch")}\nlaunch "$@"'
    return subprocess.Popen(
        ["bash", "-c", script, "bash", "--standalone", "--nproc_per_node=2", *words],
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_two_ranks_agree_on_the_step_at_which_they_stop(flags, tmp_path):
    process = torchrun(*command([*flags, *ENDLESS])[1:])
    log = wait_for(tmp_path, r"step:5/400", process)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 128 + signal.SIGINT and "Traceback" not in output, output
    assert re.search(r"^result status:aborted", log.read_text(), re.M), output
    assert checkpoint_in(tmp_path).exists()


def test_ctrl_c_while_torchrun_is_imported_prints_nothing(flags):
    process = torchrun(*command(flags)[1:])
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=180) == ("", None)
    assert process.returncode == -signal.SIGINT


def test_torchrun_says_little_of_a_rank_that_ends_with_an_error(tmp_path):
    (tmp_path / "script.py").write_text(
        "import os, sys, time\n"
        "if os.environ['RANK'] == '0':\n"
        "    sys.exit('error: the reason')\n"
        "time.sleep(600)\n"
    )
    process = torchrun(str(tmp_path / "script.py"))
    said, *by_torchrun = process.communicate(timeout=180)[0].splitlines()
    assert process.returncode == 1 and said == "error: the reason"
    assert "failed (exitcode: 1) local_rank:" in by_torchrun[-1]
    assert len(by_torchrun) <= 3  # it also says that it ends the other rank


def test_a_diverging_run_stops(flags, tmp_path):
    done = train([*flags, "--num_steps=300", "--max_epochs=9", "--muon_lr=1e20"])
    assert done.returncode == 1
    last = only_log(tmp_path).read_text().splitlines()[-1]
    assert last.startswith("result status:diverged") and "steps:300" not in last


def refused(done, *messages):
    assert done.returncode not in (0, None), done.stdout
    assert "Traceback" not in done.stderr, done.stderr
    for message in messages:
        assert re.search(message, done.stderr), done.stderr


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--train_files=/nowhere/*.bin", r"no shards match /nowhere/\*\.bin; name those"),
        ("--train_files=/dev/null", r"/dev/null\b.*; "),
        ("--vocab_size=40 --document_start=39", r"holds token \d+, but the vocabulary ends at 39"),
        ("--num_steps=99999", r"steps need"),
        ("--val_tokens=640000", r"validation"),
        ("--micro_batch_seqs=3", r"--micro_batch_seqs"),
        ("--num_steps=-1", r"--num_steps -1 is out of range"),
        ("--log_dir=/proc/nowhere", "cannot write /proc/nowhere/.*: No such .* give --log_dir"),
        ("--resume=/nowhere", r"/nowhere is not a usable checkpoint"),
    ],
)
def test_bad_flags_and_files_get_one_clear_error(flags, flag, message):
    done = train([*flags, *flag.split()])
    refused(done, "error: ", message)
    assert "result status" not in done.stdout  # which would hide the reason


BAD_FLAGS = [
    ("--task=mars", r"invalid choice: 'mars'"),
    ("--track=mars", r"invalid choice: 'mars'"),
    ("--batch_tokens=512,100", r"--batch_tokens 512,100 is not a multiple of --seq_len 64"),
    ("--batch_tokens=0", r"--batch_tokens 0 is out of range"),
    ("--muon_lr=nan", r"--muon_lr nan is out of range"),
    ("--muon_lr=1e39", r"--muon_lr 1e\+39 is out of range: .* at most 3\.4e\+38"),
    ("--tied_frac=1.5", r"--tied_frac 1.5 is out of range: .* at most 1"),
    ("--num_steps=many", r"invalid int value: 'many'"),
    ("--compile=maybe", r"invalid boolean value"),
    ("--no_such_flag=1", r"unrecognized arguments: --no_such_flag"),
    ("--document_start=64", r"--document_start 64 is not below --vocab_size 64"),
    ("--shift_taps=0,64", r"--shift_taps 0,64 reach further back than --seq_len 64"),
    ("--document_cap=64,0", r"--document_cap 64,0 mixes 0 with caps"),
    ("--layers=SXL", r"--layers must be of S, L, s, l and -"),
    ("--layers=--", r"--layers must be of S, L, s, l and -, and not of - alone"),
    ("--num_heads=1", r"--num_heads 1 is odd; --layers s and l pair heads"),
    ("--window_tokens=16,many", r"invalid list_of_numbers value"),
    ("--value_layers=0,4", r"--value_layers must be layers of --layers that attend, each once"),
    ("--value_layers=0,2", r"--value_layers must be layers of --layers that attend"),
    ("--value_layers=1,1", r"--value_layers must be layers of --layers that attend"),
    ("--momentum_steps=9", r"--momentum_steps: '9' is not 2 numbers"),
    ("--momentum_steps=none", r"--momentum_steps: 'none' is not 2 numbers"),
    ("--model_dim=36", r"--model_dim 36 does not divide by 4 times --num_heads 2"),
    ("--mix_at=5", r"--mix_at must be layers of --layers, or one more, or none"),
    ("--mix_at=-1,2", r"--mix_at -1,2 is out of range"),
    ("--mix_from=4", r"--mix_from must be layers of --layers"),
    ("--mix_from=-1", r"--mix_from -1 is out of range"),
    ("--seed=-1", r"--seed -1 is out of range"),
    ("--seed=99999999999999999999999", r"--seed 9+ is out of range"),
    ("--micro_batch_seqs=-1", r"--micro_batch_seqs -1 is out of range"),
    ("--save_every=-5", r"--save_every -5 is out of range"),
    ("--rank_timeout_s=0", r"--rank_timeout_s 0 is out of range"),
    ("--slug=a/b", r"--slug 'a/b' is no part of a file's name"),
    ("--slug=a\nb", r"--slug 'a\\nb' is no part of a file's name"),
    ("--slug=", r"--slug '' is no part of a file's name"),
    ("--train_files=", r"--train_files and --val_files must name shards"),
    ("--val_files=", r"--train_files and --val_files must name shards"),
    ("--seed", r"--seed: expected one argument"),
]


@pytest.mark.parametrize("flag, message", BAD_FLAGS, ids=[flag for flag, _ in BAD_FLAGS])
def test_bad_flags_are_refused_with_their_names(flags, capsys, flag, message):
    with pytest.raises((RunError, SystemExit)) as caught:
        parse_flags([*flags, flag], TRACKS, "embedded", "")
    assert re.search(message, f"{caught.value}{capsys.readouterr().err}")


@pytest.mark.parametrize("layers", ["-L-", "--L", "L-"])
def test_a_value_may_begin_with_a_dash(layers):
    found = parse_flags(["--layers", layers, "--seed", "3"], TRACKS, "embedded", "")
    assert (found.hp.layers, found.options.seed) == (layers, 3)


@pytest.mark.parametrize(
    "ranks, flag, said",
    [
        (3, "--seed=0", "cannot be dealt to 3 ranks"),  # an error of every rank
        (2, "--train_files=/nowhere/*.bin", "error: no shards match"),  # of one
    ],
)
def test_an_error_is_printed_once_and_ends_every_rank(flags, ranks, flag, said):
    process = Forked(command([*flags, flag])[1:], ranks)
    _, errors = process.communicate()
    assert errors.count(said) == errors.count("error: ") == 1 and "Traceback" not in errors
    assert [rank.exitcode for rank in process.ranks] == [1] * ranks


def test_a_checkpoint_that_is_not_of_this_run_is_refused(flags, shards, tmp_path, finished):
    """Other changes: test_checkpoints.py."""
    saved = Path(shutil.copytree(checkpoint_in(finished.folder), tmp_path / "saved"))
    flags = [*flags, f"--resume={saved}"]
    done = train([*flags, "--num_steps=30", "--window_tokens=8,16"])
    refused(done, r"to resume it, add: --num_steps=20 --window_tokens=16,32,48\n")
    shutil.copytree(shards, tmp_path / "moved")
    moved = [f"--train_files={tmp_path}/moved/train_*.bin", f"--val_files={tmp_path}/moved/val.bin"]
    assert train([*flags, *moved]).returncode == 0
    (tmp_path / "moved/train_2.bin").unlink()
    refused(train([*flags, *moved]), "was trained on other shards")
    raw = bytearray((saved / "__0_0.distcp").read_bytes())
    raw[len(raw) // 2] ^= 0x40
    (saved / "__0_0.distcp").write_bytes(raw)
    refused(train([*flags, f"--log_dir={tmp_path}/last"]), "was changed after it was written")
    assert not list((tmp_path / "last").iterdir())  # for nothing was computed


def test_a_full_disk_ends_the_run_with_one_error(flags, tmp_path, finished):
    """A limit on file size stands for the full disk: both fail in the middle of a write."""
    done = train(flags, file_limit=finished.log.stat().st_size - 1500)
    refused(done, re.escape(f"cannot write {only_log(tmp_path)}: File too large; make room"))
    only_log(tmp_path).unlink()
    refused(train(flags, file_limit=9000), "File too large")
    assert not list(tmp_path.glob("*.txt"))


def test_a_checkpoint_that_cannot_be_written_ends_no_run(flags, tmp_path):
    write_texts(source_texts(ROOT, "train_gpt.py"), tmp_path / "source")
    flags = [*flags, "--save_every=10", f"--source_dir={tmp_path}/source"]
    done = train(flags, file_limit=150_000)
    assert done.returncode == 0, done.stderr
    said = r"^no checkpoint: cannot save \S+_step0000010: File too large; .*; the run goes on$"
    assert re.search(said, done.stdout, re.M) and "status:missed" in done.stdout
    assert not list(tmp_path.glob("*_step*"))


def test_without_a_compiler_the_run_falls_back_to_eager_and_says_so(flags, tmp_path, finished):
    done = train([*flags, "--compile=true"], CXX="/nowhere/g++")
    assert done.returncode == 0, done.stderr
    said = "compile: no compiler /nowhere/g++"
    assert said in done.stdout and said in run_section(only_log(tmp_path))
    assert losses(only_log(tmp_path)) == losses(finished.log)


@pytest.mark.slow
def test_with_a_broken_compiler_the_run_falls_back_to_eager_and_says_so(flags, tmp_path, finished):
    broken = clean_environment(CXX="false", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    words = command([*flags, "--compile=true"])  # not forked: Inductor's import reads CXX
    done = subprocess.run(words, env=broken, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "compile: failed, so this run is slower" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert losses(only_log(tmp_path)) == losses(finished.log)


def test_help_names_every_hyperparameter_with_its_default():
    done = train(["--track=fineweb", "--help"])
    assert done.returncode == 0
    for name in Hyperparameters.__dataclass_fields__:
        assert f"--{name} " in done.stdout
    assert "(default: '131072,262144,393216')" in re.sub(r"\s+", " ", done.stdout)


def test_flags_give_typed_overrides_of_the_track():
    track, task, hp, options, overrides = parse_flags(
        ["--num_steps", "7", "--val_spread", "false", "--seed", "3"], TRACKS, "embedded", ""
    )
    assert (track, hp.num_steps, task.val_spread, options.seed) == ("embedded", 7, False, 3)
    assert overrides == ["num_steps", "val_spread"]
    assert parse_flags(["--num_steps", "800"], TRACKS, "embedded", "").overrides == []
    other_task = ["--track", "fineweb", "--task", "wikitext103"]
    track, task, hp, _, overrides = parse_flags(other_task, TRACKS, "embedded", "")
    assert (track, task.target_val_loss, hp.num_steps) == ("fineweb", 3.8, 1500)
    assert overrides == ["task"]


def test_time_to_target_is_interpolated():
    assert time_to_target([(0.0, 5.0), (100.0, 3.0), (200.0, 1.0)], 2.5) == "125ms"
    assert time_to_target([(0.0, 5.0), (100.0, 3.0)], 2.5) == "none"


def test_stopwatch_charges_each_moment_once(monkeypatch):
    now = [10.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock = Stopwatch(0.0, lambda: None)
    clock.switch("train")
    now[0] = 13.0
    with clock.charged_to("validation"):
        now[0] = 20.0
        assert clock.train_ms() == 3000
    now[0] = 21.0
    assert clock.train_ms() == 4000
    assert clock.ledger() == "ledger: train:4.000s startup:10.000s validation:7.000s total:21.000s"


def test_the_first_signal_in_the_loop_asks_and_the_second_interrupts(handlers):
    stop = StopRequest()
    for number in STOP_SIGNALS:
        stop.signal, stop.deferred = 0, False
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
            time.sleep(1)
        stop.signal, stop.deferred = 0, True
        os.kill(os.getpid(), number)
        assert stop.signal == number
        os.kill(os.getpid(), number)  # the same request
        stop.since -= 2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
            time.sleep(1)


def test_a_run_under_nohup_outlives_its_terminal(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    StopRequest()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_run_that_is_asked_to_end_logs_the_step_under_way(run, tmp_path):
    run.rt.steps_in_flight = 1  # as on a GPU: a step's loss is read while the next one runs
    run.start()
    for step in range(1, 6):
        run.stop.signal = signal.SIGTERM if step >= 4 else 0
        run.end_step(torch.tensor(3.0), 512)
    assert run.status == "aborted"
    run.finish()
    run.log.close(run.result())
    text = only_log(tmp_path).read_text()
    assert re.findall(r"^step:(\d+)", text, re.M) == list("12345") and "steps:5 " in text


@pytest.mark.parametrize("in_flight", [0, 1])  # on a CPU, on a GPU
def test_a_stop_in_the_last_step_leaves_the_run_to_its_last_validation(run, in_flight):
    run.rt.steps_in_flight = in_flight
    run.start()
    for step in range(1, run.hp.num_steps + 1):
        run.stop.signal = signal.SIGTERM if step + in_flight >= run.hp.num_steps else 0
        run.end_step(torch.tensor(3.0), 512)
    assert run.step == run.hp.num_steps and not run.status


def test_a_validation_loss_that_is_no_number_is_a_divergence_with_a_sound_log(run, tmp_path):
    run.header()
    run.log.section("data", ["data_sha256: x (none expected)"])
    run.log.section("run")
    run.start()
    run.validate(lambda inputs: [torch.full((inputs.numel(), 64), torch.nan)], 1)
    run.finish()
    run.log.line(run.clock.ledger())
    run.log.close(run.result())
    assert run.status == "diverged" and not read_log(only_log(tmp_path)).faults


def test_logits_that_could_answer_for_themselves_are_refused(run):
    class Kind(torch.Tensor):
        """A tensor whose loss is 0."""

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is torch.nn.functional.cross_entropy:
                return torch.zeros(len(args[1]))
            return super().__torch_function__(func, types, args, kwargs or {})

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.nn.functional.cross_entropy:
                return torch.zeros(len(args[1]))
            return func(*args, **(kwargs or {}))

    def logits(inputs_BT):
        return torch.zeros(inputs_BT.numel(), run.task.vocab_size)

    def within_a_mode(inputs_BT):
        with Mode():
            yield logits(inputs_BT)

    def with_a_method(inputs_BT):
        own = logits(inputs_BT)
        own.float = lambda: logits(inputs_BT).as_subclass(Kind)
        yield own

    with pytest.raises(RunError, match="logits are of Kind, not of Tensor itself"):
        run.validate(lambda inputs_BT: [logits(inputs_BT).as_subclass(Kind)], 1)
    with pytest.raises(RunError, match="a mode of torch is on"):
        run.validate(within_a_mode, 1)
    assert run.validation.loss(with_a_method, 1) == pytest.approx(math.log(run.task.vocab_size))


def test_a_step_gives_nothing_that_could_write_its_own_line(run):
    class Kind(torch.Tensor):
        """A loss whose tolist() may give anything."""

    class Count(int):
        """A number with a __format__ of its own."""

    run.start()
    for loss, tokens in (torch.tensor(3.0).as_subclass(Kind), 8), (torch.tensor(3.0), Count(8)):
        with pytest.raises(RunError, match="not Tensor and int themselves"):
            run.end_step(loss, tokens)
    assert "step:" not in run.log.path.read_text()


def test_a_contended_machine_is_told_at_the_first_validation(run, capsys):
    run.start()
    for share, said in ((0.99, 0), (0.5, 1), (0.4, 1)):  # once
        run.end_step(torch.tensor(3.0), 512)
        run.clock.cpu_share = lambda share=share: share
        run.validate(lambda inputs: [torch.zeros(inputs.numel(), 64)], 1)
        assert capsys.readouterr().out.count("so far, other processes") == (said and share == 0.5)


@pytest.mark.parametrize(
    "first_val_loss, train_loss, status",
    [
        (5.73, lambda step: 5.73 - 0.0004 * step, ""),  # slow warm-up from above ln V
        (5.73, lambda step: 5.9, "diverged"),
        (3.9, lambda step: 4.2, ""),  # ln V is 4.16
        (3.9, lambda step: 4.3, "diverged"),
        (3.9, lambda step: 4.3 if step % 40 else 3.0, ""),
    ],
)
def test_a_run_diverges_when_it_stays_above_where_it_began(run, first_val_loss, train_loss, status):
    run.hp = dataclasses.replace(run.hp, num_steps=200)
    run.curve = [(0.0, first_val_loss)]
    run.start()
    for step in range(60):
        run.end_step(torch.tensor(train_loss(step)), 512)
    assert run.status == status


def test_the_fiftieth_such_step_in_a_row_ends_the_run(run):
    run.hp = dataclasses.replace(run.hp, num_steps=200)
    run.start()
    for step in range(1, 51):
        assert not run.status
        run.log_step(step, torch.tensor([9.0, 0.0]), lambda: None)
    assert run.status == "diverged"


def test_output_that_nobody_reads_ends_no_run(tmp_path):
    """As when an ssh window closes, or behind `| head`: the log goes on."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys; from referee.log import Log\n"
        "read_end, write_end = os.pipe()\n"
        "os.dup2(write_end, 1), os.close(write_end), os.close(read_end)\n"
        "log = Log(sys.argv[1], 'x', 3); log.open()\n"
        "for n in range(9):\n"
        "    log.line(f'line {n}', show=True)\n"
        "log.close()\n"
    )
    done = run_forked([str(script), str(tmp_path)])
    assert done.returncode == 0 and not done.stderr
    assert len(only_log(tmp_path).read_text().splitlines()) == 9


def test_a_silent_run_says_what_it_does_until_its_log_is_closed(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(referee.log, "SILENCE_S", 0.2)
    log = referee.log.Log(str(tmp_path), "x", 8)
    log.open()
    log.progress(5, "loss 1.5")
    said, until = "", time.monotonic() + 60
    while said.count("step 5/8: loss 1.5") < 2:
        assert time.monotonic() < until
        time.sleep(0.05)
        said += capfd.readouterr().err
    log.close()
    capfd.readouterr()
    time.sleep(0.5)
    assert capfd.readouterr() == ("", "")


class TwoRanks(Runtime):
    """One of two ranks, of which the other one says what a test lets it say."""

    def __init__(self, other):
        super().__init__()
        self.other = other

    def all_of(self, value):
        return [value, self.other]


ASK = """
from referee import flags, ranks
ranks.SILENT_S, ranks.STORE_S = 0.1, 1
print(ranks.RANK, ranks.WORLD_SIZE, ranks.LOCAL_RANK)
flags.finish(ranks.rank_store)
"""


@pytest.mark.parametrize("found, code, out, error", [
    (("", "", ""), 0, "0 1 0\n", ""),
    (("3", "", "3"), 0, "0 1 0\n", ""),
    (("abc", "2", "0"), 1, "", "error: RANK, .*'abc'; unset all, or .*\n"),
    (("0", "2", "0"), 1, "0 2 0\n", "rank 0 waits for the other 1 of WORLD_SIZE=2, .*: unset RANK "
     "WORLD_SIZE\nerror: rank 0 cannot reach the others .*\n"),
])  # fmt: skip
def test_ranks_of_the_environment_are_understood_or_named(tmp_path, found, code, out, error):
    (tmp_path / "ask.py").write_text(ASK)
    names = dict(zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), found, strict=True))
    done = run_forked([f"{tmp_path}/ask.py"], MASTER_ADDR="127.0.0.1", MASTER_PORT="0", **names)
    assert done.returncode == code and re.fullmatch(out, done.stdout), done
    assert re.fullmatch(error, done.stderr), done.stderr


def test_all_ranks_compile_or_none_does(run):
    asked = []
    for other, compiles in (("", True), ("no compiler g++", False)):
        run.rt = TwoRanks(other)
        assert (run.compiler() is not dont_compile) == compiles

    class Compiled:
        rt = Runtime()

        def compile(self, compile_fn):
            asked.append(compile_fn)

        def state(self):
            return {}

        def warm_up(self):
            assert self.rt.is_alone, "a rank whose compiler fails would leave the others waiting"

    run.rt = TwoRanks("C++ compile error")  # which the other one meets in warm-up
    Compiled.rt.is_alone = False
    run.compiler = lambda: torch.compile
    warm_up(run, Compiled())
    assert asked == [torch.compile, dont_compile]


def test_machines_with_other_shards_are_refused(run, tiny_task):
    same, lines = check_shards(tiny_task)
    run.rt = TwoRanks((True, (same, lines), None))
    assert run.check_data(None) == lines
    run.rt = TwoRanks((True, ("another hash", lines), None))
    with pytest.raises(RunError, match="have different shards"):
        run.check_data(None)


def test_a_parameter_that_nothing_uses_is_named(tiny_task, tiny_hp):
    run, unused = built(tiny_task, tiny_hp)
    unused.model.layers = [layer._replace(value_embed=None) for layer in unused.model.layers]
    with pytest.raises(RunError, match=r"the loss does not depend on blocks\.0\.attn\.value_gate"):
        warm_up(run, unused)


@pytest.mark.parametrize("text", ["x = 1", "x = 1\n\x0cy = 2\n", "x = 1\n\n"])
def test_a_source_with_a_form_feed_or_no_last_newline_gives_a_sound_log(run, tmp_path, text):
    (tmp_path / "a.py").write_text(text)
    run.sources = {"train_gpt.py": read_source(tmp_path / "a.py")}
    run.header()
    run.log.close(run.result())
    found = read_log(only_log(tmp_path))
    assert not found.faults and found.sources["train_gpt.py"].text.rstrip() == text.rstrip()


def test_a_broken_device_leaves_the_result_line(fresh_run, tmp_path):
    def broken(settings, rt):
        def synchronize():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        fresh_run.clock.synchronize = synchronize
        fresh_run.log.line("step:1/20")
        raise RuntimeError("the first error")

    with pytest.raises(RuntimeError):
        carry_out(fresh_run, broken)
    assert only_log(tmp_path).read_text().splitlines()[-1].startswith("result status:aborted")


def test_a_model_beyond_a_cpu_s_memory_is_one_line(fresh_run):
    with pytest.raises(RunError, match="out of memory on .*; lower --seq_len or the model's size"):
        carry_out(fresh_run, lambda settings, rt: torch.empty(1 << 50))


@pytest.mark.parametrize("vocab_size, in_fp8", [(64, True), (257, False)])
def test_sizes_that_fp8_cannot_multiply_are_not_multiplied_in_fp8(monkeypatch, vocab_size, in_fp8):
    asked = []

    def head_op(x, *arguments):
        asked.append([low.dtype.itemsize == 1 for low in arguments[1:3]])
        return (x.sum(),)

    monkeypatch.setattr(kernels, "head_op", head_op)
    monkeypatch.setattr(kernels, "use_kernels", lambda x: True)
    x, weight, targets = torch.zeros(16, 32), torch.zeros(vocab_size, 32), torch.zeros(16, 1).long()
    cap = Softcap(23.0, 5.0, 7.5)
    kernels.head_loss(x, weight, targets, torch.ones(1), cap, torch.float32, fp8=True)
    assert asked == [[in_fp8, in_fp8]]


def run_sh_function(name: str) -> str:
    return re.search(rf"^{name}\(\) .*?^}}$", (ROOT / "run.sh").read_text(), re.M | re.S)[0]


def bash(script: str, **environment) -> subprocess.CompletedProcess:
    words = ["bash", "-c", f"set -euo pipefail\n{script}"]
    environment = clean_environment(**environment)
    return subprocess.run(words, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "state, installs",
    [
        ("whole", ""),
        ("lacks a package", "pip install"),
        ("python is gone", "venv --clear pip install"),
        ("pip is gone", "ensurepip pip install"),
        ("none", "venv --clear pip install"),
        ("read-only", ""),
        ("no network", "pip install"),
        ("ctrl-C", "pip install"),
    ],
)
def test_run_sh_heals_its_environment(tmp_path, state, installs):
    """A script stands for Python: it notes which of its modules are run."""
    (tmp_path / ".venv/bin").mkdir(parents=True)
    fake = tmp_path / "fake"
    missing = {"pip is gone": "pip"}.get(state, "nothing")
    has_packages = "0" if state in ("whole", "read-only") else "1"
    fake.write_text(
        "#!/bin/bash\n"
        "${PIP_TARGET+exit 5}\n"
        "[ $1 != -P ] || shift\n"
        f"case $1 in -) exit {has_packages} ;; -c) exit 0 ;; esac\n"
        f"[ $2 != {missing} ] || [ $3 != --version ] || exit 1\n"
        f"[ $3 = --version ] || echo $2 ${{3/--default-pip/}} >>{tmp_path}/ran\n"
        f"[ $2 != venv ] || ln -sf {fake} {tmp_path}/.venv/bin/python\n"
        + "[ $3 != install ] || { echo 'ERROR: no wheel' >&2; exit 1; }\n" * (state == "no network")
        + "[ $3 != install ] || kill -INT $PPID\n" * (state == "ctrl-C")
    )
    fake.chmod(0o755)
    target = "/nowhere" if state == "python is gone" else fake
    if state != "none":
        (tmp_path / ".venv/bin/python").symlink_to(target)
    functions = "\n".join(map(run_sh_function, ("fail", "satisfies", "set_up")))
    (tmp_path / "requirements.txt").write_text("torch==1\n")
    done = bash(
        f"root={tmp_path}\nown={tmp_path}/.venv\nvenv={'/no' if state == 'read-only' else '$own'}\n"
        f"find_python() {{ echo {fake}; }}\n{functions}\n"
        f"set_up {tmp_path}/requirements.txt\necho $python",
        PIP_TARGET="elsewhere",
    )  # fmt: skip
    if state == "ctrl-C":
        assert done.returncode == 130 and "error" not in done.stderr, done.stderr
        return
    if state == "no network":
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.endswith("not install the requirements: ERROR: no wheel\n")
        return
    assert done.stdout == f"{tmp_path}/.venv/bin/python\n", done.stderr
    assert bool(re.search(r"^set up in \d+ s$", done.stderr, re.M)) == bool(installs)
    ran = (tmp_path / "ran").read_text().split() if (tmp_path / "ran").exists() else []
    assert " ".join(ran) == installs


@pytest.mark.parametrize(
    "track, files, missing, script",
    [
        ("embedded", ["embedded_train.bin", "embedded_val.bin"], "", ""),
        ("embedded", ["embedded_train.bin", "embedded_val.bin"], "embedded_val.bin", "embedded.py"),
        ("embedded_1.34", ["embedded_val.bin"], "", "embedded.py"),
        ("wikitext103", ["w_train_1.bin", "w_val_0.bin", "manifest.json"], "", ""),
        ("wikitext103", ["w_train_1.bin", "w_val_0.bin"], "", "tokenize_text.py"),
    ],
)
def test_run_sh_gets_what_is_missing_of_a_track(tmp_path, track, files, missing, script):
    folder = tmp_path / "data" / track.partition("_")[0]
    folder.mkdir(parents=True)
    for name in set(files) - {missing}:
        (folder / name).write_text("")
    done = bash(f"root={tmp_path}\npython=echo\nset_up_tools() {{ echo packages >&2; }}\n"
                f"{run_sh_function('get_data')}\nget_data {track}")  # fmt: skip
    assert done.returncode == 0
    packages = ["packages"] if script == "tokenize_text.py" else []
    assert done.stderr.split()[: len(packages) + 1] == (
        [*packages, f"{tmp_path}/data/{script}"] if script else []
    )


def test_run_sh_needs_no_home_and_no_writable_checkout(tmp_path):
    lines = re.search(r"^root=.*?^fi$", (ROOT / "run.sh").read_text(), re.M | re.S)[0]
    for name, kept in (("plain", True), ("with blank", False)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.sh").write_text(
            f"set -euo pipefail\nunset HOME XDG_CACHE_HOME\n{lines}\necho $venv\n"
        )
        done = subprocess.run(["bash", tmp_path / name / "run.sh"], capture_output=True, text=True)
        assert (done.stdout == f"{tmp_path}/{name}/.venv\n") == kept, done.stderr
        assert done.returncode == 0 and " " not in done.stdout


@pytest.fixture
def checkout(tmp_path) -> Path:
    """run.sh, which requires nothing here, and two scripts; beside it a folder to call it from."""
    folder, caller = tmp_path / "checkout", tmp_path / "caller"
    for path in (folder, caller, tmp_path / "elsewhere/checkout"):
        path.mkdir(parents=True)
    shutil.copy(ROOT / "run.sh", folder)
    (folder / "tools").mkdir()
    for path in ("requirements.txt", "tools/requirements.txt"):
        (folder / path).write_text("numpy==" + np.__version__)
    (folder / "where.py").write_text("print(__file__)")
    (folder / "train_gpt.py").write_text("print('its flags')")
    for name in ("email", "random", "torch", "pip"):
        (caller / f"{name}.py").write_text("raise SystemExit(3)")
    (caller / "link").symlink_to(folder / "run.sh")
    return folder


PYTHON_FIRST = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


CALLS = "bash link", "sh ../checkout/run.sh", "cd ..; bash checkout/run.sh"


@pytest.mark.parametrize("way", [*CALLS, "cd ../checkout; bash -s <run.sh"])
def test_run_sh_works_however_it_is_called(checkout, way):
    done = bash(f"cd {checkout.parent}/caller; {way} where.py", PATH=PYTHON_FIRST,
                CDPATH=f"{checkout.parent}/elsewhere")  # fmt: skip
    assert (done.stdout, done.stderr) == (f"{checkout}/where.py\n", "")


def test_run_sh_says_what_it_does(checkout):
    done = bash(f"{checkout}/run.sh tset")
    assert done.returncode == 1 and list(checkout.glob("data*")) == []
    assert re.fullmatch("error: there is no command tset; .*\n", done.stderr)
    said = bash(f"{checkout}/run.sh --help", PATH=PYTHON_FIRST).stdout
    assert "its flags" in said
    for word in ("test", "FILE.py", "torchrun"):
        assert f"./run.sh {word} [...]" in said and word in done.stderr


@pytest.mark.parametrize("usable, chosen", [(0, 0), (1, 1), (2, 2), (3, 2), (8, 8)])
def test_run_sh_counts_the_gpus_that_torch_can_use(tmp_path, usable, chosen):
    broken = "#!/bin/sh\necho 'Driver/library version mismatch' >&2\nexit 18\n"
    for name, text in (("nvidia-smi", broken), ("python", f"#!/bin/sh\necho {usable}\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    done = bash(
        f"unset CUDA_VISIBLE_DEVICES\npython={tmp_path}/python\n"
        f"{run_sh_function('count_gpus')}\ncount_gpus",
        PATH=f"{tmp_path}:{os.environ['PATH']}",
    )
    assert done.stdout == f"{chosen}\n" and done.returncode == 0
    assert ("nvidia-smi says: Driver/library version" in done.stderr) == (usable == 0)
    assert (f"{chosen} of {usable} GPUs are used" in done.stderr) == (chosen != usable)
