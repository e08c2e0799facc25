"""A training step by the code that torch.compile generates for an H100, run on CPU tensors.

test_preflight.py runs this file as a process of its own. Attention's kernels with their lists of
blocks, every fused kernel and the loss kernel are carried out by Triton's interpreter, forward and
backward, in fp32, for it cannot multiply bf16; loss and gradients are compared with those of the
same network in fp64 with dense masks. Exit code 1 if one is off by more than TOLERANCE.
"""

import dataclasses
import sys
from types import SimpleNamespace

from referee.cards import CARDS
from tools.fake_gpu import install, load_guard

install(CARDS["H100"], load_guard(), interpret=True)

import torch  # noqa: E402
import torch._C._dynamo.guards as guards  # noqa: E402
import triton.language as tl  # noqa: E402
from torch._inductor.compile_fx import compile_fx  # noqa: E402
from torch._inductor.runtime import triton_helpers  # noqa: E402
from torch._inductor.runtime.triton_heuristics import CachingAutotuner  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from referee.task import Task  # noqa: E402
from train_gpt import GPT, TRACKS, StepInputs, step_inputs  # noqa: E402

TOLERANCE = 1e-4  # relative, of a whole gradient
B, T, START = 2, 256, 95
TASK = Task(vocab_size=96, document_start=START, val_tokens=T, val_seq_len=T)
HP = dataclasses.replace(
    TRACKS["fineweb"],
    seq_len=T,
    batch_tokens=(B * T,),
    layers="s-L",
    num_heads=2,
    model_dim=32,
    value_layers=(0, 2),
    bigram_rows=128,
    mix_at=(1, 3),
    mix_from=(0,),
)
# Blocks have 128 tokens. The first window reaches over a whole block before the query's own, in
# short layers too; the second is narrower than a block.
WINDOWS = (600, 100)


def mock_launches() -> None:
    """What must be pretended beside tools/fake_gpu.py, for generated code to run on CPU tensors."""
    # Results are made on the CPU. What a kernel leaves out shows, for memory begins as NaN.
    guards._empty_strided_cuda = poisoned
    # CUDA's library of functions is no Python; Triton's own ones are interpreted.
    triton_helpers.libdevice = triton_helpers.math = tl.math
    # Nothing is compiled before the launch.
    CachingAutotuner.precompile = lambda self, *args, **kwargs: None
    # The interpreter takes its time for each program, so that the largest ones are fastest.
    CachingAutotuner.run = largest_first(CachingAutotuner.run)


def poisoned(size, stride, dtype) -> torch.Tensor:
    fill = float("nan") if dtype.is_floating_point else 1
    return torch.empty_strided(size, stride, dtype=dtype, device="cpu").fill_(fill)


def largest_first(run):
    def run_largest(self, *args, **kwargs):
        self.configs.sort(key=lambda config: -config.kwargs.get("XBLOCK", 0))
        return run(self, *args, **kwargs)

    return run_largest


def runtime(dtype: torch.dtype) -> SimpleNamespace:
    """Of a card with little shared memory; on others fp32 gets blocks of 16 x 16: more programs."""
    return SimpleNamespace(
        stream_dtype=dtype, matmul_dtype=dtype, shared_memory_bytes=101_376, has_fp8=False
    )


def by_name(parameters: dict, inputs_BT, targets_BT, per_step: StepInputs) -> dict:
    """Every tensor that a step reads."""
    return {**parameters, "inputs": inputs_BT, "targets": targets_BT, **per_step._asdict()}


def compile_step():
    """(a step of the network, compiled for the GPU; the names of the tensors that it takes)."""
    compiled = []

    def backend(graph, examples):
        step = compile_fx(graph, examples)

        def called(*arguments):
            compiled.extend((step, [name_of[id(t)] for t in arguments]))
            return (torch.zeros((), device="cuda"),)

        return called

    with FakeTensorMode(), torch.device("cuda"):
        model = GPT(HP, TASK, runtime(torch.float32))
        inputs = (*torch.zeros(2, B, T, dtype=torch.int64).unbind(), step_inputs(0, HP, "cuda"))
        named = by_name(dict(model.named_parameters()), *inputs)
        name_of = {id(tensor): name for name, tensor in named.items()}
        torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(*inputs)
    return compiled


def exact_network() -> GPT:
    """In fp64, on the CPU; nothing is at its neutral start, so that every path carries signal."""
    torch.manual_seed(0)
    model = GPT(HP, TASK, runtime(torch.float64)).double()
    for p in model.parameters():
        p.data.add_(0.3 * torch.randn_like(p)).copy_(p.data.float())
    return model


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (B, T): two documents in the first row, one in the second.

    So that through each window the blocks of one row are listed differently from the other's.
    """
    tokens_BT = torch.randint(0, START, (B, T + 1))
    tokens_BT[:, 0] = tokens_BT[0, 192] = START
    return tokens_BT[:, :-1].contiguous(), tokens_BT[:, 1:].contiguous()


def errors(step, names: list[str], model: GPT, window: int) -> dict[str, float]:
    """Relative errors of the compiled step's loss and gradients."""
    inputs_BT, targets_BT = rows()
    per_step = step_inputs(0, HP, "cpu")._replace(
        window=torch.tensor(window), short_window=torch.tensor(window // 2)
    )
    exact_per_step = (t.double() if t.is_floating_point() else t for t in per_step)
    model.zero_grad()
    exact_loss = model(inputs_BT, targets_BT, StepInputs(*exact_per_step))
    exact_loss.backward()
    parameters = {n: p.detach().float().requires_grad_() for n, p in model.named_parameters()}
    named = by_name(parameters, inputs_BT, targets_BT, per_step)
    (loss,) = step(*(named[name] for name in names))
    loss.backward()
    found = {"loss": relative_error(loss, exact_loss)}
    for name, p in model.named_parameters():
        found[name] = relative_error(parameters[name].grad, p.grad)
    return found


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def main() -> int:
    mock_launches()
    step, names = compile_step()
    is_right = True
    for window in WINDOWS:
        for name, error in errors(step, names, exact_network(), window).items():
            print(f"window {window}  {name:24} {error:.1e}", flush=True)
            is_right &= error < TOLERANCE  # not so for NaN
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
