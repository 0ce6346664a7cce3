"""Work in progress beside its destination, published whole by a rename.

    OUT.partial/
        lock        held by the run that writes
        journal     what is complete: a line for the run's key, a line for every finished shard, and
                    last, once all is flushed, a line that tells OUT from anybody else's
        out         the output: a folder, or a file whose name ends as OUT's (out.safetensors)
        beside      a file that is published with OUT, and lies beside it
        old         what OUT was, while --force replaces it
        old-beside  what the file beside it was
        spool       what is too large for memory while OUT is made

OUT is absent or whole at every instant. An error in the input removes OUT.partial; a failure of the
machine, an interrupt or a kill leaves it, and the next run with the same key goes on from there:
also where OUT, or only the file beside it, had got its name before the kill. A publication that
fails is withdrawn.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from boneconv.errors import (
    CheckFailedError,
    DiskFullError,
    InputError,
    LockedError,
    MissingPathError,
    OutputExistsError,
    UsageError,
)
from boneconv.io.files import machine_errors, sync_file, sync_folder
from boneconv.io.journal import Journal, is_same_file
from boneconv.io.lock import Lock

__all__ = ["SPOOL", "Staging", "check_all_free", "check_free", "nearest_folder", "require_space"]

_LOCK, _JOURNAL = "lock", "journal"
#: A file in OUT.partial for what is too large for memory while OUT is made.
SPOOL = "spool"
_OWN = {_LOCK, _JOURNAL, SPOOL, "out", "old", "beside", "old-beside"}
_ATTEMPTS = 20


class Staging:
    """The OUT.partial of one run; a context manager.

    Attributes:
        target: Where to write: a folder that exists, or the path of a file.
        beside: Where to write what is published beside OUT.
        finished: What the journal of an earlier run with the same key says is complete.
        published: Whether OUT is there already: an earlier run with the same key was killed after
            it had published. There is nothing to write then.
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
                Nothing is resumed with an empty one.
            is_file: Whether OUT is a file rather than a folder.
            force: Whether an existing OUT may be replaced.
            beside: A file in OUT's folder that is published right before it.

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
        self._beside_out, self._force = beside, force
        self._old, self._old_beside = self.root / "old", self.root / "old-beside"
        self._journal = Journal(self.root / _JOURNAL)
        self._lock = self._take_lock()
        self.finished: dict[str, dict[str, Any]] = {}
        self.published = False
        self._publishing = False
        try:
            self._open(key, is_file=is_file)
        except OutputExistsError:
            if not self._journal.key:
                self._clear()
            self._lock.close()
            raise
        except BaseException:
            self._lock.close()
            raise

    def record(self, name: str, entry: dict[str, Any]) -> None:
        """Notes in the journal that a part of the output is complete and flushed."""
        self._journal.append({"name": name, **entry})

    def publish(self) -> None:
        """Flushes the output and renames it to OUT; raises MachineError and leaves no OUT then."""
        _require_free(self.out, force=self._force, beside=self._beside_out)
        beside = self._beside_out
        with machine_errors(self.out):
            _sync_tree(self.target)
            if beside is not None:
                sync_file(self.beside)
            self._journal.commit(self.target, self.beside if beside is not None else None, beside)
            sync_folder(self.root)
            sync_folder(self.out.parent)
            self._publishing = True
            try:
                self._rename()
                sync_folder(self.out.parent)
            except BaseException:
                self.withdraw()
                raise

    def withdraw(self) -> None:
        """Takes back what this run has published, where nothing was overwritten by it."""
        if self._publishing and not self.target.exists() and self._is_published():
            with suppress(OSError):
                self.out.rename(self.target)
        if self._publishing:
            self._publishing = False
            self._restore()

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
                self._restore()
            if error is None or isinstance(error, InputError | CheckFailedError):
                self._clear()
        finally:
            self._lock.close()

    def _take_lock(self) -> Lock:
        """Makes OUT.partial and locks it; a run that has just finished may remove it meanwhile."""
        for _ in range(_ATTEMPTS):
            with machine_errors(self.out):
                self.root.mkdir(parents=True, exist_ok=True)
            with suppress(MissingPathError):
                self._require_own_folder()
                return Lock(self.root / _LOCK)
        raise LockedError("other runs are writing this output", path=self.root)

    def _require_own_folder(self) -> None:
        """Work in progress is removed in the end: that must not hit somebody else's folder."""
        with machine_errors(self.root):
            names = {path.name for path in self.root.iterdir()}
        if not names <= {*_OWN, self.target.name}:
            raise OutputExistsError(
                "this folder would be used for work in progress, but holds other files",
                path=self.root,
                hint="Move it away, or choose another place for the output",
            )

    def _open(self, key: str, *, is_file: bool) -> None:
        """Finds out what an earlier run left, and goes on from it or starts anew."""
        self._journal.read()
        self._restore()
        is_published, is_same = self._is_published(), bool(key) and self._journal.key == key
        self.published = is_published and is_same
        if is_published and not is_same:
            self._journal.forget()
        if not self.published:
            _require_free(self.out, force=self._force, beside=self._beside_out)
            if not is_same:
                with machine_errors(self.root):
                    _remove(self.target)
                self._journal.start(key)
            if not is_file:
                with machine_errors(self.target):
                    self.target.mkdir(exist_ok=True)
        self.finished = self._journal.finished

    def _is_published(self) -> bool:
        """Whether OUT is what the journal says was to be published."""
        return self._journal.is_committed and is_same_file(self.out, self._journal.out)

    def _rename(self) -> None:
        if self._beside_out is not None:
            if os.path.lexists(self._beside_out):
                self._beside_out.rename(self._old_beside)
            self.beside.rename(self._beside_out)
        if self.target.is_dir() or self.out.is_dir():
            if os.path.lexists(self.out):
                self.out.rename(self._old)
            self.target.rename(self.out)
        else:
            if os.path.lexists(self.out):
                with suppress(OSError):  # a file system without hard links
                    self._old.hardlink_to(self.out)
                self._publishing = self._old.exists()
            self.target.replace(self.out)

    def _restore(self) -> None:
        """Undoes a publication that was not finished; clears away after one that was."""
        is_published = self._is_published()
        is_over = is_published or (self._journal.is_committed and not self.target.exists())
        with machine_errors(self.out):
            _put_back(self._old, self.out, wanted=not is_over)
            name = self._journal.beside_name
            if name is None:
                return
            beside = self.out.with_name(name)
            if not is_over and is_same_file(beside, self._journal.beside):
                beside.unlink()
            _put_back(self._old_beside, beside, wanted=not is_over)

    def _clear(self) -> None:
        """Removes OUT.partial; its lock last, for another run may be waiting for it."""
        with suppress(OSError):
            for path in sorted(self.root.iterdir()):
                if path.name not in (_LOCK, _JOURNAL):
                    _remove(path)
            self._journal.path.unlink(missing_ok=True)
            (self.root / _LOCK).unlink(missing_ok=True)
            self.root.rmdir()


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
    """Raises OutputExistsError if OUT may not be replaced, UsageError if it has no name.

    What a run was publishing when it was killed may be there: `Staging` knows what to do with it.
    """
    try:
        _require_free(out, force=force, beside=beside)
    except OutputExistsError:
        if Journal.of(_partial(out) / _JOURNAL).is_committed:
            return
        _tidy(_partial(out))
        raise


