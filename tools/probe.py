#!/usr/bin/env python3
"""Run a source for four steps, and check whether its losses can be believed.

    probe.py .                                             this checkout, or a folder of sources
    probe.py baselines/train_gpt2.py                       another trainer of a checkout
    probe.py records/embedded/2026-11-26_EarlyCopying      a record, a try, or one of its logs

The source runs twice, each time in its own process, without torch.compile: with seed 0, and with
seed 1 and a validation shard of random tokens, which nobody can predict. In the first run a few
validation rows are changed, and the logits compared. A source can behave otherwise when it is not
probed; people read it for that. If every probe passed, the last line of the output belongs into
the record's README.md. Sources older than the records of 26 November 2026 are refused.
--across-documents: the network is meant to see the earlier documents of its row.

Exit code: 0 if every probe passed, 1 if one failed, 2 if the source cannot be probed.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project's root
    from referee.start import finish

import glob
import hashlib
import json
import math
import subprocess
from datetime import UTC, datetime
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np

from referee.shards import open_shard, write_shard
from referee.task import TASKS, check_shards, validation_rows
from tools.attempts import Attempt, copy_of, require_own_flags, staged, variables
from tools.audit import FIRST_LOSS
from tools.cli import EXIT_FAILED, EXIT_MISUSE, ToolError, flag_parser
from tools.runs import LoggedRun, find_logs, read_log
from tools.sources import ENTRIES, sha256_of

INSIDE = Path(__file__).with_name("probe_inside.py")
STEPS = 4
LOGITS_AGREE = 1e-3  # rounding in fp32; leaks change logits by more than 0.1
LOSSES_AGREE = 1e-4  # nats per token
SHORT_DOCUMENT = 32  # tokens; shorter ones, such as licences, may stand in both
REFEREES = ("referee/task.py", "harness.py")  # today's, and that of the records of 26 November
FUNCTIONS = "check_shards", "validation_rows", "__init__"  # the last one in records
READERS = [  # who may open a validation shard, before the trainer is made
    f"{referee}:{function}" for referee in REFEREES for function in FUNCTIONS
]


class Probed(NamedTuple):
    """One run, and what probe_inside.py saw of it."""

    run: LoggedRun
    facts: dict
    train: list[Path]  # shards named by its configuration
    val: list[Path]
    val_files: set[str]  # identities of those, by whatever name they are opened


def attempt_of(source: Path, folder: Path, flags: list[str]) -> Attempt:
    """What to probe, as replay.py would run it; source may also be a trainer's file."""
    entry = next((e for e in ENTRIES if source.resolve().as_posix().endswith(f"/{e}")), None)
    if entry:
        source = source.resolve().parents[entry.count("/")]
    attempt = copy_of(source, folder, flags, entry)
    if not attempt.texts.keys() & set(REFEREES):
        raise ToolError(f"{source} is older than the records of 26 November 2026 and cannot be "
                        "probed any more; its record's page says if it passed")  # fmt: skip
    return attempt


def run_probed(attempt: Attempt, seed: int, flags: list[str]) -> Probed:
    """Run a source together with probe_inside.py; ToolError if that is not possible."""
    inside = INSIDE.read_text(encoding="utf-8")
    with staged({**attempt.texts, INSIDE.name: inside}) as scratch:
        facts, logs = scratch / "facts.json", scratch / "logs"
        own = {"num_steps": STEPS, "val_every": STEPS, "seed": seed, "log_dir": logs,
               "compile": "false", "fp32": "true"}  # fmt: skip
        own = [f"--{name}={value}" for name, value in own.items()]
        command = [scratch / INSIDE.name, attempt.entry, facts, *attempt.flags, *own, *flags]
        said = start([str(word) for word in command], scratch)
        seen = json.loads(facts.read_text(encoding="utf-8")) if facts.exists() else {}
        if "future" not in seen:  # which stands there from the last validation on
            raise ToolError(f"{attempt.name} cannot be probed: {said}")
        run = read_log(find_logs(logs)[0])
        train, val = (shards_of(scratch, run.config[f"{x}_files"]) for x in ("train", "val"))
        val_files = {f"{path.stat().st_dev}:{path.stat().st_ino}" for path in val}
        return Probed(run, seen, train, val, val_files)


