"""Train GPT-2 as published, from 124M to 175B parameters: what a speedrun must be faster than.

    ./run.sh baselines/train_gpt2.py --track embedded            a small one, on a CPU
    torchrun --nproc_per_node=8 baselines/train_gpt2.py --track 124M

The same command serves any number of GPUs and, with --nnodes, machines; on more than one GPU the
model is sharded. The referee is that of train_gpt.py. There is no dropout, and AdamW's betas are
(0.9, 0.95), as GPT-2 is trained today.
"""

import signal
import time

PROCESS_START = time.perf_counter()  # before the slow imports: the ledger counts them too
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # so that ctrl-C shows no traceback of them

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice, repeat
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # the checkout's, or that of the frozen source which this file is in

from baselines import plan
from data.prefetch import Prefetcher
from referee.checkpoints import fill, restore
from referee.flags import RunError, check_ranges, finish, option
from referee.harness import Settings, execute
from referee.ranks import Runtime
from referee.shards import open_shard
from referee.task import Task, task_shards

# ------------------------------------------------------------------------------ Hyperparameters


@dataclass(frozen=True)
class Hyperparameters:
    """How the network is built and trained."""

    task: str = option("fineweb", "data, validation rows and target: a task of referee/task.py")
    # Budget.
    num_steps: int = option(19_073, "optimizer steps", 1)
    batch_tokens: int = option(524_288, "tokens per step, over all ranks", 1)
    seq_len: int = option(1024, "tokens per training row, and positions of the model", 2)
    val_every: int = option(250, "steps between validations", 1)
    # Model.
    embed_rows: int = option(50257, "rows of the embedding; at least the task's vocabulary", 2)
    num_layers: int = option(12, "blocks", 1)
    num_heads: int = option(12, "attention heads per block", 1)
    model_dim: int = option(768, "width of the residual stream", 1)
    mlp_dim: int = option(3072, "width of the MLP's hidden layer", 1)
    init_std: float = option(0.02, "standard deviation of initial weights")
    # Optimizer. The betas stand in adamw().
    peak_lr: float = option(0.6e-3, "learning rate after warm-up")
    weight_decay: float = option(0.1, "decay of matrices and embeddings, times the learning rate")
    max_grad_norm: float = option(1.0, "norm to which the gradient of all parameters is clipped")
    warmup_steps: int = option(700, "steps in which the learning rate rises from 0")
    final_lr_frac: float = option(0.1, "fraction of peak_lr at the end of the cosine")
    # Memory.
    checkpoint_blocks: bool = option(False, "recompute blocks in the backward pass: less memory")
    cpu_offload: bool = option(False, "keep weights, gradients and state in host memory")

    def __post_init__(self):
        check_ranges(self)
        for product, factor in (("batch_tokens", "seq_len"), ("model_dim", "num_heads")):
            whole, part = getattr(self, product), getattr(self, factor)
            if whole % part:
                raise RunError(f"--{product} {whole} is not a multiple of --{factor} {part}")


def size(layers, width, heads, lr, seq_len, batch_seqs, num_steps=19_073, warmup_steps=700, **more):
    """A model of this shape on FineWeb-10B, its MLP four times as wide as its stream."""
    return Hyperparameters(num_layers=layers, model_dim=width, num_heads=heads, mlp_dim=4 * width,
                           peak_lr=lr, seq_len=seq_len, batch_tokens=batch_seqs * seq_len,
                           num_steps=num_steps, warmup_steps=warmup_steps, **more)  # fmt: skip


