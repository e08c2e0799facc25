"""Kill runs at random moments, go on from what they left, and count what came of it.

    ./run.sh tests/kill_trials.py [--trials 8] [--kinds plain compiled ...] [--seed 0]

A trial starts a run that saves often, kills all of its processes by SIGKILL, starts it again in the
same folder from the newest checkpoint, and compares every loss with the losses of an undisturbed
run. It prints a table with one row per kind, and why a trial failed. Exit code 1 if a loss differs,
a checkpoint is refused, or half a checkpoint is left. A trial takes some 15 s, a compiled one 60 s.
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

from forked import ROOT, clean_environment

STEPS = 60
TINY = f"""--track embedded --num_steps {STEPS} --val_every 20 --val_tokens 8192 --model_dim 64
    --num_heads 2 --cpu_dtype float32""".split()
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
COLUMNS = ("killed", "in a save", "resumed with equal losses", "nothing saved yet, began anew",
           ".part left", "failed", "ended before")  # fmt: skip


def start(command: list[str], folder: Path, *flags: str) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    with (folder / "output").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, *command, f"--log_dir={folder}", *flags],
            env=clean_environment(),
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


def trial(kind: str, whole: dict, folder: Path, rng: random.Random) -> dict[str, bool]:
    """Carry out one trial; return which of the table's columns it counts in."""
    command, every = KINDS[kind]
    flags = [f"--save_every={every}"]
    if not kill(start(command, folder, *flags), folder, kind == "while saving", rng):
        return {"ended before": True}
    before, saved = losses(folder), sorted(folder.glob("*_step*[0-9]"))
    in_a_save = bool(list(folder.glob("*.part")))
    resume = [f"--resume={saved[-1]}"] if saved else []
    goes_on = start(command, folder, *flags, *resume).wait() == 0
    after = losses(folder)
    equal = ("val", STEPS) in after and (whole | before | after) == whole
    half_left = bool(list(folder.glob("*.part")))
    failed = half_left or not (goes_on and equal)
    if failed:
        print(f"{kind}: failed, see {folder}", file=sys.stderr)
    return {
        "killed": True,
        "in a save": in_a_save,
        "resumed with equal losses": bool(saved) and goes_on and equal,
        "nothing saved yet, began anew": not saved and goes_on and equal,
        ".part left": half_left,
        "failed": failed,
    }


def machine(folder: Path) -> str:
    """When and where a run was made, in the words of its log."""
    (log,) = folder.glob("*.txt")
    facts = dict(re.findall(r"^(utc|cpu|torch): (.*)$", log.read_text(), re.M))
    return f"{facts['utc'][:10]}, {facts['cpu']}, torch {facts['torch']}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=8, help="of each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    rng, failed = random.Random(args.seed), 0
    scratch = Path(tempfile.mkdtemp(prefix="kill_trials_"))
    for kind in args.kinds:
        whole_folder = scratch / f"{kind} whole"
        if start(KINDS[kind][0], whole_folder).wait():
            print(f"{kind}: no run at all, see {whole_folder}/output", file=sys.stderr)
            return 1
        if kind == args.kinds[0]:
            print(f"{machine(whole_folder)}, --seed {args.seed}\n", flush=True)
            print(f"| kind | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}", flush=True)
        whole, counts = losses(whole_folder), Counter()
        for number in range(args.trials):
            counts.update(trial(kind, whole, scratch / f"{kind} {number}", rng))
        print(f"| {kind} | {' | '.join(str(int(counts[name])) for name in COLUMNS)} |", flush=True)
        failed += counts["failed"]
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
