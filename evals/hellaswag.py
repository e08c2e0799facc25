#!/usr/bin/env python3
"""HellaSwag: which of four endings does a model find most likely? (arXiv 1905.07830)

    ./run.sh evals/hellaswag.py CHECKPOINT                               data from the hub
    ./run.sh evals/hellaswag.py CHECKPOINT --data hellaswag_val.jsonl    or from a file

An ending's log-likelihood is that of the tokens of a space and the ending, given those of the raw
context; no token stands before the context. `acc_norm` chooses by its mean over the ending's
tokens, `acc` by its sum. Where several endings are best, the right one counts by its share, so a
uniform model has an acc_norm of 0.25.

This is the convention of llm.c, whose own evaluation gives GPT-2 124M 29.4. lm-eval rewrites the
text, divides by the ending's bytes and gives 31.14. Neither figure was reproduced here.

The result is printed, and closes a log in the folder hellaswag/ beside the checkpoint.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project's root

import pyarrow.parquet
import torch
import torch.nn.functional as F
from torch import Tensor

from data.hub import HubError, download, list_files
from evals.models import LanguageModel, load_model
from referee.environment import ROOT
from referee.flags import RunError, boolean
from referee.log import Log, write_header
from referee.shards import file_sha256

# Where the hub keeps its own parquet copy of a dataset, whatever the dataset's form.
REPO, REVISION, PREFIX = "Rowan/hellaswag", "refs/convert/parquet", "default/validation/"
FOLDER = ROOT / "data" / "hellaswag"
ADVICE = "bring hellaswag_val.jsonl (GitHub rowanz/hellaswag, folder data), and give it: --data"
EXAMPLES = 10_042
LABELS = ["0", "1", "2", "3"]  # of a context's endings
BAD_RECORD = ValueError, LookupError, TypeError, AttributeError, RecursionError
# hellaswag_val.jsonl in the GitHub repository rowanz/hellaswag, as others report it.
ORIGINAL_SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
SOURCES = ("evals/hellaswag.py", "evals/models.py")  # what a log embeds
BATCH_TOKENS = 4096  # of a forward pass, padding included: bounds the memory of the logits
NO_TARGET = -100  # cross_entropy's default for positions that do not count

Row = tuple[list[int], int]  # tokens of context and ending; how many at its end are the ending


# ------------------------------------------------------------------------------ Data


class Example(NamedTuple):
    """A context, its endings, and which of them is right."""

    context: str
    endings: list[str]
    label: int


def example_of(record: dict) -> Example:
    """An Example from a decoded line; one of BAD_RECORD for anything else."""
    context, endings = record["ctx"], record["endings"]
    label = LABELS.index(str(record["label"]))
    "".join([context, *endings]).encode()  # only texts join, and half a surrogate pair is none
    if not isinstance(endings, list) or len(endings) != len(LABELS):
        raise ValueError("not as many endings as labels")
    if not context.strip() or not all(endings):
        raise ValueError("an empty text")
    return Example(context, endings, label)


def read_examples(path: Path) -> list[Example]:
    """Every line of a .jsonl, or the whole set in the hub's .parquet; RunError if it is not so."""
    if path.suffix == ".parquet":
        lines, decode = parquet_rows(path), lambda row: row
    else:
        lines, decode = path.read_bytes().rstrip().splitlines(), json.loads
    examples = []
    for number, line in enumerate(lines, 1):
        try:
            examples.append(example_of(decode(line)))
        except BAD_RECORD:
            raise RunError(f"{path}, line {number}: no object with a text ctx, 4 texts endings and "
                           f"a label of 0 to 3; {ADVICE}") from None  # fmt: skip
    if not examples:
        raise RunError(f"{path} is empty; {ADVICE}")
    return examples


def parquet_rows(path: Path) -> list[dict]:
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (ValueError, OSError) as error:  # pyarrow's own errors are of these
        raise RunError(f"{path} cannot be read ({error}); delete it and run this again") from None
    if len(rows) != EXAMPLES:
        raise RunError(f"{path} has {len(rows):,} examples, not {EXAMPLES:,}; delete it and run "
                       "this again")  # fmt: skip
    return rows


def fetch() -> Path:
    """The validation set's file, downloaded once. Raises HubError."""
    found = sorted((FOLDER / PREFIX).glob("*.parquet"))
    if not found:
        found = download(REPO, list_files(REPO, REVISION, PREFIX, ADVICE), FOLDER, REVISION)
    if len(found) != 1:
        raise HubError(f"{REPO} has {len(found)} files {PREFIX}*, not 1; {ADVICE}")
    return found[0]


# ------------------------------------------------------------------------------ Scores


def rows_of(example: Example, model: LanguageModel) -> list[Row]:
    """The row of each ending; what does not fit the model's context is cut from the front."""
    encode = model.tokenizer.encode
    context, rows = encode(example.context), []
    for ending in example.endings:
        tokens = encode(" " + ending)
        row = (context + tokens)[-model.context - 1 :]
        rows.append((row, min(len(tokens), len(row) - 1)))
    return rows


