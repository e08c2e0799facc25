"""The FineWeb download as its user meets it, with the real client, from a hub that misbehaves."""

import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from conftest import ROOT, clean_environment
from hub_server import COMMIT, HTML, HTML_PAGE, Fault, HubServer

from data.hub import with_retries
from referee.shards import open_shard, write_shard

REPO = "kjj0/fineweb10B-gpt2"
TOKENS = 200_000
DATA = {"embedded", "fineweb10B", "wikitext103"}  # folders that may hold gigabytes
NAMES = ["fineweb_val_000000.bin", *(f"fineweb_train_{n:06d}.bin" for n in range(1, 10))]
VAL, FIRST, SECOND = NAMES[:3]
SCRIPT = str(ROOT / "data" / "cached_fineweb10B.py")
SLOWLY = Fault(bytes_per_s=400)  # longer than any test
IMPATIENT = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tools")!r}]
from data import cached_fineweb10B, hub
hub.WAITS_S = (0.01, 0.01)
sys.exit(cached_fineweb10B.main())
"""


@pytest.fixture(scope="module")
def contents(tmp_path_factory) -> dict[str, bytes]:
    """Ten small shards, by name."""
    folder, rng = tmp_path_factory.mktemp("published"), np.random.default_rng(0)
    for name in NAMES:
        write_shard(folder / name, rng.integers(0, 50257, TOKENS, dtype=np.uint16))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(contents):
    with HubServer({REPO: dict(contents)}) as server:
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
        process = self.start(*flags, **options)
        out, err = process.communicate(timeout=90)
        assert "Traceback" not in err, err
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def refused(self, *flags, **options) -> str:
        """Run; return the one sentence that it ends with."""
        done = self.run(*flags, **options)
        assert done.returncode == 1, done
        (sentence,) = re.findall(r"^error: (.*)$", done.stderr, re.M)
        assert done.stderr.endswith(f"{sentence}\n")
        return sentence

    def has(self, contents: dict[str, bytes]) -> bool:
        """Are these files there, and nothing else, not even a folder?"""
        return {p.name: p.read_bytes() for p in self.folder.iterdir()} == contents

    def put(self, contents: dict[str, bytes]) -> None:
        self.folder.mkdir(exist_ok=True)
        for name, content in contents.items():
            (self.folder / name).write_bytes(content)

    def left_over(self) -> list[Path]:
        """Files that a download has left under names that are not their own."""
        return list((self.folder / "part").rglob("*.incomplete"))


def first(contents: dict[str, bytes], train_shards: int) -> dict[str, bytes]:
    return {name: contents[name] for name in NAMES[: train_shards + 1]}


def wait_until(condition, process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def test_shards_arrive_whole_validation_first_and_are_not_fetched_twice(hub, user, contents):
    done = user.run()  # as many as the fineweb track needs
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert user.has(contents)
    assert len(open_shard(user.folder / SECOND)) == TOKENS
    resolved = [r.path.rpartition("/")[2] for r in hub.requests if "/resolve/" in r.path]
    assert {*resolved} == {*contents}
    assert VAL in list(dict.fromkeys(resolved))[:9]  # 8 at a time, in no sure order
    assert all(len(hub.transfers(name)) == 1 for name in NAMES)
    hub.requests.clear()
    assert user.run().returncode == 0 and not hub.requests


def test_what_passes_is_tried_again(hub, user, contents):
    cases = [
        (Fault(status=500), "500"),
        (Fault(status=503), "503"),
        (Fault(status=429, headers={"Retry-After": "1"}), "429"),
        (Fault(cut=0), "closed"),
        (Fault(cut=150_000), "closed"),
        (Fault(cut=150_000, resets=True), "reset"),
        (HTML_PAGE, f"has size {len(HTML)}"),
        (Fault(body=b""), "has size 0"),
        (Fault(body=bytes(TOKENS * 2 + 1024)), "sha256"),
    ]
    hub.faults |= {name: [fault] for name, (fault, _) in zip(NAMES[1:], cases, strict=True)}
    done = user.run("9")
    assert done.returncode == 0 and user.has(contents)
    for name, (fault, word) in zip(NAMES[1:], cases, strict=True):
        assert len(hub.transfers(name)) == 2, fault
        assert re.search(rf"{name}.*{word}|{word}.*{name}", done.stderr), fault
    refused, repeated = hub.transfers(NAMES[3])
    assert repeated.time - refused.time >= 1


def test_a_killed_download_leaves_nothing_behind_and_keeps_what_was_complete(hub, user, contents):
    hub.faults[VAL] = [SLOWLY]
    process = user.start("1")
    wait_until(lambda: hub.transfers(VAL) and (user.folder / FIRST).exists(), process)
    process.kill()
    process.communicate()
    assert user.left_over() and not (user.folder / VAL).exists()
    hub.unlisted.add(VAL)
    assert "404" in user.refused("1") and not user.left_over()
    hub.unlisted.clear()
    assert user.run("1").returncode == 0 and user.has(first(contents, 1))
    assert len(hub.transfers(VAL)) == 2 and len(hub.transfers(FIRST)) == 1
    (user.folder / "part").mkdir()  # as of a run for more shards
    assert user.run("1").returncode == 0 and user.has(first(contents, 1))


@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_signals_end_it_at_once_and_the_same_command_goes_on(hub, user, contents, sent, code):
    hub.faults |= {name: [SLOWLY] for name in NAMES if name != FIRST}
    process = user.start()
    wait_until(lambda: (user.folder / FIRST).exists() and len(user.left_over()) == 8, process)
    process.send_signal(sent)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == code and "Traceback" not in err
    assert err == ("stopped; the same command goes on where this one was\n" if code > 0 else "")
    hub.faults.clear()
    assert user.run().returncode == 0 and user.has(contents)
    assert len(hub.transfers(FIRST)) == 1


def test_what_is_cut_off_by_the_end_is_not_tried_again(capsys):
    def cut_off():
        raise ConnectionError("Bad file descriptor")

    ended = Event()
    ended.set()
    with pytest.raises(ConnectionError):
        with_retries("a shard", cut_off, ended)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("damaged", [False, True])
def test_a_copy_in_the_hubs_cache_is_used_if_it_is_sound(hub, user, contents, tmp_path, damaged):
    repo = tmp_path / "hf" / "hub" / f"datasets--{REPO.replace('/', '--')}"
    (repo / "snapshots" / COMMIT).mkdir(parents=True)
    (repo / "snapshots" / COMMIT / VAL).write_bytes(contents[FIRST if damaged else VAL])
    done = user.run("0")
    assert done.returncode == 0 and user.has(first(contents, 0))
    assert len(hub.transfers(VAL)) == damaged and ("sha256" in done.stderr) == damaged


def test_progress_is_shown_at_a_terminal(user):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    process = user.start("2", stderr=theirs)
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # so Linux says that nobody writes any more
        while chunk := os.read(ours, 1000):
            shown += chunk
    os.close(ours)
    assert process.communicate()[0] == "" and process.returncode == 0
    assert b"100%" in shown and b"3 of 3 files" in shown and b".bin" not in shown


def test_bad_files_under_final_names_are_named_and_fetched_again(user, contents):
    user.put({VAL: b"", FIRST: HTML, SECOND: bytes(2 * TOKENS + 1024)})
    done = user.run("2")
    assert done.returncode == 0 and user.has(first(contents, 2))
    assert all(str(user.folder / name) in done.stderr for name in NAMES[:3])


def test_other_files_keep_their_folders_and_follow_the_hub(hub, user, tmp_path):
    hub.repos["a/b"] = {"x/1.txt": b"one", "y/1.txt": b"one", "y/2.txt": b"two", "z.txt": b"z"}
    program = (
        "import sys; from pathlib import Path; from data.hub import download, list_files;"
        "print(*download('a/b', list_files('a/b', prefix='y/')[::-1], Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", program, tmp_path / "out"]
    environment = user.environment | {"PYTHONPATH": str(ROOT)}
    for _ in range(2):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        paths = [tmp_path / "out" / name for name in ("y/2.txt", "y/1.txt")]
        assert done.stdout.split() == list(map(str, paths))
        assert [path.read_bytes() for path in paths] == [hub.repos["a/b"]["y/2.txt"], b"one"]
        hub.repos["a/b"]["y/2.txt"] = b"two, longer"  # as after a new commit
    assert len(hub.transfers("y/1.txt")) == 1


def test_bad_bytes_from_the_hub_never_get_the_name(hub, user, contents):
    hub.wrong_sha256.add(VAL)
    sentence = user.refused("1", script=("-c", IMPATIENT))
    assert "sha256" in sentence and str(user.folder / VAL) in sentence
    assert len(hub.transfers(VAL)) == 3 and not (user.folder / VAL).exists()
    hub.wrong_sha256.clear()
    assert user.run("1").returncode == 0 and user.has(first(contents, 1))


def test_tokens_that_are_not_gpt2s_never_get_the_name(hub, user, contents):
    hub.repos[REPO][VAL] = contents[VAL][:-2] + (50257).to_bytes(2, "little")
    sentence = user.refused("0", script=("-c", IMPATIENT))
    assert str(user.folder / VAL) in sentence and "token 50257" in sentence
    assert "--track" not in sentence and not (user.folder / VAL).exists()


@pytest.mark.parametrize(
    "flags, word",
    [
        (["2", "--revision=v9"], "v9"),
        (["10"], "fineweb_train_000010.bin"),
        (["2"], "404"),
    ],
    ids=["revision", "unlisted", "404"],
)
def test_what_the_hub_does_not_have_is_named_at_once(hub, user, flags, word):
    hub.unlisted.add(SECOND)
    sentence = user.refused(*flags)
    assert word in sentence and str(user.folder) in sentence
    assert len([r for r in hub.requests if r.path.endswith(SECOND)]) <= 1


def test_a_revision_is_asked_for_everywhere(hub, user, contents):
    assert user.run("0", f"--revision={COMMIT}").returncode == 0
    asked = [r.path for r in hub.requests if REPO in r.path and "/storage/" not in r.path]
    assert len(asked) == 3 and all(COMMIT in path for path in asked)


def test_a_wrong_repository_is_named(hub, user):
    hub.repos.clear()
    sentence = user.refused("0")
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
    hub.faults["resolve"] = [HTML_PAGE] * 9
    sentence = user.refused("0", script=("-c", IMPATIENT))
    assert hub.endpoint in sentence and str(user.folder / VAL) in sentence
    hub.faults["resolve"].clear()
    hub.faults[VAL] = [Fault(cut=1000, resets=True)] * 9
    sentence = user.refused("0", script=("-c", IMPATIENT))
    assert "reset by peer" in sentence and str(user.folder / VAL) in sentence
    hub.faults[VAL].clear()
    assert user.run("0").returncode == 0 and user.has(first(contents, 0))


def test_an_api_that_fails_for_good_is_named(hub, user):
    hub.faults["api"] = [Fault(status=503), HTML_PAGE, Fault(body=b"{}")]
    sentence = user.refused("0", script=("-c", IMPATIENT))
    assert "proxy" in sentence and VAL in sentence and str(user.folder) in sentence


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


def test_check_reads_everything_and_names_what_is_not_as_on_the_hub(hub, user, contents):
    user.put(first(contents, 2))
    done = user.run("--check")
    assert done.returncode == 0 and "3 shards have been compared with the hub's" in done.stdout
    raw = bytearray(contents[FIRST])
    raw[5000] ^= 1  # still a shard of GPT-2 tokens
    user.put({FIRST: raw})
    assert str(user.folder / FIRST) in user.refused("--check")
    user.put({SECOND: contents[SECOND][:-2]})
    user.environment["HF_HUB_OFFLINE"] = "1"
    done = user.run("--check")
    assert done.returncode == 1 and "compared" not in done.stdout
    assert "truncated" in done.stderr and "HF_HUB_OFFLINE" in done.stderr
    shutil.rmtree(user.folder)
    assert "./run.sh data/cached_fineweb10B.py" in user.refused("--check")
    assert not hub.transfers(VAL)


def test_a_full_disk_ends_it_and_keeps_what_was_complete(hub, user, contents):
    def limit():  # a write beyond it fails as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))

    sentence = user.refused("0", preexec_fn=limit)
    assert "make room" in sentence and VAL in sentence and str(user.folder) in sentence
    assert len(hub.transfers(VAL)) == 1
    assert user.run("0").returncode == 0 and user.has(first(contents, 0))


def test_a_folder_that_cannot_be_written_is_named(hub, user, tmp_path):
    user.folder = tmp_path / "a file" / "fineweb10B"
    user.folder.parent.write_text("")
    assert str(user.folder) in user.refused("0")


def test_too_little_space_is_said_before_anything_is_fetched(hub, user):
    hub.claimed_size[VAL] = 10**18
    sentence = user.refused("0")
    assert "1,000,000,000,000,000,000" in sentence and "free" in sentence
    assert not hub.transfers(VAL)


def test_a_second_download_to_the_same_folder_is_refused(hub, user):
    hub.faults[VAL] = [SLOWLY]
    process = user.start("0")
    wait_until(lambda: hub.transfers(VAL), process)
    assert "another process" in user.refused("0") and user.left_over()
    process.kill()
    process.communicate()
    assert user.run("0").returncode == 0


def test_the_dry_run_says_what_a_download_would_do_and_writes_nothing(hub, user, contents):
    size = len(contents[VAL])
    for there, missing in ((0, 3), (2, 1)):
        if there:
            user.put(first(contents, 1))
        done = user.run("2", "--dry-run")
        assert done.returncode == 0 and not hub.transfers(VAL)
        assert done.stdout.count("bytes to fetch\n") == missing
        assert f"\n{missing * size:,} bytes to fetch to " in done.stdout


@pytest.mark.parametrize("flags", [["103"], ["-1"], ["--dryrun"]])
def test_misuse_is_refused(user, flags):
    assert user.run(*flags).returncode == 2


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A checkout without data, whose requirements are met and whose training is quick."""
    root = tmp_path / "checkout"
    shutil.copytree(ROOT / "data", root / "data", ignore=lambda folder, names: DATA & {*names})
    shutil.copytree(ROOT / "referee", root / "referee")
    shutil.copy(ROOT / "run.sh", root)
    (root / "requirements.txt").touch()
    (root / "train_gpt.py").write_text("print('training')")
    return root


