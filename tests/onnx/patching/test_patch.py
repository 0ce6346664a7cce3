"""Patching graphs written by hand: every storage, dtype and layout, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from boneconv.errors import CheckFailedError, NameMatchError, NonFiniteError
from boneconv.graphs import open_graph
from boneconv.io.checkpoint import open_checkpoint
from boneconv.io.files import Writer
from boneconv.onnx import export_onnx
from boneconv.onnx.patching import patch
from boneconv.onnx.patching.check import check_patched
from boneconv.onnx.patching.jobs import plan_jobs
from boneconv.planning import plan_merge
from tests.builders import EMBEDDING, HIDDEN, UP, VOCABULARY, Q, grid, module, snapshot
from tests.graphs.onnx_files import DATA, identity, make_graph, tensor
from tests.onnx.patching.cases import (
    Case,
    check_here,
    expected,
    float_tensors,
    graph_weights,
    make_case,
    same_weights,
)

__all__ = ["check_here"]

pytestmark = pytest.mark.usefixtures("check_here")


def _export(case: Case, tmp_path: Path, **options: Any) -> Path:
    return export_onnx(case.base, case.adapter, tmp_path / "out", graph=case.graph, **options).graph


@pytest.mark.parametrize("variant", ["bone", "bat", "mini"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_merged_weights_are_rounded_once_into_the_graphs_dtype(
    tmp_path: Path, variant: str, dtype: Any
) -> None:
    case = make_case(tmp_path, variant, dtype=dtype)
    assert same_weights(_export(case, tmp_path), expected(dtype, variant))


@pytest.mark.parametrize("storage", ["raw", "typed", "external"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_storage(tmp_path: Path, storage: Any, dtype: Any) -> None:
    case = make_case(tmp_path, dtype=dtype, storage=storage)
    assert same_weights(_export(case, tmp_path), expected(dtype))


def test_the_graph_stays_as_it_is_where_its_weights_lie_beside_it(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    out = _export(case, tmp_path)
    assert out.read_bytes() == case.graph.read_bytes()
    before, after = (path.with_name(DATA).read_bytes() for path in (case.graph, out))
    assert len(before) == len(after)
    assert before != after


def test_inline_weights_change_in_their_place(tmp_path: Path) -> None:
    case = make_case(tmp_path, storage="raw")
    before, after = case.graph.read_bytes(), _export(case, tmp_path).read_bytes()
    assert len(before) == len(after)
    graph = open_graph(case.graph)
    touched = bytearray(before)
    for name, each in graph.initializers.items():
        if "proj" in name:
            touched[each.offset : each.offset + each.nbytes] = after[
                each.offset : each.offset + each.nbytes
            ]
    assert touched == after


def test_packed_weights(tmp_path: Path) -> None:
    weights = graph_weights(float_tensors(), np.float32)
    names = [f"{module(layer, UP)}.weight" for layer in (0, 1)]
    q = f"{module(0, Q)}.weight"
    wide = np.concatenate([weights.pop(q).T, weights.pop(names[0]).T], axis=1)
    file = make_case(tmp_path, weights=weights | {"packed": wide})
    wanted = expected(np.float32)
    wanted["packed"] = np.concatenate([wanted.pop(q).T, wanted.pop(names[0]).T], axis=1)
    assert same_weights(_export(file, tmp_path), wanted)


def test_a_constant_is_a_weight(tmp_path: Path) -> None:
    weights = graph_weights(float_tensors(), np.float32)
    name = f"{module(1, UP)}.weight"
    constant = helper.make_node("Constant", [], [name], value=tensor("", weights.pop(name)))
    case = make_case(tmp_path)
    nodes = [constant, *(identity(each) for each in (*weights, name))]
    make_graph(case.graph, weights, "raw", nodes=nodes)
    out = onnx.load(_export(case, tmp_path))
    found = numpy_helper.to_array(out.graph.node[0].attribute[0].t)
    assert np.array_equal(found, expected(np.float32)[name])


def test_saved_modules_replace_weights_and_biases(tmp_path: Path) -> None:
    norm, embedding = grid((HIDDEN,), seed=31), grid((VOCABULARY, HIDDEN), seed=32)
    saved = {"model.layers.0.norm.weight": norm, EMBEDDING: embedding}
    case = make_case(tmp_path, saved=saved, modules_to_save=["norm", "embed_tokens"])
    assert same_weights(_export(case, tmp_path), expected(np.float32) | saved)


def test_an_initializer_that_shares_its_bytes_with_another_is_refused(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    model = onnx.load(case.graph, load_external_data=False)
    q = next(each for each in model.graph.initializer if Q in each.name)
    twin = model.graph.initializer.add()
    twin.CopyFrom(q)
    twin.name = "twin"
    model.graph.node.append(identity("unread"))
    model.graph.node[-1].input[0] = EMBEDDING
    case.graph.write_bytes(model.SerializeToString())
    with pytest.raises(NameMatchError, match="share their bytes"):
        _export(case, tmp_path)


def test_a_value_beyond_the_graphs_range_is_refused(tmp_path: Path) -> None:
    blocks = {module(0, Q): np.full((4, HIDDEN), 1e6, np.float32)}
    case = make_case(tmp_path, dtype=np.float16, blocks=blocks, target_modules=["q_proj"])
    with pytest.raises(NonFiniteError, match=r"layers\.0\.self_attn\.q_proj\.weight"):
        _export(case, tmp_path)
    assert not list(tmp_path.glob("out*"))


# --- a graph that is not the base's -----------------------------------------------------------


def test_a_graph_of_another_base(tmp_path: Path) -> None:
    weights = graph_weights(float_tensors(seed=50), np.float32)
    case = make_case(tmp_path, weights=weights)
    with pytest.raises(NameMatchError, match="not of this base: none of 6 tensors") as caught:
        _export(case, tmp_path)
    assert "'model.layers.0.self_attn.q_proj.weight' to begin with" in caught.value.message
    assert caught.value.found == "other values in model.layers.0.self_attn.q_proj.weight"


def test_a_graph_of_half_this_base(tmp_path: Path) -> None:
    mine = graph_weights(float_tensors(), np.float32)
    other = graph_weights(float_tensors(seed=50), np.float32)
    half = {name: (other if "layers.1" in name else mine)[name] for name in mine}
    case = make_case(tmp_path, weights=half)
    with pytest.raises(NameMatchError, match="of this base in part") as caught:
        _export(case, tmp_path)
    assert "'model.layers.1.self_attn.q_proj.weight' is not in it" in caught.value.message
    assert "3 of 6" in caught.value.message


def test_a_graph_that_differs_where_no_adapter_reaches(tmp_path: Path) -> None:
    weights = graph_weights(float_tensors(), np.float32)
    weights[EMBEDDING] = weights[EMBEDDING] + 1
    case = make_case(tmp_path, weights=weights)
    with pytest.raises(NameMatchError, match=r"'model\.embed_tokens\.weight' has other values"):
        _export(case, tmp_path)


def test_a_graph_without_a_matrix_that_no_adapter_touches(tmp_path: Path) -> None:
    weights = graph_weights(float_tensors(), np.float32)
    del weights[EMBEDDING]
    case = make_case(tmp_path, weights=weights)
    wanted = expected(np.float32)
    del wanted[EMBEDDING]
    assert same_weights(_export(case, tmp_path), wanted)


def test_a_graph_that_is_merged_already(tmp_path: Path) -> None:
    case = make_case(tmp_path, "bat")
    again = Case(case.base, case.adapter, _export(case, tmp_path))
    with pytest.raises(NameMatchError, match=r"merged already: 'model\.layers\.0") as caught:
        export_onnx(again.base, again.adapter, tmp_path / "twice", graph=again.graph)
    assert "before any adapter was merged" in str(caught.value)


# --- reading back -----------------------------------------------------------------------------


def _patched(case: Case, tmp_path: Path) -> tuple[Any, Any]:
    graph = open_graph(case.graph)
    jobs = plan_jobs(graph, open_checkpoint(case.base), plan_merge(case.base, case.adapter))
    (tmp_path / "new").mkdir()
    return graph, patch.patch_graph(graph, jobs, tmp_path / "new" / "model.onnx")


@pytest.mark.parametrize("storage", ["raw", "external"])
@pytest.mark.parametrize("where", ["written", "other"])
def test_one_changed_byte_is_noticed(tmp_path: Path, storage: Any, where: str) -> None:
    case = make_case(tmp_path, storage=storage)
    graph, patched = _patched(case, tmp_path)
    check_patched(graph, patched)
    name = EMBEDDING if where == "other" else f"{module(1, UP)}.weight"
    held = open_graph(patched.graph).initializers[name]
    with Writer(held.path) as writer:
        writer.write_at(b"\x01", held.offset + 8)
    message = "a part of the graph changed" if where == "other" else "was not written as"
    with pytest.raises(CheckFailedError, match=message):
        check_patched(graph, patched)


def test_the_input_is_not_written_to(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    before = snapshot(tmp_path)
    _export(case, tmp_path)
    after = snapshot(tmp_path)
    assert {name: after[name] for name in before} == before
