"""The page of records and comparisons: its figures, its text, its life in a browser."""

import json
import re
import shlex
import shutil
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from forgery import at, forge
from scipy import stats as scipy_stats
from test_records import PUBLIC_LOG

from tools import comparison, diff, report, runs
from tools.cli import ToolError

EMBEDDED = ROOT / "records/embedded"
PAGE = ROOT / "docs/report.html"
TURNS = [ROOT / f"tests/logs/turns_{n}" for n in (120, 114)]
HOSTILE = "<!--<script>hacked=1;"
VOID = {"meta", "link", "input"}


class Parsed(HTMLParser):
    """A page as a reader of HTML meets it."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.elements, self.words, self.scripts = [], [], {}, []
        self.feed(text)
        assert not self.open, f"{self.open} have no end"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append((tag, dict(attributes).get("id", "")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "script":
            self.scripts.append(data)
        for name in {name for _, name in self.open}:
            self.words.setdefault(name, []).append(data)

    def text(self, name: str = "") -> str:
        """All text inside the element of that id, a space between words."""
        return " ".join(" ".join(self.words[name]).split())

    def all(self, attribute: str) -> list[str]:
        return [given[attribute] for _, given in self.elements if attribute in given]

    @property
    def data(self) -> dict:
        def refuse(name):
            raise ValueError(f"{name} is no JSON")

        return json.loads(self.scripts[0], parse_constant=refuse)


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


@pytest.fixture(scope="module")
def records() -> Parsed:
    return Parsed(PAGE.read_text())


def logged(folder: Path) -> list[tuple[str, int, float, float]]:
    """(time stamp, seed, seconds, val_loss) of each log of an attempt, read without the tools."""
    found = []
    for log in folder.glob("logs/*.txt"):
        text = log.read_text()
        step = re.findall(r"^step:\d+/\d+ val_loss:(\S+) train_time:(\d+)ms", text, re.M)[-1]
        seed = re.search(r"^seed: (\d+)", text, re.M)[1]
        found.append((log.name, int(seed), int(step[1]) / 1000, float(step[0])))
    return sorted(found)


# ------------------------------------------------------------------------------ The records


def test_the_page_of_the_records_is_fresh(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main(monkeypatch, "records", "-o", "docs/report.html", "--check") == 0, (
        capsys.readouterr()
    )


def test_the_page_needs_nothing_else(records):
    assert PAGE.stat().st_size < 3e6
    assert not records.all("src") and len(records.scripts) == 2
    ids = records.all("id")
    assert len(ids) == len(set(ids))
    for link in records.all("href"):
        known = link[1:] in ids if link.startswith("#") else (PAGE.parent / link).is_file()
        assert known or link == "data:,", link


def test_the_ladder_is_that_of_readme(records):
    rows = re.findall(r"^\| \d+ \| .*", (ROOT / "README.md").read_text(), re.M)
    assert len(rows) >= 6
    text = records.text()
    for row in rows:
        time, gain, loss, steps, what = (cell.strip() for cell in row.split("|")[2:7])
        items = [text[at.end() :][:150] for at in re.finditer(re.escape(what), text)]
        figures = [f"{time.partition(' †')[0]} s", gain, *loss.split(", ")[:2], f"{steps} steps"]
        assert any(all(figure in item for figure in figures) for item in items), (figures, items)


def test_differences_are_those_of_the_raw_logs(records):
    names = "GPT2-AdamW ModernBlock-Adam Muon BytePairs TapsAndKeyOffset".split()
    attempts = [logged(EMBEDDED / f"2026-11-22_{name}") for name in names]
    for place in range(1, 5):
        a, b = (np.array([run[1:] for run in sorted(x, key=lambda r: r[1])])
                for x in attempts[place - 1 : place + 1])  # fmt: skip
        shown = records.data["differences"][f"0-{place}"]
        order = [seed for _, seed, *_ in attempts[place]]
        for kind, (x, y) in {
            "time": np.log((a[:, 1], b[:, 1])),
            "loss": (a[:, 2], b[:, 2]),
        }.items():
            test = scipy_stats.ttest_rel(y, x)
            figures = np.array([(y - x).mean(), *test.confidence_interval(0.95), *(y - x)[order]])
            if kind == "time":
                figures = 100 * np.expm1(figures)
            given = [shown[kind][key] for key in ("change", "low", "high")]
            given += [point[2] for point in shown[kind]["points"]]
            np.testing.assert_allclose(given, figures, rtol=1e-5)


def test_curves_are_those_of_the_raw_logs(records):
    muon = records.data["ladders"][0]["rungs"][2]
    logs = sorted(EMBEDDED.glob("2026-11-22_Muon/logs/*.txt"))
    means = []
    for run, log in zip(muon["runs"], logs, strict=True):
        lines = re.findall(r"^step:(\d+)/500 (val|train)_loss:(\S+) train_time:(\d+)ms",
                           log.read_text(), re.M)  # fmt: skip
        val = [[int(s), int(ms) / 1000, float(x)] for s, kind, x, ms in lines if kind == "val"]
        train = np.array(
            [(int(s), int(ms), float(x)) for s, kind, x, ms in lines if kind == "train"]
        )
        assert run["val"] == val and len(run["train"]) <= report.POINTS
        steps, _, losses, ms = np.array(run["train"]).T
        widths = np.diff(steps, prepend=0)
        assert (widths * losses).sum() / 500 == pytest.approx(train[:, 2].mean(), abs=1e-4)
        total = train[-1, 1] - train[0, 1]  # from the first step, of which no log tells the start
        assert (widths * ms).sum() - ms[0] == pytest.approx(total, abs=5)
        means.append(val)
    np.testing.assert_allclose(muon["mean"]["val"], np.mean(means, 0), rtol=1e-6)


# ------------------------------------------------------------------------------ A against B


def test_a_comparison_says_what_diff_says(made):
    page = made(*TURNS)
    said = diff.text_report(comparison.compare(*map(comparison.Arm.read, TURNS)))
    text = page.text("against-0-1")
    for line in said.splitlines()[1:]:
        first, *cells = re.split(r" {2,}", line)
        for words in cells if first not in ("ENV", "CODE") else ():
            assert words.removeprefix("LOSS") in text, words
    for words in ("VERDICT   B FASTER by 6.00% [4.68, 7.30]", "+0.02353", "in turns of 10 steps"):
        assert words in said and words.removeprefix("VERDICT").strip() in text
    assert "num_steps 120 114" in text and "Source: train_gpt.py +2 -2" in text
    assert [point[1] for point in page.data["differences"]["0-1"]["time"]["points"]] == ["B"] * 10


def one_of(folder: Path) -> Path:
    return next(iter(sorted((folder / "logs").iterdir())))


def public_logs(folder: Path) -> list[Path]:
    for x in "ab":
        (folder / x).mkdir()
        for i in range(3):
            text = PUBLIC_LOG.format(rule="=" * 100, loss=3.27 + i / 1000, ms=1800 + i)
            (folder / x / f"{i}.txt").write_text(text)
    return [folder / x for x in "ab"]


def aborted(folder: Path) -> Path:
    shutil.copytree(TURNS[1] / "logs", folder / "aborted")
    (folder / "sources").symlink_to(ROOT / "tests/logs/sources")
    log = sorted((folder / "aborted").iterdir())[3]
    forge(log, log, ("status:success", "status:aborted"))
    return folder / "aborted"


def test_every_kind_of_comparison_has_its_page(made, tmp_path):
    cases = {
        "two logs": ([one_of(folder) for folder in TURNS], "INCONCLUSIVE"),
        "no pairs": ((ROOT / "tests/logs/steps_120", TURNS[0]), "NOT COMPARABLE"),
        "tasks": (
            (EMBEDDED / "2026-11-22_Default", EMBEDDED / "2026-11-22_Muon"),
            "NOT COMPARABLE",
        ),
        "aborted": ((TURNS[0], aborted(tmp_path)), "REGRESSION"),
        "public": (public_logs(tmp_path), "NOT COMPARABLE"),
        "itself": ((TURNS[0], TURNS[0]), "NOT COMPARABLE"),
    }
    for name, (arms, verdict) in cases.items():
        page = made(*arms)
        assert verdict in page.text("against-0-1"), name
        assert ("time" in page.data["differences"]["0-1"]) == (verdict != "NOT COMPARABLE"), name
        if name == "aborted":
            points = page.data["differences"]["0-1"]["time"]["points"]
            assert [point[1] for point in points].count("B") == 9 and len(points) == 19
            assert sum("unfinished" in run["text"]
                       for run in page.data["ladders"][0]["rungs"][1]["runs"]) == 1  # fmt: skip


def test_curves_without_a_first_step_or_a_loss(monkeypatch):
    resumed = [(step, 1000 + 10 * step, 2.0) for step in range(101, 106)]
    points = [(102, 2.02, 2.0, 10.0), (105, 2.05, 2.0, 10.0)]
    monkeypatch.setattr(report, "POINTS", 2)
    assert report.thinned(resumed) == points
    assert report.thinned([]) == [] and report.mean_curve([]) == []
    nothing = report.plain(report.thinned([(1, 5, float("nan"))]))
    assert nothing == [[1, 0.01, None, None]]


# ------------------------------------------------------------------------------ Text of logs


def hostile_attempts(tmp_path: Path) -> list[Path]:
    """Two attempts whose names, environment and configuration are markup."""
    folders = [tmp_path / f"{HOSTILE}{x}" for x in "ab"]
    (tmp_path / "sources").symlink_to(ROOT / "tests/logs/sources")
    for i, folder in enumerate(folders):
        folder.mkdir(parents=True)
        for k, log in enumerate(sorted((TURNS[i] / "logs").iterdir())):
            name, dated = at(2 * k + i, "x")
            forge(log, folder / f"{name}.txt", *dated, (r"^cpu: .*", f"cpu: {HOSTILE}{i}</pre>"),
                  (r"^val_every: .*", f"val_every: <img src=x onerror=hacked=1>{i}"))  # fmt: skip
    return folders


def test_text_of_logs_is_never_markup(made, tmp_path):
    page = made(*hostile_attempts(tmp_path))
    assert len(page.scripts) == 2 and "<" not in page.scripts[0]
    assert not page.all("onerror") and "img" not in {name for name, _ in page.elements}
    for text in (f"{HOSTILE}a (A)", f"cpu: {HOSTILE}0</pre>", "<img src=x onerror=hacked=1>1"):
        assert text in page.text("against-0-1"), text
    assert page.data["ladders"][0]["rungs"][0]["runs"][0]["text"].startswith(f"1 {HOSTILE}a")


def test_a_source_is_never_markup():
    block = report.diff_block(["---", "+++", "@@ -1 +1 @@", "-</pre><b>", "+{{data}}&amp;"])
    parsed = Parsed(block)
    assert [name for name, _ in parsed.elements] == ["pre", "b", "del", "ins"]
    assert parsed.text() == "@@ -1 +1 @@ -</pre><b> +{{data}}&amp;"


@pytest.mark.parametrize("old, new, shown", [
    ("x = 1\n", "x = 1\n++cheat()\n", "+++cheat()"),
    ("--cheat()\n", "", "---cheat()"),
    ("y = 1 # a\x0ccheat()\n", "y = 1 # a\ncheat()\n", r"-y = 1 # a\u000ccheat()"),
    ("a = 1\n", "a = '\u202e1' #\u2066 '\n", r"+a = '\u202e1' #\u2066 '"),
])  # fmt: skip
def test_no_change_of_a_source_hides(old, new, shown):
    a, b = (runs.LoggedRun(Path(x), sources={"t.py": runs.Source("", x)}) for x in (old, new))
    assert runs.source_changes(a, b)
    block = Parsed(report.diff_block(runs.source_diff(a, b, "t.py")))
    assert shown in block.text()


# ------------------------------------------------------------------------------ The command


def test_check_notices_a_change_and_names_a_command_that_works(monkeypatch, tmp_path, capsys):
    for name in ("2026-11-22_Muon", "2026-11-22_BytePairs"):
        shutil.copytree(EMBEDDED / name, tmp_path / "the records/embedded" / name)
    words = [tmp_path / "the records", "-o", tmp_path / "page.html"]
    assert main(monkeypatch, *words, "--check") == 1
    assert not (tmp_path / "page.html").exists()
    assert main(monkeypatch, *words) == 0 == main(monkeypatch, *words, "--check")
    title = tmp_path / "the records/embedded/2026-11-22_Muon/README.md"
    title.write_text("# Another <title>\n")
    capsys.readouterr()
    assert main(monkeypatch, *words, "--check") == 1
    command = shlex.split(capsys.readouterr().err.partition("run: ")[2])
    assert command[:2] == ["./run.sh", "tools/report.py"] and "stale" not in command
    assert main(monkeypatch, *command[2:]) == 0 == main(monkeypatch, *words, "--check")
    assert "Another <title>" in Parsed((tmp_path / "page.html").read_text()).text()


def test_misuse_is_told_in_words(monkeypatch, tmp_path, capsys):
    page = tmp_path / "x.html"
    with pytest.raises(ToolError, match="to compare two attempts name both"):
        main(monkeypatch, EMBEDDED / "2026-11-22_Muon", "-o", page)
    for words in ((EMBEDDED, "-o", page, "--same_host"), (EMBEDDED,)):
        with pytest.raises(SystemExit, match="2"):
            main(monkeypatch, *words)
    with pytest.raises(ToolError, match="No such file"):
        main(monkeypatch, tmp_path / "none.txt", TURNS[0], "-o", page)
    assert not page.exists()


# ------------------------------------------------------------------------------ In a browser

CHROMIUM, CHROMEDRIVER = map(shutil.which, ("chromium", "chromedriver"))
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER and find_spec("selenium")),
    reason="needs chromium and chromedriver (apt-get install chromium-driver), and selenium (PyPI)",
)
WATCH_LAYOUT = """
window.shift = 0;
const addShift = (entry) => { if (!entry.hadRecentInput) shift += entry.value; };
new PerformanceObserver((list) => list.getEntries().forEach(addShift))
  .observe({type: "layout-shift", buffered: true});
