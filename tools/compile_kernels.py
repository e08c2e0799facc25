"""Compile each kernel that training launches, for a GPU that need not be here; none is used.

    ./run.sh tools/compile_kernels.py             H100, H200: compute capability 9.0
    ./run.sh tools/compile_kernels.py --arch 89   RTX 4090

Prints registers a thread, bytes a thread spills to memory, bytes of shared memory a program, as
ptxas and Triton report them. Exits 1 if a kernel spills or asks for more than the GPU has.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from types import SimpleNamespace

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels are not compiled

import bootstrap  # noqa: E402, F401
import torch  # noqa: E402

import kernels  # noqa: E402

SHARED_BYTES = {90: 232_448, 89: 101_376, 86: 101_376, 80: 166_912}  # most that a program gets
VOCAB, MODEL_DIM, MLP_DIM, TOKENS = 50304, 768, 3072, 131_072


class Compiler:
    """Stands for a kernel: what launches it compiles it, and adds a row to the table."""

    def __init__(self, kernel):
        self.kernel, self.rows = kernel, []

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            compiled = self.kernel.warmup(*arguments, grid=grid, **options)
            registers, spilled = resources(compiled.asm["ptx"])
            self.rows.append((registers, spilled, compiled.metadata.shared))

        return launch


def resources(ptx: str) -> tuple[int, int]:
    """(registers, bytes spilled) a thread, from the ptxas that comes with Triton."""
    from triton import knobs

    target = re.search(r"^\.target (\w+)", ptx, re.M)[1]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(ptx)
        source.flush()
        command = [knobs.nvidia.ptxas.path, "-v", "-arch", target, source.name, "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", report))
    return int(re.search(r"Used (\d+) registers", report)[1]), spilled


def stand_in(arch: int):
    """Make kernels compile for arch when they are launched, on tensors that hold no data."""
    from triton import runtime
    from triton.backends.compiler import GPUTarget

    runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", arch, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        )
    )
    properties = SimpleNamespace(shared_memory_per_block_optin=SHARED_BYTES[arch])
    torch.cuda.get_device_properties = lambda device: properties
    kernels.softcapped_loss_kernel = Compiler(kernels.softcapped_loss_kernel)
    kernels.relu_squared_kernel = Compiler(kernels.relu_squared_kernel)


def meta(*shape, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def compile_loss(num_targets: int, variant: str):
    rows, e5m2 = kernels.HEAD_CHUNK_TOKENS, torch.float8_e5m2
    logits = meta(rows, VOCAB)
    gradients = {
        "bf16 gradient": (logits, None),
        "fp8 gradient": (meta(rows, VOCAB, dtype=e5m2), meta(VOCAB, rows, dtype=e5m2)),
    }[variant]
    targets, weights = meta(rows, num_targets, dtype=torch.int64), meta(num_targets)
    cap = kernels.Softcap(23.0, 5.0, 7.5)
    kernels.loss_by_kernel(logits, targets, weights.float(), cap, *gradients)
    return kernels.softcapped_loss_kernel.rows[-1]


def compile_mlp(variant: str):
    post = {"forward": None, "backward": meta(TOKENS, MLP_DIM)}[variant]
    kernels.relu_squared(meta(TOKENS, MODEL_DIM), meta(MLP_DIM, MODEL_DIM), post)
    return kernels.relu_squared_kernel.rows[-1]


def table(arch: int):
    """Yield (kernel, variant, registers, bytes spilled, bytes of shared memory)."""
    for variant in ("bf16 gradient", "fp8 gradient") if arch >= 90 else ("bf16 gradient",):
        for num_targets in (1, 2, 3):
            row = compile_loss(num_targets, variant)
            yield "softcapped_loss", f"{variant}, {num_targets} targets", *row
    for variant in ("forward", "backward"):
        yield "relu_squared", variant, *compile_mlp(variant)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--arch", type=int, default=90, choices=SHARED_BYTES, help="compute capability x 10"
    )
    arch = parser.parse_args().arch
    if not kernels.HAS_TRITON:
        sys.exit("error: triton is not installed; run: pip install triton==3.7.1")
    stand_in(arch)
    line, bad = "{:<16} {:<24} {:>9} {:>8} {:>8}", 0
    print(line.format(f"sm_{arch}", "variant", "registers", "spilled", "shared"))
    for row in table(arch):
        print(line.format(*row), flush=True)
        bad += row[3] > 0 or row[4] > SHARED_BYTES[arch]
    if bad:
        sys.exit(f"error: {bad} of the kernels spill or do not fit; make their tiles smaller")


if __name__ == "__main__":
    main()
