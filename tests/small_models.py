"""Checkpoints of small random networks, and stand-ins for a network whose logits are known."""

import dataclasses
from pathlib import Path

import torch
from conftest import TINY, TINY_TASK, settings

from baselines.train_gpt2 import GPT2, weights
from baselines.train_gpt2 import TRACKS as GPT2_TRACKS
from evals.models import LanguageModel, Tokenizer, tokenizer_of
from referee.checkpoints import write_checkpoint
from referee.harness import Run
from referee.ranks import Runtime
from referee.task import TASKS, Task
from train_gpt import GPT, TRACKS


def bytes_task(val_seq_len: int) -> Task:
    sizes = {"val_seq_len": val_seq_len, "val_tokens": 32 * val_seq_len}
    changes = {**TINY_TASK, "vocab_size": 257, "document_start": 256, **sizes}
    return dataclasses.replace(TASKS["embedded"], **changes)


def write_small(folder: Path, trainer: str, task, hp, model) -> Path:
    """A checkpoint as a run of this trainer writes it, of its model's weights alone."""
    chosen = settings(task, hp, log_dir=str(folder.parent))
    run = Run(chosen, trainer, Runtime(), None, 0.0)
    write_checkpoint(folder, weights(model), {**run.facts(), "step": hp.num_steps}, Runtime())
    return folder


def write_speedrun(
    folder: Path, change=lambda model: None, val_seq_len: int = 64, **changes
) -> Path:
    """A checkpoint of train_gpt.py over bytes, with no parameter left at its initial zero."""
    hp = dataclasses.replace(TRACKS["embedded"], **{**TINY, **changes})
    task = bytes_task(val_seq_len)
    torch.manual_seed(0)
    model = GPT(hp, task, Runtime())
    for p in model.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    change(model)
    return write_small(folder, "train_gpt.py", task, hp, model)


def write_gpt2(folder: Path, val_seq_len: int = 64, task: dict | None = None, **changes) -> Path:
    """A checkpoint of baselines/train_gpt2.py over bytes, its every parameter drawn.

    task: changes of its task.
    """
    shape = dict(num_layers=3, model_dim=32, num_heads=4, mlp_dim=64, seq_len=64, embed_rows=257)
    hp = dataclasses.replace(GPT2_TRACKS["embedded"], **{**shape, **changes})
    torch.manual_seed(0)
    model = GPT2(hp)
    for p in model.parameters():
        p.data.normal_(0, 0.3)
    model.positions.data.normal_(0, 2)  # else a tied head repeats one token
    task = dataclasses.replace(bytes_task(val_seq_len), **task or {})
    return write_small(folder, "baselines/train_gpt2.py", task, hp, model)


class KnownModel(LanguageModel):
    """logits_of(tokens) gives the logits (V,) that follow a list of tokens."""

    trainer, step = "nobody", 0

    def __init__(self, logits_of, context=64, tokenizer: Tokenizer | None = None):
        self.logits_of, self.context = logits_of, context
        self.tokenizer = tokenizer or tokenizer_of(256)

    def logits(self, tokens_BT):
        rows = tokens_BT.tolist()
        return torch.stack(
            [torch.stack([self.logits_of(r[: t + 1]) for t in range(len(r))]) for r in rows]
        )
