"""A graph in which adapters can be swapped at run time: each block an initializer to override.

`add_adapter_inputs` puts Bone's branch behind, or BAT's activation form in place of, every product
with an adapted weight, in all nested graphs. The weights themselves stay as they are, those in
files of their own byte for byte. Blocks of zeros are the default: the base's answers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from boneconv.errors import FormatError, NameMatchError, UsageError, listing
from boneconv.onnx.runtime.bat import bat_result
from boneconv.onnx.runtime.bone import bone_change
from boneconv.onnx.runtime.names import BAT_SUFFIX, BONE_SUFFIX, is_block
from boneconv.onnx.runtime.nodes import Constants, Sketch
from boneconv.onnx.runtime.products import MERGE_INSTEAD, Atlas, Place, Product, Spot

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

__all__ = ["Slot", "add_adapter_inputs"]

_OLDEST_OPSET = 13
_OLDEST_IR = 4


@dataclass(frozen=True)
class Slot:
    """What a module's blocks need in the graph.

    Attributes:
        places: Where its weight lies; a tied one may be there twice.
        bone: Whether it takes Bone blocks, of any rank.
        bat_rank: The rank of the BAT blocks that it takes; None for none.
    """

    places: tuple[Place, ...]
    bone: bool = True
    bat_rank: int | None = None


def add_adapter_inputs(model: ModelProto, slots: Mapping[str, Slot]) -> None:
    """Adds inputs for adapters' blocks to a graph, in place.

    The inputs are ``<module>.bone_block`` ``[r, out]`` with any r, default zeros ``[1, out]``, and
    ``<module>.bat_block`` ``[out / r, r, r]`` with a fixed r, default zeros ``[1, r, r]``, of the
    dtype of the weight in its product.

    Args:
        model: The graph; weights in files of their own are not read. Changed in place: after an
            error it is in no defined state.
        slots: What to add, by the module's name.

    Raises:
        FormatError: A weight has no product that can take an adapter, or the graph is too old.
        UsageError: The graph has adapter inputs already.
    """
    edit = _Edit(model, _check(model))
    by_initializer: dict[str, list[_Part]] = defaultdict(list)
    for module, slot in slots.items():
        for place in slot.places:
            by_initializer[place.initializer].append(_Part(module, slot, place))
    adapted = {module for group in by_initializer.values() for module in edit.adapt(group)}
    idle = sorted(slots.keys() - adapted)
    if idle:
        raise FormatError(
            f"no product takes the weights of {listing(idle)}",
            expected="MatMul or Gemm",
            hint=MERGE_INSTEAD,
        )
    edit.finish()


@dataclass(frozen=True)
class _Part:
    """A module's part of an initializer."""

    module: str
    slot: Slot
    place: Place


def _check(model: ModelProto) -> int:
    """The version of the standard operators; raises where it is too old."""
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset < _OLDEST_OPSET or model.ir_version < _OLDEST_IR:
        raise FormatError(
            "the graph is too old for adapter inputs",
            expected=f"opset {_OLDEST_OPSET} and IR version {_OLDEST_IR} or later",
            found=f"opset {opset}, IR version {model.ir_version}",
            hint="Export it again with a newer opset",
        )
    known = [i.name for i in model.graph.input if is_block(i.name)]
    if known:
        raise UsageError(
            f"the graph has adapter inputs already: {listing(known)}",
            hint="Give the base's own graph",
        )
    return opset


