"""The referee: everything about a run that an idea must not touch.

It sets the task (data, validation rows, target loss), reads the flags, times, logs and takes the
validation loss; device and ranks stand in ranks.py. It imports no trainer: `execute` is handed the
function that makes one from a `Run`, through which the trainer reports.

Validation: the trainer gets inputs, never targets, and yields logits; the loss is taken here. The
clock charges every moment of the process to one account, so that timed and untimed seconds add up
to its wall time. The log is one text file for people and programs, written line by line: sections
`=== name ===` in the order source, config, environment, git, data, run; in the last one lines
`step:N/M train_loss:X train_time:Yms`, `step:N/M val_loss:X train_time:Yms step_avg:Zms`, and named
ones such as `calibration:` and `ledger:`; last the line `result ...`, which ends with the sha256 of
everything before it. A line `check:` holds the first digits of that hash so far, to tell where a
log was changed. Losses are nats per token.
"""

import argparse
import ast
import dataclasses
import fcntl
import gc
import glob
import hashlib
import math
import os
import queue
import re
import shlex
import stat
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch._dynamo.utils
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from checkpoints import (
    check_same_run,
    delete_checkpoint,
    delete_parts,
    fill,
    read_checkpoint,
    saved_dtype,
    sha256_of,
    write_checkpoint,
)
from data.shards import ShardError, absolute_glob, check_tokens, find_shards, open_shard
from environment import calibration, contention, mfu, write_header
from flags import RunError, add_flags, check_ranges, join_values, option
from ranks import COMPILE_ERRORS, Runtime, StopRequest, is_first_to_say, rank_store

ROOT = Path(__file__).resolve().parent
REFEREE_FILES = ("harness.py", "ranks.py", "flags.py", "environment.py", "checkpoints.py",
                 "data/shards.py")  # fmt: skip
# This many steps in a row, whose loss is by so much above a uniform guess and the start, end a run.
DIVERGED_STEPS, DIVERGED_NATS = 50, 0.1
OTHER_ENDED = "the other run of the pair ended before its first step; see what it said"
DATA_FIELDS = ("train_files", "val_files", "data_sha256")


# ------------------------------------------------------------------------------ Task


@dataclass(frozen=True)
class Task:
    """What every trainer of a track is given, and what it is measured by."""

    # Globs are relative to this file's folder; those in flags are relative to the caller's.
    train_files: str = option("data/fineweb10B/fineweb_train_*.bin", "glob of training shards")
    val_files: str = option("data/fineweb10B/fineweb_val_*.bin", "glob of validation shards")
    data_sha256: str = option("", "expected hash over all shards; empty: none is known")
    vocab_size: int = option(50257, "token ids in the shards are below it", 2)
    document_start: int = option(50256, "token that opens every document")
    val_tokens: int = option(10_485_760, "validation targets", 1)
    val_seq_len: int = option(131_072, "tokens per validation row", 2)
    val_spread: bool = option(False, "spread validation rows evenly instead of taking the first")
    target_val_loss: float = option(3.28, "nats per token")

    def __post_init__(self):
        check_ranges(self)
        if not (self.train_files and self.val_files):
            raise RunError("--train_files and --val_files must name shards; leave them out for the "
                           "track's own")  # fmt: skip
        if self.val_tokens % self.val_seq_len:
            raise RunError(f"--val_tokens {self.val_tokens} is not a multiple of --val_seq_len "
                           f"{self.val_seq_len}")  # fmt: skip


EMBEDDED = Task(
    train_files="data/embedded/embedded_train.bin",
    val_files="data/embedded/embedded_val.bin",
    data_sha256="46ee993abd300d89907f21f46b034c6dad65e35e87b50afcdc9668e0617695f9",
    vocab_size=257,
    document_start=256,
    val_tokens=262_144,
    val_seq_len=1024,
    val_spread=True,
    target_val_loss=1.01,
)
TASKS = {
    "embedded": EMBEDDED,
    "embedded_1.34": dataclasses.replace(EMBEDDED, target_val_loss=1.34),
    "fineweb": Task(),
    "fineweb_medium": Task(target_val_loss=2.92),
    "wikitext103": Task(
        train_files="data/wikitext103/wikitext103_train_*.bin",
        val_files="data/wikitext103/wikitext103_val_*.bin",
        val_tokens=245_760,
        val_seq_len=8192,
        target_val_loss=3.8,
    ),
}


def task_shards(pattern: str) -> list[Path]:
    """Sorted paths of a task's shards; ShardError if there are none."""
    return find_shards(os.path.join(glob.escape(str(ROOT)), pattern))


