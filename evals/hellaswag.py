#!/usr/bin/env python3
"""HellaSwag: which of four endings does a model find most likely? (arXiv 1905.07830)

    ./run.sh evals/hellaswag.py CHECKPOINT                               data from the hub
    ./run.sh evals/hellaswag.py CHECKPOINT --data hellaswag_val.jsonl    or from a file

An ending's log-likelihood is the sum over the tokens of a space and the ending, given the raw
context; no token stands before the context. `acc` picks the ending with the largest sum, `acc_norm`
the one with the largest mean per token. If k endings are equally best and the right one is among
them, the example counts 1/k, so a uniform model has an acc_norm of 0.25.

llm.c scores in this way; docs/baseline.md has its figure. lm-eval rewrites the text and divides by
the ending's bytes; it reports 31.14 for GPT-2 124M. Others report that the sha256 of the original
hellaswag_val.jsonl begins with 0aa3b888.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project's root
    from referee.start import finish

import argparse
import json
import math
from typing import NamedTuple

import pyarrow.parquet
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data.hub import download, list_files
from evals.models import LanguageModel, add_checkpoint_flags, load_model
from referee.environment import ROOT
from referee.flags import RunError
from referee.shards import file_sha256

# The hub keeps a parquet copy of each dataset on this branch.
REPO, REVISION, PREFIX = "Rowan/hellaswag", "refs/convert/parquet", "default/validation/"
FOLDER = ROOT / "data" / "hellaswag"
ADVICE = "get hellaswag_val.jsonl (GitHub rowanz/hellaswag, folder data) and pass it with --data"
LABELS = ["0", "1", "2", "3"]  # of a context's endings
NO_TARGET = -100  # cross_entropy's default for positions that do not count

Row = tuple[list[int], int]  # tokens of context and ending; how many at its end are the ending


class Example(NamedTuple):
    """A context, its endings, and which of them is right."""

    context: str
    endings: list[str]
    label: int


def example_of(record: dict) -> Example:
    """The Example in a decoded line; raises what Python raises if it is none."""
    context, endings = record["ctx"], record["endings"]
    label = LABELS.index(str(record["label"]))
    "".join([context, *endings]).encode()  # fails unless all are text of whole characters
    if not isinstance(endings, list) or len(endings) != len(LABELS):
        raise ValueError("not as many endings as labels")
    if not context.strip() or not all(endings):
        raise ValueError("an empty text")
    return Example(context, endings, label)


def read_examples(path: Path) -> list[Example]:
    """Every line of a .jsonl or row of a .parquet; RunError if one is wrong."""
    if not path.is_file():  # a device might never end
        raise RunError(f"{path} is no file; {ADVICE}")
    lines, decode = path.read_bytes().rstrip().splitlines(), json.loads
    if path.suffix == ".parquet":
        lines, decode = parquet_rows(path), dict
    examples = []
    for number, line in enumerate(lines, 1):
        try:
            examples.append(example_of(decode(line)))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise RunError(f"{path}, line {number}: not an object with a text ctx, 4 texts endings "
                           f"and a label of 0 to 3; {ADVICE}") from None  # fmt: skip
    if not examples:
        raise RunError(f"{path} is empty; {ADVICE}")
    return examples


def parquet_rows(path: Path) -> list[dict]:
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (ValueError, OSError) as error:  # pyarrow's own errors are of these
        raise RunError(f"{path} cannot be read ({error}); {ADVICE}") from None


def fetch() -> Path:
    """The validation set's file, downloaded once. Raises RunError."""
    found = sorted((FOLDER / PREFIX).glob("*.parquet"))
    if not found:
        found = download(REPO, REVISION, list_files(REPO, REVISION, PREFIX, ADVICE), FOLDER)
    if len(found) != 1:
        raise RunError(f"{REPO} has {len(found)} files {PREFIX}*, not 1; {ADVICE}")
    return found[0]


def ending_rows(example: Example, model: LanguageModel) -> list[Row]:
    """The row of each ending; its beginning is cut where it exceeds the model's context."""
    encode = model.tokenizer.encode
    context, rows = encode(example.context), []
    for ending in example.endings:
        tokens = encode(" " + ending)
        row = (context + tokens)[-model.context - 1 :]
        rows.append((row, min(len(tokens), len(row) - 1)))
    return rows


def log_likelihoods(model: LanguageModel, rows: list[Row]) -> Tensor:
    """Sum over the ending's tokens for each row, (B,) fp64, nats."""
    inputs = [torch.tensor(tokens[:-1]) for tokens, _ in rows]
    targets = [torch.tensor(tokens[1:]) for tokens, _ in rows]
    for target, (_, count) in zip(targets, rows, strict=True):
        target[:-count] = NO_TARGET
    logits_BTV = model.logits(pad_sequence(inputs, True, model.tokenizer.document_start))
    targets_BT = pad_sequence(targets, True, NO_TARGET).to(logits_BTV.device)
    losses_N = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none")
    return -losses_N.view_as(targets_BT).double().sum(1).cpu()


def accuracy(scores_NE: Tensor, labels_N: Tensor) -> float:
    """Share of examples whose right ending scores best; among k equal ones it counts 1/k."""
    best_NE = scores_NE == scores_NE.max(1, keepdim=True).values
    right_N = best_NE.gather(1, labels_N[:, None])[:, 0]
    return (right_N.double() / best_NE.sum(1)).mean().item()


def evaluate(model: LanguageModel, examples: list[Example]) -> tuple[float, float]:
    """(acc_norm, acc) of a model."""
    rows = [ending_rows(example, model) for example in examples]
    bar = tqdm(rows, unit="example", disable=None)
    sums_NE = torch.stack([log_likelihoods(model, four) for four in bar])
    if not sums_NE.isfinite().all():
        raise RunError("the model's likelihoods are not finite; give an earlier checkpoint")
    counts_NE = torch.tensor([[count for _, count in four] for four in rows])
    labels_N = torch.tensor([example.label for example in examples])
    return accuracy(sums_NE / counts_NE, labels_N), accuracy(sums_NE, labels_N)


def run(args: argparse.Namespace) -> None:
    """Evaluate, and print the result."""
    model = load_model(args.checkpoint, args.other_source, args.tokenizer_file)
    path = args.data or fetch()
    examples = read_examples(path)[: args.limit]
    acc_norm, acc = evaluate(model, examples)
    stderr = math.sqrt(acc_norm * (1 - acc_norm) / len(examples))
    changed = " other_source:true" if args.other_source else ""
    print(f"hellaswag acc_norm:{acc_norm:.4f} stderr:{stderr:.4f} acc:{acc:.4f} n:{len(examples)} "
          f"checkpoint:{args.checkpoint.name} trainer:{model.trainer} step:{model.step}{changed} "
          f"data_sha256:{file_sha256(path)}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or " ").splitlines()[0])
    add_checkpoint_flags(parser)
    add = parser.add_argument
    add("--data", type=Path, help="hellaswag_val.jsonl (default: from the hub)")
    add("--limit", type=int, help="evaluate only the first so many examples (default: all)")
    args = parser.parse_args()
    if args.limit is not None and args.limit < 1:
        parser.error("--limit must be at least 1")
    run(args)


if __name__ == "__main__":
    finish(main, interrupted="interrupted")
