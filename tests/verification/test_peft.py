"""Checkpoints that PEFT itself has merged and transformers saved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from boneconv.verification import Report, verify

if TYPE_CHECKING:
    from tests.conftest import TinyCase
    from tests.oracle import tiny


def merged_by_peft(case: tiny.Case, dtype: str, out: Path, *, upcast: bool = True) -> Path:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(case.base, dtype=getattr(torch, dtype))
    adapted = PeftModel.from_pretrained(model, case.adapter, autocast_adapter_dtype=upcast)
    adapted.merge_and_unload().save_pretrained(out)
    return out


def codes(report: Report) -> set[str]:
    return {finding.code for finding in report.findings if finding.severity == "error"}


@pytest.mark.parametrize("variant", ["bone", "bat"])
def test_a_merge_in_float32_passes(variant: str, tiny_case: TinyCase, tmp_path: Path) -> None:
    case = tiny_case("qwen2", variant=variant)  # type: ignore[arg-type]
    candidate = merged_by_peft(case, "float32", tmp_path / "out")
    report = verify(case.base, case.adapter, candidate, workers=1)
    assert report.passed, (report.findings, [f for f in report.files if f.status != "pass"])
    assert report.numerics is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("upcast", [True, False])
def test_bat_in_half_precision_is_named(
    dtype: str, upcast: bool, tiny_case: TinyCase, tmp_path: Path
) -> None:
    case = tiny_case("qwen2", variant="bat", base_dtype=dtype, adapter_dtype=dtype)
    candidate = merged_by_peft(case, dtype, tmp_path / "out", upcast=upcast)
    report = verify(case.base, case.adapter, candidate, workers=1)
    assert not report.passed
    assert codes(report) == {"double-rounding"}
    assert all("PEFT" in (tensor.diagnosis or "") for tensor in report.failures)
    assert verify(case.base, case.adapter, candidate, tolerance="peft", workers=1).passed


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_bone_in_half_precision_is_rounded_once(
    dtype: str, tiny_case: TinyCase, tmp_path: Path
) -> None:
    case = tiny_case("qwen2", variant="bone", base_dtype=dtype, adapter_dtype=dtype)
    candidate = merged_by_peft(case, dtype, tmp_path / "out", upcast=False)
    assert verify(case.base, case.adapter, candidate, workers=1).passed
