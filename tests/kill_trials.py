"""Kill runs at random moments, go on from what they left, and count what came of it.

    python tests/kill_trials.py [--trials 8] [--kinds plain compiled ...] [--seed 0]

A trial starts a run that saves often, kills all of its processes by SIGKILL, starts it again in the
same folder from the newest checkpoint, and compares every loss with those of a run that was left
alone. Exit code 1 if a loss differs, a checkpoint is refused, or half a one is left. A trial takes
some 15 s, of a compiled run some 60 s.
"""

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = 60
TINY = f"""--track embedded --num_steps {STEPS} --val_every 20 --val_tokens 8192 --model_dim 64
    --num_heads 2 --mlp_dim 128""".split()
SPEEDRUN = [str(ROOT / "train_gpt.py"), *TINY, "--bigram_rows=512", "--batch_tokens=512"]
GPT2 = [str(ROOT / "baselines/train_gpt2.py"), *TINY, "--warmup_steps=9"]
EAGER = "--compile=false"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
KINDS = {  # command, steps between checkpoints
    "plain": ([*SPEEDRUN, EAGER], 7),
    "while saving": ([*SPEEDRUN, EAGER], 2),
    "two ranks": ([*TORCHRUN, *SPEEDRUN, EAGER], 7),
    "baseline": ([*GPT2, EAGER], 7),
    "baseline, two ranks": ([*TORCHRUN, *GPT2, EAGER], 7),
    "compiled": (SPEEDRUN, 7),
}


def start(command: list[str], folder: Path, *flags: str) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    with (folder / "output").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, *command, f"--log_dir={folder}", *flags],
            env={**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def losses(folder: Path) -> dict[tuple[str, int], str]:
    """Loss as printed, by (kind, step), in the newest log; none before there is a whole one."""
    logs = sorted(folder.glob("*.txt"), key=lambda log: log.stat().st_mtime)
    text = logs[-1].read_text().rpartition("=== run ===\n")[2] if logs else ""
    found = re.findall(r"^step:(\d+)/\d+ (train|val)_loss:(\S+) ", text, re.M)
    return {(kind, int(step)): loss for step, kind, loss in found}


def kill(process: subprocess.Popen, folder: Path, while_saving: bool, rng: random.Random) -> bool:
    """Kill a run after a random step, or in the middle of a save; False if it ended before."""
    last, delay_s = rng.randrange(1, STEPS), rng.random() * 0.05
    while process.poll() is None:
        steps = max((step for _, step in losses(folder)), default=-1)
        if steps >= last and (not while_saving or list(folder.glob("*.part"))):
            if not while_saving:
                time.sleep(delay_s)
            break
        time.sleep(0.001)
    ended = process.poll() is not None
    if not ended:
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
        for pid in [*map(int, children.stdout.split()), process.pid]:
            os.kill(pid, signal.SIGKILL)  # torchrun's have sessions of their own
    process.wait()
    return not ended


def trial(kind: str, whole: dict, folder: Path, rng: random.Random) -> str:
    """Carry out one trial; return what came of it."""
    command, every = KINDS[kind]
    flags = [f"--save_every={every}"]
    if not kill(start(command, folder, *flags), folder, kind == "while saving", rng):
        return "ended before the kill"
    before, left = losses(folder), sorted(folder.glob("*_step*[0-9]"))
    half = "half a save, " if list(folder.glob("*.part")) else ""
    resume = [f"--resume={left[-1]}"] if left else []
    if start(command, folder, *flags, *resume).wait():
        return f"FAILED: could not go on, see {folder}/output"
    after = losses(folder)
    if list(folder.glob("*.part")):
        return f"FAILED: half a checkpoint stays in {folder}"
    last = ("val", STEPS)
    if last not in after or any(whole[key] != loss for key, loss in (before | after).items()):
        return f"FAILED: other losses, see {folder}"
    return (
        f"{half}resumed with equal losses" if left else f"{half}began anew: nothing was saved yet"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=8, help="of each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    rng, failed = random.Random(args.seed), False
    scratch = Path(tempfile.mkdtemp(prefix="kill_trials_"))
    for kind in args.kinds:
        whole_folder = scratch / f"{kind} whole"
        if start(KINDS[kind][0], whole_folder).wait():
            print(f"{kind}: no run at all, see {whole_folder}/output")
            return 1
        whole = losses(whole_folder)
        counts = Counter(
            trial(kind, whole, scratch / f"{kind} {number}", rng) for number in range(args.trials)
        )
        for what, count in sorted(counts.items()):
            print(f"{kind}: {count} of {args.trials} {what}", flush=True)
        failed |= any("FAILED" in what for what in counts)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
