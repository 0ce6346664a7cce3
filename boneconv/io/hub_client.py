"""The process's Hub client under guard: time limits, checked headers, patience, errors of our own.

What huggingface_hub (2.4) leaves open is closed here: it makes a file name of whatever ETag the
server sends, and waits for ever on some requests and as long as the server asks on others.
"""

from __future__ import annotations

import errno
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from boneconv.errors import (
    BoneconvError,
    DiskFullError,
    FormatError,
    InputError,
    MachineError,
    MissingPathError,
    NetworkError,
    printable,
)

__all__ = ["File", "Repository", "bad_answer", "guarded_client", "patiently", "translated"]

_T = TypeVar("_T")
_ETAG = re.compile(r'(?:W/)?"?(?a:\w[\w.=+-]{0,199})"?')
_LONGEST_WAIT = 60  # seconds that a server may ask to wait before the run gives up
_WAITS = (1.0, 2.0, 4.0)  # seconds between tries, where huggingface_hub itself does not try again
_PASSING = (408, 429, 500, 502, 503, 504)
_TRANSPORTS = ("httpx2", "httpx", "httpcore2", "httpcore", "requests", "urllib3")
_HOPELESS = ("LocalProtocolError", "UnsupportedProtocol", "TooManyRedirects", "InvalidURL")
_LOG = logging.getLogger(__name__)
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class File:
    """A file of a repository, as its listing has it; ``digest`` is a Git or an LFS object id."""

    name: str
    size: int
    digest: str | None


@dataclass(frozen=True)
class Repository:
    """A repository at a revision, and the folder of the Hub client's cache that is its own."""

    id: str
    revision: str
    cache: Path

    def __str__(self) -> str:
        return f"{self.id}@{self.revision}"

    def folder(self, commit: str) -> Path:
        """Where the cache has a commit's files."""
        return self.cache / "snapshots" / commit

    def has(self, commit: str, file: File) -> bool:
        """Whether the cache holds a file's content, for this commit or for another one."""
        blob = file.digest is not None and (self.cache / "blobs" / file.digest).exists()
        return blob or (self.folder(commit) / file.name).exists()


def bad_answer(repository: Repository, expected: str, found: object) -> FormatError:
    """The error for an answer of the Hub that is malformed or means harm."""
    return FormatError(
        f"the Hub's answer about {repository} cannot be used",
        expected=expected,
        found=repr(found)[:200],
        hint="Check HF_ENDPOINT, if it is set",
    )


class _Guard:
    """Looks at every request and answer of the Hub client before the client acts on it."""

    def __init__(self, repository: Repository) -> None:
        self.repository = repository
        self.commit: str | None = None

    def on_request(self, request: Any) -> None:
        """Sets a time limit where the client set none."""
        from huggingface_hub import constants

        limits = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {
            kind: limits.get(kind) or constants.HF_HUB_DOWNLOAD_TIMEOUT
            for kind in ("connect", "read", "write", "pool")
        }

    def on_response(self, response: Any) -> None:
        """Refuses what would be a path outside the cache, another commit, or an endless wait."""
        if response.status_code in _PASSING and _asked_wait(response) > _LONGEST_WAIT:
            raise NetworkError(
                f"the Hub asks to wait {_asked_wait(response)} s (HTTP {response.status_code})",
                hint="Try again then; logging in with `hf auth login` raises the limits",
            )
        if response.request.method != "HEAD":
            return
        commit = response.headers.get("X-Repo-Commit", self.commit)
        if commit != self.commit:
            raise bad_answer(self.repository, f"commit {self.commit}", commit)
        for header in ("X-Linked-Etag", "ETag"):
            etag = response.headers.get(header)
            if etag is not None and not _ETAG.fullmatch(etag):
                raise bad_answer(self.repository, "an ETag of letters and digits", etag)


class _Notes(logging.Filter):
    """The Hub client's log: nothing that moves the cursor, and errors only when quiet."""

    def __init__(self, *, quiet: bool) -> None:
        super().__init__()
        self.lowest = logging.ERROR if quiet else logging.NOTSET

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = printable(record.getMessage()), ()
        return record.levelno >= self.lowest


