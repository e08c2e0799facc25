"""The one place that talks to the Hugging Face hub: list the files of a dataset, download them.

The hub's own client does the work, so HF_ENDPOINT, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE and
HF_HUB_DOWNLOAD_TIMEOUT mean what they mean elsewhere. It downloads to FOLDER/part. A file gets its
final name when size, sha256 and the caller's check are right: so a file that stands under its final
name with the hub's size is taken for sound, and nothing is fetched or hashed twice.
"""

import errno
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path

from huggingface_hub import HfApi, constants, errors, hf_hub_download
from huggingface_hub.utils import WeakFileLock
from tqdm import tqdm

from data.shards import ShardError, file_sha256

WORKERS = 8  # files at a time
WAITS_S = (0.5, 2, 8)  # between the tries of a file; the client tries again within each, too
LIST_WAITS_S = (0.5, 1)  # nobody waits long to hear that there is no network
LOCK_WAIT_S = 0.1
FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
ANOTHER_TRY_IS_USELESS = (
    errors.OfflineModeIsEnabled,
    errors.RepositoryNotFoundError,  # or gated
    errors.RevisionNotFoundError,
    errors.RemoteEntryNotFoundError,
    errors.LocalEntryNotFoundError,  # the hub is out of reach; the client tried for half a minute
)
REASONS = (
    (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE is set"),
    (errors.GatedRepoError, "it is gated: accept its terms on the hub, and set HF_TOKEN"),
    (errors.RepositoryNotFoundError, "there is no such dataset, or HF_TOKEN does not open it"),
    (errors.RevisionNotFoundError, "there is no such revision"),
    (errors.RemoteEntryNotFoundError, "there is no such file (404)"),
    (
        (json.JSONDecodeError, KeyError, TypeError, errors.FileMetadataError),
        f"{constants.ENDPOINT} does not answer as the hub does (does a proxy answer?)",
    ),
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

    def ask() -> list[RemoteFile]:
        timeout_s = constants.HF_HUB_DOWNLOAD_TIMEOUT
        info = HfApi().dataset_info(repo, revision=revision, files_metadata=True, timeout=timeout_s)
        return [
            RemoteFile(entry.rfilename, entry.size, entry.lfs.sha256 if entry.lfs else None)
            for entry in info.siblings
            if entry.rfilename.startswith(prefix)
        ]

    try:
        found = with_retries(f"the list of {repo}", ask, LIST_WAITS_S, threading.Event())
    except Exception as error:
        raise HubError(f"cannot list {repo} at {revision}: {reason(error)}; {advice}") from None
    return sorted(found, key=lambda file: file.name)


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
    job = Job(repo, revision, folder, check)
    if missing or job.staging.exists():
        folder.mkdir(parents=True, exist_ok=True)
        lock = folder / "part.lock"
        try:
            with WeakFileLock(lock, timeout=LOCK_WAIT_S):
                shutil.rmtree(job.staging, ignore_errors=True)  # left by a run that was killed
                require_space(missing, folder)
                job.fetch_all(missing)
                shutil.rmtree(job.staging, ignore_errors=True)
                lock.unlink(missing_ok=True)
        except TimeoutError:
            raise HubError(
                f"another process is downloading to {folder}; wait for its end, then run this again"
            ) from None
    return list(paths.values())


@dataclass(frozen=True)
class Job:
    """One call of download."""

    repo: str
    revision: str
    folder: Path
    check: Callable[[Path], object]
    stopped: threading.Event = field(default_factory=threading.Event)

    @property
    def staging(self) -> Path:
        return self.folder / "part"

    def fetch_all(self, files: list[RemoteFile]) -> None:
        """Fetch in parallel. The first failure ends it, or ctrl-C.

        The threads of a ThreadPool are daemons: nobody waits for a file that is on its way.
        """
        size = sum(file.size for file in files)
        with (
            tqdm(total=size, unit="B", unit_scale=True, disable=None) as bar,
            ThreadPool(WORKERS) as pool,
        ):
            try:
                fetched = pool.imap_unordered(lambda file: self.fetch(file, bar), files)
                for done, _ in enumerate(fetched, 1):
                    bar.set_postfix_str(f"{done} of {len(files)} files")
            finally:
                self.stopped.set()

    def fetch(self, file: RemoteFile, bar: tqdm) -> None:
        """Bring one file to its final name."""
        path = self.folder / file.name
        try:
            staged = with_retries(file.name, lambda: self.stage(file, bar), WAITS_S, self.stopped)
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(staged, path)
        except Exception as error:
            raise HubError(
                f"cannot get {file.name} from {self.repo}: {reason(error)}; run this again to go "
                f"on, or bring the file from another machine to {path}"
            ) from None

    def stage(self, file: RemoteFile, bar: tqdm) -> Path:
        """Download to the staging folder. Raises OSError if what came is not sound."""
        path = self.staging / file.name
        hf_hub_download(
            self.repo,
            file.name,
            repo_type="dataset",
            revision=self.revision,
            local_dir=self.staging,
            force_download=path.exists(),  # an earlier try brought it, and it was not sound
            tqdm_class=lambda **_: nullcontext(bar),  # one bar instead of one for each file
        )
        if (size := path.stat().st_size) != file.size:
            raise OSError(f"{size:,} bytes came, not {file.size:,}")
        if file.sha256 and (found := file_sha256(path)) != file.sha256:
            raise OSError(f"its sha256 is {found}, the hub names {file.sha256}")
        self.check(path)
        with path.open("rb") as complete:  # a name must not outlive its bytes on a power cut
            os.fsync(complete.fileno())
        return path


def with_retries(what: str, call: Callable, waits_s: Iterable[float], stopped: threading.Event):
    """call(), tried again after failures that may pass. Raises what the last try raised."""
    for wait_s in waits_s:
        try:
            return call()
        except Exception as error:  # the client lets the errors of its HTTP library through
            of_disk = isinstance(error, OSError) and error.errno is not None
            if of_disk or isinstance(error, ANOTHER_TRY_IS_USELESS) or stopped.is_set():
                raise
            say(f"{what}: {reason(error)}; trying again in {wait_s} s")
        stopped.wait(wait_s)
    return call()


def reason(error: Exception) -> str:
    """Why, in a few words."""
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__  # why the client could not ask for the file
    for kinds, words in REASONS:
        if isinstance(error, kinds):
            return words
    if isinstance(error, errors.HfHubHTTPError):
        return f"{constants.ENDPOINT} answered {error.response.status_code}"
    if isinstance(error, ShardError):
        return error.problem
    if isinstance(error, OSError):
        room = ", make room" if error.errno in FULL_DISK else ""
        return str(error).partition("\n")[0].rstrip(".") + room
    return f"{constants.ENDPOINT} cannot be reached or broke off ({error})"


def require_space(files: list[RemoteFile], folder: Path) -> None:
    needed, free = sum(file.size for file in files), free_bytes(folder)
    if needed > free:
        raise HubError(
            f"{folder} has {free:,} bytes free, and {needed:,} are still to come; "
            "make room, then run this again"
        )


def say(message: str) -> None:
    tqdm.write(message, file=sys.stderr)


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk where the folder is or will be."""
    folder = folder.absolute()
    return shutil.disk_usage(next(f for f in (folder, *folder.parents) if f.exists())).free
