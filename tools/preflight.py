"""Compile a whole training run for a GPU that is not here, and print what it would need.

    ./run.sh tools/preflight.py --gpu H100 --track fineweb
    ./run.sh tools/preflight.py --gpu 4090 --rows 1 --price 0.40 --seq_len 8192
    ./run.sh tools/preflight.py --entry baselines/train_gpt2.py --track 124M

Compiles every graph of training, validation and optimizers for one card, down to ptxas, and runs
each stage of the schedule on tensors without data; then traces the same run for eight cards
(--cards). Prints failures; registers, spills and shared memory; graphs that compile again; peak
memory; bytes sent between cards; and the time of a step. Its lower bound is the sum of all
operations, each at the card's peak rate for its arithmetic or its memory traffic, whichever takes
longer. The expected time divides each by the share of the peak that its class reaches (CLASSES).
Attention counts as if each row were one document, exchange as if nothing overlapped it. Takes
every flag of the trainer. Exit code: 0, or 1 on a failure.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project's root
    from referee.start import finish

import dataclasses
import importlib
import json
import re
import tempfile
import time
import warnings
from collections import Counter
from itertools import chain

import numpy as np
from tqdm import tqdm

from referee.cards import CARDS, Card
from referee.flags import RunError, numbers
from referee.shards import ShardError, write_shard
from tools.cli import ToolError, flag_parser
from tools.fake_gpu import COMPILED_FOR, TESTED, check_machine, install, load_guard, torch_release

ROOT, GIB = Path(__file__).resolve().parent.parent, 2**30
STAGED = ("batch_tokens", "document_cap", "window_tokens", "short_window_tokens")
STEPS_PER_STAGE = 2
DOCUMENT_TOKENS = 600  # per document of the made-up shards
PROGRESS = "[{elapsed}] {desc}"


def load_trainer(entry: str):
    """The module of a trainer; ToolError if it cannot be imported."""
    path = Path(entry).resolve()
    if not path.is_file() or not path.is_relative_to(ROOT):
        raise ToolError(f"{entry} is not a file of {ROOT}; run the preflight.py of its own project")
    try:
        return importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    except (Exception, SystemExit) as error:
        raise ToolError(f"{entry} cannot be imported: {type(error).__name__}: {error}") from error


def stages(hp) -> int:
    """Number of stages: the most values that a setting of STAGED has."""
    values = (getattr(hp, name, 0) for name in STAGED)
    return max(len(v) if isinstance(v, tuple) else 1 for v in values)


def shortened(settings, rows: int, folder: Path):
    """The same run with few steps per stage, on made-up shards in folder."""
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
    """A function of the step: mean keys per query that FlexAttention multiplies, in blocks."""

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


# By class of launches: a pattern of their names, of which the first that matches counts, and the
# shares of the card's peak bandwidth and of its peak arithmetic that they reach. "timed": on an
# H200, see docs/gpus.md. The others are estimates from one run of 120 steps on an H100; a profile
# by tools/profile_step.py, which has the same classes, replaces them.
CLASSES = {
    "loss kernel": ("softcapped_loss", 0.75, 1.0),  # timed: 1.9 to 2.3 ms per chunk
    "head": ("of head_loss", 0.82, 0.69),  # timed: three products 3.64 ms per chunk
    "MLP kernel": (r"relu_squared_(tma_)?kernel", 0.82, 0.49),
    "attention": ("triton_tem|flash_attention|scaled_dot_product", 0.82, 0.42),
    "table gradients": ("index_put", 0.59, 1.0),  # atomics
    "optimizer": ("of optimizer", 0.82, 0.6),
    "products": (r"gemm|nvjet|cutlass|mkldnn|^(aten::)?_?(add|scaled_|b|addb)?mm", 0.82, 0.57),
    "element-wise": ("", 0.82, 1.0),
}
EXCHANGE_SHARE = 0.8  # of the link's peak, estimated
GAP_MS = 0.0045  # per launch: gaps, sorts and reductions in one block; estimated
SCALE = 1.09  # of all: the one number that is fitted, to the first two stages of that run


def class_of(name: str) -> str:
    return next(c for c, (pattern, *_) in CLASSES.items() if re.search(pattern, name))


def times_ms(launch, card: Card) -> dict:
    """Milliseconds of a launch: of its memory traffic and arithmetic at the peak, and expected."""
    peaks = {1: 2 * card.bf16_tflops, 2: card.bf16_tflops}
    memory_ms = launch.moved_bytes / card.memory_gb_per_s / 1e6
    arithmetic_ms = launch.flops / peaks.get(launch.operand_bytes, card.fp32_tflops) / 1e9
    _, memory_share, arithmetic_share = CLASSES[class_of(launch.name)]
    slower_ms = max(memory_ms / memory_share, arithmetic_ms / arithmetic_share)
    return {"memory_ms": memory_ms, "arithmetic_ms": arithmetic_ms,
            "bound_ms": max(memory_ms, arithmetic_ms), "expected_ms": SCALE * (slower_ms + GAP_MS),
            "launches": 1, "bytes": launch.moved_bytes, "flops": launch.flops}  # fmt: skip


def by_stage(trace, num_stages: int) -> list[list]:
    """The launches of each stage's steps."""
    found = [[] for _ in range(num_stages)]
    for step, passes in trace.steps.items():
        found[step // STEPS_PER_STAGE] += chain(*passes)
    return found


def roofline(trace, card: Card, cards: int, settings) -> dict:
    """Milliseconds and bytes sent per step of each stage, and seconds of the whole run."""
    launches = by_stage(trace, stages(settings.hp))
    wire = [sum(a.wire_bytes for a in s) / STEPS_PER_STAGE for s in launches]
    found = {
        "cards": cards, "rows_per_pass": trace.rows, "peak_bytes": trace.peak_bytes,
        "passes_per_step": [len(s) for s in trace.steps.values()][::STEPS_PER_STAGE],
        "wire_bytes_per_step": wire,
    }  # fmt: skip
    for kind, link_share in (("bound", 1.0), ("expected", EXCHANGE_SHARE)):
        device = [sum(times_ms(a, card)[f"{kind}_ms"] for a in s) for s in launches]
        link = [w / (link_share * card.link_gb_per_s) / 1e6 for w in wire]
        total = [d / STEPS_PER_STAGE + w for d, w in zip(device, link, strict=True)]
        found[f"{kind}_ms"] = total
        found[f"{kind}_run_s"] = sum(total) / len(total) * settings.hp.num_steps / 1e3
    return found


def longest(launches: list, card: Card, name_of) -> list[dict]:
    """Sums of times_ms per step by name_of(launch), longest first."""
    found = {}
    for launch in launches:
        sums = found.setdefault(name_of(launch), Counter())
        sums.update({k: v / STEPS_PER_STAGE for k, v in times_ms(launch, card).items()})
    ordered = sorted(found.items(), key=lambda item: -item[1]["expected_ms"])
    return [{"name": name, **sums} for name, sums in ordered]


# ------------------------------------------------------------------------------ Report


def collect(own, settings, module, card: Card, traces: dict, seconds: float) -> dict:
    """What --json prints, and report shows."""
    one, num_stages = traces[own.cards[0]], stages(settings.hp)
    kernels = [k for configs in one.kernels.values() for k in configs if not k.problem]
    problems = [p for trace in traces.values() for p in trace.problems]
    if one.peak_bytes > card.memory_bytes:
        problems.append(f"needs {one.peak_bytes / GIB:.1f} GiB with {one.rows} rows per pass, "
                        f"{card.name} has {card.memory_bytes / GIB:.1f}")  # fmt: skip
    lines = [roofline(trace, card, cards, settings) for cards, trace in traces.items()]
    for line in lines:
        if own.price is not None:
            line["run_dollars"] = line["expected_run_s"] / 3600 * line["cards"] * own.price
    last, estimates = by_stage(one, num_stages)[-1], {}
    if hasattr(module, "memory_estimate"):  # by which the trainer chooses rows
        vocab = module.padded_vocab(settings.task)
        estimates = {n: module.memory_estimate(settings.hp, vocab, n) for n in (1, 2, 4, 8)}
    return {
        "entry": own.entry, "track": settings.track, "card": card._asdict(),
        "torch": torch_release(), "seconds": seconds, "problems": list(dict.fromkeys(problems)),
        "graphs": one.graphs, "recompiled": one.recompiled, "stages": num_stages,
        "kernels": [k._asdict() for k in kernels], "peak_when": one.peak_when,
        "estimated_bytes_by_rows": estimates,
        "rooflines": lines, "operations": longest(last, card, lambda a: a.name),
        "classes": longest(last, card, lambda a: class_of(a.name)),
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
    heads = " ".join(f" stage {i + 1}" for i in range(found["stages"]))
    lines.append(f"time      cards  rows  peak GiB         {heads} ms/step       run  wire MB/step")
    for line in found["rooflines"]:
        wire = sum(line["wire_bytes_per_step"]) / found["stages"] / 1e6
        price = f"   ${line['run_dollars']:.2f}" if "run_dollars" in line else ""
        lead = f"{line['cards']:5} {line['rows_per_pass']:5} {line['peak_bytes'] / GIB:9.1f}"
        for kind, tail in (("bound", f"{wire:12.0f}"), ("expected", price)):
            times = " ".join(f"{ms:8.1f}" for ms in line[f"{kind}_ms"])
            run_s = line[f"{kind}_run_s"]
            lines.append(f"          {lead:21}  {kind:8} {times}         {run_s:8.1f} s {tail}")
            lead = ""
    lines.append("last stage, ms per step: bound, expected, share, launches")
    whole = sum(item["expected_ms"] for item in found["classes"])
    for item in found["classes"]:
        lines.append(f"{item['bound_ms']:10.2f} {item['expected_ms']:8.2f} "
                     f"{item['expected_ms'] / whole:4.0%} {item['launches']:6.0f}  "
                     f"{item['name']}")  # fmt: skip
    lines += [f"FAILURE   {problem}" for problem in found["problems"]]
    count = len(found["problems"])
    lines.append(f"{count} failure{'s' if count != 1 else ''}")
    return lines


def read_flags() -> tuple:
    """(our flags, the trainer's)."""
    parser = flag_parser(__doc__)
    card_help = "numbers of cards, kernels for the first; default: 1,8, for sharded models 1"
    parser.add_argument("--gpu", default="H100", choices=COMPILED_FOR, help="default: H100")
    parser.add_argument("--entry", default="train_gpt.py", help="the trainer's file")
    parser.add_argument("--rows", type=int, default=0, help="rows per pass; 0: what fits")
    parser.add_argument("--cards", type=numbers(int, None), help=card_help)
    parser.add_argument("--price", type=float, help="dollars per GPU and hour")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--lower_only", action="store_true", help="leave out Triton and ptxas")
    own, flags = parser.parse_known_args()
    own.cards = own.cards or ((1, 8) if own.entry.endswith("train_gpt.py") else (1,))
    if not (own.rows >= 0 and (own.price or 0) >= 0 and min(own.cards) >= 1):
        parser.error("--rows and --price must be at least 0, --cards at least 1")
    return own, flags


def main() -> int:
    own, flags = read_flags()
    check_machine()
    card = CARDS[own.gpu]
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
    try:
        install(card, load_guard())
        found = preflight(own, flags, load_trainer(own.entry), card)
    except RunError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        for theirs, ours in (("nproc_per_node", "cards"), ("micro_batch_seqs", "rows")):
            reason = reason.replace(f"--{theirs}", f"--{ours}")
        raise ToolError(f"{own.entry} on {card.name}: {reason}") from error
    except AttributeError as error:
        if torch_release() in TESTED:
            raise
        raise ToolError(f"tools/fake_gpu.py supports torch {TESTED[0]} to {TESTED[-1]}, not "
                        f"{torch_release()}: {error}") from error  # fmt: skip
    print(json.dumps(found, indent=1) if own.json else "\n".join(report(found, card)))
    return 1 if found["problems"] else 0


def preflight(own, flags: list[str], module, card: Card) -> dict:
    """Compile and run for the first number of cards, trace for the others; return the report."""
    from referee.harness import parse_flags  # after the mocks
    from tools.dry_run import dry_run

    settings = parse_flags(flags, module.TRACKS, next(iter(module.TRACKS)), __doc__)
    started, traces = time.perf_counter(), {}
    with tempfile.TemporaryDirectory() as folder, tqdm(bar_format=PROGRESS, leave=False) as bar:
        for cards in own.cards:
            short = shortened(settings, own.rows, Path(folder))
            keys = attention_keys(module, short.hp)
            tell = lambda text, n=cards: bar.set_description_str(f"cards {n}, {text}")  # noqa: E731
            compiles = cards == own.cards[0] and not own.lower_only
            try:
                traces[cards] = dry_run(module.Trainer, short, card, cards, compiles, keys, tell)
            except (RunError, ShardError) as error:  # such as rows that cannot be dealt
                if cards == own.cards[0] or str(error).startswith("torch.compile failed"):
                    raise
                tqdm.write(f"left out {cards} cards: {error}", file=sys.stderr)
    return collect(own, settings, module, card, traces, time.perf_counter() - started)


if __name__ == "__main__":
    finish(main)
