"""The source of a run: a trainer's file and every file of the project that it imports.

The referee finds and reads them itself, so that no trainer tells it what ran.
"""

import ast
import hashlib
from itertools import chain
from pathlib import Path

from referee.flags import RunError

ROOT = Path(__file__).resolve().parent.parent
GIT = ("git", "-c", "safe.directory=*")  # a checkout may be another user's, as in a container


def sha256_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def whole_lines(text: str) -> str:
    """A source as logs hold it: its last line ends like the others."""
    return text if text.endswith("\n") or not text else f"{text}\n"


def read_source(path: Path) -> str:
    try:
        return whole_lines(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise RunError(f"{path} is no text in UTF-8: {error.reason}") from None


def imported_modules(path: str, text: str) -> list[list[str]]:
    """For each import of a source, the files below the project's root that it could mean."""
    found = []
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise RunError(f"{path}:{error.lineno}: this is no Python: {error.msg}") from None
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [[alias.name] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [[node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]]
    return [[f"{name.replace('.', '/')}.py" for name in names] for names in found]


def source_texts(folder: Path, entry: str) -> dict[str, str]:
    """Text by path of an entry file, which comes first, and of what it imports from its project."""
    texts, waiting = {entry: read_source(folder / entry)}, [entry]
    while waiting:
        path = waiting.pop()
        modules = list(chain(*imported_modules(path, texts[path])))
        modules += [(Path(m).parent / "__init__.py").as_posix() for m in modules if "/" in m]
        new = {m for m in modules if m not in texts and (folder / m).exists()}
        texts |= {m: read_source(folder / m) for m in new}
        waiting += new
    return {entry: texts.pop(entry), **dict(sorted(texts.items()))}
