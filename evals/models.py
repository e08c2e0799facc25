"""A checkpoint of either trainer as one kind of object: text to tokens, tokens to logits.

train_gpt.py writes files NAME.pt, baselines/train_gpt2.py folders with a config.json. Text becomes
tokens as in training: GPT-2's BPE where documents open with token 50256, bytes where they open with
256. Networks are run in fp32, so that a result hardly depends on what else is in the batch.
"""

import json
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from records.harness import RunError, Runtime, read_checkpoint

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "data"))  # whose scripts import one another by their bare names

BYTES_START, GPT2_START = 256, 50256  # the token that opens a document tells the tokenizer


@dataclass(frozen=True)
class Tokenizer:
    """Text to tokens and tokens to UTF-8; document_start and what lies above it have no text."""

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], bytes]
    document_start: int


def tokenizer_of(document_start: int) -> Tokenizer:
    """The tokenizer of shards whose documents open with this token; RunError if none is known."""
    if document_start == BYTES_START:
        return Tokenizer(lambda text: list(text.encode(errors="surrogateescape")), bytes, 256)
    if document_start != GPT2_START:
        raise RunError(
            f"its documents open with token {document_start}, which stands for no known tokenizer; "
            f"give a checkpoint of bytes ({BYTES_START}) or of GPT-2's tokens ({GPT2_START})"
        )
    from data.gpt2 import encoding_of, gpt2_ranks

    encoding = encoding_of(gpt2_ranks(None))
    encode = lambda text: encoding.encode(text, disallowed_special=())  # noqa: E731
    return Tokenizer(encode, encoding.decode_bytes, GPT2_START)


class LanguageModel:
    """A network with its tokenizer.

    trainer: the file that trained it; step: for how long; context: most tokens that it can read.
    """

    trainer: str
    step: int
    context: int
    tokenizer: Tokenizer

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Logits (B, T, V) fp32 on the model's device; what stands at t sees tokens up to t."""
        raise NotImplementedError

    def reader(self) -> Callable[[list[int]], Tensor]:
        """A function that is given the tokens that come next; logits (V,) after the last of them.

        Here every call runs the network over all tokens so far.
        """
        seen = []

        def read(tokens: list[int]) -> Tensor:
            seen.extend(tokens)
            return self.logits(torch.tensor([seen]))[0, -1]

        return read


class SpeedrunModel(LanguageModel):
    """A model of train_gpt.py, as its validation runs it.

    Its blocks are what experiments change, so it has no cache of keys and values that each of them
    would have to keep right: a sample costs a pass over all its tokens for each new one.
    """

    trainer = "train_gpt"

    def __init__(self, saved: dict, rt: Runtime):
        from train_gpt import predictor

        self.rt, self.step, self.predict = rt, saved["step"], predictor(saved, rt)
        self.context = saved["config"]["val_seq_len"]
        self.tokenizer = tokenizer_of(saved["config"]["document_start"])

    @torch.no_grad()
    def logits(self, tokens_BT: Tensor) -> Tensor:
        T = tokens_BT.size(1)
        padding = (0, -T % self.rt.seq_len_unit)
        padded_BT = F.pad(tokens_BT, padding, value=self.tokenizer.document_start)
        return self.predict(padded_BT.to(self.rt.device))[:, :T]


class GPT2Model(LanguageModel):
    """A model of baselines/train_gpt2.py; its reader keeps keys and values of what it has read."""

    trainer = "train_gpt2"

    def __init__(self, folder: Path, rt: Runtime):
        from baselines.train_gpt2 import load_gpt2

        self.rt, self.model = rt, load_gpt2(folder).to(rt.device)
        self.step = json.loads((folder / "config.json").read_text())["step"]
        self.context = self.model.hp.seq_len
        self.tokenizer = tokenizer_of(self.model.hp.document_start)

    @torch.no_grad()
    def logits(self, tokens_BT: Tensor) -> Tensor:
        return self.model(tokens_BT.to(self.rt.device))

    def reader(self) -> Callable[[list[int]], Tensor]:
        cache = []

        @torch.no_grad()
        def read(tokens: list[int]) -> Tensor:
            tokens_BT = torch.tensor([tokens], device=self.rt.device)
            return self.model(tokens_BT, cache)[0, -1]

        return read


def load_model(path: str | Path) -> LanguageModel:
    """The model of a checkpoint of either trainer; RunError for anything else."""
    path = Path(path)
    if not path.exists():
        raise RunError(f"there is no checkpoint {path}; a run writes one with --save_every STEPS")
    return GPT2Model(path, Runtime(fp32=True)) if path.is_dir() else load_file(path)


def load_file(path: Path) -> SpeedrunModel:
    """A checkpoint of train_gpt.py."""
    advice = "give the .pt file of a run of train_gpt.py, or a folder of baselines/train_gpt2.py"
    try:  # torch.load itself compares no checksums
        damaged = zipfile.ZipFile(path).testzip()
        saved = read_checkpoint(str(path))
    except OSError:
        raise
    except Exception:  # what zipfile raises depends on where the damage is
        raise RunError(f"{path} is truncated, damaged or no checkpoint; {advice}") from None
    if damaged:
        raise RunError(f"{path} was changed after it was written (checksum of {damaged}); {advice}")
    try:
        return SpeedrunModel(saved, Runtime(fp32=True))
    except RunError as error:
        raise RunError(f"{path}: {error}") from None
