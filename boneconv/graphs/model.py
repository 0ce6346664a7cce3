"""Opening a graph: its structure, where its weights lie, who reads them. No weight is loaded."""

from __future__ import annotations

import ast
import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from boneconv.errors import FormatError, MissingPathError, NameMatchError
from boneconv.graphs.external import external_range
from boneconv.graphs.initializers import Initializer
from boneconv.graphs.nested import nested_graphs
from boneconv.graphs.wire import OWN_FILE, WireError, cut
from boneconv.io.files import machine_errors

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

__all__ = ["GRAPH_NAME", "Graph", "Use", "open_graph"]

#: The graph's file in a folder.
GRAPH_NAME = "model.onnx"

_SCOPES = "pkg.torch.onnx.name_scopes"
#: ONNX data type -> safetensors dtype, for the tensors that are weights.
_DTYPES = {1: "F32", 10: "F16", 11: "F64", 16: "BF16"}
_BITS = {
    **dict.fromkeys((1, 6, 12), 32),
    **dict.fromkeys((2, 3, 9, 17, 18, 19, 20, 24), 8),
    **dict.fromkeys((4, 5, 10, 16), 16),
    **dict.fromkeys((7, 11, 13, 14), 64),
    15: 128,
    **dict.fromkeys((21, 22, 23), 4),
    **dict.fromkeys((25, 26), 2),
}


#: numpy's limits: dimensions, and bytes of elements that have up to sixteen of them.
_MOST_DIMENSIONS, _MOST_ELEMENTS = 64, 2**59


@dataclass(frozen=True)
class Use:
    """A node that reads a value.

    Attributes:
        op: Its operator, with the domain where it is not ONNX's own: ``com.microsoft.MatMulNBits``.
        node: Its name.
        index: Which of its inputs the value is.
        module: The module of the traced model that it was made for, where the exporter says.
        outputs: The values that it makes.
    """

    op: str
    node: str
    index: int
    module: str
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Graph:
    """A graph whose structure has been read.

    Attributes:
        path: Its file.
        proto: The ``onnx.ModelProto``. Weights that the file holds inline are not in it: they are
            external tensors with an empty location, see `boneconv.graphs.wire`. It is not to be
            saved as it is, nor changed.
        initializers: Its float tensors by name: initializers and the values of Constant nodes, of
            subgraphs too. A name that two subgraphs use has neither.
        data_files: The files of its external data, by the name that the graph gives them.
    """

    path: Path
    proto: ModelProto = field(repr=False)
    initializers: Mapping[str, Initializer]
    data_files: Mapping[str, Path]

    @cached_property
    def uses(self) -> Mapping[str, tuple[Use, ...]]:
        """Who reads each value, by the value's name; a graph's output is read by nobody here."""
        found: dict[str, list[Use]] = {}
        for node in _nodes(self.proto.graph):
            op, module, outputs = _op(node), _module(node), tuple(node.output)
            for index, name in enumerate(node.input):
                use = Use(op, node.name, index, module, outputs)
                found.setdefault(name, []).append(use)
        return {name: tuple(uses) for name, uses in found.items()}

    @cached_property
    def ops(self) -> frozenset[str]:
        """The operators of its nodes."""
        functions = (node for function in self.proto.functions for node in function.node)
        return frozenset(_op(node) for node in (*_nodes(self.proto.graph), *functions))

    @cached_property
    def largest(self) -> int:
        """Bytes of its largest float tensor."""
        return max((each.nbytes for each in self.initializers.values()), default=0)


def open_graph(path: Path) -> Graph:
    """Reads a graph's structure and finds its weights, without reading them.

    Memory does not depend on the weights, external or inline. External data may be a link within
    the graph's folder, or one of the Hub client's cache.

    Args:
        path: An ``.onnx`` file, or a folder with a ``model.onnx`` or a single ``.onnx`` file.

    Raises:
        MissingPathError: There is no such file, or its external data is missing.
        NameMatchError: The folder holds several graphs.
        FormatError: The file is no ONNX graph, its external data lies outside its folder, or a
            tensor's range lies outside its file or contradicts its shape.
    """
    path = _graph_file(path)
    proto = _parse(path)
    sizes: dict[Path, int] = {}
    data_files: dict[str, Path] = {}
    initializers: dict[str, Initializer] = {}
    shadowed: set[str] = set()
    for name, tensor in _tensors(proto):
        stored = _locate(name, tensor, path, sizes, data_files)
        if stored is None:
            continue
        if name in initializers:
            shadowed.add(name)
        initializers[name] = stored
    for name in shadowed:
        del initializers[name]
    return Graph(path, proto, initializers, data_files)


