"""Finding weights by content: as they are, transposed, packed, rounded; ties."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from boneconv.errors import NameMatchError
from boneconv.graphs import find_weights, missing_weights, open_graph
from boneconv.io.checkpoint import open_checkpoint
from boneconv.io.safetensors import ArrayTensor
from tests.builders import Array, make_base
from tests.graphs.onnx_files import make_graph

GRAPH_DTYPES = [np.float32, np.float16, np.float64, ml_dtypes.bfloat16]


def _random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def _tensors(**arrays: Array) -> dict[str, ArrayTensor]:
    return {name: ArrayTensor(name, array) for name, array in arrays.items()}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80)
@given(
    out=st.integers(1, 40),
    width=st.integers(1, 40),
    before=st.integers(0, 9),
    after=st.integers(0, 9),
    axis=st.sampled_from([0, 1]),
    transposed=st.booleans(),
    dtype=st.sampled_from(GRAPH_DTYPES),
    source=st.sampled_from([np.float32, ml_dtypes.bfloat16]),
    seed=st.integers(0, 9),
)
def test_a_weight_is_found_wherever_it_lies(
    tmp_path: Path,
    out: int,
    width: int,
    before: int,
    after: int,
    axis: int,
    transposed: bool,
    dtype: Any,
    source: Any,
    seed: int,
) -> None:
    weight = _random(out, width, seed=seed).astype(source)
    held = weight.astype(dtype).T if transposed else weight.astype(dtype)
    shape = [before, held.shape[1]] if axis == 0 else [held.shape[0], before]
    end = [after, held.shape[1]] if axis == 0 else [held.shape[0], after]
    parts = [_random(*shape, seed=77).astype(dtype), held, _random(*end, seed=78).astype(dtype)]
    packed = np.concatenate(parts, axis)
    file = make_graph(tmp_path / "model.onnx", {"packed": packed})
    (place,) = find_weights(open_graph(file), _tensors(w=weight))["w"]
    assert place.read().tobytes() == weight.astype(dtype).tobytes()
    assert place.is_whole == (before + after == 0)
    if min(out, width) > 1:
        assert place.transposed == transposed
        assert (place.row, place.column) == ((before, 0) if axis == 0 else (0, before))


@pytest.mark.parametrize("shape", [(7,), (3, 5), (6, 4, 1, 1), (6, 3, 2, 2), (1, 9)])
def test_vectors_matrices_and_convolutions(tmp_path: Path, shape: tuple[int, ...]) -> None:
    weight = _random(*shape)
    file = make_graph(tmp_path / "model.onnx", {"other": _random(11), "w": weight})
    (place,) = find_weights(open_graph(file), _tensors(w=weight))["w"]
    assert place.initializer.name == "w"
    assert place.read().tobytes() == weight.tobytes()


def test_a_packed_bias(tmp_path: Path) -> None:
    q, k, v = (_random(6, seed=seed) for seed in range(3))
    file = make_graph(tmp_path / "model.onnx", {"qkv": np.concatenate([q, k, v])})
    found = find_weights(open_graph(file), _tensors(q=q, k=k, v=v))
    assert [found[name][0].column for name in "qkv"] == [0, 6, 12]


def test_a_whole_initializer_wins_over_a_slice(tmp_path: Path) -> None:
    file = make_graph(tmp_path / "m.onnx", {"long": np.zeros(9, "f4"), "w": np.zeros(4, "f4")})
    (place,) = find_weights(open_graph(file), _tensors(w=np.zeros(4, "f4")))["w"]
    assert place.initializer.name == "w"


def test_one_different_value_is_not_found(tmp_path: Path) -> None:
    weight = _random(20, 30)
    changed = weight.copy()
    changed[19, 29] = np.nextafter(changed[19, 29], np.float32(9))
    graph = open_graph(make_graph(tmp_path / "model.onnx", {"w": changed}))
    assert find_weights(graph, _tensors(w=weight)) == {"w": ()}
    assert missing_weights(graph, _tensors(w=weight, other=changed)) == ["w"]


def test_an_initializer_that_nothing_reads_does_not_count(tmp_path: Path) -> None:
    weight = _random(4, 6)
    weights = {"left over": weight, "packed": np.concatenate([weight, weight + 1])}
    from tests.graphs.onnx_files import identity

    file = make_graph(tmp_path / "model.onnx", weights, nodes=[identity("packed")], outputs=[])
    (place,) = find_weights(open_graph(file), _tensors(w=weight))["w"]
    assert place.initializer.name == "packed"


def test_a_tensor_that_the_graph_holds_twice(tmp_path: Path) -> None:
    weight = _random(9, 5)
    file = make_graph(tmp_path / "model.onnx", {"embed": weight, "head": weight.T})
    places = find_weights(open_graph(file), _tensors(w=weight))["w"]
    assert [(p.initializer.name, p.transposed) for p in places] == [
        ("embed", False),
        ("head", True),
    ]


def test_weights_on_disk_are_found_in_both_storages(tmp_path: Path) -> None:
    base = open_checkpoint(make_base(tmp_path / "base"))
    weights = {
        name: tensor.read().astype(np.float32)
        for name, tensor in base.tensors.items()
        if tensor.dtype == "BF16"
    }
    for storage in ("raw", "external"):
        graph = open_graph(make_graph(tmp_path / storage / "model.onnx", weights, storage))
        found = find_weights(graph, base.tensors, list(weights)[1:3])
        assert list(found) == list(weights)[1:3]
        assert all(places[0].initializer.name == name for name, places in found.items())


# --- ties -------------------------------------------------------------------------------------

NAMES = [f"model.layers.{layer}.mlp.{name}.weight" for layer in (0, 1) for name in ("up", "gate")]


def test_equal_weights_are_told_apart_by_the_exporters_scopes(tmp_path: Path) -> None:
    weight = _random(4, 6)
    modules = {f"val_{i}": NAMES[i].removesuffix(".weight") for i in (2, 0, 3, 1)}
    file = make_graph(tmp_path / "model.onnx", dict.fromkeys(modules, weight), modules=modules)
    found = find_weights(open_graph(file), _tensors(**dict.fromkeys(NAMES, weight)))
    assert {name: [p.initializer.name for p in places] for name, places in found.items()} == {
        name: [f"val_{i}"] for i, name in enumerate(NAMES)
    }


def test_equal_weights_are_told_apart_by_names(tmp_path: Path) -> None:
    weight = _random(4, 6)
    held = {f"wrapped.{name}": weight for name in reversed(NAMES)}
    graph = open_graph(make_graph(tmp_path / "model.onnx", held))
    found = find_weights(graph, _tensors(**dict.fromkeys(NAMES, weight)))
    assert all(found[name][0].initializer.name == f"wrapped.{name}" for name in NAMES)


def test_a_weight_that_is_not_wanted_keeps_its_place(tmp_path: Path) -> None:
    weight = _random(4, 6)
    graph = open_graph(make_graph(tmp_path / "model.onnx", dict.fromkeys(NAMES, weight)))
    found = find_weights(graph, _tensors(**dict.fromkeys(NAMES, weight)), [NAMES[1]])
    assert [place.initializer.name for place in found[NAMES[1]]] == [NAMES[1]]


def test_equal_weights_that_nothing_tells_apart_are_refused(tmp_path: Path) -> None:
    weight = _random(4, 6)
    graph = open_graph(make_graph(tmp_path / "model.onnx", {"val_1": weight, "val_2": weight}))
    with pytest.raises(NameMatchError, match=r"are equal, and the graph does not say which"):
        find_weights(graph, _tensors(**dict.fromkeys(NAMES[:2], weight)))


def test_equal_slices_of_one_packed_weight_are_refused(tmp_path: Path) -> None:
    weight = _random(4, 6)
    packed = {"model.layers.0.mlp.up_gate.weight": np.concatenate([weight, weight])}
    graph = open_graph(make_graph(tmp_path / "model.onnx", packed))
    with pytest.raises(NameMatchError, match="are equal"):
        find_weights(graph, _tensors(**dict.fromkeys(NAMES[:2], weight)))


def test_a_weight_that_equals_its_transposed_is_refused(tmp_path: Path) -> None:
    graph = open_graph(make_graph(tmp_path / "model.onnx", {"w": np.eye(6, dtype="f4")}))
    with pytest.raises(NameMatchError, match="or transposed"):
        find_weights(graph, _tensors(w=np.eye(6, dtype="f4")))
