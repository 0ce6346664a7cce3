"""Bone's branch: what adapters' blocks add to a product, their ranks read at run time.

With x ``[..., in]`` and a block B ``[r, out]``, of whatever rank:

    pad x with zeros to a multiple of r;  s = the sum of its r-wide slices ``[..., r]``
    y = x W^T + s B

The sum of slices costs ``in`` additions a token, the product ``r * out`` multiplications.
"""

from __future__ import annotations

from collections.abc import Sequence

from boneconv.onnx.runtime.nodes import Sketch
from boneconv.onnx.runtime.products import Place, Product

__all__ = ["bone_change"]


def bone_change(sketch: Sketch, product: Product, parts: Sequence[tuple[str, Place]]) -> str:
    """Adds the nodes of what blocks add to a product.

    Args:
        sketch: Gets the nodes.
        product: The product that the blocks belong to.
        parts: For each module: the input that holds its block ``[r, out]``, and its part of the
            weight.

    Returns:
        The change ``[..., out]`` of the whole y.
    """
    width = parts[0][1].width
    x, ndim = product.x, product.ndim
    if ndim is None:
        x, ndim = sketch.op("Reshape", x, sketch.ints(-1, width)), 2
    runs = [
        _run(sketch, x, ndim, width, product.outs, run)
        for run in _runs(sorted(parts, key=lambda part: part[1].first))
    ]
    change = runs[0]
    for run in runs[1:]:
        change = sketch.op("Add", change, run)
    if product.ndim is None:
        outer = sketch.first_sizes(product.x, -1)
        shape = sketch.op("Concat", outer, sketch.ints(product.outs), axis=0)
        change = sketch.op("Reshape", change, shape)
    return sketch.times(change, product.alpha, product.dtype)


def _runs(parts: Sequence[tuple[str, Place]]) -> list[list[tuple[str, Place]]]:
    """The parts, in order, grouped where they lie next to each other."""
    runs = [[parts[0]]]
    for part in parts[1:]:
        last = runs[-1][-1][1]
        if part[1].first == last.first + last.out:
            runs[-1].append(part)
        else:
            runs.append([part])
    return runs


def _run(
    sketch: Sketch, x: str, ndim: int, width: int, outs: int, run: Sequence[tuple[str, Place]]
) -> str:
    """The change by parts next to each other, zeros before and behind: ``[..., outs]``."""
    changes = [
        sketch.op("MatMul", _slice_sum(sketch, x, ndim, width, block), block) for block, _ in run
    ]
    change = sketch.op("Concat", *changes, axis=-1) if len(changes) > 1 else changes[0]
    before = run[0][1].first
    behind = outs - run[-1][1].first - run[-1][1].out
    if before or behind:
        inner = [0] * (ndim - 1)
        change = sketch.op("Pad", change, sketch.ints(*inner, before, *inner, behind))
    return change


def _slice_sum(sketch: Sketch, x: str, ndim: int, width: int, block: str) -> str:
    """The sum of the r-wide slices of x's last axis: ``[..., r]``."""
    rank = sketch.first_sizes(block, 1)
    pads = sketch.op("Mod", sketch.ints(*[0] * (2 * ndim - 1), -width), rank)
    padded = sketch.op("Pad", x, pads)
    shape = sketch.op("Concat", sketch.ints(*[0] * (ndim - 1), -1), rank, axis=0)
    slices = sketch.op("Reshape", padded, shape)
    return sketch.op("ReduceSum", slices, sketch.ints(-2), keepdims=0)
