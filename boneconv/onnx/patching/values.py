"""The values that a graph's weights get: the canonical merge, rounded into the graph's dtype."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from boneconv.digest import LeafHasher, tensor_digest
from boneconv.dtypes import FLOATS
from boneconv.engine.plan import PlannedTensor
from boneconv.engine.station import new_merger
from boneconv.errors import NonFiniteError
from boneconv.graphs import matrix_shape
from boneconv.io.files import Reader
from boneconv.io.safetensors import ArrayTensor, StoredTensor, byte_view
from boneconv.kernels import Scratch, cast_rows

__all__ = ["Values", "work_out"]

_CHUNK = 1 << 17


@dataclass(frozen=True)
class Values:
    """New values of a weight.

    Attributes:
        array: ``[out, in]`` of the graph's dtype.
        digest: Their digest, by the checkpoint's shape (`boneconv.digest`).
        base: The digest of what they were merged from; None where nothing was merged.
    """

    array: NDArray[Any]
    digest: str
    base: str | None


def work_out(planned: PlannedTensor, dtype: str) -> Values:
    """Merges or casts a planned tensor from the base's own values, rounding once.

    Args:
        planned: A tensor that is merged, replaced or added.
        dtype: The graph's safetensors dtype, which the planned one is not asked for.

    Raises:
        NonFiniteError: A value is NaN or infinite, or beyond the dtype's range.
        ShapeError, FormatError, MachineError: The input is bad, or cannot be read.
    """
    planned = replace(planned, dtype=dtype)
    out = np.empty(matrix_shape(planned.shape), FLOATS[dtype])
    try:
        base = None
        if planned.updates:
            base = _merge(planned, out)
        else:
            _cast(planned, out)
    except NonFiniteError as error:
        path = planned.source.path if isinstance(planned.source, StoredTensor) else None
        known = repr(planned.name) in error.message
        message = error.message if known else f"{planned.name!r}: {error.message}"
        raise error.restated(message, error.path or path) from error
    hasher = LeafHasher()
    hasher.update(byte_view(out))
    return Values(out, tensor_digest(dtype, planned.shape, hasher.leaves()), base)


def _merge(planned: PlannedTensor, out: NDArray[Any]) -> str:
    """Fills ``out`` with the merged rows; the digest of the rows they were merged from."""
    merger, scratch, hasher = new_merger(planned), Scratch(), LeafHasher()
    step = merger.preferred_rows()
    for first, rows in _chunks(planned, out.shape, step):
        hasher.update(byte_view(rows))
        merger.merge(rows, first, out[first : first + len(rows)], scratch)
    return tensor_digest(planned.source.dtype, planned.source.shape, hasher.leaves())


def _cast(planned: PlannedTensor, out: NDArray[Any]) -> None:
    scratch = Scratch()
    step = max(1, _CHUNK // max(1, out.shape[1]))
    for first, rows in _chunks(planned, out.shape, step):
        part = out[first : first + len(rows)]
        cast_rows(rows, out.dtype, part, scratch)
        if not np.isfinite(part.astype(np.float32)).all():
            raise NonFiniteError("NaN or infinity in the adapter")


def _chunks(
    planned: PlannedTensor, shape: tuple[int, int], step: int
) -> Iterator[tuple[int, NDArray[Any]]]:
    """The source's rows, some at a time, with the number of the first."""
    source, (rows, columns) = planned.source, shape
    if isinstance(source, ArrayTensor):
        whole = np.ascontiguousarray(source.array).reshape(shape)
        for first in range(0, rows, step):
            yield first, whole[first : first + step]
        return
    dtype = FLOATS[source.dtype]
    buffer: NDArray[Any] = np.empty((min(step, rows), columns), dtype)
    with Reader(source.path) as reader:
        for first in range(0, rows, step):
            part = buffer[: min(step, rows - first)]
            reader.read_into(byte_view(part), source.offset + first * columns * dtype.itemsize)
            yield first, part
