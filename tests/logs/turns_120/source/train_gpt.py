"""Train a GPT from scratch until it reaches a fixed validation loss, as fast as the hardware can.

    ./run.sh                                         every GPU of this machine, or its CPU
    torchrun --nproc_per_node=4 train_gpt.py         four GPUs, the same global batches
    python train_gpt.py --num_steps 50 --slug try    one process, an experiment

The file reads downwards: what a run is (Hyperparameters), the network (Model), the updates
(Optimizer), the loop (Train). Head loss and MLP, by definition and by kernel, stand in kernels.py;
which tokens a step sees in data/batches.py; device, clock and log are in records/harness.py. Losses
are nats a token.
"""

import time

PROCESS_START = time.perf_counter()  # before the slow imports: the ledger counts them too

import math
import sys
from dataclasses import dataclass, fields
from itertools import pairwise, product, repeat
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from data.batches import (
    Prefetcher,
    check_supply,
    micro_batch_rows,
    micro_batches,
    validation_batches,
    visible_keys,
)
from kernels import Softcap, head_loss, linear, relu_squared_mlp, softcapped
from records.harness import COMPILE_ERRORS, Run, RunError, Runtime, as_flag, execute, knob

HERE = Path(__file__).resolve()
SOURCES = {  # what a log embeds
    path: (HERE.parent / path).read_text()
    for path in (HERE.name, "kernels.py", "data/batches.py", "data/shards.py", "records/harness.py")
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
    # Budget. Of several values each holds for an equal share of the steps.
    num_steps: int = knob(1500, "optimizer steps", 1)
    batch_tokens: tuple[int, ...] = knob((131_072, 262_144, 393_216), "tokens a step, all ranks", 1)
    seq_len: int = knob(16384, "tokens a training row, into which documents are packed", 2)
    document_cap: tuple[int, ...] = knob((896, 2048, 2048), "most tokens of a document; 0: all")
    max_epochs: int = knob(1, "passes over the training shards that are allowed", 1)
    val_every: int = knob(125, "steps between validations", 1)
    # Model.
    layers: str = knob("sSsLSs-SSsL", "a letter each: S short or L long window, small: two heads "
                       "paired, -: no attention")  # fmt: skip
    num_heads: int = knob(6, "attention heads a block", 1)
    head_dim: int = knob(128, "width of a head, divisible by 4", 4)
    model_dim: int = knob(768, "width of the residual stream", 16)
    mlp_dim: int = knob(3072, "width of the hidden layer", 1)
    attn_scale: float = knob(0.1, "factor on q.k after both are normalised, at the first window")
    rotary_base: float = knob(1024.0, "slowest rotary wavelength over 2 pi, tokens", 1)
    logit_cap: float = knob(23.0, "logits become cap * sigmoid((z + shift) / slope)", 1)
    logit_shift: float = knob(5.0, "see --logit_cap")
    logit_slope: float = knob(7.5, "see --logit_cap", 0.1)
    num_value_embeds: int = knob(3, "value-embedding tables, on the first and the last layers")
    bigram_rows: int = knob(251_520, "rows of the hashed table of token pairs; 0: none")
    key_offset: bool = knob(True, "in long layers half of a key is the token before's")
    head_gates: bool = knob(True, "weigh each head's output by what the token says of it")
    shift_taps: int = knob(0, "tokens before it that are mixed into each token at every sublayer")
    skip_from: int = knob(3, "layer whose output is kept; -1: no skip", -1)
    skip_to: int = knob(6, "layer to whose input it is added", -1)
    backout_layer: int = knob(7, "layer whose output leaves before the head; -1: none", -1)
    window_tokens: tuple[int, ...] = knob((384, 896, 1408), "tokens a long window sees, its own "
                                          "included; a short one: half of it", 2)  # fmt: skip
    val_window_tokens: int = knob(2560, "the same in validation; 0: as in training")
    lookahead: float = knob(0.5, "weight of the token after the next, and half for the one after")
    # Optimizer. The table of parameter groups is optimizers().
    muon_lr: float = knob(0.023, "learning rate of hidden matrices")
    muon_decay: float = knob(1.2, "cautious decay of hidden matrices, a unit of rate squared")
    embed_lr: float = knob(0.008, "learning rate of token embeddings")
    head_lr: float = knob(0.008, "learning rate of the head")
    tied_frac: float = knob(0.66, "fraction of steps in which head and embedding are one matrix")
    value_lr: float = knob(0.6, "learning rate of value-embedding tables")
    bigram_lr: float = knob(0.012, "learning rate of the table of token pairs")
    scalar_lr: float = knob(0.04, "learning rate of gates and scalars")
    embed_betas: tuple[float, ...] = knob((0.5, 0.95), "Adam's betas of embeddings and head")
    table_betas: tuple[float, ...] = knob((0.75, 0.95), "Adam's betas of tables")
    scalar_betas: tuple[float, ...] = knob((0.9, 0.99), "Adam's betas of gates and scalars")
    adam_decay: float = knob(0.005, "cautious decay under Adam, a unit of rate squared")
    adam_every: int = knob(2, "steps whose gradients Adam adds up before it moves", 1)
    stage_lr: tuple[float, ...] = knob((1.0, 1.52, 1.73), "factor on every learning rate")
    warmup_frac: float = knob(0.0, "fraction of steps in which rates rise from 0")
    cooldown_frac: float = knob(0.6, "fraction of steps in which rates fall, linearly")
    final_lr_frac: float = knob(0.15, "fraction of each rate that is left at the end")
    extension_steps: int = knob(15, "steps at the end that keep the final rates")
    momentum_warmup: int = knob(300, "steps in which Muon's momentum rises from 0.85 to 0.95")
    momentum_cooldown: int = knob(50, "last steps, in which it falls back")

    def __post_init__(self):
        for f in fields(self):
            value, least = getattr(self, f.name), f.metadata["least"]
            values = value if isinstance(value, tuple) else (value,)
            if f.type not in (str, bool) and not all(least <= v < math.inf for v in values):
                raise RunError(f"--{f.name} {value} is out of range: give at least {least}")
        for whole, part in (("batch_tokens", "seq_len"), ("val_tokens", "val_seq_len")):
            values, unit = getattr(self, whole), getattr(self, part)
            if any(v % unit for v in (values if isinstance(values, tuple) else (values,))):
                raise RunError(f"--{whole} {as_flag(values)} is not a multiple of --{part} {unit}")
        if 0 in self.document_cap and any(self.document_cap):
            raise RunError(f"--document_cap {as_flag(self.document_cap)} mixes 0 with caps; give "
                           f"{self.seq_len} for no cap in some steps")  # fmt: skip
        kinds = set(self.layers)
        if not kinds & set("SLsl") or kinds - set("SLsl-"):
            raise RunError("--layers must be of S, L, s, l and -, and not of - alone")
        if self.head_dim % 4:
            raise RunError(f"--head_dim {self.head_dim} does not divide by 4")
        if self.num_heads % 2 and self.layers.upper() != self.layers:
            raise RunError(
                f"--num_heads {self.num_heads} is odd: no pairs in --layers {self.layers}"
            )
        last = len(self.layers) - 1
        if self.backout_layer > last or self.num_value_embeds > last + 1:
            raise RunError("--backout_layer and --num_value_embeds must stay within --layers")
        if self.skip_from >= 0 and not self.skip_from < self.skip_to <= last:
            raise RunError(
                f"--skip_from {self.skip_from} and --skip_to {self.skip_to} must rise and stay "
                f"below the {last + 1} layers; no skip: --skip_from -1"
            )
        if self.tied_frac and self.embed_lr != self.head_lr:
            raise RunError("--embed_lr and --head_lr must be equal with --tied_frac above 0")

    def stage(self, values: tuple, step: int) -> int:
        """Which of values, that hold for equal shares of the steps, holds in this step."""
        return min(len(values) * step // self.num_steps, len(values) - 1)

    def at(self, values: tuple, step: int):
        return values[self.stage(values, step)]

    def value_table(self, layer: int) -> int | None:
        """Which value-embedding table a layer adds: the first n layers and the last n have one."""
        count, from_end = self.num_value_embeds, layer - len(self.layers)
        return layer if layer < count else count + from_end if from_end >= -count else None


TRACKS = {
    "embedded": Hyperparameters(
        train_files="data/embedded/embedded_train.bin",
        val_files="data/embedded/embedded_val.bin",
        data_sha256="46ee993abd300d89907f21f46b034c6dad65e35e87b50afcdc9668e0617695f9",
        vocab_size=257,
        document_start=256,
        val_tokens=16_384,
        val_seq_len=1024,
        val_spread=True,
        target_val_loss=2.2,
        num_steps=120,
        batch_tokens=(2048,),
        seq_len=128,
        document_cap=(0,),
        val_every=120,
        layers="LL",
        num_heads=4,
        head_dim=32,
        model_dim=128,
        mlp_dim=512,
        attn_scale=0.2386,
        logit_cap=30.0,
        logit_shift=0.0,
        num_value_embeds=0,
        bigram_rows=16384,
        head_gates=False,
        shift_taps=3,
        skip_from=-1,
        skip_to=-1,
        backout_layer=-1,
        window_tokens=(128,),
        val_window_tokens=0,
        lookahead=0.0,
        muon_lr=0.02,
        muon_decay=0.0,
        embed_lr=0.02,
        head_lr=0.004,
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
    "fineweb": Hyperparameters(),
    "fineweb_medium": Hyperparameters(
        target_val_loss=2.92,
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
        backout_layer=10,
        muon_lr=0.025,
    ),
    "wikitext103": Hyperparameters(
        train_files="data/wikitext103/wikitext103_train_*.bin",
        val_files="data/wikitext103/wikitext103_val_*.bin",
        val_tokens=245_760,
        val_seq_len=8192,
        target_val_loss=3.8,
        batch_tokens=(131_072,),
        document_cap=(0,),
        stage_lr=(1.0,),
        max_epochs=4,
    ),
}


def fixed_bytes(hp: Hyperparameters) -> float:
    """Memory that does not grow with the batch: weights, gradients and optimizer state."""
    width, tables = hp.num_heads * hp.head_dim, 2 + hp.num_value_embeds
    matrices = len(hp.layers) * hp.model_dim * (4 * width + 2 * hp.mlp_dim)
    return 18.0 * (matrices + (tables * hp.vocab_size + hp.bigram_rows) * hp.model_dim)


def bytes_per_token(hp: Hyperparameters) -> float:
    """Activations kept for the backward pass, bf16 streams of every layer, and the head's share."""
    return len(hp.layers) * 2 * (16 * hp.model_dim + 2 * hp.mlp_dim) + 6 * hp.vocab_size


# ------------------------------------------------------------------------------ Model
#
# Shapes: B sequences, T tokens, D model_dim, H heads, K head_dim, M mlp_dim, V vocabulary.
# The residual stream x is (B, T, D).


class Schedule(NamedTuple):
    """What the model is told of the step, as tensors of fixed shape: no step recompiles."""

    window: Tensor  # 0-D, tokens that a long window sees
    frequency: Tensor  # (K/4,) radians a token, of the rotary pairs
    attn_scale: Tensor  # 0-D
    target_weights: Tensor  # (J,) of the next token, the one after it, ...; their sum is 1


def schedule(step: int, hp: Hyperparameters, device, training: bool = True) -> Schedule:
    """The schedule of a step; validation has its own window, and the next token as sole target.

    Where the window grows, slow frequencies are stretched with it (YaRN, arXiv 2309.00071). The
    further targets (arXiv 2404.19737) fade out by 2/3 and 1/3 of the run.
    """
    frequency = hp.rotary_base ** -torch.linspace(0, 1, hp.head_dim // 4)
    scale, reached = hp.attn_scale, hp.window_tokens[: 1 + hp.stage(hp.window_tokens, step)]
    for old, new in pairwise(reached):
        turns = old * frequency / (2 * math.pi)
        kept = ((turns - 1) / 31).clamp(0, 1)
        frequency = frequency * (old / new + kept * (1 - old / new))
        scale *= 1 + 0.2 * math.log(new / old)
    weights = [1.0]
    if training and hp.lookahead:
        left = [min(1.0, max(0.0, ahead - 3 * step / hp.num_steps)) for ahead in (2, 1)]
        weights += [hp.lookahead * left[0], hp.lookahead / 2 * left[1]]
    window = (0 if training else hp.val_window_tokens) or reached[-1]
    values = (window, frequency, scale, [w / sum(weights) for w in weights])
    return Schedule(*(torch.as_tensor(v).to(device, non_blocking=True) for v in values))


BLOCK = 128  # tokens on a side of an attention block, Runtime.seq_len_unit
GATE_DIM = 12  # leading dimensions of the stream that gates read


def norm(x: Tensor) -> Tensor:
    """RMSNorm without parameters, over the last dimension (arXiv 1910.07467)."""
    return x * torch.rsqrt((x * x).float().mean(-1, keepdim=True) + 1e-6).type_as(x)


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


def attend(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, mask, kernel_options=None) -> Tensor:
    """Softmax attention (B, H, T, K) of scaled q: FlexAttention for a BlockMask, else SDPA."""
    if isinstance(mask, BlockMask):
        return flex_attention(q_BHTK, k_BHTK, v_BHTK, block_mask=mask, scale=1.0,
                              kernel_options=kernel_options)  # fmt: skip
    return F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, attn_mask=mask, scale=1.0)


def rotary_tables(seq_len: int, frequency: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 (T, 1, K/4): a quarter of the head turns against another quarter.

    The other half of the dimensions keeps frequency 0 (rotary: arXiv 2104.09864).
    """
    angle = torch.arange(seq_len, device=frequency.device)[:, None] * frequency
    return angle.cos()[:, None], angle.sin()[:, None]


def rotate(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn by position; of tables that are longer than x the beginning is used."""
    quarter, T = cos.size(-1), x_BTHK.size(1)
    a, b, fixed = x_BTHK.split([quarter, quarter, x_BTHK.size(-1) - 2 * quarter], dim=-1)
    cos, sin = cos[:T].type_as(a), sin[:T].type_as(a)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, fixed], dim=-1)


def pair_heads(x_BTHK: Tensor) -> Tensor:
    """Two heads as one of twice the length, (B, 2T, H/2, K): token by token, in turns."""
    B, T, H, K = x_BTHK.shape
    return x_BTHK.view(B, T, 2, H // 2, K).reshape(B, 2 * T, H // 2, K)


def parameter_if(wanted, initial: Tensor) -> nn.Parameter | None:
    return nn.Parameter(initial) if wanted else None


class Context(NamedTuple):
    """What every block is told of the tokens; only tokens of the same document count."""

    cos: Tensor
    sin: Tensor
    attn_scale: Tensor
    masks: dict  # BlockMask or boolean mask by letter of hp.layers
    reach_JBT1: Tensor  # 1 where the token j + 1 before lies in the same document, else 0


class Attention(nn.Module):
    """QK-normed rotary attention; o is stored (in, out) so that all four share one shape."""

    def __init__(self, hp: Hyperparameters, rt: Runtime, layer: int):
        super().__init__()
        self.heads, self.dtype, self.kind = hp.num_heads, rt.matmul_dtype, hp.layers[layer]
        self.kernel_options, self.paired = rt.flex_options, self.kind.islower()
        self.offset_keys = hp.key_offset and self.kind in "Ll"
        has_value_embed = hp.value_table(layer) is not None
        self.qkvo = nn.Parameter(torch.empty(4, hp.num_heads * hp.head_dim, hp.model_dim))
        self.value_gate = parameter_if(has_value_embed, torch.zeros(hp.num_heads, GATE_DIM))
        self.head_gate = parameter_if(hp.head_gates, torch.zeros(hp.num_heads, GATE_DIM))

    def forward(self, x: Tensor, value_BTHK: Tensor | None, c: Context) -> Tensor:
        """value: rows of a value-embedding table, added to v, or None."""
        B, T, _ = x.shape
        qkv, o = self.qkvo.split([3, 1])
        q, k, v = linear(x, qkv.flatten(0, 1), self.dtype).view(B, T, 3, self.heads, -1).unbind(2)
        if value_BTHK is not None:  # arXiv 2410.17897, gated
            v = v + gate(x, self.value_gate) * value_BTHK
        q, k = norm(q) * c.attn_scale.type_as(q), norm(k)
        if self.offset_keys:  # a query can then find what followed its own token
            turned, fixed = k.chunk(2, dim=-1)
            k = torch.cat([turned, fixed.roll(1, 1) * c.reach_JBT1[0, ..., None]], dim=-1)
        if self.paired:
            q, k, v = pair_heads(q), pair_heads(k), pair_heads(v)
        q, k = rotate(q, c.cos, c.sin), rotate(k, c.cos, c.sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        y_BHTK = attend(q, k, v, c.masks[self.kind], self.kernel_options)
        y_BTHK = y_BHTK.transpose(1, 2).reshape(B, T, self.heads, -1)  # which also parts pairs
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

    def __init__(self, hp: Hyperparameters, rt: Runtime, layer: int):
        super().__init__()
        self.attn = Attention(hp, rt, layer) if hp.layers[layer] != "-" else None
        self.mlp = MLP(hp, rt.matmul_dtype)
        self.mix = nn.Parameter(torch.tensor([1.0, 0.0]))  # weights of x and x0
        self.taps = parameter_if(hp.shift_taps, torch.zeros(2, hp.shift_taps, hp.model_dim))

    def forward(self, x: Tensor, x0: Tensor, value_BTHK: Tensor | None, c: Context) -> Tensor:
        mix = self.mix.type_as(x)
        x = mix[0] * x + mix[1] * x0
        if self.attn is not None:
            x = x + self.attn(self.read(x, 0, c.reach_JBT1), value_BTHK, c)
        return x + self.mlp(self.read(x, 1, c.reach_JBT1))

    def read(self, x: Tensor, sublayer: int, reach_JBT1: Tensor) -> Tensor:
        """The stream as attention (0) or MLP (1) gets it."""
        x = norm(x)
        return x if self.taps is None else shifted(x, self.taps[sublayer].type_as(x), reach_JBT1)


class GPT(nn.Module):
    """Tokens to mean loss. Output projections start at 0, and the first loss is near ln V."""

    def __init__(self, hp: Hyperparameters, rt: Runtime):
        super().__init__()
        self.hp, self.rt = hp, rt
        self.cap = Softcap(hp.logit_cap, hp.logit_shift, hp.logit_slope)
        self.embed = nn.Parameter(torch.randn(hp.vocab_size, hp.model_dim))
        width, count = hp.num_heads * hp.head_dim, hp.num_value_embeds
        self.value_embeds = parameter_if(count, 0.01 * torch.randn(count, hp.vocab_size, width))
        self.bigram = parameter_if(hp.bigram_rows, torch.zeros(hp.bigram_rows, hp.model_dim))
        self.blocks = nn.ModuleList(Block(hp, rt, i) for i in range(len(hp.layers)))
        self.lm_head = nn.Parameter(torch.zeros(hp.vocab_size, hp.model_dim))
        self.smear = nn.Parameter(torch.zeros(GATE_DIM + 1))  # gate weights, then strength
        self.skip_gate = parameter_if(hp.skip_from >= 0, torch.tensor(-1.5))
        self.backout = parameter_if(hp.backout_layer >= 0, torch.tensor(0.0))
        bound = 3**0.5 * 0.5 * hp.model_dim**-0.5  # uniform with std 0.5 / sqrt(D)
        for block in self.blocks:
            block.mlp.up_down.data.uniform_(-bound, bound)[1].zero_()
            if block.attn is not None:
                block.attn.qkvo.data.uniform_(-bound, bound)[3].zero_()
        if hp.tied_frac:  # Trainer.update keeps the two equal
            self.lm_head.data.copy_(self.embed.data.mul_(0.005))

    def embed_tokens(self, inputs_BT: Tensor, continues_BT1: Tensor) -> Tensor:
        """Embedding plus hashed pair (arXiv 1709.03933); each token smeared with the one before.

        continues: 1 where the token before lies in the same document, else 0; only then it counts.
        """
        x = self.embed[inputs_BT].to(self.rt.stream_dtype)
        if self.hp.bigram_rows:
            in_document = continues_BT1[..., 0] > 0
            before_BT = torch.where(in_document, inputs_BT.roll(1, 1), self.hp.document_start)
            row_BT = ((36313 * inputs_BT) ^ (27191 * before_BT)) % self.hp.bigram_rows
            x = x + self.bigram[row_BT].type_as(x)
        x = norm(x)
        weights, strength = self.smear.type_as(x).split([GATE_DIM, 1])
        share_BT1 = strength * torch.sigmoid(x[..., :GATE_DIM] @ weights)[..., None]
        return norm(x + share_BT1 * continues_BT1 * x.roll(1, 1))

    def context(self, docs_BT: Tensor, at: Schedule) -> Context:
        """docs counts up along a row where documents begin."""
        hp = self.hp
        windows = {kind: at.window if kind in "Ll" else at.window // 2
                   for kind in sorted(set(hp.layers) - {"-"})}  # fmt: skip
        paired_BT = docs_BT.repeat_interleave(2, dim=1) if hp.layers.upper() != hp.layers else None
        masks = {kind: attention_mask(paired_BT if kind.islower() else docs_BT, window)
                 for kind, window in windows.items()}  # fmt: skip
        place = torch.arange(docs_BT.size(1), device=docs_BT.device)
        reach = [(docs_BT == docs_BT.roll(j, 1)) & (place >= j)
                 for j in range(1, 1 + max(1, hp.shift_taps))]  # fmt: skip
        reach_JBT1 = torch.stack(reach)[..., None].to(self.rt.stream_dtype)
        length = docs_BT.size(1) * (1 if paired_BT is None else 2)
        return Context(*rotary_tables(length, at.frequency), at.attn_scale, masks, reach_JBT1)

    def hidden(self, inputs_BT: Tensor, docs_BT: Tensor, at: Schedule) -> Tensor:
        """The normed stream (B, T, D) that the head reads."""
        hp, (B, T) = self.hp, inputs_BT.shape
        c = self.context(docs_BT, at)
        x = x0 = self.embed_tokens(inputs_BT, c.reach_JBT1[0])
        tables = () if self.value_embeds is None else self.value_embeds.unbind()
        values = [t[inputs_BT].type_as(x).view(B, T, hp.num_heads, hp.head_dim) for t in tables]
        kept = backed_out = None
        for i, block in enumerate(self.blocks):
            if i == hp.skip_to and kept is not None:
                x = x + torch.sigmoid(self.skip_gate).type_as(x) * kept
            table = hp.value_table(i)
            x = block(x, x0, None if table is None else values[table], c)
            kept = x if i == hp.skip_from else kept
            backed_out = x if i == hp.backout_layer else backed_out
        if backed_out is not None:
            x = x - self.backout.type_as(x) * backed_out
        return norm(x)

    def documents(self, inputs_BT: Tensor) -> Tensor:
        return (inputs_BT == self.hp.document_start).cumsum(1)

    def logits(self, inputs_BT: Tensor, at: Schedule) -> Tensor:
        """Capped logits (B, T, V) in fp32, whole in memory: for tests and samples."""
        x = self.hidden(inputs_BT, self.documents(inputs_BT), at)
        return softcapped(linear(x, self.lm_head, self.rt.matmul_dtype), self.cap)

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor, at: Schedule) -> Tensor:
        """Cross-entropy of the targets, weighted by at.target_weights; nats a token, fp32."""
        docs_BT = self.documents(inputs_BT)
        further = [F.pad(torch.where(docs_BT[:, j:] == docs_BT[:, :-j], targets_BT[:, j:], -1),
                         (0, j), value=-1) for j in range(1, len(at.target_weights))]  # fmt: skip
        targets_NJ = torch.stack([targets_BT, *further], dim=-1).flatten(0, 1)
        x_ND = self.hidden(inputs_BT, docs_BT, at).flatten(0, 1)
        fits_fp8 = self.hp.vocab_size % 16 == 0 and self.hp.model_dim % 16 == 0
        return head_loss(x_ND, self.lm_head, targets_NJ, at.target_weights, self.cap,
                         self.rt.matmul_dtype, self.rt.has_fp8 and fits_fp8)  # fmt: skip


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
    if tall := G.size(-2) > G.size(-1):
        X = X.mT
    X = X / (1.02 * X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in POLAR_EXPRESS:
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return (X.mT if tall else X).type_as(G)


def halves(W: Tensor) -> tuple[Tensor, Tensor]:
    """An fp32 tensor as bf16, cut off and not rounded, and the 16 bits below it as int16: exact."""
    bits = W.view(torch.int32)
    return (bits >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def whole(high: Tensor, low: Tensor) -> Tensor:
    """What halves took apart, in fp32."""
    return ((high.view(torch.int16).int() << 16) | (low.int() & 0xFFFF)).view(torch.float32)


def agreeing(W: Tensor, U: Tensor) -> Tensor:
    """W where the update U shrinks it, else 0: the weights to decay (arXiv 2510.12402)."""
    return W * (U * W > 0)


def muon_update(W, low, G, momentum, second, rate, decay, beta, dtype):
    """Update matrices W (N, rows, cols) in place with gradients G; scalars are 0-D tensors.

    W is fp32, or bf16 with the lower halves low. Nesterov momentum, orthogonalised (Muon:
    kellerjordan.github.io/posts/muon); each row divided by its running root mean square at
    unchanged norm (NorMuon, arXiv 2510.05491).
    """
    momentum.add_((1 - beta) * (G.float() - momentum))
    U = orthogonalize(G + beta * (momentum - G), dtype)
    second.lerp_((U * U).mean(-1, keepdim=True), 0.1)
    scaled = U * torch.rsqrt(second + 1e-10)
    U_norm, scaled_norm = (x.norm(dim=(-2, -1), keepdim=True) for x in (U, scaled))
    U = scaled * (U_norm / (scaled_norm + 1e-10))
    shape_factor = max(1.0, W.size(-2) / W.size(-1)) ** 0.5
    W32 = W if low is None else whole(W, low)
    W32 = W32 - rate * (shape_factor * U + rate * decay * agreeing(W32, U))
    for part, new in zip((W, low), (W32,) if low is None else halves(W32), strict=False):
        part.copy_(new)


class Muon:
    """Matrices of one shape, as views of one bank (N, rows, cols) and updated as one batch.

    Each rank updates its part of the bank; then all parts are gathered. Where the stream is bf16 so
    is the bank, and low holds what fp32 weights have below it.
    """

    def __init__(self, params, lr: float, decay: float, rt: Runtime, update):
        self.params, self.lr, self.decay, self.rt, self.update = params, lr, decay, rt, update
        self.every, self.low = 1, None
        self.bank = torch.cat([p.data for p in params]).float()
        if rt.stream_dtype == torch.bfloat16:
            self.bank, self.low = halves(self.bank)
        for p, view in zip(params, self.bank.split([len(p) for p in params]), strict=True):
            p.data = view
        self.mine = rt.my_part(len(self.bank))
        self.momentum = torch.zeros_like(self.bank, dtype=torch.float32)
        self.second = torch.zeros_like(self.momentum[..., :1])

    def step(self, scale: float, beta: float):
        gradients = torch.cat([p.grad for p in self.params])[self.mine]
        if len(gradients):
            low = None if self.low is None else self.low[self.mine]
            state = (x[self.mine] for x in (self.momentum, self.second))
            scalars = (torch.tensor(x) for x in (self.lr * scale, self.decay, beta))
            self.update(
                self.bank[self.mine], low, gradients, *state, *scalars, self.rt.matmul_dtype
            )
        self.rt.gather_parts(self.bank)

    def state(self) -> dict[str, Tensor]:
        """The state's tensors, whole on every rank."""
        tensors = {"momentum": self.momentum, "second": self.second}
        if self.low is not None:  # as bf16, for collectives know no int16
            tensors["low"] = self.low.view(torch.bfloat16)
        for tensor in tensors.values():
            self.rt.gather_parts(tensor)
        return tensors


class Adam:
    """torch's fused Adam (arXiv 1412.6980) behind the interface of Muon; every rank does it all.

    It moves once in so many steps, by their added gradients; decay is cautious, a unit of rate
    squared.
    """

    def __init__(self, params, lr: float, betas, decay: float, every: int, rt: Runtime, compiled):
        self.params, self.lr, self.rt = [p for p in params if p is not None], lr, rt
        self.decay, self.every, self.agreeing = decay, every, compiled(agreeing)
        self.adam = torch.optim.Adam(self.params or [torch.zeros(0)], lr, betas, 1e-10, fused=True)

    @torch.no_grad()
    def step(self, scale: float, beta: float):
        rate = self.adam.param_groups[0]["lr"] = self.lr * scale
        self.adam.step()
        for p in self.params if self.decay else ():
            p.sub_(self.agreeing(p, self.adam.state[p]["exp_avg"]), alpha=rate * rate * self.decay)

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts; with gradients that wait for the next move."""
        entries = enumerate(self.adam.state[p] for p in self.params)
        tensors = {f"{name}{i}": t for i, tensors in entries for name, t in tensors.items()}
        for i, p in enumerate(self.params if self.every > 1 else ()):
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            self.rt.average([p.grad])
            tensors[f"grad{i}"] = p.grad
        return tensors


def optimizers(model: GPT, hp: Hyperparameters, rt: Runtime, compiled) -> dict[str, Muon | Adam]:
    """The one table of parameter groups, with each one's rate, betas and decay.

    Raises AssertionError unless each parameter is in exactly one group.
    """
    attn = [b.attn.qkvo for b in model.blocks if b.attn is not None]
    mlp = [b.mlp.up_down for b in model.blocks]
    scalars = [p for b in model.blocks for p in (b.mix, b.taps)]
    scalars += [p for b in model.blocks if b.attn for p in (b.attn.value_gate, b.attn.head_gate)]
    scalars += [model.smear, model.skip_gate, model.backout]
    update = compiled(muon_update)

    def adam(params, lr, betas, decay_factor):
        return Adam(params, lr, betas, decay_factor * hp.adam_decay, hp.adam_every, rt, compiled)

    groups = {
        "attn": Muon(attn, hp.muon_lr, hp.muon_decay, rt, update),
        "mlp": Muon(mlp, hp.muon_lr, hp.muon_decay, rt, update),
        "embed": adam([model.embed], hp.embed_lr, hp.embed_betas, 150),
        "head": adam([model.lm_head], hp.head_lr, hp.embed_betas, 150),
        "values": adam([model.value_embeds], hp.value_lr, hp.table_betas, 5),
        "bigram": adam([model.bigram], hp.bigram_lr, hp.table_betas, 5),
        "scalars": adam(scalars, hp.scalar_lr, hp.scalar_betas, 0),
    }
    grouped = sorted(id(p) for group in groups.values() for p in group.params)
    assert grouped == sorted(map(id, model.parameters())), "a parameter is not in just one group"
    return groups


def lr_scale(step: int, hp: Hyperparameters) -> float:
    """Up over warmup_frac, level, linearly down over cooldown_frac, then extension_steps level."""
    rise = (step + 1) / max(hp.warmup_frac * hp.num_steps, 1)
    left = (hp.num_steps - hp.extension_steps - step) / max(hp.cooldown_frac * hp.num_steps, 1)
    level = hp.final_lr_frac + (1 - hp.final_lr_frac) * min(1.0, max(0.0, left))
    return hp.at(hp.stage_lr, step) * min(1.0, rise, level)


def muon_momentum(step: int, hp: Hyperparameters) -> float:
    rise, left = step / max(hp.momentum_warmup, 1), hp.num_steps - step
    return 0.85 + 0.10 * min(1.0, rise, left / max(hp.momentum_cooldown, 1))


# ------------------------------------------------------------------------------ Train


class Trainer:
    """A model, its optimizers and data, and the steps that join them."""

    def __init__(self, run: Run):
        self.run, hp, rt = run, run.hp, run.rt
        self.hp, self.rt = hp, rt
        if hp.seq_len % rt.seq_len_unit or hp.val_seq_len % rt.seq_len_unit:
            raise RunError(f"--seq_len and --val_seq_len must divide by {rt.seq_len_unit} here")
        check_supply(hp)
        self.micro_seqs = micro_batch_rows(
            hp, rt, run.options.micro_batch_seqs, fixed_bytes(hp), bytes_per_token(hp)
        )
        compiled = run.compiler()
        torch.manual_seed(run.options.seed)
        self.model = GPT(hp, rt).to(rt.device)
        self.optimizers = optimizers(self.model, hp, rt, compiled)
        self.loss = compiled(self.model)
        self.val = validation_batches(hp, rt, self.micro_seqs * hp.seq_len // hp.val_seq_len or 1)
        run.micro_batch_seqs, run.flops_per_token = self.micro_seqs, self.flops_per_token()
        run.log.line(f"micro_batch_seqs: {self.micro_seqs} of {hp.seq_len} tokens")
        run.log.line(f"parameters: {sum(p.numel() for p in self.model.parameters())}")

    def flops_per_token(self) -> float:
        """Forward and backward: 6 a weight, 12 a visible key and head width.

        Keys are counted in the first step's rows, as the mean over the windows.
        """
        hp, model = self.hp, self.model
        rows = next(micro_batches(hp, self.rt, self.micro_seqs, self.run.options.seed, 0))[0]
        matrices = [p for group in ("attn", "mlp") for p in self.optimizers[group].params]
        weights = sum(p.numel() for p in [model.lm_head, *matrices])
        keys = 0.0
        for kind, window in product(hp.layers.replace("-", ""), hp.window_tokens):
            window = window if kind in "Ll" else window // 2
            paired = 2 if kind.islower() else 1  # half the tokens, both heads of each
            keys += paired * visible_keys(rows, hp.document_start, window // paired)
        keys /= len(hp.window_tokens)
        return 6 * weights + 12 * hp.num_heads * hp.head_dim * keys

    def update(self, step: int, batches) -> Tensor:
        """Take one optimizer step; return the mean loss of this rank's share (0-D, on device)."""
        hp, rt, model = self.hp, self.rt, self.model
        total, at = torch.zeros((), device=rt.device), schedule(step, hp, rt.device)
        count = hp.at(hp.batch_tokens, step) // (hp.seq_len * rt.world_size * self.micro_seqs)
        for _ in range(count):
            inputs_BT, targets_BT = next(batches)
            loss = self.loss(inputs_BT, targets_BT, at) / count
            loss.backward()
            total += loss.detach()
        due = [o for o in self.optimizers.values() if (step + 1) % o.every == 0]
        moving = [p for optimizer in due for p in optimizer.params]
        rt.average([p.grad for p in moving])
        if step < hp.tied_frac * hp.num_steps and self.optimizers["embed"] in due:
            both = (model.embed, model.lm_head)  # equal gradients keep equal matrices equal
            grad = sum(p.grad for p in both)
            for p in both:
                p.grad = grad
        for optimizer in due:
            optimizer.step(lr_scale(step, hp), muon_momentum(step, hp))
        for p in moving:
            p.grad = None
        return total

    @torch.no_grad()
    def validation_loss(self, step: int, batches) -> float:
        """Mean over these batches of every rank, nats a token, through the windows of step."""
        total = torch.zeros((), device=self.rt.device, dtype=torch.float64)
        at = schedule(step, self.hp, self.rt.device, training=False)
        for batch in batches:
            inputs_BT, targets_BT = (t.to(self.rt.device) for t in batch)
            total += self.loss(inputs_BT, targets_BT, at).double() / len(batches)
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
        before = {name: tensor.to("cpu", copy=True) for name, tensor in self.state().items()}
        try:
            self.run_on_dummies()
        except COMPILE_ERRORS as error:
            reason = str(error).strip().splitlines()[0]
            self.run.log.line(f"compile: failed, so this run is slower ({reason})", show=True)
            self.loss = self.model
            self.optimizers = optimizers(self.model, self.hp, self.rt, lambda update: update)
            self.run_on_dummies()
        for name, tensor in self.state().items():
            if name in before:
                tensor.copy_(before[name])
            else:  # Adam's state, which does not exist before the first step
                tensor.zero_()

    def run_on_dummies(self):
        shape = (self.micro_seqs, self.hp.seq_len)
        # Two tensors, for one in both places would be compiled as a case of its own.
        dummies = [torch.zeros(shape, dtype=torch.int64, device=self.rt.device) for _ in range(2)]
        self.model.zero_grad(set_to_none=True)
        for step in range(max(2, self.hp.adam_every)):
            self.update(step, repeat(dummies))
            self.validation_loss(0, [[torch.zeros_like(t) for t in self.val[0]]])

    def validate(self):
        with self.run.clock.charged_to("validation"):
            loss = self.validation_loss(self.run.step, self.val)
        self.run.validated(loss)

    def train(self):
        """Take the steps that are left."""
        hp, run = self.hp, self.run
        batches = micro_batches(hp, self.rt, self.micro_seqs, run.options.seed, run.step)
        batches = Prefetcher(batches, self.rt)
        run.start()
        while run.step < hp.num_steps and not run.status:
            if run.step % hp.val_every == 0:
                self.validate()
            run.end_step(self.update(run.step, batches), hp.at(hp.batch_tokens, run.step))
            if run.checkpoint_is_due():
                run.save(self.state())
        if not run.status:
            self.validate()
        run.finish()


def predictor(saved: dict, rt: Runtime):
    """A checkpoint's network as validation sees it: tokens (B, T) to logits (B, T, V), fp32.

    saved: what read_checkpoint returns. RunError if this file describes another network.
    """
    given = {name: v for name, v in saved["config"].items() if name != "seed"}
    try:
        hp = Hyperparameters(**given)
        model = GPT(hp, rt).to(rt.device)
        weights = {name: saved["tensors"][f"model.{name}"].float() for name in model.state_dict()}
        model.load_state_dict(weights)
    except (TypeError, KeyError, RuntimeError) as error:
        raise RunError(
            f"the checkpoint is of another train_gpt.py ({str(error).splitlines()[0]}); "
            "check out the one whose source its log holds"
        ) from None
    at = schedule(saved["step"], hp, rt.device, training=False)
    return torch.no_grad()(lambda inputs_BT: model.logits(inputs_BT, at))


# ------------------------------------------------------------------------------ Main


def main() -> int:
    return execute(Trainer, TRACKS, "fineweb", SOURCES, PROCESS_START)


if __name__ == "__main__":
    sys.exit(main())
