#!/usr/bin/env python3
"""Write the tables and pictures of records from the logs below records/.

There is one table for each class: track, target and machine class. All of them go to
records/README.md, that of the newest record to README.md. A record is a folder
records/<track>/<date>_<Slug> with logs/ and a README.md whose title says what changed. Runs that
other processes disturbed are included and marked. With --check the tool writes nothing; the exit
code is 1 if a page is stale.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project's root
    from referee.start import finish

from referee.files import write_text
from tools import stats
from tools.cli import ToolError, flag_parser
from tools.comparison import Arm, compare, signed
from tools.runs import find_logs
from tools.sources import ROOT, share

RECORDS = ROOT / "records"
BEGIN, END = "<!-- leaderboard: ./run.sh tools/leaderboard.py -->", "<!-- end of leaderboard -->"


class Record:
    """One attempt below records/."""

    def __init__(self, folder: Path):
        self.folder, self.arm = folder, Arm.read(folder)
        self.track, self.date = folder.parent.name, folder.name.partition("_")[0]
        self.arm.require_sound()
        page = (folder / "README.md").read_text(encoding="utf-8")
        self.title = page.partition("\n")[0].lstrip("# ")
        if not self.title:
            raise ToolError(f"{folder / 'README.md'} lacks a first line that says what changed")
        self.disturbed = sum(bool(run.warnings) for run in self.arm.runs)

    def obstacles(self) -> list[str]:
        """Why it does not rank; empty for a record."""
        found = list(self.arm.obstacles)
        if (track := self.arm.runs[0].config.get("track")) != self.track:
            found.append(f"its logs are of the track {track}, its folder of {self.track}")
        return found

    @property
    def group(self) -> tuple[str, float, str]:
        return self.track, self.arm.target, self.arm.runs[0].machine_class


def mean_and_sd(values, digits: int) -> str:
    return f"{values.mean():.{digits}f} ({stats.sd(values):.{digits}f})"


def record_row(number: int, record: Record, previous: Record | None, page: Path) -> str:
    arm, p = record.arm, record.arm.target_status()[1]
    gain = gain_over(previous, record) if previous else ""
    loss = f"{mean_and_sd(arm.losses, 4)}, n={len(arm.runs)}, p={p:.1g}"
    link = f"[{record.date}]({record.folder.relative_to(page.parent).as_posix()}/README.md)"
    disturbed = f" †{record.disturbed}" if record.disturbed else ""
    title = record.title.replace("|", "\\|")  # which else ends a cell, even between backquotes
    return (f"| {number} | {mean_and_sd(arm.times, 1)}{disturbed} | {gain} | {loss} "
            f"| {arm.runs[0].steps} | {title} | {link} |")  # fmt: skip


def gain_over(previous: Record, record: Record) -> str:
    """Change of train time with its interval; a dash if the two are not comparable."""
    c = compare(previous.arm, record.arm)
    if not c.times_comparable:
        return "-"
    verdict = "" if c.exit_code == 0 else f", {c.verdict.lower()}"
    return signed(c.time, 1) + (verdict if c.drawn else f" ({stats.BY_HAND})")


def groups(records: list[Record]) -> dict[tuple, list[Record]]:
    """Records by class, in the order of their dates; of one day, the slowest first.

    The class of the newest record comes last.
    """
    found = {}
    for record in sorted(records, key=lambda r: (r.date, -r.arm.times.mean())):
        found[record.group] = [*found.pop(record.group, []), record]
    return found


def class_table(group: tuple, records: list[Record], page: Path) -> list[str]:
    track, target, machine_class = group
    lines = [f"**{track}, target {target:g}**, on {machine_class}", "",
             "| | time s (sd) | against the one before | val_loss (sd) | steps | what | record |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for i, record in enumerate(records):
        lines.append(record_row(i + 1, record, records[i - 1] if i else None, page))
    if any(record.disturbed for record in records):
        lines += ["", "†n: n of these runs shared the CPU with other processes; they are included."]
    if len(records) > 1 and page.parent == RECORDS:
        lines += ["", f"![train times]({picture(group).relative_to(RECORDS).as_posix()})"]
    return [*lines, ""]


def with_tables(page: Path, classes: dict[tuple, list[Record]]) -> str:
    """A page's text, with these classes' tables between its two marks."""
    old = page.read_text(encoding="utf-8")
    if BEGIN not in old or END not in old:
        raise ToolError(f"{page} lacks the lines {BEGIN} and {END}")
    lines = [line for item in classes.items() for line in class_table(*item, page)]
    before, after = old.partition(BEGIN)[0], old.partition(END)[2]
    return "\n".join([before + BEGIN, "", *lines, END]) + after


def picture(group: tuple) -> Path:
    track, target, machine_class = group
    name = "".join(c if c.isalnum() else "-" for c in f"{target:g}-{machine_class}")
    return RECORDS / track / f"progress_{name}.png"


def read_records(root: Path) -> list[Record]:
    """Every folder <track>/<date>_<Slug> below root that ranks."""
    folders = [p.parent for p in sorted(root.glob("*/20*/logs")) if find_logs(p)]
    ranked = []
    for record in map(Record, folders):
        if obstacles := record.obstacles():
            print(f"left out: {record.folder.relative_to(root.parent)}: {'; '.join(obstacles)}",
                  file=sys.stderr)  # fmt: skip
        else:
            ranked.append(record)
    return ranked


def main() -> int:
    parser = flag_parser(__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a page is stale")
    args = parser.parse_args()
    ranked = groups(read_records(RECORDS))
    pages = {RECORDS / "README.md": ranked, ROOT / "README.md": dict([*ranked.items()][-1:])}
    texts = {page: with_tables(page, classes) for page, classes in pages.items()}
    if args.check:
        stale = [page for page, text in texts.items() if text != page.read_text(encoding="utf-8")]
        stale += [picture(g) for g, r in ranked.items() if len(r) > 1 and not picture(g).exists()]
        for path in stale:
            print(f"{path.relative_to(ROOT)} is stale; run: ./run.sh tools/leaderboard.py",
                  file=sys.stderr)  # fmt: skip
        return int(bool(stale))
    for page, text in texts.items():
        write_text(page, text)
    for group, records in ranked.items():
        for record in records:
            share(record.folder, RECORDS / "sources")
        if len(records) > 1:
            from tools.plots import plot_ladder  # matplotlib takes a second to load

            title = f"{group[0]}, target {group[1]:g}, {group[2]}"
            names = [r.folder.name.partition("_")[2] for r in records]
            plot_ladder(title, names, [r.arm for r in records], picture(group))
    return 0


if __name__ == "__main__":
    finish(main)
