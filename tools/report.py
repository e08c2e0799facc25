#!/usr/bin/env python3
"""Write one HTML page about a folder of records, or about attempt B against A.

It shows the ladder of each track and class, losses by time and step, step times, and of each record
against the one before the verdict, differences in the order of the runs, environment and source.
The page needs neither network nor server. With --check nothing is written, and the exit code is 1
if the page is stale.
"""

import base64
import hashlib
import html
import json
import math
import os
import re
import shlex
import sys
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project's root

import numpy as np

from tools.cli import ToolError, finish, flag_parser
from tools.comparison import Arm, Comparison, compare, environment_difference, signed
from tools.diff import COLUMNS, loss_text, order_text, rows, target_text
from tools.leaderboard import groups, mean_and_sd, read_records
from tools.runs import LoggedRun, config_changes, source_changes, source_diff
from tools.sources import slug_of

TEMPLATE = Path(__file__).with_name("report.html")
POINTS = 120  # of a training curve at most; each is the mean of the steps since the one before
COLOURS = 8  # of attempts, in the template
DIFF_KINDS = {"+": "ins", "-": "del", "@": "b"}


@dataclass
class Rung:
    """One attempt of a ladder."""

    arm: Arm
    title: str
    link: str = ""


@dataclass
class Ladder:
    """Attempts in the order of their dates, each held against the one before."""

    title: str
    rungs: list[Rung]
    trust: bool = False

    def __post_init__(self):
        arms = [rung.arm for rung in self.rungs]
        self.comparisons = [compare(a, b, self.trust) for a, b in pairwise(arms)]

    @property
    def runs(self) -> list[LoggedRun]:
        return [run for rung in self.rungs for run in rung.arm.runs]


def colour(place: int) -> str:
    return f"s{place % COLOURS}"


def label(place: int, arm: Arm) -> str:
    """What a chart calls an attempt: its place on the ladder and its name without the date."""
    return f"{place + 1} {slug_of(arm.name)}"


# ------------------------------------------------------------------------------ Markup


class Markup(str):
    """Text that is HTML already; all other text is escaped."""


def tag(name: str, /, *children: str, **attributes) -> Markup:
    """An element; an attribute class_ is class, data_of is data-of, one that is True is bare."""
    given = {key.strip("_").replace("_", "-"): value for key, value in attributes.items()}
    words = [f' {key}="{html.escape(str(value))}"' if value is not True else f" {key}"
             for key, value in given.items() if value is not False]  # fmt: skip
    inside = [child if isinstance(child, Markup) else html.escape(child) for child in children]
    end = "" if name == "input" else f"</{name}>"
    return Markup(f"<{name}{''.join(words)}>{''.join(inside)}{end}")


def table(head: tuple[str, ...], body: list[tuple[str, ...]]) -> Markup:
    """A table that scrolls by itself where it is wider than the page."""
    lines = [tag("tr", *(tag("th", cell) for cell in head))]
    for first, *others in body:
        lines.append(tag("tr", tag("th", first), *(tag("td", cell) for cell in others)))
    return tag("div", tag("table", *lines), class_="wide", tabindex=0)


def chart(caption: str, **data) -> Markup:
    """An empty chart, which the template's script draws."""
    keys = "Arrow keys go from value to value."
    drawing = tag("svg", tabindex=0, role="img", aria_label=f"{caption}. {keys}")
    box = tag("div", drawing, tag("output", class_="tip"), class_="chart", **data)
    return tag("figure", tag("figcaption", caption), box)


def folded(summary: str, *children: str) -> Markup:
    return tag("details", tag("summary", summary), *children)


def unordered(lines: list[str]) -> Markup:
    return tag("ul", *(tag("li", line) for line in lines))


# ------------------------------------------------------------------------------ Figures


