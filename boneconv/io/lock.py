"""A lock on a file that a dead process cannot hold: the system releases it with the process."""

from __future__ import annotations

import os
from pathlib import Path

from boneconv.errors import LockedError
from boneconv.io.closing import Closing
from boneconv.io.files import machine_errors

__all__ = ["Lock"]


class Lock(Closing):
    """Holds a lock file exclusively, from construction to `close`.

    Raises:
        LockedError: Another process holds it.
        MachineError: The file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with machine_errors(path):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if not _try_lock(self._fd) or not self._is_current():
            os.close(self._fd)
            raise LockedError(
                "another run is writing this output",
                path=path.parent,
                hint="Wait for it to finish, or stop it and run the command again",
            )

    def _is_current(self) -> bool:
        """Whether the locked file still lies at the path; its last holder may have removed it."""
        try:
            return os.path.samestat(os.fstat(self._fd), self.path.stat())
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Lets go of the lock; the file stays."""
        os.close(self._fd)


def _try_lock(fd: int) -> bool:
    try:
        import fcntl
    except ImportError:
        return _try_lock_windows(fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _try_lock_windows(fd: int) -> bool:
    import msvcrt

    try:
        msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    except OSError:
        return False
    return True