def check_all_free(outs: Sequence[Path], *, force: bool) -> None:
    """`check_free` for outputs that are published together.

    Where one is refused, what a killed run left beside the others that it had published is removed.
    """
    try:
        for out in outs:
            check_free(out, force=force)
    except OutputExistsError:
        for out in outs:
            _finish(out)
        raise


def _require_free(out: Path, *, force: bool, beside: Path | None) -> None:
    if out.name in ("", ".."):
        raise UsageError("the output needs a name of its own", path=out)
    for path in (out, beside):
        if path is not None and os.path.lexists(path) and not force:
            raise OutputExistsError(
                "the output exists already",
                path=path,
                hint="Choose another place, or give --force to replace it",
            )


def _finish(out: Path) -> None:
    """Removes what is left of a run that was killed after it had published OUT."""
    journal = Journal.of(_partial(out) / _JOURNAL)
    if journal.is_committed and is_same_file(out, journal.out):
        with suppress(OutputExistsError, LockedError):
            Staging(out, key="", is_file=out.is_file())
    elif os.path.lexists(out):
        _tidy(_partial(out))


def _tidy(root: Path) -> None:
    """Removes an OUT.partial that a killed run had emptied but for its lock."""
    with suppress(OSError, LockedError, MissingPathError):
        if {path.name for path in root.iterdir()} <= {_LOCK}:
            with Lock(root / _LOCK):
                (root / _LOCK).unlink()
                root.rmdir()


def nearest_folder(path: Path) -> Path:
    """The folder that a new file's disk is known by: the first one above it that exists."""
    return next(folder for folder in path.absolute().parents if folder.exists())


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _target(out: Path, *, is_file: bool) -> Path:
    """Where the output is made; a file keeps its suffix, by which it can be read there."""
    return _partial(out) / (f"out{out.suffix}" if is_file else "out")


def _put_back(old: Path, place: Path, *, wanted: bool) -> None:
    """Moves what was moved aside back, or removes it where something took its place for good."""
    if not os.path.lexists(old):
        return
    if wanted and not os.path.lexists(place):
        old.rename(place)
    else:
        _remove(old)


def _sync_tree(target: Path) -> None:
    """Flushes a file, or all files and folders of a folder."""
    if not target.is_dir():
        sync_file(target)
        return
    paths = sorted(target.rglob("*"))
    for path in paths:
        if path.is_file():
            sync_file(path)
    for folder in (target, *(path for path in paths if path.is_dir())):
        sync_folder(folder)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _tree_size(path: Path) -> int:
    """Bytes on the disk; none for what another run takes away meanwhile."""
    try:
        if path.is_dir():
            return sum(_tree_size(child) for child in path.iterdir())
        blocks: int = getattr(path.stat(), "st_blocks", 0)
    except FileNotFoundError:
        return 0
    return blocks * 512
