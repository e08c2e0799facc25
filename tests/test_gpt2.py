"""The GPT-2 baseline in one process: model, export, memory, checkpoints and bad input."""

import dataclasses
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_TASK, called, losses, only_log, settings, tiny_flags
from forked import run_forked
from small_models import write_small
from torch.distributed._tools import MemTracker
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from baselines import export_hf, train_gpt2
from baselines.plan import flops_per_token, memory, micro_batch_rows, parameters
from baselines.train_gpt2 import (
    GPT2,
    TRACKS,
    Trainer,
    adamw,
    build,
    learning_rate,
    load_gpt2,
    micro_batches,
)
from referee.checkpoints import read_checkpoint
from referee.flags import RunError
from referee.harness import Run, warm_up
from referee.ranks import Runtime
from referee.shards import open_shard
from referee.sources import source_texts
from referee.task import TASKS
from tools.runs import read_log
from tools.sources import ENTRIES

TINY = dict(
    num_steps=20,
    batch_tokens=512,
    seq_len=32,
    val_every=10,
    embed_rows=TINY_TASK["vocab_size"],
    num_layers=2,
    num_heads=2,
    model_dim=32,
    mlp_dim=128,
    warmup_steps=5,
)
PUBLISHED = {  # parameters by the model cards of OpenAI's GPT-2
    "124M": 124_439_808, "350M": 354_823_168, "774M": 774_030_080, "1558M": 1_557_611_200,
}  # fmt: skip
NAMED = {"111M": 111e6, "13B": 13e9, "175B": 175e9}  # gigaGPT's, to three digits
RT = Runtime(fp32=True)


@pytest.fixture
def hp():
    return dataclasses.replace(TRACKS["embedded"], **TINY)


@pytest.fixture
def flags(shards, tmp_path) -> list[str]:
    return tiny_flags(shards, tmp_path, TINY)


def refused(code: int, stdout: str, stderr: str, *messages):
    assert code == 1 and stderr.count("error: ") == 1 and "Traceback" not in stderr, stderr
    for message in messages:
        assert re.search(message, stderr), stderr


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """A model of which no bias is 0 any more, and no gain 1."""
    torch.manual_seed(2)
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return model.eval()


def saved(model: GPT2, folder):
    task = dataclasses.replace(TASKS["embedded"], **TINY_TASK)
    return write_small(folder, "baselines/train_gpt2.py", task, model.hp, model)


def tokens(rows: int, length: int) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(1)
    return torch.randint(0, TINY_TASK["vocab_size"], (rows, length), generator=drawn)


# ------------------------------------------------------------------------------ Model


def test_logits_equal_transformers_after_export(hp, tmp_path):
    ours = randomized(build(hp, RT, 0))
    export_hf.export(saved(ours, tmp_path / "checkpoint"), tmp_path / "hf")
    theirs, x = GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval(), tokens(3, hp.seq_len)
    with torch.no_grad():
        assert (ours(x) - theirs(x).logits).abs().max() < 1e-4
        assert ours(x).abs().max() > 1


def test_logits_equal_transformers_after_import(tmp_path):
    config = GPT2Config(vocab_size=97, n_positions=24, n_embd=48, n_layer=3, n_head=4,
                        bos_token_id=96, eos_token_id=96)  # fmt: skip
    theirs = randomized(GPT2LMHeadModel(config))
    theirs.save_pretrained(tmp_path / "hf")
    export_hf.import_hf(tmp_path / "hf", tmp_path / "checkpoint")
    facts = read_checkpoint(tmp_path / "checkpoint", RT)
    ours, x = load_gpt2(tmp_path / "checkpoint", facts), tokens(2, 24)
    with torch.no_grad():
        assert (ours(x) - theirs(x).logits).abs().max() < 1e-4
    assert facts["config"]["document_start"] == 96
    path = tmp_path / "hf/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token_id": None}))
    assert export_hf.read_config(tmp_path / "hf")[1] == 50256  # the published one


@pytest.mark.parametrize("track", [name for name in TRACKS if name != "embedded"])
def test_parameter_counts_are_the_published_ones(track):
    hp = TRACKS[track]
    with torch.device("meta"):
        ours = sum(p.numel() for p in GPT2(hp).parameters())
        config = GPT2Config(vocab_size=hp.embed_rows, n_positions=hp.seq_len, n_embd=hp.model_dim,
                            n_layer=hp.num_layers, n_head=hp.num_heads)  # fmt: skip
        theirs = GPT2LMHeadModel(config).num_parameters()
    assert ours == theirs == parameters(hp) == PUBLISHED.get(track, ours)
    assert ours == pytest.approx(NAMED.get(track, ours), rel=0.012)


