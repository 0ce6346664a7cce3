"""Floating numbers as integers in the order of their values: a difference of one is one ULP."""

from __future__ import annotations

import numpy as np

from boneconv.kernels.rounding import BITS, double_to
from boneconv.kernels.stage import Array

__all__ = ["differing", "ordered", "ordered_double", "rounded"]


def ordered(values: Array) -> Array:
    """Numbers of one of the four dtypes as int64 (float64 too: its bits fit), both zeros as 0."""
    bits = values.view(BITS[values.dtype])
    width = 8 * values.dtype.itemsize
    magnitude = (bits & ((1 << (width - 1)) - 1)).astype(np.int64)
    return np.asarray(np.where(bits >> (width - 1), -magnitude, magnitude))


def ordered_double(values: Array, target: np.dtype[np.generic]) -> Array:
    """Float64 values, rounded once to ``target``, as integers in order."""
    return ordered(double_to(values, target).view(target))


def rounded(values: Array, target: np.dtype[np.generic]) -> Array:
    """Float64 values, rounded once to ``target``, as float64."""
    with np.errstate(all="ignore"):
        return np.asarray(double_to(values, target).view(target).astype(np.float64))


def differing(one: Array, other: Array) -> Array:
    """The flat indices where two contiguous arrays of one dtype differ in any bit."""
    unsigned = BITS[one.dtype]
    left, right = one.reshape(-1).view(unsigned), other.reshape(-1).view(unsigned)
    if np.array_equal(left, right):
        return np.empty(0, np.int64)
    return np.flatnonzero(left != right)
