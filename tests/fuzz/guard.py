"""What must hold of a reader, whatever it is given.

It returns, or raises a `BoneconvError` of exit code 1 to 3; within two seconds; with a message that
is short and moves no cursor; and it opens no file outside of the folder that it was given.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from boneconv.errors import BoneconvError

__all__ = ["LONGEST_MESSAGE", "SECONDS", "Crash", "Guard"]

SECONDS = 2.0
#: What has not come back by then is ended.
_HANGS = 10.0
LONGEST_MESSAGE = 5000


class _Hang(BaseException):
    """Not an Exception: no reader may take it for bad input."""


@dataclass(frozen=True)
class Crash:
    """How a reader failed: in one line, and where it was raised."""

    reason: str
    where: str


class Guard:
    """Runs a reader on a folder and says what it must not have done.

    There is one of a process, since what watches the files (an audit hook) cannot be taken back.
    """

    _watching: Path | None = None
    _opened: list[str]

    def __init__(self) -> None:
        self._opened = []
        self.slowest = 0.0
        sys.addaudithook(self._audit)
        on_main = threading.current_thread() is threading.main_thread()
        self._timed = on_main and hasattr(signal, "setitimer")

    def run(self, reader: Callable[[Path], object], folder: Path) -> Crash | None:
        """The crash, or None where all is well."""
        self._opened = []
        self._watching = folder
        start = time.perf_counter()
        crash = None
        try:
            self._read(reader, folder)
        except BoneconvError as error:
            crash = _unfit(error)
        except (Exception, _Hang) as error:  # noqa: BLE001 - any of them is what is looked for
            crash = Crash(f"{type(error).__name__}: {error}"[:300], _place(error))
        finally:
            self._watching = None
        taken = time.perf_counter() - start
        self.slowest = max(self.slowest, taken)
        if crash is None and taken > SECONDS:
            crash = Crash(f"took {taken:.1f} s", "")
        if crash is None and self._opened:
            crash = Crash(f"opened {self._opened[0]!r}", "")
        return crash

    def _read(self, reader: Callable[[Path], object], folder: Path) -> None:
        if not self._timed:
            reader(folder)
            return
        before = signal.signal(signal.SIGALRM, _end)
        signal.setitimer(signal.ITIMER_REAL, _HANGS)
        try:
            reader(folder)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._watching is None or event != "open":
            return
        name = arguments[0]
        if isinstance(name, int) or name is None:
            return
        path = os.path.abspath(os.fsdecode(name))  # noqa: PTH100 - links are not to be followed
        inside = path.startswith(f"{self._watching}{os.sep}") or path == str(self._watching)
        if not inside and not _is_code(path):
            self._opened.append(path)


def _end(number: int, frame: object) -> NoReturn:
    raise _Hang(f"nothing came back within {_HANGS:.0f} s")


def _is_code(path: str) -> bool:
    """Whether a file is what an import opens."""
    return path.endswith((".py", ".pyc", ".so")) or path.startswith((sys.prefix, sys.base_prefix))


def _unfit(error: BoneconvError) -> Crash | None:
    text = str(error)
    if error.exit_code not in (1, 2, 3):
        return Crash(f"exit code {error.exit_code}", _place(error))
    if not text.isprintable():
        return Crash(f"a message with control characters: {text[:300]!r}", _place(error))
    if len(text) > LONGEST_MESSAGE:
        return Crash(f"a message of {len(text)} characters: {text[:200]!r}", _place(error))
    return None


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if f"{os.sep}boneconv{os.sep}" in frame.filename]
    last = (own or list(frames))[-1]
    return f"{Path(last.filename).name}:{last.name}"
