"""This process's device, its place among the ranks, and the signals that ask a run to end."""

import math
import os
import resource
import shutil
import signal
import sysconfig
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError

from environment import cpu_model
from flags import RunError

COMPILE_ERRORS = (TorchDynamoException, InductorError)


class StopRequest:
    """ctrl-C or SIGTERM: the first one in the loop asks for a clean end, any other interrupts."""

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

    def __init__(self, fp32: bool = False, runs_per_device: int = 1):
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.is_main, self.is_gpu = self.rank == 0, torch.cuda.is_available()
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
        fast_bf16 = self.is_gpu or torch.cpu._is_amx_tile_supported()
        self.matmul_dtype = torch.bfloat16 if fast_bf16 and not fp32 else torch.float32
        self.stream_dtype = torch.bfloat16 if self.is_gpu and not fp32 else torch.float32
        self.has_fp8 = self.is_gpu and not fp32 and torch.cuda.get_device_capability() >= (9, 0)
        self.steps_in_flight = 1 if self.is_gpu else 0  # started before the last loss is read
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
        self.shared_memory_bytes = properties.shared_memory_per_block_optin
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
            with self.collective():
                dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        if box[1] is not None:
            raise RunError(box[1], self.is_main)
        return box[0]

    def average(self, tensors: list[Tensor]):
        """Replace each tensor by its mean over the ranks."""
        if self.world_size == 1:
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

    def gather_parts(self, bank: Tensor):
        """Fill bank (N, ...) on every rank with what each rank holds in its my_part(N)."""
        if self.world_size == 1:
            return
        part = math.ceil(len(bank) / self.world_size)
        mine = bank.new_zeros(part, *bank.shape[1:])
        own = bank[self.my_part(len(bank))]
        mine[: len(own)] = own
        gathered = bank.new_empty(part * self.world_size, *bank.shape[1:])
        with self.collective():
            dist.all_gather(list(gathered.split(part)), mine)
        bank.copy_(gathered[: len(bank)])

    def close(self):
        """Leave the group of ranks; a rank that exits without it may abort in gloo's threads."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def peak_memory_mib(self) -> int:
        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return torch.cuda.max_memory_allocated() >> 20 if self.is_gpu else kib >> 10
