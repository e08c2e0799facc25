"""Stands for a trainer in the tests of tools/: writes a sound log at once, of invented figures.

Takes the flags that race.py gives a run, the train time, and the seed whose run shall crash after
its first validation.
"""

import argparse
import hashlib
import json
import os
import sys
import uuid
from datetime import UTC, datetime
from pathlib import Path

from kernels import loss_of


def source_headings(args) -> list[str]:
    headings = []
    for path in ("train_gpt.py", "kernels.py"):
        text = Path(__file__).with_name(path).read_text()
        digest, lines = hashlib.sha256(text.encode()).hexdigest(), text.count("\n")
        kept = os.path.relpath(Path(args.source_dir, path), args.log_dir)
        headings.append(f"=== source {path} lines:{lines} sha256:{digest} kept:{kept} ===")
    return headings


def main() -> int:
    parser = argparse.ArgumentParser()
    for name in ("slug", "log_dir", "source_dir"):
        parser.add_argument(f"--{name}")
    for name in ("seed", "declared_runs", "turn_steps"):
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--ms", type=int, default=1000)
    parser.add_argument("--crashing_seed", type=int)
    args = parser.parse_args()
    crashes, ms, loss = args.seed == args.crashing_seed, args.ms + args.seed, loss_of(args.seed)
    name = f"{args.slug}_{args.seed}_{uuid.uuid4().hex}"
    lines = [
        *source_headings(args),
        "=== config ===",
        "schema: 2",
        f"utc: {datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}",
        f"argv: {json.dumps(sys.argv[1:])}",
        f"run: {name}",
        f"seed: {args.seed}",
        f"declared_runs: {args.declared_runs}",
        "target_val_loss: 3.0",
        "=== environment ===",
        "host: h",
        "=== run ===",
        "step:0/2 val_loss:5.000000 train_time:0ms step_avg:nanms",
    ]
    if not crashes:
        lines.append(f"step:2/2 val_loss:{loss:.6f} train_time:{ms}ms step_avg:{ms / 2:.2f}ms")
    status = "aborted" if crashes else "success" if loss <= 3 else "missed"
    result = (
        f"result status:{status} val_loss:{loss:.6f} target:3.0 train_time:{ms}ms "
        f"time_to_target:none steps:2 tokens:2 seed:{args.seed} overrides:0 resumed_from:0"
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
