"""Train a GPT from scratch until it reaches a fixed validation loss, as fast as the hardware can.

    ./run.sh                                         1, 2, 4 or 8 GPUs of this machine, or its CPU
    torchrun --nproc_per_node=4 train_gpt.py         four GPUs, the same global batches
    python train_gpt.py --num_steps 50 --slug try    one process, an experiment

This file is the contestant: everything that an idea may change. It reads downwards: what a run is
(Hyperparameters), what a step sees (Data, Schedules), the network (Model), the updates (Optimizer),
the loop (Train). Attention, the head's loss and the MLP stand in kernels.py, each beside its GPU
version. harness.py is the referee: task, device, clock, log and the validation loss. Losses are
nats per token.
"""

import signal
import time

PROCESS_START = time.perf_counter()  # before the slow imports, so that the ledger counts them
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # so that ctrl-C shows no traceback of them

import math
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise, repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from data.shards import ShardError, open_shard
from flags import RunError, as_flag, check_ranges, option
from harness import REFEREE_FILES, Prefetcher, Run, Runtime, Task, execute, task_shards
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

HERE = Path(__file__).resolve()
SOURCES = {  # what a log embeds
    path: (HERE.parent / path).read_text() for path in (HERE.name, "kernels.py", *REFEREE_FILES)
}


# ------------------------------------------------------------------------------ Hyperparameters


