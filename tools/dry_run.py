"""Run a trainer without data or GPU, and record what it launches, moves and allocates.

Needs a card of tools/fake_gpu.py, installed before this module is imported. The trainer is made,
compiled, warmed up and trained as by the harness, on tensors without data. Inductor's generated
code runs; each kernel that it launches is compiled by ptxas, but none is executed.
"""

import math
import os
import re
import subprocess
import tempfile
import weakref
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, wraps
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch._dynamo.utils
import torch._inductor.compile_fx as compile_fx
import torch._inductor.runtime.triton_heuristics as heuristics
import torch.distributed as dist
import triton
from torch._dynamo import convert_frame
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm
from triton.runtime.jit import JITFunction

from data.prefetch import Prefetcher
from referee import ranks
from referee.cards import Card
from referee.harness import Run, Settings, compiled_graphs, warm_up
from referee.ranks import Runtime

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
MAX_SPILL_BYTES = 128  # per thread
ALLOCATIONS = ("aten::empty", "aten::new_empty", "aten::empty_strided", "aten::empty_like",
               "aten::new_empty_strided")  # fmt: skip
OVERWRITES = ("aten::copy_", "aten::zero_", "aten::fill_")
GATHERS = ("aten::index", "aten::index_put", "aten::index_put_", "aten::gather", "aten::embedding")
REREAD = ("softcapped_loss_kernel",)  # kernels that read their first argument twice


class Kernel(NamedTuple):
    """One configuration of a Triton kernel, compiled by ptxas."""

    name: str
    config: str
    registers: int  # per thread
    spilled_bytes: int  # per thread
    shared_bytes: int  # per program
    problem: str  # why it cannot be launched, or empty


class Launch(NamedTuple):
    """One operation on the device."""

    name: str
    moved_bytes: int  # of the tensors that it reads and writes
    flops: int
    operand_bytes: int  # per element of a matrix product; 0: no product
    wire_bytes: int  # sent to other ranks


@dataclass
class Trace:
    """The record of a dry run."""

    rows: int = 0  # per forward pass
    peak_bytes: int = 0
    peak_when: str = ""
    graphs: int = 0
    recompiled: int = 0
    # By step, one list per forward and backward pass; the last one ends with the update.
    steps: dict[int, list[list[Launch]]] = field(default_factory=lambda: defaultdict(list))
    # By source, one item per configuration.
    kernels: dict[str, list[Kernel]] = field(default_factory=lambda: defaultdict(list))
    problems: list[str] = field(default_factory=list)  # may repeat


class DryRun(Run):
    """A run that validates one batch and writes no log."""

    recorder: "Recorder"

    def validate(self, predict, batch_rows: int) -> None:
        self.recorder.begin("validation")
        self.validation.rows = self.validation.rows[:batch_rows]
        self.validation.logits_type = FakeTensor
        self.validation.loss(predict, batch_rows)

    def end_step(self, loss, tokens: int) -> None:
        self.step += 1
        self.recorder.begin("between steps")

    def checkpoint_is_due(self) -> bool:
        return False


