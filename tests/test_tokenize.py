import base64
import contextlib
import gzip
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import documents
import gpt2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenize_text
from conftest import ROOT, clean_environment
from hub_server import HubServer
from shards import open_shard

START = 50256
MERGES = [b" t", b"he", b" a", b"in", b" the", b"er", b"on", b"\n\n", b"  ", b" w", b"or", b" wor"]
RANKS = {token: rank for rank, token in enumerate([bytes([b]) for b in range(256)] + MERGES)}
TEXT_OF_TOKEN = {rank: token for token, rank in RANKS.items()}
NO_HUB = {"HF_ENDPOINT": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}

ODD_TEXTS = [
    "The theory of the whole is in the parts.\n",
    "Windows line ends\r\nare kept\r\n",
    "emoji 🎉👩‍👩‍👧‍👦 and flags 🇩🇪",
    "汉字与假名:日本語の文章。한국어도",
    "NUL \0 bytes \0\0 inside",
    "<|endoftext|> is text here <|endoftext|>",
    "\ufeffa mark of byte order",
    "   blanks \u3000\xa0 of\u2028 every kind \t\n\n\n x  ",
    "combined: e\u0301 \U0010ffff \u200b",
]


@pytest.fixture(scope="session")
def rank_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("ranks") / "tiny.tiktoken"
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in RANKS.items()]
    path.write_bytes(b"".join(lines))
    return path


@pytest.fixture
def run(rank_file, tmp_path, monkeypatch, capsys):
    """Runs the script in this process; gives (exit code, stdout, stderr)."""

    def call(*flags, out: str = "out", workers: int = 1):
        given = [f"--out={tmp_path / out}", f"--workers={workers}", f"--tokenizer_file={rank_file}"]
        given += flags
        monkeypatch.setattr(sys, "argv", ["tokenize_text.py", *map(str, given)])
        try:
            code = tokenize_text.main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def start(flags: list, rank_file: Path, **options) -> subprocess.Popen:
    """The script as a process of its own, in a group of its own."""
    command = [sys.executable, ROOT / "data/tokenize_text.py", f"--tokenizer_file={rank_file}"]
    return subprocess.Popen(
        [*command, "--workers=2", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def texts_of(paths: list[Path]) -> list[str]:
    """Documents of shards that follow each other, decoded without tiktoken."""
    tokens = np.concatenate([open_shard(path) for path in sorted(paths)])
    assert tokens[0] == START
    parts = np.split(tokens, np.flatnonzero(tokens == START))[1:]
    return [b"".join(TEXT_OF_TOKEN[t] for t in part[1:].tolist()).decode() for part in parts]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def english(seed: int, count: int) -> list[str]:
    """Documents of 1 to 60 words."""
    rng, words = random.Random(seed), ["the", "theory", "wanders", "in", "words", "on", "and"]
    return [" ".join(rng.choices(words, k=rng.randint(1, 60))) for _ in range(count)]


def json_lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"id": 1, "text": text}).encode() + b"\n" for text in texts)


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(data)
    return sink.getvalue().to_pybytes()


def parquet(texts: list, column: str = "text") -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({column: texts, "id": range(len(texts))}), sink, row_group_size=50)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def corpus(tmp_path) -> Path:
    """400 English documents, a line each."""
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(json_lines(english(0, 400)))
    return path


# ------------------------------------------------------------------------------ Reading


def test_every_kind_of_file_comes_back_letter_for_letter(run, tmp_path):
    folder, kinds = tmp_path / "in", ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"]
    packers = [json_lines, lambda t: gzip.compress(json_lines(t)), lambda t: zstd(json_lines(t))]
    for name, pack in zip(kinds, [*packers, parquet], strict=True):
        (folder / name[0]).mkdir(parents=True)
        (folder / name[0] / name).write_bytes(pack([f"{name}: {text}" for text in ODD_TEXTS]))
    for number, text in enumerate(ODD_TEXTS):
        (folder / f"{number}.{'md' if number % 2 else 'TXT'}").write_bytes(text.encode())
    (folder / "photo.png").write_bytes(b"not text")
    code, printed, _ = run(folder, "--val_tokens=0", "--shard_tokens=400")
    assert code == 0 and len(printed.splitlines()) == 5
    texts = texts_of(list((tmp_path / "out").glob("text_train_*.bin")))
    expected = ODD_TEXTS + [f"{name}: {text}" for name in kinds for text in ODD_TEXTS]
    assert sorted(texts) == sorted(expected) and texts != expected


