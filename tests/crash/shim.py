"""Faults at the calls that write: every one of them counted, one of them made to fail.

`install` replaces the calls of `os` that change files or folders, and the writing that ``open``
does, in this process and those it forks. Before each call the shim counts it, in memory that all of
these processes share, and at the call of the chosen number it does what the `Fault` says.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: What changes bytes on the disk, or needs room there: a full disk can fail it.
WRITES = {"open", "write", "pwrite", "writev", "pwritev", "fsync", "fdatasync", "truncate"}
WRITES |= {"ftruncate", "mkdir", "rename", "replace", "link", "symlink", "sendfile"}
WRITES |= {"copy_file_range"}
#: What only takes away.
REMOVALS = {"unlink", "remove", "rmdir"}
#: What may do a part of what it was asked for.
PARTIAL = {"write", "pwrite"}

_BY_FD = {"write", "pwrite", "writev", "pwritev", "fsync", "fdatasync", "ftruncate"}
_CREATING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True)
class Fault:
    """What happens at a call.

    Attributes:
        kind: ``none``; ``kill``: SIGKILL for all processes, before the call; ``torn``: the same
            in the middle of it, half of the bytes written; ``kill-one``: SIGKILL for the process
            that makes the call; ``error``: the call fails; ``short``: every write does a part of
            what it was asked for; ``signal``: a signal arrives before every call, and is handled.
        at: The number of the call, from 1.
        error: The number of the error.
        trace: A file to which a line is added for every call.
        delay: Seconds after which SIGKILL hits all processes; 0 for never.
    """

    kind: str = "none"
    at: int = 0
    error: int = errno.EIO
    trace: str = ""
    delay: float = 0.0


class Shim:
    """The calls, replaced.

    Args:
        fault: What to do.
        count: Counts a call and returns its number; safe in several processes.
        hit: Notes that the fault happened.
    """

    def __init__(self, fault: Fault, count: Callable[[], int], hit: Callable[[], None]) -> None:
        self._fault, self._count, self._hit = fault, count, hit
        self._real = {name: getattr(os, name) for name in WRITES | REMOVALS if hasattr(os, name)}
        self._real_open = io.open
        self._inside = False

    def install(self) -> None:
        """Replaces the calls for good: this process is to die."""
        for name, real in self._real.items():
            setattr(os, name, self._replaced(name, real))
        io.open = builtins.open = self._open  # type: ignore[assignment]
        if self._fault.kind == "signal":
            signal.signal(signal.SIGALRM, lambda number, frame: self._hit())

    def before(self, name: str, *arguments: Any) -> None:
        """Counts a call, and lets the fault happen if it is its turn."""
        number = self._count()
        if self._fault.trace:
            self._trace(name, arguments)
        if self._fault.kind == "signal":
            os.kill(os.getpid(), signal.SIGALRM)
        if number != self._fault.at:
            return
        if self._fault.kind == "kill" or (self._fault.kind == "torn" and name not in PARTIAL):
            self._hit()
            os.killpg(os.getpgrp(), signal.SIGKILL)
        elif self._fault.kind == "kill-one":
            self._hit()
            os.kill(os.getpid(), signal.SIGKILL)
        elif self._fault.kind == "error" and (
            name in WRITES or (self._fault.error == errno.EIO and name in REMOVALS)
        ):
            self._hit()
            raise OSError(self._fault.error, os.strerror(self._fault.error))
        elif self._fault.kind == "torn":
            self._hit()
            self._inside = True

    def part(self, data: Any) -> Any:
        """What of some bytes is written: all, or a half where the fault says so."""
        view = memoryview(data).cast("B") if len(memoryview(data)) else memoryview(data)
        if self._inside:
            return view[: len(view) // 2]
        if self._fault.kind == "short":
            if len(view) > 1:
                self._hit()
            return view[: max(1, len(view) // 2)] if len(view) else view
        return data

    def after(self) -> None:
        """The end of a call that was to be cut off."""
        if self._inside:
            os.killpg(os.getpgrp(), signal.SIGKILL)

    def _replaced(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if name == "open" and not arguments[1] & _CREATING:
                return real(*arguments, **named)
            self.before(name, *arguments)
            if name in PARTIAL:
                arguments = (arguments[0], self.part(arguments[1]), *arguments[2:])
            result = real(*arguments, **named)
            self.after()
            return result

        return call

    def _open(
        self,
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        """``open``, whose writes are seen too."""
        if not set(mode) & set("wax+") or not isinstance(file, str | os.PathLike):
            return self._real_open(
                file, mode, buffering, encoding, errors, newline, closefd, opener
            )
        raw = _Raw(self, file, mode.replace("b", "").replace("t", ""), closefd, opener)
        if buffering == 0:
            return raw
        kind = io.BufferedRandom if "+" in mode else io.BufferedWriter
        buffered = kind(raw)
        if "b" in mode:
            return buffered
        text = io.TextIOWrapper(buffered, encoding, errors, newline, buffering == 1)
        text.mode = mode  # type: ignore[misc]
        return text

    def _trace(self, name: str, arguments: tuple[Any, ...]) -> None:
        line: dict[str, Any] = {"call": name, "pid": os.getpid()}
        if name in _BY_FD:
            line["inode"] = os.fstat(arguments[0]).st_ino
        elif name in ("sendfile", "copy_file_range"):
            out = arguments[0] if name == "sendfile" else arguments[1]
            line["inode"] = os.fstat(out).st_ino
        else:
            line["path"] = str(Path(arguments[0]).absolute())
            with contextlib.suppress(OSError):
                line["inode"] = Path(arguments[0]).stat().st_ino
        if name in ("rename", "replace"):
            line["to"] = str(Path(arguments[1]).absolute())
            line["tree"] = dict(_tree(Path(line["path"])))
        descriptor = self._real["open"](
            self._fault.trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600
        )
        try:
            self._real["write"](descriptor, json.dumps(line).encode() + b"\n")
        finally:
            os.close(descriptor)


class _Raw(io.FileIO):
    """A file whose every write is seen."""

    def __init__(self, shim: Shim, file: Any, mode: str, closefd: bool, opener: Any) -> None:
        shim.before("open", file)
        self._shim = shim
        super().__init__(file, mode, closefd, opener)

    def write(self, data: Any) -> int:
        self._shim.before("write", self.fileno())
        count = super().write(self._shim.part(data))
        self._shim.after()
        return count


def _tree(path: Path) -> Iterator[tuple[str, int]]:
    """The inodes of a file, or of a folder and all below it."""
    yield str(path), path.stat().st_ino
    if path.is_dir():
        for each in path.rglob("*"):
            yield str(each), each.stat().st_ino
