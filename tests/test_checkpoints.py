"""Checkpoints: one that is not of this run, or not as it was written, is never loaded."""

import dataclasses
import fcntl
import json
import os
import random
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from conftest import settings

from referee import ranks
from referee.checkpoints import (
    check_same_run,
    delete_checkpoint,
    delete_parts,
    facts_sha256,
    read_checkpoint,
    write_checkpoint,
    write_facts,
)
from referee.flags import RunError
from referee.harness import Run, parse_flags
from referee.ranks import Runtime
from referee.shards import ShardError, file_sha256
from train_gpt import ADAM_EVERY, PROCESS_START, TRACKS, Trainer

RT = Runtime()


class Saved:
    """A trainer after a few steps of one seed, and its checkpoint."""

    def __init__(self, folder: Path, task, hp, seed: int):
        chosen = settings(task, hp, seed=seed, compile=False, log_dir=str(folder.parent))
        self.run = Run(chosen, "train_gpt.py", RT, None, PROCESS_START)
        self.trainer = self.run.build(Trainer)
        self.trainer.compile(lambda function: function)
        batches = self.trainer.batches(0)
        for step in range(ADAM_EVERY):
            self.trainer.update(step, batches)
        self.run.step, self.run.curve, self.folder = 6, [(0.0, 4.2), (3.5, 3.0)], folder
        write_checkpoint(folder, self.trainer.state(), self.run.facts(), RT)

    def load(self, folder: Path) -> None:
        facts = read_checkpoint(folder, RT)
        check_same_run(folder, facts, self.run.facts(), other_source=False)
        self.run.options = dataclasses.replace(self.run.options, resume=str(folder))
        self.run.resume(facts, self.trainer.state())


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_task, tiny_hp):
    """Two of them, that differ in the seed alone."""
    folder = tmp_path_factory.mktemp("saved")
    yield [Saved(folder / f"step{seed}", tiny_task, tiny_hp, seed) for seed in (0, 1)]
    print(f"\n{len(REFUSED)} altered checkpoints were refused")  # with -s


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved[0].folder, tmp_path / "copy"))


REFUSED = []  # the messages, by which a page of the docs counts


def refused(run: Saved, folder: Path, match: str | None = None) -> None:
    """Assert that a run does not go on from an altered checkpoint."""
    with pytest.raises((RunError, ShardError), match=match) as caught:
        run.load(folder)
    REFUSED.append(str(caught.value))


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def signed(folder: Path, change) -> None:
    """Change the facts, and renew the hash over them, as no accident would."""
    path = folder / "config.json"
    facts = json.loads(path.read_text())
    facts.pop("sha256")
    change(facts)
    path.write_text(json.dumps({**facts, "sha256": facts_sha256(facts)}))


def flip(folder, rng):
    path = rng.choice(files_of(folder))
    raw = bytearray(path.read_bytes())
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)


def cut(folder, rng):
    path = rng.choice(files_of(folder))
    os.truncate(path, rng.randrange(path.stat().st_size))


def lengthen(folder, rng):
    with rng.choice(files_of(folder)).open("ab") as file:
        file.write(b"\0")


def remove(folder, rng):
    rng.choice(files_of(folder)).unlink()


def replace_by(make):
    def alter(folder, rng):
        path = rng.choice(files_of(folder))
        path.unlink()
        make(path)

    return alter


def nest(folder, rng):
    (folder / "config.json").write_text("[" * 100_000)


ACCIDENTS = [flip] * 30 + [cut] * 10 + [lengthen] * 3 + [remove] * 3
ACCIDENTS += [nest, *[replace_by(os.mkfifo)] * 3, *[replace_by(os.mkdir)] * 2]


@pytest.mark.parametrize("number, alter", list(enumerate(ACCIDENTS)))
def test_an_altered_checkpoint_is_refused(saved, copy, number, alter):
    alter(copy, random.Random(number))
    refused(saved[0], copy)