def test_standard_input_is_one_document(rank_file, tmp_path):
    text = "\n".join(english(1, 20_000))
    assert len(text) > 2 * documents.PIECE_CHARS
    process = start(["-", "--val_tokens=0", f"--out={tmp_path}"], rank_file, stdin=subprocess.PIPE)
    _, errors = process.communicate(text)
    assert process.returncode == 0, errors
    tokens = open_shard(tmp_path / "text_train_000001.bin").tolist()
    assert tokens == [START, *gpt2.encoding_of(RANKS).encode_ordinary(text)]


def test_pieces_give_the_tokens_of_the_whole_text(monkeypatch):
    monkeypatch.setattr(documents, "PIECE_CHARS", 12)
    encoding, rng, cut = gpt2.encoding_of(RANKS), random.Random(0), 0
    for _ in range(3000):
        text = "".join(rng.choices("ab1!'s  \n\r\t\xa0\u3000\x1c\x85é🎉", k=rng.randint(0, 60)))
        chunks = [text[i : i + 20] for i in range(0, len(text), 20)]
        parts = list(documents.pieces(chunks))
        assert "".join(parts) == text and all(len(part) <= 12 for part in parts)
        assert parts == list(documents.pieces([text]))  # however the text comes
        if all(len(part) < 12 for part in parts[:-1]):  # else there was no place to cut
            cut += len(parts) > 1
            tokens = [token for part in parts for token in encoding.encode_ordinary(part)]
            assert tokens == encoding.encode_ordinary(text)
    assert cut > 500


@pytest.mark.parametrize("unbroken", [" " * 1_000_001 + "x", "x" * 3_000_000, "\n\t" * 600_000])
def test_what_has_no_place_to_cut_decodes_to_itself(unbroken):
    encoding = gpt2.encoding_of(RANKS)
    tokens, skipped = gpt2.encode([("text", unbroken)], "text", encoding)
    assert not skipped and tokens[0] == START
    assert b"".join(TEXT_OF_TOKEN[t] for t in tokens[1:].tolist()).decode() == unbroken


def test_lines_that_are_too_long_are_left_out(monkeypatch):
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 10)
    text = b"short\n0123456789\n0123456789a\nafter\n\n" + 50 * b"x"
    for size in (1, 3, 7, 100):
        chunks = [text[i : i + size] for i in range(0, len(text), size)]
        assert list(documents.lines(chunks)) == [b"short", b"0123456789", None, b"after", b"", None]


def test_what_is_no_text_is_skipped_and_counted(run, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"bad \xff")
    (tmp_path / "b.txt").write_bytes(b"cut \xe2\x82")
    (tmp_path / "c.md").write_bytes(b"")
    odd_lines = [b"{", b'{"x": 1}', b'{"text": 7}', b"[1]", b'{"text": "\\ud800"}', b'{"text": ""}']
    odd_lines += [b'{"text": "\xff"}', b"", b'{"text": "good"}']
    (tmp_path / "d.jsonl").write_bytes(b"\n".join(odd_lines))
    table = pa.table({"text": pa.array([b"\xff", None, b"fine"], pa.binary())})
    pq.write_table(table, tmp_path / "e.parquet")
    code, _, errors = run(tmp_path, "--val_tokens=0")
    assert code == 0
    assert texts_of([tmp_path / "out/text_train_000001.bin"]) == ["good", "fine"]
    skipped = json.loads((tmp_path / "out/manifest.json").read_text())["skipped"]
    assert skipped == {"not UTF-8": 5, "empty": 4, "no JSON object with a text text": 4}
    assert "skipped 5 documents: not UTF-8" in errors


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a.jsonl.gz", truncated(gzip.compress(json_lines(english(0, 999)))), "bytes of text"),
        ("a.jsonl.gz", b"", "bytes of text"),
        ("a.jsonl.gz", b"<html>sign in</html>", "bytes of text"),
        ("a.jsonl.zst", truncated(zstd(json_lines(english(0, 999)))), "bytes of text"),
        ("a.parquet", truncated(parquet(english(0, 999))), "row 0"),
        ("a.parquet", b"", "row 0"),
        ("a.parquet", parquet(english(0, 9), "body"), "--text_column: body"),
        ("a.parquet", parquet([1, 2, 3]), "it has none"),
        ("a.csv", b"a,b", "no known kind"),
    ],
)
def test_damaged_input_is_named_and_nothing_is_written(run, tmp_path, name, data, message):
    (tmp_path / "b.txt").write_text("sound")
    (tmp_path / name).write_bytes(data)
    code, printed, errors = run(tmp_path / "b.txt", tmp_path / name, "--val_tokens=0")
    assert code == 1 and not printed and message in errors
    assert errors.startswith("error: ") and errors.count("\n") == 1 and name in errors
    assert not list(tmp_path.rglob("*.bin*")) and not list(tmp_path.rglob("manifest.json"))


