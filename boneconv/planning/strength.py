"""An adapter and how strongly it is applied."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from boneconv.adapter import Adapter
from boneconv.errors import UsageError

__all__ = ["Strength"]


@dataclass(frozen=True)
class Strength:
    """An adapter and how strongly it is applied.

    Attributes:
        adapter: The adapter.
        scale: S in ``W + S (W' - W)``.
    """

    adapter: Adapter
    scale: float = 1.0

    def factor(self) -> tuple[float, float]:
        """The product with the adapter's own scale, exactly: a binary64 and what it lacks.

        Raises:
            UsageError: The product is too large or too small for that.
        """
        product = Fraction(self.scale) * Fraction(self.adapter.scale)
        try:
            high = float(product)
            low = float(product - Fraction(high))
        except OverflowError as error:
            raise UsageError("the scale is too large", found=self.scale) from error
        if Fraction(high) + Fraction(low) != product:
            raise UsageError("the scale is too small", found=self.scale)
        return high, low
