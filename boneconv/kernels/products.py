"""The matrix products of BAT: each r x r tile of some rows times its block.

Sums are split into parts of at most 32 products: the error bound of the whole is then that of a
part, and as batches of small matrices (which BLAS computes in the calling thread) the parts cost no
more than one large product.
"""

from __future__ import annotations

import numpy as np

from boneconv.config import Axis
from boneconv.kernels.scratch import Scratch
from boneconv.kernels.stage import Array

__all__ = ["rounding_steps", "tiles_times_blocks"]

_PART = 32
_SMALL = 32  # tiles of at most this edge go into one flat product per row block


def rounding_steps(r: int) -> int:
    """K in ``|fl(w . b) - w . b| <= k u |w| |b|`` (Euclidean norms) for `tiles_times_blocks`.

    A part of n products is off by at most ``n u |w| |b|`` in any order of summation, with FMA or
    without (Jeannerod and Rump 2013, then Cauchy and Schwarz); so are the parts together, and each
    addition of a part may lose another ``u |w| |b|``.
    """
    return min(r, _PART) + -(-r // _PART) - 1


def tiles_times_blocks(
    rows: Array, block: Array, axis: Axis, first_row: int, out: Array, scratch: Scratch
) -> None:
    """``out[:, tile b] = rows[:, tile b] @ block[a or b]``.

    Args:
        rows: ``[n, in]``, contiguous, starting at ``first_row`` of the weight.
        block: ``[out/r, r, r]`` (axis out: block a of row block a) or ``[in/r, r, r]`` (axis in).
        axis: Which of the two.
        first_row: The weight's row that ``rows[0]`` is.
        out: ``[n, in]``, contiguous, of the dtype of both.
        scratch: Work space.
    """
    r = block.shape[-1]
    spare = scratch.take("part", rows.shape, rows.dtype) if r > _PART else out
    for start in range(0, r, _PART):
        result = out if start == 0 else spare
        part = slice(start, min(start + _PART, r))
        if axis is Axis.IN:
            np.matmul(_tiled(rows, r)[:, :, part], block[:, part], out=_tiled(result, r))
        else:
            _by_row_blocks(rows, block, part, first_row, result)
        if start:
            np.add(out, spare, out=out)


def _by_row_blocks(rows: Array, block: Array, part: slice, first_row: int, out: Array) -> None:
    r = block.shape[-1]
    for number, span in _row_blocks(first_row, len(rows), r):
        factor = block[number, part]
        if r <= _SMALL:
            flat, result = rows[span].reshape(-1, r), out[span].reshape(-1, r)
            np.matmul(flat[:, part], factor, out=result)
        else:
            np.matmul(_tiled(rows[span], r)[:, :, part], factor, out=_tiled(out[span], r))


def _tiled(rows: Array, r: int) -> Array:
    """``[n, in]`` seen as ``[in/r, n, r]``."""
    return rows.reshape(len(rows), rows.shape[1] // r, r).transpose(1, 0, 2)


def _row_blocks(first_row: int, count: int, r: int) -> list[tuple[int, slice]]:
    """The numbers of the row blocks that some rows touch, each with its slice of the rows."""
    blocks = []
    start = 0
    while start < count:
        number, offset = divmod(first_row + start, r)
        stop = min(count, start + r - offset)
        blocks.append((number, slice(start, stop)))
        start = stop
    return blocks
