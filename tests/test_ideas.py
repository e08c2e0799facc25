"""A campaign of ideas in a checkout of its own, whose trainer is the stand-in."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from conftest import ROOT, clean_environment
from test_records import STAND_IN, compared

from tools import ideas, stats

NO_PROBE = """
def both_runs(attempt):
    return ()


def findings(across_documents):
    return [("validation rows", "fewer than the track's")]
"""


class Checkout:
    """A run's time is `ms`, or one more; less than its process takes."""

    def __init__(self, folder: Path):
        self.root, self.campaign = folder / "checkout", folder / "campaign"
        for name in ("tools", "referee", "data"):
            shutil.copytree(ROOT / name, self.root / name, ignore=shutil.ignore_patterns("*.bin"))
        (self.root / "tools/probe.py").write_text(NO_PROBE)
        with (self.root / "tools/audit.py").open("a") as file:
            file.write("\n\ndef check_referee(run):\n    return []\n")  # the stand-in has none
        shutil.copy(STAND_IN / "kernels.py", self.root)
        self.change("first", 50)

    def change(self, comment: str, ms: int) -> None:
        """Another source: with other times, or with another comment alone."""
        text = f"# {comment}\n" + (STAND_IN / "train_gpt.py").read_text()
        for old, new in (
            ("ms: int = 20 ", f"ms: int = {ms} "),
            ("args.ms + args.seed", "args.ms + hash(str(sys.argv)) % 2"),
            ("loss_of(args.seed)", "loss_of(args.seed % 1000)"),
        ):
            assert old in text
            text = text.replace(old, new)
        (self.root / "train_gpt.py").write_text(text)

    def start(self, command: str, *words) -> subprocess.Popen:
        script = [sys.executable, str(self.root / "tools/ideas.py"), command, str(self.campaign)]
        return subprocess.Popen([*script, *map(str, words)], env=clean_environment(), text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip

    def run(self, command: str, *words) -> tuple[int, str]:
        process = self.start(command, *words)
        out, err = process.communicate()
        return process.returncode, out + err

    def ledger(self) -> list[dict]:
        return [json.loads(line) for line in self.run("list", "--json")[1].splitlines()]

    def logs(self, arm: str) -> list[str]:
        return sorted(path.name for path in self.campaign.glob(f"{arm}/logs/*.txt"))


def test_a_campaign_keeps_what_is_faster_and_runs_nothing_twice(tmp_path):
    checkout = Checkout(tmp_path)
    assert "is no campaign" in checkout.run("list")[1]
    for words, said in ((["--turns", -1], "at least 0"), (["--seed", 3], "leave it out")):
        code, out = checkout.run("begin", *words)
        assert code == 2 and said in out and not checkout.campaign.exists()
    assert checkout.run("begin", "--turns", 0) == (0, "")
    for comment, ms, code in (("slow", 60, 1), ("fast", 40, 0), ("fast, again", 40, 0)):
        checkout.change(comment, ms)
        found, said = checkout.run("test", "-m", comment)
        assert found == code, said
    first, slow, fast = checkout.ledger()
    assert [x["decision"] for x in (first, slow, fast)] == ["keep", "discard", "keep"]
    assert fast["against"] == 0 and fast["low"] < fast["change"] < fast["high"] < -0.1
    assert 3 <= fast["pairs"] == len(checkout.logs("002/A")) == len(checkout.logs("002/B")) < 20
    assert not list(checkout.campaign.glob("00[12]/*/source"))  # a diff says it
    assert (checkout.campaign / "ideas.png").stat().st_size > 1000
    for path in ("referee/clock.py", "tools/diff.py"):
        with (checkout.root / path).open("a") as file:
            file.write("# cheaper\n")
    checkout.change("other", 45)
    code, said = checkout.run("test", "-m", "other")
    assert code == 2 and "has another referee/clock.py, tools/diff.py: undo that" in said
    code, said = checkout.run("confirm", "-n", 5)
    assert code == 0 and "VERDICT   B FASTER by" in said, said
    assert checkout.ledger() == [first, slow, fast]
    (checkout.campaign / "001/idea.json").write_text("{")
    code, said = checkout.run("list")
    assert code == 2 and "001/idea.json is damaged" in said and said.count("\n") == 1


def test_a_killed_campaign_goes_on_and_counts_no_pair_twice(tmp_path):
    checkout = Checkout(tmp_path)
    checkout.run("begin", "--turns", 0)
    checkout.change("fast", 40)
    process = checkout.start("test", "-m", "fast")
    while len(checkout.logs("001/?")) < 3:  # one of the second pair
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    code, said = checkout.run("test", "-m", "beside")
    assert code == 2 and f"another race runs {checkout.campaign};" in said
    assert [line["decision"] for line in checkout.ledger()] == ["keep", ""]
    process.kill()
    process.communicate()
    elsewhere = next(checkout.campaign.glob("001/B/logs/*_1000_*.host"))
    elsewhere.write_text("another")
    checkout.change("slow", 60)
    code, said = checkout.run("test", "-m", "slow")
    assert code == 1, said
    assert [(x["message"], x["decision"]) for x in checkout.ledger()[1:]] == [
        ("fast", "keep"), ("slow", "discard")]  # fmt: skip
    for idea in ("001", "002"):
        a, b = ([int(name.split("_")[2]) for name in checkout.logs(f"{idea}/{x}")] for x in "AB")
        assert a == b == list(range(1000 * int(idea), 1000 * int(idea) + len(a)))
    assert len(list(checkout.campaign.glob("001/set_aside/*_1000_*.txt"))) == 2


@pytest.mark.parametrize("judge, change, decision, why", [
    ("time", {}, "keep", "FASTER by"),
    ("time", {"b_seconds": 80}, "discard", "a gain of 0.01 is excluded"),
    ("time", {"b_seconds": 84}, "discard", "REGRESSION slower"),
    ("time", {"b_loss": 1.02}, "discard", "REGRESSION B's mean loss is above the target"),
    ("time", {"time_sd": 0.05}, "", "may be noise"),
    ("loss", {"b_loss": 0.96, "b_seconds": 81}, "keep", "time +1."),
    ("loss", {}, "discard", "a gain of 0.002 is excluded"),
    ("loss", {"b_loss": 0.985}, "discard", "a gain of 0.002 is excluded"),
    ("target", {"b_loss": 0.99}, "keep", "loss +0.01"),
    ("target", {"b_loss": 1.005}, "discard", "a run missed the target"),
    ("time", {"change": lambda run: run.result.update(status="diverged")}, "discard", "diverged"),
    ("loss", {"change": lambda run: run.config.update(seed="3")}, "undecided", "more than once"),
])  # fmt: skip
def test_each_judge_decides_by_its_own_figure(judge, change, decision, why):
    change = {"loss_sd": 0.0005, **change}
    c = compared(**change)
    for run in c.a.runs + c.b.runs:
        reached = run.val_loss < 1
        run.result["time_to_target"] = f"{1000 * run.train_s}ms" if reached else "none"
    found = ideas.decide(c, judge)
    assert found[0] == decision and why in found[1], found


def test_looks_after_every_pair_err_as_often_as_is_said():
    """Against paths of t-statistics from running sums, and Pocock's level by their minimum."""
    n = np.arange(stats.MIN_RUNS, stats.MOST_LOOKS + 1)
    x = np.random.default_rng(0).standard_normal((40_000, stats.MOST_LOOKS))
    mean = (x.cumsum(1) / np.arange(1, stats.MOST_LOOKS + 1))[:, n - 1]
    variance = ((x**2).cumsum(1)[:, n - 1] - n * mean**2) / (n - 1)
    p = scipy.stats.t.sf(mean / np.sqrt(variance / n), n - 1)
    found = [(p < level).any(1).mean() for level in (stats.ALPHA_LOOK / 2, stats.ALPHA_LOOK)]
    assert found == pytest.approx([0.005, 0.01], abs=0.0015)
    outside = (2 * np.minimum(p, 1 - p) < 1 - stats.CONFIDENCE_LOOK).any(1).mean()
    assert outside == pytest.approx(0.05, abs=0.004)
    few, many = (stats.absolute(x[0, :9], x[1, :9] + 1, True, level) for level in
                 (stats.ALPHA_DECLARED, stats.ALPHA_LOOK))  # fmt: skip
    assert few.p == many.p and many.low < few.low < few.high < many.high
