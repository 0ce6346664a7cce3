"""Reading a patched graph back: what was written is there, and nothing else changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import blake3
import numpy as np

from boneconv.errors import CheckFailedError, listing
from boneconv.graphs import Graph, Placement, open_graph
from boneconv.io.files import Reader
from boneconv.io.safetensors import byte_view
from boneconv.onnx.patching.patch import Patched, Written

__all__ = ["check_patched"]

_AT_ONCE = 4 * 1024 * 1024
_HINT = "The disk may be failing; nothing was published"


def check_patched(graph: Graph, patched: Patched) -> None:
    """Holds a patched graph against the one it was made from.

    Args:
        graph: The graph that was patched.
        patched: What was written.

    Raises:
        CheckFailedError: A written weight reads back as something else, or another byte changed.
    """
    new = open_graph(patched.graph)
    for written in patched.written:
        if _digest(_place_in(new, written)) != written.digest:
            raise CheckFailedError(
                f"{written.name!r} was not written as it was worked out, to "
                f"{listing([written.place.initializer.name])}",
                path=new.path,
                hint=_HINT,
            )
    overwritten = _overwritten(patched.written)
    for location, path in graph.data_files.items():
        _check_rest(path, patched.graph.parent / location, overwritten.get(location, []))
    if patched.edited:
        _check_other_weights(graph, new, {w.place.initializer.name for w in patched.written})
    else:
        _check_rest(graph.path, patched.graph, overwritten.get("", []))


def _place_in(new: Graph, written: Written) -> Placement:
    name = written.initializer or written.place.initializer.name
    return replace(written.place, initializer=new.initializers[name])


def _digest(place: Placement) -> str:
    hasher = blake3.blake3()
    for _, block in place.blocks():
        hasher.update(byte_view(np.ascontiguousarray(block)))
    return hasher.hexdigest()


def _overwritten(written: Iterable[Written]) -> dict[str, list[tuple[int, int]]]:
    """The byte ranges of each file that were written, sorted and joined."""
    ranges: dict[str, list[tuple[int, int]]] = {}
    for each in written:
        if each.initializer is None and each.place.initializer.values is None:
            found = ranges.setdefault(each.place.initializer.location, [])
            found.extend(_ranges(each.place))
    return {location: _joined(found) for location, found in ranges.items()}


def _ranges(place: Placement) -> Iterator[tuple[int, int]]:
    initializer = place.initializer
    size, width = initializer.itemsize, initializer.matrix_shape[1]
    height, columns = place.region
    start = initializer.offset + (place.row * width + place.column) * size
    if columns == width:
        yield start, start + height * width * size
        return
    for row in range(height):
        first = start + row * width * size
        yield first, first + columns * size


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined


def _check_rest(old: Path, new: Path, overwritten: list[tuple[int, int]]) -> None:
    """Raises CheckFailedError unless a copy equals its original outside some ranges.

    The copy may be longer: what was appended to it is a weight, which is checked as one.
    """
    size = old.stat().st_size
    starts = [0, *(end for _, end in overwritten)]
    ends = [*(start for start, _ in overwritten), size]
    with Reader(old) as mine, Reader(new) as copy:
        one, other = np.empty(_AT_ONCE, np.uint8), np.empty(_AT_ONCE, np.uint8)
        for start, end in zip(starts, ends, strict=True):
            for at in range(start, end, _AT_ONCE):
                length = min(_AT_ONCE, end - at)
                mine.read_into(one[:length].data, at)
                copy.read_into(other[:length].data, at)
                if not np.array_equal(one[:length], other[:length]):
                    raise CheckFailedError(
                        "a part of the graph changed that no adapter touches",
                        path=new,
                        found=f"between bytes {at} and {at + length}",
                        hint=_HINT,
                    )


def _check_other_weights(old: Graph, new: Graph, written: set[str]) -> None:
    """The same for a message that was written anew: every other weight in it has its values."""
    for name, initializer in old.initializers.items():
        if name in written or initializer.location:
            continue
        held = new.initializers[name]
        whole = Placement(initializer, False, 0, 0, initializer.matrix_shape)
        if held.shape != initializer.shape or _digest(whole) != _digest(
            replace(whole, initializer=held)
        ):
            raise CheckFailedError(
                f"the graph's {listing([name])} changed, which no adapter touches",
                path=new.path,
                hint=_HINT,
            )
