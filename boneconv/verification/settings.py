"""What a candidate is held against: the strength, the dtype and the rule, given or inferred.

Nothing is inferred silently: every assumption becomes a note of the report.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from boneconv.digest import file_digest
from boneconv.dtypes import FLOAT8S, FLOATS, cli_name
from boneconv.errors import UsageError
from boneconv.io.safetensors import Tensor
from boneconv.planning.plan import MergePlan
from boneconv.verification.report import Finding, Severity

__all__ = ["TOLERANCES", "Settings", "check_record", "infer", "rule_of"]

TOLERANCES = ("default", "canonical", "peft")
_CLI_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Settings:
    """What a candidate is held against.

    Attributes:
        scale: S in ``W + S (W' - W)``.
        dtype: ``keep``, ``float32``, ``bfloat16`` or ``float16``.
        findings: What was assumed.
    """

    scale: float
    dtype: str
    findings: tuple[Finding, ...]


def infer(
    scale: float | None,
    dtype: str | None,
    record: Mapping[str, Any],
    base: Mapping[str, Tensor],
    candidate: Mapping[str, Tensor],
) -> Settings:
    """Completes the settings from the candidate's record and from its dtypes.

    Args:
        scale: As given; None takes what the record says, else 1.
        dtype: As given; None takes what the candidate's tensors have.
        record: The candidate's record; empty where there is none.
        base: The base's tensors.
        candidate: The candidate's.
    """
    notes: list[Finding] = []
    if scale is None:
        scale = _recorded_scale(record)
        if scale is None:
            scale = 1.0
        elif scale != 1.0:
            notes.append(_note("assumed-scale", f"scale {scale:g}, as the candidate's record says"))
    if not math.isfinite(scale):
        raise UsageError("the scale is not finite", found=scale, hint="Give a number as 0.5")
    if dtype is None:
        dtype = _dtype_of(base, candidate)
        if dtype != "keep":
            text = f"every floating tensor in {dtype}, as the candidate's are"
            notes.append(_note("assumed-dtype", text))
    return Settings(scale, dtype, tuple(notes))


def rule_of(tolerance: str, record: Mapping[str, Any]) -> tuple[str, str | None]:
    """The rule that holds, and the numerics that the record promises.

    A candidate that says that it is canonical is held to its word, whatever the tolerance.

    Raises:
        UsageError: There is no such tolerance.
    """
    if tolerance not in TOLERANCES:
        raise UsageError(f"unknown tolerance {tolerance!r}", expected=", ".join(TOLERANCES))
    numerics = "canonical" if record.get("numerics") == "canonical" else None
    return ("canonical" if numerics else tolerance), numerics


def check_record(planned: MergePlan, scale: float, record: Mapping[str, Any]) -> list[Finding]:
    """Where the candidate's record speaks of another merge than the one it is held against."""
    entries = record.get("adapters")
    if not isinstance(entries, list):
        return []
    given = len(planned.strengths)
    if len(entries) != given:
        text = f"its record lists {len(entries)} adapters, {given} were given"
        return [Finding(Severity.WARNING, "record-differs", text)]
    found = []
    for entry, strength, source in zip(entries, planned.strengths, planned.adapters, strict=True):
        if not isinstance(entry, dict):
            continue
        recorded = entry.get("blake3")
        if recorded is not None and recorded != file_digest(strength.adapter.weights):
            text = f"its record names another adapter file than {source.given}"
            found.append(Finding(Severity.WARNING, "record-differs", text))
        if entry.get("scale", scale) != scale:
            text = f"its record says scale {entry['scale']:g}; it is held against {scale:g}"
            found.append(Finding(Severity.WARNING, "record-differs", text))
    return found


def _recorded_scale(record: Mapping[str, Any]) -> float | None:
    entries = record.get("adapters")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        return None
    scales = {entry.get("scale") for entry in entries}
    (scale,) = scales if len(scales) == 1 else (None,)
    return float(scale) if isinstance(scale, int | float) else None


def _dtype_of(base: Mapping[str, Tensor], candidate: Mapping[str, Tensor]) -> str:
    """The one dtype of all, where it is not what each tensor of the base has; else ``keep``."""
    shared = [
        name
        for name in candidate
        if name in base and (base[name].dtype in FLOATS or base[name].dtype in FLOAT8S)
    ]
    kept = sum(candidate[name].dtype == base[name].dtype for name in shared)
    counts = Counter(t.dtype for t in candidate.values() if t.dtype in FLOATS)
    if kept == len(shared) or len(counts) != 1:
        return "keep"
    (name,) = counts
    return cli_name(name) if cli_name(name) in _CLI_DTYPES else "keep"


def _note(code: str, text: str) -> Finding:
    return Finding(Severity.NOTE, code, f"held against {text}")
