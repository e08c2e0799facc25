"""What a log says of the machine, on machines of other kinds than this one."""

import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import environment
from environment import cpu_model, mfu, write_header
from flags import RunError
from harness import Log, RunOptions


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
    ],
)
def test_a_share_of_the_peak_is_given_for_cards_whose_peak_is_known(name, peak):
    assert mfu(1e12, name, 2) == (f"{1 / (2 * peak):.4f}" if peak else "unknown")


@pytest.mark.parametrize(
    "text, expected",
    [
        (
            "processor: 0\nmodel name\t: Some CPU\nprocessor: 1\nmodel name\t: Some CPU\n",
            "Some CPU",
        ),
        ("processor: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n", "aarch64 0x41 0xd40"),
        ("processor: 0\n", "unknown CPU"),
    ],
)
def test_each_kind_of_cpu_has_a_name(monkeypatch, text, expected):
    monkeypatch.setattr(Path, "read_text", lambda path: text)
    monkeypatch.setattr(environment.platform, "machine", lambda: "aarch64")
    assert cpu_model() == expected


@pytest.mark.parametrize("tracked", [True, False])
def test_the_commit_is_that_of_the_sources_or_none(monkeypatch, tmp_path, tracked):
    """In a folder of another repository; there, only what is tracked has a commit."""

    def git(*words):
        identity = ["-c", "user.name=x", "-c", "user.email=x"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    project = tmp_path / "inner"
    project.mkdir()
    (project / "train_gpt.py").write_text("before\n")
    git("init")
    if tracked:
        git("add", ".")
    git("commit", "--allow-empty", "-m", "x")
    (project / "train_gpt.py").write_text("after\n")
    monkeypatch.setattr(environment, "ROOT", project)
    sections = {}
    log = SimpleNamespace(section=lambda name, lines=(): sections.update({name: list(lines)}))
    write_header(log, {"train_gpt.py": "after\n"}, "", {}, {})
    (git_section,) = [name for name in sections if name.startswith("git ")]
    assert ("commit:none" in git_section) == (not tracked)
    assert ("changed:train_gpt.py" in git_section) == tracked
    assert ("+after" in sections[git_section]) == tracked


def test_a_name_that_is_no_text_is_refused():
    with pytest.raises(RunError, match="--log_dir .* no UTF-8"):
        RunOptions(log_dir="logs\udcff")
    RunOptions(log_dir="Протоколы")


def test_the_clock_moves_while_a_run_compiles(tmp_path):
    log, drawn = Log(str(tmp_path), "x", 3), []
    with log.waiting("compiling"):
        pass  # without a terminal
    log.bar = SimpleNamespace(set_postfix_str=drawn.append, refresh=lambda: drawn.append("clock"))
    with log.waiting("compiling"):
        time.sleep(1.2)
    assert drawn == ["compiling", "clock", "clock"]
