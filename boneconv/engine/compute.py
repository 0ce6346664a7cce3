"""Doing one segment: read a chunk, compute, round into the output's dtype, hash, write.

A chunk is a few hundred KiB, so that it and its float32 image stay in a core's cache; that matters
more for speed than anything else here. Every worker has one `Scratch` that it uses over and over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from boneconv.digest import LEAF, LeafHasher
from boneconv.dtypes import FLOAT8S, FLOATS
from boneconv.engine.plan import Action
from boneconv.engine.segments import Segment
from boneconv.errors import NonFiniteError
from boneconv.io.copying import share_range
from boneconv.io.files import Reader, Writer
from boneconv.io.safetensors import ArrayTensor, StoredTensor, Tensor, byte_view
from boneconv.io.write_behind import WriteBehind
from boneconv.kernels import Scratch, cast_rows

__all__ = ["Desk", "Leaves", "Merger", "do_segment", "larger", "read_rows"]

_CHUNK_BYTES = 256 * 1024


class Merger(Protocol):
    """What merges rows of one weight: `RowMerger` on the CPU, or its torch counterpart."""

    def preferred_rows(self) -> int:
        """How many rows to pass at a time."""
        ...

    def merge(
        self, rows: NDArray[Any], first_row: int, out: NDArray[Any], scratch: Scratch
    ) -> tuple[float, ...] | None:
        """Merges rows ``[n, in]`` of the source dtype into ``out`` of the target dtype.

        Returns what it measures, if anything; of a tensor's rows, the largest of each is kept.
        """
        ...


@dataclass(frozen=True)
class Leaves:
    """Digests of a segment's leaves, before and after.

    Attributes:
        source: Of the base's bytes (merge only).
        output: Of the written bytes.
        measures: What the merger measured, the largest of each.
    """

    source: tuple[bytes, ...]
    output: tuple[bytes, ...]
    measures: tuple[float, ...] = ()


def larger(one: tuple[float, ...], other: tuple[float, ...]) -> tuple[float, ...]:
    """The larger of each measure; one of them may be empty."""
    if not one or not other:
        return one or other
    return tuple(max(pair) for pair in zip(one, other, strict=True))


@dataclass(frozen=True)
class Desk:
    """What a worker works with.

    Attributes:
        scratch: Its work space.
        output: What it writes with.
    """

    scratch: Scratch
    output: WriteBehind

    def rows(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Where the next rows of the output are to be put."""
        room = self.output.room(math.prod(shape) * dtype.itemsize)
        return np.frombuffer(room, dtype).reshape(shape)


def do_segment(
    segment: Segment,
    reader: Reader | None,
    path: Path,
    merger: Merger | None,
    desk: Desk,
) -> Leaves:
    """Reads, computes and writes a segment.

    Args:
        segment: What to do.
        reader: The source's file; None where the source is in memory.
        path: The output file; it exists, and is as large as it will be.
        merger: For a merged tensor, what merges it.
        desk: The worker's.

    Raises:
        NonFiniteError: A value is NaN or infinite, or overflows the output's dtype.
        FormatError, MachineError: Reading or writing failed.
    """
    writer = desk.output.begin(path, segment.start)
    leaves = _compute(segment, reader, writer, merger, desk)
    desk.output.finish()
    return leaves


def _compute(
    segment: Segment,
    reader: Reader | None,
    writer: Writer,
    merger: Merger | None,
    desk: Desk,
) -> Leaves:
    if merger is not None:
        return _merge(segment, reader, merger, desk)
    is_base = segment.tensor.action in (Action.COPY, Action.CAST)
    if segment.tensor.dtype == segment.tensor.source.dtype and (
        is_base or segment.tensor.dtype not in FLOATS
    ):
        return _copy(segment, _required(reader), writer, desk)
    return _convert(segment, reader, desk)


def _merge(segment: Segment, reader: Reader | None, merger: Merger, desk: Desk) -> Leaves:
    source_hash, output_hash = LeafHasher(), LeafHasher()
    measures: tuple[float, ...] = ()
    for first, count in segment.chunks(merger.preferred_rows()):
        shape = (count, segment.row_elements)
        rows = _read(segment, reader, first, shape, desk.scratch)
        source_hash.update(byte_view(rows))  # while they are in the cache
        out = desk.rows(shape, FLOATS[segment.tensor.dtype])
        try:
            found = merger.merge(rows, first, out, desk.scratch)
        except NonFiniteError as error:
            raise _name_tensor(error, segment) from error
        measures = larger(measures, found or ())
        output_hash.update(byte_view(out))
    return Leaves(tuple(source_hash.leaves()), tuple(output_hash.leaves()), measures)


