"""Small graphs that multiply by a weight in the ways that exporters write it, and their answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from boneconv.onnx.runtime.products import Place
from tests.builders import BF16, F32, Array

ELEMENT = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}


@dataclass(frozen=True)
class Linear:
    """A graph ``x -> y`` of one linear layer.

    Attributes:
        model: The graph.
        weight: W ``[out, in]``.
        bias: Of y; zeros where the layer has none.
        place: Where W lies.
        x: An input.
    """

    model: onnx.ModelProto
    weight: Array
    bias: Array
    place: Place
    x: Array

    def expected(self, update: Array | float = 0.0) -> Array:
        """``x (W + update)^T + bias`` in float64."""
        weight = self.weight.astype(np.float64) + update
        return self.x.astype(np.float64) @ weight.T + self.bias


def _node(kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, [output], **attributes)


#: Layout -> the nodes of ``y = x W^T``; whether the initializer is W^T; whether a bias is added.
LAYOUTS: dict[str, tuple[list[onnx.NodeProto], bool, bool]] = {
    "matmul": ([_node("MatMul", ["x", "w"], "y")], True, False),
    "matmul-bias": (
        [_node("MatMul", ["x", "w"], "m"), _node("Add", ["b", "m"], "y")],
        True,
        True,
    ),
    "transposed": (
        [_node("Transpose", ["w"], "t", perm=[1, 0]), _node("MatMul", ["x", "t"], "y")],
        False,
        False,
    ),
    "through-identity": (
        [
            _node("Identity", ["w"], "i"),
            _node("Transpose", ["i"], "t"),
            _node("MatMul", ["x", "t"], "m"),
            _node("Add", ["m", "b"], "y"),
        ],
        False,
        True,
    ),
    "gemm": ([_node("Gemm", ["x", "w", "b"], "y", transB=1)], False, True),
    "gemm-plain": ([_node("Gemm", ["x", "w"], "y")], True, False),
    "gemm-scaled": (
        [
            _node("Gemm", ["x", "w2", "b2"], "y", transB=1, alpha=0.5, beta=2.0),
        ],
        False,
        True,
    ),
    "fused": (
        [_node("FusedMatMul", ["x", "w"], "y", transB=1, domain="com.microsoft")],
        False,
        False,
    ),
}


def linear(
    layout: str = "matmul",
    *,
    out: int = 6,
    width: int = 10,
    lead: tuple[int, ...] = (2, 3),
    known_rank: bool = True,
    opset: int = 18,
    seed: int = 0,
) -> Linear:
    """One linear layer in a layout of `LAYOUTS`; Gemm takes two axes, ``lead`` of one size."""
    rng = np.random.default_rng([seed, out, width])
    nodes, transposed, has_bias = LAYOUTS[layout]
    lead = lead[:1] if layout.startswith("gemm") else lead
    weight = rng.standard_normal((out, width)).astype(F32)
    bias = rng.standard_normal(out).astype(F32) if has_bias else np.zeros(out, F32)
    x = rng.standard_normal((*lead, width)).astype(F32)
    held = {"w": weight.T if transposed else weight, "b": bias}
    place = Place("w", transposed, 0, out, width)
    if layout == "gemm-scaled":
        held, place = {"w2": weight, "b2": bias}, Place("w2", False, 0, out, width)
        weight, bias = 0.5 * weight, 2 * bias
    wanted = {name for node in nodes for name in node.input}
    model = make_model(
        nodes,
        {name: value for name, value in held.items() if name in wanted},
        x.shape,
        (*lead, out),
        opset=opset,
        known_rank=known_rank,
    )
    return Linear(model, weight, bias, place, x)


def make_model(
    nodes: Sequence[onnx.NodeProto],
    held: Mapping[str, Array],
    x: Sequence[int],
    y: Sequence[int],
    *,
    opset: int = 18,
    dtype: int = TensorProto.FLOAT,
    known_rank: bool = True,
) -> onnx.ModelProto:
    """A graph from x to y with initializers; their leading sizes are free.

    Where the rank of x is not to be known, the nodes get it from a node that says no shape.
    """
    nodes = [_copy(node) for node in nodes]
    if not known_rank:
        for node in nodes:
            node.input[:] = ["same" if name == "x" else name for name in node.input]
        nodes.insert(0, helper.make_node("Identity", ["x"], ["same"]))
    free = [f"d{i}" for i in range(len(y) - 1)]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", dtype, [*free, x[-1]])],
        [helper.make_tensor_value_info("y", dtype, [*free, y[-1]])],
        [numpy_helper.from_array(np.ascontiguousarray(v), n) for n, v in held.items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=9)


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    copied = onnx.NodeProto()
    copied.CopyFrom(node)
    return copied


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def answer(model: onnx.ModelProto, **feeds: Array) -> Array:
    return np.asarray(session(model).run(["y"], feeds)[0])


def bone_update(block: Array, out: int, width: int) -> Array:
    """The change of W by a Bone block ``[r, out]``, in float64."""
    return block.astype(np.float64)[np.arange(width) % block.shape[0], :out].T


def bat_update(block: Array, weight: Array) -> Array:
    """The change of W by a BAT block ``[out / r, r, r]``, in float64."""
    out, width = weight.shape
    b, r = block.astype(np.float64), block.shape[-1]
    tiles = weight.astype(np.float64).reshape(out // r, r, width // r, r).transpose(0, 2, 1, 3)
    change = tiles @ b[:, None] + b[:, None]
    return change.transpose(0, 2, 1, 3).reshape(out, width)


def write_adapter(path: Any, blocks: Mapping[str, Array], *, version: int = 0) -> Any:
    """An adapter file by ONNX Runtime's own means; values of bfloat16 too."""
    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(version)
    adapter.set_parameters(
        {
            name: onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(block.view("u2"), 16)
            if block.dtype == BF16
            else onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(block))
            for name, block in blocks.items()
        }
    )
    adapter.export_adapter(str(path))
    return path
