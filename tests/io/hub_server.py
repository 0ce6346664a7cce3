"""A Hub on loopback: serves folders as repositories to the real huggingface_hub client.

    with HubServer() as hub:
        commit = hub.add("owner/name", folder)
        subprocess.run([...], env=hub.env(tmp_path / "cache"))
        assert "/owner/name/resolve/..." in hub.paths

The client reads HF_ENDPOINT when it is imported, so it has to run in a process of its own. Files
are read when they are asked for: a folder must not change while it is served. Large files (by
`LFS`) are served as the Hub serves them, by a redirect to another host name.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

LFS = ("*.safetensors", "*.bin", "*.pth", "*.h5", "*.msgpack", "*.gguf", "*.onnx")
_BLOCK = 1 << 20


class Request(NamedTuple):
    """One request as it arrived, and what it was answered with."""

    method: str
    path: str
    range: str | None
    authorization: str | None
    status: int


@dataclass
class Fault:
    """What to do instead of answering a matching request properly.

    Attributes:
        path: Pattern for the request's path; a slash is like any other character.
        method: The method it applies to, or None for all.
        times: How often, or None for always.
        status: Answer with this status and no content.
        code: The X-Error-Code header that goes with it.
        headers: Headers to add or to replace.
        content: The body to send instead.
        length: Content-Length to announce instead of the body's own.
        cut: Send so many bytes of the body, then close the connection; where there is no body to
            send, close it without an answer.
        reset: Close it by a reset rather than in order.
        stall: Say nothing at all for so many seconds first.
        then: Called once the request has been answered.
    """

    path: str
    method: str | None = None
    times: int | None = None
    status: int | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes | None = None
    length: int | None = None
    cut: int | None = None
    reset: bool = False
    stall: float = 0.0
    then: Callable[[], object] | None = None

    def matches(self, method: str, path: str) -> bool:
        if self.times == 0 or self.method not in (None, method):
            return False
        return fnmatch.fnmatchcase(path, self.path)


@dataclass(frozen=True)
class _Blob:
    """A file of a repository at a commit."""

    path: Path
    size: int
    sha256: str
    git: str
    lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git

    def entry(self, name: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": name, "size": self.size, "oid": self.git}
        if self.lfs:
            pointer = hashlib.sha1(self.sha256.encode()).hexdigest()
            lfs = {"oid": self.sha256, "size": self.size, "pointerSize": 134}
            entry |= {"oid": pointer, "lfs": lfs}
        return entry


@dataclass
class _Repo:
    commits: dict[str, dict[str, _Blob]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    extra: list[dict[str, Any]] = field(default_factory=list)
    token: str | None = None
    gated: bool = False


class HubServer:
    """A server with repositories, faults, and a log of requests; a context manager.

    Attributes:
        faults: The faults that apply, first match first.
        requests: Every request, in the order of arrival.
        page: How many files a page of a listing has.
    """

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.page = 1000
        self.repos: dict[str, _Repo] = {}
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def storage(self) -> str:
        """Where large files are: the same server by another host's name."""
        return f"http://localhost:{self.port}"

    @property
    def paths(self) -> list[str]:
        """The paths of all requests."""
        return [request.path for request in self.requests]

    def add(
        self, repo: str, folder: Path, *, branch: str = "main", lfs: Sequence[str] = LFS
    ) -> str:
        """Commits a folder to a branch, which need not exist; returns the commit."""
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        blobs = {path.relative_to(folder).as_posix(): _blob(path, lfs) for path in files}
        content = "\n".join(f"{name} {blob.sha256}" for name, blob in blobs.items())
        commit = hashlib.sha1(f"{repo}\n{content}".encode()).hexdigest()
        with self.lock:
            stored = self.repos.setdefault(repo, _Repo())
            stored.commits[commit] = blobs
            stored.refs[branch] = commit
        return commit

    def fail(self, path: str, **how: Any) -> Fault:
        """Adds a `Fault`."""
        fault = Fault(path, **how)
        self.faults.append(fault)
        return fault

    def close(self, repo: str, token: str) -> None:
        """Makes a repository private: it is there for this token alone."""
        self.repos[repo].token = token

    def gate(self, repo: str) -> None:
        """Gates a repository: its listing is public, its files are not served."""
        self.repos[repo].gated = True

    def list_also(self, repo: str, path: str, **entry: Any) -> None:
        """Lists a file that is not there, under any name."""
        known = {"type": "file", "path": path, "size": 3, "oid": "0" * 40}
        self.repos[repo].extra.append(known | entry)

    def fetched(self, repo: str) -> set[str]:
        """The files of a repository that were transferred, at whatever commit."""
        found = set()
        for request in self.requests:
            parts = request.path.split("/resolve/")
            if request.method == "GET" and len(parts) == 2 and parts[0] == f"/{repo}":
                found.add(parts[1].partition("/")[2])
            elif request.method == "GET" and request.path.startswith(f"/storage/{repo}/"):
                found.add(request.path.removeprefix(f"/storage/{repo}/").partition("/")[2])
        return found

    def env(self, cache: Path, **more: str) -> dict[str, str]:
        """The environment of a process whose Hub this is, with an empty home of its own."""
        usual = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_", "TQDM_"))
            and not name.lower().endswith("_proxy")
        }
        return usual | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_ETAG_TIMEOUT": "2",
            "HF_HUB_DOWNLOAD_TIMEOUT": "2",
            "NO_PROXY": "127.0.0.1,localhost",
            **more,
        }


