"""The exact value of a merge, rounded once, by formulas of its own.

In float64 with a bound on its error, and in fractions where the bound does not settle the rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from tests.builders import DTYPES, Array


@dataclass(frozen=True)
class Format:
    """A 16-bit float: bits of its significand, exponent of its smallest normal number."""

    bits: int
    lowest: int


FORMATS = {DTYPES["BF16"]: Format(8, -126), DTYPES["F16"]: Format(11, -14)}


def round_doubles(values: Array, form: Format) -> Array:
    """To nearest even, as float64: scaling by a power of two is exact, and rint ties to even."""
    exponents = np.frexp(values)[1] - 1
    quantum = np.ldexp(1.0, np.maximum(exponents, form.lowest) - (form.bits - 1))
    return np.rint(values / quantum) * quantum


def round_exactly(value: Fraction, form: Format) -> float:
    """To nearest even, as Python rounds a fraction; only zero itself is +0 whatever its sign."""
    if not value:
        return 0.0
    exponent = int(np.frexp(float(value))[1]) - 1  # of a neighbour: may be one too high
    if abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    quantum = Fraction(2) ** (max(exponent, form.lowest) - (form.bits - 1))
    return math.copysign(float(round(value / quantum) * quantum), value)


def bone_terms(weight: Array, block: Array, row: int, column: int) -> list[Fraction]:
    return [_fraction(weight[row, column]), _fraction(block[column % len(block), row])]


def bat_terms(weight: Array, block: Array, row: int, column: int) -> list[Fraction]:
    r = block.shape[-1]
    tile, factors = weight[row, column - column % r :][:r], block[row // r, :, column % r]
    products = [_fraction(w) * _fraction(b) for w, b in zip(tile, factors, strict=True)]
    return [_fraction(weight[row, column]), *products, _fraction(factors[row % r])]


def _fraction(number: np.generic) -> Fraction:
    return Fraction(float(number))


def approximate(weight: Array, block: Array) -> tuple[Array, Array]:
    """Merged values in float64, and how far they may be from the exact ones."""
    w, b = weight.astype(np.float64), block.astype(np.float64)
    if b.ndim == 2:
        delta = b[np.arange(w.shape[1]) % len(b)].T
        values, magnitudes, terms = w + delta, np.abs(w) + np.abs(delta), 2
    else:
        change, largest = _bat(w, b), _bat(np.abs(w), np.abs(b))
        values, magnitudes, terms = w + change, np.abs(w) + largest, b.shape[-1] + 2
    return values, 2 * terms * np.finfo(np.float64).eps * magnitudes


def _bat(w: Array, b: Array) -> Array:
    r, out = b.shape[-1], np.empty_like(w)
    for tile, matrix in enumerate(b):
        rows = slice(tile * r, (tile + 1) * r)
        out[rows] = (w[rows].reshape(-1, r) @ matrix).reshape(r, -1)
        out[rows] += np.tile(matrix, (1, w.shape[1] // r))
    return out


def correctly_rounded(weight: Array, block: Array) -> Array:
    """The exact merged values, each rounded once to the weight's dtype."""
    form = FORMATS[weight.dtype]
    values, bound = approximate(weight, block)
    low, high = round_doubles(values - bound, form), round_doubles(values + bound, form)
    terms = bone_terms if block.ndim == 2 else bat_terms
    for row, column in np.argwhere((low != high) | (low == 0)):
        exact = sum(terms(weight, block, row, column), Fraction(0))
        low[row, column] = round_exactly(exact, form)
    return low.astype(weight.dtype)
