"""Flags, device, clock, log and checkpoint files: the parts of a trainer no experiment changes.

Every hyperparameter is a dataclass field and a flag. The clock charges every moment of the process
to one account, so that timed and untimed seconds add up to its wall time. The log is one text file
for people and programs, written line by line: sections `=== name ===` in the order source, config,
environment, git, data, run; then the lines `step:N/M val_loss:X train_time:Yms step_avg:Zms`; last
the line `result ...`, which ends with the sha256 of everything above it. A line `check:` holds the
first digits of that hash so far, to tell where a log was changed. A section of source or git diff
names its number of lines, so that a parser can step over it.
"""

import argparse
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
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch._dynamo.utils
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError
from tqdm import tqdm

SCHEMA = 1
ROOT = Path(__file__).resolve().parent.parent
PEAK_BF16_TFLOPS = {  # dense, from the makers' data sheets
    "A100": 312, "H100": 989, "H200": 989, "GH200": 989, "B200": 2250, "L40S": 362, "4090": 165,
}  # fmt: skip
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
    """The function by which argparse reads one flag's text."""
    if kind is not bool:
        return kind

    def boolean(text: str) -> bool:
        return ("false", "true").index(text.lower()) == 1

    return boolean


def parse_flags(argv: list[str], tracks: dict, default_track: str, description: str):
    """Return (track's name, its hyperparameters, RunOptions, names of overridden hyperparameters).

    tracks: a dataclass instance of knobs by name, whose fields are flags like those of RunOptions.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--track", default=default_track)
    track = first.parse_known_args(argv)[0].track
    usage = "%(prog)s [--track NAME] [--FLAG VALUE]...    (all flags: --help)"
    parser = argparse.ArgumentParser(usage=usage, description=description, allow_abbrev=False)
    parser.add_argument("--track", choices=tracks, help=f"sets the defaults below; now: {track}")
    for defaults in (tracks.get(track) or next(iter(tracks.values())), RunOptions()):
        group = parser.add_argument_group(type(defaults).__name__, type(defaults).__doc__)
        for f in dataclasses.fields(defaults):
            text = f"{f.metadata['help']} (default: {getattr(defaults, f.name)!r})"
            kind, default = flag_type(f.type), argparse.SUPPRESS
            group.add_argument(
                f"--{f.name}", type=kind, default=default, metavar=kind.__name__, help=text
            )
    given = vars(parser.parse_args(argv))
    given.pop("track")
    for name in ("train_files", "val_files"):
        given |= {name: os.path.abspath(given[name])} if name in given else {}
    option_names = {f.name for f in dataclasses.fields(RunOptions)}
    options = RunOptions(**{k: v for k, v in given.items() if k in option_names})
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
        if self.is_gpu:
            self.use_gpu(int(os.environ.get("LOCAL_RANK", 0)))
        else:
            torch.set_flush_denormal(True)
            # Two threads would add the gradients of an embedding in an order of their own.
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False
        fast_bf16 = self.is_gpu or torch.cpu._is_amx_tile_supported()
        self.matmul_dtype = torch.bfloat16 if fast_bf16 and not fp32 else torch.float32
        self.stream_dtype = torch.bfloat16 if self.is_gpu else torch.float32
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
        self.memory_bytes = torch.cuda.get_device_properties(index).total_memory
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
            return f"no compiler {compiler}; for a faster run: apt install g++"
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            return "no Python.h; for a faster run: apt install python3-dev"
        return ""

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
        """End the file, with the result line and the hash over all lines above it."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if self.file is not None and not self.file.closed:
            try:
                if result is not None:
                    self.line(f"result {result} sha256:{self.hash.hexdigest()}", show=True)
            finally:
                self.file.close()


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
    log.section("config", [f"{key}: {value}" for key, value in config.items()])
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
