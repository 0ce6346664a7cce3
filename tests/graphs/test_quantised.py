"""Quantised graphs, made by ONNX Runtime's own tools, are recognised."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from boneconv.errors import FormatError
from boneconv.graphs import open_graph, quantised_ops, refuse_quantised
from tests.graphs.onnx_files import make_graph


@pytest.fixture
def matmul(tmp_path: Path) -> Path:
    """A graph with one matrix product."""
    weight = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    kind = onnx.TensorProto.FLOAT
    return make_graph(
        tmp_path / "plain" / "model.onnx",
        {"w": weight},
        "raw",
        nodes=[helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        inputs=[helper.make_tensor_value_info("x", kind, ["n", 64])],
        outputs=[helper.make_tensor_value_info("y", kind, ["n", 32])],
    )


def test_a_plain_graph_is_not_quantised(matmul: Path) -> None:
    graph = open_graph(matmul)
    assert quantised_ops(graph) == []
    refuse_quantised(graph)


def test_dynamic_int8(matmul: Path, tmp_path: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    logging.getLogger().setLevel(logging.ERROR)
    quantize_dynamic(matmul, tmp_path / "int8.onnx")
    graph = open_graph(tmp_path / "int8.onnx")
    assert quantised_ops(graph) == ["DynamicQuantizeLinear", "MatMulInteger"]
    with pytest.raises(FormatError, match="found DynamicQuantizeLinear, MatMulInteger") as caught:
        refuse_quantised(graph)
    assert "the graph that it was quantised from" in str(caught.value)


def test_int4_blocks(matmul: Path, tmp_path: Path) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(matmul), block_size=32, is_symmetric=True)
    quantizer.process()
    quantizer.model.save_model_to_file(str(tmp_path / "int4.onnx"))
    with pytest.raises(FormatError, match="found MatMulNBits"):
        refuse_quantised(open_graph(tmp_path / "int4.onnx"))


@pytest.mark.parametrize("op", ["GatherBlockQuantized", "QMoE", "QLinearAdd", "MatMulBnb4"])
def test_other_quantised_operators(tmp_path: Path, op: str) -> None:
    node = helper.make_node(op, ["w"], ["y"], domain="com.microsoft")
    file = make_graph(tmp_path / "model.onnx", {"w": np.ones((2, 2), "f4")}, "raw", nodes=[node])
    with pytest.raises(FormatError, match=f"found {op}"):
        refuse_quantised(open_graph(file))
