"""The model on a GPU: attention against fp64, compiled graphs, memory, warm-up without a trace."""

import dataclasses
import gc

import pytest
import torch
import torch.nn.functional as F
from conftest import settings

from kernels import block_mask, flex_attention, flex_options, may_attend
from referee.harness import Run, StopRequest, compiled_graphs, warm_up
from referee.ranks import Runtime
from referee.shards import write_shard
from referee.task import TASKS
from train_gpt import (
    PROCESS_START,
    TRACKS,
    Trainer,
    memory_estimate,
    orthogonalize,
    step_inputs,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("window", [1, 128, 200, 1000, 4096])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_flex_attention_equals_sdpa_in_fp64_forward_and_backward(window, seed):
    torch.manual_seed(seed)
    T, options = 2048, flex_options(Runtime().shared_memory_bytes)
    docs = (torch.rand(2, T, device="cuda") < 0.004).cumsum(1)
    q, k, v, dy = torch.randn(4, 2, 3, T, 128, device="cuda", dtype=torch.bfloat16)
    q, at = 0.1 * F.rms_norm(q, (128,)), torch.tensor(window, device="cuda")
    index = torch.arange(T, device="cuda")
    by_doc = docs[:, None, :, None], docs[:, None, None]
    mask = may_attend(index[:, None], index, *by_doc, window)
    found, expected = [], []

    @torch.compile(dynamic=False, fullgraph=True)
    def compiled(q, k, v, docs, at):  # the mask inside, as training compiles it
        blocks = block_mask(docs, at)
        return flex_attention(q, k, v, block_mask=blocks, scale=1.0, kernel_options=options)

    for results, dtype in ((found, torch.bfloat16), (expected, torch.float64)):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        if dtype == torch.bfloat16:
            y = compiled(*inputs, docs, at)
        else:
            y = F.scaled_dot_product_attention(*inputs, attn_mask=mask, scale=1.0)
        y.backward(dy.to(dtype))
        results += [y.detach(), *(t.grad for t in inputs)]
    for a, b in zip(found, expected, strict=True):
        # A window of one token has no gradient of q and k but what rounding leaves.
        assert (a.double() - b).norm() < 0.02 * b.norm() + 1e-5 * b.numel() ** 0.5


@pytest.fixture
def task(tmp_path):
    """The fineweb task on made-up documents."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 50256, (2**23,), generator=generator)
    tokens[torch.rand(2**23, generator=generator) < 0.0015] = 50256
    tokens[0] = 50256
    for name in ("train", "val"):
        write_shard(tmp_path / f"{name}.bin", tokens.numpy())
    return dataclasses.replace(
        TASKS["fineweb"],
        train_files=str(tmp_path / "train.bin"),
        val_files=str(tmp_path / "val.bin"),
        val_tokens=2**18,
    )


# The fineweb track, for as many steps as change its stage.
HP = dataclasses.replace(
    TRACKS["fineweb"],
    num_steps=9,
    batch_tokens=(131_072, 262_144, 131_072),
)


def built(task, **options) -> tuple[Run, Trainer]:
    gc.collect()
    torch.cuda.empty_cache()
    chosen = settings(task, HP, **options)
    run = Run(chosen, "train_gpt.py", Runtime(), StopRequest(), PROCESS_START)
    return run, run.build(Trainer)


def on_gpu(made: Trainer):
    return (tuple(t.cuda() for t in pair) for pair in made.batches(0))


def test_nothing_recompiles_after_warm_up(task):
    run, made = built(task)
    warm_up(run, made)
    before, batches = compiled_graphs(), on_gpu(made)
    for step in range(HP.num_steps):
        if step % 4 == 0:
            run.validation.loss(lambda x, at=step: made.predict(at, x), made.val_batch_rows)
        made.update(step, batches)
    assert compiled_graphs() == before


def test_two_steps_are_the_same_with_and_without_warm_up(task):
    losses = []
    for warm in (True, False):
        run, made = built(task)
        if warm:
            warm_up(run, made)
        else:
            made.compile(run.compiler())
        batches = on_gpu(made)
        losses.append([made.update(step, batches).item() for step in range(2)])
        del run, made
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)  # atomics of the embedding gradients


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
def test_peak_memory_stays_below_the_estimate_and_near_it(task, rows):
    vocab = 50304
    estimate = memory_estimate(HP, vocab, rows)
    if estimate > 0.9 * torch.cuda.get_device_properties(0).total_memory:
        pytest.skip("more than this GPU has")
    run, made = built(task, micro_batch_seqs=rows)
    warm_up(run, made)
    torch.cuda.reset_peak_memory_stats()
    batches = on_gpu(made)
    for step in range(2):
        made.update(step, batches)
    peak = torch.cuda.max_memory_allocated()
    print(f"{rows} rows: peak {peak / 2**30:.1f} GiB, estimate {estimate / 2**30:.1f} GiB")
    assert 0.8 * estimate < peak < 1.1 * estimate


def test_orthogonalize_in_bf16_levels_singular_values():
    G = torch.randn(4, 768, 768, device="cuda")
    singular = torch.linalg.svdvals(orthogonalize(G, torch.bfloat16).float())
    assert singular.quantile(0.05) > 0.7 and singular.max() < 1.3


def test_gradients_of_tables_stand_above_adams_eps(task):
    run, made = built(task)
    warm_up(run, made)
    batches = on_gpu(made)
    for step in range(4):
        made.update(step, batches)
    made.loss(*next(batches), step_inputs(4, HP, "cuda")).backward()
    for name in ("value_embeds", "bigram"):
        gradient = getattr(made.model, name).grad.abs()
        median = gradient[gradient > 0].median().item()
        print(f"{name}: median gradient of the entries that were seen {median:.2e}")
        assert median > 1e-10
