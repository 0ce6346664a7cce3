"""Bone and mini in one float32 addition, canonical.

``s = fl(w + b)`` is the sum correctly rounded to float32. A float32 target is done. For a 16-bit
target, s and the exact sum round alike unless s is a midpoint of the target: midpoints are float32
numbers, and rounding is monotone. Only where s is a midpoint is the rounding error of the addition
needed, and only its sign.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from boneconv.dtypes import BF16, F16, F32
from boneconv.kernels.expansion import two_sum
from boneconv.kernels.narrow import FORMATS, HalfFormat, widen
from boneconv.kernels.periodic import Period, add_periodic
from boneconv.kernels.rounding import largest_magnitude
from boneconv.kernels.scratch import Scratch
from boneconv.kernels.stage import Array, Stage

__all__ = ["AdditiveMerger", "add_once"]

_FEW = 32


class AdditiveMerger:
    """Rows of one weight plus one Bone or mini block of at most float32, scale 1.

    Args:
        stage: The checked update.
        columns: The weight's ``in``.
        source: float32, float16 or bfloat16.
        target: One of the same.
    """

    def __init__(
        self, stage: Stage, columns: int, source: np.dtype[Any], target: np.dtype[Any]
    ) -> None:
        self.stage = stage
        self._period = Period(stage, columns)
        self._largest = largest_magnitude(stage.block)
        self._brief = {source, target, BF16} == {BF16} and _is_bfloat16(stage.block)
        self._halves = {source, target, stage.block.dtype} == {F16}

    @property
    def nbytes(self) -> int:
        """What is held beside the stages' own blocks."""
        return 0

    def reach(self, largest: float) -> float:
        """A bound on the merged magnitudes, given one on the rows'."""
        return (largest + self._largest) * 1.001

    def scratch_nbytes(self, rows: int, columns: int) -> int:
        """The work space that `merge` takes."""
        return 12 * rows * columns + self._period.nbytes(rows)

    def merge(
        self, rows: Array, first_row: int, out: Array, largest: float, scratch: Scratch
    ) -> None:
        """Merge rows ``[n, in]`` whose merged magnitudes are in the target's safe range."""
        tile = self._period.rows(first_row, len(rows), scratch)
        exact = self._brief or (self._halves and largest + self._largest < 1.0)
        add_once(rows, tile, out, scratch, sums_are_exact=exact)


def add_once(
    rows: Array, tile: Array, out: Array, scratch: Scratch, *, sums_are_exact: bool = False
) -> None:
    """Rows plus a period of float32 numbers, rounded once.

    Args:
        rows: ``[n, in]``, at most float32, their sums within the target's safe range.
        tile: ``[n, p]`` float32 without -0; column j gets column ``j mod p``.
        out: ``[n, in]`` of the target dtype.
        scratch: Work space.
        sums_are_exact: No float32 sum that is a midpoint of the target can be inexact.
    """
    wide = widen(rows, scratch)
    if out.dtype == F32:
        add_periodic(wide, tile, out)
        return
    form = FORMATS[out.dtype]
    total = scratch.take("total", rows.shape, F32) if wide is rows else wide
    bits = out.view(np.uint16)
    add_periodic(wide, tile, total)
    aligned = form.align(total, total)
    if sums_are_exact:
        form.store_even(aligned, bits, scratch)
        return
    low = scratch.take("low", rows.shape, np.uint16)
    form.store(aligned, bits, scratch, low)
    ties = _zeros(low)
    if len(ties):
        i, j = np.divmod(ties, rows.shape[1])
        addends = tile[i, j % tile.shape[1]]
        flat = bits.reshape(-1)
        settle = _settle if len(ties) > _FEW else _settle_few
        flat[ties] = settle(rows.reshape(-1)[ties], addends, flat[ties], form)


def _zeros(low: Array) -> Array:
    """The flat indices of zeros; most rows have none."""
    lines = np.flatnonzero(np.minimum.reduce(low, axis=1) == 0)
    if not len(lines):
        return lines
    columns = low.shape[1]
    line, column = np.divmod(np.flatnonzero(low[lines] == 0), columns)
    return np.asarray(lines[line] * columns + column)


def _is_bfloat16(block: Array) -> bool:
    """Whether a block holds bfloat16 numbers only.

    Two of them never add up to a midpoint of bfloat16 inexactly: the sum is inexact in float32 only
    if one is smaller than the other's last bit by a factor of 2**8.
    """
    if block.dtype == BF16:
        return True
    return block.dtype == F32 and not bool((block.view(np.uint32) & np.uint32(0xFFFF)).any())


def _settle(weights: Array, addends: Array, bits: Array, form: HalfFormat) -> Array:
    """The right results where the float32 sum is a tie.

    Args:
        weights: The rows' elements there.
        addends: The block's.
        bits: What rounding away from zero gave; the other candidate is one less.
        form: The target.
    """
    upper = bits & np.uint16(0x7FFF)
    midpoint = (form.value_of(upper) + form.value_of(upper - np.uint16(1))) / 2
    sign = np.where(bits >> 15, -1.0, 1.0)
    total, rest = two_sum(weights.astype(np.float64), addends.astype(np.float64))
    beyond = (total * sign - midpoint, rest * sign)
    excess = np.where(beyond[0] == 0, beyond[1], beyond[0])
    down = (excess < 0) | ((excess == 0) & ((upper & 1) == 1))
    settled: Array = bits - down.astype(np.uint16)
    return settled


def _settle_few(weights: Array, addends: Array, bits: Array, form: HalfFormat) -> list[int]:
    """`_settle`, one by one: quicker for a few."""
    settled = []
    operands = zip(weights.tolist(), addends.tolist(), bits.tolist(), strict=True)
    for weight, addend, result in operands:
        upper = result & 0x7FFF
        midpoint = (form.number(upper) + form.number(upper - 1)) / 2
        sign = -1.0 if result >> 15 else 1.0
        # exact: the error of the float64 sum, and a difference of neighbours
        total = weight + addend
        part = total - weight
        rest = (weight - (total - part)) + (addend - part)
        excess = total * sign - midpoint or rest * sign
        settled.append(result - (excess < 0 or (excess == 0 and upper % 2 == 1)))
    return settled
