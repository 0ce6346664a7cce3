"""Bone and mini: y = x W^T + bias + s B without the padded copy of x, forward and backward.

With s the sum of x's r-wide slices (arXiv 2409.15371; PEFT 0.18.1; DESIGN math):

    forward     y = s B + bias;  y += x W^T
    backward    dx = dy W;  each r-wide slice of dx += dy B^T;  dB = s^T dy

and for mini with B tiled along out: dy is summed over the tiles first. Autograd keeps s, which is r
numbers a token, and the parameters themselves; x only where the weight's gradient is wanted. The
small product comes first: after the large one, which sweeps W through the caches, it takes twice
the time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["add_term", "bone_linear", "slice_sum"]

_ORDINARY = (nn.Parameter, Tensor)  # others may know of `F.linear` alone


def slice_sum(x: Tensor, r: int) -> Tensor:
    """The sum of x's r-wide slices; a ragged tail is added to the first columns.

    ``s[..., i] = sum of x[..., j] over j with j mod r = i``: what padding x to a multiple of r and
    summing gives, without the padded copy.

    Args:
        x: ``[..., in]``.
        r: The rank, at least 1; need not divide ``in``.

    Returns:
        ``[..., r]``, x's dtype.
    """
    width = x.shape[-1]
    tail = width % r
    if not tail:
        return x.reshape(*x.shape[:-1], width // r, r).sum(-2)
    whole = width - tail
    total = x[..., :whole].reshape(*x.shape[:-1], width // r, r).sum(-2)
    return total + F.pad(x[..., whole:], (0, r - tail))


def add_term(y: Tensor, term: Tensor, block: Tensor | None, *, own: bool) -> Tensor:
    """``y + term @ block`` (``y + term`` without a block), tiled along out.

    Args:
        y: ``[..., out]``.
        term: ``[..., r]``; without a block, ``[..., a divisor of out]``.
        block: ``[r, a divisor of out]``.
        own: Whether y may be written to.

    Returns:
        ``[..., out]``, y's dtype; y itself where that could be.
    """
    if own and block is not None and y.dtype == term.dtype == block.dtype:
        width = y.shape[-1]
        if block.shape[1] == width and y.is_contiguous():
            y.view(-1, width).addmm_(term.reshape(-1, term.shape[-1]), block)
            return y
    change = term
    if block is not None:
        wide = torch.promote_types(term.dtype, block.dtype)
        change = term.to(wide) @ block.to(wide)
    if change.shape[-1] != y.shape[-1]:
        times = y.shape[-1] // change.shape[-1]
        grid = y.reshape(*y.shape[:-1], times, change.shape[-1])
        return (grid + change.unsqueeze(-2)).view(y.shape).to(y.dtype)
    return (y + change).to(y.dtype)


def bone_linear(x: Tensor, weight: Tensor, bias: Tensor | None, block: Tensor) -> Tensor:
    """``x W^T + bias + slice_sum(x) B``, B tiled along out where it is narrower (mini).

    Outside of autocast, where `torch.nn.functional.linear` takes x and weight as they are.

    Args:
        x: ``[..., in]``.
        weight: ``[out, in]``, x's dtype; its gradient is computed only where it is wanted.
        bias: ``[out]`` or nothing.
        block: ``[r, a divisor of out]``; any floating dtype: the wider of its and x's is that of
            the update, before it is added.

    Returns:
        ``[..., out]``, x's dtype.
    """
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    run = _BoneLinear.apply if torch.is_grad_enabled() else _forward
    y: Tensor = run(flat, weight, bias, block)[0]
    return y if flat is x else y.view(*x.shape[:-1], weight.shape[0])


def bone_at_once(x: Tensor, weight: Tensor, bias: Tensor | None, block: Tensor) -> Tensor | None:
    """`bone_linear` where all is of one dtype and fits, outside of autocast; nothing elsewhere."""
    if (
        x.dtype != weight.dtype
        or x.dtype != block.dtype
        or x.size(-1) != weight.size(-1)
        or torch._C._is_any_autocast_enabled()
    ):
        return None
    return bone_linear(x, weight, bias, block)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, block: Tensor
) -> tuple[Tensor, Tensor]:
    total = slice_sum(x, block.size(0))
    if block.dtype == x.dtype and block.size(1) == weight.size(0) and type(weight) in _ORDINARY:
        y = torch.mm(total, block) if bias is None else torch.addmm(bias, total, block)
        return y.addmm_(x, weight.t()), total
    if x.dtype != block.dtype:
        total = total.to(torch.promote_types(x.dtype, block.dtype))
    return add_term(F.linear(x, weight, bias), total, block, own=True), total


class _BoneLinear(torch.autograd.Function):
    """`bone_linear` of a matrix ``[T, in]``."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, block: Tensor
    ) -> tuple[Tensor, Tensor]:
        return _forward(x, weight, bias, block)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, bias, block = inputs
        total = output[1]
        ctx.mark_non_differentiable(total)
        ctx.save_for_backward(total, weight, block, x if weight.requires_grad else None)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad = outputs[0]
        total, weight, block, x = ctx.saved_tensors
        for_x, for_weight, for_bias, for_block = ctx.needs_input_grad
        width = block.shape[1]
        narrow = grad.to(total.dtype)
        if width != grad.shape[1]:
            narrow = narrow.view(len(grad), grad.shape[1] // width, width).sum(1)
        dx = _back_to_input(grad, weight, narrow @ block.to(total.dtype).t()) if for_x else None
        dw = grad.t() @ x if for_weight else None
        dbias = grad.sum(0).to(ctx.bias_dtype) if for_bias else None
        db = (total.t() @ narrow).to(block.dtype) if for_block else None
        return dx, dw, dbias, db


def _back_to_input(grad: Tensor, weight: Tensor, change: Tensor) -> Tensor:
    """``grad @ W``, with ``change`` ``[T, r]`` added to every r-wide slice."""
    dx = grad @ weight
    r = change.shape[1]
    whole = dx.shape[1] // r * r
    slices = dx.as_strided((len(dx), whole // r, r), (dx.shape[1], r, 1))
    slices += change[:, None]
    if whole < dx.shape[1]:
        dx[:, whole:] += change[:, : dx.shape[1] - whole]
    return dx
