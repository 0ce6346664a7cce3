"""Whether an adapter's tensor fits the base's tensor it belongs to."""

from __future__ import annotations

import math
from collections.abc import Collection

from boneconv.adapter import Block
from boneconv.config import Axis, Variant
from boneconv.dtypes import FLOATS
from boneconv.errors import FormatError, ShapeError
from boneconv.io.safetensors import StoredTensor, Tensor

__all__ = ["check_block_fits", "is_resize"]


def check_block_fits(block: Block, weight: Tensor) -> None:
    """Checks a block against the weight it updates.

    Raises:
        FormatError: The weight is quantised, or of another dtype that cannot be merged into.
        ShapeError: It is no matrix (nor a 1x1 convolution), or the block has another size.
    """
    path = weight.path if isinstance(weight, StoredTensor) else None
    if weight.dtype not in FLOATS:
        raise FormatError(
            f"{weight.name!r} has a dtype that cannot be merged into",
            path=path,
            expected=", ".join(FLOATS),
            found=weight.dtype,
            hint="Is the base quantised? Merge into the weights that it was quantised from",
        )
    if len(weight.shape) < 2 or math.prod(weight.shape[2:]) != 1:
        raise ShapeError(
            f"{weight.name!r} is no linear weight",
            path=path,
            expected="[out, in], or [out, in, 1, 1]",
            found=list(weight.shape),
        )
    out_features, in_features = weight.shape[:2]
    expected = _expected_shape(block, out_features, in_features)
    if block.tensor.shape != expected:
        raise ShapeError(
            f"the {block.variant} block of {block.module!r} does not fit its weight "
            f"[{out_features}, {in_features}]",
            path=path,
            expected=list(expected) if expected else f"rank {block.rank} to divide both",
            found=list(block.tensor.shape),
            hint="The adapter was made for another base, or as another variant",
        )


def is_resize(saved: Tensor, stored: StoredTensor, vocabulary_sizes: Collection[int]) -> bool:
    """Whether a saved tensor is the stored one with another number of vocabulary rows."""
    return saved.shape[1:] == stored.shape[1:] and stored.shape[0] in vocabulary_sizes


def _expected_shape(block: Block, out_features: int, in_features: int) -> tuple[int, ...]:
    """The shape that fits; empty where no block of this rank can."""
    r = block.rank
    if block.variant is Variant.BONE:
        return r, out_features
    if block.variant is Variant.MINI:
        width = block.tensor.shape[1]
        return (r, width) if out_features % width == 0 else ()
    if out_features % r or in_features % r:
        return ()
    return (out_features if block.axis is Axis.OUT else in_features) // r, r, r
