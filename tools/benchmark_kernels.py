"""Time the kernels of the fineweb track: ./run.sh tools/benchmark_kernels.py

Prints median times, each also as a multiple of the line's last: the MLP by its kernel and by its
definition, the head in fp8 and in bf16, attention by window, Adam's update of a table and a copy
of its gradient. All but Adam with the backward pass.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project's root
    from referee.start import finish

from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer

import kernels
from referee.ranks import Runtime
from tools.cli import flag_parser
from train_gpt import TRACKS, Adam, Group

HP, CAP, WINDOWS = TRACKS["fineweb"], kernels.Softcap(23.0, 5.0, 7.5), (128, 384, 640, 2560)


def milliseconds(function, inputs: list) -> float:
    def run():
        y = function(*inputs)
        if y is not None and y.requires_grad:
            y.float().sum().backward()

    if torch.cuda.is_available():
        from triton.testing import do_bench

        return do_bench(run, rep=500, grad_to_none=inputs, return_mode="median")
    return 1e3 * Timer("run()", globals={"run": run}).timeit(3).median


def compare(name: str, inputs: list, **functions) -> None:
    times = {label: milliseconds(function, inputs) for label, function in functions.items()}
    *_, last = times.values()
    listed = ", ".join(f"{label} {ms:.3f} ms ({ms / last:.3f})" for label, ms in times.items())
    print(f"{name}: {listed}", flush=True)


def mlp(randn, N: int, dtype: torch.dtype) -> None:
    @torch.compile(dynamic=False)
    def definition(x, up, down):
        return kernels.linear(F.relu(kernels.linear(x, up, dtype)) ** 2, down.T, dtype)

    inputs = [randn(size, HP.model_dim, dtype=dtype) for size in (N, HP.mlp_dim, HP.mlp_dim)]
    kernel = partial(kernels.relu_squared_mlp, dtype=dtype)
    compare("MLP", inputs, kernel=kernel, definition=definition)


def head(randn, N: int, V: int, rt: Runtime) -> None:
    targets, weights = torch.randint(V, (N, 2), device=rt.device), torch.ones(2, device=rt.device)

    def loss(x, weight, fp8: bool):
        return kernels.head_loss(x, weight, targets, weights, CAP, rt.matmul_dtype, fp8)

    inputs = [randn(N, HP.model_dim, dtype=rt.matmul_dtype), randn(V, HP.model_dim)]
    inputs[1].data.mul_(0.1)
    compare("head", inputs, fp8=partial(loss, fp8=rt.has_fp8), bf16=partial(loss, fp8=False))


def attention(randn, B: int, T: int, rt: Runtime) -> None:
    docs = (torch.rand(B, T, device=rt.device) < 1 / 600).cumsum(1)
    options = kernels.flex_options(rt.shared_memory_bytes)

    @torch.compile(dynamic=False)
    def attend(q, k, v, window):
        mask = kernels.attention_mask(docs, window, max(WINDOWS))
        return kernels.attend(q, k, v, mask, options)

    inputs = [randn(B, HP.num_heads, T, HP.head_dim, dtype=rt.stream_dtype) for _ in range(3)]
    windows = {f"window_{w}": torch.tensor(w, device=rt.device) for w in WINDOWS}
    compare("attention", inputs, **{k: partial(attend, window=w) for k, w in windows.items()})


def table_update(randn, rows: int, rt: Runtime) -> None:
    p = randn(rows, HP.model_dim)
    grad = torch.randn_like(p)
    group = Group([p], 0.1, 0.025, 1, (0.75, 0.95))
    adam = Adam(group, TRACKS["fineweb"], rt, torch.compile)

    def update(p):
        p.grad = grad
        adam.start_exchange()
        adam.step(0)

    compare(f"Adam of {rows} rows", [p], update=update, copy=lambda p: grad.clone())


def main() -> int:
    parser = flag_parser(__doc__)
    parser.add_argument("--rows", type=int, default=1, help="rows of 16,384 tokens (default: 1)")
    parser.add_argument("--shrink", action="store_true", help="tiny sizes: does the script work?")
    own, rt = parser.parse_args(), Runtime()
    if own.rows < 1:
        parser.error("--rows must be at least 1")
    T, V, table_rows = (256, 512, 1024) if own.shrink else (HP.seq_len, 50304, HP.bigram_rows)
    print(f"{rt.device_name}, torch {torch.__version__}: {own.rows} x {T} tokens, vocabulary {V}")
    randn = partial(torch.randn, device=rt.device, requires_grad=True)
    mlp(randn, own.rows * T, rt.matmul_dtype)
    head(randn, own.rows * T, V, rt)
    attention(randn, own.rows, T, rt)
    table_update(randn, table_rows, rt)
    return 0


if __name__ == "__main__":
    finish(main)
