import dataclasses
import math
import operator
from contextlib import nullcontext
from functools import partial
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.attention.flex_attention as flex
import torch.nn.functional as F
from conftest import START, TINY_TASK, VOCAB
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import flex_attention

import kernels
import train_gpt
from kernels import attend, block_lists, block_mask, chunk_mask
from referee.harness import compiled_graphs
from referee.task import TASKS, Task
from train_gpt import (
    CAP,
    GPT,
    MIX_INIT,
    TRACKS,
    Softcap,
    StateMix,
    StepInputs,
    make_optimizers,
    norm,
    normed_with_earlier,
    pair_heads,
    parse_layers,
    rotary_tables,
    rotate,
    softcapped,
    step_inputs,
)

TASK = Task(**TINY_TASK)
CPU = SimpleNamespace(
    stream_dtype=torch.float32, matmul_dtype=torch.float32, shared_memory_bytes=0, has_fp8=False
)


def through(hp, window: int, step: int = 0) -> StepInputs:
    """The inputs of a step with other windows, the short one half as long."""
    windows = dict(window=torch.tensor(window), short_window=torch.tensor(window // 2))
    return step_inputs(step, hp, "cpu")._replace(**windows)


def logits_of(model, inputs, per_step):
    return model.logits(model.hidden(inputs, per_step))


def randomized(hp, seed=0) -> GPT:
    """A model in which nothing is at its neutral start, so that every path carries signal."""
    torch.manual_seed(seed)
    model = GPT(hp, TASK, CPU)
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
    inputs, allowed = inputs_BT.tolist(), np.zeros((rows, 1, length, length), bool)
    for b in range(rows):
        for q in range(length):
            for k in range(q, -1, -1):
                if q - k >= window:
                    break
                allowed[b, 0, q, k] = True
                if inputs[b][k] == START:
                    break  # whatever lies before belongs to another document
    return torch.from_numpy(allowed)


def docs_of(inputs_BT):
    return (inputs_BT == START).cumsum(1)


@pytest.mark.parametrize("length", [96, 128, 512])
@pytest.mark.parametrize("window", [1, 2, 31, 64, 127, 128, 129, 130, 257, 500])
def test_attention_by_chunks_equals_sdpa_with_a_brute_force_mask(window, length):
    torch.manual_seed(window)
    inputs = tokens(2, length, seed=window)
    inputs[1, 5:] = 5  # a long document
    q, k, v = (torch.randn(2, 2, length, 16, requires_grad=True) for _ in range(3))
    mask = chunk_mask(docs_of(inputs), torch.tensor(window), longest=window)
    brute = brute_force_mask(inputs, window)
    by_mask = F.scaled_dot_product_attention(q, k, v, attn_mask=brute, scale=0.3)
    expected = by_mask, *torch.autograd.grad(by_mask.square().sum(), (q, k, v))
    y = attend(0.3 * q, k, v, mask)
    found = y, *torch.autograd.grad(y.square().sum(), (q, k, v))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "window, keys", [(1, 128), (128, 256), (129, 256), (130, 384), (9999, 1024)]
)
def test_chunks_hold_no_key_that_the_longest_window_cannot_reach(window, keys):
    docs = torch.zeros(1, 1024, dtype=torch.int64)
    assert chunk_mask(docs, torch.tensor(5), longest=window).shape == (1, 1, 8, 128, keys)


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


@pytest.mark.parametrize("B", [1, 3])
def test_block_lists_are_dense_for_every_row_also_in_a_graph(B):
    chosen = torch.rand(B, 5, 7) < 0.5
    for mode in (nullcontext(), FakeTensorMode()):
        with mode:
            made = block_lists(torch.zeros(B, 5, 7, dtype=torch.bool))
        assert [t.stride() for t in made] == [(5, 5, 1), (35, 35, 7, 1)]
    graphs = []

    def keep_graph(graph, _):
        graphs.append(graph)
        return graph

    @torch.compile(backend=keep_graph, fullgraph=True)
    def mask_inside(inputs):
        blocks = block_mask(docs_of(inputs), torch.tensor(300))
        return blocks.kv_num_blocks, blocks.full_kv_indices

    mask_inside(tokens(B, 512))
    (graph,) = graphs
    assert str(graph.graph).count("photofinish.block_lists") == 2
    counts, order = block_lists(chosen)
    for b, row in product(range(B), range(5)):
        listed = order[b, 0, row, : counts[b, 0, row]].tolist()
        assert listed == chosen[b, row].nonzero().flatten().tolist()


def test_rotary_scores_depend_on_distance_only():
    cos, sin = rotary_tables(64, 100.0 ** -torch.linspace(0, 1, 8))
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
    at = step_inputs(0, tiny_hp, "cpu", training=False)
    loss = GPT(tiny_hp, TASK, CPU)(inputs, inputs.roll(-1, 1), at)
    assert abs(loss.item() - math.log(VOCAB)) < 0.05


def test_future_tokens_do_not_change_logits(tiny_hp):
    model, inputs = randomized(tiny_hp), tokens(2, 64)
    before = logits_of(model, inputs, through(tiny_hp, 48))
    for place in (1, 30, 63):
        changed = inputs.clone()
        changed[:, place:] = (changed[:, place:] + 7) % START
        after = logits_of(model, changed, through(tiny_hp, 48))
        assert torch.equal(before[:, :place], after[:, :place])
        assert not torch.equal(before[:, place:], after[:, place:])


@pytest.mark.parametrize("in_layers", [True, False])
def test_other_documents_do_not_change_logits(in_layers, tiny_hp):
    hp = dataclasses.replace(tiny_hp, bigram_in_layers=in_layers)
    model, inputs = randomized(hp), tokens(1, 64) % START
    inputs[0, [0, 20, 40]] = START
    before = logits_of(model, inputs, through(tiny_hp, 64))
    changed = inputs.clone()
    changed[0, 21:40] = (changed[0, 21:40] + 11) % START
    after = logits_of(model, changed, through(tiny_hp, 64))
    torch.testing.assert_close(before[0, :21], after[0, :21], rtol=0, atol=0)
    torch.testing.assert_close(before[0, 40:], after[0, 40:], rtol=0, atol=0)


def test_taps_add_earlier_normed_tokens_of_the_same_document(tiny_hp):
    docs, x, taps = torch.tensor([[1] * 5 + [2] * 7]), torch.randn(1, 12, 8), torch.randn(2, 8)
    ctx = randomized(tiny_hp).context(docs, through(tiny_hp, 12))
    normed = x / x.square().mean(-1, keepdim=True).sqrt()
    wanted = normed.clone()
    for t, back in product(range(12), (1, 2)):
        if t - back >= (5 if t >= 5 else 0):
            wanted[0, t] += taps[back - 1] * normed[0, t - back]
    torch.testing.assert_close(normed_with_earlier(x, taps, ctx), wanted, rtol=1e-4, atol=1e-4)


def test_tokens_beyond_every_window_do_not_change_logits(tiny_hp):
    """What a paired, a long and a short window, 7 sublayers of 2 taps, the key offset of the long
    layer, and bigram cannot reach."""
    model, window = randomized(tiny_hp), 8
    inputs = tokens(1, 64) % START
    before = logits_of(model, inputs, through(tiny_hp, window))
    paired = window // 4  # a window of 4 in twice as many positions
    reach = paired + (window - 1) + (window // 2 - 1) + 7 * 2 + 1 + 1
    changed = inputs.clone()
    changed[0, 0] = (changed[0, 0] + 1) % START
    after = logits_of(model, changed, through(tiny_hp, window))
    assert torch.equal(before[0, reach + 1 :], after[0, reach + 1 :])
    assert not torch.equal(before[0, :reach], after[0, :reach])


def test_logits_stay_within_the_cap(tiny_hp):
    model = randomized(tiny_hp)
    model.lm_head.data.mul_(1000)
    logits = logits_of(model, tokens(1, 64), through(tiny_hp, 48))
    assert logits.abs().max() <= CAP.height


def test_every_parameter_gets_a_gradient(tiny_hp):
    model, inputs = randomized(tiny_hp), tokens(2, 64)
    model(inputs, inputs.roll(-1, 1), through(tiny_hp, 48)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_one_compiled_graph_with_flex_attention_serves_every_window(tiny_hp, monkeypatch):
    """The GPU's path of the model as torch.compile captures it, forward only, run on the CPU."""
    hp = dataclasses.replace(tiny_hp, seq_len=256, layers="sL", mix_at=(1, 2), mix_from=(0,),
                             value_layers=(0,))  # fmt: skip
    model, inputs = randomized(hp), tokens(2, 256)
    windows = [through(hp, w) for w in (16, 100, 256)]
    with torch.no_grad():
        expected = [logits_of(model, inputs, window) for window in windows]
        monkeypatch.setattr(train_gpt, "attention_mask", lambda *args: block_mask(*args[:2]))
        compiled = torch.compile(
            partial(logits_of, model), fullgraph=True, dynamic=False, backend="aot_eager"
        )
        before = compiled_graphs()
        found = [compiled(inputs, window) for window in windows]
    assert compiled_graphs() == before + 1
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_paired_heads_see_each_other_in_turns(tiny_hp):
    """Against a loop: of heads a and b, b comes after a; both see all that came before."""
    torch.manual_seed(5)
    T, K, window = 12, 16, 7
    q, k, v = (torch.randn(1, T, 2, K, dtype=torch.float64) for _ in range(3))
    docs = torch.tensor([[0] * 5 + [1] * 7])
    mask = chunk_mask(docs.repeat_interleave(2, dim=1), torch.tensor(window), longest=window)
    paired = [pair_heads(x).transpose(1, 2) for x in (q, k, v)]
    found = attend(*paired, mask).transpose(1, 2).reshape(1, T, 2, K)
    for t in range(T):
        for head in (0, 1):
            seen = [
                (s, other)
                for s in range(T)
                for other in (0, 1)
                if docs[0, s] == docs[0, t] and 0 <= 2 * t + head - (2 * s + other) < window
            ]
            scores = torch.stack([q[0, t, head] @ k[0, s, other] for s, other in seen])
            values = torch.stack([v[0, s, other] for s, other in seen])
            expected = scores.softmax(0) @ values
            torch.testing.assert_close(found[0, t, head], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("layers", ["LL", "SS"])
def test_a_token_looks_for_what_followed_itself_before_anything_is_learned(
    tiny_hp, monkeypatch, layers
):
    """A row of random tokens, then the same again: how often the strongest key is the right one."""
    hp = dataclasses.replace(
        tiny_hp, layers=layers, window_tokens=(64,), short_window_tokens=(64,), mix_at=(),
        value_layers=(), model_dim=128, attn_scale=1.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model, strongest = GPT(hp, TASK, CPU), []
    half = torch.randperm(START)[:32].expand(1, 32)

    def note(q, k, v, mask, options=None):
        scores = (q[:, :, 32:] @ k.mT).tril(31)  # of the second half, whose first index is 32
        strongest.append(scores.argmax(-1))
        return attend(q, k, v, mask, options)

    monkeypatch.setattr(train_gpt, "attend", note)
    logits_of(model, torch.cat([half, half], dim=1), step_inputs(0, hp, "cpu"))
    right = torch.arange(1, 33)  # one after the place where the token stood before
    assert ((strongest[0] == right).float().mean() > 0.9) == (layers == "LL")


def test_further_targets_count_within_the_row_and_the_document(tiny_hp):
    model, inputs = randomized(tiny_hp), tokens(2, 64)
    stream = torch.cat([inputs, torch.tensor([[3], [START]])], 1)
    at = through(tiny_hp, 48)._replace(mtp_weights=torch.tensor([0.6, 0.3, 0.1]))
    log_probs = logits_of(model, inputs, at).double().log_softmax(-1)
    expected = 0.0
    for b in range(2):
        for t in range(64):
            for j, weight in enumerate((0.6, 0.3, 0.1)):
                if t + j < 64 and START not in inputs[b, t + 1 : t + j + 1].tolist():
                    expected -= weight * log_probs[b, t, stream[b, t + j + 1]].item() / 128
    found = model(inputs, stream[:, 1:], at)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_the_cap_at_no_shift_is_the_tanh_of_earlier_records():
    z = torch.linspace(-200, 200, 999, dtype=torch.float64)
    capped = softcapped(z, Softcap(30.0, 0.0, 7.5)).double()
    torch.testing.assert_close(capped - 15, 15 * torch.tanh(z / 15), atol=1e-5, rtol=1e-5)


def test_value_tables_are_counted_by_the_layers_that_have_one(tiny_hp):
    layers = parse_layers(dataclasses.replace(tiny_hp, layers="SL-S", value_layers=(3, 1)))
    assert [layer.value_embed for layer in layers] == [None, 1, None, 0]


def test_values_are_gated_by_half_the_token_and_half_the_row(tiny_hp, monkeypatch):
    hp = dataclasses.replace(tiny_hp, layers="L", value_layers=(0,), mix_at=())
    model, values, B, T = randomized(hp), [], 2, 64
    attention = model.blocks[0].attn
    x = torch.randn(B, T, 32)
    c = model.context(docs_of(tokens(B, T)), through(hp, 16))
    monkeypatch.setattr(train_gpt, "attend", lambda q, k, v, *_: values.append(v) or v)
    row = torch.randn(B, T, 2, 16)
    for added in (row, torch.zeros_like(row)):
        attention(x, added, c)
    found = (values[0] - values[1]).transpose(1, 2)
    weight, flat = attention.value_gate, row.flatten(2)
    for b, t, head in product(range(B), (0, 13, 63), (0, 1)):
        score = weight[head, :6] @ x[b, t, :6] + weight[head, 6:] @ flat[b, t, :6]
        expected = 2 / (1 + math.exp(-score.item())) * flat[b, t, 16 * head : 16 * head + 16]
        torch.testing.assert_close(found[b, t, head], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("in_layers", [True, False])
def test_pairs_enter_every_layer_or_the_embedding(tiny_hp, in_layers):
    """By hand: the pair's row of each token, with what precedes it in its document."""
    hp = dataclasses.replace(tiny_hp, bigram_in_layers=in_layers)
    model, inputs = randomized(hp), tokens(2, 64)
    before = torch.full_like(inputs, START)
    for b, t in product(range(2), range(1, 64)):
        if inputs[b, t] != START:
            before[b, t] = inputs[b, t - 1]
    row = model.bigram[((36313 * inputs) ^ (27191 * before)) % 128].detach().clone()
    c = model.context(docs_of(inputs), through(hp, 16))
    found = model.embed_tokens(inputs, c.same_doc_SBT1[0])
    model.bigram.data.zero_()
    without = model.embed_tokens(inputs, c.same_doc_SBT1[0])[0]
    assert len(found) == len(model.blocks[0].mix) - 1 == 1 + int(in_layers)
    assert torch.equal(found[0], without) == in_layers
    if in_layers:
        block = model.blocks[2]  # without attention
        block.mlp.up_down.data.zero_()
        block.mix.data.copy_(torch.tensor(MIX_INIT))
        mixed = block(found[0], found, None, c)
        torch.testing.assert_close(mixed, 1.1 * found[0] + 0.1 * row)


def test_states_are_mixed_by_the_token():
    """Against a loop over tokens, in fp64."""
    torch.manual_seed(0)
    mix = StateMix(8, 3).double()
    mix.mix_out.data.normal_()
    x, states = torch.randn(1, 5, 8).double(), torch.randn(3, 1, 5, 8).double()
    found = mix(x, list(states))
    for t, token in enumerate(x[0]):
        read = mix.mix_in @ (token / (token.square().mean() + 1e-6).sqrt())
        hidden = read * (1 + torch.erf(read / 2**0.5)) / 2
        expected = token + 0.1 * (mix.mix_out @ hidden) @ states[:, 0, t]
        torch.testing.assert_close(found[0, t], expected)


def test_layers_and_the_head_get_the_outputs_of_the_layers_named(tiny_hp):
    """Before layers 1 and 3 and before the head: of layers 0 and 2 what there is by then."""
    model, outputs, mixed = randomized(tiny_hp), [], []
    for block in model.blocks:
        block.register_forward_hook(lambda block, args, x: outputs.append(x))
    for mix in model.mixes.values():
        mix.register_forward_hook(lambda mix, args, x: mixed.append((*args, len(outputs))))
    model.hidden(tokens(2, 64), through(tiny_hp, 48))
    assert [done for *_, done in mixed] == [1, 3, 4]
    for x, (embedding, bigram, *others, value), done in mixed:
        assert x is outputs[done - 1] and embedding.shape == bigram.shape == value.shape
        wanted = [outputs[j] for j in (0, 2) if j < done]
        assert len(others) == len(wanted) and all(map(operator.is_, others, wanted))
        torch.testing.assert_close(value, model.value_embeds[-1][tokens(2, 64)])


def test_fineweb_begins_as_the_public_record():
    """Initial values of its rung of 1,500 steps, on a network of smaller width."""
    small = dict(model_dim=64, num_heads=2, bigram_rows=640)
    hp = dataclasses.replace(TRACKS["fineweb"], **small)
    torch.manual_seed(0)
    model = GPT(hp, Task(vocab_size=128, document_start=127), CPU)
    bound = 3**0.5 / 2 / 64**0.5
    for block in model.blocks:
        assert block.mix.tolist() == pytest.approx([1.1, 0.0, 0.1])
        up, down = block.mlp.up_down
        assert up.std().item() == pytest.approx(0.5 / 8, rel=0.05) and up.abs().max() <= bound
        assert not down.any()
    attending = [i for i, block in enumerate(model.blocks) if block.attn is not None]
    assert attending == [0, 1, 2, 3, 4, 5, 7, 8, 9, 10]
    for i in attending:
        *qkv, o = model.blocks[i].attn.qkvo
        assert all(w.std().item() == pytest.approx(0.5 / 8, rel=0.05) for w in qkv)
        assert not o.any()
    tables = [i for i, layer in enumerate(model.layers) if layer.value_embed is not None]
    assert tables == [1, 2, 8, 9, 10] and len(model.value_embeds) == 5
    assert model.value_embeds.std().item() == pytest.approx(0.01, rel=0.05)
    assert list(model.mixes) == ["6", "10", "11"]
    assert not any(mix.mix_out.any() for mix in model.mixes.values())
    assert not model.bigram.any()
    assert torch.equal(model.embed, model.lm_head)
    assert model.embed.std().item() == pytest.approx(0.005, rel=0.05)


@pytest.mark.parametrize("setting", [{"head_gates": False}, {"mtp_weight": 0.0}, {"mix_at": ()}])
def test_additions_change_nothing_at_their_start(tiny_hp, setting):
    inputs, losses = tokens(2, 64), []
    for hp in (tiny_hp, dataclasses.replace(tiny_hp, **setting)):
        torch.manual_seed(0)
        model = GPT(hp, TASK, CPU)
        torch.manual_seed(1)
        for block in model.blocks:
            block.mlp.up_down.data.normal_(0, 0.1)
            if block.attn is not None:
                block.attn.qkvo.data.normal_(0, 0.1)
        model.lm_head.data.normal_()
        model.embed.data.normal_()
        at = step_inputs(0, hp, "cpu", training=False)
        losses.append(model(inputs, inputs.roll(-1, 1), at).item())
    assert losses[0] == losses[1]


def test_the_gpu_path_traces_forward_and_backward_as_one_graph(monkeypatch):
    """Blocks, kernels and bf16 banks of the fineweb track, on tensors that hold no data."""
    monkeypatch.setattr(train_gpt, "attention_mask", lambda *args: block_mask(*args[:2]))
    monkeypatch.setattr(kernels, "use_kernels", lambda x: True)
    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)  # bars a CPU's backward
    hp = dataclasses.replace(
        TRACKS["fineweb"], layers="sL-S", mix_at=(2, 3, 4), mix_from=(0, 1), value_layers=(0, 3)
    )  # fmt: skip
    rt = SimpleNamespace(
        stream_dtype=torch.bfloat16,
        matmul_dtype=torch.bfloat16,
        shared_memory_bytes=0,
        has_fp8=True,
        rank=0,
        world_size=1,
        is_alone=True,
        is_gpu=True,
    )
    with FakeTensorMode():
        model = GPT(hp, TASKS["fineweb"], rt)
        groups = make_optimizers(model, hp, rt, lambda update: update)
        compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
        inputs, before = torch.zeros(2, hp.seq_len, dtype=torch.int64), compiled_graphs()
        for step in (0, 400, 1200):
            loss = compiled(inputs, inputs.clone(), step_inputs(step, hp, "cpu"))
            loss.backward()
        assert loss.shape == () and loss.dtype == torch.float32
        assert compiled_graphs() == before + 1
        for name, p in model.named_parameters():
            assert p.dtype == p.grad.dtype == torch.bfloat16, name
        for group in groups.values():
            group.start_exchange()
            group.step(1)
