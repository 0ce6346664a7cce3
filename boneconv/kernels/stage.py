"""One adapter's update of one weight, and what its block says of every element.

With W ``[out, in]`` and rank r (arXiv 2409.15371; PEFT 0.14 to 0.18):

    Bone      block [r, out]        delta[o, j] = B[j mod r, o]
    mini      block [r, mini_r]     delta[o, j] = B[j mod r, o mod mini_r]
    BAT out   block [out/r, r, r]   delta[a][b] = W[a][b] @ B[a] + B[a]    (W in r x r tiles)
    BAT in    block [in/r, r, r]    delta[a][b] = W[a][b] @ B[b] + B[b]

and W' = W + scale * delta.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from boneconv.config import Axis, Variant
from boneconv.dtypes import BF16, F16, F32, F64
from boneconv.errors import ConfigError, NonFiniteError, ShapeError

__all__ = ["Array", "Stage", "check_stage", "fold_scale", "is_bat", "rank_of", "row_update"]

Array: TypeAlias = npt.NDArray[Any]

_FLOATS = (BF16, F16, F32, F64)


@dataclass(frozen=True)
class Stage:
    """One adapter's update of one weight: ``W + scale * (W' - W)``.

    Attributes:
        variant: Which formula.
        block: The adapter's tensor; Bone ``[r, out]``, mini ``[r, mini_r]``, BAT ``[out/r, r, r]``
            or, over the input axis, ``[in/r, r, r]``. float64, float32, float16 or bfloat16; it is
            never written to.
        axis: The axis that a BAT block runs along; without meaning for Bone and mini.
        scale: How much of the update is applied; the binary64 value is taken exactly.
        residue: What the scale lacks: where it is a product of two numbers, the factor is exactly
            ``scale + residue``.
    """

    variant: Variant
    block: Array
    axis: Axis = Axis.OUT
    scale: float = 1.0
    residue: float = 0.0


def is_bat(stage: Stage) -> bool:
    """Whether the update multiplies the weight, and does not only add to it."""
    return stage.variant is Variant.BAT


def rank_of(stage: Stage) -> int:
    """The rank r: a Bone block's height, a BAT block's edge."""
    return int(stage.block.shape[-1] if is_bat(stage) else stage.block.shape[0])


def check_stage(stage: Stage, shape: tuple[int, int]) -> None:
    """Hold a stage against the weight's shape.

    Args:
        stage: The update.
        shape: The weight's ``(out, in)``.

    Raises:
        ConfigError: The scale is not finite, or the block's dtype is not a floating one.
        ShapeError: The block's shape does not fit the weight.
        NonFiniteError: The block holds NaN or infinity.
    """
    if not math.isfinite(stage.scale + stage.residue):
        raise ConfigError("the scale is not finite", found=stage.scale)
    if stage.block.dtype not in _FLOATS:
        raise ConfigError("a block of an unknown dtype", found=stage.block.dtype)
    _check_shape(stage, shape)
    if stage.block.size:
        with np.errstate(all="ignore"):
            finite = np.isfinite(stage.block)
        if not finite.all():
            where = np.unravel_index(int(np.argmin(finite)), stage.block.shape)
            place = tuple(int(i) for i in where)
            raise NonFiniteError(
                f"the adapter's block is not finite at {place}", found=stage.block[place]
            )


def _check_shape(stage: Stage, shape: tuple[int, int]) -> None:
    rows, columns = shape
    block = stage.block.shape
    if stage.variant is Variant.BONE:
        _expect(stage, len(block) == 2 and block[0] > 0 and block[1] == rows, f"[r, {rows}]", shape)
    elif stage.variant is Variant.MINI:
        fits = len(block) == 2 and min(block) > 0 and rows % block[1] == 0
        _expect(stage, fits, f"[r, a divisor of {rows}]", shape)
    else:
        blocks_along = rows if stage.axis is Axis.OUT else columns
        fits = len(block) == 3 and block[1] == block[2] and block[1] > 0
        fits = fits and rows % block[1] == 0 and columns % block[1] == 0
        fits = fits and block[0] * block[1] == blocks_along
        _expect(stage, fits, f"[{blocks_along}/r, r, r], r dividing {rows} and {columns}", shape)


def _expect(stage: Stage, fits: bool, expected: str, shape: tuple[int, int]) -> None:
    if not fits:
        raise ShapeError(
            f"a {stage.variant} block does not fit a weight of shape {list(shape)}",
            expected=expected,
            found=list(stage.block.shape),
        )


def fold_scale(stage: Stage) -> Stage:
    """The same update with scale 1, where scale * block is exact; otherwise the stage itself.

    BAT folds as well: ``scale * (W @ B + B) = W @ (scale * B) + scale * B``. The folded block is
    float32; what float32 does not hold is not folded.
    """
    if stage.scale == 1.0 or stage.residue:
        return stage
    block = stage.block.astype(np.float64)
    with np.errstate(all="ignore"):
        scaled = block * stage.scale
        if not _products_are_exact(stage, block, scaled):
            return stage
        single = scaled.astype(np.float32)
    fits = bool(np.array_equal(single.astype(np.float64), scaled))
    return replace(stage, block=single, scale=1.0) if fits else stage


def _products_are_exact(stage: Stage, block: Array, scaled: Array) -> bool:
    """Whether every scale * element fits 53 bits, judged by the significant bits of both."""
    if stage.scale == 0.0 or not block.any():
        return True
    if not np.isfinite(scaled).all() or np.abs(scaled[block != 0]).min() < 2.0**-900:
        return False
    return _significant_bits(np.asarray([stage.scale])) + _significant_bits(block) <= 53


def _significant_bits(values: Array) -> int:
    """The longest significand, in bits, of non-zero float64 values."""
    fraction, _ = np.frexp(values[values != 0])
    digits = np.abs(fraction * 2.0**53).astype(np.int64)
    lowest = int((digits & -digits).min())
    return 54 - lowest.bit_length()


def row_update(stage: Stage, first: int, count: int) -> Array:
    """What Bone or mini adds to rows ``first .. first + count``, one period: ``[count, r]``.

    Column j of the weight gets column ``j mod r`` of the result. A view for Bone.
    """
    if stage.variant is Variant.MINI:
        rows = np.arange(first, first + count) % stage.block.shape[1]
        return stage.block[:, rows].T
    return stage.block[:, first : first + count].T