class Recorder(TorchDispatchMode):
    """Counts the work of every operator and kernel, and the bytes allocated at a time."""

    def __init__(self, card: Card, trace: Trace, compile_kernels: bool, keys, tell):
        """The arguments are those of dry_run."""
        super().__init__()
        self.card, self.trace, self.keys, self.tell = card, trace, keys, tell
        self.phase, self.launches, self.compiling = "build", [], 0
        self.within, self.alive, self.alive_bytes = "", {}, 0
        self.threads = ThreadPoolExecutor(os.cpu_count()) if compile_kernels else None
        self.compilations = {}

    @classmethod
    def is_infra_mode(cls):  # else torch.compile would trace this mode
        return True

    def begin(self, phase: str) -> list[Launch]:
        """Start a phase; return the list of its launches."""
        self.phase, self.launches = phase, []
        return self.launches

    def begin_pass(self, step: int) -> None:
        self.trace.steps[step].append(self.begin(f"step {step}"))

    # ---- operators

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name
        if self.compiling:
            return func(*args, **kwargs)
        if composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        if (definition := OPDEFS.get(name)) is not None:
            return self.run_body(definition, func, args, kwargs)
        outputs = func(*args, **kwargs)
        inputs, results = tensors((args, kwargs)), tensors(outputs)
        for tensor in results:
            self.count_memory(tensor)
        storages = {t.untyped_storage()._cdata for t in inputs}
        in_place = func._schema.is_mutable or func.namespace == "c10d"
        is_view = all(t.untyped_storage()._cdata in storages for t in results)
        if name in ALLOCATIONS or (is_view and not in_place):
            return outputs
        if not any(t.is_cuda for t in inputs + results):
            return outputs
        self.check_cuda_kernel(func)
        flops = 0
        if func.overloadpacket in flop_registry:
            flops = flop_registry[func.overloadpacket](*args, **kwargs, out_val=outputs)
        operand = min((t.element_size() for t in inputs if t.is_floating_point()), default=4)
        wire = wire_bytes(name, tensors(args)) if func.namespace == "c10d" else 0
        label = func.overloadpacket.__name__
        if flops:  # such as mm 16384x768 768x2304
            label += "".join(f" {'x'.join(map(str, t.shape))}" for t in inputs[:2])
        self.launch(label, moved_bytes(func, args, kwargs, results), flops, operand, wire)
        return outputs

    def run_body(self, definition, func, args, kwargs):
        """Run a custom operator's code; compare its results with those of its fake kernel."""
        if any(t.is_cuda for t in tensors((args, kwargs))):
            self.check_cuda_kernel(func)
        with recording_off(self):
            promised = tensors(func(*args, **kwargs))
        with self, self.part(definition._name):
            outputs = definition._init_fn(*args, **kwargs)
        for i, (fake, real) in enumerate(zip(promised, tensors(outputs), strict=True)):
            fake, real = ((tuple(t.shape), t.stride(), t.dtype) for t in (fake, real))
            if fake != real:
                problem = f"{func}, result {i}: its fake kernel returns {fake}, its code {real}"
                self.trace.problems.append(problem)
        del promised
        return outputs

    def check_cuda_kernel(self, func) -> None:
        if not has_cuda_kernel(func):
            self.trace.problems.append(f"operator {func._schema.name} has no CUDA kernel")

    @contextmanager
    def part(self, name: str):
        """Append the name of a part of the step to those of its launches."""
        self.within = f" of {name}"
        yield
        self.within = ""

    def launch(self, name, moved, flops=0, operand_bytes=0, wire=0) -> None:
        name += self.within
        self.launches.append(Launch(name, moved, flops, operand_bytes if flops else 0, wire))

    # ---- memory

    def count_memory(self, tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // 512) * 512
        if key in self.alive or not tensor.is_cuda:
            return
        self.alive[key] = size
        self.alive_bytes += size
        if self.alive_bytes > self.trace.peak_bytes:
            self.trace.peak_bytes, self.trace.peak_when = self.alive_bytes, self.phase
        weakref.finalize(storage, self.free, key)

    def free(self, key: int) -> None:
        self.alive_bytes -= self.alive.pop(key, 0)

    # ---- Triton kernels

    def compile(self, key: str, name: str, work) -> None:
        """Call work(), which compiles a kernel, in a thread; once per key."""
        if self.threads is not None and key not in self.compilations:
            self.compilations[key] = name, self.threads.submit(work)

    def finish_compiling(self) -> None:
        compilations = tqdm(self.compilations.values(), "compiling kernels", leave=False,
                            disable=not self.compilations)  # fmt: skip
        for name, done in compilations:
            if error := done.exception():
                reason = str(error).strip().splitlines()[0]
                self.trace.problems.append(f"kernel {name} does not compile: {reason}")
        for kernels in self.trace.kernels.values():
            if all(k.problem for k in kernels):
                self.trace.problems.append(f"kernel {kernels[0].name}: {kernels[0].problem}")

    def add_kernel(self, key: str, name: str, config: str, binary, warps: int) -> None:
        registers, spilled = resources(binary.asm["cubin"])
        shared, problem = binary.metadata.shared, ""
        if shared > self.card.shared_bytes:
            problem = f"needs {shared} B of shared memory, {self.card.name} has " \
                      f"{self.card.shared_bytes}"  # fmt: skip
        elif registers * warps * 32 > 65536:
            problem = f"needs {registers} registers for each of {warps * 32} threads"
        elif spilled > MAX_SPILL_BYTES:
            problem = f"spills {spilled} B per thread"
        kernel = Kernel(name, config, registers, spilled, shared, problem)
        self.trace.kernels[key].append(kernel)

    def inductor_launch(self, autotuner, args) -> None:
        name = autotuner.inductor_meta.get("kernel_name", autotuner.fn.__name__)
        self.compile(str(id(autotuner)), name, lambda: self.compile_autotuner(autotuner, name))
        moved = inductor_bytes(autotuner.fn, args)
        if problem := list_strides(autotuner, args):
            self.trace.problems.append(f"kernel {name}: {problem}")
        flops = 0
        if "flex_attention" in name and "arg_Q" in (parameters := autotuner.fn.arg_names):
            queries = args[parameters.index("arg_Q")].numel()  # backward: 5 products, forward: 2
            per_key = 10 if "backward" in name else 4
            flops = int(per_key * queries * self.keys(self.run.step))
        self.launch(name, moved, flops, 2)

    def compile_autotuner(self, autotuner, name: str) -> None:
        autotuner._precompile_worker()
        for result in autotuner.compile_results:
            config = result.config
            self.add_kernel(str(id(autotuner)), name, str(config), result.kernel, config.num_warps)

    def user_launch(self, kernel: JITFunction, run, args, grid, options) -> None:
        """Compile a kernel of the project's own for these arguments."""
        name = kernel.fn.__name__
        described = [a.dtype if isinstance(a, torch.Tensor) else type(a) for a in args]
        key = f"{name} {described} {options}"

        def work():
            metas = [torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="meta")
                     if isinstance(a, torch.Tensor) else a for a in args]  # fmt: skip
            binary = run(kernel, *metas, grid=grid, warmup=True, **options)
            self.add_kernel(key, name, str(options), binary, options.get("num_warps", 4))

        with _disable_current_modes():
            self.compile(key, name, work)
        flops = 2 * math.prod(args[4:7]) if name.startswith("relu_squared") else 0
        used = [a for a in (*args, args[0]) if isinstance(a, torch.Tensor)]
        moved = sum(map(nbytes, used if name in REREAD else used[:-1]))
        self.launch(name, moved, flops, 2)


def nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def moved_bytes(func, args, kwargs, results) -> int:
    """Bytes that an operator reads and writes, by its schema."""
    schema, moved, seen = func._schema, 0, set()
    given = {a.name: value for a, value in zip(schema.arguments, args, strict=False)} | kwargs
    for argument in schema.arguments:
        is_written = bool(argument.alias_info and argument.alias_info.is_write)
        is_read = not is_written or not (argument.kwarg_only or schema.name in OVERWRITES)
        for tensor in tensors(given.get(argument.name)):
            size = nbytes(tensor)
            if argument.name in ("self", "weight") and schema.name in GATHERS:
                size = min(size, nbytes(given.get("values", results[0])))
            moved += size * (2 if func.namespace == "c10d" else is_read + is_written)
            seen.add(id(tensor))
    return moved + sum(nbytes(t) for t in results if id(t) not in seen)


def inductor_bytes(kernel, args) -> int:
    """Bytes that a kernel of Inductor reads and writes.

    Of a tensor that is larger than what the kernel computes it touches a part: a gather, a slice.
    """
    sizes = re.findall(r"^ *(?:[xyz]|r\d?_?)numel = (\d+)$", kernel.src, re.M)
    given = dict(zip(kernel.arg_names, args, strict=False))
    sizes += [v for name, v in given.items() if name.endswith("numel") and isinstance(v, int)]
    moved = 0
    for name, argument in given.items():
        if isinstance(argument, torch.Tensor):
            places = len(re.findall(rf"\((?:{name}) \+", kernel.src))
            reach = max(places, 1) * math.prod(map(int, sizes)) * argument.element_size()
            times = 2 if name.startswith("in_out") or f"atomic_add({name} " in kernel.src else 1
            moved += times * min(nbytes(argument), reach if sizes else nbytes(argument))
    return moved


def tensors(tree) -> list[torch.Tensor]:
    """The distinct tensors of a nest of containers."""
    return list({id(t): t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)}.values())


@cache
def composite(func) -> bool:
    """Whether an operator is made of others, which are counted in its place."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return func.namespace == "aten" and func.has_kernel_for_dispatch_key(key)


@cache
def has_cuda_kernel(func) -> bool:
    """Whether an operator that the project defines runs on a GPU; torch's own do."""
    if func.namespace in ("aten", "prims", "c10d", "_c10d_functional", "inductor"):
        return True
    keys = ("CUDA", "CompositeExplicitAutograd", "CompositeImplicitAutograd")
    return any(func.has_kernel_for_dispatch_key(getattr(torch._C.DispatchKey, k)) for k in keys)


@contextmanager
def recording_off(recorder: Recorder):
    recorder.compiling += 1
    try:
        yield
    finally:
        recorder.compiling -= 1


def wire_bytes(name: str, exchanged: list[torch.Tensor]) -> int:
    """Bytes that one rank sends in a collective, by ring algorithms."""
    n, sizes = dist.get_world_size(), [t.numel() * t.element_size() for t in exchanged]
    if "allreduce" in name:
        return 2 * (n - 1) * sum(sizes) // n
    if "broadcast" in name:
        return sum(sizes)
    return (n - 1) * max(sizes, default=0) // n  # gather, scatter: max is the whole tensor


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory) per thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "-res-usage", file.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", output)
    return int(found[1]), max(int(found[2]), int(found[3]))


