"""BAT over the output axis: y = x W'^T + bias without keeping W', forward and backward.

With W cut into r x r tiles, C[a] = 1 + B[a] and s = sum_b x_b (DESIGN math; PEFT 0.18.1):

    formed        W'[a][b] = W[a][b] C[a] + B[a]              then  y_a = W'[a] x
    activation    y_a = sum_b W[a][b] (C[a] x_b) + B[a] s

For T tokens the products cost, in units of out * in multiplications, T + r formed and 2 T as
activations; backwards 2 T + 2 r and 3 T. `_as_activations` chooses by what they cost when measured.

Both work through row blocks of the weight, so that only a part of W' (or of C[a] x) exists at a
time. Autograd keeps x and the parameters themselves; no clone of W, and no W'.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["bat_linear", "compute_dtype", "formed_rows"]

#: Elements of a weight that is taken whole (4 MiB of float32: little beside a model, and 5 to 10 %
#: faster than parts), and of a chunk of others whatever the number of tokens.
_WHOLE = 1 << 20
_SMALL = 1 << 17
#: What fraction of x's elements a chunk may have: while the gradient of x does not exist yet, and
#: beside it. Wide chunks make better matrix products (measured at 512 tokens, r = 64: gradients of
#: W' in 4 row blocks take 0.7 to 1 of the time of one, x's gradient is indifferent); narrow ones
#: keep the peak below 1.1 of a frozen layer's, which is y and the gradients of x and y.
_AHEAD = 2
_BESIDE = 8
_HALVES = (torch.float16, torch.bfloat16)


def compute_dtype(x: Tensor, *tensors: Tensor) -> torch.dtype:
    """The dtype that a product is computed in: autocast's, or the widest of the parameters.

    Args:
        x: The input; its device says which autocast applies.
        *tensors: The parameters.
    """
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        if tensor.dtype != dtype:
            dtype = torch.promote_types(dtype, tensor.dtype)
    if _autocast(x) and dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return dtype


def bat_linear(x: Tensor, weight: Tensor, bias: Tensor | None, block: Tensor) -> Tensor:
    """y_a = sum_b W[a][b] (x_b + B[a] x_b) + B[a] sum_b x_b + bias_a.

    Args:
        x: ``[..., in]``.
        weight: ``[out, in]``; its gradient is computed only where it is wanted.
        bias: ``[out]`` or nothing.
        block: ``[out/r, r, r]``.

    Returns:
        ``[..., out]`` in the dtype of `compute_dtype`: what autocast says, or the wider of weight's
        and block's.
    """
    dtype = compute_dtype(x, weight, block)
    flat = x.reshape(-1, x.shape[-1]).to(dtype)
    arguments = (flat, weight, bias, block)
    wanted = [t for t in arguments if t is not None and t.requires_grad]
    with _without_autocast(x):
        if wanted and torch.is_grad_enabled() and not torch.compiler.is_exporting():
            y: Tensor = _BatLinear.apply(*arguments)  # type: ignore[no-untyped-call]
        else:
            y = _forward(*arguments)
    return y.view(*x.shape[:-1], weight.shape[0])


class _BatLinear(torch.autograd.Function):
    """`bat_linear` of a matrix ``[T, in]``, saving only its arguments."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, block: Tensor) -> Tensor:
        return _forward(x, weight, bias, block)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, block = inputs
        ctx.save_for_backward(x, weight, block)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = outputs
        x, weight, block = ctx.saved_tensors
        for_x, for_weight, for_bias, for_block = ctx.needs_input_grad
        back = _back_activations if _as_activations(x, block) else _back_formed
        with _without_autocast(x):
            dx, dw, db = back(grad, x, weight, block, (for_x, for_weight, for_block))
            dbias = grad.sum(0).to(ctx.bias_dtype) if for_bias else None
        return dx, dw, dbias, db