def test_damage_inside_parquet_is_found(run, tmp_path):
    data = bytearray(parquet(english(0, 999)))
    data[len(data) // 3 : len(data) // 3 + 200] = bytes(200)
    (tmp_path / "a.parquet").write_bytes(data)
    code, _, errors = run(tmp_path / "a.parquet", "--val_tokens=0")
    assert code == 1 and "a.parquet is damaged after row" in errors
    assert not list(tmp_path.rglob("*.bin*"))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["nothing.txt"], "there is no nothing.txt"),
        (["*.none"], "there is no *.none"),
        (["EMPTY"], "holds no file"),
        (["SHORT", "--val_tokens=1000"], "none is left to train on"),
    ],
)
def test_no_text_is_an_error(run, tmp_path, flags, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.txt").write_text("short")
    places = {"EMPTY": tmp_path / "empty", "SHORT": tmp_path / "short.txt"}
    code, _, errors = run(*[places.get(flag, flag) for flag in flags])
    assert code == 1 and message in errors and errors.count("\n") == 1


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["x.txt", "--preset=wikitext103"],
        ["x.txt", "--shard_tokens=0"],
        ["x.txt", "--val_tokens=-1"],
        ["x.txt", "--workers=0"],
        ["--preset=wikitext103", "--val_tokens=5"],
    ],
)
def test_misuse_ends_with_2(run, flags):
    assert run(*flags)[0] == 2


# ------------------------------------------------------------------------------ Tokenizer


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda lines: [*lines, b"no rank"], "line 269 is not"),
        (lambda lines: [*lines, b"IQ== x"], "line 269 is not"),
        (lambda lines: [*lines, b"?YWJj 268"], "line 269 is not"),
        (lambda lines: lines[1:], "no token for some bytes"),
        (lambda lines: [*lines, base64.b64encode(b"abc") + b" 7"], "two tokens one rank"),
        (lambda lines: [*lines, base64.b64encode(b"abc") + b" 70000"], "rank 70000"),
        (lambda lines: [*lines, base64.b64encode(b"abc") + b" 50256"], "rank 50256"),
    ],
)
def test_unusable_tokenizer_files_are_named(rank_file, tmp_path, change, message):
    path = tmp_path / "bad.tiktoken"
    path.write_bytes(b"\n".join(change(rank_file.read_bytes().splitlines())))
    with pytest.raises(documents.TextError, match=message) as caught:
        gpt2.read_ranks(path)
    assert "bad.tiktoken" in str(caught.value)


@pytest.mark.parametrize("what, more", [("-", ""), ("--preset=wikitext103", "raw-v1/*.parquet")])
def test_without_network_the_tokenizer_to_bring_is_named(tmp_path, what, more):
    done = subprocess.run(
        [sys.executable, ROOT / "data/tokenize_text.py", what, f"--out={tmp_path / 'out'}"],
        env={**os.environ, **NO_HUB, "TIKTOKEN_CACHE_DIR": str(tmp_path)},
        input="text",
        capture_output=True,
        text=True,
    )
    if (ROOT / "data/gpt2.tiktoken").exists():
        pytest.skip("this checkout has the tokenizer's file")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "gpt2.tiktoken" in done.stderr and "--tokenizer_file" in done.stderr
    assert more in done.stderr


# ------------------------------------------------------------------------------ Shards


def test_the_number_of_workers_does_not_matter_and_the_seed_does(run, corpus, tmp_path):
    flags = [corpus, "--val_tokens=2000", "--shard_tokens=3000"]
    assert run(*flags, out="one")[0] == 0
    assert run(*flags, out="two", workers=2)[0] == 0
    assert run(*flags, "--seed=1", out="other")[0] == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    orders = [texts_of(list((tmp_path / o).glob("*_train_*"))) for o in ("one", "other")]
    assert orders[0] != orders[1]


