"""An H100 that is not here: failures that preflight names, and kernels.py at its true sizes.

test_preflight.py runs this file in a process of its own, without conftest.py, because the card must
be installed before torch is imported.
"""

import os
import re
import sys
from functools import partial
from types import SimpleNamespace

from referee.cards import CARDS
from tools.fake_gpu import CACHE, install, load_guard

CARD = CARDS[os.environ.get("PREFLIGHT_CARD", "H100")]
install(CARD, load_guard())

import pytest  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

import kernels  # noqa: E402
from tools import preflight  # noqa: E402
from tools.cli import ToolError  # noqa: E402
from tools.dry_run import Recorder, Trace, recording  # noqa: E402
from train_gpt import GPT  # noqa: E402

VOCAB, MODEL_DIM, MLP_DIM, TOKENS = 50304, 768, 3072, 131_072
CHUNK_BYTES = 2 * kernels.HEAD_CHUNK_TOKENS * VOCAB  # bf16 logits
# One layer and one kind of step, whose rows are too few for eight cards.
SMALLEST = dict(seq_len=512, val_seq_len=512, val_tokens=1024, layers="S", value_layers="none",
                mix_at="none", bigram_rows=0, batch_tokens=1024,
                document_cap=896, window_tokens=384,
                short_window_tokens=128, mtp_weight=0)  # fmt: skip


# ------------------------------------------------------------------------------ Failures


@pytest.fixture
def lower(monkeypatch):
    """Call preflight's main without Triton and ptxas; return its exit code."""
    monkeypatch.setattr(preflight, "install", lambda card, library: None)

    def main(**changes) -> int:
        flags = [f"--{name}={value}" for name, value in {**SMALLEST, **changes}.items()]
        monkeypatch.setattr(sys, "argv", ["preflight.py", "--lower_only", "--rows=2", *flags])
        return preflight.main()

    return main


def test_a_graph_break_is_an_error(monkeypatch, lower):
    broken = lambda model, inputs_BT: torch._dynamo.graph_break()  # noqa: E731
    monkeypatch.setattr(GPT, "document_index", broken)
    told = r"^train_gpt.py on NVIDIA H100 .*torch.compile failed \(Call to `torch._dynamo.graph_b"
    with pytest.raises(ToolError, match=told) as error:
        lower()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, told",
    [
        (dict(seq_len=1000, batch_tokens=2000), "--seq_len and --val_seq_len must divide by 128"),
        (dict(num_heads=96), "embedding dimension of the query, key, and value must be at least"),
    ],
)
def test_sizes_that_a_kernel_cannot_take_are_an_error(lower, changes, told):
    with pytest.raises(ToolError, match=f"^train_gpt.py on NVIDIA H100 .*{told}"):
        lower(**changes)


@torch.library.custom_op("planted::cpu_only", mutates_args=(), device_types="cpu")
def cpu_only(x: Tensor) -> Tensor:
    return x.clone()


@cpu_only.register_fake
def _(x):
    return torch.empty(x.shape, dtype=torch.int64, device=x.device)  # the code returns int32


def test_planted_faults_are_each_named(monkeypatch, lower, capsys):
    index = GPT.document_index
    monkeypatch.setattr(GPT, "document_index", lambda model, inputs: cpu_only(index(model, inputs)))
    # Not an opaque operator any more, so that Inductor chooses the strides of its results.
    monkeypatch.setattr(kernels, "block_lists", kernels.block_lists._init_fn)
    assert lower() == 1
    printed = capsys.readouterr()
    assert "left out 8 cards: " in printed.err
    found = [line for line in printed.out.splitlines() if line.startswith("FAILURE")]
    lists = [line for line in found if "flex_attention" in line]
    assert len(lists) == 2, printed.out  # training and validation
    assert all("reads the block lists of another row: stride_kv_" in line for line in lists)
    others = sorted(set(found) - set(lists))
    assert len(others) == 2, printed.out
    assert "operator planted::cpu_only has no CUDA kernel" in others[0]
    assert "planted.cpu_only.default, result 0: its fake kernel returns ((2, 512), (5" in others[1]


# ------------------------------------------------------------------------------ Kernels


def recorded(*works, compile_kernels: bool = False) -> Trace:
    """The record of each of works(), called on tensors without data."""
    trace = Trace()
    recorder = Recorder(CARD, trace, compile_kernels, keys=None, tell=lambda text: None)
    recorder.keys, recorder.run = lambda step: 0, SimpleNamespace(step=0)
    with recording(recorder), FakeTensorMode(allow_non_fake_inputs=True), recorder:
        for work in works:
            work()
        recorder.finish_compiling()
    return trace


