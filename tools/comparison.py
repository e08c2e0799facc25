"""What two sets of runs say about each other: the verdict, its reasons and its warnings.

The rules, in one place: raw seconds are compared on one host only, in interleaved order;
a run that did not finish counts; the target is a test, not a minimum; what is faster has reached
the target, or lost nothing. Thresholds are in stats.py, traces of forged logs in audit.py.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tools import audit, stats
from tools.runs import (
    InvalidLog,
    LoggedRun,
    config_changes,
    environment_changes,
    read_arm,
    source_changes,
    task_changes,
)

TARGET_RANKS = {"unknown": 0, "FAIL": 0, "open": 1, "PASS": 2}
EXIT_CODES = {"FASTER": 0, "EQUIVALENT": 0, "REGRESSION": 1, "NOT COMPARABLE": 3,
              "INCONCLUSIVE": 5}  # fmt: skip
VOLATILE = {"temperature.gpu", "clocks.sm", "clocks.mem", "gpu_processes"}
RACE = "./run.sh tools/race.py A B -n 10"
UNKNOWN_REFEREE = "not in this repository's history: read it; in a fork of your own, commit it"
SLOWDOWN = 0.10  # change of a calibration within a run that is worth a warning


def repeated(values) -> list:
    return [value for value, count in Counter(values).items() if count > 1]


def summed_up(doubts: list[str]) -> list[str]:
    """The first of many doubts, which all mean the same: read the logs."""
    more = f", and {len(doubts) - 1} more, which tools/validate.py names"
    return [doubts[0] + (more if len(doubts) > 1 else "")] if doubts else []


class Arm:
    """All runs of one attempt, in the order in which they began."""

    def __init__(self, name: str, runs: list[LoggedRun], target: float = math.nan):
        self.name, self.runs = name, runs
        self.finished = [run for run in runs if run.finished]
        self.traces: list[str] = []  # doubts that do not show in the figures
        own_target = runs[0].target
        self.target = target if math.isnan(own_target) else own_target
        self.level = stats.alpha(len(runs), len(runs), self.declared)

    @classmethod
    def read(cls, path: Path, target: float = math.nan, name: str = "") -> "Arm":
        """An attempt's logs, and what they show of having been forged."""
        path = path.resolve()
        folder = path.parent if path.name == "logs" else path
        name = name or (folder.name if folder.is_dir() else path.stem)
        arm = cls(name, read_arm(path), target)
        sound = [run for run in arm.runs if not run.faults]
        of_one = [f"{run.name}: {what}" for run in sound for what in audit.traces(run)]
        arm.traces = summed_up([*of_one, *audit.traces_between(sound)])
        return arm

    def require_sound(self) -> None:
        """Raise InvalidLog for the first fault of any log, or a log that is there twice."""
        for run in self.runs:
            if run.faults:
                raise InvalidLog(run.path, *run.faults[0])
        if names := repeated(run.name for run in self.runs):
            raise InvalidLog(self.runs[0].path.parent, 0, f"{names[0]} is there more than once")

    def values(self, figure) -> np.ndarray:
        """A figure of every finished run."""
        return np.array([figure(run) for run in self.finished], float)

    @property
    def times(self) -> np.ndarray:
        return self.values(lambda run: run.train_s)

    @property
    def losses(self) -> np.ndarray:
        return self.values(lambda run: run.val_loss)

    @property
    def declared(self) -> int:
        """Runs that every log says were declared before the first; 0 if they do not agree."""
        said = {int(run.config.get("declared_runs", 0)) for run in self.runs}
        return said.pop() if len(said) == 1 else 0

    @property
    def unfinished(self) -> Counter:
        return Counter(r.result.get("status", "killed") for r in self.runs if not r.finished)

    @property
    def doubts(self) -> list[str]:
        """Why these runs prove no gain, however their figures look."""
        found, n = list(self.traces), len(self.runs)
        if self.declared not in (0, n):
            found.append(f"{self.declared} runs were declared, {n} are there")
        if not self.declared and n not in stats.LOOKS:
            found.append(f"{n} runs, not declared before the first; without that the allowed looks "
                         f"are n = {', '.join(map(str, stats.LOOKS))}")  # fmt: skip
        seeds = [run.seed for run in self.runs if not run.is_public]
        if twice := repeated(seeds):
            found.append(f"seed {', '.join(twice)} ran more than once")
        elif len(seeds) > 1 and set(seeds) != set(map(str, range(n))):
            found.append(f"the seeds are not 0 to {n - 1}: some may have been left out")
        if resumed := sum(run.number("resumed_from") > 0 for run in self.runs):
            found.append(f"{resumed} of {n} runs were resumed: a checkpoint told their time")
        return found

    def mixture(self) -> list[str]:
        """In what its runs differ that should be one source, configuration, task and class."""
        first, found = self.runs[0], set()
        for run in self.runs[1:]:
            found |= source_changes(first, run).keys() | config_changes(first, run).keys()
            found |= task_changes(first, run).keys()
            found |= {"class"} if run.machine_class != first.machine_class else set()
        return sorted(found)

    def reaches_target(self) -> bool:
        """Whether the mean loss is shown to lie below the target; every run must have finished."""
        return not self.unfinished and stats.target_p(self.losses, self.target) < self.level

    def target_status(self) -> tuple[str, float]:
        """(PASS, FAIL, open or unknown; p of the claim that the mean loss is below target)."""
        if math.isnan(self.target):
            return "unknown", math.nan
        p = stats.target_p(self.losses, self.target)
        if self.unfinished or not len(self.losses) or self.losses.mean() > self.target:
            return "FAIL", p
        return ("PASS" if p < self.level and not self.doubts else "open"), p


