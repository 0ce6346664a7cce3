"""One adapter's update of one layer: its variant, its block and the shape the block must have.

With W ``[out, in]`` and rank r (arXiv 2409.15371; PEFT 0.14 to 0.18.1; "mini" from PEFT's MiSS):

    Bone      block [r, out]        W'[o, j] = W[o, j] + B[j mod r, o]
    mini      block [r, mini_r]     W'[o, j] = W[o, j] + B[j mod r, o mod mini_r]
    BAT out   block [out/r, r, r]   W'[a][b] = W[a][b] + W[a][b] @ B[a] + B[a]   (r x r tiles)
    BAT in    block [in/r, r, r]    W'[a][b] = W[a][b] + W[a][b] @ B[b] + B[b]
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from boneconv.config import Axis, Variant
from boneconv.errors import ConfigError, ShapeError

__all__ = ["Update", "block_shape", "check_block"]


class Update(NamedTuple):
    """How one adapter updates one weight.

    Attributes:
        variant: Which formula.
        block: The adapter's tensor, of `block_shape`; any floating dtype.
        axis: The axis that a BAT block runs along; without meaning for Bone and mini.
        dropout: Probability that an input of a Bone or mini update is zeroed; 0 outside training.
    """

    variant: Variant
    block: Tensor
    axis: Axis = Axis.OUT
    dropout: float = 0.0

    @property
    def is_bat(self) -> bool:
        """Whether the update multiplies the weight, and does not only add to it."""
        return self.variant is Variant.BAT

    @property
    def acts_on_rows(self) -> bool:
        """Whether it is BAT over the output axis: the one that needs the weight's row blocks."""
        return self.is_bat and self.axis is Axis.OUT

    @property
    def rank(self) -> int:
        """The rank r: a Bone block's height, a BAT block's edge."""
        return self.block.shape[-1] if self.is_bat else self.block.shape[0]


def block_shape(
    variant: Variant, axis: Axis, r: int, mini_r: int, shape: tuple[int, int]
) -> tuple[int, ...]:
    """The shape of a block of rank ``r`` for a weight.

    Args:
        variant: Which formula.
        axis: The axis of a BAT block.
        r: The rank; need not divide ``in`` for Bone and mini.
        mini_r: The width of a mini block; other variants ignore it.
        shape: The weight's ``(out, in)``.

    Raises:
        ConfigError: ``r`` or ``mini_r`` is not positive.
        ShapeError: BAT and r does not divide both sides, or mini and mini_r does not divide out.
    """
    rows, columns = shape
    for name, value in (("r", r), ("mini_r", mini_r)):
        if value <= 0:
            raise ConfigError(f"{name} must be a positive integer", expected=1, found=value)
    if variant is Variant.BONE:
        return (r, rows)
    if variant is Variant.MINI:
        if rows % mini_r:
            raise ShapeError("mini_r does not divide out_features", expected=rows, found=mini_r)
        return (r, mini_r)
    if rows % r or columns % r:
        raise ShapeError(
            "BAT cuts the weight into r x r tiles, which do not fit it",
            expected=f"an r that divides {rows} and {columns}",
            found=r,
        )
    return ((rows if axis is Axis.OUT else columns) // r, r, r)


def check_block(update: Update, shape: tuple[int, int]) -> None:
    """Hold an update against the weight's ``(out, in)``.

    Raises:
        ShapeError: The block does not fit.
    """
    found = tuple(update.block.shape)
    dimensions = 3 if update.is_bat else 2
    if len(found) == dimensions and min(found) > 0:
        mini_r = found[1] if update.variant is Variant.MINI else 1
        if found == block_shape(update.variant, update.axis, update.rank, mini_r, shape):
            return
    raise ShapeError(
        f"a {update.variant} block does not fit a weight of shape {list(shape)}",
        found=list(found),
    )
