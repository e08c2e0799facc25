"""Mocks of a GPU, for tracing and compiling on a machine that has none.

    library = load_guard()           before torch is imported
    install(CARDS["H100"], library)  before the trainer is imported

Dynamo, AOTAutograd, Inductor and Triton then work as on that card, down to ptxas, on tensors that
hold no data (FakeTensorMode). Each mock has its reason beside it. For torch 2.11 to 2.13 on Linux,
with or without CUDA.
"""

import ast
import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

from referee.cards import Card
from tools.cli import ToolError

TESTED = ("2.11", "2.12", "2.13")
COMPILED_FOR = ("H100", "H200", "A100", "4090")  # keys of CARDS
GUARD = Path(__file__).with_name("fake_gpu.cpp")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "photofinish")


def check_machine() -> None:
    """ToolError if this machine cannot compile for a GPU."""
    if sys.platform != "linux":
        raise ToolError("Triton compiles on Linux only; run in a container: docs/gpus.md")
    if importlib.util.find_spec("triton") is None:
        raise ToolError("triton is missing: torch's CPU build comes without it; run: "
                        f"{sys.executable} -m pip install triton==3.7.1")  # fmt: skip
    for compiler in ("g++", "gcc"):
        if not shutil.which(compiler):
            raise ToolError(f"torch.compile needs {compiler}; run: apt install g++")
    if numbers(release := torch_release()) < numbers(TESTED[0]):
        raise ToolError(f"torch {release} is too old; run: {sys.executable} -m pip install "
                        "torch==2.13.0")  # fmt: skip


def numbers(release: str) -> tuple[int, ...]:
    return tuple(map(int, release.split(".")))


def torch_release() -> str:
    """Major and minor version, such as 2.13."""
    try:
        return ".".join(version("torch").split(".")[:2])
    except PackageNotFoundError:
        raise ToolError("torch is not installed; run: ./run.sh test --collect-only") from None


