import dataclasses
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_TASK
from forked import run_forked

from referee.task import Task
from train_gpt import (
    GPT,
    TRACKS,
    Adam,
    Group,
    Muon,
    as_fp32,
    lr_scale,
    make_optimizers,
    muon_momentum,
    muon_update,
    orthogonalize,
    parameter_groups,
    split_fp32,
    step_inputs,
)

ONE_RANK = SimpleNamespace(
    stream_dtype=torch.float32,
    matmul_dtype=torch.float32,
    shared_memory_bytes=0,
    rank=0,
    world_size=1,
    is_alone=True,
    is_gpu=False,
    average=lambda tensors: None,
)
HP = TRACKS["embedded"]  # whose rates are level at first


def muon(params, lr, decay, rt=ONE_RANK) -> Muon:
    return Muon(Group(params, lr, decay, 1), HP, rt, lambda f: f)


def adam(params, decay=0.0) -> Adam:
    return Adam(Group(params, 0.01, decay, 1, (0.8, 0.95)), HP, ONE_RANK, lambda f: f)


def take_step(optimizer: Muon | Adam, step: int = 0) -> None:
    optimizer.start_exchange()
    optimizer.step(step)


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
    rate, beta, factors = 0.1, 0.9, torch.tensor([1.0, 2.0])[:, None, None]
    m = beta * momentum.double() + (1 - beta) * G.double()
    nesterov = (1 - beta) * G.double() + beta * m
    left, _, right = torch.linalg.svd(nesterov, full_matrices=False)
    U = left @ right
    v = 0.9 * second.double() + 0.1 * (U**2).mean(-1, keepdim=True)
    direction = U / v.sqrt()
    direction *= U.norm(dim=(1, 2), keepdim=True) / direction.norm(dim=(1, 2), keepdim=True)
    expected = W.double() - rate * factors * 2**0.5 * direction
    scalars = (torch.tensor(x) for x in (rate, 0.0, beta))
    muon_update(G, *scalars, factors, torch.float32, W, momentum, second)
    torch.testing.assert_close(second.double(), v, atol=2e-3, rtol=0)
    torch.testing.assert_close(momentum.double(), m, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(W.double(), expected, atol=0.02, rtol=0)


def test_muon_decays_only_weights_that_the_update_shrinks_as_much_as_it_moves_them():
    torch.manual_seed(2)
    W0, G = torch.randn(2, 12, 3), torch.randn(2, 12, 3)
    factors = torch.tensor([1.0, 3.0])[:, None, None]
    after = {}
    for decay in (0.0, 0.3):
        W, momentum, second = W0.clone(), torch.zeros_like(G), torch.zeros(2, 12, 1)
        scalars = (torch.tensor(x) for x in (0.1, decay, 0.9))
        muon_update(G, *scalars, factors, torch.float32, W, momentum, second)
        after[decay] = W
    shrinks = (W0 - after[0.0]) * W0 > 0
    twice = 2 * factors  # 2: the root of rows / columns
    expected = after[0.0] - torch.where(shrinks, twice * 0.1 * 0.1 * 0.3 * W0, 0)
    torch.testing.assert_close(after[0.3], expected, atol=1e-6, rtol=1e-5)
    assert 0.3 < shrinks.float().mean() < 0.7


def test_the_second_matrix_of_an_mlp_moves_twice_as_far_as_the_first(tiny_hp):
    """Four times the rate of a square matrix, as in the public record; the first one twice."""
    hp = dataclasses.replace(tiny_hp, mlp_down_lr=2.0, num_steps=1000)
    model = GPT(hp, Task(**TINY_TASK), ONE_RANK)
    optimizers = make_optimizers(model, hp, ONE_RANK, lambda f: f)
    up_downs = [block.mlp.up_down for block in model.blocks]
    before = [p.detach().clone() for p in up_downs]
    for p in up_downs:
        p.grad = torch.randn_like(p)
    take_step(optimizers["mlp"])
    for p, old in zip(up_downs, before, strict=True):
        up, down = ((p - old).norm(dim=(1, 2)) / (hp.muon_lr * 32**0.5)).tolist()
        assert up == pytest.approx(2, rel=0.15) and down / up == pytest.approx(2, rel=0.1)


def test_muon_survives_a_zero_gradient():
    p = torch.nn.Parameter(torch.ones(2, 8, 4))
    p.grad = torch.zeros_like(p)
    take_step(muon([p], 0.1, 0.0))
    assert torch.equal(p, torch.ones(2, 8, 4))


def test_weights_stay_views_of_the_bank_so_that_updates_reach_the_model():
    params = [torch.nn.Parameter(torch.randn(4, 8, 8)) for _ in range(3)]
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.randn_like(p)
    take_step(muon(params, 0.1, 0.0))
    assert all(not torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_every_parameter_is_in_exactly_one_group(tiny_hp):
    model = GPT(tiny_hp, Task(**TINY_TASK), ONE_RANK)
    groups = make_optimizers(model, tiny_hp, ONE_RANK, lambda f: f)
    grouped = [p for group in groups.values() for p in group.group.params]
    assert len(grouped) == len(list(model.parameters()))
    model.forgotten = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(AssertionError, match="group"):
        make_optimizers(model, tiny_hp, ONE_RANK, lambda f: f)


def test_rates_and_decays_of_fineweb_are_the_public_records():
    """Learning rate, cautious decay of weight 1 at rate factor 1, and factors of each group."""
    hp = dataclasses.replace(TRACKS["fineweb"], model_dim=24, bigram_rows=8)
    groups = parameter_groups(GPT(hp, Task(**TINY_TASK), ONE_RANK), hp)
    found = {n: (g.lr, g.decay * g.lr**2, g.lr_factors, g.every) for n, g in groups.items()}
    expected = {
        "attn": (0.023, 0.023**2 * 1.2, (1.0,), 1),
        "mlp": (0.023, 0.023**2 * 1.2, (1.0, 2.0), 1),
        "embed": (0.008, 0.008**2 * 0.75, (1.0,), 2),
        "head": (0.008, 0.008**2 * 0.75, (1.0,), 2),
        "values": (0.6, 0.6**2 * 0.025, (1.0,), 2),
        "bigram": (0.6, 0.6**2 * 0.025, (1.0,), 2),
        "gates": (0.008, 0.0, (1.0,), 2),
        "scalars": (0.04, 0.0, (1.0,), 2),
    }
    assert found.keys() == expected.keys()
    for name, (*numbers, factors, every) in expected.items():
        assert found[name][:2] == pytest.approx(numbers), name
        assert found[name][2:] == (factors, every), name


def test_schedules_at_their_end_points(tiny_hp):
    hp = dataclasses.replace(tiny_hp, num_steps=1000, momentum_steps=(300, 50))
    assert lr_scale(0, hp) == lr_scale(390, hp) == 1.0  # falls for 600 steps, level for 10
    assert lr_scale(690, hp) == pytest.approx((1 + 0.15) / 2)
    assert lr_scale(990, hp) == lr_scale(999, hp) == pytest.approx(0.15)
    windows = {s: step_inputs(s, hp, "cpu").window for s in (0, 333, 334, 999, 1000)}
    assert windows == {0: 16, 333: 16, 334: 32, 999: 48, 1000: 48}
    found = [muon_momentum(step, hp) for step in (0, 150, 300, 950, 975)]
    assert found == pytest.approx([0.85, 0.90, 0.95, 0.95, 0.90])
    later = dataclasses.replace(hp, batch_tokens=(64, 128, 192))
    assert [lr_scale(step, later) for step in (333, 334)] == [1.0, 1.52]
    assert lr_scale(690, later) == pytest.approx((1.73 + 0.15) / 2)
    assert lr_scale(999, later) == pytest.approx(0.15)  # the same end for every stage


def test_splitting_keeps_every_bit_of_fp32():
    torch.manual_seed(0)
    W = torch.randn(1000, 7) * 10.0 ** torch.randint(-40, 30, (1000, 7))
    high, low = split_fp32(W)
    assert high.dtype == torch.bfloat16 and torch.equal(as_fp32(high, low), W)
    assert ((high.float() - W).abs() <= W.abs() * 2**-7 + 1e-38).all()


def test_a_bf16_bank_takes_the_updates_of_an_fp32_bank_bit_for_bit():
    banks = {}
    for dtype in (torch.float32, torch.bfloat16):
        rt = SimpleNamespace(**{**vars(ONE_RANK), "stream_dtype": dtype})
        torch.manual_seed(3)
        p = torch.nn.Parameter(torch.randn(2, 16, 8))
        made = muon([p], 1e-4, 0.1, rt)
        for _ in range(20):
            p.grad = torch.randn_like(p, dtype=torch.float32).bfloat16().to(dtype)
            take_step(made)
        assert p.dtype == dtype and torch.equal(p.data, made.items)
        banks[dtype] = made
    both = banks[torch.bfloat16]
    assert torch.equal(as_fp32(both.items, both.state["low"]), banks[torch.float32].items)


def test_adam_decays_only_weights_that_the_update_shrinks():
    torch.manual_seed(4)
    start, grad, after = torch.randn(50), torch.randn(50), {}
    for decay in (0.0, 20.0):
        p = torch.nn.Parameter(start.clone())
        p.grad = grad.clone()
        take_step(adam([p], decay))
        after[decay] = p.detach()
    shrinks = grad * after[0.0] > 0
    factor = torch.where(shrinks, 1 - 0.01**2 * 20.0, 1.0)
    torch.testing.assert_close(after[20.0], after[0.0] * factor, atol=1e-7, rtol=1e-6)


def test_adam_takes_the_steps_of_torch():
    torch.manual_seed(5)
    params = [torch.nn.Parameter(torch.randn(7, 3)), torch.nn.Parameter(torch.randn(4))]
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    made, reference = adam(params), torch.optim.Adam(others, 0.01, (0.8, 0.95), 1e-15)
    for step in range(7):
        for p, other in zip(params, others, strict=True):
            other.grad = torch.randn_like(other)
            p.grad = other.grad.clone()
        take_step(made, step)
        reference.step()
    for p, other in zip(params, others, strict=True):
        torch.testing.assert_close(p, other, atol=1e-6, rtol=1e-5)


def test_adam_moves_a_rarely_seen_row_as_far_as_any_other_and_leaves_an_unseen_one():
    """A token's gradient of a mean over 393,216 tokens against one a million times as large."""
    p = torch.nn.Parameter(torch.ones(3, 4))
    p.grad = torch.tensor([1e-4, 1e-10, 0.0])[:, None].expand(3, 4).clone()
    take_step(adam([p]))
    moved = (1 - p.detach())[:, 0]
    assert moved[0].item() == pytest.approx(0.01, rel=1e-4)
    assert moved[1].item() == pytest.approx(0.01, rel=1e-4) and moved[2] == 0


RANK = """
import sys, torch
from referee.ranks import Runtime
from train_gpt import TRACKS, Adam, Group, Muon, as_fp32
rt = Runtime()
rt.stream_dtype = getattr(torch, sys.argv[2])
rt.matmul_dtype = torch.float32
torch.manual_seed(0)
groups = {
    "muon": Group([torch.nn.Parameter(torch.randn(n, 16, 8)) for n in (3, 4)], 0.05, 0.1, 1,
                  lr_factors=(1.0, 2.0, 1.0, 3.0, 1.0, 1.0, 0.5)),
    "few": Group([torch.nn.Parameter(torch.randn(1, 16, 8))], 0.05, 0.1, 1),
    "adam": Group([torch.nn.Parameter(torch.randn(n)) for n in (13, 6)], 0.05, 0.1, 2, (0.8, 0.9)),
}
optimizers = {name: (Adam if group.betas else Muon)(group, TRACKS["embedded"], rt, lambda f: f)
              for name, group in groups.items()}
for o in optimizers.values():
    o.gather_state()  # as before warm-up, when nothing was exchanged yet
for step in range(6):
    due = [o for o in optimizers.values() if (step + 1) % o.group.every == 0]
    for o in optimizers.values():
        for p in o.group.params:
            # Each rank has the mean of its share, without rounding in bf16.
            all_ranks = torch.randint(-8, 9, (8, *p.shape)) / 8
            mine = all_ranks.chunk(rt.world_size)[rt.rank].mean(0).to(p.dtype)
            p.grad = mine if p.grad is None else p.grad + mine
    for o in due:
        o.start_exchange()
    for o in due:
        o.step(step)
    for o in due:
        o.finish()
state = {}
for name, o in optimizers.items():
    found = o.gather_state()
    found["items"] = as_fp32(o.items[: o.count], found.pop("low", None))
    state |= {f"{name}.{k}": t for k, t in found.items()}
torch.save(state, f"{sys.argv[1]}/{rt.world_size}_{rt.rank}.pt")
rt.close()
"""


@pytest.mark.parametrize("ranks, stream", [(2, "float32"), (4, "bfloat16"), (8, "bfloat16")])
def test_ranks_together_take_the_steps_of_one(tmp_path, ranks, stream):
    """Banks of 7 matrices, of 1, and of 19 numbers, of which the ranks' parts differ in size."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    for count in (1, ranks):
        done = run_forked([str(script), str(tmp_path), stream], count)
        assert done.returncode == 0, done.stderr
    alone = torch.load(tmp_path / "1_0.pt")
    for rank in range(ranks):
        together = torch.load(tmp_path / f"{ranks}_{rank}.pt")
        for name, tensor in alone.items():
            torch.testing.assert_close(together[name], tensor, atol=2e-5, rtol=1e-4)
