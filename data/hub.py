"""The one place that talks to the Hugging Face hub: list the files of a dataset, download them.

Every request goes through the session of huggingface_hub, so HF_ENDPOINT, HF_HOME, HF_TOKEN,
HF_HUB_OFFLINE and HF_HUB_DOWNLOAD_TIMEOUT mean what they mean elsewhere. Its hf_hub_download is not
used: that of 2.4.0 begins a file anew after a kill, and checks nothing before the final name.

A file grows below FOLDER/part, under a name that holds its hash, and is continued there by Range.
It gets its final name once size, sha256 and the caller's check are right: so a file that stands
under its final name with the hub's size is taken for sound, and nothing is hashed twice.
"""

import errno
import json
import os
import random
import shutil
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
from filelock import FileLock, Timeout
from huggingface_hub import HfApi, constants, get_session, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status
from shards import file_sha256
from tqdm import tqdm

WORKERS = 8  # files at a time
TRIES = 6  # in a row, without a new byte between them
FIRST_TRIES = 3  # nobody waits long to hear that there is no network
REFUSALS = 3  # whole files that came and were not sound
BACKOFF = 0.5  # seconds before the second try; doubled before each further one
PASSING_STATUS = {408, 429, 500, 502, 503, 504}
FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FAILURES = (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError)


class HubError(OSError):
    """What the hub did not give, why, and the next step, in one sentence for a person."""


class WrongAnswer(OSError):
    """An answer that is not what was asked for, as captive portals and proxies give it."""


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
    patience = Patience(f"the list of {repo}", FIRST_TRIES, threading.Event())
    while True:
        try:
            timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
            info = HfApi().dataset_info(
                repo, revision=revision, files_metadata=True, timeout=timeout
            )
            break
        except (*FAILURES, KeyError, TypeError) as error:  # the client reads any JSON as an answer
            if not patience.allows(error):
                why = reason(error, repo, revision)
                raise HubError(f"cannot list {repo}: {why}; {advice}") from None
    found = [
        RemoteFile(entry.rfilename, entry.size, entry.lfs.sha256 if entry.lfs else None)
        for entry in info.siblings
        if entry.rfilename.startswith(prefix)
    ]
    return sorted(found, key=lambda file: file.name)


def download(
    repo: str,
    files: Iterable[RemoteFile],
    folder: Path,
    revision: str = "main",
    check: Callable[[Path], None] = lambda path: None,
) -> list[Path]:
    """Have every file in folder, under its name in the repository; return their paths.

    The files are fetched in their order, some at a time. check(path) reads a whole file and raises
    OSError if it is not sound. Raises HubError; what came until then is continued by the next call.
    """
    paths = {file: folder / file.name for file in files}
    missing = [file for file in paths if not is_there(paths[file], file)]
    if missing:
        Job(repo, revision, check, paths, folder / "part").run(missing)
    return list(paths.values())


def is_there(path: Path, file: RemoteFile) -> bool:
    """Does it stand under its final name? A file of another size is named, and not counted."""
    if not path.exists():
        return False
    if (size := path.stat().st_size) != file.size:
        say(f"{path} has {size:,} bytes, not the {file.size:,} of the hub: fetching it again")
        return False
    return True