def load_guard() -> ctypes.CDLL:
    """Load fake_gpu.cpp, built once per version of torch."""
    torch_root = Path(importlib.util.find_spec("torch").origin).parent
    digest = hashlib.sha256(GUARD.read_bytes() + version("torch").encode()).hexdigest()
    library = CACHE / f"fake_gpu-{digest[:12]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        include = torch_root / "include"
        done = subprocess.run(
            ["g++", "-O1", "-shared", "-fPIC", "-std=c++20", f"-I{include}",
             f"-I{include}/torch/csrc/api/include", GUARD, "-o", unfinished,
             f"-L{torch_root}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_root}/lib"],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise ToolError(f"g++ could not build {GUARD.name} against torch {version('torch')}:\n"
                            f"{done.stderr.strip()[-1000:]}")  # fmt: skip
        unfinished.rename(library)
    return ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def mock(owner, name: str, value) -> None:
    getattr(owner, name)  # AttributeError if this version of torch has no such attribute
    setattr(owner, name, value)


def returns(value):
    """A new function per call, because Dynamo's tables tell functions apart by identity."""
    return lambda *args, **kwargs: value


@contextmanager
def quiet():
    """Drop what Python and C++ write to stderr."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def install(card: Card, library: ctypes.CDLL, interpret: bool = False) -> None:
    """Make torch and Triton see the card; call it before torch is imported.

    interpret: Triton interprets kernels instead of compiling them.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # ignore a real card
    os.environ["TRITON_INTERPRET"] = str(int(interpret))
    # Worker processes of Inductor would lack the mocks; its caches would mix in a real card.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    os.environ["TORCHINDUCTOR_FX_GRAPH_CACHE"] = os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"
    os.environ["TORCHINDUCTOR_USE_STATIC_CUDA_LAUNCHER"] = "0"  # it drops what ptxas made
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(CACHE / "preflight" / "inductor")
    os.environ["TRITON_CACHE_DIR"] = str(CACHE / "preflight" / "triton")
    with quiet():  # a CUDA build warns that its hooks are skipped
        import torch
    import torch._dynamo
    import torch._inductor.compile_fx  # before the mocks: it tabulates torch.cuda's functions

    library.install_guard()
    mock_cuda(torch, card)
    mock_tensors(torch)
    mock_inductor(torch, card)
    mock_triton(torch, card)


def mock_cuda(torch, card: Card) -> None:
    """torch.cuda's answers: there is no driver to ask."""
    from torch._dynamo.device_interface import CudaInterface

    threads = 2048 if card.capability in ((8, 0), (9, 0)) else 1536
    properties = SimpleNamespace(
        name=card.name, major=card.capability[0], minor=card.capability[1], gcnArchName=card.name,
        total_memory=card.memory_bytes, multi_processor_count=card.processors,
        shared_memory_per_block=49152, shared_memory_per_block_optin=card.shared_bytes,
        shared_memory_per_multiprocessor=card.shared_bytes + 1024, regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=threads, max_threads_per_block=1024, warp_size=32,
    )  # fmt: skip
    answers = {
        "is_available": True, "_is_compiled": True, "is_initialized": True, "device_count": 1,
        "current_device": 0, "is_current_stream_capturing": False, "is_bf16_supported": True,
        "is_tf32_supported": True, "get_device_capability": card.capability,
        "get_device_properties": properties, "get_device_name": card.name,
        "get_arch_list": ["sm_{}{}".format(*card.capability)], "memory_allocated": 0,
        "max_memory_allocated": 0, "memory_reserved": 0, "_exchange_device": 0,
        "_maybe_exchange_device": 0,
    }  # fmt: skip
    answers |= dict.fromkeys(
        ("init", "_lazy_init", "_lazy_call", "synchronize", "reset_peak_memory_stats",
         "empty_cache", "manual_seed", "manual_seed_all", "set_rng_state", "set_device")
    )  # fmt: skip
    for name, answer in answers.items():
        mock(torch.cuda, name, returns(answer))
    stream = SimpleNamespace(cuda_stream=0, stream_id=0, device_index=0, device_type=1,
                             device=torch.device("cuda", 0), synchronize=returns(None),
                             wait_stream=returns(None), wait_event=returns(None))  # fmt: skip
    mock(torch.cuda, "current_stream", returns(stream))
    # Dynamo saves the generator's state.
    mock(torch.cuda, "get_rng_state", lambda device=0: torch.zeros(16, dtype=torch.uint8))
    interface = ("current_device", "set_device", "device_count", "synchronize", "is_available",
                 "get_device_properties", "current_stream", "is_bf16_supported")  # fmt: skip
    for name in interface:
        mock(CudaInterface, name, staticmethod(getattr(torch.cuda, name)))
    for name in ("exchange_device", "maybe_exchange_device", "get_raw_stream"):
        mock(CudaInterface, name, staticmethod(returns(0)))
    for name in ("_cuda_getCurrentRawStream", "_cuda_getDevice", "_cuda_setDevice"):
        setattr(torch._C, name, returns(0))  # a CPU build has none of them
    torch._C._ensureCUDADeviceGuardSet = returns(None)  # would put a CUDA build's guard back
    torch.version.cuda = torch.version.cuda or "13.0"  # Inductor chooses features by it


def mock_tensors(torch) -> None:
    """Functions that would touch the memory of tensors, which have none."""
    import torch._C._dynamo.guards as guards
    import torch._subclasses.fake_tensor as fake_tensor

    def empty(device):
        def allocate(size, stride, dtype):
            return torch.empty_strided(size, stride, dtype=dtype, device=device)

        return allocate

    def reinterpret(tensor, size, stride, offset=0):
        return torch.as_strided(tensor, size, stride, tensor.storage_offset() + offset)

    # Generated code calls these in C++, where FakeTensorMode does not see them.
    mock(guards, "_empty_strided_cuda", empty("cuda:0"))
    mock(guards, "_empty_strided_cpu", empty("cpu"))
    mock(guards, "_reinterpret_tensor", reinterpret)
    mock(guards, "assert_alignment", returns(None))  # there is no address
    mock(fake_tensor, "init_gpu_context", returns(None))
    # Else a CUDA build would start the driver.
    mock(fake_tensor.FakeTensorMode, "avoid_device_init", property(returns(True)))
    mock(fake_tensor.FakeTensor, "item", returns(0.0))  # there is no value

    class Generator(torch.Generator):
        def __new__(cls, device="cpu"):
            return super().__new__(cls, "cpu")

    def to_empty(module, *, device, recurse=True):
        for part in module.modules():
            for name, p in part._parameters.items():
                empty = torch.empty_like(p, device=device)
                part._parameters[name] = torch.nn.Parameter(empty, p.requires_grad)
        return module

    sdpa = torch.nn.functional.scaled_dot_product_attention

    def flash_where_it_can(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
        if attn_mask is not None or q.dtype.itemsize != 2 or not q.is_cuda:
            return sdpa(q, k, v, attn_mask, dropout_p, is_causal, **options)
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(q, k, v, dropout_p, is_causal, scale=options.get("scale"))[0]

    # The original asks the driver which of its kernels can run.
    mock(torch.nn.functional, "scaled_dot_product_attention", flash_where_it_can)
    mock(torch, "Generator", Generator)  # a CPU build has none for CUDA
    mock(torch.nn.Module, "to_empty", to_empty)  # the original swaps tensors, fake ones cannot


def mock_inductor(torch, card: Card) -> None:
    """What Inductor would ask the device, measure or compute on it."""
    from torch._inductor import compile_fx, constant_folding, output_code, utils
    from torch._inductor.fx_passes import joint_graph, pad_mm

    for module in (utils, compile_fx):  # these two look at addresses
        mock(module, "copy_misaligned_inputs", returns(([], [])))
    for module in (utils, compile_fx, output_code):
        mock(module, "align_inputs_from_check_idxs", lambda model, *args, **kwargs: model)
    mock(pad_mm, "_should_pad", returns(False))  # the original times products on the GPU
    mock(utils, "get_device_tflops", returns(card.bf16_tflops))
    mock(utils, "get_gpu_dram_gbps", returns(card.memory_gb_per_s))
    # Constants are computed on the graph's device.
    for folder in (joint_graph.UniformValueConstantFolder, constant_folding.ConstantFolder):
        mock(folder, "_deduce_value", on_cpu(torch, folder._deduce_value))


def on_cpu(torch, function):
    """function, with a CPU in place of the GPU as the device of every operator."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_map_only

    class OnCPU(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            cpu = lambda device: torch.device("cpu")  # noqa: E731
            args, kwargs = tree_map_only(torch.device, cpu, (args, kwargs or {}))
            return func(*args, **kwargs)

    def on_cpu_function(*args, **kwargs):
        with OnCPU():
            return function(*args, **kwargs)

    return on_cpu_function


def mock_triton(torch, card: Card) -> None:
    """Triton's driver, which names the card to compile for."""
    import torch._inductor.runtime.triton_helpers as triton_helpers
    import triton
    from triton.backends.compiler import GPUTarget

    major, minor = card.capability
    limits = dict(max_shared_mem=card.shared_bytes, multiprocessor_count=card.processors,
                  max_num_regs=65536, warpSize=32)  # fmt: skip
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 10 * major + minor, 32),
        get_current_device=returns(0), get_current_stream=returns(0),
        set_current_device=returns(None), get_benchmarker=returns(None),
        get_device_interface=lambda: torch.cuda,
        get_active_torch_device=lambda: torch.device("cuda", 0),
        utils=SimpleNamespace(get_device_properties=returns(limits)),
    )  # fmt: skip
    triton.runtime.driver.set_active(driver)
    mock(triton_helpers, "set_driver_to_gpu", returns(None))  # it looks for a real driver
    parse, lock = ast.parse, threading.RLock()

    def parse_alone(*args, **kwargs):
        with lock:
            return parse(*args, **kwargs)

    # Kernels compile in threads; CPython 3.11 counts an AST's depth wrong across threads.
    mock(ast, "parse", parse_alone)
