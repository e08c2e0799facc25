import base64
import gzip
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, called

from data import check_shards, documents, gpt2, tokenize_text
from referee.files import whole
from referee.harness import parse_flags
from referee.ranks import Runtime
from referee.shards import open_shard, write_shard
from referee.task import check_shards as check_shards_of
from referee.validation import Validation
from train_gpt import TRACKS, check_supply

START = 50256
MERGES = [b" t", b"he", b" a", b"in", b" the", b"er", b"on", b"\n\n", b"  ", b" w", b"or", b" wor"]
RANKS = {token: rank for rank, token in enumerate([bytes([b]) for b in range(256)] + MERGES)}
TEXT_OF_TOKEN = {rank: token for token, rank in RANKS.items()}

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
def run(rank_file, tmp_path, monkeypatch):
    """Runs the script in this process, in small batches; gives (exit code, stdout, stderr)."""

    def call(*flags, out: str = "out", workers: int = 1):
        given = [f"--out={tmp_path / out}", f"--workers={workers}", f"--tokenizer_file={rank_file}"]
        return called(tokenize_text, *given, *flags)

    monkeypatch.setattr(gpt2, "BATCH_CHARS", 1000)
    return call


def texts_of(paths: list[Path]) -> list[str]:
    """Documents of shards that follow each other, decoded without tiktoken."""
    tokens = np.concatenate([open_shard(path) for path in sorted(paths)])
    assert tokens[0] == START
    parts = np.split(tokens, np.flatnonzero(tokens == START))[1:]
    return [b"".join(TEXT_OF_TOKEN[t] for t in part[1:].tolist()).decode() for part in parts]


def train_shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*_train_*.bin"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def english(seed: int, count: int) -> list[str]:
    """Documents of 1 to 60 words, no two alike."""
    rng, words = random.Random(seed), ["the", "theory", "wanders", "in", "words", "on", "and"]
    return [
        f"{seed} {n} " + " ".join(rng.choices(words, k=rng.randint(1, 60))) for n in range(count)
    ]


def json_lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"id": 1, "text": text}).encode() + b"\n" for text in texts)


def gzipped(texts: list[str]) -> bytes:
    return gzip.compress(json_lines(texts))


def zstd(texts: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(json_lines(texts))
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
    folder, expected = tmp_path / "in", []
    packers = ("a.jsonl", json_lines), ("b.jsonl.gz", gzipped), ("c.jsonl.zst", zstd)
    for name, pack in (*packers, ("d.parquet", parquet), ("e.json.gz", gzipped)):
        texts = [f"{name}: {text}" for text in ODD_TEXTS]
        (folder / name[0]).mkdir(parents=True)
        (folder / name[0] / name).write_bytes(pack(texts))
        expected += texts
    for number, text in enumerate(ODD_TEXTS):
        (folder / f"e{number}.{'md' if number % 2 else 'TXT'}").write_bytes(text.encode())
    for number in range(len(ODD_TEXTS)):
        (folder / f"photo{number}.png").write_bytes(b"not text")
    (folder / "a/.ipynb_checkpoints").mkdir()
    for name in ("a/.ipynb_checkpoints/e-checkpoint.md", "._e0.txt"):
        (folder / name).write_bytes(b"not the author's")
    (folder / "gone.txt").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "folder.txt").mkdir()
    code, printed, errors = run(folder, "--val_tokens=0", "--shard_tokens=400")
    assert code == 0 and len(printed.splitlines()) == 6
    assert errors == (
        "files: 1 .json.gz, 1 .jsonl, 1 .jsonl.gz, 1 .jsonl.zst, 4 .md, 1 .parquet, 5 .txt; left "
        "out: 2 a pipe, a device or a broken link, 2 hidden, 9 of no known kind: .png\n"
    )
    assert texts_of(train_shards(tmp_path / "out")) == expected + ODD_TEXTS


def test_pieces_give_the_tokens_of_the_whole_text(monkeypatch):
    monkeypatch.setattr(gpt2, "PIECE_CHARS", 12)
    encoding, rng, cut = gpt2.encoding_of(RANKS), random.Random(0), 0
    for _ in range(3000):
        text = "".join(rng.choices("ab1!'s  \n\r\t\xa0\u3000\x1c\x85é🎉", k=rng.randint(0, 60)))
        chunks = [text[i : i + 20] for i in range(0, len(text), 20)]
        parts = list(gpt2.pieces(chunks))
        assert "".join(parts) == text and all(len(part) <= 12 for part in parts)
        assert parts == list(gpt2.pieces([text]))  # however the text comes
        if all(len(part) < 12 for part in parts[:-1]):  # else there was no place to cut
            cut += len(parts) > 1
            tokens = [token for part in parts for token in encoding.encode_ordinary(part)]
            assert tokens == encoding.encode_ordinary(text)
    assert cut > 500


