"""Flags, device, clock, log and checkpoints: the parts of a trainer that no experiment changes.

A trainer hands its dataclass of hyperparameters and its class to `execute`, which parses flags,
opens the log, builds the trainer with a `Run` and trains. The Run has the device, the clock and the
log, and writes the lines that every run has.

Every hyperparameter is a dataclass field and a flag. The clock charges every moment of the process
to one account, so that timed and untimed seconds add up to its wall time. The log is one text file
for people and programs, written line by line: sections `=== name ===` in the order source, config,
environment, git, data, run; then the lines `step:N/M val_loss:X train_time:Yms step_avg:Zms`; last
the line `result ...`, which ends with the sha256 of everything before it. A line `check:` holds the
first digits of that hash so far, to tell where a log was changed. A section of source or git diff
names its number of lines, so that a parser can step over it.
"""

import argparse
import ast
import dataclasses
import hashlib
import json
import math
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import get_args, get_origin

import numpy as np
import torch
import torch._dynamo.utils
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError
from tqdm import tqdm

from data.batches import check_shards

SCHEMA = 2  # in 1 the hash left out the result line itself
ROOT = Path(__file__).resolve().parent.parent
PEAK_BF16_TFLOPS = {  # dense, from the makers' data sheets
    "A100": 312, "H100": 989, "H200": 989, "GH200": 989, "B200": 2250, "L40S": 362, "4090": 165,
}  # fmt: skip
SMALL_FLEX_BLOCKS = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_M1": 32, "BLOCK_N1": 64,
                     "BLOCK_M2": 64, "BLOCK_N2": 32}  # fmt: skip
DIVERGED_STEPS = 50  # so many steps in a row above the loss of a uniform guess end a run
COMPILE_ERRORS = (TorchDynamoException, InductorError)
LOGGED_VARIABLES = ("CUDA_", "NCCL_", "TORCH", "PYTORCH_", "OMP_", "GOMP_", "KMP_", "MKL_")


class RunError(Exception):
    """What failed, where, and the next command to run, in words for a person.

    told: whether this rank should print it.
    """

    def __init__(self, message: str, told: bool = True):
        super().__init__(message)
        self.told = told


def knob(default, help_and_unit: str, least: float = 0):
    return field(default=default, metadata={"help": help_and_unit, "least": least})


@dataclass(frozen=True)
class RunOptions:
    """How this run is carried out; nothing here changes what is trained, but for the seed."""

    seed: int = knob(0, "seed of the initial weights and of the order of rows")
    slug: str = knob("run", "word in the log's name that says what was tried")
    log_dir: str = knob("", "folder of logs and checkpoints; empty: logs, beside train_gpt.py")
    source_dir: str = knob("", "folder that keeps the source once for many logs; empty: each log")
    declared_runs: int = knob(0, "runs that this attempt was declared to have; 0: not declared")
    save_every: int = knob(0, "steps between checkpoints; 0: only when interrupted")
    resume: str = knob("", "checkpoint to continue from")
    micro_batch_seqs: int = knob(0, "rows a forward pass of one rank; 0: what fits in memory")
    compile: bool = knob(True, "use torch.compile where it works")
    fp32: bool = knob(False, "multiply matrices in fp32 even where bf16 is faster")


def flag_type(kind: type):
    """The function by which argparse reads one flag's text; of tuples the parts have commas."""
    if get_origin(kind) is tuple:
        part = get_args(kind)[0]

        def list_of_numbers(text: str) -> tuple:
            return tuple(part(word) for word in text.split(","))

        return list_of_numbers
    if kind is not bool:
        return kind

    def boolean(text: str) -> bool:
        return ("false", "true").index(text.lower()) == 1

    return boolean


