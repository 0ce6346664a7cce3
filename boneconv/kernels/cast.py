"""A plain cast between the four floating dtypes: one rounding, to nearest even."""

from __future__ import annotations

from typing import Any

import numpy as np

from boneconv.dtypes import BF16, F16, F32, F64
from boneconv.errors import NonFiniteError
from boneconv.kernels.rounding import BITS, double_to, first_nonfinite
from boneconv.kernels.scratch import Scratch
from boneconv.kernels.stage import Array

__all__ = ["cast_rows"]

_SLICE = 1 << 16


def cast_rows(rows: Array, target: np.dtype[Any], out: Array, scratch: Scratch) -> None:
    """Cast rows to ``target`` with a single rounding; signs of zeros, NaN and infinity pass.

    Args:
        rows: float64, float32, float16 or bfloat16, contiguous; not written to.
        target: One of the same four.
        out: Of ``rows``' shape and the target dtype, contiguous; may not alias ``rows``.
        scratch: Work space of the calling thread.

    Raises:
        NonFiniteError: A finite value is beyond the target's range.
    """
    source, result = rows.reshape(-1), out.reshape(-1)
    if rows.dtype == target:
        np.copyto(result.view(BITS[target]), source.view(BITS[target]))
        return
    with np.errstate(all="ignore"):
        for start in range(0, source.size, _SLICE):
            part = slice(start, start + _SLICE)
            _cast(source[part], target, result[part], scratch)
            _refuse_overflow(source, result[part], start, rows.shape)


def _cast(source: Array, target: np.dtype[Any], out: Array, scratch: Scratch) -> None:
    if target == BF16 and source.dtype == F64:
        _from_double(source, target, out)
    elif target == BF16 and source.dtype == F16:
        wide = scratch.take("cast", source.shape, F32)
        np.copyto(wide, source)
        np.copyto(out, wide, casting="unsafe")
    else:
        np.copyto(out, source, casting="unsafe")


def _from_double(source: Array, target: np.dtype[Any], out: Array) -> None:
    out.view(BITS[target])[...] = double_to(source, target)


def _refuse_overflow(source: Array, out: Array, start: int, shape: tuple[int, ...]) -> None:
    if first_nonfinite(out) is None:
        return
    part = source[start : start + out.size]
    new = np.flatnonzero(~np.isfinite(out) & np.isfinite(part))
    if len(new):
        place = tuple(int(i) for i in np.unravel_index(start + int(new[0]), shape))
        raise NonFiniteError(
            f"the value at {place} is beyond the range of {out.dtype.name}", found=part[new[0]]
        )
