"""Merging into float8 weights with scales: value times scale, exactly, then the canonical merge.

A float8 has at most four significant bits and a scale at most 24, so that their product is a
float64 exactly: the dequantised weight is never rounded. The merge, or the cast where nothing is
merged, rounds once into the output's dtype.

For 16-bit outputs and at most one Bone or mini, the float64 sum is rounded to float32 and that to
the output. Every rounding is monotonic and keeps what lies halfway between two outputs, so that
the result is the exact value's unless the float32 is halfway itself; such rows are merged again by
`RowMerger`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from boneconv.dtypes import F32, F64
from boneconv.errors import NonFiniteError
from boneconv.kernels.cast import cast_rows
from boneconv.kernels.narrow import FORMATS, HalfFormat
from boneconv.kernels.rounding import largest_magnitude
from boneconv.kernels.rows import RowMerger
from boneconv.kernels.scratch import Scratch
from boneconv.kernels.stage import Array, Stage, fold_scale, is_bat, row_update

__all__ = ["ScaleGrid", "ScaledMerger"]

_CHUNK = 1 << 16  # elements: 512 KiB of float64


@dataclass(frozen=True)
class ScaleGrid:
    """The scales of a weight, or of several that are stacked.

    Attributes:
        scales: ``[blocks down all weights, blocks across]``, float64, finite, each with at most 24
            significant bits.
        height: Rows of one weight. Blocks do not reach from one weight into the next.
        block: Rows and columns of a block; the last ones of a weight may be cut off.
        columns: Columns of a weight.
    """

    scales: Array
    height: int
    block: tuple[int, int]
    columns: int

    def dequantise(self, rows: Array, first_row: int, out: Array) -> None:
        """Writes rows times their scales, exactly.

        Args:
            rows: ``[n, columns]`` of a float8 dtype.
            first_row: The row that ``rows[0]`` is, counted over all weights.
            out: ``[n, columns]`` float64.
        """
        np.take(_values(rows.dtype), rows.view(np.uint8), out=out, mode="clip")
        start = 0
        while start < len(rows):
            weight, row = divmod(first_row + start, self.height)
            down = row // self.block[0]
            end_of_block = min((down + 1) * self.block[0], self.height) - row
            end = min(start + end_of_block, len(rows))
            line = self.scales[weight * math.ceil(self.height / self.block[0]) + down]
            factors = line if len(line) == 1 else np.repeat(line, self.block[1])[: self.columns]
            np.multiply(out[start:end], factors, out=out[start:end])
            start = end


@cache
def _values(dtype: np.dtype[Any]) -> Array:
    """The values of all 256 float8, by their bits."""
    return np.arange(256, dtype=np.uint8).view(dtype).astype(np.float64)


class ScaledMerger:
    """Rows of a float8 weight: dequantised, merged where there are stages, and rounded once.

    Args:
        grid: The weight's scales.
        stages: The adapters' updates, in order; none for a plain cast.
        shape: The weight's ``(out, in)``.
        target: The dtype of the rows that go.

    Raises:
        ConfigError, ShapeError, NonFiniteError: As `RowMerger`.
    """

    def __init__(
        self,
        grid: ScaleGrid,
        stages: Sequence[Stage],
        shape: tuple[int, int],
        target: np.dtype[Any],
    ) -> None:
        self._grid, self._target = grid, target
        self._merger = RowMerger(stages, shape, F64, target) if stages else None
        self._multiple = 1 if self._merger is None else self._merger.row_multiple
        self._form = FORMATS.get(target)
        self._stage: Stage | None = None
        self._largest = 0.0
        if stages:
            stage = fold_scale(stages[0])
            simple = len(stages) == 1 and not is_bat(stage) and stage.scale == 1.0
            if not simple or stage.residue or stage.block.dtype == F64:
                self._form = None
            self._stage = stage
            self._largest = float(np.abs(stage.block.astype(np.float64)).max(initial=0.0))

    def preferred_rows(self) -> int:
        """How many rows to hand over at a time: about 65536 elements, whole row blocks."""
        wanted = _CHUNK // max(1, self._grid.columns)
        return max(1, wanted // self._multiple) * self._multiple

    def merge(self, rows: Array, first_row: int, out: Array, scratch: Scratch) -> None:
        """Dequantises, merges and rounds consecutive rows.

        Args:
            rows: ``[n, in]`` of a float8 dtype, contiguous.
            first_row: The row that ``rows[0]`` is.
            out: ``[n, in]`` of the target dtype.
            scratch: Work space of the calling thread.

        Raises:
            NonFiniteError: As `RowMerger.merge`; in a cast, a value beyond the target's range.
        """
        wide = scratch.take("dequantised", rows.shape, F64)
        with np.errstate(invalid="ignore"):
            self._grid.dequantise(rows, first_row, wide)
        largest = largest_magnitude(wide)
        if self._form is not None and largest + self._largest < self._form.safe:
            self._fast(self._form, rows, wide, first_row, out, scratch)
        else:
            self._exactly(wide, first_row, out, scratch)

    def _fast(
        self,
        form: HalfFormat,
        rows: Array,
        wide: Array,
        first_row: int,
        out: Array,
        scratch: Scratch,
    ) -> None:
        """Rounds by way of float32; rows with a float32 halfway between outputs once more."""
        if self._stage is not None:
            _add_periodic(wide, row_update(self._stage, first_row, len(rows)))
        single = scratch.take("single", rows.shape, F32)
        np.copyto(single, wide, casting="unsafe")
        aligned = form.align(single, single)
        form.store_even(aligned, out.view(np.uint16), scratch)
        low = scratch.take("low", rows.shape, np.uint32)
        np.bitwise_and(aligned.view(np.uint32), np.uint32((1 << form.fraction) - 1), out=low)
        halfway = np.flatnonzero((low == np.uint32(1 << (form.fraction - 1))).any(axis=1))
        if len(halfway) > len(rows) // 4:
            self._grid.dequantise(rows, first_row, wide)
            self._exactly(wide, first_row, out, scratch)
            return
        for i in halfway.tolist():
            part = slice(i, i + 1)
            self._grid.dequantise(rows[part], first_row + i, wide[part])
            self._exactly(wide[part], first_row + i, out[part], scratch)

    def _exactly(self, wide: Array, first_row: int, out: Array, scratch: Scratch) -> None:
        if self._merger is not None:
            self._merger.merge(wide, first_row, out, scratch)
            return
        try:
            cast_rows(wide, self._target, out, scratch)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"a dequantised value in rows {first_row} to {first_row + len(wide) - 1} is beyond "
                f"the range of {self._target.name}",
                found=error.found,
                hint="Write a wider dtype (--dtype float32)",
            ) from error


def _add_periodic(wide: Array, update: Array) -> None:
    """Adds ``update[:, j mod r]`` to every column j; an exact zero becomes +0."""
    tile = update.astype(np.float64) + 0.0
    period = tile.shape[1]
    whole = wide.shape[1] // period * period
    tiles = wide[:, :whole].reshape(len(wide), -1, period)
    np.add(tiles, tile[:, None, :], out=tiles)
    rest = wide[:, whole:]
    np.add(rest, tile[:, : rest.shape[1]], out=rest)
