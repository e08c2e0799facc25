"""The kernels of kernels.py at their true sizes for an H100 that is not here: prints JSON.

test_preflight.py runs this file as a process of its own, for torch must not be imported before the
card is installed.
"""

import json
from functools import partial

from referee.cards import CARDS
from tools.fake_gpu import install, load_guard

install(CARDS["H100"], load_guard())

import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

import kernels  # noqa: E402
from tools.dry_run import Recorder, Trace, recording  # noqa: E402

VOCAB, MODEL_DIM, MLP_DIM, TOKENS = 50304, 768, 3072, 131_072


def recorded(*works, compile_kernels: bool = False) -> Trace:
    """What is seen while each of works() runs on tensors without data."""
    trace = Trace()
    recorder = Recorder(CARDS["H100"], trace, compile_kernels, keys=None, tell=lambda text: None)
    with recording(recorder), FakeTensorMode(), recorder:
        for work in works:
            work()
        recorder.finish_compiling()
    return trace


def on_card(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
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


def main() -> None:
    peaks = {fp8: [recorded(partial(head, chunks, 1, fp8)).peak_bytes for chunks in (1, 3)]
             for fp8 in (False, True)}  # fmt: skip
    heads = [partial(head, 1, num_targets, fp8) for num_targets, fp8 in ((1, False), (3, True))]
    whole = recorded(*heads, mlp, compile_kernels=True)
    kernels.LARGE_TILE["num_warps"] = 4  # half as many threads hold as many sums
    spilling = recorded(mlp, compile_kernels=True)
    report = {
        "chunk_bytes": 2 * kernels.HEAD_CHUNK_TOKENS * VOCAB,  # bf16 logits
        "peaks": list(peaks.values()),
        "kernels": [k._asdict() for configs in whole.kernels.values() for k in configs],
        "problems": whole.problems,
        "spilling": spilling.problems,
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
