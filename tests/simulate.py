#!/usr/bin/env python3
"""A study: how often do the rules err, and what do they find? Simulated races, judged by diff.py.

Each line is a number of runs under one kind of noise, each figure a share of verdicts. Of times,
false: FASTER or REGRESSION of a B that needs the same time, EQUIVALENT of one whose time differs by
the floor; found: FASTER of one that needs 5% less. Of losses, false: PASS and REGRESSION of a mean
on the target, FASTER of a B that is 5% faster, but whose loss is higher by the margin, where no
target is reached; found: PASS of a mean loss 0.003 below the target.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project's root
    from referee.start import finish

import numpy as np

from tools import stats
from tools.cli import flag_parser
from tools.comparison import Arm, compare
from tools.runs import LoggedRun, Source

TARGET, LOSS_SD = 3.28, 0.0014  # sd: pooled over 845 public logs
HOST_SD = 0.05  # of the noise in log seconds, large against the floor: the worst case for FASTER
OWN_SD = 0.005  # of what each run adds to a host that wanders, steps or beats
QUIET = 0.02  # share of that noise on a host where times can be told equal


class Simulated(Arm):
    objections = ()  # which concern what ran, not chance


def normal(rng, count: int) -> np.ndarray:
    return rng.standard_normal(count)


def student(rng, count: int) -> np.ndarray:
    return rng.standard_t(2.5, count) / 5**0.5


def wandering(rng, count: int) -> np.ndarray:
    host = rng.standard_normal(count)
    for i in range(1, count):
        host[i] = 0.9 * host[i - 1] + 0.19**0.5 * host[i]
    return host + OWN_SD / HOST_SD * rng.standard_normal(count)


def beating(rng, count: int) -> np.ndarray:
    """Slow, fast, fast, slow ... from a phase that is drawn: a fixed A B B A would meet it."""
    beat = np.resize(np.roll([1, -1, -1, 1], rng.integers(4)), count)
    return beat + OWN_SD / HOST_SD * rng.standard_normal(count)


def stepping(rng, count: int) -> np.ndarray:
    """A host that slows down once, by four sd."""
    step = 4.0 * (np.arange(count) >= rng.integers(count))
    return step + OWN_SD / HOST_SD * rng.standard_normal(count)


def outlying(rng, count: int) -> np.ndarray:
    return rng.standard_normal(count) + 10 * (rng.random(count) < 0.05)


def lognormal(rng, count: int) -> np.ndarray:
    variance = np.exp(0.64) * (np.exp(0.64) - 1)
    return (rng.lognormal(0, 0.8, count) - np.exp(0.32)) / variance**0.5


def rare(rng, count: int) -> np.ndarray:
    """One of 20 seeds is worse by 0.02."""
    return rng.standard_normal(count) + 0.02 / LOSS_SD * ((rng.random(count) < 0.05) - 0.05)


DESIGNS = {"3 pairs": (3,), "5 pairs": (5,), "10 pairs": (10,), "20 pairs": (20,),
           "looks": tuple(range(stats.MIN_RUNS, stats.MOST_LOOKS + 1))}  # fmt: skip
# kind of noise: of the host, of losses; races: (verdicts counted, share of the host's noise, B's
# gain, A's loss above the target, B's beyond A's)
TIMES = (
    {"normal": normal, "t, 2.5 degrees": student, "AR(1), 0.9": wandering, "period of 4": beating,
     "step": stepping, "outliers": outlying},
    [(("FASTER", "REGRESSION"), 1, 0, -0.004, 0), (("EQUIVALENT",), QUIET, stats.FLOOR, -0.004, 0),
     (("FASTER",), 1, 0.05, -0.004, 0)],
    ("FASTER", "REGRESSION", "EQUIV.", "FASTER 5%"),
)  # fmt: skip
LOSSES = (
    {"normal": normal, "t, 2.5 degrees": student, "lognormal, 0.8": lognormal, "1 of 20 bad": rare},
    [(("PASS", "REGRESSION"), QUIET, 0, 0, 0), (("FASTER",), QUIET, 0.05, 0.1, stats.LOSS_MARGIN),
     (("PASS",), QUIET, 0, -0.003, 0)],
    ("PASS", "REGRESSION", "FASTER", "PASS 0.003"),
)  # fmt: skip


def race(rng, count: int, declared: int, noises, truth: tuple) -> tuple[list, list]:
    """Runs of A and of B as logs would tell of them, in the order of race.py."""
    share, gain, loss, loss_up = truth
    texts = [{"train_gpt.py": str(rng.integers(1 << 40))} for _ in "AB"]
    order = [*stats.draw_order(2, count, stats.order_seed([(text, []) for text in texts]))]
    is_b = np.array([arm for arm, _ in order])
    seconds = 80 * np.exp(share * HOST_SD * noises[0](rng, 2 * count) + np.log1p(-gain) * is_b)
    losses = TARGET + loss + loss_up * is_b + LOSS_SD * noises[1](rng, 2 * count)
    arms = [], []
    for i, ((arm, seed), s, x) in enumerate(zip(order, seconds, losses, strict=True)):
        sources = {path: Source("", text) for path, text in texts[arm].items()}
        config = {"utc": f"2026-01-01T{i:04}", "target_val_loss": str(TARGET), "seed": str(seed),
                  "run": str(i), "declared_runs": str(declared)}  # fmt: skip
        arms[arm].append(LoggedRun(Path(str(i)), config=config, sources=sources,
            val_curve=[(0, 0.0, 10.8), (1, 1000 * s, x)], environment={"host": "h"},
            result={"status": "success"}))  # fmt: skip
    return arms


def claims(rng, looks: tuple, noises, truth: tuple) -> set[str]:
    """The verdicts on one simulated race; one may stop at any look, so those of each count."""
    a, b = race(rng, max(looks), looks[0] if len(looks) == 1 else 0, noises, truth)
    arms = [(Simulated("A", a[:n]), Simulated("B", b[:n])) for n in looks]
    return {said for pair in arms for said in (compare(*pair).verdict, pair[1].target_status()[0])}


def main() -> int:
    parser = flag_parser(__doc__)
    parser.add_argument("--races", type=int, default=2000, help="per figure (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.races < 1 or args.seed < 0:
        parser.error("--races must be at least 1, --seed at least 0")
    error = 3 * (0.01 * 0.99 / args.races) ** 0.5
    print(f"{args.races} races per figure, seed {args.seed}; the last column is right verdicts, "
          f"the others false ones: a true 1% shows as up to {0.01 + error:.2%}")  # fmt: skip
    for kind, (noises, truths, columns) in (("times", TIMES), ("losses", LOSSES)):
        print(f"\n{kind:<10}{'noise':<15}" + "".join(f"{name:>12}" for name in columns))
        for d, (design, looks) in enumerate(DESIGNS.items()):
            for k, (name, noise) in enumerate(noises.items()):
                pair = (noise, normal) if kind == "times" else (normal, noise)
                shares = []
                for i, (counted, *truth) in enumerate(truths):
                    rng = np.random.default_rng((args.seed, kind == "times", d, k, i))
                    found = [claims(rng, looks, pair, truth) for _ in range(args.races)]
                    shares += [sum(x in said for said in found) / args.races for x in counted]
                figures = "".join(f"{share:12.2%}" for share in shares)
                print(f"{design:<10}{name:<15}{figures}", flush=True)
    return 0


if __name__ == "__main__":
    finish(main)
