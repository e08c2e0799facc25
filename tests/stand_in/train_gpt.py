"""Stands for a trainer in the tests of tools/: writes a sound log of invented figures at once."""

import argparse
import hashlib
import json
import os
import sys
import uuid
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from kernels import loss_of

CALIBRATION = "calibration: matmul_tflops:1.000 copy_gb_per_s:1.0"


@dataclass
class RunOptions:
    slug: str = ""
    log_dir: str = ""
    source_dir: str = ""
    seed: int = 0
    declared_runs: int = 0
    turn_steps: int = 0
    ms: int = 20  # train time, less than the process takes
    crashing_seed: int = -1  # whose run crashes after its first validation


def source_headings(args) -> list[str]:
    headings = []
    for path in ("train_gpt.py", "kernels.py"):
        text = Path(__file__).with_name(path).read_text(encoding="utf-8")
        digest, lines = hashlib.sha256(text.encode()).hexdigest(), text.count("\n")
        kept = os.path.relpath(Path(args.source_dir, path), args.log_dir)
        headings.append(f"=== source {path} lines:{lines} sha256:{digest} kept:{kept} ===")
    return headings


def main() -> int:
    parser = argparse.ArgumentParser()
    for field in fields(RunOptions):
        parser.add_argument(f"--{field.name}", type=field.type, default=field.default)
    args = parser.parse_args()
    crashes, ms, loss = args.seed == args.crashing_seed, args.ms + args.seed, loss_of(args.seed)
    now = datetime.now(UTC)
    name = f"{now:%Y-%m-%dT%H%M%SZ}_{args.slug}_{args.seed}_{uuid.uuid4().hex}"
    lines = [
        *source_headings(args),
        "=== config ===",
        "schema: 2",
        f"utc: {now:%Y-%m-%dT%H:%M:%S.%fZ}",
        f"argv: {json.dumps(sys.argv[1:])}",
        "overrides: none",
        "num_steps: 2",
        f"run: {name}",
        f"seed: {args.seed}",
        f"declared_runs: {args.declared_runs}",
        "target_val_loss: 3.0",
        "=== environment ===",
        "host: h",
        "=== run ===",
        CALIBRATION,
        "step:0/2 val_loss:5.000000 train_time:0ms step_avg:nanms",
    ]
    if not crashes:
        lines += [f"step:{step}/2 train_loss:{loss:.6f} train_time:{ms}ms" for step in (1, 2)]
        lines.append(f"step:2/2 val_loss:{loss:.6f} train_time:{ms}ms step_avg:{ms / 2:.2f}ms")
    lines += [CALIBRATION, f"ledger: train:{ms / 1000:.3f}s total:{ms / 1000:.3f}s"]
    status = "aborted" if crashes else "success" if loss <= 3 else "missed"
    result = (
        f"result status:{status} val_loss:{loss:.6f} target:3.0 train_time:{ms}ms "
        f"time_to_target:none steps:2 tokens:2 tokens_per_s:{2000 / ms:.0f} seed:{args.seed} "
        "overrides:0 resumed_from:0"
    )
    text = "".join(f"{line}\n" for line in lines) + result
    digest = hashlib.sha256(text.encode()).hexdigest()
    Path(args.log_dir, f"{name}.txt").write_text(f"{text} sha256:{digest}\n")
    print(result)
    if crashes:
        print("error: this run shall crash", file=sys.stderr)
    return int(crashes)


if __name__ == "__main__":
    sys.exit(main())
