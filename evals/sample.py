#!/usr/bin/env python3
"""Sample text from a checkpoint of either trainer.

    ./run.sh evals/sample.py CHECKPOINT --prompt TEXT

The prompt is the beginning of a document. A sample ends with its document, after --max_tokens, or
where the model's context is full. Sample i with seed s is sample 0 with seed s + i. Tokens beyond
the tokenizer's, which pad a vocabulary, are never drawn. Each new token costs a pass over all those
before it, for every experiment with the network would have to keep a cache right.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project's root
    from referee.start import finish

import argparse
import codecs
import math
from collections.abc import Iterable, Iterator
from itertools import chain

import torch
from torch import Tensor

from evals.models import LanguageModel, add_checkpoint_flags, load_model
from referee.flags import RunError


def token_probabilities(logits_V: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Probabilities (V,) fp64 of the next token.

    After the temperature, only the top_k most probable tokens remain (0: all), then only the fewest
    of them that together have a probability of at least top_p (nucleus sampling, arXiv 1904.09751).
    Of equally probable tokens the lower comes first.
    """
    logits_V = logits_V.double().cpu() / temperature
    sorted_V, tokens_V = logits_V.sort(descending=True, stable=True)
    kept = sorted_V[: top_k or None].softmax(0)
    before = kept.cumsum(0) - kept  # total probability of the more probable tokens
    kept = torch.where(before < top_p, kept, 0.0)
    return torch.zeros_like(logits_V).index_put_((tokens_V[: len(kept)],), kept / kept.sum())


def generate(model: LanguageModel, prompt: list[int], args, seed: int) -> Iterator[int]:
    """Yield the tokens that follow a prompt of at least one token, which fits the context."""
    generator = torch.Generator().manual_seed(seed)
    document_start = model.tokenizer.document_start
    tokens = list(prompt)
    for _ in range(min(args.max_tokens, model.context + 1 - len(prompt))):
        logits_V = model.logits(torch.tensor([tokens]))[0, -1, : document_start + 1]
        if not logits_V.isfinite().all():
            raise RunError("the model's logits are not finite; give an earlier checkpoint")
        probabilities = token_probabilities(logits_V, args.temperature, args.top_k, args.top_p)
        token = torch.multinomial(probabilities, 1, generator=generator).item()
        if token == document_start:
            return
        yield token
        tokens.append(token)


def text_pieces(tokens: Iterable[int], decode) -> Iterator[str]:
    """The text of tokens as they come; an incomplete character waits for its last byte."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        yield decoder.decode(decode([token]))
    yield decoder.decode(b"", final=True)


def show_samples(model: LanguageModel, args) -> None:
    """Print the samples, each behind the prompt. RunError if that is too long."""
    text = model.tokenizer.encode(args.prompt)
    tokens = [model.tokenizer.document_start, *text]
    if len(tokens) > model.context:
        raise RunError(f"the prompt has {len(tokens):,} tokens with its document start, more than "
                       f"the model's context of {model.context:,}; give a shorter one")  # fmt: skip
    for index in range(args.num_samples):
        if args.num_samples > 1:
            print(f"--- sample {index + 1} of {args.num_samples}, seed {args.seed + index} ---")
        written = chain(text, generate(model, tokens, args, args.seed + index))
        for piece in text_pieces(written, model.tokenizer.decode):
            print(piece, end="", flush=True)
        print()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or " ").splitlines()[0])
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    add_checkpoint_flags(parser)
    add = parser.add_argument
    add("--prompt", metavar="TEXT", default="", help="beginning of the document")
    add("--max_tokens", type=int, default=200, help="most tokens after the prompt")
    add("--temperature", type=float, default=1.0, help="divides the logits: above 1 is wilder")
    add("--top_k", type=int, default=0, help="draw from this many most probable tokens; 0: all")
    add("--top_p", type=float, default=1.0, help="draw from the fewest tokens so probable together")
    add("--seed", type=int, default=0, help="the same seed gives the same text")
    add("--num_samples", type=int, default=1, help="number of samples")
    args = parser.parse_args()
    for name, least in (("max_tokens", 1), ("top_k", 0), ("seed", 0), ("num_samples", 1)):
        if not least <= getattr(args, name) < 2**62:
            parser.error(f"--{name} must be at least {least} and below 2**62")
    if not 1e-3 <= args.temperature < math.inf:
        parser.error("--temperature must be at least 0.001; the most probable token: --top_k 1")
    if not 0 < args.top_p <= 1:
        parser.error("--top_p must be above 0 and at most 1")
    return args


def main() -> None:
    args = parse()
    sys.stdout.reconfigure(errors="replace")  # for characters that the terminal cannot show
    show_samples(load_model(args.checkpoint, args.other_source, args.tokenizer_file), args)


if __name__ == "__main__":
    finish(main, interrupted="\ninterrupted")
