"""Train GPT-2 as published, from 124M to 175B parameters: what a speedrun must be faster than.

    python baselines/train_gpt2.py --track embedded            a small one, on a CPU
    torchrun --nproc_per_node=8 baselines/train_gpt2.py --track 124M
    python baselines/train_gpt2.py --track 13B --plan --gpus 64 --gpu H100    what it would need

The same command serves any number of GPUs and, with --nnodes, machines: above one GPU the model is
sharded. Data, log, clock and flags are those of train_gpt.py.
Lines of code, blanks and comments not counted, by their authors: nanoGPT 639, gigaGPT 565. Here,
with docstrings: this file 347, with plan.py, sharding.py and checkpoints.py 674.
"""

import time

PROCESS_START = time.perf_counter()  # before the slow imports: the ledger counts them too

import math
import sys
from dataclasses import dataclass, fields, replace
from itertools import islice, repeat
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from baselines.checkpoints import Folders, fill, verified_facts
from baselines.plan import Layout, capacity, flops_per_token, micro_batch_rows, parameters, planned
from baselines.sharding import materialize, shard
from data.batches import Prefetcher, inputs_and_targets, project_shards, validation_batches
from data.shards import open_shard
from records.harness import COMPILE_ERRORS, Run, RunError, RunOptions, Runtime, execute, knob

SOURCES = {  # what a log embeds
    path: (ROOT / path).read_text()
    for path in ("baselines/train_gpt2.py", "baselines/plan.py", "baselines/sharding.py",
                 "baselines/checkpoints.py", "data/batches.py", "data/shards.py",
                 "records/harness.py")
}  # fmt: skip


# ------------------------------------------------------------------------------ Hyperparameters


@dataclass(frozen=True)
class Hyperparameters:
    """What is trained, on what, to what loss. Each field is a flag."""

    # Data. A track's globs are relative to the project's folder, those in flags to the caller's.
    train_files: str = knob("data/fineweb10B/fineweb_train_*.bin", "glob of training shards")
    val_files: str = knob("data/fineweb10B/fineweb_val_*.bin", "glob of validation shards")
    data_sha256: str = knob("", "expected hash over all shards; empty: none is known")
    vocab_size: int = knob(50257, "rows of the embedding, more than the largest token", 2)
    document_start: int = knob(50256, "token that opens every document")
    val_tokens: int = knob(10_485_760, "validation targets", 1)
    val_seq_len: int = knob(1024, "tokens a validation row, a multiple of seq_len", 2)
    val_spread: bool = knob(False, "spread validation rows evenly instead of taking the first")
    target_val_loss: float = knob(3.28, "nats a token")
    # Budget.
    num_steps: int = knob(19_073, "optimizer steps", 1)
    batch_tokens: int = knob(524_288, "tokens a step, over all ranks", 1)
    seq_len: int = knob(1024, "tokens a training row, and positions of the model", 2)
    val_every: int = knob(250, "steps between validations", 1)
    # Model.
    num_layers: int = knob(12, "blocks", 1)
    num_heads: int = knob(12, "attention heads a block", 1)
    model_dim: int = knob(768, "width of the residual stream", 1)
    mlp_dim: int = knob(3072, "width of the hidden layer", 1)
    init_std: float = knob(0.02, "standard deviation of initial weights")
    # Optimizer. The betas stand in adamw().
    peak_lr: float = knob(0.6e-3, "learning rate after warm-up")
    weight_decay: float = knob(0.1, "decay of matrices and embeddings, a unit of learning rate")
    max_grad_norm: float = knob(1.0, "norm to which the gradient of all parameters is clipped")
    warmup_steps: int = knob(700, "steps in which the learning rate rises from 0")
    final_lr_frac: float = knob(0.1, "fraction of peak_lr that is left at the end of the cosine")

    def __post_init__(self):
        for f in fields(self):
            value, least = getattr(self, f.name), f.metadata["least"]
            if f.type in (int, float) and not least <= value < math.inf:
                raise RunError(f"--{f.name} {value} is out of range: give at least {least}")
        for whole, part in (("batch_tokens", "seq_len"), ("val_tokens", "val_seq_len"),
                            ("val_seq_len", "seq_len"), ("model_dim", "num_heads")):  # fmt: skip
            values = getattr(self, whole), getattr(self, part)
            if values[0] % values[1]:
                raise RunError(f"--{whole} {values[0]} is not a multiple of --{part} {values[1]}")


@dataclass(frozen=True)
class Options(RunOptions):
    """How this run is carried out; nothing here changes what is trained, but for the seed."""

    checkpoint_blocks: bool = knob(False, "recompute blocks in the backward pass: less memory")
    cpu_offload: bool = knob(False, "keep weights, gradients and state in host memory")