def start(command: list[str], scratch: Path) -> str:
    """Run Python with these words; return the last line of its output."""
    done = subprocess.run([sys.executable, *command], env=variables(scratch), text=True,
                          capture_output=True)  # fmt: skip
    return (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]


def shards_of(scratch: Path, pattern: str) -> list[Path]:
    return [Path(path).resolve() for path in sorted(glob.glob(str(scratch / pattern)))]


def both_runs(attempt: Attempt) -> tuple[Probed, Probed]:
    first = run_probed(attempt, seed=0, flags=[])
    tokens = sum(len(open_shard(path)) for path in first.val)
    vocab = int(first.run.config["vocab_size"])
    with TemporaryDirectory(prefix="photofinish_random_") as folder:
        shard = Path(folder, "random.bin")
        write_shard(shard, np.random.default_rng().integers(vocab, size=tokens).astype(np.uint16))
        return first, run_probed(attempt, seed=1, flags=[f"--val_files={shard}"])


def findings(first: Probed, second: Probed, across_documents: bool) -> list[tuple[str, str]]:
    """(name, what is wrong; empty if it passed) of every probe."""
    facts, validations = first.facts, first.facts["validations"]

    def unchanged(fact: str, words: str) -> str:
        return "" if facts[fact] < LOGITS_AGREE else f"{words}, by up to {facts[fact]:.3g}"

    def felt(fact: str, words: str) -> str:
        return "" if facts[fact] > LOGITS_AGREE else words

    return [
        ("future tokens", unchanged("future", "a later token changes earlier logits")),
        ("other documents", "" if across_documents else unchanged(
            "documents", "a token of the document before changes logits (if the network is meant "
            "to see it: --across-documents)")),
        ("other rows", unchanged("rows", "a row alone has other logits than among others")),
        ("grouping of rows", unchanged("grouping", "rows in pairs have other logits")),
        ("order of rows", unchanged("order", "rows in reverse order have other logits")),
        ("inputs count", felt("inputs_felt", "a changed token changes no logit after it")),
        ("weights count", felt("weights_felt", "other weights give the same logits, so these are "
                               "cached")),
        ("weights stay", learning(validations)),
        ("same loss again", other_loss(validations, "again", "computed twice, its loss is")),
        ("loss as reported", other_loss(validations, "reported", "it reports a loss of")),
        ("first loss", too_low(first, 0, "trained before its first step: its first loss is")),
        ("unknown targets", too_low(second, -1, "it knows the targets: on random tokens its loss "
                                    "is")),
        ("two seeds", "" if first.run.train_curve != second.run.train_curve and
         final_weights(first) != final_weights(second) else "seeds 0 and 1 give the same run"),
        ("validation rows", other_rows(first)),
        ("documents", shared_documents(first)),
        ("validation shards", openings(first, first.val_files)
         or openings(second, first.val_files | second.val_files)),
        ("network", calls(first)),
    ]  # fmt: skip


def final_weights(probed: Probed) -> str:
    return probed.facts["validations"][-1]["weights"]


def learning(validations: list[dict]) -> str:
    steps = [str(v["step"]) for v in validations if v["weights"] != v["weights_after"]]
    return f"weights change in the validation of step {', '.join(steps)}" if steps else ""


def other_loss(validations: list[dict], which: str, words: str) -> str:
    for v in validations:
        if not abs(v[which] - v["loss"]) < LOSSES_AGREE:
            return f"{words} {v[which]:.4f} at step {v['step']}, its logits give {v['loss']:.4f}"
    return ""


def too_low(probed: Probed, place: int, words: str) -> str:
    loss = probed.facts["validations"][place]["loss"]
    guess = math.log(float(probed.run.config["vocab_size"]))
    return "" if loss > guess - FIRST_LOSS else f"{words} {loss:.4f}, a uniform guess {guess:.4f}"


