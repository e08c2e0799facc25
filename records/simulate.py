#!/usr/bin/env python3
"""How often do the rules of stats.py cry wolf? Simulated comparisons of an attempt with itself.

Every run's time is drawn from one log-normal distribution, so each verdict FASTER is false. The
spread is large against the floor of 0.2%, which makes the floor useless: the worst case. The
target is tested on losses whose true mean lies exactly on it.
"""

import argparse

import numpy as np
import stats
from attempts import interleaved
from tool import finish

LOSS, LOSS_SD = 3.28, 0.0014  # sd: pooled over 845 public logs


def times(rng, count: int, sd: float, drift: float) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of count runs of A and of B, interleaved, on a host that slows down by drift."""
    order = np.array([arm for arm, _ in interleaved(2, count)])
    logs = sd * rng.standard_normal(2 * count) + drift * np.linspace(0, 1, 2 * count)
    return tuple(80 * np.exp(logs[order == arm]) for arm in (0, 1))


def is_faster(a: np.ndarray, b: np.ndarray, level: float) -> bool:
    return stats.time_verdict(stats.relative(a, b), level) == "faster"


def declared(rng, count: int, sd: float, drift: float) -> bool:
    return is_faster(*times(rng, count, sd, drift), stats.alpha(count, count, count))


def peeking(rng, looks: tuple[int, ...], level: float, sd: float) -> bool:
    """Whether any look at the first n runs says FASTER; one stops at the first that does."""
    a, b = times(rng, max(looks), sd, 0.0)
    return any(is_faster(a[:n], b[:n], level) for n in looks)


def target_peeking(rng, looks: tuple[int, ...], level: float) -> bool:
    losses = LOSS + LOSS_SD * rng.standard_normal(max(looks))
    return any(stats.below_target(losses[:n], LOSS) < level for n in looks)


def best_of(rng, kept: int, count: int) -> bool:
    """The target's test on the best kept of count runs, which is not allowed."""
    losses = np.sort(LOSS + LOSS_SD * rng.standard_normal(count))[:kept]
    return stats.below_target(losses, LOSS) < stats.ALPHA_DECLARED


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comparisons", type=int, default=2000, help="of each kind (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.comparisons < 1 or args.seed < 0:
        parser.error("--comparisons must be at least 1, --seed at least 0")
    one, look = stats.ALPHA_DECLARED, stats.ALPHA_LOOK
    looks, every = " ".join(map(str, stats.LOOKS)), tuple(range(3, 21))
    allowed = {
        "time: 5 runs an arm, declared": lambda r: declared(r, 5, 0.05, 0.0),
        "time: 10 runs an arm, declared": lambda r: declared(r, 10, 0.05, 0.0),
        "time: 10, host slows down by 20%": lambda r: declared(r, 10, 0.02, 0.2),
        "time: 10, spread below the floor": lambda r: declared(r, 10, 0.001, 0.0),
        f"time: looks at {looks}": lambda r: peeking(r, stats.LOOKS, look, 0.05),
        "target: 10 runs, declared": lambda r: target_peeking(r, (10,), one),
        f"target: looks at {looks}": lambda r: target_peeking(r, stats.LOOKS, look),
    }
    forbidden = {
        "time: a look after each of 3 to 20": lambda r: peeking(r, every, one, 0.05),
        "target: a look after each of 3 to 20": lambda r: target_peeking(r, every, one),
        "target: best 8 of 10": lambda r: best_of(r, 8, 10),
    }
    print(f"{args.comparisons} simulated comparisons each, seed {args.seed}; share of false claims")
    for i, (name, trial) in enumerate((allowed | forbidden).items()):
        rng = np.random.default_rng((args.seed, i))
        share = np.mean([trial(rng) for _ in range(args.comparisons)])
        print(f"{'allowed' if name in allowed else 'not allowed':<12}{name:<40}{share:7.2%}")
    return 0


if __name__ == "__main__":
    finish(main)