def check_shards(task: Task) -> tuple[str, list[str]]:
    """Read every shard once; return (hash over all of them, the log's lines).

    ShardError for anything that cannot train.
    """
    lines, digests = [], []
    for kind, pattern in (("train", task.train_files), ("val", task.val_files)):
        for path in task_shards(pattern):
            tokens, digest = check_tokens(path, task.vocab_size)
            lines.append(f"{kind}_shard: {path.name} tokens:{len(tokens)} sha256:{digest}")
            if kind == "val" and digest in digests:
                raise ShardError(f"{path} is a training shard too", "change --train_files")
            digests.append(digest)
    found = hashlib.sha256(" ".join(digests).encode()).hexdigest()
    verdict = "as expected" if found == task.data_sha256 else "DIFFERENT: losses are not comparable"
    verdict = verdict if task.data_sha256 else "none expected"
    return found, [*lines, f"data_sha256: {found} ({verdict})"]


class Validation:
    """This rank's share of a task's validation rows, and the loss over them."""

    def __init__(self, task: Task, rt: Runtime):
        """ShardError where the shards do not hold the rows, or ranks cannot share them equally."""
        self.task, self.rt = task, rt
        tokens = np.concatenate([open_shard(path) for path in task_shards(task.val_files)])
        count, last = task.val_tokens // task.val_seq_len, len(tokens) - task.val_seq_len - 1
        if (count - 1) * task.val_seq_len > last or count % rt.world_size:
            raise ShardError(
                f"{task.val_files} holds {len(tokens)} tokens, from which {count} validation rows "
                f"of {task.val_seq_len + 1} cannot be dealt to {rt.world_size} ranks equally",
                "get the whole validation shard, or change --val_tokens or --nproc_per_node",
            )
        starts = np.arange(count) * task.val_seq_len
        if task.val_spread:
            starts = np.arange(count) * last // max(count - 1, 1)
        mine = starts[rt.rank :: rt.world_size]
        rows = np.stack([tokens[s : s + task.val_seq_len + 1] for s in mine])
        self.rows = torch.from_numpy(rows.astype(np.int64))  # (rows, val_seq_len + 1)

    def batch_rows(self, most: int) -> int:
        """The largest number of rows, at most `most` but at least 1, that divides this share."""
        return max(n for n in range(1, max(most, 1) + 1) if len(self.rows) % n == 0)

    @torch.no_grad()
    def loss(self, predict, batch_rows: int) -> float:
        """Mean cross-entropy over the rows of all ranks, nats per token.

        predict(inputs (batch_rows, T) int64, on the device) yields logits (n, V) for the positions
        of inputs.flatten() in order, any n per chunk; only one chunk need be in memory at a time.
        """
        total = torch.zeros((), device=self.rt.device, dtype=torch.float64)
        for batch in self.rows.split(batch_rows):
            # Copies, so that strides do not depend on the number of rows: they would recompile.
            kept = partial(torch.clone, memory_format=torch.contiguous_format)
            inputs_BT, targets_BT = kept(batch[:, :-1]), kept(batch[:, 1:])
            targets_N, done = targets_BT.flatten().to(self.rt.device), 0
            for logits_NV in predict(inputs_BT.to(self.rt.device)):
                end = done + len(logits_NV)
                if end > len(targets_N) or logits_NV.size(1) < self.task.vocab_size:
                    raise RunError(f"logits {tuple(logits_NV.shape)} at position {done} do not fit "
                                   f"{len(targets_N)} positions and {self.task.vocab_size} tokens; "
                                   "fix what the trainer yields")  # fmt: skip
                losses_N = F.cross_entropy(logits_NV.float(), targets_N[done:end], reduction="none")
                total += losses_N.double().sum()
                done = end
            if done < len(targets_N):
                raise RunError(f"logits of {done} of {len(targets_N)} positions were yielded; mend "
                               "what the trainer yields in validation")  # fmt: skip
        self.rt.average([total])
        return total.item() / (len(self.rows) * self.task.val_seq_len)


class Prefetcher:
    """Runs an iterator of tensor pairs in a thread, ahead of the step that needs them."""

    def __init__(self, pairs: Iterator, rt: Runtime, depth: int = 4):
        self.rt, self.ready = rt, queue.Queue(depth)
        threading.Thread(target=self.fill, args=(pairs,), daemon=True).start()

    def fill(self, pairs):
        try:
            for pair in pairs:
                self.ready.put([t.pin_memory() for t in pair] if self.rt.is_gpu else pair)
            raise ShardError("the data ended before the last step", "get more shards")
        except Exception as error:
            self.ready.put(error)

    def __next__(self) -> list[Tensor]:
        if isinstance(item := self.ready.get(), Exception):
            raise item
        return [t.to(self.rt.device, non_blocking=True) for t in item]


