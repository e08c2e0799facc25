#!/usr/bin/env python3
"""A study: races that stop when decided, and campaigns of ideas (tools/ideas.py), simulated.

1. How often equal arms are called FASTER by `race.py --until-decided`, for each kind of noise.
2. How many pairs it takes for a true gain, beside the fixed 10 pairs.
3. What a campaign of 100 ideas keeps: of ideas without effect, and of ideas whose true gains are
   normal with mean -1% and sd 1%; and what the kept gains add up to, beside the truth.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project's root
    from referee.start import finish

import numpy as np
from scipy import stats as scipy_stats

from tools import stats
from tools.cli import flag_parser
from tools.ideas import LEAST

PAIRS = stats.MOST_LOOKS
LOOKS = np.arange(stats.MIN_RUNS, PAIRS + 1)
MEMORY = 0.9  # correlation of a wandering host's speed with that of one run before


def normal(rng, runs: tuple) -> np.ndarray:
    return rng.standard_normal(runs)


def student(rng, runs: tuple) -> np.ndarray:
    return rng.standard_t(2.5, runs)


def wandering(rng, runs: tuple) -> np.ndarray:
    steps = rng.standard_normal(runs)
    host = steps.copy()
    for i in range(1, runs[1]):
        host[:, i] = MEMORY * host[:, i - 1] + (1 - MEMORY**2) ** 0.5 * steps[:, i]
    return host + 0.1 * rng.standard_normal(runs)


def beating(rng, runs: tuple) -> np.ndarray:
    """Slow, fast, fast, slow ... from a phase that is drawn."""
    beats = np.array([np.resize(np.roll([1, -1, -1, 1], phase), runs[1]) for phase in range(4)])
    return beats[rng.integers(4, size=runs[0])] + 0.1 * rng.standard_normal(runs)


def stepping(rng, runs: tuple) -> np.ndarray:
    """Slower from the middle on."""
    return 3 * (np.arange(runs[1]) >= runs[1] // 2) + rng.standard_normal(runs)


def disturbed(rng, runs: tuple) -> np.ndarray:
    """One run in twenty takes 1.3 times as long, where noise is 1%."""
    return 26 * (rng.random(runs) < 0.05) + rng.standard_normal(runs)


NOISES = {"normal": normal, "t, 2.5 degrees": student, "AR(1), 0.9": wandering,
          "period of 4": beating,
          "step half-way": stepping, "1 in 20 × 1.3": disturbed}  # fmt: skip


def differences(rng, races: int, noise) -> np.ndarray:
    """B minus A of each pair, in the order of race.py, (races, PAIRS), with an sd of 1."""
    pairs = noise(rng, (races, 2 * PAIRS)).reshape(races, PAIRS, 2)
    orders = [list(stats.draw_order(2, PAIRS, str(rng.integers(1 << 30)))) for _ in range(500)]
    first = np.array([[arm for arm, _ in order[::2]] for order in orders])  # 0: A begins
    signs = (1 - 2 * first)[rng.integers(len(orders), size=races)]
    found = (pairs[..., 1] - pairs[..., 0]) * signs
    return found / found.std()


def until_decided(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(which races end as FASTER, pairs, the mean difference then) of pairs' log differences."""
    n = np.arange(1, PAIRS + 1)
    mean = x.cumsum(1) / n
    variance = ((x**2).cumsum(1) - n * mean**2) / np.maximum(n - 1, 1)
    mean, error = mean[:, LOOKS - 1], np.sqrt(variance / n)[:, LOOKS - 1]
    bound = scipy_stats.t.isf(stats.ALPHA_LOOK / 2, LOOKS - 1) * error
    width = scipy_stats.t.isf((1 - stats.CONFIDENCE_LOOK) / 2, LOOKS - 1) * error
    faster = mean < -bound
    decided = faster | (mean > bound) | (mean - width > -LEAST["time"])
    last = np.where(decided.any(1), decided.argmax(1), len(LOOKS) - 1)
    rows = np.arange(len(x))
    return faster[rows, last], LOOKS[last], mean[rows, last]


def false_and_found(rng, races: int) -> None:
    print(f"false FASTER of equal arms, noise of 2% per pair, {races} races")
    for name, noise in NOISES.items():
        x = differences(rng, races, noise)
        print(f"  {name:16}{until_decided(0.02 * x)[0].mean():8.2%}")
    print("pairs until decided, share called FASTER; and share that 10 declared pairs would find")
    for sd in (0.01, 0.02):
        for gain in (0, 0.01, 0.02, 0.05, 0.1):
            x = sd * differences(rng, races, normal) - gain
            faster, pairs, _ = until_decided(x)
            p = scipy_stats.ttest_1samp(x[:, :10], 0, axis=1).pvalue
            fixed = ((p < stats.ALPHA_DECLARED) & (x[:, :10].mean(1) < 0)).mean()
            print(f"  noise {sd:.0%}, gain {gain:3.0%}: {pairs.mean():5.1f} pairs, "
                  f"{faster.mean():6.1%}   10 pairs: {fixed:6.1%}")  # fmt: skip


def campaigns(rng, count: int) -> None:
    ideas, sd = 100, 0.01
    for name, effects in (
        ("no idea has an effect", np.zeros((count, ideas))),
        ("true effects -1% +- 1%", rng.normal(0.01, 0.01, (count, ideas))),
    ):
        x = sd * differences(rng, count * ideas, normal) + effects.reshape(-1, 1)
        kept, pairs, seen = (found.reshape(count, ideas) for found in until_decided(x))
        print(f"{name}: of {ideas} ideas {kept.sum(1).mean():.2f} are kept, after "
              f"{pairs.sum(1).mean():.0f} pairs; the ledger's gains add up to "
              f"{-(kept * seen).sum(1).mean():.2%}, the truth is "
              f"{-(kept * effects).sum(1).mean():.2%} (in logs)")  # fmt: skip


def main() -> int:
    parser = flag_parser(__doc__)
    parser.add_argument("--races", type=int, default=40_000, help="of each kind (%(default)s)")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    false_and_found(rng, args.races)
    campaigns(rng, args.races // 100)
    return 0


if __name__ == "__main__":
    finish(main)
