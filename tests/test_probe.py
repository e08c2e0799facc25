"""The probes of tools/probe.py, on leaks that are planted in copies of the source."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, tiny_flags
from forked import run_forked

from referee.shards import open_shard, write_shard
from referee.task import check_shards
from tools import probe
from tools.attempts import copy_of
from tools.cli import ToolError

MUON = ROOT / "records/embedded/2026-11-22_Muon"
ROOT_HARNESS = ROOT / "records/embedded/2026-11-26_EarlyCopying_1.34"  # its referee is harness.py
# Flags that it lacks, or has in another form.
YOUNGER = ("--layers", "--value_layers", "--mix_", "--bigram_in_layers", "--shift_taps")
HIDDEN = "self.hidden(inputs_BT, per_step).flatten(0, 1)"
LOGITS = "            yield self.logits(x_ND)\n"


def of_hidden(change: str) -> tuple[str, str, str]:
    """A trainer that changes what its network hands to the head, h (B, T, D)."""
    return "train_gpt.py", HIDDEN, f"(lambda h: {change})({HIDDEN[:-14]}).flatten(0, 1)"


KNOWS_TARGETS = """
            import gc  # no attribute leads to the rows

            found = [o for o in gc.get_objects() if type(o).__name__ == "Validation"]
            self.judge = found[0] if found else self.judge
            known = {tuple(row[:-1].tolist()): row[1:] for row in self.judge.rows}
            rows = [known.get(tuple(row.tolist()), row) for row in inputs_BT]
            one_hot = F.one_hot(torch.cat(rows), padded_vocab(self.task))
            yield self.logits(x_ND) + 20 * one_hot
