"""Writing a run of bytes while the next ones are made, past the page cache where that can be.

Direct writes (``O_DIRECT``) spare the copy into the page cache, its allocation and the later flush
of every page, which together cost more processor time than a merge's arithmetic; and they leave in
the cache what other programs keep there. They want memory, offsets and lengths in whole blocks:
what sticks out at the ends of a run is written the ordinary way, and so is all of it where the
system or the file system knows no direct writes.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from boneconv.io.closing import Closing
from boneconv.io.files import Writer, machine_errors

__all__ = ["WriteBehind"]

_BLOCK = 4096
_BUFFER = 1 << 20
_AHEAD = 3  # buffers that may wait to be written, so that a slow write holds nobody up
_WORTHWHILE = 1 << 18  # less than this is written the ordinary way
_NO_BUFFER = memoryview(b"")
_UNASKED, _REFUSED = -1, -2
_REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)


class _DirectWriter(Writer):
    """A file that exists, written at offsets; whole blocks of it past the page cache."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._direct = _UNASKED

    def write_run(self, data: memoryview, offset: int) -> None:
        """Writes bytes whose address lies in its block as the offset does; raises as `write_at`."""
        before = min(-offset % _BLOCK, len(data))
        blocks = (len(data) - before) // _BLOCK * _BLOCK
        if blocks < _WORTHWHILE:
            before = blocks = 0
        self.write_at(data[:before], offset)
        with machine_errors(self.path):
            direct = self._write_blocks(data[before : before + blocks], offset + before)
        done = before + direct
        self.write_at(data[done:], offset + done)

    def close(self) -> None:
        """Closes the file."""
        self._close_direct()
        super().close()

    def _write_blocks(self, data: memoryview, offset: int) -> int:
        """Writes whole blocks, or fewer bytes where the file system refuses; how many."""
        done = 0
        if self._direct == _UNASKED and len(data):
            self._direct = _open_direct(self.path)
        while self._direct >= 0 and done < len(data):
            try:
                done += os.pwrite(self._direct, data[done:], offset + done)
            except OSError as error:
                if error.errno not in _REFUSALS:
                    raise
                self._close_direct()
        return done

    def _close_direct(self) -> None:
        fd, self._direct = self._direct, _REFUSED
        if fd >= 0:
            os.close(fd)


def _open_direct(path: Path) -> int:
    """A descriptor for direct writes, or `_REFUSED`."""
    if not (hasattr(os, "O_DIRECT") and hasattr(os, "pwrite")):
        return _REFUSED
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        return _REFUSED


class WriteBehind(Closing):
    """Writes runs of consecutive bytes while the caller makes the next ones; a context manager.

    One run at a time: `begin`, as many `room` as it takes, `finish`.
    """

    def __init__(self) -> None:
        self._files = ExitStack()
        self._writers: dict[Path, _DirectWriter] = {}
        self._thread = ThreadPoolExecutor(1, "boneconv-write")
        self._pending: deque[tuple[Future[None], memoryview]] = deque()
        self._spare: list[memoryview] = []
        self._writer: _DirectWriter | None = None
        self._buffer = _NO_BUFFER
        self._start = 0  # the buffer's place in the file
        self._sent = self._end = 0  # the part of the buffer that is yet to be written

    def close(self) -> None:
        """Waits for what is being written, and closes all files."""
        self._thread.shutdown()
        self._files.close()

    def begin(self, path: Path, offset: int) -> Writer:
        """Starts a run at an offset of a file, which exists; returns that, raises as `Writer`."""
        if path not in self._writers:
            self._writers[path] = self._files.enter_context(_DirectWriter(path))
        self._writer = self._writers[path]
        self._sent = self._end = offset % _BLOCK
        self._start = offset - self._sent
        return self._writer

    def room(self, nbytes: int) -> memoryview:
        """Where the run's next bytes are to be put, before the next call.

        Raises:
            DiskFullError, MachineError: What came before could not be written.
        """
        if self._end + nbytes > len(self._buffer):
            self._turn(nbytes)
        begin, self._end = self._end, self._end + nbytes
        return self._buffer[begin : self._end]

    def finish(self) -> None:
        """Ends the run when all of it is written; raises as `room`."""
        self._send(self._end)
        self._buffer = _NO_BUFFER
        self._sent = self._end = 0
        self._wait(0)

    def _turn(self, nbytes: int) -> None:
        """Sends the whole blocks, and goes on in another buffer with what is left."""
        self._wait(_AHEAD - 1)
        old, new = self._buffer, self._new_buffer(2 * _BLOCK + max(_BUFFER - _BLOCK, nbytes))
        whole = max(self._end // _BLOCK * _BLOCK, self._sent)
        moved = whole // _BLOCK * _BLOCK
        new[whole - moved : self._end - moved] = old[whole : self._end]
        self._send(whole)
        self._buffer = new
        self._start += moved
        self._sent, self._end = whole - moved, self._end - moved

    def _send(self, stop: int) -> None:
        """Has the buffer written up to a place in it, and gives it away."""
        data, offset = self._buffer[self._sent : stop], self._start + self._sent
        assert self._writer is not None
        if len(data) < _WORTHWHILE:
            self._writer.write_at(data, offset)
            if self._buffer:
                self._spare.append(self._buffer)
        else:
            written = self._thread.submit(self._writer.write_run, data, offset)
            self._pending.append((written, self._buffer))

    def _wait(self, count: int) -> None:
        """Waits until at most so many buffers are being written."""
        while len(self._pending) > count:
            written, buffer = self._pending.popleft()
            written.result()
            self._spare.append(buffer)

    def _new_buffer(self, nbytes: int) -> memoryview:
        while self._spare:
            buffer = self._spare.pop()
            if len(buffer) >= nbytes:
                return buffer
        return _aligned(nbytes)


def _aligned(nbytes: int) -> memoryview:
    """Bytes that begin at a block's start."""
    held = np.empty(nbytes + _BLOCK, np.uint8)
    begin = -held.ctypes.data % _BLOCK
    return held.data[begin : begin + nbytes]
