"""What machine this is: its software and hardware, and how fast it multiplies."""

import json
import math
import os
import platform
import site
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch

from referee.cards import card_of
from referee.host import host_id
from referee.sources import ROOT

GEMMS = ((2048, 128, 512), (512, 768, 3072))  # (rows, in, out): the smallest track's, a large one
BF16_GAIN = 1.2  # bf16 is used on a CPU where it is at least so many times faster
UNKNOWN = "unknown CPU"
LOGGED_VARIABLES = ("CUDA_", "NCCL_", "TORCH", "PYTORCH_", "OMP_", "GOMP_", "KMP_", "MKL_", "DNNL_",
                    "ONEDNN_", "ATEN_", "LD_", "PYTHON", "SLURM_RESTART_COUNT")  # fmt: skip


def shell(*command: str) -> str:
    """Output of a command; empty if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=20, cwd=ROOT,
                              encoding="utf-8", errors="replace")  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def cpu_model() -> str:
    """The CPU's name; on ARM, where Linux has none, the numbers of its maker and part."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return shell("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor() or UNKNOWN
    facts = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)
    if facts.get("model name"):
        return facts["model name"]
    numbers = [facts[k] for k in ("CPU implementer", "CPU part", "CPU variant") if k in facts]
    return " ".join([platform.machine(), *numbers]) if numbers else UNKNOWN


def environment(on_gpu: bool) -> dict:
    """Software and hardware of this machine; the machine itself only as a salted hash."""
    entries = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "triton": getattr(sys.modules.get("triton"), "__version__", "none"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else "none",
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else "none",
        "os": platform.platform(),
        "host": host_id(),
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


def foreign_modules(sources) -> str:
    """Files of loaded modules that are neither these sources, by path, nor Python's or a package's.

    What compilers wrote into their caches counts only where Python would look for an import.
    """
    kinds = ("stdlib", "platstdlib", "purelib", "platlib")
    folders = [*map(sysconfig.get_path, kinds), *site.getsitepackages(), site.getusersitepackages()]
    caches = [os.environ.get("TORCHINDUCTOR_CACHE_DIR"), os.environ.get("TRITON_CACHE_DIR"),
              os.path.expanduser("~/.triton")]  # fmt: skip
    packages, written = (
        tuple(f"{os.path.realpath(folder)}{os.sep}" for folder in some if folder)
        for some in (folders, caches)
    )
    own = {os.path.realpath(ROOT / path) for path in sources}
    foreign, searched = set(), set(map(os.path.realpath, sys.path))
    for module in sys.modules.copy().values():
        path = getattr(module, "__dict__", {}).get("__file__") or ""
        real = os.path.realpath(path)
        is_cached = real.startswith(written) and os.path.dirname(real) not in searched
        if os.path.isabs(path) and not (real in own or real.startswith(packages) or is_cached):
            foreign.add(os.path.relpath(real, ROOT))
    return ", ".join(sorted(foreign)) or "none"


def mfu(flops_per_second: float, device_name: str, devices: int) -> str:
    """Share of the devices' dense bf16 peak; `unknown` for a device that is no known card."""
    card = card_of(device_name)
    return f"{flops_per_second / (card.bf16_tflops * 1e12 * devices):.4f}" if card else "unknown"


def calibration(device: torch.device, dtype: torch.dtype, synchronize) -> str:
    """Matmul and copy rate of the device now. They reveal a slow host; no time is rescaled."""
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


def bf16_gain() -> float:
    """How many times faster this CPU multiplies in bf16 than in fp32, at least, of all GEMMS."""
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


def contention(is_gpu: bool, cpu_share: float) -> str:
    """A warning for a process that got less CPU time than its threads asked for, or empty."""
    if is_gpu or cpu_share > 0.95:
        return ""
    return (
        f"other processes, or a virtual machine's host, took this CPU (cpu_share "
        f"{cpu_share:.2f}): the times of this run are not comparable; run again on a quiet one"
    )
