"""The tests and thresholds of a comparison; tests/simulate.py measures how often they err."""

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from scipy import special

from referee.sources import sha256_of

ALPHA_DECLARED = 0.01  # significance where the number of runs was declared before the first
ALPHA_LOOK = 0.0013  # where one may look after each pair from MIN_RUNS on, and stop: the same level
# at each look (Pocock, Biometrika 64, 1977), here of t-tests. By simulation it lets 0.5% of equal
# arms through as faster, and 1% of losses on the target.
MOST_LOOKS = 20  # runs per arm
CONFIDENCE_LOOK = 0.9922  # of each look's interval: 95% of all looks together hold the truth, as in
# the repeated confidence intervals of Jennison and Turnbull (J. R. Stat. Soc. B 51, 1989)
FLOOR = 0.002  # a smaller relative difference of times is no gain, however significant
LOSS_MARGIN = 0.002  # nats per token: what counts as the same loss
BY_HAND = "order by hand"  # any but the one that race.py draws
MIN_RUNS, RECORD_RUNS = 3, 5  # fewer show no spread; fewer are no record
# What rare bad seeds may add to a mean that no run shows: one of 20 runs worse by 0.02 adds 0.001.
HIDDEN_LOSS, HIDDEN_SDS = 0.001, 0.8  # nats per token, or so many sd if that is more
OUTLIER_P = 0.01  # share of normal samples in which a run is called an outlier
POWER = 0.9  # of the runs that `runs_needed` asks for


@dataclass(frozen=True)
class Difference:
    """Of B against A: relative for times (in logs), absolute for losses."""

    change: float
    low: float  # 95% confidence interval; after a look, one that holds at all looks together
    high: float
    p: float  # two-sided t-test: of the pairs' differences, or Welch's


NO_DIFFERENCE = Difference(math.nan, -math.inf, math.inf, 1.0)


def alpha(n_a: int, n_b: int, declared: int) -> float:
    """The p below which a difference counts: the declared test, or one of the allowed looks."""
    return ALPHA_DECLARED if declared and n_a == n_b == declared else ALPHA_LOOK


def absolute(
    a: np.ndarray, b: np.ndarray, paired: bool = False, level: float = ALPHA_DECLARED
) -> Difference:
    """Mean of b minus mean of a, by the t-test of b[k] - a[k] if paired, else by Welch's.

    p is 1 if fewer than MIN_RUNS per arm, or equal digits, show no spread.
    """
    if min(len(a), len(b)) < MIN_RUNS:
        return NO_DIFFERENCE
    change = b.mean() - a.mean()
    if repeats(a, b, paired):
        return replace(NO_DIFFERENCE, change=change)
    error, freedom = error_of(a, b, paired)
    confidence = CONFIDENCE_LOOK if level == ALPHA_LOOK else 0.95
    half = special.stdtrit(freedom, (1 + confidence) / 2) * error
    p = 2 * special.stdtr(freedom, -abs(change) / error)
    return Difference(change, change - half, change + half, p)


def repeats(a: np.ndarray, b: np.ndarray, paired: bool) -> bool:
    """Whether all pairs have one difference, or all runs of each arm one value."""
    spread = (b - a).std() if paired else a.std() + b.std()
    return spread <= 1e-12 * abs(a.mean())


def error_of(a: np.ndarray, b: np.ndarray, paired: bool) -> tuple[float, float]:
    """(standard error of b's mean minus a's, degrees of freedom), of pairs or by Welch's test."""
    if paired:
        return sd(b - a) / math.sqrt(len(a)), len(a) - 1
    variances = [sd(x) ** 2 / len(x) for x in (a, b)]
    of_each = (variance**2 / (len(x) - 1) for variance, x in zip(variances, (a, b), strict=True))
    return math.sqrt(sum(variances)), sum(variances) ** 2 / sum(of_each)


def relative(
    a: np.ndarray, b: np.ndarray, paired: bool = False, level: float = ALPHA_DECLARED
) -> Difference:
    """Ratio of the geometric means of b and a, minus 1; the test is that of the logarithms."""
    logs = absolute(np.log(a), np.log(b), paired, level)
    if not math.isfinite(logs.low):
        return replace(logs, change=math.expm1(logs.change))
    change, low, high = (min(x, 700) for x in (logs.change, logs.low, logs.high))
    return Difference(math.expm1(change), math.expm1(low), math.expm1(high), logs.p)