def size(layers, width, heads, lr, seq_len, batch_seqs, num_steps=19_073, warmup_steps=700, **more):
    """A model of this shape on FineWeb-10B, its MLP four times as wide as its stream."""
    return Hyperparameters(num_layers=layers, model_dim=width, num_heads=heads, mlp_dim=4 * width,
                           peak_lr=lr, seq_len=seq_len, val_seq_len=seq_len,
                           batch_tokens=batch_seqs * seq_len, num_steps=num_steps,
                           warmup_steps=warmup_steps, **more)  # fmt: skip


# Shapes and rates of 124M: GPT-2 as nanoGPT and llm.c train it, for 10 billion tokens. 350M to
# 1558M: the shapes of GPT-2, rates and batches of the like sizes in table 2.1 of arXiv 2005.14165.
# The others: gigaGPT's README and configs, where 13B to 175B need more shards than FineWeb-10B's.
TRACKS = {
    "124M": size(12, 768, 12, 6e-4, 1024, 512),
    "350M": size(24, 1024, 16, 3e-4, 1024, 512, target_val_loss=2.92),
    "774M": size(36, 1280, 20, 2.5e-4, 1024, 512),
    "1558M": size(48, 1600, 25, 2e-4, 1024, 1024, 9536),
    "111M": size(10, 768, 12, 6e-4, 2048, 120, 9037, 1500),
    "13B": size(40, 5120, 40, 1.2e-4, 2048, 1080, 116_223, 581, init_std=0.014),
    "70B": size(80, 8192, 64, 1e-6, 2048, 1472, 663_425, 1500, init_std=0.01),
    "175B": size(96, 12288, 96, 5e-6, 2048, 1472, 663_425, 1500, init_std=0.005),
    "embedded": replace(
        size(2, 128, 4, 6e-3, 128, 16, 2700, 135, target_val_loss=1.34),
        train_files="data/embedded/embedded_train.bin",
        val_files="data/embedded/embedded_val.bin",
        data_sha256="46ee993abd300d89907f21f46b034c6dad65e35e87b50afcdc9668e0617695f9",
        vocab_size=257,
        document_start=256,
        val_tokens=262_144,
        val_seq_len=1024,
        val_spread=True,
        val_every=540,
    ),
}


# ------------------------------------------------------------------------------ Data


def rows_of(tokens: np.ndarray, hp: Hyperparameters) -> int:
    """Rows in a shard: the stream of documents, cut every seq_len tokens."""
    return max(0, len(tokens) - 1) // hp.seq_len


def check_supply(hp: Hyperparameters) -> None:
    """RunError unless the training shards hold a row for every row of every step."""
    needed = hp.num_steps * hp.batch_tokens // hp.seq_len
    rows = sum(rows_of(open_shard(path), hp) for path in project_shards(hp.train_files))
    if rows < needed:
        raise RunError(
            f"{hp.train_files} holds {rows} rows of {hp.seq_len} tokens, {hp.num_steps} steps "
            f"need {needed}; get more shards, or lower --num_steps"
        )


def training_rows(hp: Hyperparameters, seed: int, skip: int):
    """Yield each row after the first skip, (seq_len + 1,), shuffled in each shard by the seed."""
    for index, path in enumerate(project_shards(hp.train_files)):
        tokens = open_shard(path)
        order = np.random.default_rng((seed, index)).permutation(rows_of(tokens, hp))
        for start in hp.seq_len * order[skip:]:
            yield tokens[start : start + hp.seq_len + 1]
        skip = max(0, skip - len(order))


def micro_batches(hp: Hyperparameters, rt: Runtime, micro_seqs: int, seed: int, first_step: int):
    """Yield this rank's (inputs, targets), int64 (micro_seqs, seq_len), from first_step on.

    A step's rows are dealt to accumulation x ranks equal micro-batches: its global batch is the
    same for any number of ranks.
    """
    rows_a_step = hp.batch_tokens // hp.seq_len
    rows = training_rows(hp, seed, skip=first_step * rows_a_step)
    while len(step_rows := list(islice(rows, rows_a_step))) == rows_a_step:
        for at in range(rt.rank * micro_seqs, rows_a_step, rt.world_size * micro_seqs):
            yield inputs_and_targets(np.stack(step_rows[at : at + micro_seqs]))


# ------------------------------------------------------------------------------ Model
#
# Shapes: B sequences, T tokens, D model_dim, H heads, K width of a head, S keys, V vocabulary.
# The residual stream x is (B, T, D).


