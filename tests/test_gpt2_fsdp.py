"""The GPT-2 baseline in shards: gloo processes on the CPU stand for GPUs."""

import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, clean_environment, losses, only_log, run_section
from test_gpt2 import RT, hp, outcome, tiny_flags  # noqa: F401
from torch.testing._internal.distributed.fake_pg import FakeStore

from baselines import train_gpt2
from baselines.plan import Layout, memory
from baselines.sharding import shard
from baselines.train_gpt2 import GPT2, TRACKS, build


@pytest.fixture
def trained(shards, tmp_path):
    """trained(name, ranks, *flags): losses of a run of 20 steps by so many processes."""

    def train(name: str, ranks: int, *flags) -> dict:
        words = [*tiny_flags(shards, tmp_path / name), *flags]
        if ranks == 1:
            code, stderr = outcome(train_gpt2, *words)
        else:
            code, stderr = torchrun(ranks, *words)
        assert code == 0, stderr
        sharded = ranks > 1 or "--cpu_offload=true" in flags
        assert f"sharded: {sharded}" in run_section(only_log(tmp_path / name))
        return losses(only_log(tmp_path / name))

    yield train
    if dist.is_initialized():
        dist.destroy_process_group()


def torchrun(ranks: int, *words) -> tuple[int, str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "baselines" / "train_gpt2.py"), *words],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    return done.returncode, done.stderr


def same(found: dict, expected: dict, count: int):
    assert len(found) == count
    for key, loss in found.items():
        assert abs(float(loss) - float(expected[key])) < 1e-4, (key, loss, expected[key])


@pytest.mark.parametrize(
    "ranks, flags",
    [
        (2, ["--micro_batch_seqs=2", "--checkpoint_blocks=true"]),
        (1, ["--cpu_offload=true"]),
    ],
)
def test_shards_give_the_losses_of_one_whole_model(trained, ranks, flags):
    whole = trained("whole", 1)
    assert float(whole["val", 20]) < float(whole["val", 0]) - 0.5
    same(trained("sharded", ranks, *flags), whole, 23)


@pytest.mark.slow
def test_four_ranks_give_the_losses_of_one_and_resume_on_two_and_on_one(trained, tmp_path):
    whole, four = trained("whole", 1), trained("four", 4, "--save_every=12")
    same(four, whole, 23)
    (saved,) = (tmp_path / "four").glob("*_step*")
    hashed = json.loads((saved / "config.json").read_text())["files"]
    assert set(hashed) == {".metadata", *(f"__{rank}_0.distcp" for rank in range(4))}
    for ranks in (2, 1):
        resumed = trained(f"resumed_on_{ranks}", ranks, f"--resume={saved}")
        same(resumed, whole, 9)
        assert min(step for _, step in resumed) == 13


def test_in_bf16_a_token_that_is_everywhere_gets_the_gradient_of_a_whole_model(hp):  # noqa: F811
    """Its embedding's gradient is a sum of as many terms as there are tokens."""
    found, x = [], torch.full((16, hp.seq_len), 5)
    rt = SimpleNamespace(**{**vars(RT), "matmul_dtype": torch.bfloat16})
    for cpu_offload in (False, True):
        offloaded = dataclasses.replace(hp, cpu_offload=cpu_offload)
        model = build(offloaded, rt, 0, Layout(cpu_offload=cpu_offload))
        with torch.autocast("cpu", torch.bfloat16):
            model.loss(x, torch.arange(16 * hp.seq_len).view_as(x) % 64).backward()
        gradient = model.embed.grad
        found.append(gradient.full_tensor() if cpu_offload else gradient)
    dist.destroy_process_group()
    assert (found[0] - found[1]).norm() < 0.01 * found[0].norm()


@pytest.fixture
def a_rank_of_1024():
    dist.init_process_group("fake", rank=5, world_size=1024, store=FakeStore())
    yield SimpleNamespace(world_size=1024, device=torch.device("cpu"), matmul_dtype=torch.bfloat16)
    dist.destroy_process_group()


def test_no_rank_ever_holds_175b_whole(a_rank_of_1024):
    """On a pretended group of ranks: what one of them would have to allocate."""
    with torch.device("meta"):
        model = GPT2(TRACKS["175B"])
    shard(model, a_rank_of_1024, cpu_offload=False)
    held = sum(p.to_local().numel() * p.element_size() for p in model.parameters())
    assert held == pytest.approx(memory(TRACKS["175B"], Layout(1024), 1).weights, rel=0.01)
    assert held < 1e9
