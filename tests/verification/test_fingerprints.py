"""Native adapters that name their base: another one fails, however well the weights agree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import boneconv
from boneconv.planning import fingerprints
from boneconv.verification import verify
from boneconv.verification.report import Report, Severity
from tests.builders import F32, make_base
from tests.verification import models
from tests.verification.graphs import write_graph
from tests.verification.models import Case, make_case, weight_name

Q1 = weight_name(1, models.Q)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    """A base and a native adapter with its fingerprint."""
    made = make_case(tmp_path, dtype=F32)
    boneconv.convert(made.adapter, tmp_path / "native", to="native", base=made.base)
    made.adapter = tmp_path / "native"
    return made


def move_to_another_base(case: Case) -> None:
    case.weights[Q1] = case.weights[Q1] + np.float32(1)
    case.base = make_base(case.root / "another", case.weights, shards=2)


def told(report: Report) -> list[tuple[Severity, str]]:
    return [(finding.severity, finding.message) for finding in report.findings]


MISMATCH = "1 of 9 weights are not those of the base that the adapter was made for"


def test_its_own_base(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are hashed as they are compared, and not read once more."""
    monkeypatch.delattr(fingerprints, "stored_digest")
    report = verify(case.base, case.adapter, case.write(case.merged()), workers=2)
    assert report.passed
    assert report.findings == ()


def test_another_base(case: Case) -> None:
    move_to_another_base(case)
    candidate = case.write(case.merged())
    report = verify(case.base, case.adapter, candidate, workers=2)
    assert not report.passed
    assert report.failures == []
    assert told(report) == [(Severity.ERROR, f"{MISMATCH}: {Q1}")]
    allowed = verify(case.base, case.adapter, candidate, allow_base_mismatch=True, workers=1)
    assert allowed.passed
    assert told(allowed) == [(Severity.WARNING, f"{MISMATCH}: {Q1}")]


def test_a_merge_that_was_told_to_go_on(case: Case, tmp_path: Path) -> None:
    move_to_another_base(case)
    boneconv.merge(case.base, case.adapter, tmp_path / "out", allow_base_mismatch=True)
    report = verify(case.base, case.adapter, tmp_path / "out", workers=1)
    assert report.passed
    assert told(report) == [(Severity.WARNING, f"{MISMATCH}: {Q1}")]


def test_a_weight_that_is_missing_is_read_for_it(case: Case) -> None:
    move_to_another_base(case)
    tensors = {name: tensor for name, tensor in case.merged().items() if name != Q1}
    report = verify(case.base, case.adapter, case.write(tensors), workers=1)
    assert "base-mismatch" in {finding.code for finding in report.findings}


def test_a_graph(case: Case, tmp_path: Path) -> None:
    good = write_graph(tmp_path / "good.onnx", case.merged())
    assert verify(case.base, case.adapter, good, workers=1).passed
    move_to_another_base(case)
    graph = write_graph(tmp_path / "model.onnx", case.merged())
    report = verify(case.base, case.adapter, graph, workers=1)
    assert report.failures == []
    assert not report.passed
    assert (Severity.ERROR, f"{MISMATCH}: {Q1}") in told(report)


def test_a_lora(case: Case, tmp_path: Path) -> None:
    options = {"rank": 16, "max_error": 1.0}
    boneconv.convert(case.adapter, tmp_path / "lora", to="peft-lora", base=case.base, **options)
    assert verify(case.base, case.adapter, tmp_path / "lora").passed
    move_to_another_base(case)
    report = verify(case.base, case.adapter, tmp_path / "lora")
    assert (Severity.ERROR, f"{MISMATCH}: {Q1}") in told(report)
