"""Reading and writing at offsets, from several threads, on every platform.

Linux and macOS have positioned calls (``preadv``, ``pwrite``); where they are missing (Windows), a
lock around seek and read does the same.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from boneconv.errors import DiskFullError, FormatError, MachineError, MissingPathError
from boneconv.io.closing import Closing

__all__ = ["Reader", "Writer", "machine_errors", "replacing", "sync_file", "sync_folder"]

_BINARY = getattr(os, "O_BINARY", 0)


@contextmanager
def machine_errors(path: Path) -> Iterator[None]:
    """Maps OSError to the error tree: a full disk, a missing file, any other failure."""
    try:
        yield
    except FileNotFoundError as error:
        raise MissingPathError("no such file or folder", path=error.filename or path) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                "the disk is full", path=path, hint="Free some space and run the command again"
            ) from error
        raise MachineError(f"{error.strerror or error}", path=path) from error


class _File(Closing):
    def __init__(self, path: Path, flags: int) -> None:
        self.path = path
        self._lock = threading.Lock()
        with machine_errors(path):
            self._fd = os.open(path, flags | _BINARY, 0o666)

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


class Reader(_File):
    """A file that several threads read at offsets."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, os.O_RDONLY)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills a writable buffer of bytes from an offset.

        Raises:
            FormatError: The file ends before the buffer is full.
            MachineError: The file cannot be read.
        """
        done = 0
        while done < len(buffer):
            with machine_errors(self.path):
                count = self._read_some(buffer[done:], offset + done)
            if count == 0:
                raise FormatError(
                    "the file ends too early",
                    path=self.path,
                    expected=f"{len(buffer)} bytes at offset {offset}",
                    found=f"{done} bytes",
                    hint="Download or copy it again",
                )
            done += count

    def _read_some(self, buffer: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._fd, [buffer], offset)
        with self._lock:
            os.lseek(self._fd, offset, os.SEEK_SET)
            data = os.read(self._fd, len(buffer))
        buffer[: len(data)] = data
        return len(data)


class Writer(_File):
    """A file of a fixed size that several threads or processes write at offsets.

    Args:
        path: The file.
        size: Makes a new file of this many bytes; without it, opens one that exists.
    """

    def __init__(self, path: Path, size: int | None = None) -> None:
        super().__init__(path, os.O_RDWR | (0 if size is None else os.O_CREAT | os.O_TRUNC))
        if size is not None:
            with machine_errors(path):
                os.ftruncate(self._fd, size)

    def write_at(self, data: memoryview | bytes, offset: int) -> None:
        """Writes bytes at an offset; raises DiskFullError or MachineError."""
        view = memoryview(data)
        done = 0
        while done < len(view):
            with machine_errors(self.path):
                done += self._write_some(view[done:], offset + done)

    def sync(self) -> None:
        """Flushes the file to the disk."""
        with machine_errors(self.path):
            os.fsync(self._fd)

    def _write_some(self, view: memoryview, offset: int) -> int:
        if hasattr(os, "pwrite"):
            return os.pwrite(self._fd, view, offset)
        with self._lock:
            os.lseek(self._fd, offset, os.SEEK_SET)
            return os.write(self._fd, view)


def sync_file(path: Path) -> None:
    """Flushes a file to the disk."""
    with Writer(path) as writer:
        writer.sync()


def sync_folder(path: Path) -> None:
    """Flushes a folder's entries to the disk, where the platform can (not on Windows)."""
    if os.name == "nt":
        return
    with machine_errors(path):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a name beside a file's; what is made there is flushed and takes the file's place.

    If either fails, or the caller does, the file is as it was, and nothing lies beside it.

    Raises:
        MissingPathError: The folder is not there.
        DiskFullError, MachineError: The file cannot be written.
    """
    if not path.parent.is_dir():
        raise MissingPathError("no such folder", path=path.parent)
    draft = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
    with machine_errors(path):
        try:
            yield draft
            sync_file(draft)
            draft.replace(path)
        except BaseException:
            with suppress(OSError):
                draft.unlink()
            raise
    sync_folder(path.parent)
