"""What a plan says of a float8 weight with scales, and what computes it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from boneconv.dtypes import FLOATS
from boneconv.engine.plan import PlannedTensor
from boneconv.engine.station import naming_block, stages_of
from boneconv.errors import NonFiniteError
from boneconv.io.files import Reader
from boneconv.io.safetensors import StoredTensor, byte_view
from boneconv.kernels.scaled import ScaledMerger, ScaleGrid
from boneconv.kernels.stage import Array

__all__ = ["SCALES", "Dequantisation"]

#: safetensors dtypes of scales: with a float8's four bits, their products are exact in float64.
SCALES = {
    **{name: dtype for name, dtype in FLOATS.items() if name != "F64"},
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}


@dataclass(frozen=True)
class Dequantisation:
    """How a float8 weight is dequantised: each element times the scale of its block.

    Attributes:
        scale: The scales, of a dtype in `SCALES`, ``[..., blocks down, blocks across]`` or one for
            each row or for all; None for weights that are their own values.
        block: Rows and columns of a block.
    """

    scale: StoredTensor | None
    block: tuple[int, int]

    def __call__(self, planned: PlannedTensor) -> ScaledMerger:
        """What dequantises a planned tensor, merges its updates and rounds once.

        Raises:
            NonFiniteError: A scale or a block holds NaN or infinity.
            ShapeError: A block does not fit the weight.
            FormatError, MachineError: Reading failed.
        """
        grid, target = self.grid(planned), FLOATS[planned.dtype]
        with naming_block(planned):
            return ScaledMerger(grid, stages_of(planned), planned.kernel_shape, target)

    def grid(self, planned: PlannedTensor) -> ScaleGrid:
        """The scales of a planned tensor's source, read."""
        rows, columns = planned.kernel_shape
        height = planned.shape[-2] if len(planned.shape) == 3 and not planned.updates else rows
        across = math.ceil(columns / self.block[1])
        down = math.ceil(height / self.block[0]) * (rows // max(1, height))
        scales = _read(self.scale) if self.scale is not None else np.ones(1)
        if scales.size == 1:
            scales = np.broadcast_to(scales, (down, across))
        return ScaleGrid(scales.reshape(down, across), height, self.block, columns)


def _read(scale: StoredTensor) -> Array:
    raw = np.empty(scale.shape, SCALES[scale.dtype]).reshape(-1)
    with Reader(scale.path) as reader:
        reader.read_into(byte_view(raw), scale.offset)
    values = raw.astype(np.float64)
    if not np.isfinite(values).all():
        raise NonFiniteError(f"the scale {scale.name!r} is not finite", path=scale.path)
    return values
