"""The updated weight itself: as a differentiable formula, and as the merge that is written back.

`merged_weight` of tensors in the CPU's memory is canonical: every element is the exact value of all
stages, rounded once (`boneconv.kernels`), so that its bytes are those of ``boneconv merge``. On
other devices it is computed in float64 (float32 for half precision) and rounded once. PEFT 0.18.1
rounds BAT twice in half precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from boneconv.config import Axis, Variant
from boneconv.errors import ConfigError, NonFiniteError
from boneconv.kernels import RowMerger, Scratch, Stage
from boneconv.nn.updates import Update, check_block

__all__ = ["compose", "merged_weight"]

_NUMPY: dict[torch.dtype, np.dtype[Any]] = {
    torch.float64: np.dtype(np.float64),
    torch.float32: np.dtype(np.float32),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
}
_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_HALVES = (torch.float16, torch.bfloat16)


def compose(weight: Tensor, updates: Sequence[Update]) -> Tensor:
    """W after all updates, in order, as a formula that autograd follows.

    Args:
        weight: ``[out, in]``.
        updates: The stages.

    Returns:
        ``[out, in]`` in the widest dtype among weight and blocks; the weight itself without stages.

    Raises:
        ShapeError: A block does not fit the weight.
    """
    for update in updates:
        check_block(update, (weight.shape[0], weight.shape[1]))
        dtype = torch.promote_types(weight.dtype, update.block.dtype)
        block = update.block.to(dtype)
        step = _bat if update.is_bat else _additive
        weight = step(weight.to(dtype), block, update)
    return weight


def _bat(weight: Tensor, block: Tensor, update: Update) -> Tensor:
    rows, columns = weight.shape
    r = update.rank
    tiles = weight.reshape(rows // r, r, columns // r, r)  # [a, i, b, j]
    if update.axis is Axis.OUT:
        change = torch.matmul(tiles, block[:, None]) + block[:, :, None]
    else:
        change = torch.matmul(tiles.transpose(1, 2), block) + block  # [a, b, i, j]
        change = change.transpose(1, 2)
    return weight + change.reshape(rows, columns)


def _additive(weight: Tensor, block: Tensor, update: Update) -> Tensor:
    rows, columns = weight.shape
    if update.variant is Variant.MINI:
        block = block.repeat(1, rows // block.shape[1])
    periods = -(-columns // update.rank)
    return weight + block.t().repeat(1, periods)[:, :columns]


@torch.no_grad()
def merged_weight(weight: Tensor, updates: Sequence[Update], *, finite: bool = False) -> Tensor:
    """W after all updates, in order, computed exactly or in a wider dtype and rounded once.

    Args:
        weight: ``[out, in]``, float64, float32, float16 or bfloat16; not written to.
        updates: The stages.
        finite: Refuse weights, blocks and results that are not finite.

    Returns:
        ``[out, in]``, a new tensor of the weight's dtype on its device.

    Raises:
        ConfigError: The weight's dtype is none of the four.
        ShapeError: A block does not fit the weight.
        NonFiniteError: ``finite``, and a number is not; NaN and infinity go through otherwise.
    """
    if weight.dtype not in _NUMPY:
        raise ConfigError(
            "a weight of this dtype cannot be merged",
            expected=", ".join(str(dtype).removeprefix("torch.") for dtype in _NUMPY),
            found=weight.dtype,
            hint="Merge the adapter into the checkpoint before it is quantized",
        )
    updates = [u._replace(block=u.block.to(weight.device)) for u in updates]
    for update in updates:
        check_block(update, (weight.shape[0], weight.shape[1]))
    if weight.device.type != "cpu" or type(weight.data) is not Tensor:
        return _rounded(weight, updates, finite=finite)
    try:
        return _canonical(weight, updates)
    except NonFiniteError:
        if finite:
            raise
        return _rounded(weight, updates, finite=False)


def _canonical(weight: Tensor, updates: Sequence[Update]) -> Tensor:
    stages = [Stage(u.variant, _array(u.block), u.axis) for u in updates]
    dtype = _NUMPY[weight.dtype]
    rows, columns = weight.shape
    merger = RowMerger(stages, (rows, columns), dtype, dtype)
    merged = torch.empty_like(weight, memory_format=torch.contiguous_format)
    source, out = _array(weight), _array(merged)
    step = merger.preferred_rows()
    scratch = Scratch()
    for first in range(0, rows, step):
        part = slice(first, min(rows, first + step))
        merger.merge(source[part], first, out[part], scratch)
    return merged


def _array(tensor: Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    """A tensor of the CPU as an array, shared where it is contiguous."""
    if tensor.dtype not in _NUMPY:
        raise ConfigError("a block of this dtype cannot be merged", found=tensor.dtype)
    plain = tensor.detach().contiguous()
    bits = plain.view(_SIGNED[plain.element_size()])
    return bits.numpy().view(_NUMPY[tensor.dtype])


def _rounded(weight: Tensor, updates: Sequence[Update], *, finite: bool) -> Tensor:
    wide = torch.float32 if weight.dtype in _HALVES else torch.float64
    whole = compose(weight.to(wide), [u._replace(block=u.block.to(wide)) for u in updates])
    merged = whole.to(weight.dtype, copy=True)
    if finite and not bool(torch.isfinite(merged).all()):
        raise NonFiniteError("the merged weight is not finite", hint="Check the adapter's blocks")
    return merged
