"""BAT with one block, canonical, by Ziv's strategy: quickly, and again where that leaves doubt.

Let ``s = fl(fl(P + B) + W)`` with P = W @ B, computed in float32 (u = 2**-24) or float64
(u = 2**-53). With the Euclidean norms of each row's tile w and each column b of its block,

    |s - exact| <= delta + u |s|,        delta = (k + 1) u |w| |b| + 2 u max|B|

(k: `rounding_steps`), and a little for what underflow, or hardware that flushes it to zero, takes
away. One delta serves a slice of rows. Where everything within the bound rounds alike, s is
rounded. The rest, some 0.4 % of float32 to bfloat16, is computed again element by element. Where
the float32 bound says little (weights that lie on midpoints, as float16 ones cast to bfloat16 do),
the slice is computed in float64 first.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from boneconv.config import Axis
from boneconv.dtypes import BF16, F32, F64
from boneconv.kernels.general import block_update
from boneconv.kernels.narrow import FORMATS, widen
from boneconv.kernels.periodic import Period, add_periodic
from boneconv.kernels.products import rounding_steps, tiles_times_blocks
from boneconv.kernels.recheck import Recheck
from boneconv.kernels.rounding import largest_magnitude
from boneconv.kernels.scratch import Scratch
from boneconv.kernels.stage import Array, Stage, rank_of
from boneconv.kernels.ziv import round_to_half, round_to_single

__all__ = ["BatMerger"]

_UNITS = {F32: 2.0**-24, F64: 2.0**-53}
_UP = 1 + 2.0**-10  # covers the rounding of bounds computed in float32
_MANY = 0.015


class _Bound(NamedTuple):
    """What the error of a slice is made of: the largest |w| |b|, and the largest |s|."""

    product: float
    value: float


class BatMerger:
    """Rows of one weight through one BAT block of at most float32.

    A scale goes into the block, ``S (W @ B + B) = W @ (S B) + S B``; that it is rounded there adds
    one to k.

    Args:
        stage: The checked update.
        columns: The weight's ``in``.
        target: float32, bfloat16 or float16.

    Attributes:
        recheck: What settles elements that remain in doubt.
    """

    def __init__(self, stage: Stage, columns: int, target: np.dtype[Any]) -> None:
        self._axis = stage.axis
        self._rank = rank_of(stage)
        self._target = target
        self._stage = stage
        self._block = _scaled(stage, F32)
        self._steps = rounding_steps(self._rank) + (1 if stage.scale == 1.0 else 2)
        self._norms = _column_norms(self._block)
        self._largest = largest_magnitude(self._block)
        self._period = Period(replace(stage, block=self._block), columns)
        self._double: Array | None = None
        self.recheck = Recheck(stage, target)
        self._rate = 0.0  # share in doubt per unit of delta, as last seen in float32

    @property
    def nbytes(self) -> int:
        """What is held beside the stage's own block, at most."""
        if self._axis is Axis.OUT:
            return self._block.nbytes
        return (2 if self._target == BF16 else 4) * self._block.nbytes

    def reach(self, largest: float) -> float:
        """A bound on the merged magnitudes, given one on the rows'."""
        growth = self._rank * self._largest
        return (largest * (1 + growth) + self._largest) * 1.001

    def merge(
        self, rows: Array, first_row: int, out: Array, largest: float, scratch: Scratch
    ) -> None:
        """Merge rows ``[n, in]`` whose merged magnitudes are in the target's safe range."""
        wide = widen(rows, scratch)
        bound = _Bound(self._product(wide, first_row), self.reach(largest))
        doubtful = self._round(wide, first_row, out, bound, scratch)
        if len(doubtful):
            size = bound.product + largest + self._largest
            self.recheck.settle(wide, first_row, doubtful, size, out, scratch)

    def scratch_nbytes(self, rows: int, columns: int) -> int:
        """The work space that `merge` takes.

        bfloat16 is taken to be settled in float32; where it is not, 20 bytes a weight come on top.
        """
        bytes_each = 16 if self._target == BF16 else 40
        return bytes_each * rows * columns + self._period.nbytes(rows) + self.recheck.nbytes

    def _round(
        self, wide: Array, first_row: int, out: Array, bound: _Bound, scratch: Scratch
    ) -> Array:
        """Round what can be rounded; the flat indices of what remains in doubt."""
        if self._target == F32:
            total = self._sum(wide, first_row, F64, scratch)
            delta = self._delta(bound, F64) + 4 * _UNITS[F64] * bound.value
            return round_to_single(total, delta, out, scratch)
        form = FORMATS[self._target]
        total = scratch.take("total", wide.shape, F32)
        delta = self._delta(bound, F32)
        if self._rate * delta <= _MANY:  # a guess, on which nothing but speed depends
            total = self._sum(wide, first_row, F32, scratch)
            doubtful = round_to_half(total, delta, form, out, scratch)
            share = len(doubtful) / wide.size
            self._rate = share / delta
            if share <= _MANY:
                return doubtful
        np.copyto(total, self._sum(wide, first_row, F64, scratch), casting="unsafe")
        return round_to_half(total, self._delta(bound, F64), form, out, scratch)

    def _sum(self, wide: Array, first_row: int, dtype: np.dtype[Any], scratch: Scratch) -> Array:
        """S of the module's docstring."""
        block = self._block
        if dtype == F64:
            double = scratch.take("double", wide.shape, F64)
            np.copyto(double, wide)
            wide = double
            block = self._double_block(first_row, len(wide))
        total = scratch.take("sum" if dtype == F64 else "total", wide.shape, dtype)
        offset = first_row // self._rank * self._rank if dtype == F64 else 0
        tiles_times_blocks(wide, block, self._axis, first_row - offset, total, scratch)
        if dtype == F64 and self._stage.scale != 1.0:
            change = block_update(self._stage, first_row, wide.shape)
            np.add(total, change * self._stage.scale, out=total)
        else:
            add_periodic(total, self._period.rows(first_row, len(wide), scratch), total)
        return np.add(total, wide, out=total)

    def _double_block(self, first_row: int, count: int) -> Array:
        """The float64 blocks that some rows need, the first one in front."""
        if self._axis is Axis.IN:
            if self._double is None:
                self._double = _scaled(self._stage, F64)
            return self._double
        last = (first_row + count - 1) // self._rank
        part = self._stage.block[first_row // self._rank : last + 1]
        return _scaled(replace(self._stage, block=part), F64)

    def _product(self, wide: Array, first_row: int) -> float:
        """The largest |w| |b| of a slice, not less than the true one."""
        count, columns = wide.shape
        tiled = wide.reshape(count, columns // self._rank, self._rank)
        squares = np.vecdot(tiled, tiled)
        up = _UP + self._rank * 2.0 * _UNITS[F32]
        if self._axis is Axis.IN:
            squares = squares.max(axis=0)
            norms = np.sqrt(squares.astype(np.float64) * up + self._rank * 2.0**-125)
            return float((norms * self._norms).max())
        first, last = first_row // self._rank, (first_row + count - 1) // self._rank
        norm = np.sqrt(float(squares.max()) * up + self._rank * 2.0**-125)
        return float(norm * self._norms[first : last + 1].max())

    def _delta(self, bound: _Bound, dtype: np.dtype[Any]) -> float:
        rounding = self._steps * bound.product + 2 * self._largest
        flushed = self._rank * (1 + self._largest + bound.value) * 2.0**-120
        return rounding * _UNITS[dtype] * _UP + flushed


def _scaled(stage: Stage, dtype: np.dtype[Any]) -> Array:
    """The block times the scale, rounded to a dtype; contiguous."""
    if stage.scale == 1.0:
        return np.ascontiguousarray(stage.block, dtype)
    return np.ascontiguousarray(stage.block.astype(np.float64) * stage.scale, dtype)


def _column_norms(block: Array) -> Array:
    """The largest Euclidean norm of a column of each block: ``[blocks, r, r] -> [blocks]``."""
    squares = np.stack([np.square(b, dtype=np.float64).sum(axis=0).max() for b in block])
    return np.asarray(np.sqrt(squares) * (1 + 2.0**-40))