def test_initial_weights_are_gpt2s(hp):
    hp = dataclasses.replace(hp, model_dim=128, mlp_dim=512, num_layers=8, embed_rows=512,
                             seq_len=64, batch_tokens=512)  # fmt: skip
    for name, p in build(hp, RT, 0).named_parameters():
        expected = {"positions": 0.01}.get(name, 0.02)
        if name.endswith(("out.weight", "down.weight")):
            expected = 0.005  # 0.02 over the root of 2 x 8
        if p.ndim == 1:
            assert (p == name.endswith("weight")).all(), name
        else:
            assert p.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(p.mean().item()) < 0.1 * expected, name


def test_checkpointed_blocks_give_the_same_loss_and_gradients(hp):
    x, found = tokens(2, hp.seq_len), []
    for recompute in (False, True):
        hp = dataclasses.replace(hp, checkpoint_blocks=recompute)
        model = build(hp, RT, 0)
        assert all(block.recompute == recompute for block in model.blocks)
        loss = model.loss(x, x.roll(-1, 1))
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


# ------------------------------------------------------------------------------ Training


def built(hp, task) -> tuple[Run, Trainer]:
    chosen = settings(task, hp, compile=False)
    run = Run(chosen, "baselines/train_gpt2.py", Runtime(fp32=True), None, 0.0)
    return run, run.build(Trainer)


def test_training_equals_a_plain_loop_over_transformers(hp, tiny_task, tmp_path):
    run, made = built(dataclasses.replace(hp, max_grad_norm=0.5), tiny_task)
    export_hf.export(saved(made.model, tmp_path / "a"), tmp_path / "hf")
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "hf").train()
    matrix = [p for n, p in theirs.named_parameters() if "ln_" not in n and "bias" not in n]
    others = [p for n, p in theirs.named_parameters() if "ln_" in n or "bias" in n]
    adam = torch.optim.AdamW([{"params": matrix, "weight_decay": 0.1},
                              {"params": others, "weight_decay": 0.0}],
                             lr=0.006, betas=(0.9, 0.95), fused=False, foreach=False)  # fmt: skip
    batches = [micro_batches(hp, tiny_task, made.rt, made.micro_batch_seqs, 0, 0) for _ in range(2)]
    warm_up(run, made)
    for step in range(8):
        x, y = next(batches[1])
        loss = torch.nn.functional.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten())
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in theirs.parameters()]).norm().item()
        for p in theirs.parameters():
            p.grad.mul_(min(1.0, 0.5 / norm))
        for group in adam.param_groups:
            group["lr"] = 0.006 * (step + 1) / 5 if step < 5 else None
            if step >= 5:
                group["lr"] = 0.006 * (0.55 + 0.45 * np.cos(np.pi * (step - 5) / 15))
        adam.step()
        adam.zero_grad()
        rate = learning_rate(step, hp)
        assert abs(made.update(rate, batches[0]).item() - loss.item()) < 1e-4, step
    assert norm > 0.5  # so clipping was at work


