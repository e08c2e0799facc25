"""What only a GPU can show: run with `python -m pytest tests/gpu` on a machine that has one."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_model import START, brute_force_mask, docs_of, tokens
from torch._dynamo.utils import counters

from records.harness import RunOptions, Runtime, Stopwatch
from train_gpt import PROCESS_START, TRACKS, Trainer, attend, block_mask, orthogonalize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NO_LOG = SimpleNamespace(line=lambda *a, **k: None, progress=lambda *a: None)


@pytest.mark.parametrize("window", [1, 128, 129, 300, 1024])
def test_flex_attention_forward_and_backward_equal_sdpa_in_fp64(window):
    torch.manual_seed(window)
    inputs = tokens(2, 1024, seed=window)
    inputs[1, 300:] = 5
    q, k, v = (
        torch.randn(2, 2, 1024, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    gradient = torch.randn_like(q)
    blocks = block_mask(docs_of(inputs).cuda(), torch.tensor(window, device="cuda"))
    y = torch.compile(attend)(q, k, v, blocks, 0.12)
    found = torch.autograd.grad(y, (q, k, v), gradient)
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    mask = brute_force_mask(inputs, window).cuda()
    expected_y = F.scaled_dot_product_attention(*exact, attn_mask=mask, scale=0.12)
    expected = torch.autograd.grad(expected_y, exact, gradient.double())
    for a, b in zip((y, *found), (expected_y, *expected), strict=True):
        assert (a.double() - b).norm() / b.norm() < 0.01


def small_trainer(num_steps: int, shards, vocab: int) -> Trainer:
    hp = dataclasses.replace(
        TRACKS["fineweb"],
        train_files=str(shards / "train_*.bin"),
        val_files=str(shards / "val.bin"),
        vocab_size=vocab,
        document_start=START,
        val_tokens=2048,
        val_seq_len=1024,
        num_steps=num_steps,
        seq_len=1024,
        batch_tokens=2048,
        num_layers=4,
        num_heads=2,
        head_dim=64,
        model_dim=128,
        mlp_dim=512,
        skip_from=1,
        skip_to=3,
        backout_layer=2,
        window_start=256,
        window_end=768,
        max_epochs=20,
    )
    rt = Runtime()
    return Trainer(hp, RunOptions(), rt, Stopwatch(PROCESS_START, rt.synchronize), NO_LOG)


def test_no_recompilation_after_warm_up_and_two_equal_first_steps(shards):
    from train_gpt import micro_batches

    warm, cold = small_trainer(30, shards, 64), small_trainer(30, shards, 64)
    warm.warm_up()
    graphs = counters["stats"]["unique_graphs"]
    rows = micro_batches(warm.hp, warm.rt, warm.micro_seqs, 0, 0)
    batches = ([t.cuda() for t in pair] for pair in rows)
    warm_losses = [warm.update(step, batches).item() for step in range(30)]
    warm.validation_loss(29, warm.val)
    assert counters["stats"]["unique_graphs"] == graphs
    rows = micro_batches(cold.hp, cold.rt, cold.micro_seqs, 0, 0)
    batches = ([t.cuda() for t in pair] for pair in rows)
    cold_losses = [cold.update(step, batches).item() for step in range(2)]
    assert cold_losses == pytest.approx(warm_losses[:2], abs=1e-3)
    assert warm_losses[-1] < warm_losses[0] - 0.5


def test_orthogonalize_in_bf16_levels_singular_values():
    G = torch.randn(4, 768, 768, device="cuda")
    singular = torch.linalg.svdvals(orthogonalize(G, torch.bfloat16).float())
    assert singular.quantile(0.05) > 0.7 and singular.max() < 1.3