def as_flag(value):
    """A hyperparameter as one would give it to its flag, and as logs have it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else value


def parse_flags(argv: list[str], tracks: dict, gpu_track: str, description: str, options=None):
    """Return (track's name, its hyperparameters, options, names of overridden hyperparameters).

    tracks: a dataclass instance of knobs by name, whose fields are flags like those of options,
    RunOptions() or what a trainer has in its place. Without --track it is gpu_track on a GPU.
    """
    default = gpu_track if torch.cuda.is_available() else "embedded"
    options = options or RunOptions()
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--track", default=default)
    track = first.parse_known_args(argv)[0].track
    usage = "%(prog)s [--track NAME] [--FLAG VALUE]...    (all flags: --help)"
    parser = argparse.ArgumentParser(usage=usage, description=description, allow_abbrev=False)
    parser.add_argument("--track", choices=tracks, help=f"sets the defaults below; now: {track}")
    for defaults in (tracks.get(track) or next(iter(tracks.values())), options):
        group = parser.add_argument_group(type(defaults).__name__, type(defaults).__doc__)
        for f in dataclasses.fields(defaults):
            text = f"{f.metadata['help']} (default: {as_flag(getattr(defaults, f.name))!r})"
            kind, default = flag_type(f.type), argparse.SUPPRESS
            group.add_argument(
                f"--{f.name}", type=kind, default=default, metavar=kind.__name__, help=text
            )
    given = vars(parser.parse_args(argv))
    given.pop("track")
    for name in ("train_files", "val_files"):
        given |= {name: os.path.abspath(given[name])} if name in given else {}
    option_names = {f.name for f in dataclasses.fields(options)}
    options = dataclasses.replace(options, **{k: given[k] for k in option_names & given.keys()})
    overrides = {k: v for k, v in given.items() if k not in option_names}
    return track, dataclasses.replace(tracks[track], **overrides), options, sorted(overrides)


class StopRequest:
    """ctrl-C or SIGTERM: in the loop the first one asks for a clean end, else it interrupts."""

    def __init__(self):
        self.signal, self.deferred = 0, False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)

    def __call__(self, number, frame):
        again, self.signal = self.signal, number
        if again or not self.deferred:
            raise KeyboardInterrupt


class Runtime:
    """This process's device, its place among the ranks, and every exchange with the others.

    The one place that asks what hardware there is. Matrices are multiplied in bf16 on GPUs and on
    CPUs with AMX, in fp32 on other CPUs, where bf16 is emulated and slow. Collectives return at
    once on one process.
    """

    def __init__(self, fp32: bool = False):
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.is_main, self.is_gpu = self.rank == 0, torch.cuda.is_available()
        self.device, self.device_name, self.memory_bytes = torch.device("cpu"), cpu_model(), 8e9
        self.flex_options = None
        if self.is_gpu:
            self.use_gpu(int(os.environ.get("LOCAL_RANK", 0)))
        else:
            torch.set_flush_denormal(True)
            # Two threads would add the gradients of an embedding in an order of their own.
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False
        fast_bf16 = self.is_gpu or torch.cpu._is_amx_tile_supported()
        self.matmul_dtype = torch.bfloat16 if fast_bf16 and not fp32 else torch.float32
        self.stream_dtype = torch.bfloat16 if self.is_gpu and not fp32 else torch.float32
        self.has_fp8 = self.is_gpu and not fp32 and torch.cuda.get_device_capability() >= (9, 0)
        self.seq_len_unit = 128 if self.is_gpu else 1  # attention works by blocks of this length
        self.steps_in_flight = 1 if self.is_gpu else 0  # begun before the last one's loss is read
        if self.world_size > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.is_gpu else "gloo")

    def use_gpu(self, index: int):
        if index >= (count := torch.cuda.device_count()):
            raise RunError(
                f"rank {self.rank} has no GPU of its own, this machine has {count}; "
                f"run: torchrun --nproc_per_node={count} train_gpt.py"
            )
        self.device = torch.device("cuda", index)
        torch.cuda.set_device(self.device)
        self.device_name = torch.cuda.get_device_name(index)
        properties = torch.cuda.get_device_properties(index)
        self.memory_bytes = properties.total_memory
        if properties.shared_memory_per_block_optin < 160 << 10:  # consumer cards
            self.flex_options = SMALL_FLEX_BLOCKS
        if torch.cuda.get_device_capability(index) < (8, 0):
            raise RunError(
                f"{self.device_name} has no bf16 arithmetic, which needs compute capability 8.0; "
                "train on the CPU: CUDA_VISIBLE_DEVICES= ./run.sh"
            )

    def synchronize(self):
        if self.is_gpu:
            torch.cuda.synchronize()

    def compiler_problem(self) -> str:
        """Why torch.compile cannot work here; empty where it can."""
        compiler = os.environ.get("CC", "gcc") if self.is_gpu else os.environ.get("CXX", "g++")
        if not shutil.which(compiler):
            return f"no compiler {compiler}; {self.without_compiler}: apt install g++"
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            return f"no Python.h; {self.without_compiler}: apt install python3-dev"
        return ""

    @property
    def without_compiler(self) -> str:
        """What a missing compiler means: on a GPU attention and kernels cannot do without it."""
        return "a GPU cannot train without" if self.is_gpu else "for a faster run"

    def to_host(self, tensor: Tensor):
        """Begin to copy to the host; return (host tensor, function that waits for the copy)."""
        if not self.is_gpu:
            return tensor, lambda: None
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return host, event.synchronize

    @contextmanager
    def contact(self):
        """Turn the failure of a collective into an error that says what to look for."""
        try:
            yield
        except RuntimeError as error:
            if self.world_size == 1 or isinstance(error, torch.OutOfMemoryError):
                raise
            raise RunError(
                f"rank {self.rank} lost contact with another rank ({str(error).splitlines()[0]}); "
                "look above for why that one ended, then start again, with --resume if it saved"
            ) from None

    def on_main(self, work):
        """Run work() on rank 0 alone; every rank gets its result, or its error as a RunError."""
        box = [None, None]
        if self.is_main:
            try:
                box[0] = work()
            except (RunError, OSError) as error:
                box[1] = str(error)
        if self.world_size > 1:
            with self.contact():
                dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        if box[1] is not None:
            raise RunError(box[1], self.is_main)
        return box[0]

    def average(self, tensors: list[Tensor]):
        """Replace each tensor by its mean over the ranks."""
        if self.world_size == 1:
            return
        with self.contact():
            pending = [dist.all_reduce(t, async_op=True) for t in tensors]
            for work, tensor in zip(pending, tensors, strict=True):
                work.wait()
                tensor.div_(self.world_size)

    def my_part(self, count: int) -> slice:
        """Which of count items this rank works on; parts are equal, the last ones may be short."""
        part = math.ceil(count / self.world_size)
        return slice(min(self.rank * part, count), min((self.rank + 1) * part, count))

    def gather_parts(self, bank: Tensor):
        """Fill bank (N, ...) on every rank from what each holds in its my_part(N)."""
        if self.world_size == 1:
            return
        part = math.ceil(len(bank) / self.world_size)
        mine = bank.new_zeros(part, *bank.shape[1:])
        own = bank[self.my_part(len(bank))]
        mine[: len(own)] = own
        everything = bank.new_empty(part * self.world_size, *bank.shape[1:])
        with self.contact():
            dist.all_gather_into_tensor(everything, mine)
        bank.copy_(everything[: len(bank)])

    def contention(self, cpu_share: float) -> str:
        """What to warn of when this process had less than its threads' share of a CPU."""
        if self.is_gpu or cpu_share > 0.95:
            return ""
        return (
            f"other processes took this CPU (cpu_share {cpu_share:.2f}): the times of this run "
            "are not comparable; run again on a quiet machine"
        )

    def close(self):
        """Leave the group of ranks, when all of them have finished."""
        if self.world_size > 1:
            dist.destroy_process_group()

    def peak_memory_mib(self) -> int:
        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return torch.cuda.max_memory_allocated() >> 20 if self.is_gpu else kib >> 10


class Stopwatch:
    """Accounts of seconds since start; only the account `train` is a run's time.

    synchronize waits for the device, so that no work is charged to the account after its own.
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
    """One run's text file, hashed as it grows; silent until opened, so on all ranks but 0."""

    def __init__(self, folder: str, name: str, num_steps: int):
        self.path, self.hash, self.num_steps = (
            Path(folder or ROOT / "logs") / f"{name}.txt",
            hashlib.sha256(),
            num_steps,
        )
        self.file = self.bar = None

    def open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("x", buffering=1, encoding="utf-8")
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
            tqdm.write(text) if self.bar is not None else print(text, flush=True)

    def section(self, name: str, lines=()) -> None:
        for text in (f"=== {name} ===", *lines):
            self.line(text)
        self.check()

    def check(self) -> None:
        self.line(f"check: {self.hash.hexdigest()[:12]}")

    def progress(self, step: int, text: str) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step - self.bar.n)

    def close(self, result: str | None = None) -> None:
        """End the file, with the result line and the hash over everything before that hash."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if self.file is not None and not self.file.closed:
            try:
                if result is not None:
                    self.hash.update(f"result {result}".encode())
                    self.line(f"result {result} sha256:{self.hash.hexdigest()}", show=True)
            finally:
                self.file.close()


class Run:
    """One run: its settings, device, clock and log, and every line that it writes while it trains.

    hp: a dataclass with at least num_steps, vocab_size and target_val_loss. The trainer sets
    flops_per_token (forward and backward) and micro_batch_seqs, and calls, in the loop, end_step
    and validated. It may set checkpoints, a format with the methods of OneFile.
    """

    def __init__(self, track: str, hp, options: RunOptions, overrides, rt: Runtime, stop, started):
        self.checkpoints = OneFile()
        self.track, self.hp, self.options, self.overrides = track, hp, options, overrides
        self.rt, self.stop, self.clock = rt, stop, Stopwatch(started, rt.synchronize)
        stamp = time.strftime("%Y-%m-%dT%H%M%SZ", time.gmtime())
        name = f"{stamp}_{track}_{options.slug}_{uuid.uuid4().hex[:8]}"
        self.name = rt.on_main(lambda: name)
        self.log = Log(options.log_dir, self.name, hp.num_steps)
        self.status, self.step, self.tokens, self.curve = "", 0, 0, []  # curve: (train ms, loss)
        self.first_step = self.first_tokens = self.bad_steps = self.graphs = 0
        self.pending = []  # steps whose loss has not been read
        self.flops_per_token, self.micro_batch_seqs = math.nan, 1

    def config(self) -> dict:
        """What a checkpoint belongs to: it cannot be resumed with any other."""
        return {**dataclasses.asdict(self.hp), "seed": self.options.seed}

    def header(self, sources: dict[str, str]) -> None:
        """Write everything that stands above the data: sources, config, environment, git state."""
        rt, overrides = self.rt, " ".join(self.overrides) or "none"
        config = {"run": self.name, "track": self.track, "overrides": overrides,
                  **dataclasses.asdict(self.hp), **dataclasses.asdict(self.options)}  # fmt: skip
        device = {"device": rt.device_name, "world_size": rt.world_size,
                  "matmul_dtype": rt.matmul_dtype, "stream_dtype": rt.stream_dtype}  # fmt: skip
        header_sections(self.log, sources, self.options.source_dir, config, device)

    def compiler(self):
        """torch.compile for this run, or a function that returns what it gets; logged."""
        problem = self.rt.compiler_problem()
        if problem and self.rt.is_gpu:
            raise RunError(problem)
        problem = problem if self.options.compile else "--compile false"
        self.log.line(f"compile: {problem or 'yes'}", show=bool(problem))
        return (lambda f: f) if problem else partial(torch.compile, dynamic=False)

    def start(self) -> None:
        """Begin the timed part; from here on the first signal asks for a clean end."""
        self.stop.deferred = True
        self.clock.switch("train")

    def end_step(self, loss: Tensor, tokens: int) -> None:
        """Count an optimizer step of so many tokens over all ranks; loss: this rank's mean, 0-D.

        Losses are read while later steps run, so that the device never waits for the host.
        """
        pulse = torch.stack([loss, torch.full_like(loss, self.stop.signal > 0)])
        self.rt.average([pulse])
        self.step, self.tokens = self.step + 1, self.tokens + tokens
        self.pending.append((self.step, *self.rt.to_host(pulse)))
        while len(self.pending) > self.rt.steps_in_flight * (self.step < self.hp.num_steps):
            self.read_pulse(*self.pending.pop(0))

    def read_pulse(self, step: int, pulse: Tensor, wait) -> None:
        """Log the step whose pulse [loss, stop request] arrives; end the run if it must end."""
        wait()
        loss, stop = pulse.tolist()
        train_ms, num_steps = self.clock.train_ms(), self.hp.num_steps
        self.log.line(f"step:{step}/{num_steps} train_loss:{loss:.6f} train_time:{train_ms:.0f}ms")
        rate = self.tokens_per_second() / 1000
        self.log.progress(step, f"loss {loss:.4f}, {rate:.1f}k tokens/s, MFU {self.mfu()}")
        self.bad_steps = self.bad_steps + 1 if loss > math.log(self.hp.vocab_size) else 0
        if not math.isfinite(loss) or self.bad_steps > DIVERGED_STEPS:
            self.status = "diverged"
        elif stop:
            self.status = self.status or "aborted"

    def validated(self, loss: float) -> None:
        """Log a validation loss, nats a token; call it outside of the account of validation."""
        train_ms = self.clock.train_ms()
        self.curve.append((train_ms, loss))
        self.log.line(
            f"step:{self.step}/{self.hp.num_steps} val_loss:{loss:.6f} "
            f"train_time:{train_ms:.0f}ms step_avg:{train_ms / max(self.step, 1):.2f}ms",
            show=True,
        )
        self.log.check()

    def finish(self) -> None:
        """End the timed part; a run that came to its last validation has its status from that."""
        while self.pending:  # steps that were under way when the run was asked to end
            self.read_pulse(*self.pending.pop(0))
        reached = self.curve and self.curve[-1][1] <= self.hp.target_val_loss
        self.status = self.status or ("success" if reached else "missed")
        self.clock.switch("end")

    def checkpoint_is_due(self) -> bool:
        every = self.options.save_every
        return self.status == "aborted" or bool(every) and self.step % every == 0

    def save(self, tensors: dict[str, Tensor]) -> None:
        """Write a checkpoint beside the log; a kill leaves the one before or this one, whole."""
        with self.clock.charged_to("checkpoint"):
            facts = {"step": self.step, "tokens": self.tokens, "curve": self.curve,
                     "train_ms": self.clock.train_ms(), "config": self.config()}  # fmt: skip
            path = self.checkpoints.save(self.rt, self.log.path, tensors, facts)
            self.log.line(f"checkpoint: {path} step:{self.step}", show=True)

    def resume(self, tensors: dict[str, Tensor]) -> None:
        """Fill tensors from the checkpoint --resume of a run with the same configuration."""
        path = self.options.resume
        saved, fill = self.checkpoints.open(self.rt, path)
        if other := {k: v for k, v in saved["config"].items() if self.config().get(k) != v}:
            flags = " ".join(f"--{name} {as_flag(value)}" for name, value in other.items())
            raise RunError(f"{path} was saved by another run; to resume it, add: {flags}")
        fill(tensors)
        self.step = self.first_step = saved["step"]
        self.tokens = self.first_tokens = saved["tokens"]
        self.curve, self.clock.carried_ms = saved["curve"], saved["train_ms"]
        self.log.line(f"resumed: {path} step:{self.step}", show=True)

    def tokens_per_second(self) -> float:
        """Of this process, over all ranks, in timed seconds."""
        seconds = max(self.clock.train_ms() - self.clock.carried_ms, 1) / 1000
        return (self.tokens - self.first_tokens) / seconds

    def mfu(self) -> str:
        rate = self.flops_per_token * self.tokens_per_second()
        return mfu(rate, self.rt.device_name, self.rt.world_size)

    def result(self) -> str:
        """The result line's fields, without the hash."""
        hp, clock = self.hp, self.clock
        return (
            f"status:{self.status or 'aborted'} "
            f"val_loss:{self.curve[-1][1] if self.curve else math.nan:.6f} "
            f"target:{hp.target_val_loss} train_time:{clock.train_ms():.0f}ms "
            f"time_to_target:{time_to_target(self.curve, hp.target_val_loss)} steps:{self.step} "
            f"tokens:{self.tokens} tokens_per_s:{self.tokens_per_second():.0f} "
            f"flops_per_token:{self.flops_per_token:.4g} mfu:{self.mfu()} "
            f"peak_memory:{self.rt.peak_memory_mib()}MiB cpu_share:{clock.cpu_share():.2f} "
            f"recompiled:{compiled_graphs() - self.graphs} "
            f"seed:{self.options.seed} overrides:{len(self.overrides)} "
            f"resumed_from:{self.first_step}"
        )


