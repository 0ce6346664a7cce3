"""Ziv's rounding test: store what is certain, name what is not.

A value known to within a bound rounds with certainty if everything within the bound rounds alike.
"""

from __future__ import annotations

import numpy as np

from boneconv.dtypes import F32, F64
from boneconv.kernels.narrow import HalfFormat
from boneconv.kernels.scratch import Scratch
from boneconv.kernels.stage import Array

__all__ = ["round_to_half", "round_to_single"]

_SLACK = 4  # units in the last place: u |s|, the rounding of s -/+ delta, and strictness
_LEAST = 2.0**-120  # a smaller delta would make float32 arithmetic subnormal, and slow


def round_to_half(
    total: Array, delta: float, form: HalfFormat, out: Array, scratch: Scratch
) -> Array:
    """Round float32 values to 16 bits.

    Args:
        total: The values s, below the format's safe range; overwritten.
        delta: ``|s - exact| <= delta + u |s|``, u = 2**-24.
        form: The format.
        out: Of its dtype and the shape of ``total``; the result.
        scratch: Work space.

    Returns:
        The flat indices of elements that stay in doubt.
    """
    total = total.reshape(-1)
    below = np.abs(total, out=scratch.take("part", total.shape, F32))
    form.store(form.align(total, total), out.view(np.uint16).reshape(-1), scratch)
    step = np.nextafter(np.float32(max(delta, _LEAST)), np.float32(np.inf))
    above = np.add(below, step, out=total)
    np.subtract(below, step, out=below)
    above, below = form.align(above, above), form.align(below, below)
    high, low = above.view(np.uint32), below.view(np.uint32)
    half = 1 << (form.fraction - 1)
    np.add(high, np.uint32(half + _SLACK), out=high)
    np.add(low, np.uint32(half - _SLACK), out=low)
    np.bitwise_xor(high, low, out=high)
    mask = scratch.take("mask", total.shape, np.bool_)
    return np.flatnonzero(np.greater_equal(high, np.uint32(1 << form.fraction), out=mask))


def round_to_single(total: Array, delta: float, out: Array, scratch: Scratch) -> Array:
    """Round float64 values to float32.

    Args:
        total: The values s.
        delta: ``|s - exact| <= delta``, and at least ``2**-52 |s|`` more than that.
        out: float32 of the shape of ``total``; the result.
        scratch: Work space.

    Returns:
        The flat indices of elements that stay in doubt.
    """
    moved = scratch.take("double", total.shape, F64)  # the weights are no longer needed
    above = scratch.take("above", total.shape, F32)
    np.copyto(above, np.add(total, delta, out=moved), casting="unsafe")
    np.copyto(out, np.subtract(total, delta, out=moved), casting="unsafe")
    mask = scratch.take("mask", (total.size,), np.bool_)
    differ = np.not_equal(above.view(np.uint32).ravel(), out.view(np.uint32).ravel(), out=mask)
    return np.flatnonzero(differ)
