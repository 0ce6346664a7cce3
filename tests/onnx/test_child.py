"""The check in a process of its own: what it refuses, and what it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from boneconv.errors import CheckFailedError
from boneconv.onnx import child
from boneconv.onnx.child import accept_in_child
from tests.graphs.onnx_files import make_graph

W = np.ones((2, 3), np.float32)


def test_a_good_graph_passes_and_a_bad_one_does_not(tmp_path: Path) -> None:
    accept_in_child(make_graph(tmp_path / "good" / "model.onnx", {"w": W}))
    bad = make_graph(tmp_path / "bad" / "model.onnx", {"w": W}, "raw")
    model = onnx.load(bad)
    model.graph.node[0].input[0] = "nothing"
    bad.write_bytes(model.SerializeToString())
    with pytest.raises(CheckFailedError, match="breaks ONNX's rules"):
        accept_in_child(bad)


def test_a_graph_that_onnx_runtime_does_not_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    node = helper.make_node("NoSuchOperator", ["w"], ["y"], domain="com.microsoft")
    file = make_graph(tmp_path / "model.onnx", {"w": W}, "raw", nodes=[node])
    child.main(str(file), "load")
    assert "ONNX Runtime does not load the graph" in capsys.readouterr().out
    child.main(str(file), "")
    assert capsys.readouterr().out == '""\n'


def test_operators_of_onnx_runtimes_in_onnxs_domain_are_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    node = helper.make_node("SimplifiedLayerNormalization", ["w", "scale"], ["y"], axis=-1)
    kind = onnx.TensorProto.FLOAT
    file = make_graph(
        tmp_path / "model.onnx",
        {"w": W, "scale": W[0]},
        "raw",
        nodes=[node],
        outputs=[helper.make_tensor_value_info("y", kind, [2, 3])],
    )
    child.main(str(file), "load")
    assert capsys.readouterr().out == '""\n'


def test_a_process_that_breaks_down_is_a_failed_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", "false")
    with pytest.raises(CheckFailedError, match="broke down over the graph; found exit code 1"):
        accept_in_child(tmp_path / "model.onnx")
