"""Whether the base is the one that the adapters were made for, of native ones that say so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from boneconv.planning.fingerprints import base_mismatches
from boneconv.planning.plan import MergePlan
from boneconv.verification.engine import Found
from boneconv.verification.report import Finding, Severity

__all__ = ["check_base"]


def check_base(
    planned: MergePlan,
    found: Mapping[str, Found],
    record: Mapping[str, Any],
    *,
    allowed: bool,
) -> list[Finding]:
    """An error for each adapter whose fingerprint names another base.

    Args:
        planned: The adapters, and their homes in the base.
        found: What was measured, by the plan's names; digests that it lacks are made here.
        record: The candidate's. That its maker was told to go on makes the errors warnings.
        allowed: The same, of the verification itself.

    Raises:
        FormatError, MachineError: The base cannot be read.
    """
    digests = {name: each.base for name, each in found.items()}
    told = allowed or record.get("fingerprint_ignored") is True
    severity = Severity.WARNING if told else Severity.ERROR
    return [
        Finding(severity, "base-mismatch", violation.message)
        for violation in base_mismatches(planned, digests)
    ]
