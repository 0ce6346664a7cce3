"""Where a graph multiplies activations by a weight, and what it does to the weight before.

A weight reaches its product as it is, or through Transpose, Identity and Cast. The products are
MatMul, Gemm and ONNX Runtime's FusedMatMul. A Gather that looks up rows of the same initializer (a
tied embedding) is no product and stays as it is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from boneconv.errors import FormatError, listing
from boneconv.graphs import nested_graphs

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

__all__ = ["MERGE_INSTEAD", "Atlas", "Place", "Product", "Spot"]

MERGE_INSTEAD = "Merge the adapter into the graph instead: leave out --runtime-adapters"
_STANDARD = ("", "ai.onnx")


@dataclass(frozen=True)
class Place:
    """Where a module's weight ``[out, in]`` lies in a graph.

    Attributes:
        initializer: The initializer that holds it.
        transposed: Whether it is held as ``[in, out]``.
        first: The first of its outputs, where several modules are packed in one initializer.
        out: How many outputs it has.
        width: How many inputs it has.
    """

    initializer: str
    transposed: bool
    first: int
    out: int
    width: int


@dataclass(frozen=True)
class Spot:
    """A node's place.

    Attributes:
        graph: Which graph: 0 is the main one, then those inside nodes, as they are met.
        index: Which node of it.
    """

    graph: int
    index: int


@dataclass(frozen=True)
class Product:
    """A product of activations and a weight: ``y = alpha * x W^T``.

    Attributes:
        spot: The node.
        x: The activations ``[..., in]``.
        y: The result ``[..., out]``.
        weight: The factor as the node gets it.
        by_row: Whether that factor is ``[out, in]``, which the node transposes.
        outs: How many outputs the whole factor has.
        alpha: What the node multiplies by.
        dtype: The ONNX element type of the factor.
        ndim: How many axes x has; None where the graph does not say.
    """

    spot: Spot
    x: str
    y: str
    weight: str
    by_row: bool
    outs: int
    alpha: float
    dtype: int
    ndim: int | None


class Atlas:
    """What a graph's values are, and who consumes them, in all its nested graphs.

    Attributes:
        graphs: The main graph and those inside nodes.
        names: Every name in use.
        constants: The initializers, and the values of Constant nodes, by name.
    """

    def __init__(self, model: ModelProto) -> None:
        """Reads a graph; its weights may lie elsewhere."""
        self.graphs = list(nested_graphs(model.graph))
        self.constants = {t.name: t for graph in self.graphs for t in graph.initializer}
        self._consumers: dict[str, list[tuple[Spot, int]]] = defaultdict(list)
        self._ndim: dict[str, int] = {}
        self.names: set[str] = set(self.constants)
        for number, graph in enumerate(self.graphs):
            self._read(number, graph)
        self._outputs = {o.name for graph in self.graphs for o in graph.output}

    def node(self, spot: Spot) -> NodeProto:
        """The node at a place."""
        return self.graphs[spot.graph].node[spot.index]

    def products(self, place: Place) -> list[Product]:
        """All products with the weight that an initializer holds; none where it is only looked up.

        Raises:
            FormatError: The weight goes into an operator that is none of those above.
        """
        dtype = self.constants[place.initializer].data_type
        return list(self._follow(place.initializer, not place.transposed, dtype, place))

    def bias_after(self, product: Product) -> Spot | None:
        """The Add of a constant that alone takes the product's result, where there is one."""
        takers = self._consumers[product.y]
        if len(takers) != 1 or product.y in self._outputs:
            return None
        spot, position = takers[0]
        node = self.node(spot)
        other = node.input[1 - position] if len(node.input) == 2 else ""
        is_bias = node.op_type == "Add" and other in self.constants
        if not is_bias or spot.graph != product.spot.graph:
            return None
        return spot if len(self.constants[other].dims) == 1 else None

    def _follow(self, name: str, by_row: bool, dtype: int, place: Place) -> Iterator[Product]:
        for spot, position in self._consumers[name]:
            node = self.node(spot)
            kind = node.op_type if node.domain in _STANDARD else f"{node.domain}.{node.op_type}"
            if kind in ("Gather", "Shape"):
                continue
            if kind == "Identity":
                yield from self._follow(node.output[0], by_row, dtype, place)
            elif kind == "Cast":
                yield from self._follow(node.output[0], by_row, _attribute(node, "to", 0), place)
            elif kind == "Transpose" and _attribute(node, "perm", [1, 0]) == [1, 0]:
                yield from self._follow(node.output[0], not by_row, dtype, place)
            else:
                yield self._product(spot, node, kind, position, name, by_row, dtype, place)

    def _product(
        self,
        spot: Spot,
        node: NodeProto,
        kind: str,
        position: int,
        name: str,
        by_row: bool,
        dtype: int,
        place: Place,
    ) -> Product:
        flips = {
            "MatMul": (0, 0),
            "Gemm": (_attribute(node, "transA", 0), _attribute(node, "transB", 0)),
            "com.microsoft.FusedMatMul": (
                _attribute(node, "transA", 0) or _attribute(node, "transBatchA", 0),
                _attribute(node, "transB", 0),
            ),
        }.get(kind)
        if flips is None or position != 1 or flips[0] or bool(flips[1]) != by_row:
            raise FormatError(
                f"the weight {listing([place.initializer])} goes into {kind} "
                f"{listing([node.name])}, which cannot take an adapter",
                expected="x W^T by MatMul or Gemm",
                hint=MERGE_INSTEAD,
            )
        return Product(
            spot=spot,
            x=node.input[0],
            y=node.output[0],
            weight=name,
            by_row=by_row,
            outs=int(self.constants[place.initializer].dims[1 if place.transposed else 0]),
            alpha=float(_attribute(node, "alpha", 1.0)),
            dtype=dtype,
            ndim=2 if kind == "Gemm" else self._ndim.get(node.input[0]),
        )

    def _read(self, number: int, graph: GraphProto) -> None:
        for info in (*graph.input, *graph.value_info, *graph.output):
            self.names.add(info.name)
            if info.type.tensor_type.HasField("shape"):
                self._ndim[info.name] = len(info.type.tensor_type.shape.dim)
        for index, node in enumerate(graph.node):
            self.names.update((node.name, *node.output))
            if node.op_type == "Constant":
                values = [each.t for each in node.attribute if each.HasField("t")]
                self.constants.update(dict.fromkeys(node.output, *values) if values else {})
            for position, name in enumerate(node.input):
                if name:
                    self._consumers[name].append((Spot(number, index), position))


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    from onnx import helper

    found = next((a for a in node.attribute if a.name == name), None)
    return default if found is None else helper.get_attribute_value(found)
