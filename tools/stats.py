"""The statistics of a comparison, all of them scipy's; the thresholds stand here and nowhere else.

Why these tests, and what they cost, is measured by tools/simulate.py.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

ALPHA_DECLARED = 0.01  # significance where the number of runs was declared before the first
ALPHA_LOOK = 0.003  # of each look, where one may stop early; 0.004 would let 1.07% through
LOOKS = (5, 10, 20)  # runs an arm after which one may look
FLOOR = 0.002  # a relative difference of times below this is no gain, however significant
LOSS_MARGIN = 0.002  # nats per token: what counts as the same loss
OUTLIER_MADS = 5.0
DRIFT_P = 0.01
POWER = 0.9  # of the runs that `runs_needed` asks for


@dataclass(frozen=True)
class Difference:
    """Of B against A: relative for times (in logs), absolute for losses."""

    change: float
    low: float  # 95% confidence interval
    high: float
    p: float  # two-sided t-test: of the pairs' differences, or Welch's


NO_DIFFERENCE = Difference(math.nan, -math.inf, math.inf, 1.0)


def alpha(n_a: int, n_b: int, declared: int) -> float:
    """The p below which a difference counts: the declared test, or one of the allowed looks."""
    return ALPHA_DECLARED if declared and n_a == n_b == declared else ALPHA_LOOK


def absolute(a: np.ndarray, b: np.ndarray, paired: bool = False) -> Difference:
    """Mean of b minus mean of a, by the t-test of b[k] - a[k] if paired, else by Welch's."""
    if min(len(a), len(b)) < 2:
        return NO_DIFFERENCE
    change = b.mean() - a.mean()
    spread = (b - a).std() if paired else a.std() + b.std()
    if spread <= 1e-12 * abs(a.mean()):  # every run, or pair, repeats every digit
        return Difference(change, change, change, float(change == 0))
    test = t_test(a, b, paired)
    interval = test.confidence_interval(0.95)
    return Difference(change, interval.low, interval.high, test.pvalue)


def t_test(a: np.ndarray, b: np.ndarray, paired: bool, alternative: str = "two-sided"):
    if paired:
        return stats.ttest_rel(b, a, alternative=alternative)
    return stats.ttest_ind(b, a, equal_var=False, alternative=alternative)


def relative(a: np.ndarray, b: np.ndarray, paired: bool = False) -> Difference:
    """Ratio of the geometric means of b and a, minus 1; the test is that of the logarithms."""
    logs = absolute(np.log(a), np.log(b), paired)
    if logs == NO_DIFFERENCE:
        return NO_DIFFERENCE
    change, low, high = (min(x, 700) for x in (logs.change, logs.low, logs.high))
    return Difference(math.expm1(change), math.expm1(low), math.expm1(high), logs.p)


def time_verdict(time: Difference, level: float) -> str:
    """faster, slower, equivalent or unclear, of B against A."""
    if time.p < level and abs(time.change) > FLOOR:
        return "faster" if time.change < 0 else "slower"
    if -FLOOR < time.low and time.high < FLOOR:
        return "equivalent"
    return "unclear"


def target_p(losses: np.ndarray, target: float, side: str = "less") -> float:
    """p of the claim that the mean loss is less, or greater, than target; 1 of equal losses."""
    if len(losses) < 2 or losses.std() <= 1e-12:
        return 1.0
    return stats.ttest_1samp(losses, target, alternative=side).pvalue


def not_worse(a: np.ndarray, b: np.ndarray, paired: bool = False) -> float:
    """p of the claim that b's mean loss exceeds a's by less than LOSS_MARGIN (non-inferiority)."""
    if min(len(a), len(b)) < 2:
        return 1.0
    if ((b - a).std() if paired else a.std() + b.std()) == 0:
        return 1.0 - float(b.mean() - a.mean() < LOSS_MARGIN)
    return t_test(a, b - LOSS_MARGIN, paired, "less").pvalue


def runs_needed(
    sd: float, difference: float, level: float = ALPHA_DECLARED, paired: bool = False
) -> int:
    """Runs an arm after which a true difference is found with POWER, at two-sided level."""
    if not 0 < sd < math.inf or not difference:
        return 0

    def enough(n: float) -> float:
        freedom = (n - 1) * (1 if paired else 2)
        t = stats.t.isf(level / 2, freedom) + stats.t.isf(1 - POWER, freedom)
        return 2 * (t * sd / difference) ** 2

    n = max(3, math.ceil(enough(math.inf)))
    while n < enough(n):
        n += 1
    return n


def sd(values: np.ndarray) -> float:
    """Sample standard deviation; nan of fewer than two values."""
    return float(values.std(ddof=1)) if len(values) > 1 else math.nan


def noise(a: np.ndarray, b: np.ndarray, paired: bool = False) -> float:
    """Standard deviation of one run as the test meets it: within samples, or left within pairs."""
    return (sd(b - a) if paired else math.hypot(sd(a), sd(b))) / math.sqrt(2)


def outliers(values: np.ndarray) -> list[tuple[int, float]]:
    """(index, distance from the median in scaled median absolute deviations) of what lies far."""
    if len(values) < 4:
        return []
    deviation = np.abs(values - np.median(values))
    scale = 1.4826 * np.median(deviation)
    return [(i, d / scale) for i, d in enumerate(deviation) if scale and d > OUTLIER_MADS * scale]


def drift(values: np.ndarray) -> float:
    """p of Spearman's rank correlation of values with the order in which they came."""
    if len(values) < 5 or np.ptp(values) == 0:
        return 1.0
    return stats.spearmanr(np.arange(len(values)), values).pvalue


def is_interleaved(arms: str) -> bool:
    """Whether a sequence of runs such as ABBAAB mixes its arms well enough to cancel a drift.

    The mean positions of the two arms may differ by at most an eighth of the number of runs; a
    drift that is linear in time then cancels to within an eighth of its whole size.
    """
    places = {arm: np.flatnonzero([x == arm for x in arms]) for arm in set(arms)}
    if len(places) < 2:
        return False
    a, b = (where.mean() for where in places.values())
    return abs(a - b) <= max(1.0, len(arms) / 8)
