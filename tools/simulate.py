#!/usr/bin/env python3
"""How often do the rules of stats.py cry wolf, and what do they find? Simulated comparisons.

First an attempt against itself: every run's time is drawn from one log-normal distribution, so
each verdict FASTER is false. The spread is large against the floor of 0.2%, which makes the floor
useless: the worst case. The target is tested on losses whose true mean lies exactly on it. Then
against a B that truly needs 5% less time, on a host whose speed wanders.
"""

import bootstrap  # noqa: F401
import numpy as np

from tools import stats
from tools.attempts import interleaved
from tools.cli import finish, flag_parser

LOSS, LOSS_SD = 3.28, 0.0014  # sd: pooled over 845 public logs
MEMORY = 0.9  # correlation of a wandering host's speed with that of one run before


def times(rng, count: int, sd: float, drift: float = 0, wander: float = 0, gain: float = 0):
    """Seconds of count runs of A and of B, interleaved.

    sd is of each run by itself; the host slows down by drift over all of them, and its speed
    wanders about its mean with an sd of wander, of which MEMORY is left a run later. B needs less
    by gain.
    """
    order = np.array([arm for arm, _ in interleaved(2, count)])
    logs = sd * rng.standard_normal(2 * count) + drift * np.linspace(0, 1, 2 * count)
    host = rng.standard_normal(2 * count)
    for i in range(1, 2 * count):
        host[i] = MEMORY * host[i - 1] + (1 - MEMORY**2) ** 0.5 * host[i]
    logs += wander * host + np.log1p(-gain) * order
    return tuple(80 * np.exp(logs[order == arm]) for arm in (0, 1))


def is_faster(a: np.ndarray, b: np.ndarray, level: float, paired: bool) -> bool:
    return stats.time_verdict(stats.relative(a, b, paired), level) == "faster"


def declared(rng, count: int, *host: float, paired: bool = True) -> bool:
    return is_faster(*times(rng, count, *host), stats.alpha(count, count, count), paired)


def peeking(rng, looks: tuple[int, ...], level: float, sd: float, paired: bool = True) -> bool:
    """Whether any look at the first n runs says FASTER; one stops at the first that does."""
    a, b = times(rng, max(looks), sd)
    return any(is_faster(a[:n], b[:n], level, paired) for n in looks)


def target_peeking(rng, looks: tuple[int, ...], level: float) -> bool:
    losses = LOSS + LOSS_SD * rng.standard_normal(max(looks))
    return any(stats.target_p(losses[:n], LOSS) < level for n in looks)


def best_of(rng, kept: int, count: int) -> bool:
    """The target's test on the best kept of count runs, which is not allowed."""
    losses = np.sort(LOSS + LOSS_SD * rng.standard_normal(count))[:kept]
    return stats.target_p(losses, LOSS) < stats.ALPHA_DECLARED


def main() -> int:
    parser = flag_parser(__doc__)
    parser.add_argument("--comparisons", type=int, default=2000, help="of each kind (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.comparisons < 1 or args.seed < 0:
        parser.error("--comparisons must be at least 1, --seed at least 0")
    one, look = stats.ALPHA_DECLARED, stats.ALPHA_LOOK
    looks, every = " ".join(map(str, stats.LOOKS)), tuple(range(3, 21))
    drifting, wandering = (0.02, 0.2), (0.02, 0.0, 0.07)
    allowed = {
        "time: 5 pairs, declared": lambda r: declared(r, 5, 0.05),
        "time: 10 pairs, declared": lambda r: declared(r, 10, 0.05),
        "time: 10 pairs, host slows down by 20%": lambda r: declared(r, 10, *drifting),
        "time: 10 pairs, host wanders by 7%": lambda r: declared(r, 10, *wandering),
        "time: 10 pairs, spread below the floor": lambda r: declared(r, 10, 0.001),
        f"time: looks at {looks} pairs": lambda r: peeking(r, stats.LOOKS, look, 0.05),
        "time: 10 runs an arm, not in pairs": lambda r: declared(r, 10, 0.05, paired=False),
        "target: 10 runs, declared": lambda r: target_peeking(r, (10,), one),
        f"target: looks at {looks}": lambda r: target_peeking(r, stats.LOOKS, look),
    }
    forbidden = {
        "time: a look after each of 3 to 20 pairs": lambda r: peeking(r, every, one, 0.05),
        "target: a look after each of 3 to 20": lambda r: target_peeking(r, every, one),
        "target: best 8 of 10": lambda r: best_of(r, 8, 10),
    }
    gains = {
        f"{how} {n}, {kind}": lambda r, n=n, host=host, paired=paired: declared(
            r, n, *host, 0.05, paired=paired)
        for kind, host in (("host wanders by 7%", wandering), ("host is steady", (0.02, 0.0, 0.0)))
        for n in (5, 10)
        for how, paired in (("pairs:", True), ("runs an arm, not in pairs:", False))
    }  # fmt: skip
    kinds = {"allowed": allowed, "not allowed": forbidden, "true 5%": gains}
    print(f"{args.comparisons} simulated comparisons each, seed {args.seed}; share of verdicts "
          "FASTER, false but for the last")  # fmt: skip
    trials = [(kind, name, trial) for kind in kinds for name, trial in kinds[kind].items()]
    for i, (kind, name, trial) in enumerate(trials):
        rng = np.random.default_rng((args.seed, i))
        share = np.mean([trial(rng) for _ in range(args.comparisons)])
        print(f"{kind:<12}{name:<50}{share:7.2%}")
    return 0


if __name__ == "__main__":
    finish(main)
