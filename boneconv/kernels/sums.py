"""Any number of Bone and mini updates, any scales: canonical, at nearly the cost of one.

Together they add one number to each weight, periodically along its row. That number is computed
once per period, as a float64 pair; its float32 image is added to the rows in bulk, and the little
that the image lacks is the error bound of the rounding test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from boneconv.dtypes import F32, F64
from boneconv.kernels.additive import add_once
from boneconv.kernels.expansion import Pairs, pair_times
from boneconv.kernels.general import GeneralMerger
from boneconv.kernels.narrow import FORMATS, widen
from boneconv.kernels.periodic import add_periodic
from boneconv.kernels.rounding import BITS, decide_pair, largest_magnitude
from boneconv.kernels.scratch import Scratch
from boneconv.kernels.stage import Array, Stage, rank_of, row_update
from boneconv.kernels.ziv import round_to_half, round_to_single

__all__ = ["SumMerger"]

_AT_ONCE = 1 << 14


class SumMerger:
    """Rows of one weight plus several Bone or mini blocks.

    Args:
        stages: Checked updates, none of them BAT.
        target: float32, bfloat16 or float16; the rows' dtype is one of the same.
    """

    def __init__(self, stages: Sequence[Stage], target: np.dtype[Any]) -> None:
        self._stages = tuple(stages)
        self._target = target
        self._width = math.lcm(*(rank_of(stage) for stage in stages))
        self._general = GeneralMerger(stages, target)
        self._largest = sum(abs(s.scale) * largest_magnitude(s.block) for s in stages)

    @property
    def width(self) -> int:
        """The period: the least common multiple of the ranks."""
        return self._width

    @property
    def nbytes(self) -> int:
        """What is held beside the stages' own blocks."""
        return 0

    def reach(self, largest: float) -> float:
        """A bound on the merged magnitudes, given one on the rows'."""
        return (largest + self._largest) * 1.001

    def scratch_nbytes(self, rows: int, columns: int) -> int:
        """The work space that `merge` takes, with what it allocates."""
        periods = 200 * rows * min(self._width, max(columns, 1))
        return (28 if self._target == F32 else 18) * rows * columns + periods

    def merge(
        self, rows: Array, first_row: int, out: Array, largest: float, scratch: Scratch
    ) -> None:
        """Merge rows ``[n, in]`` whose merged magnitudes are in the target's safe range."""
        addend = self._addend(first_row, len(rows))
        missing = np.abs(addend.low) + addend.bound
        image = addend.high.astype(np.float32) + np.float32(0.0)
        rest = missing + np.abs(addend.high - image)
        if not rest.any():
            add_once(rows, image, out, scratch)
            return
        wide = widen(rows, scratch)
        if self._target == F32:
            total = scratch.take("sum", rows.shape, F64)
            add_periodic(wide, addend.high, total)
            delta = float(missing.max()) * 1.001 + 2.0**-51 * self.reach(largest)
            doubtful = round_to_single(total, delta, out, scratch)
        else:
            total = scratch.take("total", rows.shape, F32)
            add_periodic(wide, image, total)
            delta = float(rest.max()) * 1.001
            doubtful = round_to_half(total, delta, FORMATS[self._target], out, scratch)
        for start in range(0, len(doubtful), _AT_ONCE):
            chosen = doubtful[start : start + _AT_ONCE]
            self._settle(rows, first_row, addend, chosen, out)

    def _addend(self, first_row: int, count: int) -> Pairs:
        """What all stages add, one period: pairs ``[count, width]``."""
        total = Pairs.exactly(np.zeros((count, self._width)))
        for stage in self._stages:
            update = row_update(stage, first_row, count).astype(np.float64, order="C")
            update = np.tile(update, (1, self._width // update.shape[1]))
            if stage.scale == 1.0:
                total.add(update)
            else:
                total.add_pairs(pair_times(Pairs.exactly(update), np.asarray(stage.scale)))
        return total.normalised()

    def _settle(self, rows: Array, first_row: int, addend: Pairs, where: Array, out: Array) -> None:
        i, j = np.divmod(where, rows.shape[1])
        k = j % self._width
        value = Pairs.exactly(rows.reshape(-1)[where].astype(np.float64))
        value.add_pairs(Pairs(addend.high[i, k], addend.low[i, k], addend.bound[i, k]))
        value = value.normalised()
        decision = decide_pair(value.high, value.low, value.bound, self._target)
        out.view(BITS[self._target]).reshape(-1)[where] = decision.bits
        for row in np.unique(i[decision.undecided]).tolist():
            self._general.merge(rows[row : row + 1], first_row + row, out[row : row + 1])