@pytest.mark.parametrize("unbroken", [" " * 1_000_001 + "x", "x" * 3_000_000, "\n\t" * 600_000])
def test_what_has_no_place_to_cut_decodes_to_itself(run, tmp_path, unbroken):
    (tmp_path / "a.txt").write_text(unbroken)
    assert run(tmp_path / "a.txt", "--val_tokens=0")[0] == 0
    assert texts_of(train_shards(tmp_path / "out")) == [unbroken]


def test_what_is_no_text_is_skipped_and_counted(run, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"bad \xff")
    (tmp_path / "b.txt").write_bytes(b"cut \xe2\x82")
    (tmp_path / "c.md").write_bytes(b"")
    (tmp_path / "c.txt").write_text("in 16 bits", encoding="utf-16")
    odd_lines = [b"{", b'{"x": 1}', b'{"text": 7}', b"[1]", b'{"text": "\\ud800"}', b'{"text": ""}']
    odd_lines += [b'{"text": "\xff"}', b"", b'{"text": "good"}']
    (tmp_path / "d.jsonl").write_bytes(b"\n".join(odd_lines))
    table = pa.table({"text": pa.array([b"\xff", None, b"fine"], pa.binary())})
    pq.write_table(table, tmp_path / "e.parquet")
    (tmp_path / "f.txt").write_bytes("words".encode("utf-16-le"))
    code, _, errors = run(tmp_path, tmp_path, "--val_tokens=0")
    assert code == 0, errors
    assert texts_of(train_shards(tmp_path / "out")) == ["good", "fine"]
    skipped = json.loads((tmp_path / "out/manifest.json").read_text())["skipped"]
    no_text = "no JSON object with a text text (--text_column)"
    assert skipped == {"not UTF-8": 7, "empty": 4, no_text: 4}
    assert "skipped 7 documents: not UTF-8" in errors
    for name, encoding in (("a.txt", "ISO-8859-1"), ("c.txt", "UTF-16"), ("f.txt", "UTF-16LE")):
        assert f"skipped {tmp_path / name}: no UTF-8, but perhaps {encoding}; convert" in errors


def test_splits_of_a_hub_stay_apart_and_a_path_need_be_no_utf8(run, tmp_path):
    names = [b"train-0-of-2.parquet", b"Validation-0-of-1.parquet", b"test/0.jsonl", b"caf\xe9.txt",
             b"train/0.jsonl", b"a_dev.txt", b"a_train.txt", b"latest.txt"]  # fmt: skip
    for name in map(os.fsdecode, names):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pack = {".parquet": parquet, ".jsonl": json_lines}.get(path.suffix, lambda t: t[0].encode())
        path.write_bytes(pack([name.encode(errors="replace").decode()]))
    code, _, errors = run(tmp_path / "in", "--val_tokens=0")
    assert code == 0 and "left out: 3 of validation or test, beside train" in errors
    found = texts_of(train_shards(tmp_path / "out"))
    assert found == [
        "a_train.txt",
        "caf?.txt",
        "latest.txt",
        "train/0.jsonl",
        "train-0-of-2.parquet",
    ]
    assert run(tmp_path / "in" / os.fsdecode(names[3]), "--val_tokens=0", out="named")[0] == 0


def test_a_line_that_would_fill_the_memory_ends_the_run(run, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 40)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "%s"}\n' % (b"x" * 27))  # with its end 40 bytes
    code, _, errors = run(path)
    assert code == 1 and "a.jsonl cannot be read (a line has 40 bytes" in errors
    path.write_bytes(b'{"text": "%s"}\n' % (b"x" * 26))
    assert run(path, "--val_tokens=0", out="other")[0] == 0


