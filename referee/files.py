"""Files that get their name when they are whole, so that a full disk or a kill loses nothing."""

import os
from contextlib import contextmanager, suppress
from pathlib import Path

from referee.flags import RunError


@contextmanager
def whole(path: Path):
    """Yield where to write a file, which takes this path when the block ends; RunError if not.

    A pipe or a device is written as it is.
    """
    target = Path(os.path.realpath(path))  # of a link
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        if path.exists() and not path.is_file():
            yield path
            return
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(target)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}; what was there is "
                       "unchanged: make room, or name another place") from None  # fmt: skip
    finally:
        with suppress(OSError):  # it has its name already, or was never begun
            part.unlink()


def write_text(path: Path, text: str) -> None:
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")