def test_validation_is_exact_and_shares_no_document_with_training(run, tmp_path):
    texts = [f"{number}: {text}" for number, text in enumerate(english(0, 400))]
    (tmp_path / "in.jsonl").write_bytes(json_lines(texts))
    assert run(tmp_path / "in.jsonl", "--val_tokens=2000", "--shard_tokens=3000")[0] == 0
    val = tmp_path / "out/text_val_000000.bin"
    train = sorted((tmp_path / "out").glob("text_train_*.bin"))
    sizes = [len(open_shard(path)) for path in train]
    assert len(open_shard(val)) == 2000 and set(sizes[:-1]) == {3000} and 0 < sizes[-1] <= 3000
    *whole, cut = texts_of([val])
    (source,) = [text for text in texts if text.startswith(cut) and text not in whole]
    assert sorted([*whole, source, *texts_of(train)]) == sorted(texts)


def test_the_manifest_adds_up(run, corpus, tmp_path):
    import check_shards

    assert run(corpus, "--val_tokens=0", "--shard_tokens=3000")[0] == 0
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    texts = english(0, 400)
    assert manifest["documents"] == len(texts)
    assert manifest["bytes_of_text"] == sum(len(text.encode()) for text in texts)
    paths = sorted((tmp_path / "out").glob("*.bin"))
    assert manifest["tokens"] == sum(len(open_shard(path)) for path in paths)
    assert manifest["bytes_per_token"] == pytest.approx(
        manifest["bytes_of_text"] / manifest["tokens"], abs=1e-6
    )
    assert not check_shards.check_all(paths, START + 1, START).problems  # sha256 among them


def test_a_stream_is_the_documents_in_one_random_order(tmp_path):
    rng, spool = np.random.default_rng(0), tokenize_text.Spool(tmp_path / "spool")
    lengths = rng.integers(1, 30, 200)
    parts = [np.concatenate(([START], rng.integers(0, 256, n))).astype("<u2") for n in lengths]
    spool.tokens.write_bytes(b"".join(part.tobytes() for part in parts))
    spool.done["tokens"] = total = sum(map(len, parts))
    stream = tokenize_text.Stream(spool, seed=3)
    whole = stream.read(0, total)
    split = np.split(whole, np.flatnonzero(whole == START))[1:]
    assert Counter(p.tobytes() for p in split) == Counter(p.tobytes() for p in parts)
    assert [p.tobytes() for p in split] != [p.tobytes() for p in parts]
    for start, stop in rng.integers(0, total, (300, 2)):
        if start < stop:
            assert np.array_equal(stream.read(start, stop), whole[start:stop])
    assert np.array_equal(tokenize_text.Stream(spool, None).read(0, total), np.concatenate(parts))


# ------------------------------------------------------------------------------ Interruptions


