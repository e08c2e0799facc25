"""The FineWeb download as its user meets it, with the real client, from a hub that misbehaves."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, called, clean_environment
from hub_server import HTML, HTML_PAGE, Fault, HubServer

from data import check_shards
from referee.shards import open_shard, write_shard

REPO = "kjj0/fineweb10B-gpt2"
TOKENS = 200_000
DATA = {"embedded", "fineweb10B", "wikitext103", "gpt2.tiktoken"}  # what a checkout may hold
NAMES = ["fineweb_val_000000.bin", *(f"fineweb_train_{n:06d}.bin" for n in range(1, 10))]
VAL, FIRST, SECOND = NAMES[:3]
SCRIPT = str(ROOT / "data" / "cached_fineweb10B.py")
SLOWLY = Fault(bytes_per_s=400)  # longer than any test
IMPATIENT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from data import cached_fineweb10B, hub
hub.WAITS_S = (0.01, 0.01)
from referee.flags import finish
finish(cached_fineweb10B.main)
"""
STARTING = "starting: torch takes some seconds to load\n"


@pytest.fixture(scope="module")
def contents(tmp_path_factory) -> dict[str, bytes]:
    """Ten small shards, by name."""
    folder, rng = tmp_path_factory.mktemp("published"), np.random.default_rng(0)
    for name in NAMES:
        write_shard(folder / name, rng.integers(0, 50257, TOKENS, dtype=np.uint16))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(contents):
    with HubServer({REPO: {".gitattributes": b"", **contents}}) as server:
        yield server


@pytest.fixture
def user(hub, tmp_path):
    return User(hub.endpoint, tmp_path)


class User:
    """Somebody who runs the script, with a home and a folder of their own."""

    def __init__(self, endpoint: str, home: Path):
        self.folder = home / "fineweb10B"
        self.environment = clean_environment(HF_ENDPOINT=endpoint, HF_HOME=str(home / "hf"))
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            self.environment.pop(name, None)

    def start(self, *flags, script=(SCRIPT,), **options) -> subprocess.Popen:
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
        command = [sys.executable, *script, *flags, f"--out={self.folder}"]
        return subprocess.Popen(command, env=self.environment, **options)

    def run(self, *flags, **options) -> subprocess.CompletedProcess:
        return finished(self.start(*flags, **options))

    def refused(self, *flags, **options) -> str:
        """Run; return the one sentence that it ends with."""
        done = self.run(*flags, **options)
        assert done.returncode == 1, done
        (sentence,) = re.findall(r"^error: (.*)$", done.stderr, re.M)
        assert done.stderr.endswith(f"{sentence}\n")
        return sentence

    def has(self, contents: dict[str, bytes]) -> bool:
        """Are these files there, and nothing else, not even a folder?"""
        there = {p.name: p.read_bytes() for p in self.folder.iterdir()}
        there.pop("manifest.json", None)
        return there == contents

    def put(self, contents: dict[str, bytes]) -> None:
        self.folder.mkdir(exist_ok=True)
        for name, content in contents.items():
            (self.folder / name).write_bytes(content)

    def incomplete(self) -> list[Path]:
        """What a killed download leaves."""
        return list((self.folder / "part").rglob("*.incomplete"))


def finished(process: subprocess.Popen) -> subprocess.CompletedProcess:
    out, err = process.communicate(timeout=90)
    assert "Traceback" not in err, err
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def first(contents: dict[str, bytes], train_shards: int) -> dict[str, bytes]:
    return {name: contents[name] for name in NAMES[: train_shards + 1]}


