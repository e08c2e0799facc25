"""What changes while a run goes on: frequencies, targets, gradients that wait, the tied head."""

import dataclasses
import math
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import trainer

from train_gpt import TRACKS, lr_scale, muon_momentum, step_inputs


def test_slow_frequencies_stretch_with_the_window():
    """YaRN by its formula, pair by pair, for the fineweb track's windows."""
    hp = TRACKS["fineweb"]
    for stage, windows in enumerate([(384,), (384, 896), (384, 896, 1408)]):
        at = step_inputs(stage * 500, hp, "cpu")
        scale = hp.attn_scale
        for old, new in zip(windows, windows[1:], strict=False):
            scale *= 1 + 0.2 * math.log(new / old)
        assert at.window == windows[-1] and at.attn_scale.item() == pytest.approx(scale)
        for i in range(32):
            f = 1024 ** -(i / 31)
            for old, new in zip(windows, windows[1:], strict=False):
                kept = min(1.0, max(0.0, (old * f / (2 * math.pi) - 1) / 31))
                f *= old / new + kept * (1 - old / new)
            assert at.frequency[i].item() == pytest.approx(f, rel=1e-5)


def test_validation_widens_the_long_window_alone_with_the_frequencies_of_the_step():
    hp = TRACKS["fineweb"]
    found = {step: [(int(at.window), int(at.short_window)) for at in
                    (step_inputs(step, hp, "cpu", training) for training in (True, False))]
             for step in (0, 499, 500, 999, 1000, 1499)}  # fmt: skip
    first, second, third = ([(long, short), (2560, short)]
                            for long, short in ((384, 128), (896, 384), (1408, 640)))  # fmt: skip
    assert list(found.values()) == [first, first, second, second, third, third]
    during, after = (step_inputs(1499, hp, "cpu", training) for training in (True, False))
    assert torch.equal(during.frequency, after.frequency) and after.mtp_weights.tolist() == [1]


def test_every_step_of_fineweb_has_the_rate_and_momentum_of_the_public_record():
    """1,500 steps of which the last 15 are level: three stages, a fall from 39%, one end."""
    hp = TRACKS["fineweb"]
    steps = np.arange(1500)
    peak = np.array([1.0, 1.52, 1.73])[steps // 500]
    done = np.clip((steps - 585) / 900, 0, 1)
    rates = peak * (1 - done) + 0.15 * done
    momentum = np.interp(steps, [0, 300, 1450, 1500], [0.85, 0.95, 0.95, 0.85])
    np.testing.assert_allclose([lr_scale(s, hp) for s in steps], rates, rtol=1e-9)
    np.testing.assert_allclose([muon_momentum(s, hp) for s in steps], momentum, rtol=1e-9)


def test_further_targets_fade_by_two_thirds_of_the_run():
    hp = dataclasses.replace(TRACKS["fineweb"], num_steps=900)
    ratios = {}
    for step in (0, 150, 300, 450, 600, 899):
        weights = step_inputs(step, hp, "cpu").mtp_weights
        assert weights.sum().item() == pytest.approx(1)
        ratios[step] = [(w / weights[0]).item() for w in weights[1:]]
    expected = {0: (0.5, 0.25), 150: (0.5, 0.125), 300: (0.5, 0), 450: (0.25, 0),
                600: (0, 0), 899: (0, 0)}  # fmt: skip
    for step, pair in expected.items():
        assert ratios[step] == pytest.approx(pair, abs=1e-6), step


def test_the_head_is_the_embedding_until_they_part(tiny_hp, tiny_task):
    hp = dataclasses.replace(tiny_hp, tied_frac=0.5, num_steps=8)
    run = trainer(tiny_task, hp)
    batches = run.batches(0)
    for step in range(8):
        before = run.model.embed.detach().clone()
        run.update(step, batches)
        assert torch.equal(run.model.embed, run.model.lm_head) == (step < 5), step
        assert torch.equal(before, run.model.embed) == (step % 2 == 0)  # Adam moves every other


@pytest.mark.parametrize("tied_frac", [0.0, 0.5])
def test_a_waiting_gradient_is_the_sum_over_steps_and_tied_matrices(tiny_hp, tiny_task, tied_frac):
    """Two steps of which Adam takes the second, against one step by hand with all gradients."""
    tiny_hp = dataclasses.replace(tiny_hp, tied_frac=tied_frac)
    run, moved_by = trainer(tiny_task, tiny_hp), []
    bank = run.optimizers["embed"]
    start = bank.start_exchange
    bank.start_exchange = lambda: moved_by.append(embed.grad) or start()
    batches = list(islice(run.batches(0), 2))
    embed, hand = run.model.embed, 0.0
    before = embed.detach().clone()
    for step, (inputs, targets) in enumerate(batches):
        loss = run.model(inputs, targets, step_inputs(step, tiny_hp, "cpu"))
        matrices = (embed, run.model.lm_head) if tied_frac else (embed,)
        hand += sum(torch.autograd.grad(loss, matrices))
        run.update(step, iter([(inputs, targets)]))
    torch.testing.assert_close(moved_by, [hand], atol=1e-3 * hand.abs().max().item(), rtol=0)
    reference = torch.nn.Parameter(before)
    reference.grad = hand
    rate = bank.group.lr * lr_scale(1, tiny_hp)
    torch.optim.Adam([reference], rate, bank.group.betas, 1e-15).step()
    torch.testing.assert_close(embed, reference, atol=2e-5, rtol=1e-4)
    assert embed.grad is None


def test_larger_batches_of_later_stages_take_more_forward_passes(tiny_hp, tiny_task):
    hp = dataclasses.replace(tiny_hp, batch_tokens=(512, 1024, 1536), num_steps=9)
    run, drawn = trainer(tiny_task, hp), []
    run.loss = lambda inputs, targets, at: drawn.append(inputs) or run.model(inputs, targets, at)
    batches = run.batches(0)
    counts = []
    for step in range(9):
        drawn.clear()
        run.update(step, batches)
        counts.append(sum(inputs.numel() for inputs in drawn))
    assert counts == [512] * 3 + [1024] * 3 + [1536] * 3
