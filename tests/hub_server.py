"""A small Hugging Face hub on loopback, for the real client; it can be told to misbehave.

    with HubServer({"kjj0/fineweb10B-gpt2": {"fineweb_val_000000.bin": b"..."}}) as hub:
        hub.faults["fineweb_val_000000.bin"] = [Fault(status=503), Fault(cut=1000)]
        subprocess.run([...], env={**os.environ, "HF_ENDPOINT": hub.endpoint})
        assert len(hub.transfers("fineweb_val_000000.bin")) == 3

As on the hub, the bytes of a file do not come from where its name is resolved but from another
host, to which a redirect leads and which must never see a token. Faults strike there, one for each
GET, in their order; faults of "api" strike the calls of the API, those of "resolve" the resolving
of names. Each file is offered over Xet too, which this hub does not speak.
"""

import hashlib
import json
import os
import socket
import struct
import sys
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HTML = b"<!DOCTYPE html><html><body>Please sign in to this network.</body></html>"


@dataclass(frozen=True)
class Fault:
    """What happens to one GET instead of the right answer.

    status: answer with this and no content. body: answer with 200 and this. cut: close the
    connection after so many bytes, with a reset if resets. bytes_per_s: send slowly.
    """

    status: int = 200
    headers: dict = field(default_factory=dict)
    body: bytes | None = None
    cut: int | None = None
    resets: bool = False
    bytes_per_s: int | None = None


HTML_PAGE = Fault(body=HTML, headers={"Content-Type": "text/html; charset=utf-8"})


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: Message  # whose names have no case
    time: float = field(default_factory=time.monotonic)  # seconds


class QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """Clients that are killed, or hang up on a wrong answer, are what the tests are about."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class HubServer:
    """repos: contents by file name, by repository. token: what every repository asks for."""

    def __init__(self, repos: dict[str, dict[str, bytes]], token: str | None = None):
        self.repos, self.token = repos, token
        self.revisions = {"main", COMMIT}
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self.requests: list[Request] = []
        self.unlisted: set[str] = set()  # listed files whose name resolves to 404

    def __enter__(self):
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = QuietServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    @property
    def storage(self) -> str:
        """The same server under another name: for a client another host."""
        return f"http://localhost:{self.server.server_port}/storage"

    def transfers(self, name: str) -> list[Request]:
        """The GETs for the bytes of one file."""
        found = [r for r in self.requests if r.path.startswith("/storage/") and r.method == "GET"]
        return [request for request in found if request.path.endswith("/" + name)]


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(Request(self.command, path, self.headers))
        if path.startswith("/storage/"):
            self.storage(path.removeprefix("/storage/"))
        elif path.startswith("/api/datasets/"):
            self.api(path.removeprefix("/api/datasets/"))
        elif path.startswith("/datasets/"):
            self.resolve(path.removeprefix("/datasets/"))
        else:
            self.refuse(404, "RepoNotFound")

    do_HEAD = do_GET

    def api(self, path: str):
        """NAMESPACE/NAME/revision/REVISION or NAMESPACE/NAME/tree/REVISION"""
        if self.hub.faults["api"]:
            return self.fail(self.hub.faults["api"].pop(0))
        namespace, name, what, revision = path.split("/", 3)
        repo = f"{namespace}/{name}"
        if not self.may_enter(repo, revision):
            return None
        key = "path" if what == "tree" else "rfilename"
        files = [self.entry(key, *file) for file in sorted(self.hub.repos[repo].items())]
        found = files if what == "tree" else {"id": repo, "sha": COMMIT, "siblings": files}
        return self.answer(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def entry(self, key: str, name: str, content: bytes) -> dict:
        """A file as tree (key: path, its hash: oid) and revision (rfilename, sha256) give it."""
        digest = hashlib.sha256(content).hexdigest()
        size = len(content)
        lfs = {"oid": digest, "sha256": digest, "size": size, "pointerSize": 134}
        lfs = None if name.startswith(".") else lfs  # as .gitattributes, which git itself keeps
        return {"type": "file", key: name, "oid": "0" * 40, "size": size, "lfs": lfs}

    def may_enter(self, repo: str, revision: str) -> bool:
        expected = self.hub.token and f"Bearer {self.hub.token}"
        if repo not in self.hub.repos or expected and self.headers["Authorization"] is None:
            self.refuse(401, "RepoNotFound")
        elif expected and self.headers["Authorization"] != expected:
            self.refuse(403, "GatedRepo")
        elif revision not in self.hub.revisions:
            self.refuse(404, "RevisionNotFound")
        else:
            return True
        return False

    def resolve(self, path: str):
        """NAMESPACE/NAME/resolve/REVISION/FILE: leads on to the bytes, and describes them."""
        if self.hub.faults["resolve"]:
            return self.fail(self.hub.faults["resolve"].pop(0))
        namespace, name, _, revision, file = path.split("/", 4)
        repo = f"{namespace}/{name}"
        if not self.may_enter(repo, revision):
            return None
        content = self.hub.repos[repo].get(file)
        if content is None or file in self.hub.unlisted:
            return self.refuse(404, "EntryNotFound")
        digest = hashlib.sha256(content).hexdigest()
        headers = {
            "Location": f"{self.hub.storage}/{repo}/{file}",
            "X-Repo-Commit": COMMIT,
            "X-Linked-Size": str(len(content)),
            "X-Linked-Etag": f'"{digest}"',
            "ETag": f'"{digest}"',
            "X-Xet-Hash": digest,
            "X-Xet-Refresh-Route": f"{self.hub.endpoint}/xet",
        }
        return self.answer(302, b"", headers)

    def storage(self, path: str):
        """NAMESPACE/NAME/FILE: the bytes, or a part of them, or the next fault."""
        namespace, name, file = path.split("/", 2)
        content = self.hub.repos[f"{namespace}/{name}"][file]
        fault = self.hub.faults[file].pop(0) if self.hub.faults[file] else Fault()
        if fault.status != 200 or fault.body is not None:
            self.fail(fault)
            return
        start, status = 0, 200
        headers = {"Accept-Ranges": "bytes", "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        if asked := self.headers.get("Range"):
            start, status = int(asked.removeprefix("bytes=").partition("-")[0]), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.answer(status, content[start:], headers, fault)

    def answer(self, status: int, body: bytes, headers: dict, fault: Fault | None = None):
        fault = fault or Fault()
        kind = {"Content-Type": "application/octet-stream", "Content-Length": str(len(body))}
        self.send_response(status)
        for key, value in (kind | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.send(body[: fault.cut], fault.bytes_per_s)
        if fault.resets:
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            os.close(self.connection.detach())  # without the shutdown that a server begins with
        if fault.cut is not None:
            self.close_connection = True

    def fail(self, fault: Fault):
        self.answer(fault.status, fault.body or b"", fault.headers)

    def send(self, body: bytes, bytes_per_s: int | None):
        step = max(1, bytes_per_s // 20) if bytes_per_s else len(body) or 1
        for at in range(0, len(body), step):
            self.wfile.write(body[at : at + step])
            if bytes_per_s:
                time.sleep(0.05)

    def refuse(self, status: int, code: str):
        self.answer(status, b"", {"X-Error-Code": code})