def test_what_file_managers_add_harms_no_checkpoint(saved, copy):
    saved[0].load(copy)
    for name in (".DS_Store", "._config.json"):
        (copy / name).write_bytes(b"\0\5\26\7")
    (copy / ".ipynb_checkpoints").mkdir()
    saved[0].load(copy)


def test_a_file_of_another_checkpoint_is_refused(saved, copy):
    for name in [path.name for path in files_of(copy)]:
        shutil.copy(saved[1].folder / name, copy / name)
        refused(saved[0], copy, "was changed after it was written")
        shutil.copy(saved[0].folder / name, copy / name)
    its_seed = "was saved by another run; to resume it, add: --seed=1$"
    refused(saved[0], saved[1].folder, its_seed)


WRONG = [None, "text", 1.5, -1, [], [1], {}, True, [[1, "a"]], 10**30]
NAMES = ("trainer", "sources", "step", "tokens", "curve", "train_ms", "data_sha256", "arithmetic",
         "config", "files")  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_fact_of_another_type_is_refused(saved, copy, name):
    text = (copy / "config.json").read_text()
    wrong = [v for v in WRONG if type(v) is not type(json.loads(text)[name])]
    wrong += [[[1, "a"]]] if name == "curve" else []
    for value in wrong:
        (copy / "config.json").write_text(text)
        signed(copy, lambda facts, value=value: facts.update({name: value}))
        refused(saved[0], copy)
    (copy / "config.json").write_text(text)
    signed(copy, lambda facts: facts.pop(name))
    refused(saved[0], copy)


@pytest.mark.parametrize("fact", [{"step": 99}, {"step": -1}, {"train_ms": -1e9}, {"tokens": -5},
                                  {"train_ms": float("nan")}, {"curve": [[0.0, -2.0]]},
                                  {"curve": [[float("nan"), 4.2]]}])  # fmt: skip
def test_a_state_that_no_run_reaches_is_refused(saved, copy, fact):
    signed(copy, lambda facts: facts.update(fact))
    refused(saved[0], copy, "which no run can")


def of_another_shape(tensor):
    return tensor[..., :1].contiguous() if tensor.ndim else tensor[None]


def left_out(tensor):
    return None


@pytest.mark.parametrize("change", [of_another_shape, torch.Tensor.double, left_out])
@pytest.mark.parametrize("name", ["model.embed", "attn.momentum", "embed.square"])
def test_a_tensor_of_another_kind_is_refused(saved, tmp_path, change, name):
    tensors = saved[0].trainer.state()
    changed = {**tensors, name: change(tensors[name])}
    changed = {name: tensor for name, tensor in changed.items() if tensor is not None}
    write_checkpoint(tmp_path / "other", changed, saved[0].run.facts(), RT)
    refused(saved[0], tmp_path / "other", f"its {name} is ")


def test_tensors_that_cannot_be_read_are_one_line(saved, copy):
    """Damage that the hashes do not show, for they were renewed: as of a bad writer."""
    for name in [path.name for path in files_of(copy) if path.name != "config.json"]:
        (copy / name).write_bytes(b"\x80\x04nonsense")
        digests = {p.name: file_sha256(p) for p in files_of(copy) if p.name != "config.json"}
        signed(copy, lambda facts, digests=digests: facts.update({"files": digests}))
        refused(saved[0], copy, "cannot be read")
        shutil.copy(saved[0].folder / name, copy / name)


@pytest.mark.parametrize("path", ["train_gpt.py", "data/prefetch.py", "referee/clock.py"])
def test_a_checkpoint_of_another_source_needs_a_flag(saved, path):
    own = saved[0].run.facts()
    own["sources"] = {**own["sources"], path: "another"}
    facts, folder = read_checkpoint(saved[0].folder, RT), saved[0].folder
    with pytest.raises(RunError) as caught:
        check_same_run(folder, facts, own, other_source=False)
    assert f"({path} changed since)" in str(caught.value)
    assert "--other_source true" in str(caught.value)
    check_same_run(folder, facts, own, other_source=True)


def test_a_run_that_insists_on_another_source_says_so_in_its_log():
    found = parse_flags(["--other_source", "true", "--seed", "3"], TRACKS, "embedded", "")
    assert found.overrides == ["other_source"]  # by which validate.py calls it no record


