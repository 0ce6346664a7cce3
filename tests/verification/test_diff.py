"""`diff`: two checkpoints or two adapters, tensor by tensor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import boneconv
from boneconv.errors import UsageError
from boneconv.verification import diff
from boneconv.verification.report import CandidateKind, Presence
from tests.builders import BF16, F16, F32, F64, make_adapter, make_base
from tests.verification import models
from tests.verification.models import make_case, weight_name


def test_a_checkpoint_is_identical_to_itself_in_other_shards(tmp_path: Path) -> None:
    one = make_base(tmp_path / "a", models.base_tensors())
    other = make_base(tmp_path / "b", models.base_tensors(), shards=3)
    report = diff(one, other, workers=1)
    assert report.identical
    assert report.kind is CandidateKind.CHECKPOINT
    assert {t.cosine for t in report.tensors if t.dtype_a == "BF16"} == {1.0}


def test_a_merge_differs_from_its_base_where_the_adapter_says(tmp_path: Path) -> None:
    case = make_case(tmp_path, "bat", F32)
    report = diff(case.base, case.write(case.merged()), workers=1)
    changed = {tensor.name: tensor for tensor in report.tensors if not tensor.identical}
    assert set(changed) == {f"{module}.weight" for module in case.blocks}
    name = weight_name(1, models.UP)
    a, b = case.weights[name].astype(F64), case.merged()[name].astype(F64)
    found = changed[name]
    assert found.max_abs == np.abs(b - a).max()
    assert found.relative_frobenius == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a))
    assert found.cosine == pytest.approx((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
    assert found.differing == np.count_nonzero(a != b)
    assert (found.layer, found.kind) == (1, "up_proj")


def test_one_ulp_is_one_ulp_of_the_coarser_dtype(tmp_path: Path) -> None:
    values = np.array([1.0, 2.0, -3.0], F32)
    moved = np.array([1.0, 2.0 + 2**-6, -3.0], F32).astype(BF16)
    one = make_base(tmp_path / "a", {"x": values})
    other = make_base(tmp_path / "b", {"x": moved})
    (found,) = diff(one, other, workers=1).tensors
    assert (found.dtype_a, found.dtype_b, found.identical) == ("F32", "BF16", False)
    assert (found.max_ulp, found.differing, found.max_abs) == (1.0, 1, 2**-6)


def test_tensors_of_one_side_and_of_other_shapes(tmp_path: Path) -> None:
    one = make_base(tmp_path / "a", {"x": np.ones(3, F32), "y": np.ones((2, 2), F32)})
    other = make_base(tmp_path / "b", {"y": np.ones((1, 4), F32), "z": np.ones(1, F16)})
    report = diff(one, other, workers=1)
    found = {tensor.name: tensor for tensor in report.tensors}
    assert [found[name].presence for name in "xyz"] == [
        Presence.ONLY_A,
        Presence.BOTH,
        Presence.ONLY_B,
    ]
    assert not report.identical
    assert (found["y"].shape_a, found["y"].shape_b, found["y"].differing) == ((2, 2), (1, 4), None)


def test_values_that_are_no_numbers(tmp_path: Path) -> None:
    one = make_base(tmp_path / "a", {"x": np.array([1.0, np.nan, np.inf], F32)})
    other = make_base(tmp_path / "b", {"x": np.array([1.5, np.nan, np.inf], F32)})
    (found,) = diff(one, other, workers=1).tensors
    assert (found.differing, found.max_abs) == (2, 0.5)
    assert diff(one, one, workers=1).identical


def test_adapters_are_compared_whatever_their_formats(tmp_path: Path) -> None:
    case = make_case(tmp_path, "bone")
    boneconv.convert(case.adapter, tmp_path / "native", to="native", base=case.base)
    report = diff(case.adapter, tmp_path / "native", workers=1)
    assert report.kind is CandidateKind.ADAPTER
    assert all(tensor.identical for tensor in report.tensors)
    assert len(report.tensors) == len(case.blocks)


def test_settings_that_differ_are_told(tmp_path: Path) -> None:
    case = make_case(tmp_path, "bone")
    blocks = {name: block[:4] for name, block in case.blocks.items()}
    other = make_adapter(tmp_path / "other", "bone", rank=4, blocks=blocks)
    report = diff(case.adapter, other, workers=1)
    assert ("r", "8", "4") in report.settings
    assert not report.identical


def test_a_checkpoint_and_an_adapter_cannot_be_compared(tmp_path: Path) -> None:
    case = make_case(tmp_path, "bone")
    with pytest.raises(UsageError):
        diff(case.base, case.adapter)