def list_strides(autotuner, args) -> str:
    """The problem, if FlexAttention's kernel reads its lists of blocks at wrong strides.

    It steps from row to row by the stride of the heads' dimension, which the lists may not have.
    """
    source, wrong = autotuner.fn.src, []
    constants = dict(re.findall(r"^ *(SPARSE_Z|SPARSE_HQ|stride_\w+_h) = (\d+)$", source, re.M))
    if int(constants.get("SPARSE_Z", 1)) == 1:
        return ""
    for parameter, lists in zip(autotuner.fn.arg_names, args, strict=False):
        stride = f"stride_{parameter.removeprefix('arg_').lower()}_h"
        if stride in constants:
            per_row = int(constants["SPARSE_HQ"]) * int(constants[stride])
            if lists.stride(0) != per_row:
                wrong.append(f"{stride} = {constants[stride]} moves by {per_row} elements, a row "
                             f"has {lists.stride(0)}")  # fmt: skip
    return "reads the block lists of another row: " + "; ".join(wrong) if wrong else ""


@contextmanager
def recording(recorder: Recorder):
    """Send launches of Inductor and Triton to the recorder; give the trainer empty batches."""
    run = JITFunction.run

    def triton_run(kernel, *args, grid, warmup, **options):
        if warmup:
            return run(kernel, *args, grid=grid, warmup=True, **options)
        return recorder.user_launch(kernel, run, args, grid, options)

    def prefetch(self, pairs, rt, depth=4):
        self.pairs, self.rt = pairs, rt

    def next_batch(self):
        recorder.begin_pass(recorder.run.step)
        pair = next(self.pairs)
        return [torch.empty(t.shape, dtype=t.dtype, device=self.rt.device) for t in pair]

    def lowered(compile_graph):
        @wraps(compile_graph)
        def compile_graph_unrecorded(*args, **kwargs):
            recorder.tell(f"{recorder.phase}: compiling graph {compiled_graphs()}")
            with recording_off(recorder):
                return compile_graph(*args, **kwargs)

        return compile_graph_unrecorded

    autotuner = heuristics.CachingAutotuner
    changes = [
        (autotuner, "precompile", lambda self, *args, **kwargs: None),
        (autotuner, "run", lambda self, *args, **kwargs: recorder.inductor_launch(self, args)),
        (JITFunction, "run", triton_run),
        (Prefetcher, "__init__", prefetch),
        (Prefetcher, "__next__", next_batch),
        (compile_fx, "compile_fx_inner", lowered(compile_fx.compile_fx_inner)),
        (convert_frame.ConvertFrame, "__call__", lowered(convert_frame.ConvertFrame.__call__)),
        (convert_frame.ConvertFrameAssert, "__call__",
         lowered(convert_frame.ConvertFrameAssert.__call__)),
    ]  # fmt: skip
    with ExitStack() as stack:
        for owner, name, value in changes:
            stack.enter_context(patch.object(owner, name, value))
        yield


@contextmanager
def rank_0_of(count: int):
    """Make this process the first of so many ranks, which exchange nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    join = dist.init_process_group

    def join_nobody(backend, **options):
        join("fake", rank=0, world_size=count, store=FakeStore())

    with (
        patch.multiple(ranks, RANK=0, WORLD_SIZE=count, rank_store=FakeStore),
        patch.object(Runtime, "all_of", lambda self, value: [value] * count),
        patch.object(dist, "init_process_group", join_nobody),
    ):
        yield
        if count > 1:
            dist.destroy_process_group()


def dry_run(
    make_trainer, settings: Settings, card: Card, cards: int, compile_kernels: bool, keys, tell
) -> Trace:
    """Run the trainer on so many cards; the shards that settings name must exist.

    keys(step): keys per query that FlexAttention multiplies; tell(text): shows progress.
    """
    trace = Trace()
    recorder = Recorder(card, trace, compile_kernels, keys, tell)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    entry = f"{make_trainer.__module__.replace('.', '/')}.py"
    with ExitStack() as stack:
        stack.enter_context(rank_0_of(cards))
        with FakeTensorMode():  # ranks greet each other with a tensor
            rt = Runtime()
        run = DryRun(settings, entry, rt, stop=None, started=0.0)
        recorder.run, run.recorder = run, recorder
        stack.enter_context(recording(recorder))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(recorder)
        trainer = run.build(make_trainer)
        recorder.begin("warm-up")
        warm_up(run, trainer)
        trace.graphs = compiled_graphs()
        for optimizer in getattr(trainer, "optimizers", {}).values():
            optimizer.step = recorder.part("optimizer")(optimizer.step)
        run.train(trainer)
        trace.rows, trace.recompiled = run.micro_batch_seqs, compiled_graphs() - trace.graphs
        recorder.finish_compiling()
    if trace.recompiled:
        trace.problems.append(f"{trace.recompiled} graphs are compiled again after warm-up")
    return trace
