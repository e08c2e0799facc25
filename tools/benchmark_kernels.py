"""Time what cannot be decided without a GPU: ./run.sh tools/benchmark_kernels.py

Prints median times, each also as a multiple of the line's first, which is what training uses: the
loss kernel by tile, the MLP with its backward pass by tile and as plain torch, products of a step,
attention by options, gradients of a table in fp32 and bf16, the head in fp8 and bf16.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project's root
    from referee.start import finish

from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer

import kernels
from referee.ranks import Runtime
from tools.cli import flag_parser
from train_gpt import TRACKS

HP, CAP, WINDOWS = TRACKS["fineweb"], kernels.Softcap(23.0, 5.0, 7.5), (128, 384, 640, 2560)
OPTIONS = (
    {},
    {"ROWS_GUARANTEED_SAFE": True},
    {"USE_TMA": True},
    {"bwd_num_stages": 2},
    {"bwd_BLOCK_M1": 64, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 64},
)


def milliseconds(function, inputs: list) -> float:
    def run():
        y = function(*inputs)
        if y is not None and y.requires_grad:
            y.float().sum().backward()

    if torch.cuda.is_available():
        from triton.testing import do_bench

        return do_bench(run, rep=100, grad_to_none=inputs, return_mode="median")
    return 1e3 * Timer("run()", globals={"run": run}).timeit(3).median


def compare(name: str, inputs: list, functions: dict) -> None:
    """Time functions by label; name those that fail, such as a tile that does not fit."""
    first = None
    for label, function in functions.items():
        try:
            ms = milliseconds(function, inputs)
        except Exception as error:
            print(f"{name} {label}: {type(error).__name__}: {str(error).strip():.80}", flush=True)
            continue
        first = first or ms
        print(f"{name} {label}: {ms:.3f} ms ({ms / first:.3f})", flush=True)


def with_tile(tile: str, changes: dict, function):
    """function and its backward pass with another tile of kernels.py."""

    def changed(*inputs):
        with patch.dict(getattr(kernels, tile), changes):
            function(*inputs).float().sum().backward()

    return changed


def mlp(randn, N: int, dtype: torch.dtype) -> None:
    def definition(x, up, down):
        return kernels.linear(F.relu(kernels.linear(x, up, dtype)) ** 2, down.T, dtype)

    inputs = [randn(size, HP.model_dim, dtype=dtype) for size in (N, HP.mlp_dim, HP.mlp_dim)]
    kernel = partial(kernels.relu_squared_mlp, dtype=dtype)
    tiles = {}, dict(num_stages=3), dict(BLOCK_M=128), dict(BLOCK_M=128, num_warps=4)
    functions = {str(tile): with_tile("TMA_TILE", tile, kernel) for tile in tiles}
    compare("MLP", inputs, functions | {"torch": torch.compile(definition, dynamic=False)})


def head(randn, N: int, V: int, rt: Runtime) -> None:
    targets, weights = torch.randint(V, (N, 2), device=rt.device), torch.ones(2, device=rt.device)

    def loss(x, weight, fp8: bool = rt.has_fp8):
        return kernels.head_loss(x, weight, targets, weights, CAP, rt.matmul_dtype, fp8)

    inputs = [randn(N, HP.model_dim, dtype=rt.matmul_dtype), randn(V, HP.model_dim)]
    inputs[1].data.mul_(0.1)
    tiles = [dict(COLS=4096, num_warps=w) for w in (16, 8, 32)] + [dict(COLS=1024, num_warps=4)]
    functions = {str(tile): with_tile("LOSS_TILE", tile, loss) for tile in tiles}
    compare("head", inputs, functions | {"bf16": partial(loss, fp8=False)})


def products(randn, N: int, V: int, rt: Runtime) -> None:
    """cuBLAS: a layer's products and their gradients, and the head's logits."""
    D, M = HP.model_dim, HP.mlp_dim
    for n, k, m in ((N, D, 3 * D), (N, D, D), (N, M, D), (M, N, D), (3 * D, N, D), (D, N, D),
                    (N, 3 * D, D), (min(N, kernels.HEAD_CHUNK_TOKENS), D, V)):  # fmt: skip
        a, b = (torch.randn(s, device=rt.device).to(rt.matmul_dtype) for s in ((n, k), (k, m)))
        compare(f"{n}x{k} {k}x{m}", [a, b], {"mm": torch.mm})


def attention(randn, B: int, T: int, rt: Runtime) -> None:
    docs = (torch.rand(B, T, device=rt.device) < 1 / 600).cumsum(1)
    own = kernels.flex_options(rt.shared_memory_bytes) or {}

    def attend(q, k, v, window, options):
        mask = kernels.attention_mask(docs, window, max(WINDOWS))
        return kernels.attend(q, k, v, mask, options)

    inputs = [randn(B, HP.num_heads, T, HP.head_dim, dtype=rt.stream_dtype) for _ in range(3)]
    compiled = [torch.compile(partial(attend, options=own | o), dynamic=False) for o in OPTIONS]
    for window in WINDOWS:
        at = torch.tensor(window, device=rt.device)
        functions = {str(o): partial(f, window=at) for o, f in zip(OPTIONS, compiled, strict=True)}
        compare(f"attention, window {window}", inputs, functions)


def table_gradient(randn, rows: int, N: int, rt: Runtime) -> None:
    index = torch.randint(rows, (N,), device=rt.device)
    gradient = torch.randn(N, HP.model_dim, device=rt.device, dtype=rt.stream_dtype)

    def added(gradient, dtype):
        zeros = torch.zeros(rows, HP.model_dim, device=rt.device, dtype=dtype)
        return zeros.index_put((index,), gradient.to(dtype), accumulate=True).to(rt.stream_dtype)

    add = torch.compile(added, dynamic=False)
    dtypes = torch.float32, torch.bfloat16
    compare("table", [gradient], {str(d): partial(add, dtype=d) for d in dtypes})


def main() -> int:
    parser = flag_parser(__doc__)
    parser.add_argument("--rows", type=int, default=8, help="rows of 16,384 tokens (default: 8)")
    parser.add_argument("--shrink", action="store_true", help="tiny sizes: does the script work?")
    own, rt = parser.parse_args(), Runtime()
    if own.rows < 1:
        parser.error("--rows must be at least 1")
    T, V, table_rows = (256, 512, 1024) if own.shrink else (HP.seq_len, 50304, HP.bigram_rows)
    print(f"{rt.device_name}, torch {torch.__version__}: {own.rows} x {T} tokens, vocabulary {V}")
    randn, N = partial(torch.randn, device=rt.device, requires_grad=True), own.rows * T
    head(randn, N, V, rt)
    mlp(randn, N, rt.matmul_dtype)
    products(randn, N, V, rt)
    attention(randn, own.rows, T, rt)
    table_gradient(randn, table_rows, N, rt)
    return 0


if __name__ == "__main__":
    finish(main)
