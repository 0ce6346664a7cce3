"""Reports as JSON documents, as ``specs/*-report-1.0.schema.json`` describe them.

JSON has no infinities and no NaN: they are written as the strings ``Infinity``, ``-Infinity`` and
``NaN``.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from boneconv import __version__
from boneconv.reporting.summary import headline
from boneconv.verification.report import DiffReport, Report

__all__ = ["DIFF_FORMAT", "VERIFY_FORMAT", "diff_document", "verify_document"]

VERIFY_FORMAT = "boneconv-verify-report"
DIFF_FORMAT = "boneconv-diff-report"
_VERSION = "1.0"


def verify_document(report: Report) -> dict[str, Any]:
    """The document of a verification."""
    head = {
        "format": VERIFY_FORMAT,
        "version": _VERSION,
        "boneconv": __version__,
        "passed": report.passed,
        "verdict": headline(report),
    }
    body: dict[str, Any] = _plain(asdict(report))
    return head | body


def diff_document(report: DiffReport) -> dict[str, Any]:
    """The document of a comparison."""
    head = {
        "format": DIFF_FORMAT,
        "version": _VERSION,
        "boneconv": __version__,
        "identical": report.identical,
    }
    body: dict[str, Any] = _plain(asdict(report))
    body["settings"] = [{"name": name, "a": a, "b": b} for name, a, b in report.settings]
    return head | body


def _plain(value: Any) -> Any:
    """What json.dumps writes as standard JSON."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, str):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