def execute(
    make_trainer,
    tracks: dict,
    gpu_track: str,
    sources: dict[str, str],
    started: float,
    options: RunOptions | None = None,
) -> int:
    """Carry out the run that this process's flags describe; return its exit code.

    make_trainer(run) returns an object with warm_up(), which compiles and leaves no trace; state(),
    every tensor that training changes, by name; and train(). tracks: hyperparameters by name;
    gpu_track is what a GPU trains where no flag names one.
    sources: what the log embeds, the entry file first. started: perf_counter at first import.
    options: defaults, where a trainer has more of them.
    """
    stop = StopRequest()
    try:
        description = ast.get_docstring(ast.parse(next(iter(sources.values())))).splitlines()[0]
        parsed = parse_flags(sys.argv[1:], tracks, gpu_track, description, options)
        track, hp, options, overrides = parsed
        run = Run(track, hp, options, overrides, Runtime(options.fp32), stop, started)
        carry_out(run, make_trainer, sources)
        return {"success": 0, "missed": 0, "diverged": 1}.get(run.status, 128 + stop.signal)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + stop.signal
    except (RunError, OSError) as error:
        if getattr(error, "told", True):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1


def carry_out(run: Run, make_trainer, sources: dict[str, str]) -> None:
    """Open the run's log, build the trainer and train; the log gets its last line in any case."""
    rt, log = run.rt, run.log
    rt.on_main(log.open)
    try:
        rt.on_main(lambda: run.header(sources))
        log.section("data", rt.on_main(lambda: check_shards(run.hp)))
        log.section("run")
        log.line(calibration(rt.device, rt.matmul_dtype, rt.synchronize))
        trainer = make_trainer(run)
        with run.clock.charged_to("compile"):
            trainer.warm_up()
        run.graphs = compiled_graphs()
        if run.options.resume:
            run.resume(trainer.state())
        trainer.train()
        log.line(calibration(rt.device, rt.matmul_dtype, rt.synchronize))
        if warning := rt.contention(run.clock.cpu_share()):
            log.line(f"warning: {warning}", show=True)
        rt.close()
    except torch.OutOfMemoryError:
        rows = run.micro_batch_seqs
        raise RunError(
            f"out of memory on {rt.device_name} with {rows} rows a forward pass; "
            f"add --micro_batch_seqs {max(1, rows // 2)}, or lower --seq_len"
        ) from None
    finally:
        try:
            log.line(run.clock.ledger(), show=True)
        finally:  # after an error of the GPU no clock can wait for it
            log.close(run.result())


