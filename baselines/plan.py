"""What a GPT-2 of some size needs on so many GPUs: memory, arithmetic, time. No GPU is touched.

    ./run.sh baselines/train_gpt2.py --track 13B --plan --gpus 64 --gpu H100 --mfu 0.4

hp is a Hyperparameters of train_gpt2.py. Activations are those that eager mode keeps: compiled
graphs keep fewer. Sizes are bytes.
"""

import math
import os
import sys
from dataclasses import dataclass, fields, replace

from referee.cards import CARDS
from referee.flags import RunError, option
from referee.harness import parse_flags
from referee.ranks import Runtime

USABLE = 0.9  # of a GPU's memory; the rest is for CUDA, NCCL and fragmentation
GIB = 2**30


@dataclass(frozen=True)
class Layout:
    """How a model lies on its GPUs: in shards, unless there is one GPU that holds it all."""

    ranks: int = 1
    checkpoint_blocks: bool = False
    cpu_offload: bool = False
    matmul_bytes: int = 2  # of an element that is multiplied: bf16 2, fp32 4

    @property
    def sharded(self) -> bool:
        return self.ranks > 1 or self.cpu_offload


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU; host: bytes of its share of weights, gradients and state in host memory."""

    weights: float
    gradients: float
    optimizer: float
    copies: float
    activations: float
    host: float

    @property
    def total(self) -> float:
        return sum(getattr(self, name) for name in MEMORY_PARTS)

    def parts(self) -> str:
        sizes = (f"{name} {getattr(self, name) / GIB:.1f}" for name in MEMORY_PARTS)
        return ", ".join(sizes)


MEMORY_PARTS = [f.name for f in fields(Memory) if f.name != "host"]


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
    """Forward and backward: 6 a weight that multiplies, 6 a key and width (half are masked)."""
    D = hp.model_dim
    matrices = hp.num_layers * (4 * D * D + 2 * D * hp.mlp_dim) + hp.embed_rows * D
    return 6 * matrices + 6 * hp.num_layers * D * hp.seq_len


def activation_bytes(hp, layout: Layout) -> float:
    """A token's activations at their peak, when the backward pass is in the head or a last block.

    A block keeps the fp32 inputs of two LayerNorms with mean and deviation, the inputs of four
    matrices, q, k, v and the input of GELU, and the softmax's denominators; on its way back, two
    gradients as wide as the MLP. The head's peak is in the backward pass of cross-entropy, with
    three of the logits' size in fp32: their log-softmax, its gradient and their own.
    """
    D, M, width = hp.model_dim, hp.mlp_dim, layout.matmul_bytes
    block = 8 * D + 16 + width * (6 * D + 2 * M) + 4 * hp.num_heads
    gradients = 2 * width * M
    head = 4 * D + 8 + width * D + 12 * hp.embed_rows
    if layout.checkpoint_blocks:
        return hp.num_layers * width * D + max(block + gradients, head)
    return hp.num_layers * block + max(gradients, head)


def memory(hp, layout: Layout, micro_seqs: int) -> Memory:
    """What one GPU holds when micro_seqs rows pass through it at a time.

    Weights, gradients and AdamW's two moments are fp32. copies: weights in the matmul's type. In
    shards those are of two blocks, one in use and one on its way, with as many gradients on their
    way to fp32 shards, and the outer weights and gradients, whole in fp32.
    """
    share, width = 4 * parameters(hp) / layout.ranks, layout.matmul_bytes
    block, outer = block_parameters(hp), outer_parameters(hp)
    copies = 2 * parameters(hp) if width == 2 else 0
    if layout.sharded:
        cast = 2 * outer if width == 2 else 0
        copies = 2 * width * block + 8 * outer + cast + max(2 * (width + 4) * block, 4 * outer)
    here, host = (0, 4 * share) if layout.cpu_offload else (share, 0)
    activations = micro_seqs * hp.seq_len * activation_bytes(hp, layout)
    return Memory(here, here, 2 * here, copies, activations, host)


def capacity(rt: Runtime) -> float:
    """Memory for this rank: its GPU's, or its share of the host's."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return rt.memory_bytes if rt.is_gpu else host / rt.world_size


def micro_batch_rows(hp, layout: Layout, available: float, asked: int) -> int:
    """Rows a forward pass: what was asked for, or the most that divides and fits in available.

    RunError where rows cannot be dealt to the ranks, or not even one fits.
    """
    if problem := dealing_problem(hp, layout, available, asked):
        raise RunError(problem)
    share = hp.batch_tokens // hp.seq_len // layout.ranks
    found = fitting_rows(hp, layout, available, [asked] if asked else divisors(share))
    if not found:
        raise RunError(shortage(hp, layout, asked or 1, available))
    return found


def divisors(number: int) -> list[int]:
    """Its divisors, the largest first."""
    return [n for n in range(number, 0, -1) if number % n == 0]


def fitting_rows(hp, layout: Layout, available: float, choices: list[int]) -> int:
    """The first number of rows a forward pass that fits in available; 0 if none does."""
    fits = (n for n in choices if memory(hp, layout, n).total <= USABLE * available)
    return next(fits, 0)