def wait_until(is_true, process: subprocess.Popen | None) -> None:
    deadline = time.monotonic() + 60
    while not is_true():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Trickle:
    """A .jsonl that comes slowly through a pipe, and does not end before its reader does."""

    def __init__(self, path: Path, lines: bytes):
        os.mkfifo(path)
        self.path, self.lines, self.fed = path, lines, 0
        self.thread = threading.Thread(target=self.feed)
        self.thread.start()

    def feed(self) -> None:
        with contextlib.suppress(BrokenPipeError), self.path.open("wb", buffering=0) as file:
            while True:
                start = self.fed % len(self.lines)
                self.fed += file.write(self.lines[start : start + (1 << 16)])
                time.sleep(0.02)

    def replace_by_file(self) -> None:
        """What was fed and some more, as a file of the same name."""
        self.thread.join()
        self.path.unlink()
        self.path.write_bytes(self.lines * (self.fed // len(self.lines) + 2))


@pytest.fixture
def interrupted(rank_file, tmp_path):
    """(flags, trickle, process): a run that has saved some of its work, and is in the middle."""
    trickle = Trickle(tmp_path / "in.jsonl", json_lines(english(0, 5000)))
    flags = [tmp_path / "in.jsonl", "--val_tokens=5000", "--shard_tokens=200000"]
    process = start([*flags, f"--out={tmp_path / 'out'}"], rank_file)
    wait_until((tmp_path / "out" / "work/train/journal.json").exists, process)
    yield flags, trickle, process
    process.kill()
    process.communicate()
    trickle.thread.join()


def test_killed_while_tokenizing_it_goes_on_and_ends_the_same(run, interrupted, tmp_path):
    flags, trickle, process = interrupted
    workers = children(process.pid)
    assert len(workers) >= 2
    process.kill()
    process.wait()
    wait_until(lambda: not any(map(is_alive, workers)), None)
    trickle.replace_by_file()

    journal = json.loads((tmp_path / "out" / "work/train/journal.json").read_text())
    assert journal["batches"] > 0 and not journal["complete"]
    code, _, errors = run(*flags, "--seed=5")
    assert code == 1 and "seed: 0, now 5" in errors and str(tmp_path / "out/work") in errors
    data = trickle.path.read_bytes()
    trickle.path.write_bytes(data.replace(b"the", b"teh", 1))
    code, _, errors = run(*flags)
    assert code == 1 and "the input is not what it was" in errors
    trickle.path.write_bytes(data)

    assert run(*flags)[0] == 0
    assert run(*flags, out="undisturbed")[0] == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_it_in_one_line_and_lose_nothing(run, interrupted, tmp_path, number, code):
    flags, trickle, process = interrupted
    busy = run(*flags)
    assert busy[0] == 1 and "another process" in busy[2]
    os.killpg(process.pid, number)
    printed, errors = process.communicate(timeout=20)
    assert process.returncode == code and printed == "" and errors.count("\n") == 1, errors
    trickle.replace_by_file()

    # A mark in what is already tokenized stands in the result: so it was not tokenized again.
    tokens = np.memmap(tmp_path / "out" / "work/train/tokens", "<u2", mode="r+")
    tokens[1] = 0
    tokens.flush()
    assert run(*flags)[0] == 0
    shards = [open_shard(path) for path in (tmp_path / "out").glob("*.bin")]
    assert sum(np.count_nonzero(shard == 0) for shard in shards) == 1


def test_a_killed_worker_ends_the_run_with_advice(interrupted):
    _, _, process = interrupted
    for worker in children(process.pid):
        os.kill(worker, signal.SIGKILL)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1 and errors.count("\n") == 1, errors
    assert "fewer --workers" in errors


def test_killed_while_writing_shards_it_goes_on_and_ends_the_same(run, rank_file, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(json_lines(english(0, 8000)))
    flags = [tmp_path / "in.jsonl", "--val_tokens=5000", "--shard_tokens=3000"]
    out = tmp_path / "out"
    process = start([*flags, f"--out={out}"], rank_file)
    wait_until((out / "text_train_000009.bin").exists, process)
    process.kill()
    process.communicate()
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.bin")}
    assert not (out / "manifest.json").exists()

    assert run(*flags)[0] == 0
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert run(*flags, out="undisturbed")[0] == 0
    assert contents(out) == contents(tmp_path / "undisturbed") and len(before) >= 10


def test_a_full_disk_is_named_and_the_next_run_goes_on(run, rank_file, corpus, tmp_path):
    flags = [corpus, "--val_tokens=2000", "--shard_tokens=3000"]
    full = (20_000, 20_000)  # bytes a file; the tokens need more
    process = start(
        [*flags, f"--out={tmp_path / 'out'}"],
        rank_file,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, full),
    )
    _, errors = process.communicate()
    assert process.returncode == 1 and errors.count("\n") == 1, errors
    assert "File too large" in errors and str(tmp_path / "out") in errors
    assert not list((tmp_path / "out").glob("*.bin*"))
    assert run(*flags)[0] == 0
    assert run(*flags, out="undisturbed")[0] == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def test_a_finished_run_is_kept_and_never_mixed_with_another(run, corpus, tmp_path):
    flags = [corpus, "--val_tokens=0"]
    first = run(*flags)
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "out").iterdir()}
    assert first[0] == 0 and run(*flags) == first
    for other, message in ((["--seed=1"], "seed: 0, now 1"), (["--name=x"], "name: text, now x")):
        code, _, errors = run(*flags, *other)
        assert code == 1 and message in errors
    corpus.write_bytes(corpus.read_bytes() + json_lines(["more"]))
    code, _, errors = run(*flags)
    assert code == 1 and "'files': 1" in errors
    after = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "out").iterdir()}
    assert before == after
    (tmp_path / "out/manifest.json").unlink()
    code, _, errors = run(*flags)
    assert code == 1 and "text_train_000001.bin is there" in errors