def header_sections(
    log: Log, sources: dict[str, str], source_dir: str, config: dict, device: dict
) -> None:
    """Write everything that stands above the data: sources, config, environment, git state.

    sources: text by path; config and device: what the trainer knows, one line a key.
    """
    for path, text in sources.items():
        lines, digest = text.splitlines(), hashlib.sha256(text.encode()).hexdigest()
        heading = f"source {path} lines:{len(lines)} sha256:{digest}"
        if source_dir:
            kept = keep_source(Path(source_dir, path), text)
            log.section(f"{heading} kept:{os.path.relpath(kept, log.path.parent)}")
        else:
            log.section(heading, lines)
    utc = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    config = {"schema": SCHEMA, "utc": utc, "argv": json.dumps(sys.argv[1:]), **config}
    log.section("config", [f"{key}: {as_flag(value)}" for key, value in config.items()])
    entries = {**device, **environment(on_gpu=torch.cuda.is_available())}
    log.section("environment", [f"{key}: {value}" for key, value in entries.items()])
    commit = shell("git", "rev-parse", "HEAD") or "none"
    changed = shell("git", "diff", "--name-only", "HEAD", "--", *sources).split()
    diff = shell("git", "diff", "HEAD", "--", *changed).splitlines() if changed else []
    diff = [] if source_dir else diff
    changed = ",".join(changed) or "none"
    log.section(f"git commit:{commit} changed:{changed} lines:{len(diff)}", diff)