def _blob(path: Path, lfs: Sequence[str]) -> _Blob:
    size = path.stat().st_size
    sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size)
    with path.open("rb") as content:
        while block := content.read(_BLOCK):
            sha256.update(block)
            git.update(block)
    large = any(fnmatch.fnmatchcase(path.name, pattern) for pattern in lfs)
    return _Blob(path, size, sha256.hexdigest(), git.hexdigest(), large)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fault: Fault | None

    @property
    def hub(self) -> HubServer:
        return self.server.hub  # type: ignore[attr-defined, no-any-return]

    def log_message(self, *_: object) -> None:
        """Keeps the test's output clean; `HubServer.requests` is the log."""

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:  # the client hung up, or a fault closed the connection
            self.close_connection = True

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def _serve(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        with self.hub.lock:
            matching = (f for f in self.hub.faults if f.matches(self.command, path))
            self.fault = next(matching, None)
            if self.fault is not None and self.fault.times is not None:
                self.fault.times -= 1
        self._logged = path
        if self.fault is not None and self.fault.stall:
            self.hub.closing.wait(self.fault.stall)
        if self.fault is not None and self.fault.status is not None:
            code = {} if self.fault.code is None else {"X-Error-Code": self.fault.code}
            self._answer(self.fault.status, code)
        else:
            self._route(path, parse_qs(url.query))
        if self.fault is not None and self.fault.then is not None:
            self.fault.then()

    def _route(self, path: str, query: dict[str, list[str]]) -> None:
        parts = path.split("/")
        if path.startswith("/api/models/") and len(parts) >= 5:
            return self._api("/".join(parts[3:5]), parts[5:], query)
        if path.startswith("/storage/") and len(parts) >= 6:
            repo, commit, name = "/".join(parts[2:4]), parts[4], "/".join(parts[5:])
            return self._content(self.hub.repos[repo].commits[commit][name], {})
        if len(parts) >= 6 and parts[3] == "resolve":
            return self._resolve("/".join(parts[1:3]), parts[4], "/".join(parts[5:]))
        return self._answer(404, {})

    def _allowed(self, repo: str) -> _Repo | None:
        stored = self.hub.repos.get(repo)
        given = self.headers.get("Authorization")
        if stored is None or (stored.token is not None and given != f"Bearer {stored.token}"):
            self._answer(401 if given is None else 404, {"X-Error-Code": "RepoNotFound"})
            return None
        return stored

    def _api(self, repo: str, rest: list[str], query: dict[str, list[str]]) -> None:
        stored = self._allowed(repo)
        if stored is None:
            return None
        kind, revision = (rest[0], "/".join(rest[1:])) if rest else ("revision", "main")
        commit = stored.refs.get(revision, revision)
        if commit not in stored.commits:
            return self._answer(404, {"X-Error-Code": "RevisionNotFound"})
        files = stored.commits[commit]
        if kind == "revision":
            siblings = [{"rfilename": name} for name in files]
            return self._json({"id": repo, "sha": commit, "siblings": siblings})
        entries = [blob.entry(name) for name, blob in files.items()] + stored.extra
        start = int(query.get("cursor", ["0"])[0])
        more = {}
        if start + self.hub.page < len(entries):
            url = f"{self.hub.endpoint}{urlsplit(self.path).path}?recursive=True"
            more["Link"] = f'<{url}&cursor={start + self.hub.page}>; rel="next"'
        return self._json(entries[start : start + self.hub.page], more)

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        stored = self._allowed(repo)
        if stored is None:
            return None
        commit = stored.refs.get(revision, revision)
        blob = stored.commits.get(commit, {}).get(name)
        about = {"X-Repo-Commit": commit}
        if blob is None:
            return self._answer(404, about | {"X-Error-Code": "EntryNotFound"})
        if stored.gated:
            return self._answer(403, about | {"X-Error-Code": "GatedRepo"})
        if not blob.lfs:
            return self._content(blob, about)
        about |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(blob.size)}
        where = f"{self.hub.storage}/storage/{repo}/{commit}/{name}"
        return self._answer(302, about | {"Location": where})

    def _json(self, value: object, headers: Mapping[str, str] | None = None) -> None:
        kind = {"Content-Type": "application/json"}
        self._answer(200, kind | dict(headers or {}), json.dumps(value).encode())

    def _content(self, blob: _Blob, headers: Mapping[str, str]) -> None:
        body = blob.path.read_bytes()
        about = {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes", **headers}
        wanted = self.headers.get("Range")
        if wanted is None:
            return self._answer(200, about, body)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, end = int(first), int(last or len(body) - 1)
        if start >= len(body):
            return self._answer(416, about | {"Content-Range": f"bytes */{len(body)}"})
        about["Content-Range"] = f"bytes {start}-{end}/{len(body)}"
        return self._answer(206, about, body[start : end + 1])

    def _answer(self, status: int, headers: Mapping[str, str], body: bytes = b"") -> None:
        fault = self.fault or Fault("")
        body = body if fault.content is None else fault.content
        length = len(body) if fault.length is None else fault.length
        ranged, known = self.headers.get("Range"), self.headers.get("Authorization")
        with self.hub.lock:
            self.hub.requests.append(Request(self.command, self._logged, ranged, known, status))
        if fault.cut is not None and (self.command == "HEAD" or not body):
            return self._hang_up(reset=fault.reset)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length), **fault.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body if fault.cut is None else body[: fault.cut])
        if fault.cut is not None or fault.reset or fault.length is not None:
            self._hang_up(reset=fault.reset)
        return None

    def _hang_up(self, *, reset: bool) -> None:
        self.close_connection = True
        self.wfile.flush()
        if reset:
            never_linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, never_linger)
            os.close(self.connection.detach())
        else:
            self.connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """An empty Hub, for one test."""
    with HubServer() as server:
        yield server
