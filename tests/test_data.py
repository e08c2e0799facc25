import dataclasses
import glob
import hashlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import START, documents

import referee.task
import train_gpt
from data.prefetch import Prefetcher
from kernels import mean_visible_keys
from referee.flags import RunError
from referee.shards import ShardError, check_tokens, open_shard, write_shard
from referee.task import check_shards
from referee.validation import Validation
from train_gpt import (
    TRACKS,
    check_supply,
    choose_micro_batches,
    find_rows,
    memory_estimate,
    micro_batches,
    ordered_pieces,
)


def rank(index: int, world_size: int):
    return SimpleNamespace(
        rank=index,
        world_size=world_size,
        is_gpu=False,
        device=torch.device("cpu"),
        average=lambda tensors: None,
    )


def test_shard_round_trip_in_the_public_format(tmp_path):
    tokens = np.array([50256, 0, 1, 65535, 7], np.uint16)
    write_shard(tmp_path / "a.bin", tokens)
    raw = (tmp_path / "a.bin").read_bytes()
    assert np.frombuffer(raw[:12], "<i4").tolist() == [20240520, 1, 5]
    assert len(raw) == 1024 + 2 * 5
    assert np.array_equal(open_shard(tmp_path / "a.bin"), tokens)
    with pytest.raises(ShardError, match="65535"):
        write_shard(tmp_path / "b.bin", np.array([1, 70000]))
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_damaged_shards_are_named_and_never_to_be_deleted(tmp_path):
    path = tmp_path / "bad.bin"
    write_shard(path, np.arange(50, dtype=np.uint16))
    raw = path.read_bytes()
    for damaged, message in (
        (b"\7\0\0\0" + raw[4:], "magic"),
        (raw[:4] + b"\2\0\0\0" + raw[8:], "version 2"),
        (raw[:8] + b"\0\0\0\0" + raw[12:], "truncated"),
        (b"", "magic"),
        (raw[:-1], "truncated"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ShardError, match=message) as caught:
            open_shard(path)
        assert str(path) in str(caught.value) and "delete" not in str(caught.value)


def test_tokens_beyond_the_vocabulary_are_refused(tmp_path):
    tokens = np.array([1, 2, 300], "<u2")
    write_shard(tmp_path / "a.bin", tokens)
    assert check_tokens(tmp_path / "a.bin", 301)[1] == hashlib.sha256(tokens).hexdigest()
    with pytest.raises(ShardError, match="token 300"):
        check_tokens(tmp_path / "a.bin", 300)


def test_rows_start_at_documents_and_leave_out_only_their_cut_ends():
    tokens, seq_len = documents(5, 200), 64
    starts = find_rows(tokens, START, seq_len)
    assert tokens[starts[0]] == START and starts[-1] + seq_len < len(tokens)
    for start, following in zip(starts, starts[1:], strict=False):
        between = tokens[start + seq_len : following]
        assert following >= start + seq_len and START not in between
        assert len(between) < seq_len
        assert tokens[following] == START or len(between) == 0
    after_last = starts[-1] + seq_len
    assert len(tokens) - after_last <= 2 * seq_len


def rows_of(hp, task, world_size, micro_seqs, seed=0, first_step=0):
    """[step][row] -> inputs as bytes, put together from all ranks in dealt order, to the end."""
    accumulation = hp.batch_tokens[0] // hp.seq_len // (world_size * micro_seqs)
    hp, ranks = dataclasses.replace(hp, num_steps=100_000), []
    for r in range(world_size):
        rt = rank(r, world_size)
        ranks.append([])
        with pytest.raises(ShardError, match="ended early"):
            for batch in micro_batches(hp, task, rt, (micro_seqs,), seed, first_step):
                ranks[-1].append(batch)
    steps = []
    for step in range(len(ranks[0]) // accumulation):
        rows = []
        for m in range(step * accumulation, (step + 1) * accumulation):
            for batches in ranks:
                inputs, targets = batches[m]
                assert torch.equal(inputs[:, 1:], targets[:, :-1])
                rows += [row.numpy().tobytes() for row in inputs]
        steps.append(rows)
    return steps


@pytest.mark.parametrize("cap", [0, 300])
def test_documents_keep_the_order_of_the_stream_and_rows_are_shuffled_by_the_seed(
    tiny_hp, tiny_task, shards, cap
):
    hp = dataclasses.replace(tiny_hp, document_cap=(cap,), max_epochs=2)
    stream = np.concatenate([open_shard(p)[:-1] for p in sorted(shards.glob("train_*.bin"))])
    drawn = [[t[s : s + n].tobytes() for t, s, n in ordered_pieces(hp, tiny_task, seed)]
             for seed in (0, 1)]  # fmt: skip
    first, second = drawn
    half = len(first) // 2
    if cap:
        assert b"".join(first[:half]) == stream.tobytes()
        assert first == second and first[:half] == first[half:]
    else:
        assert first != second and first[:half] != first[half:]
        assert sorted(first) == sorted(second) and sorted(first[:half]) == sorted(first[half:])


def test_loader_drops_and_repeats_nothing_over_ranks_and_shards(tiny_hp, tiny_task, shards):
    expected = []
    for path in sorted(shards.glob("train_*.bin")):
        tokens = open_shard(path).astype(np.int64)
        expected += [tokens[s : s + 64].tobytes() for s in find_rows(tokens, START, 64)]
    steps = rows_of(tiny_hp, tiny_task, world_size=1, micro_seqs=8)
    seen = [row for rows in steps for row in rows]
    assert len(seen) == len(expected) // 8 * 8
    missing = sorted(expected)
    for row in seen:
        missing.remove(row)
    assert len(missing) < 8  # what does not fill a last step


def test_capped_documents_fill_rows_and_change_with_the_step(tiny_hp, tiny_task, shards):
    """Rows hold the first tokens of whole documents, each once, cut at the cap of their step."""
    caps = (20, 50)
    hp = dataclasses.replace(tiny_hp, document_cap=caps, num_steps=16, batch_tokens=(128, 256))
    seen, pairs = [], list(micro_batches(hp, tiny_task, rank(0, 1), (1,), 0, 0))
    assert len(pairs) == 8 * 2 + 8 * 4
    for place, (inputs, targets) in enumerate(pairs):
        row, after = inputs[0].numpy(), targets[0].numpy()
        starts = [*np.flatnonzero(row == START), 64]
        assert starts[0] == 0
        lengths = np.diff(starts)
        assert lengths.max() <= caps[place >= 16]
        for start, length in zip(starts, lengths, strict=False):
            known = [*row[start : start + length], after[start + length - 1]]
            seen.append(np.array(known, np.int64).tobytes())
    stream = np.concatenate([open_shard(p) for p in sorted(shards.glob("train_*.bin"))])
    text = stream.astype(np.int64).tobytes()
    assert all(piece in text for piece in seen) and len(set(seen)) == len(seen)


@pytest.mark.parametrize("cap", [0, 20, 2048])
def test_supply_is_never_overrated(tiny_hp, tiny_task, cap):
    """As many steps as check_supply lets pass can be drawn, and not one more."""
    enough = None
    for steps in range(1, 400):
        hp = dataclasses.replace(tiny_hp, num_steps=steps, document_cap=(cap,))
        try:
            check_supply(hp, tiny_task, seed=3)
        except ShardError:
            break
        enough = hp
    drawn = sum(1 for _ in micro_batches(enough, tiny_task, rank(0, 1), (8,), 3, 0))
    assert drawn == enough.num_steps
    more = dataclasses.replace(enough, num_steps=drawn + 1)
    with pytest.raises(ShardError, match="ended early"):
        list(micro_batches(more, tiny_task, rank(0, 1), (8,), 3, 0))


def test_training_finds_no_documents_that_were_not_found_before(tiny_hp, tiny_task, monkeypatch):
    """What takes 0.2 s for a large shard is done by check_supply, outside the timed part."""
    task = dataclasses.replace(tiny_task)
    check_supply(tiny_hp, task, seed=11)
    monkeypatch.setattr(train_gpt, "open_shard", None)
    batches = micro_batches(tiny_hp, task, rank(0, 1), (8,), 11, 0)
    assert sum(1 for _ in batches) == tiny_hp.num_steps


@pytest.mark.parametrize("num_steps", [7, 10**12])
def test_no_number_of_steps_is_looped_over(tiny_hp, tiny_task, num_steps):
    """With a loop over the steps of the second case this would take days."""
    batch = (64_000, 128_000, 640_000)
    hp = dataclasses.replace(tiny_hp, num_steps=num_steps, batch_tokens=batch)
    seven = dataclasses.replace(hp, num_steps=7)
    stages = Counter(seven.stage(batch, step) for step in range(7))
    steps = [stages[i] + (num_steps - 7) // 3 for i in range(3)]  # 10^12 - 7 divides by 3
    needed = sum(n * tokens for n, tokens in zip(steps, batch, strict=True)) // hp.seq_len
    with pytest.raises(ShardError, match=f"{num_steps} steps need {needed};"):
        check_supply(hp, tiny_task, seed=0)


def test_ranks_and_first_steps_see_the_same_global_batches(tiny_hp, tiny_task):
    whole = rows_of(tiny_hp, tiny_task, 1, 8)
    assert len(whole) > 60  # so that 40 steps reach into a later shard
    for world_size, micro_seqs in ((1, 2), (2, 4), (2, 1), (4, 2), (8, 1)):
        assert rows_of(tiny_hp, tiny_task, world_size, micro_seqs) == whole
    for first_step in (1, 13, 40):
        assert rows_of(tiny_hp, tiny_task, 1, 8, first_step=first_step) == whole[first_step:]


def test_the_prefetcher_hands_over_errors():
    def failing():
        yield torch.zeros(1), torch.zeros(1)
        raise ShardError("the disk is gone")

    pairs = Prefetcher(failing(), rank(0, 1))
    next(pairs)
    with pytest.raises(ShardError, match="disk is gone"):
        next(pairs)


def inputs_seen(task, world_size: int, most_rows: int) -> list[list[int]]:
    """Every row that a trainer is asked to predict, over all ranks."""
    seen = []

    def predict(inputs):
        seen.extend(inputs.tolist())
        yield torch.zeros(inputs.numel(), task.vocab_size)

    for r in range(world_size):
        validation = Validation(task, rank(r, world_size))
        loss = validation.loss(predict, task.batch_rows(most_rows, world_size))
        assert loss == pytest.approx(np.log(task.vocab_size))
    return seen


@pytest.mark.parametrize("spread", [False, True])
def test_validation_covers_fixed_rows_once_over_ranks(tiny_task, shards, spread):
    task = dataclasses.replace(tiny_task, val_spread=spread)
    tokens = open_shard(shards / "val.bin").astype(np.int64)
    starts = [i * (len(tokens) - 65) // 31 if spread else 64 * i for i in range(32)]
    expected = [tokens[start : start + 64].tolist() for start in starts]
    for world_size in (1, 2, 4):
        assert sorted(inputs_seen(task, world_size, 3)) == sorted(expected)


@pytest.mark.parametrize("chunk", [1, 7, 64, 100, 512])
def test_the_validation_loss_is_that_of_the_next_tokens_however_logits_are_cut(
    tiny_task, shards, chunk
):
    """Against a loop in fp64 over the shard itself; ids beyond the vocabulary take probability."""
    torch.manual_seed(0)
    table = 3 * torch.randn(tiny_task.vocab_size, tiny_task.vocab_size + 5)
    validation = Validation(dataclasses.replace(tiny_task, val_spread=False), rank(0, 1))

    def predict(inputs):
        yield from table[inputs.flatten()].split(chunk)

    tokens = open_shard(shards / "val.bin").astype(np.int64)
    log_p = table.double().log_softmax(-1)
    expected = -np.mean([log_p[tokens[t], tokens[t + 1]] for t in range(tiny_task.val_tokens)])
    assert validation.loss(predict, 8) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("shape", [(100, 64), (600, 64), (512, 63)])
def test_logits_that_do_not_fit_the_rows_are_refused(tiny_task, shape):
    with pytest.raises(RunError, match="yield"):
        Validation(tiny_task, rank(0, 1)).loss(lambda inputs: [torch.zeros(shape)], 8)


def test_validation_that_cannot_be_had_is_refused(tiny_task):
    with pytest.raises(ShardError, match="validation"):
        Validation(dataclasses.replace(tiny_task, val_tokens=64 * 10_000), rank(0, 1))
    with pytest.raises(ShardError, match="3 ranks"):
        Validation(tiny_task, rank(0, 3))
    everything = dataclasses.replace(tiny_task, train_files=f"{Path(tiny_task.val_files).parent}/*")
    with pytest.raises(ShardError, match=r"val\.bin is a training shard too; change --train_files"):
        check_shards(everything)


def test_the_advice_for_a_track_s_shard_is_the_command_that_writes_it(monkeypatch, tmp_path):
    monkeypatch.setattr(referee.task, "DATA", tmp_path)
    for name, command in (
        ("embedded/embedded_val.bin", "run: ./run.sh data/embedded.py"),
        ("fineweb10B/fineweb_val_*.bin", "run: ./run.sh data/cached_fineweb10B.py 9"),
        ("fineweb10B/fineweb_train_000030.bin", "run: ./run.sh data/cached_fineweb10B.py 30"),
        ("wikitext103/wikitext103_val_000000.bin", "--preset wikitext103"),
    ):
        if "*" not in name:
            (tmp_path / name).parent.mkdir()
            (tmp_path / name).write_bytes(b"cut")
        pattern = f"{glob.escape(str(tmp_path))}/{name}"
        with pytest.raises(ShardError) as caught:
            check_shards(referee.task.Task(train_files=pattern))
        assert str(caught.value).endswith(command)


def test_data_hash_is_compared(tiny_task):
    found, lines = check_shards(tiny_task)
    assert f"data_sha256: {found} (none expected)" == lines[-1]
    for expected, words in ((found, "as expected"), ("0" * 64, "DIFFERENT")):
        task = dataclasses.replace(tiny_task, data_sha256=expected)
        assert words in check_shards(task)[1][-1]


def test_visible_keys_by_brute_force():
    rows = torch.tensor([[START, 1, 2, START, 4, 5, 6, 7]])
    in_reach = [1, 2, 3] + [1, 2, 3, 3, 3]  # keys in a window of 3, by document
    assert mean_visible_keys(rows.numpy(), START, 3) == pytest.approx(np.mean(in_reach))


def test_embedded_corpus_is_complete_and_split(tmp_path):
    from data import embedded

    package = tmp_path / "torch"
    for name, text in {
        "a.py": "a = 1\n",
        "copy.py": "a = 1\n",
        "empty.py": "",
        "version.py": "v",
        "testing/t.py": "t",
        "nn/generated_x.py": "g",
        "nn/big.py": "x" * 200_001,
        **{f"nn/m{i}.py": f"m = {i}\n" for i in range(200)},
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    names = list(embedded.documents(package))
    assert names == sorted(["a.py", *(f"nn/m{i}.py" for i in range(200))])
    counts = embedded.build(tmp_path / "out", package)
    streams = {n: open_shard(tmp_path / "out" / n) for n in counts}
    texts = {
        name: {bytes(part.astype(np.uint8)) for part in np.split(s, np.flatnonzero(s == 256))[1:]}
        for name, s in streams.items()
    }
    both = texts["embedded_train.bin"] | texts["embedded_val.bin"]
    assert len(both) == 201 and not texts["embedded_train.bin"] & texts["embedded_val.bin"]


@pytest.mark.parametrize("gib, world_size, rows", [
    (24, 1, [2, 2, 2]), (40, 1, [4, 4, 4]), (80, 1, [8, 8, 8]), (141, 1, [8, 8, 8]),
    (24, 2, [2, 2, 2]), (80, 2, [4, 8, 12]), (24, 4, [2, 2, 2]), (80, 4, [2, 4, 6]),
    (80, 8, [1, 2, 3]),
])  # fmt: skip
def test_passes_of_fineweb_follow_the_memory_and_the_stage(gib, world_size, rows):
    gpu = SimpleNamespace(memory_bytes=gib * 2**30, world_size=world_size)
    hp, vocab = TRACKS["fineweb"], 50304
    assert choose_micro_batches(hp, vocab, gpu, 0) == rows
    assert memory_estimate(hp, vocab, max(rows)) < 0.9 * gib * 2**30
    assert choose_micro_batches(hp, vocab, gpu, 1) == [1, 1, 1]


def test_the_estimate_is_near_the_peak_that_preflight_counts():
    """The peak of tools/preflight.py --gpu H100 --track fineweb."""
    found = memory_estimate(TRACKS["fineweb"], 50304, rows=8) / 2**30
    assert found == pytest.approx(49.7, rel=0.02)
