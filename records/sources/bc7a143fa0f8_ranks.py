"""This process's device, its place among the ranks, and the signals that ask a run to end."""

import hashlib
import math
import os
import re
import resource
import shutil
import signal
import sys
import sysconfig
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError

from environment import cpu_model
from flags import RunError

COMPILE_ERRORS = (TorchDynamoException, InductorError)
# By the names of torch 2.13, or else by the older ones.
reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
SAME_REQUEST_S = 1.0  # keys bounce, and launchers pass on what their children got too
STOPPING = b"\nstopping after this step; press again to abort without a checkpoint\n"
ANSWER_S = 3  # a rank that works tells the others so within this time
STORE_S = 300  # seconds that ranks wait for each other to start
GEMMS = ((2048, 128, 512), (512, 768, 3072))  # rows, in, out: of the smallest track, and a large
BF16_GAIN = 1.2  # a CPU that multiplies all of them so much faster in bf16 does so in a run


class StopRequest:
    """ctrl-C, SIGTERM, a closed terminal or Slurm's warning (SIGUSR1).

    The first one in the loop asks for a clean end, any later one interrupts.
    """

    def __init__(self):
        self.signal, self.deferred, self.since = 0, False, 0.0
        for number in STOP_SIGNALS:
            under_nohup = number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN
            if not under_nohup:
                signal.signal(number, self)

    def __call__(self, number, frame):
        now, is_first = time.monotonic(), not self.signal
        if not is_first and now - self.since < SAME_REQUEST_S:
            return
        self.signal, self.since = number, now
        if not (is_first and self.deferred):
            raise KeyboardInterrupt
        if RANK == 0:
            with suppress(OSError):  # of a terminal that was closed
                os.write(2, STOPPING)


@cache
def rank_store() -> dist.Store | None:
    """What the ranks share beside their collectives; None for a process of its own."""
    if WORLD_SIZE == 1:
        return None
    try:
        return next(dist.rendezvous("env://", timeout=timedelta(seconds=STORE_S)))[0]
    except (RuntimeError, ValueError) as error:
        raise RunError(f"rank {RANK} cannot reach the others ({str(error).splitlines()[0]}); start "
                       "them all at once, with torchrun") from None  # fmt: skip


def is_first_to_say(message: str) -> bool:
    """Whether no other rank has asked this about the same message."""
    with suppress(RuntimeError):  # where the store is gone, each rank speaks for itself
        has_store = rank_store.cache_info().currsize > 0  # else this rank never reached it
        if WORLD_SIZE > 1 and has_store:
            return rank_store().add(f"said {hashlib.sha256(message.encode()).hexdigest()}", 1) == 1
    return True


def bf16_gain() -> float:
    """How many times as fast this CPU multiplies in bf16 as in fp32, where it gains least."""
    gains = []
    for rows, inputs, outputs in GEMMS:
        seconds = {torch.float32: math.inf, torch.bfloat16: math.inf}
        for dtype in [*seconds] * 8:  # in turns, and the fastest counts: others use the CPU too
            x, W = torch.ones(rows, inputs, dtype=dtype), torch.ones(outputs, inputs, dtype=dtype)
            start = time.perf_counter()
            x @ W.T
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - start)
        gains.append(seconds[torch.float32] / seconds[torch.bfloat16])
        if gains[-1] < BF16_GAIN:  # where bf16 is emulated, the large ones take seconds
            break
    return min(gains)


