"""Copying files and parts of them: without copying where the file system can share its blocks.

btrfs, XFS and others can make two files share blocks until one of them is written (a reflink);
elsewhere whole files are copied in the kernel.
"""

from __future__ import annotations

import errno
import os
import shutil
import struct
from pathlib import Path

from boneconv.io.files import Reader, Writer, machine_errors

__all__ = ["copy_file", "share_range"]

#: Requests of Linux's ``ioctl``: share a whole file's blocks, or those of a range.
_FICLONE = 0x40049409
_FICLONERANGE = 0x4020940D
_AT_ONCE = 1 << 30
_ALIGNED = 64 * 1024  # a multiple of every file system's block
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


def share_range(
    source: Reader, source_offset: int, target: Writer, offset: int, count: int
) -> range:
    """Lets a file share a range of another's blocks, where the file system can.

    Only whole blocks can be shared, and only between offsets that lie alike in their blocks.

    Args:
        source: The file that holds the bytes.
        source_offset: Where in it they start.
        target: The file that is to hold them; it is large enough.
        offset: Where in it they belong.
        count: How many.

    Returns:
        The part of ``range(offset, offset + count)`` that the target now holds; often empty.

    Raises:
        DiskFullError, MachineError: The file system could share, but failed.
    """
    start = -(-offset // _ALIGNED) * _ALIGNED
    stop = (offset + count) // _ALIGNED * _ALIGNED
    moved = source_offset - offset
    if start >= stop or moved % _ALIGNED:
        return range(offset, offset)
    wanted = struct.pack("qQQQ", source.fileno(), start + moved, stop - start, start)
    with machine_errors(target.path):
        shared = _ioctl(target.fileno(), _FICLONERANGE, wanted)
    return range(start, stop) if shared else range(offset, offset)


def _clone(source: Path, target: Path) -> bool:
    """Shares the source's blocks; false where the file system cannot."""
    with source.open("rb") as old, target.open("wb") as new:
        return _ioctl(new.fileno(), _FICLONE, old.fileno())


def _ioctl(fd: int, request: int, argument: int | bytes) -> bool:
    """Asks for what not every system and file system can do; whether it was done."""
    try:
        import fcntl
    except ImportError:
        return False
    try:
        fcntl.ioctl(fd, request, argument)
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
