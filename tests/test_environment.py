"""What a log says of the machine, on machines of other kinds than this one."""

import importlib
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from data import tokenize_text
from referee import environment, ranks
from referee.environment import cpu_model, mfu
from referee.flags import RunError
from referee.harness import Run, RunOptions
from referee.log import write_header
from referee.ranks import Runtime, compile_errors


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
    ],
)
def test_a_share_of_the_peak_is_given_for_cards_whose_peak_is_known(name, peak):
    assert mfu(1e12, name, 2) == (f"{1 / (2 * peak):.4f}" if peak else "unknown")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("processor: 0\nmodel name\t: Some CPU\n", "Some CPU"),
        ("processor: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n", "aarch64 0x41 0xd40"),
        ("processor: 0\n", "unknown CPU"),
    ],
)
def test_each_kind_of_cpu_has_a_name(monkeypatch, text, expected):
    monkeypatch.setattr(Path, "read_text", lambda path, **_: text)
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
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # of the checkout
    sections = {}
    log = SimpleNamespace(section=lambda name, lines=(): sections.update({name: list(lines)}))
    write_header(log, {"train_gpt.py": "after\n"}, "", {}, {})
    (git_section,) = [name for name in sections if name.startswith("git ")]
    assert ("commit:none" in git_section) == (not tracked)
    assert ("changed:train_gpt.py" in git_section) == tracked
    assert ("+after" in sections[git_section]) == tracked


def test_a_mac_has_no_proc_and_no_affinity_and_counts_memory_in_bytes(monkeypatch):
    def no_such_file(path, **_):
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", no_such_file)
    monkeypatch.setattr(environment, "shell", lambda *words: "Apple M3" * (words[0] == "sysctl"))
    assert cpu_model() == "Apple M3"
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    monkeypatch.setattr(sys, "argv", ["tokenize_text.py", "text.txt"])
    assert tokenize_text.parse().workers == 7
    for platform, peak in (("darwin", 3 << 30), ("linux", 3 << 20)):
        monkeypatch.setattr(sys, "platform", platform)
        usage = SimpleNamespace(ru_maxrss=peak)
        monkeypatch.setattr(ranks.resource, "getrusage", lambda who, usage=usage: usage)
        assert Runtime.peak_memory_mib(SimpleNamespace(is_gpu=False)) == 3072


def test_modules_from_elsewhere_are_named_however_late_they_came(monkeypatch, tmp_path):
    before = environment.foreign_modules(["referee/environment.py"]).split(", ")
    assert "referee/ranks.py" in before and "referee/environment.py" not in before
    assert not any("site-packages" in path or "/lib/python" in path for path in before)
    (tmp_path / "late.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setenv("LD_PRELOAD", "/x.so")
    importlib.import_module("late")
    assert "late.py" in environment.foreign_modules([]).split(", ")
    assert "late.py" not in environment.foreign_modules(["late.py"]).split(", ")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert "late.py" in environment.foreign_modules([]).split(", ")  # a cache on the import path
    sys.path.remove(str(tmp_path))
    assert "late.py" not in environment.foreign_modules([]).split(", ")
    assert '"LD_PRELOAD": "/x.so"' in environment.environment(on_gpu=False)["variables"]


def test_run_sh_expands_no_empty_array():
    """With set -u that is an error in a Mac's bash 3.2; set_up's flags always hold a file."""
    plain = re.findall(r'(?<!\+)"\$\{(\w+)\[@\]\}"', (ROOT / "run.sh").read_text())
    assert set(plain) == {"flags"}


def test_a_name_that_is_no_text_is_refused():
    with pytest.raises(RunError, match="--log_dir .* no UTF-8"):
        RunOptions(log_dir="logs\udcff")
    RunOptions(log_dir="Протоколы")


@pytest.mark.parametrize(
    "gain, told, dtype",
    [
        (1.1, "", torch.float32),
        (1.3, "", torch.bfloat16),
        (1.1, "bfloat16", torch.bfloat16),
    ],
)
def test_a_cpu_multiplies_in_bf16_where_that_is_clearly_faster_or_as_told(
    monkeypatch, gain, told, dtype
):
    monkeypatch.setattr(ranks, "bf16_gain", lambda: gain)
    rt = Runtime()
    rt.choose_arithmetic(told)
    assert rt.matmul_dtype == dtype and rt.stream_dtype == torch.float32
    assert rt.bf16_gain == ("not measured" if told else f"{gain:.2f}")


@pytest.mark.parametrize("is_gpu", [False, True])
def test_on_a_gpu_a_graph_that_would_break_is_an_error(is_gpu):
    rt = SimpleNamespace(is_gpu=is_gpu, any_problem=str, compiler_problem=str,
                         prepare_compiler=lambda: None)  # fmt: skip
    run = SimpleNamespace(rt=rt, options=SimpleNamespace(compile=True), log=SimpleNamespace())
    run.log.line = lambda *words, **shown: None

    def broken(x):
        torch._dynamo.graph_break()
        return x + 1

    torch._dynamo.reset()  # of the same code, compiled otherwise
    compiled = Run.compiler(run)(broken, backend="eager")
    with pytest.raises(compile_errors()) if is_gpu else nullcontext():
        assert compiled(torch.ones(1)) == 2