# 124M: shape and rates as nanoGPT and llm.c train GPT-2, for 10 billion tokens. 350M to 1558M: the
# shapes of GPT-2, with rates and batches of similar sizes in table 2.1 of arXiv 2005.14165. The
# others are from gigaGPT's README and configs; 13B to 175B need more shards than FineWeb-10B's.
TRACKS = {
    "124M": size(12, 768, 12, 6e-4, 1024, 512),
    "350M": size(24, 1024, 16, 3e-4, 1024, 512, task="fineweb_medium"),
    "774M": size(36, 1280, 20, 2.5e-4, 1024, 512),
    "1558M": size(48, 1600, 25, 2e-4, 1024, 1024, 9536),
    "111M": size(10, 768, 12, 6e-4, 2048, 120, 9037, 1500),
    "13B": size(40, 5120, 40, 1.2e-4, 2048, 1080, 116_223, 581, init_std=0.014),
    "70B": size(80, 8192, 64, 1e-6, 2048, 1472, 663_425, 1500, init_std=0.01),
    "175B": size(96, 12288, 96, 5e-6, 2048, 1472, 663_425, 1500, init_std=0.005),
    "embedded": size(2, 128, 4, 6e-3, 128, 16, 2700, 135, task="embedded_1.34", embed_rows=257,
                     val_every=540),
}  # fmt: skip


# ------------------------------------------------------------------------------ Data


def row_count(tokens: np.ndarray, hp: Hyperparameters) -> int:
    """Rows in a shard: the stream of documents, cut every seq_len tokens."""
    return max(0, len(tokens) - 1) // hp.seq_len


def check_supply(hp: Hyperparameters, task: Task) -> None:
    """RunError unless the training shards hold a row for every row of every step."""
    needed = hp.num_steps * hp.batch_tokens // hp.seq_len
    rows = sum(row_count(open_shard(path), hp) for path in task_shards(task.train_files))
    if rows < needed:
        raise RunError(
            f"{task.train_files} holds {rows} rows of {hp.seq_len} tokens, {hp.num_steps} steps "
            f"need {needed}; get more shards, or lower --num_steps"
        )


def training_rows(hp: Hyperparameters, task: Task, seed: int, skip: int):
    """Yield each row after the first skip, (seq_len + 1,), shuffled in each shard by the seed."""
    for index, path in enumerate(task_shards(task.train_files)):
        tokens = open_shard(path)
        order = np.random.default_rng((seed, index)).permutation(row_count(tokens, hp))
        for start in hp.seq_len * order[skip:]:
            yield tokens[start : start + hp.seq_len + 1]
        skip = max(0, skip - len(order))


def micro_batches(
    hp: Hyperparameters, task: Task, rt: Runtime, micro_seqs: int, seed: int, step: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this rank's (inputs, targets), int64 (micro_seqs, seq_len) each, from this step on.

    A step has the same rows for any number of ranks.
    """
    count = hp.batch_tokens // hp.seq_len
    source = training_rows(hp, task, seed, skip=step * count)
    while len(step_rows := list(islice(source, count))) == count:
        for first in range(rt.rank * micro_seqs, count, rt.world_size * micro_seqs):
            block = np.stack(step_rows[first : first + micro_seqs]).astype(np.int64)
            tokens = torch.from_numpy(block)
            yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


# ------------------------------------------------------------------------------ Model
#
# Shapes: B sequences, T tokens, D model_dim, H heads, K width of a head, V vocabulary.
# The residual stream x is (B, T, D).


class LayerNorm(nn.LayerNorm):
    """With gain and bias; computed in fp32, returned in x's dtype (arXiv 1607.06450)."""

    def forward(self, x: Tensor) -> Tensor:
        gain, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, gain, bias, self.eps).type_as(x)


class Block(nn.Module):
    """Pre-norm attention and MLP with GELU. Tokens attend across documents."""

    def __init__(self, hp: Hyperparameters):
        super().__init__()
        D = hp.model_dim
        self.heads, self.recompute = hp.num_heads, hp.checkpoint_blocks
        self.norm1, self.norm2 = LayerNorm(D), LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, hp.mlp_dim), nn.Linear(hp.mlp_dim, D)

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute:
            return checkpoint(self.residual, x, use_reentrant=False)
        return self.residual(x)

    def residual(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))

    def attention(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        qkv = self.qkv(x).type_as(x)
        q, k, v = qkv.view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        with torch.autocast(x.device.type, enabled=False):  # CPUs are slow at attention in bf16
            y_BHTK = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y_BHTK.transpose(1, 2).reshape(B, T, D))


