"""A checkpoint of either trainer as one kind of object: text to tokens, tokens to logits.

Text becomes tokens as in training: by GPT-2's BPE if documents start with token 50256, as bytes if
they start with 256. Networks run in fp32, so that results hardly depend on the rest of the batch.
Also the flags for a checkpoint that the scripts of this folder share.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import train_gpt
from baselines.train_gpt2 import load_gpt2
from referee.checkpoints import check_source, digests, load, read_checkpoint, restore
from referee.environment import ROOT
from referee.flags import RunError, boolean
from referee.ranks import Runtime
from referee.sources import read_source
from referee.task import Task

BYTES_START, GPT2_START = 256, 50256  # first token of a document, by tokenizer


@dataclass(frozen=True)
class Tokenizer:
    """Text to tokens and tokens to UTF-8; a token that is none of its ranks has no text."""

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], bytes]
    document_start: int


def tokenizer_of(document_start: int, sha256: str = "", file: Path | None = None) -> Tokenizer:
    """The tokenizer of shards whose documents start with this token; RunError if none is known.

    file: its ranks, if they are not GPT-2's; sha256: what they must be, if the shards say so.
    """
    if document_start == BYTES_START:
        return Tokenizer(lambda text: list(text.encode(errors="surrogateescape")), bytes, 256)
    if document_start != GPT2_START:
        raise RunError(f"the checkpoint's documents start with token {document_start}; known are "
                       f"{BYTES_START} (bytes) and {GPT2_START} (GPT-2)")  # fmt: skip
    from data.gpt2 import encoding_of, gpt2_ranks, ranks_sha256

    ranks = gpt2_ranks(file)
    if sha256 not in ("", ranks_sha256(ranks)):
        raise RunError("the checkpoint's shards were made with another tokenizer than "
                       f"{file or 'GPT-2'}; give that: --tokenizer_file FILE")  # fmt: skip
    text = {rank: token for token, rank in ranks.items()}
    return Tokenizer(
        encoding_of(ranks).encode_ordinary,
        lambda tokens: b"".join(text.get(token, b"") for token in tokens),
        GPT2_START,
    )


class LanguageModel:
    """A network with its tokenizer."""

    trainer: str  # the file that trained it
    files: tuple[str, ...]  # in which the network is defined
    step: int  # steps that it was trained for
    context: int  # most tokens that it can read
    tokenizer: Tokenizer

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Logits (B, T, V) fp32 on the model's device; those at t depend on tokens up to t."""


class SpeedrunModel(LanguageModel):
    """A model of train_gpt.py, as its validation runs it."""

    trainer = "train_gpt.py"
    files = ("train_gpt.py", "kernels.py")

    def __init__(self, folder: Path, facts: dict, rt: Runtime):
        hp, config = restore(train_gpt.Hyperparameters, folder, facts), facts["config"]
        task = Task(**{f.name: config[f.name] for f in fields(Task) if f.name in config})
        self.model = train_gpt.GPT(hp, task, rt).to(rt.device)
        parameters = {f"model.{name}": p for name, p in self.model.named_parameters()}
        for name, saved in load(folder, parameters.keys()).items():
            if saved.shape != parameters[name].shape:
                raise RunError(f"{folder} is of another train_gpt.py: its {name} is "
                               f"{tuple(saved.shape)}, and {tuple(parameters[name].shape)} is "
                               "needed; check out the source that its log holds")  # fmt: skip
            parameters[name].data.copy_(saved)  # matrices are bf16 in a GPU's checkpoint
        self.rt, self.step, self.context = rt, facts["step"], task.val_seq_len
        self.per_step = train_gpt.step_inputs(self.step, hp, rt.device, training=False)

    @torch.no_grad()
    def logits(self, tokens_BT: Tensor) -> Tensor:
        T = tokens_BT.size(1)
        padding = (0, -T % train_gpt.BLOCK if self.rt.is_gpu else 0)
        padded_BT = F.pad(tokens_BT, padding, value=self.tokenizer.document_start)
        x = self.model.hidden(padded_BT.to(self.rt.device), self.per_step)
        return self.model.logits(x[:, :T])


class GPT2Model(LanguageModel):
    """A model of baselines/train_gpt2.py."""

    trainer = "baselines/train_gpt2.py"
    files = ("baselines/train_gpt2.py",)

    def __init__(self, folder: Path, facts: dict, rt: Runtime):
        self.rt, self.model = rt, load_gpt2(folder, facts).to(rt.device)
        self.step, self.context = facts["step"], self.model.hp.seq_len

    @torch.no_grad()
    def logits(self, tokens_BT: Tensor) -> Tensor:
        return self.model(tokens_BT.to(self.rt.device))


def load_model(
    path: str | Path, other_source: bool = False, tokenizer_file: Path | None = None
) -> LanguageModel:
    """The model of a checkpoint, with the tokenizer in a file or GPT-2's; RunError if it is none.

    RunError too if its source has changed since, unless other_source is set.
    """
    path, rt = Path(path), Runtime(fp32=True)
    if not path.exists():
        raise RunError(f"there is no checkpoint {path}; a run writes one with --save_every STEPS")
    facts = read_checkpoint(path, rt)
    for kind in (SpeedrunModel, GPT2Model):
        if facts["trainer"] == kind.trainer:
            if not other_source:
                own = digests({file: read_source(ROOT / file) for file in kind.files})
                check_source(path, facts, own, "other code then runs the model")
            model, start = kind(path, facts, rt), facts["config"]["document_start"]
            model.tokenizer = tokenizer_of(start, facts["tokenizer_sha256"], tokenizer_file)
            return model
    raise RunError(f"{path} is a checkpoint of {facts['trainer']}, which has no sampler here")


def add_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="folder that a trainer wrote")
    parser.add_argument("--other_source", type=boolean, default=False, metavar="true|false",
                        help="load it even if its source has changed since")  # fmt: skip
    parser.add_argument("--tokenizer_file", type=Path, metavar="FILE",
                        help="that made its shards, if it was not GPT-2's")  # fmt: skip
