"""Train a GPT from scratch until it reaches a fixed validation loss, as fast as the hardware can.

    ./run.sh                                         every GPU of this machine, or its CPU
    torchrun --nproc_per_node=4 train_gpt.py         four GPUs, the same global batches
    python train_gpt.py --num_steps 50 --slug try    one process, an experiment

The file reads downwards: what a run is (Hyperparameters), where it runs (Runtime), its tokens
(Data), the network (Model), the updates (Optimizer), the loop (Train). The clock and the log are
in records/harness.py, the shard format in data/shards.py. Losses are nats a token.
"""

import time

PROCESS_START = time.perf_counter()  # before the slow imports: the ledger counts them too

import dataclasses
import hashlib
import math
import queue
import sys
import threading
import uuid
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import islice, repeat
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from data.shards import check_tokens, find_shards, open_shard
from records.harness import (
    COMPILE_ERRORS,
    Log,
    RunError,
    RunOptions,
    Runtime,
    StopRequest,
    Stopwatch,
    calibration,
    compiled_graphs,
    header_sections,
    knob,
    mfu,
    parse_flags,
    read_checkpoint,
    time_to_target,
    write_checkpoint,
)

ROOT = Path(__file__).resolve().parent
SOURCES = {
    path: (ROOT / path).read_text()
    for path in (Path(__file__).name, "data/shards.py", "records/harness.py")
}


# ------------------------------------------------------------------------------ Hyperparameters


@dataclass(frozen=True)
class Hyperparameters:
    """What is trained, on what, to what loss. Each field is a flag; a record changes none."""

    # Data. A track's globs are relative to this file's folder, those in flags to the caller's.
    train_files: str = knob("data/fineweb10B/fineweb_train_*.bin", "glob of training shards")
    val_files: str = knob("data/fineweb10B/fineweb_val_*.bin", "glob of validation shards")
    data_sha256: str = knob("", "expected hash over all shards; empty: none is known")
    vocab_size: int = knob(50304, "rows of embedding and head, more than the largest token", 2)
    document_start: int = knob(50256, "token that opens every document")
    val_tokens: int = knob(10_485_760, "validation targets", 1)
    val_seq_len: int = knob(16384, "tokens a validation row", 2)
    val_spread: bool = knob(False, "spread validation rows evenly instead of taking the first")
    target_val_loss: float = knob(3.28, "nats a token")
    # Budget.
    num_steps: int = knob(1600, "optimizer steps", 1)
    batch_tokens: int = knob(524_288, "tokens a step, over all ranks", 1)
    seq_len: int = knob(16384, "tokens a training row, into which documents are packed", 2)
    max_epochs: int = knob(1, "passes over the training shards that are allowed", 1)
    val_every: int = knob(125, "steps between validations", 1)
    # Model.
    num_layers: int = knob(12, "blocks", 1)
    num_heads: int = knob(6, "attention heads a block", 1)
    head_dim: int = knob(128, "width of a head, divisible by 4", 4)
    model_dim: int = knob(768, "width of the residual stream", 16)
    mlp_dim: int = knob(3072, "width of the hidden layer", 1)
    attn_scale: float = knob(0.12, "factor on q.k after both are normalised")
    rotary_base: float = knob(1024.0, "slowest rotary wavelength over 2 pi, tokens", 1)
    logit_cap: float = knob(15.0, "logits stay between plus and minus this", 1)
    num_value_embeds: int = knob(3, "value-embedding tables, on the first and the last layers")
    bigram_rows: int = knob(0, "rows of the hashed table of token pairs; 0: none")
    key_offset: bool = knob(False, "in long layers half of a key is the token before's")
    shift_taps: int = knob(0, "tokens before it that are mixed into each token at every sublayer")
    skip_from: int = knob(3, "layer whose output is kept; -1: no skip", -1)
    skip_to: int = knob(8, "layer to whose input it is added", -1)
    backout_layer: int = knob(7, "layer whose output leaves before the head; -1: none", -1)
    window_pattern: str = knob("SSSL", "S short or L long window for each layer, repeated")
    window_start: int = knob(384, "tokens a long window sees at first, its own included", 2)
    window_end: int = knob(1792, "the same at last; a short window is half a long one", 2)
    window_stages: int = knob(3, "equal stages from window_start to window_end", 1)
    # Optimizer. The betas stand in optimizers().
    muon_lr: float = knob(0.04, "learning rate of hidden matrices")
    muon_decay: float = knob(0.0, "cautious decay of hidden matrices, a unit of learning rate")
    embed_lr: float = knob(0.3, "learning rate of token embeddings")
    table_lr: float = knob(0.3, "learning rate of value-embedding and bigram tables")
    head_lr: float = knob(0.004, "learning rate of the head")
    scalar_lr: float = knob(0.02, "learning rate of gates and scalars")
    warmup_frac: float = knob(0.0, "fraction of steps in which rates rise from 0")
    cooldown_frac: float = knob(0.5, "fraction of steps in which rates fall, linearly")
    final_lr_frac: float = knob(0.05, "fraction of each rate that is left at the end")
    momentum_warmup: int = knob(300, "steps in which Muon's momentum rises from 0.85 to 0.95")

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, least = getattr(self, f.name), f.metadata["least"]
            if f.type in (int, float) and not least <= value < math.inf:
                raise RunError(f"--{f.name} {value} is out of range: give at least {least}")
        for whole, part in (("batch_tokens", "seq_len"), ("val_tokens", "val_seq_len")):
            if getattr(self, whole) % getattr(self, part):
                raise RunError(
                    f"--{whole} {getattr(self, whole)} is not a multiple of "
                    f"--{part} {getattr(self, part)}"
                )
        if self.backout_layer >= self.num_layers or self.num_value_embeds > self.num_layers:
            raise RunError("--backout_layer must lie below, --num_value_embeds up to --num_layers")
        if self.skip_from >= 0 and not self.skip_from < self.skip_to < self.num_layers:
            raise RunError(
                f"--skip_from {self.skip_from} and --skip_to {self.skip_to} must rise and lie "
                f"below --num_layers {self.num_layers}; no skip: --skip_from -1"
            )
        if self.head_dim % 4 or not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise RunError("--head_dim must divide by 4, and --window_pattern be of S and L")

    def window_kind(self, layer: int) -> str:
        return self.window_pattern[layer % len(self.window_pattern)]

    def value_table(self, layer: int) -> int | None:
        """Which value-embedding table a layer adds: the first n layers and the last n have one."""
        count, from_end = self.num_value_embeds, layer - self.num_layers
        return layer if layer < count else count + from_end if from_end >= -count else None


