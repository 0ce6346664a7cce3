"""Cutting planned tensors into segments: pieces of work that any worker can do alone.

A segment of a merged tensor is a run of rows that holds whole blocks of the adapter and, before and
after the merge, whole digest leaves; so its bytes and its digests do not depend on which worker
does it, or in which order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from boneconv.config import Axis, Variant
from boneconv.digest import LEAF
from boneconv.dtypes import FLOATS
from boneconv.engine.plan import Action, PlannedShard, PlannedTensor

__all__ = ["Segment", "segments_of"]

#: Segments are about this many bytes of output: small enough to balance, large enough to be cheap.
_TARGET = 32 * LEAF


@dataclass(frozen=True)
class Segment:
    """Consecutive rows of a tensor.

    Attributes:
        tensor: The tensor.
        offset: Where the tensor starts in its output file.
        first_row: The first row.
        rows: How many rows.
        row_elements: Elements of a row; a tensor that no kernel computes counts as one column.
    """

    tensor: PlannedTensor
    offset: int
    first_row: int
    rows: int
    row_elements: int

    @property
    def nbytes(self) -> int:
        """Bytes of the segment in the output."""
        return self.row_bytes * self.rows

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in the output."""
        return _row_bytes(self.tensor.nbytes, self.tensor)

    @property
    def start(self) -> int:
        """Where the segment starts in its output file."""
        return self.offset + self.first_row * self.row_bytes

    def chunks(self, rows: int) -> list[tuple[int, int]]:
        """Runs of at most ``rows`` rows, in order: the first row of each and how many it has."""
        end = self.first_row + self.rows
        return [(first, min(rows, end - first)) for first in range(self.first_row, end, rows)]


def segments_of(shard: PlannedShard) -> Iterator[Segment]:
    """The segments of a shard, in the order of their bytes; none for empty tensors."""
    for tensor in shard.tensors:
        total, row_elements = _rows(tensor)
        if total == 0 or row_elements == 0:
            continue
        step = _rows_per_segment(tensor, total)
        for first in range(0, total, step):
            rows = min(step, total - first)
            yield Segment(tensor, shard.offsets[tensor.name], first, rows, row_elements)


def _rows(tensor: PlannedTensor) -> tuple[int, int]:
    if tensor.action is Action.MERGE or tensor.kernel is not None:
        return tensor.kernel_shape
    if tensor.dtype not in FLOATS:
        return tensor.nbytes, 1
    return math.prod(tensor.shape), 1


def _row_bytes(nbytes: int, tensor: PlannedTensor) -> int:
    total, _ = _rows(tensor)
    return nbytes // total


def _rows_per_segment(tensor: PlannedTensor, total: int) -> int:
    unit = math.lcm(
        _block_rows(tensor),
        _rows_per_leaf(_row_bytes(tensor.source.nbytes, tensor)),
        _rows_per_leaf(_row_bytes(tensor.nbytes, tensor)),
    )
    return unit * max(1, _TARGET // (unit * _row_bytes(tensor.nbytes, tensor)))


def _rows_per_leaf(row_bytes: int) -> int:
    """The fewest rows that hold a whole number of leaves."""
    return LEAF // math.gcd(LEAF, row_bytes)


def _block_rows(tensor: PlannedTensor) -> int:
    """Rows that one block of BAT over the output axis couples."""
    return math.lcm(
        *(
            update.block.rank
            for update in tensor.updates
            if update.block.variant is Variant.BAT and update.block.axis is Axis.OUT
        )
    )
