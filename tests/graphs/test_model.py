"""Opening graphs: where weights lie, who reads them, and what is refused."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper

from boneconv.errors import BoneconvError, FormatError, MissingPathError, NameMatchError
from boneconv.graphs import open_graph
from tests.graphs.onnx_files import DATA, identity, make_graph, tensor

W = np.arange(24, dtype=np.float32).reshape(4, 6) / 16


@pytest.mark.parametrize("storage", ["raw", "typed", "external"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_a_weight_is_read_however_it_is_stored(tmp_path: Path, storage: Any, dtype: Any) -> None:
    weight = W.astype(dtype)
    graph = open_graph(make_graph(tmp_path / "model.onnx", {"w": weight}, storage))
    found = graph.initializers["w"]
    assert found.shape == (4, 6)
    assert found.read().tobytes() == weight.tobytes()
    assert found.rows(1, 2).tobytes() == weight[1:3].tobytes()
    assert found.block(1, 2, 3, 3).tobytes() == weight[1:4, 2:5].tobytes()


def test_a_block_beyond_the_tensor_is_an_error(tmp_path: Path) -> None:
    found = open_graph(make_graph(tmp_path / "model.onnx", {"w": W})).initializers["w"]
    with pytest.raises(IndexError):
        found.block(3, 0, 2, 6)


def test_constants_are_weights_too(tmp_path: Path) -> None:
    node = helper.make_node("Constant", [], ["c"], value=tensor("", W))
    file = make_graph(tmp_path / "model.onnx", {}, "raw", nodes=[node, identity("c")])
    assert np.array_equal(open_graph(file).initializers["c"].read(), W)


def test_integers_are_no_weights_but_their_files_are_known(tmp_path: Path) -> None:
    graph = open_graph(make_graph(tmp_path / "model.onnx", {"ids": np.arange(6)}))
    assert not graph.initializers
    assert graph.data_files == {DATA: tmp_path / DATA}


def test_who_reads_a_weight(tmp_path: Path) -> None:
    modules = {"w": "model/model.layers.0/model.layers.0.q_proj"}
    graph = open_graph(make_graph(tmp_path / "model.onnx", {"w": W}, modules=modules))
    (use,) = graph.uses["w"]
    assert (use.op, use.index, use.module) == ("Identity", 0, "model.layers.0.q_proj")
    assert use.outputs == ("w.out0",)


def test_a_folder_with_one_graph(tmp_path: Path) -> None:
    file = make_graph(tmp_path / "decoder.onnx", {"w": W})
    assert open_graph(tmp_path).path == file
    make_graph(tmp_path / "encoder.onnx", {"w": W}, "raw")
    with pytest.raises(NameMatchError, match="several graphs"):
        open_graph(tmp_path)
    main = make_graph(tmp_path / "model.onnx", {"w": W}, "raw")
    assert open_graph(tmp_path).path == main


def test_opening_takes_no_memory_for_weights(tmp_path: Path) -> None:
    big = np.ones((2000, 2000), np.float32)
    file = make_graph(tmp_path / "model.onnx", {"w": big}, "raw")
    open_graph(make_graph(tmp_path / "warm.onnx", {"w": W}, "raw"))  # imports what it needs
    tracemalloc.start()
    graph = open_graph(file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert graph.largest == big.nbytes
    assert peak < big.nbytes / 16


def test_graphs_beyond_two_gigabytes(tmp_path: Path) -> None:
    file = make_graph(tmp_path / "model.onnx", {"w": W, "end": W + 1})
    model = onnx.load(file, load_external_data=False)
    held, end = model.graph.initializer
    del held.dims[:]
    held.dims.extend([40_000, 20_000])
    beyond = 40_000 * 20_000 * 4
    for each, offset, length in ((held, 0, beyond), (end, beyond, W.nbytes)):
        for entry in each.external_data:
            entry.value = {"offset": str(offset), "length": str(length)}.get(entry.key, entry.value)
    file.write_bytes(model.SerializeToString())
    with (tmp_path / DATA).open("wb") as data:  # a hole, which takes no room on the disk
        data.seek(beyond)
        data.write((W + 1).tobytes())
    graph = open_graph(file)
    assert np.array_equal(graph.initializers["end"].read(), W + 1)
    assert not graph.initializers["w"].rows(39_999, 1).any()


def _edit(file: Path, **entries: str) -> Path:
    model = onnx.load(file, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        entry.value = entries.get(entry.key, entry.value)
    file.write_bytes(model.SerializeToString())
    return file


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"offset": "8"}, "beyond the end"),
        ({"length": "92"}, "contradicts its shape"),
        ({"offset": "-8"}, "malformed offset"),
        ({"offset": "1e3"}, "malformed offset"),
        ({"length": "9" * 30}, "malformed length"),
    ],
)
def test_ranges_that_cannot_be(tmp_path: Path, entries: dict[str, str], message: str) -> None:
    file = _edit(make_graph(tmp_path / "model.onnx", {"w": W}), **entries)
    with pytest.raises(FormatError, match=message):
        open_graph(file)


@pytest.mark.parametrize("content", [b"", b"\x08", b"not a graph", b"\x3a\x00"])
def test_files_that_are_no_graph(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(FormatError):
        open_graph(tmp_path / "model.onnx")


def test_paths_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingPathError):
        open_graph(tmp_path / "model.onnx")
    with pytest.raises(MissingPathError, match=r"holds no \.onnx file"):
        open_graph(tmp_path)
    file = make_graph(tmp_path / "model.onnx", {"w": W})
    (tmp_path / DATA).unlink()
    with pytest.raises(MissingPathError, match="weights are missing"):
        open_graph(file)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_graphs_raise_errors_of_ours(tmp_path: Path, data: st.DataObject) -> None:
    file = make_graph(tmp_path / "model.onnx", {"w": W, "v": W[0]}, "raw")
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        graph = open_graph(file)
    except BoneconvError:
        return
    assert all(each.read().shape == each.shape for each in graph.initializers.values())
