"""ONNX graphs that hold a model's weights in every way that exporters do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.builders import BF16, F16, F32, Array

TYPES = {F32: TensorProto.FLOAT, F16: TensorProto.FLOAT16, BF16: TensorProto.BFLOAT16}


def tensor_of(name: str, array: Array) -> TensorProto:
    data = np.ascontiguousarray(array).tobytes()
    return helper.make_tensor(name, TYPES[array.dtype], array.shape, data, raw=True)


def write_graph(
    path: Path, tensors: Mapping[str, Array], *, anonymous: bool = True, external: bool = False
) -> Path:
    """A graph with a node for every weight.

    Layer 0 is stored as it is, layer 1 transposed and, where names may be lost, under names that
    say nothing, in layer 2 q_proj and up_proj share one packed initializer.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    held: dict[str, Array] = {}
    packed: list[Array] = []
    for number, (name, array) in enumerate(tensors.items()):
        if array.dtype not in TYPES:
            continue
        if "layers.2." in name and ("q_proj" in name or "up_proj" in name):
            packed.append(array)
        elif "layers.1." in name and array.ndim == 2:
            held[f"onnx::MatMul_{number}" if anonymous else name] = np.ascontiguousarray(array.T)
        else:
            held[name] = array
    if packed:
        held["packed.weight"] = np.concatenate(packed)
    nodes = [
        helper.make_node("Identity", [name], [f"out.{number}"]) for number, name in enumerate(held)
    ]
    nodes.append(helper.make_node("Mul", ["x", "scale"], ["y"]))
    initializers = [tensor_of(name, array) for name, array in held.items()]
    initializers.append(tensor_of("scale", np.array([2.0, 3.0], F32)))
    graph = helper.make_graph(
        nodes,
        "model",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    options: dict[str, Any] = {}
    if external:
        options = {
            "save_as_external_data": True,
            "location": f"{path.name}.data",
            "size_threshold": 0,
        }
    onnx.save_model(model, str(path), **options)
    return path
