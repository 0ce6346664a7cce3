"""A comparison as text for a terminal: the tensors that differ, the most distant first."""

from __future__ import annotations

import math
from collections.abc import Sequence

from boneconv.reporting.text import columns, cosine, count, number, percent, plain, shape
from boneconv.verification.report import DiffReport, Presence, TensorDiff

__all__ = ["diff_headline", "diff_table"]

_SHOWN = 40
_HEAD = ("tensor", "differs in", "elements", "max ULP", "max abs", "rel. distance", "cosine")


def diff_headline(report: DiffReport) -> str:
    """Whether the two sides are the same, in one sentence."""
    if report.identical:
        return f"SAME: {count(len(report.tensors), 'tensor')}, every byte equal"
    parts = []
    for presence, words in (
        (Presence.BOTH, "differ"),
        (Presence.ONLY_A, "only in A"),
        (Presence.ONLY_B, "only in B"),
    ):
        found = sum(t.presence is presence and not t.identical for t in report.tensors)
        if found:
            parts.append(f"{found:,} {words}")
    text = f"{', '.join(parts)} of {count(len(report.tensors), 'tensor')}" if parts else ""
    settings = count(len(report.settings), "setting") if report.settings else ""
    return f"DIFFERENT: {'; '.join(filter(None, (text, settings)))}"


def diff_table(report: DiffReport, *, verbose: bool = False) -> str:
    """A comparison as text.

    Args:
        report: What was found.
        verbose: Whether to list every tensor, equal ones too, however many there are.
    """
    facts = columns([("A", report.a), ("B", report.b), ("kind", str(report.kind))])
    settings = [plain(f"setting {name}: {a} -> {b}") for name, a, b in report.settings]
    ordered = sorted(report.tensors, key=_nearness)
    if not verbose:
        ordered = [tensor for tensor in ordered if not tensor.identical]
    shown = ordered if verbose else ordered[:_SHOWN]
    left = len(ordered) - len(shown)
    rest = [f"and {left:,} more; -v lists them all"] if left else []
    parts = ([diff_headline(report)], facts, settings, [*_rows(shown), *rest])
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _nearness(tensor: TensorDiff) -> tuple[float, ...]:
    distance = tensor.relative_frobenius
    if distance is None or math.isnan(distance):
        distance = math.inf
    return (tensor.identical, tensor.presence is Presence.BOTH, -distance)


def _rows(tensors: Sequence[TensorDiff]) -> list[str]:
    if not tensors:
        return []
    rows = [_HEAD]
    rows += [
        (
            tensor.name,
            _what(tensor),
            _share(tensor),
            number(tensor.max_ulp),
            number(tensor.max_abs),
            number(tensor.relative_frobenius),
            cosine(tensor.cosine),
        )
        for tensor in tensors
    ]
    return columns(rows, right=frozenset(range(2, len(_HEAD))))


def _what(tensor: TensorDiff) -> str:
    if tensor.identical:
        return "nothing"
    if tensor.presence is not Presence.BOTH:
        return "only in A" if tensor.presence is Presence.ONLY_A else "only in B"
    if tensor.shape_a != tensor.shape_b:
        return f"shape {shape(tensor.shape_a)} -> {shape(tensor.shape_b)}"
    if tensor.dtype_a != tensor.dtype_b:
        return f"dtype {tensor.dtype_a} -> {tensor.dtype_b}"
    return "bytes alone" if tensor.differing == 0 else "values"


def _share(tensor: TensorDiff) -> str:
    if tensor.differing is None or not tensor.elements:
        return number(None)
    return percent(tensor.differing / tensor.elements)
