"""check_shards.py as its user meets it: what it prints, and how it ends."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, START, VOCAB, called, clean_environment, documents

from data import check_shards
from referee.shards import write_shard


def check(*globs) -> subprocess.CompletedProcess:
    words = [f"--vocab_size={VOCAB}", f"--document_start={START}", *globs]
    return subprocess.CompletedProcess(words, *called(check_shards, *words))


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, seed in (("my_val_000000", 1), ("my_train_000001", 2), ("my_train_000002", 3)):
        write_shard(tmp_path / f"{name}.bin", documents(seed, 120))
    return tmp_path


def test_sound_shards_are_described_and_counted(folder):
    done = check(folder / "*.bin")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    for path in folder.glob("*.bin"):
        (line,) = [line for line in lines if line.startswith(str(path))]
        tokens = np.fromfile(path, "<u2", offset=1024)
        assert f"  {len(tokens):,} tokens  120 documents  ids {tokens.min()}-63  " in line
        assert line.endswith(hashlib.sha256(path.read_bytes()).hexdigest())
    assert lines[-1].startswith("3 shards, ") and lines[-1].endswith(" 360 documents")


def test_documents_of_both_splits_are_named(folder):
    stream = np.fromfile(folder / "my_val_000000.bin", "<u2", offset=1024)
    first, after = [place for place, token in enumerate(stream) if token == START][7:9]
    mine = documents(2, 3)
    empty = np.array([START], np.uint16)  # empty documents are alike, and no leak
    leaking = np.concatenate([mine, stream[first:after], empty, mine])
    write_shard(folder / "my_train_000001.bin", leaking)
    write_shard(folder / "my_val_000000.bin", np.concatenate([empty, stream]))
    done = check(folder / "*.bin")
    assert done.returncode == 1
    shared = f"{folder / 'my_train_000001.bin'} has 1 documents that are in validation too"
    assert done.stderr == f"error: {shared}\n"


def test_a_cut_document_at_the_beginning_is_no_document(folder):
    stream = documents(4, 9)
    write_shard(folder / "my_train_000001.bin", stream[2:])
    assert "  8 documents  " in check(folder / "my_train_000001.bin").stdout
    write_shard(folder / "my_train_000001.bin", stream[stream != START])
    done = check(folder / "my_train_000001.bin")
    assert done.returncode == 1 and "no shard holds token 63, which opens" in done.stderr


def test_every_damage_is_reported_and_the_other_shards_are_still_read(folder):
    write_shard(folder / "bad_train_1.bin", np.array([START, 64, 5], np.uint16))
    (folder / "bad_train_2.bin").write_bytes(b"")
    (folder / "bad_train_3.bin").write_bytes(b"<!DOCTYPE html>" * 100)
    (folder / "bad_train_4.bin").write_bytes((folder / "my_val_000000.bin").read_bytes()[:-1])
    done = check(folder / "*.bin")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    reasons = done.stderr.splitlines()
    assert len(reasons) == 4 and all(line.startswith("error: ") for line in reasons)
    for number, word in enumerate(["token 64", "magic", "magic", "truncated"], 1):
        assert any(f"bad_train_{number}.bin" in line and word in line for line in reasons)
    assert done.stdout.count("my_") == 3


def test_shards_are_compared_with_their_manifest(folder):
    entries = []
    for path in sorted(folder.glob("*.bin")):
        tokens = np.fromfile(path, "<u2", offset=1024)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        counted = {"tokens": len(tokens), "documents": 120}
        entries.append({"name": path.name, **counted, "sha256": digest})
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({"shards": entries, "bytes_per_token": 4.2}))
    assert check(folder / "*.bin").returncode == 0
    entries[0]["tokens"] += 1
    entries[1]["sha256"] = "0" * 64
    entries[2]["name"] = "my_other_000000.bin"
    manifest.write_text(json.dumps({"shards": entries}))
    done = check(folder / "*.bin")
    reasons = done.stderr.splitlines()
    assert done.returncode == 1 and len(reasons) == 4
    for word in ("has tokens", "has sha256", "is not in", "my_other_000000.bin"):
        assert sum(word in line for line in reasons) == 1, word
    for damaged in ('{"shards": [', '{"shards": [{"name": 5}]}', "[]"):
        manifest.write_text(damaged)
        done = check(folder / "*.bin")
        assert done.returncode == 1 and "manifest.json is damaged" in done.stderr
    manifest.write_text('{"shards": [{"name": "elsewhere/x.bin"}]}')
    done = check(folder / "*.bin")
    assert done.returncode == 1 and "x.bin is not there, but in" in done.stderr


SCRIPTS = ["data/check_shards.py {}", "tools/validate.py records/embedded/2026-11-26_Muon"]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("output, code", [(">&-", 0), (">/dev/full", 1), ("| true", 0)])
def test_output_that_is_closed_full_or_unread_is_no_traceback(folder, script, output, code):
    shards = f"'{folder}'/*.bin --vocab_size={VOCAB} --document_start={START}"
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} {script.format(shards)} {output}"],
        cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "Traceback" not in done.stderr and bool(done.returncode) == bool(code), done.stderr


def test_misuse_and_missing_files_end_without_a_traceback(tmp_path):
    assert check().returncode == 2
    assert check("x.bin", "--vocab_size=many").returncode == 2
    done = check(tmp_path / "*.bin")
    assert done.returncode == 1
    named = r"error: no shards match \S+; name those that are there, or .*\n"
    assert re.fullmatch(named, done.stderr)
