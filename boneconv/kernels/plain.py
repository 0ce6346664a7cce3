"""The merge as it is usually computed: one accumulation, one rounding, no promise of exactness.

float32 for 16-bit targets, float64 for wider ones. Kept for comparison with the canonical merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from boneconv.dtypes import BF16, F32, F64
from boneconv.kernels.general import block_update, overflow
from boneconv.kernels.narrow import widen
from boneconv.kernels.periodic import Period, add_periodic
from boneconv.kernels.products import tiles_times_blocks
from boneconv.kernels.rounding import BITS, double_to, first_nonfinite
from boneconv.kernels.scratch import Scratch
from boneconv.kernels.stage import Array, Stage, is_bat

__all__ = ["PlainMerger"]


class PlainMerger:
    """Rows of one weight through all stages, plainly.

    Args:
        stages: Checked updates, in order.
        columns: The weight's ``in``.
        source: The dtype of the weight.
        target: The dtype to round to.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        columns: int,
        source: np.dtype[Any],
        target: np.dtype[Any],
    ) -> None:
        widest = max(source.itemsize, *(stage.block.dtype.itemsize for stage in stages))
        single = widest <= 4 and target.itemsize == 2
        self._dtype = F32 if single else F64
        self._stages = [
            Stage(s.variant, s.block.astype(self._dtype), s.axis, s.scale) for s in stages
        ]
        self._target = target
        self._periods = [Period(s, columns) for s in self._stages] if single else []

    def merge(self, rows: Array, first_row: int, out: Array, scratch: Scratch) -> None:
        """Merge finite rows ``[n, in]`` into ``out``.

        Raises:
            NonFiniteError: A merged value is beyond the target's range.
        """
        with np.errstate(all="ignore"):
            values = widen(rows, scratch) if self._dtype == F32 else rows.astype(F64)
            for number, stage in enumerate(self._stages):
                values = self._step(values, number, stage, first_row, scratch)
            if self._dtype == F64 and self._target == BF16:
                out.view(BITS[BF16])[...] = double_to(values, BF16)
            else:
                np.copyto(out, values, casting="unsafe")
        where = first_nonfinite(out)
        if where is not None:
            i, j = divmod(where, rows.shape[1])
            raise overflow(first_row + i, j, self._target)

    def _step(
        self, values: Array, number: int, stage: Stage, first_row: int, scratch: Scratch
    ) -> Array:
        """One stage: the new values, in a buffer of their own."""
        total = scratch.take(f"plain {number % 2}", values.shape, self._dtype)
        if self._dtype == F32:
            change = self._periods[number].rows(first_row, len(values), scratch)
        else:
            change = block_update(stage, first_row, values.shape)
        if stage.scale != 1.0:
            change = change * change.dtype.type(stage.scale)
        if not is_bat(stage):
            add_periodic(values, change, total)
            return total
        tiles_times_blocks(values, stage.block, stage.axis, first_row, total, scratch)
        if stage.scale != 1.0:
            np.multiply(total, total.dtype.type(stage.scale), out=total)
        add_periodic(total, change, total)
        return np.add(total, values, out=total)