GZIP, ZSTD, PARQUET = (f(english(0, 999)) for f in (gzipped, zstd, parquet))
LONG_WINDOW = bytes.fromhex("28b52ffd 00 a8 190000") + b"abc"  # a frame that needs 2 GiB to be read
DAMAGED = "cannot be read"


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a.jsonl.gz", GZIP[: len(GZIP) // 2], DAMAGED),
        ("a.jsonl.gz", b"", DAMAGED),
        ("a.jsonl.zst", ZSTD[: len(ZSTD) // 2], DAMAGED),
        ("a.parquet", PARQUET[:9000] + bytes(200) + PARQUET[9200:], DAMAGED),
        ("a.parquet", parquet([1, 2, 3]), DAMAGED),
        ("a.parquet", parquet(english(0, 9), "body"), "--text_column: body"),
        ("a.csv", b"a,b", "no known kind"),
        ("a.jsonl.zst", LONG_WINDOW, "unpack it first: zstd -d --long=31"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid ", "run git lfs pull"),
        ("a.txt", None, "a pipe, a device or a broken link"),
    ],
)
def test_damaged_input_is_named_and_nothing_is_written(run, tmp_path, name, data, message):
    (tmp_path / "b.txt").write_text("sound")
    if data is None:
        os.mkfifo(tmp_path / name)  # would be waited for
    else:
        (tmp_path / name).write_bytes(data)
    code, printed, errors = run(tmp_path / "b.txt", tmp_path / name, "--val_tokens=0")
    assert code == 1 and not printed and message in errors
    *before, error = errors.splitlines()
    assert error.startswith("error: ") and name in error and len(before) < 2
    assert not list(tmp_path.rglob("*.bin*")) and not list(tmp_path.rglob("manifest.json"))


def test_no_text_is_an_error_that_leaves_nothing_in_the_way(run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text("")
    (tmp_path / "other.jsonl").write_bytes(b'{"body": "one text"}\n' * 3)
    for given, message in (
        ("*.none", "*.none names no file"),
        (tmp_path / "empty", "empty names no file"),
        (tmp_path / "blank.txt", "no text is left to train on"),
        (tmp_path / "other.jsonl", "--text_column"),
    ):
        code, _, errors = run(given, "--val_tokens=0")
        assert code == 1 and message in errors.splitlines()[-1] and errors.count("\n") <= 2
    assert run(given, "--val_tokens=0", "--text_column=body")[0] == 0


@pytest.mark.parametrize(
    "flag", ["--shard_tokens=0", "--val_tokens=-1", "--workers=0", "--name=a/b", "--name=a\nb"]
)
def test_misuse_is_named_and_nothing_is_written(run, tmp_path, flag):
    assert run()[0] == run("--preset=wikitext103", "x.txt")[0] == 2
    (tmp_path / "x.txt").write_text("text")
    code, _, errors = run(tmp_path / "x.txt", flag)
    assert code == 2 and f"error: {flag.partition('=')[0]} " in errors
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------ Tokenizer


def test_unusable_tokenizer_files_are_named(run, rank_file, tmp_path):
    path, lines = tmp_path / "bad.tiktoken", rank_file.read_bytes().splitlines()
    for bad, message in (
        ([*lines, b"?YWJj 268"], "base64"),
        (lines[1:], "a byte has none"),
        ([*lines, base64.b64encode(b"abc") + b" 50256"], "below 50256"),
    ):
        path.write_bytes(b"\n".join(bad))
        code, _, errors = run("x.txt", f"--tokenizer_file={path}")
        assert code == 1 and "bad.tiktoken" in errors and message in errors


# ------------------------------------------------------------------------------ Shards


def test_the_number_of_workers_does_not_matter(run, corpus, tmp_path):
    flags = [corpus, "--val_tokens=500", "--shard_tokens=3000"]
    assert run(*flags, out="one")[0] == run(*flags, out="three", workers=3)[0] == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_validation_is_cut_at_its_count_and_shares_nothing_with_training(run, tmp_path):
    texts = english(0, 800)
    texts += random.Random(1).choices(texts, k=800)  # many of them twice
    (tmp_path / "in.jsonl").write_bytes(json_lines(texts))
    assert run(tmp_path / "in.jsonl", "--val_tokens=1000", "--shard_tokens=3000")[0] == 0
    val, train = tmp_path / "out/text_val_000000.bin", train_shards(tmp_path / "out")
    sizes = [len(open_shard(path)) for path in train]
    assert len(open_shard(val)) == 1000 and set(sizes[:-1]) == {3000} and 0 < sizes[-1] <= 3000
    *whole, cut = texts_of([val])
    (source,) = {text for text in texts if text.startswith(cut)}
    held_out = {*whole, source}
    assert len(held_out) == len(whole) + 1  # each once
    assert texts_of(train) == [text for text in texts if text not in held_out]


def test_validation_comes_from_everywhere_and_does_not_depend_on_what_follows(run, tmp_path):
    texts = english(0, 1000)
    for name, count, val_tokens in (("all", 1000, 1 << 20), ("few", 500, 500), ("many", 1000, 500)):
        (tmp_path / f"{name}.jsonl").write_bytes(json_lines(texts[:count]))
        assert run(tmp_path / f"{name}.jsonl", f"--val_tokens={val_tokens}", out=name)[0] == 0
    few, many = ((tmp_path / n / "text_val_000000.bin").read_bytes() for n in ("few", "many"))
    assert few == many
    found = [texts.index(text) for text in texts_of([tmp_path / "all/text_val_000000.bin"])]
    assert found == sorted(found) and 25 <= len(found) <= 100
    assert min(np.histogram(found, 4, (0, 1000))[0]) > 0


STORIES = "".join(f"\n{text}\n<|endoftext|>" for text in english(5, 300))


def test_few_documents_are_validated_by_the_end_of_the_text(run, tmp_path):
    for number in range(40):  # of which the hash would choose two
        (tmp_path / "one.txt").write_text(f"{number} {STORIES}")
        code, _, errors = run(tmp_path / "one.txt", out=f"{number}")
        assert code == 0 and "validation is the end of the text, " in errors
        (train,) = train_shards(tmp_path / f"{number}")
        val = tmp_path / f"{number}/text_val_000000.bin"
        tokens = [len(open_shard(path)) for path in (train, val)]
        assert tokens[1] == sum(tokens) // 20 and STORIES.endswith(texts_of([val])[0])
    (tmp_path / "one.txt").write_text("a")
    assert run(tmp_path / "one.txt", out="tiny")[0] == 0 and train_shards(tmp_path / "tiny")


def test_the_documented_command_trains_on_one_s_own_text(run, tmp_path, monkeypatch):
    (tmp_path / "one.txt").write_text(STORIES * 3)
    assert run(tmp_path / "one.txt", "--name=mine", out="data/mine")[0] == 0
    text = (ROOT / "docs/data.md").read_text().replace("\\\n", "")
    (command,) = re.findall(r"^./run.sh (--train_files.*?)#", text, re.M)
    monkeypatch.chdir(tmp_path)
    settings = parse_flags(shlex.split(command), TRACKS, "embedded", "")
    check_shards_of(settings.task)
    check_supply(settings.hp, settings.task, 0)
    assert len(Validation(settings.task, Runtime()).rows) == 8


def test_a_separator_makes_documents_of_one_file(run, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "CHUNK_BYTES", 77)  # separators lie across the ends
    (tmp_path / "stories.txt").write_text(STORIES)
    code, _, errors = run(tmp_path / "stories.txt", "--separator=<|endoftext|>")
    assert code == 0 and "end of the text" not in errors
    train, val = train_shards(tmp_path / "out"), [tmp_path / "out/text_val_000000.bin"]
    assert sorted(texts_of(train) + texts_of(val)) == sorted(english(5, 300))
    assert 3 < len(texts_of(val)) < 40 and set(english(5, 20)) <= set(texts_of(train))
    code, _, errors = run(tmp_path / "stories.txt")
    assert code == 1 and "separator: <|endoftext|>, now " in errors


def test_the_manifest_adds_up(run, corpus, tmp_path):
    assert run(corpus, "--shard_tokens=3000")[0] == 0
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    texts = english(0, 400)
    assert manifest["documents"] == len(texts)
    assert manifest["bytes_of_text"] == sum(len(text.encode()) for text in texts)
    paths = sorted((tmp_path / "out").glob("*.bin"))
    assert manifest["tokens"] == sum(len(open_shard(path)) for path in paths)
    ratio = manifest["bytes_of_text"] / manifest["tokens"]
    assert manifest["bytes_per_token"] == pytest.approx(ratio, abs=1e-6)
    assert called(check_shards, *paths)[0] == 0  # sha256 among others


# ------------------------------------------------------------------------------ Interruptions


def test_ctrl_c_ends_it_and_the_same_command_begins_again(run, rank_file, corpus, tmp_path):
    long, out, flags = tmp_path / "in.jsonl", tmp_path / "out", ["--val_tokens=500"]
    long.write_bytes(corpus.read_bytes() * 1000)
    command = [sys.executable, ROOT / "data/tokenize_text.py", long, *flags, f"--out={out}"]
    command += ["--shard_tokens=3000", f"--tokenizer_file={rank_file}", "--workers=2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not list(out.glob("*.part")):
        assert process.poll() is None
        time.sleep(0.01)
    code, _, errors = run(corpus, "--val_tokens=0")
    assert code == 1 and "another process" in errors and str(out) in errors
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130 and errors.count("\n") == 2 and "begins again" in errors
    assert list(out.glob("*.part")) and not list(out.glob("*.bin")) + list(out.glob("*.json"))
    flags += [corpus, "--shard_tokens=20000"]
    assert run(*flags)[0] == run(*flags, out="undisturbed")[0] == 0
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_a_full_disk_is_named_and_the_next_run_begins_again(run, corpus, tmp_path, monkeypatch):
    def failing(path, tokens):
        with whole(path) as part:
            write_shard(part, tokens)
            if "000004" in path.name:
                raise OSError(28, "No space left on device")

    monkeypatch.setattr(gpt2, "PIECE_CHARS", 100)  # shards end inside documents
    flags = [corpus, "--val_tokens=500", "--shard_tokens=3000"]
    with monkeypatch.context() as patch:
        patch.setattr(tokenize_text, "write_shard", failing)
        code, _, errors = run(*flags)
    assert code == 1 and "No space left" in errors and "make room" in errors
    assert str(tmp_path / "out") in errors and len(list((tmp_path / "out").iterdir())) == 4
    assert run(*flags)[0] == run(*flags, out="undisturbed")[0] == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def test_a_finished_run_is_kept_and_never_mixed_with_another(run, corpus, tmp_path):
    out, flags = tmp_path / "out", [corpus, "--val_tokens=0", "--shard_tokens=3000"]
    first = run(*flags)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.glob("*.*n")}
    assert first[0] == 0 and run(*flags) == first
    code, _, errors = run(*flags, "--shard_tokens=4000")
    assert code == 1 and "shard_tokens: 3000, now 4000" in errors
    corpus.write_bytes(corpus.read_bytes() + json_lines(["more"]))
    code, _, errors = run(*flags)
    assert code == 1 and "input_bytes: " in errors
    corpus.write_bytes(json_lines(english(0, 400)))
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before}
    assert before == after
    (out / "text_train_000002.bin").unlink()
    code, _, errors = run(*flags)
    assert code == 1 and "text_train_000002.bin is not as" in errors
    (out / "manifest.json").write_text("{")
    assert run(*flags)[0] == 1
    (out / "manifest.json").unlink()
    code, _, errors = run(*flags)
    assert code == 1 and "text_train_000001.bin is there" in errors


# ------------------------------------------------------------------------------ WikiText-103

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
ARTICLES = ["".join(FIRST), "".join(SECOND)]
RAW = "wikitext-103-raw-v1"
WIKITEXT = {
    f"{RAW}/train-00000-of-00002.parquet": parquet([*FIRST, *SECOND[:3]]),
    f"{RAW}/train-00001-of-00002.parquet": parquet([*SECOND[3:], *FIRST]),
    f"{RAW}/validation-00000-of-00001.parquet": parquet([*SECOND, *FIRST]),
    f"{RAW}/test-00000-of-00001.parquet": b"not asked for",
}


@pytest.fixture
def hub(monkeypatch):
    """data/hub.py with the files of WIKITEXT; .is_there says whether there is a network."""
    from data import hub

    def list_files(repo, revision, prefix, advice):
        if not hub.is_there:
            raise hub.RunError(f"cannot list {repo}; {advice}")
        return [name for name in WIKITEXT if name.startswith(prefix)]

    def download(repo, revision, names, folder):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(WIKITEXT[name])
        return [folder / name for name in names]

    monkeypatch.setattr(hub, "is_there", True, raising=False)
    monkeypatch.setattr(tokenize_text, "list_files", list_files)
    monkeypatch.setattr(tokenize_text, "download", download)
    return hub


def test_wikitext103_comes_from_the_hub_as_articles(run, hub, tmp_path):
    code, _, errors = run("--preset=wikitext103")
    assert (code, errors) == (0, "")
    out = tmp_path / "out"
    assert texts_of([out / "wikitext103_val_000000.bin"]) == ARTICLES[::-1]
    train = texts_of([out / "wikitext103_train_000001.bin"])
    assert train == [*ARTICLES, ARTICLES[0]]
    below = [p.relative_to(out / "parquet").as_posix() for p in (out / "parquet").rglob("*.*")]
    assert sorted(below) == sorted(list(WIKITEXT)[:3])
    hub.is_there = False
    assert run("--preset=wikitext103")[0] == 0
    code, _, errors = run("--preset=wikitext103", out="other")
    assert code == 1 and "a machine with network" in errors and str(tmp_path / "other") in errors
