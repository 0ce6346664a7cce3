"""Graphs with adapter inputs answer as the merged weight would, and as the base without."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from boneconv.errors import FormatError, NameMatchError, UsageError
from boneconv.onnx.runtime.graph import Slot, add_adapter_inputs
from boneconv.onnx.runtime.products import Place
from tests.builders import F32, Array
from tests.onnx.runtime.cases import (
    LAYOUTS,
    Linear,
    answer,
    bat_update,
    bone_update,
    linear,
    make_model,
    session,
)

NEAR = {"rtol": 1e-4, "atol": 1e-5}


def block(*shape: int, seed: int = 1) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(F32)


def adapted(case: Linear, *, bone: bool = True, bat_rank: int | None = None) -> onnx.ModelProto:
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    add_adapter_inputs(model, {"m.up": Slot((case.place,), bone, bat_rank)})
    return model


# --- Bone -------------------------------------------------------------------------------------


@given(
    layout=st.sampled_from(sorted(LAYOUTS)),
    out=st.integers(1, 9),
    width=st.integers(1, 13),
    rank=st.integers(1, 16),
    lead=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    known_rank=st.booleans(),
)
@settings(max_examples=60)
def test_a_block_of_any_rank_does_what_merging_it_does(
    layout: str, out: int, width: int, rank: int, lead: list[int], known_rank: bool
) -> None:
    case = linear(layout, out=out, width=width, lead=tuple(lead), known_rank=known_rank)
    b = block(rank, out)
    # Gemm multiplies by alpha whatever it is given, so its update is halved as its weight is.
    alpha = 0.5 if layout == "gemm-scaled" else 1.0
    found = answer(adapted(case), x=case.x, **{"m.up.bone_block": b})
    np.testing.assert_allclose(found, case.expected(alpha * bone_update(b, out, width)), **NEAR)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("known_rank", [True, False])
def test_without_an_adapter_the_base_answers_to_the_bit(layout: str, known_rank: bool) -> None:
    case = linear(layout, out=16, width=24, known_rank=known_rank)
    np.testing.assert_array_equal(answer(adapted(case), x=case.x), answer(case.model, x=case.x))


@pytest.mark.parametrize("opset", range(13, 24))
@pytest.mark.parametrize("known_rank", [True, False])
def test_every_opset_from_13_on(opset: int, known_rank: bool) -> None:
    case = linear(opset=opset, known_rank=known_rank)
    model = adapted(case)
    onnx.checker.check_model(model, full_check=True)
    b = block(4, 6)
    found = answer(model, x=case.x, **{"m.up.bone_block": b})
    np.testing.assert_allclose(found, case.expected(bone_update(b, 6, 10)), **NEAR)


def test_the_inputs_are_named_after_the_module_and_may_be_left_out() -> None:
    found = session(adapted(linear(), bat_rank=2))
    assert [given.name for given in found.get_inputs()] == ["x"]
    assert {
        given.name: (given.shape, given.type) for given in found.get_overridable_initializers()
    } == {
        "m.up.bone_block": ([None, 6], "tensor(float)"),
        "m.up.bat_block": ([None, 2, 2], "tensor(float)"),
    }


def test_the_weights_and_the_output_keep_their_names() -> None:
    case = linear("matmul-bias")
    model = adapted(case)
    before = {t.name: t.SerializeToString() for t in case.model.graph.initializer}
    after = {t.name: t.SerializeToString() for t in model.graph.initializer}
    assert before.items() <= after.items()
    assert model.graph.output == case.model.graph.output
    assert model.graph.input[0] == case.model.graph.input[0]


def test_a_bias_is_added_before_the_branch_so_that_runtimes_fuse_it() -> None:
    model = adapted(linear("matmul-bias"))
    assert [node.op_type for node in model.graph.node[:2]] == ["MatMul", "Add"]
    assert "b" in model.graph.node[1].input


def test_half_precision_takes_half_precision_blocks() -> None:
    w = block(10, 6).astype(np.float16)
    model = make_model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        {"w": w},
        (2, 10),
        (2, 6),
        dtype=TensorProto.FLOAT16,
    )
    add_adapter_inputs(model, {"m": Slot((Place("w", True, 0, 6, 10),))})
    x, b = block(2, 10, seed=2).astype(np.float16), block(4, 6).astype(np.float16)
    found = answer(model, x=x, **{"m.bone_block": b})
    assert found.dtype == np.float16
    wide = w.astype(np.float64).T + bone_update(b, 6, 10)
    np.testing.assert_allclose(found, x.astype(np.float64) @ wide.T, rtol=0.01, atol=0.02)


def test_the_block_has_the_dtype_that_the_weight_is_cast_to() -> None:
    nodes = [
        helper.make_node("Cast", ["w"], ["c"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "c"], ["y"]),
    ]
    model = make_model(nodes, {"w": block(10, 6).astype(np.float16)}, (2, 10), (2, 6))
    add_adapter_inputs(model, {"m": Slot((Place("w", True, 0, 6, 10),))})
    (found,) = session(model).get_overridable_initializers()
    assert found.type == "tensor(float)"


# --- several modules, several products ---------------------------------------------------------


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("known_rank", [True, False])
@pytest.mark.parametrize("chosen", ["q", "k", "v", "qk", "kv", "qv", "qkv"])
def test_modules_packed_in_one_weight_each_take_their_own_block(
    chosen: str, transposed: bool, known_rank: bool
) -> None:
    parts = {"q": (0, 6), "k": (6, 2), "v": (8, 2)}
    w, x = block(10, 10, seed=3), block(2, 3, 10, seed=4)
    nodes = [helper.make_node("MatMul", ["x", "w" if transposed else "t"], ["y"])]
    if not transposed:
        nodes.insert(0, helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]))
    held = {"w": w.T if transposed else w}
    model = make_model(nodes, held, x.shape, (2, 3, 10), known_rank=known_rank)
    slots = {
        name: Slot((Place("w", transposed, first, out, 10),))
        for name, (first, out) in parts.items()
        if name in chosen
    }
    add_adapter_inputs(model, slots)
    blocks = {name: block(3 + i, parts[name][1]) for i, name in enumerate(chosen)}
    merged = w.astype(np.float64)
    for name, b in blocks.items():
        first, out = parts[name]
        merged[first : first + out] += bone_update(b, out, 10)
    found = answer(model, x=x, **{f"{name}.bone_block": b for name, b in blocks.items()})
    np.testing.assert_allclose(found, x.astype(np.float64) @ merged.T, **NEAR)


def test_a_weight_that_is_used_twice_is_adapted_twice() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("MatMul", ["h", "w"], ["y"]),
    ]
    w, x, b = block(6, 6), block(2, 6, seed=2), block(4, 6, seed=3)
    model = make_model(nodes, {"w": w}, x.shape, (2, 6))
    add_adapter_inputs(model, {"m": Slot((Place("w", True, 0, 6, 6),))})
    merged = (w.T + bone_update(b, 6, 6)).T
    np.testing.assert_allclose(
        answer(model, x=x, **{"m.bone_block": b}), x.astype(np.float64) @ merged @ merged, **NEAR
    )


def test_an_embedding_that_a_head_shares_is_looked_up_unchanged() -> None:
    nodes = [
        helper.make_node("Gather", ["w", "ids"], ["e"]),
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["e", "t"], ["y"]),
    ]
    w, b = block(8, 6), block(4, 8, seed=3)
    ids = np.array([[1, 5, 2]])
    model = make_model(nodes, {"w": w}, (1, 3, 6), (1, 3, 8))
    model.graph.input[0].CopyFrom(
        helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", "s"])
    )
    add_adapter_inputs(model, {"lm_head": Slot((Place("w", False, 0, 8, 6),))})
    found = answer(model, ids=ids, **{"lm_head.bone_block": b})
    expected = w[ids].astype(np.float64) @ (w + bone_update(b, 8, 6)).T
    np.testing.assert_allclose(found, expected, **NEAR)


def test_products_inside_an_if_are_adapted_in_both_branches() -> None:
    w, x, b = block(10, 6), block(2, 10, seed=2), block(4, 6, seed=3)

    def branch(name: str, factor: float) -> onnx.GraphProto:
        nodes = [
            helper.make_node("MatMul", ["x", "w"], [f"{name}_m"]),
            helper.make_node("Mul", [f"{name}_m", f"{name}_f"], [f"{name}_y"]),
        ]
        out = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, ["n", 6])
        held = numpy_helper.from_array(np.asarray(factor, F32), f"{name}_f")
        return helper.make_graph(nodes, name, [], [out], [held])

    node = helper.make_node(
        "If", ["c"], ["y"], then_branch=branch("t", 1.0), else_branch=branch("e", -1.0)
    )
    model = make_model([node], {"w": w}, x.shape, (2, 6))
    model.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    add_adapter_inputs(model, {"m": Slot((Place("w", True, 0, 6, 10),))})
    expected = x.astype(np.float64) @ (w.T + bone_update(b, 6, 10)).T
    for which, sign in ((True, 1), (False, -1)):
        found = answer(model, x=x, c=np.asarray(which), **{"m.bone_block": b})
        np.testing.assert_allclose(found, sign * expected, **NEAR)


# --- BAT --------------------------------------------------------------------------------------


@given(
    layout=st.sampled_from(sorted(LAYOUTS)),
    rank=st.integers(1, 4),
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    lead=st.lists(st.integers(1, 3), min_size=1, max_size=3),
)
@settings(max_examples=40)
def test_bats_activation_form_does_what_merging_does(
    layout: str, rank: int, rows: int, columns: int, lead: list[int]
) -> None:
    case = linear(layout, out=rank * rows, width=rank * columns, lead=tuple(lead))
    held = case.weight * (2 if layout == "gemm-scaled" else 1)
    alpha = 0.5 if layout == "gemm-scaled" else 1.0
    b = block(rows, rank, rank)
    model = adapted(case, bone=False, bat_rank=rank)
    found = answer(model, x=case.x, **{"m.up.bat_block": b})
    np.testing.assert_allclose(
        found, case.expected(alpha * bat_update(b, held)), rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(answer(model, x=case.x), case.expected(), **NEAR)


def test_bat_and_bone_may_share_a_module() -> None:
    case = linear("gemm", out=8, width=12)
    model = adapted(case, bone=True, bat_rank=4)
    bone, bat = block(5, 8), block(2, 4, 4)
    for feeds, update in (
        ({}, 0.0),
        ({"m.up.bone_block": bone}, bone_update(bone, 8, 12)),
        ({"m.up.bat_block": bat}, bat_update(bat, case.weight)),
    ):
        found = answer(model, x=case.x, **feeds)
        np.testing.assert_allclose(found, case.expected(update), **NEAR)


@pytest.mark.parametrize("chosen", ["q", "v", "qv", "qkv"])
def test_bat_in_a_packed_weight(chosen: str) -> None:
    parts = {"q": (0, 8), "k": (8, 4), "v": (12, 4)}
    w, x = block(16, 12, seed=3), block(2, 3, 12, seed=4)
    model = make_model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": w.T}, x.shape, (2, 3, 16)
    )
    slots = {n: Slot((Place("w", True, *parts[n], 12),), False, 4) for n in chosen}
    add_adapter_inputs(model, slots)
    blocks = {n: block(parts[n][1] // 4, 4, 4) for n in chosen}
    merged = w.astype(np.float64)
    for name, b in blocks.items():
        rows = slice(parts[name][0], sum(parts[name]))
        merged[rows] += bat_update(b, w[rows])
    found = answer(model, x=x, **{f"{n}.bat_block": b for n, b in blocks.items()})
    np.testing.assert_allclose(found, x.astype(np.float64) @ merged.T, **NEAR)


# --- refused ----------------------------------------------------------------------------------


def refused(nodes: list[onnx.NodeProto], held: dict[str, Array], place: Place) -> str:
    model = make_model(nodes, held, (2, 6), (2, 6))
    with pytest.raises(FormatError) as caught:
        add_adapter_inputs(model, {"m": Slot((place,))})
    assert "leave out --runtime-adapters" in str(caught.value)
    return str(caught.value)


def test_a_weight_on_the_wrong_side_or_way_round_is_refused() -> None:
    w = {"w": block(6, 6)}
    left = [helper.make_node("MatMul", ["w", "x"], ["y"])]
    assert "MatMul" in refused(left, w, Place("w", True, 0, 6, 6))
    turned = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    assert "MatMul" in refused(turned, w, Place("w", False, 0, 6, 6))
    both = [helper.make_node("Gemm", ["x", "w"], ["y"], transA=1)]
    assert "Gemm" in refused(both, w, Place("w", True, 0, 6, 6))


def test_a_weight_of_another_operator_is_refused() -> None:
    attention = [
        helper.make_node("Attention", ["x", "w", "b"], ["y"], domain="com.microsoft", num_heads=2)
    ]
    text = refused(attention, {"w": block(6, 6), "b": block(6)}, Place("w", True, 0, 6, 6))
    assert "com.microsoft.Attention" in text


def test_a_weight_that_is_only_looked_up_is_refused() -> None:
    nodes = [
        helper.make_node("Gather", ["w", "i"], ["g"]),
        helper.make_node("Add", ["x", "g"], ["y"]),
    ]
    held = {"w": block(6, 6), "i": np.array([0, 1])}
    assert "the weights of m;" in refused(nodes, held, Place("w", False, 0, 6, 6))


def test_an_old_graph_is_refused() -> None:
    with pytest.raises(FormatError, match="opset 12"):
        adapted(linear(opset=12))
    old = linear()
    old.model.ir_version = 3
    with pytest.raises(FormatError, match="IR version 3"):
        adapted(old)


def test_a_graph_that_has_adapter_inputs_is_refused() -> None:
    case = linear()
    model = adapted(case)
    with pytest.raises(UsageError, match="already"):
        add_adapter_inputs(model, {"other": Slot((case.place,))})


def test_a_name_that_the_graph_uses_otherwise_is_refused() -> None:
    case = linear()
    case.model.graph.node[0].name = "m.up.bone_block"
    with pytest.raises(NameMatchError, match="already"):
        adapted(case)


def test_new_names_avoid_those_of_the_graph() -> None:
    case = linear("matmul-bias")
    case.model.graph.node[0].name = "m.up/bone/Shape"
    model = adapted(case)
    names = Counter(node.name for node in model.graph.node if node.name)
    assert max(names.values()) == 1
    onnx.checker.check_model(model, full_check=True)