def wait_until(condition, process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def test_shards_arrive_whole_and_are_not_fetched_twice(hub, user, contents):
    done = user.run()  # as many as the fineweb track needs
    assert (done.returncode, done.stdout) == (0, "") and user.has(contents)
    assert len(open_shard(user.folder / SECOND)) == TOKENS
    assert all(len(hub.transfers(name)) == 1 for name in NAMES)
    hub.requests.clear()
    assert user.run().returncode == 0 and not hub.requests


def test_what_passes_is_tried_again(hub, user, contents):
    faults = [
        Fault(status=503),
        Fault(status=429, headers={"Retry-After": "1"}),
        Fault(cut=150_000),
        Fault(cut=150_000, resets=True),
        HTML_PAGE,
        Fault(body=b""),
    ]
    hub.faults |= {name: [fault] for name, fault in zip(NAMES[1:7], faults, strict=True)}
    hub.faults["api"] = [Fault(status=503)]
    assert user.run("6").returncode == 0 and user.has(first(contents, 6))
    for name, fault in zip(NAMES[1:7], faults, strict=True):
        assert len(hub.transfers(name)) == 2, fault
    refused, repeated = hub.transfers(NAMES[2])
    assert repeated.time - refused.time >= 1


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_at_once_and_the_same_command_goes_on(hub, user, contents, sent):
    hub.faults |= {name: [SLOWLY] for name in NAMES if name != FIRST}
    process = user.start()
    wait_until(
        lambda: (user.folder / "part" / FIRST).exists() and len(user.incomplete()) == 8, process
    )
    process.send_signal(sent)
    err = process.communicate(timeout=60)[1]
    is_told = sent != signal.SIGKILL
    assert process.returncode == (128 + sent if is_told else -sent) and "Traceback" not in err
    assert err.endswith("\nstopped; the same command goes on where this one was\n") == is_told
    assert not list(user.folder.glob("*.bin"))
    hub.faults.clear()
    hub.faults[VAL] = [Fault(status=403)] * 9
    assert VAL in user.refused(script=("-c", IMPATIENT)) and not user.incomplete()
    hub.faults.clear()
    assert user.run().returncode == 0 and user.has(contents)
    assert len(hub.transfers(FIRST)) == 1


def test_bad_files_under_final_names_are_named_and_fetched_again(user, contents):
    user.put({VAL: b"", FIRST: HTML, SECOND: bytes(2 * TOKENS + 1024)})
    done = user.run("2")
    assert done.returncode == 0 and user.has(first(contents, 2))
    assert all(str(user.folder / name) in done.stderr for name in NAMES[:3])


def test_unsound_shards_never_get_their_name(hub, user, contents):
    hub.repos[REPO][VAL] = contents[VAL][:-2] + (50257).to_bytes(2, "little")
    sentence = user.refused("0")
    assert VAL in sentence and str(user.folder) in sentence and "token 50257" in sentence
    assert "--track" not in sentence
    hub.repos[REPO][VAL] = contents[VAL]
    hub.faults[VAL] = [Fault(body=bytes(TOKENS * 2 + 1024))]
    assert "sha256" in user.refused("1")
    assert not (user.folder / VAL).exists()
    assert user.run("1").returncode == 0 and user.has(first(contents, 1))
    assert len(hub.transfers(VAL)) == 3 and len(hub.transfers(FIRST)) == 1


def test_misuse_and_what_the_hub_does_not_have_are_named(hub, user):
    assert all(user.run(flag).returncode == 2 for flag in ("103", "-1", "--dryrun"))
    hub.unlisted.add(SECOND)
    for shards, word in (("10", "fineweb_train_000010.bin"), ("2", "404")):
        sentence = user.refused(shards, script=("-c", IMPATIENT))
        assert word in sentence and str(user.folder) in sentence
    hub.repos.clear()
    sentence = user.refused("0", script=("-c", IMPATIENT))
    assert REPO in sentence and "Repository Not Found" in sentence and VAL in sentence


def test_a_machine_without_network_is_told_what_to_bring_and_where(user, hub):
    hub.__exit__()
    sentence = user.refused("1", script=("-c", IMPATIENT))
    for word in ("cannot be reached", VAL, FIRST, str(user.folder), hub.endpoint):
        assert word in sentence
    assert not user.folder.exists()


def test_offline_mode_makes_no_request(hub, user, contents):
    user.environment["HF_HUB_OFFLINE"] = "1"
    sentence = user.refused("1")
    assert "HF_HUB_OFFLINE" in sentence and FIRST in sentence and str(user.folder) in sentence
    user.put(first(contents, 1))
    assert user.run("1").returncode == 0 and not hub.requests


def test_a_network_that_goes_away_or_a_proxy_in_its_place_is_named(hub, user, contents):
    for name, fault, word in (
        ("api", Fault(body=b"{}"), "proxy"),
        ("resolve", HTML_PAGE, hub.endpoint),
        (VAL, Fault(cut=1000, resets=True), "reset by peer"),
    ):
        hub.faults[name] = [fault] * 9
        sentence = user.refused("0", script=("-c", IMPATIENT))
        assert word in sentence and VAL in sentence and str(user.folder) in sentence
        hub.faults[name].clear()
    assert user.run("0").returncode == 0 and user.has(first(contents, 0))


def test_the_token_opens_the_hub_and_is_shown_to_nobody_else(hub, user, tmp_path):
    hub.token = "hf_secret"
    assert "private or gated" in user.refused("0")
    user.environment["HF_TOKEN"] = "hf_other"
    assert "gated" in user.refused("0")
    user.environment.pop("HF_TOKEN")
    (tmp_path / "hf").mkdir(exist_ok=True)
    (tmp_path / "hf" / "token").write_text("hf_secret\n")  # where `hf auth login` leaves it
    assert user.run("0").returncode == 0
    (sent,) = hub.transfers(VAL)
    assert sent.headers["Authorization"] is None


def test_shards_are_compared_with_the_hub_long_after_they_came(hub, user, contents):
    assert user.run("2").returncode == 0
    hub.__exit__()
    raw = bytearray(contents[FIRST])
    raw[5000] ^= 1  # still a shard of GPT-2 tokens
    user.put({FIRST: raw})
    code, _, errors = called(check_shards, user.folder / "*.bin")
    assert code == 1 and len(errors.splitlines()) == 1
    assert f"{user.folder / FIRST} has sha256" in errors


def test_a_full_disk_or_a_file_in_the_folder_s_place_is_named(user, tmp_path, contents):
    def limit():  # a write beyond it fails as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))

    sentence = user.refused("0", preexec_fn=limit)
    assert "File too large" in sentence and VAL in sentence and str(user.folder) in sentence
    assert user.run("0").returncode == 0 and user.has(first(contents, 0))
    user.folder = tmp_path / "a file" / "fineweb10B"
    user.folder.parent.write_text("")
    assert str(user.folder) in user.refused("0")


def test_a_second_download_to_the_same_folder_is_refused(hub, user):
    hub.faults[VAL] = [SLOWLY]
    process = user.start("0")
    wait_until(lambda: hub.transfers(VAL), process)
    assert "another process" in user.refused("0") and user.incomplete()
    process.kill()
    process.communicate()
    assert user.run("0").returncode == 0


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A checkout without data, whose requirements are met and whose training is quick."""
    root = tmp_path / "checkout"
    shutil.copytree(ROOT / "data", root / "data", ignore=lambda folder, names: DATA & {*names})
    shutil.copytree(ROOT / "referee", root / "referee")
    shutil.copy(ROOT / "run.sh", root)
    (root / "requirements.txt").touch()
    (root / "tools").mkdir(exist_ok=True)
    (root / "tools/requirements.txt").touch()
    (root / "train_gpt.py").write_text("print('training')")
    return root


def run_sh(user: User, checkout: Path, track: str) -> subprocess.Popen:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.Popen(
        [str(checkout / "run.sh"), "--track", track],
        env={**user.environment, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("track, name", [("fineweb", VAL), ("wikitext103", "bring gpt2.tiktoken")])
def test_run_sh_without_network_ends_with_one_sentence(user, hub, checkout, track, name):
    hub.__exit__()
    nowhere = {"https_proxy": "http://127.0.0.1:9", "TIKTOKEN_CACHE_DIR": str(checkout)}
    user.environment |= nowhere  # for the tokenizer, which is not the hub's
    done = finished(run_sh(user, checkout, track))
    assert done.returncode == 1 and done.stdout == ""
    (sentence,) = re.findall(r"^error: (.*)$", done.stderr, re.M)
    assert done.stderr.endswith(f"{sentence}\n") and name in sentence
    assert str(checkout / "data") in sentence


def test_run_sh_touches_no_network_for_shards_that_are_there(user, hub, checkout, contents):
    for name in NAMES:
        for folder, prefix in (("fineweb10B", "fineweb"), ("wikitext103", "wikitext103")):
            path = checkout / "data" / folder / name.replace("fineweb", prefix)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(contents[name])
    manifest = checkout / "data" / "wikitext103" / "manifest.json"
    manifest.write_text("{}")
    for track in ("fineweb", "wikitext103"):
        done = finished(run_sh(user, checkout, track))
        assert (done.returncode, done.stdout, done.stderr) == (0, "training\n", STARTING)
    assert not hub.requests
    manifest.unlink()  # as a run that was killed leaves it
    assert finished(run_sh(user, checkout, "wikitext103")).returncode == 1


def test_run_sh_does_not_train_when_its_download_is_interrupted(user, hub, checkout):
    hub.faults[VAL] = [SLOWLY]
    process = run_sh(user, checkout, "fineweb")
    wait_until(lambda: hub.transfers(VAL), process)
    os.killpg(process.pid, signal.SIGINT)  # as ctrl-C in a terminal does
    assert process.communicate(timeout=10)[0] == "" and process.returncode == 130
