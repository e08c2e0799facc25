"""The one place that talks to the Hugging Face hub: list the files of a dataset, download them.

The hub's own client does the work, so HF_ENDPOINT, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE and
HF_HUB_DOWNLOAD_TIMEOUT mean what they mean elsewhere. It downloads to FOLDER/part. A file gets its
final name when size, sha256 and the caller's check are right: so a file that stands under its final
name with the hub's size is taken for sound, and nothing is fetched or hashed twice.
"""

import errno
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from threading import Event

from huggingface_hub import HfApi, constants, errors, hf_hub_download
from huggingface_hub.utils import WeakFileLock
from tqdm import tqdm

from referee.shards import ShardError, file_sha256

WORKERS = 8  # files at a time
WAITS_S = (1, 4)  # between the tries; the client tries again within each, too
LOCK_WAIT_S = 0.1
FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
ANOTHER_TRY_IS_USELESS = (
    errors.OfflineModeIsEnabled,
    errors.RepositoryNotFoundError,  # or gated
    errors.RevisionNotFoundError,
    errors.EntryNotFoundError,  # or the hub is out of reach; the client tried for half a minute
)

# Downloads over Xet's protocol outlast ctrl-C and have errors of their own. HTTP serves as well.
constants.HF_HUB_DISABLE_XET = True


class HubError(OSError):
    """What the hub did not give, why, and the next step, in one sentence for a person."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository. name: its path there; size: bytes; sha256: None if not known."""

    name: str
    size: int
    sha256: str | None


def list_files(
    repo: str,
    revision: str = "main",
    prefix: str = "",
    advice: str = "check the network, then run this again",
) -> list[RemoteFile]:
    """Files of a dataset repository whose names begin with prefix, sorted by name.

    Raises HubError, which closes with the advice.
    """
    timeout_s = constants.HF_HUB_DOWNLOAD_TIMEOUT

    def ask() -> list[RemoteFile]:
        info = HfApi().dataset_info(repo, revision=revision, files_metadata=True, timeout=timeout_s)
        return [
            RemoteFile(entry.rfilename, entry.size, entry.lfs.sha256 if entry.lfs else None)
            for entry in info.siblings
            if entry.rfilename.startswith(prefix)
        ]

    try:
        return sorted(with_retries(f"the list of {repo}", ask), key=lambda file: file.name)
    except Exception as error:
        raise HubError(f"cannot list {repo} at {revision}: {reason(error)}; {advice}") from None


def download(
    repo: str,
    files: Iterable[RemoteFile],
    folder: Path,
    revision: str = "main",
    check: Callable[[Path], object] = lambda path: None,
) -> list[Path]:
    """Have every file in folder, under its name in the repository; return their paths.

    The files are fetched in their order, some at a time. check(path) reads a whole file and raises
    OSError if it is not sound. Raises HubError; what was complete by then is not fetched again.
    """
    paths = {file: folder / file.name for file in files}
    missing = [f for f, path in paths.items() if not path.exists() or path.stat().st_size != f.size]
    staging, lock = folder / "part", folder / "part.lock"
    ended = Event()  # from then on the client cuts the other threads' connections

    def fetch(file: RemoteFile, bar: tqdm) -> None:
        path = paths[file]
        try:
            work = partial(stage, repo, file, revision, staging, check, bar)
            with_retries(file.name, work, ended)
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / file.name, path)
        except Exception as error:
            raise HubError(
                f"cannot get {file.name} from {repo}: {reason(error)}; run this again to go on, or "
                f"bring the file from another machine to {path}"
            ) from None

    if missing or staging.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with WeakFileLock(lock, timeout=LOCK_WAIT_S):
                shutil.rmtree(staging, ignore_errors=True)  # left by a run that was killed
                require_space(missing, folder)
                fetch_all(fetch, missing)
                shutil.rmtree(staging, ignore_errors=True)
                lock.unlink(missing_ok=True)
        except TimeoutError:
            raise HubError(
                f"another process is downloading to {folder}; wait for its end, then run this again"
            ) from None
        finally:
            ended.set()
    return list(paths.values())


def fetch_all(fetch: Callable[[RemoteFile, tqdm], None], files: list[RemoteFile]) -> None:
    """Fetch in parallel. The first failure ends it, or ctrl-C.

    The threads of a ThreadPool are daemons: nobody waits for a file that is on its way.
    """
    size = sum(file.size for file in files)
    with (
        tqdm(total=size, unit="B", unit_scale=True, disable=None) as bar,
        ThreadPool(WORKERS) as pool,
    ):
        for done, _ in enumerate(pool.imap_unordered(lambda file: fetch(file, bar), files), 1):
            bar.set_postfix_str(f"{done} of {len(files)} files")


def stage(
    repo: str,
    file: RemoteFile,
    revision: str,
    staging: Path,
    check: Callable[[Path], object],
    bar: tqdm,
) -> None:
    """Download to the staging folder. Raises OSError if what came is not sound."""
    path = staging / file.name
    hf_hub_download(
        repo,
        file.name,
        repo_type="dataset",
        revision=revision,
        local_dir=staging,
        force_download=path.exists(),  # an earlier try brought it, and it was not sound
        tqdm_class=lambda **_: nullcontext(bar),  # one bar instead of one for each file
    )
    if file.sha256 and (found := file_sha256(path)) != file.sha256:
        raise OSError(f"its sha256 is {found}, the hub names {file.sha256}")
    check(path)
    with path.open("rb") as complete:  # a name must not outlive its bytes on a power cut
        os.fsync(complete.fileno())


def with_retries(what: str, call: Callable, ended: Event | None = None):
    """call(), tried again after failures that may pass, unless all has ended meanwhile.

    Raises what the last try raised.
    """
    for wait_s in (*WAITS_S, None):
        try:
            return call()
        except Exception as error:  # the client lets the errors of its HTTP library through
            of_disk = isinstance(error, OSError) and error.errno is not None
            is_useless = of_disk or isinstance(error, ANOTHER_TRY_IS_USELESS)
            if wait_s is None or is_useless or (ended and ended.is_set()):
                raise
            say(f"{what}: {reason(error)}; trying again in {wait_s} s")
        time.sleep(wait_s)


def reason(error: Exception) -> str:
    """Why, in one line; mostly the client's own words."""
    if isinstance(error, ShardError):
        return error.problem
    words = " ".join(str(error).split()).rstrip(".")
    if not isinstance(error, OSError):
        kind = type(error).__name__
        return f"{constants.ENDPOINT} cannot be reached or a proxy answers ({kind}: {words})"
    return f"{words}, make room" if error.errno in FULL_DISK else words


def require_space(files: list[RemoteFile], folder: Path) -> None:
    needed, free = sum(file.size for file in files), shutil.disk_usage(folder).free
    if needed > free:
        raise HubError(
            f"{folder} has {free:,} bytes free, and {needed:,} are still to come; "
            "make room, then run this again"
        )


def say(message: str) -> None:
    tqdm.write(message, file=sys.stderr)
