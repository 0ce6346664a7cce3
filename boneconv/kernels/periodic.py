"""What a block adds to rows: a short period, repeated along each row."""

from __future__ import annotations

import numpy as np

from boneconv.config import Axis
from boneconv.dtypes import F32
from boneconv.kernels.scratch import Scratch
from boneconv.kernels.stage import Array, Stage, is_bat, rank_of, row_update

__all__ = ["Period", "add_periodic"]

_WIDE = 64  # numbers that are worth a call of numpy's inner loop


class Period:
    """The addend of any variant, as float32 tiles of consecutive rows.

    Args:
        stage: The checked update, its block at most float32.
        columns: The weight's ``in``.
    """

    def __init__(self, stage: Stage, columns: int) -> None:
        self._stage = stage
        self._rank = rank_of(stage)
        self._whole: Array | None = None
        if is_bat(stage):
            r = self._rank
            along_out = stage.axis is Axis.OUT
            # axis in: the same r rows of `in` numbers for every row block
            self._whole = stage.block if along_out else stage.block.transpose(1, 0, 2)
            self._whole = self._whole.reshape(-1, r if along_out else columns)
        self.repeats = max(1, min(_WIDE, columns) // self._rank)

    def rows(self, first: int, count: int, scratch: Scratch) -> Array:
        """Rows ``first .. first + count``: ``[count, p]`` float32, without -0.

        Column j of the weight gets column ``j mod p``.
        """
        part = self._part(first, count, scratch)
        width = part.shape[1]
        repeats = self.repeats if width == self._rank else 1
        tile = scratch.take("tile", (count, repeats * width), F32)
        np.copyto(tile.reshape(count, repeats, width), part[:, None, :])
        return np.add(tile, np.float32(0.0), out=tile)

    def nbytes(self, count: int) -> int:
        """The work space that `rows` takes."""
        width = self._rank if self._whole is None else self._whole.shape[1]
        return 4 * count * width * (1 + (self.repeats if width == self._rank else 1))

    def _part(self, first: int, count: int, scratch: Scratch) -> Array:
        if self._whole is None:
            update = row_update(self._stage, first, count).T
            # rows of the block are often a power of two apart, which a cache is slow to read across
            near = scratch.take("near", update.shape, F32)
            np.copyto(near, update)
            return near.T
        if self._stage.axis is Axis.OUT:
            return self._whole[first : first + count]
        return self._whole[np.arange(first, first + count) % self._rank]


def add_periodic(values: Array, tile: Array, out: Array) -> None:
    """``out[i, j] = values[i, j] + tile[i, j mod p]``; ``out`` may be ``values``."""
    count, columns = values.shape
    period = tile.shape[1]
    whole = columns // period * period
    if whole == columns and values.flags.c_contiguous and out.flags.c_contiguous:
        shape = (count, columns // period, period)
        np.add(values.reshape(shape), tile[:, None, :], out=out.reshape(shape))
        return
    for start in range(0, columns, period):
        stop = min(start + period, columns)
        np.add(values[:, start:stop], tile[:, : stop - start], out=out[:, start:stop])
