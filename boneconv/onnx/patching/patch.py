"""Patching: an existing graph's weights are overwritten, its structure stays as it is.

The graph's files are copied and the adapted weights written over the copy's byte ranges, external
or inline: neither the graph's nodes nor any other byte changes. Two cases need the graph's message
to be written anew: half-precision weights that are stored one number at a time (``int32_data``),
and a head that shared its weights with the embedding and no longer does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import blake3
import numpy as np
from numpy.typing import NDArray

from boneconv.errors import UsageError, listing
from boneconv.graphs import Graph, Placement
from boneconv.io.closing import Closing
from boneconv.io.copying import copy_file
from boneconv.io.files import Writer
from boneconv.io.safetensors import byte_view
from boneconv.onnx.patching.jobs import Job
from boneconv.onnx.patching.proto import Addition, edit_proto
from boneconv.onnx.patching.values import Values, work_out

__all__ = ["Patched", "Written", "patch_graph"]


@dataclass(frozen=True)
class Written:
    """What was written to a place.

    Attributes:
        name: The tensor, as the checkpoint names it.
        place: The place, in the graph that was patched.
        digest: BLAKE3 of the place's bytes, row by row of its region.
        values: The digest of the values ``[out, in]``, by the checkpoint's shape.
        base: The digest of what they were merged from; None where nothing was merged.
        initializer: The initializer that holds them now, where it is a new one.
    """

    name: str
    place: Placement
    digest: str
    values: str
    base: str | None
    initializer: str | None = None


@dataclass
class Patched:
    """What patching wrote.

    Attributes:
        graph: The new graph's file.
        written: What was written where.
        edited: Whether the graph's message was written anew.
    """

    graph: Path
    written: list[Written] = field(default_factory=list)
    edited: bool = False


def patch_graph(
    graph: Graph,
    jobs: Sequence[Job],
    target: Path,
    advance: Callable[[int], None] = lambda nbytes: None,
) -> Patched:
    """Writes a graph with new values of some weights.

    Memory is bounded by about three times the largest of these weights, but where the graph's
    message is written anew and holds weights inline.

    Args:
        graph: The graph.
        jobs: The new values and their places.
        target: The new graph's file, in an empty folder; its external data goes beside it under the
            names that the graph gives them.
        advance: Is told how many bytes of weights are done.

    Raises:
        UsageError: A file of external data has the new graph's name.
        NonFiniteError: A value is not finite, or beyond the range of the graph's dtype.
        FormatError, DiskFullError, MachineError: Reading or writing failed.
    """
    if target.name in graph.data_files:
        raise UsageError(
            f"the graph's external data has the name of the new graph: {listing([target.name])}",
            path=graph.path,
        )
    copy_file(graph.path, target)
    for location, path in graph.data_files.items():
        copy_file(path, target.parent / location)
    with _Patch(graph, target) as patch:
        for job in jobs:
            patch.do(job)
            advance(job.planned.nbytes)
        return patch.finish()


class _Patch(Closing):
    """A copy of a graph that is being written to."""

    def __init__(self, graph: Graph, target: Path) -> None:
        self._graph, self._target = graph, target
        self._files = ExitStack()
        self._writers: dict[str, Writer] = {}
        self._replaced: dict[str, NDArray[Any]] = {}
        self._additions: list[Addition] = []
        self._patched = Patched(target)

    def close(self) -> None:
        """Closes the files."""
        self._files.close()

    def do(self, job: Job) -> None:
        """Works a tensor out, once for each dtype, and writes it to its places."""
        by_dtype: dict[str, list[Placement]] = {}
        for place in (*job.places, *job.apart):
            by_dtype.setdefault(place.initializer.dtype, []).append(place)
        for dtype, places in by_dtype.items():
            values = work_out(job.planned, dtype)
            for place in places:
                if place in job.apart:
                    self._add(job, place, values)
                else:
                    self._write(job, place, values)

    def finish(self) -> Patched:
        """Writes what needs the graph's message."""
        self._files.close()
        if self._replaced or self._additions:
            edit_proto(self._graph, self._target, self._replaced, self._additions)
            self._patched.edited = True
        return self._patched

    def _write(self, job: Job, place: Placement, values: Values) -> None:
        initializer = place.initializer
        hasher = blake3.blake3()
        oriented = place.oriented(values.array)
        for rows in place.parts():
            block = np.ascontiguousarray(oriented[rows])
            hasher.update(byte_view(block))
            if initializer.values is None:
                self._write_block(place, rows.start, block)
            else:
                self._keep_block(place, rows.start, block)
        self._note(job, place, hasher.hexdigest(), values)

    def _write_block(self, place: Placement, first: int, block: NDArray[Any]) -> None:
        """Overwrites rows of a region in the file, in one piece where they are whole."""
        initializer = place.initializer
        writer, size = self._writer(initializer.location), initializer.itemsize
        width = initializer.matrix_shape[1]
        start = (place.row + first) * width + place.column
        if block.shape[1] == width:
            writer.write_at(byte_view(block), initializer.offset + start * size)
            return
        for number, line in enumerate(block):
            writer.write_at(byte_view(line), initializer.offset + (start + number * width) * size)

    def _keep_block(self, place: Placement, first: int, block: NDArray[Any]) -> None:
        initializer = place.initializer
        whole = self._replaced.setdefault(initializer.name, initializer.read())
        matrix = whole.reshape(initializer.matrix_shape)
        top = place.row + first
        matrix[top : top + len(block), place.column : place.column + block.shape[1]] = block

    def _add(self, job: Job, place: Placement, values: Values) -> None:
        """Notes an initializer of its own for a head that shared the embedding's."""
        if not place.is_whole:
            raise UsageError(
                f"{job.planned.name!r} shares a packed weight of the graph with others: "
                f"{listing([place.initializer.name])}",
                path=self._graph.path,
                hint="Leave out --graph: the merged model is traced then",
            )
        array = np.ascontiguousarray(place.oriented(values.array)).reshape(place.initializer.shape)
        addition = Addition(place.initializer, f"{place.initializer.name}_untied", array)
        self._additions.append(addition)
        digest = blake3.blake3(byte_view(array)).hexdigest()
        self._note(job, place, digest, values, addition.name)

    def _note(
        self, job: Job, place: Placement, digest: str, values: Values, new: str | None = None
    ) -> None:
        self._patched.written.append(
            Written(job.planned.name, place, digest, values.digest, values.base, new)
        )

    def _writer(self, location: str) -> Writer:
        if location not in self._writers:
            path = self._target.parent / location if location else self._target
            self._writers[location] = self._files.enter_context(Writer(path))
        return self._writers[location]