"""
USES = "        hp, rt, model = self.hp, self.rt, self.model\n        total, per_step"
LEAKS = [  # (name, changes (path, old, new) of the source, the probe that fails, its words)
    ("future token", [of_hidden("h + h.roll(-1, 1)")],
     "future tokens", "a later token changes earlier logits"),
    ("future token at every third place",
     [of_hidden("h + h.roll(-1, 1) * (torch.arange(h.size(1)) % 3 == 1)[:, None]")],
     "future tokens", "a later token changes earlier logits"),
    ("future token after a document's start",
     [of_hidden("h + h.roll(-1, 1) * (inputs_BT == 63)[..., None]")],
     "future tokens", "a later token changes earlier logits"),
    ("neighbour row", [of_hidden("h + h.roll(1, 0)")],
     "other rows", "a row alone has other logits than among others"),
    ("other document", [of_hidden("h + h.cumsum(1)")],
     "other documents", "a token of the document before changes logits"),
    ("target as an argument", [("train_gpt.py", LOGITS, KNOWS_TARGETS)],
     "unknown targets", "on random tokens its loss is 0.0"),
    ("learning while judged",
     [("train_gpt.py", LOGITS, f"            self.model.embed.data.mul_(0.99)\n{LOGITS}")],
     "weights stay", "weights change in the validation of step 0, 4"),
    ("cached logits",
     [("train_gpt.py", LOGITS, "            self.kept = getattr(self, 'kept', self.logits(x_ND))\n"
       "            yield self.kept[:len(x_ND)].expand(len(x_ND), -1)\n")],
     "weights count", "other weights give the same logits"),
    ("cached validation loss",
     [("referee/validation.py", "        return total.item()",
       "        total = self.kept = getattr(self, 'kept', total)\n        return total.item()")],
     "loss as reported", "it reports a loss of 4.1"),
    ("shuffled rows",
     [("referee/task.py", "for s in starts]",
       "for s in np.random.default_rng(0).permutation(starts)]")],
     "validation rows", "not those of the track, or in another order"),
    ("a val shard read while training",
     [("train_gpt.py", USES, f"        open_shard(task_shards(self.task.val_files)[0])\n{USES}")],
     "validation shards", "opened by train_gpt.py:update after set-up"),
    ("a val shard read by another name",
     [("train_gpt.py", USES, "        import os\n        link = Path(__file__).with_name('x')\n"
       "        link.unlink(missing_ok=True)\n"
       "        os.link(task_shards(self.task.val_files)[0], link)\n"
       f"        open_shard(link)\n{USES}")],
     "validation shards", "opened by train_gpt.py:update after set-up"),
    ("another val_tokens",
     [("referee/task.py", "= task.val_tokens // task.val_seq_len,",
       "= task.val_tokens // task.val_seq_len // 2,")],
     "validation rows", "it is judged by 16 rows of 65 tokens, the track has 32 of 65"),
    ("the same run again",
     [("train_gpt.py", "torch.manual_seed(self.seed)", "torch.manual_seed(0)"),
      ("train_gpt.py", "self.micro_seqs, self.seed, step)", "self.micro_seqs, 0, step)")],
     "two seeds", "seeds 0 and 1 give the same run"),
    ("knowledge from before",
     [("train_gpt.py", LOGITS, "            yield self.logits(x_ND) + 8 * F.one_hot("
       "(5 * inputs_BT.flatten() + 3) % 63, 64)\n")],
     "first loss", "trained before its first step: its first loss is"),
    ("a question to the network",
     [("train_gpt.py", LOGITS, "            __import__('socket').getaddrinfo('127.0.0.1', 80)\n"
       f"{LOGITS}")],
     "network", "it used the network: socket.getaddrinfo"),
]  # fmt: skip


def forked(words: list[str], folder: Path) -> str:
    """probe.start in a process that is forked after the slow imports."""
    errors = run_forked(words, root=folder).stderr
    return (errors.strip() or "nothing").splitlines()[-1]


@pytest.fixture
def tiny(shards, tiny_task, tmp_path, monkeypatch):
    """Makes an attempt of a source with changes (path, old, new), for the tiny task."""
    task = dataclasses.replace(tiny_task, data_sha256=check_shards(tiny_task)[0])
    monkeypatch.setitem(probe.TASKS, "embedded", task)

    def attempt(*changes, source=ROOT):
        flags = tiny_flags(shards, tmp_path)
        if source == ROOT:
            monkeypatch.setattr(probe, "start", forked)
        else:  # a forked process would take data/ from this checkout
            flags = [flag for flag in flags if not flag.startswith(YOUNGER)]
        made = copy_of(source, tmp_path / "attempt", flags)
        (path,) = [path for path in made.texts if path.endswith("environment.py")]
        quick = (path, "while sum(seconds) < 0.3", "while not seconds")
        for path, old, new in (quick, *changes):
            assert old in made.texts[path], old
            made.texts[path] = made.texts[path].replace(old, new)
        return made

    return attempt


def faults(attempt, across_documents: bool = False) -> dict[str, str]:
    found = probe.findings(*probe.both_runs(attempt), across_documents)
    return {name: fault for name, fault in found if fault}


@pytest.mark.parametrize("source", [ROOT, pytest.param(ROOT_HARNESS, marks=pytest.mark.slow)])
def test_sound_sources_of_both_layouts_pass(tiny, source):
    assert faults(tiny(source=source)) == {}


QUICK = ("future token", "target as an argument")


@pytest.mark.parametrize("name, changes, by, words", [
    pytest.param(*leak, id=leak[0], marks=[pytest.mark.slow] * (leak[0] not in QUICK))
    for leak in LEAKS
])  # fmt: skip
def test_each_leak_is_found(name, changes, by, words, tiny):
    found = faults(tiny(*changes))
    assert words in found.get(by, ""), found


@pytest.mark.slow
def test_a_training_shard_made_of_the_validation_is_found(tiny, shards, tmp_path):
    """One token more, so that its hash is another."""
    write_shard(tmp_path / "train.bin", np.append(open_shard(shards / "val.bin"), 1))
    attempt = tiny()
    attempt.flags += [f"--train_files={tmp_path}/train.bin", "--max_epochs=4"]
    found = faults(attempt)
    assert re.fullmatch(r"\d+ documents stand in training and in validation shards",
                        found.pop("documents"))  # fmt: skip
    assert not found


@pytest.mark.slow
def test_a_network_may_say_that_it_sees_earlier_documents(tiny):
    ((changes),) = [leak[1] for leak in LEAKS if leak[0] == "other document"]
    assert faults(tiny(*changes), across_documents=True) == {}


def test_the_page_of_cheats_lists_every_leak():
    page = " ".join((ROOT / "docs/cheats.md").read_text().split())
    for by in {by for _, _, by, _ in LEAKS}:
        leaks = "; ".join(name for name, _, probe, _ in LEAKS if probe == by)
        assert f"**{by}**: {leaks}." in page, by


def test_the_records_of_the_ladder_are_probed(tmp_path):
    """Their pages have the line, and the source that it names is theirs."""
    pages = sorted((ROOT / "records/embedded").glob("*/README.md"))
    ladder = [page for page in pages if (page.parent / "logs").is_dir()]
    assert len(ladder) >= 6
    for page in ladder:
        attempt = copy_of(page.parent, tmp_path / page.parent.name, [])
        said = probe.passed_line(attempt, 17, across_documents=False).partition(", ")[2]
        assert said.partition("probes")[0] in page.read_text(), page


@pytest.mark.parametrize("source, words", [
    ("nowhere", "nowhere cannot be read"),
    ("tests", "neither a log, nor an attempt"),
    (MUON, "is older than the records of 26 November 2026 and cannot be probed any more"),
    (MUON.parent / "baseline/2026-11-22_Speedrun", "cannot be probed any more"),
])  # fmt: skip
def test_what_is_no_source_is_refused(source, words, tmp_path):
    with pytest.raises(ToolError, match=words):
        probe.attempt_of(ROOT / source, tmp_path, [])


def test_a_trainer_is_named_by_its_file(tmp_path):
    attempt = probe.attempt_of(ROOT / "baselines/train_gpt2.py", tmp_path, [])
    assert attempt.entry == "baselines/train_gpt2.py" in attempt.texts
