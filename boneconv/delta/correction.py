"""The difference between elements and a prediction of them, packed.

Floats of one format, ordered by value with -0 below +0, are numbered; the number of the element
less that of the prediction, modulo the format's width, counts the steps of one unit in the last
place between the two. The steps (0, -1, 1, -2, ... written as 0, 1, 2, 3, ...) are cut into planes
of bytes, the lowest first; planes above the highest that is not zero are left out; the rest is
deflated where that makes it shorter.

    piece = kind, planes        kind = number of planes (+ 64: the prediction is all zero bits)
                                       (+ 128: the planes are deflated)

Any bit pattern is restored from any prediction of the same dtype, NaN included.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from boneconv.errors import FormatError
from boneconv.kernels.rounding import BITS
from boneconv.kernels.stage import Array

__all__ = ["correct", "is_blank", "pack", "unpack"]

_BLANK, _DEFLATED, _PLANES = 64, 128, 63


def pack(elements: Array, predicted: Array | None) -> bytes:
    """The piece that turns a prediction into elements.

    Args:
        elements: The elements to restore, of a float dtype.
        predicted: The prediction, of the same dtype and shape; None for all zero bits.
    """
    kind = _BLANK if predicted is None else 0
    number = _numbers(elements) - (_zeros(elements) if predicted is None else _numbers(predicted))
    steps = _zigzag(number)
    width = steps.dtype.itemsize
    planes = steps.astype(steps.dtype.newbyteorder("<")).view(np.uint8).reshape(-1, width).T
    count = max((i + 1 for i in range(width) if planes[i].any()), default=0)
    content = planes[:count].tobytes()
    deflated = _deflate(content)
    if len(deflated) < len(content):
        return bytes([kind | _DEFLATED | count]) + deflated
    return bytes([kind | count]) + content


def is_blank(piece: bytes) -> bool:
    """Whether a piece does without a prediction."""
    return bool(piece) and bool(piece[0] & _BLANK)


def unpack(piece: bytes, count: int, dtype: np.dtype[Any]) -> Array:
    """The steps in a piece, as unsigned integers for `correct`.

    Args:
        piece: What `pack` made.
        count: How many elements it is for.
        dtype: Their dtype.

    Raises:
        FormatError: The piece is malformed.
    """
    unsigned = np.dtype(BITS[dtype])
    width, kept = unsigned.itemsize, piece[0] & _PLANES if piece else 0
    content = piece[1:]
    if piece and piece[0] & _DEFLATED:
        content = _inflate(content, kept * count)
    if not piece or kept > width or len(content) != kept * count:
        raise FormatError("a correction is malformed")
    planes = np.zeros((count, width), np.uint8)
    planes[:, :kept] = np.frombuffer(content, np.uint8).reshape(kept, count).T
    steps = planes.reshape(-1).view(unsigned.newbyteorder("<")).astype(unsigned)
    return np.asarray(_unzigzag(steps))


def correct(steps: Array, predicted: Array) -> None:
    """Turns a prediction into the elements, in place.

    Args:
        steps: From `unpack`, or some of them.
        predicted: As many elements, contiguous; all zero bits where the piece is blank.
    """
    if steps.any():
        bits = predicted.reshape(-1).view(BITS[predicted.dtype])
        bits[...] = _from_numbers(_numbers(predicted) + steps)


def _numbers(values: Array) -> Array:
    """The elements' places in the order of all bit patterns: unsigned integers."""
    bits = values.reshape(-1).view(BITS[values.dtype])
    return np.asarray(bits ^ _flips(bits))


def _zeros(values: Array) -> Any:
    return _numbers(np.zeros(1, values.dtype))[0]


def _from_numbers(numbers: Array) -> Array:
    return np.asarray(numbers ^ _flips(~numbers))


def _flips(bits: Array) -> Array:
    """What turns bits into their number: all of a negative one's, the sign of a positive one's."""
    top = bits.dtype.type(1 << (8 * bits.dtype.itemsize - 1))
    return np.asarray(np.where(bits & top, ~bits.dtype.type(0), top))


def _zigzag(steps: Array) -> Array:
    sign = np.right_shift(_signed(steps), 8 * steps.dtype.itemsize - 1).view(steps.dtype)
    return np.asarray((steps << steps.dtype.type(1)) ^ sign)


def _unzigzag(steps: Array) -> Array:
    one = steps.dtype.type(1)
    return np.asarray((steps >> one) ^ (~(steps & one) + one))


def _signed(values: Array) -> Array:
    return values.view(f"i{values.dtype.itemsize}")


def _deflate(content: bytes) -> bytes:
    """Raw deflate that looks for runs only: the fastest, and on such planes the shortest too."""
    packer = zlib.compressobj(6, zlib.DEFLATED, -15, 9, zlib.Z_RLE)
    return packer.compress(content) + packer.flush()


def _inflate(content: bytes, length: int) -> bytes:
    unpacker = zlib.decompressobj(-15)
    try:
        found = unpacker.decompress(content, length + 1)
    except zlib.error as error:
        raise FormatError("a correction is malformed") from error
    if not unpacker.eof or unpacker.unused_data:
        raise FormatError("a correction is malformed")
    return found
