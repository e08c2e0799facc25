"""This process's device, its place among the ranks, and every exchange with the others."""

import hashlib
import os
import re
import resource
import shutil
import sys
import sysconfig
import threading
import time
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from referee.environment import BF16_GAIN, bf16_gain, cpu_model
from referee.flags import RunError

try:  # they may be empty, or left over from another program
    WORLD_SIZE = int(os.environ.get("WORLD_SIZE") or 1)
    RANK, LOCAL_RANK = (int(WORLD_SIZE > 1 and os.environ.get(name) or 0)
                        for name in ("RANK", "LOCAL_RANK"))  # fmt: skip
except ValueError as error:
    sys.exit(f"error: RANK, WORLD_SIZE or LOCAL_RANK: {error}; unset all, or start with torchrun")
ANSWER_S = 3  # a rank that works tells the others so within this time
STORE_S, SILENT_S = 300, 10  # seconds that ranks wait for each other to start; the first in silence


def compile_errors() -> tuple[type[Exception], ...]:
    """What torch.compile raises; nothing where it was never loaded, which takes seconds."""
    if "torch._dynamo" not in sys.modules:
        return ()
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    return TorchDynamoException, InductorError


@cache
def rank_store() -> dist.Store | None:
    """The store that ranks share beside their collectives; None for a single process."""
    if WORLD_SIZE == 1:
        return None
    told = (f"rank {RANK} waits for the other {WORLD_SIZE - 1} of WORLD_SIZE={WORLD_SIZE}, at most "
            f"{STORE_S} s; for a run of one process: unset RANK WORLD_SIZE")  # fmt: skip
    telling = threading.Timer(SILENT_S, print, [told], {"file": sys.stderr, "flush": True})
    telling.start()
    try:
        return next(dist.rendezvous("env://", timeout=timedelta(seconds=STORE_S)))[0]
    except (RuntimeError, ValueError) as error:
        raise RunError(f"rank {RANK} cannot reach the others ({str(error).splitlines()[0]}); start "
                       "them all at once, with torchrun") from None  # fmt: skip
    finally:
        telling.cancel()


def is_first_to_say(message: str) -> bool:
    """True on the first rank that asks about this message, so that one rank prints it for all."""
    with suppress(RuntimeError):  # without the store each rank speaks for itself
        has_store = rank_store.cache_info().currsize > 0  # else this rank never reached it
        if WORLD_SIZE > 1 and has_store:
            return rank_store().add(f"said {hashlib.sha256(message.encode()).hexdigest()}", 1) == 1
    return True


class Runtime:
    """This process's device, its place among the ranks, and every exchange with the others.

    The only place that asks what hardware there is. GPUs multiply matrices in bf16, CPUs as
    choose_arithmetic decides, before that in fp32. Collectives do nothing on a single process.
    """

    def __init__(self, fp32: bool = False, runs_per_device: int = 1, rank_timeout_s: int = 600):
        self.rank, self.world_size, self.is_alone = RANK, WORLD_SIZE, WORLD_SIZE == 1
        self.is_main, self.is_gpu = RANK == 0, torch.cuda.is_available()
        self.is_first_of_machine = LOCAL_RANK == 0
        self.device, self.device_name, self.memory_bytes = torch.device("cpu"), cpu_model(), 8e9
        self.shared_memory_bytes = 0  # per thread block of a GPU
        if self.is_gpu:
            self.use_gpu(LOCAL_RANK)
            self.memory_bytes /= runs_per_device
        else:
            torch.set_flush_denormal(True)
            # Otherwise threads add the gradients of an embedding in an order that varies. This
            # name for use_deterministic_algorithms does not load the compiler, which takes seconds.
            torch.set_deterministic_debug_mode("error")
            torch.utils.deterministic.fill_uninitialized_memory = False
        self.matmul_dtype = torch.bfloat16 if self.is_gpu and not fp32 else torch.float32
        self.stream_dtype, self.bf16_gain = self.matmul_dtype, "not measured"
        self.has_fp8 = self.is_gpu and not fp32 and torch.cuda.get_device_capability() >= (9, 0)
        self.steps_in_flight = 1 if self.is_gpu else 0  # started before the last loss is read
        if self.world_size > 1:
            backend = "cpu:gloo,cuda:nccl" if self.is_gpu else "gloo"
            dist.init_process_group(backend, store=rank_store(), rank=RANK, world_size=WORLD_SIZE,
                                    timeout=timedelta(seconds=rank_timeout_s))  # fmt: skip
            with self.collective():  # the first one connects GPUs, which takes seconds
                dist.all_reduce(torch.zeros(1, device=self.device))

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

    def choose_arithmetic(self, requested_dtype: str):
        """Set the dtype in which a CPU multiplies matrices; a GPU keeps its own.

        requested_dtype: float32, bfloat16, or empty: rank 0 measures for all ranks.
        """
        if self.is_gpu:
            return
        if not requested_dtype:
            gain = self.on_main(bf16_gain)
            requested_dtype = "bfloat16" if gain > BF16_GAIN else "float32"
            self.bf16_gain = f"{gain:.2f}"
        self.matmul_dtype = getattr(torch, requested_dtype)

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

    def prepare_compiler(self) -> None:
        """Let Inductor test the CPU and precompile headers while the first graphs are traced.

        Otherwise it does so before its first kernel, and everything waits. A failure here is
        ignored, for it returns there with its reason.
        """
        if self.is_gpu:
            return
        torch.use_deterministic_algorithms(True)  # for Inductor too
        with suppress(ImportError):  # of a torch that has moved it
            # All that both threads need is imported first: two threads that import the same modules
            # at a time can find them half made.
            from torch._inductor import compile_fx  # noqa: F401
            from torch._inductor.codecache import CppPythonBindingsCodeCache

            def compile_nothing():
                with suppress(Exception):
                    CppPythonBindingsCodeCache.load_pybinding([], 'extern "C" void kernel() {}')

            threading.Thread(target=compile_nothing, daemon=True).start()

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
        """Turn a failed exchange between ranks into an error that says where to look."""
        try:
            yield
        except RuntimeError as error:
            own_errors = torch.OutOfMemoryError, *compile_errors()  # of this rank alone
            if self.world_size == 1 or isinstance(error, own_errors):
                raise
            # gloo's message begins with a place in its source and ends with advice for others.
            reason = re.sub(r"^\[\S+:\d+\] ", "", str(error).splitlines()[0]).partition(". ")[0]
            raise RunError(
                f"lost contact with {self.silent_ranks()} ({reason}); look above for why it ended, "
                "or on its machine for what stopped it, then start again"
            ) from None

    def silent_ranks(self) -> str:
        """The ranks that do not answer within ANSWER_S; the others report the same failure."""
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
        """Without exchanges between ranks, for work whose results are discarded."""
        self.is_alone = True
        try:
            yield
        finally:
            self.is_alone = self.world_size == 1

    def all_of(self, value) -> list:
        """The values of all ranks, by rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            with self.collective():
                dist.all_gather_object(values, value)
        return values

    def any_problem(self, problem: str) -> str:
        """On every rank the first problem of any rank; empty if there is none."""
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

    def close(self):
        """Leave the group of ranks; a rank that exits without it may abort in gloo's threads."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def peak_memory_mib(self) -> int:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        unit_bits = 20 if sys.platform == "darwin" else 10  # bytes there, KiB here
        return torch.cuda.max_memory_allocated() >> 20 if self.is_gpu else peak >> unit_bits
