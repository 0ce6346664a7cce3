"""What is measured of a tensor, in parts that add up."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Measures", "together"]

_FIRST = 4


@dataclass(frozen=True)
class Measures:
    """Sums and largest values over some elements of a candidate's tensor.

    With c the candidate's element, k the canonical one and w the base's:

    Attributes:
        elements: How many elements.
        differing: How many differ in any bit.
        wrong: How many differ in value (zeros of both signs are one value).
        beyond: Of the wrong ones, how many no merge that accumulates in float32 can give.
        beyond_peft: Of those, how many none of PEFT's habits explains, for each habit.
        as_base: Of the wrong ones, how many equal the base's element.
        nonfinite: How many are NaN or infinite, and should not be.
        max_ulp: Largest distance in ULP.
        sum_ulp: Sum of the distances.
        max_abs: Largest ``|c - k|``.
        error: Sum of ``(c - k)**2``.
        cross: Sum of ``(c - k)(k - w)``.
        update: Sum of ``(k - w)**2``.
        base: Sum of ``w**2``.
        value: Sum of ``k**2``.
        first: Flat indices of the first wrong elements.
    """

    elements: int = 0
    differing: int = 0
    wrong: int = 0
    beyond: int = 0
    beyond_peft: tuple[int, ...] = ()
    as_base: int = 0
    nonfinite: int = 0
    max_ulp: float = 0.0
    sum_ulp: float = 0.0
    max_abs: float = 0.0
    error: float = 0.0
    cross: float = 0.0
    update: float = 0.0
    base: float = 0.0
    value: float = 0.0
    first: tuple[int, ...] = ()

    def __add__(self, other: Measures) -> Measures:
        return Measures(
            self.elements + other.elements,
            self.differing + other.differing,
            self.wrong + other.wrong,
            self.beyond + other.beyond,
            _added(self.beyond_peft, other.beyond_peft),
            self.as_base + other.as_base,
            self.nonfinite + other.nonfinite,
            max(self.max_ulp, other.max_ulp),
            self.sum_ulp + other.sum_ulp,
            max(self.max_abs, other.max_abs),
            self.error + other.error,
            self.cross + other.cross,
            self.update + other.update,
            self.base + other.base,
            self.value + other.value,
            tuple(sorted((*self.first, *other.first))[:_FIRST]),
        )

    @property
    def unexplained(self) -> int:
        """How many elements no habit of PEFT explains either, by the habit that explains most."""
        return min(self.beyond_peft, default=self.beyond)

    @property
    def share_correct(self) -> float:
        """The share of elements that are correctly rounded."""
        return 1 - self.wrong / self.elements if self.elements else 1.0

    @property
    def mean_ulp(self) -> float:
        """The mean distance in ULP."""
        return self.sum_ulp / self.elements if self.elements else 0.0

    @property
    def relative_frobenius(self) -> float | None:
        """``||c - k|| / ||k||``; None where only the canonical tensor is zero."""
        return _ratio(self.error, self.value)

    @property
    def update_norm(self) -> float | None:
        """``||k - w|| / ||w||``; None where only the base is zero."""
        return _ratio(self.update, self.base)

    @property
    def cosine(self) -> float | None:
        """Of the angle between c - w and k - w; None where either is zero."""
        dot = self.update + self.cross
        own = self.update + 2 * self.cross + self.error
        if not 0 < self.update < math.inf or not 1e-12 * self.update < own < math.inf:
            return None
        if self.error == 0:
            return 1.0
        return max(-1.0, min(1.0, dot / math.sqrt(self.update) / math.sqrt(own)))


def together(parts: list[Measures]) -> Measures:
    """The measures of all parts."""
    return sum(parts, Measures())


def _added(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    if not one or not other:
        return one or other
    return tuple(a + b for a, b in zip(one, other, strict=True))


def _ratio(part: float, whole: float) -> float | None:
    if part == 0:
        return 0.0
    return math.sqrt(part / whole) if whole > 0 and part / whole < math.inf else None