def on_card(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def head(chunks: int, num_targets: int, fp8: bool) -> None:
    N = chunks * kernels.HEAD_CHUNK_TOKENS
    x, weight = on_card(N, MODEL_DIM), on_card(VOCAB, MODEL_DIM, dtype=torch.float32)
    targets, weights = on_card(N, num_targets, dtype=torch.int64), on_card(num_targets)
    cap = kernels.Softcap(23.0, 5.0, 7.5)
    kernels.head_loss(x, weight, targets, weights.float(), cap, x.dtype, fp8)


def mlp() -> None:
    x, weight, post = (on_card(TOKENS, MODEL_DIM), on_card(MLP_DIM, MODEL_DIM),
                       on_card(TOKENS, MLP_DIM))  # fmt: skip
    kernels.relu_squared(x, weight)
    kernels.relu_squared(x, weight, post)


def test_bytes_are_those_that_operators_read_and_write():
    recorder = Recorder(CARD, Trace(), False, keys=None, tell=lambda text: None)
    with FakeTensorMode(), recorder:
        a, b, out = on_card(64, 32), on_card(32, 16), on_card(64, 16)
        table, index, rows = on_card(1000, 8), on_card(5, dtype=torch.int64), on_card(5, 8)
        torch.mm(a, b, out=out)
        out.add_(out.clone())
        out.copy_(out.clone())
        out.zero_()
        table[index]
        table.index_put_((index,), rows, accumulate=True)
    mm = 2 * (64 * 32 + 32 * 16 + 64 * 16)
    clone = 2 * (2 * 64 * 16)
    assert [launch.moved_bytes for launch in recorder.launches] == [
        mm, clone, clone * 3 // 2, clone, clone, clone // 2, 2 * 2 * 40 + 5 * 8, 3 * 2 * 40 + 5 * 8
    ]  # fmt: skip


@pytest.mark.parametrize("fp8", [False, True])
def test_the_head_keeps_one_chunk_of_logits(fp8):
    one, three = (recorded(partial(head, chunks, 1, fp8)).peak_bytes for chunks in (1, 3))
    assert one > CHUNK_BYTES
    assert three - one < CHUNK_BYTES / 2  # x, dx, a second dW


def test_own_kernels_at_their_true_sizes_fit_without_spills():
    heads = [partial(head, 1, num_targets, fp8) for num_targets, fp8 in ((1, False), (3, True))]
    trace = recorded(*heads, mlp, compile_kernels=True)
    found = [kernel for configs in trace.kernels.values() for kernel in configs]
    assert not trace.problems and len(found) == 5
    for kernel in found:
        assert kernel.spilled_bytes == 0 and 16 <= kernel.registers < 256
        assert kernel.shared_bytes <= 227 << 10
    products = [path.read_text() for path in CACHE.rglob("relu_squared_tma_kernel.ptx")]
    assert products and all("wgmma.mma_async" in ptx and "tensormap" in ptx for ptx in products)


def attention() -> None:
    """Forward and backward, with the options that training takes on this card."""

    @torch.compile(dynamic=False, fullgraph=True)
    def attend(q, k, v, docs, window):
        mask = kernels.attention_mask(docs, window, 2560)
        return kernels.attend(q, k, v, mask, kernels.flex_options(CARD.shared_bytes))

    q, k, v = (on_card(1, 6, 2048, 128).requires_grad_() for _ in range(3))
    docs, window = (on_card(*size, dtype=torch.int32) for size in ((1, 2048), ()))
    y = attend(q, k, v, docs, window)
    y.backward(torch.empty_like(y))


def test_attention_and_mlp_fit_each_card():
    trace = recorded(attention, mlp, compile_kernels=True)
    names = " ".join(k.name for configs in trace.kernels.values() for k in configs)
    assert not trace.problems and "flex_attention_backward" in names and "relu_squared" in names


@pytest.mark.parametrize(
    "setting, value, told",
    [
        ("num_warps", 4, r"spills \d+ B per thread"),  # half as many threads hold all sums
        ("num_stages", 8, r"needs 426\d\d\d B of shared memory, NVIDIA H100 80GB HBM3 has 232448"),
    ],
)
def test_a_tile_that_does_not_fit_is_named(monkeypatch, setting, value, told):
    monkeypatch.setitem(kernels.TMA_TILE, setting, value)
    problems = recorded(mlp, compile_kernels=True).problems
    told = f"kernel relu_squared_tma_kernel: {told}"
    assert any(re.fullmatch(told, problem) for problem in problems), problems