class LayerNorm(nn.LayerNorm):
    """With gain and bias, computed in fp32, in x's dtype again (arXiv 1607.06450)."""

    def forward(self, x: Tensor) -> Tensor:
        gain, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, gain, bias, self.eps).type_as(x)


class Block(nn.Module):
    """Pre-norm attention and MLP with GELU. The causal mask knows nothing of documents."""

    def __init__(self, hp: Hyperparameters):
        super().__init__()
        D = hp.model_dim
        self.heads, self.recompute = hp.num_heads, False
        self.norm1, self.norm2 = LayerNorm(D), LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, hp.mlp_dim), nn.Linear(hp.mlp_dim, D)

    def forward(self, x: Tensor, cached: list[Tensor] | None = None) -> Tensor:
        """cached: [] or [k, v], (B, H, S, K) each, which these tokens extend in place."""
        if self.recompute and cached is None:
            return checkpoint(self.residual, x, use_reentrant=False)
        return self.residual(x, cached)

    def residual(self, x: Tensor, cached: list[Tensor] | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), cached)
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))

    def attention(self, x: Tensor, cached: list[Tensor] | None) -> Tensor:
        B, T, D = x.shape
        qkv = self.qkv(x).type_as(x)
        q, k, v = qkv.view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if cached is not None:
            pairs = zip(cached, (k, v), strict=True) if cached else ()
            cached[:] = [torch.cat(pair, dim=2) for pair in pairs] or [k, v]
            k, v = cached
        S = k.size(2)
        mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T) if S > T else None
        with torch.autocast(x.device.type, enabled=False):  # CPUs are slow at attention in bf16
            y_BHTK = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=S == T)
        return self.out(y_BHTK.transpose(1, 2).reshape(B, T, D))