# ------------------------------------------------------------------------------ Presets

FIRST = [
    "",
    " = Robert <unk> = \n",
    "",
    " He is an actor . \n",
    "",
    " = = Career = = \n",
    "",
    " Two lines : \n",
    " = not = \n",
]
SECOND = ["", " = Du Fu = \n", "", " Du Fu ( 杜甫 ) was a poet . \n"]
WIKITEXT = {
    "wikitext-103-raw-v1/train-00000-of-00002.parquet": parquet([*FIRST, *SECOND[:3]]),
    "wikitext-103-raw-v1/train-00001-of-00002.parquet": parquet([*SECOND[3:], *FIRST]),
    "wikitext-103-raw-v1/validation-00000-of-00001.parquet": parquet([*SECOND, *FIRST]),
    "wikitext-103-raw-v1/test-00000-of-00001.parquet": b"not asked for",
    "wikitext-2-raw-v1/train-00000-of-00001.parquet": b"not asked for",
}
ARTICLES = ["".join(FIRST), "".join(SECOND)]


def run_preset(name: str, folder: Path, rank_file: Path, **changes) -> tuple[int, str]:
    """Exit code and stderr; the presets write to FOLDER/NAME."""
    environment = clean_environment(HF_HOME=str(folder / "hf"), **changes)
    flags = [f"--preset={name}", f"--out={folder / name}"]
    process = start(flags, rank_file, env=environment)
    _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors, errors
    return process.returncode, errors


def test_wikitext103_comes_from_the_hub_as_articles(rank_file, tmp_path):
    with HubServer({"Salesforce/wikitext": WIKITEXT}) as hub:
        code, errors = run_preset("wikitext103", tmp_path, rank_file, HF_ENDPOINT=hub.endpoint)
    assert code == 0, errors
    out = tmp_path / "wikitext103"
    assert texts_of([out / "wikitext103_val_000000.bin"]) == ARTICLES[::-1]
    train = texts_of([out / "wikitext103_train_000001.bin"])
    assert sorted(train) == sorted([*ARTICLES, ARTICLES[0]])
    below = [p.relative_to(out / "parquet").as_posix() for p in (out / "parquet").rglob("*.*")]
    assert sorted(below) == sorted(list(WIKITEXT)[:3])
    assert run_preset("wikitext103", tmp_path, rank_file, **NO_HUB)[0] == 0


def test_openwebtext_takes_what_the_hub_converted(monkeypatch, run, tmp_path):
    import hub

    converted = {"plain_text/partial-train/0000.parquet": parquet(["one", "two"])}
    listed = {"main": {"subsets/train-0.tar": b""}, "refs/convert/parquet": converted}

    def list_files(repo, revision, *_):
        return [hub.RemoteFile(name, len(data), None) for name, data in listed[revision].items()]

    def download(repo, files, folder, revision, check):
        for file in files:
            (folder / file.name).parent.mkdir(parents=True)
            (folder / file.name).write_bytes(listed[revision][file.name])
            check(folder / file.name)
        return [folder / file.name for file in files]

    monkeypatch.setattr(hub, "list_files", list_files)
    monkeypatch.setattr(hub, "download", download)
    assert run("--preset=openwebtext", "--val_tokens=0")[0] == 0
    assert sorted(texts_of([tmp_path / "out/openwebtext_train_000001.bin"])) == ["one", "two"]


def test_without_network_presets_name_what_to_bring_and_take_it(rank_file, tmp_path):
    code, errors = run_preset("wikitext103", tmp_path, rank_file, **NO_HUB)
    folder = tmp_path / "wikitext103/parquet"
    assert code == 1 and errors.splitlines()[-1].startswith("error: ")
    assert "wikitext-103-raw-v1/*.parquet" in errors and str(folder) in errors

    for name in list(WIKITEXT)[1:3]:  # all but one
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(WIKITEXT[name])
    assert run_preset("wikitext103", tmp_path, rank_file, **NO_HUB)[0] == 1
    name = list(WIKITEXT)[0]
    (folder / Path(name).name).write_bytes(WIKITEXT[name])  # in the folder itself is as good
    assert run_preset("wikitext103", tmp_path, rank_file, **NO_HUB)[0] == 0
    assert len(texts_of([folder.parent / "wikitext103_train_000001.bin"])) == 3