def dealing_problem(hp, layout: Layout, available: float, asked: int) -> str:
    """Why a step's rows cannot be dealt in equal forward passes; empty where they can."""
    rows = hp.batch_tokens // hp.seq_len
    if rows % (layout.ranks * (asked or 1)) == 0:
        return ""
    return (
        f"{rows} rows a step cannot be dealt to {layout.ranks} ranks in equal forward passes of "
        f"{asked or 1}; change the number of GPUs or --micro_batch_seqs, or take a batch that "
        f"can: --batch_tokens {dealable_tokens(hp, layout, available, asked)}"
    )


def dealable_tokens(hp, layout: Layout, available: float, asked: int) -> int:
    """Tokens of a batch that can be dealt, at least as large as hp's.

    It is the next one for the rows a pass that were asked for. Without those, it is the first whose
    passes hold three quarters of the rows that they could with up to an eighth more: 17 rows a rank
    go one by one, 18 by threes.
    """
    unit = asked or 1
    least = math.ceil(hp.batch_tokens / hp.seq_len / (layout.ranks * unit)) * unit
    shares = [least] if asked else range(least, least + least // 8 + 1)
    rows = {n: fitting_rows(hp, layout, available, divisors(n)) for n in shares}
    share = next(n for n in shares if rows[n] >= 0.75 * max(rows.values()))
    return share * layout.ranks * hp.seq_len


def shortage(hp, layout: Layout, micro_seqs: int, available: float) -> str:
    """Why it does not fit, with the numbers, and what to change."""
    needed = memory(hp, layout, micro_seqs)
    ways = ["fewer --micro_batch_seqs"] if micro_seqs > 1 else []
    ways += [] if layout.checkpoint_blocks else ["--checkpoint_blocks true"]
    ways += [] if layout.cpu_offload else ["--cpu_offload true"]
    return (
        f"{parameters(hp):,} parameters do not fit: {layout.ranks} x {needed.total / GIB:.1f} GiB "
        f"are needed with {micro_seqs} rows a forward pass ({needed.parts()}), and "
        f"{USABLE * available / GIB:.1f} of {available / GIB:.1f} GiB are to be had on each; "
        f"take more GPUs{''.join(', ' + way for way in ways)}; to compare: --plan"
    )


# ------------------------------------------------------------------------------ Command


@dataclass(frozen=True)
class PlanOptions:
    """For what to plan."""

    gpus: int = option(8, "number of GPUs")
    gpu: str = option("H100", f"their kind: {', '.join(CARDS)}")
    mfu: float = option(0.4, "share of the GPUs' dense bf16 peak that is used")
    micro_batch_seqs: int = option(0, "rows per forward pass of one GPU; 0: what fits")


def report(track: str, hp, options: PlanOptions) -> list[str]:
    """The plan's lines; it need not fit."""
    layout = Layout(options.gpus, hp.checkpoint_blocks, hp.cpu_offload)
    available, verdict, note = CARDS[options.gpu].memory_bytes, "fits: yes", []
    asked = options.micro_batch_seqs
    if problem := dealing_problem(hp, layout, available, asked):
        hp = replace(hp, batch_tokens=dealable_tokens(hp, layout, available, asked))
        note = [f"planned so: {problem}"]
    try:
        micro_seqs = micro_batch_rows(hp, layout, available, asked)
    except RunError as error:
        verdict, micro_seqs = f"fits: no: {error}", asked or 1
    needed = memory(hp, layout, micro_seqs)
    rate = options.gpus * 1e12 * CARDS[options.gpu].bf16_tflops * options.mfu / flops_per_token(hp)
    budget = hp.num_steps * hp.batch_tokens
    return [
        f"track: {track}    parameters: {parameters(hp):,}",
        f"on {options.gpus} x {options.gpu}, {micro_seqs} rows of {hp.seq_len} a forward pass, "
        "GiB a GPU:",
        *(f"  {name:<12}{getattr(needed, name) / GIB:10.2f}" for name in MEMORY_PARTS),
        f"  {'total':<12}{needed.total / GIB:10.2f}  of {available / GIB:.2f}, "
        f"of which {USABLE:.0%} are to be had",
        f"  {'host memory':<12}{needed.host / GIB:10.2f}",
        f"flops_per_token: {flops_per_token(hp):.4g}    at an MFU of {options.mfu:g}:",
        f"  {rate:,.0f} tokens a second, {86400 * rate:.4g} a day; "
        f"the run's {budget:.4g} take {budget / rate / 86400:,.2f} days",
        *note,
        verdict,
    ]


def print_plan(argv: list[str], tracks: dict, gpu_track: str) -> int:
    """Carry out --plan; return the exit code. RunError for what cannot be planned."""
    description = __doc__.splitlines()[0]
    track, _, hp, options, _ = parse_flags(argv, tracks, gpu_track, description, PlanOptions())
    if options.gpu not in CARDS:
        raise RunError(f"--gpu {options.gpu} is not known; known are {', '.join(CARDS)}")
    if options.gpus < 1 or not 0 < options.mfu <= 1 or options.micro_batch_seqs < 0:
        raise RunError("--gpus must be at least 1, --mfu above 0 and at most 1, "
                       "--micro_batch_seqs at least 0")  # fmt: skip
    print("\n".join(report(track, hp, options)), flush=True)
    return 0


def planned(argv: list[str], tracks: dict, gpu_track: str) -> int:
    """print_plan for a terminal: errors in one line."""
    try:
        return print_plan(argv, tracks, gpu_track)
    except (RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
