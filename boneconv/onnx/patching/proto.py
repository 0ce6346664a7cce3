"""Changes to a graph's message: weights that are stored in it as numbers, and untied heads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from boneconv.errors import UsageError, listing
from boneconv.graphs import Graph, Initializer, nested_graphs
from boneconv.io.files import Writer, machine_errors
from boneconv.io.safetensors import byte_view
from boneconv.onnx.patching.jobs import is_lookup

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

__all__ = ["Addition", "edit_proto"]

#: Where external data may start: what lets ONNX Runtime map it into memory.
_ALIGNMENT = 4096


@dataclass(frozen=True)
class Addition:
    """A new initializer.

    Attributes:
        like: The initializer whose nodes it takes over, but for lookups of embeddings.
        name: Its name.
        array: Its values, of the other's dtype and shape.
    """

    like: Initializer
    name: str
    array: NDArray[Any]


def edit_proto(
    graph: Graph,
    target: Path,
    replaced: Mapping[str, NDArray[Any]],
    additions: Sequence[Addition],
) -> None:
    """Writes the message of a patched copy anew.

    Args:
        graph: The graph that was copied.
        target: The copy, whose other weights are in place.
        replaced: New values by the name of the initializer or Constant.
        additions: New initializers; their values go where those they are like have theirs.

    Raises:
        UsageError: A node would need embedding and head at once.
    """
    from onnx import ModelProto

    proto = ModelProto()
    with machine_errors(target):
        proto.ParseFromString(target.read_bytes())
    for name, tensor in _named(proto):
        if name in replaced:
            _set_values(tensor, replaced[name])
    for addition in additions:
        _check_free(graph, addition)
        _rewire(proto, graph, addition)
        _add(proto, target, addition)
    with machine_errors(target):
        target.write_bytes(proto.SerializeToString())


def _named(proto: ModelProto) -> Iterator[tuple[str, TensorProto]]:
    for graph in nested_graphs(proto.graph):
        for tensor in graph.initializer:
            yield tensor.name, tensor
        for node in graph.node:
            if node.op_type == "Constant" and not node.domain:
                for attribute in node.attribute:
                    if attribute.HasField("t"):
                        yield node.output[0], attribute.t


def _set_values(tensor: TensorProto, array: NDArray[Any]) -> None:
    for name in ("float_data", "int32_data", "double_data"):
        tensor.ClearField(name)
    tensor.raw_data = array.tobytes()


def _check_free(graph: Graph, addition: Addition) -> None:
    outputs = {output for uses in graph.uses.values() for use in uses for output in use.outputs}
    if addition.name in graph.initializers or addition.name in outputs:
        raise UsageError(
            f"the graph has a value of the name {listing([addition.name])} already",
            path=graph.path,
            hint="Leave out --graph: the merged model is traced then",
        )


def _rewire(proto: ModelProto, graph: Graph, addition: Addition) -> None:
    """Lets every node that reads an initializer for anything but a lookup read the new one."""
    heads = set()
    for use in graph.uses[addition.like.name]:
        looks = is_lookup(graph, use)
        if looks is None:
            raise UsageError(
                f"the graph's node {listing([use.node])} serves embedding and head at once",
                path=graph.path,
                hint="Leave out --graph: the merged model is traced then",
            )
        if not looks:
            heads.add((use.outputs, use.index))
    for each in nested_graphs(proto.graph):
        for node in each.node:
            for index, name in enumerate(node.input):
                if name == addition.like.name and (tuple(node.output), index) in heads:
                    node.input[index] = addition.name


def _add(proto: ModelProto, target: Path, addition: Addition) -> None:
    tensor = proto.graph.initializer.add()
    tensor.name = addition.name
    tensor.dims.extend(addition.like.shape)
    tensor.data_type = next(
        held.data_type for name, held in _named(proto) if name == addition.like.name
    )
    if not addition.like.location:
        tensor.raw_data = addition.array.tobytes()
        return
    path = target.parent / addition.like.location
    end = path.stat().st_size
    offset = -(-end // _ALIGNMENT) * _ALIGNMENT
    with Writer(path) as writer:
        writer.write_at(byte_view(addition.array), offset)
    tensor.data_location = tensor.EXTERNAL
    where = {"location": addition.like.location, "offset": offset, "length": addition.array.nbytes}
    for key, value in where.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)
