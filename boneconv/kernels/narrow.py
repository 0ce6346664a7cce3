"""bfloat16 and float16 to float32 and back, by integer arithmetic in few passes over memory.

Both 16-bit formats share one shape. Take a float32's bits *aligned* with the format: the upper bits
of the magnitude are the result, and the lower ones (the fraction, 16 or 13 of them) say how far the
value lies from a midpoint between two results. For bfloat16 the float32 is aligned as it is. For
float16 it is times 2**-112: the exponents then agree, and float16's subnormals become float32's,
so that gradual underflow needs no case of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from boneconv.dtypes import BF16, F16, F32
from boneconv.kernels.scratch import Scratch
from boneconv.kernels.stage import Array

__all__ = ["FORMATS", "HalfFormat", "widen"]


@dataclass(frozen=True)
class HalfFormat:
    """A 16-bit target.

    Attributes:
        dtype: bfloat16 or float16.
        fraction: How many low bits of an aligned magnitude are cut off.
        scale: What aligns a float32.
        safe: Smaller magnitudes cannot round beyond the largest finite number.
    """

    dtype: np.dtype[Any]
    fraction: int
    scale: float
    safe: float

    def align(self, values: Array, out: Array) -> Array:
        """Float32 values times `scale`; ``values`` itself where that is 1, else ``out``."""
        if self.scale == 1.0:
            return values
        return np.multiply(values, np.float32(self.scale), out=out)

    def store(self, aligned: Array, out: Array, scratch: Scratch, low: Array | None = None) -> None:
        """Round to nearest, ties away from zero.

        Args:
            aligned: float32, of values below `safe`; overwritten.
            out: uint16: the result's bits.
            scratch: Work space.
            low: uint16; zero afterwards where ``aligned`` is a tie, and only there.
        """
        work = aligned.view(np.uint32)
        np.add(work, np.uint32(1 << (self.fraction - 1)), out=work)
        if low is not None:
            np.copyto(low, work, casting="unsafe")
            if self.fraction < 16:
                np.bitwise_and(low, np.uint16((1 << self.fraction) - 1), out=low)
        self._store_upper(work, out, scratch)

    def store_even(self, aligned: Array, out: Array, scratch: Scratch) -> None:
        """Round to nearest, ties to even; arguments as of `store`."""
        work = scratch.take("part", aligned.shape, np.uint32)
        bits = aligned.view(np.uint32)
        np.right_shift(bits, np.uint32(self.fraction), out=work)
        np.bitwise_and(work, np.uint32(1), out=work)
        np.add(work, np.uint32((1 << (self.fraction - 1)) - 1), out=work)
        np.add(work, bits, out=work)
        self._store_upper(work, out, scratch)

    def _store_upper(self, words: Array, out: Array, scratch: Scratch) -> None:
        if self.fraction < 16:
            # The sign is bit 31, bits 28 to 30 are zero, and bit 28 is where it belongs:
            # min(x, x + 0x90000000), since the sum wraps for negative values only.
            moved = scratch.take("moved", words.shape, np.uint32)
            np.add(words, np.uint32(0x90000000), out=moved)
            np.minimum(words, moved, out=words)
        np.right_shift(words, np.uint32(self.fraction), out=words)
        np.copyto(out, words, casting="unsafe")

    def number(self, magnitude: int) -> float:
        """One magnitude (the format's bits without sign, finite) as a float."""
        digits = 23 - self.fraction
        exponent, number = magnitude >> digits, magnitude & ((1 << digits) - 1)
        lowest = -133 if self.scale == 1.0 else -24
        return math.ldexp(number + ((exponent > 0) << digits), max(exponent, 1) - 1 + lowest)

    def value_of(self, magnitude: Array) -> Array:
        """Magnitudes (the format's bits without sign, finite) as float64."""
        wide = (magnitude.astype(np.uint32) << np.uint32(self.fraction)).view(np.float32)
        return np.asarray(wide.astype(np.float64) / self.scale)


FORMATS = {
    BF16: HalfFormat(BF16, 16, 1.0, 2.0**126),
    F16: HalfFormat(F16, 13, 2.0**-112, 2.0**15),
}


def widen(rows: Array, scratch: Scratch, name: str = "wide") -> Array:
    """Finite rows of at most float32 as float32; float32 rows are returned as they are."""
    if rows.dtype == F32:
        return rows
    wide = scratch.take(name, rows.shape, F32)
    if rows.dtype == BF16:
        np.copyto(wide, rows)
        return wide
    bits = wide.view(np.int32)
    np.copyto(bits, rows.view(np.int16))
    np.left_shift(bits, np.int32(13), out=bits)
    np.bitwise_and(bits, np.int32(-0x70000001), out=bits)  # drop the copies of the sign
    return np.multiply(wide, np.float32(2.0**112), out=wide)
