"""Small shards, small models, and the trainer as a process of its own."""

import dataclasses
import io
import os
import re
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from forked import ROOT, run_forked
from forked import clean_environment as clean_environment  # for the tests

from referee.flags import as_flag, finish
from referee.shards import write_shard

# Before torch is imported, which happens in functions: the controller of pytest-xdist needs none.
os.environ["OMP_NUM_THREADS"] = "1"
for signum in (signal.SIGINT, signal.SIGHUP):  # ignored behind `&` and nohup, and then by children
    if signal.getsignal(signum) == signal.SIG_IGN:
        signal.signal(signum, lambda *_: None)
VOCAB, START = 64, 63
TINY_TASK = dict(
    vocab_size=VOCAB,
    document_start=START,
    val_tokens=2048,
    val_seq_len=64,
    target_val_loss=1.0,
)
TINY = dict(
    num_steps=20,
    batch_tokens=(512,),
    seq_len=64,
    val_every=10,
    layers="sL-S",
    num_heads=2,
    model_dim=32,
    value_layers=(0, 3),
    bigram_rows=128,
    bigram_in_layers=True,
    shift_taps=(2, 2),
    head_gates=True,
    mix_at=(1, 3, 4),
    mix_from=(0, 2),
    window_tokens=(16, 32, 48),
    short_window_tokens=(8, 16, 24),
    mtp_weight=0.5,
)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that are marked slow too")


def pytest_collection_modifyitems(config, items):
    """Slow tests begin first, so that they do not end last; without --slow they are skipped."""
    items.sort(key=lambda item: "slow" not in item.keywords)
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow; run: ./run.sh test --slow"))


@pytest.fixture(scope="session", autouse=True)
def the_referee_under_test_is_known():
    """As it will be once it is committed; in a shallow clone those of old logs as well."""
    from referee import log
    from tools import audit, runs

    log.SILENCE_S = 3600  # logs that a test leaves open would speak between others' lines
    files = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "referee").glob("*.py")}
    known = [frozenset((name, audit.git_blob(path.read_text())) for name, path in files.items())]
    if (ROOT / ".git/shallow").exists():
        logs = [*ROOT.glob("records/**/logs/*.txt"), *ROOT.glob("tests/logs/*/logs/*.txt")]
        known += [audit.referee_of(runs.read_log(log)) for log in logs]
    audit.known_referees().update(known)


@pytest.fixture(scope="session")
def tiny_task(shards):
    from referee.task import TASKS

    return dataclasses.replace(
        TASKS["embedded"],
        **TINY_TASK,
        data_sha256="",
        train_files=f"{shards}/train_*.bin",
        val_files=f"{shards}/val.bin",
    )


@pytest.fixture(scope="session")
def tiny_hp():
    from train_gpt import TRACKS

    return dataclasses.replace(TRACKS["embedded"], **TINY)


def settings(task, hp, **options):
    """The Settings that the flags of a run of this task and these hyperparameters give."""
    from referee.harness import RunOptions, Settings

    return Settings("embedded", task, hp, RunOptions(**options), [])


def built(task, hp):
    """A Run and its Trainer in this process, which compiles nothing."""
    from referee.harness import Run
    from referee.ranks import Runtime
    from train_gpt import PROCESS_START, Trainer

    run = Run(settings(task, hp, compile=False), "train_gpt.py", Runtime(), None, PROCESS_START)
    made = run.build(Trainer)
    made.compile(lambda function: function)
    return run, made


def trainer(task, hp):
    return built(task, hp)[1]


def documents(seed: int, count: int) -> np.ndarray:
    """A stream of documents of 5 to 200 tokens, in which each token mostly sets the next."""
    rng, parts = np.random.default_rng(seed), []
    for _ in range(count):
        length, token, tokens = rng.integers(5, 200), rng.integers(START), [START]
        for _ in range(length):
            token = (5 * token + 3) % START if rng.random() < 0.9 else rng.integers(START)
            tokens.append(token)
        parts.append(np.array(tokens, np.uint16))
    return np.concatenate(parts)


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for i in range(3):
        write_shard(folder / f"train_{i}.bin", documents(i, 200))
    write_shard(folder / "val.bin", documents(99, 40))
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A small random network of train_gpt.py."""
    from small_models import write_speedrun

    return write_speedrun(tmp_path_factory.mktemp("run") / "tiny")


@pytest.fixture
def flags(shards, tmp_path) -> list[str]:
    return tiny_flags(shards, tmp_path)


def tiny_flags(shards, log_dir, hyperparameters=TINY) -> list[str]:
    """Flags of a tiny run, whose log goes to log_dir."""
    tiny = {**TINY_TASK, **hyperparameters}
    return [
        "--track=embedded",
        f"--train_files={shards}/train_*.bin",
        f"--val_files={shards}/val.bin",
        f"--log_dir={log_dir}",
        "--compile=false",
        "--cpu_dtype=float32",  # what a busy host measures is not the same in every run
        *(f"--{name}={as_flag(value)}" for name, value in tiny.items()),
    ]


def called(script, *words, encoding: str = "utf-8") -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a script's main, in this process."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding, errors, write_through=True)
                for errors in ("strict", "backslashreplace"))  # fmt: skip
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["program", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            finish(script.main)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    said = (stream.buffer.getvalue().decode(encoding) for stream in (out, err))
    return end.value.code or 0, *said


def command(flags: list[str]) -> list[str]:
    return [sys.executable, str(ROOT / "train_gpt.py"), *flags]


def train(flags: list[str], ranks: int = 1, **options) -> subprocess.CompletedProcess:
    """Run the trainer in processes of its own; options: of Forked."""
    return run_forked(command(flags)[1:], ranks, **options)


def losses(log: Path) -> dict[tuple[str, int], str]:
    """Loss as printed, by (kind, step)."""
    found = re.findall(r"^step:(\d+)/\d+ (train|val)_loss:(\S+)", run_section(log), re.M)
    return {(kind, int(step)): loss for step, kind, loss in found}


def run_section(log: Path) -> str:
    return log.read_text().rpartition("=== run ===\n")[2]


def only_log(folder: Path) -> Path:
    (log,) = folder.glob("*.txt")
    return log
