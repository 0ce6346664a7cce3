"""A half-precision graph that computes in float32: its weights as they are, nothing else rounded.

What half-precision activations lose is many times what one faulty layer changes, so that a graph as
it stands cannot tell; and ONNX Runtime lacks bfloat16 on the CPU. Here float16 and bfloat16 become
float32 throughout the graph, which changes no weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from boneconv.io.files import machine_errors

__all__ = ["widened"]

_INLINE = 1024
#: Attributes that name a dtype of ONNX by its number.
_DTYPE_ATTRIBUTES = frozenset({"to", "dtype", "output_dtype", "softmax_precision"})


@contextmanager
def widened(path: Path) -> Iterator[Path]:
    """The graph in float32, in a temporary folder for as long as the context lasts.

    Takes the memory of the float32 weights, and their space in ``TMPDIR``.

    Args:
        path: The graph, its external data beside it.

    Raises:
        DiskFullError, MachineError: It cannot be read or written.
    """
    onnx = import_module("onnx")
    with TemporaryDirectory(prefix="boneconv-logits-") as folder, machine_errors(path):
        place = Path(folder) / "model.onnx"
        model = onnx.load(str(path))
        _widen_graph(onnx, model.graph)
        for function in model.functions:
            _widen_nodes(onnx, function.node)
        onnx.save(
            model,
            str(place),
            save_as_external_data=True,
            location="model.onnx.data",
            size_threshold=_INLINE,
        )
        del model
        yield place


def _halves(onnx: Any) -> tuple[int, int]:
    return onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16


def _widen_graph(onnx: Any, graph: Any) -> None:
    for tensor in graph.initializer:
        _widen_tensor(onnx, tensor)
    for value in (*graph.input, *graph.output, *graph.value_info):
        _widen_type(onnx, value.type)
    _widen_nodes(onnx, graph.node)


def _widen_nodes(onnx: Any, nodes: Any) -> None:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.name in _DTYPE_ATTRIBUTES and attribute.i in _halves(onnx):
                attribute.i = onnx.TensorProto.FLOAT
            for tensor in (*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors):
                _widen_tensor(onnx, tensor)
            for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                _widen_graph(onnx, graph)


def _widen_tensor(onnx: Any, tensor: Any) -> None:
    if tensor.data_type in _halves(onnx):
        values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def _widen_type(onnx: Any, kind: Any) -> None:
    if kind.tensor_type.elem_type in _halves(onnx):
        kind.tensor_type.elem_type = onnx.TensorProto.FLOAT