class GPT2(nn.Module):
    """GPT-2 as published (Radford et al. 2019); the head is the token embedding."""

    def __init__(self, hp: Hyperparameters, stream_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.hp, self.stream_dtype = hp, stream_dtype
        self.embed = nn.Parameter(torch.empty(hp.embed_rows, hp.model_dim))
        self.positions = nn.Parameter(torch.empty(hp.seq_len, hp.model_dim))
        self.blocks = nn.ModuleList(Block(hp) for _ in range(hp.num_layers))
        self.norm = LayerNorm(hp.model_dim)

    def stream(self, tokens_BT: Tensor) -> Tensor:
        """The last block's output, (B, T, D)."""
        positions = self.positions[: tokens_BT.size(1)]
        x = (self.embed[tokens_BT] + positions).to(self.stream_dtype)
        for block in self.blocks:
            x = block(x)
        return x

    def logits(self, x: Tensor) -> Tensor:
        return F.linear(self.norm(x), self.embed).float()

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits (B, T, V) in fp32 of at most hp.seq_len tokens."""
        return self.logits(self.stream(tokens_BT))

    def mean_loss(self, x: Tensor, targets_BT: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(x).flatten(0, 1), targets_BT.flatten())

    def loss(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean cross-entropy, nats per token, fp32."""
        return self.mean_loss(self.stream(inputs_BT), targets_BT)

    def draw(self, name: str, values: Tensor, generator: torch.Generator) -> None:
        """Fill values with a parameter's initial ones; matrices that add to x get smaller ones."""
        if values.ndim < 2:
            values.fill_(float(name.endswith("weight")))  # gains 1, biases 0
            return
        adds = name.endswith(("out.weight", "down.weight"))
        factor = (2 * self.hp.num_layers) ** -0.5 if adds else 0.5 if name == "positions" else 1.0
        values.normal_(0, self.hp.init_std * factor, generator=generator)


@torch.no_grad()
def build(hp: Hyperparameters, rt: Runtime, seed: int) -> GPT2:
    """The model with initial weights, in shards where it has to be.

    Each rank draws every parameter whole, from the same generator, and keeps its shard: the values
    are the same for any number of ranks, and only one parameter at a time is whole.
    """
    with torch.device("meta"):
        model = GPT2(hp, rt.stream_dtype)
    copy = Tensor.copy_
    if plan.is_sharded(hp, rt.world_size):
        from baselines.sharding import copy_shard as copy  # FSDP is slow to import
        from baselines.sharding import shard

        shard(model, rt, hp.cpu_offload)
    model.to_empty(device="cpu" if hp.cpu_offload else rt.device)
    generator = torch.Generator(rt.device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        whole = torch.empty(parameter.shape, device=rt.device)
        model.draw(name, whole, generator)
        copy(parameter, whole)
    return model


def load_gpt2(folder: Path, facts: dict) -> GPT2:
    """The model of a checkpoint, fp32 on the CPU; facts: what read_checkpoint returned."""
    hp = restore(Hyperparameters, folder, facts)
    with torch.device("meta"):
        model = GPT2(hp)
    model.to_empty(device="cpu")
    fill(folder, weights(model))
    return model.eval()


def weights(model: GPT2) -> dict[str, Tensor]:
    """Parameters as a checkpoint names them; live, not copies."""
    return {f"model.{name}": p.detach() for name, p in model.named_parameters()}


# ------------------------------------------------------------------------------ Optimizer


def adamw(model: GPT2, hp: Hyperparameters) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101); tensors of one dimension (biases, gains) do not decay."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": hp.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, hp.peak_lr, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, hp: Hyperparameters) -> float:
    """Linear warm-up, then a cosine down to final_lr_frac."""
    done = max(0, step - hp.warmup_steps) / max(hp.num_steps - hp.warmup_steps, 1)
    cosine = hp.final_lr_frac + (1 - hp.final_lr_frac) * 0.5 * (1 + math.cos(math.pi * done))
    return hp.peak_lr * min((step + 1) / max(hp.warmup_steps, 1), cosine)


# ------------------------------------------------------------------------------ Train