@dataclass
class Comparison:
    """B against A."""

    a: Arm
    b: Arm
    trust: bool = False  # that both ran on one host, interleaved, though the logs do not say so
    verdict: str = "INCONCLUSIVE"
    reason: str = ""
    time: stats.Difference = stats.NO_DIFFERENCE
    loss: stats.Difference = stats.NO_DIFFERENCE

    @property
    def warnings(self) -> list[str]:
        return warnings(self)

    @property
    def next_steps(self) -> list[str]:
        return next_steps(self)

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.verdict]

    @property
    def level(self) -> float:
        """The p below which a difference of the arms counts."""
        declared = self.a.declared if self.a.declared == self.b.declared else 0
        return stats.alpha(len(self.a.runs), len(self.b.runs), declared)

    @property
    def arms(self) -> tuple[tuple[str, Arm], ...]:
        return ("A", self.a), ("B", self.b)

    @property
    def times_comparable(self) -> bool:
        return self.verdict != "NOT COMPARABLE"

    @property
    def in_order(self) -> list[tuple[str, LoggedRun]]:
        """(A or B, run) of every run, in the order in which they began."""
        runs = [(letter, run) for letter, arm in self.arms for run in arm.runs]
        return sorted(runs, key=lambda pair: pair[1].started)

    @property
    def order(self) -> str:
        """Such as ABBA; empty where the logs do not tell."""
        return "".join(letter for letter, run in self.in_order if "utc" in run.config)

    @property
    def in_pairs(self) -> bool:
        """Whether each two runs in a row are one of either arm, with one seed, both finished.

        So race.py runs them. What the two share, such as the state of the host and
        the order of the data, cancels in their difference. A drift within the pairs cancels only
        between them, so either arm must be the first of as many pairs, but for one or two.
        """
        runs = self.in_order
        if len(self.order) < len(runs) or len(self.a.runs) != len(self.b.runs):
            return False
        pairs = list(zip(runs[::2], runs[1::2], strict=True))
        first = [x for (x, _), _ in pairs]
        return abs(first.count("A") - first.count("B")) <= 2 and all(
            x != y and one.seed == other.seed and one.finished and other.finished
            for (x, one), (y, other) in pairs
        )

    @property
    def interleaved(self) -> bool:
        return self.trust or stats.is_interleaved(self.order)

    @property
    def doubts(self) -> list[str]:
        """Why these arms prove no gain, however their figures look."""
        found = [f"{x}: {doubt}" for x, arm in self.arms for doubt in arm.doubts]
        referees = [audit.unknown_referees(arm.runs[0]) for _, arm in self.arms]
        if referees[0] != referees[1]:
            found.append(f"A and B had different referees, one {UNKNOWN_REFEREE}")
        return found + summed_up(audit.overlaps([*self.a.runs, *self.b.runs]))

    @property
    def keeps_the_loss(self) -> bool:
        """Whether B reaches the target, or is at least not worse than A, there and in its loss."""
        a_target, b_target = (TARGET_RANKS[arm.target_status()[0]] for _, arm in self.arms)
        p = stats.not_worse(self.a.losses, self.b.losses, self.in_pairs)
        return b_target == TARGET_RANKS["PASS"] or b_target >= a_target and p < self.level

    @property
    def noise(self) -> tuple[float, float]:
        """Standard deviations of one run's log time and of its loss, as the tests meet them."""
        samples = ((np.log(self.a.times), np.log(self.b.times)), (self.a.losses, self.b.losses))
        return tuple(stats.noise(a, b, self.in_pairs) for a, b in samples)


