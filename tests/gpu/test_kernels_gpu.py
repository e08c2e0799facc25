"""The kernels at the sizes of training: run with `python -m pytest tests/gpu` on a GPU machine."""

import pytest
import torch
import torch.nn.functional as F
from interpreted_kernels import CAP, exact_gradient, exact_loss, relative_error

import kernels
from kernels import HEAD_CHUNK_TOKENS, head_loss, loss_by_kernel, relu_squared_mlp, softcapped_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="needs compute capability 9.0",
)
V, D, M = 50304, 768, 3072
WEIGHTS = [1.0, 0.5, 0.25]


@pytest.fixture(autouse=True)
def on_the_gpu():
    torch.manual_seed(0)
    with torch.device("cuda"):
        yield


def targets_and_weights(N: int, J: int):
    return torch.randint(-1, V, (N, J)), torch.tensor(WEIGHTS[:J])


def head_inputs(N: int):
    """Like the end of training: a normalised stream, logits that spread by a few units."""
    x = F.rms_norm(torch.randn(N, D), (D,)).bfloat16().requires_grad_()
    return x, (0.1 * torch.randn(V, D)).requires_grad_()


@pytest.mark.parametrize("J", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loss_and_gradient_equal_fp64(dtype, J):
    logits = (6 * torch.randn(513, V)).to(dtype)
    targets, weights = targets_and_weights(513, J)
    loss, gradient = exact_loss(logits, targets, weights), exact_gradient(logits, targets, weights)
    found = loss_by_kernel(logits, targets, weights, CAP)
    assert torch.allclose(found.double(), loss, rtol=1e-3, atol=1e-3)  # tanh in 11 bits
    assert relative_error(logits, gradient) < (1e-3 if dtype == torch.float32 else 2**-8)


@hopper
@pytest.mark.parametrize("N", [97, 128])
def test_gradient_in_fp8_is_rounded_to_nearest_and_transposed_exactly(N):
    logits = (6 * torch.randn(N, V)).bfloat16()
    targets, weights = targets_and_weights(N, 2)
    expected = 448 / 0.75 * exact_gradient(logits, targets, weights)
    found = torch.empty(N, V, dtype=torch.float8_e5m2)
    loss_by_kernel(logits, targets, weights, CAP, 448 / 0.75, found)
    # 2 bits after the first, down to 2**-16; a little more for the sigmoid's 11 bits.
    assert torch.allclose(found.double(), expected, rtol=2**-3 + 2**-10, atol=2**-17 + 1e-6)
    assert torch.equal(kernels.transposed(found).view(torch.uint8), found.view(torch.uint8).T)


def test_rows_past_32_bits_are_right():
    N = 43_008  # in bf16 4.3 GB
    logits = torch.randn(N, V, dtype=torch.bfloat16)
    targets, weights = targets_and_weights(N, 1)
    last = slice(N - 64, N)
    loss = exact_loss(logits[last], targets[last], weights)
    gradient = exact_gradient(logits[last], targets[last], weights)
    found = loss_by_kernel(logits, targets, weights, CAP)
    assert torch.allclose(found[last].double(), loss, rtol=1e-3, atol=1e-3)
    assert relative_error(logits[last], gradient) < 2**-8


@pytest.mark.parametrize("N", [1, 1000, 2085])
def test_head_loss_in_bf16_is_near_fp32_products_of_the_rounded_operands(monkeypatch, N):
    monkeypatch.setattr(kernels, "HEAD_CHUNK_TOKENS", 1024)
    x, weight = head_inputs(N)
    targets, weights = targets_and_weights(N, 2)
    loss = head_loss(x, weight, targets, weights, CAP, torch.bfloat16, fp8=False)
    found = torch.autograd.grad(loss, (x, weight))
    logits = F.linear(x.float(), weight.bfloat16().float())
    expected = softcapped_loss(logits, targets, weights, CAP).mean()
    gradients = torch.autograd.grad(expected, (x, weight))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    for f, e in zip(found, gradients, strict=True):
        assert relative_error(f, e.double()) < 0.01


@hopper
def test_head_loss_in_fp8_is_near_bf16():
    x, weight = head_inputs(HEAD_CHUNK_TOKENS + 128)
    targets, weights = targets_and_weights(len(x), 2)
    losses, gradients = [], []
    for fp8 in (False, True):
        losses.append(head_loss(x, weight, targets, weights, CAP, torch.bfloat16, fp8))
        gradients.append(torch.autograd.grad(losses[-1], (x, weight)))
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=2e-3)
    for bf16, fp8 in zip(*gradients, strict=True):
        assert relative_error(fp8, bf16.double()) < 0.1


def test_head_loss_takes_less_memory_than_its_logits():
    x, weight = head_inputs(4 * HEAD_CHUNK_TOKENS)
    targets, weights = targets_and_weights(len(x), 2)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    head_loss(x, weight, targets, weights, CAP, torch.bfloat16, fp8=False).backward()
    assert torch.cuda.max_memory_allocated() - before < len(x) * V * 2 / 2


@pytest.mark.parametrize(
    "N, D, M", [(8192, D, M), (8192, D + 4, M), (1, 64, 129), (333, 104, 1000)]
)
def test_mlp_and_its_gradients_are_as_near_to_fp64_as_plain_torch(N, D, M):
    x = torch.randn(N, D).bfloat16().requires_grad_()
    up, down = ((torch.randn(M, D) / D**0.5).bfloat16().requires_grad_() for _ in range(2))
    dy = torch.randn(N, D).bfloat16()
    y = relu_squared_mlp(x, up, down, torch.bfloat16)
    found = torch.autograd.grad(y, (x, up, down), dy)
    exact = [t.detach().double().requires_grad_() for t in (x, up, down)]
    expected = F.relu(exact[0] @ exact[1].T) ** 2 @ exact[2]
    gradients = torch.autograd.grad(expected, exact, dy.double())
    for f, e in zip((y, *found), (expected, *gradients), strict=True):
        assert relative_error(f, e) < 0.01


@pytest.mark.parametrize("fp8", [False, pytest.param(True, marks=hopper)])
def test_compiled_step_equals_eager(fp8):
    x, weight = head_inputs(2048)
    up, down = ((torch.randn(M, D) / D**0.5).bfloat16().requires_grad_() for _ in range(2))
    targets, weights = targets_and_weights(len(x), 2)

    def step(x, up, down, weight):
        y = F.rms_norm(relu_squared_mlp(x, up, down, torch.bfloat16), (D,))
        return head_loss(y, weight, targets, weights, CAP, torch.bfloat16, fp8)

    inputs = (x, up, down, weight)
    losses = step(*inputs), torch.compile(step, fullgraph=True)(*inputs)
    eager, compiled = (torch.autograd.grad(loss, inputs) for loss in losses)
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-3)
    for e, c in zip(eager, compiled, strict=True):
        assert relative_error(c, e.double()) < 0.05