class Trainer:
    """A model, its optimizer and data, and the steps that join them."""

    def __init__(self, settings: Settings, rt: Runtime):
        task, hp, options = settings.task, settings.hp, settings.options
        self.hp, self.task, self.rt, self.seed = hp, task, rt, options.seed
        if hp.embed_rows < task.vocab_size or task.val_seq_len % hp.seq_len:
            raise RunError(f"--embed_rows must be at least {task.vocab_size}, and --val_seq_len "
                           f"{task.val_seq_len} a multiple of --seq_len")  # fmt: skip
        check_supply(hp, task)
        self.micro_batch_seqs = plan.micro_batch_rows(hp, rt, options.micro_batch_seqs)
        self.accumulation = hp.batch_tokens // hp.seq_len // (rt.world_size * self.micro_batch_seqs)
        rows_that_fit = self.micro_batch_seqs * hp.seq_len // task.val_seq_len
        self.val_batch_rows = task.batch_rows(rows_that_fit, rt.world_size)
        self.flops_per_token, self.state_every = plan.flops_per_token(hp), 1
        self.model = build(hp, rt, self.seed)
        self.optimizer = adamw(self.model, hp)
        self.is_sharded = plan.is_sharded(hp, rt.world_size)
        self.description = (f"{plan.parameters(hp)} parameters{', sharded' * self.is_sharded}, "
                            f"{self.micro_batch_seqs} rows per forward pass")  # fmt: skip

    def compile(self, compile_fn: Callable) -> None:
        """Compile loss and logits whole; of a sharded model, what runs between FSDP's hooks."""
        model = self.model
        whole = [(model, "loss"), (model, "forward")]
        between_hooks = [*((block, "forward") for block in model.blocks), (model, "mean_loss")]
        for module, name in between_hooks if self.is_sharded else whole:
            vars(module).pop(name, None)  # set by an earlier call
            setattr(module, name, compile_fn(getattr(module, name)))

    def autocast(self):
        dtype = self.rt.matmul_dtype
        return torch.autocast(self.rt.device.type, dtype, enabled=dtype != torch.float32)

    def update(self, rate: float, batches) -> Tensor:
        """Take one optimizer step; return the mean loss of this rank's share (0-D, on device)."""
        total = torch.zeros((), device=self.rt.device)
        for _ in range(self.accumulation):
            inputs_BT, targets_BT = next(batches)
            with self.autocast():
                loss = self.model.loss(inputs_BT, targets_BT) / self.accumulation
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.hp.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def predict(self, step: int, inputs_BT: Tensor) -> Iterator[Tensor]:
        """Yield logits (n, V) of the positions of inputs, in order.

        The model has seq_len positions: longer rows are cut into rows of that length.
        """
        for rows_BT in inputs_BT.view(-1, self.hp.seq_len).split(self.micro_batch_seqs):
            with self.autocast():
                yield self.model(rows_BT).flatten(0, 1)

    def state(self) -> dict[str, Tensor]:
        """Every tensor that training changes, by name; live, not copies."""
        tensors = weights(self.model)
        for name, p in self.model.named_parameters():
            tensors |= {f"adamw.{name}.{k}": t for k, t in self.optimizer.state[p].items()}
        return tensors

    def warm_up(self):
        """Run every graph on dummy tokens; the referee restores what this changes."""
        zeros = partial(torch.zeros, dtype=torch.int64, device=self.rt.device)
        dummies = [zeros(self.micro_batch_seqs, self.hp.seq_len) for _ in range(2)]
        val_rows = zeros(self.val_batch_rows, self.task.val_seq_len)
        self.model.zero_grad(set_to_none=True)
        for _ in range(2):
            self.update(0.0, repeat(dummies))
            with torch.no_grad():
                for _ in self.predict(0, val_rows):
                    pass

    def steps(self, first: int) -> Iterator[tuple[Tensor, int]]:
        """Take a step per item, from this one on; give its loss and tokens."""
        hp, rt = self.hp, self.rt
        pairs = micro_batches(hp, self.task, rt, self.micro_batch_seqs, self.seed, first)
        batches = Prefetcher(pairs, rt)
        for step in range(first, hp.num_steps):
            with rt.collective():
                loss = self.update(learning_rate(step, hp), batches)
            yield loss, hp.batch_tokens


def main() -> int:
    return execute(Trainer, TRACKS, "124M", PROCESS_START)


if __name__ == "__main__":
    finish(main)