def other_rows(probed: Probed) -> str:
    """How the validation rows differ from those that this checkout's referee has for the track."""
    track, (count, length, digest) = probed.run.config["track"], probed.facts["validated_rows"]
    task = TASKS.get(track)
    if not (task and task.data_sha256 == check_shards(task)[0]):
        return f"the track {track} has no data hash, or this checkout has other data"
    rows = validation_rows(task)
    if (count, length) != rows.shape:
        return (f"it is judged by {count} rows of {length} tokens, the track has "
                f"{rows.shape[0]} of {rows.shape[1]}")  # fmt: skip
    same = digest == hashlib.sha256(rows).hexdigest()
    return "" if same else "the validation rows are not those of the track, or in another order"


def documents(path: Path, start: int) -> list[int]:
    """Hashes of a shard's documents, without the shortest."""
    tokens = open_shard(path)
    parts = np.split(tokens, np.flatnonzero(tokens == start))
    return [hash(part.tobytes()) for part in parts if len(part) >= SHORT_DOCUMENT]


def shared_documents(probed: Probed) -> str:
    start = int(probed.run.config["document_start"])
    in_val = {d for path in probed.val for d in documents(path, start)}
    both = sum(d in in_val for path in probed.train for d in documents(path, start))
    return f"{both} documents stand in training and in validation shards" if both else ""


def openings(probed: Probed, files: set[str]) -> str:
    """Who opened one of these files, but for the referee before the trainer was made."""
    others = sorted({f"{caller}{' after set-up' * is_set_up}"
                     for _, file, caller, is_set_up in probed.facts["opened"]
                     if file in files and (is_set_up or caller not in READERS)})  # fmt: skip
    return f"a validation shard was opened by {', '.join(others)}" if others else ""


def calls(probed: Probed) -> str:
    made = [f"{what} by {caller}" for what, caller in probed.facts["network"]]
    return f"it used the network: {made[0]}" if made else ""


def seen(probed: Probed) -> list[str]:
    """The files that a run opened, without Python's own, and the programs that it started."""
    opened = {f"opened    {path} by {caller}" for path, _, caller, _ in probed.facts["opened"]}
    started = {f"started   {name} by {caller}" for name, caller in probed.facts["programs"]}
    return [*sorted(opened), *sorted(started)]


def passed_line(attempt: Attempt, count: int, across_documents: bool) -> str:
    """What a record's README.md says of a source that passed every probe."""
    digest = sha256_of(json.dumps(sorted(attempt.texts.items())))[:12]
    return (f"Probed {datetime.now(UTC):%Y-%m-%d}, source {digest}: {count} probes "
            f"passed{', and it sees earlier documents of its row' * across_documents} "
            "(`tools/probe.py`).")  # fmt: skip


def main() -> int:
    parser = flag_parser(__doc__, "%(prog)s SOURCE [--FLAG VALUE of the trainer]...")
    parser.add_argument("source", type=Path, metavar="SOURCE", help="checkout, folder or log")
    parser.add_argument("--across-documents", action="store_true", help="see above")
    args, flags = parser.parse_known_args()
    require_own_flags(flags)
    with TemporaryDirectory(prefix="photofinish_probe_") as folder:
        attempt = attempt_of(args.source, Path(folder), flags)
    first, second = both_runs(attempt)
    found = findings(first, second, args.across_documents)
    print("\n".join([*seen(first), ""]))
    for name, fault in found:
        print(f"{'FAILED' if fault else 'passed':9} {name}{': ' * bool(fault)}{fault}")
    if failed := sum(bool(fault) for _, fault in found):
        print(f"{failed} of {len(found)} probes failed")
        return EXIT_FAILED
    print(f"\n{passed_line(attempt, len(found), args.across_documents)}")
    return 0


if __name__ == "__main__":
    finish(main, failed=EXIT_MISUSE)  # 1 is a probe that failed
