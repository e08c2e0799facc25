"""The GPT-2 baseline in shards: gloo processes on the CPU stand for GPUs."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, called, losses, only_log, run_section, tiny_flags
from forked import Forked
from test_gpt2 import RT, TINY, hp  # noqa: F401
from torch.testing._internal.distributed.fake_pg import FakeStore

from baselines import train_gpt2
from baselines.plan import memory
from baselines.sharding import shard
from baselines.train_gpt2 import GPT2, TRACKS, build


@pytest.fixture(autouse=True)
def no_process_group_is_left():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    """trained(name, ranks, *flags): (losses, folder) of a run of 20 steps by so many processes."""
    root = tmp_path_factory.mktemp("runs")

    def train(name: str, ranks: int, *flags) -> tuple[dict, object]:
        folder, script = root / name, f"{ROOT}/baselines/train_gpt2.py"
        words = [*tiny_flags(shards, folder, TINY), *flags]
        if ranks == 1:
            code, _, stderr = called(train_gpt2, *words)
        else:
            started = Forked([script, *words], ranks)
            _, stderr = started.communicate(timeout=600)
            code = started.returncode
        assert code == 0, stderr
        sharded = ranks > 1 or "--cpu_offload=true" in flags
        assert ("parameters, sharded" in run_section(only_log(folder))) == sharded
        return losses(only_log(folder)), folder

    return train


@pytest.fixture(scope="module")
def whole(trained) -> dict:
    found, _ = trained("whole", 1)
    assert len(found) == 23 and float(found["val", 20]) < float(found["val", 0]) - 0.5
    return found


def same(found: dict, expected: dict):
    for key, loss in found.items():
        assert abs(float(loss) - float(expected[key])) < 1e-4, (key, loss, expected[key])


@pytest.mark.parametrize(
    "ranks, flags",
    [
        (2, ["--micro_batch_seqs=4", "--checkpoint_blocks=true"]),
        (1, ["--cpu_offload=true"]),
    ],
)
def test_shards_give_the_losses_of_one_whole_model(trained, whole, ranks, flags):
    found, _ = trained(f"sharded_{ranks}", ranks, *flags)
    assert found.keys() == whole.keys()
    same(found, whole)


@pytest.mark.slow
def test_four_ranks_give_the_losses_of_one_and_resume_on_two_and_on_one(trained, whole):
    four, folder = trained("four", 4, "--save_every=12")
    assert four.keys() == whole.keys()
    same(four, whole)
    (saved,) = folder.glob("*_step*")
    hashed = json.loads((saved / "config.json").read_text())["files"]
    assert set(hashed) == {".metadata", *(f"__{rank}_0.distcp" for rank in range(4))}
    for ranks in (2, 1):
        resumed, _ = trained(f"resumed_on_{ranks}", ranks, f"--resume={saved}")
        assert len(resumed) == 9 and min(step for _, step in resumed) == 13
        same(resumed, whole)


def test_in_bf16_a_token_that_is_everywhere_gets_the_gradient_of_a_whole_model(hp):  # noqa: F811
    """Its embedding's gradient is a sum of as many terms as there are tokens."""
    found, x = [], torch.full((16, hp.seq_len), 5)
    rt = SimpleNamespace(**{**vars(RT), "matmul_dtype": torch.bfloat16})
    for cpu_offload in (False, True):
        model = build(dataclasses.replace(hp, cpu_offload=cpu_offload), rt, 0)
        with torch.autocast("cpu", torch.bfloat16):
            model.loss(x, torch.arange(16 * hp.seq_len).view_as(x) % 64).backward()
        gradient = model.embed.grad
        found.append(gradient.full_tensor() if cpu_offload else gradient)
    assert (found[0] - found[1]).norm() < 0.01 * found[0].norm()


def test_no_rank_ever_holds_175b_whole():
    """On a pretended group of ranks: what one of them would have to allocate."""
    dist.init_process_group("fake", rank=5, world_size=1024, store=FakeStore())
    rt = SimpleNamespace(world_size=1024, device=torch.device("cpu"), matmul_dtype=torch.bfloat16,
                         is_gpu=False)  # fmt: skip
    with torch.device("meta"):
        model = GPT2(TRACKS["175B"])
    shard(model, rt, cpu_offload=False)
    held = sum(p.to_local().numel() * p.element_size() for p in model.parameters())
    assert held == pytest.approx(memory(TRACKS["175B"], rt, 1)["weights"], rel=0.01)
    assert held < 1e9
