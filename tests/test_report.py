"""The page of records and comparisons: its figures, its text, and that nothing in it can run."""

import base64
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import ROOT
from forgery import at, forge
from test_records import PUBLIC_LOG

from tools import comparison, diff, report, runs
from tools.cli import ToolError
from tools.sources import kept_texts, write_texts

EMBEDDED, REAL = ROOT / "records/embedded", ROOT / "tests/logs"
TURNS = [REAL / f"turns_{n}" for n in (120, 114)]
HOSTILE = "<!--<script>hacked=1;"


class Parsed(HTMLParser):
    """A page as a reader of HTML meets it."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.words = [], []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words.append(data)

    def all(self, attribute: str) -> list[str]:
        return [given[attribute] for _, given in self.elements if attribute in given]

    @property
    def pictures(self) -> list[str]:
        """The text of each picture, which is SVG."""
        texts = [base64.b64decode(source.partition(",")[2]).decode() for source in self.all("src")]
        assert all(ElementTree.fromstring(text).tag.endswith("svg") for text in texts)
        return texts


def main(monkeypatch, *words) -> int:
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, words)])
    return report.main()


@pytest.fixture
def made(monkeypatch, tmp_path):
    """A page of these two attempts."""

    def make(a: Path, b: Path, *words) -> Parsed:
        assert main(monkeypatch, a, b, "-o", tmp_path / "page.html", *words) == 0
        return Parsed((tmp_path / "page.html").read_text())

    return make


def test_the_page_of_records_needs_nothing_else(monkeypatch, tmp_path):
    """Its table has the rows that README has of these records."""
    out, names = tmp_path / "docs/page.html", ("2026-11-22_Muon", "2026-11-22_BytePairs")
    out.parent.mkdir()
    for name in names:
        shutil.copytree(EMBEDDED / name, tmp_path / "records/embedded" / name)
    assert main(monkeypatch, tmp_path / "records", "-o", out) == 0
    page = Parsed(out.read_text())
    assert len(page.pictures) == 4 and all(x.startswith("data:") for x in page.all("src"))
    assert "script" not in {name for name, _ in page.elements}
    assert any("default-src 'none'" in policy for policy in page.all("content"))
    links = [f"../records/embedded/{name}/README.md" for name in names]
    assert page.all("href") == links and all((out.parent / link).is_file() for link in links)
    for name in names:
        tables = (ROOT / "records/README.md").read_text()
        (row,) = re.findall(rf"^\| \d+ \| .*{name}/README.md.*", tables, re.M)
        time, gain, loss, steps, what = (cell.strip() for cell in row.split("|")[2:7])
        cells = [time.partition(" †")[0], loss.rpartition(",")[0], steps]
        cells += [gain] * (name == names[1])  # against the one before
        shown = page.text.partition(what)[2][:150]
        assert all(cell in shown for cell in cells), (cells, shown)


def test_a_comparison_says_what_diff_says_and_draws_the_raw_logs(made, monkeypatch):
    figures, make = [], report.Figure
    monkeypatch.setattr(
        report, "Figure", lambda **size: figures.append(make(**size)) or figures[-1]
    )
    page = made(*TURNS)
    said = diff.text_report(comparison.compare(*map(comparison.Arm.read, TURNS)))
    assert "VERDICT   B INCONCLUSIVE -6.00% [-7.30, -4.68], but order by hand" in said
    assert " ".join(said.split()) in page.text
    for words in ("num_steps: 120 -> 114", "Source: train_gpt.py +2 -2", "+ val_every=114,"):
        assert words in page.text, words
    assert len(figures) == len(page.pictures) == 4
    by_time, by_step, losses, times = (figure.axes[0] for figure in figures)
    assert "train_loss" in by_time.get_ylabel()  # for each run has one validation
    assert [line.get_xdata()[-1] for line in by_step.lines[:2]] == [120, 114]
    assert len(by_step.lines[0].get_xdata()) == 108
    assert all(tick == int(tick) for tick in times.get_xticks())
    pairs = [line for line in times.lines if line.get_color() == "grey"]
    assert [len(line.get_xdata()) for line in pairs] == [2] * 10
    logs = sorted((log for folder in TURNS for log in (folder / "logs").iterdir()),
                  key=lambda log: log.name)  # fmt: skip
    last = [re.findall(r"^step:\d+/\d+ val_loss:(\S+) train_time:(\d+)ms", log.read_text(), re.M)
            for log in logs]  # fmt: skip
    raw = np.array([validations[-1] for validations in last], float)
    for ax, expected in ((losses, raw[:, 0]), (times, raw[:, 1] / 1000)):
        points = [xy for line in ax.lines if line.get_marker() == "o" for xy in line.get_xydata()]
        np.testing.assert_allclose(sorted(map(tuple, points)),
                                   list(zip(range(1, 21), expected, strict=True)))  # fmt: skip
    assert by_time.lines[0].get_xdata()[-1] == pytest.approx(6.503, abs=0.01)


def public_logs(folder: Path) -> list[Path]:
    for x in "ab":
        (folder / x).mkdir()
        for i in range(3):
            text = PUBLIC_LOG.format(rule="=" * 100, loss=3.27 + i / 1000, ms=1800 + i)
            (folder / x / f"{i}.txt").write_text(text)
    return [folder / x for x in "ab"]


def aborted(folder: Path) -> Path:
    shutil.copytree(TURNS[1] / "logs", folder / "aborted/logs")
    write_texts(kept_texts(TURNS[1]), folder / "aborted/source")
    log = sorted((folder / "aborted/logs").iterdir())[3]
    forge(log, log, ("status:success", "status:aborted"))
    return folder / "aborted"


def test_every_kind_of_comparison_has_its_page(made, tmp_path):
    two_logs = [sorted((folder / "logs").iterdir())[0] for folder in TURNS]
    cases = {
        "two logs": (two_logs, "INCONCLUSIVE"),
        "turns": ((REAL / "same", TURNS[0]), "NOT COMPARABLE"),
        "sources in logs": ((EMBEDDED / "2026-11-22_Default", TURNS[0]), "NOT COMPARABLE"),
        "aborted": ((TURNS[0], aborted(tmp_path)), "REGRESSION"),
        "public": (public_logs(tmp_path), "INCONCLUSIVE"),
        "itself": ((TURNS[0], TURNS[0]), "NOT COMPARABLE"),
    }
    for name, (arms, verdict) in cases.items():
        page = made(*arms)
        assert page.text.count(f" B {verdict} ") == 2 and len(page.pictures) == 4, name


def test_text_of_logs_is_never_markup(made, tmp_path):
    folders = [tmp_path / f"{HOSTILE}{x}" for x in "ab"]
    for i, folder in enumerate(folders):
        write_texts(kept_texts(TURNS[i]), folder / "source")
        (folder / "logs").mkdir()
        for k, log in enumerate(sorted((TURNS[i] / "logs").iterdir())):
            name, dated = at(2 * k + i, "x")
            forge(log, folder / f"logs/{name}.txt", *dated,
                  (r"^cpu: .*", f"cpu: {HOSTILE}{i}</pre>"),
                  (r"^val_every: .*", f"val_every: <img src=x onerror=hacked=1>{i}"))  # fmt: skip
    page = made(*folders)
    assert "script" not in {name for name, _ in page.elements} and not page.all("onerror")
    assert len(page.pictures) == 4
    for text in (f"against {HOSTILE}a", f"cpu: {HOSTILE}0</pre>", "<img src=x onerror=hacked=1>1"):
        assert text in page.text, text


@pytest.mark.parametrize("old, new, shown", [
    ("x = 1\n", "x = 1\n++cheat()\n", "+++cheat()"),
    ("--cheat()\n", "", "---cheat()"),
    ("", "</pre><b>{{x}}&amp;\n", "+</pre><b>{{x}}&amp;"),
    ("y = 1 # a\x0ccheat()\n", "y = 1 # a\ncheat()\n", r"-y = 1 # a\u000ccheat()"),
    ("a = 1\n", "a = '\u202e1' #\u2066 '\n", r"+a = '\u202e1' #\u2066 '"),
])  # fmt: skip
def test_no_change_of_a_source_hides(old, new, shown):
    a, b = (runs.LoggedRun(Path(x), sources={"t.py": runs.Source("", x)}) for x in (old, new))
    assert runs.source_changes(a, b)
    block = Parsed(report.folded("t.py", runs.source_diff(a, b, "t.py")))
    assert [name for name, _ in block.elements] == ["details", "summary", "pre"]
    assert shown in block.text


def test_misuse_is_told_in_words(monkeypatch, tmp_path, capsys):
    page = tmp_path / "x.html"
    with pytest.raises(ToolError, match="to compare two attempts name both"):
        main(monkeypatch, EMBEDDED / "2026-11-22_Muon", "-o", page)
    for words in ((EMBEDDED, "-o", page, "--target=1"), (EMBEDDED,)):
        with pytest.raises(SystemExit, match="2"):
            main(monkeypatch, *words)
    with pytest.raises(ToolError, match="No such file"):
        main(monkeypatch, tmp_path / "none.txt", TURNS[0], "-o", page)
    assert not page.exists()