class _Edit:
    """New nodes, inputs and initializers of one graph."""

    def __init__(self, model: ModelProto, opset: int) -> None:
        self.model = model
        self.atlas = Atlas(model)
        self.constants = Constants(self.atlas.names)
        self.opset = opset
        self.nodes: dict[Spot, list[NodeProto]] = {}
        self.inputs: set[str] = set()

    def adapt(self, parts: Sequence[_Part]) -> list[str]:
        """Adapts all products with one initializer; returns the modules that it did so for."""
        if len({(part.place.transposed, part.place.width) for part in parts}) > 1:
            raise FormatError(
                "weights of different widths in one initializer: "
                f"{listing([part.module for part in parts])}"
            )
        products = self.atlas.products(parts[0].place)
        for product in products:
            for part in parts:
                self._add_inputs(part, product.dtype)
            self._replace_by_bat(parts, product)
            self._add_bone(parts, product)
        return [part.module for part in parts] if products else []

    def finish(self) -> None:
        """Puts the new nodes into the graphs, the innermost first: a node's copy holds its own."""
        for number, graph in reversed(list(enumerate(self.atlas.graphs))):
            new = [
                node
                for index, old in enumerate(graph.node)
                for node in self.nodes.get(Spot(number, index), [old])
            ]
            copies = [_copy(node) for node in new]
            del graph.node[:]
            graph.node.extend(copies)
        self.model.graph.initializer.extend(self.constants.tensors)

    def _sketch(self, parts: Sequence[_Part]) -> Sketch:
        return Sketch(f"{parts[0].module}/bone", self.constants, self.opset)

    def _add_bone(self, parts: Sequence[_Part], product: Product) -> None:
        blocks = [(f"{p.module}{BONE_SUFFIX}", p.place) for p in parts if p.slot.bone]
        if not blocks:
            return
        spot = self.atlas.bias_after(product) or product.spot
        nodes = self._nodes_at(spot)
        result = nodes[-1].output[0]
        sketch = self._sketch(parts)
        nodes[-1].output[0] = before = sketch.fresh(f"{result}/base")
        change = bone_change(sketch, product, blocks)
        sketch.op("Add", before, change, output=result)
        self.nodes[spot] = [*nodes, *sketch.nodes]

    def _replace_by_bat(self, parts: Sequence[_Part], product: Product) -> None:
        blocks = [
            (f"{part.module}{BAT_SUFFIX}", part.place, part.slot.bat_rank)
            for part in parts
            if part.slot.bat_rank is not None
        ]
        if not blocks:
            return
        sketch = self._sketch(parts)
        node = self.atlas.node(product.spot)
        if node.op_type == "Gemm" and len(node.input) > 2 and node.input[2]:
            result = sketch.fresh(f"{product.y}/product")
            bat_result(sketch, product, blocks, result)
            beta = next((a.f for a in node.attribute if a.name == "beta"), 1.0)
            bias = sketch.times(node.input[2], beta, product.dtype)
            sketch.op("Add", result, bias, output=product.y)
        else:
            bat_result(sketch, product, blocks, product.y)
        self.nodes[product.spot] = sketch.nodes

    def _nodes_at(self, spot: Spot) -> list[NodeProto]:
        return self.nodes.get(spot) or [_copy(self.atlas.node(spot))]

    def _add_inputs(self, part: _Part, dtype: int) -> None:
        out, rank = part.place.out, part.slot.bat_rank
        if part.slot.bone:
            self._add_input(f"{part.module}{BONE_SUFFIX}", dtype, [None, out], [1, out])
        if rank is not None:
            name = f"{part.module}{BAT_SUFFIX}"
            self._add_input(name, dtype, [None, rank, rank], [1, rank, rank])

    def _add_input(
        self, name: str, dtype: int, shape: Sequence[int | None], default: Sequence[int]
    ) -> None:
        from onnx import helper

        if name in self.inputs:
            self._same_dtype(name, dtype)
            return
        if name in self.atlas.names:
            raise NameMatchError(f"the graph has a {name!r} already", hint=MERGE_INSTEAD)
        self.inputs.add(name)
        self.model.graph.input.append(helper.make_tensor_value_info(name, dtype, shape))
        self.model.graph.initializer.append(_zeros(name, dtype, default))

    def _same_dtype(self, name: str, dtype: int) -> None:
        known = next(i for i in self.model.graph.input if i.name == name)
        if known.type.tensor_type.elem_type != dtype:
            raise FormatError(
                f"the weight behind {name!r} is used in two dtypes", hint=MERGE_INSTEAD
            )


def _zeros(name: str, dtype: int, shape: Sequence[int]) -> object:
    import math

    from onnx import helper

    width = helper.tensor_dtype_to_np_dtype(dtype).itemsize
    return helper.make_tensor(name, dtype, list(shape), bytes(math.prod(shape) * width), raw=True)


def _copy(node: NodeProto) -> NodeProto:
    from onnx import NodeProto as Node

    copy = Node()
    copy.CopyFrom(node)
    return copy
