"""Where the external data of a graph lies, and that it lies nowhere else.

ONNX's own loader refuses symbolic links, and so does ONNX Runtime where they leave the graph's
folder; but in the Hub client's cache every file is one. Here a link may lead to another place in
the graph's folder, or to the ``blobs`` of the same repository of the cache.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from boneconv.errors import FormatError, MissingPathError, listing
from boneconv.graphs.wire import OWN_FILE

if TYPE_CHECKING:
    from onnx import TensorProto

__all__ = ["Range", "external_range", "resolve_location"]

_HINT = "Do not use this graph unless you trust where it came from"


class Range:
    """The bytes of a tensor in a file.

    Attributes:
        location: The file as the graph names it; `OWN_FILE` for the graph's own.
        path: The file itself, links followed.
        offset: Where the bytes start.
        nbytes: How many there are.
    """

    __slots__ = ("location", "nbytes", "offset", "path")

    def __init__(self, location: str, path: Path, offset: int, nbytes: int) -> None:
        self.location, self.path, self.offset, self.nbytes = location, path, offset, nbytes


def external_range(tensor: TensorProto, graph: Path, nbytes: int, sizes: dict[Path, int]) -> Range:
    """Where an external tensor lies, checked against the file's size.

    Args:
        tensor: The tensor; its ``data_location`` is EXTERNAL.
        graph: The graph's file.
        nbytes: The bytes that its dtype and shape ask for.
        sizes: The sizes of files that are known; is added to.

    Raises:
        FormatError: The location leaves the graph's folder, or the range leaves the file.
        MissingPathError: There is no such file.
    """
    entries: Mapping[str, str] = {entry.key: entry.value for entry in tensor.external_data}
    if "location" not in entries:
        raise FormatError(f"{tensor.name!r} is external, but lies in no file", path=graph)
    location = entries["location"]
    path = graph if location == OWN_FILE else resolve_location(graph, location)
    offset = _number(entries, "offset", 0, tensor.name, graph)
    length = _number(entries, "length", nbytes, tensor.name, graph)
    if path not in sizes:
        if not _is_file(path, graph, location):
            raise MissingPathError(
                f"the graph's weights are missing: it names {listing([location])}",
                path=path,
                hint="Put the file beside the graph",
            )
        sizes[path] = path.stat().st_size
    if length != nbytes:
        raise FormatError(
            f"the length of {tensor.name!r} contradicts its shape",
            path=graph,
            expected=f"{nbytes} bytes",
            found=length,
        )
    if offset + length > sizes[path]:
        raise FormatError(
            f"{tensor.name!r} lies beyond the end of {listing([location or graph.name])}",
            path=graph,
            expected=f"at most {sizes[path]} bytes",
            found=offset + length,
            hint="Download or copy it again",
        )
    return Range(location, path, offset, length)


def _is_file(path: Path, graph: Path, location: str) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        raise FormatError(
            f"the graph's weights have a name that cannot be looked up: {listing([location])}",
            path=graph,
            found=error.strerror,
        ) from error


def resolve_location(graph: Path, location: str) -> Path:
    """The file that a graph means by a location, links followed; raises FormatError."""
    pure = PurePosixPath(location)
    if (
        not location
        or pure.is_absolute()
        or ".." in pure.parts
        or "\\" in location
        or "\0" in location
        or Path(location).drive
    ):
        raise FormatError(
            f"the graph's weights lie outside its folder: {listing([location])}",
            path=graph,
            hint=_HINT,
        )
    if any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 for c in location):
        raise FormatError(
            f"the graph's weights have a name with control characters: {listing([location])}",
            path=graph,
            hint=_HINT,
        )
    folder = graph.parent
    real = Path(os.path.realpath(folder / pure))
    homes = [Path(os.path.realpath(folder)), *_blobs(folder)]
    if not any(home in real.parents for home in homes):
        raise FormatError(
            f"the graph's weights are a link that leaves its folder: {listing([location])}",
            path=graph,
            found=str(real),
            hint="Copy the file there in place of the link, if you trust where it came from",
        )
    return real


def _blobs(folder: Path) -> list[Path]:
    """The ``blobs`` beside ``snapshots/COMMIT``, where the folder lies in a cache of the Hub's."""
    real = Path(os.path.realpath(folder))
    for above in (real, *real.parents):
        if above.parent.name == "snapshots":
            return [above.parent.parent / "blobs"]
    return []


def _number(entries: Mapping[str, str], key: str, default: int, name: str, graph: Path) -> int:
    text = entries.get(key, "")
    if text == "":
        return default
    if not (text.isascii() and text.isdigit()) or len(text) > 18:
        raise FormatError(f"{name!r} has a malformed {key}", path=graph, found=listing([text]))
    return int(text)
