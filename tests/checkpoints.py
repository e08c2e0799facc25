"""Checkpoints of small random networks, and stand-ins for a network whose logits are known."""

import dataclasses
from pathlib import Path

import torch
from conftest import TINY

from baselines.checkpoints import write_folder
from baselines.train_gpt2 import GPT2, weights
from baselines.train_gpt2 import TRACKS as GPT2_TRACKS
from evals.models import LanguageModel, Tokenizer, tokenizer_of
from records.harness import Runtime, write_checkpoint
from train_gpt import GPT, TRACKS

BYTES = {"vocab_size": 257, "document_start": 256, "val_seq_len": 64}


def write_speedrun(path: Path, **changes) -> Path:
    """A checkpoint of train_gpt.py over bytes, with no parameter left at its initial zero."""
    hp = dataclasses.replace(TRACKS["embedded"], **{**TINY, **BYTES, **changes})
    torch.manual_seed(0)
    model = GPT(hp, Runtime())
    tensors = {
        f"model.{name}": p.data + 0.3 * torch.randn_like(p) for name, p in model.named_parameters()
    }
    saved = {"tensors": tensors, "step": hp.num_steps, "tokens": 0, "curve": [], "train_ms": 0.0}
    write_checkpoint(path, {**saved, "config": {**dataclasses.asdict(hp), "seed": 0}})
    return path


def write_gpt2(path: Path, **changes) -> Path:
    """A checkpoint of baselines/train_gpt2.py over bytes, its every parameter drawn."""
    shape = dict(num_layers=3, model_dim=32, num_heads=4, mlp_dim=64, seq_len=64, **BYTES)
    hp = dataclasses.replace(GPT2_TRACKS["embedded"], **{**shape, **changes})
    torch.manual_seed(0)
    model = GPT2(hp)
    for p in model.parameters():
        p.data.normal_(0, 0.3)
    model.positions.data.normal_(0, 2)  # else a tied head repeats one token
    write_folder(path, weights(model), {"step": 5, "config": dataclasses.asdict(hp)}, Runtime())
    return path


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

    def reader(self):
        seen = []

        def read(tokens):
            seen.extend(tokens)
            return self.logits_of(seen)

        return read
