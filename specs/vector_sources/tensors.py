"""Tensors as bit patterns, and the numbers in them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

#: exponent bits and mantissa bits
FORMS = {"F64": (11, 52), "F32": (8, 23), "F16": (5, 10), "BF16": (8, 7)}
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class Tensor:
    """A tensor as bit patterns, row by row."""

    dtype: str
    shape: tuple[int, ...]
    bits: tuple[int, ...]

    @property
    def data(self) -> bytes:
        """The little-endian bytes."""
        return b"".join(value.to_bytes(WIDTHS[self.dtype], "little") for value in self.bits)

    @property
    def numbers(self) -> list[Fraction]:
        """The exact values."""
        return [decode(value, self.dtype) for value in self.bits]


def decode(bits: int, dtype: str) -> Fraction:
    """The exact value of a bit pattern; not for NaN and infinity."""
    exponent_bits, mantissa_bits = FORMS[dtype]
    bias = 2 ** (exponent_bits - 1) - 1
    mantissa = bits & (1 << mantissa_bits) - 1
    exponent = bits >> mantissa_bits & (1 << exponent_bits) - 1
    if exponent:
        mantissa += 1 << mantissa_bits
    value = mantissa * Fraction(2) ** (max(exponent, 1) - bias - mantissa_bits)
    return -value if bits >> mantissa_bits + exponent_bits else value


def encode(value: Fraction, dtype: str, *, negative: bool | None = None) -> int:
    """The bit pattern nearest to a value, ties to even; `negative` is the sign of a zero."""
    exponent_bits, mantissa_bits = FORMS[dtype]
    bias = 2 ** (exponent_bits - 1) - 1
    sign = (value < 0 if negative is None else negative) << mantissa_bits + exponent_bits
    size = abs(value)
    if not size:
        return sign
    exponent = 1 - bias
    while size >= Fraction(2) ** (exponent + 1):
        exponent += 1
    scaled = size / Fraction(2) ** (exponent - mantissa_bits)
    mantissa, rest = divmod(scaled.numerator, scaled.denominator)
    twice = 2 * rest - scaled.denominator
    mantissa += twice > 0 or (twice == 0 and mantissa % 2)
    if mantissa == 2 << mantissa_bits:
        mantissa, exponent = mantissa >> 1, exponent + 1
    if exponent > bias:
        raise OverflowError(f"{float(value)} does not fit {dtype}")
    if mantissa < 1 << mantissa_bits:
        return sign | mantissa
    return sign | exponent + bias << mantissa_bits | mantissa - (1 << mantissa_bits)


def tensor(dtype: str, shape: Iterable[int], numbers: Iterable[float | Fraction]) -> Tensor:
    """A tensor of numbers, each rounded to the dtype."""
    bits = []
    for number in numbers:
        negative = math.copysign(1, number) < 0 if isinstance(number, float) else None
        bits.append(encode(Fraction(number), dtype, negative=negative))
    return Tensor(dtype, tuple(shape), tuple(bits))


def noise(label: str, dtype: str, *shape: int, size: Fraction | float = 1) -> Tensor:
    """Numbers between -size and size that look random and never change."""
    count, words = math.prod(shape), []
    for index in range(-(-count // 4)):
        block = hashlib.sha256(f"{label}/{index}".encode()).digest()
        words += [int.from_bytes(block[i : i + 8], "little") for i in range(0, 32, 8)]
    scale = Fraction(size) / 2**63
    return tensor(dtype, shape, [(word - 2**63) * scale for word in words[:count]])
