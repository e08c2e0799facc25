"""Train a GPT from scratch until it reaches a fixed validation loss, as fast as the hardware can.

    ./run.sh                                         1, 2, 4 or 8 GPUs of this machine, or its CPU
    torchrun --nproc_per_node=4 train_gpt.py         four GPUs, the same global batches
    python train_gpt.py --num_steps 50 --slug try    one process, an experiment

This file is the contestant: everything that an idea may change. Read it from top to bottom: what a
run is (Hyperparameters), what a step sees (Data, Schedules), the network (Model), the updates
(Optimizer), the loop (Train). kernels.py holds attention, the head's loss and the MLP, each beside
its GPU kernel. referee/ is what an idea must not change: task, device, clock, log and validation
loss. Losses are nats per token.
"""

import time

PROCESS_START = time.perf_counter()  # before the slow imports, so that the clock counts them
if __name__ == "__main__":
    from referee.start import finish

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise, repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from data.prefetch import Prefetcher
from kernels import (
    BLOCK,
    HEAD_CHUNK_TOKENS,
    Softcap,
    attend,
    attention_mask,
    flex_options,
    head_loss,
    linear,
    mean_visible_keys,
    relu_squared_mlp,
    softcapped,
)
from referee.flags import RunError, as_flag, check_ranges, option
from referee.harness import Settings, execute
from referee.ranks import Runtime
from referee.shards import ShardError, open_shard
from referee.task import Task, task_shards

# ------------------------------------------------------------------------------ Hyperparameters

STAGE_LR = (1.0, 1.52, 1.73)  # factor on every rate while the batch is batch_tokens[0], [1], [2]