def start_run_sh(user: User, checkout: Path, track: str) -> subprocess.Popen:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.Popen(
        [str(checkout / "run.sh"), "--track", track],
        env={**user.environment, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run_sh(user: User, checkout: Path, track: str) -> subprocess.CompletedProcess:
    process = start_run_sh(user, checkout, track)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.mark.parametrize("track, name", [("fineweb", VAL), ("wikitext103", "tiktoken")])
def test_run_sh_without_network_ends_with_one_sentence(user, hub, checkout, track, name):
    hub.__exit__()
    done = run_sh(user, checkout, track)
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
        done = run_sh(user, checkout, track)
        assert (done.returncode, done.stdout, done.stderr) == (0, "training\n", "")
    assert not hub.requests
    manifest.unlink()  # as a run that was killed leaves it
    assert run_sh(user, checkout, "wikitext103").returncode == 1


def test_run_sh_does_not_train_when_its_download_is_interrupted(user, hub, checkout):
    hub.faults[VAL] = [SLOWLY]
    process = start_run_sh(user, checkout, "fineweb")
    wait_until(lambda: hub.transfers(VAL), process)
    os.killpg(process.pid, signal.SIGINT)  # as ctrl-C in a terminal does
    assert process.communicate(timeout=10)[0] == "" and process.returncode == 130
