"""Files that a worker keeps open while it works."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from boneconv.io.closing import Closing
from boneconv.io.files import Reader

__all__ = ["OpenFiles"]


class OpenFiles(Closing):
    """Opens a file when it is first read, and closes all of them in the end; a context manager."""

    def __init__(self) -> None:
        self._files = ExitStack()
        self._readers: dict[Path, Reader] = {}

    def reader(self, path: Path) -> Reader:
        """The reader of a file; raises as `Reader`."""
        if path not in self._readers:
            self._readers[path] = self._files.enter_context(Reader(path))
        return self._readers[path]

    def close(self) -> None:
        """Closes all files."""
        self._files.close()
