"""Sampling: probabilities, seeds, streaming, and checkpoints that cannot be used."""

import base64
import json
import math
import random
import re
from argparse import Namespace
from itertools import repeat
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, called, only_log, run_section, train
from forked import run_forked
from scipy.stats import chisquare
from small_models import KnownModel, write_gpt2, write_speedrun

import data.gpt2
from evals import sample
from evals.models import load_model, tokenizer_of
from evals.sample import generate, text_pieces, token_probabilities
from referee.checkpoints import facts_sha256
from referee.flags import RunError
from referee.shards import open_shard, write_shard


def settings(**changes) -> Namespace:
    plain = {"max_tokens": 20, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    return Namespace(**{**plain, **changes})


# ------------------------------------------------------------------------------ Probabilities


def slow_probabilities(logits, temperature, top_k, top_p) -> list[float]:
    """The definition, in plain Python."""
    weights = [math.exp(x / temperature) for x in logits]
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    order = order[: top_k or len(order)]
    total, kept, mass = sum(weights[token] for token in order), [], 0.0
    for token in order:
        kept.append(token)
        mass += weights[token] / total
        if mass >= top_p:
            break
    total = sum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(len(weights))]


def test_probabilities_equal_the_definition():
    rng = random.Random(0)
    for _ in range(300):
        logits = [rng.gauss(0, 2) for _ in range(rng.randint(1, 30))]
        logits += rng.choices(logits, k=3)  # equal ones
        temperature, top_k = rng.choice([0.3, 1.0, 2.5]), rng.choice([0, 1, 2, 5, 100])
        top_p = rng.choice([1e-9, 0.3, 0.7, 0.95, 1.0])
        found = token_probabilities(
            torch.tensor(logits, dtype=torch.float64), temperature, top_k, top_p
        )
        expected = slow_probabilities(logits, temperature, top_k, top_p)
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_drawn_tokens_follow_the_probabilities():
    logits = torch.randn(257, generator=torch.Generator().manual_seed(1))
    logits[256] = -100  # no document ends
    options = settings(temperature=0.7, top_k=12, top_p=0.9)
    model = KnownModel(lambda seen: logits)
    drawn = [token for seed in range(250) for token in generate(model, [256], options, seed)]
    expected = 5000 * np.array(slow_probabilities(logits.tolist(), 0.7, 12, 0.9))
    counts, likely = np.bincount(drawn, minlength=257), expected > 0
    assert len(drawn) == 5000 and counts[~likely].sum() == 0 and 3 < likely.sum() <= 12
    assert chisquare(counts[likely], expected[likely]).pvalue > 1e-3


# ------------------------------------------------------------------------------ Tokens