"""


@pytest.fixture
def browse(monkeypatch):
    """Opens a file in headless Chromium, so many pixels wide, light or dark."""
    from selenium import webdriver

    options, service = webdriver.ChromeOptions(), webdriver.ChromeService(CHROMEDRIVER)
    options.binary_location = CHROMIUM
    for word in ("headless=new", "no-sandbox", "disable-dev-shm-usage"):
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options, service)
    browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH_LAYOUT})

    def open_(path: Path, width: int, scheme: str):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        browser.get(path.as_uri())
        browser.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0]))")
        return browser

    yield open_
    browser.quit()


def is_still(browser) -> None:
    """Nothing moved, nothing is wider than the window, nothing was wrong, nothing was fetched."""
    widths = "return [document.documentElement.scrollWidth, window.innerWidth]"
    wide, window = browser.execute_script(widths)
    assert wide <= window and browser.execute_script("return window.shift") == 0
    assert not browser.get_log("browser")
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [message["params"]["request"]["url"] for message in sent
            if message["method"] == "Network.requestWillBeSent"]  # fmt: skip
    assert all(url.startswith(("file:", "data:")) for url in urls), urls


def lines(browser, number: int, chart: str) -> list[list[str]]:
    """[class, points] of each line of one of a ladder's charts."""
    box = f'.chart[data-ladder="{number}"][data-chart="{chart}"] polyline'
    script = """return [...document.querySelectorAll(arguments[0])]
        .map((line) => [line.getAttribute("class"), line.getAttribute("points")])"""
    return browser.execute_script(script, box)


