"""Triton's interpreter against fp64 autograd; test_kernels.py runs this file as its own process.

The interpreter is chosen when Triton is imported, so that it cannot share a process with the rest.
It rounds to bf16 and fp8 without the carry (1.99 becomes 1.0), and cannot multiply bf16: where
rounding counts, fp16 stands for them, and tests/gpu has them.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import Softcap, head_loss, loss_by_kernel, relu_squared, relu_squared_mlp

CAP = Softcap(23.0, 5.0, 7.5)


@pytest.fixture(autouse=True)
def kernels_on_the_cpu(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(kernels, "use_kernels", lambda x: True)
    monkeypatch.setattr(kernels, "HEAD_CHUNK_TOKENS", 32)
    choose_shared_memory(monkeypatch, 232_448)


def choose_shared_memory(monkeypatch, size: int):
    properties = SimpleNamespace(shared_memory_per_block_optin=size, multi_processor_count=2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def exact_loss(logits, targets, weights, cap=CAP):
    """Loss of each row by F.cross_entropy, a target at a time, fp64."""
    capped = cap.height / (1 + torch.exp(-(logits.double() + cap.shift) / cap.slope))
    losses = [
        weight.double() * F.cross_entropy(capped, column, ignore_index=-1, reduction="none")
        for weight, column in zip(weights, targets.T, strict=True)
    ]
    return torch.stack(losses).sum(0)


def exact_gradient(logits, targets, weights, cap=CAP):
    logits = logits.double().requires_grad_()
    return torch.autograd.grad(exact_loss(logits, targets, weights, cap).sum(), logits)[0]


def relative_error(found, expected) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def example(N: int, V: int, J: int):
    logits = 6 * torch.randn(N, V)
    targets = torch.randint(-1, V, (N, J))
    targets[0] = -1
    targets[-1] = V - 1
    weights = torch.tensor([1.0, 0.5, 0.0])[:J]
    return logits, targets, weights


@pytest.mark.parametrize("N, V, J", [(1, 5, 1), (3, 2048, 1), (5, 2049, 2), (37, 300, 3)])
def test_loss_and_gradient_in_place_equal_fp64(N, V, J):
    logits, targets, weights = example(N, V, J)
    loss, gradient = exact_loss(logits, targets, weights), exact_gradient(logits, targets, weights)
    found = loss_by_kernel(logits, targets, weights, CAP, scale=0.5)
    assert torch.allclose(found.double(), loss, atol=1e-5, rtol=1e-5)
    assert torch.allclose(logits.double(), 0.5 * gradient, atol=1e-6, rtol=1e-5)


def test_loss_holds_for_logits_far_beyond_the_cap():
    logits, targets, weights = example(4, 70, 2)
    logits[:, ::2], logits[:, 1::2] = 3e4, -3e4
    cap = Softcap(30.0, 0.0, 7.5)
    expected = exact_loss(logits, targets, weights, cap)
    found = loss_by_kernel(logits, targets, weights, cap)
    assert torch.allclose(found.double(), expected, rtol=1e-5)


def test_half_precision_logits_give_a_gradient_of_another_type_beside_them():
    logits, targets, weights = example(37, 300, 3)
    logits, scale, gradient = logits.half(), 448 / 0.75, torch.empty(37, 300)
    loss, kept = exact_loss(logits, targets, weights), logits.clone()
    expected = scale * exact_gradient(logits, targets, weights)
    found = loss_by_kernel(logits, targets, weights, CAP, scale, gradient)
    assert torch.allclose(found.double(), loss, atol=1e-5)
    assert torch.allclose(gradient.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(logits, kept)


@pytest.mark.parametrize("N, M", [(1, 3), (64, 128), (65, 200), (130, 127)])
def test_transposed_bytes_are_those_of_torch(N, M):
    x = torch.randint(0, 256, (N, M), dtype=torch.uint8).view(torch.float8_e5m2)
    assert torch.equal(kernels.transposed(x).view(torch.uint8), x.view(torch.uint8).T)


def sparse(tmp_path, name: str, size: int, dtype) -> torch.Tensor:
    """Tensor of any size in a file that takes only the pages which are written."""
    return torch.from_file(str(tmp_path / name), shared=True, size=size, dtype=dtype)


def test_logits_past_32_bits_are_reached(tmp_path):
    far, V = 2**30, 40  # row 2 begins past the end of 32 bits
    wide = sparse(tmp_path, "logits", 3 * far + V, torch.float16).as_strided((4, V), (far, 1))
    logits, targets, weights = example(4, V, 2)
    wide.copy_(logits)
    loss, gradient = exact_loss(wide, targets, weights), exact_gradient(wide, targets, weights)
    found = loss_by_kernel(wide, targets, weights, CAP)
    assert torch.allclose(found.double(), loss, rtol=1e-5)
    assert torch.allclose(wide.double(), gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("N, J", [(1, 1), (70, 2)])
def test_head_loss_by_chunks_equals_fp64(N, J):
    x, weight = torch.randn(N, 19, requires_grad=True), torch.randn(53, 19, requires_grad=True)
    _, targets, weights = example(N, 53, J)
    loss = head_loss(x, weight, targets, weights, CAP, torch.float32, fp8=False)
    found = torch.autograd.grad(3 * loss, (x, weight))
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = exact_loss(exact[0] @ exact[1].T, targets, weights).mean()
    gradients = torch.autograd.grad(3 * expected, exact)
    assert loss.shape == () and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert all(
        torch.allclose(f.double(), e, atol=1e-6) for f, e in zip(found, gradients, strict=True)
    )


def head_in_fp8(x_scale: float, weight_scale: float):
    x = (x_scale * torch.randn(48, 64)).requires_grad_()
    weight = (weight_scale * torch.randn(112, 64)).requires_grad_()
    _, targets, weights = example(48, 112, 2)
    loss = head_loss(x, weight, targets, weights, CAP, torch.float32, fp8=True)
    expected = exact_loss(x.double() @ weight.double().T, targets, weights).mean()
    found, exact = (torch.autograd.grad(mean, (x, weight)) for mean in (loss, expected))
    return loss, expected, found, exact


def test_head_in_fp8_is_near_fp64():
    loss, expected, found, exact = head_in_fp8(1.0, 0.1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    assert all(relative_error(f, e) < 0.1 for f, e in zip(found, exact, strict=True))
    assert loss.item() != pytest.approx(expected.item(), rel=1e-6)


def test_head_in_fp8_stays_finite_beyond_the_range_of_its_numbers():
    loss, _, found, _ = head_in_fp8(200.0, 3.0)
    assert all(t.isfinite().all() for t in (loss, *found))


@pytest.mark.parametrize("shared_bytes", [232_448, 101_376])
@pytest.mark.parametrize("N, M, K", [(1, 3, 5), (131, 259, 70), (131, 520, 72)])
def test_relu_squared_products_equal_fp64(monkeypatch, shared_bytes, N, M, K):
    choose_shared_memory(monkeypatch, shared_bytes)
    A, B = torch.randn(N, K).half(), torch.randn(M, K).half()
    pre = (A.double() @ B.double().T).requires_grad_()
    expected = F.relu(pre) ** 2
    post = relu_squared(A, B)
    assert torch.allclose(post.double(), expected, rtol=1e-3, atol=1e-3)
    dy, down = torch.randn(N, K).half(), torch.randn(M, K).half()
    dh = dy.double() @ down.double().T
    gradient = torch.autograd.grad(expected, pre, dh)[0]
    assert relative_error(relu_squared(dy, down, post), gradient) < 1e-3


def mlp_example(dtype):
    x, up, down = torch.randn(131, 45), torch.randn(67, 45) / 7, torch.randn(67, 45) / 7
    return [t.to(dtype).requires_grad_() for t in (x, up, down)]


def assert_mlp_equals_fp64(mlp):
    inputs = mlp_example(torch.float16)
    y, dy = mlp(*inputs, torch.float16), torch.randn(131, 45).half()
    found = torch.autograd.grad(y, inputs, dy)
    x, up, down = exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = F.relu(x @ up.T) ** 2 @ down
    gradients = torch.autograd.grad(expected, exact, dy.double())
    for f, e in zip((y, *found), (expected, *gradients), strict=True):
        assert f.dtype == torch.float16 and relative_error(f, e) < 1e-3


def test_mlp_and_its_gradients_equal_fp64():
    assert_mlp_equals_fp64(relu_squared_mlp)


def test_mlp_keeps_one_hidden_tensor_for_the_backward_pass():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape), lambda t: t):
        relu_squared_mlp(*mlp_example(torch.float16), torch.float16)
    assert kept.count((131, 67)) == 1


def test_compiled_graphs_hold_both_operators_whole():
    compiled = torch.compile(relu_squared_mlp, backend="aot_eager", fullgraph=True)
    assert_mlp_equals_fp64(compiled)
    head = torch.compile(head_loss, backend="aot_eager", fullgraph=True)
    x, weight = torch.randn(40, 19, requires_grad=True), torch.randn(53, 19, requires_grad=True)
    _, targets, weights = example(40, 53, 2)
    arguments = (x, weight, targets, weights, CAP, torch.float32, False)
    eager, found = head_loss(*arguments), head(*arguments)
    assert found.item() == pytest.approx(eager.item(), rel=1e-6)
    pairs = zip(*(torch.autograd.grad(t, (x, weight)) for t in (eager, found)), strict=True)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in pairs)


def test_operators_keep_the_promises_made_to_the_compiler():
    x, weight = torch.randn(40, 16, requires_grad=True), torch.randn(48, 16, requires_grad=True)
    _, targets, weights = example(40, 48, 2)
    own = (x.detach(), weight.detach()), [1.0, 1.0, 1.0], ("test_schema", "test_faketensor")
    in_fp8 = [*map(kernels.as_fp8, (x, weight), kernels.FP8_UNITS)]
    for low, units, checks in (own, (in_fp8, list(kernels.FP8_UNITS), "test_faketensor")):
        arguments = (x, weight, *low, targets, weights, list(CAP), units)
        torch.library.opcheck(kernels.head_op, arguments, test_utils=checks)
    inputs = mlp_example(torch.float16)
    torch.library.opcheck(kernels.mlp_op, inputs)
    torch.library.opcheck(kernels.relu_squared_op, [t.detach() for t in inputs[:2]])
