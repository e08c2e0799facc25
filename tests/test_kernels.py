"""The kernels without a GPU: definitions here, Triton's interpreter in a process of its own."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT, clean_environment
from interpreted_kernels import CAP, exact_gradient, exact_loss, example

import kernels
from kernels import head_loss, relu_squared_mlp, softcapped_loss

needs_triton = pytest.mark.skipif(not kernels.HAS_TRITON, reason="needs triton; no GPU")


def run(*command: str, **variables) -> subprocess.CompletedProcess:
    environment = clean_environment(PYTHONPATH=str(ROOT), **variables)
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment,
                          capture_output=True, text=True)  # fmt: skip


@pytest.mark.slow
@needs_triton
def test_interpreted_kernels_equal_fp64_autograd():
    done = run("-m", "pytest", "tests/interpreted_kernels.py", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("N, V, J", [(1, 5, 1), (37, 300, 3)])
def test_loss_and_gradient_equal_cross_entropy_target_by_target(N, V, J):
    torch.manual_seed(J)
    logits, targets, weights = example(N, V, J)
    loss, gradient = exact_loss(logits, targets, weights), exact_gradient(logits, targets, weights)
    found = softcapped_loss(logits.requires_grad_(), targets, weights, CAP)
    assert torch.allclose(found.double(), loss, atol=1e-5)
    found_gradient = torch.autograd.grad(found.sum(), logits)[0]
    assert torch.allclose(found_gradient.double(), gradient, atol=1e-6)


def test_on_a_cpu_the_definitions_run():
    torch.manual_seed(0)
    x, weight = torch.randn(6, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    targets, weights = torch.randint(11, (6, 1)), torch.ones(1)
    loss = head_loss(x, weight, targets, weights, CAP, torch.float32, fp8=True)
    expected = softcapped_loss(x @ weight.T, targets, weights, CAP).mean()
    assert loss.item() == pytest.approx(expected.item())
    y = relu_squared_mlp(x, weight, weight, torch.float32)
    assert torch.allclose(y, (x @ weight.T).clamp(min=0) ** 2 @ weight, rtol=1e-5)
    assert all(t.isfinite().all() for t in torch.autograd.grad(loss + y.sum(), (x, weight)))


def test_without_triton_the_definitions_run():
    script = (
        "import sys; sys.modules['triton'] = None; import torch, kernels; one = torch.ones(2, 3);"
        "cap, targets = kernels.Softcap(1, 0, 1), torch.zeros(2, 1).long();"
        "kernels.head_loss(one, one, targets, torch.ones(1), cap, one.dtype, True);"
        "print(kernels.HAS_TRITON)"
    )
    assert run("-c", script).stdout == "False\n"