@pytest.mark.parametrize("name", ["matmul_dtype", "stream_dtype"])
def test_a_checkpoint_of_other_arithmetic_is_refused(saved, name):
    own, folder = saved[0].run.facts(), saved[0].folder
    own["arithmetic"] = {**own["arithmetic"], name: "torch.float8"}
    with pytest.raises(RunError, match=f"computed with {name} .*--fp32"):
        check_same_run(folder, read_checkpoint(folder, RT), own, other_source=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_that_goes_on_multiplies_as_before_without_measuring(saved, monkeypatch, dtype):
    first, rt = saved[0], Runtime()
    monkeypatch.setattr(ranks, "bf16_gain", lambda: 0.0 if dtype == torch.bfloat16 else 9.0)
    facts = read_checkpoint(first.folder, RT)
    facts["arithmetic"] = {**facts["arithmetic"], "matmul_dtype": str(dtype)}
    folder = shutil.copytree(first.folder, first.folder.with_name(str(dtype)))
    write_facts(folder, facts)
    chosen = first.run.options
    task, hp = first.run.task, first.run.hp
    own = settings(task, hp, seed=0, log_dir=chosen.log_dir, resume=str(folder))
    run = Run(own, "train_gpt.py", rt, None, PROCESS_START)
    assert run.checkpoint_to_resume()["step"] == 6 and rt.matmul_dtype == dtype
    write_facts(folder, {**facts, "arithmetic": {"matmul_dtype": "torch.int8"}})
    with pytest.raises(RunError, match="computed with matmul_dtype torch.int8, this run"):
        run.checkpoint_to_resume()


CONFIGS = [
    ["--layers=-L-", "--num_steps=7", "--momentum_steps=9,9"],
    ["--task=embedded_1.34", "--head_gates=true"],
    ["--val_spread=false", "--muon_lr=1e-05", "--window_tokens=32,64"],
]


@pytest.mark.parametrize("flags", CONFIGS)
def test_the_flags_that_a_refusal_names_lead_to_the_run_that_saved(tmp_path, flags):
    def run_of(argv):
        return Run(parse_flags(argv, TRACKS, "embedded", ""), "train_gpt.py", RT, None, 0.0)

    there = json.loads(json.dumps(run_of(flags).facts()))
    with pytest.raises(RunError) as caught:
        check_same_run(tmp_path, there, run_of([]).facts(), other_source=False)
    named = shlex.split(str(caught.value).partition("add: ")[2])
    check_same_run(tmp_path, there, run_of(named).facts(), other_source=False)


def test_what_killed_runs_left_goes_and_what_others_write_stays(tmp_path):
    for name in ("dead_step0000003", "gone_step0000001", "alive_step0000002"):
        (tmp_path / f"{name}.part").mkdir()
        (tmp_path / f"{name}.part" / "data").write_bytes(b"half")
    (tmp_path / "dead.txt").touch()
    (tmp_path / "dead_step0000001").mkdir()
    with (tmp_path / "alive.txt").open("w") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        delete_parts(tmp_path)
        left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["alive.txt", "alive_step0000002.part", "dead.txt", "dead_step0000001"]
    delete_checkpoint(tmp_path / "dead_step0000001")
    assert not (tmp_path / "dead_step0000001").exists()


def test_a_failed_save_keeps_the_one_before(saved, tmp_path, monkeypatch):
    run, tensors = saved[0].run, saved[0].trainer.state()
    run.log.path, run.status, run.step = tmp_path / "run.txt", "", 5
    run.save(lambda: tensors)

    def full(*arguments, **options):
        (tmp_path / "run_step0000010.part").mkdir(exist_ok=True)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.save", full)
    run.step = 10
    run.save(lambda: tensors)  # periodic: the run goes on
    run.status = "aborted"
    with pytest.raises(RunError, match="cannot save .*: No space left on device; free some"):
        run.save(lambda: tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["run_step0000005"] and run.saved
    run.status, run.step = "", 6
