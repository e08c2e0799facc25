#!/usr/bin/env python3
"""Say whether B is faster than A, a regression, or noise.

A and B are logs, or folders of logs. Exit code: 0 faster or equivalent, 1 regression, 2 misuse,
3 not comparable, 4 invalid record, 5 inconclusive.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project's root
    from referee.start import finish

import dataclasses
import json
import math

from tools import stats
from tools.cli import EXIT_MISUSE, flag_parser
from tools.comparison import Arm, Comparison, code_difference, compare, environment_difference
from tools.runs import config_changes

COLUMNS = ("", "A", "B", "B vs A", "95% CI", "p")
NAMED_CHANGES = 6  # differences that a line of the report spells out


def mean(arm: Arm, figure) -> float:
    values = arm.values(figure)
    return float(values.mean()) if len(values) else math.nan


def row(label: str, c: Comparison, figure, digits: int) -> tuple[str, ...]:
    a, b = mean(c.a, figure), mean(c.b, figure)
    change = f"{b / a - 1:+.2%}" if c.times_comparable and a else "-"
    return label, f"{a:.{digits}f}", f"{b:.{digits}f}", change, "", ""


def rows(c: Comparison) -> list[tuple[str, ...]]:
    """The table, as text, under COLUMNS; without figures that no run has."""
    time = row("train_time s", c, lambda run: run.train_s, 3)
    if math.isfinite(c.time.low):
        ci = f"[{100 * c.time.low:+.2f},{100 * c.time.high:+.2f}]%"
        time = *time[:3], f"{c.time.change:+.2%}", ci, f"{c.time.p:.2g}"
    a, b = (mean(arm, lambda run: run.val_loss) for arm in (c.a, c.b))
    loss = "val_loss", f"{a:.5f}", f"{b:.5f}", f"{b - a:+.5f}", "", ""
    if math.isfinite(c.loss.low):
        loss = *loss[:4], f"[{c.loss.low:+.5f},{c.loss.high:+.5f}]", f"{c.loss.p:.2g}"
    table = [
        time,
        loss,
        row("step_avg ms", c, lambda run: 1000 * run.train_s / max(run.steps, 1), 2),
        row("steps", c, lambda run: run.steps, 0),
        row("tokens/s", c, lambda run: run.number("tokens_per_s"), 0),
        row("MFU", c, lambda run: run.number("mfu"), 4),
        row("peak memory MiB", c, lambda run: run.number("peak_memory"), 0),
    ]
    return [line for line in table if line[1:3] != ("nan", "nan")]


def target_text(arm: Arm) -> str:
    status, p = arm.target_status()
    if status == "unknown":
        return "unknown"
    if arm.unfinished:
        return f"FAIL ({sum(arm.unfinished.values())} of {len(arm.runs)} runs did not finish)"
    return f"{'not shown' if status == 'open' else status} (p={p:.2g})"


def loss_text(c: Comparison) -> str:
    if c.loss.p < c.level:
        return f"{'higher' if c.loss.change > 0 else 'lower'} by {abs(c.loss.change):.4f}"
    p = stats.not_worse(c.a.losses, c.b.losses, c.in_pairs)
    if p < c.level:
        return f"not higher by more than {stats.LOSS_MARGIN} (p={p:.2g})"
    return "not shown to be neutral" if math.isfinite(c.loss.low) else "not tested: no spread"


def order_text(c: Comparison) -> str:
    if not c.times_comparable:
        return ""
    host = "hosts unknown" if c.a.runs[0].host == "unknown" else "same host"
    if not c.drawn:
        return f"{host}, {stats.BY_HAND}"
    turns = c.a.runs[0].turn_steps
    how = f", in turns of {turns} steps" if turns else ""
    return f"{host}, interleaved, in pairs by seed{how}"


def summary(changes: list[str]) -> str:
    more = len(changes) - NAMED_CHANGES
    return "    ".join(changes[:NAMED_CHANGES]) + (f"    and {more} more" if more > 0 else "")


def code_line(c: Comparison) -> str:
    config = config_changes(c.a.runs[0], c.b.runs[0])
    named = [f"{name} {a} -> {b}" for name, (a, b) in config.items()]
    return f"{summary(code_difference(c))}    config: {summary(named) or 'same'}"


def text_report(c: Comparison) -> str:
    a, b = (f"{arm.name}  n={len(arm.runs)}" for arm in (c.a, c.b))
    lines = [
        f"A  {a}      B  {b}      {order_text(c)}".rstrip(),
        f"VERDICT   B {c.verdict} {c.reason}",
        f"TARGET    {c.b.target:g}: A {target_text(c.a)}, B {target_text(c.b)}"
        f"    LOSS  {loss_text(c)}",
    ]
    table = [COLUMNS, *rows(c)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for first, *others in table:
        cells = map(str.rjust, others, widths[1:])
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    same, different = environment_difference(c)
    lines.append(f"ENV       same: {len(same)} entries    DIFF: {summary(different) or 'none'}")
    lines.append(f"CODE      {code_line(c)}")
    lines += [f"WARN      {warning}" for warning in c.warnings]
    lines += [f"NEXT      {step}" for step in c.next_steps]
    return "\n".join(lines)


def json_report(c: Comparison) -> str:
    same, different = environment_difference(c)
    arms = {letter: {"name": arm.name, "runs": [str(run.path) for run in arm.runs],
                     "train_s": arm.times.tolist(), "val_loss": arm.losses.tolist(),
                     "target": arm.target_status()[0], "target_p": arm.target_status()[1]}
            for letter, arm in c.arms}  # fmt: skip
    report = {"verdict": c.verdict, "exit_code": c.exit_code, "reason": c.reason, **arms,
              "time": dataclasses.asdict(c.time), "loss": dataclasses.asdict(c.loss),
              "order": c.order, "drawn": c.drawn, "in_pairs": c.in_pairs, "environment": different,
              "config": config_changes(c.a.runs[0], c.b.runs[0]), "code": code_difference(c),
              "warnings": c.warnings, "next": c.next_steps}  # fmt: skip
    # JSON lacks nan and infinities: they are null.
    report = json.loads(json.dumps(report), parse_constant=lambda name: None)
    return json.dumps(report, indent=2)


def main() -> int:
    parser = flag_parser(__doc__)
    parser.add_argument("a", type=Path, metavar="A", help="baseline: a log or a folder of logs")
    parser.add_argument("b", type=Path, metavar="B", help="candidate: a log or a folder of logs")
    parser.add_argument("--json", action="store_true", help="print everything for programs")
    parser.add_argument("--target", type=float, default=math.nan, help="of logs that name none")
    args = parser.parse_args()
    a, b = (Arm.read(path, args.target) for path in (args.a, args.b))
    c = compare(a, b)
    print(json_report(c) if args.json else text_report(c))
    return c.exit_code


if __name__ == "__main__":
    finish(main, failed=EXIT_MISUSE)  # 1 is a regression