def test_a_step_has_the_same_rows_for_any_number_of_ranks(hp, tiny_task):
    def rows(ranks: int, micro_seqs: int, first_step: int) -> list:
        found = set()
        for rank in range(ranks):
            rt = SimpleNamespace(rank=rank, world_size=ranks)
            batches = micro_batches(hp, tiny_task, rt, micro_seqs, 7, first_step)
            for _ in range(16 // (ranks * micro_seqs)):
                x, y = next(batches)
                assert torch.equal(x[:, 1:], y[:, :-1])
                found |= {tuple(row.tolist()) for row in torch.cat([x, y[:, -1:]], 1)}
        return found

    whole = rows(1, 16, 2)
    assert len(whole) == 16 and rows(1, 16, 3).isdisjoint(whole)
    assert rows(2, 4, 2) == rows(4, 4, 2) == rows(1, 2, 2) == whole


def test_an_epoch_has_each_piece_of_the_stream_once(hp, tiny_task, shards):
    rt, total = SimpleNamespace(rank=0, world_size=1), 0
    hp = dataclasses.replace(hp, batch_tokens=hp.seq_len)
    seen = [tuple(x[0].tolist()) for x, _ in micro_batches(hp, tiny_task, rt, 1, 0, 0)]
    expected = []
    for path in sorted(shards.glob("train_*.bin")):
        stream = open_shard(path).astype(int)
        total = (len(stream) - 1) // 32
        expected += [tuple(stream[32 * i : 32 * i + 32].tolist()) for i in range(total)]
    assert sorted(seen) == sorted(expected) and seen != expected


# ------------------------------------------------------------------------------ Plan


def gpus(count: int = 1, memory_bytes: float = 80e9) -> SimpleNamespace:
    """A Runtime of so many GPUs, which multiply in bf16."""
    return SimpleNamespace(world_size=count, memory_bytes=memory_bytes, is_gpu=True,
                           matmul_dtype=torch.bfloat16)  # fmt: skip


def plan_sizes(dtype: torch.dtype, recompute: bool, embed_rows=300):
    hp = dataclasses.replace(TRACKS["embedded"], num_layers=5, model_dim=96, mlp_dim=384,
                             embed_rows=embed_rows, num_heads=3,
                             checkpoint_blocks=recompute)  # fmt: skip
    rt = SimpleNamespace(**{**vars(RT), "stream_dtype": dtype, "matmul_dtype": dtype})
    return hp, build(hp, rt, 0), memory(hp, rt, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("embed_rows", [300, 8000])
def test_the_plan_equals_real_allocations(dtype, recompute, embed_rows):
    """MemTracker is torch's own count of what every operator allocates and frees.

    With few rows the peak is in a block, with many in the head.
    """
    hp, model, planned = plan_sizes(dtype, recompute, embed_rows)
    adam, x = adamw(model, hp), torch.randint(0, 256, (4, hp.seq_len))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    adam.step()
    tracker = MemTracker()
    tracker.track_external(model, adam, x)
    with tracker:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            loss = model.loss(x, x)
        loss.backward()
        adam.step()

    def size(tensors):
        return sum(t.untyped_storage().nbytes() for t in tensors)

    moments = [t for s in adam.state.values() for t in s.values() if t.ndim]
    assert size(model.parameters()) == planned["weights"]
    assert size(p.grad for p in model.parameters()) == planned["gradients"]
    assert size(moments) == planned["optimizer"]
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert 0.99 * peak < sum(planned.values()) < 1.08 * peak


def test_planned_flops_equal_counted_ones():
    hp, model, _ = plan_sizes(torch.float32, False)
    x = torch.randint(0, 256, (4, hp.seq_len))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.loss(x, x).backward()
    masked = 6 * hp.num_layers * hp.model_dim * hp.seq_len  # counted in full, needed by half
    counted = counter.get_total_flops() / x.numel()
    assert counted == pytest.approx(flops_per_token(hp) + masked, rel=1e-6)


def test_more_ranks_and_offload_need_less_memory():
    hp = TRACKS["13B"]
    one, many = memory(hp, gpus(8), 1), memory(hp, gpus(64), 1)
    assert one["weights"] == 8 * many["weights"] == 4 * parameters(hp) / 8
    away = dataclasses.replace(hp, cpu_offload=True)
    left = memory(away, gpus(8), 1)
    assert left["weights"] + left["gradients"] + left["optimizer"] == 0
    small, large = (micro_batch_rows(TRACKS["124M"], gpus(1, size), 0) for size in (24e9, 80e9))
    planned = memory(TRACKS["124M"], gpus(), large)
    assert 1 <= small < large and sum(planned.values()) < 80e9


def test_a_batch_that_cannot_be_dealt_brings_the_next_larger_one():
    for track, ranks, asked, rows in (("13B", 64, 2, 1152), ("124M", 3, 0, 513)):
        hp = TRACKS[track]
        with pytest.raises(RunError) as caught:
            micro_batch_rows(hp, gpus(ranks), asked)
        named = int(str(caught.value).rpartition("--batch_tokens ")[2])
        assert named == rows * hp.seq_len
        proposed = dataclasses.replace(hp, batch_tokens=named)
        assert rows // ranks % micro_batch_rows(proposed, gpus(ranks), asked) == 0


# ------------------------------------------------------------------------------ Runs, bad input


def test_a_folder_whose_name_a_terminal_cannot_show_ends_no_run(flags, tmp_path):
    folder = tmp_path / "Протоколы"
    short = ["--num_steps=2", "--val_every=2", "--save_every=1", f"--log_dir={folder}"]
    code, out, err = called(train_gpt2, *flags, *short, encoding="cp1252")
    assert code == 0 and "\ncheckpoint: " in out, err
    assert only_log(folder)


@pytest.mark.slow
def test_a_run_learns_saves_and_resumes_to_the_same_digits(flags, tmp_path):
    code, _, err = called(train_gpt2, *flags, "--save_every=12")
    assert code == 0, err
    log = only_log(tmp_path)
    assert not read_log(log).faults
    first = losses(log)
    assert float(first["val", 20]) < float(first["val", 0]) - 0.5
    (folder,) = tmp_path.glob("*_step*")
    facts = json.loads((folder / "config.json").read_text())
    assert (facts["trainer"], facts["step"]) == ("baselines/train_gpt2.py", 12)
    code, _, err = called(train_gpt2, *flags, f"--log_dir={tmp_path}/b", f"--resume={folder}")
    assert code == 0, err
    again = losses(only_log(tmp_path / "b"))
    assert len(again) == 9 and again == {key: first[key] for key in again}
    other = called(train_gpt2, *flags, "--num_steps=30", f"--resume={folder}")
    refused(*other, "to resume it, add: --num_steps=20")


def test_a_race_freezes_and_runs_the_baseline(flags, tmp_path):
    attempt = tmp_path / "2026-01-01_GPT2"
    given = [flag for flag in flags if not flag.startswith(("--log_dir", "--cpu_dtype"))]
    words = [f"{ROOT}/tools/race.py", "-n", "1", "--entry", ENTRIES[1], str(attempt), *given]
    done = run_forked(words)
    assert "GPT2 seed 0: result status:missed" in done.stdout + done.stderr, done.stderr
    made = read_log(only_log(attempt / "logs"))
    kept = {str(p.relative_to(attempt / "source")) for p in attempt.glob("source/**/*.py")}
    assert not made.faults and kept == set(made.sources) == set(source_texts(ROOT, ENTRIES[1]))


def test_bad_flags_get_one_clear_error(flags):
    for flag, message in (
        ("--num_heads=3", r"--model_dim 32 is not a multiple of --num_heads 3"),
        ("--micro_batch_seqs=5", r"16 rows .* of 5; .*--batch_tokens 640"),
        ("--num_steps=99999", r"steps need \d+; get more shards"),
        ("--resume=/nowhere", r"/nowhere is not a usable checkpoint"),
    ):
        refused(*called(train_gpt2, *flags, flag), message)
    done = called(train_gpt2, *flags, "--model_dim=1048576", "--mlp_dim=4194304")
    refused(*done, r"26,3\d\d,\d{3},\d{3},\d{3} parameters do not fit: 1 x \d+\.\d GiB are needed",
            r"optimizer \d+\.\d", "--checkpoint_blocks true, --cpu_offload true")  # fmt: skip


def test_export_says_in_one_line_what_is_wrong(hp, tmp_path):
    pt, hf = tmp_path / "a.pt", tmp_path / "hf"
    torch.save({"tensors": {}}, pt)
    refused(*called(export_hf, pt, tmp_path / "out"), r"a\.pt is not a usable checkpoint")
    folder = saved(build(hp, RT, 0), tmp_path / "checkpoint")
    command = [f"{ROOT}/baselines/export_hf.py", str(folder), str(hf)]
    done = run_forked(command, file_limit=10_000)
    full = rf"error: cannot write {hf}/model\.s.*File too large.*\n"
    assert re.fullmatch(full, done.stderr) and not list(hf.iterdir()), done.stderr
    done = run_forked(command)
    assert (done.returncode, done.stdout) == (0, f"{hf}\n"), done.stderr
    before = (hf / "model.safetensors").read_bytes()
    refused(*called(export_hf, folder, hf), "holds a model already")
    (hf / "config.json").unlink()
    refused(*called(export_hf, folder, hf), "holds a model already")
    assert (hf / "model.safetensors").read_bytes() == before


def test_a_wrong_model_of_transformers_is_refused(hp, tmp_path):
    hf = tmp_path / "hf"
    export_hf.export(saved(build(hp, RT, 0), tmp_path / "checkpoint"), hf)
    path, file = hf / "config.json", hf / "model.safetensors"
    config = json.loads(path.read_text())
    for changed, message in (
        (config | {"model_type": "llama"}, r"its model_type is 'llama', not 'gpt2'"),
        (config | {"n_embd": 48}, r"its config\.json: wte\.weight is \[64, 32\], not \[64, 48\]"),
        (config | {"n_layer": 3}, r"h\.2\.ln_1\.weight is not there"),
        ({}, r"has no config\.json of a GPT-2"),
    ):
        path.write_text(json.dumps(changed))
        with pytest.raises(RunError, match=message):
            export_hf.import_hf(hf, tmp_path / "back")
    path.write_text(json.dumps(config))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(RunError, match=r"model\.safetensors cannot be read"):
        export_hf.import_hf(hf, tmp_path / "back")
    assert not (tmp_path / "back").exists()
