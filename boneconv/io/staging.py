"""Work in progress beside its destination, published whole by a rename.

    OUT.partial/
        lock       held by the run that writes
        journal    what is complete: a line for the run's key, then a line for every finished shard
        out        the output: a folder, or a file whose name ends as OUT's (out.safetensors)
        old        what OUT was, while --force replaces it

OUT is absent or whole at every instant. An error in the input removes OUT.partial; a failure of the
machine, an interrupt or a kill leaves it, and the next run with the same key goes on from there.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from boneconv.errors import (
    CheckFailedError,
    DiskFullError,
    InputError,
    OutputExistsError,
    UsageError,
)
from boneconv.io.files import machine_errors, sync_folder
from boneconv.io.lock import Lock

__all__ = ["Staging", "check_free", "nearest_folder", "require_space"]

_OWN = {"lock", "journal", "out", "old", "beside"}


class Staging:
    """The OUT.partial of one run; a context manager.

    Attributes:
        target: Where to write: a folder that exists, or the path of a file.
        beside: Where to write what is published beside OUT.
        finished: What the journal of an earlier run with the same key says is complete.
    """

    def __init__(
        self,
        out: Path,
        *,
        key: str,
        is_file: bool,
        force: bool = False,
        beside: Path | None = None,
    ) -> None:
        """Opens or resumes OUT.partial.

        Args:
            out: The destination.
            key: Digest of all that determines the output; a journal with another is discarded.
            is_file: Whether OUT is a file rather than a folder.
            force: Whether an existing OUT may be replaced.
            beside: A file that is published beside OUT, right before it.

        Raises:
            OutputExistsError: OUT, or the file beside it, exists and ``force`` was not given.
            LockedError: Another process is writing OUT.
            MachineError: OUT.partial cannot be made.
        """
        check_free(out, force=force, beside=beside)
        self.out = out
        self.root = _partial(out)
        self.target = _target(out, is_file=is_file)
        self.beside = self.root / "beside"
        self._beside_out = beside
        with machine_errors(out):
            self.root.mkdir(parents=True, exist_ok=True)
        self._require_own_folder()
        self._lock = Lock(self.root / "lock")
        self._old = self.root / "old"
        self._journal = self.root / "journal"
        try:
            self._restore_old()
            check_free(out, force=force, beside=beside)
            self.finished = self._resume_or_start(key)
            if not is_file:
                self.target.mkdir(exist_ok=True)
        except BaseException:
            self._lock.release()
            raise

    def record(self, name: str, entry: dict[str, Any]) -> None:
        """Notes in the journal that a part of the output is complete and flushed."""
        self._append({"name": name, **entry})

    def publish(self) -> None:
        """Flushes the output's folders and renames it to OUT; raises MachineError."""
        with machine_errors(self.out):
            if self._beside_out is not None:
                self.beside.replace(self._beside_out)
            if self.target.is_dir():
                for folder in (self.target, *(p for p in self.target.rglob("*") if p.is_dir())):
                    sync_folder(folder)
                if self.out.exists():
                    self.out.rename(self._old)
                self.target.rename(self.out)
            else:
                self.target.replace(self.out)
            sync_folder(self.out.parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is not None:
                self._restore_old()
            if error is None or isinstance(error, InputError | CheckFailedError):
                shutil.rmtree(self.root, ignore_errors=True)
        finally:
            self._lock.release()

    def _require_own_folder(self) -> None:
        """Work in progress is removed in the end: that must not hit somebody else's folder."""
        if not {path.name for path in self.root.iterdir()} <= {*_OWN, self.target.name}:
            raise OutputExistsError(
                "this folder would be used for work in progress, but holds other files",
                path=self.root,
                hint="Move it away, or choose another place for the output",
            )

    def _restore_old(self) -> None:
        """Puts back what a run with --force had moved aside before it was killed."""
        if self._old.exists():
            with machine_errors(self.out):
                if self.out.exists():
                    _remove(self._old)
                else:
                    self._old.rename(self.out)

    def _resume_or_start(self, key: str) -> dict[str, dict[str, Any]]:
        """What an earlier run with the same key finished; otherwise a new start."""
        with machine_errors(self._journal):
            text = b"" if not self._journal.exists() else self._journal.read_bytes()
        lines = text.decode("utf-8", errors="replace").split("\n")
        entries = [entry for entry in map(_parse_line, lines) if entry is not None]
        if entries and entries[0].get("key") == key:
            if not text.endswith(b"\n"):
                self._write("\n")  # a kill tore the last line
            return {str(entry["name"]): entry for entry in entries[1:] if "name" in entry}
        with machine_errors(self.root):
            _remove(self.target)
            self._journal.write_bytes(b"")
        self._append({"key": key})
        return {}

    def _append(self, entry: dict[str, Any]) -> None:
        self._write(json.dumps(entry, sort_keys=True) + "\n")

    def _write(self, text: str) -> None:
        with machine_errors(self._journal), self._journal.open("a", encoding="utf-8") as journal:
            journal.write(text)
            journal.flush()
            os.fsync(journal.fileno())


def require_space(out: Path, nbytes: int) -> None:
    """Raises DiskFullError unless ``nbytes`` fit where OUT goes, counting what OUT.partial has."""
    place = nearest_folder(out)
    with machine_errors(place):
        free = shutil.disk_usage(place).free
        free += sum(map(_tree_size, {_target(out, is_file=is_file) for is_file in (False, True)}))
    if free < nbytes:
        raise DiskFullError(
            "not enough room for the output",
            path=out,
            expected=f"{nbytes:,} bytes free",
            found=f"{free:,}",
            hint="Free some space, or write to another disk",
        )


def check_free(out: Path, *, force: bool, beside: Path | None = None) -> None:
    """Raises OutputExistsError if OUT may not be replaced, UsageError if it has no name."""
    if out.name in ("", ".."):
        raise UsageError("the output needs a name of its own", path=out)
    for path in (out, beside):
        if path is not None and os.path.lexists(path) and not force:
            raise OutputExistsError(
                "the output exists already",
                path=path,
                hint="Choose another place, or give --force to replace it",
            )


def nearest_folder(path: Path) -> Path:
    """The folder that a new file's disk is known by: the first one above it that exists."""
    return next(folder for folder in path.absolute().parents if folder.exists())


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _target(out: Path, *, is_file: bool) -> Path:
    """Where the output is made; a file keeps its suffix, by which it can be read there."""
    return _partial(out) / (f"out{out.suffix}" if is_file else "out")


def _parse_line(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _tree_size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_blocks * 512 if hasattr(path.stat(), "st_blocks") else 0
    return sum(_tree_size(child) for child in path.iterdir()) if path.is_dir() else 0
