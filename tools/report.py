#!/usr/bin/env python3
"""Write one HTML page about a folder of records, or about attempt B against A.

    report.py records -o page.html      the records of each class, each against the one before
    report.py A B -o page.html          two logs, or folders of logs

The page shows losses by time and step, the report of diff.py, and what differs between runs,
environments, configurations and sources. It needs neither network nor server.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project's root
    from referee.start import finish

import base64
import io
import math
import os
from html import escape
from itertools import pairwise
from string import Template

from referee.files import write_text
from tools.cli import ToolError, flag_parser
from tools.comparison import Arm, Comparison, compare, environment_difference
from tools.diff import text_report
from tools.leaderboard import Record, gain_over, groups, mean_and_sd, read_records
from tools.plots import Figure, draw_by_order, draw_losses, draw_target, loss_kind
from tools.runs import config_changes, source_changes, source_diff
from tools.sources import slug_of

TEMPLATE = Path(__file__).with_name("report.html")


# ------------------------------------------------------------------------------ Charts


def chart(alt: str, draw) -> str:
    """A picture as part of the page; draw(ax) draws it."""
    figure = Figure(figsize=(5, 3.3), layout="constrained")
    ax = figure.subplots()
    draw(ax)
    ax.grid(alpha=0.3)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize="small")
    svg = io.BytesIO()
    figure.savefig(svg, format="svg")
    data = base64.b64encode(svg.getvalue()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/svg+xml;base64,{data}">'


def curves(arms: list[Arm], by_time: bool) -> str:
    """Losses of several attempts against time or steps."""
    kind = loss_kind(arms)

    def draw(ax) -> None:
        for i, arm in enumerate(arms):
            draw_losses(ax, arm, kind, slug_of(arm.name), f"C{i}", by_time)
        draw_target(ax, arms[0].target)

    return chart(f"{kind} against {'train time' if by_time else 'steps'}", draw)


def every_run(c: Comparison, figure, name: str) -> str:
    """A figure of each run, in the order in which they began."""
    label = f"{name}; A blue, B orange"
    return chart(f"{label}; of each run", lambda ax: draw_by_order(ax, c, figure, label))


# ------------------------------------------------------------------------------ Text


def visible(line: str) -> str:
    """A line of a source, with names for what could hide or reorder a part of it on a screen."""
    return "".join(c if c.isprintable() or c == "\t" else f"\\u{ord(c):04x}" for c in line)


def folded(summary: str, lines: list[str]) -> str:
    text = escape("\n".join(map(visible, lines)) or "no difference")
    return f"<details><summary>{escape(summary)}</summary><pre>{text}</pre></details>"


def comparison_section(c: Comparison) -> str:
    """B against A: the verdict, diff.py's report, every run, and what changed."""
    _, environment = environment_difference(c)
    a, b = c.a.runs[0], c.b.runs[0]
    config = [f"{name}: {old} -> {new}" for name, (old, new) in config_changes(a, b).items()]
    parts = [
        f"<h3>{escape(c.b.name)} against {escape(c.a.name)}</h3>",
        f"<p>B <strong>{c.verdict}</strong> {escape(c.reason)}</p>",
        f"<pre>{escape(text_report(c))}</pre>",
        '<div class="charts">',
        every_run(c, lambda run: run.val_loss, "final val_loss"),
        every_run(c, lambda run: run.train_s, "train time, s"),
        "</div>",
        folded("Environment", environment),
        folded("Configuration", config),
        *(folded(f"Source: {path} +{added} -{removed}", source_diff(a, b, path)[2:])
          for path, (added, removed) in source_changes(a, b).items()),
    ]  # fmt: skip
    return "\n".join(parts)


def section(title: str, arms: list[Arm], table: str = "") -> str:
    """Attempts of one class, in the order of their dates, each compared with the one before."""
    charts = [curves(arms, by_time) for by_time in (True, False)]
    parts = [f"<h2>{escape(title)}</h2>", table, '<div class="charts">', *charts, "</div>"]
    parts += [comparison_section(compare(a, b)) for a, b in pairwise(arms)]
    return "\n".join(parts)


def record_table(records: list[Record], out: Path) -> str:
    """One row for each record, with a link to its page."""
    lines = ["<tr><th>record<th>time s (sd)<th>against the one before<th>val_loss (sd)<th>steps"]
    for previous, record in pairwise([None, *records]):
        arm = record.arm
        link = Path(os.path.relpath(record.folder / "README.md", out.parent)).as_posix()
        gain = gain_over(previous, record) if previous else ""
        loss = f"{mean_and_sd(arm.losses, 4)}, n={len(arm.runs)}"
        cells = [mean_and_sd(arm.times, 1), gain, loss, str(arm.runs[0].steps)]
        title = f'<a href="{escape(link)}">{escape(record.title)}</a>'
        lines.append(f"<tr><td>{title}" + "".join(f"<td>{escape(cell)}" for cell in cells))
    return "<table>\n" + "\n".join(lines) + "\n</table>"


# ------------------------------------------------------------------------------ Command


def record_sections(folder: Path, out: Path) -> list[str]:
    """A section for each class of the records below a folder."""
    found = []
    for (track, target, machine_class), records in groups(read_records(folder)).items():
        title = f"{track}, target {target:g}, on {machine_class}"
        arms = [record.arm for record in records]
        found.append(section(title, arms, record_table(records, out)))
    if not found:
        raise ToolError(f"{folder} holds no records that rank (TRACK/DATE_Slug/logs); "
                        "to compare two attempts name both")  # fmt: skip
    return found


def main() -> int:
    parser = flag_parser(__doc__)
    parser.add_argument("a", type=Path, metavar="A", help="a folder of records, or a baseline")
    parser.add_argument("b", type=Path, metavar="B", nargs="?", help="a candidate against A")
    parser.add_argument("-o", "--out", type=Path, metavar="PAGE.html", required=True)
    parser.add_argument("--target", type=float, default=math.nan, help="of logs that name none")
    args = parser.parse_args()
    if not args.b and not math.isnan(args.target):
        parser.error("--target is for A and B")
    if args.b:
        arms = [Arm.read(path, args.target) for path in (args.a, args.b)]
        title = f"{arms[1].name} against {arms[0].name}"
        sections = [section("Both attempts", arms)]
    else:
        title = "photofinish: the records"
        sections = record_sections(args.a.resolve(), args.out.resolve())
    page = Template(TEMPLATE.read_text(encoding="utf-8"))
    text = page.substitute(title=escape(title), sections="\n".join(sections))
    write_text(args.out, text)
    return 0


if __name__ == "__main__":
    finish(main)
