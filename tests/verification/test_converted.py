"""LoRA and other adapters, held against the adapter that they were converted from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import boneconv
from boneconv.errors import NotABoneAdapterError, UsageError
from boneconv.verification import verify
from boneconv.verification.report import CandidateKind
from tests.builders import F32
from tests.verification import models
from tests.verification.models import Case, edit_json, make_case, rewrite

WEIGHTS = "adapter_model.safetensors"
LORA_Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
Q1 = models.weight_name(1, models.Q)


def lora_of(case: Case, **options: object) -> Path:
    out = case.root / "lora"
    if case.variant == "bat":
        options = {"rank": 16, "max_error": 1.0} | options
    boneconv.convert(case.adapter, out, to="peft-lora", base=case.base, **options)
    return out


@pytest.mark.parametrize("variant", ["bone", "bat", "mini"])
def test_a_lora_passes_with_its_recorded_error(variant: str, tmp_path: Path) -> None:
    case = make_case(tmp_path, variant, F32)
    lora = lora_of(case)
    report = verify(case.base, case.adapter, lora)
    assert report.passed, report.failures
    assert (report.kind, report.tolerance) == (CandidateKind.LORA, "recorded")
    errors = json.loads((lora / "boneconv.json").read_text())["modules"]
    for tensor in report.tensors:
        assert tensor.module is not None
        assert tensor.relative_frobenius == pytest.approx(
            errors[tensor.module]["error"], rel=1e-3, abs=1e-9
        )
        assert tensor.cosine is not None
        assert tensor.cosine > 0.7


def test_a_record_that_promises_too_much_fails(tmp_path: Path) -> None:
    case = make_case(tmp_path, "bat", F32)
    lora = lora_of(case)
    record = json.loads((lora / "boneconv.json").read_text())
    record["modules"]["model.layers.1.self_attn.q_proj"]["error"] *= 0.99
    (lora / "boneconv.json").write_text(json.dumps(record))
    report = verify(case.base, case.adapter, lora)
    assert [tensor.name for tensor in report.failures] == [Q1]


def test_without_a_record_the_assumption_is_said(tmp_path: Path) -> None:
    case = make_case(tmp_path, "bone", F32)
    lora = lora_of(case)
    (lora / "boneconv.json").unlink()
    report = verify(case.base, case.adapter, lora)
    assert report.passed
    assert [finding.code for finding in report.findings] == ["assumed-error"]


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        ("zero", "not-applied"),
        ("alpha", "wrong-scale"),
        ("rank", "truncated-rank"),
        ("missing", "tensor-missing"),
        ("nan", "not-finite"),
        ("element", None),
    ],
)
def test_a_spoiled_lora_is_named(spoil: str, code: str | None, tmp_path: Path) -> None:
    case = make_case(tmp_path, "bone", F32)
    lora = lora_of(case)
    a, b = LORA_Q.format("A"), LORA_Q.format("B")

    def change(tensors: dict[str, np.ndarray]) -> None:
        if spoil == "zero":
            tensors[b][...] = 0
        elif spoil == "rank":
            tensors[a][5:] = 0
        elif spoil == "missing":
            del tensors[a], tensors[b]
        elif spoil == "nan":
            tensors[b][0, 0] = np.nan
        elif spoil == "element":
            tensors[b][0, 0] *= 1.001

    rewrite(lora / WEIGHTS, change)
    if spoil == "alpha":
        edit_json(lora / "adapter_config.json", lora_alpha=16)
    report = verify(case.base, case.adapter, lora)
    assert not report.passed
    assert {finding.code for finding in report.findings} == ({code} if code else set())
    if spoil != "alpha":
        assert [tensor.name for tensor in report.failures] == [Q1]


def test_a_dora_is_refused(tmp_path: Path) -> None:
    case = make_case(tmp_path, "bone", F32)
    lora = lora_of(case)
    edit_json(lora / "adapter_config.json", use_dora=True)
    with pytest.raises(NotABoneAdapterError):
        verify(case.base, case.adapter, lora)


@pytest.mark.parametrize(
    ("variant", "target", "suffix"),
    [
        ("bone", "native", ""),
        ("bat", "native", ".safetensors"),
        ("bone", "peft-miss", ""),
        ("bat", "peft-miss", ""),
        ("mini", "native", ""),
    ],
)
def test_another_format_of_the_same_adapter_passes(
    variant: str, target: str, suffix: str, tmp_path: Path
) -> None:
    case = make_case(tmp_path, variant, F32)
    out = tmp_path / f"converted{suffix}"
    base = {"base": case.base} if target == "native" else {}
    boneconv.convert(case.adapter, out, to=target, **base)
    report = verify(case.base, case.adapter, out)
    assert report.passed
    assert report.kind is CandidateKind.ADAPTER
    assert report.totals.identical == len(case.blocks)


def test_a_mini_adapter_may_become_the_same_bone(tmp_path: Path) -> None:
    """Another block, but exactly the same update."""
    case = make_case(tmp_path, "mini", F32)
    tiled = {
        module: np.tile(block, (1, case.weights[f"{module}.weight"].shape[0] // block.shape[1]))
        for module, block in case.blocks.items()
    }
    other = models.make_adapter(tmp_path / "bone", "bone", rank=models.RANK, blocks=tiled)
    assert verify(case.base, case.adapter, other).passed


def test_another_adapter_fails(tmp_path: Path) -> None:
    case = make_case(tmp_path, "bone", F32)
    blocks = case.blocks | {
        "model.layers.1.self_attn.q_proj": case.blocks["model.layers.2.self_attn.q_proj"]
    }
    other = models.make_adapter(tmp_path / "other", "bone", rank=models.RANK, blocks=blocks)
    report = verify(case.base, case.adapter, other)
    assert [tensor.name for tensor in report.failures] == [Q1]


def test_a_converted_adapter_stands_for_one(tmp_path: Path) -> None:
    case = make_case(tmp_path, "bone", F32)
    shutil.copytree(case.adapter, tmp_path / "copy")
    with pytest.raises(UsageError):
        verify(case.base, case.adapter, tmp_path / "copy", more=[case.adapter])