def keep_source(path: Path, text: str) -> Path:
    """Make sure that path holds this text, which logs then name; RunError if it holds another."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    if path.read_text() != text:
        raise RunError(f"{path} belongs to runs of another source; give a new --source_dir")
    return path


def shell(*command: str) -> str:
    """Output of a command; empty if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or "unknown CPU"


def environment(on_gpu: bool) -> dict:
    """Software and hardware of this machine; the machine itself only as a salted hash."""
    host = hashlib.sha256(f"photofinish {platform.node()} {uuid.getnode()}".encode()).hexdigest()
    entries = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "triton": getattr(sys.modules.get("triton"), "__version__", "none"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else "none",
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else "none",
        "os": platform.platform(),
        "host": host[:16],
        "cpu": f"{cpu_model()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "ram_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30,
        "load_average": f"{os.getloadavg()[0]:.2f}",
        "variables": json.dumps(
            {k: v for k, v in sorted(os.environ.items()) if k.startswith(LOGGED_VARIABLES)}
        ),
    }
    if on_gpu:
        names = (
            "driver_version,memory.total,power.limit,clocks.max.sm,clocks.sm,clocks.mem,"
            "temperature.gpu,ecc.mode.current,mig.mode.current"
        )
        rows = shell("nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader").splitlines()
        entries |= {f"gpu{i}": f"{names} = {row}" for i, row in enumerate(rows)}
        apps = shell("nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader")
        entries["gpu_processes"] = " | ".join(apps.splitlines()) or "none"
    return entries