class Runtime:
    """This process's device, its place among the ranks, and every exchange with the others.

    The one place that asks what hardware there is. Matrices are multiplied in bf16 on GPUs, and on
    a CPU as choose_arithmetic finds; in fp32 before it is asked. Collectives return at once on one
    process.
    """

    def __init__(self, fp32: bool = False, runs_per_device: int = 1, rank_timeout_s: int = 600):
        self.rank, self.world_size, self.is_alone = RANK, WORLD_SIZE, WORLD_SIZE == 1
        self.is_main, self.is_gpu = RANK == 0, torch.cuda.is_available()
        self.is_first_of_machine = int(os.environ.get("LOCAL_RANK", 0)) == 0
        self.device, self.device_name, self.memory_bytes = torch.device("cpu"), cpu_model(), 8e9
        self.shared_memory_bytes = 0  # per thread block of a GPU
        if self.is_gpu:
            self.use_gpu(int(os.environ.get("LOCAL_RANK", 0)))
            self.memory_bytes /= runs_per_device
        else:
            torch.set_flush_denormal(True)
            # Otherwise threads add the gradients of an embedding in an order that varies.
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False
        self.matmul_dtype = torch.bfloat16 if self.is_gpu and not fp32 else torch.float32
        self.stream_dtype, self.bf16_gain = self.matmul_dtype, "not measured"
        self.has_fp8 = self.is_gpu and not fp32 and torch.cuda.get_device_capability() >= (9, 0)
        self.steps_in_flight = 1 if self.is_gpu else 0  # started before the last loss is read
        if self.world_size > 1:
            backend = "cpu:gloo,cuda:nccl" if self.is_gpu else "gloo"
            dist.init_process_group(backend, store=rank_store(), rank=RANK, world_size=WORLD_SIZE,
                                    timeout=timedelta(seconds=rank_timeout_s))  # fmt: skip

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
        self.shared_memory_bytes = properties.shared_memory_per_block_optin
        if torch.cuda.get_device_capability(index) < (8, 0):
            raise RunError(
                f"{self.device_name} has no bf16 arithmetic, which needs compute capability 8.0; "
                "train on the CPU: CUDA_VISIBLE_DEVICES= ./run.sh"
            )

    def choose_arithmetic(self, told: str):
        """Choose what a CPU multiplies matrices in: as told ("float32", "bfloat16"), or measured.

        Rank 0 measures for all. A GPU keeps what it has.
        """
        if self.is_gpu:
            return
        if not told:
            gain = self.on_main(bf16_gain)
            told, self.bf16_gain = "bfloat16" if gain > BF16_GAIN else "float32", f"{gain:.2f}"
        self.matmul_dtype = getattr(torch, told)

    def synchronize(self):
        if self.is_gpu:
            torch.cuda.synchronize()

    def compiler_problem(self) -> str:
        """Why torch.compile cannot work here; empty where it can."""
        compiler = os.environ.get("CC", "gcc") if self.is_gpu else os.environ.get("CXX", "g++")
        need = "a GPU cannot train without" if self.is_gpu else "for a faster run"
        if not shutil.which(compiler):
            return f"no compiler {compiler}; {need}: apt install g++"
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            return f"no Python.h; {need}: apt install python3-dev"
        return ""

    def to_host(self, tensor: Tensor):
        """Start a copy to the host; return (host tensor, function that waits for the copy)."""
        if not self.is_gpu:
            return tensor, lambda: None
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return host, event.synchronize

    @contextmanager
    def collective(self):
        """Turn the failure of an exchange between ranks into an error that says where to look."""
        try:
            yield
        except RuntimeError as error:
            if self.world_size == 1 or isinstance(error, (torch.OutOfMemoryError, *COMPILE_ERRORS)):
                raise
            # gloo's words begin with a place in its source and end with a joke.
            reason = re.sub(r"^\[\S+:\d+\] ", "", str(error).splitlines()[0]).partition(". ")[0]
            raise RunError(
                f"lost contact with {self.silent_ranks()} ({reason}); look above for why it ended, "
                "or on its machine for what stopped it, then start again"
            ) from None

    def silent_ranks(self) -> str:
        """The ranks that do not answer; each of the others has met the same failure."""
        silent = set(range(self.world_size))
        with suppress(RuntimeError):  # of a store that was on a rank which ended
            rank_store().set(f"alive {self.rank}", "")
            until = time.monotonic() + ANSWER_S
            while silent and time.monotonic() < until:
                time.sleep(0.1)
                silent = {r for r in silent if not rank_store().check([f"alive {r}"])}
        silent.discard(self.rank)
        return f"rank {', '.join(map(str, sorted(silent)))}" if silent else "another rank"

    @contextmanager
    def alone(self):
        """Without exchanges between ranks: for work whose results are thrown away."""
        self.is_alone = True
        try:
            yield
        finally:
            self.is_alone = self.world_size == 1

    def all_of(self, value) -> list:
        """What each rank gives, by rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            with self.collective():
                dist.all_gather_object(values, value)
        return values

    def any_problem(self, problem: str) -> str:
        """The first problem that a rank has, on every rank; empty if none has one."""
        return next(filter(None, self.all_of(problem)), "")

    def on_ranks(self, work, chosen: bool = True) -> list:
        """Run work() on the ranks that are chosen.

        Every rank gets their results, or the first one's error as a RunError.
        """
        result = problem = None
        if chosen:
            try:
                result = work()
            except (RunError, OSError) as error:
                problem = str(error)
        answers = self.all_of((chosen, result, problem))
        if problems := [text for _, _, text in answers if text is not None]:
            raise RunError(problems[0])
        return [found for was_chosen, found, _ in answers if was_chosen]

    def on_main(self, work):
        """Run work() on rank 0 alone; every rank gets its result, or its error as a RunError."""
        return self.on_ranks(work, self.is_main)[0]

    def average(self, tensors: list[Tensor]):
        """Replace each tensor by its mean over the ranks."""
        if self.is_alone:
            return
        with self.collective():
            pending = [dist.all_reduce(t, async_op=True) for t in tensors]
            for work, tensor in zip(pending, tensors, strict=True):
                work.wait()
                tensor.div_(self.world_size)

    def my_part(self, count: int) -> slice:
        """The items of count that this rank works on: equal parts, the last ones may be shorter."""
        part = math.ceil(count / self.world_size)
        return slice(min(self.rank * part, count), min((self.rank + 1) * part, count))

    def padded(self, bank: Tensor) -> Tensor:
        """bank (N, ...) with rows of zeros, so that it divides into equal parts."""
        missing = -len(bank) % self.world_size
        return torch.cat([bank, bank.new_zeros(missing, *bank.shape[1:])]) if missing else bank

    def start_average_of_parts(self, bank: Tensor) -> Callable[[], Tensor]:
        """Start to average bank (N, ...) over the ranks, in stream_dtype.

        Return a function that waits for the items of my_part(N).
        """
        if self.world_size == 1:
            return lambda: bank
        mine, whole = self.my_part(len(bank)), self.padded(bank.to(self.stream_dtype)).contiguous()
        part = whole.new_zeros(len(whole) // self.world_size, *whole.shape[1:])
        if self.is_alone:  # what is compiled then gets the same dtype as later
            return lambda: part[: mine.stop - mine.start]
        with self.collective():
            work = reduce_scatter(part, whole, async_op=True)

        def wait() -> Tensor:
            with self.collective():
                work.wait()
            return part[: mine.stop - mine.start].div_(self.world_size)

        return wait

    def gather_parts(self, bank: Tensor):
        """Fill bank (N, ...) on every rank with what each rank holds in its my_part(N)."""
        if self.is_alone:
            return
        whole = self.padded(bank)
        part = len(whole) // self.world_size
        mine = whole[self.rank * part :][:part].clone()
        with self.collective():
            all_gather(whole, mine)
        if whole is not bank:
            bank.copy_(whole[: len(bank)])

    def close(self):
        """Leave the group of ranks; a rank that exits without it may abort in gloo's threads."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def peak_memory_mib(self) -> int:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        unit_bits = 20 if sys.platform == "darwin" else 10  # bytes there, KiB here
        return torch.cuda.max_memory_allocated() >> 20 if self.is_gpu else peak >> unit_bits
