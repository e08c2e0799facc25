"""HellaSwag's scores against a loop over single endings; its data."""

import hashlib
import io
import json
import math
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, called
from forked import run_forked
from hub_server import HubServer
from small_models import KnownModel, write_gpt2, write_speedrun

from evals import hellaswag
from evals.models import load_model
from referee.flags import RunError

WORDS = "a the man woman dog rope ball sits runs jumps over under then — café 漢字 .".split()


def made_up(count: int, seed: int = 0) -> list[dict]:
    """Records with four different endings of 1 to 6 words; labels are drawn."""
    rng, records = random.Random(seed), []

    def text(most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))

    while len(records) < count:
        endings = [text(6) for _ in range(4)]
        if len(set(endings)) == 4:
            records.append({"ctx": text(8), "endings": endings, "label": rng.randrange(4)})
    return records


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_model(checkpoint)


def log_softmax(logits) -> np.ndarray:
    x = np.asarray(logits, np.float64)
    return x - x.max() - math.log(np.exp(x - x.max()).sum())


def one_at_a_time(model, context: str, ending: str) -> tuple[float, int]:
    """(log-likelihood, tokens) of an ending: no batch, no padding, sums in float64."""
    before, after = list(context.encode()), list((" " + ending).encode())
    logits = model.logits(torch.tensor([before + after]))[0]
    places = range(len(before), len(before) + len(after))
    return sum(log_softmax(logits[t - 1])[(before + after)[t]] for t in places), len(after)


def brute_force(model, records) -> tuple[np.ndarray, float, float]:
    """(log-likelihoods (N, 4), acc_norm, acc) of examples in which the two choose differently."""
    pairs = np.array([[one_at_a_time(model, r["ctx"], e) for e in r["endings"]] for r in records])
    labels = np.array([record["label"] for record in records])
    sums, means = pairs[..., 0], pairs[..., 0] / pairs[..., 1]
    assert (means.argmax(1) != sums.argmax(1)).any()
    return sums, *(float((x.argmax(1) == labels).mean()) for x in (means, sums))


def batched(model, records) -> np.ndarray:
    """The log-likelihoods (N, 4) as evaluate gets them."""
    rows = [hellaswag.ending_rows(hellaswag.example_of(record), model) for record in records]
    return np.stack([hellaswag.log_likelihoods(model, four) for four in rows])


def evaluate(model, records) -> tuple[float, float]:
    return hellaswag.evaluate(model, [hellaswag.example_of(record) for record in records])


@pytest.mark.parametrize("write", [write_speedrun, write_gpt2])
def test_scores_equal_a_loop_over_single_endings(write, tmp_path):
    model = load_model(write(tmp_path / "long", val_seq_len=256, seq_len=256))
    records = made_up(20)
    sums, acc_norm, acc = brute_force(model, records)
    np.testing.assert_allclose(batched(model, records), sums, rtol=1e-5)
    assert evaluate(model, records) == pytest.approx((acc_norm, acc), abs=1e-12)


def test_a_context_that_is_too_long_loses_its_beginning():
    """The logits depend on the whole of what is read, by a hash."""
    model = KnownModel(lambda seen: logits_from(repr(seen)), context=40)
    record = made_up(1)[0] | {"ctx": "much more than fits " * 5, "endings": ["x", "yy", "z z", "w"]}
    rows = hellaswag.ending_rows(hellaswag.example_of(record), model)
    for (tokens, _), ending in zip(rows, record["endings"], strict=True):
        whole = (record["ctx"] + " " + ending).encode()
        assert tokens == list(whole[-41:])  # the last is only ever a target
    for (tokens, count), found in zip(rows, batched(model, [record])[0], strict=True):
        follows = [log_softmax(model.logits_of(tokens[:t]))[tokens[t]] for t in range(1, 41)]
        assert found == pytest.approx(sum(follows[-count:]), rel=1e-5)


def test_an_ending_longer_than_the_context_is_scored_by_its_end(model):
    record = made_up(1)[0] | {"endings": ["e" * 200, "f" * 64, "g" * 63, "h"]}
    rows = hellaswag.ending_rows(hellaswag.example_of(record), model)
    assert [(len(tokens), count) for tokens, count in rows[:3]] == [(65, 64), (65, 64), (65, 64)]
    assert evaluate(model, [record])[0] in (0.0, 1.0)


def logits_from(text: str) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
    return torch.from_numpy(np.random.default_rng(seed).normal(size=257)).float()


def test_a_uniform_model_scores_a_quarter():
    acc_norm, _ = evaluate(KnownModel(lambda seen: torch.full((257,), 0.7)), made_up(100))
    assert acc_norm == 0.25  # four equal means: the right one counts a quarter


