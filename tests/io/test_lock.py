"""A lock that one process holds, and that nobody holds once that process is dead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from boneconv.errors import LockedError, MachineError
from boneconv.io.lock import Lock

HOLD = """
import sys
from pathlib import Path
from boneconv.io.lock import Lock
lock = Lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def _holder(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_holder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with Lock(path), pytest.raises(LockedError) as caught:
        Lock(path)
    assert caught.value.exit_code == 3
    assert "another run is writing this output" in str(caught.value)


def test_a_released_lock_can_be_taken(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    Lock(path).close()
    with Lock(path):
        assert path.exists()


def test_it_holds_between_processes_and_dies_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with _holder(path) as process:
        with pytest.raises(LockedError):
            Lock(path)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
    Lock(path).close()


def test_a_lock_on_a_file_that_was_removed_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last holder removes the file between our opening and our locking of it."""
    path = tmp_path / "lock"
    real = os.open

    def open_then_remove(file: Path, *rest: int) -> int:
        fd = real(file, *rest)
        path.unlink()
        return fd

    monkeypatch.setattr(os, "open", open_then_remove)
    with pytest.raises(LockedError):
        Lock(path)


def test_a_lock_on_a_file_that_was_replaced_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock"
    real = os.open

    def open_then_replace(file: Path, *rest: int) -> int:
        fd = real(file, *rest)
        path.unlink()
        os.close(real(path, os.O_CREAT, 0o666))
        return fd

    monkeypatch.setattr(os, "open", open_then_replace)
    with pytest.raises(LockedError):
        Lock(path)


def test_a_place_that_cannot_hold_a_lock(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="directory"):
        Lock(tmp_path)


def test_windows_locks_by_its_own_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Msvcrt:
        LK_NBLCK = 2
        held = False

        @classmethod
        def locking(cls, fd: int, mode: int, count: int) -> None:
            assert (mode, count) == (2, 1)
            if cls.held:
                raise OSError("held")
            cls.held = True

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", Msvcrt)
    with Lock(tmp_path / "lock"), pytest.raises(LockedError):
        Lock(tmp_path / "lock")
