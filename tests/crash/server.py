"""A process that has boneconv loaded, and forks a process for every command it is told to run.

A fork takes milliseconds where a start of the interpreter takes half a second. Each command is a
process group of its own, with its own calls replaced by `tests.crash.shim`. Commands come as lines
of JSON on stdin, answers go as lines of JSON to stdout.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import mmap
import multiprocessing
import multiprocessing.connection
import multiprocessing.popen_fork
import multiprocessing.sharedctypes
import os
import signal
import struct
import sys
import time
from typing import Any

from tests.crash.shim import Fault, Shim

_PATIENCE = 60.0


class _Counters:
    """The number of calls and of faults, in memory that forks share."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 16)
        self._lock = multiprocessing.get_context("fork").RLock()

    def add(self, place: int) -> int:
        with self._lock:
            number = self.get(place) + 1
            struct.pack_into("q", self._memory, 8 * place, number)
        return number

    def get(self, place: int) -> int:
        return int(struct.unpack_from("q", self._memory, 8 * place)[0])


def _child(request: dict[str, Any], counters: _Counters) -> int:
    """The command itself; its exit code."""
    from boneconv.cli import run

    os.setpgid(0, 0)
    os.chdir(request["folder"])
    said = os.open(request["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(said, 1)
    os.dup2(said, 2)
    fault = Fault(**request["fault"])
    Shim(fault, lambda: counters.add(0), lambda: _note(counters)).install()
    if request["check_here"]:
        _check_here()
    return run(request["arguments"])


def _note(counters: _Counters) -> None:
    counters.add(1)


def _check_here() -> None:
    """Holds exported graphs against ONNX Runtime in this process: another would start for long."""
    from boneconv.onnx import by_patch, child

    def accept(path: Any, *, load: bool = True) -> None:
        with contextlib.redirect_stdout(None):
            child.check_rules(path)
            child._check_load(str(path))

    by_patch.accept_in_child = accept


def _run(request: dict[str, Any]) -> dict[str, Any]:
    counters = _Counters()
    begin = time.monotonic()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            code = _child(request, counters)
        except BaseException as error:  # noqa: BLE001 - it is told, and the process ends
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    with contextlib.suppress(OSError):
        os.setpgid(pid, pid)
    delay = request["fault"]["delay"]
    code = _wait(pid, delay if delay else _PATIENCE)
    struck = code is None
    if code is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return {
        "code": code,
        "calls": counters.get(0),
        "faults": counters.get(1) + (bool(delay) and code == -signal.SIGKILL),
        "hung": struck and not delay,
        "seconds": time.monotonic() - begin,
    }


def _wait(pid: int, seconds: float) -> int | None:
    """The exit code of a process; None if it has not ended in time."""
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.0005)


def main() -> None:
    """Serves until stdin ends."""
    import boneconv.cli
    import boneconv.cli.convert
    import boneconv.cli.merge
    import boneconv.cli.unmerge
    import boneconv.conversion
    import boneconv.merging
    import boneconv.unmerging

    for name in sys.argv[1:]:
        importlib.import_module(name)
    if "onnx" in sys.argv:
        import boneconv.onnx.by_patch  # noqa: F401
    gc.collect()
    gc.freeze()  # a collection in a fork would copy every page that it shares with this process
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_run(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
