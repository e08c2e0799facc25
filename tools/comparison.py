"""The verdict on two sets of runs, with its reasons and warnings.

records/README.md states the rules, stats.py has the thresholds, audit.py judges each attempt.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from pathlib import Path

import numpy as np

from tools import audit, stats
from tools.runs import InvalidLog, LoggedRun, changes, environment_changes, read_arm, source_changes

TARGET_RANKS = {"unknown": 0, "FAIL": 0, "open": 1, "PASS": 2}
EXIT_CODES = {"FASTER": 0, "EQUIVALENT": 0, "REGRESSION": 1, "NOT COMPARABLE": 3,
              "INCONCLUSIVE": 5}  # fmt: skip
VOLATILE = {"temperature.gpu", "clocks.sm", "clocks.mem", "gpu_processes"}
RACE = "./run.sh tools/race.py A B -n 10"
SLOWDOWN = 0.10  # change of a calibration within a run that is worth a warning


class Arm:
    """All runs of one attempt, in the order in which they began."""

    def __init__(self, name: str, runs: list[LoggedRun], target: float = math.nan):
        self.name, self.runs = name, runs
        self.finished = [run for run in runs if run.finished]
        self.times = self.values(lambda run: run.train_s)
        self.losses = self.values(lambda run: run.val_loss)
        self.target = target if math.isnan(runs[0].target) else runs[0].target
        self.declared = audit.declared_runs(runs)
        self.level = stats.alpha(len(runs), len(runs), self.declared)

    @classmethod
    def read(cls, path: Path, target: float = math.nan, name: str = "") -> "Arm":
        """The attempt in a folder or a log."""
        path = path.resolve()
        folder = path.parent if path.name == "logs" else path
        name = name or (folder.name if folder.is_dir() else path.stem)
        return cls(name, read_arm(path), target)

    def require_sound(self) -> None:
        """Raise InvalidLog if a log has a fault."""
        for run in self.runs:
            if run.faults:
                raise InvalidLog(run.path, *run.faults[0])

    def values(self, figure) -> np.ndarray:
        """A figure of every finished run."""
        return np.array([figure(run) for run in self.finished], float)

    @property
    def unfinished(self) -> Counter:
        return Counter(r.result.get("status", "killed") for r in self.runs if not r.finished)

    @cached_property
    def objections(self) -> list[str]:
        """Why these runs prove neither a record nor a gain, however their figures look."""
        return audit.objections(self.runs)

    @property
    def obstacles(self) -> list[str]:
        """Why it is no record."""
        status, p = self.target_status()
        off_track = dict.fromkeys(what for run in self.runs for what in audit.off_track(run))
        found = [*self.objections, *off_track]
        if len(self.runs) < stats.RECORD_RUNS:
            found.append(f"{len(self.runs)} runs, at least {stats.RECORD_RUNS} are needed")
        elif status != "PASS":
            found.append(f"the target is not shown to be reached ({status}, p={p:.2g})")
        return found

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
        return ("PASS" if p < self.level and not self.objections else "open"), p


@dataclass
class Comparison:
    """B against A: what `compare` found, and what follows from it."""

    a: Arm
    b: Arm
    verdict: str = "INCONCLUSIVE"
    reason: str = ""
    time: stats.Difference = stats.NO_DIFFERENCE
    loss: stats.Difference = stats.NO_DIFFERENCE

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

    def is_decided(self, least: float) -> bool:
        """Whether more pairs are of no use: a verdict, a run that failed, no gain of `least`."""
        unfinished = self.a.unfinished or self.b.unfinished
        return bool(self.verdict != "INCONCLUSIVE" or unfinished or self.time.low > -least)

    @property
    def times_comparable(self) -> bool:
        return self.verdict != "NOT COMPARABLE"

    @cached_property
    def in_order(self) -> list[tuple[str, LoggedRun]]:
        """(A or B, run) of every run, in the order of their starts."""
        runs = [(letter, run) for letter, arm in self.arms for run in arm.runs]
        return sorted(runs, key=lambda pair: pair[1].started)

    @cached_property
    def order(self) -> str:
        """Such as ABBA; empty where the logs do not tell."""
        return "".join(letter for letter, run in self.in_order if "utc" in run.config)

    @cached_property
    def in_pairs(self) -> bool:
        """Whether runs alternate between A and B with equal seeds, all finished.

        What the two runs of a pair share, such as the state of the host and the order of the data,
        cancels in their difference.
        """
        runs = self.in_order
        if len(self.order) < len(runs) or len(self.a.runs) != len(self.b.runs):
            return False
        return all(
            x != y and one.seed == other.seed and one.finished and other.finished
            for (x, one), (y, other) in zip(runs[::2], runs[1::2], strict=True)
        )

    @cached_property
    def drawn(self) -> bool:
        """Whether the runs came in the order that race.py draws for these sources and flags.

        Any other order may have been chosen to favour an arm, so no claim about times rests on it.
        """
        seeds = list(dict.fromkeys(run.seed for _, run in self.in_order))
        ran = [(letter, seeds.index(run.seed)) for letter, run in self.in_order]
        for arms in permutations(self.arms):
            first = [arm.runs[0] for _, arm in arms]
            seed = stats.order_seed([(run.source_texts, run.shared_flags) for run in first])
            order = stats.draw_order(2, len(self.a.runs), seed)
            if ran == [(arms[i][0], turn) for i, turn in order]:
                return len(self.order) == len(ran)
        return False

    @property
    def objections(self) -> list[str]:
        """Why these arms prove no gain, however their figures look."""
        found = [f"{x}: {what}" for x, arm in self.arms for what in arm.objections]
        setups = (audit.setup(arm.runs[0]) for _, arm in self.arms)
        return found + [f"A and B differ in {name}: {x} and {y}"
                        for name, (x, y) in changes(*setups).items()]  # fmt: skip

    @property
    def keeps_the_loss(self) -> bool:
        """Whether B reaches the target, or is no worse than A in status and in loss."""
        a_target, b_target = (TARGET_RANKS[arm.target_status()[0]] for _, arm in self.arms)
        p = stats.not_worse(self.a.losses, self.b.losses, self.in_pairs)
        return b_target == TARGET_RANKS["PASS"] or b_target >= a_target and p < self.level

    @property
    def warnings(self) -> list[str]:
        found = []
        if self.times_comparable and not self.drawn:
            ran = self.order or "unknown"
            found.append(f"{stats.BY_HAND}: {ran}; it shows no difference of times")
        for letter, arm in self.arms:
            found += [f"{letter}: {warning}" for warning in arm_warnings(arm)]
        return found

    @property
    def next_steps(self) -> list[str]:
        if not self.times_comparable:
            return [f"run both on one host: {RACE}"]
        steps = [] if self.drawn else [f"race them: {RACE}"]
        n = min(len(self.a.finished), len(self.b.finished))
        if n < stats.MIN_RUNS:
            return [*steps, f"more runs: {RACE}"]
        wanted = []
        if self.verdict == "INCONCLUSIVE":
            sd = stats.noise(np.log(self.a.times), np.log(self.b.times), self.in_pairs)
            wanted = [(sd, change, f"a difference of {change:.2%} in time")
                      for change in (abs(self.time.change), 0.01)]  # fmt: skip
        if self.loss.p >= self.level:
            sd, margin = stats.noise(self.a.losses, self.b.losses, self.in_pairs), stats.LOSS_MARGIN
            wanted.append((sd, margin, f"|loss difference| < {margin}"))
        for sd, difference, what in wanted:
            need = stats.runs_needed(sd, difference, self.level, self.in_pairs)
            steps += [f"{need} runs per arm would show {what}"] if need > n else []
        return steps


def compare(a: Arm, b: Arm) -> Comparison:
    """B against A; InvalidLog if a log has a fault."""
    for arm in (a, b):
        arm.require_sound()
    result = Comparison(a, b)
    result.loss = stats.absolute(a.losses, b.losses, result.in_pairs, result.level)
    if obstacles := what_forbids_comparing(a, b):
        result.verdict, result.reason = "NOT COMPARABLE", "; ".join(obstacles)
    else:
        result.time = stats.relative(a.times, b.times, result.in_pairs, result.level)
        result.verdict, result.reason = judge(result)
    return result


def what_forbids_comparing(a: Arm, b: Arm) -> list[str]:
    reasons = []
    if {r.name for r in a.runs} & {r.name for r in b.runs}:
        reasons.append("A and B share runs")
    for name, (x, y) in changes(a.runs[0].task, b.runs[0].task).items():
        reasons.append(f"different tasks, {name} {x} and {y}")
    if a.target != b.target and not (math.isnan(a.target) and math.isnan(b.target)):
        reasons.append(f"different targets, {a.target} and {b.target}")
    # One source may multiply in bf16 where an older one did not: a race on one host may tell.
    classes = [{(r.machine, r.turn_steps) for r in arm.runs} for arm in (a, b)]
    if classes[0] != classes[1]:
        names = [" and ".join(sorted({r.machine_class for r in arm.runs})) for arm in (a, b)]
        reasons.append(f"different classes, {names[0]} and {names[1]}")
    if len({r.host for arm in (a, b) for r in arm.runs}) > 1:
        reasons.append("different hosts")
    return reasons


def judge(c: Comparison) -> tuple[str, str]:
    """(verdict, its reason) of two comparable arms."""
    speed = stats.time_verdict(c.a.times, c.b.times, c.level, c.in_pairs)
    percent = f"{abs(c.time.change):.2%} {interval(c.time)}"
    if c.b.unfinished["diverged"] > c.a.unfinished["diverged"]:
        return "REGRESSION", f"{c.b.unfinished['diverged']} of {len(c.b.runs)} runs diverged"
    reached = c.a.target_status()[0] == "PASS"
    if reached and stats.missed_p(c.b.losses, c.b.target) < c.level:
        return "REGRESSION", f"B's mean loss is above the target {c.b.target}"
    if c.loss.p < c.level and c.loss.change > 0 and not c.b.reaches_target():
        return "REGRESSION", f"the loss is higher by {c.loss.change:.4f}"
    if c.a.unfinished or c.b.unfinished:
        return "INCONCLUSIVE", "runs that did not finish count, and have no time"
    if not math.isfinite(c.time.low):
        few = f"fewer than {stats.MIN_RUNS} runs per arm"
        return "INCONCLUSIVE", f"{few}, or equal times, show no spread"
    if not c.drawn:
        return "INCONCLUSIVE", f"{signed(c.time, 2)}, but {stats.BY_HAND}: it may be drift"
    if speed == "slower":
        return "REGRESSION", f"slower by {percent}"
    if found := c.objections:
        more = f" and {len(found) - 1} more reasons" if len(found) > 1 else ""
        return "INCONCLUSIVE", f"{signed(c.time, 2)}, but {found[0]}{more}"
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


def arm_warnings(arm: Arm) -> list[str]:
    found, n = list(arm.objections), len(arm.runs)
    found += [f"{count} of {n} runs {how}, they count" for how, count in arm.unfinished.items()]
    if far := stats.outlier(arm.times):
        i, share = far
        found.append(f"run {i + 1} outlier {arm.times[i]:.3f} s ({share:+.1%} of the others), kept")
    changed = {k for run in arm.runs[1:] for k in environment_changes(arm.runs[0], run)}
    if changed := sorted(k for k in changed - audit.setup(arm.runs[0]).keys() if k[:3] != "gpu"):
        found.append(f"{', '.join(changed)} changed between its runs")
    said = [what for run in arm.runs for what in [*run.warnings, *slowdown(run)]]
    troubles = Counter(re.sub(r" \(cpu_share \S+\)", "", what) for what in said)
    return found + [f"{what} ({count} of {n} runs)" for what, count in troubles.items()]


def slowdown(run: LoggedRun) -> list[str]:
    """A warning if the host or GPU was slower or faster after the run than before it."""
    rates = run.calibrations
    if len(rates) < 2 or abs(rates[-1] - rates[0]) < SLOWDOWN * rates[0]:
        return []
    return [f"its matmul rate changed by over {SLOWDOWN:.0%} within a run: throttled or shared"]


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
    """Differences in nvidia-smi's row of one GPU, except what changes from second to second."""
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
