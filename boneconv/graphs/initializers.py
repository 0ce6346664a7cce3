"""A float tensor of a graph: where its bytes lie, and reading a part of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from boneconv.dtypes import FLOATS
from boneconv.io.files import Reader
from boneconv.io.safetensors import byte_view

__all__ = ["Initializer"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Initializer:
    """A float tensor that a graph holds: an initializer, or the value of a Constant node.

    Attributes:
        name: The name of the value in the graph.
        dtype: Its safetensors dtype: F64, F32, F16 or BF16.
        shape: Its shape.
        path: The file that holds its bytes, links followed.
        location: That file as the graph names it; empty for the graph's own.
        offset: Where its bytes start in the file.
        values: The values, where the graph does not store them as consecutive bytes (``int32_data``
            of half-precision tensors, single scalars); path, location and offset mean nothing then.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    location: str = ""
    offset: int = 0
    values: Array | None = field(default=None, compare=False, repr=False)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Its shape as a matrix: ``[out, the rest]``, a vector is one row, a scalar one element."""
        if len(self.shape) < 2:
            return 1, math.prod(self.shape)
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return FLOATS[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.itemsize

    def read(self) -> Array:
        """All values, in the tensor's own shape."""
        return self.rows(0, self.matrix_shape[0]).reshape(self.shape)

    def rows(self, first: int, count: int) -> Array:
        """Rows of the matrix: ``[count, columns]``, an array of its own."""
        _, columns = self.matrix_shape
        return self.block(first, 0, count, columns)

    def block(self, row: int, column: int, rows: int, columns: int) -> Array:
        """A block of the matrix: ``[rows, columns]`` from ``(row, column)``.

        The file is read where the block's rows lie, in one piece where they are whole.
        """
        height, width = self.matrix_shape
        if not (0 <= row <= row + rows <= height and 0 <= column <= column + columns <= width):
            raise IndexError(f"a block beyond the {height} x {width} of {self.name!r}")
        if self.values is not None:
            whole = self.values.reshape(height, width)
            return whole[row : row + rows, column : column + columns].copy()
        out: Array = np.empty((rows, columns), FLOATS[self.dtype])
        if out.size == 0:
            return out
        with Reader(self.path) as reader:
            self._fill(reader, out, row, column, width)
        return out

    def _fill(self, reader: Reader, out: Array, row: int, column: int, width: int) -> None:
        size = self.itemsize
        if out.shape[1] == width:
            reader.read_into(byte_view(out), self.offset + row * width * size)
            return
        for i, line in enumerate(out):
            start = (row + i) * width + column
            reader.read_into(byte_view(line), self.offset + start * size)
