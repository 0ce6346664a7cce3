"""Writing a graph with adapter inputs: its weights copied as they are, in bounded memory.

Weights in files of their own keep those files, byte for byte. Weights that lie in the graph's own
file go to ``model.onnx.data``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from boneconv.errors import CheckFailedError, FormatError, printable
from boneconv.graphs import GRAPH_NAME, Graph, nested_graphs
from boneconv.io.files import Reader, machine_errors
from boneconv.onnx.child import check_rules
from boneconv.onnx.runtime.names import VERSION_KEY

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

__all__ = ["check_graph", "write_graph"]

_PIECE = 4 * 1024 * 1024
_ALIGNMENT = 4096
_OWN_DATA = f"{GRAPH_NAME}.data"


def write_graph(graph: Graph, model: ModelProto, folder: Path) -> int:
    """Writes a changed graph and the weights that it had before.

    Args:
        graph: The graph as it was opened.
        model: The changed copy of its structure; gets the metadata that adapter files are held
            against.
        folder: Where ``model.onnx`` and its data go.

    Returns:
        The number in that metadata.

    Raises:
        FormatError: The structure does not fit one file.
        MachineError: The disk is full or fails.
    """
    digest = blake3()
    for location, source in sorted(graph.data_files.items()):
        target = folder / location
        with machine_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        _copy_all(source, target, digest)
    _move_inline(graph, model, folder, digest)
    digest.update(_serialise(model, graph.path))
    version = int.from_bytes(digest.digest(4), "little") & 0x7FFF_FFFF
    model.metadata_props.add(key=VERSION_KEY, value=str(version))
    content = _serialise(model, graph.path)
    with machine_errors(folder):
        (folder / GRAPH_NAME).write_bytes(content)
    return version


def check_graph(path: Path) -> None:
    """Holds a graph against ONNX's rules and loads it in ONNX Runtime.

    Operators that only ONNX Runtime knows are not held against the rules.

    Raises:
        CheckFailedError: It breaks a rule, or does not load.
    """
    import onnxruntime

    check_rules(path, "ONNX's checker")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise CheckFailedError(f"ONNX Runtime: {_first_line(error)}", path=path) from error


def _copy_all(source: Path, target: Path, digest: blake3) -> None:
    with machine_errors(target), source.open("rb") as reader, target.open("wb") as writer:
        while piece := reader.read(_PIECE):
            digest.update(piece)
            writer.write(piece)


def _move_inline(graph: Graph, model: ModelProto, folder: Path, digest: blake3) -> None:
    """Gives the tensors that were cut out of the graph's own file a place again."""
    held = [
        tensor
        for each in nested_graphs(model.graph)
        for tensor in each.initializer
        if _is_cut(tensor)
    ]
    large = [tensor for tensor in held if _range(tensor)[1] >= _ALIGNMENT]
    if large:
        name = _free_name(set(graph.data_files))
        path = folder / name
        with Reader(graph.path) as reader, machine_errors(path), path.open("wb") as out:
            for tensor in large:
                offset, length = _range(tensor)
                out.seek(-(-out.tell() // _ALIGNMENT) * _ALIGNMENT)
                _point_to(tensor, name, out.tell(), length)
                for piece in _pieces(reader, offset, length):
                    digest.update(piece)
                    out.write(piece)
    with Reader(graph.path) as reader:
        for tensor in (*held, *_constants(model)):
            if _is_cut(tensor):
                content = b"".join(_pieces(reader, *_range(tensor)))
                del tensor.external_data[:]
                tensor.data_location = tensor.DEFAULT
                tensor.raw_data = content


def _pieces(reader: Reader, offset: int, length: int) -> Iterator[bytes]:
    for start in range(0, length, _PIECE):
        piece = bytearray(min(_PIECE, length - start))
        reader.read_into(memoryview(piece), offset + start)
        yield bytes(piece)


def _free_name(taken: set[str]) -> str:
    name = _OWN_DATA
    while name in taken:
        name = f"own.{name}"
    return name


def _is_cut(tensor: TensorProto) -> bool:
    """Whether a tensor's values lie in the graph's own file, cut out when it was opened."""
    if tensor.data_location != tensor.EXTERNAL:
        return False
    return not any(entry.key == "location" and entry.value for entry in tensor.external_data)


def _range(tensor: TensorProto) -> tuple[int, int]:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return int(entries.get("offset", 0)), int(entries["length"])


def _point_to(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def _constants(model: ModelProto) -> Iterator[TensorProto]:
    """The tensors of nodes' attributes, of functions too."""
    pending = [*model.graph.node, *(node for each in model.functions for node in each.node)]
    while pending:
        for attribute in pending.pop().attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            pending.extend(attribute.g.node)
            pending.extend(node for inner in attribute.graphs for node in inner.node)


def _serialise(model: ModelProto, path: Path) -> bytes:
    try:
        content: bytes = model.SerializeToString(deterministic=True)
    except Exception as error:
        raise FormatError(
            "the graph's structure does not fit one file", path=path, found=_first_line(error)
        ) from error
    return content


def _first_line(error: Exception) -> str:
    return printable((str(error) or type(error).__name__).split("\n")[0][:400])