def log_likelihoods(model: LanguageModel, rows: list[Row]) -> Tensor:
    """Sum over the ending's tokens for each row of a batch, (B,) fp64, nats."""
    shape = len(rows), max(len(tokens) for tokens, _ in rows) - 1
    inputs_BT = torch.full(shape, model.tokenizer.document_start)
    targets_BT = torch.full(shape, NO_TARGET)
    for row, (tokens, count) in enumerate(rows):
        end = len(tokens) - 1
        inputs_BT[row, :end] = torch.tensor(tokens[:-1])
        targets_BT[row, end - count : end] = torch.tensor(tokens[-count:])
    logits_BTV = model.logits(inputs_BT)
    targets_N = targets_BT.flatten().to(logits_BTV.device)
    losses_N = F.cross_entropy(logits_BTV.flatten(0, 1), targets_N, reduction="none")
    return -losses_N.view(shape).double().sum(1).cpu()


def scores(model: LanguageModel, rows: list[Row]) -> Iterator[tuple[list[int], Tensor]]:
    """Yield (indices of rows, their log-likelihoods) by batches, the longest rows first."""
    left = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    while left:
        count = max(1, BATCH_TOKENS // len(rows[left[0]][0]))
        indices, left = left[:count], left[count:]
        yield indices, log_likelihoods(model, [rows[i] for i in indices])


def accuracy(scores_NE: Tensor, labels_N: Tensor) -> float:
    """Share of examples whose right ending scores best; among k equal ones it counts 1/k."""
    best_NE = scores_NE == scores_NE.max(1, keepdim=True).values
    right_N = best_NE.gather(1, labels_N[:, None])[:, 0]
    return (right_N.double() / best_NE.sum(1)).mean().item()


def evaluate(model: LanguageModel, examples: list[Example], progress=lambda done, text: None):
    """(acc_norm, acc) of a model; progress is called with the number of rows that are done."""
    rows = [row for example in examples for row in rows_of(example, model)]
    sums, done = torch.empty(len(rows), dtype=torch.float64), 0
    for indices, likelihoods in scores(model, rows):
        sums[indices] = likelihoods
        done += len(indices)
        progress(done, f"{done} of {len(rows)} endings")
    if not sums.isfinite().all():
        raise RunError("the model's likelihoods are not finite; give a checkpoint from before that")
    counts = torch.tensor([count for _, count in rows])
    labels_N = torch.tensor([example.label for example in examples])
    means_NE, sums_NE = (x.view(-1, len(LABELS)) for x in (sums / counts, sums))
    return accuracy(means_NE, labels_N), accuracy(sums_NE, labels_N)


# ------------------------------------------------------------------------------ Main


def run(args: argparse.Namespace) -> None:
    """Evaluate, print the result and leave a log of it."""
    checkpoint, model = args.checkpoint, load_model(args.checkpoint, args.other_source)
    path = args.data or fetch()
    examples, digest = read_examples(path)[: args.limit], file_sha256(path)
    verdict = "the original" if digest == ORIGINAL_SHA256 else "not the original"
    if not args.data:
        verdict = "as the hub's"
    about = {"checkpoint": checkpoint.name, "trainer": model.trainer, "step": model.step}
    about |= {"other_source": "true"} if args.other_source else {}
    name = f"{checkpoint.name}_{time.strftime('%Y-%m-%dT%H%M%SZ', time.gmtime())}"
    # A folder of its own, so that the folder of runs' logs holds nothing else.
    folder = args.log_dir or checkpoint.absolute().parent / "hellaswag"
    log = Log(str(folder), name, len(LABELS) * len(examples))
    write_log_header(log, about, f"{path.name} sha256:{digest} ({verdict})")
    result = None
    try:
        acc_norm, acc = evaluate(model, examples, log.progress)
        stderr = math.sqrt(acc_norm * (1 - acc_norm) / len(examples))
        result = (f"hellaswag acc_norm:{acc_norm:.4f} stderr:{stderr:.4f} acc:{acc:.4f} "
                  f"n:{len(examples)} {' '.join(f'{k}:{v}' for k, v in about.items())} "
                  f"data_sha256:{digest}")  # fmt: skip
    finally:
        log.close(result)


def write_log_header(log: Log, about: dict, data: str) -> None:
    log.open()
    sources = {path: (ROOT / path).read_text() for path in SOURCES}
    write_header(log, sources, "", about, {"matmul_dtype": "torch.float32"})
    log.section("data", [data])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="folder that a trainer wrote")
    parser.add_argument("--data", type=Path, help="hellaswag_val.jsonl (default: from the hub)")
    parser.add_argument("--log_dir", type=Path, help="folder of the log (default: beside the "
                        "checkpoint, hellaswag)")  # fmt: skip
    parser.add_argument("--other_source", type=boolean, default=False, metavar="true|false",
                        help="though the checkpoint's source has changed since")  # fmt: skip
    parser.add_argument("--limit", type=int, help="examples to take, from the first (default: all)")
    args = parser.parse_args()
    if args.limit is not None and args.limit < 1:
        parser.error("--limit must be at least 1")
    try:
        run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
