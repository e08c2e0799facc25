"""The record tools: what they read, what they refuse, what they claim."""

import difflib
import hashlib
import io
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from conftest import ROOT, clean_environment, only_log, tiny_flags, train
from forgery import at, forge
from scipy import special

from referee.sources import source_texts
from tools import attempts, audit, comparison, leaderboard, runs, sources, stats
from tools.cli import InvalidLog, ToolError

RECORDS = sorted(ROOT.glob("records/*/20*/logs/*.txt"))
STAND_IN = ROOT / "tests/stand_in"  # a checkout whose trainer invents its figures
REAL_LOGS = sorted(ROOT.glob("tests/logs/*/logs/*.txt"))
PUBLIC_LOG = """import os
print("step:1/2 val_loss:9.9 train_time:1ms step_avg:1ms")
{rule}
Running Python 3.12.8
Running PyTorch 2.9.0+cu126 compiled for CUDA 12.6
|   0  NVIDIA H100 80GB HBM3          Off |
|   1  NVIDIA H100 80GB HBM3          Off |
{rule}
step:0/20 val_loss:10.8258 train_time:0ms step_avg:0.02ms
step:10/20 train_time:900ms step_avg:90.00ms
step:20/20 val_loss:{loss} train_time:{ms}ms step_avg:90.00ms
peak memory allocated: 28769 MiB reserved: 30000 MiB
"""