class GPT2(nn.Module):
    """GPT-2 as published (Radford et al. 2019); the head is the token embedding."""

    def __init__(self, hp: Hyperparameters, stream_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.hp, self.stream_dtype = hp, stream_dtype
        self.embed = nn.Parameter(torch.empty(hp.vocab_size, hp.model_dim))
        self.positions = nn.Parameter(torch.empty(hp.seq_len, hp.model_dim))
        self.blocks = nn.ModuleList(Block(hp) for _ in range(hp.num_layers))
        self.norm = LayerNorm(hp.model_dim)

    def stream(self, tokens_BT: Tensor, cache: list | None = None) -> Tensor:
        """What leaves the last block, (B, T, D)."""
        start = cache[0][0].size(2) if cache else 0
        if cache == []:
            cache += [[] for _ in self.blocks]
        positions = self.positions[start : start + tokens_BT.size(1)]
        x = (self.embed[tokens_BT] + positions).to(self.stream_dtype)
        for block, cached in zip(self.blocks, cache or repeat(None), strict=False):
            x = block(x, cached)
        return x

    def logits(self, x: Tensor) -> Tensor:
        return F.linear(self.norm(x), self.embed).float()

    def forward(self, tokens_BT: Tensor, cache: list | None = None) -> Tensor:
        """Logits (B, T, V) in fp32.

        cache: [] before the first tokens, then a [k, v] a layer of all tokens so far, which this
        call extends in place: tokens_BT continue them. All together are at most hp.seq_len.
        """
        return self.logits(self.stream(tokens_BT, cache))

    def mean_loss(self, x: Tensor, targets_BT: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(x).flatten(0, 1), targets_BT.flatten())

    def loss(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean cross-entropy, nats a token, fp32."""
        return self.mean_loss(self.stream(inputs_BT), targets_BT)

    def draw(self, name: str, values: Tensor, generator: torch.Generator) -> None:
        """Fill values with a parameter's initial ones; matrices that add to the stream get less."""
        if values.ndim < 2:
            values.fill_(float(name.endswith("weight")))  # gains 1, biases 0
            return
        adds = name.endswith(("out.weight", "down.weight"))
        factor = (2 * self.hp.num_layers) ** -0.5 if adds else 0.5 if name == "positions" else 1.0
        values.normal_(0, self.hp.init_std * factor, generator=generator)


def build(hp: Hyperparameters, rt: Runtime, options: Options, layout: Layout) -> GPT2:
    """The model with initial weights; if it is sharded, it never is whole in one place."""
    with torch.device("meta"):
        model = GPT2(hp, rt.stream_dtype)
    for block in model.blocks:
        block.recompute = options.checkpoint_blocks
    if layout.sharded:
        shard(model, rt, options.cpu_offload)
    materialize(model, rt, options.seed, options.cpu_offload)
    return model


def load_gpt2(path: str | Path) -> GPT2:
    """The model of a checkpoint folder, fp32 on the CPU; RunError for anything else."""
    config = verified_facts(Path(path))["config"]
    hp = Hyperparameters(**{f.name: config[f.name] for f in fields(Hyperparameters)})
    with torch.device("meta"):
        model = GPT2(hp)
    model.to_empty(device="cpu")
    fill(Path(path), weights(model))
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

    def __init__(self, run: Run):
        self.run, hp, rt, options = run, run.hp, run.rt, run.options
        self.hp, self.rt, run.checkpoints = hp, rt, Folders()
        check_supply(hp)
        layout = Layout(rt.world_size, options.checkpoint_blocks, options.cpu_offload,
                        rt.matmul_dtype.itemsize)  # fmt: skip
        self.micro_seqs = micro_batch_rows(hp, layout, capacity(rt), options.micro_batch_seqs)
        self.accumulation = hp.batch_tokens // hp.seq_len // (rt.world_size * self.micro_seqs)
        run.micro_batch_seqs, run.flops_per_token = self.micro_seqs, flops_per_token(hp)
        self.model = build(hp, rt, options, layout)
        self.optimizer = adamw(self.model, hp)
        self.compile(run.compiler(), layout.sharded)
        self.val = validation_batches(hp, rt, self.micro_seqs * hp.seq_len // hp.val_seq_len or 1)
        run.log.line(f"micro_batch_seqs: {self.micro_seqs} accumulation: {self.accumulation}")
        run.log.line(f"parameters: {parameters(hp)} sharded: {layout.sharded}")

    def compile(self, compiled, sharded: bool) -> None:
        """Compile the whole loss, or what stands between the hooks of shards: blocks and head."""
        parts = [*((block, "forward") for block in self.model.blocks), (self.model, "mean_loss")]
        self.parts = parts if sharded else [(self.model, "loss")]
        for module, name in self.parts:
            setattr(module, name, compiled(getattr(module, name)))

    def loss(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        dtype = self.rt.matmul_dtype
        with torch.autocast(self.rt.device.type, dtype, enabled=dtype != torch.float32):
            return self.model.loss(inputs_BT, targets_BT)

    def update(self, rate: float, batches) -> Tensor:
        """Take one optimizer step; return the mean loss of this rank's share (0-D, on device)."""
        total = torch.zeros((), device=self.rt.device)
        for _ in range(self.accumulation):
            inputs_BT, targets_BT = next(batches)
            loss = self.loss(inputs_BT, targets_BT) / self.accumulation
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.hp.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
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
        tensors = weights(self.model)
        for name, p in self.model.named_parameters():
            tensors |= {f"adamw.{name}.{k}": t for k, t in self.optimizer.state[p].items()}
        return tensors

    def warm_up(self):
        """Compile every graph on dummy tokens, at a learning rate of 0: no weight changes."""
        try:
            self.run_on_dummies()
        except COMPILE_ERRORS as error:
            reason = str(error).strip().splitlines()[0]
            self.run.log.line(f"compile: failed, so this run is slower ({reason})", show=True)
            for module, name in self.parts:
                delattr(module, name)
            self.run_on_dummies()
        for moments in self.optimizer.state.values():
            for tensor in moments.values():
                tensor.zero_()

    def run_on_dummies(self):
        row = torch.zeros(self.micro_seqs, self.hp.seq_len, dtype=torch.int64)
        dummies = [row.to(self.rt.device, copy=True) for _ in range(2)]
        self.model.zero_grad(set_to_none=True)
        for _ in range(2):
            self.update(0.0, repeat(dummies))
            self.validation_loss([[torch.zeros_like(t) for t in self.val[0]]])

    def validate(self):
        with self.run.clock.charged_to("validation"):
            loss = self.validation_loss(self.val)
        self.run.validated(loss)

    def train(self):
        """Take the steps that are left."""
        hp, run = self.hp, self.run
        pairs = micro_batches(hp, self.rt, self.micro_seqs, run.options.seed, run.step)
        batches = Prefetcher(pairs, self.rt)
        run.start()
        while run.step < hp.num_steps and not run.status:
            if run.step % hp.val_every == 0:
                self.validate()
            with self.rt.contact():
                loss = self.update(learning_rate(run.step, hp), batches)
            run.end_step(loss, hp.batch_tokens)
            if run.checkpoint_is_due():
                run.save(self.state())
        if not run.status:
            self.validate()
        run.finish()


# ------------------------------------------------------------------------------ Main


def main() -> int:
    if "--plan" in sys.argv[1:]:
        return planned([a for a in sys.argv[1:] if a != "--plan"], TRACKS, "124M")
    return execute(Trainer, TRACKS, "124M", SOURCES, PROCESS_START, Options())


if __name__ == "__main__":
    sys.exit(main())