def mfu(flops_per_second: float, device_name: str, devices: int) -> str:
    """Share of the devices' dense bf16 peak; `unknown` for a device that PEAK_BF16_TFLOPS lacks."""
    peaks = [tflops for name, tflops in PEAK_BF16_TFLOPS.items() if name in device_name]
    return f"{flops_per_second / (peaks[-1] * 1e12 * devices):.4f}" if peaks else "unknown"


def compiled_graphs() -> int:
    """Graphs that torch.compile has made so far in this process; it grows when it recompiles."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def calibration(device: torch.device, dtype: torch.dtype, synchronize) -> str:
    """Matmul and copy rate of the device now: they flag a slow host, and rescale nothing."""
    size, count = (8192, 1 << 27) if device.type == "cuda" else (1024, 1 << 24)
    a = torch.ones(size, size, device=device, dtype=dtype)
    source = torch.ones(count, device=device)
    target, medians = torch.empty_like(source), []
    for work in (lambda: a @ a, lambda: target.copy_(source)):
        seconds = []
        while sum(seconds) < 0.3:  # long enough for caches and clocks to settle
            synchronize()
            start = time.perf_counter()
            work()
            synchronize()
            seconds.append(time.perf_counter() - start)
        medians.append(sorted(seconds)[len(seconds) // 2])
    tflops, gb_per_s = 2e-12 * size**3 / medians[0], 8e-9 * count / medians[1]
    return f"calibration: matmul_tflops:{tflops:.3f} copy_gb_per_s:{gb_per_s:.1f}"


def time_to_target(curve: list, target: float) -> str:
    """Train time at which validation losses [(train ms, loss)] cross target, interpolated."""
    for (ms0, loss0), (ms1, loss1) in pairwise(curve):
        if loss0 > target >= loss1:
            return f"{ms0 + (ms1 - ms0) * (loss0 - target) / (loss0 - loss1):.0f}ms"
    return "none"


class OneFile:
    """Checkpoints of one file, written by rank 0, which holds every tensor whole."""

    def save(self, rt: Runtime, log_path: Path, tensors: dict[str, Tensor], facts: dict) -> Path:
        """Write tensors and facts, both by name, beside the log; return where."""
        path = log_path.with_suffix(".pt")
        rt.on_main(lambda: write_checkpoint(path, {"tensors": tensors, **facts}))
        return path

    def open(self, rt: Runtime, path: str):
        """Return (facts, function that fills tensors by name); RunError for anything else."""
        saved = read_checkpoint(path)

        def fill(tensors: dict[str, Tensor]) -> None:
            for name, tensor in tensors.items():
                tensor.copy_(saved["tensors"][name])

        return saved, fill


def write_checkpoint(path: Path, contents: dict):
    part = path.with_suffix(".part")
    try:
        torch.save(contents, part)
        part.replace(path)
    except (OSError, RuntimeError) as error:
        raise RunError(f"cannot save {path}: {error}; free some space or give --log_dir") from None
    finally:
        part.unlink(missing_ok=True)


def read_checkpoint(path: str) -> dict:
    """The contents of a checkpoint, on the CPU; RunError for anything else."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        saved["tensors"], saved["step"], saved["curve"], saved["train_ms"], saved["config"]
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise RunError(f"{path} is no usable checkpoint ({reason}); start without it") from None
    return saved