@dataclass
class Job:
    """One call of download."""

    repo: str
    revision: str
    check: Callable[[Path], None]
    paths: dict[RemoteFile, Path]  # final names
    parts: Path  # folder of what is still incomplete
    bytes_bar: tqdm = field(init=False)
    stopped: threading.Event = field(default_factory=threading.Event)

    def part(self, file: RemoteFile) -> Path:
        """Where the file grows. Its hash is in the name: other contents are never continued."""
        name = file.name.replace("/", "_")
        return self.parts / f"{name}.{(file.sha256 or str(file.size))[:16]}"

    def run(self, files: list[RemoteFile]) -> None:
        lock = FileLock(self.parts / "lock")
        try:
            self.parts.mkdir(parents=True, exist_ok=True)
            with lock.acquire(timeout=0):
                self.require_space(files)
                self.fetch_all(files)
                (self.parts / "lock").unlink(missing_ok=True)
        except Timeout:
            raise HubError(
                f"another process is downloading to {self.parts.parent}; "
                "wait until it ends, then run this again"
            ) from None
        except OSError as error:
            if error.errno is None:
                raise
            raise HubError(self.disk_error(error)) from None
        if not any(self.parts.iterdir()):
            self.parts.rmdir()

    def require_space(self, files: list[RemoteFile]) -> None:
        needed = sum(file.size - size_of(self.part(file)) for file in files)
        free = free_bytes(self.parts)
        if needed > free:
            raise HubError(
                f"{self.parts.parent} has {free:,} bytes free, and {needed:,} are still to come; "
                "make room, then run this again"
            )

    def fetch_all(self, files: list[RemoteFile]) -> None:
        """Fetch in parallel; the first failure stops the others."""
        done = sum(size_of(self.part(file)) for file in files)
        size = sum(file.size for file in files)
        with (
            tqdm(
                desc="bytes", total=size, initial=done, unit="B", unit_scale=True, disable=None
            ) as bar,
            tqdm(desc="files", total=len(files), unit="file", disable=None) as files_bar,
            ThreadPoolExecutor(WORKERS) as pool,
        ):
            self.bytes_bar = bar
            try:
                for fetched in as_completed([pool.submit(self.fetch, file) for file in files]):
                    fetched.result()
                    files_bar.update()
            finally:
                self.stopped.set()
                pool.shutdown(cancel_futures=True)

    def fetch(self, file: RemoteFile) -> None:
        """Bring one file to its final name."""
        part, path = self.part(file), self.paths[file]
        for _ in range(REFUSALS):
            self.fetch_bytes(file, part)
            try:
                self.verify(file, part)
                break
            except OSError as error:
                self.bytes_bar.update(-size_of(part))
                part.unlink()
                refusal = str(error)
                say(f"{file.name} is refused and fetched again: {refusal}")
        else:
            raise HubError(
                f"{self.repo} gave {file.name} {REFUSALS} times, and it was never sound: {refusal}"
                f"; try another revision or network, or bring the file from elsewhere to {path}"
            )
        with part.open("rb") as complete:  # a name must not outlive the bytes on a power cut
            os.fsync(complete.fileno())
        path.parent.mkdir(parents=True, exist_ok=True)
        part.replace(path)

    def verify(self, file: RemoteFile, part: Path) -> None:
        if file.sha256 and (found := file_sha256(part)) != file.sha256:
            raise WrongAnswer(f"its sha256 is {found}, the hub names {file.sha256}")
        self.check(part)

    def fetch_bytes(self, file: RemoteFile, part: Path) -> None:
        """Let the part grow to the file's size, over as many connections as it takes."""
        patience = Patience(file.name, TRIES, self.stopped)
        while (before := size_of(part)) < file.size or not part.exists():
            try:
                self.receive(file, part, before)
            except FAILURES as error:
                if size_of(part) > before:
                    patience = Patience(file.name, TRIES, self.stopped)
                if getattr(error, "errno", None):
                    raise
                if not patience.allows(error):
                    why = reason(error, self.repo, self.revision)
                    raise HubError(
                        f"cannot get {file.name} from {self.repo}: {why}; run this again to go on, "
                        f"or bring the file from another machine to {self.paths[file]}"
                    ) from None

    def receive(self, file: RemoteFile, part: Path, start: int) -> None:
        """Append what one connection gives from byte start on; WrongAnswer for another file."""
        url = hf_hub_url(self.repo, file.name, repo_type="dataset", revision=self.revision)
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
            hf_raise_for_status(response)
            if response.status_code != 206 and start:  # Range was not understood: all over again
                self.bytes_bar.update(-start)
                start = 0
            expect_bytes(response, file.size - start)
            with part.open("ab" if start else "wb") as out:
                for chunk in response.iter_bytes():
                    if self.stopped.is_set():
                        raise HubError(f"{file.name} was interrupted")
                    out.write(chunk)
                    self.bytes_bar.update(len(chunk))
                    if out.tell() > file.size:  # no length was given, and this never ends
                        break
        if (size := size_of(part)) != file.size:
            self.bytes_bar.update(-size)
            part.unlink()
            raise WrongAnswer(f"{size:,} bytes came, not {file.size:,}")

    def disk_error(self, error: OSError) -> str:
        folder = self.parts.parent
        if error.errno not in FULL_DISK:
            return f"cannot write to {folder}: {error.strerror} ({error.filename})"
        left = sum(f.size - size_of(self.part(f)) for f, p in self.paths.items() if not p.exists())
        return (
            f"the disk of {folder} is full ({error.strerror}), and {left:,} bytes are still to "
            "come; make room, then run this again: it goes on where it stopped"
        )


