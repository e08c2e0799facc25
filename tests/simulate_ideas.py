#!/usr/bin/env python3
"""A study: how many pairs `race.py --until-decided` takes, and what campaigns of ideas keep.

1. Pairs until a race is decided, by true gain, beside what 10 declared pairs find.
2. What a campaign of 100 ideas (tools/ideas.py) keeps: of ideas without effect, and of ideas whose
   true gains are normal with mean -1% and sd 1%; and what the kept gains add up to in truth.

Noise within pairs is normal here; tests/simulate.py has the false verdicts under other noises.
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


def pairs_needed(rng, races: int) -> None:
    print("pairs until decided, share called FASTER; and share that 10 declared pairs would find")
    for sd in (0.01, 0.02):
        for gain in (0, 0.01, 0.02, 0.05, 0.1):
            x = sd * rng.standard_normal((races, PAIRS)) - gain
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
        x = sd * rng.standard_normal((count * ideas, PAIRS)) + effects.reshape(-1, 1)
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
    pairs_needed(rng, args.races)
    campaigns(rng, args.races // 100)
    return 0


if __name__ == "__main__":
    finish(main)
