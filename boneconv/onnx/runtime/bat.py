"""BAT's activation form: a product in which the block updates activations, not the weight.

With W ``[out, in]`` cut into r x r tiles W[a][b], x into r-wide parts x_b, and a block B
``[out / r, r, r]``:

    y_a = sum_b W[a][b] (x_b + B[a] x_b) + B[a] sum_b x_b

which is ``x W'^T`` for ``W'[a][b] = W[a][b] + W[a][b] B[a] + B[a]``. Each a needs activations of
its own, so that ``B[a] x_b`` costs as much as the product itself: twice the work in all. The rank
is fixed in the graph, since the weight is cut into tiles of its size. Zeros ``[1, r, r]`` serve all
a at once, so that the base costs little more than without.
"""

from __future__ import annotations

from collections.abc import Sequence

from boneconv.onnx.runtime.nodes import Sketch
from boneconv.onnx.runtime.products import Place, Product

__all__ = ["bat_result"]


def bat_result(
    sketch: Sketch, product: Product, parts: Sequence[tuple[str, Place, int]], output: str
) -> None:
    """Adds the nodes that replace a product.

    Args:
        sketch: Gets the nodes.
        product: The product to replace.
        parts: For each module: the input that holds its block ``[out / r, r, r]``, its part of the
            weight, and the rank r, which divides out and in.
        output: The name that the result ``[..., out]`` gets.
    """
    pieces, done = [], 0
    for block, place, rank in sorted(parts, key=lambda part: part[1].first):
        if place.first > done:
            pieces.append(_plain(sketch, product, done, place.first - done))
        pieces.append(_updated(sketch, product, block, place, rank))
        done = place.first + place.out
    if done < product.outs:
        pieces.append(_plain(sketch, product, done, product.outs - done))
    result = sketch.op("Concat", *pieces, axis=-1) if len(pieces) > 1 else pieces[0]
    result = sketch.times(result, product.alpha, product.dtype)
    sketch.op("Identity", result, output=output)


def _updated(sketch: Sketch, product: Product, block: str, place: Place, rank: int) -> str:
    """``x W'^T`` for a module's part of the weight: ``[..., out]``."""
    parts = sketch.op("Reshape", product.x, sketch.ints(-1, rank))
    turned = sketch.op("Transpose", block, perm=[0, 2, 1])
    moved = sketch.op("MatMul", parts, turned)
    moved = sketch.op("Add", moved, parts)
    moved = sketch.op("Reshape", moved, sketch.ints(0, -1, place.width))
    result = sketch.op("MatMul", moved, _tiles(sketch, product, place, rank))
    slices = sketch.op("Reshape", product.x, sketch.ints(-1, place.width // rank, rank))
    total = sketch.op("ReduceSum", slices, sketch.ints(-2), keepdims=0)
    result = sketch.op("Add", result, sketch.op("MatMul", total, turned))
    result = sketch.op("Transpose", result, perm=[1, 0, 2])
    outer = sketch.first_sizes(product.x, -1)
    shape = sketch.op("Concat", outer, sketch.ints(place.out), axis=0)
    return sketch.op("Reshape", result, shape)


def _plain(sketch: Sketch, product: Product, first: int, out: int) -> str:
    """``x W^T`` for outputs of a packed weight that no block updates."""
    part = _outputs(sketch, product, first, out)
    if product.by_row:
        part = sketch.op("Transpose", part, perm=[1, 0])
    return sketch.op("MatMul", product.x, part)


def _tiles(sketch: Sketch, product: Product, place: Place, rank: int) -> str:
    """The weight as ``[out / r, in, r]``; constant, so that a runtime works it out when loading."""
    height = place.out // rank
    part = _outputs(sketch, product, place.first, place.out)
    if product.by_row:
        rows = sketch.op("Reshape", part, sketch.ints(height, rank, place.width))
        return sketch.op("Transpose", rows, perm=[0, 2, 1])
    columns = sketch.op("Reshape", part, sketch.ints(place.width, height, rank))
    return sketch.op("Transpose", columns, perm=[1, 0, 2])


def _outputs(sketch: Sketch, product: Product, first: int, out: int) -> str:
    if out == product.outs:
        return product.weight
    axis = 0 if product.by_row else 1
    bounds = sketch.ints(first), sketch.ints(first + out), sketch.ints(axis)
    return sketch.op("Slice", product.weight, *bounds)
