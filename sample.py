#!/usr/bin/env python3
"""Let a checkpoint of either trainer write: ./run.sh sample.py CHECKPOINT --prompt TEXT

A prompt is taken for the beginning of a document. A sample ends with its document, after
--max_tokens, or where the model's context is full. Sample i of a seed is the first one of seed + i.
Tokens beyond the tokenizer's, by which a vocabulary is padded, are never drawn.
"""

import argparse
import codecs
import math
import signal
import sys
from collections.abc import Iterable, Iterator
from itertools import chain

import torch
from torch import Tensor

from evals.models import LanguageModel, load_model
from harness import RunError

LARGE = 1 << 62  # a bound for integers that need none


def token_probabilities(logits_V: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Probabilities (V,) fp64 of the next token.

    After the temperature, all but the top_k most probable tokens are left out (0: none is), then
    all but the fewest of them that together have a probability of at least top_p (nucleus
    sampling, arXiv 1904.09751). Of equal tokens the lower comes first.
    """
    logits_V = logits_V.double().cpu() / temperature
    sorted_V, tokens_V = logits_V.sort(descending=True, stable=True)
    kept = sorted_V[: top_k or None].softmax(0)
    before = kept.cumsum(0) - kept  # probability of those that are more probable
    kept = torch.where(before < top_p, kept, 0.0)
    return torch.zeros_like(logits_V).index_put_((tokens_V[: len(kept)],), kept / kept.sum())


def generate(
    model: LanguageModel, prompt: list[int], args: argparse.Namespace, seed: int
) -> Iterator[int]:
    """Yield the tokens that follow a prompt, which has at least one and fits the context."""
    generator = torch.Generator().manual_seed(seed)
    document_start = model.tokenizer.document_start
    read, tokens = model.reader(), prompt
    for _ in range(min(args.max_tokens, model.context + 1 - len(prompt))):
        logits_V = read(tokens)[: document_start + 1]
        if not logits_V.isfinite().all():
            raise RunError("the model's logits are not finite; give a checkpoint from before that")
        probabilities = token_probabilities(logits_V, args.temperature, args.top_k, args.top_p)
        token = torch.multinomial(probabilities, 1, generator=generator).item()
        if token == document_start:
            return
        yield token
        tokens = [token]


def text_pieces(tokens: Iterable[int], decode) -> Iterator[str]:
    """The text of tokens as they come; an incomplete character waits for its last byte."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        yield decoder.decode(decode([token]))
    yield decoder.decode(b"", final=True)


def show_samples(model: LanguageModel, prompt: str, args: argparse.Namespace) -> None:
    """Print the samples of one prompt, each behind the prompt. RunError if that is too long."""
    text = model.tokenizer.encode(prompt)
    tokens = [model.tokenizer.document_start, *text]
    if len(tokens) > model.context:
        raise RunError(
            f"the prompt has {len(tokens):,} tokens, its document start included, and the model's "
            f"context {model.context:,}; give a shorter one"
        )
    for index in range(args.num_samples):
        if args.num_samples > 1:
            print(f"--- sample {index + 1} of {args.num_samples}, seed {args.seed + index} ---")
        written = chain(text, generate(model, tokens, args, args.seed + index))
        for piece in text_pieces(written, model.tokenizer.decode):
            print(piece, end="", flush=True)
        print()


def interact(model: LanguageModel, args: argparse.Namespace) -> None:
    """Ask for prompts, one a line, until the end of the input; an empty one is asked for again."""
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            print()
            return
        if not prompt:
            continue
        try:
            show_samples(model, prompt, args)
        except RunError as error:
            print(f"error: {error}", file=sys.stderr)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="file or folder that a trainer wrote")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="beginning of the document")
    source.add_argument("--interactive", action="store_true", help="ask for prompts, ctrl-D ends")
    for name, kind, default, text in (
        ("max_tokens", int, 200, "most tokens that a sample adds to its prompt"),
        ("temperature", float, 1.0, "divides the logits: below 1 is safer, above 1 is wilder"),
        ("top_k", int, 0, "draw from so many of the most probable tokens; 0: from all"),
        ("top_p", float, 1.0, "draw from the fewest tokens with so much probability together"),
        ("seed", int, 0, "the same seed gives the same text"),
        ("num_samples", int, 1, "samples a prompt"),
    ):
        text = f"{text} (default: %(default)s)"
        parser.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=text)
    args = parser.parse_args()
    for name, least in (("max_tokens", 1), ("top_k", 0), ("seed", 0), ("num_samples", 1)):
        if not least <= getattr(args, name) < LARGE:
            parser.error(f"--{name} must be at least {least} and below 2**62")
    if not 1e-3 <= args.temperature < math.inf:
        parser.error("--temperature must be at least 0.001; the most probable token: --top_k 1")
    if not 0 < args.top_p <= 1:
        parser.error("--top_p must be above 0 and at most 1")
    if args.prompt == "":
        parser.error("the prompt is empty; give --prompt TEXT, or --interactive")
    return args


def main() -> int:
    args = parse()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends this without a complaint
    for stream in (sys.stdin, sys.stdout):  # what a terminal cannot show must end nothing
        stream.reconfigure(errors="surrogateescape" if stream is sys.stdin else "replace")
    try:
        model = load_model(args.checkpoint)
        interact(model, args) if args.interactive else show_samples(model, args.prompt, args)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except (RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
