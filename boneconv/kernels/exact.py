"""Exact values in rational arithmetic, and their one rounding.

The last resort of the kernels and the oracle of their tests. A canonical element is
``round_fraction(element(...), dtype)``: the exact real value rounded once, to nearest, ties to
even, with gradual underflow; exact zero is +0, and a value beyond the largest finite number (after
rounding) is an error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from boneconv.config import Axis, Variant
from boneconv.dtypes import BF16, F16, F32, F64
from boneconv.kernels.stage import Array, Stage

__all__ = ["element", "merge", "round_fraction"]

#: dtype -> (significand bits, smallest normal exponent, largest exponent)
_FORMATS = {BF16: (8, -126, 127), F16: (11, -14, 15), F32: (24, -126, 127), F64: (53, -1022, 1023)}


def element(rows: Array, row: int, column: int, stages: Sequence[Stage], first_row: int = 0) -> Any:
    """The exact merged value of one element.

    Args:
        rows: ``[n, in]``, consecutive rows of the weight.
        row: Index into ``rows``.
        column: Index of the column.
        stages: The updates, in order.
        first_row: The weight's row that ``rows[0]`` is.

    Returns:
        A `Fraction`.
    """
    source = rows[row]
    return _value(source, first_row + row, column, stages, len(stages), {})


def _value(
    source: Array,
    row: int,
    column: int,
    stages: Sequence[Stage],
    depth: int,
    known: dict[tuple[int, int], Fraction],
) -> Fraction:
    if depth == 0:
        return Fraction(float(source[column]))
    if (depth, column) in known:
        return known[depth, column]
    stage = stages[depth - 1]
    before = _value(source, row, column, stages, depth - 1, known)
    if stage.variant is Variant.BAT:
        r = stage.block.shape[-1]
        tile = column // r
        block = stage.block[row // r if stage.axis is Axis.OUT else tile]
        change = _fraction(block[row % r, column % r])
        for k in range(r):
            factor = _fraction(block[k, column % r])
            if factor:
                change += factor * _value(source, row, tile * r + k, stages, depth - 1, known)
    elif stage.variant is Variant.MINI:
        change = _fraction(stage.block[column % stage.block.shape[0], row % stage.block.shape[1]])
    else:
        change = _fraction(stage.block[column % stage.block.shape[0], row])
    value = before + (Fraction(stage.scale) + Fraction(stage.residue)) * change
    known[depth, column] = value
    return value


def _fraction(number: Any) -> Fraction:
    return Fraction(float(number))


def round_fraction(value: Fraction, dtype: np.dtype[Any]) -> float:
    """Round once to a floating dtype; the result, exact as a Python float.

    A negative value that underflows to zero gives -0, zero itself +0.

    Raises:
        OverflowError: The rounded value is beyond the largest finite one.
    """
    if value == 0:
        return 0.0
    bits, lowest, highest = _FORMATS[dtype]
    quantum = max(_exponent(abs(value)), lowest) - (bits - 1)
    digits = round(abs(value) / Fraction(2) ** quantum)
    if digits and _exponent(Fraction(digits)) + quantum > highest:
        raise OverflowError
    return math.copysign(math.ldexp(digits, quantum), value)


def _exponent(value: Fraction) -> int:
    """floor(log2(value)) of a positive fraction."""
    guess = value.numerator.bit_length() - value.denominator.bit_length()
    return guess if value >= Fraction(2) ** guess else guess - 1


def merge(weight: Array, stages: Sequence[Stage], target: np.dtype[Any]) -> Array:
    """The canonical merge of a whole weight, slowly: ``[out, in]`` of the target dtype.

    Raises:
        OverflowError: An element is beyond the target's largest finite number.
    """
    rows, columns = weight.shape
    out = np.empty(weight.shape, np.float64)
    for i in range(rows):
        known: dict[tuple[int, int], Fraction] = {}
        for j in range(columns):
            value = _value(weight[i], i, j, stages, len(stages), known)
            out[i, j] = round_fraction(value, target)
    return out.astype(target)
