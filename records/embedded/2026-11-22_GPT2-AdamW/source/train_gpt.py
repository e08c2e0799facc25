"""Train GPT-2 as published, with AdamW, until it reaches a fixed validation loss: a baseline.

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
from dataclasses import dataclass
from functools import partial
from itertools import islice, repeat
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    val_seq_len: int = knob(16384, "tokens a validation row, a multiple of seq_len", 2)
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
    model_dim: int = knob(768, "width of the residual stream", 16)
    mlp_dim: int = knob(3072, "width of the hidden layer", 1)
    # Optimizer. The betas stand in adamw().
    peak_lr: float = knob(0.0006, "learning rate after warm-up")
    weight_decay: float = knob(0.1, "decay of matrices and embeddings, a unit of learning rate")
    max_grad_norm: float = knob(1.0, "norm to which the gradient of all parameters is clipped")
    warmup_frac: float = knob(0.0, "fraction of steps in which rates rise from 0")
    final_lr_frac: float = knob(0.1, "fraction of peak_lr that is left at the end of the cosine")

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, least = getattr(self, f.name), f.metadata["least"]
            if f.type in (int, float) and not least <= value < math.inf:
                raise RunError(f"--{f.name} {value} is out of range: give at least {least}")
        for whole, part in (
            ("batch_tokens", "seq_len"),
            ("val_tokens", "val_seq_len"),
            ("val_seq_len", "seq_len"),
        ):
            if getattr(self, whole) % getattr(self, part):
                raise RunError(
                    f"--{whole} {getattr(self, whole)} is not a multiple of "
                    f"--{part} {getattr(self, part)}"
                )


TRACKS = {
    "embedded": Hyperparameters(
        train_files="data/embedded/embedded_train.bin",
        val_files="data/embedded/embedded_val.bin",
        data_sha256="46ee993abd300d89907f21f46b034c6dad65e35e87b50afcdc9668e0617695f9",
        vocab_size=257,
        document_start=256,
        val_tokens=262_144,
        val_seq_len=1024,
        val_spread=True,
        target_val_loss=1.34,
        num_steps=2700,
        batch_tokens=2048,
        seq_len=128,
        val_every=540,
        num_layers=2,
        num_heads=4,
        model_dim=128,
        mlp_dim=512,
        peak_lr=0.006,
        warmup_frac=0.05,
    ),
}


def fixed_bytes(hp: Hyperparameters) -> float:
    """Memory that does not grow with the batch: fp32 weights, gradients and optimizer state."""
    matrices = hp.num_layers * (4 * hp.model_dim + 2 * hp.mlp_dim)
    return 18.0 * hp.model_dim * (matrices + hp.vocab_size + hp.seq_len)


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


# ------------------------------------------------------------------------------ Model
#
# Shapes: B sequences, T tokens, D model_dim, H heads, K width of a head, V vocabulary.
# The residual stream x is (B, T, D).


class LayerNorm(nn.LayerNorm):
    """With gain and bias, in x's dtype (arXiv 1607.06450)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), (x.size(-1),), self.weight, self.bias, 1e-5).type_as(x)


class Linear(nn.Linear):
    """Weight and bias, multiplied in the run's matmul dtype; initialised like GPT-2: N(0, std)."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype, std: float = 0.02):
        super().__init__(inputs, outputs)
        self.matmul_dtype = dtype
        nn.init.normal_(self.weight, std=std)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(self.matmul_dtype), self.bias.to(self.matmul_dtype)
        return F.linear(x.to(self.matmul_dtype), weight, bias).type_as(x)


class Block(nn.Module):
    """Pre-norm attention and MLP with GELU. The causal mask knows nothing of documents."""

    def __init__(self, hp: Hyperparameters, dtype: torch.dtype):
        super().__init__()
        D, residual_std = hp.model_dim, 0.02 / (2 * hp.num_layers) ** 0.5
        self.heads = hp.num_heads
        self.norm1, self.norm2 = LayerNorm(D), LayerNorm(D)
        self.qkv, self.out = Linear(D, 3 * D, dtype), Linear(D, D, dtype, residual_std)
        self.up = Linear(D, hp.mlp_dim, dtype)
        self.down = Linear(hp.mlp_dim, D, dtype, residual_std)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y_BHTK = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y_BHTK.transpose(1, 2).reshape(B, T, D))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """GPT-2 as published (Radford et al. 2019): tokens to mean loss; the head is the embedding."""

    def __init__(self, hp: Hyperparameters, rt: Runtime):
        super().__init__()
        self.stream_dtype, self.matmul_dtype = rt.stream_dtype, rt.matmul_dtype
        self.embed = nn.Parameter(0.02 * torch.randn(hp.vocab_size, hp.model_dim))
        self.positions = nn.Parameter(0.01 * torch.randn(hp.seq_len, hp.model_dim))
        self.blocks = nn.ModuleList(Block(hp, rt.matmul_dtype) for _ in range(hp.num_layers))
        self.norm = LayerNorm(hp.model_dim)

    def logits(self, inputs_BT: Tensor) -> Tensor:
        """Logits (B, T, V) in fp32."""
        x = (self.embed[inputs_BT] + self.positions[: inputs_BT.size(1)]).to(self.stream_dtype)
        for block in self.blocks:
            x = block(x)
        dtype = self.matmul_dtype
        return F.linear(self.norm(x).to(dtype), self.embed.to(dtype)).float()

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean cross-entropy, nats a token, fp32."""
        return F.cross_entropy(self.logits(inputs_BT).flatten(0, 1), targets_BT.flatten())