def time_verdict(a: np.ndarray, b: np.ndarray, level: float, paired: bool) -> str:
    """faster, slower, equivalent or unclear, of b against a; equivalent by two one-sided tests."""
    time, logs = relative(a, b, paired), (np.log(a), np.log(b))
    if not abs(time.change) < FLOOR:
        found = "faster" if time.change < 0 else "slower"
        return found if time.p < level else "unclear"
    sides = (below(*x, FLOOR, paired) for x in (logs, logs[::-1]))
    return "equivalent" if max(sides) < level else "unclear"


def mean_below(values: np.ndarray, limit: float) -> float:
    """p of the claim that the mean lies below limit, by the t-test; 1 where nothing varies."""
    if len(values) < MIN_RUNS or values.std() <= 1e-12:
        return 1.0
    return special.stdtr(len(values) - 1, (values.mean() - limit) / sd(values) * len(values) ** 0.5)


def target_p(losses: np.ndarray, target: float) -> float:
    """p of the claim that the mean loss is below target, with room for seeds that did not show."""
    if len(losses) < RECORD_RUNS:
        return 1.0
    return mean_below(losses + max(HIDDEN_LOSS, HIDDEN_SDS * sd(losses)), target)


def missed_p(losses: np.ndarray, target: float) -> float:
    """p of the claim that the mean loss is above target."""
    return mean_below(-losses, -target)


def below(a: np.ndarray, b: np.ndarray, margin: float, paired: bool) -> float:
    """p of the claim that b's mean exceeds a's by less than margin; 1 where nothing varies."""
    if min(len(a), len(b)) < MIN_RUNS or repeats(a, b, paired):
        return 1.0
    error, freedom = error_of(a, b, paired)
    return special.stdtr(freedom, (b.mean() - margin - a.mean()) / error)


def not_worse(a: np.ndarray, b: np.ndarray, paired: bool = False) -> float:
    """p of the claim that b's mean loss exceeds a's by less than LOSS_MARGIN (non-inferiority)."""
    if paired and len(a) >= MIN_RUNS and (a == b).all():
        return 0.0  # digit for digit, as a rewrite of the same arithmetic gives it
    return below(a, b, LOSS_MARGIN, paired)


def runs_needed(
    sd: float, difference: float, level: float = ALPHA_DECLARED, paired: bool = False
) -> int:
    """Runs per arm that find a true difference with POWER, at two-sided level."""
    if not 0 < sd < math.inf or not difference:
        return 0

    def enough(n: float) -> float:
        freedom = (n - 1) * (1 if paired else 2)
        t = special.stdtrit(freedom, 1 - level / 2) + special.stdtrit(freedom, POWER)
        return 2 * (t * sd / difference) ** 2

    n = max(3, math.ceil(enough(1e9)))
    while n < enough(n):
        n += 1
    return n


def sd(values: np.ndarray) -> float:
    """Sample standard deviation; nan of fewer than two values."""
    return float(values.std(ddof=1)) if len(values) > 1 else math.nan


def noise(a: np.ndarray, b: np.ndarray, paired: bool = False) -> float:
    """Standard deviation of one run as the test meets it: within samples, or left within pairs."""
    return (sd(b - a) if paired else math.hypot(sd(a), sd(b))) / math.sqrt(2)


def outlier(values: np.ndarray) -> tuple[int, float] | None:
    """(index, relative distance from the mean of the others) of what Grubbs' test finds."""
    n = len(values)
    if n < 4 or np.ptp(values) == 0:
        return None
    distances = np.abs(values - values.mean()) / values.std(ddof=1)
    t = -special.stdtrit(n - 2, OUTLIER_P / (2 * n))
    far = int(distances.argmax())
    share = values[far] / np.delete(values, far).mean() - 1
    found = distances[far] > (n - 1) / math.sqrt(n) * math.sqrt(t**2 / (n - 2 + t**2))
    return (far, share) if found and abs(share) > FLOOR else None


def order_seed(attempts: list[tuple[dict[str, str], list[str]]]) -> str:
    """What the order of a race is drawn with, of each attempt's source and flags.

    Logs hold both, so that anyone can draw the order again.
    """
    return sha256_of(json.dumps(attempts, sort_keys=True))[:8]


def draw_order(count: int, rounds: int, seed: str) -> Iterator[tuple[int, int]]:
    """(arm, round), each arm once per round, in random order; more rounds begin the same.

    Of each four rounds two are drawn, and the other two are these reversed. So a linear drift
    cancels, and a disturbance in every other round does not always meet the same arm, as it would
    in a fixed A B B A.
    """
    rng, orders = random.Random(seed), []
    for turn in range(rounds):
        order = rng.sample(range(count), count) if turn % 4 < 2 else orders[-2][::-1]
        orders.append(order)
        yield from ((arm, turn) for arm in order)