def compare(a: Arm, b: Arm, trust: bool = False) -> Comparison:
    """trust: take it as given that both arms ran on one host, interleaved.

    InvalidLog if a log of either is not sound.
    """
    for arm in (a, b):
        arm.require_sound()
    result = Comparison(a, b, trust)
    result.loss = stats.absolute(a.losses, b.losses, result.in_pairs)
    if obstacles := what_forbids_comparing(a, b, trust):
        result.verdict, result.reason = "NOT COMPARABLE", "; ".join(obstacles)
    else:
        result.time = stats.relative(a.times, b.times, result.in_pairs)
        result.verdict, result.reason = judge(result)
    return result


def what_forbids_comparing(a: Arm, b: Arm, trust: bool) -> list[str]:
    reasons = []
    for letter, arm in (("A", a), ("B", b)):
        if mixture := arm.mixture():
            reasons.append(f"{letter} mixes runs that differ in {', '.join(mixture)}")
    if {r.name for r in a.runs} & {r.name for r in b.runs}:
        reasons.append("A and B share runs")
    for name, (x, y) in task_changes(a.runs[0], b.runs[0]).items():
        reasons.append(f"different tasks, {name} {x} and {y}")
    if a.target != b.target and not (math.isnan(a.target) and math.isnan(b.target)):
        reasons.append(f"different targets, {a.target} and {b.target}")
    # One source may multiply in bf16 where an older one did not: a race on one host may tell.
    classes = [{(r.machine, r.turn_steps) for r in arm.runs} for arm in (a, b)]
    if classes[0] != classes[1]:
        names = [" and ".join(sorted({r.machine_class for r in arm.runs})) for arm in (a, b)]
        reasons.append(f"different classes, {names[0]} and {names[1]}")
    elif not trust:
        hosts = {r.host for arm in (a, b) for r in arm.runs}
        if "unknown" in hosts:
            reasons.append("the logs do not name their host; if it is one, add --same_host")
        elif len(hosts) > 1:
            reasons.append("different hosts")
    return reasons


def judge(c: Comparison) -> tuple[str, str]:
    """(verdict, its reason) of two comparable arms."""
    speed = stats.time_verdict(c.a.times, c.b.times, c.level, c.in_pairs)
    percent = f"{abs(c.time.change):.2%} {interval(c.time)}"
    if c.b.unfinished["diverged"] > c.a.unfinished["diverged"]:
        return "REGRESSION", f"{c.b.unfinished['diverged']} of {len(c.b.runs)} runs diverged"
    if (
        c.a.target_status()[0] == "PASS"
        and stats.target_p(c.b.losses, c.b.target, "greater") < c.level
    ):
        return "REGRESSION", f"B's mean loss is above the target {c.b.target}"
    if c.loss.p < c.level and c.loss.change > 0 and not c.b.reaches_target():
        return "REGRESSION", f"the loss is higher by {c.loss.change:.4f}"
    if c.a.unfinished or c.b.unfinished:
        return "INCONCLUSIVE", "runs that did not finish count, and have no time"
    if speed != "unclear" and not c.interleaved:
        why = "but A and B ran in blocks: it may be drift"
        return "INCONCLUSIVE", f"{speed}, {signed(c.time, 2)}, {why}"
    if speed == "slower":
        return "REGRESSION", f"slower by {percent}"
    if not math.isfinite(c.time.low):
        few = f"fewer than {stats.MIN_RUNS} runs an arm, or equal ones, show no spread"
        return "INCONCLUSIVE", few
    if doubts := c.doubts:
        return "INCONCLUSIVE", f"{signed(c.time, 2)}, but {'; '.join(doubts)}"
    if speed in ("faster", "equivalent") and not c.keeps_the_loss:
        why = "but B is neither shown to reach the target, nor to keep A's loss"
        return "INCONCLUSIVE", f"{speed}, {signed(c.time, 2)}, {why}"
    if speed == "faster":
        return "FASTER", f"by {percent}"
    if speed == "equivalent":
        return "EQUIVALENT", f"times differ by less than {stats.FLOOR:.1%}"
    return "INCONCLUSIVE", f"{signed(c.time, 2)} may be noise"


def interval(d: stats.Difference) -> str:
    """The 95% interval of a relative difference, in percent of its absolute value."""
    low, high = sorted((d.low, d.high)) if d.change >= 0 else sorted((-d.low, -d.high))
    return f"[{100 * low:.2f}, {100 * high:.2f}]"


def signed(d: stats.Difference, digits: int) -> str:
    """A relative difference with its 95% interval, in percent."""
    return f"{d.change:+.{digits}%} [{100 * d.low:+.{digits}f}, {100 * d.high:+.{digits}f}]"


