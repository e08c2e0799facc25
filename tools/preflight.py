"""Compile a whole training run for a GPU that is not here, and say what it would need.

    ./run.sh tools/preflight.py --gpu H100 --track fineweb
    ./run.sh tools/preflight.py --gpu 4090 --rows 1 --price 0.40 --seq_len 8192
    ./run.sh tools/preflight.py --entry baselines/train_gpt2.py --track 124M

Needs no GPU. Every graph of training, validation and optimizers is compiled down to ptxas, for one
card, and every stage of the schedule is run on tensors without data; then the same run is lowered
for eight (--cards). Says what fails; registers, spills and shared memory; graph breaks and
recompilations; peak memory; bytes that cross the wire; and a roofline: the time that each operation
needs for its arithmetic or its memory traffic, whichever is longer, as if all ran at the card's
peak, one after another. No step is faster than that; a real one is slower. Attention counts as if
each row were one document. Takes every flag of the trainer. Exit code: 0, or 1 on a failure.
"""

import dataclasses
import importlib
import json
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project's root

import numpy as np

from referee.cards import CARDS, Card
from referee.flags import RunError
from referee.shards import ShardError, write_shard
from tools.cli import ToolError, finish, flag_parser
from tools.fake_gpu import COMPILED_FOR, TESTED, check_machine, install, load_guard, torch_release

ROOT, GIB = Path(__file__).resolve().parent.parent, 2**30
STAGED = ("batch_tokens", "document_cap", "window_tokens", "short_window_tokens")
STEPS_PER_STAGE = 2
DOCUMENT_TOKENS = 600  # of the made-up shards


class Progress:
    """What is being done and for how long, as a line whose clock moves."""

    def __init__(self):
        self.start, self.text, self.ended = time.perf_counter(), "starting", threading.Event()
        self.to_terminal = sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        if text != self.text and not self.to_terminal:
            print(self.line(text), file=sys.stderr, flush=True)
        self.text = text

    def line(self, text: str) -> str:
        return f"[{time.perf_counter() - self.start:4.0f} s] {text}"

    def tick(self) -> None:
        while not self.ended.wait(0.5):
            print(f"\r\033[K{self.line(self.text):.78}", end="", file=sys.stderr, flush=True)
        print("\r\033[K", end="", file=sys.stderr, flush=True)

    @contextmanager
    def shown(self):
        thread = threading.Thread(target=self.tick) if self.to_terminal else None
        if thread:
            thread.start()
        try:
            yield
        finally:
            self.ended.set()
            if thread:
                thread.join()


def load_trainer(entry: str):
    """The module of a trainer; ToolError if it cannot be imported."""
    path = Path(entry).resolve()
    root = ROOT
    if not path.is_file() or not path.is_relative_to(root):
        raise ToolError(f"{entry} is no trainer of {root}; run the preflight.py beside it")
    try:
        return importlib.import_module(".".join(path.relative_to(root).with_suffix("").parts))
    except (Exception, SystemExit) as error:
        raise ToolError(f"{entry} cannot be imported: {type(error).__name__}: {error}") from error


def stages(hp) -> int:
    """Most values that a setting which changes between stages has."""
    values = (getattr(hp, name, 0) for name in STAGED)
    return max(len(v) if isinstance(v, tuple) else 1 for v in values)


def shortened(settings, rows: int, folder: Path):
    """The same run with two steps per stage, on made-up shards in folder."""
    hp = dataclasses.replace(settings.hp, num_steps=STEPS_PER_STAGE * stages(settings.hp),
                             val_every=STEPS_PER_STAGE)  # fmt: skip
    most = max(hp.batch_tokens) if isinstance(hp.batch_tokens, tuple) else hp.batch_tokens
    task = settings.task
    for kind, count in (("train", 4 * hp.num_steps * most), ("val", 2 * task.val_tokens)):
        tokens = np.zeros(count + hp.seq_len, np.uint16)
        tokens[::DOCUMENT_TOKENS] = task.document_start
        write_shard(folder / f"{kind}.bin", tokens)
    task = dataclasses.replace(task, train_files=str(folder / "train.bin"),
                               val_files=str(folder / "val.bin"))  # fmt: skip
    options = dataclasses.replace(settings.options, micro_batch_seqs=rows)
    return settings._replace(hp=hp, task=task, options=options)


