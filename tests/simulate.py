#!/usr/bin/env python3
"""A study: how often do the rules err, and what do they find? Simulated races, judged by diff.py.

Each line is a design that the rules allow under one kind of noise, each figure a share of verdicts.
False: FASTER of a B that needs the same time; FASTER of one that is 5% faster but whose loss is
higher by the margin, where no target is reached; PASS of a mean loss that lies on the target;
EQUIVALENT of a B whose time differs by the floor. Found: a B that needs 5% less time, a mean loss
0.003 below the target, and equal times where a run's noise is below the floor.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project's root
    from referee.start import finish

from itertools import product

import numpy as np

from tools import stats
from tools.attempts import draw_order
from tools.cli import flag_parser
from tools.comparison import Arm, compare
from tools.runs import LoggedRun

TARGET, LOSS_SD = 3.28, 0.0014  # sd: pooled over 845 public logs
HOST_SD = 0.05  # of the noise in log seconds, large against the floor: the worst case for FASTER
OWN_SD = 0.005  # of what each run adds to a host that drifts, wanders or beats
QUIET = 0.02  # share of that noise on a host where times can be told equal
MEMORY = 0.9  # correlation of a wandering host's speed with that of one run before


def normal(rng, count: int) -> np.ndarray:
    return HOST_SD * rng.standard_normal(count)


def student(rng, count: int) -> np.ndarray:
    return HOST_SD * rng.standard_t(3, count) / 3**0.5


def wandering(rng, count: int) -> np.ndarray:
    host = rng.standard_normal(count)
    for i in range(1, count):
        host[i] = MEMORY * host[i - 1] + (1 - MEMORY**2) ** 0.5 * host[i]
    return HOST_SD * host + OWN_SD * rng.standard_normal(count)


def drifting(rng, count: int) -> np.ndarray:
    return 4 * HOST_SD * np.linspace(0, 1, count) + OWN_SD * rng.standard_normal(count)


def beating(rng, count: int) -> np.ndarray:
    """Slow, fast, fast, slow ... from a phase that is drawn: a fixed A B B A would meet it."""
    beat = np.resize(np.roll([1, -1, -1, 1], rng.integers(4)), count)
    return HOST_SD * beat + OWN_SD * rng.standard_normal(count)


NOISES = {"normal": normal, "t, 3 degrees": student, "AR(1), 0.9": wandering,
          "linear drift": drifting, "period of 4": beating}  # fmt: skip
DESIGNS = {  # (runs an arm at each look, whether they were declared, whether seeds make pairs)
    "5 pairs": ((5,), True, True),
    "10 pairs": ((10,), True, True),
    "looks at 5 10 20": (stats.LOOKS, False, True),
    "10 runs, no pairs": ((10,), True, False),
}
# column: (verdict counted, share of the noise, gain, A's loss above the target, B's beyond A's)
COLUMNS = {
    "FASTER": ("FASTER", 1, 0, -0.004, 0),
    "FASTER, loss": ("FASTER", QUIET, 0.05, 0.1, stats.LOSS_MARGIN),
    "PASS": ("PASS", 1, 0, 0, 0),
    "EQUIV.": ("EQUIVALENT", QUIET, stats.FLOOR, -0.004, 0),
    "FASTER 5%": ("FASTER", 1, 0.05, -0.004, 0),
    "PASS 0.003": ("PASS", 1, 0, -0.003, 0),
    "EQUIV. 0%": ("EQUIVALENT", QUIET, 0, -0.004, 0),
}


def race(rng, count: int, noise, share: float, gain: float, loss: float, loss_up: float):
    """Runs of A and of B as logs would tell of them, in the order of race.py."""
    order = [arm for arm, _ in draw_order(2, count, str(rng.integers(1 << 30)))]
    seconds = 80 * np.exp(share * noise(rng, 2 * count) + np.log1p(-gain) * np.array(order))
    spread = student(rng, 2 * count) if noise is student else normal(rng, 2 * count)
    losses = TARGET + loss + loss_up * np.array(order) + LOSS_SD / HOST_SD * spread
    arms = [], []
    for i, (arm, s, x) in enumerate(zip(order, seconds, losses, strict=True)):
        curve = [(0, 0.0, 10.8), (1, 1000 * s, x)]
        config = {"utc": f"2026-01-01T{i:04}", "target_val_loss": str(TARGET), "track": "simulated"}
        config |= {"run": str(i)}
        arms[arm].append(LoggedRun(Path(str(i)), config=config, val_curve=curve,
                             environment={"host": "h"}, result={"status": "success"}))  # fmt: skip
    return arms


def claims(rng, design: tuple, noise, column: tuple) -> bool:
    """Whether one simulated attempt gets the verdict; one stops at the first look that gives it."""
    (looks, declared, paired), (verdict, *truth) = design, column
    a, b = race(rng, max(looks), noise, *truth)
    for i, (one, other) in enumerate(zip(a, b[:: 1 if paired else -1], strict=True)):
        one.config["seed"] = other.config["seed"] = str(i)
    for run in a + b:
        run.config["declared_runs"] = str(max(looks) * declared)
    for n in looks:
        arms = Arm("A", a[:n]), Arm("B", b[:n])
        found = arms[1].target_status()[0] if verdict == "PASS" else compare(*arms).verdict
        if found == verdict:
            return True
    return False


def share(rng, comparisons: int, design: tuple, noise, column: tuple) -> float:
    return sum(claims(rng, design, noise, column) for _ in range(comparisons)) / comparisons


def main() -> int:
    parser = flag_parser(__doc__)
    parser.add_argument("--comparisons", type=int, default=2000, help="of each kind (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.comparisons < 1 or args.seed < 0:
        parser.error("--comparisons must be at least 1, --seed at least 0")
    print(f"{args.comparisons} simulated comparisons a figure, seed {args.seed}; the first four "
          "columns are false verdicts, the others true ones")  # fmt: skip
    print(f"{'design':<19}{'noise':<14}" + "".join(f"{name:>13}" for name in COLUMNS))
    for design, noise in product(DESIGNS, NOISES):
        figures = []
        for i, column in enumerate(COLUMNS.values()):
            place = list(DESIGNS).index(design), list(NOISES).index(noise), i
            rng = np.random.default_rng((args.seed, *place))
            found = share(rng, args.comparisons, DESIGNS[design], NOISES[noise], column)
            figures.append(f"{found:13.2%}")
        print(f"{design:<19}{noise:<14}" + "".join(figures), flush=True)
    return 0


if __name__ == "__main__":
    finish(main)