# ------------------------------------------------------------------------------ Flags


@dataclass(frozen=True)
class RunOptions:
    """How this run is carried out; nothing here changes what is trained, except the seed."""

    seed: int = option(0, "seed of the initial weights and of the order of data")
    slug: str = option("run", "word in the log's name that says what was tried")
    log_dir: str = option("", "folder of logs and checkpoints; empty: logs, beside harness.py")
    save_every: int = option(0, "steps between checkpoints; 0: only when interrupted")
    resume: str = option("", "checkpoint to continue from")
    micro_batch_seqs: int = option(0, "rows per forward pass of one rank; 0: what fits in memory")
    compile: bool = option(True, "use torch.compile where it works")
    fp32: bool = option(False, "multiply matrices in fp32 even where bf16 is faster")
    other_source: bool = option(False, "resume a checkpoint of another source; no record then")
    rank_timeout_s: int = option(600, "seconds that ranks wait for one that does not answer", 1)
    source_dir: str = option("", "folder that keeps the source once for many logs", hidden=True)
    declared_runs: int = option(0, "runs that this attempt was declared to have", hidden=True)
    cpu_dtype: str = option("", "float32 or bfloat16 on a CPU; empty: measured", hidden=True)
    turn_steps: int = option(0, "steps between turns with the pair's other run", hidden=True)

    def __post_init__(self):
        check_ranges(self)
        if not re.fullmatch(r"[\w.+-]{1,80}", self.slug):
            raise RunError(f"--slug {self.slug!r} is no part of a file's name; give a word")
        if self.cpu_dtype not in ("", "float32", "bfloat16"):
            raise RunError(f"--cpu_dtype {self.cpu_dtype!r} is neither float32 nor bfloat16")


class Settings(NamedTuple):
    """What the flags of one process say."""

    track: str
    task: Task
    hp: object  # the trainer's hyperparameters
    options: RunOptions
    overrides: list[str]  # names of changed fields of task and hp


def parse_flags(
    argv: list[str], tracks: dict, gpu_track: str, description: str, options=None
) -> Settings:
    """Every field of task, hyperparameters and options is a flag, whose default the track sets.

    tracks: hyperparameters by name; their field `task` names one of TASKS. gpu_track: the track
    without --track on a GPU. options: RunOptions(), or what a tool has in their place.
    """
    # --track and --task come first: they set the defaults of all other flags.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--track", default=gpu_track if torch.cuda.is_available() else "embedded")
    first.add_argument("--task")
    options, any_hp = options or RunOptions(), next(iter(tracks.values()))
    names = {f.name for part in (Task(), any_hp, options) for f in dataclasses.fields(part)}
    argv = join_values(argv, names | {"track"})
    chosen = first.parse_known_args(argv)[0]
    hp = tracks.get(chosen.track) or any_hp
    parts = TASKS.get(chosen.task or hp.task, Task()), hp, options
    usage = "%(prog)s [--track NAME] [--FLAG VALUE]...    (all flags: --help)"
    parser = argparse.ArgumentParser(usage=usage, description=description, allow_abbrev=False)
    parser.add_argument("--track", choices=tracks, help=f"sets the defaults; now: {chosen.track}")
    for part in parts:
        group = parser.add_argument_group(type(part).__name__, type(part).__doc__)
        add_flags(group, part, choices={"task": TASKS})
    given = vars(parser.parse_args(argv))
    given.pop("track")
    for name in ("train_files", "val_files"):
        if given.get(name):
            given[name] = absolute_glob(given[name])
    changes = [{name: given[name] for name, default in vars(part).items()
                if given.get(name, default) != default} for part in parts]  # fmt: skip
    task, hp, options = (
        dataclasses.replace(part, **c) for part, c in zip(parts, changes, strict=True)
    )
    overrides = changes[0].keys() | changes[1].keys() | changes[2].keys() & {"other_source"}
    return Settings(chosen.track, task, hp, options, sorted(overrides))


# ------------------------------------------------------------------------------ Clock and log