def _as_activations(x: Tensor, block: Tensor) -> bool:
    """Whether activations cost less than forming W'.

    A graph exported for any number of tokens has one form for all, which forms W'.
    """
    fewer = x.shape[0] < block.shape[-1]
    if not torch.compiler.is_exporting():
        return fewer
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(fewer)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, block: Tensor) -> Tensor:
    if _as_activations(x, block):
        y = _forward_activations(x, weight, block)
    else:
        y = _forward_formed(x, weight, block)
    return y if bias is None else y.add_(bias)


def formed_rows(weight: Tensor, block: Tensor, dtype: torch.dtype) -> Tensor:
    """W'[a][b] = W[a][b] (1 + B[a]) + B[a] for the row blocks given.

    Args:
        weight: ``[n r, in]``.
        block: ``[n, r, r]``.
        dtype: The result's; half precision is rounded once, from float32.

    Returns:
        ``[n r, in]``.
    """
    count, r, _ = block.shape
    tiles = weight.to(dtype).reshape(count, -1, r)  # [n, r in/r, r]
    block = block.to(dtype)
    addend = block[:, :, None]  # [n, r, 1, r]
    if dtype in _HALVES:
        change = torch.bmm(tiles, block)
        grid = (count, r, -1, r)
        whole = tiles.view(grid).float() + change.view(grid) + addend
        return whole.to(dtype).view(weight.shape)
    whole = torch.bmm(tiles, _plus_one(block))
    whole.view(count, r, -1, r).add_(addend)
    return whole.view(weight.shape)


def _forward_formed(x: Tensor, weight: Tensor, block: Tensor) -> Tensor:
    chunks = list(_chunks(x, block, block.shape[-1] * weight.shape[1], _AHEAD))
    if len(chunks) == 1:
        return x @ formed_rows(weight, block, x.dtype).t()
    y = x.new_empty(x.shape[0], weight.shape[0])
    for blocks, rows in chunks:
        whole = formed_rows(weight[rows], block[blocks], x.dtype)
        torch.mm(x, whole.t(), out=y[:, rows])
        del whole
    return y


