"""Train a GPT from scratch until it reaches a fixed validation loss, as fast as the hardware can.

    ./run.sh                                         1, 2, 4 or 8 GPUs of this machine, or its CPU
    torchrun --nproc_per_node=4 train_gpt.py         four GPUs, the same global batches
    python train_gpt.py --num_steps 50 --slug try    one process, an experiment

This file is the contestant: everything that an idea may change. It reads downwards: what a run is
(Hyperparameters), what a step sees (Data, Schedules), the network (Model), the updates (Optimizer),
the loop (Train). Attention, the head's loss and the MLP stand in kernels.py, each beside its GPU
version. referee/ is the referee: task, device, clock, log and the validation loss. Losses are
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
from referee.harness import REFEREE_FILES, Run, execute
from referee.ranks import Runtime
from referee.shards import ShardError, open_shard
from referee.task import Task, task_shards

HERE = Path(__file__).resolve()
OWN_FILES = (HERE.name, "kernels.py", "data/__init__.py", "data/prefetch.py")
SOURCES = {  # what a log embeds
    path: (HERE.parent / path).read_text() for path in (*OWN_FILES, *REFEREE_FILES)
}


# ------------------------------------------------------------------------------ Hyperparameters

HEAD_LR = 0.008  # the head's learning rate; with tied_frac above 0 the embedding's too


@dataclass(frozen=True)
class Hyperparameters:
    """How the network is built and trained. A record changes the source, and sets no flag."""

    task: str = option("fineweb", "data, validation rows and target: a task of referee/task.py")
    # Each is option(default, help, least value).
    # Budget. Batch, cap, windows, stage_lr: each value holds for an equal share of steps, a stage.
    num_steps: int = option(1500, "optimizer steps", 1)
    batch_tokens: tuple[int, ...] = option((131_072, 262_144, 393_216), "tokens per step", 1)
    seq_len: int = option(16384, "tokens per training row, into which documents are packed", 2)
    document_cap: tuple[int, ...] = option((896, 2048, 2048), "tokens kept of a document; 0: all")
    max_epochs: int = option(1, "passes over the training shards that are allowed", 1)
    val_every: int = option(125, "steps between validations", 1)
    # Model.
    layers: str = option("sSsLSs-SSsL", "S short, L long; lowercase: paired heads; -: no attention")
    num_heads: int = option(6, "attention heads per layer", 1)
    head_dim: int = option(128, "width of a head, divisible by 4", 8)
    model_dim: int = option(768, "width of the residual stream", 16)
    mlp_dim: int = option(3072, "width of the MLP's hidden layer", 1)
    vocab_multiple: int = option(128, "embedding and head are padded to a multiple of this", 1)
    attn_scale: float = option(0.1, "factor on q.k after both are normed, in the first stage")
    softcap: tuple[float, float] = option((23.0, 5.0), "height and shift, see kernels.Softcap")
    value_layers: tuple[int, ...] = option((1, 2, 8, 9, 10), "with a value table; -1: none", -1)
    bigram_rows: int = option(251_520, "rows of the hashed table of bigrams; 0: none")
    mix_init: tuple[float, ...] = option((1.1, 0.0, 0.1), "first weights in a layer of stream, "
                           "embedding, bigram; if two, the embedding holds both")  # fmt: skip
    head_gates: bool = option(True, "gate each head's output by the token")
    shift_taps: int = option(0, "earlier tokens that are mixed into each sublayer's input")
    mix_at: tuple[int, ...] = option((6, 10, 11), "layers before which StateMix adds earlier "
                                     "states; one more: the head; -1: none", -1)  # fmt: skip
    mix_from: tuple[int, ...] = option((3, 7, 9), "layers whose outputs are such states", 0)
    window_tokens: tuple[int, ...] = option((384, 896, 1408), "long window, counting the token", 2)
    short_window_tokens: tuple[int, ...] = option((128, 384, 640), "short window", 2)
    val_window_tokens: int = option(2560, "long window in validation; 0: as in training")
    mtp_weight: float = option(0.5, "second target's weight, relative to the next token's 1")
    # Optimizer. The parameter groups stand in parameter_groups().
    muon_lr: float = option(0.023, "learning rate of hidden matrices")
    muon_decay: float = option(1.2, "their cautious weight decay, times the squared rate")
    mlp_down_lr: float = option(2.0, "factor on the rate of the MLP's second matrix")
    embed_lr: float = option(0.008, "learning rate of token embeddings")
    tied_frac: float = option(0.66, "first fraction of steps, which tie head and embedding")
    bigram_lr: float = option(0.6, "learning rate of the table of bigrams")
    scalar_lr: float = option(0.04, "learning rate of scalars; of gates a fifth")
    embed_betas: tuple[float, float] = option((0.5, 0.95), "Adam's betas of embedding and head")
    table_betas: tuple[float, float] = option((0.75, 0.95), "Adam's betas of the other tables")
    scalar_betas: tuple[float, float] = option((0.9, 0.99), "Adam's betas of gates and scalars")
    adam_decay: float = option(0.005, "cautious weight decay, see parameter_groups")
    adam_every: int = option(2, "Adam updates every n-th step, on accumulated gradients", 1)
    stage_lr: tuple[float, ...] = option((1.0, 1.52, 1.73), "factor on every learning rate")
    warmup_frac: float = option(0.0, "fraction of steps in which rates rise from 0")
    cooldown_frac: float = option(0.6, "fraction of steps in which rates fall linearly")
    final_lr_frac: float = option(0.15, "fraction of each base rate that is left at the end")
    extension_steps: int = option(15, "last steps, which keep the final rates")
    momentum_steps: tuple[int, int] = option((300, 50), "steps of rising, then of falling momentum")

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
            raise RunError(f"--num_heads {self.num_heads} is odd; --layers s and l pair heads")
        tables = [i for i in self.value_layers if i >= 0]
        if len({i for i in tables if i <= last and self.layers[i] != "-"}) < len(tables):
            raise RunError("--value_layers must be layers of --layers that attend, each once")
        if self.mix_at != (-1,) and (min(self.mix_at) < 0 or max(self.mix_at) > last + 1):
            raise RunError("--mix_at must be layers of --layers, or one more; none: -1")
        if self.mix_at != (-1,) and max(self.mix_from) > last:
            raise RunError("--mix_from must be layers of --layers")
        if len(self.mix_init) not in (2, 3):
            raise RunError("--mix_init must be two or three weights")
        if self.tied_frac and self.embed_lr != HEAD_LR:
            raise RunError(f"--embed_lr must be the head's, {HEAD_LR}, with --tied_frac above 0")

    def stage(self, values: tuple, step: int) -> int:
        """Index of the value that holds in this step: each holds for an equal share of steps."""
        return min(len(values) * step // self.num_steps, len(values) - 1)

    def at(self, values: tuple, step: int):
        return values[self.stage(values, step)]


TRACKS = {  # what differs from the defaults, which are fineweb's
    "fineweb": Hyperparameters(),
    "fineweb_medium": Hyperparameters(
        task="fineweb_medium",
        num_steps=5960, batch_tokens=(524_288,), document_cap=(2048,), stage_lr=(1.0,),
        layers="sSsLSsSLSsSLSsSL", num_heads=8, model_dim=1024, mlp_dim=4096,
        mix_at=(11, 15, 16), mix_from=(5, 10, 14), value_layers=(1, 2, 13, 14, 15),
        muon_lr=0.025,
    ),
    "wikitext103": Hyperparameters(
        task="wikitext103",
        batch_tokens=(131_072,), document_cap=(0,), stage_lr=(1.0,), max_epochs=4,
    ),
    "embedded": Hyperparameters(
        task="embedded",
        num_steps=800, batch_tokens=(2048,), seq_len=256, document_cap=(0,), val_every=160,
        layers="SL", num_heads=2, head_dim=64, model_dim=128, mlp_dim=512, vocab_multiple=1,
        attn_scale=0.12, softcap=(30.0, 0.0), value_layers=(-1,), bigram_rows=16384,
        mix_init=(1.0, 0.0), head_gates=False, shift_taps=3, mix_at=(-1,),
        window_tokens=(256,), short_window_tokens=(128,), val_window_tokens=0, mtp_weight=0.0,
        muon_lr=0.02, muon_decay=0.0, mlp_down_lr=1.0, momentum_steps=(3000, 0),
        embed_lr=0.02, bigram_lr=0.06, scalar_lr=0.02, tied_frac=0.0,
        embed_betas=(0.8, 0.95), table_betas=(0.8, 0.95), scalar_betas=(0.8, 0.95),
        adam_decay=0.0, adam_every=1,
        stage_lr=(1.0,), warmup_frac=0.02, cooldown_frac=0.5, final_lr_frac=0.0,
        extension_steps=0,
    ),
}  # fmt: skip


class Layer(NamedTuple):
    """One letter of hp.layers."""

    attends: bool  # else it has an MLP only
    is_long: bool  # has the long window, and keys that are half those of the token before
    is_paired: bool  # heads attend two by two, as one of twice the length
    value_embed: int | None  # value-embedding table that it adds


def parse_layers(hp: Hyperparameters) -> list[Layer]:
    tables = {layer: table for table, layer in enumerate(i for i in hp.value_layers if i >= 0)}
    return [Layer(letter != "-", letter in "lL", letter in "ls", tables.get(i))
            for i, letter in enumerate(hp.layers)]  # fmt: skip


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


def ordered_pieces(hp: Hyperparameters, task: Task, seed: int) -> Iterator[Piece]:
    """Documents as they come; or where they have no cap whole rows, shuffled in each shard."""
    for epoch in range(hp.max_epochs):
        for index, path in enumerate(task_shards(task.train_files)):
            tokens, starts, lengths = shard_pieces(path, hp, task.document_start)
            rng = np.random.default_rng((seed, epoch, index))
            order = slice(None) if max(hp.document_cap) else rng.permutation(len(starts))
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
    """Yield this rank's (inputs, targets), int64 (rows, seq_len) each, from this step on.

    micro_seqs: rows, by stage. The rows of a step are dealt to accumulation x ranks equal
    micro-batches, so that its global batch is the same for any number of ranks.
    """
    pieces = ordered_pieces(hp, task, seed)
    for s in range(hp.num_steps):
        cap, count = hp.at(hp.document_cap, s), hp.at(hp.batch_tokens, s) // hp.seq_len
        step_rows = [pack_row(pieces, hp.seq_len, cap) for _ in range(count)]
        if s < step:
            continue
        rows = hp.at(micro_seqs, s)
        for first in range(rt.rank * rows, count, rt.world_size * rows):
            chosen = step_rows[first : first + rows]
            inputs = np.stack([row_tokens(row, ahead=0) for row in chosen])
            targets = np.stack([row_tokens(row, ahead=1) for row in chosen])
            yield torch.from_numpy(inputs), torch.from_numpy(targets)


def check_supply(hp: Hyperparameters, task: Task, seed: int) -> None:
    """ShardError unless the shards fill every step, if every step had the shortest cap."""
    stages, cap, room = len(hp.batch_tokens), min(hp.document_cap), hp.seq_len
    firsts = [-(-i * hp.num_steps // stages) for i in range(stages + 1)]  # step of each stage
    steps = [end - first for first, end in pairwise(firsts)]
    needed = sum(n * t // hp.seq_len for n, t in zip(steps, hp.batch_tokens, strict=True))
    tokens = sum(len(open_shard(path)) for path in task_shards(task.train_files))
    held = hp.max_epochs * tokens // hp.seq_len
    if held >= needed:  # else there is no need to count them
        held = 0
        for *_, length in ordered_pieces(hp, task, seed):
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
    """Factor on every rate: up to the stage's, then down to one end for all; level at the end."""
    rise = (step + 1) / max(hp.warmup_frac * hp.num_steps, 1)
    fall = (hp.num_steps - hp.extension_steps - step) / max(hp.cooldown_frac * hp.num_steps, 1)
    left = min(1.0, max(0.0, fall))
    return min(1.0, rise) * (left * hp.at(hp.stage_lr, step) + (1 - left) * hp.final_lr_frac)