TRACKS = {
    "embedded": Hyperparameters(
        train_files="data/embedded/embedded_train.bin",
        val_files="data/embedded/embedded_val.bin",
        data_sha256="46ee993abd300d89907f21f46b034c6dad65e35e87b50afcdc9668e0617695f9",
        vocab_size=257,
        document_start=256,
        val_tokens=65_536,
        val_seq_len=1024,
        val_spread=True,
        target_val_loss=1.55,
        num_steps=160,
        batch_tokens=2048,
        seq_len=128,
        val_every=80,
        num_layers=2,
        num_heads=4,
        head_dim=32,
        model_dim=128,
        mlp_dim=512,
        attn_scale=0.2386,
        num_value_embeds=0,
        bigram_rows=16384,
        key_offset=True,
        shift_taps=3,
        skip_from=-1,
        skip_to=-1,
        backout_layer=-1,
        window_pattern="L",
        window_start=128,
        window_end=128,
        window_stages=1,
        muon_lr=0.02,
        embed_lr=0.02,
        table_lr=0.06,
        scalar_lr=0.02,
        warmup_frac=0.02,
        final_lr_frac=0.0,
        momentum_warmup=3000,
    ),
    "fineweb": Hyperparameters(),
    "fineweb_medium": Hyperparameters(
        target_val_loss=2.92,
        num_steps=5960,
        num_layers=16,
        num_heads=8,
        model_dim=1024,
        mlp_dim=4096,
        skip_from=5,
        skip_to=11,
        backout_layer=10,
        muon_lr=0.025,
    ),
    "wikitext103": Hyperparameters(
        train_files="data/wikitext103/wikitext103_train_*.bin",
        val_files="data/wikitext103/wikitext103_val_*.bin",
        val_tokens=245_760,
        val_seq_len=8192,
        target_val_loss=3.8,
        batch_tokens=131_072,
        max_epochs=4,
    ),
}


def fixed_bytes(hp: Hyperparameters) -> float:
    """Memory that does not grow with the batch: fp32 weights, gradients and optimizer state."""
    width, tables = hp.num_heads * hp.head_dim, 2 + hp.num_value_embeds
    matrices = hp.num_layers * hp.model_dim * (4 * width + 2 * hp.mlp_dim)
    return 18.0 * (matrices + (tables * hp.vocab_size + hp.bigram_rows) * hp.model_dim)


def bytes_per_token(hp: Hyperparameters) -> float:
    """Activations kept for the backward pass: bf16 streams of every layer, and the logits."""
    return hp.num_layers * 2 * (10 * hp.model_dim + 2 * hp.mlp_dim) + 6 * hp.vocab_size


def micro_batch_rows(hp: Hyperparameters, rt: Runtime, asked: int) -> int:
    """Rows a forward pass: what was asked for, or the most that divides and fits in memory."""
    rows = hp.batch_tokens // hp.seq_len
    share = rows // rt.world_size
    if rows % rt.world_size or asked and share % asked:
        raise RunError(
            f"{rows} rows a step cannot be dealt to {rt.world_size} ranks in equal forward passes "
            f"of {asked or 1}; change --nproc_per_node or --micro_batch_seqs"
        )
    fits = (0.9 * rt.memory_bytes - fixed_bytes(hp)) / (hp.seq_len * bytes_per_token(hp))
    most = max(n for n in range(1, share + 1) if share % n == 0 and (n <= fits or n == 1))
    return asked or most


# ------------------------------------------------------------------------------ Data


def row_starts(tokens: np.ndarray, hp: Hyperparameters) -> np.ndarray:
    """Where a shard's training rows begin; a row is seq_len tokens and one more as last target.

    A row begins at a document's start, or where the row before it ended if that document runs on
    for a whole further row. Between rows only the end of a cut document is left out.
    """
    documents = np.flatnonzero(tokens == hp.document_start).tolist()
    starts, position = [], documents[0] if documents else 0
    while position + hp.seq_len < len(tokens):
        starts.append(position)
        position += hp.seq_len
        following = bisect_left(documents, position)
        if following < len(documents) and documents[following] < position + hp.seq_len:
            position = documents[following]
    return np.array(starts, np.int64)


def check_data(hp: Hyperparameters) -> list[str]:
    """Read every shard once; return the log's lines. Raises for anything that cannot train."""
    lines, whole, rows = [], [], 0
    needed = hp.num_steps * hp.batch_tokens // hp.seq_len
    for kind, pattern in (("train", hp.train_files), ("val", hp.val_files)):
        for path in find_shards(str(ROOT / pattern)):
            tokens, digest = check_tokens(path, hp.vocab_size)
            lines.append(f"{kind}_shard: {path.name} tokens:{len(tokens)} sha256:{digest}")
            whole.append(digest)
            if kind == "train" and rows < needed:
                rows += hp.max_epochs * len(row_starts(tokens, hp))
    if rows < needed:
        raise RunError(
            f"{hp.train_files} holds {rows} rows of {hp.seq_len} tokens in {hp.max_epochs} passes, "
            f"{hp.num_steps} steps need {needed}; get more shards, or lower --num_steps"
        )
    found = hashlib.sha256(" ".join(whole).encode()).hexdigest()
    verdict = "as expected" if found == hp.data_sha256 else "DIFFERENT: losses are not comparable"
    return [*lines, f"data_sha256: {found} ({verdict if hp.data_sha256 else 'none expected'})"]


