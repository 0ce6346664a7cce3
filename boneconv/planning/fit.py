"""Whether an adapter's tensor fits the base's tensor it belongs to."""

from __future__ import annotations

import math
from collections.abc import Collection

from boneconv.adapter import Block
from boneconv.config import Axis, Variant
from boneconv.dtypes import FLOAT8S, FLOATS
from boneconv.errors import FormatError, ShapeError, listing
from boneconv.io.checkpoint import Checkpoint
from boneconv.io.safetensors import StoredTensor, Tensor

__all__ = ["check_block_fits", "check_resized", "is_resize"]


def check_block_fits(block: Block, weight: Tensor, *, dequantised: bool = False) -> None:
    """Checks a block against the weight it updates.

    Args:
        block: The block.
        weight: The weight.
        dequantised: Whether it is of a quantised dtype and will be dequantised.

    Raises:
        FormatError: The weight is quantised, or of another dtype that cannot be merged into.
        ShapeError: It is no matrix (nor a 1x1 convolution), or the block has another size.
    """
    path = weight.path if isinstance(weight, StoredTensor) else None
    if weight.dtype not in FLOATS and not dequantised:
        raise FormatError(
            f"{weight.name!r} has a dtype that cannot be merged into",
            path=path,
            expected=", ".join(FLOATS),
            found=weight.dtype,
            hint="Is the base quantised? Merge into the weights that it was quantised from"
            + (", or give --dtype bfloat16 to dequantise it" if weight.dtype in FLOAT8S else ""),
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


def check_resized(
    base: Checkpoint, resized: Collection[tuple[int, int]], replaced: Collection[str]
) -> None:
    """A resized vocabulary must reach the embedding and the head, or the model will not load.

    Args:
        base: The base.
        resized: Old and new numbers of rows.
        replaced: The tensors that are replaced.

    Raises:
        ShapeError: It does not.
    """
    if len(resized) > 1:
        raise ShapeError(f"the adapters resize to different sizes: {sorted(resized)}")
    for old, _ in resized:
        left = [name for name in _vocabulary_tensors(base, old) if name not in replaced]
        if left:
            raise ShapeError(
                f"the vocabulary is resized, but {listing(left)} keeps {old} rows",
                path=base.root,
                hint="The adapter has to hold every resized tensor; save it with "
                "save_embedding_layers=True",
            )


def _vocabulary_tensors(base: Checkpoint, rows: int) -> list[str]:
    """Matrices of the vocabulary's height that stand outside the numbered layers."""
    return [
        name
        for name, tensor in base.tensors.items()
        if len(tensor.shape) == 2
        and tensor.shape[0] == rows
        and not any(segment.isdigit() for segment in name.split("."))
    ]


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
