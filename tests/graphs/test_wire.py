"""Cutting the weights out of a serialised graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from boneconv.graphs.wire import OWN_FILE, WireError, cut
from tests.graphs.onnx_files import identity, tensor


def _model(*tensors: onnx.TensorProto, nodes: Any = ()) -> onnx.ModelProto:
    graph = helper.make_graph(list(nodes), "tiny", [], [], list(tensors))
    return helper.make_model(graph)


def _cut(model: onnx.ModelProto) -> tuple[bytes, onnx.ModelProto]:
    content = model.SerializeToString()
    found = onnx.ModelProto()
    found.ParseFromString(cut(memoryview(content)))
    return content, found


def _payload(content: bytes, held: onnx.TensorProto) -> bytes:
    where = {entry.key: entry.value for entry in held.external_data}
    assert where["location"] == OWN_FILE
    start = int(where["offset"])
    return content[start : start + int(where["length"])]


@pytest.mark.parametrize("storage", ["raw", "typed"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_payload_becomes_a_range_of_the_file(storage: Any, dtype: Any) -> None:
    array = np.arange(12, dtype=dtype).reshape(3, 4)
    content, found = _cut(_model(tensor("w", array, storage)))
    (held,) = found.graph.initializer
    assert (held.name, list(held.dims)) == ("w", [3, 4])
    assert not held.raw_data
    assert not held.float_data
    assert _payload(content, held) == array.tobytes()


def test_everything_else_stays_as_it_is() -> None:
    model = _model(
        tensor("w", np.ones((2, 3), np.float32)),
        tensor("ids", np.arange(5)),
        tensor("scalar", np.float32(2.5)),
        tensor("half", np.ones(3, np.float16), "typed"),
        nodes=[identity("w", "model/layer"), identity("ids")],
    )
    _, found = _cut(model)
    del model.graph.initializer[0], found.graph.initializer[0]
    assert found == model


def test_constants_and_subgraphs_are_cut_too() -> None:
    inner = tensor("inner", np.ones((2, 2), np.float32))
    branch = helper.make_graph([identity("inner")], "branch", [], [], [inner])
    nodes = [
        helper.make_node("Constant", [], ["c"], value=tensor("", np.ones(7, np.float32))),
        helper.make_node("If", ["condition"], ["y"], then_branch=branch, else_branch=branch),
    ]
    content, found = _cut(_model(nodes=nodes))
    constant = found.graph.node[0].attribute[0].t
    assert _payload(content, constant) == np.ones(7, np.float32).tobytes()
    for attribute in found.graph.node[1].attribute:
        (held,) = attribute.g.initializer
        assert _payload(content, held) == np.ones(4, np.float32).tobytes()


def test_a_message_that_nests_without_end_is_refused() -> None:
    graph = helper.make_graph([], "inmost", [], [], [tensor("w", np.ones(3, np.float32))])
    for _ in range(30):
        graph = helper.make_graph(
            [helper.make_node("If", ["c"], ["y"], then_branch=graph)], "outer", [], []
        )
    content = helper.make_model(graph).SerializeToString()
    with pytest.raises(WireError, match="nested too deeply"):
        cut(memoryview(content))


@given(data=st.data())
def test_damaged_bytes_never_raise_anything_else(data: st.DataObject) -> None:
    nodes = [
        identity("w", "layer"),
        helper.make_node("Constant", [], ["c"], value=tensor("", np.ones(7, np.float32))),
    ]
    content = bytearray(
        _model(tensor("w", np.ones((3, 5), np.float32)), nodes=nodes).SerializeToString()
    )
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    try:
        found = cut(memoryview(bytes(content)))
    except WireError:
        return
    assert isinstance(found, bytes)


def test_what_is_cut_holds_the_values_that_onnx_reads() -> None:
    array = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    content, found = _cut(_model(tensor("w", array)))
    held = found.graph.initializer[0]
    held.raw_data = _payload(content, held)
    held.data_location = held.DEFAULT
    del held.external_data[:]
    assert np.array_equal(numpy_helper.to_array(held), array)
