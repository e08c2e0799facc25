"""Preflight: its words for bad input, and behind --slow whole runs that are compiled without a GPU.

What is compiled for a card is a process of its own, for the card is installed before torch.
"""

import json
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
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
# One layer and one kind of step, whose rows are too few for eight cards.
SMALLEST = dict(seq_len=512, val_seq_len=512, val_tokens=1024, layers="S", value_layers="none",
                mix_at="none", bigram_rows=0, batch_tokens=1024,
                document_cap=896, window_tokens=384, adam_every=1,
                short_window_tokens=128, mtp_weight=0)  # fmt: skip


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


def test_a_torch_without_what_is_mocked_is_told_by_name():
    with pytest.raises(ToolError, match=r"no SimpleNamespace\.gone, .* \(it moves\)"):
        fake_gpu.mock(SimpleNamespace(), "gone", None, "it moves")


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
    monkeypatch.setattr(preflight, "load_trainer", raises(AttributeError("no such thing")))
    monkeypatch.setattr(preflight, "torch_release", lambda: "2.99")
    with pytest.raises(ToolError, match="torch 2.99 is newer than .*: no such thing"):
        run_main()
    monkeypatch.setattr(preflight, "torch_release", lambda: fake_gpu.TESTED[-1])
    with pytest.raises(AttributeError):
        run_main()


def test_an_unknown_card_is_told_which_there_are(run_main, capsys):
    with pytest.raises(SystemExit) as exit:
        run_main("--gpu", "B200")
    assert exit.value.code == 2 and "H100" in capsys.readouterr().err


