"""Reports as a verification makes them, without one: honest, spoilt, hostile and huge."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from boneconv.verification.report import (
    CandidateKind,
    DiffReport,
    FileReport,
    Finding,
    Presence,
    Report,
    Severity,
    Status,
    TensorAction,
    TensorDiff,
    TensorReport,
    Totals,
)

KINDS = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}
NOT_APPLIED = "equals the base: the adapter was not applied there"
#: What a stranger may call a tensor.
HOSTILE = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\" onmouseover='alert(1)' x=\"",
    "a|b`c`\n# heading\n\n[link](https://example.org) @everyone",
    "{{ 7 * 7 }} {% raw %} ]]> &amp; --> </style>",
    "moves\x1b[2Jthe\rcursor\x00 and \u202eturns",
    "w" * 5000,
)


def weight(layer: int, kind: str = "q_proj", **fields: Any) -> TensorReport:
    """A merged weight, exact unless `fields` say otherwise."""
    module = f"model.layers.{layer}.{KINDS[kind]}.{kind}"
    tensor = TensorReport(
        name=f"{module}.weight",
        action=TensorAction.MERGE,
        status=Status.PASS,
        dtype="BF16",
        shape=(576, 576),
        elements=576 * 576,
        identical=True,
        module=module,
        layer=layer,
        kind=kind,
        share_correct=1.0,
        max_ulp=0.0,
        mean_ulp=0.0,
        max_abs=0.0,
        relative_frobenius=0.0,
        cosine=1.0,
        update_norm=0.01 * (1 + layer % 5),
        place="model.safetensors",
    )
    return replace(tensor, **fields)


def failed(layer: int, kind: str = "q_proj", **fields: Any) -> TensorReport:
    """A weight that the adapter was not applied to."""
    wrong: dict[str, Any] = {
        "status": Status.FAIL,
        "identical": False,
        "share_correct": 0.25,
        "max_ulp": 212.0,
        "mean_ulp": 31.5,
        "max_abs": 0.0312,
        "relative_frobenius": 0.0271,
        "cosine": None,
        "reason": "75.00 % of the elements are off, by up to 212 ULP",
        "diagnosis": NOT_APPLIED,
        "code": "not-applied",
    }
    return weight(layer, kind, **(wrong | fields))


def norm(layer: int, **fields: Any) -> TensorReport:
    """A tensor that the adapter leaves alone."""
    tensor = TensorReport(
        name=f"model.layers.{layer}.input_layernorm.weight",
        action=TensorAction.COPY,
        status=Status.PASS,
        dtype="BF16",
        shape=(576,),
        elements=576,
        identical=True,
        layer=layer,
        kind="input_layernorm",
    )
    return replace(tensor, **fields)


def stranger(name: str) -> TensorReport:
    """A tensor that should not be there."""
    return TensorReport(
        name=name,
        action=TensorAction.EXTRA,
        status=Status.FAIL,
        dtype="F32",
        shape=(),
        elements=1,
        identical=False,
        reason="neither base nor adapter has it",
        code="extra",
    )


def report(
    tensors: tuple[TensorReport, ...],
    *,
    files: tuple[FileReport, ...] = (FileReport("config.json", Status.PASS),),
    findings: tuple[Finding, ...] = (),
    **fields: Any,
) -> Report:
    """A report over tensors, with their sums."""
    adapted = [t for t in tensors if t.module is not None]
    wrong = sum(t.status is Status.FAIL for t in tensors)
    shares = [t.share_correct for t in adapted if t.share_correct is not None]
    ulps = [t.max_ulp for t in tensors if t.max_ulp is not None and not math.isnan(t.max_ulp)]
    totals = Totals(
        tensors=len(tensors),
        passed=len(tensors) - wrong,
        failed=wrong,
        identical=sum(t.identical for t in tensors),
        adapted=len(adapted),
        elements=sum(t.elements for t in tensors),
        share_correct=sum(shares) / len(shares) if shares else None,
        max_ulp=max(ulps, default=None),
        update_norm=0.0231 if adapted else None,
    )
    values: dict[str, Any] = {
        "base": "HuggingFaceTB/SmolLM2-135M-Instruct@main",
        "adapters": ("./adapter",),
        "candidate": "./merged",
        "kind": CandidateKind.CHECKPOINT,
        "numerics": "canonical",
        "tolerance": "canonical",
        "scale": 1.0,
        "dtype": "keep",
    }
    return Report(tensors=tensors, files=files, findings=findings, totals=totals, **values | fields)


def honest(layers: int = 3) -> Report:
    """All weights exact."""
    tensors: list[TensorReport] = []
    for layer in range(layers):
        tensors += [weight(layer, kind) for kind in KINDS]
        tensors.append(norm(layer))
    return report(tuple(tensors))


def spoilt() -> Report:
    """Two weights without the adapter, one shifted, one missing, a stranger, a file."""
    shifted = failed(
        2,
        "down_proj",
        diagnosis=None,
        code=None,
        max_ulp=1.0,
        mean_ulp=1e-6,
        share_correct=1 - 1e-9,
        reason="1 of 331,776 elements is off, by 1 ULP",
    )
    missing = replace(
        failed(1, "up_proj", diagnosis=None, code="missing", reason="it is not there"),
        action=TensorAction.MISSING,
        share_correct=None,
        max_ulp=None,
        mean_ulp=None,
        max_abs=None,
        relative_frobenius=None,
        update_norm=None,
    )
    names = tuple(f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1))
    return report(
        (weight(2), failed(0), norm(0), failed(1), shifted, missing, stranger("old.weight")),
        files=(
            FileReport("config.json", Status.PASS),
            FileReport("tokenizer.json", Status.FAIL, "differs from the base's"),
        ),
        findings=(
            Finding(
                Severity.ERROR,
                "not-applied",
                "the adapter is missing in 2 weights: those of q_proj",
                names,
            ),
            Finding(Severity.NOTE, "no-fingerprint", "the base is taken on trust"),
        ),
    )


def hostile() -> Report:
    """Names, reasons and paths that attack terminals, Markdown, XML and pages."""
    tensors = [weight(0), *map(stranger, HOSTILE)]
    tensors += [failed(1, diagnosis=text, code=None, kind="q_proj") for text in HOSTILE]
    tensors += [replace(failed(2), name=text, module=text, kind=text) for text in HOSTILE]
    return report(
        tuple(tensors),
        files=tuple(FileReport(text, Status.FAIL, text) for text in HOSTILE),
        findings=tuple(Finding(Severity.ERROR, "odd", text, HOSTILE) for text in HOSTILE),
        base=HOSTILE[0],
        adapters=HOSTILE,
        candidate=HOSTILE[3],
    )


def lora() -> Report:
    """A LoRA, which is measured by its relative error alone."""
    values: dict[str, Any] = {
        "identical": False,
        "share_correct": None,
        "max_ulp": None,
        "mean_ulp": None,
    }
    tensors = tuple(
        weight(i, relative_frobenius=0.01 * (i + 1), cosine=0.9999999, **values) for i in range(3)
    )
    return report(tensors, kind=CandidateKind.LORA, tolerance="recorded", numerics=None)


def not_finite() -> Report:
    """A weight with NaN in it, and one with infinities."""
    return report(
        (
            failed(0, max_ulp=math.inf, max_abs=math.inf, relative_frobenius=math.inf),
            failed(1, max_ulp=math.nan, max_abs=math.nan, relative_frobenius=math.nan),
            weight(2),
        )
    )


def distance(name: str, **fields: Any) -> TensorDiff:
    """A tensor that is the same on both sides unless `fields` say otherwise."""
    tensor = TensorDiff(
        name=name,
        presence=Presence.BOTH,
        dtype_a="BF16",
        dtype_b="BF16",
        shape_a=(4, 8),
        shape_b=(4, 8),
        identical=True,
        elements=32,
        differing=0,
        max_ulp=0.0,
        max_abs=0.0,
        relative_frobenius=0.0,
        cosine=1.0,
    )
    return replace(tensor, **fields)


def same() -> DiffReport:
    """Two checkpoints without a difference."""
    return DiffReport("a", "b", CandidateKind.CHECKPOINT, (distance("x"), distance("y")))


def different() -> DiffReport:
    """Two adapters that differ in every way."""
    unknown: dict[str, Any] = {
        "identical": False,
        "differing": None,
        "max_ulp": None,
        "max_abs": None,
        "relative_frobenius": None,
        "cosine": None,
    }
    alone = unknown | {"presence": Presence.ONLY_A, "dtype_b": None, "shape_b": None}
    other = unknown | {"presence": Presence.ONLY_B, "dtype_a": None, "shape_a": None}
    near = {"identical": False, "differing": 1, "max_ulp": 1.0, "max_abs": 2e-7}
    tensors = (
        distance("same"),
        distance("near", relative_frobenius=1e-7, cosine=1 - 1e-12, **near),
        distance("far", relative_frobenius=0.5, cosine=0.8, **near | {"differing": 32}),
        distance("shape", **unknown | {"shape_b": (8, 4)}),
        distance("dtype", **unknown | {"dtype_b": "F32", "differing": 0}),
        distance("only a", **alone),
        distance("only b", **other),
    )
    return DiffReport("a", "b", CandidateKind.ADAPTER, tensors, (("r", "4", "8"),))