@dataclass(frozen=True)
class Hyperparameters:
    """How the network is built and trained. A record changes the source, and sets no flag."""

    task: str = option("fineweb", "data, validation rows and target: a task of referee/task.py")
    # Each is option(default, help, least value).
    # Budget. Batch, cap, windows: each value holds for an equal share of the steps, a stage.
    num_steps: int = option(1500, "optimizer steps", 1)
    batch_tokens: tuple[int, ...] = option((131_072, 262_144, 393_216), "tokens per step", 1)
    seq_len: int = option(16384, "tokens per training row, into which documents are packed", 2)
    document_cap: tuple[int, ...] = option((896, 2048, 2048), "tokens kept of a document; 0: all")
    max_epochs: int = option(1, "passes over the training shards that are allowed", 1)
    val_every: int = option(125, "steps between validations", 1)
    # Model.
    layers: str = option("sSsLSs-SSsL", "S short, L long; lowercase: paired heads; -: no attention")
    num_heads: int = option(
        6, "attention heads per layer, each as wide as model_dim / num_heads", 1
    )
    model_dim: int = option(768, "width of the residual stream", 16)
    attn_scale: float = option(0.1, "factor on q.k after both are normed, in the first stage")
    value_layers: tuple[int, ...] = option((1, 2, 8, 9, 10), "layers with a value table, or none")
    bigram_rows: int = option(251_520, "rows of the hashed table of bigrams; 0: none")
    bigram_in_layers: bool = option(True, "mix bigrams into each layer, not into the embedding")
    head_gates: bool = option(True, "gate each head's output by the token")
    shift_taps: tuple[int, int] = option((0, 1), "earlier tokens that are mixed into the input of "
                                         "each attention, of each MLP")  # fmt: skip
    mix_at: tuple[int, ...] = option((6, 10, 11), "layers that StateMix precedes, or none; one "
                                     "beyond the last layer: the head")  # fmt: skip
    mix_from: tuple[int, ...] = option((3, 7, 9), "layers whose outputs StateMix adds, or none")
    window_tokens: tuple[int, ...] = option((384, 896, 1408), "long window, counting the token", 2)
    short_window_tokens: tuple[int, ...] = option((128, 384, 640), "short window", 2)
    val_window_tokens: int = option(2560, "long window in validation; 0: as in training")
    mtp_weight: float = option(0.5, "second target's weight, relative to the next token's 1")
    # Optimizer. The parameter groups stand in parameter_groups().
    muon_lr: float = option(0.023, "learning rate of hidden matrices")
    mlp_down_lr: float = option(2.0, "factor on the rate of the MLP's second matrix")
    embed_lr: float = option(0.008, "learning rate of token embedding and head")
    tied_frac: float = option(0.66, "first fraction of steps, which tie head and embedding")
    bigram_lr: float = option(0.6, "learning rate of the table of bigrams")
    momentum_steps: tuple[int, int] = option((300, 50), "steps of rising, then of falling momentum")

    def __post_init__(self):
        check_ranges(self)
        if any(tokens % self.seq_len for tokens in self.batch_tokens):
            raise RunError(f"--batch_tokens {as_flag(self.batch_tokens)} is not a multiple of "
                           f"--seq_len {self.seq_len}")  # fmt: skip
        if max(self.shift_taps) >= self.seq_len:
            raise RunError(f"--shift_taps {as_flag(self.shift_taps)} reach further back than "
                           f"--seq_len {self.seq_len}")  # fmt: skip
        if 0 in self.document_cap and any(self.document_cap):
            raise RunError(f"--document_cap {as_flag(self.document_cap)} mixes 0 with caps; give "
                           f"{self.seq_len} for no cap in some steps")  # fmt: skip
        if self.model_dim % (4 * self.num_heads):
            raise RunError(f"--model_dim {self.model_dim} does not divide by 4 times --num_heads "
                           f"{self.num_heads}")  # fmt: skip
        layers = parse_layers(self)
        if self.num_heads % 2 and any(layer.is_paired for layer in layers):
            raise RunError(f"--num_heads {self.num_heads} is odd; --layers s and l pair heads")
        if self.mix_at and max(self.mix_at) > len(layers):
            raise RunError("--mix_at must be layers of --layers, or one more, or none")
        if self.mix_at and self.mix_from and max(self.mix_from) >= len(layers):
            raise RunError("--mix_from must be layers of --layers, or none")
        if len(self.batch_tokens) > len(STAGE_LR):
            raise RunError(f"--batch_tokens must be at most {len(STAGE_LR)} numbers, see STAGE_LR")

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        return 4 * self.model_dim

    def stage(self, values: tuple, step: int) -> int:
        """Index of the value that holds in this step: each holds for an equal share of steps."""
        return min(len(values) * step // self.num_steps, len(values) - 1)

    def first_step(self, stage: int, stages: int) -> int:
        """The first step of one of the stages: num_steps * stage / stages, rounded up."""
        return (self.num_steps * stage + stages - 1) // stages

    def value_at_step(self, values: tuple, step: int):
        return values[self.stage(values, step)]


class Layer(NamedTuple):
    """One letter of hp.layers."""

    attends: bool  # else it has an MLP only
    is_long: bool  # has the long window; half of each key is the previous token's
    is_paired: bool  # heads attend two by two, as one of twice the length
    value_embed: int | None  # value-embedding table that it adds


def parse_layers(hp: Hyperparameters) -> list[Layer]:
    """RunError for other letters, or for a value table in a layer that has no attention."""
    if set(hp.layers) - set("SLsl-") or not set(hp.layers) & set("SLsl"):
        raise RunError("--layers must be of S, L, s, l and -, and not of - alone")
    layers = []
    for i, letter in enumerate(hp.layers):
        table = hp.value_layers.index(i) if i in hp.value_layers else None
        layers.append(Layer(letter != "-", letter in "lL", letter in "ls", table))
    attending = [i for i, layer in enumerate(layers) if layer.attends]
    if len(set(hp.value_layers).intersection(attending)) < len(hp.value_layers):
        raise RunError("--value_layers must be layers of --layers that attend, each once, or none")
    return layers


TRACKS = {  # what differs from the defaults, which are fineweb's
    "fineweb": Hyperparameters(),
    "fineweb_8min": Hyperparameters(task="fineweb_8min", num_steps=950),
    "fineweb_medium": Hyperparameters(
        task="fineweb_medium",
        num_steps=5960, batch_tokens=(524_288,), document_cap=(2048,), val_every=250,
        layers="sSsLSsSLSsSLSsSL", num_heads=8, model_dim=1024,
        mix_at=(11, 15, 16), mix_from=(5, 10, 14), value_layers=(1, 2, 13, 14, 15),
        muon_lr=0.025,
    ),
    "wikitext103": Hyperparameters(
        task="wikitext103",
        batch_tokens=(131_072,), document_cap=(0,), max_epochs=4,
    ),
    "embedded": Hyperparameters(
        task="embedded",
        num_steps=800, batch_tokens=(2048,), seq_len=256, document_cap=(0,),
        layers="SL", num_heads=2, model_dim=128, attn_scale=0.12, value_layers=(),
        bigram_rows=16384, bigram_in_layers=False, head_gates=False, shift_taps=(3, 3), mix_at=(),
        window_tokens=(256,), short_window_tokens=(128,), val_window_tokens=0, mtp_weight=0.0,
        mlp_down_lr=1.0, embed_lr=0.02, bigram_lr=0.1, tied_frac=0.0, momentum_steps=(3000, 0),
    ),
}  # fmt: skip


def padded_vocab(task: Task) -> int:
    """Rows of embedding and head: a multiple of 128 for GPUs; a small vocabulary as it is."""
    multiple = 128 if task.vocab_size >= 1024 else 1
    return math.ceil(task.vocab_size / multiple) * multiple


# ------------------------------------------------------------------------------ Data
#
# A shard is a stream of documents. A training row is packed from pieces of documents, each of them
# (tokens, start, length). The rows of a step are dealt to the micro-batches of all ranks.

Piece = tuple[np.ndarray, int, int]


def find_rows(tokens: np.ndarray, document_start: int, seq_len: int) -> list[int]:
    """Starts of the rows of a shard whose documents have no cap.

    Rows are cut one after another. If a document starts within the next seq_len tokens, the next
    row begins there, and what lies before is left out; else it continues the current document.
    """
    documents = np.flatnonzero(tokens[:-1] == document_start).tolist()
    starts, position = [], documents[0] if documents else 0
    while position + seq_len < len(tokens):
        starts.append(position)
        position += seq_len
        following = bisect_left(documents, position)
        if following < len(documents) and documents[following] < position + seq_len:
            position = documents[following]
    return starts


@cache  # check_supply asks first: a large shard takes 0.2 s, outside the timed part
def shard_pieces(path: Path, hp: Hyperparameters, document_start: int):
    """(tokens, starts, lengths) of a shard's documents, or of its rows where they have no cap."""
    tokens = open_shard(path)
    if max(hp.document_cap):
        starts = np.flatnonzero(tokens[:-1] == document_start)  # the last token is a target only
        return tokens, starts, np.diff(starts, append=len(tokens) - 1)
    starts = np.array(find_rows(tokens, document_start, hp.seq_len), np.int64)
    return tokens, starts, np.full(len(starts), hp.seq_len)


def ordered_pieces(hp: Hyperparameters, task: Task, seed: int) -> Iterator[Piece]:
    """Documents in the shards' order; without a cap, whole rows, shuffled within each shard."""
    for epoch in range(hp.max_epochs):
        for index, path in enumerate(task_shards(task.train_files)):
            tokens, starts, lengths = shard_pieces(path, hp, task.document_start)
            rng = np.random.default_rng((seed, epoch, index))
            order = slice(None) if max(hp.document_cap) else rng.permutation(len(starts))
            yield from zip(repeat(tokens), starts[order], lengths[order], strict=False)


def pack_row(pieces: Iterator[Piece], seq_len: int, cap: int) -> list[Piece]:
    """Pieces that fill a row, each cut to at most cap tokens (0: any length)."""
    row, room = [], seq_len
    while room:
        if (piece := next(pieces, None)) is None:
            raise ShardError("the training shards ended early; run: ./run.sh again")
        tokens, start, length = piece
        length = min(length, cap or length, room)
        row.append((tokens, start, length))
        room -= length
    return row


def row_tokens(row: list[Piece], ahead: int) -> np.ndarray:
    """A row's inputs (ahead=0) or targets (ahead=1, the next tokens), int64 (seq_len,)."""
    parts = [tokens[start + ahead : start + ahead + length] for tokens, start, length in row]
    return np.concatenate(parts).astype(np.int64)


def micro_batches(hp: Hyperparameters, task: Task, rt: Runtime, micro_seqs, seed: int, step: int):
    """Yield this rank's (inputs, targets), int64 (rows, seq_len) each, starting with `step`.

    micro_seqs: rows per micro-batch, by stage. A step's rows do not depend on the number of ranks.
    """
    pieces = ordered_pieces(hp, task, seed)
    for s in range(hp.num_steps):
        cap = hp.value_at_step(hp.document_cap, s)
        count = hp.value_at_step(hp.batch_tokens, s) // hp.seq_len
        step_rows = [pack_row(pieces, hp.seq_len, cap) for _ in range(count)]
        if s < step:
            continue
        rows = hp.value_at_step(micro_seqs, s)
        for first in range(rt.rank * rows, count, rt.world_size * rows):
            chosen = step_rows[first : first + rows]
            inputs = np.stack([row_tokens(row, ahead=0) for row in chosen])
            targets = np.stack([row_tokens(row, ahead=1) for row in chosen])
            yield torch.from_numpy(inputs), torch.from_numpy(targets)


def check_supply(hp: Hyperparameters, task: Task, seed: int) -> None:
    """ShardError unless the shards fill every step, even if each document had the shortest cap."""
    stages, needed = len(hp.batch_tokens), 0
    for stage, tokens in enumerate(hp.batch_tokens):
        steps = hp.first_step(stage + 1, stages) - hp.first_step(stage, stages)
        needed += steps * tokens // hp.seq_len
    tokens = sum(len(open_shard(path)) for path in task_shards(task.train_files))
    held = hp.max_epochs * tokens // hp.seq_len
    if held >= needed:  # else there is no need to count the rows
        held, cap, room = 0, min(hp.document_cap), hp.seq_len
        for *_, length in ordered_pieces(hp, task, seed):
            room -= min(length, cap or length)
            if room <= 0:
                held, room = held + 1, hp.seq_len
            if held == needed:
                return
    raise ShardError(
        f"{task.train_files} holds {held} rows of {hp.seq_len} tokens in {hp.max_epochs} passes, "
        f"{hp.num_steps} steps need {needed}",
        "get more shards, or lower --num_steps",
    )


# ------------------------------------------------------------------------------ Schedules

ROTARY_BASE = 1024.0  # tokens per radian of the lowest rotary frequency
# In fractions of all steps: the linear fall of the rates, and the level end behind it; then the
# fraction of each base rate that is left.
COOLDOWN_FRAC, LEVEL_FRAC, FINAL_LR_FRAC = 0.6, 0.01, 0.15
MOMENTUM_LOW, MOMENTUM_RISE = 0.85, 0.10  # Muon's momentum at both ends, and its rise between


def lr_scale(step: int, hp: Hyperparameters) -> float:
    """Factor on every rate: the stage's peak, then a linear fall to FINAL_LR_FRAC, then that."""
    fall = (hp.num_steps * (1 - LEVEL_FRAC) - step) / (hp.num_steps * COOLDOWN_FRAC)
    left, peak = min(1.0, max(0.0, fall)), STAGE_LR[hp.stage(hp.batch_tokens, step)]
    return left * peak + (1 - left) * FINAL_LR_FRAC


def muon_momentum(step: int, hp: Hyperparameters) -> float:
    rise_steps, fall_steps = hp.momentum_steps
    rise = step / max(rise_steps, 1)
    fall = (hp.num_steps - step) / max(fall_steps, 1)
    return MOMENTUM_LOW + MOMENTUM_RISE * min(1.0, rise, fall)


def mtp_weights(step: int, hp: Hyperparameters) -> list[float]:
    """Weights of the targets one, two, three tokens ahead (arXiv 2404.19737); their sum is 1.

    The third fades out by a third of the run, the second between one and two thirds.
    """
    if not hp.mtp_weight:
        return [1.0]
    thirds = 3 * step / hp.num_steps
    second = hp.mtp_weight * min(1.0, max(0.0, 2 - thirds))
    third = hp.mtp_weight / 2 * min(1.0, max(0.0, 1 - thirds))
    return [weight / (1 + second + third) for weight in (1.0, second, third)]


def rotary_frequencies(step: int, hp: Hyperparameters) -> tuple[Tensor, float]:
    """((K/4,) radians per token, attention scale), stretched as windows grow (arXiv 2309.00071)."""
    frequency = ROTARY_BASE ** -torch.linspace(0, 1, hp.head_dim // 4)
    scale, stage = hp.attn_scale, hp.stage(hp.window_tokens, step)
    for old, new in pairwise(hp.window_tokens[: stage + 1]):
        turns = old * frequency / (2 * math.pi)
        # A frequency that turns 32 times or more per window stays; one that turns once or less is
        # scaled with the window; between them the share that stays is linear.
        kept = ((turns - 1) / 31).clamp(0, 1)
        frequency = frequency * (old / new + kept * (1 - old / new))
        scale *= 1 + 0.2 * math.log(new / old)
    return frequency, scale


class StepInputs(NamedTuple):
    """Inputs of the network that change between steps: tensors, so that no step recompiles."""

    window: Tensor  # 0-D, tokens in the long window
    short_window: Tensor  # 0-D
    frequency: Tensor  # (K/4,) radians per token, of the rotary pairs
    attn_scale: Tensor  # 0-D
    mtp_weights: Tensor  # (J,) of the target one token ahead, two ahead, ...


def step_inputs(step: int, hp: Hyperparameters, device, training: bool = True) -> StepInputs:
    """Validation has its own long window, and does not use mtp_weights."""
    window = hp.value_at_step(hp.window_tokens, step)
    short_window = hp.value_at_step(hp.short_window_tokens, step)
    if not training and hp.val_window_tokens:
        window = hp.val_window_tokens
    weights = mtp_weights(step, hp) if training else [1.0]
    values = (window, short_window, *rotary_frequencies(step, hp), weights)
    return StepInputs(*(torch.as_tensor(v).to(device, non_blocking=True) for v in values))


# ------------------------------------------------------------------------------ Model
#
# Shapes: B sequences, T tokens, D model_dim, H heads, K head_dim, M mlp_dim, V vocabulary, J
# targets per token, S earlier tokens, N = B * T. The residual stream x is (B, T, D).

GATE_DIM = 12  # leading dimensions of their input that gates read
MIX_DIM = 64  # hidden width of StateMix
CAP = Softcap(height=23.0, shift=5.0, slope=7.5)  # of logits
MIX_INIT = (1.1, 0.0, 0.1)  # first weights of stream, embedding and bigram in a layer's input
TIED_INIT_SCALE = 0.005  # initial deviation of a tied embedding, whose logits then are small
LOGIT_CHUNK_TOKENS = 4096  # tokens whose fp32 logits are in memory at a time in validation


def norm(x: Tensor) -> Tensor:
    """RMSNorm without parameters, over the last dimension (arXiv 1910.07467)."""
    return x * torch.rsqrt((x * x).float().mean(-1, keepdim=True) + 1e-6).type_as(x)


def rotary_tables(seq_len: int, frequency: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 (T, 1, K/4) (rotary: arXiv 2104.09864).

    The first two quarters of a head's dimensions are rotated as pairs; the other half is not.
    """
    angle = torch.arange(seq_len, device=frequency.device)[:, None] * frequency
    return angle.cos()[:, None], angle.sin()[:, None]


def rotate(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate by position; tables may be longer than x."""
    quarter, T = cos.size(-1), x_BTHK.size(1)
    a, b, fixed = x_BTHK.split([quarter, quarter, x_BTHK.size(-1) - 2 * quarter], dim=-1)
    cos, sin = cos[:T].type_as(a), sin[:T].type_as(a)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, fixed], dim=-1)


def pair_heads(x_BTHK: Tensor) -> Tensor:
    """(B, 2T, H/2, K): heads h and h + H/2 alternate, so each also sees the other's keys.

    Each token then has two places, so a window of W places reaches W / 2 tokens back.
    """
    B, T, H, K = x_BTHK.shape
    return x_BTHK.view(B, T, 2, H // 2, K).reshape(B, 2 * T, H // 2, K)


def parameter_if(wanted, initial: Tensor) -> nn.Parameter | None:
    return nn.Parameter(initial) if wanted else None


class Context(NamedTuple):
    """What every layer reads beside the stream."""

    cos: Tensor
    sin: Tensor
    attn_scale: Tensor
    masks: dict[tuple[bool, bool], BlockMask | Tensor]  # by Layer's (is_long, is_paired)
    same_doc_SBT1: Tensor  # 1 where the token s + 1 before lies in the same document, else 0


class Attention(nn.Module):
    """Rotary attention with QK-norm. o is stored (in, out), so that q, k, v and o share a shape."""

    def __init__(self, hp: Hyperparameters, rt: Runtime, layer: Layer):
        super().__init__()
        self.heads, self.dtype, self.layer = hp.num_heads, rt.matmul_dtype, layer
        self.kernel_options = flex_options(rt.shared_memory_bytes)
        has_table = layer.value_embed is not None
        self.qkvo = nn.Parameter(torch.empty(4, hp.model_dim, hp.model_dim))
        self.value_gate = parameter_if(has_table, torch.zeros(hp.num_heads, GATE_DIM))
        self.head_gate = parameter_if(hp.head_gates, torch.zeros(hp.num_heads, GATE_DIM))

    def forward(self, x: Tensor, value_BTHK: Tensor | None, ctx: Context) -> Tensor:
        """value: rows of a value table, which are added to v, or None."""
        B, T, _ = x.shape
        qkv, o = self.qkvo.split([3, 1])
        q, k, v = linear(x, qkv.flatten(0, 1), self.dtype).view(B, T, 3, self.heads, -1).unbind(2)
        if value_BTHK is not None:  # arXiv 2410.17897, gated by 6 dimensions of x and 6 of the row
            both = [t[..., : GATE_DIM // 2] for t in (x, value_BTHK[:, :, 0])]
            v = v + gate(torch.cat(both, dim=-1), self.value_gate) * value_BTHK
        q, k = norm(q) * ctx.attn_scale.type_as(q), norm(k)
        if self.layer.is_long:
            # The half of a key that is not rotated is the previous token's: so a query finds the
            # places that followed its own token.
            rotated, fixed = k.chunk(2, dim=-1)
            k = torch.cat([rotated, fixed.roll(1, 1) * ctx.same_doc_SBT1[0, ..., None]], dim=-1)
        if self.layer.is_paired:
            q, k, v = pair_heads(q), pair_heads(k), pair_heads(v)
        q, k = rotate(q, ctx.cos, ctx.sin), rotate(k, ctx.cos, ctx.sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        mask = ctx.masks[self.layer.is_long, self.layer.is_paired]
        y_BHTK = attend(*(t.to(self.dtype) for t in (q, k, v)), mask, self.kernel_options)
        y_BTHK = y_BHTK.type_as(x).transpose(1, 2).reshape(B, T, self.heads, -1)  # unpairs heads
        if self.head_gate is not None:
            y_BTHK = gate(x, self.head_gate) * y_BTHK
        return linear(y_BTHK.flatten(2), o[0].T, self.dtype)


def gate(x: Tensor, weight_HG: Tensor) -> Tensor:
    """Factors (B, T, H, 1) between 0 and 2 from the leading dimensions of x; 1 for weight 0."""
    # Not a matrix product: a GPU would run such a narrow one as a kernel of its own.
    logits_BTH = (x[..., None, :GATE_DIM] * weight_HG.type_as(x)).sum(-1)
    return 2 * torch.sigmoid(logits_BTH)[..., None]


class MLP(nn.Module):
    """ReLU squared (arXiv 2109.08668); down is stored (in, out), shaped like up."""

    def __init__(self, hp: Hyperparameters, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.up_down = nn.Parameter(torch.empty(2, hp.mlp_dim, hp.model_dim))

    def forward(self, x: Tensor) -> Tensor:
        return relu_squared_mlp(x.flatten(0, 1), *self.up_down.unbind(), self.dtype).view_as(x)


def normed_with_earlier(x: Tensor, taps_SD: Tensor | None, ctx: Context) -> Tensor:
    """norm(x) plus the S tokens before it, weighted per channel: a causal depthwise convolution.

    Primer (arXiv 2109.08668) does so with queries, keys and values, this with sublayers' inputs.
    """
    x = total = norm(x)
    for i, tap_D in enumerate(() if taps_SD is None else taps_SD.type_as(x)):
        total = total + tap_D * ctx.same_doc_SBT1[i] * x.roll(i + 1, 1)
    return total


def count_injected(hp: Hyperparameters) -> int:
    """How many tensors GPT.embed_tokens returns."""
    return 2 if hp.bigram_rows and hp.bigram_in_layers else 1


class Block(nn.Module):
    """Attention and MLP on the residual stream, after mixing embedding and bigram into it."""

    def __init__(self, hp: Hyperparameters, rt: Runtime, layer: Layer):
        super().__init__()
        self.attn = Attention(hp, rt, layer) if layer.attends else None
        self.mlp = MLP(hp, rt.matmul_dtype)
        self.mix = nn.Parameter(torch.tensor(MIX_INIT[: 1 + count_injected(hp)]))
        taps = [torch.zeros(count, hp.model_dim) for count in hp.shift_taps]
        self.attn_taps = parameter_if(self.attn and hp.shift_taps[0], taps[0])
        self.mlp_taps = parameter_if(hp.shift_taps[1], taps[1])

    @torch.no_grad()
    def initialize(self, hp: Hyperparameters):
        """Uniform matrices with a standard deviation of 0.5 / sqrt(D); both outputs start at 0."""
        bound = 3**0.5 * 0.5 * hp.model_dim**-0.5  # uniform in +-b has a deviation of b / sqrt(3)
        self.mlp.up_down.uniform_(-bound, bound)
        self.mlp.up_down[1].zero_()
        if self.attn is None:
            return
        qkvo = self.attn.qkvo
        qkvo.uniform_(-bound, bound)
        qkvo[3].zero_()
        if self.attn.layer.is_long:
            # Keys here are those of the token before, and queries start equal to them: a token
            # seeks its like, and copying (arXiv 2209.11895) works from the first step.
            halves = qkvo.unflatten(1, (hp.num_heads, 2, -1))
            halves[0, :, 1] = halves[1, :, 1]

    def forward(self, x: Tensor, injected: list[Tensor], value_BTHK, ctx: Context) -> Tensor:
        """injected: what embed_tokens returns."""
        mix = self.mix.type_as(x)
        x = mix[0] * x
        for weight, added in zip(mix[1:], injected, strict=True):
            x = x + weight * added
        if self.attn is not None:
            x = x + self.attn(normed_with_earlier(x, self.attn_taps, ctx), value_BTHK, ctx)
        return x + self.mlp(normed_with_earlier(x, self.mlp_taps, ctx))


class StateMix(nn.Module):
    """Adds states to the stream, with weights that the token decides (MUDD: arXiv 2502.12170).

    They are the embedding, the bigram's row with bigram_in_layers, the outputs of hp.mix_from so
    far, and the row of the last value table.
    """

    def __init__(self, model_dim: int, states: int):
        super().__init__()
        self.mix_in = nn.Parameter(torch.randn(MIX_DIM, model_dim) * 0.5 * model_dim**-0.5)
        self.mix_out = nn.Parameter(torch.zeros(states, MIX_DIM))

    def forward(self, x: Tensor, states: list[Tensor]) -> Tensor:
        hidden = F.gelu(F.linear(norm(x), self.mix_in.type_as(x)))
        weights = 0.1 * F.linear(hidden, self.mix_out.type_as(x))
        for weight_BT1, state in zip(weights.split(1, dim=-1), states, strict=True):
            x = x + weight_BT1 * state
        return x


class GPT(nn.Module):
    """Tokens to mean loss. The head starts at or near 0, so the first loss is near ln V."""

    def __init__(self, hp: Hyperparameters, task: Task, rt: Runtime):
        super().__init__()
        self.hp, self.rt, self.document_start = hp, rt, task.document_start
        self.layers, vocab, D = parse_layers(hp), padded_vocab(task), hp.model_dim
        self.embed, tables = nn.Parameter(torch.randn(vocab, D)), len(hp.value_layers)
        self.value_embeds = parameter_if(tables, 0.01 * torch.randn(tables, vocab, D))
        self.bigram = parameter_if(hp.bigram_rows, torch.zeros(hp.bigram_rows, D))
        self.blocks = nn.ModuleList(Block(hp, rt, layer) for layer in self.layers)
        self.lm_head = nn.Parameter(torch.zeros(vocab, D))
        # Gate weights, then strength. Where layers mix in bigrams, taps take the place of smear.
        self.smear = parameter_if(not hp.bigram_in_layers, torch.zeros(GATE_DIM + 1))
        self.mixes = nn.ModuleDict()  # by the layer before which it stands
        for i in hp.mix_at:
            outputs = sum(j < i for j in hp.mix_from)
            self.mixes[str(i)] = StateMix(D, count_injected(hp) + outputs + min(tables, 1))
        for block in self.blocks:
            block.initialize(hp)
        if hp.tied_frac:  # Trainer.update keeps the two equal
            self.lm_head.data.copy_(self.embed.data.mul_(TIED_INIT_SCALE))

    def embed_tokens(self, inputs_BT: Tensor, same_doc_BT1: Tensor) -> list[Tensor]:
        """What every layer mixes in: [embedding], or [embedding, bigram's row].

        Without bigram_in_layers the embedding includes the bigram's row, and is smeared with the
        token before it. same_doc: 1 where the token before is of the same document. Where it is
        not, document_start takes its place in the bigram.
        """
        # Tables as fp32, for the gradients of a row are added up in the dtype that is indexed.
        x, bigrams = self.embed.float()[inputs_BT].to(self.rt.stream_dtype), []
        if self.hp.bigram_rows:  # arXiv 1709.03933
            in_document = same_doc_BT1[..., 0] > 0
            before_BT = torch.where(in_document, inputs_BT.roll(1, 1), self.document_start)
            row_BT = ((36313 * inputs_BT) ^ (27191 * before_BT)) % self.hp.bigram_rows
            bigram = self.bigram.float()[row_BT].type_as(x)
            if self.hp.bigram_in_layers:
                bigrams = [bigram]
            else:
                x = x + bigram
        x = norm(x)
        if self.smear is not None:
            weights, strength = self.smear.type_as(x).split([GATE_DIM, 1])
            share_BT1 = strength * torch.sigmoid(x[..., :GATE_DIM] @ weights)[..., None]
            x = norm(x + share_BT1 * same_doc_BT1 * x.roll(1, 1))
        return [x, *bigrams]

    def context(self, docs_BT: Tensor, per_step: StepInputs) -> Context:
        hp, T = self.hp, docs_BT.size(1)
        kinds = {(layer.is_long, layer.is_paired) for layer in self.layers if layer.attends}
        has_pairs = any(is_paired for _, is_paired in kinds)
        paired_docs = docs_BT.repeat_interleave(2, dim=1) if has_pairs else docs_BT
        short = per_step.short_window, max(hp.short_window_tokens)  # now, and at most
        long = per_step.window, max(*hp.window_tokens, hp.val_window_tokens)
        masks = {}
        for is_long, is_paired in sorted(kinds):
            docs, windows = paired_docs if is_paired else docs_BT, long if is_long else short
            masks[is_long, is_paired] = attention_mask(docs, *windows)
        place = torch.arange(T, device=docs_BT.device)
        same_doc = []
        for distance in range(1, 1 + max(1, *hp.shift_taps)):
            same_doc.append((docs_BT == docs_BT.roll(distance, 1)) & (place >= distance))
        same_doc_SBT1 = torch.stack(same_doc)[..., None].to(self.rt.stream_dtype)
        tables = rotary_tables(2 * T if has_pairs else T, per_step.frequency)
        return Context(*tables, per_step.attn_scale, masks, same_doc_SBT1)

    def hidden(self, inputs_BT: Tensor, per_step: StepInputs) -> Tensor:
        """The normed stream (B, T, D) that the head reads."""
        hp, (B, T) = self.hp, inputs_BT.shape
        ctx = self.context(self.document_index(inputs_BT), per_step)
        injected = self.embed_tokens(inputs_BT, ctx.same_doc_SBT1[0])
        states = list(injected)  # what StateMix adds: these, then outputs of hp.mix_from
        value_states = []  # the last value table's rows
        if self.value_embeds is not None:
            # Indexed once: one gradient of the whole parameter instead of one per table.
            rows = self.value_embeds.float()[:, inputs_BT].type_as(injected[0])
            values = rows.view(-1, B, T, hp.num_heads, hp.head_dim).unbind()
            value_states = [rows[-1]]
        x = injected[0]
        for i, (layer, block) in enumerate(zip(self.layers, self.blocks, strict=True)):
            if i in hp.mix_at:
                x = self.mixes[str(i)](x, states + value_states)
            value_BTHK = None if layer.value_embed is None else values[layer.value_embed]
            x = block(x, injected, value_BTHK, ctx)
            if i in hp.mix_from:
                states.append(x)
        if len(self.layers) in hp.mix_at:
            x = self.mixes[str(len(self.layers))](x, states + value_states)
        return norm(x)

    def document_index(self, inputs_BT: Tensor) -> Tensor:
        """int32 (B, T): document starts so far; a piece without one joins the document before."""
        return (inputs_BT == self.document_start).cumsum(1, dtype=torch.int32)

    def logits(self, x: Tensor) -> Tensor:
        """Capped logits (..., V), fp32, of the normed stream (..., D)."""
        return softcapped(linear(x, self.lm_head, self.rt.matmul_dtype), CAP)

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor, per_step: StepInputs) -> Tensor:
        """Cross-entropy of the targets, weighted by per_step.mtp_weights: 0-D, fp32."""
        docs_BT = self.document_index(inputs_BT)
        targets = [targets_BT]
        for ahead in range(1, len(per_step.mtp_weights)):
            targets.append(further_targets(targets_BT, docs_BT, ahead))
        targets_NJ = torch.stack(targets, dim=-1).flatten(0, 1)
        x_ND = self.hidden(inputs_BT, per_step).flatten(0, 1)
        return head_loss(x_ND, self.lm_head, targets_NJ, per_step.mtp_weights, CAP,
                         self.rt.matmul_dtype, self.rt.has_fp8)  # fmt: skip


def further_targets(targets_BT: Tensor, docs_BT: Tensor, ahead: int) -> Tensor:
    """The targets `ahead` tokens later; -1, which does not count, beyond the document or row."""
    in_document = docs_BT[:, ahead:] == docs_BT[:, :-ahead]
    later = torch.where(in_document, targets_BT[:, ahead:], -1)
    return F.pad(later, (0, ahead), value=-1)


# ------------------------------------------------------------------------------ Optimizer

ADAM_EVERY = 2  # steps per update by Adam, whose gradients are summed
ADAM_EPS = 1e-15  # far below 1e-9, the root of the second moment of a rarely used row
# By the names of torch 2.13, or else by the older ones.
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
ALL_GATHER = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
POLAR_EXPRESS = (  # arXiv 2505.16932: the best quintic for each Newton-Schulz step
    (8.1566, -22.4833, 15.8788),
    (4.0429, -2.8089, 0.5000),
    (3.8917, -2.7725, 0.5061),
    (3.2858, -2.3681, 0.4645),
    (2.3465, -1.7098, 0.4232),
)


def orthogonalize(G: Tensor, dtype: torch.dtype) -> Tensor:
    """G (N, rows, cols) with all singular values about 1, by Newton-Schulz steps in dtype."""
    X, is_tall = G.to(dtype), G.size(-2) > G.size(-1)
    if is_tall:
        X = X.mT
    X = X / (1.02 * X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in POLAR_EXPRESS:
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return (X.mT if is_tall else X).type_as(G)


def split_fp32(W: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 as its upper 16 bits (bf16, truncated) and its lower 16 bits (int16), exactly."""
    bits = W.view(torch.int32)
    return (bits >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def as_fp32(W: Tensor, low: Tensor | None) -> Tensor:
    """W, fp32; or, with low, the fp32 of which they are the halves: the inverse of split_fp32."""
    if low is None:
        return W
    return ((W.view(torch.int16).int() << 16) | (low.int() & 0xFFFF)).view(torch.float32)


def replace_fp32(W: Tensor, low: Tensor | None, new: Tensor) -> None:
    """Let as_fp32(W, low) be new."""
    W.copy_(new if low is None else split_fp32(new)[0])
    if low is not None:
        low.copy_(split_fp32(new)[1])


def weights_to_decay(W: Tensor, U: Tensor) -> Tensor:
    """W where the update U shrinks it, else 0: cautious weight decay (arXiv 2510.12402)."""
    return W * (U * W > 0)


def muon_update(G, lr, decay, beta, factors, dtype, W, momentum, second, low=None):
    """Update matrices W (N, rows, cols) in place with gradients G; lr, decay, beta: 0-D tensors.

    W and low: as in as_fp32. Nesterov momentum is orthogonalised (Muon:
    kellerjordan.github.io/posts/muon). Each row is divided by its running root mean square, and the
    matrix scaled back to its norm (NorMuon, arXiv 2510.05491), times sqrt(rows / cols) if that is
    above 1. second (N, rows, 1): the running mean squares. factors (N, 1, 1) multiply each matrix's
    rate, and thereby its decay.
    """
    momentum.add_((1 - beta) * (G.float() - momentum))
    U = orthogonalize(G + beta * (momentum - G), dtype)
    second.lerp_((U * U).mean(-1, keepdim=True), 0.1)
    scaled = U * torch.rsqrt(second + 1e-10)
    U_norm, scaled_norm = (x.norm(dim=(-2, -1), keepdim=True) for x in (U, scaled))
    U = scaled * (U_norm / (scaled_norm + 1e-10))
    rates = lr * max(1.0, W.size(-2) / W.size(-1)) ** 0.5 * factors
    W_fp32 = as_fp32(W, low)
    replace_fp32(W, low, W_fp32 - rates * (U + lr * decay * weights_to_decay(W_fp32, U)))


def adam_update(G, lr, decay, count, beta1, beta2, W, mean, square, low=None):
    """Update numbers W (N,) in place by Adam (arXiv 1412.6980), for the count-th time.

    W and low: as in as_fp32. lr, decay and count are 0-D tensors.
    """
    mean.lerp_(G.float(), 1 - beta1)
    square.lerp_(G.float() ** 2, 1 - beta2)
    root = (square / (1 - beta2**count)).sqrt()
    W_fp32 = as_fp32(W, low) - lr * (mean / (1 - beta1**count)) / (root + ADAM_EPS)
    replace_fp32(W, low, W_fp32 - lr * lr * decay * weights_to_decay(W_fp32, mean))


class Group(NamedTuple):
    """Parameters that are updated alike."""

    params: list[nn.Parameter]
    lr: float
    decay: float  # times the squared rate; only where the update shrinks a weight as well
    every: int  # steps per update, whose gradients are summed
    betas: tuple[float, float] | None = None  # of Adam; None: Muon, with muon_momentum and 0.9
    lr_factors: tuple[float, ...] = (1.0,)  # of Muon, for the matrices of a parameter in turn


class Bank:
    """The parameters of a group as views of one tensor `items` (N, ...), and its optimizer's state.

    Each rank updates its part of the items; then all ranks gather them. state: tensors with an
    entry for each item, by name; beyond a rank's part they are stale until gather_state. Zeros
    behind the first `count` items make the parts equal.
    """

    def __init__(self, group: Group, item: torch.Size, hp: Hyperparameters, rt: Runtime):
        """item: shape of what is updated as one, such as a matrix; () for single numbers."""
        self.group, self.item, self.hp, self.rt, self.exchange = group, item, hp, rt, None
        items = torch.cat([p.data.view(-1, *item) for p in group.params]).float()
        self.count, self.items = len(items), self.padded(items)
        part = len(self.items) // rt.world_size
        self.mine = slice(rt.rank * part, (rt.rank + 1) * part)
        self.state: dict[str, Tensor] = {}

    def point_parameters(self):
        """Make the parameters views of items.

        With a bf16 stream the items become bf16, and state["low"] the lower 16 bits of their fp32.
        """
        if self.rt.stream_dtype == torch.bfloat16:
            self.items, self.state["low"] = split_fp32(self.items)
        counts = [p.numel() // math.prod(self.item) for p in self.group.params]
        views = self.items[: self.count].split(counts)
        for p, view in zip(self.group.params, views, strict=True):
            p.data = view.view(p.shape)

    def padded(self, tensor: Tensor) -> Tensor:
        """tensor (N, ...) with rows of zeros, so that it divides into equal parts."""
        missing = -len(tensor) % self.rt.world_size
        zeros = tensor.new_zeros(missing, *tensor.shape[1:])
        return torch.cat([tensor, zeros]) if missing else tensor

    def start_exchange(self):
        """Take the gradients, and start to average this rank's part of them over the ranks."""
        gradients = [p.grad.reshape(-1, *self.item) for p in self.group.params]
        whole = torch.cat(gradients) if len(gradients) > 1 else gradients[0]
        for p in self.group.params:
            p.grad = None
        self.gradients = whole
        if self.rt.world_size > 1:
            whole = self.padded(whole.to(self.rt.stream_dtype)).contiguous()
            self.gradients = whole.new_zeros(len(whole) // self.rt.world_size, *whole.shape[1:])
            if not self.rt.is_alone:  # in warm-up, without exchange, the update gets the zeros
                with self.rt.collective():
                    self.exchange = REDUCE_SCATTER(self.gradients, whole, async_op=True)

    def finish(self):
        """Wait for the exchange that was started last."""
        if self.exchange is not None:
            with self.rt.collective():
                self.exchange.wait()
        self.exchange = None

    def start_gather(self, tensor: Tensor):
        """Start to fill tensor (N, ...) on every rank with what each rank holds in its part."""
        if self.rt.is_alone:
            return
        if tensor.dtype == torch.int16:  # which collectives do not know
            tensor = tensor.view(torch.bfloat16)
        with self.rt.collective():
            self.exchange = ALL_GATHER(tensor, tensor[self.mine].clone(), async_op=True)

    def gather_state(self) -> dict[str, Tensor]:
        """The state, whole on every rank. A collective: every rank calls it."""
        for tensor in self.state.values():
            self.start_gather(tensor)
            self.finish()
        return {name: tensor[: self.count] for name, tensor in self.state.items()}

    @torch.no_grad()
    def step(self, step: int):
        """Update this rank's items, and start to gather all parts; finish() waits for them."""
        self.finish()
        if self.rt.world_size > 1:
            self.gradients.div_(self.rt.world_size)
        rate = self.group.lr * lr_scale(step, self.hp)
        # As tensors, for a new float would recompile.
        numbers = map(torch.tensor, (rate, self.group.decay, self.number(step)))
        mine = (tensor[self.mine] for tensor in (self.items, *self.state.values()))
        self.update(self.gradients, *numbers, *self.fixed, *mine)
        self.start_gather(self.items)


class Muon(Bank):
    """muon_update of matrices."""

    def __init__(self, group: Group, hp: Hyperparameters, rt: Runtime, compile_fn: Callable):
        super().__init__(group, group.params[0].shape[1:], hp, rt)
        self.state["momentum"] = torch.zeros_like(self.items)
        self.state["row_square"] = torch.zeros_like(self.items[..., :1])
        factors = group.lr_factors * (self.count // len(group.lr_factors))
        factors_N = self.padded(torch.tensor(factors, device=self.items.device))[self.mine]
        self.update = compile_fn(muon_update)
        self.fixed = factors_N[:, None, None], rt.matmul_dtype
        self.number = partial(muon_momentum, hp=hp)
        self.point_parameters()


class Adam(Bank):
    """adam_update of numbers."""

    def __init__(self, group: Group, hp: Hyperparameters, rt: Runtime, compile_fn: Callable):
        super().__init__(group, torch.Size(), hp, rt)
        self.update, self.fixed = compile_fn(adam_update), group.betas
        self.state["mean"] = torch.zeros_like(self.items)
        self.state["square"] = torch.zeros_like(self.items)
        self.number = lambda step: float((step + 1) // group.every)
        self.point_parameters()


def parameter_groups(model: GPT, hp: Hyperparameters) -> dict[str, Group]:
    """The one table of parameter groups; a group without parameters is left out.

    embed and head need equal rates, for Trainer.update keeps them equal while they are tied.
    """

    def named(*ends: str) -> list[nn.Parameter]:
        return [p for name, p in model.named_parameters() if name.endswith(ends)]

    rows = {  # parameters, learning rate, decay, steps per update, betas of Adam, lr_factors
        "attn": (named("qkvo"), hp.muon_lr, 1.2, 1),
        "mlp": (named("up_down"), hp.muon_lr, 1.2, 1, None, (1.0, hp.mlp_down_lr)),
        "embed": (named("embed"), hp.embed_lr, 0.75, ADAM_EVERY, (0.5, 0.95)),
        "head": (named("lm_head"), hp.embed_lr, 0.75, ADAM_EVERY, (0.5, 0.95)),
        "values": (named("value_embeds"), 0.6, 0.025, ADAM_EVERY, (0.75, 0.95)),
        "bigram": (named("bigram"), hp.bigram_lr, 0.025, ADAM_EVERY, (0.75, 0.95)),
        "gates": (named("_gate", "mix_in", "mix_out"), 0.008, 0.0, ADAM_EVERY, (0.9, 0.99)),
        "scalars": (named("mix", "taps", "smear"), 0.04, 0.0, ADAM_EVERY, (0.9, 0.99)),
    }
    return {name: Group(*row) for name, row in rows.items() if row[0]}


def make_optimizers(model: GPT, hp: Hyperparameters, rt: Runtime, compile_fn: Callable) -> dict:
    """An optimizer per group, by name. AssertionError unless each parameter is in one group."""
    groups = parameter_groups(model, hp)
    grouped = sorted(id(p) for group in groups.values() for p in group.params)
    assert grouped == sorted(map(id, model.parameters())), "a parameter is not in just one group"
    return {name: (Adam if group.betas else Muon)(group, hp, rt, compile_fn)
            for name, group in groups.items()}  # fmt: skip


# ------------------------------------------------------------------------------ Train


def memory_estimate(hp: Hyperparameters, vocab: int, rows: int) -> float:
    """Peak bytes on a GPU with so many rows per forward pass; fitted to tools/preflight.py."""
    layers, D, tokens = len(hp.layers), hp.model_dim, rows * hp.seq_len
    matrices = layers * D * (4 * D + 2 * hp.mlp_dim)
    table_rows = (2 + len(hp.value_layers)) * vocab + hp.bigram_rows  # 2: embedding and head
    # A matrix element: bf16 weight, low half, gradient by parameter and by bank, fp32 momentum: 12.
    # An element of a table: bf16 weight, low half, gradient, fp32 mean and square: 3 * 2 + 2 * 4.
    state = 12 * matrices + 14 * table_rows * D
    # What the backward pass needs, in bf16: 15 tensors as wide as the stream per layer, one MLP.
    activations = 2 * layers * (15 * D + hp.mlp_dim) * tokens
    logits = 4 * min(tokens, HEAD_CHUNK_TOKENS) * vocab  # of a chunk; 4 bytes fit best
    update = 4 * hp.bigram_rows * D  # a copy of the largest table, when activations are gone
    return state + max(activations + logits, update)


def choose_micro_batches(hp: Hyperparameters, vocab: int, rt: Runtime, asked: int) -> list[int]:
    """Rows per forward pass, by stage: `asked`, or if that is 0 the most that fit.

    All stages take the same number if it is large enough: so they share what is compiled.
    """
    chosen = []
    for rows in (tokens // hp.seq_len for tokens in hp.batch_tokens):
        share = rows // rt.world_size
        if rows % rt.world_size or (asked and share % asked):
            raise RunError(
                f"{rows} rows per step cannot be dealt to {rt.world_size} ranks in equal forward "
                f"passes of {asked or 1}; change --nproc_per_node or --micro_batch_seqs"
            )
        divisors = [n for n in range(1, share + 1) if share % n == 0]
        fitting = [n for n in divisors if memory_estimate(hp, vocab, n) < 0.9 * rt.memory_bytes]
        chosen.append(asked or max(fitting, default=1))
    least = min(chosen)
    divides_all = all(tokens // hp.seq_len % least == 0 for tokens in hp.batch_tokens)
    is_large = least * hp.seq_len >= 131_072  # more take hardly less time per token
    return [least] * len(chosen) if divides_all and is_large else chosen


class Trainer:
    """A model, its optimizers and data, and the steps that join them."""

    def __init__(self, settings: Settings, rt: Runtime):
        task, hp, options = settings.task, settings.hp, settings.options
        self.hp, self.task, self.rt, self.seed = hp, task, rt, options.seed
        vocab = padded_vocab(task)
        if rt.is_gpu and (hp.seq_len % BLOCK or task.val_seq_len % BLOCK):
            raise RunError(f"--seq_len and --val_seq_len must divide by {BLOCK} on a GPU")
        check_supply(hp, task, self.seed)
        self.micro_seqs = choose_micro_batches(hp, vocab, rt, options.micro_batch_seqs)
        self.micro_batch_seqs = max(self.micro_seqs)
        rows_that_fit = self.micro_batch_seqs * hp.seq_len // task.val_seq_len
        self.val_batch_rows = task.batch_rows(rows_that_fit, rt.world_size)
        torch.manual_seed(self.seed)
        with rt.device:
            self.model = GPT(hp, task, rt)
        self.flops_per_token, self.state_every = self.model_flops(), ADAM_EVERY
        count = sum(p.numel() for p in self.model.parameters())
        self.description = f"{count} parameters, {as_flag(self.micro_seqs)} rows per forward pass"

    def compile(self, compile_fn: Callable):
        """Build what is compiled; the referee calls it, again without a compiler if one fails."""
        self.optimizers = make_optimizers(self.model, self.hp, self.rt, compile_fn)
        self.loss, self.hidden = compile_fn(self.model), compile_fn(self.model.hidden)
        self.logits = compile_fn(self.model.logits)

    def batches(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's micro-batches from this step on, on the host."""
        return micro_batches(self.hp, self.task, self.rt, self.micro_seqs, self.seed, step)

    def model_flops(self) -> float:
        """Per token, forward and backward: 6 per weight, 12 * model_dim per key seen, as in the
        first rows."""
        hp, model, keys = self.hp, self.model, 0.0
        pieces = ordered_pieces(hp, self.task, self.seed)
        packed = pack_row(pieces, self.micro_seqs[0] * hp.seq_len, hp.document_cap[0])
        rows_BT = row_tokens(packed, ahead=0).reshape(-1, hp.seq_len)
        groups = parameter_groups(model, hp)
        weights = sum(p.numel() for name in ("head", "attn", "mlp") for p in groups[name].params)
        for layer in (layer for layer in model.layers if layer.attends):
            windows = hp.window_tokens if layer.is_long else hp.short_window_tokens
            heads = 2 if layer.is_paired else 1  # half as many tokens, of both heads
            for window in windows:
                seen = mean_visible_keys(rows_BT, self.task.document_start, window // heads)
                keys += heads * seen / len(windows)
        return 6 * weights + 12 * hp.model_dim * keys

    def update(self, step: int, batches) -> Tensor:
        """Take one optimizer step; return the mean loss of this rank's share (0-D, on device)."""
        hp, rt, model = self.hp, self.rt, self.model
        total, per_step = torch.zeros((), device=rt.device), step_inputs(step, hp, rt.device)
        pass_tokens = hp.value_at_step(self.micro_seqs, step) * hp.seq_len * rt.world_size
        passes = hp.value_at_step(hp.batch_tokens, step) // pass_tokens
        for _ in range(passes):
            inputs_BT, targets_BT = next(batches)
            loss = self.loss(inputs_BT, targets_BT, per_step) / passes
            loss.backward()
            total += loss.detach()
        due = [bank for bank in self.optimizers.values() if (step + 1) % bank.group.every == 0]
        if any(p.grad is None for bank in due for p in bank.group.params):
            unused = ", ".join(n for n, p in model.named_parameters() if p.grad is None)
            raise RunError(f"the loss does not depend on {unused}; leave it out of the network")
        if step < hp.tied_frac * hp.num_steps and self.optimizers["embed"] in due:
            # Tied: both get the sum of their gradients, which keeps equal matrices equal.
            model.embed.grad = model.lm_head.grad = model.embed.grad + model.lm_head.grad
        for optimizer in due:  # Muon's first: then the tables travel while it orthogonalises
            optimizer.start_exchange()
        for optimizer in due:
            optimizer.step(step)
        for optimizer in due:
            optimizer.finish()
        return total

    def predict(self, step: int, inputs_BT: Tensor) -> Iterator[Tensor]:
        """Yield logits (n, V) for the positions of inputs, in order, in chunks."""
        per_step = step_inputs(step, self.hp, self.rt.device, training=False)
        for x_ND in self.hidden(inputs_BT, per_step).flatten(0, 1).split(LOGIT_CHUNK_TOKENS):
            yield self.logits(x_ND)

    def state(self) -> dict[str, Tensor]:
        """Every tensor that training changes, by name; live, not copies. A collective."""
        tensors = {f"model.{name}": p.data for name, p in self.model.named_parameters()}
        for group, optimizer in self.optimizers.items():
            tensors |= {f"{group}.{name}": t for name, t in optimizer.gather_state().items()}
        return tensors

    def warm_up(self):
        """Run every graph on dummy tokens, Adam's update too. The referee restores the state."""
        hp, zeros = self.hp, partial(torch.zeros, dtype=torch.int64, device=self.rt.device)
        self.model.zero_grad(set_to_none=True)
        for stage, rows in enumerate(self.micro_seqs):
            if rows in self.micro_seqs[:stage]:  # whose graphs exist
                continue
            # Two tensors: one in both places would be compiled as a special case.
            dummies = [zeros(rows, hp.seq_len) for _ in range(2)]
            first = hp.first_step(stage, len(self.micro_seqs))
            adam_is_due = first // ADAM_EVERY * ADAM_EVERY + ADAM_EVERY - 1
            self.update(first, repeat(dummies))
            self.update(adam_is_due, repeat(dummies))
        with torch.no_grad():
            for _ in self.predict(0, zeros(self.val_batch_rows, self.task.val_seq_len)):
                pass

    def steps(self, first: int) -> Iterator[tuple[Tensor, int]]:
        """Take a step per item, from this one on; give its loss and tokens."""
        hp, batches = self.hp, Prefetcher(self.batches(first), self.rt)
        return ((self.update(step, batches), hp.value_at_step(hp.batch_tokens, step))
                for step in range(first, hp.num_steps))  # fmt: skip


# ------------------------------------------------------------------------------ Main


def main() -> int:
    return execute(Trainer, TRACKS, "fineweb", PROCESS_START)


if __name__ == "__main__":
    finish(main)
