"""ONNX graphs: every weight found or accounted for, every way to spoil one caught and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from boneconv.errors import FormatError
from boneconv.verification import verify
from boneconv.verification.report import CandidateKind, Severity
from tests.builders import BF16, F16, F32, F64, Array
from tests.verification import models
from tests.verification.graphs import write_graph
from tests.verification.models import Case, make_case, to, weight_name

Q0, Q1, Q2 = (weight_name(layer, models.Q) for layer in range(3))
UP1 = weight_name(1, models.UP)


def in_dtype(case: Case, dtype: np.dtype) -> dict[str, Array]:
    """The merge in a graph's dtype: exact values rounded once."""
    tensors = {n: t.astype(dtype) if t.dtype != np.int64 else t for n, t in case.weights.items()}
    for module, block in case.blocks.items():
        name = f"{module}.weight"
        tensors[name] = to(models.merged(case.weights[name], block, case.variant), dtype)
    return tensors


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("external", [False, True])
def test_a_graph_of_the_merged_model_passes(
    dtype: np.dtype, external: bool, tmp_path: Path
) -> None:
    case = make_case(tmp_path)
    graph = write_graph(tmp_path / "g" / "model.onnx", in_dtype(case, dtype), external=external)
    report = verify(case.base, case.adapter, graph.parent, workers=1)
    assert report.passed, report.failures
    assert report.kind is CandidateKind.ONNX
    assert report.totals.adapted == len(case.blocks)
    assert all(tensor.identical for tensor in report.tensors)
    notes = {finding.code: finding for finding in report.findings}
    assert "scale" in notes["unknown-initializers"].message
    places = {tensor.name: tensor.place for tensor in report.tensors}
    assert places[Q0] == Q0
    assert (places[Q1] or "").endswith("(transposed)")
    assert (places[Q2] or "").startswith("packed.weight[")


def test_a_graph_merged_in_float32_passes(tmp_path: Path) -> None:
    """No weight is the canonical one, bit by bit, and each still finds its place."""
    case = make_case(tmp_path)
    tensors = in_dtype(case, F32)
    for module, block in case.blocks.items():
        weight = case.weights[f"{module}.weight"].astype(F32)
        tensors[f"{module}.weight"] = weight + models.delta(weight, block, case.variant)
    graph = write_graph(tmp_path / "model.onnx", tensors)
    report = verify(case.base, case.adapter, graph, workers=1)
    assert report.passed, report.failures
    assert report.totals.identical < report.totals.tensors


def old(name: str) -> Callable[[dict[str, Array], Case], None]:
    return lambda t, case: t.update({name: case.weights[name].astype(F32)})


def one_ulp(name: str) -> Callable[[dict[str, Array], Case], None]:
    def change(tensors: dict[str, Array], case: Case) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name].view(np.uint32).reshape(-1)[40] += 1 << 12

    return change


def other_axis(tensors: dict[str, Array], case: Case) -> None:
    for layer in range(models.LAYERS):
        name = weight_name(layer, models.Q)
        weight = case.weights[name].astype(F64)
        block = case.blocks[name.removesuffix(".weight")].astype(F64)
        tensors[name] = (weight + models.bat_delta(weight, block, "in")).astype(F32)


def twice(tensors: dict[str, Array], case: Case) -> None:
    for module, block in case.blocks.items():
        once = models.merged(case.weights[f"{module}.weight"], block, case.variant)
        tensors[f"{module}.weight"] = models.merged(once, block, case.variant).astype(F32)


def all_old(tensors: dict[str, Array], case: Case) -> None:
    for module in case.blocks:
        old(f"{module}.weight")(tensors, case)


def through_bf16(tensors: dict[str, Array], case: Case) -> None:
    for name, tensor in case.merged().items():
        tensors[name] = tensor.astype(F32) if tensor.dtype == BF16 else tensor


def transposed(tensors: dict[str, Array], case: Case) -> None:
    tensors[Q0] = np.ascontiguousarray(tensors[Q0].T)


def zeroed(tensors: dict[str, Array], case: Case) -> None:
    tensors[Q1] = np.zeros_like(tensors[Q1])


def untouched(tensors: dict[str, Array], case: Case) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.float32(1.01)


def missing(tensors: dict[str, Array], case: Case) -> None:
    del tensors[UP1]


TABLE: dict[str, tuple[Callable[[dict[str, Array], Case], None], str | None, tuple[str, ...]]] = {
    "one weight not merged": (old(Q0), "not-applied", (Q0,)),
    "one transposed weight not merged": (old(Q1), "not-applied", (Q1,)),
    "one packed weight not merged": (old(Q2), "not-applied", (Q2,)),
    "nothing merged": (all_old, "not-applied", ()),
    "one element off": (one_ulp(Q0), "elements-differ", (Q0,)),
    "one element of a transposed weight off": (one_ulp(Q1), "elements-differ", (Q1,)),
    "one element of a packed weight off": (one_ulp(Q2), "elements-differ", (Q2,)),
    "over the wrong axis": (other_axis, "wrong-axis", (Q0, Q1, Q2)),
    "applied twice": (twice, "applied-twice", ()),
    "merged in bfloat16 first": (through_bf16, "double-rounding", ()),
    "a weight of zeros": (zeroed, "zeroed", (Q1,)),
    "an untouched weight changed": (untouched, None, ("model.norm.weight",)),
    "a weight missing": (missing, "tensor-missing", (UP1,)),
}


@pytest.mark.parametrize("name", TABLE)
def test_a_spoiled_graph_is_caught_and_named(name: str, tmp_path: Path) -> None:
    change, code, failing = TABLE[name]
    case = make_case(tmp_path)
    tensors = in_dtype(case, F32)
    change(tensors, case)
    graph = write_graph(tmp_path / "model.onnx", tensors)
    report = verify(case.base, case.adapter, graph, workers=1)
    assert not report.passed
    errors = {f.code: f for f in report.findings if f.severity is Severity.ERROR}
    assert set(errors) == ({code} if code else set())
    expected = set(failing) or {f"{module}.weight" for module in case.blocks}
    assert {tensor.name for tensor in report.failures} == expected


def test_a_graph_that_takes_adapters_when_it_runs_is_refused(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    graph = write_graph(tmp_path / "g" / "model.onnx", in_dtype(case, F32))
    record = {"export": "runtime-adapters"}
    (graph.parent / "boneconv.json").write_text(json.dumps(record))
    with pytest.raises(FormatError, match="when it runs"):
        verify(case.base, case.adapter, graph.parent)


def test_a_record_that_promises_canonical_weights_is_held_to_it(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    tensors = in_dtype(case, F32)
    tensors[Q0].view(np.uint32)[0, 0] ^= 1
    graph = write_graph(tmp_path / "g" / "model.onnx", tensors)
    assert verify(case.base, case.adapter, graph.parent, workers=1).passed
    (graph.parent / "boneconv.json").write_text(json.dumps({"numerics": "canonical"}))
    report = verify(case.base, case.adapter, graph.parent, workers=1)
    assert [tensor.name for tensor in report.failures] == [Q0]
