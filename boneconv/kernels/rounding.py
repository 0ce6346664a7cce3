"""Rounding float64 values and intervals once, to nearest even, to any of the four dtypes.

float64 -> float32 -> bfloat16 rounds twice. The way down here is *round to odd*: truncate to
float32 and set the last bit if anything was cut off; a rounding to at most 22 bits of the result
then equals one rounding of the original.

Bits are compared, not values, so that -0 and +0 differ.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from boneconv.dtypes import BF16, F16, F32, F64
from boneconv.kernels.expansion import two_sum
from boneconv.kernels.stage import Array

__all__ = [
    "BITS",
    "Decision",
    "decide",
    "decide_pair",
    "double_to",
    "first_nonfinite",
    "largest_magnitude",
    "single_to_bf16",
]

#: dtype -> the unsigned integer of its width.
BITS: dict[np.dtype[Any], Any] = {BF16: np.uint16, F16: np.uint16, F32: np.uint32, F64: np.uint64}

_RELATIVE = 2.0**-51  # more than the rounding of value -/+ bound


class Decision(NamedTuple):
    """What is known of rounded values.

    Attributes:
        bits: The rounded values as unsigned integers; meaningless where undecided.
        undecided: True where the bound did not settle the rounding.
    """

    bits: Array
    undecided: npt.NDArray[np.bool_]


def single_to_bf16(values: Array) -> Array:
    """Finite or infinite float32 to bfloat16 bits (uint16), to nearest even. NaN stays NaN."""
    bits = values.view(np.uint32)
    nearest = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, nearest).astype(np.uint16)


def double_to(values: Array, target: np.dtype[Any]) -> Array:
    """float64 to the target's bits with a single rounding; overflow gives infinity."""
    with np.errstate(all="ignore"):
        if target == BF16:
            return single_to_bf16(_odd_single(values))
        return values.astype(target).view(BITS[target])


def _odd_single(values: Array) -> Array:
    """float64 to float32, rounded to odd."""
    nearest = values.astype(np.float32)
    back = nearest.astype(np.float64)
    bits = nearest.view(np.uint32)
    inexact = (back != values) & ~np.isnan(values)
    too_far = inexact & (np.abs(back) > np.abs(values))
    odd: Array = np.where(inexact, (bits - too_far.astype(np.uint32)) | np.uint32(1), bits)
    return odd.view(np.float32)


def _odd_double(high: Array, low: Array) -> Array:
    """High + low, with high = fl(high + low), as a float64 rounded to odd."""
    bits = high.view(np.uint64)
    inexact = low != 0
    too_far = inexact & (np.signbit(low) != np.signbit(high))
    odd: Array = np.where(inexact, (bits - too_far.astype(np.uint64)) | np.uint64(1), bits)
    return odd.view(np.float64)


def decide(values: Array, bound: Array, target: np.dtype[Any]) -> Decision:
    """Round values that are known to within a bound.

    Args:
        values: float64 approximations.
        bound: float64, not negative: |exact - value| <= bound. Zero says that the value is exact.
        target: The dtype to round to.
    """
    with np.errstate(all="ignore"):
        values = values + 0.0  # -0 is an exact zero here: +0
        reach = np.where(bound == 0, 0.0, bound + _RELATIVE * (np.abs(values) + bound))
        low, high = double_to(values - reach, target), double_to(values + reach, target)
        return Decision(low, (low != high) | ~np.isfinite(values) | ~np.isfinite(reach))


def decide_pair(high: Array, low: Array, bound: Array, target: np.dtype[Any]) -> Decision:
    """Round values ``high + low`` (float64 pairs) that are known to within a bound."""
    with np.errstate(all="ignore"):
        reach = np.where(bound == 0, 0.0, bound + _RELATIVE * (np.abs(low) + bound))
        below, above = (
            _round_pair(high, low - reach, target),
            _round_pair(high, low + reach, target),
        )
        certain = np.isfinite(high) & np.isfinite(low) & np.isfinite(reach)
        return Decision(below, (below != above) | ~certain)


def _round_pair(high: Array, low: Array, target: np.dtype[Any]) -> Array:
    nearest, rest = two_sum(high, low)
    nearest = nearest + 0.0  # an exact zero is +0
    if target == F64:
        return nearest.view(np.uint64)
    return double_to(_odd_double(nearest, rest), target)


def largest_magnitude(values: Array) -> float:
    """The largest magnitude of a contiguous array; infinity or NaN if it holds either; 0 if empty.

    Two integer reductions over the bits: far cheaper than arithmetic on 16-bit floats.
    """
    if values.size == 0:
        return 0.0
    unsigned = BITS[values.dtype]
    bits = values.view(unsigned)
    sign = 1 << (8 * values.dtype.itemsize - 1)
    positive = max(int(np.maximum.reduce(bits.view(f"i{values.dtype.itemsize}"), axis=None)), 0)
    negative = int(np.maximum.reduce(bits, axis=None))
    magnitude = max(positive, negative - sign)
    return float(np.asarray(magnitude, unsigned).view(values.dtype))


def first_nonfinite(values: Array) -> int | None:
    """The flat index of the first NaN or infinity of a contiguous array; None if all are finite."""
    if math.isfinite(largest_magnitude(values)):
        return None
    with np.errstate(all="ignore"):
        return int(np.argmin(np.isfinite(values)))
