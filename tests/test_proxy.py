"""The proxy of tools/proxy.py: its rows and its settings."""

import dataclasses
import json
from shutil import rmtree
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import documents

from referee.shards import open_shard, write_shard
from referee.task import TASKS
from referee.validation import Validation
from tools import proxy
from tools.attempts import last_words
from tools.cli import ToolError
from tools.runs import read_log
from tools.sources import ROOT
from train_gpt import TRACKS, micro_batches

ONE_RANK = SimpleNamespace(rank=0, world_size=1)


def proxy_hp(steps: int):
    chosen = proxy.scaled(vars(TRACKS["fineweb"]), steps)
    names = {f.name for f in dataclasses.fields(TRACKS["fineweb"])}
    as_read = {k: tuple(v) if isinstance(v, list) else v for k, v in chosen.items()}
    return dataclasses.replace(
        TRACKS["fineweb"], **{k: v for k, v in as_read.items() if k in names}
    )


def test_frequent_tokens_keep_an_id_and_documents_their_start():
    tokens = np.arange(3000).repeat(np.arange(3000, 0, -1))
    folded = proxy.fold(tokens, np.bincount(tokens), document_start=5)
    firsts = folded[np.searchsorted(tokens, np.arange(3000))]
    assert firsts[:5].tolist() == [0, 1, 2, 3, 4] and firsts[5] == 2047
    assert firsts[6:2001].tolist() == list(range(5, 2000))
    shared = firsts[2001:]
    assert shared.min() >= 2000 and shared.max() < 2047 and len(set(shared)) == 47


def test_a_seed_draws_documents_and_each_row_holds_their_beginnings(tmp_path):
    """Against a packing of its own, for the caps and batches of all three stages."""
    stream = documents(7, 4000)
    write_shard(tmp_path / "t.bin", stream)
    write_shard(tmp_path / "v.bin", documents(8, 1000))
    args = SimpleNamespace(train_files=str(tmp_path / "t.bin"), n=2, document_start=63,
                           val_files=str(tmp_path / "v.bin"))  # fmt: skip
    proxy.prepare(args, tmp_path)
    hp = proxy_hp(42)
    task = dataclasses.replace(TASKS["fineweb"], train_files=str(tmp_path / "train_1.bin"),
                               document_start=2047)  # fmt: skip
    found = list(micro_batches(hp, task, ONE_RANK, (2,), 1, 0))
    assert len(found) == 14 * (1 + 2 + 3)
    folded = proxy.fold(stream, np.bincount(stream, minlength=1 << 16), 63)
    starts = np.flatnonzero(folded[:-1] == 2047)
    ends = [*starts[1:], len(folded) - 1]
    order = iter(np.random.default_rng(1).permutation(len(starts)))
    for place, (inputs, targets) in enumerate(found):
        cap = 112 if place < 14 else 256
        for x, y in zip(inputs.numpy(), targets.numpy(), strict=True):
            done = 0
            while done < 256:
                i = next(order)
                n = min(ends[i] - starts[i], cap, 256 - done)
                assert (x[done : done + n] == folded[starts[i] : starts[i] + n]).all()
                assert (y[done : done + n] == folded[starts[i] + 1 : starts[i] + n + 1]).all()
                done += n


def test_validation_rows_lie_evenly_in_the_shard(tmp_path):
    val = documents(8, 1000)
    write_shard(tmp_path / "v.bin", val)
    args = SimpleNamespace(train_files=str(tmp_path / "v.bin"), n=1, document_start=63,
                           val_files=str(tmp_path / "v.bin"))  # fmt: skip
    proxy.prepare(args, tmp_path)
    task = dataclasses.replace(TASKS["fineweb"], val_files=str(tmp_path / "val.bin"),
                               val_seq_len=256, val_tokens=65536, val_spread=True)  # fmt: skip
    rows = Validation(task, ONE_RANK).rows.numpy()
    stride = (len(val) - 258) // 256
    folded = proxy.fold(val, np.bincount(val, minlength=1 << 16), 63)
    assert all((row == folded[i * stride :][:257]).all() for i, row in enumerate(rows))
    assert open_shard(tmp_path / "val.bin").max() == 2047
    args.document_start = 999
    with pytest.raises(ToolError, match="holds no token 999, which opens a document"):
        proxy.prepare(args, tmp_path)


def test_settings_are_those_of_fineweb_at_an_eighth():
    hp = proxy_hp(300)
    assert hp.window_tokens == (48, 112, 176) and hp.short_window_tokens == (16, 48, 80)
    assert hp.val_window_tokens == 320 and hp.batch_tokens == (1024, 2048, 3072)
    assert (hp.momentum_steps, hp.val_every) == ((60, 10), 75)
    assert proxy_hp(160).batch_tokens == (512, 1024, 1536)
    own = dataclasses.asdict(TRACKS["fineweb"])
    older = {**own, "momentum_warmup": 300, "momentum_cooldown": 50}
    del older["momentum_steps"], older["short_window_tokens"]
    found = proxy.scaled(json.loads(json.dumps(older)), 300)
    assert (found["momentum_warmup"], found["momentum_cooldown"]) == (60, 10)
    assert "momentum_steps" not in found and found["window_tokens"] == (48, 112, 176)


@pytest.mark.slow
def test_runs_side_by_side_are_kept_and_only_missing_ones_repeated(tmp_path, capsys, monkeypatch):
    write_shard(tmp_path / "t.bin", documents(7, 4000))
    write_shard(tmp_path / "v.bin", documents(8, 1000))
    monkeypatch.setattr("fcntl.flock", lambda *_: None)  # one process repeats the command here
    out, files = tmp_path / "out", [f"--{k}_files={tmp_path}/{k[0]}.bin" for k in ("train", "val")]
    small = "--layers=SL --model_dim=16 --value_layers=none --mix_at=none --batch_tokens=256"
    argv = ["proxy.py", str(ROOT), "-n2", "--steps=40", f"--out={out}", "--document_start=63",
            *files, *small.split()]  # fmt: skip
    monkeypatch.setattr("sys.argv", argv)
    proxy.main()
    printed = capsys.readouterr().out.splitlines()
    logs = {read_log(path).seed: path for path in (out / "A/logs").iterdir()}
    assert sorted(logs) == ["0", "1"] and len(printed) == 3
    logs["1"].unlink()
    proxy.main()
    assert capsys.readouterr().out.splitlines() == [printed[1], printed[2]]
    logs["0"].unlink()
    with monkeypatch.context() as patch, pytest.raises(ToolError, match="rows of .* has vanished"):
        patch.setattr("tools.attempts.run_group", lambda jobs, _: rmtree(jobs[0][0].folder.parent))
        proxy.main()
    monkeypatch.setattr("sys.argv", [*argv, "--muon_lr=0.1"])
    with pytest.raises(ToolError, match="had other flags; name a new folder"):
        proxy.main()


def test_a_run_that_broke_is_reported_by_its_error():
    said = "error: no space\nso far, other processes took this CPU\n"
    assert last_words(said, 1) == "error: no space"
    assert last_words("Traceback\nnumpy.AxisError: axis\nso far\n", 1) == "numpy.AxisError: axis"
    assert last_words("so far, other processes took this CPU", -9) == "signal 9 ended it"
    assert last_words("last line", 3) == "last line" and last_words("", 3) == "it exited with 3"
