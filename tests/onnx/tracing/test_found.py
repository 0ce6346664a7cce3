"""Weights are found in a graph by their content, exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from boneconv.errors import CheckFailedError, NonFiniteError
from boneconv.onnx.tracing.found import GraphWeights, check_all_found, digests

Array = np.ndarray[Any, Any]


def write(path: Path, **weights: Array) -> GraphWeights:
    """A graph that reads some weights, and one that it does not read."""
    tensors = [onnx.helper.make_tensor_value_info("y", 1, None)]
    nodes = [onnx.helper.make_node("Identity", [name], [f"{name}_out"]) for name in weights]
    held = [onnx.numpy_helper.from_array(weight, name) for name, weight in weights.items()]
    held.append(onnx.numpy_helper.from_array(np.full((2, 2), 7, np.float32), "unread"))
    nodes.append(onnx.helper.make_node("Identity", [next(iter(weights))], ["y"]))
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], tensors, held)), path)
    return GraphWeights(path)


def drawn(*shape: int) -> Array:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def test_a_weight_is_found_as_it_is_transposed_and_reshaped(tmp_path: Path) -> None:
    matrix, bias, kernel = drawn(3, 5), drawn(4), drawn(2, 3, 4, 4)
    graph = write(tmp_path / "g.onnx", a=matrix.T.copy(), b=bias.reshape(1, 4), c=kernel)
    weights = [("w", lambda: matrix), ("b", lambda: bias), ("k", lambda: kernel)]
    assert check_all_found(graph, weights, {}, "F32") == 3


def test_the_first_weight_that_is_not_there_is_named(tmp_path: Path) -> None:
    matrix = drawn(3, 5)
    graph = write(tmp_path / "g.onnx", a=matrix)
    weights = [("w", lambda: matrix), ("x", lambda: matrix[::-1]), ("v", lambda: -matrix)]
    with pytest.raises(CheckFailedError, match=r"'x'.*all 3 weights.*all but 2: v, x"):
        check_all_found(graph, weights, {}, "F32")


def test_a_weight_that_no_node_reads_is_not_there(tmp_path: Path) -> None:
    graph = write(tmp_path / "g.onnx", a=drawn(3, 5))
    assert not graph.holds(np.full((2, 2), 7, np.float32))


def test_a_weight_that_was_put_together_is_looked_up_by_its_digests(tmp_path: Path) -> None:
    packed = drawn(2, 3, 4)
    graph = write(tmp_path / "g.onnx", a=packed)
    assert check_all_found(graph, [], {"experts": digests(packed)}, "F32") == 1
    turned = packed.swapaxes(1, 2)
    assert check_all_found(graph, [], {"experts": digests(turned)}, "F32") == 1
    with pytest.raises(CheckFailedError, match="'experts'"):
        check_all_found(graph, [], {"experts": digests(packed + 1)}, "F32")


@pytest.mark.parametrize(("name", "dtype"), [("F16", np.float16), ("BF16", ml_dtypes.bfloat16)])
def test_a_weight_is_looked_up_after_the_cast(
    tmp_path: Path, name: str, dtype: type[np.generic]
) -> None:
    matrix = drawn(3, 5)
    graph = write(tmp_path / "g.onnx", a=matrix.astype(dtype))
    assert check_all_found(graph, [("w", lambda: matrix)], {}, name) == 1


def test_a_weight_that_stays_in_float32_is_found_too(tmp_path: Path) -> None:
    matrix = drawn(3, 5).astype(ml_dtypes.bfloat16)
    graph = write(tmp_path / "g.onnx", a=matrix.astype(np.float32))
    assert check_all_found(graph, [("w", lambda: matrix)], {}, "F16") == 1


def test_a_weight_too_large_for_the_dtype_is_named(tmp_path: Path) -> None:
    matrix = np.full((2, 3), 1e6, np.float32)
    graph = write(tmp_path / "g.onnx", a=matrix.astype(ml_dtypes.bfloat16))
    with pytest.raises(NonFiniteError, match=r"'w'.*1e\+06.*--dtype float32"):
        check_all_found(graph, [("w", lambda: matrix)], {}, "F16")


@given(rows=st.integers(1, 6), columns=st.integers(1, 6), data=st.data())
def test_one_changed_value_is_another_weight(rows: int, columns: int, data: st.DataObject) -> None:
    matrix = drawn(rows, columns)
    changed = matrix.copy()
    place = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    changed[place] = np.nextafter(changed[place], np.float32(np.inf))
    assert set(digests(changed)).isdisjoint(digests(matrix))
    assert not set(digests(matrix.T)).isdisjoint(digests(matrix))