def warnings(c: Comparison) -> list[str]:
    found = []
    if c.order and not c.interleaved:
        found.append(f"order {c.order} is not interleaved: a drift of the host looks like a gain")
    for letter, arm in c.arms:
        found += [f"{letter}: {warning}" for warning in arm_warnings(arm)]
    means = {letter: arm.times.mean() for letter, arm in c.arms if arm.finished}
    times = [run.train_s / means[letter] for letter, run in c.in_order if run.finished]
    drifts = c.order and not c.in_pairs  # which cancel a drift
    if drifts and (p := stats.drift(np.array(times))) < stats.DRIFT_P:
        found.append(f"train time drifts with the order of the runs (p={p:.2g})")
    return found


def arm_warnings(arm: Arm) -> list[str]:
    found, n = arm.doubts, len(arm.runs)
    if unknown := audit.unknown_referees(arm.runs[0]):
        found.append(f"the referee ({', '.join(unknown)}) is {UNKNOWN_REFEREE}")
    found += [f"{count} of {n} runs {how}, they count" for how, count in arm.unfinished.items()]
    if far := stats.outlier(arm.times):
        i, share = far
        found.append(f"run {i + 1} outlier {arm.times[i]:.3f} s ({share:+.1%} of the others), kept")
    changed = {k for run in arm.runs[1:] for k in environment_changes(arm.runs[0], run)}
    if changed := sorted(k for k in changed if not k.startswith("gpu")):
        found.append(f"{', '.join(changed)} changed between its runs")
    said = [what for run in arm.runs for what in [*run.warnings, *slowdown(run)]]
    troubles = Counter(re.sub(r" \(cpu_share \S+\)", "", what) for what in said)
    return found + [f"{what} ({count} of {n} runs)" for what, count in troubles.items()]


def slowdown(run: LoggedRun) -> list[str]:
    """A host or GPU that was slower, or faster, after the run than before it."""
    rates = run.calibrations
    if len(rates) < 2 or abs(rates[-1] - rates[0]) < SLOWDOWN * rates[0]:
        return []
    return [f"its matmul rate changed by over {SLOWDOWN:.0%} within a run: throttled or shared"]


def next_steps(c: Comparison) -> list[str]:
    if not c.times_comparable:
        return [f"run both on one host: {RACE}"]
    steps = [f"interleave them: {RACE}"] if c.order and not c.interleaved else []
    n = min(len(c.a.finished), len(c.b.finished))
    if n < stats.MIN_RUNS:
        return [*steps, f"more runs: {RACE}"]
    of_time, of_loss = c.noise
    if c.verdict == "INCONCLUSIVE":
        for what in (abs(c.time.change), 0.01):
            need = stats.runs_needed(of_time, what, c.level, c.in_pairs)
            if need > n:
                steps.append(f"{need} runs an arm would show a difference of {what:.2%} in time")
    need = stats.runs_needed(of_loss, stats.LOSS_MARGIN, c.level, c.in_pairs)
    if need > n and c.loss.p >= c.level:
        steps.append(f"{need} runs an arm would show |loss difference| < {stats.LOSS_MARGIN}")
    return steps


def environment_difference(c: Comparison) -> tuple[list[str], list[str]]:
    """(names that are the same, differences) of the two arms' first runs."""
    first, second = (arm.runs[0] for arm in (c.a, c.b))
    changed = environment_changes(first, second)
    same = [k for k in first.environment if k not in changed and k != "load_average"]
    lines = []
    for key, (old, new) in changed.items():
        if re.fullmatch(r"gpu\d+", key):
            lines += gpu_differences(key, old, new)
        elif key not in VOLATILE:
            lines.append(f"{key}: {old} -> {new}")
    return same, lines


def gpu_differences(key: str, old: str, new: str) -> list[str]:
    """Differences in nvidia-smi's row of one GPU, but for what changes from second to second."""
    if " = " not in old + new:
        return [f"{key}: {old} -> {new}"]
    names, before = old.partition(" = ")[::2]
    columns = names.split(","), before.split(", "), new.partition(" = ")[2].split(", ")
    rows = zip(*columns, strict=False)
    return [f"{key} {name}: {x} -> {y}" for name, x, y in rows if x != y and name not in VOLATILE]


def code_difference(c: Comparison) -> list[str]:
    changes = source_changes(*(arm.runs[0] for arm in (c.a, c.b)))
    lines = [f"{path} +{added} -{removed}" for path, (added, removed) in changes.items()]
    return lines or ["same source"]
