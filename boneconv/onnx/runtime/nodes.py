"""New nodes of a graph: named after what they are for, their small constants shared."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

__all__ = ["Constants", "Sketch"]


class Constants:
    """Integer vectors that new nodes take, each value one initializer of the main graph.

    Attributes:
        tensors: The initializers to add to it.
    """

    def __init__(self, taken: Iterable[str]) -> None:
        """Starts without any; ``taken`` are the names that the graph has already."""
        self.tensors: list[TensorProto] = []
        self._names: dict[tuple[int, ...], str] = {}
        self._taken = set(taken)

    def vector(self, values: Sequence[int]) -> str:
        """The name of a vector of int64."""
        from onnx import numpy_helper

        key = tuple(values)
        if key not in self._names:
            name = self.fresh("bone/" + ("_".join(map(str, key)) or "none"))
            self._names[key] = name
            self.tensors.append(numpy_helper.from_array(np.asarray(key, np.int64), name))
        return self._names[key]

    def number(self, value: float, dtype: int) -> str:
        """The name of a scalar of an ONNX element type."""
        from onnx import helper

        name = self.fresh(f"bone/{value:g}")
        self.tensors.append(helper.make_tensor(name, dtype, [], [value]))
        return name

    def fresh(self, wish: str) -> str:
        """A name that nothing in the graph has."""
        name, count = wish, 0
        while name in self._taken:
            count += 1
            name = f"{wish}_{count}"
        self._taken.add(name)
        return name


class Sketch:
    """Nodes that go into a graph together, in order.

    Attributes:
        nodes: The nodes so far.
        opset: The version of the graph's standard operators.
    """

    def __init__(self, prefix: str, constants: Constants, opset: int) -> None:
        """``prefix`` starts the names of all nodes and values."""
        self.nodes: list[NodeProto] = []
        self.opset = opset
        self._prefix = prefix
        self._constants = constants

    def op(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Adds a node; returns its output, which gets a name of its own where none is given."""
        from onnx import helper

        name = self._constants.fresh(f"{self._prefix}/{kind}")
        result = self._constants.fresh(f"{name}/output_0") if output is None else output
        self.nodes.append(helper.make_node(kind, inputs, [result], name=name, **attributes))
        return result

    def fresh(self, wish: str) -> str:
        """A name that nothing in the graph has."""
        return self._constants.fresh(wish)

    def ints(self, *values: int) -> str:
        """A vector of int64."""
        return self._constants.vector(values)

    def times(self, value: str, factor: float, dtype: int) -> str:
        """A value times a constant; the value itself where that is 1."""
        if factor == 1.0:
            return value
        return self.op("Mul", value, self._constants.number(factor, dtype))

    def first_sizes(self, value: str, count: int) -> str:
        """The first sizes of a value's shape; all but the last few where ``count`` is negative."""
        if self.opset >= 15:
            return self.op("Shape", value, end=count)
        shape = self.op("Shape", value)
        return self.op("Slice", shape, self.ints(0), self.ints(count))