def _forward_activations(x: Tensor, weight: Tensor, block: Tensor) -> Tensor:
    tokens, width = x.shape
    r = block.shape[-1]
    slices = x.reshape(-1, r)  # [T in/r, r]
    total = x.view(tokens, width // r, r).sum(1)  # [T, r]
    parts = []
    for blocks, rows in _chunks(x, block, x.numel(), _AHEAD):
        some = block[blocks].to(x.dtype)
        inputs = _turned(slices, some).view(len(some), tokens, width)
        tiles = weight[rows].to(x.dtype).reshape(-1, r, width)
        y = torch.bmm(inputs, tiles.transpose(1, 2))  # [n, T, r]
        y += torch.bmm(total.expand(len(some), tokens, r), some.transpose(1, 2))
        parts.append(y.transpose(0, 1).reshape(tokens, len(some) * r))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _back_formed(
    grad: Tensor, x: Tensor, weight: Tensor, block: Tensor, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and block; W' is formed again, a chunk of rows at a time."""
    dw, db = None, None
    if wanted[1] or wanted[2]:
        dw, db = _back_to_parameters(grad, x, weight, block, wanted)
    return _back_to_input(grad, x, weight, block) if wanted[0] else None, dw, db


def _back_to_parameters(
    grad: Tensor, x: Tensor, weight: Tensor, block: Tensor, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight and block, through that of W'."""
    r, columns = block.shape[-1], weight.shape[1]
    dw = torch.empty_like(weight) if wanted[1] else None
    db = torch.empty_like(block) if wanted[2] else None
    for blocks, rows in _chunks(x, block, r * columns, _AHEAD):
        change = (grad[:, rows].t() @ x).view(-1, r * (columns // r), r)  # dL/dW' of the tiles
        some = block[blocks].to(x.dtype)
        if dw is not None:
            dw[rows] = torch.baddbmm(change, change, some.transpose(1, 2)).view(-1, columns)
        if db is not None:
            tiles = weight[rows].to(x.dtype).reshape(change.shape)
            direct = change.view(-1, r, columns // r, r).sum(2)
            db[blocks] = direct.baddbmm_(tiles.transpose(1, 2), change)
        del change
    return dw, db


def _back_to_input(grad: Tensor, x: Tensor, weight: Tensor, block: Tensor) -> Tensor:
    """``grad @ W'``."""
    dx: Tensor | None = None
    for blocks, rows in _chunks(x, block, block.shape[-1] * weight.shape[1], _BESIDE):
        whole = formed_rows(weight[rows], block[blocks], x.dtype)
        dx = grad[:, rows] @ whole if dx is None else dx.addmm_(grad[:, rows], whole)
        del whole
    assert dx is not None
    return dx


def _back_activations(
    grad: Tensor, x: Tensor, weight: Tensor, block: Tensor, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and block through P[a] = grad_a W[a]."""
    tokens, width = x.shape
    r = block.shape[-1]
    slices = x.reshape(-1, r)
    total = x.view(tokens, width // r, r).sum(1)
    dx = torch.zeros_like(slices) if wanted[0] else None
    dw = torch.empty_like(weight) if wanted[1] else None
    db = torch.empty_like(block) if wanted[2] else None
    for blocks, rows in _chunks(x, block, x.numel(), _AHEAD):
        some = block[blocks].to(x.dtype)
        here = grad[:, rows].reshape(tokens, len(some), r).transpose(0, 1)  # [n, T, r]
        back = torch.bmm(here, weight[rows].to(x.dtype).reshape(-1, r, width))  # [n, T, in]
        back = back.view(len(some), -1, r)
        if dx is not None:
            part = torch.baddbmm(back, back, some).sum(0).view(tokens, width // r, r)
            dx += (part + torch.bmm(here, some).sum(0)[:, None]).view(-1, r)
        if dw is not None:
            inputs = _turned(slices, some).view(len(some), tokens, width)
            dw[rows] = torch.bmm(here.transpose(1, 2), inputs).view(-1, width)
        if db is not None:
            every = slices.expand(len(some), *slices.shape)
            direct = torch.bmm(here.transpose(1, 2), total.expand(len(some), tokens, r))
            db[blocks] = direct.baddbmm_(back.transpose(1, 2), every)
    return None if dx is None else dx.view(x.shape), dw, db


def _turned(slices: Tensor, block: Tensor) -> Tensor:
    """x_b + B[a] x_b for every a: ``[n, T in/r, r]`` from ``[T in/r, r]``."""
    every = slices.expand(len(block), *slices.shape)
    if slices.dtype in _HALVES:
        return torch.baddbmm(every, every, block.transpose(1, 2))
    return torch.bmm(every, _plus_one(block).transpose(1, 2))


def _plus_one(block: Tensor) -> Tensor:
    return block + torch.eye(block.shape[-1], dtype=block.dtype, device=block.device)


def _chunks(x: Tensor, block: Tensor, each: int, share: int) -> Iterator[tuple[slice, slice]]:
    """Row blocks to take at a time, as slices of the blocks and of the weight's rows.

    ``each`` is how many elements one row block takes. A compiler gets all at once: it plans memory
    by itself, and a loop would be unrolled.
    """
    count, r, _ = block.shape
    step = count
    if not torch.compiler.is_compiling() and count * each > _WHOLE:
        step = max(1, max(_SMALL, x.numel() // share) // max(1, each))
    for first in range(0, count, step):
        last = min(count, first + step)
        yield slice(first, last), slice(first * r, last * r)


def _autocast(x: Tensor) -> bool:
    """Whether autocast is on for a tensor's kind of device; the meta device knows none."""
    if x.is_cpu:
        return torch.is_autocast_enabled("cpu")
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _without_autocast(x: Tensor) -> AbstractContextManager[object]:
    return torch.autocast(x.device.type, enabled=False) if _autocast(x) else nullcontext()