def plain(value):
    """A figure for JSON, which has neither nan nor infinities."""
    if isinstance(value, dict):
        return {key: plain(inside) for key, inside in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(inside) for inside in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value


def thinned(curve: list[tuple[int, float, float]]) -> list[tuple[float, ...]]:
    """(step, seconds, mean loss, milliseconds a step) of at most POINTS parts of a curve."""
    found, before, count = [], curve[:1], min(POINTS, len(curve))
    for i in range(count):
        part = curve[i * len(curve) // count : (i + 1) * len(curve) // count]
        (first, begin, _), (last, end, _) = *before, part[-1]
        ms = (end - begin) / (last - first) if last > first else math.nan
        loss = sum(point[2] for point in part) / len(part)
        found.append((last, round(end / 1000, 2), round(loss, 4), round(ms, 2)))
        before = part[-1:]
    return found


def curves(place: int, arm: Arm) -> dict:
    """The curves of every run of an attempt, and their mean over those that finished."""
    runs = [
        {
            "text": f"{label(place, arm)}, seed {run.seed}{'' if run.finished else ', unfinished'}",
            "train": thinned(run.train_curve),
            "val": [(step, ms / 1000, loss) for step, ms, loss in run.val_curve],
        }
        for run in arm.runs
    ]
    finished = [data for data, run in zip(runs, arm.runs, strict=True) if run.finished]
    mean = {kind: mean_curve([run[kind] for run in finished]) for kind in ("train", "val")}
    mean["text"] = f"{label(place, arm)}, mean"
    return {"style": colour(place), "mean": mean, "runs": runs}


def mean_curve(of_runs: list[list[tuple]]) -> list[list[float]]:
    shortest = min(map(len, of_runs), default=0)
    if not shortest:
        return []
    return np.array([curve[:shortest] for curve in of_runs]).mean(0).tolist()


def differences(c: Comparison) -> dict[str, dict]:
    """What a chart of differences shows, for time in percent and for the loss in nats.

    Of pairs each one's difference, else of each run its difference from A's mean.
    """
    found = {"loss": placed(c, lambda run: run.val_loss, lambda x, base: x - base, np.mean)}
    d = c.loss
    found["loss"] |= {"change": d.change, "low": d.low, "high": d.high}
    if c.times_comparable:
        found["time"] = placed(c, lambda run: run.train_s, percent, geometric_mean)
        d = c.time
        found["time"] |= {key: 100 * getattr(d, key) for key in ("change", "low", "high")}
    return found


def percent(value: float, base: float) -> float:
    return 100 * (value / base - 1)


def geometric_mean(values: np.ndarray) -> float:
    return float(np.exp(np.log(values).mean()))


def placed(c: Comparison, figure, difference, mean) -> dict:
    """The points of a chart of differences, in the order of the runs: text, arm and value."""
    runs, points = [(x, run) for x, run in c.in_order if run.finished], []
    if c.in_pairs:
        for pair in zip(runs[::2], runs[1::2], strict=True):
            value = {letter: figure(run) for letter, run in pair}
            text = f"pair {len(points) + 1}, seed {pair[0][1].seed}: A {value['A']:g}"
            points.append((f"{text}, B {value['B']:g}", "B", difference(value["B"], value["A"])))
    elif c.a.finished:
        base = mean(c.a.values(figure))
        for i, (x, run) in enumerate(runs, 1):
            text = f"run {i}, {x}, seed {run.seed}: {figure(run):g}"
            points.append((text, x, difference(figure(run), base)))
    return {"pairs": c.in_pairs, "points": points}


# ------------------------------------------------------------------------------ Page


def ladder_section(number: int, ladder: Ladder) -> Markup:
    slowest = max((run.train_s for run in ladder.runs if run.finished), default=1.0)
    steps = [rung_item(number, place, ladder, slowest) for place in range(len(ladder.rungs))]
    captions = {"loss": "Loss, nats per token; thin: each run, thick: their mean",
              "ms": "Milliseconds a step; the tallest hundredth may be cut"}  # fmt: skip
    charts = [chart(caption, data_chart=figure, data_ladder=number)
              for figure, caption in captions.items()]  # fmt: skip
    parts = [comparison_section(number, place, c) for place, c in enumerate(ladder.comparisons, 1)]
    return tag("section", tag("h2", ladder.title), tag("ol", *steps, class_="ladder"),
               controls(number, ladder), tag("div", *charts, class_="charts"),
               *parts, id=f"ladder-{number}")  # fmt: skip


def rung_item(number: int, place: int, ladder: Ladder, slowest: float) -> Markup:
    """One attempt: what it is, a bar for its mean time with a dot for each run, its figures."""
    rung, arm = ladder.rungs[place], ladder.rungs[place].arm
    facts = [f"{arm.runs[0].steps} steps", f"target {target_text(arm)}", f"n={len(arm.runs)}"]
    time, bar = "no run finished", Markup("")
    if arm.finished:
        time = f"{mean_and_sd(arm.times, 1)} s"
        facts.insert(0, f"val_loss {mean_and_sd(arm.losses, 4)}")
        dots = [tag("i", style=f"left:{99 * t / slowest:.2f}%") for t in arm.times]
        mean = tag("b", style=f"width:{99 * arm.times.mean() / slowest:.2f}%")
        bar = tag("div", mean, *dots, class_=f"bar {colour(place)}", aria_hidden="true")
    title = tag("a", rung.title, href=rung.link) if rung.link else rung.title
    against = Markup("")
    if place:
        c = ladder.comparisons[place - 1]
        gain = f"{signed(c.time, 1)}, " if math.isfinite(c.time.low) else ""
        against = tag("a", f"{gain}{c.verdict.lower()}", href=f"#against-{number}-{place}")
    figures = [tag("b", time), against, *(tag("span", fact) for fact in facts)]
    return tag("li", tag("strong", title), bar, tag("div", *figures, class_="figures"))


def controls(number: int, ladder: Ladder) -> Markup:
    """The switches of a ladder's charts: time or step, which loss, which attempts."""
    validations = min((len(run.val_curve) for run in ladder.runs if run.finished), default=0)
    kind = "val" if validations > 2 else "train"  # the first is of the untrained network

    def choice(name: str, value, text: str, checked: bool, type_: str = "radio", **more) -> Markup:
        box = tag("input", type=type_, name=f"{name}-{number}", value=value, checked=checked,
                  autocomplete="off")  # fmt: skip
        return tag("label", box, text, **more)

    def field(legend: str, *choices: Markup) -> Markup:
        return tag("fieldset", tag("legend", legend), *choices)

    return tag(
        "div",
        field("against", choice("by", "time", "time", True), choice("by", "step", "step", False)),
        field("loss", choice("kind", "val", "validation", kind == "val"),
              choice("kind", "train", "training", kind == "train")),
        field("attempts", *(choice("shown", i, label(i, rung.arm), True, "checkbox",
                                   class_=colour(i)) for i, rung in enumerate(ladder.rungs))),
        class_="controls", data_ladder=number,
    )  # fmt: skip


def comparison_section(number: int, place: int, c: Comparison) -> Markup:
    """B against A: what diff.py says, differences in the order of the runs, and what changed."""
    where = {"data_of": f"{number}-{place}", "data_a": colour(place - 1), "data_b": colour(place)}
    verdict = tag("strong", c.verdict, class_=f"exit{c.exit_code}")
    facts = {"Target": f"{c.b.target:g}: A {target_text(c.a)}, B {target_text(c.b)}",
             "Loss": loss_text(c), "Order": f"{c.order} {order_text(c)}".strip()}  # fmt: skip
    said = [tag(part, text) for pair in facts.items() if pair[1]
            for part, text in zip(("dt", "dd"), pair, strict=True)]  # fmt: skip
    units = {"time": "percent", "loss": "nats per token"}
    what = "pair" if c.in_pairs else "run, less A's mean"
    charts = [chart(f"Difference in {figure}, {units[figure]}: each {what}, mean and 95% interval",
                    **where, data_chart="differences", data_figure=figure)
              for figure in (units if c.times_comparable else ("loss",))]  # fmt: skip
    notes = [f"Warning: {text}" for text in c.warnings]
    notes += [f"Next: {text}" for text in c.next_steps]
    return tag(
        "section", tag("h3", f"{c.b.name} (B) against {c.a.name} (A)"),
        tag("p", "B ", verdict, f" {c.reason}", class_="verdict"), tag("dl", *said),
        table(COLUMNS, rows(c)), tag("div", *charts, class_="charts"), unordered(notes),
        *what_changed(c), id=f"against-{number}-{place}",
    )  # fmt: skip


def what_changed(c: Comparison) -> list[Markup]:
    """Environment, configuration and every source that differs, folded."""
    same, different = environment_difference(c)
    a, b = c.a.runs[0], c.b.runs[0]
    config = [(name, *pair) for name, pair in config_changes(a, b).items()]
    found = [
        folded(f"Environment: {len(different)} differ, {len(same)} are the same",
               unordered(different or ["no difference"])),
        folded(f"Configuration: {len(config)} differ", table(("", "A", "B"), config)),
        *(folded(f"Source: {path} +{added} -{removed}", diff_block(source_diff(a, b, path)))
          for path, (added, removed) in source_changes(a, b).items()),
    ]  # fmt: skip
    return found if len(found) > 2 else [*found, tag("p", "Source: the same in A and B")]


def diff_block(diff: list[str]) -> Markup:
    """A unified diff, coloured, without its two lines of file names."""
    parts = groupby(diff[2:], key=lambda line: DIFF_KINDS.get(line[:1], "span"))
    blocks = [tag(kind, "\n".join(map(visible, lines))) for kind, lines in parts]
    return tag("pre", *blocks, tabindex=0)


def visible(line: str) -> str:
    """A line of a source with names for what could hide or reorder a part of it on a screen."""
    return "".join(c if c.isprintable() or c == "\t" else f"\\u{ord(c):04x}" for c in line)


def page(title: str, ladders: list[Ladder]) -> str:
    template = TEMPLATE.read_text()
    script = re.search(r"<script>(.*?)</script>", template, re.S)[1]
    data = {
        "ladders": [
            {"target": ladder.rungs[0].arm.target,
             "rungs": [curves(place, rung.arm) for place, rung in enumerate(ladder.rungs)]}
            for ladder in ladders
        ],
        "differences": {
            f"{number}-{place}": differences(c)
            for number, ladder in enumerate(ladders)
            for place, c in enumerate(ladder.comparisons, 1)
        },
    }  # fmt: skip
    links = [tag("a", ladder.title, href=f"#ladder-{i}") for i, ladder in enumerate(ladders)]
    sections = [ladder_section(i, ladder) for i, ladder in enumerate(ladders)]
    parts = {
        "title": html.escape(title),
        "links": tag("nav", *links) if len(links) > 1 else "",
        "sections": "\n".join(sections),
        "data": json.dumps(plain(data), separators=(",", ":")).replace("<", r"\u003c"),
        # The page's own script alone may run, should a log's text ever pass for markup.
        "script_sha256": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


# ------------------------------------------------------------------------------ Command


def ladders_below(folder: Path, out: Path) -> list[Ladder]:
    """A ladder for each class of the records below a folder, with links to their pages."""
    found = []
    for (track, target, machine_class), records in groups(read_records(folder)).items():
        rungs = [Rung(record.arm, record.title,
                      Path(os.path.relpath(record.folder / "README.md", out.parent)).as_posix())
                 for record in records]  # fmt: skip
        found.append(Ladder(f"{track}, target {target:g}, on {machine_class}", rungs))
    if not found:
        raise ToolError(f"{folder} holds no records that rank (TRACK/DATE_Slug/logs); "
                        "to compare two attempts name both")  # fmt: skip
    return found


def main() -> int:
    parser = flag_parser(__doc__)
    parser.add_argument("a", type=Path, metavar="A", help="a folder of records, or a baseline")
    parser.add_argument("b", type=Path, metavar="B", nargs="?", help="a candidate against A")
    parser.add_argument("-o", "--out", type=Path, metavar="PAGE.html", required=True)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if PAGE is stale")
    parser.add_argument("--target", type=float, default=math.nan, help="of logs that name none")
    trust = "A and B ran on one host, interleaved, though the logs do not say so"
    parser.add_argument("--same_host", action="store_true", help=trust)
    args = parser.parse_args()
    if not args.b and (args.same_host or not math.isnan(args.target)):
        parser.error("--target and --same_host are for A and B")
    if args.b:
        arms = [Arm.read(path, args.target) for path in (args.a, args.b)]
        title = f"{arms[1].name} against {arms[0].name}"
        rungs = [Rung(arm, arm.name) for arm in arms]
        ladders = [Ladder("Both attempts", rungs, args.same_host)]
    else:
        title = "photofinish: the records"
        ladders = ladders_below(args.a.resolve(), args.out.resolve())
    new = page(title, ladders)
    if args.check:
        stale = not args.out.exists() or args.out.read_text() != new
        if stale:
            words = shlex.join(word for word in sys.argv[1:] if word != "--check")
            print(f"{args.out} is stale; run: ./run.sh tools/report.py {words}", file=sys.stderr)
        return int(stale)
    args.out.write_text(new)
    return 0


if __name__ == "__main__":
    finish(main)