def tool(name: str, *words, **changes) -> subprocess.CompletedProcess:
    """A command of tools/; in this process, which has its imports, unless it starts runs."""
    command = [str(ROOT / "tools" / f"{name}.py"), *map(str, words)]
    if name in ("race", "replay"):
        return subprocess.run([sys.executable, *command], env=clean_environment(**changes),
                              capture_output=True, text=True, timeout=300)  # fmt: skip
    out, err = (io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", command)
        patch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(command[0], run_name="__main__")
    said = (stream.buffer.getvalue().decode() for stream in (out, err))
    return subprocess.CompletedProcess(command, stop.value.code, *said)


def test_judges_do_not_import_torch():
    code = (
        "import sys, tools.validate, tools.diff, tools.leaderboard; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


@pytest.fixture(scope="module")
def log(shards, tmp_path_factory) -> Path:
    """A whole log of a short run, its source inside."""
    folder = tmp_path_factory.mktemp("run")
    tiny = "--num_steps=20 --val_every=5 --target_val_loss=9".split()
    done = train([*tiny_flags(shards, folder), *tiny])
    assert done.returncode == 0, done.stderr
    return only_log(folder)


# ------------------------------------------------------------------------------ Reading


def test_a_log_is_read_as_it_was_written(log):
    run, text = runs.read_log(log), log.read_text()
    assert not run.faults
    assert run.sources["train_gpt.py"].text == (ROOT / "train_gpt.py").read_text()
    losses = re.findall(r"^step:(\d+)/20 val_loss:(\S+) train_time:(\d+)ms step_avg", text, re.M)
    assert run.val_curve == [(int(s), float(ms), float(loss)) for s, loss, ms in losses]
    assert [step for step, *_ in run.val_curve] == [0, 5, 10, 15, 20]
    assert len(run.train_curve) == 20 and len(run.calibrations) == 2
    assert run.config["num_steps"] == "20" and run.environment["torch"].startswith("2.")
    assert run.ledger["total"] == pytest.approx(sum(run.ledger.values()) / 2, rel=0.01)


def test_every_changed_line_is_found_and_its_range_named(log, tmp_path):
    lines = log.read_text().splitlines()
    rng, missed = random.Random(0), []
    for _ in range(60):
        at = rng.randrange(len(lines))
        changed = list(lines)
        digits = [i for i, c in enumerate(changed[at]) if c.isalnum()]
        if not digits or changed[at].startswith("check: "):
            continue
        place = rng.choice(digits)
        new = "7" if changed[at][place] != "7" else "3"
        changed[at] = changed[at][:place] + new + changed[at][place + 1 :]
        copy = tmp_path / "changed.txt"
        copy.write_text("\n".join(changed) + "\n")
        try:
            faults = runs.read_log(copy).faults
        except runs.InvalidLog as error:
            assert at == 0, error
            continue
        named = [re.search(r"lines (\d+) to (\d+)", what) for _, what in faults]
        if not any(m and int(m[1]) <= at + 1 <= int(m[2]) for m in named):
            missed += [] if any(line == at + 1 for line, _ in faults) else [lines[at]]
    assert not missed


def test_a_log_with_a_line_cut_off_inserted_or_dropped_is_invalid(log, tmp_path):
    text = log.read_text()
    for share in (0.3, 0.9, 0.999):
        head = text[: int(share * len(text))]
        (tmp_path / "cut.txt").write_text(head)
        faults = runs.read_log(tmp_path / "cut.txt").faults
        assert any("cut" in what and abs(line - head.count("\n") - 1) <= 1 for line, what in faults)
    before, line, after = re.split(r"^(step:12/.*\n)", text, flags=re.M)
    for changed in (before + after, before + 2 * line + after):
        (tmp_path / "x.txt").write_text(changed)
        assert runs.read_log(tmp_path / "x.txt").faults


@pytest.mark.parametrize(
    "pattern, new, message",
    [
        (r"^=== environment ===", "=== surroundings ===", "unknown section"),
        (r"^(=== data ===)", "=== config ===\nseed: 0\n\\1", "a second section config"),
        (r"^(seed: .*)", "\\1\n\\1", "a second line of seed"),
        (r"^(step:10/20 train.* train_time:)\d+", "\\g<1>0", "do not rise"),
    ],
)
def test_a_log_that_contradicts_itself_is_invalid_though_its_hashes_fit(
    log, tmp_path, pattern, new, message
):
    forged = forge(log, tmp_path / "forged.txt", (pattern, new))
    assert any(message in what for _, what in runs.read_log(forged).faults)


@pytest.mark.parametrize(
    "pattern, new",
    [
        (r"^argv: .*", "argv: {"),
        (r"^argv: .*", "argv: 5"),
        (r"^vocab_size: .*", "vocab_size: many"),
        (r"^target_val_loss: .*", "target_val_loss: low"),
        (r"^declared_runs: .*", "declared_runs: some"),
        (r"^calibration: .*", "calibration: fast"),
        (r"^ledger: .*", "ledger: startup:s"),
        (r"^(step:10/20 val_loss:)\S+", r"\1good"),
        (r"^=== data ===", "===  ==="),
        (r"^(=== git .* lines:)\d+", r"\1x"),
        (r"^check: \w+\n=== config", "check: \n=== config"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(log, tmp_path, pattern, new):
    old = log.read_text()
    changed = re.sub(pattern, new, old, flags=re.M)
    (tmp_path / "x.txt").write_text(changed)
    pairs = zip(old.splitlines(), changed.splitlines(), strict=True)
    at = next(i for i, (before, after) in enumerate(pairs, start=1) if before != after)
    faults = runs.read_log(tmp_path / "x.txt").faults
    assert (at, "cannot be read") in [(line, what.partition(":")[0]) for line, what in faults]


def test_validate_says_yes_to_a_record_and_no_with_reasons(log, tmp_path):
    record = shutil.copytree(ROOT / "records/embedded/2026-11-22_Muon", tmp_path / "a")
    shutil.copytree(record, tmp_path / "below/b")
    good, bad = runs.find_logs(record)[0], tmp_path / "bad.txt"
    bad.write_text(log.read_text().replace("step:9/20", "step:8/20"))
    done = tool("validate", record, tmp_path / "below")
    assert done.returncode == 0 and done.stdout.count("5 sound logs, eligible") == 2, done.stdout
    assert tool("validate", log).returncode == 1
    done = tool("validate", good, bad, log)  # a log alone is not the attempt that was declared
    assert done.returncode == 4 and re.search(rf"INVALID   {bad}:\d+: ", done.stdout)
    assert "5 runs were declared, 1 are there" in done.stdout
    last = "3 logs: 2 sound, 1 invalid; 3 attempts: 0 eligible for a record (a try need not be)"
    assert done.stdout.splitlines()[-1] == last


OLDER_PUBLIC_LOG = """import os
run_id = "{id}"
{rule}
Running pytorch 2.6.0 compiled for CUDA 12.4
|   0  NVIDIA H100 80GB HBM3          On  | 00000000:19:00.0 Off |                    0 |
{rule}
Training DataLoader: total number of tokens: 1100000000 across 11 files
{rule}
step:0/20 val_loss:10.8258 train_time:0ms step_avg:nanms
step:20/20 val_loss:3.2771 train_time:1800ms step_avg:90.00ms
"""
PUBLIC_LOG_IN_SECONDS = """import os
{rule}
Running PyTorch 2.10.0+cu128 compiled for CUDA 12.8
Running on device_name=NVIDIA H100 80GB HBM3 with world_size=8
{rule}
step:0/20 val_loss:10.82584 train_time:0.000s step_avg:0.21ms
step:10/20 train_time:339.101s step_avg:33910.10ms
step:20/20 val_loss:3.27710 train_time:678.200s step_avg:33910.00ms
"""
PUBLIC_RUNS = """import os
{rule}
Running PyTorch 2.11.0+cu128 compiled for CUDA 12.8
{rule}
step:0/30 val_loss:10.8 train_time:0.000s step_avg:nanms
step:20/30 val_loss:3.3 val_ema_loss:3.2 beta:-1e-3 train_time:9.500s step_avg:475.00ms x:y
step:0/30 val_loss:10.8 train_time:0.000s step_avg:nanms
step:20/30 val_loss:3.4 train_time:9.600s step_avg:480.00ms
step:0/30 val_loss:10.8 train_time:0.000s step_avg:nanms
step:15/30 train_time:7.500s step_avg:500.00ms
"""


def test_every_public_format_is_read_or_named(tmp_path):
    for name, form in (("one", OLDER_PUBLIC_LOG), ("two", OLDER_PUBLIC_LOG), ("new", PUBLIC_LOG),
                       ("s", PUBLIC_LOG_IN_SECONDS)):  # fmt: skip
        text = form.format(rule="=" * 100, id=name, loss=3.2771, ms=1800)
        (tmp_path / f"{name}.txt").write_text(text)
    one, two, new, seconds = (
        runs.read_log(tmp_path / f"{n}.txt") for n in ("one", "two", "new", "s")
    )
    assert one.environment["device"] == "H100 80GB HBM3" and one.environment["torch"] == "2.6.0"
    assert "NVIDIA" not in one.sources["train_gpt.py"].text
    assert not runs.source_changes(one, two) and one.finished
    assert new.val_curve == [(0, 0.0, 10.8258), (20, 1800.0, 3.2771)] and new.finished
    assert new.environment["torch"] == "2.9.0+cu126" and new.environment["world_size"] == "2"
    assert new.number("peak_memory") == 28769 and audit.objections([new])
    assert seconds.val_curve[-1] == (20, 678200.0, 3.2771) and seconds.finished
    assert seconds.environment["world_size"] == "8"
    many = tmp_path / "many.txt"
    many.write_text(PUBLIC_RUNS.format(rule="=" * 100))
    first, second, broken = runs.read_arm(many)
    assert first.val_curve[-1] == (20, 9500.0, 3.3) and second.val_loss == 3.4
    assert first.finished and second.finished and not broken.finished  # it ends in training
    assert len({first.name, second.name, broken.name}) == 3 and first.environment["torch"]
    with pytest.raises(InvalidLog, match="it holds 3 runs"):
        runs.read_log(many)
    (tmp_path / "main.log").write_text("s:0 tel:11.0092\ns:0 trl:11.0091 lr:0.000001 norm:15.37\n")
    with pytest.raises(InvalidLog, match="llm.c"):
        runs.read_log(tmp_path / "main.log")


def test_public_logs_are_compared_and_claim_nothing(tmp_path):
    """Two arms of one folder, beside notes that are no log."""
    for name, ms in (("a", (1800, 1802, 1801, 1803, 1799)), ("b", (1700, 1702, 1699, 1701, 1703))):
        for i, x in enumerate(ms):
            text = PUBLIC_LOG.format(rule="=" * 100, loss=3.27 + i / 1e4, ms=x)
            (tmp_path / f"{name}_{i}.txt").write_text(text)
    (tmp_path / "metadata.txt").write_text("8xH100\n")
    assert len(runs.read_arm(tmp_path)) == 10
    done = tool("diff", tmp_path / "a*", tmp_path / "b*", "--target=3.28")
    assert done.returncode == 5 and "VERDICT   B INCONCLUSIVE -5.55%" in done.stdout
    assert "hosts unknown" in done.stdout and "n=5" in done.stdout
    assert "order by hand" in done.stdout and "logs of the public speedrun" in done.stdout


# ------------------------------------------------------------------------------ Statistics


@pytest.mark.parametrize("paired", [False, True])
def test_the_t_tests_are_those_of_scipy(paired):
    rng = np.random.default_rng(0)
    a = rng.normal(10, 1, 8)
    b = a + rng.normal(0.1, 0.2, 8) if paired else rng.normal(10.5, 2, 11)
    test = scipy.stats.ttest_rel if paired else partial(scipy.stats.ttest_ind, equal_var=False)
    found, expected = stats.absolute(a, b, paired), test(b, a)
    interval = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    not_worse = test(b - stats.LOSS_MARGIN, a, alternative="less").pvalue
    assert stats.not_worse(a, b, paired) == pytest.approx(not_worse, rel=1e-9)
    above = scipy.stats.ttest_1samp(a, 9.5, alternative="greater").pvalue
    assert stats.missed_p(a, 9.5) == pytest.approx(above, rel=1e-9)


def test_relative_differences_are_ratios_of_geometric_means():
    a, b = np.array([80.0, 82.0, 81.0]), np.array([40.0, 41.0, 40.5])
    assert stats.relative(a, b).change == pytest.approx(-0.5)
    swapped = stats.relative(b, a)
    assert swapped.change == pytest.approx(1.0) and swapped.low < 1 < swapped.high


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("difference", [0.02, 0.03, 0.05])
def test_runs_needed_find_the_difference_as_often_as_they_say(paired, difference):
    rng = np.random.default_rng(1)
    n = stats.runs_needed(0.02, difference, stats.ALPHA_LOOK, paired)
    a, b = 0.02 * rng.standard_normal((2, 400, n))
    found = [stats.absolute(x, y + difference, paired).p < stats.ALPHA_LOOK
             for x, y in zip(a, b, strict=True)]  # fmt: skip
    assert 0.84 < np.mean(found) < 0.97


def test_what_never_varies_and_what_ran_twice_prove_nothing():
    same, seconds, two = np.full(5, 1.25), np.full(5, 60.0), np.array([0.9, 0.91])
    for paired in (False, True):
        assert stats.absolute(same, same, paired).p == stats.absolute(same, same + 1, paired).p == 1
        assert stats.relative(seconds, 0.98 * seconds, paired).p == 1
        verdict = stats.time_verdict(seconds, seconds, stats.ALPHA_DECLARED, paired)
        assert verdict == "unclear"
    # But losses that are equal pair by pair come of the same arithmetic.
    losses = np.array([1.1, 1.2, 1.3])
    assert stats.not_worse(losses, losses, paired=True) == 0
    assert stats.not_worse(losses, losses + 1e-4, paired=True) == 1
    assert stats.target_p(same, 1.3) == stats.missed_p(same, 1.2) == stats.missed_p(two, 0.5) == 1
    assert stats.relative(two, two - 0.1).p == stats.not_worse(two, two) == 1
    assert math.isnan(stats.sd(two[:1]))


def test_the_target_is_tested_with_room_for_bad_seeds_that_did_not_show():
    """One of 20 worse by 0.02, in five runs of which 77% have none, and losses of all scales."""
    rng = np.random.default_rng(0)
    for sd, allowance in ((0.0005, 0.001), (0.01, 0.008)):
        losses = rng.normal(1, sd, 10)
        losses = 1 + (losses - losses.mean()) * sd / stats.sd(losses)
        t = (0.01 - allowance) / (sd / 10**0.5)
        assert stats.target_p(losses, 1.01) == pytest.approx(special.stdtr(9, -t), rel=1e-6)
    assert stats.target_p(losses[:4], 2.0) == 1  # of fewer than five
    assert stats.missed_p(losses, 0.99) < 0.01 < 0.5 < stats.missed_p(losses, 1.01)
    samples = rng.standard_normal((2, 1000, 10))
    bad = samples[0, :, :5] + ((rng.random((1000, 5)) < 0.05) - 0.05) * 0.02 / 0.0014
    skewed = rng.lognormal(0, 0.8, (1000, 5)) - np.exp(0.32)
    better = samples[1] - 0.003 / 0.0014
    for losses, low, high in ((bad, 0, 19), (skewed, 0, 19), (better, 800, 1000)):
        assert low <= sum(stats.target_p(0.0014 * x, 0.0) < 0.01 for x in losses) <= high


def test_equivalence_is_two_tests_at_the_level_of_one():
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = np.exp(0.0012 * rng.standard_normal((2, 8)))
        logs, error = np.log(b) - np.log(a), 0.0
        error = logs.std(ddof=1) / 8**0.5
        sides = [(stats.FLOOR - logs.mean()) / error, (stats.FLOOR + logs.mean()) / error]
        expected = special.stdtr(7, -min(sides)) < 0.01
        assert (stats.time_verdict(a, b, 0.01, True) == "equivalent") == expected


def test_an_outlier_is_named_in_one_of_a_hundred_samples_without_any():
    rng = np.random.default_rng(0)
    for n in (5, 10):
        named = [stats.outlier(80 + rng.standard_normal(n)) is not None for _ in range(2000)]
        assert 0.004 < np.mean(named) < 0.02
    times = np.array([80.0, 80.1, 79.9, 80.2, 86.0])
    place, share = stats.outlier(times)
    assert place == 4 and share == pytest.approx(86 / 80.05 - 1)
    assert stats.outlier(np.array([80.0, 80.001, 79.999, 80.0, 80.1])) is None  # 0.1%


# ------------------------------------------------------------------------------ Verdicts


audit.known_referees().add(frozenset({("referee/harness.py", audit.git_blob(""))}))


def made_sources(letter: str) -> dict[str, str]:
    return {"train_gpt.py": letter, "referee/harness.py": ""}


def drawn(pairs: int, arms: str = "AB") -> str:
    """The order in which race.py runs the arms that made_runs makes."""
    seed = stats.order_seed([(made_sources(letter), []) for letter in arms])
    return "".join(arms[i] for i, _ in stats.draw_order(2, pairs, seed))


ORDER = drawn(5)


def made_runs(letter: str, seconds, losses, order=ORDER, **config) -> list:
    """Runs as a log would give them; order says where in time this arm's runs stand."""
    places, made = [i for i, x in enumerate(order) if x == letter], []
    for place, s, loss in zip(places, seconds, losses, strict=True):
        entries = {"utc": f"2026-01-01T{place:02}:00:00Z", "target_val_loss": "1.0",
                   "num_steps": "100", "declared_runs": str(len(places)),
                   "seed": str(len(made)), **config}  # fmt: skip
        curve = [(0, 0.0, 5.0), (100, 1000.0 * s, loss)]
        sources = {path: runs.Source(text, text) for path, text in made_sources(letter).items()}
        run = runs.LoggedRun(Path(f"{letter}{place}.txt"), config=entries, val_curve=curve,
                             sources=sources, train_curve=[(1, 0.0, 5.0)])  # fmt: skip
        run.ledger = {"train": s}
        run.environment = {"host": "h", "device": "cpu", "threads": "2", "matmul_dtype": "f"}
        run.result = {"status": "success"}
        made.append(run)
    return made


def arms_compared(a: list, b: list) -> comparison.Comparison:
    return comparison.compare(comparison.Arm("a", a), comparison.Arm("b", b))


def compared(a_seconds=80, b_seconds=76, a_loss=0.98, b_loss=0.98, order=ORDER, change=None,
             time_sd=0.003, loss_sd=0.003, seed=3, host=1.0):  # fmt: skip
    """B against A. change edits B's runs; host multiplies the seconds of each run in order."""
    rng, host = np.random.default_rng(seed), np.resize(host, len(order))
    n, arms = len(order) // 2, []
    for letter, mean, loss in (("A", a_seconds, a_loss), ("B", b_seconds, b_loss)):
        seconds = mean * np.exp(time_sd * rng.standard_normal(n))
        seconds *= host[[x == letter for x in order]]
        losses = loss + loss_sd * rng.standard_normal(n)
        arms.append(made_runs(letter, seconds, losses, order))
    for run in arms[1] if change else []:
        change(run)
    return arms_compared(*arms)


@pytest.mark.parametrize(
    "settings, verdict, code",
    [
        (dict(b_seconds=76), "FASTER", 0),
        (dict(b_seconds=84), "REGRESSION", 1),
        (dict(b_seconds=80), "INCONCLUSIVE", 5),
        (dict(b_loss=1.05), "REGRESSION", 1),
        (dict(a_loss=1.05, b_loss=1.05), "INCONCLUSIVE", 5),
        (dict(a_loss=1.05, b_loss=1.10), "REGRESSION", 1),
        (dict(b_loss=0.9995), "REGRESSION", 1),
        (dict(a_loss=0.9995, b_loss=0.9995), "INCONCLUSIVE", 5),
    ],
)
def test_verdicts_follow_time_target_and_loss(settings, verdict, code):
    c = compared(**settings)
    assert (c.verdict, c.exit_code) == (verdict, code), c.reason


@pytest.mark.parametrize("seconds, claim", [(76, "FASTER"), (80, "EQUIVALENT")])
@pytest.mark.parametrize(
    "a_loss, b_loss, keeps", [(0.9, 0.9, 1), (1.1, 1.1001, 1), (1.1, 1.1015, 0), (0.9, 1.0, 0)]
)
def test_what_claims_time_reaches_the_target_or_keeps_the_loss(
    seconds, claim, a_loss, b_loss, keeps
):
    """The target is 1.0, the margin 0.002; losses scatter by 0.0008."""
    c = compared(80, seconds, a_loss, b_loss, drawn(8), None, 3e-4, 8e-4, seed=1)
    assert (c.verdict == claim) == bool(keeps), c.reason


def test_the_next_step_does_not_deny_what_was_shown():
    c = comparison.compare(*(comparison.Arm.read(REAL / f"turns_{n}") for n in (120, 114)))
    assert c.loss.p < c.level and not any("loss" in step for step in c.next_steps)


def on_a_wandering_host(seeds="01234"):
    """A B that is 4% faster, on a host whose pairs of runs differ by 10%."""
    host = np.exp(np.repeat(0.1 * np.random.default_rng(5).standard_normal(5), 2))
    own = iter(seeds)
    return compared(80, 76.8, change=lambda run: run.config.update(seed=next(own)), host=host)


def test_pairs_by_seed_find_what_a_wandering_host_hides():
    c, apart = on_a_wandering_host(), on_a_wandering_host(seeds="56789")
    assert c.drawn and c.verdict == "FASTER" and c.time.change == pytest.approx(-0.04, abs=0.006)
    assert not apart.in_pairs and apart.verdict == "INCONCLUSIVE"
    sds = (stats.noise(np.log(x.a.times), np.log(x.b.times), x.in_pairs) for x in (c, apart))
    few, many = (stats.runs_needed(sd, 0.04, paired=k == 0) for k, sd in enumerate(sds))
    assert few <= 5 < 50 < many


def test_only_the_order_that_race_py_draws_claims_anything():
    """Fixed orders cancel a drift, but a host that beats with them favours an arm."""
    swapped = ORDER.translate(str.maketrans("AB", "BA"))
    for order in ("ABBAABBAAB", "ABABABABAB", "AAAAABBBBB", swapped):
        for b_seconds in (70, 90):
            c = compared(b_seconds=b_seconds, order=order)
            assert c.verdict == "INCONCLUSIVE" and "but order by hand" in c.reason, c.reason
            assert f"order by hand: {order}" in " ".join(c.warnings)
            assert c.in_pairs == (order != "AAAAABBBBB") and math.isfinite(c.time.low)
    assert compared(b_seconds=70, order=drawn(5, "BA")).verdict == "FASTER"  # race.py B A
    assert compared(b_loss=1.05, order="AAAAABBBBB").verdict == "REGRESSION"  # losses know no drift
    assert not on_a_wandering_host(seeds="01243").drawn


def test_what_makes_times_incomparable():
    def code(change) -> int:
        return compared(change=change).exit_code

    def environment(**entries):
        return lambda run: run.environment.update(entries)

    for changed in (dict(host="other"), dict(threads="4"), dict(device="GPU"),
                    dict(matmul_dtype="b", host="other")):  # fmt: skip
        assert code(environment(**changed)) == 3, changed
    dtypes = iter("fffbb")  # one arm may multiply in bf16, where all its runs do
    assert code(lambda run: run.environment.update(matmul_dtype=next(dtypes))) == 5
    assert compared(change=environment(matmul_dtype="b")).verdict == "FASTER"
    assert code(lambda run: run.data.append("data_sha256: f (x)")) == 3
    for name in ("target_val_loss", "val_tokens", "val_seq_len", "val_spread"):
        assert code(lambda run, n=name: run.config.update({n: "2"})) == 3, name
    mixed = iter("12345")
    assert code(lambda run: run.config.update(muon_lr=next(mixed))) == 5


def test_runs_that_did_not_finish_are_never_dropped():
    for status, verdict in (("aborted", "INCONCLUSIVE"), ("diverged", "REGRESSION")):
        statuses = iter(["success", "success", status, "success", "success"])
        c = compared(b_seconds=40, change=lambda run, s=statuses: run.result.update(status=next(s)))
        assert c.verdict == verdict and any(f"1 of 5 runs {status}" in w for w in c.warnings)
        assert c.b.target_status()[0] == "FAIL"


@pytest.mark.parametrize(
    "changed, words",
    [
        (lambda run: run.config.update(declared_runs="7"), "7 runs were declared, 5 are there"),
        (lambda run: run.config.update(declared_runs="10"), "10 runs were declared, 5 are there"),
        (lambda run: run.seed == "3" and run.config.update(seed="0"), "seed 0 ran more than once"),
        (lambda run: run.seed == "3" and run.config.update(seed="8"), "the seeds are not 0 to 4"),
        (lambda run: run.result.update(resumed_from="50"), "told the train time (5 of 5 runs)"),
    ],
)
def test_runs_taken_away_repeated_or_resumed_prove_no_gain(changed, words):
    assert compared(b_seconds=70).verdict == "FASTER"
    assert compared(b_seconds=70).level == stats.ALPHA_DECLARED
    c = compared(b_seconds=70, change=changed)
    assert c.verdict == "INCONCLUSIVE" and words in " ".join(c.warnings), c.warnings
    assert c.b.target_status()[0] == "open" and any(words in what for what in c.b.obstacles)
    if "declared" in words:  # two declared numbers do not mix
        assert c.level == comparison.Comparison(c.b, c.a).level == stats.ALPHA_LOOK


def test_a_run_is_never_compared_with_itself(log, tmp_path):
    done = tool("diff", log, log)
    assert done.returncode == 3 and "A and B share runs" in done.stdout
    shutil.copy(log, tmp_path / "one.txt")
    shutil.copy(log, tmp_path / "two.txt")
    done = tool("diff", tmp_path, REAL / "same")
    assert done.returncode == 3 and "A: seed 0 ran more than once" in done.stdout


def test_outliers_and_undeclared_counts_are_warned_of():
    def warnings(a, b) -> str:
        return " ".join(arms_compared(a, b).warnings)

    times = {"A": [80, 86, 88, 94, 96], "B": [82, 84, 90, 92, 98]}
    a, b = (made_runs(x, times[x], [0.98] * 5) for x in "AB")
    b[2].environment["numpy"] = "other"
    assert "numpy changed between its runs" in warnings(a, b)
    for run in b:
        run.config.pop("declared_runs")
    b[3].val_curve[-1] = (100, 300e3, 0.98)
    found = warnings(a, b[:4])
    assert "B: run 4 outlier 300.000 s (+251.6% of the others)" in found
    many = made_runs("B", range(80, 101), [0.98] * 21, "B" * 21, declared_runs="0")
    assert "21 runs, not declared before the first" in warnings(a, many)
    assert "not declared" not in found + warnings(a, many[:20])


# ------------------------------------------------------------------------------ Real logs
#
# Made on one shared CPU: the embedded track with 160 steps (10 runs), and with every
# learning rate ten times lower (3 runs, after them); in turns of 10 steps, 120 steps and 114, and
# 120 steps twice (10 runs each).

REAL = ROOT / "tests/logs"


def part_of(arm: str, folder: Path, chosen: slice) -> Path:
    """A copy of a real attempt with some of its logs."""
    shutil.copytree(REAL / arm, folder)
    logs = sorted((folder / "logs").iterdir())
    for log in set(logs) - set(logs[chosen]):
        log.unlink()
    return folder


@pytest.mark.parametrize(
    "first, second", [((0, 10, 2), (1, 10, 2)), ((0, 5, 1), (5, 10, 1)), (0, 0)]
)
def test_identical_runs_do_not_differ(tmp_path, first, second):
    """Two halves of ten runs, and two arms that took turns."""
    arms = REAL / "turns_same_a", REAL / "turns_same_b"
    if first:
        arms = (part_of("same", tmp_path / x, slice(*y)) for x, y in (("a", first), ("b", second)))
    done = tool("diff", *arms)
    assert done.returncode in (0, 5), done.stdout
    assert re.search(r"^VERDICT   B (INCONCLUSIVE|EQUIVALENT)", done.stdout, re.M)


def test_fewer_steps_are_faster_where_they_stand_out_of_the_noise():
    record = ROOT / "records/embedded/2026-11-26_EarlyCopying"
    done = tool("diff", record / "before", record)
    assert done.returncode == 0 and "VERDICT   B FASTER by 52.93% [51.97, 53.87]" in done.stdout
    assert "same host, interleaved, in pairs by seed, in turns of 10 steps" in done.stdout
    rerun = record.with_name("2026-11-26_EarlyCopying_1.34")  # both with --fp32 true
    assert tool("diff", rerun / "taps", rerun).returncode == 0
    done = tool("diff", record, record / "before")
    assert done.returncode == 1 and "VERDICT   B REGRESSION slower by" in done.stdout


def test_five_percent_fewer_steps_show_in_turns_and_claim_nothing_in_an_order_by_hand():
    """Of the same host, whose runs differ by 10%: its speed cancels within a pair."""
    a, b = REAL / "turns_120", REAL / "turns_114"
    done = tool("diff", a, b)
    assert done.returncode == 5, done.stdout
    assert "INCONCLUSIVE -6.00% [-7.30, -4.68], but order by hand" in done.stdout
    assert "num_steps 120 -> 114" in done.stdout and "higher by 0.0235" in done.stdout
    arms = [comparison.Arm.read(folder) for folder in (a, b)]
    gains = np.log(arms[1].times) - np.log(arms[0].times)
    assert gains.std() < 0.02 < 0.05 < np.log(np.concatenate([arm.times for arm in arms])).std()


def test_equal_runs_in_turns_are_not_told_apart():
    a, b = REAL / "turns_same_a", REAL / "turns_same_b"
    report = json.loads(tool("diff", a, b, "--json").stdout)
    assert report["verdict"] == "INCONCLUSIVE" and report["in_pairs"]
    logs = np.log(report["B"]["train_s"]) - np.log(report["A"]["train_s"])
    half = special.stdtrit(9, 0.975) * logs.std(ddof=1) / 10**0.5
    interval = np.expm1([logs.mean() - half, logs.mean() + half])
    assert [report["time"]["low"], report["time"]["high"]] == pytest.approx(interval)
    assert interval[0] < 0 < interval[1]
    assert "race them: ./run.sh tools/race.py A B -n 10" in report["next"]


def test_learning_rates_ten_times_too_low_are_a_regression():
    done = tool("diff", REAL / "same", REAL / "low_rate")
    assert done.returncode == 1 and "VERDICT   B REGRESSION" in done.stdout, done.stdout


# ------------------------------------------------------------------------------ Sources


def stand_in(folder: Path, **changes: str) -> Path:
    """An attempt's folder with the stand-in's source, of which some files are changed."""
    texts = source_texts(STAND_IN, "train_gpt.py") | changes
    sources.write_texts(texts, folder / "source")
    return folder


def test_every_kind_of_import_is_followed(tmp_path):
    sources.write_texts({
        "train_gpt.py": "import os, data.one as one\nfrom data import two\nimport unrelated.x\n",
        "data/one.py": "def f():\n    from data.three import X\n",
        "data/two.py": "import train_gpt\n",
        "data/three.py": "from . import four\nX = 1\n",
        "data/four.py": "",
    }, tmp_path)  # fmt: skip
    found = list(source_texts(tmp_path, "train_gpt.py"))
    assert found == ["train_gpt.py", "data/one.py", "data/three.py", "data/two.py"]


def test_every_module_that_the_trainer_imports_is_in_its_log(log):
    assert list(source_texts(ROOT, "train_gpt.py")) == list(runs.read_log(log).sources)


@pytest.mark.parametrize("ran, told", [("float32", "float32"), ("", "bfloat16")])
def test_all_runs_of_a_race_multiply_as_its_first_did_or_as_is_faster_here(
    tmp_path, monkeypatch, ran, told
):
    """An older source has no option for it."""
    newer = "class RunOptions:\n    cpu_dtype: str = ''\n"
    arms = [attempts.Attempt(name, tmp_path / name, {"train_gpt.py": text}, [])
            for name, text in (("A", newer), ("B", newer), ("Old", "cpu_dtype = 1"))]  # fmt: skip
    logged = runs.LoggedRun(Path("one.txt"), environment={"matmul_dtype": f"torch.{ran}"})
    monkeypatch.setattr(attempts, "read_log", lambda path: logged)
    if ran:
        arms[1].logs.mkdir(parents=True)
        (arms[1].logs / "one.txt").touch()
    measured = subprocess.CompletedProcess([], 0, "torch.bfloat16\n")
    monkeypatch.setattr(attempts.subprocess, "run", lambda *args, **settings: measured)
    attempts.settle_dtype(arms)
    assert [arm.cpu_dtype for arm in arms] == [told, told, ""]


def test_a_frozen_source_takes_no_module_from_a_checkout(tmp_path):
    attempt, checkouts = stand_in(tmp_path / "2026-01-01_A"), f"{STAND_IN}{os.pathsep}{ROOT}"
    (attempt / "source/kernels.py").unlink()
    done = tool("race", attempt, "-n", 1, PYTHONPATH=checkouts)
    assert done.returncode == 2 and not (attempt / "logs").exists()
    assert "train_gpt.py imports kernels.py, which is not kept with it" in done.stderr
    # Nor if it has a module of that name, and the other stands first on the path.
    stand_in(attempt, **{"kernels.py": "def loss_of(seed):\n    return 1.5\n"})
    assert tool("race", attempt, "-n", 1, PYTHONPATH=checkouts).returncode == 0
    assert comparison.Arm.read(attempt).losses == [1.5]


def test_a_source_that_writes_over_its_files_is_not_believed(tmp_path):
    attempt, honest = tmp_path / "2026-01-01_A", (STAND_IN / "kernels.py").read_text()
    kept = str(attempt / "source/kernels.py")
    stand_in(attempt, **{"kernels.py": "from pathlib import Path\n"
        f"for path in (__file__, {kept!r}):\n    Path(path).write_text({honest!r})\n"
        "def loss_of(seed):\n    return 0.03\n"})  # fmt: skip
    done = tool("race", attempt, "-n", 1)
    assert done.returncode == 2 and "names another kernels.py than the one that ran" in done.stderr


def test_a_runs_path_leaves_out_checkouts(tmp_path, monkeypatch):
    path = os.pathsep.join(["", str(ROOT), "/opt/modules", str(STAND_IN)])
    monkeypatch.setenv("PYTHONPATH", path)
    assert attempts.variables(tmp_path)["PYTHONPATH"] == "/opt/modules"


def test_a_log_finds_its_source_by_its_hash(tmp_path):
    attempt, store = stand_in(tmp_path / "x/2026-01-01_A"), tmp_path / "sources"
    assert tool("race", attempt, "-n", 1).returncode == 0
    (log,) = runs.find_logs(attempt)
    whole = runs.read_log(log).sources
    (attempt / "source").rename(store)
    assert len(runs.read_log(log).faults) == 2
    assert "the source kernels.py is not at" in runs.read_log(log).faults[1][1]
    for path in ("train_gpt.py", "kernels.py"):
        (store / path).rename(store / f"{whole[path].sha256[:12]}_{path}")
    found = runs.read_log(log)
    assert not found.faults and found.sources["kernels.py"].kept.parent == store
    assert {p: s.text for p, s in found.sources.items()} == {p: s.text for p, s in whole.items()}
    kept = found.sources["kernels.py"].kept
    kept.write_text(kept.read_text().replace("0.01", "0.02"))
    assert "not what its sha256 says" in runs.read_log(log).faults[0][1]


def test_every_attempt_keeps_the_source_that_its_logs_name():
    folders = {log.parent.parent for log in (*ROOT.glob("records/**/logs/*.txt"), *REAL_LOGS)}
    for folder in folders:
        named = runs.read_log(runs.find_logs(folder)[0]).sources
        kept = {path: sources.sha256_of(text) for path, text in sources.kept_texts(folder).items()}
        assert kept == {path: source.sha256 for path, source in named.items() if source.kept}


def test_files_that_records_share_move_to_a_store(tmp_path, monkeypatch):
    muon = ROOT / "records/embedded/2026-11-22_Muon"
    record, whole = shutil.copytree(muon, tmp_path / "embedded/Muon"), sources.kept_texts(muon)
    sources.write_texts(whole, record / "source")
    monkeypatch.setattr(sources, "ROOT", tmp_path / "nowhere")  # whose store has them already
    sources.share(record, tmp_path / "sources")
    left = {path.relative_to(record).as_posix() for path in record.rglob("*.py")}
    assert left == {"source/train_gpt.py", "source/records/harness.py"}
    (moved,) = (tmp_path / "sources").iterdir()
    assert moved.name == "9a298a10e6ee_shards.py" and moved.read_text() == whole["data/shards.py"]
    assert sources.kept_texts(record) == whole
    assert not both_faults(record)
    moved.unlink()
    assert "the source data/shards.py is not at" in both_faults(record)[0][1]


def test_a_diff_makes_the_text_that_it_was_taken_of():
    rng, made = random.Random(0), []
    for _ in range(300):
        old, new = ([rng.choice("abc") + "\n" for _ in range(rng.randrange(12))] for _ in "ab")
        hunks = list(difflib.unified_diff(old, new, "a/x", "b/x", n=rng.randrange(4)))[2:]
        made.append(sources.patched("".join(old), "".join(hunks)) == "".join(new))
    assert all(made)
    with pytest.raises(ValueError):
        sources.patched("a\nb\n", "@@ -1,2 +1,1 @@\n a\n-c\n")


def test_form_feeds_and_missing_line_ends_survive(tmp_path):
    base, attempt = stand_in(tmp_path / "2026-01-01_Base"), tmp_path / "2026-01-02_Try"
    stand_in(attempt, **{"kernels.py": (STAND_IN / "kernels.py").read_text() + "\x0cb = 2"})
    whole = source_texts(attempt / "source", "train_gpt.py")
    assert whole["kernels.py"].endswith("\x0cb = 2\n")  # as logs hold it
    sources.keep_as_diff(attempt, base)
    assert (attempt / "Try.diff").read_text().endswith("\n+\x0cb = 2\n")  # as patch reads it
    assert sources.kept_texts(attempt) == whole


def test_a_try_is_kept_as_a_diff_and_goes_on(tmp_path):
    base, attempt = stand_in(tmp_path / "2026-01-01_Base"), tmp_path / "tries/2026-01-02_Try"
    changed = (STAND_IN / "kernels.py").read_text().replace("2.9 +", "2.8 +")
    stand_in(attempt, **{"kernels.py": changed, "extra.py": "new = True\n"})
    done = tool("race", attempt, "-n", 1, "--base", base)
    assert done.returncode == 0, done.stderr
    diff = attempt / "Try.diff"
    assert not (attempt / "source").exists() and diff.read_text().count("\n+") == 4
    assert "base: ../../2026-01-01_Base\n" in diff.read_text()
    assert sources.kept_texts(attempt)["kernels.py"] == changed
    assert tool("race", attempt, "-n", 2).returncode == 0
    assert {path.name for path in attempt.iterdir()} == {"Try.diff", "logs"}
    arm = comparison.Arm.read(attempt)
    assert arm.losses == pytest.approx([2.8, 2.81]) and not audit.mixture(arm.runs)
    done = tool("replay", runs.find_logs(attempt)[1])
    assert done.returncode == 0 and "REPRODUCED" in done.stdout, done.stderr

    assert tool("race", attempt, "--base", attempt).returncode == 2
    (base / "source/kernels.py").write_text("def loss_of(seed): ...\n")
    (_, problem), *_ = runs.read_log(runs.find_logs(attempt)[0]).faults
    assert "Try.diff does not fit the source of" in problem
    diff.write_text("base: .\n")
    assert "Try.diff does not fit the source of" in tool("race", attempt).stderr


# ------------------------------------------------------------------------------ Running again


@pytest.fixture
def attempt_flags(shards, tmp_path) -> list[str]:
    chosen_by_race = ("--log_dir", "--cpu_dtype")
    kept = [f for f in tiny_flags(shards, tmp_path) if not f.startswith(chosen_by_race)]
    return [*kept, "--num_steps=8", "--val_every=4", "--target_val_loss=4.5"]


def test_a_new_attempt_gets_this_checkouts_source(tmp_path):
    attempt = tmp_path / "2026-01-01_A"
    done = tool("race", attempt, "-n", 0)
    assert done.returncode == 0 and not list((attempt / "logs").iterdir()), done.stderr
    assert sources.kept_texts(attempt) == source_texts(ROOT, "train_gpt.py")


def test_the_order_of_a_race_is_drawn_and_balanced():
    orders = {seed: list(stats.draw_order(2, 10, str(seed))) for seed in range(200)}
    first = {seed: [arm for arm, _ in order[::2]] for seed, order in orders.items()}
    assert {order[0][0] for order in orders.values()} == {0, 1}
    assert all(abs(sum(x) - 5) <= 1 for x in first.values())  # within one of half
    beat = np.resize([1, -1, -1, 1], 20)  # slow, fast, fast, slow
    for order in orders.values():
        arms = np.array([arm for arm, _ in order])
        assert abs(beat[arms == 0].mean() - beat[arms == 1].mean()) <= 0.4
    assert orders[3][:8] == list(stats.draw_order(2, 4, "3"))  # longer ones begin the same
    texts = {"b": "1", "a": "2"}  # a frozen source is read in another order than a checkout
    assert stats.order_seed([(texts, [])]) == stats.order_seed([(dict(sorted(texts.items())), [])])
    three = list(stats.draw_order(3, 4, "0"))
    assert sorted(three) == [(arm, turn) for arm in range(3) for turn in range(4)]


def test_a_second_call_keeps_the_flags_and_says_what_runs(tmp_path):
    attempt = stand_in(tmp_path / "2026-01-01_A")
    assert tool("race", attempt, "-n", 1, "--ms=30").returncode == 0
    done = tool("race", attempt, "-n", 2, "--ms", 31)
    assert done.returncode == 2 and "have other flags of the trainer: --ms 30" in done.stderr
    done = tool("race", attempt, "-n", 2)
    assert done.returncode == 0 and "this checkout differs in" in done.stderr, done.stderr
    assert comparison.Arm.read(attempt).times.tolist() == [0.03, 0.031]
    with pytest.raises(ToolError, match="--seed is given to each run by this tool"):
        attempts.require_own_flags(["--muon_lr", "1", "--seed", "3"])
    done = tool("replay", runs.find_logs(attempt)[0], "--seed=3")
    assert done.returncode == 2 and "--seed is given to each run by this tool" in done.stderr


def test_a_ledger_that_its_process_contradicts_claims_no_gain(tmp_path):
    a, b = (stand_in(tmp_path / f"2026-01-01_{x}") for x in "AB")
    texts = (b / "source/train_gpt.py").read_text()
    (b / "source/train_gpt.py").write_text(texts.replace("ms: int = 20 ", "ms: int = 99000 "))
    done = tool("race", a, b, "-n", 3)
    assert "its ledger adds up to 99.0 s, its process took" in done.stdout, done.stdout
    assert re.search("WARN      B: its ledger adds up to 99.0 s", done.stdout)


def test_attempts_interleave_and_go_on(tmp_path):
    a, b = (stand_in(tmp_path / f"2026-01-01_{x}") for x in "AB")
    assert tool("race", a, b, "-n", 1).returncode == 5
    done = tool("race", a, b, "-n", 4)
    both = [comparison.Arm.read(folder) for folder in (a, b)]
    assert [r.seed for r in both[0].runs] == ["0", "1", "2", "3"] == [r.seed for r in both[1].runs]
    c = comparison.Comparison(*both)
    assert c.drawn and f"order {c.order[2:]}, random with seed" in done.stdout
    assert done.returncode == 5 and c.level == stats.ALPHA_LOOK  # 1 was declared, then 4
    assert tool("race", a, "-n", 4).returncode == 0
    changed = (a / "source/kernels.py").read_text() + "# tampered\n"
    (a / "source/kernels.py").write_text(changed)
    assert all("not what its sha256 says" in what for _, what in both_faults(a))
    assert tool("race", a, b, "-n", 4).returncode == 4


def test_logs_checkouts_and_records_lend_their_source(tmp_path):
    record, out = stand_in(tmp_path / "2026-01-01_Record"), tmp_path / "out"
    assert tool("race", record, "-n", 2, "--ms", 30).returncode == 0
    (record / "README.md").write_text("# Published\n")
    shutil.rmtree(record / "source")
    sources.write_texts(source_texts(STAND_IN, "train_gpt.py"), record / "source")
    done = tool("race", record, STAND_IN, runs.find_logs(record)[0], "-n", 2, "--out", out)
    assert done.returncode == 0 and len(runs.find_logs(record)) == 2, done.stderr
    arms = [comparison.Arm.read(out / x) for x in "ABC"]
    assert [arm.times.tolist() for arm in arms] == [[0.03, 0.031], [0.02, 0.021], [0.03, 0.031]]
    done = tool("race", record, STAND_IN, record, "-n", 3, "--out", out)
    assert [len(runs.find_logs(out / x)) for x in "ABC"] == [3, 3, 3], done.stderr
    done = tool("race", STAND_IN, record, "-n", 1, "--out", tmp_path)  # discards nothing there
    assert "A  stand_in  n=1      B  2026-01-01_Record  n=1" in done.stdout
    sources.write_texts({"train_gpt.py": "import os\n"}, out / "B/source")
    done = tool("race", record, STAND_IN, record, "-n", 3, "--out", out)
    assert done.returncode == 2 and "has runs of another source" in done.stderr


def test_a_run_that_crashes_counts_and_the_others_go_on(tmp_path):
    attempt = stand_in(tmp_path / "2026-01-01_A")
    done = tool("race", attempt, "-n", 3, "--crashing_seed", 1)
    assert done.returncode == 0 and "exit code 1: error: this run shall crash" in done.stdout
    assert "FAIL (1 of 3 runs did not finish)" in done.stdout
    done = tool("race", STAND_IN, attempt, "-n", 3)
    assert done.returncode == 5 and "B: 1 of 3 runs aborted, they count" in done.stdout


@pytest.mark.slow
def test_attempts_take_turns(attempt_flags, tmp_path):
    a, b = tmp_path / "2026-01-01_A", tmp_path / "2026-01-01_B"
    for misuse in ([a], [a, b, tmp_path / "c"], [a, b, "--nproc_per_node=2"]):
        done = tool("race", "--turns", 2, *misuse)
        assert done.returncode == 2 and "--turns needs two attempts" in done.stderr
    done = tool("race", "-n", 1, "--turns", 2, a, b, *attempt_flags)
    assert done.returncode == 5 and "in pairs by seed, in turns of 2 steps" in done.stdout
    (one,), (other,) = (comparison.Arm.read(folder).runs for folder in (a, b))
    assert not one.faults and not other.faults and one.val_loss == other.val_loss
    assert one.ledger["turn"] > 0.9 * other.ledger["train"]
    assert other.ledger["turn"] > 0.9 * one.ledger["train"]
    assert "unknown kind" not in tool("validate", one.path).stdout
    assert "in turns of 2 steps" in tool("diff", REAL / "same", a).stdout
    for words, problem in (
        ([a, b], "go on with --turns 2"),
        (["--turns", 2, a, tmp_path / "new"], "one attempt has 0 runs, the other 1"),
    ):
        done = tool("race", *words)
        assert done.returncode == 2 and problem in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "words, problem",
    [
        (
            [ROOT / "records/embedded/2026-11-22_Muon", "new", "--turns", 10],
            "is older than --turns",
        ),
        (["new", "new/../new"], "named twice"),
        ([ROOT / "tests"], "is neither a log, nor an attempt"),
        ([ROOT / "README.md"], "neither a log of train_gpt.py nor"),
        (["new", "--base", STAND_IN], "is no other attempt"),
        (["new", "--out", "out"], "every attempt here keeps its own runs"),
    ],
)
def test_what_cannot_race_gets_one_clear_error(words, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = tool("race", *words)
    assert done.returncode in (2, 4) and problem in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("broken", [0, 1])  # the order in which the two begin is drawn
def test_a_run_that_fails_in_its_set_up_ends_its_pair(attempt_flags, tmp_path, broken):
    folders = [tmp_path / "2026-01-01_A", tmp_path / "2026-01-01_B"]
    for i, folder in enumerate(folders):
        texts = source_texts(ROOT, "train_gpt.py")
        if i == broken:
            before, guard, after = texts["train_gpt.py"].rpartition("\nif __name__ == ")
            fault = "\ndef fail(self):\n    raise OSError('it is broken')\nTrainer.warm_up = fail\n"
            texts["train_gpt.py"] = before + fault + guard + after
        sources.write_texts(texts, folder / "source")
    done = tool("race", "-n", 3, "--turns", 2, *folders, *attempt_flags)
    assert done.returncode == 2 and folders[broken].name in done.stderr.splitlines()[-1]
    assert "it is broken" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*/logs/*"))


@contextmanager
def race_until(pattern: str, folder: Path, *words):
    """race.py as a process group of its own, once a log in folder holds pattern."""
    command = [sys.executable, str(ROOT / "tools/race.py"), *map(str, words)]
    process = subprocess.Popen(command, env=clean_environment(), text=True,
                               stderr=subprocess.PIPE, start_new_session=True)  # fmt: skip
    try:
        while not any(pattern in p.read_text() for p in folder.glob("logs/*.txt")):
            assert process.poll() is None
            time.sleep(0.02)
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.slow
def test_a_run_goes_on_when_the_one_it_takes_turns_with_is_killed(attempt_flags, tmp_path):
    a, b = tmp_path / "2026-01-01_A", tmp_path / "2026-01-01_B"
    longer = ("--num_steps=400", "--val_every=400", "--max_epochs=99")
    words = ("-n", 1, "--turns", 2, a, b, *attempt_flags, *longer)
    with race_until("step:2/", a, *words) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        (its,) = (pid for pid in children if str(a) in Path(f"/proc/{pid}/cmdline").read_text())
        os.kill(int(its), signal.SIGKILL)
        assert process.wait(60) == 4  # its log is cut
    (killed,), (whole,) = ([runs.read_log(p) for p in runs.find_logs(x)] for x in (a, b))
    assert not killed.finished and whole.finished and not whole.faults


def both_faults(folder) -> list:
    return [fault for path in runs.find_logs(folder) for fault in runs.read_log(path).faults]


LONG = ("--num_steps=4000", "--max_epochs=99")


@pytest.mark.slow
def test_a_killed_run_stays_in_the_count(attempt_flags, tmp_path):
    attempt = tmp_path / "2026-01-01_Killed"
    words = ["-n", 2, attempt, *attempt_flags, "--num_steps=100", "--max_epochs=99"]
    with race_until("step:3/", attempt, *words) as process:
        os.killpg(process.pid, signal.SIGKILL)
    done = tool("race", attempt, "-n", 2)  # with the flags of the first run
    assert done.returncode == 0, done.stderr
    assert "FAIL (1 of 2 runs did not finish)" in done.stdout
    assert len(runs.find_logs(attempt)) == 2
    assert tool("diff", attempt, attempt).returncode == 4


def test_sigterm_ends_the_run_too(attempt_flags, tmp_path):
    attempt = tmp_path / "2026-01-01_Stopped"
    words = ["-n", 2, attempt, *attempt_flags, *LONG]
    with race_until("step:3/", attempt, *words) as process:
        process.terminate()
        assert "interrupted" in process.communicate(timeout=60)[1] and process.returncode == 143
    (run,) = [runs.read_log(path) for path in runs.find_logs(attempt)]
    assert run.result["status"] == "aborted" and not run.faults


@pytest.mark.slow
def test_runs_that_cannot_begin_stop_the_attempt(tmp_path):
    attempt = tmp_path / "2026-01-01_NoData"
    done = tool("race", "-n", 3, attempt, "--no_such_flag=1")
    assert done.returncode == 2 and "no_such_flag" in done.stderr
    assert "Traceback" not in done.stderr and not attempt.exists()
    done = tool("race", "-n", 3, attempt, "--track=embedded", "--train_files=/nowhere/*.bin")
    assert done.returncode == 2 and not attempt.exists()
    assert "no shards match /nowhere/*.bin" in done.stderr and "Traceback" not in done.stderr


def test_replay_repeats_every_digit_and_sees_a_change(log):
    done = tool("replay", log)
    assert done.returncode == 0 and "REPRODUCED  all 25 losses" in done.stdout, done.stderr
    done = tool("replay", log, "--muon_lr=0.03")
    assert done.returncode == 1 and "DIFFERENT" in done.stdout
    assert "first train at step" in done.stdout


OLD_LAYOUTS = {
    "before kernels.py": "records/embedded/2026-11-22_Muon",
    "the source in the log": "records/embedded/2026-11-22_Default",
    "a try, by two diffs": "records/embedded/tries/2026-11-22_Windows",
    "the baseline": "records/embedded/baseline/2026-11-22_GPT2",
    "by a store": "records/embedded/2026-11-26_EarlyCopying",
}


@pytest.fixture(scope="module")
def embedded_data():
    subprocess.run([sys.executable, str(ROOT / "data/embedded.py")], check=True)


@pytest.mark.parametrize("folder", OLD_LAYOUTS.values(), ids=OLD_LAYOUTS)
def test_a_log_of_each_layout_runs_again(folder, tmp_path, embedded_data):
    """Its first step at least, whose loss no machine's arithmetic moves by much."""
    old = runs.read_log(runs.find_logs(ROOT / folder)[0])
    few = ("--num_steps=1", "--val_every=1", "--val_tokens=1024", "--compile=false")
    done = tool("replay", old.path, "--out", tmp_path / "out", *few)
    assert done.returncode in (0, 1), done.stderr
    (new,) = comparison.Arm.read(tmp_path / "out").runs
    assert {path: source.text for path, source in new.sources.items()} == {
        path: source.text for path, source in old.sources.items()
    }
    assert new.train_curve[0][2] == pytest.approx(old.train_curve[0][2], abs=1e-3)


def test_a_checked_in_log_is_reproduced_digit_for_digit(log, embedded_data):
    old = runs.read_log(runs.find_logs(REAL / "same")[0])
    here = runs.read_log(log).environment
    for key in ("torch", "cpu", "matmul_dtype"):
        if here[key] != old.environment[key]:
            pytest.skip(f"its {key} is {old.environment[key]}, this machine's {here[key]}")
    done = tool("replay", old.path, OMP_NUM_THREADS=old.environment["threads"])
    assert done.returncode == 0, done.stdout + done.stderr


# ------------------------------------------------------------------------------ The record tools


def test_records_are_small_and_described():
    for folder in {path.parent.parent for path in RECORDS}:
        assert len((folder / "README.md").read_text().splitlines()) <= 60, folder
        sizes = [p.stat().st_size for p in folder.rglob("*") if p.is_file()]
        logs = sum(p.stat().st_size for p in (folder / "logs").iterdir())
        assert logs < 1.2e6 and sum(sizes) < 1.5e6, folder


def test_a_record_needs_a_title_and_five_runs_that_pass(tmp_path):
    folder = tmp_path / "embedded/2026-01-01_X"
    shutil.copytree(ROOT / "records/embedded/2026-11-22_Muon", folder)
    assert not leaderboard.Record(folder).obstacles()
    logs = sorted((folder / "logs").iterdir())
    logs[0].unlink()
    for log in logs[1:]:
        forge(log, log, (r"^declared_runs: .*", "declared_runs: 4"))
    four = leaderboard.Record(folder)
    assert four.arm.target_status()[0] == "open"  # for the first seed is missing
    assert "4 runs, at least 5 are needed" in four.obstacles()
    (folder / "README.md").write_text("")
    with pytest.raises(ToolError, match="lacks a first line"):
        leaderboard.Record(folder)


def test_readme_holds_the_leaderboard():
    done = tool("leaderboard", "--check")
    assert done.returncode == 0, done.stderr


def test_the_leaderboard_never_mixes_classes_and_notices_a_stale_readme(
    log, tmp_path, monkeypatch, capsys
):
    good = [(r"^overrides: .*", "overrides: none"), (r" overrides:\d+", " overrides:0"),
            (r"^argv: .*", "argv: []"), (r"changed:\S+ ", "changed:none "),
            (r"^declared_runs: .*", "declared_runs: 5")]  # fmt: skip
    monkeypatch.setattr(audit, "off_track", lambda run: [])
    plain = tmp_path / "plain.txt"
    plain.write_text(re.sub(r"^warning: .*\n", "", log.read_text(), flags=re.M))
    for day, (slug, device) in enumerate((("One", "one"), ("Two", "two"), ("Three", "one")), 1):
        folder = tmp_path / "records/embedded" / f"2026-01-0{day}_{slug}"
        (folder / "logs").mkdir(parents=True)
        (folder / "README.md").write_text(f"# The idea {slug}\n")
        for i in range(5):
            name, dated = at(5 * day + i, f"{slug}{i}")
            own = [
                (r"^device: .*", f"device: CPU {device}"),
                (r"^seed: .*", f"seed: {i}"),
                (r" seed:0 ", f" seed:{i} "),
                (r"^(step:20/20 |result .*)val_loss:\S+", rf"\1val_loss:4.{i}00000"),
            ]
            forge(plain, folder / f"logs/{name}.txt", *good, *dated, *own)
    pages = tmp_path / "README.md", tmp_path / "records/README.md"
    for page in pages:
        page.write_text(f"a\n{leaderboard.BEGIN}\n{leaderboard.END}\nz\n")
    monkeypatch.setattr(leaderboard, "ROOT", tmp_path)
    monkeypatch.setattr(leaderboard, "RECORDS", tmp_path / "records")
    shared = []
    monkeypatch.setattr(leaderboard, "share", lambda folder, store: shared.append(folder.name))
    monkeypatch.setattr(sys, "argv", ["leaderboard.py", "--check"])
    assert leaderboard.main() == 1 and "stale" in capsys.readouterr().err and not shared
    monkeypatch.setattr(sys, "argv", ["leaderboard.py"])
    assert leaderboard.main() == 0
    assert sorted(shared) == ["2026-01-01_One", "2026-01-02_Two", "2026-01-03_Three"]
    current, texts = (page.read_text() for page in pages)
    assert texts.startswith("a\n") and texts.endswith("\nz\n")
    second, first = texts.split("**embedded, target 9**")[1:]  # the newest record's class is last
    assert "CPU one" in first and "The idea One" in first and "The idea Three" in first
    assert "CPU two" in second and "The idea Two" in second and "One" not in second
    assert "(embedded/2026-01-03_Three/README.md)" in first
    assert current.count("**embedded, target 9**") == 1 and "CPU two" not in current
    assert "(records/embedded/2026-01-03_Three/README.md)" in current
    assert len(list((tmp_path / "records/embedded").glob("*.png"))) == 1
    monkeypatch.setattr(sys, "argv", ["leaderboard.py", "--check"])
    assert leaderboard.main() == 0


def test_reports_for_programs_and_the_diff_of_sources(log, tmp_path):
    old = r"^# -+ Train$"
    text = re.sub(old, "# mine", log.read_text(), flags=re.M)
    source = text.partition("\n")[2].partition("\ncheck: ")[0] + "\n"
    digest = hashlib.sha256(source.encode()).hexdigest()
    heading = (r"^(=== source train_gpt.py lines:\d+) sha256:\w+", rf"\1 sha256:{digest}")
    new_name = (r"^run: .*", "run: other")
    other = forge(log, tmp_path / "other.txt", (old, "# mine"), heading, new_name)
    assert "train_gpt.py +1 -1" in tool("diff", log, other).stdout
    assert "+# mine" in runs.source_diff(*map(runs.read_log, (log, other)), "train_gpt.py")
    report = json.loads(tool("diff", log, other, "--json").stdout)
    assert report["verdict"] == "INCONCLUSIVE" and report["exit_code"] == 5
    assert report["A"]["val_loss"] == [runs.read_log(log).val_loss]


@pytest.mark.parametrize(
    "words, code, problem",
    [
        ("diff one", 2, "the following arguments are required: B"),
        ("diff {0}/x.txt {0}", 2, "{0}/x.txt"),
        ("validate {0}", 2, "no logs (*.txt) there"),
        ("validate {0}/x.txt", 2, "{0}/x.txt cannot be read"),
        ("replay --out {1} {1}", 2, "is a file"),
        ("replay {0}/nowhere", 2, "{0}/nowhere cannot be read"),
        ("replay .", 2, ". is no log"),
        ("replay README.md", 4, "INVALID   README.md:1: neither a log of train_gpt.py nor"),
    ],
)
def test_misuse_and_missing_files_have_their_exit_codes(words, code, problem, tmp_path):
    places = tmp_path, REAL_LOGS[0]
    done = tool(*(word.format(*places) for word in words.split()))
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].count(problem.format(*places)) == 1, done.stderr
    assert not list(tmp_path.iterdir())


def test_looping_links_and_other_encodings_get_one_clear_error(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    done = tool("diff", loop, REAL_LOGS[0])
    assert done.returncode in (2, 4) and done.stderr.count("\n") == 1 and str(loop) in done.stderr
    (tmp_path / "mine/source").mkdir(parents=True)
    (tmp_path / "mine/source/train_gpt.py").write_bytes(b"name = '\xe9'\n")
    done = tool("race", tmp_path / "mine", "-n", 1)
    assert done.returncode == 2 and "train_gpt.py is no text in UTF-8" in done.stderr


def test_a_reader_that_leaves_gets_no_traceback():
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, str(ROOT / "tools/validate.py"), *map(str, REAL_LOGS)]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True)
    os.close(write_end)
    assert done.returncode == 128 + signal.SIGPIPE and not done.stderr
