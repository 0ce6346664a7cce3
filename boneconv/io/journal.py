"""The journal of a run: lines of JSON, flushed one by one, of which a kill can tear the last."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from boneconv.io.files import machine_errors

__all__ = ["Journal", "is_same_file"]

#: What tells a file or folder from others: its inode; of a file also its size and time.
Identity = list[int]


class Journal:
    """A journal; what it says is read once, and kept up with what is written.

    Attributes:
        path: The file; it may be missing.
        key: The key of the run; None where there is no journal, or one that makes no sense.
        finished: The entries of what is complete, by name.
        out: What was about to be published as OUT, see `is_same_file`.
        beside: The same, for the file beside OUT.
        beside_name: The name of the file beside OUT, if there is one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._set([])

    @classmethod
    def of(cls, path: Path) -> Self:
        """What a journal says that another run may be writing; an unreadable one says nothing."""
        journal = cls(path)
        with suppress(OSError):
            journal._set(_parse(path.read_bytes()))
        return journal

    @property
    def is_committed(self) -> bool:
        """Whether the output was complete, flushed, and about to be published."""
        return self.out is not None

    def read(self) -> None:
        """Reads the file, and ends a line that a kill tore; raises MachineError."""
        with machine_errors(self.path):
            content = self.path.read_bytes() if self.path.exists() else b""
        self._set(_parse(content))
        if content and not content.endswith(b"\n"):
            self._write("\n")

    def start(self, key: str) -> None:
        """Begins anew; raises MachineError."""
        self._set([])
        with machine_errors(self.path):
            self.path.write_bytes(b"")
        self.append({"key": key})
        self._set([{"key": key}])

    def append(self, entry: dict[str, Any]) -> None:
        """Adds a line and flushes it; raises MachineError."""
        self._write(json.dumps(entry, sort_keys=True) + "\n")

    def commit(self, out: Path, beside: Path | None, beside_out: Path | None) -> None:
        """Notes what is about to be published; raises MachineError."""
        entry: dict[str, Any] = {"out": _identity(out)}
        if beside is not None and beside_out is not None:
            entry |= {"beside": _identity(beside), "beside_name": beside_out.name}
        self.append({"commit": entry})
        self._note_commit(entry)

    def forget(self) -> None:
        """Takes the journal for none: what it says is over. The file stays."""
        self._set([])

    def _set(self, entries: list[dict[str, Any]]) -> None:
        self.key: str | None = None
        self.finished: dict[str, dict[str, Any]] = {}
        self._note_commit({})
        if not entries or not isinstance(entries[0].get("key"), str):
            return
        self.key = entries[0]["key"]
        self.finished = {str(entry["name"]): entry for entry in entries[1:] if "name" in entry}
        for entry in entries[1:]:
            if isinstance(entry.get("commit"), dict):
                self._note_commit(entry["commit"])

    def _note_commit(self, entry: dict[str, Any]) -> None:
        self.out: Identity | None = entry.get("out")
        self.beside: Identity | None = entry.get("beside")
        name = entry.get("beside_name")
        self.beside_name: str | None = name if isinstance(name, str) and name else None

    def _write(self, text: str) -> None:
        with machine_errors(self.path), self.path.open("a", encoding="utf-8") as journal:
            journal.write(text)
            journal.flush()
            os.fsync(journal.fileno())


def is_same_file(path: Path, identity: Identity | None) -> bool:
    """Whether a path leads to what had this identity before it was renamed."""
    return identity is not None and os.path.lexists(path) and _identity(path) == identity


def _identity(path: Path) -> Identity:
    stat = path.lstat()
    return [stat.st_ino] if path.is_dir() else [stat.st_ino, stat.st_size, stat.st_mtime_ns]


def _parse(content: bytes) -> list[dict[str, Any]]:
    lines = content.decode("utf-8", errors="replace").split("\n")
    return [entry for entry in map(_parse_line, lines) if entry is not None]


def _parse_line(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
