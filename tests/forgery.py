"""What a cheat does: change a sound log, and make every hash fit again."""

import hashlib
import re
from pathlib import Path


def forge(log: Path, target: Path, *changes: tuple[str, str]) -> Path:
    """A copy of a log with lines changed, and every check and hash made anew to fit.

    A pattern is looked for behind the sources first, and in them only if it is not there.
    """
    source, config, rest = log.read_text().partition("\n=== config ===")
    for pattern, new in changes:
        rest, count = re.subn(pattern, new, rest, flags=re.M)
        if not count:
            source, count = re.subn(pattern, new, source, flags=re.M)
        assert count, pattern
    target.write_text(hashed_anew(source + config + rest))
    return target


def hashed_anew(text: str) -> str:
    lines, hashed = [], hashlib.sha256()
    for line in text.splitlines():
        if line.startswith("check: "):
            line = f"check: {hashed.hexdigest()[:12]}"
        if line.startswith("result "):
            fields = line.rpartition(" sha256:")[0]
            hashed.update(b"" if "schema: 1\n" in lines else fields.encode())
            line = f"{fields} sha256:{hashed.hexdigest()}"
        hashed.update(f"{line}\n".encode())
        lines.append(f"{line}\n")
    return "".join(lines)


def at(hour: int, slug: str) -> tuple[str, list[tuple[str, str]]]:
    """(name of a run that began at that hour, the changes that date a log so)."""
    name = f"2026-01-01T{hour:02}0000Z_embedded_{slug}"
    return name, [(r"^run: .*", f"run: {name}"), (r"^utc: .*", f"utc: 2026-01-01T{hour:02}:00:00Z")]