class Turns:
    """Turns in which the two runs of a pair use the machine, never both; nothing for a lone run.

    What a shared machine does for longer than a turn then falls on both alike. Duet benchmarking
    (Bulej et al. 2020, doi:10.1145/3358960.3379132) runs both at once to that end; here they would
    disturb each other. A socket at stdin joins the two (tools/race.py --turns): a byte hands the
    machine over, and the end of a process leaves it to the other.
    """

    FIRST = b"1"  # the byte that the first of the two reads first; all others are b"."

    def __init__(self, steps: int):
        """steps: length of a turn; 0: a run on its own."""
        self.steps, self.other, self.is_first = steps, -1, False
        if not steps:
            return
        with suppress(OSError):  # of a closed stdin
            if stat.S_ISSOCK(os.fstat(0).st_mode) and "RANK" not in os.environ:
                # A number, for an object would close it before the interpreter has cleared up; and
                # not 0, for no child shall keep it open after this run.
                self.other = os.dup(0)
                with open(os.devnull) as nothing:
                    os.dup2(nothing.fileno(), 0)
                return
        raise RunError("--turn_steps needs a second run, of one process like this one; start "
                       "both: ./run.sh tools/race.py --turns 10 A B")  # fmt: skip

    def begin(self) -> None:
        """Wait until both have loaded their modules, and the second until the first is set up."""
        byte = self.wait()
        self.is_first = byte == self.FIRST
        if not (byte and self.hand_over()):
            raise RunError(OTHER_ENDED)

    def hand_over(self) -> bytes:
        """Let the other run work until it hands back; return its byte, or b"" if it has ended."""
        with suppress(ConnectionError):
            os.write(self.other, b".")
        return self.wait()

    def wait(self) -> bytes:
        with suppress(ConnectionError):
            return os.read(self.other, 1)
        return b""

    def end_at(self, step: int) -> bool:
        """Whether the machine changes hands after this step."""
        return self.steps > 0 and step % self.steps == 0


class Stopwatch:
    """Charges every second since start to one account; only `train` is a run's time.

    synchronize waits for the device, so that no work is charged to the next account.
    """

    def __init__(self, start: float, synchronize):
        self.synchronize = synchronize
        self.seconds = {"train": 0.0}
        self.carried_ms = 0.0  # train time before the checkpoint that a run was resumed from
        self.account, self.since = "startup", start
        self.cpu_seconds, self.cpu_since = 0.0, 0.0

    def switch(self, account: str) -> None:
        """Charge what follows to account."""
        self.synchronize()
        now, cpu_now = time.perf_counter(), time.process_time()
        self.seconds[self.account] = self.seconds.get(self.account, 0.0) + now - self.since
        if self.account == "train":
            self.cpu_seconds += cpu_now - self.cpu_since
        self.account, self.since, self.cpu_since = account, now, cpu_now

    @contextmanager
    def charged_to(self, account: str):
        previous = self.account
        self.switch(account)
        yield
        self.switch(previous)

    def train_ms(self) -> float:
        """Train milliseconds until now, without waiting for the device."""
        running = time.perf_counter() - self.since if self.account == "train" else 0.0
        return self.carried_ms + 1000 * (self.seconds["train"] + running)

    def cpu_share(self) -> float:
        """CPU time over wall time x threads while training: on a CPU, 1 on a quiet machine."""
        return self.cpu_seconds / max(self.seconds["train"] * torch.get_num_threads(), 1e-9)

    def ledger(self) -> str:
        """Seconds by account; all but train are untimed, and the sum is the wall time."""
        self.switch(self.account)
        accounts = " ".join(f"{name}:{seconds:.3f}s" for name, seconds in self.seconds.items())
        return f"ledger: {accounts} total:{sum(self.seconds.values()):.3f}s"