def greedy(model, prompt: list[int], count: int) -> list[int]:
    """Argmax decoding by whole forward passes."""
    tokens = list(prompt)
    for _ in range(count):
        logits = model.logits(torch.tensor([tokens]))[0, -1]
        tokens.append(int(logits[: model.tokenizer.document_start + 1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("write", [write_speedrun, write_gpt2])
def test_top_k_1_is_argmax_decoding(write, tmp_path):
    model, prompt = load_model(write(tmp_path / "checkpoint.pt")), [256, *b"def f"]
    expected = greedy(model, prompt, 30)
    ends = expected.index(256) if 256 in expected else 30
    for seed in (0, 1):
        found = list(generate(model, prompt, settings(top_k=1, max_tokens=30), seed))
        assert found == expected[:ends] and len(set(found)) > 3


def test_a_sample_ends_with_its_document_its_length_or_the_context():
    def likes(token):
        logits = torch.zeros(257)
        logits[token] = 1000
        return logits

    ends_after_3 = KnownModel(lambda seen: likes(256 if len(seen) == 4 else 65))
    assert list(generate(ends_after_3, [256], settings(), 0)) == [65, 65, 65]
    endless = KnownModel(lambda seen: likes(65), context=8)
    assert list(generate(endless, [256], settings(max_tokens=3), 0)) == [65] * 3
    assert len(list(generate(endless, [256] + [66] * 5, settings(), 0))) == 3  # reads 8, writes 9th
    assert len(list(generate(endless, [256] + [66] * 7, settings(), 0))) == 1


def test_rows_that_pad_the_vocabulary_are_never_drawn_nor_nan_logits_used():
    logits = torch.zeros(300)
    logits[257:] = 50
    drawn = list(generate(KnownModel(lambda seen: logits), [256], settings(max_tokens=64), 0))
    assert drawn and max(drawn) < 256
    broken = KnownModel(lambda seen: torch.full((257,), math.nan))
    with pytest.raises(RunError, match="logits are not finite"):
        list(generate(broken, [256], settings(), 0))


# ------------------------------------------------------------------------------ Text


def test_a_character_waits_for_its_last_byte():
    text = "aé漢😀"
    pieces = list(text_pieces(text.encode(), bytes))
    assert pieces == ["a", "", "é", "", "", "漢", "", "", "", "😀", ""]
    broken = list(text_pieces("漢".encode()[:2] + b"b", bytes))
    assert broken == ["", "", "\N{REPLACEMENT CHARACTER}b", ""]
    assert list(text_pieces("é".encode()[:1], bytes)) == ["", "\N{REPLACEMENT CHARACTER}"]
    pieces = text_pieces(repeat(65), bytes)  # without an end
    assert [next(pieces) for _ in range(3)] == ["A"] * 3


def test_bytes_are_their_own_tokens():
    tokenizer = tokenizer_of(256)
    assert tokenizer.encode("é\n") == [0xC3, 0xA9, 10]
    assert tokenizer.decode([0xC3, 0xA9]) == b"\xc3\xa9"
    assert tokenizer.encode("\udcff") == [255]  # an argument that was no UTF-8
    with pytest.raises(RunError, match="documents start with token 63"):
        tokenizer_of(63)


def write_ranks(path: Path, *longer: bytes) -> Path:
    """A tokenizer of all bytes and these longer tokens."""
    tokens = [*(bytes([i]) for i in range(256)), *longer]
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    path.write_bytes(b"".join(lines))
    return path


def test_gpt2_tokens_come_from_the_local_ranks(tmp_path, monkeypatch):
    write_ranks(tmp_path / "ranks", b"th", b" th", b" the")
    monkeypatch.setattr(data.gpt2, "GPT2_FILE", tmp_path / "ranks")
    tokenizer = tokenizer_of(50256)
    assert tokenizer.encode("a the") == [97, 258] and tokenizer.decode([97, 258]) == b"a the"
    assert 50256 not in tokenizer.encode("<|endoftext|>")  # in a prompt it is ordinary text


# ------------------------------------------------------------------------------ Checkpoints


def test_a_speedrun_checkpoint_gives_the_loss_that_its_run_logged(flags, shards, tmp_path):
    bytes_track = ["--vocab_size=257", "--document_start=256", "--val_spread=false"]
    done = train([*flags, *bytes_track, "--fp32=true", "--save_every=20"])
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*_step*")
    model = load_model(path)
    tokens = torch.from_numpy(open_shard(shards / "val.bin").astype(np.int64))
    losses = []  # the first 2048 targets, in rows of the model's context
    for start in range(0, 2048, model.context):
        row = tokens[start : start + model.context + 1]
        losses.append(torch.nn.functional.cross_entropy(model.logits(row[None, :-1])[0], row[1:]))
    logged = re.findall(r"val_loss:(\S+)", run_section(only_log(tmp_path)))
    assert torch.stack(losses).mean().item() == pytest.approx(float(logged[-1]), abs=2e-6)


def rewritten(folder, change) -> Path:
    """The checkpoint with other facts, which claim to be as they were written."""
    path = folder / "config.json"
    facts = json.loads(path.read_text())
    del facts["sha256"]
    change(facts)
    path.write_text(json.dumps({**facts, "sha256": facts_sha256(facts)}))
    return folder


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.pop("mix_at"), "another train_gpt.py, without mix_at"),
        (lambda c: c.update(model_dim=48), r"\(257, 32\), and \(257, 48\) is"),
        (lambda c: c.update(layers="LLLLLL"), r"blocks.2\S+ is not there"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused(tmp_path, change, message):
    folder = write_speedrun(tmp_path / "checkpoint")
    rewritten(folder, lambda facts: change(facts["config"]))
    with pytest.raises(RunError, match=message):
        load_model(folder)
    rewritten(folder, lambda facts: facts.update(trainer="mine.py"))
    with pytest.raises(RunError, match="is a checkpoint of mine.py"):
        load_model(folder)


def test_a_model_whose_code_has_changed_needs_a_flag(tmp_path):
    """As where GELU stands in MLP.forward and ReLU squared trained it: the shapes fit."""
    networks = {
        "baselines/train_gpt2.py": write_gpt2,
        "train_gpt.py": write_speedrun,
        "kernels.py": write_speedrun,
    }
    for path, write in networks.items():
        folder = write(tmp_path / Path(path).stem)
        rewritten(folder, lambda facts, path=path: facts["sources"].update({path: "0" * 64}))
        with pytest.raises(RunError, match=rf"\({path} changed since\).*--other_source true"):
            load_model(folder)
        assert load_model(folder, other_source=True).step > 0
    for referee in ("referee/harness.py", "referee/shards.py"):  # runs no network
        rewritten(folder, lambda facts, name=referee: facts["sources"].update({name: "0" * 64}))
    load_model(folder, other_source=True)
    rewritten(folder, lambda facts: facts.pop("sources"))  # as the oldest checkpoints
    with pytest.raises(RunError, match="--other_source true"):
        load_model(folder)
    load_model(folder, other_source=True)


def test_a_checkpoint_with_bf16_matrices_as_a_gpu_writes_is_read(tmp_path):
    def as_on_a_gpu(model):
        for block in model.blocks:
            block.mlp.up_down.data = block.mlp.up_down.data.bfloat16()

    model = load_model(write_speedrun(tmp_path / "checkpoint", as_on_a_gpu))
    exact = load_model(write_speedrun(tmp_path / "exact"))
    for found, expected in zip(model.model.parameters(), exact.model.parameters(), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=2**-8, atol=1e-6)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "file.pt").write_bytes(b"x")
    for path in (tmp_path, tmp_path / "file.pt"):
        with pytest.raises(match="is not a usable checkpoint"):
            load_model(path)


# ------------------------------------------------------------------------------ The script


SCRIPT = f"{ROOT}/evals/sample.py"


def test_a_model_is_read_with_the_tokenizer_of_its_shards_alone(tmp_path, monkeypatch):
    own = write_ranks(tmp_path / "own", b"he", b" the")
    monkeypatch.setattr(data.gpt2, "GPT2_FILE", write_ranks(tmp_path / "gpt2", b" t", b" th"))
    write_shard(tmp_path / "train.bin", np.array([50256, 257]))
    made_with = {"tokenizer_sha256": data.gpt2.ranks_sha256(data.gpt2.read_ranks(own))}
    (tmp_path / "manifest.json").write_text(json.dumps({"options": made_with}))
    task = {"vocab_size": 50257, "document_start": 50256, "train_files": f"{tmp_path}/train.bin"}
    checkpoint = write_gpt2(tmp_path / "checkpoint", task=task, embed_rows=50257)
    code, out, err = called(sample, checkpoint, "--prompt= the")
    assert (code, out) == (1, "") and "another tokenizer than GPT-2" in err
    assert err.endswith("--tokenizer_file FILE\n") and err.count("\n") == 1
    code, out, err = called(sample, checkpoint, "--prompt= the", f"--tokenizer_file={own}")
    assert code == 0 and out.startswith(" the"), err  # tokens above its ranks have no text
    code, out, err = called(sample, checkpoint, f"--tokenizer_file={tmp_path / 'gpt2'}")
    assert code == 1 and f"another tokenizer than {tmp_path / 'gpt2'}" in err
    (tmp_path / "manifest.json").unlink()  # as beside FineWeb, whose shards are GPT-2's
    checkpoint = write_gpt2(tmp_path / "unknown", task=task, embed_rows=50257)
    assert called(sample, checkpoint)[0] == 0


def test_the_same_seed_gives_the_same_text_in_another_process(checkpoint):
    flags = ["--prompt", "def é", "--max_tokens", "30", "--seed", "7", "--num_samples", "2"]
    done = run_forked([SCRIPT, str(checkpoint), *flags])
    assert done.returncode == 0, done.stderr
    model, prompt = load_model(checkpoint), list("def é".encode())
    drawn = [
        list(generate(model, [256, *prompt], settings(max_tokens=30), seed)) for seed in (7, 8)
    ]
    assert drawn[0] != drawn[1]
    texts = [bytes(prompt + tokens).decode(errors="replace") for tokens in drawn]
    expected = "".join(f"--- sample {i + 1} of 2, seed {7 + i} ---\n{texts[i]}\n" for i in (0, 1))
    assert done.stdout.splitlines() == expected.splitlines()  # a \r is read as \n


def test_a_prompt_that_is_too_long_is_refused_and_none_is_needed(checkpoint):
    assert called(sample, checkpoint, "--prompt", "x" * 64) == (
        1, "", "error: the prompt has 65 tokens with its document start, more than the model's "
        "context of 64; give a shorter one\n",
    )  # fmt: skip
    written = list(generate(load_model(checkpoint), [256], settings(top_k=1, max_tokens=20), 0))
    expected = bytes(written).decode(errors="replace")
    code, out, err = called(sample, checkpoint, "--top_k=1", "--max_tokens=20")
    assert (code, out) == (0, expected + "\n"), err


def test_wrong_flags_are_misuse_and_a_missing_checkpoint_one_sentence(tmp_path):
    for flags, problem in (
        (["--temperature", "0"], "--temperature must be at least 0.001"),
        (["--top_p", "1.5"], "--top_p must be above 0 and at most 1"),
        (["--num_samples", "0"], "--num_samples must be at least 1"),
        (["--seed", "-1"], "--seed must be at least 0"),
    ):
        code, out, err = called(sample, "x.pt", "--prompt", "a", *flags)
        assert (code, out) == (2, "") and problem in err
    code, out, err = called(sample, tmp_path / "none.pt", "--prompt", "a")
    assert (code, out) == (1, "")
    assert re.fullmatch("error: there is no checkpoint .*none.pt; .*\n", err)
