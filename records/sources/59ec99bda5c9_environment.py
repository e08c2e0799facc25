"""What a log says above its data: sources, configuration, git state, and what machine this is."""

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from flags import RunError, as_flag

ROOT = Path(__file__).resolve().parent
UNKNOWN = "unknown CPU"
SCHEMA = 2  # in 1 the hash left out the result line itself
PEAK_BF16_TFLOPS = {  # dense, from the makers' data sheets
    "A100": 312, "H100": 989, "H200": 989, "GH200": 989, "B200": 2250, "L40S": 362, "4090": 165,
}  # fmt: skip
# Words in a card's name by which its peak is another than that of the one above.
OTHER_KINDS = {"MIG", "Laptop", "NVL", "PCIe", "PCIE", "Max", "D"}
LOGGED_VARIABLES = ("CUDA_", "NCCL_", "TORCH", "PYTORCH_", "OMP_", "GOMP_", "KMP_", "MKL_")


def write_header(log, sources: dict[str, str], source_dir: str, config: dict, device: dict) -> None:
    """Write everything that stands above the data: sources, config, environment, git state.

    sources: text by path; config and device: one line per key.
    """
    for path, text in sources.items():
        text = text if text.endswith("\n") else f"{text}\n"
        lines, digest = text[:-1].split("\n"), hashlib.sha256(text.encode()).hexdigest()
        heading = f"source {path} lines:{len(lines)} sha256:{digest}"
        if source_dir:
            kept = keep_source(Path(source_dir, path), text)
            log.section(f"{heading} kept:{os.path.relpath(kept, log.path.parent)}")
        else:
            log.section(heading, lines)
    utc = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")  # it tells the order of runs
    config = {"schema": SCHEMA, "utc": utc, "argv": json.dumps(sys.argv[1:]), **config}
    log.section("config", [f"{key}: {as_flag(value)}" for key, value in config.items()])
    entries = {**device, **environment(on_gpu=torch.cuda.is_available())}
    log.section("environment", [f"{key}: {value}" for key, value in entries.items()])
    # A copy without .git that lies in another repository has no commit of its own.
    commit = (shell("git", "ls-files", *sources) and shell("git", "rev-parse", "HEAD")) or "none"
    changed = shell("git", "diff", "--relative", "--name-only", "HEAD", "--", *sources).split()
    diff = []
    if changed and not source_dir:
        diff = shell("git", "diff", "--relative", "HEAD", "--", *changed).splitlines()
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
    """The CPU's name; on ARM, where Linux has none, the numbers of its maker and part."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return shell("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor() or UNKNOWN
    facts = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)
    if facts.get("model name"):
        return facts["model name"]
    numbers = [facts[k] for k in ("CPU implementer", "CPU part", "CPU variant") if k in facts]
    return " ".join([platform.machine(), *numbers]) if numbers else UNKNOWN


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
    """Share of the devices' dense bf16 peak; `unknown` for one that PEAK_BF16_TFLOPS lacks."""
    words = device_name.replace("-", " ").split()
    known = PEAK_BF16_TFLOPS if not OTHER_KINDS.intersection(words) else {}
    peaks = [tflops for name, tflops in known.items() if name in words]
    return f"{flops_per_second / (peaks[-1] * 1e12 * devices):.4f}" if peaks else "unknown"


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


def contention(is_gpu: bool, cpu_share: float) -> str:
    """A warning for a process that got less CPU time than its threads asked for, or empty."""
    if is_gpu or cpu_share > 0.95:
        return ""
    return (
        f"other processes, or a virtual machine's host, took this CPU (cpu_share "
        f"{cpu_share:.2f}): the times of this run are not comparable; run again on a quiet one"
    )