def muon_momentum(step: int, hp: Hyperparameters) -> float:
    rise, fall = (max(steps, 1) for steps in hp.momentum_steps)
    rise, fall = step / rise, (hp.num_steps - step) / fall
    return MOMENTUM_LOW + MOMENTUM_RISE * min(1.0, rise, fall)


def mtp_weights(step: int, hp: Hyperparameters) -> list[float]:
    """Weights of the targets one, two, three tokens ahead (arXiv 2404.19737); their sum is 1.

    The third fades out by a third of the run, the second between one and two thirds.
    """
    if not hp.mtp_weight:
        return [1.0]
    second, third = (min(1.0, max(0.0, ends - 3 * step / hp.num_steps)) for ends in (2, 1))
    second, third = hp.mtp_weight * second, hp.mtp_weight / 2 * third
    return [weight / (1 + second + third) for weight in (1.0, second, third)]


def rotary_frequencies(step: int, hp: Hyperparameters) -> tuple[Tensor, float]:
    """((K/4,) radians per token, attention scale), stretched as windows grow (arXiv 2309.00071)."""
    frequency = ROTARY_BASE ** -torch.linspace(0, 1, hp.head_dim // 4)
    scale, stage = hp.attn_scale, hp.stage(hp.window_tokens, step)
    for old, new in pairwise(hp.window_tokens[: stage + 1]):
        turns = old * frequency / (2 * math.pi)
        kept = ((turns - 1) / 31).clamp(0, 1)  # of what turns 32 times and more in a window: all
        frequency = frequency * (old / new + kept * (1 - old / new))
        scale *= 1 + 0.2 * math.log(new / old)
    return frequency, scale


class StepInputs(NamedTuple):
    """Per-step inputs of the network, as tensors, so that no step recompiles."""

    window: Tensor  # 0-D, tokens in the long window
    short_window: Tensor  # 0-D
    frequency: Tensor  # (K/4,) radians per token, of the rotary pairs
    attn_scale: Tensor  # 0-D
    mtp_weights: Tensor  # (J,) of the target one token ahead, two ahead, ...


def step_inputs(step: int, hp: Hyperparameters, device, training: bool = True) -> StepInputs:
    """Validation has its own long window, and does not use mtp_weights."""
    window, short_window = hp.at(hp.window_tokens, step), hp.at(hp.short_window_tokens, step)
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
LOGIT_SLOPE = 7.5  # see kernels.Softcap
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
    """Heads h and h + H/2 in turns, (B, 2T, H/2, K): both see each other's keys, half as far."""
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
        if value_BTHK is not None:  # arXiv 2410.17897, gated by 6 dimensions of x and 6 of the row
            both = [t[..., : GATE_DIM // 2] for t in (x, value_BTHK[:, :, 0])]
            v = v + gate(torch.cat(both, dim=-1), self.value_gate) * value_BTHK
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
    # A sum of products: to a GPU's matrix units so narrow a product would be a kernel of its own.
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


def add_earlier_tokens(x: Tensor, taps_SD: Tensor, same_doc_SBT1: Tensor) -> Tensor:
    """x plus the S tokens before it, weighted by channel: a causal depthwise convolution.

    Primer (arXiv 2109.08668) convolves queries, keys and values; here every sublayer's input is.
    """
    total = x
    for i, (tap, same_doc) in enumerate(zip(taps_SD, same_doc_SBT1, strict=True)):
        total = total + tap * same_doc * x.roll(i + 1, 1)
    return total


class Block(nn.Module):
    """Attention and MLP on the residual stream, into which embedding and bigram are mixed again."""

    def __init__(self, hp: Hyperparameters, rt: Runtime, layer: Layer):
        super().__init__()
        self.attn = Attention(hp, rt, layer) if layer.attends else None
        self.mlp = MLP(hp, rt.matmul_dtype)
        self.mix = nn.Parameter(torch.tensor(hp.mix_init))
        self.taps = parameter_if(hp.shift_taps, torch.zeros(2, hp.shift_taps, hp.model_dim))

    def forward(self, x: Tensor, injected: list[Tensor], value_BTHK, c: Context) -> Tensor:
        """injected: the embedding, and the bigram's row where layers mix it in."""
        mix = self.mix.type_as(x)
        x = mix[0] * x
        for weight, added in zip(mix[1:], injected, strict=False):
            x = x + weight * added
        if self.attn is not None:
            x = x + self.attn(self.sublayer_input(x, 0, c), value_BTHK, c)
        return x + self.mlp(self.sublayer_input(x, 1, c))

    def sublayer_input(self, x: Tensor, sublayer: int, c: Context) -> Tensor:
        """Normed, with earlier tokens mixed in; sublayer: attention 0, MLP 1."""
        x = norm(x)
        if self.taps is None:
            return x
        return add_earlier_tokens(x, self.taps[sublayer].type_as(x), c.same_doc_SBT1)


class StateMix(nn.Module):
    """Adds states to the stream with weights by the token (MUDD: arXiv 2502.12170); at first 0.

    They are embedding, bigram (where layers mix it in), outputs of hp.mix_from so far, and the row
    of the last value table where it is as wide as the stream.
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
        self.layers, vocab = parse_layers(hp), padded_vocab(task, hp)
        self.cap = Softcap(*hp.softcap, LOGIT_SLOPE)
        self.embed = nn.Parameter(torch.randn(vocab, hp.model_dim))
        tables, width = sum(i >= 0 for i in hp.value_layers), hp.num_heads * hp.head_dim
        self.value_embeds = parameter_if(tables, 0.01 * torch.randn(tables, vocab, width))
        self.bigram = parameter_if(hp.bigram_rows, torch.zeros(hp.bigram_rows, hp.model_dim))
        self.blocks = nn.ModuleList(Block(hp, rt, layer) for layer in self.layers)
        self.lm_head = nn.Parameter(torch.zeros(vocab, hp.model_dim))
        self.smear = nn.Parameter(torch.zeros(GATE_DIM + 1))  # gate weights, then strength
        self.mixes_values = bool(tables) and width == hp.model_dim
        states = len(hp.mix_init) - 1 if hp.bigram_rows else 1  # as embed_tokens returns them
        states += self.mixes_values
        counts = {i: sum(j < i for j in hp.mix_from) for i in hp.mix_at if i >= 0}
        self.mixes = nn.ModuleDict({str(i): StateMix(hp.model_dim, states + count)
                                    for i, count in counts.items()})  # fmt: skip
        bound = 3**0.5 * 0.5 * hp.model_dim**-0.5  # uniform with std 0.5 / sqrt(D)
        for block in self.blocks:
            block.mlp.up_down.data.uniform_(-bound, bound)[1].zero_()
            if block.attn is not None:
                block.attn.qkvo.data.uniform_(-bound, bound)[3].zero_()
                if block.attn.layer.is_long:
                    # Keys here are those of the token before, and queries start equal: a token
                    # seeks its like, and copying (arXiv 2209.11895) sets in at once.
                    halves = block.attn.qkvo.data.unflatten(1, (hp.num_heads, 2, -1))
                    halves[0, :, 1] = halves[1, :, 1]
        if hp.tied_frac:  # Trainer.update keeps the two equal
            self.lm_head.data.copy_(self.embed.data.mul_(0.005))

    def embed_tokens(self, inputs_BT: Tensor, same_doc_BT1: Tensor) -> list[Tensor]:
        """What every layer mixes in: [embedding, smeared with the token before; bigram's row].

        If layers have no weight for the bigram, it is added to the embedding. same_doc: 1 where the
        token before lies in the same document; else the bigram has document_start in its place.
        """
        x, bigrams = self.embed[inputs_BT].to(self.rt.stream_dtype), []
        if self.hp.bigram_rows:  # arXiv 1709.03933
            in_document = same_doc_BT1[..., 0] > 0
            before_BT = torch.where(in_document, inputs_BT.roll(1, 1), self.document_start)
            row_BT = ((36313 * inputs_BT) ^ (27191 * before_BT)) % self.hp.bigram_rows
            bigrams = [self.bigram[row_BT].type_as(x)]
        if len(self.hp.mix_init) == 2:
            x, bigrams = sum(bigrams, x), []
        x = norm(x)
        weights, strength = self.smear.type_as(x).split([GATE_DIM, 1])
        share_BT1 = strength * torch.sigmoid(x[..., :GATE_DIM] @ weights)[..., None]
        return [norm(x + share_BT1 * same_doc_BT1 * x.roll(1, 1)), *bigrams]

    def context(self, docs_BT: Tensor, per_step: StepInputs) -> Context:
        hp, T = self.hp, docs_BT.size(1)
        kinds = {(layer.is_long, layer.is_paired) for layer in self.layers if layer.attends}
        has_pairs = any(is_paired for _, is_paired in kinds)
        paired_docs = docs_BT.repeat_interleave(2, dim=1) if has_pairs else docs_BT
        windows = per_step.short_window, per_step.window
        longest = max(hp.short_window_tokens), max(*hp.window_tokens, hp.val_window_tokens)
        masks = {(is_long, is_paired): attention_mask(paired_docs if is_paired else docs_BT,
                                                      windows[int(is_long)], longest[int(is_long)])
                 for is_long, is_paired in sorted(kinds)}  # fmt: skip
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
        x, *_ = injected = self.embed_tokens(inputs_BT, c.same_doc_SBT1[0])
        if self.value_embeds is not None:  # one gradient of the whole parameter, not one a table
            rows = self.value_embeds[:, inputs_BT].type_as(x)
            values = rows.view(-1, B, T, hp.num_heads, hp.head_dim).unbind()
        outputs = []  # of each layer

        def mixed(x: Tensor, i: int) -> Tensor:
            """What layer i, or after the last the head, starts from."""
            if str(i) not in self.mixes:
                return x
            states = [*injected, *(outputs[j] for j in hp.mix_from if j < i)]
            return self.mixes[str(i)](x, states + ([rows[-1]] if self.mixes_values else []))

        for i, (layer, block) in enumerate(zip(self.layers, self.blocks, strict=True)):
            value_BTHK = None if layer.value_embed is None else values[layer.value_embed]
            x = block(mixed(x, i), injected, value_BTHK, c)
            outputs.append(x)
        return norm(mixed(x, len(outputs)))

    def document_index(self, inputs_BT: Tensor) -> Tensor:
        """int32 (B, T), counts up along a row where documents begin."""
        return (inputs_BT == self.document_start).cumsum(1, dtype=torch.int32)

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

ADAM_EPS = 1e-15  # below 1e-9, the second moment's root in a rare row
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


def muon_update(G, lr, decay, beta, factors, dtype, W, momentum, second, low=None):
    """Update matrices W (N, rows, cols) in place with gradients G; lr, decay, beta: 0-D tensors.

    W is fp32, or the upper half of split_fp32, and low the lower one, as bf16. Nesterov momentum is
    orthogonalised (Muon: kellerjordan.github.io/posts/muon), then each row is divided by its
    running root mean square; the matrix keeps its norm (NorMuon, arXiv 2510.05491), times
    sqrt(rows / cols) where that is above 1. second: (N, rows, 1).
    factors (N, 1, 1): on each matrix's rate, and thereby on its decay.
    """
    momentum.add_((1 - beta) * (G.float() - momentum))
    U = orthogonalize(G + beta * (momentum - G), dtype)
    second.lerp_((U * U).mean(-1, keepdim=True), 0.1)
    scaled = U * torch.rsqrt(second + 1e-10)
    U_norm, scaled_norm = (x.norm(dim=(-2, -1), keepdim=True) for x in (U, scaled))
    U = scaled * (U_norm / (scaled_norm + 1e-10))
    rates = lr * max(1.0, W.size(-2) / W.size(-1)) ** 0.5 * factors
    W_fp32 = W if low is None else join_fp32(W, low.view(torch.int16))
    W_fp32 = W_fp32 - rates * (U + lr * decay * weights_to_decay(W_fp32, U))
    if low is None:
        W.copy_(W_fp32)
    else:
        new_high, new_low = split_fp32(W_fp32)
        W.copy_(new_high)
        low.view(torch.int16).copy_(new_low)


def adam_update(G, lr, decay, count, beta1, beta2, W, mean, square):
    """Update numbers W (N,) in place by Adam (arXiv 1412.6980); lr, decay, count: 0-D tensors."""
    mean.lerp_(G.float(), 1 - beta1)
    square.lerp_(G.float() ** 2, 1 - beta2)
    root = (square / (1 - beta2**count)).sqrt()
    W.sub_(lr * (mean / (1 - beta1**count)) / (root + ADAM_EPS))
    W.sub_(lr * lr * decay * weights_to_decay(W, mean))


class Group(NamedTuple):
    """Parameters that are updated alike. The learning rate is scaled by lr_scale."""

    params: list[nn.Parameter]
    lr: float
    betas: tuple[float, float] | None  # of Adam; None: Muon, with muon_momentum and 0.9
    decay: float  # cautious, of a weight w: decay * lr * its own rate * w
    every: int  # updated every n-th step, on accumulated gradients
    factors: tuple[float, ...] = (1.0,)  # on Muon's rate, of the matrices of a parameter in turn


class Optimizer:
    """Muon of matrices, or Adam of numbers: items of a bank (N, ...) whose views are parameters.

    Each rank updates its part of them, then all parts are gathered. Matrices are bf16 where the
    stream is; then state holds the lower 16 bits of their fp32.
    """

    def __init__(self, group: Group, rt: Runtime, compile_fn: Callable):
        self.group, self.rt, is_adam = group, rt, group.betas is not None
        self.update = compile_fn(adam_update if is_adam else muon_update)
        self.item = () if is_adam else group.params[0].shape[1:]
        bank = torch.cat([p.data.view(-1, *self.item) for p in group.params]).float()
        self.state = {"first": torch.zeros_like(bank)}
        self.state["second"] = torch.zeros_like(bank if is_adam else bank[..., :1])
        if rt.stream_dtype == torch.bfloat16 and not is_adam:
            bank, low = split_fp32(bank)
            self.state["low"] = low.view(torch.bfloat16)  # for collectives know no int16
        self.bank, self.mine = bank, rt.my_part(len(bank))
        sizes = [p.numel() // math.prod(self.item) for p in group.params]
        for p, view in zip(group.params, bank.split(sizes), strict=True):
            p.data = view.view(p.shape)
        self.fixed = group.betas if is_adam else ()
        if not is_adam:
            factors = group.factors * (len(bank) // len(group.factors))
            factors_N11 = torch.tensor(factors, device=bank.device)[:, None, None]
            self.fixed = factors_N11[self.mine], rt.matmul_dtype

    def reduce(self):
        """Take the gradients, and start to average them; step waits for those of its part."""
        gradients = [p.grad.reshape(-1, *self.item) for p in self.group.params]
        whole = torch.cat(gradients) if len(gradients) > 1 else gradients[0]
        self.received = self.rt.start_average_of_parts(whole)
        for p in self.group.params:
            p.grad = None

    @torch.no_grad()
    def step(self, scale: float, momentum: float, count: int):
        """Update for the count-th time; by tensors, so that no value compiles anew."""
        if len(gradients := self.received()):
            third = momentum if self.group.betas is None else float(count)
            numbers = map(torch.tensor, (self.group.lr * scale, self.group.decay, third))
            mine = (tensor[self.mine] for tensor in (self.bank, *self.state.values()))
            self.update(gradients, *numbers, *self.fixed, *mine)
        self.rt.gather_parts(self.bank)

    def gather_state(self) -> dict[str, Tensor]:
        """State and waiting gradients, whole on every rank. A collective: every rank calls it."""
        tensors = dict(self.state)
        for tensor in self.state.values():
            self.rt.gather_parts(tensor)
        for i, p in enumerate(self.group.params if self.group.every > 1 else ()):
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            self.rt.average([p.grad])
            tensors[f"grad{i}"] = p.grad
        return tensors


def parameter_groups(model: GPT, hp: Hyperparameters) -> dict[str, Group]:
    """The one table of parameter groups; a group without parameters is left out."""

    def named(*ends: str) -> list[nn.Parameter]:
        return [p for name, p in model.named_parameters() if name.endswith(ends)]

    scalars = named("mix", "taps", "smear")
    gates = named("_gate", "mix_in", "mix_out")
    tables, decay, every = hp.table_betas, hp.adam_decay, hp.adam_every
    rows = {  # parameters, learning rate, betas of Adam, decay, steps per update, factors
        "attn": (named("qkvo"), hp.muon_lr, None, hp.muon_decay, 1),
        "mlp": (named("up_down"), hp.muon_lr, None, hp.muon_decay, 1, (1.0, hp.mlp_down_lr)),
        "embed": (named("embed"), hp.embed_lr, hp.embed_betas, 150 * decay, every),
        "head": (named("lm_head"), HEAD_LR, hp.embed_betas, 150 * decay, every),
        "values": (named("value_embeds"), 0.6, tables, 5 * decay, every),
        "bigram": (named("bigram"), hp.bigram_lr, tables, 5 * decay, every),
        "gates": (gates, hp.scalar_lr / 5, hp.scalar_betas, 0.0, every),
        "scalars": (scalars, hp.scalar_lr, hp.scalar_betas, 0.0, every),
    }
    return {name: Group(*row) for name, row in rows.items() if row[0]}


def make_optimizers(model: GPT, hp: Hyperparameters, rt: Runtime, compile_fn: Callable) -> dict:
    """An optimizer per group, by name. AssertionError unless each parameter is in one group."""
    groups = parameter_groups(model, hp)
    grouped = sorted(id(p) for group in groups.values() for p in group.params)
    assert grouped == sorted(map(id, model.parameters())), "a parameter is not in just one group"
    return {name: Optimizer(group, rt, compile_fn) for name, group in groups.items()}


# ------------------------------------------------------------------------------ Train


def memory_estimate(hp: Hyperparameters, vocab: int, rows: int) -> float:
    """Peak bytes on a GPU with so many rows per forward pass; fitted to tools/preflight.py."""
    width, tables = hp.num_heads * hp.head_dim, 2 + sum(i >= 0 for i in hp.value_layers)
    matrices = len(hp.layers) * hp.model_dim * (4 * width + 2 * hp.mlp_dim)
    weights = 12 * matrices + 16 * (tables * vocab + hp.bigram_rows) * hp.model_dim
    tokens, update = rows * hp.seq_len, 4 * hp.bigram_rows * hp.model_dim  # of one table, later
    kept = 2 * len(hp.layers) * (13 * hp.model_dim + hp.mlp_dim) * tokens  # for the backward pass
    return weights + max(kept + 4 * min(tokens, HEAD_CHUNK_TOKENS) * vocab, update)


def choose_micro_batches(hp: Hyperparameters, vocab: int, rt: Runtime, asked: int) -> list[int]:
    """Rows per forward pass of each stage: those asked for, or the most that divide and fit."""
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
    return chosen


class Trainer:
    """A model, its optimizers and data, and the steps that join them."""

    def __init__(self, run: Run):
        self.run, self.hp, self.task, self.rt = run, run.hp, run.task, run.rt
        hp, task, rt, vocab = run.hp, run.task, run.rt, padded_vocab(run.task, run.hp)
        if rt.is_gpu and (hp.seq_len % BLOCK or task.val_seq_len % BLOCK):
            raise RunError(f"--seq_len and --val_seq_len must divide by {BLOCK} on a GPU")
        check_supply(hp, task, run.options.seed)
        self.micro_seqs = choose_micro_batches(hp, vocab, rt, run.options.micro_batch_seqs)
        run.micro_batch_seqs = max(self.micro_seqs)
        val_rows = run.micro_batch_seqs * hp.seq_len // task.val_seq_len
        self.val_batch_rows = run.validation.batch_rows(val_rows)
        torch.manual_seed(run.options.seed)
        with rt.device:
            self.model = GPT(hp, task, rt)
        run.flops_per_token = self.flops_per_token()
        run.log.line(f"micro_batch_seqs: {as_flag(self.micro_seqs)} of {hp.seq_len} tokens")
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
        """Forward and backward: 6 per weight, 12 per head width and key seen in the first rows."""
        hp, model, keys = self.hp, self.model, 0.0
        pieces = ordered_pieces(hp, self.task, self.run.options.seed)
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
        return 6 * weights + 12 * hp.num_heads * hp.head_dim * keys

    def update(self, step: int, batches) -> Tensor:
        """Take one optimizer step; return the mean loss of this rank's share (0-D, on device)."""
        hp, rt, model = self.hp, self.rt, self.model
        total, per_step = torch.zeros((), device=rt.device), step_inputs(step, hp, rt.device)
        pass_tokens = hp.at(self.micro_seqs, step) * hp.seq_len * rt.world_size
        passes = hp.at(hp.batch_tokens, step) // pass_tokens
        for _ in range(passes):
            inputs_BT, targets_BT = next(batches)
            loss = self.loss(inputs_BT, targets_BT, per_step) / passes
            loss.backward()
            total += loss.detach()
        due = [o for o in self.optimizers.values() if (step + 1) % o.group.every == 0]
        if any(p.grad is None for optimizer in due for p in optimizer.group.params):
            unused = ", ".join(n for n, p in model.named_parameters() if p.grad is None)
            raise RunError(f"the loss does not depend on {unused}; leave it out of the network")
        if step < hp.tied_frac * hp.num_steps and self.optimizers["embed"] in due:
            # Tied: both get the sum of their gradients, which keeps equal matrices equal.
            model.embed.grad = model.lm_head.grad = model.embed.grad + model.lm_head.grad
        for optimizer in due:  # Muon first: the tables travel while matrices are orthogonalised
            optimizer.reduce()
        for o in due:
            o.step(lr_scale(step, hp), muon_momentum(step, hp), (step + 1) // o.group.every)
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
        hp, zeros = self.hp, partial(torch.zeros, dtype=torch.int64, device=self.rt.device)
        self.model.zero_grad(set_to_none=True)
        for i in {rows: i for i, rows in enumerate(self.micro_seqs)}.values():
            # Two tensors: one in both places would be compiled as a special case.
            dummies = [zeros(self.micro_seqs[i], hp.seq_len) for _ in range(2)]
            first = -(-i * hp.num_steps // len(self.micro_seqs))  # step of the stage
            for step in (first, first - first % hp.adam_every + hp.adam_every - 1):  # Adam is due
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
