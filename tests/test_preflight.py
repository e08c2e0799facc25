"""Preflight: its errors for bad input, and with --slow whole runs compiled without a GPU.

Those run in processes of their own, because the card must be installed before torch is imported.
"""

import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
from conftest import ROOT, clean_environment

from kernels import HAS_TRITON
from tools import fake_gpu, preflight
from tools.cli import ToolError
from train_gpt import TRACKS

slow = pytest.mark.slow
needs_compilers = pytest.mark.skipif(not (HAS_TRITON and shutil.which("g++")),
                                     reason="needs triton and g++")  # fmt: skip
SMALL = dict(seq_len=1024, val_seq_len=1024, val_tokens=16384, layers="sL-", value_layers="0,1",
             mix_at="2,3", mix_from=0, bigram_rows=1024, batch_tokens=16384,
             document_cap=896, window_tokens="384,896",
             short_window_tokens="128,384")  # fmt: skip


def raises(error: Exception):
    def function(*args):
        raise error

    return function


# ------------------------------------------------------------------------------ Bad input


@pytest.mark.parametrize(
    "owner, name, value, told",
    [
        (sys, "platform", "darwin", "in a container"),
        (fake_gpu.importlib.util, "find_spec", lambda name: None, "pip install triton=="),
        (fake_gpu.shutil, "which", lambda name: None, "apt install g++"),
        (fake_gpu, "version", lambda name: "2.9.1+cpu", "torch 2.9 is too old"),
        (fake_gpu, "version", raises(PackageNotFoundError("torch")), "torch is not installed"),
    ],
    ids=["macOS", "no triton", "no compiler", "old torch", "no torch"],
)
def test_a_machine_that_cannot_compile_is_told_what_to_do(monkeypatch, owner, name, value, told):
    monkeypatch.setattr(fake_gpu, "version", lambda name: "2.13.0+cpu")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(fake_gpu.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(fake_gpu.shutil, "which", lambda name: name)
    fake_gpu.check_machine()
    monkeypatch.setattr(owner, name, value)
    with pytest.raises(ToolError, match=told.replace("+", r"\+")):
        fake_gpu.check_machine()


@pytest.fixture
def run_main(monkeypatch):
    """preflight.main on these arguments, where nothing is installed."""

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["preflight.py", *arguments])
        for name in ("check_machine", "load_guard", "install"):
            monkeypatch.setattr(preflight, name, lambda *args: None)
        return preflight.main()

    return run


def test_a_torch_that_is_too_new_is_told_from_a_fault_of_the_tool(monkeypatch, run_main):
    no_such_mock = lambda entry: fake_gpu.mock(SimpleNamespace(), "gone", None)  # noqa: E731
    monkeypatch.setattr(preflight, "load_trainer", no_such_mock)
    monkeypatch.setattr(preflight, "torch_release", lambda: "2.99")
    with pytest.raises(ToolError, match="2.11 to 2.13, not 2.99: .*no attribute 'gone'"):
        run_main()
    monkeypatch.setattr(preflight, "torch_release", lambda: fake_gpu.TESTED[-1])
    with pytest.raises(AttributeError, match="gone"):
        run_main()


@pytest.mark.parametrize(
    "flag, told",
    [
        ("--gpu=B200", "H100"),
        ("--rows=-1", "--rows and --price must be at least 0"),
        ("--price=nan", "--rows and --price must be at least 0"),
        ("--cards=8,0", "--cards at least 1"),
        ("--cards=x", "--cards"),
    ],
)
def test_a_wrong_flag_is_misuse(run_main, capsys, flag, told):
    with pytest.raises(SystemExit) as exit:
        run_main(flag)
    assert exit.value.code == 2 and told in capsys.readouterr().err


@pytest.mark.parametrize(
    "source, told",
    [
        ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this"),
        ("def (", "SyntaxError: invalid syntax"),
        ("raise SystemExit('no GPU')", "SystemExit: no GPU"),
        (None, "is not a file of"),
    ],
)
def test_a_source_that_cannot_be_imported(monkeypatch, tmp_path, source, told):
    monkeypatch.setattr(preflight, "ROOT", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    trainer = tmp_path / "broken_trainer.py"
    if source is not None:
        trainer.write_text(source)
    with pytest.raises(ToolError, match=told) as error:
        preflight.load_trainer(str(trainer))
    assert "broken_trainer.py" in str(error.value)


# ------------------------------------------------------------------------------ Whole runs


@pytest.fixture
def run(tmp_path_factory):
    """Run Python on a file of the project in a process of its own; return its output.

    All workers share a cache, so that what stands for the driver is built once.
    """
    cache = tmp_path_factory.getbasetemp().parent / "preflight_cache"

    def run_python(*arguments: str, **variables: str) -> str:
        variables |= {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache)}
        environment = clean_environment(**variables)
        done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment,
                              capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run_python


@slow
@needs_compilers
def test_a_small_run_compiles_as_a_whole(run):
    flags = [f"--{name}={value}" for name, value in SMALL.items()]
    printed = run("tools/preflight.py", "--gpu=H100", "--price=2.5", "--rows=2", *flags)
    lines = printed.splitlines()
    assert lines[-1] == "0 failures" and len(lines) < 25  # one screen
    assert "0 again over 2 stages" in printed and "NVIDIA H100" in lines[0]
    table = [line.split() for line in lines if " bound " in line or " expected " in line]
    one, one_expected, eight, eight_expected = table[:4]
    assert one[:1] + eight[:1] == ["1", "8"] and one[-1] == "0" < eight[-1]  # MB on the wire
    assert float(one[4]) > 3 * float(eight[4])  # ms per step
    for bound, expected in ((one, one_expected), (eight, eight_expected)):
        assert expected[-1].startswith("$") and expected[0] == "expected"
        assert all(
            1.5 * float(b) < float(e) for b, e in zip(bound[4:6], expected[1:3], strict=True)
        )


@slow
@needs_compilers
def test_failures_are_named_and_own_kernels_fit(run):
    run("-m", "pytest", "--noconftest", "tests/installed_card.py")
    for card in ("A100", "4090"):
        run("-m", "pytest", "--noconftest", "tests/installed_card.py", "-k", "fit_each_card",
            PREFLIGHT_CARD=card)  # fmt: skip


@slow
@needs_compilers
def test_generated_code_equals_fp64(run):
    assert run("tests/interpreted_step.py").count("\n") > 40  # loss and gradients, by window


# ------------------------------------------------------------------------------ Stages


def test_only_schedules_cut_a_run_into_stages():
    """Not the five layers of value tables, for one."""
    found = {track: preflight.stages(hp) for track, hp in TRACKS.items()}
    assert found == {**dict.fromkeys(TRACKS, 3), "embedded": 1}