@dataclass(frozen=True)
class Hyperparameters:
    """How the network is built and trained. A record changes the source, and sets no flag."""

    task: str = option("fineweb", "data, validation rows and target: a task of harness.py")
    # Each is option(default, help, least value).
    # Budget. Of several values, each holds for an equal share of the steps (a stage).
    num_steps: int = option(1500, "optimizer steps", 1)
    batch_tokens: tuple[int, ...] = option((131_072, 262_144, 393_216), "tokens per step, all "
                                           "ranks", 1)  # fmt: skip
    seq_len: int = option(16384, "tokens per training row, into which documents are packed", 2)
    document_cap: tuple[int, ...] = option((896, 2048, 2048), "longest document, tokens; 0: "
                                           "no cap, rows are cut from the stream")  # fmt: skip
    max_epochs: int = option(1, "passes over the training shards that are allowed", 1)
    val_every: int = option(125, "steps between validations", 1)
    # Model.
    layers: str = option("sSsLSs-SSsL", "one letter per layer: S short, L long window; lowercase: "
                         "heads in pairs; -: no attention")  # fmt: skip
    num_heads: int = option(6, "attention heads per layer", 1)
    head_dim: int = option(128, "width of a head, divisible by 4", 4)
    model_dim: int = option(768, "width of the residual stream", 16)
    mlp_dim: int = option(3072, "width of the MLP's hidden layer", 1)
    vocab_multiple: int = option(128, "embedding and head are padded to a multiple of this", 1)
    attn_scale: float = option(0.1, "factor on q.k after both are normed, in the first stage")
    softcap: float = option(23.0, "height of the cap on logits, see kernels.Softcap", 1)
    softcap_shift: float = option(5.0, "its shift")
    num_value_embeds: int = option(3, "value-embedding tables n, for the first and last n layers")
    bigram_rows: int = option(251_520, "rows of the hashed table of token pairs; 0: none")
    head_gates: bool = option(True, "gate each head's output by the token")
    shift_taps: int = option(0, "earlier tokens that are mixed into each sublayer's input")
    skip_from: int = option(3, "layer whose output is kept; -1: no skip", -1)
    skip_to: int = option(6, "layer to whose input it is added", -1)
    backout_from: int = option(7, "layer whose output is subtracted before the head; -1: none", -1)
    window_tokens: tuple[int, ...] = option((384, 896, 1408), "long attention window, token "
                                            "itself included; short: half", 2)  # fmt: skip
    val_window_tokens: int = option(2560, "long window in validation; 0: as in training")
    mtp_weight: float = option(0.5, "second target's weight, relative to the next token's 1")
    # Optimizer. The parameter groups stand in parameter_groups().
    muon_lr: float = option(0.023, "learning rate of hidden matrices")
    muon_decay: float = option(1.2, "their cautious weight decay, times the squared rate")
    embed_lr: float = option(0.008, "learning rate of token embeddings")
    head_lr: float = option(0.008, "learning rate of the head")
    tied_frac: float = option(0.66, "fraction of steps with head and embedding tied")
    bigram_lr: float = option(0.012, "learning rate of the table of token pairs")
    scalar_lr: float = option(0.04, "learning rate of gates and scalars")
    embed_betas: tuple[float, float] = option((0.5, 0.95), "Adam's betas of embedding and head")
    table_betas: tuple[float, float] = option((0.75, 0.95), "Adam's betas of the other tables")
    scalar_betas: tuple[float, float] = option((0.9, 0.99), "Adam's betas of gates and scalars")
    adam_decay: float = option(0.005, "cautious weight decay, see parameter_groups")
    adam_every: int = option(2, "Adam updates every n-th step, on accumulated gradients", 1)
    stage_lr: tuple[float, ...] = option((1.0, 1.52, 1.73), "factor on every learning rate")
    warmup_frac: float = option(0.0, "fraction of steps in which rates rise from 0")
    cooldown_frac: float = option(0.6, "fraction of steps in which rates fall linearly")
    final_lr_frac: float = option(0.15, "fraction of each rate that is left at the end")
    extension_steps: int = option(15, "last steps, which keep the final rates")
    momentum_warmup: int = option(300, "steps in which Muon's momentum rises")
    momentum_cooldown: int = option(50, "last steps, in which it falls again")

    def __post_init__(self):
        check_ranges(self)
        if any(tokens % self.seq_len for tokens in self.batch_tokens):
            raise RunError(f"--batch_tokens {as_flag(self.batch_tokens)} is not a multiple of "
                           f"--seq_len {self.seq_len}")  # fmt: skip
        if 0 in self.document_cap and any(self.document_cap):
            raise RunError(f"--document_cap {as_flag(self.document_cap)} mixes 0 with caps; give "
                           f"{self.seq_len} for no cap in some steps")  # fmt: skip
        letters, last = set(self.layers), len(self.layers) - 1
        if not letters & set("SLsl") or letters - set("SLsl-"):
            raise RunError("--layers must be of S, L, s, l and -, and not of - alone")
        if self.head_dim % 4:
            raise RunError(f"--head_dim {self.head_dim} does not divide by 4")
        if self.num_heads % 2 and letters & set("sl"):
            raise RunError(f"--num_heads {self.num_heads} is odd, so --layers {self.layers} cannot "
                           "pair heads")  # fmt: skip
        if self.backout_from > last or self.num_value_embeds > last + 1:
            raise RunError("--backout_from and --num_value_embeds must stay within --layers")
        if self.skip_from >= 0 and not self.skip_from < self.skip_to <= last:
            raise RunError(f"--skip_from {self.skip_from} and --skip_to {self.skip_to} must rise "
                           f"below the {last + 1} layers; no skip: --skip_from -1")  # fmt: skip
        if self.tied_frac and self.embed_lr != self.head_lr:
            raise RunError("--embed_lr and --head_lr must be equal with --tied_frac above 0")

    def stage(self, values: tuple, step: int) -> int:
        """Index of the value that holds in this step: each holds for an equal share of steps."""
        return min(len(values) * step // self.num_steps, len(values) - 1)

    def at(self, values: tuple, step: int):
        return values[self.stage(values, step)]


TRACKS = {
    "fineweb": Hyperparameters(),
    "fineweb_medium": Hyperparameters(
        task="fineweb_medium",
        num_steps=5960,
        batch_tokens=(524_288,),
        document_cap=(2048,),
        stage_lr=(1.0,),
        layers="sSsLSsSLSsSLSsSL",
        num_heads=8,
        model_dim=1024,
        mlp_dim=4096,
        skip_from=5,
        skip_to=11,
        backout_from=10,
        muon_lr=0.025,
    ),
    "wikitext103": Hyperparameters(
        task="wikitext103",
        batch_tokens=(131_072,),
        document_cap=(0,),
        stage_lr=(1.0,),
        max_epochs=4,
    ),
    "embedded": Hyperparameters(
        task="embedded",
        num_steps=800,
        batch_tokens=(2048,),
        seq_len=256,
        document_cap=(0,),
        val_every=160,
        layers="SL",
        num_heads=2,
        head_dim=64,
        model_dim=128,
        mlp_dim=512,
        vocab_multiple=1,
        attn_scale=0.12,
        softcap=30.0,
        softcap_shift=0.0,
        num_value_embeds=0,
        bigram_rows=16384,
        head_gates=False,
        shift_taps=3,
        skip_from=-1,
        skip_to=-1,
        backout_from=-1,
        window_tokens=(256,),
        val_window_tokens=0,
        mtp_weight=0.0,
        muon_lr=0.02,
        muon_decay=0.0,
        embed_lr=0.02,
        head_lr=0.008,
        tied_frac=0.0,
        bigram_lr=0.06,
        scalar_lr=0.02,
        embed_betas=(0.8, 0.95),
        table_betas=(0.8, 0.95),
        scalar_betas=(0.8, 0.95),
        adam_decay=0.0,
        adam_every=1,
        stage_lr=(1.0,),
        warmup_frac=0.02,
        cooldown_frac=0.5,
        final_lr_frac=0.0,
        extension_steps=0,
        momentum_warmup=3000,
        momentum_cooldown=0,
    ),
}


class Layer(NamedTuple):
    """One letter of hp.layers."""

    attends: bool  # else it has an MLP only
    is_long: bool  # which of the two windows it has
    is_paired: bool  # heads attend two by two, as one of twice the length
    value_embed: int | None  # value-embedding table that it adds


def parse_layers(hp: Hyperparameters) -> list[Layer]:
    layers, first_late = [], len(hp.layers) - hp.num_value_embeds
    for i, letter in enumerate(hp.layers):
        late = i - first_late if i >= first_late else None
        table = i if i < hp.num_value_embeds else late
        layers.append(Layer(letter != "-", letter in "lL", letter in "ls", table))
    return layers


def padded_vocab(task: Task, hp: Hyperparameters) -> int:
    return math.ceil(task.vocab_size / hp.vocab_multiple) * hp.vocab_multiple


# ------------------------------------------------------------------------------ Data
#
# Shards are streams of documents. A training row is packed from pieces of them, (tokens, start,
# length); the rows of a step are dealt to the micro-batches of all ranks.

Piece = tuple[np.ndarray, int, int]


def find_documents(tokens: np.ndarray, document_start: int) -> tuple[np.ndarray, np.ndarray]:
    """(starts, lengths) of a shard's documents; its last token is a target only."""
    starts = np.flatnonzero(tokens[:-1] == document_start)
    return starts, np.diff(starts, append=len(tokens) - 1)


def find_rows(tokens: np.ndarray, document_start: int, seq_len: int):
    """(starts, lengths) of a shard's rows where documents have no cap; lengths are all seq_len.

    Rows are cut one after another. If a document starts within the next seq_len tokens, the next
    row begins there, and what lies before is left out; else it continues the current document.
    """
    documents = find_documents(tokens, document_start)[0].tolist()
    starts, position = [], documents[0] if documents else 0
    while position + seq_len < len(tokens):
        starts.append(position)
        position += seq_len
        following = bisect_left(documents, position)
        if following < len(documents) and documents[following] < position + seq_len:
            position = documents[following]
    return np.array(starts, np.int64), np.full(len(starts), seq_len)


@cache  # check_supply asks first: a large shard takes 0.2 s, outside the timed part
def shard_pieces(path: Path, hp: Hyperparameters, document_start: int):
    """(tokens, starts, lengths) of a shard's documents, or of its rows where they have no cap."""
    tokens = open_shard(path)
    if max(hp.document_cap):
        return tokens, *find_documents(tokens, document_start)
    return tokens, *find_rows(tokens, document_start, hp.seq_len)


def shuffled_pieces(hp: Hyperparameters, task: Task, seed: int) -> Iterator[Piece]:
    """Documents, or whole rows where they have no cap: shard by shard, shuffled in each."""
    for epoch in range(hp.max_epochs):
        for index, path in enumerate(task_shards(task.train_files)):
            tokens, starts, lengths = shard_pieces(path, hp, task.document_start)
            order = np.random.default_rng((seed, epoch, index)).permutation(len(starts))
            yield from zip(repeat(tokens), starts[order], lengths[order], strict=False)


def pack_row(pieces: Iterator[Piece], seq_len: int, cap: int) -> list[Piece]:
    """Pieces of at most cap tokens (0: any length) that fill a row; the rest of each is dropped."""
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
    """int64 (seq_len,): a row's inputs (ahead 0), or its targets (1), the tokens that follow."""
    parts = [tokens[start + ahead : start + ahead + length] for tokens, start, length in row]
    return np.concatenate(parts).astype(np.int64)


def micro_batches(hp: Hyperparameters, task: Task, rt: Runtime, micro_seqs, seed: int, step: int):
    """Yield this rank's (inputs, targets), int64 (micro_seqs, seq_len) each, from this step on.

    The rows of a step are dealt to accumulation x ranks equal micro-batches, so that its global
    batch is the same for any number of ranks.
    """
    pieces = shuffled_pieces(hp, task, seed)
    for s in range(hp.num_steps):
        cap, count = hp.at(hp.document_cap, s), hp.at(hp.batch_tokens, s) // hp.seq_len
        step_rows = [pack_row(pieces, hp.seq_len, cap) for _ in range(count)]
        if s < step:
            continue
        for first in range(rt.rank * micro_seqs, count, rt.world_size * micro_seqs):
            chosen = step_rows[first : first + micro_seqs]
            inputs = np.stack([row_tokens(row, ahead=0) for row in chosen])
            targets = np.stack([row_tokens(row, ahead=1) for row in chosen])
            yield torch.from_numpy(inputs), torch.from_numpy(targets)


def check_supply(hp: Hyperparameters, task: Task, seed: int) -> None:
    """ShardError unless the training shards hold every row of every step, packed as they will be.

    Of several caps the shortest counts, which makes the fewest rows.
    """
    stages, cap, room = len(hp.batch_tokens), min(hp.document_cap), hp.seq_len
    firsts = [-(-i * hp.num_steps // stages) for i in range(stages + 1)]  # step of each stage
    steps = [end - first for first, end in pairwise(firsts)]
    needed = sum(n * t // hp.seq_len for n, t in zip(steps, hp.batch_tokens, strict=True))
    tokens = sum(len(open_shard(path)) for path in task_shards(task.train_files))
    held = hp.max_epochs * tokens // hp.seq_len
    if held >= needed:  # else there is no need to count them
        held = 0
        for *_, length in shuffled_pieces(hp, task, seed):
            room -= min(length, cap or length)
            if room <= 0:
                held, room = held + 1, hp.seq_len
            if held == needed:
                return
    raise ShardError(f"{task.train_files} holds {held} rows of {hp.seq_len} tokens in "
                     f"{hp.max_epochs} passes, {hp.num_steps} steps need {needed}",
                     "get more shards, or lower --num_steps")  # fmt: skip


# ------------------------------------------------------------------------------ Schedules

ROTARY_BASE = 1024.0  # tokens per radian of the lowest rotary frequency
MOMENTUM_LOW, MOMENTUM_RISE = 0.85, 0.10  # Muon's momentum at both ends, and its rise between


def lr_scale(step: int, hp: Hyperparameters) -> float:
    """Factor on every rate: a trapezoid over the run, times the stage's; level in the extension."""
    rise = (step + 1) / max(hp.warmup_frac * hp.num_steps, 1)
    fall = (hp.num_steps - hp.extension_steps - step) / max(hp.cooldown_frac * hp.num_steps, 1)
    level = hp.final_lr_frac + (1 - hp.final_lr_frac) * min(1.0, max(0.0, fall))
    return hp.at(hp.stage_lr, step) * min(1.0, rise, level)


def muon_momentum(step: int, hp: Hyperparameters) -> float:
    rise = step / max(hp.momentum_warmup, 1)
    fall = (hp.num_steps - step) / max(hp.momentum_cooldown, 1)
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
    """((K/4,) radians per token, attention scale) after every growth of the window so far.

    Low frequencies are stretched with the window (YaRN, arXiv 2309.00071).
    """
    frequency = ROTARY_BASE ** -torch.linspace(0, 1, hp.head_dim // 4)
    scale, stage = hp.attn_scale, hp.stage(hp.window_tokens, step)
    for old, new in pairwise(hp.window_tokens[: stage + 1]):
        turns = old * frequency / (2 * math.pi)
        kept = ((turns - 1) / 31).clamp(0, 1)
        frequency = frequency * (old / new + kept * (1 - old / new))
        scale *= 1 + 0.2 * math.log(new / old)
    return frequency, scale


class StepInputs(NamedTuple):
    """Per-step inputs of the network, as tensors, so that no step recompiles."""

    window: Tensor  # 0-D, tokens in the long window
    frequency: Tensor  # (K/4,) radians per token, of the rotary pairs
    attn_scale: Tensor  # 0-D
    mtp_weights: Tensor  # (J,) of the target one token ahead, two ahead, ...


def step_inputs(step: int, hp: Hyperparameters, device, training: bool = True) -> StepInputs:
    """Validation has its own window, and does not use mtp_weights."""
    window = hp.at(hp.window_tokens, step)
    if not training and hp.val_window_tokens:
        window = hp.val_window_tokens
    weights = mtp_weights(step, hp) if training else [1.0]
    values = (window, *rotary_frequencies(step, hp), weights)
    return StepInputs(*(torch.as_tensor(v).to(device, non_blocking=True) for v in values))


# ------------------------------------------------------------------------------ Model
#
# Shapes: B sequences, T tokens, D model_dim, H heads, K head_dim, M mlp_dim, V vocabulary, J
# targets per token, S earlier tokens, N = B * T. The residual stream x is (B, T, D).


GATE_DIM = 12  # leading dimensions of the stream that gates read
LOGIT_SLOPE = 7.5
LOGIT_CHUNK_TOKENS = 4096  # tokens whose fp32 logits are in memory at a time in validation


def norm(x: Tensor) -> Tensor:
    """RMSNorm without parameters, over the last dimension (arXiv 1910.07467)."""
    return x * torch.rsqrt((x * x).float().mean(-1, keepdim=True) + 1e-6).type_as(x)


def rotary_tables(seq_len: int, frequency: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 (T, 1, K/4): a quarter of the head turns against another quarter.

    The other half of the dimensions keeps frequency 0 (rotary: arXiv 2104.09864).
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
    """Two heads as one, (B, 2T, H/2, K): 2t + i is head i of token t, a window is half as long."""
    B, T, H, K = x_BTHK.shape
    return x_BTHK.view(B, T, 2, H // 2, K).reshape(B, 2 * T, H // 2, K)


def parameter_if(wanted, initial: Tensor) -> nn.Parameter | None:
    return nn.Parameter(initial) if wanted else None


class Context(NamedTuple):
    """What every layer gets beside the stream."""

    cos: Tensor
    sin: Tensor
    attn_scale: Tensor
    masks: dict[tuple[bool, bool], BlockMask | Tensor]  # by Layer's (is_long, is_paired)
    same_doc_SBT1: Tensor  # 1 where the token s + 1 before lies in the same document, else 0


class Attention(nn.Module):
    """QK-normed rotary attention; o is stored (in, out) so that all four share one shape."""

    def __init__(self, hp: Hyperparameters, rt: Runtime, layer: Layer):
        super().__init__()
        self.heads, self.dtype, self.layer = hp.num_heads, rt.matmul_dtype, layer
        self.kernel_options = flex_options(rt.shared_memory_bytes)
        has_table = layer.value_embed is not None
        self.qkvo = nn.Parameter(torch.empty(4, hp.num_heads * hp.head_dim, hp.model_dim))
        self.value_gate = parameter_if(has_table, torch.zeros(hp.num_heads, GATE_DIM))
        self.head_gate = parameter_if(hp.head_gates, torch.zeros(hp.num_heads, GATE_DIM))

    def forward(self, x: Tensor, value_BTHK: Tensor | None, c: Context) -> Tensor:
        """value: rows of a value-embedding table, added to v, or None."""
        B, T, _ = x.shape
        qkv, o = self.qkvo.split([3, 1])
        q, k, v = linear(x, qkv.flatten(0, 1), self.dtype).view(B, T, 3, self.heads, -1).unbind(2)
        if value_BTHK is not None:  # arXiv 2410.17897, gated
            v = v + gate(x, self.value_gate) * value_BTHK
        q, k = norm(q) * c.attn_scale.type_as(q), norm(k)
        if self.layer.is_long:
            # The half of a key that is not rotated is the one of the token before: a query can then
            # find what followed its own token.
            rotated, fixed = k.chunk(2, dim=-1)
            k = torch.cat([rotated, fixed.roll(1, 1) * c.same_doc_SBT1[0, ..., None]], dim=-1)
        if self.layer.is_paired:
            q, k, v = pair_heads(q), pair_heads(k), pair_heads(v)
        q, k = rotate(q, c.cos, c.sin), rotate(k, c.cos, c.sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        mask = c.masks[self.layer.is_long, self.layer.is_paired]
        y_BHTK = attend(*(t.to(self.dtype) for t in (q, k, v)), mask, self.kernel_options)
        y_BTHK = y_BHTK.type_as(x).transpose(1, 2).reshape(B, T, self.heads, -1)  # unpairs heads
        if self.head_gate is not None:
            y_BTHK = gate(x, self.head_gate) * y_BTHK
        return linear(y_BTHK.flatten(2), o[0].T, self.dtype)


def gate(x: Tensor, weight_HG: Tensor) -> Tensor:
    """Factors (B, T, H, 1) between 0 and 2 from the leading dimensions of x; 1 for weight 0."""
    return 2 * torch.sigmoid(F.linear(x[..., :GATE_DIM], weight_HG.type_as(x)))[..., None]


class MLP(nn.Module):
    """ReLU squared (arXiv 2109.08668); down is stored (in, out), shaped like up."""

    def __init__(self, hp: Hyperparameters, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.up_down = nn.Parameter(torch.empty(2, hp.mlp_dim, hp.model_dim))

    def forward(self, x: Tensor) -> Tensor:
        return relu_squared_mlp(x.flatten(0, 1), *self.up_down.unbind(), self.dtype).view_as(x)


def mix_earlier_tokens(x: Tensor, taps_SD: Tensor, same_doc_SBT1: Tensor) -> Tensor:
    """x plus the S tokens before it, weighted by channel: a causal depthwise convolution.

    Primer (arXiv 2109.08668) convolves queries, keys and values; here every sublayer's input is.
    """
    mixed = x
    for i, (tap, same_doc) in enumerate(zip(taps_SD, same_doc_SBT1, strict=True)):
        mixed = mixed + tap * same_doc * x.roll(i + 1, 1)
    return mixed


class Block(nn.Module):
    """Attention and MLP on the residual stream, into which the embedding x0 is mixed again."""

    def __init__(self, hp: Hyperparameters, rt: Runtime, layer: Layer):
        super().__init__()
        self.attn = Attention(hp, rt, layer) if layer.attends else None
        self.mlp = MLP(hp, rt.matmul_dtype)
        self.mix = nn.Parameter(torch.tensor([1.0, 0.0]))  # weights of x and x0
        self.taps = parameter_if(hp.shift_taps, torch.zeros(2, hp.shift_taps, hp.model_dim))

    def forward(self, x: Tensor, x0: Tensor, value_BTHK: Tensor | None, c: Context) -> Tensor:
        mix = self.mix.type_as(x)
        x = mix[0] * x + mix[1] * x0
        if self.attn is not None:
            x = x + self.attn(self.sublayer_input(x, 0, c), value_BTHK, c)
        return x + self.mlp(self.sublayer_input(x, 1, c))

    def sublayer_input(self, x: Tensor, sublayer: int, c: Context) -> Tensor:
        """Normed, with earlier tokens mixed in; sublayer: attention 0, MLP 1."""
        x = norm(x)
        if self.taps is None:
            return x
        return mix_earlier_tokens(x, self.taps[sublayer].type_as(x), c.same_doc_SBT1)


class GPT(nn.Module):
    """Tokens to mean loss. The head starts at or near 0, so the first loss is near ln V."""

    def __init__(self, hp: Hyperparameters, task: Task, rt: Runtime):
        super().__init__()
        self.hp, self.rt, self.document_start = hp, rt, task.document_start
        self.layers, vocab = parse_layers(hp), padded_vocab(task, hp)
        self.cap = Softcap(hp.softcap, hp.softcap_shift, LOGIT_SLOPE)
        self.embed = nn.Parameter(torch.randn(vocab, hp.model_dim))
        width, count = hp.num_heads * hp.head_dim, hp.num_value_embeds
        self.value_embeds = parameter_if(count, 0.01 * torch.randn(count, vocab, width))
        self.bigram = parameter_if(hp.bigram_rows, torch.zeros(hp.bigram_rows, hp.model_dim))
        self.blocks = nn.ModuleList(Block(hp, rt, layer) for layer in self.layers)
        self.lm_head = nn.Parameter(torch.zeros(vocab, hp.model_dim))
        self.smear = nn.Parameter(torch.zeros(GATE_DIM + 1))  # gate weights, then strength
        self.skip_gate = parameter_if(hp.skip_from >= 0, torch.tensor(-1.5))
        self.backout = parameter_if(hp.backout_from >= 0, torch.tensor(0.0))
        bound = 3**0.5 * 0.5 * hp.model_dim**-0.5  # uniform with std 0.5 / sqrt(D)
        for block in self.blocks:
            block.mlp.up_down.data.uniform_(-bound, bound)[1].zero_()
            if block.attn is not None:
                block.attn.qkvo.data.uniform_(-bound, bound)[3].zero_()
                if block.attn.layer.is_long:
                    # Where keys are those of the token before, queries start equal to them: a token
                    # looks for its own earlier occurrences, and copying (induction heads, arXiv
                    # 2209.11895) sets in at once, not when training happens to find it.
                    halves = block.attn.qkvo.data.unflatten(1, (hp.num_heads, 2, -1))
                    halves[0, :, 1] = halves[1, :, 1]
        if hp.tied_frac:  # Trainer.update keeps the two equal
            self.lm_head.data.copy_(self.embed.data.mul_(0.005))

    def embed_tokens(self, inputs_BT: Tensor, same_doc_BT1: Tensor) -> Tensor:
        """Embedding plus hashed pair (arXiv 1709.03933), smeared with the token before.

        same_doc: 1 where the token before lies in the same document; else that token is ignored.
        """
        x = self.embed[inputs_BT].to(self.rt.stream_dtype)
        if self.hp.bigram_rows:
            in_document = same_doc_BT1[..., 0] > 0
            before_BT = torch.where(in_document, inputs_BT.roll(1, 1), self.document_start)
            row_BT = ((36313 * inputs_BT) ^ (27191 * before_BT)) % self.hp.bigram_rows
            x = x + self.bigram[row_BT].type_as(x)
        x = norm(x)
        weights, strength = self.smear.type_as(x).split([GATE_DIM, 1])
        share_BT1 = strength * torch.sigmoid(x[..., :GATE_DIM] @ weights)[..., None]
        return norm(x + share_BT1 * same_doc_BT1 * x.roll(1, 1))

    def context(self, docs_BT: Tensor, per_step: StepInputs) -> Context:
        hp, T = self.hp, docs_BT.size(1)
        attending = [layer for layer in self.layers if layer.attends]
        has_pairs = any(layer.is_paired for layer in attending)
        paired_docs = docs_BT.repeat_interleave(2, dim=1) if has_pairs else docs_BT
        longest, masks = max(*hp.window_tokens, hp.val_window_tokens), {}
        for is_long, is_paired in sorted({(layer.is_long, layer.is_paired) for layer in attending}):
            window = per_step.window if is_long else per_step.window // 2
            docs = paired_docs if is_paired else docs_BT
            masks[is_long, is_paired] = attention_mask(docs, window, longest // (2 - is_long))
        place = torch.arange(T, device=docs_BT.device)
        same_doc = [(docs_BT == docs_BT.roll(j, 1)) & (place >= j)
                    for j in range(1, 1 + max(1, hp.shift_taps))]  # fmt: skip
        same_doc_SBT1 = torch.stack(same_doc)[..., None].to(self.rt.stream_dtype)
        tables = rotary_tables(2 * T if has_pairs else T, per_step.frequency)
        return Context(*tables, per_step.attn_scale, masks, same_doc_SBT1)

    def hidden(self, inputs_BT: Tensor, per_step: StepInputs) -> Tensor:
        """The normed stream (B, T, D) that the head reads."""
        hp, (B, T) = self.hp, inputs_BT.shape
        c = self.context(self.document_index(inputs_BT), per_step)
        x = x0 = self.embed_tokens(inputs_BT, c.same_doc_SBT1[0])
        tables = () if self.value_embeds is None else self.value_embeds.unbind()
        values = [t[inputs_BT].type_as(x).view(B, T, hp.num_heads, hp.head_dim) for t in tables]
        skipped = backed_out = None
        for i, (layer, block) in enumerate(zip(self.layers, self.blocks, strict=True)):
            if i == hp.skip_to and skipped is not None:
                x = x + torch.sigmoid(self.skip_gate).type_as(x) * skipped
            value_BTHK = None if layer.value_embed is None else values[layer.value_embed]
            x = block(x, x0, value_BTHK, c)
            skipped = x if i == hp.skip_from else skipped
            backed_out = x if i == hp.backout_from else backed_out
        if backed_out is not None:
            x = x - self.backout.type_as(x) * backed_out
        return norm(x)

    def document_index(self, inputs_BT: Tensor) -> Tensor:
        """(B, T), counts up along a row where documents begin."""
        return (inputs_BT == self.document_start).cumsum(1)

    def logits(self, x: Tensor) -> Tensor:
        """Capped logits (..., V), fp32, of the normed stream (..., D)."""
        return softcapped(linear(x, self.lm_head, self.rt.matmul_dtype), self.cap)

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor, per_step: StepInputs) -> Tensor:
        """Cross-entropy of the targets, weighted by per_step.mtp_weights: 0-D, fp32."""
        docs_BT = self.document_index(inputs_BT)
        targets = [targets_BT]
        for ahead in range(1, len(per_step.mtp_weights)):
            targets.append(further_targets(targets_BT, docs_BT, ahead))
        targets_NJ = torch.stack(targets, dim=-1).flatten(0, 1)
        x_ND = self.hidden(inputs_BT, per_step).flatten(0, 1)
        return head_loss(x_ND, self.lm_head, targets_NJ, per_step.mtp_weights, self.cap,
                         self.rt.matmul_dtype, self.rt.has_fp8)  # fmt: skip


def further_targets(targets_BT: Tensor, docs_BT: Tensor, ahead: int) -> Tensor:
    """The targets so many tokens later; -1, which does not count, beyond document or row."""
    in_document = docs_BT[:, ahead:] == docs_BT[:, :-ahead]
    later = torch.where(in_document, targets_BT[:, ahead:], -1)
    return F.pad(later, (0, ahead), value=-1)


# ------------------------------------------------------------------------------ Optimizer

POLAR_EXPRESS = (  # arXiv 2505.16932: the best quintic for each Newton-Schulz step
    (8.1566, -22.4833, 15.8788),
    (4.0429, -2.8089, 0.5000),
    (3.8917, -2.7725, 0.5061),
    (3.2858, -2.3681, 0.4645),
    (2.3465, -1.7098, 0.4232),
)


def orthogonalize(G: Tensor, dtype: torch.dtype) -> Tensor:
    """The orthogonal factor of each matrix in G (N, rows, cols): singular values become about 1."""
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


def join_fp32(high: Tensor, low: Tensor) -> Tensor:
    """The inverse of split_fp32."""
    return ((high.view(torch.int16).int() << 16) | (low.int() & 0xFFFF)).view(torch.float32)


def weights_to_decay(W: Tensor, U: Tensor) -> Tensor:
    """W where the update U shrinks it, else 0: cautious weight decay (arXiv 2510.12402)."""
    return W * (U * W > 0)


def muon_update(W, low, G, momentum, second, lr, decay, beta, dtype):
    """Update matrices W (N, rows, cols) in place with gradients G; lr, decay, beta: 0-D tensors.

    W is fp32, or the bf16 part of split_fp32 with low as the other. Nesterov momentum is
    orthogonalised (Muon: kellerjordan.github.io/posts/muon), then each row is divided by its
    running root mean square at unchanged norm (NorMuon, arXiv 2510.05491). second: (N, rows, 1).
    """
    momentum.add_((1 - beta) * (G.float() - momentum))
    U = orthogonalize(G + beta * (momentum - G), dtype)
    second.lerp_((U * U).mean(-1, keepdim=True), 0.1)
    scaled = U * torch.rsqrt(second + 1e-10)
    U_norm, scaled_norm = (x.norm(dim=(-2, -1), keepdim=True) for x in (U, scaled))
    U = scaled * (U_norm / (scaled_norm + 1e-10))
    shape_factor = max(1.0, W.size(-2) / W.size(-1)) ** 0.5
    W_fp32 = W if low is None else join_fp32(W, low)
    W_fp32 = W_fp32 - lr * (shape_factor * U + lr * decay * weights_to_decay(W_fp32, U))
    if low is None:
        W.copy_(W_fp32)
    else:
        new_high, new_low = split_fp32(W_fp32)
        W.copy_(new_high)
        low.copy_(new_low)


class Group(NamedTuple):
    """Parameters that are updated alike. The learning rate is scaled by lr_scale."""

    optimizer: type
    params: list[nn.Parameter]
    lr: float
    betas: tuple[float, float] | None  # of Adam; those of Muon: muon_momentum and 0.9
    decay: float  # cautious, of a weight w: decay * lr^2 * w
    every: int  # updated every n-th step, on accumulated gradients


class Muon:
    """Matrices of one shape, as views of one bank (N, rows, cols) that is updated as one batch.

    Each rank updates its part of the bank, then all parts are gathered. Where the stream is bf16 so
    is the bank, and low holds the lower 16 bits of its fp32 weights.
    """

    def __init__(self, group: Group, rt: Runtime, compile_fn: Callable):
        self.group, self.rt, self.low = group, rt, None
        self.update = compile_fn(muon_update)
        self.bank = torch.cat([p.data for p in group.params]).float()
        if rt.stream_dtype == torch.bfloat16:
            self.bank, self.low = split_fp32(self.bank)
        views = self.bank.split([len(p) for p in group.params])
        for p, view in zip(group.params, views, strict=True):
            p.data = view
        self.mine = rt.my_part(len(self.bank))
        self.momentum = torch.zeros_like(self.bank, dtype=torch.float32)
        self.second = torch.zeros_like(self.momentum[..., :1])

    def step(self, scale: float, momentum: float):
        gradients = torch.cat([p.grad for p in self.group.params])[self.mine]
        if len(gradients):
            low = None if self.low is None else self.low[self.mine]
            state = self.momentum[self.mine], self.second[self.mine]
            numbers = (self.group.lr * scale, self.group.decay, momentum)
            numbers = (torch.tensor(x) for x in numbers)  # else each value would compile anew
            mine, dtype = self.bank[self.mine], self.rt.matmul_dtype
            self.update(mine, low, gradients, *state, *numbers, dtype)
        self.rt.gather_parts(self.bank)

    def gather_state(self) -> dict[str, Tensor]:
        """The state, whole on every rank. A collective: every rank calls it."""
        tensors = {"momentum": self.momentum, "second": self.second}
        if self.low is not None:  # as bf16, for collectives know no int16
            tensors["low"] = self.low.view(torch.bfloat16)
        for tensor in tensors.values():
            self.rt.gather_parts(tensor)
        return tensors


class Adam:
    """torch's fused Adam (arXiv 1412.6980), then cautious decay; every rank updates everything."""

    def __init__(self, group: Group, rt: Runtime, compile_fn: Callable):
        self.group, self.rt, self.weights_to_decay = group, rt, compile_fn(weights_to_decay)
        self.adam = torch.optim.Adam(group.params, group.lr, group.betas, 1e-10, fused=True)

    @torch.no_grad()
    def step(self, scale: float, momentum: float):
        lr = self.group.lr * scale
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        if self.group.decay:
            for p in self.group.params:
                update = self.adam.state[p]["exp_avg"]
                p.sub_(self.weights_to_decay(p, update), alpha=lr * lr * self.group.decay)

    def gather_state(self) -> dict[str, Tensor]:
        """Moments, step counts, and accumulated gradients. A collective: every rank calls it."""
        tensors = {}
        for i, p in enumerate(self.group.params):
            tensors |= {f"{name}{i}": t for name, t in self.adam.state[p].items()}
            if self.group.every > 1:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                self.rt.average([p.grad])
                tensors[f"grad{i}"] = p.grad
        return tensors


def parameter_groups(model: GPT, hp: Hyperparameters) -> dict[str, Group]:
    """The one table of parameter groups; a group without parameters is left out."""
    attn = [block.attn for block in model.blocks if block.attn is not None]
    qkvo, up_down = [a.qkvo for a in attn], [block.mlp.up_down for block in model.blocks]
    scalars = [p for block in model.blocks for p in (block.mix, block.taps)]
    scalars += [p for a in attn for p in (a.value_gate, a.head_gate)]
    scalars += [model.smear, model.skip_gate, model.backout]
    tables, decay, every = hp.table_betas, hp.adam_decay, hp.adam_every
    rows = {  # optimizer, parameters, learning rate, betas, decay, steps per update
        "attn": (Muon, qkvo, hp.muon_lr, None, hp.muon_decay, 1),
        "mlp": (Muon, up_down, hp.muon_lr, None, hp.muon_decay, 1),
        "embed": (Adam, [model.embed], hp.embed_lr, hp.embed_betas, 150 * decay, every),
        "head": (Adam, [model.lm_head], hp.head_lr, hp.embed_betas, 150 * decay, every),
        "values": (Adam, [model.value_embeds], 0.6, tables, 5 * decay, every),
        "bigram": (Adam, [model.bigram], hp.bigram_lr, tables, 5 * decay, every),
        "scalars": (Adam, scalars, hp.scalar_lr, hp.scalar_betas, 0.0, every),
    }
    groups = {}
    for name, (optimizer, params, *settings) in rows.items():
        if present := [p for p in params if p is not None]:
            groups[name] = Group(optimizer, present, *settings)
    return groups


def make_optimizers(model: GPT, hp: Hyperparameters, rt: Runtime, compile_fn: Callable) -> dict:
    """An optimizer per group, by name. AssertionError unless each parameter is in one group."""
    groups = parameter_groups(model, hp)
    grouped = sorted(id(p) for group in groups.values() for p in group.params)
    assert grouped == sorted(map(id, model.parameters())), "a parameter is not in just one group"
    return {name: group.optimizer(group, rt, compile_fn) for name, group in groups.items()}


# ------------------------------------------------------------------------------ Train


def memory_estimate(hp: Hyperparameters, vocab: int, rows: int) -> float:
    """Peak bytes on a GPU with so many rows per forward pass; fitted to tools/preflight.py."""
    width, tables = hp.num_heads * hp.head_dim, 2 + hp.num_value_embeds
    matrices = len(hp.layers) * hp.model_dim * (4 * width + 2 * hp.mlp_dim)
    weights = 12 * matrices + 16 * (tables * vocab + hp.bigram_rows) * hp.model_dim
    tokens = rows * hp.seq_len
    kept = 2 * len(hp.layers) * (13 * hp.model_dim + hp.mlp_dim) * tokens  # for the backward pass
    update = 4 * hp.bigram_rows * hp.model_dim  # one table's, after the backward pass
    return weights + max(kept + 4 * min(tokens, HEAD_CHUNK_TOKENS) * vocab, update)


def choose_micro_batch(hp: Hyperparameters, vocab: int, rt: Runtime, asked: int) -> int:
    """Rows per forward pass: what was asked for, or the most that divides and fits in memory."""
    rows = math.gcd(*hp.batch_tokens) // hp.seq_len
    share = rows // rt.world_size
    if rows % rt.world_size or (asked and share % asked):
        raise RunError(
            f"{rows} rows per step cannot be dealt to {rt.world_size} ranks in equal forward "
            f"passes of {asked or 1}; change --nproc_per_node or --micro_batch_seqs"
        )
    divisors = [n for n in range(1, share + 1) if share % n == 0]
    fitting = [n for n in divisors if memory_estimate(hp, vocab, n) < 0.9 * rt.memory_bytes]
    return asked or max(fitting, default=1)


class Trainer:
    """A model, its optimizers and data, and the steps that join them."""

    def __init__(self, run: Run):
        self.run, self.hp, self.task, self.rt = run, run.hp, run.task, run.rt
        hp, task, rt, vocab = run.hp, run.task, run.rt, padded_vocab(run.task, run.hp)
        if rt.is_gpu and (hp.seq_len % BLOCK or task.val_seq_len % BLOCK):
            raise RunError(f"--seq_len and --val_seq_len must divide by {BLOCK} on a GPU")
        check_supply(hp, task, run.options.seed)
        self.micro_seqs = choose_micro_batch(hp, vocab, rt, run.options.micro_batch_seqs)
        val_rows = self.micro_seqs * hp.seq_len // task.val_seq_len
        self.val_batch_rows = run.validation.batch_rows(val_rows)
        torch.manual_seed(run.options.seed)
        with rt.device:
            self.model = GPT(hp, task, rt)
        run.micro_batch_seqs, run.flops_per_token = self.micro_seqs, self.flops_per_token()
        run.log.line(f"micro_batch_seqs: {self.micro_seqs} of {hp.seq_len} tokens")
        run.log.line(f"parameters: {sum(p.numel() for p in self.model.parameters())}")

    def compile(self, compile_fn: Callable):
        """Build what is compiled; the referee calls it, again without a compiler if one fails."""
        self.optimizers = make_optimizers(self.model, self.hp, self.rt, compile_fn)
        self.loss, self.hidden = compile_fn(self.model), compile_fn(self.model.hidden)
        self.logits = compile_fn(self.model.logits)

    def batches(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's micro-batches from this step on, on the host."""
        seed = self.run.options.seed
        return micro_batches(self.hp, self.task, self.rt, self.micro_seqs, seed, step)

    def flops_per_token(self) -> float:
        """Forward and backward: 6 per weight, 12 per visible key and head width.

        Keys are counted in the first step's rows, as the mean over the stages' windows.
        """
        hp, model, keys = self.hp, self.model, 0.0
        pieces = shuffled_pieces(hp, self.task, self.run.options.seed)
        packed = pack_row(pieces, self.micro_seqs * hp.seq_len, hp.document_cap[0])
        rows_BT = row_tokens(packed, ahead=0).reshape(-1, hp.seq_len)
        groups = parameter_groups(model, hp)
        matrices = [model.lm_head, *groups["attn"].params, *groups["mlp"].params]
        weights = sum(p.numel() for p in matrices)
        for layer in (layer for layer in model.layers if layer.attends):
            for window in hp.window_tokens:
                reach = window if layer.is_long else window // 2
                heads = 2 if layer.is_paired else 1  # half as many tokens, of both heads
                keys += heads * mean_visible_keys(rows_BT, self.task.document_start, reach // heads)
        return 6 * weights + 12 * hp.num_heads * hp.head_dim * keys / len(hp.window_tokens)

    def update(self, step: int, batches) -> Tensor:
        """Take one optimizer step; return the mean loss of this rank's share (0-D, on device)."""
        hp, rt, model = self.hp, self.rt, self.model
        total, per_step = torch.zeros((), device=rt.device), step_inputs(step, hp, rt.device)
        count = hp.at(hp.batch_tokens, step) // (hp.seq_len * rt.world_size * self.micro_seqs)
        for _ in range(count):
            inputs_BT, targets_BT = next(batches)
            loss = self.loss(inputs_BT, targets_BT, per_step) / count
            loss.backward()
            total += loss.detach()
        due = [o for o in self.optimizers.values() if (step + 1) % o.group.every == 0]
        params = [p for optimizer in due for p in optimizer.group.params]
        if any(p.grad is None for p in params):
            unused = ", ".join(n for n, p in model.named_parameters() if p.grad is None)
            raise RunError(f"the loss does not depend on {unused}; leave it out of the network")
        rt.average([p.grad for p in params])
        if step < hp.tied_frac * hp.num_steps and self.optimizers["embed"] in due:
            # Tied: both get the sum of their gradients, which keeps equal matrices equal.
            model.embed.grad = model.lm_head.grad = model.embed.grad + model.lm_head.grad
        for optimizer in due:
            optimizer.step(lr_scale(step, hp), muon_momentum(step, hp))
        for p in params:
            p.grad = None
        return total

    def predict(self, step: int, inputs_BT: Tensor) -> Iterator[Tensor]:
        """Yield logits (n, V) for each position of inputs in order, as the referee asks for."""
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
        """Run every graph on dummy tokens, Adam's update too; the referee restores the state."""
        zeros = partial(torch.zeros, dtype=torch.int64, device=self.rt.device)
        # Two tensors: one in both places would be compiled as a special case.
        dummies = [zeros(self.micro_seqs, self.hp.seq_len) for _ in range(2)]
        self.model.zero_grad(set_to_none=True)
        for step in (0, self.hp.adam_every - 1):  # Adam is due in the second
            self.update(step, repeat(dummies))
            with torch.no_grad():
                for _ in self.predict(0, zeros(self.val_batch_rows, self.task.val_seq_len)):
                    pass

    def train(self):
        """Take the steps that are left."""
        hp, run = self.hp, self.run
        batches = Prefetcher(self.batches(run.step), self.rt)
        while run.step < hp.num_steps and not run.status:
            if run.step % hp.val_every == 0:
                run.validate(partial(self.predict, run.step), self.val_batch_rows)
            loss = self.update(run.step, batches)
            run.end_step(loss, tokens=hp.at(hp.batch_tokens, run.step))
            if run.checkpoint_is_due():
                run.save(self.state())
        if not run.status:
            run.validate(partial(self.predict, run.step), self.val_batch_rows)


# ------------------------------------------------------------------------------ Main


def main() -> int:
    return execute(Trainer, TRACKS, "fineweb", SOURCES, PROCESS_START)


if __name__ == "__main__":
    sys.exit(main())
