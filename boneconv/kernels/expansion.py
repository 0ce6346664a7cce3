"""Error-free transformations in float64, and sums that account for every bit they lose.

`Pairs` holds values as unevaluated sums ``high + low`` with a bound on what is missing. The bound
is not an estimate: each addition's own rounding error is computed and its magnitude added, so it
is zero as long as the pairs hold the values exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from boneconv.kernels.stage import Array

__all__ = ["Pairs", "carried", "pair_times", "two_product", "two_sum"]

_SPLITTER = 2.0**27 + 1
#: Below this magnitude a product's rounding error may not be representable ...
_TINY_PRODUCT = 2.0**-960
#: ... and this covers what is lost then.
_UNDERFLOW = 2.0**-1050


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """fl(a + b) and its rounding error, exactly, unless it overflows (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def two_product(a: Array, b: Array) -> tuple[Array, Array, Array]:
    """fl(a * b), its rounding error, and a bound on the error of that (0 but for underflow).

    Dekker's product; NaN where splitting overflows (factors above 2**995).
    """
    product = a * b
    a_high, a_low = _split(a)
    b_high, b_low = _split(b)
    error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    tiny = (np.abs(product) < _TINY_PRODUCT) & (a != 0) & (b != 0)
    return product, error, np.where(tiny, _UNDERFLOW, 0.0)


def _split(a: Array) -> tuple[Array, Array]:
    scaled = a * _SPLITTER
    high = scaled - (scaled - a)
    return high, a - high


def carried(bound: Array, factor: Array) -> Array:
    """What an error bound becomes when its value is multiplied; zero stays zero."""
    grown = bound * np.abs(factor) * (1 + 2.0**-40) + _UNDERFLOW
    return np.where((bound == 0) | (factor == 0), 0.0, grown)


@dataclass
class Pairs:
    """Values ``high + low``, off by at most ``bound``; float64 arrays of one shape.

    The bound is itself rounded while it grows; `normalised` makes up for that.
    """

    high: Array
    low: Array
    bound: Array

    @classmethod
    def exactly(cls, values: Array) -> Pairs:
        """float64 values as they are."""
        return cls(values, np.zeros_like(values), np.zeros_like(values))

    def add(self, term: Array) -> None:
        """Add float64 terms, in place."""
        self.high, carry = two_sum(self.high, term)
        self.low, lost = two_sum(self.low, carry)
        self.bound = self.bound + np.abs(lost)

    def add_product(self, a: Array, b: Array) -> None:
        """Add a * b, both float64, in place."""
        product, error, missing = two_product(a, b)
        self.add(product)
        self.add(error)
        self.bound = self.bound + missing

    def add_pairs(self, other: Pairs) -> None:
        """Add other pairs, in place."""
        self.add(other.high)
        self.add(other.low)
        self.bound = self.bound + other.bound

    def normalised(self) -> Pairs:
        """The same values with high = fl(high + low), the bound safely rounded up."""
        high, low = two_sum(self.high, self.low)
        return Pairs(high, low, self.bound * (1 + 2.0**-40))


def pair_times(pairs: Pairs, factor: Array) -> Pairs:
    """Pairs times float64 factors, broadcast."""
    product, error, missing = two_product(pairs.high, factor)
    result = Pairs(product, error, carried(pairs.bound, factor) + missing)
    if pairs.low.any():
        result.add_product(pairs.low, factor)
    return result