def attention_keys(module, hp):
    """A function of the step: keys per query that FlexAttention multiplies, as whole blocks."""

    def keys(step: int) -> float:
        counts = []
        for layer in module.parse_layers(hp):
            if layer.attends:
                windows = hp.window_tokens if layer.is_long else hp.short_window_tokens
                window = hp.value_at_step(windows, step)
                counts.append(module.BLOCK * (1 + -(-(window - 1) // module.BLOCK)))
        return sum(counts) / len(counts)

    return keys if hasattr(module, "parse_layers") else lambda step: 0.0


# ------------------------------------------------------------------------------ Roofline


def bounds_ms(launch, card: Card) -> tuple[float, float]:
    """Milliseconds that its memory traffic and its arithmetic need at the card's peak."""
    peaks = {1: 2 * card.bf16_tflops, 2: card.bf16_tflops}
    tflops = peaks.get(launch.operand_bytes, card.fp32_tflops)
    return launch.moved_bytes / card.memory_gb_per_s / 1e6, launch.flops / tflops / 1e9


def by_stage(trace, num_stages: int) -> list[list]:
    """The launches of each stage's steps."""
    found = [[] for _ in range(num_stages)]
    for step in trace.steps:
        stage = min(step.step // STEPS_PER_STAGE, num_stages - 1)
        found[stage] += [launch for launches in step.passes for launch in launches]
    return found


def roofline(trace, card: Card, cards: int, settings) -> dict:
    """Milliseconds per step of each stage, bytes on the wire, and seconds of the whole run."""
    launches = by_stage(trace, stages(settings.hp))
    device = [sum(max(bounds_ms(a, card)) for a in s) / STEPS_PER_STAGE for s in launches]
    wire = [sum(a.wire_bytes for a in s) / STEPS_PER_STAGE for s in launches]
    total = [d + w / card.link_gb_per_s / 1e6 for d, w in zip(device, wire, strict=True)]
    return {
        "cards": cards, "rows_per_pass": trace.rows, "peak_bytes": trace.peak_bytes,
        "passes_per_step": [len(s.passes) for s in trace.steps[::STEPS_PER_STAGE]],
        "step_ms": total, "wire_bytes_per_step": wire,
        "run_s": sum(total) / len(total) * settings.hp.num_steps / 1e3,
    }  # fmt: skip


def operations(trace, card: Card, num_stages: int) -> list[dict]:
    """What the last stage's operations need per step, the longest first."""
    found = {}
    for launch in by_stage(trace, num_stages)[-1]:
        memory_ms, arithmetic_ms = bounds_ms(launch, card)
        needs = {"ms": max(memory_ms, arithmetic_ms), "memory_ms": memory_ms,
                 "arithmetic_ms": arithmetic_ms, "launches": 1, "bytes": launch.moved_bytes,
                 "flops": launch.flops}  # fmt: skip
        sums = found.setdefault(launch.name, Counter())
        sums.update({name: value / STEPS_PER_STAGE for name, value in needs.items()})
    ordered = sorted(found.items(), key=lambda item: -item[1]["ms"])
    return [{"name": name, **sums} for name, sums in ordered]


# ------------------------------------------------------------------------------ Report


def collect(own, settings, module, card: Card, traces: dict, seconds: float) -> dict:
    """Everything that is reported, for --json."""
    one, num_stages = traces[own.cards[0]], stages(settings.hp)
    kernels = [k for configs in one.kernels.values() for k in configs if not k.problem]
    problems = [p for trace in traces.values() for p in trace.problems]
    if one.peak_bytes > card.memory_bytes:
        problems.append(f"needs {one.peak_bytes / GIB:.1f} GiB with {one.rows} rows per pass, "
                        f"{card.name} has {card.memory_bytes / GIB:.1f}")  # fmt: skip
    lines = [roofline(trace, card, cards, settings) for cards, trace in traces.items()]
    for line in lines:
        if own.price is not None:
            line["run_dollars"] = line["run_s"] / 3600 * line["cards"] * own.price
    estimates = {}
    if hasattr(module, "memory_estimate"):  # the contestant's own, by which it chooses rows
        vocab = module.padded_vocab(settings.task)
        estimates = {n: module.memory_estimate(settings.hp, vocab, n) for n in (1, 2, 4, 8)}
    return {
        "entry": own.entry, "track": settings.track, "card": card._asdict(),
        "torch": torch_release(), "seconds": seconds, "problems": list(dict.fromkeys(problems)),
        "graphs": one.graphs, "recompiled": one.recompiled, "stages": num_stages,
        "kernels": [k._asdict() for k in kernels], "peak_when": one.peak_when,
        "estimated_bytes_by_rows": estimates,
        "rooflines": lines, "operations": operations(one, card, num_stages),
    }  # fmt: skip


def report(found: dict, card: Card) -> list[str]:
    """One screen of text."""
    major, minor = card.capability
    lines = [f"{found['entry']} --track {found['track']} on {card.name} (sm_{major}{minor}), torch "
             f"{found['torch']}: {found['seconds']:.0f} s"]  # fmt: skip
    lines.append(f"graphs    {found['graphs']} compiled; {found['recompiled']} again over "
                 f"{found['stages']} stages")  # fmt: skip
    if kernels := found["kernels"]:
        spilled = max(kernels, key=lambda k: k["spilled_bytes"])
        shared = max(k["shared_bytes"] for k in kernels)
        lines.append(
            f"kernels   {len(kernels)} configurations; registers up to "
            f"{max(k['registers'] for k in kernels)}, shared memory up to {shared >> 10} of "
            f"{card.shared_bytes >> 10} KiB, spills up to {spilled['spilled_bytes']} B"
            + (f" ({spilled['name']:.40})" if spilled["spilled_bytes"] else "")
        )
    by_rows = found["estimated_bytes_by_rows"].items()
    by_rows = ", ".join(f"{rows}: {size / GIB:.1f}" for rows, size in by_rows)
    lines.append(f"memory    {card.memory_bytes / GIB:.1f} GiB, peak in {found['peak_when']}; the "
                 f"trainer's estimate by rows {by_rows or 'none'}")  # fmt: skip
    heads = [f"stage {i + 1}" for i in range(found["stages"])]
    heads = " ".join(f"{head:>8}" for head in heads)
    lines.append(f"roofline  cards  rows  peak GiB  {heads} ms/step       run  wire MB/step")
    for line in found["rooflines"]:
        times = " ".join(f"{ms:8.1f}" for ms in line["step_ms"])
        wire = sum(line["wire_bytes_per_step"]) / found["stages"] / 1e6
        price = f"   ${line['run_dollars']:.2f}" if "run_dollars" in line else ""
        lines.append(
            f"          {line['cards']:5} {line['rows_per_pass']:5} {line['peak_bytes'] / GIB:9.1f}"
            f"  {times}         {line['run_s']:8.1f} s {wire:12.0f}{price}"
        )
    lines.append("longest operations of the last stage, first line: ms/step (memory, arithmetic)")
    whole = sum(item["ms"] for item in found["operations"])
    for item in found["operations"][:5]:
        bound = "memory" if item["memory_ms"] > item["arithmetic_ms"] else "arithmetic"
        lines.append(
            f"{item['ms']:8.2f} ms {item['ms'] / whole:4.0%}  {item['launches']:4.0f} x "
            f"({item['memory_ms']:.2f}, {item['arithmetic_ms']:.2f})  bound by {bound}: "
            f"{item['name']:.48}"
        )
    lines += [f"FAILURE   {problem}" for problem in found["problems"]]
    count = len(found["problems"])
    lines.append(f"{count} failure{'s' if count != 1 else ''}")
    return lines


def at_least(least: int, kind=int):
    """A type of argparse: a number that is no smaller."""

    def number(text: str):
        if not (value := kind(text)) >= least:
            raise ValueError
        return value

    return number


def card_counts(text: str) -> tuple[int, ...]:
    return tuple(at_least(1)(word) for word in text.split(","))


def main() -> int:
    parser = flag_parser(__doc__)
    parser.add_argument(
        "--gpu", default="H100", choices=COMPILED_FOR, help="the card (default: H100)"
    )
    parser.add_argument("--entry", default="train_gpt.py", help="the trainer's file")
    parser.add_argument("--rows", type=at_least(0), default=0, help="rows per pass; 0: what fits")
    parser.add_argument("--cards", type=card_counts, help="numbers of cards, of which "
                        "the first gets kernels; default: 1,8, of a model in shards 1")  # fmt: skip
    parser.add_argument("--price", type=at_least(0, float), help="dollars per GPU and hour")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--lower_only", action="store_true",
                        help="leave out Triton and ptxas")  # fmt: skip
    own, flags = parser.parse_known_args()
    own.cards = own.cards or ((1, 8) if own.entry.endswith("train_gpt.py") else (1,))
    check_machine()
    card, library, progress = CARDS[own.gpu], load_guard(), Progress()
    with progress.shown():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        try:
            install(card, library)
            module = load_trainer(own.entry)
            found = preflight(own, flags, module, card, progress)
        except RunError as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            for theirs, ours in (("nproc_per_node", "cards"), ("micro_batch_seqs", "rows")):
                reason = reason.replace(f"--{theirs}", f"--{ours}")
            raise ToolError(f"{own.entry} on {card.name}: {reason}") from error
        except AttributeError as error:
            if torch_release() in TESTED:
                raise
            raise ToolError(f"torch {torch_release()} is newer than {TESTED[-1]}, the last that "
                            f"tools/fake_gpu.py is written for: {error}") from error  # fmt: skip
    if own.json:
        print(json.dumps(found, indent=1))
    else:
        print("\n".join(report(found, card)))
    return 1 if found["problems"] else 0


def preflight(own, flags: list[str], module, card: Card, progress: Progress) -> dict:
    """Compile and run for one card, lower for eight, and collect what was seen."""
    from referee.harness import parse_flags  # after the mocks
    from tools.dry_run import dry_run

    settings = parse_flags(flags, module.TRACKS, next(iter(module.TRACKS)), __doc__)
    started, traces = time.perf_counter(), {}
    with tempfile.TemporaryDirectory() as folder:
        for cards in own.cards:
            short = shortened(settings, own.rows, Path(folder))
            keys = attention_keys(module, short.hp)
            tells = lambda text, n=cards: progress(f"{n} card{'s' if n > 1 else ''}, {text}")  # noqa: E731
            compile_kernels = cards == own.cards[0] and not own.lower_only
            try:
                traces[cards] = dry_run(
                    module.Trainer, short, card, cards, compile_kernels, keys, tells
                )
            except (RunError, ShardError) as error:  # such as rows that cannot be dealt
                if cards == own.cards[0] or str(error).startswith("torch.compile failed"):
                    raise
                progress(f"left out {cards} cards: {error}")
    return collect(own, settings, module, card, traces, time.perf_counter() - started)


if __name__ == "__main__":
    finish(main)