# ------------------------------------------------------------------------------ Optimizer


def adamw(model: GPT, hp: Hyperparameters) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101); tensors of one dimension (biases, gains) do not decay."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": hp.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, hp.peak_lr, betas=(0.9, 0.95), fused=True)


def lr_scale(step: int, hp: Hyperparameters) -> float:
    """Linear warm-up over warmup_frac, then a cosine down to final_lr_frac."""
    warmup = hp.warmup_frac * hp.num_steps
    done = max(0.0, (step - warmup) / max(hp.num_steps - warmup, 1))
    cosine = hp.final_lr_frac + (1 - hp.final_lr_frac) * 0.5 * (1 + math.cos(math.pi * done))
    return min((step + 1) / max(warmup, 1), cosine)


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
        self.optimizer = adamw(self.model, hp)
        self.loss = self.compiled(self.model)
        self.val = validation_batches(hp, rt, self.micro_seqs * hp.seq_len // hp.val_seq_len or 1)
        self.step = self.first_step = self.bad_steps = self.graphs = 0
        self.curve = []  # (train ms, validation loss)
        self.flops = self.flops_per_token()
        log.line(f"micro_batch_seqs: {self.micro_seqs} accumulation: {self.accumulation}")
        log.line(f"parameters: {sum(p.numel() for p in self.model.parameters())}")

    def flops_per_token(self) -> float:
        """Forward and backward: 6 a weight of a matrix, 6 a key and width (half are masked)."""
        hp = self.hp
        weights = sum(p.numel() for p in self.model.parameters() if p.ndim > 1)
        weights -= self.model.positions.numel()
        return 6 * weights + 6 * hp.num_layers * hp.model_dim * hp.seq_len

    def update(self, step: int, batches) -> Tensor:
        """Take one optimizer step; return the mean loss of this rank's share (0-D, on device)."""
        total = torch.zeros((), device=self.rt.device)
        for _ in range(self.accumulation):
            inputs_BT, targets_BT = next(batches)
            loss = self.loss(inputs_BT, targets_BT) / self.accumulation
            loss.backward()
            total += loss.detach()
        self.rt.average([p.grad for p in self.model.parameters()])
        nn.utils.clip_grad_norm_(self.model.parameters(), self.hp.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.hp.peak_lr * lr_scale(step, self.hp)
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)
        return total

    @torch.no_grad()
    def validation_loss(self, batches) -> float:
        """Mean over these batches of every rank, nats a token."""
        total = torch.zeros((), device=self.rt.device, dtype=torch.float64)
        for batch in batches:
            # Positions reach no further than a training row: longer rows are cut into such rows.
            inputs_BT, targets_BT = (t.to(self.rt.device).view(-1, self.hp.seq_len) for t in batch)
            total += self.loss(inputs_BT, targets_BT).double() / len(batches)
        self.rt.average([total])
        return total.item()

    def state(self) -> dict[str, Tensor]:
        """Every tensor that training changes, by name; live, not copies."""
        tensors = {f"model.{name}": p.data for name, p in self.model.named_parameters()}
        for i, p in enumerate(self.model.parameters()):
            tensors |= {f"adamw.{name}{i}": t for name, t in self.optimizer.state[p].items()}
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
            self.validation_loss([[torch.zeros_like(t) for t in self.val[0]]])

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
            loss = self.validation_loss(self.val)
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