def test_of_equal_endings_the_right_one_counts_its_share():
    table = torch.tensor([[-1.0, -1, -2, -3], [-1, -2, -2, -3], [-1, -1, -1, -1]])
    assert hellaswag.accuracy(table, torch.tensor([0, 1, 3])) == pytest.approx((0.5 + 0 + 0.25) / 3)


# ------------------------------------------------------------------------------ Data


GOOD = {"ctx": "a man", "endings": ["a", "b", "c", "d"], "label": 2}


def test_a_wrong_line_is_named_and_blank_ones_at_the_end_are_no_examples(tmp_path):
    path = tmp_path / "a.jsonl"
    wrong = (
        [1, 2],
        {"ctx": "a", "label": 1},
        GOOD | {"ctx": " "},
        GOOD | {"ctx": "a \ud800"},
        GOOD | {"endings": ["a", "b", "c"]},
        GOOD | {"endings": "abcd"},
        GOOD | {"endings": ["a", "b", "c", ""]},
        GOOD | {"label": 4},
    )
    for line in ("{", *map(json.dumps, wrong)):
        path.write_text(f"{json.dumps(GOOD)}\n{line}\n")
        with pytest.raises(RunError) as caught:
            hellaswag.read_examples(path)
        assert str(caught.value) == (
            f"{path}, line 2: not an object with a text ctx, 4 texts endings and a label of 0 to "
            f"3; {hellaswag.ADVICE}"
        )
    path.write_text(f"{json.dumps(GOOD)}\n{json.dumps(GOOD)}\n\n \n")
    assert len(hellaswag.read_examples(path)) == 2
    path.write_text("")
    with pytest.raises(RunError, match="a.jsonl is empty; get"):
        hellaswag.read_examples(path)


def parquet(records) -> bytes:
    """As the hub's copy has them: labels are strings there."""
    rows = [{**record, "label": str(record["label"]), "ind": 1} for record in records]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


FETCH = """
import sys; from pathlib import Path; from evals import hellaswag
hellaswag.FOLDER, hellaswag.REVISION = Path(sys.argv[1]), "main"
for _ in range(2):
    path = hellaswag.fetch()
    examples = hellaswag.read_examples(path)
print(len(examples), examples[-1])
path.unlink()
hellaswag.REVISION = "gone"
try:
    hellaswag.fetch()
except hellaswag.RunError as error:
    print("error:", error)
"""


def test_the_set_comes_from_the_hub_once(tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    records, name = made_up(99), "default/validation/0000.parquet"
    (tmp_path / "fetch.py").write_text(FETCH)
    with HubServer({"Rowan/hellaswag": {name: parquet(records), "default/test/0": b""}}) as hub:
        settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf")}
        done = run_forked([f"{tmp_path}/fetch.py", f"{tmp_path}/set"], **settings)
        assert done.returncode == 0, done.stderr
        first, second = done.stdout.splitlines()
        assert first == f"99 {hellaswag.example_of(records[-1])}"
        assert second.startswith("error: cannot list Rowan/hellaswag at gone: ")
        assert second.endswith("; " + hellaswag.ADVICE)
        assert len(hub.transfers(name)) == 1


def test_one_s_own_parquet_may_be_a_part_of_the_set(tmp_path):
    path = tmp_path / "0000.parquet"
    path.write_bytes(parquet(made_up(41)))
    assert len(hellaswag.read_examples(path)) == 41
    path.write_bytes(b"PAR1 something else")
    with pytest.raises(RunError, match="0000.parquet cannot be read"):
        hellaswag.read_examples(path)


# ------------------------------------------------------------------------------ The script


def test_the_result_is_printed(checkpoint, tmp_path):
    records = made_up(12)
    data = write_jsonl(tmp_path / "val.jsonl", records)
    words = [f"{ROOT}/evals/hellaswag.py", str(checkpoint), "--data", str(data), "--limit", "10"]
    done = run_forked(words)
    acc_norm, acc = evaluate(load_model(checkpoint), records[:10])
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    stderr = math.sqrt(acc_norm * (1 - acc_norm) / 10)
    assert (done.returncode, done.stdout) == (0, (
        f"hellaswag acc_norm:{acc_norm:.4f} stderr:{stderr:.4f} acc:{acc:.4f} n:10 "
        f"checkpoint:tiny trainer:train_gpt.py step:20 data_sha256:{digest}\n"
    )), done.stderr  # fmt: skip


def test_no_examples_are_misuse():
    code, _, err = called(hellaswag, "any", "--limit", "0")
    assert code == 2 and "--limit must be at least 1" in err
