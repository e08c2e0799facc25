"""A trainer's source as {path: text}, kept with an attempt.

An attempt keeps its source in source/, whole while it runs. Files that many attempts share, such
as the referee's, then move to a store: a folder sources/ above the attempt, or records/sources.
Names of files in a store begin with digits of their sha256, which the logs name.
A try keeps NAME.diff instead, against the source of another attempt. Its first line is
`base: FOLDER`; the rest is for `patch -p1` in a copy of that source.
"""

import difflib
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from referee.files import whole, write_text
from referee.sources import imported_modules, read_source, sha256_of
from tools.cli import ToolError

ROOT = Path(__file__).resolve().parent.parent
ENTRIES = ("train_gpt.py", "baselines/train_gpt2.py")  # the first is what a checkout is run for
SHARED = ("referee/", "data/")  # folders whose files many attempts share
STORE_DIGITS = 12


def lines_of(text: str) -> list[str]:
    """Lines with their ends; a form feed ends none, as it does for str.splitlines."""
    return re.findall(r".*\n|.+$", text)


def slug_of(name: str) -> str:
    """MyIdea of an attempt called 2026-11-30_MyIdea."""
    return re.sub(r"^\d{4}-[^_]*_", "", name)


def entry_of(folder: Path) -> str | None:
    return next((entry for entry in ENTRIES if (folder / entry).exists()), None)


def require_whole(texts: dict[str, str]) -> None:
    """ToolError if a source imports a module of the project that is not among its files.

    Its run would take that module from a checkout which happens to be on the path.
    """
    names = [path.relative_to(ROOT) for path in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py"))]
    project = {top_name(path) for path in (*names, *texts)}
    for path, text in texts.items():
        for places in imported_modules(path, text):
            if top_name(places[0]) in project and not set(places) & texts.keys():
                raise ToolError(f"the source {path} imports {places[0]}, which is not kept with it")


def top_name(path: str | Path) -> str:
    """data of data/shards.py, train_gpt of train_gpt.py."""
    return Path(path).parts[0].removesuffix(".py")


def kept_texts(folder: Path) -> dict[str, str]:
    """The source that an attempt's folder keeps; empty if it keeps none."""
    whole = folder / "source"
    if not whole.is_dir():
        diff = diff_of(folder)
        return made_by(diff) if diff else {}
    shared = {path: stored(folder, sha256) for path, sha256 in named_sources(folder).items()}
    files = {path: file for path, file in shared.items() if file}
    files |= {file.relative_to(whole).as_posix(): file for file in whole.rglob("*.py")}
    return {path: read_source(files[path]) for path in sorted(files)}


def named_sources(folder: Path) -> dict[str, str]:
    """sha256 by path of the sources that an attempt's first log names and does not contain."""
    log = next(iter(sorted(folder.glob("logs/[!.]*.txt"))), None)
    text = log.read_text(encoding="utf-8", errors="replace") if log else ""
    return dict(re.findall(r"^=== source (\S+) .*\bsha256:(\w+) kept:", text, re.M))


def stored(place: Path, sha256: str) -> Path | None:
    """The file with this sha256 in a store above a place, or in records/sources."""
    for folder in (*place.resolve().parents, ROOT / "records"):
        for file in folder.glob(f"sources/{sha256[:STORE_DIGITS]}*"):
            return file
    return None


def share(folder: Path, store: Path) -> None:
    """Move the files that many attempts share from the source/ of a finished attempt to a store."""
    for path, sha256 in named_sources(folder).items():
        own = folder / "source" / path
        if path.startswith(SHARED) and own.exists() and sha256_of(read_source(own)) == sha256:
            store.mkdir(exist_ok=True)
            own.replace(store / f"{sha256[:STORE_DIGITS]}_{own.name}")
            with suppress(OSError):  # until it is empty
                own.parent.rmdir()


def write_texts(texts: dict[str, str], folder: Path) -> None:
    """Write sources below a folder; a new folder gets its name when it holds all of them."""
    part = folder if folder.exists() else folder.with_name(f"{folder.name}.part")
    if part != folder:
        shutil.rmtree(part, ignore_errors=True)  # of a call that failed
    for path, text in texts.items():
        (part / path).parent.mkdir(parents=True, exist_ok=True)
        write_text(part / path, text)
    part.replace(folder)


def diff_of(folder: Path) -> Path | None:
    return next(iter(sorted(folder.glob("*.diff"))), None)


def base_of(diff: Path) -> Path:
    """The attempt's folder against whose source a diff stands."""
    first = diff.read_text(encoding="utf-8").partition("\n")[0]
    if not first.startswith("base: "):
        raise ToolError(f"{diff}:1: this is not `base: FOLDER`, an attempt against which it stands")
    return diff.parent / first.removeprefix("base: ")


def made_by(diff: Path) -> dict[str, str]:
    """The source that a diff makes of its base's."""
    base = base_of(diff)
    try:
        texts = kept_texts(base)
        text = diff.read_text(encoding="utf-8")
        _, *parts = re.split(r"^--- a/.*\n\+\+\+ b/(.*)\n", text, flags=re.M)
        for path, hunks in zip(parts[::2], parts[1::2], strict=True):
            texts[path] = patched(texts.get(path, ""), hunks)
    except (ValueError, RecursionError):
        raise ToolError(f"{diff} does not fit the source of {base}") from None
    if not texts:
        raise ToolError(f"{diff} stands against {base}, which keeps no source")
    return {path: text for path, text in texts.items() if text}


def patched(old: str, hunks: str) -> str:
    """A text after the hunks of a unified diff; ValueError if they do not fit."""
    lines, new, at = lines_of(old), [], 0
    for line in lines_of(hunks):
        if heading := re.match(r"@@ -(\d+)(,0 )?", line):
            start = int(heading[1]) - (0 if heading[2] else 1)  # of no lines: the line before them
            new += lines[at:start]
            at = start
        elif line[0] == "+":
            new.append(line[1:])
        elif line[1:] not in lines[at : at + 1]:
            raise ValueError(f"line {at + 1} is not {line[1:]}")
        else:
            new += [line[1:]] if line[0] == " " else []
            at += 1
    return "".join(new + lines[at:])


def keep_as_diff(folder: Path, base: Path) -> None:
    """Replace an attempt's source/ by a diff against the source of base, another attempt."""
    old, new = kept_texts(base), kept_texts(folder)
    lines = [f"base: {Path(os.path.relpath(base, folder)).as_posix()}\n"]
    for path in sorted(old | new):
        texts = (lines_of(texts.get(path, "")) for texts in (old, new))
        lines += difflib.unified_diff(*texts, f"a/{path}", f"b/{path}")
    diff = diff_of(folder) or folder / f"{slug_of(folder.resolve().name)}.diff"
    with whole(diff) as part:
        part.write_text("".join(lines), encoding="utf-8")
        if made_by(part) != new:
            raise ToolError(f"no diff makes the source of {folder} of {base}'s; it stays whole")
    shutil.rmtree(folder / "source", ignore_errors=True)


def find_source(log: Path, named: Path, path: str, sha256: str) -> tuple[Path, str]:
    """(where it stands, text) of a source that a log names and does not contain.

    named is the place that the log gives; a file that has left it is found by its sha256.
    """
    if file := named if named.exists() else stored(log, sha256):
        return file, file.read_text(encoding="utf-8")
    diff = diff_of(log.resolve().parent.parent)
    text = made_by(diff).get(path, "") if diff else ""
    if sha256_of(text) != sha256:
        raise ToolError("no folder sources/ above the log has it, nor has records/sources, "
                        "nor the diff of its attempt")  # fmt: skip
    return diff, text
