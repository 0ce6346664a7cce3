"""The merge of one weight, row chunk by row chunk, in memory that the caller bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from boneconv.config import Axis, Variant
from boneconv.dtypes import F64
from boneconv.errors import ConfigError, NonFiniteError
from boneconv.kernels.additive import AdditiveMerger
from boneconv.kernels.bat import BatMerger
from boneconv.kernels.general import GeneralMerger
from boneconv.kernels.narrow import FORMATS
from boneconv.kernels.plain import PlainMerger
from boneconv.kernels.rounding import BITS, first_nonfinite, largest_magnitude
from boneconv.kernels.scratch import Scratch
from boneconv.kernels.stage import Array, Stage, check_stage, fold_scale, is_bat, rank_of
from boneconv.kernels.sums import SumMerger

__all__ = ["RowMerger"]

_CHUNK = 1 << 17  # elements: 256 KiB of bfloat16
_GENERAL_CHUNK = 1 << 15


class RowMerger:
    """All stages of one weight, for rows that stream. Threads may share one.

    Args:
        stages: The adapters' updates, in order.
        shape: The weight's ``(out, in)``.
        source: The dtype of the rows that come: float64, float32, float16 or bfloat16.
        target: The dtype of the rows that go: one of the same.
        canonical: Every element is the exact value rounded once, to nearest even, with gradual
            underflow; exact zero is +0. Otherwise: plain float32 accumulation (float64 where
            source or target is float32 or wider) and one rounding.

    Attributes:
        row_multiple: Chunks start at multiples of this many rows.
        chunk: How many elements are computed at a time.

    Raises:
        ConfigError: A dtype that is none of the four, or a scale that is not finite.
        ShapeError: A block does not fit the shape.
        NonFiniteError: A block holds NaN or infinity.
    """

    chunk = _CHUNK

    def __init__(
        self,
        stages: Sequence[Stage],
        shape: tuple[int, int],
        source: np.dtype[Any],
        target: np.dtype[Any],
        *,
        canonical: bool = True,
    ) -> None:
        self._shape = shape
        self._source = np.dtype(source)
        self._target = np.dtype(target)
        for dtype in (self._source, self._target):
            if dtype not in BITS:
                raise ConfigError("a dtype that cannot be merged", found=dtype)
        for stage in stages:
            check_stage(stage, shape)
        self._stages = tuple(fold_scale(stage) for stage in stages)
        self._plain: PlainMerger | None = None
        if not canonical:
            self._plain = PlainMerger(stages, shape[1], self._source, self._target)
        self._fast = self._fast_merger() if canonical else None
        self._general = GeneralMerger(self._stages, self._target)
        form = FORMATS.get(self._target)
        self._safe = form.safe if form else 2.0**126
        along_out = [rank_of(s) for s in stages if is_bat(s) and s.axis is Axis.OUT]
        self.row_multiple = math.lcm(*along_out)

    def _fast_merger(self) -> AdditiveMerger | BatMerger | SumMerger | None:
        """What merges blocks of at most float32: one BAT, or any number of Bone and mini."""
        widest = {self._source, self._target, *(stage.block.dtype for stage in self._stages)}
        if F64 in widest or not self._stages or any(stage.residue for stage in self._stages):
            return None
        first = self._stages[0]
        if len(self._stages) == 1 and is_bat(first):
            if first.block.any():
                return BatMerger(first, self._shape[1], self._target)
            # an untrained block changes nothing
            zeros = np.zeros((1, self._shape[0]), np.float32)
            first = Stage(Variant.BONE, zeros)
        elif any(is_bat(stage) for stage in self._stages):
            return None
        if len(self._stages) == 1 and first.scale == 1.0:
            return AdditiveMerger(first, self._shape[1], self._source, self._target)
        several = SumMerger(self._stages, self._target)
        return several if several.width <= self._shape[1] else None

    def preferred_rows(self) -> int:
        """How many rows to hand over at a time: about `chunk` elements, whole row blocks."""
        wanted = self.chunk // max(1, self._shape[1])
        return max(1, wanted // self.row_multiple) * self.row_multiple

    @property
    def nbytes(self) -> int:
        """The memory that the merger itself holds: the blocks, and images of them."""
        blocks = sum(stage.block.nbytes for stage in self._stages)
        return blocks + (self._fast.nbytes if self._fast is not None else 0)

    def scratch_nbytes(self, rows: int) -> int:
        """The most memory that `merge` takes for chunks of ``rows``, beside rows and out."""
        columns = self._shape[1]
        if self._plain is not None:
            return 40 * min(rows, self._step(self.chunk)) * columns
        if self._fast is not None:
            return self._fast.scratch_nbytes(min(rows, self._step(self.chunk)), columns)
        return 160 * min(rows, self._step(_GENERAL_CHUNK)) * columns

    def _step(self, elements: int) -> int:
        return max(1, elements // max(1, self._shape[1]))

    def merge(self, rows: Array, first_row: int, out: Array, scratch: Scratch) -> None:
        """Merge consecutive rows of the weight.

        Args:
            rows: ``[n, in]`` of the source dtype, contiguous; not written to.
            first_row: The weight's row that ``rows[0]`` is; a multiple of ``row_multiple``.
            out: ``[n, in]`` of the target dtype, contiguous; may not alias ``rows``.
            scratch: Work space of the calling thread.

        Raises:
            NonFiniteError: A weight is not finite, or its merged value is beyond the target's
                range.
        """
        step = self._step(self.chunk)
        for start in range(0, len(rows) if rows.size else 0, step):
            part = slice(start, start + step)
            self._merge(rows[part], first_row + start, out[part], scratch)

    def _merge(self, rows: Array, first_row: int, out: Array, scratch: Scratch) -> None:
        largest = largest_magnitude(rows)
        if not math.isfinite(largest):
            i, j = divmod(first_nonfinite(rows) or 0, rows.shape[1])
            raise NonFiniteError(
                f"the weight at row {first_row + i}, column {j} is not finite", found=rows[i, j]
            )
        if self._plain is not None:
            self._plain.merge(rows, first_row, out, scratch)
        elif self._fast is not None and self._fast.reach(largest) < self._safe:
            with np.errstate(all="ignore"):
                self._fast.merge(rows, first_row, out, largest, scratch)
        else:
            step = self._step(_GENERAL_CHUNK)
            for start in range(0, len(rows), step):
                part = slice(start, start + step)
                self._general.merge(rows[part], first_row + start, out[part])
