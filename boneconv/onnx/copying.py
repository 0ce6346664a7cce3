"""Copying large files: without copying where the file system can share, in the kernel elsewhere."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from boneconv.io.files import machine_errors

__all__ = ["copy_file"]

#: ``ioctl`` request of Linux that makes one file share another's blocks until either is written.
_FICLONE = 0x40049409
_AT_ONCE = 1 << 30
_UNSUPPORTED = (
    errno.EOPNOTSUPP,
    errno.ENOTTY,
    errno.EXDEV,
    errno.EINVAL,
    errno.ENOSYS,
    errno.EPERM,
    errno.EBADF,
)


def copy_file(source: Path, target: Path) -> None:
    """Copies a file's bytes, links followed; raises DiskFullError or MachineError."""
    with machine_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if not (_clone(source, target) or _copy_in_kernel(source, target)):
            shutil.copyfile(source, target)


def _clone(source: Path, target: Path) -> bool:
    """Shares the source's blocks; false where the file system cannot."""
    try:
        import fcntl
    except ImportError:
        return False
    with source.open("rb") as old, target.open("wb") as new:
        try:
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return False
            raise
    return True


def _copy_in_kernel(source: Path, target: Path) -> bool:
    """Copies by ``copy_file_range``; false where there is no such call for these files."""
    if not hasattr(os, "copy_file_range"):
        return False
    with source.open("rb") as old, target.open("wb") as new:
        left = os.fstat(old.fileno()).st_size
        while left:
            try:
                count = os.copy_file_range(old.fileno(), new.fileno(), min(left, _AT_ONCE))
            except OSError as error:
                if error.errno in _UNSUPPORTED:
                    return False
                raise
            if count == 0:
                return False
            left -= count
    return True
