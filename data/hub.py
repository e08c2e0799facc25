"""The one place that talks to the Hugging Face hub: list the files of a dataset, download them.

The hub's own client does the work, so HF_ENDPOINT, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE and
HF_HUB_DOWNLOAD_TIMEOUT mean what they mean elsewhere. It downloads to FOLDER/part. A file gets its
final name when size, sha256 and the caller's check are right, so a file with that name is sound.
"""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import WeakFileLock

from referee.flags import RunError
from referee.shards import file_sha256

WAITS_S = (1, 4)  # between the tries; the client itself tries again only after some errors

# Downloads over Xet's protocol outlast ctrl-C and have errors of their own. HTTP serves as well.
constants.HF_HUB_DISABLE_XET = True
STOPS = (signal.SIGINT, signal.SIGTERM)


def list_files(repo: str, revision: str, prefix: str, advice: str) -> list[RepoSibling]:
    """The files of a dataset repository whose names begin with prefix; RunError with the advice."""
    ask = partial(HfApi().dataset_info, repo, revision=revision, files_metadata=True)
    try:
        found = with_retries(ask, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT).siblings
    except Exception as error:  # the client lets the errors of its HTTP library through
        raise RunError(f"cannot list {repo} at {revision}: {reason(error)}; {advice}") from None
    return [file for file in found if file.rfilename.startswith(prefix)]


def download(
    repo: str,
    revision: str,
    files: list[RepoSibling],
    folder: Path,
    check: Callable | None = None,
) -> list[Path]:
    """Have every file in folder, under its name in the repository; return their paths.

    check(path) reads a whole file and raises OSError if it is not sound. Raises RunError; what was
    complete by then is not fetched again.
    """
    missing = [file for file in files if not (folder / file.rfilename).exists()]
    if missing:
        names, staging = [file.rfilename for file in missing], folder / "part"
        # Its cache is not the user's: a damaged copy there would be taken again and again.
        places = {"local_dir": staging, "cache_dir": staging, "allow_patterns": names}
        ask = partial(snapshot_download, repo, repo_type="dataset", revision=revision, **places)
        with locked(folder):
            for left in staging.rglob("*.incomplete"):  # by a run that was killed
                left.unlink()
            before = [signal.signal(number, stop) for number in STOPS]
            try:
                with_retries(ask)
                for file in missing:
                    accept(file, staging, folder, check)
            except Exception as error:
                raise RunError(
                    f"cannot get {few(names)} from {repo}: {reason(error)}; run this again to go "
                    f"on, or bring what is missing from another machine to {folder}"
                ) from None
            finally:
                for number, handler in zip(STOPS, before, strict=True):
                    signal.signal(number, handler)
            shutil.rmtree(staging)
    return [folder / file.rfilename for file in files]


def accept(file: RepoSibling, staging: Path, folder: Path, check: Callable) -> None:
    """Give a file its name if it is sound. Otherwise delete it and raise OSError."""
    staged, path = staging / file.rfilename, folder / file.rfilename
    try:
        if file.lfs and (found := file_sha256(staged)) != file.lfs.sha256:
            raise OSError(f"the sha256 of {path.name} is {found}, the hub says {file.lfs.sha256}")
        if check:
            check(staged)
    except OSError:
        staged.unlink(missing_ok=True)  # the client would take it for complete
        raise
    path.parent.mkdir(parents=True, exist_ok=True)
    staged.replace(path)


def with_retries(call: Callable, **options):
    """call(**options), tried again after any error. Raises what the last try raised."""
    for wait_s in WAITS_S:
        try:
            return call(**options)
        except Exception:
            time.sleep(wait_s)
    return call(**options)


def reason(error: Exception) -> str:
    """Why, in one line; mostly the client's own words."""
    words = " ".join(getattr(error, "problem", str(error)).split()).rstrip(".")
    if isinstance(error, OSError):
        return words
    kind = type(error).__name__
    return f"{constants.ENDPOINT} cannot be reached or a proxy answers ({kind}: {words})"


def few(names: list[str]) -> str:
    if len(names) <= 3:
        return ", ".join(names)
    return f"{names[0]}, {names[1]} ... {names[-1]} ({len(names)} files)"


def stop(number: int, frame) -> None:
    """End at once: after an exception the client waits for the files on their way."""
    os.write(2, b"\nstopped; the same command goes on where this one was\n")
    os._exit(128 + number)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to a folder. RunError if one does so already."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / ".lock"
    try:
        with WeakFileLock(lock, timeout=0.1):
            yield
            lock.unlink(missing_ok=True)
    except TimeoutError:
        raise RunError(
            f"another process is writing to {folder}; wait for its end, then run this again"
        ) from None