def lightness(browser) -> int:
    """Red of the page's background, 0 to 255."""
    style = "return getComputedStyle(document.body).backgroundColor"
    return int(re.search(r"\d+", browser.execute_script(style))[0])


def touch_center(browser, element) -> None:
    """A finger on the middle of an element of the window, and off again."""
    place = "const r = arguments[0].getBoundingClientRect(); return [r.x, r.y, r.width, r.height]"
    left, top, width, height = browser.execute_script(place, element)
    middle = {"x": left + width / 2, "y": top + height / 2}
    for kind, points in (("touchStart", [middle]), ("touchEnd", [])):
        browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("width, scheme", [(1280, "light"), (360, "dark")])
def test_the_page_works_in_a_browser(browse, width, scheme):
    browser = browse(PAGE, width, scheme)
    is_still(browser)
    assert (lightness(browser) > 128) == (scheme == "light")
    for svg in browser.find_elements("css selector", ".chart svg"):
        assert svg.find_elements("css selector", "polyline")
    for link in browser.find_elements("css selector", 'a[href^="#"]'):
        place = link.get_attribute("href").partition("#")[2]
        link.click()
        top = "return document.getElementById(arguments[0]).getBoundingClientRect().top"
        end = "return scrollY + innerHeight >= document.documentElement.scrollHeight - 2"
        assert abs(browser.execute_script(top, place)) < 2 or browser.execute_script(end)
    for switch in browser.find_elements("css selector", ".controls input:not(:checked)"):
        number = int(switch.get_attribute("name").rpartition("-")[2])
        before = [lines(browser, number, chart) for chart in ("loss", "ms")]
        switch.click()
        after = [lines(browser, number, chart) for chart in ("loss", "ms")]
        assert before[0] != after[0]
        assert (before[1] != after[1]) == switch.get_attribute("name").startswith("by")
    boxes = browser.find_elements("css selector", "[name=shown-1]")
    for left, box in enumerate(boxes, 1):
        box.click()
        shown = [style for style, _ in lines(browser, 1, "loss")]
        assert sum(style.startswith("mean") for style in shown) == len(boxes) - left
    assert not lines(browser, 1, "ms")
    boxes[0].click()
    is_still(browser)


