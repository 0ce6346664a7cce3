"""The formulas, as plain float64 numpy: readable as their definition.

These are not canonical (float64 rounds too); `boneconv.kernels.exact` is. Everything faster is
tested against one of the two.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from boneconv.config import Axis, Variant
from boneconv.kernels.stage import Array, Stage, check_stage

__all__ = ["apply", "delta"]

Doubles = npt.NDArray[np.float64]


def delta(weight: Array, stage: Stage) -> Doubles:
    """W' - W of one stage at scale 1, in float64.

    Args:
        weight: ``[out, in]``.
        stage: The update; its scale is not applied.

    Returns:
        ``[out, in]`` float64.

    Raises:
        ShapeError: The block does not fit the weight.
        NonFiniteError: The block holds NaN or infinity.
    """
    rows, columns = weight.shape
    check_stage(stage, (rows, columns))
    block = stage.block.astype(np.float64)
    if stage.variant is Variant.BAT:
        return _bat(weight.astype(np.float64), block, stage.axis)
    if stage.variant is Variant.MINI:
        block = np.tile(block, (1, rows // block.shape[1]))
    return np.asarray(block[np.arange(columns) % block.shape[0], :].T)


def _bat(weight: Doubles, block: Doubles, axis: Axis) -> Doubles:
    rows, columns = weight.shape
    r = block.shape[-1]
    tiles = weight.reshape(rows // r, r, columns // r, r).transpose(0, 2, 1, 3)  # [a, b, r, r]
    blocks = block[:, None] if axis is Axis.OUT else block[None, :]
    change = tiles @ blocks + blocks
    return np.asarray(change.transpose(0, 2, 1, 3).reshape(rows, columns))


def apply(weight: Array, stages: Sequence[Stage]) -> Doubles:
    """All stages in order, each with its scale, in float64: ``[out, in]``.

    Raises:
        ShapeError: A block does not fit the weight.
        NonFiniteError: A block holds NaN or infinity.
    """
    merged = weight.astype(np.float64)
    for stage in stages:
        merged = merged + stage.scale * delta(merged, stage)
    return merged