def training_rows(hp: Hyperparameters, seed: int, skip: int):
    """Yield (shard's tokens, start) of every row after the first skip, shuffled in each shard.

    The order depends on the seed alone, so every rank walks the same global stream.
    """
    for epoch in range(hp.max_epochs):
        for index, path in enumerate(find_shards(str(ROOT / hp.train_files))):
            tokens = open_shard(path)
            starts = np.random.default_rng((seed, epoch, index)).permutation(row_starts(tokens, hp))
            yield from ((tokens, start) for start in starts[skip:])
            skip = max(0, skip - len(starts))


def micro_batches(hp: Hyperparameters, rt: Runtime, micro_seqs: int, seed: int, first_step: int):
    """Yield this rank's (inputs, targets), int64 (micro_seqs, seq_len), from first_step on.

    A step's rows are dealt to accumulation x ranks equal micro-batches: its global batch is the
    same for any number of ranks.
    """
    rows_a_step = hp.batch_tokens // hp.seq_len
    rows = training_rows(hp, seed, skip=first_step * rows_a_step)
    while len(step_rows := list(islice(rows, rows_a_step))) == rows_a_step:
        for at in range(rt.rank * micro_seqs, rows_a_step, rt.world_size * micro_seqs):
            chunk = [t[s : s + hp.seq_len + 1] for t, s in step_rows[at : at + micro_seqs]]
            yield inputs_and_targets(np.stack(chunk))


