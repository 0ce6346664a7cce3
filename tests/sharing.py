"""A stand-in for a file system whose files can share blocks: the ``ioctl`` copies instead."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

FICLONERANGE = 0x4020940D


@contextmanager
def sharing_file_system(error: int | None = None) -> Iterator[list[int]]:
    """Every request succeeds, or fails with an error; yields the lengths of the ranges shared."""
    shared: list[int] = []

    def ioctl(fd: int, request: int, argument: bytes) -> int:
        assert request == FICLONERANGE
        source, source_offset, count, offset = struct.unpack("qQQQ", argument)
        assert not (source_offset % 4096 or count % 4096 or offset % 4096)
        if error is not None:
            raise OSError(error, os.strerror(error))
        os.pwrite(fd, os.pread(source, count, source_offset), offset)
        shared.append(count)
        return 0

    with mock.patch("fcntl.ioctl", ioctl):
        yield shared