@pytest.mark.parametrize(
    "source, told",
    [
        ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this"),
        ("def (", "SyntaxError: invalid syntax"),
        ("raise SystemExit('no GPU')", "SystemExit: no GPU"),
        (None, "is no trainer of"),
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


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """Of all workers of these tests, so that what stands for the driver is built once."""
    return tmp_path_factory.getbasetemp().parent / "preflight_cache"


@pytest.fixture(scope="session")
def run(cache):
    """Run a script of a checkout as a process of its own."""

    def run_script(path: str, *arguments: str, root: Path = ROOT) -> subprocess.CompletedProcess:
        environment = clean_environment(PYTHONPATH=str(root), XDG_CACHE_HOME=str(cache))
        return subprocess.run([sys.executable, path, *arguments], cwd=root, env=environment,
                              capture_output=True, text=True)  # fmt: skip

    return run_script


def flags(sizes: dict, **changes) -> list[str]:
    return ["--rows=2", *(f"--{name}={value}" for name, value in {**sizes, **changes}.items())]


@slow
@needs_compilers
def test_a_small_run_compiles_as_a_whole(run):
    done = run("tools/preflight.py", "--gpu=H100", "--price=2.5", *flags(SMALL))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "0 failures" and len(lines) < 25  # one screen
    assert "0 again over 2 stages" in done.stdout and "NVIDIA H100" in lines[0]
    one, eight = (line.split() for line in lines if line.strip().startswith(("1 ", "8 ")))
    assert one[-2] == "0" and float(eight[-2]) > 0  # MB on the wire
    assert one[-1].startswith("$") and float(one[3]) > 3 * float(eight[3])  # dollars, ms per step


CPU_ONLY = """
@torch.library.custom_op("planted::cpu_only", mutates_args=(), device_types="cpu")
def cpu_only(x: Tensor) -> Tensor:
    return x.clone()


cpu_only.register_fake(torch.empty_like)
index_documents = GPT.document_index
GPT.document_index = lambda model, inputs_BT: cpu_only(index_documents(model, inputs_BT))
"""
GRAPH_BREAK = """
GPT.document_index = lambda model, inputs_BT: torch._dynamo.graph_break()
"""
PLAIN_BLOCK_LISTS = "\nblock_lists = block_lists._init_fn\n"  # no operator: Inductor sets strides
HUGE_TILE = "\nLARGE_TILE['num_stages'] = 8\n"


def plant(root: Path, path: str, code: str) -> None:
    """Put code before the main guard of a checkout's file, or at its end."""
    text = (root / path).read_text()
    guard = text.rfind("\nif __name__ ==")
    at = guard if guard >= 0 else len(text)
    (root / path).write_text(text[:at] + code + text[at:])


@pytest.fixture
def root(tmp_path) -> Path:
    """A copy of the checkout without what its runs left."""
    ignored = shutil.ignore_patterns(".*", "records", "logs", "tests", "*.bin", "__pycache__")
    return shutil.copytree(ROOT, tmp_path / "checkout", symlinks=True, ignore=ignored)


@slow
@needs_compilers
def test_a_graph_that_breaks_is_one_error(run, root):
    plant(root, "train_gpt.py", GRAPH_BREAK)
    done = run("tools/preflight.py", *flags(SMALLEST), root=root)
    errors = [line for line in done.stderr.splitlines() if not line.startswith("[")]
    assert done.returncode == 1 and len(errors) == 1, done.stderr
    assert "torch.compile failed (Call to `torch._dynamo.graph_break()`)" in errors[0]


@slow
@needs_compilers
def test_planted_faults_are_each_named(run, root):
    plant(root, "kernels.py", PLAIN_BLOCK_LISTS + HUGE_TILE)
    plant(root, "train_gpt.py", CPU_ONLY)
    done = run("tools/preflight.py", *flags(SMALLEST), root=root)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "left out 8 cards" in done.stderr
    found = [line for line in done.stdout.splitlines() if line.startswith("FAILURE")]
    lists = [line for line in found if "flex_attention" in line]
    assert len(lists) == 2, done.stdout  # training and validation
    assert all("reads the block lists of another row: stride_kv_" in line for line in lists)
    others = sorted(set(found) - set(lists))
    assert len(others) == 2, done.stdout
    assert "kernel relu_squared_kernel: needs 393216 B of shared memory" in others[0]
    assert "operator planted::cpu_only has no CUDA kernel" in others[1]


@slow
@needs_compilers
@pytest.mark.parametrize(
    "changes, told",
    [
        (dict(seq_len=1000, batch_tokens=2000), "--seq_len and --val_seq_len must divide by 128"),
        (
            dict(num_heads=96),
            "embedding dimension of the query, key, and value must be at least 16",
        ),
    ],
)
def test_sizes_that_a_kernel_cannot_take_are_one_error(run, changes, told):
    done = run("tools/preflight.py", "--lower_only", *flags(SMALLEST, **changes))
    errors = [line for line in done.stderr.splitlines() if not line.startswith("[")]
    assert done.returncode == 1 and len(errors) == 1, done.stderr
    assert errors[0].startswith("error: train_gpt.py on NVIDIA H100") and told in errors[0]


@slow
@needs_compilers
def test_generated_code_equals_fp64(run):
    done = run("tests/interpreted_step.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n") > 40  # loss and gradients, through both windows


# ------------------------------------------------------------------------------ Kernels


@pytest.fixture(scope="module")
def kernel_report(run) -> dict:
    """What tests/recorded_kernels.py prints."""
    done = run("tests/recorded_kernels.py")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@slow
@needs_compilers
def test_the_head_keeps_one_chunk_of_logits(kernel_report):
    for one_chunk, three_chunks in kernel_report["peaks"]:
        assert one_chunk > kernel_report["chunk_bytes"]
        assert three_chunks - one_chunk < kernel_report["chunk_bytes"] / 2  # x, dx, a second dW


@slow
@needs_compilers
def test_own_kernels_at_their_true_sizes_fit_without_spills(kernel_report, cache):
    assert not kernel_report["problems"] and len(kernel_report["kernels"]) == 4
    for kernel in kernel_report["kernels"]:
        assert kernel["spilled_bytes"] == 0 and 16 <= kernel["registers"] < 256
        assert kernel["shared_bytes"] <= 227 << 10
    products = [path.read_text() for path in cache.rglob("relu_squared_kernel.ptx")]
    assert products and all("wgmma.mma_async" in ptx for ptx in products)


@slow
@needs_compilers
def test_a_kernel_that_spills_is_named(kernel_report):
    assert any(p.startswith("kernel relu_squared_kernel: spills") and p.endswith("B per thread")
               for p in kernel_report["spilling"])  # fmt: skip


def test_only_schedules_cut_a_run_into_stages():
    """Not the five layers of value tables, for one."""
    found = {track: preflight.stages(hp) for track, hp in TRACKS.items()}
    assert found == {"fineweb": 3, "fineweb_medium": 3, "wikitext103": 3, "embedded": 1}
