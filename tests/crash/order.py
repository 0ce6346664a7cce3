"""What a power loss would leave: whether all was flushed before it got its name.

After a power loss, what was written and not flushed may be there or not, in any order. So every
file and folder that a rename publishes must have been flushed after its last change, and the folder
that holds the new name after the rename.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

__all__ = ["published", "read_trace", "unflushed"]

Line = dict[str, Any]

_FLUSHES = {"fsync", "fdatasync"}
_CHANGES = {"write", "pwrite", "writev", "pwritev", "ftruncate", "sendfile", "copy_file_range"}
_ENTRIES = {"open", "mkdir", "unlink", "remove", "rmdir", "symlink", "link", "rename", "replace"}


def read_trace(path: Path) -> list[Line]:
    """The calls that a shim has noted."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def published(trace: Sequence[Line]) -> list[int]:
    """The places in a trace of the renames out of a place of work."""
    return [
        place
        for place, line in enumerate(trace)
        if line["call"] in ("rename", "replace")
        and ".partial/" in line["path"]
        and ".partial/" not in line["to"]
    ]


def unflushed(trace: Sequence[Line]) -> Iterator[str]:
    """What a power loss could take from an output that has its name."""
    for rename in published(trace):
        line = trace[rename]
        for path, inode in line["tree"].items():
            flushed = _last(trace[:rename], inode, _FLUSHES)
            if flushed < max(_last(trace[:rename], inode, _CHANGES), 0):
                yield f"{path} is published unflushed"
            if flushed < max(_entered(trace[:rename], path), 0):
                yield f"the entries of {path} are published unflushed"
        parent = Path(line["to"]).parent.stat().st_ino
        if _last(trace, parent, _FLUSHES) < rename:
            yield f"the name {line['to']} is not flushed"
        if _last(trace[:rename], parent, _FLUSHES) < 0:
            yield f"the place of work of {line['to']} is not flushed"


def _last(trace: Sequence[Line], inode: int, calls: set[str]) -> int:
    """Where a file was last called for; -1 for never."""
    found = [i for i, line in enumerate(trace) if line.get("inode") == inode]
    return max((i for i in found if trace[i]["call"] in calls), default=-1)


def _entered(trace: Sequence[Line], folder: str) -> int:
    """Where something in a folder was last made, removed or renamed; -1 for never.

    A file that is opened once more has been made before: its folder does not change then.
    """
    made: set[str] = set()
    last = -1
    for place, line in enumerate(trace):
        if line["call"] not in _ENTRIES:
            continue
        for path in (line.get("path"), line.get("to")):
            if path is None or str(Path(path).parent) != folder:
                continue
            if line["call"] != "open" or path not in made:
                last = place
            made.add(path)
    return last
