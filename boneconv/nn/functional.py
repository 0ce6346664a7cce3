"""The variants as functions of tensors: what `BoneLinear` computes, readable by itself.

W is ``[out, in]``, r the rank; the formulas are those of `boneconv.nn.updates` (arXiv 2409.15371;
PEFT 0.14 to 0.18.1; DESIGN math). Nothing is mutated but what a docstring says. All of it follows
the device of its arguments, and autograd, autocast, `torch.compile` and `torch.export` go through.

    Bone      y = x W^T + s B                       s = sum of x's r-wide slices
    mini      y = x W^T + tile(s B)
    BAT in    y = (x + z) W^T + tile(sum_b z_b)     z_b = B[b] x_b
    BAT out   y_a = sum_b W[a][b] (x_b + B[a] x_b) + B[a] s
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from boneconv.errors import ShapeError
from boneconv.nn.bat import bat_linear, compute_dtype
from boneconv.nn.bone import add_term, bone_linear, slice_sum
from boneconv.nn.updates import Update, check_block
from boneconv.nn.weights import compose

__all__ = [
    "adapted_linear",
    "apply_updates",
    "bat_linear",
    "bone_linear",
    "slice_sum",
    "turn_input",
]


def turn_input(x: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """``z_b = B[b] x_b`` and ``sum_b z_b``: what BAT over the input axis does to an input.

    Args:
        x: ``[..., in]``.
        block: ``[in/r, r, r]``.

    Returns:
        ``[..., in]`` and ``[..., r]``.
    """
    count, r, _ = block.shape
    slices = x.reshape(-1, count, r).transpose(0, 1)  # [in/r, T, r]
    turned = torch.bmm(slices, block.transpose(1, 2)).transpose(0, 1)  # [T, in/r, r]
    return turned.reshape(x.shape), turned.sum(1).view(*x.shape[:-1], r)


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    updates: Sequence[Update],
    *,
    base: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """A linear layer with any number of updates, in order: stage k updates what k - 1 gave.

    The stages are unwound from the last, with ``f_k`` the layer after stage k:

        Bone, mini    f_k(x) = f_(k-1)(x) + slice_sum(x) B
        BAT in        f_k(x) = f_(k-1)(x + z) + tile(sum_b z_b)
        BAT out       of the base: `bat_linear`; of another stage: of the weight that it formed

    Dropout zeroes the input of a Bone or mini update alone. Where a BAT over the output axis
    follows, the update acts on the weight, and there is no input of its own to drop.

    Args:
        x: ``[..., in]``.
        weight: ``[out, in]``.
        bias: ``[out]`` or nothing.
        updates: The stages; blocks of any floating dtype.
        base: Computes ``x W^T + bias`` where that is not `torch.nn.functional.linear`; what it
            returns is not written to.

    Returns:
        ``[..., out]``, in the dtype that the base layer gives.

    Raises:
        ShapeError: x or a block does not fit the weight.
    """
    for update in updates:
        check_block(update, (weight.shape[0], weight.shape[1]))
    return apply_updates(x, weight, bias, updates, base)


def apply_updates(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    updates: Sequence[Update],
    base: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """`adapted_linear` of blocks whose shapes are known to fit."""
    if weight.is_floating_point():  # a quantized one may be packed
        _check_input(x, weight)
    if base is None and len(updates) == 1 and _is_plain(x, weight, updates[0]):
        return bone_linear(x, weight, bias, updates[0].block)
    given, pending = weight, list(updates)
    fixed = max([-1] + [i for i, update in enumerate(pending) if update.acts_on_rows])
    if fixed > 0:
        weight, base = compose(weight, pending[:fixed]), None
        pending = pending[fixed:]
    bat = pending.pop(0) if fixed >= 0 else None
    terms: list[tuple[Tensor, Tensor | None]] = []
    for update in reversed(pending):
        x = _unwind(x, weight, update, terms)
    if bat is not None:
        y = bat_linear(x, weight, bias, bat.block).to(compute_dtype(x, given))
        own = not y.requires_grad  # autograd refuses to write to what a Function of ours returns
    elif base is None:
        y, own = F.linear(x, weight, bias), True
    else:
        y, own = base(x), False
    for term, block in reversed(terms):
        y = add_term(y, term, block, own=own)
        own = True
    return y


def _unwind(
    x: Tensor, weight: Tensor, update: Update, terms: list[tuple[Tensor, Tensor | None]]
) -> Tensor:
    """Take the last stage off: note what it adds to y, and return the input for those before.

    A term is a factor and its block (added as ``factor @ block``), or a row of y without one. Its
    last axis may be a divisor of out, and is tiled then.
    """
    block = update.block
    if update.is_bat:
        dtype = compute_dtype(x, weight, block)
        turned, total = turn_input(x.to(dtype), block.to(dtype))
        terms.append((total, None))
        return (x + turned).to(x.dtype)
    dropped = F.dropout(x, update.dropout) if update.dropout else x
    wide = dropped.to(torch.promote_types(x.dtype, block.dtype))
    terms.append((slice_sum(wide, update.rank), block))
    return x


def _is_plain(x: Tensor, weight: Tensor, update: Update) -> bool:
    """Whether `bone_linear` computes it: Bone or mini, no dropout, no autocast, no compiler."""
    if update.is_bat or update.dropout or torch.compiler.is_compiling():
        return False
    return x.dtype == weight.dtype == compute_dtype(x, weight)


def _check_input(x: Tensor, weight: Tensor) -> None:
    if x.shape[-1] != weight.shape[1]:
        raise ShapeError(
            "the input does not fit the weight",
            expected=f"[..., {weight.shape[1]}]",
            found=list(x.shape),
        )
