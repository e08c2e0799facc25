"""What a GPT-2 of some size needs, from 124M to 175B: memory and FLOPs, and so how many rows fit.

hp is a Hyperparameters of train_gpt2.py; rt says how many ranks there are, and in which dtype they
multiply. Sizes are in bytes. Activations are those that eager mode keeps; compiled graphs keep
fewer.
"""

import math
import os

from referee.flags import RunError
from referee.ranks import Runtime

USABLE = 0.9  # of a GPU's memory; the rest is for CUDA, NCCL and fragmentation
GIB = 2**30


def available_bytes(rt: Runtime) -> float:
    """The memory of one rank's GPU, or its share of the host's."""
    if rt.is_gpu:
        return rt.memory_bytes
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / rt.world_size


def is_sharded(hp, ranks: int) -> bool:
    """Whether the model lies in shards: always, unless one GPU holds all of it."""
    return ranks > 1 or hp.cpu_offload


def block_parameters(hp) -> int:
    """Four square matrices and two of the MLP, their biases, two LayerNorms."""
    D, M = hp.model_dim, hp.mlp_dim
    return 4 * D * D + 2 * D * M + 4 * D + (M + D) + 4 * D


def outer_parameters(hp) -> int:
    """Token embedding, which is the head too, positions, the last LayerNorm."""
    return (hp.embed_rows + hp.seq_len + 2) * hp.model_dim


def parameters(hp) -> int:
    return hp.num_layers * block_parameters(hp) + outer_parameters(hp)


def flops_per_token(hp) -> float:
    """Forward and backward pass of one token.

    6 per weight of a matrix; in attention 12 per layer, unmasked key and channel of the stream, and
    a token sees half of the seq_len keys on average.
    """
    D = hp.model_dim
    matrices = hp.num_layers * (4 * D * D + 2 * D * hp.mlp_dim) + hp.embed_rows * D
    return 6 * matrices + 6 * hp.num_layers * D * hp.seq_len


def activation_bytes(hp, matmul_bytes: int) -> float:
    """Activations per token at their peak: when the backward pass is in the head or a last block.

    A block keeps the fp32 inputs of two LayerNorms with mean and deviation, the inputs of four
    matrices, q, k, v, the input of GELU, and the softmax's denominators. Its backward pass adds two
    gradients as wide as the MLP. The head peaks in the backward pass of cross-entropy, with three
    fp32 tensors of the logits' size: log-softmax, its gradient, and the logits' gradient.
    """
    D, M, width = hp.model_dim, hp.mlp_dim, matmul_bytes
    block = 8 * D + 16 + width * (6 * D + 2 * M) + 4 * hp.num_heads
    gradients = 2 * width * M
    head = 4 * D + 8 + width * D + 12 * hp.embed_rows
    if hp.checkpoint_blocks:
        return hp.num_layers * width * D + max(block + gradients, head)
    return hp.num_layers * block + max(gradients, head)


def memory(hp, rt: Runtime, micro_seqs: int) -> dict[str, float]:
    """Bytes that each kind of tensor takes on one GPU, with micro_seqs rows per forward pass.

    Weights, gradients and AdamW's two moments are fp32. copies: weights in the matmul's type. A
    sharded model has those of two blocks, one in use and one being gathered, the gradients of as
    many being reduced to fp32 shards, and the outer weights and gradients, whole in fp32.
    """
    width, block, outer = rt.matmul_dtype.itemsize, block_parameters(hp), outer_parameters(hp)
    share = 0 if hp.cpu_offload else 4 * parameters(hp) / rt.world_size
    copies = 2 * parameters(hp) if width == 2 else 0
    if is_sharded(hp, rt.world_size):
        cast = 2 * outer if width == 2 else 0
        copies = 2 * width * block + 8 * outer + cast + max(2 * (width + 4) * block, 4 * outer)
    return {
        "weights": share,
        "gradients": share,
        "optimizer": 2 * share,
        "copies": copies,
        "activations": micro_seqs * hp.seq_len * activation_bytes(hp, width),
    }


def micro_batch_rows(hp, rt: Runtime, asked: int) -> int:
    """Rows per forward pass: what was asked for, or the most that divides a step's rows and fits.

    RunError if the ranks cannot share a step's rows equally, or not even one row fits.
    """
    rows, at_once = hp.batch_tokens // hp.seq_len, rt.world_size * (asked or 1)
    if rows % at_once:
        dealable_rows = math.ceil(rows / at_once) * at_once
        raise RunError(
            f"{rows} rows per step cannot be dealt to {rt.world_size} ranks in equal forward "
            f"passes of {asked or 1}; change the number of GPUs or --micro_batch_seqs, or take a "
            f"batch that can: --batch_tokens {dealable_rows * hp.seq_len}"
        )
    share = rows // rt.world_size
    divisors = (n for n in range(share, 0, -1) if share % n == 0)
    for n in [asked] if asked else divisors:
        if sum(memory(hp, rt, n).values()) <= USABLE * available_bytes(rt):
            return n
    raise RunError(shortage(hp, rt, asked or 1))


def shortage(hp, rt: Runtime, micro_seqs: int) -> str:
    """Why the model does not fit, with the numbers, and what to change."""
    needed, available = memory(hp, rt, micro_seqs), available_bytes(rt) / GIB
    sizes = ", ".join(f"{name} {size / GIB:.1f}" for name, size in needed.items())
    total = sum(needed.values()) / GIB
    ways = ["more GPUs"] + (["fewer --micro_batch_seqs"] if micro_seqs > 1 else [])
    ways += [f"--{name} true" for name in ("checkpoint_blocks", "cpu_offload")
             if not getattr(hp, name)]  # fmt: skip
    return (
        f"{parameters(hp):,} parameters do not fit: {rt.world_size} x {total:.1f} GiB are needed "
        f"with {micro_seqs} rows per forward pass ({sizes}), and each has {USABLE * available:.1f} "
        f"usable of {available:.1f} GiB; take {', '.join(ways)}"
    )