class Log:
    """One run's text file, hashed as it grows; it writes nothing until opened, on rank 0 alone."""

    def __init__(self, folder: str, name: str, num_steps: int):
        self.path = Path(folder or ROOT / "logs") / f"{name}.txt"
        self.hash, self.num_steps = hashlib.sha256(), num_steps
        self.file = self.bar = None

    def open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("x", buffering=1, encoding="utf-8")
        with suppress(OSError):  # on file systems without locks
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # while this run lives
        delete_parts(self.path.parent)
        if sys.stderr.isatty():
            self.bar = tqdm(total=self.num_steps, unit="step", dynamic_ncols=True, leave=False)

    def line(self, text: str, show: bool = False) -> None:
        """Append text, and print it with show."""
        if self.file is None:
            return
        try:
            self.file.write(text + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        self.hash.update(text.encode() + b"\n")
        if show:
            self.show(text)

    def show(self, text: str) -> None:
        """Print text. A terminal that was closed, or a pipe that nobody reads, ends no run."""
        if self.file is None:
            return
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

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Say what is being done, beside a clock that moves meanwhile."""
        if self.bar is None:
            yield
            return
        done = threading.Event()

        def keep_moving():
            while not done.wait(0.5):
                with suppress(OSError):
                    self.bar.refresh()

        self.bar.set_postfix_str(what)
        thread = threading.Thread(target=keep_moving, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def progress(self, step: int, text: str) -> None:
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
    """Send what is written to a stream from here on nowhere, the rest of its buffer too."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


# ------------------------------------------------------------------------------ Run


class Run:
    """One run as its trainer sees it: settings, device, and everything that is reported.

    The trainer sets flops_per_token (forward and backward) and micro_batch_seqs. Its loop goes from
    step to hp.num_steps while status is empty; it calls validate and end_step, and save where
    checkpoint_is_due. start and finish are carry_out's.
    """

    def __init__(self, settings: Settings, sources: dict, rt: Runtime, stop, started: float):
        """sources: as in execute; stop: a StopRequest; started: perf_counter at first import."""
        self.track, self.task, self.hp, self.options, self.overrides = settings
        self.sources = sources  # the log's, the trainer's own file first
        self.rt, self.stop, self.clock = rt, stop, Stopwatch(started, rt.synchronize)
        self.turns = Turns(self.options.turn_steps)
        if self.turns.steps:
            with self.clock.charged_to("turn"):
                self.turns.begin()
        stamp = time.strftime("%Y-%m-%dT%H%M%SZ", time.gmtime())
        name = f"{stamp}_{self.track}_{self.options.slug}_{uuid.uuid4().hex[:8]}"
        self.name = rt.on_main(lambda: name)
        self.log = Log(self.options.log_dir, self.name, self.hp.num_steps)
        self.data_sha256 = ""
        self.status, self.step, self.tokens, self.curve = "", 0, 0, []  # curve: (train ms, loss)
        self.first_step = self.first_tokens = self.bad_steps = self.graphs = 0
        self.saved = None  # folder of the newest checkpoint
        self.contended = ""  # what was said of other processes on this machine
        self.pending = []  # steps whose loss has not been read
        self.flops_per_token, self.micro_batch_seqs = math.nan, 1

    @cached_property
    def validation(self) -> Validation:
        return Validation(self.task, self.rt)

    def config(self) -> dict:
        """What a checkpoint belongs to: it cannot be resumed with any other. No path counts."""
        task = {k: v for k, v in dataclasses.asdict(self.task).items() if k not in DATA_FIELDS}
        return {**task, **dataclasses.asdict(self.hp), "seed": self.options.seed}

    def facts(self) -> dict:
        """What a checkpoint says of itself: whose state it is, and of which step."""
        rt = self.rt
        return {
            "trainer": next(iter(self.sources)),
            "sources": sha256_of(self.sources),
            "step": self.step,
            "tokens": self.tokens,
            "curve": self.curve,
            "train_ms": self.clock.train_ms(),
            "data_sha256": self.data_sha256,
            "arithmetic": {"matmul_dtype": str(rt.matmul_dtype),
                           "stream_dtype": str(rt.stream_dtype)},
            "config": self.config(),
        }  # fmt: skip

    def choose_arithmetic(self) -> None:
        """As the flags say, or the checkpoint that is resumed; else by a measurement."""
        options = self.options
        told = "float32" if options.fp32 else options.cpu_dtype or saved_dtype(options.resume)
        self.rt.choose_arithmetic(told)

    def header(self) -> None:
        """Write everything that stands above the data: sources, config, environment, git state."""
        rt, overrides = self.rt, " ".join(self.overrides) or "none"
        config = {"run": self.name, "track": self.track, "overrides": overrides}
        for part in (self.task, self.hp, self.options):
            config |= dataclasses.asdict(part)
        device = {"device": rt.device_name, "world_size": rt.world_size,
                  "matmul_dtype": rt.matmul_dtype, "stream_dtype": rt.stream_dtype,
                  "bf16_gain": rt.bf16_gain}  # fmt: skip
        write_header(self.log, self.sources, self.options.source_dir, config, device)

    def compiler(self) -> Callable:
        """torch.compile for this run, or a function that returns what it is given; logged."""
        problem = self.rt.any_problem(self.rt.compiler_problem())
        if problem and self.rt.is_gpu:
            raise RunError(problem)
        problem = problem if self.options.compile else "--compile false"
        self.log.line(f"compile: {problem or 'yes'}", show=bool(problem))
        if problem:
            return dont_compile
        # In a broken graph FlexAttention is not fused, and takes the memory of all scores.
        return partial(torch.compile, dynamic=False, fullgraph=self.rt.is_gpu)

    def start(self) -> None:
        """Start the timed part; from here on the first signal asks for a clean end."""
        self.stop.deferred = True
        if self.turns.steps:
            other_works = self.give_turn()
            if not other_works and self.turns.is_first:
                raise RunError(OTHER_ENDED)
        self.clock.switch("train")

    def give_turn(self) -> bytes:
        """Let the other run of the pair work; return b"" if it has ended."""
        with self.clock.charged_to("turn"):
            return self.turns.hand_over()

    def end_step(self, loss: Tensor, tokens: int) -> None:
        """Count an optimizer step. loss: this rank's mean, 0-D; tokens: those of all ranks.

        Losses are read while later steps run, so that the device never waits for the host.
        """
        report = torch.stack([loss, torch.full_like(loss, self.stop.signal > 0)])
        self.rt.average([report])
        self.step, self.tokens = self.step + 1, self.tokens + tokens
        self.pending.append((self.step, *self.rt.to_host(report)))
        is_last = self.step == self.hp.num_steps
        while len(self.pending) > (0 if is_last else self.rt.steps_in_flight):
            self.log_step(*self.pending.pop(0))
        if self.turns.end_at(self.step) and not (self.status or is_last):
            self.give_turn()

    def log_step(self, step: int, report: Tensor, wait) -> None:
        """Log a step once its report [loss, stop request] is here; end the run if it has to end."""
        wait()
        loss, stop = report.tolist()
        train_ms, num_steps = self.clock.train_ms(), self.hp.num_steps
        self.log.line(f"step:{step}/{num_steps} train_loss:{loss:.6f} train_time:{train_ms:.0f}ms")
        rate = self.tokens_per_second() / 1000
        self.log.progress(step, f"loss {loss:.4f}, {rate:.1f}k tokens/s, MFU {self.mfu()}")
        first_val_loss = self.curve[0][1] if self.curve else 0.0
        start = max(math.log(self.task.vocab_size), first_val_loss)
        self.bad_steps = self.bad_steps + 1 if loss > start + DIVERGED_NATS else 0
        if not math.isfinite(loss) or self.bad_steps > DIVERGED_STEPS:
            self.status = "diverged"
        elif stop and step < num_steps:
            self.status = self.status or "aborted"

    def validate(self, predict, batch_rows: int) -> None:
        """Take and log the validation loss; predict and batch_rows as in Validation.loss."""
        with self.clock.charged_to("validation"):
            loss = self.validation.loss(predict, batch_rows)
        train_ms = self.clock.train_ms()
        self.curve.append((train_ms, loss))
        if not math.isfinite(loss):
            self.status = "diverged"
        self.log.line(
            f"step:{self.step}/{self.hp.num_steps} val_loss:{loss:.6f} "
            f"train_time:{train_ms:.0f}ms step_avg:{train_ms / max(self.step, 1):.2f}ms",
            show=True,
        )
        self.log.check()
        if self.step > self.first_step and not self.contended:
            self.contended = contention(self.rt.is_gpu, self.clock.cpu_share())
            if self.contended:
                self.log.show(f"so far, {self.contended}")

    def finish(self) -> None:
        """End the timed part; the last validation gives the status of a run that came so far."""
        while self.pending:  # steps that were under way when the run was asked to end
            self.log_step(*self.pending.pop(0))
        reached = self.curve and self.curve[-1][1] <= self.task.target_val_loss
        self.status = self.status or ("success" if reached else "missed")
        self.clock.switch("end")

    def checkpoint_is_due(self) -> bool:
        every = self.options.save_every
        return self.status == "aborted" or (every > 0 and self.step % every == 0)

    def save(self, tensors: dict[str, Tensor]) -> None:
        """Write a checkpoint beside the log; a kill leaves the one before or this one, whole.

        A run that goes on does so without the checkpoint, if that cannot be written.
        """
        stem = self.log.path.stem
        folder = self.log.path.with_name(f"{stem}_step{self.step:07}")
        with self.clock.charged_to("checkpoint"):
            try:
                write_checkpoint(folder, tensors, self.facts(), self.rt)
            except RunError as error:
                if self.status:
                    raise
                self.log.line(f"no checkpoint: {error}; the run goes on", show=True)
                return
            earlier = [f for f in folder.parent.glob(f"{stem}_step*") if f != folder]
            self.rt.on_main(lambda: [delete_checkpoint(f) for f in earlier])
            self.saved = folder
            self.log.line(f"checkpoint: {folder} step:{self.step}", show=True)

    def checkpoint_to_resume(self) -> dict | None:
        """What the checkpoint --resume says of itself, if this run may go on from it."""
        if not (path := self.options.resume):
            return None
        facts = read_checkpoint(Path(path), self.rt)
        check_same_run(Path(path), facts, self.facts(), self.options.other_source)
        return facts

    def resume(self, facts: dict, tensors: dict[str, Tensor]) -> None:
        """Go on from the checkpoint --resume: fill tensors, and count from its step."""
        fill(Path(self.options.resume), tensors)
        self.step = self.first_step = facts["step"]
        self.tokens = self.first_tokens = facts["tokens"]
        self.curve = [tuple(point) for point in facts["curve"]]
        self.clock.carried_ms = facts["train_ms"]
        self.log.line(f"resumed: {self.options.resume} step:{self.step}", show=True)

    def check_data(self, checkpoint: dict | None) -> list[str]:
        """Read all shards, on each machine; return the log's lines. RunError if they differ."""
        found = self.rt.on_ranks(lambda: check_shards(self.task), self.rt.is_first_of_machine)
        self.data_sha256, lines = found[0]
        if any(other != self.data_sha256 for other, _ in found):
            raise RunError("the machines have different shards; copy those of the first to all")
        if checkpoint and checkpoint["data_sha256"] != self.data_sha256:
            hashes = f"data_sha256 {checkpoint['data_sha256'][:12]}, here {self.data_sha256[:12]}"
            raise RunError(f"{self.options.resume} is of other shards ({hashes}); name its shards: "
                           "--train_files, --val_files")  # fmt: skip
        return lines

    def tokens_per_second(self) -> float:
        """Of this process, over all ranks, in timed seconds."""
        seconds = max(self.clock.train_ms() - self.clock.carried_ms, 1) / 1000
        return (self.tokens - self.first_tokens) / seconds

    def mfu(self) -> str:
        rate = self.flops_per_token * self.tokens_per_second()
        return mfu(rate, self.rt.device_name, self.rt.world_size)

    def result(self) -> str:
        """The result line's fields, without the hash."""
        target, clock = self.task.target_val_loss, self.clock
        return (
            f"status:{self.status or 'aborted'} "
            f"val_loss:{self.curve[-1][1] if self.curve else math.nan:.6f} "
            f"target:{target} train_time:{clock.train_ms():.0f}ms "
            f"time_to_target:{time_to_target(self.curve, target)} steps:{self.step} "
            f"tokens:{self.tokens} tokens_per_s:{self.tokens_per_second():.0f} "
            f"flops_per_token:{self.flops_per_token:.4g} mfu:{self.mfu()} "
            f"peak_memory:{self.rt.peak_memory_mib()}MiB cpu_share:{clock.cpu_share():.2f} "
            f"recompiled:{compiled_graphs() - self.graphs} "
            f"seed:{self.options.seed} overrides:{len(self.overrides)} "
            f"resumed_from:{self.first_step}"
        )


def execute(
    make_trainer: Callable[[Run], object],
    tracks: dict,
    gpu_track: str,
    sources: dict[str, str],
    started: float,
) -> int:
    """Carry out the run that this process's flags describe; return its exit code.

    make_trainer(run) returns an object with compile(compile_fn), which applies torch.compile, or
    what stands for it, to what is to be compiled; warm_up(), which runs all of that; state(), every
    tensor that training changes, by name; and train(), the loop. tracks, gpu_track: as in
    parse_flags. sources: what the log embeds, by path, the entry file first. started: perf_counter
    at first import.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # a path that it cannot show ends no run
    stop = StopRequest()
    rt = run = None
    try:
        rank_store()
        description = ast.get_docstring(ast.parse(next(iter(sources.values())))).splitlines()[0]
        settings = parse_flags(sys.argv[1:], tracks, gpu_track, description)
        options = settings.options
        rt = Runtime(options.fp32, 2 if options.turn_steps else 1, options.rank_timeout_s)
        run = Run(settings, sources, rt, stop, started)
        carry_out(run, make_trainer)
        if rt.is_main:
            tell(f"log: {run.log.path}    python: {sys.executable}")
        return {"success": 0, "missed": 0, "diverged": 1}.get(run.status, 128 + stop.signal)
    except KeyboardInterrupt:
        if is_first_to_say("interrupted"):
            tell("interrupted")
        return 128 + stop.signal
    except (RunError, OSError) as error:
        if is_first_to_say(str(error)):
            tell(f"error: {error}")
        return 1
    finally:
        if run is not None and run.status in ("", "aborted") and run.saved and rt.is_main:
            tell(f"to go on from step {int(run.saved.name[-7:])}: {resuming(run.saved)}")
        if rt is not None:
            rt.close()


def tell(text: str) -> None:
    """Print to stderr, which may have been closed."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def resuming(checkpoint: Path) -> str:
    """The command that goes on from a checkpoint as this process was started."""
    launcher = []
    if (ranks := int(os.environ.get("LOCAL_WORLD_SIZE", 1))) > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return shlex.join([sys.executable, *launcher, *sys.argv, "--resume", str(checkpoint)])


def carry_out(run: Run, make_trainer) -> None:
    """Open the run's log, build the trainer and train; the log gets its last line in any case."""
    rt, log = run.rt, run.log
    rt.on_main(log.open)
    try:
        run.choose_arithmetic()
        rt.on_main(run.header)
        checkpoint = run.checkpoint_to_resume()
        log.section("data", run.check_data(checkpoint))
        log.section("run")
        log.line(calibration(rt.device, rt.matmul_dtype, rt.synchronize))
        trainer = make_trainer(run)
        with run.clock.charged_to("compile"), log.waiting("compiling, a minute or two"):
            warm_up(run, trainer)
        run.graphs = compiled_graphs()
        if checkpoint:
            run.resume(checkpoint, trainer.state())
        gc.collect()
        gc.freeze()  # else each pass of the collector over what exists by now would stop a step
        run.start()
        trainer.train()
        run.finish()
        log.line(calibration(rt.device, rt.matmul_dtype, rt.synchronize))
        if warning := contention(rt.is_gpu, run.clock.cpu_share()):
            log.line(f"warning: {warning}", show=True)
    except torch.OutOfMemoryError:
        rows = run.micro_batch_seqs
        fewer = f"add --micro_batch_seqs {rows // 2}, or " if rows > 1 else ""
        raise RunError(
            f"out of memory on {rt.device_name} with {rows} rows per forward pass; {fewer}lower "
            "--seq_len"
        ) from None
    finally:
        gc.unfreeze()
        with suppress(RuntimeError):  # after an error of the GPU no clock can wait for it
            log.line(run.clock.ledger(), show=run.step > 0)
        log.close(run.result(), show=run.step > 0)  # else the reason shall stand alone


def warm_up(run: Run, trainer) -> None:
    """Compile every graph before the clock starts, and leave no trace in the trainer's state."""
    trainer.compile(run.compiler())
    before = {name: local(t).to("cpu", copy=True) for name, t in trainer.state().items()}
    problem = ""
    with run.rt.alone():
        try:
            trainer.warm_up()
        except COMPILE_ERRORS as error:
            problem = compiler_line(error)
    if problem := run.rt.any_problem(problem):
        if run.rt.is_gpu:  # where attention and kernels cannot do without
            raise RunError(f"torch.compile failed ({problem}); see its output above, or train on "
                           "the CPU: CUDA_VISIBLE_DEVICES= ./run.sh")  # fmt: skip
        run.log.line(f"compile: failed, so this run is slower ({problem})", show=True)
        trainer.compile(dont_compile)
        with run.rt.alone():
            trainer.warm_up()
    for name, tensor in trainer.state().items():
        if name in before:
            local(tensor).copy_(before[name])
        else:  # an optimizer's state, which does not exist before its first step
            tensor.zero_()


def compiler_line(error: Exception) -> str:
    """The line that says why a compilation failed: the compiler's own, if there is one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    own = [line for line in lines if "error:" in line]
    return [*own, *lines, type(error).__name__][0]


def dont_compile(function: Callable) -> Callable:
    """What stands for torch.compile where that is not to be."""
    return function


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def compiled_graphs() -> int:
    """Graphs that torch.compile has made so far in this process; it grows when it recompiles."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def time_to_target(curve: list, target: float) -> str:
    """Train time at which validation losses [(train ms, loss)] cross target, interpolated."""
    for (ms0, loss0), (ms1, loss1) in pairwise(curve):
        if loss0 > target >= loss1:
            return f"{ms0 + (ms1 - ms0) * (loss0 - target) / (loss0 - loss1):.0f}ms"
    return "none"