def _graph_file(path: Path) -> Path:
    if not path.is_dir():
        if not path.exists():
            raise MissingPathError("no such file or folder", path=path)
        return path
    if (path / GRAPH_NAME).is_file():
        return path / GRAPH_NAME
    found = sorted(path.glob("*.onnx"))
    if len(found) == 1:
        return found[0]
    if found:
        raise NameMatchError(
            f"holds several graphs: {', '.join(repr(each.name) for each in found[:6])}",
            path=path,
            hint="Name the one that is meant",
        )
    raise MissingPathError("holds no .onnx file", path=path)


def _parse(path: Path) -> ModelProto:
    from onnx import ModelProto

    decode_error = import_module("google.protobuf.message").DecodeError
    proto = ModelProto()
    try:
        proto.ParseFromString(_cut_file(path))
    except (WireError, decode_error, ValueError) as error:
        raise FormatError(
            "not an ONNX graph, or a damaged one", path=path, found=str(error)
        ) from error
    if not proto.HasField("graph") or not (proto.graph.node or proto.graph.initializer):
        raise FormatError("not an ONNX graph: it has no nodes", path=path)
    if not all(isinstance(text, str) for text in _texts(proto)):
        raise FormatError("the graph holds a name that is not UTF-8", path=path)
    return proto


def _texts(proto: ModelProto) -> Iterator[object]:
    """The names in a graph; what is no UTF-8, protobuf gives as bytes."""
    nodes = [
        *_nodes(proto.graph),
        *(node for function in proto.functions for node in function.node),
    ]
    for node in nodes:
        yield from (node.op_type, node.domain, node.name, *node.input, *node.output)
        yield from (text for entry in node.metadata_props for text in (entry.key, entry.value))
    for graph in nested_graphs(proto.graph):
        yield from (value.name for value in (*graph.input, *graph.output))
    for name, tensor in _tensors(proto):
        yield from (name, tensor.name)
        yield from (text for entry in tensor.external_data for text in (entry.key, entry.value))


def _cut_file(path: Path) -> bytes:
    with machine_errors(path), path.open("rb") as file:
        if path.stat().st_size == 0:
            raise FormatError("the file is empty", path=path, hint="Download or copy it again")
        with (
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as view,
        ):
            return cut(view)


def _tensors(proto: ModelProto) -> Iterator[tuple[str, TensorProto]]:
    """Every tensor with the name of its value; attributes of other nodes have none."""
    for graph in nested_graphs(proto.graph):
        for tensor in graph.initializer:
            yield tensor.name, tensor
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    constant = node.op_type == "Constant" and not node.domain and node.output
                    yield (node.output[0] if constant else ""), attribute.t
                for tensor in attribute.tensors:
                    yield "", tensor


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    for each in nested_graphs(graph):
        yield from each.node


def _locate(
    name: str,
    tensor: TensorProto,
    path: Path,
    sizes: dict[Path, int],
    data_files: dict[str, Path],
) -> Initializer | None:
    """Where a tensor's values lie; None for one that is no float weight with a name."""
    shape = tuple(int(size) for size in tensor.dims)
    if not _is_shape(shape):
        raise FormatError(f"{name!r} has a malformed shape", path=path, found=list(shape[:8]))
    dtype = _DTYPES.get(tensor.data_type)
    if tensor.data_location == tensor.EXTERNAL:
        bits = _BITS.get(tensor.data_type)
        if bits is None:
            raise FormatError(f"{name!r} has an unknown dtype", path=path, found=tensor.data_type)
        nbytes = -(-math.prod(shape) * bits // 8)
        lies = external_range(tensor, path, nbytes, sizes)
        if lies.location != OWN_FILE:
            data_files[lies.location] = lies.path
        if dtype is None or not name:
            return None
        return Initializer(name, dtype, shape, lies.path, lies.location, lies.offset)
    if dtype is None or not name:
        return None
    return _inline(name, dtype, shape, tensor, path)


def _is_shape(shape: tuple[int, ...]) -> bool:
    """Whether an array can have it: the sizes that are not zero have a product that numpy holds."""
    if len(shape) > _MOST_DIMENSIONS or any(size < 0 for size in shape):
        return False
    return math.prod(filter(None, shape)) < _MOST_ELEMENTS


def _inline(
    name: str, dtype: str, shape: tuple[int, ...], tensor: TensorProto, path: Path
) -> Initializer:
    from onnx import numpy_helper

    try:
        values = numpy_helper.to_array(tensor)
    except (ValueError, TypeError) as error:
        raise FormatError(
            f"{name!r} holds other values than its shape asks for", path=path, found=str(error)
        ) from error
    return Initializer(name, dtype, shape, path, values=values)


def _op(node: NodeProto) -> str:
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"


def _module(node: NodeProto) -> str:
    """The innermost module that a node was traced in; empty where the exporter does not say.

    torch writes the modules from the outside in, and the operation last.
    """
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            try:
                scopes = ast.literal_eval(entry.value)
                return str(scopes[-2]) if len(scopes) > 1 else ""
            except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                return ""
    return ""
