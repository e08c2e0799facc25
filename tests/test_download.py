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
from conftest import ROOT, clean_environment
from hub_server import COMMIT, HTML, HTML_PAGE, Fault, HubServer

from data.shards import open_shard, write_shard

REPO = "kjj0/fineweb10B-gpt2"
TOKENS = 200_000
DATA = {"embedded", "fineweb10B", "wikitext103"}  # folders that may hold gigabytes
NAMES = ["fineweb_val_000000.bin", *(f"fineweb_train_{n:06d}.bin" for n in range(1, 10))]
VAL, FIRST, SECOND = NAMES[:3]


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

    def start(self, *flags, **options) -> subprocess.Popen:
        script = str(ROOT / "data" / "cached_fineweb10B.py")
        return subprocess.Popen(
            [sys.executable, script, *flags, f"--out={self.folder}"],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

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

    def grown(self, name: str) -> int:
        """Bytes of the file that are there, under a name that is not its own."""
        return sum(p.stat().st_size for p in self.folder.glob(f"part/{name}.*"))


def first(contents: dict[str, bytes], train_shards: int) -> dict[str, bytes]:
    return {name: contents[name] for name in NAMES[: train_shards + 1]}


def test_shards_arrive_whole_validation_first_and_are_not_fetched_twice(hub, user, contents):
    done = user.run()  # as many as the fineweb track needs
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert user.has(contents)
    assert len(open_shard(user.folder / SECOND)) == TOKENS
    resolved = [r.path.rpartition("/")[2] for r in hub.requests if "/resolve/" in r.path]
    assert sorted(resolved) == sorted(contents) and VAL in resolved[:8]  # of 8 at a time
    hub.requests.clear()
    assert user.run().returncode == 0 and not hub.requests


def test_what_passes_is_named_and_tried_again(hub, user, contents):
    cases = [
        (Fault(status=500), "500", None),
        (Fault(status=503), "503", None),
        (Fault(status=429, headers={"Retry-After": "1"}), "429", None),
        (Fault(cut=0), "broke", None),
        (Fault(cut=150_000), "broke", "bytes=150000-"),
        (Fault(length=2_000_000), "2,000,000 bytes", None),
        (HTML_PAGE, "text/html", None),
        (Fault(body=b""), "0 bytes", None),
        (Fault(body=bytes(TOKENS * 2 + 1024)), "sha256", None),
    ]
    hub.faults |= {name: [fault] for name, (fault, _, _) in zip(NAMES[1:], cases, strict=True)}
    done = user.run("9")
    assert done.returncode == 0 and user.has(contents)
    lines = {line.partition(":")[0].partition(" ")[0]: line for line in done.stderr.splitlines()}
    assert len(lines) == len(cases)
    for name, (fault, word, range_then) in zip(NAMES[1:], cases, strict=True):
        assert word in lines[name] and "again" in lines[name]
        assert hub.ranges(name) == [None, range_then], fault
    failed, repeated = hub.transfers(NAMES[3])
    assert repeated.time - failed.time >= 1 and "again in 1.0 s" in lines[NAMES[3]]


def test_nothing_false_is_appended_to_what_came(hub, user, contents):
    hub.faults[VAL] = [Fault(cut=100_000), HTML_PAGE, Fault(cut=50_000)]
    hub.faults[FIRST] = [Fault(cut=100_000), *[Fault(ignores_range=True)] * 6]
    assert user.run("1").returncode == 0 and user.has(first(contents, 1))
    assert hub.ranges(VAL) == [None, "bytes=100000-", "bytes=100000-", "bytes=150000-"]
    assert len(hub.transfers(FIRST)) == 2


def test_a_killed_download_goes_on_where_it_was(hub, user, contents):
    hub.faults[VAL] = [Fault(bytes_per_s=50_000)]
    process = user.start("1")
    while user.grown(VAL) < 20_000 or not (user.folder / FIRST).exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.kill()
    process.wait()
    had = user.grown(VAL)
    assert 20_000 <= had < len(contents[VAL]) and not (user.folder / VAL).exists()
    assert user.run("1").returncode == 0 and user.has(first(contents, 1))
    assert hub.ranges(VAL) == [None, f"bytes={had}-"] and hub.ranges(FIRST) == [None]


@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_signals_end_it_at_once_and_keep_what_came(hub, user, sent, code):
    hub.faults[VAL] = [Fault(bytes_per_s=100_000)]
    process = user.start("0")
    while user.grown(VAL) < 20_000:
        time.sleep(0.01)
    process.send_signal(sent)
    assert "Traceback" not in process.communicate(timeout=5)[1]
    assert process.returncode == code and user.grown(VAL) >= 20_000


def test_what_grew_from_other_contents_is_not_continued(hub, user, contents):
    hub.faults[VAL] = [Fault(cut=100_000), Fault(status=404)]
    assert "404" in user.refused("0")
    hub.repos[REPO][VAL] = contents[FIRST]
    assert user.run("0").returncode == 0
    assert (user.folder / VAL).read_bytes() == contents[FIRST]
    assert hub.ranges(VAL) == [None, "bytes=100000-", None]


def test_bad_files_under_final_names_are_named_and_fetched_again(user, contents):
    user.put({VAL: b"", FIRST: HTML, SECOND: bytes(2 * TOKENS + 1024)})
    done = user.run("2")
    assert done.returncode == 0 and user.has(first(contents, 2))
    assert all(str(user.folder / name) in done.stderr for name in NAMES[:3])


def test_other_files_keep_their_folders_and_follow_the_hub(hub, user, tmp_path):
    hub.repos["a/b"] = {"x/1.txt": b"one", "y/1.txt": b"one", "y/2.txt": b"two", "z.txt": b"z"}
    script = (
        "import sys; from pathlib import Path; from hub import download, list_files;"
        "print(*download('a/b', list_files('a/b', prefix='y/')[::-1], Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", script, tmp_path / "out"]
    environment = user.environment | {"PYTHONPATH": str(ROOT / "data")}
    for _ in range(2):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        paths = [tmp_path / "out" / name for name in ("y/2.txt", "y/1.txt")]
        assert done.stdout.split() == list(map(str, paths))
        assert [path.read_bytes() for path in paths] == [hub.repos["a/b"]["y/2.txt"], b"one"]
        hub.repos["a/b"]["y/2.txt"] = b"two, longer"  # as after a new commit
    assert str(paths[0]) in done.stderr and len(hub.transfers("y/1.txt")) == 1


def test_bad_bytes_from_the_hub_never_get_the_name(hub, user):
    hub.wrong_sha256.add(VAL)
    sentence = user.refused("1")
    assert VAL in sentence and "sha256" in sentence and len(hub.transfers(VAL)) == 3
    assert not (user.folder / VAL).exists() and not user.grown(VAL)


def test_tokens_that_are_not_gpt2s_never_get_the_name(hub, user, contents):
    hub.repos[REPO][VAL] = contents[VAL][:-2] + (50257).to_bytes(2, "little")
    sentence = user.refused("0")
    assert VAL in sentence and "token 50257" in sentence and not (user.folder / VAL).exists()


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
    assert len(asked) == 2 and all(COMMIT in path for path in asked)


def test_a_wrong_repository_is_named(hub, user):
    hub.repos.clear()
    sentence = user.refused("0")
    assert REPO in sentence and "HF_TOKEN" in sentence and VAL in sentence


def test_a_machine_without_network_is_told_what_to_bring_and_where(user, hub):
    hub.__exit__()
    sentence = user.refused("1")
    for word in ("cannot be reached", VAL, FIRST, str(user.folder), hub.endpoint):
        assert word in sentence
    assert not user.folder.exists()


def test_offline_mode_makes_no_request(hub, user, contents):
    user.environment["HF_HUB_OFFLINE"] = "1"
    sentence = user.refused("1")
    assert "HF_HUB_OFFLINE" in sentence and FIRST in sentence and str(user.folder) in sentence
    user.put(first(contents, 1))
    assert user.run("1").returncode == 0 and not hub.requests


def test_an_api_that_fails_for_good_is_named(hub, user):
    hub.faults["api"] = [Fault(status=503), HTML_PAGE, Fault(body=b"{}")]
    sentence = user.refused("0")
    assert "proxy" in sentence and VAL in sentence and str(user.folder) in sentence


def test_the_token_opens_the_hub_and_is_shown_to_nobody_else(hub, user, tmp_path):
    hub.token = "hf_secret"
    assert "HF_TOKEN" in user.refused("0")
    user.environment["HF_TOKEN"] = "hf_other"
    assert "gated" in user.refused("0")
    user.environment.pop("HF_TOKEN")
    (tmp_path / "hf").mkdir(exist_ok=True)
    (tmp_path / "hf" / "token").write_text("hf_secret\n")  # where `hf auth login` leaves it
    assert user.run("0").returncode == 0
    (sent,) = hub.transfers(VAL)
    assert sent.headers["Authorization"] is None


def test_the_dry_run_says_what_a_download_would_do_and_writes_nothing(hub, user, contents):
    done = user.run("2", "--dry-run")
    assert done.returncode == 0 and not user.folder.exists() and not hub.transfers(VAL)
    size = len(contents[VAL])
    assert f"3 files, 3 to fetch: {3 * size:,} bytes" in done.stdout and "free" in done.stdout
    user.put(first(contents, 1))
    lines = user.run("2", "--dry-run").stdout.splitlines()
    assert [line.split()[-1] for line in lines[:3]] == ["there", "there", "fetch"]
    assert f"1 to fetch: {size:,} bytes" in lines[3] and user.has(first(contents, 1))


def test_check_reads_everything_and_names_what_is_not_as_on_the_hub(hub, user, contents):
    user.put(first(contents, 2))
    done = user.run("--check")
    assert done.returncode == 0 and done.stdout.count("as on the hub") == 3
    raw = bytearray(contents[FIRST])
    raw[5000] ^= 1  # still a shard of GPT-2 tokens
    user.put({FIRST: raw})
    assert FIRST in user.refused("--check")
    user.put({SECOND: contents[SECOND][:-2]})
    user.environment["HF_HUB_OFFLINE"] = "1"
    done = user.run("--check")
    assert done.returncode == 1 and done.stdout.count("not compared") == 2
    assert "truncated" in done.stderr and "HF_HUB_OFFLINE" in done.stderr


def test_a_full_disk_ends_it_with_numbers_and_keeps_what_came(hub, user, contents):
    def limit():  # a write beyond it fails as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))

    sentence = user.refused("0", preexec_fn=limit)
    assert "full" in sentence and f"{len(contents[VAL]) - 150_000:,} bytes" in sentence
    assert user.grown(VAL) == 150_000 and len(hub.transfers(VAL)) == 1
    assert user.run("0").returncode == 0 and user.has(first(contents, 0))
    assert hub.ranges(VAL)[-1] == "bytes=150000-"


def test_too_little_space_is_said_before_anything_is_fetched(hub, user):
    hub.claimed_size[VAL] = 10**18
    sentence = user.refused("0")
    assert "1,000,000,000,000,000,000" in sentence and "free" in sentence
    assert not hub.transfers(VAL)


def test_a_second_download_to_the_same_folder_is_refused(hub, user):
    hub.faults[VAL] = [Fault(bytes_per_s=100_000)]
    process = user.start("0")
    while user.grown(VAL) < 20_000:
        time.sleep(0.01)
    assert "another process" in user.refused("0")
    process.kill()
    process.communicate()


@pytest.mark.parametrize("flags", [["103"], ["--check", "--dry-run"]])
def test_misuse_is_refused(user, flags):
    assert user.run(*flags).returncode == 2


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A checkout without data, whose requirements are met and whose training is quick."""
    root = tmp_path / "checkout"
    shutil.copytree(ROOT / "data", root / "data", ignore=lambda folder, names: DATA & {*names})
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
    for track in ("fineweb", "wikitext103"):
        done = run_sh(user, checkout, track)
        assert (done.returncode, done.stdout, done.stderr) == (0, "training\n", "")
    assert not hub.requests
    (checkout / "data" / "wikitext103" / "work").mkdir()  # left by a run that was killed
    assert run_sh(user, checkout, "wikitext103").returncode == 1


def test_run_sh_does_not_train_when_its_download_is_interrupted(user, hub, checkout):
    hub.faults[VAL] = [Fault(bytes_per_s=50_000)]
    user.folder = checkout / "data" / "fineweb10B"
    process = start_run_sh(user, checkout, "fineweb")
    while user.grown(VAL) < 10_000:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as ctrl-C in a terminal does
    assert process.communicate(timeout=10)[0] == "" and process.returncode == 130


def test_the_hub_of_these_tests_satisfies_the_clients_own_download(hub, user, contents, tmp_path):
    script = (
        "import sys; from huggingface_hub import HfApi, hf_hub_download as get; repo = sys.argv[1];"
        "files = list(HfApi().list_repo_tree(repo, repo_type='dataset'));"
        "[get(repo, f.path, repo_type='dataset', local_dir=sys.argv[2]) for f in files]"
    )
    out = tmp_path / "out"
    subprocess.run([sys.executable, "-c", script, REPO, out], env=user.environment, check=True)
    assert {name: (out / name).read_bytes() for name in contents} == contents