class Patience:
    """Says whether a failure may pass, and waits before the next try, longer each time."""

    def __init__(self, what: str, tries: int, stopped: threading.Event):
        self.what, self.tries, self.stopped, self.failures = what, tries, stopped, 0

    def allows(self, error: Exception) -> bool:
        """False: give up. True: enough time has passed for another try."""
        self.failures += 1
        if not may_pass(error) or self.failures == self.tries or self.stopped.is_set():
            return False
        # Jitter, so that parallel downloads do not come back all at once.
        seconds = BACKOFF * 2 ** (self.failures - 1) * random.uniform(0.5, 1)
        seconds = max(seconds, retry_after(error))
        say(f"{self.what}: {reason(error)}; trying again in {seconds:.1f} s")
        return not self.stopped.wait(seconds)


def may_pass(error: Exception) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in PASSING_STATUS
    passing = httpx2.TransportError | WrongAnswer | json.JSONDecodeError | KeyError | TypeError
    return isinstance(error, passing)


def retry_after(error: Exception) -> float:
    """Seconds that the hub asks for; 0 if it does not."""
    answer = getattr(error, "response", None)
    seconds = answer.headers.get("Retry-After", "") if answer is not None else ""
    return float(seconds) if seconds.isdigit() else 0.0


def reason(error: Exception, repo: str = "", revision: str = "") -> str:
    """Why, in a few words."""
    match error:
        case OfflineModeIsEnabled():
            return "HF_HUB_OFFLINE is set"
        case GatedRepoError():
            return "its access is gated: accept its terms on the hub, and set HF_TOKEN"
        case RepositoryNotFoundError():
            return f"{constants.ENDPOINT} has no such dataset, or HF_TOKEN does not open it"
        case RevisionNotFoundError():
            return f"it has no revision {revision}"
        case RemoteEntryNotFoundError():
            return f"revision {revision} has no such file (404)"
        case HfHubHTTPError():
            return f"{constants.ENDPOINT} answered {error.response.status_code}"
        case json.JSONDecodeError() | KeyError() | TypeError():
            return f"{constants.ENDPOINT} answered something else than the hub does (a proxy?)"
        case httpx2.UnsupportedProtocol():
            return f"HF_ENDPOINT {constants.ENDPOINT} is no URL"
        case httpx2.ConnectError() | httpx2.ConnectTimeout():
            return f"{constants.ENDPOINT} cannot be reached ({error})"
        case httpx2.TimeoutException():
            return f"{constants.ENDPOINT} fell silent"
        case httpx2.TransportError():
            return f"the connection broke ({error})"
    return str(error)


def expect_bytes(response: httpx2.Response, count: int) -> None:
    """WrongAnswer if the header speaks of another length, or of a page for a person."""
    length = int(response.headers.get("Content-Length", count))
    kind = response.headers.get("Content-Type", "")
    if length != count or kind.startswith("text/html"):
        raise WrongAnswer(
            f"the answer is {length:,} bytes of {kind or 'no type'}, not the {count:,} that are "
            "still to come (does a proxy stand between?)"
        )


def say(message: str) -> None:
    tqdm.write(message, file=sys.stderr)


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk where the folder is or will be."""
    folder = folder.absolute()
    return shutil.disk_usage(next(f for f in (folder, *folder.parents) if f.exists())).free


def size_of(path: Path) -> int:
    """Bytes; 0 if there is no such file."""
    try:
        return os.path.getsize(path)
    except FileNotFoundError:
        return 0
