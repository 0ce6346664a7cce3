"""Small graphs written with ONNX's own helpers: initializers of any storage, read by some node."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, np.dtype[Any]]
#: How values are stored: in the message as bytes, as numbers, or in a file beside the graph.
Storage = Literal["raw", "typed", "external"]

_TYPES = {
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int64": TensorProto.INT64,
}
DATA = "model.onnx.data"


def tensor(name: str, array: Array, storage: Storage = "raw") -> TensorProto:
    """A tensor that holds its values; `external` is made of it by `save`."""
    if storage != "typed":
        return numpy_helper.from_array(np.asarray(array, order="C"), name)
    kind = _TYPES[array.dtype.name]
    return helper.make_tensor(name, kind, array.shape, array.reshape(-1).tolist())


def identity(name: str, module: str = "", index: int = 0) -> onnx.NodeProto:
    """A node that reads a value; `module` is where the exporter would say that it stands."""
    node = helper.make_node("Identity", [name], [f"{name}.out{index}"], name=f"read {name}")
    if module:
        scopes = ["", *module.split("/"), "linear"]
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=repr(scopes))
    return node


def make_graph(
    file: Path,
    weights: Mapping[str, Array],
    storage: Storage = "external",
    *,
    nodes: Sequence[onnx.NodeProto] | None = None,
    modules: Mapping[str, str] | None = None,
    inputs: Sequence[onnx.ValueInfoProto] = (),
    outputs: Sequence[onnx.ValueInfoProto] | None = None,
) -> Path:
    """Writes a graph; every weight is an output of it unless nodes are given.

    Args:
        file: Where; external data goes into `DATA` beside it.
        weights: The initializers.
        storage: How they are stored.
        nodes: The nodes.
        modules: The module of the node that reads a weight.
        inputs: The graph's inputs.
        outputs: Its outputs, with `nodes`.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if nodes is None:
        nodes = [identity(name, (modules or {}).get(name, "")) for name in weights]
        outputs = [
            helper.make_tensor_value_info(f"{name}.out0", _TYPES[array.dtype.name], array.shape)
            for name, array in weights.items()
        ]
    graph = helper.make_graph(
        list(nodes),
        "tiny",
        list(inputs),
        list(outputs or ()),
        [tensor(name, array, storage) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    if storage == "external":
        onnx.save(model, file, save_as_external_data=True, location=DATA, size_threshold=0)
    else:
        onnx.save(model, file)
    return file


def weights_of(file: Path) -> dict[str, Array]:
    """All initializers of a graph, by ONNX's own loader."""
    return {each.name: numpy_helper.to_array(each) for each in onnx.load(file).graph.initializer}


def hub_snapshot(cache: Path, files: dict[str, Path]) -> Path:
    """A snapshot as the Hub's client lays it out: links to blobs of the repository."""
    repository = cache / "models--somebody--graph"
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "blobs").mkdir(parents=True)
    for number, (name, source) in enumerate(files.items()):
        blob = repository / "blobs" / f"{number:064x}"
        shutil.copyfile(source, blob)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return snapshot
