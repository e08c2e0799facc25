"""Time what fineweb runs by kernels: ./run.sh tools/benchmark_kernels.py

    --rows N     rows of 16,384 tokens (default: 1)
    --shrink     tiny sizes, on a CPU too: does the script work?

Each line: medians of two, timed in turns, and their ratio. The MLP by its kernel and by its
definition, the head in fp8 and bf16, attention in a window and in 2,560 tokens, Adam and a copy.
"""

import statistics
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project's root

import torch
import torch.nn.functional as F

import kernels
from kernels import Softcap, attend, attention_mask, head_loss, linear, relu_squared_mlp
from referee.ranks import Runtime
from tools.cli import finish, flag_parser
from train_gpt import TRACKS, Adam, Group

CAP = Softcap(23.0, 5.0, 7.5)
ROUNDS = 20


def milliseconds(function, rt: Runtime) -> float:
    rt.synchronize()
    start = time.perf_counter()
    function()
    rt.synchronize()
    return 1e3 * (time.perf_counter() - start)


def compare(name: str, rt: Runtime, **functions) -> None:
    """Time the functions in turns; print their medians, and the first's share of the second's."""
    times = {label: [] for label in functions}
    for turn in range(ROUNDS + 3):
        for label, function in functions.items():
            taken = milliseconds(function, rt)
            if turn >= 3:  # the first ones compile
                times[label].append(taken)
    medians = {label: statistics.median(taken) for label, taken in times.items()}
    first, second = list(medians.values())[:2]
    listed = ", ".join(f"{label} {ms:.3f} ms" for label, ms in medians.items())
    print(f"{name}: {listed}, ratio {first / second:.3f}", flush=True)


def both_ways(function, *inputs):
    """Forward and backward of a function of tensors."""

    def run():
        for t in inputs:
            t.grad = None
        function(*inputs).float().sum().backward()

    return run


def mlp(rt: Runtime, N: int, D: int, M: int) -> None:
    x, up, down = (torch.randn(*shape, device=rt.device, dtype=rt.matmul_dtype).requires_grad_()
                   for shape in ((N, D), (M, D), (M, D)))  # fmt: skip

    @torch.compile(dynamic=False)
    def definition(x, up, down):
        return linear(F.relu(linear(x, up, x.dtype)) ** 2, down.T, x.dtype)

    compare(f"MLP {N} x {D} x {M}", rt,
            kernel=both_ways(lambda *t: relu_squared_mlp(*t, rt.matmul_dtype), x, up, down),
            definition=both_ways(definition, x, up, down))  # fmt: skip


def head(rt: Runtime, N: int, D: int, V: int) -> None:
    x = F.rms_norm(torch.randn(N, D, device=rt.device), (D,)).to(rt.matmul_dtype).requires_grad_()
    weight = (0.1 * torch.randn(V, D, device=rt.device)).requires_grad_()
    targets, weights = torch.randint(V, (N, 2), device=rt.device), torch.ones(2, device=rt.device)

    def with_fp8(fp8: bool):
        loss = lambda x, W: head_loss(x, W, targets, weights, CAP, rt.matmul_dtype, fp8)  # noqa: E731
        return both_ways(loss, x, weight)

    compare(f"head {N} x {D} x {V}", rt, fp8=with_fp8(rt.has_fp8), bf16=with_fp8(False))


def attention(rt: Runtime, B: int, T: int, H: int, K: int, window: int) -> None:
    docs = (torch.rand(B, T, device=rt.device) < 1 / 600).cumsum(1)
    q, k, v = (torch.randn(B, H, T, K, device=rt.device, dtype=rt.stream_dtype).requires_grad_()
               for _ in range(3))  # fmt: skip
    options = kernels.flex_options(rt.shared_memory_bytes)

    @torch.compile(dynamic=False)
    def masked(q, k, v, at):
        return attend(q, k, v, attention_mask(docs, at, 2560), options)

    widths = {f"window_{w}": torch.tensor(w, device=rt.device) for w in (window, 2560)}
    compare(f"attention {B} x {T} x {H} x {K}", rt,
            **{name: both_ways(lambda *t, at=at: masked(*t, at), q, k, v)
               for name, at in widths.items()})  # fmt: skip


def table_update(rt: Runtime, rows: int, D: int) -> None:
    p = torch.randn(rows, D, device=rt.device).requires_grad_()
    grad = torch.randn_like(p)
    group = Group([p], 0.1, 0.025, 1, (0.75, 0.95))
    adam = Adam(group, TRACKS["fineweb"], rt, torch.compile)

    def update():
        p.grad = grad
        adam.start_exchange()
        adam.step(0)

    compare(f"Adam of a table {rows} x {D}", rt, update=update, copy=grad.clone)


def main() -> int:
    parser = flag_parser(__doc__)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--shrink", action="store_true")
    own = parser.parse_args()
    rt, hp = Runtime(), TRACKS["fineweb"]
    T, V, table = (256, 512, 1024) if own.shrink else (hp.seq_len, 50304, hp.bigram_rows)
    print(f"{rt.device_name}, torch {torch.__version__}, forward and backward")
    N = own.rows * T
    mlp(rt, N, hp.model_dim, hp.mlp_dim)
    head(rt, N, hp.model_dim, V)
    for window in (128, 384, 640):
        attention(rt, own.rows, T, hp.num_heads, hp.head_dim, window)
    table_update(rt, table, hp.model_dim)
    return 0


if __name__ == "__main__":
    finish(main)