def _copy(segment: Segment, reader: Reader, writer: Writer, desk: Desk) -> Leaves:
    output_hash = LeafHasher()
    source = segment.tensor.source
    assert isinstance(source, StoredTensor)  # it has a reader
    moved = source.offset - segment.offset
    shared = share_range(reader, segment.start + moved, writer, segment.start, segment.nbytes)
    for first, count in segment.chunks(LEAF // segment.row_bytes):
        start, nbytes = segment.offset + first * segment.row_bytes, count * segment.row_bytes
        if shared:
            part = byte_view(desk.scratch.take("copy", (nbytes,), np.dtype(np.uint8)))
        else:
            part = desk.output.room(nbytes)
        reader.read_into(part, start + moved)
        output_hash.update(part)
        if shared:
            _write_around(shared, part, start, writer)
    return Leaves((), tuple(output_hash.leaves()))


def _write_around(shared: range, part: memoryview, offset: int, writer: Writer) -> None:
    """Writes what of a part the output does not hold already."""
    before = max(0, min(len(part), shared.start - offset))
    after = max(before, min(len(part), shared.stop - offset))
    if before:
        writer.write_at(part[:before], offset)
    if after < len(part):
        writer.write_at(part[after:], offset + after)


def _convert(segment: Segment, reader: Reader | None, desk: Desk) -> Leaves:
    output_hash = LeafHasher()
    from_adapter = segment.tensor.action in (Action.REPLACE, Action.ADD)
    for first, count in segment.chunks(_CHUNK_BYTES // 2):
        rows = _read(segment, reader, first, (count, 1), desk.scratch)
        out = desk.rows((count, 1), FLOATS[segment.tensor.dtype])
        try:
            cast_rows(rows, out.dtype, out, desk.scratch)
        except NonFiniteError as error:
            raise _name_tensor(error, segment) from error
        if from_adapter and not np.isfinite(out.astype(np.float64)).all():
            raise _name_tensor(NonFiniteError("NaN or infinity in the adapter"), segment)
        output_hash.update(byte_view(out))
    return Leaves((), tuple(output_hash.leaves()))


def read_rows(
    tensor: Tensor,
    reader: Reader | None,
    first: int,
    shape: tuple[int, int],
    into: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Reads consecutive rows of a tensor of a float dtype, FP8 included.

    Args:
        tensor: The tensor.
        reader: Its file; None where it is in memory.
        first: The first row.
        shape: Rows, and elements of a row.
        into: An array to fill, where the tensor is on disk; None for a new one.
    """
    if isinstance(tensor, ArrayTensor):
        begin = first * shape[1]
        return tensor.array.reshape(-1)[begin : begin + shape[0] * shape[1]].reshape(shape)
    rows = np.empty(shape, _stored_dtype(tensor)) if into is None else into
    offset = tensor.offset + first * shape[1] * rows.itemsize
    _required(reader).read_into(byte_view(rows), offset)
    return rows


def _stored_dtype(tensor: StoredTensor) -> np.dtype[Any]:
    return FLOATS.get(tensor.dtype) or FLOAT8S[tensor.dtype]


def _read(
    segment: Segment, reader: Reader | None, first: int, shape: tuple[int, int], scratch: Scratch
) -> NDArray[Any]:
    source = segment.tensor.source
    if isinstance(source, ArrayTensor):
        return read_rows(source, None, first, shape)
    return read_rows(
        source, reader, first, shape, scratch.take("rows", shape, _stored_dtype(source))
    )


def _required(reader: Reader | None) -> Reader:
    if reader is None:
        raise AssertionError("a tensor on disk is read without a reader")
    return reader


def _name_tensor(error: NonFiniteError, segment: Segment) -> NonFiniteError:
    source = segment.tensor.source
    path = None if isinstance(source, ArrayTensor) else source.path
    return error.restated(f"{segment.tensor.name!r}: {error.message}", path)
