import dataclasses
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, clean_environment

from train_gpt import (
    GPT,
    Muon,
    lr_scale,
    muon_momentum,
    muon_update,
    optimizers,
    orthogonalize,
    window_tokens,
)

ONE_RANK = SimpleNamespace(
    stream_dtype=torch.float32,
    matmul_dtype=torch.float32,
    my_part=lambda count: slice(0, count),
    gather_parts=lambda bank: None,
)


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 64, 16), (2, 16, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalize_keeps_singular_vectors_and_levels_singular_values(shape, dtype):
    torch.manual_seed(0)
    G = torch.randn(shape)
    U, S, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    found = U.mT @ orthogonalize(G, dtype).double() @ Vh.mT
    singular = found.diagonal(dim1=-2, dim2=-1)
    conditioned = S > 0.01 * S.amax(-1, keepdim=True)  # five steps lift those above about 1%
    assert ((singular - 1).abs() < 0.15)[conditioned].all()
    off_diagonal = found - torch.diag_embed(singular)
    assert off_diagonal.abs().max() < (0.05 if dtype == torch.float32 else 0.15)


def test_muon_update_equals_its_definition_in_fp64_with_an_exact_svd():
    torch.manual_seed(1)
    W, G = torch.randn(2, 24, 12), torch.randn(2, 24, 12)
    momentum, second = torch.randn(2, 24, 12), 2 + 4 * torch.rand(2, 24, 1)
    rate, beta = 0.1, 0.9
    m = beta * momentum.double() + (1 - beta) * G.double()
    nesterov = (1 - beta) * G.double() + beta * m
    left, _, right = torch.linalg.svd(nesterov, full_matrices=False)
    U = left @ right
    v = 0.9 * second.double() + 0.1 * (U**2).mean(-1, keepdim=True)
    direction = U / v.sqrt()
    direction *= U.norm(dim=(1, 2), keepdim=True) / direction.norm(dim=(1, 2), keepdim=True)
    expected = W.double() - rate * 2**0.5 * direction
    scalars = (torch.tensor(x) for x in (rate, 0.0, beta))
    muon_update(W, G, momentum, second, *scalars, torch.float32)
    torch.testing.assert_close(second.double(), v, atol=2e-3, rtol=0)
    torch.testing.assert_close(momentum.double(), m, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(W.double(), expected, atol=0.02, rtol=0)


def test_muon_decays_only_weights_that_the_update_shrinks():
    torch.manual_seed(2)
    W0, G = torch.randn(2, 12, 12), torch.randn(2, 12, 12)
    after = {}
    for decay in (0.0, 0.3):
        W, momentum, second = W0.clone(), torch.zeros_like(G), torch.zeros(2, 12, 1)
        scalars = (torch.tensor(x) for x in (0.1, decay, 0.9))
        muon_update(W, G, momentum, second, *scalars, torch.float32)
        after[decay] = W
    shrinks = (W0 - after[0.0]) * W0 > 0
    expected = after[0.0] - torch.where(shrinks, 0.1 * 0.3 * W0, 0)
    torch.testing.assert_close(after[0.3], expected, atol=1e-6, rtol=1e-5)
    assert 0.3 < shrinks.float().mean() < 0.7


def test_muon_survives_a_zero_gradient():
    p = torch.nn.Parameter(torch.ones(2, 8, 4))
    p.grad = torch.zeros_like(p)
    Muon([p], 0.1, 0.0, ONE_RANK, muon_update).step(1.0, 0.9)
    assert torch.equal(p, torch.ones(2, 8, 4))


def test_weights_stay_views_of_the_bank_so_that_updates_reach_the_model():
    params = [torch.nn.Parameter(torch.randn(4, 8, 8)) for _ in range(3)]
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.randn_like(p)
    Muon(params, 0.1, 0.0, ONE_RANK, muon_update).step(1.0, 0.9)
    assert all(not torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_every_parameter_is_in_exactly_one_group(tiny_hp):
    model = GPT(tiny_hp, ONE_RANK)
    groups = optimizers(model, tiny_hp, ONE_RANK, lambda f: f)
    grouped = [p for group in groups.values() for p in group.params]
    assert len(grouped) == len(list(model.parameters()))
    model.forgotten = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(AssertionError, match="group"):
        optimizers(model, tiny_hp, ONE_RANK, lambda f: f)


def test_schedules_at_their_end_points(tiny_hp):
    hp = dataclasses.replace(
        tiny_hp, num_steps=1000, warmup_frac=0.1, cooldown_frac=0.4, final_lr_frac=0.1
    )
    assert lr_scale(0, hp) == pytest.approx(0.01)
    assert lr_scale(100, hp) == lr_scale(600, hp) == 1.0
    assert lr_scale(800, hp) == pytest.approx(0.55)
    assert lr_scale(999, hp) == pytest.approx(0.1 + 0.9 / 400)
    assert window_tokens(0, hp) == 16 and window_tokens(999, hp) == window_tokens(1000, hp) == 48
    assert window_tokens(333, hp) == 16 and window_tokens(334, hp) == 32
    assert muon_momentum(0, hp) == pytest.approx(0.85)
    assert muon_momentum(10**6, hp) == pytest.approx(0.95)


def test_muon_on_two_ranks_equals_one(tmp_path):
    """Seven matrices, so that the ranks' parts differ in size."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import sys, torch\n"
        "from records.harness import Runtime\n"
        "from train_gpt import Muon, muon_update\n"
        "rt = Runtime()\n"
        "rt.matmul_dtype = torch.float32\n"
        "torch.manual_seed(0)\n"
        "params = [torch.nn.Parameter(torch.randn(n, 16, 8)) for n in (3, 4)]\n"
        "muon = Muon(params, 0.05, 0.1, rt, muon_update)\n"
        "for step in range(5):\n"
        "    for p in params:\n"
        "        p.grad = torch.randn_like(p)\n"
        "    muon.step(1.0, 0.9)\n"
        "state = {**muon.state(), 'bank': muon.bank}\n"
        "torch.save(state, f'{sys.argv[1]}/{rt.world_size}_{rt.rank}.pt')\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    for launcher in ([sys.executable], [*torchrun, "--nproc_per_node=2"]):
        environment = clean_environment(PYTHONPATH=str(ROOT))
        subprocess.run([*launcher, script, tmp_path], env=environment, check=True, timeout=120)
    alone = torch.load(tmp_path / "1_0.pt")
    for rank in (0, 1):
        together = torch.load(tmp_path / f"2_{rank}.pt")
        for name, tensor in alone.items():
            torch.testing.assert_close(together[name], tensor, atol=2e-5, rtol=1e-4)