@contextmanager
def guarded_client(repository: Repository, *, quiet: bool) -> Iterator[_Guard]:
    """The process's Hub client with a guard on it, for as long as the context lasts."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    guard, notes = _Guard(repository), _Notes(quiet=quiet)
    with _ONE_AT_A_TIME:
        usual = _http._GLOBAL_CLIENT_FACTORY
        handlers = logging.getLogger("huggingface_hub").handlers[:]

        def guarded() -> Any:
            client = usual()
            hooks = client.event_hooks
            client.event_hooks = {
                "request": [*hooks["request"], guard.on_request],
                "response": [*hooks["response"], guard.on_response],
            }
            return client

        set_client_factory(guarded)
        for handler in handlers:
            handler.addFilter(notes)
        try:
            yield guard
        finally:
            set_client_factory(usual)
            for handler in handlers:
                handler.removeFilter(notes)


def patiently(call: Callable[[], _T], *, quiet: bool) -> _T:
    """Calls again after a failure that may pass, a few times, no sooner than the Hub asks."""
    for wait in _WAITS:
        try:
            return call()
        except Exception as error:
            response = getattr(error, "response", None)
            if response is None and (not _is_transport(error) or type(error).__name__ in _HOPELESS):
                raise
            if response is not None and response.status_code not in _PASSING:
                raise
            pause = max(wait, 0 if response is None else _asked_wait(response))
            if not quiet:
                _LOG.warning("%s; trying again in %.0f s", printable(_reason(error)), pause)
            time.sleep(pause)
    return call()


def _asked_wait(response: Any) -> int:
    """The seconds that an answer asks to wait, by Retry-After or by the Hub's rate limit header."""
    asked = re.fullmatch(r"\s*(\d+)\s*", response.headers.get("Retry-After", ""))
    limit = re.search(r"\br\s*=\s*0\s*;\s*t\s*=\s*(\d+)", response.headers.get("RateLimit", ""))
    return max((int(found[1][:9]) for found in (asked, limit) if found), default=0)


def _is_transport(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in _TRANSPORTS


def translated(error: BaseException, repository: Repository) -> BoneconvError:
    """The error of boneconv's own for one of the Hub client, of its transport, or of the system."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        return translated(error.__cause__, repository)
    if getattr(error, "response", None) is not None:
        return _refusal(error, repository)
    if isinstance(error, UnicodeEncodeError) or type(error).__name__ == "LocalProtocolError":
        # Its text is not shown: it holds the header, and so the token.
        return InputError(
            "the token cannot be sent: it has characters that a header must not have",
            hint="Check HF_TOKEN, or log in again with `hf auth login`",
        )
    if isinstance(error, OSError) and error.errno is not None:
        return _disk_error(error, repository)
    broken = isinstance(error, OSError | RuntimeError) and not isinstance(error, RecursionError)
    if broken or _is_transport(error):
        return NetworkError(
            f"the download of {repository} failed",
            found=_reason(error),
            hint="Check the connection (and HF_ENDPOINT, if it is set) and run the command again;"
            " HF_HUB_OFFLINE=1 uses what an earlier download left in the cache",
        )
    return bad_answer(repository, "a model's description", _reason(error))


def _refusal(error: Any, repository: Repository) -> BoneconvError:
    from huggingface_hub import constants, errors

    status, repo = error.response.status_code, repository.id
    login = "log in with `hf auth login` or set HF_TOKEN"
    renew = "Make a token that may read it at the Hub's settings page, and " + login
    kind: type[BoneconvError]
    if isinstance(error, errors.GatedRepoError):
        kind, message = InputError, f"{repo} is gated, and this account has no access"
        hint = f"Ask for access at {constants.ENDPOINT}/{repo}; once it is granted, {login}"
    elif isinstance(error, errors.RepositoryNotFoundError):
        kind, message = MissingPathError, f"no file or folder {repo}, and no such repository"
        hint = f"Check the name; if the repository is private, {login}"
    elif isinstance(error, errors.RevisionNotFoundError):
        kind, message = MissingPathError, f"{repo} has no revision {repository.revision}"
        hint = f"Its branches and tags are listed at {constants.ENDPOINT}/{repo}/tree/main"
    elif isinstance(error, errors.DisabledRepoError):
        kind, message, hint = InputError, f"{repo} has been disabled on the Hub", "Use another copy"
    elif status == 401:
        kind, message, hint = InputError, "the Hub refuses the token", renew
    elif status == 403:
        kind, message, hint = InputError, f"the token may not read {repo}", renew
    elif status == 404:
        kind, message = MissingPathError, f"a file that {repository} lists is not there"
        hint = "Run the command again; if this stays, the repository is damaged"
    elif status == 429:
        kind, message = NetworkError, "the Hub's rate limit is reached"
        hint = f"Try again later; the limits are higher if you {login}"
    else:
        kind, message = NetworkError, f"the Hub failed to serve {repository}"
        hint = "Try again later; HF_HUB_OFFLINE=1 uses what an earlier download left in the cache"
    said = getattr(error, "server_message", None)
    return kind(message, found=f"HTTP {status}" + (f", {_line(said)}" if said else ""), hint=hint)


def _disk_error(error: OSError, repository: Repository) -> BoneconvError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(
            f"the disk is full; {repository} does not fit",
            path=repository.cache,
            hint="Free some space, or set HF_HUB_CACHE to a folder on another disk",
        )
    return MachineError(
        f"the cache cannot be used: {error.strerror}",
        path=error.filename or repository.cache,
        hint="Set HF_HUB_CACHE to a folder that can be written",
    )


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {_line(error)}".removesuffix(": ")


def _line(said: object) -> str:
    return " ".join(str(said).split())[:200]
