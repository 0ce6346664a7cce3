"""A graph in half precision that is made to compute in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from boneconv.behaviour.onnx_runner import GraphRunner
from boneconv.behaviour.prompts import Question
from boneconv.behaviour.widening import widened

onnx = pytest.importorskip("onnx")
F16, F32 = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT


def write_graph(path: Path, weight: np.ndarray[Any, Any]) -> None:
    """y = (x to float16) @ W * 1.0, all in float16, the weight in a file of its own."""
    make = onnx.helper.make_node
    one = onnx.numpy_helper.from_array(np.ones(1, np.float16))
    nodes = [
        make("Cast", ["pixel_values"], ["x"], to=F16),
        make("MatMul", ["x", "w"], ["y"]),
        make("Constant", [], ["one"], value=one),
        make("Mul", ["y", "one"], ["logits"]),
    ]
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [value("pixel_values", F32, [1, 64])],
        [value("logits", F16, [1, 8])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10
    )
    onnx.save(model, str(path), save_as_external_data=True, location="w.data", size_threshold=0)


def test_weights_stay_and_nothing_else_is_rounded(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(64, 8)).astype(np.float16)
    write_graph(tmp_path / "g.onnx", weight)
    before = sorted((p.name, p.read_bytes()) for p in tmp_path.iterdir())
    x = generator.normal(size=(1, 64)).astype(np.float32)
    question = Question("images", {"pixel_values": x})
    exact = x.astype(np.float64) @ weight.astype(np.float64)
    with widened(tmp_path / "g.onnx") as place:
        runner = GraphRunner(place, computes="float32")
    (found,) = runner.answers([question], "logits")
    assert not place.exists()
    assert found.dtype == np.float32
    assert np.abs(found - exact).max() < 1e-5
    (rounded,) = GraphRunner(tmp_path / "g.onnx").answers([question], "logits")
    assert np.abs(rounded - exact).max() > 1e-4
    assert sorted((p.name, p.read_bytes()) for p in tmp_path.iterdir()) == before
