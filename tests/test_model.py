import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import START, VOCAB
from torch.nn.attention.flex_attention import flex_attention

import train_gpt
from records.harness import compiled_graphs
from train_gpt import GPT, block_mask, dense_mask, norm, rotary_tables, rotate

CPU = SimpleNamespace(stream_dtype=torch.float32, matmul_dtype=torch.float32)


def randomized(hp, seed=0) -> GPT:
    """A model in which nothing is at its neutral start, so that every path carries signal."""
    torch.manual_seed(seed)
    model = GPT(hp, CPU)
    for p in model.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    return model


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, START, (rows, length), generator=generator)
    starts = torch.rand(rows, length, generator=generator) < 0.04
    return torch.where(starts, START, drawn)


def brute_force_mask(inputs_BT, window):
    rows, length = inputs_BT.shape
    allowed = torch.zeros(rows, 1, length, length, dtype=torch.bool)
    for b in range(rows):
        for q in range(length):
            for k in range(q, -1, -1):
                if q - k >= window:
                    break
                allowed[b, 0, q, k] = True
                if inputs_BT[b, k] == START:
                    break  # whatever lies before belongs to another document
    return allowed


def docs_of(inputs_BT):
    return (inputs_BT == START).cumsum(1)


@pytest.mark.parametrize("window", [1, 2, 31, 64, 500])
def test_dense_mask_equals_brute_force_at_window_edges(window):
    inputs = tokens(2, 96)
    assert torch.equal(
        dense_mask(docs_of(inputs), torch.tensor(window)), brute_force_mask(inputs, window)
    )


@pytest.mark.parametrize("window", [1, 100, 128, 129, 255, 256, 257, 400, 512])
def test_flex_attention_equals_sdpa_with_the_same_mask(window):
    torch.manual_seed(window)
    inputs = tokens(2, 512, seed=window)
    inputs[1, 200:] = 5  # a long document, so that some blocks are full
    q, k, v = (torch.randn(2, 2, 512, 16) for _ in range(3))
    blocks = block_mask(docs_of(inputs), torch.tensor(window))
    by_blocks = flex_attention(q, k, v, block_mask=blocks, scale=0.2)
    mask = brute_force_mask(inputs, window)
    by_mask = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.2)
    torch.testing.assert_close(by_blocks, by_mask, atol=2e-6, rtol=1e-5)


def test_block_mask_lists_only_blocks_that_the_mask_touches_and_full_ones_as_full():
    inputs = torch.full((1, 1024), 7)
    inputs[0, 300] = START
    mask = brute_force_mask(inputs, 300)[0, 0].view(8, 128, 8, 128).transpose(1, 2)
    blocks = block_mask(docs_of(inputs), torch.tensor(300))
    touched, full = mask.flatten(2).any(-1), mask.flatten(2).all(-1)
    assert torch.equal(blocks.full_kv_num_blocks[0, 0], full.sum(-1).int())
    assert torch.equal(blocks.kv_num_blocks[0, 0], (touched & ~full).sum(-1).int())


def test_rotary_scores_depend_on_distance_only():
    cos, sin = rotary_tables(64, 32, 100.0, "cpu")
    q, k = torch.randn(1, 1, 1, 32).expand(1, 64, 1, 32), torch.randn(1, 1, 1, 32)
    k = k.expand(1, 64, 1, 32)
    scores = torch.einsum("bqhk,bjhk->qj", rotate(q, cos, sin), rotate(k, cos, sin))
    for distance in (0, 1, 17):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=1e-4)


def test_norm_is_the_root_mean_square_norm():
    x = torch.randn(3, 50, dtype=torch.float64)
    expected = F.rms_norm(x, (50,), eps=1e-6)
    torch.testing.assert_close(norm(x), expected, rtol=1e-6, atol=1e-7)


def test_first_loss_is_that_of_a_uniform_guess(tiny_hp):
    inputs = tokens(4, 64)
    loss = GPT(tiny_hp, CPU)(inputs, inputs.roll(-1, 1), torch.tensor(32))
    assert abs(loss.item() - math.log(VOCAB)) < 0.05


def test_future_tokens_do_not_change_logits(tiny_hp):
    model, inputs = randomized(tiny_hp), tokens(2, 64)
    before = model.logits(inputs, torch.tensor(48))
    for place in (1, 30, 63):
        changed = inputs.clone()
        changed[:, place:] = (changed[:, place:] + 7) % START
        after = model.logits(changed, torch.tensor(48))
        assert torch.equal(before[:, :place], after[:, :place])
        assert not torch.equal(before[:, place:], after[:, place:])


def test_other_documents_do_not_change_logits(tiny_hp):
    model, inputs = randomized(tiny_hp), tokens(1, 64) % START
    inputs[0, [0, 20, 40]] = START
    before = model.logits(inputs, torch.tensor(64))
    changed = inputs.clone()
    changed[0, 21:40] = (changed[0, 21:40] + 11) % START
    after = model.logits(changed, torch.tensor(64))
    torch.testing.assert_close(before[0, :21], after[0, :21], rtol=0, atol=0)
    torch.testing.assert_close(before[0, 40:], after[0, 40:], rtol=0, atol=0)


def test_tokens_beyond_every_window_do_not_change_logits(tiny_hp):
    """What 2 short and 2 long windows, 8 sublayers of 2 taps, keys, smear and pair cannot reach."""
    model, window = randomized(tiny_hp), 8
    inputs = tokens(1, 64) % START
    before = model.logits(inputs, torch.tensor(window))
    reach = 2 * (window // 2 - 1) + 2 * (window - 1) + 8 * 2 + 2 + 2
    changed = inputs.clone()
    changed[0, 0] = (changed[0, 0] + 1) % START
    after = model.logits(changed, torch.tensor(window))
    assert torch.equal(before[0, reach + 1 :], after[0, reach + 1 :])
    assert not torch.equal(before[0, :reach], after[0, :reach])


def test_logits_stay_within_the_cap(tiny_hp):
    model = randomized(tiny_hp)
    model.lm_head.data.mul_(1000)
    assert model.logits(tokens(1, 64), torch.tensor(48)).abs().max() <= tiny_hp.logit_cap


def test_every_parameter_gets_a_gradient(tiny_hp):
    model, inputs = randomized(tiny_hp), tokens(2, 64)
    model(inputs, inputs.roll(-1, 1), torch.tensor(48)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_one_compiled_graph_with_flex_attention_serves_every_window(tiny_hp, monkeypatch):
    """The GPU's path of the model as torch.compile captures it, forward only, run on the CPU."""
    hp = dataclasses.replace(tiny_hp, seq_len=256)
    model, inputs = randomized(hp), tokens(2, 256)
    windows = [torch.tensor(w) for w in (16, 100, 256)]
    with torch.no_grad():
        expected = [model.logits(inputs, window) for window in windows]
        monkeypatch.setattr(train_gpt, "attention_mask", block_mask)
        compiled = torch.compile(model.logits, fullgraph=True, dynamic=False, backend="aot_eager")
        before = compiled_graphs()
        found = [compiled(inputs, window) for window in windows]
    assert compiled_graphs() == before + 1
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