@pytest.mark.slow
@needs_browser
def test_the_page_works_by_keyboard_and_pointer(browse, made, tmp_path):
    from selenium.webdriver import ActionChains, Keys

    made(*TURNS)
    browser = browse(tmp_path / "page.html", 1280, "light")

    def press(key) -> str:
        browser.switch_to.active_element.send_keys(key)
        tips = browser.find_elements("css selector", ".tip:not(:empty)")
        return tips[0].text if tips else ""

    stops, tip = [], press(Keys.TAB)
    while (element := browser.switch_to.active_element) not in stops:
        stops.append(element)
        if element.tag_name == "svg":
            assert tip and press(Keys.ARROW_RIGHT) != tip and press(Keys.ARROW_DOWN) != tip
            assert not press(Keys.ESCAPE)
        elif element.tag_name == "summary":
            press(Keys.ENTER)
        elif element.get_attribute("type") == "radio":
            press(Keys.ARROW_RIGHT)
        tip = press(Keys.TAB)
    names = [element.tag_name for element in stops]
    assert [names.count(x) for x in ("input", "svg", "summary", "pre")] == [4, 4, 3, 1]
    assert len(browser.find_elements("css selector", "details[open]")) == 3
    mean = browser.find_element("css selector", '[data-chart="ms"] polyline.mean')
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", mean)
    ActionChains(browser).move_to_element(mean).perform()
    tip = browser.find_element("css selector", '[data-chart="ms"] .tip').text
    assert re.search(r"turns_1\d\d, (mean|seed \d)\nstep \d+, [\d.]+ s\n[\d.]+ ms a step", tip)
    ActionChains(browser).move_to_element(browser.find_element("css selector", "h1")).perform()
    assert not browser.find_elements("css selector", ".tip:not(:empty)")
    touch_center(browser, mean)
    assert browser.find_elements("css selector", '[data-chart="ms"] .tip:not(:empty)')
    is_still(browser)


@pytest.mark.slow
@needs_browser
def test_text_of_logs_does_nothing_in_a_browser(browse, made, tmp_path):
    made(*hostile_attempts(tmp_path))
    browser = browse(tmp_path / "page.html", 360, "light")
    assert browser.execute_script("return typeof hacked") == "undefined"
    assert len(browser.find_elements("css selector", "script")) == 2
    assert not browser.find_elements("css selector", "img")
    assert browser.find_elements("css selector", "#against-0-1 polyline")
    is_still(browser)
