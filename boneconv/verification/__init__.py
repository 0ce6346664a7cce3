"""Verification: whether a candidate is what base and adapters mean; and comparing two of a kind.

`verify` recomputes every target tensor and compares; `diff` compares two checkpoints or adapters.
Both return frozen values (`boneconv.verification.report`) and print nothing. `reach` states what
passes, `alternatives` the mistakes that are told from each other.
"""

from __future__ import annotations

from boneconv.verification.difference import diff
from boneconv.verification.report import DiffReport, Report
from boneconv.verification.run import verify

__all__ = ["DiffReport", "Report", "diff", "verify"]