def inputs_and_targets(rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Rows of T + 1 tokens as int64 inputs and targets (B, T)."""
    block = torch.from_numpy(rows.astype(np.int64))
    return block[:, :-1].contiguous(), block[:, 1:].contiguous()


class Prefetcher:
    """Runs a generator of tensor pairs in a thread, ahead of the step that needs them."""

    def __init__(self, pairs, rt: Runtime, depth: int = 4):
        self.rt, self.ready = rt, queue.Queue(depth)
        threading.Thread(target=self.fill, args=(pairs,), daemon=True).start()

    def fill(self, pairs):
        try:
            for pair in pairs:
                self.ready.put([t.pin_memory() for t in pair] if self.rt.is_gpu else pair)
            self.ready.put(RunError("the training shards ended early; run: ./run.sh again"))
        except Exception as error:
            self.ready.put(error)

    def __next__(self) -> list[Tensor]:
        if isinstance(item := self.ready.get(), Exception):
            raise item
        return [t.to(self.rt.device, non_blocking=True) for t in item]


def validation_batches(hp: Hyperparameters, rt: Runtime, most_seqs: int):
    """This rank's share of the fixed validation rows, as (inputs, targets) on the host."""
    tokens = np.concatenate([open_shard(path) for path in find_shards(str(ROOT / hp.val_files))])
    count, last = hp.val_tokens // hp.val_seq_len, len(tokens) - hp.val_seq_len - 1
    if (count - 1) * hp.val_seq_len > last or count % rt.world_size:
        raise RunError(
            f"{hp.val_files} holds {len(tokens)} tokens, from which {count} validation rows of "
            f"{hp.val_seq_len + 1} cannot be dealt to {rt.world_size} ranks equally; get the whole "
            "validation shard, or change --val_tokens or --nproc_per_node"
        )
    starts = np.arange(count) * hp.val_seq_len
    if hp.val_spread:
        starts = np.arange(count) * last // max(count - 1, 1)
    starts = starts[rt.rank :: rt.world_size]
    batch_seqs = max(n for n in range(1, most_seqs + 1) if len(starts) % n == 0)
    rows = np.stack([tokens[s : s + hp.val_seq_len + 1] for s in starts])
    return [inputs_and_targets(part) for part in np.split(rows, len(rows) // batch_seqs)]


def visible_keys(rows: Tensor, hp: Hyperparameters, window: int) -> float:
    """Mean number of keys that a query of these rows (B, T) sees through a window."""
    index = torch.arange(rows.size(1)).expand_as(rows)
    opened = torch.where(rows == hp.document_start, index, 0).cummax(1).values
    return (index - opened + 1).clamp(max=window).float().mean().item()


# ------------------------------------------------------------------------------ Model
#
# Shapes: B sequences, T tokens, D model_dim, H heads, K head_dim, M mlp_dim, V vocabulary.
# The residual stream x is (B, T, D).

BLOCK = 128  # tokens on a side of an attention block, Runtime.seq_len_unit
GATE_DIM = 12  # leading dimensions of the stream that gates read


def norm(x: Tensor) -> Tensor:
    """RMSNorm without parameters, over the last dimension (arXiv 1910.07467)."""
    return x * torch.rsqrt((x * x).float().mean(-1, keepdim=True) + 1e-6).type_as(x)


def linear(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """x (..., in) times weight (out, in), multiplied in dtype, in x's dtype again."""
    return F.linear(x.to(dtype), weight.to(dtype)).type_as(x)


def may_attend(q_index, k_index, q_doc, k_doc, window):
    """The one definition of who sees whom: causal, in a document, at most window tokens."""
    distance = q_index - k_index
    return (distance >= 0) & (distance < window) & (q_doc == k_doc)


def dense_mask(docs_BT: Tensor, window: Tensor) -> Tensor:
    """Boolean (B, 1, T, T) mask of may_attend."""
    index = torch.arange(docs_BT.size(1), device=docs_BT.device)
    docs_q, docs_k = docs_BT[:, None, :, None], docs_BT[:, None, None, :]
    return may_attend(index[:, None], index[None, :], docs_q, docs_k, window)


def block_mask(docs_BT: Tensor, window: Tensor) -> BlockMask:
    """The same mask by blocks, from each block's first and last document: no (T, T) tensor.

    docs_BT counts up along a row and window is a tensor, so one graph serves every window.
    Blocks that lie inside the mask as a whole are marked full, and skip may_attend.
    """
    count = docs_BT.size(1) // BLOCK
    first_doc, last_doc = docs_BT[:, ::BLOCK], docs_BT[:, BLOCK - 1 :: BLOCK]
    block = torch.arange(count, device=docs_BT.device)
    apart = (block[:, None] - block[None, :]) * BLOCK  # distance of equal places in two blocks
    meets = (first_doc[:, :, None] <= last_doc[:, None, :]) & (
        last_doc[:, :, None] >= first_doc[:, None, :]
    )
    inside = (first_doc[:, :, None] == last_doc[:, None, :]) & (
        last_doc[:, :, None] == first_doc[:, None, :]
    )
    some = meets & (apart >= 0) & (apart - BLOCK + 1 < window)
    full = inside & (apart > 0) & (apart + BLOCK - 1 < window)

    def listed(chosen):  # (B, rows, columns) -> counts, and columns with the chosen ones first
        order = chosen.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
        return chosen.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]

    def mask_mod(b, h, q, k):
        return may_attend(q, k, docs_BT[b, q], docs_BT[b, k], window)

    return BlockMask.from_kv_blocks(
        *listed(some & ~full), *listed(full), BLOCK_SIZE=BLOCK, mask_mod=mask_mod
    )


def attention_mask(docs_BT: Tensor, window: Tensor) -> BlockMask | Tensor:
    return block_mask(docs_BT, window) if docs_BT.is_cuda else dense_mask(docs_BT, window)


def attend(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, mask, scale: float) -> Tensor:
    """Softmax attention (B, H, T, K): FlexAttention for a BlockMask, else SDPA."""
    if isinstance(mask, BlockMask):
        return flex_attention(q_BHTK, k_BHTK, v_BHTK, block_mask=mask, scale=scale)
    return F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, attn_mask=mask, scale=scale)


def rotary_tables(seq_len: int, head_dim: int, base: float, device) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 (T, 1, K/4): a quarter of the head turns against another quarter.

    The other half of the dimensions keeps frequency 0 (rotary: arXiv 2104.09864).
    """
    quarter = head_dim // 4
    frequency = base ** -torch.linspace(0, 1, quarter, device=device)
    angle = torch.arange(seq_len, device=device)[:, None] * frequency
    return angle.cos()[:, None], angle.sin()[:, None]


def rotate(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    quarter = cos.size(-1)
    a, b, fixed = x_BTHK.split([quarter, quarter, x_BTHK.size(-1) - 2 * quarter], dim=-1)
    cos, sin = cos.type_as(a), sin.type_as(a)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, fixed], dim=-1)


def parameter_if(wanted, initial: Tensor) -> nn.Parameter | None:
    return nn.Parameter(initial) if wanted else None


class Attention(nn.Module):
    """QK-normed rotary attention; o is stored (in, out) so that all four share one shape."""

    def __init__(self, hp: Hyperparameters, dtype: torch.dtype, layer: int):
        super().__init__()
        self.heads, self.scale, self.dtype = hp.num_heads, hp.attn_scale, dtype
        self.offset_keys = hp.key_offset and hp.window_kind(layer) == "L"
        has_value_embed = hp.value_table(layer) is not None
        self.qkvo = nn.Parameter(torch.empty(4, hp.num_heads * hp.head_dim, hp.model_dim))
        self.value_gate = parameter_if(has_value_embed, torch.zeros(hp.num_heads, GATE_DIM))

    def forward(
        self, x: Tensor, value_BTHK: Tensor | None, cos, sin, mask, before_BT1: Tensor
    ) -> Tensor:
        """value: added to v, or None; before: 1 where the token before is of the same document."""
        B, T, _ = x.shape
        qkv, o = self.qkvo.split([3, 1])
        q, k, v = linear(x, qkv.flatten(0, 1), self.dtype).view(B, T, 3, self.heads, -1).unbind(2)
        q, k = rotate(norm(q), cos, sin), rotate(norm(k), cos, sin)
        if self.offset_keys:  # a query can then find what followed its own token
            turned, fixed = k.chunk(2, dim=-1)
            k = torch.cat([turned, fixed.roll(1, 1) * before_BT1[..., None]], dim=-1)
        if value_BTHK is not None:  # arXiv 2410.17897, gated; the gate is 1 at the start
            gate_BTH = 2 * torch.sigmoid(F.linear(x[..., :GATE_DIM], self.value_gate.type_as(x)))
            v = v + gate_BTH[..., None] * value_BTHK
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        y_BHTK = attend(q, k, v, mask, self.scale)
        return linear(y_BHTK.transpose(1, 2).reshape(B, T, -1), o[0].T, self.dtype)


class MLP(nn.Module):
    """ReLU squared (arXiv 2109.08668); down is stored (in, out), shaped like up."""

    def __init__(self, hp: Hyperparameters, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.up_down = nn.Parameter(torch.empty(2, hp.mlp_dim, hp.model_dim))

    def forward(self, x: Tensor) -> Tensor:
        up, down = self.up_down.unbind(0)
        h = F.relu(linear(x, up, self.dtype))
        return linear(h * h, down.T, self.dtype)


def shifted(x: Tensor, taps_JD: Tensor, reach_JBT1: Tensor) -> Tensor:
    """x plus J tokens before it, weighted by channel: a causal depthwise convolution.

    reach is 1 where the token j + 1 before lies in the same document, else 0. Primer (arXiv
    2109.08668) convolves queries, keys and values; here it is what every sublayer reads.
    """
    terms = (tap * reach * x.roll(j + 1, 1)
             for j, (tap, reach) in enumerate(zip(taps_JD, reach_JBT1, strict=True)))  # fmt: skip
    return sum(terms, start=x)


class Block(nn.Module):
    """Attention and MLP on the residual stream, into which the first stream x0 flows again."""

    def __init__(self, hp: Hyperparameters, dtype: torch.dtype, layer: int):
        super().__init__()
        self.attn, self.mlp = Attention(hp, dtype, layer), MLP(hp, dtype)
        self.mix = nn.Parameter(torch.tensor([1.0, 0.0]))  # weights of x and x0
        self.taps = parameter_if(hp.shift_taps, torch.zeros(2, hp.shift_taps, hp.model_dim))

    def forward(self, x: Tensor, x0: Tensor, value_BTHK, cos, sin, mask, reach_JBT1) -> Tensor:
        mix = self.mix.type_as(x)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn(self.read(x, 0, reach_JBT1), value_BTHK, cos, sin, mask, reach_JBT1[0])
        return x + self.mlp(self.read(x, 1, reach_JBT1))

    def read(self, x: Tensor, sublayer: int, reach_JBT1: Tensor) -> Tensor:
        """The stream as attention (0) or MLP (1) gets it."""
        x = norm(x)
        return x if self.taps is None else shifted(x, self.taps[sublayer].type_as(x), reach_JBT1)


class GPT(nn.Module):
    """Tokens to mean loss. Output projections and head start at 0, so the first loss is ln V."""

    def __init__(self, hp: Hyperparameters, rt: Runtime):
        super().__init__()
        self.hp, self.stream_dtype = hp, rt.stream_dtype
        self.embed = nn.Parameter(torch.randn(hp.vocab_size, hp.model_dim))
        width, count = hp.num_heads * hp.head_dim, hp.num_value_embeds
        self.value_embeds = parameter_if(count, 0.01 * torch.randn(count, hp.vocab_size, width))
        self.bigram = parameter_if(hp.bigram_rows, torch.zeros(hp.bigram_rows, hp.model_dim))
        self.blocks = nn.ModuleList(Block(hp, rt.matmul_dtype, i) for i in range(hp.num_layers))
        self.lm_head = nn.Parameter(torch.zeros(hp.vocab_size, hp.model_dim))
        self.smear = nn.Parameter(torch.zeros(GATE_DIM + 1))  # gate weights, then strength
        self.skip_gate = parameter_if(hp.skip_from >= 0, torch.tensor(-1.5))
        self.backout = parameter_if(hp.backout_layer >= 0, torch.tensor(0.0))
        bound = 3**0.5 * 0.5 * hp.model_dim**-0.5  # uniform with std 0.5 / sqrt(D)
        for block in self.blocks:
            block.attn.qkvo.data.uniform_(-bound, bound)[3].zero_()
            block.mlp.up_down.data.uniform_(-bound, bound)[1].zero_()

    def embed_tokens(self, inputs_BT: Tensor, continues_BT1: Tensor) -> Tensor:
        """Embedding plus hashed pair (arXiv 1709.03933); each token smeared with the one before.

        continues: 1 where the token before lies in the same document, else 0; only then it counts.
        """
        x = self.embed[inputs_BT].to(self.stream_dtype)
        if self.hp.bigram_rows:
            in_document = continues_BT1[..., 0] > 0
            before_BT = torch.where(in_document, inputs_BT.roll(1, 1), self.hp.document_start)
            row_BT = ((36313 * inputs_BT) ^ (27191 * before_BT)) % self.hp.bigram_rows
            x = x + self.bigram[row_BT].type_as(x)
        x = norm(x)
        gate, strength = self.smear.type_as(x).split([GATE_DIM, 1])
        share_BT1 = strength * torch.sigmoid(x[..., :GATE_DIM] @ gate)[..., None] * continues_BT1
        return norm(x + share_BT1 * x.roll(1, 1))

    def logits(self, inputs_BT: Tensor, window: Tensor) -> Tensor:
        """Logits (B, T, V) in fp32. window: 0-D tensor, tokens that long windows see."""
        hp, (B, T) = self.hp, inputs_BT.shape
        docs_BT = (inputs_BT == hp.document_start).cumsum(1)
        windows = {"S": window // 2, "L": window}
        masks = {kind: attention_mask(docs_BT, windows[kind]) for kind in set(hp.window_pattern)}
        cos, sin = rotary_tables(T, hp.head_dim, hp.rotary_base, inputs_BT.device)
        reach = [F.pad(docs_BT[:, j:] == docs_BT[:, :-j], (j, 0))
                 for j in range(1, 1 + max(1, hp.shift_taps))]  # fmt: skip
        reach_JBT1 = torch.stack(reach)[..., None].to(self.stream_dtype)
        x = x0 = self.embed_tokens(inputs_BT, reach_JBT1[0])
        kept = backed_out = None
        for i, block in enumerate(self.blocks):
            if i == hp.skip_to and kept is not None:
                x = x + torch.sigmoid(self.skip_gate).type_as(x) * kept
            table, value_BTHK = hp.value_table(i), None
            if table is not None:
                rows = self.value_embeds[table][inputs_BT].type_as(x)
                value_BTHK = rows.view(B, T, hp.num_heads, hp.head_dim)
            x = block(x, x0, value_BTHK, cos, sin, masks[hp.window_kind(i)], reach_JBT1)
            kept = x if i == hp.skip_from else kept
            backed_out = x if i == hp.backout_layer else backed_out
        if backed_out is not None:
            x = x - self.backout.type_as(x) * backed_out
        logits_BTV = linear(norm(x), self.lm_head, self.blocks[0].mlp.dtype).float()
        return hp.logit_cap * torch.tanh(logits_BTV / hp.logit_cap)

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor, window: Tensor) -> Tensor:
        """Mean cross-entropy, nats a token, fp32."""
        return F.cross_entropy(self.logits(inputs_BT, window).flatten(0, 1), targets_BT.flatten())


# ------------------------------------------------------------------------------ Optimizer

POLAR_EXPRESS = (  # arXiv 2505.16932: each the best quintic for what the one before leaves
    (8.1566, -22.4833, 15.8788),
    (4.0429, -2.8089, 0.5000),
    (3.8917, -2.7725, 0.5061),
    (3.2858, -2.3681, 0.4645),
    (2.3465, -1.7098, 0.4232),
)


def orthogonalize(G: Tensor, dtype: torch.dtype) -> Tensor:
    """The orthogonal factor of each matrix in G (N, rows, cols): singular values become about 1."""
    X = G.to(dtype)
    if wide := G.size(-2) > G.size(-1):
        X = X.mT
    X = X / (1.02 * X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in POLAR_EXPRESS:
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return (X.mT if wide else X).type_as(G)


def muon_update(W, G, momentum, second, rate, decay, beta, dtype):
    """Update matrices W (N, rows, cols) in place with gradients G; scalars are 0-D tensors.

    Nesterov momentum, orthogonalised (Muon: kellerjordan.github.io/posts/muon); each row divided
    by its running root mean square at unchanged norm (NorMuon, arXiv 2510.05491); decay only where
    update and weight agree in sign (arXiv 2510.12402).
    """
    momentum.add_((1 - beta) * (G - momentum))
    U = orthogonalize(G + beta * (momentum - G), dtype)
    second.lerp_((U * U).mean(-1, keepdim=True), 0.1)
    scaled = U * torch.rsqrt(second + 1e-10)
    U_norm, scaled_norm = (x.norm(dim=(-2, -1), keepdim=True) for x in (U, scaled))
    U = scaled * (U_norm / (scaled_norm + 1e-10))
    shape_factor = max(1.0, W.size(-2) / W.size(-1)) ** 0.5
    W.sub_(rate * (shape_factor * U + decay * W * (U * W > 0)))


class Muon:
    """Matrices of one shape, as views of one bank (N, rows, cols) and updated as one batch.

    Each rank updates its part of the bank; then all parts are gathered.
    """

    def __init__(self, params, lr: float, decay: float, rt: Runtime, update):
        self.params, self.lr, self.decay, self.rt, self.update = params, lr, decay, rt, update
        self.bank = torch.cat([p.data for p in params])
        for p, view in zip(params, self.bank.split([len(p) for p in params]), strict=True):
            p.data = view
        self.mine = rt.my_part(len(self.bank))
        self.momentum = torch.zeros_like(self.bank)
        self.second = torch.zeros_like(self.bank[..., :1])

    def step(self, scale: float, beta: float):
        gradients = torch.cat([p.grad for p in self.params])[self.mine]
        if len(gradients):
            state = (x[self.mine] for x in (self.momentum, self.second))
            scalars = (torch.tensor(x) for x in (self.lr * scale, self.decay, beta))
            self.update(self.bank[self.mine], gradients, *state, *scalars, self.rt.matmul_dtype)
        self.rt.gather_parts(self.bank)

    def state(self) -> dict[str, Tensor]:
        """The state's tensors, whole on every rank."""
        self.rt.gather_parts(self.momentum)
        self.rt.gather_parts(self.second)
        return {"momentum": self.momentum, "second": self.second}


class Adam:
    """torch's fused Adam (arXiv 1412.6980) behind the interface of Muon; every rank does it all."""

    def __init__(self, params, lr: float, betas: tuple[float, float]):
        self.params, self.lr = [p for p in params if p is not None], lr
        self.adam = torch.optim.Adam(self.params or [torch.zeros(0)], lr, betas, 1e-10, fused=True)

    def step(self, scale: float, beta: float):
        self.adam.param_groups[0]["lr"] = self.lr * scale
        self.adam.step()

    def state(self) -> dict[str, Tensor]:
        entries = enumerate(self.adam.state[p] for p in self.params)
        return {f"{name}{i}": t for i, tensors in entries for name, t in tensors.items()}


def optimizers(model: GPT, hp: Hyperparameters, rt: Runtime, compiled) -> dict[str, Muon | Adam]:
    """The one table of parameter groups, learning rates, betas and decay.

    Raises AssertionError unless each parameter is in exactly one group.
    """
    attn, mlp = [b.attn.qkvo for b in model.blocks], [b.mlp.up_down for b in model.blocks]
    scalars = [p for b in model.blocks for p in (b.mix, b.taps, b.attn.value_gate)]
    scalars += [model.smear, model.skip_gate, model.backout]
    update = compiled(muon_update)
    groups = {
        "attn": Muon(attn, hp.muon_lr, hp.muon_decay, rt, update),
        "mlp": Muon(mlp, hp.muon_lr, hp.muon_decay, rt, update),
        "embed": Adam([model.embed], hp.embed_lr, betas=(0.8, 0.95)),
        "tables": Adam([model.value_embeds, model.bigram], hp.table_lr, betas=(0.8, 0.95)),
        "head": Adam([model.lm_head], hp.head_lr, betas=(0.8, 0.95)),
        "scalars": Adam(scalars, hp.scalar_lr, betas=(0.8, 0.95)),
    }
    grouped = sorted(id(p) for group in groups.values() for p in group.params)
    assert grouped == sorted(map(id, model.parameters())), "a parameter is not in just one group"
    return groups


def lr_scale(step: int, hp: Hyperparameters) -> float:
    """Trapezoid: up over warmup_frac, level, linearly down over cooldown_frac."""
    rise = (step + 1) / max(hp.warmup_frac * hp.num_steps, 1)
    left = (hp.num_steps - step) / max(hp.cooldown_frac * hp.num_steps, 1)
    return min(1.0, rise, hp.final_lr_frac + (1 - hp.final_lr_frac) * min(1.0, left))


def muon_momentum(step: int, hp: Hyperparameters) -> float:
    return 0.85 + 0.10 * min(1.0, step / max(hp.momentum_warmup, 1))


def window_tokens(step: int, hp: Hyperparameters) -> int:
    """Tokens that a long window sees: equal increments over window_stages equal stages."""
    last = hp.window_stages - 1
    stage = min(hp.window_stages * step // hp.num_steps, last)
    return hp.window_start + (hp.window_end - hp.window_start) * stage // max(last, 1)


# ------------------------------------------------------------------------------ Train

DIVERGED_STEPS = 50  # so many steps in a row above the loss of a uniform guess end a run


class Trainer:
    """One run: a model, its optimizers and data, and the steps that join them."""

    def __init__(self, hp: Hyperparameters, options: RunOptions, rt: Runtime, clock, log: Log):
        self.hp, self.options, self.rt, self.clock, self.log = hp, options, rt, clock, log
        if hp.seq_len % rt.seq_len_unit or hp.val_seq_len % rt.seq_len_unit:
            raise RunError(f"--seq_len and --val_seq_len must divide by {rt.seq_len_unit} here")
        self.micro_seqs = micro_batch_rows(hp, rt, options.micro_batch_seqs)
        self.accumulation = hp.batch_tokens // hp.seq_len // (rt.world_size * self.micro_seqs)
        problem = rt.compiler_problem() if options.compile else "--compile false"
        log.line(f"compile: {problem or 'yes'}", show=bool(problem))
        self.compiled = (lambda f: f) if problem else partial(torch.compile, dynamic=False)
        torch.manual_seed(options.seed)
        self.model = GPT(hp, rt).to(rt.device)
        self.optimizers = optimizers(self.model, hp, rt, self.compiled)
        self.loss = self.compiled(self.model)
        self.val = validation_batches(hp, rt, self.micro_seqs * hp.seq_len // hp.val_seq_len or 1)
        self.step = self.first_step = self.bad_steps = self.graphs = 0
        self.curve = []  # (train ms, validation loss)
        self.flops = self.flops_per_token()
        log.line(f"micro_batch_seqs: {self.micro_seqs} accumulation: {self.accumulation}")
        log.line(f"parameters: {sum(p.numel() for p in self.model.parameters())}")

    def flops_per_token(self) -> float:
        """Forward and backward, the mean over the schedule: 6 a weight, 12 a key and head width."""
        hp, model = self.hp, self.model
        rows = next(micro_batches(hp, self.rt, self.micro_seqs, self.options.seed, 0))[0]
        weights = model.lm_head.numel()
        weights += sum(b.attn.qkvo.numel() + b.mlp.up_down.numel() for b in model.blocks)
        kinds = [hp.window_kind(i) for i in range(hp.num_layers)]
        steps = [s * hp.num_steps // 100 for s in range(100)]  # a percent of the run each
        spans = Counter(
            w if kind == "L" else w // 2
            for w in (window_tokens(s, hp) for s in steps)
            for kind in kinds
        )
        keys = sum(n / 100 * visible_keys(rows, hp, w) for w, n in spans.items())
        return 6 * weights + 12 * hp.num_heads * hp.head_dim * keys

    def update(self, step: int, batches) -> Tensor:
        """Take one optimizer step; return the mean loss of this rank's share (0-D, on device)."""
        total = torch.zeros((), device=self.rt.device)
        window = torch.tensor(window_tokens(step, self.hp), device=self.rt.device)
        for _ in range(self.accumulation):
            inputs_BT, targets_BT = next(batches)
            loss = self.loss(inputs_BT, targets_BT, window) / self.accumulation
            loss.backward()
            total += loss.detach()
        self.rt.average([p.grad for p in self.model.parameters()])
        for optimizer in self.optimizers.values():
            optimizer.step(lr_scale(step, self.hp), muon_momentum(step, self.hp))
        self.model.zero_grad(set_to_none=True)
        return total

    @torch.no_grad()
    def validation_loss(self, step: int, batches) -> float:
        """Mean over these batches of every rank, nats a token, through the windows of step."""
        total = torch.zeros((), device=self.rt.device, dtype=torch.float64)
        window = torch.tensor(window_tokens(step, self.hp), device=self.rt.device)
        for batch in batches:
            inputs_BT, targets_BT = (t.to(self.rt.device) for t in batch)
            total += self.loss(inputs_BT, targets_BT, window).double() / len(batches)
        self.rt.average([total])
        return total.item()

    def state(self) -> dict[str, Tensor]:
        """Every tensor that training changes, by name; live, not copies."""
        tensors = {f"model.{name}": p.data for name, p in self.model.named_parameters()}
        for group, optimizer in self.optimizers.items():
            tensors |= {f"{group}.{name}": t for name, t in optimizer.state().items()}
        return tensors

    def warm_up(self):
        """Compile every graph on dummy tokens, then put back every tensor that they changed."""
        before = {f"model.{n}": p.detach().clone() for n, p in self.model.named_parameters()}
        try:
            self.run_on_dummies()
        except COMPILE_ERRORS as error:
            reason = str(error).strip().splitlines()[0]
            self.log.line(f"compile: failed, so this run is slower ({reason})", show=True)
            self.loss = self.model
            self.optimizers = optimizers(self.model, self.hp, self.rt, lambda update: update)
            self.run_on_dummies()
        for name, tensor in self.state().items():
            if name in before:
                tensor.copy_(before[name])
            else:  # optimizer state, which is 0 before the first step
                tensor.zero_()
        self.graphs = compiled_graphs()

    def run_on_dummies(self):
        shape = (self.micro_seqs, self.hp.seq_len)
        # Two tensors, for one in both places would be compiled as a case of its own.
        dummies = [torch.zeros(shape, dtype=torch.int64, device=self.rt.device) for _ in range(2)]
        self.model.zero_grad(set_to_none=True)
        for _ in range(2):
            self.update(0, repeat(dummies))
            self.validation_loss(0, [[torch.zeros_like(t) for t in self.val[0]]])

    def save(self):
        """Write a checkpoint beside the log, then rename it: a kill leaves the old or the new."""
        with self.clock.charged_to("checkpoint"):
            contents = {"tensors": self.state(), "step": self.step, "curve": self.curve,
                        "train_ms": self.clock.train_ms(), "config": self.config()}  # fmt: skip
            path = self.log.path.with_suffix(".pt")
            self.rt.on_main(lambda: write_checkpoint(path, contents))
            self.log.line(f"checkpoint: {path} step:{self.step}", show=True)

    def config(self) -> dict:
        return {**dataclasses.asdict(self.hp), "seed": self.options.seed}

    def resume(self, path: str):
        """Continue from a checkpoint of a run with the same configuration."""
        saved = read_checkpoint(path)
        if other := {k: v for k, v in saved["config"].items() if self.config().get(k) != v}:
            flags = " ".join(f"--{name} {value}" for name, value in other.items())
            raise RunError(f"{path} was saved by another run; to resume it, add: {flags}")
        for name, tensor in self.state().items():
            tensor.copy_(saved["tensors"][name])
        self.step = self.first_step = saved["step"]
        self.curve, self.clock.carried_ms = saved["curve"], saved["train_ms"]
        self.log.line(f"resumed: {path} step:{self.step}", show=True)

    def validate(self):
        with self.clock.charged_to("validation"):
            loss = self.validation_loss(self.step, self.val)
        train_ms = self.clock.train_ms()
        self.curve.append((train_ms, loss))
        self.log.line(
            f"step:{self.step}/{self.hp.num_steps} val_loss:{loss:.6f} "
            f"train_time:{train_ms:.0f}ms step_avg:{train_ms / max(self.step, 1):.2f}ms",
            show=True,
        )
        self.log.check()

    def read_pulse(self, step: int, pulse: Tensor, wait) -> str:
        """Log the step whose pulse [loss, stop request] arrives; return a status to end with."""
        wait()
        loss, stop = pulse.tolist()
        train_ms, num_steps = self.clock.train_ms(), self.hp.num_steps
        self.log.line(f"step:{step}/{num_steps} train_loss:{loss:.6f} train_time:{train_ms:.0f}ms")
        rate = self.tokens_per_second()
        share = mfu(self.flops * rate, self.rt.device_name, self.rt.world_size)
        self.log.progress(step, f"loss {loss:.4f}, {rate / 1000:.1f}k tokens/s, MFU {share}")
        self.bad_steps = self.bad_steps + 1 if loss > math.log(self.hp.vocab_size) else 0
        if not math.isfinite(loss) or self.bad_steps > DIVERGED_STEPS:
            return "diverged"
        return "aborted" if stop else ""

    def train(self, stop: StopRequest) -> str:
        """Run the steps that are left; return the status."""
        hp, rt, options, pending, status = self.hp, self.rt, self.options, [], ""
        batches = micro_batches(hp, rt, self.micro_seqs, options.seed, self.step)
        batches = Prefetcher(batches, rt)
        stop.deferred = True
        self.clock.switch("train")
        while self.step < hp.num_steps and not status:
            if self.step % hp.val_every == 0:
                self.validate()
            loss = self.update(self.step, batches)
            pulse = torch.stack([loss, torch.full_like(loss, stop.signal > 0)])
            rt.average([pulse])
            self.step += 1
            pending.append((self.step, *rt.to_host(pulse)))
            # Losses are read while later steps run, so that the device never waits for the host.
            while len(pending) > rt.steps_in_flight * (self.step < hp.num_steps):
                status = self.read_pulse(*pending.pop(0)) or status
            if status == "aborted" or options.save_every and self.step % options.save_every == 0:
                self.save()
        if not status:
            self.validate()
            status = "success" if self.curve[-1][1] <= hp.target_val_loss else "missed"
        self.clock.switch("end")
        return status

    def tokens_per_second(self) -> float:
        seconds = max(self.clock.train_ms() - self.clock.carried_ms, 1) / 1000
        return (self.step - self.first_step) * self.hp.batch_tokens / seconds

    def result(self, status: str, overrides: list[str]) -> str:
        hp, clock, rate = self.hp, self.clock, self.tokens_per_second()
        return (
            f"status:{status} val_loss:{self.curve[-1][1] if self.curve else math.nan:.6f} "
            f"target:{hp.target_val_loss} train_time:{clock.train_ms():.0f}ms "
            f"time_to_target:{time_to_target(self.curve, hp.target_val_loss)} steps:{self.step} "
            f"tokens:{self.step * hp.batch_tokens} tokens_per_s:{rate:.0f} "
            f"flops_per_token:{self.flops:.4g} "
            f"mfu:{mfu(self.flops * rate, self.rt.device_name, self.rt.world_size)} "
            f"peak_memory:{self.rt.peak_memory_mib()}MiB cpu_share:{clock.cpu_share():.2f} "
            f"recompiled:{compiled_graphs() - self.graphs} "
            f"seed:{self.options.seed} overrides:{len(overrides)} resumed_from:{self.first_step}"
        )


# ------------------------------------------------------------------------------ Main


def run(track, hp, options, overrides, rt: Runtime, stop: StopRequest) -> int:
    """Carry out one run and write its log; return the exit code."""
    clock = Stopwatch(PROCESS_START, rt.synchronize)
    stamp = time.strftime("%Y-%m-%dT%H%M%SZ", time.gmtime())
    name = rt.on_main(lambda: f"{stamp}_{track}_{options.slug}_{uuid.uuid4().hex[:8]}")
    log = Log(options.log_dir, name, hp.num_steps)
    rt.on_main(log.open)
    trainer, status = None, "aborted"
    try:
        config = {"run": name, "track": track, "overrides": " ".join(overrides) or "none",
                  **dataclasses.asdict(hp), **dataclasses.asdict(options)}  # fmt: skip
        device = {"device": rt.device_name, "world_size": rt.world_size,
                  "matmul_dtype": rt.matmul_dtype, "stream_dtype": rt.stream_dtype}  # fmt: skip
        rt.on_main(lambda: header_sections(log, SOURCES, options.source_dir, config, device))
        log.section("data", rt.on_main(lambda: check_data(hp)))
        log.section("run")
        log.line(calibration(rt.device, rt.matmul_dtype, rt.synchronize))
        trainer = Trainer(hp, options, rt, clock, log)
        with clock.charged_to("compile"):
            trainer.warm_up()
        if options.resume:
            trainer.resume(options.resume)
        status = trainer.train(stop)
        log.line(calibration(rt.device, rt.matmul_dtype, rt.synchronize))
        if warning := rt.contention(clock.cpu_share()):
            log.line(f"warning: {warning}", show=True)
        rt.close()
    except torch.OutOfMemoryError:
        rows = trainer.micro_seqs if trainer else 1
        raise RunError(
            f"out of memory on {rt.device_name} with {rows} rows a forward pass; "
            f"add --micro_batch_seqs {max(1, rows // 2)}, or lower --seq_len"
        ) from None
    finally:
        log.line(clock.ledger(), show=True)
        log.close(trainer.result(status, overrides) if trainer else f"status:{status}")
    return {"success": 0, "missed": 0, "diverged": 1}.get(status, 128 + stop.signal)


def main() -> int:
    stop, rt = StopRequest(), None
    try:
        default_track = "fineweb" if torch.cuda.is_available() else "embedded"
        track, hp, options, overrides = parse_flags(
            sys.argv[1:], TRACKS, default_track, __doc__.splitlines()[0]
        )
        rt = Runtime(options.fp32)
        return run(track, hp, options, overrides, rt, stop)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + stop.signal
    except (RunError, OSError) as error:
        if getattr(error, "told", True):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
