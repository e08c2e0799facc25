"""HellaSwag's scores against a loop over single endings and against lm-eval; its data."""

import hashlib
import io
import json
import math
import random
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from forked import ROOT, run_forked
from hub_server import HubServer
from small_models import KnownModel, write_gpt2, write_speedrun

from evals import hellaswag
from evals.models import load_model
from referee.flags import RunError

WORDS = (
    "a the man woman dog rope ball sits runs jumps over under quickly then — café 漢字 .".split()
)


def made_up(count: int, seed: int = 0) -> list[dict]:
    """Records with four different endings of 1 to 6 words; labels are drawn."""
    rng = random.Random(seed)

    def text(low, high):
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    def endings():
        found = set()
        while len(found) < 4:
            found.add(text(1, 6))
        return sorted(found)

    return [
        {"ctx": text(1, 8), "endings": endings(), "label": rng.randrange(4)} for _ in range(count)
    ]


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_speedrun(tmp_path_factory.mktemp("run") / "tiny")


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


def test_scores_equal_those_of_lm_eval(model, tmp_path, monkeypatch):
    """lm-eval makes the requests, encodes the pairs and counts; the model answers one by one."""
    pytest.importorskip("lm_eval", reason="pip install lm-eval, which is too heavy to require")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    from lm_eval.api.model import TemplateLM
    from lm_eval.evaluator import simple_evaluate

    class OneByOne(TemplateLM):
        eot_token_id = 256

        def tok_encode(self, string, **_):
            return list(string.encode())

        def _loglikelihood_tokens(self, requests, **_):
            return [(self.score(context, ending), False) for _, context, ending in requests]

        def score(self, context, ending):
            row = (context + ending)[-(model.context + 1) :]
            table = [log_softmax(logits) for logits in model.logits(torch.tensor([row[:-1]]))[0]]
            targets = list(zip(table, row[1:], strict=True))[-len(ending) :]
            return sum(logs[token] for logs, token in targets)

        def loglikelihood_rolling(self, requests):
            raise NotImplementedError

        generate_until = loglikelihood_rolling

    records = made_up(50)
    path = write_jsonl(tmp_path / "made_up.jsonl", records)
    task = {
        "task": "made_up", "dataset_path": "json", "validation_split": "validation",
        "dataset_kwargs": {"data_files": {"validation": str(path)}},
        "output_type": "multiple_choice", "doc_to_text": "{{ctx}}",
        "doc_to_target": "{{label}}", "doc_to_choice": "{{endings}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    found = simple_evaluate(OneByOne(), tasks=[task], log_samples=True, bootstrap_iters=0)
    acc_norm, acc = evaluate(model, records)
    assert found["results"]["made_up"]["acc,none"] == pytest.approx(acc, abs=1e-12)
    samples = sorted(found["samples"]["made_up"], key=lambda sample: sample["doc_id"])
    sums = np.array([[answer[0] for answer in s["filtered_resps"]] for s in samples])
    np.testing.assert_allclose(batched(model, records), sums, rtol=1e-5)
    counts = [[len(e.encode()) + 1 for e in record["endings"]] for record in records]
    labels = np.array([record["label"] for record in records])
    assert acc_norm == pytest.approx(((sums / counts).argmax(1) == labels).mean(), abs=1e-12)


# ------------------------------------------------------------------------------ Data


GOOD = {"ctx": "a man", "endings": ["a", "b", "c", "d"], "label": 2}


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1, 2]",
        json.dumps({"ctx": "a", "label": 1}),
        json.dumps(GOOD | {"ctx": " "}),
        json.dumps(GOOD | {"ctx": "a \ud800"}),
        json.dumps(GOOD | {"endings": ["a", "b", "c"]}),
        json.dumps(GOOD | {"endings": "abcd"}),
        json.dumps(GOOD | {"endings": ["a", "b", "c", ""]}),
        json.dumps(GOOD | {"label": 4}),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line):
    path = tmp_path / "wrong.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(RunError) as caught:
        hellaswag.read_examples(path)
    assert str(caught.value) == (f"{path}, line 2: not an object with a text ctx, 4 texts endings "
                                 f"and a label of 0 to 3; {hellaswag.ADVICE}")  # fmt: skip


def test_blank_lines_at_the_end_are_no_examples(tmp_path):
    path = tmp_path / "a.jsonl"
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


def test_the_set_comes_from_the_hub_once_and_whole(tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    records, name = made_up(10_042), "default/validation/0000.parquet"
    (tmp_path / "fetch.py").write_text(FETCH)
    with HubServer({"Rowan/hellaswag": {name: parquet(records), "default/test/0": b""}}) as hub:
        settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf")}
        done = run_forked([f"{tmp_path}/fetch.py", f"{tmp_path}/set"], **settings)
        assert done.returncode == 0, done.stderr
        first, second = done.stdout.splitlines()
        assert first == f"10042 {hellaswag.example_of(records[-1])}"
        assert second.startswith("error: cannot list Rowan/hellaswag at gone: ")
        assert second.endswith("; " + hellaswag.ADVICE)
        assert len(hub.transfers(name)) == 1


def test_another_file_of_the_hub_is_refused_and_one_s_own_may_be_a_part(tmp_path, monkeypatch):
    path = tmp_path / "0000.parquet"
    path.write_bytes(parquet(made_up(41)))
    assert len(hellaswag.read_examples(path)) == 41
    monkeypatch.setattr(hellaswag, "FOLDER", tmp_path)
    with pytest.raises(RunError, match="has 41 examples, not 10,042.; delete it"):
        hellaswag.read_examples(path)
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


def test_no_examples_are_misuse(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hellaswag.py", "any", "--limit", "0"])
    with pytest.raises(SystemExit) as error:
        hellaswag.main()
    assert error.value.code == 2 and "--limit must be at least 1" in capsys.readouterr().err
