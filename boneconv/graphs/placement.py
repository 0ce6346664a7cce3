"""Where a weight of a checkpoint lies in a graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from boneconv.dtypes import FLOATS
from boneconv.graphs.initializers import Initializer

__all__ = ["BLOCK_BYTES", "Placement"]

Array = NDArray[Any]

#: About how many bytes of an initializer are read or written at a time.
BLOCK_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class Placement:
    """A region of an initializer that holds a weight W, seen as a matrix ``[out, in]``.

    Attributes:
        initializer: The initializer, seen as a matrix too (`Initializer.matrix_shape`).
        transposed: Whether it holds W^T.
        row: The initializer's row that the region starts at.
        column: The initializer's column that the region starts at.
        shape: ``(out, in)`` of W; the region is ``[in, out]`` where it is transposed.
    """

    initializer: Initializer
    transposed: bool
    row: int
    column: int
    shape: tuple[int, int]

    @property
    def region(self) -> tuple[int, int]:
        """Rows and columns that it takes of the initializer."""
        return (self.shape[1], self.shape[0]) if self.transposed else self.shape

    @property
    def is_whole(self) -> bool:
        """Whether W is the whole initializer, not a slice of a packed one."""
        return self.region == self.initializer.matrix_shape

    def read(self) -> Array:
        """W as the graph holds it: ``[out, in]`` of the initializer's dtype."""
        found = self.initializer.block(self.row, self.column, *self.region)
        return np.ascontiguousarray(found.T) if self.transposed else found

    def blocks(self) -> Iterator[tuple[slice, Array]]:
        """The region, some rows of it at a time: which rows, and their values."""
        _, width = self.region
        for part in self.parts():
            count = part.stop - part.start
            yield part, self.initializer.block(self.row + part.start, self.column, count, width)

    def parts(self) -> Iterator[slice]:
        """The region's rows, in runs of about `BLOCK_BYTES`."""
        height, width = self.region
        step = max(1, BLOCK_BYTES // max(1, width * self.initializer.itemsize))
        for first in range(0, height, step):
            yield slice(first, min(height, first + step))

    def oriented(self, weight: Array) -> Array:
        """A weight ``[out, in]`` as the region holds it: a view."""
        return weight.T if self.transposed else weight

    def holds(self, weight: Array) -> bool:
        """Whether the region's bytes are those of a weight ``[out, in]`` of its dtype."""
        wanted = bits(self.oriented(weight))
        return all(np.array_equal(bits(found), wanted[rows]) for rows, found in self.blocks())

    def overlaps(self, other: Placement) -> bool:
        """Whether the regions of two placements share an element."""
        if self.initializer.name != other.initializer.name:
            return False
        (height, width), (their_height, their_width) = self.region, other.region
        return (
            self.row < other.row + their_height
            and other.row < self.row + height
            and self.column < other.column + their_width
            and other.column < self.column + width
        )


def bits(array: Array) -> Array:
    """Floating values as unsigned integers, which compare as bytes do."""
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))


def cast(array: Array, dtype: str) -> Array:
    """Values rounded to another float dtype, to nearest even; beyond its range is infinity."""
    with np.errstate(all="ignore"):
        return array.astype(FLOATS[dtype], copy=False)
